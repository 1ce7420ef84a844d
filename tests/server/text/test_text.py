"""Text that comes in pieces is the text that comes at once: detokenising and stop strings."""

import itertools
from pathlib import Path

import pytest
from checkpoints import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.text.detokenizer import Detokenizer, StopMatcher, TokenTexts

TOKENIZER = byte_tokenizer()
TEXTS = TokenTexts(TOKENIZER)

ALPHABET = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from("aé漢字か゚한글👩‍👩‍👧‍👦🇩🇪e\u0301\u200d\ufeff\ufffd\x00\n "),
)
TEXT = st.text(ALPHABET, max_size=40)


def pieces(ids, *, skip=True):
    detokenizer = Detokenizer(TEXTS, skip_special_tokens=skip)
    return [detokenizer.add(i) for i in ids], detokenizer.flush()


@given(TEXT)
def test_pieces_of_valid_text_are_the_text_and_never_half_a_character(text):
    ids = TOKENIZER.encode(text).ids
    assert len(ids) == len(text.encode())
    parts, rest = pieces(ids)
    assert "".join(parts) + rest == text
    if "\ufffd" not in text:
        assert rest == ""
        assert not any("\ufffd" in part for part in parts)


@given(TEXT, st.integers(0, 200))
def test_text_cut_inside_a_character_ends_in_replacement_characters(text, cut):
    data = text.encode()[:cut]
    parts, rest = pieces(TOKENIZER.encode(text).ids[:cut])
    assert "".join(parts) + rest == data.decode(errors="replace")


@given(st.lists(st.integers(0, 256), max_size=60), st.booleans())
def test_pieces_of_any_tokens_are_their_decoding(ids, skip):
    parts, rest = pieces(ids, skip=skip)
    assert "".join(parts) + rest == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(st.binary(max_size=60))
def test_pieces_of_any_bytes_are_their_decoding(data):
    alphabet = {bytes([b]): TOKENIZER.token_to_id(c) for b, c in byte_alphabet().items()}
    parts, rest = pieces([alphabet[bytes([b])] for b in data])
    assert "".join(parts) + rest == data.decode(errors="replace")


def byte_alphabet():
    """GPT-2's printable stand-in of each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(other)}


def test_each_ascii_token_is_a_piece_of_its_own():
    parts, rest = pieces(TOKENIZER.encode("abc").ids)
    assert (parts, rest) == (["a", "b", "c"], "")


def test_special_tokens_are_left_out_unless_asked_for():
    ids = [*TOKENIZER.encode("a").ids, 0, *TOKENIZER.encode("b").ids]
    assert pieces(ids) == (["a", "", "b"], "")
    assert pieces(ids, skip=False) == (["a", "<|endoftext|>", "b"], "")


def test_flush_is_empty_the_second_time():
    detokenizer = Detokenizer(TEXTS, skip_special_tokens=True)
    assert detokenizer.add(TOKENIZER.encode("é").ids[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def llama_tokenizer():
    """As Llama's and Mistral's: words behind a lower block, bytes for what has no token, one leading space cut off."""
    words = ["\u2581", "\u2581a", "b", "\u2581\u2581", "é", "\n"]
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{b:02X}>": b + 2 for b in range(256)}
    vocab |= {word: 258 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


LLAMA = llama_tokenizer()
LLAMA_TEXTS = TokenTexts(LLAMA)


WORDS = st.integers(258, 263).map(lambda i: [i])


def llama_pieces(ids, skip=True):
    detokenizer = Detokenizer(LLAMA_TEXTS, skip_special_tokens=skip)
    return [detokenizer.add(i) for i in ids], detokenizer.flush()


@given(st.lists(st.one_of(WORDS, st.just([1]), TEXT.map(lambda t: [b + 2 for b in t.encode()])), max_size=25))
def test_pieces_with_byte_fallback_are_the_decoding(items):
    ids = [i for item in items for i in item]
    parts, rest = llama_pieces(ids)
    text = "".join(parts) + rest
    assert text == LLAMA.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.lists(st.one_of(st.integers(0, 263), st.integers(130, 257)), max_size=25), st.booleans())
def test_no_bytes_break_the_stream(ids, skip):
    # Byte fallback replaces a whole run for one bad byte in it, also what has been shown by then.
    parts, rest = llama_pieces([*ids, 258, 260], skip)
    assert parts[-1] == "b" and rest == ""


class NonePlain(TokenTexts):
    """Nothing is known of any token: every one goes through the window."""

    def decode_plain(self, token_id):
        return ""


DEMO = Tokenizer.from_file(str(Path(__file__).parents[3] / "demo" / "model" / "tokenizer.json"))
PLAIN_ONES = [
    pytest.param(TokenTexts(tokenizer), NonePlain(tokenizer), id=name)
    for name, tokenizer in (("demo", DEMO), ("bytes", TOKENIZER), ("llama", LLAMA))
]


@pytest.mark.parametrize(("known", "unknown"), PLAIN_ONES)
@given(st.data())
def test_what_is_known_of_a_token_is_what_the_window_says(known, unknown, data):
    size = known.tokenizer.get_vocab_size()
    ids = st.integers(0, size - 1)
    words = st.sampled_from(["the", "é", "漢字", "👩\u200d👩\u200d👧", "▁", "a", "", "b\n"]).map(
        lambda t: known.tokenizer.encode(t).ids
    )
    chosen = [
        i for some in data.draw(st.lists(st.one_of(ids.map(lambda i: [i]), words), max_size=60)) for i in some
    ]
    for skip in (True, False):
        a = Detokenizer(known, skip_special_tokens=skip)
        b = Detokenizer(unknown, skip_special_tokens=skip)
        assert [a.add(i) for i in chosen] == [b.add(i) for i in chosen]
        assert a.flush() == b.flush()


def test_most_tokens_are_known_where_the_decoder_looks_at_one_at_a_time():
    assert sum(bool(PLAIN_ONES[0].values[0].plain[i]) for i in range(DEMO.get_vocab_size())) > 3000
    assert [TokenTexts(LLAMA).plain[i] for i in (2 + ord("A"), 258, 259, 262)] == ["", " ", " a", "é"]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(suffix="</w>"),  # the last token of a text has no space behind it
        decoders.CTC(),  # of equal neighbours one is kept
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_nothing_is_known_where_a_decoder_looks_at_neighbours(decoder):
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoder
    assert {TokenTexts(tokenizer).plain[i] for i in range(tokenizer.get_vocab_size())} == {""}


def naive_stop(text, stops):
    """The text before the stop string that is complete first; of two complete at once, before the longer one."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return None


