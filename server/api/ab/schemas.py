"""What a request to compare variants may say."""

from typing import Annotated

from pydantic import Field, StringConstraints

from server.api.completions.refused import GENERATION
from server.api.completions.schemas import SamplingFields
from server.api.http.fields import NoOps, Prompt

NO_OPS: NoOps = {
    **GENERATION,
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "state_id": (None,),
}


Name = Annotated[str, StringConstraints(max_length=64)]


class CompareRequest(SamplingFields):
    """POST /v1/compare."""

    no_ops = NO_OPS

    prompt: Prompt = Field(description="Text, or token ids of the model's own tokenizer.")
    variants: Annotated[list[Name], Field(min_length=2, max_length=16, fail_fast=True)] | None = Field(
        None, description="Which variants; all of them if not given."
    )
    baseline: Name | None = Field(
        None, description="What the others are compared with; the first one if not given."
    )
    parallel: bool | None = Field(
        False, description="Decode at the same time: faster, but the speeds are then not comparable."
    )
    stream: bool | None = Field(False, description="Events of each variant as they come, then the answer.")
