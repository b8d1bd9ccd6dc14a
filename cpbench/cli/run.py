"""The commands that compute: run a sweep, bench some values, verify against float64."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cpbench.cli import jobs
from cpbench.cli.options import (
    INTERRUPTED,
    AnyLauncher,
    AnyLauncherName,
    AsJson,
    Kept,
    Launcher,
    LauncherName,
    Launches,
    OnDevice,
    ProfilerName,
    Timeout,
    Transport,
    UserError,
    complain,
    device_name,
    file,
    folder,
    run_directory,
    several,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

commands = typer.Typer()


@commands.command("run")
def run_(
    sweep: Annotated[
        str,
        typer.Argument(metavar="SWEEP", help="A TOML file, or a packaged sweep (list sweeps)."),
    ],
    out: Annotated[Path | None, folder(help="Run directory.  [default: results/SWEEP]")] = None,
    launcher: AnyLauncher = AnyLauncherName.local,
    profile: Annotated[
        Path | None, file(help="Of a Slurm site, see docs/launchers.md; for --launcher slurm.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Slurm: follow the jobs until they have ended.")
    ] = False,
    resubmit: Annotated[
        int,
        typer.Option(
            metavar="TIMES", min=0, help="With --wait: submit again what stopped jobs have left."
        ),
    ] = 0,
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, help="torchrun, mpi: machines that share the ranks.")
    ] = 1,
    hosts: Annotated[str, several(help="mpi: their names; as many as --nodes.")] = "",
    interface: Annotated[
        str, typer.Option(metavar="NAME", help="Network interface that ranks talk through.")
    ] = "",
    transport: Annotated[
        Transport | None, typer.Option(help="What moves tensors.  [default: as the sweep says]")
    ] = None,
    interleave: Annotated[
        int | None,
        typer.Option(metavar="TIMES", min=1, help="Measure contenders in turn, so many times."),
    ] = None,
    launches: Launches = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write what ranks did when, for Perfetto, to traces/.")
    ] = False,
    profiler: Annotated[
        ProfilerName | None, typer.Option(help="NVIDIA's, around one case, in a folder of its own.")
    ] = None,
    device: OnDevice = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cases and commands; run nothing.")
    ] = False,
    retry: Annotated[
        str, typer.Option(metavar="STATUSES", help="Run these again, such as oom,timeout.")
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only such cases, e.g. seq_len=4k,16k; repeat."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for oom too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a sweep, or go on with one that was stopped."""
    from cpbench.slurm.site_profile import size
    from cpbench.sweep import runs, sweep_file

    with user_input():
        loaded = sweep_file.load(sweep)
        cases = sweep_file.select(loaded.cases, where or [])
        site = jobs.site(
            launcher.value, profile, wait, resubmit, profiler.value if profiler else ""
        )
        request = runs.Request(
            name=loaded.name,
            cases=cases,
            out=jobs.folder_of(run_directory(out or Path("results") / loaded.name), profiler),
            launcher=launcher.value,
            device=jobs.device_of(site, device) if site else device_name(device),
            settings=jobs.settings(
                loaded.settings,
                launcher.value,
                transport,
                interleave,
                launches,
                trace,
                profiler,
                site,
            ),
            profiler=profiler.value if profiler else "",
            retry=runs.statuses(retry),
            since=time.time(),
            strict=strict,
            capacity=size(site.gpu_memory, "gpu_memory") if site and site.gpu_memory else None,
            place=jobs.place(launcher.value, nodes, hosts, interface, cases),
        )
    if site:
        if dry_run:
            return jobs.show_scripts(request, site, as_json)
        code = jobs.submit(request, site, wait, resubmit, as_json)
        return (
            code
            if code is not None
            else max(_told(request, as_json), bool(runs.remaining(request)))
        )
    if dry_run:
        return runs.show_plan(request, as_json)
    with user_input():
        jobs.refuse_living(request)
    return _execute(request, as_json)


