"""The value of a plan: variances of simulated groups against known ones, and the plans that are compared."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from progrpo.objectives.advantage import advantages, group_statistics
from progrpo.rollout.plan import Plan, PrunePoint, plans
from progrpo.rollout.plan_value import Simulation, prompt_signal
from progrpo.rollout.settings import PlanSettings
from progrpo.tracking.statistics import standardised
from tests.support.grids import SELECTORS

OVF, UNIFORM = SELECTORS["ovf"], SELECTORS["uniform"]


def normal_rewards(size: int) -> list[float]:
    return standard(torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size))


def standard(rewards_G: torch.Tensor) -> list[float]:
    units = standardised(rewards_G.numpy())
    assert units is not None
    return units.tolist()


def spearman_of(rho: float, size: int) -> float:
    """Spearman's correlation that so many pairs of normals have in the mean (Moran 1948)."""
    return 6 / (math.pi * (size + 1)) * (math.asin(rho) + (size - 2) * math.asin(rho / 2))


def narrowed(*sizes: int, final_keep: int | None = None) -> Plan:
    return Plan(sizes[0], tuple(PrunePoint(step, keep) for step, keep in enumerate(sizes[1:])), final_keep)


def simulated(*rhos: float, group_size: int = 48, seed: int = 0) -> Simulation:
    agreement = [spearman_of(rho, group_size) for rho in rhos]
    return Simulation.of(agreement, [normal_rewards(group_size)], group_size, seed=seed)


def variance(plan: Plan, *rhos: float, select=OVF) -> float:
    """V: the variance of the kept rewards, in units of all. One simulation is off by 3 %, the mean of ten by 1 %."""
    signals = [simulated(*rhos, seed=seed).signal(plan, select) for seed in range(10)]
    return sum(signals) / len(signals) / plan.survivors


@pytest.mark.parametrize("keep", [100, 200, 300])
def test_of_normal_rewards_v_is_the_closed_form(keep):
    """V = 1 + rho^2 (V_1 - 1); V_1 is that of the two tails, 1.86 at half and 2.89 at a quarter of a large group."""
    size, rhos = 400, (0.2, 0.5, 0.8, 1.0)
    simulation, tail = simulated(*rhos, group_size=size), NormalDist().inv_cdf(keep / size / 2)
    at_best = 1 - 2 * tail * NormalDist().pdf(tail) / (keep / size)
    signals = [simulation.signal(Plan(size, (PrunePoint(step, keep),)), OVF) / keep for step in range(len(rhos))]
    assert signals == pytest.approx([1 + rho**2 * (at_best - 1) for rho in rhos], rel=0.02)


