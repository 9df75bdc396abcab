"""What the tests share: pipelines of the true classes and of random weights, whose calls take milliseconds, what a run of
one needs, and a policy of two weights for computing by hand."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for _name in (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HF_ENDPOINT",
    *(name for name in os.environ if name.lower().endswith("_proxy")),
):
    os.environ.pop(_name, None)  # sentences name what lies before a server: here they are of no machine's own

torch.set_num_threads(1)  # tensors here are tiny: on a busy machine threads wait for each other for seconds


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in tests, also those of other processes, know no timings of an earlier one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


WIDTH = 16  # of the T5, of the joined CLIPs and of the tokens: diffusers pads or crops silently if they differ
CLIP_TOKENS = 16


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def _clip_encoder(tokenizer: Any, size: float = 8.0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH // 2,
            intermediate_size=WIDTH,
            projection_dim=WIDTH // 2,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=size,  # random, but not blind to the text
        )
    )


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in string.ascii_lowercase)], extra_ids=0)


def _t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def _denoiser() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _unet(cross_attention_dim: int = WIDTH // 2, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def _vae(kind: str = "AutoencoderKL", **scaling: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **scaling,
    )


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by save_pretrained: latents of 4x8x8, pictures of 16x16, time shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    clip_1, clip_2, t5 = _clip_tokenizer(), _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=_denoiser(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(scaling_factor=1.5, shift_factor=0.06),
            text_encoder=_clip_encoder(clip_1),
            tokenizer=clip_1,
            text_encoder_2=_clip_encoder(clip_2),
            tokenizer_2=clip_2,
            text_encoder_3=_t5_encoder(t5),
            tokenizer_3=t5,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    pipeline.save_pretrained(folder)
    return folder


def _noise_schedule(prediction_type: str) -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def _tiny_sd(folder: Path, prediction_type: str) -> Path:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = _clip_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            unet=_unet(),
            scheduler=PNDMScheduler(**_noise_schedule(prediction_type), set_alpha_to_one=False, skip_prk_steps=True),
            vae=_vae(scaling_factor=0.18),
            text_encoder=CLIPTextModel(_clip_encoder(tokenizer).config),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.x that says noise: latents of 4x8x8, pictures of 16x16, PNDM's scheduler as SD 1.4 has it."""
    return _tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd", "epsilon")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 2.x that says v."""
    return _tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd-v", "v_prediction")


FLUX_SHIFTS: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 9,
    "base_shift": 0.4,
    "max_shift": 1.3,
}


def _tiny_flux(folder: Path, guidance_embeds: bool, kind: str = "FluxPipeline", **scheduler: Any) -> Path:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel

    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = getattr(diffusers, kind)(
            transformer=FluxTransformer2DModel(
                in_channels=4 * 2 * 2,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH // 2,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=_vae(scaling_factor=0.36, shift_factor=0.12),
            text_encoder=CLIPTextModel(_clip_encoder(clip).config),
            tokenizer=clip,
            text_encoder_2=_t5_encoder(t5),
            tokenizer_2=t5,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1-dev, told its guidance and shifted by picture size. Its own is 256x256, and tests ask for 16x16."""
    return _tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux", True, **FLUX_SHIFTS)


@pytest.fixture(scope="session")
def tiny_flux_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1-schnell: guided by a pair of calls if at all, on an even grid."""
    return _tiny_flux(tmp_path_factory.mktemp("models") / "tiny-flux-schnell", False, shift=1.0)


@pytest.fixture(scope="session")
def tiny_kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1-Kontext-dev, which changes a picture; told its guidance and shifted as the tiny FLUX.1-dev."""
    folder = tmp_path_factory.mktemp("models") / "tiny-kontext"
    return _tiny_flux(folder, True, "FluxKontextPipeline", **FLUX_SHIFTS)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL: pooled embeddings, time ids, and Euler's scheduler as it is shipped with."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel

    clip_1, clip_2 = _clip_tokenizer(), _clip_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooled, time_ids = WIDTH // 2, 6 * 4
        pipeline = StableDiffusionXLPipeline(
            unet=_unet(
                cross_attention_dim=WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=pooled + time_ids,
            ),
            scheduler=EulerDiscreteScheduler(**_noise_schedule("epsilon"), timestep_spacing="leading"),
            vae=_vae(scaling_factor=0.13),
            text_encoder=CLIPTextModel(_clip_encoder(clip_1, 3.0).config),  # it is read before its last norm
            tokenizer=clip_1,
            text_encoder_2=_clip_encoder(clip_2, 3.0),
            tokenizer_2=clip_2,
            add_watermarker=False,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    pipeline.save_pretrained(folder)
    return folder


FRAMES = 3


def frames_of(folder: Path) -> int | None:
    """How long tests ask a model's videos to be; its own are 81 frames."""
    return FRAMES if folder.name == "tiny-wan" else None


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.1 with its UniPC: of 16x16 and 3 frames, latents are 4x2x8x8."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    t5 = _t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = WanPipeline(
            tokenizer=t5,
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
            ),
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=0,
                temperal_downsample=[True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.2, 2.0],
                scale_factor_temporal=2,
                scale_factor_spatial=2,
            ),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            transformer=WanTransformer3DModel(
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=8,
                ffn_dim=WIDTH,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=12,
                rope_max_seq_len=32,
            ),
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    pipeline.save_pretrained(folder)
    return folder


