"""Inputs of sequence mixers in which mistakes show: gates of all half-lives, weak betas, unit keys.

With ordinary gates a state is forgotten within a few tokens, and a missing exchange, a dropped
boundary or a wrong gradient of a gate disappears in the rounding of bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from cpbench.core.problem import INITIAL_STATE
from cpbench.inputs.normal import (
    GOLDEN,
    TOKEN,
    initialise_vector_math,
    logical_shift,
    mix64,
    mix_int,
    normal_rows,
    signed64,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.inputs import InputRequest

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
SALTS = {"g": 1 << 32, "beta": 2 << 32, INITIAL_STATE: 3 << 32}


class Gates:
    """Normal q, v and dout, keys of length 1, and gates by head.

    The log decay g of a head halves its state in L tokens, times 0.5 to 1.5 by token (and key
    dimension).  L is log-uniform over heads, from ``shortest`` tokens to ``longest`` sequences, by
    a sequence of low discrepancy, so that few heads cover it too.  beta is uniform from 0 to 2 in
    even heads; in odd ones so weak that the delta rule halves a state in about one sequence.

    Args:
        shortest: tokens; 0.03 are gates of 20 nats.
        longest: sequences.
        initial: whether there is an initial state, normal; it is 0 if not.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, shortest: float, longest: float, initial: bool) -> None:
        for key, value in (("shortest", shortest), ("longest", longest)):
            if not 0 < value < math.inf:
                raise ValueError(f"inputs: {key} = {value} must be above 0")
        self.shortest, self.longest = shortest, longest

    def check(self, case: Case) -> None:
        """Every case is supported."""

    def make(self, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem; gates in that of states."""
        import torch

        name, problem = request.name, request.problem
        if name == INITIAL_STATE:
            salted = replace(request, name="v", seed=request.seed + SALTS[name])
            return normal_rows(salted, problem.gate_dtype)
        if request.gate_lanes is None:
            if name != "k":
                return normal_rows(request, problem.dtype)
            rows = normal_rows(request, problem.gate_dtype)
            return torch.nn.functional.normalize(rows, dim=-1).to(getattr(torch, problem.dtype))
        by_head = self._log_decays(request) if name == "g" else self._betas(request)
        size = torch.tensor(by_head, dtype=torch.float64, device=request.device)
        lowest = 0.0 if name == "beta" else 0.5
        gate = ((lowest + _uniform(request)) * size.unsqueeze(-1)).to(
            getattr(torch, problem.gate_dtype)
        )
        return gate if request.gate_lanes else gate.squeeze(-1)

    def _log_decays(self, request: InputRequest) -> list[float]:
        """Of each requested head: the mean of g."""
        span = math.log(max(self.longest * request.problem.seq_k / self.shortest, 1.0))
        first = mix_int(request.seed) / 2**64
        shares = ((first + head * GOLDEN_RATIO) % 1 for head in request.heads)
        return [-math.log(2) / (self.shortest * math.exp(share * span)) for share in shares]

    def _betas(self, request: InputRequest) -> list[float]:
        """Of each requested head: the largest beta.  A token takes beta / K of a random state."""
        problem = request.problem
        weak = min(2.0, 2 * math.log(2) * problem.head_dim / problem.seq_k)
        return [weak if head % 2 else 2.0 for head in request.heads]


def _uniform(request: InputRequest) -> torch.Tensor:
    """``[batches, positions, heads, lanes]`` float64 in [0, 1), by seed, token, head and lane."""
    import torch

    initialise_vector_math()
    lanes = max(request.gate_lanes or 0, 1)
    token = torch.as_tensor(request.positions, device=request.device) * TOKEN
    head = torch.as_tensor(list(request.heads), device=request.device)
    lane = torch.arange(lanes, device=request.device) * signed64(GOLDEN)
    base = mix_int(request.seed) + SALTS[request.name]
    batches = []
    for batch in request.batches:
        row = (token[:, None] + head) * signed64(GOLDEN) + signed64(mix_int(base + batch))
        bits = mix64(mix64(row).unsqueeze(-1) + lane)
        batches.append(logical_shift(bits, 11, 64).double() * 2.0**-53)
    return torch.stack(batches)
