"""Mixers for tests, independent of the package: the recurrence in float64, under autograd, and
inputs whose gates and betas make errors visible."""

from __future__ import annotations

import math

import naive
import torch

NAMES = ("linear", "retention", "ssd", "gla", "deltanet", "gated_deltanet", "kda", "ttt")
SCALAR, DIAGONAL = ("retention", "ssd", "gated_deltanet"), ("gla", "kda")
DELTA = ("deltanet", "gated_deltanet", "kda")
TENSORS = ("q", "k", "v", "g", "beta", "initial_state")

Named = dict[str, torch.Tensor]


def make_inputs(
    mixer: str,
    batch: int,
    tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Named:
    """Inputs of a mixer by name; of those that it takes.

    Half-lives grow from 16 tokens to 64 sequences over heads, but for the last, whose gates are of
    10 to 30 nats a token.  Betas of every other head are small, so that its states reach far.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    shape = (batch, tokens, heads)
    x = {
        "q": normal(*shape, key_dim),
        "k": torch.nn.functional.normalize(normal(*shape, key_dim), dim=-1),
        "v": normal(*shape, value_dim),
    }
    if mixer in SCALAR + DIAGONAL:
        lengths = torch.linspace(math.log(16), math.log(64 * tokens + 16), heads - 1).double().exp()
        nats = torch.cat([math.log(2) / lengths, torch.tensor([20.0])])
        extent = (*shape, key_dim) if mixer in DIAGONAL else shape
        spread = 0.5 + torch.rand(*extent, generator=random, dtype=torch.float64)
        x["g"] = -spread * (nats[:, None] if mixer in DIAGONAL else nats)
    if mixer in DELTA:
        most = torch.tensor([2.0 if head % 2 == 0 else 0.05 for head in range(heads)])
        x["beta"] = most * torch.rand(*shape, generator=random, dtype=torch.float64)
    x = {name: y.to(dtype) for name, y in x.items()}
    x["initial_state"] = normal(batch, heads, key_dim, value_dim).to(state_dtype(dtype))
    for name in ("g", "beta"):
        if name in x:
            x[name] = x[name].to(state_dtype(dtype))
    return x


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrence(
    x: Named, mixer: str, scale: float, starts: tuple[int, ...] = (0,), chunk: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the last state, token by token, from the definition of each mixer.

    Args:
        starts: first tokens of documents.
        chunk: of ``ttt``, counted from the start of each document.
    """
    x = {name: y.double() for name, y in x.items()}
    q, k, v, given = (x[name] for name in ("q", "k", "v", "initial_state"))
    identity = torch.eye(k.shape[3], dtype=torch.float64)
    state, outs = given, []
    for t in range(q.shape[1]):
        if t in starts:
            start = t
            state = given if t == 0 or mixer == "ttt" else torch.zeros_like(given)
        if mixer == "ttt" and (t - start) % chunk == 0:
            weights = state
        column, row = k[:, t, :, :, None], v[:, t, :, None, :]
        if "g" in x:
            alpha = x["g"][:, t].exp()
            diagonal = (
                torch.diag_embed(alpha) if alpha.ndim == 3 else alpha[..., None, None] * identity
            )
            state = diagonal @ state
        if "beta" in x:
            beta = x["beta"][:, t, :, None, None]
            state = (identity - beta * column @ column.mT) @ state + beta * column @ row
        else:
            state = state + column @ row
        seen = weights if mixer == "ttt" else state
        outs.append(scale * (seen.mT @ q[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outs, 1), state


def gradients(
    x: Named,
    mixer: str,
    scale: float,
    dout: torch.Tensor,
    dstate: torch.Tensor,
    starts: tuple[int, ...] = (0,),
    chunk: int = 512,
) -> tuple[Named, torch.Tensor, torch.Tensor]:
    """Gradients by name, out and the last state."""
    leaves = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    out, state = recurrence(leaves, mixer, scale, starts, chunk)
    found = torch.autograd.grad(
        (out, state),
        tuple(leaves.values()),
        (dout.double(), dstate.double()),
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True)), out.detach(), state.detach()


def head_errors(found: torch.Tensor, wanted: torch.Tensor, axis: int) -> list[float]:
    """The relative error of each head."""
    pairs = zip(found.unbind(axis), wanted.unbind(axis), strict=True)
    return [naive.error(a, b) for a, b in pairs]
