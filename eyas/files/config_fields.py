"""Which fields of a target's config.json our own blocks read, and which change nothing of what a model computes.

A field in neither list is never passed over: files/hf_config.py asks transformers about it, or refuses it by name. Knows names and values;
reads no file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ = words(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    rms_norm_eps max_position_embeddings original_max_position_embeddings rope_theta rope_scaling rope_parameters sliding_window
    use_sliding_window max_window_layers layer_types attention_bias tie_word_embeddings eos_token_id
    quantization_config compression_config num_nextn_predict_layers
    """
)

# Fields that transformers' class of the family knows, at values at which they change nothing; other values go through transformers.
KNOWN_AT: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,)}

# Fields that no class of these families knows, at values at which they change nothing anywhere; other values are refused.
HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_rope": (True,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "pruned_heads": ({},),
    "hidden_activation": ("silu",),
    "activation": ("swiglu", "silu"),
    "is_llama_config": (True,),
    "use_mrope": (False,),
}

HARMLESS = words(  # at any value
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash tokenizer_class prefix
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation _flash_attn_2_enabled
    use_flash_attn use_flash_attention use_flash_attention_2 use_cache return_dict output_attentions output_hidden_states torchscript
    tf_legacy_loss use_bfloat16 chunk_size_feed_forward cross_attention_hidden_size is_decoder tie_encoder_decoder gradient_checkpointing
    initializer_range initializer_factor attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob attn_pdrop
    embd_pdrop resid_pdrop classifier_dropout neftune_noise_alpha loss_type ignore_index keys_to_ignore_at_inference use_liger_kernel
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj _pre_quantization_dtype
    pretraining_tp finetuning_task problem_type id2label label2id num_labels task_specific_params
    pad_token_id bos_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens
    do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens num_beams num_beam_groups diversity_penalty
    num_return_sequences repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping output_scores
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    max_sequence_length max_seq_length max_seq_len model_max_length tokenizer_model_max_length tokenizer_padding_side seq_length
    base_model_name_or_path
    transformers.js_config unsloth_fixed unsloth_version unsloth_tracked unsloth_optimized
    attention_out_bias qk_norm use_qk_norm qkv_bias attention_output_bias num_key_value_groups
    """
)  # the last line's fields change which weights there are, and a weight without a place is refused

ROPE_READ = words(
    """
    rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate
    low_freq_factor high_freq_factor short_factor long_factor
    """
)
ROPE_NUMBERS = ROPE_READ - {"rope_type", "type", "truncate", "short_factor", "long_factor"}
ROPE_HARMLESS = words("finetuned attn_factor")  # transformers reads neither; attn_factor is vLLM's
ROPE_KINDS = {  # rotary embeddings that our own blocks compute, and the context of each (hf_config.context_length)
    "default": "max_position_embeddings",
    "llama3": "max_position_embeddings",
    "linear": "factor x max_position_embeddings",
    "yarn": "factor x original_max_position_embeddings",
    "dynamic": "max_position_embeddings: behind it the frequencies of all rows would change",
    "longrope": "original_max_position_embeddings: behind it the frequencies of all rows would change",
}


def unknown_fields(raw: Mapping[str, Any], declared: Collection[str]) -> list[str]:
    """Fields of a config.json that nobody vouches for: neither read by our blocks, nor harmless, nor `declared` by transformers' class of
    the family (which transformers computes)."""
    settled = READ | HARMLESS | set(declared)
    return [name for name, value in raw.items() if not (value is None or name in settled or value in HARMLESS_AT.get(name, ()))]


def foreign_fields(raw: Mapping[str, Any], declared: Collection[str]) -> list[str]:
    """Fields of a config.json that transformers' class of the family declares and our own blocks do not compute at these values."""
    at = [name for name, values in KNOWN_AT.items() if raw.get(name) is not None and raw[name] not in values]
    known = READ | HARMLESS | set(KNOWN_AT) | set(HARMLESS_AT)
    return at + [name for name, value in raw.items() if name in declared and name not in known and value is not None]


def unknown_rope(rope: Mapping[str, Any]) -> list[str]:
    """Keys of rope_parameters or rope_scaling that nobody vouches for."""
    whole = {"partial_rotary_factor": 1.0}
    return [key for key, value in rope.items() if not (value is None or key in ROPE_READ | ROPE_HARMLESS or whole.get(key) == value)]
