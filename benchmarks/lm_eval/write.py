"""Data of the tasks lowkey_identifiers and lowkey_lines of lm-evaluation-harness, from text: no hub is needed.

    python benchmarks/lm_eval/write.py OUT [--text FILE ...] [--tokenizer CHECKPOINT] [--context TOKENS]

Both tasks ask for what the text itself has said before, 64 to 4,095 tokens ago: a name, or the rest of a line. Contexts
end where the tokenizer parts tokens anyway, so that context and target are the same tokens together as one after the
other. docs/ab.md says how to run the tasks.
"""

import bisect
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lowkey.files import OutputError, check_new_file
from lowkey.publishing import new_file
from modeling.sources import CheckpointError
from pruning.calibration import Encoder
from pruning.errors import PruningError
from pruning.evaluation.identifiers import RANGES, occurrences
from pruning.options import Overwrite, TextFiles, checkpoint_named, text_of

SHORTEST_LINE = 20
"""Characters of the shortest line that is asked for, without its indentation."""
SHORTEST_REST = 8
"""Characters of the shortest rest of a line."""
LONGEST_REST = 48
"""Tokens of the longest rest of a line."""
ROOM = 65
"""Tokens that a context leaves free of what a server and the harness let through: lowkey_lines.yaml lets a model write
64, and the harness wants one more."""


@dataclass(frozen=True)
class Question:
    """One document of a task."""

    context: str
    target: str
    distance: int
    """Tokens from where the same name, or the same line, began last to where this one begins."""
    around: int
    """Geometric middle of the range of distances that this one is in."""


@dataclass(frozen=True)
class Document:
    """A document and its tokens."""

    text: str
    offsets: list[tuple[int, int]]
    """Where the characters of each token begin and end."""
    lines: list[int]
    """Where lines begin, in characters; behind the last one, where the next would."""

    def token_at(self, character: int) -> int:
        """Index of the first token that begins at a character or behind it."""
        return bisect.bisect_left(self.offsets, (character, 0))

    def context_begin(self, end: int, tokens: int) -> int:
        """The first beginning of a line, in characters, from which `tokens` tokens reach up to the character `end`."""
        first = max(self.token_at(end) - tokens, 0)
        return self.lines[bisect.bisect_left(self.lines, self.offsets[first][0])]


Candidate = tuple[int, int, int, int]
"""Where the context begins, where the target begins and ends, all in characters; and the distance in tokens."""
Search = Callable[[Document, int], Iterator[Candidate]]


class Tokens:
    """Token ids and offsets of text as a server reads a prompt: without the end-of-text token of documents."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._skip = encoder, len(encoder.separator)

    def __call__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = self._encoder.with_offsets(text)
        return ids[self._skip :], offsets[self._skip :]

    def document(self, text: str) -> Document:
        """The document, up to its last line end."""
        lines = [0, *(at + 1 for at, character in enumerate(text) if character == "\n")]
        text = text[: lines[-1]]
        return Document(text, self(text)[1], lines)

    def part_at(self, context: str, target: str) -> bool:
        """Whether the tokens of both together are those of the context and then some."""
        together, first = self(context + target)[0], self(context)[0]
        return len(first) < len(together) and together[: len(first)] == first


def identifiers(document: Document, context: int) -> Iterator[Candidate]:
    """Identifiers whose previous occurrence is in the context. Those that stand first in their line are left out: the
    harness moves blanks at the end of a context to the target, and its indentation would be scored as well."""
    for o in occurrences(document.text, document.offsets):
        if o.previous is None:
            continue
        begin = document.context_begin(o.end, context)
        before = document.text[begin : o.begin]
        if begin <= document.offsets[o.previous][0] and before and not before[-1].isspace():
            yield begin, o.begin, o.end, o.first - o.previous


def lines(document: Document, context: int) -> Iterator[Candidate]:
    """Lines that stand in the context already, cut as early as only one continuation of their beginning does."""
    last: dict[str, int] = {}
    for begin, following in itertools.pairwise(document.lines):
        end = following - 1
        line = document.text[begin:end]
        previous, last[line] = last.get(line), begin
        if previous is None or len(line.strip()) < SHORTEST_LINE or line[-1].isspace():
            continue
        start = document.context_begin(end, context)
        if start > previous:
            continue
        seen = document.text[start:begin].split("\n")
        for token in range(document.token_at(begin), document.token_at(end)):
            cut = document.offsets[token][0]
            beginning, rest = document.text[begin:cut], document.text[cut:end]
            if not beginning or beginning[-1].isspace():
                continue
            if all(other == line for other in seen if other.startswith(beginning)):
                asked = len(rest) >= SHORTEST_REST and document.token_at(end) - token <= LONGEST_REST
                if asked and any(character.isalpha() for character in rest):
                    yield start, cut, end, document.token_at(begin) - document.token_at(previous)
                break


def questions(
    documents: list[Document], tokens: Tokens, search: Search, *, context: int, samples: int, seed: int
) -> list[Question]:
    """At most `samples` questions of each range of distances, drawn at random, in the order of the text."""
    found: list[list[tuple[int, Candidate]]] = [[] for _ in RANGES]
    for index, document in enumerate(documents):
        for candidate in search(document, context):
            for of_range, (begin, end) in zip(found, RANGES, strict=True):
                if begin <= candidate[-1] < end:
                    of_range.append((index, candidate))
    draw = random.Random(seed)
    chosen: list[tuple[int, int, Question]] = []
    for of_range, (shortest, longest) in zip(found, RANGES, strict=True):
        draw.shuffle(of_range)
        around, taken = math.isqrt(shortest * longest), 0
        for index, (start, begin, end, distance) in of_range:
            text = documents[index].text
            before, target = text[start:begin], text[begin:end]
            if taken < samples and tokens.part_at(before, target):
                chosen.append((index, begin, Question(before, target, distance, around)))
                taken += 1
    return [question for _, _, question in sorted(chosen, key=lambda entry: entry[:2])]


TASKS: dict[str, Search] = {"lowkey_identifiers": identifiers, "lowkey_lines": lines}


def write(
    out: Annotated[
        Path, typer.Argument(help="Folder to write lowkey_identifiers.jsonl and lowkey_lines.jsonl to.")
    ],
    text: TextFiles = None,
    tokenizer: Annotated[str, typer.Option(help="Checkpoint whose tokens are counted.")] = "demo/model",
    context: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of context and target at most (default: {ROOM} less than the checkpoint's context length, or "
            f"than {RANGES[-1][1]:,}).",
            min=128,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions for each range of distances at most.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the data of both tasks."""
    try:
        files = {name: out / f"{name}.jsonl" for name in TASKS}
        replaced = {name: check_new_file(file, "out", overwrite=overwrite) for name, file in files.items()}
        checkpoint = checkpoint_named(tokenizer)
        tokens = Tokens(Encoder(checkpoint))
        context = context or min(checkpoint.spec.context_length, RANGES[-1][1]) - ROOM
        documents = [tokens.document(document) for document in text_of(text, "heldout").documents]
        ask = partial(questions, documents, tokens, context=context, samples=samples, seed=seed)
        for name, search in TASKS.items():
            asked = ask(search)
            if not asked:
                raise PruningError(
                    f"context={context}: no question for {name} in this text; give more text or longer contexts"
                )
            with new_file(files[name], replaces=replaced[name]) as file:
                file.write_text("".join(json.dumps(asdict(question)) + "\n" for question in asked), "utf-8")
            print(f"{files[name]}: {len(asked)} questions")
    except (PruningError, CheckpointError, OutputError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    typer.run(write)
