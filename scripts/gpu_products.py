"""Products of a decode step: the libraries beside ways of launching our Triton kernel for one row, each alone and in
whole layers; and ways of launching the decode step's kernel for few requests."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_bandwidth import copy_rate, launched_as, step_bytes
from gpu_common import Run, error, graph_seconds
from gpu_kernels import large_mixer, make_mixer, random_state
from torch import Tensor

from modeling.layers import RMSNorm
from modeling.runtime.gpu import delta as delta_module
from modeling.runtime.gpu import products
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.runtime.gpu.delta import delta_step
from modeling.runtime.gpu.products import Tile, launch
from modeling.state import DeltaState

TOLERANCE = 2e-2
"""Largest relative difference of two ways in bfloat16: each rounds elsewhere."""
CACHE_BYTES = 400_000_000
"""More than a GPU's cache holds: so much weight is read between two uses of the same."""
BUFFER_BYTES = 2_000_000_000
"""What weights are parts of; more than the layers of `check_layers` take in turns."""


@dataclass(frozen=True)
class Shape:
    """A product, and what goes around it in a decode step."""

    name: str
    size: int
    width: int
    has_norm: bool = False
    gated: bool = False
    adds: bool = False

    @property
    def weight_rows(self) -> int:
        return self.size * (1 + self.gated)


def shapes(run: Run) -> list[Shape]:
    """The products of Qwen3.5-4B, and those of its smaller and larger sister that differ most."""
    if run.small:
        return [
            Shape("delta in", 200, 64, has_norm=True),
            Shape("delta out", 64, 64, adds=True),
            Shape("mlp in", 72, 64, has_norm=True, gated=True),
            Shape("mlp out", 64, 72, adds=True),
        ]
    return [
        Shape("delta in", 12352, 2560, has_norm=True),
        Shape("delta in d_k 64", 10304, 2560, has_norm=True),
        Shape("delta out", 2560, 4096, adds=True),
        Shape("attention in", 10240, 2560, has_norm=True),
        Shape("mlp in", 9216, 2560, has_norm=True, gated=True),
        Shape("mlp out", 2560, 9216, adds=True),
        Shape("head", 248320, 2560),
        Shape("2B mlp in", 6144, 2048, has_norm=True, gated=True),
        Shape("2B mlp out", 2048, 6144, adds=True),
        Shape("9B mlp in", 12288, 4096, has_norm=True, gated=True),
        Shape("9B mlp out", 4096, 12288, adds=True),
    ]


ONE_ROW = {
    "in": [(16, 256, 3), (8, 256, 5), (16, 256, 4), (8, 512, 4), (16, 128, 5)],
    "gated": [(8, 256, 3), (8, 256, 4), (16, 128, 4), (4, 256, 5), (4, 512, 3)],
    "out": [(8, 512, 4), (4, 512, 4), (8, 256, 6), (4, 1024, 3)],
    "head": [(8, 256, 5), (16, 256, 4), (8, 512, 3)],
}
"""block_n, block_k, stages."""


def tiles(run: Run, shape: Shape, rows: int) -> list[Tile]:
    if rows > 1:
        return []
    if run.small:
        return [Tile(8, 32, 3)]
    kind = "gated" if shape.gated else "out" if shape.adds else "in" if shape.has_norm else "head"
    return [Tile(*numbers) for numbers in ONE_ROW[kind]]


def told(tile: Tile) -> str:
    return f"{tile.block_n}x{tile.block_k} {tile.stages} stages"


