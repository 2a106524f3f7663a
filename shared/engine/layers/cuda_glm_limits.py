"""What the layers of `cuda_glm_layer` are made for."""

import torch

from shared.engine.models.glm_config import GlmConfig


def obstacle(config: GlmConfig, dtype: torch.dtype, kv_dtype: str, capability: tuple[int, int]) -> str | None:
    """What keeps these kernels from serving a model, or a rank's share of it."""
    if capability < (9, 0):
        return f"they need compute capability 9.0, and this GPU has {capability[0]}.{capability[1]}"
    if dtype != torch.bfloat16 or kv_dtype != "bfloat16":
        return f"they compute and keep KV in bfloat16, not in {str(dtype).removeprefix('torch.')} and {kv_dtype}"
    if config.num_groups > 1:
        return "they choose experts from all, not from groups"
    for name, size in (
        ("kv_lora_rank", config.kv_lora_rank),
        ("qk_rope_head_dim", config.qk_rope_head_dim),
        ("index_head_dim", config.index_head_dim),
        ("index_n_heads", config.index_num_heads),
        ("index_topk", config.index_topk),
        ("n_routed_experts", config.num_experts),
        ("num_experts_per_tok", config.num_experts_per_token),
    ):
        if size & (size - 1) or (size < 16 and "expert" not in name):
            return f"{name} is {size}, no power of two of at least 16"
    for name, size, multiple in (
        ("qk_nope_head_dim", config.qk_nope_head_dim, 16),
        ("v_head_dim", config.v_head_dim, 32),
        ("hidden_size", config.hidden_size, 256),
        ("q_lora_rank", config.q_lora_rank, 256),
        ("a rank's heads times v_head_dim", config.num_heads * config.v_head_dim, 256),
        ("a rank's intermediate_size", config.intermediate_size, 256),
        ("a rank's moe_intermediate_size", 256, 256),
    ):
        if size % multiple:
            return f"{name} is {size}, no multiple of {multiple}"
    return None
