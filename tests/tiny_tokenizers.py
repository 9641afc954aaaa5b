"""Small tokenizers of every kind, made on the spot.

Knows how each kind spells a text, bytes and first words included; knows nothing of models.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL = ["<s>", "</s>", "<|end|>"]
WORDS = ["▁", "x", "▁x", "a", "▁a", "n", "▁n", "'", "▁'", "t", "'t", "m", ".", "▁.", "é", "▁🦅", "▁▁", "\ufffd"]


def sentencepiece(strip: bool = True, **settings) -> PreTrainedTokenizerFast:
    """BPE as Llama-2 and Mistral have it, or without `strip` as Gemma has it: blanks are ▁, unknown characters are bytes."""
    merges = [(left, right) for left, right in (("▁", "x"), ("▁", "a"), ("▁", "n"), ("▁", "'"), ("▁", "."), ("'", "t"), ("▁", "▁"))]
    vocab = {token: index for index, token in enumerate(["<unk>", *SPECIAL, *BYTES, *WORDS])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return wrapped(core, **settings)


def unigram(**settings) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), *((token, -1.0) for token in (*SPECIAL, *BYTES, *WORDS))], 0, byte_fallback=True))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrapped(core, **settings)


def wordpiece(cleanup: bool, **settings) -> PreTrainedTokenizerFast:
    words = ["a", "##b", "##é", ".", ",", "'", "m", "##m", "s", "n", "##'", "##t", "do", "not", "!", "?", "re", "ve", "🦅"]
    core = Tokenizer(models.WordPiece({token: index for index, token in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=cleanup)
    return wrapped(core, **settings)


def words(**settings) -> PreTrainedTokenizerFast:
    """Whole words, and no decoder at all."""
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(["<unk>", "a", "b", ".", "'", "m", "s"])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrapped(core, **settings)


def suffixed(**settings) -> PreTrainedTokenizerFast:
    """Words that end in </w>: a decoder that treats the last token as no other."""
    core = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b</w>": 2, "a</w>": 3, ".</w>": 4}, merges=[], unk_token="<unk>"))
    core.decoder = decoders.BPEDecoder()
    return wrapped(core, **settings)


def wrapped(core: Tokenizer, **settings) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings)


def every_kind() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer of each kind, with and without the blanks before punctuation taken out."""
    found = {"byte-level": byte_tokenizer(merges=[("a", "b"), ("Ã", "©"), ("©", "a"), ("ð", "Ł"), ("Ġ", "b")])}
    for clean in (False, True):
        kept = {"clean_up_tokenization_spaces": clean}
        found |= {
            f"{name}{' cleaned' * clean}": tokenizer
            for name, tokenizer in {
                "sentencepiece": sentencepiece(**kept),
                "gemma": sentencepiece(strip=False, **kept),
                "unigram": unigram(**kept),
                "wordpiece": wordpiece(False, **kept),
                "bert": wordpiece(True, **kept),
                "words": words(**kept),
                "suffixed": suffixed(**kept),
            }.items()
        }
    forced = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    return found | {"sentencepiece forced": sentencepiece(clean_up_tokenization_spaces=True, **forced)}
