"""Reading checkpoint directories: every dtype and layout, and an error that names what is wrong."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from lowkey.publishing import write_json
from modeling.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from modeling.families import ConfigError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "c", GATED)


def edit(path, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def shard(path, parts=3):
    """Turn model.safetensors into several files and an index; returns the index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % parts}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def parameters(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# Loading


def test_sharded_and_single_file_are_the_same_model(path):
    single = parameters(open_checkpoint(path).load())
    shard(path)
    assert_same(parameters(open_checkpoint(path).load()), single)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_stored_dtype_loads_as_every_dtype(tmp_path, stored, dtype):
    tensors = random_tensors(GATED, dtype=stored)
    model = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, tensors)).load(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, p in model.named_parameters():
        exact = name.endswith(("A_log", "dt_bias", "norm.weight"))
        assert p.dtype == (wide if exact else dtype), name
        assert not p.requires_grad
    assert not model.training
    stored_a_log = tensors["model.layers.1.attn.A_log"]
    assert torch.equal(model.layers[1].mixer.A_log, stored_a_log.to(wide))
    assert torch.equal(
        model.layers[0].ffn.out_proj.weight, tensors["model.layers.0.mlp.down_proj.weight"].to(dtype)
    )


def test_conv_bias_follows_the_dtype(tmp_path):
    config = {**GATED, "conv_bias": True}
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config)).load(dtype=torch.bfloat16)
    assert model.layers[0].mixer.conv.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [False, True])
def test_tied_embeddings_are_one_tensor_whether_or_not_the_head_is_stored(tmp_path, stored):
    config = {**GATED, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    if stored:
        tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config, tensors)).load()
    assert model.lm_head.weight is model.embeddings.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embeddings.weight"])


def test_untied_embeddings_are_two_tensors(path):
    model = open_checkpoint(path).load()
    assert not torch.equal(model.lm_head.weight, model.embeddings.weight)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.attn.k_conv1d.weight",
        "model.layers.0.attn.A_log",
        "lm_head.weight",
        "model.norm.weight",
    ],
)
def test_a_missing_tensor_is_named(path, name):
    edit(path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        open_checkpoint(path).load()


def test_unexpected_tensors_are_counted_and_named(path):
    extra = {f"model.layers.0.attn.extra_{i}": torch.zeros(1) for i in range(7)}
    edit(path, lambda tensors: tensors.update(extra))
    with pytest.raises(
        CheckpointError, match=r"7 tensors that the config does not account for.*extra_0"
    ) as e:
        open_checkpoint(path).load()
    assert "extra_6" not in str(e.value)


def test_a_layer_too_many_is_unexpected(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        open_checkpoint(path).load()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.attn.q_proj.weight", (63, 64)),
        ("model.layers.1.attn.q_conv1d.weight", (64, 1, 3)),
        ("model.layers.1.attn.o_norm.weight", (25,)),
        ("model.embeddings.weight", (64, 257)),
        ("model.layers.0.mlp.up_proj.weight", (96, 64, 2)),
    ],
)
def test_a_mis_shaped_tensor_is_named_with_both_shapes(path, name, shape):
    expected = [d for d in load_file(path / "model.safetensors")[name].shape if d != 1]
    edit(path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path).load()
    assert f"tensor '{name}' has shape {list(shape)}, the config says {expected}" in str(e.value)


def test_conv_weights_load_with_and_without_the_middle_axis(path):
    expected = parameters(open_checkpoint(path).load())

    def squeeze(tensors):
        for name in [n for n in tensors if n.endswith("conv1d.weight")]:
            tensors[name] = tensors[name].squeeze(1).contiguous()

    edit(path, squeeze)
    assert_same(parameters(open_checkpoint(path).load()), expected)


def test_a_tensor_is_read_as_stored(tmp_path):
    tensors = random_tensors(DELTA, dtype=torch.float16)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", DELTA, tensors))
    name = "model.layers.0.attn.b_proj.weight"
    assert checkpoint.tensor(name).dtype == torch.float16
    assert torch.equal(checkpoint.tensor(name), tensors[name])
    with pytest.raises(CheckpointError, match="tensor 'no.such' is missing"):
        checkpoint.tensor("no.such")


# Broken directories


def test_an_index_cannot_name_a_file_outside_the_directory(path, tmp_path):
    weight_map = shard(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in set(weight_map.values()):
        shutil.copy(path / file, outside / file)
    for prefix in ("../outside/", f"{outside}/", "/etc/../", "sub/"):
        (path / INDEX).write_text(json.dumps({"weight_map": {n: prefix + f for n, f in weight_map.items()}}))
        files = Checkpoint(path).files
        assert {file.parent for file in files.values()} == {path}
    (path / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(weight_map, "../outside/only-there.safetensors")})
    )
    (outside / "only-there.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"names only-there\.safetensors, which is missing"):
        _ = Checkpoint(path).files


def test_an_index_that_names_what_is_no_safetensors_file(path):
    weight_map = shard(path)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "config.json")}))
    with pytest.raises(
        CheckpointError, match=r"index\.json names config\.json, which is no safetensors file"
    ):
        _ = Checkpoint(path).files