@pytest.mark.parametrize(("passed", "keep"), [(12, 12), (6, 12), (3, 12), (18, 8), (1, 6)])
def test_of_verdicts_v_is_the_closed_form(passed, keep):
    """Of half and half, or as many as there are: to choose is worth nothing where half the members pass."""
    size, rewards = 24, standard((torch.arange(24) < passed).double())
    simulation = Simulation.of([1.0], [rewards], size)
    rarer = min(passed, size - passed, keep // 2)
    expected = rarer * (keep - rarer) / keep**2 / (passed * (size - passed) / size**2)
    for plan in (Plan(size, final_keep=keep), Plan(size, (PrunePoint(0, keep),))):
        assert simulation.signal(plan, OVF) / keep == pytest.approx(expected)
    assert simulation.signal(Plan(size), OVF) / size == pytest.approx(1)


@pytest.mark.parametrize(
    "law",
    [
        lambda z: z,
        lambda z: (z > 0.3).double(),
        lambda z: (4 * z).tanh() + 0.1 * z,
        lambda z: (0.4 * z).exp(),
        lambda z: (1.2 * z).round(),
    ],
    ids=["normal", "verdict", "nearly a verdict", "skewed", "grades"],
)
@pytest.mark.parametrize("keep", [12, 6])
def test_the_v_of_previews_is_that_of_the_law_they_come_from(law, keep):
    """The prediction from audits against V in many groups, both of previews and rewards of a known joint law."""
    size, rhos = 24, torch.tensor([0.3, 0.5, 0.7, 0.85, 0.95, 1.0], dtype=torch.float64)
    steps = torch.randn(3000, size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    seen = law((steps * rhos.square().diff(prepend=torch.zeros(1)).sqrt()).cumsum(2) / rhos)
    seen = seen[seen[:, :, -1].var(1) > 0]
    final_PG, everyone, nobody = (
        seen[:, :, -1],
        torch.ones_like(seen[:, :, 0], dtype=torch.bool),
        torch.zeros(len(seen)),
    )
    kept = [final_PG.gather(1, OVF(scores, keep, everyone, nobody).indices_PK) for scores in seen.unbind(2)]
    std_P = final_PG.std(1, correction=0)
    stds = [one.std(1, correction=0) / std_P for one in kept]
    measured = [(std.mean().square() / (std > 0).double().mean()).item() for std in stds]

    ranks = torch.from_numpy(rankdata(seen[:1000].numpy(), axis=1))
    ranks = ranks - ranks.mean(1, keepdim=True)
    unit = ranks / ranks.norm(dim=1, keepdim=True)
    agreement = (unit * unit[:, :, -1:]).sum(1).nan_to_num(0.0).mean(0).tolist()  # 0 where all previews are equal
    finals, plans_T = (
        [standard(audit[:, -1]) for audit in seen[:1000]],
        [Plan(size, (PrunePoint(t, keep),)) for t in range(6)],
    )
    simulations = [Simulation.of(agreement, finals, size, seed=seed) for seed in range(4)]
    predicted = [float(np.mean([one.signal(plan, OVF) / keep for one in simulations])) for plan in plans_T]
    assert predicted == pytest.approx(measured, rel=0.05)


def test_audits_shape_groups_by_their_weights():
    half, few = ([float(member < passed) for member in range(24)] for passed in (12, 3))
    groups = [standard(torch.tensor(rewards)) for rewards in (half, few)]
    plan = Plan(24, final_keep=12)
    one, other = (Simulation.of([0.5], [group], 24).signal(plan, OVF) for group in groups)
    for weight in (0.25, 0.5):
        mixed = Simulation.of([0.5], groups, 24, [weight, 1 - weight]).signal(plan, OVF)
        assert mixed == pytest.approx((weight * math.sqrt(one) + (1 - weight) * math.sqrt(other)) ** 2)


def test_a_group_whose_kept_rewards_are_equal_adds_neither_signal_nor_noise():
    """One passes of four, and two are kept in order: in half of the groups they are equal."""
    simulation = Simulation.of([1.0], [standard(torch.tensor([0.0, 0.0, 0.0, 1.0]))], 4)
    kept_PK = simulation.previews_PGT1[:, :2, -1]
    share = (kept_PK[:, 0] != kept_PK[:, 1]).double().mean().item()
    own = 0.25 / (0.25 * 0.75)
    assert simulation.signal(Plan(2), OVF) == pytest.approx(2 * own * share) and 0.4 < share < 0.6


@pytest.mark.parametrize("own_direction", [0.0, 0.05, 0.5])
def test_the_signal_of_a_prompt_is_that_of_gradients_of_such_members(own_direction):
    """Members' gradients are reward times their prompt's direction, plus noise: SNR^2 in the mean over many groups."""
    generator = torch.Generator().manual_seed(3)
    size, dims, groups, mean = 6, 4, 40_000, 0.3

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction_PD = torch.tensor([mean, 0.0, 0.0, 0.0]) + math.sqrt(own_direction / dims) * normals(groups, dims)
    rewards_PG = normals(groups, size)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    std_P1 = centred_PG.std(1, correction=0, keepdim=True)
    gradients_PGD = centred_PG[..., None] * direction_PD[:, None] + normals(groups, size, dims) / math.sqrt(dims)
    own_PD = (centred_PG[..., None] / std_P1[..., None] * gradients_PGD).mean(1)
    snr_sq = own_PD.mean(0).square().sum() / own_PD.var(0).sum()
    signal = size * std_P1.mean().item() ** 2
    # the spread of the groups' own stds is noise along the direction that the formula leaves out: a few per cent
    assert snr_sq.item() == pytest.approx(mean**2 * prompt_signal(signal, own_direction), rel=0.08)


def test_a_prompt_without_signal_has_none():
    assert prompt_signal(0.0, 0.1) == 0


def test_a_group_of_another_size_than_the_audits_has_their_quantiles():
    simulation = Simulation.of([0.0], [standard(torch.tensor([0.0, 0.0, 0.0, 1.0]))], 8)
    assert all(len(group.unique()) == 2 for group in simulation.previews_PGT1[:, :, -1])
    assert simulation.signal(Plan(8, final_keep=4), OVF) / 4 == pytest.approx(0.25 / (0.25 * 0.75))


@pytest.mark.parametrize(
    ("sizes", "rhos", "expected"),
    [
        ((24, 12), (0.9,), 1.59),
        ((48, 12), (0.7,), 1.83),
        ((24, 16, 12), (0.9, 0.97), 1.66),
        ((48, 24, 12), (0.6, 0.8), 1.94),
    ],
)
def test_the_variance_that_pruning_leaves_is_the_known_one(sizes, rhos, expected):
    assert variance(narrowed(*sizes), *rhos) == pytest.approx(expected, rel=0.04)


def test_one_simulation_is_not_far_from_many():
    plan = narrowed(48, 24, 12)
    assert variance(plan, 0.6, 0.8) == pytest.approx(simulated(0.6, 0.8).signal(plan, OVF) / 12, rel=0.1)


def test_previews_and_rewards_correlate_as_they_were_measured():
    simulation = simulated(0.5, 0.8)
    seen = simulation.previews_PGT1.reshape(-1, 3)
    correlations = torch.corrcoef(seen.T)
    assert correlations[0, 2].item() == pytest.approx(0.5, abs=0.03)
    assert correlations[1, 2].item() == pytest.approx(0.8, abs=0.03)
    assert correlations[0, 1].item() == pytest.approx(0.5 / 0.8, abs=0.03)
    assert seen[:, 2].std().item() == pytest.approx(1, abs=0.03)


def test_later_steps_never_know_less():
    falls, flat = simulated(0.8, 0.3), simulated(0.8, 0.8)
    assert torch.equal(falls.previews_PGT1, flat.previews_PGT1)


def test_an_agreement_below_zero_is_no_knowledge():
    assert torch.equal(simulated(-0.5, 0.3).previews_PGT1, simulated(0.0, 0.3).previews_PGT1)


@pytest.mark.parametrize("plan", [narrowed(24, 12), narrowed(48, 12), narrowed(48, 24, 12)], ids=str)
def test_previews_that_know_nothing_win_nothing(plan):
    none = (plan.survivors - 1) / plan.survivors  # of so many independent rewards
    for select in (OVF, UNIFORM):
        assert variance(plan, 0.0, 0.0, select=select) == pytest.approx(none, rel=0.04)


def test_a_uniform_choice_wins_nothing_whatever_previews_know():
    plan = narrowed(24, 12)
    assert variance(plan, 0.9, select=UNIFORM) == pytest.approx(11 / 12, rel=0.04)


@pytest.mark.parametrize("selector", ["ovf", "top_bottom", "uniform"])
@pytest.mark.parametrize("rho", [0.3, 0.9, 1.0])
def test_a_subset_is_never_worth_more_than_its_group(selector, rho):
    simulation, select = simulated(rho, rho, group_size=24), SELECTORS[selector]
    whole = simulation.signal(Plan(24), select)
    narrower = [narrowed(24, 20), narrowed(24, 12), narrowed(24, 16, 12), narrowed(24, 4), Plan(24, final_keep=12)]
    worth = [simulation.signal(plan, select) for plan in narrower]
    assert max(worth) < whole
    assert worth[0] > worth[1] > worth[3]


@pytest.mark.parametrize("size", [4, 12, 24])
def test_a_full_group_is_worth_nearly_its_members(size):
    """The squared mean of the std of so many normal numbers; they are drawn from groups of 48."""
    std = math.sqrt(2 / size) * math.gamma(size / 2) / math.gamma((size - 1) / 2)
    assert variance(Plan(size), 0.5) == pytest.approx(std**2 * 48 / 47, rel=0.03)


def test_perfect_previews_are_a_choice_by_final_rewards():
    simulation = simulated(1.0)
    post_hoc = simulation.signal(Plan(24, final_keep=12), OVF)
    assert simulation.signal(narrowed(24, 12), OVF) == pytest.approx(post_hoc)
    worse = simulated(0.5)
    assert worse.signal(narrowed(24, 12), OVF) < worse.signal(Plan(24, final_keep=12), OVF)


def test_shared_beginnings_change_no_figure():
    together, asked = simulated(0.5, 0.7, 0.9, group_size=12), list(plans(12, 4, 4))
    fresh = [Simulation(together.previews_PGT1).signal(plan, OVF) for plan in asked]
    assert [together.signal(plan, OVF) for plan in asked] == fresh
    assert [together.signal(plan, OVF) for plan in reversed(asked)] == fresh[::-1]
    assert len(set(fresh)) > len(fresh) / 2  # plans do differ
    smaller = Plan(8, (PrunePoint(0, 4),))  # another group, pruned at the same points
    assert together.signal(smaller, OVF) == Simulation(together.previews_PGT1).signal(smaller, OVF)
    assert together.signal(smaller, OVF) != together.signal(Plan(12, smaller.prune), OVF)


def test_what_plans_share_takes_little_memory():
    """Members are kept by their places, and those of beginnings alone: all their scores take over 100 times as much."""
    steps = 10
    simulation = simulated(*[0.5] * steps, group_size=12)
    alone = len(pickle.dumps(simulation))
    for plan in plans(12, 6, steps):
        simulation.signal(plan, UNIFORM)
    assert len(pickle.dumps(simulation)) < 6 * alone


def test_where_nothing_is_known_scores_are_draws_and_not_ties():
    seen = simulated(0.0, 0.0, 0.8).previews_PGT1
    assert all(len(group.unique()) == len(group) for step in (0, 1) for group in seen[:, :, step])
    correlations = torch.corrcoef(seen.reshape(-1, 4).T)
    assert correlations[:2, 2:].abs().max() < 0.05 and correlations[0, 1].abs() < 0.05


def test_the_same_draws_serve_every_simulation():
    a, b, c = (Simulation.of([0.5], [normal_rewards(8)], 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.previews_PGT1, b.previews_PGT1) and not torch.equal(a.previews_PGT1, c.previews_PGT1)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "least", "steps"), [(24, 12, 10), (48, 12, 10), (8, 2, 4), (5, 4, 3), (4, 3, 2)])
def test_plans_can_be_run_are_distinct_and_keep_enough(group, least, steps):
    searched = list(plans(group, least, steps))
    for plan in searched:
        plan.validate(steps)
        assert plan.group_size == group and plan.survivors >= least
        assert plan.active_points() == plan.prune and len(plan.prune) <= 2
    assert len(set(searched)) == len(searched)
    assert Plan(group) in searched  # nobody goes
    assert Plan(group, final_keep=least) in searched  # nobody goes while sampling
    assert all(Plan(group, (PrunePoint(step, least),)) in searched for step in range(steps - 1))


def test_plans_prune_twice_and_then_by_final_rewards():
    searched = set(plans(24, 12, 10))
    assert Plan(24, (PrunePoint(5, 16), PrunePoint(7, 12))) in searched
    assert Plan(24, (PrunePoint(0, 20), PrunePoint(8, 16)), final_keep=12) in searched


def test_a_group_that_must_stay_whole_has_one_plan():
    assert list(plans(8, 8, 10)) == [Plan(8)]


def test_so_few_steps_that_none_can_be_pruned_leave_a_choice_by_final_rewards():
    assert all(not plan.prune for plan in plans(8, 4, 1))
    assert Plan(8, final_keep=4) in plans(8, 4, 1)


@pytest.mark.parametrize("steps", [2, 6, 10])
def test_points_lie_after_every_step_of_up_to_ten(steps):
    searched = {point.step for plan in plans(24, 6, steps) for point in plan.prune}
    assert searched == set(range(steps - 1))


@pytest.mark.parametrize("steps", [11, 20, 28, 50, 1000])
def test_more_steps_are_not_more_plans(steps):
    """A verdict compares them on the main process while the others wait."""
    searched = list(plans(24, 6, steps))
    assert len(set(searched)) == len(searched) == len(list(plans(24, 6, 10)))
    after = sorted({point.step for plan in searched for point in plan.prune})
    gaps = [later - earlier for earlier, later in pairwise(after)]
    assert (after[0], after[-1]) == (0, steps - 2) and max(gaps) - min(gaps) <= 1
    for plan in searched:
        plan.validate(steps)
    assert len(list(PlanSettings(preset="auto").candidates(Plan(24), steps))) <= 606


# --- one std for all groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("keep", [8, 4])
def test_the_signal_is_that_of_the_projects_advantages(batch, keep):
    """Of scores rho z + e, for rewards s z, a gradient A score has the mean rho A z, and of e the variance A^2."""
    verdicts = standard(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    finals, stds, weights = [normal_rewards(8), verdicts], [0.3, 2.0], [3.0, 1.0]
    simulation = Simulation.of([0.5], finals, 8, weights)
    z_PG = simulation.previews_PGT1[..., -1]
    std_P = torch.tensor(stds, dtype=torch.float64)[(z_PG.max(1).values > 2).long()]
    assert std_P.eq(2.0).double().mean() == 0.25  # as many groups as the second audit's weight
    chosen_PK = OVF(z_PG, keep, torch.ones_like(z_PG, dtype=torch.bool), torch.arange(len(z_PG))).indices_PK
    kept_PK = z_PG.gather(1, chosen_PK)
    rewards_N = (std_P[:, None] * kept_PK).flatten()
    group_N = torch.arange(len(z_PG)).repeat_interleave(keep)
    statistics = group_statistics(rewards_N, group_N, len(z_PG))
    std = rewards_N.std(correction=0) if batch else None
    A_N, _ = advantages(rewards_N, group_N, statistics, std=std, eps=1e-12, clip_max=1e9)
    expected = keep * (A_N * kept_PK.flatten()).mean() ** 2 / A_N.square().mean()
    plan = Plan(8, final_keep=keep) if keep < 8 else Plan(8)
    judged = simulation.of_batch(stds, weights) if batch else simulation
    assert judged.signal(plan, OVF) == pytest.approx(expected.item(), rel=1e-5)


def test_one_std_for_groups_of_equal_spread_has_the_mean_variance():
    simulation = Simulation.of([0.6], [normal_rewards(12)], 12)
    plan = Plan(12, (PrunePoint(0, 6),))
    members_PK = simulation._after(12, ((0, 6),), OVF)
    v = simulation.previews_PGT1[..., -1].gather(1, members_PK).var(dim=1, correction=0).mean().item()
    assert simulation.of_batch([0.7]).signal(plan, OVF) == pytest.approx(6 * v, rel=1e-9)
    assert simulation.of_batch([0.7]).signal(Plan(12), OVF) == pytest.approx(12, rel=1e-6)
