"""The inputs of a suite's evaluation: models, prompts, rewards and features, alike in all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from progrpo.config import EvalSettings, RewardTerm
from progrpo.messages import named
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import Component, component_from
from progrpo.suites.fetch import read_published
from progrpo.suites.formats import local_sources, read_suite, spread_over_kinds
from progrpo.suites.results import Grid
from progrpo.suites.table import Suite
from progrpo.training.build import saved_weights, was_trained
from progrpo.training.checkpoints import digest
from progrpo.training.distributed import Ranks
from progrpo.training.equal_inputs import require_same_prompts
from progrpo.training.features import PIXELS, SHAPES, Features, load_features, load_lpips
from progrpo.training.trained_model import ModelChoice, negative_prompt_for, with_given
from progrpo.types import Prompt

_FRAMES = 1  # suites are of pictures


@dataclass(frozen=True)
class SuiteRequest:
    """The suite, the models and the options of an evaluation. None and `auto` are the suite's own.

    `prompts` is a local copy of the published prompts. `given` are the settings of evaluations (`EvalSettings`) to take
    in place of a run's own. `against` is the model to compare with; None: the one that the models began from.
    """

    suite: Suite
    models: Sequence[ModelChoice]
    out: Path
    against: ModelChoice | None = None
    prompts: str | None = None
    split: str = "test"
    rewards: Sequence[str] = ()
    given: Mapping[str, float | None] = field(default_factory=dict)
    negative_prompt: str | None = None
    per_prompt: int | None = None
    limit: int | None = None
    features: str = "auto"

    @property
    def base(self) -> ModelChoice | None:
        """The model to compare with. ValueError where the models began from different ones."""
        if self.against is not None:
            return self.against
        bases = [base for model in self.models if (base := model.base()) is not None]
        if not bases or any(_began_from(base) != _began_from(bases[0]) for base in bases):
            if bases:
                raise ValueError("the runs began from different models; give the one to compare with as --against")
            return None
        return bases[0]

    @property
    def settings(self) -> EvalSettings:
        """The settings of sampling, one for all models: those of the runs. ValueError where they differ.

        The seed is not a run's own but that of all evaluations, so that figures of different runs compare.
        """
        own = [run.eval for model in self.models if (run := model.run_config) is not None] or [EvalSettings()]
        first = replace(own[0], seed=EvalSettings().seed)
        for name, option in (("num_inference_steps", "steps"), ("guidance_scale", "guidance scale")):
            values = {getattr(settings, name) for settings in own}
            if self.given.get(name) is None and len(values) > 1:
                listed = ", ".join(f"{value:g}" for value in sorted(values))
                raise ValueError(
                    f"the runs are evaluated with different numbers of {option} ({listed}); give one as"
                    f" --{name.replace('_', '-')}"
                )
        return with_given(first, self.given)

    @property
    def guide_away_from(self) -> str:
        """The negative prompt, one for all models: the first run's, if no other is given."""
        runs = [run for model in self.models if (run := model.run_config) is not None]
        return negative_prompt_for(runs[0] if runs else None, self.negative_prompt, self.settings.guidance_scale)

    def made_by(self, model: ModelChoice) -> dict[str, object]:
        """The origin of a model's pictures, prompts apart: pictures that differ in it are not put together."""
        config, settings = model.config.model, self.settings
        return {
            "suite": self.suite.name,
            "model": config.path if model.before else model.target,
            "lora": config.lora if model.before else str(model.lora or ""),
            "revision": model.revision or config.revision,
            "resolution": json.loads(json.dumps(config.resolution)),
            "weights": _weights_digest(model),
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "negative_prompt": self.guide_away_from,
            "seed": settings.seed,
        }

    @property
    def base_id(self) -> str | None:
        """A digest of the base, which tells it apart from another."""
        if self.base is None:
            return None
        return hashlib.sha256(json.dumps(self.made_by(self.base)).encode()).hexdigest()

    def draw_alike(self, model: ModelChoice, other: ModelChoice) -> bool:
        """Whether two models are the same by what their pictures are made by."""
        return self.made_by(model) == self.made_by(other)


@dataclass(frozen=True)
class DiversityInputs:
    """The features by which the likeness of pictures is measured, in the main process alone."""

    name: str
    """The name of the features."""
    features: Features | None
    lpips: Features | None
    """LPIPS, measured beside the features of a DINOv2."""

    @property
    def description(self) -> str:
        return (self.name if self.features else "pixels alone") + (", LPIPS" if self.lpips else "")


@dataclass(frozen=True)
class SuiteInputs:
    """The prompts and rewards of an evaluation, alike in all processes, and the features of diversity."""

    grid: Grid
    digest: str
    """A digest of the prompts of the whole suite."""
    of_prompts: int
    """The number of prompts of the whole suite."""
    rewards: Sequence[Component]
    diversity: DiversityInputs
    notes: Sequence[str]


