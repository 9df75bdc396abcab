"""The clipped policy-gradient loss of PPO (arXiv 1707.06347), a value for each row, from ratios in logarithms.

Log-probs are means over dims (see `progrpo.diffusion.gaussian`), so a clip range belongs to a latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(log_ratio_B: Tensor, advantages_B: Tensor, clip_range: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)), a loss to minimise, shape (B,), not reduced.

    r says how much likelier, per dim, the policy makes a step than the policy that sampled it. A row gives no gradient
    once r has left the range on the side its advantage asks for; on the other side it does.
    """
    r = log_ratio_B.exp()
    return torch.maximum(-advantages_B * r, -advantages_B * r.clamp(1 - clip_range, 1 + clip_range))


def outside_clip(log_ratio_B: Tensor, clip_range: float) -> Tensor:
    """Which ratios left the range, on either side, (B,) bool; its mean is the clip fraction that runs report."""
    return log_ratio_B.expm1().abs() > clip_range


def guarded_log_ratio(log_ratio_B: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319), (B,): (log r + mean_D (mean - old_mean)^2 / (2 std^2)) std.

    It is the mean over dims of z (mean - old_mean), z being the noise that was drawn: unbiased, where log r is negative in
    expectation, and with a spread that does not depend on the step's std. Means are (B, ...), std () or (B, 1, ...).
    """
    std_B = std.flatten().expand(len(log_ratio_B))
    moved_B = (mean - old_mean).square().flatten(1).mean(1)
    return (log_ratio_B + moved_B / (2 * std_B.square())) * std_B