QWEN_IMAGE_WORDS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects"
    " and background:"
)
"""Of the system prompt that its pipeline puts before every text, and drops again as 34 tokens: each word and comma is one."""


def _qwen_tokenizer() -> Any:
    """Letters, and as whole words those of the chat and of `QWEN_IMAGE_WORDS`."""
    from transformers import Qwen2Tokenizer

    words = ["system", "user", "assistant", " cat", " dog", *re.findall(r" ?\w+", QWEN_IMAGE_WORDS)]
    words = [word.replace(" ", "Ġ") for word in words]  # as byte-level tokens write a space
    pieces = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokens = dict.fromkeys([*string.ascii_letters, *".,:<>/Ġ", "Ċ", *("".join(piece) for piece in pieces)])
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(pieces))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image, whose grid is shifted by picture size and ends at 0.02: of 16x16, latents are 4x8x8."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    eyes = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * 2 * 2,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=9, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=0,
                temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.2, 2.0],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes)),
            tokenizer=tokenizer,
        )
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen-image"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux2_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.2 klein base, guided by a pair of calls: of 16x16, latents are 4x8x8. Its text encoder is read at layers 9, 18 and 27."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = _vae("AutoencoderKLFlux2", batch_norm_eps=0.1)
        for statistic in (vae.bn.running_mean, vae.bn.running_var):
            statistic.uniform_(0.5, 1.5)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 2 * 2,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=8,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 2, 2),
        )
        for weights in transformer.parameters():
            weights.data *= 2  # random, but not blind to the text
        pipeline = Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=8,
                    intermediate_size=4,
                    num_hidden_layers=27,
                    num_attention_heads=1,
                    num_key_value_heads=1,
                    head_dim=4,
                    initializer_range=0.3,
                )
            ),
            tokenizer=tokenizer,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-flux2-klein"
    pipeline.save_pretrained(folder)
    return folder


FAMILIES = (
    "tiny_sd3",
    "tiny_flux",
    "tiny_flux_schnell",
    "tiny_kontext",
    "tiny_flux2_klein",
    "tiny_qwen_image",
    "tiny_wan",
    "tiny_sd",
    "tiny_sd_v",
    "tiny_sdxl",
)
"""All pipelines, by the fixtures above: a new policy's joins here, and with it every suite of what all policies must do."""
_QUICK = ("tiny_sd3", "tiny_kontext", "tiny_flux2_klein", "tiny_wan", "tiny_sd")


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Path:
    """The folder of each pipeline in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(
    scope="session",
    params=[name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def family_at_length(request: pytest.FixtureRequest) -> Path:
    """The same for suites that take seconds of each: one of each kind, and the others in the slow suite."""
    return request.getfixturevalue(request.param)


# --- runs of it -------------------------------------------------------------------------------------------------------

PROMPTS = ("red cat", "blue dog", "green bird")


def redness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """A reward that tells any two pictures apart: the mean of the red channel, from 0 to 1."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def told(*texts: str) -> list[Any]:
    """Prompts with a source picture each, which differs by the text and which only models that edit look at."""
    from PIL import Image

    from progrpo.types import Prompt

    drawn = [np.random.default_rng(list(text.encode())).integers(0, 256, (16, 16, 3), np.uint8) for text in texts]
    return [Prompt(text, {"image": Image.fromarray(pixels)}) for text, pixels in zip(texts, drawn, strict=True)]


@pytest.fixture(scope="session", name="told")
def _told() -> Callable[..., list[Any]]:
    return told


@pytest.fixture(scope="session")
def prompts() -> tuple[str, ...]:
    return PROMPTS


