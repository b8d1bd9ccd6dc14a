"""Context parallelism of sequence mixers: a scan of the states that runs of tokens hand on.

Each run is summarised; while summaries are exchanged, it is computed from state 0; then what the
true state at its start changes is added.  In the backward pass the gradients of states are scanned
the other way: no gradient of a transition leaves a rank.

    by=allgather  summaries of all ranks, folded on each (LASP-2)
    by=ring       a state from rank to rank, in ``blocks`` of its columns (LASP, ZeCO)
    by=doubling   recursive doubling, in ceil(log2 P) rounds

Sources: LASP (arXiv 2404.02882), LASP-2 (arXiv 2502.07563), ZeCO (arXiv 2507.01004).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.operator import MixerInputs, Unsupported
from cpbench.core.registry import StrategyInfo
from cpbench.strategies.scan import doubling, gather, ring
from cpbench.strategies.scan.slots import Order, Slot, find_orders, find_slots

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.core.problem import Problem
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.mixing import BoundMixer, MixerGradients, Summary
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

    BySlot = dict[int, torch.Tensor]

STRATEGY = StrategyInfo(
    name="scan",
    summary="sequence mixers: runs are summarised, and their states exchanged",
    source="LASP-2, arXiv 2502.07563; ZeCO, arXiv 2507.01004",
    load="cpbench.strategies.scan.strategy:Scan",
    layouts=("contiguous", "zigzag", "zigzag_document", "dispatch"),
    kinds=("mixer",),
    value_dims=True,
    params=("by", "blocks"),
    mixer_variants=("by=ring", "by=ring,blocks=2", "by=doubling"),
)
WAYS = ("allgather", "ring", "doubling")


@dataclass(frozen=True)
class Plan:
    """The scan as one rank sees it.

    Attributes:
        problem: the global problem.
        decays: ``[H]``, of a mixer that has its own; None if g is an input, or there is none.
        own: the slots of this rank by their numbers, in the order of their tokens.
        last: the number of the last slot of all.
        forward, backward: orders of all slots.
    """

    problem: Problem
    decays: torch.Tensor | None
    own: dict[int, Slot]
    last: int
    forward: Order
    backward: Order

    @property
    def keeps(self) -> bool:
        """Whether a backward pass follows."""
        return self.problem.backward


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
        inputs: of all local tokens, with g where the mixer has its own decays.
        slots: of each own slot, what the mixer saved.
        transitions: of slots, own and received, as the forward pass applies them.
    """

    inputs: MixerInputs
    slots: dict[int, Any]
    transitions: BySlot


