"""Claims about what a server tells of itself: settings, slots, what an answer's guesses came to; and about ending a request by name."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from eyas.decode.generate import Decoder
from eyas.serve import watching
from tests.serve.serving import CHAT, TEXT, ask, events, served

LONG = {"max_tokens": 400, "ignore_eos": True}


@contextmanager
def under_way(client, server, name: str, **more):
    """A request that is being written, and the answer that came in the end."""
    found = []
    headers = {"X-Request-Id": name, **more.pop("headers", {})}
    thread = threading.Thread(target=lambda: found.append(client.post(CHAT, json=ask(**LONG, **more), headers=headers)))
    thread.start()
    while not any(each.call == name for each in server.scheduler.decoder.decoding):
        time.sleep(0.005)
    yield found
    thread.join(30)


def test_settings_are_told_under_llama_cpps_names(engine, client):
    told = client.get("/props").json()
    assert told == client.get("/v1/props").json() and told["total_slots"] == 4
    defaults = told["default_generation_settings"]
    assert defaults["n_ctx"] == 512 and defaults["params"]["temperature"] == 1.0
    assert told["chat_template"] == engine.tokenizer.chat_template and "/" not in told["model_path"]
    model = client.get("/v1/models").json()["data"][0]["eyas"]
    assert told["eyas"]["system_fingerprint"] == model["system_fingerprint"] and told["eyas"]["tree"] == "8x2x3"
    assert len(model["target_hash"]) == 64 and model["noise_version"] > 0


def test_slots_tell_what_they_do(engine):
    with served(engine, "--slots", "2") as (client, server):
        idle = client.get("/slots").json()
        assert [each["id"] for each in idle] == [0, 1] and not any(each["is_processing"] for each in idle)
        with under_way(client, server, "mine") as found:
            busy = next(each for each in client.get("/slots").json() if each["is_processing"])
            assert busy["eyas"]["request"] == "mine" and busy["eyas"]["state"] == "decoding" and busy["n_ctx"] == 512
            assert busy["next_token"]["n_decoded"] == busy["eyas"]["written"] > 0
            assert busy["next_token"]["n_decoded"] + busy["next_token"]["n_remain"] == 400
            assert client.get("/slots", params={"fail_on_no_slot": 1}).status_code == 200
            with under_way(client, server, "other"):
                assert client.get("/slots", params={"fail_on_no_slot": 1}).status_code == 503
                for name in ("mine", "other"):
                    assert client.post(f"/v1/requests/{name}/cancel").status_code == 200
        assert found[0].status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_ended_by_its_name(engine, stream):
    with served(engine, "--slots", "1") as (client, server):
        with under_way(client, server, "mine", stream=stream) as found:
            assert client.post("/v1/requests/other/cancel").status_code == 404
            assert client.post("/v1/requests/mine/cancel").json() == {"id": "mine", "cancelled": 1}
        error = events(found[0].text)[-1]["error"] if stream else found[0].json()["error"]
        assert error["type"] == "request_cancelled" and "[DONE]" not in found[0].text
        assert found[0].status_code == (200 if stream else 400)
        assert client.post("/requests/mine/cancel").status_code == 404 and not server.open
        assert client.post(CHAT, json=ask()).status_code == 200 and server.scheduler.idle


def test_another_keys_request_is_neither_named_nor_ended(engine):
    with served(engine, "--slots", "1", "--api-key", "a", "--api-key", "b") as (client, server):
        mine, other = ({"Authorization": f"Bearer {key}"} for key in "ab")
        with under_way(client, server, "mine", headers=mine):
            assert client.get("/slots").status_code == 401
            assert client.get("/slots", headers=other).json()[0]["eyas"]["request"] is None
            assert client.get("/slots", headers=mine).json()[0]["eyas"]["request"] == "mine"
            assert client.post("/v1/requests/mine/cancel", headers=other).status_code == 404
            assert client.post("/v1/requests/mine/cancel", headers=mine).status_code == 200


@pytest.mark.parametrize("more", [{}, {"max_tokens": 1}, {"eyas": {"method": "plain"}}], ids=["guessed", "one token", "plain"])
def test_an_answers_guesses_are_told_as_vllm_tells_them_and_add_up(client, more):
    whole = client.post(CHAT, json=ask(temperature=0, **more)).json()
    told, timings = whole["metrics"]["speculative_decoding"], whole["timings"]
    counts = told["acceptance_histogram"]
    assert sum(counts) == told["num_spec_steps"] == timings["draft_n_rounds"]
    assert sum(length * count for length, count in enumerate(counts)) == told["num_accepted_draft_tokens"] == timings["draft_n_accepted"]
    assert told["num_accepted_draft_tokens"] <= told["num_draft_tokens"] == timings["draft_n"]
    assert told["mean_acceptance_length"] == pytest.approx(whole["eyas"]["tau"][0], abs=1e-4)
    assert 0 <= told["draft_acceptance_rate"] <= 1
    last = events(client.post(CHAT, json=ask(temperature=0, stream=True, stream_options={"include_usage": True}, **more)).text)[-2]
    assert last["choices"] == [] and sum(last["metrics"]["speculative_decoding"]["acceptance_histogram"]) == told["num_spec_steps"]


def test_several_choices_have_no_common_acceptance(client):
    assert "metrics" not in client.post(TEXT, json={"prompt": "a", "n": 2, "max_tokens": 3}).json()


def test_an_answer_brings_its_rounds_where_it_is_asked_to(engine, monkeypatch):
    monkeypatch.setattr(watching, "MOST_RECORDED", 3)
    with served(engine, "--slots", "4") as (client, server):
        plain = client.post(CHAT, json=ask(n=2)).json()
        whole = client.post(CHAT, json=ask(n=2, eyas={"trace": True})).json()
        assert whole["choices"] == plain["choices"] and "trace" not in plain["eyas"]
        assert len(whole["eyas"]["trace"]) == 3 and {each["request"] for each in whole["eyas"]["trace"]} == {whole["id"]}
        monkeypatch.setattr(watching, "MOST_RECORDED", 100)
        told = events(client.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}, eyas={"trace": True})).text)[:-1]
        (rounds,) = [each["eyas"]["trace"] for each in told if "trace" in each.get("eyas", {})]
        first = next(each for each in told if each["choices"] and each["choices"][0]["delta"].get("content"))
        assert [each["n"] for each in rounds] == list(range(1, len(rounds) + 1)) and rounds[-1]["end"]
        assert rounds[0]["root"]["text"] == first["choices"][0]["delta"]["content"]
        assert not list(server.rounds.recorders)


@pytest.mark.parametrize(
    ("own", "status", "words"),
    [
        ({"verifier": "walk"}, 200, ""),
        ({"verifier": "typical-lossy"}, 400, "leave eyas.verifier out"),
        ({"trace": 1}, 400, "eyas.trace must be true or false"),
        ({"hawk": 1}, 400, "eyas has no hawk; it takes tree, method, verifier, trace"),
    ],
)
def test_what_may_be_asked_of_eyas_itself(client, own, status, words):
    answer = client.post(CHAT, json=ask(eyas=own, max_tokens=2))
    assert answer.status_code == status and words in answer.text


def test_who_has_the_fewest_slots_gets_the_next_one():
    def text(owner: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(owner=owner, name=name)

    waiting = [text("a", "a2"), text("a", "a3"), text("b", "b1"), text("c", "c1")]
    decoder = SimpleNamespace(reading=[text("a", "a1")], decoding=[], waiting=waiting)
    order = []
    while waiting:
        found = Decoder.next_seated(decoder)  # type: ignore[arg-type]
        order.append(found.name)
        waiting.remove(found)
        decoder.decoding.append(found)
    assert order == ["b1", "c1", "a2", "a3"]


def test_a_servers_figures_of_now_are_told(engine):
    with served(engine, "--slots", "2") as (client, server):
        with under_way(client, server, "mine"):
            text = client.get("/metrics").text
            told = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("eyas:")}
            assert told["eyas:slots"] == 2 and told["eyas:watchers"] == 0 and 0 < told["eyas:kv_cache_usage_perc"] < 1
            client.post("/v1/requests/mine/cancel")
        assert 'eyas:info{draft="draft",method="eagle3+copy"' in text and 'precision="fp32"' in text
        rounds = client.get("/metrics").text
        assert "eyas:committed_per_round_count" in rounds and 'when="decode"' in rounds
