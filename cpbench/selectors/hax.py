"""Selector `hax`: the latest keys of the query's hash bucket, and those with the highest scores.

Source: HAX, arXiv 2507.00449: locality-sensitive hashing selects keys by the query, key selection
by a score of the key alone.  The published form centres keys, and normalises scores, by means over
the whole sequence, so that later tokens change what a query sees; here keys are centred by their
running mean, if at all, and a query sees nothing of later tokens.  The original learns the score;
here it is the norm of the key.  Scores are scaled as the problem says, not by 1 as in the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import check_minimum, upcast
from cpbench.selectors.selections import Tokens

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="hax",
        summary="latest keys of the query's hash bucket, and keys with the highest norm so far",
        source="HAX, arXiv 2507.00449",
        load="cpbench.selectors.hax:Hax",
        masks=("causal",),
        params=("buckets", "latest", "top_k", "hash", "center", "kernel"),
        external_lse=False,
        variants=(
            "buckets=4,latest=12,top_k=8",
            "buckets=8,latest=12,top_k=8,hash=sign,center=true",
        ),
        selects=True,
        selects_from="keys",
        selects_for="head",
    ),
)
HASHES = ("argmax", "sign")


class Hax(Selector):
    """Single keys per query and head; each once, by either rule.

    Args:
        buckets: number of buckets, a power of two.
        latest: keys of the bucket, the latest ones up to the query's own.
        top_k: keys with the highest scores, up to the query's own; 0 for none.
        hash: ``"argmax"``: the largest of half as many random projections and their negatives;
            ``"sign"``: the signs of as many random projections as a bucket's number has bits.
        center: subtract from each key, before hashing, the mean of the keys up to it.
        kernel: see :class:`Selector`.
    """

    name = "hax"
    branch_kinds = ("tokens",)

    def __init__(
        self,
        buckets: int = 16,
        latest: int = 256,
        top_k: int = 256,
        hash: str = "argmax",
        center: bool = False,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 2, buckets=buckets)
        check_minimum(self.name, 1, latest=latest)
        check_minimum(self.name, 0, top_k=top_k)
        if buckets & (buckets - 1):
            raise ValueError(f"hax: buckets = {buckets} must be a power of two")
        if hash not in HASHES:
            raise ValueError(f"hax: hash = {hash!r} is not one of {', '.join(HASHES)}")
        self.buckets, self.latest, self.top_k = buckets, latest, top_k
        self.hash, self.center = hash, center

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        heads, group = q.shape[2], q.shape[2] // k.shape[2]
        keys = upcast(k)
        hashed = keys
        if self.center:
            counts = torch.arange(1, k.shape[1] + 1, device=k.device)[:, None, None]
            hashed = keys - keys.cumsum(1) / counts
        bucket_q, bucket_k = self.bucket_of(upcast(q)), self.bucket_of(hashed)
        positions = torch.as_tensor(plan.positions, device=q.device)
        in_bucket = latest_of_bucket(bucket_q, bucket_k, positions, self.latest)
        if not self.top_k:
            return (Branch(mask=Tokens(plan.mask, in_bucket, heads)),)
        best = running_top_k(keys.norm(dim=-1).transpose(1, 2), self.top_k)
        best = best[:, :, positions].repeat_interleave(group, 1)
        twice = _are_members(best, in_bucket)
        index = torch.cat([in_bucket, best.masked_fill_(twice, -1)], 3)
        return (Branch(mask=Tokens(plan.mask, index, heads)),)

    def bucket_of(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """``[B, H, T]``: the bucket of each vector, by seeded random projections."""
        import torch

        bits = self.buckets.bit_length() - 1
        count = bits if self.hash == "sign" else self.buckets // 2
        generator = torch.Generator().manual_seed(0)
        shape = (x_BTHD.shape[3], count)
        directions = torch.randn(shape, generator=generator, dtype=torch.float64).to(x_BTHD)
        projected = x_BTHD.transpose(1, 2) @ directions
        if self.hash == "argmax":
            return torch.cat([projected, -projected], 3).argmax(3)
        values = 2 ** torch.arange(bits, device=x_BTHD.device)
        buckets: torch.Tensor = ((projected > 0) * values).sum(3)
        return buckets


def latest_of_bucket(
    bucket_q: torch.Tensor, bucket_k: torch.Tensor, positions: torch.Tensor, latest: int
) -> torch.Tensor:
    """The latest keys up to a query that are in its bucket, ``[B, H, S, latest]``; -1 for none.

    Args:
        bucket_q: ``[B, H, S]``; bucket_k: ``[B, G, T]``.
        positions: ``[S]``, of the queries among the keys.
    """
    import torch

    T, group = bucket_k.shape[2], bucket_q.shape[1] // bucket_k.shape[1]
    # Keys in order of bucket and position; those of a bucket up to a query end where the query
    # itself would be inserted.
    order = (bucket_k * T + torch.arange(T, device=bucket_k.device)).sort(-1)
    codes, keys = (x.repeat_interleave(group, 1) for x in (order.values, order.indices))
    own = bucket_q * T
    begin = torch.searchsorted(codes, own)
    end = torch.searchsorted(codes, own + positions, right=True)
    slots = end[..., None] - 1 - torch.arange(min(latest, T), device=bucket_q.device)
    found = keys.gather(2, slots.clamp(min=0).flatten(2)).view(slots.shape)
    index: torch.Tensor = found.masked_fill_(slots < begin[..., None], -1)
    return index.to(torch.int32)


def running_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The keys with the highest scores ``[B, G, T]`` up to each query, ``[B, G, T, k]``; -1 for
    none.

    A run of queries chooses among the best keys before it and its own keys.
    """
    import torch

    B, G, T = scores.shape
    count, device = min(top_k, T), scores.device
    index = torch.full((B, G, T, count), -1, dtype=torch.int32, device=device)
    best = torch.zeros((B, G, 0), dtype=torch.int64, device=device)
    for begin in range(0, T, count):
        end = min(begin + count, T)
        own = torch.arange(begin, end, device=device).expand(B, G, -1)
        candidates = torch.cat([best, own], 2)
        own_scores = scores.gather(2, candidates)[:, :, None].repeat(1, 1, end - begin, 1)
        later = candidates[:, :, None] > torch.arange(begin, end, device=device)[:, None]
        top = own_scores.masked_fill_(later, -torch.inf).topk(min(count, candidates.shape[2]), -1)
        chosen = candidates[:, :, None].expand(own_scores.shape).gather(3, top.indices)
        chosen = chosen.masked_fill(top.values == -torch.inf, -1)
        index[:, :, begin:end, : chosen.shape[3]] = chosen.to(torch.int32)
        best = chosen[:, :, -1]
    return index


def _are_members(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Booleans ``[…, n]``: which values are among the entries ``[…, m]``."""
    import torch

    ordered = of.sort(-1).values
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=of.shape[-1] - 1)
    return ordered.gather(-1, place) == values
