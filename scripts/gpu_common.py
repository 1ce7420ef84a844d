"""What the sections of gpu_check share: shapes, random models, clocks, the time that is left."""

import itertools
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import Checkpoint, export_tensors, write_safetensors
from modeling.families import family_of
from modeling.families.gated_deltanet import expand_v_for
from modeling.model import Model
from modeling.ops import GatedDeltaRule, chunked_gated_delta_rule
from modeling.runtime import Runtime
from modeling.runtime.gpu import fla_kernels
from modeling.runtime.gpu.graphs import CudaRecorder, DecodeGraphs, Recorder
from modeling.spec import STATE_DTYPES, ModelSpec, StateDType, StateTypes
from modeling.state import StatePool

FAMILIES = ("gated_deltanet", "delta_net")


class SkippedError(Exception):
    """A case that does not apply here, or that there is no time left for."""


@dataclass
class Run:
    """One run of gpu_check: where, how large, until when, and what came of it."""

    device: str
    small: bool
    deadline: float
    """time.monotonic() at which the time box ends."""
    folder: Path
    section_end: float = math.inf
    """time.monotonic() at which this section must leave the rest to the later ones."""
    is_cut_off: bool = False
    """Whether the section went on for longer and was interrupted."""
    report: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    """Those that run."""
    state_dtypes: tuple[StateDType, ...] = STATE_DTYPES
    """Those that are measured and checked, the widest first."""
    shapes: tuple[str, ...] = ("4B",)
    """Hybrids that are measured, as `benchmarks.hybrid_models` names them."""
    main_shape: str | None = None
    """The hybrid of the sections that take one; None for the first of them."""
    widths: tuple[int, ...] = (128, 64)
    """Their d_k, the widest first."""
    api_processes: int | None = None
    """The server's option of this name."""
    own_configs: fla_kernels.Tuned = field(default_factory=dict)
    """What fla would tune its kernels with, where this project has fixed how they are launched."""

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def rule(self) -> GatedDeltaRule:
        """The rule of prompts: fla's chunk kernels need a GPU."""
        if not self.cuda:
            return chunked_gated_delta_rule
        from modeling.runtime.gpu.fla_rule import fla_gated_delta_rule

        return fla_gated_delta_rule

    def runtime(self, model: Model) -> Runtime:
        """The GPU's; Triton's interpreter runs its own kernels anywhere."""
        from modeling.runtime.gpu.runtime import GpuRuntime

        return GpuRuntime(model, self.rule)

    def need(self, seconds: float) -> None:
        """Raises SkippedError unless so much is left."""
        left = min(self.deadline, self.section_end) - time.monotonic()
        if seconds > left and not self.small:
            raise SkippedError(f"skipped: {seconds:.0f} s needed, {max(left, 0):.0f} s left")

    def check(self, good: bool, what: str) -> str:
        if not good:
            self.failures.append(what)
        return "ok" if good else "FAIL"


@contextmanager
def tuned_by_fla(run: Run) -> Iterator[None]:
    """Within, fla's kernels are tuned as fla does, as a peer has them."""
    fixed = fla_kernels.use(run.own_configs)
    try:
        yield
    finally:
        fla_kernels.use(fixed)


