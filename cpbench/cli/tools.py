"""Commands without a run directory: mask, capture, compile, tune, doctor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpbench.cli.completion import complete
from cpbench.cli.options import (
    AsJson,
    OnDevice,
    device_name,
    dtype_list,
    dtype_option,
    file_option,
    list_option,
    mask_option,
    operator_list,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

if TYPE_CHECKING:
    from cpbench.masks.head_masks import Mask

commands = typer.Typer()


@commands.command()
def mask(
    mask: Annotated[
        str,
        typer.Argument(
            metavar="MASK",
            help="Mask, e.g. causal_document:corpus=pile,seed=3.",
            autocompletion=complete("masks"),
        ),
    ],
    seq_len: Annotated[
        str, typer.Option(metavar="TOKENS", help="Sequence length, e.g. 8192 or 64k.")
    ],
    num_heads: Annotated[
        str, typer.Option(metavar="HEADS", help="Query heads, for per-head masks.")
    ] = "1",
    png: Annotated[
        Path | None, file_option(help="Write a picture of the mask to this .png file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the area, density and slices of a mask, or draw it.

    tiles_128 is the number of pairs that a kernel with 128 x 128 tiles computes, divided by the
    number of visible pairs.
    """
    import time

    from cpbench import masks
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct_masks
    from cpbench.sweep.sweep_file import parse_integer

    with user_input():
        tokens = parse_integer("seq_len", seq_len)
        start = time.perf_counter()
        built = masks.build_heads(mask, tokens, parse_integer("num_heads_q", num_heads))
        build_ms = (time.perf_counter() - start) * 1e3
        if png is not None:
            if png.suffix != ".png":
                raise ValueError(f"--png {str(png)!r}: the file must end in .png")
            from cpbench.masks.picture import draw

            if isinstance(built, DilatedMask):
                raise ValueError("--png: dilated masks cannot be drawn")
            heads = distinct_masks(built)
            head = ", head 0" if len(heads) > 1 else ""
            draw(heads[0], png, f"{mask}, {seq_len} tokens{head}")
    row = {
        "mask": mask, "seq_q": built.seq_q, "seq_k": built.seq_k, "area": built.area,
        "density": round(built.density, 6), **_slice_statistics(built),
        "build_ms": round(build_ms, 3), "digest": built.digest,
    }  # fmt: skip
    if as_json:
        print(json.dumps({**row, "slice_rows": built.slices.tolist()}))
    else:
        for key, value in row.items():
            print(f"{key:9} {_without_point(value)}")
        if png is not None:
            print(f"{'picture':9} {png}")


def _slice_statistics(mask: Mask) -> dict[str, Any]:
    """The number of slices, and the area of visited 128 x 128 tiles over the visible area."""
    from cpbench.masks.dilated_mask import DilatedMask
    from cpbench.masks.head_masks import distinct_masks
    from cpbench.masks.tiling import tiles

    if isinstance(mask, DilatedMask):
        return {}
    heads = distinct_masks(mask)
    executed = sum(tiles(head, 128, 128).executed_area for head in heads) / len(heads)
    ratio = round(executed / mask.area, 4) if mask.area else None
    return {"slices": len(mask.slices), "tiles_128": ratio}


def _without_point(value: Any) -> Any:
    """A whole float, such as some means over heads, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@commands.command()
def capture(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Folder of a Hugging Face model, or module:function that makes one.",
        ),
    ],
    prompt: Annotated[Path, file_option(help="Text file, or a .json list of token ids.")],
    output: Annotated[Path, file_option("-o", help="File to write, .safetensors.")],
    layers: Annotated[str, list_option(help="Layers, by number.")] = "0",
    modules: Annotated[
        str | None,
        list_option(help="Attention modules of any other model, by name, instead of layers."),
    ] = None,
    before_rope: Annotated[
        bool, typer.Option("--before-rope", help="q and k as they are before the layer's RoPE.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Capture q, k and v of a model, as inputs of a sweep.

    Several layers go to files of their own: qkv-0.safetensors, qkv-12.safetensors.
    """
    import shlex

    from cpbench.cli.options import check_output
    from cpbench.core.subprocess_call import RequestRefused, read_reply, subprocesses
    from cpbench.sweep.sweep_file import split_list

    with user_input():
        check_output(output)
        if output.suffix != ".safetensors":
            raise ValueError(f"-o {output}: the name must end in .safetensors")
        if not prompt.is_file():
            raise ValueError(f"--prompt: there is no file {prompt}")
        if not all(text.isdecimal() for text in split_list(layers)):
            raise ValueError(f"--layers {layers}: must be numbers of layers, such as 0,12")
        if before_rope and modules:
            raise ValueError("--before-rope: RoPE is seen in --layers, not in --modules")
        numbers = [int(text) for text in split_list(layers)]
        request = {
            "model": model, "prompt": str(prompt), "output": str(output),
            "layers": numbers, "before_rope": before_rope,
            "modules": split_list(modules) if modules else [],
        }  # fmt: skip
        try:
            with subprocesses("cpbench.integrations.capture", [request]) as (process,):
                rows = json.loads(read_reply(process, "the capture"))
        except RequestRefused as error:
            raise ValueError(str(error)) from None
    print_rows(rows, as_json)
    if not as_json:
        row = rows[0]
        names = ("num_heads_q", "num_heads_kv", "head_dim", "head_dim_v")
        options = " ".join(f"--{name.replace('_', '-')} {row[name]}" for name in names if row[name])
        options += f" --mask {row['mask']}" if row["mask"] else ""
        file = shlex.quote(f"file:{row['file']}")
        if row["q times"]:
            print(f"\nq is multiplied by {row['q times']}: scores of a sweep are scaled by "
                  "head_dim ** -0.5, those of this layer are not")  # fmt: skip
        if before_rope:
            print("\nq and k are those before RoPE: give --rope, or an operator that applies it")
        print(f"\nto measure: cpbench bench --inputs {file} --seq-len {row['tokens']} {options}")
    return 0


