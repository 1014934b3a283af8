"""A request's output text as it grows, cut at stop texts."""

from collections.abc import Sequence

from expertmesh.engine.tokenizer import TextStream


class OutputText:
    """Pushes tokens, tells the text so far. What may be the beginning of a stop text is held back until it is not."""

    def __init__(self, stream: TextStream | None, stop: Sequence[str]) -> None:
        self._stream, self._stop = stream, tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; sets `stopped` where a stop text is complete."""
        return self._take(self._stream.push(token)) if self._stream else ""

    def finish(self) -> str:
        """The rest, when no more tokens will come."""
        if self.stopped or self._stream is None:
            return ""
        piece = self._take(self._stream.flush())
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _take(self, new: str) -> str:
        held = self._held + new
        cuts = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if cuts:
            # The one that is complete first: which it is does not depend on how the text is split into tokens.
            self.stopped = True
            held, self._held = held[: min(cuts)[1]], ""
        else:
            keep = max((_overlap(held, stop) for stop in self._stop), default=0)
            held, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += held
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
