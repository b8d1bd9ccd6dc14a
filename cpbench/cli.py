"""The command line.  Nothing here imports torch; heavy modules are imported by the command that
needs them, so that ``cpbench --help`` answers at once.

Exit codes: 0 the sweep is complete, every case ok, unsupported or oom; 1 some case wrong, crash or
timeout (or oom with ``--strict``); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cpbench import __version__

app = typer.Typer(
    name="cpbench",
    help="Attention kernels and context-parallel strategies, measured and verified.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130


class UserError(Exception):
    """Bad input; the message is the one line that the user sees."""


class Kind(str, Enum):
    operators = "operators"
    strategies = "strategies"
    layouts = "layouts"
    masks = "masks"
    sweeps = "sweeps"


class DeviceName(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class LauncherName(str, Enum):
    local = "local"
    torchrun = "torchrun"


class Format(str, Enum):
    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OnDevice = Annotated[DeviceName | None, typer.Option(help="Default: cuda where there is one.")]


@contextmanager
def user_input() -> Iterator[None]:
    """Errors in here are the user's: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = getattr(error, "strerror", None)
        name = getattr(error, "filename", None)
        raise UserError(f"{name}: {text}" if text and name else str(error)) from error


def main() -> None:
    """Entry point: runs the app and turns what it raises into lines and exit codes."""
    sys.exit(run())


