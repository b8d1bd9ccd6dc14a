"""Operator `transformers.gated_delta`: the torch function that models of Hugging Face
transformers with Gated DeltaNet layers compute where no kernels are installed.

Called without the decorator that prefers the kernels of flash-linear-attention where these are
installed.  It knows no documents, so each is a call.

Written against transformers/models/qwen3_next/modeling_qwen3_next.py of transformers 5.24.0.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
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

MIXER = "gated_deltanet"
NAME = "transformers.gated_delta"
MODULE = "transformers.models.qwen3_next.modeling_qwen3_next"

OPERATORS = (
    OperatorInfo(
        name=NAME,
        summary="the gated delta rule of Hugging Face models, in plain torch",
        source="transformers, torch_chunk_gated_delta_rule of Qwen3-Next",
        load="cpbench.kernels.mixers.libraries.transformers:TransformersMixer",
        masks=("causal", "causal_document"),
        value_dims=True,
        external_lse=False,
        mergeable=False,
        lse_on=(),
        requires=("torch", "transformers"),
        mixer=MIXER,
        gates=forms.gates(forms.FORMS[MIXER]),
        install='pip install "cpbench[mixer-peers]"',
    ),
)


class TransformersMixer(LibraryMixer):
    """The operator."""

    def __init__(self) -> None:
        super().__init__(NAME, MIXER)

    def refusal(self, problem: Problem, lengths: tuple[int, ...]) -> str | None:
        return default_scale_refusal(problem)

    def call(self, x: MixerInputs, plan: Plan) -> OutLse:
        function = _function()

        def call(tokens: MixerInputs) -> OutLse:
            out, state = function(
                tokens.q, tokens.k, tokens.v, g=tokens.g, beta=tokens.beta, output_final_state=True
            )
            return out, state

        return by_document(call, x, plan)


def _function() -> Any:
    function = importlib.import_module(MODULE).torch_chunk_gated_delta_rule
    return getattr(function, "__wrapped__", function)
