"""Generated text to blocks: reasoning, content, calls of tools; piece by piece, however the text is cut."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from expertmesh.engine.markup import END_THINK, THINK, ToolMarkup

Kind: TypeAlias = Literal["reasoning", "content", "call"]


@dataclass(frozen=True)
class Begin:
    """A block begins. name: of the function that is called. id: of the call, where the model writes one."""

    kind: Kind
    name: str = ""
    id: str = ""


@dataclass(frozen=True)
class Piece:
    """More of the block that has begun: text, or a call's arguments as JSON text."""

    text: str


@dataclass(frozen=True)
class End:
    """The block is complete."""


Event: TypeAlias = Begin | Piece | End


class Parser:
    """Reads text as it is generated. thinking: None where the model knows no reasoning, else whether the prompt has
    begun it. tools: None where there are none to call; their marks are content then.

    Line breaks around marks belong to the marks. A call whose head cannot be read becomes content, marks included. One
    that has begun stays a call with what there is of its arguments, since they may have been told already.
    """

    def __init__(self, thinking: bool | None, tools: ToolMarkup | None) -> None:
        self._tools, self._buffer = tools, ""
        self._events: list[Event] = []
        self._open: Kind | None = None
        self._raw = ""  # marks of what may turn out to be no call
        self._after_mark = bool(thinking)
        self._state = self._content if thinking is None else self._reasoning if thinking else self._start
        self._begins = (tools.section[0], tools.call[0]) if tools else ()

    def push(self, text: str) -> list[Event]:
        """What this text makes certain."""
        self._buffer += text
        return self._read(final=False)

    def finish(self) -> list[Event]:
        """The rest, when no more text will come."""
        events = self._read(final=True)
        self._close()
        return events

    def _read(self, final: bool) -> list[Event]:
        self._events = []
        while (self._buffer or (final and self._raw)) and self._state(final):
            pass
        return self._events

    # States: each takes what it can from the buffer; False where that is all for now

    def _start(self, final: bool) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer, self._state, self._after_mark = text[len(THINK) :], self._reasoning, True
        elif THINK.startswith(text) and not final:
            return False
        else:
            self._state = self._content
        return True

    def _reasoning(self, final: bool) -> bool:
        mark = self._until("reasoning", (END_THINK, *self._begins), final)
        if mark != END_THINK:
            return self._enter(mark)
        self._close()
        self._buffer, self._state = self._buffer[len(mark) :], self._content
        return True

    def _content(self, final: bool) -> bool:
        return self._enter(self._until("content", self._begins, final))

    def _enter(self, mark: str | None) -> bool:
        if mark is None or self._tools is None:
            return False
        if mark == self._tools.section[0]:
            self._buffer, self._raw = self._buffer[len(mark) :], mark
        self._state = self._section
        return True

    def _section(self, final: bool) -> bool:
        """Between calls."""
        assert self._tools
        text = self._buffer.lstrip()
        begin, end = self._tools.call[0], self._tools.section[1]
        if text.startswith(begin):
            self._raw += self._buffer[: len(self._buffer) - len(text)] + begin
            self._buffer, self._state = text[len(begin) :], self._head
        elif text.startswith(end) and not self._raw:
            self._buffer, self._state, self._after_mark = text[len(end) :], self._content, True
        elif not final and any(mark.startswith(text) and mark != text for mark in (begin, end)):
            return False
        else:
            self._no_call()
        return True

    def _head(self, final: bool) -> bool:
        """From the mark of a call to the first brace of its arguments."""
        assert self._tools
        at, mark = _first(self._buffer, ("{", *self._tools.marks))
        if mark is None and not final:
            return False
        found = self._tools.heads.fullmatch(self._buffer[:at]) if mark else None
        if found is None:
            self._no_call()
            return True
        named = found.groupdict()
        self._begin(Begin("call", named["name"] or named.get("bare") or "", named.get("id") or ""))
        self._buffer, self._raw, self._state = self._buffer[at:], "", self._arguments
        if mark != "{":
            self._events.append(Piece("{}"))
        return True

    def _arguments(self, final: bool) -> bool:
        assert self._tools
        at, mark = _first(self._buffer, self._tools.marks)
        if mark is None and not final:
            told = _without_tail(self._buffer[: at - _overlap(self._buffer, self._tools.marks)], growing=True)
            self._say("call", told)
            self._buffer = self._buffer[len(told) :]
            return False
        self._say("call", _without_tail(self._buffer[:at]))
        self._close()
        self._buffer, self._state = self._buffer[at:].removeprefix(self._tools.call[1]), self._section
        return True

    def _no_call(self) -> None:
        """What looked like the beginning of calls is content, or what follows them is."""
        self._say("content", self._raw)
        self._raw, self._state, self._after_mark = "", self._content, not self._raw

    def _until(self, kind: Kind, marks: tuple[str, ...], final: bool) -> str | None:
        """Tell the text before the first of these marks, or what cannot be a part of one. The mark that comes now."""
        if self._after_mark:
            self._buffer = self._buffer.lstrip("\n")
            self._after_mark = not self._buffer
        at, mark = _first(self._buffer, marks)
        if mark is None and not final:
            at -= _overlap(self._buffer, marks)
        text = self._buffer[:at]
        if marks and (mark or not final):
            text = text.rstrip("\n")
        self._say(kind, text)
        self._buffer = self._buffer[at if mark else len(text) :]
        self._after_mark = self._after_mark or mark is not None
        return mark

    def _say(self, kind: Kind, text: str) -> None:
        if text:
            if self._open != kind:
                self._begin(Begin(kind))
            self._events.append(Piece(text))

    def _begin(self, block: Begin) -> None:
        self._close()
        self._open = block.kind
        self._events.append(block)

    def _close(self) -> None:
        if self._open:
            self._events.append(End())
            self._open = None


def _first(text: str, marks: tuple[str, ...]) -> tuple[int, str | None]:
    """Where the first of these marks is, and which; the text's length and None where none is."""
    return min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=(len(text), None))


def _overlap(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of text that is a beginning of a mark."""
    longest = max((len(mark) - 1 for mark in marks), default=0)
    ends = (text[len(text) - n :] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(mark.startswith(end) for mark in marks)), 0)


def _without_tail(text: str, growing: bool = False) -> str:
    """Arguments without the space and the fence after them; growing: without what may become that."""
    body = text.rstrip()
    ticks = min(3, len(body) - len(body.rstrip("`")))
    return body[: len(body) - ticks].rstrip() if growing or ticks == 3 else body
