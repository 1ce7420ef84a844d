"""Where text comes from: every source by itself, and bad ones by name."""

import json

import pytest

from pruning.calibration import Text
from pruning.errors import PruningError
from pruning.sources import dataset_text, read_text


@pytest.fixture
def folder(tmp_path):
    files = {
        "b.md": "# b",
        "a.txt": "héllo",
        "deep/c.py": "c = 1",
        "deep/d.jsonl": '{"text": "d1", "body": "D1"}\n\n{"text": "d2", "body": "D2"}\n',
        ".git/config": "hidden",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "nul.dat").write_bytes(b"text\0")
    return tmp_path


def test_a_file_is_a_document_and_so_is_a_json_line(folder):
    text = read_text([folder / "a.txt", folder / "deep/d.jsonl"])
    assert text == Text("a.txt, d.jsonl", ["héllo", "d1", "d2"])
    assert read_text([folder / "deep/d.jsonl"], "body").documents == ["D1", "D2"]


def test_a_folder_is_all_of_its_text_in_order(folder):
    assert read_text([folder]).documents == ["héllo", "# b", "c = 1", "d1", "d2"]


def test_globs_are_expanded_and_files_are_read_once(folder):
    assert read_text([f"{folder}/*.md"]) == Text("*.md", ["# b"])
    assert read_text([folder / "**/*.py"]).documents == ["c = 1"]
    assert read_text([folder / "b.md", folder / "*.md", folder]).documents.count("# b") == 1
    (folder / "odd[1].txt").write_text("brackets")
    assert read_text([folder / "odd[1].txt"]).documents == ["brackets"], "a name that exists is no pattern"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"missing\.txt' is not a readable UTF-8 file: .*No such file"),
        ("image.png", r"image\.png' is not a readable UTF-8 file: .*codec"),
        ("nul.dat", r"nul\.dat' is not a text file: it has a NUL at character 4"),
        ("*.dat", r"nul\.dat' is not a text file"),
        ("*.rs", r"\*\.rs' matches no file"),
        ("empty", r"empty' is a folder without text files"),
        ("empty.txt", r"holds no text"),
        ("broken.jsonl", r"broken\.jsonl, line 2 is not JSON"),
        ("list.jsonl", r"list\.jsonl, line 1 is a JSON list; it must be an object with a field 'text'"),
        (
            "other.jsonl",
            r"other\.jsonl, line 1 has no field 'text'; it has 'body', 'id' \(choose with --field\)",
        ),
        ("number.jsonl", r"number\.jsonl, line 1: field 'text' is a int; it must be text"),
    ],
)
def test_bad_sources_are_named_with_the_reason(folder, source, message):
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    (folder / "list.jsonl").write_text('["x"]\n')
    (folder / "other.jsonl").write_text('{"body": "x", "id": 1}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(PruningError, match=message):
        read_text([folder / source])


def test_a_field_without_anything_that_has_fields_is_refused(folder):
    with pytest.raises(PruningError, match=r"field='body' is for \.jsonl files and data sets"):
        read_text([folder / "a.txt"], "body")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A data set as the hub has them, in a local folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = tmp_path / "set"
    data.mkdir()
    for split, count in (("train", 300), ("test", 3)):
        lines = [json.dumps({"body": f"{split} document {i}", "id": i}) for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return str(data)


def test_data_sets_are_streamed_shuffled_by_seed_and_no_further_than_needed(dataset):
    text = dataset_text(dataset, field="body", tokens=100, seed=1)
    assert text.name == f"{dataset}, split train"
    assert len("".join(text.documents)) in range(1600, 1700), "16 characters a token"
    assert len(set(text.documents)) == len(text.documents)
    numbers = [int(d.removeprefix("train document ")) for d in text.documents]
    assert numbers != sorted(numbers)
    assert dataset_text(dataset, field="body", tokens=100, seed=1) == text
    assert dataset_text(dataset, field="body", tokens=100, seed=2) != text
    everything = dataset_text(dataset, field="body", split="test", tokens=10**6)
    assert sorted(everything.documents) == [f"test document {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"field": "text"}, r"record 1 has no field 'text'; it has 'body', 'id'"),
        ({"field": "id"}, r"record 1: field 'id' is a int; it must be text"),
        ({"field": "body", "split": "validation"}, r"split 'validation', can't be read"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(dataset, options, message):
    with pytest.raises(PruningError, match=message):
        dataset_text(dataset, tokens=10, **options)


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PruningError, match=r"dataset='.*nowhere', split 'train', can't be read"):
        dataset_text(str(tmp_path / "nowhere"), tokens=10)
