"""An answer as it is generated: text goes in, its parts come out."""

from enum import Enum

from server.text.answers.cursor import MAX_SPACE, SPACE, overlap
from server.text.answers.parts import (
    Arguments,
    Block,
    Call,
    CallFormat,
    Content,
    NoCallError,
    Part,
    Reasoning,
    Tools,
)

THINK, END_THINK = "<think>", "</think>"


class Thinking(Enum):
    """What is known of an answer before it begins."""

    NEVER = "never"
    """The model does not think, or not in this answer."""
    MAYBE = "maybe"
    """It thinks if it begins with the tag."""
    OPEN = "open"
    """The prompt ends within its thoughts."""


class AnswerReader:
    """Reads one answer.

    White space around thoughts and around calls is left out. A call within thoughts ends them.

    Args:
        calls: how the model writes calls; None: there are none.
        tools: what it may call; a call of anything else is text.
        parallel: whether it may call more than once; else the answer is `done` behind its first call.
    """

    def __init__(
        self,
        thinking: Thinking = Thinking.NEVER,
        calls: CallFormat | None = None,
        tools: Tools | None = None,
        *,
        parallel: bool = True,
    ) -> None:
        self.done = False
        """Whether nothing more is wanted of the model."""
        self._calls = calls
        self._tools: Tools = tools or {}
        self._parallel = parallel
        self._parts: list[Part] = []
        self._undecided = thinking is Thinking.MAYBE
        self._thinking = thinking is Thinking.OPEN
        self._held = ""
        """The end of the text, if it may begin a tag."""
        self._space = ""
        """White space before that, which is left out if a tag follows."""
        self._trims = thinking is not Thinking.NEVER
        """Whether white space at the beginning of what follows is left out."""
        self._block: Block | None = None
        self._begun = 0
        """Calls so far."""
        self._complete = 0

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that it looks for."""
        return (THINK, END_THINK, *(() if self._calls is None else self._calls.tags))

    @property
    def called(self) -> bool:
        """Whether the answer has calls, all of them whole."""
        return 0 < self._begun == self._complete

    def take(self) -> list[Part]:
        """The parts that have come since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def add(self, text: str) -> None:
        """The answer goes on."""
        while not self.done:
            if self._block is not None:
                rest = self._in_block(self._block, text)
            else:
                rest = self._outside(text)
            if rest is None:
                return
            text = rest

    def end(self) -> None:
        """The answer has ended."""
        while (block := self._block) is not None and not self.done:
            try:
                block.end()
                rest, self._trims = block.unread, True
            except NoCallError:
                rest = self._refused(block)
            self._block = None
            self.add(rest)
        if not self.done:
            self._undecided = False
            held, self._held = self._held, ""
            self._tell(held)
            space, self._space = self._space, ""
            self._put(space)

    # What a block of calls tells (`Calls`).

    def begin(self, name: str) -> None:
        if not self.done:
            self._space = ""
            self._thinking = False
            self._parts.append(Call(self._begun, name))
            self._begun += 1

    def arguments(self, text: str) -> None:
        if self.done or not text:
            return
        last = self._parts[-1] if self._parts else None
        if isinstance(last, Arguments):
            self._parts[-1] = Arguments(last.number, last.text + text)
        else:
            self._parts.append(Arguments(self._begun - 1, text))

    def complete(self) -> None:
        if not self.done:
            self._complete += 1
            self.done = not self._parallel

    def _in_block(self, block: Block, text: str) -> str | None:
        try:
            rest = block.add(text)
        except NoCallError:
            return self._refused(block)
        if rest is not None:
            self._block = None
            self._trims = True
        return rest

    def _refused(self, block: Block) -> str:
        """A block that was none is text: its tag is told, the rest is read once more."""
        self._block = None
        if self._calls is not None:
            self._tell(self._calls.opening)
        return block.unread

    def _outside(self, text: str) -> str | None:
        """Read on outside of blocks. None if all has been read, else what is behind a tag."""
        self._held += text
        if self._undecided:
            return self._first()
        tags = [END_THINK] if self._thinking else []
        if self._calls is not None:
            tags.append(self._calls.opening)
        if not tags:
            text, self._held = self._held, ""
            self._tell(text)
            return None
        found = [(at, tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if not found:
            at = self._held.rfind("<", -max(map(len, tags)))
            at = len(self._held) - (0 if at < 0 else overlap(self._held[at:], *tags))
            text, self._held = self._held[:at], self._held[at:]
            self._tell(text)
            return None
        at, tag = min(found)
        text, rest, self._held = self._held[:at], self._held[at + len(tag) :], ""
        self._tell(text)
        if tag == END_THINK:
            self._thinking, self._space, self._trims = False, "", True
        elif self._calls is not None:
            self._block = self._calls.block(self._tools, self)
        return rest

    def _first(self) -> str | None:
        """Whether the answer begins with thoughts, behind no more white space than there may be between tags."""
        text = self._held.lstrip(SPACE)
        begins = len(self._held) - len(text) <= MAX_SPACE
        if begins and text != THINK and THINK.startswith(text):
            return None
        self._undecided, self._held, whole = False, "", self._held
        if begins and text.startswith(THINK):
            self._thinking = True
            return text.removeprefix(THINK)
        self._trims = False
        return whole

    def _tell(self, text: str) -> None:
        """Text goes on, up to white space at its end that a tag may leave out."""
        if self._trims:
            text = text.lstrip(SPACE)
            if not text:
                return
            self._trims = False
        if not self._thinking and self._calls is None:
            self._put(text)
            return
        body = text.rstrip(SPACE)
        if body:
            self._put(self._space + body)
            self._space = text[len(body) :]
        else:
            self._space += text

    def _put(self, text: str) -> None:
        if not text:
            return
        kind = Reasoning if self._thinking else Content
        last = self._parts[-1] if self._parts else None
        if isinstance(last, kind):
            self._parts[-1] = kind(last.text + text)
        else:
            self._parts.append(kind(text))
