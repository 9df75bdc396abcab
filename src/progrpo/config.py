"""The configuration of a run: frozen, typed, free of torch. Only the rim (cli, recipes, training) knows it."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from progrpo.rollout.plan import Plan, PrunePoint, preset
from progrpo.rollout.window import window
from progrpo.types import FROM_PYTHON
from progrpo.words import is_one_line, named, nearest, quoted


@dataclass(frozen=True)
class ModelConfig:
    path: str = "shapes-flow"
    """A built-in model's name, a folder in diffusers' format, or a hub id."""
    weights: Literal["lora", "full"] = "lora"
    """Train low-rank adapters (peft) or every weight of the denoiser. The reference of a fresh LoRA is the model without it. That of full
    weights is a frozen copy, kept only where the objective measures a distance to it (a kl_beta above 0, or dgpo)."""
    lora: str = ""
    """A LoRA to train further: a run folder, a folder in diffusers' or peft's format (with adapter_config.json), a file in safetensors, also in
    kohya's format where diffusers reads it, or a hub id; empty: a fresh one. Its rank, alpha and layers are its own, the three fields below are not
    read. The reference, from which a KL is measured and with which a run compares itself, is the model with this LoRA; what is saved
    takes its place, on the same base."""
    lora_rank: int = 16
    lora_alpha: int = 32
    """The LoRA counts lora_alpha / lora_rank times. What is saved has that in its numbers, and alpha = rank."""
    lora_targets: tuple[str, ...] = ()
    """Endings of module names to adapt, where `*` stands for anything; empty: attention and feed-forward projections (of both
    streams of SD3, FLUX and Qwen-Image, and of FLUX's single blocks; of Wan's attention to the video and to the text)."""
    max_sequence_length: int | None = None
    """T5 tokens of SD3, FLUX and Wan, past which a text is cut; empty: as many as the model's pipeline takes (256 of SD3, 512 of the others), and
    16 of the built-in. There is no attention mask in them, so this changes the picture and multiplies the cost; in Wan those after the
    text are zeros. FLUX.2 klein and Qwen-Image count the tokens of their own encoder, the words of its chat around the prompt included; in
    Qwen-Image those after a text are masked. How many prompts are cut is said at the start of a run."""
    resolution: int | tuple[int, int] | None = None
    """Pixels of a picture or video: one number for a square, or height and width (`--model.resolution 480 832`, in JSON `[480, 832]`), in
    diffusers' order and in the multiples that the model takes. Empty: the model's own (1024 of SD 3.5, FLUX and Qwen-Image, 480 832 of Wan)."""
    frames: int | None = None
    """Frames of a video, one more than a multiple of 4 for Wan; empty: the model's own (81 of Wan). Models of pictures have none."""
    keep_text_encoders: bool = False
    """False: every prompt that the run will meet is encoded at its start, and the text encoders leave memory. True: they
    stay, and encode as prompts come; for runs of so many prompts that the embeddings would not fit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights and the network's forward pass; step math is always float32. `auto`: float32 or bfloat16, whichever
    this device multiplies matrices faster in, measured when the run begins and then kept in its configuration. In float16, for GPUs
    without bfloat16, losses are scaled, and a model whose numbers pass 65,504 gives no picture."""
    quantize: Literal["none", "int8"] = "none"
    """int8: the frozen weights of the linear layers of the denoiser's blocks are kept as 8-bit integers, a scale to each row, half of bfloat16's
    memory. The reference, samples and evaluations of the run are this model's; the saved LoRA is for the unquantised one."""
    compile: bool = False
    """Have torch compile the denoiser's blocks, which takes a minute or two at the start and needs a C++ compiler on a CPU."""
    activation_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, about a third more time in the update."""
    offload: bool = False
    """The denoiser and the text encoders are on the device by turns, and on the CPU else. The start then takes what the larger of both
    takes, and not their sum; with `keep_text_encoders` every iteration moves them."""
    decoding: Literal["whole", "sliced", "tiled"] = "whole"
    """How many pictures the decoder takes at once: a microbatch, one (the same picture up to rounding), or one in overlapping tiles, whose
    seams are blended."""
    shard: bool = False
    """With several processes: each holds a part of the denoiser's weights (torch's fully_shard), and blocks are gathered while they run. A LoRA
    stays whole; of weights that are trained in full gradients, averages and the optimizer's state are shared out too. For models too large for
    one device, with microbatches that are given."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty: its main branch. A commit is the same model whenever the run goes on."""
    variant: str = ""
    """Which of several kinds of weights files is read, such as fp16 (`model.fp16.safetensors`), of a folder or a hub id;
    parts that lack it are read without. It names files and chooses no precision: that is `dtype`."""
    step_ends: Literal["diffusers", "next"] = "diffusers"
    """Where a diffusion model's step ends. `diffusers`: 1000 // T timesteps on, as in its DDIMScheduler, so that without
    noise a picture is its pipeline's own. `next`: where the next step begins. They are one for the spacing `leading`, and
    for `trailing` where T divides 1000; else where a step leads differs, by up to 15 % at 6 steps of `linspace` and 0.3 %
    of `trailing`. A run whose config.json lacks this field was begun by `next`, and goes on so."""


@dataclass(frozen=True)
class PromptConfig:
    source: str = "shapes"
    """`shapes` (the built-in world, its train split); a file: .txt (a prompt a line), .jsonl (an object a line), .json (a list of texts or
    objects), .csv (a line of names, then rows) or .parquet; or `dataset:NAME` or `dataset:NAME:CONFIG`: a dataset of the `datasets` library, on the
    hub or saved in a folder, and one of its configurations. For a model that edits the column `image` is the picture to change; in a file its
    path, from the file's folder."""
    column: str = "prompt"
    """The field of a row that holds its text; the others reach rewards by their names. Also of rows that Python gives."""
    per_iteration: int = 12
    order: Literal["turn", "signal"] = "turn"
    """`turn`: kinds in turn, each prompt once before any comes again. `signal`: drawn in proportion to how far the rewards of a
    prompt's groups (and of its kind's) differ, so that sampling goes where there is something to learn."""
    split_groups: bool = False
    """With several processes: each samples some members of every group, instead of some groups whole. Survivors are moved to where
    there are fewer after each prune. For groups that take one process too long."""


