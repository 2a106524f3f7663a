"""The C side of GLM's layers on the CPU: structures as native/glm.cpp declares them."""

import ctypes

from shared.engine.kernels.native import IndexKeys, Int, Linear, Pointer

Float = ctypes.c_float
ATTENTION, MLP = 1, 2  # the parts of a layer


class Routing(ctypes.Structure):
    """How a mixture chooses experts."""

    _fields_ = (
        *((name, Int) for name in ("num_experts", "num_chosen", "num_groups", "num_chosen_groups", "normalize")),
        ("scale", Float),
        ("bias", Pointer),
    )


class GlmLayer(ctypes.Structure):
    """One layer: a rank's share."""

    _fields_ = (
        *((name, Int) for name in ("hidden", "num_heads", "q_lora", "kv_lora", "nope", "rope", "value_dim")),
        *((name, Int) for name in ("index_heads", "index_dim", "inner", "expert_inner", "first_expert", "num_own")),
        *((name, Float) for name in ("eps", "latent_eps", "key_norm_eps")),
        *((name, Pointer) for name in ("input_norm", "query_norm", "latent_norm", "key_norm", "key_norm_bias")),
        ("post_norm", Pointer),
        *((name, Linear) for name in ("low", "query", "up_key", "up_value", "output", "gate_up", "down")),
        *((name, Linear) for name in ("router", "expert_gate_up", "expert_down")),
        ("routing", Routing),
    )


class PagedRows(ctypes.Structure):
    """A layer's rows in the pool."""

    _fields_ = (("base", Pointer), *((name, Int) for name in ("page_bytes", "page_size", "row_bytes")))


class GlmStep(ctypes.Structure):
    """The rows of a step, where they are, what enters a layer and what it makes of it."""

    _fields_ = (
        *((name, Int) for name in ("num_tokens", "num_parts")),
        *((name, Pointer) for name in ("positions", "first_pages", "page_ids", "own_pages", "own_offsets", "parts")),
        *((name, Pointer) for name in ("turns", "x", "out")),
        ("latents", PagedRows),
        ("keys", IndexKeys),
        ("selection", Pointer),
        ("num_selected", Int),
        ("workspace", Pointer),
    )


def declare(library: ctypes.CDLL) -> None:
    """Say what the functions take."""
    layer, step = ctypes.POINTER(GlmLayer), ctypes.POINTER(GlmStep)
    library.forebay_glm_workspace_bytes.argtypes = (layer, step, Pointer, ctypes.c_int)
    library.forebay_glm_workspace_bytes.restype = Int
    library.forebay_glm_layer.argtypes = (layer, step, Pointer, ctypes.c_int, ctypes.c_int)
    library.forebay_glm_layer.restype = None
    library.forebay_product.argtypes = (ctypes.POINTER(Linear), Pointer, ctypes.c_int, Pointer, Int, Pointer)
    library.forebay_product.restype = None
