"""The comparison that comes with the page is one of the demo's models: what can be computed again is."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from modeling.checkpoint import open_checkpoint
from server.api.operations import ui

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo" / "model"
PAGE = Path(ui.__file__).parent / "page"
RECORDED = json.loads((PAGE / "recorded.json").read_text())
DENSE, REDUCED = RECORDED["answer"]["results"]
DIFFERENCE = REDUCED["against_baseline"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The models of `make demo`."""
    reduced = tmp_path_factory.mktemp("recorded") / "reduced"
    (rule,) = re.findall(
        r"lowkey-prune prune \$\(MODEL\) \$\(REDUCED\) (.*)", (ROOT / "Makefile").read_text()
    )
    command = [Path(sys.executable).parent / "lowkey-prune", "prune", MODEL, reduced, *rule.split()]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return [open_checkpoint(MODEL), open_checkpoint(reduced)]


def token_ids(tokens):
    """Ids by texts, each of which has to be that of one token alone."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = {}
    for token_id in range(tokenizer.get_vocab_size()):
        found.setdefault(tokenizer.decode([token_id], skip_special_tokens=False), []).append(token_id)
    assert all(len(found[token]) == 1 for token in tokens)
    return [found[token][0] for token in tokens]


def test_it_says_what_the_models_are(checkpoints):
    dense, reduced = (checkpoint.spec for checkpoint in checkpoints)
    for result, spec in ((DENSE, dense), (REDUCED, reduced)):
        assert result["lowkey"]["state_bytes"] == spec.state_bytes(0)
        assert result["lowkey"]["state_dtype"] == "float32"
    assert DIFFERENCE["state_bytes_ratio"] == pytest.approx(
        reduced.state_bytes(0) / dense.state_bytes(0), rel=1e-5
    )
    millions = sum(checkpoints[0].tensor(name).numel() for name in checkpoints[0].files) / 1e6
    widths = f"{dense.d_k[0]} and {reduced.d_k[0]}"
    assert RECORDED["models"] == f"a Gated DeltaNet of {millions:.1f} M parameters at d_k {widths}"


@torch.no_grad()
def test_its_kl_and_perplexities_are_the_models(checkpoints):
    """Against the differentiable forward, which shares no kernel with what serves a model on a CPU."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(RECORDED["input"]["prompt"]).ids
    answer = token_ids(DENSE["tokens"])
    ids = torch.tensor([*prompt, *answer])
    logs = []
    for checkpoint, result in zip(checkpoints, (DENSE, REDUCED), strict=True):
        model = checkpoint.load()
        hidden, _ = model(ids, [0, len(ids)])
        logs.append(model.logits(hidden).double().log_softmax(-1))
        taken = logs[-1][: len(prompt) - 1].gather(1, ids[1 : len(prompt), None])
        assert float((-taken.mean()).exp()) == pytest.approx(result["prompt_perplexity"], rel=1e-3)
    dense, reduced = (each[len(prompt) - 1 : -1] for each in logs)
    kl = (dense.exp() * (dense - reduced)).sum(-1)
    # Float32 on both sides and six digits in the file: a part in a hundred, of the small ones a hundred-thousandth.
    assert kl.tolist() == pytest.approx(DIFFERENCE["kl"], rel=1e-2, abs=1e-5)
    assert float(kl.mean()) == pytest.approx(DIFFERENCE["mean_kl"], rel=1e-2)
    assert (dense.argmax(-1) == reduced.argmax(-1)).tolist() == DIFFERENCE["agree"]


def test_its_parts_agree():
    for result in (DENSE, REDUCED):
        assert "".join(result["tokens"]) == result["text"]
        assert len(result["tokens"]) == result["usage"]["completion_tokens"]
    first = next(
        i for i, (a, b) in enumerate(zip(DENSE["tokens"], REDUCED["tokens"], strict=False)) if a != b
    )
    assert DIFFERENCE["first_divergence"] == first
    assert DIFFERENCE["top1_agreement"] == pytest.approx(
        sum(DIFFERENCE["agree"]) / len(DIFFERENCE["agree"]), 1e-5
    )
    for result, points in zip((DENSE, REDUCED), RECORDED["points"], strict=True):
        seconds, tokens = zip(*points, strict=True)
        assert sorted(seconds) == list(seconds) and sorted(tokens) == list(tokens)
        assert tokens[-1] == result["usage"]["completion_tokens"]
    assert len(RECORDED["timings"]) > 5
    for timing in RECORDED["timings"]:
        speeds = timing["reduced"]["speed"], timing["dense"]["speed"]
        assert timing["reduced"]["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=1e-4)
    assert RECORDED["timings"][0]["dense"]["speed"] == DENSE["lowkey"]["tokens_per_second"]


def test_its_prompt_and_settings_are_those_of_the_script_and_of_the_form():
    script = runpy.run_path(str(ROOT / "demo" / "record_comparison.py"))
    given = RECORDED["input"]
    assert given["prompt"] == script["PROMPT"]
    assert given["settings"] == {name: str(value) for name, value in script["SETTINGS"].items()}
    assert str(RECORDED["answer"]["seed"]) == given["settings"]["seed"]
    page = (PAGE / "index.html").read_text()
    (prompt,) = re.findall(r'<textarea id="prompt".*?>\n(.*?)</textarea>', page, re.DOTALL)
    assert prompt == given["prompt"]
    for name in ("max_tokens", "temperature"):
        assert f'name="{name}"' in page
        (value,) = re.findall(rf'name="{name}"[^>]* value="([^"]*)"', page)
        assert value == given["settings"][name]
