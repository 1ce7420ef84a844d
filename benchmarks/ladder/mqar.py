"""What a smaller state costs associative recall: a small model learns MQAR, is reduced, and is asked again.

    python benchmarks/ladder/mqar.py OUT
    python benchmarks/ladder/mqar.py OUT --family delta_net --seconds 600
    lowkey-prune report mqar.html OUT/mqar.json

OUT/model is the trained checkpoint, of fla's format. OUT/mqar.json has the accuracy by number of pairs for the dense
model and for every method, width and calibration seed, with states in float32 and in int8 that are rounded after each
token. It is written after every model; the same command goes on with those that are missing.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from models import initialise
from mqar_model import Shape, Training, train
from mqar_task import Questions, draw, length_for

from lowkey.files import OutputError, check_writable
from lowkey.publishing import (
    new_directory,
    remove_working_directories,
    replacing,
    scratch_directory,
    write_json,
)
from lowkey.signals import ending_on_signals
from modeling.checkpoint import Checkpoint, export_tensors, open_checkpoint, save_shard
from modeling.families import ConfigError, family_of
from modeling.model import Model
from modeling.ops import GatedDeltaRule
from modeling.runtime import Runtime, UnavailableError, compile_model
from modeling.spec import StateDType, StateTypes
from modeling.state import StatePool
from pruning.calibration import Origin, tokens_sha256
from pruning.collection import collect
from pruning.criteria import CRITERIA, criterion_named
from pruning.errors import PruningError
from pruning.evaluation.record import environment
from pruning.fused import training_rule
from pruning.mqar_table import FORMAT, KIND, Accuracy, MQARTable, Recalled, TrainingPoint, read_mqar
from pruning.options import device_named
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select, widths_to_keep
from pruning.statistics import Statistics
from pruning.versions import versions

DTYPES: tuple[StateDType, ...] = ("float32", "int8")
MODEL, TABLE = "model", "mqar.json"
METHODS = ("read-write", "loss-aware", "drrqr", "l1", "random")
WIDTHS = (96, 64, 48, 32, 16, 8)
SEEDS = (0, 1, 2)
PAIRS = (4, 8, 16, 32, 64, 128, 256)

app = typer.Typer(pretty_exceptions_enable=False)


def seeded(purpose: int, *seeds: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on what they are for, and on the seeds."""
    state = np.random.SeedSequence([purpose, *seeds]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


TRAINING, TEST, CALIBRATION, RECOVERY = range(4)
"""What questions are drawn for: no two of these share any."""


@torch.no_grad()
def recalled(runtime: Runtime, questions: Questions, dtype: StateDType) -> Accuracy:
    """Ask a model token by token, so that its states are rounded to `dtype` after every token."""
    spec, device = runtime.model.spec, runtime.model.device
    types = StateTypes.named(dtype, runtime.model.embeddings.weight.dtype)
    runtime.check_states(types)
    count, length = questions.ids.shape
    pool = StatePool(spec, count, device=device, types=types)
    slots = torch.arange(count, device=device)
    at = questions.at.flatten()
    order = at.argsort(stable=True)
    rows = (order // questions.pairs).to(device).split(at.bincount(minlength=length).tolist())
    read = []
    for ids, asked in zip(questions.ids.to(device).T.contiguous(), rows, strict=True):
        hidden = runtime.decode(ids, pool, slots)
        if len(asked):
            read.append(hidden[asked])
    found = runtime.logits(torch.cat(read)).argmax(-1)
    share = (found == questions.values.flatten()[order].to(device)).float().mean().item()
    return Accuracy(questions.pairs, len(at), share, (share * (1 - share) / len(at)) ** 0.5)


class Measuring:
    """Trains the model if `out` has none, and measures those that the table there lacks.

    Args:
        recovery: how models are trained on after the reduction, or None for not at all.
        queries: about how many there are for each number of pairs.
        seed: of the training; `seeds` are of calibration and of methods that draw.
        rule: the gated delta rule to train with; None for the plain one.

    Raises:
        PruningError: a method is unknown, or a width is not less than `shape.d_k`; or, of `run`, the table that is
            there is of another run.
        ValueError: there are more pairs than the vocabulary has keys.
    """

    def __init__(
        self,
        out: Path,
        shape: Shape,
        training: Training,
        recovery: Training | None,
        *,
        methods: Sequence[str],
        widths: Sequence[int],
        seeds: Sequence[int],
        queries: int,
        calibration_tokens: int,
        seed: int,
        device: torch.device,
        rule: GatedDeltaRule | None = None,
    ) -> None:
        self._out, self._shape, self._training, self._recovery = out, shape, training, recovery
        self._methods, self._widths, self._seeds = methods, widths, seeds
        self._calibration_tokens, self._seed = calibration_tokens, seed
        self._device, self._rule = device, rule
        for method in methods:
            criterion_named(method)
        for width in widths:
            if not 1 <= width < shape.d_k:
                raise PruningError(f"width={width} must be between 1 and {shape.d_k - 1}: d_k is {shape.d_k}")
        self._settings = {
            "shape": asdict(shape),
            "training": asdict(training),
            "recovery": None if recovery is None else asdict(recovery),
            "methods": list(methods),
            "widths": list(widths),
            "seeds": list(seeds),
            "queries": queries,
            "calibration_tokens": calibration_tokens,
            "seed": seed,
        }
        self._questions = [
            draw(seeded(TEST, pairs), -(-queries // pairs), pairs, shape.vocab) for pairs in training.pairs
        ]
        self._statistics = cache(self._collected)

    def run(self) -> MQARTable:
        """Everything that is missing."""
        table = self._table()
        done = {(r.method, r.seed, r.d_k, r.trained) for r in table.recalled}
        for method, seed, d_k, trained in self._cells():
            if (method, seed, d_k, trained) in done:
                continue
            found = self._measured(method, seed, d_k, trained)
            table.recalled.extend(found)
            self._save(table)
            for r in found:
                shares = " ".join(f"{a.pairs}:{100 * a.accuracy:.1f}" for a in r.accuracy)
                name = f"{r.method or 'dense'}, d_k {r.d_k}, seed {r.seed}{', trained on' * trained}"
                print(f"{name}, {r.state_dtype}: {shares}", flush=True)
        return table

    def _cells(self) -> Iterator[tuple[str | None, int, int, bool]]:
        """(method, seed, width, whether it is trained on) of each model; None and the whole width for the dense one.
        Training on takes longest, so it comes last, and of the first seed only."""
        for trained in (False, True) if self._recovery else (False,):
            yield None, self._seeds[0], self._shape.d_k, trained
            for seed in self._seeds[:1] if trained else self._seeds:
                for method in self._methods:
                    # l1 reads neither calibration nor random numbers: it is the same for all seeds.
                    if method != "l1" or seed == self._seeds[0]:
                        yield from ((method, seed, width, trained) for width in self._widths)

    def _table(self) -> MQARTable:
        """What an interrupted run has left, or a new table with a model that is trained for it."""
        file = self._out / TABLE
        if file.exists():
            table = read_mqar(file)
            if table.settings != msgspec.json.decode(msgspec.json.encode(self._settings)):
                raise PruningError(
                    f"{file} is of a run with other settings, {table.settings}; choose another OUT"
                )
            return table
        if (self._out / MODEL).exists():
            raise PruningError(f"{self._out / MODEL} is there, but no {TABLE} beside it; choose another OUT")
        points = self._trained_model()
        checkpoint = self._dense
        table = MQARTable(
            KIND,
            FORMAT,
            f"{self._shape.family} trained on MQAR",
            checkpoint.sha256,
            versions(),
            environment(self._device),
            self._settings,
            points,
        )
        self._save(table)
        return table

    def _save(self, table: MQARTable) -> None:
        with replacing(self._out / TABLE) as temporary:
            write_json(temporary, asdict(table))

    def _trained_model(self) -> list[TrainingPoint]:
        """Train the dense model and write it."""
        config = self._shape.config(length_for(self._training.pairs[-1]))
        torch.manual_seed(self._seed)
        model = Model(family_of(config).spec(config))
        # Larger than GPT-2's, with rows of norm 1, since they are the head as well: with its 0.02 all log-odds begin
        # near zero, and it takes more steps until the model learns anything.
        initialise(model, embeddings=model.spec.hidden_size**-0.5)
        model.to(self._device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

        def report(point: TrainingPoint) -> None:
            shares = " ".join(f"{pairs}:{100 * share:.1f}" for pairs, share in sorted(point.accuracy.items()))
            print(f"step {point.step}, {point.seconds:.0f} s: {shares}", flush=True)

        generator = seeded(TRAINING, self._seed, device=self._device)
        points = train(model, self._training, generator, rule=self._rule, report=report)
        with new_directory(self._out / MODEL) as directory:
            tensors = export_tensors(model, family_of(config))
            save_shard(directory / "model.safetensors", {n: t.cpu().contiguous() for n, t in tensors})
            write_json(directory / "config.json", config)
        return points

    @property
    def _dense(self) -> Checkpoint:
        return open_checkpoint(self._out / MODEL)

    def _measured(self, method: str | None, seed: int, d_k: int, trained: bool) -> list[Recalled]:
        """One model at each of `DTYPES`."""
        model = self._dense.load(device=self._device) if method is None else self._reduced(method, seed, d_k)
        if trained:
            assert self._recovery is not None
            known = len(self._recovery.pairs) - 1
            generator = seeded(RECOVERY, self._seed, seed, device=self._device)
            train(model, self._recovery, generator, learnt=known, rule=self._rule)
        model.requires_grad_(False)
        runtime = compile_model(model)
        found = []
        for dtype in DTYPES:
            size = model.spec.state_bytes(0, StateTypes.named(dtype, torch.float32))
            accuracy = [recalled(runtime, questions, dtype) for questions in self._questions]
            found.append(Recalled(method, seed, d_k, trained, dtype, size, accuracy))
        return found

    def _reduced(self, method: str, seed: int, d_k: int) -> Model:
        dense = self._dense
        statistics = self._statistics(seed) if CRITERIA[method].statistics else None
        widths = widths_to_keep(dense.spec, d_k)
        selection = select(dense, CRITERIA[method], widths, statistics=statistics, seed=seed)
        with scratch_directory() as scratch:
            reduce_checkpoint(dense, selection, Provenance(method, seed, statistics), scratch / "reduced")
            return open_checkpoint(scratch / "reduced").load(device=self._device)

    def _collected(self, seed: int) -> Statistics:
        """Statistics over sequences of one length with all numbers of pairs."""
        pairs = self._training.pairs
        length = length_for(pairs[-1])
        count = max(1, self._calibration_tokens // (length * len(pairs)))
        generator = seeded(CALIBRATION, seed)
        windows = torch.cat([draw(generator, count, n, self._shape.vocab, length=length).ids for n in pairs])
        sha256 = tokens_sha256(windows)
        origin = Origin("MQAR sequences", sha256, seed, len(windows), length, sha256)
        needed = {name for method in self._methods for name in CRITERIA[method].statistics}
        dense = self._dense
        return collect(dense.load(device=self._device), windows, origin, dense.sha256, needed=needed)


def shown(values: Sequence[str | int]) -> str:
    """What an option is by default, for its help."""
    return f"(default: {', '.join(map(str, values))})"


@app.command()
@ending_on_signals(remove_working_directories)
def main(
    out: Annotated[
        Path, typer.Argument(help="Folder for the model and mqar.json; a run that is there goes on.")
    ],
    family: Annotated[str, typer.Option(help="gated_deltanet or delta_net.")] = "gated_deltanet",
    layers: int = 2,
    hidden: int = 128,
    heads: int = 1,
    d_k: int = 128,
    d_v: int = 128,
    vocab: Annotated[int, typer.Option(help="Keys are one half, values the other.")] = 8192,
    pairs: Annotated[list[int] | None, typer.Option(help=f"Numbers of pairs. {shown(PAIRS)}", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Training steps at most.", min=1)] = 20_000,
    seconds: Annotated[
        float | None, typer.Option(help="End the training after this time at the latest.", min=0.1)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a training step.", min=1)] = 32_768,
    lr: Annotated[float, typer.Option(help="Peak learning rate, for Muon and AdamW alike.")] = 3e-3,
    method: Annotated[list[str] | None, typer.Option(help=shown(METHODS))] = None,
    width: Annotated[
        list[int] | None, typer.Option(help=f"Channels to keep. {shown(WIDTHS)}, where below d_k", min=1)
    ] = None,
    calibration_seed: Annotated[list[int] | None, typer.Option(help=shown(SEEDS), min=0)] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Calibration tokens, about.", min=1)] = 16_384,
    queries: Annotated[int, typer.Option(help="Queries for each number of pairs, about.", min=1)] = 4096,
    recover_steps: Annotated[
        int, typer.Option(help="Train each model on for so many steps, and ask again.", min=0)
    ] = 0,
    recover_lr: float = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the training.", min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda if there is one).")] = None,
) -> None:
    """Train a model on MQAR, reduce it by every method to every width, and measure each one's recall."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # decays of a whole chunk underflow, and denormals are slow
    levels = tuple(sorted(set(pairs or PAIRS)))
    training = Training(levels, steps, tokens, lr, seconds)
    recovery = replace(training, steps=recover_steps, lr=recover_lr, seconds=None) if recover_steps else None
    try:
        place = device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_writable(out / TABLE)
        Measuring(
            out,
            Shape(family, layers, hidden, heads, d_k, d_v, vocab),
            training,
            recovery,
            methods=method or METHODS,
            widths=width or [width for width in WIDTHS if width < d_k],
            seeds=calibration_seed or SEEDS,
            queries=queries,
            calibration_tokens=calibration_tokens,
            seed=seed,
            device=place,
            rule=training_rule(place),
        ).run()
    except (PruningError, OutputError, ConfigError, UnavailableError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(2) from e


if __name__ == "__main__":
    app()
