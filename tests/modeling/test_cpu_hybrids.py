"""Hybrid checkpoints of every family and layout, dense and reduced, compiled: against the plain torch model in float64,
which `test_hybrids.py` holds against stock transformers."""

import itertools

import pytest
import torch
from hybrid_cases import CASES
from hybrids import write_hybrid
from reducing import random_keep, reduce
from torch import nn

from modeling.checkpoint import open_checkpoint
from modeling.layers import MoE
from modeling.runtime.cpu import CpuRuntime
from modeling.spec import StateTypes
from modeling.state import StatePool

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
LENGTHS = (9, 70, 200)
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(1, 257, (sum(LENGTHS),), generator=GENERATOR)
OFFSETS = [0, *itertools.accumulate(LENGTHS)]
KINDS = ("dense", "reduced")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hybrids")
    made = {}
    for i, (name, case) in enumerate(CASES.items()):
        dense = open_checkpoint(write_hybrid(directory / name, case, seed=i))
        widths = [max(1, d_k // 2 - layer % 2) for layer, d_k in enumerate(dense.spec.d_k)]
        out = directory / f"{name}-reduced"
        reduce(dense, random_keep(dense.spec, widths), out)
        made[name] = {"dense": dense, "reduced": open_checkpoint(out)}
    return made


def difference(a, b):
    """Relative, in the Euclidean norm: single bfloat16 roundings of small numbers mean nothing."""
    assert a.shape == b.shape and bool(a.isfinite().all())
    return float((a.double() - b).norm() / b.norm())


def exact_of(checkpoint, weights):
    """In float64; products with bfloat16 weights take bfloat16 inputs."""
    model = checkpoint.load(dtype=weights).double()
    if weights == BFLOAT16:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, x: x[0].to(BFLOAT16).double())
    return model


def clear_of_ties(model):
    """Runs the model: hidden states, and which tokens come before the first of their sequence whose experts are so
    nearly alike that float32 may choose others; such a token is another one, and all that follow it are."""
    near = torch.zeros(len(IDS), dtype=torch.bool)
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            k = block.ffn.spec.top_k

            def look(_module, _inputs, scores, k=k):
                best = scores.sort(descending=True).values
                near.logical_or_(best[:, k - 1] - best[:, k] < 1e-5)

            block.ffn.router.register_forward_hook(look)
    hidden, _ = model(IDS, OFFSETS)
    clear = torch.cat([part.cumsum(0) == 0 for part in near.split(LENGTHS)])
    assert clear.double().mean() > 0.25
    return hidden, clear


def run(runtime, pool, pieces, decoded):
    """Hidden states of all tokens: prompts go in by rounds of pieces, the last tokens one by one."""
    slots = [2, 0, 1]
    for slot, length in zip(slots, LENGTHS, strict=True):
        pool.grow(slot, length)
    found = [[] for _ in LENGTHS]
    at = [0] * len(LENGTHS)
    for piece in itertools.cycle(pieces):
        left = [n - decoded - a for n, a in zip(LENGTHS, at, strict=True)]
        going = [i for i, n in enumerate(left) if n > 0]
        if not going:
            break
        counts = [min(piece, left[i]) for i in going]
        ids = torch.cat([IDS[OFFSETS[i] + at[i] :][:n] for i, n in zip(going, counts, strict=True)])
        offsets = [0, *itertools.accumulate(counts)]
        hidden = runtime.prefill(ids, offsets, pool, torch.tensor([slots[i] for i in going]))
        for i, n, h in zip(going, counts, hidden.split(counts), strict=True):
            found[i].append(h)
            at[i] += n
    for _ in range(decoded):
        # Padded by rows of the null slot, as an engine pads.
        ids = torch.stack([IDS[OFFSETS[i] + a] for i, a in enumerate(at)] + [IDS[0]] * 2)
        hidden = runtime.decode(ids, pool, torch.tensor([*slots, pool.null_slot, pool.null_slot]))
        for i in range(len(LENGTHS)):
            found[i].append(hidden[i : i + 1])
            at[i] += 1
    return torch.cat([h for of_one in found for h in of_one])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_prompts_in_any_pieces_and_steps_are_the_model_in_float64(checkpoints, name, kind):
    checkpoint = checkpoints[name][kind]
    expected, clear = clear_of_ties(exact_of(checkpoint, FLOAT32))
    runtime = CpuRuntime(checkpoint.load())
    for pieces, decoded in (((200,), 0), ((64,), 5), ((1, 37, 5, 130), 3), ((4,), 5)):
        pool = StatePool(runtime.model.spec, 4, pages=10, max_tokens=256)
        hidden = run(runtime, pool, pieces, decoded)
        assert difference(hidden[clear], expected[clear]) < 1e-5
        assert pool.pages.lengths.tolist() == [70, 200, 9, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_in_bfloat16_they_are_what_its_rounding_allows(checkpoints, name, kind):
    checkpoint = checkpoints[name][kind]
    expected, _ = exact_of(checkpoint, BFLOAT16)(IDS, OFFSETS)
    runtime = CpuRuntime(checkpoint.load(dtype=BFLOAT16))
    pool = StatePool(runtime.model.spec, 4, pages=10, types=StateTypes(inputs=BFLOAT16))
    hidden = run(runtime, pool, (64, 13), 5)
    assert hidden.dtype == BFLOAT16
    errors = (hidden.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The router's choice may fall otherwise where two experts are nearly alike: then a token is another one.
    assert float(errors.median()) < 1e-2 and float((errors < 5e-2).double().mean()) > 0.8
    if not any(isinstance(block.ffn, MoE) for block in runtime.model.blocks):
        assert float(errors.max()) < 5e-2


@torch.inference_mode()
def test_narrow_states_and_pages_beside_wide_weights(checkpoints):
    for name in ("vl-dense-three-value-heads", "next"):
        checkpoint = checkpoints[name]["dense"]
        expected, _ = exact_of(checkpoint, FLOAT32)(IDS, OFFSETS)
        for types in (StateTypes(BFLOAT16, BFLOAT16), StateTypes(torch.int8, BFLOAT16)):
            runtime = CpuRuntime(checkpoint.load())
            hidden = run(runtime, StatePool(runtime.model.spec, 4, pages=10, types=types), (64,), 5)
            assert difference(hidden, expected) < 5e-2
