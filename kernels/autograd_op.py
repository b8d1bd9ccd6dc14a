"""Explicit backward passes for what is only differentiable by autograd.

The forward pass keeps the autograd graph; the backward pass differentiates it.  The graph is freed
with the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cpbench.core.operator import QKV, MixerInputs
from cpbench.core.output_state import OutputStates

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse

Inputs = TypeVar("Inputs", QKV, MixerInputs)


class GraphStore:
    """Runs functions of inputs and keeps their autograd graphs for the backward pass.

    Args:
        name: of the operator.
    """

    def __init__(self, name: str) -> None:
        self.states = OutputStates(name)

    def forward(
        self, compute: Callable[[Inputs], OutLse], inputs: Inputs, keep_graph: bool
    ) -> OutLse:
        """Return ``compute(inputs)``, detached; ``keep_graph`` allows a call of :meth:`backward`.

        Args:
            compute: returns out, and lse or the last state.
        """
        import torch

        if not keep_graph:
            with torch.no_grad():
                return compute(_detached(inputs))
        leaves = _detached(inputs)
        given = tuple(x.requires_grad_() for x in leaves if x is not None)
        with torch.enable_grad():
            out, second = compute(leaves)
        detached = out.detach()
        self.states.put(detached, (given, out))
        return detached, None if second is None else second.detach()

    def backward(self, dout: torch.Tensor, out: torch.Tensor) -> Gradients:
        """Gradients with respect to the inputs of the call that returned ``out``.

        Raises:
            ValueError: if ``out`` is not an output of :meth:`forward` with ``keep_graph``.
        """
        import torch

        given, graph_out = self.states.get(out)
        gradients: Any = torch.autograd.grad(graph_out, given, dout, retain_graph=True)
        found: Gradients = gradients
        return found


def _detached(inputs: Inputs) -> Inputs:
    return type(inputs)(*(None if x is None else x.detach() for x in inputs))  # type: ignore[arg-type]
