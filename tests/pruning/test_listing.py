"""`inspect`: layers and experts that are alike share their lines, and a config alone says what there is to say."""

import json
from dataclasses import replace

import pytest
from checkpoints import GATED, write_checkpoint
from hybrid_cases import CASES, FULL, LINEAR, PATTERN
from hybrids import config_of, write_hybrid
from safetensors.torch import load_file, save_file


@pytest.fixture
def shown(run):
    """Runs `inspect`; returns the lines without the tree's branches."""
    return lambda path, **options: [
        line.strip("│├└─ ") for line in run("inspect", path, **options).splitlines()
    ]


def test_experts_one_by_one_share_a_line(shown, tmp_path):
    write_hybrid(tmp_path / "moe", CASES["text-moe-each-tied"])
    lines = shown("moe")
    experts = [line for line in lines if "experts." in line]
    assert experts == [
        f"mlp.experts.{{0 to 5}}.{name}_proj.weight F32 {shape}"
        for _ in range(2)
        for name, shape in (("gate", "[24, 48]"), ("up", "[24, 48]"), ("down", "[48, 24]"))
    ]
    assert [line for line in lines if line.startswith("layers")] == [
        "layers 0 to 2, 4 to 6, each: d_k 16, 8,064 bytes",
        "layers 0 to 2, 4 to 6, each",
        "layers 3, 7, each",
    ]


def test_an_expert_of_another_dtype_has_a_line_of_its_own(shown, tmp_path):
    path = write_hybrid(tmp_path / "moe", replace(CASES["text-moe-each-tied"], layer_types=(LINEAR,)))
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    tensors[name.format(2)] = tensors[name.format(2)].bfloat16()
    save_file(tensors, path / "model.safetensors")
    lines = [line for line in shown("moe") if "experts." in line and "up_proj" in line]
    assert lines == [
        "mlp.experts.{0 to 1, 3 to 5}.up_proj.weight F32 [24, 48]",
        "mlp.experts.2.up_proj.weight BF16 [24, 48]",
    ]


def test_layers_of_many_runs_are_folded_and_copied_tensors_counted(run, shown, tmp_path):
    write_hybrid(tmp_path / "deep", replace(CASES["vl-dense-bf16"], layer_types=PATTERN * 3, hidden=8))
    run("prune", "deep", "reduced", "--method", "l1", "--keep", 4)
    lines = shown("reduced")
    linear = "layers 0 to 2, 4 to 6, ..., 20 to 22, each"
    assert [line.partition(":")[0] for line in lines if line.startswith("layers")] == [
        linear,
        linear,
        "layers 3, 7, ..., 23, each",
    ]
    assert any(line.startswith("mtp.*: ") and line.endswith("copied as they are") for line in lines)
    assert any(line.startswith("model.visual.*: 21 tensors") for line in lines)
    assert sum("=>" in line and "[" in line for line in lines) == 2, "in_proj_qkv and conv1d"


@pytest.mark.parametrize("place", ["model/config.json", "model", "other.json"])
def test_a_config_alone_is_enough(run, shown, tmp_path, place):
    case = replace(CASES["vl-moe-fused"], d_k=128, d_v=128)
    (tmp_path / "model").mkdir()
    for file in ("model/config.json", "other.json"):
        (tmp_path / file).write_text(json.dumps(config_of(case)))
    lines = shown(place)
    assert lines[0] == f"{place}  qwen3_5_moe, 8 layers" and "d_k 128" in lines
    header = next(line for line in lines if line.startswith("d_k 128  ") or "d_k 96" in line)
    assert header.split() == ["d_k", "128", "d_k", "96", "d_k", "64", "d_k", "32"]
    assert not any(line == "tensors" or line.startswith("layers") for line in lines)


def test_a_config_beside_its_weights_and_the_whole_checkpoint(shown, tmp_path):
    path = write_checkpoint(tmp_path / "model", GATED)
    assert any(line == "tensors" for line in shown(path))
    assert not any(line == "tensors" for line in shown(path / "config.json"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**GATED, "model_type": "llama"}, "model_type='llama' is not supported"),
        ({**config_of(CASES["next"]), "layer_types": [FULL] * 8}, "there is no state to reduce"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_config_that_is_no_good_is_refused(run, tmp_path, config, reason):
    (tmp_path / "x.json").write_text(json.dumps(config))
    assert reason in run("inspect", "x.json", code=2)
    assert "no-such.json: no such directory" in run("inspect", "no-such.json", code=2)


def test_a_reduced_one_is_compared_with_its_source(run, dense):
    run("prune", dense, "reduced", "--method", "l1", "--keep", 8)
    output = run("inspect", "reduced")
    assert any(line.split()[-4:] == ["d_k", "32", "d_k", "8"] for line in output.splitlines())
    run("prune", dense, "masked", "--method", "l1", "--keep", 8, "--export", "masked")
    output = run("inspect", "masked")
    assert not any("d_k 8" in line for line in output.splitlines()), "nothing got smaller"
