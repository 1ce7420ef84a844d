"""Masks against languages that are written out in full: what may come next is what leads to a text of the language."""

import itertools
import json
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import regex
import torch
from formats import FINITE, allowed, constrained, instances, small_tokenizer, token_bytes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.engine.grammars import Grammars
from server.text import grammar
from server.text.grammar import GrammarError

TOKENIZER = small_tokenizer("</think>", "<tool>")
BYTES = token_bytes(TOKENIZER)
VOCAB = TOKENIZER.get_vocab_size()
STOP = 0
CPU = torch.device("cpu")
FREE = '%llguidance {"no_forcing": true}\n'
"""Has the library take any tokens for a text that is the only one possible, not just those that the tokenizer makes."""

GRAMMARS = Grammars(small_tokenizer("</think>", "<tool>"), VOCAB, threads=1, device=CPU)


def walk(text, leads_on, complete, rng, steps=60):
    """Follow the grammar by tokens at random. At each step its mask is held against every token that leads on, told by
    `leads_on(bytes)`, and the end of the text, told by `complete(bytes)`. Returns the bytes, and whether they ended."""
    exact, forced = (constrained(GRAMMARS, start + text, [STOP]) for start in (FREE, ""))
    so_far = b""
    for _ in range(steps):
        expected = {token for token, piece in BYTES.items() if leads_on(so_far + piece)}
        if complete(so_far):
            expected.add(STOP)
        assert allowed(GRAMMARS, exact, VOCAB) == expected, so_far
        narrowed = allowed(GRAMMARS, forced, VOCAB)
        if narrowed != expected:
            # Only one text is possible here, and of its tokens the tokenizer's own first one is left.
            pieces = sorted((BYTES[token] for token in expected), key=len)
            assert all(longer.startswith(piece) for piece, longer in pairwise(pieces))
            assert len(narrowed) == 1 and narrowed < expected
        token = rng.choice(sorted(narrowed))
        if token == STOP:
            return so_far, True
        so_far += BYTES[token]
        for request in (exact, forced):
            assert request.constraint.advance(token) is None
            request.accepted += 1
    return so_far, False


def language(texts):
    """`leads_on` and `complete` of a language that has these texts."""
    encoded = {text.encode() for text in texts}
    starts = {text[:end] for text in encoded for end in range(len(text) + 1)}
    return starts.__contains__, encoded.__contains__


@settings(max_examples=60, deadline=None)
@given(FINITE, st.integers(0, 2**32))
def test_masks_of_a_schema_are_all_tokens_that_lead_to_a_value_of_it(schema, seed):
    values = instances(schema)
    assume(len(values) < 300)
    # The library writes what JSON's grammar leaves open as Python does without `ensure_ascii`.
    leads_on, complete = language(json.dumps(v, separators=(",", ":"), ensure_ascii=False) for v in values)
    text, ended = walk(grammar.json_schema(schema, compact=True), leads_on, complete, random.Random(seed))
    if ended:
        assert json.loads(text) in values


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text('abct{\n"é</', max_size=6), min_size=1, max_size=5), st.integers(0, 2**32))
def test_masks_of_a_choice(texts, seed):
    text, ended = walk(grammar.choice(texts), *language(texts), random.Random(seed))
    assert ended and text.decode() in texts


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{1,3}(\.[0-9]+)?", r"(ab|abc)*\n{2}", r"tr(ue)?|false", r"[^a-z]{2}x?", r"\w+/é"]
)
def test_masks_of_a_regex(pattern):
    compiled = regex.compile(pattern)

    def leads_on(data):
        text = data.decode(errors="ignore")  # the bytes of a character that has begun are looked at below
        if text.encode() == data:
            return compiled.fullmatch(text, partial=True) is not None
        return any(
            compiled.fullmatch((data[: len(text.encode())]).decode() + chr(c), partial=True)
            for c in range(128, 0x250)
            if chr(c).encode().startswith(data[len(text.encode()) :])
        )

    def complete(data):
        text = data.decode(errors="ignore")
        return text.encode() == data and compiled.fullmatch(text) is not None

    # Letters beyond those that `leads_on` tries are left out: the walk is of this small alphabet.
    for seed in range(5):
        rng = random.Random(seed)
        request = constrained(GRAMMARS, FREE + grammar.regex(pattern), [STOP])
        so_far = b""
        for _ in range(12):
            mask = allowed(GRAMMARS, request, VOCAB)
            small = {t for t, piece in BYTES.items() if max(piece) < 128 or piece == "é".encode()}
            expected = {t for t in small if leads_on(so_far + BYTES[t])}
            assert mask & small == expected and (STOP in mask) == complete(so_far), so_far
            assert mask - small - {STOP} <= {t for t, piece in BYTES.items() if max(piece) >= 128}
            if not expected:
                break
            token = rng.choice(sorted(expected))
            so_far += BYTES[token]
            assert request.constraint.advance(token) is None


