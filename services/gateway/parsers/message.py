"""From pieces of output to a message: reasoning, content and tool calls.

A fold: the message depends on the pieces alone, not on when they came. The grammar is that of the models' templates,

    [<think>] REASONING </think> CONTENT (<tool_call> CALL </tool_call> CONTENT)*

and what does not follow it is content, as it is. White space around reasoning and calls is none of the message: the
templates put it there themselves.
"""

from collections.abc import Callable
from enum import Enum, auto

from services.gateway.parsers.api import CallParser, CallPart, Parsed, Piece, Tag

NewCall = Callable[[], CallParser]


class _In(Enum):
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class MessageParser:
    """Reads one output. `has_thoughts`: <think> and </think> are tags; `thinks`: the prompt has opened <think>.

    `new_call` begins to read a tool call; None leaves calls as content. With `single_call` nothing after the first call
    counts.
    """

    def __init__(
        self, *, has_thoughts: bool, thinks: bool = False, new_call: NewCall | None = None, single_call: bool = False
    ) -> None:
        self._has_thoughts, self._new_call, self._single_call = has_thoughts, new_call, single_call
        self._in = _In.REASONING if has_thoughts and thinks else _In.CONTENT
        self._holds_space = has_thoughts or new_call is not None
        self._after_tag = self._in is _In.REASONING  # white space that follows is dropped
        self._space = ""  # held back: dropped if a tag follows
        self._has_content = False
        self._call: CallParser | None = None
        self._raw: list[str] = []  # the call until its name is certain, for when it turns out to be none
        self._announced = False
        self._num_calls, self._num_incomplete = 0, 0
        self._new = Parsed()

    @property
    def thinks(self) -> bool:
        """Whether the output is within its reasoning."""
        return self._in is _In.REASONING

    @property
    def speaks(self) -> bool:
        """Whether the output is within its content."""
        return self._in is _In.CONTENT

    @property
    def ended(self) -> bool:
        """Whether the message is complete, whatever the model says now."""
        return self._single_call and self._num_calls > 0 and self._call is None

    @property
    def calls_tools(self) -> bool:
        """Whether there are calls, all of them whole."""
        return self._num_calls > 0 and not self._num_incomplete and self._call is None

    def take(self) -> Parsed:
        """What is new since the last time."""
        new, self._new = self._new, Parsed()
        return new

    def feed(self, piece: Piece) -> None:
        """Take the next piece."""
        if self.ended:
            return
        if self._call is not None:
            self._feed_call(self._call, piece)
        elif isinstance(piece, Tag):
            self._tag(piece)
        else:
            self._text(piece)

    def finish(self, *, by_model: bool) -> None:
        """The end of the output. `by_model`: the model ended it, rather than a limit or a stop string."""
        if self._call is not None:
            self._end_call(self._call, self._call.cut() if by_model else "")
        elif not self._after_tag and self._in is _In.CONTENT:
            self._say(self._space)
        self._space = ""

    def _tag(self, tag: Tag) -> None:
        begins = tag.certain or not (self._has_content or self._space.strip())
        match tag.text, self._in:
            case "<think>", _In.CONTENT if self._has_thoughts and begins:
                self._enter(_In.REASONING)
            case "<think>", _In.REASONING if self._after_tag:
                pass  # the prompt has opened it, and so does the model
            case "</think>", _In.REASONING:
                self._enter(_In.CONTENT)
            case "<tool_call>", _ if self._new_call and (tag.certain or self._in is _In.CONTENT):
                self._enter(_In.CALL)
                self._call, self._raw, self._announced = self._new_call(), [tag.text], False
            case _:
                self._text(tag.text)

    def _enter(self, state: _In) -> None:
        self._in, self._after_tag, self._space = state, True, ""

    def _text(self, text: str) -> None:
        if not self._holds_space:
            self._say(text)
            return
        if self._after_tag:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._say(self._space + body)
            self._space, self._after_tag = text[len(body) :], False
        else:
            self._space += text

    def _say(self, text: str) -> None:
        if self._in is _In.REASONING:
            self._new.reasoning += text
        else:
            self._new.content += text
            self._has_content = self._has_content or bool(text)

    def _feed_call(self, call: CallParser, piece: Piece) -> None:
        if not self._announced:
            self._raw.append(piece.text if isinstance(piece, Tag) else piece)
        if isinstance(piece, Tag) and call.ends_at(piece):
            self._end_call(call, call.close())
        else:
            self._pass_on(call, call.feed(piece))

    def _end_call(self, call: CallParser, arguments: str) -> None:
        self._pass_on(call, arguments)
        self._call = None
        self._enter(_In.CONTENT)
        if call.name is None:
            self._after_tag = False
            self._say("".join(self._raw))
        else:
            self._num_calls += 1
            self._num_incomplete += not call.complete

    def _pass_on(self, call: CallParser, arguments: str) -> None:
        parts = self._new.calls
        if call.name is not None and not self._announced:
            self._announced = True
            parts.append(CallPart(self._num_calls, call.name))
        elif arguments and (not parts or parts[-1].index != self._num_calls):
            parts.append(CallPart(self._num_calls))
        if arguments:
            parts[-1].arguments += arguments