@dataclass(frozen=True)
class SamplingConfig:
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    """1 is no classifier-free guidance; above 1 a network call counts twice. See `embedded_guidance`."""
    negative_prompt: str = ""
    """A text that guidance leads away from, in training and wherever the run is measured or sampled from; empty: none, as the model's own
    pipeline has it. It counts where a guidance scale is above 1 and guidance is a pair of calls."""
    embedded_guidance: bool = False
    """The model is told the guidance scale and needs no second call. Must be true for FLUX.1-dev where the scale is above 1, and
    false for other models."""
    sampler: Literal["auto", "flow_grpo", "dance", "flow_grpo_wan", "ddim", "cps", "cps_reduced"] = "auto"
    """How a stochastic step adds noise. For flow models Flow-GRPO's SDE (`flow_grpo`, arXiv 2505.05470), DanceGRPO's (`dance`,
    arXiv 2505.07818) or that of flow_grpo's script for Wan (`flow_grpo_wan`); for flow and diffusion models `ddim` (with eta) and `cps` (arXiv 2509.05952; `cps_reduced` has the published
    stand-in for its log-prob). `auto`: flow_grpo for a flow model, ddim for a diffusion model."""
    noise_level: float | None = None
    """How much noise: Flow-GRPO's a, DanceGRPO's and DDIM's eta, CPS's. Empty: the published 0.7 (1 of `flow_grpo_wan`), 0.3, 1 and 0.8."""
    shift: float | None = None
    """Time shift of a flow model's grid; empty: the model's own."""
    same_latent: bool = False
    """All members of a group begin at one noise, and differ by the noise of their steps."""
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which latents are kept for training. They are rounded before their log-probs are taken, so that ratios stay exact."""
    sde_window: Literal["auto", "all", "first", "sliding", "random", "none"] = "auto"
    """Which steps are stochastic; the others follow the ODE. `all`; a window, which alone is trained, at the `first` steps,
    `sliding` (MixGRPO, arXiv 2507.21802) or `random` for each iteration; `none`. `auto` is `all` for an objective that trains
    transitions and `none` for the others."""
    sde_window_size: int = 3
    sde_window_end: int | None = None
    """Windows lie in the steps before this one; empty: all steps that may be trained."""
    sde_window_interval: int = 25
    """Iterations that a sliding window stays before it moves on by one step."""
    train_last_step: bool = False
    """The last step is nearly deterministic (std 0.006 on SD3's grid): its log-prob overflows, so it is not trained."""
    microbatch: int | None = None
    """Rows of a network call. Empty: the fastest for this plan on this device, measured when a run begins and then kept in its
    configuration."""

    @property
    def in_pairs(self) -> bool:
        """Whether a network call is a pair, for classifier-free guidance."""
        return self.guidance_scale > 1 and not self.embedded_guidance


@dataclass(frozen=True)
class PlanConfig:
    preset: Literal["standard", "flash", "posthoc", "none", "sd14", "custom"] = "standard"
    """The paper's plans; `custom` takes the three fields below."""
    group_size: int = 24
    prune: tuple[tuple[int, int], ...] = ()
    """Pairs (step, keep): after the network call of zero-based step, keep that many members of each group."""
    final_keep: int | None = None
    """Keep that many on final rewards."""
    selector: Literal["ovf", "uniform", "top_bottom", "none"] = "ovf"
    adaptive: bool = False
    """Begin with this plan, and after each audit take the prune points and keeps whose expected signal a second is highest, from
    the agreement of previews and the costs that this run measured. The group's size stays, survivors do not become fewer."""


@dataclass(frozen=True)
class PreviewConfig:
    decoder: Literal["full", "tiny"] = "full"
    """What decodes unfinished trajectories: the model's own decoder, or a tiny one (an AutoencoderTiny)."""
    tiny_decoder: str = "shapes-tiny"
    """The built-in models' tiny decoder, a folder, or a hub id: madebyollin/taesd3 for SD 3, taef1 for FLUX,
    taesd for SD 1.x, taesdxl for XL."""
    ode_steps: int = 1
    """Steps of the ODE from here to data. 1 is the projection that costs no network call; each further one costs one."""
    probe: bool = False
    """Learn a small network on x0 projections, which ranks at a prune point once its measured agreement is high enough."""
    probe_threshold: float = 0.5
    """Spearman's correlation with final rewards, mean over the last audits, from which on the probe takes over."""


GPU = Literal["h200", "h100", "a100-80gb", "a100-40gb", "l40s", "a6000", "rtx5090", "rtx4090", "rtx3090", "l4"]
"""Cards whose memory and speed `progrpo plan` knows."""

BUILT_IN_REWARDS = (
    "shapes",
    "shapes_strict",
    "shapes_mixed",
    "clipscore",
    "pickscore",
    "hpsv2",
    "imagereward",
    "aesthetic",
    "ocr",
    "geneval",
    "geneval_flow_grpo",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "nsfw",
    "vlm",
)


@dataclass(frozen=True)
class RewardTerm:
    """One reward. As a text `NAME` or `WEIGHT*NAME`, or as an object of these fields."""

    name: str
    """Built in (docs/rewards.md says what each is), or `module:function` (or a class) of your own."""
    weight: float = 1.0
    """In the sum; a negative one turns a reward into a penalty."""
    needs: str = ""
    """The name of a reward before it: where that one is below `at_least`, this one counts as 0."""
    at_least: float = 0.5
    model: str = ""
    """Another model than the reward's own: a hub id, a folder, or the name that a server knows."""
    url: str = ""
    """Of a `progrpo serve-reward` that scores instead of this process; of `vlm`, its OpenAI-compatible server."""
    device: str = "auto"
    """Of its network, by torch's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int | None = None
    """Pictures at once. Empty: 16 for a network or a server, all for a function."""
    retries: int = 2
    """Times that a failed call is tried again, after 1, 2, 4, ... seconds; what then fails is missing, picture by picture."""
    timeout: float | None = None
    """Seconds that a call may take. Empty: no limit, 60 for an answer of a server."""
    processes: int = 0
    """Score in so many processes of their own, each with the reward loaded: for rewards whose time goes into Python. 0: in this one."""
    cache: str = ""
    """A folder in which scores are kept by picture and prompt, for judges that cost money; empty: none."""
    from_python: bool = False
    """Written by `progrpo.train`: the reward was given as an object, of which this is the name."""

    @classmethod
    def from_text(cls, text: str) -> RewardTerm:
        """`pickscore`, `0.5*ocr`, or a JSON object of the fields."""
        if text.lstrip().startswith("{"):
            try:
                data = _from_json(text)
            except ValueError as error:
                raise ValueError(f"reward.terms: {quoted(text)} is not JSON: {error}") from None
            term = _read_fields(cls, data, "reward.terms.")
            assert isinstance(term, cls)
            return term
        weight, star, name = text.rpartition("*")
        try:
            return cls(name.strip(), float(weight) if star else 1.0)
        except ValueError:
            raise ValueError(
                f"reward.terms: the weight in {quoted(text)} is no number; write NAME or WEIGHT*NAME, as in 0.5*ocr"
            ) from None

    def to_text(self) -> str:
        """As `from_text` reads it."""
        if replace(self, from_python=False) == RewardTerm(self.name, self.weight):
            return self.name if self.weight == 1 else f"{self.weight:g}*{self.name}"
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default})


@dataclass(frozen=True)
class RewardConfig:
    terms: tuple[RewardTerm, ...] = (RewardTerm("shapes"),)
    """What is rewarded: one reward, or the weighted sum of several. Of the built-in verifier: `shapes` (graded), `shapes_strict` (1 where all is right, else 0)
    and `shapes_mixed` (their mean). For any prompts: clipscore, pickscore, hpsv2, imagereward, aesthetic, ocr, geneval, geneval_flow_grpo,
    jpeg_compressibility, jpeg_incompressibility, nsfw, vlm, or `module:function`. Each is NAME, WEIGHT*NAME or a JSON object: docs/rewards.md."""
    frames: int = 4
    """Of a video, evenly spaced with the first and the last, that a reward of pictures scores; the video's score is their mean. 1: the
    middle one. A function of yours with `video = True` is given all."""
    quorum: float = 0.5
    """A group of which a smaller share of the survivors has a score is skipped; at least two members are needed always."""
    max_missing: float = 0.5
    """The run stops, with the last error, when a larger share of an iteration's pictures or scores is missing."""
    waves: int = 1
    """In so many parts an iteration's prompts are sampled. While pictures of one wave are scored, the next is sampled: for rewards
    that are slow and busy elsewhere (a server, another device, other processes)."""


@dataclass(frozen=True)
class GRPOConfig:
    clip_range: float | None = None
    """On ratios of mean-over-dims log-probs, so it belongs to a latent size: 1e-4 at 16x64x64 is 3.2e-3 at 8x16x16. Empty: what
    was published with the sampler, or with the guarded ratio, for this model's latents."""
    adv_clip_max: float = 5.0
    ratio: Literal["plain", "guard"] = "plain"
    """guard: GRPO-Guard's normalised ratio (arXiv 2510.22319), whose clip range is smaller."""
    step_weights: Literal["equal", "noise", "inverse_h"] = "equal"
    """Weigh steps by their std (TempFlow-GRPO, arXiv 2508.04324) or by 1 over their length (GRPO-Guard); mean 1."""
    kl_beta: float = 0.0
    kl_form: Literal["exact", "flow_grpo", "latent", "velocity"] = "exact"
    """exact: 2 s^2 h below the squared distance of means; flow_grpo: 2 s^2, and its betas are about ten times larger. latent and
    velocity: the plain mean square distance of the steps' means, or of the network's velocities."""


@dataclass(frozen=True)
class NFTConfig:
    draws: int = 4
    """Noise levels a trajectory that are trained."""
    time_fraction: float = 0.99
    """They lie in this share of the sampling grid, from its noisy end."""
    beta: float = 1.0
    """How far the positive and the negative policy lie from the old one."""
    adv_clip_max: float = 5.0
    kl_beta: float = 1e-4
    """On the mean square distance of velocities to the reference."""


@dataclass(frozen=True)
class AWMConfig:
    draws: int = 6
    """Noise levels a trajectory that are trained."""
    time_fraction: float = 0.9
    """They lie in this share of the sampling grid, from its noisy end."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """The flow-matching loss by its noise level t, or a root of it times t. ghuber is the authors' and Flow-Factory's."""
    huber_power: float = 0.25
    """The power of ghuber alone: t (loss ** power) / power. huber is half of it at the power 0.5."""
    clip_range: float = 1.0
    adv_clip_max: float = 1.0
    """Flow-Factory's; the authors' is 5, with an `adv_scale` of 0.2."""
    adv_scale: float = 1.0
    """Clipped advantages are multiplied by it."""
    kl_beta: float = 1e-4
    """On the mean square distance of velocities to the reference."""
    average_beta: float = 1.0
    """The same to an average of the weights over time."""
    average_ramp: float = 3e-4
    """The average's decay is min(average_ramp n, average_limit) after the n-th iteration. Flow-Factory's; the authors' is 0.001."""
    average_limit: float = 0.3


@dataclass(frozen=True)
class DGPOConfig:
    draws: int = 4
    """Noise levels a trajectory that are trained; a group shares them and its noise."""
    time_fraction: float = 0.6
    """They lie in this share of the sampling grid, from its noisy end."""
    dpo_beta: float = 100.0
    clip_range: float = 0.05
    """How far the flow-matching loss may go from that of an average of the weights over time."""
    adv_clip_max: float = 5.0
    kl_beta: float = 1e-3
    """On the mean square distance of velocities to the reference."""


@dataclass(frozen=True)
class ObjectiveConfig:
    name: Literal["grpo", "nft", "awm", "dgpo"] = "grpo"
    """What to learn from rewards; its own settings are the part of that name, the others are not read."""
    advantage: Literal["group", "batch", "gdpo"] = "group"
    """Divide by the std of the survivors of the group (the paper's) or of the whole batch (flow_grpo's global_std). `gdpo`: each reward
    for itself by its group's, then their weighted sum by the whole batch's (arXiv 2601.05242), so that no reward drowns another."""
    baseline: Literal["survivors", "group"] = "survivors"
    """Take mean and std over the survivors (the paper's), or over the full group where its final rewards exist (post-hoc)."""
    adv_eps: float = 1e-4
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """GRPO on the SDE's steps (Flow-GRPO, arXiv 2505.05470)."""
    nft: NFTConfig = field(default_factory=NFTConfig)
    """DiffusionNFT (arXiv 2509.16117)."""
    awm: AWMConfig = field(default_factory=AWMConfig)
    """Advantage weighted matching (arXiv 2509.25050). Defaults are Flow-Factory's for SD3.5 but for the weighting; recipe sd35m-awm has the authors'."""
    dgpo: DGPOConfig = field(default_factory=DGPOConfig)
    """Direct group preference optimisation (arXiv 2510.08425)."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's two averages of each weight in 8 bits (arXiv 2110.02861) where a parameter has 4096 numbers or more: a quarter
    of the memory, other figures. It needs the extra `lean`."""
    lr: float = 1e-3
    warmup: int = 0
    """Iterations over which the rate rises to `lr`, in equal steps."""
    decay: float = 0.0
    """Share of the run's iterations, at its end, over which the rate falls linearly towards 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    updates_per_rollout: int = 1
    microbatch: int | None = None
    """Items of a forward and backward pass at most; empty: measured, as that of sampling."""
    reuse_rollout: bool = False
    """GRPO: the first update goes back through the graphs of what sampling computed, without a forward pass of its own (LeanGRPO,
    arXiv 2609.03528). Graphs of everyone who lived at a trained step are held until then, also of the pruned: for plans that prune
    few, and models that fit."""
    ema_decay: float = 0.0
    """Above 0, evaluation and the saved LoRA use an average of the weights."""


@dataclass(frozen=True)
class AuditConfig:
    every: int = 5
    """Every n-th iteration one group runs unpruned, is decoded at every step and is never trained on; 0: never."""


@dataclass(frozen=True)
class EvalConfig:
    prompts: str = "shapes"
    """`shapes` (the built-in test split), a prompt file, or `dataset:NAME` (its split `test`, else its `train`)."""
    column: str = "prompt"
    """As that of `prompts`."""
    pictures: int = 512
    every: int = 0
    """Evaluate every n iterations on the validation prompts; before and after always happen, on the test prompts."""
    rewards: tuple[RewardTerm, ...] = ()
    """Held-out rewards, which are measured beside the trained one and never trained on."""
    best_by: str = ""
    """Of `keep_best`: the held-out reward (of `rewards`) by which the best is chosen; empty: the trained reward."""
    keep_best: bool = False
    """At the end, measure and save the weights that had the highest mean reward on the validation prompts, not the last. Prompt
    files have no splits: with one, the choice is made on the prompts that it is then measured on, which flatters it."""
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    seed: int = 1234


@dataclass(frozen=True)
class WatchConfig:
    """What a run looks out for. A self-check that fails stops it with a diagnosis; 0 turns one off."""

    max_skipped: float = 0.2
    """An update whose loss or gradient is not finite is skipped. The run stops when more than this share of the last 20 were."""
    flat_iterations: int = 10
    """Iterations in a row in which no group's rewards differ."""
    still_iterations: int = 5
    """Iterations in a row in which no trained weight moves, though there is something to learn."""
    lost_agreement: float = 0.25
    """Previews have collapsed when their agreement in the last five audits is below this share of the best five."""
    hacking: Literal["off", "warn", "stop"] = "warn"
    """When the trained reward rises at an evaluation on the way, and the judge or a held-out reward falls, or pictures become much
    sharper, blander or more alike, or the model goes further from its reference than `max_kl`: say so, or also end training there, as if
    it were done, when it is seen twice in a row."""
    max_kl: float = 1.0
    """Mean square distance of the network's velocities to the reference's (latents have a variance of about 1), measured at evaluations on the way."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 5
    keep: int = 2


@dataclass(frozen=True)
class Config:
    recipe: str = "custom"
    """A label for folders and reports: the recipe that this began as."""
    seed: int = 0
    iterations: int = 20
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# --- to JSON and back -------------------------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = _as_data(config)
    return data


def _as_data(value: Any) -> Any:
    """Dataclasses as dicts, and all else as it is: unlike `asdict`, which copies whatever Python code has put there."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_data(getattr(value, f.name)) for f in fields(value)}
    return type(value)(map(_as_data, value)) if type(value) in (tuple, list) else value


def config_to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def config_from_json(text: str, of_run: bool = False) -> Config:
    """A configuration file's, or a run's own config.json, in which every field was written that there was then."""
    try:
        data = _from_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    config = from_dict(data)
    return _as_it_was(config, data) if of_run else config


def _as_it_was(config: Config, data: Mapping[str, Any]) -> Config:
    """With what a run did before there was a field for it, where its default is another."""
    if "step_ends" in data.get("model", {}):
        return config
    return replace(config, model=replace(config.model, step_ends="next"))


def _from_json(text: str) -> Any:
    """ValueError also for what is JSON and yet no configuration: a field given twice, lists of lists without end."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists or objects in one another without end") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in data if names.count(name) > 1)
        raise ValueError(f"{named(twice)} is given twice; leave one out")
    return data


def from_dict(data: Mapping[str, Any]) -> Config:
    """The configuration that JSON data describe; fields that are not there keep their defaults.

    ValueError on an unknown field, with the nearest right name, and on a value of another type.
    """
    config = _read_fields(Config, data, "")
    assert isinstance(config, Config)
    return config


def field_paths(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every field as the command line and the messages name it: `seed`, `sampling.noise_level`, ..."""
    hints = get_type_hints(kind)
    nested = [field_paths(hints[f.name], f"{prefix}{f.name}.") for f in fields(kind) if is_dataclass(hints[f.name])]
    own = [prefix + f.name for f in fields(kind) if not is_dataclass(hints[f.name])]
    return own + [path for paths in nested for path in paths]


def _read_fields(kind: Any, data: Any, prefix: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(
            f"{prefix.rstrip('.') or 'a configuration'} must be an object of named fields, not {quoted(data)}"
        )
    all_hints = get_type_hints(kind)  # once: it compiles every annotation anew
    hints = {f.name: all_hints[f.name] for f in fields(kind)}
    for name in data:
        if name not in hints:
            close = _meant(kind, prefix, name, hints) if isinstance(name, str) else ""
            raise ValueError(f"{prefix}{named(name)} is not a field{close}")
    lacking = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    for name in lacking:
        if name not in data:
            raise ValueError(f"{prefix}{name} is missing; every {kind.__name__} needs one")
    return kind(**{name: _read(hints[name], value, prefix + name) for name, value in data.items()})


def _meant(kind: Any, prefix: str, name: str, hints: Iterable[str]) -> str:
    if kind is RewardTerm:  # one of a list: its fields are no options of the command line
        return nearest(name, hints) or f"; a reward has {', '.join(hints)}"
    return nearest(prefix + name, [*(prefix + hint for hint in hints), *field_paths()])


def _read(kind: Any, value: Any, path: str) -> Any:
    """A JSON value as the field type `kind`: a list becomes a tuple and a whole number a float where that is asked."""
    if kind is RewardTerm and isinstance(value, str):
        return RewardTerm.from_text(value)
    if is_dataclass(kind):
        return _read_fields(kind, value, path + ".")
    choices = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return None if value is None else _read(_of_shape(choices, value), value, path)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = (choices[0],) * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            return tuple(_read(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if isinstance(value, int) and abs(value) >= _HUGE:
        raise ValueError(f"{path} must be below 2**63, not {quoted(value)}")
    if kind is float and _is_plain(int, value):
        return float(value)
    if kind is str and isinstance(value, str) and not (len(value) <= _LONG and is_one_line(value)):
        raise ValueError(f"{path} must be a text of one line, {_LONG} characters at most, not {quoted(value)}")
    if value in choices if get_origin(kind) is Literal else _is_plain(kind, value):
        return value
    raise ValueError(f"{path} must be {_type_in_words(kind)}, not {quoted(value)}")


def _of_shape(choices: Sequence[Any], value: Any) -> Any:
    """Which of a union's types a value that is not empty is read as: a list as its list, if it has one."""
    kinds = [kind for kind in choices if kind is not types.NoneType]
    alike = [kind for kind in kinds if (get_origin(kind) is tuple) == isinstance(value, list | tuple)]
    return (alike or kinds)[0]


_HUGE = 2**63  # from here on whole numbers do not fit torch's
_LONG = 4096  # the longest path of most systems


def _is_plain(kind: Any, value: Any) -> bool:
    return get_origin(kind) is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return "a list" if items[-1] is Ellipsis else f"a list of {len(items)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


# --- checks -----------------------------------------------------------------------------------------------------------

_Rule = tuple[Callable[[Any], object], str]  # what a right value makes true, and what the field must be, in words


def _at_least(low: float) -> _Rule:
    return lambda v: low <= v < math.inf, f"at least {low}"


def _above(low: float) -> _Rule:
    return lambda v: low < v < math.inf, f"above {low}"


def _between(low: float, high: float) -> _Rule:
    return lambda v: low <= v <= high, f"between {low:,} and {high:,}"


def _or_empty(rule: _Rule, words: str = "") -> _Rule:
    is_right, what = rule
    return lambda v: v is None or is_right(v), f"{what}, or empty{words}"


_STEPS = _between(1, 1000)  # diffusion models know a thousand levels, and flow models need no more
_FRACTION: _Rule = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_SHARE: _Rule = (lambda v: 0 < v <= 1, "above 0 and at most 1")
_SIDES: _Rule = (
    lambda v: all(8 <= side <= 4096 for side in (v if isinstance(v, tuple) else (v,))),
    "between 8 and 4,096 pixels, one number for a square or height and width",
)

DEVICES = r"auto|(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,2})?"

_TERM_RULES: dict[str, _Rule] = {
    "name": (
        lambda v: v in BUILT_IN_REWARDS or re.fullmatch(r"\w[\w.-]*:[\w.<>]+", v),
        f"one of {', '.join(BUILT_IN_REWARDS)}, or `module:function`",
    ),
    "weight": (math.isfinite, "a finite number"),
    "at_least": (math.isfinite, "a finite number"),
    "device": (lambda v: re.fullmatch(DEVICES, v), "auto, or a device by torch's name, such as cpu or cuda:0"),
    "batch_size": _or_empty(_at_least(1)),
    "retries": _between(0, 16),
    "timeout": _or_empty((lambda v: 0 < v <= 86400, "above 0 and at most 86400 (a day)"), " for no limit"),
    "processes": _between(0, 256),
}

_RULES: dict[str, _Rule] = {
    "recipe": (lambda v: re.fullmatch(r"\w[\w.-]{0,99}", v), "a name of letters, digits, dots and dashes, 100 at most"),
    "seed": _at_least(0),
    "iterations": _at_least(1),
    "model.revision": (lambda v: re.fullmatch(r"(\w[\w./-]*)?", v), "a branch, tag or commit of the hub, or empty"),
    "model.variant": (lambda v: re.fullmatch(r"([A-Za-z]\w*)?", v), "a name such as fp16, or empty"),
    "model.lora_rank": _between(1, 4096),
    "model.lora_alpha": _at_least(1),
    "model.max_sequence_length": _or_empty(_between(1, 512), " for the model's own"),
    "model.resolution": _or_empty(_SIDES, " for the model's own"),
    "model.frames": _or_empty(_between(1, 1024), " for the model's own"),
    "prompts.per_iteration": _between(1, 100_000),
    "prompts.column": (bool, "the name of a field"),
    "eval.column": (bool, "the name of a field"),
    "sampling.num_inference_steps": _STEPS,
    "sampling.guidance_scale": _at_least(1),
    "sampling.noise_level": (
        lambda v: v is None or 0 < v < math.inf,
        "above 0 (a step without noise has no log-prob to train on), or empty for the published one",
    ),
    "sampling.shift": _or_empty(_above(0), " for the model's own"),
    "sampling.sde_window_size": _at_least(1),
    "sampling.sde_window_interval": _at_least(1),
    "sampling.microbatch": _or_empty(_at_least(1), " to have it measured"),
    "plan.group_size": _between(2, 100_000),
    "preview.ode_steps": _STEPS,
    "preview.probe_threshold": _between(-1, 1),
    "reward.terms": (lambda v: len(v) > 0, "one reward or more"),
    "reward.frames": _between(1, 1024),
    "reward.quorum": _between(0, 1),
    "reward.max_missing": _between(0, 1),
    "reward.waves": _at_least(1),
    "objective.adv_eps": _above(0),
    "objective.grpo.clip_range": _or_empty(_above(0), " for the published one"),
    "objective.grpo.kl_beta": _at_least(0),
    "objective.nft.beta": _above(0),
    "objective.nft.kl_beta": _at_least(0),
    "objective.awm.clip_range": _above(0),
    "objective.awm.kl_beta": _at_least(0),
    "objective.awm.average_beta": _at_least(0),
    "objective.awm.huber_power": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "objective.awm.adv_scale": _above(0),
    "objective.awm.average_ramp": _at_least(0),
    "objective.awm.average_limit": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "objective.dgpo.dpo_beta": _above(0),
    "objective.dgpo.clip_range": _above(0),
    "objective.dgpo.kl_beta": _at_least(0),
    **{f"objective.{name}.adv_clip_max": _above(0) for name in ("grpo", "nft", "awm", "dgpo")},
    **{f"objective.{name}.draws": _at_least(1) for name in ("nft", "awm", "dgpo")},
    **{f"objective.{name}.time_fraction": _SHARE for name in ("nft", "awm", "dgpo")},
    "optim.lr": _above(0),
    "optim.warmup": _at_least(0),
    "optim.decay": _between(0, 1),
    "optim.betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers at least 0 and below 1"),
    "optim.weight_decay": _at_least(0),
    "optim.max_grad_norm": _above(0),
    "optim.updates_per_rollout": _at_least(1),
    "optim.microbatch": _or_empty(_at_least(1), " to have it measured"),
    "optim.ema_decay": _FRACTION,
    "audit.every": _at_least(0),
    "eval.pictures": _between(1, 1_000_000),
    "eval.every": _at_least(0),
    "eval.num_inference_steps": _STEPS,
    "eval.guidance_scale": _at_least(1),
    "eval.seed": _at_least(0),
    "watch.max_skipped": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "watch.flat_iterations": _at_least(0),
    "watch.still_iterations": _at_least(0),
    "watch.lost_agreement": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "watch.max_kl": _at_least(0),
    "checkpoint.every": _at_least(1),
    "checkpoint.keep": _at_least(1),
}


def check(config: Config) -> None:
    """ValueError, one sentence with the field and what it must be, for the first value that a run cannot use."""
    _require_kind(Config, config, "config")
    values = to_dict(config)
    from_dict(values)  # refuses values of another type, which Python code can have put there
    for path, (is_right, words) in _RULES.items():
        value: Any = values
        for name in path.split("."):
            value = value[name]
        if not is_right(value):
            raise ValueError(f"{path} must be {words}, not {quoted(value)}")
    _check_terms("reward.terms", config.reward.terms)
    _check_terms("eval.rewards", config.eval.rewards)
    _check_together(config)


def _require_kind(kind: Any, value: Any, path: str) -> None:
    """That parts are of their classes: a dict in the place of one would be read by JSON's rules, and then fail a run."""
    if not isinstance(value, kind):
        raise ValueError(f"{path} must be a progrpo.config.{kind.__name__}, not {quoted(value)}")
    for name, hint in get_type_hints(kind).items():
        own = f"{path}.{name}".removeprefix("config.")
        if is_dataclass(hint):
            _require_kind(hint, getattr(value, name), own)
        elif RewardTerm in get_args(hint) and isinstance(terms := getattr(value, name), list | tuple):
            for i, term in enumerate(terms):
                _require_kind(RewardTerm, term, f"{own}[{i}]")


def _check_terms(path: str, terms: Sequence[RewardTerm]) -> None:
    for i, term in enumerate(terms):
        for name, (is_right, words) in _TERM_RULES.items():
            if not is_right(getattr(term, name)):
                raise ValueError(f"{path}[{i}].{name} must be {words}, not {quoted(getattr(term, name))}")
        before = [other.name for other in terms[:i]]
        if term.name in before:
            raise ValueError(f"{path} names {term.name} twice; give it one weight")
        if term.needs and term.needs not in before:
            raise ValueError(
                f"{path}[{i}].needs must name a reward that is listed before {term.name}"
                f" ({', '.join(before) or 'there is none'}), not {quoted(term.needs)}"
            )


def _check_together(config: Config) -> None:
    if not any(term.weight for term in config.reward.terms):
        raise ValueError("reward.terms: every weight is 0, so that nothing is rewarded; give one of them another")
    if config.model.lora and config.model.weights != "lora":
        raise ValueError(
            f"model.lora must be empty for model.weights {config.model.weights}: a LoRA is trained further as a LoRA"
        )
    if config.model.quantize != "none" and config.model.weights != "lora":
        raise ValueError(
            f"model.quantize must be none for model.weights {config.model.weights}: weights in 8 bits are frozen, so train a LoRA"
        )
    if config.sampling.negative_prompt:
        _check_negative(config)
    if trains_transitions(config):
        _check_window(config.sampling)
    if config.sampling.sde_window in ("first", "sliding", "random"):
        _check_window_fits(config.sampling)
    if config.sampling.same_latent and not stochastic_steps(config, 0):
        raise ValueError(
            "sampling.same_latent must be false where no step adds noise (sampling.sde_window): a group's members would be equal"
        )
    if config.sampling.sampler in ("ddim", "cps", "cps_reduced"):
        _check_preserving(config)
    if config.optim.reuse_rollout and not trains_transitions(config):
        raise ValueError(
            f"optim.reuse_rollout must be false for objective.name {config.objective.name}: it trains noise levels that were not sampled"
        )
    if config.eval.best_by and config.eval.best_by not in [term.name for term in config.eval.rewards]:
        raise ValueError(
            f"eval.best_by must name one of eval.rewards ({', '.join(term.name for term in config.eval.rewards) or 'there is none'}),"
            f" not {config.eval.best_by!r}"
        )
    if config.eval.keep_best and not config.eval.every:
        raise ValueError("eval.keep_best must have eval.every above 0: the best is that of the evaluations on the way")
    if config.objective.advantage == "gdpo" and config.objective.baseline == "group":
        raise ValueError("objective.baseline must be survivors for objective.advantage gdpo, not group")
    if config.prompts.split_groups:
        _check_split_groups(config)
    if config.model.shard:
        _check_shard(config)
    plan = config.plan
    if plan.preset != "custom" and plan != PlanConfig(
        preset=plan.preset, selector=plan.selector, adaptive=plan.adaptive
    ):
        raise ValueError(
            "plan.group_size, plan.prune and plan.final_keep are read only when plan.preset is custom,"
            f" not {plan.preset}; set it or leave them out"
        )
    if config.sampling.same_latent:
        _check_parted(config)
    for name, asked in (("plan.adaptive", plan.adaptive), ("preview.probe", config.preview.probe)):
        if asked and not config.audit.every:
            raise ValueError(f"{name} must have audit.every above 0: audits measure how well previews rank")
    if (plan.adaptive or resolve_plan(config).prune) and config.objective.baseline == "group":
        raise ValueError(
            "objective.baseline must be survivors under a plan that prunes while sampling: "
            "the pruned members have no final rewards"
        )


def _check_negative(config: Config) -> None:
    if config.sampling.embedded_guidance:
        raise ValueError(
            "sampling.negative_prompt must be empty for sampling.embedded_guidance: a model that is told the guidance scale leads away"
            " from no text"
        )
    if max(config.sampling.guidance_scale, config.eval.guidance_scale) <= 1:
        raise ValueError(
            "sampling.negative_prompt must be empty where sampling.guidance_scale and eval.guidance_scale are 1, since it would have no"
            " effect; raise one of them, or leave it out"
        )


def _check_parted(config: Config) -> None:
    """Where a group's members begin as one, noise must have parted them before the first of them is let go."""
    points, sampling = resolve_plan(config).active_points(), config.sampling
    moves = sampling.sde_window in ("sliding", "random")
    latest = _window_end(sampling) - sampling.sde_window_size if moves else 0
    if points and points[0].step <= latest:
        raise ValueError(
            f"plan.prune must begin after step {latest} for sampling.same_latent, not at step {points[0].step}: a group's members are"
            f" equal until the noise of step {latest}" + (" where the window comes last" if moves else "")
        )


def _check_split_groups(config: Config) -> None:
    """What looks at a whole group while it is sampled or trained cannot have a part of it."""
    whole = {
        "objective.name dgpo": config.objective.name == "dgpo",
        "objective.advantage gdpo": config.objective.advantage == "gdpo",
        "preview.probe": config.preview.probe,
        "optim.reuse_rollout": config.optim.reuse_rollout,
        "reward.waves above 1": config.reward.waves > 1,
    }
    for name, asked in whole.items():
        if asked:
            raise ValueError(f"prompts.split_groups must be false for {name}, which takes groups whole")


def _check_shard(config: Config) -> None:
    """Gathered weights are gone after a call, and all processes make the same calls."""
    gathered = "a block's weights are gathered on the device when it is called, and gone after it"
    whole = "what is kept in 8 bits is not shared out"
    full_in_8_bits = config.optim.name == "adamw_8bit" and config.model.weights == "full"
    against = {
        "model.compile": (config.model.compile, gathered),
        "optim.reuse_rollout": (config.optim.reuse_rollout, gathered),
        "model.offload": (config.model.offload, gathered),
        "model.quantize": (config.model.quantize != "none", whole),
        "optim.name adamw_8bit with model.weights full": (full_in_8_bits, whole),
    }
    for name, (asked, why) in against.items():
        if asked:
            raise ValueError(f"model.shard must be false for {name}: {why}")
    for name, size in (
        ("sampling.microbatch", config.sampling.microbatch),
        ("optim.microbatch", config.optim.microbatch),
    ):
        if size is None:  # it is measured up to where memory ends, and there the others would wait for ever
            raise ValueError(f"{name} must be given for model.shard: processes that share a network cannot measure it")


def _check_preserving(config: Config) -> None:
    sampling = config.sampling
    if (sampling.noise_level or 0) > 1:
        raise ValueError(
            f"sampling.noise_level must be at most 1 for sampling.sampler {sampling.sampler}, not"
            f" {sampling.noise_level}: a step cannot add more noise than there is at its end"
        )
    grpo = config.objective.grpo
    if trains_transitions(config) and grpo.ratio == "guard" and sampling.sampler == "cps_reduced":
        raise ValueError(
            "objective.grpo.ratio guard must go with a sampler whose log-prob is a density, not cps_reduced; take cps"
        )
    if trains_transitions(config) and grpo.kl_form == "flow_grpo":
        raise ValueError(
            "objective.grpo.kl_form flow_grpo must go with a sampler that has a diffusion rate (flow_grpo, dance, flow_grpo_wan), not"
            f" {sampling.sampler}; take exact"
        )


def _check_window(sampling: SamplingConfig) -> None:
    if not _trainable(sampling):
        raise ValueError(
            "sampling.num_inference_steps must be at least 2, not 1, since the last step is not trained"
            " (or set sampling.train_last_step)"
        )
    if sampling.sde_window == "none":
        raise ValueError(
            "sampling.sde_window must leave objective.name grpo stochastic steps to train, so not be none;"
            " set it to auto, or take an objective that needs none: nft, awm, dgpo"
        )


def _check_window_fits(sampling: SamplingConfig) -> None:
    size, end, most = sampling.sde_window_size, _window_end(sampling), _trainable(sampling)
    if end > most:
        raise ValueError(
            f"sampling.sde_window_end must be at most the {most} steps that may be trained, not {end}"
            " (sampling.train_last_step adds the last)"
        )
    if size > end:
        raise ValueError(
            f"sampling.sde_window_size must be at most the {end} steps that a window may lie in, not {size}"
        )


def from_python(config: Config) -> list[str]:
    """The fields that hold what `progrpo.train` was given as objects, which only the same call can give again."""
    names = {
        "model.path": config.model.path,
        "prompts.source": config.prompts.source,
        "eval.prompts": config.eval.prompts,
    }
    objects = [field for field, name in names.items() if name.endswith(FROM_PYTHON)]
    return objects + ["reward.terms"] * any(term.from_python for term in config.reward.terms)


# --- what the fields mean together ------------------------------------------------------------------------------------


def resolve_plan(config: Config) -> Plan:
    """The plan of the run; ValueError if it cannot be run in `sampling.num_inference_steps`."""
    wanted, steps = config.plan, config.sampling.num_inference_steps
    if wanted.preset != "custom":
        return preset(wanted.preset, steps)
    plan = Plan(wanted.group_size, tuple(PrunePoint(*point) for point in wanted.prune), wanted.final_keep)
    plan.validate(steps)
    return plan


def learning_rate(config: Config, iteration: int) -> float:
    """Of a zero-based iteration; never 0, and a function of the run's length where there is a decay."""
    optim, left = config.optim, config.iterations - iteration
    rising = min(1.0, (iteration + 1) / max(1, optim.warmup))
    falling = min(1.0, left / (optim.decay * config.iterations)) if optim.decay else 1.0
    return optim.lr * min(rising, falling)


def microbatch(part: SamplingConfig | OptimConfig) -> int:
    """Its microbatch; 64 where none was given or measured, as of parts that are used without a run."""
    return 64 if part.microbatch is None else part.microbatch


def trains_transitions(config: Config) -> bool:
    """Whether the objective trains stochastic steps, and not only final latents."""
    return config.objective.name == "grpo"


def stochastic_steps(config: Config, iteration: int) -> range:
    """The zero-based steps of an iteration at which sampling adds noise."""
    sampling, kind = config.sampling, config.sampling.sde_window
    if kind == "auto":
        kind = "all" if trains_transitions(config) else "none"
    if kind in ("all", "none"):
        return range(sampling.num_inference_steps if kind == "all" else 0)
    return window(
        kind,
        iteration,
        size=sampling.sde_window_size,
        end=_window_end(sampling),
        interval=sampling.sde_window_interval,
        seed=config.seed,
    )


def trained_steps(config: Config, iteration: int) -> range:
    """The zero-based steps of an iteration whose transitions are trained: stochastic, and not the last."""
    steps = stochastic_steps(config, iteration) if trains_transitions(config) else range(0)
    return range(steps.start, min(steps.stop, _trainable(config.sampling)))


def trained_items(config: Config) -> int:
    """What is trained of a trajectory, in every iteration: transitions, or draws of a noise level."""
    if trains_transitions(config):
        return len(trained_steps(config, 0))
    draws: int = getattr(config.objective, config.objective.name).draws
    return draws


def _trainable(sampling: SamplingConfig) -> int:
    """How many steps, from the first, may be trained: all but the last, unless `train_last_step`."""
    return sampling.num_inference_steps - (0 if sampling.train_last_step else 1)


def _window_end(sampling: SamplingConfig) -> int:
    return _trainable(sampling) if sampling.sde_window_end is None else sampling.sde_window_end
