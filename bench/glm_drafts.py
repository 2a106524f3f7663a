"""What drafts of a rank's MTP layer take: to follow the model over the tokens that a step left, and to go on alone.

Beside the time on the GPU, by events around the graphs of `k` drafts in a row with the choice of each between them,
stands that of the drafter as the executor calls it, with the host's work and the wait for the last draft, as it is
where nothing runs before. Followed are all tokens that were verified, right or wrong. The floor is what must be read,
as in `bench.glm_rank`.
"""

import statistics
import time
from collections.abc import Callable

import torch

from bench.glm_random import KV_TOKENS, PAGE_SIZE, Counted, Rank
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels.experts import Experts
from shared.engine.layers import cuda_glm_weights
from shared.engine.layers.cuda_glm_weights import Mixture
from shared.engine.models.glm_config import GlmConfig
from shared.engine.sampling.batched import BatchedSampler, Choice
from shared.engine.speculation.late import LateDrafter

MOST = 5
CONTEXT = 8192
DRAFTED = 1000  # token ids
ALL_REDUCES = 3  # of a draft: the embedding, attention, the mixture


def floor_ms(made: Rank[Counted], config: GlmConfig, num_drafts: int, rate: float) -> float:
    """One row's experts for each draft, and more rows' for the tokens that are followed are left out."""
    a, mlp, drafts = made.drafting_layer.attention, made.drafting_layer.mlp, made.drafts
    own = made.decoder.config
    kept = cuda_glm_weights.sharing(a, own)
    fixed = sum(x.nbytes for x in (a.up_key, a.up_value, a.output, drafts.head, drafts.join))
    assert isinstance(mlp, Mixture)
    assert isinstance(mlp.experts, Experts)
    fixed += sum(x.nbytes for x in (mlp.router, mlp.shared.gate_up, mlp.shared.down))
    chosen = (mlp.experts.gate_up.nbytes + mlp.experts.down.nbytes) * config.num_experts_per_token
    fixed += chosen // config.num_experts
    fixed += config.index_topk * config.latent_dim * 2
    first = a.down.nbytes + a.query.nbytes + CONTEXT * config.index_head_dim * 2
    further = kept.down.nbytes + kept.query.nbytes
    return float(num_drafts * fixed + first + (num_drafts - 1) * further) / rate * 1e3


def measure(made: Rank[Counted], config: GlmConfig, rate: float) -> dict[int, float]:
    """Print a table; median milliseconds on the GPU by number of drafts: steps are launched ahead of the host."""
    print("\n| drafts | ms on the GPU | floor ms | ms with the host |\n|---|---|---|---|")
    found = {}
    for num_drafts in range(1, MOST + 1):
        call = _drafting(made, num_drafts)
        call()
        walls = [_wall(call) for _ in range(20)]
        on_gpu = statistics.median(_on_gpu(call) for _ in range(20))
        found[num_drafts] = on_gpu
        floor = floor_ms(made, config, num_drafts, rate)
        print(f"| {num_drafts} | {on_gpu:.3f} | {floor:.3f} | {statistics.median(walls):.3f} |", flush=True)
    return found


def _drafting(made: Rank[Counted], num_drafts: int) -> Callable[[], object]:
    """Behind a verification of as many drafts, all of which were right."""
    num_pages = KV_TOKENS // PAGE_SIZE
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))[: CONTEXT // PAGE_SIZE + 1].tolist()
    token_ids = [DRAFTED + place for place in range(num_drafts + 1)]
    item = BatchItem(
        "r", token_ids, CONTEXT - len(token_ids), pages, True, SamplingParams(), 0, (), num_drafts, num_drafts
    )
    device = made.decoder.device
    sampler = BatchedSampler(len(made.decoder.ends.head), ())
    drafter = LateDrafter(made.drafts, sampler, made.layout)
    states = torch.randn(len(token_ids), made.decoder.config.hidden_size, device=device).bfloat16()
    tokens = torch.tensor([*token_ids[1:], DRAFTED], device=device)

    def draft() -> object:
        found = drafter([item], build([item], PAGE_SIZE), tokens, None, states, made.memory.bytes)
        return Choice([item], tokens, None).send(*found).hear()

    return draft


def _wall(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def _on_gpu(call: Callable[[], object]) -> float:
    """Behind enough other work that the host is ahead."""
    busy = torch.empty(1 << 26, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(48):
        busy.fill_(1.0)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
