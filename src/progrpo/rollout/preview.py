"""The scores of unfinished trajectories: by the picture that each would become, or without one, by a probe or a latent
reward head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.frames import still_pictures
from progrpo.packing import fixed_size_batches
from progrpo.policies.base import Policy
from progrpo.rollout.denoise import Denoiser
from progrpo.rollout.meter import Meter
from progrpo.rollout.probe import text_features
from progrpo.rollout.sampler import Sampler
from progrpo.types import Condition, Pictures, Prompt, Scores, Trajectories

DECODED = 32  # pictures at once: a decoder needs many times a network call's memory


def preview(
    sampler: Sampler, prompts: Sequence[Prompt], condition: Condition, batch: Trajectories, step: int, meter: Meter
) -> tuple[Tensor | None, Tensor]:
    """The previews of unfinished trajectories after the network call of `step`: pictures and ranking scores.

    Pictures are uint8 (N, H, W, 3), None where none were decoded. Scores are float64 (N,), NaN where missing.
    """
    if step in sampler.probed_steps:
        assert sampler.probe is not None
        with meter.stage("preview"):
            meter.count(probed=len(batch))
            features = batch.latent_features[step]
            return None, sampler.probe.score(step, features, text_features(condition), batch.group_N)
    settings = sampler.preview_settings
    x0_NCHW = projected(sampler.denoiser(condition), batch, step, settings.ode_steps, meter)
    with meter.stage("preview"):
        if sampler.latent_reward is not None:
            meter.count(probed=len(batch))
            return None, sampler.latent_reward.score(x0_NCHW, [prompts[g] for g in batch.group_N.tolist()])
        meter.count(previews=len(batch))
        pictures, scores = score(sampler, prompts, batch.group_N, x0_NCHW, meter, tiny=settings.decoder == "tiny")
        return pictures.images_NHWC, scores.ranking_N


@torch.no_grad()
def projected(denoiser: Denoiser, batch: Trajectories, step: int, ode_steps: int, meter: Meter) -> Tensor:
    """The data that the ODE leads to from here, in `ode_steps` equal parts of the grid that is left: (N, C, H, W).

    The first part uses the network's output that the trajectory's own step needs, so one part, the x0 projection, costs
    no call.
    """
    assert batch.output_NCHW is not None
    process = denoiser.sampling.process
    x, output = batch.x_NCHW, batch.output_NCHW
    if ode_steps == 1 or not len(batch):
        return process.x0(step, x, output)
    places = torch.linspace(step, process.num_steps, ode_steps + 1, dtype=torch.float64)[:-1]
    levels = denoiser.policy.levels_between(process.levels_T1, places).to(x)
    prediction, size = PREDICTIONS[process.prediction], denoiser.call_size(len(batch))
    with meter.stage("sample"):
        for k in range(1, ode_steps):
            x = prediction.step(x, output, levels[k - 1], levels[k])
            output = denoiser.predict(x, levels.timestep[k], batch.group_N, size)
        meter.count(nfe=len(batch) * (ode_steps - 1) * denoiser.sampling.nfe_per_call)
    return prediction.x0(x, output, levels[ode_steps - 1])


def score(
    sampler: Sampler, prompts: Sequence[Prompt], group_N: Tensor, x0_NCHW: Tensor, meter: Meter, tiny: bool = False
) -> tuple[Pictures, Scores]:
    """The pictures of latents (the middle frames of videos) and their rewards."""
    pictures = decoded(sampler.policy, x0_NCHW, sampler.sampling.microbatch, tiny)
    scores = sampler.reward.score(
        pictures.images_NHWC.numpy(),
        [prompts[g] for g in group_N.tolist()],
        group_N,
        pictures.there_N,
        pictures.fault,
    )
    meter.count(decodes=len(group_N), reward_calls=len(group_N))
    return replace(pictures, images_NHWC=still_pictures(pictures.images_NHWC)), scores


def decoded(policy: Policy, x0_NCHW: Tensor, microbatch: int, tiny: bool = False) -> Pictures:
    """The pictures of latents, decoded in batches that a decoder has memory for."""
    decode, most = policy.preview if tiny else policy.decode, min(microbatch, DECODED)
    if not len(x0_NCHW):  # of a group that has fewer members than processes; a decoder takes no fewer than one
        return decode(x0_NCHW.new_zeros(1, *x0_NCHW.shape[1:])).take(slice(0))
    # a compiled decoder would be compiled again for another shape
    one_shape = policy.compiled_decoder and not tiny
    batches = fixed_size_batches(len(x0_NCHW), most) if one_shape else torch.arange(len(x0_NCHW)).split(most)
    return Pictures.cat([decode(x0_NCHW[rows]) for rows in batches]).take(slice(len(x0_NCHW)))
