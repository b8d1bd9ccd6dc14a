"""Operator `mamba_ssm.ssd`: the Triton kernels of Mamba-2, `mamba_chunk_scan_combined`.

It takes x and a step dt, and adds dt * x to states that decay by dt * A: A is -1 here, dt = -g and
x = v / dt, so g must be at most 0 (values above -1e-9 count as that).  There is no backward pass:
the gradient of dt holds that of v times x, which is 1 / |g| times as large as the gradient of a
weak g, and both are lost in the rounding of their difference.

Written against mamba_ssm/ops/triton/ssd_combined.py of mamba-ssm 2.3.2.post1 (a14b1dff); never run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import Limits
from cpbench.kernels.mixers import forms
from cpbench.kernels.mixers.libraries.adapter import LibraryMixer, Plan

if TYPE_CHECKING:
    from cpbench.core.operator import MixerInputs, OutLse
    from cpbench.core.problem import Problem

NAME = "mamba_ssm.ssd"
CHUNK = 256  # tokens, as Mamba-2 calls it
CHUNKS = (64, 128, 256)
SMALLEST_STEP = 1e-9  # of dt, so that v / dt is finite in bfloat16

OPERATORS = (
    OperatorInfo(
        name=NAME,
        summary="the kernels of Mamba-2, forward",
        source="Dao and Gu 2024, Transformers are SSMs; mamba-ssm, mamba_chunk_scan_combined",
        load="cpbench.kernels.mixers.libraries.mamba_ssm:MambaMixer",
        masks=("causal", "causal_document"),
        dtypes=("bfloat16",),
        value_dims=True,
        devices=("cuda",),
        backward_on=(),
        external_lse=False,
        mergeable=False,
        lse_on=(),
        requires=("torch", "triton", "mamba_ssm"),
        params=("chunk",),
        mixer="ssd",
        gates=forms.gates(forms.FORMS["ssd"]),
        rounds_states=True,
        install="pip install mamba-ssm --no-build-isolation",
        unproven="mamba-ssm 2.3.2.post1",
    ),
)


class MambaMixer(LibraryMixer):
    """The operator.

    Args:
        chunk: tokens of a chunk.

    Raises:
        ValueError: for a chunk that is not one of ``CHUNKS``.
    """

    limits = Limits(min_capability=(8, 0), head_dim_multiple=16, max_head_dim=256)

    def __init__(self, chunk: int = CHUNK) -> None:
        super().__init__(NAME, "ssd")
        if chunk not in CHUNKS:
            raise ValueError(f"{NAME}: chunk = {chunk} is not one of {', '.join(map(str, CHUNKS))}")
        self._chunk = chunk

    def refusal(self, problem: Problem, lengths: tuple[int, ...]) -> str | None:
        return self.limits.refusal(problem)

    def call(self, x: MixerInputs, plan: Plan) -> OutLse:
        import torch

        assert x.g is not None
        heads, device = x.q.shape[2], x.q.device
        step = (-x.g).clamp(min=SMALLEST_STEP)
        documents = None
        if len(plan.lengths) > 1:
            numbers = torch.arange(len(plan.lengths), dtype=torch.int32, device=device)
            repeats = torch.tensor(plan.lengths, device=device)
            documents = numbers.repeat_interleave(repeats).expand(len(x.q), -1).contiguous()
        api = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        out, state = api.mamba_chunk_scan_combined(
            (x.v.float() / step.unsqueeze(-1)).to(x.v.dtype),
            step,
            -torch.ones(heads, device=device),
            x.k,
            (plan.scale * x.q).to(x.q.dtype),
            self._chunk,
            seq_idx=documents,
            return_final_states=True,
        )
        return out, state.mT.contiguous()
