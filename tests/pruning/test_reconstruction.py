"""Layers of a reduced checkpoint fitted to the dense one's."""

import shutil

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from hybrids import CASES, write_hybrid
from reducing import random_keep, reduce

from modeling.checkpoint import open_checkpoint
from pruning.calibration import cu_seqlens
from pruning.reconstruction import ReconstructionSettings, reconstruct, tokens_to_run
from pruning.surgery import replace_tensors

WINDOWS = torch.randint(0, 257, (12, 40), generator=torch.Generator().manual_seed(0))
SETTINGS = ReconstructionSettings(steps=12, batch=3)
KINDS = {
    "gated": GATED,
    "delta, widths by layer": {**DELTA, "head_dim": [16, 16, 12]},
    "conv bias": {**GATED, "conv_bias": True},
    **{
        name: CASES[name]
        for name in ("vl-dense-bf16", "vl-moe-fused", "text-moe-each-tied", "next-some-dense", "olmo")
    },
}


def opened(path, kind):
    made = KINDS[kind]
    return open_checkpoint(
        write_checkpoint(path, made) if isinstance(made, dict) else write_hybrid(path, made)
    )


def halved(dense, path):
    """The dense checkpoint with half of each layer's channels, drawn at random."""
    reduce(dense, random_keep(dense.spec, [d_k // 2 for d_k in dense.spec.d_k]), path)
    return open_checkpoint(path)


def written(reduced, tensors, path):
    """A copy of the reduced checkpoint with these tensors."""
    shutil.copytree(reduced.path, path)
    replace_tensors(path, tensors)
    return open_checkpoint(path)


@torch.no_grad()
def outputs(checkpoint):
    """The output of every block of the whole model for all windows, `[tokens, hidden]` each."""
    model, found = checkpoint.load(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, result: found.append(result[0]))
    model(WINDOWS.flatten(), cu_seqlens(WINDOWS, checkpoint.spec.eos_token_ids))
    return found


def errors(dense, reduced):
    """By layer, the mean over the channels of the squared error over the variance of the dense model's."""
    return {
        layer: float(((a - b).square().mean(0) / b.var(0, correction=0)).mean())
        for layer, (a, b) in enumerate(zip(outputs(reduced), outputs(dense), strict=True))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_what_the_whole_models_give(tmp_path, kind):
    dense = opened(tmp_path / "dense", kind)
    reduced = halved(dense, tmp_path / "reduced")
    told = []
    found = reconstruct(dense, reduced, WINDOWS, SETTINGS, advance=told.append)
    assert sum(told) == tokens_to_run(dense.spec, WINDOWS, SETTINGS)
    fitted = written(reduced, found.tensors, tmp_path / "fitted")
    assert [fit.layer for fit in found.fits] == list(dense.spec.linear_layers)
    before, after = errors(dense, reduced), errors(dense, fitted)
    assert found.fits[0].before == pytest.approx(before[found.fits[0].layer], rel=1e-3)
    for fit in found.fits:
        assert fit.after == pytest.approx(after[fit.layer], rel=1e-3)
        assert fit.after < fit.before
        assert after[fit.layer] < 0.9 * before[fit.layer]
    changed = set()
    for name in reduced.files:
        a, b = reduced.tensor(name), fitted.tensor(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if not a.equal(b):
            changed.add(reduced.map_of[name].layer)
            assert reduced.map_of[name].role not in ("experts", "embeddings", "head"), name
    assert changed == set(dense.spec.linear_layers)
