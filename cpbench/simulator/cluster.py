"""Cluster files: the constants of the simulator, in TOML, each with where it comes from.

::

    name = "h100-ib"
    gpus_per_node = 8

    [calibrated]                       # on what it was fitted, and its errors on what it was not
    source = "published points"
    ranks = 32
    tokens = 8192                      # of one rank
    median_error = 0.03
    percentile_90_error = 0.1

    [gpu]
    source = "data sheet; rates by cpbench peaks"
    sms = 132
    memory_gib = 80
    stream_gb_per_s = 2900
    gather_gb_per_s = 1500
    scatter_gb_per_s = 400
    launch_us = 3.0

    [[kernels]]
    source = "single-rank records"
    operators = ["flash_attn_3"]
    dtype = "bfloat16"
    head_dim = 128
    grid = "slices"                    # or "mask"
    packs_heads = true                 # query heads of a group share a tile (forward pass)
    [kernels.fwd]
    tile = [128, 128]                  # queries, keys
    tflops = 720.0
    tile_us = 1.0                      # of a thread block, beside its blocks
    empty_us = 0.1                     # of a thread block without work
    tail = 0.5                         # of the largest tile, after all others
    full_rate = 1.0                    # of full rectangles, relative to tflops
    call_us = 5.0
    [kernels.bwd]                      # the same, for the backward pass

    [[mixers]]                         # sequence mixers, as kernels: either may be left out
    source = "single-rank records"
    operators = ["gated_deltanet"]
    dtype = "bfloat16"
    head_dim = 128
    fwd = { tflops = 60.0, token_us = 0.01, call_us = 50.0 }   # token_us: whatever the heads
    bwd = { tflops = 50.0, token_us = 0.02, call_us = 90.0 }

    [links.node]                       # also: links.across; neither: for one rank only
    source = "cpbench links"
    alpha_us = 10.0
    gb_per_s = 350.0                   # of one rank, in each direction
    per_node = 8                       # of links across nodes: how many a node has

    [links.host]                       # for offload=host: between a device and its host
    source = "data sheet"
    alpha_us = 10.0
    gb_per_s = 55.0                    # of one rank, in each direction
    per_node = 4                       # where ranks share them: how many a node has
    overlaps = true                    # false where both are one memory, and a copy is work

    [collectives]                      # GB/s of received bytes, inside a node and across, all ranks
    source = "cpbench links"
    alpha_us = 15.0
    all_gather = [330.0, 300.0]
    reduce_scatter = [330.0, 300.0]
    all_reduce = [330.0, 300.0]

    [memory]                           # of a GPU, beside tensors; without it only these count
    source = "records of a run"
    context_gb = 1.0                   # CUDA context, libraries
    peer_gb = 0.4                      # NCCL: of each peer in the node, for each communicator
    slack = 0.1                        # kept by the allocator, relative to what is allocated
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench.core.problem import DTYPE_BYTES
from cpbench.core.user_files import load_toml
from cpbench.simulator.tables import PositiveFloat, PositiveInt, as_table, build, plain
from cpbench.simulator.tiles import GRIDS, Tiling

PACKAGED = Path(__file__).parent / "clusters"
LINKS = ("node", "across", "host")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: streaming multiprocessors, memory, and the rates of side work by kind."""

    source: str
    sms: PositiveInt
    memory_gib: PositiveFloat
    stream_gb_per_s: PositiveFloat
    gather_gb_per_s: PositiveFloat
    scatter_gb_per_s: PositiveFloat
    launch_us: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The costs of a kernel in one phase; see the example of the module."""

    tile: tuple[int, int]
    tflops: PositiveFloat
    tile_us: float
    empty_us: float
    tail: float
    call_us: float
    full_rate: PositiveFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class KernelCosts:
    """A kernel of some operators, for one dtype and head_dim; ``bwd`` is None if it has none."""

    source: str
    operators: tuple[str, ...]
    dtype: str
    head_dim: PositiveInt
    grid: str
    fwd: Phase
    bwd: Phase | None = None
    packs_heads: bool = False

    @property
    def tiling(self) -> Tiling:
        """How it divides a mask."""
        return Tiling(self.fwd.tile, (self.bwd or self.fwd).tile, self.grid, self.packs_heads)


@dataclass(frozen=True, kw_only=True)
class MixerPhase:
    """The costs of a sequence mixer in one phase.

    Attributes:
        tflops: the rate of its FLOPs as ``cpbench.kernels.mixers.forms`` counts them.
        token_us: of each token of a sequence, whatever the number of heads: passes over chunks.
        call_us: of each step.
    """

    tflops: PositiveFloat
    token_us: float = 0.0
    call_us: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MixerCosts:
    """A sequence mixer, for one dtype and head_dim; ``bwd`` is None if it has none."""

    source: str
    operators: tuple[str, ...]
    dtype: str
    head_dim: PositiveInt
    fwd: MixerPhase
    bwd: MixerPhase | None = None

    @property
    def tiling(self) -> Tiling:
        """That of its recordings, which have no tiles."""
        return Tiling((1, 1), (1, 1), "mask")


Costs = KernelCosts | MixerCosts


@dataclass(frozen=True, kw_only=True)
class Link:
    """A class of links: latency of a message, and the rate of one rank in each direction.

    Attributes:
        per_node: links that the ranks of a node share; 0 if each rank has its own.
    """

    source: str
    alpha_us: float
    gb_per_s: PositiveFloat
    per_node: int = 0


@dataclass(frozen=True, kw_only=True)
class HostLink(Link):
    """The links between devices and host memory.

    Attributes:
        overlaps: whether copies run beside kernels.
    """

    overlaps: bool = True


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Latency, and rates in received bytes for groups inside a node and across nodes."""

    source: str
    alpha_us: float
    all_gather: tuple[float, float]
    reduce_scatter: tuple[float, float]
    all_reduce: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What fills the memory of a GPU beside tensors: see the example of the module.  Peers and
    slack are upper bounds."""

    source: str
    context_gb: float = 0.0
    peer_gb: float = 0.0
    slack: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """On what a cluster was fitted: the most ranks, and the most tokens of a rank; and how far
    predictions of points that were not fitted were off, as fractions."""

    source: str
    ranks: PositiveInt
    tokens: PositiveInt
    median_error: float
    percentile_90_error: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The constants of a cluster."""

    name: str
    gpus_per_node: PositiveInt
    gpu: Gpu
    kernels: tuple[KernelCosts, ...]
    calibrated: Calibrated
    mixers: tuple[MixerCosts, ...] = ()
    links: dict[str, Link] = field(default_factory=dict)
    collectives: Collectives | None = None
    memory: Memory = Memory(source="not given")
    digest: str = field(default="", compare=False)

    @property
    def first_operator(self) -> str:
        """That of the first kernel, or mixer."""
        known: tuple[Costs, ...] = (*self.kernels, *self.mixers)
        return known[0].operators[0]

    def kernel(self, operator: str, dtype: str, head_dim: int) -> Costs:
        """The kernel of an operator, or the costs of a mixer.

        Raises:
            ValueError: if none was calibrated for this operator, dtype and head_dim.
        """
        known: tuple[Costs, ...] = (*self.kernels, *self.mixers)
        for kernel in known:
            if operator in kernel.operators and (kernel.dtype, kernel.head_dim) == (
                dtype, head_dim,
            ):  # fmt: skip
                return kernel
        there_are = "; ".join(
            f"{', '.join(kernel.operators)} in {kernel.dtype} with head_dim {kernel.head_dim}"
            for kernel in known
        )
        raise ValueError(
            f"cluster {self.name} has no kernel of {operator} in {dtype} with head_dim {head_dim}; "
            f"there are: {there_are}"
        )

    @property
    def host(self) -> HostLink | None:
        """The links between devices and host memory, if they are known."""
        link = self.links.get("host")
        return link if isinstance(link, HostLink) else None

    def shares_links(self, ranks_per_node: int, offloaded: bool = False) -> bool:
        """Whether ranks of a node share its links to others, or those to its host that copies of
        ``offload=host`` take."""
        names = ("across", "host") if offloaded else ("across",)
        counts = (self.links[name].per_node for name in names if name in self.links)
        return any(0 < count < ranks_per_node for count in counts)


