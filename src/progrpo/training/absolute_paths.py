"""Absolute paths in a configuration, so that a run folder can be used from any folder."""

from __future__ import annotations

import os
from dataclasses import replace

from progrpo.config import Config, RewardTerm
from progrpo.policies.decoding import BUILT_IN_DECODER
from progrpo.policies.load import BUILT_IN
from progrpo.prompts.load import DATASET, split_configuration
from progrpo.zoo.worlds import WORLDS


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths in place of relative ones.

    A name of nothing on this disk, such as a built-in's or a hub id, stays as it is.
    """
    return replace(
        config,
        model=replace(
            config.model,
            path=_absolute(config.model.path),
            single_file=_absolute(config.model.single_file),
            lora=_absolute(config.model.lora),
        ),
        prompts=replace(
            config.prompts,
            source=_absolute(config.prompts.source),
            pairs=_absolute(config.prompts.pairs),
        ),
        preview=replace(
            config.preview,
            tiny_decoder=_absolute(config.preview.tiny_decoder),
            latent_reward=_absolute(config.preview.latent_reward),
        ),
        reward=replace(config.reward, terms=tuple(map(_absolute_term, config.reward.terms))),
        eval=replace(
            config.eval,
            prompts=_absolute(config.eval.prompts),
            rewards=tuple(map(_absolute_term, config.eval.rewards)),
        ),
    )


def _absolute_term(term: RewardTerm) -> RewardTerm:
    cache = _absolute_folder(term.cache)
    if term.names_model_of_server:
        return replace(term, cache=cache)
    model = _absolute_folder(term.model) if term.makes_folder else _absolute(term.model)
    return replace(term, model=model, cache=cache)


def _absolute_folder(folder: str) -> str:
    """The absolute path of a folder that may not exist yet; empty for none."""
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


def _absolute(name: str) -> str:
    if name.startswith(DATASET):
        dataset, config = split_configuration(name.removeprefix(DATASET))
        return ":".join([DATASET.rstrip(":"), _absolute(dataset), *filter(None, [config])])
    path = os.path.expanduser(name)
    known = name in ("", *WORLDS, BUILT_IN_DECODER, *BUILT_IN)
    return name if known or not os.path.exists(path) else os.path.abspath(path)
