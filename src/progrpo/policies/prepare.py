"""The steps that make a diffusers pipeline ready for training: taken over, frozen, cast, adapted, shared out, compiled.

They are in place, and in an order that matters: each line of `prepare` is one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from weakref import WeakSet

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import Decoder
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from progrpo.policies.attention import set_attention_backend
from progrpo.policies.base import PolicyContext
from progrpo.policies.decoding import slice_decoding, tile_decoding
from progrpo.policies.family import ModelFamily
from progrpo.policies.fingerprint import fingerprint
from progrpo.policies.finite import require_finite
from progrpo.policies.geometry import Geometry
from progrpo.policies.handover import take_over
from progrpo.policies.lora import add_lora, continue_lora, in_float32, magnitudes
from progrpo.policies.low_precision import adapt_to_cpu
from progrpo.policies.quantized import quantize_blocks
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sharded import blocks, share_out
from progrpo.settings import Values

_TAKEN: WeakSet[DiffusionPipeline] = WeakSet()  # whose denoisers have what a policy trains


@dataclass(frozen=True)
class Prepared:
    """A pipeline that is ready for training, with what its preparation has shown."""

    family: ModelFamily
    fingerprints: Mapping[str, str]
    ignored: str
    shared: bool
    """Whether the denoiser's weights are shared out among processes."""
    compiled_decoder: bool


def prepare(
    kind: type[ModelFamily], pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext
) -> Prepared:
    """Take the pipeline over: it moves to the device, is frozen, and its denoiser gets what `settings` ask for.

    ValueError for one that a policy was made of before, that has an adapter already, or that does not fit the settings.
    """
    _require_untaken(pipeline)
    take_over(pipeline, kind.denoiser_name)
    kind.check_index(pipeline.config)
    family = kind(pipeline, settings, context)
    ignored = family.ignored()
    family.check()
    geometry = family.geometry()
    family.size = geometry.picture_size(settings.resolution)
    family.latent_shape = geometry.latent_shape(family.size, settings.frames)
    _require_no_adapter(family)
    _require_fitting_context(family, geometry)
    shared = settings.shard and context.world_size > 1
    _require_fitting_number(family, shared)
    _quantize(family)  # before it moves, so that the device never holds the wide weights
    _place_and_freeze(family, shared)
    _cast(family)
    _mark_trained(family)
    require_finite(pipeline, kind.denoiser_name)
    # while every process has all weights; a fresh LoRA's follow from the seed
    fingerprints = _fingerprints(pipeline)
    _add_fresh_lora(family)
    for module in _networks(pipeline):
        module.eval()
    slice_decoding(family, geometry)
    family.learn()
    if shared:
        _share(family)
    _TAKEN.add(pipeline)
    adapt_to_cpu(family)
    if settings.attention != "default":
        for denoiser in family.denoisers.values():
            set_attention_backend(denoiser, settings.attention)
    tile_decoding(family, geometry)
    _order_memory(family)
    return Prepared(family, fingerprints, ignored, shared, _compile(family))


# --- what is refused --------------------------------------------------------------------------------------------------


def _require_untaken(pipeline: DiffusionPipeline) -> None:
    if pipeline in _TAKEN:
        raise ValueError("this pipeline was given to a run already, which took it over and changed it; load it again")


def _require_no_adapter(family: ModelFamily) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in family.denoiser.modules()):
        raise ValueError(
            f"the pipeline's {family.denoiser_name} has an adapter already: call fuse_lora() and unload_lora_weights()"
            " to keep what it learnt, the latter alone to leave it out, or name it in model.lora to train it further"
        )


def _require_fitting_number(family: ModelFamily, shared: bool) -> None:
    """ValueError for what is not done with two denoisers."""
    if len(family.denoisers) == 1:
        return
    if family.settings.weights == "full":
        raise ValueError("model.weights: a model of two denoisers is trained as two LoRAs; use lora")
    if shared:
        raise ValueError(
            "model.shard: not for a model of two denoisers, of which processes would call another each; leave it off"
        )


def _require_fitting_context(family: ModelFamily, geometry: Geometry) -> None:
    context = family.context
    if context.decoder_for_previews and geometry.default_frames is not None:
        raise ValueError("preview.tiny_decoder: an AutoencoderTiny decodes pictures, and this model makes videos")
    if context.guide_away_from and getattr(family.denoiser.config, "guidance_embeds", False):
        raise ValueError(
            "sampling.negative_prompt: this model takes the guidance scale as an input and no negative prompt; leave it"
            " empty"
        )


# --- what is changed --------------------------------------------------------------------------------------------------


def _quantize(family: ModelFamily) -> None:
    if family.settings.text_quantize == "int8":
        for encoder in text_encoders(family.pipeline):
            quantize_blocks(encoder)
    if family.settings.quantize == "int8":
        for denoiser in family.denoisers.values():
            _cast_to(denoiser, family.dtype)
            quantize_blocks(denoiser)


def _place_and_freeze(family: ModelFamily, shared: bool) -> None:
    """Move the networks to the device, but for a denoiser that is shared out and for those that wait on the CPU."""
    vae, denoiser = family.pipeline.vae, family.denoiser
    for module in _networks(family.pipeline):
        is_shared = module is denoiser and shared
        waits = module is not vae and family.settings.offload
        if not is_shared and not waits:
            module.to(family.device)
        module.requires_grad_(False)


