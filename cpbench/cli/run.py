"""Commands that run cases: run (a sweep), bench (values given as options), verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli import jobs
from cpbench.cli.completion import complete
from cpbench.cli.execution import (
    execute,
    predict_cases,
    print_report,
    print_warnings,
    run_request,
)
from cpbench.cli.options import (
    AnyLauncher,
    AnyLauncherName,
    AsJson,
    BenchLaunches,
    Hosts,
    Interface,
    Launcher,
    LauncherName,
    Launches,
    Nodes,
    OnDevice,
    OutFolder,
    ProfilerName,
    Timeout,
    Transport,
    device_name,
    direction_list,
    dtype_list,
    file_option,
    folder_option,
    inputs_list,
    layout_list,
    list_option,
    mask_list,
    operator_list,
    rope_list,
    run_directory,
    strategy_list,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

commands = typer.Typer()


@commands.command("run")
def run_(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="TOML file or name of a packaged sweep (see: cpbench list sweeps).",
            autocompletion=complete("sweeps"),
        ),
    ],
    out: Annotated[
        Path | None, folder_option(help="Run directory.  [default: results/SWEEP]")
    ] = None,
    launcher: AnyLauncher = AnyLauncherName.local,
    profile: Annotated[
        Path | None, file_option(help="slurm: profile of the site, see docs/launchers.md.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="slurm: wait until the jobs have ended.")
    ] = False,
    resubmit: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="slurm, with --wait: resubmit unfinished cases up to N times."
        ),
    ] = 0,
    nodes: Nodes = 1,
    hosts: Hosts = "",
    interface: Interface = "",
    transport: Annotated[
        Transport | None, typer.Option(help="Communication library.  [default: set by the sweep]")
    ] = None,
    interleave: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure the methods of a problem alternately, in N turns; 1: one after the "
            "other; 0: automatic.  [default: set by the sweep]",
        ),
    ] = None,
    launches: Launches = None,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Check every tile of the results of the cases that run."),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Write a timeline of all ranks to traces/, for Perfetto."),
    ] = False,
    profiler: Annotated[
        ProfilerName | None, typer.Option(help="Profile one case, in a new folder below --out.")
    ] = None,
    device: OnDevice = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cases and commands; run nothing.")
    ] = False,
    retry: Annotated[
        str,
        typer.Option(metavar="STATUSES", help="Rerun cases with these statuses, e.g. oom,timeout."),
    ] = "",
    remeasure: Annotated[
        bool,
        typer.Option("--remeasure", help="Rerun cases measured with other [measure] settings."),
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Only cases that match, e.g. seq_len=4k,16k; repeatable."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a case is oom.")] = False,
    predict: Annotated[
        str,
        typer.Option(
            "--predict",
            metavar="CLUSTER",
            help="Run nothing: keep predictions for this cluster (see: cpbench predict) in --out.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Run a sweep, or resume one: recorded cases are not run again."""
    from cpbench.results.store import last_sequence
    from cpbench.slurm.site_profile import parse_bytes
    from cpbench.sweep import refusals, sweep_file
    from cpbench.sweep.conditions import select_cases
    from cpbench.sweep.dry_run import print_plan
    from cpbench.sweep.remaining import parse_statuses, remaining_cases
    from cpbench.sweep.request import Request

    with user_input():
        definition = sweep_file.load(sweep)
        cases = select_cases(definition.cases, where or [])
        if definition.left_out and not as_json:
            print(f"cpbench: {refusals.describe(definition.left_out)}", file=sys.stderr)
        print_warnings(cases, as_json)
        if predict:
            if dry_run or launcher.value != "local" or profiler or trace:
                raise ValueError(
                    "--predict runs nothing: leave out --launcher, --dry-run, --trace, --profiler"
                )
            folder = run_directory(out or Path("results") / definition.name)
            return predict_cases(cases, predict, folder, as_json)
        site = jobs.slurm_profile(
            launcher.value, profile, wait, resubmit, profiler.value if profiler else ""
        )
        folder = jobs.output_folder(
            run_directory(out or Path("results") / definition.name), profiler
        )
        request = Request(
            name=definition.name,
            cases=cases,
            out=folder,
            launcher=launcher.value,
            device=jobs.profile_device(site, device) if site else device_name(device),
            settings=jobs.override_settings(
                definition.settings,
                launcher.value,
                transport,
                interleave,
                launches,
                thorough,
                trace,
                profiler,
                site,
            ),
            profiler=profiler.value if profiler else "",
            retry=parse_statuses(retry),
            remeasure=remeasure,
            since=last_sequence(folder),
            strict=strict,
            capacity=parse_bytes(site.gpu_memory, "gpu_memory")
            if site and site.gpu_memory
            else None,
            place=jobs.launch_place(
                launcher.value, nodes, hosts, interface, {case.world_size for case in cases}
            ),
            command=sys.argv[1:],
        )
    if site:
        if dry_run:
            return jobs.print_job_scripts(request, site, as_json)
        code = jobs.submit(request, site, wait, resubmit, as_json)
        if code is not None:
            return code
        return max(print_report(request, as_json), bool(remaining_cases(request)))
    if dry_run:
        return print_plan(request, as_json)
    with user_input():
        jobs.check_no_live_jobs(request)
    return execute(request, as_json)


