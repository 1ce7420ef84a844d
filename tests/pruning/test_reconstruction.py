"""Layers of a reduced checkpoint fitted to the dense one's."""

import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, UNEVEN, random_tensors, write_checkpoint
from hybrids import CASES, write_hybrid
from interpret_fla import ask_stock_fla
from reducing import random_keep, reduce

from modeling.checkpoint import open_checkpoint
from modeling.ops import chunked_gated_delta_rule
from pruning.calibration import cu_seqlens
from pruning.errors import PruningError
from pruning.reconstruction import ReconstructionSettings, reconstruct, tokens_to_run
from pruning.surgery import replace_tensors

WINDOWS = torch.randint(0, 257, (32, 40), generator=torch.Generator().manual_seed(0))
HELD_OUT = 2
SETTINGS = ReconstructionSettings(steps=12, batch=3)
KINDS = {
    "gated": GATED,
    "delta": DELTA,
    "conv bias, widths by layer": UNEVEN,
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
    """The output of every block of the whole model for all windows, `[windows, length, hidden]` each."""
    model, found = checkpoint.load(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, result: found.append(result[0].view(*WINDOWS.shape, -1)))
    model(WINDOWS.flatten(), cu_seqlens(WINDOWS, checkpoint.spec.eos_token_ids))
    return found


def errors(dense, reduced):
    """By layer, the mean over the channels of the squared error of the last windows over the variance of all."""
    return {
        layer: float(((a - b)[-HELD_OUT:].square().mean((0, 1)) / b.var((0, 1), correction=0)).mean())
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
    first = found.fits[0]
    assert first.before == pytest.approx(before[first.layer], rel=1e-3)
    for fit in found.fits:
        assert fit.after == pytest.approx(after[fit.layer], rel=1e-3)
        assert fit.after < fit.before
        assert after[fit.layer] < before[fit.layer]
    changed = set()
    for name in reduced.files:
        a, b = reduced.tensor(name), fitted.tensor(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if not a.equal(b):
            assert ".mixer" in reduced.map_of[name].ours, name
            changed.add(reduced.map_of[name].layer)
    assert changed == set(dense.spec.linear_layers), "layers of other kinds stay"


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A dense checkpoint half of whose channels are zeros, and the reduced one that is without them."""
    path = tmp_path_factory.mktemp("idle")
    full = open_checkpoint(write_checkpoint(path / "full", {**GATED, "num_hidden_layers": 1}))
    keep = random_keep(full.spec, [16])
    reduce(full, keep, path / "dense", export="masked")
    reduce(full, keep, path / "reduced")
    return open_checkpoint(path / "dense"), open_checkpoint(path / "reduced")


def test_a_layer_that_lost_nothing_stays_as_it_was(idle):
    found = reconstruct(*idle, WINDOWS, SETTINGS)
    (fit,) = found.fits
    assert fit.before < 1e-3, "but for the epsilon of the output norm"
    assert fit.before <= fit.after
    assert found.tensors == {}


def test_weights_that_were_disturbed_are_found_again(idle, tmp_path):
    """The undisturbed ones give the dense layer's output, so there is a fit almost without an error; 120 steps come
    half of the way."""
    dense, reduced = idle
    generator = torch.Generator().manual_seed(1)
    noisy = {}
    for name in reduced.files:
        if "q_proj" in name or "k_proj" in name:
            tensor = reduced.tensor(name)
            noisy[name] = tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    disturbed = written(reduced, noisy, tmp_path / "disturbed")
    windows = torch.randint(0, 257, (64, 64), generator=generator)
    (fit,) = reconstruct(dense, disturbed, windows, replace(SETTINGS, steps=120, batch=8)).fits
    assert fit.before > 0.05
    assert fit.after < 0.6 * fit.before


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    dense = opened(path / "dense", "gated")
    return dense, halved(dense, path / "reduced")


def test_the_result_depends_on_the_arguments_alone(pair):
    def fitted(windows=WINDOWS, **options):
        torch.manual_seed(torch.seed())
        return reconstruct(*pair, windows, options.pop("settings", SETTINGS), **options).tensors

    first = fitted()
    for again in (fitted(), fitted(hidden_device="cpu", rule=chunked_gated_delta_rule)):
        assert list(again) == list(first)
        assert all(again[name].equal(tensor) for name, tensor in first.items())
    other = fitted(settings=replace(SETTINGS, seed=1))
    assert not any(
        other[name].equal(tensor) for name, tensor in first.items() if name.endswith("q_proj.weight")
    )


def test_every_layer_of_both_runs_the_rule_that_is_given(pair):
    calls = []

    def rule(inputs):
        calls.append(inputs.v.shape[0])
        return chunked_gated_delta_rule(inputs)

    reconstruct(*pair, WINDOWS, SETTINGS, rule=rule)
    assert sum(calls) == tokens_to_run(pair[0].spec, WINDOWS, SETTINGS)


def test_what_is_not_finite_names_the_layer_or_the_tensor(pair, tmp_path):
    with pytest.raises(PruningError, match=r"layers\.0\.\S+' holds NaN or Inf"):
        reconstruct(*pair, WINDOWS, replace(SETTINGS, lr=1e30))
    tensors = random_tensors(GATED)
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    broken = open_checkpoint(write_checkpoint(tmp_path / "broken", GATED, tensors))
    with pytest.raises(PruningError, match="layer 1: the error of its output is nan"):
        reconstruct(broken, pair[1], WINDOWS, SETTINGS)


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": -1}, {"lr": 0.0}, {"lr": float("nan")}], ids=str)
def test_settings_that_cannot_be_meant_are_refused_by_name(change):
    ((name, value),) = change.items()
    with pytest.raises(PruningError, match=f"{name}={value} must be"):
        ReconstructionSettings(**change)


def test_one_window_cannot_both_be_fitted_to_and_measured(pair):
    with pytest.raises(PruningError, match="windows=1 must be at least 2"):
        reconstruct(*pair, WINDOWS[:1], SETTINGS)


def test_stock_fla_loads_what_is_written_and_computes_the_same(tmp_path):
    dense = open_checkpoint(write_checkpoint(tmp_path / "dense", {**GATED, "num_hidden_layers": 1}))
    reduced = halved(dense, tmp_path / "reduced")
    found = reconstruct(dense, reduced, WINDOWS, SETTINGS)
    assert found.tensors
    fitted = written(reduced, found.tensors, tmp_path / "fitted")
    prompt = [5, 99, 141]
    stock = ask_stock_fla(tmp_path, checkpoints={"fitted": fitted.path}, prompt=prompt, new_tokens=1)
    expected = stock.logits["fitted"]
    before, after = (
        model.logits(model(torch.tensor(prompt), [0, 3])[0]) for model in (reduced.load(), fitted.load())
    )
    assert float((after - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((before - expected).abs().max() / expected.abs().max()) > 1e-2
