"""From the fields of a request to what its engine is told."""

import secrets

from server.api.completions.schemas import SamplingFields
from server.api.http.errors import APIError
from server.api.serving.prompts import check_vocabulary
from server.api.serving.variants import Variant
from server.wire.messages import Generate, Sampling


def checked_bias(fields: SamplingFields, variant: Variant) -> dict[int, float]:
    """Token id -> bias. 400 for an id that the model lacks. The variant has loaded."""
    bias = {int(token_id): value for token_id, value in (fields.logit_bias or {}).items()}
    check_vocabulary(bias, variant, "logit_bias")
    return bias


def checked_allowed(fields: SamplingFields, variant: Variant) -> list[int]:
    """The only ids that may be generated; empty for all. 400 for one that the model lacks, or if `min_tokens` leaves
    none of them. The variant has loaded."""
    allowed = fields.allowed_token_ids or []
    check_vocabulary(allowed, variant, "allowed_token_ids")
    if allowed and fields.min_tokens and set(allowed) <= stop_ids(fields, variant):
        message = "allowed_token_ids: each of them ends the completion, which min_tokens forbids"
        raise APIError(400, message, param="allowed_token_ids")
    return allowed


def stop_ids(fields: SamplingFields, variant: Variant) -> set[int]:
    """The tokens that end a completion. The variant has loaded."""
    own = [] if fields.ignore_eos else variant.info.eos_token_ids
    return {*(fields.stop_token_ids or []), *own}


def generate_message(
    fields: SamplingFields,
    variant: Variant,
    prompt_ids: list[int],
    *,
    choice: int,
    priority: int,
    salt: bytes,
    state_path: str | None,
) -> Generate:
    """The message that has the engine generate. 400 for token ids that the model lacks. The variant has loaded."""
    return Generate(
        request_id=secrets.token_hex(8),
        token_ids=prompt_ids,
        max_tokens=fields.token_limit,
        sampling=Sampling(
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_p=1.0 if fields.top_p is None else fields.top_p,
            top_k=max(fields.top_k or 0, 0),
            min_p=fields.min_p or 0.0,
            seed=secrets.randbits(63) if fields.seed is None else fields.seed,
            choice=choice,
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
            logit_bias=checked_bias(fields, variant),
            allowed_token_ids=checked_allowed(fields, variant),
        ),
        stop_token_ids=sorted(stop_ids(fields, variant)),
        min_tokens=fields.min_tokens or 0,
        logprobs=fields.alternatives,
        priority=priority,
        state_path=state_path,
        cache_salt=salt,
    )