@commands.command()
def bench(
    operator: Annotated[
        str,
        operator_list(help="Operators: registered names, or ./mine.py:my_op."),
    ] = "bands",
    mask: Annotated[
        list[str] | None,
        mask_list(help="Masks; repeatable.  [default: causal]"),
    ] = None,
    seq_len: Annotated[
        str | None, list_option(help="Sequence lengths, in tokens.  [default: 1k,4k]")
    ] = None,
    strategy: Annotated[
        str | None,
        strategy_list(help="Strategies, e.g. ring,ulysses.  [default: single]"),
    ] = None,
    layout: Annotated[
        str | None,
        layout_list(help="Layouts, e.g. zigzag,striped.  [default: contiguous]"),
    ] = None,
    world_size: Annotated[str, list_option(help="Numbers of ranks.")] = "1",
    ranks_per_node: Annotated[str, list_option(help="Ranks per node; 0: as launched.")] = "0",
    placement: Annotated[
        str | None, list_option(help="Mesh axes of the strategy to place inside a node.")
    ] = None,
    queries: Annotated[
        str, list_option(help="Number of queries, the last tokens; 0: all tokens.")
    ] = "0",
    batch: Annotated[str | None, list_option(help="Batch sizes.  [default: 1]")] = None,
    num_heads_q: Annotated[str, list_option(help="Query heads.")] = "4",
    num_heads_kv: Annotated[
        str | None, list_option(help="Key/value heads.  [default: as --num-heads-q]")
    ] = None,
    head_dim: Annotated[str, list_option(help="Head dimensions.")] = "64",
    head_dim_v: Annotated[str, list_option(help="Those of values; 0: as --head-dim.")] = "0",
    dtype: Annotated[str, dtype_list(help="Data types: float32, bfloat16, float16.")] = "float32",
    direction: Annotated[
        str | None,
        direction_list(help="Passes: fwd, bwd, fwd_bwd.  [default: fwd_bwd; fwd if decoding]"),
    ] = None,
    phase: Annotated[
        str | None, list_option(help="sequence, or decode: one query for each of a batch.")
    ] = None,
    key_lens: Annotated[
        str | None, list_option(help="Keys of each sequence to decode, e.g. [8k,1k,70].")
    ] = None,
    page_size: Annotated[
        str | None, list_option(help="Tokens of a page of keys.  [default: 64 if decoding]")
    ] = None,
    seed: Annotated[str, list_option(help="Seeds of the inputs.")] = "0",
    inputs: Annotated[
        str | None,
        inputs_list(
            help="Inputs, e.g. needles,file:qkv.safetensors.  [default: normal; gates for mixers]"
        ),
    ] = None,
    rope: Annotated[str, rope_list(help="RoPE of q and k, e.g. none,unscaled:base=5e5.")] = "none",
    precision: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Stop once the relative error of the median is below this."
        ),
    ] = 0.03,
    max_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Stop measuring a case after this long.")
    ] = 10.0,
    launches: BenchLaunches = 1,
    timeout: Timeout = 600.0,
    out: OutFolder = None,
    launcher: Launcher = LauncherName.local,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> int:
    """Run every combination of given values, without a sweep.

    A LIST holds one or more values, separated by commas: --seq-len 1k,4k.
    """
    import tempfile

    from cpbench.sweep import sweep_file
    from cpbench.sweep.request import Request

    if seq_len is None and key_lens is None:
        seq_len = "1k,4k"
    lists = {
        "operator": operator, "strategy": strategy, "layout": layout, "seq_len": seq_len,
        "world_size": world_size, "ranks_per_node": ranks_per_node, "placement": placement,
        "queries": queries, "batch": batch, "num_heads_q": num_heads_q,
        "num_heads_kv": num_heads_kv, "head_dim": head_dim, "head_dim_v": head_dim_v,
        "dtype": dtype, "direction": direction, "seed": seed, "inputs": inputs,
        "rope": rope, "phase": phase, "key_lens": key_lens, "page_size": page_size,
    }  # fmt: skip
    with user_input():
        table = {
            key: sweep_file.split_list(text) for key, text in lists.items() if text is not None
        }
        table["mask"] = [
            item for text in mask or ["causal"] for item in sweep_file.split_list(text)
        ]
        measure = {"precision": precision, "max_seconds": max_seconds, "timeout_s": timeout}
        measure["launches"] = launches
        definition = sweep_file.expand({"sweep": table, "measure": measure}, "bench")
        print_warnings(definition.cases, as_json)
        request = Request(
            name="bench", cases=list(definition.cases),
            out=run_directory(out) if out else Path(tempfile.mkdtemp(prefix="cpbench-")),
            launcher=launcher.value, device=device_name(device), settings=definition.settings,
            command=sys.argv[1:],
        )  # fmt: skip
    return execute(request, as_json)


