"""Claims about text that a server writes: it is what the target says by self-play's rules, whatever faults the server has on the way."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace

import pytest
import torch

from eyas import http_json
from eyas.config import EyasError
from eyas.http_json import Api, Unanswered, checked_url
from eyas.train import remote_writer
from eyas.train.features import TargetStates
from eyas.train.journal import JOURNAL, Journal
from eyas.train.questions import Asked, SelfPlay
from eyas.train.remote import Server
from eyas.train.remote_check import check_server, own_share
from eyas.train.remote_writer import RemotePlay, write_remotely
from eyas.train.selfplay import Writer
from eyas.train.shards import Written, data_folder
from eyas.train.template import Template
from eyas.train.texts import check_text, read_facts, read_text, text_examples
from eyas.train.writers import Limit
from tests.own_cache import own_cache
from tests.tiny import CHATML, byte_tokenizer, tiny_target
from tests.train.engine import CUT, Engine, Reply, served
from tests.train.test_selfplay import target
from tests.train.writing import END, QUESTIONS, SETTINGS, template

GIVEN = [*QUESTIONS, *(Asked((f"What is {n} and {n}?", "And then?"), "Be brief." if n % 2 else None) for n in range(10))]
GREEDY = replace(SETTINGS, regenerate=True, seed_prompts="given", answer_temperatures=(0.0,), longest=200)
OWN = replace(
    SETTINGS, seeded_share=0.5, seed_prompts="given", longest=200, longest_question=40, task_share=0.25, loop_share=0.5, turns=(1, 2)
)
ALL = Limit()
REMOTE = RemotePlay(**vars(GREEDY), writer="tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("EYAS_CACHE", own_cache(tmp_path / "cache"))
    monkeypatch.setattr(http_json, "PAUSE", 0.001)
    monkeypatch.setattr(http_json, "LONGEST_PAUSE", 0.01)


def server_of(url: str, model: str | None = None, **settings) -> Server:
    return Server(Api(url, **settings), template(), model)


def written_by(
    engine: Engine, settings: SelfPlay = GREEDY, limit: Limit = ALL, at_once: int = 4, report=lambda count: None
) -> list[Written]:
    with served(engine) as url:
        server = server_of(url)
        return list(read_text(write_remotely(server, RemotePlay.of(settings, server), GIVEN, 256, limit, at_once, report)))


def self_played(settings: SelfPlay) -> list[Written]:
    with torch.inference_mode():
        found = dict(Writer(target(), template(), settings, GIVEN, 4).write(iter(range(len(GIVEN)))))
    rows = [finished.row for _, finished in sorted(found.items()) if finished]
    return [Written(row.tokens, row.numbers(), row.start.temperature) for row in rows]


# ---- what is written ----


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_an_engine_writes_what_the_target_says_in_self_play(kind):
    """Token for token, where nothing is drawn; in both ways in which engines tell token ids."""
    wanted = self_played(GREEDY)
    assert len(wanted) == len(GIVEN) and max(max(written.answers) for written in wanted) == 1
    engine = Engine(target(), kind)
    assert written_by(engine) == wanted


def test_so_many_requests_are_under_way_as_are_asked_for():
    engine = Engine(target())
    engine.says, engine.slow = "An owl flies.", 0.05
    written_by(engine, at_once=3)
    assert engine.most_under_way == 3


def test_an_engine_asks_itself_questions_by_the_rules():
    """Openings, texts asked about, several turns and loops: each conversation is the rules' for its number, with the engine's tokens."""
    engine = Engine(target())
    found = written_by(engine, OWN, Limit(tokens=1500))
    assert sum(number >= 0 for written in found for number in written.answers) >= 1500
    assert all(len(written.tokens) <= 200 for written in found)
    assert {round(written.temperature, 3) for written in found} == set(OWN.answer_temperatures)
    prompts = [body["prompt"] for path, body in engine.asked if path == "/v1/completions"]
    before, brief, after = template().before, template().before_with("Be brief."), template().after
    assert all(before == prompt[: len(before)] or brief == prompt[: len(brief)] for prompt in prompts)
    questions = [prompt for prompt in prompts if prompt[-len(after) :] != after and END not in prompt[len(before) :]]
    assert len(questions) > 10  # the engine wrote these itself
    sent = next(body for path, body in engine.asked[3:] if path == "/v1/completions")
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"], sent["stop_token_ids"]) == (64, 0.0, 1.0, [END])


def test_the_first_conversations_are_taken_and_not_the_shortest():
    """Those that end first are short; which are taken does not depend on when they ended."""
    wanted = self_played(GREEDY)
    found = written_by(Engine(target()), limit=Limit(tokens=100), at_once=6)
    assert found == wanted[: len(found)] and len(found) < len(wanted)


def test_where_there_is_enough_no_other_conversation_is_begun(tmp_path):
    """But those that are missing before the last are written: they are longer than those that ended."""
    wanted = written_by(Engine(target()))
    (path,) = tmp_path.rglob(JOURNAL)
    lines = {json.loads(line)["index"]: line for line in path.read_text().splitlines()}
    path.write_text("".join(lines[index] + "\n" for index in (2, 5, 6)))
    held = Journal(path).answer_tokens
    found = written_by(Engine(target()), limit=Limit(tokens=held), at_once=2)
    assert found == wanted[: len(found)] and max(Journal(path).noted) == 6


def test_text_of_an_engine_that_tells_no_tokens_is_tokenized_here():
    engine = Engine(target(), "plain")
    engine.says = "An owl flies."
    (first, *others) = written_by(engine)
    answer = [token for token, number in zip(first.tokens, first.answers) if number == 0]
    assert answer == [*template().tokens("An owl flies."), END] and len(others) == len(GIVEN) - 1


def test_an_engine_that_reads_text_alone_is_sent_text():
    def fault(number, path):
        body = engine.asked[number - 1][1]
        strange = set(body) - {"model", "prompt", "max_tokens", "temperature", "top_p"} or isinstance(body.get("prompt"), list)
        return Reply(422, {"detail": "no such field"}) if path == "/v1/completions" and strange else None

    engine = Engine(target(), "plain", fault)
    engine.says = "An owl flies."
    found = written_by(engine)
    assert len(found) == len(GIVEN)
    assert engine.asked[-1][1]["prompt"].startswith("<|im_start|>system\n")


def test_an_engine_with_chat_alone_answers_given_questions():
    engine = Engine(target(), "chat")
    engine.says = "An owl flies."
    found = written_by(engine)
    assert len(found) == len(GIVEN) and [max(written.answers) for written in found] == [0, 0, *[1] * 10]
    asked = {json.dumps(body["messages"]) for path, body in engine.asked if path == "/v1/chat/completions"}
    said = {"role": "assistant", "content": "An owl flies."}
    question, then = {"role": "user", "content": "What is 1 and 1?"}, {"role": "user", "content": "And then?"}
    brief = {"role": "system", "content": "Be brief."}
    assert json.dumps([brief, question]) in asked and json.dumps([brief, question, said, then]) in asked
    assert found[3].tokens == template().tokens(engine.rendered([brief, question, said, then]) + said["content"] + "<|im_end|>")


def test_an_engine_with_chat_alone_is_given_every_question():
    engine = Engine(target(), "chat")
    engine.says = "An owl flies."
    assert written_by(engine, OWN, Limit(tokens=200))
    with pytest.raises(EyasError, match="has no /v1/completions, so it cannot be let write questions; give some with --seed-prompts"):
        written_by(engine, replace(OWN, seed_prompts=""))


def test_the_file_is_text_that_the_target_wrote():
    engine = Engine(target())
    with served(engine) as url:
        server = server_of(url)
        settings = RemotePlay.of(GREEDY, server)
        path = write_remotely(server, settings, GIVEN, 256, ALL, 4, lambda count: None)
    facts = check_text(path, GREEDY)
    assert facts.settings[0]["writer"] == "tiny" and facts == read_facts(path)
    assert facts.counts.answer_tokens == sum(number >= 0 for written in read_text(path) for number in written.answers)
    assert own_share(TargetStates(target(), (1, 2, 4)), text_examples([path], 200)) == 1.0
    with pytest.raises(EyasError, match=r"the target finds only \d+% likeliest itself: another model is served there"):
        own_share(TargetStates(tiny_target(5, vocab_size=263), (1, 2, 4)), text_examples([path], 200))


# ---- faults ----


def broken(number: int, path: str) -> Reply | None:
    """Two requests of three go wrong, in five ways."""
    ways = [
        Reply(503, {"error": {"message": "loading"}}, (("Retry-After", "0.02"),)),
        Reply(CUT, '{"choices": ['),
        Reply(429, "slow down"),
        Reply(500, {"error": "oh"}),
        Reply(502, ""),
    ]
    return None if number % 3 == 0 or path != "/v1/completions" else ways[number % len(ways)]


def test_what_may_be_answered_later_is_asked_again(monkeypatch):
    monkeypatch.setattr(http_json, "TRIES", 200)  # so that it does not hang on which of four threads meets which fault
    assert written_by(Engine(target(), fault=broken)) == written_by(Engine(target()))


def test_an_engine_is_waited_for_as_long_as_it_asks():
    def busy(number, path):
        return Reply(429, "", (("Retry-After", "0.3"),)) if number == 2 else None

    began = time.monotonic()
    with served(Engine(target(), fault=busy)) as url:
        assert server_of(url).reads_ids
    assert time.monotonic() - began >= 0.3


def test_an_engine_that_does_not_answer_in_time_is_asked_once_more():
    engine = Engine(target())
    engine.slow = 0.5
    with served(engine) as url, pytest.raises(Unanswered, match=r"/v1/completions did not answer in 0\.05 s"):
        server_of(url, timeout=0.05)
    assert engine.count("/v1/completions") == 2


@pytest.mark.parametrize("last", [7, 12])
def test_a_server_that_stops_half_way_is_gone_on_with(last):
    """What was written is kept and said; another run writes the rest alone, and all is as if it had never stopped."""
    wanted = written_by(Engine(target()))
    folder = data_folder(REMOTE)
    (folder / JOURNAL).unlink()
    stopping = Engine(target(), fault=lambda number, path: Reply(500, {"error": {"message": "engine died"}}) if number > last else None)
    with pytest.raises(
        EyasError, match=r"answered 500 \(engine died\); \d+ answer tokens are kept, and the same command goes on with them"
    ):
        written_by(stopping, at_once=2)
    kept = len(Journal(folder / JOURNAL).noted)
    assert 0 < kept < len(GIVEN)
    engine = Engine(target())
    assert written_by(engine) == wanted
    assert engine.count("/v1/completions") < 2 * (len(GIVEN) - kept) + 2
    assert written_by(again := Engine(target())) == wanted and again.count("/v1/completions") == 1  # which asks what it is


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path):
    wanted = written_by(Engine(target()))
    (path,) = tmp_path.rglob(JOURNAL)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert written_by(Engine(target())) == wanted
    lines = path.read_text().splitlines()
    assert len(lines) == len(GIVEN) + 1 and sorted(lines)[1:] != lines  # the torn one stays, and is left out


def test_ctrl_c_ends_what_is_under_way_and_keeps_the_rest(tmp_path):
    engine = Engine(target())
    with served(engine) as url:
        server = server_of(url)
        settings = RemotePlay.of(GREEDY, server)

        def slower(count: int) -> None:
            engine.slow = 60.0 if count else 0.0
            if count and engine.under_way == 4:
                raise KeyboardInterrupt

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            write_remotely(server, settings, GIVEN, 256, ALL, 4, slower)
        assert time.monotonic() - began < 30
        (path,) = tmp_path.rglob(JOURNAL)
        assert 0 < len(Journal(path).noted) < len(GIVEN)
        with pytest.raises(Unanswered, match="is not asked any more"):
            server.api.call("/v1/models")


# ---- another server than the one that is wanted ----


@pytest.mark.parametrize(
    "url", ["nonsense", "127.0.0.1:8000", "ftp://x", "http://", "http://a:b", "http://a b", "http://[x", "http://a?b=c", "http://u:p@a"]
)
def test_what_is_no_address_is_one_line(url):
    with pytest.raises(EyasError, match=r"--writer .* is no address of an engine; give one like http://127\.0\.0\.1:8000"):
        checked_url("--writer", url)


def test_an_address_may_end_as_openai_writes_it():
    assert checked_url("--writer", "http://localhost:8000/v1/") == "http://localhost:8000"
    assert checked_url("--writer", "https://there/under/v1") == "https://there/under"


def test_nothing_there_is_said_at_once():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(EyasError, match=r"/v1/models cannot be reached \(.*refused.*\); give the address of a running engine"):
            server_of(f"http://127.0.0.1:{held.getsockname()[1]}")
        assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"answered 401 \(wants a key\); put the key that it wants into EYAS_WRITER_KEY"),
        (404, r"answered 404 \(wants a key\); is this an OpenAI-compatible engine\?"),
        (418, r"answered 418 \(wants a key\)$"),
        (503, r"answered 503 \(wants a key\)$"),
    ],
)
def test_an_engine_that_refuses_is_one_line(status, said):
    engine = Engine(target(), fault=lambda number, path: Reply(status, {"error": {"message": "wants\na  key"}}))
    with served(engine) as url, pytest.raises(EyasError, match=said):
        server_of(url)
    assert len(engine.asked) == (http_json.TRIES if status == 503 else 1)


def test_a_key_is_sent_with_every_request():
    engine = Engine(target())
    with served(engine) as url:
        check_server(server_of(url, key="secret"))
    assert engine.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    ("models", "wanted", "said"),
    [
        ([], None, "lists no model; is this an OpenAI-compatible engine"),
        ({"a": 3}, None, "lists no model"),
        ([{"id": "a"}, {"id": "b"}], None, "serves 2 models; say with --writer-model which is the target: a, b"),
        ([{"id": "a"}], "b", "serves no model b; it serves a"),
    ],
)
def test_a_model_that_is_not_served_is_one_line(models, wanted, said):
    engine = Engine(target())
    engine.models = models
    with served(engine) as url, pytest.raises(EyasError, match=said):
        server_of(url, wanted)


def test_one_of_several_models_is_asked():
    engine = Engine(target())
    engine.models = [{"id": "a"}, {"id": "b"}]
    with served(engine) as url:
        assert server_of(url, "b").model == "b"
    assert engine.asked[-1][1]["model"] == "b"


OTHER_TEMPLATE = CHATML.replace("You are a helpful assistant", "You are a helpful hawk")
DIFFERENCE = r"token 26 of a question is \d+ \('h'\) there and \d+ \('a'\) here; start it with the target's own"


@pytest.mark.parametrize(("kind", "said"), [("vllm", DIFFERENCE), ("llamacpp", DIFFERENCE)])
def test_another_chat_template_is_refused_with_the_first_difference(kind, said):
    engine = Engine(target(), kind)
    engine.template = Template(byte_tokenizer(OTHER_TEMPLATE), (END,))
    with served(engine) as url, pytest.raises(EyasError, match=f"has another chat template than the target: {said}"):
        check_server(server_of(url))


def test_another_tokenizer_is_refused_with_the_first_difference():
    engine = Engine(target())
    engine.template = Template(byte_tokenizer(merges=[("o", "u")]), (END,))
    with (
        served(engine) as url,
        pytest.raises(EyasError, match="another tokenizer than the target: token 0 of a question is 257"),
    ):
        check_server(server_of(url))


def test_where_an_engine_tells_no_tokens_they_are_counted():
    engine = Engine(target(), "plain")
    engine.says = "Hm."
    with served(engine) as url:
        check_server(server_of(url))
        engine.template = Template(byte_tokenizer(OTHER_TEMPLATE), (END,))
        with pytest.raises(EyasError, match=r"reads 1\d\d tokens where the target's chat template makes 1\d\d: it has another template"):
            check_server(server_of(url))


def test_a_template_that_writes_the_date_may_write_that_of_today():
    dated = CHATML.replace("You are", "{{ strftime_now('%d %b %Y') }} You are")
    own = Template(byte_tokenizer(dated), (END,))
    engine = Engine(target())
    engine.template = own
    with served(engine) as url:
        check_server(Server(Api(url), own))


# ---- answers that are none ----


def completions(body):
    return lambda number, path: Reply(200, body) if path == "/v1/completions" and number > 2 else None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("hello", "gives no text; is it an OpenAI-compatible engine"),
        ({"choices": []}, "gives no text"),
        ({"choices": [{"text": 3}]}, "gives no text"),
        ({"choices": [{"text": "", "finish_reason": "length"}]}, "gives no text, and does not say that it has ended"),
        (
            {"choices": [{"text": "", "finish_reason": "stop"}]},
            "gives no text to speak of: 5 conversations in a row were dropped as too short",
        ),
        ({"choices": [{"text": "a", "token_ids": [999]}]}, "writes token 999, and the target's tokenizer has 263: it serves another model"),
        ({"choices": [{"text": "a", "token_ids": [3, "a"]}]}, "writes token a, and the target's tokenizer has 263"),
        ({"choices": [{"text": "a", "token_ids": "abc"}]}, "writes token abc, and"),
    ],
)
def test_an_engine_that_gives_nothing_usable_is_one_line(monkeypatch, body, said):
    monkeypatch.setattr(remote_writer, "SHORT", 5)
    with pytest.raises(EyasError, match=f"{said}.*; 0 answer tokens are kept") as told:
        written_by(Engine(target(), fault=completions(body)))
    assert "\n" not in str(told.value)


def test_an_engine_that_keeps_its_thoughts_apart_is_refused():
    def thinking(number, path):
        message = {"content": "a", "reasoning_content": "hm"}
        return Reply(200, {"choices": [{"message": message, "finish_reason": "stop"}]}) if path == "/v1/chat/completions" else None

    with pytest.raises(EyasError, match="takes thoughts out of its answers; start it without a parser of reasoning"):
        written_by(Engine(target(), "chat", thinking))
