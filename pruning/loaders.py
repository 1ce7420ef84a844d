"""Which software runs a checkpoint: one table, for `prune --dry-run` and the model card.

Each loader has one rule, which was read in its source in the version that it names. What was also run is said beside
it, by model type.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lowkey import __version__
from modeling.families import Config
from modeling.families.delta_net import DeltaNet
from modeling.families.gated_deltanet import GatedDeltaNet
from modeling.families.olmo_hybrid import OlmoHybrid
from modeling.families.qwen import Qwen
from modeling.spec import ModelSpec, MoESpec

FLA = (*GatedDeltaNet.model_types, *DeltaNet.model_types)
"""Model types of flash-linear-attention."""
QWEN = Qwen.model_types
OLMO = OlmoHybrid.model_types
MODEL_TYPES = (*FLA, *QWEN, *OLMO)


@dataclass(frozen=True)
class Shapes:
    """What the rules look at; `d_k` and `d_v` are those of all linear layers."""

    model_type: str
    d_k: int
    d_v: int
    sglang: str
    """Why SGLang would take the layers for others than they are; empty if it does not."""


@dataclass(frozen=True)
class Loader:
    """A program that loads checkpoints."""

    name: str
    version: str
    """What the rule was read against."""
    rule: Callable[[Shapes], tuple[bool, str]]
    """Whether it runs such a checkpoint, and what that takes, or why it does not."""
    ran: Mapping[str, str]
    """What of it was run, and on what, by model type; of all others nothing was."""
    any_widths: bool = False
    """Whether each layer may have a d_k of its own."""


@dataclass(frozen=True)
class Verdict:
    """What one loader does with a checkpoint."""

    loader: Loader
    runs: bool
    how: str
    """What it takes, such as a flag, or why it does not run; empty if it runs as it is."""
    ran: str
    """What of the loader was run with this model type."""


def _block(width: int) -> int:
    """The smallest power of two that holds so many channels: the width of a Triton kernel's block."""
    return 1 << (width - 1).bit_length()


def _transformers(shapes: Shapes) -> tuple[bool, str]:
    return True, "with flash-linear-attention, on a GPU" if shapes.model_type in FLA else ""


def _vllm(shapes: Shapes) -> tuple[bool, str]:
    model_type, d_k, d_v = shapes.model_type, shapes.d_k, shapes.d_v
    if model_type in FLA:
        return False, "it has no such model"
    since = "from 0.27 on" if model_type.endswith("_text") else ""
    if model_type in OLMO or d_k == d_v == 128:
        return True, since
    if _block(d_k) != _block(d_v):
        return (
            False,
            f"its prefill kernel does not compile for d_k {d_k} and d_v {d_v}; Lowkey's plugin brings one",
        )
    flag = "on Hopper it needs --gdn-prefill-backend triton"
    return True, f"{since}; {flag}" if since else flag


def _vllm_with_plugin(shapes: Shapes) -> tuple[bool, str]:
    if shapes.model_type in FLA:
        return _vllm(shapes)
    return True, "from 0.27 on" if shapes.model_type.endswith("_text") else ""


def _sglang(shapes: Shapes) -> tuple[bool, str]:
    if shapes.model_type not in QWEN:
        return False, "it has no such model"
    if shapes.model_type == "qwen3_next" and shapes.d_k != _block(shapes.d_k):
        return False, f"its kernel for Qwen3-Next takes powers of two, and d_k is {shapes.d_k}"
    return not shapes.sglang, shapes.sglang


def _mlx(shapes: Shapes) -> tuple[bool, str]:
    if shapes.model_type in FLA:
        return False, "it has no such model"
    if shapes.model_type.endswith("_text"):
        return False, f"it knows no model type {shapes.model_type}, only configs with a text_config"
    return True, "" if shapes.d_k % 32 == 0 else "slowly: its Metal kernel takes multiples of 32"


def _llama_cpp(shapes: Shapes) -> tuple[bool, str]:
    d_k, d_v = shapes.d_k, shapes.d_v
    if shapes.model_type not in QWEN:
        return False, "it has no such model"
    if d_k != d_v:
        return (
            False,
            f"its states are square, and d_k {d_k} is not d_v {d_v}; --export masked keeps the shapes",
        )
    return True, "converted to GGUF"


def _lowkey(shapes: Shapes) -> tuple[bool, str]:
    return True, "" if shapes.model_type in FLA else "lowkey-serve on a CPU; on a GPU not yet"


