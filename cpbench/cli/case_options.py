"""Options that describe cases of a strategy on a cluster: those of traffic and predict."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from cpbench.cli.completion import complete
from cpbench.cli.options import (
    direction_list,
    dtype_list,
    layout_list,
    list_option,
    mask_list,
    operator_list,
)
from cpbench.core.problem import Case

Strategies = Annotated[
    str,
    typer.Argument(
        metavar="STRATEGIES",
        help="One or several, e.g. ring,ulysses,usp:ulysses=8.",
        autocompletion=complete("strategies"),
    ),
]
Masks = Annotated[list[str] | None, mask_list(help="Masks; repeatable.  [default: causal]")]
SeqLens = Annotated[str, list_option(help="Global sequence lengths.")]
WorldSizes = Annotated[str, list_option(help="Numbers of ranks.")]
GpusPerNode = Annotated[str, list_option(help="Ranks per node.")]
Layouts = Annotated[str, layout_list(help="See: cpbench list layouts.")]
Placements = Annotated[
    str, list_option(help="Mesh axes inside a node.  [default: set by the strategy]")
]
Queries = Annotated[str, list_option(help="Numbers of queries, the last tokens; 0: all tokens.")]
HeadsQ = Annotated[str, list_option(help="Query heads.")]
HeadsKv = Annotated[str, list_option(help="Key/value heads.")]
HeadDims = Annotated[str, list_option(help="Head dimensions.")]
HeadDimsV = Annotated[str, list_option(help="Those of values; 0: as --head-dim.")]
Batches = Annotated[str, list_option(help="Batch sizes.")]
Dtypes = Annotated[str, dtype_list(help="Data types.")]
Cluster = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="A packaged cluster, or a file of constants.")
]
Operators = Annotated[
    str,
    operator_list(help="What is computed: attention, or sequence mixers by name."),
]
ClusterOperator = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=complete("operators"),
        help="The operator.  [default: the cluster's first kernel]",
    ),
]
Directions = Annotated[str, direction_list(help="fwd, bwd or fwd_bwd.")]

# Of batches that are decoded, from which others follow.
SomeSeqLens = Annotated[str | None, list_option(help="Global sequence lengths.  [default: 128k]")]
SomeBatches = Annotated[str | None, list_option(help="Batch sizes.  [default: 1]")]
SomeDirections = Annotated[
    str | None,
    direction_list(help="fwd, bwd or fwd_bwd.  [default: fwd_bwd; fwd if decoding]"),
]
Phases = Annotated[
    str | None, list_option(help="sequence, or decode: one query for each of a batch.")
]
KeyLens = Annotated[
    str | None, list_option(help="Keys of each sequence to decode, e.g. [8k,1k,70].")
]
PageSizes = Annotated[
    str | None, list_option(help="Tokens of a page of keys.  [default: 64 if decoding]")
]


def expand(
    world_size: str,
    gpus_per_node: str,
    mask: list[str] | None,
    placement: str,
    **lists: str | None,
) -> list[Case]:
    """The cases of all combinations of the values of these lists; None is left out.

    Raises:
        ValueError: for a value that is not valid.
    """
    from cpbench.sweep import sweep_file

    given = {key: text for key, text in lists.items() if text is not None}
    table = {key: sweep_file.split_list(text) for key, text in given.items()}
    table["mask"] = [m for text in mask or ["causal"] for m in sweep_file.split_list(text)]
    if placement:
        table["placement"] = sweep_file.split_list(placement)
    sizes, per_nodes = (
        sweep_file.parse_values(key, sweep_file.split_list(text))
        for key, text in (("world_size", world_size), ("ranks_per_node", gpus_per_node))
    )
    cases = []
    for ranks, per_node in itertools.product(sizes, per_nodes):
        cases += sweep_file.expand_table(
            {**table, "world_size": ranks, "ranks_per_node": min(per_node or ranks, ranks)}
        )
    return cases
