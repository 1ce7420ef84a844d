"""Values as Python writes them, as JSON."""

import json
import re
from typing import Any, NoReturn

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<name>[A-Za-z_][\w-]*)
    |(?P<mark>[][(){},:=]))""",
    re.DOTALL | re.VERBOSE,
)
_KEYWORD = re.compile(r"[A-Za-z_][\w-]*")
_EQUALS = re.compile(r"\s*=")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BRACKETS = {"(": "[", ")": "]"}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}


def load(text: str) -> Any:
    """The value of JSON text. Raises ValueError for what is none, NaN and Infinity among it."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def quoted(text: str) -> str:
    """JSON of a text."""
    return json.dumps(text, ensure_ascii=False)


def literal_as_json(text: str) -> str:
    """JSON of a value that is written in Python or in JSON, or in both. Raises ValueError for anything else."""
    return _checked(_translated(text, keywords=False))


def keywords_as_json(text: str) -> str:
    """The JSON object of what stands between the parentheses of a call: `a=1, b="x"`. Raises ValueError as well."""
    return _checked("{" + _translated(text, keywords=True) + "}")


def is_keyword(text: str) -> bool:
    """Whether an argument can have this name between the parentheses of a call."""
    return _KEYWORD.fullmatch(text) is not None


def _checked(text: str) -> str:
    load(text)
    return text


def _translated(text: str, *, keywords: bool) -> str:
    """JSON of each token; between those of keywords at the outermost level colons for the equality signs."""
    pieces: list[str] = []
    depth, at, end = 0, 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"no value at {text[at : at + 20]!r}")
        at = match.end()
        kind, token = match.lastgroup, match[match.lastgroup or 0]
        if kind == "string":
            piece = _string(token)
        elif kind == "name":
            piece = _WORDS.get(token, "")
            if keywords and depth == 0 and (equals := _EQUALS.match(text, at)):
                piece, at = f"{quoted(token)}:", equals.end()
        elif token == "=":
            piece = ""
        else:
            depth += (token in "([{") - (token in ")]}")
            piece = _BRACKETS.get(token, token)
            if piece in "]}" and pieces and pieces[-1].strip() == ",":
                pieces.pop()
        if not piece:
            raise ValueError(f"{token!r} is no value")
        if pieces and pieces[-1][-1] not in "[{ " and piece[0] not in ",:]}":
            pieces.append(" ")  # two values side by side are not one
        pieces.append(f"{piece} " if piece in ",:" or piece.endswith(":") else piece)
    if keywords and pieces and pieces[-1].strip() == ",":
        pieces.pop()
    return "".join(pieces)


def _string(token: str) -> str:
    if token[0] == '"':
        try:
            load(token)
            return token
        except ValueError:
            pass

    def unescaped(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is None:
            return _ESCAPED.get(match[3], match[3] if match[3] in "\\'\"/" else match[0])
        character = chr(int(code, 16))
        return match[0] if "\ud800" <= character <= "\udfff" else character

    return quoted(_ESCAPE.sub(unescaped, token[1:-1]))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")
