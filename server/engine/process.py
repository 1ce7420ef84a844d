"""Entry point of an engine process: load the model, then exchange messages and step until the parent goes away."""

import contextlib
import gc
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import msgspec
import torch
import zmq

from modeling.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from modeling.families import ConfigError
from modeling.runtime import Runtime, UnavailableError, compile_model, prepare
from modeling.runtime.gpu.graphs import MAX_BATCH, DecodeGraphs, graph_sizes
from modeling.spec import StateTypes
from modeling.state import StatePool, page_bytes, pages_for
from modeling.tokenizer import TokenizerFile
from server.engine.cache import StateCache
from server.engine.device import HOST, Cuda, Device
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.memory import (
    DoesNotFitError,
    MemoryPlan,
    check_weights,
    dense_d_k,
    measure,
    plan_memory,
    weights_of,
)
from server.engine.output import FrontEnds
from server.engine.planning import planning
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.state_file import layout
from server.logs import configure
from server.wire.messages import (
    CANNOT_LOAD,
    EngineConfig,
    Ready,
    Report,
    encoder,
    input_decoder,
    one_or_all,
)

logger = logging.getLogger("lowkey.engine")

HEARTBEAT_S = 1.0
"""An engine that has told nothing for this long says who is in it."""

THREAD_POLL_S = 0.002
"""How often an engine with nothing to run looks whether a file has been written or read, or a grammar compiled."""

MASK_THREADS = 16
"""Most threads that make masks for grammars while a GPU computes."""


