"""The server's engine on the card."""

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_common import FAMILIES, EagerRecorder, Run, config, large_checkpoint, make_checkpoint
from gpu_models import free, parity_size, same_text

from modeling.checkpoint import Checkpoint
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import Recorder
from modeling.state import StatePool
from server.engine.device import Cuda, Device, Host
from server.engine.engine import Engine
from server.engine.process import build
from server.wire.messages import EngineConfig, Generate, Ready, Sampling, SaveState

PROMPT, NEW_TOKENS = 128, 256
"""Tokens of the closed loop, here and over HTTP."""


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
    requests: int,
    graphs: bool = True,
    state_memory: int | None = None,
) -> tuple[Engine, Ready]:
    engine_config = EngineConfig(
        variant="check",
        source=str(checkpoint.path),
        device=run.device,
        dtype=dtype,  # type: ignore[arg-type]
        max_requests=requests,
        state_memory=state_memory,
        prefill_tokens=64 if run.small else None,
        prefix_cache=False,
        threads=1,
    )
    return build(engine_config, device_of(run, graphs=graphs))


def request(name: str, ids: list[int], new_tokens: int, state: Path | None = None) -> Generate:
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
    return Generate(
        request_id=name,
        token_ids=ids,
        max_tokens=new_tokens,
        sampling=greedy,
        stop_token_ids=[],
        state_path=None if state is None else str(state),
    )


