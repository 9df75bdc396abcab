"""A stage of pretraining: its learning rate, its averaged weights, and that it goes on where it stopped."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from progrpo.storage import load_state
from progrpo.zoo.pretraining import Ema, Pretraining, StageSettings, train_stage

STEPS = 12
OFTEN = StageSettings(STEPS, lr=1e-2, minutes_between_checkpoints=0.0)
AT_THE_END = replace(OFTEN, minutes_between_checkpoints=1e9)


def run_in(out: Path, log: Callable[[str], None] = lambda line: None) -> Pretraining:
    return Pretraining(out, device="cpu", log=log)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def regression(module: nn.Module, dies_at: int | None = None) -> Callable[[int], Tensor]:
    """The loss on data that are a function of the step; raises at a step if asked to."""

    def loss_of(step: int) -> Tensor:
        if step == dies_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (module(x)[:, 0] - x.sum(1)).square().mean()

    return loss_of


def train(
    module: nn.Module,
    out: Path,
    dies_at: int | None = None,
    settings: StageSettings = OFTEN,
    evaluate: Callable[[], str] | None = None,
) -> list[str]:
    lines: list[str] = []
    train_stage("stage", module, regression(module, dies_at), settings, run_in(out, lines.append), evaluate)
    return lines


def weights(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# --- stop and resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", [(), ("0.weight",)], ids=["adamw", "muon"])
@pytest.mark.parametrize("dies_at", [1, 7])
def test_a_resumed_stage_is_a_straight_one(dies_at, matrices, tmp_path):
    straight = network()
    train(straight, tmp_path / "straight", settings=replace(AT_THE_END, matrices=matrices))

    often = replace(OFTEN, matrices=matrices)
    with pytest.raises(KeyboardInterrupt):
        train(network(), tmp_path / "stopped", dies_at, often)
    resumed = network()
    lines = train(resumed, tmp_path / "stopped", settings=often)
    assert lines[0] == f"stage: resumed at step {dies_at}"
    assert equal(straight, resumed)

    a, b = (load_state(tmp_path / name / "stage") for name in ("straight", "stopped"))
    assert a["step"] == b["step"] == a["ema_updates"] == b["ema_updates"] == STEPS
    assert all(torch.equal(x, y) for x, y in zip(a["ema"], b["ema"], strict=True))
    assert all(torch.equal(a["module"][name], b["module"][name]) for name in a["module"])


def test_a_convolution_is_trained_as_its_matrix(tmp_path):
    """A kernel as large as its input is a linear layer: Muon must move both alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 8), nn.Tanh(), nn.Linear(8, 1))
        convolution = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Tanh(), nn.Linear(8, 1))
    (weight, bias), kernel = linear[1].parameters(), next(convolution.parameters())
    convolution[0].load_state_dict({"weight": weight.reshape(8, 2, 3, 3), "bias": bias})
    convolution[3].load_state_dict(linear[3].state_dict())
    before = kernel.detach().clone()

    def fit(module: nn.Module) -> Callable[[int], Tensor]:
        def loss_of(step: int) -> Tensor:
            x = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(step))
            return (module(x)[:, 0] - x.sum((1, 2, 3))).square().mean()

        return loss_of

    for module, name, matrices in ((linear, "linear", ("1.weight",)), (convolution, "convolution", ("0.weight",))):
        train_stage(name, module, fit(module), replace(OFTEN, matrices=matrices), run_in(tmp_path))
    torch.testing.assert_close(kernel.flatten(1), weight, rtol=0, atol=1e-5)
    assert (kernel - before).abs().max() > 1e-3


def test_killed_before_the_first_checkpoint_it_starts_anew(tmp_path):
    straight, again = network(), network()
    train(straight, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        train(network(), tmp_path / "stopped", dies_at=5, settings=AT_THE_END)
    assert train(again, tmp_path / "stopped")[0].startswith("stage: step 1/12")
    assert equal(straight, again)


def test_a_finished_stage_only_loads(tmp_path):
    first, second = network(), network()
    train(first, tmp_path)
    lines = train(second, tmp_path, dies_at=STEPS)
    assert lines == [f"stage: resumed at step {STEPS}"]
    assert equal(first, second)


def test_it_is_left_averaged_and_not_training(tmp_path):
    module = network()
    train(module, tmp_path)
    saved = load_state(tmp_path / "stage")
    assert not module.training
    for p, average, live in zip(module.parameters(), saved["ema"], module.state_dict(), strict=False):
        assert torch.equal(p.detach(), average)
        assert not torch.equal(average, saved["module"][live])


def test_evaluation_sees_averaged_weights_and_changes_nothing(tmp_path):
    straight, watched, seen = network(), network(), []
    train(straight, tmp_path / "straight")

    def evaluate() -> str:
        assert not watched.training and not torch.is_grad_enabled()
        seen.append(next(watched.parameters()).clone())
        return "all is well"

    lines = train(watched, tmp_path / "watched", evaluate=evaluate)
    assert equal(straight, watched)
    assert len(seen) == STEPS == len(lines)
    assert torch.equal(seen[-1], next(watched.parameters()))
    assert all("all is well" in line for line in lines)


def test_frozen_parameters_stay(tmp_path):
    module = network()
    frozen = next(module.parameters()).requires_grad_(False)
    before = frozen.clone()
    train(module, tmp_path)
    assert torch.equal(frozen, before)
    assert len(load_state(tmp_path / "stage")["ema"]) == len(list(module.parameters())) - 1


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "decay_fraction"), [(500, 0.25), (300, 0.5), (60, 0.25)])
def test_learning_rate_warms_up_stays_and_falls(steps, decay_fraction, tmp_path):
    """On a constant gradient of 1 a step of AdamW is p (1 - 0.01 lr) - lr, so the weights tell the rate."""
    module = nn.Linear(1, 1, bias=False).double()
    path: list[float] = []

    def loss_of(step: int) -> Tensor:
        path.append(module.weight.item())
        return module.weight.sum()

    settings = replace(AT_THE_END, steps=steps, decay_fraction=decay_fraction, ema_decay=0.0)
    train_stage("stage", module, loss_of, settings, run_in(tmp_path))
    path.append(load_state(tmp_path / "stage")["module"]["weight"].item())
    rates = [(a - b) / (1 + 0.01 * a) for a, b in pairwise(path)]
    expected = [1e-2 * min(1, (t + 1) / 100, (steps - t) / (decay_fraction * steps)) for t in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-5)


# --- averages ---------------------------------------------------------------------------------------------------------


def test_ema_is_slow_to_remember_at_first():
    """decay_n = min(decay, (1+n)/(10+n)): the closed form over a path, in float64."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ema, expected = Ema([p], decay=0.5), 0.0
    for n in range(1, 30):
        with torch.no_grad():
            p.fill_(float(n * n))
        ema.update([p])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n * n
        torch.testing.assert_close(ema.shadow[0], torch.full((2,), expected, dtype=torch.float64))
    assert ema.updates == 29
    assert p[0] == 29 * 29


def test_swap_twice_restores():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([p], decay=0.9)
    with torch.no_grad():
        p.add_(5)
    ema.swap([p])
    assert p.tolist() == [1, 2] and ema.shadow[0].tolist() == [6, 7]
    ema.swap([p])
    assert p.tolist() == [6, 7] and ema.shadow[0].tolist() == [1, 2]


def test_ema_begins_as_a_copy():
    p = nn.Parameter(torch.ones(3))
    ema = Ema([p], decay=0.9)
    with torch.no_grad():
        p.zero_()
    assert ema.shadow[0].tolist() == [1, 1, 1]
