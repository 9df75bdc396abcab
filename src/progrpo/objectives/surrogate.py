"""The clipped policy-gradient loss of PPO (arXiv 1707.06347) for each row, from log-ratios.

Log-probs are means over dims (see `progrpo.diffusion.gaussian`), so a clip range belongs to a latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(log_ratio_B: Tensor, advantages_B: Tensor, clip_range: float) -> Tensor:
    """The loss max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)), to be minimised, shape (B,), not reduced.

    r is the ratio, per dim, of a step's density under the policy to that under the policy that sampled it. A row gives
    no gradient once r has left the range on the side that its advantage asks for; on the other side it does.
    """
    r = log_ratio_B.exp()
    return torch.maximum(-advantages_B * r, -advantages_B * r.clamp(1 - clip_range, 1 + clip_range))


def outside_clip(log_ratio_B: Tensor, clip_range: float) -> Tensor:
    """The mask (B,) of ratios outside the range, on either side; its mean is the reported clip fraction."""
    return log_ratio_B.expm1().abs() > clip_range


def guarded_log_ratio(log_ratio_B: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319), (B,): (log r + mean_D (mean - old_mean)^2 / (2 std^2))
    std.

    It equals the mean over dims of z (mean - old_mean), where z is the noise that was drawn. Unlike log r, which is
    negative in expectation, it is unbiased, and its spread does not depend on the step's std. Means are (B, ...), std
    is () or (B, 1, ...).
    """
    std_B = std.flatten().expand(len(log_ratio_B))
    moved_B = (mean - old_mean).square().flatten(1).mean(1)
    return (log_ratio_B + moved_B / (2 * std_B.square())) * std_B
