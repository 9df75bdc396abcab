"""How unfinished trajectories are scored: from what they would become, as a picture, or by a probe without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.frames import still
from progrpo.packing import of_one_shape
from progrpo.policies.base import Policy
from progrpo.rewards.base import Scorer
from progrpo.rollout.denoise import Sampling, call_size
from progrpo.rollout.meter import Meter
from progrpo.rollout.probe import Probe, text_features
from progrpo.types import Condition, Pictures, Prompt, Scores, Trajectories

DECODED = 32  # pictures at once: a decoder needs many times a network call's memory


@dataclass(frozen=True)
class Previewing:
    """The data that a trajectory heads for is reached in `ode_steps`, of which the first costs no network call.

    `tiny` decodes it by the policy's tiny decoder. Where a `probe`'s agreement was measured to reach `threshold`, it ranks
    without any of that.
    """

    ode_steps: int = 1
    tiny: bool = False
    probe: Probe | None = None
    threshold: float = 0.5

    @property
    def by_picture(self) -> Previewing:
        """The same without the probe."""
        return replace(self, probe=None)

    def probed(self, steps: Sequence[int]) -> frozenset[int]:
        """The steps at which the probe ranks."""
        probe = self.probe
        return frozenset(s for s in steps if probe is not None and probe.trusted(s, self.threshold))


def preview(
    policy: Policy,
    reward: Scorer,
    prompts: Sequence[Prompt],
    condition: Condition,
    batch: Trajectories,
    step: int,
    sampling: Sampling,
    how: Previewing,
    meter: Meter,
) -> tuple[Tensor | None, Tensor]:
    """Unfinished trajectories after the network call of `step`: what ranks them, float64 (N,), NaN = missing.

    Before it the pictures that were scored, uint8 (N, H, W, 3); None where a probe ranked.
    """
    if how.probed([step]):
        assert how.probe is not None
        with meter.stage("preview"):
            meter.count(probed=len(batch))
            return None, how.probe.score(step, batch.latent_features[step], text_features(condition), batch.group_N)
    x0 = projected(policy, condition, batch, step, sampling, how.ode_steps, meter)
    with meter.stage("preview"):
        meter.count(previews=len(batch))
        pictures, scores = score(policy, reward, prompts, batch, x0, sampling.microbatch, meter, tiny=how.tiny)
        return pictures.images_NHWC, scores.ranking_N


@torch.no_grad()
def projected(
    policy: Policy,
    condition: Condition,
    batch: Trajectories,
    step: int,
    sampling: Sampling,
    ode_steps: int,
    meter: Meter,
) -> Tensor:
    """The data that the ODE leads to from here, in so many equal parts of the grid that is left: (N, C, H, W).

    The first uses the network's output that the trajectory's own step needs, so one part, the x0 projection, costs no call.
    """
    assert batch.output_NCHW is not None
    process = sampling.process
    x, output = batch.x_NCHW, batch.output_NCHW
    if ode_steps == 1 or not len(batch):
        return process.x0(step, x, output)
    places = torch.linspace(step, process.num_steps, ode_steps + 1, dtype=torch.float64)[:-1]
    levels, prediction = policy.levels_between(process.levels_T1, places).to(x), PREDICTIONS[process.prediction]
    shape = call_size(policy, len(batch), sampling)
    with meter.stage("sample"):
        for k in range(1, ode_steps):
            x = prediction.step(x, output, levels[k - 1], levels[k])
            parts = [
                policy.predict(x[rows], levels.timestep[k], told, sampling.guidance_scale)
                for rows in of_one_shape(len(batch), shape)
                for told in [condition.take(batch.group_N[rows].to(policy.device))]
            ]
            output = torch.cat(parts)[: len(batch)]
        meter.count(nfe=len(batch) * (ode_steps - 1) * sampling.nfe_per_call)
    return prediction.x0(x, output, levels[ode_steps - 1])


def score(
    policy: Policy,
    reward: Scorer,
    prompts: Sequence[Prompt],
    batch: Trajectories,
    x0_NCHW: Tensor,
    microbatch: int,
    meter: Meter,
    tiny: bool = False,
) -> tuple[Pictures, Scores]:
    """Decode and reward: pictures, of videos their middle frames, and what they are worth."""
    pictures = decoded(policy, x0_NCHW, microbatch, tiny)
    scores = reward.score(
        pictures.images_NHWC.numpy(),
        [prompts[g] for g in batch.group_N.tolist()],
        batch.group_N,
        pictures.there_N,
        pictures.fault,
    )
    meter.count(decodes=len(batch), reward_calls=len(batch))
    return replace(pictures, images_NHWC=still(pictures.images_NHWC)), scores


def decoded(policy: Policy, x0_NCHW: Tensor, microbatch: int, tiny: bool = False) -> Pictures:
    """What latents show; not more at once than a decoder has memory for."""
    decode, most = policy.preview if tiny else policy.decode, min(microbatch, DECODED)
    if not len(x0_NCHW):  # of a group that has fewer members than processes; a decoder takes no fewer than one
        return decode(x0_NCHW.new_zeros(1, *x0_NCHW.shape[1:])).take(slice(0))
    # a compiled decoder would be compiled again for another shape
    one_shape = policy.compiled_decoder and not tiny
    parts = of_one_shape(len(x0_NCHW), most) if one_shape else torch.arange(len(x0_NCHW)).split(most)
    made = [decode(x0_NCHW[rows]) for rows in parts]
    return Pictures.cat(made).take(slice(len(x0_NCHW)))
