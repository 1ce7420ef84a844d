"""Where text comes from: every source by itself, and bad ones by name."""

import json
import re

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


HALF = '{"text": "x"}\n{"text": "ab\\ud800"}\n'
ODD = {
    "surrogate": (HALF.encode(), r"field 'text' holds half a surrogate pair, \\ud800 at character 2"),
    "digits": (b'{"text": "x"}\n{"id": ' + b"9" * 5000 + b"}\n", "line 2 is not JSON: .*4300"),
    "brackets": (b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "line 2 is not JSON: .*recursion"),
    "bytes": (b'{"text": "x"}\n{"text": "\xff"}\n', "is not a readable UTF-8 file: line 2: .*0xff"),
}


@pytest.mark.parametrize(("content", "message"), ODD.values(), ids=ODD)
def test_json_lines_that_no_parser_likes_are_named(tmp_path, content, message):
    file = tmp_path / "odd.jsonl"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(PruningError, match=r"odd\.jsonl") as error:
            read_text([source])
        assert re.search(message, str(error.value)) and "line 2" in str(error.value)
        assert "\n" not in str(error.value)


def test_empty_documents_are_left_out_and_counted(tmp_path, caplog):
    lines = [json.dumps({"text": f"d{i}" if i % 10 == 0 else ""}) for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    text = read_text([tmp_path / "a.jsonl"])
    assert text.documents == [f"d{i}" for i in range(0, 1000, 10)]
    assert caplog.messages == [
        f"note: text=['{tmp_path}/a.jsonl']: 900 of 1,000 documents are empty and left out"
    ]
    caplog.clear()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "empty.txt").touch()
    (tmp_path / "b" / "full.txt").write_text(" ")
    assert read_text([tmp_path / "b"]).documents == [" "]
    assert caplog.messages == [f"note: text=['{tmp_path}/b']: 1 of 2 documents is empty and left out"]
    (tmp_path / "b" / "full.txt").write_text("")
    with pytest.raises(PruningError, match="holds no text"):
        read_text([tmp_path / "b"])


def write_set(folder, *texts):
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Data sets whose names begin alike: `ds`, with a subset `sub`, `ds@v1` and `ds:sub@x`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plain = write_set(tmp_path / "ds", "plain")
    (plain / "sub.jsonl").write_text('{"text": "subset"}\n')
    (plain / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files: train.jsonl\n  default: true\n"
        "- config_name: sub\n  data_files: sub.jsonl\n---\n"
    )
    write_set(tmp_path / "ds@v1", "v1")
    write_set(tmp_path / "ds:sub@x", "x")
    return tmp_path


@pytest.mark.parametrize("where", ["{}/", "", "./", "~/"])
@pytest.mark.parametrize(
    ("name", "document"),
    [("ds", "plain"), ("ds@v1", "v1"), ("ds:sub@x", "x"), ("ds:sub", "subset"), ("ds:", "plain")],
)
def test_a_data_set_that_exists_is_a_path_whole(sets, where, name, document):
    name = where.format(sets) + name
    assert dataset_text(name, tokens=100) == Text(f"{name}, split train", [document])


@pytest.mark.parametrize("where", ["{}/", "", "./", "~/"])
@pytest.mark.parametrize("behind", ["@v2", ":sub@v2", "@v2:sub", "@", "@refs/pr/1", ":a/b"])
def test_a_local_folder_has_no_revisions_and_never_stands_for_another(sets, where, behind):
    folder = f"{where.format(sets)}ds"
    with pytest.raises(PruningError) as error:
        dataset_text(folder + behind, tokens=100)
    message = f"dataset='{folder}{behind}' is not there; {folder} is, but local folders have no revisions"
    assert str(error.value).startswith(message)


def test_a_path_with_a_revision_is_no_hub_id(sets):
    for name in ("/nowhere/ds@v1", "./nothing@v1", "~/nothing@v1"):
        with pytest.raises(PruningError, match="is not there, and local folders have no revisions"):
            dataset_text(name, tokens=100)


def test_hub_ids_are_taken_apart(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, subset, *, revision, **_):
        asked.append((path, subset, revision))
        raise FileNotFoundError(path)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("org/name", "org/name:sub", "org/name@main", "org/name:sub@refs/pr/1"):
        with pytest.raises(PruningError, match="can't be read"):
            dataset_text(name, tokens=100)
    assert asked == [
        ("org/name", None, None),
        ("org/name", "sub", None),
        ("org/name", None, "main"),
        ("org/name", "sub", "refs/pr/1"),
    ]


def test_records_of_a_data_set_that_are_empty_or_no_text(sets, caplog):
    write_set(sets / "sparse", *["", "a", ""] * 3)
    assert dataset_text("sparse", tokens=100).documents == ["a"] * 3
    assert caplog.messages == [
        "note: dataset='sparse', split 'train': 6 of 9 documents are empty and left out"
    ]
    write_set(sets / "none", "", "")
    with pytest.raises(PruningError, match="dataset='none', split 'train': holds no text"):
        dataset_text("none", tokens=100)


def test_half_a_surrogate_pair_in_a_record_is_named(sets, monkeypatch):
    import datasets

    class Stream(list):
        def shuffle(self, **_):
            return self

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: Stream([{"text": "x"}, {"text": "\udfff"}])
    )
    with pytest.raises(PruningError, match=r"record 2: field 'text' holds half .*, \\udfff at character 0"):
        dataset_text("ds", tokens=100)
