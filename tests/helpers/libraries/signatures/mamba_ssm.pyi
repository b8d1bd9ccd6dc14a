# repository: github.com/state-spaces/mamba
# path: mamba_ssm/ops/triton/ssd_combined.py
# commit: a14b1dff0454a3bc27d9eb31355dc01e4b2490ec  (tag v2.3.2.post1, 2026-05-09)
# Extracted mechanically with ast.
# Trimmed to what is called.

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float('inf')), return_final_states=False, return_varlen_states=False): ...
