"""The grammars of answers with calls of tools."""

from tokenizers import Tokenizer

from server.text.answers.lark import bounded
from server.text.answers.parts import CallFormat, Tools
from server.text.answers.reader import END_THINK, THINK, Thinking
from server.text.grammar import after, literal, quoter

TEXT = r"/(.|\n)*/"
"""Any text without special or added tokens."""


def demanded(calls: CallFormat, tools: Tools, tokenizer: Tokenizer, *, parallel: bool) -> str:
    """The grammar of an answer that is a call of one of the tools, or several. Raises GrammarError."""
    rules = calls.rules(tools, quoter(tokenizer), parallel=parallel)
    return "\n".join([r"start: /[ \n]{0,4}/ calls", *bounded(rules)])


def kept(calls: CallFormat, tools: Tools, tokenizer: Tokenizer, *, parallel: bool) -> str | None:
    """The grammar of an answer whose calls, if it has any, are of these tools and fit their schemas. None if the
    format's opening tag is no token of its own: text that is no call could then not be told from one. Raises
    GrammarError."""
    if tokenizer.token_to_id(calls.opening) is None:
        return None
    rules = calls.rules(tools, quoter(tokenizer), parallel=parallel)
    return "\n".join([f"start: ({TEXT} calls){'*' if parallel else '?'} {TEXT}", *bounded(rules)])


def behind_thoughts(grammar: str, thinking: Thinking, tokenizer: Tokenizer) -> str:
    """The grammar of an answer that `grammar` says, behind the thoughts that the model may have before: they are held
    to nothing."""
    if thinking is Thinking.OPEN:
        return after(END_THINK, grammar, tokenizer)
    tags = [tokenizer.token_to_id(tag) for tag in (THINK, END_THINK)]
    if thinking is Thinking.NEVER or None in tags:
        return grammar
    thoughts = f"{literal(THINK, tokenizer)} {TEXT} {literal(END_THINK, tokenizer)} /[ \\n]{{0,2}}/"
    return f"start: ({thoughts})? %lark {{\n{grammar}\n}}"
