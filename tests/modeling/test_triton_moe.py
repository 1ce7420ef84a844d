"""The mixture of experts by Triton kernels, run by Triton's interpreter, against its definition in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from hybrid_cases import LINEAR, Case
from hybrids import write_hybrid
from states import tensors

from modeling.checkpoint import open_checkpoint
from modeling.layers import MoE, RMSNorm
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu import moe as module
from modeling.runtime.gpu.kernels.moe_few import few_scores
from modeling.runtime.gpu.moe import add_moe
from modeling.runtime.gpu.norms import normed
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import MoESpec
from modeling.state import StatePool

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
HIDDEN, EPS = 40, 1e-6
SPECS = {
    "all-of-4": MoESpec(num_experts=4, top_k=4, expert_size=24, shared_size=24),
    "1-of-8": MoESpec(num_experts=8, top_k=1, expert_size=40, shared_size=24),
    "2-of-8": MoESpec(num_experts=8, top_k=2, expert_size=24, shared_size=36),
    "8-of-60": MoESpec(num_experts=60, top_k=8, expert_size=16, shared_size=8),
    "3-of-5": MoESpec(num_experts=5, top_k=3, expert_size=17, shared_size=9),
}
TOLERANCE = {FLOAT32: 2e-6, BFLOAT16: 2e-2}
"""Largest error, as a share of the largest number of the output. The interpreter cuts bfloat16 off, a GPU rounds it."""
FEW, MANY = [1, 4], [17]
"""Tokens whose pairs are computed by themselves, and tokens that are sorted by expert."""


def experts_of(spec: MoESpec, dtype: torch.dtype = FLOAT32, hidden: int = HIDDEN) -> MoE:
    moe = MoE(spec, hidden).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in moe.parameters():
        p.data = (torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5).to(dtype)
    return moe


def norm_of(hidden: int = HIDDEN) -> RMSNorm:
    norm = RMSNorm(hidden, EPS).requires_grad_(False)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return norm


def draw(rows: int, dtype: torch.dtype = FLOAT32, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(moe: MoE, x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor:
    """Token by token in float64; only scores are rounded, to what a product returns, since they decide."""
    dtype, x = x.dtype, x.double()

    def swiglu(row, gate_up, down):
        gate, up = (gate_up.double() @ row).chunk(2)
        return down.double() @ (gate / (1 + (-gate).exp()) * up)

    out = []
    for row in x:
        if norm is not None:
            row = row / (row.square().mean() + norm.eps).sqrt() * norm.weight.double()
        chances = (moe.router.weight.double() @ row).to(dtype).double().softmax(0).tolist()
        chosen = sorted(range(len(chances)), key=lambda e: (-chances[e], e))[: moe.spec.top_k]
        total = sum(chances[e] for e in chosen)
        y = sum(chances[e] / total * swiglu(row, moe.in_proj[e], moe.out_proj[e]) for e in chosen)
        shared = swiglu(row, moe.shared.in_proj.weight, moe.shared.out_proj.weight)
        out.append(y + shared / (1 + (-(moe.shared_gate.weight[0].double() @ row)).exp()))
    return torch.stack(out)


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert y.shape == expected.shape and bool(y.isfinite().all())
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("rows", FEW + MANY)
@pytest.mark.parametrize("name", SPECS)
def test_any_number_of_tokens_is_the_definition(name, rows):
    """A block calls it so: what goes in is the residual, too."""
    moe, norm, x = experts_of(SPECS[name]), norm_of(), draw(rows)
    expected = x.double() + by_definition(moe, x, norm)
    y = add_moe(moe, x, norm, x)
    assert y is x
    assert_close(y, expected, TOLERANCE[FLOAT32])


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("normed", [False, True])
def test_without_a_residual_the_output_comes_alone(rows, normed):
    moe, norm, x = experts_of(SPECS["2-of-8"]), norm_of() if normed else None, draw(rows)
    before = x.clone()
    y = add_moe(moe, x, norm, None)
    assert_close(y, by_definition(moe, x, norm), TOLERANCE[FLOAT32])
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [3, 9])
def test_a_residual_that_is_another_tensor(rows):
    moe, x, residual = experts_of(SPECS["2-of-8"]), draw(rows), draw(rows, seed=5)
    before, expected = x.clone(), residual.double() + by_definition(moe, x)
    y = add_moe(moe, x, None, residual)
    assert y is residual and torch.equal(x, before)
    assert_close(y, expected, TOLERANCE[FLOAT32])


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("name", ["1-of-8", "3-of-5"])
def test_bfloat16(name, rows):
    moe, x = experts_of(SPECS[name], BFLOAT16), draw(rows, BFLOAT16)
    expected = by_definition(moe, x)
    y = add_moe(moe, x, None, None)
    assert y.dtype == BFLOAT16
    assert_close(y, expected, TOLERANCE[BFLOAT16])


@pytest.mark.parametrize("rows", [2, 9])
def test_bfloat16_behind_a_norm_in_float32(rows):
    moe, norm, x = experts_of(SPECS["2-of-8"], BFLOAT16), norm_of(), draw(rows, BFLOAT16)
    expected = x.double() + by_definition(moe, x, norm)
    assert_close(add_moe(moe, x, norm, x), expected, TOLERANCE[BFLOAT16])


def test_few_tokens_have_the_scores_that_more_would_have():
    """Scores of what the norm rounds to bfloat16, so that close experts are chosen alike."""
    moe, norm, x = experts_of(SPECS["8-of-60"], BFLOAT16), norm_of(), draw(3, BFLOAT16)
    scores = torch.empty(3, 60)
    few_scores[(15, 3)](
        x, norm.weight, moe.router.weight, scores, EPS, hidden=HIDDEN, experts=60, block_n=4, block_k=64
    )
    expected = normed(norm, x).double() @ moe.router.weight.double().T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 9])
def test_experts_in_a_narrower_dtype_are_widened(rows):
    moe, norm, x = experts_of(SPECS["2-of-8"]), norm_of(), draw(rows)
    moe.in_proj.data, moe.out_proj.data = moe.in_proj.bfloat16(), moe.out_proj.bfloat16()
    expected = x.double() + by_definition(moe, x, norm)
    assert_close(add_moe(moe, x, norm, x), expected, TOLERANCE[FLOAT32])


@pytest.mark.parametrize("tiles", [pair for _, *pair in module.SORTED], ids=lambda pair: str(pair[0].block_m))
def test_the_tiles_of_all_sizes(monkeypatch, tiles):
    """More tokens than a block holds, and a block's last columns beyond the matrices."""
    monkeypatch.setattr(module, "tiles", lambda tokens, dtype: tiles)
    moe, x = experts_of(SPECS["1-of-8"]), draw(70)
    moe.router.weight.data[2:5] = 0.0
    expected = by_definition(moe, x)
    assert_close(add_moe(moe, x, None, None), expected, TOLERANCE[FLOAT32])


