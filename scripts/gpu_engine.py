"""The server's engine on the card."""

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_common import FAMILIES, EagerRecorder, Run, config, large_checkpoint, make_checkpoint
from gpu_loads import closed_loop_speed, full_speed, random_prompts, request
from gpu_models import TIE, free, parity_size, same_text

from modeling.checkpoint import Checkpoint
from modeling.model import Model
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import Recorder
from modeling.spec import StateDType, StateTypes
from modeling.state import StatePool
from server.engine.batch import Batch
from server.engine.device import Cuda, Device, Host
from server.engine.engine import Engine
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate, Ready, SaveState

T = TypeVar("T")

PROMPT, NEW_TOKENS = 128, 256
"""Tokens of the closed loop, here and over HTTP."""
TIES: dict[StateDType, float] = {"float32": TIE, "bfloat16": 3e-2, "int8": 3e-2}
"""How close the best two logits are where greedy texts may part, as a share of the largest. Rounded states differ where
a value lies in the middle between two that can be kept: float32 sums in another order decide about a few values of ten
thousand, each by a whole step of the rounding, and about what follows from them. Weights that differ by 3e-7 moved
logits by 9e-3 (bfloat16) and 1.6e-2 (int8) of the largest within 24 tokens."""
SPEED_GOALS: dict[tuple[StateDType, int], float] = {("int8", 128): 2.2, ("int8", 64): 3.0}
"""Tokens per second at 512 requests over those with float32 states of d_k 128, by dtype of the state and d_k."""
Kind = tuple[StateDType, int]
"""Dtype of the state and d_k."""


class RecordingHost(Host):
    """A CPU whose steps are recorded and overlap, to test this script."""

    depth = 1

    def recorder(self) -> Recorder | None:
        return EagerRecorder()


class EagerCuda(Cuda):
    """A GPU whose steps are launched kernel by kernel."""

    def recorder(self) -> Recorder | None:
        return None


def device_of(run: Run, *, graphs: bool = True) -> Device:
    if run.cuda:
        return Cuda(run.device) if graphs else EagerCuda(run.device)
    return RecordingHost() if graphs else Host()


def make_engine(
    run: Run,
    checkpoint: Checkpoint,
    dtype: str,
    *,
    state_dtype: StateDType,
    requests: int,
    graphs: bool = True,
    state_memory: int | None = None,
    **further: Any,
) -> tuple[Engine, Ready]:
    """An engine and what it says of itself; `further` are fields of `EngineConfig`."""
    engine_config = EngineConfig(
        variant="check",
        source=str(checkpoint.path),
        device=run.device,
        dtype=dtype,  # type: ignore[arg-type]
        max_requests=requests,
        state_dtype=state_dtype,
        state_memory=state_memory,
        prefill_tokens=64 if run.small else None,
        prefix_cache=False,
        threads=1,
        **further,
    )
    return build(engine_config, device_of(run, graphs=graphs))


def run_all(engine: Engine, messages: list[Generate | SaveState]) -> dict[str, list[int]]:
    """Tokens of each request; they join one after the other, so that batches of many sizes run."""
    tokens: dict[str, list[int]] = {}
    waiting = list(messages)
    while waiting or not engine.idle:
        if waiting:
            engine.handle(waiting.pop(0))
        output = engine.step()
        for token in output.tokens if output else ():
            tokens.setdefault(token.request_id, []).append(token.token_id)
    return tokens


