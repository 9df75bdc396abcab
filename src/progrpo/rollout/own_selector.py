"""A selector of a user's own: its errors and what it returns are checked, so that a mistake is one sentence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from progrpo.messages import raised
from progrpo.rollout.prune import Selection, Selector


@dataclass(frozen=True)
class OwnSelector:
    """The selector that `plan.selector` names. ValueError where it raises, or returns no choice of `keep` members."""

    name: str
    choose: Selector

    def __call__(self, scores_PG: Tensor, keep: int, present_PG: Tensor, seeds_P: Tensor) -> Selection:
        try:
            selection: object = self.choose(scores_PG, keep, present_PG, seeds_P)
        except Exception as error:  # a user's code may raise anything
            raise ValueError(f"plan.selector: {self.name}: {raised(error)}") from error
        if not isinstance(selection, Selection):
            kind = type(selection).__name__
            raise ValueError(f"plan.selector must return a progrpo.rollout.prune.Selection, not {kind}")
        if not _is_choice(selection, keep, present_PG):
            raise ValueError(
                f"plan.selector: {self.name} must choose {keep} different members of each group, or all that are"
                " present where they are fewer: their indices (int64), ascending, in the leading places of"
                " (P, keep), which alone are valid (bool)"
            )
        return selection


def _is_choice(selection: Selection, keep: int, present_PG: Tensor) -> bool:
    """Whether a selection has `keep` members of each group, or all, ascending in its leading places."""
    indices_PK, valid_PK = selection.indices_PK, selection.valid_PK
    if not (isinstance(indices_PK, Tensor) and isinstance(valid_PK, Tensor)):
        return False
    shape, size = (len(present_PG), keep), present_PG.shape[1]
    if indices_PK.shape != shape or valid_PK.shape != shape:
        return False
    if (indices_PK.dtype, valid_PK.dtype) != (torch.int64, torch.bool):
        return False
    count_P = present_PG.sum(1).clamp(max=keep)
    if not torch.equal(valid_PK, torch.arange(keep, device=valid_PK.device) < count_P[:, None]):
        return False
    chosen_PK = indices_PK.where(valid_PK, 0)
    if ((chosen_PK < 0) | (chosen_PK >= size)).any():
        return False
    ascends = ((chosen_PK.diff(dim=1) > 0) | ~valid_PK[:, 1:]).all()
    return bool(ascends and (present_PG.gather(1, chosen_PK) | ~valid_PK).all())
