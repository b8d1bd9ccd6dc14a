"""Needles in captured q, k and v: which keys, queries and values they have.

What is no needle stays as it was captured.  Scores of a model have other scales than those of
normals, and sinks and other keys that all queries attend to.  So for each key/value head:

- Directions U are those in which the captured queries and keys have the least energy: a mixture of
  the lowest eighth of the eigenvectors of their second moments, each over its trace.  Queries that
  do not ask see no needle, and those that do see captured keys much as before.
- The key of a needle is ``m + b u``: the mean key without U, and as much of its direction as makes
  it as long as captured keys are (root mean square).  So for other queries it is a mean key; a key
  without m would be a sink where most scores are low.
- A query that asks is the captured one with the components ``a u`` in U.  With GQA the heads of a
  group share the key; each query has an a of its own, which gives all keys it asks for together
  exactly ``mass`` of the attention to the keys up to its own token: by Newton's method, since other
  keys have a share of u as well.
- A value is the code, as long as captured values are.

q and k are captured after RoPE, and planted as such: needles are found whatever their distance.

Legend: T keys, A queries that ask, G query heads of a group, n directions, D head dimension.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs.captured import captured_rows

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.inputs import InputSequence
    from cpbench.inputs.haystack import Haystack
    from cpbench.masks.slices import IntArray

    Floats = np.typing.NDArray[np.float64]

MIXED_SHARE = 8  # directions are mixed from one in so many, at least
LEAST_REST = 1e-9  # of the energy of keys, beside that of their mean
MAX_STEPS, CLOSE = 60, 1e-9  # of Newton's method, in the logarithm of a share
CHUNK_SCORES = 1 << 22  # at a time


@dataclass(frozen=True)
class Embedded:
    """Needles of a key/value head.

    Attributes:
        asking: ``[A]`` tokens that ask, in order.
        queries: ``[A, G, D]``, theirs.
        keys: ``[n, D]``, by direction.
        value_norm: length of values.
    """

    asking: IntArray
    queries: Floats
    keys: Floats
    value_norm: float


@functools.lru_cache(maxsize=256)
def embed(
    haystack: Haystack,
    source: tuple[str, int],
    seed: int,
    problem: Problem,
    sequence: InputSequence,
    g: int,
) -> Embedded:
    """The needles of key/value head ``g`` of a sequence in captured tensors.

    Args:
        source: of the tensors, see :class:`cpbench.inputs.captured.Captured`.

    Raises:
        ValueError: where the captured keys are all alike.
    """
    import torch

    group = slice(g * problem.group, (g + 1) * problem.group)

    def rows(name: str, tokens: IntArray, heads: slice) -> torch.Tensor:
        own = captured_rows(source, name, sequence, tokens)[:, heads]
        return own.to(getattr(torch, problem.dtype)).double()

    everywhere = np.arange(sequence.length)
    all_queries = rows("q", everywhere[-sequence.queries :], group).flatten(0, 1)
    keys, values = (rows(name, everywhere, slice(g, g + 1))[:, 0] for name in "kv")
    u = _quiet_directions(
        all_queries, keys, np.random.default_rng([seed, *sequence, g]), haystack.directions
    )
    mean = keys.mean(0)
    mean = mean - u.T @ (u @ mean)
    energy = keys.square().sum(1).mean()
    rest = (energy - mean.square().sum()).clamp(min=0)
    needle_keys = mean + rest.sqrt() * u
    alike = ValueError(
        f"inputs: no needle wins {haystack.mass} of the attention among the keys of head {g} of "
        f"{Path(source[0]).name}, which are too much alike"
    )
    if rest <= LEAST_REST * energy:
        raise alike

    planted, questions = haystack.questions(seed, problem, sequence, g)
    needle = haystack.needle_of(everywhere, planted.starts)
    key_of = torch.as_tensor(np.where(needle < 0, -1, planted.key[needle]))
    keys[key_of >= 0] = needle_keys[key_of[key_of >= 0]]
    asked = []
    for question in questions:
        own = rows("q", question.tokens, group)
        own = own - own @ u.T @ u
        tokens = torch.as_tensor(question.tokens).repeat_interleave(problem.group)
        try:
            sizes = _sizes(
                own.flatten(0, 1) * problem.softmax_scale, tokens, keys, key_of == question.key,
                u[question.key], problem.softmax_scale, haystack.mass,
            )  # fmt: skip
        except ArithmeticError:
            raise alike from None
        asked.append(own + sizes.view(*own.shape[:2], 1) * u[question.key])
    asking = np.concatenate([question.tokens for question in questions])
    order = np.argsort(asking)
    return Embedded(
        asking[order], torch.cat(asked).numpy()[order], needle_keys.numpy(),
        math.sqrt(float(values.square().sum(1).mean())),
    )  # fmt: skip


def _quiet_directions(
    queries: torch.Tensor, keys: torch.Tensor, rng: np.random.Generator, count: int
) -> torch.Tensor:
    """``[count, D]`` orthonormal directions in which both ``[…, D]`` have little energy."""
    import torch

    moments = torch.stack([x.T @ x for x in (queries, keys)])
    traces = moments.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(keys.dtype).tiny)
    together = (moments / traces[:, None, None]).sum(0)
    vectors: torch.Tensor = torch.linalg.eigh(together).eigenvectors  # by ascending eigenvalues
    mixed = max(count, keys.shape[1] // MIXED_SHARE)
    mixture = np.linalg.qr(rng.standard_normal((mixed, count)))[0]
    return (vectors[:, :mixed] @ torch.as_tensor(mixture)).T.contiguous()


def _sizes(
    rows: torch.Tensor,
    tokens: torch.Tensor,
    keys: torch.Tensor,
    asked: torch.Tensor,
    u: torch.Tensor,
    scale: float,
    mass: float,
) -> torch.Tensor:
    """The component along u that gives each query its share of attention on the keys it asks for.

    Args:
        rows: ``[N, D]`` queries without it, times the scale.
        tokens: ``[N]`` theirs: later keys are hidden.
        keys: ``[T, D]``.
        asked: ``[T]``, which keys they ask for, all of them equal.

    Raises:
        ArithmeticError: where there is none.
    """
    import torch

    sizes = rows.new_zeros(len(rows))
    slope, place = keys @ u * scale, torch.arange(len(keys))
    at = int(asked.nonzero()[0])
    logit = math.log(mass / (1 - mass)) - math.log(int(asked.sum()))
    step = max(1, CHUNK_SCORES // len(keys))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scores = rows[part] @ keys.T
        wanted = scores[:, at].clone()
        scores.masked_fill_(asked | (place > tokens[part, None]), -torch.inf)
        size = sizes[part]
        for _ in range(MAX_STEPS):
            moved = scores + size[:, None] * slope
            lse = moved.logsumexp(1)
            missing = lse + logit - wanted - size * slope[at]
            if float(missing.abs().max()) < CLOSE:
                break
            gain = slope[at] - (moved - lse[:, None]).exp() @ slope
            size += missing / gain
        else:
            raise ArithmeticError
    return sizes
