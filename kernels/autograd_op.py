"""For operators whose library has no explicit backward: keep the autograd graph with the output.

``forward`` returns an output that carries its graph in a weak table; ``backward`` differentiates
it.  When the output is dropped, so is the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Run = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]
    ]


class GraphKeeper:
    """Runs a differentiable attention and later returns its gradients, graph kept meanwhile."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self._graphs: Any = WeakTensorKeyDictionary()

    def forward(
        self, run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``run(q, k, v)``; with ``keep`` its graph is kept for :meth:`backward`."""
        import torch

        if not keep:
            with torch.no_grad():
                return run(q, k, v)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out, lse = run(*leaves)
        detached = out.detach()
        self._graphs[detached] = (leaves, out)
        return detached, None if lse is None else lse.detach()

    def backward(
        self, dout: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