VLLM_VERSIONS = "0.26.0 to 0.33.0"
_TINY = "tiny checkpoints, dense and reduced, on a CPU"
LOADERS = (
    Loader(
        "transformers",
        "5.24",
        _transformers,
        dict.fromkeys(FLA, "on a GPU") | dict.fromkeys((*QWEN, *OLMO), _TINY),
    ),
    Loader(
        "vLLM", VLLM_VERSIONS, _vllm, {"qwen3_5": "0.26.0 on an H200: d_k 128 runs, and 64 fails as said"}
    ),
    Loader(
        "vLLM with Lowkey's plugin",
        VLLM_VERSIONS,
        _vllm_with_plugin,
        {"qwen3_5": "0.26.0 on an H200: d_k 64 runs"},
    ),
    Loader("SGLang", "0.5.23", _sglang, {}),
    Loader("mlx-lm", "0.32.2", _mlx, dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next", *OLMO), _TINY)),
    Loader("llama.cpp", "0c1e57098 of October 2026", _llama_cpp, {}),
    Loader(
        "Lowkey",
        __version__,
        _lowkey,
        dict.fromkeys(FLA, "on a CPU and a GPU") | dict.fromkeys((*QWEN, *OLMO), _TINY),
        any_widths=True,
    ),
)


def loaders(config: Config, spec: ModelSpec) -> list[Verdict]:
    """What each loader does with a checkpoint, in the order of `LOADERS`.

    Args:
        config: its config.json, in which d_k may be another.
        spec: its shapes; linear layers may differ in d_k.

    Raises:
        ValueError: a model type that is not in `MODEL_TYPES`.
    """
    if spec.family not in MODEL_TYPES:
        raise ValueError(f"model_type {spec.family!r} is not one of {', '.join(MODEL_TYPES)}")
    shapes = [
        Shapes(spec.family, d_k, next(iter(spec.deltas.values())).d_v, _sglang_layers(config, spec))
        for d_k in sorted(set(spec.d_k))
    ]
    return [_verdict(loader, shapes) for loader in LOADERS]


def _verdict(loader: Loader, shapes: list[Shapes]) -> Verdict:
    results = [loader.rule(s) for s in shapes]
    refused = [how for runs, how in results if not runs]
    if len(results) > 1 and not loader.any_widths and not refused:
        refused = ["it has one d_k for all layers"]
    ran = loader.ran.get(shapes[0].model_type, "nothing")
    return Verdict(loader, not refused, refused[0] if refused else results[0][1], ran)


def _sglang_layers(config: Config, spec: ModelSpec) -> str:
    """Why SGLang would take the layers for others than they are; empty if it does not."""
    if spec.family == "qwen3_next" and not all(isinstance(m.ffn, MoESpec) for m in spec.layers):
        return "its Qwen3-Next has experts in every layer"
    layers = range(len(spec.layers))
    softmax = [i for i in layers if i not in spec.deltas]
    if not softmax:
        return ""
    why, needed = "it reads full_attention_interval and no layer_types, and", softmax[0] + 1
    if softmax != [i for i in layers if (i + 1) % needed == 0]:
        return f"{why} no interval gives this model's order of layers"
    inner = config.get("text_config")
    found = (inner if isinstance(inner, Mapping) else config).get("full_attention_interval")
    if found is None:
        return f"{why} config.json has none: it needs full_attention_interval {needed}"
    return "" if found == needed else f"{why} config.json says {found!r:.20} where its layers need {needed}"


def on_a_card(spec: ModelSpec) -> bool:
    """Whether any server runs this model on a GPU; only hybrids whose linear layers differ in d_k have none."""
    return len(set(spec.d_k)) == 1 or spec.family in FLA


def uneven(spec: ModelSpec) -> str:
    """What runs this model where its linear layers differ in d_k, in words."""
    if spec.family in FLA:
        return "layers differ in d_k: Lowkey runs this, stock loaders refuse it"
    return (
        "layers differ in d_k: Lowkey runs this, on a CPU only, and stock loaders refuse it; --export masked keeps "
        "such widths in a checkpoint that they read"
    )


def warnings(config: Config, before: ModelSpec, after: ModelSpec) -> Iterator[str]:
    """Lines to print before the work: where a reduction takes something away that the model had.

    Those are the loaders that run the model `before`, and `after` do not, or need more.
    """
    if before.family not in MODEL_TYPES:
        return
    widths = sorted(set(after.d_k))
    label = f"d_k {widths[0]}" if len(widths) == 1 else f"d_k {widths[0]} to {widths[-1]}"
    for was, now in zip(loaders(config, before), loaders(config, after), strict=True):
        if was.runs and (now.runs, now.how) != (True, was.how):
            does = "runs it" if now.runs else "does not run it"
            yield f"note: {label}: {now.loader.name} {now.loader.version} {does}: {now.how} (docs/hybrids.md)"
