"""What an answer is held to: the fields that ask for it, under the names of OpenAI's and of vLLM's requests."""

import json
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from server.api.http.errors import APIError
from server.api.http.fields import CheckedFields, Fields, NoOps, refusal
from server.text import grammar
from server.text.grammar import GrammarError

Pattern = Annotated[str, StringConstraints(max_length=grammar.MAX_LENGTH)]
Texts = Annotated[list[str], Field(min_length=1, max_length=4096, fail_fast=True)]
Schema = dict[str, Any] | str | bool
"""A JSON schema, or one as JSON."""


class NamedSchema(Fields):
    """A JSON schema as OpenAI's requests have it."""

    name: str | None = Field(None, max_length=256, description="Changes nothing.")
    description: str | None = Field(None, description="Changes nothing.")
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = Field(None, description="Changes nothing: the schema is always kept.")


class ResponseFormat(Fields):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(
        None, description="With the type json_schema, what the JSON is to be."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise refusal("response_format", "of type json_schema needs json_schema, with the schema in it")
        return self


class StructuredOutputs(CheckedFields):
    """vLLM's name for what `response_format` asks for, and more kinds of it. Just one of them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    no_ops: ClassVar[NoOps] = {
        "structural_tag": (None,),
        "whitespace_pattern": (None,),
        "disable_additional_properties": (None, False),
    }

    json_: Schema | None = Field(None, alias="json", description="JSON of this schema.")
    json_object: bool | None = Field(None, description="Any JSON object.")
    regex: Pattern | None = Field(None, description="A text that matches as a whole.")
    choice: Texts | None = Field(None, description="One of these texts.")
    grammar: Pattern | None = Field(None, description="A text of this grammar, as Lark with a rule `start`.")
    disable_any_whitespace: bool | None = Field(False, description="JSON without any whitespace.")


class Wanted(NamedTuple):
    """What an answer is to be: one of these kinds, by the field `param`."""

    param: str
    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    value: Any
    compact: bool = False


class StructuredFields(CheckedFields):
    """What holds an answer to a form. At most one of these fields does."""

    response_format: ResponseFormat | None = Field(
        None, description="`text` for anything, `json_object`, or `json_schema` with its schema."
    )
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="`structured_outputs.json`.")
    guided_regex: Pattern | None = Field(None, description="`structured_outputs.regex`.")
    guided_choice: Texts | None = Field(None, description="`structured_outputs.choice`.")
    guided_grammar: Pattern | None = Field(None, description="`structured_outputs.grammar`.")

    @property
    def wanted(self) -> list[Wanted]:
        """All that the fields ask for: nothing or one thing, in a request that has been checked."""
        found: list[Wanted] = []
        match self.response_format:
            case ResponseFormat(type="json_object"):
                found.append(Wanted("response_format", "json_object", True))
            case ResponseFormat(type="json_schema", json_schema=NamedSchema() as named):
                found.append(Wanted("response_format", "json", named.schema_))
        if (s := self.structured_outputs) is not None:
            compact = bool(s.disable_any_whitespace)
            given: list[tuple[Literal["json", "json_object", "regex", "choice", "grammar"], Any]] = [
                ("json", s.json_),
                ("json_object", s.json_object or None),
                ("regex", s.regex),
                ("choice", s.choice),
                ("grammar", s.grammar),
            ]
            found += [
                Wanted("structured_outputs", kind, value, compact)
                for kind, value in given
                if value is not None
            ]
        guided: list[Wanted] = [
            Wanted("guided_json", "json", self.guided_json),
            Wanted("guided_regex", "regex", self.guided_regex),
            Wanted("guided_choice", "choice", self.guided_choice),
            Wanted("guided_grammar", "grammar", self.guided_grammar),
        ]
        return found + [one for one in guided if one.value is not None]

    @model_validator(mode="after")
    def _check_wanted(self) -> Self:
        wanted = self.wanted
        if len(wanted) > 1:
            first, second = wanted[0], wanted[1]
            raise refusal(
                second.param, f"({second.kind}) can't be used together with {first.param} ({first.kind})"
            )
        if self.structured_outputs is not None and not wanted:
            raise refusal(
                "structured_outputs", "must have one of json, json_object, regex, choice and grammar"
            )
        return self


def written(wanted: Wanted) -> str:
    """The grammar of what is wanted. Raises GrammarError."""
    match wanted.kind:
        case "json":
            schema = wanted.value
            if isinstance(schema, str):
                try:
                    schema = json.loads(schema)
                except (ValueError, RecursionError) as e:
                    raise GrammarError(f"the schema is no JSON: {e}") from e
            return grammar.json_schema(schema, compact=wanted.compact)
        case "json_object":
            return grammar.json_object(compact=wanted.compact)
        case "regex":
            return grammar.regex(wanted.value)
        case "choice":
            return grammar.choice(wanted.value)
        case "grammar":
            text: str = wanted.value
            return text


async def constraint(fields: StructuredFields) -> str:
    """The grammar that the answer is to be held to; empty if the fields ask for none. Raises APIError, a 400 if the
    library can't keep what is asked for."""
    if not fields.wanted:
        return ""
    wanted = fields.wanted[0]
    try:
        text = written(wanted)
    except (GrammarError, RecursionError) as e:
        raise APIError(400, f"{wanted.param}: {e}", param=wanted.param) from e
    return await checked(text, param=wanted.param)


async def checked(text: str, *, param: str) -> str:
    """The grammar, if the library can keep to it. Raises APIError, a 400 that names the field."""
    try:
        await grammar.check(text)
    except GrammarError as e:
        raise APIError(400, f"{param}: {e}", param=param) from e
    return text