def test_whitespace_in_json_is_bounded():
    request = constrained(GRAMMARS, grammar.json_object(), [STOP])
    ids = {piece: token for token, piece in BYTES.items()}
    for piece in b'{ "a" :  1 ,\n    "b": {}}':
        assert request.constraint.advance(ids[bytes([piece])]) is None, chr(piece)
    request = constrained(GRAMMARS, grammar.json_object(), [STOP])
    assert request.constraint.advance(ids[b"{"]) is None
    count = 0
    while ids[b" "] in allowed(GRAMMARS, request, VOCAB):
        assert request.constraint.advance(ids[b" "]) is None
        count += 1
    assert count == 2


def test_before_min_tokens_nothing_ends_unless_nothing_else_may_come():
    request = constrained(GRAMMARS, FREE + grammar.regex("a{1,3}"), [STOP], min_tokens=2)
    a = TOKENIZER.token_to_id("a")
    for expected in ({a}, {a}, {a, STOP}, {STOP}):
        assert allowed(GRAMMARS, request, VOCAB) == expected
        request.constraint.advance(a)
        request.accepted += 1
    over = constrained(GRAMMARS, grammar.choice(["a"]), [STOP], min_tokens=9)
    over.constraint.advance(a)
    over.accepted = 1
    assert allowed(GRAMMARS, over, VOCAB) == {STOP}


def test_a_stop_token_that_is_text_ends_no_text_in_its_midst_unless_it_must():
    a, b = (TOKENIZER.token_to_id(c) for c in "ab")
    request = constrained(GRAMMARS, FREE + grammar.regex("b[ab]aa?"), [a])
    for expected in ({b}, {b}, {a}):
        assert allowed(GRAMMARS, request, VOCAB) == expected
        assert request.constraint.advance(b if b in expected else a) is None
    assert allowed(GRAMMARS, request, VOCAB) == {a}, "as the end, or as text: either ends it"


def test_without_a_stop_token_the_end_of_a_grammar_is_an_error_of_its_request():
    over, going_on = (constrained(GRAMMARS, grammar.choice([text]), []) for text in ("a", "ab"))
    for request in (over, going_on):
        request.constraint.advance(TOKENIZER.token_to_id("a"))
    masks, failed = GRAMMARS.masks([over, going_on])
    assert list(failed) == [over] and "none of the model's tokens" in failed[over]
    assert masks[0].eq(255).all() and not masks[1].eq(255).all()


def test_a_token_that_the_grammar_has_not_allowed_is_an_error():
    request = constrained(GRAMMARS, grammar.choice(["abc"]), [STOP])
    assert "no token is left" in request.constraint.advance(TOKENIZER.token_to_id("x"))
    _, failed = GRAMMARS.masks([request])
    assert list(failed) == [request] and "\n" not in failed[request]


def test_requests_that_have_ended_are_left_alone():
    ended, going_on = (constrained(GRAMMARS, grammar.choice(["abc"]), [STOP]) for _ in range(2))
    ended.finish_reason = "stop"
    masks, failed = GRAMMARS.masks([ended, going_on])
    assert not failed and masks[0].eq(255).all()
    assert masks[1].equal(GRAMMARS.masks([going_on])[0][0])


def test_requests_take_lanes_in_turn_each_with_a_grammar_of_its_own():
    threaded = Grammars(small_tokenizer(), VOCAB, threads=3, device=CPU)
    requests = [constrained(threaded, grammar.choice(["abc"]), [STOP]) for _ in range(7)]
    assert [request.constraint.lane for request in requests] == [0, 1, 2, 3, 4, 5, 0]
    assert (
        threaded._compiled.keys() == {grammar.choice(["abc"])}
        and len(threaded._compiled[grammar.choice(["abc"])].lanes) == 6
    )


def test_masks_are_the_same_by_threads():
    threaded = Grammars(small_tokenizer("</think>", "<tool>"), VOCAB, threads=3, device=CPU)
    texts = [grammar.json_object(), grammar.choice(["abc", "true"]), grammar.regex("[0-9]+")]
    one, several = ([constrained(g, text, [STOP]) for text in texts * 3] for g in (GRAMMARS, threaded))
    assert threaded.masks(several)[0].equal(GRAMMARS.masks(one)[0])


@pytest.mark.parametrize("vocab", [VOCAB - 5, VOCAB, VOCAB + 1, VOCAB + 41])
def test_the_model_may_have_fewer_or_more_tokens_than_the_tokenizer(vocab):
    grammars = Grammars(small_tokenizer("</think>", "<tool>"), vocab, threads=1, device=CPU)
    request = constrained(grammars, FREE + grammar.regex("(.|\n)*"), [STOP])
    mask = allowed(grammars, request, 8 * grammars._row_bytes)
    # A token that begins a character in its midst is none that can begin a text.
    assert mask == {
        t for t, piece in BYTES.items() if t < vocab and not 0x80 <= piece[0] < 0xC2 and piece[0] < 0xF5
    } | {STOP}


