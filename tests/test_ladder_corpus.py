"""The ladder's text: which packages it is of, how they are split, and that it is the same for the same wheels."""

import json
import time
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ladder_text import HELD_OUT, LADDER, TRAINED, documents, make_text, sources, wheel
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return sources()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("ladder"), sources())


def test_a_package_is_on_one_side_and_equal_files_count_once(text: Path, texts: list[str]) -> None:
    train, heldout = (documents(text / f"{side}.jsonl.gz") for side in ("train", "heldout"))
    assert {name for name, _ in train} == {TRAINED, "cpython"}  # the one under GNU's licence is left out
    assert {name for name, _ in heldout} == {HELD_OUT}
    # What both carry is held out, and what is no text for people is on neither side.
    assert sorted(t for _, t in heldout) == sorted([texts[0], *texts[8:16]])
    assert sorted(t for name, t in train if name == TRAINED) == sorted(texts[1:8])
    recorded = {p["name"]: p for p in json.loads((text / "corpus.json").read_text())["packages"]}
    assert recorded[TRAINED]["files"] == 7
    assert recorded[TRAINED]["side"] == "train"
    assert recorded[HELD_OUT]["bytes"] == sum(len(t.encode()) for t in [texts[0], *texts[8:16]])


def test_tokens_are_the_training_side_behind_end_of_text_tokens(text: Path) -> None:
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    tokens = np.fromfile(text / "train.tokens", "<u2")
    first = next(t for _, t in documents(text / "train.jsonl.gz"))
    end = tokens.tolist().index(0, 1)
    assert tokens[0] == 0
    assert tokenizer.decode(tokens[1:end].tolist()) == first
    assert int((tokens == 0).sum()) == len(documents(text / "train.jsonl.gz"))


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LADDER))
    import corpus

    return corpus


@pytest.mark.parametrize(
    ("metadata", "licence", "taken"),
    [
        ("License: MIT", "MIT", True),
        ("License: MIT License\n        Permission, unlike the GPL's, is granted", "MIT License", True),
        ("Classifier: License :: OSI Approved :: MIT License\nLicense: see LICENSE", "MIT License", True),
        ("Classifier: License :: Freely Distributable\nClassifier: License :: OSI Approved :: BSD License",
         "Freely Distributable; BSD License", True),
        ("Classifier: License :: Freely Distributable", "Freely Distributable", False),
        ("License-Expression: (MIT OR Apache-2.0) AND Zlib", "(MIT OR Apache-2.0) AND Zlib", True),
        ("License-Expression: Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception", True),
        ("License-Expression: MIT AND CC-BY-SA-4.0", "MIT AND CC-BY-SA-4.0", False),
        ("License-Expression: MIT AND LicenseRef-Ours", "MIT AND LicenseRef-Ours", False),
        ("License-Expression: MIT OR GPL-2.0-or-later", "MIT OR GPL-2.0-or-later", False),
        ("License: Dual BSD/GPL", "Dual BSD/GPL", False),
        ("Keywords: MIT", "", False),
    ],
)  # fmt: skip
def test_packages_are_taken_whose_licences_are_all_permissive(
    corpus: ModuleType, tmp_path: Path, metadata: str, licence: str, taken: bool
) -> None:
    wheel(tmp_path, "a", metadata, {})
    with zipfile.ZipFile(tmp_path / "a-1.0-py3-none-any.whl") as archive:
        found = corpus.about(archive)
    assert found == ("1.0", licence)
    assert corpus.is_permissive(licence) is taken


def test_the_landed_text_is_of_packages_that_would_be_taken_again(corpus: ModuleType) -> None:
    packages = json.loads((ROOT / "benchmarks/results/ladder/corpus.json").read_text())["packages"]
    assert len(packages) > 200
    assert [p["name"] for p in packages if not corpus.is_permissive(p["licence"])] == []
    of_registry = [p for p in packages if p["name"] != corpus.STDLIB]
    assert all(corpus.side_of(p["name"]) == p["side"] for p in of_registry)


def test_what_is_no_wheel_is_left_out_and_named(
    corpus: ModuleType, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in ((TRAINED, texts[0]), (HELD_OUT, texts[1])):
        wheel(tmp_path, name, "License: MIT", {"m.py": text})
    for name, files in {
        "bare.whl": {"m.py": texts[2]},
        "v-1-py3.whl": {"v-1.dist-info/METADATA": "Name: v\n"},
    }.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
    (tmp_path / "torn-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    corpus.build(tmp_path, tmp_path / "text")
    said = capsys.readouterr().err
    assert "bare is left out: bare.whl is not a wheel: it has 0 files .dist-info/METADATA, not one" in said
    assert "v is left out: v-1-py3.whl is not a wheel: its metadata says no Version" in said
    assert "torn is left out: torn-1.0-py3-none-any.whl is not a wheel" in said
    assert {name for name, _ in documents(tmp_path / "text" / "heldout.jsonl.gz")} == {HELD_OUT}


def test_wheels_that_make_no_split_are_refused(corpus: ModuleType, tmp_path: Path, texts: list[str]) -> None:
    wheel(tmp_path, TRAINED, "License: MIT", {"m.py": texts[0]})
    with pytest.raises(SystemExit, match="no package in .* is on the side heldout"):
        corpus.build(tmp_path, tmp_path / "text")
    (tmp_path / f"{TRAINED.upper()}-2.0-py3-none-any.whl").touch()
    with pytest.raises(SystemExit, match=f"two wheels of {TRAINED}"):
        corpus.build(tmp_path, tmp_path / "text")


def test_the_same_wheels_make_the_same_files(
    corpus: ModuleType, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate((TRAINED, HELD_OUT, "beta")):
        wheel(tmp_path, name, "License: MIT", {f"{k}.py": t for k, t in enumerate(texts[5 * i : 5 * i + 5])})
    monkeypatch.setattr(corpus, "corpus", lambda _side: texts[15:])
    built = []
    for now in (1e9, 2e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        corpus.build(tmp_path, tmp_path / str(now))
        corpus.tokenizer(tmp_path / str(now), vocab_size=300)
        corpus.encode(tmp_path / str(now))
        built.append({file.name: file.read_bytes() for file in (tmp_path / str(now)).iterdir()})
    assert built[0] == built[1]
    assert len(built[0]) == 7
