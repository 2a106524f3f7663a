"""Computes steps with a model in torch. One thread calls `launch`; kernels run outside the GIL."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.engine.api import BatchItem, Chosen, Computed, EngineSpec, Recorded, SampledToken, Step, awaited
from shared.engine.batch import Batch, build, choosing
from shared.engine.kernels import cuda_choice
from shared.engine.kernels.cuda_choice import CudaChoice
from shared.engine.kv.layout import KvLayout, compatibility_hash
from shared.engine.kv.memory import HostMemory, PoolMemory
from shared.engine.kv.view import DeviceMemory, pool_bytes
from shared.engine.models import registry
from shared.engine.models.api import CPU, Model, Placement
from shared.engine.models.inventory import revision
from shared.engine.models.tokens import num_tokens
from shared.engine.parallel.group import Alone, Group
from shared.engine.parallel.partition import Shard
from shared.engine.pinned import Fetched, put, some
from shared.engine.sampling.batched import BatchedSampler, Choice
from shared.engine.sampling.batched_rejection import BatchedRejectionSampler
from shared.engine.sampling.prompt_logprobs import PromptLogprobs, apart, joined
from shared.engine.sampling.rejection import RejectionSampler
from shared.engine.sampling.sampler import Sampler
from shared.engine.speculation.late import DraftedStep, LateDrafter
from shared.engine.speculation.mtp import MtpDrafter
from shared.errors import Unsupported
from shared.models.store import default_cache

Tokens = tuple[SampledToken, ...]
# As measured (docs/LOG.md), in bfloat16: a step of one token takes 12 ms for SmolLM2 on two cores, 6 ms for an 8B on an
# H100; a token of a prompt 0.7 and 0.024 ms.
RIDGE_TOKENS = {"cpu": 16, "cuda": 256}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchExecutor:
    """Satisfies `shared.engine.api.Executor`; `layout` is that of its pages, a rank's share of the spec's. Ids from
    `num_tokens` on are never chosen.

    On a GPU it runs behind, and chooses tokens there; with `behind` it does so wherever it is. So are drafts verified,
    but in a step with an item that `needs_host`, which is computed to its end at once. With `rejection` the drafts of a
    layer that proposes them are verified by rejection sampling; without a layer that changes nothing. `choice` is the
    kernel that draws there, if there is one.
    """

    def __init__(
        self,
        model: Model,
        spec: EngineSpec,
        memory: PoolMemory,
        num_tokens: int | None = None,
        *,
        behind: bool = False,
        rejection: bool = False,
        choice: CudaChoice | None = None,
    ) -> None:
        self.spec = spec
        self.layout: KvLayout = model.rank_layout(spec.layout.page_size)
        self.memory: PoolMemory = memory
        self.model = model
        self._pool = pool_bytes(memory)
        drafts, known = model.draft_layer, num_tokens or spec.vocab_size
        self._num_tokens = known
        self._sampler = Sampler(known, spec.eos_token_ids)
        rejects = rejection and drafts is not None
        if behind or self._pool.is_cuda:
            self._sampler = (BatchedRejectionSampler if rejects else BatchedSampler)(known, spec.eos_token_ids, choice)
        elif rejects:
            self._sampler = RejectionSampler(known, spec.eos_token_ids)
        self._drafter = None if drafts is None else MtpDrafter(drafts, self._sampler, self.layout)
        self._late: LateDrafter | None = None
        if drafts is not None and isinstance(self._sampler, BatchedSampler):
            self._late = LateDrafter(drafts, self._sampler, self.layout)
        # What the last step leaves for the next one, which may be launched before the host hears of it.
        self._chosen = self._num_right = torch.empty(0, dtype=torch.int64, device=self._pool.device)

    @property
    def recorded(self) -> Recorded | None:
        """Which steps are recorded at their first use."""
        return self.model.recorded

    @property
    def proposes(self) -> bool:
        """Whether steps have drafts where they are wanted."""
        return self._drafter is not None

    @property
    def runs_behind(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return isinstance(self._sampler, BatchedSampler)

    def forward(self, batch: Sequence[BatchItem]) -> list[Chosen | None]:
        """Compute a step to its end; what is chosen for each item with `sample`."""
        return self.launch(batch).chosen()

    def launch(self, batch: Sequence[BatchItem]) -> Step:
        """Write the KV of every item's tokens into its pages, and choose a token for each item with `sample`."""
        try:
            return self._launch(batch)
        except Exception:
            Fetched(self._pool[:0]).wait()  # what was launched of it still writes to pages
            raise

    @torch.inference_mode()
    def _launch(self, batch: Sequence[BatchItem]) -> Step:
        if torch.get_num_threads() != self.model.num_torch_threads:
            torch.set_num_threads(self.model.num_torch_threads)  # OpenMP keeps it per calling thread
        if self._pool.is_cuda:
            torch.cuda.set_device(self._pool.device)  # and so does CUDA, for whatever does not ask where tensors are
        step, sampled = build(batch, self.layout.page_size), [item for item in batch if item.sample]
        if self._late is not None and not any(item.needs_host for item in sampled):
            return self._drafted(self._late, batch, step)
        if self._drafter is not None:
            logits, states = self._drafter.layer.forward(step, self._pool, self.layout)
            logits, told = apart(logits, batch, self._num_tokens)
            tokens = _spread(self._sampler(logits, sampled), batch)
            chosen = self._drafter(batch, tokens, states, self._pool)
            Fetched(logits[:0]).wait()  # the layer may have written behind what it chose last
            return Computed(joined(chosen, batch, told))
        logits = self.model.forward(step.resolved(self._chosen), self._pool, self.layout)
        logits, told = apart(logits, batch, self._num_tokens)
        if not isinstance(self._sampler, BatchedSampler):
            return Computed(joined(_choices(self._sampler(logits, sampled), batch), batch, told))
        choice = self._sampler.launch(logits, sampled, self._chosen).send()
        self._chosen = choice.tokens
        return TorchStep(list(batch), choice, told)

    def _drafted(self, drafter: LateDrafter, batch: Sequence[BatchItem], step: Batch) -> Step:
        """Launch a step whose drafts are verified and proposed where it is computed."""
        asked, moved = [item for item in batch if item.sample], self._moved(batch)
        step = step.resolved(self._chosen)
        if moved is not None:
            step = step.moved_on(moved, [item.num_in_doubt for item in batch])
            moved = some(moved, [place for place, item in enumerate(batch) if item.sample])
        logits, states = drafter.layer.forward(step, self._pool, self.layout)
        logits, told = apart(logits, batch, self._num_tokens)
        choice, step = drafter.sampler.launch(logits, asked, self._chosen, moved), choosing(step, batch)
        self._num_right, self._chosen = drafter(batch, step, choice.tokens, moved, states, self._pool)
        return DraftedStep(list(batch), choice.send(self._num_right, self._chosen), told)

    def _moved(self, batch: Sequence[BatchItem]) -> torch.Tensor | None:
        """How many drafts were right in the step before, int64 [S], of the sequences for which that is in doubt."""
        in_doubt = [item.num_in_doubt > 0 for item in batch]
        if not any(in_doubt):
            return None
        places = [awaited(item.token_ids[0]) if doubt else 0 for item, doubt in zip(batch, in_doubt, strict=True)]
        moved = some(self._num_right, places)
        return moved if all(in_doubt) else moved * put(in_doubt, torch.int64, moved.device)


