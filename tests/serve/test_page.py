"""Claims about the page: what it is told are the rounds that were decoded, it loads nothing from elsewhere, and it works in a browser."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import re
import shutil
import threading
import time
from contextlib import contextmanager

import pytest

from eyas.decode.grammar import Grammar
from eyas.serve import watching
from eyas.serve.recording import INDEX, PAGE, page_file, page_with, recording, turn
from eyas.serve.watching import MOST_BEHIND, MOST_WATCHERS, Rounds
from eyas.view.rounds import MOST_CUT
from tests.serve.serving import CHAT, ask, events, listening, served

ROUNDS = "/v1/eyas/rounds"
TREE = {"tree": "8x2x3"}
LAWS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "frequency_penalty": 0.7, "logit_bias": {"65": 4.0}},
]


@contextmanager
def watched(client, server, request, **more):
    """The rounds that a watcher heard by the end of the block. The server takes nothing more in after it."""
    told, before = [], len(server.rounds.watchers)
    thread = threading.Thread(target=lambda: told.extend(events(client.get(ROUNDS, params={"request": request, **more}).text)))
    thread.start()
    while len(server.rounds.watchers) == before:
        time.sleep(0.01)
    yield told
    server.draining = True
    thread.join(30)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_watcher_hears_the_rounds_that_were_decoded(engine, law):
    records = []
    with served(engine) as (client, server):
        body = ask("abab" * 6, **law, eyas=TREE)
        settings = {name: value for name, value in law.items() if name != "logit_bias"} | TREE
        if "logit_bias" in law:
            settings["logit_bias"] = {int(token): bias for token, bias in law["logit_bias"].items()}
        wanted = engine.generate(
            "abab" * 6, seed=5, max_new_tokens=20, method=server.usual.method, generation_config="none", watch=records.append, **settings
        )
        with watched(client, server, "mine") as told:
            client.post(CHAT, json=ask("other", seed=9), headers={"X-Request-Id": "other"})
            answer = client.post(CHAT, json=body, headers={"X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine" and answer.json()["choices"][0]["message"]["content"] == wanted.text
    assert [each["n"] for each in told] == list(range(1, wanted.rounds + 1)) and {each["request"] for each in told} == {"mine"}
    word = server.words.text_and_bytes
    for event, record in zip(told, records, strict=True):
        tree, accepted = record.tree, record.accepted
        assert [[node[0], node[2], node[3]] for node in event["nodes"]] == [
            list(each) for each in zip(tree.tokens, tree.parents, tree.depths, strict=True)
        ]
        assert all(node[1] == word(node[0])[0] for node in event["nodes"]) and event["rows"] == len(tree)
        assert event["path"] == accepted.path and event["bonus"][0] == accepted.bonus
        assert [token for token, _ in event["committed"]] == record.committed
        drawn = [*(tree.tokens[row] for row in accepted.path[1:]), accepted.bonus]
        assert [draw[0][0] for draw in event["draws"]] == drawn
        assert event["before"][-1][1] and event["root"]["id"] == tree.tokens[0]
    assert [told[0]["root"]["id"], *(token for each in told for token, _ in each["committed"])] == wanted.tokens
    assert told[-1]["end"] == wanted.finish_reason and told[0]["end"] is None
    assert all(0 < each["ms"]["first"] < each["ms"]["at"] and each["ms"]["pass"] > 0 for each in told)
    ends = [each["ms"]["end"] for each in told]
    assert ends == sorted(ends) and len({each["slot"] for each in told}) == 1


def test_a_drawn_token_has_the_highest_log_chance_and_noise(engine):
    with served(engine) as (client, server), watched(client, server, "all") as told:
        client.post(CHAT, json=ask(temperature=1.0))
    sums = [[math.log(chance) + noise for _, _, chance, noise in draw] for each in told for draw in each["draws"]]
    assert sums and all(line[0] >= max(line) - 0.01 for line in sums)


def test_guesses_are_told_with_the_noise_that_the_target_drew_with(engine):
    """Behind each row of the walk, with the target's own chance; the one that holds the draw has what is told of the draw."""
    with served(engine) as (client, server), watched(client, server, "all") as told:
        client.post(CHAT, json=ask(temperature=1.0, eyas=TREE, max_tokens=40))
    held = 0
    for each in told:
        nodes = each["nodes"]
        for row, draw, beside in zip(each["path"], each["draws"], each["beside"], strict=True):
            assert sorted(child for child, *_ in beside) == [child for child, node in enumerate(nodes) if node[2] == row]
            sums = {nodes[child][0]: (chance, noise) for child, chance, noise in beside}
            top = math.log(draw[0][2]) + draw[0][3]
            assert all(math.log(chance) + noise <= top + 0.01 for chance, noise in sums.values() if chance)
            if draw[0][0] in sums:
                assert sums[draw[0][0]] == tuple(draw[0][2:])
                held += 1
    assert held == sum(len(each["path"]) - 1 for each in told) > 0


