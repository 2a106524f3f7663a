"""What a model takes: parameters and bytes by class of module, KV bytes per token, and what fits on GPUs."""

import re
from collections import Counter
from dataclasses import dataclass

from shared.engine.kv.formats import FLOAT_BYTES, KV_DTYPES
from shared.engine.models import dense_layout, dense_shapes, glm_layout
from shared.engine.models.config import DenseConfig
from shared.engine.models.tensor_list import FLOAT_BYTES as STORED_FLOATS
from shared.engine.models.tensor_list import ModelTensors, Tensor
from shared.engine.parallel.partition import EXPERT, PartOf, Shard, of_dense, of_glm
from shared.errors import InvalidRequest

PAGE_SIZE = 64  # state classes of so many tokens need no padding
COMPUTE_DTYPE, COMPUTE_BYTES, ROUTER_BYTES = "bfloat16", 2, 4
LAYER = re.compile(r"\.layers\.(\d+)\.")
# The first that is found in a name; norms and the expert router are told by what they are, wherever they are.
CLASSES = {
    "norm.": "norms and router",
    ".gate.": "norms and router",
    ".experts.": "routed experts",
    ".shared_experts.": "shared experts",
    ".mlp.": "dense mlp",
    ".indexer.": "indexer",
    ".self_attn.": "attention",
}
STAYS_FP8 = re.compile(r"\.self_attn\.(?!kv_b)|\.mlp\.(gate|up|down)_proj\.")  # of GLM
MTP, EMBEDDING_AND_HEAD = "mtp", "embedding and head"


@dataclass(frozen=True, slots=True)
class ModuleClass:
    """The tensors of one class that are stored in one form."""

    name: str
    form: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """`active` are those that a token is multiplied with: of the routed experts the chosen, and no embedding unless it
    is also the head. MTP layers count in `total` alone."""

    total: int
    active: int
    active_with_embedding: int
    mtp: int


@dataclass(frozen=True, slots=True)
class Fit:
    """On each of `num_gpus` ranks that share a model out, the fullest of them: `weights` in the form that is named,
    the rest for KV in `kv_dtype`. An MTP layer that is there counts in both; what computing takes besides does not."""

    weights: str
    kv_dtype: str
    num_gpus: int
    weight_bytes: int
    room_bytes: int
    kv_bytes_per_token: int
    num_tokens: int


def module_class(model: ModelTensors, name: str) -> str:
    """The class of a tensor."""
    layer = LAYER.search(name)
    if layer and int(layer[1]) >= model.config.num_layers:
        return MTP
    for part, title in CLASSES.items():
        if part in name:
            return title
    return EMBEDDING_AND_HEAD


def module_classes(model: ModelTensors) -> list[ModuleClass]:
    """One for each class and form, the largest first."""
    members: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in model.tensors.items():
        members.setdefault((module_class(model, name), tensor.form), []).append(tensor)
    found = [
        ModuleClass(name, form, len(of), sum(t.num_parameters for t in of), sum(t.num_bytes for t in of))
        for (name, form), of in members.items()
    ]
    return sorted(found, key=lambda entry: -entry.num_bytes)


def parameters(model: ModelTensors) -> Parameters:
    """How many there are, and how many a token meets."""
    counts: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        counts[module_class(model, name)] += tensor.num_parameters
    config, total, mtp = model.config, counts.total(), counts[MTP]
    with_embedding = total - mtp
    if not isinstance(config, DenseConfig):
        routed = counts["routed experts"]
        with_embedding -= routed - routed * config.num_experts_per_token // config.num_experts
    tied = isinstance(config, DenseConfig) and config.tied_embeddings
    embedding = 0 if tied else model.tensors[dense_shapes.EMBEDDING].num_parameters
    return Parameters(total, with_embedding - embedding, with_embedding, mtp)


def kv_bytes_per_token(model: ModelTensors, *, mtp: bool = False, shard: Shard | None = None) -> dict[str, int]:
    """By KV dtype, what a token takes: in all, or on one rank (latents are whole on each, heads are shared out)."""
    config, place = model.config, shard or Shard()
    if isinstance(config, DenseConfig):
        heads = place.kv_heads(config.num_kv_heads)
        layouts = {dtype: dense_layout.layout(config, dtype, PAGE_SIZE, heads) for dtype in FLOAT_BYTES}
    else:
        layouts = {dtype: glm_layout.layout(config, dtype, PAGE_SIZE, mtp=mtp) for dtype in KV_DTYPES}
    return {dtype: layout.page_bytes // PAGE_SIZE for dtype, layout in layouts.items()}


def fits(model: ModelTensors, num_gpus: int, gpu_memory_bytes: int) -> list[Fit]:
    """Weights as GPUs hold them to compute with: in bfloat16, but NVFP4 stays packed in dense models and in routed
    experts, and FP8 stays in GLM's attention (but for kv_b) and dense MLPs. Others that are quantized are dequantized
    when loaded; what they would take as stored is told besides.

    A room below 0 means that the weights do not fit. Raises InvalidRequest for no GPU or no memory, Unsupported for a
    number of ranks that the model cannot be shared out to.
    """
    if num_gpus < 1 or gpu_memory_bytes < 1:
        raise InvalidRequest("what fits is told for at least one GPU with some memory")
    stored, computed = _rank_bytes(model, Shard(0, num_gpus))
    quantized = any(tensor.form not in STORED_FLOATS for tensor in model.tensors.values())
    kept = {tensor.form for name, tensor in model.tensors.items() if _stays_packed(model, name, tensor)}
    held = " and ".join((*sorted(kept, reverse=True), COMPUTE_DTYPE))
    forms = {held: computed} | ({"as stored": stored} if quantized else {})
    per_token = kv_bytes_per_token(model, mtp=model.has_mtp, shard=Shard(0, num_gpus))
    return [
        Fit(form, dtype, num_gpus, weights, room, num_bytes, max(room, 0) // num_bytes)
        for form, weights in forms.items()
        for dtype, num_bytes in per_token.items()
        for room in [gpu_memory_bytes - weights]
    ]


def _rank_bytes(model: ModelTensors, shard: Shard) -> tuple[int, int]:
    """Of the first rank, whose share is never smaller than another's: as stored, and in the dtype of computing."""
    config = model.config
    part_of: PartOf = (of_dense(config, shard) if isinstance(config, DenseConfig) else of_glm(config, shard))[1]
    owned = range(0) if isinstance(config, DenseConfig) else shard.experts(config.num_experts)
    stored = computed = 0
    for name, tensor in model.tensors.items():
        expert = EXPERT.search(name)
        if expert and int(expert[1]) not in owned:
            continue
        part = part_of(name)
        length, size = (part.length, tensor.shape[part.dim]) if part else (1, 1)
        own_bytes = -(-tensor.num_bytes * length // size)
        stored += own_bytes
        width = ROUTER_BYTES if ".mlp.gate." in name else COMPUTE_BYTES  # expert routers compute in float32
        packed = _stays_packed(model, name, tensor)
        computed += own_bytes if packed else tensor.num_parameters * length // size * width
    return stored, computed


def _stays_packed(model: ModelTensors, name: str, tensor: Tensor) -> bool:
    is_dense = isinstance(model.config, DenseConfig)
    if tensor.form == "fp8":
        return not is_dense and STAYS_FP8.search(name) is not None
    return tensor.form == "nvfp4" and (is_dense or EXPERT.search(name) is not None)
