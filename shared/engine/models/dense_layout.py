"""What a page of a dense decoder holds."""

from shared.engine.kv import formats
from shared.engine.kv.layout import KvLayout, pack
from shared.engine.models.config import DenseConfig

KV = "kv"


def layout(config: DenseConfig, kv_dtype: str, page_size: int, heads: range) -> KvLayout:
    """Keys and values of `heads`, one behind the other (docs/decisions/0045): [Hkv, layers, 2, page_size, D].

    Raises Unsupported for a `kv_dtype` that is no float.
    """
    row = formats.floats(kv_dtype, config.head_dim)
    num_bytes = len(heads) * config.num_layers * 2 * page_size * row.row_bytes
    return pack(page_size, {KV: (config.num_layers, row.name, num_bytes)}, heads={KV: heads})
