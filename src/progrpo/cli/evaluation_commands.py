"""The command that measures models: on held-out prompts, or on a suite."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from progrpo.cli.command import Command, as_option, check_range, sampling_given
from progrpo.cli.output import format_result, show
from progrpo.messages import named
from progrpo.suites.table import SUITES, SuiteName

if TYPE_CHECKING:
    from progrpo.training.trained_model import ModelChoice

_PICTURES = 512


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure a run or a model on held-out prompts, or several on a suite."""

    target: Annotated[Positional[str], arg(metavar="RUN|MODEL")]
    """A run folder, a built-in model's name, a folder in diffusers' format, or a hub id."""
    others: Annotated[Positional[tuple[str, ...]], arg(metavar="[RUN|MODEL ...]")] = ()
    """With --suite: more of them, to stand in the same tables."""
    suite: SuiteName | None = None
    """A benchmark with its own prompts, pictures per prompt and rewards (docs/evaluation.md)."""
    against: str | None = None
    """With --suite: the model to compare with, on the same noise.
    Without it: the one that the runs began from, none for a model."""
    out: Path | None = None
    """With --suite: the folder of pictures, scores, tables and report; the same command goes on there.
    Without it: evaluations/SUITE."""
    per_prompt: int | None = None
    """With --suite: the number of pictures per prompt. Without it: that of the suite's protocol."""
    limit: int | None = None
    """With --suite: the number of prompts, spread over the kinds. Without it: all."""
    features: str = "auto"
    """With --suite: what says how alike pictures are: `dino`, `pixels`, or a DINOv2 as a folder or a hub id.
    `auto` is `dino`, for `shapes` the built-in detector, and for `words` pixels."""
    lora: Path | None = None
    """For a model: a run folder, or a LoRA folder in diffusers' format."""
    prompts: str | None = None
    """`shapes`, `words`, a prompt file or dataset:NAME, as --eval.prompts of `train`.
    Without it: the run's own, `words` for words-flow, `shapes` for another model.
    With --suite: a copy of its published prompts on this disk, a file or a folder."""
    column: str | None = None
    """The field of rows that holds the text. Without it: the run's own, `prompt` for a model."""
    reward: tuple[str, ...] = ()
    """One reward or several, as `--reward.terms` of `train`.
    Without it: the run's own, `ocr` for words-flow, `shapes` for another model, and with --suite the suite's."""
    split: Literal["test", "validation"] = "test"
    """The split of `shapes`, of `words` or of a dataset: tune on validation, state figures on test."""
    pictures: int | None = None
    """The number of pictures. Without it: 512. A suite has --limit and --per-prompt."""
    num_inference_steps: int | None = None
    """The number of steps. Without it: that of the run's own evaluations, 10 for a model."""
    guidance_scale: float | None = None
    """The guidance scale. Without it: that of the run's own evaluations, 1 (none) for a model."""
    negative_prompt: str | None = None
    """A text from which guidance leads away. Without it: the run's own, none for a model."""
    seed: int | None = None
    """The seed. Without it: that of the run's own evaluations, 1234 for a model and on a suite."""
    revision: str = ""
    """The branch, tag or commit of a model that is a hub id, as --model.revision of `train`."""
    variant: str = ""
    """The variant of a model's weights files, such as fp16, as --model.variant of `train`."""
    json: FlagCreatePairsOff[bool] = False
    """Print JSON."""

    OF_SUITES: ClassVar = ("against", "out", "per_prompt", "limit", "features")
    NOT_OF_SUITES: ClassVar = ("pictures", "column")
    LABELS: ClassVar = {"graded": "reward", "strict": "strict accuracy", "strict_by_kind": "strict accuracy by kind"}
    """The figures that `train` prints under another name than records have."""

    def run(self) -> None:
        check_range(1, 1000, num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        check_range(0, 2**63 - 1, seed=self.seed)
        check_range(1, 1_000_000, pictures=self.pictures, limit=self.limit)
        check_range(1, 100, per_prompt=self.per_prompt)
        self._check_options()
        if self.suite is not None:
            self._run_suite(self.suite)
            return
        from progrpo.training.evaluate_model import EvaluationPrompts, evaluate_model

        prompts = EvaluationPrompts(self.prompts, self.split, self.pictures or _PICTURES, self.column)
        given = sampling_given(self)
        result = evaluate_model(self._choice(self.target), prompts, self.reward, given, self.negative_prompt)
        if result is not None:
            labelled = {self.LABELS.get(name, name): value for name, value in result.items()}
            show(format_result(result if self.json else labelled, self.json), costly=True)

    def _run_suite(self, name: SuiteName) -> None:
        from progrpo.suites.markdown import tables
        from progrpo.training.evaluate_suite import evaluate_suite
        from progrpo.training.suite_inputs import SuiteRequest
        from progrpo.training.trained_model import ModelChoice

        request = SuiteRequest(
            suite=SUITES[name],
            models=[self._choice(target) for target in (self.target, *self.others)],
            out=self.out or Path("evaluations") / name,
            against=None if self.against is None else ModelChoice(self.against),
            prompts=self.prompts,
            split=self.split,
            rewards=self.reward,
            given=sampling_given(self),
            negative_prompt=self.negative_prompt,
            per_prompt=self.per_prompt,
            limit=self.limit,
            features=self.features,
        )
        result = evaluate_suite(request)
        if result is not None:
            shown = json.dumps(result, indent=2) if self.json else f"{tables(result)}\n{request.out / 'report.html'}"
            show(shown, costly=True)

    def _choice(self, target: str) -> ModelChoice:
        from progrpo.training.trained_model import ModelChoice

        return ModelChoice(target, self.lora, self.revision, self.variant)

    def _check_options(self) -> None:
        """ValueError for an option that would have no effect."""
        defaults = {field.name: field.default for field in fields(self)}
        if self.others and not self.suite:
            raise ValueError(
                f"a second model, {named(self.others[0])}, goes with --suite; give that too, or leave it out (a flag,"
                " such as --json, takes no value)"
            )
        for name in self.NOT_OF_SUITES if self.suite else self.OF_SUITES:
            if getattr(self, name) != defaults[name]:
                option = as_option(name)
                instead = "a suite has its own; leave it out" if self.suite else "goes with --suite; give that too"
                raise ValueError(f"{option} {instead}" if not self.suite else f"{option}: {instead}")
        if self.suite and SUITES[self.suite].published and self.split != "test":
            raise ValueError(f"--split: {self.suite} has no other split than test; leave it out")
