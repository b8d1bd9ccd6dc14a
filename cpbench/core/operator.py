"""The contract of attention operators.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim of
queries and keys, Dv head dim of values (D, unless a problem says otherwise).

An operator works on the tensors of one device.  The ``out`` and ``lse`` that ``backward`` takes may
be the *global* ones of a distributed computation of which the operator computes a part: with P =
exp(scores - lse) and delta = sum(dout * out), the gradients of the parts add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cpbench.core.environment import interpreting
from cpbench.core.registry import OperatorInfo, StrategyInfo, missing_package

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

    OutLse = tuple[torch.Tensor, torch.Tensor | None]
    Gradients = tuple[torch.Tensor, ...]  # dq, dk, dv; of mixers also those of their other inputs


class Unsupported(ValueError):
    """The operator or strategy does not support the problem or device; the message says why."""


class QKV(NamedTuple):
    """The inputs of attention: q ``[B, S, H, D]``; k ``[B, T, G, D]``; v ``[B, T, G, Dv]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> QKV:
        """The tensors named ``"q"``, ``"k"`` and ``"v"``."""
        return cls(tensors["q"], tensors["k"], tensors["v"])


class MixerInputs(NamedTuple):
    """The inputs of a sequence mixer.

    Attributes:
        q, k: ``[B, S, H, K]``; v: ``[B, S, H, V]``.
        g: log decay, ``[B, S, H]`` or ``[B, S, H, K]``; None for a mixer that takes none.
        beta: ``[B, S, H]``; None for a mixer that takes none.
        initial_state: ``[B, H, K, V]``, the same on all ranks; None for 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None
    initial_state: torch.Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> MixerInputs:
        """The tensors of these names, of which all but q, k and v may be missing."""
        return cls(*(tensors.get(name) for name in cls._fields))  # type: ignore[arg-type]

    @property
    def given(self) -> tuple[torch.Tensor, ...]:
        """Those that are there, in order."""
        return tuple(x for x in self if x is not None)

    @property
    def by_token(self) -> MixerInputs:
        """Those that have a row for each token: without the initial state."""
        return self._replace(initial_state=None)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MixerInputs:
        """The results of a function of each that is there."""
        return MixerInputs(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def tokens(self, start: int, stop: int) -> MixerInputs:
        """Those of consecutive tokens, without the initial state."""
        return self.by_token.map(lambda x: x[:, start:stop])

    def with_decays(self, decays: torch.Tensor | None) -> MixerInputs:
        """These with the log decays ``[H]`` of a mixer that has its own, where no g is given."""
        if decays is None or self.g is not None:
            return self
        return self._replace(g=decays.expand(self.q.shape[:3]))

    def gradients(self, grads: MixerInputs) -> tuple[torch.Tensor, ...]:
        """Of the gradients of all inputs, those of the given ones, in order."""
        pairs = zip(self, grads, strict=True)
        return tuple(grad for x, grad in pairs if x is not None and grad is not None)

    def named(self, grads: Sequence[torch.Tensor]) -> MixerInputs:
        """The inverse of :meth:`gradients`: None for inputs that are not given."""
        remaining = iter(grads)
        return MixerInputs(*(None if x is None else next(remaining) for x in self))  # type: ignore[arg-type]


class MixerBackwardInputs(NamedTuple):
    """The inputs of a mixer's backward pass.

    Attributes:
        dout: ``[B, S, H, V]``, the gradient of ``out``.
        inputs: of the forward pass.
        out, state: what it returned.
        dstate: ``[B, H, K, V]``, the gradient of the state; None for 0, as in every timed pass.
    """

    dout: torch.Tensor
    inputs: MixerInputs
    out: torch.Tensor
    state: torch.Tensor | None
    dstate: torch.Tensor | None = None


class BackwardInputs(NamedTuple):
    """The inputs of a backward pass.

    Attributes:
        dout: ``[B, S, H, Dv]``, the gradient of ``out``.
        q, k, v: of the forward pass.
        out: ``[B, S, H, Dv]``; lse: ``[B, H, S]`` float32.  Both may be the global ones of a
            distributed computation; lse is None for operators that declare to return none.
    """

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @property
    def qkv(self) -> QKV:
        return QKV(self.q, self.k, self.v)


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of states and of all that is computed: float32, but for float64."""
    import torch

    return torch.float64 if x.dtype == torch.float64 else torch.float32


