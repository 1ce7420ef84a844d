"""One rung of the ladder: a trained model, and all that is measured of it, by the project's own commands.

    python benchmarks/ladder/ladder.py gdn-130m TEXT OUT --device cuda

Each job writes its result into OUT as soon as it is there, and is left out where that exists: a run that was cut short
goes on where it was. Jobs that need nothing of each other run side by side. OUT/<job>.log is what a job said.
Ctrl-C and SIGTERM end the jobs as well. README.md lists the jobs.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from models import MODELS

from lowkey.publishing import write_json
from lowkey.signals import ending_on_signals, uninterrupted
from pruning.interrupts import left_behind

HERE = Path(__file__).parent
PRUNE = (sys.executable, "-c", "from pruning.cli import app; app()")
SEEDED = ("random", "drrqr", "read-write")
"""Methods that are measured with two more calibration seeds. `CHOSEN` is so beside its budgets per layer, and l1 reads
no calibration text."""
TRAINED = "model/train.json"
"""What training writes last."""
SUBJECT = "rung.json"
"""Says what the results in a folder are of: a folder takes those of one model, text and scale alone."""
GRACE = 30.0
"""Seconds that an interrupted job has to save its work, before it is killed."""
CHOSEN = "loss-aware"
"""The method of the checkpoints that everything but the table of methods is measured of."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    widths: tuple[int, ...]
    window: int
    calibration: int
    """Calibration tokens."""
    calibrations: tuple[int, ...]
    """Other numbers of calibration tokens, for what they buy."""
    heldout: int
    compared: int
    """Held-out tokens, and how many of them are compared with the dense model in the table of methods."""
    bits: int
    """Held-out tokens that are read token by token."""
    reconstruction: int
    """Tokens of a reconstruction."""
    reconstruction_steps: int
    """Its steps for each layer."""
    recovery: int
    """Tokens of a recovery."""
    batch: int
    """Windows of a step of recovery."""
    align: int


REAL = Scale(
    widths=(96, 64, 48, 32),
    window=2048,
    calibration=32_768,
    calibrations=(4096, 262_144),
    heldout=262_144,
    compared=65_536,
    bits=32_768,
    reconstruction=262_144,
    reconstruction_steps=200,
    recovery=4_194_304,
    batch=8,
    align=16,
)
TOY = Scale(
    widths=(48, 32),
    window=128,
    calibration=1024,
    calibrations=(512,),
    heldout=2048,
    compared=512,
    bits=256,
    reconstruction=1024,
    reconstruction_steps=4,
    recovery=1024,
    batch=2,
    align=16,
)


@dataclass(frozen=True)
class Job:
    """A command that writes `output`."""

    output: str
    command: tuple[str | Path, ...]
    needs: tuple[str, ...] = ()
    """Outputs of other jobs that must be there."""


