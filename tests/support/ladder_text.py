"""Text for the ladder's scripts, of wheels that are made here from bundled sources."""

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from pruning.corpus import corpus as bundled

LADDER = Path(__file__).parents[2] / "benchmarks" / "ladder"
HELD_OUT, TRAINED = "bandit", "alpha"
"""Names that fall on either side of the split."""


def sources() -> list[str]:
    """Twenty-four texts."""
    return [text for text in bundled("heldout") if 256 < len(text.encode()) < 50_000][:24]


def wheel(folder: Path, name: str, licence: str, files: dict[str, str | bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{licence}\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        for path, text in files.items():
            archive.writestr(f"{name}/{path}", text)


def documents(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(line["package"], line["text"]) for line in map(json.loads, file)]


def make_text(folder: Path, texts: list[str]) -> Path:
    """A folder of text, tokenizer and tokens, in `folder`."""
    wheels = folder / "wheels"
    wheels.mkdir()
    shared = texts[0]
    python = {f"m{i}.py": t for i, t in enumerate(texts[1:8])}
    wheel(wheels, TRAINED, "License-Expression: MIT", {**python, "again.py": texts[1], "shared.py": shared})
    other = {f"m{i}.py": t for i, t in enumerate(texts[8:16])}
    spoilt = {
        "latin.py": "é".encode("latin-1") * 300,
        "data.py": "x" * 5000,
        "short.py": "pass",
        "a.json": "{}" * 300,
    }
    wheel(
        wheels,
        HELD_OUT,
        "Classifier: License :: OSI Approved :: BSD License",
        {**other, "s.py": shared, **spoilt},
    )
    wheel(wheels, "gplish", "License: GNU GPL v3", {"m.py": texts[16]})
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(LADDER))
        import corpus

        patched.setattr(corpus, "corpus", lambda _side: texts[17:])
        corpus.build(wheels, folder / "text")
        corpus.tokenizer(folder / "text", vocab_size=1024)
        corpus.encode(folder / "text")
    return folder / "text"
