"""Recovery: dense and reduced checkpoint in, trained checkpoint out; and the control that makes it comparable."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowkey.files import Found, check_writable, write_or_keep
from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import (
    FLOATS,
    HEAD,
    REDUCTION,
    Checkpoint,
    export_tensors,
    open_checkpoint,
    write_safetensors,
)
from modeling.model import Model
from pruning.batches import Batches, token_stream
from pruning.calibration import WINDOW, Encoder, Text
from pruning.card import write_card
from pruning.companions import RECOVERY, Companions
from pruning.errors import PruningError
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows
from pruning.export import check_written
from pruning.finite import check_finite, finite
from pruning.fused import training_rule
from pruning.interrupts import going_on_from
from pruning.record import record_of
from pruning.reduction import check_output
from pruning.surgery import check_runs
from pruning.training import OnStep, Result, TrainingSettings, check_saved, heldout_loss, no_report, train
from pruning.versions import versions

FORMAT = 1
"""Version of the form of `recovery.json`."""


@dataclass(frozen=True)
class Run:
    """A recovery that can start: everything was checked but the memory."""

    dense: Checkpoint
    reduced: Checkpoint
    out: Path
    settings: TrainingSettings
    batches: Batches
    heldout: Tensor
    """Held-out windows, int64 `[count, window + 1]`."""
    text: Text
    heldout_text: Text
    control: bool
    replaces: Found | None
    """What is at the output's place and may be replaced; None if nothing is."""

    @property
    def student(self) -> Checkpoint:
        """The checkpoint that is trained."""
        return self.dense if self.control else self.reduced

    @property
    def teacher(self) -> Checkpoint | None:
        return None if self.control or not self.settings.kl_weight else self.dense

    @property
    def saved(self) -> Path:
        """The file that keeps the progress until the output is there."""
        return progress_file(self.out)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "settings": asdict(self.settings),
            "student": self.student.sha256,
            "teacher": None if self.teacher is None else self.teacher.sha256,
            "tokens": self.batches.sha256,
            "heldout": self.heldout_text.sha256,
            "heldout_tokens": self.heldout[:, 1:].numel(),
        }

    @property
    def steps_done(self) -> int:
        """Steps that an earlier, interrupted run has done. Raises PruningError if its settings were others."""
        return check_saved(self.saved, self.fingerprint)


def progress_file(out: Path) -> Path:
    """The file in which a recovery into `out` keeps its progress."""
    return out.with_name(f"{out.name}.progress.safetensors")


def plan(
    dense: Checkpoint,
    reduced: Checkpoint,
    out: Path,
    settings: TrainingSettings,
    text: Text,
    heldout: Text,
    *,
    heldout_tokens: int = DEFAULT_TOKENS,
    heldout_window: int = WINDOW,
    control: bool = False,
    overwrite: bool = False,
) -> Run:
    """Check everything and read the text.

    Args:
        heldout_tokens, heldout_window: How many tokens to measure on, and in windows of how many, as in
            `evaluation_windows`.
        control: train the dense checkpoint instead, on the same tokens with the same settings, without a teacher.

    Raises:
        PruningError: `reduced` was not cut from `dense` or is recovered already, the output is refused, a weight is NaN
            or Inf, or a text is too short.
        CheckpointError: the weights of one are not what its config says.
        OutputError: the output can't be written.
    """
    replaces = check_output((dense, reduced), out, overwrite=overwrite, ours=RECOVERY)
    check_writable(progress_file(out))
    for checkpoint in (dense, reduced):
        checkpoint.check_tensors()
    _check_pair(dense, reduced)
    for checkpoint in (dense, reduced):
        check_finite(checkpoint)
    if control and not settings.ce_weight:
        raise PruningError("ce_weight=0.0 leaves a control, which has no teacher, nothing to learn from")
    encoder = Encoder(dense)
    # Two windows of slack, so that no token is read twice while the text suffices.
    stream = token_stream(
        encoder,
        text,
        tokens=settings.steps * settings.tokens_per_step + 2 * settings.window + 1,
        seed=settings.seed,
    )
    run = Run(
        dense,
        reduced,
        out,
        settings,
        Batches(stream, window=settings.window, batch=settings.batch, seed=settings.seed),
        evaluation_windows(encoder, heldout, tokens=heldout_tokens, window=heldout_window),
        text,
        heldout,
        control,
        replaces,
    )
    check_saved(run.saved, run.fingerprint)
    return run


