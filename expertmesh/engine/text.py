"""Tokens to texts, cut at stop texts: the engine knows tokens only. No torch: who serves its tokens from another
process has this beside him."""

from collections.abc import Sequence

from expertmesh.engine.tokenizer import TextStream, Tokenizer
from expertmesh.request import FinishReason, Output, Request


class OutputText:
    """Pushes tokens, tells the text so far. What may be the beginning of a stop text is held back until it is not."""

    def __init__(self, stream: TextStream | None, stop: Sequence[str]) -> None:
        self._stream, self._stop = stream, tuple(stop)
        self._held = ""
        self.text = ""
        self.stop_text: str | None = None  # the one that is complete

    @property
    def stopped(self) -> bool:
        return self.stop_text is not None

    def take(self, tokens: Sequence[int], reason: FinishReason | None) -> tuple[int, FinishReason | None]:
        """Push new tokens; reason: why the request ends behind them, if it does. Returns how many of them are part of
        the output, which a stop text ends, and why it ends now, if it does."""
        for count, token in enumerate(tokens, 1):
            if reason == "stop" and count == len(tokens):
                break  # this token has ended it and is no text
            self.push(token)
            if self.stopped:
                return count, "stop"
        if reason is not None:
            self.finish()
        return len(tokens), "stop" if self.stopped else reason

    def push(self, token: int) -> str:
        """The text that this token makes certain; sets `stop_text` where one is complete."""
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
        cuts = [(at + len(stop), at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if cuts:
            # The one that is complete first: which it is does not depend on how the text is split into tokens.
            _, at, self.stop_text = min(cuts)
            held, self._held = held[:at], ""
        else:
            keep = max((_overlap(held, stop) for stop in self._stop), default=0)
            held, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += held
        return held


class Outputs:
    """All that has come of requests, in texts, from what the engine has of them in tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[str, OutputText] = {}
        self._prompts: dict[str, str | None] = {}

    def expect(self, request: Request, prompt: str | None) -> None:
        """prompt: the text that the request's prompt was, if it was one."""
        stream = self._tokenizer.stream() if self._tokenizer else None
        self._texts[request.id] = OutputText(stream, request.params.stop)
        self._prompts[request.id] = prompt

    def of(self, request: Request) -> Output:
        """Of a request that has just got a token or ended. Where a stop text is complete the output has finished, and
        the request is still to be ended."""
        text = self._texts[request.id]
        before = len(text.text)
        _, reason = text.take(request.tokens[-1:] if request.output_length else [], request.finish_reason)
        params = request.params
        output = Output(
            request_id=request.id,
            prompt=self._prompts[request.id],
            prompt_token_ids=request.tokens[: request.prompt_length],
            text=text.text,
            token_ids=request.tokens[request.prompt_length :],
            finish_reason=reason,
            logprobs=list(request.logprobs) if params.logprobs is not None else None,
            prompt_logprobs=list(request.prompt_logprobs) if params.prompt_logprobs is not None else None,
            cached_tokens=request.cached_tokens,
            queued=request.queued,
            stop_text=text.stop_text,
            delta=text.text[before:],
        )
        if output.finished:
            self.forget(request.id)
        return output

    def forget(self, request_id: str) -> None:
        """It has ended; again, nothing."""
        self._texts.pop(request_id, None)
        self._prompts.pop(request_id, None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