@pytest.fixture(scope="session", name="redness")
def _redness() -> Callable[..., list[float]]:
    return redness


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_sd3: Path) -> Callable[..., Any]:
    """The untouched pipeline of a folder, as a user of diffusers has it, new at every call."""
    from diffusers import DiffusionPipeline

    def load(folder: Path = tiny_sd3) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """A configuration of seconds, with sections replaced by name: groups of 4, of which 3 live on after step 1 of 4."""
    from progrpo import config as c

    base = c.Config(
        recipe="tiny",
        iterations=2,
        model=c.ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8),
        prompts=c.PromptSettings(per_iteration=2),
        sampling=c.SamplingSettings(num_inference_steps=4),
        plan=c.PlanSettings(preset="custom", group_size=4, prune=((1, 3),)),
        objective=c.ObjectiveSettings(grpo=c.GRPOSettings(clip_range=3e-3)),
        audit=c.AuditSettings(every=0),
        eval=c.EvalSettings(pictures=3, num_inference_steps=3),
        checkpoint=c.CheckpointSettings(every=1),
    )
    return lambda **sections: replace(base, **sections)


@pytest.fixture(scope="session")
def tiny_policy(tiny_sd3: Path, tiny_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """The pipeline as a policy, new at every call; `moved` is how far its trained weights are from their start."""
    from progrpo.policies.base import PolicySettings
    from progrpo.policies.load import policy_from_pipeline

    def load(
        weights: Any = "lora",
        dtype: torch.dtype = torch.float32,
        moved: float = 0.0,
        folder: Path = tiny_sd3,
        quantize: Any = "none",
    ) -> Any:
        settings = PolicySettings(
            weights,
            lora_rank=2,
            lora_alpha=4,
            max_sequence_length=8,
            dtype=dtype,
            resolution=16,
            frames=frames_of(folder),
            quantize=quantize,
        )
        policy = policy_from_pipeline(tiny_pipeline(folder), settings)
        move(policy, moved)
        return policy

    return load


@torch.no_grad()
def move(policy: Any, far: float) -> None:
    """Move every trained weight: a fresh LoRA is the base model and hides its own mistakes."""
    generator = torch.Generator().manual_seed(4)
    for parameter in policy.trainable.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=far)


@pytest.fixture(scope="session", name="move")
def _move() -> Callable[[Any, float], None]:
    return move


@pytest.fixture(scope="session")
def tiny_trainer(tiny_policy: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer of a configuration, of the tiny policy and of `redness` if no other is given."""
    from progrpo.prompts.order import InTurn
    from progrpo.rewards.frames import FrameAverageReward
    from progrpo.rewards.function import FunctionReward
    from progrpo.rewards.mixture import mixture_of_one
    from progrpo.training.distributed import Ranks
    from progrpo.training.trainer import Trainer

    def build(config: Any, policy: Any = None, reward: Callable[..., Any] = redness) -> Any:
        policy = policy or tiny_policy(config.model.weights)
        order = InTurn({"": tuple(told(*PROMPTS))}, config.seed)
        return Trainer(config, policy, mixture_of_one(FrameAverageReward(FunctionReward(reward), 1)), order, Ranks())

    return build


@pytest.fixture(scope="session")
def first_experience() -> Callable[[Any], Any]:
    """What a trainer's first iteration would learn from, before it learns."""
    from progrpo.rollout.meter import Meter
    from progrpo.rollout.noise import NoiseKey
    from progrpo.rollout.rollout import rollout
    from progrpo.training.update import learn_from

    def roll(trainer: Any) -> Any:
        count = trainer.config.prompts.per_iteration
        prompts, parts = trainer.order.prompts_for(0, count), (trainer.plan, trainer.sampling, trainer.select)
        key = NoiseKey(trainer.config.seed, 0)
        rolled = rollout(trainer.policy, trainer.reward, prompts, torch.arange(count), *parts, key, Meter())
        wanted, clip = trainer.config.objective, trainer.objective.adv_clip_max
        return learn_from(rolled, trainer.sampling, key, wanted, clip, trainer.ranks, trainer.reward.weights)[0]

    return roll


@pytest.fixture(scope="session")
def assert_trained_alike() -> Callable[..., None]:
    """Assert that two runs have trained the same weights, by name, up to what their gradients were rounded by.

    AdamW divides a gradient by its own size. Where one is but rounding its step has any sign, and the learning rate's length:
    such weights are few, and at most two learning rates apart for each step.
    """

    def check(weights: Mapping[str, Any], expected: Mapping[str, Any], lr: float, steps: int) -> None:
        assert weights.keys() == expected.keys()
        apart = torch.cat([(weights[name] - weight).abs().flatten() for name, weight in expected.items()])
        assert apart.max() <= 2.1 * lr * steps
        assert (apart > 0.01 * lr).double().mean() < 0.01

    return check


# --- a policy for computing by hand -----------------------------------------------------------------------------------


class LinearPolicy:
    """v = a x + b c in float64, c being the prompt's number: all that objectives and updates ask of a policy."""

    prediction = "flow"
    embeds_guidance = False
    compiled = compiled_decoder = False
    batch_invariant = True
    attend = None
    latent_shape = (1, 2, 2)
    device = torch.device("cpu")

    def __init__(self, a: float, b: float) -> None:
        from progrpo.policies.weights import NamedWeights

        self.a, self.b = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))
        self.trainable = {"a": self.a, "b": self.b}
        self.named_weights = NamedWeights(self.trainable)

    def predict(self, x_BCHW: Any, timestep: Any, condition: Any, guidance_scale: float = 1.0) -> Any:
        """The empty prompt's number is 0, so guidance scales c."""
        return self.a * x_BCHW + guidance_scale * self.b * condition.tensors["c"].reshape(-1, 1, 1, 1)

    def between(self, levels_T1: Any, place_B: Any) -> Any:
        from progrpo.diffusion.levels import between_flow_levels

        return between_flow_levels(levels_T1, place_B)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)


