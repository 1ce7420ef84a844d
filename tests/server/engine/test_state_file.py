"""Files of states: written whole or not at all, and read as they were written or refused."""

import errno
import os
import threading
from dataclasses import replace

import pytest
import torch
from checkpoints import GATED
from engine_machine import HYBRID
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from states import tensors

from modeling.families import family_of
from modeling.spec import StateTypes
from modeling.state import StatePool, transfer
from server.engine.state_file import StateLoadError, host_tensors, layout, load_state, save_state

SPEC = family_of(GATED).spec({**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]})


def random_pool(dtype=torch.float32):
    pool = StatePool(SPEC, 3, types=StateTypes(dtype))
    for t in tensors(pool):
        t.copy_(torch.randn(t.shape) * 40)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_state_comes_back_as_it_was_into_its_slot_only(tmp_path, dtype):
    pool = random_pool(dtype)
    save_state(host_tensors(pool, 1, 0), tmp_path / "a", {"model": "x"})
    before = [t.clone() for t in tensors(pool)]
    load_state(pool, 2, tmp_path / "a", 0)
    for t, old in zip(tensors(pool), before, strict=True):
        assert torch.equal(t[2], old[1]) and torch.equal(t[:2], old[:2]) and torch.equal(t[3], old[3])
    with safe_open(tmp_path / "a", "pt") as f:
        assert f.metadata() == {"model": "x"}
        kinds = ("recurrent", "conv", *(["scales"] if dtype == torch.int8 else []))
        assert sorted(f.keys()) == sorted(f"layers.{i}.{kind}" for i in range(3) for kind in kinds)
        assert f.get_tensor("layers.1.recurrent").dtype == dtype
        assert f.get_tensor("layers.1.recurrent").shape == (4, 8, 24)
    assert os.listdir(tmp_path) == ["a"]


def change_shape(tensors):
    tensors["layers.1.recurrent"] = tensors["layers.1.recurrent"][:, :4].contiguous()


def change_dtype(tensors):
    tensors["layers.2.conv"] = tensors["layers.2.conv"].half()


def drop(tensors):
    del tensors["layers.2.conv"]


def add(tensors):
    tensors["layers.3.conv"] = torch.zeros(1)


def drop_scales(tensors):
    del tensors["layers.1.scales"]


def a_scale_per_key_channel(tensors):
    tensors["layers.1.scales"] = torch.ones(4, 8)


def scales_in_bfloat16(tensors):
    tensors["layers.0.scales"] = tensors["layers.0.scales"].bfloat16()


def codes_without_a_sign(tensors):
    tensors["layers.0.recurrent"] = tensors["layers.0.recurrent"].to(torch.uint8)


CHANGES = {
    change_shape: r"layers.1.recurrent is torch.float32 \[4, 4, 24\], and torch.float32 \[4, 8, 24\] is needed",
    change_dtype: r"layers.2.conv is torch.float16",
    drop: "layers.2.conv is in one of the two only",
    add: "layers.3.conv is in one of the two only",
}
CHANGES_OF_INT8 = {
    drop_scales: "layers.1.scales is in one of the two only",
    a_scale_per_key_channel: r"layers.1.scales is torch.float32 \[4, 8\], and torch.float32 \[4, 24\] is needed",
    scales_in_bfloat16: r"layers.0.scales is torch.bfloat16",
    codes_without_a_sign: r"layers.0.recurrent is torch.uint8",
}


@pytest.mark.parametrize(
    ("dtype", "change", "mention"),
    [
        *((torch.float32, change, mention) for change, mention in CHANGES.items()),
        *((torch.int8, change, mention) for change, mention in CHANGES_OF_INT8.items()),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_written(tmp_path, dtype, change, mention):
    pool = random_pool(dtype)
    save_state(host_tensors(pool, 1, 0), tmp_path / "a", {})
    loaded = load_file(tmp_path / "a")
    change(loaded)
    save_file(loaded, tmp_path / "a")
    before = [t.clone() for t in tensors(pool)]
    with pytest.raises(StateLoadError, match=mention):
        load_state(pool, 2, tmp_path / "a", 0)
    assert all(torch.equal(t, b) for t, b in zip(tensors(pool), before, strict=True))


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\xff" * 100])
def test_what_is_no_state_is_refused(tmp_path, content):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StateLoadError, match="can't be read"):
        load_state(random_pool(), 2, path, 0)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    pool = random_pool()
    with pytest.raises(OSError, match="none"):
        save_state(host_tensors(pool, 0, 0), tmp_path / "none" / "a", {})
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "x").touch()
    with pytest.raises(OSError, match="dir"):
        save_state(host_tensors(pool, 0, 0), tmp_path / "dir", {})
    assert sorted(os.listdir(tmp_path)) == ["dir"]


def test_a_disk_that_is_full_after_all_is_an_error(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_state(host_tensors(random_pool(), 0, 0), tmp_path / "a", {})
    assert os.listdir(tmp_path) == []


def test_pinned_memory_that_is_not_there_is_a_memory_error(monkeypatch):
    def empty(*arguments, **options):
        assert options["pin_memory"]
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(MemoryError, match="out of memory"):
        transfer.pinned(torch.zeros(3))


def test_the_length_of_keys_and_values_is_that_of_the_state_and_of_nothing_else(tmp_path):
    """A short convolution of one token has no last inputs: its tensor is empty in any state."""
    delta = replace(HYBRID.layers[0], mixer=replace(HYBRID.layers[0].mixer, conv_kernel=1))
    pool = StatePool(replace(HYBRID, layers=(delta, HYBRID.layers[1])), 2, pages=4)
    slot, tokens = pool.allocate(), 70
    pool.grow(slot, tokens)
    pool.advance(torch.tensor([slot]), [0, tokens])
    assert layout(pool)["layers.0.conv"][1][1] == 0
    save_state(host_tensors(pool, slot, tokens), tmp_path / "a", {})
    other = pool.allocate()
    pool.grow(other, tokens)
    load_state(pool, other, tmp_path / "a", tokens)
    assert pool.pages.lengths[other] == tokens
    for wrong in (69, 71):
        with pytest.raises(
            StateLoadError, match=rf"keys is .*\[70, 1, 2\], and torch.float32 \[{wrong}, 1, 2\]"
        ):
            load_state(pool, other, tmp_path / "a", wrong)


def test_a_padded_step_does_not_change_what_a_file_is_to_hold():
    """A file is read in a thread of its own, and each step that is padded moves the null slot on and back."""
    pool = StatePool(HYBRID, 2, pages=4)
    before = layout(pool)
    pool.pages.lengths[pool.null_slot] += 1
    assert layout(pool) == before and before["layers.1.keys"] == ("F32", [0, 1, 2])


def test_a_file_is_read_and_written_without_more_threads(tmp_path):
    pool = StatePool(family_of(GATED).spec({**GATED, "head_dim": 64, "expand_v": 4.0}), 2)
    assert max(t[0].numel() for t in tensors(pool)) >= 2**16, "torch would not share the work out"
    threads = torch.get_num_threads()
    counts = []

    def work():
        torch.set_num_threads(4)
        counts.append(len(os.listdir("/proc/self/task")))
        save_state(host_tensors(pool, 0, 0), tmp_path / "a", {})
        load_state(pool, 1, tmp_path / "a", 0)
        counts.append(len(os.listdir("/proc/self/task")))

    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    before, after = counts
    assert after <= before
