"""What a model's shapes mean for whoever serves it: bytes of a request, and how many requests one card holds."""

from collections.abc import Iterator, Sequence

import torch

from lowkey.words import counted, in_units
from modeling.families import FAMILIES
from modeling.model import Model
from modeling.spec import STATE_DTYPES, AttentionSpec, ModelSpec, StateDType, StateTypes

GPU = "80 GB card"
GPU_BYTES = int(0.9 * 78 * 2**30)
"""Bytes that a server uses of such a card: 78 GiB are there, and vLLM takes 0.9 of them unless it is told otherwise."""
LENGTHS = (0, 1024, 4096, 16384)
"""Lengths of requests that are counted, in tokens."""
_BLOCK = 16
"""vLLM's blocks are multiples of so many tokens."""


def served(dtype: StateDType = "float32") -> StateTypes:
    """The types in which a server of bfloat16 weights keeps a request: the states of linear layers in `dtype`, the
    inputs of convolutions and the KV cache in bfloat16."""
    return StateTypes.named(dtype, torch.bfloat16)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(spec).parameters())


def weights_bytes(spec: ModelSpec) -> int:
    """Bytes of the model's parameters in bfloat16."""
    return 2 * parameter_count(spec)


def block_size(spec: ModelSpec, dtype: StateDType = "float32") -> int | None:
    """Tokens of a block of vLLM's KV cache, which is also the grain of its prefix cache: a shorter common beginning is
    not found there. None for a model without softmax attention.

    A block of a softmax attention layer has to hold no fewer bytes than the state of a linear layer (vLLM 0.33,
    platforms/interface.py, `_align_hybrid_block_size`).
    """
    types = served(dtype)
    a_token = max(
        (m.mixer.state_bytes(1, types) for m in spec.layers if isinstance(m.mixer, AttentionSpec)), default=0
    )
    if not a_token:
        return None
    state = max(mixer.state_bytes(0, types) for mixer in spec.deltas.values())
    return _BLOCK * -(-state // (_BLOCK * a_token))


def requests_that_fit(spec: ModelSpec, tokens: int, left: int) -> int:
    """How many requests of `tokens` tokens fit into `left` bytes, with states in float32 and their KV cache counted."""
    return left // spec.state_bytes(tokens, served())


def gain(before: ModelSpec, after: ModelSpec, tokens: int) -> float:
    """How many times as many requests of `tokens` tokens fit into the same memory."""
    return before.state_bytes(tokens, served()) / after.state_bytes(tokens, served())


def narrower(spec: ModelSpec) -> list[ModelSpec]:
    """The model with three quarters, half and a quarter of its d_k."""
    shares = ((3, 4), (1, 2), (1, 4))
    widths = dict.fromkeys(tuple(max(1, d_k * a // b) for d_k in spec.d_k) for a, b in shares)
    return [spec.with_d_k(d_k) for d_k in widths if d_k != spec.d_k]


def capacity_lines(spec: ModelSpec) -> Iterator[str]:
    """What is the same whatever is removed: the KV cache, and what weights leave of a card.

    Weights lose rows with d_k, so those of the dense model stand for all.
    """
    kv, state = spec.kv_bytes_per_token(served()), spec.state_bytes(0, served())
    if kv:
        yield (
            f"KV cache: {counted(kv, 'byte')} a token in bfloat16, which is not reduced; "
            f"the state is as much as that of {counted(round(state / kv), 'token')}"
        )
    weights = weights_bytes(spec)
    others = [f"{prefix}*" for prefix in FAMILIES[spec.family].ignored]
    without = f" (without {' and '.join(others)}, where there are any)" if others else ""
    yield (
        f"weights: {_rounded(parameter_count(spec))} parameters, {_gib(weights)} in bfloat16{without}; {_left(weights)}"
    )


def _left(weights: int) -> str:
    of = f"the {_gib(GPU_BYTES)} that a server uses of an {GPU}"
    if weights < GPU_BYTES:
        return f"they leave {_gib(GPU_BYTES - weights)} of {of} to requests"
    return f"more than {of}: how many requests fit is given as a multiple only, for any memory that is left"


LEGEND = (
    "vLLM's block: tokens, the grain of its prefix cache. Requests: how many fit at so many tokens each, with their "
    "KV cache and states in float32."
)


def capacity_table(
    models: Sequence[tuple[str, ModelSpec]], *, on_card: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a column for each of the models, which have names and differ in d_k, beside one of labels.

    The first model is what the others are compared with. Requests hold their state in float32 and their KV cache, on a
    card of `GPU_BYTES` without the first model's weights; where those do not fit, only multiples are given.

    Args:
        on_card: whether a server runs them all on a GPU; without one there are states, and no requests to count.
    """
    first = models[0][1]
    left = GPU_BYTES - weights_bytes(first)
    rows = [
        [f"state in {dtype}", *(in_units(spec.state_bytes(0, served(dtype))) for _, spec in models)]
        for dtype in STATE_DTYPES
    ]
    if on_card and first.kv_bytes_per_token(served()):
        rows.append(["vLLM's block", *(f"{block_size(spec):,} tokens" for _, spec in models)])
        rows += [
            [
                f"requests at {_thousands(tokens)}",
                *(_fits(first, spec, tokens, left) for _, spec in models),
            ]
            for tokens in LENGTHS
        ]
    elif on_card:
        rows.append(["requests", *(_fits(first, spec, 0, left) for _, spec in models)])
    return ["", *(f"d_k {name}" for name, _ in models)], rows


def _fits(first: ModelSpec, spec: ModelSpec, tokens: int, left: int) -> str:
    multiple = f"{gain(first, spec, tokens):.2f}x"
    if left <= 0:
        return multiple
    count = requests_that_fit(spec, tokens, left)
    return f"{count:,}" if spec is first or not count else f"{count:,} ({multiple})"


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens else "0"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _rounded(count: int) -> str:
    for unit, factor in (("billion", 10**9), ("million", 10**6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:,}"
