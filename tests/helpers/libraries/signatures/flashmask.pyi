# repository: github.com/PaddlePaddle/flash-attention
# path: flashmask/flash_mask/flashmask_attention_v3/interface_torch.py
# commit: 9985af538d20bd7a56c7a5f5ea13294d454a011a  (main, 2026-08-17; setup_torch.py version 3.0.0b1)
# bwd: the schema that flash_api_torch.cpp:1689 registers as torch.ops.flashmask.bwd, reached as
# interface_torch.flashmask_cuda.bwd.
# Trimmed to what is called.

def flashmask_attention(query: Tensor, key: Tensor, value: Tensor, startend_row_indices: Tensor | None=None, *, dropout: float=0.0, causal: bool=False, window_size: int | tuple | None=None, return_softmax_lse: bool=False, return_seed_offset: bool=False, fixed_seed_offset: Tensor | None=None, rng_name: str='', training: bool=True, name: str | None=None, softmax_scale: float | None=None, block_mask: Tensor | None=None): ...

def bwd(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, softmax_lse: torch.Tensor, dq: Optional[torch.Tensor]=None, dk: Optional[torch.Tensor]=None, dv: Optional[torch.Tensor]=None, cu_seqlens_q: Optional[torch.Tensor]=None, cu_seqlens_k: Optional[torch.Tensor]=None, seqused_q: Optional[torch.Tensor]=None, seqused_k: Optional[torch.Tensor]=None, startend_row_indices: Optional[torch.Tensor]=None, block_mask: Optional[torch.Tensor]=None, max_seqlen_q: Optional[int]=None, max_seqlen_k: Optional[int]=None, softmax_scale: float=0.0, is_causal: bool=False, window_size_left: int=-1, window_size_right: int=-1, softcap: float=0.0, deterministic: bool=False, sm_margin: int=0) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
