"""A checkpoint's tokenizer.json, which is opened nowhere else. Imports no torch."""

import hashlib
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, models

from modeling.sources import TOKENIZER, CheckpointError


class TokenizerFile:
    """The bytes of `tokenizer.json` in a checkpoint's directory.

    Raises:
        CheckpointError: it is missing or can't be read.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / TOKENIZER
        try:
            self._data = self.path.read_bytes()
        except FileNotFoundError as e:
            raise CheckpointError(
                f"{self.path} is missing; text can only be read with the checkpoint's own tokenizer"
            ) from e
        except OSError as e:
            raise CheckpointError(f"{self.path} can't be read: {e.strerror}") from e

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def open(self) -> tuple[Tokenizer, list[str]]:
        """The tokenizer, which reads any text whole and always alike, and what was ignored for that, in words.

        `transformers` stores how a tokenizer was last used: truncation and padding of some past call. It ignores
        both itself unless a call asks for them. Dropout of a BPE model is noise for training: the same text would
        give other tokens each time.

        Raises:
            CheckpointError: the file is no tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_buffer(self._data)
        except BaseException as e:  # tokenizers raises nothing narrower, and its panics are no Exception
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"{self.path} is not a tokenizer of the tokenizers library: {str(e) or type(e).__name__}"
            ) from e
        ignored = []
        if tokenizer.truncation is not None:
            ignored.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
            tokenizer.no_truncation()
        if tokenizer.padding is not None:
            length = tokenizer.padding["length"]
            ignored.append("padding" if length is None else f"padding to {length} tokens")
            tokenizer.no_padding()
        if isinstance(tokenizer.model, models.BPE) and tokenizer.model.dropout:
            ignored.append(f"a dropout of {tokenizer.model.dropout:.3g}")
            tokenizer.model.dropout = None
        return tokenizer, ignored

    def ignoring(self, ignored: list[str]) -> str:
        """A sentence for people that says what `open` has ignored."""
        return f"{self.path} stores {' and '.join(ignored)}; this is ignored, text is read whole"
