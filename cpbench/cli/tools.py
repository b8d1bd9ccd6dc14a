"""The commands that run no sweep and read no results: masks, traffic, links, this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpbench.cli.options import (
    AsJson,
    Launcher,
    LauncherName,
    OnDevice,
    device_name,
    file,
    several,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

if TYPE_CHECKING:
    from cpbench.masks.head_masks import Mask

commands = typer.Typer()


@commands.command()
def mask(
    mask: Annotated[
        str, typer.Argument(metavar="MASK", help="Such as causal_document:corpus=pile,seed=3.")
    ],
    seq_len: Annotated[str, typer.Option(metavar="TOKENS", help="Such as 8192 or 64k.")],
    num_heads: Annotated[
        str, typer.Option(metavar="HEADS", help="For masks that differ from head to head.")
    ] = "1",
    png: Annotated[Path | None, file(help="Draw it into this file (.png).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the area, density and slices of a mask, and draw it.

    tiles_128 is how many pairs kernels of 128 x 128 tiles compute, over those that are visible.
    """
    import time

    from cpbench import masks
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct
    from cpbench.sweep.sweep_file import number

    with user_input():
        tokens = number("seq_len", seq_len)
        start = time.perf_counter()
        built = masks.build_heads(mask, tokens, number("num_heads_q", num_heads))
        build_ms = (time.perf_counter() - start) * 1e3
        if png is not None:
            if png.suffix != ".png":
                raise ValueError(f"--png {str(png)!r}: the file must end in .png")
            from cpbench.masks.picture import draw

            if isinstance(built, DilatedMask):
                raise ValueError("--png: there are no pictures of dilated masks")
            heads = distinct(built)
            which = ", head 0" if len(heads) > 1 else ""
            draw(heads[0], png, f"{mask}, {seq_len} tokens{which}")
    row = {
        "mask": mask, "seq_q": built.seq_q, "seq_k": built.seq_k, "area": built.area,
        "density": round(built.density, 6), **_in_slices(built),
        "build_ms": round(build_ms, 3), "digest": built.digest,
    }  # fmt: skip
    if as_json:
        print(json.dumps({**row, "slice_rows": built.slices.tolist()}))
    else:
        for key, value in row.items():
            print(f"{key:9} {_plain(value)}")
        if png is not None:
            print(f"{'picture':9} {png}")


def _in_slices(mask: Mask) -> dict[str, Any]:
    """How many slices, and what tiles of 128 x 128 execute, over what is visible."""
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct
    from cpbench.masks.tiling import tiles

    if isinstance(mask, DilatedMask):
        return {}
    each = distinct(mask)
    executed = sum(tiles(one, 128, 128).executed_area for one in each) / len(each)
    share = round(executed / mask.area, 4) if mask.area else None
    return {"slices": len(mask.slices), "tiles_128": share}


