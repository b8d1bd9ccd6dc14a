"""Copies between host and device memory, overlapped with computation on GPUs.

On a GPU each direction has a stream of its own.  A copy starts when what the current stream had to
do before it was posted is done, as an operation of NCCL does; ``wait`` makes the current stream
wait for it, not the host.  A copy may also start after other copies, for which the current stream
has not waited: those that read the buffer it writes, or write the memory it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def contiguous_pairs(
    out: torch.Tensor, x: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of two tensors that are contiguous in both: copies of others are staged by torch, in
    memory that is not pinned, and block the host."""
    if out.is_contiguous() and x.is_contiguous():
        yield out, x
        return
    assert out.ndim > 1, "one of the last axes is strided"
    for target, source in zip(out, x, strict=True):
        yield from contiguous_pairs(target, source)


class Copy:
    """The handle of a copy on a stream of its own; keeps both tensors until ``wait``.

    Attributes:
        event: recorded after the copy.
    """

    def __init__(self, cuda: Any, event: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        self._cuda, self.event, self._tensors = cuda, event, tensors

    def wait_transfers(self) -> None:
        """Make the current stream wait; ``wait`` must still be called."""
        self._cuda.current_stream().wait_event(self.event)

    def wait(self) -> None:
        self.wait_transfers()
        self._tensors = ()


class HostLink:
    """The copies of one rank between its GPU and pinned host memory.

    Args:
        cuda: ``torch.cuda``, or what stands for it.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._streams: dict[bool, Any] = {}  # by direction: whether to the device

    def copy(
        self, out: torch.Tensor, x: torch.Tensor, to_device: bool, after: Sequence[Any] = ()
    ) -> Copy:
        """Start a copy.

        Args:
            after: copies after which it starts.
        """
        cuda = self._cuda
        if to_device not in self._streams:
            self._streams[to_device] = cuda.Stream()
        stream = self._streams[to_device]
        stream.wait_stream(cuda.current_stream())
        for other in after:
            stream.wait_event(other.event)
        on_device = out if to_device else x
        with cuda.stream(stream):
            for target, source in contiguous_pairs(out, x):
                target.copy_(source, non_blocking=True)
            if on_device.is_cuda:  # should it be freed without a wait, in an error
                on_device.record_stream(stream)
            event = cuda.Event()
            event.record(stream)
        return Copy(cuda, event, (out, x))

    def finish(self) -> None:
        """Block the host until all copies to host memory have ended."""
        if False in self._streams:
            self._streams[False].synchronize()
