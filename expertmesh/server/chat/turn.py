"""What is asked of the model in a conversation, whichever API it came by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from expertmesh.errors import InputError

Message: TypeAlias = Mapping[str, Any]
ToolChoice: TypeAlias = Literal["none", "auto", "required"]

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of an object. strict: calls keep to it always, not
    only where a call is required."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None
    strict: bool = False

    def plain(self) -> dict[str, Any]:
        """For chat templates, which know OpenAI's form."""
        described = {} if self.description is None else {"description": self.description}
        return {
            "type": "function",
            "function": {"name": self.name, **described, "parameters": dict(self.parameters)},
        }


@dataclass(frozen=True)
class Turn:
    """One more answer is asked for.

    messages: with role and content (a text or None); the assistant's may have tool_calls and reasoning_content, and a
    tool's has tool_call_id, all in OpenAI's form. only: names of the tools that may be called, where not all may.
    constraint: what the answer must look like, as in SamplingParams.grammar. variables: of the chat template.
    continued: the last message, the assistant's, is the beginning of the answer.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    only: Sequence[str] | None = None
    choice: ToolChoice = "auto"
    parallel: bool = True
    constraint: Mapping[str, Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    continued: bool = False

    @property
    def shown(self) -> Sequence[Tool]:
        """Tools that the model hears of."""
        return () if self.choice == "none" else self.tools

    @property
    def callable(self) -> Sequence[Tool]:
        """Tools that may be called now."""
        return [tool for tool in self.shown if self.only is None or tool.name in self.only]


def allow(
    tools: Sequence[Tool], only: list[str] | None, choice: ToolChoice
) -> tuple[list[str] | None, ToolChoice]:
    """(only, choice), checked. InputError where a tool is named that is not there, or none is there to be called."""
    known = {tool.name for tool in tools}
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise InputError(f"tool_choice names {unknown[0]!r}, which is not among the tools")
    if choice == "required" and not (known if only is None else only):
        raise InputError("tool_choice asks for a call, but there are no tools")
    return only, choice


def object_schema(name: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    """A tool's parameters, which are an object. InputError where the schema asks for something else."""
    if schema is None or not schema:
        return NO_PARAMETERS
    if schema.get("type", "object") != "object":
        raise InputError(f"tools: the parameters of {name} must be of type object, not {schema['type']!r}")
    return {"type": "object"} | schema
