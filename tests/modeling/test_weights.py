"""Weights that are there twice: a tied head that is stored too, a single file beside an index."""

import json

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from interpret_fla import ask_stock_fla
from safetensors.torch import load_file, save_file

import modeling.weights
from modeling.checkpoint import CheckpointError, open_checkpoint
from modeling.weights import difference

INDEX = "model.safetensors.index.json"
TIED = {**GATED, "tie_word_embeddings": True}
EMBEDDINGS = "model.embeddings.weight"


# A head that is tied and stored


def tied(path, head):
    """A checkpoint whose config ties the head, with `head(embeddings)` stored."""
    tensors = random_tensors(TIED)
    tensors["lm_head.weight"] = head(tensors[EMBEDDINGS].clone())
    return write_checkpoint(path, TIED, tensors)


def last_changed(head):
    head[-1, -1] += 0.25
    return head


def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(tmp_path):
    checkpoint = open_checkpoint(tied(tmp_path / "c", last_changed))
    for use in (checkpoint.load, checkpoint.check_tensors):
        with pytest.raises(CheckpointError) as e:
            use()
        assert str(e.value) == (
            f"{tmp_path / 'c'}: config.json says tie_word_embeddings=true, but lm_head.weight is stored and is not "
            "model.embeddings.weight: 1 of 257 rows differ, by up to 0.25. transformers would use the head, vLLM the "
            "embeddings: set tie_word_embeddings to false in config.json to keep the head, or remove lm_head.weight to "
            "use the embeddings"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_copy_of_the_embeddings_is_fine_whatever_its_dtype(tmp_path, dtype):
    tensors = random_tensors(TIED)
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS].bfloat16()
    tensors["lm_head.weight"] = tensors[EMBEDDINGS].to(dtype, copy=True)
    model = open_checkpoint(write_checkpoint(tmp_path / "c", TIED, tensors)).load()
    assert model.lm_head.weight is model.embeddings.weight


def test_a_tied_head_of_another_shape_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' has shape \[256, 64\], the config says"):
        open_checkpoint(tied(tmp_path / "c", lambda head: head[:-1].contiguous())).load()


# What `difference` says


def stored(tmp_path, **tensors):
    save_file(tensors, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


@pytest.mark.parametrize("entries", [1, 7, 2**22])
def test_rows_are_counted_across_the_pieces_in_which_they_are_read(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(modeling.weights, "_ENTRIES", entries)
    a = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[3, 1] += 2
    b[10] -= 0.5
    file = stored(tmp_path, a=a, b=b)
    assert difference(file, "a", file, "b") == "2 of 11 rows differ, by up to 2"
    assert difference(file, "a", file, "a") is None


def test_nan_and_infinity_equal_themselves_only(tmp_path):
    a = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    file = stored(tmp_path, a=a, b=a.double(), c=a.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    assert difference(file, "a", file, "b") is None
    assert difference(file, "a", file, "c") == "1 of 4 rows differ, by up to inf"


def test_shapes_and_single_numbers(tmp_path):
    file = stored(
        tmp_path, a=torch.zeros(2, 3), b=torch.zeros(3, 2), c=torch.tensor(1.0), d=torch.tensor(2.0)
    )
    assert difference(file, "a", file, "b") == "their shapes are [2, 3] and [3, 2]"
    assert difference(file, "c", file, "d") == "they differ" and difference(file, "c", file, "c") is None
    with pytest.raises(CheckpointError, match="tensor 'x' of .* can't be compared"):
        difference(file, "x", file, "a")


# A single file beside an index


@pytest.fixture
def both(tmp_path):
    """A checkpoint with a single file, and shards with an index that hold the same."""
    path = write_checkpoint(tmp_path / "c", DELTA)
    tensors = load_file(path / "model.safetensors")
    weight_map = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_the_single_file_is_read_where_both_hold_the_same(both):
    assert set(open_checkpoint(both).files.values()) == {both / "model.safetensors"}


def test_an_index_of_the_single_file_itself_is_fine(both):
    names = open_checkpoint(both).files
    weight_map = {name: "model.safetensors" for name in names if name != EMBEDDINGS}
    (both / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(both).files == dict.fromkeys(names, both / "model.safetensors")


Q = "model.layers.1.attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t[Q].mul_(2),
            rf"{Q}' differs between model\.safetensors and model-0.*: \d+ of 64 rows differ",
        ),
        (lambda t: t.pop(Q), rf"tensor '{Q}' is only in model-0000\d-of-00002\.safetensors"),
        (lambda t: t.update(other=torch.zeros(1)), r"tensor 'other' is only in model\.safetensors"),
    ],
)
def test_where_they_differ_neither_is_taken(both, change, said):
    edit(both / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=said) as e:
        open_checkpoint(both).load()
    assert str(e.value).endswith(
        f"transformers would read the first, vLLM the second: remove {INDEX} and its files, or model.safetensors"
    )
    (both / INDEX).unlink()
    assert open_checkpoint(both).files


def test_a_shard_that_is_missing_beside_a_single_file_is_named(both):
    (both / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        open_checkpoint(both).load()


# What the messages say of stock loaders, and what they advise

PROMPT = [5, 99, 141]


@torch.no_grad()
def test_stock_takes_the_stored_head_and_the_single_file_and_the_advice_gives_the_same(both, tmp_path):
    edit(both / "model.safetensors", lambda t: t[EMBEDDINGS].mul_(1.5))
    paths = {"head": tied(tmp_path / "t", last_changed), "single": both}
    for path in paths.values():
        with pytest.raises(CheckpointError):
            open_checkpoint(path).load()
    stock = ask_stock_fla(tmp_path, checkpoints=paths, prompt=PROMPT, new_tokens=1)
    (paths["head"] / "config.json").write_text(json.dumps({**TIED, "tie_word_embeddings": False}))
    (both / INDEX).unlink()
    for name, path in paths.items():
        model = open_checkpoint(path).load()
        logits = model.logits(model(torch.tensor(PROMPT), [0, len(PROMPT)])[0])
        apart = float((logits - stock.logits[name]).abs().max() / stock.logits[name].abs().max())
        assert apart < 1e-4, (name, apart)
