"""Tools in OpenAI's form: what may be called, which of it, and what has been called."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from expertmesh.server.body import Body, Items, Text, ToolName
from expertmesh.server.chat.turn import Tool, allow, object_schema
from expertmesh.server.chat.turn import ToolChoice as Choice


class FunctionSpec(Body):
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, object_schema(self.name, self.parameters), self.description, bool(self.strict))


class ToolSpec(Body):
    type: Literal["function"]
    function: FunctionSpec

    def tool(self) -> Tool:
        return self.function.tool()


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Items[NamedTool]


class AllowedToolChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice: TypeAlias = Choice | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")]


class CalledFunction(Body):
    name: Text
    arguments: Text

    def plain(self) -> dict[str, str]:
        return {"name": self.name, "arguments": self.arguments}


class CalledTool(Body):
    """A call of an earlier message."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": self.function.plain()}


def choose(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[list[str] | None, Choice]:
    """(only, choice) of a turn."""
    if choice is None or isinstance(choice, str):
        return allow(tools, None, choice or "auto")
    if isinstance(choice, NamedTool):
        return allow(tools, [choice.function.name], "required")
    return allow(
        tools, [tool.function.name for tool in choice.allowed_tools.tools], choice.allowed_tools.mode
    )
