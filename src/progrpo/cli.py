"""The `progrpo` command. It parses and hands over: torch is imported by the stages that it calls, never for help."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import count, dropwhile, pairwise, takewhile
from operator import attrgetter, not_
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from progrpo import __version__
from progrpo.config import (
    GPU,
    Config,
    PlanSettings,
    RewardTerm,
    check,
    config_to_json,
    resolve_plan,
    trained_items,
)
from progrpo.durable import DiskError, write_text
from progrpo.messages import named, nearest, quoted
from progrpo.recipes import RECIPES, describe, load_recipe
from progrpo.rollout.plan import summary
from progrpo.settings import DEVICE_PATTERN, Values, field_paths
from progrpo.streams import failure_of, occupy_standard_descriptors, release_standard_descriptors, tolerant_streams
from progrpo.tracking.lock import LockLostError
from progrpo.training.errors import Interrupted, LostProcessError, SelfCheckError

_Fields = Annotated[Config, arg(name="")]  # the configuration's fields stand beside the command's own options


# --- commands: what is parsed, and what is done with it ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe, a config file or a run folder's config; `progrpo train --resume RUN` goes on with a stopped run."""

    out: Path | None = None
    """The run folder; without it runs/RECIPE, or runs/RECIPE-2 and so on where that is taken."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace a run that is already there."""
    config: _Fields

    def run(self) -> None:
        check(self.config)
        from progrpo.training.entry import train_run

        home = Path("runs") / self.config.recipe
        out = self.out or (home if self.overwrite else _first_free(home))
        train_run(self.config, out, self.overwrite)


@dataclass(frozen=True)
class Resume:
    """Go on with a stopped run, exactly as it would have gone."""

    resume: Path
    """The run folder."""
    iterations: int | None = None
    """Iterations in all; without it as many as the run was started for."""
    accept_changes: FlagCreatePairsOff[bool] = False
    """Go on though config.json or the prompts were changed since the checkpoint."""

    def run(self) -> None:
        _require_run(self.resume)
        from progrpo.training.entry import resume_run

        resume_run(self.resume, self.iterations, self.accept_changes)


