"""llama.cpp: one GGUF file of architecture `eagle3`, as its own converter writes it.

Layer ids (`eagle3.target_layers`) name the layers whose *input* is read, d2t holds absolute ids, and rows of q and k lie in pairs order.
Read in the copy that llama-cpp-python 0.3.36 carries: it computes neither fc_norm nor norm_output, and one layer without biases and without
norms of queries and keys. A draft without a head takes its target's. What a GGUF cannot say (rotary scaling in words, hashes) is kept under
`eyas.config`.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from eyas.config import LARGEST_SIZE, DraftConfig, EyasError, TreeShape, rope_kind, short
from eyas.files.gguf import halves_from_pairs
from eyas.files.gguf_check import check_gguf
from eyas.formats.gguf_tokenizer import copy_tokenizer, write_tokenizer
from eyas.formats.portable import EMBEDDING, HEAD, OTHER_WIDTH, OWN_EMBEDDING, Draft, Found, TargetFiles, unusual
from eyas.model.transformer import rotary_frequencies
from eyas.model.vocab import DraftVocab

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TITLE = "llama.cpp (llama-cpp-python 0.3.36)"
VARIABLES = "--chat-template-kwargs"  # of the chat template, for requests that set none
WEIGHTS = ("bf16", "fp32", "fp16", "q8_0", "q4_1")
FILE = "draft.gguf"
NAMES = {  # published name -> llama.cpp's
    EMBEDDING: "token_embd.weight",
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
OURS = {theirs: ours for ours, theirs in NAMES.items()}
OWN = "eyas.config"
ARCHITECTURE = "eagle3"
OPTIONAL = (EMBEDDING, HEAD, "input_norm.weight")
KNOWN = (  # fields after `eagle3.` that are read here, or that say nothing of what is computed
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "vocab_size", "target_layers", "target_hidden_size",
    "norm_before_residual", "norm_before_fc",
)  # fmt: skip


def refusal(draft: Draft) -> str | None:
    if why := unusual(draft, "llama.cpp", (OTHER_WIDTH, OWN_EMBEDDING)):
        return why
    config = draft.config
    if config.fc_norm or config.norm_output:
        return "llama.cpp computes neither fc_norm nor norm_output (EAGLE-3.1); SGLang and vLLM do"
    if config.rope_scaling and rotary(config, config.rope_scaling)[1] != 1:
        return f"llama.cpp's draft takes no rotary scaling that also scales attention ({short(config.rope_scaling)})"
    return None


def rotary(config: DraftConfig, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    return rotary_frequencies(config.head_dim, config.rope_theta, scaling, config.max_position_embeddings)


def write(work: Path, draft: Draft, target: TargetFiles, weights: str, target_gguf: Path | None = None) -> None:
    """`draft.gguf`. Norms stay float32 in every number format, as the converter leaves them."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    number_format, file_type = {
        "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
        "fp16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    }[weights]
    writer = GGUFWriter(work / FILE, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name("EAGLE-3 draft made by eyas")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    write_shape(writer, draft.config, target)
    told = {"rope_scaling": draft.config.rope_scaling, "target_layers": draft.target_layers, "facts": draft.facts}
    writer.add_string(OWN, json.dumps(told))
    if target_gguf is None:
        write_tokenizer(writer, target.directory)
    else:
        copy_tokenizer(writer, target_gguf)
    write_tensors(writer, draft, number_format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shape(writer: GGUFWriter, config: DraftConfig, target: TargetFiles) -> None:
    """What llama.cpp reads of a draft's shape, and of the layers of the target that it is fed with."""
    writer.add_block_count(1)
    writer.add_context_length(max(config.max_position_embeddings, target.config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_array(f"{ARCHITECTURE}.target_layers", list(config.taps))
    writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", config.target_hidden_size)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", config.norm_before_residual)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_fc", config.norm_before_fc)


def write_tensors(writer: GGUFWriter, draft: Draft, number_format: GGMLQuantizationType) -> None:
    """The draft's weights under llama.cpp's names, matrices in this number format; scaled frequencies and the vocabulary beside them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    config = draft.config
    for name, tensor in draft.weights.items():
        value = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = pairs_from_halves(value, heads)
        wanted = number_format if value.dim() == 2 else GGMLQuantizationType.F32
        if value.shape[-1] % GGML_QUANT_SIZES[wanted][0]:  # a row is cut into whole blocks
            wanted = GGMLQuantizationType.F16
        writer.add_tensor(NAMES[name], quantize(value.contiguous().numpy(), wanted), raw_dtype=wanted)
    if rope_kind(config.rope_scaling or {}) is not None:
        plain, scaled = (rotary(config, scaling)[0] for scaling in (None, config.rope_scaling))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    writer.add_tensor("d2t", draft.vocab.ids.numpy())


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring pairs, Hugging Face rotates halves: put each head's rows in pairs order."""
    rows = weight.shape[0] // heads
    return weight.view(heads, 2, rows // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read(path: Path) -> Found:
    """A GGUF draft, or the one in a directory; quantised weights come back as float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = path / FILE if path.is_dir() else path
    check_gguf(path)
    try:
        reader = GGUFReader(path)
        fields = {name: entry.contents() for name, entry in reader.fields.items()}
        tensors = {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(tensor.shape[::-1].tolist())
            if tensor.tensor_type.name not in ("I64", "I32")
            else torch.from_numpy(tensor.data.copy())
            for tensor in reader.tensors
        }
    except Exception as error:  # the library fails in as many ways as a file can be damaged
        raise EyasError(f"{path} cannot be read as GGUF ({short(str(error) or type(error).__name__)})") from None
    return found_in(path, fields, tensors)


def found_in(path: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Found:
    arch = fields.get("general.architecture")
    if arch != "eagle3":
        raise EyasError(f"{path} is a model of architecture {short(arch)}; a draft's is 'eagle3'")
    own = own_facts(fields.get(OWN), path)
    scaled = tensors.pop("rope_freqs.weight", None) is not None and not own.get("rope_scaling")
    if scaled or (not own and fields.get(f"{arch}.rope.scaling.type", "none") != "none"):
        raise EyasError(f"{path} scales its rotary embedding, which the file describes only in part; import the directory it was made from")
    ids = tensors.pop("d2t", None)
    if unknown := [name for name in tensors if name not in OURS]:
        raise EyasError(f"{path} holds {short(unknown[0])}, which no draft with one layer has")
    weights = {OURS[name]: tensor for name, tensor in tensors.items()}
    if missing := [theirs for ours, theirs in NAMES.items() if ours not in weights and ours not in OPTIONAL]:
        raise EyasError(f"{path} lacks {', '.join(missing[:4])}")
    if flat := [name for name in (HEAD, EMBEDDING) if name in weights and weights[name].dim() != 2]:
        raise EyasError(f"{path}: {NAMES[flat[0]]} has shape {tuple(weights[flat[0]].shape)}")
    if unread := [name for name in fields if name.startswith(f"{arch}.") and name.removeprefix(f"{arch}.") not in KNOWN]:
        raise EyasError(f"{path}: eyas does not know the field {short(unread[0])}, which may change what the draft computes")
    told = []
    if ids is None:
        ids = torch.arange(weights[HEAD].shape[0] if HEAD in weights else size_of(path, fields, weights))
        told.append("it has no d2t: its vocabulary is the target's whole one")
    config = config_of(path, fields, weights, len(ids), own.get("rope_scaling"))
    if HEAD not in weights and (len(ids) != config.vocab_size or config.hidden_size != config.target_hidden_size):
        raise EyasError(f"{path} holds no output.weight, and its target's head is none for it: other tokens, or another width")
    for name, count in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        key = f"midlayer.self_attn.{name}.weight"
        if weights[key].dim() != 2 or weights[key].shape[0] != count * config.head_dim:
            raise EyasError(f"{path}: {NAMES[key]} is {tuple(weights[key].shape)}, which is not {count} heads of {config.head_dim}")
        weights[key] = halves_from_pairs(weights[key], count)
    return Found(
        "llama.cpp (GGUF)",
        {name: value for name, value in vars(config).items() if name != "taps"},
        weights,
        DraftVocab(ids, config.vocab_size),
        config.taps,
        head="own" if HEAD in weights else "the target's",
        target_layers=layers if isinstance(layers := own.get("target_layers"), int) and not isinstance(layers, bool) else 0,
        facts=own.get("facts") or {},
        told=told,
        doubts={"layer ids": ["inputs", "outputs"]} if not own else {},
    )


def size_of(path: Path, fields: dict[str, Any], weights: dict[str, Tensor]) -> int:
    """The target's vocabulary, as the file tells it."""
    size = fields.get(f"{ARCHITECTURE}.vocab_size", len(fields.get("tokenizer.ggml.tokens") or ()))
    size = weights[EMBEDDING].shape[0] if EMBEDDING in weights else size
    if not isinstance(size, int) or not 0 < size <= LARGEST_SIZE:
        raise EyasError(f"{path}: eagle3.vocab_size must be a whole number from 1 to {LARGEST_SIZE}, not {short(size)}")
    return size


def config_of(path: Path, fields: dict[str, Any], weights: dict[str, Tensor], draft_vocab: int, scaling: Any) -> DraftConfig:
    """The shape that the fields tell, every size checked; taps as the file has them, by input."""

    def of(key: str, default: Any = None) -> Any:
        value = fields.get(f"eagle3.{key}", default)
        if value is None:
            raise EyasError(f"{path} lacks eagle3.{key}")
        return value

    heads, layers = of("attention.head_count"), of("target_layers")
    if not isinstance(heads, int) or not isinstance(layers, list):
        raise EyasError(f"{path}: eagle3.attention.head_count or target_layers is no number or list of numbers")
    return DraftConfig(
        vocab_size=size_of(path, fields, weights),
        draft_vocab_size=draft_vocab,
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=of("attention.head_count_kv", heads),
        head_dim=of("attention.key_length", weights["midlayer.self_attn.q_proj.weight"].shape[0] // max(heads, 1)),
        target_hidden_size=of("target_hidden_size"),
        taps=tuple(layers),
        max_position_embeddings=of("context_length", 2048),
        rms_norm_eps=decimal(of("attention.layer_norm_rms_epsilon", 1e-5)),
        rope_theta=decimal(of("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        norm_before_fc=of("norm_before_fc", False),
        norm_before_residual=of("norm_before_residual", False),
        own_embedding=EMBEDDING in weights,
    )


def decimal(value: Any) -> Any:
    """A GGUF holds float32: the shortest number that is that one, 1e-05 and not 9.99999974e-06."""
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def own_facts(text: Any, path: Path) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        own = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        own = None
    if not isinstance(own, dict) or not isinstance(own.get("facts") or {}, dict):
        raise EyasError(f"{path}: its field {OWN} is damaged")
    return own


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    file = draft if draft.suffix == ".gguf" else draft / FILE
    drafted = ["-md", str(file), "--spec-type", "draft-eagle3", "--spec-draft-n-max", str(shape.levels)]
    return f"{serve_alone(target)} {shlex.join(drafted)}"


def serve_alone(target: str) -> str:
    model = target if target.endswith(".gguf") else "TARGET.gguf"  # the target as a GGUF, by llama.cpp's convert_hf_to_gguf.py
    return shlex.join(["llama-server", "-m", model, "-np", "1"])
