"""The clipped policy-gradient loss of PPO (arXiv 1707.06347), a value for each row.

Log-probs are means over dims (see `progrpo.diffusion.gaussian`), so a clip range belongs to a latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ratio(log_prob_B: Tensor, old_log_prob_B: Tensor) -> Tensor:
    """How much likelier, per dim, the policy makes the step than the policy that sampled it: exp of the difference."""
    return torch.exp(log_prob_B - old_log_prob_B)


def clipped_surrogate(log_prob_B: Tensor, old_log_prob_B: Tensor, advantages_B: Tensor, clip_range: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)), a loss to minimise, shape (B,), not reduced.

    A row gives no gradient once r has left the range on the side its advantage asks for; on the other side it does.
    """
    r = ratio(log_prob_B, old_log_prob_B)
    return torch.maximum(-advantages_B * r, -advantages_B * r.clamp(1 - clip_range, 1 + clip_range))


def outside_clip(log_prob_B: Tensor, old_log_prob_B: Tensor, clip_range: float) -> Tensor:
    """Which ratios left the range, on either side, (B,) bool; its mean is the clip fraction that runs report."""
    return (ratio(log_prob_B, old_log_prob_B) - 1).abs() > clip_range
