"""Compile Triton kernels ahead of time, for any GPU, and report the compiler's resource usage.

``python -m cpbench.tools.compiler.aot``, started by ``compilation``: reads a list of requests as
JSON from stdin and prints one JSON row per kernel.  That a kernel compiles proves little: one
that needs more tensor memory than the GPU has becomes an empty kernel that traps, and the limit of
shared memory is not checked at all.  So each row has a verdict: is there a matrix instruction, do
shared and tensor memory fit, are registers spilled?

Limits: CUDA programming guide, tables of compute capabilities; AMD CDNA3 and CDNA4 ISA guides.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.core.kernel_launch import Launch
from cpbench.tools.compiler.compilation import SPILLS_OUTSIDE, launch_lists
from cpbench.tools.compiler.disassembly import disassemble, hot_loops

KIB = 1024
TENSOR_COLUMNS = 512
SCRATCH_ARGUMENTS = 2  # pointers that the launcher adds to those of the signature


@dataclass(frozen=True)
class Chip:
    """Resource limits of a GPU.

    Attributes:
        instructions: names of matrix instructions in assembly, best first.
        block_shared, processor_shared: bytes of shared memory per block, and per multiprocessor.
        warps, blocks: resident at most on a multiprocessor.
        registers: of a multiprocessor, 32 bits each.
    """

    instructions: tuple[str, ...]
    block_shared: int
    processor_shared: int
    warps: int
    blocks: int
    registers: int = 65536


_MMA = "mma.sync"
_MFMA = ("v_mfma",)
CHIPS = {
    "cuda:80": Chip((_MMA,), 163 * KIB, 164 * KIB, 64, 32),
    "cuda:86": Chip((_MMA,), 99 * KIB, 100 * KIB, 48, 16),
    "cuda:89": Chip((_MMA,), 99 * KIB, 100 * KIB, 48, 24),
    "cuda:90": Chip(("wgmma.mma_async", _MMA), 227 * KIB, 228 * KIB, 64, 32),
    "cuda:100": Chip(("tcgen05.mma", _MMA), 227 * KIB, 228 * KIB, 64, 32),
    "cuda:120": Chip((_MMA,), 99 * KIB, 100 * KIB, 48, 32),
    "hip:gfx942": Chip(_MFMA, 64 * KIB, 64 * KIB, 32, 16, 65536 * 2),
    "hip:gfx950": Chip(_MFMA, 160 * KIB, 160 * KIB, 32, 16, 65536 * 2),
}

# Targets that have the limits of another one.
SAME_LIMITS_AS = {
    "cuda:87": "cuda:80", "cuda:101": "cuda:100", "cuda:103": "cuda:100", "cuda:110": "cuda:100",
    "cuda:121": "cuda:120",
}  # fmt: skip


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Compile a kernel for a target and return its row of ``cpbench compile``.

    ``verdict`` is ``ok``; ``spills …`` with where; ``repeats work …`` if several warps compute the
    same exponentials; or ``broken: …`` with the reason.

    Raises:
        ValueError: for a target that is not in ``CHIPS`` or ``SAME_LIMITS_AS``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if SAME_LIMITS_AS.get(target, target) not in CHIPS:
        raise ValueError(f"{target} is not one of {', '.join((*CHIPS, *SAME_LIMITS_AS))}")
    module, _, attribute = launch.function.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    names = function.arg_names
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    family, _, number = target.partition(":")
    cuda = family == "cuda"
    gpu = GPUTarget(family, int(number) if cuda else number, 32 if cuda else 64)
    row: dict[str, Any] = {
        "kernel": launch.kernel, "target": target, "config": launch.config,
        "warps": launch.num_warps, "stages": launch.num_stages,
    }  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    start = time.perf_counter()
    try:
        source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # compiler passes raise many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {**row, "verdict": f"broken: does not compile: {reason[:200]}"}
    row["compile_s"] = round(time.perf_counter() - start, 2)
    row["shared_bytes"] = compiled.metadata.shared
    row["tensor_columns"] = getattr(compiled.metadata, "tmem_size", None) or 0
    if cuda:
        assembly = compiled.asm["ptx"]
        row |= _ptxas_usage(assembly, int(number))
        loops = hot_loops(disassemble(compiled.asm["cubin"]))
        row["hot_loops"], row["hot_local_bytes"] = loops.count, loops.local_bytes
        row["matrix_instructions"] = loops.matrix_instructions
        row["exponentials"] = loops.exponentials
        row["arguments"] = _arguments(signature, compiled)
    else:
        assembly = compiled.asm["amdgcn"]
        row |= _amdgcn_usage(assembly)
    chip = CHIPS[SAME_LIMITS_AS.get(target, target)]
    row["matrix_instruction"] = next((i for i in chip.instructions if i in assembly), "")
    row["blocks_per_processor"] = _blocks(row, chip, cuda)
    row["occupancy"] = round(row["blocks_per_processor"] * launch.num_warps / chip.warps, 3)
    row["tile"] = (launch.constants.get("M", 0), launch.constants.get("N", 0))
    row["verdict"] = _verdict(row, chip, launch.multiplies)
    return row


def _verdict(row: dict[str, Any], chip: Chip, multiplies: bool) -> str:
    """The verdict on a compiled kernel; ``multiplies``: it has matrix products."""
    if multiplies and not row["matrix_instruction"]:
        return "broken: no matrix instruction"
    if row["shared_bytes"] > chip.block_shared:
        nbytes, limit = row["shared_bytes"], chip.block_shared
        return f"broken: needs {nbytes:,} bytes of shared memory, limit {limit:,}"
    if row["tensor_columns"] > TENSOR_COLUMNS:
        columns = row["tensor_columns"]
        return f"broken: needs {columns} columns of tensor memory, limit {TENSOR_COLUMNS}"
    given, taken = row.get("arguments", (0, 0))
    if given != taken:
        return f"broken: takes {taken} arguments, and is launched with {given or 'others'}"
    rows, cols = row["tile"]
    exponentials = row.get("exponentials", 0) * 32 * row["warps"]
    if multiplies and rows * cols and exponentials > 1.5 * rows * cols:
        times = exponentials / (rows * cols)
        return f"repeats work: each exponential {times:.2g} times, by {row['warps']} warps"
    if hot := row.get("hot_local_bytes"):
        return f"spills {hot} bytes in loops with matrix instructions"
    return SPILLS_OUTSIDE if row["spill_bytes"] else "ok"


def _arguments(signature: dict[str, str], compiled: Any) -> tuple[int, int]:
    """How many arguments Triton's launcher passes to a kernel, and how many that takes; descriptors
    are several each.  The launcher expands them by rules of its own, so that some kernels compile
    and cannot be launched; 0 is for those that it does not expand."""
    from triton.backends.nvidia.driver import expand_signature

    entry = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    try:
        meta = getattr(compiled.metadata, "tensordesc_meta", None)
        expanded = expand_signature(signature.values(), meta)
    except AssertionError:
        return 0, entry.count(".param")
    own = sum(type_ != "constexpr" for type_ in expanded)
    return own + SCRATCH_ARGUMENTS, entry.count(".param")


def _blocks(row: dict[str, Any], chip: Chip, cuda: bool) -> int:
    """Resident blocks per multiprocessor; a warp is given registers in units of 256."""
    registers, shared, warps = row["registers"], row["shared_bytes"], row["warps"]
    per_warp = -(-registers * (32 if cuda else 64) // 256) * 256
    by_registers = chip.registers // max(per_warp * warps, 1)
    by_shared = chip.processor_shared // max(shared + (KIB if cuda else 0), 1)
    return int(min(by_registers, by_shared, chip.warps // warps, chip.blocks))


def _ptxas_usage(ptx: str, capability: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, from the log of Triton's own ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, "utf-8")
        suffix = "a" if capability >= 90 else ""
        result = subprocess.run(
            [_assembler(capability), "-v", f"--gpu-name=sm_{capability}{suffix}", source,
             "-o", f"{folder}/kernel.cubin"],
            capture_output=True, encoding="utf-8", errors="replace", check=True,
        )  # fmt: skip
    log = result.stderr + result.stdout
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers is not None
    assert spills is not None
    return {"registers": int(registers[1]), "spill_bytes": int(spills[1]) + int(spills[2])}


@functools.cache
def _assembler(capability: int) -> str:
    """Path of the ptxas in Triton that knows a compute capability."""
    import triton.backends.nvidia as nvidia

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    return str(Path(nvidia.__path__[0]) / "bin" / name)


def _amdgcn_usage(assembly: str) -> dict[str, int]:
    """Registers per thread and spilled bytes, from the metadata in AMD assembly."""

    def metadata(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    return {
        "registers": metadata("vgpr_count") + metadata("agpr_count"),
        "spill_bytes": 4 * metadata("vgpr_spill_count"),
    }


def kernel_launches(
    operator: str, target: str, dtype: str, head_dim: int, head_dim_v: int = 0, **config: int
) -> list[Launch]:
    """The launches of an operator on a target, in the order of its kernels."""
    module, _, attribute = launch_lists()[operator].partition(":")
    launches: list[Launch] = getattr(importlib.import_module(module), attribute)(
        target, dtype, head_dim, head_dim_v=head_dim_v, **config
    )
    return launches


def main() -> int:
    """Read requests from stdin and print each row as a line of JSON when it is ready."""
    for request in json.load(sys.stdin):
        target = request["target"]
        key = {name: request[name] for name in ("operator", "dtype", "head_dim", "head_dim_v")}
        for launch in kernel_launches(target=target, **key, **request.get("config", {})):
            print(json.dumps({**key, **compile_launch(launch, target)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
