"""Site profiles: settings of a cluster, in TOML, checked before anything is submitted.

::

    partition = "gpu"
    account = "lab"
    gpus_per_node = 8
    time = "4:00:00"
    modules = ["cuda/12.8"]
    interface = "ib0"
    ranks = "srun"                     # or "torchrun", "mpi"

    [environment]
    NCCL_DEBUG = "WARN"

    [container]
    kind = "pyxis"                     # or "apptainer"
    image = "nvcr.io#nvidia/pytorch:25.06-py3"
    mounts = ["/scratch:/scratch"]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cpbench.core.user_files import load_toml, require_known

RANKS = {"srun": "srun", "torchrun": "srun-torchrun", "mpi": "srun-mpi", "mpiexec": "mpi"}
PACKING = ("size", "array", "one")
CONTAINERS = ("pyxis", "apptainer")
MAX_TIME_S = 366 * 86400
CORES_PER_GPU = 4  # threads of a rank: Python, autograd, NCCL's proxy and watchdog, Gloo
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Container:
    """The container in which ranks run.

    Attributes:
        kind: ``"pyxis"`` (srun's ``--container-image``) or ``"apptainer"``.
        image: image name or file, for that tool.
        mounts: ``HOST:CONTAINER`` each; they must include the run directory and cpbench.
        options: additional options.
    """

    kind: str = ""
    image: str = ""
    mounts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Settings of a site.

    Attributes:
        partition, account, qos, constraint, reservation, gres, nodelist: options of sbatch; ""
            omits them.  A job takes all nodes of ``nodelist``.
        time: time limit of a job, in the format of sbatch.
        signal_s: seconds before the limit at which the run stops; all results are kept.
        gpus_per_node: ranks per node, if each rank has a GPU.
        ranks_per_node: ranks per node otherwise.
        cpus_per_rank: cores bound to each rank; 0 for 4 on GPUs, where NCCL has threads of its
            own beside those of Python, autograd and Gloo, and 1 on CPUs.
        memory: memory of a node to request (``--mem``).
        gpu_memory: memory of a GPU (or of a rank on CPUs); cases that do not fit are not run.
        exclusive: whether jobs request whole nodes.
        exclude: nodes never to use.
        spare_nodes: additional nodes to request, to replace bad ones.
        gpu_gres: whether to request GPUs with ``--gres=gpu:N`` (else ``--gpus-per-node``).
        sbatch, srun: additional options, one argument each.
        ranks: what starts the ranks: ``"srun"``, ``"torchrun"`` under srun, ``"mpi"`` (srun's MPI
            support), or ``"mpiexec"`` inside the allocation.
        cpu_bind, gpu_bind: binding options of srun.  A rank may see all GPUs of its node, or a
            single one that is bound to it; ``gpu_bind`` is left out where a task of srun starts
            several ranks (torchrun).
        interface: network interface for the ranks' communication.
        modules: environment modules to load in the job.
        setup: shell lines to run after the modules are loaded, not quoted.
        environment: environment variables of the job.
        python: command that starts this Python on the nodes.
        device: ``"cuda"`` or ``"cpu"``; by default ``"cuda"`` if ``gpus_per_node`` is set.
        scratch: folder on each node for compiled kernels, with a sub-folder per job.
        packing: one job per world size (``"size"``), an array of chunks of ``chunk`` cases
            (``"array"``), or all world sizes in one allocation (``"one"``).
        throttle: max number of tasks of an array that run at a time; 0 for no limit.
        chain: whether each job waits for the previous one to end.
        preflight: whether nodes are checked before they are used.
        requeue: whether Slurm may restart a job that was preempted or lost a node.
        poll_s: max interval of requests to the controller.
        mail: address to notify when the last job ends.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    gres: str = ""
    nodelist: str = ""
    exclude: tuple[str, ...] = ()
    spare_nodes: int = 0
    time: str = "1:00:00"
    signal_s: int = 120
    gpus_per_node: int = 0
    ranks_per_node: int = 0
    cpus_per_rank: int = 0
    memory: str = ""
    gpu_memory: str = ""
    exclusive: bool = False
    gpu_gres: bool = True
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    ranks: str = "srun"
    cpu_bind: str = ""
    gpu_bind: str = ""
    interface: str = ""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    container: Container = Container()
    python: tuple[str, ...] = ()
    device: str = ""
    scratch: str = "/tmp"
    packing: str = "size"
    chunk: int = 50
    throttle: int = 0
    chain: bool = False
    preflight: bool = True
    requeue: bool = True
    poll_s: float = 30.0
    mail: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_value(item.name, getattr(self, item.name))
        for name, value, choices in (
            ("ranks", self.ranks, tuple(RANKS)),
            ("packing", self.packing, PACKING),
            ("device", self.device, ("", "cpu", "cuda")),
            ("container.kind", self.container.kind, ("", *CONTAINERS)),
        ):
            if value not in choices:
                names = ", ".join(filter(None, choices))
                raise ValueError(f"{name} = {value!r} is none of {names}")
        if bool(self.container.kind) != bool(self.container.image):
            raise ValueError("container: kind and image go together")
        if self.device == "cuda" and not self.gpus_per_node:
            raise ValueError('device = "cuda" needs gpus_per_node, how many GPUs a node has')
        if self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk} must be 1 or more")
        if not self.poll_s < math.inf:  # true for nan too
            raise ValueError(f"poll_s = {self.poll_s} must be a number of seconds")
        if not self.scratch.startswith("/"):
            raise ValueError(f"scratch = {self.scratch!r} must be an absolute path")
        container_lists = (self.container.mounts, self.container.options)
        if not all(isinstance(value, tuple) for value in container_lists):
            raise ValueError("container: mounts and options are lists of strings")
        if not all(map(_INTERFACE.fullmatch, filter(None, self.interface.split(",")))):
            raise ValueError(
                f"interface = {self.interface!r} must be names of interfaces, such as 'ib0' or "
                "'ib0,ib1', not a pattern"
            )
        if self.signal_s >= parse_time_limit(self.time):
            raise ValueError(f"signal_s = {self.signal_s} must be less than time = {self.time!r}")
        for name in self.environment:
            if not _NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is not the name of a variable")
        if self.memory not in ("", "0"):  # 0 is all memory of a node
            parse_bytes(self.memory, "memory")
        if self.gpu_memory:
            parse_bytes(self.gpu_memory, "gpu_memory")

    @property
    def max_ranks_per_node(self) -> int:
        """Number of ranks that fit on a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def rank_device(self) -> str:
        """The device of the ranks: ``"cuda"`` or ``"cpu"``."""
        return self.device or ("cuda" if self.gpus_per_node else "cpu")

    @property
    def cores_per_rank(self) -> int:
        """Number of cores bound to each rank."""
        return self.cpus_per_rank or (CORES_PER_GPU if self.rank_device == "cuda" else 1)

    @property
    def launcher(self) -> str:
        """The launcher inside the allocation, a name in ``LAUNCHERS``."""
        return RANKS[self.ranks]

    def node_count(self, world_size: int) -> int:
        """Min number of nodes for the ranks, which must divide evenly unless srun starts them."""
        min_nodes = -(-world_size // self.max_ranks_per_node)
        if self.ranks == "srun":
            return min_nodes
        return next(n for n in range(min_nodes, world_size + 1) if world_size % n == 0)


def load(path: Path) -> Profile:
    """Load a profile from a TOML file.

    Raises:
        ValueError: for a file that is not valid; one line, with the name of the file.
        OSError: when the file cannot be read.
    """
    return load_toml(path, from_table)


def from_table(table: Mapping[str, Any]) -> Profile:
    """A profile from parsed TOML.

    Raises:
        ValueError: for an unknown key or a value of the wrong type.
    """
    values = _checked_keys(table, Profile, "")
    container = values.get("container", {})
    if not isinstance(container, dict):
        raise ValueError("container is a table: [container]")
    values["container"] = Container(**_checked_keys(container, Container, "container."))
    return Profile(**values)


def _checked_keys(table: Mapping[str, Any], kind: type, prefix: str) -> dict[str, Any]:
    """A table whose keys are fields of a dataclass, with lists as tuples."""
    names = [item.name for item in fields(kind)]
    values = {}
    for key, value in table.items():
        require_known(key, names, prefix)
        values[key] = tuple(value) if isinstance(value, list) else value
    return values


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "float": (int, float),
    "tuple[str, ...]": (tuple,), "dict[str, str]": (dict,), "Container": (Container,),
}  # fmt: skip

_TYPE_NAMES = {
    "str": "a string", "int": "an integer", "bool": "true or false", "float": "a number",
    "tuple[str, ...]": "a list of strings", "dict[str, str]": "a table of strings",
    "Container": "a table",
}  # fmt: skip


def _check_value(name: str, value: Any) -> None:
    """Raise ``ValueError`` for a wrong type, a negative number or a control character."""
    field_type = next(str(item.type) for item in fields(Profile) if item.name == name)
    if type(value) not in _TYPES[field_type]:
        raise ValueError(f"{name} = {value!r} is not {_TYPE_NAMES[field_type]}")
    items: tuple[Any, ...] = (value,)
    if isinstance(value, tuple):
        items = value
    elif isinstance(value, dict):
        items = tuple(value.values())
    elif isinstance(value, Container):
        items = (value.kind, value.image, *value.mounts, *value.options)
    for item in items:
        if field_type not in ("int", "bool", "float") and not isinstance(item, str):
            raise ValueError(f"{name}: {item!r} is not a string")
        if isinstance(item, str) and name != "setup" and _CONTROL.search(item):
            raise ValueError(f"{name} = {item!r} contains a line break or control character")
        if type(item) in (int, float) and item < 0:
            raise ValueError(f"{name} = {item} must be 0 or more")


def parse_time_limit(text: str) -> int:
    """Seconds of a time limit in the formats of sbatch: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: for anything else, zero, or more than a year.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(
            f"time = {text!r} is not a time limit; write it as 90, 1:30:00 or 1-12:00:00"
        )
    days, *rest = match.groups()
    numbers = [int(group) for group in rest if group is not None]
    if days is not None:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(numbers)]
    total = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if not 0 < total <= MAX_TIME_S:
        raise ValueError(f"time = {text!r} must be more than 0 and at most a year")
    return total


def parse_bytes(text: str, name: str) -> int:
    """Bytes of a memory size: ``"80GiB"``, ``"80G"`` and ``"80g"`` are 80 * 2**30, as in Slurm.

    Args:
        name: of the setting, for the message.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"{name} = {text!r} is not a memory size; write it as 80GiB")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
