"""Selector `msa`: a query attends to the pooled keys of the documents that score highest.

Source: Memory Sparse Attention (EverMind, 2026): the sequence is documents and then a query.  The
tokens of a document see their own document alone, with positions that restart in each.  Keys and
values of documents are means of chunks, and the score of a chunk is the cosine of its mean key with
the tokens of the query.  Those tokens take one softmax over their own past and the chunks of the
documents whose best chunk scores highest, at positions that begin at the number of documents.  The
original scores by router keys and queries, from weights of their own; here they are k and q before
RoPE, and chunks are means of keys after RoPE.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.patterns import WIDE
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import check_minimum, qk_scores, row_chunks, upcast
from cpbench.selectors.common.rotating import ROPE_PARAMS, RotatingSelector
from cpbench.selectors.common.windows import interval_mask
from cpbench.selectors.selections import Tokens

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="msa",
        summary="top-k documents by their chunks, of which it attends to means; positions restart",
        source="Memory Sparse Attention (EverMind, 2026)",
        load="cpbench.selectors.joined.msa:Msa",
        masks=("causal",),
        params=(
            "doc_lens",
            "query_len",
            "prefix",
            "chunk",
            "top_k",
            "over_heads",
            "over_tokens",
            *ROPE_PARAMS,
            "kernel",
        ),
        external_lse=False,
        rounds_scores=True,  # what is turned, and pooled keys, are in the dtype of q and k
        variants=("doc_lens=32,query_len=64,prefix=16,chunk=16,top_k=2",),
        selects=True,
        looks_ahead="sequence",
        rotates=True,
    ),
)
OVER_HEADS = ("mean", "max")
OVER_TOKENS = ("max", "mean", "last")


class Msa(RotatingSelector):
    """Documents for all tokens and heads of the query together.

    Args:
        doc_lens: tokens of the documents, one number or several that are repeated in turn; each a
            multiple of ``chunk``, but for the last one, which the query may cut.
        query_len: least number of tokens of the query, the last of the sequence; it has up to
            ``chunk - 1`` more, since it begins after a whole chunk.
        prefix: first tokens, which the query sees and documents do not; a multiple of ``chunk``.
        chunk: tokens per mean.
        top_k: documents that are chosen.
        over_heads: what the score of a chunk is over heads: ``"mean"`` or ``"max"``.
        over_tokens: what it is over the tokens of the query: ``"max"``, ``"mean"`` or ``"last"``.
        kernel: see :class:`Selector`.
        rope: of the RoPE that it applies, see :class:`RotatingSelector`.
    """

    name = "msa"
    branch_kinds = ("mask", "tokens")

    def __init__(
        self,
        doc_lens: int | tuple[int, ...] = 1024,
        query_len: int = 512,
        prefix: int = 0,
        chunk: int = 64,
        top_k: int = 16,
        over_heads: str = "mean",
        over_tokens: str = "max",
        kernel: str = "",
        **rope: Any,
    ) -> None:
        super().__init__(kernel, **rope)
        check_minimum(self.name, 1, query_len=query_len, chunk=chunk, top_k=top_k)
        check_minimum(self.name, 0, prefix=prefix)
        lens = tuple(doc_lens) if isinstance(doc_lens, tuple | list) else (doc_lens,)
        for length in lens:
            if type(length) is not int or length < 1 or length % chunk:
                raise ValueError(
                    f"msa: doc_lens = {doc_lens}: {length} is not a multiple of chunk = {chunk}"
                )
        if not lens:
            raise ValueError("msa: doc_lens is empty")
        if prefix % chunk:
            raise ValueError(f"msa: prefix = {prefix} is not a multiple of chunk = {chunk}")
        for key, value, known in (
            ("over_heads", over_heads, OVER_HEADS),
            ("over_tokens", over_tokens, OVER_TOKENS),
        ):
            if value not in known:
                raise ValueError(f"msa: {key} = {value!r} is not one of {', '.join(known)}")
        self.doc_lens, self.query_len, self.prefix = lens, query_len, prefix
        self.chunk, self.top_k = chunk, top_k
        self.over_heads, self.over_tokens = over_heads, over_tokens

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        parts = self.parts(k.shape[1])
        positions = parts.positions(self.prefix + self.top_k)
        turn_q, turn_k = self.turn(positions[plan.positions], plan), self.turn(positions, plan)
        own = plan.of_queries(parts.own_mask())
        branches = [Branch(mask=own, turn_q=turn_q, turn_k=turn_k)]
        of_query = np.flatnonzero(plan.positions >= parts.query)
        if len(parts.documents) and len(of_query):
            pool = Pool(self.chunk, self.chunk)
            seen = np.where(np.arange(parts.tokens) >= parts.query, parts.query // self.chunk, 0)
            chunks = interval_mask(
                np.minimum(self.prefix // self.chunk, seen), seen, pool.num_windows(parts.tokens)
            )
            index = self._chosen_chunks(q[:, of_query[0] :], k, parts)
            rows = index.new_full((len(q), 1, q.shape[1], index.shape[1]), -1)
            rows[:, :, of_query[0] :] = index[:, None, None]
            selected = Tokens(plan.of_queries(chunks), rows, q.shape[2])
            branches.append(Branch(mask=selected, pool_k=pool, turn_q=turn_q, turn_k=turn_k))
        return tuple(branches)

    def parts(self, tokens: int) -> Parts:
        """The documents and the query of a sequence of so many tokens."""
        prefix = min(self.prefix, tokens)
        query = prefix + max(tokens - self.query_len - prefix, 0) // self.chunk * self.chunk
        documents, begin = [], prefix
        for length in itertools.cycle(self.doc_lens):
            if begin >= query:
                break
            documents.append(begin)
            begin += length
        return Parts(tokens, prefix, np.array(documents, np.int64), query)

    def _chosen_chunks(self, q: torch.Tensor, k: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The chunks of the chosen documents of each batch, ``[B, n]`` int32, -1 for none.

        Args:
            q: of the query.
        """
        import torch

        starts = torch.as_tensor(parts.documents // self.chunk, device=k.device)
        last = parts.query // self.chunk
        scores = self._chunk_scores(q, k[:, parts.documents[0] : parts.query])
        ends = torch.cat([starts[1:], starts.new_tensor([last])])
        chunk = torch.arange(int(starts[0]), last, device=k.device)
        document = torch.searchsorted(starts, chunk, right=True) - 1
        best = scores.new_full((len(q), len(starts)), -torch.inf)
        best.scatter_reduce_(1, document.expand(len(q), -1), scores, "amax")
        chosen = best.topk(min(self.top_k, len(starts)), dim=1).indices.sort(dim=1).values
        most = int((ends - starts).max())
        index = starts[chosen][..., None] + torch.arange(most, device=k.device)
        index = index.masked_fill(index >= ends[chosen][..., None], -1)
        return index.flatten(1).to(torch.int32)

    def _chunk_scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """``[B, n]``: the score of each chunk of the documents."""
        import torch

        normalize = torch.nn.functional.normalize
        means = normalize(upcast(Pool(self.chunk, self.chunk).mean(upcast(k))), dim=-1)
        if self.over_tokens == "last":
            q = q[:, -1:]
        total = None
        for begin, end in row_chunks(q.shape[1], len(q) * q.shape[2] * means.shape[1], q.device):
            cosines = qk_scores(normalize(upcast(q[:, begin:end]), dim=-1), means)
            of_tokens = cosines.mean(1) if self.over_heads == "mean" else cosines.amax(1)
            if self.over_tokens == "max":
                part = of_tokens.amax(1)
                total = part if total is None else torch.maximum(total, part)
            else:
                part = of_tokens.sum(1) / q.shape[1]
                total = part if total is None else total + part
        assert total is not None
        return total


class Parts(NamedTuple):
    """Parts of a sequence: a prefix, documents, and a query.

    Attributes:
        tokens: of the sequence.
        prefix: tokens of the prefix.
        documents: ``[n]``, first token of each document.
        query: first token of the query.
    """

    tokens: int
    prefix: int
    documents: IntArray
    query: int

    def positions(self, of_query: int) -> IntArray:
        """``[T]``: positions that restart in each document, and begin at ``of_query`` in the
        query."""
        begins = self._begins()
        token = np.arange(self.tokens)
        within: IntArray = token - begins[np.searchsorted(begins, token, side="right") - 1]
        return within + np.where(token >= self.query, of_query, 0)

    def own_mask(self) -> AttnMask:
        """Each token sees its own part up to itself; the query also sees the prefix."""
        begins = self._begins()
        ends = np.append(begins[1:], self.tokens)
        causal = np.column_stack(
            [begins, ends, begins, ends, np.full(len(begins), -WIDE), np.zeros_like(begins)]
        )
        prefix = np.array([[self.query, self.tokens, 0, self.prefix, -WIDE, WIDE]])
        rows = np.concatenate([causal, prefix[: int(self.query > 0)]])
        return AttnMask.from_slices(self.tokens, self.tokens, rows)

    def _begins(self) -> IntArray:
        """The first token of every part that is not empty."""
        begins = np.unique(np.concatenate([[0], self.documents, [self.query]]))
        return begins[begins < self.tokens].astype(np.int64)