def _cast(family: ModelFamily) -> None:
    """Cast the autoencoder and the denoiser, whose trained weights are float32 in every case."""
    weights = family.settings.weights
    if weights not in ("lora", "full"):
        raise ValueError(f"model.weights: {weights!r} is not known; use 'lora' or 'full'")
    _cast_to(family.pipeline.vae, family.loaded_vae_dtype)
    for denoiser in family.denoisers.values():
        _cast_to(denoiser, torch.float32 if weights == "full" else family.dtype)


def _mark_trained(family: ModelFamily) -> None:
    """Mark all weights of the denoiser as trained, or load a LoRA that is trained further."""
    if family.settings.weights == "full":
        family.denoiser.requires_grad_(True)
    elif family.settings.lora:
        for name in family.denoisers:
            continue_lora(family.pipeline, family.denoiser_name, family.settings.lora, name)


def _cast_to(module: ModelMixin, dtype: torch.dtype) -> None:
    if module.dtype != dtype:  # diffusers warns of every cast, also of one that changes nothing
        module.to(dtype)


def _add_fresh_lora(family: ModelFamily) -> None:
    settings = family.settings
    if settings.weights != "lora" or settings.lora:
        return
    targets = settings.lora_targets or family.default_lora_targets()
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, from the global generator
        torch.default_generator.manual_seed(family.context.lora_seed)
        for denoiser in family.denoisers.values():
            layers = _adapted_layers(denoiser, targets)
            config = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha,
                rank_pattern=_by_layer("lora_rank_pattern", settings.lora_rank_pattern, layers),
                alpha_pattern=_by_layer("lora_alpha_pattern", settings.lora_alpha_pattern, layers),
                lora_dropout=0.0,
                init_lora_weights="gaussian",
                target_modules=layers,
                use_dora=settings.lora_use_dora,
            )
            add_lora(denoiser, config)
            in_float32(denoiser)
            _require_directions(denoiser)


def _require_directions(denoiser: ModelMixin) -> None:
    for layer, lengths in magnitudes(denoiser).items():
        if not lengths.is_meta and not lengths.all():  # 0 / 0 for its readers, too
            raise ValueError(
                f"model.lora_use_dora: {layer} has a row of zeros, which has no direction; leave it out of"
                " model.lora_targets, or train a plain LoRA"
            )


def _adapted_layers(denoiser: nn.Module, targets: tuple[str, ...]) -> list[str]:
    linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    adapted: set[str] = set()
    for target in targets:
        layers = _ending(linears, target)
        if not layers:
            raise ValueError(f"model.lora_targets: no linear layer's name ends in {target!r}; use such as attn.to_q")
        adapted.update(layers)
    return sorted(adapted)


def _ending(layers: Iterable[str], end: str) -> list[str]:
    """The layers whose names end in `end`, where `*` matches anything."""
    return [name for name in layers if fnmatchcase(f".{name}", f"*.{end}")]


def _by_layer(field: str, values: Values, layers: Sequence[str]) -> dict[str, object]:
    """The values of single layers as peft takes them, by whole names; of several endings the first counts."""
    own: dict[str, object] = {}
    for end, value in values.items():
        matching = _ending(layers, end)
        if not matching:
            raise ValueError(f"model.{field}: no adapted layer's name ends in {end!r}; use such as {layers[0]}")
        own = dict.fromkeys((f"^{name}" for name in matching), value) | own
    return own


def _share(family: ModelFamily) -> None:
    """Share the denoiser's weights out among the processes; a LoRA stays whole in each."""
    if magnitudes(family.denoiser):
        raise ValueError("model.shard must be false for a DoRA, which scales whole rows of a weight that is shared out")
    trained = [p for p in family.denoiser.parameters() if p.requires_grad]
    share_out(family.denoiser, family.device, replicated=trained if family.settings.weights == "lora" else [])


# --- what makes it faster ---------------------------------------------------------------------------------------------


def _order_memory(family: ModelFamily) -> None:
    """Lay weights in channels-last order, where pictures are convolved faster: a decoder by a fifth on a CPU."""
    vae = family.pipeline.vae
    if not any(p.ndim == 5 for p in vae.parameters()):  # a video's has weights that cannot be in it
        vae.to(memory_format=torch.channels_last)
    if family.channels_last and family.device.type == "cuda":
        family.denoiser.to(memory_format=torch.channels_last)


def _compile(family: ModelFamily) -> bool:
    """Compile in place, so that names of parameters stay. Return whether the decoder is compiled, too.

    The denoiser is compiled by its blocks, which takes a fraction of the time that the whole takes: equal ones share
    what was compiled. Sampling, training, audits and evaluation each have shapes of their own.
    """
    if not family.settings.compile:
        return False
    decoders = compilable_decoder(family.pipeline.vae, family.settings, family.device)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in (*(block for denoiser in family.denoisers.values() for block in blocks(denoiser)), *decoders):
        module.compile(dynamic=False)
    return bool(decoders)


def compilable_decoder(vae: ModelMixin, settings: ModelSettings, device: torch.device) -> list[nn.Module]:
    """The decoder if compiling makes it faster: one of pictures, whose norms go through memory several times on a GPU.

    On a CPU it is slower compiled than not. One that is to save memory is left: slices and tiles have shapes of their
    own.
    """
    faster = device.type != "cpu" and settings.decoding == "whole" and isinstance(vae.decoder, Decoder)
    return [vae.decoder] if faster else []


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The networks of a pipeline that encode prompts."""
    return [
        component
        for name, component in pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(component, nn.Module)
    ]


def _networks(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [component for component in pipeline.components.values() if isinstance(component, nn.Module)]


def _fingerprints(pipeline: DiffusionPipeline) -> dict[str, str]:
    networks = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    return {name: fingerprint(network) for name, network in networks.items()}
