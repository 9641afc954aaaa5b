"""Tiny models and a byte tokenizer for tests: random weights, nothing downloaded, ready in milliseconds on any CPU.

Knows shapes and seeds; knows nothing of drafts or of decoding.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eyas.config import TargetConfig
from eyas.files.eagle3_files import save_draft
from eyas.files.target import load_target
from eyas.files.tensors import save_tensors
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (  # as models that read images too have it: content is a list of parts, and a string shows nothing
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]
SHARPNESS = 2.5  # standard deviation of the logits: the likeliest of 53 tokens then has about a third of the mass


def tiny_config(**changes) -> TargetConfig:
    """Five layers, 53 tokens, two query heads for each key-value head."""
    sizes = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    return TargetConfig(**sizes | changes)


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float64, prepare: bool = True, **changes) -> Target:
    """A target whose distribution is peaked but not degenerate; the weights are the same for a seed in every `dtype`, up to rounding."""
    target = Target(tiny_config(**changes)).double()
    randomize(target, seed)
    target = target.to(dtype).eval().requires_grad_(False)
    return target.prepare() if prepare else target


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter of a Llama-shaped model, norms and biases too: zeros and ones would hide a mistake."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            value = 0.2 * noise
        else:
            value = noise * (SHARPNESS if "lm_head" in name or "embed" in name else 1) * parameter.shape[1] ** -0.5
        parameter.copy_(value)


def byte_tokenizer(template: str | None = CHATML, merges=(), trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: one token a byte, but for `merges`; of the special tokens only <s> and </s> have a name of their own."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, bos_token="<s>", eos_token="</s>")


def tiny_draft(target: Target, seed: int = 1, draft_vocab_size: int = 29, taps=(1, 2, 4), **settings) -> tuple[DraftNetwork, DraftVocab]:
    """A random float64 draft for a tiny target, not packed; its vocabulary is a seeded choice of the target's."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randperm(target.config.vocab_size, generator=draw)[:draft_vocab_size].sort().values
    width = {name: settings.pop(name) for name in ("hidden_size",) if name in settings}
    config = replace(draft_config(target.config, draft_vocab_size, taps, **settings), **width)
    network = DraftNetwork(config, target.model.embed_tokens.weight.detach()).double()
    randomize(network, seed)
    return network, DraftVocab(ids, target.config.vocab_size)


def reference_weights(network: DraftNetwork) -> dict[str, torch.Tensor]:
    """A network's weights as the slow reference takes them."""
    return {"embed_tokens.weight": network.embedding[0], **dict(network.named_parameters())}


def save_tiny_target(directory: Path, seed: int = 0, **changes) -> Path:
    """Write a tiny float32 Llama with the byte tokenizer as a Hugging Face directory; <|im_end|> ends a turn."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    end = tokenizer.eos_token_id
    config = tiny_config(**{"vocab_size": len(tokenizer), "eos_token_ids": (end,), **changes})
    target = Target(config).double()
    randomize(target, seed)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory, {name: parameter.float() for name, parameter in target.named_parameters()})
    fields = {key: value for key, value in vars(config).items() if value is not None and key != "eos_token_ids"}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu", **fields, "eos_token_id": end}))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    return directory


def save_tiny_draft(directory: Path, target: Path, seed: int = 1, draft_vocab_size: int = 200, **settings) -> Path:
    """Write a random draft for a target that `save_tiny_target` wrote."""
    loaded = load_target(target, "fp32")
    network, vocab = tiny_draft(loaded, seed, draft_vocab_size, **settings)
    directory.mkdir(parents=True, exist_ok=True)
    save_draft(directory, network, vocab, loaded.config.num_hidden_layers)
    return directory
