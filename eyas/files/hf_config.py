"""A target's shape from its Hugging Face config.json, where our own blocks compute it.

transformers reads the file, so defaults and precedence (rope_scaling before rope_parameters) are its own. Knows config.json;
reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eyas.config import LARGEST_SIZE, EyasError, TargetConfig, check_number, short
from eyas.files.config_fields import ROPE_KINDS, ROPE_NUMBERS, ROPE_READ, foreign_fields, unknown_fields, unknown_rope
from eyas.files.disk import read_json
from eyas.files.ends import end_of_turn_ids
from eyas.files.notes import note
from eyas.files.quantised import check_quantised


class Family(NamedTuple):
    """What a family's layers have beside the sizes that its config names."""

    qkv_bias: bool | None = None  # biases of queries, keys and values; None: where attention_bias says so
    out_bias: bool = False  # where attention_bias says so, one behind the attention too
    qk_norm: bool = False  # norms of each query and key head


FAMILIES = {  # those that our own blocks compute, by model type
    "llama": Family(out_bias=True),
    "mistral": Family(qkv_bias=False),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(out_bias=True, qk_norm=True),
}
SUPPORTED = tuple(FAMILIES)
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def has_own_blocks(directory: Path) -> bool:
    """Whether our own blocks compute this model; others go through transformers (model/adapter.py). Raises as `foreign_part` does."""
    return is_supported(directory) and foreign_part(directory) is None


def is_supported(directory: Path) -> bool:
    """Whether a model is of a family that our own blocks compute, whatever else its config says."""
    kind = read_json(directory / "config.json").get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def foreign_part(directory: Path) -> str | None:
    """What a model of a supported family has that transformers computes and our own blocks do not; None: nothing.

    Raises `EyasError` for a config.json that lacks a size, that transformers refuses, or with a field that nobody knows.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if absent := [key for key in NEEDED if key not in raw]:
        raise EyasError(f"{path} lacks {', '.join(absent)}")
    config = stored_config(directory)
    check_sizes(config, path)
    if config.model_type not in SUPPORTED:  # transformers takes a Mistral with layer_types for a Ministral
        return f"a model that transformers takes for {config.model_type}"
    declared, rope = declared_by(config), rope_of(config)
    unknown = {name: raw[name] for name in unknown_fields(raw, declared) + odd_windows(config, raw)}
    unknown |= {f"rope_parameters' {name}": rope[name] for name in unknown_rope({} if nested(rope) else rope)}
    if unknown:
        values = ", ".join(f"{name} ({short(value)})" for name, value in unknown.items())
        way_out = "take it out of the file if it changes nothing of what the model computes"
        raise EyasError(f"{path} sets {values}, which neither eyas nor transformers' {raw['model_type']} computes; {way_out}")
    if foreign := foreign_fields(raw, declared):
        return ", ".join(f"{name} {short(raw[name])}" for name in foreign)
    if nested(rope):
        return "a rotary embedding for each type of layer"
    check_kind(rope["rope_type"], path)
    if rope["rope_type"] not in ROPE_KINDS:
        return f"rotary scaling {short(rope['rope_type'])}"
    if head_width(config) % 2:
        return f"heads of width {head_width(config)}"
    if len(kinds := layer_kinds(config)) > 1 or not kinds <= {"full_attention", "sliding_attention"}:
        return f"layers of different kinds ({', '.join(sorted(kinds))})"
    return None


def check_sizes(config: Any, path: Path) -> None:
    """Raise `EyasError` where a config names a size that no model has, or heads that do not go together."""
    sizes = {name: getattr(config, name) for name in (*NEEDED, "num_key_value_heads", "max_position_embeddings")}
    if (window := getattr(config, "sliding_window", None)) is not None:
        sizes["sliding_window"] = window
    try:
        for name, size in sizes.items():
            check_number(name, size, 1, LARGEST_SIZE, whole=True)
    except EyasError as error:
        raise EyasError(f"{path}: {error}") from None
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups or heads < groups:
        raise EyasError(f"{path}: {heads} heads over {groups} key-value heads do not go together; heads come in equal groups")


def own_config(directory: Path) -> TargetConfig:
    """The shape of a target that our own blocks compute."""
    config, raw = stored_config(directory), read_json(directory / "config.json")
    family, rope, positions = FAMILIES[raw["model_type"]], rope_of(config), context_length(config)
    rope = {name: value for name, value in rope.items() if name in ROPE_READ}
    if rope["rope_type"] == "longrope" and not rope.get("factor"):  # derived from the whole context, of which the half is cut off here
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    asked = bool(getattr(config, "attention_bias", False))
    return TargetConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_width(config),
        max_position_embeddings=positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=None if rope["rope_type"] in ("default", "dynamic") else rope,  # inside its context, dynamic is unscaled
        attention_bias=asked if family.qkv_bias is None else family.qkv_bias,
        attention_out_bias=asked and family.out_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=config.tie_word_embeddings,
        eos_token_ids=end_of_turn_ids(directory, config.eos_token_id, config.vocab_size),  # the class knows one where the file has none
        sliding_window=window_of(config) if layer_kinds(config) == {"sliding_attention"} else None,
    )


# ---- transformers' view of a config.json ----


def stored_config(directory: Path) -> Any:
    """transformers' config of a directory. Raises `EyasError` with one line where transformers refuses it; as `check_quantised` does."""
    from transformers import AutoConfig
    from transformers.utils import logging

    check_quantised(read_json(directory / "config.json"), directory / "config.json")
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # what matters of its advice is said in one line, here and in `context_length`
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # each config class validates in its own way
        raise EyasError(f"{directory / 'config.json'} cannot be used ({first_line(error)})") from None
    finally:
        logging.set_verbosity(shown)
    check_rope(rope_of(config), directory / "config.json")
    say_what_scaling_hides(directory, rope_of(config))
    rotated = getattr(config, "qk_rope_head_dim", None)
    if config.model_type in ("deepseek_v2", "deepseek_v3") and config.head_dim != rotated:  # transformers' own forward fails on it
        note(
            f"{directory / 'config.json'}: head_dim {config.head_dim} is taken for {rotated}, the width that is rotated (qk_rope_head_dim)"
        )
        config.head_dim = rotated
    return config


