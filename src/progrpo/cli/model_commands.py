"""Commands around models: sample, studio and pretrain."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.cli.command import Command, as_option, check_device, check_range, require_run, sampling_given

if TYPE_CHECKING:
    from progrpo.zoo.pretraining import Pretraining


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Draw pictures for prompts, with a trained LoRA if given."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A run folder, a built-in model's name, a folder in diffusers' format, or a hub id."""
    prompt: tuple[str, ...] = ()
    """One prompt or several."""
    prompts: str = ""
    """In place of --prompt: `shapes`, `words`, a prompt file or dataset:NAME, as --prompts.source of `train`."""
    limit: int | None = None
    """The number of prompts of --prompts that are taken; fewer where it has fewer. Without it: 100."""
    image: tuple[Path, ...] = ()
    """For a model that edits: the picture to change, one for all prompts or one for each."""
    lora: Path | None = None
    """A run folder, or a LoRA: a folder, a file in safetensors or a hub id, as --model.lora of `train`."""
    out: Path = Path("samples")
    """The folder of the pictures. 001-03.png is the fourth picture of the second prompt.
    Numbers of prompts continue from the pictures that are there, and nothing is replaced."""
    seed: int | None = None
    """The seed. Without it: that of the run's evaluations, 0 if no run is named."""
    num_inference_steps: int | None = None
    """The number of steps. Without it: that of the run's evaluations, 10 if no run is named."""
    guidance_scale: float | None = None
    """The guidance scale. Without it: that of the run's evaluations, 1 (none) if no run is named."""
    negative_prompt: str | None = None
    """A text from which guidance leads away. Without it: that of the run, none if no run is named."""
    count: int = 1
    """The number of pictures per prompt."""
    revision: str = ""
    """The branch, tag or commit of a model that is a hub id, as --model.revision of `train`."""
    variant: str = ""
    """The variant of a model's weights files, such as fp16, as --model.variant of `train`."""

    def run(self) -> None:
        check_range(0, 2**63 - 1, seed=self.seed)
        check_range(1, 1000, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        check_range(1, 10_000, count=self.count)
        check_range(1, 1_000_000, limit=self.limit)
        if bool(self.prompt) == bool(self.prompts):
            raise ValueError("give --prompt TEXT ... or --prompts SOURCE, one of the two")
        if self.prompt and self.limit is not None:
            raise ValueError("--limit goes with --prompts; every --prompt is taken, so leave it out")
        if self.prompts and self.image:
            raise ValueError("--image goes with --prompt; rows of --prompts bring their picture as their column image")
        from progrpo.prompts.load import first_prompts, prompts_from_python

        prompts = (
            first_prompts(self.prompts, self.limit or 100)
            if self.prompts
            else prompts_from_python(self._rows(), "--prompt")
        )
        from progrpo.training.sample import sample_pictures
        from progrpo.training.trained_model import ModelChoice

        model = ModelChoice(self.model, self.lora, self.revision, self.variant)
        files = sample_pictures(model, prompts, self.out, self.count, sampling_given(self), self.negative_prompt)
        if files:
            print("\n".join(str(file) for file in files))

    def _rows(self) -> list[dict[str, str]]:
        """The prompts as rows, with their pictures."""
        if len(self.image) not in (0, 1, len(self.prompt)):
            raise ValueError(
                f"--image: {len(self.image)} pictures for {len(self.prompt)} prompts; give one for all, or one for each"
            )
        images = self.image * len(self.prompt) if len(self.image) == 1 else self.image
        columns = [{"image": str(image)} for image in images] or [{} for _ in self.prompt]
        return [{"prompt": text, **row} for text, row in zip(self.prompt, columns, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Studio(Command):
    """Open a local page to try a run's model, and to see what a plan does to a group."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""
    reward: tuple[str, ...] = ()
    """One reward or several, as `--reward.terms` of `train`. Without it: the run's own."""
    host: str = "127.0.0.1"
    """The address to listen at. Whoever reaches it can use this machine's processors."""
    port: int = 7860
    """The port; 0 is any free one."""

    def run(self) -> None:
        check_range(0, 65_535, port=self.port)
        require_run(self.folder)
        if find_spec("gradio") is None:
            raise ValueError("studio needs gradio, which is not installed: pip install 'progrpo[studio]'")
        from progrpo.studio.app import serve

        serve(self.folder, self.reward, self.host, self.port)


@dataclass(frozen=True, kw_only=True)
class Pretrain(Command):
    """Make a built-in model; the same command continues where it was stopped."""

    model: Positional[Literal["shapes-flow", "shapes-diffusion", "shapes-tiny", "words-flow"]]
    """The model. shapes-diffusion learns from the shipped shapes-flow and shares its autoencoder.
    shapes-tiny is a small decoder for both, which learns from the autoencoder's own.
    words-flow begins with the shipped shapes-flow and learns to spell; rapidocr reads what it draws."""
    out: Path | None = None
    """The folder of its state. Without it: runs/pretrain/MODEL."""
    device: str = "auto"
    """The device. `auto` is the GPU where there is one, else the CPU."""
    from_shipped: FlagCreatePairsOff[bool] = False
    """Train the shipped shapes-flow further; its autoencoder stays, and the state lies in OUT/from-shipped."""
    vae_steps: int | None = None
    """The optimizer steps of this stage of shapes-flow or words-flow. Without it: those of the shipped model."""
    flow_steps: int | None = None
    """The optimizer steps of this stage of shapes-flow or words-flow."""
    judge_steps: int | None = None
    """The optimizer steps of this stage."""
    unet_steps: int | None = None
    """The optimizer steps of shapes-diffusion."""
    decoder_steps: int | None = None
    """The optimizer steps of shapes-tiny."""
    export: FlagCreatePairsOff[bool] = False
    """Put the finished model into the package, as the one that is shipped."""

    STEPS: ClassVar = ("vae_steps", "flow_steps", "judge_steps", "unet_steps", "decoder_steps")
    MODELS_OF_OPTION: ClassVar = {
        "from_shipped": ("shapes-flow",),
        "vae_steps": ("shapes-flow", "words-flow"),
        "flow_steps": ("shapes-flow", "words-flow"),
        "judge_steps": ("shapes-flow",),
        "unet_steps": ("shapes-diffusion",),
        "decoder_steps": ("shapes-tiny",),
    }

    def run(self) -> None:
        check_range(1, 10**9, **{name: getattr(self, name) for name in self.STEPS})
        check_device(self.device)
        for name, models in self.MODELS_OF_OPTION.items():
            if self.model not in models and getattr(self, name) not in (None, False):
                raise ValueError(f"{as_option(name)} is an option of {' and '.join(models)}, not of {self.model}")
        from progrpo.zoo import WEIGHTS
        from progrpo.zoo.pretraining import Pretraining

        out = self.out or Path("runs/pretrain") / self.model
        if self.from_shipped:  # a folder of its own: one resumed state must not mix latents and weights of two models
            out /= "from-shipped"
        run = Pretraining(out, device=self.device, export=WEIGHTS if self.export else None)
        shipped = WEIGHTS / "shapes-flow"
        if self.model == "shapes-diffusion":
            self._pretrain_diffusion(run, shipped)
        elif self.model == "shapes-tiny":
            self._pretrain_tiny(run, shipped)
        elif self.model == "words-flow":
            self._pretrain_words(run, shipped)
        else:
            self._pretrain_flow(run, shipped if self.from_shipped else None)

    def _pretrain_flow(self, run: Pretraining, start: Path | None) -> None:
        from progrpo.zoo.shapes.pretrain import Budget, pretrain

        steps = {"vae_steps": self.vae_steps, "flow_steps": self.flow_steps, "judge_steps": self.judge_steps}
        budget = Budget(**{name: number for name, number in steps.items() if number is not None})
        pretrain(run, budget, start)

    def _pretrain_diffusion(self, run: Pretraining, teacher: Path) -> None:
        from progrpo.zoo.shapes.pretrain_diffusion import DiffusionBudget, pretrain_diffusion

        budget = DiffusionBudget() if self.unet_steps is None else DiffusionBudget(steps=self.unet_steps)
        pretrain_diffusion(run, budget, teacher)

    def _pretrain_tiny(self, run: Pretraining, teacher: Path) -> None:
        from progrpo.zoo.shapes.pretrain_tiny import TinyBudget, pretrain_tiny

        budget = TinyBudget() if self.decoder_steps is None else TinyBudget(steps=self.decoder_steps)
        pretrain_tiny(run, budget, teacher)

    def _pretrain_words(self, run: Pretraining, start: Path) -> None:
        from progrpo.zoo.words.pretrain import WordsBudget, pretrain_words

        steps = {"vae_steps": self.vae_steps, "flow_steps": self.flow_steps}
        budget = WordsBudget(**{name: number for name, number in steps.items() if number is not None})
        pretrain_words(run, budget, start)
