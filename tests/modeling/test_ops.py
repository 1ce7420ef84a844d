"""Every form of the gated delta rule against the float64 token loop and against fla's own naive functions."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.ops import RuleInputs, chunked_gated_delta_rule, reference_gated_delta_rule
from modeling.runtime.cpu import compiled_gated_delta_rule

CHUNKED = [chunked_gated_delta_rule, compiled_gated_delta_rule]
LENGTHS = [1, 3, 63, 64, 65, 200]
SHAPES = [(2, 2, 32, 32), (2, 4, 24, 40), (1, 3, 33, 16), (3, 3, 16, 48)]  # k heads, v heads, d_k, d_v


def draw(lengths: list[int], shape: tuple[int, int, int, int], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    k_heads, v_heads, d_k, d_v = shape
    n = sum(lengths)
    kw = {"dtype": torch.float64}
    return {
        "q": F.normalize(torch.randn(n, k_heads, d_k, **kw), dim=-1),
        "k": F.normalize(torch.randn(n, k_heads, d_k, **kw), dim=-1),
        "v": torch.randn(n, v_heads, d_v, **kw),
        "g": -3 * torch.rand(n, v_heads, **kw) ** 4,
        "beta": 2 * torch.rand(n, v_heads, **kw),
        "initial_state": torch.randn(len(lengths), v_heads, d_k, d_v, **kw),
    }


def offsets(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def single(x: dict[str, Tensor], *, decay: bool, state: bool) -> dict[str, Tensor | None]:
    return {
        name: None if (name == "g" and not decay) or (name == "initial_state" and not state) else t.float()
        for name, t in x.items()
    }


@pytest.mark.parametrize("rule", CHUNKED)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_matches_float64_reference(rule, length, shape, decay, state):
    x = draw([length], shape)
    wide = {**x, "g": x["g"] if decay else None, "initial_state": x["initial_state"] if state else None}
    expected = reference_gated_delta_rule(RuleInputs(**wide, scale=0.3, cu_seqlens=[0, length]))
    actual = rule(RuleInputs(**single(x, decay=decay, state=state), scale=0.3, cu_seqlens=[0, length]))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("rule", CHUNKED)
@pytest.mark.parametrize("decay", [False, True])
def test_chunked_packed_sequences_of_all_lengths(rule, decay):
    lengths = [65, 1, 200, 64, 3, 128, 63]
    x = draw(lengths, (2, 4, 24, 40))
    wide = {**x, "g": x["g"] if decay else None}
    expected = reference_gated_delta_rule(RuleInputs(**wide, scale=0.2, cu_seqlens=offsets(lengths)))
    actual = rule(RuleInputs(**single(x, decay=decay, state=True), scale=0.2, cu_seqlens=offsets(lengths)))
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("rule", [reference_gated_delta_rule, *CHUNKED])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 65])
def test_matches_flas_naive_functions(rule, length, shape, state):
    x = single(draw([length], shape), decay=True, state=state)
    groups = shape[1] // shape[0]
    q, k = (x[n].repeat_interleave(groups, 1) for n in "qk")
    args = dict(scale=shape[2] ** -0.5, cu_seqlens=[0, length], initial_state=x["initial_state"])

    o, s = rule(RuleInputs(x["q"], x["k"], x["v"], x["g"], x["beta"], **args))
    expected_o, expected_s = naive_recurrent_gated_delta_rule(
        *(t[None] for t in (q, k, x["v"], x["beta"], x["g"])),
        initial_state=x["initial_state"],
        output_final_state=True,
    )
    assert error(o, expected_o[0]) < 1e-5
    assert error(s, expected_s) < 1e-5

    o, s = rule(RuleInputs(x["q"], x["k"], x["v"], None, x["beta"], **args))
    expected_o, expected_s = delta_rule_recurrence(
        *(t[None].transpose(1, 2) for t in (q, k, x["v"], x["beta"])), initial_state=x["initial_state"]
    )
    assert error(o, expected_o[0].transpose(0, 1)) < 1e-5
    assert error(s, expected_s) < 1e-5


@pytest.mark.parametrize("decay", [False, True])
def test_chunked_gradients_match_the_reference(decay):
    lengths = [65, 3, 70]
    x = draw(lengths, (2, 4, 12, 20))
    names = [n for n in x if decay or n != "g"]

    def gradients(rule) -> tuple[Tensor, ...]:
        leaves = {n: x[n].clone().requires_grad_() for n in names}
        o, s = rule(RuleInputs(**{"g": None, **leaves}, scale=0.3, cu_seqlens=offsets(lengths)))
        torch.manual_seed(1)
        loss = (o * torch.randn_like(o)).sum() + (s * torch.randn_like(s)).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    expected = gradients(reference_gated_delta_rule)
    for name, a, b in zip(names, gradients(chunked_gated_delta_rule), expected, strict=True):
        assert error(a, b) < 1e-10, name


@pytest.mark.parametrize("rule", CHUNKED)
def test_strong_decay_does_not_overflow(rule):
    x = single(draw([128], (2, 2, 16, 16)), decay=True, state=True)
    x["g"] = torch.full_like(x["g"], -80.0)
    o, s = rule(RuleInputs(**x, scale=1.0, cu_seqlens=[0, 128]))
    assert torch.isfinite(o).all() and torch.isfinite(s).all()


def test_autocast_keeps_float32_products():
    x = single(draw([65], (2, 2, 16, 16)), decay=True, state=True)
    plain, _ = chunked_gated_delta_rule(RuleInputs(**x, scale=1.0, cu_seqlens=[0, 65]))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = chunked_gated_delta_rule(RuleInputs(**x, scale=1.0, cu_seqlens=[0, 65]))
    assert torch.equal(plain, cast)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    k_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    d_k=st.integers(1, 130),
    d_v=st.integers(1, 130),
    decay=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 100),
)
def test_compiled_of_any_shape_matches_float64_reference(
    lengths, k_heads, groups, d_k, d_v, decay, state, seed
):
    x = draw(lengths, (k_heads, k_heads * groups, d_k, d_v), seed)
    x["beta"] /= 2  # beyond 1 the state may grow from token to token, and every rounding with it
    x |= {name: None for name, kept in (("g", decay), ("initial_state", state)) if not kept}
    arguments = dict(scale=d_k**-0.5, cu_seqlens=offsets(lengths))
    expected = reference_gated_delta_rule(RuleInputs(**x, **arguments))
    inputs = {name: None if t is None else t.float() for name, t in x.items()}
    kept = {name: None if t is None else t.clone() for name, t in inputs.items()}
    for a, b in zip(compiled_gated_delta_rule(RuleInputs(**inputs, **arguments)), expected, strict=True):
        assert error(a, b) < 1e-5
    assert all(t is None or torch.equal(t, kept[name]) for name, t in inputs.items())


def test_compiled_keeps_sequences_apart():
    """NaN in one of them stays there, also on its thread's work space."""
    lengths = [40, 5, 70]
    x = single(draw(lengths, (2, 2, 12, 20)), decay=True, state=True)
    clean, _ = compiled_gated_delta_rule(RuleInputs(**x, scale=1.0, cu_seqlens=offsets(lengths)))
    for name in ("q", "k", "v", "g", "beta"):
        broken = {**x, name: x[name].clone()}
        broken[name][3] = float("nan")
        o, s = compiled_gated_delta_rule(RuleInputs(**broken, scale=1.0, cu_seqlens=offsets(lengths)))
        assert not o[3].isfinite().any() and torch.equal(o[40:], clean[40:]) and s[1:].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"cu_seqlens": [0, 5]},
        {"cu_seqlens": [0, 3, 3, 6]},
        {"cu_seqlens": [0]},
        {"k": torch.zeros(6, 2, 9)},
        {"beta": torch.zeros(6, 3)},
        {"g": torch.zeros(5, 2)},
        {"initial_state": torch.zeros(2, 2, 8, 8)},
        {"v": torch.zeros(6, 3, 8)},
    ],
    ids=str,
)
def test_compiled_refuses_shapes_that_do_not_go_together(change):
    x = single(draw([6], (2, 2, 8, 8)), decay=True, state=True)
    with pytest.raises(ValueError, match="shapes that do not go together|cu_seqlens must rise"):
        compiled_gated_delta_rule(RuleInputs(**{**x, "scale": 1.0, "cu_seqlens": [0, 6], **change}))