def test_draws_at_every_row_are_told_where_they_are_asked_for(engine):
    with served(engine) as (client, server):
        body = ask(temperature=1.0, eyas=TREE)
        alone = client.post(CHAT, json=body).json()["choices"]
        assert client.get(ROUNDS, params={"request": "a", "draws": "some"}).status_code == 400
        with watched(client, server, "all", draws="all") as told, watched(client, server, "all") as fewer:
            assert client.post(CHAT, json=body).json()["choices"] == alone
    assert len(told) == len(fewer) and not any(each["drawn"] for each in fewer)
    assert any(len(each["nodes"]) > len(each["path"]) for each in told)
    for each in told:
        assert len(each["drawn"]) == len(each["nodes"])
        assert [each["drawn"][row][0] for row in each["path"]] == [draw[0][0] for draw in each["draws"]]


def test_a_guess_is_told_as_copied_where_the_tokens_before_it_were_followed_by_it(engine):
    """And where copying is told, the text says so: the last two tokens before the guess stood earlier, followed by it."""
    with served(engine) as (client, server), watched(client, server, "all") as told:
        client.post(CHAT, json=ask("abab" * 8, temperature=0, logit_bias={"65": 100}, max_tokens=24, eyas=TREE))
        prompt = engine.encode("abab" * 8)
    kinds = {node[5] for each in told for node in each["nodes"][1:]}
    assert kinds == {"draft", "copy"}
    text = [*prompt, told[0]["root"]["id"]]
    for each in told:
        for node in each["nodes"][1:]:
            line, parent = [], node[2]
            while parent > 0:
                line.append(each["nodes"][parent][0])
                parent = each["nodes"][parent][2]
            end = [*text, *line[::-1]][-2:]
            followed = any([*text[at : at + 2]] == end and text[at + 2] == node[0] for at in range(len(text) - 2))
            assert followed or node[5] == "draft"
        text += [token for token, _ in each["committed"]]


def test_what_an_answers_form_forces_is_told_and_watching_moves_no_token(engine):
    form = {"regex": "abcdefgh|abcdefgz (hawk|owl)"}
    with served(engine) as (client, server):
        body = ask(temperature=1.0, structured_outputs=form, eyas=TREE)
        alone = client.post(CHAT, json=body).json()["choices"]
        with watched(client, server, "all") as told:
            assert client.post(CHAT, json=body).json()["choices"] == alone
    assert "form" in {node[5] for each in told for node in each["nodes"][1:]}
    for each in told:
        drawn = [*(each["nodes"][row][0] for row in each["path"][1:]), each["bonus"][0]]
        assert [draw[0][0] for draw in each["draws"]] == drawn


def test_a_form_that_gives_up_off_the_path_fails_nobody_who_is_watched(engine, monkeypatch):
    """Whoever wants the draws at every row asks there for what decoding itself would not."""
    body, started = ask(temperature=1.0, structured_outputs={"regex": "[a-z ]{60}"}, eyas=TREE, max_tokens=40, logprobs=True), Grammar.mask
    with served(engine, "--no-copy") as (client, server):
        alone = client.post(CHAT, json=body).json()["choices"]
        text, gone = engine.encode(alone[0]["message"]["content"], raw=True), []
        prompt = len(engine.encode("How can a hawk see?"))

        def gives_up(self, path):
            if path and path != text[self.known - prompt :][: len(path)]:
                gone.append(path)
                self.given_up[tuple(path)] = "it has too many states"
                return None
            return started(self, path)

        assert len(text) == 40
        monkeypatch.setattr(Grammar, "mask", gives_up)
        with watched(client, server, "all", draws="all") as told:
            assert client.post(CHAT, json=body).json()["choices"] == alone
    assert gone and all(len(each["drawn"]) == len(each["nodes"]) for each in told)


