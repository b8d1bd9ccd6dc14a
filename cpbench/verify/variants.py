"""Variants of the inputs, another one for every timed call, and what its results must be.

There are two sets of inputs, from different seeds; both are checked.  Besides, before every call,
lanes of the head dimension are multiplied by new random signs: those of q and k by the same, and
those of v and dout by the same; rows of an initial state by the former, columns by the latter.  All
products of attention (and of mixers) stay what they are, so the results are those of the checked
call up to the signs, to the last bit: out and dv have the signs of v, dq and dk those of k.  So a
call that returns what it returned before, or computes from stale inputs, is found out; and no call
repeats the inputs of another.

Inputs are changed in place: the addresses stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.problem import INITIAL_STATE
from cpbench.verify.check import Tensors, contract_breach
from cpbench.verify.fingerprint import Fingerprint, Fingerprinter, describe_difference
from cpbench.verify.fit import try_to_fit

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention

# The inputs and results that have the signs of k, and those that have the signs of v.
SIGNED_LIKE_K, SIGNED_LIKE_V = ("q", "k", "dq", "dk"), ("v", "dout", "out", "dv")
Expected = dict[bool, Fingerprint]  # of the first set (False) and the second
SWAP_BYTES = 64 << 20  # swapped at a time


class InputVariants:
    """The inputs of one rank, which change before every call.

    Args:
        work: the computation.
        first, second: the two sets of inputs.  The tensors of the first are changed in place; those
            of the second may be in host memory, or {} without a second set.
        seed: of the signs; the same on all ranks.
        tolerance: by how much the results of two calls may differ, relative to the norm of a tile;
            0 for operators whose results are equal to the last bit.
        expected: fingerprints of the checked results, where they are known.

    Attributes:
        inputs: the present inputs, always the same tensors.
        expected: as the argument, with what :meth:`expect` has added.
        unfit: how the comparison of a call ran out of memory; empty if none did.
    """

    def __init__(
        self,
        work: Attention,
        first: Tensors,
        second: Tensors,
        seed: int,
        tolerance: float,
        expected: Expected,
    ) -> None:
        import torch

        self.inputs, self._others, self._tolerance = first, second, tolerance
        self._fingerprinter = Fingerprinter(work)
        self._rng = np.random.default_rng([seed, 1])
        # Selectors compare sums of products: with other signs in another order, so ties differ.
        info = work.op.info
        unchanged = (SIGNED_LIKE_K, info.selects), (SIGNED_LIKE_V, info.selects_by_values)
        self._signed = [names for names, decides in unchanged if not decides]
        self._swapped = False
        self._signs: Tensors = {}
        self.expected = dict(expected)
        self._calls, self._mismatch, self.unfit = 0, "", ""
        # Kept, so that a swap never fails half-way for want of memory.
        windows = [x[:, : _swap_step(x)].nbytes for x in second.values()]
        self._buffer = first["q"].new_empty(max(windows, default=0), dtype=torch.uint8)

    @property
    def has_second(self) -> bool:
        """Whether there is a second set of inputs."""
        return bool(self._others)

    def fingerprint(self) -> Fingerprint:
        """Of the present inputs, without their signs."""
        return self._fingerprinter.take(self.inputs, self._signs)

    def expect(self, results: Tensors) -> None:
        """Take these results, of the present inputs without signs, for the checked ones."""
        self.expected[self._swapped] = self._fingerprinter.take(results)

    def swap(self) -> None:
        """Exchange the two sets of inputs, without signs; nothing without a second set."""
        self._apply_signs({})
        if not self._others:
            return
        self._swapped = not self._swapped
        for name, x in self.inputs.items():
            step = _swap_step(x)
            for start in range(0, x.shape[1], step):
                own, other = (y[:, start : start + step] for y in (x, self._others[name]))
                kept = self._buffer[: own.nbytes].view(own.dtype).view(own.shape).copy_(own)
                own.copy_(other)
                other.copy_(kept)

    def before_call(self) -> None:
        """Change the inputs for the next call."""
        import torch

        self.swap()
        signs: Tensors = {}
        for names, like in ((SIGNED_LIKE_K, "q"), (SIGNED_LIKE_V, "v")):
            x = self.inputs[like]
            drawn = self._rng.choice([-1.0, 1.0], size=x.shape[-1])
            if names in self._signed:
                signs |= dict.fromkeys(
                    names, torch.as_tensor(drawn, device=x.device, dtype=x.dtype)
                )
        if INITIAL_STATE in self.inputs:
            signs[INITIAL_STATE] = signs["k"].unsqueeze(1) * signs["v"]
        self._apply_signs(signs)

    def after_call(self, results: Tensors) -> None:
        """Compare the results of a call with the checked ones, where these are known."""
        self._calls += 1
        if self._mismatch or self.unfit:
            return
        reason = contract_breach(results, self.inputs)
        expected = self.expected.get(self._swapped)
        if reason is None and expected is not None:
            taken, self.unfit = try_to_fit(lambda: self._fingerprinter.take(results, self._signs))
            reason = describe_difference(expected, taken or {}, self._tolerance)
        if reason is not None:
            self._mismatch = f"call {self._calls} did not return what the checked one did: {reason}"

    def finish(self) -> str:
        """Restore the first set of inputs and free the second; returns what was found, or an empty
        text."""
        if self._swapped:
            self.swap()
        self._apply_signs({})
        self._others = {}
        self._buffer = self._buffer.new_empty(0)
        return self._mismatch

    def _apply_signs(self, signs: Tensors) -> None:
        """Replace the signs of the inputs; {} for none."""
        for name, x in self.inputs.items():
            for old_or_new in (self._signs.get(name), signs.get(name)):
                if old_or_new is not None:
                    x.mul_(old_or_new)
        self._signs = signs


def _swap_step(x: torch.Tensor) -> int:
    """Tokens of an input that are swapped at a time."""
    return max(1, SWAP_BYTES // max(1, x[:, :1].nbytes))
