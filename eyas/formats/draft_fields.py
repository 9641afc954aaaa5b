"""What a stranger's config.json says of a draft's layers: sizes, settings, rotary embedding.

Where tensors show a fact, they are believed and not the config. A field that changes what the layers compute and that eyas's network does
not compute is refused by name, and so is a field that nobody here has read: readings that all leave it out cannot be told apart by
measuring. Knows fields and the names of tensors; knows no layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eyas.config import EyasError, rope_kind, short
from eyas.files import config_fields
from eyas.files.untrusted import Fields

THETA = 10000.0  # where a config names none; SafeAILab's trainer used it whatever the config said
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # whose decoder layers are the ones that the network computes
HARMLESS = config_fields.HARMLESS - {"mask_token_id"} | config_fields.words(  # a mask token belongs to heads that guess in parallel
    """
    speculators_model_type speculators_version speculators_config embed_requires_grad has_no_defaults_at_init
    ttt_steps ttt_length target_model_type target_layer_count modal_type base_model_tp_plan base_model_pp_plan base_model_ep_plan
    eos_token_id parallel_draft_heads_num_layers has_lm_head
    """
)
IDLE = {  # fields that change nothing while they have one of these values
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "logit_scale": (1, 1.0),
    "bias": (False,),
    "qkv_bias": (False,),
    "position_embedding_type": ("rope",),
    "rope_interleaved": (False,),
    "rope_is_neox_style": (True,),
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (0, 1),
    "use_moe": (False,),
}
ROTARY = config_fields.ROPE_READ | config_fields.ROPE_HARMLESS | {"mrope_section", "mrope_interleaved"}


COUNTS = ("num_aux_hidden_states", "num_aux_layers", "num_eagle_features")  # how many layers of the target it reads, in engines' words


@dataclass
class Said:
    """What is told the user of a draft's files."""

    told: list[str] = field(default_factory=list)  # what had to be inferred, one line for each
    wrong: list[str] = field(default_factory=list)  # those of these lines where the config contradicts the tensors, or itself


def layer_names(weights: Mapping[str, Tensor], where: str = "the draft") -> list[str]:
    """The prefixes of the decoder layers' tensors: `midlayer`, and `layers.1` and on. Raises `EyasError` where numbers are missing."""
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("layers.") and name.split(".")[1].isdecimal()})
    if numbers != list(range(1, len(numbers) + 1)):
        raise EyasError(f"{where} holds decoder layers {[0, *numbers]}: some are missing; ask for the whole checkpoint")
    return ["midlayer", *(f"layers.{number}" for number in numbers)]