def test_sizes_that_are_whole_blocks(monkeypatch):
    """No masks, as with the sizes of real models."""
    monkeypatch.setattr(module, "FEW_IN", dataclasses.replace(module.FEW_IN, block_k=32))
    monkeypatch.setattr(module, "FEW_OUT", dataclasses.replace(module.FEW_OUT, block_k=32))
    moe, norm = experts_of(MoESpec(4, 2, 64, 64), hidden=128), norm_of(128)
    for rows in (2, 9):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(3))
        expected = x.double() + by_definition(moe, x, norm)
        assert_close(add_moe(moe, x, norm, x), expected, TOLERANCE[FLOAT32])


@pytest.mark.parametrize("rows", [4, 20])
def test_experts_that_all_tokens_take_and_that_none_takes(rows):
    moe, x = experts_of(SPECS["2-of-8"]), draw(rows) * 0.1 + 1
    moe.router.weight.data[[1, 6]] += 1.0
    moe.router.weight.data[[0, 7]] -= 1.0
    assert_close(add_moe(moe, x, None, None), by_definition(moe, x), 1e-4)


@pytest.mark.parametrize("rows", [2, 9])
def test_of_equal_experts_the_first_are_taken(rows):
    moe, x = experts_of(SPECS["3-of-5"]), draw(rows)
    moe.router.weight.data.zero_()
    assert_close(add_moe(moe, x, None, None), by_definition(moe, x), TOLERANCE[FLOAT32])