def matched(parts, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for part in parts:
        shown += matcher.add(part)
        if matcher.matched:
            return shown
    return None


SMALL = st.text("ab.", max_size=14)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4)


@given(SMALL, STOPS, st.lists(st.integers(0, 14), max_size=6))
def test_stops_are_found_as_naive_search_does_under_every_split(text, stops, cuts):
    cuts = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
    expected = naive_stop(text, stops)
    assert matched(parts, stops) == expected
    assert matched([text], stops) == expected
    assert matched(list(text), stops) == expected


@given(SMALL, STOPS)
def test_nothing_is_lost_and_nothing_of_a_stop_is_shown_early(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for c in text:
        shown += matcher.add(c)
        if matcher.matched:
            assert matcher.flush() == ""
            return
        held = matcher.flush()
        matcher._held = held
        assert shown + held == text[: len(shown + held)]
        # Exactly what may begin a stop is held back: no more, no less.
        seen = shown + held
        longest = max(
            (n for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])), default=0
        )
        assert len(held) == longest
    assert shown + matcher.flush() == text
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("parts", "stops", "shown"),
    [
        (["one\n", "\ntwo"], ["\n\n"], "one"),
        (["abc"], ["c", "b"], "a"),
        (["ab", "c", "d"], ["bcd", "c"], "ab"),
        (["abcd"], ["bcd", "c"], "ab"),
        (["abc"], ["bc", "c"], "a"),
        (["aab", "aabaac"], ["aabaac"], "aab"),
        (["x👩", "‍👧y"], ["👩‍👧"], "x"),
    ],
)
def test_overlapping_stops(parts, stops, shown):
    assert matched(parts, stops) == shown


def test_what_one_stop_holds_back_is_not_looked_through_for_the_others(monkeypatch):
    looked = []
    overlap = StopMatcher._overlap
    monkeypatch.setattr(
        StopMatcher, "_overlap", staticmethod(lambda text, stop: looked.append(text) or overlap(text, stop))
    )
    matcher = StopMatcher(["a" * 999 + "b", *(c * 1000 for c in "cdefghijklmnop")])
    assert matcher.add("a" * 900) == ""
    looked.clear()
    for _ in range(50):
        assert matcher.add("a") == ""
    assert sum(map(len, looked)) == sum(901 + i + 14 for i in range(50))
    assert matcher.add("c") == "a" * 950
