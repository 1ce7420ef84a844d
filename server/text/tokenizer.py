"""What a checkpoint says about text: its tokenizer and its chat template."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modeling.tokenizer import TokenizerFile
from server.text.chat_template import (
    ChatTemplate,
    TemplateRefusedError,
    read_tokenizer_config,
    special_tokens_of,
    template_of,
)
from server.text.detokenizer import TokenTexts

logger = logging.getLogger("lowkey.variants")


class CheckpointText:
    """The tokenizer and the chat template of one checkpoint.

    Args:
        variant: the name of the variant that the checkpoint is loaded for.
        before: what was read for it at the last load, whose tokenizer is kept if its file is still the same.
    """

    tokenizer: Tokenizer
    token_texts: TokenTexts
    longest_token: int
    """Characters of the longest entry of the vocabulary: so much text takes at least one token."""

    def __init__(self, checkpoint: Path, variant: str, before: "CheckpointText | None" = None) -> None:
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


async def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text. In a thread and as a batch: the tokenizer's own `encode` would hold the GIL.

    Args:
        special: whether the tokenizer adds its special tokens.
    """
    batch = await asyncio.to_thread(tokenizer.encode_batch, [text], add_special_tokens=special)
    ids: list[int] = batch[0].ids
    return ids