def test_guesses_that_were_grown_and_left_out_are_told(engine):
    """They are no guess of the pass, and none is likelier than what is above it."""
    with served(engine, "--no-copy") as (client, server), watched(client, server, "all") as told:
        client.post(CHAT, json=ask(temperature=1.0, eyas=TREE, max_tokens=40))
    assert any(each["cut"] for each in told)
    for each in told:
        rows = [*each["nodes"], *each["cut"]]
        assert len(each["cut"]) == min(each["left_out"], MOST_CUT)
        paths = {0: ()}
        for row, (token, _, parent, depth, chance, by) in enumerate(rows[1:], 1):
            paths[row] = (*paths[parent], token)
            assert depth == len(paths[row]) and chance <= rows[parent][4] and by == "draft"
        assert len(set(paths.values())) == len(rows)
        kept = min((node[4] for node in each["nodes"][1:]), default=0.0)
        assert all(node[4] <= kept for node in each["cut"])


def test_without_a_name_a_request_goes_by_its_answers_id(engine):
    with served(engine) as (client, server), watched(client, server, "all") as told:
        answer = client.post(CHAT, json=ask(n=2, temperature=1.0))
    assert {each["request"] for each in told} == {answer.json()["id"]} == {answer.headers["x-request-id"]}
    assert {each["choice"] for each in told} == {0, 1}


def test_nothing_is_computed_where_nobody_watches(engine, monkeypatch):
    monkeypatch.setattr(watching, "round_told", lambda *_: 1 / 0)
    with served(engine) as (client, server):
        assert client.post(CHAT, json=ask()).status_code == 200
        with watched(client, server, "another") as told:
            assert client.post(CHAT, json=ask(), headers={"X-Request-Id": "mine"}).status_code == 200
    assert told == []


def test_a_slow_watcher_loses_rounds_and_no_more_than_eight_watch():
    async def claims():
        rounds = Rounds(str, True)
        watcher = rounds.watch("a")
        for number in range(MOST_BEHIND + 9):
            watcher.tell(b"%d" % number)
        await asyncio.sleep(0)
        assert watcher.rounds.qsize() == MOST_BEHIND and not watcher.wants("a")
        assert await watcher.rounds.get() == b"0" and watcher.wants("a") and not watcher.wants("b")
        others = [rounds.watch(None) for _ in range(MOST_WATCHERS - 1)]
        assert all(others) and rounds.watch("b") is None
        rounds.leave(others.pop())
        assert rounds.watch("b")  # nobody holds it: gone at once
        assert len(rounds.watchers) == MOST_WATCHERS - 1

    asyncio.run(claims())


def test_who_may_watch_is_told_in_one_line(engine):
    with served(engine, "--host", "0.0.0.0", "--port", "0", "--api-key", "secret") as (client, server):
        key = {"Authorization": "Bearer secret"}
        assert client.get(ROUNDS, params={"request": "all"}).status_code == 401
        refused = client.get(ROUNDS, params={"request": "all"}, headers=key)
        assert refused.status_code == 403 and "own machine" in refused.json()["error"]["message"]
        assert client.get(ROUNDS, headers=key).status_code == 400
        held = [object() for _ in range(MOST_WATCHERS)]

        class Full:
            def __len__(self) -> int:
                return len(held)

            def __iter__(self):
                return iter(())

        server.rounds.watchers = Full()
        assert client.get(ROUNDS, params={"request": "a"}, headers=key).status_code == 429
        for path in ("/", "/static/page.js"):
            assert client.get(path).status_code == 200  # a page holds no secret


def test_the_page_is_served_from_the_package_and_may_load_from_nowhere_else(engine):
    with served(engine) as (client, _):
        for path in ("/", *(f"/static/{name}" for name in PAGE)):
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith("default-src 'self';")
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/").text == page_file(INDEX) and client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        assert client.get("/static/none.js").status_code == 404 and client.get("/static/..%2fapp.py").status_code == 404


