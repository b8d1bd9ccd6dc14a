"""The project's own Triton kernels: `triton_band` and `triton_block_sparse`."""
