"""What the innermost loops of a compiled kernel do, from its disassembly.

A kernel spends its time in the loops that hold matrix instructions; registers that are kept in
local memory cost there, and next to nothing elsewhere.  A loop is what lies between a backward
branch and its target; the hot loops are those with matrix instructions in which no other such loop
ends.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Matrix instructions of Ampere, Hopper and Blackwell, in machine code.
MATRIX = re.compile(r"\b(?:HMMA|HGMMA|IMMA|QGMMA|UTC[A-Z]*MMA)\b")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)?`?\(?(0x[0-9a-f]+)")
_LOCAL = re.compile(r"\b(?:LDL|STL)((?:\.\w+)*)")
_BYTES = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True)
class HotLoops:
    """The loops of a kernel with matrix instructions.

    Attributes:
        count: how many there are.
        matrix_instructions: of a warp in one pass of the loop with the most.
        exponentials: of a thread in one pass of that loop.
        local_bytes: of local memory moved by a thread in one pass, summed over the loops.
    """

    count: int
    matrix_instructions: int
    exponentials: int
    local_bytes: int


def disassemble(cubin: bytes) -> str:
    """The machine code of a kernel as text, by the disassembler that comes with Triton."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [program, "-sass", file], capture_output=True, encoding="utf-8", errors="replace",
            check=True,
        )  # fmt: skip
    return done.stdout


def hot_loops(sass: str) -> HotLoops:
    """The hot loops of a disassembled kernel."""
    code = [(int(match[1], 16), match[2]) for match in _LINE.finditer(sass)]
    loops = [
        (int(branch[1], 16), address)
        for address, text in code
        if (branch := _BRANCH.search(text)) and int(branch[1], 16) < address
    ]
    with_matrix = {loop: _matrix_instructions(code, loop) for loop in loops}
    hot = [
        loop
        for loop, count in with_matrix.items()
        if count and not any(n and _ends_in(other, loop) for other, n in with_matrix.items())
    ]
    busiest = max(hot, key=lambda loop: with_matrix[loop], default=(0, -1))
    return HotLoops(
        count=len(hot),
        matrix_instructions=with_matrix.get(busiest, 0),
        exponentials=sum("MUFU.EX2" in text for _, text in _inside(code, busiest)),
        local_bytes=sum(_local_bytes(code, loop) for loop in hot),
    )


Loop = tuple[int, int]  # addresses of its first and its last instruction
Code = Sequence[tuple[int, str]]


def _inside(code: Code, loop: Loop) -> Iterator[tuple[int, str]]:
    """The instructions of a loop."""
    return ((at, text) for at, text in code if loop[0] <= at <= loop[1])


def _ends_in(inner: Loop, outer: Loop) -> bool:
    """Whether a shorter loop ends in another one.  It may begin before, where the compiler has
    moved the end of the outer one's body behind it."""
    shorter = inner[1] - inner[0] < outer[1] - outer[0]
    return shorter and outer[0] <= inner[1] <= outer[1]


def _matrix_instructions(code: Code, loop: Loop) -> int:
    return sum(bool(MATRIX.search(text)) for _, text in _inside(code, loop))


def _local_bytes(code: Code, loop: Loop) -> int:
    total = 0
    for _, text in _inside(code, loop):
        if access := _LOCAL.search(text):
            sizes = [_BYTES[part] for part in access[1].split(".") if part in _BYTES]
            total += sizes[0] if sizes else 4
    return total
