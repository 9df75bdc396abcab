"""Families that are learnt from a pipeline's own call, for pipelines that have none here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import pad

from progrpo.diffusion.levels import Levels
from progrpo.policies.ddim import DiffusionFamily
from progrpo.policies.denoiser_call import DenoiserCall
from progrpo.policies.family import GRIDS, NEGATIVE, ModelFamily, unused_settings
from progrpo.policies.flow import FlowFamily
from progrpo.policies.geometry import Geometry
from progrpo.policies.hub import reason_of
from progrpo.policies.learnt.agreement import require_agreement
from progrpo.policies.learnt.argument import Given
from progrpo.policies.learnt.call import CallOptions, PipelineCall
from progrpo.policies.learnt.learning import Learner, Learnt, guided_rows, text_of
from progrpo.policies.learnt.recording import Inputs
from progrpo.policies.offload import offloaded
from progrpo.policies.tokens import Reader
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition

_DENOISERS = ("transformer", "unet")
_JUDGES: Mapping[str, object] = {
    **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
    "requires_safety_checker": False,
}
"""Components that judge pictures or show the network one, which here nothing does."""
_ADAPTED = re.compile(r"attn|attention|(?:^|[._])(?:ff|ffn|mlp|feed_forward)|^proj_out$")
_EDITING = re.compile(r"Edit|Kontext|ImageToVideo")
"""Parts of the names of pipelines that begin with a picture."""
_LEFT = re.compile(r"norm|mod|ada|embed|gate_proj_t|time|router")


class Recorded(ModelFamily):
    """A pipeline whose call is recorded, so that no code here knows it.

    Its network is called with the arguments that the pipeline's own call gave, at other latents and timesteps. What the
    autoencoder decodes comes out of the pipeline's own call, whose loop then does nothing.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ()
    has_weights: ClassVar[bool] = True
    """Whether the networks are there to be called, and not their sizes alone."""
    learnt: Learnt
    call: PipelineCall

    def check(self) -> None:
        for name, task in (("encode_prompt", "encode a text"), ("vae", "decode")):
            if getattr(self.pipeline, name, None) is None:
                raise ValueError(self._unfit(f"it has no {name} to {task} by"))
        if self.edits and self.settings.resolution is None:
            raise ValueError(f"model.resolution: a {type(self.pipeline).__name__} takes that of its source; give one")
        if self.settings.shard and self.context.world_size > 1:
            raise ValueError("model.shard: not for a pipeline that is learnt from its own call; leave it off")
        if self.device.type == "meta" and self.has_weights:
            raise ValueError(
                f"model.path: a {type(self.pipeline).__name__} is learnt from its own call, so that its sizes are not"
                " known without its weights; train it for two iterations and read the run's own figures"
            )

    def geometry(self) -> Geometry:
        """The size and frames that are asked for; what the pipeline makes of them shows when it is learnt."""
        size = self.settings.resolution
        frames = PipelineCall(self.pipeline, self.denoiser_name, CallOptions(), _no_run).frames_name is not None
        default = (0, 0) if size is None else None
        return Geometry(1, 1, default, default_frames=self.settings.frames or 1 if frames else None)

    def learn(self) -> None:
        """Learn the pipeline's call. ValueError, one sentence, for a pipeline that cannot be learnt."""
        options = CallOptions(
            None if self.settings.resolution is None else self.size,
            self.settings.frames,
            self.settings.max_sequence_length,
        )
        self.call = PipelineCall(self.pipeline, self.denoiser_name, options, self.run_network, self.device)
        if self.edits:
            self.call.picture = self._fitted(self.any_picture())
        for name, value in (("max_sequence_length", options.max_sequence_length), ("height", options.size)):
            if value is not None and name not in self.call.parameters:
                setting = "resolution" if name == "height" else name
                raise ValueError(f"model.{setting}: a {type(self.pipeline).__name__} takes none; leave it empty")
        try:
            with offloaded(self) if self.settings.offload else nullcontext():
                self.learnt = Learner(self.call).learn()
                self.latent_shape = self.learnt.latent_shape
                self.size = require_agreement(self)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of many kinds: the pipeline's own code runs
            raise ValueError(self._unfit(reason_of(error, ""))) from error

    def ignored(self) -> str:
        names = PipelineCall(self.pipeline, self.denoiser_name, CallOptions(), _no_run).guiders
        guiders = [getattr(self.pipeline, name) for name in names]
        plain = ClassifierFreeGuidance().config
        others = sorted(
            {
                type(guider).__name__
                for guider in guiders
                if type(guider) is not ClassifierFreeGuidance
                or any(value != plain[name] for name, value in guider.config.items() if name != "guidance_scale")
            }
        )
        if not others:
            return ""
        return f"the {' and '.join(others)} is not used: guidance is plain, by sampling.guidance_scale alone"

    def _unfit(self, reason: str) -> str:
        kind = type(self.pipeline).__name__
        return f"model.path: a {kind} has no family of its own here, and cannot be learnt from its own call: {reason}"

    @cached_property
    def network(self) -> DenoiserCall:
        """The network's call as a policy makes it."""
        return DenoiserCall(self, NamedWeights({}), shared=False)

    @torch.no_grad()
    def run_network(self, inputs: Inputs) -> Any:
        """Call the network as the pipeline does, in the precision that it is trained in."""
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast, self.network.attention():
            return self.denoiser(**inputs)

    @property
    def latent_channels(self) -> int:
        return self.latent_shape[0] if self.latent_shape else super().latent_channels

    def default_lora_targets(self) -> tuple[str, ...]:
        """The linear layers of attention and feed-forward in the network's repeated blocks."""
        inside = re.compile(r"(?:^|\.)\d+\.(.+)")
        denoiser = self.denoisers[self.denoiser_name]
        names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        chosen = []
        for name in names:
            in_block = inside.search(name)
            if in_block and _ADAPTED.search(in_block[1]) and not _LEFT.search(in_block[1]):
                chosen.append(name)
        if not chosen:
            raise ValueError("model.lora_targets: no layer of the network is known to be attention's; name some")
        return tuple(chosen)

    # --- texts --------------------------------------------------------------------------------------------------------

    @property
    def text_tokens(self) -> int:
        return self.call.text_tokens

    def text_readers(self) -> list[Reader]:
        return super().text_readers() if "max_sequence_length" in self.call.parameters else []

    def encode_text(self, text: str) -> dict[str, Tensor]:
        recording = self.call.record(self.call.options(text), output=None)
        return self._from("text", recording.calls[0][0])

    def encode_picture(self, image: Image.Image) -> dict[str, Tensor]:
        with self.call.showing(self._fitted(image)):
            recording = self.call.record(self.call.options(""), encoded=self.learnt.encoded, output=None)
        return self._from("picture", recording.calls[0][0])

    def encode_both(self, text: str, image: Image.Image) -> dict[str, Tensor]:
        with self.call.showing(self._fitted(image)):
            if self.learnt.guidance is None:
                return self._from("both", self.call.record(self.call.options(text), output=None).calls[0][0])
            unconditional, conditional = self._guided_rows(text, self.negative_prompt)
        negative = {NEGATIVE + name: tensor for name, tensor in self._from("both", unconditional).items()}
        return self._from("both", conditional) | negative

    @property
    def reads_both(self) -> bool:
        return any(leaf.source == "both" for leaf in self.learnt.texts)

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The picture, resized until it covers the model's size and cropped at its middle."""
        height, width = self.size
        return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)

    @staticmethod
    def any_picture() -> Image.Image:
        """A picture of noise, for calls in which no picture matters."""
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

    def _from(self, source: str, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors that a prompt's text or picture gives, out of a call of one row."""
        names = {name for leaf in self.learnt.texts if leaf.source == source for name in (leaf.name, leaf.length_name)}
        return {name: tensor for name, tensor in text_of(self.learnt, inputs).items() if name in names}

    def encode_negative(self, text: str) -> dict[str, Tensor]:
        if self.learnt.guidance is None:
            return self.encode_text(text)
        return self._from("text", self._guided_rows("a", text)[0])

    def _guided_rows(self, text: str, negative: str) -> tuple[Inputs, Inputs]:
        """The rows of a guided step without and with the text, each as a call of one row."""
        recording = self.call.record(self.call.guided(text, negative, 3.5), last_step=0)
        first, second = guided_rows(self.learnt, recording.calls[0])
        return (first, second) if self.learnt.unconditional_first else (second, first)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for leaf in self.learnt.texts:
            own = {leaf.name: leaf.shape} | ({} if leaf.ragged is None else {leaf.length_name: ()})
            shapes |= own
            if leaf.source == "both" and self.learnt.guidance is not None:
                shapes |= {NEGATIVE + name: shape for name, shape in own.items()}
        return shapes

    # --- the network --------------------------------------------------------------------------------------------------

    @property
    def embeds_guidance(self) -> bool:
        return self.learnt.embeds_guidance

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        lengths = [
            condition.tensors[leaf.length_name].tolist()
            for leaf in self.learnt.texts
            if leaf.ragged is not None and leaf.rows != "list"
        ]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row in range(len(x_BCHW)):
            groups[tuple(int(of[row]) for of in lengths)].append(row)
        if len(groups) == 1:
            return self._denoise_alike(x_BCHW, timestep_B, condition)
        # rows of another length are another call: padded, the network would read what no text says
        parts, order = [], []
        for rows in groups.values():
            rows_b = torch.tensor(rows, device=x_BCHW.device)
            parts.append(self._denoise_alike(x_BCHW[rows_b], timestep_B[rows_b], condition.take(rows_b)))
            order.extend(rows)
        return torch.cat(parts)[torch.tensor(order, device=x_BCHW.device).argsort()]

    def _denoise_alike(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        tensors = condition.tensors
        given = Given(self.to_pipeline(x_BCHW), timestep_B, tensors.get("guidance"), tensors)
        output = self.denoiser(**self.learnt.inputs.make(given))
        return self.from_pipeline(self.learnt.output.read(output, len(x_BCHW)))

    def combine_guidance(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        if self.learnt.guidance is None:
            raise ValueError(f"sampling.guidance_scale: {self.learnt.unguidable}; use 1")
        shape = (-1, *self.learnt.shape)
        unconditional, conditional = (
            self.to_pipeline(output).reshape(shape) for output in (unconditional_BCHW, conditional_BCHW)
        )
        combined = self.learnt.guidance.combine(unconditional, conditional, guidance_scale)
        return self.from_pipeline(combined.flatten(1))

    def to_pipeline(self, x_BCHW: Tensor) -> Tensor:
        """Latents (B, N) in the pipeline's order."""
        flat_BN = x_BCHW.flatten(1)
        back_N = self.learnt.back_N.to(flat_BN.device)
        return flat_BN.index_select(1, back_N) if self._is_reordered else flat_BN

    def from_pipeline(self, x_BN: Tensor) -> Tensor:
        place_N = self.learnt.place_N.to(x_BN.device)
        ordered = x_BN.index_select(1, place_N) if self._is_reordered else x_BN
        return ordered.reshape(len(x_BN), *self.latent_shape)

    @property
    def _is_reordered(self) -> bool:
        return not torch.equal(self.learnt.place_N, torch.arange(len(self.learnt.place_N)))

    # --- the autoencoder ----------------------------------------------------------------------------------------------

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        """Latents as the pipeline's own call gives them to its autoencoder."""
        latents = self.to_pipeline(x0_BCHW).reshape(-1, *self.learnt.shape)
        together = [latents] if self.learnt.decodes_rows else latents.split(1)
        decoded = [self.call.decoded(self.learnt.encoded, rows).latents for rows in together]
        return torch.cat([rows for rows in decoded if rows is not None])

    def scale(self, latents_BCHW: Tensor) -> Tensor:
        flat_BN = latents_BCHW.flatten(1)
        x0_BN = (flat_BN - self.learnt.offset_N.to(flat_BN)) / self.learnt.scale_N.to(flat_BN)
        return x0_BN.reshape(-1, *self.latent_shape)

    # --- the grid -----------------------------------------------------------------------------------------------------

    def grid_options(self, num_inference_steps: int) -> dict[str, Any]:
        options = self.call.options("", num_inference_steps)
        recording = self.call.record(options, encoded=self.learnt.encoded, output=None)
        return {n: v for n, v in recording.grid.items() if n not in ("num_inference_steps", "device") and v is not None}


class RecordedFlow(Recorded, FlowFamily):
    """A recorded flow model. One that came with a multi-step scheduler is sampled by Euler's steps on its shift."""

    def check(self) -> None:
        own = self.pipeline.scheduler.config
        if not isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler) and own.get("use_flow_sigmas"):
            self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=own.num_train_timesteps, shift=own.get("flow_shift", 1.0)
            )
        FlowFamily.check(self)
        Recorded.check(self)

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        """Levels with the timesteps that the pipeline goes through, which may be others than its levels times 1000."""
        levels = super().levels(num_inference_steps, shift)
        own = self.scheduler_at(num_inference_steps, shift).timesteps.to(levels.timestep)
        return levels if _is_close(own, levels.timestep[:-1]) else replace(levels, timestep=pad(own, (0, 1)))

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        levels = super().levels_between(levels_T1, place_B)
        at_sigma = levels_T1.sigma * self.pipeline.scheduler.config.num_train_timesteps
        if _is_close(levels_T1.timestep, at_sigma):
            return levels
        below_B = place_B.long().clamp(max=len(levels_T1) - 2)
        timesteps = levels_T1.timestep.double()
        timestep_B = torch.lerp(timesteps[below_B], timesteps[below_B + 1], place_B - below_B)
        return replace(levels, timestep=timestep_B.to(levels.timestep))

    def ignored(self) -> str:
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            return Recorded.ignored(self)
        return unused_settings(self.pipeline.scheduler, GRIDS, "steps are Euler's, on the grid of its flow_shift")


class RecordedDiffusion(Recorded, DiffusionFamily):
    """A recorded diffusion model, sampled by DDIM's steps on its noise schedule."""

    def check(self) -> None:
        own = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        if own is None:
            raise ValueError(self._unfit(f"DDIM has no such noise as its {type(self.pipeline.scheduler).__name__}"))
        self.scheduler.alphas_cumprod = own.float().cpu()  # a schedule may be shifted by settings that DDIM lacks
        self.check_noise()
        self.pipeline.scheduler = self.scheduler
        Recorded.check(self)


def _is_close(timesteps: Tensor, others: Tensor) -> bool:
    return torch.allclose(timesteps, others, rtol=1e-4, atol=0.01)


@cache
def recorded_kind(pipeline_name: str, denoiser_name: str, diffusion: bool = False) -> type[Recorded] | None:
    """The recorded family of a class of pipelines; None for a class that diffusers lacks or that reads no prompt."""
    kind = getattr(diffusers, pipeline_name, None)
    if kind is None or not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        return None
    optional = set(getattr(kind, "_optional_components", ()))
    edits = _EDITING.search(pipeline_name) is not None
    omitted = {name: value for name, value in _JUDGES.items() if name in optional and not edits}
    base = RecordedDiffusion if diffusion else RecordedFlow
    own = {"denoiser_name": denoiser_name, "omitted_components": omitted, "edits": edits}
    return type(base.__name__, (base,), own)


def denoiser_of(index: Mapping[str, object]) -> str | None:
    """The component that is trained, by a pipeline's index or components."""
    for name in _DENOISERS:
        entry = index.get(name)
        if entry is not None and not (isinstance(entry, list | tuple) and not any(entry)):
            return name
    return None


def is_diffusion(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline's scheduler has a schedule of betas and does not use it as a flow."""
    config = pipeline.scheduler.config if "scheduler" in pipeline.components else {}
    return "beta_schedule" in config and not config.get("use_flow_sigmas")


def _no_run(inputs: Inputs) -> Any:
    raise AssertionError(inputs)