@contextmanager
def untuned() -> Iterator[None]:
    """Within, a kernel that chooses among configurations takes its first, where only what it computes matters: trying
    all takes longer than the rest. What is chosen for no reason is not kept on disk as the best of all, for the key of
    what is kept there names the configurations that were tried."""
    prune = Autotuner.prune_configs

    def first(self: Autotuner, kwargs: dict[str, Any]) -> list[Any]:
        return prune(self, kwargs)[:1]

    def no_timing(self: Autotuner, *args: Any, config: Any, **meta: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    with patch.object(Autotuner, "prune_configs", first), patch.object(Autotuner, "_bench", no_timing):
        yield


class EagerRecorder:
    """Replays by calling, where there are no CUDA graphs."""

    def __call__(self, function: Callable[[], Tensor], /) -> tuple[Callable[[], None], Tensor]:
        output = function()

        def replay() -> None:
            output.copy_(function())

        return replay, output


def recorder(run: Run) -> Recorder:
    return CudaRecorder() if run.cuda else EagerRecorder()


def config(
    family: str, *, hidden: int, layers: int, heads: int, d_k: int | list[int], d_v: int, vocab: int
) -> dict[str, Any]:
    common = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    widths = d_k if isinstance(d_k, list) else [d_k]

    def value(of: Callable[[int], Any]) -> Any:
        return [of(n) for n in widths] if isinstance(d_k, list) else of(widths[0])

    if family == "delta_net":
        return common | {"expand_k": value(lambda n: n * heads / hidden), "expand_v": d_v * heads / hidden}
    return common | {"head_dim": value(lambda n: n), "expand_v": value(lambda n: expand_v_for(n, d_v))}


def large_config(run: Run, family: str, d_k: int, layers: int = 24) -> dict[str, Any]:
    """DeltaNet-1.3B's shape, for both families; Gated DeltaNet has an output gate and decay on top of it."""
    if run.small:
        return config(family, hidden=64, layers=min(layers, 2), heads=2, d_k=d_k // 8, d_v=16, vocab=257)
    return config(family, hidden=2048, layers=layers, heads=16, d_k=d_k, d_v=128, vocab=32000)


@torch.no_grad()
def randomise(model: Model) -> Model:
    """Weights under which activations neither vanish nor explode."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.normal_(std=0.5 if name.endswith("conv.weight") else p.shape[1] ** -0.5)
        elif name.endswith("norm.weight"):
            p.normal_(mean=1.0, std=0.1)
        else:
            p.normal_(std=0.2)
    return model


def random_model(spec: ModelSpec, run: Run, dtype: torch.dtype) -> Model:
    """Made on the device, in the dtypes that `Checkpoint.load` gives."""
    with torch.device(run.device):
        model = randomise(Model(spec))
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.to(dtype)
    return model.eval().requires_grad_(False)


def make_checkpoint(path: Path, settings: dict[str, Any]) -> Checkpoint:
    """Random weights of the given shape, on disk."""
    path.mkdir()
    family = family_of(settings)
    model = randomise(Model(family.spec(settings)))
    return write_checkpoint(path, settings, model)


def write_checkpoint(
    path: Path, settings: dict[str, Any], model: Model, tokenizer: Tokenizer | None = None
) -> Checkpoint:
    """With a tokenizer that has a text for every token, `tokenizer_of` its vocabulary if none is given."""
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", settings)
    write_safetensors(path, export_tensors(model, family_of(settings)))
    (tokenizer or tokenizer_of(model.spec.vocab_size)).save(str(path / "tokenizer.json"))
    return Checkpoint(path)


@cache
def tokenizer_of(vocab: int) -> Tokenizer:
    """A byte-level BPE of so many tokens: as costly to decode as those of real models. Trained on sources of Python's
    standard library; what they are too few for are words of no meaning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((f.read_text(errors="replace") for f in files if vocab > 4096), trainer)
    tokenizer.add_tokens([f"word{i}" for i in range(tokenizer.get_vocab_size(), vocab)])
    return tokenizer


def large_checkpoint(run: Run, family: str, d_k: int) -> Checkpoint:
    """A checkpoint of `large_config`, bfloat16; written once."""
    path = run.folder / f"{family}-{d_k}"
    if path.exists():
        return Checkpoint(path)
    settings = large_config(run, family, d_k)
    model = random_model(family_of(settings).spec(settings), run, torch.bfloat16)
    with new_directory(path) as directory:  # this section may be cut off, and another one goes on from here
        write_checkpoint(directory, settings, model.cpu())
    return Checkpoint(path)


@torch.inference_mode()
def prefill(
    runtime: Runtime, prompts: Tensor, pool: StatePool, slots: Tensor, *, chunk: int = 32768
) -> Tensor:
    """Prompts `[B, tokens]` into the pool, about `chunk` tokens at a time; the last tokens' logits `[B, vocab]`."""
    length = prompts.shape[1]
    logits: list[Tensor] = []
    for ids, at in zip(
        prompts.split(max(chunk // length, 1)), slots.split(max(chunk // length, 1)), strict=True
    ):
        offsets = list(range(0, ids.numel() + 1, length))
        hidden = runtime.prefill(ids.flatten(), offsets, pool, at)
        logits.append(runtime.logits(hidden[torch.tensor(offsets[1:], device=hidden.device) - 1]))
    return torch.cat(logits)


@torch.inference_mode()
def generate(
    run: Run, runtime: Runtime, prompts: Tensor, new_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[B, new_tokens]` and the logits that they came from, decoding by graphs padded to one row more."""
    batch = prompts.shape[0]
    pool = StatePool(runtime.model.spec, batch, device=run.device, types=StateTypes(inputs=dtype))
    slots = torch.arange(batch, device=run.device).flip(0)
    graphs = DecodeGraphs(runtime, pool, [batch + 1], recorder(run))
    logits = [prefill(runtime, prompts, pool, slots)]
    for _ in range(new_tokens - 1):
        logits.append(runtime.logits(graphs(logits[-1].argmax(-1), slots)))
    return torch.stack([x.argmax(-1) for x in logits], 1), torch.stack(logits, 1).float()


def synchronise(run: Run) -> None:
    if run.cuda:
        torch.cuda.synchronize()


def seconds(run: Run, function: Callable[[], object]) -> float:
    synchronise(run)
    began = time.perf_counter()
    function()
    synchronise(run)
    return time.perf_counter() - began


def median_seconds(run: Run, function: Callable[[], object], repeats: int) -> float:
    """By device events: between them the host's launches don't count."""
    if not run.cuda:
        return statistics.median(seconds(run, function) for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def graph_seconds(run: Run, function: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of one call, recorded as a CUDA graph."""
    function()
    replay: Callable[[], object] = function
    if run.cuda:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            function()
        replay = graph.replay
    for _ in range(2):
        replay()
    return median_seconds(run, replay, 2 if run.small else repeats)


def error(a: Tensor, b: Tensor) -> float:
    """Relative, in the Euclidean norm; NaN where a holds one."""
    return float((a.double() - b.double()).norm() / b.double().norm())
