"""Hybrid checkpoints in the hub's layouts, and stock transformers as the oracle of what they compute."""

import pytest
import torch
from hybrids import CASES, write_hybrid
from safetensors.torch import load_file, save_file
from stock_logits import stock_logits

GENERATOR = torch.Generator().manual_seed(0)
# Less than a chunk of the chunked rule, a chunk and a bit, and two.
SEQUENCES = [torch.randint(1, 257, (n,), generator=GENERATOR).tolist() for n in (9, 70, 130)]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hybrids")
    return {
        name: write_hybrid(directory / name, case, seed=i) for i, (name, case) in enumerate(CASES.items())
    }


def _broken(directory):
    """A checkpoint with each kind of fault in its tensors."""
    faults = {
        "missing": lambda tensors: tensors.pop("model.layers.0.linear_attn.A_log"),
        "unexpected": lambda tensors: tensors.update(more=torch.zeros(1)),
        "mismatched": lambda tensors: tensors.update({"model.norm.weight": torch.zeros(1)}),
    }
    broken = {name: write_hybrid(directory / name, CASES["text-dense-tied"]) for name in faults}
    for name, fault in faults.items():
        file = broken[name] / "model.safetensors"
        tensors = load_file(file)
        fault(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return broken


@pytest.fixture(scope="module")
def stock(paths, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stock")
    return stock_logits(directory, paths | _broken(directory), SEQUENCES, NEW_TOKENS)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_the_layout_whole(stock, name):
    assert stock.problems.get(name) is None
    assert all(bool(logits.isfinite().all()) for logits in stock.logits[name])
    assert max(len(set(ids)) for ids in stock.greedy[name]) > 2, "a model that repeats itself proves little"


def test_the_oracle_refuses_what_is_missing_unexpected_or_of_another_shape(stock):
    assert "missing_keys" in stock.problems["missing"] and "A_log" in stock.problems["missing"]
    assert "unexpected_keys" in stock.problems["unexpected"] and "'more'" in stock.problems["unexpected"]
    assert "ignore_mismatched_sizes" in stock.problems["mismatched"]