def recover(run: Run, device: torch.device, *, on_step: OnStep = no_report) -> dict[str, Any]:
    """Train, write, reload and measure. The output appears only once it is whole; killed before, call it again.

    Returns:
        The content of `recovery.json`; docs/pruning.md lists the keys.

    Raises:
        PruningError, CheckpointError: training diverged, or the result does not load and run.
        OutputError: the output can't be written or is there by now; the message says where the result is instead.
    """
    with going_on_from(run.saved):
        model = run.student.load(device=device)
        teacher = None if run.teacher is None else run.teacher.load(device=device)
        result = train(
            model,
            teacher,
            run.batches,
            run.heldout,
            run.settings,
            saved=run.saved,
            fingerprint=run.fingerprint,
            rule=training_rule(device),
            on_step=on_step,
        )
        del teacher
        return write_or_keep(run.out, lambda out: _write(run, model, result, out, device))


def _write(run: Run, model: Model, result: Result, out: Path, device: torch.device) -> dict[str, Any]:
    with new_directory(out, replaces=run.replaces) as directory:
        companions = Companions(run.student)
        companions.copy(directory)
        write_json(directory / "config.json", companions.without_missing_code(run.student.config))
        write_safetensors(directory, _as_stored(model, run.student))
        check_written(run.student, directory)
        check_runs(directory, run.student.spec, run.student.source)
        after = heldout_loss(open_checkpoint(directory).load(device=device), run.heldout)
        record = _record(run, result.trained_parameters, result.curve[0].heldout_loss, after)
        if run.student.reduction is not None:
            reduction = {**run.student.reduction, "recovery": record}
            write_json(directory / REDUCTION, reduction)
            write_card(directory, reduction)
        record = {**record, "curve": [asdict(point) for point in result.curve]}
        write_json(directory / RECOVERY, record)
    return record


def _as_stored(model: Model, source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters in the dtypes and shapes of the checkpoint that they came from, and what of it is no part
    of our model, as it is.

    Raises:
        PruningError: one is NaN or Inf, or is not finite in the checkpoint's dtype.
    """
    trained = f"{source.source}: after training, in the checkpoint's own dtype"
    for name, tensor in export_tensors(model, source.family, source.files):
        dtype, shape = source.dtype_and_shape(name)
        stored = finite(tensor.detach().to("cpu", FLOATS[dtype]).view(shape), name, trained)
        yield name, stored
        if name == source.name_of("embeddings.weight") and model.spec.tie_embeddings and HEAD in source.files:
            yield HEAD, stored.clone()  # what is stored as a copy stays one, in the same dtype
    for name in source.files:
        if not source.is_ours(name):
            yield name, source.tensor(name)


def _record(run: Run, trained_parameters: int, before: float, after: float) -> dict[str, Any]:
    settings = run.settings
    batches = settings.steps * settings.accumulate

    def named(checkpoint: Checkpoint) -> dict[str, Any]:
        return {"name": checkpoint.source, "sha256": checkpoint.sha256, "d_k": list(checkpoint.spec.d_k)}

    return {
        "format": FORMAT,
        "control": run.control,
        "dense": named(run.dense),
        "reduced": named(run.reduced),
        "distilled": run.teacher is not None,
        "tokens": settings.steps * settings.tokens_per_step,
        "steps": settings.steps,
        "epochs": round(run.batches.epochs(batches), 3),
        "trained_parameters": trained_parameters,
        "settings": asdict(settings),
        "text": {
            "text": run.text.name,
            "text_sha256": run.text.sha256,
            "tokens_sha256": run.batches.sha256,
        },
        "evaluation": {
            "text": run.heldout_text.name,
            "text_sha256": run.heldout_text.sha256,
            "tokens": run.heldout[:, 1:].numel(),
            "window": run.heldout.shape[1] - 1,
            "before": {"loss": before, "perplexity": math.exp(before)},
            "after": {"loss": after, "perplexity": math.exp(after)},
        },
        "versions": versions(),
    }


def _check_pair(dense: Checkpoint, reduced: Checkpoint) -> None:
    record = record_of(reduced)
    if record is None:
        raise PruningError(f"{reduced.source} holds no {REDUCTION}; give a checkpoint that prune has made")
    if "recovery" in record:
        raise PruningError(
            f"{reduced.source} is recovered already; start from the reduced checkpoint that it came from"
        )
    cut_from = record["source"]
    if cut_from["sha256"] != dense.sha256:
        raise PruningError(
            f"{reduced.source} was cut from {cut_from['name']} with sha256 {cut_from['sha256']}, "
            f"not from {dense.source} with sha256 {dense.sha256}"
        )
