"""Benchmarks still run, as small as they can be: the figures of most are seldom asked for, and they broke unseen."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL: dict[str, list[str]] = {
    "busy": ["--spins", "shipped", "default", "--iterations", "2", "--rounds", "1", "--busy", "1"],
    "attention": ["--models", "shapes-flow", "--rows", "2", "--rounds", "1"],
    "cpu": ["--rows", "2", "--pictures", "1", "--rounds", "1"],
    "iteration": ["--models", "shapes-flow", "--plans", "window", "--prompts", "1", "--iterations", "1"],
    "member_noise": ["--objectives", "dgpo", "--prompts", "32", "--after", "1", "--keep", "6"],
    "plan_value": ["--recipe", "quickstart", "--prompts", "3", "--seeds", "0", "--after", "1", "--plans", "posthoc"],
    "reward_model": ["--prompts", "16", "8", "--pairs", "30", "--flips", "0", "--seeds", "0"],
    "reward_shape": ["--prompts", "2", "--group-size", "8", "--ode-steps", "2", "--sde-steps", "2"],
    "selection": ["--repeats", "1"],
    "shortcuts": ["--prompts", "1", "--seeds", "0", "1"],
    "startup": ["--repeats", "1", "--busy", "1"],
    "step": ["--after", "1", "--prompts", "1", "--pictures", "2", "--lengths", "1e-4", "--seeds", "0"],
    "verifier": ["--repeats", "1"],
    "waves": ["--plans", "none", "--delay-ms", "1", "--waves", "1", "2", "--iterations", "1"],
}


def numbers(node: Any) -> list[float]:
    if isinstance(node, (dict, list)):
        return [n for child in (node.values() if isinstance(node, dict) else node) for n in numbers(child)]
    return [float(node)] if isinstance(node, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_and_prints_one_json_object(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *SMALL[name], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert isinstance(results, dict) and len(numbers(results)) > 3


@pytest.mark.slow
def test_a_search_runs_and_may_try_all_of_its_trials(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    search = importlib.import_module("search")
    for changes in search.TRIALS.values():
        search.config_of(changes, seed=0)
    points = search.run(search.config_of(search.TRIALS["quickstart adaptive"], seed=0), 0.1, 1.0, pictures=2)
    assert [point["iterations"] for point in points] == [0, 1] and points[0]["prune"] == [[4, 12]]


def test_what_a_gradient_is_worth_is_found_where_it_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan_value = importlib.import_module("plan_value")
    generator = torch.Generator().manual_seed(0)
    mean_D, prompts, dims = torch.full((400,), 0.05), 300, 400
    noise = [torch.randn(3, prompts, dims, generator=generator) for _ in range(3)]
    full, twice, none = (
        [mean_D + scale * seed for seed in kind] for scale, kind in zip((0.5, 0.5**0.5, 1.0), noise, strict=True)
    )
    results = plan_value.worth(twice, none, full)  # half the variance
    assert results["signal"] == pytest.approx(2, abs=4 * results["error"]) and results["error"] < 0.3
    assert results["snr_sq"] == pytest.approx(2 * dims * 0.05**2 / dims, rel=0.3)
    assert plan_value.worth([2 * g for g in none], none, full)["signal"] == pytest.approx(1)  # no step size is in it
    assert results["bearing"] == pytest.approx(1, abs=4 * results["bearing, error"]) and results["bearing, error"] < 0.1
    aside_D = torch.full((400,), 0.05) * (-1) ** torch.arange(400)  # at right angles to the mean, and as long
    assert plan_value.worth([g + aside_D for g in twice], none, full)["bearing"] == pytest.approx(0.5**0.5, abs=0.06)


@pytest.mark.slow
def test_every_cell_of_the_map_can_be_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    survey = importlib.import_module("when_pruning_pays")
    for cell in (*survey.cells(), *survey.more_cells(), *survey.negative_cells()):
        survey.config_of(cell, 1e-3, 2, seed=0)
    cell = survey.Cell("grpo", survey.AUTO[4.0], "smooth")
    entry = survey.run(survey.pretrained(0), cell, 4e-3, 8, 0, goal=None)
    assert entry["spent"][-1] > entry["curve"][-1][0] * 8 and len(entry["plans"]) == len(entry["curve"])


def test_an_arrival_is_interpolated_on_the_smoothed_curve_and_not_before_training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    curves = importlib.import_module("curves")
    line = [(10 * i, float(i)) for i in range(6)]
    assert curves.reached_at(line, 2.5) == pytest.approx(25) and curves.reached_at(line, 9.0) is None
    # the first point stays 0; the second is the mean of three
    early = [(0, 0.0), (10, 8.0), (20, 8.0), (30, 8.0)]
    assert curves.smoothed(early) == [(0, 0.0), (10, pytest.approx(16 / 3)), (20, 8.0), (30, 8.0)]
    assert curves.reached_at(early, 2.0) == pytest.approx(10 * 2 / (16 / 3))


def test_survivors_are_allotted_over_groups_as_brute_force_does(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    by_variance = importlib.import_module("allotment").by_variance
    generator = torch.Generator().manual_seed(0)
    graded, verdicts = torch.randn(3, 2, 5, generator=generator), torch.rand(3, 2, 5, generator=generator) < 0.4
    subsets = torch.cartesian_prod(*[torch.tensor([False, True])] * 10).reshape(-1, 2, 5)
    counts = subsets.sum(2)
    legal = subsets[(counts.sum(1) == 4) & (counts != 1).all(1)]

    def signal(scores_PG, chosen_PG):
        """The sum of k V over groups."""
        groups = zip(scores_PG.double(), chosen_PG, strict=True)
        kept = [(scores_G, scores_G[rows_G]) for scores_G, rows_G in groups if rows_G.any() and scores_G.std() > 0]
        return sum(len(own) * own.var(correction=0) / all_.var(correction=0) for all_, own in kept)

    for scores_PG in (*graded, *verdicts.float()):
        selection = by_variance(scores_PG, 2, torch.ones(2, 5, dtype=torch.bool), torch.zeros(2))
        chosen_PG = torch.zeros(2, 5, dtype=torch.bool)
        for row, (indices, valid) in enumerate(zip(selection.indices_PK, selection.valid_PK, strict=True)):
            chosen_PG[row, indices[valid]] = True
        assert chosen_PG.sum() == 4
        best = max(float(signal(scores_PG, subset)) for subset in legal)
        assert float(signal(scores_PG, chosen_PG)) == pytest.approx(best)


def test_every_arm_of_the_road_has_a_length_of_equal_work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    search, road = importlib.import_module("search"), importlib.import_module("road_to_reward")
    study = road.STUDIES["grpo"]
    work = {arm: road.work_of(search.config_of(changes, 0), study.decode) for arm, changes in study.arms.items()}
    # GRPO with decodes for one call: 24 members, 6 calls and 5 trained steps of 3 calls each; a quarter after 3
    assert work["plain 24"] == road.PROMPTS * 24 * (6 + 1 + 3 * 5)
    assert work["6 of 24 after 3"] == road.PROMPTS * (24 * (4 + 1) + 6 * (2 + 1 + 3 * 5))
    # three trained steps
    assert work["first 3, plain 6"] == road.PROMPTS * 6 * (6 + 1 + 3 * 3)
    # DGPO with a distance: its network, the reference and the old one, of two draws
    held = road.STUDIES["dgpo"].arms["dgpo, KL 0.01, plain 6"]
    assert road.work_of(search.config_of(held, 0), 0.0) == road.PROMPTS * 6 * (6 + 2 * (3 + 2))


def test_arms_of_the_road_are_compared_seed_by_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    road = importlib.import_module("road_to_reward")

    def line(arm, lr, seed, slope):
        curve = [{"cpu_seconds": 10.0 * i, "work": i / 8, "reward": 0.5 + slope * i} for i in range(9)]
        return {"arm": arm, "lr": lr, "seed": seed, "curve": curve}

    slow = [line("slow", 1e-4, seed, slope) for seed, slope in enumerate((0.008, 0.012))]
    fast = [line("fast", 2e-4, seed, slope) for seed, slope in enumerate((0.018, 0.022))]
    other_rate, own_seed = line("fast", 1e-4, 0, 0.5), line("fast", 2e-4, 5, 0.0)
    results = [*slow, *fast, other_rate, own_seed]
    lines = road.comparison(results, "fast", "slow").splitlines()
    assert lines[0] == "fast over slow: +0.080 ± 0.000 at equal work (2 seeds)"
    # without either seed it is 0.022 / 0.012 and 0.018 / 0.008 times as fast
    spread = (0.018 / 0.008 - 0.022 / 0.012) / 2
    faster = f"2.00 ± {spread:.2f}"
    assert lines[1] == f"to 50% of the latter's gain: {faster} times as fast by core seconds, {faster} by work"
    # the slow one gains its whole gain at its end, after 80 seconds; its smoothed end is that of 75
    assert lines[3].startswith(f"to 100% of the latter's gain: {80 / 37.5:.2f} ± ")
    backwards = road.comparison(results, "slow", "fast").splitlines()
    assert backwards[3] == "to 100% of the latter's gain: - times as fast by core seconds, - by work"
    assert road.comparison(results[1:], "fast", "slow") == "fast and slow: 1 seeds in common; a comparison takes two"


def test_the_road_says_what_an_arm_spends_to_the_gain_of_another(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    road = importlib.import_module("road_to_reward")

    def line(arm, slope, calls):
        curve = [
            {"cpu_seconds": 10.0 * i, "nfe": calls * i, "trained_steps": 500 * i, "iterations": i, "reward": slope * i}
            for i in range(9)
        ]
        return {"arm": arm, "lr": 1e-4, "seed": 0, "curve": curve}

    results = [line("first 3, plain 24", 0.01, 2000), line("dgpo, plain 6", 0.02, 1000)]
    # the slow one ends at 0.075, the mean of its last two; the other one is there after 3.75 of its evaluations
    header, _, row = road.arrivals(results, ["dgpo, plain 6"], "first 3, plain 24").splitlines()
    assert header.startswith("| to 25 / 50 / 75 / 100 % of +0.075 |")
    arm, seconds, calls, items, work = (cell.strip() for cell in row.strip("|").split("|"))
    assert (arm, seconds, calls) == ("dgpo, plain 6", "9/19/28/38", "0.9/1.9/2.8/3.8")
    assert items == "0.5/0.9/1.4/1.9"
    # six prompts of six members: six calls, and two draws of a forward and a backward pass with two more
    assert work == "/".join(f"{share * 3.75 * 6 * 6 * (6 + 2 * (3 + 2)) / 1000:.1f}" for share in (0.25, 0.5, 0.75, 1))


def test_a_table_without_the_first_arm_refers_to_the_first_that_was_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    road = importlib.import_module("road_to_reward")
    names = ("reward", "shapes_strict", "judge", "diversity")
    curve = [{"cpu_seconds": 10.0 * i, "iterations": i, **dict.fromkeys(names, 0.01 * i)} for i in range(9)]
    entry = {"arm": "first 3, plain 6", "lr": 5e-5, "seed": 0, "curve": curve}
    base, row = road.table(road.STUDIES["grpo"], [entry]).splitlines()[2:]
    assert base.startswith("| the base |") and row.startswith("| first 3, plain 6 | 5 | 1 | 8 | 0.080 |")
    assert row.endswith("| 38/56/80 |")


def test_a_table_of_nothing_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    road = importlib.import_module("road_to_reward")
    monkeypatch.setattr("sys.argv", ["road_to_reward.py", "--table", "--out", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        road.main()
    assert f"{tmp_path / 'none.json'} has no run of the study dgpo with shapes_match on shapes-flow" in (
        capsys.readouterr().err
    )


def test_a_noise_scale_is_estimated_where_it_is_known(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("noise_scale")
    generator = torch.Generator().manual_seed(0)
    rows_BD = 0.1 + torch.randn(40, 4000, generator=generator) / benchmark.PROMPTS**0.5  # 100 prompts
    signal, error, noise = benchmark.scale_of(rows_BD)
    assert noise / signal == pytest.approx(100, rel=3 * error / signal) and error < signal / 4


def test_a_previews_figures_are_what_its_groups_hold_and_its_cost_counts_calls(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = importlib.import_module("preview")
    final_NR = torch.arange(24.0, dtype=torch.float64)[:, None].repeat(1, 2)
    (rho, v), (reverse, _) = study.agreement(torch.stack([final_NR[:, 0], -final_NR[:, 0]], dim=1), final_NR)
    ends = [*range(6), *range(18, 24)]
    assert rho == 1 and reverse == -1
    assert v == pytest.approx((final_NR[ends, 0].var(correction=0) / final_NR[:, 0].var(correction=0)).item(), abs=1e-3)
    of_two = study.bootstrapped([[0.5, 1.0, 2.0], [None, 0.0, 2.0], [None, None, None]])
    assert (of_two.spearman, of_two.variance, of_two.groups) == (0.25, 0.25, 2) and of_two.spearman_error > 0
    # 24 members have four calls, and half of them the six that are left
    assert study.cost("x0", 3) == pytest.approx((24 * 4 + 12 * 6) / 240) and study.cost("probe", 9) == 1
    assert study.calls("ode 3", 2) == 5 and study.cost("ode 3", 2) == pytest.approx((24 * 5 + 12 * 7) / 240)


@pytest.mark.slow
def test_a_study_of_previews_goes_on_and_writes_its_tables(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = importlib.import_module("preview")
    results = study.Results(tmp_path / "previews.json")
    bench = study.Bench("shapes-flow", "ode")
    for slot in range(2):
        results.add(bench.group(study.world.sample_prompts("validation", 2, 0)[slot], slot))
    again = study.Results(results.path)
    assert again.groups == results.groups and "probe@3" in again.groups[1]["previews"]
    lines = study.table(again, "ode")
    assert len(lines) > 4 and "±" in lines[2] and lines[-1] == "2 groups of shapes-flow, 0 groups of shapes-diffusion."
    assert study.at_equal_cost(again)[0].startswith("Of 20 pairs")
    fields = len(study.MODELS) * len(study.REWARDS) * len(study.STOCHASTIC)
    assert len(study.picture(again).axes) == fields


def test_where_previews_rank_as_final_rewards_the_simulated_variance_is_the_audited_one(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study = importlib.import_module("audited_variance")
    generator = torch.Generator().manual_seed(0)
    audits = []
    for _ in range(40):
        final_G = torch.randn(12, generator=generator, dtype=torch.float64)
        kept = study.ovf(final_G[None], 6, torch.ones(1, 12, dtype=torch.bool), torch.zeros(1)).indices_PK[0]
        variance = float(final_G[kept].var(correction=0) / final_G.var(correction=0))
        audits.append(
            {"steps": [0], "used": [final_G.tolist()], "final": final_G.tolist(), "keep": [6], "variance": [variance]}
        )
    _, agreement, audited, simulated = study.table(audits).splitlines()[-1].strip("| ").split(" | ")
    assert float(agreement) == 1.0
    value, error = map(float, audited.split(" ± "))
    assert abs(float(simulated) - value) < 2 * error


@pytest.mark.slow
def test_a_draft_without_a_correction_is_the_preview_in_as_many_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    study, drafts = importlib.import_module("preview"), importlib.import_module("draft")
    for model in study.MODELS:
        policy = study.load_policy(model)
        sampling, key = drafts.ode(policy, study.STEPS, 1.0, 2), drafts.NoiseKey(0, 0)
        condition = policy.encode(study.world.sample_prompts("validation", 1, 0))
        start = drafts.expand(policy, torch.zeros(1, dtype=torch.int64), 2, sampling, key)
        seen: list[torch.Tensor] = []

        def watch(step, batch, policy=policy, condition=condition, sampling=sampling, seen=seen):
            if step == 0:
                seen.append(study.projected(drafts.Denoiser(policy, condition, sampling), batch, 0, 3, drafts.Meter()))
            return batch

        drafts.denoise(drafts.Denoiser(policy, condition, sampling), start, key, drafts.Meter(), watch)
        both = condition.take(torch.zeros(2, dtype=torch.int64))
        with torch.no_grad():
            plain = drafts.Drafter(policy, 3, "none").draft(start.x_NCHW, both)
            multistep = drafts.Drafter(policy, 3, "multistep").draft(start.x_NCHW, both)
            noise = drafts.Drafter(policy, 3, "noise").draft(start.x_NCHW, both)
        torch.testing.assert_close(plain, seen[0])
        assert not torch.allclose(multistep, plain) and torch.equal(noise, multistep)  # untrained, a residual is 0


@pytest.mark.parametrize(("keep", "floor"), [(6, 0.0), (12, 0.0), (6, 0.5), (23, 0.5)])
def test_a_soft_choice_keeps_members_as_often_as_its_weights_say(monkeypatch, keep, floor):
    """Losses over inclusion probabilities then have the full group's gradient in expectation, whatever the losses."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    soft_ovf = importlib.import_module("soft_ovf")
    scores = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[4] = 1.0  # equal scores
    chance = soft_ovf.inclusion(scores, keep, floor)
    torch.testing.assert_close(chance.sum(1), torch.full((5,), float(keep), dtype=torch.float64))
    starts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    draws = torch.stack([soft_ovf.drawn(scores, chance, start.expand(5)) for start in starts]).double()
    assert (draws.sum(2) == keep).all()
    torch.testing.assert_close(draws.mean(0), chance, rtol=0, atol=1e-3)
