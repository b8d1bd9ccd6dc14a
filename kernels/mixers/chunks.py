"""A run of tokens in chunks: the inputs of a mixer, what is fixed before, and copies in and out.

Legend: B batch, S tokens, H heads, K and V dimensions of keys and values; C tokens of a chunk, n
chunks of a slab, h = B * H.  Chunks are computed a slab at a time, as ``[n, h, C, K]``: a slab is
what fits a cache on a CPU, and many chunks on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cpbench.core.operator import MixerInputs
from cpbench.core.operator import state_dtype as state_dtype
from cpbench.kernels.mixers.forms import Form

if TYPE_CHECKING:
    import torch

SLAB_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}  # of the largest matrices of a slab's chunks


Inputs = MixerInputs  # of one contiguous run of tokens


@dataclass(frozen=True)
class Plan:
    """What is fixed before a run is computed.

    Attributes:
        form: the recurrence.
        scale: multiplies q.
        chunk: tokens of a chunk; a power of two unless the form is lagging.
        resets: ascending tokens of the run before which the state is set to 0, because a document
            begins there.  A 0 among them hides the state that the run starts from.

    Raises:
        ValueError: if a document begins inside a chunk of a lagging form.
    """

    form: Form
    scale: float
    chunk: int
    resets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        inside = [token for token in self.resets if token % self.chunk]
        if self.form.lagging and inside:
            raise ValueError(
                f"{self.form.name} updates once per chunk of {self.chunk} tokens: no document may "
                f"begin inside one, at token {inside[0]} of its run"
            )

    def tokens_per_chunk(self, tokens: int) -> int:
        """The tokens of a chunk in a run of ``tokens``: fewer if the run is shorter."""
        if self.form.lagging:
            return min(self.chunk, max(tokens, 1))
        return min(self.chunk, 1 << max(tokens - 1, 0).bit_length())


class Slab(NamedTuple):
    """Chunks ``[first, end)`` of a run, which are tokens ``[start, stop)``."""

    first: int
    end: int
    start: int
    stop: int

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.end)


def cut_slabs(x: Inputs, chunk: int) -> list[Slab]:
    """The slabs of a run, in order."""
    B, S, H, K = x.q.shape
    budget = SLAB_ELEMENTS["cpu" if x.q.device.type == "cpu" else "cuda"]
    size = max(1, budget // (B * H * chunk * max(chunk, K, x.v.shape[3])))
    total = -(-S // chunk)
    return [
        Slab(i, min(i + size, total), i * chunk, min((i + size) * chunk, S))
        for i in range(0, total, size)
    ]


def read(
    x: torch.Tensor, slab: Slab, chunk: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy the tokens of a slab, ``[B, S, H, D]``, to ``[n, h, C, D]``; tokens beyond are 0."""
    B, _, H, D = x.shape
    n, tokens = slab.end - slab.first, slab.stop - slab.start
    if out is None:
        out = x.new_empty((n, B * H, chunk, D), dtype=dtype)
    chunks = out.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4)  # [B, n, C, H, D]
    whole, rest = divmod(tokens, chunk)
    if whole:
        chunks[:, :whole] = x[:, slab.start : slab.start + whole * chunk].unflatten(
            1, (whole, chunk)
        )
    if rest:
        chunks[:, whole, :rest] = x[:, slab.stop - rest : slab.stop]
        chunks[:, whole, rest:] = 0
    return out


def write(x: torch.Tensor, slab: Slab, out: torch.Tensor) -> None:
    """Copy the chunks of a slab, ``[n, h, C, D]``, to their tokens of ``[B, S, H, D]``."""
    B, _, H, _ = out.shape
    chunk = x.shape[2]
    chunks = x.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4)
    whole, rest = divmod(slab.stop - slab.start, chunk)
    if whole:
        tokens = out[:, slab.start : slab.start + whole * chunk]
        tokens.unflatten(1, (whole, chunk)).copy_(chunks[:, :whole])
    if rest:
        out[:, slab.stop - rest : slab.stop] = chunks[:, whole, :rest]


class Segments(NamedTuple):
    """Which tokens of a chunk are of one document.

    Attributes:
        first: ``[n, 1, C, 1]``, whether no document began since the end of the chunk before.
        last: ``[n, 1, C, 1]``, whether none begins until the end of the chunk.
        through: ``[n, 1, 1, 1]``, whether none begins in the chunk.
        number: ``[n, 1, C, 1]``, of the document of each token.
        begins: ``[n, 1, C, 1]``, whether a document begins with the token.
    """

    first: torch.Tensor
    last: torch.Tensor
    through: torch.Tensor
    number: torch.Tensor
    begins: torch.Tensor

    @property
    def same(self) -> torch.Tensor:
        """``[n, 1, C, C]``, whether two tokens are of one document."""
        return self.number == self.number.mT


def find_segments(
    resets: tuple[int, ...], slab: Slab, chunk: int, device: torch.device
) -> Segments | None:
    """The segments of a slab's chunks; None if no document begins in them."""
    import torch

    if not any(slab.start <= token < slab.stop for token in resets):
        return None
    tokens = torch.arange(slab.start - 1, slab.start + (slab.end - slab.first) * chunk)
    number = torch.bucketize(tokens.clamp(max=slab.stop - 1), torch.tensor(resets), right=True)
    if slab.start == 0:
        number[0] = 0  # a document that begins at token 0 is another than that of the state
    number = number.to(device)
    before, own = number[:-1].view(-1, 1, chunk, 1), number[1:].view(-1, 1, chunk, 1)
    first = own == before[:, :, :1]
    return Segments(first, own == own[:, :, -1:], first[:, :, -1:], own, own != before)
