"""What policies of diffusers pipelines share: encoding, guidance, decoding, adapting the denoiser and saving what was trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import Decoder
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from progrpo.diffusion.levels import Levels
from progrpo.messages import named, quoted
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.decoder import quicken
from progrpo.policies.fingerprint import fingerprint
from progrpo.policies.handover import take_over
from progrpo.policies.hub import reason_of
from progrpo.policies.invariance import is_batch_invariant
from progrpo.policies.lora import continue_lora, in_float32, save_lora
from progrpo.policies.offload import Turns
from progrpo.policies.parts import whole
from progrpo.policies.quantized import quantize_blocks
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sharded import Step, all_gathered, blocks, share_out
from progrpo.policies.tokens import Reader, Truncation, truncation
from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition, Pictures, Prompt
from progrpo.zoo import WEIGHTS

BUILT_IN_DECODER = "shapes-tiny"
_TAKEN: WeakSet[DiffusionPipeline] = WeakSet()  # whose denoisers have what a policy trains


class PipelinePolicy(ABC):
    """A diffusers pipeline as a policy: `progrpo.policies.base.Policy` says what each method promises.

    A family's class adds what only it knows: its levels, how a text is encoded, and the call of its network.
    """

    denoiser_name: ClassVar[str]
    """The pipeline's component that is trained."""
    lora_targets: ClassVar[tuple[str, ...]]
    """What a LoRA adapts if nothing else is asked, as endings of module names; `*` stands for anything."""
    vae_dtype: ClassVar[torch.dtype | None] = None
    """The autoencoder's, where it is not the rest's."""
    plain_attention: ClassVar[type | None] = None
    """An attention processor of matrix products for the denoiser; None where there is none for its kind."""
    edits: ClassVar[bool] = False
    left_out: ClassVar[Mapping[str, Any]] = {}
    """What the pipeline is given in the place of parts that are never loaded."""
    no_prompt: ClassVar[str] = ""
    """The text that guidance leads away from where no negative prompt is given."""
    prediction: str
    fingerprints: Mapping[str, str]
    ignored: str = ""

    def __init__(
        self, pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext, size: tuple[int, int]
    ) -> None:
        """Wrap a pipeline whose trainable parameters are already marked; `from_pipeline` is the way in.

        `size` is the height and width of its pictures in pixels.
        """
        self._pipeline = pipeline
        self._settings = settings
        self._context = context
        self._dtype = torch_dtype(settings)
        self._size = size
        self._encoded: dict[str, dict[str, Tensor]] = {}
        self._released = False
        self._tiny = _tiny_decoder(pipeline, context, self._latent_channels(pipeline))
        self.compiled = settings.compile
        self.batch_invariant = _may_be_batch_invariant(settings, context)
        self._step: Step | None = None
        self.denoiser: ModelMixin = getattr(pipeline, self.denoiser_name)
        self.embeds_guidance = bool(getattr(self.denoiser.config, "guidance_embeds", False))
        self.device = context.device
        if context.guide_away_from and self.embeds_guidance:
            raise ValueError(
                "sampling.negative_prompt: this model is told the guidance scale and leads away from no text; leave it empty"
            )
        self._readers = self._text_readers()  # asked now, while the text encoders are there
        self._turns = _turns(pipeline, self.denoiser, self.device) if settings.offload else None
        self.latent_shape = self._latents(*(side // self._vae_scale(pipeline) for side in size))
        self.trainable: Mapping[str, nn.Parameter] = {
            name: p for name, p in self.denoiser.named_parameters() if p.requires_grad
        }
        self.named_weights = NamedWeights(self.trainable)
        if settings.activation_checkpointing:
            self.denoiser.enable_gradient_checkpointing(self._checkpointed)
        decoders = _compiled_decoder(pipeline.vae, settings, context) if settings.compile else []
        self.compiled_decoder = bool(decoders)
        if settings.compile:
            _compile(*blocks(self.denoiser), *decoders)
        if _is_shared(settings, context):
            self._step = Step(self.device, self._stand_in)
            self._shapes = self.network_inputs()  # asked now, while the text encoders are there

    @classmethod
    def from_pipeline(
        cls, pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext | None = None
    ) -> Self:
        """Take the pipeline over: it moves to the device, is frozen, and its denoiser gets what `settings` ask for.

        ValueError for one that a policy was made of before, that has an adapter already, or that does not fit the settings.
        """
        context = context or PolicyContext()
        dtype, shared = torch_dtype(settings), _is_shared(settings, context)
        if pipeline in _TAKEN:
            raise ValueError(
                "this pipeline was given to a run already, which took it over and changed it; load it again"
            )
        take_over(pipeline, cls.denoiser_name)
        cls.check_index(pipeline.config)
        ignored = cls._ignored(pipeline)
        cls._check(pipeline)
        size = cls._checked_size(pipeline, settings.resolution)
        denoiser = getattr(pipeline, cls.denoiser_name)
        _require_no_adapter(denoiser, cls.denoiser_name)
        if settings.quantize == "int8":  # before it moves, so that the device never holds the wide weights
            _cast(denoiser, dtype)
            quantize_blocks(denoiser)
        for module in _modules(pipeline):
            if not (module is denoiser and shared) and not (module is not pipeline.vae and settings.offload):
                module.to(context.device)
            module.requires_grad_(False)
        _cast(pipeline.vae, cls._vae_dtype(pipeline, dtype))
        if settings.weights == "lora":
            _cast(denoiser, dtype)
            if settings.lora:
                continue_lora(pipeline, cls.denoiser_name, settings.lora)
        elif settings.weights == "full":
            _cast(denoiser, torch.float32)
            denoiser.requires_grad_(True)
        else:
            raise ValueError(f"model.weights: {settings.weights!r} is not known; use 'lora' or 'full'")
        _require_finite(pipeline, cls.denoiser_name)
        fingerprints = _fingerprints(
            pipeline
        )  # while every process has all weights; a fresh LoRA's follow from the seed
        if settings.weights == "lora" and not settings.lora:
            _add_lora(denoiser, settings, settings.lora_targets or cls.lora_targets, context.lora_seed)
        if shared:
            lora = [p for p in denoiser.parameters() if p.requires_grad] if settings.weights == "lora" else []
            share_out(denoiser, context.device, whole=lora)
        _TAKEN.add(pipeline)
        if _narrow_on_cpu(dtype, context.device):
            quicken(pipeline.vae)
            if cls.plain_attention is not None:
                denoiser.set_attn_processor(cls.plain_attention())
        for module in _modules(pipeline):
            module.eval()
        _set_decoding(pipeline.vae, settings.decoding)
        # pictures are convolved faster in this order of memory: the decoder by a fifth on a CPU, U-Nets on a GPU alone
        if not any(p.ndim == 5 for p in pipeline.vae.parameters()):  # a video's has weights that cannot be in it
            pipeline.vae.to(memory_format=torch.channels_last)
        if cls.denoiser_name == "unet" and context.device.type == "cuda":
            denoiser.to(memory_format=torch.channels_last)
        policy = cls(pipeline, settings, context, size)
        policy.fingerprints, policy.ignored = fingerprints, ignored
        return policy

    # --- what a family says of itself -------------------------------------------------------------------------------

    @classmethod  # noqa: B027 (most families refuse nothing by it)
    def check_index(cls, index: Mapping[str, Any]) -> None:
        """ValueError for a pipeline that the policy cannot work with, as far as its model_index.json tells."""

    @classmethod
    @abstractmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        """ValueError for a pipeline that the policy cannot work with."""

    @classmethod
    def _ignored(cls, pipeline: DiffusionPipeline) -> str:
        """What the pipeline's own loop would do and sampling here does not, in a sentence; empty for nothing."""
        return ""

    @classmethod
    def _vae_dtype(cls, pipeline: DiffusionPipeline, dtype: torch.dtype) -> torch.dtype:
        return cls.vae_dtype or dtype

    @classmethod
    def _vae_scale(cls, pipeline: DiffusionPipeline) -> int:
        """Pixels of a picture to a row or column of its latent."""
        scale: int = pipeline.vae_scale_factor
        return scale

    def _latents(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent of so many rows and columns."""
        if self._settings.frames is not None:
            raise ValueError("model.frames: this model makes pictures, not videos; leave it empty")
        return (self._latent_channels(self._pipeline), height, width)

    @classmethod
    def _latent_channels(cls, pipeline: DiffusionPipeline) -> int:
        config = pipeline.vae.config
        channels: int = config.z_dim if "z_dim" in config else config.latent_channels  # as autoencoders of videos say
        return channels

    @classmethod
    def _patch(cls, pipeline: DiffusionPipeline) -> int:
        """Latent rows and columns that the denoiser takes together."""
        return 1

    @classmethod
    def _own_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""
        side: int = getattr(pipeline, cls.denoiser_name).config.sample_size * cls._vae_scale(pipeline)
        return side, side

    @abstractmethod
    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels: ...

    @abstractmethod
    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels: ...

    @abstractmethod
    def _encode_text(self, text: str) -> dict[str, Tensor]:
        """Named tensors of one text, each with a first dimension of 1."""

    @abstractmethod
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that `encode` gives, without the first dimension: known without encoding anything."""

    @abstractmethod
    def _call(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        """The network's output, in any dtype."""

    @abstractmethod
    def _unscaled(self, x0_BCHW: Tensor) -> Tensor:
        """Latents as the autoencoder decodes them."""

    # --- what they share --------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        rows = [self._row(prompt) for prompt in prompts]
        return Condition({name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]})

    @property
    def _negative_prompt(self) -> str:
        return self._context.guide_away_from or self.no_prompt

    @property
    def _text_tokens(self) -> int:
        """How many tokens of a text the network is told: those that were asked for, or as many as the pipeline itself takes."""
        if self._settings.max_sequence_length is not None:
            return self._settings.max_sequence_length
        own: int = signature(type(self._pipeline).__call__).parameters["max_sequence_length"].default
        return own

    def truncation(self, texts: Sequence[str]) -> Truncation:
        return truncation(self._readers, [*texts, *filter(None, [self._context.guide_away_from])])

    def _text_readers(self) -> list[Reader]:
        """CLIP reads as much as its tokenizer says, others as many tokens as the network is told."""
        found, parts = [], self._pipeline.components
        for place in ("", "_2", "_3"):
            encoder, tokenizer = parts.get(f"text_encoder{place}"), parts.get(f"tokenizer{place}")
            if encoder is not None and tokenizer is not None:
                clip = encoder.config.model_type.startswith("clip")
                limit = tokenizer.model_max_length if clip else self._text_tokens
                found.append(Reader(f"text_encoder{place}", tokenizer, limit, not clip, self._written))
        return found

    def _written(self, text: str) -> str:
        """What tokenizers are given for a text."""
        return text

    def _row(self, prompt: Prompt) -> dict[str, Tensor]:
        """What the network is told of one prompt, on the CPU."""
        return self._text_row(prompt.text)

    def _text_row(self, text: str) -> dict[str, Tensor]:
        if text not in self._encoded:
            self._encoded[text] = self._encode_one(text)
        return self._encoded[text]

    @torch.no_grad()
    def _encode_one(self, text: str) -> dict[str, Tensor]:
        # Alone in its batch, so that a text's embedding never depends on the company it was first met in.
        if self._released:
            raise ValueError(f"{text!r} is new and the text encoders are released; encode all prompts before that")
        return self._encoded_finitely(quoted(text), self._encode_text(text))

    def _encoded_finitely(self, what: str, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The one row that was encoded, as the network is told it; ValueError where the dtype does not hold its numbers."""
        row = {name: t[0].to("cpu", self._dtype) for name, t in encoded.items()}
        if strange := [name for name, t in row.items() if not t.isfinite().all()]:
            dtype = str(self._dtype).removeprefix("torch.")
            raise ValueError(
                f"what {what} is encoded as ({strange[0]}) is not finite in {dtype}; take another model.dtype (bfloat16, float32),"
                " or look at the model's encoder"
            )
        return row

    def network_inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a row of what the network is told beside latents and timestep."""
        return self.condition_shapes() | ({"guidance": ()} if self.embeds_guidance else {})

    def _encode_unconditional(self) -> Condition:
        """What guidance leads away from: the negative prompt, or no text. What it does not name is the prompt's own in both branches."""
        return Condition(
            {name: row[None].to(self.device) for name, row in self._text_row(self._negative_prompt).items()}
        )

    @cached_property
    def _unconditional(self) -> Condition:
        return self._encode_unconditional()

    def release_text_encoders(self) -> None:
        self._text_row(self._negative_prompt)  # what guidance leads away from may be asked for later than now
        self._released = True
        if self._turns is not None:
            self._turns.leave_to(self.denoiser)
        for name in self._pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self._pipeline, name, None)

    def predict(self, x_BCHW: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        timestep_B = timestep.to(x_BCHW.device, torch.float32).expand(len(x_BCHW))
        if self.embeds_guidance:
            guidance_B = torch.full_like(timestep_B, guidance_scale)
            return self._output(x_BCHW, timestep_B, Condition({**condition.tensors, "guidance": guidance_B}))
        if guidance_scale == 1.0:
            return self._output(x_BCHW, timestep_B, condition)
        pair = Condition(
            {
                name: torch.cat([self._unconditional.tensors.get(name, rows).expand_as(rows), rows])
                for name, rows in condition.tensors.items()
            }
        )
        both = self._output(torch.cat([x_BCHW, x_BCHW]), torch.cat([timestep_B, timestep_B]), pair)
        unconditional, conditional = both.chunk(2)
        return self._guided(unconditional, conditional, guidance_scale)

    def _guided(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        return unconditional_BCHW + guidance_scale * (conditional_BCHW - unconditional_BCHW)

    def _output(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        assert all(len(rows) == len(x_BCHW) for rows in condition.tensors.values())
        if self._step is not None:
            self._step.call(self.named_weights.names.index(self.named_weights.active), torch.is_grad_enabled())
        if len(x_BCHW) == 1 and _narrow_on_cpu(self._dtype, self.device):
            # products with a single row are made by other kernels, which round differently: it would depend on being alone
            rows = torch.zeros(2, dtype=torch.int64)
            return self._run(x_BCHW[rows], timestep_B[rows], condition.take(rows))[:1]
        return self._run(x_BCHW, timestep_B, condition)

    def _run(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        # No cache of cast weights: it would outlive a change of weights inside a caller's own autocast block.
        dtype = self._dtype
        with (
            torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False),
            self._attention(),
        ):
            return self._call(x_BCHW, timestep_B, condition).float()

    def _attention(self) -> AbstractContextManager[None]:
        """Torch's own matrix products, where fused attention is slow and the denoiser has no processor without it."""
        fused_is_slow = _narrow_on_cpu(self._dtype, self.device) and self.plain_attention is None
        return sdpa_kernel(SDPBackend.MATH) if fused_is_slow else nullcontext()

    @torch.compiler.disable(recursive=False)  # blocks of a U-Net call it from inside
    def _checkpointed(self, block: nn.Module, *inputs: Any) -> Any:
        """What is computed anew is computed outside of the call, and must be by the same kernels."""
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self._attention()))

    @property
    def attend(self) -> Callable[[], None] | None:
        return None if self._step is None else self._step.attend

    def measure_batch_invariance(self, sampled: Iterable[int], trained: Iterable[int]) -> bool:
        if not self.batch_invariant:
            return False
        sampled, trained = list(sampled), list(trained)
        most = max(*sampled, *trained)
        generator = torch.Generator().manual_seed(0)
        x_NCHW = torch.randn(most, *self.latent_shape, generator=generator).to(self.device)
        timestep_N = self.levels(2).timestep[1].to(x_NCHW).expand(most)
        condition = Condition({**self._ones(self.network_inputs()), **self._unconditional.tensors})
        condition = condition.take(torch.zeros(most, dtype=torch.int64, device=self.device))

        def output(size: int) -> Tensor:
            rows = torch.arange(size, device=self.device)
            return self._output(x_NCHW[rows], timestep_N[rows], condition.take(rows))

        with torch.compiler.set_stance("force_eager"):  # one compilation for each size would take minutes
            self.batch_invariant = is_batch_invariant(output, sampled, trained)
        return self.batch_invariant

    def _ones(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """One row of a condition of these shapes."""
        dtype = self._dtype
        return {name: torch.ones(1, *shape, device=self.device, dtype=dtype) for name, shape in shapes.items()}

    def _stand_in(self, weights: int, training: bool) -> None:
        """A network call that takes part in the others' and adds 0 to gradients."""
        x, timestep_B = torch.ones(1, *self.latent_shape, device=self.device), torch.ones(1, device=self.device)
        condition = Condition(self._ones(self._shapes))
        with self.named_weights.instead(self.named_weights.names[weights]), torch.set_grad_enabled(training):
            output = self._run(x, timestep_B, condition)
            if training:
                output.backward(torch.zeros_like(output))

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        return self._pictures(self._pipeline.vae, self._unscaled(x0_BCHW), "decoder")

    def preview(self, x0_BCHW: Tensor) -> Pictures:
        if self._tiny is None:
            return self.decode(x0_BCHW)
        config = self._tiny.config
        return self._pictures(self._tiny, x0_BCHW / config.scaling_factor + config.shift_factor, "tiny decoder")

    @torch.no_grad()
    def _pictures(self, decoder: ModelMixin, latents_BCHW: Tensor, name: str) -> Pictures:
        dtype = next(decoder.parameters()).dtype  # diffusers looks for it in every layer
        pictures_BCHW = decoder.decode(latents_BCHW.to(dtype), return_dict=False)[0].float()
        there_B = _finite_rows(pictures_BCHW)
        fault = ""
        if not there_B.all():
            pictures_BCHW[~there_B] = 0.0  # a cast of NaN is whatever the processor makes of it
            decoded = _finite_rows(latents_BCHW)[~there_B].all()
            fault = _fault(name, dtype) if decoded else _fault(self.denoiser_name, self._dtype)
        bytes_BCHW = pictures_BCHW.mul_(0.5).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        return Pictures(bytes_BCHW.movedim(1, -1).contiguous().cpu(), there_B.cpu(), fault)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self.denoiser.named_parameters() if not p.requires_grad)
        yield from self.denoiser.named_buffers()

    def save(self, folder: Path | None, weights: str = "current") -> None:
        """A LoRA for the pipeline's `load_lora_weights(folder)`, or a denoiser of the pipeline's class to load."""
        with self.weights(weights):
            if self._settings.weights == "full":
                self._save_denoiser(folder)
            elif folder is not None:
                save_lora(self.denoiser, self.denoiser_name, folder)

    def _save_denoiser(self, folder: Path | None) -> None:
        denoiser = self.denoiser
        if self._step is not None:
            weights = all_gathered(denoiser.state_dict(), keep=folder is not None)
            with torch.device("meta"):
                kind: Any = type(denoiser).__bases__[-1]  # fully_shard put a class of its own in front
                denoiser = kind.from_config(denoiser.config)
            if folder is not None:
                denoiser.load_state_dict(weights, assign=True)
        if folder is not None:
            denoiser.save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        return self.named_weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.named_weights.load_state_dict(state)

    @classmethod
    def _checked_size(cls, pipeline: DiffusionPipeline, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels; ValueError, with the next that would do, for those that are no whole patches of latents."""
        if resolution is None:
            return cls._own_size(pipeline)
        multiple = cls._vae_scale(pipeline) * cls._patch(pipeline)
        sides = (resolution,) if isinstance(resolution, int) else resolution
        if any(side <= 0 or side % multiple for side in sides):
            counts = [divmod(side, multiple) for side in sides]
            smaller, larger = [n for n, _ in counts], [n + (rest > 0) for n, rest in counts]
            near = dict.fromkeys(_in_pixels(max(n, 1) * multiple for n in sizes) for sizes in (smaller, larger))
            what = "is not a multiple" if len(sides) == 1 else "(height and width) are not both multiples"
            raise ValueError(
                f"model.resolution: {_in_pixels(sides)} {what} of {multiple}; {' or '.join(near)} would do"
            )
        return sides[0], sides[-1]


def _in_pixels(sides: Iterable[int]) -> str:
    """As `--model.resolution` takes them."""
    return " ".join(map(str, sides))


def _finite_rows(values_BCHW: Tensor) -> Tensor:
    return values_BCHW.isfinite().flatten(1).all(1)


def _fault(part: str, dtype: torch.dtype) -> str:
    """Why there is no picture, with the likely mend."""
    if dtype == torch.float16:
        return f"the {part} gave no finite numbers; in float16 they end at 65,504: take model.dtype bfloat16 or float32"
    kept = str(dtype).removeprefix("torch.")
    return f"the {part} gave no finite numbers (in {kept}); look at what was loaded and at what was trained (optim.lr)"


def _require_finite(pipeline: DiffusionPipeline, denoiser_name: str) -> None:
    """ValueError that names the first weight that is not finite in every number: nothing that is made with it would be."""
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        scales = part.named_buffers() if name == denoiser_name else ()
        for path, weight in (*part.named_parameters(), *scales):
            if weight.is_floating_point() and not weight.is_meta and not _all_finite(weight):
                narrow = ", or another model.dtype if it is finite there" if weight.dtype == torch.float16 else ""
                raise ValueError(
                    f"model.path: the {name}'s {path} has numbers that are not finite, as of a damaged file or a training that"
                    f" diverged; give another{narrow}"
                )


def _all_finite(weight: Tensor) -> bool:
    """Whether no number is NaN or infinite, by the two ends, which take no memory."""
    return all(end.isfinite().item() for end in weight.detach().aminmax()) if weight.numel() else True


def _tiny_decoder(pipeline: DiffusionPipeline, context: PolicyContext, channels: int) -> AutoencoderTiny | None:
    """In the autoencoder's dtype and place; ValueError for one that decodes latents of another kind."""
    if not context.decoder_for_previews:
        return None
    vae, name = pipeline.vae, context.decoder_for_previews
    try:
        place = WEIGHTS / name if name == BUILT_IN_DECODER else name
        tiny: AutoencoderTiny = whole(AutoencoderTiny, place, dtype=vae.dtype)
        if not all(map(_all_finite, tiny.parameters())):
            raise ValueError("its weights are not all finite")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds: of JSON, of safetensors, of a class that gets another's settings
        raise ValueError(f"preview.tiny_decoder: cannot load {named(name)}: {reason_of(error, name)}") from error
    if tiny.config.latent_channels != channels:
        raise ValueError(
            f"preview.tiny_decoder: {name} decodes latents of {tiny.config.latent_channels} channels, and this"
            f" model's have {channels}; take the one that was made for its autoencoder"
        )
    tiny.requires_grad_(False).eval()
    return tiny.to(context.device, memory_format=torch.channels_last)


def _turns(pipeline: DiffusionPipeline, denoiser: nn.Module, device: torch.device) -> Turns:
    """The denoiser's, where copies of its weights are taken, and the text encoders'."""
    encoders = [module for module in _modules(pipeline) if module is not pipeline.vae and module is not denoiser]
    return Turns(device, [denoiser], encoders)


def _set_decoding(vae: ModelMixin, decoding: str) -> None:
    if decoding != "whole":
        vae.enable_slicing()
    if decoding == "tiled":
        vae.enable_tiling()


def _may_be_batch_invariant(settings: ModelSettings, context: PolicyContext) -> bool:
    """False where it is known without measuring: on a GPU, compiled in low precision, and where processes make calls together."""
    same_network = settings.dtype == "float32" or not settings.compile
    return same_network and context.device.type == "cpu" and not _is_shared(settings, context)


def _is_shared(settings: ModelSettings, context: PolicyContext) -> bool:
    """Whether several processes hold a part of the denoiser's weights each."""
    return settings.shard and context.world_size > 1


def _narrow_on_cpu(dtype: torch.dtype, device: torch.device) -> bool:
    """In low precision on a CPU, where some of what torch and diffusers have is slow.

    Torch's fused attention has a gradient slower than the whole rest there. What torch has without it computes in float32, and
    takes two to three times as long as products in the dtype itself.
    """
    return dtype != torch.float32 and device.type == "cpu"


def _compile(*modules: nn.Module) -> None:
    """In place, so that names of parameters stay. Sampling, training, audits and evaluation each have shapes of their own.

    Of a denoiser its blocks, which takes a fraction of the time that the whole takes: equal ones share what was compiled.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in modules:
        module.compile(dynamic=False)


def _compiled_decoder(vae: ModelMixin, settings: ModelSettings, context: PolicyContext) -> list[nn.Module]:
    """A decoder of pictures, whose norms go through memory several times on a GPU. On a CPU it is slower compiled than not.

    Not one that is to save memory: slices and tiles have shapes of their own.
    """
    wanted = context.device.type != "cpu" and settings.decoding == "whole"
    return [vae.decoder] if wanted and isinstance(vae.decoder, Decoder) else []


def unused(scheduler: Any, names: Iterable[str], instead: str) -> str:
    """Which of these settings the pipeline's own scheduler has and the one that is stepped on does not, in a sentence."""
    there = [name for name in names if scheduler.config.get(name)]
    verb = "is" if len(there) == 1 else "are"
    return f"the {type(scheduler).__name__}'s {' and '.join(there)} {verb} not used: {instead}" if there else ""


GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings of diffusers' schedulers that lay their grid otherwise."""


def _modules(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _fingerprints(pipeline: DiffusionPipeline) -> dict[str, str]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: fingerprint(part) for name, part in parts.items()}


def _cast(module: ModelMixin, dtype: torch.dtype) -> None:
    if module.dtype != dtype:  # diffusers warns of every cast, also of one that changes nothing
        module.to(dtype)


def _require_no_adapter(denoiser: ModelMixin, name: str) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in denoiser.modules()):
        raise ValueError(
            f"the pipeline's {name} has an adapter already: call fuse_lora() and unload_lora_weights() to keep what it"
            " learnt, the latter alone to leave it out, or name it in model.lora to train it further"
        )


def _add_lora(denoiser: ModelMixin, settings: ModelSettings, targets: tuple[str, ...], seed: int) -> None:
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    adapted: set[str] = set()
    for target in targets:
        if not (found := [name for name in linears if fnmatchcase(f".{name}", f"*.{target}")]):
            raise ValueError(f"model.lora_targets: no linear layer's name ends in {target!r}; use such as attn.to_q")
        adapted.update(found)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=sorted(adapted),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, from the global generator
        torch.default_generator.manual_seed(seed)
        denoiser.add_adapter(config)
    in_float32(denoiser)
