"""What one client library of OpenAI's API is asked to do; run in that library's own environment by client_checks.py.

    python client_calls.py CLIENT ADDRESS BUSY        ADDRESS: of a server; BUSY: of one with a single slot and no queue

Prints a line for each claim, "ok" or "FAILED" first. Imports nothing of eyas.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.request import Request, urlopen

from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "Tell me about hawks."}]
LAW: dict[str, Any] = {"max_tokens": 40, "seed": 1}
CITIES = ["Ghent", "Lyon"]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": CITIES}}, "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}}
LONG, PATIENCE = 2000, 60  # tokens of a stream that is left; seconds for which a request may be on its way


class Sighting(BaseModel):
    """What was seen."""

    bird: Literal["hawk", "owl"]
    count: int = Field(ge=1, le=20)


FORM = {"type": "json_schema", "json_schema": {"name": "sighting", "strict": True, "schema": Sighting.model_json_schema()}}


class OpenAI:
    """openai for Python, the old and the new."""

    package = "openai"

    def __init__(self, address: str, retries: int) -> None:
        import openai

        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries, timeout=120)

    def create(self, **more: Any) -> Any:
        return self.client.chat.completions.create(model="eyas", messages=QUESTION, **LAW | more)

    def whole(self) -> str:
        return self.create().choices[0].message.content

    def pieces(self, **more: Any) -> Iterator[str]:
        with self.create(stream=True, **more) as stream:
            for chunk in stream:
                yield chunk.choices[0].delta.content or ""

    def tool(self) -> Any:
        (call,) = self.create(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
        return json.loads(call.function.arguments)["city"]

    def form(self) -> Any:
        found = self.client.chat.completions.parse(model="eyas", messages=QUESTION, response_format=Sighting, **LAW)
        return found.choices[0].message.parsed

    def wrong(self) -> None:
        self.create(temperature=7)


class LiteLLM:
    package = "litellm"

    def __init__(self, address: str, retries: int) -> None:
        import litellm

        self.module = litellm
        self.usual = {"model": "openai/eyas", "api_base": f"{address}/v1", "api_key": "none", "messages": QUESTION, "max_retries": retries}

    def create(self, **more: Any) -> Any:
        return self.module.completion(**self.usual | LAW | more)

    def whole(self) -> str:
        return self.create().choices[0].message.content

    def pieces(self, **more: Any) -> Iterator[str]:
        stream = self.create(stream=True, **more)
        try:
            for chunk in stream:
                yield chunk.choices[0].delta.content or ""
        finally:
            if stream.completion_stream is not None:  # it is not at its end
                stream.completion_stream.close()

    def tool(self) -> Any:
        (call,) = self.create(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
        return json.loads(call.function.arguments)["city"]

    def form(self) -> Any:
        return Sighting.model_validate_json(self.create(response_format=FORM).choices[0].message.content)

    def wrong(self) -> None:
        self.create(temperature=7)


class LangChain:
    package = "langchain-openai"

    def __init__(self, address: str, retries: int) -> None:
        from langchain_openai import ChatOpenAI

        def made(**more: Any) -> Any:
            return ChatOpenAI(model="eyas", base_url=f"{address}/v1", api_key="none", max_retries=retries, timeout=120, **LAW | more)

        self.made = made

    def whole(self) -> str:
        return self.made().invoke("Tell me about hawks.").content

    def pieces(self, **more: Any) -> Iterator[str]:
        for chunk in self.made(**more).stream("Tell me about hawks."):
            yield chunk.content

    def tool(self) -> Any:
        found = self.made().bind_tools([TOOL], tool_choice="required").invoke("Which weather?")
        return found.tool_calls[0]["args"]["city"]

    def form(self) -> Any:
        return self.made().with_structured_output(Sighting, method="json_schema").invoke("What is on the roof?")

    def wrong(self) -> None:
        self.made(temperature=7).invoke("Tell me about hawks.")


class LLM:
    """`llm`, as a library: it offers tools and cannot force one, and its streams are read to their end."""

    package = "llm"
    tool = leaves = None

    def __init__(self, address: str, retries: int) -> None:
        folder = Path(tempfile.mkdtemp())
        lines = ["- model_id: eyas", "  model_name: eyas", f'  api_base: "{address}/v1"', "  supports_schema: true"]
        (folder / "extra-openai-models.yaml").write_text("\n".join(lines))
        os.environ["LLM_USER_PATH"] = str(folder)
        import llm

        self.model = llm.get_model("eyas")

    def whole(self) -> str:
        return self.model.prompt("Tell me about hawks.", stream=False, key="none", **LAW).text()

    def pieces(self, **more: Any) -> Iterator[str]:
        yield from self.model.prompt("Tell me about hawks.", key="none", **LAW | more)

    def form(self) -> Any:
        return Sighting.model_validate_json(
            self.model.prompt("What is on the roof?", schema=Sighting, stream=False, key="none", **LAW).text()
        )

    def wrong(self) -> None:
        self.model.prompt("Tell me about hawks.", stop="x" * 300, stream=False, key="none").text()


class Instructor:
    """instructor in its modes that send a schema; JSON mode asks for any object, which a small model need not end."""

    package = "instructor"

    def __init__(self, address: str, retries: int) -> None:
        import instructor
        import openai

        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries, timeout=120)
        modes = instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA
        self.tools, self.forms = (instructor.from_openai(client, mode=mode) for mode in modes)

    def asked(self, client: Any, **more: Any) -> Any:
        asked = [{"role": "user", "content": "What is on the roof?"}]
        return client.chat.completions.create(model="eyas", messages=asked, response_model=Sighting, max_retries=0, **LAW | more)

    def whole(self) -> str:
        return self.asked(self.forms).model_dump_json()

    def pieces(self, **more: Any) -> Iterator[str]:
        """The answer so far, each time: told as what is new of it."""
        asked = [{"role": "user", "content": "What is on the roof?"}]
        found = self.forms.chat.completions.create_partial(model="eyas", messages=asked, response_model=Sighting, **LAW | more)
        *_, last = found
        yield last.model_dump_json()

    def tool(self) -> Any:
        return CITIES[0] if self.asked(self.tools) else None

    def form(self) -> Any:
        return self.asked(self.forms)

    def wrong(self) -> None:
        self.asked(self.forms, temperature=7)


CLIENTS: dict[str, Any] = {
    "openai": OpenAI,
    "openai-old": OpenAI,
    "litellm": LiteLLM,
    "langchain-openai": LangChain,
    "llm": LLM,
    "instructor": Instructor,
}


def said(claim: str, check: Callable[[], Any]) -> None:
    """Print what became of a claim."""
    try:
        wrong = check()
    except Exception as error:
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"FAILED {claim}: {wrong}" if wrong else f"ok {claim}", flush=True)


def refused(client: Any) -> str | None:
    try:
        client.wrong()
    except Exception as error:
        words = ("temperature must be", "stop must be")
        return None if any(each in str(error) for each in words) else f"{type(error).__name__}: {error}"
    return "nothing was raised"


def dropped(client: Any) -> str | None:
    """Whether a stream that is left frees the one slot there is."""
    pieces = client.pieces(max_tokens=LONG)
    next(pieces)
    pieces.close()
    return None if client.whole() else "no answer"


def tried_again(client: Any, address: str) -> str | None:
    """Whether a request that finds the server full is sent again until it is not: somebody else holds the slot until one was refused."""
    before = too_many(address)
    body = {"messages": QUESTION, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    answer = urlopen(Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=60)
    answer.readline()

    def leave() -> None:
        until = time.monotonic() + PATIENCE
        while too_many(address) == before and time.monotonic() < until:
            time.sleep(0.05)
        answer.close()

    thread = threading.Thread(target=leave)
    thread.start()
    try:
        found = client.whole()
    finally:
        thread.join()
    return None if found and too_many(address) > before else f"{found!r} after {too_many(address) - before} refusals"


def too_many(address: str) -> int:
    """How many requests were refused with 429."""
    lines = urlopen(f"{address}/metrics", timeout=60).read().decode().splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if "request_failure_total{" in line and 'code="429"' in line)


def main() -> None:
    name, address, busy = sys.argv[1:]
    client, patient = CLIENTS[name](address, 0), CLIENTS[name](busy, 8)
    print(f"version {importlib.metadata.version(client.package)}", flush=True)
    whole = client.whole()
    said("a whole answer", lambda: None if whole else "it is empty")
    said("the same in a stream", lambda: None if "".join(client.pieces()) == whole else "another text")
    if client.tool:
        said("a forced tool", lambda: None if client.tool() in CITIES else "another city")
    said("an answer of a form", lambda: None if Sighting.model_validate(client.form()) else "no form")
    said("a 400 in our words", lambda: refused(client))
    if getattr(client, "leaves", True):
        said("a stream that is left frees its slot", lambda: dropped(patient))
    said("a 429 is tried again", lambda: tried_again(patient, busy))


if __name__ == "__main__":
    main()
