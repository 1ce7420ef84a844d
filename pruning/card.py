"""The model card of a reduced checkpoint: README.md, as the hub shows it.

Names in it come from files that strangers wrote. They get into the text as code only, and into the front matter only if
they are what belongs there.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowkey.words import counted, writable
from modeling.checkpoint import REDUCTION, Checkpoint, open_checkpoint
from modeling.spec import AttentionSpec, ModelSpec, MoESpec
from pruning.capacity import GPU, LEGEND, capacity_lines, capacity_table
from pruning.companions import CARD, CARD_BYTES, CARD_MARK, SOURCE_CARD
from pruning.criteria import CRITERIA
from pruning.loaders import MODEL_TYPES, loaders, on_a_card
from pruning.record import is_masked
from pruning.views import apart_from_dense, change, span

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_LICENCE = re.compile(
    r"^(license|license_name|license_link):[ \t]*(['\"]?)([\w.:/#-]{1,200})\2[ \t]*$", re.MULTILINE
)
"""Lines of a card's front matter that say under which licence a model is."""
_LONGEST = 200
"""Characters of a name that are shown."""
_MOST = 8
"""Texts of a calibration that are named."""


def write_card(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the card of a reduced checkpoint that is otherwise complete.

    Args:
        record: what `state_reduction.json` says.
    """
    (directory / CARD).write_text(card(open_checkpoint(directory), record), encoding="utf-8")


def card(checkpoint: Checkpoint, record: Mapping[str, Any]) -> str:
    """The text of the card; as `write_card`."""
    licence = source_licence(checkpoint.path)
    parts = [
        *_front_matter(checkpoint, record, licence),
        CARD_MARK,
        "",
        f"# {name(record['source']['name'])}, {_title(checkpoint.spec, record)}",
        "",
        *_origin(checkpoint.spec, record),
        "",
        "## Quality",
        "",
        *_quality(record),
        "",
        "## What a request takes",
        "",
        *_capacity(checkpoint.spec, record),
        "",
        "## What runs it",
        "",
        *_runs(checkpoint),
        "",
        "## Source and licence",
        "",
        *_source(checkpoint, licence),
    ]
    return "\n".join(parts) + "\n"


def name(text: object) -> str:
    """A name from a stranger's file as a piece of code on one line, in which Markdown and HTML mean nothing."""
    line = " ".join(writable(text).split())
    shown = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return f"`{shown.replace('`', chr(39)) or ' '}`"


def source_licence(directory: Path) -> dict[str, str]:
    """What the front matter of the source's card says about its licence: `license`, `license_name`, `license_link`."""
    file = directory / SOURCE_CARD
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as f:
        text = f.read(CARD_BYTES)
    front = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    return {} if front is None else {key: value for key, _, value in _LICENCE.findall(front[1])}


def _front_matter(
    checkpoint: Checkpoint, record: Mapping[str, Any], licence: Mapping[str, str]
) -> Iterator[str]:
    """Lines of YAML, in which every value is JSON and so can't be anything but a string."""
    values = dict(licence)
    hub_id = record["source"].get("hub_id")
    if hub_id is not None and _HUB_ID.fullmatch(hub_id):
        values["base_model"] = hub_id
    if len(set(checkpoint.spec.d_k)) == 1:
        values["library_name"] = "transformers"
    values["pipeline_tag"] = "text-generation"
    yield "---"
    for key, value in values.items():
        yield f"{key}: {json.dumps(value)}"
    yield "tags:"
    for tag in ("linear-attention", "pruned", "lowkey", "masked" if is_masked(record) else "reduced-state"):
        yield f"- {json.dumps(tag)}"
    yield "---"


def _title(spec: ModelSpec, record: Mapping[str, Any]) -> str:
    before = span(record["source"]["d_k"])
    if is_masked(record):
        return f"{span(record['d_k'])} of {before} key channels, masked"
    return f"d_k {before} => {span(spec.d_k)}"


def _origin(spec: ModelSpec, record: Mapping[str, Any]) -> Iterator[str]:
    before, after = record["source"]["d_k"], record.get("d_k", spec.d_k)
    mixer = next(iter(spec.deltas.values()))
    layers = f"{counted(len(spec.deltas), 'linear-attention layer')} of {len(spec.layers)}"
    method = _word(record["method"])
    summary = f" ({CRITERIA[method].summary})" if method in CRITERIA else ""
    made_of, each = name(record["source"]["name"]), counted(mixer.num_k_heads, "key head")
    by_need = ", as many as it needed" if len(set(after)) > len(set(before)) else ""
    yield (
        f"Made of {made_of} (sha256 `{_hash(record['source']['sha256'])}`) by `lowkey-prune` with the method "
        f"`{method}`{summary}, seed {record['seed']}: each of the {each} of its {layers} keeps {span(after)} of its "
        f"{span(before)} key/query channels{by_need}."
    )
    if record.get("rotated") is True:
        yield "The channels that are kept are mixtures of the source's."
    reconstruction = record.get("reconstruction")
    others = [] if reconstruction is not None else ["values, gates and decays"]
    others += ["softmax attention"] if any(isinstance(m.mixer, AttentionSpec) for m in spec.layers) else []
    others += ["experts"] if any(isinstance(m.ffn, MoESpec) for m in spec.layers) else []
    if reconstruction is not None:
        yield (
            "What is left of them was then fitted, layer after layer, to what the source's layers give on "
            f"{counted(reconstruction['tokens'], 'token')}."
        )
    if others:
        yield f"Everything else is the source's: {', '.join(others)} and all other tensors."
    else:
        yield "All other tensors are the source's."
    if is_masked(record):
        yield ""
        yield (
            "**This is the masked form**: the other channels are zero and take their room, so that shapes and config "
            "are the source's and everything that loads the source loads this. It saves no memory; its quality is that "
            "of the sliced form but for the epsilon of the output norm."
        )
    yield ""
    if record["calibration"] is None:
        yield "The channels were chosen without any text."
        return
    yield f"The channels were chosen by calibration on {counted(record['calibration']['tokens'], 'token')}:"
    yield ""
    origins = record["calibration"]["origins"]
    for origin in origins[:_MOST]:
        yield (
            f"- {counted(origin['windows'], 'window')} of {origin['window_length']} tokens of {name(origin['text'])} "
            f"(sha256 `{_hash(origin['text_sha256'])}`), seed {origin['seed']}"
        )
    if len(origins) > _MOST:
        yield f"- and {len(origins) - _MOST} more, which {REDUCTION} lists"


def _quality(record: Mapping[str, Any]) -> Iterator[str]:
    evaluation, recovery = record["evaluation"], record.get("recovery")
    if evaluation is not None:
        before, after = (evaluation[which]["perplexity"] for which in ("dense", "reduced"))
        tokens = evaluation["reduced"].get("tokens")
        on = "" if tokens is None else f"{counted(tokens, 'token')} of "
        divergence = evaluation.get("divergence")
        apart = "" if divergence is None else f"; {apart_from_dense(divergence)}"
        text = name(evaluation["text"])
        yield f"Perplexity {_change(before, after)} on {on}{text}, which no channel was chosen by{apart}."
    if recovery is not None:
        measured = recovery["evaluation"]
        before, after = (measured[when]["perplexity"] for when in ("before", "after"))
        yield ("" if evaluation is None else "\n") + (
            f"Recovered: trained after that on {counted(recovery['tokens'], 'token')} "
            f"(`{_word(recovery['settings']['train'])}`); perplexity {_change(before, after)} on "
            f"{counted(measured['tokens'], 'token')} of {name(measured['text'])}."
        )
    if evaluation is None and recovery is None:
        yield "Not measured."
    yield ""
    yield (
        "Measure on what you will use it for: `lowkey-prune evaluate SOURCE DIR` gives perplexity, KL divergence, "
        "recall and more, side by side with the source."
    )


def _capacity(spec: ModelSpec, record: Mapping[str, Any]) -> Iterator[str]:
    before = spec.with_d_k(tuple(record["source"]["d_k"]))
    models = [before] if is_masked(record) else [before, spec]
    on_card = on_a_card(spec)
    header, rows = capacity_table([(span(model.d_k), model) for model in models], on_card=on_card)
    yield from _table(header, rows)
    yield ""
    if not on_card:
        yield "Computed from the shapes. No server runs this checkpoint on a GPU yet, so no requests are counted."
        return
    yield f"Computed from the shapes, for a server on an {GPU}. {LEGEND}"
    yield ""
    for line in capacity_lines(before):
        yield f"- {line}"


def _runs(checkpoint: Checkpoint) -> Iterator[str]:
    spec = checkpoint.spec
    if spec.family not in MODEL_TYPES:
        yield "Lowkey."
        return
    verdicts = loaders(checkpoint.config, spec)
    yield from _table(
        ["", "runs it", "how, or why not", "read in", "what was run"],
        [[v.loader.name, "yes" if v.runs else "no", v.how, v.loader.version, v.ran] for v in verdicts],
    )
    yield ""
    yield "DIR is this directory."
    how = {v.loader.name: v.how for v in verdicts if v.runs}
    for language, lines in _commands(spec, how):
        yield from ("", f"```{language}", *lines, "```")


def _commands(spec: ModelSpec, how: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Language and lines of what starts each loader that runs it; `how` is what it takes, by the loader's name."""
    if "transformers" in how:
        fla = "flash-linear-attention" in how["transformers"]
        yield (
            "python",
            [
                *(["import fla  # flash-linear-attention has the model"] if fla else []),
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                'tokenizer = AutoTokenizer.from_pretrained("DIR")',
                'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto", device_map="auto")',
            ],
        )
    if "vLLM" in how:
        flag = " --gdn-prefill-backend triton" if "--gdn-prefill-backend" in how["vLLM"] else ""
        yield "sh", ["# vLLM", f"vllm serve DIR{flag}"]
    elif "vLLM with Lowkey's plugin" in how:
        yield (
            "sh",
            [
                f"# vLLM with Lowkey's plugin, which has a kernel for d_k {span(spec.d_k)}",
                "pip install -e CHECKOUT_OF_LOWKEY --no-deps",
                "VLLM_PLUGINS=lowkey vllm serve DIR",
            ],
        )
    if "SGLang" in how:
        yield "sh", ["# SGLang", "python -m sglang.launch_server --model-path DIR"]
    if "mlx-lm" in how:
        yield "sh", ["# mlx-lm", "mlx_lm.server --model DIR"]
    if "llama.cpp" in how:
        yield (
            "sh",
            [
                "# llama.cpp, in its checkout",
                "python convert_hf_to_gguf.py DIR --outfile model.gguf",
                "llama-server -m model.gguf",
            ],
        )
    if "Lowkey" in how:
        yield "sh", ["# Lowkey", "lowkey-serve reduced=DIR"]


def _source(checkpoint: Checkpoint, licence: Mapping[str, str]) -> Iterator[str]:
    there = (checkpoint.path / SOURCE_CARD).is_file()
    if there:
        yield f"The source's own card is [{SOURCE_CARD}]({SOURCE_CARD}). What it measured was measured of the source."
    if "license" in licence:
        yield f"The licence is the source's: {name(licence.get('license_name', licence['license']))}."
    else:
        where = "its card names none that could be read" if there else "it came without a card"
        yield f"The licence of the source applies; {where}, so look where the source is from."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _change(before: float, after: float) -> str:
    return f"{before:.3f} => {after:.3f} ({change(before, after)})"


def _hash(sha256: str) -> str:
    """The beginning of a hash, or of what says that it is one."""
    return re.sub(r"[^0-9a-f]", "", sha256)[:12]


def _word(text: str) -> str:
    """A method's or an option's name; from a stranger's file, what is left of it."""
    return re.sub(r"[^\w-]", "", text)[:40]
