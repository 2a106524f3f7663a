"""Response bodies of chats and completions: whole, and as the chunks of a stream."""

import time
from typing import Any

import orjson

from protos.forebay.v1 import generation_pb2
from services.gateway import logprobs
from services.gateway.logprobs import TokenNames
from services.gateway.output import Delta
from services.gateway.parsers.api import CallPart
from services.gateway.request import Job
from services.gateway.rest_errors import body_of
from services.gateway.totals import Progress, Total
from services.gateway.usage import num_cached
from shared.errors import Fault

DONE = b"data: [DONE]\n\n"
# Log-probabilities of so many tokens are written within some 10 ms; for more, other requests would wait too long.
NUM_TOLD_INLINE = 4096
# Stands for a text.
_TEXT = "\0text\0"


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class Bodies:
    """Writes the answers to one job, and counts what they used."""

    def __init__(self, job: Job) -> None:
        self._job, self._options = job, job.options
        self._num_told = (1 + job.options.sampling.num_prompt_logprobs) * job.options.n
        """What is written of each token of a prompt that is told of."""
        self._wants_logprobs = job.options.sampling.HasField("num_logprobs")
        self._wants_text_alone = not (
            self._wants_logprobs or job.options.return_token_ids or job.options.continuous_usage
        )
        self._names = TokenNames(job.model.text.tokenizer, job.options.tokens_as_ids)
        self.progress = [Progress() for _ in job.choices]
        self._totals = [Total() for _ in job.choices]
        prefix = "chatcmpl" if job.is_chat else "cmpl"
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{job.caller.request_id}",
            "object": "chat.completion" if job.is_chat else "text_completion",
            "created": int(time.time()),
            "model": job.model.name,
            "system_fingerprint": job.model.fingerprint,
        }

    @property
    def is_long(self) -> bool:
        """Whether so much is told of prompts that `whole` takes a while."""
        return sum(len(progress.prompt_logprobs) for progress in self.progress) * self._num_told > NUM_TOLD_INLINE

    def note(self, delta: Delta) -> None:
        """Count a delta."""
        progress = self.progress[delta.index]
        progress.num_tokens, progress.num_reasoning = delta.num_output_tokens, delta.num_reasoning_tokens
        progress.usage = delta.usage or progress.usage
        progress.prompt_logprobs += delta.prompt_logprobs

    def keep(self, delta: Delta) -> None:
        """Remember a delta for `whole`."""
        self._totals[delta.index].add(delta)

    def usage(self) -> dict[str, Any]:
        """Token counts of the whole job. Prompts count once, however many outputs they have."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self._job.prompts)
        num_output = sum(progress.num_tokens for progress in self.progress)
        cached = sum(num_cached(progress.usage) for progress in self.progress[:: self._options.n])
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if self._job.parsing.has_thoughts:
            num_reasoning = sum(progress.num_reasoning for progress in self.progress)
            usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        return usage

    def whole(self) -> bytes:
        """The body of a request without streaming."""
        choice = self._chat_choice if self._job.is_chat else self._text_choice
        choices = [choice(i, total) for i, total in enumerate(self._totals)]
        body = self._head | {"choices": choices, "usage": self.usage()}
        if self._job.is_chat and self._options.return_token_ids:
            body["prompt_token_ids"] = self._job.prompts[0].token_ids
        if self._job.is_chat:
            body |= self._prompt_logprobs(0)
        return orjson.dumps(body)

    def chunk(self, delta: Delta) -> bytes:
        """The events for one delta."""
        progress = self.progress[delta.index]
        if progress.begun and self._wants_text_alone and delta.is_text_alone:
            return self._text_event(progress, delta)
        first, progress.begun = not progress.begun, True
        choice = self._chat_delta(delta) if self._job.is_chat else self._text_delta(delta, first)
        events = b""
        if self._job.is_chat and first:
            role = {"index": delta.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            prompt = {"prompt_token_ids": self._job.prompts[0].token_ids} if self._options.return_token_ids else {}
            events = self._chunk(role | {"finish_reason": None}, prompt)
        progress.num_chars += len(delta.text) + (len(self._echo(delta.index)) if first else 0)
        return events + self._chunk(choice, {})

    def _text_event(self, progress: Progress, delta: Delta) -> bytes:
        """The event of most tokens, which differs from the one before in its text alone: the rest is written once."""
        if progress.around_text is None:
            other = Delta(delta.index, text=_TEXT)
            choice = self._chat_delta(other) if self._job.is_chat else self._text_delta(other, first=False)
            before, _, after = self._chunk(choice, {}).partition(orjson.dumps(_TEXT))
            progress.around_text = before, after
        before, after = progress.around_text
        return before + orjson.dumps(delta.text) + after

    def last(self) -> bytes:
        """The end of a stream: if they are wanted an event with the counts, which has no choices, before it."""
        if not self._options.include_usage:
            return DONE
        return event(self._chunk_head() | {"choices": [], "usage": self.usage()}) + DONE

    def broken(self, fault: Fault) -> bytes:
        """The end of a stream amid which a fault came."""
        return event(body_of(fault)) + DONE

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk"} if self._job.is_chat else self._head

    def _chunk(self, choice: dict[str, Any], extra: dict[str, Any]) -> bytes:
        body = self._chunk_head() | {"choices": [choice]} | extra
        if self._options.include_usage:
            body["usage"] = self.usage() if self._options.continuous_usage else None
        return event(body)

    def _chat_choice(self, index: int, total: Total) -> dict[str, Any]:
        found = logprobs.for_chat(self._names, total.token_ids, total.logprobs) if self._wants_logprobs else None
        content = None if total.calls and not total.text else total.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if total.reasoning:
            message["reasoning_content"] = total.reasoning
        if total.calls:
            message["tool_calls"] = [self._call(index, part, in_stream=False) for part in total.calls]
        choice = {"index": index, "message": message, "logprobs": found, **_end(total.end)}
        return choice | ({"token_ids": total.token_ids} if self._options.return_token_ids else {})

    def _chat_delta(self, delta: Delta) -> dict[str, Any]:
        found = logprobs.for_chat(self._names, delta.token_ids, delta.logprobs) if self._wants_logprobs else None
        new: dict[str, Any] = {}
        if delta.reasoning:
            new["reasoning_content"] = delta.reasoning
        if delta.text:
            new["content"] = delta.text
        if delta.calls:
            new["tool_calls"] = [self._call(delta.index, part, in_stream=True) for part in delta.calls]
        if not new and not delta.finish_reason:
            new["content"] = ""
        choice = {"index": delta.index, "delta": new, "logprobs": found, **_end(delta)}
        return choice | ({"token_ids": delta.token_ids} if self._options.return_token_ids else {})

    def _call(self, index: int, part: CallPart, *, in_stream: bool) -> dict[str, Any]:
        """A tool call, or what is new of it: the first part has id and name."""
        numbered = {"index": part.index} if in_stream else {}
        if part.name is None:
            return numbered | {"function": {"arguments": part.arguments}}
        function = {"name": part.name, "arguments": part.arguments}
        return numbered | {"id": self._job.call_id(index, part.index), "type": "function", "function": function}

    def _text_choice(self, index: int, total: Total) -> dict[str, Any]:
        echo = self._echo(index)
        found = self._text_logprobs(index, total, len(echo), with_prompt=True)
        choice = {"index": index, "text": echo + total.text, "logprobs": found, **_end(total.end)}
        return choice | self._token_ids(index, total.token_ids, with_prompt=True) | self._prompt_logprobs(index)

    def _text_delta(self, delta: Delta, first: bool) -> dict[str, Any]:
        echo = self._echo(delta.index) if first else ""
        begin = len(echo) if first else self.progress[delta.index].num_chars
        found = self._text_logprobs(delta.index, delta, begin, with_prompt=first)
        choice = {"index": delta.index, "text": echo + delta.text, "logprobs": found, **_end(delta)}
        return choice | self._token_ids(delta.index, delta.token_ids, with_prompt=first)

    def _text_logprobs(self, index: int, new: Total | Delta, begin: int, *, with_prompt: bool) -> dict[str, Any] | None:
        """Of tokens that begin so many characters into a choice's text, behind those of a prompt that is echoed."""
        if not self._wants_logprobs:
            return None
        names, num_top = self._names, self._options.sampling.num_logprobs
        own = logprobs.for_completion(names, new.token_ids, new.logprobs, begin, num_top)
        if not (self._job.echo and with_prompt):
            return own
        prompt = self._job.choices[index].prompt.token_ids
        before = logprobs.echoed(names, prompt, self._told(index), self._echo(index), num_top)
        return {name: before[name] + values for name, values in own.items()}

    def _prompt_logprobs(self, index: int) -> dict[str, Any]:
        """What is told of a prompt besides what is echoed."""
        num_top, prompt = self._options.num_prompt_logprobs, self._job.choices[index].prompt.token_ids
        if num_top is None:
            return {}
        return {"prompt_logprobs": logprobs.of_prompt(self._names, prompt, self._told(index), num_top)}

    def _told(self, index: int) -> list[generation_pb2.TokenLogprobs]:
        """Of the prompt of a choice: it came with the prompt's first one."""
        return self.progress[index - index % self._options.n].prompt_logprobs

    def _token_ids(self, index: int, token_ids: list[int], *, with_prompt: bool) -> dict[str, Any]:
        if not self._options.return_token_ids:
            return {}
        prompt = {"prompt_token_ids": self._job.choices[index].prompt.token_ids} if with_prompt else {}
        return {"token_ids": token_ids, **prompt}

    def _echo(self, index: int) -> str:
        if not self._job.echo:
            return ""
        prompt, tokenizer = self._job.choices[index].prompt, self._job.model.text.tokenizer
        if prompt.text is not None:
            return prompt.text
        return tokenizer.decode(prompt.token_ids) if tokenizer else ""


def _end(delta: Delta | None) -> dict[str, Any]:
    if delta is None:
        return {"finish_reason": None}
    end: dict[str, Any] = {"finish_reason": delta.finish_reason}
    return end | {"stop_reason": delta.stop_reason} if delta.finish_reason else end
