"""Kernels on random shapes against float64."""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from gpu_common import Run, error
from torch import Tensor

from modeling.layers import DeltaMixer
from modeling.ops import RuleInputs, reference_gated_delta_rule
from modeling.runtime.gpu.delta import delta_step
from modeling.runtime.gpu.prefill import delta_gates, delta_heads, normed_output
from modeling.spec import DeltaSpec, StateDType, StateTypes
from modeling.state import DeltaState
from modeling.state.rounding import LEVELS, narrow

KERNEL_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Largest difference from float64, relative, by dtype: float32 arithmetic, and one rounding of what is stored."""
CODE_TOLERANCE = 0.01
"""How much further from the exact value than half a unit a whole number of an int8 state may be, in its units: a value
so close to the middle between two numbers may be rounded to either, for float32 arithmetic is not exact. Of a column's
largest entry, 127 units, it is 8e-5."""
RULE_TOLERANCE = 1e-2
"""Largest difference of fla's kernels on bfloat16 inputs from float64 on the same inputs."""


def make_mixer(spec: DeltaSpec, device: str, dtype: torch.dtype) -> DeltaMixer:
    mixer = DeltaMixer(spec, 8, 0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (1 if name == "o_norm.weight" else 0))
    mixer.conv.to(dtype)
    return mixer.to(device).requires_grad_(False)


def large_mixer(run: Run, d_k: int, groups: int = 1) -> DeltaSpec:
    """The mixer of DeltaNet-1.3B with decay and gate; of Qwen3.5-4B with 2 `groups`, value heads to a key head."""
    heads, width = (2, 16) if run.small else (16, 128)
    return DeltaSpec(
        num_k_heads=heads,
        num_v_heads=groups * heads,
        d_k=d_k // (8 if run.small else 1),
        d_v=width,
        conv_kernel=4,
        conv_bias=False,
        has_decay=True,
        has_beta=True,
        beta_scale=1.0,
        gate="silu",
        norm_eps=1e-6,
    )


def shapes(small: bool) -> Iterator[tuple[DeltaSpec, torch.dtype]]:
    """Every d_k of interest once, everything else drawn."""
    draw = random.Random(0)
    for i, d_k in enumerate((5, 16, 24) if small else (16, 48, 64, 77, 96, 128, 256)):
        heads, groups = draw.choice((1, 2, 4)), draw.choice((1, 2))
        yield (
            DeltaSpec(
                num_k_heads=heads,
                num_v_heads=heads * groups,
                d_k=d_k,
                d_v=draw.choice((8, 24)) if small else draw.choice((64, 100, 128, 192, 256)),
                conv_kernel=draw.choice((2, 3, 4, 4)),
                conv_bias=draw.random() < 0.5,
                has_decay=i % 2 == 0,
                has_beta=draw.random() < 0.8,
                beta_scale=draw.choice((1.0, 2.0)),
                gate=draw.choice(("none", "silu", "sigmoid")),
                norm_eps=1e-6,
            ),
            draw.choice((torch.bfloat16, torch.float32)),
        )


def random_state(
    spec: DeltaSpec, rows: int, dtype: torch.dtype, state_dtype: StateDType, device: str
) -> DeltaState:
    """States as a server keeps them beside weights of this dtype."""
    state = DeltaState.zeros(spec, rows, StateTypes.named(state_dtype, dtype), device)
    recurrent = torch.randn(rows, spec.num_v_heads, spec.d_k, spec.d_v, device=device)
    conv = torch.randn(rows, spec.conv_channels, spec.conv_kernel - 1, device=device)
    state.scatter(torch.arange(rows, device=device), DeltaState(recurrent, conv))
    return state


def rows_of(state: DeltaState, rows: Tensor) -> list[Tensor]:
    """Copies of all that states consist of."""
    return [t[rows] for t in vars(state).values() if t is not None]


def exact_state(state: DeltaState, rows: Tensor) -> DeltaState:
    """What states stand for, in float64."""
    recurrent = state.recurrent[rows].double()
    if state.scales is not None:
        recurrent *= state.scales[rows].double().unsqueeze(-2)
    return DeltaState(recurrent, state.conv[rows].double())


def state_errors(state: DeltaState, rows: Tensor, exact: Tensor) -> dict[str, float]:
    """How far recurrent states are from the exact ones `[rows, heads, d_k, d_v]`, float64.

    `state` is a relative error. Of states in int8 `scale` is the largest error of a scale, relative to the mean of its
    head's, `code` how much further than half a unit a whole number is from the exact value at most, and `flips` the
    share of numbers that are not those that the exact state is rounded to: such as lie in the middle between two.
    """
    if state.scales is None:
        return {"state": error(state.recurrent[rows], exact)}
    codes = state.recurrent[rows]
    scales = exact.abs().amax(-2) / LEVELS
    units = exact / scales.masked_fill(scales == 0, 1.0).unsqueeze(-2)
    return {
        "scale": float(((state.scales[rows] - scales).abs() / scales.mean(-1, keepdim=True)).max()),
        "code": float((codes - units).abs().max()) - 0.5,
        "flips": float((codes != narrow(exact)[0]).double().mean()),
    }