def load_inputs(request: SuiteRequest, ranks: Ranks) -> SuiteInputs:
    """Load all but the models, which come last, since most mistakes show without them."""
    whole, prompt_notes = ranks.from_main(lambda: _read_prompts(request))
    require_same_prompts(ranks, "suite", digest(whole), whole[0])
    prompts = spread_over_kinds(whole, request.limit)
    grid = Grid(prompts, request.per_prompt or request.suite.per_prompt, request.suite.mean_of_kinds)
    rewards, reward_notes = _load_rewards(request, [item.prompt for item in prompts], ranks)
    diversity, diversity_notes = _load_diversity(request, ranks)
    not_measured = request.suite.not_measured
    metric_notes = [f"the published metric of {request.suite.name} is left out: {not_measured}"] if not_measured else []
    notes = [*metric_notes, *prompt_notes, *reward_notes, *diversity_notes]
    return SuiteInputs(grid, digest(whole), len(whole), rewards, diversity, notes)


def _began_from(base: ModelChoice) -> tuple[object, ...]:
    model = base.config.model
    if not base.before:
        return (base.target, base.revision, base.variant)
    return (model.path, model.single_file, model.revision, model.variant, model.lora, model.resolution)


def _read_prompts(request: SuiteRequest) -> tuple[tuple[Prompt, ...], list[str]]:
    """The prompts of the whole suite, and notes on what a local copy lacks."""
    suite = request.suite
    if request.prompts is None:
        return read_published(suite, request.split), []
    if suite.published is None:
        raise ValueError(f"--prompts: those of {suite.name} are part of progrpo; leave it out")
    sources, lacking = local_sources(suite, request.prompts)
    notes = [f"{named(request.prompts)} lacks {', '.join(lacking)} of {suite.name}"] if lacking else []
    return read_suite(suite, sources), notes


def _load_rewards(request: SuiteRequest, prompts: Sequence[Prompt], ranks: Ranks) -> tuple[list[Component], list[str]]:
    """The rewards, and a note on each that is left out. Refusal for one that is needed and cannot be had.

    The main process decides, and has fetched what the others load.
    """
    suite, loaded = request.suite, dict[str, Component]()
    needed = request.rewards or suite.rewards
    terms = [_term(text) for text in (needed if request.rewards else (*suite.rewards, *suite.optional))]
    if twice := [term.name for n, term in enumerate(terms) if term.name in {other.name for other in terms[:n]}]:
        raise ValueError(f"--reward names {twice[0]} twice; name it once")

    def load(term: RewardTerm) -> None:
        component = component_from(term, load_reward(term), _FRAMES)
        component.reward.check(prompts)
        loaded[term.name] = component

    def load_what_there_is() -> list[str]:
        notes = []
        for n, term in enumerate(terms):
            try:
                load(term)
            except Refusal as error:
                if n < len(needed):
                    raise
                notes.append(f"{term.name} is left out: {error}")
        if not loaded:
            raise Refusal(f"no reward can be had for {suite.name}: {notes[0]}; give one as --reward")
        return notes

    notes = ranks.from_main(load_what_there_is)
    names = ranks.from_main(lambda: list(loaded))
    for term in terms if not ranks.is_main else ():
        if term.name in names:
            load(term)
    return [loaded[name] for name in names], notes


def _term(text: str) -> RewardTerm:
    term = RewardTerm.from_text(text)
    if term.weight != 1 or term.needs:
        raise ValueError(f"--reward {named(text)}: a suite gives each reward by itself; leave out weight and needs")
    return term


def _load_diversity(request: SuiteRequest, ranks: Ranks) -> tuple[DiversityInputs, list[str]]:
    """The features that measure diversity, and a note on each part that cannot be had."""
    name, named_by_user = request.features, request.features != "auto"
    if not named_by_user:
        name = request.suite.features
    if name == SHAPES and request.suite.features != SHAPES:
        raise ValueError(f"--features {SHAPES} sees the shapes world alone; give dino, {PIXELS}, or a DINOv2")
    loaded: dict[str, Features] = {}

    def load() -> list[str]:
        notes = []
        try:
            loaded["features"] = load_features(name)
        except Refusal as error:
            if named_by_user:
                raise
            notes.append(f"feature distance and Vendi are left out: {error}; --features {PIXELS} needs no network")
        try:
            if name not in (PIXELS, SHAPES):
                loaded["lpips"] = load_lpips()
        except Refusal as error:
            notes.append(f"LPIPS is left out: {error}")
        return notes

    notes = ranks.from_main(load)
    return DiversityInputs(name, loaded.get("features"), loaded.get("lpips")), notes


def _weights_digest(model: ModelChoice) -> str:
    """A digest of the trained weights that a run or a LoRA has on this disk; empty where it has none of its own."""
    if model.before:
        return ""
    run = Path(model.target) if was_trained(Path(model.target)) else model.lora
    if run is None:
        return ""
    saved = saved_weights(run) if was_trained(run) else run
    sha256 = hashlib.sha256()
    for path in sorted(saved.rglob("*.safetensors") if saved.is_dir() else [saved] if saved.is_file() else []):
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()
