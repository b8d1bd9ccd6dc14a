"""The public functions: attention and sequence mixers, on one device and on the shards of a process
group.

Shapes: q ``[B, S, H, D]``; k ``[B, T, G, D]``, ``H % G == 0``; v ``[B, T, G, Dv]``; out
``[B, S, H, Dv]``; lse ``[B, H, S]`` float32, natural logarithm, -inf for queries that see nothing
(whose output is 0).
"""

from cpbench.api.distributed import distributed_attention
from cpbench.api.distributed_mixing import distributed_mix
from cpbench.api.local import attention
from cpbench.api.mixing import mix
from cpbench.api.prepared import Attention, find_disagreement, require_agreement

__all__ = [
    "Attention",
    "attention",
    "distributed_attention",
    "distributed_mix",
    "find_disagreement",
    "mix",
    "require_agreement",
]
