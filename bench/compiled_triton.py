"""Every kernel in Triton and Gluon compiled as decoders launch it, for a GPU that is not here."""

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.glm_random import FIELDS, PAGE_SIZE, Counted, RandomLayers
from shared.engine.kernels import (
    triton_begin,
    triton_dense,
    triton_grouped,
    triton_index,
    triton_likeliest,
    triton_members,
    triton_mixture,
    triton_moved,
    triton_ordered,
    triton_paged,
    triton_peers,
    triton_prompt,
    triton_scores,
)
from shared.engine.kernels.experts import Experts
from shared.engine.kernels.inputs import Rows, Span
from shared.engine.layers import cuda_glm_layer
from shared.engine.layers.cuda_glm_layer import State, Step
from shared.engine.layers.cuda_glm_weights import Mixture
from shared.engine.models import glm_config

CPU = torch.device("cpu")
NUM_RANKS, NUM_EXPERTS, NUM_PAGES, VOCAB_SIZE = 8, 16, 64, 512  # of GLM-5.2; less of what no kernel's shape depends on
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, DENSE_PAGE = 32, 8, 128, 4096, 14_336, 16  # of Llama-3.1-8B
Compiled = tuple[str, float, bytes]


class Compiler:
    """Compiles what is launched, and launches nothing."""

    def __init__(self, capability: tuple[int, int]) -> None:
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        driver = SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
        )
        triton.runtime.driver.set_active(driver)
        self.found: dict[str, Compiled] = {}
        launch = JITFunction.run

        def compile_only(function: Any, *args: Any, **options: Any) -> Any:
            started = time.monotonic()
            kernel = launch(function, *args, **{**options, "warmup": True})
            name = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"
            self.found.setdefault(kernel.hash, (name, time.monotonic() - started, kernel.asm["cubin"]))
            return kernel

        JITFunction.run = compile_only
        # As on a GPU, where a kernel may start while the one before it ends.
        for module in (triton_begin, triton_dense, triton_likeliest, triton_moved, triton_paged, triton_peers):
            setattr(module, "launch_options", _early)  # noqa: B010 - it is imported there, not exported


def _early(_: torch.device) -> tuple[bool, dict[str, Any]]:
    return True, {"launch_pdl": True}


def kernels(capability: tuple[int, int]) -> Iterator[Compiled]:
    """Name, seconds and machine code of each; one that is launched in several ways is compiled in each of them."""
    compiler = Compiler(capability)
    for num_rows in (1, 4):
        _dense(num_rows)
        _glm(num_rows)
    _prompts()
    counts: dict[str, int] = {}
    for name, seconds, code in compiler.found.values():
        counts[name] = counts.get(name, 0) + 1
        yield f"{name}-{counts[name]}", seconds, code