def texts(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    tokens = run_all(engine, [request(str(i), ids, new_tokens) for i, ids in enumerate(prompts)])
    return [tokens[str(i)] for i in range(len(prompts))]


def texts_from_saved_states(
    engine: Engine, prompts: list[list[int]], new_tokens: int, folder: Path
) -> list[list[int]]:
    """As `texts`, but each prompt's second half goes on from a saved state of its first half. Others decode while
    states are written, and while they are read."""
    saves: list[Generate | SaveState] = []
    going_on: list[Generate | SaveState] = []
    for i, ids in enumerate(prompts):
        file, half = folder / f"state-{i}", len(ids) // 2
        saves.append(request(f"beside {i}", ids, new_tokens))
        if half:
            save = SaveState(request_id=f"save {i}", token_ids=ids[:half], path=str(file), fingerprint={})
            saves.append(save)
        going_on.append(request(str(i), ids[half:], new_tokens, file if half else None, half))
    run_all(engine, saves)
    tokens = run_all(engine, going_on)
    return [tokens[str(i)] for i in range(len(prompts))]


@torch.inference_mode()
def references(
    model: Model, prompts: list[list[list[int]]], tokens: int, state_dtype: StateDType
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Greedy tokens `[n]` and their logits `[n, vocab]` behind each prompt by plain torch on the CPU. A prompt comes in
    parts: behind each the state is rounded, as one is that is saved."""
    runtime = TorchRuntime(model)
    longest = max(sum(map(len, parts)) for parts in prompts) + tokens
    types = StateTypes.named(state_dtype, torch.float32)
    pool = StatePool.with_room(model.spec, len(prompts), longest, types=types)
    slots = torch.arange(len(prompts))
    last: list[torch.Tensor] = []
    for slot, parts in zip(slots.split(1), prompts, strict=True):
        hidden = [
            runtime.prefill(torch.tensor(ids), [0, len(ids)], pool, slot) for ids in filter(None, parts)
        ]
        last.append(hidden[-1][-1:])
    logits = [model.logits(torch.cat(last))]
    for _ in range(tokens - 1):
        logits.append(model.logits(runtime.decode(logits[-1].argmax(-1), pool, slots)))
    rows = torch.stack(logits, 1)
    return list(zip(rows.argmax(-1), rows, strict=True))


@contextmanager
def waits_counted(run: Run, engine: Engine) -> Iterator[dict[str, int]]:
    """How many calls that wait for the device there are in launches of decode steps, and of steps with prompts: in
    their forwards and their sampling."""
    runner = engine._runner
    launch, sample = runner.launch, runner.sample
    counts = {"decode": 0, "prompt": 0}

    def counted(batch: Batch, work: Callable[[], T]) -> T:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits = sum("called a synchronizing" in str(w.message) for w in seen)
                counts["prompt" if batch.prefills else "decode"] += waits

    if run.cuda:
        runner.launch = lambda batch: counted(batch, lambda: launch(batch))  # type: ignore[method-assign]
        runner.sample = lambda forward, masks=None: counted(  # type: ignore[method-assign]
            forward.batch, lambda: sample(forward, masks)
        )
    try:
        yield counts
    finally:
        runner.launch, runner.sample = launch, sample  # type: ignore[method-assign]


def check_engine_text(run: Run) -> Iterator[list[str]]:
    """Both ways of launching, and the CPU, give the same text, also from saved states; launches wait for nothing."""
    lengths = [1, 9, 30] if run.small else [1, 63, 64, 65, 150, 7, 200, 31]
    for family in FAMILIES[:1] if run.small else FAMILIES:
        width = parity_size(run)["d_v"]
        checkpoint = make_checkpoint(
            run.folder / f"engine-{family}", config(family, d_k=width, **parity_size(run))
        )
        prompts = random_prompts(lengths, checkpoint.spec.vocab_size)
        for state_dtype in run.state_dtypes:
            run.need(10)
            yield from compare_texts(run, checkpoint, prompts, f"{family} state {state_dtype}", state_dtype)


def compare_texts(
    run: Run, checkpoint: Checkpoint, prompts: list[list[int]], name: str, state_dtype: StateDType
) -> Iterator[list[str]]:
    """Texts of the engine, by recorded steps and by launched ones, against those of a CPU."""
    new = 6 if run.small else 24
    model = checkpoint.load()
    halves = whole = references(model, [[ids] for ids in prompts], new, state_dtype)
    if state_dtype != "float32":
        cut = [[ids[: len(ids) // 2], ids[len(ids) // 2 :]] for ids in prompts]
        halves = references(model, cut, new, state_dtype)
    result: dict[str, Any] = {"state_dtype": state_dtype}
    run.report.setdefault("engine", {})[f"text {name}"] = result

    def against(expected: list[tuple[torch.Tensor, torch.Tensor]], made: list[list[int]]) -> list[str]:
        pairs = zip(made, expected, strict=True)
        return sorted(
            {
                same_text(t[None], logits[None], torch.tensor([text]), TIES[state_dtype])
                for text, (t, logits) in pairs
            }
        )

    for way, graphs in (("graphs", True), ("eager", False)):
        engine, _ = make_engine(
            run,
            checkpoint,
            "float32",
            state_dtype=state_dtype,
            requests=len(prompts),
            graphs=graphs,
            state_memory=2**28,
        )
        texts(engine, prompts, new)  # compiled and tuned, the next time counts
        with waits_counted(run, engine) as waits:
            made = texts(engine, prompts, new)
        result[f"waits {way}"] = waits
        result[way] = against(whole, made)
        result[f"saved {way}"] = against(halves, texts_from_saved_states(engine, prompts, new, run.folder))
        same = [*result[way], *result[f"saved {way}"]]
        good = all(s.startswith("equal") for s in same) and not any(waits.values())
        what = f"engine {name} {way}"
        details = (
            f"text against the CPU: {', '.join(result[way])}; from saved states: "
            f"{', '.join(result[f'saved {way}'])}; waits in launches: {waits}"
        )
        yield [what, run.check(good, what), details]
        del engine
        free(run)


def lengths(run: Run) -> tuple[int, int]:
    """Tokens of a prompt, and of an answer."""
    return (8, 8) if run.small else (PROMPT, NEW_TOKENS)


def window(run: Run, streams: int) -> tuple[float, float]:
    """Seconds of the ramp, in which all streams get to their first token, and of what is measured."""
    return (1.0, 1.5) if run.small else (2.0, 4.0) if streams <= 256 else (3.0, 5.0)


def closed_loop_sizes(run: Run) -> tuple[int, ...]:
    """Numbers of streams."""
    return (2, 4) if run.small else (256, 512)


def served(run: Run) -> dict[str, Kind]:
    """The variants of the section `server`: the dense model with the widest states and with the narrowest ones, and the
    reduced model with these."""
    widest, narrowest = run.state_dtypes[0], run.state_dtypes[-1]
    kinds = dict.fromkeys([(widest, 128), (narrowest, 128), (narrowest, 64)])
    return {
        f"{'dense' if d_k == 128 else 'reduced'}-{state_dtype}": (state_dtype, d_k)
        for state_dtype, d_k in kinds
    }


def named(kind: Kind) -> str:
    """How rows of the table call it."""
    return f"d_k {kind[1]} state {kind[0]}"


def closed_loop(run: Run, engine: Engine, kind: Kind, vocab: int, streams: int) -> list[str]:
    """Tokens per second of the engine under the load that the section `server` sends over HTTP: the same prompts, a
    next request when one has ended, and the same window. A row of the table."""
    prompt, new = lengths(run)
    ramp, seconds = window(run, streams)
    speed = closed_loop_speed(engine, streams, vocab, prompt, new, ramp, seconds)
    name = f"{named(kind)}, {streams} streams"
    run.report.setdefault("engine", {})[name] = {"state_dtype": kind[0], "tokens_per_second": speed}
    return [
        f"engine {name}",
        "",
        f"{speed:.0f} tok/s in a closed loop, prompts of {prompt}, {new} new tokens",
    ]


def check_engine_speed(run: Run) -> Iterator[list[str]]:
    """Tokens per second of the engine alone: those that the server runs first, with the server's load too."""
    batches = (1, 4) if run.small else (1, 32, 128, 256, 512, 1024)
    results = run.report.setdefault("engine", {})
    kinds = [*served(run).values()]
    kinds += [k for k in itertools.product(run.state_dtypes, (128, 64)) if k not in kinds]
    for kind in kinds:
        state_dtype, d_k = kind
        run.need(20)
        free(run)
        checkpoint = large_checkpoint(run, FAMILIES[0], d_k)
        free(run)
        dtype = "float32" if run.small else "bfloat16"
        engine, ready = make_engine(run, checkpoint, dtype, state_dtype=state_dtype, requests=batches[-1])
        results[f"memory {named(kind)}"] = ready.memory | {
            "state_dtype": state_dtype,
            "slots": ready.slots,
            "load_s": ready.load_s,
        }
        yield [
            f"engine {named(kind)}",
            "",
            f"{ready.slots} slots, loaded in {ready.load_s:.1f} s, {ready.memory}",
        ]
        for batch in batches:
            run.need(6 if batch > 512 else 4)
            # All must have begun while the first ones still decode: 1,024 prompts take a few steps.
            full_speed(engine, batch, ready.vocab_size, 8 if batch <= 512 else 24)
            speed = full_speed(engine, batch, ready.vocab_size, 8 if run.small else 100)
            yield engine_row(run, kind, batch, speed)
        for streams in closed_loop_sizes(run) if kind in served(run).values() else ():
            run.need(sum(window(run, streams)) + 3)
            yield closed_loop(run, engine, kind, ready.vocab_size, streams)
        del engine
        gc.collect()
    free(run)


def engine_row(run: Run, kind: Kind, batch: int, speed: float) -> list[str]:
    """A speed beside that with float32 states of d_k 128, and for these beside the speed of the graphs alone."""
    results = run.report["engine"]
    figures = results[f"{named(kind)} B {batch}"] = {"state_dtype": kind[0], "tokens_per_second": speed}
    told, reached = f"{speed:.0f} tok/s", ""
    base = results.get(f"{named(('float32', 128))} B {batch}")
    if base and base is not figures:
        ratio = figures["over_float32_dense"] = speed / base["tokens_per_second"]
        told += f", {ratio:.2f} x float32 d_k 128"
        if batch == 512 and kind in SPEED_GOALS:
            reached = "reached" if ratio >= SPEED_GOALS[kind] else "missed"
            told += f", goal {SPEED_GOALS[kind]}"
    alone = run.report.get("decode", {}).get(f"{FAMILIES[0]} d_k {kind[1]} B {batch}")
    if alone and kind[0] == "float32":
        told += f", {speed / alone['tokens_per_second']:.2f} of the graphs alone"
    return [f"engine {named(kind)} B {batch}", reached, told]
