"""Copies of the trainable weights under a name: the reference of the KL term, the old policy, an average over time.

The same mechanism serves LoRA and full fine-tuning. A fresh LoRA starts with B = 0, so its reference is the
base model; one that is trained further has itself, as it was at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from progrpo.policies.sharded import as_shared

CURRENT = "current"


class NamedWeights:
    """Named copies of `parameters`, each on the parameter's device and in its dtype. `reference` is copied at once."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = dict(parameters)
        self._sets: dict[str, dict[str, Tensor]] = {}
        self._active = CURRENT
        self.snapshot("reference")

    def __contains__(self, name: str) -> bool:
        return name == CURRENT or name in self._sets

    @property
    def names(self) -> tuple[str, ...]:
        return (CURRENT, *self._sets)

    def snapshot(self, name: str, source: str = CURRENT) -> None:
        """Copy the weights `source` to `name`, new or not."""
        self._require_current(f"take a snapshot {name!r}")
        if name == CURRENT:
            raise ValueError(f"{CURRENT!r} names the weights in training; give the snapshot another name")
        with self.swapped(source):
            copied = {key: p.detach().clone() for key, p in self._parameters.items()}
        self._sets[name] = copied

    def forget(self, name: str) -> None:
        """Free the copy `name`."""
        self._require_current(f"forget {name!r}")
        self._stored(name)
        del self._sets[name]

    @torch.no_grad()
    def update(self, name: str, decay: float) -> None:
        """Move `name` towards the current weights: decay * name + (1 - decay) * current."""
        self._require_current(f"update {name!r}")
        for key, average in self._stored(name).items():
            average.lerp_(self._parameters[key], 1.0 - decay)

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Run the block with the weights `name` in the parameters. The current ones come back however it ends."""
        self._require_current(f"switch to {name!r}")
        with self.instead(name):
            yield

    @contextmanager
    def instead(self, name: str) -> Iterator[None]:
        """Run the block with the weights `name` within another such block, whose weights come back."""
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    @property
    def active(self) -> str:
        """The name of the weights that are in the parameters."""
        return self._active

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All weights by name, `current` first. The tensors are the live ones, not copies."""
        self._require_current("save")
        return {CURRENT: {key: p.detach() for key, p in self._parameters.items()}, **self._sets}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], keep: Collection[str] = ()) -> None:
        """Take over all weights of `state`. Of other names those in `keep` stay as they are; the rest is forgotten."""
        self._require_current("load")
        for name, tensors in state.items():
            _check_fit(self._parameters, name, tensors)
        for key, parameter in self._parameters.items():
            parameter.copy_(as_shared(state[CURRENT][key], parameter))
        kept = {name: own for name, own in self._sets.items() if name in keep and name not in state}
        self._sets = kept | {
            name: {key: as_shared(tensors[key], p) for key, p in self._parameters.items()}
            for name, tensors in state.items()
            if name != CURRENT
        }

    def _switch(self, name: str) -> None:
        if name == self._active:
            return
        stored = {} if name == CURRENT else self._stored(name)
        _exchange(self._parameters, {} if self._active == CURRENT else self._stored(self._active))
        _exchange(self._parameters, stored)
        self._active = name

    def _stored(self, name: str) -> dict[str, Tensor]:
        if name not in self._sets:
            raise ValueError(f"there are no weights named {name!r}; there are {', '.join(self.names)}")
        return self._sets[name]

    def _require_current(self, action: str) -> None:
        if self._active != CURRENT:
            raise ValueError(f"cannot {action} while the weights {self._active!r} are in use; leave that block first")


@torch.no_grad()
def _exchange(parameters: Mapping[str, Parameter], stored: dict[str, Tensor]) -> None:
    """Exchange the values of parameters and stored weights.

    Storage changes hands and nothing is copied: a graph that was built before the block is still right after it.
    """
    for key, tensor in stored.items():
        parameter = parameters[key]
        if isinstance(parameter, DTensor):  # fully_shard gathers from storage of its own, so values change hands
            own, other = parameter.to_local(), tensor.to_local()  # type: ignore[attr-defined]
            before = own.clone()
            own.copy_(other)
            other.copy_(before)
        else:
            stored[key], parameter.data = parameter.data, tensor


def _check_fit(parameters: Mapping[str, Parameter], name: str, tensors: Mapping[str, Tensor]) -> None:
    shapes = {key: tuple(p.shape) for key, p in parameters.items()}
    if {key: tuple(t.shape) for key, t in tensors.items()} != shapes:
        raise ValueError(f"the saved weights {name!r} are not this model's; use the model settings of that run")
