"""DPO's and SFT's losses on a policy of two weights, against the published formula and its autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from progrpo.checks import check
from progrpo.config import from_dict
from progrpo.objectives.dpo import DPO
from progrpo.objectives.forward_process import Draws, NoisedLatents
from progrpo.objectives.settings import DPOSettings, SFTSettings
from progrpo.objectives.sft import SFT
from progrpo.training.update import Packing
from tests.support.linear import LinearDiffusionPolicy, shift

DRAWS, FRACTION, BETA = 3, 0.7, 3.0
ADVANTAGES = (1.0, 0.0, -1.0, -0.5, 0.5)
PAIRS = ((0, 2, 1.0), (4, 3, 0.5))
"""Winner, loser and weight."""


def dpo(**settings):
    return DPO(DPOSettings(draws=DRAWS, time_fraction=FRACTION, **{"beta": BETA, **settings}))


@pytest.fixture(params=["flow", "diffusion"])
def policy(request, linear_policy):
    chosen = linear_policy if request.param == "flow" else LinearDiffusionPolicy(0.3, -0.4, "epsilon")
    if request.param == "diffusion":
        chosen.named_weights.snapshot("reference")
    shift(chosen, a=-0.15, b=0.1)
    return chosen


@pytest.fixture
def experience(policy, linear_experience):
    process = policy.process("ddim", 0.0) if isinstance(policy, LinearDiffusionPolicy) else None
    whole = linear_experience(policy, ADVANTAGES, process=process, steps=())
    return whole.take(torch.tensor([0, 2, 3, 4]))


def published_loss(policy, experience, smoothing=0.0):
    """The sum over pairs and draws of -log sigmoid(-beta ((l_w - ref_w) - (l_l - ref_l))), with its graph."""
    total, count = 0.0, len(experience)
    rows = {0: 0, 2: 1, 3: 2, 4: 3}
    for winner, loser, weight in PAIRS:
        for d in range(DRAWS):
            gains = []
            for n in (winner, loser):
                item = torch.tensor([d * count + rows[n]])
                at = NoisedLatents.gather(policy, experience, item, Draws(DRAWS, FRACTION, shared=True))
                gains.append(at.error(at.predict(policy)) - at.error(at.predict_with(policy, "reference")))
            logit = -BETA * (gains[0] - gains[1])
            total = total - weight * ((1 - smoothing) * F.logsigmoid(logit) + smoothing * F.logsigmoid(-logit)).sum()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_and_the_reported_loss_are_the_published_ones(policy, experience, updates, smoothing):
    objective = dpo(label_smoothing=smoothing)
    prepared = objective.prepare(policy, experience, 64, updates)
    assert (prepared.prepared_ND is None) == (updates == 1)
    loss = objective.loss(policy, prepared, torch.arange(4 * DRAWS))
    expected = published_loss(policy, experience, smoothing)
    assert loss.sums["dpo_loss"].item() == pytest.approx(2 * expected.item())  # both members of a pair report it
    weights = [policy.a, policy.b]
    actual = torch.stack(torch.autograd.grad(loss.total, weights))
    torch.testing.assert_close(actual, 2 * torch.stack(torch.autograd.grad(expected, weights)))


def test_both_members_get_the_same_levels_and_noise(policy, experience):
    at = NoisedLatents.gather(policy, experience, torch.arange(4 * DRAWS), dpo()._draws)
    winner, loser = (at.rows == 0).nonzero().flatten(), (at.rows == 1).nonzero().flatten()
    assert torch.equal(at.levels.sigma[winner], at.levels.sigma[loser])
    torch.testing.assert_close(
        at.x[winner] - at.x[loser],
        at.levels.alpha[winner].reshape(-1, 1, 1, 1) * (at.x0[winner] - at.x0[loser]),
        rtol=1e-9,
        atol=1e-12,
    )


def test_at_the_reference_nothing_is_decided(linear_policy, linear_experience):
    experience = linear_experience(linear_policy, ADVANTAGES, steps=()).take(torch.tensor([0, 2]))
    objective = dpo()
    loss = objective.loss(linear_policy, objective.prepare(linear_policy, experience, 8, 1), torch.arange(2 * DRAWS))
    assert (loss.sums["dpo_loss"] / (2 * DRAWS)).item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_a_step_favours_the_winner(policy, experience):
    objective = dpo(kl_beta=0.0)

    def report():
        return objective.loss(policy, objective.prepare(policy, experience, 64, 1), torch.arange(4 * DRAWS))

    before = report()
    gradient = torch.autograd.grad(before.total, [policy.a, policy.b])
    shift(policy, *(-0.01 * g.item() for g in gradient))
    assert report().sums["dpo_loss"] < before.sums["dpo_loss"]


def test_pairs_stay_together_in_microbatches(policy, experience):
    prepared = dpo().prepare(policy, experience, 2, 1)
    batches = Packing(2).batches(prepared, DRAWS)
    whole = dpo().loss(policy, dpo().prepare(policy, experience, 64, 1), torch.arange(4 * DRAWS))
    parts = [dpo().loss(policy, prepared, items) for items in batches]
    assert max(map(len, batches)) == 2
    assert sum(p.sums["dpo_loss"].item() for p in parts) == pytest.approx(whole.sums["dpo_loss"].item())


def test_sft_is_the_pretraining_loss_of_what_was_chosen(policy, experience):
    objective = SFT(SFTSettings(draws=DRAWS, time_fraction=FRACTION, kl_beta=0.0))
    items = torch.arange(4 * DRAWS)
    loss = objective.loss(policy, objective.prepare(policy, experience, 64, 1), items)
    at = NoisedLatents.gather(policy, experience, items, Draws(DRAWS, FRACTION))
    weight = at.advantages.clamp(min=0)
    assert set(weight.tolist()) == {0.0, 0.5, 1.0}
    torch.testing.assert_close(loss.loss_B, weight * at.error(at.predict(policy)))


# --- settings ---------------------------------------------------------------------------------------------------------


def refusal(**sections):
    with pytest.raises(ValueError) as error:
        check(from_dict(sections))
    return str(error.value)


def test_dpo_asks_for_groups_of_two():
    dpo_ = {"name": "dpo"}
    assert refusal(objective=dpo_).startswith(
        "plan must keep 2 members of a group for objective.name dpo, not be one of"
    )
    follows = {"preset": "auto"}
    assert "not be one that follows audits" in refusal(objective=dpo_, plan=follows, audit={"every": 5})
    check(from_dict({"objective": dpo_, "plan": {"preset": "custom", "group_size": 8, "final_keep": 2}}))
    check(from_dict({"objective": dpo_, "prompts": {"pairs": "pairs.jsonl"}}))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"objective": {"name": "grpo"}}, "objective.name must be one that learns from final pictures"),
        (
            {"objective": {"name": "sft", "advantage": "gdpo"}},
            "prompts.pairs must be empty for objective.advantage gdpo",
        ),
        ({"objective": {"name": "dpo", "dpo": {"negative_weight": 0.5}}}, "objective.dpo.negative_weight must be 1"),
        ({"objective": {"name": "dpo", "dpo": {"label_smoothing": 0.5}}}, "at least 0 and below 0.5"),
    ],
)
def test_what_recorded_pairs_cannot_teach_is_refused(sections, sentence):
    sections = {"objective": {"name": "dpo"}, **sections}
    sections["prompts"] = {"pairs": "pairs.jsonl", **sections.get("prompts", {})}
    assert sentence in refusal(**sections)
