"""Operators with one defect each, which the checks must find."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

import torch
from torch import multiprocessing

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference
from cpbench.masks.attn_mask import AttnMask


def _info(name: str, load: Any, **fields: Any) -> OperatorInfo:
    return OperatorInfo(
        name=name, summary="deliberately wrong", source="tests", load=load, **fields
    )


class WrongFarRows(Reference):
    """Right for the first thousand queries, so only a check at size finds it."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, 1000:] *= 1.01
        return out, lse


class ZeroFarKeyGradients(Reference):
    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        dq, dk, dv = super().backward(x, plan)
        dk[:, 1000:] = 0
        return dq, dk, dv


class ScaledTwice(Reference):
    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        dq, dk, dv = super().backward(x, plan)
        return dq * plan.scale, dk, dv


class BaseTwoLse(Reference):
    """lse in base two, as some libraries return it."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return out, lse / 0.6931471805599453


class OneWrongElement(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[0, out.shape[1] // 2, 0, 0] += 0.5 * out.std()
        return out, lse


class NanElement(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[0, 0, 0, 0] = torch.nan
        return out, lse


class WrongOtherHeads(Reference):
    """A constant in all heads but one, beyond a thousand tokens."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, 1000:, 1:] = 7.0
        return out, lse


class ZeroLastTile(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        queries = qkv.q.shape[1]
        if queries > 1000:
            out[:, queries // 128 * 128 :] = 0
        return out, lse


class OneWrongHead(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, :, 3] *= 1.04
        return out, lse


class OverwritesInput(Reference):
    """Overwrites v, so only the first call is right."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        qkv.v.zero_()
        return out, lse


class WrongLaterCalls(Reference):
    """Wrong from the third call at one size on, as a stale buffer would be."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        self.calls += 1
        return (out if self.calls < 4 else out * 0), lse


class AllZero(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return torch.zeros_like(out), lse


class CausalOffByOne(Reference):
    """Does not see the diagonal from row 1024 on."""

    def prepare(self, mask: Any, problem: Any, device: str) -> Any:
        n = mask.seq_q
        if n > 1024:
            rows = [[0, 1024, 0, n, -n, 0], [1024, n, 0, n, -n, -1]]
            mask = AttnMask.from_slices(n, n, rows)
        return super().prepare(mask, problem, device)


class Scaled(Reference):
    """Scales one result, which rounding never does.

    Args:
        tensor: out, dq, dk or dv.
        percent: by which it is too large.
    """

    def __init__(self, tensor: str = "out", percent: int = 2) -> None:
        self.tensor, self.factor = tensor, 1 + percent / 100

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return (out * self.factor if self.tensor == "out" else out), lse

    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        names = ("dq", "dk", "dv")
        grads = super().backward(x, plan)
        return tuple(
            grad * self.factor if name == self.tensor else grad
            for name, grad in zip(names, grads, strict=True)
        )


class CoarseLse(Reference):
    """An lse that is off by as much as bfloat16 is."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return out, lse.bfloat16().float()


class RoundsScores(Reference):
    """Scores, probabilities and results in the dtype of q, as a naive product of matrices has."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        scores = (q @ k.mT) * plan.scale
        hidden = ~torch.as_tensor(plan.mask.to_dense())
        scores.masked_fill_(hidden, -torch.inf)
        out = scores.softmax(-1) @ v
        return out.transpose(1, 2), torch.logsumexp(scores.float(), -1)


class ChangesCalls(Reference):
    """Right until the call with number ``first`` at one size, and after ``last``.

    Args:
        how: what is wrong in the calls between: reversed, zeros (a sixtieth of the rows), rubbish,
            or coarse (rounded as bfloat16 is not, below any limit of errors).
    """

    def __init__(self, how: str, first: int = 4, last: int = 1 << 30) -> None:
        self.how, self.first, self.last = how, first, last
        self.calls: dict[int, int] = {}

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        tokens = out.shape[1]
        call = self.calls[tokens] = self.calls.get(tokens, 0) + 1
        if self.first <= call <= self.last:
            if self.how == "reversed":
                out = out.flip(1)
            elif self.how == "zeros":
                out[:, tokens // 2 : tokens // 2 + tokens // 60] = 0
            elif self.how == "rubbish":
                out = torch.randn_like(out)
            else:
                out = out * (1 + 1e-3 * torch.randn_like(out))
        return out, lse


class PreviousGradients(Reference):
    """Returns the gradients of the previous call at this size, from the third call on."""

    def __init__(self) -> None:
        self.kept: dict[int, list[Any]] = {}

    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        kept = self.kept.setdefault(x.q.shape[1], [])
        kept.append(super().backward(x, plan))
        return kept[-1] if len(kept) < 3 else kept[-2]


class SecondPlan(Reference):
    """Wrong with every plan at the measured size but the first."""

    plans = 0

    def prepare(self, mask: Any, problem: Any, device: str) -> Any:
        if mask.seq_q > 1000:
            SecondPlan.plans += 1
        return super().prepare(mask, problem, device), SecondPlan.plans

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan[0])
        return (out * 1.5 if plan[1] > 1 else out), lse


class Memoised(Reference):
    """Computes once for each set of addresses, or of addresses and first elements.

    Args:
        peek: whether to look at the first elements.
    """

    def __init__(self, peek: int = 0) -> None:
        self.peek, self.known = peek, dict[Any, Any]()

    def forward(self, qkv: QKV, plan: Any) -> Any:
        key = tuple((x.data_ptr(), float(x[0, 0, 0, 0]) if self.peek else 0) for x in qkv)
        if key not in self.known:
            self.known[key] = super().forward(qkv, plan)
        out, lse = self.known[key]
        return out.clone(), lse.clone()


class KeepsProbabilities(Reference):
    """Keeps the probabilities of the first call with these addresses; only v is looked at again."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def forward(self, qkv: QKV, plan: Any) -> Any:
        key = (qkv.q.data_ptr(), qkv.q.shape)
        if key not in self.known:
            self.known[key] = (qkv.q.clone(), qkv.k.clone())
        q, k = self.known[key]
        return super().forward(QKV(q, k, qkv.v), plan)


class LastPair(Reference):
    """Wrong in the last head of the last batch beyond a thousand tokens, where indices overflow."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[-1, 1000:, -1] = 1.0
        return out, lse


class BadTile(Reference):
    """Rubbish in one tile of 128 rows of one head, or of one result.

    Args:
        tensor: out, dq, dk or dv.
    """

    def __init__(self, tensor: str = "out") -> None:
        self.tensor = tensor

    def _spoil(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name == self.tensor and x.shape[1] > 1000:
            x[0, 640:768, 1] = x[0, 640:768, 1].flip(0)
        return x

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return self._spoil("out", out), lse

    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        grads = zip(("dq", "dk", "dv"), super().backward(x, plan), strict=True)
        return tuple(self._spoil(name, grad) for name, grad in grads)


class Unlike(Reference):
    """Breaks the contract of results.

    Args:
        how: float64, transposed, half_lse, or lazy (a subclass of Tensor).
    """

    def __init__(self, how: str) -> None:
        self.how = how

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        if self.how == "float64":
            return out.double(), lse
        if self.how == "transposed":
            return out.transpose(1, 2), lse
        if self.how == "half_lse":
            return out, lse.bfloat16()
        return out.as_subclass(LazyTensor), lse


class LazyTensor(torch.Tensor):
    """A tensor that could compute when it is looked at."""


class OtherProcess(Reference):
    """Computes in a process of its own, whose processor time is nobody's."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = _process().apply(_compute, (*qkv, plan))
        return out, lse


def _compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
    return Reference().forward(QKV(q, k, v), plan)


@functools.cache
def _process() -> Any:
    return multiprocessing.get_context("fork").Pool(1)


class FinishesLater(Reference):
    """Returns at once and fills its results in another thread, soon enough for all who look."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        if qkv.q.shape[1] < 1000:
            return super().forward(qkv, plan)
        b, s, h, _ = qkv.q.shape
        results = torch.empty_like(qkv.q), torch.empty(b, h, s)
        compute = super().forward

        def fill() -> None:
            for result, value in zip(results, compute(qkv, plan), strict=True):
                result.copy_(value)

        thread = threading.Thread(target=fill)
        thread.start()
        if not _is_timed():
            thread.join()
        return results


def _is_timed() -> bool:
    """Whether a timer is running, by the names of the callers."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "time_us":
            return True
        frame = frame.f_back
    return False


class Noisy(Reference):
    """Errors within limits that are far larger beyond a thousand tokens."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        if out.shape[1] > 1000:
            noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
            out = (out.float() * (1 + 1.2e-2 * noise.clamp(-1.5, 1.5))).to(out.dtype)
        return out, lse


far_rows = _info("far_rows", WrongFarRows)
far_keys = _info("far_keys", ZeroFarKeyGradients)
scales_twice = _info("scales_twice", ScaledTwice)
log_two = _info("log_two", BaseTwoLse)
one_element = _info("one_element", OneWrongElement)
not_a_number = _info("not_a_number", NanElement)
other_heads = _info("other_heads", WrongOtherHeads)
last_tile = _info("last_tile", ZeroLastTile)
one_head = _info("one_head", OneWrongHead)
overwrites = _info("overwrites", OverwritesInput)
when_watched = _info("when_watched", WrongLaterCalls)
native = OperatorInfo(
    name="native",
    summary="full and causal only",
    source="tests",
    load=Reference,
    masks=("empty", "full", "causal"),
)
right = _info("right", Reference)
all_zero = _info("all_zero", AllZero)
off_by_one = _info("off_by_one", CausalOffByOne)
scaled = _info("scaled", Scaled, params=("tensor", "percent"))
coarse_lse = _info("coarse_lse", CoarseLse)
rounds_scores = _info("rounds_scores", RoundsScores, backward_on=())
says_it_rounds = _info("says_it_rounds", RoundsScores, backward_on=(), rounds_scores=True)
changes = _info("changes", ChangesCalls, params=("how", "first", "last"))
any_bits = _info("any_bits", ChangesCalls, params=("how", "first", "last"), deterministic=False)
previous_gradients = _info("previous_gradients", PreviousGradients)
second_plan = _info("second_plan", SecondPlan)
memoised = _info("memoised", Memoised, params=("peek",))
keeps_probabilities = _info("keeps_probabilities", KeepsProbabilities)
last_pair = _info("last_pair", LastPair)
bad_tile = _info("bad_tile", BadTile, params=("tensor",))
unlike = _info("unlike", Unlike, params=("how",))
other_process = _info("other_process", OtherProcess)
noisy = _info("noisy", Noisy)
finishes_later = _info("finishes_later", FinishesLater)
