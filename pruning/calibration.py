"""Text -> token windows for calibration, with a record of where they came from."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from lowkey.words import counted
from modeling.checkpoint import Checkpoint, CheckpointError
from modeling.tokenizer import TokenizerFile
from pruning.corpus import Split, corpus, sha256
from pruning.errors import PruningError

logger = logging.getLogger(__name__)

WINDOW = 512
"""Tokens per window, for calibration and evaluation alike."""

BATCH = 4
"""Windows that calibration runs together. Part of the result: float32 products depend on it in their last bits."""


@dataclass(frozen=True)
class Text:
    """Documents, and a name for messages and records."""

    name: str
    documents: list[str]

    @property
    def sha256(self) -> str:
        return sha256(self.documents)


@dataclass(frozen=True)
class Origin:
    """Where calibration tokens came from: enough to draw them again."""

    text: str
    text_sha256: str
    seed: int
    windows: int
    """How many windows were run: those of this shard."""
    window_length: int
    tokens_sha256: str
    """Hash of the tokens that were run, as little-endian int64."""
    shard: str | None = None
    """`i/n of count windows` for one of n shards of a larger draw."""

    @property
    def tokens(self) -> int:
        return self.windows * self.window_length

    def as_json(self) -> dict[str, str | int | None]:
        return {**asdict(self), "tokens": self.tokens}


def bundled_text(split: Split) -> Text:
    """One side of the text that ships with CPython (`pruning.corpus`).

    Unlike those of users' own text its empty files are kept: published figures were measured with them.
    """
    return Text(f"bundled CPython text, {split} side", corpus(split))


class Encoder:
    """The checkpoint's own tokenizer; each document stands behind the checkpoint's end-of-text token, if it has one.

    Make one for a checkpoint and pass it on: a warning says what is ignored of the tokenizer, each time it is opened.

    Raises:
        PruningError: the checkpoint carries no tokenizer.json, or one that can't be read, or the model has no row for
            its end-of-text token.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._vocab_size = checkpoint.spec.vocab_size
        self.separator = list(checkpoint.spec.eos_token_ids[:1])
        for token in self.separator:
            if token >= self._vocab_size:
                raise PruningError(
                    f"{checkpoint.path / 'config.json'}: eos_token_id={token} must be below "
                    f"vocab_size={self._vocab_size}: each document is read behind this token"
                )
        try:
            file = TokenizerFile(checkpoint.path)
            self._tokenizer, ignored = file.open()
        except CheckpointError as e:
            raise PruningError(str(e)) from e
        if ignored:
            logger.warning("note: %s", file.ignoring(ignored))
        self._file = file.path

    def __call__(self, document: str) -> list[int]:
        """Token ids of one document. Raises PruningError if the model has no such token."""
        return self._ids(self._encode(document))

    def with_offsets(self, document: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of one document, and for each of them where its characters begin and end in the document; 0 and 0
        for the token that stands in front of it.

        Raises:
            PruningError: the model has no such token.
        """
        encoding = self._encode(document)
        return self._ids(encoding), [(0, 0)] * len(self.separator) + encoding.offsets

    def _encode(self, document: str) -> Encoding:
        return self._tokenizer.encode(document, add_special_tokens=False)

    def _ids(self, encoding: Encoding) -> list[int]:
        ids: list[int] = self.separator + encoding.ids
        if max(ids, default=0) >= self._vocab_size:
            raise PruningError(
                f"{self._file} gives token {max(ids)}, but the model's vocab_size={self._vocab_size}"
            )
        return ids

    def words(self) -> list[int]:
        """Tokens of the model that read as a plain word, ASCII letters with or without a space, ascending.

        Of several that read as the same word the first; the first ones of a vocabulary are the most frequent.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        size = min(self._tokenizer.get_vocab_size(), self._vocab_size)
        words: dict[str, int] = {}
        for token in range(size):
            word = self._tokenizer.decode([token]).strip()
            if token not in added and word.isascii() and word.isalpha():
                words.setdefault(word, token)
        return list(words.values())


def draw_windows(
    encoder: Encoder, text: Text, *, count: int = 16, length: int = WINDOW, seed: int = 0
) -> tuple[Tensor, Origin]:
    """Windows of consecutive tokens from as many documents as possible.

    Documents are taken in random order. Each gives one of its windows, at random; documents shorter than a window
    are packed into common ones (`cu_seqlens` keeps them apart). Only when the documents run out are the other windows
    used. No token is used twice.

    Returns:
        int64 `[count, length]` and where it came from.

    Raises:
        PruningError: the text is too short, or `count` or `length` is below 1.
    """
    for name, value in (("windows", count), ("window_length", length)):
        if value < 1:
            raise PruningError(f"{name}={value} must be at least 1")
    generator = np.random.default_rng(seed)
    windows: list[list[int]] = []
    others: list[list[int]] = []
    joined: list[int] = []
    for i in generator.permutation(len(text.documents)):
        if len(windows) >= count:
            break
        ids = encoder(text.documents[i])
        cut = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        if cut:
            windows.append(cut.pop(int(generator.integers(len(cut)))))
            others += cut
        else:
            joined += ids
            if len(joined) >= length:
                windows.append(joined[:length])
                joined = []
    available = len(windows) + len(others)
    if available < count:
        raise PruningError(
            f"windows={count} of {counted(length, 'token')} are more than {text.name} gives, which is {available}; "
            "ask for fewer or shorter windows, or add text"
        )
    if len(windows) < count:
        windows += [others[i] for i in generator.permutation(len(others))]
    drawn = torch.tensor(windows[:count])
    return drawn, Origin(text.name, text.sha256, seed, count, length, tokens_sha256(drawn))


def tokens_sha256(windows: Tensor) -> str:
    """Hash of token ids int64 `[count, length]`."""
    return hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def take_shard(windows: Tensor, origin: Origin, shard: int, shards: int) -> tuple[Tensor, Origin]:
    """The windows that machine `shard` of `shards` (1 to n) runs: every n-th batch of the draw.

    Whole batches, so that every product is the one of an unsharded run and the statistics add up to its statistics.

    Raises:
        PruningError: there are fewer batches than shards.
    """
    batches = windows.split(BATCH)
    if len(batches) < shards:
        found = f"{counted(len(windows), 'window')} are {counted(len(batches), 'batch')}"
        raise PruningError(
            f"shard={shard}/{shards}: {found} of {BATCH}; "
            f"take more tokens or at most {counted(len(batches), 'shard')}"
        )
    taken = torch.cat(batches[shard - 1 :: shards])
    return taken, replace(
        origin,
        windows=len(taken),
        tokens_sha256=tokens_sha256(taken),
        shard=f"{shard}/{shards} of {len(windows)} windows",
    )


def cu_seqlens(windows: Tensor, separators: Sequence[int]) -> list[int]:
    """Offsets of the sequences in `windows` int64 `[count, length]`, packed: `[0, ..., count * length]`.

    A sequence starts at every window, and inside one at every document: where the end-of-text token stands that
    `Encoder` puts before each, the first of `separators`. Documents share windows but no state, as requests don't.
    """
    first = torch.zeros_like(windows, dtype=torch.bool)
    first[:, 0] = True
    for token in separators[:1]:
        first |= windows == token
    return [*first.flatten().nonzero().flatten().tolist(), windows.numel()]