def test_a_missing_shard_is_named(path):
    shard(path)
    (path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names part-1\.safetensors, which is missing"):
        open_checkpoint(path).load()


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}'])
def test_an_index_without_a_weight_map(path, content):
    (path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        open_checkpoint(path).load()


def test_an_index_that_puts_a_tensor_in_the_wrong_file(path):
    weight_map = shard(path)
    name = next(iter(weight_map))
    weight_map[name] = "part-2.safetensors"
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"part-2\.safetensors: tensor '{name}' can't be read"):
        open_checkpoint(path).load()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_weights_file_that_is_none(path, content):
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as safetensors"):
        open_checkpoint(path).load()


def test_a_truncated_weights_file(path):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(path).load()


def test_only_safetensors_are_read(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor .*; only safetensors checkpoints are read"
    ):
        open_checkpoint(path).load()


def test_a_directory_without_config(path):
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": ', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
    ],
)
def test_a_config_that_is_no_json_object(path, content, message):
    (path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_config_of_another_family(path):
    (path / "config.json").write_text('{"model_type": "mamba2"}')
    with pytest.raises(ConfigError, match="mamba2"):
        open_checkpoint(path)


# Names: a directory or a hub id


def test_a_directory_is_opened_under_the_name_it_was_given(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    checkpoint = open_checkpoint("c")
    assert checkpoint.source == "c" and checkpoint.path.samefile(path)


@pytest.mark.parametrize("source", ["no-such", "./org/name", "/org/name", "~/name", "a/b/c", "../x/y"])
def test_what_is_neither_a_directory_nor_a_hub_id(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("tried a download"))
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/na.me-1_B@0123abc", "org/na.me-1_B", "0123abc"),
        ("org/name@", "org/name", None),
    ],
)
def test_hub_ids(path, monkeypatch, source, name, revision):
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint(source)
    assert checkpoint.source == source and checkpoint.path == path
    [((got,), kwargs)] = calls
    assert got == name and kwargs["revision"] == revision
    # weights as safetensors only, with everything a tokenizer and its chat template need
    assert "*.safetensors" in kwargs["allow_patterns"] and "*.jinja" in kwargs["allow_patterns"]
    assert not any("bin" in p or "py" in p for p in kwargs["allow_patterns"])


def test_a_slip_in_a_local_path_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.rename(path.parent / "model")
    (path.parent / "demo").mkdir()
    (path.parent / "model").rename(path.parent / "demo" / "model")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(Path("demo/model"))
    )
    for source, near in {
        "demo/modell": "demo/model",
        "dem/model": "demo/model",
        "./demo/modle": "demo/model",
        f"{path.parent}/demo/moel": f"{path.parent}/demo/model",
        "demoo": "demo",
    }.items():
        with pytest.raises(CheckpointError, match=f"^{source}: no such directory.*; did you mean {near}[?]"):
            open_checkpoint(source)
    with pytest.raises(CheckpointError, match="From the hub it is taken as demo/modell@main"):
        open_checkpoint("demo/modell")
    assert not asked
    for source in ("demo/modell@main", "demo/delta_net-1.3B", "demonstrations-of-all/model"):
        open_checkpoint(source)
    assert asked == ["demo/modell", "demo/delta_net-1.3B", "demonstrations-of-all/model"]


def test_gguf_is_told_what_to_give_instead(path):
    said = "GGUF is not supported: give the safetensors checkpoint"
    (path / "model.safetensors").rename(path / "model.Q8_0.gguf")
    for source in (path, path / "model.Q8_0.gguf", "some-org/model.gguf"):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(source)
    (path / "model.Q8_0.gguf").rename(path / "model.safetensors")
    (path / "extra.gguf").touch()
    assert open_checkpoint(path).load()
    with pytest.raises(CheckpointError, match="config.json is a file; give the directory"):
        open_checkpoint(path / "config.json")


@pytest.mark.parametrize("source", ["org/no-such-model", "org/name with spaces", "org/name@no-such-revision"])
def test_a_download_that_fails_says_so(source):
    with pytest.raises(CheckpointError, match="no such directory, and the download failed: ") as e:
        open_checkpoint(source)
    assert str(e.value).startswith(source)


# Hashes and the reduction record


def test_sha256_changes_with_any_byte(path):
    before = open_checkpoint(path).sha256
    assert open_checkpoint(path).sha256 == before
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        changed = Checkpoint(path)
        changed.files = {"x": weights}  # the header may no longer parse; the hash is of bytes
        assert changed.sha256 != before
    weights.write_bytes(whole)
    assert open_checkpoint(path).sha256 == before
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    assert open_checkpoint(path).sha256 != before


def test_sha256_covers_every_shard(path):
    shard(path)
    before = open_checkpoint(path).sha256
    for i in range(3):
        file = path / f"part-{i}.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert open_checkpoint(path).sha256 != before
        file.write_bytes(whole)
    assert open_checkpoint(path).sha256 == before


def test_reduction_is_none_for_a_dense_checkpoint(path):
    assert open_checkpoint(path).reduction is None
    write_json(path / "state_reduction.json", {"method": "drrqr"})
    assert open_checkpoint(path).reduction == {"method": "drrqr"}
