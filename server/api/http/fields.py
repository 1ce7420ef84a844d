"""What the fields of several requests have in common. Unknown fields are ignored; a known field with a bad value is an
error that names it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TOKEN_ID = 2**31 - 1

NoOps = Mapping[str, tuple[Any, ...]]
"""The fields that a request must not use, by name, each with the values that it may have because they change
nothing."""


def refusal(field: str, text: str) -> PydanticCustomError:
    """The error of one field, for validators that look at several fields and would otherwise name none."""
    return PydanticCustomError("refused", "{field} {text}", {"field": field, "text": text})


def unsupported(fields: Mapping[str, Any], no_ops: NoOps) -> list[str]:
    """The fields that ask for something that we don't do, in the order of the table."""
    return [
        name
        for name, values in no_ops.items()
        if name in fields
        and not any(type(fields[name]) is type(no_op) and fields[name] == no_op for no_op in values)
    ]


def _one_prompt_kind(value: Any) -> str:
    return "ids" if isinstance(value, list) else "text"


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class CheckedIds(list[int]):
    """Token ids that were checked when they were read. To look through a million of them once more takes too long."""


def _unless_checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    return value if type(value) is CheckedIds else check(value)


TokenIds = Annotated[list[TokenId], Field(fail_fast=True), WrapValidator(_unless_checked)]
"""Token ids. Their check stops at the first bad one: a million would make a million errors, of which ten are shown."""
Prompt = Annotated[
    Annotated[str, Tag("text")] | Annotated[TokenIds, Tag("ids")], Discriminator(_one_prompt_kind)
]
CacheSalt = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=256)] | None,
    Field(
        description="Cached prefixes are shared only with requests of the same salt (and key); by default with all of "
        "the key's."
    ),
]


class Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class CheckedFields(Fields):
    """A request that refuses fields which it knows and does not support (`no_ops`), unless their value changes
    nothing."""

    no_ops: ClassVar[NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_unsupported(cls, data: Any) -> Any:
        found = unsupported(data, cls.no_ops) if isinstance(data, dict) else []
        if found:
            raise refusal(
                found[0], "; ".join(["is not supported", *(f"{x} is not supported" for x in found[1:10])])
            )
        return data
