"""What an answer must look like: OpenAI's response_format and vLLM's structured outputs, as constraints."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from expertmesh.server.body import Body, Items, Text, refusal


class TextFormat(Body):
    type: Literal["text"]

    def constraint(self) -> dict[str, Any] | None:
        return None


class JsonObjectFormat(Body):
    type: Literal["json_object"]

    def constraint(self) -> dict[str, Any] | None:
        return {"type": "json_object"}


class NamedSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def constraint(self) -> dict[str, Any] | None:
        return (
            {"type": "json_object"}
            if self.schema_ is None
            else {"type": "json_schema", "schema": self.schema_}
        )


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def constraint(self) -> dict[str, Any] | None:
        return self.json_schema.constraint()


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Choices = Annotated[Items[Text], Field(min_length=1)]


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise refusal("structured_outputs", "a schema that is given as a text must be JSON") from None


# An object, or the same as a text.
JsonValue = Annotated[
    dict[str, Any],
    BeforeValidator(_parsed),
    WithJsonSchema(
        {"anyOf": [{"type": "object"}, {"type": "string", "contentMediaType": "application/json"}]}
    ),
]


class StructuredOutputs(Body):
    """vLLM's: exactly one of these."""

    json_: JsonValue | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    structural_tag: JsonValue | None = None

    def constraints(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any] | None] = {
            "json_schema": None if self.json_ is None else {"schema": self.json_},
            "json_object": {} if self.json_object else None,
            "regex": None if self.regex is None else {"pattern": self.regex},
            "choice": None if self.choice is None else {"choices": self.choice},
            "ebnf": None if self.grammar is None else {"grammar": self.grammar},
            "structural_tag": self.structural_tag,
        }
        return [{**given, "type": kind} for kind, given in found.items() if given is not None]


class ConstrainedRequest(Body):
    """OpenAI's field that constrains the answer, and those of vLLM, under their newer and their older names."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonValue | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @model_validator(mode="after")
    def _check_constraints(self) -> "ConstrainedRequest":
        if len(self.constraints()) > 1:
            message = (
                "of response_format, structured_outputs and the guided_ fields only one can be asked for"
            )
            raise refusal("structured_outputs", message)
        return self

    def constraints(self) -> list[dict[str, Any]]:
        """All constraints that are asked for, in the form of SamplingParams.grammar."""
        older = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        form = self.response_format.constraint() if self.response_format else None
        others = [c for given in (self.structured_outputs, older) if given for c in given.constraints()]
        return [form, *others] if form else others