def worst(values: Iterable[float]) -> float:
    """The largest, or NaN if one is."""
    return float(torch.tensor([*values]).max())


@torch.inference_mode()
def compare_step(run: Run, spec: DeltaSpec, dtype: torch.dtype, state_dtype: StateDType) -> dict[str, float]:
    """Three steps of the decode kernel on random slots, one of them new, and the batch padded with the null slot,
    against DeltaMixer.step in float64: errors of o, of the states and of the convolution's last inputs, and 0 if the
    other slots are untouched."""
    torch.manual_seed(spec.d_k)
    batch, padding, slots = (2, 2, 5) if run.small else (17, 7, 40)
    mixer = make_mixer(spec, run.device, dtype)
    exact = exact_mixer(mixer)
    state = random_state(spec, slots + 1, dtype, state_dtype, run.device)
    at = torch.randperm(slots, device=run.device)[:batch]
    state.zero(int(at[0]))
    padded = torch.cat([at, torch.full_like(at[:1], slots).expand(padding)])
    others = torch.ones(slots + 1, dtype=torch.bool, device=run.device).index_fill(0, padded, False)
    before = rows_of(state, others)
    steps: list[dict[str, float]] = []
    for _ in range(3):
        projected = torch.randn(len(padded), sum(spec.in_proj_sizes), device=run.device, dtype=dtype)
        wide = exact_state(state, at)
        expected = exact.step(projected[:batch].double(), wide, torch.arange(batch, device=run.device))
        o = delta_step(mixer, projected, state, padded)[:batch]
        errors = {"o": error(o, expected), "history": error(state.conv[at], wide.conv)}
        steps.append(errors | state_errors(state, at, wide.recurrent))
    after = rows_of(state, others)
    touched = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {name: worst(step[name] for step in steps) for name in steps[0]} | {"others": float(touched)}


def step_tolerances(dtype: torch.dtype, state_dtype: StateDType) -> dict[str, float]:
    """What each error of `compare_step` must stay below."""
    rounded = KERNEL_TOLERANCE[torch.bfloat16]
    keeps_inputs = StateTypes.named(state_dtype, dtype).inputs == dtype
    tolerances = {"o": KERNEL_TOLERANCE[dtype], "history": 1e-12 if keeps_inputs else rounded}
    if state_dtype == "int8":
        return tolerances | {"scale": KERNEL_TOLERANCE[torch.float32], "code": CODE_TOLERANCE}
    return tolerances | {"state": KERNEL_TOLERANCE[getattr(torch, state_dtype)]}


def exact_mixer(mixer: DeltaMixer) -> DeltaMixer:
    exact = DeltaMixer(mixer.spec, 8, 0).to(mixer.conv.weight.device).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    return exact.requires_grad_(False)


def check_step(run: Run) -> Iterator[list[str]]:
    """The decode kernel on random shapes."""
    for state_dtype in run.state_dtypes:
        bad, shares, flips = 0, [], 0.0
        for spec, dtype in shapes(run.small):
            run.need(5)
            name = (
                f"step d_k {spec.d_k} d_v {spec.d_v} heads {spec.num_k_heads}/{spec.num_v_heads} "
                f"{'gated' if spec.has_decay else 'delta'} {str(dtype)[6:]} state {state_dtype}"
            )
            errors = compare_step(run, spec, dtype, state_dtype)
            run.report.setdefault("kernels", {})[name] = errors | {"state_dtype": state_dtype}
            share = worst(errors[e] / most for e, most in step_tolerances(dtype, state_dtype).items())
            shares.append(share)
            flips = max(flips, errors.get("flips", 0.0))
            if not share < 1 or errors["others"]:
                bad += 1
                yield [name, run.check(False, name), str(errors)]
        told = f"worst {worst(shares):.2f} of tolerance"
        if state_dtype == "int8":
            told += f"; at most {flips:.1e} of the codes unlike those of the exact state, all near a boundary"
        yield [f"decode step, all shapes, state {state_dtype}", "FAIL" if bad else "ok", told]


