"""Claims about prompts that begin alike: what need not be read again is not, and no bit of any answer changes by it."""

from __future__ import annotations

import pytest

from eyas.config import Request, Sampling
from eyas.decode.prefixes import common
from eyas.decode.sequence import result_of
from tests.serve.serving import CHAT, ask, served

METHODS = ["plain", "eagle3", "eagle3+copy", "lookup", "draft-model"]


def decoded(engine, prompts, method: str, keep: bool, together: bool, slots: int = 3, **sampling):
    """The results of these prompts, one after the other or all at once, and the rows that each did not read."""
    method, _, copied = method.partition("+")
    request = Request(method=method, copy=bool(copied), tree="8x2x3", sampling=Sampling(**sampling), max_new_tokens=24, seed=3, raw=True)
    decoder = engine.decoder(request)
    sequences = engine.sequences(prompts, request)
    decoder.reserve(slots, 400, {sequence.shape for sequence in sequences}, keep_prefixes=keep)
    for sequence in sequences:
        decoder.admit(sequence)
        while not together and decoder.busy:
            decoder.step()
    while decoder.busy:
        decoder.step()
    return [(each.tokens, each.rounds, each.accepted_lengths) for each in map(result_of, sequences)], [s.reused for s in sequences]


def prompts(engine) -> list[list[int]]:
    """A conversation that goes on, one that turns off, a repeat, and one of another kind."""
    first = engine.encode("a hawk sees far and waits " * 3, raw=True)
    (answer,), _ = decoded(engine, [first], "plain", False, False)
    longer = [*first, *answer[0], *engine.encode(" and then it", raw=True)]
    off = [*first[:50], *engine.encode("owls fly at night", raw=True)]
    return [first, longer, off, first, engine.encode("something else that nobody asked before", raw=True), longer]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}], ids=str)
def test_reuse_changes_neither_texts_nor_rounds(engine, method, sampling):
    asked = prompts(engine)
    wanted, none = decoded(engine, asked, method, False, False, **sampling)
    found, reused = decoded(engine, asked, method, True, False, **sampling)
    assert [each[0] for each in found] == [each[0] for each in wanted] and none == [0] * 6
    if not method.endswith("copy"):  # copying counts how often it was right, from what the rows were read for
        assert found == wanted
    assert reused[0] == reused[4] == 0 and reused[2] >= 30 and reused[3] == len(asked[0]) - 1
    assert reused[1] >= len(asked[0]) - 1 and reused[5] >= len(asked[0]) - 1
    together, _ = decoded(engine, asked, method, True, True, **sampling)
    assert [each[0] for each in together] == [each[0] for each in wanted]


def test_answers_of_one_prompt_read_it_once(engine):
    with served(engine, "--slots", "6", "--prefix-cache") as (client, _):
        told = client.post(CHAT, json=ask(n=4, temperature=1.0)).json()
        prompt = told["usage"]["prompt_tokens"]
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * (prompt - 1)
        assert len({each["message"]["content"] for each in told["choices"]}) == 4
        again = client.post(CHAT, json=ask(n=4, temperature=1.0, cache_prompt=False)).json()
        assert again["choices"] == told["choices"] and again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_second_turn_reads_its_new_tokens_alone(engine):
    with served(engine, "--prefix-cache") as (client, _):
        first = ask("How can a hawk see?", temperature=0, max_tokens=12)
        said = client.post(CHAT, json=first).json()["choices"][0]["message"]["content"]
        turns = [*first["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "And an owl?"}]
        told = client.post(CHAT, json=ask(temperature=0) | {"messages": turns}).json()["usage"]
        before = len(engine.encode(first["messages"]))
        assert told["prompt_tokens_details"]["cached_tokens"] >= before - 1
        assert (
            'prefix_cache_hits_total{model_name="target"} ' + f"{float(told['prompt_tokens_details']['cached_tokens'])}"
            in client.get("/metrics").text
        )


def test_nobody_else_learns_what_was_asked(engine):
    with served(engine, "--api-key", "one", "--api-key", "two", "--prefix-cache") as (client, _):
        cached = []
        for key in ("one", "two", "one"):
            told = client.post(CHAT, json=ask(), headers={"authorization": f"Bearer {key}"}).json()
            cached.append(told["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[1] == 0 < cached[2]


def test_a_beginning_in_common():
    for one, other, wanted in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 5, 3], [1, 2, 3], 1), ([7], [8], 0)):
        assert common(one, other) == common(other, one) == wanted
