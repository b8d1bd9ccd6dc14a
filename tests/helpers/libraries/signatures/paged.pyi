# repository: github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py (2.8.3.post1)
# repository: github.com/flashinfer-ai/flashinfer, flashinfer/decode.py
# commit: 002752ae3615318e75b95e2eeb716242233c0fdd  (FlashInfer; keyword arguments of plan spelled out)
# Trimmed to what is called.

def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens: Optional[Union[int, torch.Tensor]]=None, cache_batch_idx: Optional[torch.Tensor]=None, cache_leftpad: Optional[torch.Tensor]=None, block_table: Optional[torch.Tensor]=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False): ...

class BatchDecodeWithPagedKVCacheWrapper:
    def plan(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, pos_encoding_mode: str='NONE', window_left: int=-1, window_right: int=0, logits_soft_cap: Optional[float]=None, q_data_type: Optional[Union[str, torch.dtype]]='float16', kv_data_type: Optional[Union[str, torch.dtype]]=None, o_data_type: Optional[Union[str, torch.dtype]]=None, data_type: Optional[Union[str, torch.dtype]]=None, sm_scale: Optional[float]=None, rope_scale: Optional[float]=None, rope_theta: Optional[float]=None, non_blocking: bool=True, block_tables: Optional[torch.Tensor]=None, seq_lens: Optional[torch.Tensor]=None, fixed_split_size: Optional[int]=None, disable_split_kv: bool=False, q_len_per_req: int=1) -> None: ...
