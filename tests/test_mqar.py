"""The MQAR benchmark of the ladder: its questions, how answers are counted, and a run at toy size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DELTA, write_checkpoint
from typer.testing import CliRunner

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from pruning.mqar_table import read_mqar

LADDER = Path(__file__).parents[1] / "benchmarks" / "ladder"


@pytest.fixture
def mqar(monkeypatch):
    monkeypatch.syspath_prepend(str(LADDER))
    import mqar

    return mqar


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_questions_ask_for_the_pairs_of_their_sequence(mqar):
    questions = mqar.draw(generator(), 40, 6, 50, length=40)
    assert questions.ids.shape == (40, 40) and questions.pairs == 6
    assert int(questions.ids.min()) >= 1 and int(questions.ids.max()) < 50
    for ids, at, values in zip(
        *(t.tolist() for t in (questions.ids, questions.at, questions.values)), strict=True
    ):
        pairs = dict(zip(ids[0:12:2], ids[1:12:2], strict=True))
        assert len(pairs) == 6 and max(pairs) < 25 <= min(pairs.values())
        assert [pairs[ids[position]] for position in at] == values
        assert len({*at}) == 6 and min(at) >= 12 and all(position % 2 == 0 for position in at)
        assert {ids[position] for position in at} == set(pairs)


def test_keys_come_again_by_zoology_s_power_law(mqar):
    at = mqar.draw(generator(), 40_000, 1, 8, length=20).at.flatten()
    found = np.bincount((at.numpy() - 2) // 2, minlength=9) / len(at)
    weights = np.arange(1, 10) ** (0.01 - 1)
    expected = weights / weights.sum()
    assert found == pytest.approx(expected, abs=5 * 0.5 / len(at) ** 0.5)  # five standard errors at most


def test_too_many_pairs_are_refused(mqar):
    with pytest.raises(
        ValueError, match="pairs=6 need a vocabulary of 14 or more and 24 tokens; there are 12 and 64"
    ):
        mqar.draw(generator(), 1, 6, 12)
    with pytest.raises(ValueError, match="there are 99 and 22"):
        mqar.draw(generator(), 1, 6, 99, length=22)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "16"], "error: width=16 must be between 1 and 15: d_k is 16"),
        (["--width", "0"], "Invalid value for '--width'"),
        (["--pairs", "0"], "Invalid value for '--pairs'"),
        (["--queries", "0"], "Invalid value for '--queries'"),
        (["--seconds", "0"], "Invalid value for '--seconds'"),
        (["--device", "cuda:99"], "error: device='cuda:99' is not available here"),
        (["--method", "no"], "error: method='no' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(mqar, tmp_path, options, words):
    result = CliRunner().invoke(mqar.app, [str(tmp_path / "out"), "--d-k", "16", "--steps", "1", *options])
    assert result.exit_code == 2 and words in result.output
    assert not (tmp_path / "out").exists()


def test_widths_of_whole_models_and_more_are_no_default(mqar, tmp_path, monkeypatch):
    def run(self):
        raise mqar.PruningError(str(self._settings["widths"]))

    monkeypatch.setattr(mqar.Measuring, "run", run)
    result = CliRunner().invoke(mqar.app, [str(tmp_path / "out"), "--d-k", "32"])
    assert "error: [16, 8]" in result.output


def test_right_answers_are_those_of_the_whole_sequence(mqar, tmp_path):
    """Half of the answers that are called right are what `Model.forward` finds most likely."""
    model = open_checkpoint(write_checkpoint(tmp_path / "c", DELTA)).load()
    questions = mqar.draw(generator(), 16, 8, 257)
    count, length = questions.ids.shape
    hidden, _ = model(questions.ids.flatten(), range(0, count * length + 1, length))
    likely = model.logits(hidden).argmax(-1).view(count, length).gather(1, questions.at)
    right = torch.rand(likely.shape, generator=generator()) < 0.5
    asked = replace(questions, values=torch.where(right, likely, (likely + 1) % 257))
    found = mqar.recalled(TorchRuntime(model), asked, "float32")
    assert (found.pairs, found.queries) == (8, 128)
    assert found.accuracy == pytest.approx(
        right.float().mean().item(), abs=2 / 128
    )  # two near ties may differ
    p = found.accuracy
    assert found.standard_error == pytest.approx(np.sqrt(p * (1 - p) / 128))


TOY = (
    *(
        "--family",
        "delta_net",
        "--vocab",
        "32",
        "--hidden",
        "32",
        "--d-k",
        "16",
        "--d-v",
        "16",
        "--pairs",
        "4",
    ),
    *("--steps", "180", "--tokens", "512", "--lr", "0.02", "--queries", "400", "--calibration-tokens", "256"),
    *("--method", "drrqr", "--method", "random", "--width", "2", "--calibration-seed", "1"),
    *("--recover-steps", "20", "--recover-lr", "0.01", "--device", "cpu"),
)


def test_a_model_learns_to_recall_and_loses_it_with_its_state(mqar, tmp_path, monkeypatch):
    import mqar_task

    monkeypatch.setattr(mqar_task, "SHORTEST", 16)

    def run(*options, code=0):
        result = CliRunner().invoke(mqar.app, [str(tmp_path / "out"), *TOY, *options])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result.output

    run()
    file = tmp_path / "out" / "mqar.json"
    table, written = read_mqar(file), json.loads(file.read_text())
    assert table.sha256 == open_checkpoint(tmp_path / "out" / "model").sha256
    assert table.training[-1].step == 180 and table.training[-1].accuracy[4] > 0.5
    share = {
        (r.method, r.d_k, r.trained, r.state_dtype): r.accuracy[0].accuracy
        for r in table.recalled
        if r.accuracy[0].queries == 400
    }
    kinds = [(trained, dtype) for trained in (False, True) for dtype in ("float32", "int8")]
    assert [*share] == [
        (method, width, *kind)
        for begin in (0, 2)
        for method, width in ((None, 16), ("drrqr", 2), ("random", 2))
        for kind in kinds[begin : begin + 2]
    ]
    # One of the four values of the sequence would be right in a quarter of the cases.
    assert share[None, 16, False, "float32"] > 0.75
    assert share[None, 16, False, "int8"] == pytest.approx(share[None, 16, False, "float32"], abs=0.05)
    assert share["drrqr", 2, False, "float32"] < 0.75 * share[None, 16, False, "float32"]
    for method in ("drrqr", "random"):
        assert share[method, 2, True, "float32"] > share[method, 2, False, "float32"]
    # What was cut short goes on where it was, to the same figures.
    file.write_text(json.dumps({**written, "recalled": written["recalled"][:6]}))
    assert "step" not in run()
    assert json.loads(file.read_text()) == written
    assert "is of a run with other settings" in run("--queries", "8", code=2)