@commands.command("compile")
def compile_(
    operator: Annotated[str | None, operator_list(help="Triton operators.  [default: all]")] = None,
    target: Annotated[
        str,
        list_option(help="GPUs, e.g. cuda:80 (A100), cuda:90 (H100), cuda:100 (B200), hip:gfx942."),
    ] = "cuda:80,cuda:90,cuda:100",
    dtype: Annotated[str, dtype_list(help="Data types.")] = "bfloat16,float16",
    head_dim: Annotated[str, list_option(help="Head dimensions.")] = "64,96,128",
    head_dim_v: Annotated[
        int, typer.Option(metavar="DIM", help="Head dimension of values; 0 for the same.")
    ] = 0,
    config: Annotated[
        str | None,
        list_option(
            help="Configuration to compile instead of the shipped ones, e.g. "
            "rows=128,cols=64,num_warps=8,num_stages=3."
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compile the Triton kernels ahead of time, for any GPU.

    Shows registers, spills, shared and tensor memory and the matrix instructions of each kernel.
    Exits with 1 if a kernel is broken (no matrix instruction, more memory than the GPU has), spills
    in loops with matrix instructions, or has warps that compute the same.
    """
    from cpbench.sweep.sweep_file import parse_integer, split_list
    from cpbench.tools.compiler import compilation

    with user_input():
        fields = {}
        for item in config.split(",") if config else []:
            key, _, value = item.partition("=")
            if not value.isdigit():
                raise ValueError(f"--config: {item!r} is not of the form rows=128")
            fields[key] = int(value)
        requests = compilation.compile_requests(
            split_list(operator) if operator else [], split_list(target), split_list(dtype),
            [parse_integer("head_dim", text) for text in split_list(head_dim)], fields,
            head_dim_v,
        )  # fmt: skip
    rows = compilation.compile_kernels(requests)
    print_rows(rows if as_json else compilation.table(rows), as_json)
    return 0 if all(map(compilation.compiles_well, rows)) else 1


@commands.command()
def tune(
    operator: Annotated[
        str,
        typer.Option(
            metavar="OPERATOR",
            help="triton_band or triton_block_sparse.",
            autocompletion=complete("operators"),
        ),
    ] = "triton_band",
    mask: Annotated[
        str | None,
        mask_option(
            help="Mask to measure on.  [default: causal, or block_sparse_uniform:keep=0.2]",
        ),
    ] = None,
    dtype: Annotated[str, dtype_option(help="Data type.")] = "bfloat16",
    head_dim: Annotated[str, typer.Option(metavar="DIM", help="Head dimension.")] = "128",
    seq_len: Annotated[str, typer.Option(metavar="TOKENS", help="Sequence length.")] = "8k",
    num_heads_q: Annotated[str, typer.Option(metavar="HEADS", help="Query heads.")] = "32",
    num_heads_kv: Annotated[str, typer.Option(metavar="HEADS", help="Key/value heads.")] = "8",
    kernel: Annotated[
        str, list_option(help="Kernels to tune, such as backward_dkv; all of them if empty.")
    ] = "",
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """Autotune the Triton kernels on this GPU.

    Measures the configurations without spills in their hot loops and saves the fastest. They are
    used from then on, for this GPU model, head_dim and dtype.
    """
    from cpbench.sweep.sweep_file import expand_table, parse_integer, split_list
    from cpbench.tools.compiler import compilation

    with user_input():
        compilation.compile_requests(
            [operator], ["cuda:90"], [dtype], [parse_integer("head_dim", head_dim)], {}
        )
        default = "block_sparse_uniform:keep=0.2" if operator.endswith("sparse") else "causal"
        (case,) = expand_table(
            {
                "operator": operator, "mask": mask or default, "seq_len": seq_len, "dtype": dtype,
                "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "head_dim": head_dim,
            }
        )  # fmt: skip
        problem = dataclasses.asdict(case.problem)
        rows = []
        kernels = split_list(kernel) if kernel else []
        for row in compilation.tune(
            operator, str(case.mask), problem, device_name(device), kernels
        ):
            rows.append(row)
            if not as_json:
                print("  ".join(f"{value:.1f} us" if key == "us" else f"{value}"
                                for key, value in row.items()), flush=True)  # fmt: skip
    if as_json:
        print(json.dumps(rows))


@commands.command()
def doctor(as_json: AsJson = False) -> int:
    """Check what this machine can run and what is missing."""
    from cpbench.tools import doctor

    rows = doctor.check_environment()
    print_rows(rows, as_json)
    return 1 if any(row["verdict"] == "broken" for row in rows) else 0
