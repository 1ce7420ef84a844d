"""What it costs to hold an answer to a JSON schema: compiling the schema, and each token's mask.

    python benchmarks/structured.py demo/model --vocab 248320 --out structured.json

Masks alone, with the model's tokenizer and with one of so many tokens, and the engine on this machine's CPU with and
without a schema. Beside llguidance, which the server uses, stand xgrammar and outlines-core if they are installed.

An answer is followed token by token: its mask is made, then it goes on. Times are CPU times, and those of tokens of the
second time and later, except where it says first: libraries remember what they have seen.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would count as work
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from tokenizers import Tokenizer

from lowkey.publishing import new_json
from modeling.checkpoint import open_checkpoint
from modeling.tokenizer import TokenizerFile
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.process import build
from server.engine.request import Request
from server.text import grammar
from server.wire.messages import EngineConfig, Generate, Sampling

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string"},
        "role": {"enum": ["owner", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "city": {"type": "string"},
                "zip": {"type": "integer"},
            },
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "role", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "Grace Hopper, rear admiral",
    "age": 79,
    "email": "grace@navy.example",
    "role": "owner",
    "tags": ["compilers", "COBOL", "a nanosecond of wire"],
    "address": {"street": "12 Arlington Memorial Drive", "city": "Arlington", "zip": 22211},
}
WIDE = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(200)}}
SCHEMAS: dict[str, tuple[dict[str, Any], Any]] = {
    "any object": ({"type": "object"}, ANSWER),
    "6 fields, nested": (PERSON, ANSWER),
    "200 optional fields": (WIDE, {f"field_{i}": f"value {i} of some length" for i in range(0, 40, 2)}),
}
"""A schema, and an answer of it."""
REPEATS = 10
LIMIT_S = 60.0
"""What one library gets for one schema."""


def widened(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer with pairs of its own tokens added, up to so many tokens. Pairs of the ones that are
    learned first come first, as real vocabularies have more pieces of words than anything else."""
    data = json.loads(tokenizer.to_str())
    known: dict[str, int] = data["model"]["vocab"]
    merges: list[list[str]] = data["model"]["merges"]
    free = max([*known.values(), *(token["id"] for token in data["added_tokens"])]) + 1
    pieces = [text for text, _ in sorted(known.items(), key=lambda item: item[1])]
    rng = random.Random(0)
    while free < vocab:
        a, b = (pieces[int(len(pieces) * rng.random() ** 2)] for _ in range(2))
        if len(a + b) < 20 and a + b not in known and not a.startswith("<"):
            known[a + b] = free
            merges.append([a, b])
            free += 1
    return Tokenizer.from_str(json.dumps(data))


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of this process: what else runs on the machine does not count."""
    begin = time.process_time()
    work()
    return (time.process_time() - begin) * 1e3


class LLGuidance:
    """Through the server's own classes."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        own = Tokenizer.from_str(tokenizer.to_str())
        self.grammars = Grammars(own, vocab, threads=1, device=torch.device("cpu"))

    def compiled(self, schema: dict[str, Any]) -> str:
        self.grammars._compiled.clear()
        text = grammar.json_schema(schema)
        self.request(text)
        return text

    def request(self, text: str) -> Request:
        how = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
        message = Generate(
            request_id="r", token_ids=[0], max_tokens=9999, sampling=how, stop_token_ids=[0], grammar=text
        )
        request = Request(message, arrived=0.0)
        self.grammars.constrain(request)
        return request

    def follow(self, text: str, ids: list[int]) -> Iterator[tuple[float, float]]:
        """Milliseconds of the mask of each token, and of going on by it."""
        request = self.request(text)
        constraint = request.constraint
        assert constraint is not None
        for token in ids:
            made = milliseconds(lambda: self.grammars.masks([request]))
            yield made, milliseconds(lambda: constraint.advance(token))  # noqa: B023  # called at once
            assert not constraint.error, constraint.error


class XGrammar:
    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.xgr = importlib.import_module("xgrammar")
        by_id = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
        names = [by_id.get(i, f"<unused {i}>") for i in range(vocab)]
        info = self.xgr.TokenizerInfo(
            names, self.xgr.VocabType.BYTE_LEVEL, vocab_size=vocab, stop_token_ids=[0]
        )
        self.compiler = self.xgr.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.mask = self.xgr.allocate_token_bitmask(1, vocab)

    def compiled(self, schema: dict[str, Any]) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=True)

    def follow(self, compiled: Any, ids: list[int]) -> Iterator[tuple[float, float]]:
        matcher = self.xgr.GrammarMatcher(compiled)
        for token in ids:
            made = milliseconds(lambda: matcher.fill_next_token_bitmask(self.mask))
            yield made, milliseconds(lambda: matcher.accept_token(token))  # noqa: B023


