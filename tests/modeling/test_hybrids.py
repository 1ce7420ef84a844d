"""Hybrid checkpoints in the hub's layouts, and stock transformers as the oracle of what they compute."""

import itertools

import pytest
import torch
from hybrid_cases import CASES, CHAT_END
from hybrids import write_hybrid
from reducing import difference
from safetensors.torch import load_file, save_file
from stock_logits import stock_logits

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime, compile_model
from modeling.state import StatePool

GENERATOR = torch.Generator().manual_seed(0)
# Less than a chunk of the chunked rule, a chunk and a bit, and two.
SEQUENCES = [torch.randint(1, 257, (n,), generator=GENERATOR).tolist() for n in (9, 70, 130)]
PACKED = torch.tensor([token for ids in SEQUENCES for token in ids])
OFFSETS = [0, *itertools.accumulate(map(len, SEQUENCES))]
NEW_TOKENS = 5


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
    assert max(len(set(ids)) for ids in stock.greedy[name]) > 1, (
        "a model that repeats one token proves little"
    )


def test_the_oracle_refuses_what_is_missing_unexpected_or_of_another_shape(stock):
    assert "missing_keys" in stock.problems["missing"] and "A_log" in stock.problems["missing"]
    assert "unexpected_keys" in stock.problems["unexpected"] and "'more'" in stock.problems["unexpected"]
    assert "ignore_mismatched_sizes" in stock.problems["mismatched"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_stock_transformers(paths, stock, name):
    """Sequences are packed, so that each has to keep to itself. Both sides compute in float32, whose rounding is 1e-7;
    eight layers make about 1e-6 of it."""
    model = open_checkpoint(paths[name]).load()
    hidden, _ = model(PACKED, OFFSETS)
    for i, logits in enumerate(model.logits(hidden).split([len(ids) for ids in SEQUENCES])):
        assert difference(logits, stock.logits[name][i]) < 1e-5


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_greedy_text_is_that_of_stock_generate(paths, stock, name, compiled):
    """Prompts together, then token by token together, with their states in a pool."""
    model = open_checkpoint(paths[name]).load()
    runtime = compile_model(model) if compiled else TorchRuntime(model)
    pool = StatePool.with_room(model.spec, len(SEQUENCES) + 1, 256)
    pool.allocate()
    slots = torch.tensor([pool.allocate() for _ in SEQUENCES])
    hidden = runtime.prefill(PACKED, OFFSETS, pool, slots)
    ids = [runtime.logits(hidden[[end - 1 for end in OFFSETS[1:]]]).argmax(-1)]
    while len(ids) < NEW_TOKENS:
        ids.append(runtime.logits(runtime.decode(ids[-1], pool, slots)).argmax(-1))
    assert torch.stack(ids, 1).tolist() == stock.greedy[name]


@pytest.mark.parametrize("name", CASES)
def test_texts_end_where_either_file_says(paths, name):
    """config.json names the end of a text, generation_config.json that of a chat's turn."""
    assert set(open_checkpoint(paths[name]).spec.eos_token_ids) == (
        {0, CHAT_END} if CASES[name].vision else {0}
    )
