"""The text that the ladder's models are trained and measured on: sources and documentation of packages.

    python benchmarks/ladder/corpus.py download WHEELS         # the packages of packages.txt, as wheels; none is run
    python benchmarks/ladder/corpus.py build WHEELS OUT        # texts, split by package, and OUT/corpus.json about them
    python benchmarks/ladder/corpus.py tokenizer OUT           # byte-level BPE of the training side alone
    python benchmarks/ladder/corpus.py encode OUT              # OUT/train.tokens, which is what training reads

A package is on one side of the split with all of its files, so that held-out text is of projects that no model and no
tokenizer has seen. Files that are equal count once, whatever packages carry them; what both sides carry is held out.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lowkey.publishing import write_json
from lowkey.words import counted
from pruning.corpus import corpus

PACKAGES = Path(__file__).with_name("packages.txt")
EOS = "<|endoftext|>"
SIDES = ("train", "heldout")
HELD_OUT = 0.05
"""Share of the packages that is held out."""
SUFFIXES = {".py", ".pyi", ".rst", ".md"}
SMALLEST, LARGEST = 256, 200_000
"""Bytes that a file has at least and at most: below is boilerplate, above is mostly data."""
LONGEST_LINE = 1_000
"""Characters of the longest line; files with longer ones hold data."""
PACKAGE_BYTES = 2_500_000
"""Bytes that are taken of one package at most, so that no project makes the text."""
CALIBRATION_BYTES = 32_000_000
"""Bytes of the training side that are written once more by themselves, for calibration and recovery."""
TOKENIZER_BYTES = 40_000_000
"""Bytes of text that the tokenizer is trained on."""
STDLIB = "cpython"
"""The name under which the training side of CPython's own sources is counted."""

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Historical Permission|CNRI|0BSD|CC0|Zope|ZPL|NCSA|"
    r"Unlicense|Zlib|BSL-1\.0)\b|^Public Domain",
    re.IGNORECASE,
)
OTHER = re.compile(
    r"\b(A?L?GPL|GNU|MPL|Mozilla|EPL|EUPL|CeCILL|SSPL|BUSL|Creative Commons|CC-BY|Commons Clause|Proprietary)",
    re.IGNORECASE,
)
"""Licences that ask for more, whatever else is said beside them."""
JOINT = re.compile(r"\s+(?:AND|OR)\s+|\s+WITH\s+\S+|;|Freely Distributable")
"""What stands between the licences of an SPDX expression or of several classifiers; one classifier names none."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="Folder of the text, its tokenizer and its tokens.")]
Wheels = Annotated[Path, typer.Argument(help="Folder of wheels.")]


@dataclass(frozen=True)
class Package:
    """What was taken of a package; the files themselves are not kept with the project."""

    name: str
    version: str
    licence: str
    side: str
    files: int
    bytes: int
    sha256: str
    """Hash of the texts in order."""


@app.command()
def download(wheels: Wheels, packages: Path = PACKAGES) -> None:
    """Download the packages named in a file, one a line, without what they depend on. Nothing is installed or run."""
    lines = [line.strip() for line in packages.read_text().splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    for i, name in enumerate(names):
        print(f"{i + 1} of {len(names)}: {name}", flush=True)
        command = [
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(wheels),
        ]
        if subprocess.run([sys.executable, *command, name]).returncode:
            print(f"{name} is left out: pip got no wheel of it, for the reason above", file=sys.stderr)
    if not any(wheels.glob("*.whl")):
        sys.exit(f"error: there is no wheel in {wheels}")


@app.command()
def build(wheels: Wheels, out: Folder) -> None:
    """Write train.jsonl.gz, a part of it as calibration.jsonl.gz, heldout.jsonl.gz, and corpus.json about them."""
    taken: dict[str, tuple[Package, list[str]]] = {}
    seen: set[bytes] = set()
    named: dict[str, Path] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        name = normalised(wheel.stem.split("-")[0])
        if name in named:
            sys.exit(
                f"error: {wheels} has two wheels of {name}, {named[name].name} and {wheel.name}; remove one"
            )
        named[name] = wheel
    # Held-out packages come first, so that it is the training side that loses what both have.
    for side in reversed(SIDES):
        for name, wheel in named.items():
            if side_of(name) != side:
                continue
            try:
                with zipfile.ZipFile(wheel) as archive:
                    version, licence = about(archive)
                    if not is_permissive(licence):
                        print(f"{name} is left out: its licence is {licence!r}", file=sys.stderr)
                        continue
                    found = list(texts_of(archive))
            except (zipfile.BadZipFile, ValueError) as e:
                print(f"{name} is left out: {wheel.name} is not a wheel: {e}", file=sys.stderr)
                continue
            texts = new_texts(found, seen)
            if texts:
                taken[name] = (package(name, version, licence, side, texts), texts)
    for side in SIDES:
        if not any(entry.side == side for entry, _ in taken.values()):
            sys.exit(f"error: no package in {wheels} is on the side {side} of the split; add more packages")
    stdlib = new_texts(corpus("train"), seen)
    python = ".".join(map(str, sys.version_info[:3]))
    taken[STDLIB] = (package(STDLIB, python, "PSF-2.0", "train", stdlib), stdlib)
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        documents = [
            (name, text) for name, (entry, texts) in taken.items() if entry.side == side for text in texts
        ]
        # In random order, so that any part of a file is of all its packages.
        shuffled = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
        write(out / f"{side}.jsonl.gz", shuffled)
        if side == "train":
            write(out / "calibration.jsonl.gz", front(shuffled, CALIBRATION_BYTES))
    packages = [entry for entry, _ in taken.values()]
    write_json(out / "corpus.json", {"packages": [asdict(entry) for entry in packages]})
    for side in SIDES:
        own = [entry for entry in packages if entry.side == side]
        size = sum(entry.bytes for entry in own)
        print(f"{side}: {counted(len(own), 'package')}, {sum(e.files for e in own):,} files, {size:,} bytes")


@app.command()
def tokenizer(
    out: Folder, vocab_size: Annotated[int, typer.Option(help="Tokens.", min=257, max=65_536)] = 16_384
) -> None:
    """Train OUT/tokenizer.json on files of all training packages."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    documents = front(read(out / "train.jsonl.gz"), TOKENIZER_BYTES)
    bpe.train_from_iterator((text for _, text in documents), trainer)
    bpe.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    write_json(out / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


@app.command()
def encode(out: Folder) -> None:
    """Write OUT/train.tokens: the training side as little-endian uint16, an end-of-text token (0) before each file."""
    bpe = Tokenizer.from_file(str(out / "tokenizer.json"))
    documents = (text for _, text in read(out / "train.jsonl.gz"))
    count = 0
    with (out / "train.tokens").open("wb") as file:
        while part := list(islice(documents, 2000)):
            for encoding in bpe.encode_batch(part, add_special_tokens=False):
                file.write(np.array([0, *encoding.ids], "<u2").tobytes())
                count += len(encoding.ids) + 1
            print(f"{count:,} tokens", flush=True)


def normalised(name: str) -> str:
    """A package's name as the registry compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def side_of(name: str) -> str:
    """The side of the split that a package is on, by a hash of its name: it stays there whatever else is taken."""
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "heldout" if drawn < HELD_OUT else "train"


def about(archive: zipfile.ZipFile) -> tuple[str, str]:
    """A wheel's version and licence, as its metadata says. Raises ValueError if that is missing."""
    names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
    if len(names) != 1:
        raise ValueError(f"it has {counted(len(names), 'file')} .dist-info/METADATA, not one")
    metadata = HeaderParser().parsestr(archive.read(names[0]).decode())
    version = metadata["Version"]
    if not version:
        raise ValueError("its metadata says no Version")
    classified = [c for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    licence = metadata.get("License-Expression") or "; ".join(c.split(" :: ")[-1] for c in classified)
    return version, licence or (metadata.get("License") or "").strip().split("\n")[0][:100]


def is_permissive(licence: str) -> bool:
    """Whether every licence that the metadata names is permissive, also where one of them may be chosen."""
    parts = [part for part in map(str.strip, JOINT.split(licence)) if part]
    return bool(parts) and all(map(PERMISSIVE.search, parts)) and not OTHER.search(licence)


def texts_of(archive: zipfile.ZipFile) -> Iterator[str]:
    """The sources and documents of a wheel, in an order that depends on their names alone but mixes folders."""
    infos = [i for i in archive.infolist() if Path(i.filename).suffix in SUFFIXES]
    infos.sort(key=lambda i: hashlib.sha256(i.filename.encode()).digest())
    for info in infos:
        if SMALLEST <= info.file_size <= LARGEST:
            try:
                yield archive.read(info).decode()
            except UnicodeDecodeError:
                continue  # test data in other encodings


def new_texts(found: Iterable[str], seen: set[bytes]) -> list[str]:
    """Those that are text for people and not in `seen`, which they are added to, up to `PACKAGE_BYTES`."""
    result: list[str] = []
    size = 0
    for text in found:
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or max(map(len, text.split("\n"))) > LONGEST_LINE:
            continue
        seen.add(digest)
        size += len(text.encode())
        if size > PACKAGE_BYTES:
            break
        result.append(text)
    return result


def package(name: str, version: str, licence: str, side: str, texts: list[str]) -> Package:
    """The record of a package's texts."""
    data = [text.encode() for text in texts]
    digest = hashlib.sha256(b"\0".join(data)).hexdigest()
    return Package(name, version, licence, side, len(texts), sum(map(len, data)), digest)


def write(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Write documents, each a package's name and a text, as JSON lines."""
    # With no time and no name in it, the file is the same for the same documents.
    with gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) as file:
        for name, text in documents:
            file.write(json.dumps({"package": name, "text": text}).encode() + b"\n")


def read(path: Path) -> Iterator[tuple[str, str]]:
    """What `write` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            yield document["package"], document["text"]


def front(documents: Iterable[tuple[str, str]], size: int) -> Iterator[tuple[str, str]]:
    """Documents from the front, until they hold `size` bytes."""
    for name, text in documents:
        if size <= 0:
            return
        size -= len(text.encode())
        yield name, text


if __name__ == "__main__":
    app()
