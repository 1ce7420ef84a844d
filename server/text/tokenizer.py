"""What a checkpoint says about text: its tokenizer and its chat template."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modeling.tokenizer import TokenizerFile
from server.text.answers.formats import (
    CALL_FORMATS,
    REASONING_FORMATS,
    call_format_in,
    reasoning_format_in,
)
from server.text.chat_template import (
    ChatTemplate,
    TemplateRefusedError,
    read_tokenizer_config,
    special_tokens_of,
    template_of,
)
from server.text.detokenizer import TokenTexts
from server.text.generation_config import read_sampling

logger = logging.getLogger("lowkey.variants")


@dataclass(frozen=True)
class TextOptions:
    """What of a checkpoint's text is used, by the names of the settings."""

    tool_call_parser: str = "auto"
    """`auto`, `none` or a name in `CALL_FORMATS`."""
    reasoning_parser: str = "auto"
    """`auto`, `none` or one of `REASONING_FORMATS`."""
    generation_config: str = "auto"
    """`auto` or `none`."""


DEFAULT_OPTIONS = TextOptions()


class CheckpointText:
    """The tokenizer, the chat template and the default sampling of one checkpoint.

    Args:
        variant: the name of the variant that the checkpoint is loaded for.
        before: what was read for it at the last load, whose tokenizer is kept if its file is still the same.
    """

    tokenizer: Tokenizer
    token_texts: TokenTexts
    longest_token: int
    """Characters of the longest entry of the vocabulary: so much text takes at least one token."""

    def __init__(
        self,
        checkpoint: Path,
        variant: str,
        before: "CheckpointText | None" = None,
        options: TextOptions = DEFAULT_OPTIONS,
    ) -> None:
        self._options = options
        file = TokenizerFile(checkpoint)
        self.sha256 = file.sha256
        """SHA-256 of the tokenizer's file."""
        if before is not None and before.sha256 == file.sha256:
            self.tokenizer, self.token_texts = before.tokenizer, before.token_texts
            self.longest_token = before.longest_token
        else:
            self.tokenizer, ignored = file.open()
            if ignored:
                logger.warning("%s: %s", variant, file.ignoring(ignored))
            self.token_texts = TokenTexts(self.tokenizer)
            self.longest_token = max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)))
        self.tokenizer_config: dict[str, Any] = {}
        self.chat_template: ChatTemplate | None = None
        """The model's chat template; None if it has none, or a bad one."""
        try:
            self.tokenizer_config = read_tokenizer_config(checkpoint)
            source = template_of(self.tokenizer_config)
            if source is not None:
                self.chat_template = ChatTemplate(source, special_tokens_of(self.tokenizer_config))
        except (OSError, ValueError, RecursionError, TemplateRefusedError) as e:  # completions need neither
            logger.warning("%s: no chat: %s", variant, e)
        self.sampling: dict[str, float] = {}
        """Sampling for requests that say nothing of it, by the names of their fields."""
        if options.generation_config == "auto":
            self.sampling, problems = read_sampling(checkpoint)
            for problem in problems:
                logger.warning("%s: %s", variant, problem)

    @property
    def call_format(self) -> str | None:
        """The name of the format that the model writes calls in (`CALL_FORMATS`); None: they stay text."""
        name = self._options.tool_call_parser
        if name == "auto":
            return None if self.chat_template is None else call_format_in(self.chat_template.source)
        return name if name in CALL_FORMATS else None

    @property
    def reads_no_calls(self) -> bool:
        """Whether calls are meant to stay text."""
        return self._options.tool_call_parser == "none"

    @property
    def reasoning_format(self) -> str | None:
        """The name of the format that the model writes thoughts in (`REASONING_FORMATS`); None: they stay text."""
        name = self._options.reasoning_parser
        if name == "auto":
            return None if self.chat_template is None else reasoning_format_in(self.chat_template.source)
        return name if name in REASONING_FORMATS else None


async def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text. In a thread and as a batch: the tokenizer's own `encode` would hold the GIL.

    Args:
        special: whether the tokenizer adds its special tokens.
    """
    batch = await asyncio.to_thread(tokenizer.encode_batch, [text], add_special_tokens=special)
    ids: list[int] = batch[0].ids
    return ids