@dataclass(frozen=True)
class Recipes:
    """List the shipped recipes, or print one of them as JSON."""

    name: Annotated[Positional[str | None], arg(metavar="[RECIPE]")] = None
    """The recipe to print."""

    def run(self) -> None:
        if self.name is None:
            _show(_columns({name: describe(name) for name in RECIPES}))
        else:
            _show(config_to_json(load_recipe(self.name)).rstrip())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what a recipe's plan costs: network calls, decodes, rewards; with --gpu also operations, memory and time. Needs no weights."""

    plan: Literal["recipe", "standard", "flash", "posthoc", "none", "sd14", "custom"] = "recipe"
    """The recipe's own plan, or another in its place, as --plan.preset; `custom` is that of --plan.group-size, --plan.prune and --plan.final-keep."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    gpu: GPU | None = None
    """Estimate memory by what holds it, and time, on such a card."""
    share_of_peak: float = 0.35
    """Of the card's peak that a network call is assumed to reach."""
    processes: int = 1
    """One to a card."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""
    config: _Fields

    def run(self) -> None:
        config = self._config()
        check(config)
        _within(0.01, 1, share_of_peak=self.share_of_peak)
        _within(1, 100_000, processes=self.processes)
        sampling = config.sampling
        costs = summary(
            resolve_plan(config),
            sampling.num_inference_steps,
            trained_items(config),
            sampling.in_pairs,
            config.preview.ode_steps,
        )
        told = {"recipe": config.recipe, "plan": config.plan.preset, **costs}
        if self.gpu is not None:
            from progrpo.training.estimate import estimate

            told |= estimate(config, self.gpu, self.share_of_peak, self.processes)
        _show(_result(told, self.json))

    def _config(self) -> Config:
        sampling = self.config.sampling
        if self.num_inference_steps is not None:
            sampling = replace(sampling, num_inference_steps=self.num_inference_steps)
        if self.guidance_scale is not None:
            sampling = replace(sampling, guidance_scale=self.guidance_scale)
        plan = self.config.plan if self.plan == "recipe" else replace(self.config.plan, preset=self.plan)
        return replace(self.config, sampling=sampling, plan=plan)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw pictures for prompts, with a trained LoRA if asked."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A run folder, a built-in model's name, a folder in diffusers' format, or a hub id."""
    prompt: tuple[str, ...]
    """One prompt or several."""
    image: tuple[Path, ...] = ()
    """For a model that edits: the picture to change, one for all prompts or one for each."""
    lora: Path | None = None
    """A run folder, or a LoRA: a folder, a file in safetensors or a hub id, as --model.lora of `train`."""
    out: Path = Path("samples")
    """The folder; 001-03.png is the fourth picture of the second prompt. Prompts are numbered on from those that are there, and nothing is replaced."""
    seed: int | None = None
    """Without it that of the run's evaluations, 0 where no run is named."""
    num_inference_steps: int | None = None
    """Without it as many as the run's evaluations took, 10 where no run is named."""
    guidance_scale: float | None = None
    """Without it that of the run's evaluations, 1 (none) where no run is named."""
    negative_prompt: str | None = None
    """A text that guidance leads away from; without it that of the run, none where no run is named."""
    count: int = 1
    """Pictures a prompt."""
    revision: str = ""
    """The branch, tag or commit of a model that is a hub id, as --model.revision of `train`."""
    variant: str = ""
    """Which of a model's weights files to read, such as fp16, as --model.variant of `train`."""

    def run(self) -> None:
        _within(0, 2**63 - 1, seed=self.seed)
        _within(1, 1000, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        _within(1, 10_000, count=self.count)
        from progrpo.prompts.load import prompts_of

        prompts = prompts_of(self._rows(), "--prompt")
        from progrpo.training.sample import sample_pictures

        files = sample_pictures(
            self.model,
            prompts,
            lora=self.lora,
            out=self.out,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            count=self.count,
            revision=self.revision,
            variant=self.variant,
        )
        if files:
            print("\n".join(str(file) for file in files))

    def _rows(self) -> list[dict[str, str]]:
        if len(self.image) not in (0, 1, len(self.prompt)):
            raise ValueError(
                f"--image: {len(self.image)} pictures for {len(self.prompt)} prompts; give one for all, or one for each"
            )
        images = self.image * len(self.prompt) if len(self.image) == 1 else self.image
        shown = [{"image": str(image)} for image in images] or [{} for _ in self.prompt]
        return [{"prompt": text, **row} for text, row in zip(self.prompt, shown, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a run or a model on held-out prompts."""

    target: Annotated[Positional[str], arg(metavar="RUN|MODEL")]
    """A run folder, a built-in model's name, a folder in diffusers' format, or a hub id."""
    lora: Path | None = None
    """For a model: a run folder, or a LoRA folder in diffusers' format."""
    prompts: str | None = None
    """`shapes`, a prompt file or dataset:NAME, as --eval.prompts of `train`; without it the run's own, `shapes` for a model."""
    column: str | None = None
    """The field of their rows that holds the text; without it the run's own, `prompt` for a model."""
    reward: tuple[str, ...] = ()
    """One or several, as `--reward.terms` of `train`; without it the run's own, `shapes` for a model."""
    split: Literal["test", "validation"] = "test"
    """Of `shapes`: tune on validation, state figures on test."""
    pictures: int = 512
    num_inference_steps: int | None = None
    """Without it as many as the run's own evaluations took, 10 for a model."""
    guidance_scale: float | None = None
    """Without it that of the run's own evaluations, 1 (none) for a model."""
    negative_prompt: str | None = None
    """A text that guidance leads away from; without it the run's own, none for a model."""
    seed: int | None = None
    """Without it that of the run's own evaluations, 1234 for a model."""
    revision: str = ""
    """The branch, tag or commit of a model that is a hub id, as --model.revision of `train`."""
    variant: str = ""
    """Which of a model's weights files to read, such as fp16, as --model.variant of `train`."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""

    def run(self) -> None:
        _within(1, 1000, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        _within(0, 2**63 - 1, seed=self.seed)
        _within(1, 1_000_000, pictures=self.pictures)
        from progrpo.training.evaluate import evaluate_model

        result = evaluate_model(
            self.target,
            lora=self.lora,
            prompts=self.prompts,
            column=self.column,
            reward=self.reward,
            split=self.split,
            pictures=self.pictures,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            revision=self.revision,
            variant=self.variant,
        )
        if result is not None:
            _show(_result(result, self.json), costly=True)


@dataclass(frozen=True)
class Report:
    """Write report.html of a run anew."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """The run folder."""

    def run(self) -> None:
        _require_run(self.folder)
        from progrpo.tracking.report import write_report

        print(write_report(self.folder))


@dataclass(frozen=True, kw_only=True)
class Repro:
    """Compute what the paper prints: `table4`, the cost of an epoch."""

    what: Positional[Literal["table4"]]
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""

    def run(self) -> None:
        from progrpo.repro.table4 import in_words, table4

        found = table4()
        _show(json.dumps(found, indent=2) if self.json else in_words(found))


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Make a built-in model; the same command goes on where it was stopped."""

    model: Positional[Literal["shapes-flow", "shapes-diffusion", "shapes-tiny"]]
    """shapes-diffusion is taught by the shipped shapes-flow and shares its autoencoder; shapes-tiny is a small decoder
    for both, taught by the autoencoder's own."""
    out: Path | None = None
    """Where its state lies; without it runs/pretrain/MODEL."""
    device: str = "auto"
    """`auto` is the GPU where there is one, else the CPU."""
    from_shipped: FlagCreatePairsOff[bool] = False
    """Train the shipped shapes-flow further; its autoencoder stays, and the state lies in OUT/from-shipped."""
    vae_steps: int | None = None
    """Optimizer steps of a stage; without it what made the shipped model."""
    flow_steps: int | None = None
    judge_steps: int | None = None
    unet_steps: int | None = None
    """Of shapes-diffusion."""
    decoder_steps: int | None = None
    """Of shapes-tiny."""
    export: FlagCreatePairsOff[bool] = False
    """Put the finished model in the package, as the one that is shipped."""

    def run(self) -> None:
        steps_of = ("vae_steps", "flow_steps", "judge_steps", "unet_steps", "decoder_steps")
        _within(1, 10**9, **{name: getattr(self, name) for name in steps_of})
        _device(self.device)
        from progrpo.zoo import WEIGHTS

        out, export = self.out or Path("runs/pretrain") / self.model, WEIGHTS if self.export else None
        if self.model != "shapes-flow":
            self._only_for("shapes-flow", "from_shipped", "vae_steps", "flow_steps", "judge_steps")
        if self.model != "shapes-diffusion":
            self._only_for("shapes-diffusion", "unet_steps")
        if self.model != "shapes-tiny":
            self._only_for("shapes-tiny", "decoder_steps")
        if self.model == "shapes-diffusion":
            from progrpo.zoo.shapes.pretrain_diffusion import DiffusionBudget, pretrain_diffusion

            steps = {} if self.unet_steps is None else {"steps": self.unet_steps}
            taught = DiffusionBudget(**steps)
            pretrain_diffusion(out, teacher=WEIGHTS / "shapes-flow", budget=taught, device=self.device, export=export)
            return
        if self.model == "shapes-tiny":
            from progrpo.zoo.shapes.pretrain_tiny import TinyBudget, pretrain_tiny

            steps = {} if self.decoder_steps is None else {"steps": self.decoder_steps}
            small = TinyBudget(**steps)
            pretrain_tiny(out, teacher=WEIGHTS / "shapes-flow", budget=small, device=self.device, export=export)
            return
        from progrpo.zoo.shapes.pretrain import Budget, pretrain

        wanted = {"vae_steps": self.vae_steps, "flow_steps": self.flow_steps, "judge_steps": self.judge_steps}
        # a folder of its own: latents and weights of two models must never meet in one resumed state
        start, out = (WEIGHTS / "shapes-flow", out / "from-shipped") if self.from_shipped else (None, out)
        budget = Budget(**{name: steps for name, steps in wanted.items() if steps is not None})
        pretrain(out, budget=budget, device=self.device, start=start, export=export)

    def _only_for(self, other: str, *options: str) -> None:
        for name in options:
            if getattr(self, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} is an option of {other}, not of {self.model}")


@dataclass(frozen=True, kw_only=True)
class ServeReward:
    """Serve a reward to other machines over HTTP, for `url` of their recipes."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A built-in reward's name, or `module:function`."""
    host: str = "127.0.0.1"
    """The address to listen at; one that other machines reach needs a token in PROGRPO_REWARD_TOKEN."""
    port: int = 8000
    """0 is any that is free."""
    device: str = "auto"
    """`auto` is the GPU where there is one, else the CPU."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int = 16
    """Pictures at once, of whichever requests."""
    model: str = ""
    """Another model than the reward's own: a hub id or a folder."""
    max_pictures: int = 64
    """Of a request."""
    max_megabytes: int = 64
    """Of a request."""

    def run(self) -> None:
        _within(0, 65_535, port=self.port)
        _within(1, 100_000, batch_size=self.batch_size, max_pictures=self.max_pictures)
        _within(1, 100_000, max_megabytes=self.max_megabytes)
        _device(self.device)
        lacking = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
        if lacking:
            raise ValueError(f"serve-reward needs {lacking[0]}, which is not installed: pip install 'progrpo[server]'")
        from progrpo.rewards.server import Limits, serve
        from progrpo.rewards.settings import RewardTerm

        term = RewardTerm(self.name, model=self.model, device=self.device, dtype=self.dtype, batch_size=self.batch_size)
        serve(term, self.host, self.port, Limits(self.max_pictures, self.max_megabytes))


@dataclass(frozen=True, kw_only=True)
class Import:
    """Translate the settings of flow_grpo or Flow-Factory into a configuration, and say what became of each."""

    framework: Positional[Literal["flow_grpo", "flow-grpo", "flow-factory", "flow_factory"]]
    settings: Annotated[Positional[str], arg(metavar="FILE")]
    """flow_grpo's config/grpo.py:FUNCTION, or Flow-Factory's YAML. It is read, and nothing in it is run."""
    out: Path | None = None
    """The configuration's file, for `progrpo train`; without it FUNCTION.json or the YAML's name with .json, here."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace a file that is already there."""
    gpus: int | None = None
    """flow_grpo: on how many it runs, where the file does not say."""
    script: Literal["auto", "plain", "fast", "guard"] = "auto"
    """flow_grpo: which of its training scripts reads the settings. `plain` trains all steps, `fast` a window, `guard` by GRPO-Guard's
    ratio; `auto` tells from the names and from whether a window is set."""

    def run(self) -> None:
        framework = self.framework.replace("-", "_")
        if framework != "flow_grpo" and (self.gpus is not None or self.script != "auto"):
            raise ValueError(f"--gpus and --script are options of flow_grpo, not of {self.framework}")
        _within(1, 100_000, gpus=self.gpus)
        from progrpo.imports.flow_factory import import_flow_factory
        from progrpo.imports.flow_grpo import import_flow_grpo
        from progrpo.imports.translation import as_tables

        if framework == "flow_grpo":
            translation = import_flow_grpo(self.settings, self.gpus, self.script)
        else:
            translation = import_flow_factory(self.settings)
        out = self.out or Path(re.split(r"[:/\\]", self.settings)[-1]).with_suffix(".json")
        if os.path.exists(out) and not self.overwrite:
            raise ValueError(f"{named(out)} is already there; give another --out, or --overwrite")
        named_so = replace(translation.config, recipe=re.sub(r"[^\w.-]", "-", out.stem)[:100] or "imported")
        check(named_so)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, config_to_json(named_so))
        except OSError as error:
            raise ValueError(f"{named(out)} cannot be written: {error.strerror}") from None
        print(f"{as_tables(translation)}\n\n{named(out)} is written: progrpo train {named(out)}")


COMMANDS: dict[str, type] = {
    "train": Train,
    "recipes": Recipes,
    "import": Import,
    "plan": Plan,
    "sample": Sample,
    "eval": Eval,
    "report": Report,
    "repro": Repro,
    "pretrain": Pretrain,
    "serve-reward": ServeReward,
}


# --- parsing ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 on a user's mistake (one sentence on stderr), 1 if the run stopped itself or its result
    could not be printed, 128 + the signal's number when one ended it."""
    occupy_standard_descriptors()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or it tells of every attempt to reach the hub
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or importing it warns of picture formats we do not use
    try:
        with tolerant_streams():
            return _done(list(sys.argv[1:] if argv is None else argv))
    finally:
        release_standard_descriptors()


def _done(args: list[str]) -> int:
    """The exit code, once the command is done and an error of it is said."""
    try:
        _parse(args)()
    except (SelfCheckError, DiskError, LostProcessError, LockLostError) as error:
        print(f"progrpo: stopped: {_one_line(error)}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"progrpo: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except _UnreadError as unread:
        print(unread, end="", file=sys.stderr)
        return unread.code
    except Interrupted as stopped:
        print(f"progrpo: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("progrpo: interrupted", file=sys.stderr)
        return 130
    return 0


class _UnreadError(Exception):
    """Standard output did not take what a command was asked for."""

    def __init__(self, words: str, code: int) -> None:
        super().__init__(words)
        self.code = code


def _show(result: str, costly: bool = False) -> None:
    """Print what a command was asked for, and not words on its way. Where that fails, standard error gets a costly result."""
    print(result, flush=True)
    if (failure := failure_of(sys.stdout)) is None:
        return
    words = f"{result}\n" if costly else ""
    if isinstance(failure, BrokenPipeError):  # who was to read, such as head, has seen enough
        raise _UnreadError(words, 128 + signal.SIGPIPE)
    raise _UnreadError(f"{words}progrpo: standard output cannot be written: {failure}\n", 1)


def _one_line(error: Exception) -> str:
    """What it says: a library's words may have lines, and so may those of a reward that a sentence ends with."""
    return " ".join(str(error).split())


def _parse(args: list[str]) -> Callable[[], None]:
    """What the arguments ask to be done."""
    if not args or args[0] in ("-h", "--help"):
        return lambda: _show(_help())
    if args[0] == "--version":
        return lambda: _show(f"progrpo {__version__}")
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        raise ValueError(
            f"{quoted(command)} is no command of progrpo ({', '.join(COMMANDS)}){nearest(command, COMMANDS)}"
        )
    _require_current_folder()
    if command == "train" and any(a.partition("=")[0] == "--resume" for a in rest):
        return _options(Resume, rest, "progrpo train --resume").run
    if command in ("train", "plan"):
        return _parse_recipe(command, rest)
    return _options(COMMANDS[command], rest, f"progrpo {command}").run


def _require_current_folder() -> None:
    """Without one, torch's libraries end the process as they are loaded, in words of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder is gone; change to one that is there") from None


def _parse_recipe(command: str, args: list[str]) -> Callable[[], None]:
    """RECIPE comes first, since it holds the defaults of all that follows."""
    kind = COMMANDS[command]
    if {"-h", "--help"} & set(args[:1]):
        return _options(kind, ["--help"], f"progrpo {command} RECIPE", kind(config=Config())).run
    if not args or args[0].startswith("-"):
        raise ValueError(
            f"a recipe ({', '.join(RECIPES)}), a config file or a run folder comes first: progrpo {command} RECIPE ..."
        )
    _require_quotes(command, args)
    recipe = load_recipe(args[0])
    if _plan_named(command, args, recipe.plan) not in ("recipe", "custom"):
        # it brings its own group and points: those of the recipe's custom plan must go
        recipe = replace(recipe, plan=PlanSettings(selector=recipe.plan.selector))
    return _options(kind, args[1:], f"progrpo {command} {args[0]}", kind(config=recipe)).run


def _require_quotes(command: str, args: Sequence[str]) -> None:
    """ValueError where the words before the options are a path that a shell has cut at its spaces."""
    words = list(takewhile(lambda word: not word.startswith("--"), args))
    if len(words) > 1 and not os.path.exists(words[0]) and os.path.exists(whole := " ".join(words)):
        raise ValueError(f"a path with spaces must stand in quotes: progrpo {command} {shlex.quote(whole)} ...")


def _plan_named(command: str, args: Sequence[str], own: PlanSettings) -> str:
    """What `--plan.preset`, or `--plan` of `plan`, is given as. ValueError for both, and for a custom plan of which nothing is said."""
    words = [word for arg in args for word in arg.split("=", 1)]
    options = ("--plan", "--plan.preset") if command == "plan" else ("--plan.preset",)
    wanted = {option: value for option, value in pairwise(words) if option in options}
    if len(wanted) > 1:
        raise ValueError("--plan and --plan.preset name a plan each; leave one out")
    option, preset = next(iter(wanted.items()), ("", "recipe"))
    fields = ("--plan.group-size", "--plan.prune", "--plan.final-keep")
    if preset == "custom" and own.preset != "custom" and not {word.replace("_", "-") for word in words} & {*fields}:
        raise ValueError(f"{option} custom needs the plan: give {', '.join(fields[:-1])} or {fields[-1]}")
    return preset


_REGISTRY = ConstructorRegistry()


class _WrongWordError(Exception):
    """A ValueError about a word on its way through tyro, which would drop what it says."""


def _term(text: str) -> RewardTerm:
    try:
        return RewardTerm.from_text(text)
    except ValueError as error:
        raise _WrongWordError(str(error)) from None


def _values(text: str) -> Values:
    try:
        return Values.from_text(text)
    except ValueError as error:
        raise _WrongWordError(str(error)) from None


def _not_empty(path: str) -> Path:
    if not path:
        raise _WrongWordError("a path is empty (''); give one, or . for the current folder")
    return Path(path)


def _one_word(kind: type, metavar: str, read: Callable[[str], Any], written: Callable[[Any], str]) -> None:
    """Have the command line take a value of this kind as one word."""

    @_REGISTRY.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type is not kind:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: read(words[0]),
            is_instance=lambda value: isinstance(value, kind),
            str_from_instance=lambda value: [written(value)],
        )


# tyro would ask for each field of a reward, and Python's Path takes an empty word, such as a shell's variable that is not set, for the current folder
_one_word(RewardTerm, "[WEIGHT*]NAME", _term, RewardTerm.to_text)
_one_word(Path, "PATH", _not_empty, str)
_one_word(Values, "JSON", _values, Values.to_text)


def _options(kind: Any, args: list[str], prog: str, default: Any = None) -> Any:
    """Parse options into a command. tyro prints help and exits; what it refuses, in a box, is a ValueError in one sentence."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            value, unknown = tyro.cli(
                kind, args=args, prog=prog, default=default, return_unknown_args=True, registry=_REGISTRY
            )
    except _WrongWordError as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(f"{_of_box(said.getvalue())}; see {prog} --help") from None
    if unknown:
        raise ValueError(_unknown(unknown, args, kind, prog))
    return value


def _of_box(box: str) -> str:
    """The sentence that tyro frames: between the title and the next gap or rule; and how the argument is given, below that."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    words = ["" if set(line) <= {"─", "-"} else line for line in lines[1:]]
    sentence = " ".join(takewhile(bool, dropwhile(not_, words))).removeprefix("Error parsing ").rstrip(".")
    usage = lines[lines.index("Argument helptext:") + 1 :][:1] if "Argument helptext:" in lines else []
    # of an option that may be left out tyro has the choices in a set, with None
    sentence = re.sub(r"\(('[^']*', )*'None'(, '[^']*')*\)", lambda found: f"({_without_none(found[0])})", sentence)
    return named(" ".join([sentence, *(f"(it is {line})" for line in usage)]))


def _without_none(choices: str) -> str:
    return ", ".join(sorted({choice for choice in re.findall(r"'[^']*'", choices)} - {"'None'"}))


def _unknown(unknown: list[str], args: list[str], kind: Any, prog: str) -> str:
    wrong = next((word for word in unknown if word.startswith("--")), None)
    if wrong is None:
        return _stray(unknown[0], args, kind, prog)
    wrong = wrong.partition("=")[0]
    own = [_option(f.name) for f in fields(kind) if f.name != "config"]
    pairs = [name for path in field_paths(Config) for name in _names(path)] if kind in (Train, Plan) else []
    return f"{prog} does not take {named(wrong)}{nearest(wrong.replace('_', '-'), [*own, *pairs])}"


def _stray(word: str, args: list[str], kind: Any, prog: str) -> str:
    """Why a word is left that belongs to no option: a flag was given a value, or a shell has cut a path at its spaces."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    before, after = words[: words.index(word)], words[words.index(word) :]
    start = next((i for i in reversed(range(len(before))) if before[i].startswith("--")), -1)
    option = before[start] if start >= 0 else ""
    if option.replace("_", "-") in _flags(kind):
        *_, negative = _names(option.removeprefix("--"))
        off = f"{negative} turns it off" if "." in option else "without it it is off"
        return f"{prog}: {option} takes no value, so leave out {named(word)}: {option} alone turns it on, {off}"
    whole = " ".join([*before[start + 1 :], *takewhile(lambda part: not part.startswith("--"), after)])
    return f"{prog} does not take {named(word)}; a value with spaces, such as a path, must stand in quotes: {named(f'{option} {shlex.quote(whole)}'.strip())}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _names(path: str) -> list[str]:
    """A field as an option, and the option that turns it off if it is a flag."""
    part, dot, name = path.rpartition(".")
    return [_option(path)] + ([_option(f"{part}{dot}no-{name}")] if _option(path) in _flags(Train) else [])


def _flags(kind: Any) -> set[str]:
    """Options that are true or false."""
    own = {_option(name) for name, hint in get_type_hints(kind).items() if hint is bool}
    if kind not in (Train, Plan):
        return own
    return own | {_option(path) for path in field_paths(Config) if isinstance(attrgetter(path)(Config()), bool)}


def _help() -> str:
    lines = _columns({name: (kind.__doc__ or "").strip() for name, kind in COMMANDS.items()})
    return (
        "usage: progrpo COMMAND [OPTIONS]\n\n"
        "Online RL of text-to-image models with pruning inside the sampling process.\n\n"
        f"{lines}\n\nprogrpo COMMAND --help says more; progrpo --version prints the version."
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def _columns(rows: Mapping[str, object]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def _result(values: Mapping[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(values, indent=2)
    lines: dict[str, str] = {}
    for name, value in values.items():
        if value is None or value == {}:  # what was not measured: JSON says so too
            continue
        parts = value if isinstance(value, Mapping) and len(value) > 1 else None
        lines |= {f"{name}: {part}": _in_short(v) for part, v in parts.items()} if parts else {name: _in_short(value)}
    return _columns(lines)


def _in_short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_in_short(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _within(low: float, high: float, **options: float | None) -> None:
    """ValueError for an option that is given and lies elsewhere."""
    for name, value in options.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be between {low:,} and {high:,}, not {quoted(value)}")


def _device(name: str) -> None:
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise ValueError(
            f"--device must be auto, or a device by torch's name, such as cpu or cuda:0, not {quoted(name)}"
        )


def _first_free(folder: Path) -> Path:
    if not folder.exists():
        return folder
    return next(f for n in count(2) if not (f := folder.with_name(f"{folder.name}-{n}")).exists())


def _require_run(folder: Path) -> None:
    if not os.path.isfile(folder / "config.json"):  # Path's own raises at a name that is too long
        others = [str(p.parent) for p in folder.parent.glob("*/config.json")] if os.path.isdir(folder.parent) else []
        raise ValueError(f"{named(folder)} is no run folder (it holds no config.json){nearest(str(folder), others)}")
