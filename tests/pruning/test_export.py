"""Both forms of a reduced checkpoint, and the comparison of what was written with its source."""

import json
import re
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from hybrid_cases import CASES, FULL, LINEAR
from hybrids import write_hybrid
from reducing import difference, random_keep, reduce
from safetensors.torch import load_file, save_file

import pruning.reduction
from modeling.checkpoint import REDUCTION, Checkpoint, open_checkpoint
from pruning.errors import PruningError
from pruning.export import check_written, config_changes
from pruning.surgery import Cut, write_reduced

FLA = {"gated": {**GATED, "conv_bias": True}, "delta": DELTA}
HYBRIDS = ["vl-dense-three-value-heads", "vl-moe-fused-tied-odd", "text-moe-each-tied", "next", "olmo"]


@pytest.fixture(params=[*FLA, *HYBRIDS])
def checkpoint(request, tmp_path):
    name = request.param
    if name in FLA:
        return open_checkpoint(write_checkpoint(tmp_path / "dense", FLA[name]))
    return open_checkpoint(write_hybrid(tmp_path / "dense", CASES[name]))


def halves(spec):
    """About half of the channels, another number in each layer."""
    return tuple(max(1, d_k // 2 - i % 2) for i, d_k in enumerate(spec.d_k))


class OtherEpsilon(Checkpoint):
    """A checkpoint whose linear layers' output norms have `factors[i]` times their epsilon."""

    def __init__(self, path, factors):
        super().__init__(path)
        layers = list(self.spec.layers)
        for (i, mixer), factor in zip(self.spec.deltas.items(), factors, strict=True):
            layers[i] = replace(layers[i], mixer=replace(mixer, norm_eps=mixer.norm_eps * factor))
        self.spec = replace(self.spec, layers=tuple(layers))


def logits(checkpoint):
    ids = torch.arange(70) % 250 + 1
    model = checkpoint.load(dtype=torch.float64)
    with torch.no_grad():
        hidden, _ = model(ids, [0, 40, 70])
        return model.logits(hidden)


def test_masked_logits_are_the_sliced_ones_up_to_the_norms_epsilon(checkpoint, tmp_path):
    """A sliced model reads with keys scaled by 1 / sqrt(n) and not 1 / sqrt(d_k), which its norm cancels but for its
    epsilon."""
    dense = checkpoint.spec
    widths = halves(dense)
    keep = random_keep(dense, widths)
    for export in ("sliced", "masked"):
        reduce(checkpoint, keep, tmp_path / export, export=export)
    factors = [n / d_k for n, d_k in zip(widths, dense.d_k, strict=True)]
    sliced, masked = (
        logits(open_checkpoint(tmp_path / "sliced")),
        logits(OtherEpsilon(tmp_path / "masked", factors)),
    )
    assert difference(masked, sliced) < 1e-9, "float64, about a thousand operations"
    assert difference(logits(open_checkpoint(tmp_path / "masked")), sliced) > 1e-7, "the epsilon is seen"
    assert difference(logits(checkpoint), sliced) > 1e-2, "the channels that were removed are seen"


def test_a_masked_checkpoint_has_its_sources_config_and_shapes(checkpoint, tmp_path):
    widths = halves(checkpoint.spec)
    keep = random_keep(checkpoint.spec, widths)
    spec = reduce(checkpoint, keep, tmp_path / "masked", export="masked")
    assert spec == checkpoint.spec == open_checkpoint(tmp_path / "masked").spec
    assert json.loads((tmp_path / "masked/config.json").read_text()) == checkpoint.config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "masked"))
    assert before.keys() == after.keys()
    kept = dict(zip(checkpoint.spec.linear_layers, keep, strict=True))
    for name, tensor in before.items():
        expected = tensor.clone()
        if name in checkpoint.key_rows:
            of_layer = kept[checkpoint.map_of[name].layer]
            for sets in checkpoint.key_rows[name]:
                for head, rows in enumerate(sets):
                    gone = [int(row) for c, row in enumerate(rows) if c not in of_layer[head]]
                    expected[gone] = 0
            assert not torch.equal(expected, tensor)
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], expected), name
    record = json.loads((tmp_path / "masked" / REDUCTION).read_text())
    assert (record["export"], record["d_k"]) == ("masked", list(widths))
    assert record["kept_channels"] == [k.tolist() for k in keep]
    assert record["state_bytes"] == checkpoint.spec.state_bytes(0) == record["source"]["state_bytes"]
    assert record["stock_loaders"] is True, "layers that keep different numbers have one d_k all the same"


