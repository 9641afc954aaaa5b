"""How weights and configs come in and go out: Hugging Face directories, GGUF files, atomic saving, strict loading.

Knows file formats; knows nothing of what the tensors compute. Loading is strict: a missing, surplus or mis-shaped tensor is an error
with a list, since a model with a silently missing tensor still runs and accepts nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eyas.config import EyasError, TargetConfig, rope_kind

INDEX = "model.safetensors.index.json"
SUPPORTED = {  # model_type -> flags that its config leaves unsaid
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EyasError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EyasError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise EyasError(f"{path} holds no JSON object")
    return content


def has_own_blocks(directory: Path) -> bool:
    """Whether our own blocks compute this model; others go through transformers (model/adapter.py)."""
    raw = read_json(directory / "config.json")
    return raw.get("model_type") in SUPPORTED and not raw.get("mlp_bias") and raw.get("hidden_act", "silu") == "silu"


def target_config(directory: Path) -> TargetConfig:
    """The target's shape from a Hugging Face config.json; a model that cannot be a target is refused in one line that says why."""
    if not has_own_blocks(directory):
        from eyas.model.adaptable import adapted_config

        return adapted_config(directory)
    raw = read_json(directory / "config.json")
    kind = raw["model_type"]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [key for key in needed if key not in raw]:
        raise EyasError(f"{directory / 'config.json'} lacks {', '.join(absent)}")
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    rope = raw.get("rope_parameters") or {}  # transformers 5 puts theta and scaling here
    scaling = rope or raw.get("rope_scaling")
    window = raw.get("sliding_window") if kind == "mistral" or raw.get("use_sliding_window") else None
    positions = raw.get("max_position_embeddings", 2048)
    return TargetConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        max_position_embeddings=min(positions, window) if window else positions,  # inside the window full attention is the same
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        rope_scaling=scaling if scaling and rope_kind(scaling) is not None else None,
        attention_bias=raw.get("attention_bias", False) or SUPPORTED[kind].get("attention_bias", False),
        attention_out_bias=kind in ("llama", "qwen3") and raw.get("attention_bias", False),
        qk_norm=SUPPORTED[kind].get("qk_norm", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_ids=end_of_turn_ids(directory, raw),
    )


def end_of_turn_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: those of config.json and generation_config.json."""
    ids: set[int] = set()
    generation = directory / "generation_config.json"
    for source in (raw, read_json(generation) if generation.exists() else {}):
        found = source.get("eos_token_id")
        ids |= set(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(ids))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory: model.safetensors, or the shards that its index lists."""
    if (directory / INDEX).exists():
        where = read_json(directory / INDEX).get("weight_map")
        if not isinstance(where, dict):
            raise EyasError(f"{directory / INDEX} has no weight_map; copy or download it again")
        files = sorted(set(where.values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (directory / name).exists():
            raise EyasError(f"{directory} holds no {name}; give a directory with config.json and safetensors weights")
        tensors |= read_file(directory / name)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise EyasError(f"{path} is damaged or cut short ({error}); copy or download it again") from None


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into the module's parameters by name; every name and shape must fit."""
    own = check_tensors(module, tensors, what)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The module's parameters by name; raises with a list where a tensor for one is missing, misshapen, or has no place."""
    derived = "rotary_emb.inv_freq"  # old checkpoints hold it; the config says it
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(derived)}
    own = dict(module.named_parameters()) | dict(module.named_buffers())  # a tied tensor appears once, under its first name
    first = {id(parameter): name for name, parameter in own.items()}
    every = module.named_parameters(remove_duplicate=False)
    again = {name: first[id(parameter)] for name, parameter in every if name in tensors and name not in own}  # stored twice: Qwen3-0.6B
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own and name not in again]
    unequal = [(name, twin) for name, twin in again.items() if twin in tensors and not torch.equal(tensors[name], tensors[twin])]
    problems += [f"{name} differs from {twin}, to which it is tied" for name, twin in unequal]
    shapes = [(name, tuple(tensors[name].shape), tuple(own[name].shape)) for name in own if name in tensors]
    problems += [f"{name} is {found}, expected {wanted}" for name, found, wanted in shapes if found != wanted]
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise EyasError(f"{what} does not fit: {'; '.join(problems[:8])}{rest}")
    return own


