"""Triton kernels compiled ahead of time, disassembled, and tuned."""
