"""Checkpoints of ours in stock flash-linear-attention: same names and shapes, same logits, same greedy text."""

from math import prod

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from interpret_fla import ask_stock_fla

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from modeling.model import Model
from modeling.runtime import TorchRuntime
from modeling.state import StatePool

# Seconds of CPU time, but minutes on a machine that is busy with something else.
pytestmark = pytest.mark.timeout(900)

SHAPES = {
    "delta_net-1.3B": {"model_type": "delta_net"},
    "gated_deltanet-defaults": {"model_type": "gated_deltanet"},
    "delta-tied": DELTA,
    "delta-gate-untied": {**DELTA, "use_gate": True, "tie_word_embeddings": False},
    "delta-no-beta": {**DELTA, "use_beta": False},
    "delta-odd-d_k": {**DELTA, "expand_k": 36 / 64, "conv_size": 3},
    "delta-hidden-ratio": {**DELTA, "intermediate_size": None, "hidden_ratio": 3, "hidden_size": 320},
    "gated-value-groups": GATED,
    "gated-tied": {**GATED, "tie_word_embeddings": True, "num_v_heads": None},
    "gated-no-gate": {**GATED, "use_gate": False},
    "gated-sigmoid": {**GATED, "output_gate_activation": "sigmoid", "allow_neg_eigval": True},
    "gated-odd-d_k": {**GATED, "head_dim": 13, "expand_v": 24 / 13},
    "gated-d_k-49-of-d_v-128": {**GATED, "head_dim": 49, "expand_v": 2.612244897959184},
    "gated-intermediate-rule": {**GATED, "intermediate_size": None, "hidden_ratio": None, "hidden_size": 200},
}

RUN = {
    "delta-gate-neg-eigval": {
        **DELTA,
        "num_hidden_layers": 2,
        "use_gate": True,
        "allow_neg_eigval": True,
        "tie_word_embeddings": False,
    },
    "delta-narrow-no-beta": {
        **DELTA,
        "num_hidden_layers": 2,
        "expand_k": 36 / 64,
        "use_beta": False,
        "norm_eps": 0.01,
    },
    "gated-value-groups": {**GATED, "num_hidden_layers": 2, "allow_neg_eigval": True},
    "gated-narrow-sigmoid": {
        **GATED,
        "num_hidden_layers": 2,
        "num_v_heads": None,
        "head_dim": 12,
        "expand_v": 2.0,
        "output_gate_activation": "sigmoid",
        "tie_word_embeddings": True,
    },
}
PROMPT = [3, 141, 59, 26, 53]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return {name: write_checkpoint(directory / name, config, seed=7) for name, config in RUN.items()}


@pytest.fixture(scope="module")
def stock(paths, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("stock")
    return ask_stock_fla(scratch, configs=SHAPES, checkpoints=paths, prompt=PROMPT, new_tokens=3)


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_stock_model(stock, name):
    family = family_of(SHAPES[name])
    spec = family.spec(SHAPES[name])
    with torch.device("meta"):
        parameters = dict(Model(spec).named_parameters())
    ours = {}
    for m in family.tensors(spec):
        assert sum(m.rows) == parameters[m.ours].shape[0]
        for theirs, rows in zip(m.theirs, m.rows, strict=True):
            ours[theirs] = [rows, *parameters[m.ours].shape[1:]]
    squeezed = {
        key: [shape[0], *shape[2:]] if key.endswith("conv1d.weight") else shape
        for key, shape in stock.shapes[name].items()
    }
    assert ours == squeezed


def test_the_whole_of_our_model_is_mapped(stock):
    for name, config in SHAPES.items():
        family = family_of(config)
        with torch.device("meta"):
            parameters = dict(Model(family.spec(config)).named_parameters())
        assert {m.ours for m in family.tensors(family.spec(config))} == set(parameters)
        assert sum(p.numel() for p in parameters.values()) == sum(map(prod, stock.shapes[name].values()))


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_stock_logits_and_greedy_text_are_ours(paths, stock, name):
    model = open_checkpoint(paths[name]).load()
    hidden, state = model(torch.tensor(PROMPT), [0, len(PROMPT)])
    logits = model.logits(hidden)
    expected = stock.logits[name]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4

    pool = StatePool(model.spec, 2)
    slot = torch.tensor([pool.allocate()])
    pool.scatter(slot, state)
    ids = [int(logits[-1].argmax())]
    while len(ids) < len(stock.ids[name]):
        hidden = TorchRuntime(model).decode(torch.tensor(ids[-1:]), pool, slot)
        ids.append(int(model.logits(hidden).argmax()))
    assert ids == stock.ids[name]
    assert len(set(ids)) > 1, "a model that repeats one token proves little"
