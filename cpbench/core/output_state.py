"""What an operator keeps of a forward pass for its backward pass, besides out and lse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class OutputStates:
    """States of forward passes by their outputs, each freed with its output.

    Args:
        owner: the operator, for messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._states: Any = None  # weak table, created once torch is imported

    def __len__(self) -> int:
        return 0 if self._states is None else len(self._states)

    def put(self, out: torch.Tensor, state: Any) -> None:
        """Keep the state of the forward pass that returned ``out``, to which it must not refer."""
        if self._states is None:
            from torch.utils.weak import WeakTensorKeyDictionary

            self._states = WeakTensorKeyDictionary()
        self._states[out] = state

    def get(self, out: torch.Tensor) -> Any:
        """The state of the forward pass that returned ``out``.

        Raises:
            ValueError: for any other tensor.
        """
        if self._states is None or out not in self._states:
            raise ValueError(f"{self._owner} needs the output that its own forward returned")
        return self._states[out]

    def take(self, x: torch.Tensor) -> Any:
        """Remove and return the state of ``x``; None if it has none."""
        return None if self._states is None else self._states.pop(x, None)
