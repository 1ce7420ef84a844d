"""How long a start takes, with empty and with warm caches, and what the fixed configurations of fla's kernels cost."""

import re
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_common import (
    FAMILIES,
    Run,
    SkippedError,
    large_checkpoint,
    large_config,
    prefill,
    random_model,
    seconds,
)
from gpu_engine import Kind
from gpu_models import free
from gpu_server import serve

from modeling.families import family_of
from modeling.runtime.gpu import fla_kernels
from modeling.spec import StateTypes
from modeling.state import StatePool

GOALS = {"empty caches": 60, "warm caches": 15}
"""Seconds from lowkey-serve to /ready."""

MILESTONES = {
    "loading ": "processes and imports",
    "weights are loaded": "fla's import, weights",
    "running the largest steps": "kernels",
    "memory on": "first steps",
    "ready on": "states and graphs",
}
"""What an engine says when it is done with each part of its start."""


def check_startup(run: Run) -> Iterator[list[str]]:
    """lowkey-serve with dense and reduced until both are ready, from nothing and once more."""
    free(run)
    variants: dict[str, Kind] = {"dense": (run.state_dtypes[0], 128), "reduced": (run.state_dtypes[0], 64)}
    for _, d_k in variants.values():
        large_checkpoint(run, FAMILIES[0], d_k)
    free(run)
    cache = run.folder / "start-up"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {"TRITON_CACHE_DIR": str(cache / "triton"), "CUDA_CACHE_PATH": str(cache / "cuda")}
    texts: list[dict[str, str]] = []
    for name, goal in GOALS.items():
        run.need(goal / 2)
        began = time.time()
        server = serve(run, variants, 4 if run.small else 512, environment)
        try:
            server.wait_ready(*variants)
            taken = time.time() - began
            texts.append({variant: complete(server, variant) for variant in variants})
        finally:
            log = server.log.read_text()
            run.report.setdefault("startup", {})[f"log, {name}"] = log
            server.stop(15)
        shares = {variant: parts(log, variant, began) for variant in variants}
        run.report["startup"][name] = {"seconds": taken, "parts": shares}
        yield [
            f"start, {name}",
            "" if run.small else "within" if taken <= goal else "over",
            f"{taken:.1f} s, goal {goal} s",
        ]
        for variant, found in shares.items():
            yield [f"  {variant}", "", ", ".join(f"{part} {s:.1f} s" for part, s in found.items())]
        for line in re.findall(r"(\d+ kernels are ready.*|recorded decode steps.*)", log):
            yield ["  log", "", line]
    yield [
        "same texts",
        run.check(texts[0] == texts[1], "texts with warm caches"),
        repr(texts[0]["dense"][:40]),
    ]


def complete(server: Any, variant: str) -> str:
    """A few greedy tokens."""
    body = {
        "model": variant,
        "prompt": [1, 2, 3, 4, 5, 6, 7, 8],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = server.http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def parts(log: str, variant: str, began: float) -> dict[str, float]:
    """Seconds of each part of an engine's start, by the times of its lines."""
    found: dict[str, float] = {}
    before = began
    for words, part in MILESTONES.items():
        line = re.search(rf"^(\S+ \S+),(\d+) INFO \S+ {variant}: {words}", log, re.MULTILINE)
        if line:
            at = time.mktime(time.strptime(line[1], "%Y-%m-%d %H:%M:%S")) + int(line[2]) / 1e3
            found[part] = at - before
            before = at
    return found


def check_prompts(run: Run) -> Iterator[list[str]]:
    """Time of 64 prompts of 512 tokens with the fixed configurations of fla's kernels, and with fla's own tuning."""
    if not run.cuda:
        raise SkippedError("skipped: fla's kernels need a GPU")
    results = run.report.setdefault("prompts", {})
    for d_k in (128, 64):
        run.need(20)
        free(run)
        settings = large_config(run, FAMILIES[0], d_k)
        model = random_model(family_of(settings).spec(settings), run, torch.bfloat16)
        yield from time_prompts(run, model, d_k, results)
        del model
    free(run)


@torch.inference_mode()
def time_prompts(run: Run, model: Any, d_k: int, results: dict[str, Any]) -> Iterator[list[str]]:
    """Both ways of launching in turns, then what fla's tuning has found for each kernel."""
    runtime = run.runtime(model)
    fixed = {name: t.configs for name in fla_kernels.KERNELS if (t := fla_kernels.tuner(name))}
    pool = StatePool(model.spec, 64, device=run.device, types=StateTypes(inputs=torch.bfloat16))
    slots = torch.arange(64, device=run.device)
    prompts = torch.randint(0, model.spec.vocab_size, (64, 512), device=run.device)
    ways = {"fixed": fixed, "tuned": run.own_configs}

    def work(many: int) -> None:
        prefill(runtime, prompts[:many], pool, slots[:many])

    taken: dict[tuple[str, int], list[float]] = {}
    try:
        for way, configs in ways.items():
            fla_kernels.use(configs)
            began = time.monotonic()
            runtime.compile_ahead(lambda: work(1))
            compiled = time.monotonic()
            work(64)
            torch.cuda.synchronize()
            yield [
                f"prompts d_k {d_k} {way}",
                "",
                f"compiled in {compiled - began:.1f} s, first run (and tuning) {time.monotonic() - compiled:.1f} s",
            ]
        for _ in range(3):
            for way, configs in ways.items():
                fla_kernels.use(configs)
                for many in (64, 1):
                    taken.setdefault((way, many), []).extend(
                        seconds(run, lambda n=many: work(n)) for _ in range(2)
                    )
    finally:
        fla_kernels.use(fixed)
    for many in (64, 1):
        times = {way: statistics.median(taken[way, many]) for way in ways}
        results[f"d_k {d_k}, {many} x 512"] = times
        told = ", ".join(f"{way} {s * 1e3:.1f} ms ({many * 512 / s:.0f} tok/s)" for way, s in times.items())
        told += f"; fixed takes {times['fixed'] / times['tuned']:.2f} of the time"
        yield [f"{many} prompts of 512, d_k {d_k}", "", told]
    for name in fla_kernels.KERNELS:
        chooser = fla_kernels.tuner(name)
        timings = getattr(chooser, "configs_timings", None)
        if not timings:
            continue
        told_of = {str(c).replace(", num_ctas: 1, maxnreg: None", ""): t[0] for c, t in timings.items()}
        results[f"d_k {d_k}, {name}"] = told_of
        best = sorted(told_of.items(), key=lambda item: item[1])[:3]
        ours = [t[0] for c, t in timings.items() if c in fixed[name]]
        told = "; ".join(f"{c}: {ms * 1e3:.0f} us" for c, ms in best)
        yield [f"  {name}", "", f"fixed: {ours[0] * 1e3:.0f} us; best: {told}" if ours else f"best: {told}"]