class Scan:
    """The strategy.

    Args:
        by: how states are exchanged: ``"allgather"``, ``"ring"`` or ``"doubling"``.
        blocks: of columns of a state, for a ring.
    """

    def __init__(self, by: str = "allgather", blocks: int = 1) -> None:
        if by not in WAYS:
            raise ValueError(f"scan: by = {by!r} is not one of {', '.join(WAYS)}")
        if blocks < 1:
            raise ValueError(f"scan: blocks = {blocks} must be 1 or more")
        if blocks > 1 and by != "ring":
            raise ValueError(f"scan: blocks = {blocks} is for by=ring, not by={by}")
        self.by, self.blocks = by, blocks

    def unsupported(self, world: World) -> str | None:
        if world.shared_mask.causal_documents is None:
            return (
                "scan takes masks that are causal, also within documents, not this one, which is "
                f"{world.shared_mask.kind}"
            )
        if self.blocks > world.problem.value_dim:
            columns = world.problem.value_dim
            return f"scan: blocks = {self.blocks} are more than the {columns} columns of a state"
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        try:
            mixer = op.bind(world.problem)
        except Unsupported as refusal:
            raise Unsupported(f"scan: {refusal}") from None
        documents = world.shared_mask.causal_documents
        assert documents is not None
        slots = find_slots(world.keys, documents, mixer.from_initial)
        if mixer.fixed_chunk:
            _require_whole_chunks(slots, mixer, world.keys.name)
        forward, backward = find_orders(slots)
        own = {slot: slots[slot] for slot in forward.own(rank)}
        decays = op.decays(world.problem)
        return Plan(world.problem, decays, own, len(slots) - 1, forward, backward)

    def forward(
        self, qkv: MixerInputs, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        mixer, x = op.bind(plan.problem), qkv.by_token.with_decays(plan.decays)
        order, own = plan.forward, plan.own
        runs, starts = _runs(x, plan), _initial(qkv, plan, mixer)
        summaries, known = self._summarise(runs, starts, plan, mixer)
        transitions = {n: y.transition for n, y in summaries.items() if y.transition is not None}
        results: dict[int, Any] = {}

        def compute() -> Iterator[None]:
            for number, slot in own.items():
                keep = plan.keeps or order.taking[number]
                results[number] = mixer.output(
                    runs[number], slot.resets, starts.get(number), known[number], keep
                )
                yield

        like = mixer.empty_summary(x)
        later = (plan.backward,) if plan.keeps else ()
        exchange = self._exchange(order, summaries, like, mixer, comm, transitions, (order, *later))
        taken = _beside(exchange, compute())
        for number, start in taken.items():
            out, end, saved = results[number]
            end = end + mixer.respond(runs[number], own[number].resets, start, saved, out)
            results[number] = out, end, saved
        out = _join({n: found[0] for n, found in results.items()}, own, x.v)
        last = None
        if need_lse:
            found = results.get(plan.last)
            last = like.state.zero_() if found is None else found[1].contiguous()
            comm.all_reduce(last).wait()
        saved = {n: found[2] for n, found in results.items()}
        inputs = x._replace(initial_state=qkv.initial_state)
        return out, last, Saved(inputs, saved, transitions)

    def summarise(self, qkv: MixerInputs, plan: Plan, op: BoundOperator) -> None:
        """The first step of a forward pass: the summaries of the runs that others take."""
        mixer, x = op.bind(plan.problem), qkv.by_token.with_decays(plan.decays)
        self._summarise(_runs(x, plan), _initial(qkv, plan, mixer), plan, mixer)

    def _summarise(
        self, runs: dict[int, MixerInputs], starts: BySlot, plan: Plan, mixer: BoundMixer
    ) -> tuple[dict[int, Summary], dict[int, Any]]:
        """Summaries of own slots that others take, and what ``output`` need not compute again."""
        summaries: dict[int, Summary] = {}
        known: dict[int, Any] = dict.fromkeys(plan.own)
        for number, slot in plan.own.items():
            if plan.forward.taker(number) is not None:
                summary, known[number] = mixer.summarise(runs[number], slot.resets)
                if number in starts and not slot.resets:
                    summary = _started(summary, starts[number], mixer)
                summaries[number] = summary
        return summaries, known

    def backward(
        self,
        dout: torch.Tensor,
        saved: Saved,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        dstate: torch.Tensor | None = None,
    ) -> Gradients:
        mixer, x = op.bind(plan.problem), saved.inputs.by_token
        order, own = plan.backward, plan.own
        runs = _runs(x, plan)
        douts = {number: dout[:, slot.tokens] for number, slot in own.items()}
        if dstate is not None:
            dstate = dstate.contiguous().clone()
            comm.all_reduce(dstate).wait()
        transitions = {n: mixer.transpose(y) for n, y in saved.transitions.items()}
        gradients: dict[int, MixerGradients] = {}

        def differentiate(number: int, dend: torch.Tensor | None) -> None:
            gradients[number] = mixer.backward(
                runs[number], own[number].resets, saved.slots[number], douts[number], dend
            )

        if dstate is not None and plan.last in own:
            differentiate(plan.last, dstate)
        summaries: dict[int, Summary] = {}
        for number in order.own(comm.rank):
            if order.taker(number) is not None:
                if number in gradients:
                    gradient = gradients[number][1]
                else:
                    gradient = mixer.summarise_back(
                        runs[number], own[number].resets, douts[number], saved.slots[number]
                    )
                summaries[number] = mixer.summary(transitions.get(number), gradient)

        def compute() -> Iterator[None]:
            for number in own:
                if not order.taking[number] and number not in gradients:
                    differentiate(number, None)
                    yield

        exchange = self._exchange(
            order, summaries, mixer.empty_summary(x), mixer, comm, transitions, ()
        )
        for number, dend in _beside(exchange, compute()).items():
            differentiate(number, dend)
        found = {number: gradients[number][0] for number in own}
        joined = MixerInputs.of({
            name: _join({n: getattr(found[n], name) for n in own}, own, whole)
            for name, whole in x._asdict().items() if whole is not None
        })  # fmt: skip
        if plan.decays is not None:
            joined = joined._replace(g=None)
        if saved.inputs.initial_state is not None:
            initial = mixer.empty_summary(x).state.zero_()
            for number, slot in own.items():
                if _starts(slot, mixer):
                    initial += gradients[number][1]
            joined = joined._replace(initial_state=initial)
        return joined.given

    def _exchange(
        self,
        order: Order,
        own: dict[int, Summary],
        like: Summary,
        mixer: BoundMixer,
        comm: Comm,
        transitions: BySlot,
        to_send: tuple[Order, ...],
    ) -> Generator[None, None, BySlot]:
        """See ``exchange`` of ``gather``; other ways send what they need in each pass."""
        if self.by == "ring":
            return ring.exchange(order, own, like, mixer, comm, self.blocks)
        if self.by == "doubling":
            return doubling.exchange(order, own, like, mixer, comm)
        return gather.exchange(order, own, like, mixer, comm, transitions, to_send)


def _require_whole_chunks(slots: tuple[Slot, ...], mixer: BoundMixer, layout: str) -> None:
    """Raise an Unsupported if a slot begins inside a chunk that is part of a definition."""
    begun = 0
    for slot in slots:
        begun = slot.start if slot.begins else begun
        if inside := (slot.start - begun) % mixer.fixed_chunk:
            raise Unsupported(
                f"{mixer.name} updates once per chunk of {mixer.fixed_chunk} tokens: layout "
                f"{layout} cuts one after {inside} tokens, at token {slot.start}; use a layout, a "
                "number of ranks or a chunk that cuts none"
            )


def _runs(x: MixerInputs, plan: Plan) -> dict[int, MixerInputs]:
    """The inputs of own slots."""
    return {n: x.tokens(slot.tokens.start, slot.tokens.stop) for n, slot in plan.own.items()}


def _initial(x: MixerInputs, plan: Plan, mixer: BoundMixer) -> BySlot:
    """The initial state by the slots that start from it; none if it is 0."""
    if x.initial_state is None:
        return {}
    return {n: x.initial_state for n, slot in plan.own.items() if _starts(slot, mixer)}


def _starts(slot: Slot, mixer: BoundMixer) -> bool:
    """Whether a slot starts from the initial state."""
    return slot.start == 0 or (slot.begins and mixer.from_initial)


def _started(summary: Summary, start: torch.Tensor, mixer: BoundMixer) -> Summary:
    """The summary of a run whose state at the start is known: its state is that at the end."""
    end = mixer.apply(summary.transition, start.to(summary.state.dtype)) + summary.state
    return mixer.summary(summary.transition, end)


def _beside(exchange: Generator[None, None, BySlot], work: Iterator[None]) -> BySlot:
    """Run an exchange, and a piece of work whenever its messages are on their way; all of both."""
    while True:
        try:
            next(exchange)
        except StopIteration as done:
            taken: BySlot = done.value
            break
        next(work, None)
    for _ in work:
        pass
    return taken


def _join(parts: BySlot, own: dict[int, Slot], whole: torch.Tensor) -> torch.Tensor:
    """Tensors of own slots, ``[B, S, …]``, as one like ``whole``, ``[B, L, …]``; 0 for padding."""
    joined = whole.new_empty(whole.shape)
    end = 0
    for number, slot in sorted(own.items(), key=lambda item: item[1].local):
        joined[:, end : slot.local] = 0
        joined[:, slot.tokens] = parts[number]
        end = slot.tokens.stop
    joined[:, end:] = 0
    return joined
