"""Bodies of completions and chat completions, in OpenAI's names and a few of vLLM's."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from expertmesh.request import SamplingParams
from expertmesh.server.body import Body, Integer, Items, Text, Texts, content_type, refusal
from expertmesh.server.chat.turn import Turn
from expertmesh.server.openai.formats import ConstrainedRequest
from expertmesh.server.openai.tools import CalledTool, ToolChoice, ToolSpec, choose

TokenId = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


def _check_bias(value: Any) -> Any:
    """One error, where a dict of a million entries would give one for each."""
    for token, bias in value.items() if isinstance(value, dict) else ():
        if not (token.isascii() and token.isdigit() and len(token) <= 18):
            raise refusal("logit_bias", f"logit_bias has {token[:40]!r}, which is no token id")
        if not isinstance(bias, int | float) or isinstance(bias, bool):
            raise refusal("logit_bias", f"logit_bias of token {token} must be a number")
    return value


class StreamOptions(Body):
    include_usage: bool | None = None


class GenerationRequest(ConstrainedRequest):
    """What both ways to generate have in common. Sampling fields that are omitted take the checkpoint's defaults."""

    unsupported: ClassVar[tuple[str, ...]] = ("use_beam_search", "prompt_logprobs", "audio")

    model: str
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Texts | None = None
    stop_token_ids: Items[Integer] | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[TokenId, float], BeforeValidator(_check_bias)] | None = None
    min_tokens: Integer | None = None
    allowed_token_ids: Items[Integer] | None = None
    bad_words: Items[Text] | None = None
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
        named = SamplingParams.__dataclass_fields__.keys() - {"logprobs", "prompt_logprobs", "logit_bias"}
        bias = {"logit_bias": {int(k): v for k, v in self.logit_bias.items()}} if self.logit_bias else {}
        return self.model_dump(include=named, exclude_none=True) | bias


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (*GenerationRequest.unsupported, "suffix", "tools", "functions")

    prompt: Text | Items[Text] | Items[StrictInt] | Items[Items[StrictInt]]
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


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: content_type("text")  # type: ignore[valid-type]

    def plain(self) -> dict[str, Any]:
        """For the chat template; templates know no developer, which is OpenAI's newer name for system."""
        return {"role": "system", "content": self.content}


class UserMessage(Body):
    role: Literal["user"]
    content: content_type("text")  # type: ignore[valid-type]

    def plain(self) -> dict[str, Any]:
        return {"role": "user", "content": self.content}


class AssistantMessage(Body):
    unsupported: ClassVar[tuple[str, ...]] = ("audio", "function_call")

    role: Literal["assistant"]
    content: content_type("text", "refusal") | None = None  # type: ignore[valid-type]
    reasoning_content: Text | None = None
    tool_calls: Items[CalledTool] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise refusal("messages", "a message of the assistant must have content or tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        thought = {"reasoning_content": self.reasoning_content} if self.reasoning_content else {}
        return {"role": "assistant", "content": self.content, **thought, **calls}


class ToolMessage(Body):
    role: Literal["tool"]
    content: content_type("text")  # type: ignore[valid-type]
    tool_call_id: str

    def plain(self) -> dict[str, Any]:
        return {"role": "tool", "content": self.content, "tool_call_id": self.tool_call_id}


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Conversation(Body):
    """Messages and tools, as chat completions and the counting of their tokens have them."""

    messages: Annotated[Items[Message], Field(min_length=1)]
    tools: Items[ToolSpec] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_end(self) -> "Conversation":
        if self.continue_final_message and not isinstance(self.messages[-1], AssistantMessage):
            raise refusal("messages", "continue_final_message needs a last message of the assistant")
        return self

    def turn(self, constraint: dict[str, Any] | None = None) -> Turn:
        tools = [tool.tool() for tool in self.tools or ()]
        return Turn(
            [message.plain() for message in self.messages],
            tools,
            *choose(tools, self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
            constraint=constraint,
            variables=effort(self.reasoning_effort) | (self.chat_template_kwargs or {}),
            continued=bool(self.continue_final_message),
        )


class ChatRequest(Conversation, GenerationRequest):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (
        *GenerationRequest.unsupported,
        *("functions", "function_call", "web_search_options"),
    )

    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is only allowed together with logprobs")
        return self

    def sampling(self) -> dict[str, Any]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": self.max_completion_tokens}
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling() | newer | {"logprobs": logprobs}

    def asked(self) -> Turn:
        """The turn, with what its answer must look like."""
        return self.turn(next(iter(self.constraints()), None))


def effort(value: str | None) -> dict[str, Any]:
    """Variables of chat templates that say how much to reason; templates that let it be switched know one of these."""
    if value is None:
        return {}
    thinks = value not in ("none", "minimal")
    return {"reasoning_effort": value, "thinking": thinks, "enable_thinking": thinks}
