"""The optimizer of a run, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from progrpo.config import OptimSettings
from progrpo.policies.sharded import as_shared
from progrpo.training.zero import PartitionedAdamW, Zero


def optimizer_from(config: OptimSettings, parameters: Iterable[nn.Parameter], zero: Zero | None = None) -> Optimizer:
    """The optimizer of a configuration, whose state is shared out among processes where `zero` asks for it.

    ValueError, with the pip command, for one whose package is not installed.
    """
    if zero is not None and zero.stage:
        return PartitionedAdamW(parameters, zero, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    kind: Callable[..., Optimizer] = torch.optim.AdamW if config.name == "adamw" else _adamw_8bit()
    return kind(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _adamw_8bit() -> Callable[..., Optimizer]:
    """AdamW with quantised averages: plain tensors beside their scales, so that checkpoints hold them as they are."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.name adamw_8bit needs bitsandbytes, which is not installed: pip install 'progrpo[lean]'"
        )
    from bitsandbytes.optim import AdamW8bit

    kind: Callable[..., Optimizer] = AdamW8bit
    return kind


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Go on with a saved state, by the optimizer's own settings where they are others than the saved ones."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(_sharded_like_weights(optimizer, state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _sharded_like_weights(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state, with the averages of weights that are shared out among processes shared out alike."""
    if isinstance(optimizer, PartitionedAdamW):
        return dict(state)  # it takes its part itself, so that the whole is never on the device
    (group,) = optimizer.param_groups
    parameters = group["params"]

    def sharded(average: Any, weight: Tensor) -> Any:
        same_shape = isinstance(average, Tensor) and average.shape == weight.shape
        return as_shared(average, weight) if same_shape else average

    averages = {
        i: {name: sharded(average, parameters[i]) for name, average in of_weight.items()}
        for i, of_weight in state["state"].items()
    }
    return {**state, "state": averages}