@commands.command()
def bench(
    operator: Annotated[str, several(help="Registered, or ./mine.py:my_op.")] = "bands",
    mask: Annotated[list[str] | None, several(help="Repeat for more.  [default: causal]")] = None,
    seq_len: Annotated[str, several(help="Tokens.")] = "1k,4k",
    strategy: Annotated[
        str | None, several(help="Such as ring,ulysses.  [default: single]")
    ] = None,
    layout: Annotated[
        str | None, several(help="Such as zigzag,striped.  [default: contiguous]")
    ] = None,
    world_size: Annotated[str, several(help="Ranks.")] = "1",
    ranks_per_node: Annotated[
        str, several(help="Ranks that share a node; 0 is as launched.")
    ] = "0",
    placement: Annotated[
        str | None, several(help="Axis of the strategy's mesh inside a node.")
    ] = None,
    queries: Annotated[str, several(help="Only so many last tokens attend; 0 is all.")] = "0",
    batch: Annotated[str, several()] = "1",
    num_heads_q: Annotated[str, several()] = "4",
    num_heads_kv: Annotated[str | None, several(help="[default: as --num-heads-q]")] = None,
    head_dim: Annotated[str, several()] = "64",
    dtype: Annotated[str, several(help="Of float32, bfloat16, float16.")] = "float32",
    direction: Annotated[str, several(help="Of fwd, bwd, fwd_bwd.")] = "fwd_bwd",
    seed: Annotated[str, several(help="Of the inputs.")] = "0",
    inputs: Annotated[str, several(help="Such as normal,needles,file:qkv.safetensors.")] = "normal",
    precision: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Stop once the median is known to within this share."),
    ] = 0.03,
    max_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Stop after this, for each case.")
    ] = 10.0,
    timeout: Timeout = 600.0,
    out: Kept = None,
    launcher: Launcher = LauncherName.local,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> int:
    """Run every combination of some values: a sweep without a file.

    A LIST is one value or several with commas between: --seq-len 1k,4k.
    """
    import tempfile

    from cpbench.sweep import runs, sweep_file

    given = {
        "operator": operator, "strategy": strategy, "layout": layout, "seq_len": seq_len,
        "world_size": world_size, "ranks_per_node": ranks_per_node, "placement": placement,
        "queries": queries, "batch": batch, "num_heads_q": num_heads_q,
        "num_heads_kv": num_heads_kv, "head_dim": head_dim, "dtype": dtype,
        "direction": direction, "seed": seed, "inputs": inputs,
    }  # fmt: skip
    with user_input():
        table = {
            key: sweep_file.split_list(text) for key, text in given.items() if text is not None
        }
        table["mask"] = [one for text in mask or ["causal"] for one in sweep_file.split_list(text)]
        measure = {"precision": precision, "max_seconds": max_seconds, "timeout_s": timeout}
        loaded = sweep_file.expand({"sweep": table, "measure": measure}, "bench")
        request = runs.Request(
            name="bench", cases=list(loaded.cases),
            out=run_directory(out) if out else Path(tempfile.mkdtemp(prefix="cpbench-")),
            launcher=launcher.value, device=device_name(device), settings=loaded.settings,
        )  # fmt: skip
    return _execute(request, as_json)


@commands.command()
def verify(
    operator: Annotated[str | None, several(help="Only these.  [default: all]")] = None,
    strategy: Annotated[str | None, several(help="Only these.  [default: all]")] = None,
    mask: Annotated[list[str] | None, several(help="Only these; repeat for more.")] = None,
    world_size: Annotated[str | None, several(help="Ranks.  [default: 1,2,3,4]")] = None,
    dtype: Annotated[str | None, several(help="[default: float32,bfloat16]")] = None,
    timeout: Timeout = 300.0,
    device: OnDevice = None,
    launcher: Launcher = LauncherName.local,
    out: Kept = None,
    as_json: AsJson = False,
) -> int:
    """Check operators and strategies against float64, without timing.

    Outputs, log-sum-exp and gradients are compared, over masks that cover every pattern.
    A LIST is one value or several with commas between.
    """
    from cpbench.sweep import runs, verification

    with user_input():
        kind = device_name(device)
        request = verification.request(
            operators=operator, strategies=strategy, masks=mask, world_sizes=world_size,
            dtypes=dtype, device=kind, launcher=launcher.value, out=out and run_directory(out),
            timeout_s=timeout,
        )  # fmt: skip
    code = _supervised(request, quiet=as_json)
    run = runs.results(request)
    rows = verification.summary(run.records.values())
    if as_json:
        print_rows(rows, True)
    else:
        print()
        print_rows(rows, False)
        print(verification.conclusion(run, request))
    return code


def _execute(request: Any, as_json: bool) -> int:
    code = _supervised(request, quiet=as_json)
    _told(request, as_json)
    return code


def _told(request: Any, as_json: bool) -> int:
    """Print the report of what is there; the exit code of the request."""
    from cpbench.reports import collection
    from cpbench.reports.tables import render
    from cpbench.sweep import runs

    run = runs.results(request)
    found = collection.together({str(request.out): run})
    if as_json:
        print(render.render(found, "json"), end="")
    elif run.records:
        print()
        print(render.render(found, "table"), end="")
        lines = runs.timelines(request)
        print("".join(f"{line}\n" for line in ([""] if lines else []) + lines), end="")
    return runs.exit_code(request)


def _supervised(request: Any, quiet: bool) -> int:
    """Run a request; what ends it early becomes a line."""
    from cpbench.launchers.supervisor import LaunchError
    from cpbench.results.store import StoreError
    from cpbench.sweep import runs

    try:
        return runs.execute(request, quiet)
    except (StoreError, LaunchError) as error:
        raise typer.Exit(complain(str(error), 1)) from None
    except ValueError as error:  # another process is at work there
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        kept = len(runs.results(request).records)
        text = (
            f"interrupted: {kept} of {len(request.cases)} cases are kept in {request.out}; "
            "the same command goes on from here"
        )
        raise typer.Exit(complain(text, INTERRUPTED)) from None
