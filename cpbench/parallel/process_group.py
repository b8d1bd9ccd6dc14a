"""Process groups that their members create alone.

``torch.distributed.new_group(use_local_synchronization=True)`` names a group by the number of
groups that the process knows, so it hangs where members know unequal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

DEFAULT_TIMEOUT_S = 1800.0


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
    while name in c10d._world.pg_names.values():
        name += "+"
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        c10d.Backend(backend or dist.get_backend_config(parent)),
        c10d._get_default_store(),
        name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=timeout_s) if timeout_s else _timeout(parent),
    )
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group


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
