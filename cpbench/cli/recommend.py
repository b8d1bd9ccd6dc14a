"""The command that chooses a strategy: recommend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli import case_options
from cpbench.cli.options import (
    AsJson,
    check_output,
    direction_list,
    dtype_list,
    file_option,
    mask_option,
    strategy_list,
    user_input,
)

commands = typer.Typer()

NUMBER = "N"


@commands.command()
def recommend(
    mask: Annotated[
        str, mask_option(help="The mask. Of random documents, or a file, several are drawn.")
    ] = "causal",
    seq_len: Annotated[str, typer.Option(metavar=NUMBER, help="Tokens.")] = "128k",
    world_size: Annotated[str, typer.Option(metavar=NUMBER, help="Ranks.")] = "8",
    gpus_per_node: Annotated[
        str, typer.Option(metavar=NUMBER, help="Ranks per node.  [default: the cluster's]")
    ] = "",
    num_heads_q: Annotated[str, typer.Option(metavar=NUMBER, help="Query heads.")] = "64",
    num_heads_kv: Annotated[str, typer.Option(metavar=NUMBER, help="Key/value heads.")] = "8",
    head_dim: Annotated[str, typer.Option(metavar=NUMBER, help="Head dimension.")] = "128",
    head_dim_v: Annotated[
        str, typer.Option(metavar=NUMBER, help="That of values; 0: as --head-dim.")
    ] = "0",
    batch: Annotated[str, typer.Option(metavar=NUMBER, help="Batch size.")] = "1",
    dtype: Annotated[str, dtype_list(metavar="DTYPE", help="Data type.")] = "bfloat16",
    direction: Annotated[
        str, direction_list(metavar="DIRECTION", help="fwd, bwd or fwd_bwd.")
    ] = "fwd_bwd",
    strategy: Annotated[
        str, strategy_list(help="Strategies to choose from.  [default: all of our own]")
    ] = "",
    draws: Annotated[int, typer.Option(metavar=NUMBER, help="Draws of a random mask.")] = 4,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory of a GPU.  [default: the cluster's]"),
    ] = None,
    cluster: case_options.Cluster = "h100-ib",
    operator: case_options.ClusterOperator = "",
    as_json: AsJson = False,
    output: Annotated[
        Path | None,
        file_option("-o", "--output", help="Write a page (.html) or figure (.svg, .png, .pdf)."),
    ] = None,
) -> None:
    """Recommend strategies for a problem on a cluster, without a GPU.

    Predicts every strategy with its usual parameters on each layout, names those within the
    interval of the fastest, says why the others lose, and on how many ranks the order changes.
    """
    from cpbench.core.registry import operator_info
    from cpbench.core.spec import parse_size
    from cpbench.reports.recommendation import output as outputs
    from cpbench.reports.recommendation import text
    from cpbench.simulator.cluster import load
    from cpbench.simulator.recommendation.candidates import own_strategies
    from cpbench.sweep.sweep_file import split_list
    from cpbench.tools.prediction import first_operator
    from cpbench.tools.recommendation.recommend import recommend as search

    with user_input():
        if output is not None:
            outputs.check(output)
            check_output(output)
        if memory is not None and not 0 < memory < float("inf"):
            raise ValueError(f"--memory {memory} must be a number of GiB above 0")
        per_node = parse_size(gpus_per_node) if gpus_per_node else load(cluster).gpus_per_node
        cases = case_options.expand(
            world_size, str(per_node), [mask], "",
            strategy="ring", layout="contiguous", seq_len=seq_len, queries="0", batch=batch,
            num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim,
            head_dim_v=head_dim_v, dtype=dtype, direction=direction,
            operator=operator or first_operator(cluster),
        )  # fmt: skip
        if len(cases) > 1:
            raise ValueError(f"recommend takes one problem, not {len(cases)}: give no lists")
        kind = operator_info(cases[0].operator.name).kind
        names = split_list(strategy) if strategy else own_strategies(kind)
        result = search(cases[0], names, cluster, draws, memory or 0.0)
        if output is not None:
            outputs.write(result, output)
    print(json.dumps(result) if as_json else "\n".join(text.lines(result)))
