"""Bodies of POST /v1/responses and /v1/responses/input_tokens: input items to messages, flat tools and formats."""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from expertmesh.errors import InputError
from expertmesh.server.body import Body, Integer, Items, Text, ToolName, content_type
from expertmesh.server.chat.turn import Tool, Turn, allow
from expertmesh.server.chat.turn import ToolChoice as Choice
from expertmesh.server.openai.formats import JsonObjectFormat, NamedSchema, TextFormat
from expertmesh.server.openai.schema import effort
from expertmesh.server.openai.tools import FunctionSpec

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: content_type("input_text", "output_text", "text", "refusal", param="input")  # type: ignore[valid-type]


class CallItem(Body):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text

    def plain(self) -> dict[str, Any]:
        return {
            "id": self.call_id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ResultItem(Body):
    type: Literal["function_call_output"]
    call_id: Text
    output: content_type("input_text", param="input")  # type: ignore[valid-type]


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: content_type("reasoning_text", param="input") | None = None  # type: ignore[valid-type]


def _item_type(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class FlatTool(FunctionSpec):
    type: Literal["function"]

    def told(self) -> dict[str, Any]:
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class FlatNamedTool(Body):
    type: Literal["function"]
    name: ToolName


class FlatAllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FlatNamedTool]


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: (
        Annotated[TextFormat | JsonObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class Asking(Body):
    """What prompts are made of. There is no state: nothing is stored, and what refers to it is refused."""

    unsupported: ClassVar[tuple[str, ...]] = ("previous_response_id", "conversation", "prompt")

    input: Text | Annotated[Items[Item], Field(min_length=1)]
    instructions: Text | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    tool_choice: Choice | Annotated[FlatNamedTool | FlatAllowedTools, Field(discriminator="type")] | None = (
        None
    )
    tools: Items[FlatTool] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def turn(self) -> Turn:
        tools = [tool.tool() for tool in self.tools or ()]
        form = self.text.format if self.text else None
        only, choice = self._choose(tools)
        return Turn(
            self.messages(),
            tools,
            only,
            choice,
            parallel=self.parallel_tool_calls is not False,
            constraint=form.constraint() if form else None,
            variables=effort(self.reasoning.effort if self.reasoning else None),
        )

    def _choose(self, tools: list[Tool]) -> tuple[list[str] | None, Choice]:
        choice = self.tool_choice
        if choice is None or isinstance(choice, str):
            return allow(tools, None, choice or "auto")
        if isinstance(choice, FlatNamedTool):
            return allow(tools, [choice.name], "required")
        return allow(tools, [tool.name for tool in choice.tools], choice.mode)

    def messages(self) -> list[dict[str, Any]]:
        """Input items as messages: what the assistant thinks, says and calls, one after the other, is one of them."""
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, ResultItem):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                role = "system" if item.role == "developer" else item.role
                found.append({"role": role, "content": item.content})
            else:
                _add(found, item)
        found = [m for m in found if m["role"] != "assistant" or m["content"] or m.get("tool_calls")]
        if not found:
            raise InputError("input has no message that could be answered")
        return found


class ResponseRequest(Asking):
    """Body of POST /v1/responses."""

    unsupported: ClassVar[tuple[str, ...]] = (*Asking.unsupported, "background", "top_logprobs")

    model: str
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None

    def sampling(self) -> dict[str, Any]:
        given = {"max_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return {key: value for key, value in given.items() if value is not None}


class InputTokensRequest(Asking):
    """Body of POST /v1/responses/input_tokens."""

    model: str | None = None


def _add(messages: list[dict[str, Any]], item: Any) -> None:
    """Make what the assistant did a part of its last message, or begin one: nothing comes after a call but calls."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    begins = isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and last and last["content"])
    if last is None or begins or ("tool_calls" in last and not isinstance(item, CallItem)):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    if isinstance(item, ReasoningItem):
        if item.content:
            last["reasoning_content"] = item.content
    elif isinstance(item, MessageItem):
        last["content"] = item.content
    else:
        last.setdefault("tool_calls", []).append(item.plain())