@torch.inference_mode()
def compare_inputs(run: Run, spec: DeltaSpec, dtype: torch.dtype) -> dict[str, float]:
    """Convolution (packed, ragged sequences with a history), gates and gated norm of prompts against the plain ones in
    float64."""
    torch.manual_seed(spec.d_k)
    lengths = [1, 3, 66] if run.small else [1, 2, 64, 130, 600]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    mixer = make_mixer(spec, run.device, dtype)
    projected = torch.randn(offsets[-1], sum(spec.in_proj_sizes), device=run.device, dtype=dtype)
    qkv = projected[:, : spec.conv_channels]
    history = torch.randn(
        len(lengths), spec.conv_channels, spec.conv_kernel - 1, device=run.device, dtype=dtype
    )
    exact = exact_mixer(mixer)
    expected = exact.heads(qkv.double(), offsets, history.double())
    slots = torch.arange(len(lengths), device=run.device)
    made = delta_heads(mixer, projected, offsets, history, slots)
    errors = {name: error(a, b) for name, a, b in zip("qkv", made, expected, strict=False)}
    _, gate, *gates_in = projected.double().split(spec.in_proj_sizes, dim=-1)
    for name, a, b in zip(("beta", "g"), delta_gates(mixer, projected), exact.gates(*gates_in), strict=True):
        if a is not None:
            errors[name] = error(a, b)
    o = torch.randn_like(made[2])
    errors["norm"] = error(normed_output(mixer, o, projected), exact.gated_norm(o.double(), gate))
    return errors | {"history": float(not torch.equal(made[3].double(), expected[3]))}


def check_inputs(run: Run) -> Iterator[list[str]]:
    """The kernels of ours that prompts take, on random shapes."""
    bad, shares = 0, []
    for spec, dtype in itertools.islice(shapes(run.small), 0, None, 2):
        run.need(3)
        errors = compare_inputs(run, spec, dtype)
        run.report.setdefault("kernels", {})[f"prompt kernels d_k {spec.d_k} {str(dtype)[6:]}"] = errors
        exact = {"beta", "g"}  # float32 whatever the dtype is
        share = worst(
            e / KERNEL_TOLERANCE[torch.float32 if name in exact else dtype]
            for name, e in errors.items()
            if name != "history"
        )
        shares.append(share)
        if not share < 1 or errors["history"]:
            bad += 1
            name = f"prompt kernels d_k {spec.d_k}"
            yield [name, run.check(False, name), str(errors)]
    yield ["prompt kernels, all shapes", "FAIL" if bad else "ok", f"worst {worst(shares):.2f} of tolerance"]


def rule_shapes(run: Run) -> Iterator[tuple[bool, int, int, int, int]]:
    """Gated or not, key heads, value heads to each, d_k, d_v."""
    for gated in (True, False):
        for shape in [(1, 2, 8, 8)] if run.small else [(2, 2, 128, 128), (2, 1, 48, 128)]:
            yield (gated, *shape)


@torch.inference_mode()
def compare_rule(run: Run, gated: bool, heads: int, groups: int, d_k: int, d_v: int) -> tuple[float, float]:
    """The prefill rule on packed, ragged sequences with initial states against the float64 token loop: relative errors
    of o and of the final states."""
    lengths = [1, 64, 130, 70] if not run.small else [1, 5]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    torch.manual_seed(d_k)
    n = offsets[-1]
    narrow = torch.bfloat16 if run.cuda else torch.float32
    q, k = (
        torch.nn.functional.normalize(torch.randn(n, heads, d_k, device=run.device), dim=-1).to(narrow)
        for _ in range(2)
    )
    v = torch.randn(n, heads * groups, d_v, device=run.device).to(narrow)
    g = -3 * torch.rand(n, heads * groups, device=run.device) ** 4 if gated else None
    beta = torch.rand(n, heads * groups, device=run.device)
    initial = torch.randn(len(lengths), heads * groups, d_k, d_v, device=run.device)
    inputs = RuleInputs(q, k, v, g, beta, d_k**-0.5, offsets, initial)
    tensors = {name: x.double().cpu() for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    exact = reference_gated_delta_rule(replace(inputs, **tensors))  # type: ignore[arg-type]
    ours = run.rule(inputs)
    o, state = (error(a.cpu(), b) for a, b in zip(ours, exact, strict=True))
    return o, state


def check_rule(run: Run) -> Iterator[list[str]]:
    """The prefill rule."""
    for gated, heads, groups, d_k, d_v in rule_shapes(run):
        run.need(10)
        o, state = compare_rule(run, gated, heads, groups, d_k, d_v)
        name = f"prefill rule d_k {d_k} d_v {d_v} {'gated' if gated else 'delta'}"
        run.report.setdefault("kernels", {})[name] = {"o": o, "state": state}
        yield [name, run.check(max(o, state) < RULE_TOLERANCE, name), f"o {o:.1e} state {state:.1e}"]
