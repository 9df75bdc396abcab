"""The model of a command that looks at one: by name, or as a run has trained it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from progrpo.config import Config, EvalSettings, ModelSettings, RewardSettings, RewardTerm
from progrpo.messages import named
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.load import BUILT_IN
from progrpo.prompts.load import ignored_column_note
from progrpo.recipes import load_recipe
from progrpo.rollout.sampling import Sampling, ode
from progrpo.suites.table import SUITES
from progrpo.tracking.console import Console
from progrpo.training.build import policy_from, saved_weights, was_trained
from progrpo.training.distributed import Ranks
from progrpo.training.equal_inputs import require_same_model
from progrpo.types import FROM_PYTHON, Prompt

_PICTURES, _VIDEOS = 64, 1  # of a network call, where no run has chosen: a video is as large as a batch of pictures


@dataclass(frozen=True)
class ModelChoice:
    """A model by name, folder or hub id, or a run folder, whose trained weights are meant.

    `lora` is a LoRA's folder, or a run whose trained weights a model gets. With `before` a run's model is meant as it
    was before training.
    """

    target: str
    lora: Path | None = None
    revision: str = ""
    variant: str = ""
    before: bool = False

    @property
    def name(self) -> str:
        """The name of what is meant, for people."""
        return f"{self.target} + {self.lora}" if self.lora is not None else self.target

    def base(self) -> ModelChoice | None:
        """The model that a run began from, or that gets a LoRA; None for a model alone."""
        if was_trained(Path(self.target)):
            return replace(self, before=True)
        return None if self.lora is None else replace(self, lora=None)

    @property
    def run_config(self) -> Config | None:
        """The configuration of the run that is meant; None for a model alone, or with a LoRA that is no run's."""
        folders = [folder for folder in (Path(self.target), self.lora) if folder is not None and was_trained(folder)]
        return load_recipe(str(folders[0])) if folders else None

    @property
    def config(self) -> Config:
        """The configuration of the run that is meant, or the default one for a model.

        A built-in model is measured on its own world, by the reward of that world's suite.
        """
        run = self.run_config
        if run is not None:
            return run
        model = ModelSettings(path=self.target)
        if self.target not in BUILT_IN:
            return Config(model=model)
        suite = SUITES[BUILT_IN[self.target]]
        reward = RewardSettings(tuple(map(RewardTerm, suite.rewards)))
        return Config(model=model, reward=reward, eval=EvalSettings(prompts=suite.name))

    def load(self, ranks: Ranks, guide_away_from: str = "") -> Policy:
        """The policy, alike in all processes.

        ValueError for a run that is to take what another trained, or another revision or variant of its model.
        """
        settings, lora = self._settings_and_lora()
        context = PolicyContext(device=ranks.device, world_size=ranks.world, guide_away_from=guide_away_from)
        policy = policy_from(settings, context, lora)
        require_same_model(ranks, policy)
        ranks.before_waiting = policy.drain_peer_calls
        return policy

    def _settings_and_lora(self) -> tuple[ModelSettings, Path | None]:
        own = (self.run_config or Config()).model
        # what a run saved includes where it began, and is for the model without quantization
        settings = replace(own, lora="", quantize="none", text_quantize="none")
        if not was_trained(Path(self.target)):
            lora = saved_weights(self.lora) if self.lora is not None and was_trained(self.lora) else self.lora
            named_model = replace(settings, path=self.target, single_file="")  # a run's file is not of this model
            return replace(named_model, revision=self.revision, variant=self.variant), lora
        if self.lora is not None:
            raise ValueError(
                f"--lora: {named(self.target)} is a run, with weights of its own; give its model, or leave --lora out"
            )
        if self.revision or self.variant:
            raise ValueError(
                f"--{'revision' if self.revision else 'variant'}: {named(self.target)} is a run, whose model's is in"
                " its config.json; leave it out"
            )
        if settings.path.endswith(FROM_PYTHON):
            raise ValueError(
                f"{named(self.target)} trained {settings.path}, which no name loads; name the model it was: progrpo"
                f" sample MODEL --lora {named(self.target)}"
            )
        if self.before:
            return replace(settings, lora=own.lora), None
        return settings, saved_weights(Path(self.target))


def with_given(settings: EvalSettings, given: Mapping[str, Any]) -> EvalSettings:
    """The settings of a run's evaluations, with the values that a command was given by field; None is not given."""
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def negative_prompt_for(run: Config | None, given: str | None, guidance_scale: float) -> str:
    """The text from which guidance leads away: the run's, if no other is given. ValueError for one without effect."""
    if given and guidance_scale == 1:
        raise ValueError(
            "--negative-prompt has no effect at a guidance scale of 1; give --guidance-scale above 1, or leave it out"
        )
    if given is not None:
        return given
    return run.sampling.negative_prompt if run is not None and guidance_scale > 1 else ""


def ode_by(policy: Policy, settings: EvalSettings) -> Sampling:
    """Deterministic sampling by these settings, where no run has chosen a microbatch."""
    microbatch = _PICTURES if len(policy.latent_shape) == 3 else _VIDEOS
    return ode(policy, settings.num_inference_steps, settings.guidance_scale, microbatch)


def warn_of_cuts(policy: Policy, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Warn of what the policy ignores and cuts: on standard error, since results go to standard output."""
    cuts = policy.truncation([prompt.text for prompt in prompts]).in_words()
    console = Console(0, enabled=ranks.is_main, file=sys.stderr)
    for warning in filter(None, (policy.ignored, cuts, ignored_column_note(prompts))):
        console.warn(warning)