def _plain(value: Any) -> Any:
    """A mean over heads that is whole, without its point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@commands.command()
def traffic(
    strategy: Annotated[str, typer.Argument(metavar="STRATEGY", help="Such as usp:ulysses=8.")],
    mask: Annotated[str, typer.Option(metavar="MASK", help="See cpbench list masks.")] = "causal",
    seq_len: Annotated[str, typer.Option(metavar="TOKENS", help="Of all ranks.")] = "128k",
    world_size: Annotated[str, typer.Option(metavar="RANKS")] = "8",
    gpus_per_node: Annotated[str, typer.Option(metavar="RANKS", help="That share a node.")] = "8",
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="See list layouts.")] = "contiguous",
    placement: Annotated[
        str, typer.Option(metavar="AXIS", help="Mesh axis inside a node.  [default: its own]")
    ] = "",
    queries: Annotated[
        str, typer.Option(metavar="TOKENS", help="Only so many last tokens attend; 0 is all.")
    ] = "0",
    num_heads_q: Annotated[str, typer.Option(metavar="HEADS")] = "64",
    num_heads_kv: Annotated[str, typer.Option(metavar="HEADS")] = "8",
    head_dim: Annotated[str, typer.Option(metavar="LANES")] = "128",
    batch: Annotated[str, typer.Option(metavar="SEQUENCES")] = "1",
    dtype: Annotated[str, typer.Option(metavar="DTYPE")] = "bfloat16",
    direction: Annotated[
        str, typer.Option(metavar="PHASES", help="fwd, bwd or fwd_bwd.")
    ] = "fwd_bwd",
    as_json: AsJson = False,
) -> None:
    """Predict what every rank would send, to the byte.

    The strategy's own code runs on tensors without data. 1,024 ranks take one or two minutes.
    """
    from cpbench.sweep import sweep_file as sweeps
    from cpbench.tools import traffic

    with user_input():
        ranks = sweeps.number("world_size", world_size)
        nodes = sweeps.number("ranks_per_node", gpus_per_node) or ranks
        (case,) = sweeps.product(
            {
                "strategy": strategy, "layout": layout, "mask": mask, "seq_len": seq_len,
                "queries": queries, "world_size": ranks, "ranks_per_node": min(nodes, ranks),
                "batch": batch, "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv,
                "head_dim": head_dim,
                "dtype": dtype, "direction": direction, "placement": placement,
            }
        )  # fmt: skip
        found = traffic.forecast(case)
    if as_json:
        print(json.dumps(found))
    else:
        print(case.label)
        print_rows(traffic.table(found), False)
        held = max(found["buffers_bytes"].values()) / 1e6
        print(f"memory of a rank beside inputs and the operator's temporaries: {held:,.1f} MB")
        if found["imbalance"]:
            print(f"work of the busiest rank over the mean: {found['imbalance']:.2f}")


@commands.command()
def links(
    world_size: Annotated[int, typer.Option(metavar="RANKS", help="Of this machine.")] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(metavar="RANKS", help="That share a node; 0 to tell by host names.")
    ] = 0,
    sizes: Annotated[str, several(help="Bytes.")] = "8,1k,32k,1m,16m,64m",
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of sampling, for each operation and size.")
    ] = 0.3,
    device: OnDevice = None,
    launcher: Launcher = LauncherName.local,
    as_json: AsJson = False,
) -> int:
    """Measure latency and bandwidth between ranks.

    Point-to-point and collectives, inside nodes and across; what arrives is checked. Exit code 1
    when a rank dies, hangs or receives wrong data.
    """
    from cpbench.tools import links

    with user_input():
        wanted = links.sizes(sizes)
        links.refuse(world_size, ranks_per_node, seconds)
    return links.run(
        world_size, device_name(device), launcher.value, wanted, ranks_per_node, as_json, seconds
    )


@commands.command("compile")
def compile_(
    operator: Annotated[str | None, several(help="Triton operators.  [default: all]")] = None,
    target: Annotated[
        str, several(help="Such as cuda:80 (A100), cuda:90 (H100), cuda:100 (B200), hip:gfx942.")
    ] = "cuda:80,cuda:90,cuda:100",
    dtype: Annotated[str, several()] = "bfloat16,float16",
    head_dim: Annotated[str, several()] = "64,96,128",
    config: Annotated[
        str | None,
        several(help="In place of the table: rows=128,cols=64,num_warps=8,num_stages=3."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compile the Triton kernels for GPUs that are not here.

    Registers, spills, shared and tensor memory, and which matrix instruction is used. Exit code 1
    when a kernel is broken: no matrix instruction, more memory than there is.
    """
    from cpbench.sweep.sweep_file import number, split_list
    from cpbench.tools import compilation

    with user_input():
        given = {}
        for word in config.split(",") if config else []:
            key, _, value = word.partition("=")
            if not value.isdigit():
                raise ValueError(f"--config: {word!r} is not of the form rows=128")
            given[key] = int(value)
        wanted = compilation.requests(
            split_list(operator) if operator else [], split_list(target), split_list(dtype),
            [number("head_dim", text) for text in split_list(head_dim)], given,
        )  # fmt: skip
    rows = compilation.compiled(wanted)
    print_rows(rows if as_json else compilation.table(rows), as_json)
    return 1 if any(row["verdict"].startswith("broken") for row in rows) else 0


@commands.command()
def tune(
    operator: Annotated[
        str, typer.Option(metavar="OPERATOR", help="triton_band or triton_block_sparse.")
    ] = "triton_band",
    mask: Annotated[
        str | None, typer.Option(metavar="MASK", help="[default: causal, or kept blocks]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE")] = "bfloat16",
    head_dim: Annotated[str, typer.Option(metavar="LANES")] = "128",
    seq_len: Annotated[str, typer.Option(metavar="TOKENS")] = "8k",
    num_heads_q: Annotated[str, typer.Option(metavar="HEADS")] = "32",
    num_heads_kv: Annotated[str, typer.Option(metavar="HEADS")] = "8",
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest Triton configurations on this GPU, once.

    Those that compile well are measured; the fastest go into a file that serves from then on, for
    this kind of GPU, head_dim and dtype.
    """
    from cpbench.sweep.sweep_file import number, product
    from cpbench.tools import compilation

    with user_input():
        compilation.requests([operator], ["cuda:90"], [dtype], [number("head_dim", head_dim)], {})
        default = "block_sparse_uniform:keep=0.2" if operator.endswith("sparse") else "causal"
        (case,) = product(
            {
                "operator": operator, "mask": mask or default, "seq_len": seq_len, "dtype": dtype,
                "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "head_dim": head_dim,
            }
        )  # fmt: skip
        problem = dataclasses.asdict(case.problem)
        rows = []
        for row in compilation.tune(operator, str(case.mask), problem, device_name(device)):
            rows.append(row)
            if not as_json:
                print("  ".join(f"{value:.1f} us" if key == "us" else f"{value}"
                                for key, value in row.items()), flush=True)  # fmt: skip
    if as_json:
        print(json.dumps(rows))


@commands.command()
def doctor(as_json: AsJson = False) -> int:
    """Show what this machine can run, and what is missing."""
    from cpbench.tools import doctor

    rows = doctor.examine()
    print_rows(rows, as_json)
    return 1 if any(row["verdict"] == "broken" for row in rows) else 0
