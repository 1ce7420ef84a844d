"""Recall of identifiers of real text: which ones count, what they score, and where the figures go."""

import keyword
import random

import pytest

from modeling.checkpoint import open_checkpoint
from pruning.calibration import Encoder, Text
from pruning.evaluation.identifiers import (
    find_identifiers,
    occurrences,
    ranges,
)
from pruning.evaluation.windows import evaluation_windows

WORDS = ["alpha_one", "Beta2", "_private", "x1", "continue", "naïveté", "été", "value"]
BETWEEN = [" ", "(", ".", "\n    ", " = ", " → ", "漢"]


def documents(count, words, seed=0):
    draw = random.Random(seed)
    return [
        "".join(draw.choice(WORDS) + draw.choice(BETWEEN) for _ in range(words + 5 * i)) for i in range(count)
    ]


TEXT = Text("words", documents(5, 60))


@pytest.fixture(scope="module")
def checkpoint(dense):
    return open_checkpoint(dense)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder(checkpoint)


def test_identifiers_are_whole_words_of_several_tokens_that_can_be_scored_alone():
    parts = [
        "x",
        " =",
        " foo",
        "_bar",
        ".ba",
        "zaar",
        "(__",
        "init",
        "__)",
        " whi",
        "le",
        " naï",
        "ve",
        " ab",
        "c",
    ]
    parts += [" foo", "_bar", "  qu", "xxx", " 9li", "ves", " tail", "s\n", " lone", "\n", "foo", "_bar"]
    document, at, offsets = "".join(parts), 0, []
    for part in parts:
        offsets.append((at, at + len(part)))
        at += len(part)
    found = list(occurrences(document, offsets))
    # Left out: a keyword, a word that is not ASCII, one of three characters, one of a single token, one with two
    # characters before it in its first token, a number's end, and those whose last token goes on.
    assert [(o.name, o.first, o.last, o.previous) for o in found] == [
        ("foo_bar", 2, 3, None),
        ("bazaar", 4, 5, None),
        ("foo_bar", 15, 16, 2),
        ("foo_bar", 25, 26, 15),
    ]
    assert [document[o.begin : o.end] for o in found] == [" foo_bar", ".bazaar", " foo_bar", "foo_bar"]
    assert not any(keyword.iskeyword(o.name) for o in found)


def test_an_occurrence_that_is_not_scored_is_the_previous_one_all_the_same():
    document = "name_x name_x( name_x"
    whole = [(0, 4), (4, 6), (6, 11), (11, 14), (14, 19), (19, 21)]
    assert [(o.first, o.previous) for o in occurrences(document, whole)] == [(0, None), (4, 2)]


def test_characters_of_several_tokens_are_no_obstacle(encoder):
    document = "é漢 count_é counter é漢\n(counter"
    ids, offsets = encoder.with_offsets(document)
    assert ids == encoder(document)
    first, second = occurrences(document, offsets)
    start = len(encoder.separator)
    at = document.index(" counter") + 1
    assert first.first == start + len(document[:at].encode())
    assert first.last - first.first + 1 == len("counter")
    assert second.previous == first.first
    assert second.first == start + len(document[: document.rindex("counter")].encode())
    assert list(occurrences("", [])) == []
    assert list(occurrences("dropped_by_the_tokenizer", [])) == []


def test_ranges_are_those_that_the_window_has_room_for():
    assert ranges(64) == []
    assert ranges(65) == [(64, 65)]
    assert ranges(512) == [(64, 256), (256, 512)]
    assert ranges(1025) == [(64, 256), (256, 1024), (1024, 1025)]
    assert ranges(4096) == ranges(10**6) == [(64, 256), (256, 1024), (1024, 4096)]


def naive(documents, count, window, stride):
    """(row, column, tokens, distance) of all that counts, by looking at every token of every window."""
    stream, starts = [], []
    for document in documents:
        stream.append((len(starts), -1))
        stream += [(len(starts), i) for i in range(len(document.encode()))]
        starts.append(words_by_byte(document))
    found = []
    for row in range(count):
        cut = stream[row * stride : row * stride + window + 1]
        for at in range(window - stride + 1, window + 1):
            document, byte = cut[at]
            name = starts[document].get(byte)
            if name is None or at + len(name) - 1 > window:
                continue
            for before in range(at - 1, -1, -1):
                if cut[before][0] == document and starts[document].get(cut[before][1]) == name:
                    if 64 <= at - before < 4096:
                        found.append((row, at - (window - stride) - 1, len(name), at - before))
                    break
    return found


def words_by_byte(document):
    """Where identifiers begin, in bytes, by a scan of the characters."""
    found, word, begin, byte = {}, "", 0, 0
    for character in document + " ":
        if character.isalnum() or character == "_":
            begin = begin if word else byte
            word += character
        else:
            if len(word) >= 4 and word.isascii() and not word[0].isdigit() and word != "continue":
                found[begin] = word
            word = ""
        byte += len(character.encode())
    return found


@pytest.mark.parametrize(
    ("window", "stride", "least"),
    [(300, None, 25), (300, 110, 25), (2000, None, 25), (96, 50, 3), (99, 1, 0)],
)
def test_found_are_those_of_a_search_through_every_window(encoder, window, stride, least):
    windows = evaluation_windows(encoder, TEXT, window=window, stride=stride)
    found = find_identifiers(encoder, TEXT, windows, stride=stride)
    expected = naive(TEXT.documents, len(windows), window, stride or window)
    columns = (found.rows, found.columns, found.tokens, found.distances)
    assert sorted(zip(*(c.tolist() for c in columns), strict=True)) == sorted(expected)
    assert found.window == window and len(expected) >= least
    stop = find_identifiers(encoder, TEXT, windows[:1], stride=stride)
    assert len(stop.rows) == sum(row == 0 for row, *_ in expected)


def test_documents_of_a_window_do_not_see_each_other(encoder):
    filler = "; " * 50
    apart = Text("apart", ["some_name" + filler, filler + "some_name", filler])
    joined = Text("joined", ["some_name" + filler + filler + "some_name", filler])
    for text, count in ((apart, 0), (joined, 1)):
        windows = evaluation_windows(encoder, text, window=300)
        assert windows.shape == (1, 301)
        assert len(find_identifiers(encoder, text, windows).rows) == count


def test_an_occurrence_before_the_window_is_forgotten(encoder):
    text = Text("name", ["some_name" + "; " * 50 + "some_name" + "." * 200])
    whole = evaluation_windows(encoder, text, window=200)
    assert find_identifiers(encoder, text, whole).distances.tolist() == [109]
    # Its first token is the separator's successor: one token later, the first occurrence is cut.
    assert len(find_identifiers(encoder, text, evaluation_windows(encoder, text, window=118)).rows) == 1
    assert len(find_identifiers(encoder, text, evaluation_windows(encoder, text, window=117)).rows) == 0
    later = evaluation_windows(encoder, text, window=150, stride=2)
    found = find_identifiers(encoder, text, later, stride=2)
    assert len(found.rows) == 0  # nothing but the last two targets of each window is scored, and it has nine
