"""Which software runs a checkpoint of given key widths: one table, for `prune --dry-run` and the model card.

Each loader has one rule, which was read in its source in the version that it names. What was also run is said beside
it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowkey import __version__

FLA = ("gated_deltanet", "delta_net")
"""Model types of flash-linear-attention."""
QWEN = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
OLMO = "olmo_hybrid"
MODEL_TYPES = (*FLA, *QWEN, OLMO)


@dataclass(frozen=True)
class Loader:
    """A program that loads checkpoints."""

    name: str
    version: str
    """What the rule was read against."""
    ran: str
    """What of it was run, and on what."""
    rule: Callable[[str, int, int], tuple[bool, str]]
    """Model type, d_k and d_v of all layers -> whether it runs, and what that takes, or why it does not."""
    any_widths: bool = False
    """Whether each layer may have a d_k of its own."""


@dataclass(frozen=True)
class Verdict:
    """What one loader does with a checkpoint."""

    loader: Loader
    runs: bool
    how: str
    """What it takes, such as a flag, or why it does not run; empty if it runs as it is."""


def _block(width: int) -> int:
    """The smallest power of two that holds so many channels: the width of a Triton kernel's block."""
    return 1 << (width - 1).bit_length()


def _transformers(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    return True, "with flash-linear-attention, on a GPU" if model_type in FLA else ""


def _vllm(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    if model_type in FLA:
        return False, "it has no such model"
    since = "from 0.27 on" if model_type.endswith("_text") else ""
    if model_type == OLMO or d_k == d_v == 128:
        return True, since
    if _block(d_k) != _block(d_v):
        return (
            False,
            f"its prefill kernel does not compile for d_k {d_k} and d_v {d_v}; Lowkey's plugin brings one",
        )
    flag = "on Hopper it needs --gdn-prefill-backend triton"
    return True, f"{since}; {flag}" if since else flag


def _vllm_with_plugin(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    runs, how = _vllm(model_type, d_k, d_v)
    if model_type in FLA:
        return runs, how
    return True, "from 0.27 on" if model_type.endswith("_text") else ""


def _sglang(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    if model_type not in QWEN:
        return False, "it has no such model"
    if model_type == "qwen3_next" and d_k != _block(d_k):
        return False, f"its kernel for Qwen3-Next takes powers of two, and d_k is {d_k}"
    return True, "with full_attention_interval in config.json, as it reads no layer_types"


def _mlx(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    if model_type in FLA:
        return False, "it has no such model"
    if model_type.endswith("_text"):
        return False, f"it knows no model type {model_type}, only configs with a text_config"
    return True, "" if d_k % 32 == 0 else "slowly: its Metal kernel takes multiples of 32"


def _llama_cpp(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    if model_type not in QWEN:
        return False, "it has no such model"
    if d_k != d_v:
        return (
            False,
            f"its states are square, and d_k {d_k} is not d_v {d_v}; --export masked keeps the shapes",
        )
    return True, "converted to GGUF"


def _lowkey(model_type: str, d_k: int, d_v: int) -> tuple[bool, str]:
    if model_type in FLA:
        return True, ""
    return False, "lowkey-prune evaluates and recovers it, and lowkey-serve has no softmax attention yet"


VLLM_VERSIONS = "0.26.0 to 0.33.0"
LOADERS = (
    Loader("transformers", "5.24", "on a CPU, flash-linear-attention's models on a GPU", _transformers),
    Loader("vLLM", VLLM_VERSIONS, "0.26.0 on an H200 with d_k 128; with 64 it fails as said", _vllm),
    Loader("vLLM with Lowkey's plugin", VLLM_VERSIONS, "0.26.0 on an H200 with d_k 64", _vllm_with_plugin),
    Loader("SGLang", "0.5.23", "nothing", _sglang),
    Loader("mlx-lm", "0.32.2", "on a CPU", _mlx),
    Loader("llama.cpp", "0c1e57098 of October 2026", "nothing", _llama_cpp),
    Loader("Lowkey", __version__, "on a CPU and a GPU", _lowkey, any_widths=True),
)


def loaders(model_type: str, d_k: Sequence[int], d_v: int) -> list[Verdict]:
    """What each loader does with a checkpoint whose linear layers have these widths, in the order of `LOADERS`.

    `model_type` is config.json's own, at its top level; `d_k` has one width per linear layer, or a single one.
    Raises ValueError for a model type that is not in `MODEL_TYPES`, and for no or impossible widths.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if not d_k or min(*d_k, d_v) < 1:
        raise ValueError(f"d_k {[*d_k]} and d_v {d_v} must be widths of 1 or more")
    return [_verdict(loader, model_type, d_k, d_v) for loader in LOADERS]


def _verdict(loader: Loader, model_type: str, d_k: Sequence[int], d_v: int) -> Verdict:
    results = [loader.rule(model_type, width, d_v) for width in sorted(set(d_k))]
    refused = [how for runs, how in results if not runs]
    if len(results) > 1 and not loader.any_widths and not refused:
        refused = ["it has one d_k for all layers"]
    return Verdict(loader, not refused, refused[0] if refused else results[0][1])


def warnings(model_type: str, d_k: Sequence[int], d_v: int) -> Iterator[str]:
    """Lines to print before the work: where this reduction takes something away that the model had.

    Those are the loaders that run the model with a d_k as wide as its d_v, and with these d_k do not, or need more.
    """
    widths = sorted(set(d_k))
    label = f"d_k {widths[0]}" if len(widths) == 1 else f"d_k {widths[0]} to {widths[-1]}"
    before = {v.loader.name: v for v in loaders(model_type, [d_v], d_v)}
    for verdict in loaders(model_type, d_k, d_v):
        name = verdict.loader.name
        if before[name].runs and (verdict.runs, verdict.how) != (True, before[name].how):
            does = "runs it" if verdict.runs else "does not run it"
            yield f"note: {label}: {name} {verdict.loader.version} {does}: {verdict.how} (docs/hybrids.md)"
