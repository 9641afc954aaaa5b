"""Which of transformers' models can be a target, and their shape, told by config.json alone.

`model/adapter.py` runs the models that can. Knows transformers' configs and model classes; loads no weights and computes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eyas.config import EyasError, TargetConfig
from eyas.files.disk import read_json
from eyas.files.ends import end_of_turn_ids, listed
from eyas.files.hf_config import context_length, nested, stored_config

MASKED = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types whose whole memory is keys and values under a mask
CHOOSE = "choose a model with plain attention in every layer"
RUNNING = {"conv", "linear_attention", "hybrid", "hybrid_sliding", "mamba", "recurrent"}  # layer types with a running state
REFUSED = {  # what cannot be a target -> why, as it is said
    "an encoder and a decoder": f"an encoder reads its prompt and a decoder writes; {CHOOSE} and no encoder",
    "a wrapper without a class": (
        "it wraps a text model with images or sound in a way of its own; give a directory with the text model alone"
    ),
    "no causal class": f"transformers has no causal language model of this type; {CHOOSE}",
    "a running state": (
        "a state-space, recurrent, convolution or linear-attention layer keeps one running state, so a tree of guesses cannot be checked "
        f"in one pass; {CHOOSE}"
    ),
    "layers that choose": f"its layers choose for themselves what they see, so no tree mask can be handed in; {CHOOSE}",
    "attention of its own": f"transformers computes its attention inside the model, where no tree mask can be handed in; {CHOOSE}",
    "rows that see later ones": "its rows see later ones, as an encoder's do; choose a causal model",
}


def model_class(config: Any) -> Any:
    """transformers' class of a config with a head that writes text: a causal language model, or one around it that reads images too; None
    where there is neither."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    tables: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return next((table[type(config)] for table in tables if type(config) in table), None)


def check_adaptable(directory: Path) -> Any:
    """transformers' config of a model that can be a target; of one that reads images or sound too, that of its text. Raises `EyasError`,
    with one line that says why, for a model that cannot.

    Reads config.json and no weights.
    """
    kind = read_json(directory / "config.json").get("model_type")
    from transformers import CONFIG_MAPPING, __version__

    def refused(what: str, which: str = "") -> EyasError:
        return EyasError(f"{directory} is a {kind!r} model: {REFUSED[what]}{which}")

    if kind is None:
        raise EyasError(f"{directory / 'config.json'} names no model_type, by which models are told apart; write it there")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise EyasError(f"{directory} is a {kind!r} model, which transformers {__version__} does not know; choose another or update it")
    config = stored_config(directory)
    if config.is_encoder_decoder:
        raise refused("an encoder and a decoder")
    model, whole = model_class(config), config
    config = whole.get_text_config()
    if model is None and config is not whole:
        raise refused("a wrapper without a class")
    if model is None:
        raise refused("no causal class")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - MASKED)
    if getattr(model, "_is_stateful", False) or RUNNING & set(odd):
        raise refused("a running state")
    if odd:
        raise refused("layers that choose", f" ({', '.join(odd)})")
    if not (getattr(model, "_supports_attention_backend", False) or model._can_set_attn_implementation()):
        raise refused("attention of its own")
    both_ways = getattr(config, "use_bidirectional_attention", None)  # "vision" (Gemma 4): between parts of an image, never in text
    if getattr(config, "is_causal", True) is False or both_ways not in (None, False, "vision"):
        raise refused("rows that see later ones")
    return config


def adapted_config(directory: Path) -> TargetConfig:
    """The shape of a target that runs through transformers. Raises as `check_adaptable` does.

    Only the draft reads rotary base and scaling: of several bases (Gemma 3 has two) it gets that of the layers with full attention.
    """
    config = check_adaptable(directory)

    def of(*names: str, default: Any = None) -> Any:
        return next((value for name in names if (value := setting(config, name)) is not None), default)

    hidden, heads = of("hidden_size"), of("num_attention_heads")
    sizes = {"vocab_size": of("vocab_size"), "hidden_size": hidden, "num_hidden_layers": of("num_hidden_layers")}
    sizes["num_attention_heads"] = heads
    if wrong := [name for name, value in sizes.items() if not isinstance(value, int)]:
        raise EyasError(f"{directory / 'config.json'} gives no single number for {', '.join(wrong)}; eyas cannot shape a draft after it")
    kv_heads = of("num_key_value_heads", default=1 if of("multi_query") else heads)
    rope = of("rope_parameters", default={})
    if nested(rope):  # one for each type of layer
        rope = rope.get("full_attention") or next(value for value in rope.values() if isinstance(value, dict))
    known = rope.get("rope_type") in ("linear", "llama3", "yarn")
    return TargetConfig(
        **sizes,
        intermediate_size=of("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden),
        num_key_value_heads=kv_heads if isinstance(kv_heads, int) and heads % kv_heads == 0 else heads,
        head_dim=of("head_dim", default=hidden // heads),
        max_position_embeddings=context_length(config),
        rms_norm_eps=of("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", default=1e-5),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling={key: value for key, value in rope.items() if key != "partial_rotary_factor"} if known else None,
        tie_word_embeddings=bool(of("tie_word_embeddings", default=False)),
        eos_token_ids=end_of_turn_ids(directory, ends_said(directory, of("eos_token_id")), sizes["vocab_size"]),
    )


def ends_said(directory: Path, of_text: Any) -> list[int]:
    """The ids that config.json says end an answer: those of the text's config (whose class knows one where the file has none), and those of
    a model around it, which is where transformers looks."""
    path = directory / "config.json"
    return [*listed(of_text, path), *listed(read_json(path).get("eos_token_id"), path)]


def setting(config: Any, name: str) -> Any:
    """A config's value; None where it has none, or a different one for each layer (Gemma 4's head widths)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None
