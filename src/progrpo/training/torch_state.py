"""The global state of torch that a run needs, whatever its caller left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Run the block, or the decorated function, with gradients, float32 and the CPU as defaults, and without autocast.

    A notebook may be in `no_grad`, `inference_mode` or `autocast`, or have set another default dtype or device. All of
    that is restored after the block.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
