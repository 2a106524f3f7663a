"""What both faces make of a client's request: one Job with one Choice for each output that it asks for."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from protos.forebay.v1 import decode_pb2, generation_pb2, router_pb2
from services.gateway.models import ServedModel
from services.gateway.options import Options
from services.gateway.parsers.formats import Parsing
from shared import page_hash
from shared.errors import ContextTooLong, InvalidRequest

_TEXT = Parsing()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and until when it matters."""

    request_id: str
    tenant: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what the client sent, if it sent text."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One output. `route` and `generate` are complete but for the placement."""

    index: int
    prompt: Prompt
    route: router_pb2.RouteRequest
    generate: decode_pb2.GenerateRequest
    page_size: int

    @property
    def tells(self) -> bool:
        """Whether log-probabilities of the prompt come with it."""
        return self.generate.sampling.HasField("num_prompt_logprobs")

    @property
    def is_empty(self) -> bool:
        """Whether no worker has anything to do for it."""
        return not (self.generate.sampling.max_tokens or self.tells)


@dataclass(frozen=True, slots=True)
class Job:
    """A whole request. Choice i answers prompt i // n, as OpenAI numbers them. `in_parts`: what an output says is
    wanted in the order in which it says it (`parts.py`)."""

    caller: Caller
    model: ServedModel
    options: Options
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    echo: bool = False
    chat: Parsing | None = None
    in_parts: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether the answer is a message."""
        return self.chat is not None

    @property
    def parsing(self) -> Parsing:
        """How outputs are read; those of completions are text."""
        return self.chat or _TEXT

    def call_id(self, choice: int, call: int) -> str:
        """The id of a tool call: the same on every face, and no other call's."""
        name = f"{self.choices[choice].generate.request_id}/{call}"
        return f"call_{blake2b(name.encode(), digest_size=12).hexdigest()}"


def make_job(
    caller: Caller,
    model: ServedModel,
    options: Options,
    prompts: Sequence[Prompt],
    max_choices: int,
    *,
    echo: bool = False,
    parsing: Parsing | None = None,
    default_max_tokens: int | None = None,
) -> Job:
    """Check prompts and options against the model and expand the choices.

    A chat has a `parsing`, a completion none. A request without max_tokens gets `default_max_tokens`, or what the
    context has room for. Raises InvalidRequest, ContextTooLong.
    """
    if len(prompts) * options.n > max_choices:
        raise InvalidRequest(f"{len(prompts)} prompts times n={options.n} exceed {max_choices} outputs", param="n")
    _check_vocabulary(options.sampling, model)
    param = "prompt" if parsing is None else "messages"
    for prompt in prompts:
        _check_prompt(prompt, options, model, param)
    # Clients may repeat a request id; workers must not see one twice.
    name = f"{caller.request_id}-{secrets.token_hex(4)}"
    seed = secrets.randbits(63) if options.seed is None else options.seed
    hash_key = page_hash.tenant_key(caller.tenant, options.cache_salt)
    expand = _Expansion(name, caller.tenant, model, options, hash_key, seed, default_max_tokens)
    choices = [
        expand.choice(number * options.n + i, i, prompt)
        for number, prompt in enumerate(prompts)
        for i in range(options.n)
    ]
    return Job(caller, model, options, tuple(prompts), tuple(choices), echo, parsing)


def derive_seed(seed: int, choice: int) -> int:
    """The seed of a request's i-th output: the first has the request's own, so that n changes nothing for it."""
    seed %= 1 << 64
    if choice == 0:
        return seed
    return int.from_bytes(blake2b(seed.to_bytes(8, "little") + choice.to_bytes(4, "little"), digest_size=8).digest())


@dataclass(frozen=True, slots=True)
class _Expansion:
    name: str
    tenant: str
    model: ServedModel
    options: Options
    hash_key: bytes
    seed: int
    default_max_tokens: int | None

    def choice(self, index: int, number: int, prompt: Prompt) -> Choice:
        request_id = f"{self.name}-{index}"
        room = self.model.card.max_model_len - len(prompt.token_ids)
        sampling = generation_pb2.SamplingParams()
        sampling.CopyFrom(self.options.sampling)
        sampling.seed = derive_seed(self.seed, number)
        sampling.max_tokens = self._max_tokens(room)
        if number:  # told with the first output of the prompt
            sampling.ClearField("num_prompt_logprobs")
        tells = sampling.HasField("num_prompt_logprobs")  # no page that is cached is of use then
        hashes = () if tells else page_hash.chain(self.hash_key, prompt.token_ids, self.model.card.page_size)
        route = router_pb2.RouteRequest(
            request_id=request_id,
            model=self.model.name,
            page_hashes=page_hash.join(hashes),
            num_prompt_tokens=len(prompt.token_ids),
            max_tokens=sampling.max_tokens,
            priority=self.options.priority,
            tenant=self.tenant,
        )
        generate = decode_pb2.GenerateRequest(
            request_id=request_id,
            model=self.model.name,
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            hash_key=self.hash_key,
            priority=self.options.priority,
        )
        return Choice(index, prompt, route, generate, self.model.card.page_size)

    def _max_tokens(self, room: int) -> int:
        if self.options.max_tokens is not None:
            return self.options.max_tokens
        return room if self.default_max_tokens is None else min(room, self.default_max_tokens)


def _check_vocabulary(sampling: generation_pb2.SamplingParams, model: ServedModel) -> None:
    size = model.card.vocab_size
    for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token_id in ids:
            if token_id >= size:
                raise InvalidRequest(f"'{param}' has token id {token_id}; the last one is {size - 1}", param=param)


def _check_prompt(prompt: Prompt, options: Options, model: ServedModel, param: str) -> None:
    ids, limit, size = prompt.token_ids, model.card.max_model_len, model.card.vocab_size
    if not ids:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param=param)
    if prompt.text is None and (max(ids) >= size or min(ids) < 0):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
        raise InvalidRequest(f"'{param}' has token id {wrong}; the vocabulary is 0 to {size - 1}", param=param)
    wanted = options.max_tokens if options.max_tokens is not None else max(1, options.sampling.min_tokens)
    if len(ids) + wanted > limit:
        raise ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, you requested {len(ids) + wanted} tokens "
            f"({len(ids)} in the prompt, {wanted} in the completion). Please reduce the length of either.",
            param=param,
        )
