"""Explicit backward passes for attention that is only differentiable by autograd.

The forward pass keeps the autograd graph; the backward pass differentiates it.  The graph is freed
with the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV
from cpbench.core.output_state import OutputStates

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse

    AttentionFunction = Callable[[QKV], OutLse]


class GraphStore:
    """Runs attention functions and keeps their autograd graphs for the backward pass.

    Args:
        name: of the operator.
    """

    def __init__(self, name: str) -> None:
        self.states = OutputStates(name)

    def forward(self, attend: AttentionFunction, qkv: QKV, keep_graph: bool) -> OutLse:
        """Return ``attend(qkv)``, detached; ``keep_graph`` allows a call of :meth:`backward`."""
        import torch

        if not keep_graph:
            with torch.no_grad():
                return attend(QKV(*(x.detach() for x in qkv)))
        leaves = QKV(*(x.detach().requires_grad_() for x in qkv))
        with torch.enable_grad():
            out, lse = attend(leaves)
        detached = out.detach()
        self.states.put(detached, (leaves, out))
        return detached, None if lse is None else lse.detach()

    def backward(self, dout: torch.Tensor, out: torch.Tensor) -> Gradients:
        """Gradients with respect to q, k, v of the call that returned ``out``.

        Raises:
            ValueError: if ``out`` is not an output of :meth:`forward` with ``keep_graph``.
        """
        import torch

        leaves, graph_out = self.states.get(out)
        dq, dk, dv = torch.autograd.grad(graph_out, leaves, dout, retain_graph=True)
        return dq, dk, dv
