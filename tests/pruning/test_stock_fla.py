"""Reduced checkpoints in stock flash-linear-attention: loaded whole, and the same logits as ours."""

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from interpret_fla import ask_stock_fla

from modeling.checkpoint import open_checkpoint
from pruning.criteria import CRITERIA
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select

PROMPT = [5, 99, 141]
REDUCED = {
    "gated-value-groups": ({**GATED, "num_hidden_layers": 1}, 13),
    "gated-truncating-width": (
        {**GATED, "num_hidden_layers": 1, "num_v_heads": 2, "head_dim": 128, "expand_v": 1.0},
        49,
    ),
    "delta": ({**DELTA, "num_hidden_layers": 1}, 7),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reduced")
    for name, (config, keep) in REDUCED.items():
        checkpoint = open_checkpoint(write_checkpoint(directory / "dense" / name, config))
        selection = select(checkpoint, CRITERIA["random"], (keep,) * len(checkpoint.spec.layers))
        reduce_checkpoint(checkpoint, selection, Provenance("random", 0), directory / name)
    return {name: directory / name for name in REDUCED}


@torch.no_grad()
def test_stock_models_load_every_tensor_and_agree_with_ours(paths, tmp_path):
    stock = ask_stock_fla(tmp_path, checkpoints=paths, prompt=PROMPT, new_tokens=1)
    for name, path in paths.items():
        model = open_checkpoint(path).load()
        assert set(model.spec.d_k) == {REDUCED[name][1]}
        logits = model.logits(model(torch.tensor(PROMPT), [0, len(PROMPT)])[0])
        expected = stock.logits[name]
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4, name
