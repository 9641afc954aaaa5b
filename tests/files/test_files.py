"""Claims about weights and configs on disk: loading is strict and says what is wrong in one line, saving is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eyas.config import EyasError
from eyas.files import tensors
from eyas.files.disk import atomic_directory, directory_hash, file_hash, read_json, recover_directory
from eyas.files.gguf import GGUF_NAMES, GGUF_TOP, convert_gguf, gguf_to_hugging_face, halves_from_pairs
from eyas.files.target import reading_hash, target_config
from eyas.files.tensors import INDEX, WRAPPERS, load_strictly, read_tensors, save_tensors
from eyas.files.untrusted import tensors_of
from eyas.model.rows import chain_rows
from eyas.model.target import Target
from tests.files.test_gguf_tokenizer import fields
from tests.tiny import randomize, save_tiny_target, tiny_config, tiny_target

QWEN = {"model_type": "llama", **{name: value for name, value in vars(tiny_config()).items() if value not in (None, ())}}


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parameters(**changes):
    return {name: value.detach().clone() for name, value in tiny_target(prepare=False, **changes).named_parameters()}


# ---- strict loading ----


def test_missing_surplus_and_misshaped_tensors_are_listed_by_name():
    tensors = parameters()
    del tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.5.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:7]
    target = tiny_target(seed=1, prepare=False)
    before = target.model.norm.weight.clone()
    with pytest.raises(EyasError, match=r"^my weights does not fit: ") as caught:
        load_strictly(target, tensors, "my weights")
    message = one_line(caught)
    assert "missing model.layers.3.mlp.up_proj.weight" in message
    assert "unknown model.layers.5.mlp.up_proj.weight" in message
    assert "lm_head.weight is (7, 32), expected (53, 32)" in message
    assert torch.equal(target.model.norm.weight, before)  # nothing is loaded by half


def test_a_long_list_of_problems_is_cut_and_counted():
    with pytest.raises(EyasError, match="and 40 more") as caught:
        load_strictly(tiny_target(prepare=False), {}, "nothing")
    assert one_line(caught).count("missing") == 8


def test_tied_weights_may_be_stored_once_or_twice_but_not_twice_and_different():
    """Some published tied checkpoints hold lm_head too (Qwen3-0.6B)."""
    tensors = parameters(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    for stored in (tensors, twice):
        target = tiny_target(seed=1, prepare=False, tie_word_embeddings=True)
        load_strictly(target, stored, "tied")
        assert torch.equal(target.lm_head.weight, tensors["model.embed_tokens.weight"])
    with pytest.raises(EyasError, match=r"lm_head.weight"):
        load_strictly(target, twice | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, "tied")


# ---- reading ----


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_one_line(tmp_path, kept):
    save_tensors(tmp_path, parameters())
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(EyasError, match=r"model.safetensors is damaged or cut short") as caught:
        read_tensors(tmp_path)
    one_line(caught)


def test_a_directory_without_weights_or_without_a_shard_names_the_file(tmp_path):
    with pytest.raises(EyasError, match=r"holds no model.safetensors") as caught:
        read_tensors(tmp_path)
    assert str(tmp_path) in one_line(caught)
    save_tensors(tmp_path, parameters(), largest_file=20_000)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(EyasError, match="holds no model-00002-of-") as caught:
        read_tensors(tmp_path)
    one_line(caught)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["consolidated.00.pth"], "but consolidated.00.pth, in a layout of its makers' own"),
        (["model-00001-of-00002.safetensors"], "one of several, and model.safetensors.index.json, which lists them, is missing"),
        (["model.fp16.safetensors"], "but model.fp16.safetensors; rename it, if it is the whole model"),
        (["model.q4.gguf"], "but model.q4.gguf; give that file instead of the directory"),
        (["flax_model.msgpack"], "but flax_model.msgpack; eyas reads safetensors: convert it"),
        (["config.json"], r"neither model.safetensors nor pytorch_model.bin$"),
    ],
)
def test_weights_under_another_name_are_named_with_what_to_do(tmp_path, names, said):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(EyasError, match=said) as caught:
        tensors_of(tmp_path)
    assert str(tmp_path) in one_line(caught)


def test_a_link_whose_file_is_gone_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(EyasError, match=r"model\.safetensors is a link to a file that is gone; fetch it again"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_git_lfs_did_not_fetch_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(EyasError, match=f"{name} is the pointer that Git LFS leaves in a file's place; fetch the file itself") as caught:
        read_json(tmp_path / name) if name == "config.json" else tensors_of(tmp_path)
    one_line(caught)


@pytest.mark.parametrize(("prefix", "way"), WRAPPERS.items())
def test_a_model_that_was_saved_in_its_wrapper_says_which(prefix, way):
    with pytest.raises(EyasError, match=re.escape(f"does not fit: all its tensors' names begin with {prefix}, {way}")):
        load_strictly(tiny_target(), {f"{prefix}{name}": tensor for name, tensor in parameters().items()}, "it")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_one_line(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(EyasError, match=INDEX) as caught:
        read_tensors(tmp_path)
    one_line(caught)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "config.json does not exist"),
        ("{", "config.json is not valid JSON"),
        (b"\xff", "config.json is not valid JSON"),
        ("[1]", "config.json"),
        ({**QWEN, "model_type": "nosuch"}, "is a 'nosuch' model, which transformers .* does not know"),
        ({}, "names no model_type"),
        ({"model_type": "llama", "vocab_size": 5}, "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, config, reason):
    if config is not None:
        data = config if isinstance(config, bytes) else (config if isinstance(config, str) else json.dumps(config)).encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(EyasError, match=reason) as caught:
        target_config(tmp_path)
    assert str(tmp_path) in one_line(caught)


def test_a_config_says_what_ends_an_answer_and_how_far_rows_see(tmp_path):
    config = {**QWEN, "eos_token_id": 2, "max_position_embeddings": 4096, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert target_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert target_config(tmp_path).eos_token_ids == (2, 7)
    for kind, more, wanted in [
        ("llama", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("mistral", {"sliding_window": 512}, 512),
        ("mistral", {"sliding_window": 4096}, None),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0}, 512),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 5}, None),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind, **more}))
        read = target_config(tmp_path)
        assert (read.sliding_window, read.max_position_embeddings) == (wanted, 4096)


# ---- saving ----


@pytest.mark.parametrize("largest", [None, 10**9, 20_000, 9_000, 1])
def test_shards_read_back_equal(tmp_path, largest):
    tensors = parameters() | {"half": torch.randn(3, 5).bfloat16(), "turned": torch.randn(4, 6).T, "ids": torch.arange(5)}
    save_tensors(tmp_path, tensors, largest)
    found = read_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if largest in (None, 10**9):
        assert files == ["model.safetensors"] and not (tmp_path / INDEX).exists()
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert sorted(set(index["weight_map"].values())) == files  # no empty shard
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        held = [name for name, where in index["weight_map"].items() if where == file]
        assert len(held) == 1 or sum(tensors[name].nbytes for name in held) <= largest


def test_transformers_reads_our_shards(tmp_path):
    """Names, index and format mark are those that others expect."""
    tensors = {name: tensor.float() for name, tensor in parameters().items()}
    save_tensors(tmp_path, tensors, 20_000)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in tensors.items())


def boom(error):
    raise error


def second_call_fails(function, error):
    calls = []

    def wrapped(*arguments):
        calls.append(arguments)
        return boom(error) if len(calls) == 2 else function(*arguments)

    return wrapped


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), FULL], ids=repr)
@pytest.mark.parametrize("existed", [True, False])
def test_what_fails_inside_leaves_the_old_directory_and_nothing_else(tmp_path, error, existed):
    final = tmp_path / "deep" / "model"
    if existed:
        final.mkdir(parents=True)
        (final / "old").write_text("old")
    with pytest.raises(EyasError if error is FULL else type(error)) as caught, atomic_directory(final) as work:
        (work / "new").write_text("new")
        boom(error)
    assert [file.name for file in final.parent.iterdir()] == (["model"] if existed else [])
    assert not existed or [file.name for file in final.iterdir()] == ["old"]
    if error is FULL:
        assert one_line(caught) == f"cannot write {final}: No space left on device; what was there before is untouched"


def test_a_full_disk_while_tensors_are_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "save_file", lambda *_, **__: boom(SafetensorError("Error while serializing: I/O error: No space left")))
    with pytest.raises(EyasError, match=r"cannot write .*model: .*No space left") as caught, atomic_directory(tmp_path / "model") as work:
        save_tensors(work, parameters())
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_the_old_directory_is_back_when_the_last_step_fails(tmp_path, monkeypatch):
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").write_text("old")
    monkeypatch.setattr(os, "replace", second_call_fails(os.replace, OSError(errno.EIO, "Input/output error")))
    with pytest.raises(EyasError, match="what was there before is untouched"), atomic_directory(final) as work:
        (work / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["model"] and [file.name for file in final.iterdir()] == ["old"]


def test_a_good_end_replaces_the_whole_directory(tmp_path):
    final = tmp_path / "model"
    for word in ("one", "two"):
        with atomic_directory(final) as work:
            (work / word).write_text(word)
        assert [file.name for file in final.iterdir()] == [word]
        assert [file.name for file in tmp_path.iterdir()] == ["model"]
        assert final.stat().st_mode & 0o777 == 0o755


def test_files_of_others_move_along(tmp_path):
    final = tmp_path / "draft"
    (final / "pictures").mkdir(parents=True)
    for name in ("weights", "notes.txt", "pictures/curve.png"):
        (final / name).write_text("old")
    with atomic_directory(final, ("weights", "log")) as work:
        (work / "weights").write_text("new")
    assert (final / "weights").read_text() == "new" and (final / "notes.txt").read_text() == "old"
    assert (final / "pictures" / "curve.png").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EyasError, match="cannot write") as caught, atomic_directory(tmp_path / "file" / "model"):
        pass
    one_line(caught)


def test_a_file_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- GGUF ----

PRE = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}
NAMES = {theirs: ours for ours, theirs in {**GGUF_NAMES, **GGUF_TOP}.items()}


def pairs_from_halves(weight, heads):
    """How llama.cpp's converter writes q and k of a Llama (its `LlamaModel.permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hugging_face(kind, tied):
    """A model whose weights lose nothing in Q8_0 and bfloat16: integers to 127 times a power of two, 127 in each block of 32."""
    sizes = {name: value for name, value in vars(tiny_config()).items() if name.startswith(("num", "hidden", "max", "head_dim"))}
    vocab = len(fields()["tokenizer.ggml.tokens"])
    config = AutoConfig.for_model(
        kind, vocab_size=vocab, intermediate_size=64, tie_word_embeddings=tied, eos_token_id=2, bos_token_id=1, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    randomize(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(parameter.bfloat16())
            continue
        blocks = torch.randint(-127, 128, (parameter.numel() // 32, 32), generator=draw)
        blocks[:, 5] = 127
        parameter.copy_(blocks.view_as(parameter) * 2.0**-9)
    return model


def write_gguf(path, model, quantized=True, extra=(), more={}, **changes):  # noqa: B006 (read alone)
    """As llama.cpp's converter writes it: matrices Q8_0 or F32, vectors F32."""
    kind, config = model.config.model_type, model.config
    writer = gguf.GGUFWriter(path, changes.pop("architecture", kind))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = fields(PRE[kind]) | changes
    writer.add_tokenizer_model(tokenizer["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(tokenizer["tokenizer.ggml.pre"])
    writer.add_token_list(tokenizer["tokenizer.ggml.tokens"])
    writer.add_token_types(tokenizer["tokenizer.ggml.token_type"])
    writer.add_token_merges(tokenizer["tokenizer.ggml.merges"])
    writer.add_eos_token_id(tokenizer["tokenizer.ggml.eos_token_id"])
    writer.add_chat_template(tokenizer["tokenizer.chat_template"])
    for name, parameter in model.named_parameters():
        value = parameter.numpy()
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):
            value = pairs_from_halves(value, config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads)
        if ".layers." in name:
            _, _, layer, *middle, last = name.split(".")
            theirs = f"blk.{layer}.{NAMES['.'.join(middle)]}.{last}"
        else:
            theirs = f"{NAMES[name.rsplit('.', 1)[0]]}.{name.rsplit('.', 1)[1]}"
        if quantized and value.ndim == 2:
            packed = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(value))
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    for name, value in more.items():
        {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)](f"{kind}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "tied", "quantized"), [("llama", True, True), ("llama", False, False), ("qwen2", True, True), ("qwen3", False, True)]
)
def test_a_converted_gguf_is_the_original_model(tmp_path, kind, tied, quantized):
    model, steps = hugging_face(kind, tied), []
    path = write_gguf(tmp_path / "tiny.gguf", model, quantized)
    convert_gguf(path, tmp_path / "converted", lambda done, total: steps.append((done, total)))
    config = target_config(tmp_path / "converted")
    assert config.tie_word_embeddings == tied and config.head_dim == 8
    target = Target(config)
    load_strictly(target, read_tensors(tmp_path / "converted"), "converted")
    target.eval().requires_grad_(False).prepare()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "hello hello 123"}], add_generation_prompt=True, return_dict=False)
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and tokenizer.eos_token_id in config.eos_token_ids
    wanted = model(torch.tensor([tokens])).logits[0]
    assert_close(target(chain_rows(0, tokens, 0), target.new_cache(1, len(tokens))).logits, wanted, rtol=1e-4, atol=1e-4)
    assert steps[-1] == (len(steps), len(steps)) and len(steps) == len(list(model.parameters()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert_close(theirs(torch.tensor([tokens])).logits[0], wanted, rtol=1e-4, atol=1e-4)


def test_halves_and_pairs_undo_each_other():
    for shape in ((12, 5), (12,)):
        weight = torch.randn(shape)
        assert torch.equal(halves_from_pairs(torch.from_numpy(pairs_from_halves(weight.numpy(), 3)), 3), weight)


def test_tensors_that_a_config_implies_are_left_out():
    assert gguf_to_hugging_face("rope_freqs.weight") is None
    assert gguf_to_hugging_face("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "GGUF pre-tokenizer 'martian' is unknown"),
        ({"tokenizer.ggml.model": "llama"}, "GGUF tokenizer 'llama' is not byte-level BPE"),
        ({"architecture": "gemma"}, "is a 'gemma' model; eyas runs llama, mistral, qwen2, qwen3"),
        ({"extra": ["blk.0.attn_sinks.weight"]}, "GGUF tensor blk.0.attn_sinks.weight has no place"),
        ({"extra": ["cls.weight"]}, "GGUF tensor cls.weight has no place"),
        ({"extra": ["rope_freqs.weight"]}, "scales its rotary embedding"),
    ],
)
def test_a_gguf_that_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path, changes, reason):
    path = write_gguf(tmp_path / "tiny.gguf", hugging_face("llama", True), **changes)
    with pytest.raises(EyasError, match=reason) as caught:
        convert_gguf(path, tmp_path / "converted")
    one_line(caught)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count \(4\)"),
        ({"attention.sliding_window": 16}, r"llama\.attention\.sliding_window \(16\)"),
        ({"expert_count": 8, "expert_used_count": 2}, r"llama\.expert_count \(8\), llama\.expert_used_count \(2\)"),
        ({"logit_scale": 0.5}, r"llama\.logit_scale \(0\.5\)"),
        ({"attention.clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv"),
        ({"attention.causal": False}, r"llama\.attention\.causal \(False\)"),
    ],
)
def test_a_field_of_a_gguf_that_changes_the_model_is_refused_by_name(tmp_path, more, named):
    path = write_gguf(tmp_path / "tiny.gguf", hugging_face("llama", True), more=more)
    with pytest.raises(EyasError, match=f"this GGUF sets {named}.*use the Hugging Face directory") as caught:
        convert_gguf(path, tmp_path / "converted")
    one_line(caught)
    harmless = {"rope.dimension_count": 8, "attention.sliding_window": 4096, "expert_count": 0, "vocab_size": 9, "attention.causal": True}
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", hugging_face("llama", True), more=harmless), tmp_path / "converted")