def pick_device(config: EngineConfig) -> str:
    """ "auto" is a GPU where there is one."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device != "cpu":
        index, count = torch.device(config.device).index or 0, torch.cuda.device_count()
        if index >= count:
            raise CheckpointError(
                f"device={config.device!r}, but torch finds {count} GPUs here; use cpu or auto"
            )
    return config.device


def sharing(config: EngineConfig) -> int:
    """How many variants, this one among them, load on the CPU at the same time."""
    on_cpu = ("cpu",) if torch.cuda.is_available() else ("cpu", "auto")
    return max(1, sum(device in on_cpu for device in config.devices))


def pick_dtype(config: EngineConfig, device: str) -> torch.dtype:
    """ "auto" is float32 on a CPU and bfloat16 on a GPU."""
    if config.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def open_device(config: EngineConfig) -> Device:
    """The device that the configuration names, or that is there. Raises CheckpointError."""
    name = pick_device(config)
    return HOST if name == "cpu" else Cuda(name)


def pick_prefill_tokens(config: EngineConfig, device: str) -> int:
    """By default few on a CPU, where 128 tokens of a prompt take longer than a decode step of 32 requests. Many on
    a GPU, where 4096 take about as long as 64: the time is that of the launches."""
    return config.prefill_tokens or (128 if device == "cpu" else 4096)


def pick_mask_threads(config: EngineConfig, device: Device) -> int:
    """Threads that make masks for grammars. On a CPU they take turns with the model's own, on a GPU they work beside
    it."""
    if device.name == "cpu":
        return config.threads
    return max(config.threads, min(MASK_THREADS, len(os.sched_getaffinity(0)) * 3 // 4))


def build(config: EngineConfig, device: Device | None = None) -> tuple[Engine, Ready]:
    """Load the checkpoint and make an engine of it.

    Args:
        device: another than the configuration says.

    Raises:
        CheckpointError, ConfigError: the checkpoint is no good.
        DoesNotFitError: the device has not the memory.
    """
    began = time.monotonic()
    logger.info("%s: loading %s", config.variant, config.source)
    checkpoint: Checkpoint = open_checkpoint(config.source)
    tokenizer, _ = TokenizerFile(checkpoint.path).open()  # the API process will tokenise with it
    device = device or open_device(config)
    dtype = pick_dtype(config, device.name)
    weights = weights_of(checkpoint, dtype)
    check_weights(config, device, weights)
    prepare(device.torch_device)
    runtime = compile_model(checkpoint.load(dtype=dtype, device=device.torch_device))
    prefill_tokens = pick_prefill_tokens(config, device.name)
    types = StateTypes.named(config.state_dtype, dtype)
    try:
        runtime.check_states(types)
    except UnavailableError as e:
        raise CheckpointError(f"state_dtype={config.state_dtype!r}: {e}") from e
    pool, plan, graphs = _plan(config, device, runtime, types, weights, prefill_tokens)
    logger.info("%s: %s", config.variant, plan.meaning(checkpoint.spec, types, dense_d_k(checkpoint)))
    max_running = min(pool.num_slots, config.max_requests or pool.num_slots)
    cache = StateCache(pool, prefix_cache=config.prefix_cache, aligned=config.batch_invariant)
    engine = Engine(
        Scheduler(cache, prefill_tokens, max_running),
        Runner(runtime, pool, batch_invariant=config.batch_invariant, device=device, graphs=graphs),
        depth=device.depth,
        grammars=Grammars(
            tokenizer,
            checkpoint.spec.vocab_size,
            threads=pick_mask_threads(config, device),
            device=device.torch_device,
        ),
    )
    spec = checkpoint.spec
    ready = Ready(
        family=spec.family,
        d_k=list(spec.d_k),
        d_v=[mixer.d_v for mixer in spec.deltas.values()],
        vocab_size=spec.vocab_size,
        context_length=min(spec.context_length, plan.longest or spec.context_length),
        eos_token_ids=list(spec.eos_token_ids),
        checkpoint_path=str(checkpoint.path.resolve()),
        method=checkpoint.method,
        state_bytes_per_request=pool.bytes_per_slot,
        conv_bytes_per_request=pool.conv_bytes_per_slot,
        bytes_per_page=pool.bytes_per_page,
        state_layout=layout(pool),
        state_dtype=config.state_dtype,
        device=device.name,
        backend=runtime.name,
        weights_bytes=plan.needs.weights,
        memory=plan.parts,
        planning=planning(checkpoint, runtime, plan, dtype),
        load_s=time.monotonic() - began,
        slots=pool.num_slots,
        pages=pool.pages.count,
        max_running=max_running,
    )
    logger.info(
        "%s: ready on %s (%s runtime) in %.1f s, d_k %s, %d slots of %d state bytes in %s",
        config.variant,
        device.name,
        ready.backend,
        ready.load_s,
        one_or_all(ready.d_k),
        ready.slots,
        ready.state_bytes_per_request,
        ready.state_dtype,
    )
    return engine, ready


def _plan(
    config: EngineConfig,
    device: Device,
    runtime: Runtime,
    types: StateTypes,
    weights: int,
    prefill_tokens: int,
) -> tuple[StatePool, MemoryPlan, DecodeGraphs | None]:
    """States from the memory that weights, graphs and the work itself leave; says which part is how large."""
    spec = runtime.model.spec

    def pool(slots: int, pages: int) -> StatePool:
        return StatePool(spec, slots, pages=pages, device=device.torch_device, types=types)

    recorder = device.recorder() if runtime.recordable and not config.batch_invariant else None
    sizes = [] if recorder is None else graph_sizes(config.max_requests or MAX_BATCH)
    # The null slot of a pool has a place in the tables for each page that others may have, and so for a whole step.
    small = pool(1, pages_for(prefill_tokens))
    needs = measure(config, runtime, small, device, weights, prefill_tokens, sizes)
    del small
    device.release_memory()  # what torch keeps of its pages would not be free
    plan = plan_memory(
        config,
        device,
        needs,
        spec.state_bytes(0, types),
        page_bytes(spec, types),
        sharing(config),
        context_length=spec.context_length,
    )
    logger.info("%s: %s", config.variant, plan)
    states = pool(plan.slots, plan.pages)
    if recorder is None:
        return states, plan, None
    sizes = graph_sizes(min(plan.slots, config.max_requests or MAX_BATCH))
    return states, plan, DecodeGraphs(runtime, states, sizes, recorder)


def serve(config: EngineConfig) -> None:
    """Run until the parent closes our standard input (it does so when it dies, too)."""
    context = zmq.Context()
    requests, reports = context.socket(zmq.ROUTER), context.socket(zmq.PUSH)
    for socket in (requests, reports):
        socket.set_hwm(0)  # never drop, never block: the API bounds what is in flight
        socket.setsockopt(zmq.LINGER, 0)
    requests.bind(config.request_address)
    reports.connect(config.report_address)
    front_ends = FrontEnds(requests)

    def report(message: Report) -> None:
        reports.send(encoder.encode(message))

    try:
        engine, ready = build(config)
    except (CheckpointError, ConfigError, DoesNotFitError, torch.OutOfMemoryError) as e:
        logger.error("%s: cannot load %s: %s", config.variant, config.source, e)
        if config.reason_path is not None:
            with contextlib.suppress(OSError):  # a full disk: the log has said it
                Path(config.reason_path).write_text(str(e))
        sys.exit(CANNOT_LOAD)
    gc.collect()  # what is there now stays: it need not be looked through again, which takes longer than a step
    gc.freeze()
    report(ready)
    reported = time.monotonic()
    poller = zmq.Poller()
    poller.register(requests, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        wait_s = 0.0
        if engine.idle or engine.blocked:
            wait_s = THREAD_POLL_S if engine.in_threads else HEARTBEAT_S
        events = dict(poller.poll(int(wait_s * 1000)))
        if sys.stdin.fileno() in events:
            return
        received = requests in events
        while received:
            try:
                front_end, data = requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            for message in front_ends.received(front_end, input_decoder.decode(data)):
                engine.handle(message)
        output = engine.step()
        if output is not None:
            report(output.step)
            front_ends.answer(output)
        elif (received and engine.idle) or time.monotonic() - reported >= HEARTBEAT_S:
            report(engine.occupancy)
        else:
            continue
        reported = time.monotonic()


def main() -> None:
    """`python -P -m server.engine.process CONFIG_JSON`, started by `server.wire.supervisor` only."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    configure(config.log_level, config.log_format)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it drains, then closes our stdin
    torch.set_num_threads(config.threads)
    torch.set_num_interop_threads(1)
    status = 0
    try:
        serve(config)
    except Exception:
        traceback.print_exc()
        status = 1
    # Returning, Python would wait for the threads that read and write files, and a file server may never answer them.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
