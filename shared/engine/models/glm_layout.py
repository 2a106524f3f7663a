"""What a page of a GLM-5 holds."""

from shared.engine.kv import formats
from shared.engine.kv.layout import KvLayout, pack
from shared.engine.models.glm_config import GlmConfig

LATENTS, INDEX_KEYS = "mla_latent", "indexer_keys"
MTP_LATENTS, MTP_INDEX_KEYS = "mtp_latent", "mtp_indexer_keys"


def layout(config: GlmConfig, kv_dtype: str, page_size: int, *, mtp: bool = False) -> KvLayout:
    """Latents of every layer, index keys of those that select: layers that share a selection keep none. With `mtp` also
    those of the MTP layer.

    Raises Unsupported for a `kv_dtype` that is not of `formats.KV_DTYPES`.
    """
    latent = formats.latent(kv_dtype, config.kv_lora_rank, config.qk_rope_head_dim)
    key = formats.index_key(kv_dtype, config.index_head_dim)
    classes = {LATENTS: (config.num_layers, latent), INDEX_KEYS: (sum(config.full_layers), key)}
    if mtp:
        classes |= {MTP_LATENTS: (1, latent), MTP_INDEX_KEYS: (1, key)}
    return pack(
        page_size,
        {name: (layers, row.name, layers * page_size * row.row_bytes) for name, (layers, row) in classes.items()},
    )
