"""The library's front: load a model, generate."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expertmesh.config import EngineConfig, demo_model, name_of_model
from expertmesh.engine.checkpoint import Progress
from expertmesh.engine.engine import Engine
from expertmesh.engine.intake import Prompt
from expertmesh.errors import InputError
from expertmesh.launch.launcher import Launcher
from expertmesh.mesh.topology import Topology
from expertmesh.request import Output, SamplingParams

__all__ = ["LLM", "demo_model"]


class LLM:
    """A loaded model. For one thread; calls may be nested.

    model: a folder in the Hugging Face layout; None for the demo model. dtype: "auto" computes in the checkpoint's
    type (bfloat16 for FP8 checkpoints). progress: whether loading is shown on a terminal, or who is told of it: bytes
    so far, and in all. topology: the cluster, one rank where it is not given. launcher: starts ranks that are
    processes, on this machine where none is given. Further options are the fields of EngineConfig.
    Raises InputError with one clear message where the folder or an option cannot be used.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        topology: Topology | None = None,
        progress: bool | Progress = False,
        launcher: Launcher | None = None,
        **options: Any,
    ) -> None:
        unknown = options.keys() - EngineConfig.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise InputError(f"unknown option {', '.join(sorted(unknown))}; there are {known}")
        self.folder = Path(model) if model is not None else demo_model()
        self.engine = Engine(self.folder, EngineConfig(dtype=dtype, **options), topology, progress, launcher)
        self._calls = itertools.count()
        # What a step brought for each call that is under way: calls may be nested, and share the engine's steps.
        self._inboxes: dict[str, deque[Output]] = {}

    def close(self) -> None:
        """End all ranks. `with LLM(...) as llm` does it at the end of the block."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What the model is called where nobody says otherwise: its folder."""
        return name_of_model(self.folder)

    def default_params(self, **changes: Any) -> SamplingParams:
        """What the checkpoint recommends in generation_config.json, with these changes."""
        return self.engine.intake.default_params(**changes)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """One output for each prompt, in their order. params: one for all, or one each."""
        done = {o.request_id: o for o in self.stream(prompts, params) if o.finished}
        return [done[key] for key in sorted(done, key=lambda k: int(k.rpartition("-")[2]))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Output]:
        """Outputs as they grow: `delta` is the new text, request_id ends in the prompt's number. All prompts are
        checked before the first runs."""
        many = _as_list(prompts)
        if params is None:
            params = self.default_params()
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise InputError(f"{len(many)} prompts, but {len(each)} sampling parameters")
        tokens = [self.tokens(prompt) for prompt in many]
        for ids, one in zip(tokens, each, strict=True):
            self.engine.check(ids, one)
        call = f"call{next(self._calls)}"
        inbox = self._inboxes[call] = deque()
        waiting = {f"{call}-{i}" for i in range(len(many))}
        try:
            for i, (prompt, ids, one) in enumerate(zip(many, tokens, each, strict=True)):
                self.engine.submit(ids, one, f"{call}-{i}", prompt if isinstance(prompt, str) else None)
            while waiting:
                if not inbox:
                    self._step()
                    continue
                output = inbox.popleft()
                if output.finished:
                    waiting.discard(output.request_id)
                yield output
        finally:  # an abandoned iterator leaves nothing running
            del self._inboxes[call]
            for request_id in waiting:
                self.engine.abort(request_id)

    def _step(self) -> None:
        for output in self.engine.step():
            inbox = self._inboxes.get(output.request_id.partition("-")[0])
            if inbox is not None:  # else somebody gave it to the engine directly
                inbox.append(output)

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, special tokens and chat template applied."""
        return self.engine.intake.tokens(prompt)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, a list of numbers and a list of messages are one."""
    many = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if not many or (prompts and isinstance(prompts[0], int | Mapping)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