def sizes_of(weights: Mapping[str, Tensor], shape: Fields, flags: Fields, said: Said, taps: int) -> dict[str, int]:
    """Widths, heads and layers as the tensors have them; the user is told where the config says otherwise."""
    width, fused, where = weights["norm.weight"].shape[0], weights["fc.weight"].shape[1], shape.where
    for key in COUNTS:
        if flags.size(key, taps) != taps:
            raise EyasError(f"{where}: {key} is {flags.raw[key]}, and its layer ids name {taps} (where there are none, the default three)")
    if fused % taps:
        raise EyasError(f"{where}: fc reads {fused} numbers, which is not {taps} features of the target")
    heads = shape.size("num_attention_heads")
    kv_heads = shape.size("num_key_value_heads", heads)
    rows, kv_rows = (weights[f"midlayer.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
    if not heads or not kv_heads or rows % heads or kv_rows * heads != rows * kv_heads:
        raise EyasError(f"{where}: {rows} query rows and {kv_rows} key rows do not make {heads} heads and {kv_heads} key-value heads")
    found = {
        "hidden_size": width,
        "intermediate_size": weights["midlayer.mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rows // heads,
        "target_hidden_size": fused // taps,
    }
    layers = len(layer_names(weights))
    rows = head.shape[0] if (head := weights.get("lm_head.weight")) is not None else None
    for name, value in (found | {"num_hidden_layers": layers, "draft_vocab_size": rows, "truncated_vocab_size": rows}).items():
        for fields in dict.fromkeys((shape, flags)):
            if fields.given(name) is not None and value is not None and fields.size(name) != value:
                said.wrong.append(f"its config says {name} {fields.raw[name]}, its tensors {value}: {value} is right")
    return found | {"draft_layers": layers, "max_position_embeddings": shape.size("max_position_embeddings", 2048)}


def settings_of(weights: Mapping[str, Tensor], shape: Fields, flags: Fields, said: Said) -> dict[str, Any]:
    """The settings that the arithmetic depends on, which tensors show only in part."""
    there = {
        "fc_norm": "fc_norm.0.weight" in weights,
        "norm_before_fc": "input_norm.weight" in weights,
        "qk_norm": all(f"midlayer.self_attn.{name}_norm.weight" in weights for name in "qk"),
        "attention_bias": any(name.startswith("midlayer.self_attn.") and name.endswith(".bias") for name in weights),
        "mlp_bias": any(name.startswith("midlayer.mlp.") and name.endswith(".bias") for name in weights),
    }
    eagle = shape.object("eagle_config")  # where SGLang looks for norm_before_fc
    spelt = {
        "fc_norm": [(flags, "fc_norm"), (flags, "use_aux_norm")],
        "norm_before_fc": [(flags, "norm_before_fc"), (eagle, "norm_before_fc")],
        "qk_norm": [(shape, "qk_norm"), (shape, "use_qk_norm")],
        "attention_bias": [(shape, "attention_bias")],
        "mlp_bias": [(shape, "mlp_bias")],
    }
    for name, places in spelt.items():
        for fields, key in places:
            if (claimed := fields.flag(key, there[name])) != there[name]:
                said.wrong.append(f"its config says {key} {claimed}, its tensors {there[name]}: {there[name]} is right")
    if (activation := shape.text("hidden_act") or "silu") not in ("silu", "swish"):
        raise EyasError(f"{shape.where}: hidden_act {short(activation)}; eyas's draft layer computes silu")
    if (model := shape.text("model_type") or "llama") not in MODEL_TYPES:
        raise EyasError(f"{shape.where}: model_type {short(model)}; eyas computes the decoder layers of {', '.join(MODEL_TYPES)}")
    if shape.given("rms_norm_eps") is None:
        said.told.append("its config names no rms_norm_eps; 1e-06, which engines then take")
    return there | {
        "rms_norm_eps": shape.number("rms_norm_eps", 1e-6),
        "norm_output": flags.flag("norm_output"),
        "norm_before_residual": flags.flag("norm_before_residual"),
    }


# ---- positions and attention ----


def rotary_of(shape: Fields, said: Said) -> tuple[dict[str, Any], list[float]]:
    """The fields of the rotary embedding, and the bases it may have been trained with, the config's own first.

    Of `rope_scaling` and `rope_parameters` the first counts where it says something, as in transformers, which engines read configs with.
    An embedding for images (mrope) counts every position three times, alike on text: there it is the plain one. Its sections are kept for
    engines that serve images.
    """
    objects = {key: shape.object(key) for key in ("rope_scaling", "rope_parameters")}
    for fields in objects.values():
        fields.asked.update(ROTARY)
    partial = [value for fields in (*objects.values(), shape) if (value := fields.number("partial_rotary_factor")) is not None]
    if len(set(partial)) > 1:
        said.wrong.append(f"its config names several partial_rotary_factors, {' and '.join(f'{value:g}' for value in partial)}")
    kinds = {key: scaling_in(fields.raw) for key, fields in objects.items()}
    scaling = kinds["rope_scaling"] if objects["rope_scaling"].raw else kinds["rope_parameters"]
    others = [key for key, fields in objects.items() if fields.raw and kinds[key] != scaling]
    if others:
        said.wrong.append(f"its config describes two rotary embeddings, {short(scaling)} and {short(kinds[others[0]])}")
    if scaling and "mrope_section" in scaling:
        said.told.append("its rotary embedding counts images in three directions (mrope), which on text is the plain one")
    named = [*(fields.number("rope_theta") for fields in objects.values()), shape.number("rope_theta")]
    thetas = list(dict.fromkeys(theta for theta in named if theta is not None))
    if not thetas:
        said.told.append(f"its config names no rope theta; {THETA:g}, which engines then take")
    if len(thetas) > 1:
        said.wrong.append(f"its config names several rope thetas, {' and '.join(f'{theta:g}' for theta in thetas)}")
    candidates = list(dict.fromkeys([*thetas, THETA]))
    return {"rope_theta": candidates[0], "rope_scaling": scaling, "partial_rotary_factor": [*partial, 1.0][0]}, candidates


def scaling_in(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an object says of scaling; None for a plain embedding, for which transformers 5 writes an object too."""
    held = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "mrope_section" in held or rope_kind(held) == "mrope":
        kind = rope_kind(held)
        held = {key: value for key, value in held.items() if key != "type"} | {"rope_type": "default" if kind in (None, "mrope") else kind}
        return held if "mrope_section" in held else None
    return held if rope_kind(held) is not None else None


def window_of(shape: Fields, layers: int) -> int | None:
    """How many positions a row sees in each of its layers; None: all. Raises `EyasError` where layers differ, or see something else.

    Where layer_types is missing, the families' own rules say which layers have the window: all of Mistral's, of Qwen's those from
    max_window_layers on, none of Llama's.
    """
    window, kinds, family = shape.given("sliding_window"), shape.given("layer_types"), shape.text("model_type") or "llama"
    first, used = shape.size("max_window_layers", 28), shape.flag("use_sliding_window", family == "mistral")
    if kinds is None:
        begins = {"mistral": 0, "qwen2": first, "qwen3": first}.get(family, layers) if used and window is not None else layers
        own = ["full_attention"] * min(begins, layers) + ["sliding_attention"] * (layers - min(begins, layers))
    else:
        own = list(kinds[:layers]) if isinstance(kinds, list) else [kinds]
    if len(own) < layers or any(kind != own[0] for kind in own) or own[0] not in ("full_attention", "sliding_attention"):
        raise EyasError(f"{shape.where}: layer_types {short(kinds)}; eyas's draft layers see all of the text, or all the same window of it")
    return shape.size("sliding_window") if own[0] == "sliding_attention" else None


# ---- what nobody read ----


def check_known(fields: Fields) -> None:
    """Raise `EyasError` for a field that may change what a draft computes and that was not read."""
    check_idle(fields)
    if unknown := fields.passed_over(HARMLESS):
        many = len(unknown) > 1
        names = ", ".join(map(short, unknown[:4])) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        raise EyasError(
            f"{fields.where}: eyas does not know the field{'s' * many} {names}, which may change what the draft computes; "
            f"where {'they change' if many else 'it changes'} nothing, take {'them' if many else 'it'} out of a copy of the file"
        )


def check_idle(fields: Fields) -> None:
    for key, values in IDLE.items():
        value = fields.given(key)
        if value is not None and value not in values:
            raise EyasError(f"{fields.where}: {key} is {short(value)}, which changes what a draft computes and which eyas does not compute")
    for name, each in fields.objects.items():
        if name not in HARMLESS:
            check_idle(each)
