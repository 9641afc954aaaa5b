"""Tokenizers as they come: read, or refused in one line before anything is computed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

import eyas
from eyas.config import EyasError
from eyas.files import tokenizer as module
from eyas.files.tokenizer import chat_template_hash, chat_template_of, encoded, load_tokenizer
from tests.tiny import CHATML, byte_tokenizer, save_tiny_target


def saved(directory: Path, template: str | None = CHATML) -> Path:
    byte_tokenizer(template).save_pretrained(directory)
    return directory


def only(directory: Path, name: str, content: bytes, **settings: object) -> Path:
    """A directory with one file of a tokenizer, and what its tokenizer_config.json says."""
    (directory / name).write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("content", ["{}", '{"added_tokens": []}', "[]", '{"version": "1.0", "model"', ""])
def test_a_tokenizer_json_that_holds_no_tokenizer_is_one_line(tmp_path, content):
    (saved(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(EyasError, match=r"tokenizer\.json|holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EyasError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_files_take_a_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    only(tmp_path, "tokenizer.model", b"\x0a\x05\x0a\x01a", tokenizer_class="LlamaTokenizer")
    with pytest.raises(EyasError, match="takes the package sentencepiece"):
        load_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    tokens = b"".join(base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    only(tmp_path, "tiktoken.model", tokens, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    with pytest.raises(EyasError, match="code of its own, which is not run"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_template_lies_in_any_of_its_files_and_the_first_counts(tmp_path):
    saved(tmp_path, None)
    assert chat_template_of(tmp_path) is None and chat_template_hash(tmp_path) is None and load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert chat_template_of(tmp_path) == load_tokenizer(tmp_path).chat_template == "of a processor"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "of the settings"}))
    assert chat_template_of(tmp_path) == load_tokenizer(tmp_path).chat_template == "of the settings"
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    assert chat_template_of(tmp_path) == load_tokenizer(tmp_path).chat_template == "of its own file"
    assert len(chat_template_hash(tmp_path) or "") == 64


def test_the_default_of_several_templates_writes_a_conversation_without_tools(tmp_path):
    settings = json.loads((saved(tmp_path, None) / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    tokenizer, turns = load_tokenizer(tmp_path), [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(turns, tokenize=False, tools=[{"type": "function"}]) == "with tools"


def test_a_template_for_tools_in_a_file_of_its_own_is_one_of_several(tmp_path):
    """As transformers 5 saves several."""
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(tmp_path)
    whole = chat_template_hash(tmp_path)
    assert chat_template_of(tmp_path) == [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with other tools")
    assert chat_template_hash(tmp_path) != whole


def test_a_tokenizer_whose_files_do_not_go_together_is_one_line(tmp_path):
    settings = json.loads((saved(tmp_path) / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(EyasError, match=r"cannot read this text \(Exception: WordPiece error.*its files may not go together") as caught:
        encoded(load_tokenizer(tmp_path), "hi there")
    assert "\n" not in str(caught.value)


def test_a_prompt_of_tokens_that_the_model_was_never_given_is_one_line(tmp_path):
    save_tiny_target(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    model = eyas.load(tmp_path, precision="fp32")
    with pytest.raises(EyasError, match=r"the prompt holds '<\|tool\|>' \(263\), and the model knows ids up to 262 only"):
        model.generate("a <|tool|> b", max_new_tokens=2)
    assert model.generate("a b", max_new_tokens=2).tokens