def check_rope(rope: Mapping[str, Any], path: Path) -> None:
    """Raise `EyasError` where a rotary embedding's parameters (or those of a type of layer) are not what their names say."""
    for name, value in rope.items():
        if isinstance(value, dict):
            check_rope(value, path)
        elif name in ("rope_type", "type") and not isinstance(value, str):
            raise EyasError(f"{path}: {name} must be text, not {short(value)}")
        elif name in ROPE_NUMBERS and (value is not None or name == "rope_theta"):
            try:
                check_number(name, value, 0, 1e12, whole=name == "original_max_position_embeddings")
            except EyasError as error:
                raise EyasError(f"{path}: {error}") from None


def check_kind(kind: str, path: Path) -> None:
    """Raise `EyasError` for a kind of rotary scaling that transformers does not know either."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in {*ROPE_KINDS, *ROPE_INIT_FUNCTIONS}:
        known = ", ".join(sorted({*ROPE_KINDS, *ROPE_INIT_FUNCTIONS}))
        raise EyasError(f"{path}: rotary scaling {short(kind)} is known neither to eyas nor to transformers; known are {known}")


def say_what_scaling_hides(directory: Path, taken: Mapping[str, Any]) -> None:
    """Note where transformers passes over something of a rotary embedding that the file says; `taken`: what it took."""
    raw, path = read_json(directory / "config.json"), directory / "config.json"
    scaling, parameters = ({} if not isinstance(raw.get(key), dict) else raw[key] for key in ("rope_scaling", "rope_parameters"))
    if "attn_factor" in (scaling or parameters):
        note(f"{path}: attn_factor is read neither by transformers nor by eyas (attention_factor is)")
    if scaling and parameters.get("rope_theta", taken.get("rope_theta")) != taken.get("rope_theta"):
        hidden = f"so base {taken['rope_theta']} is taken and not {parameters['rope_theta']}, as in transformers"
        note(f"{path}: rope_scaling stands before rope_parameters, {hidden}; write rope_theta into rope_scaling if that is meant")


def declared_by(config: Any) -> set[str]:
    """The names of the fields that a config's class knows."""
    return {name for kind in type(config).__mro__ for name in getattr(kind, "__annotations__", {})}


def rope_of(config: Any) -> dict[str, Any]:
    """A copy of the rotary embedding's parameters; of no parameters where the model has no rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def nested(rope: Mapping[str, Any]) -> bool:
    """Whether there is one rotary embedding for each type of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int:
    """How many tokens a model reads: a scaled rotary embedding's factor times the length it was made for, as vLLM derives it.

    With dynamic scaling and longrope every frequency changes behind that length, those of rows in the cache too, and one pass could not
    hold both kinds: there the context ends at it.
    """
    rope, positions = rope_of(config), getattr(config, "max_position_embeddings", None) or 2048
    if nested(rope):  # Gemma 3's length is that of the scaled embedding
        return positions
    kind, factor, original = rope.get("rope_type"), rope.get("factor"), rope.get("original_max_position_embeddings")
    if kind == "longrope":
        return min(positions, original or getattr(config, "original_max_position_embeddings", None) or positions)
    if kind in ("yarn", "linear") and factor:
        return int(factor * ((original if kind == "yarn" else None) or positions))
    return positions


def window_of(config: Any) -> int | None:
    """How many positions a row of a windowed layer sees, itself included; None without such layers, or where the context ends first."""
    window = config.sliding_window if "sliding_window" in declared_by(config) else None
    return window if window and window < context_length(config) else None


def layer_kinds(config: Any) -> set[str]:
    """The kinds of attention among a model's layers."""
    if "layer_types" not in declared_by(config):
        return {"full_attention"} if window_of(config) is None else {"sliding_attention"}
    kinds = set(config.layer_types)
    whole = config.sliding_window is not None and window_of(config) is None
    return {"full_attention" if whole and kind == "sliding_attention" else kind for kind in kinds}


def odd_windows(config: Any, raw: Mapping[str, Any]) -> list[str]:
    """Fields about windows that a config.json sets and transformers' class of the family passes over."""
    declared, kinds, found = declared_by(config), layer_kinds(config), []
    window = raw.get("sliding_window")
    windowed = window is not None and not (isinstance(window, int) and window >= context_length(config))
    used = raw.get("use_sliding_window")
    if windowed and "sliding_window" not in declared and used is not False:
        found.append("sliding_window")
    if windowed and "sliding_window" in declared and "use_sliding_window" not in declared and used is False:
        found.append("use_sliding_window")
    if raw.get("layer_types") is not None and "layer_types" not in declared and set(raw["layer_types"]) != kinds:
        found.append("layer_types")
    return found


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its first, and the next where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = lines[1:2] if lines and lines[0].endswith(":") else []
    return " ".join([*lines[:1], *more]) if lines else type(error).__name__
