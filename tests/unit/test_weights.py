import pytest
import torch
from torch.nn import Parameter

from progrpo.policies.weights import NamedWeights
from progrpo.storage import load_state, save_state


def _parameters(value: float = 1.0) -> dict[str, Parameter]:
    return {
        "a": Parameter(torch.full((2, 3), value, dtype=torch.float64)),
        "b": Parameter(torch.full((4,), value, dtype=torch.float64)),
    }


def _set(parameters: dict[str, Parameter], value: float) -> None:
    with torch.no_grad():
        for p in parameters.values():
            p.fill_(value)


def _values(parameters: dict[str, Parameter]) -> set[float]:
    return {v for p in parameters.values() for v in p.flatten().tolist()}


def test_reference_is_taken_at_construction_and_is_no_alias():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    _set(parameters, 5.0)
    with weights.swapped("reference"):
        assert _values(parameters) == {1.0}
    assert _values(parameters) == {5.0}
    _set(parameters, 6.0)
    with weights.swapped("reference"):
        assert _values(parameters) == {1.0}


def test_named_weights_can_be_copied_and_the_copy_is_no_alias():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    _set(parameters, 3.0)
    weights.snapshot("best", "reference")
    weights.update("reference", 0.0)
    with weights.swapped("best"):
        assert _values(parameters) == {1.0}
    weights.snapshot("best")
    assert _values(parameters) == {3.0} and "best" in weights
    with weights.swapped("best"):
        assert _values(parameters) == {3.0}


def test_a_snapshot_can_be_taken_again():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    for value in (2.0, 3.0):
        _set(parameters, value)
        weights.snapshot("old")
        _set(parameters, 9.0)
        with weights.swapped("old"):
            assert _values(parameters) == {value}
    assert weights.names == ("current", "reference", "old")
    assert "old" in weights and "current" in weights and "ema" not in weights


def test_what_is_forgotten_is_gone_and_nothing_else():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    weights.snapshot("old")
    _set(parameters, 2.0)
    weights.forget("reference")
    assert weights.names == ("current", "old") and "reference" not in weights
    assert set(weights.state_dict()) == {"current", "old"} and _values(parameters) == {2.0}
    with weights.swapped("old"):
        assert _values(parameters) == {1.0}
    for action in (lambda: weights.forget("reference"), lambda: weights.swapped("reference").__enter__()):
        with pytest.raises(ValueError, match="no weights named 'reference'; there are current, old"):
            action()
    with pytest.raises(ValueError, match="no weights named 'current'"):
        weights.forget("current")
    weights.snapshot("reference")
    with weights.swapped("reference"):
        assert _values(parameters) == {2.0}


def test_a_state_without_a_reference_is_restored_without_one():
    weights = NamedWeights(_parameters(1.0))
    weights.forget("reference")
    restored = NamedWeights(_parameters(7.0))
    restored.load_state_dict(weights.state_dict())
    assert restored.names == ("current",)


def test_update_is_the_closed_form_of_an_exponential_average():
    parameters, decay = _parameters(0.0), 0.9
    weights = NamedWeights(parameters)
    weights.snapshot("ema")
    for step in range(1, 6):
        _set(parameters, float(step))
        weights.update("ema", decay)
    expected = sum((1 - decay) * decay ** (5 - step) * step for step in range(1, 6))
    with weights.swapped("ema"):
        torch.testing.assert_close(parameters["a"].detach(), torch.full((2, 3), expected, dtype=torch.float64))
    assert _values(parameters) == {5.0}


def test_current_weights_come_back_after_an_exception():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    _set(parameters, 2.0)
    with pytest.raises(RuntimeError, match="inside"), weights.swapped("reference"):
        raise RuntimeError("inside")
    assert _values(parameters) == {2.0}
    with weights.swapped("reference"):
        assert _values(parameters) == {1.0}


def test_a_graph_built_before_a_swap_has_the_current_weights_gradient():
    parameters = {"a": Parameter(torch.tensor([2.0], dtype=torch.float64))}
    weights = NamedWeights(parameters)
    _set(parameters, 3.0)
    loss = parameters["a"].square().sum()
    with weights.swapped("reference"):
        pass
    loss.backward()
    assert parameters["a"].grad is not None and parameters["a"].grad.item() == 6.0


def test_the_optimizer_still_owns_the_parameters_after_a_swap():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    with weights.swapped("reference"):
        pass
    torch.stack([p.sum() for p in parameters.values()]).sum().backward()
    optimizer.step()
    assert _values(parameters) == {0.0}
    with weights.swapped("reference"):
        assert _values(parameters) == {1.0}


def test_nothing_else_is_allowed_inside_a_swap():
    weights = NamedWeights(_parameters())
    state = weights.state_dict()
    for action in (
        lambda: weights.swapped("current").__enter__(),
        lambda: weights.swapped("reference").__enter__(),
        lambda: weights.snapshot("old"),
        lambda: weights.forget("reference"),
        lambda: weights.update("reference", 0.5),
        lambda: weights.state_dict(),
        lambda: weights.load_state_dict(state),
    ):
        with weights.swapped("reference"), pytest.raises(ValueError, match="'reference' are in use"):
            action()


def test_one_swap_may_stand_in_for_another_which_comes_back():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    _set(parameters, 2.0)
    weights.snapshot("old")
    _set(parameters, 3.0)
    with weights.swapped("old"):
        for name, value in (("reference", 1.0), ("current", 3.0), ("old", 2.0)):
            with weights.instead(name):
                assert weights.active == name and _values(parameters) == {value}
            assert weights.active == "old" and _values(parameters) == {2.0}
    assert _values(parameters) == {3.0}


def test_wrong_names_are_refused():
    weights = NamedWeights(_parameters())
    with pytest.raises(ValueError, match="no weights named 'ema'; there are current, reference"):
        weights.update("ema", 0.5)
    with pytest.raises(ValueError, match="no weights named 'old'"), weights.swapped("old"):
        pass
    with pytest.raises(ValueError, match="another name"):
        weights.snapshot("current")


def test_state_goes_through_storage_and_back(tmp_path):
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    _set(parameters, 2.0)
    weights.snapshot("ema")
    _set(parameters, 3.0)
    save_state(tmp_path / "state", weights.state_dict())

    others = _parameters(7.0)
    restored = NamedWeights(others)
    restored.snapshot("old")
    restored.load_state_dict(load_state(tmp_path / "state"))
    assert restored.names == ("current", "reference", "ema")
    assert _values(others) == {3.0}
    for name, value in (("reference", 1.0), ("ema", 2.0)):
        with restored.swapped(name):
            assert _values(others) == {value}


def test_loaded_state_is_no_alias():
    weights = NamedWeights(_parameters(1.0))
    state = weights.state_dict()
    others = _parameters(7.0)
    restored = NamedWeights(others)
    restored.load_state_dict(state)
    restored.update("reference", 0.5)
    _set(others, 9.0)
    restored.update("reference", 0.0)
    assert float(state["reference"]["a"].max()) == 1.0


def test_state_of_another_model_is_refused_and_changes_nothing():
    parameters = _parameters(1.0)
    weights = NamedWeights(parameters)
    state = NamedWeights({"a": Parameter(torch.zeros(2, 2))}).state_dict()
    with pytest.raises(ValueError, match="not this model's"):
        weights.load_state_dict(state)
    assert _values(parameters) == {1.0}
