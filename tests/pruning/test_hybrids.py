"""Reduced hybrids: ordinary checkpoints of their layout for stock transformers, and equal to the masked dense model."""

import filecmp
import json
from dataclasses import replace

import pytest
import torch
from hybrid_tensors import hybrid_tensors
from hybrids import CASES, config_of, write_hybrid
from reducing import difference, masked_dense
from safetensors.torch import load_file
from stock_logits import stock_logits

from modeling.checkpoint import REDUCTION, open_checkpoint
from pruning.companions import CARD
from pruning.criteria import CRITERIA
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select, widths_to_keep

REDUCED = {
    "vl-dense-tied": 8,
    "vl-dense-bf16": 5,
    "text-dense-odd-irregular": 4,
    "vl-moe-fused": 8,
    "vl-moe-fused-tied-odd": 5,
    "vl-moe-each": 7,
    "text-moe-each-tied": 8,
    "next": 8,
    "next-some-dense": 5,
    "olmo": 6,
    "olmo-old-names-rope": 7,
    "olmo-odd-irregular": 4,
}
"""Kept channels, half of them or an odd number."""
SEQUENCES = [
    torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 9)
]
PACKED, OFFSETS = torch.tensor([token for ids in SEQUENCES for token in ids]), [0, 70, 79]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    return {name: write_hybrid(directory / name, CASES[name], seed=i) for i, name in enumerate(REDUCED)}


@pytest.fixture(scope="module")
def selections(dense):
    """The channels of half by their weights, an odd number at random."""
    made = {}
    for name, n in REDUCED.items():
        checkpoint = open_checkpoint(dense[name])
        criterion = CRITERIA["random" if n % 2 else "l1"]
        made[name] = select(checkpoint, criterion, widths_to_keep(checkpoint.spec, n))
    return made


@pytest.fixture(scope="module")
def reduced(dense, selections, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reduced")
    for name, selection in selections.items():
        provenance = Provenance("test", 0)
        reduce_checkpoint(open_checkpoint(dense[name]), selection, provenance, directory / name)
    return {name: directory / name for name in REDUCED}


@pytest.fixture(scope="module")
def stock(reduced, tmp_path_factory):
    return stock_logits(tmp_path_factory.mktemp("stock"), reduced, SEQUENCES)


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_stock_transformers_loads_it_and_agrees_with_us(reduced, stock, name):
    assert stock.problems.get(name) is None
    model = open_checkpoint(reduced[name]).load()
    assert set(model.spec.d_k) == {REDUCED[name]}
    logits = model.logits(model(PACKED, OFFSETS)[0])
    assert difference(logits, torch.cat(stock.logits[name])) < 1e-5


@pytest.mark.parametrize("name", REDUCED)
def test_only_key_rows_and_their_number_have_changed(dense, reduced, name):
    narrow = replace(CASES[name], d_k=REDUCED[name])
    assert json.loads((reduced[name] / "config.json").read_text()) == config_of(narrow)
    before, after = (load_file(paths[name] / "model.safetensors") for paths in (dense, reduced))
    expected = hybrid_tensors(narrow, seed=0)
    assert {key: t.shape for key, t in after.items()} == {key: t.shape for key, t in expected.items()}
    cut = {key for key in before if before[key].shape != after[key].shape}
    for key in before.keys() - cut:
        assert torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype, key
    for key in cut:
        assert ".linear_attn." in key and key.startswith(narrow.prefix)
        # The rows that are left are rows of the dense one, in their order.
        rows = [int((before[key] == row).flatten(1).all(1).nonzero()) for row in after[key]]
        assert rows == sorted(rows) and after[key].dtype == before[key].dtype


@pytest.mark.parametrize("name", REDUCED)
def test_other_files_are_copied(dense, reduced, name):
    files = {file.name for file in dense[name].iterdir()}
    assert {file.name for file in reduced[name].iterdir()} == files | {REDUCTION, CARD}
    same, *_ = filecmp.cmpfiles(dense[name], reduced[name], files, shallow=False)
    assert set(same) == files - {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_sliced_is_masked_dense(dense, selections, reduced, name):
    checkpoint = open_checkpoint(dense[name])
    keep = [cut.keep for cut in selections[name].cuts]
    model = open_checkpoint(reduced[name]).load(dtype=torch.float64)
    hidden, _ = model(PACKED, OFFSETS)
    expected, _ = masked_dense(checkpoint, keep, PACKED, OFFSETS)
    assert difference(hidden, expected) < 1e-10
    # Without the factor of eps the two differ: the test would see a wrong scale.
    unscaled, _ = masked_dense(checkpoint, keep, PACKED, OFFSETS, eps_factor=False)
    assert difference(unscaled, expected) > 1e-5
