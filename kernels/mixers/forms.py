"""The mixers by name: which recurrence each one is, and which are none.

Per head, token t updates a state S ``[K, V]`` and reads it:

    S <- (I - beta_t k_t k_t^T) Diag(exp g_t) S + beta_t k_t v_t^T,    out_t = S^T q_t

Mixers without the delta rule leave out ``I - beta k k^T`` and beta; ``g`` is one number per head
(``"scalar"``), one per key dimension (``"diagonal"``), or 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cpbench.core.registry import NOT_AFFINE, check_params
from cpbench.core.spec import Spec

if TYPE_CHECKING:
    from cpbench.core.problem import Problem

CHUNK = 64  # tokens computed as one matrix product
TRITON_CHUNK = 32  # more spill registers (cpbench compile --operator mixers)
KERNELS = ("torch", "triton")
LARGEST_CHUNK = 1 << 16
FAST_WEIGHT_CHUNK = 512  # of In-Place test-time training, where it is part of the definition


@dataclass(frozen=True, kw_only=True)
class Form:
    """The recurrence of a mixer.

    Attributes:
        name, summary, source: for people.
        gate: kind of decay: None for none.
        delta: whether the delta rule applies, with beta.
        lagging: whether a token reads the state at the start of its chunk, not its own update: then
            the chunk is part of the definition, and every document starts from the initial state.
        default_gate: whether it has decays of its own where no g is given.
        chunk: tokens of a chunk.
    """

    name: str
    summary: str
    source: str
    gate: Literal["scalar", "diagonal"] | None = None
    delta: bool = False
    lagging: bool = False
    default_gate: bool = False
    chunk: int = CHUNK


FORMS = {
    form.name: form
    for form in (
        Form(
            name="linear",
            summary="linear attention without normaliser",
            source="Katharopoulos et al. 2020, Transformers are RNNs",
        ),
        Form(
            name="retention",
            summary="a fixed decay per head, 1 - 2^(-5-h)",
            source="Sun et al. 2023, Retentive Network",
            gate="scalar",
            default_gate=True,
        ),
        Form(
            name="ssd",
            summary="a decay per head and token (Mamba-2: q = C, k = B, v = dt x, g = dt A)",
            source="Dao and Gu 2024, Transformers are SSMs",
            gate="scalar",
        ),
        Form(
            name="gla",
            summary="a decay per key dimension and token",
            source="Yang et al. 2024, Gated Linear Attention",
            gate="diagonal",
        ),
        Form(
            name="deltanet",
            summary="the delta rule",
            source="Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule",
            delta=True,
        ),
        Form(
            name="gated_deltanet",
            summary="the delta rule and a decay per head and token",
            source="Yang et al. 2025, Gated Delta Networks",
            gate="scalar",
            delta=True,
        ),
        Form(
            name="kda",
            summary="the delta rule and a decay per key dimension and token",
            source="Kimi Team 2025, Kimi Linear",
            gate="diagonal",
            delta=True,
        ),
        Form(
            name="ttt",
            summary="fast weights: a token reads the state at the start of its chunk",
            source="Feng et al. 2026, In-Place Test-Time Training",
            lagging=True,
            chunk=FAST_WEIGHT_CHUNK,
        ),
    )
}


def parse(mixer: Spec | str) -> tuple[Form, int, str]:
    """The form of a mixer, its tokens per chunk, and what computes it: ``"torch"`` or ``"triton"``;
    from ``"gla"`` or ``"ssd:chunk=16,kernel=triton"``.

    Raises:
        ValueError: for an unknown name or parameter, a chunk that is no power of two, and memories
            that are not affine in their state, with the reason.
    """
    spec = Spec.parse(mixer)
    if spec.name in NOT_AFFINE:
        raise ValueError(f"{spec.name} is not a mixer: {NOT_AFFINE[spec.name]}")
    if spec.name not in FORMS:
        raise ValueError(f"no mixer {spec.name!r}; there are: {', '.join(FORMS)}")
    form = FORMS[spec.name]
    check_params("mixer", spec.name, spec.kwargs, ("chunk", "kernel"))
    kernel = spec.kwargs.get("kernel", "torch")
    if kernel not in KERNELS:
        raise ValueError(f"{form.name}: kernel = {kernel!r} is not one of {', '.join(KERNELS)}")
    chunk = spec.kwargs.get("chunk", TRITON_CHUNK if kernel == "triton" else form.chunk)
    if type(chunk) is not int or not 1 <= chunk <= LARGEST_CHUNK:
        raise ValueError(f"{form.name}: chunk = {chunk!r} must be an integer from 1 to 65536")
    if chunk & (chunk - 1) and not form.lagging:
        raise ValueError(f"{form.name}: chunk = {chunk} must be a power of two")
    return form, chunk, str(kernel)


def gates(form: Form) -> tuple[tuple[str, Literal["head", "key"]], ...]:
    """The gates that an operator of a form takes, as it declares them: none that the form has."""
    found: tuple[tuple[str, Literal["head", "key"]], ...] = ()
    if form.gate is not None and not form.default_gate:
        found += (("g", "key" if form.gate == "diagonal" else "head"),)
    return (*found, ("beta", "head")) if form.delta else found


def flops(form: Form, tokens: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """FLOPs of the forward and the backward pass of one head over ``tokens`` (of all sequences).

    Those of the recurrence, in products of 2 K V a token; what chunks multiply besides depends on
    their size and is not counted.  Forward: a token updates a state and reads it, and reads it once
    more under the delta rule.  Backward: the states again (1, 2 under the delta rule), and dq, dk,
    dv and dS (4; the read of the delta rule adds one to dk and one to dS).
    """
    forward, backward = (6, 16) if form.delta else (4, 10)
    return {
        "fwd": forward * tokens * key_dim * value_dim,
        "bwd": backward * tokens * key_dim * value_dim,
    }


def step_flops(form: Form, step: str, tokens: int, key_dim: int, value_dim: int) -> int:
    """FLOPs of a step of a scan on one head over ``tokens``, counted as in :func:`flops`.

    ``output`` and ``backward`` are the passes.  A summary only updates the state, and reads it
    under the delta rule; that it also passes a transition there is left out against the inverses
    that ``output`` then has.  A response only reads, under the delta rule twice; so does
    ``summarise_back``.
    """
    whole = flops(form, tokens, key_dim, value_dim)
    part = 2 * tokens * key_dim * value_dim * (2 if form.delta else 1)
    return {
        "output": whole["fwd"],
        "backward": whole["bwd"],
        "summarise": part,
        "respond": part,
        "summarise_back": part,
    }[step]


def problem_flops(form: Form, problem: Problem) -> dict[str, int]:
    """:func:`flops` of all heads and sequences of a problem."""
    tokens = problem.batch * problem.seq_q
    one = flops(form, tokens, problem.head_dim, problem.value_dim)
    return {phase: count * problem.heads_q for phase, count in one.items()}


def parity_tokens(form: Form, key_dim: int, value_dim: int) -> float:
    """The length from which a mixer takes fewer FLOPs than causal attention, forward: its 2 (K + V)
    for each of S (S + 1) / 2 pairs."""
    per_token = flops(form, 1, key_dim, value_dim)["fwd"]
    return per_token / (key_dim + value_dim) - 1
