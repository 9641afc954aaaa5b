"""Claims about the tokenizer rebuilt from a GGUF: that of the embedded target is llama.cpp's, the other kinds are transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eyas.config import EyasError
from eyas.files.gguf_tokenizer import SPECIAL, USER_DEFINED, tokenizer_from_gguf
from tests.tiny import CHATML, byte_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm_tokens.json"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "' s", "Ġ Ġ", "Ċ Ċ", "Ã ©"]
EXTRA = [("<|im_start|>", SPECIAL), ("<|im_end|>", SPECIAL), ("<think>", USER_DEFINED)]


def fields(pre="smollm", merges=MERGES, words=(), **changes):
    """What a GGUF with byte-level tokens, `merges`, whole `words` and EXTRA says about its tokenizer."""
    bytes_ = list(byte_tokenizer().get_vocab())
    plain = [token for token in bytes_ if not token.startswith("<") or token == "<"]
    tokens = [*plain, *(merge.replace(" ", "") for merge in merges), *words, *(token for token, _ in EXTRA)]
    kinds = [1] * (len(tokens) - len(EXTRA)) + [kind for _, kind in EXTRA]
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHATML,
    } | changes


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.real
def test_a_thousand_strings_get_llama_cpps_ids(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    cases = json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 1000
    found = tokenizer([text for text, _ in cases], add_special_tokens=False)["input_ids"]
    assert [(text, ids) for (text, wanted), ids in zip(cases, found) if ids != wanted] == []


@pytest.mark.real
def test_decoding_gives_every_string_back(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    for text, ids in json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]:
        assert tokenizer.decode(ids) == text


@pytest.mark.real
def test_the_embedded_chat_template_ends_turns_with_its_end_token(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id in ids


@pytest.mark.parametrize(
    ("pre", "cut"),
    [("smollm", ["1", "2", "3"]), ("qwen2", ["1", "2", "3"]), ("gpt-2", ["123"]), ("default", ["123"]), ("llama-bpe", ["123"])],
)
def test_each_pre_tokenizer_cuts_digits_and_words_as_its_model_does(pre, cut):
    tokenizer = tokenizer_from_gguf(fields(pre))
    assert pieces(tokenizer, "hello hello's123") == ["hello", "Ġhello", "'s", *cut]


def test_qwen2_is_transformers_own_tokenizer():
    from transformers import Qwen2Tokenizer

    described = fields("qwen2")
    vocab = {token: index for index, token in enumerate(described["tokenizer.ggml.tokens"])}
    own = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES], unk_token=None, eos_token=None, pad_token=None)
    rebuilt = tokenizer_from_gguf(described)
    for text in ["e\u0301", "\u00e9", "hello\n\n  hello 's", "x\r\n\r\n1234", "ka\u3099", "Å"]:
        assert pieces(rebuilt, text) == pieces(own, text), ascii(text)


def test_llama_3_takes_a_word_of_the_vocabulary_whole_without_merges_to_it():
    assert pieces(tokenizer_from_gguf(fields("llama-bpe", words=["Ġworld"])), "hello world") == ["hello", "Ġworld"]
    assert pieces(tokenizer_from_gguf(fields("gpt-2", words=["Ġworld"])), " world")[0] == "Ġ"


def test_special_tokens_are_skipped_in_text_and_user_defined_ones_are_not():
    tokenizer = tokenizer_from_gguf(fields())
    ids = tokenizer("<|im_start|><think>hello<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "<think>", "hello", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>hello"


def test_ids_names_template_and_length_survive_saving(tmp_path):
    described = fields()
    tokenizer_from_gguf(described).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == described["tokenizer.ggml.tokens"]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.model_max_length) == ("<|im_end|>", None, 128)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "'martian' is unknown .*smollm"),
        ({"tokenizer.ggml.model": "llama"}, "'llama' is not byte-level BPE"),
    ],
)
def test_what_cannot_be_rebuilt_says_so_in_one_line(changes, reason):
    with pytest.raises(EyasError, match=reason) as caught:
        tokenizer_from_gguf(fields(**changes))
    assert "\n" not in str(caught.value)
