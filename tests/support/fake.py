"""A model without torch for tests of the scheduler: its next token depends on every token before, and its cache
remembers what was written where."""

from expertmesh.request import Batch, Request, Sampled, SamplingParams

VOCABULARY = 5
STOP = 0


def state_after(state: int, token: int) -> int:
    return hash((state, token)) & 0xFFFFFFFF


def next_token(state: int) -> int:
    return (state >> 7) % VOCABULARY


def alone(prompt: list[int], max_tokens: int, max_context: int) -> list[int]:
    """What the fake model says after a prompt, the stop token included."""
    state, tokens = 0, list(prompt)
    for token in prompt:
        state = state_after(state, token)
    while len(tokens) < min(len(prompt) + max_tokens, max_context):
        tokens.append(next_token(state))
        if tokens[-1] == STOP:
            break
        state = state_after(state, tokens[-1])
    return tokens


def request_of(number: int, prompt: list[int], max_tokens: int, prompt_logprobs: bool = False) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if prompt_logprobs else None)
    return Request(str(number), list(prompt), len(prompt), params, 0, frozenset({STOP}))


class FakeModel:
    """Writes the state after each token into the token's place of the cache, and reads the states of all earlier
    tokens from there, as attention reads their latents."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.content: dict[int, int] = {}

    def run(self, batch: Batch) -> dict[str, Sampled]:
        for part in batch.slices:
            self._write(part.request, part.start, part.count)
        sampled = {}
        for part in batch.slices:
            state = self._read(part.request, part.start + part.count)
            if part.samples:
                sampled[part.request.id] = Sampled(next_token(state))
        return sampled

    def _slot(self, request: Request, position: int) -> int:
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _write(self, request: Request, start: int, count: int) -> None:
        state = 0
        for position, token in enumerate(request.tokens[: start + count]):
            state = state_after(state, token)
            if position >= start:
                self.content[self._slot(request, position)] = state

    def _read(self, request: Request, length: int) -> int:
        """Every earlier token must be where the request's pages say that it is."""
        state = 0
        for position, token in enumerate(request.tokens[:length]):
            state = state_after(state, token)
            assert self.content[self._slot(request, position)] == state, "another text's token"
        return state