def _dense(num_rows: int) -> None:
    def some(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def ids(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    kv = some(NUM_PAGES, 2, KV_HEADS, DENSE_PAGE, HEAD_DIM)
    angles = torch.zeros(num_rows, HEAD_DIM // 2), torch.zeros(num_rows, HEAD_DIM // 2)
    triton_dense.add_rms_norm(some(num_rows, HIDDEN), some(num_rows, HIDDEN), some(HIDDEN), 1e-5)
    triton_dense.silu_mul(some(num_rows, 2 * INNER))
    qkv = some(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    q = triton_dense.rotate_and_append(qkv, angles, (None, None), 1e-5, ids(num_rows), kv)
    triton_dense.rotate_and_append(qkv, angles, (None, None), 1e-5, ids(num_rows), kv, in_place=True)
    counters = triton_paged.counters(num_rows, KV_HEADS, CPU)
    triton_paged.attend(q, kv, ids(NUM_PAGES), ids(num_rows + 1), ids(num_rows), counters)


def _glm(num_rows: int) -> None:
    """A dense layer that selects, a mixture that does not, and one that does."""
    whole = glm_config.parse({**FIELDS, "n_routed_experts": NUM_EXPERTS, "vocab_size": VOCAB_SIZE})
    weights = RandomLayers(whole, NUM_RANKS, CPU)
    config = weights.config

    def ids(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    half = torch.zeros(num_rows, config.qk_rope_head_dim // 2)
    rows = Rows(ids(num_rows), ids(num_rows), ids(num_rows), ids(NUM_PAGES), half, half)
    selected = triton_index.empty(num_rows, config.index_topk, CPU)
    selected = replace(selected, slots=selected.slots.zero_(), counts=selected.counts.zero_())
    step = Step(config, Counted(NUM_RANKS), rows, selected, NUM_PAGES * PAGE_SIZE)
    latents = torch.zeros(NUM_PAGES, PAGE_SIZE, config.latent_dim, dtype=torch.bfloat16)
    keys = torch.zeros(NUM_PAGES, PAGE_SIZE, config.index_head_dim, dtype=torch.bfloat16)
    mixtures = [index for index, is_mixture in enumerate(config.moe_layers) if is_mixture]
    shared = next(index for index in mixtures if not config.full_layers[index])
    selecting = next(index for index in mixtures if config.full_layers[index])
    x = torch.zeros(num_rows, config.hidden_size, dtype=torch.bfloat16)
    for place, index in enumerate((0, shared, selecting)):
        state = State(latents, keys if config.full_layers[index] else None, place == 0)
        delta = None if place == 0 else torch.zeros_like(x)
        cuda_glm_layer.forward(x, delta, weights.layer(index), state, step)
    triton_begin.begin(ids(num_rows), ids(num_rows), x.repeat(VOCAB_SIZE, 1), 0, half[0])
    triton_begin.norms(x, x, (x[0], x[0]), 1e-5)
    triton_moved.taken(torch.zeros(1, dtype=torch.int64), (x, ids(num_rows), half))
    logits = torch.zeros(num_rows, VOCAB_SIZE)
    triton_likeliest.Likeliest(CPU)(logits)
    sums, joins = (
        triton_peers.Exchange([1 << 40] * NUM_RANKS, 1, *sizes, CPU)
        for sizes in (
            (triton_peers.SUM_BYTES, triton_peers.MOST_SUMMED),
            (triton_peers.JOIN_BYTES, triton_peers.MOST_JOINED),
        )
    )
    sums.sum(x)
    joins.join(logits)


def _prompts() -> None:
    """What many rows need besides, of one sequence behind no others."""
    weights = RandomLayers(glm_config.parse({**FIELDS, "n_routed_experts": NUM_EXPERTS}), NUM_RANKS, CPU)
    c = weights.config
    mixture = weights.layer(c.moe_layers.index(True)).mlp
    assert isinstance(mixture, Mixture)
    assert isinstance(mixture.experts, Experts)
    for each in (4, 16, 32, 64, 128):  # members of an expert
        num_rows = each * NUM_EXPERTS // c.num_experts_per_token
        chosen = torch.zeros(num_rows, c.num_experts_per_token, dtype=torch.int32)
        x = torch.zeros(num_rows, c.hidden_size, dtype=torch.bfloat16)
        gate_up_plan, down_plan = triton_grouped.plans(chosen.numel(), NUM_EXPERTS)
        who = triton_members.members(chosen, NUM_EXPERTS, (gate_up_plan.size, down_plan.size))
        inner = triton_grouped.gate_up(x.half(), who, who.tiles[0], mixture.experts, gate_up_plan)
        parts = triton_grouped.down(inner, who.tiles[1], mixture.experts, down_plan)
        triton_mixture.add_up(parts, who.places, torch.zeros(chosen.shape), x)
    triton_ordered.ordered_sum(torch.zeros(NUM_RANKS, 4096, dtype=torch.bfloat16))
    num_rows = NUM_PAGES * PAGE_SIZE
    latents = torch.zeros(NUM_PAGES, PAGE_SIZE, c.latent_dim, dtype=torch.bfloat16)
    keys = torch.zeros(NUM_PAGES, PAGE_SIZE, c.index_head_dim, dtype=torch.bfloat16)
    positions, ids = torch.arange(num_rows, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int32)
    half = torch.zeros(num_rows, c.qk_rope_head_dim // 2)
    rows, selected = Rows(positions, ids, ids, ids[:NUM_PAGES], half, half), triton_index.empty(1, c.index_topk, CPU)
    q_index = torch.zeros(num_rows, c.index_num_heads, c.index_head_dim, dtype=torch.bfloat16)
    triton_scores.scores(q_index, torch.zeros(num_rows, c.index_num_heads), keys, rows, torch.zeros(num_rows, num_rows))
    attention, heads = weights.layer(0).attention, c.num_heads
    q = torch.zeros(num_rows, heads * c.qk_head_dim, dtype=torch.bfloat16)
    q_rope = torch.zeros(num_rows, heads, c.qk_rope_head_dim, dtype=torch.bfloat16)
    for top_k in (c.index_topk, num_rows):
        span = triton_prompt.spanned(Span(0, num_rows, num_rows, ids[:NUM_PAGES]), NUM_PAGES, heads, top_k)
        triton_prompt.mark(span, selected, PAGE_SIZE)
        seen = triton_prompt.context(latents, span, attention.up_key, attention.up_value)
        triton_prompt.attend(q, q_rope, seen, positions, span.bits, 1.0)
