"""Bodies of Anthropic's messages, and how they become a turn."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from expertmesh.server.body import Body, Integer, Items, Text, ToolName, content_type, refusal
from expertmesh.server.chat.turn import Tool, Turn, allow, object_schema


class TextBlock(Body):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text
    signature: str | None = None


class RedactedThinkingBlock(Body):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        arguments = json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: content_type("text") | None = None  # type: ignore[valid-type]
    is_error: bool | None = None

    def plain(self) -> dict[str, Any]:
        content = self.content or ""
        told = f"Error: {content}" if self.is_error else content
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": told}


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Text | Items[Block]

    @property
    def blocks(self) -> list[Any]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def plain(self) -> list[dict[str, Any]]:
        """One message, or more where results of tools are among its blocks: those come first."""
        texts = [block.text for block in self.blocks if isinstance(block, TextBlock)]
        results = [block.plain() for block in self.blocks if isinstance(block, ToolResultBlock)]
        calls = [block.plain() for block in self.blocks if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in self.blocks if isinstance(block, ThinkingBlock)]
        message: dict[str, Any] = {"role": self.role, "content": "\n".join(texts) if texts else None}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        if texts or calls or not results:
            return [*results, message if calls else message | {"content": message["content"] or ""}]
        return results


class CustomTool(Body):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(
            self.name, object_schema(self.name, self.input_schema), self.description, bool(self.strict)
        )


class AnyChoice(Body):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    type: Literal["none"]


class NamedChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class EnabledThinking(Body):
    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1024)]


class OtherThinking(Body):
    type: Literal["disabled", "adaptive", "between_tools"]


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Body):
    user_id: str | None = None


class Conversation(Body):
    """What both routes take."""

    unsupported: ClassVar[tuple[str, ...]] = ("container", "mcp_servers")

    model: str
    messages: Annotated[Items[Message], Field(min_length=1)]
    system: content_type("text", param="system") | None = None  # type: ignore[valid-type]
    tools: Items[CustomTool] | None = None
    tool_choice: Annotated[AnyChoice | NoChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Annotated[EnabledThinking | OtherThinking, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None

    def turn(self) -> Turn:
        messages = [plain for message in self.messages for plain in message.plain()]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        tools = [tool.tool() for tool in self.tools or ()]
        config, choice = self.output_config or OutputConfig(), self.tool_choice
        named = [choice.name] if isinstance(choice, NamedChoice) else None
        kind = {"any": "required", "tool": "required", "none": "none"}.get(
            choice.type if choice else "auto", "auto"
        )
        only, asked = allow(tools, named, kind)  # type: ignore[arg-type]
        last = messages[-1]
        return Turn(
            messages,
            tools,
            only,
            asked,
            parallel=not getattr(choice, "disable_parallel_tool_use", None),
            constraint={"type": "json_schema", "schema": config.format.schema_} if config.format else None,
            variables=self._variables(config),
            continued=last["role"] == "assistant" and not last.get("tool_calls"),
        )

    def _variables(self, config: OutputConfig) -> dict[str, Any]:
        """Of the chat template; it decides what is not said here."""
        found: dict[str, Any] = {} if config.effort is None else {"reasoning_effort": config.effort}
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            found |= {"thinking": thinks, "enable_thinking": thinks}
        return found


class MessagesRequest(Conversation):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[Integer, Field(ge=1)]
    stop_sequences: Items[Text] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=0)] | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> "MessagesRequest":
        if isinstance(self.thinking, EnabledThinking) and self.thinking.budget_tokens >= self.max_tokens:
            raise refusal("thinking", "thinking.budget_tokens must be less than max_tokens")
        return self

    def sampling(self) -> dict[str, Any]:
        given = {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return {key: value for key, value in given.items() if value is not None}


class CountRequest(Conversation):
    """Body of POST /v1/messages/count_tokens."""