def written(tmp_path, config=GATED, keep=8):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", config))
    cuts = [Cut(i, k) for i, k in enumerate(random_keep(checkpoint.spec, (keep,) * 3))]
    (tmp_path / "out").mkdir()
    write_reduced(checkpoint, cuts, tmp_path / "out")
    check_written(checkpoint, tmp_path / "out", cuts)
    return checkpoint, cuts, tmp_path / "out"


NAME = "model.layers.1.attn.q_conv1d.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(NAME), f"lacks {NAME} "),
        (lambda t: t.update({"model.layers.1.attn.q_conv.weight": t.pop(NAME)}), f"lacks {NAME} "),
        (lambda t: t.update(extra=torch.ones(1)), "has what the source has not: extra "),
        (lambda t: t.update({NAME: t[NAME].half()}), f"{NAME} as F16 .*; it must be F32"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), f"{NAME} as F32 .15, 1, 4.; it must be F32 .16, 1, 4."),
        (lambda t: t.update({NAME: t[NAME].flatten(1)}), f"{NAME} as F32 .16, 4.; it must be F32 .16, 1, 4."),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :-1].contiguous()}),
            "lm_head.weight as",
        ),
    ],
    ids=["gone", "renamed", "added", "dtype", "a row less", "flat", "a column less"],
)
def test_a_tensor_that_is_not_the_sources_is_named(tmp_path, spoil, message):
    checkpoint, cuts, out = written(tmp_path)
    tensors = load_file(out / "model.safetensors")
    spoil(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(PruningError, match=message):
        check_written(checkpoint, out, cuts)


def test_rows_that_were_not_cut_are_found(tmp_path):
    checkpoint, cuts, out = written(tmp_path)
    with pytest.raises(PruningError, match=r"as F32 \[16, (.+)\]; it must be F32 \[64, \1\]"):
        check_written(checkpoint, out)
    with pytest.raises(PruningError, match=r"as F32 \[16, (.+)\]; it must be F32 \[18, \1\]"):
        check_written(checkpoint, out, [Cut(cut.layer, torch.arange(9).expand(2, -1)) for cut in cuts])


def sharded(path):
    """Moves a checkpoint's weights into two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[list(parts)[i % 2]][name] = tensor
    for file, part in parts.items():
        save_file(part, path / file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_has_to_say_where_the_tensors_are(tmp_path):
    sharded(write_checkpoint(tmp_path / "dense", GATED))
    checkpoint = open_checkpoint(tmp_path / "dense")
    reduce(checkpoint, random_keep(checkpoint.spec, (8,) * 3), tmp_path / "out")
    cuts = [Cut(i, k) for i, k in enumerate(random_keep(checkpoint.spec, (8,) * 3))]
    file = tmp_path / "out/model.safetensors.index.json"
    good = json.loads(file.read_text())
    check_written(checkpoint, tmp_path / "out", cuts)
    wrong = {**good["weight_map"], NAME: "model-00003-of-00002.safetensors"}
    for index, message in (
        ({**good, "weight_map": wrong}, "does not say where its tensors are"),
        ({**good, "metadata": {"total_size": 1}}, "whose total_size is not "),
    ):
        file.write_text(json.dumps(index))
        with pytest.raises(PruningError, match=message):
            check_written(checkpoint, tmp_path / "out", cuts)
    file.unlink()
    with pytest.raises(PruningError, match=r"without model\.safetensors\.index\.json"):
        check_written(checkpoint, tmp_path / "out", cuts)
    file.write_text(json.dumps(good))
    save_file({NAME: torch.zeros(1)}, tmp_path / "out/model.safetensors")
    with pytest.raises(PruningError, match=f"tensor {NAME} was written to "):
        check_written(checkpoint, tmp_path / "out", cuts)


def test_what_was_written_wrongly_leaves_no_output(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    write = pruning.reduction.write_reduced

    def forgetful(source, cuts, directory, export):
        spec = write(source, cuts, directory, export)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.0.attn.q_projection.weight"] = tensors.pop("model.layers.0.attn.q_proj.weight")
        save_file(tensors, directory / "model.safetensors")
        return spec

    monkeypatch.setattr(pruning.reduction, "write_reduced", forgetful)
    with pytest.raises(
        PruningError, match=r"dense: what was written of it lacks model\.layers\.0\.attn\.q_proj"
    ):
        reduce(checkpoint, random_keep(checkpoint.spec, (8,) * 3), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_config_changes_name_each_key():
    before = {"a": 1, "text_config": {"n": 128, "same": [1, 2], "old": {}}, "auto_map": {"x": "y"}}
    after = {"a": 1, "text_config": {"n": 64, "same": [1, 2], "new": True, "old": {}}}
    assert config_changes(before, after) == [
        "text_config.n 128 => 64",
        "text_config.new added: True",
        "auto_map removed",
    ]
    assert not config_changes(before, before)


def test_prune_shows_what_became_of_the_config(run, tmp_path):
    write_hybrid(tmp_path / "dense", CASES["vl-moe-fused"])
    said = run("prune", "dense", "sliced", "--method", "l1", "--keep", 8)
    assert "text_config.linear_key_head_dim 16 => 8" in said
    count = len(open_checkpoint("dense").files)
    assert f"{count} tensors compared with the source's" in said
    assert "no memory is saved" not in said

    options = ("--method", "l1", "--keep", 8, "--export", "masked")
    plan = run("prune", "dense", "masked", *options, "--dry-run")
    state = open_checkpoint("dense").spec.state_bytes(0)
    assert "8 of 16 channels of each head are kept" in plan and "no memory is saved" in plan
    assert "=>" not in plan, "nothing gets smaller"
    said = run("prune", "dense", "masked", *options)
    assert "unchanged" in said.split("config.json")[1]
    for shown in (said, run("inspect", "masked")):
        assert "kept channels 8: masked" in shown and "no memory is saved" in shown
        assert f"state per request {state:,} bytes, as before" in shown
    table = run("evaluate", "dense", "masked", "--tokens", 512)
    assert "l1 (masked)" in table


def test_a_mixture_of_channels_can_be_masked(run, dense, tmp_path):
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    text = ("--text", "text", "--tokens", 256, "--window-length", 64, "--keep", 8)
    run("prune", dense, "sliced", "--method", "pca", *text, "--stats", "s.safetensors")
    run(
        *("prune", dense, "masked", "--method", "pca", "--keep", 8, "--stats", "s.safetensors"),
        *("--export", "masked"),
    )
    factors = [8 / 32] * 3
    masked = logits(OtherEpsilon(tmp_path / "masked", factors))
    assert difference(masked, logits(open_checkpoint("sliced"))) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"export": "zipped"}, r"'zipped'"),
        ({"d_k": [8]}, r"d_k=\[8\] must be 3 positive numbers"),
        ({"d_k": None}, r"has no d_k"),
        (
            {"source": {"name": "x", "sha256": "0" * 64, "d_k": [64] * 3, "state_bytes": 1}},
            r"must be the d_k of the",
        ),
    ],
    ids=["form", "layers", "no widths", "source"],
)
def test_a_record_that_says_something_else_is_refused(run, dense, tmp_path, change, message):
    run("prune", dense, "masked", "--method", "l1", "--keep", 8, "--export", "masked")
    file = tmp_path / "masked" / REDUCTION
    record = {**json.loads(file.read_text()), **change}
    if record["d_k"] is None:
        del record["d_k"]
    file.write_text(json.dumps(record))
    refused = run("inspect", "masked", code=2)
    assert REDUCTION in refused and re.search(message, refused)


@pytest.mark.parametrize("case", ["vl-moe-fused", "text-moe-each-tied"])
def test_a_recovered_hybrid_has_all_tensors_in_the_layout_of_its_source(run, tmp_path, case):
    """Experts together or one by one, what is no part of the language model, and channels that are masked."""
    short = replace(CASES[case], layer_types=(LINEAR, FULL))
    write_hybrid(tmp_path / "dense", short)
    (tmp_path / "t").write_text(" ".join(f"{i * i}" for i in range(2000)))
    texts = ("--text", "t", "--heldout", "t", "--heldout-tokens", 512)
    steps = ("--window-length", 64, "--tokens", 512, "--batch", 2, "--lr", 0.01)
    run("prune", "dense", "masked", "--method", "l1", "--keep", 4, "--export", "masked")
    run("recover", "dense", "masked", "recovered", *texts, *steps)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("masked", "recovered"))
    assert before.keys() == after.keys()
    checkpoint = open_checkpoint("masked")
    for name, tensor in before.items():
        if not checkpoint.is_ours(name):
            assert torch.equal(after[name], tensor), name
        elif name in checkpoint.key_rows:
            rows = checkpoint.key_rows[name].flatten()
            zero = tensor[rows].flatten(1).abs().sum(1) == 0
            assert zero.any() and after[name][rows][zero].abs().sum() == 0, "what is masked learns nothing"
            assert not torch.equal(after[name], tensor)
