"""Text that arrives in pieces is the text decoded whole, and nothing is shown that a stop string takes back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from eyas.decode.text import TextStream
from tests.tiny import byte_tokenizer
from tests.tiny_tokenizers import BYTES, every_kind, sentencepiece, unigram

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


def whole(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def ids(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


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


@pytest.mark.parametrize("draw", [unicode_ids, any_ids])
def test_pieces_are_the_text_decoded_whole(draw):
    rng = random.Random(0)
    for _ in range(600):
        tokens = draw(rng)
        pieces, stream = streamed(tokens)
        assert "".join(pieces) == whole(TOKENIZER, tokens) == stream.text == stream.finish()
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
        expected = whole(TOKENIZER, tokens)
        for count in range(1, len(tokens) + 1):  # the token that completes a stop ends the text, at the first stop's beginning
            text = whole(TOKENIZER, tokens[:count])
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


# ---- every kind of tokenizer ----

KINDS = {**every_kind(), "python": ByT5Tokenizer()}  # the last has no tokenizer.json: nothing is known about its decoder


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    """Any ids, unknown and special ones too; where characters are spelled in bytes, whole and broken ones in a row."""
    tokenizer = KINDS[name]
    known = [index for index in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(index) not in BYTES]
    one = st.sampled_from(known).map(lambda index: [index])
    some = [one, one, st.integers(0, len(tokenizer) + (2 if name != "python" else -1)).map(lambda index: [index])]
    if BYTES[0] in tokenizer.get_vocab():
        characters = [[tokenizer.convert_tokens_to_ids(BYTES[value]) for value in text.encode()] for text in ("🦅", "é", " ", "x")]
        broken = st.tuples(st.sampled_from(characters), st.integers(1, 3)).map(lambda pair: pair[0][: pair[1]])
        some += [st.sampled_from(characters), broken]
    return st.lists(st.one_of(some), max_size=9).map(lambda parts: [index for part in parts for index in part])


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_pieces_are_the_text_decoded_whole_whatever_the_tokenizer(name, data):
    tokens = data.draw(ids_of(name))
    chunks = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    stream, pieces = TextStream(KINDS[name]), []
    for token, read in zip(tokens, chunks, strict=True):
        stream.push(token)
        if read:
            pieces.append(stream.certain())
    assert stream.finish() == whole(KINDS[name], tokens)
    assert "".join([*pieces, stream.certain()]) == stream.text


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
def test_a_stop_string_is_found_in_exactly_that_text(name, data):
    tokens = data.draw(ids_of(name))
    texts = [whole(KINDS[name], tokens[:count]) for count in range(1, len(tokens) + 1)]
    stops = data.draw(st.lists(st.text("xa .,'nétm🦅", min_size=1, max_size=3), max_size=2))
    for text in (text for text in texts if text):
        begin = data.draw(st.integers(0, len(text) - 1))
        stops += [stop for stop in [text[begin : begin + data.draw(st.integers(1, 4))]] if "\ufffd" not in stop]
        break
    ended, expected = len(tokens), texts[-1] if texts else ""
    for count, text in enumerate(texts, start=1):
        if found := [text.find(stop) for stop in stops if stop in text]:
            ended, expected = count, text[: min(found)]
            break
    stream, pieces, pushed = TextStream(KINDS[name], stops), [], 0
    for token in tokens:
        pushed += 1
        if stream.push(token):
            break
        pieces.append(stream.certain())
    assert (pushed, stream.finish()) == (ended, expected)
    assert "".join([*pieces, stream.certain()]) == expected


@pytest.mark.parametrize("name", [name for name in KINDS if "suffixed" not in name and name != "python"])
def test_text_takes_time_in_proportion_to_its_length(name, monkeypatch):
    tokenizer, decoded = KINDS[name], []
    TextStream(tokenizer)  # what is learned of a tokenizer once is not counted
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **settings: decoded.append(len(tokens)) or decode(tokens, **settings))
    rng, vocab = random.Random(0), tokenizer.get_vocab()
    texts = [[rng.randrange(len(tokenizer)) for _ in range(600)]]
    if BYTES[0] in vocab:
        eagle = [vocab[BYTES[value]] for value in "🦅".encode()]
        texts += [eagle * 150, [*eagle, eagle[1]] * 120, [eagle[0]] * 600, [vocab["\ufffd"]] * 600]
    for tokens in texts:
        decoded.clear()
        stream = TextStream(tokenizer, ["never"])
        for token in tokens:
            stream.push(token)
            stream.certain()
        stream.finish()
        assert len(tokens) / 4 < sum(decoded) < 12 * len(tokens)


def test_a_character_behind_many_broken_bytes_is_whole():
    tokenizer = byte_tokenizer()
    eagle, (broken, *_) = tokenizer("🦅", add_special_tokens=False)["input_ids"], ids(tokenizer, "Ģ")
    for count in range(14):
        stream, tokens = TextStream(tokenizer), [broken] * count + eagle
        for token in tokens:
            stream.push(token)
        assert stream.finish() == whole(tokenizer, tokens) == "\ufffd" * count + "🦅"


def test_text_is_shown_as_soon_as_nothing_can_change_it():
    tokenizer, shown = sentencepiece(), []
    stream = TextStream(tokenizer)
    for token in tokenizer("x a 🦅🦅 x")["input_ids"]:
        stream.push(token)
        shown.append(stream.certain())
    assert [piece for piece in shown if piece] == ["x", " a", " ", "🦅🦅 x"], "bytes in a row are characters only if all of them are"


def test_bytes_that_are_no_characters_are_shown_at_once():
    tokenizer = sentencepiece()
    stream, shown = TextStream(tokenizer), []
    for token in ids(tokenizer, "x", "<0xF0>", "<0x9F>", "<0x41>", "<0x41>", "▁x"):
        stream.push(token)
        shown.append(stream.certain())
    assert shown == ["x", "", "", "\ufffd\ufffd\ufffd", "\ufffd", " x"]


def test_blanks_of_code_stay_where_a_bpe_asks_for_them_to_be_taken_out():
    tokenizer = byte_tokenizer(merges=[("Ġ", "'"), ("Ġ", "."), ("Ġ", "!")])
    tokenizer.clean_up_tokenization_spaces = True
    for text in ("if a == 'm': x = 's'", "x != y . z", "the long 'sword' in"):
        stream = TextStream(tokenizer)
        for token in tokenizer(text)["input_ids"]:
            stream.push(token)
        assert stream.finish() == text
    cleaned = TextStream(unigram(clean_up_tokenization_spaces=True))
    for token in unigram()("x . x n't")["input_ids"]:
        cleaned.push(token)
    assert cleaned.finish() == "x. xn't"


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "python"])
def test_a_stop_string_that_is_a_special_token_ends_the_text_where_it_comes(name):
    tokenizer = KINDS[name]
    end = tokenizer.convert_tokens_to_ids("</s>")
    tokens = [*tokenizer("a🦅", add_special_tokens=False)["input_ids"], end, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    stream = TextStream(tokenizer, ["zz", "</s>"])
    assert [stream.push(token) for token in tokens].index(True) == tokens.index(end)
    assert stream.finish() == stream.certain() == "a🦅" and stream.stopped


def test_a_stop_string_before_a_special_one_is_found_in_what_was_held_back():
    tokenizer = sentencepiece()
    stream = TextStream(tokenizer, ["🦅x", "</s>"])
    for token in ids(tokenizer, *(BYTES[value] for value in "a🦅x".encode()), "</s>"):
        if stream.push(token):
            break
    assert stream.finish() == "a"
