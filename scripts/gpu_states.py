"""States in int8 around the kernels of prompts: the same bits as plain torch makes."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_common import Run, SkippedError
from gpu_kernels import large_mixer, make_mixer, random_state, rows_of, rule_shapes, shapes
from torch import Tensor

from modeling.runtime.gpu.prefill import add_delta_prefill
from modeling.runtime.gpu.rounding import narrow_into, widened
from modeling.spec import DeltaSpec, StateTypes
from modeling.state import DeltaState
from modeling.state.rounding import LEVELS, SMALLEST, narrow, widen

INT8_STATES = StateTypes.named("int8", torch.bfloat16)


def unlike(a: Tensor, b: Tensor) -> float:
    """The share of entries that are not the same; NaN is the same as NaN."""
    a, b = a.cpu(), b.cpu()
    return float(((a != b) & ~(a.isnan() & b.isnan())).double().mean())


def hard_states(rows: int, heads: int, d_k: int, d_v: int, *, fused: bool) -> Tensor:
    """float32 states `[rows, heads, d_k, d_v]` of all magnitudes, on the CPU: some columns of the first head are what
    rounding may get wrong, `fused` those that only a fused multiply and add gets right among them."""
    state = torch.randn(rows, heads, d_k, d_v) * 10.0 ** (60 * torch.rand(rows, heads, 1, d_v) - 30)
    columns = state[:, 0].unbind(-1)
    columns[0].zero_()
    columns[1].uniform_(-0.9 * SMALLEST, 0.9 * SMALLEST)
    columns[2].uniform_(-SMALLEST, SMALLEST)
    columns[2][:, 0] = SMALLEST
    # In the middle between two codes, in the first row exactly. In the others its product with the scale's inverse
    # would be as well, if it were rounded to float32 before the code is taken: Triton's interpreter does that.
    middles = torch.randint(-126, 126, columns[3].shape) + 0.5
    largest = torch.full((rows, 1), 127.0)
    if fused:
        largest[1:] *= 1 + torch.rand(rows - 1, 1)
    columns[3].copy_(middles / (LEVELS / largest))
    columns[3][:, 0] = largest[:, 0]
    columns[4].uniform_(-1e38, 1e38)
    columns[4][:, -1] = -3e38
    columns[5][:, 1] = torch.inf
    columns[6][:, 2] = torch.nan
    columns[7].uniform_(-1e-38, 1e-38)
    return state


@torch.inference_mode()
def compare_rounding(run: Run, spec: DeltaSpec) -> dict[str, float]:
    """`narrow_into` and `widened` on states that are hard to round: shares of entries that are not those of
    `modeling.state.rounding`, and 0 if other slots are untouched."""
    torch.manual_seed(spec.d_k)
    rows, slots = 3, 7
    state = DeltaState.zeros(spec, slots, INT8_STATES, run.device)
    at = torch.randperm(slots, device=run.device)[:rows]
    others = torch.ones(slots, dtype=torch.bool, device=run.device).index_fill(0, at, False)
    after = hard_states(rows, spec.num_v_heads, spec.d_k, spec.d_v, fused=run.cuda)
    narrow_into(state, at, after.to(run.device))
    codes, scales = narrow(after)
    assert state.scales is not None
    kept = scales.isfinite().unsqueeze(-2).expand_as(codes)  # codes of a broken column mean nothing
    return {
        "codes": unlike(state.recurrent[at].cpu()[kept], codes[kept]),
        "scales": unlike(state.scales[at], scales),
        "widened": unlike(widened(state, at), widen(state.recurrent[at].cpu(), state.scales[at].cpu())),
        "others": float(any(t.any() for t in rows_of(state, others))),
    }


def check_rounding(run: Run) -> Iterator[list[str]]:
    """The kernels that round and widen states around prompts."""
    if "int8" not in run.state_dtypes:
        raise SkippedError("skipped: only states in int8 are rounded by kernels of their own")
    bad, cases = 0, list(shapes(run.small))
    for spec, _ in cases:
        run.need(2)
        name = f"rounding d_k {spec.d_k} d_v {spec.d_v} heads {spec.num_v_heads}"
        found = compare_rounding(run, spec)
        run.report.setdefault("kernels", {})[name] = found | {"state_dtype": "int8"}
        if any(found.values()):
            bad += 1
            yield [name, run.check(False, name), str(found)]
    yield [
        "rounding, all shapes, bit for bit",
        "FAIL" if bad else "ok",
        f"{len(cases) - bad} of {len(cases)}",
    ]


@torch.inference_mode()
def compare_prompt_states(
    run: Run, gated: bool, heads: int, groups: int, d_k: int, d_v: int
) -> dict[str, float]:
    """A mixer's prefill of packed prompts that go on from states in int8, one of them new, beside the same with float32
    states that torch widened before and rounds after it: shares of entries that are not the same, and 0 if other slots
    are untouched."""
    torch.manual_seed(d_k)
    lengths = [1, 64, 130, 70] if not run.small else [1, 5]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    dtype = torch.bfloat16 if run.cuda else torch.float32
    spec = replace(
        large_mixer(run, d_k),
        num_k_heads=heads,
        num_v_heads=heads * groups,
        d_k=d_k,
        d_v=d_v,
        has_decay=gated,
    )
    mixer = make_mixer(spec, run.device, dtype)
    mixer.in_proj.to(dtype)
    mixer.o_proj.to(dtype)
    slots = len(lengths) + 2
    narrowed = random_state(spec, slots, dtype, "int8", run.device)
    at = torch.randperm(slots, device=run.device)[: len(lengths)]
    narrowed.zero(int(at[0]))
    others = torch.ones(slots, dtype=torch.bool, device=run.device).index_fill(0, at, False)
    before = rows_of(narrowed, others)
    assert narrowed.scales is not None
    wide = DeltaState(widen(narrowed.recurrent, narrowed.scales), narrowed.conv.clone())
    x, residual = torch.randn(2, offsets[-1], 8, device=run.device, dtype=dtype)
    made, expected = (
        add_delta_prefill(mixer, x, None, residual.clone(), offsets, state, at, run.rule)
        for state in (narrowed, wide)
    )
    codes, scales = narrow(wide.recurrent[at].cpu())
    touched = any(unlike(a, b) for a, b in zip(before, rows_of(narrowed, others), strict=True))
    return {
        "x": unlike(made, expected),
        "codes": unlike(narrowed.recurrent[at], codes),
        "scales": unlike(narrowed.scales[at], scales),
        "conv": unlike(narrowed.conv, wide.conv),
        "others": float(touched),
    }


def check_prompt_states(run: Run) -> Iterator[list[str]]:
    """Prompts with states in int8."""
    if "int8" not in run.state_dtypes:
        raise SkippedError("skipped: no states in int8")
    for gated, heads, groups, d_k, d_v in rule_shapes(run):
        run.need(5)
        name = f"prompts, int8 states d_k {d_k} d_v {d_v} {'gated' if gated else 'delta'}"
        found = compare_prompt_states(run, gated, heads, groups, d_k, d_v)
        run.report.setdefault("kernels", {})[name] = found | {"state_dtype": "int8"}
        told = ", ".join(f"{part} {share:.1e}" for part, share in found.items())
        yield [name, run.check(not any(found.values()), name), f"shares that differ from torch's: {told}"]