class Weights:
    """Parts of one buffer, as many of a shape as a cache can't hold."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.numbers = 2**16 if run.small else BUFFER_BYTES // 2
        self._buffer = torch.empty(self.numbers, device=run.device, dtype=torch.bfloat16)
        self._buffer.uniform_(-0.05, 0.05)

    def of(self, shape: Shape, count: int | None = None, begin: int = 0) -> list[Tensor]:
        numbers = shape.weight_rows * shape.width
        if count is None:
            count = 1 if self._run.small else max(1, -(-CACHE_BYTES // (2 * numbers)))
        parts = self._buffer[begin : begin + count * numbers]
        return list(parts.view(count, shape.weight_rows, shape.width))


def norm_of(run: Run, width: int) -> RMSNorm:
    norm = RMSNorm(width, 1e-6).to(device=run.device, dtype=torch.bfloat16).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    return norm


def by_libraries(shape: Shape, x: Tensor, weight: Tensor, norm: RMSNorm, out: Tensor) -> Tensor:
    with patch.object(products, "tile_of", lambda *args, **kwargs: None):
        return by_runtime(shape, x, weight, norm, out)


def by_tile(tile: Tile, shape: Shape, x: Tensor, weight: Tensor, norm: RMSNorm, out: Tensor) -> Tensor:
    return launch(tile, x, weight, norm if shape.has_norm else None, out, gated=shape.gated, adds=shape.adds)


Way = Callable[[Shape, Tensor, Tensor, RMSNorm, Tensor], Tensor]


def ways(run: Run, shape: Shape, rows: int) -> dict[str, tuple[Way, Tile | None]]:
    found: dict[str, tuple[Way, Tile | None]] = {"libraries": (by_libraries, None)}
    return found | {told(tile): (partial(by_tile, tile), tile) for tile in tiles(run, shape, rows)}


def over(parts: Sequence[Tensor], way: Way, shape: Shape, x: Tensor, norm: RMSNorm, out: Tensor) -> None:
    """The same product with one weight after the other."""
    for weight in parts:
        way(shape, x, weight, norm, out)


def row_counts(run: Run) -> Sequence[int]:
    return (1, 3) if run.small else (1, 2, 16, 32, 64, 128)


def compiled(run: Run, jobs: Sequence[Callable[[], object]]) -> None:
    """Launch each once, only to compile it."""

    def everything() -> None:
        for job in jobs:
            job()

    if run.cuda:
        compile_ahead(everything)


@torch.inference_mode()
def check_products(run: Run) -> Iterator[list[str]]:
    """Each product alone, over weights that no cache holds."""
    rate = copy_rate(run)
    results: dict[str, Any] = run.report.setdefault("products", {})
    results["copy_bytes_per_second"] = rate
    weights = Weights(run)
    began = time.monotonic()

    def inputs(shape: Shape, rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, shape.width, device=run.device, dtype=torch.bfloat16)
        return x, torch.zeros(rows, shape.size, device=run.device, dtype=torch.bfloat16)

    jobs: list[Callable[[], object]] = []
    for shape, rows in itertools.product(shapes(run), row_counts(run)):
        x, out = inputs(shape, rows)
        weight, norm = weights.of(shape, 1)[0], norm_of(run, shape.width)
        jobs += [
            partial(way, shape, x, weight, norm, out) for way, tile in ways(run, shape, rows).values() if tile
        ]
    compiled(run, jobs)
    yield ["products compiled", "", f"{time.monotonic() - began:.0f} s"]
    for shape in shapes(run):
        parts, norm = weights.of(shape), norm_of(run, shape.width)
        for rows in row_counts(run):
            run.need(1)
            x, out = inputs(shape, rows)
            expected = by_libraries(shape, x, parts[0], norm, out.clone())
            rows_found: dict[str, Any] = {}
            for name, (way, tile) in ways(run, shape, rows).items():
                difference = error(way(shape, x, parts[0], norm, out.zero_()), expected)
                run.check(difference < TOLERANCE, f"product {shape.name}, {rows} rows, {name}: {difference}")

                taken = graph_seconds(run, partial(over, parts, way, shape, x, norm, out)) / len(parts)
                rows_found[name] = {
                    "microseconds": taken * 1e6,
                    "bytes_per_second": parts[0].numel() * 2 / taken,
                    "error": difference,
                    "tile": asdict(tile) if tile else None,
                }
            results[f"{shape.name}, {rows} rows"] = rows_found
            order = sorted(rows_found, key=lambda name: rows_found[name]["microseconds"])
            details = ", ".join(
                f"{name} {rows_found[name]['microseconds']:.1f} us"
                for name in dict.fromkeys([*order[:3], "libraries"])
            )
            best = rows_found[order[0]]["bytes_per_second"]
            yield [f"{shape.name}, {rows} rows", f"{best / 1e12:.2f} TB/s", details]


def best_way(run: Run, shape: Shape, rows: int) -> Way:
    """The fastest of what `check_products` found."""
    found = run.report["products"].get(f"{shape.name}, {rows} rows", {})
    tile = found[min(found, key=lambda name: found[name]["microseconds"])]["tile"] if found else None
    return partial(by_tile, Tile(**tile)) if tile else by_libraries


def by_runtime(shape: Shape, x: Tensor, weight: Tensor, norm: RMSNorm, out: Tensor) -> Tensor:
    if shape.gated:
        return products.gated_product(x, weight, norm)
    return products.product(x, weight, norm if shape.has_norm else None, out if shape.adds else None)


class Layers:
    """Layers of Gated DeltaNet as in Qwen3.5-4B, each with weights of its own."""

    names = ("delta in", "delta out", "mlp in", "mlp out")

    def __init__(self, run: Run) -> None:
        self._run = run
        by_name = {shape.name: shape for shape in shapes(run)}
        self.products = [by_name[name] for name in self.names]
        self.hidden = self.products[0].width
        self.spec = large_mixer(run, 128, groups=2)
        self.mixer = make_mixer(self.spec, run.device, torch.bfloat16)
        self._norm = norm_of(run, self.hidden)
        numbers = sum(shape.weight_rows * shape.width for shape in self.products)
        self.bytes_per_layer = 2 * numbers
        weights = Weights(run)
        self.layers: list[list[Tensor]] = []
        for i in range(weights.numbers // numbers):
            at = i * numbers
            parts: list[Tensor] = []
            for shape in self.products:
                parts += weights.of(shape, 1, at)
                at += shape.weight_rows * shape.width
            self.layers.append(parts)

    def states(self, rows: int, count: int) -> list[DeltaState]:
        return [
            random_state(self.spec, rows, torch.bfloat16, "float32", self._run.device) for _ in range(count)
        ]

    def step(self, ways: Sequence[Way], x: Tensor, states: Sequence[DeltaState], slots: Tensor) -> None:
        """One step through as many layers as there are states, in place."""
        delta_in, delta_out, mlp_in, mlp_out = self.products
        for parts, state in zip(self.layers, states, strict=False):
            projected, h = (x.new_empty(x.shape[0], shape.size) for shape in (delta_in, mlp_in))
            projected = ways[0](delta_in, x, parts[0], self._norm, projected)
            o = delta_step(self.mixer, projected, state, slots)
            ways[1](delta_out, o, parts[1], self._norm, x)
            h = ways[2](mlp_in, x, parts[2], self._norm, h)
            ways[3](mlp_out, h, parts[3], self._norm, x)

    def modes(self, rows: int) -> dict[str, list[Way]]:
        """Ways of the four products."""
        return {
            "libraries": [by_libraries] * 4,
            "runtime": [by_runtime] * 4,
            "best": [best_way(self._run, shape, rows) for shape in self.products],
        }


@torch.inference_mode()
def check_layers(run: Run) -> Iterator[list[str]]:
    """Whole layers one after the other: products by the libraries, as the runtime has them, and by the best tiles that
    `check_products` found."""
    results: dict[str, Any] = run.report.setdefault("layers", {})
    layers = Layers(run)
    count = len(layers.layers)
    for rows in row_counts(run):
        run.need(2)
        x = torch.randn(rows, layers.hidden, device=run.device, dtype=torch.bfloat16)
        states, slots = layers.states(rows, count), torch.arange(rows, device=run.device)
        moved = layers.bytes_per_layer + step_bytes(layers.spec, rows, states[0], 2)
        found = {"bound": moved / run.report["products"]["copy_bytes_per_second"] * 1e6}
        for name, ways in layers.modes(rows).items():
            found[name] = graph_seconds(run, partial(layers.step, ways, x, states, slots)) / count * 1e6
        results[f"{rows} rows"] = found
        details = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
        yield [f"layer, {rows} rows, us", "", details]


STEPS = tuple(
    itertools.product(("apart", "turns"), ((16384, 4), (16384, 8), (8192, 2), (8192, 4), (4096, 2)))
)
"""Value heads in programs of their own, or in turns; elements of state that a program holds, and its warps."""


@contextmanager
def stepping(way: str, variant: tuple[int, int]) -> Iterator[None]:
    most = 10**6 if way == "apart" else 0
    with launched_as(*variant), patch.object(delta_module, "MOST_ROWS_IN_PARALLEL", most):
        yield


class Steps:
    """Decode steps of as many layers as a cache can't hold the states of."""

    def __init__(self, run: Run, d_k: int, rows: int, layers: int | None = None) -> None:
        spec = large_mixer(run, d_k, groups=2)
        self._mixer = make_mixer(spec, run.device, torch.bfloat16)

        def state() -> DeltaState:
            return random_state(spec, rows, torch.bfloat16, "float32", run.device)

        self._states = [state()]
        if layers is None:
            layers = min(24, max(2, 400_000_000 // step_bytes(spec, rows, self._states[0], 2)))
        self._states += [state() for _ in range(layers - 1)]
        columns = sum(spec.in_proj_sizes)
        self._projected = torch.randn(rows, columns, device=run.device, dtype=torch.bfloat16)
        self._slots = torch.arange(rows, device=run.device)
        self.layers = layers

    def __call__(self) -> None:
        for state in self._states:
            delta_step(self._mixer, self._projected, state, self._slots)


@torch.inference_mode()
def check_few_requests(run: Run) -> Iterator[list[str]]:
    """Ways of launching the decode step's kernel."""
    results: dict[str, Any] = run.report.setdefault("few_requests", {})
    widths = (128,) if run.small else (128, 64)
    kinds = STEPS[::5] if run.small else STEPS
    jobs: list[Callable[[], object]] = []
    for d_k, kind in itertools.product(widths, kinds):

        def job(d_k: int = d_k, kind: tuple[str, tuple[int, int]] = kind) -> None:
            with stepping(*kind):
                Steps(run, d_k, 2, layers=1)()

        jobs.append(job)
    compiled(run, jobs)
    for d_k, rows in itertools.product(widths, (2,) if run.small else (1, 4, 8, 16, 32, 64, 128, 256)):
        run.need(1)
        steps = Steps(run, d_k, rows, layers=1 if run.small else None)
        found: dict[str, float] = {}
        for way, variant in kinds:
            with stepping(way, variant):
                taken = graph_seconds(run, steps) / steps.layers
            found[f"{way} {variant[0]}/{variant[1]}"] = taken * 1e6
        results[f"d_k {d_k}, {rows} rows"] = found
        order = sorted(found, key=found.__getitem__)
        details = ", ".join(f"{name} {found[name]:.1f} us" for name in order)
        yield [f"step d_k {d_k}, {rows} rows", "", details]
