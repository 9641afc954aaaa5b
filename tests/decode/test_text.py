"""Text that arrives in pieces is the text decoded whole, and nothing is shown that a stop string takes back."""

from __future__ import annotations

import random

import pytest

from eyas.decode.text import TextStream
from tests.tiny import byte_tokenizer

# merges that join whole characters, halves of two characters, and letters
MERGES = [("Ã", "©"), ("©", "a"), ("â", "Ĥ"), ("¬", "Ã"), ("a", "b"), ("ab", "a"), ("Ġ", "b")]
TOKENIZER = byte_tokenizer(merges=MERGES)
PIECES = ["a", "b", " ", ".", "é", "€", "🦅", "中", "\n", "ab", " ,", "n't", "\u0301", "\u200d", "ß", "\ufffd"]


def unicode_ids(rng: random.Random) -> list[int]:
    """Tokens of a random text, cut at any byte or joined across characters."""
    return TOKENIZER("".join(rng.choices(PIECES, k=rng.randint(1, 15))), add_special_tokens=False)["input_ids"]


def any_ids(rng: random.Random) -> list[int]:
    """Any tokens at all: mostly bytes that are no character, and special tokens."""
    return [rng.randrange(len(TOKENIZER)) for _ in range(rng.randint(1, 15))]


def streamed(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """What a reader is shown, token by token, and at the end."""
    stream = TextStream(TOKENIZER, stops)
    pieces = []
    for token in ids:
        stopped = stream.push(token)
        if stopped:
            break
        pieces.append(stream.certain())
    stream.finish()
    return [*pieces, stream.certain()], stream


@pytest.mark.parametrize("ids", [unicode_ids, any_ids])
def test_pieces_are_the_text_decoded_whole(ids):
    rng = random.Random(0)
    for _ in range(600):
        tokens = ids(rng)
        pieces, stream = streamed(tokens)
        assert "".join(pieces) == TOKENIZER.decode(tokens, skip_special_tokens=True) == stream.text == stream.finish()
        assert not stream.stopped


def test_no_half_character_is_shown():
    hawk = list("🦅".encode())
    assert [len(byte_tokenizer()("🦅", add_special_tokens=False)["input_ids"]), len(hawk)] == [4, 4]
    stream, shown = TextStream(byte_tokenizer()), []
    for token in byte_tokenizer()("a🦅é", add_special_tokens=False)["input_ids"]:
        stream.push(token)
        shown.append(stream.certain())
    assert shown == ["a", "", "", "", "🦅", "", "é"]


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_string_is_found_where_it_ends_and_nothing_of_it_is_ever_shown(seed):
    rng, stopped = random.Random(seed), 0
    for _ in range(300):
        tokens = TOKENIZER("".join(rng.choices(["a", "b", " ", "é", "🦅"], k=25)), add_special_tokens=False)["input_ids"]
        stops = tuple("".join(rng.choices(["a", "b", " ", "é"], k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3)))
        expected = TOKENIZER.decode(tokens)
        for count in range(1, len(tokens) + 1):  # the token that completes a stop ends the text, at the first stop's beginning
            text = TOKENIZER.decode(tokens[:count])
            if found := [text.find(stop) for stop in stops if stop in text]:
                expected = text[: min(found)]
                break
        pieces, stream = streamed(tokens, stops)
        assert stream.text == "".join(pieces) == expected
        assert stream.stopped == bool(found)
        assert all(expected.startswith("".join(pieces[:k])) for k in range(len(pieces)))
        stopped += stream.stopped
    assert 50 < stopped < 290


def test_what_was_held_back_for_a_stop_string_is_released_when_it_does_not_come():
    stream, shown = TextStream(byte_tokenizer(), ["STOP"]), []
    for token in byte_tokenizer()("aSTOaSTSTO", add_special_tokens=False)["input_ids"]:
        stream.push(token)
        shown.append(stream.certain())
    assert shown == ["a", "", "", "", "STOa", "", "", "ST", "", ""]
    assert stream.finish() == "aSTOaSTSTO"
    assert stream.certain() == "STO", "the text has ended: no stop string can come any more"
    assert stream.certain() == ""


def test_an_empty_stop_string_stops_nothing():
    assert streamed(unicode_ids(random.Random(1)), ("",))[1].stopped is False


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ["a"])
    assert [stream.push(1), stream.certain(), stream.finish()] == [False, "", ""]
