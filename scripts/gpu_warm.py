"""Compile the Triton kernels that the other sections need, in threads beside each other: one after the other, and only
when they are launched, they would take most of a run's time."""

import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from gpu_bandwidth import launched_as, variants
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
from gpu_hybrid_warm import hybrid_jobs
from gpu_kernels import (
    compare_inputs,
    compare_rule,
    compare_step,
    large_mixer,
    make_mixer,
    random_state,
    rule_shapes,
    shapes,
)
from gpu_models import Stock, parity_size, parity_widths, stock_generate
from gpu_states import compare_prompt_states, compare_rounding

from modeling.families import family_of
from modeling.runtime.gpu.compiling import compile_ahead
from modeling.runtime.gpu.delta import delta_step
from modeling.spec import StateDType, StateTypes
from modeling.state import StatePool

Job = Callable[[], object]


@torch.inference_mode()
def step(run: Run, d_k: int, state_dtype: StateDType, variant: tuple[int, int] | None = None) -> None:
    """One decode step of a large layer."""
    spec = large_mixer(run, d_k)
    mixer = make_mixer(spec, run.device, torch.bfloat16)
    projected = torch.randn(2, sum(spec.in_proj_sizes), device=run.device, dtype=torch.bfloat16)
    state = random_state(spec, 2, torch.bfloat16, state_dtype, run.device)
    slots = torch.arange(2, device=run.device)
    with nullcontext() if variant is None else launched_as(*variant):
        delta_step(mixer, projected, state, slots)


@torch.inference_mode()
def model(
    run: Run, settings: dict[str, object], dtype: torch.dtype, state_dtypes: Sequence[StateDType]
) -> None:
    """A prompt and a decode step, with states of each dtype."""
    made = random_model(family_of(settings).spec(settings), run, dtype)
    runtime = run.runtime(made)
    slots = torch.arange(2, device=run.device)
    prompts = torch.randint(0, made.spec.vocab_size, (2, 9 if run.small else 130), device=run.device)
    for state_dtype in state_dtypes:
        pool = StatePool(made.spec, 2, device=run.device, types=StateTypes.named(state_dtype, dtype))
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
    if section == "kernels":
        for spec, dtype in shapes(run.small):
            yield from (
                partial(compare_step, run, spec, dtype, state_dtype) for state_dtype in run.state_dtypes
            )
            yield partial(compare_inputs, run, spec, dtype)
            yield partial(compare_rounding, run, spec)
        yield from (partial(compare_prompt_states, run, *shape) for shape in rule_shapes(run))
        yield from (partial(compare_rule, run, *shape) for shape in rule_shapes(run))
    elif section == "parity":
        for family, (_, d_k) in itertools.product(FAMILIES, parity_widths(run)):
            settings = config(family, d_k=d_k, **parity_size(run))
            for dtype in (torch.bfloat16, torch.float32):
                yield partial(model, run, settings, dtype, ["float32"])
                if run.cuda and isinstance(d_k, int):
                    yield partial(stock_small, run, family, d_k, dtype)
    elif section == "texts":
        for family in FAMILIES:
            settings = config(family, d_k=parity_size(run)["d_v"], **parity_size(run))
            yield partial(model, run, settings, torch.float32, run.state_dtypes)
    elif section in ("decode", "capacity", "engine", "server"):
        families = FAMILIES[:1] if section in ("engine", "server") else FAMILIES
        state_dtypes = ["float32"] if section == "decode" else run.state_dtypes
        for family, d_k in itertools.product(families, (128, 64)):
            yield partial(model, run, large_config(run, family, d_k, layers=1), torch.bfloat16, state_dtypes)
    elif section == "bandwidth":
        yield from (partial(step, run, *kind) for kind in itertools.product((128, 64), run.state_dtypes))
    elif section == "peer" and run.cuda:
        yield from (partial(stock_large, run, family) for family in FAMILIES)
    elif section == "tuning":
        for d_k, state_dtype in itertools.product((128, 64), run.state_dtypes):
            yield from (partial(step, run, d_k, state_dtype, v) for v in variants(run, d_k))
    else:
        yield from hybrid_jobs(run, section)


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
