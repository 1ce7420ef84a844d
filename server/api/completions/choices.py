"""All choices of one request, and what is told of them together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from server.api.completions.echo import echoed, joined
from server.api.completions.generation import MIN_TIMED_TOKENS, NOTHING, Chunk, Generation, Observer, usage
from server.api.completions.prepare import Prompts
from server.api.completions.schemas import ChoiceFields
from server.api.http.aside import aside
from server.api.http.tasks import together
from server.api.serving.service import Origin, Places
from server.settings import Settings
from server.text.answers.reader import AnswerReader
from server.wire.messages import Generate

SIZES = ("state_bytes", "recurrent_bytes", "conv_bytes", "kv_bytes")
"""What of the `lowkey` block is added up over choices."""


@dataclass(frozen=True)
class Choices:
    """All choices of one request. Stream them (`Events`) or `run` them, once."""

    places: Places
    """Places in the variant's queue, one for each choice, that are left when the engine is done with each."""
    fields: ChoiceFields
    prompts: Prompts
    messages: list[Generate]
    """What the engine is asked for, for each choice (`generate_messages`)."""
    origin: Origin
    observers: Sequence[Observer]
    """Who is told of each choice that has ended."""
    settings: Settings
    reader: Callable[[], AnswerReader] | None = None
    """Makes what takes thoughts and calls out of a choice's text; None: it is text and nothing else."""

    @cached_property
    def generations(self) -> list[Generation]:
        """One generation for each choice."""
        saved = self.prompts.saved
        # A reader who keeps up leaves a token or two waiting. A whole answer takes each token as it comes.
        most_unread = self.settings.stream_buffer_bytes / len(self.messages)
        interval = 1 if self.fields.stream_options is None else self.fields.stream_options.interval
        return [
            Generation(
                self.places.variant,
                self.fields,
                message,
                self.origin,
                observers=self.observers,
                saved_tokens=0 if saved is None else saved.header.tokens,
                most_unread=most_unread,
                on_sampled=self.places.leave,
                interval=interval,
                reader=None if self.reader is None else self.reader(),
            )
            for message in self.messages
        ]

    async def run(self) -> list[Chunk]:
        """Run all choices to their end: one chunk for each.

        Raises:
            EngineError: the engine went away, or the model's output is broken.
        """
        echo = await self.echo()
        chunks = await together([generation.run() for generation in self.generations])

        def whole() -> list[Chunk]:
            return [joined(before, chunk) for before, chunk in zip(echo, chunks, strict=True)]

        return whole() if self.fields.alternatives is None else await aside(whole)

    async def echo(self) -> list[Chunk]:
        """What stands before each choice. Raises as `run` does."""
        if self.prompts.echo is None:
            return [NOTHING for _ in self.generations]
        chunks = await echoed(
            self.places.variant, self.fields, self.origin, self.prompts.ids, self.prompts.echo
        )
        return [chunk for chunk in chunks for _ in range(self.fields.choices_each)]

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens of all choices; a prompt counts once, however many choices it has."""
        firsts = self.generations[:: self.fields.choices_each]
        return usage(
            sum(g.prompt_tokens for g in firsts),
            sum(len(g.token_ids) for g in self.generations),
            sum(g.cached_tokens for g in firsts),
        )

    @property
    def lowkey(self) -> dict[str, Any]:
        """What the request held and how fast it was. Of several choices: the memory of all, the time of the first
        token and of the last, and a finish reason if they have the same."""
        blocks = [g.lowkey for g in self.generations]
        if len(blocks) == 1:
            return blocks[0]
        times = [g.times for g in self.generations if g.times is not None]
        decode_s = None if not times else max(last for _, last in times) - min(first for first, _ in times)
        lengths = [len(g.token_ids) for g in self.generations]
        speed = None
        if decode_s and max(lengths) > MIN_TIMED_TOKENS:
            speed = (sum(lengths) - 1) / decode_s
        reasons = {block["finish_reason"] for block in blocks}
        return {
            **blocks[0],
            **{size: sum(block[size] for block in blocks) for size in SIZES},
            "queue_s": min((b["queue_s"] for b in blocks if b["queue_s"] is not None), default=None),
            "ttft_s": min((b["ttft_s"] for b in blocks if b["ttft_s"] is not None), default=None),
            "decode_s": decode_s,
            "tokens_per_second": speed,
            "cached_tokens": self.usage["prompt_tokens_details"]["cached_tokens"],
            "finish_reason": reasons.pop() if len(reasons) == 1 else None,
        }

    @property
    def headers(self) -> dict[str, str]:
        """Two numbers of the `lowkey` block, as headers of answers that are no stream."""
        block = self.lowkey
        speed = block["tokens_per_second"]
        return {
            "x-lowkey-state-bytes": str(block["state_bytes"]),
            "x-lowkey-tokens-per-second": "null" if speed is None else f"{speed:.3f}",
        }