@dataclass(frozen=True, slots=True)
class TorchStep:
    """A step on its way; satisfies `Step`."""

    batch: list[BatchItem]
    choice: Choice
    told: PromptLogprobs | None = None

    def is_done(self) -> bool:
        """Whether `chosen` returns at once."""
        return self.choice.is_done()

    def chosen(self) -> list[Chosen | None]:
        """Wait for the tokens, which are chosen when all pages are written, even if none is."""
        return joined(_choices(self.choice.collect(), self.batch), self.batch, self.told)


def _spread(chosen: Iterable[Tokens], batch: Iterable[BatchItem]) -> list[Tokens | None]:
    """What the items with `sample` chose, each in its place."""
    each = iter(chosen)
    return [next(each) if item.sample else None for item in batch]


def _choices(chosen: Iterable[Tokens], batch: Iterable[BatchItem]) -> list[Chosen | None]:
    return [None if tokens is None else Chosen(tokens) for tokens in _spread(chosen, batch)]


def load_executor(  # noqa: PLR0913 - a worker's configuration arrives here, each field by its name
    model_dir: Path,
    *,
    model_name: str,
    dtype: str,
    page_size: int,
    device: str = "cpu",
    num_threads: int,
    num_pages: int = 0,
    pool_bytes: int = 0,
    max_model_len: int | None = None,
    kernels: str = "auto",
    attention: str = "auto",
    dequantized_bytes: int = 0,
    cache_dir: Path | None = None,
    shard: Shard | None = None,
    group: Group | None = None,
    kv_dtype: str = "auto",
    mtp: bool = False,
    rejection: bool = False,
) -> TorchExecutor:
    """The executor of a model directory, with a pool of `num_pages` pages, or of at most `pool_bytes` bytes.

    `dtype` is "bfloat16" or "float32"; `device` "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one (for each
    rank: they take consecutive ones); `max_model_len` at most, and by default, what the model was made for.
    `kernels` is "auto" or one of "cuda", "native", "torch", "w4a4"; compiled ones are kept in `cache_dir`
    (`$FOREBAY_CACHE`). `attention` is "auto", "fa2" or "fa3": FlashInfer's kernels for prompts on a GPU. NVFP4 weights
    of dense models there have copies in bfloat16, for prompts, as far as `dequantized_bytes` go. Of several
    ranks this is the one at `shard`, `group` is its view of them, and the pool its own. `kv_dtype` is "auto" for
    `dtype`, or one of `kv.formats.KV_DTYPES`. With `mtp` the model's own layer proposes drafts, if it has one, and with
    `rejection` they are verified by rejection sampling. Raises Unsupported for a model or dtype that cannot be served,
    and for a pool that holds no page.
    """
    if dtype not in DTYPES:
        raise Unsupported(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    shard, group, cache_dir = shard or Shard(), group or Alone(), cache_dir or default_cache()
    where = _device(device, shard)
    placement = Placement(
        DTYPES[dtype], num_threads, kernels, cache_dir, shard, group, kv_dtype, where, mtp, attention, dequantized_bytes
    )
    model = registry.load(model_dir, placement)
    layout, page_bytes = model.layout(page_size), model.rank_layout(page_size).page_bytes
    num_pages = num_pages or pool_bytes // page_bytes
    if num_pages < 1:
        raise Unsupported(f"a pool of {pool_bytes} bytes holds no page of {page_bytes} bytes")
    spec = EngineSpec(
        model=model_name,
        vocab_size=model.vocab_size,
        max_model_len=min(max_model_len or model.max_position, model.max_position),
        eos_token_ids=model.eos_token_ids,
        layout=layout,
        num_pages=num_pages,
        compatibility_hash=compatibility_hash(model_name, revision(model_dir), model.arithmetic, layout),
        ridge_tokens=RIDGE_TOKENS[where.type],
    )
    memory = HostMemory(num_pages, page_bytes) if where == CPU else DeviceMemory(num_pages, page_bytes, where)
    known = num_tokens(model_dir, model.vocab_size)
    choice = None if where == CPU else cuda_choice.find(where, cache_dir / "kernels", known)
    return TorchExecutor(model, spec, memory, known, rejection=rejection, choice=choice)


def _device(name: str, shard: Shard) -> torch.device:
    """A rank's: the GPU that was named is the first one's. A GPU becomes the current one of this thread. Raises
    Unsupported for one that is not there."""
    found = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and found < shard.num_ranks):
        return CPU
    first = int(name.partition(":")[2] or 0)
    if first + shard.num_ranks > found:
        wanted = f"GPUs {first} to {first + shard.num_ranks - 1}" if shard.num_ranks > 1 else f"GPU {first}"
        raise Unsupported(f"{wanted} cannot be had here: torch sees {found}")
    torch.cuda.set_device(first + shard.rank)
    return torch.device("cuda", first + shard.rank)
