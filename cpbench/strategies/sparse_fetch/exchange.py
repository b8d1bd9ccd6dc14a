"""The exchange of blocks of keys and values between ranks, as the data select them.

A message from an owner to a rank has the blocks that this rank has asked for, of every batch and
key/value head, in that order; both know which from the same flags.

Legend: B batch, T tokens of a rank, G key/value heads, E head dims of keys and values together; Y
blocks of the sequence, n of a rank (the most of any, where padded), m of a message, U of those that
a rank has received; P ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from cpbench.masks.slices import IntArray

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm

    Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # batch, head and block of each


class Blocks(Protocol):
    """The blocks of the keys: what this needs of a plan; see ``strategy.Plan``."""

    @property
    def block(self) -> int: ...
    @property
    def owned(self) -> tuple[IntArray, ...]: ...
    @property
    def keys(self) -> int: ...
    @property
    def seq_k(self) -> int: ...


def gather_pooled(
    pooled_BnGE: torch.Tensor, owned: tuple[IntArray, ...], comm: Comm
) -> torch.Tensor:
    """The pooled keys of all ranks in the order of the sequence, ``[B, Y, G, E]``."""
    import torch

    B, n, G, E = pooled_BnGE.shape
    most = max(map(len, owned))
    padded = torch.nn.functional.pad(pooled_BnGE, (0, 0, 0, 0, 0, most - n)).contiguous()
    gathered = padded.new_empty((comm.size, B, most, G, E))
    comm.all_gather(gathered, padded).wait()
    parts = [gathered[rank, :, : len(blocks)] for rank, blocks in enumerate(owned)]
    order = np.argsort(np.concatenate(owned))
    return torch.cat(parts, 1).index_select(1, torch.as_tensor(order, device=padded.device))


def request_blocks(
    wanted_BGY: torch.Tensor, owned: tuple[IntArray, ...], comm: Comm
) -> torch.Tensor:
    """Ask the owners for the blocks that this rank wants; returns what each rank asks of this one,
    ``[P, B, G, n]`` booleans."""
    import torch

    B, G, _ = wanted_BGY.shape
    request = wanted_BGY.new_zeros((comm.size, B, G, max(map(len, owned))), dtype=torch.uint8)
    for owner, blocks in enumerate(owned):
        index = torch.as_tensor(blocks, device=request.device)
        request[owner, :, :, : len(blocks)] = wanted_BGY.index_select(2, index)
    asked = torch.empty_like(request)
    comm.all_to_all(asked, request).wait()
    return asked.bool()


class BlockExchange:
    """Blocks on their way from their owners, and their gradients on the way back.

    Args:
        wanted: ``[B, G, Y]`` booleans, the blocks that this rank wants.
        asked: of :func:`request_blocks`.

    Attributes:
        columns: the blocks of the sequence of which this rank has received some head, ascending.
    """

    def __init__(self, wanted: torch.Tensor, asked: torch.Tensor, plan: Blocks, comm: Comm) -> None:
        import torch

        self._plan, self._comm = plan, comm
        self.columns = np.flatnonzero(wanted.any(0).any(0).cpu().numpy())
        slot = np.zeros(wanted.shape[2], dtype=np.int64)
        slot[self.columns] = np.arange(len(self.columns))
        self._sent: list[Index] = [flags.nonzero(as_tuple=True) for flags in asked]
        self._received: list[Index] = []
        for blocks in plan.owned:
            owned = torch.as_tensor(blocks, device=wanted.device)
            slots = torch.as_tensor(slot[blocks], device=wanted.device)
            batch, head, block = wanted.index_select(2, owned).nonzero(as_tuple=True)
            self._received.append((batch, head, slots[block]))

    def fetch(self, kv_BTGE: torch.Tensor) -> torch.Tensor:
        """The keys and values of :attr:`columns`, ``[B, tokens, G, E]``, from those of this rank;
        0 for heads that do not want a block."""
        own, comm = _to_blocks(kv_BTGE, self._plan.block), self._comm
        shape = own.shape[3:]
        buffers = [own.new_empty((len(index[0]), *shape)) for index in self._received]
        self._swap([own[index] for index in self._sent], buffers, "selected keys")
        B, G = own.shape[:2]
        received = own.new_zeros((B, G, len(self.columns), *shape))
        for rank, index in enumerate(self._received):
            received[index] = own[self._sent[rank]] if rank == comm.rank else buffers[rank]
        return _to_tokens(received, self._tokens_received)

    def return_gradients(self, grads_BTGE: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the gradients of what :meth:`fetch` returned to the owners.

        Args:
            dtype: in which they are sent.

        Returns:
            The sums for the keys of this rank, ``[B, T, G, E]`` float32.
        """
        grads, comm = _to_blocks(grads_BTGE, self._plan.block), self._comm
        B, G, _, *shape = grads.shape
        buffers = [grads.new_empty((len(index[0]), *shape), dtype=dtype) for index in self._sent]
        parts = [grads[index] for index in self._received]
        self._swap([part.to(dtype) for part in parts], buffers, "gradients")
        sums = grads.new_zeros((B, G, len(self._plan.owned[comm.rank]), *shape))
        for rank, index in enumerate(self._sent):
            sums[index] += parts[rank] if rank == comm.rank else buffers[rank].float()
        return _to_tokens(sums, self._plan.keys)

    def _swap(self, parts: list[torch.Tensor], buffers: list[torch.Tensor], what: str) -> None:
        """Send a part to each rank and receive into its buffer; empty ones are not sent."""
        own = self._comm.rank
        sends = [(x, rank) for rank, x in enumerate(parts) if rank != own and len(x)]
        recvs = [(x, rank) for rank, x in enumerate(buffers) if rank != own and len(x)]
        if sends or recvs:
            self._comm.exchange(sends, recvs, what).wait()

    @property
    def _tokens_received(self) -> int:
        """Tokens of :attr:`columns`; the last block of the sequence may be shorter."""
        starts = self.columns * self._plan.block
        return int(np.minimum(self._plan.seq_k - starts, self._plan.block).sum())


def _to_blocks(x_BTGE: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens as blocks, ``[B, G, blocks, block, E]``; the last one is padded with zeros."""
    import torch

    missing = -x_BTGE.shape[1] % block
    padded = torch.nn.functional.pad(x_BTGE, (0, 0, 0, 0, 0, missing))
    blocks: torch.Tensor = padded.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
    return blocks


def _to_tokens(blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of :func:`_to_blocks`."""
    return blocks.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
