"""The tasks of benchmarks/lm_eval through lm-evaluation-harness and a server, on a dense model and a reduced one: the
figures are those of the models themselves."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from harness import logprobs, run_harness
from live_server import LiveServer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from modeling.checkpoint import open_checkpoint
from pruning.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "benchmarks" / "lm_eval"
DEMO = ROOT / "demo" / "model"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
NAMES = ["lowkey_identifiers", "lowkey_lines"]
TIE = 1e-3
"""Logits of one float32 model, computed in another order, differ by far less."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with questions from the bundled text."""
    directory = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(TASKS / "write.py"), str(directory), "--tokenizer", str(DEMO)]
    subprocess.run([*command, "--context", "400", "--samples", "5"], check=True, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """The demo model, and one with an eighth of its state."""
    reduced = tmp_path_factory.mktemp("reduced") / "reduced"
    prune = CliRunner().invoke(app, ["prune", str(DEMO), str(reduced), "--method", "l1", "--keep", "16"])
    assert prune.exit_code == 0, prune.output
    return {"dense": DEMO, "reduced": reduced}


def questions(directory, name):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


@torch.inference_mode()
def written(model, ids, stop="\n", most=64):
    """What the model writes behind a prompt, up to a stop, and by how much it preferred it; one forward a token."""
    start, margin = len(ids), float("inf")
    while True:
        text = TOKENIZER.decode(ids[start:], skip_special_tokens=False)
        if stop in text or len(ids) - start == most or ids[-1] == 0:
            return text.removesuffix("<|endoftext|>").split(stop)[0], margin
        hidden, _ = model(torch.tensor(ids), [0, len(ids)])
        best, second = model.logits(hidden[-1]).double().topk(2).values.tolist()
        margin = min(margin, best - second)
        ids = [*ids, int(model.logits(hidden[-1]).argmax())]


def by_distance(asked, values):
    """Mean over all questions and over those of each range of distances."""
    around = sorted({question["around"] for question in asked})
    means = {n: [v for q, v in zip(asked, values, strict=True) if q["around"] == n] for n in around}
    return {"": fmean(values)} | {f"_{n}": fmean(of_range) for n, of_range in means.items()}


def test_both_tasks_say_what_the_models_do(data, variants, clients, tmp_path):
    server = LiveServer(tmp_path / "log", *(f"{name}={path}" for name, path in variants.items()))
    try:
        server.wait_ready()
        measured = {
            name: run_harness(clients, data, NAMES, TASKS, model=name, url=server.url, tokenizer=DEMO)
            for name in variants
        }
    finally:
        server.stop()
    for name, path in variants.items():
        model = open_checkpoint(path).load()
        results, samples = measured[name]
        check_identifiers(model, questions(data, NAMES[0]), results[NAMES[0]], samples[NAMES[0]])
        check_lines(model, questions(data, NAMES[1]), results[NAMES[1]], samples[NAMES[1]])
    dense, reduced = (results["lowkey_identifiers"]["log_prob,none"] for results, _ in measured.values())
    assert dense > reduced + 0.5


def check_identifiers(model, asked, results, samples):
    assert {q["around"] for q in asked} == {128, 512} and len(asked) == len(samples) == 10
    log_probs, hits = [], []
    for question, sample in zip(asked, samples, strict=True):
        assert sample["doc"] == question
        context = TOKENIZER.encode(question["context"]).ids
        ids = TOKENIZER.encode(question["context"] + question["target"]).ids
        assert ids[: len(context)] == context and len(ids) - len(context) >= 2
        ours, likeliest = logprobs(model, ids)
        log_probs.append(float(ours[len(context) - 1 :].sum()))
        hits.append(bool(likeliest[len(context) - 1 :].all()))
        assert sample["log_prob"] == pytest.approx(log_probs[-1], rel=1e-3)
        assert bool(sample["acc"]) == hits[-1], question
    for suffix, acc in by_distance(asked, hits).items():
        assert results[f"acc{suffix},none"] == pytest.approx(acc)
    assert results["log_prob,none"] == pytest.approx(fmean(log_probs), rel=1e-3)


def check_lines(model, asked, results, samples):
    assert {q["around"] for q in asked} == {128, 512} and len(asked) == len(samples) == 10
    right = []
    for question, sample in zip(asked, samples, strict=True):
        assert sample["doc"] == question
        text, margin = written(model, TOKENIZER.encode(question["context"]).ids)
        (theirs,) = sample["filtered_resps"]
        assert theirs == text or margin < TIE
        right.append(theirs == question["target"])
    for suffix, share in by_distance(asked, right).items():
        assert results[f"exact_match{suffix},none"] == pytest.approx(share)
    assert any(right) or model.spec.d_k[0] < 128
