"""Copies of an object that holds networks, at a quarter of the time of `copy.deepcopy`."""

from __future__ import annotations

import copy
import pickle
from io import BytesIO
from types import FunctionType
from typing import Any, Generic, TypeVar
from weakref import ReferenceType

from torch import Tensor

T = TypeVar("T")
_SHARED = (FunctionType, ReferenceType)
"""Types whose objects `copy.deepcopy` does not copy either."""


class Copies(Generic[T]):
    """An object, pickled once and read again for each copy. Tensors are copied as `copy.deepcopy` copies them."""

    def __init__(self, original: T) -> None:
        file = BytesIO()
        writer = _Writer(file, pickle.HIGHEST_PROTOCOL)
        writer.dump(original)
        self._pickled, self._apart = file.getvalue(), writer.apart

    def new(self) -> T:
        copied: T = _Reader(BytesIO(self._pickled), self._apart).load()
        return copied


class _Writer(pickle.Pickler):
    """A pickler that keeps tensors and functions apart, and writes their places in `apart`."""

    def __init__(self, file: BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.apart: list[Any] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, (Tensor, *_SHARED)):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.apart)
            self.apart.append(obj)
        return self._places[id(obj)]


class _Reader(pickle.Unpickler):
    """An unpickler that puts a copy of each tensor in its places, and each function itself."""

    def __init__(self, file: BytesIO, apart: list[Any]) -> None:
        super().__init__(file)
        self._apart = apart
        self._memo: dict[int, Any] = {}  # tensors that share memory share it in the copy

    def persistent_load(self, place: int) -> Any:
        obj = self._apart[place]
        return obj if isinstance(obj, _SHARED) else copy.deepcopy(obj, self._memo)
