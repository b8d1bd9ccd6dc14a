"""Packages that are not needed on a login node."""

from __future__ import annotations

HEAVY = (
    "torch",
    "triton",
    "mpi4py",
    "flash_attn",
    "flash_attn_interface",
    "flashinfer",
    "flashmask",
    "interface_torch",
    "fastvideo_kernel",
    "ring_flash_attn",
    "magi_attention",
    "transformer_engine",
    "yunchang",
    "deepspeed",
    "fla",
    "mamba_ssm",
)
