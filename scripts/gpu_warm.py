"""Compile the Triton kernels that the other sections need, in threads beside each other: one after the other, and only
when they are launched, they would take most of a run's time."""

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_common import (
    FAMILIES,
    Run,
    config,
    large_config,
    make_checkpoint,
    prefill,
    random_model,
    tuned_by_fla,
    untuned,
)
from gpu_kernels import (
    compare_inputs,
    compare_rule,
    compare_step,
    large_mixer,
    launched_as,
    make_mixer,
    rule_shapes,
    shapes,
    step_inputs,
    variants,
)
from gpu_models import Stock, parity_size, parity_widths, stock_generate

from modeling.families import family_of
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.runtime.gpu.delta import delta_step
from modeling.spec import StateTypes
from modeling.state import DeltaState, StatePool

Job = Callable[[], object]


@torch.inference_mode()
def step(run: Run, d_k: int, state_dtype: torch.dtype, variant: tuple[int, int] | None = None) -> None:
    """One decode step of a large layer."""
    spec = large_mixer(run, d_k)
    mixer = make_mixer(spec, run.device, torch.bfloat16)
    projected, *state = step_inputs(spec, 2, 2, run.device, torch.bfloat16, state_dtype)
    slots = torch.arange(2, device=run.device)
    if variant is None:
        delta_step(mixer, projected, DeltaState(*state), slots)
        return
    with launched_as(*variant):
        delta_step(mixer, projected, DeltaState(*state), slots)


@torch.inference_mode()
def model(run: Run, settings: dict[str, object], dtype: torch.dtype) -> None:
    """A prompt and a decode step."""
    made = random_model(family_of(settings).spec(settings), run, dtype)
    runtime = run.runtime(made)
    pool = StatePool(made.spec, 2, device=run.device, types=StateTypes(inputs=dtype))
    slots = torch.arange(2, device=run.device)
    prompts = torch.randint(0, made.spec.vocab_size, (2, 9 if run.small else 130), device=run.device)
    ids = prefill(runtime, prompts, pool, slots).argmax(-1)
    runtime.decode(ids, pool, slots)


def stock_large(run: Run, family: str) -> None:
    import fla.models  # noqa: F401 (registers its models with transformers)
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**large_config(run, family, 128, layers=1))
    with torch.device(run.device):
        stock = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    with tuned_by_fla(run):
        stock_generate(stock, torch.randint(0, 32000, (2, 512), device=run.device), 3)


def stock_small(run: Run, family: str, d_k: int, dtype: torch.dtype) -> None:
    checkpoint = make_checkpoint(
        run.folder / f"{family}-{d_k}-{dtype}", config(family, d_k=d_k, **parity_size(run))
    )
    with untuned():
        stock = Stock(run, checkpoint, dtype, ours=False)
        prompts = torch.randint(0, checkpoint.spec.vocab_size, (2, 150), device=run.device)
        stock.logits(prompts)
        if dtype == torch.float32:
            stock.generate(prompts, 3)


def jobs(run: Run, section: str) -> Iterator[Job]:
    """What launches the kernels of a section. Those of the others come to it."""
    narrow_and_wide = (torch.bfloat16, torch.float32)
    if section == "kernels":
        for spec, dtype, state_dtype in shapes(run.small):
            yield partial(compare_step, run, spec, dtype, state_dtype)
            yield partial(compare_inputs, run, spec, dtype)
        yield from (partial(compare_rule, run, *shape) for shape in rule_shapes(run))
    elif section in ("parity", "texts"):
        for family, (_, d_k) in itertools.product(FAMILIES, parity_widths(run)):
            settings = config(family, d_k=d_k, **parity_size(run))
            for dtype in narrow_and_wide if section == "parity" else (torch.float32,):
                yield partial(model, run, settings, dtype)
                if section == "parity" and run.cuda and isinstance(d_k, int):
                    yield partial(stock_small, run, family, d_k, dtype)
    elif section in ("decode", "capacity", "engine", "server"):
        for family, d_k in itertools.product(FAMILIES, (128, 64)):
            yield partial(model, run, large_config(run, family, d_k, layers=1), torch.bfloat16)
    elif section == "bandwidth":
        yield from (partial(step, run, d_k, t) for d_k, t in itertools.product((128, 64), narrow_and_wide))
    elif section == "peer" and run.cuda:
        yield from (partial(stock_large, run, family) for family in FAMILIES)
    elif section == "tuning":
        for d_k, state_dtype in itertools.product((64, 128), narrow_and_wide):
            yield from (partial(step, run, d_k, state_dtype, v) for v in variants(run, d_k))


def check_warm(run: Run) -> Iterator[list[str]]:
    """All sections' jobs in one go, so that every thread has work to the end."""
    failed: list[str] = []

    def everything() -> None:
        for section in run.sections:
            found = list(jobs(run, section))
            for job in found[:1] if run.small else found:
                if time.monotonic() > run.section_end and not run.small:
                    return  # what is left is compiled where it is launched
                try:
                    job()
                except Exception:  # the section will say what is wrong with it; here it costs its compilation
                    failed.append(traceback.format_exc())

    began = time.monotonic()
    compile_ahead(everything)
    run.report["warm"] = {"seconds": time.monotonic() - began, "failed": failed}
    yield ["compilation", "", f"{time.monotonic() - began:.0f} s, {len(failed)} jobs with failures"]
