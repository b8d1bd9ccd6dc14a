"""Site profiles: what a cluster wants to be told, in TOML, checked before anything is submitted.

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

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

RANKS = {"srun": "srun", "torchrun": "srun-torchrun", "mpi": "srun-mpi", "mpiexec": "mpi"}
PACKING = ("size", "array", "one")
CONTAINERS = ("pyxis", "apptainer")
LONGEST_S = 366 * 86400
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Container:
    """What ranks run inside of.

    Attributes:
        kind: ``"pyxis"`` (srun's ``--container-image``) or ``"apptainer"``.
        image: as that takes it.
        mounts: ``HOST:CONTAINER`` each; the run directory and cpbench must be among them.
        options: more words.
    """

    kind: str = ""
    image: str = ""
    mounts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A site.

    Attributes:
        partition, account, qos, constraint, reservation, gres, nodelist (all of which a job then
            takes): for sbatch; "" leaves them out.
        time: limit of a job, as sbatch takes it; ``signal_s`` seconds before it the run stops and
            what has been measured is safe.
        gpus_per_node: ranks of a node where ranks have a GPU each; ``ranks_per_node`` where not.
        cpus_per_rank: cores bound to each rank.
        memory: of a node, for sbatch's ``--mem``.
        gpu_memory: of a GPU (or of a rank on CPUs): cases that cannot fit are not run.
        exclusive: whether jobs want whole nodes.
        exclude: nodes never to be used; ``spare_nodes``: asked for on top, in place of bad ones.
        gpu_gres: whether GPUs are asked for as ``--gres=gpu:N`` (else ``--gpus-per-node``).
        sbatch, srun: more options, word by word.
        ranks: what starts them: ``"srun"``, ``"torchrun"`` under srun, ``"mpi"`` (srun's own), or
            ``"mpiexec"`` inside the allocation.
        cpu_bind, gpu_bind: as srun takes them.
        interface: network interface that ranks talk through.
        modules: loaded in the job; ``setup``: lines of shell run after them, as they are.
        environment: variables of the job.
        python: words that start this Python on the nodes.
        device: ``"cuda"`` or ``"cpu"``; told by ``gpus_per_node`` unless given.
        scratch: folder on each node for compiled kernels, one below it for each job.
        packing: a job for each world size (``"size"``), an array of chunks of ``chunk`` cases
            (``"array"``), or all world sizes in one allocation (``"one"``).
        throttle: tasks of an array that run at a time; 0 for all.
        chain: whether each job waits for the one before it to end.
        preflight: whether nodes are checked before they are used.
        requeue: whether Slurm may start a job again that it has preempted or lost.
        poll_s: between questions to the controller, at most.
        mail: address for the end of the last step.
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
    cpus_per_rank: int = 1
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
            _check(item.name, getattr(self, item.name))
        for name, value, known in (
            ("ranks", self.ranks, tuple(RANKS)),
            ("packing", self.packing, PACKING),
            ("device", self.device, ("", "cpu", "cuda")),
            ("container.kind", self.container.kind, ("", *CONTAINERS)),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r} is none of {', '.join(filter(None, known))}")
        if bool(self.container.kind) != bool(self.container.image):
            raise ValueError("container: kind and image go together")
        if self.device == "cuda" and not self.gpus_per_node:
            raise ValueError('device = "cuda" needs gpus_per_node, how many GPUs a node has')
        for name in ("chunk", "cpus_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be 1 or more")
        if not self.poll_s < math.inf:  # nan too
            raise ValueError(f"poll_s = {self.poll_s} must be a number of seconds")
        if not self.scratch.startswith("/"):
            raise ValueError(f"scratch = {self.scratch!r} must be an absolute path")
        if not all(isinstance(x, tuple) for x in (self.container.mounts, self.container.options)):
            raise ValueError("container: mounts and options are lists of strings")
        limit = seconds(self.time)
        if self.signal_s >= limit:
            raise ValueError(f"signal_s = {self.signal_s} must be less than time = {self.time!r}")
        for name in self.environment:
            if not _NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of a variable")
        if self.memory not in ("", "0"):  # 0 is all of a node's
            size(self.memory, "memory")
        if self.gpu_memory:
            size(self.gpu_memory, "gpu_memory")

    @property
    def per_node(self) -> int:
        """Ranks that a node takes."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def on(self) -> str:
        """The device of the ranks."""
        return self.device or ("cuda" if self.gpus_per_node else "cpu")

    @property
    def launcher(self) -> str:
        """What starts the ranks inside the allocation, a name in ``LAUNCHERS``."""
        return RANKS[self.ranks]

    def nodes_of(self, world_size: int) -> int:
        """Nodes that so many ranks take: as few as hold them, evenly but under srun itself."""
        least = -(-world_size // self.per_node)
        if self.ranks == "srun":
            return least
        return next(n for n in range(least, world_size + 1) if world_size % n == 0)


def load(path: Path) -> Profile:
    """A profile from a TOML file.

    Raises:
        ValueError: in one line, with the file's name.
        OSError: when it cannot be read.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    try:
        return from_table(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_table(table: Mapping[str, Any]) -> Profile:
    """A profile from parsed TOML.

    Raises:
        ValueError: for an unknown key or a value of the wrong kind.
    """
    values = dict(_known(table, Profile, ""))
    inner = values.get("container", {})
    if not isinstance(inner, dict):
        raise ValueError("container is a table: [container]")
    values["container"] = Container(**_known(inner, Container, "container."))
    return Profile(**values)


def _known(table: Mapping[str, Any], kind: type, prefix: str) -> dict[str, Any]:
    names = [item.name for item in fields(kind)]
    found = {}
    for key, value in table.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(names)}"
            raise ValueError(f"no key {prefix}{key}; {hint}")
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "float": (int, float),
    "tuple[str, ...]": (tuple,), "dict[str, str]": (dict,), "Container": (Container,),
}  # fmt: skip

_READABLE = {
    "str": "a string", "int": "a whole number", "bool": "true or false", "float": "a number",
    "tuple[str, ...]": "a list of strings", "dict[str, str]": "a table of strings",
    "Container": "a table",
}  # fmt: skip


def _check(name: str, value: Any) -> None:
    wanted = next(str(item.type) for item in fields(Profile) if item.name == name)
    if type(value) not in _KINDS[wanted]:
        raise ValueError(f"{name} = {value!r} is not {_READABLE[wanted]}")
    parts: tuple[Any, ...] = (value,)
    if isinstance(value, tuple):
        parts = value
    elif isinstance(value, dict):
        parts = tuple(value.values())
    elif isinstance(value, Container):
        parts = (value.kind, value.image, *value.mounts, *value.options)
    for part in parts:
        if wanted not in ("int", "bool", "float") and not isinstance(part, str):
            raise ValueError(f"{name}: {part!r} is not a string")
        if isinstance(part, str) and name != "setup" and _CONTROL.search(part):
            raise ValueError(f"{name} = {part!r} has a line break or control character in it")
        if type(part) in (int, float) and part < 0:
            raise ValueError(f"{name} = {part} must be 0 or more")


def seconds(text: str) -> int:
    """A time limit as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: for anything else, or nothing at all.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ValueError(
            f"time = {text!r} is no time limit; give such as 90, 1:30:00 or 1-12:00:00"
        )
    days, *rest = found.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        units = [3600, 60, 1]
    else:
        units = {1: [60], 2: [60, 1], 3: [3600, 60, 1]}[len(numbers)]
    total = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if not 0 < total <= LONGEST_S:
        raise ValueError(f"time = {text!r} must be more than nothing and at most a year")
    return total


def size(text: str, name: str) -> int:
    """Bytes of ``"80GiB"``, ``"80G"`` or ``"80g"``, all of them 80 * 2**30, as Slurm counts.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError(f"{name} = {text!r} is no size; give such as 80GiB")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))
