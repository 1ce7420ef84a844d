"""From a prompt to token ids that a variant takes."""

from collections.abc import Iterable

from server.api.http.errors import APIError
from server.api.serving.variants import Variant
from server.text.tokenizer import encode


async def encode_prompt(
    variant: Variant,
    prompt: str | list[int],
    max_tokens: int,
    *,
    before: int = 0,
    param: str = "prompt",
    special: bool = True,
    last: int | None = None,
) -> list[int]:
    """Token ids of the prompt. 400 if it is empty, has ids that the model lacks, or leaves no room.

    Args:
        before: tokens that a saved state stands for.
        param: the field that the prompt comes from.
        special: whether the tokenizer adds its special tokens to a text.
        last: keep only so many tokens of the prompt's end; -1: as many as leave room for max_tokens.
    """
    limit = variant.info.context_length
    if last == -1:
        last = max(limit - before - max_tokens, 1)
    if isinstance(prompt, str):
        # No need to tokenise what can't fit.
        least = len(prompt) // variant.text.longest_token
        if least > limit and last is None:
            raise _too_long(variant, f"the prompt has at least {least}", param)
        ids = await encode(variant.text.tokenizer, prompt, special=special)
    else:
        ids = prompt
    if last is not None:
        ids = ids[-last:]
    if not ids:
        raise APIError(400, f"{param}: is empty; at least one token is needed", param=param)
    length = before + len(ids)
    if length + max_tokens > limit:
        at_fault = "max_tokens" if length < limit else param
        counts = f"the prompt has {length} and max_tokens is {max_tokens}, {length + max_tokens} together"
        raise _too_long(variant, counts, at_fault)
    check_vocabulary(ids, variant, param)  # for a text too: a tokenizer may know more tokens than the model
    return ids


def check_vocabulary(ids: Iterable[int], variant: Variant, param: str) -> None:
    """400 for a token id that the model lacks; `param` is the field that has it. The variant has loaded."""
    largest, vocab = max(ids, default=-1), variant.info.vocab_size
    if largest >= vocab:
        message = f"{param}: token id {largest} is not below the vocabulary size {vocab}"
        raise APIError(400, message, param=param)


def _too_long(variant: Variant, counts: str, param: str) -> APIError:
    variant.metrics.on_rejected("too_long")
    limit = variant.info.context_length
    message = f"prompt and max_tokens: the context length is {limit} tokens, but {counts}"
    return APIError(400, message, param=param)
