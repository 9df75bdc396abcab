"""A selector of one's own: what a built-in one chooses is taken, and a mistake is one sentence."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from progrpo.rollout.own_selector import OwnSelector
from progrpo.rollout.prune import Selection, ovf
from tests.support.grids import SELECTORS

SCORES = torch.tensor([[3.0, 1.0, 2.0, 9.0], [torch.nan, 5.0, 4.0, 6.0], [1.0, 2.0, 0.0, 0.0]])
PRESENT = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
SEEDS = torch.arange(3)


def chosen(change) -> Selection:
    """The choice of three members by a selector whose selection is changed."""
    own = OwnSelector("mine:best", lambda *asked: change(ovf(*asked)))
    return own(SCORES, 3, PRESENT, SEEDS)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("keep", [2, 3, 4])
def test_what_a_built_in_selector_chooses_is_taken(name, keep):
    expected = SELECTORS[name](SCORES, keep, PRESENT, SEEDS)
    selection = OwnSelector("mine:best", SELECTORS[name])(SCORES, keep, PRESENT, SEEDS)
    assert torch.equal(selection.indices_PK, expected.indices_PK)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: Selection(s.indices_PK[:, :2], s.valid_PK[:, :2]),
        lambda s: replace(s, valid_PK=torch.ones_like(s.valid_PK)),
        lambda s: replace(s, valid_PK=s.valid_PK & (torch.arange(3) < 2)),
        lambda s: replace(s, indices_PK=s.indices_PK.flip(1)),
        lambda s: replace(s, indices_PK=torch.zeros_like(s.indices_PK)),
        lambda s: replace(s, indices_PK=s.indices_PK + 9),
        lambda s: replace(s, indices_PK=s.indices_PK - 9),
        lambda s: replace(s, indices_PK=torch.tensor([[0, 1, 2]] * 2 + [[0, 2, 0]])),  # one that is not present
        lambda s: replace(s, indices_PK=s.indices_PK.float()),
        lambda s: replace(s, valid_PK=s.valid_PK.int()),
        lambda s: Selection(s.indices_PK.tolist(), s.valid_PK.tolist()),
    ],
)
def test_what_is_no_choice_of_so_many_is_refused(change):
    with pytest.raises(ValueError, match=r"^plan.selector: mine:best must choose 3 different members of each group"):
        chosen(change)


def test_another_object_and_an_error_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^plan.selector must return a progrpo.*Selection, not Tensor$"):
        chosen(lambda s: s.indices_PK)
    with pytest.raises(ValueError, match=re.escape("plan.selector: mine:best: ")) as refused:
        chosen(lambda s: {"yes": s}["no"])
    assert "KeyError: 'no'" in str(refused.value)
