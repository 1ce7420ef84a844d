"""Hybrids of real shapes in the server's engine, alone and behind HTTP, and how many of their requests fit."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import Run
from gpu_engine import make_engine, window
from gpu_hybrid_speed import batches, main_shape, prompts, width
from gpu_loads import closed_loop_speed, full_speed
from gpu_models import free
from gpu_server import load, start_server, told
from gpu_startup import complete, parts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.hybrid_models import config_of, random_model
from benchmarks.server_process import ServerProcess
from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import Checkpoint, export_tensors, write_safetensors
from modeling.families import family_of
from server.engine.engine import Engine
from server.engine.memory import Room

DEVICE_SHARE = 0.9
"""The share of a card's memory that a variant alone may take."""
REQUESTS = 512
"""How many requests may run at the same time."""
MOST = 256
"""Requests whose speed is measured, at most."""


def new_tokens(run: Run) -> int:
    return 8 if run.small else 128


def streams_of(run: Run) -> int:
    return 2 if run.small else 256


@cache
def tokenizer_of(vocab: int) -> Tokenizer:
    """Bytes, and a word for every other token, as a detokenizer would meet them."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġword{i}" for i in range(vocab - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens[:vocab])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_hybrid(run: Run, path: Path, config: dict[str, Any]) -> None:
    """A checkpoint in bfloat16, drawn on the device."""
    model = random_model(config, torch.bfloat16, run.device)
    tensors = export_tensors(model, family_of(config))
    with new_directory(path) as directory:
        write_json(directory / "config.json", config)
        tokenizer_of(config["vocab_size"]).save(str(directory / "tokenizer.json"))
        write_safetensors(directory, ((name, t.to(torch.bfloat16).cpu()) for name, t in tensors))


def checkpoints(run: Run) -> dict[int, Checkpoint]:
    """Checkpoints of the main shape, one for each d_k, written beside each other from the device, once."""
    shape = main_shape(run)
    paths = {d_k: run.folder / f"{shape}-{width(run, d_k)}" for d_k in run.widths}

    def write(d_k: int) -> None:
        write_hybrid(run, paths[d_k], config_of(shape, width(run, d_k)))

    missing = [d_k for d_k, path in paths.items() if not path.exists()]
    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(write, missing))
    free(run)
    return {d_k: Checkpoint(path) for d_k, path in paths.items()}


def check_hybrid_engine(run: Run) -> Iterator[list[str]]:
    """Tokens per second of the engine alone: under the server's load and, where the graphs are measured too, while so
    many requests decode."""
    results = run.report.setdefault("hybrid_engine", {})
    began = time.monotonic()
    made = checkpoints(run)
    yield ["checkpoints", "", f"written in {time.monotonic() - began:.1f} s"]
    for d_k, checkpoint in made.items():
        run.need(20)
        dtype = "float32" if run.small else "bfloat16"
        engine, ready = make_engine(run, checkpoint, dtype, state_dtype="float32", requests=REQUESTS)
        name = f"{main_shape(run)} d_k {width(run, d_k)}"
        results[f"{name} memory"] = ready.memory | {"slots": ready.slots, "pages": ready.pages}
        yield [f"engine {name}", "", f"{ready.slots} slots, loaded in {ready.load_s:.1f} s, {ready.memory}"]
        run.need(sum(window(run, streams_of(run))) + 2)
        yield closed_loop(run, engine, name, ready.vocab_size)
        if "hybrid_speed" in run.sections or run.small:
            yield from decode_speeds(run, engine, name, ready.vocab_size)
        del engine
        free(run)


def decode_speeds(run: Run, engine: Engine, name: str, vocab: int) -> Iterator[list[str]]:
    """While so many requests decode, and nothing else happens."""
    results = run.report["hybrid_engine"]
    for batch in (n for n in batches(run) if n <= MOST):
        run.need(5)
        speed = full_speed(engine, batch, vocab, new_tokens(run), prompts(run)[0])
        figures = results[f"{name} B {batch}"] = {"tokens_per_second": speed}
        details = f"{speed:.0f} tok/s"
        bare = run.report.get("hybrid_speed", {}).get(f"{name} B {batch} prompt {prompts(run)[0]}")
        if bare:
            figures["over_graphs"] = speed / bare["tokens_per_second"]
            details += f", {figures['over_graphs']:.2f} of the graphs alone"
        yield [f"engine {name} B {batch}", "", details]


def closed_loop(run: Run, engine: Engine, name: str, vocab: int) -> list[str]:
    """The server's load without a server."""
    streams = streams_of(run)
    speed = closed_loop_speed(engine, streams, vocab, prompts(run)[0], new_tokens(run), *window(run, streams))
    run.report["hybrid_engine"][f"{name}, {streams} streams"] = {"tokens_per_second": speed}
    return [f"engine {name}, {streams} streams", "", f"{speed:.0f} tok/s in a closed loop"]