def random_prompts(lengths: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


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
        going_on.append(request(str(i), ids[half:], new_tokens, file if half else None))
    run_all(engine, saves)
    tokens = run_all(engine, going_on)
    return [tokens[str(i)] for i in range(len(prompts))]


@torch.inference_mode()
def reference(checkpoint: Checkpoint, ids: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `[n]` and their logits `[n, vocab]` by plain torch on the CPU, in float32."""
    model = checkpoint.load()
    runtime = TorchRuntime(model)
    pool, slot = StatePool(model.spec, 1), torch.zeros(1, dtype=torch.long)
    hidden, state = model(torch.tensor(ids), [0, len(ids)])
    pool.scatter(slot, state)
    logits = [model.logits(hidden[-1:])[0]]
    for _ in range(tokens - 1):
        logits.append(model.logits(runtime.decode(logits[-1].argmax()[None], pool, slot))[0])
    rows = torch.stack(logits)
    return rows.argmax(-1), rows


@contextmanager
def waits_counted(run: Run, engine: Engine) -> Iterator[dict[str, int]]:
    """How many calls that wait for the device there are in launches of decode steps, and of steps with prompts."""
    launch = engine._runner.launch
    counts = {"decode": 0, "prompt": 0}

    def counted(batch: Any) -> Any:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return launch(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits = sum("called a synchronizing" in str(w.message) for w in seen)
                counts["prompt" if batch.prefills else "decode"] += waits

    if run.cuda:
        engine._runner.launch = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        engine._runner.launch = launch  # type: ignore[method-assign]


def check_engine_text(run: Run) -> Iterator[list[str]]:
    """Both ways of launching, and the CPU, give the same text, also from saved states; launches of decode steps wait
    for nothing."""
    new = 6 if run.small else 24
    lengths = [1, 9, 30] if run.small else [1, 63, 64, 65, 150, 7, 200, 31]
    for family in FAMILIES[:1] if run.small else FAMILIES:
        run.need(10)
        width = parity_size(run)["d_v"]
        checkpoint = make_checkpoint(
            run.folder / f"engine-{family}", config(family, d_k=width, **parity_size(run))
        )
        prompts = random_prompts(lengths, checkpoint.spec.vocab_size)
        references = [reference(checkpoint, ids, new) for ids in prompts]
        result: dict[str, Any] = {}
        run.report.setdefault("engine", {})[f"text {family}"] = result

        def against_references(made: list[list[int]], references: list[Any] = references) -> list[str]:
            """How the texts that were made compare with those of the CPU."""
            pairs = zip(made, references, strict=True)
            return sorted(
                {same_text(t[None], logits[None], torch.tensor([text])) for text, (t, logits) in pairs}
            )

        for name, graphs in (("graphs", True), ("eager", False)):
            engine, _ = make_engine(
                run, checkpoint, "float32", requests=len(prompts), graphs=graphs, state_memory=2**28
            )
            texts(engine, prompts, new)  # compiled and tuned, the next time counts
            with waits_counted(run, engine) as waits:
                made = texts(engine, prompts, new)
            result[f"waits {name}"] = waits
            result[name] = against_references(made)
            result[f"saved {name}"] = against_references(
                texts_from_saved_states(engine, prompts, new, run.folder)
            )
            same = [*result[name], *result[f"saved {name}"]]
            good = all(s.startswith("equal") for s in same) and not waits["decode"]
            what = f"engine {family} {name}"
            details = (
                f"text against the CPU: {', '.join(result[name])}; from saved states: "
                f"{', '.join(result[f'saved {name}'])}; waits in launches: {waits}"
            )
            yield [what, run.check(good, what), details]
            del engine
            free(run)


def full_speed(engine: Engine, batch: int, vocab: int, new_tokens: int) -> float:
    """Tokens per second while all of `batch` requests decode."""
    for i, ids in enumerate(random_prompts([16] * batch, vocab)):
        engine.handle(request(str(i), ids, new_tokens))
    times: list[float] = []
    while not engine.idle:
        output = engine.step()
        if output is not None and output.phase == "decode" and output.batch_size == batch:
            times.append(time.perf_counter())
    return batch * (len(times) - 1) / (times[-1] - times[0])


def lengths(run: Run) -> tuple[int, int]:
    """Tokens of a prompt, and of an answer."""
    return (8, 8) if run.small else (PROMPT, NEW_TOKENS)


def window(run: Run, streams: int) -> tuple[float, float]:
    """Seconds of the ramp, in which all streams get to their first token, and of what is measured."""
    return (1.0, 1.5) if run.small else (2.0, 4.0) if streams <= 256 else (3.0, 5.0)


def closed_loop_sizes(run: Run) -> tuple[int, ...]:
    """Numbers of streams."""
    return (2, 4) if run.small else (256, 512)


def closed_loop(run: Run, engine: Engine, d_k: int, vocab: int, streams: int) -> list[str]:
    """Tokens per second of the engine under the load that the section `server` sends over HTTP: the same prompts, a
    next request when one has ended, and the same window. A row of the table."""
    prompt, new = lengths(run)
    ramp, seconds = window(run, streams)
    prompts = random_prompts([prompt] * 32, vocab)
    left: dict[str, int] = {}

    def send(number: int) -> None:
        left[str(number)] = new
        engine.handle(request(str(number), prompts[number % len(prompts)], new))

    for number in range(streams):
        send(number)
    sent, tokens = streams, 0
    begin = time.monotonic() + ramp
    end = begin + seconds
    while not engine.idle:
        output = engine.step()
        now = time.monotonic()
        for token in output.tokens if output else ():
            tokens += begin <= now < end
            left[token.request_id] -= 1
            if not left[token.request_id] and now < end:
                send(sent)
                sent += 1
    name = f"d_k {d_k}, {streams} streams"
    run.report.setdefault("engine", {})[name] = tokens / seconds
    return [
        f"engine {name}",
        "",
        f"{tokens / seconds:.0f} tok/s in a closed loop, prompts of {prompt}, {new} new tokens",
    ]


def check_engine_speed(run: Run) -> Iterator[list[str]]:
    """Tokens per second of the engine alone, beside those of the graphs alone."""
    batches = (1, 4) if run.small else (1, 32, 128, 256, 512)
    results = run.report.setdefault("engine", {})
    for d_k in (128, 64):
        run.need(20)
        free(run)
        checkpoint = large_checkpoint(run, FAMILIES[0], d_k)
        free(run)
        dtype = "float32" if run.small else "bfloat16"
        engine, ready = make_engine(run, checkpoint, dtype, requests=batches[-1])
        results[f"memory d_k {d_k}"] = ready.memory | {"slots": ready.slots, "load_s": ready.load_s}
        yield [
            f"engine d_k {d_k}",
            "",
            f"{ready.slots} slots, loaded in {ready.load_s:.1f} s, {ready.memory}",
        ]
        for batch in batches:
            run.need(4)
            new = 8 if run.small else 100
            full_speed(engine, batch, ready.vocab_size, 8)
            speed = full_speed(engine, batch, ready.vocab_size, new)
            results[f"d_k {d_k} B {batch}"] = speed
            told = f"{speed:.0f} tok/s"
            alone = run.report.get("decode", {}).get(f"{FAMILIES[0]} d_k {d_k} B {batch}")
            if alone:
                told += f", {speed / alone['tokens_per_second']:.2f} of the graphs alone"
            yield [f"engine d_k {d_k} B {batch}", "", told]
        for streams in closed_loop_sizes(run):
            run.need(sum(window(run, streams)) + 3)
            yield closed_loop(run, engine, d_k, ready.vocab_size, streams)
        del engine
        gc.collect()
    free(run)
