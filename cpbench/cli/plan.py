"""Commands that plan a run on a cluster: traffic, predict, links."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli import case_options
from cpbench.cli.jobs import launch_place
from cpbench.cli.options import (
    AsJson,
    Hosts,
    Interface,
    LinksLauncherName,
    OnDevice,
    device_name,
    file_option,
    folder_option,
    list_option,
    run_directory,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows, wrap

commands = typer.Typer()


@commands.command()
def traffic(
    strategy: case_options.Strategies,
    operator: case_options.Operators = "bands",
    mask: case_options.Masks = None,
    seq_len: case_options.SomeSeqLens = None,
    world_size: case_options.WorldSizes = "8",
    gpus_per_node: case_options.GpusPerNode = "8",
    layout: case_options.Layouts = "contiguous",
    placement: case_options.Placements = "",
    queries: case_options.Queries = "0",
    num_heads_q: case_options.HeadsQ = "64",
    num_heads_kv: case_options.HeadsKv = "8",
    head_dim: case_options.HeadDims = "128",
    head_dim_v: case_options.HeadDimsV = "0",
    batch: case_options.SomeBatches = None,
    dtype: case_options.Dtypes = "bfloat16",
    direction: case_options.SomeDirections = None,
    phase: case_options.Phases = None,
    key_lens: case_options.KeyLens = None,
    page_size: case_options.PageSizes = None,
    links: Annotated[
        Path | None,
        file_option(help="File of cpbench links --json: add the time that these links need."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict exactly what strategies send, and rank them by it.

    Runs the strategy's own code on tensors without data. Of one case, shows each phase; of several
    (a LIST holds values separated by commas), one row each: the busiest rank's bytes. 1,024 ranks
    take up to half a minute.
    """
    from cpbench.core.subprocess_call import RequestRefused
    from cpbench.tools import traffic
    from cpbench.tools.link_rates import read_link_rates

    with user_input():
        cases = case_options.expand(
            world_size, gpus_per_node, mask, placement,
            strategy=strategy, layout=layout, queries=queries, batch=batch,
            seq_len=seq_len or (None if key_lens else "128k"),
            num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim,
            head_dim_v=head_dim_v, dtype=dtype, direction=direction, operator=operator,
            phase=phase, key_lens=key_lens, page_size=page_size,
        )  # fmt: skip
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
        print("\n".join(wrap(cases[0].label)))
        print_rows(traffic.table(prediction))
        buffers_mb = max(prediction["buffers_bytes"].values()) / 1e6
        print(f"peak memory per rank, excluding inputs and kernel workspace: {buffers_mb:,.1f} MB")
        if prediction["imbalance"]:
            print(f"load imbalance, max/mean: {prediction['imbalance']:.2f}")
        if link_ms is not None:
            print(f"links of the busiest rank need {link_ms:,.3g} ms")


@commands.command()
def predict(
    strategy: case_options.Strategies,
    mask: case_options.Masks = None,
    seq_len: case_options.SeqLens = "128k",
    world_size: case_options.WorldSizes = "8",
    gpus_per_node: case_options.GpusPerNode = "8",
    layout: case_options.Layouts = "contiguous",
    placement: case_options.Placements = "",
    queries: case_options.Queries = "0",
    num_heads_q: case_options.HeadsQ = "64",
    num_heads_kv: case_options.HeadsKv = "8",
    head_dim: case_options.HeadDims = "128",
    head_dim_v: case_options.HeadDimsV = "0",
    batch: case_options.Batches = "1",
    dtype: case_options.Dtypes = "bfloat16",
    direction: case_options.Directions = "fwd_bwd",
    cluster: case_options.Cluster = "h100-ib",
    operator: case_options.ClusterOperator = "",
    trace: Annotated[
        Path | None, file_option(help="Write a timeline of the simulated ranks, for Perfetto.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the time of strategies on a cluster, without a GPU.

    Records what the strategy's own code does on tensors without data, and replays it with the
    constants of the cluster. Times have an interval: the error of nine in ten predictions of
    measured runs that the constants were not fitted to.
    """
    from cpbench.tools import prediction

    with user_input():
        cases = case_options.expand(
            world_size, gpus_per_node, mask, placement,
            strategy=strategy, layout=layout, seq_len=seq_len, queries=queries, batch=batch,
            num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim,
            head_dim_v=head_dim_v, dtype=dtype, direction=direction,
            operator=operator or prediction.first_operator(cluster),
        )  # fmt: skip
        predictions = prediction.predict_all(cases, cluster, trace)
    if as_json:
        print(json.dumps(predictions[0] if len(cases) == 1 else predictions))
        return
    predicted = [one for one in predictions if "refused" not in one]
    for line in prediction.lines(predicted):
        print(line)
    print_rows(prediction.table(predicted))
    for line in ["memory of a GPU:", *prediction.memory_lines(predicted)]:
        print(line)
    for line in prediction.refusal_lines(predictions[len(predicted) :]):
        print(line)


@commands.command()
def links(
    world_size: Annotated[int, typer.Option(metavar="RANKS", help="Number of ranks.")] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(metavar="RANKS", help="Ranks per node; 0: found from host names.")
    ] = 0,
    sizes: Annotated[str, list_option(help="Message sizes, in bytes.")] = "8,1k,32k,1m,16m,64m",
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Sampling time per operation and size.")
    ] = 0.3,
    device: OnDevice = None,
    launcher: Annotated[
        LinksLauncherName,
        typer.Option(help="How to launch the ranks; srun: inside an allocation of Slurm."),
    ] = LinksLauncherName.local,
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, help="torchrun, mpi, srun: number of nodes.")
    ] = 1,
    hosts: Hosts = "",
    interface: Interface = "",
    out: Annotated[
        Path | None,
        folder_option(help="For the files of the ranks; on several nodes, one that all share."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Measure latency and bandwidth between ranks.

    Times point-to-point messages and collectives, inside and across nodes, and checks the received
    data. With --launcher torchrun --nodes N, run cpbench join OUT on the other nodes. Exits with 1
    if a rank dies, hangs or receives wrong data.
    """
    from cpbench.results.active import registered_as_active
    from cpbench.results.store import StoreError
    from cpbench.tools import links

    with ExitStack() as stack:
        with user_input():
            nbytes = links.parse_sizes(sizes)
            links.check_arguments(world_size, ranks_per_node, seconds)
            place = launch_place(launcher.value, nodes, hosts, interface, [world_size])(world_size)
            links.check_folder(out, place)
            if out is not None:  # cpbench join leaves when nobody works on it
                try:
                    stack.enter_context(registered_as_active(run_directory(out), ["links"]))
                except StoreError as error:
                    raise ValueError(str(error)) from None
        return links.run(
            world_size,
            device_name(device),
            launcher.value,
            nbytes,
            ranks_per_node,
            as_json,
            seconds,
            place,
            out,
        )