@commands.command()
def verify(
    operator: Annotated[
        str | None,
        operator_list(help="Operators to check; mixers: all of these.  [default: all]"),
    ] = None,
    strategy: Annotated[
        str | None,
        strategy_list(help="Strategies to check.  [default: all]"),
    ] = None,
    mask: Annotated[
        list[str] | None,
        mask_list(help="Masks to check; repeatable.  [default: all]"),
    ] = None,
    world_size: Annotated[
        str | None, list_option(help="Numbers of ranks.  [default: 1,2,3,4]")
    ] = None,
    dtype: Annotated[
        str | None, dtype_list(help="Data types.  [default: float32,bfloat16]")
    ] = None,
    rope: Annotated[
        str, rope_list(help="RoPE of q and k, e.g. yarn:factor=8,original_length=128.")
    ] = "none",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Each operator, dtype and strategy once or twice: minutes."),
    ] = False,
    timeout: Timeout = 300.0,
    device: OnDevice = None,
    launcher: Launcher = LauncherName.local,
    out: OutFolder = None,
    as_json: AsJson = False,
) -> int:
    """Check operators and strategies against float64, without timing.

    Compares outputs, log-sum-exp and gradients, on masks that cover every pattern. A LIST holds
    one or more values, separated by commas.
    """
    from cpbench.sweep import runs
    from cpbench.sweep.verification import cases as verification
    from cpbench.sweep.verification import summary
    from cpbench.tools.verification_table import summary_lines

    with user_input():
        name = device_name(device)
        request = verification.build_request(
            operators=operator, strategies=strategy, masks=mask, world_sizes=world_size,
            dtypes=dtype, device=name, launcher=launcher.value, out=out and run_directory(out),
            timeout_s=timeout, quick=quick, rope=rope, command=sys.argv[1:],
        )  # fmt: skip
        print_warnings(request.cases, as_json)
    code = run_request(request, quiet=as_json)
    run = runs.results(request)
    rows = summary.summary_rows(run.records.values())
    if as_json:
        print_rows(rows, True)
    else:
        print()
        print("\n".join(summary_lines(rows)))
        print(summary.summary_footer(run, request))
    return code
