"""Compile what the sections of gpu_check need, in processes beside each other: Triton keeps what it compiles on disk.
One after the other that took more than two minutes of a run."""

import itertools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_common import (
    FAMILIES,
    Run,
    config,
    large_config,
    make_checkpoint,
    prefill,
    random_model,
)
from gpu_kernels import (
    VARIANTS,
    compare_inputs,
    compare_rule,
    compare_step,
    launched_as,
    rule_shapes,
    shapes,
    time_step,
    variants,
)
from gpu_models import Stock, parity_size, stock_generate

from modeling.families import family_of
from modeling.spec import StateTypes
from modeling.state import StatePool

Job = Callable[[], object]


def timed(run: Run, d_k: int, state_dtype: torch.dtype, tile: int, warps: int) -> None:
    with launched_as(tile, warps):
        time_step(run, d_k, 2, state_dtype, layers=1)


@torch.inference_mode()
def large(run: Run, family: str, d_k: int) -> None:
    """One layer of the large model: a prompt, and a decode step."""
    settings = large_config(run, family, d_k, layers=1)
    model = random_model(family_of(settings).spec(settings), run, torch.bfloat16)
    runtime = run.runtime(model)
    pool = StatePool(model.spec, 2, device=run.device, types=StateTypes(inputs=torch.bfloat16))
    slots = torch.arange(2, device=run.device)
    prompts = torch.randint(0, model.spec.vocab_size, (2, 9 if run.small else 130), device=run.device)
    ids = prefill(runtime, prompts, pool, slots).argmax(-1)
    runtime.decode(ids, pool, slots)


def stock_large(run: Run, family: str) -> None:
    import fla  # noqa: F401 (registers its models with transformers)
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**large_config(run, family, 128, layers=1))
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    stock_generate(model, torch.randint(0, 32000, (2, 512), device=run.device), 3)


def stock_small(run: Run, family: str, d_k: int, dtype: torch.dtype) -> None:
    checkpoint = make_checkpoint(
        run.folder / f"{family}-{d_k}-{dtype}", config(family, d_k=d_k, **parity_size(run))
    )
    stock = Stock(run, checkpoint, dtype, ours=False)
    prompts = torch.randint(0, checkpoint.spec.vocab_size, (2, 150), device=run.device)
    stock.logits(prompts)
    if dtype == torch.float32:
        stock.generate(prompts, 3)


def jobs(run: Run) -> list[Job]:
    """The slowest first."""
    found: list[Job] = []
    if run.cuda:
        for family in FAMILIES:
            found.append(partial(stock_large, run, family))
            for d_k, dtype in itertools.product((128, 64), (torch.float32, torch.bfloat16)):
                found.append(partial(stock_small, run, family, d_k, dtype))
        found += [partial(compare_rule, run, *shape) for shape in rule_shapes(run)]
    for family, d_k in itertools.product(FAMILIES, (128, 64)):
        found.append(partial(large, run, family, d_k))
    if run.small:
        (spec, dtype, _), *_ = shapes(run.small)
        return [
            found[0],
            partial(compare_inputs, run, spec, dtype),
            partial(timed, run, 64, dtype, *VARIANTS[0]),
        ]
    for spec, dtype, state_dtype in shapes(run.small):
        found.append(partial(compare_step, run, spec, dtype, state_dtype))
        found.append(partial(compare_inputs, run, spec, dtype))
    kinds = itertools.product((64, 128), (torch.bfloat16, torch.float32))
    for d_k, state_dtype in kinds:
        found += [partial(timed, run, d_k, state_dtype, *variant) for variant in variants(run, d_k)]
    return found


def run_share(run: Run, number: int, of: int) -> int:
    """Every `of`th job from `number` on, in this process. The sections will say what is wrong with a kernel: here a
    failure only costs its compilation."""
    failed = 0
    for job in jobs(run)[number::of]:
        try:
            job()
        except Exception:  # as above
            failed += 1
            traceback.print_exc()
    return int(failed > 0)


def check_warm(run: Run) -> Iterator[list[str]]:
    workers = 1 if run.small else min(10, max((os.cpu_count() or 2) // 2, 1))
    script = str(Path(__file__).with_name("gpu_check.py"))
    options = ["--device", run.device, *(["--small"] if run.small else [])]
    logs = [(run.folder / f"warm-{n}.log").open("wb") for n in range(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, script, *options, "--warm", str(n), str(workers)],
            stdout=log,
            stderr=log,
            env=os.environ | {"FLA_CACHE_RESULTS": "0"},  # what is tuned beside others is not worth keeping
        )
        for n, log in enumerate(logs)
    ]
    began = time.monotonic()
    try:
        while any(p.poll() is None for p in processes):
            if time.monotonic() > run.section_end and not run.small:
                break
            time.sleep(0.2)
    finally:
        late = sum(p.poll() is None for p in processes)
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    failed = sum(p.returncode != 0 for p in processes) - late
    run.report["warm"] = {
        "workers": workers,
        "late": late,
        "failed": failed,
        "seconds": time.monotonic() - began,
    }
    for n, process in enumerate(processes):
        if process.returncode:
            run.report["warm"][f"worker {n}"] = (run.folder / f"warm-{n}.log").read_text()[-2000:]
    yield ["compilation", "", f"{workers} processes, {late} cut off, {failed} with failures"]
