"""Whatever a program hands in, a wrong kind of value is one line that names it: never a traceback from inside, never a guess."""

from __future__ import annotations

import numpy as np
import pytest

from eyas.config import EyasError, TreeShape
from eyas.engine import Engine, load
from tests.tiny import save_tiny_draft, save_tiny_target


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    root = tmp_path_factory.mktemp("types")
    save_tiny_target(root / "target")
    save_tiny_draft(root / "draft", root / "target")
    return load(root / "target", root / "draft", precision="fp32")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"seed": 7.5}, "seed must be a whole number, not 7.5"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"max_new_tokens": "5"}, "max-new-tokens must be a whole number, not '5'"),
        ({"max_new_tokens": None}, "max-new-tokens must be a whole number, not None"),
        ({"batch": 1.5}, "batch must be a whole number, not 1.5"),
        ({"stop": b"x"}, "stop must be one value or a list of them, not b'x'"),
        ({"stop": [b"x"]}, "stop must be a string or several, none of them empty, not (b'x',)"),
        ({"stop": ""}, "stop must be a string or several, none of them empty, not ('',)"),
        ({"raw": "yes"}, "raw must be True or False, not 'yes'"),
        ({"method": 3}, "method must be a method's name, not 3"),
        ({"tree": 5}, "tree must be a shape or its text, as '60x7x10', not 5"),
        ({"tree": TreeShape(10**7, 2, 2)}, "tree '10000000x2x2' asks for 10,000,000 nodes"),
        ({"sampling": "hot"}, "sampling must be a Sampling, not 'hot'"),
        ({"verifier": None}, "verifier must be a verifier's name, not None"),
        ({"logit_bias": 5}, "logit-bias must be a mapping of token ids to numbers, not 5"),
        ({"n": "2"}, "n must be a whole number, not '2'"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_one_line(engine, settings, said):
    with pytest.raises(EyasError) as caught:
        engine.generate("hi", **{"max_new_tokens": 2, **settings})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"hi", "not bytes; decode them first: data.decode()"),
        (["hi", b"hi"], "not bytes; decode them first: data.decode()"),
        (5, "a prompt is text, a list of messages, or a list of token ids, not 5"),
        (None, "token ids, not None"),
        ({"role": "user", "content": "hi"}, "not {'role': 'user'"),
        (["hi", None], "token ids, not None"),
        ([["hi"]], "message 1 is not a JSON object"),
        ([1.5], "a prompt's numbers must be token ids from 0 to"),
        ([{}], "message 1 does not say who speaks"),
        ([{"role": 3, "content": "hi"}], "message 1 has the unknown role 3"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": 5}], "message 1 has content that is not a string"),
        ([{"role": "user", "content": b"hi"}], "message 1 has content that is not a string"),
        ([{"role": "user", "content": [5]}], "message 1 has a part that is no text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "message 1 has a part of type 'image_url'; only text is read",
        ),
    ],
)
def test_a_prompt_of_a_wrong_kind_is_one_line(engine, prompt, said):
    with pytest.raises(EyasError) as caught:
        engine.generate(prompt, max_new_tokens=2)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_json_and_numpy_hand_in_is_taken(engine):
    wanted = engine.generate("hi", max_new_tokens=4, temperature=1.0, seed=3).tokens
    given = {"max_new_tokens": np.int32(4), "temperature": np.float32(1), "seed": np.int64(3), "stop": None, "stop_token_ids": None}
    assert engine.generate("hi", **given).tokens == wanted
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert engine.generate(parts, **given).tokens == wanted, "content as parts is the text of its parts"
    assert engine.generate("hi", **{**given, "seed": np.int64(-1)}).tokens == engine.generate("hi", **{**given, "seed": -1}).tokens


@pytest.mark.parametrize(("words", "said"), [((5,), "a target is a"), ((b"/tmp",), "a target is a"), ((None, 5), "a draft is")])
def test_a_place_of_a_wrong_kind_is_one_line(words, said, monkeypatch, tmp_path):
    monkeypatch.setattr("eyas.files.target.embedded_target", lambda: tmp_path)
    with pytest.raises(EyasError, match=said):
        load(*words)
