"""One rank of a process group, as the public functions use it, and what ranks agree on.

Every call begins with one small all-reduce over Gloo, in which ranks compare what they are about to
compute: so a rank that was given something else makes all ranks raise the same error, and none
waits for messages that never come.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpbench.api.prepared import Prepared, find_disagreement, require_agreement
from cpbench.core.operator import Unsupported
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.process_group import is_alive
from cpbench.parallel.world import World

MOST_PREPARED = 64  # computations kept for each group

Tensors = Mapping[str, torch.Tensor]  # by name; q is a shard of queries, the others of keys
W = TypeVar("W", bound=Prepared)


class Call(ABC, Generic[W]):
    """What all ranks must call with the same values, but for the device; hashable."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The values in words, equal on all ranks."""

    @abstractmethod
    def world(self, member: GroupMember) -> World:
        """The computation as all ranks see it.

        Raises:
            ValueError: if the layout does not fit.
        """

    @abstractmethod
    def prepare(self, world: World, member: GroupMember, tensors: Tensors) -> W:
        """Prepare this rank, without communication.

        Raises:
            ValueError: with the reason, if it is not supported.
        """

    @functools.cached_property
    def checksum(self) -> int:
        """63 bits of the text."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big") >> 1


class GroupMember:
    """One rank of a process group: its communicators, and the computations prepared on it.

    The first call is collective.
    """

    def __init__(self, group: Any) -> None:
        self.control = Control(group)
        self.comm = TorchComm(group)
        self.ranks_per_node = self.control.ranks_per_node()
        self.prepared: dict[Call[Any], tuple[Call[Any], Any]] = {}  # the last ones, in their order

    def agree(self, read: Callable[[], tuple[Call[W], Tensors]]) -> tuple[W, Tensors]:
        """Prepare a call on all ranks, unless that has been done; all raise if one refuses or
        disagrees.

        Args:
            read: reads the arguments of the call; it may raise.
        """
        call: Call[W] | None = None
        work: W | None = None
        tensors: Tensors = {}
        refusal, cause = "", None
        try:
            call, tensors = read()
            call, work = self.prepared.get(call, (call, None))  # the former has its checksum
            refusal = _wrong_length(work.world, tensors) if work else ""
        except Exception as error:  # whatever it is, the other ranks must hear of it
            refusal, cause = " ".join(str(error).split()) or type(error).__name__, error
        checksum = call.checksum if call else 0
        if not self.control.agree(checksum, ready=work is not None and not refusal):
            try:
                work = self._prepare(call, refusal, tensors)
            except ValueError as refused:
                raise refused from cause
        assert work is not None
        return work, tensors

    def _prepare(self, call: Call[W] | None, refusal: str, tensors: Tensors) -> W:
        """Prepare a call on all ranks; ``call`` is None if ``refusal`` says why this rank has
        none."""
        calls = self.control.all_gather((refusal, call.text if call else ""))
        _raise_first([reason for reason, _ in calls], ValueError)
        if message := find_disagreement([(text, 0) for _, text in calls]):
            raise RuntimeError(message)
        assert call is not None
        work, wrong_length = None, ""
        try:
            world = call.world(self)
            wrong_length = _wrong_length(world, tensors)
            work = call.prepare(world, self, tensors)
        except ValueError as error:
            refusal = str(error)
        fingerprint = work.fingerprint if work else ("", 0)
        ranks = self.control.all_gather((wrong_length, refusal, fingerprint))
        _raise_first([reason for reason, _, _ in ranks], ValueError)
        _raise_first([reason for _, reason, _ in ranks], Unsupported)
        assert work is not None
        require_agreement(self.control, work, [fingerprint for _, _, fingerprint in ranks])
        work.connect(self.comm)
        self.prepared[call] = (call, work)
        if len(self.prepared) > MOST_PREPARED:
            del self.prepared[next(iter(self.prepared))]
        return work


def _wrong_length(world: World, tensors: Tensors) -> str:
    """Why the local tensors do not fit the layouts, or an empty text."""
    for name, tensor in tensors.items():
        layout = world.queries if name == "q" else world.keys
        if tensor.shape[1] != layout.local_len:
            return (
                f"{name} has {tensor.shape[1]} tokens; layout {layout.name} assigns "
                f"{layout.local_len} of {layout.seq_len} to each of {world.size} ranks"
            )
    return ""


def _raise_first(refusals: list[str], kind: type[ValueError]) -> None:
    """Raise the first refusal, with the number of its rank unless all ranks have the same."""
    first = next((rank for rank, reason in enumerate(refusals) if reason), None)
    if first is not None:
        alone = len(set(refusals)) > 1
        raise kind(f"rank {first}: {refusals[first]}" if alone else refusals[first])


_MEMBERS: dict[Any, GroupMember] = {}


def member_of(group: Any) -> GroupMember:
    """This rank's part of a process group.

    Raises:
        ValueError: if there is none.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            example = f", such as mesh[{names[-1]!r}]" if names else ""
            raise ValueError(f"group is a DeviceMesh of {group.ndim} dimensions: use one{example}")
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this rank belongs to, not {group!r}")
    if group not in _MEMBERS:
        for other in [other for other in _MEMBERS if not is_alive(other)]:
            member = _MEMBERS.pop(other)
            member.comm.destroy()
            member.control.destroy()
        _MEMBERS[group] = GroupMember(group)
    return _MEMBERS[group]
