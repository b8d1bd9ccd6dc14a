"""Hot loops of kernels from their disassembly."""

from __future__ import annotations

from cpbench.tools.compiler.disassembly import HotLoops, hot_loops


def listing(*lines: str) -> str:
    """Machine code as cuobjdump prints it, 16 bytes an instruction."""
    return "\n".join(
        f"        /*{16 * i:04x}*/    {text} ;    /* 0x{i:016x} */" for i, text in enumerate(lines)
    )


def test_spills_count_in_loops_with_matrix_instructions() -> None:
    code = listing(
        "STL.128 [R1], R4",  # before any loop
        "LDG.E R2, [R4.64]",  # 0x10: an outer loop
        "LDL.64 R2, [R1+0x8]",
        "HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], R8",  # 0x30: the inner loop
        "@P0 STL [R1+0x10], R9",
        "MUFU.EX2 R12, R13",
        "LDL.128 R12, [R1+0x20]",
        "HGMMA.64x32x16.F32.BF16 R8, gdesc[UR8], R8",
        "@P1 BRA 0x30",
        "@!P2 BRA 0x10",
        "FADD R2, R2, R3",  # 0xa0: a loop without matrix instructions
        "LDL R2, [R1]",
        "@P0 BRA 0xa0",
        "@P3 BRA 0x100",  # forward
        "EXIT",
    )
    assert hot_loops(code) == HotLoops(
        count=1, matrix_instructions=2, exponentials=1, local_bytes=4 + 16
    )


def test_a_loop_whose_end_was_moved_behind_an_inner_one() -> None:
    """The compiler puts the end of an outer loop's body behind the loops that come after it: from
    there it branches back into the middle of another one, which is no loop of its own."""
    code = listing(
        "IADD R1, R1, R2",
        "HGMMA.64x32x16.F32.BF16 R8, gdesc[UR4], R8",  # 0x10: the hot loop
        "IADD R1, R1, R2",  # 0x20
        "@P0 BRA 0x10",
        "LDL R2, [R1]",
        "@P1 BRA 0x20",  # overlaps with the hot loop
    )
    assert hot_loops(code) == HotLoops(1, 1, 0, 0)


def test_two_loops_and_none() -> None:
    loop = ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDL R2, [R1]")
    code = listing(*loop, "@P0 BRA 0x0", *loop, loop[0], "@P0 BRA 0x30")
    assert hot_loops(code) == HotLoops(2, 2, 0, 8)
    assert hot_loops(listing("LDL R2, [R1]", "@P0 BRA 0x0", "EXIT")) == HotLoops(0, 0, 0, 0)
