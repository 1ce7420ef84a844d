"""`state_reduction.json` as a stranger may have written it: shown, or refused by the name of the field."""

import json
import re

import pytest
from checkpoints import GATED, write_checkpoint

from modeling.checkpoint import REDUCTION


def source(d_k=32, layers=3, state_bytes=1):
    return {"name": "x", "sha256": "0" * 64, "d_k": [d_k] * layers, "state_bytes": state_bytes}


RECORD = {
    "format": 1,
    "source": source(),
    "method": "l1",
    "seed": 0,
    "calibration": None,
    "evaluation": None,
}


def test_a_record_of_another_format_is_refused(run, tmp_path):
    path = write_checkpoint(tmp_path / "c", GATED)
    (path / REDUCTION).write_text('{"format": 2}')
    assert "state_reduction.json has format 2; this version reads 1" in run("inspect", path, code=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "Expected `object`"),
        ({"method": ["[red]"]}, r"Expected `str`.*method"),
        ({"seed": "[/]"}, r"Expected `int`.*seed"),
        ({"source": source("[red]")}, r"source\.d_k"),
        ({"source": source(layers=1)}, "3 positive numbers"),
        ({"source": source(10**20)}, r"source\.d_k"),
        ({"source": source(2**31)}, "source.d_k=.* of at most 2147483647"),
        ({"source": source(0)}, "3 positive numbers"),
        ({"d_k": [10**20] * 3}, "d_k=.* of at most 2147483647"),
        ({"source": source(state_bytes=10**400)}, "state_bytes"),
        ({"source": source(state_bytes=-1)}, "state_bytes"),
        ({"calibration": {"tokens": 1, "origins": [{}]}}, "calibration.origins"),
        ({"calibration": {"tokens": 10**400, "origins": []}}, "calibration.tokens"),
        ({"evaluation": {}}, "evaluation"),
        (
            {"evaluation": {"text": "t", "dense": {"perplexity": 10**400}, "reduced": {"perplexity": 1}}},
            "evaluation.dense.perplexity",
        ),
        ({"recovery": {"tokens": 1}}, "recovery"),
    ],
)
def test_a_record_that_is_broken_is_refused_by_field(run, tmp_path, changes, message):
    path = write_checkpoint(tmp_path / "c", GATED)
    (path / REDUCTION).write_text(json.dumps(RECORD))
    run("inspect", path)
    (path / REDUCTION).write_text(json.dumps(RECORD | changes))
    refused = run("inspect", path, code=2)
    assert "state_reduction.json" in refused and re.search(message, refused), refused


def test_a_matrix_too_large_is_refused(run, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "c", GATED)
    (path / REDUCTION).write_text(json.dumps(RECORD | {"source": source(2**16)}))
    monkeypatch.setattr("modeling.families.base.MOST_WEIGHTS", 2**20)
    refused = run("inspect", path, code=2)
    assert "state_reduction.json: source.d_k=[65536, 65536, 65536] is too wide" in refused


def test_a_record_that_says_0_is_shown(run, tmp_path):
    path = write_checkpoint(tmp_path / "c", GATED)
    zero = {"perplexity": 0.0}
    record = RECORD | {
        "source": source(state_bytes=0),
        "evaluation": {"text": "t", "dense": zero, "reduced": {"perplexity": 2.0}},
        "recovery": {
            "tokens": 1,
            "settings": {"train": "full"},
            "evaluation": {"text": "t", "tokens": 1, "before": zero, "after": zero},
        },
    }
    (path / REDUCTION).write_text(json.dumps(record))
    shown = run("inspect", path)
    assert shown.count("(no change from 0 in percent)") == 3 and "perplexity 0.000 => 2.000" in shown
