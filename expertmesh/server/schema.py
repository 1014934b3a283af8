"""What clients send, in OpenAI's names and a few of vLLM's. Fields that nobody knows are ignored; fields that are
known, would change the output and are not supported are refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from expertmesh.request import SamplingParams

Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
# JSON can spell halves of a surrogate pair, which are no text: encoding them is an error.
Text = Annotated[str, AfterValidator(lambda value: value.encode().decode())]
Texts = Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]

# Refused unless they ask for nothing: null, empty, false or zero.
UNSUPPORTED = (
    *("tools", "functions", "response_format", "logit_bias", "suffix", "audio", "min_tokens", "bad_words"),
    *("allowed_token_ids", "use_beam_search", "structured_outputs", "guided_json", "guided_regex"),
    *("guided_choice", "guided_grammar", "prompt_logprobs", "tool_calls", "function_call"),
)
PLAIN_TEXT = {"type": "text"}  # the response_format that asks for nothing


class Strict(BaseModel):
    """Refuses fields that this server knows and does not support."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name in UNSUPPORTED if isinstance(data, dict) else ():
            if data.get(name) and data[name] != PLAIN_TEXT:
                raise refusal(name, f"{name} is not supported by this server")
        return data


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class GenerationRequest(Strict):
    """What both ways to generate have in common. Sampling fields that are omitted take the checkpoint's defaults."""

    model: str
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Texts | None = None
    stop_token_ids: list[Integer] | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options is only allowed together with stream")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """What the client says about sampling, as keywords of SamplingParams."""
        named = SamplingParams.__dataclass_fields__.keys() - {"logprobs", "prompt_logprobs"}
        return self.model_dump(include=named, exclude_none=True)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Text | list[Text] | list[StrictInt] | list[list[StrictInt]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _check_prompt(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            if value != []:
                return handler(value)
        except ValidationError:  # one message, where the union would give one for each of its members
            pass
        forms = "a text, a list of texts, a list of token ids, or a list of lists of token ids"
        raise refusal("prompt", f"prompt must be {forms}")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise refusal("best_of", "best_of is not supported by this server unless it equals n")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]

    def sampling(self) -> dict[str, Any]:
        prompt_logprobs = self.logprobs if self.echo else None
        more = {"logprobs": self.logprobs, "prompt_logprobs": prompt_logprobs}
        return {"max_tokens": 16} | super().sampling() | more


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value
        ):
            raise refusal("messages", 'content must be a text, or parts like {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in value)

    def plain(self) -> dict[str, str]:
        """For the chat template; templates know no developer, which is OpenAI's newer name for system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only allowed together with logprobs")
        return self

    def sampling(self) -> dict[str, Any]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": self.max_completion_tokens}
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling() | newer | {"logprobs": logprobs}


def refusal(param: str, message: str) -> PydanticCustomError:
    """An error of one field, whose message needs nothing before it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})