def run(argv: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        code = app(args=argv, standalone_mode=False)
    except UserError as error:
        return _complain(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        usage = getattr(error, "format_message", None)  # the parser's own errors
        if usage is None:
            raise
        return _complain(usage(), 2) if usage() else 2
    return code if isinstance(code, int) else 0


def _complain(text: str, code: int) -> int:
    print(f"cpbench: {' '.join(text.split())}", file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cpbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    kind: Kind,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """What there is: operators with their support, strategies, layouts, masks, sweeps."""
    from cpbench import catalogue

    with user_input():
        rows = catalogue.rows(kind.value, _device(device))
    _print_rows(rows, as_json)


@app.command()
def mask(
    mask: Annotated[str, typer.Argument(help="A mask, e.g. causal_document:corpus=pile,seed=3")],
    seq_len: Annotated[str, typer.Option(help="Tokens, e.g. 8192 or 64k.")],
    png: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Area, density, slices and build time of a mask; its picture."""
    import time

    from cpbench import masks
    from cpbench.spec import parse_size

    with user_input():
        tokens = parse_size(seq_len)
        start = time.perf_counter()
        built = masks.build(mask, seq_len=tokens)
        build_ms = (time.perf_counter() - start) * 1e3
        if png is not None:
            if png.suffix != ".png":
                raise ValueError(f"--png {str(png)!r}: the file must end in .png")
            from cpbench.masks.picture import draw

            draw(built, png, f"{mask}, {seq_len} tokens")
    row = {
        "mask": mask, "seq_q": built.seq_q, "seq_k": built.seq_k, "area": built.area,
        "density": round(built.density, 6), "slices": len(built.slices),
        "build_ms": round(build_ms, 3), "digest": built.digest,
    }  # fmt: skip
    if as_json:
        print(json.dumps({**row, "slice_rows": built.slices.tolist()}))
    else:
        for key, value in row.items():
            print(f"{key:9} {value}")
        if png is not None:
            print(f"{'picture':9} {png}")


@app.command("run")
def run_(
    sweep: Annotated[str, typer.Argument(help="A TOML file, or a packaged sweep by name.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; results/SWEEP if left out.")]
    = None,
    launcher: LauncherName = LauncherName.local,
    device: OnDevice = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print, run nothing.")] = False,
    retry: Annotated[str, typer.Option(help="Statuses to try again, e.g. oom,timeout.")] = "",
    where: Annotated[list[str] | None, typer.Option(help="Only cases with key=value.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="oom is a failure too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a sweep; run again, it goes on where it stopped."""
    from cpbench import runs, sweep as sweeps

    with user_input():
        loaded = sweeps.load(sweep)
        cases = sweeps.select(loaded.cases, where or [])
        if not cases:
            raise ValueError(f"no case of {loaded.name} meets {' and '.join(where or [])}")
        request = runs.Request(
            name=loaded.name,
            cases=cases,
            out=out or Path("results") / loaded.name,
            launcher=launcher.value,
            device=_device(device),
            settings=loaded.settings,
            retry=runs.statuses(retry),
            strict=strict,
        )
    if dry_run:
        return runs.show_plan(request, as_json)
    return _execute(request, as_json)


@app.command()
def bench(
    operator: Annotated[str, typer.Option(help="Operators: a,b:x=1 or ./mine.py:my_op.")]
    = "bands",
    mask: Annotated[list[str] | None, typer.Option(help="A mask; repeat for more.")] = None,
    seq_len: Annotated[str, typer.Option(help="Tokens: 1k,4k")] = "1k,4k",
    strategy: Annotated[str | None, typer.Option(help="Strategies: ring,ulysses")] = None,
    layout: Annotated[str | None, typer.Option(help="Layouts: contiguous,zigzag")] = None,
    world_size: Annotated[str, typer.Option(help="Ranks: 1,2,4")] = "1",
    batch: str = "1",
    num_heads_q: str = "4",
    num_heads_kv: Annotated[str | None, typer.Option(help="As num-heads-q unless given.")] = None,
    head_dim: str = "64",
    dtype: str = "float32",
    direction: Annotated[str, typer.Option(help="fwd, bwd, fwd_bwd")] = "fwd_bwd",
    seed: str = "0",
    precision: Annotated[float, typer.Option(help="Stop at this relative half-width.")] = 0.03,
    max_seconds: Annotated[float, typer.Option(help="Per case.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Keep the records here.")] = None,
    launcher: LauncherName = LauncherName.local,
    device: OnDevice = None,
    as_json: AsJson = False,
) -> int:
    """A sweep without a file."""
    import tempfile

    from cpbench import runs, sweep as sweeps

    given = {
        "operator": operator, "strategy": strategy, "layout": layout, "seq_len": seq_len,
        "world_size": world_size, "batch": batch, "num_heads_q": num_heads_q,
        "num_heads_kv": num_heads_kv, "head_dim": head_dim, "dtype": dtype,
        "direction": direction, "seed": seed,
    }  # fmt: skip
    with user_input():
        table = {key: sweeps.split_list(text) for key, text in given.items() if text is not None}
        table["mask"] = [one for text in mask or ["causal"] for one in sweeps.split_list(text)]
        measure = {"precision": precision, "max_seconds": max_seconds}
        loaded = sweeps.expand({"sweep": table, "measure": measure}, "bench")
        folder = out or Path(tempfile.mkdtemp(prefix="cpbench-"))
        request = runs.Request(
            name="bench", cases=list(loaded.cases), out=folder, launcher=launcher.value,
            device=_device(device), settings=loaded.settings,
        )  # fmt: skip
    return _execute(request, as_json)


@app.command()
def verify(
    operator: Annotated[str | None, typer.Option(help="Only these operators.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Only these strategies.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="Only these masks; repeat.")] = None,
    world_size: Annotated[str | None, typer.Option(help="Ranks: 1,2,3,4")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32,bfloat16")] = None,
    device: OnDevice = None,
    launcher: LauncherName = LauncherName.local,
    out: Annotated[Path | None, typer.Option(help="Keep the records here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Hold operators and strategies against float64: outputs, log-sum-exp, gradients."""
    from cpbench import runs, verification

    with user_input():
        kind = _device(device)
        request = verification.request(
            operators=operator, strategies=strategy, masks=mask, world_sizes=world_size,
            dtypes=dtype, device=kind, launcher=launcher.value, out=out,
        )  # fmt: skip
    code = _supervised(request, quiet=as_json)
    run = runs.results(request)
    rows = verification.summary(run.records.values())
    if as_json:
        _print_rows(rows, True)
    else:
        print()
        _print_rows(rows, False)
        print(verification.conclusion(run, request))
    return code


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(help="A run directory.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Into this file.")] = None,
    columns: Annotated[bool, typer.Option("--columns", help="Explain the columns.")] = False,
) -> None:
    """Who won where, every case, what failed and why."""
    from cpbench.reports import render
    from cpbench.store import read_run, write_whole

    if columns:
        print(render.columns(), end="")
        return
    if folder is None:
        raise UserError("report needs a run directory, or --columns")
    if not (folder / "records").is_dir():
        raise UserError(f"{folder} is not a run directory: it has no records folder")
    run = read_run(folder)
    if not run.records:
        raise UserError(f"{folder} holds no finished case yet")
    text = render.render(run, folder, form.value)
    if output is None:
        print(text, end="")
    else:
        with user_input():
            write_whole(output, text)


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """What this machine can run, and what is missing."""
    from cpbench import diagnosis

    rows = diagnosis.examine()
    _print_rows(rows, as_json)
    return 1 if any(row["verdict"] == "broken" for row in rows) else 0


def _execute(request: Any, as_json: bool) -> int:
    from cpbench import runs
    from cpbench.reports import render

    code = _supervised(request, quiet=as_json)
    run = runs.results(request)
    if as_json:
        print(render.render(run, request.out, "json"), end="")
    elif run.records:
        print()
        print(render.render(run, request.out, "table"), end="")
    return code


def _supervised(request: Any, quiet: bool) -> int:
    """Run a request; what ends it early becomes a line."""
    from cpbench import runs
    from cpbench.launchers.supervise import LaunchError
    from cpbench.store import StoreError

    try:
        return runs.execute(request, quiet)
    except (StoreError, LaunchError) as error:
        raise typer.Exit(_complain(str(error), 1)) from None
    except KeyboardInterrupt:
        kept = len(runs.results(request).records)
        text = (f"interrupted: {kept} of {len(request.cases)} cases are kept in {request.out}; "
                "the same command goes on from here")
        raise typer.Exit(_complain(text, INTERRUPTED)) from None


def _device(name: DeviceName | None) -> str:
    if name is not None:
        return name.value
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        from cpbench.reports.render import tabulated

        print(tabulated(rows, "table"))



if __name__ == "__main__":
    main()