@pytest.fixture
def linear_policy() -> LinearPolicy:
    return LinearPolicy(0.3, -0.2)


class LinearDiffusionPolicy(LinearPolicy):
    """A diffusion model that was trained on ten levels of noise, on an uneven grid of 3 steps that ends before clean data.

    A hundredth of the timestep is added to its output, so that a wrong one would show.
    """

    signal = torch.tensor([0.98, 0.95, 0.9, 0.82, 0.71, 0.58, 0.44, 0.3, 0.18, 0.08], dtype=torch.float64)

    def __init__(self, a: float, b: float, prediction: str) -> None:
        super().__init__(a, b)
        self.prediction = prediction

    def predict(self, x_BCHW: Any, timestep: Any, condition: Any, guidance_scale: float = 1.0) -> Any:
        return super().predict(x_BCHW, timestep, condition, guidance_scale) + timestep.reshape(-1, 1, 1, 1) / 100

    def process(self, sampler: str, noise_level: float) -> Any:
        from progrpo.diffusion.levels import diffusion_levels
        from progrpo.diffusion.process import Process

        levels = diffusion_levels(torch.tensor([9, 5, 2]), self.signal, torch.tensor(0.99, dtype=torch.float64))
        return Process(self.prediction, sampler, levels, (noise_level,) * 3)

    def between(self, levels_T1: Any, place_B: Any) -> Any:
        from progrpo.diffusion.levels import between_diffusion_levels

        return between_diffusion_levels(levels_T1, place_B, self.signal)


@pytest.fixture(scope="session")
def linear_diffusion_policy() -> Callable[[str], LinearDiffusionPolicy]:
    """New at every call, of a prediction type."""
    return lambda prediction: LinearDiffusionPolicy(0.3, -0.2, prediction)


@pytest.fixture(scope="session")
def linear_transitions(linear_experience: Callable[..., Any]) -> Callable[..., Any]:
    """The same as GRPO has it before the first of two updates: the old log-probs are those that were stored."""
    from progrpo.objectives.grpo import GRPO

    return lambda policy, *args, **named: GRPO(0.05).prepare(policy, linear_experience(policy, *args, **named), 64, 2)


@pytest.fixture(scope="session")
def linear_experience() -> Callable[..., Any]:
    """Transitions of the linear policy's shape on a grid of 3 steps, drawn anywhere: 2 groups, of 3 and 2 members.

    Their log-probs are those of `policy`, give or take `off`. The process is Flow-GRPO's if no other is given.
    """
    from progrpo.diffusion.levels import flow_levels
    from progrpo.diffusion.process import Process
    from progrpo.objectives.base import Experience
    from progrpo.rollout.noise import NoiseKey
    from progrpo.types import Condition, Trajectories, Transition

    flow = flow_levels(torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64))
    flow_grpo = Process("flow", "flow_grpo", flow, (0.7, 0.7, 0.7))

    def build(
        policy: Any,
        advantages: Sequence[float],
        off: float = 0.0,
        guidance_scale: float = 1.0,
        process: Process = flow_grpo,
        steps: Sequence[int] = (0, 1),
    ) -> Experience:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        group, slot = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 5, 5])
        condition = Condition({"c": torch.tensor([1.0, -2.0], dtype=torch.float64)})
        path = []
        for step in steps:
            x = draw(5, 1, 2, 2)
            with torch.no_grad():
                output = policy.predict(x, process.timestep(step, x), condition.take(group), guidance_scale)
            mean, std = process.mean_std(step, x, output)
            x_next = mean + std * draw(*x.shape)
            path.append(Transition(step, x, x_next, process.log_prob(x_next, mean, std) + off * draw(5), mean))
        living = Trajectories(group, slot, torch.tensor([0, 2, 3, 0, 1]), draw(5, 1, 2, 2), None, tuple(path))
        wanted = torch.tensor(advantages, dtype=torch.float64)
        return Experience(living, wanted, condition, process, NoiseKey(3, 1), guidance_scale)

    return build
