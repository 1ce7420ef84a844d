"""Every measurement of several checkpoints, one after the other; at most two models are in memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from modeling.model import Model
from modeling.runtime import Runtime, compile_model
from pruning.calibration import WINDOW, Encoder, Text
from pruning.errors import PruningError
from pruning.evaluation.bits import BLOCK, LONGEST, BitsText, bits
from pruning.evaluation.identifiers import (
    RANGES,
    IdentifierRecall,
    Identifiers,
    find_identifiers,
    identifier_recall,
)
from pruning.evaluation.likelihood import TokenScores, check_vocabularies, compare, perplexity, token_scores
from pruning.evaluation.recall import Prompts, recall, recall_prompts
from pruning.evaluation.record import FORMAT, KIND, EvaluatedCheckpoint, Evaluation, environment
from pruning.evaluation.speed import BATCHES, Speed, decode_speed
from pruning.evaluation.states import rank, retrieval
from pruning.evaluation.windows import DEFAULT_TOKENS, evaluation_windows, long_windows
from pruning.progress import Bar
from pruning.record import recovery_tokens
from pruning.versions import versions

logger = logging.getLogger(__name__)

Part = Literal["perplexity", "recall", "identifiers", "rank", "retrieval", "speed", "bits"]
PARTS: tuple[Part, ...] = get_args(Part)
STATE_WINDOWS = 8
"""Windows that `rank` and `retrieval` look at."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure, and on what."""

    text: Text
    parts: Sequence[Part] = ("perplexity",)
    tokens: int = DEFAULT_TOKENS
    """How many tokens to score, from the front of the text; 0 for all of it."""
    window: int = WINDOW
    stride: int | None = None
    drift_window: int = LONGEST
    """Tokens of the windows that `bits` measures the drift on, if the text has them."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def evaluate_checkpoints(
    checkpoints: Sequence[Checkpoint], settings: EvaluationSettings, bar: Bar
) -> Evaluation:
    """Measure `settings.parts` of all checkpoints, the first being the baseline.

    Raises:
        PruningError: the text is too short, tokenizers differ, or a model gives NaN or Inf.
        CheckpointError: a checkpoint can't be loaded.
    """
    for checkpoint in checkpoints:
        checkpoint.check_tensors()
    baseline, *others = checkpoints
    inputs = _inputs(baseline, settings)
    for checkpoint in others:
        if not inputs.same_text(_inputs(checkpoint, settings, text_alone=True)):
            raise PruningError(
                f"{checkpoint.source} reads the text as other tokens than {baseline.source}; "
                "models of different tokenizers can't be compared token by token, evaluate them apart"
            )
    dense = _load(baseline, settings)
    entries = [_measure(baseline, dense, None, inputs, settings, bar)]
    for checkpoint in others:
        loaded = _load(checkpoint, settings)
        entries.append(_measure(checkpoint, loaded, dense, inputs, settings, bar))
        if "speed" in settings.parts:
            first, own = _speeds([dense, loaded], checkpoint.source, bar)
            entries[-1] = replace(entries[-1], speed=own)
            entries[0] = replace(entries[0], speed=entries[0].speed or first)
        del loaded  # before the next one is
    if "speed" in settings.parts and not others:
        (alone,) = _speeds([dense], baseline.source, bar)
        entries[0] = replace(entries[0], speed=alone)
    return Evaluation(
        KIND,
        FORMAT,
        versions(),
        environment(settings.device),
        settings.text.name,
        settings.text.sha256,
        settings.seed,
        entries,
    )


@dataclass
class _Loaded:
    """A model and what is kept of it for comparisons with others."""

    model: Model
    runtime: Runtime | None
    """The runtime that would serve it; None where no part needs one."""
    scores: TokenScores | None = None
    """Its scores of the windows, once they are measured."""


def _load(checkpoint: Checkpoint, settings: EvaluationSettings) -> _Loaded:
    """Compiled once at most: that moves the weights, and a second runtime would hold another copy of them."""
    model = checkpoint.load(device=settings.device)
    needed = {"bits", "speed"} & set(settings.parts)
    return _Loaded(model, compile_model(model) if needed else None)


@dataclass(frozen=True)
class _Inputs:
    """What models are given to read."""

    windows: Tensor
    long: Tensor | None
    """Windows for the drift with length; None where it is not measured."""
    prompts: Sequence[Prompts]
    identifiers: Identifiers | None
    """Those of the windows; None where no part reads them."""

    def same_text(self, other: "_Inputs") -> bool:
        if not self.windows.equal(other.windows):
            return False
        return self.long is None or other.long is None or self.long.equal(other.long)


def _inputs(checkpoint: Checkpoint, settings: EvaluationSettings, *, text_alone: bool = False) -> _Inputs:
    """What a checkpoint is given to read, in its tokens; with `text_alone`, only what `same_text` compares."""
    encoder, text, tokens = Encoder(checkpoint), settings.text, settings.tokens
    windows = evaluation_windows(encoder, text, tokens=tokens, window=settings.window, stride=settings.stride)
    long, asked, identifiers = None, [], None
    if "bits" in settings.parts:
        long = long_windows(encoder, text, tokens=tokens, longest=settings.drift_window, block=BLOCK)
    if not text_alone and {"recall", "bits"} & set(settings.parts):
        asked = recall_prompts(encoder, seed=settings.seed)
    if not text_alone and {"identifiers", "bits"} & set(settings.parts):
        identifiers = find_identifiers(encoder, text, windows, stride=settings.stride)
        if "identifiers" in settings.parts and not len(identifiers.rows):
            logger.warning(
                "note: identifiers are not measured: in %s of %d from %s none occurs again after %d tokens or more; "
                "take longer windows, more tokens or another text",
                counted(len(windows), "window"),
                windows.shape[1] - 1,
                text.name,
                RANGES[0][0],
            )
    return _Inputs(windows, long, asked, identifiers)


def _measure(
    checkpoint: Checkpoint,
    loaded: _Loaded,
    dense: _Loaded | None,
    inputs: _Inputs,
    settings: EvaluationSettings,
    bar: Bar,
) -> EvaluatedCheckpoint:
    """Measure all parts but speed of one checkpoint; `dense` is None for the baseline itself."""
    parts, name, model = settings.parts, checkpoint.source, loaded.model
    windows, prompts = inputs.windows, inputs.prompts
    entry = EvaluatedCheckpoint(
        name,
        checkpoint.sha256,
        list(checkpoint.spec.d_k),
        checkpoint.spec.state_bytes(0),
        checkpoint.method,
        list(checkpoint.spec.linear_layers),
        recovery_tokens=recovery_tokens(checkpoint),
    )
    if "perplexity" in parts and dense is None:
        with bar(f"perplexity of {name}", windows[:, 1:].numel()) as advance:
            found = perplexity(model, windows, stride=settings.stride, advance=advance)
        entry = replace(entry, perplexity=found)
    elif "perplexity" in parts:
        assert dense is not None
        with bar(f"perplexity and KL of {name}", 2 * windows[:, 1:].numel()) as advance:
            found, divergence = compare(model, dense.model, windows, stride=settings.stride, advance=advance)
        entry = replace(entry, perplexity=found, divergence=divergence)
    if "recall" in parts:
        with bar(f"recall of {name}", sum(p.ids.numel() for p in prompts)) as advance:
            entry = replace(entry, recall=recall(model, prompts, advance=advance))
    if "identifiers" in parts:
        entry = replace(entry, identifiers=_identifiers(name, loaded, dense, inputs, settings.stride, bar))
    read = windows[:STATE_WINDOWS, :-1]
    if "rank" in parts:
        with bar(f"rank of {name}", read.numel()) as advance:
            entry = replace(entry, rank=rank(model, read, advance=advance))
    if "retrieval" in parts:
        with bar(f"retrieval of {name}", read.numel()) as advance:
            entry = replace(entry, retrieval=retrieval(model, read, seed=settings.seed, advance=advance))
    if inputs.long is not None:
        text = BitsText(windows, settings.stride, inputs.long, prompts, inputs.identifiers)
        assert loaded.runtime is not None
        first = None if dense is None else dense.runtime
        with bar(f"states in fewer bits of {name}", text.tokens(alone=first is None)) as advance:
            entry = replace(entry, bits=bits(loaded.runtime, first, text, advance=advance))
    return entry


def _identifiers(
    name: str, loaded: _Loaded, dense: _Loaded | None, inputs: _Inputs, stride: int | None, bar: Bar
) -> list[IdentifierRecall]:
    """Recall of identifiers; the baseline reads the windows once, whatever number of models it is compared with."""
    assert inputs.identifiers is not None
    if dense is not None:
        check_vocabularies(loaded.model, dense.model)
    with bar(f"identifiers of {name}", inputs.windows[:, 1:].numel()) as advance:
        loaded.scores = token_scores(loaded.model, inputs.windows, stride=stride, advance=advance)
    return identifier_recall(inputs.identifiers, loaded.scores, None if dense is None else dense.scores)


def _speeds(models: Sequence[_Loaded], name: str, bar: Bar) -> list[list[Speed]]:
    """Per model, its speed at each batch size on the runtime that would serve it; the first is the baseline."""
    runtimes = [loaded.runtime for loaded in models if loaded.runtime is not None]
    with bar(f"speed of {name}", len(BATCHES)) as advance:
        by_batch = []
        for batch in BATCHES:
            by_batch.append(decode_speed(runtimes, batch))
            advance(1)
    return [list(speeds) for speeds in zip(*by_batch, strict=True)]