def nothing_visible(q: torch.Tensor, value_dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of fully masked queries: zeros and -inf.

    Args:
        value_dim: Dv; 0 for that of q.
    """
    import torch

    b, s, h, d = q.shape
    lse = torch.full((b, h, s), -torch.inf, dtype=torch.float32, device=q.device)
    return q.new_zeros((b, s, h, value_dim or d)), lse


def zero_gradients(qkv: QKV) -> Gradients:
    """Return the gradients of fully masked queries: zeros."""
    import torch

    return torch.zeros_like(qkv.q), torch.zeros_like(qkv.k), torch.zeros_like(qkv.v)


class Operator(Protocol):
    """An attention operator.  All tensors are on one device, in ``problem.dtype``.

    A sequence mixer has the same methods, and ``flops(problem)``: ``forward`` takes a
    :class:`MixerInputs` and returns out ``[B, S, H, V]`` and the last state ``[B, H, K, V]``;
    ``backward`` takes a :class:`MixerBackwardInputs` and returns a gradient for each input that
    is given.  Gates and states are in ``problem.gate_dtype``.  A method ``bind(problem, device)``
    returns its functions of runs of tokens, a ``cpbench.parallel.mixing.BoundMixer``, if it has
    them; ``decays(problem, device)``, the log decays ``[H]`` of one that has its own.

    An operator whose backward pass needs more of the forward pass than out and lse has an attribute
    ``states``, a :class:`~cpbench.core.output_state.OutputStates`.
    """

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        """Return why this case is not supported, and what to do instead; None if it is."""
        ...

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Any:
        """Return an immutable plan, independent of q, k and v; timed separately and reused."""
        ...

    def forward(self, qkv: QKV, plan: Any) -> OutLse:
        """Compute attention.

        Args:
            qkv: any strides with a contiguous last axis.

        Returns:
            out ``[B, S, H, Dv]`` in the dtype of q, 0 for a fully masked query; lse ``[B, H, S]``
            float32, natural logarithm, -inf for such a query (None if the declaration says so:
            ``mergeable``, ``lse_on``).
        """
        ...

    def backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        """Compute dq, dk and dv, in the shapes and dtypes of q, k and v.

        Rows whose lse is -inf contribute nothing, and their dq is 0.
        """
        ...


def is_deterministic(info: OperatorInfo, impl: Operator, problem: Problem, device: str) -> bool:
    """Whether two runs of an implementation are bitwise equal: what its method of this name says,
    for one that depends on the device or computes with another operator, else as declared."""
    method = getattr(impl, "is_deterministic", None)
    return info.deterministic if method is None else bool(method(problem, device))


def declared_refusal(info: OperatorInfo, problem: Problem, device: str) -> str | None:
    """Return why the declaration excludes a problem under any mask; None if it does not.

    Imports neither torch nor the modules of the operator, for use in parent processes.
    """
    if device not in info.devices:
        return f"{info.name} runs on {' and '.join(info.devices)}, not on {device}"
    if device in info.interpreted_on and not interpreting():
        return (
            f"{info.name} has no compiler for {device}; set TRITON_INTERPRET=1 to check it there "
            "under Triton's interpreter (slow)"
        )
    missing = missing_package(info)
    if missing is not None:
        how = f": {info.install}" if info.install else ""
        return f"{info.name} needs the Python package {missing}, which is not installed{how}"
    return declared_limits(info, problem, device)


def declared_limits(info: OperatorInfo, problem: Problem, device: str) -> str | None:
    """Return :func:`declared_refusal`, but as if all requirements were installed."""
    if device not in info.devices:
        return f"{info.name} runs on {' and '.join(info.devices)}, not on {device}"
    if problem.dtype not in info.dtypes:
        return f"{info.name} takes {', '.join(info.dtypes)}, not {problem.dtype}"
    largest = max(problem.head_dim, problem.value_dim)
    if largest > info.max_head_dim:
        return f"{info.name} takes head_dim up to {info.max_head_dim}, not {largest}"
    if reason := value_dims_refusal(info, problem):
        return reason
    if info.mixer and problem.heads_q != problem.heads_kv:
        return (
            f"{info.name} is a sequence mixer, with as many key/value heads as query heads, not "
            f"{problem.heads_kv} for {problem.heads_q}"
        )
    if info.mixer and problem.initial_state and not info.initial_states:
        return f"{info.name} starts from a state of 0; use inputs without initial=true"
    if info.paged and not problem.page_size:
        return f"{info.name} decodes over pages; use phase decode"
    if problem.backward and device not in info.backward_on:
        return f"{info.name} has no backward pass on {device}; use direction fwd"
    if problem.deterministic and not info.deterministic:
        return f"{info.name} is not deterministic"
    if problem.softcap:
        return "softcap is not built yet; use 0"
    return None


def value_dims_refusal(info: OperatorInfo | StrategyInfo, problem: Problem) -> str | None:
    """Return why a declaration excludes the head dimension of the values; None if it does not."""
    if problem.head_dim_v and not info.value_dims:
        return (
            f"{info.name} takes values of the head_dim of queries and keys, not "
            f"{problem.head_dim_v} beside {problem.head_dim}"
        )
    return None
