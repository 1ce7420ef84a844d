"""A model with a layer that is no linear attention: pruning leaves it as it is, and calls the others by their index."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint
from pruning_runs import EVALUATE, RECOVER, SWEEP, TEXT, arguments, invoke
from safetensors.torch import load_file, safe_open
from second_kind import AverageSpec, registered

from modeling.checkpoint import open_checkpoint
from modeling.families import FAMILIES, TensorMap
from modeling.families.gated_deltanet import GatedDeltaNet
from modeling.spec import FLOAT32_STATES
from pruning.budget import widths_for_bytes, widths_per_layer
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.report.inputs import read_inputs
from pruning.report.measured import kept_channels, spectra
from pruning.report.trade import budgets
from pruning.selection import select, widths_for_ratio, widths_to_keep
from pruning.statistics import load_statistics
from pruning.surgery import Cut, check_cuts

CONFIG = {**GATED, "model_type": "averaged", "num_hidden_layers": 4}
AVERAGE = 1
"""The layer that is of another kind."""
LINEAR = [0, 2, 3]


class Averaged(GatedDeltaNet):
    """Gated DeltaNet with a moving average in one of its layers."""

    model_type = "averaged"

    def spec(self, config):
        spec = super().spec(config)
        layers = list(spec.layers)
        layers[AVERAGE] = replace(layers[AVERAGE], mixer=AverageSpec(48))
        return replace(spec, family=self.model_type, layers=tuple(layers))

    def tensors(self, spec, names=()):
        ours, theirs = f"layers.{AVERAGE}.", f"model.layers.{AVERAGE}."
        hidden, size = spec.hidden_size, spec.layers[AVERAGE].ffn.intermediate_size
        gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
        return super().tensors(spec, names) + [
            TensorMap(AVERAGE, role, f"{ours}{name}.weight", parts, rows)
            for role, name, parts, rows in (
                ("norm", "mixer_norm", (f"{theirs}attn_norm.weight",), (hidden,)),
                ("in_proj", "mixer.in_proj", (f"average_{AVERAGE}_in.weight",), (48,)),
                ("out_proj", "mixer.o_proj", (f"{theirs}average.out_proj.weight",), (hidden,)),
                ("norm", "ffn_norm", (f"{theirs}mlp_norm.weight",), (hidden,)),
                ("ffn", "ffn.in_proj", gate_up, (size, size)),
                ("ffn", "ffn.out_proj", (f"{theirs}mlp.down_proj.weight",), (hidden,)),
            )
        ]

    def config_with_d_k(self, config, spec):
        written = super().config_with_d_k(config, spec)
        for key in ("head_dim", "expand_v"):
            if isinstance(written[key], list):  # the config has an entry for every layer
                written[key].insert(AVERAGE, written[key][0])
        return written


@pytest.fixture(scope="module", autouse=True)
def known():
    FAMILIES["averaged"] = Averaged()
    with registered():
        yield
    del FAMILIES["averaged"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("kinds")
    tensors = random_tensors(CONFIG)
    tensors[f"model.layers.{AVERAGE}.average.out_proj.weight"] = torch.randn(64, 48) / 7
    write_checkpoint(folder / "dense", CONFIG, tensors)
    (folder / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    dense, text = folder / "dense", ("--text", folder / "text")
    run("calibrate", dense, folder / "s.safetensors", *text, *TEXT, "--method", "loss-aware")
    run("prune", dense, folder / "uniform", "--method", "pca", "--keep", 8, *text, *TEXT)
    layered = ("--keep", 16, "--per-layer", "--align", 8, "--evaluate")
    run("prune", dense, folder / "layered", "--method", "loss-aware", *layered, *text, *TEXT)
    return folder


def run(*given, code=0):
    result = invoke(*given)
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def test_shapes_and_widths_are_of_linear_layers(made):
    checkpoint = open_checkpoint(made / "dense")
    spec = checkpoint.spec
    assert list(spec.linear_layers) == LINEAR and spec.d_k == (32, 32, 32)
    assert widths_to_keep(spec, 8) == (8, 8, 8) and widths_for_ratio(spec, 0.5) == (16, 16, 16)
    fixed = spec.layers[AVERAGE].mixer.width * 4
    half = spec.with_d_k((16, 16, 16)).state_bytes(0)
    assert half == fixed + 3 * spec.layers[0].mixer.with_d_k(16).state_bytes(0, FLOAT32_STATES)
    assert widths_for_bytes(spec, half, 8) == (16, 16, 16)
    flat = {8: 0.0, 32: 0.0}
    assert widths_per_layer(spec, [flat, {8: 1.0, 32: 0.0}, flat], half) == (8, 32, 8)
    narrow = spec.with_d_k((32, 4, 32))
    with pytest.raises(PruningError, match="between 1 and 4, the d_k of layer 2"):
        widths_to_keep(narrow, 8)
    cuts = select(checkpoint, CRITERIA["random"], (8, 8, 8)).cuts
    assert [cut.layer for cut in cuts] == LINEAR
    check_cuts(spec, cuts)
    with pytest.raises(PruningError, match=r"keep is of layers \[0, 1, 2\], not \[0, 2, 3\]"):
        check_cuts(spec, [Cut(i, cut.keep) for i, cut in enumerate(cuts)])


def test_statistics_are_named_by_the_index_of_their_layer(made):
    statistics = load_statistics(made / "s.safetensors")
    assert list(statistics.layers) == LINEAR
    statistics.check_source(open_checkpoint(made / "dense"))
    with safe_open(made / "s.safetensors", framework="pt") as f:
        assert {int(name.split(".")[1]) for name in f.keys()} == set(LINEAR)  # noqa: SIM118


def test_other_layers_are_copied(made):
    dense, reduced = (load_file(made / name / "model.safetensors") for name in ("dense", "uniform"))
    for name in dense:
        same = f".{AVERAGE}." in name or not name.endswith(
            ("q_proj.weight", "k_proj.weight", "q_conv1d.weight", "k_conv1d.weight")
        )
        assert torch.equal(dense[name], reduced[name]) if same else reduced[name].shape[0] == 16, name
    record = json.loads((made / "layered/state_reduction.json").read_text())
    assert record["layers"] == LINEAR
    assert len(record["d_k"]) == len(record["kept_channels"]) == len(record["budget"]["loss_rise"]) == 3


def test_it_is_shown_by_index(made, tmp_path):
    shown = run("inspect", made / "uniform")
    assert "layers 0, 2 to 3, each: d_k 32 => 8" in shown
    assert "average_1_in.weight F32 [48, 64]" in shown
    run(
        *("evaluate", made / "dense", made / "uniform", "--text", made / "text", *EVALUATE),
        *("--part", "perplexity", "--part", "rank", "--part", "retrieval", "--json", tmp_path / "e.json"),
    )
    found = json.loads((tmp_path / "e.json").read_text())["checkpoints"][1]
    assert found["layers"] == LINEAR and len(found["rank"]["utilisation"]) == 3
    run("report", tmp_path / "r.html", tmp_path / "e.json", made / "layered", made / "s.safetensors")
    inputs = read_inputs([made / "layered"])
    (figure,) = kept_channels(inputs.reductions)
    assert list(figure.figure.layout.yaxis.ticktext) == [f"layer {i}" for i in LINEAR]
    (figure,) = budgets([], inputs.reductions)
    assert [line.name for line in figure.figure.data[:3]] == [f"layer {i}" for i in LINEAR]
    assert list(figure.figure.data[-1].x) == LINEAR
    by_layer, _ = spectra("s", load_statistics(made / "s.safetensors"), 0)
    assert [line.name for line in by_layer.figure.data[:3]] == [f"layer {i}" for i in LINEAR]


class Averages(Averaged):
    """A model without any layer of linear attention."""

    def spec(self, config):
        spec = super().spec(config)
        return replace(spec, layers=(spec.layers[AVERAGE],) * 4)


@pytest.mark.parametrize("command", ["calibrate", "prune", "recover", "evaluate", "sweep", "inspect"])
def test_without_linear_attention_there_is_nothing_to_prune(tmp_path, monkeypatch, command):
    monkeypatch.setitem(FAMILIES, "averaged", Averages())
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text").write_text("some")
    said = run(*arguments(tmp_path, command, tmp_path / "out"), code=2)
    assert "dense has no linear-attention layer: nothing to prune" in said


def test_it_is_recovered_and_swept(made, tmp_path):
    text = ("--text", made / "text", "--heldout", made / "text")
    run("recover", made / "dense", made / "uniform", tmp_path / "recovered", *text, *RECOVER)
    run("sweep", made / "dense", tmp_path / "table.json", *SWEEP, *text, *TEXT)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["curves"][0]["layers"] == LINEAR