class OutlinesCore:
    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.core = importlib.import_module("outlines_core")
        self.schemas = importlib.import_module("outlines_core.json_schema")
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        letters = {chr(b): b for b in printable}
        letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
        texts = {
            bytes(letters[c] for c in text): [token]
            for text, token in tokenizer.get_vocab(with_added_tokens=False).items()
            if token and all(c in letters for c in text)
        }
        self.vocabulary = self.core.Vocabulary(0, texts)
        self.mask = np.zeros((vocab + 31) // 32, np.int32)

    def compiled(self, schema: dict[str, Any]) -> Any:
        return self.core.Index(self.schemas.build_regex_from_schema(json.dumps(schema)), self.vocabulary)

    def follow(self, compiled: Any, ids: list[int]) -> Iterator[tuple[float, float]]:
        guide = self.core.Guide(compiled)
        for token in ids:
            made = milliseconds(
                lambda: guide.write_mask_into(self.mask.ctypes.data, self.mask.size, self.mask.itemsize)
            )
            yield made, milliseconds(lambda: guide.advance(token, False))  # noqa: B023


LIBRARIES = {"llguidance": LLGuidance, "xgrammar": XGrammar, "outlines-core": OutlinesCore}


def limited(tokenizer: Tokenizer, vocab: int, library: str, schema: str) -> dict[str, Any]:
    """`measured` in a process of its own, which gets `LIMIT_S`."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measured(tokenizer, vocab, library, schema)))
    process.start()
    row: dict[str, Any] = {"library": library, "vocab": vocab, "schema": schema}
    try:
        row |= receiver.recv() if receiver.poll(LIMIT_S) else {"error": f"not done in {LIMIT_S:.0f} s"}
    except EOFError:
        row["error"] = "the process died"
    process.kill()
    process.join()
    return row


def measured(tokenizer: Tokenizer, vocab: int, library: str, schema: str) -> dict[str, Any]:
    """What one library takes for one schema with this vocabulary."""
    begin = time.process_time()
    instance = LIBRARIES[library](tokenizer, vocab)
    row: dict[str, Any] = {"tokenizer_ms": (time.process_time() - begin) * 1e3}
    asked, answer = SCHEMAS[schema]
    ids = tokenizer.encode(json.dumps(answer), add_special_tokens=False).ids
    try:
        begin = time.process_time()
        compiled = instance.compiled(asked)
        row["compile_ms"] = (time.process_time() - begin) * 1e3
        runs = [list(instance.follow(compiled, ids)) for _ in range(REPEATS)]
    except Exception as e:  # a library that can't do it says so in its own way
        return row | {"error": f"{type(e).__name__}: {str(e)[:200]}"}
    first, later = runs[0], [step for run in runs[1:] for step in run]
    row["tokens"] = len(ids)
    row["first_us"] = statistics.mean(sum(step) for step in first) * 1e3
    row["mask_us"] = statistics.mean(made for made, _ in later) * 1e3
    row["mask_p99_us"] = float(np.quantile([made for made, _ in later], 0.99)) * 1e3
    row["advance_us"] = statistics.mean(gone_on for _, gone_on in later) * 1e3
    return row


def engine_speeds(source: str, batches: list[int]) -> Iterator[dict[str, Any]]:
    """CPU milliseconds of this process a step of the engine, which is a token of each request, without and with a
    schema: the same prompts and lengths, in turns."""
    config = EngineConfig(
        variant="b",
        source=source,
        device="cpu",
        dtype="auto",
        max_requests=max(batches),
        threads=1,
        prefix_cache=False,
    )
    engine, _ = build(config)
    # A schema of one long string: no answer ends before its last token.
    text = grammar.json_schema({"type": "array", "items": {"type": "string"}, "minItems": 999})
    for batch in batches:
        runs: dict[str, list[float]] = {"": [], text: []}
        for _ in range(4):
            for held, found in runs.items():
                found.append(step_ms(engine, batch, held))
        plain, constrained = (statistics.median(found[1:]) for found in runs.values())
        yield {
            "batch": batch,
            "plain_ms": plain,
            "constrained_ms": constrained,
            "per_token_us": (constrained - plain) / batch * 1e3,
        }


def step_ms(engine: Engine, batch: int, held: str, tokens: int = 64) -> float:
    """Median CPU milliseconds of the steps that only decode."""
    how = Sampling(temperature=0.8, top_p=1.0, top_k=0, min_p=0.0, seed=1)
    for number in range(batch):
        engine.handle(
            Generate(
                request_id=str(number),
                token_ids=[5 + number] * 16,
                max_tokens=tokens,
                sampling=how,
                stop_token_ids=[0] if held else [],
                grammar=held,
            )
        )
    times: list[float] = []
    while not engine.idle:
        begin = time.process_time()
        output = engine.step()
        if output is not None and output.phase == "decode" and output.batch_size == batch:
            times.append((time.process_time() - begin) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint with a byte-level BPE tokenizer")
    parser.add_argument("--vocab", type=int, nargs="*", default=[248_320], help="further sizes of vocabulary")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    tokenizer, _ = TokenizerFile(checkpoint.path).open()
    installed = versions()
    report: dict[str, Any] = {"model": args.model, "libraries": installed, "masks": [], "engine": []}
    columns = ("tokenizer_ms", "compile_ms", "first_us", "mask_us", "mask_p99_us", "advance_us")
    print("library, vocab, schema,", ", ".join(columns))
    for vocab in (checkpoint.spec.vocab_size, *args.vocab):
        wide = widened(tokenizer, vocab)
        for library, schema in itertools.product(installed, SCHEMAS):
            row = limited(wide, vocab, library, schema)
            report["masks"].append(row)
            print(
                library, vocab, schema, *(f"{row[c]:.1f}" for c in columns if c in row), row.get("error", "")
            )
    print("requests, ms a step, with a schema, us a token")
    for row in engine_speeds(args.model, args.batches):
        report["engine"].append(row)
        print(row["batch"], *(f"{row[c]:.3g}" for c in ("plain_ms", "constrained_ms", "per_token_us")))
    if args.out is not None:
        new_json(args.out, report)


def versions() -> dict[str, str]:
    """The versions of those of the libraries that are installed, by name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
    )
    found = {package["name"].replace("_", "-"): package["version"] for package in json.loads(listed.stdout)}
    return {name: found[name] for name in LIBRARIES if name in found}


if __name__ == "__main__":
    main()
