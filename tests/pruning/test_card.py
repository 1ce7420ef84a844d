"""The model card of a reduced checkpoint, and what becomes of its source's."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from checkpoints import GATED, write_checkpoint
from hybrid_cases import CASES, FULL, LINEAR
from hybrids import write_hybrid

from modeling.checkpoint import REDUCTION, open_checkpoint
from pruning.card import name, source_licence, write_card
from pruning.companions import CARD_MARK

L1 = ("--method", "l1", "--keep", 8)
SOURCE = """---
license: other
license_name: tongyi-qianwen
license_link: https://huggingface.co/x/y/blob/main/LICENSE
base_model: someone/else
---
# The source

Scores 99.9 on everything.
"""


def front(card):
    """The front matter and the text of a card."""
    _, matter, text = card.split("---\n", 2)
    return yaml.safe_load(matter), text


def section(card, title):
    """The text under a heading."""
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def card(tmp_path):
    return lambda out: (tmp_path / out / "README.md").read_text()


def test_a_card_says_what_was_removed_and_how(run, tmp_path, card):
    write_hybrid(tmp_path / "dense", replace(CASES["vl-moe-fused"], layer_types=(LINEAR, FULL)))
    (tmp_path / "words.txt").write_text(" ".join(f"{i * i}" for i in range(2000)))
    text = ("--text", "words.txt", "--tokens", 256, "--window-length", 64)
    run("prune", "dense", "out", "--method", "drrqr", "--keep", 8, "--seed", 3, *text, "--evaluate")
    matter, body = front(card("out"))
    assert matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linear-attention", "pruned", "lowkey", "reduced-state"],
    }
    record = json.loads((tmp_path / "out" / REDUCTION).read_text())
    origin = record["calibration"]["origins"][0]
    assert "# `dense`, d_k 16 => 8" in body
    assert "keeps 8 of its 16 key/query channels." in body and "method `drrqr`" in body and "seed 3" in body
    assert f"sha256 `{record['source']['sha256'][:12]}`" in body
    assert "calibration on 256 tokens" in body
    assert f"4 windows of 64 tokens of `words.txt` (sha256 `{origin['text_sha256'][:12]}`)" in body
    measured = record["evaluation"]
    before, after = (measured[k]["perplexity"] for k in ("dense", "reduced"))
    assert f"Perplexity {before:.3f} => {after:.3f} (" in section(body, "Quality")
    assert f"on {measured['reduced']['tokens']:,} tokens of" in section(body, "Quality")
    apart = measured["divergence"]
    assert f"KL {apart['kl']:.4f} nats a token, top-1 agreement {apart['top1_agreement']:.1%}." in body
    capacity = section(body, "What a request takes")
    assert "|  | d_k 16 | d_k 8 |" in capacity and "| vLLM's block | 48 tokens | 32 tokens |" in capacity
    assert [len(row.split("|")) for row in re.findall(r"^\|.*\|$", capacity, re.MULTILINE)] == [5] * 10
    assert "twice" not in body


def test_what_is_not_measured_is_said(run, dense, card):
    run("prune", dense, "out", *L1)
    quality = section(card("out"), "Quality")
    assert "Not measured." in quality and "lowkey-prune evaluate SOURCE DIR" in quality
    assert "without any text" in card("out")


def commands(text):
    """The lines of all blocks of code but comments."""
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("case", "export", "has", "lacks"),
    [
        (
            "vl-dense-tied",
            "sliced",
            ["VLLM_PLUGINS=lowkey vllm serve DIR", "mlx_lm.server"],
            ["vllm serve DIR", "llama-server"],
        ),
        (
            "vl-dense-tied",
            "masked",
            ["vllm serve DIR --gdn-prefill-backend triton", "llama-server"],
            ["VLLM_PLUGINS"],
        ),
        ("olmo", "sliced", ["vllm serve DIR"], ["VLLM_PLUGINS", "sglang", "llama-server"]),
        ("text-dense-tied", "sliced", ["sglang", "lowkey-serve reduced=DIR"], ["mlx_lm"]),
        (None, "sliced", ["import fla", "lowkey-serve reduced=DIR"], ["vllm", "mlx_lm", "sglang"]),
    ],
)
def test_commands_are_of_what_runs_it(run, tmp_path, card, case, export, has, lacks):
    if case is None:
        write_checkpoint(tmp_path / "dense", GATED)
    else:
        write_hybrid(tmp_path / "dense", CASES[case])
    run("prune", "dense", "out", "--method", "l1", "--keep", 6, "--export", export)
    lines = commands(section(card("out"), "What runs it"))
    for start in has:
        assert any(line.startswith((start, f"python -m {start}")) for line in lines), (start, lines)
    for start in lacks:
        assert not any(line.startswith((start, f"python -m {start}")) for line in lines), (start, lines)
    assert "| transformers | yes |" in card("out")
    python = re.findall(r"^```python\n(.*?)^```$", card("out"), re.MULTILINE | re.DOTALL)
    compile("".join(python), "card", "exec")


def test_a_masked_one_says_that_it_saves_no_memory(run, dense, card):
    run("prune", dense, "out", *L1, "--export", "masked")
    text = card("out")
    assert "8 of 32 key channels, masked" in text and "It saves no memory" in text
    assert "|  | d_k 32 |\n" in text and "=> " not in section(text, "What a request takes")
    assert "masked" in front(text)[0]["tags"]


def test_widths_per_layer_are_not_announced_as_transformers(run, dense, tmp_path, card):
    (tmp_path / "t").write_text(" ".join(f"{i * i}" for i in range(2000)))
    text = ("--text", "t", "--tokens", 256, "--window-length", 64)
    run("prune", dense, "out", "--method", "drrqr", "--keep", 16, "--per-layer", "--align", 8, *text)
    assert len(set(open_checkpoint("out").spec.d_k)) > 1, "the test's premise"
    matter, body = front(card("out"))
    assert "library_name" not in matter and "as many as it needed" in body
    assert "| transformers | no | it has one d_k for all layers |" in body
    assert not any("vllm" in line or "import" in line for line in commands(body))


def test_a_hybrid_of_different_widths_runs_in_lowkey_on_a_cpu(run, tmp_path, card):
    write_hybrid(tmp_path / "dense", replace(CASES["vl-dense-tied"], layer_types=(LINEAR, LINEAR, FULL)))
    (tmp_path / "t").write_text(" ".join(f"{i * i}" for i in range(2000)))
    options = ("--method", "random", "--keep", 8, "--per-layer", "--align", 4, "--text", "t", "--tokens", 256)
    said = run("prune", "dense", "out", *options, "--window-length", 64)
    assert len(set(open_checkpoint("out").spec.d_k)) > 1, "the test's premise"
    on_cpu = "Lowkey runs this, on a CPU only, and stock loaders refuse it; --export masked keeps such widths"
    plan = next(line for line in said.splitlines() if "note: where layers differ in d_k" in line)
    assert on_cpu in plan
    body = card("out")
    assert commands(body) == ["lowkey-serve reduced=DIR"] and body.count("| yes |") == 1
    assert "| Lowkey | yes | lowkey-serve on a CPU; on a GPU not yet |" in body
    assert "No server runs this checkpoint on a GPU yet" in body
    for shown in (said, run("inspect", "out")):
        assert on_cpu in " ".join(shown.split())
    for text in (body, run("inspect", "out")):
        assert "vLLM's block" not in text and "requests at" not in text and "state in bfloat16" in text
    masked = run("prune", "dense", "masked", *options, "--window-length", 64, "--export", "masked")
    assert "no server" not in masked and "| vLLM's block |" in card("masked")


def test_the_sources_card_is_kept_and_its_licence_passed_on(run, tmp_path, card):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    (dense / "README.md").write_text(SOURCE)
    run("prune", "dense", "out", *L1)
    assert (tmp_path / "out/README.source.md").read_text() == SOURCE
    matter, body = front(card("out"))
    assert matter["license"] == "other" and matter["license_name"] == "tongyi-qianwen"
    assert matter["license_link"] == "https://huggingface.co/x/y/blob/main/LICENSE"
    assert "base_model" not in matter, (
        "a directory is no model of the hub, and the source's own base is not ours"
    )
    assert "99.9" not in body and "[README.source.md](README.source.md)" in body
    assert "licence is the source's: `tongyi-qianwen`" in body

    run("prune", "out", "again", "--method", "l1", "--keep", 4)
    assert (tmp_path / "again/README.source.md").read_text() == SOURCE, "not the card of the first reduction"
    assert front(card("again"))[0]["license_name"] == "tongyi-qianwen"
    assert "# `out`, d_k 8 => 4" in card("again")


def test_a_card_of_ours_is_not_passed_on(run, dense, tmp_path, card):
    run("prune", dense, "out", *L1)
    said = run("prune", "out", "again", "--method", "l1", "--keep", 4)
    assert not (tmp_path / "again/README.source.md").exists() and "README" not in said
    assert "it came without a card" in card("again")


def test_a_card_that_was_written_over_ours_is_left_out_and_named(run, tmp_path, card):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    (dense / "README.md").write_text(SOURCE)
    run("prune", "dense", "out", *L1)
    (tmp_path / "out/README.md").write_text("my own words")
    said = run("prune", "out", "again", "--method", "l1", "--keep", 4)
    assert "note: left out: README.md, because README.source.md comes along" in said
    assert (tmp_path / "again/README.source.md").read_text() == SOURCE
    assert CARD_MARK in card("again")


def test_a_model_of_the_hub_is_the_base_model(run, tmp_path, monkeypatch, card):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path / "local"))
    write_checkpoint(tmp_path / "local", GATED)
    run("prune", "org/name@v1", "out", *L1)
    assert front(card("out"))[0]["base_model"] == "org/name"
    assert "# `org/name@v1`, d_k 32 => 8" in card("out")
    run("prune", "local", "other", *L1)
    assert "base_model" not in front(card("other"))[0]


def test_recovery_is_told_with_its_figures(run, tmp_path, card):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    (dense / "README.md").write_text(SOURCE)
    (tmp_path / "t").write_text(" ".join(f"{i * i}" for i in range(4000)))
    run("prune", "dense", "out", *L1)
    training = (
        "--text",
        "t",
        "--heldout",
        "t",
        "--heldout-tokens",
        512,
        "--window-length",
        64,
        "--tokens",
        512,
    )
    run("recover", "dense", "out", "recovered", *training)
    record = json.loads((tmp_path / "recovered" / REDUCTION).read_text())["recovery"]
    quality = section(card("recovered"), "Quality")
    before, after = (record["evaluation"][k]["perplexity"] for k in ("before", "after"))
    assert f"trained after that on {record['tokens']:,} tokens" in quality
    assert f"perplexity {before:.3f} => {after:.3f}" in quality
    assert "Not measured" not in quality
    assert (tmp_path / "recovered/README.source.md").read_text() == SOURCE
    run("recover", "dense", "out", "control", *training, "--control")
    assert not (tmp_path / "control/README.md").exists(), "trained on, it is no longer what the card is of"
    assert (tmp_path / "control/README.source.md").read_text() == SOURCE


EVIL = (
    "x`\n---\nlicense: mit\n---\n# Free <script>alert(1)</script> | ![](http://x) \x1b[2J \ud800" + "y" * 500
)


def test_names_cannot_get_out_of_their_place(run, dense, tmp_path):
    run("prune", dense, "out", *L1)
    file = tmp_path / "out" / REDUCTION
    record = json.loads(file.read_text())
    plain = (tmp_path / "out/README.md").read_text()
    origin = {"text": EVIL, "text_sha256": EVIL, "windows": 1, "window_length": 1, "seed": 0}
    record |= {
        "method": EVIL,
        "source": {**record["source"], "name": EVIL, "hub_id": EVIL, "sha256": EVIL},
        "calibration": {"tokens": 1, "origins": [origin] * 1000},
        "evaluation": {
            "text": EVIL,
            "dense": {"perplexity": 0.0},
            "reduced": {"perplexity": 1.0},
        },
        "recovery": {
            "tokens": 1,
            "settings": {"train": EVIL},
            "evaluation": {
                "text": EVIL,
                "tokens": 1,
                "before": {"perplexity": 1.0},
                "after": {"perplexity": 1.0},
            },
        },
    }
    (tmp_path / "out/README.source.md").write_text(f"---\nlicense: {EVIL[:1]}'\nlicense_name: [a, b]\n---\n")
    write_card(tmp_path / "out", record)
    text = (tmp_path / "out/README.md").read_text()
    assert front(text)[0] == front(plain)[0]
    assert re.findall(r"^#+ .*$", text, re.MULTILINE)[1:] == re.findall(r"^#+ .*$", plain, re.MULTILINE)[1:]
    without_code = re.sub(r"`[^`\n]*`", "", text)
    assert "<script" not in without_code and "![]" not in without_code and "\x1b" not in text
    assert len(text) < len(plain) + 12 * 300


def test_a_name_is_one_piece_of_code():
    assert name("a`b\n c\x00") == "`a'b c\\x00`"
    assert name("") == "` `" and len(name("z" * 1000)) == 205


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("", {}),
        ("license: mit\n", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: 'apache-2.0'\r\n---\r\n", {"license": "apache-2.0"}),
        ("---\nlicense: mit # comment\n---\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nextra:\n  license: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\na: b\n---\nlicense: mit\n", {}),
    ],
)
def test_licences_are_read_from_the_front_matter_alone(tmp_path, text, licence):
    (tmp_path / "README.source.md").write_bytes(text.encode())
    assert source_licence(tmp_path) == licence
