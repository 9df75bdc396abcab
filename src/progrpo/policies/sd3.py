"""Stable Diffusion 3 and 3.5: the one file that knows their pipeline, their network and how it is adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition

LORA_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
)
"""Attention and feed-forward projections of the picture's and the text's stream, as endings of module names."""


class SD3Policy:
    """A `StableDiffusion3Pipeline` as a policy: `progrpo.policies.base.Policy` says what each method promises."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        trained: Literal["lora", "full"],
        max_sequence_length: int,
        resolution: int,
        dtype: torch.dtype,
    ) -> None:
        """Wrap a pipeline whose trainable parameters are already marked; `from_pipeline` is the usual way in."""
        self._pipeline = pipeline
        self._trained = trained
        self._max_sequence_length = max_sequence_length
        self._dtype = dtype
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.device: torch.device = pipeline.transformer.device
        side = resolution // pipeline.vae_scale_factor
        self.latent_shape: tuple[int, int, int] = (pipeline.transformer.config.in_channels, side, side)
        self.trainable: Mapping[str, nn.Parameter] = {
            name: p for name, p in pipeline.transformer.named_parameters() if p.requires_grad
        }
        self.named_weights = NamedWeights(self.trainable)
        self._unconditional = self.encode([""])

    @classmethod
    def from_pipeline(
        cls,
        pipeline: StableDiffusion3Pipeline,
        *,
        weights: Literal["lora", "full"],
        lora_rank: int,
        lora_alpha: int,
        lora_targets: Sequence[str] = (),
        max_sequence_length: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        resolution: int | None = None,
    ) -> SD3Policy:
        """Take the pipeline over: it moves to `device`, is frozen, and its denoiser gets what `weights` asks for.

        `seed` draws the LoRA's A whatever the global generator's state. Trained weights are float32 in every case;
        the denoiser's frozen weights and the VAE are in `dtype`, the text encoders stay in the dtype they came in.
        `resolution` is the side of the square picture in pixels (none: the model's own).
        """
        _check(pipeline)
        resolution = _checked_resolution(pipeline, resolution)
        pipeline.to(device)
        for module in _modules(pipeline):
            module.requires_grad_(False)
        _cast(pipeline.vae, dtype)
        if weights == "lora":
            _cast(pipeline.transformer, dtype)
            _add_lora(pipeline.transformer, lora_rank, lora_alpha, tuple(lora_targets) or LORA_TARGETS, seed)
        elif weights == "full":
            _cast(pipeline.transformer, torch.float32)
            pipeline.transformer.requires_grad_(True)
        else:
            raise ValueError(f"model.weights: {weights!r} is not known; use 'lora' or 'full'")
        for module in _modules(pipeline):
            module.eval()
        return cls(
            pipeline, trained=weights, max_sequence_length=max_sequence_length, resolution=resolution, dtype=dtype
        )

    def sigmas(self, num_inference_steps: int, shift: float | None = None) -> Tensor:
        config = self._pipeline.scheduler.config
        if shift is None and config.use_dynamic_shifting:
            raise ValueError("sampling.shift: this model shifts its grid by picture size; give a number, such as 3")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            config, shift=config.shift if shift is None else shift, use_dynamic_shifting=False
        )
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.sigmas

    def encode(self, texts: Sequence[str]) -> Condition:
        for text in texts:
            if text not in self._encoded:
                self._encoded[text] = self._encode_one(text)
        rows = [self._encoded[text] for text in texts]
        embeds, pooled = (torch.stack(column).to(self.device) for column in zip(*rows, strict=True))
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    @torch.no_grad()
    def _encode_one(self, text: str) -> tuple[Tensor, Tensor]:
        # Alone in its batch, so that a text's embedding never depends on the company it was first met in.
        if self._pipeline.text_encoder is None:
            raise ValueError(f"{text!r} is new and the text encoders are released; encode all prompts before that")
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return embeds[0].to("cpu", self._dtype), pooled[0].to("cpu", self._dtype)

    def release_text_encoders(self) -> None:
        self._pipeline.text_encoder = None
        self._pipeline.text_encoder_2 = None
        self._pipeline.text_encoder_3 = None

    def predict(self, x_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        sigma_B = sigma.to(x_BCHW.device, torch.float32).expand(len(x_BCHW))
        if guidance_scale == 1.0:
            return self._velocity(x_BCHW, sigma_B, condition)
        pair = Condition(
            {
                name: torch.cat([self._unconditional.tensors[name].expand_as(rows), rows])
                for name, rows in condition.tensors.items()
            }
        )
        v_u, v_c = self._velocity(torch.cat([x_BCHW, x_BCHW]), torch.cat([sigma_B, sigma_B]), pair).chunk(2)
        return v_u + guidance_scale * (v_c - v_u)

    def _velocity(self, x_BCHW: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        assert all(len(rows) == len(x_BCHW) for rows in condition.tensors.values())
        # No cache of cast weights: it would outlive a change of weights inside a caller's own autocast block.
        low_precision = self._dtype != torch.float32
        with (
            torch.autocast(self.device.type, self._dtype, enabled=low_precision, cache_enabled=False),
            # on a CPU, torch's fused attention in low precision has a gradient slower than the whole rest
            sdpa_kernel(SDPBackend.MATH) if low_precision and self.device.type == "cpu" else nullcontext(),
        ):
            v_BCHW = self._pipeline.transformer(
                hidden_states=x_BCHW,
                timestep=sigma_B * self._pipeline.scheduler.config.num_train_timesteps,
                encoder_hidden_states=condition.tensors["prompt_embeds"],
                pooled_projections=condition.tensors["pooled_prompt_embeds"],
                return_dict=False,
            )[0]
        return v_BCHW.float()

    @torch.no_grad()
    def decode(self, x0_BCHW: Tensor) -> Tensor:
        vae = self._pipeline.vae
        latents = x0_BCHW / vae.config.scaling_factor + vae.config.shift_factor
        pictures_BCHW = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        grey_BCHW = (pictures_BCHW * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return grey_BCHW.permute(0, 2, 3, 1).contiguous().cpu()

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        transformer = self._pipeline.transformer
        yield from ((name, p.detach()) for name, p in transformer.named_parameters() if not p.requires_grad)
        yield from transformer.named_buffers()

    def save(self, folder: Path, weights: str = "current") -> None:
        """A LoRA for `StableDiffusion3Pipeline.load_lora_weights(folder)`, or a `SD3Transformer2DModel` to load."""
        save = {"lora": _save_lora, "full": SD3Transformer2DModel.save_pretrained}[self._trained]
        with self.weights(weights):
            save(self._pipeline.transformer, folder)

    def state_dict(self) -> dict[str, Any]:
        return self.named_weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.named_weights.load_state_dict(state)


def _modules(pipeline: StableDiffusion3Pipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _cast(module: ModelMixin, dtype: torch.dtype) -> None:
    if module.dtype != dtype:  # diffusers warns of every cast, also of one that changes nothing
        module.to(dtype)


def _check(pipeline: StableDiffusion3Pipeline) -> None:
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise ValueError("model.path: the pipeline lacks a CLIP text encoder; only text_encoder_3 (T5) may be left out")
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        kind = type(pipeline.scheduler).__name__
        raise ValueError(f"model.path: the scheduler is a {kind}; replace it by a FlowMatchEulerDiscreteScheduler")


def _checked_resolution(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> int:
    own = pipeline.default_sample_size * pipeline.vae_scale_factor
    multiple = pipeline.vae_scale_factor * pipeline.patch_size
    if resolution is not None and (resolution <= 0 or resolution % multiple):
        raise ValueError(f"resolution: {resolution} is not a multiple of {multiple}; the model's own is {own}")
    return own if resolution is None else resolution


def _add_lora(transformer: SD3Transformer2DModel, rank: int, alpha: int, targets: tuple[str, ...], seed: int) -> None:
    linears = [f".{name}" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linears):
            raise ValueError(f"model.lora_targets: no linear layer's name ends in {target!r}; use such as attn.to_q")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=list(targets)
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, from the global generator
        torch.default_generator.manual_seed(seed)
        transformer.add_adapter(config)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft follows the base's dtype, in which small updates vanish


def _save_lora(transformer: SD3Transformer2DModel, folder: Path) -> None:
    metadata = transformer.peft_config["default"].to_dict()  # without it alpha is lost
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: equal weights should be equal files
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=metadata,
    )
