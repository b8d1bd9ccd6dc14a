"""Process groups that their members create alone, and the options of those of NCCL.

``torch.distributed.new_group(use_local_synchronization=True)`` names a group by the number of
groups that the process knows, so it hangs where members know unequal numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

DEFAULT_TIMEOUT_S = 1800.0

# How often a name was used since the default group was created: the store still has the addresses
# of groups that were destroyed.
_USED_NAMES: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()


def create_group(
    parent: Any, members: Sequence[int], purpose: str, backend: str = "", timeout_s: float = 0.0
) -> Any:
    """Create a process group of some ranks of ``parent``; each of them calls it, and no other.

    Args:
        parent: a process group; None for the default one.
        members: ranks in ``parent``, ascending.
        purpose: part of the name of the group.
        backend: as for ``new_group``; that of the parent unless given.
        timeout_s: of its operations; that of the parent unless given.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    parent = dist.group.WORLD if parent is None else parent
    ranks = [dist.get_global_rank(parent, member) for member in members]
    name = f"cpbench {purpose} of {parent.group_name}: {'_'.join(map(str, ranks))}"
    used = _USED_NAMES.setdefault(dist.group.WORLD, Counter())
    used[name] += 1
    backend = backend or dist.get_backend_config(parent)
    timeout = timedelta(seconds=timeout_s) if timeout_s else _timeout(parent)
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        c10d.Backend(backend),
        c10d._get_default_store(),
        f"{name} #{used[name]}",  # type: ignore[arg-type]
        backend_options=backend_options(backend, timeout),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group


def backend_options(backend: str, timeout: timedelta) -> Any:
    """The options of a group's backend: of NCCL, streams of high priority, so that a transfer does
    not wait for the blocks of a kernel that fills the GPU; None for other backends.

    Args:
        backend: as for ``new_group``, such as ``"cpu:gloo,cuda:nccl"``.
        timeout: of its operations.
    """
    if "nccl" not in backend:
        return None
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options


def stream_priority(group: Any = None) -> str | None:
    """The priority of the streams of a group on NCCL, ``"high"`` or ``"normal"``; None on others.

    Args:
        group: the default group unless given.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or "nccl" not in dist.get_backend_config(group):
        return None
    group = dist.group.WORLD if group is None else group
    options = group._get_backend(torch.device("cuda")).options
    return "high" if options.is_high_priority_stream else "normal"


def destroy_group(group: Any) -> None:
    """Destroy a group of :func:`create_group`, if it has not been with all others."""
    import torch.distributed as dist

    if is_alive(group):
        dist.destroy_process_group(group)


def is_alive(group: Any) -> bool:
    """Whether a process group has not been destroyed."""
    from torch.distributed import distributed_c10d as c10d

    return group in c10d._world.pg_map


def _timeout(group: Any) -> timedelta:
    """The timeout of the operations of a group."""
    import torch

    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        return timeout
    return timedelta(seconds=DEFAULT_TIMEOUT_S)
