"""Answers of a server against OpenAI's own OpenAPI specification, as llm-comply carries it; run by foreign_suites.py in its environment.

    python openai_spec.py ADDRESS

Prints a line for each answer, "ok" or "FAILED" first. Imports nothing of eyas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import llm_comply
from llm_comply.schema import SpecLoader

SPEC = Path(llm_comply.__file__).parent / "specs" / "openai_chat.json"
SHORT = {"type": "object", "properties": {"bird": {"enum": ["hawk", "owl"]}}, "required": ["bird"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "seen", "parameters": SHORT}}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3, "stop": ["e"], "temperature": 0.7, "top_p": 0.9},
    "log probabilities": {"logprobs": True, "top_logprobs": 5},
    "a form": {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SHORT}}},
    "a forced call": {"tools": [TOOL], "tool_choice": "required"},
    "half a character": {"logprobs": True, "structured_outputs": {"regex": "\N{OWL}\N{EAGLE}"}},
}
TEXTS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "A hawk"},
    "several": {"prompt": ["A hawk", "An owl"], "n": 2},
    "log probabilities": {"prompt": "A hawk", "logprobs": 3},
    "echo": {"prompt": "A hawk", "echo": True},
}

NULLS = ("finish_reason: None is not one of", "usage: None is not of type")  # of pieces: the specification says these nulls in words alone


def asked(address: str, path: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address + path, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return answer.read().decode()


def answers(address: str) -> Iterator[tuple[str, str, Any]]:
    """A name, the schema that it must fit, and an answer or a piece of one."""
    yield "models", "ListModelsResponse", json.loads(asked(address, "/v1/models"))
    for name, more in CHATS.items():
        body = {"model": "eyas", "messages": [{"role": "user", "content": "Tell me of hawks."}], "max_tokens": 24, "seed": 1} | more
        whole = json.loads(asked(address, "/v1/chat/completions", body))
        yield f"chat, {name}", "CreateChatCompletionResponse", whole
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        for line in asked(address, "/v1/chat/completions", body | usage).splitlines():
            if line.startswith("data: {"):
                yield f"chat, {name}, streamed", "CreateChatCompletionStreamResponse", json.loads(line[6:])
    for name, more in TEXTS.items():
        body = {"model": "eyas", "max_tokens": 24, "seed": 1} | more
        yield f"text, {name}", "CreateCompletionResponse", json.loads(asked(address, "/v1/completions", body))


def main() -> None:
    spec, found = SpecLoader(str(SPEC)), dict[str, set[str]]()
    for name, schema, answer in answers(sys.argv[1]):
        wrong = spec.validate(answer, schema)
        found.setdefault(name, set()).update(each for each in wrong if not any(null in each for null in NULLS))
    for name, wrong in found.items():
        print(f"FAILED {name}: {'; '.join(sorted(wrong))[:500]}" if wrong else f"ok {name}")


if __name__ == "__main__":
    main()
