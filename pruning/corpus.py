"""The bundled text: the standard library's sources and pydoc's topics, which every CPython carries.

The split is by name, so that a document is on the same side under every Python version. It was drawn once (CPython
3.11, 5 % of the documents, seed 0) before the demo model's tokenizer saw any text.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = {"site-packages", "lib2to3", "idlelib", "encodings"}


def documents() -> Iterator[tuple[str, str]]:
    """Every (name, text), in a fixed order: stdlib files by path, then pydoc topics."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if _SKIPPED_FOLDERS & set(name.parts) or "cjkcodec" in path.name or path.name == "topics.py":
            continue
        try:
            yield name.as_posix(), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # test data in other encodings
    for topic, text in topics.items():
        yield f"topic:{topic}", text


def heldout_names() -> frozenset[str]:
    """Names of the documents that the demo model never saw."""
    return frozenset(resources.files("pruning").joinpath("heldout.txt").read_text().splitlines())


def corpus(split: Split) -> list[str]:
    """The texts of one side of the split."""
    heldout = heldout_names()
    return [text for name, text in documents() if (name in heldout) == (split == "heldout")]


def sha256(texts: list[str]) -> str:
    """Fingerprint of a list of texts; differs between Python versions, whose sources differ."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
