"""From the fields of a request to what its engine is asked for."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from server.api.completions.schemas import ChoiceFields, SamplingFields
from server.api.http.errors import APIError
from server.api.serving.prompts import check_vocabulary
from server.api.serving.service import Origin
from server.api.serving.variants import Variant
from server.api.states.store import SavedState
from server.settings import Settings
from server.wire.messages import Generate, Sampling

F = TypeVar("F", bound=SamplingFields)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one request, and what is given back or gone on from."""

    ids: list[list[int]]
    """Token ids of each prompt, which `encode_prompt` has checked."""
    echo: list[str] | None = None
    """The text to give back before the choices of each prompt; None to give nothing back."""
    saved: SavedState | None = None
    """The saved state that all go on from; None for an empty one."""


def checked_bias(fields: SamplingFields, variant: Variant) -> dict[int, float]:
    """What is added to logits, by token id. 400 for an id that the model lacks. The variant has loaded."""
    bias = {int(token_id): value for token_id, value in (fields.logit_bias or {}).items()}
    if bias:
        check_vocabulary(bias, variant, "logit_bias")
    return bias


def checked_allowed(fields: SamplingFields, variant: Variant) -> list[int]:
    """The only ids that may be generated; empty for all. 400 for one that the model lacks, or if `min_tokens` leaves
    none of them. The variant has loaded."""
    allowed = fields.allowed_token_ids
    if not allowed:
        return []
    check_vocabulary(allowed, variant, "allowed_token_ids")
    if fields.min_tokens and set(allowed) <= stop_ids(fields, variant):
        message = "allowed_token_ids: each of them ends the completion, which min_tokens forbids"
        raise APIError(400, message, param="allowed_token_ids")
    return allowed


def stop_ids(fields: SamplingFields, variant: Variant) -> set[int]:
    """The tokens that end a completion. The variant has loaded."""
    own = [] if fields.ignore_eos else variant.info.eos_token_ids
    return {*(fields.stop_token_ids or []), *own}


def check_beside_grammar(fields: SamplingFields, variant: Variant) -> None:
    """Raise a 400 for a field that a grammar does not go with: between the two, no token might be left. The variant has
    loaded."""
    if fields.allowed_token_ids:
        message = (
            "allowed_token_ids: an answer that is held to a form takes the tokens that the form asks for"
        )
        raise APIError(400, message, param="allowed_token_ids")
    if not stop_ids(fields, variant):
        message = (
            "ignore_eos: an answer that is held to a form has to end with it, by a token of stop_token_ids"
        )
        raise APIError(400, message, param="ignore_eos")


def per_choice(settings: Settings, fields: ChoiceFields) -> int:
    """How many tokens each choice may have, so that an answer with log-probabilities of all keeps to
    `max_answer_entries`."""
    each = 1 + (fields.alternatives or 0)
    return settings.max_answer_entries // (fields.choices_each * each)


def check_size(settings: Settings, fields: ChoiceFields, prompts: Prompts) -> None:
    """Raise a 400 if the answer may come to more entries than `max_answer_entries`."""
    alternatives = fields.alternatives
    listed = 0 if alternatives is None else fields.token_limit * len(prompts.ids)
    echoed_tokens = 0 if prompts.echo is None else sum(map(len, prompts.ids))
    tokens = fields.choices_each * (listed + echoed_tokens)
    each = 1 + (alternatives or 0)
    if tokens * each > settings.max_answer_entries:
        param = "n" if alternatives is None else "logprobs"
        raise APIError(
            400,
            f"{param}: {tokens} tokens in all, with {each} entries for each, are {tokens * each} entries; one answer "
            f"may have {settings.max_answer_entries} (max_answer_entries)",
            param=param,
        )


def with_defaults(fields: F, variant: Variant, *, but: Collection[str] = ()) -> F:
    """The fields with the variant's own sampling where the request says nothing. The variant has loaded.

    Args:
        but: fields that are left as they are.
    """
    silent = {
        name: value
        for name, value in variant.text.sampling.items()
        if name not in but and (name not in fields.model_fields_set or getattr(fields, name) is None)
    }
    return fields.model_copy(update=silent) if silent else fields


def generate_message(
    fields: SamplingFields,
    variant: Variant,
    prompt_ids: list[int],
    origin: Origin,
    *,
    choice: int = 0,
    saved: SavedState | None = None,
    grammar: str = "",
) -> Generate:
    """The message that has the engine generate. 400 for token ids that the model lacks, or for what a grammar does not
    go with. The variant has loaded.

    Args:
        prompt_ids: token ids that `encode_prompt` has checked.
        choice: which of the prompt's choices this is.
        saved: the state to go on from; None for an empty one.
        grammar: what the completion is held to (`structured.constraint`); empty for nothing.
    """
    if grammar:
        check_beside_grammar(fields, variant)
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
        priority=origin.priority,
        state_path=None if saved is None else str(saved.path),
        state_tokens=0 if saved is None else saved.header.tokens,
        cache_salt=origin.salt,
        grammar=grammar,
    )


def generate_messages(
    settings: Settings,
    fields: ChoiceFields,
    variant: Variant,
    prompts: Prompts,
    origin: Origin,
    *,
    grammar: str = "",
) -> list[Generate]:
    """A message for each choice: number p * n + i is the i-th of prompt p.

    Args:
        grammar: what each is held to (`structured.constraint`); empty for nothing.

    Raises:
        APIError: 400, the answer may come to more than `max_answer_entries`, or a field has token ids that the model
            lacks, or does not go with a grammar.
    """
    check_size(settings, fields, prompts)
    return [
        generate_message(fields, variant, ids, origin, choice=choice, saved=prompts.saved, grammar=grammar)
        for ids in prompts.ids
        for choice in range(fields.choices_each)
    ]
