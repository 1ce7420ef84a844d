"""The report's figures of models that were trained for recall, against the numbers that they are drawn from."""

import json

import pytest
from report_inputs import mqar_record

from pruning.report.inputs import read_inputs
from pruning.report.mqar import recall_by_width, recall_rows
from pruning.report.page import all_figures, page


def test_recall_is_drawn_by_pairs_by_width_and_by_method(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(mqar_record()))
    ((name, recall),) = read_inputs([tmp_path / "m.json"]).mqar
    by_pairs, by_method = recall_by_width(name, recall, 0)
    assert [a.text for a in by_pairs.figure.layout.annotations] == ["l1", "l1, trained on"]
    dense, dense_int8, reduced, reduced_int8, *_ = by_pairs.figure.data
    assert list(dense.x) == [4, 8] and list(dense.y) == pytest.approx([100, 90])
    # Of one seed the bars are two standard errors, which of 90 % of 400 are 1.5 points each.
    assert list(dense.error_y.array) == pytest.approx([0, 3.0])
    assert list(dense_int8.y) == pytest.approx([100, 80])
    assert list(reduced.y) == pytest.approx([80, 50]) and list(reduced.error_y.arrayminus) == pytest.approx(
        [5, 0]
    )
    assert list(reduced_int8.y) == pytest.approx([70, 40])
    four, trained, *_ = by_method.figure.data
    assert list(four.x) == [8, 16] and list(four.y) == pytest.approx([80, 100])
    assert list(trained.y) == pytest.approx([100, 100]) and trained.line.dash == "dash"
    header, rows = recall_rows(recall)
    assert header == ["", "4", "8"]
    assert rows[:2] == [
        ["l1, d_k 16", "100.0 / 100.0", "90.0 / 80.0"],
        ["l1, d_k 8", "80.0 / 70.0", "50.0 / 40.0"],
    ]


def test_an_unfinished_run_of_recall_is_drawn_as_far_as_it_is(tmp_path):
    record = mqar_record()
    for count, panels in ((0, None), (2, ["dense"]), (3, ["l1"])):
        (tmp_path / "m.json").write_text(json.dumps({**record, "recalled": record["recalled"][:count]}))
        inputs = read_inputs([tmp_path / "m.json"])
        figures = all_figures(inputs)
        if panels is None:
            assert figures == []
        else:
            assert [a.text for a in figures[0].figure.layout.annotations] == panels
        page("Test", inputs, figures)


def test_models_that_were_asked_nothing_are_not_drawn(tmp_path):
    record = mqar_record()
    for recalled in record["recalled"]:
        recalled["accuracy"] = []
    (tmp_path / "m.json").write_text(json.dumps(record))
    inputs = read_inputs([tmp_path / "m.json"])
    assert all_figures(inputs) == []
    page("Test", inputs, [])
