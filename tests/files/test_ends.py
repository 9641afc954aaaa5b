"""An answer ends where any of config, generation config, tokenizer and chat template says, and only at ids the model can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, Gemma3Config

import eyas
from eyas.config import EyasError
from eyas.files.target import target_config
from tests.tiny import CHATML, PARTS, SPECIALS, byte_tokenizer, save_tiny_target

BASE = 3  # the end of the base model, which config.json still names
IDS = {token: byte_tokenizer().convert_tokens_to_ids(token) for token in SPECIALS}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# as gpt-oss writes it: only the last answer of a conversation ends in the token that the model writes there
OTHER_AT_THE_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}{% endif %}{% endfor %}"
)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def target(directory: Path, eos: str = "</s>", template: str | None = PLAIN) -> Path:
    save_tiny_target(directory)
    tokenizer = byte_tokenizer(template)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(directory)
    if template is None:
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    edit(directory / "config.json", eos_token_id=BASE)
    return directory


def ends(directory: Path) -> set[int]:
    return set(target_config(directory).eos_token_ids)


def test_config_generation_config_and_tokenizer_each_have_their_say(tmp_path):
    assert ends(target(tmp_path)) == {BASE, IDS["</s>"]}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ends(tmp_path) == {BASE, 7, 9, IDS["</s>"]}
    edit(tmp_path / "tokenizer_config.json", eos_token={"content": "<|eot_id|>"})
    assert ends(tmp_path) == {BASE, 7, 9, IDS["<|eot_id|>"]}
    edit(tmp_path / "tokenizer_config.json", eos_token=None)
    assert ends(tmp_path) == {BASE, 7, 9}


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (OTHER_AT_THE_END, "<|eot_id|>"),
        (None, None),
        (PLAIN, None),
        ("{{ raise_exception('roles must alternate') }}", None),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", None),
        ("{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}", None),
        (PARTS, "<|im_end|>"),
        ("{% endfor %}", None),
    ],
)
def test_the_template_says_what_it_writes_after_an_answer(tmp_path, template, end):
    assert ends(target(tmp_path, template=template)) == {BASE, IDS["</s>"], *([IDS[end]] if end else [])}


def test_a_model_around_the_text_says_ends_too(tmp_path):
    """As Gemma 3 does, whose text config names none."""
    Gemma3Config(eos_token_id=[4, 6]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["eos_token_id"] == [4, 6]
    raw["text_config"].pop("eos_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ends(tmp_path) == {1, 4, 6}  # 1: what the class of the text's config has
    raw["text_config"]["eos_token_id"] = 9
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ends(tmp_path) == {4, 6, 9}


def test_the_default_one_of_several_templates_counts(tmp_path):
    target(tmp_path, template=None)
    several = [{"name": "tool_use", "template": OTHER_AT_THE_END}, {"name": "default", "template": CHATML}]
    edit(tmp_path / "tokenizer_config.json", chat_template=several)
    assert ends(tmp_path) == {BASE, IDS["</s>"], IDS["<|im_end|>"]}
    edit(tmp_path / "tokenizer_config.json", chat_template=several[:1])
    assert ends(tmp_path) == {BASE, IDS["</s>"]}


def test_an_end_that_is_an_ordinary_token_of_the_vocabulary_is_found(tmp_path):
    target(tmp_path)
    edit(tmp_path / "tokenizer_config.json", eos_token="Z")
    assert ends(tmp_path) == {BASE, byte_tokenizer().convert_tokens_to_ids("Z")}


def test_an_end_that_the_model_cannot_say_is_none(tmp_path):
    target(tmp_path)
    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.add_special_tokens({"eos_token": "<|late|>"})
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.eos_token_id == target_config(tmp_path).vocab_size
    edit(tmp_path / "config.json", eos_token_id=[BASE, -1])
    assert ends(tmp_path) == {BASE}


def test_a_tokenizer_without_tokenizer_json_is_asked_itself(tmp_path):
    target(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / name).unlink(missing_ok=True)
    assert ends(tmp_path) == {BASE}
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert ends(tmp_path) == {BASE, ByT5Tokenizer().eos_token_id}


@pytest.mark.parametrize("content", ["{}", "[]", '{"added_tokens": 5}', '{"added_tokens": [', ""])
def test_a_tokenizer_that_cannot_be_read_says_nothing_here(tmp_path, content):
    target(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    assert ends(tmp_path) == {BASE}


@pytest.mark.parametrize("wrong", ["2", [2, "3"], 2.5, True])
def test_an_end_that_is_no_id_is_refused_by_name(tmp_path, wrong):
    target(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(EyasError, match=r"generation_config\.json: eos_token_id must be an id or a list of ids"):
        target_config(tmp_path)


def test_nothing_follows_the_end_that_only_the_tokenizer_names(tmp_path):
    model = eyas.load(target(tmp_path, eos="<|im_end|>"), precision="fp32")
    results = model.generate(["hi"] * 24, temperature=1.5, seed=1, max_new_tokens=120)
    ended = [result.tokens.index(IDS["<|im_end|>"]) - len(result.tokens) for result in results if IDS["<|im_end|>"] in result.tokens]
    assert len(ended) > 2 and set(ended) == {-1}
