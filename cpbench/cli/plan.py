"""Commands that plan a run on a cluster: traffic, links."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli.completion import complete
from cpbench.cli.options import (
    AsJson,
    Launcher,
    LauncherName,
    OnDevice,
    device_name,
    direction_list,
    dtype_list,
    file_option,
    layout_list,
    list_option,
    mask_list,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

commands = typer.Typer()


@commands.command()
def traffic(
    strategy: Annotated[
        str,
        typer.Argument(
            metavar="STRATEGIES",
            help="One or several, e.g. ring,ulysses,usp:ulysses=8.",
            autocompletion=complete("strategies"),
        ),
    ],
    mask: Annotated[
        list[str] | None, mask_list(help="Masks; repeatable.  [default: causal]")
    ] = None,
    seq_len: Annotated[str, list_option(help="Global sequence lengths.")] = "128k",
    world_size: Annotated[str, list_option(help="Numbers of ranks.")] = "8",
    gpus_per_node: Annotated[str, list_option(help="Ranks per node.")] = "8",
    layout: Annotated[str, layout_list(help="See: cpbench list layouts.")] = "contiguous",
    placement: Annotated[
        str, list_option(help="Mesh axes inside a node.  [default: set by the strategy]")
    ] = "",
    queries: Annotated[
        str, list_option(help="Numbers of queries, the last tokens; 0: all tokens.")
    ] = "0",
    num_heads_q: Annotated[str, list_option(help="Query heads.")] = "64",
    num_heads_kv: Annotated[str, list_option(help="Key/value heads.")] = "8",
    head_dim: Annotated[str, list_option(help="Head dimensions.")] = "128",
    head_dim_v: Annotated[str, list_option(help="Those of values; 0: as --head-dim.")] = "0",
    batch: Annotated[str, list_option(help="Batch sizes.")] = "1",
    dtype: Annotated[str, dtype_list(help="Data types.")] = "bfloat16",
    direction: Annotated[str, direction_list(help="fwd, bwd or fwd_bwd.")] = "fwd_bwd",
    links: Annotated[
        Path | None,
        file_option(help="File of cpbench links --json: add the time that these links need."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the communication of strategies, exactly, and rank them by it.

    Runs the strategy's own code on tensors without data. Of one case, shows each phase; of several
    (a LIST holds values separated by commas), one row each: the busiest rank's bytes. 1,024 ranks
    take one or two minutes.
    """
    from cpbench.core.subprocess_call import RequestRefused
    from cpbench.sweep import sweep_file
    from cpbench.tools import traffic
    from cpbench.tools.link_rates import read_link_rates

    with user_input():
        lists = {
            "strategy": strategy, "layout": layout, "seq_len": seq_len, "queries": queries,
            "batch": batch, "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv,
            "head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype,
            "direction": direction,
        }  # fmt: skip
        table = {key: sweep_file.split_list(text) for key, text in lists.items()}
        table["mask"] = [m for text in mask or ["causal"] for m in sweep_file.split_list(text)]
        if placement:
            table["placement"] = sweep_file.split_list(placement)
        cases = []
        for size in sweep_file.split_list(world_size):
            ranks = sweep_file.parse_integer("world_size", size)
            for text in sweep_file.split_list(gpus_per_node):
                per_node = sweep_file.parse_integer("ranks_per_node", text) or ranks
                cases += sweep_file.expand_table(
                    {**table, "world_size": ranks, "ranks_per_node": min(per_node, ranks)}
                )
        rates = read_link_rates(links) if links else None
        if len(cases) > 1:
            rows = traffic.comparison(cases, rates)
        else:
            try:
                prediction = traffic.predict_traffic(cases[0])
            except RequestRefused as refusal:
                raise ValueError(f"{cases[0].label}: {refusal}") from None
            link_ms = traffic.link_ms(prediction, rates) if rates else None
    if len(cases) > 1:
        if rates:
            print(f"cpbench: {rates.describe_range()}", file=sys.stderr)
        print(json.dumps(rows, indent=1) if as_json else "\n".join(traffic.comparison_lines(rows)))
    elif as_json:
        print(json.dumps(prediction | ({"link_ms": link_ms} if links else {})))
    else:
        print(cases[0].label)
        print_rows(traffic.table(prediction))
        buffers_mb = max(prediction["buffers_bytes"].values()) / 1e6
        print(f"peak memory per rank, excluding inputs and kernel workspace: {buffers_mb:,.1f} MB")
        if prediction["imbalance"]:
            print(f"load imbalance, max/mean: {prediction['imbalance']:.2f}")
        if link_ms is not None:
            print(f"links of the busiest rank need {link_ms:,.3g} ms")


@commands.command()
def links(
    world_size: Annotated[
        int, typer.Option(metavar="RANKS", help="Number of ranks, on this machine.")
    ] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(metavar="RANKS", help="Ranks per node; 0: found from host names.")
    ] = 0,
    sizes: Annotated[str, list_option(help="Message sizes, in bytes.")] = "8,1k,32k,1m,16m,64m",
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Sampling time per operation and size.")
    ] = 0.3,
    device: OnDevice = None,
    launcher: Launcher = LauncherName.local,
    as_json: AsJson = False,
) -> int:
    """Measure latency and bandwidth between ranks.

    Times point-to-point messages and collectives, inside and across nodes, and checks the received
    data. Exits with 1 if a rank dies, hangs or receives wrong data.
    """
    from cpbench.tools import links

    with user_input():
        nbytes = links.parse_sizes(sizes)
        links.check_arguments(world_size, ranks_per_node, seconds)
    return links.run(
        world_size, device_name(device), launcher.value, nbytes, ranks_per_node, as_json, seconds
    )