def test_nothing_in_the_page_names_another_place():
    text = "".join(page_file(name) for name in PAGE).replace('"http://www.w3.org/2000/svg"', "")  # a name space, not an address
    assert not re.search(r"\b(https?|wss?):|@import|\burl\(|\bimport\b|\beval\(|innerHTML|[\"'(]//", text)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', text)) == {"static/page.js", "static/page.css", "static/icon.svg"}
    assert set(re.findall(r"fetch\([\"'`]([^?\"'`]+)", text)) == {"v1/models", "v1/chat/completions", "v1/eyas/rounds"}


def test_every_element_that_the_module_asks_for_is_in_the_page():
    asked = set(re.findall(r'\$\("([a-z-]+)"\)', page_file("page.js"))) - {"recording"}
    assert asked <= set(re.findall(r'id="([a-z-]+)"', page_file(INDEX))) and len(asked) > 20


# ---- in a browser ----


def browser_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or browser_path() is None, reason="needs Playwright and Chromium"
)


@contextmanager
def opened(scheme: str = "light", width: int = 1280):
    """A page of a browser, and what it complained about."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        wrong: list[str] = []
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        try:
            yield page, wrong
        finally:
            browser.close()


@pytest.mark.browser
@needs_browser
def test_a_chat_is_seen_round_by_round_and_again_from_its_recording(engine, tmp_path):
    with listening(engine) as address, opened() as (page, wrong):
        page.goto(address)
        page.fill("#limit", "24")
        page.check("#everywhere")
        page.fill("#message", "abab abab abab")
        page.click("#send")
        page.wait_for_function("() => document.querySelector('#status').textContent.includes(' rounds')")
        count = int(page.inner_text("#count"))
        assert count > 1 and page.locator(".turn .round").count() == count
        assert page.inner_text("#where").startswith(f"{count} of {count}:")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#where").startswith(f"{count - 1} of {count}:")
        assert page.get_attribute("#slider", "aria-valuetext") == f"round {count - 1} of {count}"
        assert page.locator("#strokes svg").count() == 2 and page.locator(".draw").count() > 0
        assert page.locator(".soft.drawn").count() > 1 and "draft" in page.inner_text("#times")
        assert "1 text in 1 slot" in page.inner_text("#lanes")
        page.click("#compare")
        page.wait_for_function("() => document.querySelector('#status').textContent.includes('to the last character')")
        with page.expect_download() as saved:
            page.click("#save")
        saved.value.save_as(file := tmp_path / "rounds.json")
        page.fill("#limit", "400")
        page.fill("#message", "once more")
        page.click("#send")
        page.click("#stop")
        page.wait_for_function("() => !document.querySelector('#send').disabled")
        page.reload()
        assert page.inner_text("#count") == "0"
        page.set_input_files("#open", file)
        page.wait_for_function("() => document.querySelector('#where').textContent.startsWith('1 of ')")
        assert int(page.inner_text("#count")) > count and wrong == []


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_file_with_a_recording_opens_from_a_disk(engine, tmp_path, scheme, width):
    with served(engine) as (client, server), watched(client, server, "all") as told:
        answer = client.post(CHAT, json=ask(temperature=1.0, eyas=TREE)).json()["choices"][0]["message"]["content"]
    file = tmp_path / "rounds.html"
    file.write_text(page_with(recording({"model": "tiny", "method": "eagle3"}, turn("<b>&</script>", answer, told))), encoding="utf-8")
    with opened(scheme, width) as (page, wrong):
        page.goto(file.as_uri())
        page.wait_for_function(f"() => document.querySelector('#where').textContent.startsWith('1 of {len(told)}')")
        assert page.inner_text(".prompt") == "<b>&</script>" and not page.is_visible("#ask")
        page.keyboard.press("ArrowRight")
        assert page.locator(".node.hollow").count() == len(told[1]["cut"]) > 0 == page.locator(".node.hollow[data-row]").count()
        assert page.is_visible(".legend .token.hollow") and "left out" in page.inner_text("#strokes")
        assert page.inner_text("#where").startswith("2 of") and "stands in" in page.inner_text("#strokes")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and wrong == []
