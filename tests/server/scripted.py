"""A worker that generates what it was told, token by token, so that answers of a capable model can be tested."""

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from expertmesh import Output
from expertmesh.engine.intake import Intake
from expertmesh.engine.text import OutputText
from expertmesh.server.worker import EngineStopped, Job


class ScriptedWorker:
    """Every job gets `text`, until its length or a stop text ends it; `fails` stops the engine after so many tokens."""

    problem: str | None = None

    def __init__(self, intake: Intake) -> None:
        assert intake.tokenizer
        self.tokenizer = intake.tokenizer
        self.text, self.fails = "Yes.", -1
        self.jobs: list[Job] = []  # of the last call

    def check(self, choices: int = 1) -> None: ...

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.jobs[0].tokens, special=True)

    async def generate(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Output]]:
        self.jobs = list(jobs)
        ids = self.tokenizer.encode(self.text, special=False)
        for number, job in enumerate(jobs):
            text, length = OutputText(self.tokenizer.stream(), job.params.stop), job.params.max_tokens
            for count in range(min(len(ids), length)):
                if count == self.fails:
                    raise EngineStopped("the engine failed on purpose")
                text.push(ids[count])
                last = count + 1 == min(len(ids), length)
                if last:
                    text.finish()
                reason = (
                    "stop" if text.stopped else ("stop" if length > len(ids) else "length") if last else None
                )
                logprobs = [{i: -0.5} for i in ids[: count + 1]] if job.params.logprobs is not None else None
                tokens = ids[: count + 1]
                yield (
                    number,
                    Output(
                        "r",
                        None,
                        job.tokens,
                        text.text,
                        tokens,
                        reason,
                        logprobs,
                        cached_tokens=2,
                        stop_text=text.stop_text,
                    ),
                )  # type: ignore[arg-type]
                if text.stopped:
                    break


def template(name: str) -> Path:
    """A chat template that has the parts of a published one which matter here."""
    return Path(__file__).parent / "templates" / f"{name}.jinja"
