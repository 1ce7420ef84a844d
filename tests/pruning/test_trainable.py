"""What recovery trains, and that nothing else changes."""

import itertools
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, UNEVEN, write_checkpoint
from second_kind import AverageSpec, registered
from torch import nn

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from modeling.layers import RMSNorm
from modeling.model import Model
from pruning.trainable import TRAINABLE_SETS, part_rows, trainable

CONFIGS = {
    "gated": GATED,
    "delta": DELTA,
    "conv bias, widths by layer": UNEVEN,
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "dense", CONFIGS[request.param])).load()


def outputs(model):
    ids = torch.arange(70) % model.spec.vocab_size
    return model.logits(model(ids, [0, 50, 70])[0])


@pytest.mark.parametrize("which", TRAINABLE_SETS)
def test_untrained_the_model_stays_what_it_was(model, which):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = outputs(model)
    with trainable(model, which, rank=4) as parameters:
        assert parameters
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(p) for name, p in before.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.embeddings.weight) == model.spec.tie_embeddings


@pytest.mark.parametrize(
    ("which", "parts", "ending"),
    [
        ("lora", "qkv", ("conv.weight", "conv.bias", "norm.weight", "dt_bias")),
        ("small", "qk", ("conv.weight", "conv.bias", "norm.weight")),
    ],
)
def test_only_what_is_claimed_changes(model, which, parts, ending):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with trainable(model, which, rank=4) as parameters, torch.no_grad():
        for p in parameters.values():
            p += torch.randn_like(p)
        trained = outputs(model)
    torch.testing.assert_close(outputs(model), trained, rtol=2e-3, atol=2e-3)
    for name, p in model.state_dict().items():
        if name.endswith("mixer.in_proj.weight"):
            mixer = model.get_submodule(name.removesuffix(".in_proj.weight"))
            rows = [0, *itertools.accumulate(part_rows(mixer))]
            for part, (a, b) in zip(("q", "k", "v", "rest"), itertools.pairwise(rows), strict=True):
                assert p[a:b].equal(before[name][a:b]) == (part not in parts), (name, part)
        else:
            assert p.equal(before[name]) == (not name.endswith(ending)), name


@pytest.mark.parametrize("which", ["lora", "small"])
def test_of_a_layer_of_another_kind_only_the_blocks_norms_are_trained(which):
    spec = family_of(GATED).spec(GATED)
    layers = (spec.layers[0], replace(spec.layers[1], mixer=AverageSpec(48)), spec.layers[2])
    with registered(), torch.device("meta"):
        model = Model(replace(spec, layers=layers))
        model.layers[1].mixer.q_norm = RMSNorm(48, 1e-6)
        model.layers[1].mixer.o_proj.bias = nn.Parameter(torch.empty(64))
    with trainable(model, which, rank=4) as parameters:
        trained = {name.removeprefix("layers.1.") for name in parameters if name.startswith("layers.1.")}
        linear = {name for name in parameters if name.startswith("layers.2.")}
    assert trained == {"mixer_norm.weight", "ffn_norm.weight"}
    assert {"layers.2.mixer.conv.weight", "layers.2.mixer.o_norm.weight"} <= linear
    assert "norm.weight" in parameters


def test_full_trains_every_parameter(model):
    with trainable(model, "full") as parameters:
        assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in model.parameters())


def test_an_adapter_adds_a_matrix_of_its_rank_and_scale(model):
    block = model.layers[0].mixer
    rows = block.spec.key_dim
    before = block.in_proj.weight[:rows].clone()
    with trainable(model, "lora", rank=4, alpha=12) as parameters, torch.no_grad():
        b = parameters["layers.0.mixer.in_proj.q.lora_B.default.weight"]
        a = parameters["layers.0.mixer.in_proj.q.lora_A.default.weight"]
        b += torch.randn_like(b)
        added = 3.0 * b @ a
    torch.testing.assert_close(block.in_proj.weight[:rows], before + added, rtol=1e-4, atol=1e-5)
    assert torch.linalg.matrix_rank(added) == 4


def test_adapters_depend_on_the_seed_alone(model):
    def start(seed):
        torch.manual_seed(torch.seed())
        state = torch.get_rng_state()
        with trainable(model, "lora", rank=4, seed=seed) as parameters:
            assert torch.get_rng_state().equal(state)
            return torch.cat([p.detach().flatten() for name, p in parameters.items() if "lora_A" in name])

    assert start(1).equal(start(1))
    assert not start(1).equal(start(2))
