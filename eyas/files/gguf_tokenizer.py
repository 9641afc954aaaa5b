"""The tokenizer that a GGUF file describes, rebuilt with the `tokenizers` library.

A GGUF keeps vocabulary, merges and the *name* of the pre-tokenizer, not the pre-tokenizer itself. The table below says what each name
means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eyas.config import EyasError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL, USER_DEFINED = 3, 4  # token types in tokenizer.ggml.token_type
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tokenizer.ggml.pre -> how text is cut before the merges
    "smollm": "digits",  # each digit alone, then GPT-2's byte-level rule
    "gpt-2": "gpt2",
    "default": "gpt2",
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with special tokens and chat template from a GGUF's metadata."""
    from transformers import PreTrainedTokenizerFast

    tokens, core = fields["tokenizer.ggml.tokens"], byte_level_bpe(fields)

    def named(key: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=named("unknown"),
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def byte_level_bpe(fields: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer with the GGUF's vocabulary, merges, pre-tokenizer and special tokens. Raises `EyasError` for any other than byte-level
    BPE of a known kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    if fields.get("tokenizer.ggml.model") != "gpt2":
        raise EyasError(
            f"GGUF tokenizer {fields.get('tokenizer.ggml.model')!r} is not byte-level BPE; use the model's Hugging Face directory"
        )
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise EyasError(f"GGUF pre-tokenizer {pre!r} is unknown ({', '.join(SPLITS)} are known); use the model's Hugging Face directory")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", ())]
    whole = pre == "llama-bpe"  # Llama 3 takes a word of its vocabulary as it is, merges or not
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=whole))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(SPLITS[pre]), decoders.ByteLevel()
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token") and bos is not None:  # plain text begins with it; a chat template writes its own
        first = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, bos)]
        )
    for token, kind in zip(tokens, fields.get("tokenizer.ggml.token_type", []), strict=False):
        if kind == SPECIAL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:  # found in text like a special token, but part of the answer (<think>)
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def pre_tokenizer(split: str) -> PreTokenizer:
    """How text is cut before the merges, by a value of SPLITS."""
    from tokenizers import Regex, pre_tokenizers

    if split in ("digits", "gpt2"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split == "digits" else []
        return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    cut = pre_tokenizers.Split(Regex(split), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
