"""For operators whose library has no explicit backward: keep the autograd graph with the output.

``forward`` returns an output that carries its graph in a weak table; ``backward`` differentiates
it.  When the output is dropped, so is the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse

    Run = Callable[[QKV], OutLse]


class GraphKeeper:
    """Runs a differentiable attention and later returns its gradients, graph kept meanwhile."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self._graphs: Any = WeakTensorKeyDictionary()

    def forward(self, run: Run, qkv: QKV, keep: bool) -> OutLse:
        """Return ``run(qkv)``; with ``keep`` its graph is kept for :meth:`backward`."""
        import torch

        if not keep:
            with torch.no_grad():
                return run(qkv)
        leaves = QKV(*(x.detach().requires_grad_() for x in qkv))
        with torch.enable_grad():
            out, lse = run(leaves)
        detached = out.detach()
        self._graphs[detached] = (leaves, out)
        return detached, None if lse is None else lse.detach()

    def backward(self, dout: torch.Tensor, out: torch.Tensor) -> Gradients:
        """Gradients with respect to q, k, v of the call that returned ``out``.

        Raises:
            ValueError: when ``out`` is no output of :meth:`forward` with ``keep``.
        """
        import torch

        if out not in self._graphs:
            raise ValueError("this operator's backward needs the output its own forward returned")
        leaves, live = self._graphs[out]
        dq, dk, dv = torch.autograd.grad(live, leaves, dout, retain_graph=True)
        return dq, dk, dv
