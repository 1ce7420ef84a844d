"""A sliced model is the dense model with the dropped channels switched off; everything else is as it was."""

import json

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from oracle import fla_logits
from reducing import difference, masked_dense, random_keep, reduce
from safetensors.torch import load_file
from states import recurrent

from lowkey.files import OutputError
from modeling.checkpoint import REDUCTION, CheckpointError, open_checkpoint
from pruning.companions import RECOVERY
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.selection import select
from pruning.surgery import Cut, check_runs, keep_rows, write_reduced

CONFIGS = {
    "gated-value-groups": GATED,
    "gated-conv-bias-odd": {**GATED, "conv_bias": True, "head_dim": 20, "expand_v": 1.4, "num_v_heads": None},
    "delta": DELTA,
    "delta-gate-narrow": {**DELTA, "expand_k": 0.75, "use_gate": True, "tie_word_embeddings": False},
}


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path):
    config = CONFIGS[request.param]
    tensors = random_tensors(config)
    return config, tensors, open_checkpoint(write_checkpoint(tmp_path / "dense", config, tensors))


@torch.no_grad()
def test_sliced_is_masked_dense(case, tmp_path):
    _, _, checkpoint = case
    widths = (3, 7, 12)
    keep = random_keep(checkpoint.spec, widths)
    reduce(checkpoint, keep, tmp_path / "out")
    model = open_checkpoint(tmp_path / "out").load(dtype=torch.float64)
    assert model.spec.d_k == widths
    ids = torch.randint(0, 257, (100,), generator=torch.Generator().manual_seed(1))
    hidden, state = model(ids, [0, 70, 100])
    expected, dense_state = masked_dense(checkpoint, keep, ids, [0, 70, 100])
    assert difference(hidden, expected) < 1e-10
    # The state's kept rows are the same and the dropped ones stay zero; only o is scaled.
    for sliced, dense, k in zip(recurrent(state), recurrent(dense_state), keep, strict=True):
        heads = k.repeat_interleave(dense.shape[1] // k.shape[0], 0)
        rows = heads[None, :, :, None].expand(2, -1, -1, dense.shape[-1])
        assert difference(sliced, dense.gather(2, rows)) < 1e-10
        assert float(dense.scatter(2, rows, 0.0).abs().max()) == 0
    # Without the eps factor the two differ: the test would see a wrong scale.
    assert difference(masked_dense(checkpoint, keep, ids, [0, 70, 100], eps_factor=False)[0], expected) > 1e-5


@torch.no_grad()
def test_oracle_runs_the_reduced_checkpoint_as_a_plain_one(case, tmp_path):
    config, _, checkpoint = case
    reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    reduced = json.loads((tmp_path / "out/config.json").read_text())
    ids = torch.arange(60)
    model = open_checkpoint(tmp_path / "out").load()
    expected = fla_logits(load_file(tmp_path / "out/model.safetensors"), reduced, ids[None])[0]
    assert difference(model.logits(model(ids, [0, 60])[0]), expected) < 1e-4
    changed = {"head_dim", "expand_v"} if config["model_type"] == "gated_deltanet" else {"expand_k"}
    assert {key for key in reduced if reduced[key] != config.get(key)} == changed


@torch.no_grad()
def test_order_of_kept_channels_means_nothing(case, tmp_path):
    _, _, checkpoint = case
    reduce(checkpoint, random_keep(checkpoint.spec, (9, 9, 9)), tmp_path / "out")
    reduced = open_checkpoint(tmp_path / "out")
    tensors = {name: reduced.tensor(name) for name in reduced.files}
    generator = torch.Generator().manual_seed(2)
    orders = {}
    for name, rows in reduced.key_rows.items():
        layer = name.split(".")[2]
        heads = rows.shape[1]
        order = orders.setdefault(
            layer, torch.stack([torch.randperm(9, generator=generator) for _ in range(heads)])
        )
        shuffled = tensors[name].clone()
        shuffled[rows.flatten()] = tensors[name][rows.gather(2, order[None]).flatten()]
        assert not torch.equal(shuffled, tensors[name])
        tensors[name] = shuffled
    other = write_checkpoint(tmp_path / "other", reduced.config, tensors)
    ids = torch.arange(80)
    a, _ = reduced.load(dtype=torch.float64)(ids, [0, 80])
    b, _ = open_checkpoint(other).load(dtype=torch.float64)(ids, [0, 80])
    assert difference(b, a) < 1e-10


def test_keeping_all_channels_changes_no_bit(case, tmp_path):
    config, tensors, checkpoint = case
    reduce(checkpoint, random_keep(checkpoint.spec, checkpoint.spec.d_k), tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert set(after) == set(tensors)
    assert all(torch.equal(after[name], t) for name, t in tensors.items())
    assert open_checkpoint(tmp_path / "out").config == config


def test_dtypes_biases_and_tensors_without_a_key_axis_are_kept(tmp_path):
    config = {**GATED, "conv_bias": True}
    tensors = {
        name: t if name.endswith(("A_log", "dt_bias")) else t.to(torch.bfloat16)
        for name, t in random_tensors(config).items()
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", config, tensors))
    keep = random_keep(checkpoint.spec, (5, 5, 5))
    reduce(checkpoint, keep, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert set(after) == set(tensors)
    cut = (
        "q_proj.weight",
        "k_proj.weight",
        "q_conv1d.weight",
        "k_conv1d.weight",
        "q_conv1d.bias",
        "k_conv1d.bias",
    )
    for name, before in tensors.items():
        assert after[name].dtype == before.dtype, name
        if name.endswith(cut):
            k = keep[int(name.split(".")[2])]
            rows = (torch.arange(2)[:, None] * 32 + k).flatten()
            assert torch.equal(after[name], before[rows]), name
        else:
            assert torch.equal(after[name], before), name
    assert sum(name.endswith(cut) for name in tensors) == 18


def test_rows_between_the_keys_stay_in_their_order():
    # Two heads, each q q q | k k k | other, as interleaved layouts have them.
    rows = torch.tensor([[[0, 1, 2], [7, 8, 9]], [[3, 4, 5], [10, 11, 12]]])
    keep = torch.tensor([[0, 2], [1, 2]])
    assert keep_rows(torch.arange(14), rows, keep).tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 12, 13]


def test_other_files_come_along_and_weights_and_foreign_links_do_not(tmp_path):
    path = write_checkpoint(tmp_path / "hub/snapshots/abc", GATED)
    (tmp_path / "secret.txt").write_text("secret")
    blobs = tmp_path / "hub/blobs"
    blobs.mkdir()
    (blobs / "1234").write_text('{"chat": 1}')
    (path / "chat_template.json").symlink_to(blobs / "1234")
    (path / "leak.txt").symlink_to(tmp_path / "secret.txt")
    (path / "assets").mkdir()
    (path / "assets/picture.png").write_bytes(b"png")
    (path / ".cache").mkdir()
    (path / ".cache/junk").write_text("junk")
    # A recovered checkpoint's own records say nothing about what is cut from it.
    records = (REDUCTION, RECOVERY)
    for name in ("generation_config.json", "LICENSE", "pytorch_model.bin", "tf_model.h5", *records):
        (path / name).write_text("{}")
    checkpoint = open_checkpoint(path)
    reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        REDUCTION,
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.json",
        "assets/picture.png",
    }
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "out").rglob("*")), (
        "others must read it"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    assert json.loads((tmp_path / "out" / REDUCTION).read_text())["method"] == "test"


@pytest.mark.parametrize("n", [49, 98, 103, 107])
def test_widths_at_which_d_v_over_d_k_truncates(tmp_path, n):
    config = {**GATED, "head_dim": 128, "expand_v": 1.0, "num_hidden_layers": 1, "num_v_heads": 2}
    assert int(n * (128 / n)) == 127, "no trap at this width"
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", config))
    reduce(checkpoint, random_keep(checkpoint.spec, (n,)), tmp_path / "out")
    reduced = json.loads((tmp_path / "out/config.json").read_text())
    assert int(reduced["head_dim"] * reduced["expand_v"]) == 128
    assert open_checkpoint(tmp_path / "out").spec.layers[0].mixer.d_v == 128


def test_a_config_that_reads_back_otherwise_is_refused(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    (tmp_path / "out").mkdir()
    cuts = [Cut(i, keep) for i, keep in enumerate(random_keep(checkpoint.spec, (8, 8, 8)))]
    spec = write_reduced(checkpoint, cuts, tmp_path / "out")
    check_runs(tmp_path / "out", spec, "dense")
    with pytest.raises(
        PruningError,
        match="^dense: the checkpoint that was made of it does not load or run: the config reads back as",
    ):
        check_runs(tmp_path / "out", checkpoint.spec, "dense")


def test_weights_that_are_not_finite_leave_no_output(tmp_path):
    tensors = random_tensors(GATED)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    with pytest.raises(PruningError, match="NaN or Inf"):
        reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_failure_midway_leaves_no_output(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    read = checkpoint.tensor

    def failing(name):
        if name.endswith("layers.1.attn.k_proj.weight"):
            raise OSError("disk gone")
        return read(name)

    monkeypatch.setattr(checkpoint, "tensor", failing)
    with pytest.raises(OutputError, match="out can't be written: disk gone"):
        reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda k: k[:2], "2 entries for 3 layers"),
        (lambda k: (k[0], k[1][:1], k[2]), "keep of layer 1"),
        (lambda k: (k[0], k[1].int(), k[2]), "int64"),
        (lambda k: (k[0].flip(1), *k[1:]), "layer 0 must be ascending"),
        (lambda k: (k[0] + 30, *k[1:]), "from 0 to 31"),
        (lambda k: (*k[:2], k[2][:, :0]), "n >= 1"),
    ],
)
def test_keep_that_does_not_fit_is_refused(tmp_path, bad, message):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    with pytest.raises(PruningError, match=message):
        reduce(checkpoint, bad(random_keep(checkpoint.spec, (8, 8, 8))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_tensor_is_named(tmp_path):
    tensors = random_tensors(GATED)
    del tensors["model.layers.1.attn.k_conv1d.weight"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.k_conv1d.* is missing"):
        reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")


def test_output_is_replaced_only_when_asked_and_only_if_it_is_ours(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    keep, wider = (random_keep(checkpoint.spec, (n,) * 3) for n in (8, 16))
    reduce(checkpoint, keep, tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        reduce(checkpoint, wider, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").spec.d_k == (8, 8, 8)
    reduce(checkpoint, wider, tmp_path / "out", overwrite=True)
    assert open_checkpoint(tmp_path / "out").spec.d_k == (16, 16, 16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no state_reduction\.json"):
        reduce(checkpoint, keep, tmp_path / "mine", overwrite=True)
    for holder in (tmp_path / "dense", tmp_path):
        with pytest.raises(PruningError, match="is a checkpoint to read or holds one"):
            reduce(checkpoint, keep, holder, overwrite=True)
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_reduced_checkpoint_can_be_reduced_again(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    first = random_keep(checkpoint.spec, (16, 12, 20))
    reduce(checkpoint, first, tmp_path / "one")
    second = random_keep(open_checkpoint(tmp_path / "one").spec, (4, 4, 4))
    reduce(open_checkpoint(tmp_path / "one"), second, tmp_path / "two")
    reduce(checkpoint, [a.gather(1, b) for a, b in zip(first, second, strict=True)], tmp_path / "direct")
    two, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "direct"))
    assert all(torch.equal(two[name], direct[name]) for name in direct)


def test_weights_that_l1_ranks_are_the_projections_own(tmp_path):
    tensors = random_tensors(GATED)
    expected = []
    for i in range(3):
        q, k = (tensors[f"model.layers.{i}.attn.{n}_proj.weight"].view(2, 32, 64) for n in "qk")
        for h in range(2):
            q[h, i + h :: 4] *= 50
            k[h, i + h :: 4] *= 50
        expected.append([list(range((i + h) % 4 if i + h < 4 else i + h, 32, 4)) for h in range(2)])
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    selection = select(checkpoint, CRITERIA["l1"], (8, 8, 8))
    for layer, heads in enumerate(expected):
        for h, channels in enumerate(heads):
            assert set(channels) <= set(selection.cuts[layer].keep[h].tolist())
