"""Compile Triton kernels for GPUs that are not here, and read what the compiler says of them.

``python -m cpbench.tools.aot``, started by ``cpbench.tools.compilation``: a JSON request on stdin,
one JSON row a kernel on stdout.  That a kernel "compiles" proves little: one that needs more tensor
memory than there is becomes an empty kernel that traps, and shared memory is not checked at all.
So each row is judged: is the matrix instruction there, do shared and tensor memory fit, are
registers spilled?

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
from cpbench.core.registry import operator_info

KIB = 1024
TENSOR_COLUMNS = 512


@dataclass(frozen=True)
class Chip:
    """What a kernel may use.

    Attributes:
        instructions: names by which matrix instructions appear in assembly, best first.
        block_shared, processor_shared: bytes of a block, and of a processor.
        warps, blocks: that a processor holds.
        registers: of a processor.
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

# Chips that are compiled for as what they are, and judged as a relative.
RELATED = {
    "cuda:87": "cuda:80", "cuda:101": "cuda:100", "cuda:103": "cuda:100", "cuda:110": "cuda:100",
    "cuda:121": "cuda:120",
}  # fmt: skip


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """What the compiler makes of a kernel: a row of ``cpbench compile``.

    ``verdict`` is ``ok``, ``spills``, or ``broken: …`` with what makes the kernel useless.

    Raises:
        ValueError: for a target whose limits are not known here.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if RELATED.get(target, target) not in CHIPS:
        raise ValueError(f"{target} is none of {', '.join((*CHIPS, *RELATED))}")
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
    begun = time.perf_counter()
    try:
        source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever the compiler's many parts raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return {**row, "verdict": f"broken: does not compile: {words[:200]}"}
    row["compile_s"] = round(time.perf_counter() - begun, 2)
    row["shared_bytes"] = made.metadata.shared
    row["tensor_columns"] = getattr(made.metadata, "tmem_size", None) or 0
    if cuda:
        row |= _ptxas(made.asm["ptx"], int(number))
        text = made.asm["ptx"]
    else:
        text = made.asm["amdgcn"]
        row |= _amd(text)
    chip = CHIPS[RELATED.get(target, target)]
    row["matrix_instruction"] = next((i for i in chip.instructions if i in text), "")
    row["blocks_per_processor"] = _blocks(row, chip, cuda)
    row["occupancy"] = round(row["blocks_per_processor"] * launch.num_warps / chip.warps, 3)
    row["verdict"] = _verdict(row, chip, launch.multiplies)
    return row


def _verdict(row: dict[str, Any], chip: Chip, multiplies: bool) -> str:
    if multiplies and not row["matrix_instruction"]:
        return "broken: no matrix instruction in it"
    if row["shared_bytes"] > chip.block_shared:
        return (
            f"broken: {row['shared_bytes']:,} bytes of shared memory, {chip.block_shared:,} exist"
        )
    if row["tensor_columns"] > TENSOR_COLUMNS:
        columns = row["tensor_columns"]
        return f"broken: {columns} columns of tensor memory, {TENSOR_COLUMNS} exist"
    return "spills" if row["spill_bytes"] else "ok"


def _blocks(row: dict[str, Any], chip: Chip, cuda: bool) -> int:
    """Blocks that fit a processor at once: registers come in units of 256 a warp."""
    registers, shared, warps = row["registers"], row["shared_bytes"], row["warps"]
    of_warp = -(-registers * (32 if cuda else 64) // 256) * 256
    by_registers = chip.registers // max(of_warp * warps, 1)
    by_shared = chip.processor_shared // max(shared + (KIB if cuda else 0), 1)
    return int(min(by_registers, by_shared, chip.warps // warps, chip.blocks))


def _ptxas(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spills, from the assembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        done = subprocess.run(
            [_assembler(capability), "-v", f"--gpu-name=sm_{capability}{suffix}", source,
             "-o", f"{folder}/kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stderr + done.stdout
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None
    assert spills is not None
    return {"registers": int(registers[1]), "spill_bytes": int(spills[1]) + int(spills[2])}


@functools.cache
def _assembler(capability: int) -> str:
    import triton.backends.nvidia as nvidia

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    return str(Path(nvidia.__path__[0]) / "bin" / name)


def _amd(text: str) -> dict[str, int]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": figure("vgpr_count") + figure("agpr_count"),
        "spill_bytes": 4 * figure("vgpr_spill_count"),
    }


def launches(operator: str, target: str, dtype: str, head_dim: int, **config: int) -> list[Launch]:
    """What an operator launches for a target; one by one in the order of its kernels."""
    info = operator_info(operator)
    module, _, attribute = info.compiles.partition(":")
    found: list[Launch] = getattr(importlib.import_module(module), attribute)(
        target, dtype, head_dim, **config
    )
    return found


def main() -> int:
    """Rows for the requests on stdin, one JSON line each as soon as it is known."""
    for wanted in json.load(sys.stdin):
        about = {key: wanted[key] for key in ("operator", "dtype", "head_dim")}
        for launch in launches(target=wanted["target"], **about, **wanted.get("config", {})):
            print(json.dumps({**about, **compile_launch(launch, wanted["target"])}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
