"""The questions that benchmarks/lm_eval/write.py makes of text: each is answered by its own context."""

import json
import runpy
from pathlib import Path

import pytest
from checkpoints import byte_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lm_eval" / "write.py"
NAMES = [f"some_name_{chr(ord('a') + i)}" for i in range(20)]
LINES = [f"    value = call({name}, {name[::-1]}) # {i * i}\n" for i, name in enumerate(NAMES)]
TEXT = "".join(LINES * 4) + "unfinished_name"


def write(directory, dense, text=TEXT, **options):
    (directory / "text.txt").write_text(text)
    given = {
        "text": [directory / "text.txt"],
        "tokenizer": str(dense),
        "context": 1500,
        "samples": 12,
        "seed": 0,
    }
    runpy.run_path(str(SCRIPT))["write"](directory / "out", **{**given, **options})


def questions(directory, name):
    return [json.loads(line) for line in (directory / f"out/{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def written(dense, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written")
    write(directory, dense)
    return directory


def length(text):
    """Tokens of the tests' tokenizer, which are bytes."""
    return len(byte_tokenizer().encode(text).ids)


def test_identifiers_stand_in_their_context_so_many_tokens_ago(written):
    asked = questions(written, "lowkey_identifiers")
    assert len(asked) == 12  # each one came last a whole round ago, which is one range
    for question in asked:
        context, target = question["context"], question["target"]
        assert target in {name for line in LINES for name in (*NAMES, *(n[::-1] for n in NAMES))}
        assert context + target in TEXT and length(context + target) <= 1500
        assert context.startswith("    value = ") and context[-1] == "("
        assert length(context) - length(context[: context.rindex(target)]) == question["distance"]
        assert 256 <= question["distance"] < 1024 and question["around"] == 512


def test_rests_of_lines_are_the_only_continuation_that_the_context_has(written):
    asked = questions(written, "lowkey_lines")
    assert len(asked) == 12
    for question in asked:
        *before, beginning = question["context"].split("\n")
        line = beginning + question["target"]
        assert line + "\n" in LINES and length(question["context"] + question["target"]) <= 1500
        assert {other for other in before if other.startswith(beginning)} == {line}
        shorter = {other for other in before if other.startswith(beginning[:-1])}
        assert len(shorter) > 1 or beginning[-2].isspace()  # it is cut as early as can be
        index = len(before) - 1 - before[::-1].index(line)
        assert length("\n".join([*before[index:], ""])) == question["distance"]


def test_the_draw_depends_on_the_seed_alone_and_replaces_nothing(written, dense, tmp_path):
    write(tmp_path, dense)
    for name in ("lowkey_identifiers", "lowkey_lines"):
        assert questions(tmp_path, name) == questions(written, name)
    with pytest.raises(SystemExit, match="error: out=.*lowkey_identifiers.jsonl' already exists"):
        write(tmp_path, dense)
    write(tmp_path, dense, seed=1, overwrite=True)
    assert questions(tmp_path, "lowkey_lines") != questions(written, "lowkey_lines")


def test_a_context_leaves_room_for_the_answer_if_it_is_not_said_otherwise(dense, tmp_path):
    write(tmp_path, dense, "".join(LINES[:6] * 8), context=None, samples=1000)
    lengths = [length(q["context"] + q["target"]) for q in questions(tmp_path, "lowkey_identifiers")]
    assert 400 < max(lengths) <= 512 - 65  # the checkpoint's max_position_embeddings is 512


def test_a_text_that_answers_nothing_is_said(dense, tmp_path):
    for text, task in (
        (TEXT, "lowkey_identifiers"),
        (TEXT.replace("(", "(near_name, 1000000000, "), "lowkey_lines"),
    ):
        with pytest.raises(SystemExit, match=f"error: context=300: no question for {task} in this text"):
            write(tmp_path, dense, text, context=300)
        assert not (tmp_path / f"out/{task}.jsonl").exists()
