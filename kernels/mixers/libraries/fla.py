"""Operators `fla.*`: the sequence mixers of flash-linear-attention, in its package fla-core.

`fla.ssd` and so on are its Triton kernels, which take documents; `fla.naive_ssd` and so on its
functions in plain torch, which run on any device, document by document.  What these do not return
(the state of `naive_linear` and `naive_retention`) is not checked.

Written against fla/ops of fla-core 0.6.0.  The functions in torch were run; its kernels never.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import Limits
from cpbench.kernels.mixers import forms
from cpbench.kernels.mixers.libraries.adapter import (
    LibraryMixer,
    Plan,
    by_document,
    default_scale_refusal,
)

if TYPE_CHECKING:
    from cpbench.core.operator import MixerInputs, OutLse
    from cpbench.core.problem import Problem

VERSION = "fla-core 0.6.0"
INSTALL = 'pip install "cpbench[mixer-peers]"'
HALF = ("bfloat16", "float16")
LARGEST_POWER = 128  # of 2 in float32


@dataclass(frozen=True)
class Function:
    """A function of the library.

    Attributes:
        module, name: where it is, below ``fla.ops``.
        gate: the name of its log decay.
        fixed: arguments that are always the same.
        scaled: whether it takes a scale; else it is ``K ** -0.5``.
        has_state: whether it returns the last state if asked to.
        returns_pair: whether it returns a tuple of out and something.
        heads_first: whether tensors are ``[B, H, S, …]``.
        multiple: of tokens.
        dtypes: that it takes.
    """

    module: str
    name: str
    gate: str = "g"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = True
    has_state: bool = True
    returns_pair: bool = True
    heads_first: bool = False
    multiple: int = 1
    dtypes: tuple[str, ...] = ("float32", *HALF)

    def arguments(self, x: MixerInputs, scale: float) -> dict[str, Any]:
        """The arguments of a call by name."""
        tensors = {name: y for name, y in x._asdict().items() if y is not None}
        if self.heads_first:
            tensors = {name: y.transpose(1, 2) for name, y in tensors.items()}
        if "g" in tensors:
            tensors[self.gate] = tensors.pop("g")
        more = {"scale": scale} if self.scaled else {}
        return {**tensors, **more, **self.fixed}

    def load(self) -> Any:
        return getattr(importlib.import_module(f"fla.ops.{self.module}"), self.name)


NAIVE = {
    "linear": Function(
        "linear_attn.naive", "naive_chunk_linear_attn", has_state=False, returns_pair=False,
        multiple=64, dtypes=("float32",),
    ),
    "retention": Function(
        "retention.naive", "naive_retention", scaled=False, has_state=False, returns_pair=False,
        heads_first=True,
    ),
    "ssd": Function("simple_gla.naive", "naive_chunk_simple_gla"),
    "gla": Function("gla.naive", "naive_recurrent_gla", gate="gk", scaled=False),
    "deltanet": Function(
        "delta_rule.naive", "delta_rule_chunkwise", scaled=False, heads_first=True, multiple=32,
        dtypes=("float32",),
    ),
    "gated_deltanet": Function("gated_delta_rule.naive", "naive_chunk_gated_delta_rule"),
    "kda": Function("kda.naive", "naive_chunk_kda", multiple=64),
}  # fmt: skip
KERNELS = {
    "linear": Function("linear_attn", "chunk_linear_attn", fixed={"normalize": False}),
    "retention": Function("retention", "chunk_retention"),
    "ssd": Function("simple_gla", "chunk_simple_gla"),
    "gla": Function("gla", "chunk_gla"),
    "deltanet": Function("delta_rule", "chunk_delta_rule"),
    "gated_deltanet": Function("gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": Function("kda", "chunk_kda"),
}


class NaiveMixer(LibraryMixer):
    """A function of the library in plain torch, on one document at a time.

    Args:
        mixer: the recurrence.
    """

    def __init__(self, mixer: str) -> None:
        super().__init__(f"fla.naive_{mixer}", mixer)
        self._function = NAIVE[mixer]

    def refusal(self, problem: Problem, lengths: tuple[int, ...]) -> str | None:
        if self.form.name == "retention" and max(lengths) > _most_retained():
            return (
                f"overflows float32 from {_most_retained() + 1} tokens of a document on, and one "
                f"has {max(lengths)}"
            )
        return None if self._function.scaled else default_scale_refusal(problem)

    def call(self, x: MixerInputs, plan: Plan) -> OutLse:
        function, one = self._function, self._function.load()
        wants_state = function.has_state and self.form.name != "deltanet"  # which always returns it

        def call(tokens: MixerInputs) -> OutLse:
            arguments = function.arguments(tokens, plan.scale)
            found = one(**arguments, **({"output_final_state": True} if wants_state else {}))
            out, state = found if function.returns_pair else (found, None)
            return (out.transpose(1, 2) if function.heads_first else out), state

        return by_document(call, x, plan, function.multiple)


class KernelMixer(LibraryMixer):
    """The Triton kernels of the library.

    Args:
        mixer: the recurrence.
    """

    limits = Limits(min_capability=(8, 0), head_dim_multiple=16, max_head_dim=256)

    def __init__(self, mixer: str) -> None:
        super().__init__(f"fla.{mixer}", mixer)
        self._function = KERNELS[mixer]

    def refusal(self, problem: Problem, lengths: tuple[int, ...]) -> str | None:
        return self.limits.refusal(problem)

    def call(self, x: MixerInputs, plan: Plan) -> OutLse:
        import torch

        batch, packed = len(x.q), len(plan.lengths) > 1
        given = {"output_final_state": True}
        if packed:  # documents of all sequences, one after another
            ends = itertools.accumulate(plan.lengths * batch, initial=0)
            cu_seqlens = torch.tensor(list(ends), dtype=torch.int64, device=x.q.device)
            given["cu_seqlens"] = cu_seqlens  # type: ignore[assignment]
            x = x.map(lambda y: y.flatten(0, 1).unsqueeze(0))
        else:
            x = x.map(torch.Tensor.contiguous)
        out, state = self._function.load()(**self._function.arguments(x, plan.scale), **given)
        if not packed:
            return out, state
        last = state[len(plan.lengths) - 1 :: len(plan.lengths)]  # of each sequence
        return out.squeeze(0).unflatten(0, (batch, -1)), last


def _most_retained() -> int:
    """The most tokens for which `naive_retention` is finite: it raises the largest decay to the
    power of minus their distance before it masks these pairs."""
    return 1 + math.floor(LARGEST_POWER / -math.log2(1 - 2.0**-5))


def _declare(mixer: str, naive: bool) -> OperatorInfo:
    form = forms.FORMS[mixer]
    function = (NAIVE if naive else KERNELS)[mixer]
    common: dict[str, Any] = {
        "source": f"flash-linear-attention, {function.name} of {VERSION}",
        "masks": ("causal", "causal_document"),
        "value_dims": True,
        "external_lse": False,
        "mergeable": False,
        "lse_on": (),
        "mixer": mixer,
        "gates": forms.gates(form),
        "install": INSTALL,
    }
    if naive:
        return OperatorInfo(
            name=f"fla.naive_{mixer}",
            summary=f"fla's {form.name} in plain torch",
            load=functools.partial(NaiveMixer, mixer),
            dtypes=function.dtypes,
            requires=("torch", "fla"),
            **common,
        )
    return OperatorInfo(
        name=f"fla.{mixer}",
        summary=f"fla's {form.name}, Triton kernels",
        load=functools.partial(KernelMixer, mixer),
        dtypes=HALF,
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "triton", "fla"),
        rounds_states=True,
        unproven=VERSION,
        **common,
    )


OPERATORS = tuple(_declare(mixer, naive) for mixer in KERNELS for naive in (False, True))
