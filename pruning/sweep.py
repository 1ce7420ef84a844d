"""What reduction costs, method by method and width by width: each checkpoint is written, reloaded and measured.

A cell depends on the checkpoint, its row, column and seed alone, so a sweep that was interrupted goes on with the cells
that are missing.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowkey.publishing import scratch_directory
from modeling.checkpoint import Checkpoint, open_checkpoint
from pruning.budget import Curve, curve_passes, spend, widths_per_layer
from pruning.calibration import Origin, Text, tokens_sha256
from pruning.collection import collect, tokens_to_run
from pruning.criteria import CRITERIA
from pruning.evaluation import DEFAULT_TOKENS, compare, perplexity
from pruning.progress import Bar
from pruning.recovery import Run, plan, recover
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select, widths_to_keep
from pruning.statistics import StatisticName, Statistics
from pruning.table import FORMAT, KIND, PER_LAYER, UNFINISHED, Cell, Control, Curves, Dense, Table
from pruning.training import TrainingSettings
from pruning.versions import versions


@dataclass(frozen=True)
class RecoveryPlan:
    """How each reduced checkpoint is recovered."""

    settings: TrainingSettings
    """How to train; the seed is replaced by that of each cell."""
    text: Text
    heldout: Text


@dataclass(frozen=True)
class Sweep:
    """A plan: which reduced checkpoints are measured, and on what text."""

    source: Checkpoint
    methods: tuple[str, ...]
    """Methods with one width for all layers."""
    per_layer: tuple[str, ...]
    """Methods whose widths are chosen per layer, within the state of one width for all."""
    widths: tuple[int, ...]
    align: int
    """Widths per layer are multiples of this."""
    drawn: Mapping[int, tuple[Tensor, Origin]]
    """Calibration windows, int64 `[count, length]`, and where they came from, by calibration seed."""
    heldout: Tensor
    """Windows to measure on, int64 `[count, window + 1]`."""
    compared: int
    """How many of them, from the front, are compared with the dense model."""
    recovery: RecoveryPlan | None
    device: torch.device

    @property
    def cells(self) -> list[tuple[str, str, int, int]]:
        """(row, method, column, seed) of every cell."""
        rows = [(m, m) for m in self.methods] + [(f"{m}{PER_LAYER}", m) for m in self.per_layer]
        return [(row, m, n, seed) for seed in self.drawn for row, m in rows for n in self.widths]

    @property
    def needed(self) -> set[StatisticName]:
        """Names of the statistics that the methods read."""
        return {name for method in (*self.methods, *self.per_layer) for name in CRITERIA[method].statistics}

    @property
    def options(self) -> dict[str, Any]:
        """All that the table depends on beside checkpoint and device, as JSON gives it back."""
        recovery = self.recovery
        return {
            "rows": [*dict.fromkeys(row for row, *_ in self.cells)],
            "widths": [*self.widths],
            "align": self.align,
            "calibration": [origin.as_json() for _, origin in self.drawn.values()],
            "heldout_tokens": self.heldout[:, 1:].numel(),
            "heldout_sha256": tokens_sha256(self.heldout),
            "compared_windows": self.compared,
            "recovery": None
            if recovery is None
            else {
                "settings": asdict(recovery.settings),
                "text_sha256": recovery.text.sha256,
            },
        }


class Measuring:
    """A sweep that runs.

    Args:
        table: What an interrupted run has measured, or None.
        save: Gets the table after each cell.
        bar: Shows how far work on so many tokens has come, as `evaluate_checkpoints` takes it.
        busy: Shows that there is work which counts nothing.
    """

    def __init__(
        self,
        sweep: Sweep,
        table: Table | None,
        save: Callable[[Table], None],
        bar: Bar,
        busy: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self._sweep, self._source, self._spec = sweep, sweep.source, sweep.source.spec
        self._save, self._bar, self._busy = save, bar, busy
        with busy("loading the checkpoint"):
            self._dense = self._source.load(device=sweep.device)
        self._table = table or self._new_table()
        self._run: Run | None = None

    def run(self) -> Table:
        """Measure the cells that the table lacks, in their order.

        Raises:
            PruningError: A method can't be used on this checkpoint, or a model gives NaN or Inf.
            OutputError: There is no room for a checkpoint where temporary files go.
        """
        missing = self._sweep.cells[len(self._table.reduced) :]
        for seed, cells in itertools.groupby(missing, key=lambda cell: cell[-1]):
            statistics = self._statistics(seed)
            for row, method, column, _ in cells:
                widths = widths_to_keep(self._spec, column)
                if row != method:
                    limit = self._spec.with_d_k(widths).state_bytes(0)
                    widths = widths_per_layer(self._spec, self._curves(method, seed, statistics), limit)
                made_by = Provenance(method, seed, statistics)
                self._table.reduced.append(self._cell(row, column, widths, made_by))
                self._save(self._table)
        return replace(self._table, kind=KIND)

    def _new_table(self) -> Table:
        sweep = self._sweep
        with self._bar("evaluating dense", sweep.heldout[:, 1:].numel()) as advance:
            found = perplexity(self._dense, sweep.heldout, advance=advance)
        return Table(
            UNFINISHED,
            FORMAT,
            self._source.source,
            self._source.sha256,
            str(sweep.device),
            sweep.heldout[: sweep.compared, 1:].numel(),
            Dense(list(self._spec.d_k), self._spec.state_bytes(0), found.perplexity, found.tokens),
            reduced=[],
            curves=[],
            versions=versions(),
            options=sweep.options,
        )

    def _statistics(self, seed: int) -> Statistics | None:
        """The statistics that the methods read, or None if none of them reads any."""
        needed = self._sweep.needed
        if not needed:
            return None
        windows, origin = self._sweep.drawn[seed]
        with self._bar(f"calibrating, seed {seed}", tokens_to_run(windows, needed)) as advance:
            return collect(self._dense, windows, origin, self._source.sha256, needed=needed, advance=advance)

    def _curves(self, method: str, seed: int, statistics: Statistics | None) -> Sequence[Curve]:
        """The method's error curves, measured unless the table has them."""
        for curves in self._table.curves:
            if (curves.method, curves.seed) == (method, seed):
                return curves.loss_rise
        sweep, (windows, origin) = self._sweep, self._sweep.drawn[seed]
        passes = curve_passes(self._spec, sweep.align)
        with self._bar(
            f"measuring each layer, {method}, seed {seed}", passes * windows[:, 1:].numel()
        ) as advance:
            _, budget = spend(
                self._source,
                CRITERIA[method],
                self._spec.state_bytes(0),
                sweep.align,
                self._dense,
                windows,
                origin,
                statistics=statistics,
                seed=seed,
                advance=advance,
            )
        self._table.curves.append(
            Curves(method, seed, [dict(curve) for curve in budget.curves], list(self._spec.linear_layers))
        )
        self._save(self._table)
        return budget.curves

    def _cell(self, row: str, column: int, widths: Sequence[int], made_by: Provenance) -> Cell:
        sweep, method, seed = self._sweep, made_by.method, made_by.seed
        name = f"{row}, d_k {column}, seed {seed} ({len(self._table.reduced) + 1} of {len(sweep.cells)})"
        with scratch_directory() as scratch:
            out = scratch / "reduced"
            with self._busy(f"reducing: {name}"):
                selection = select(
                    self._source, CRITERIA[method], widths, statistics=made_by.statistics, seed=seed
                )
                spec = reduce_checkpoint(self._source, selection, made_by, out)
                model = open_checkpoint(out).load(device=sweep.device)
            compared = sweep.heldout[: sweep.compared]
            tokens = sweep.heldout[:, 1:].numel() + 2 * compared[:, 1:].numel()
            with self._bar(f"evaluating {name}", tokens) as advance:
                found = perplexity(model, sweep.heldout, advance=advance)
                _, divergence = compare(model, self._dense, compared, advance=advance)
            del model
            recovered = None if sweep.recovery is None else self._recovered(sweep.recovery, seed, out, name)
        return Cell(
            row,
            column,
            method,
            seed,
            list(spec.d_k),
            spec.state_bytes(0),
            found.perplexity,
            divergence.kl,
            divergence.top1_agreement,
            recovered,
            selection.exchanges,
        )

    def _recovered(self, recovery: RecoveryPlan, seed: int, reduced: Path, name: str) -> float:
        """Perplexity of a reduced checkpoint after recovery. The seed's control is measured beside the first one."""
        run = self._run
        count, window = self._sweep.heldout[:, 1:].shape
        if run is None or run.settings.seed != seed:
            with self._busy("reading text for recovery"):
                run = plan(
                    self._source,
                    open_checkpoint(reduced),
                    reduced.with_name("recovered"),
                    replace(recovery.settings, seed=seed),
                    recovery.text,
                    recovery.heldout,
                    heldout_tokens=max(window, min(DEFAULT_TOKENS, count * window)),
                    heldout_window=window,
                )
            self._run = run
        if all(control.seed != seed for control in self._table.controls):
            control = replace(run, out=reduced.with_name("control"), control=True)
            self._table.controls.append(Control(seed, self._trained(control, f"control, seed {seed}")))
            self._save(self._table)
        return self._trained(
            replace(run, reduced=open_checkpoint(reduced), out=reduced.with_name("recovered")), name
        )

    def _trained(self, run: Run, name: str) -> float:
        settings = run.settings
        with self._bar(f"recovering {name}", settings.steps * settings.tokens_per_step) as advance:
            recover(run, self._sweep.device, on_step=lambda tokens, _: advance(tokens))
        model = open_checkpoint(run.out).load(device=self._sweep.device)
        with self._bar(f"evaluating {name}, recovered", self._sweep.heldout[:, 1:].numel()) as advance:
            return perplexity(model, self._sweep.heldout, advance=advance).perplexity
