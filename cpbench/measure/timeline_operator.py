"""Operators that record their calls in a timeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cpbench.measure.timeline_slices import COMPUTE
from cpbench.parallel.bound_operator import BoundOperator

if TYPE_CHECKING:
    from cpbench.core.operator import (
        QKV,
        BackwardInputs,
        Gradients,
        MixerBackwardInputs,
        MixerInputs,
        OutLse,
    )
    from cpbench.core.problem import Problem
    from cpbench.measure.timeline import Recorder
    from cpbench.parallel.mixing import BoundMixer
    from cpbench.parallel.partial_results.accumulators import Planned


class RecordingOperator(BoundOperator):
    """An operator that records its calls."""

    def __init__(self, op: BoundOperator, recorder: Recorder) -> None:
        super().__init__(op.info, op.impl, op.device)
        self._recorder = recorder

    def forward_cropped(self, qkv: QKV, plan: Planned) -> OutLse:
        with self._recorder.slice(COMPUTE, "attention", pairs=plan.area * qkv.q.shape[2]):
            return super().forward_cropped(qkv, plan)

    def backward_cropped(self, x: BackwardInputs, plan: Planned) -> Gradients:
        with self._recorder.slice(COMPUTE, "attention backward", pairs=plan.area * x.q.shape[2]):
            return super().backward_cropped(x, plan)

    def bind(self, problem: Problem) -> Any:
        return _RecordingMixer(super().bind(problem), self._recorder)

    def mix(self, x: MixerInputs, plan: Planned) -> OutLse:
        with self._recorder.slice(COMPUTE, "mixer", pairs=0):
            return super().mix(x, plan)

    def mix_backward(self, x: MixerBackwardInputs, plan: Planned) -> Gradients:
        with self._recorder.slice(COMPUTE, "mixer backward", pairs=0):
            return super().mix_backward(x, plan)


class _RecordingMixer:
    """A mixer on runs of tokens that records the calls that compute."""

    CALLS: ClassVar = {
        "summarise": "summaries of runs", "combine": "combination of summaries",
        "apply": "transition of a state", "output": "outputs from state 0",
        "respond": "response to the state", "summarise_back": "gradients of summaries",
        "backward": "mixer backward",
    }  # fmt: skip

    def __init__(self, mixer: BoundMixer, recorder: Recorder) -> None:
        self._mixer, self._recorder = mixer, recorder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._mixer, name)
        if name not in self.CALLS:
            return found

        def record(*args: Any) -> Any:
            with self._recorder.slice(COMPUTE, self.CALLS[name], pairs=0):
                return found(*args)

        return record