@dataclass
class Rung:
    """The jobs of one model."""

    name: str
    text: Path
    out: Path
    device: str
    seconds: float
    scale: Scale
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Jobs begin in this order: the ones that are worth most come first, should time run out.
        self._training()
        self._reductions()
        self._winning_back()
        self._methods()
        self._evidence()
        self._calibrations()

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def _middle(self) -> tuple[int, ...]:
        """The widths that costly things are measured at."""
        return self.scale.widths[1::2]

    @property
    def _calibration(self) -> list[str | Path]:
        return ["--text", self.text / "calibration.jsonl.gz", "--window-length", str(self.scale.window)]

    @property
    def _on(self) -> list[str]:
        return ["--device", self.device]

    def _add(self, output: str, command: Sequence[str | Path], needs: Sequence[str] = (TRAINED,)) -> None:
        self.jobs.append(Job(output, tuple(command), tuple(needs)))

    def _training(self) -> None:
        command = [
            sys.executable,
            HERE / "train.py",
            self.name,
            self.text,
            self.model,
            "--seconds",
            str(self.seconds),
        ]
        toy = ["--window", "128", "--batch", "4", "--heldout-tokens", "1024"] if self.scale is TOY else []
        self._add(TRAINED, [*command, *toy, *self._on], needs=())

    def _reduce(self, out: str, width: int, *options: str | Path) -> list[str | Path]:
        calibration = ["--tokens", str(self.scale.calibration), *self._calibration]
        how = ["--method", CHOSEN, "--keep", str(width), *calibration, *options]
        # A run that was cut short may have left statistics without their checkpoint; they are made again.
        return [*PRUNE, "prune", self.model, self.out / out, *how, "--overwrite", *self._on]

    def _reductions(self) -> None:
        for width in self.scale.widths:
            self._add(f"reduced-{width}", self._reduce(f"reduced-{width}", width))
        for width in self._middle:
            options = ["--per-layer", "--align", str(self.scale.align)]
            self._add(f"per-layer-{width}", self._reduce(f"per-layer-{width}", width, *options))

    def _sweep(self, output: str, *options: str, tokens: int | None = None) -> None:
        scale = self.scale
        heldout = ["--heldout", self.text / "heldout.jsonl.gz", "--heldout-tokens", str(scale.heldout // 2)]
        measured = ["--window", str(scale.window), "--kl-tokens", str(scale.compared)]
        calibration = ["--tokens", str(tokens or scale.calibration), *self._calibration]
        command = [*PRUNE, "sweep", self.model, self.out / output, *calibration, *heldout, *measured]
        self._add(output, [*command, *options, *self._on])

    def _methods(self) -> None:
        widths, alone = named("--width", self.scale.widths), ["--per-layer", "none"]
        self._sweep("methods.json", *alone, *widths, "--seed", "0")  # all methods, as it is by default
        by_layer = ["--method", CHOSEN, "--per-layer", CHOSEN, "--align", str(self.scale.align)]
        self._sweep("methods-per-layer.json", *by_layer, *widths, *named("--seed", (0, 1, 2)))
        self._sweep(
            "methods-seeds.json", *named("--method", SEEDED), *alone, *widths, *named("--seed", (1, 2))
        )

    def _calibrations(self) -> None:
        how = [*named("--method", ("drrqr", CHOSEN)), "--per-layer", "none", *named("--width", self._middle)]
        for tokens in self.scale.calibrations:
            self._sweep(f"calibration-{tokens}.json", *how, *named("--seed", (0, 1, 2)), tokens=tokens)

    def _evaluate(
        self, output: str, checkpoints: Sequence[str], *options: str, tokens: int | None = None
    ) -> None:
        """Evaluate the model, which is the baseline, and `checkpoints` beside it."""
        scale = self.scale
        read = ["--text", self.text / "heldout.jsonl.gz", "--tokens", str(tokens or scale.heldout)]
        compared = [self.model, *(self.out / c for c in checkpoints)]
        command = [*PRUNE, "evaluate", *compared, *read, "--window", str(scale.window), *options]
        self._add(output, [*command, "--json", self.out / output, *self._on], needs=[TRAINED, *checkpoints])

    def _evidence(self) -> None:
        reduced = [f"reduced-{width}" for width in self.scale.widths]
        per_layer = [f"per-layer-{width}" for width in self._middle]
        parts = named("--part", ("perplexity", "identifiers", "recall"))
        self._evaluate("evaluation.json", [*reduced, *per_layer], *parts)
        states = named("--part", ("rank", "retrieval"))
        self._evaluate("states.json", [f"reduced-{width}" for width in self._middle], *states)
        bits = ["--part", "bits", "--drift-window", str(2 * self.scale.window)]
        for name in (*(f"reduced-{width}" for width in self._middle), *per_layer):
            self._evaluate(f"bits-{name}.json", [name], *bits, tokens=self.scale.bits)

    def _recover(self, start: str, train: str, *options: str, out: str | None = None) -> str:
        """Add a recovery of the checkpoint `start`; returns its output."""
        scale, out = self.scale, out or f"{start}-{train}"
        heldout = ["--heldout", self.text / "heldout.jsonl.gz", "--heldout-tokens", str(scale.heldout // 4)]
        training = ["--tokens", str(scale.recovery), *self._calibration, "--batch", str(scale.batch)]
        rate = "1e-3" if train == "small" else "1e-4"
        how = ["--train", train, "--lr", rate, "--evaluations", "4", *options]
        command = [*PRUNE, "recover", self.model, self.out / start, self.out / out, *training, *heldout, *how]
        self._add(out, [*command, *self._on], needs=[TRAINED, start])
        return out

    def _winning_back(self) -> None:
        control = self._recover(f"reduced-{self._middle[0]}", "full", "--control", out="control")
        parts = named("--part", ("perplexity", "identifiers"))
        for width in self._middle:
            reduced, rebuilt, per_layer = f"reduced-{width}", f"reconstructed-{width}", f"per-layer-{width}"
            options = ["--reconstruct", "--reconstruct-tokens", str(self.scale.reconstruction)]
            options += ["--reconstruct-steps", str(self.scale.reconstruction_steps)]
            self._add(rebuilt, self._reduce(rebuilt, width, *options))
            trained = [
                self._recover(reduced, "full"),
                self._recover(rebuilt, "small"),
                self._recover(rebuilt, "full"),
                self._recover(per_layer, "full"),
            ]
            self._evaluate(f"recovered-{width}.json", [control, reduced, rebuilt, *trained], *parts)


def named(option: str, values: Sequence[str | int]) -> list[str]:
    """An option once for each value."""
    return [word for value in values for word in (option, str(value))]


def run(rung: Rung, side_by_side: int, until: float, only: Sequence[str]) -> bool:
    """Run the jobs whose output is missing. Returns whether all of them are there now."""
    began = time.monotonic()
    waiting = [
        job for job in rung.jobs if not (rung.out / job.output).exists() and (not only or job.output in only)
    ]
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    with (
        ending_on_signals(lambda: end([process for process, _ in running.values()])),
        left_behind("the same command goes on with the jobs whose output is missing"),
    ):
        while waiting or running:
            for job, (process, since) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    took, at = time.monotonic() - since, time.monotonic() - began
                    ended = f"exit {process.returncode}, see {log_of(job, rung.out)}"
                    outcome = ended if process.returncode else "done"
                    print(f"{at:5.0f} s  {job.output}: {took:.0f} s, {outcome}", flush=True)
                    if process.returncode:
                        failed.append(job.output)
            late = time.monotonic() - began > until
            ready = [job for job in waiting if all((rung.out / need).exists() for need in job.needs)]
            for job in [] if late else ready[: side_by_side - len(running)]:
                waiting.remove(job)
                with uninterrupted():  # a job that was started is one that is ended
                    running[job] = (start(job, rung.out), time.monotonic())
            if not running and (late or not ready):
                break
            time.sleep(0.2)
    left = [job.output for job in waiting]
    if failed or left:
        print(f"failed: {', '.join(failed) or 'none'}; not run: {', '.join(left) or 'none'}")
        return False
    print("all jobs are done")
    return True


def start(job: Job, out: Path) -> subprocess.Popen[bytes]:
    """Start a job; what it prints goes to `log_of`."""
    with log_of(job, out).open("wb") as log:
        return subprocess.Popen(list(map(str, job.command)), stdout=log, stderr=log)


def log_of(job: Job, out: Path) -> Path:
    """The file that takes what a job prints."""
    return out / f"{Path(job.output).name.removesuffix('.json')}.log"


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End jobs that still run: by SIGTERM, upon which they save what is done, and after `GRACE` by SIGKILL."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_subject(out: Path, subject: dict[str, Any]) -> None:
    """Note what the results in `out` are of. Raises BadParameter if the folder has results of something else."""
    file = out / SUBJECT
    if not file.exists():
        write_json(file, subject)
        return
    there = json.loads(file.read_bytes())
    for key, value in subject.items():
        if there.get(key) != value:
            raise typer.BadParameter(
                f"out={str(out)!r} has results of {key}={there.get(key)!r}, not {value!r}; choose another folder"
            )


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(MODELS)}.")],
    text: Annotated[Path, typer.Argument(help="Folder that corpus.py made.")],
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    device: str = "cpu",
    seconds: Annotated[float, typer.Option(help="How long to train.")] = 420.0,
    side_by_side: Annotated[int, typer.Option(help="Jobs that run at once.", min=1)] = 1,
    until: Annotated[float, typer.Option(help="Start no job after so many seconds.")] = float("inf"),
    only: Annotated[
        list[str] | None, typer.Option(help="Run these jobs alone, by output; may be repeated.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Little of everything, to try the commands.")] = False,
) -> None:
    """Train a model of the ladder and measure it."""
    if name not in MODELS:
        raise typer.BadParameter(f"name={name!r} must be one of {', '.join(MODELS)}")
    rung = Rung(name, text, out, device, seconds, TOY if toy else REAL)
    outputs = [job.output for job in rung.jobs]
    for job in only or []:
        if job not in outputs:
            raise typer.BadParameter(f"only={job!r} must be one of {', '.join(outputs)}")
    record = text / "corpus.json"
    if not record.exists():
        raise typer.BadParameter(f"text={str(text)!r} has no corpus.json; corpus.py makes such a folder")
    out.mkdir(parents=True, exist_ok=True)
    corpus_sha256 = hashlib.sha256(record.read_bytes()).hexdigest()
    check_subject(out, {"model": name, "toy": toy, "corpus_sha256": corpus_sha256})
    shutil.copy(record, out / record.name)
    raise SystemExit(0 if run(rung, side_by_side, until, only or []) else 1)


if __name__ == "__main__":
    typer.run(main)
