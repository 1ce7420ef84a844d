"""What answers are held to: a small vocabulary, languages written out in full, and schemas at random."""

import itertools
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.engine.constraint import Constraint
from server.engine.grammars import Grammars
from server.engine.request import Request
from server.wire.messages import Generate

PIECES = ["tr", "tru", "true", "fal", '{"', '":', '","', "12", "ab", "abc", "\n\n", "</", "</th", "é"]
"""Tokens besides the single bytes: some end within a word of JSON, some beyond it."""


def small_tokenizer(*added: str) -> Tokenizer:
    """End of text is token 0, then come all bytes, then `PIECES`, then added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for piece in PIECES:
        ((letters, _),) = split.pre_tokenize_str(piece)
        for end in range(2, len(letters) + 1):
            if letters[:end] not in vocab:
                vocab[letters[:end]] = len(vocab)
                merges.append((letters[: end - 1], letters[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(list(added))
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of each token that is text, by GPT-2's alphabet, which stands for each byte by a letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    added = tokenizer.get_added_tokens_decoder()
    return {
        token: bytes(letters[c] for c in text)
        for text, token in tokenizer.get_vocab().items()
        if token not in added
    }


def constrained(grammars: Grammars, grammar: str, stops: list[int], **fields: Any) -> Request:
    """A request that nothing has been generated for, at the beginning of its grammar."""
    how = fields.pop("sampling", None)
    message = Generate(
        request_id="r",
        token_ids=[1],
        max_tokens=99,
        sampling=how,
        stop_token_ids=stops,
        grammar=grammar,
        **fields,
    )
    request = Request(message, arrived=0.0)
    grammars.constrain(request)
    assert isinstance(request.constraint, Constraint)
    return request


def allowed(grammars: Grammars, request: Request, vocab: int) -> set[int]:
    """The tokens that may come next. It must not have failed."""
    masks, failed = grammars.masks([request])
    assert not failed, failed
    row = masks[0].tolist()
    return {token for token in range(vocab) if row[token // 8] >> token % 8 & 1}


def instances(schema: dict[str, Any]) -> list[Any]:
    """All values of a schema that has few: of enum, const, boolean, small ranges of integers, and what is made of
    them. Objects have their properties in the order of the schema."""
    if "enum" in schema:
        return list(schema["enum"])
    if "const" in schema:
        return [schema["const"]]
    if "anyOf" in schema:
        return [value for one in schema["anyOf"] for value in instances(one)]
    match schema["type"]:
        case "boolean":
            return [False, True]
        case "null":
            return [None]
        case "integer":
            return list(range(schema["minimum"], schema["maximum"] + 1))
        case "array":
            items = instances(schema["items"])
            lengths = range(schema.get("minItems", 0), schema["maxItems"] + 1)
            return [list(values) for n in lengths for values in itertools.product(items, repeat=n)]
    options: list[list[Any]] = []
    for name, one in schema["properties"].items():
        values: list[Any] = [(name, value) for value in instances(one)]
        options.append(values if name in schema["required"] else [None, *values])
    return [dict(pair for pair in pairs if pair is not None) for pairs in itertools.product(*options)]


_NAMES = st.sampled_from(["a", "b", "abc", "true", "é", 'q"', "x\ny", ""])
_SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda values: {"enum": values}, st.lists(_NAMES, min_size=1, max_size=3, unique=True)),
    st.builds(lambda value: {"const": value}, st.sampled_from(["", "abc", 12, -3, 0.5, True, None])),
    st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n},
        st.integers(-12, 120),
        st.integers(0, 3),
    ),
)


def _objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(_NAMES, children, max_size=3)
    return properties.flatmap(
        lambda p: st.builds(
            lambda required: {
                "type": "object",
                "properties": p,
                "required": required,
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(sorted(p)), unique=True) if p else st.just([]),
        )
    )


FINITE = st.recursive(
    _SCALARS,
    lambda children: st.one_of(
        _objects(children),
        st.builds(lambda one, n: {"type": "array", "items": one, "maxItems": n}, children, st.integers(0, 2)),
        st.builds(lambda some: {"anyOf": some}, st.lists(children, min_size=1, max_size=3)),
    ),
    max_leaves=4,
)
"""Schemas whose values `instances` lists."""