@contextmanager
def atomic_directory(final: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """A temporary sibling that becomes `final` only when the block ends well; what was there before stays until then.

    `ours`: names that are replaced; anything else that lies in `final` (a user's notes, say) moves along. None: all of it is replaced.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise EyasError(f"cannot write {final}: {error.strerror}") from None
    try:
        yield work
        os.chmod(work, 0o755)
        for file in work.iterdir():  # safetensors leaves files that only their writer may read
            os.chmod(file, 0o644)
        for other in final.iterdir() if ours is not None and final.exists() else ():
            if other.name not in ours and not (work / other.name).exists():
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, work / other.name)
        old = work.with_name(work.name + "-old")
        if final.exists():
            os.replace(final, old)
        try:
            os.replace(work, final)
        except BaseException:
            if old.exists():
                os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise EyasError(f"cannot write {final}: {error.strerror or error}; what was there before is untouched") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def recover_directory(final: Path) -> None:
    """After a kill between the two renames of `atomic_directory`: what was there before moves back, and remains of a save go."""
    leftovers = [path for path in final.parent.glob(f".{final.name}-*") if path.is_dir()] if final.parent.is_dir() else []
    old = [path for path in leftovers if path.name.endswith("-old")]
    if not final.exists() and old:
        os.replace(max(old, key=lambda path: path.stat().st_mtime), final)
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises OSError where it cannot be."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    work.write_text(text)
    os.replace(work, path)


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], largest_file: int | None = None) -> None:
    """model.safetensors, or numbered shards with an index where one file would pass `largest_file` bytes."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        if largest_file is None or size <= largest_file:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            return
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > largest_file:
                shards.append({})
            shards[-1][name] = tensor
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        for name, shard in zip(names, shards):
            save_file(shard, directory / name, metadata={"format": "pt"})
        where = {key: name for name, shard in zip(names, shards) for key in shard}
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1))
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from None


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def directory_hash(directory: Path) -> str:
    """sha256 over the weight files of a directory (of the file itself where there is one)."""
    files = sorted(directory.glob("*.safetensors"))
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


# ---- GGUF ----

GGUF_NAMES = {  # llama.cpp's name of a block's tensor -> Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(path: Path, final: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a GGUF model as a Hugging Face directory: bfloat16 safetensors, config, tokenizer, chat template."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from eyas.model.gguf_check import check_gguf
    from eyas.model.tokenizer import tokenizer_from_gguf

    try:
        check_gguf(path)
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:  # IndexError: the file ends early
        raise EyasError(f"{path} cannot be read as GGUF ({error})") from None
    kind = fields.get("general.architecture")
    if kind not in SUPPORTED:
        raise EyasError(f"{path} is a {kind!r} model; eyas runs {', '.join(SUPPORTED)} (Llama-shaped) targets")
    if fields.get("split.count", 0) > 1:
        raise EyasError(f"{path} is one of {fields['split.count']} parts of a model; join them with llama.cpp's gguf-split --merge")
    config = gguf_config(fields, {tensor.name for tensor in reader.tensors})
    tokenizer = tokenizer_from_gguf(fields)  # before minutes of conversion
    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        name = gguf_to_hugging_face(tensor.name)
        if name is None:  # rope_freqs and the like are derived from the config
            continue
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(tuple(int(n) for n in tensor.shape[::-1]))
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config["num_attention_heads"] if ".q_proj" in name else config["num_key_value_heads"]
            value = halves_from_pairs(value, heads)
        tensors[name] = value.to(torch.bfloat16)
        progress(done + 1, len(reader.tensors))
    with atomic_directory(final) as work:
        save_tensors(work, tensors)
        (work / "config.json").write_text(json.dumps(config, indent=1))
        tokenizer.save_pretrained(work)


def gguf_to_hugging_face(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for tensors a config implies."""
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in GGUF_NAMES:
        return f"model.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
    if parts[0] in GGUF_TOP:
        return f"{GGUF_TOP[parts[0]]}.{parts[1]}"
    if parts[0].startswith("rope_"):
        return None
    raise EyasError(f"GGUF tensor {name} has no place in a Llama-shaped model")


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring pairs, Hugging Face rotates halves: put each head's rows back in halves order."""
    rows = weight.shape[0] // heads
    return weight.view(heads, rows // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def gguf_config(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The Hugging Face config.json that a GGUF's fields amount to."""
    kind = fields["general.architecture"]

    def of(key: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{key}", default)

    heads, hidden = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", hidden // heads)
    ends = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot") if f"tokenizer.ggml.{name}_token_id" in fields]
    theta = float(of("rope.freq_base", 10000.0))
    if of("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise EyasError("this GGUF scales its rotary embedding, which the file describes only in part; use the Hugging Face directory")
    return {
        "architectures": [
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
        ],
        "model_type": kind,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(set(ends)) if len(set(ends)) > 1 else (ends or [None])[0],
        "dtype": "bfloat16",
    }
