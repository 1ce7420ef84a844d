"""`lowkey-prune recover`: dense and reduced checkpoint -> reduced checkpoint, trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from lowkey.publishing import sole_user
from lowkey.words import counted
from pruning.calibration import WINDOW
from pruning.commands.calibrate import tell
from pruning.commands.console import err_console, out_console
from pruning.companions import Companions
from pruning.estimate import (
    disk_lines,
    evaluation_seconds,
    shape_lines,
    stored_bytes,
    time_line,
    training_line,
    training_seconds,
)
from pruning.evaluation import DEFAULT_TOKENS
from pruning.memory import Memory, check_fits, training_memory
from pruning.options import (
    Device,
    Heldout,
    HeldoutTokens,
    Overwrite,
    TextFiles,
    WindowLength,
    checkpoint_named,
    device_named,
    text_of,
)
from pruning.progress import Busy, training_bar
from pruning.recovery import Run, plan
from pruning.recovery import recover as run_recovery
from pruning.trainable import TrainableSet, trained_count
from pruning.training import TrainingSettings
from pruning.views import change


def recover(
    dense: Annotated[str, typer.Argument(help="The checkpoint that REDUCED was cut from; the teacher.")],
    reduced: Annotated[str, typer.Argument(help="Reduced checkpoint to train.")],
    out: Annotated[Path, typer.Argument(help="Directory of the recovered checkpoint.")],
    tokens: Annotated[int, typer.Option(help="Training tokens, rounded up to whole steps.")] = 1_000_000,
    train: Annotated[
        str,
        typer.Option(
            help="What is trained. full: everything; small: q and k projections, convolutions, norms; "
            "lora: adapters on q, k and v, convolutions, norms, biases (needs the extra `recover`)."
        ),
    ] = TrainingSettings.train,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = TrainingSettings.lr,
    text: TextFiles = None,
    heldout: Heldout = None,
    heldout_tokens: HeldoutTokens = DEFAULT_TOKENS,
    evaluations: Annotated[
        int, typer.Option(help="Points of the held-out curve, after the first.")
    ] = TrainingSettings.evaluations,
    window_length: WindowLength = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = TrainingSettings.batch,
    accumulate: Annotated[int, typer.Option(help="Passes per step.")] = TrainingSettings.accumulate,
    ce_weight: Annotated[
        float, typer.Option(help="Weight of the cross entropy.")
    ] = TrainingSettings.ce_weight,
    kl_weight: Annotated[
        float, typer.Option(help="Weight of T^2 KL(dense || reduced); 0 trains without a teacher.")
    ] = TrainingSettings.kl_weight,
    temperature: Annotated[float, typer.Option(help="T of the distillation.")] = TrainingSettings.temperature,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = TrainingSettings.rank,
    alpha: Annotated[int, typer.Option(help="Adapters are scaled by alpha / rank.")] = TrainingSettings.alpha,
    seed: Annotated[int, typer.Option(help="Seed of the order of the text and of the adapters.", min=0)] = 0,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Train DENSE instead, on the same tokens and settings but without a teacher: what REDUCED, "
            "recovered, is to be compared with.",
        ),
    ] = False,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train a reduced checkpoint back towards the dense one.

    The text is the training side of the bundled split unless --text is given; held-out text likewise. After a kill or
    Ctrl-C the same command goes on from OUT.progress.safetensors, saved every three minutes and on Ctrl-C.

    \b
    lowkey-prune recover  demo/model reduced recovered --tokens 1000000
    lowkey-prune recover  demo/model reduced control   --tokens 1000000 --control
    lowkey-prune evaluate control recovered
    """
    target = device_named(device)
    settings = TrainingSettings(
        tokens=tokens,
        train=cast(TrainableSet, train),  # TrainingSettings refuses others
        lr=lr,
        batch=batch,
        accumulate=accumulate,
        window=WINDOW if window_length is None else window_length,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        rank=rank,
        alpha=alpha,
        seed=seed,
        evaluations=evaluations,
    )
    with Busy(err_console, "reading weights and text"):
        run = plan(
            checkpoint_named(dense),
            checkpoint_named(reduced),
            out,
            settings,
            text_of(text, "train"),
            text_of(heldout, "heldout"),
            heldout_tokens=heldout_tokens,
            control=control,
            overwrite=overwrite,
        )
    done = run.steps_done
    teacher = None if run.teacher is None else run.teacher.spec
    memory = training_memory(run.student.spec, teacher, settings, run.heldout.shape[1] - 1, target)
    what = f"training with train={settings.train!r}, which holds whole models,"
    check_fits(memory, target, what, "fewer trained parameters (--train small), or a smaller --batch")
    tell(_plan(run, done, memory, target), dry_run=False)
    description = "training the control" if control else "recovering"
    per_step = settings.tokens_per_step
    with (
        sole_user(run.saved),
        training_bar(err_console, description, settings.steps * per_step, done=done * per_step) as on_step,
    ):
        record = run_recovery(run, target, on_step=on_step)
    measured = record["evaluation"]
    before, after = measured["before"]["perplexity"], measured["after"]["perplexity"]
    out_console.print(
        f"{out}: {counted(record['trained_parameters'], 'parameter')} trained on "
        f"{counted(record['tokens'], 'token')}, perplexity {before:.3f} => {after:.3f} ({change(before, after)}) on "
        f"{counted(measured['tokens'], 'held-out token')}",
        soft_wrap=True,
    )


def _plan(run: Run, done: int, memory: Memory, device: torch.device) -> Iterator[str]:
    """What `recover` is going to do, line by line; `done` steps lie behind."""
    settings, spec = run.settings, run.student.spec
    yield from shape_lines(spec)
    trained = trained_count(spec, settings.train, settings.rank)
    steps = counted(settings.steps, "step")
    yield (
        f"training: {counted(settings.steps * settings.tokens_per_step, 'token')}, {steps} of "
        f"{settings.tokens_per_step:,}; {settings.train}, {counted(trained, 'parameter')}; "
        f"{'no teacher' if run.teacher is None else f'teacher {run.teacher.source}'}"
    )
    yield training_line(memory)
    if done:
        yield f"going on after step {done} of {settings.steps}"
    windows = (settings.steps - done) * settings.batch * settings.accumulate
    teacher = None if run.teacher is None else run.teacher.spec
    # Every point of the curve, and once more the checkpoint as it is stored.
    measured = sum(step > done or not done for step in settings.evaluated_steps) + 1
    window = run.heldout.shape[1] - 1
    tokens = measured * run.heldout[:, 1:].numel()
    times = [
        ("training", training_seconds(spec, teacher, windows, settings.window, device)),
        ("held-out text", evaluation_seconds(spec, tokens, window, device)),
    ]
    yield time_line(times, device)
    # Value and two moments in float32, and the file before while a new one is written.
    needed = [("the checkpoint", stored_bytes(run.student)), ("its progress", 2 * 12 * trained)]
    yield from disk_lines(needed, run.out)
    yield from Companions(run.student).notes()
