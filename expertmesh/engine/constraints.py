"""Requests whose outputs follow a grammar: the driver's side. Ranks get masks of the tokens that may come.

A grammar is compiled in a thread, while steps go on; its request is held until then. Like everything else of a request,
what follows its output catches up with the tokens that are known, so that a preemption changes nothing.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from expertmesh.engine.grammar import Source, check, compile_source, library, source_of
from expertmesh.engine.intake import Intake
from expertmesh.engine.vocabulary import Utf8
from expertmesh.errors import InputError
from expertmesh.request import Batch, Request, SamplingParams

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 256 << 20  # of grammars that are compiled
NAP = 0.05  # seconds to wait for a grammar while nothing else is to do, so that others can ask for something


class Constraints:
    """Grammars of an engine's requests. For the engine's thread."""

    def __init__(self, intake: Intake) -> None:
        self._intake, self._words = intake, -(-intake.model.vocab_size // 32)
        # One thread: the cores belong to the ranks. It is started where there is something to compile.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._pieces: list[bytes] = []
        self._utf8 = Utf8(self._pieces)
        self._waiting: dict[Request, Future[Follower]] = {}
        self._followers: WeakKeyDictionary[Request, Follower] = WeakKeyDictionary()

    def check(self, params: SamplingParams) -> None:
        """InputError where outputs could not follow the grammar, if there is one."""
        if params.grammar is None:
            return
        if self._intake.tokenizer is None:
            raise InputError("grammar needs a tokenizer, and this checkpoint has none")
        if not self._intake.eos:
            raise InputError("grammar needs an end-of-text token, and this checkpoint names none")
        self._intake.tokenizer.check_pieces()
        check(source_of(params.grammar))

    def warm(self) -> None:
        """Import what the first grammar would have to wait for, beside what else is done."""
        self._pool.submit(library)

    def begin(self, request: Request) -> None:
        """Hold a request that has a grammar until that is compiled."""
        if request.params.grammar is not None:
            request.held = True
            source = source_of(request.params.grammar)
            self._waiting[request] = self._pool.submit(self._compile, source, request.prompt_length)

    def settle(self) -> list[Request]:
        """Let requests go on whose grammars are there. Returns those whose grammars could not be compiled, which have a
        problem."""
        failed = []
        for request, future in list(self._waiting.items()):
            if request.finish_reason is not None:
                future.cancel()
            elif not future.done():
                continue
            elif error := future.exception():
                logging.getLogger(__name__).error("the grammar of request %s: %s", request.id, error)
                known = isinstance(error, InputError)
                request.problem = str(error) if known else "grammar cannot be compiled; the log says why"
                failed.append(request)
            else:
                self._followers[request] = future.result()
            request.held = False
            del self._waiting[request]
        return failed

    def rest(self) -> None:
        """Wait a little for the next grammar, if any."""
        if self._waiting:
            wait(self._waiting.values(), NAP, FIRST_COMPLETED)

    def mask(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches with masks of the requests that sample under a grammar."""
        if not self._followers:
            return list(batches)
        sampling = [part.request for batch in batches for part in batch.slices if part.samples]
        found = self._masks(request for request in sampling if request in self._followers)
        return [
            replace(batch, masks={i: found[i] for part in batch.slices if (i := part.request.id) in found})
            for batch in batches
        ]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _masks(self, requests: Iterable[Request]) -> dict[str, NDArray[np.int32]]:
        following = []
        for request in requests:
            follower = self._followers[request]
            follower.advance(request.tokens)
            if follower.begun:
                following.append((request, follower))
        masks_BW = np.zeros((len(following), self._words), dtype=np.int32)
        live = [i for i, (_, follower) in enumerate(following) if not follower.lost]
        if live:
            batch = library().BatchGrammarMatcher(max_threads=1)
            matchers = [following[i][1].matcher for i in live]
            batch.batch_fill_next_token_bitmask(matchers, masks_BW, live)
        for i, (request, follower) in enumerate(following):
            # This also clears bits beyond the vocabulary, some of which the library sets.
            masks_BW[i] &= self._utf8.mask(follower.pending)
            if not masks_BW[i].any():
                self._end(request, follower, masks_BW[i])
        return {request.id: mask for (request, _), mask in zip(following, masks_BW, strict=True)}

    def _end(self, request: Request, follower: "Follower", mask_W: NDArray[np.int32]) -> None:
        """Where no token of the vocabulary goes on, the output ends, and somebody is told."""
        follower.lost = True
        logging.getLogger(__name__).warning(
            "request %s ends early: no token of this vocabulary goes on in its grammar", request.id
        )
        for token in self._intake.eos:
            mask_W.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    # In the thread

    def _compile(self, source: Source, start: int) -> "Follower":
        xgr = library()
        if self._compiler is None:
            tokenizer, size = self._intake.tokenizer, self._intake.model.vocab_size
            assert tokenizer is not None  # else the intake had refused
            self._pieces = tokenizer.pieces(size)
            self._utf8 = Utf8(self._pieces)
            info = xgr.TokenizerInfo(
                self._pieces, xgr.VocabType.RAW, vocab_size=size, stop_token_ids=sorted(self._intake.eos)
            )
            self._compiler = xgr.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        matcher = xgr.GrammarMatcher(compile_source(self._compiler, source))
        return Follower(matcher, self._utf8, self._pieces, source.after, start)


class Follower:
    """Where in its grammar a request's output is. start: place of the first token of the output.

    begun: whether the grammar counts already; lost: no token goes on in it; pending: bytes of an unfinished character.
    """

    def __init__(
        self,
        matcher: "xgrammar.GrammarMatcher",
        utf8: Utf8,
        pieces: Sequence[bytes],
        after: bytes,
        start: int,
    ) -> None:
        self.matcher, self.lost, self.pending = matcher, False, b""
        self._utf8 = utf8
        self._pieces, self._after, self._seen = pieces, after, start
        self.begun = not after
        self._before = b""  # the last bytes, too few for all that it begins after

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in the tokens that are new."""
        for token in tokens[self._seen :]:
            if not self.begun:
                self._look(token)
            elif not self.lost:
                self.lost = not self.matcher.accept_token(token)
                self.pending = self._utf8.after(self.pending, token)
        self._seen = len(tokens)

    def _look(self, token: int) -> None:
        """The constraint begins with the token after the one that completes the text."""
        text = self._before + self._pieces[token]
        self.begun = self._after in text
        self._before = text[max(0, len(text) - len(self._after) + 1) :]