@pytest.mark.parametrize("rows", [2, 9])
def test_a_router_that_is_certain_does_not_overflow(rows):
    moe, x = experts_of(SPECS["2-of-8"]), draw(rows)
    moe.router.weight.data *= 90
    assert_close(add_moe(moe, x, None, None), by_definition(moe, x), 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_broken_token_stays_broken_and_alone(rows, value):
    moe, norm, x = experts_of(SPECS["2-of-8"]), norm_of(), draw(rows)
    others = [i for i in range(rows) if i != 2]
    expected = x[others].double() + by_definition(moe, x[others], norm)
    x[2, 5] = value
    y = add_moe(moe, x, norm, x)
    assert not y[2].isfinite().any()
    assert_close(y[others], expected, TOLERANCE[FLOAT32])


def each_row_alone(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`np.matmul` whose rows have the same bits wherever they are, as those of tensor cores have. NumPy's own have
    not."""
    return np.stack([(row[:, None] * b).sum(0, dtype=dtype) for row in a])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("rows", [4, 16, pytest.param(40, marks=pytest.mark.slow)])
def test_a_token_keeps_its_bits_beside_other_tokens(monkeypatch, rows, dtype):
    """Whatever the others are, and so whichever experts they take, and wherever it stands among them."""
    monkeypatch.setattr(np, "matmul", each_row_alone)
    moe, norm, token = experts_of(SPECS["2-of-8"], dtype), norm_of(), draw(1, dtype)[0]
    found = []
    for seed, place in ((1, 0), (2, rows // 2), (3, rows - 1)):
        x = draw(rows, dtype, seed) if seed < 3 else draw(1, dtype, seed).repeat(rows, 1)
        x[place] = token
        found.append(add_moe(moe, x, norm, x)[place])
    assert all(torch.equal(y, found[0]) for y in found)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        add_moe(experts_of(SPECS["2-of-8"]).double(), draw(2).double(), None, None)


class Idle:
    """In the place of a kernel: launches nothing."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("rows", [1, 8, 9, 64, 1024, 9000])
def test_nothing_waits_for_the_device(monkeypatch, rows):
    """Tensors without data can be asked for none: what is launched follows from the shapes alone."""
    grids = []
    for name in ("combine", "experts_in", "experts_out", "few_in", "few_out", "few_scores", "route"):
        monkeypatch.setattr(module, name, Idle(grids))
    with torch.device("meta"):
        moe = MoE(MoESpec(256, 8, 512, 512), 2048).bfloat16().requires_grad_(False)
        x = torch.empty(rows, 2048, dtype=BFLOAT16)
    assert add_moe(moe, x, None, x) is x
    assert len(grids) == (3 if rows <= module.FEW_ROWS else 4)
    assert all(second <= 65535 for _, second, *_ in (grid for grid in grids if len(grid) > 1))


def test_more_tokens_for_an_expert_take_larger_blocks():
    sizes = [module.tiles(tokens, BFLOAT16)[0].block_m for tokens in (0.5, 12, 13, 24, 25, 48, 49, 1e6)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(module.SORTED)
    assert module.tiles(1e6, FLOAT32) == (module.FLOAT32, module.FLOAT32)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next"])
@torch.inference_mode()
def test_a_whole_model(tmp_path, monkeypatch, model_type):
    monkeypatch.setattr(module, "FEW_ROWS", 2)
    case = Case(
        model_type, 1, 2, 8, 8, layer_types=(LINEAR,) * 2, fused=model_type != "qwen3_next", hidden=24
    )
    model = open_checkpoint(write_hybrid(tmp_path / "c", case)).load()
    ours, theirs = GpuRuntime(model, chunked_gated_delta_rule), TorchRuntime(model)
    pools = [StatePool(model.spec, 3) for _ in range(2)]
    slots = torch.tensor([2, 0, 1])
    ids = torch.randint(0, 257, (10,), generator=torch.Generator().manual_seed(0))
    steps = [
        lambda runtime, pool: runtime.prefill(ids[:5], [0, 2, 5], pool, slots[:2]),
        lambda runtime, pool: runtime.decode(ids[5:7], pool, slots[:2]),
        lambda runtime, pool: runtime.decode(ids[7:], pool, slots),
    ]
    for step in steps:
        expected = step(theirs, pools[1])
        torch.testing.assert_close(step(ours, pools[0]), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*map(tensors, pools), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