def load(name: str) -> Cluster:
    """Load a packaged cluster by its name, or one from a file.

    Raises:
        ValueError: for a file that is not valid, or an unknown name; in one line.
        OSError: when the file cannot be read.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = PACKAGED / f"{name}.toml"
        if not path.exists():
            names = ", ".join(sorted(file.stem for file in PACKAGED.glob("*.toml")))
            raise ValueError(
                f"no cluster {name!r}; there are: {names}, or a file that ends in .toml"
            )
    if not path.exists():
        raise ValueError(f"cluster {name}: there is no such file")
    return load_toml(path, from_table)


def from_table(table: Mapping[str, Any]) -> Cluster:
    """A cluster from parsed TOML.

    Raises:
        ValueError: for a missing or unknown key, or a value of the wrong type or sign.
    """
    values = dict(table)
    kernels, mixers = (values.setdefault(name, []) for name in ("kernels", "mixers"))
    if not isinstance(kernels, list) or not (kernels or mixers):
        raise ValueError("kernels must be a list of tables: [[kernels]]")
    if not isinstance(mixers, list):
        raise ValueError("mixers must be a list of tables: [[mixers]]")
    links = values.get("links", {})
    if not isinstance(links, dict):
        raise ValueError("links must be tables: [links.node], [links.across]")
    if any(name != "host" for name in links) != ("collectives" in values):
        raise ValueError(
            "[links] and [collectives] go together: give both, or neither for one rank"
        )
    for name in links:
        if name not in LINKS:
            raise ValueError(f"no link {name!r}; there are: {', '.join(LINKS)}")
    values["gpu"] = build(Gpu, values.get("gpu"), "gpu")
    values["kernels"] = tuple(
        _kernel(kernel, f"kernels[{index}]") for index, kernel in enumerate(kernels)
    )
    values["mixers"] = tuple(
        _mixer(mixer, f"mixers[{index}]") for index, mixer in enumerate(mixers)
    )
    values["links"] = {
        name: build(HostLink if name == "host" else Link, x, f"links.{name}")
        for name, x in links.items()
    }
    values["calibrated"] = build(Calibrated, values.get("calibrated"), "calibrated")
    if "collectives" in values:
        values["collectives"] = build(Collectives, values["collectives"], "collectives")
    if "memory" in values:
        values["memory"] = build(Memory, values["memory"], "memory")
    if "digest" in values:
        raise ValueError("digest is computed, not given")
    cluster = build(Cluster, values, "")
    text = json.dumps({key: plain(value) for key, value in values.items()}, sort_keys=True)
    cluster.__dict__["digest"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cluster


def _kernel(table: Any, where: str) -> KernelCosts:
    values = dict(as_table(table, where))
    for phase in ("fwd", "bwd"):
        if phase in values:
            values[phase] = build(Phase, values[phase], f"{where}.{phase}")
    kernel = build(KernelCosts, values, where)
    _check_dtype(kernel.dtype, where)
    if kernel.grid not in GRIDS:
        raise ValueError(f"{where}.grid = {kernel.grid!r} is none of {', '.join(GRIDS)}")
    return kernel


def _mixer(table: Any, where: str) -> MixerCosts:
    values = dict(as_table(table, where))
    for phase in ("fwd", "bwd"):
        if phase in values:
            values[phase] = build(MixerPhase, values[phase], f"{where}.{phase}")
    mixer = build(MixerCosts, values, where)
    _check_dtype(mixer.dtype, where)
    return mixer


def _check_dtype(dtype: str, where: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{where}.dtype = {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
