"""How a running engine's acceptance is read: vLLM's metrics, llama.cpp's timings, SGLang's server info."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eyas.config import EyasError, TreeShape
from eyas.diagnose.served import ask, compare
from eyas.formats.export import export
from eyas.formats.layouts import find
from eyas.formats.portable import TargetFiles, own_draft
from eyas.measure.agreement import QUESTIONS
from tests.tiny import save_tiny_draft, save_tiny_target


class Engine:
    """A server that answers as one of the engines does; every answer drafts 6 rounds of 3 tokens and accepts 4."""

    def __init__(self, kind: str, prompt_tokens: int = 7, tree: str = "") -> None:
        self.kind, self.answered, self.prompt_tokens, self.tree = kind, 0, prompt_tokens, tree

    def page(self, path: str) -> object:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path == "/metrics" and self.kind == "vllm":
            lines = [("drafts", 6), ("draft_tokens", 18), ("accepted_tokens", 4)]
            told = [f'vllm:spec_decode_num_{name}_total{{engine="0"}} {100 + number * self.answered}.0' for name, number in lines]
            return "\n".join(["# HELP x", *told, 'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 9.0', ""])
        if path == "/get_server_info" and self.kind == "sglang":
            return {"speculative_algorithm": "EAGLE3", "speculative_num_steps": 3, "internal_states": [{"avg_spec_accept_length": 1.5}]}
        if path == "/server_info" and self.kind == "sglang tree":
            tree = {"speculative_num_steps": 3, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}
            return {"speculative_algorithm": "EAGLE3", **tree, "internal_states": [{"avg_spec_accept_length": 1.9}]}
        if path == "/props" and self.tree:
            return {"eyas": {"tree": self.tree}}
        return None

    def answer(self) -> dict[str, object]:
        self.answered += 1
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": 11}
        return {"usage": usage} | ({"timings": {"draft_n": 18, "draft_n_accepted": 4}} if self.kind == "llama.cpp" else {})


@pytest.fixture
def serve():
    servers = []

    def begun(engine: Engine) -> str:
        class Handler(BaseHTTPRequestHandler):
            def reply(self, told: object) -> None:
                held = told.encode() if isinstance(told, str) else json.dumps(told).encode()
                self.send_response(404 if told is None else 200)
                self.end_headers()
                self.wfile.write(held)

            def do_GET(self) -> None:
                self.reply(engine.page(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["temperature"] == 0 and body["model"] == "tiny"
                self.reply(engine.answer())

            def log_message(self, *words) -> None:
                return None

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begun
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    "url", ["nonsense", "127.0.0.1:8000", "localhost:8000/v1", "ftp://x", "http://", "http://a:b", "http://a b", "http://[x"]
)
def test_what_is_no_address_is_one_line_before_anything_is_loaded(url):
    with pytest.raises(EyasError, match=r"is no address of an engine; give one like http://127\.0\.0\.1:8000"):
        ask(url)


@pytest.mark.parametrize("models", [[], {"data": {}}, {"data": ["tiny"]}, {"data": [{"id": 3}]}, "hello"])
def test_a_server_that_is_no_engine_is_one_line(serve, models):
    engine = Engine("none")
    engine.page = lambda path: models
    with pytest.raises(EyasError, match="lists no model; is this an OpenAI-compatible engine"):
        ask(serve(engine))


@pytest.mark.parametrize("answer", [{"usage": [], "timings": 3}, {"usage": {"prompt_tokens": "many"}}, {"usage": None}])
def test_an_engine_that_counts_in_another_way_is_said_to_tell_nothing(serve, answer):
    engine = Engine("none")
    engine.answer = lambda: answer
    served = ask(serve(engine))
    assert served.tau is None and served.new_tokens == 0


@pytest.mark.parametrize(("kind", "tau"), [("vllm", 1 + 4 / 6), ("llama.cpp", 1 + 4 / 6), ("sglang", 1.5)])
def test_each_engine_is_understood(serve, kind, tau):
    served = ask(serve(Engine(kind)) + "/v1")
    assert served.tau == pytest.approx(tau)
    assert served.shape == TreeShape.chain(3) and len(served.prompt_tokens) == len(QUESTIONS) and served.new_tokens == 11 * len(QUESTIONS)


def test_a_tree_of_sglang_is_compared_with_a_tree(serve):
    served = ask(serve(Engine("sglang tree")))
    assert (served.tau, served.shape) == (1.9, TreeShape(8, 2, 4))


@pytest.mark.parametrize(("tree", "shape"), [("8x2x3", TreeShape(8, 2, 3)), ("auto", TreeShape.chain(3)), ("[", TreeShape.chain(3))])
def test_a_tree_of_ours_is_taken_from_the_servers_settings(serve, tree, shape):
    assert ask(serve(Engine("llama.cpp", tree=tree))).shape == shape


def test_an_engine_that_tells_nothing_is_said_so(serve):
    assert ask(serve(Engine("other"))).tau is None


def test_an_address_where_nothing_runs_gives_one_line():
    with pytest.raises(EyasError, match="cannot be reached"):
        ask("http://127.0.0.1:9")


def test_another_template_and_another_acceptance_are_named(serve, tmp_path):
    save_tiny_target(tmp_path / "target", num_hidden_layers=8)
    save_tiny_draft(tmp_path / "draft", tmp_path / "target", taps=None)
    target = TargetFiles.of(tmp_path / "target")
    export(own_draft(tmp_path / "draft"), tmp_path, "speculators", tmp_path / "there", target, None, force=False)
    draft = find(tmp_path / "there").resolved(8)  # what is served, not what eyas wrote
    told = compare(serve(Engine("vllm")), draft, target)
    assert told["differs"] and told["lines"][0].startswith("chat template: it reads 7 tokens where the target's template makes")
    assert told["tau"] == pytest.approx(1 + 4 / 6, abs=1e-3) and 1 <= told["ours"] < 1.5
    assert "more than rounding explains" in told["lines"][-1]
