"""What one rank does in order: kernels, side work, communication, copies and waits.

Ranks are those of all ranks (not of a sub-communicator), bytes are those of one rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.simulator.tiles import TileCounts, Tiling, all_full

if TYPE_CHECKING:
    from cpbench.masks.attn_mask import AttnMask


@dataclass(frozen=True)
class Kernel:
    """One call of the attention operator.

    Attributes:
        phase: ``"fwd"`` or ``"bwd"``.
        tiles: of one head, or of the query heads that a tile holds.
        heads_q: such heads times batch; heads_kv: key/value heads times batch.
        seq_q, seq_k: tokens of its tensors.
        head_dim, value_dim: of queries and keys, and of values.
        itemsize: bytes of an element.
        full: whether all that it computes are full rectangles.
    """

    phase: str
    tiles: TileCounts
    heads_q: int
    heads_kv: int
    seq_q: int
    seq_k: int
    head_dim: int
    value_dim: int
    itemsize: int
    full: bool

    @staticmethod
    @functools.lru_cache(maxsize=4096)  # the steps of a ring have few different masks
    def of_mask(
        phase: str, mask: AttnMask, tiling: Tiling, batch: int, heads: tuple[int, int],
        head_dims: tuple[int, int], itemsize: int,
    ) -> Kernel:  # fmt: skip
        """The call for all pairs of a mask.

        Args:
            heads: query and key/value heads; head_dims: of queries and keys, and of values.
        """
        group = tiling.group(phase, *heads)
        return Kernel(
            phase=phase,
            tiles=tiling.count(mask, phase, group),
            heads_q=batch * heads[0] // group,
            heads_kv=batch * heads[1],
            seq_q=mask.seq_q,
            seq_k=mask.seq_k,
            head_dim=head_dims[0],
            value_dim=head_dims[1],
            itemsize=itemsize,
            full=all_full(mask.slices),
        )


@dataclass(frozen=True)
class Mix:
    """One step of a sequence mixer over consecutive tokens.

    Attributes:
        phase: ``"fwd"`` or ``"bwd"``, at whose rate it runs.
        step: of a scan, see ``cpbench.parallel.mixing``; that of the phase for a whole pass.
        tokens: of each sequence.
        flops: of all heads and sequences.
    """

    phase: str
    step: str
    tokens: int
    flops: int


@dataclass(frozen=True)
class SideWork:
    """Work of a strategy beside its kernels: merges, packing, float32 sums, padding.

    Attributes:
        stream: bytes read and written in order; gather, scatter: by an index.
        launches: of device kernels.
    """

    stream: int = 0
    gather: int = 0
    scatter: int = 0
    launches: int = 0

    def __add__(self, other: SideWork) -> SideWork:
        return SideWork(
            self.stream + other.stream,
            self.gather + other.gather,
            self.scatter + other.scatter,
            self.launches + other.launches,
        )


@dataclass(frozen=True)
class Post:
    """The start of a communication operation, in the background.

    Attributes:
        number: of the operation among those of its rank.
        operation: ``"exchange"``, ``"all_to_all"``, ``"all_gather"``, ``"reduce_scatter"`` or
            ``"all_reduce"``.
        members, lane: of its communicator, whose operations run one after another.
        sends, receives: rows (peer, bytes); of a collective, to and from every other member.
    """

    number: int
    operation: str
    members: tuple[int, ...]
    lane: str
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Copy:
    """The start of a copy between the memory of a rank's device and that of its host.

    Attributes:
        number: of the operation among those of its rank, messages and collectives too.
        to_device: its direction; copies of one direction run one after another.
        nbytes: bytes; pieces: contiguous parts, which are copied one by one.
        after: numbers of copies that must have ended before it starts.
    """

    number: int
    to_device: bool
    nbytes: int
    pieces: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """The host or device waits for the operation of that number."""

    number: int


Event = Kernel | Mix | SideWork | Post | Copy | Wait
Program = tuple[Event, ...]


class Recorder:
    """The events of one rank in order; consecutive side work is one event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        if isinstance(event, SideWork) and self.events:
            last = self.events[-1]
            if isinstance(last, SideWork):
                self.events[-1] = last + event
                return
        self.events.append(event)

    def take(self) -> Program:
        """The events since the last call."""
        events, self.events = tuple(self.events), []
        return events