@pytest.mark.parametrize(
    "data", [b"", b"no", b"not a GGUF file at all, but text of some length", b"GGUF", b"GGUF\x03\0\0\0" + bytes(16), None]
)
def test_what_is_no_gguf_at_all_is_one_line(tmp_path, data):
    path = tmp_path / "no.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EyasError, match=r"no\.gguf") as caught:
        convert_gguf(path, tmp_path / "converted")
    one_line(caught)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_gguf_cut_short_is_one_line(tmp_path, share):
    path = write_gguf(tmp_path / "tiny.gguf", hugging_face("llama", True))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EyasError, match=r"tiny\.gguf cannot be read as GGUF") as caught:
        convert_gguf(path, tmp_path / "converted")
    one_line(caught)
    assert not (tmp_path / "converted").exists()


def test_a_gguf_that_claims_more_than_it_holds_is_one_line(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", hugging_face("llama", True))
    held = path.read_bytes()
    path.write_bytes(held[:24] + (1 << 60).to_bytes(8, "little") + held[32:])  # the length of the first key
    with pytest.raises(EyasError, match=r"tiny\.gguf cannot be read as GGUF: it claims") as caught:
        convert_gguf(path, tmp_path / "converted")
    one_line(caught)


def test_a_kill_between_the_renames_of_a_save_loses_nothing(tmp_path):
    """What was there before moves back into place; half-written remains go; a directory that is there is left alone."""
    old, work = tmp_path / ".draft.eyas-abcdefgh-old", tmp_path / ".draft.eyas-abcdefgh"
    old.mkdir(), work.mkdir()
    (old / "config.json").write_text("before")
    (work / "config.json").write_text("half")
    recover_directory(tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"] and (tmp_path / "draft" / "config.json").read_text() == "before"
    work.mkdir()
    recover_directory(tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"] and (tmp_path / "draft" / "config.json").read_text() == "before"
    recover_directory(tmp_path / "nowhere" / "draft")


def test_a_users_folders_beside_are_never_taken_for_remains(tmp_path):
    """`--out ~/ssh` must not delete `~/.ssh-archived`, nor a name with brackets what a pattern of them finds."""
    with atomic_directory(tmp_path / "[ab]") as work:
        assert re.fullmatch(r"\.\[ab\]\.eyas-\w{8}", work.name), "what is written has a name that nobody gives"
    for name in (".ssh-archived", ".ssh-archived-old", ".ssh.eyas-notes", ".a.eyas-abcdefgh"):
        (tmp_path / name).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    recover_directory(tmp_path / "ssh")
    recover_directory(tmp_path / "[ab]")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as work:
        (work / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "new").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda folder: edit_json(folder / "config.json", rope_theta=5000.0), True),
        (lambda folder: edit_json(folder / "config.json", transformers_version="9.9"), False),
        (lambda folder: edit_json(folder / "tokenizer_config.json", add_prefix_space=True), True),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), True),
        (lambda folder: (folder / "README.md").write_text("a card"), False),
    ],
)
def test_what_a_target_reads_by_counts_beside_its_weights(tmp_path, change, counts):
    """A run is not resumed, and kept text not taken, under another config or tokenizer; the weights' own hash says that it is the same."""
    directory = save_tiny_target(tmp_path / "target")
    before, weights = reading_hash(directory), directory_hash(directory)
    change(directory)
    assert (reading_hash(directory) != before) is counts and directory_hash(directory) == weights


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
