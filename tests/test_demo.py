"""The bundled checkpoint: what its README claims, in stock fla and on the way a newcomer takes."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from interpret_fla import ask_stock_fla
from safetensors.torch import load_file

from lowkey.files import OutputTakenError
from modeling.checkpoint import open_checkpoint
from pruning.calibration import Encoder, bundled_text
from pruning.corpus import corpus
from pruning.evaluation import evaluation_windows, perplexity

MODEL = Path(__file__).parents[1] / "demo" / "model"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(MODEL)


def test_shape_and_size(checkpoint):
    spec = checkpoint.spec
    assert spec.d_k == (128,) * 6
    assert spec.state_bytes(0) == 841_728
    assert spec.with_d_k((64,) * 6).state_bytes(0) == 430_080
    assert (MODEL / "model.safetensors").stat().st_size < 16e6
    assert {checkpoint.tensor(name).dtype for name in checkpoint.files} == {torch.bfloat16}


def test_trained_weights_are_written_though_a_config_appeared_meanwhile(checkpoint, tmp_path):
    train = runpy.run_path(str(MODEL.parent / "train.py"), run_name="train")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(OutputTakenError, match=r"config\.json has appeared or changed"):
        train["save"](
            checkpoint.load(), train["FLA"], tmp_path, {"config.json": None, "model.safetensors": None}
        )
    assert (tmp_path / "config.json").read_text() == "mine"
    written, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, MODEL))
    assert written.keys() == shipped.keys()
    assert all(torch.equal(written[name], shipped[name]) for name in shipped)
    (kept,) = tmp_path.glob("config.*.json")
    assert json.loads(kept.read_text()) == train["FLA"]


def test_the_hybrid_is_one_of_qwens_layout_and_ships_small():
    hybrid = open_checkpoint(MODEL.parent / "hybrid")
    spec = hybrid.spec
    assert (spec.family, spec.linear_layers, spec.d_k) == ("qwen3_5", (0, 1, 2, 4, 5, 6), (128,) * 6)
    assert spec.state_bytes(0) == 1_646_592 and spec.kv_bytes_per_token() == 2_048
    assert (hybrid.path / "model.safetensors").stat().st_size < 16e6
    train = runpy.run_path(str(MODEL.parent / "train.py"), run_name="train")
    assert hybrid.config == train["HYBRID"]
    assert (hybrid.path / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    windows = evaluation_windows(Encoder(hybrid), bundled_text("heldout"), tokens=4096)
    # As its README says for the first tokens; CPython's sources differ a little from version to version.
    assert 9 < perplexity(hybrid.load(), windows).perplexity < 13


@pytest.mark.slow
@torch.no_grad()
def test_runs_in_stock_fla(checkpoint, tmp_path):
    prompt = Encoder(checkpoint)("import os\nimport sys\n")
    stock = ask_stock_fla(tmp_path, checkpoints={"demo": MODEL}, prompt=prompt, new_tokens=2)
    model = checkpoint.load()
    hidden, _ = model(torch.tensor(prompt), [0, len(prompt)])
    logits = model.logits(hidden)
    expected = stock.logits["demo"]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    assert stock.ids["demo"][0] == int(logits[-1].argmax())


def test_heldout_perplexity_is_what_the_readme_says(checkpoint):
    """On the first 4 k held-out tokens; demo/model/curve.json has the figure for all of them."""
    recorded = json.loads((MODEL / "curve.json").read_text())["heldout_perplexity"]
    windows = evaluation_windows(Encoder(checkpoint), bundled_text("heldout"), tokens=8 * 512)
    measured = perplexity(checkpoint.load(), windows).perplexity
    assert 0.5 * recorded < measured < 1.5 * recorded


def test_the_split_keeps_documents_apart():
    train, heldout = corpus("train"), corpus("heldout")
    assert len(heldout) > 20
    assert 10 * len(heldout) < len(train)
    assert not set(train) & {text for text in heldout if len(text) > 1000}


def test_prune_then_serve_then_compare(tmp_path):
    """The commands of `make demo`, and a comparison over HTTP."""
    reduced = tmp_path / "reduced"
    command = [BIN / "lowkey-prune", "prune", MODEL, reduced, "--method", "drrqr", "--keep", "64"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    process = subprocess.Popen(
        [BIN / "lowkey-serve", f"dense={MODEL}", f"reduced={reduced}", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stderr is not None
        url = next(m[1] for line in process.stderr if (m := re.search(r"running on (http://\S+)", line)))
        deadline = time.monotonic() + 600
        while httpx.get(f"{url}/ready", timeout=600).status_code != 200:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.2)
        body = {"prompt": "import os\nimport sys\n\n\ndef main(", "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{url}/v1/compare", json=body, timeout=600).json()
        dense, other = answer["results"]
        assert (dense["lowkey"]["state_bytes"], other["lowkey"]["state_bytes"]) == (841_728, 430_080)
        assert 0 < other["against_baseline"]["mean_kl"] < 1
        assert other["against_baseline"]["top1_agreement"] > 0.5
    finally:
        process.terminate()
        process.communicate(timeout=600)
    assert process.returncode == 0
