"""ZeRO by DeepSpeed: processes share out the optimizer's state, and keep it in the CPU's memory on request.

accelerate's launcher requests DeepSpeed by its environment, which is read here; a request that has no equal is refused.
DeepSpeed then makes the optimizer's step and nothing else. Gradients add up whole in each process and are summed and
clipped as in every run, so processes may have different numbers of microbatches, or none. DeepSpeed's own stage 2
reduces in each backward pass, and would wait for a process that has no more of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.optim import AdamW

from progrpo.config import Config
from progrpo.messages import named, quoted

_AVERAGES = ("exp_avg", "exp_avg_sq")
_INSTEAD = {
    "optimizer": "give optim.lr and the other fields of optim instead",
    "scheduler": "give optim.warmup and optim.decay instead",
    "train_batch_size": "make it auto: it follows from prompts.per_iteration and the plan",
    "train_micro_batch_size_per_gpu": "make it auto and give optim.microbatch",
    "gradient_accumulation_steps": "make it 1 or auto: it follows from optim.microbatch, anew in each step",
}
"""Sections of DeepSpeed's configuration that a configuration of progrpo has fields for."""
_WITHOUT_EFFECT = {
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
_DTYPES: Mapping[str, Literal["bfloat16", "float16"]] = {"bf16": "bfloat16", "fp16": "float16"}
_READ = {"zero_optimization", "gradient_clipping", "bf16", "fp16"}
_BUCKETS = {"allgather_bucket_size", "reduce_bucket_size"}
_OF_SPEED = _BUCKETS | {
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "sub_group_size",
}
"""Settings of the time at which something is sent, which change no number. Those of backward passes do nothing here."""


@dataclass(frozen=True)
class Zero:
    """A request for DeepSpeed. Stage 0 is plain data parallelism, without DeepSpeed."""

    stage: int
    offload: bool = False
    pin_memory: bool = False
    buckets: Mapping[str, int] | None = None
    dtype: Literal["bfloat16", "float16"] | None = None
    """The requested mixed precision, by the name that `model.dtype` has for it."""
    max_grad_norm: float | None = None

    def describe(self, processes: int) -> str:
        """A line for the console."""
        place = " on the CPU" if self.offload else ""
        whole = "; gradients stay whole in each until the step, also in stage 2" if self.stage == 2 else ""
        return f"DeepSpeed: the optimizer's state is shared out among {processes} processes{place}{whole}"


@dataclass(frozen=True)
class _Plugin:
    """The request as accelerate's plugin has it: DeepSpeed's configuration, and the values that are read of it."""

    config: Mapping[str, object]
    zero: Mapping[str, object]
    stage: int
    clip: float | None
    offload: Mapping[str, Mapping[str, object]]
    """The settings of what is offloaded: `optimizer` and `param`."""
    buckets: Mapping[str, int]
    enabled: Mapping[str, bool]
    """Whether each kind of mixed precision is enabled."""

    @classmethod
    def read(cls) -> _Plugin:
        """The plugin of this process' environment. ValueError for one that cannot be read."""
        try:
            config = DeepSpeedPlugin().deepspeed_config
            zero = dict(config["zero_optimization"])
            sizes = {name: _number(zero.get(name, "auto")) for name in _BUCKETS}
            return cls(
                config=config,
                offload={name: dict(zero.pop(f"offload_{name}", None) or {}) for name in ("optimizer", "param")},
                zero=zero,
                stage=int(zero["stage"]),
                clip=_number(config.get("gradient_clipping", "auto")),
                buckets={name: int(size) for name, size in sizes.items() if size is not None},
                enabled={name: str(dict(config.get(name, {})).get("enabled")).lower() == "true" for name in _DTYPES},
            )
        except (ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError, NotImplementedError) as error:
            reason = named(" ".join(str(error).split()))
            raise _refused(f"what cannot be read ({reason})", "mend its deepspeed_config") from error

    def check_settings(self) -> None:
        """ValueError for a section or a setting that has no equal here."""
        for name, value in self.config.items():
            if name in _INSTEAD and value != "auto" and (name, value) != ("gradient_accumulation_steps", 1):
                raise _refused(name if isinstance(value, dict) else f"{name} {quoted(value)}", _INSTEAD[name])
            if name not in {*_INSTEAD, *_WITHOUT_EFFECT, *_READ}:
                raise _refused(f"{named(name)}, which has no equal here", "leave it out")
        for name in self.zero.keys() - {"stage", *_OF_SPEED}:
            if not name.startswith("stage3_"):
                raise _refused(f"zero_optimization.{named(name)}, which has no equal here", "leave it out")
        for name, size in self.buckets.items():
            if size <= 0 or size % 2:
                raise _refused(f"zero_optimization.{name} {size}", "make it auto, or a positive and even number")
        if not 0 <= self.stage <= 2:
            raise _refused(
                f"stage {self.stage}", "take 1 or 2, or share the model out by --model.shard and without DeepSpeed"
            )

    def offloads(self) -> bool:
        """Whether the optimizer is on the CPU. ValueError for another device, and for parameters that are offloaded."""
        device = str(self.offload["param"].get("device") or "none")
        if device != "none":
            raise _refused(
                f"parameters to offload to {device}", "make that none; --model.offload keeps parts on the CPU"
            )
        device = str(self.offload["optimizer"].get("device") or "none")
        if device not in ("none", "cpu"):
            raise _refused(f"the optimizer to offload to {device}", "make that cpu or none")
        if device == "cpu" and self.stage == 0:
            raise _refused("the optimizer to offload in stage 0", "take stage 1")
        return device == "cpu"

    def dtype(self) -> Literal["bfloat16", "float16"] | None:
        """The requested mixed precision; None without one. ValueError for two at once."""
        mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if mixed not in ("no", "bf16", "fp16"):
            raise _refused(f"mixed_precision {named(mixed)}", "take bf16, fp16 or no")
        dtypes = {dtype for name, dtype in _DTYPES.items() if mixed == name or self.enabled[name]}
        if len(dtypes) > 1:
            raise _refused("both fp16 and bf16", "take one of the two")
        return next(iter(dtypes), None)


def requested() -> Zero | None:
    """The request of accelerate's launcher for DeepSpeed; None without one. ValueError for what has no equal here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true", "yes", "on", "y", "t"):
        return None
    plugin = _Plugin.read()
    plugin.check_settings()
    return Zero(
        plugin.stage,
        offload=plugin.offloads(),
        pin_memory=bool(plugin.offload["optimizer"].get("pin_memory")),
        buckets=plugin.buckets,
        dtype=plugin.dtype(),
        max_grad_norm=plugin.clip,
    )


def _number(value: object) -> float | None:
    return None if value == "auto" else float(str(value))


def with_requested_dtype(config: Config, zero: Zero) -> Config:
    """The configuration, with the requested dtype in place of auto. ValueError where it contradicts the request."""
    model, optim = config.model, config.optim
    if zero.dtype is not None and model.dtype == "auto":
        config = replace(config, model=replace(model, dtype=zero.dtype))
    elif zero.dtype not in (None, model.dtype):
        raise _refused(
            f"{zero.dtype}, and model.dtype is {model.dtype}", f"give --model.dtype {zero.dtype}, or mixed_precision no"
        )
    if zero.max_grad_norm not in (None, optim.max_grad_norm):
        raise _refused(
            f"gradient_clipping {zero.max_grad_norm:g}, and optim.max_grad_norm is {optim.max_grad_norm:g}",
            "make it auto, or both the same",
        )
    if zero.stage == 0:
        return config
    if model.shard:
        raise _refused("the optimizer's state to share out, as model.shard does", "take one of the two")
    if optim.name != "adamw":
        raise _refused(f"the state of optim.name {optim.name}, which has no parts", "give --optim.name adamw")
    if find_spec("deepspeed") is None:
        raise ValueError(
            "accelerate launch asks for DeepSpeed, which is not installed: pip install 'progrpo[deepspeed]'"
        )
    return config


def _refused(what: str, instead: str) -> ValueError:
    return ValueError(f"accelerate launch gives DeepSpeed {what}; {instead}")


class PartitionedAdamW(AdamW):
    """AdamW of whole parameters and gradients, alike in all processes, of which each has its part of the averages.

    A step changes the parameters in all processes. The state is saved and loaded whole, as AdamW's own, so that any
    number of processes, with or without DeepSpeed, goes on from it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        zero: Zero,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        import deepspeed

        if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
            raise ValueError(
                "accelerate launch asks for DeepSpeed, which is too old: pip install --upgrade 'progrpo[deepspeed]'"
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        whole = list(parameters)
        super().__init__(whole, lr=lr, betas=betas, weight_decay=weight_decay)
        # torch's own on the CPU, too: fused it uses vector instructions, and nothing has to be compiled
        parts = AdamW(whole, lr=lr, betas=betas, weight_decay=weight_decay, fused=zero.offload or None)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=nn.ParameterList(whole), optimizer=parts, config=_deepspeed_config(zero, whole)
        )
        self._parts = parts
        self._make_state()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for own, parts in zip(self.param_groups, self._parts.param_groups, strict=True):
            parts.update({name: own[name] for name in ("lr", "betas", "eps", "weight_decay")})
        with self._engine.coalesce_grad_reduction():
            pass  # gradients are alike in all processes: at the end of this block each has their mean, for its part
        self._zero.step()

    def _make_state(self) -> None:
        """Make the state before the first step, so that it can be loaded, by a step that changes nothing."""
        (group,) = self.param_groups
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        lr, group["lr"] = group["lr"], 0.0
        self.step()
        self.zero_grad(set_to_none=True)
        group["lr"] = lr
        self._set_steps(torch.tensor(0.0))

    def _set_steps(self, steps: torch.Tensor) -> None:
        for state in self._parts.state.values():
            state["step"].copy_(steps)

    def state_dict(self) -> dict[str, Any]:
        """The state, whole and on the CPU in the main process. The others must ask for it too, and get no averages."""
        from deepspeed.utils import safe_get_full_optimizer_state

        (steps,) = {float(state["step"]) for state in self._parts.state.values()}
        (group,) = self.param_groups
        state: dict[int, dict[str, Any]] = {}
        for i, parameter in enumerate(group["params"]):
            averages = {name: safe_get_full_optimizer_state(parameter, name) for name in _AVERAGES}
            if dist.get_rank() == 0:
                on_cpu = {name: average.cpu() for name, average in averages.items()}
                state[i] = {"step": torch.tensor(steps), **on_cpu}
        return {**super().state_dict(), "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take this process' part of AdamW's whole state. The parameters must have been loaded before."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        (group,) = self.param_groups
        for i, parameter in enumerate(group["params"]):
            safe_set_full_fp32_param(parameter, parameter.detach())
            for name in _AVERAGES:  # a weight that never had a gradient has none
                average = saved[i][name] if i in saved else torch.zeros(parameter.shape)
                safe_set_full_optimizer_state(parameter, average, name)
        self._set_steps(max((state["step"] for state in saved.values()), default=torch.tensor(0.0)))


def _deepspeed_config(zero: Zero, parameters: list[nn.Parameter]) -> dict[str, object]:
    """DeepSpeed's configuration, without its clip, its AdamW for the CPU, and all that acts in backward passes."""
    buckets = {"reduce_bucket_size": 500_000_000, **(zero.buckets or {})}
    buckets["reduce_bucket_size"] = min(buckets["reduce_bucket_size"], sum(p.numel() for p in parameters))
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": zero.pin_memory}} if zero.offload else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "contiguous_gradients": False,
            **buckets,
            **offload,
        },
    }