def test_a_grammar_that_no_token_can_spell_is_refused():
    few = Grammars(small_tokenizer(), 40, threads=1, device=CPU)  # the model has the first 40 tokens only
    with pytest.raises(GrammarError, match="none of the model's tokens can begin it"):
        constrained(few, grammar.choice(["zzz"]), [STOP])
    request = constrained(few, grammar.choice(["!z"]), [STOP])
    request.constraint.advance(TOKENIZER.token_to_id("!"))
    _, failed = few.masks([request])
    assert "none of the model's tokens can go on" in failed[request]


def test_what_the_library_refuses_is_an_error_with_its_reason():
    with pytest.raises(GrammarError, match="unknown name"):
        constrained(GRAMMARS, "start: nobody", [STOP])
    with pytest.raises(GrammarError, match="nobody"):
        constrained(GRAMMARS, "start: <nobody>", [STOP])


@pytest.mark.parametrize("text", ["start: start", grammar.json_schema({"$ref": "#"})], ids=["rule", "schema"])
def test_a_grammar_that_fails_at_its_first_token_is_refused_and_not_kept(text):
    grammars = Grammars(small_tokenizer(), VOCAB, threads=1, device=CPU)
    with pytest.raises(GrammarError, match="no text of it can be begun: NoExtensionBias$"):
        constrained(grammars, text, [STOP])
    assert not grammars._compiled


def test_compiled_grammars_are_kept_and_requests_go_their_own_ways():
    grammars = Grammars(small_tokenizer(), VOCAB, threads=1, device=CPU)
    text = grammar.choice(["abc", "12"])
    first, second = (constrained(grammars, text, [STOP]) for _ in range(2))
    assert len(grammars._compiled[text].lanes) == 1
    fresh = allowed(grammars, second, VOCAB)
    first.constraint.advance(TOKENIZER.token_to_id("12"))
    assert allowed(grammars, first, VOCAB) == {STOP} and allowed(grammars, second, VOCAB) == fresh
    for number in range(100):
        constrained(grammars, grammar.choice([str(number)]), [STOP])
    assert len(grammars._compiled) == 64 and text not in grammars._compiled


@pytest.mark.parametrize("threads", [1, 3])
def test_a_grammar_whose_masks_hold_up_everybody_is_given_up(monkeypatch, threads):
    """By a clock that a slow mask moves on by 0.3 s: the fourth one is more than may be waited for."""
    grammars = Grammars(small_tokenizer(), VOCAB, threads=threads, device=CPU)
    slow, quick = (constrained(grammars, grammar.regex(f"[{letters}]+"), [STOP]) for letters in ("ab", "12"))
    now = 0.0

    class SlowMatcher:
        def __init__(self, matcher):
            self._matcher = matcher

        def __getattr__(self, name):
            return getattr(self._matcher, name)

        def unsafe_compute_mask_ptr(self, *where):
            nonlocal now
            now += 0.3
            self._matcher.unsafe_compute_mask_ptr(*where)

    slow.constraint.matcher = SlowMatcher(slow.constraint.matcher)
    monkeypatch.setattr("server.engine.grammars.time", SimpleNamespace(thread_time=lambda: now))
    grammars._one_by_one = threads > 1  # as masks made together have it that took long
    assert [set(grammars.masks([slow, quick])[1]) for _ in range(4)] == [set(), set(), set(), {slow}]
    assert not grammars.masks([quick])[1]
    with pytest.raises(GrammarError, match="300 ms"):
        constrained(grammars, grammar.regex("[ab]+"), [STOP])


def test_masks_made_together_that_take_long_are_timed_one_by_one_next(monkeypatch):
    grammars = Grammars(small_tokenizer(), VOCAB, threads=2, device=CPU)
    requests = [constrained(grammars, grammar.choice(["abc"]), [STOP]) for _ in range(2)]
    clock = iter([0.0, 0.01, 1.0, 2.0])
    times = SimpleNamespace(monotonic=lambda: next(clock), thread_time=lambda: 0.0)
    monkeypatch.setattr("server.engine.grammars.time", times)
    looked = []
    for _ in range(3):
        grammars.masks(requests)
        looked.append(grammars._one_by_one)
    assert looked == [False, True, False]


def test_a_grammar_that_takes_long_to_compile_has_one_lane(monkeypatch):
    grammars = Grammars(small_tokenizer(), VOCAB, threads=2, device=CPU)
    ticks = itertools.count()
    monkeypatch.setattr(
        "server.engine.grammars.time", SimpleNamespace(thread_time=lambda: float(next(ticks)))
    )
    lanes = [constrained(grammars, grammar.choice(["abc"]), [STOP]).constraint.lane for _ in range(4)]
    assert lanes == [0, 0, 0, 0]
