"""What request bodies of all APIs are made of. Fields that nobody knows are ignored; fields that are known, would
change the answer and are not supported are refused by name."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")
# A list whose first wrong item is its error: nobody reads a million of them, and they would hold up the event loop.
Items = Annotated[list[T], Field(fail_fast=True)]
Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
# JSON can spell halves of a surrogate pair, which are no text: encoding them is an error.
Text = Annotated[str, AfterValidator(lambda value: value.encode().decode())]
Texts = Annotated[
    Items[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Body(BaseModel):
    """Types are taken as they are: a number is not a text that looks like one."""

    model_config = ConfigDict(strict=True)

    unsupported: ClassVar[
        tuple[str, ...]
    ] = ()  # refused unless they ask for nothing: null, empty, false or zero

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name in cls.unsupported if isinstance(data, dict) else ():
            if data.get(name):
                raise refusal(name, f"{name} is not supported by this server")
        return data


def refusal(param: str, message: str) -> PydanticCustomError:
    """An error of one field, whose message needs nothing before it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def text_of(content: Any, types: tuple[str, ...], param: str = "messages") -> Any:
    """The text of content that is a text or parts of these types, joined by line breaks; anything else as it is."""
    if not isinstance(content, list):
        return content
    return "\n".join(_texts(content, types, param))


def _texts(parts: list[Any], types: tuple[str, ...], param: str) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in types or not isinstance(part.get("text"), str):
            form = f'{{"type": "{types[0]}", "text": "..."}}'
            found = f", not of type {kind!r}" if isinstance(kind, str) and kind not in types else ""
            raise refusal(param, f"content must be a text, or parts like {form}{found}")
        yield part["text"]


def content_type(*types: str, param: str = "messages") -> Any:
    """The type of a field that holds a text or parts of these types; the text comes of it."""
    part = {
        "type": "object",
        "properties": {"type": {"enum": list(types)}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}
    return Annotated[
        Text, BeforeValidator(lambda value: text_of(value, types, param)), WithJsonSchema(schema)
    ]
