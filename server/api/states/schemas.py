"""What requests about saved states may say, and what the answers to them look like in the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field

from server.api.http.fields import CacheSalt, Fields, Prompt


class StateRequest(Fields):
    """POST /v1/states."""

    model: str = Field(description="A variant's name or an alias.", max_length=256)
    prompt: Prompt = Field(description="Text, or token ids of the model's own tokenizer.")
    cache_salt: CacheSalt = None


class State(BaseModel):
    id: str
    object: Literal["state"]
    variant: str
    tokens: int
    bytes: int
    created: int
    expires: int = Field(
        description="If nobody uses it until then; each use puts it off. Seconds since 1970."
    )


class StateList(BaseModel):
    object: Literal["list"]
    data: list[State]


class DeletedState(BaseModel):
    id: str
    object: Literal["state"]
    deleted: Literal[True]
