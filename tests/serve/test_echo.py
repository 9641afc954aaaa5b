"""Claims about /v1/completions with `echo` and `logprobs`: what the target thinks of a text, which is what evaluation tools ask for."""

from __future__ import annotations

import pytest
import torch

from eyas.engine import load
from eyas.model.rows import chain_rows
from eyas.serve.words import Words
from tests.serve.serving import CHAT, TEXT, ask, events, served

TEXTS = ["a hawk", "how a hawk sees " * 12, [104], [104, 105, 106]]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(request, tmp_path_factory, engine):
    return engine if request.param == "fp32" else load(engine.directory, engine.draft, precision="bf16")


def forced(engine, prompt) -> tuple[list[int], torch.Tensor]:
    """A prompt's tokens, and the log probabilities [P, V] behind each, of one pass over all of it."""
    tokens = engine.encode(prompt, raw=isinstance(prompt, str))
    with torch.inference_mode():
        logits = engine.target(chain_rows(0, tokens, 0), engine.target.new_cache(1, len(tokens))).logits
    return tokens, logits.log_softmax(-1)


def streamed(client, body) -> dict:
    """The first choice of a stream, put together."""
    found = {"text": "", "finish_reason": None, "logprobs": {}}
    for event in events(client.post(TEXT, json=body | {"stream": True}).text)[:-1]:
        for choice in event["choices"]:
            found["text"] += choice["text"]
            found["finish_reason"] = found["finish_reason"] or choice["finish_reason"]
            for name, told in (choice["logprobs"] or {}).items():
                found["logprobs"].setdefault(name, []).extend(told)
    return found


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_prompts_log_probabilities_are_those_of_one_pass_over_it(engine, client, most):
    equal = engine.target.rows_stand_alone
    for prompt in TEXTS:
        body = {"prompt": prompt, "max_tokens": most, "echo": True, "logprobs": 2, "temperature": 0}
        tokens, wanted = forced(engine, prompt)
        (whole,) = client.post(TEXT, json=body).json()["choices"]
        told, behind = whole["logprobs"], len(tokens)
        assert [len(each) for each in told.values()] == [behind + len(told["tokens"][behind:])] * 4
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        own = wanted[range(behind - 1), tokens[1:]].tolist()
        assert told["token_logprobs"][1:behind] == (own if equal else pytest.approx(own, abs=1e-4))
        best = wanted.max(-1).values.tolist()
        assert [max(each.values()) for each in told["top_logprobs"][1 : behind + 1]] == (
            pytest.approx(best[: behind - (most == 0)], abs=0 if equal else 1e-4)
        )
        again = streamed(client, body)
        assert again["logprobs"] == told and again["text"] == whole["text"] and again["finish_reason"] == whole["finish_reason"]
        if most == 0:
            assert whole["finish_reason"] == "length" and told["text_offset"][0] == 0 and len(told["tokens"]) == behind


def test_kept_rows_and_others_change_nothing_and_later_prompts_take_its_rows(engine):
    prompt = "how a hawk sees far " * 8
    body = {"prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 3, "seed": 2, "n": 2}
    with served(engine, "--slots", "3", "--prefix-cache") as (client, _):
        first = client.post(TEXT, json=body).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        client.post(CHAT, json=ask())
        assert client.post(TEXT, json=body).json()["choices"] == first["choices"]
        later = client.post(TEXT, json={"prompt": prompt + "and waits", "max_tokens": 2}).json()
        assert later["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_no_answer_is_asked_for_where_only_the_prompt_is_told(client):
    told = client.post(TEXT, json={"prompt": "a hawk", "max_tokens": 0, "echo": True}).json()
    assert told["choices"][0]["text"] == "a hawk" and told["usage"]["completion_tokens"] == 0
    for path, body in ((TEXT, {"prompt": "a", "max_tokens": 0}), (CHAT, ask(max_tokens=0))):
        answer = client.post(path, json=body)
        assert answer.status_code == 400 and "0 is for /v1/completions with echo" in answer.json()["error"]["message"]


def test_offsets_are_those_of_the_text(engine):
    words = Words(engine.tokenizer)
    text = "a \N{OWL} hawk"
    tokens = engine.encode(text, raw=True)
    found = words.places(tokens, text)
    assert found == sorted(found) and found[0] == 0 and found[-1] == len(text) - 1
    assert {text[place] for place in found} == set(text)
    end = engine.tokenizer.eos_token_id
    assert words.places([end, *tokens], text) == [0, *found]