def check_hybrid_server(run: Run) -> Iterator[list[str]]:
    """Both variants on one card, started with empty caches, loaded in turns, and started once more."""
    results = run.report.setdefault("hybrid_server", {})
    made = checkpoints(run)
    variants = {f"k{width(run, d_k)}": str(checkpoint.path) for d_k, checkpoint in made.items()}
    vocab = made[run.widths[0]].spec.vocab_size
    caches = run.folder / "hybrid-start-up"
    shutil.rmtree(caches, ignore_errors=True)
    settings = {name: {"source": path} for name, path in variants.items()}
    environment = {"TRITON_CACHE_DIR": str(caches / "triton"), "CUDA_CACHE_PATH": str(caches / "cuda")}
    texts: list[dict[str, str]] = []
    for label in ("empty caches", "warm caches"):
        run.need(25)
        began = time.time()
        server = start_server(run, settings, REQUESTS if run.cuda else 4, environment)
        try:
            server.wait_ready(*variants)
            taken = time.time() - began
            log = server.log.read_text()
            shares = {name: parts(log, name, began) for name in variants}
            results[f"start, {label}"] = {"seconds": taken, "parts": shares}
            yield [f"start, {label}", "", f"{taken:.1f} s"]
            for name, found in shares.items():
                yield [f"  {name}", "", ", ".join(f"{part} {s:.1f} s" for part, s in found.items())]
            texts.append({name: complete(server, name) for name in variants})
            if label == "empty caches":
                yield from fit(run, server, variants)
                yield from measure(run, server, variants, vocab)
        finally:
            results[f"log, {label}"] = server.log.read_text()[-6000:]
            server.stop(15)
    yield ["same texts", run.check(texts[0] == texts[1], "hybrid texts with warm caches"), ""]


def measure(run: Run, server: ServerProcess, variants: dict[str, str], vocab: int) -> Iterator[list[str]]:
    """Closed loops of streams over HTTP, the variants in turns, twice; reduced over dense by the means."""
    results, streams = run.report["hybrid_server"], streams_of(run)
    shape = main_shape(run)
    for name in [*variants] * 2:
        run.need(sum(window(run, streams)) + 4)
        figures = load(run, server, name, vocab, streams, prompt=prompts(run)[0], new_tokens=new_tokens(run))
        results.setdefault(f"{name}, {streams} streams", []).append(figures)
        details = told(figures)
        bare = run.report.get("hybrid_engine", {}).get(f"{shape} d_k {name[1:]}, {streams} streams")
        if bare:
            figures["over_engine"] = figures["tokens_per_second"] / bare["tokens_per_second"]
            details += f", {figures['over_engine']:.2f} of the bare engine"
        yield [
            f"server {name}, {streams} streams",
            run.check(figures["errors"] == 0, f"server {name}"),
            details,
        ]
    dense, *others = (
        float(np.mean([f["tokens_per_second"] for f in results[f"{name}, {streams} streams"]]))
        for name in variants
    )
    for other in others:
        results["reduced_over_dense"] = other / dense
        yield ["reduced over dense", "", f"{other:.0f} / {dense:.0f} = {other / dense:.2f}"]


def fit(run: Run, server: ServerProcess, variants: dict[str, str]) -> Iterator[list[str]]:
    """How many requests fit, of three lengths: with the memory that each variant has beside the others, and with what
    it would have alone."""
    results = run.report["hybrid_server"]
    total = torch.cuda.get_device_properties(0).total_memory if run.cuda else 2**30
    for name in variants:
        model = server.http.get(f"/v1/models/{name}").json()["lowkey"]
        memory = model["memory"]
        others = sum(memory.get(part, 0) for part in ("weights", "workspace", "graphs", "reserved"))
        for tokens in (256, 1024, 4096):
            room = Room(model["state_bytes"], model["kv_bytes_per_page"], tokens)
            beside = memory["states"] + memory.get("pages", 0)
            counts = {
                where: room.split(bytes_left)[0]
                for where, bytes_left in (("beside", beside), ("alone", int(DEVICE_SHARE * total) - others))
            }
            results[f"{name}, requests of {tokens} tokens"] = counts | {"bytes": room.request}
            told_of = f"{counts['alone']} alone, {counts['beside']} beside the other, {room.request / 1e6:.1f} MB each"
            yield [f"{name}: requests of {tokens} tokens", "", told_of]
