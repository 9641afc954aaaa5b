"""An engine that runs elsewhere as the one that writes: what it is asked for a conversation's next tokens.

vLLM, SGLang and llama.cpp's server are sent token ids and give them back. Another server's text is tokenized here. One that has no
completions, only chat, answers given questions. Knows OpenAI's API and what these engines add to it; knows nothing of files or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eyas.checks import is_number
from eyas.config import EyasError
from eyas.http_json import Api, Unanswered
from eyas.train.dialogue import Conversation, Dialogues, asked_with
from eyas.train.template import Template

KEY = "EYAS_WRITER_KEY"  # the environment's variable that holds what a server asks for as a bearer token
LLAMA_CPP = "llamacpp"  # as its server says that it owns a model
AT_ONCE = 32  # requests under way, where a server does not say how many it answers at once
NOT_THERE = (404, 405, 501)  # statuses of a path that a server does not have
NOT_UNDERSTOOD = (400, 422)  # of a request with fields that it does not know
SEEDS = 2**31  # numbers that servers take as a seed


class Server:
    """A model behind an address, which is asked at once what it is. Raises `EyasError` where nothing is there, or no such model.

    `model`: its name there; None: the only one. `template`: of the target that it is to be.
    """

    def __init__(self, api: Api, template: Template, model: str | None = None) -> None:
        self.api, self.template = api, template
        entries = listed(api)
        self.model = chosen(api.url, list(entries), model)
        entry = entries[self.model]
        self.llama_cpp = entry.get("owned_by") == LLAMA_CPP
        self.context = size(entry.get("max_model_len") or found(entry, "meta", "n_ctx"))  # tokens of a prompt and its answer, if it says so
        self.own = self.own_fields()
        self.reads_ids: bool | None = None  # whether prompts go there as token ids, or as text; None: it has no completions
        self.tells_ids = False  # whether it gives the token ids of what it writes
        self.try_completions()

    @property
    def chat_only(self) -> bool:
        """Whether it has no completions, so that questions must be given."""
        return self.reads_ids is None

    def at_once(self) -> int:
        """How many requests it should have at a time."""
        slots = size(found(self.optional("/props"), "total_slots")) if self.llama_cpp else None
        return slots or AT_ONCE

    def own_fields(self) -> dict[str, Any]:
        """What is asked in a server's own words: token ids, and that it draws and ends as self-play does, whatever it was started with."""
        if self.llama_cpp:
            return {"return_tokens": True, "verbose": True, "min_p": 0.0, "repeat_penalty": 1.0}
        return {"return_token_ids": True, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": sorted(self.template.ends)}

    def try_completions(self) -> None:
        """Find out how prompts are sent. Fields that the server does not know are left out from here on."""
        prompt = self.template.before
        refused: Unanswered | None = None
        for ids, own in ((True, self.own), (True, {}), (False, {})):
            body = {"model": self.model, "prompt": prompt if ids else self.template.tokenizer.decode(prompt), "max_tokens": 1}
            try:
                told = self.api.patiently("/v1/completions", body | own)
            except Unanswered as error:
                if error.status in NOT_THERE:
                    return
                if error.status not in NOT_UNDERSTOOD:
                    raise
                refused = refused or error
                continue
            self.reads_ids, self.own, self.tells_ids = ids, own, bool(ids_in(told))
            return
        assert refused is not None
        raise refused

    def go_on(self, row: Conversation, dialogues: Dialogues, longest: int) -> list[int]:
        """What the model says next in a conversation: at least one token, at most `longest` and the one that ends it, where it ended."""
        (temperature,), (top_p,) = asked_with(dialogues.settings, [row])
        body = {"model": self.model, "max_tokens": longest, "temperature": temperature, "top_p": top_p}
        if self.chat_only:
            told = self.api.patiently("/v1/chat/completions", body | self.chat(row, dialogues))
            text = self.answer_in(told)
        else:
            told = self.api.patiently("/v1/completions", body | self.raw(row, dialogues))
            text = found(told, "choices", 0, "text")
        if not isinstance(text, str):
            raise EyasError(f"{self.api.url} gives no text; is it an OpenAI-compatible engine?")
        ended = found(told, "choices", 0, "finish_reason") == "stop"
        ids = None if self.chat_only else ids_in(told)
        tokens = self.checked(ids) if ids else self.template.tokens(text) + [self.end()] * ended
        if not tokens:
            raise EyasError(f"{self.api.url} gives no text, and does not say that it has ended")
        return tokens

    def raw(self, row: Conversation, dialogues: Dialogues) -> dict[str, Any]:
        """The conversation as a prompt to go on with."""
        tokens = row.tokens + row.waiting
        prompt = tokens if self.reads_ids else self.template.tokenizer.decode(tokens)
        if not self.own:
            return {"prompt": prompt}
        seed = {"seed": (row.start.seed + len(tokens)) % SEEDS} if self.llama_cpp else {}  # elsewhere a seed a request makes drawing slow
        return {"prompt": prompt, "top_k": dialogues.settings.candidates, **self.own, **seed}

    def chat(self, row: Conversation, dialogues: Dialogues) -> dict[str, Any]:
        """The conversation as messages, of which the last asks what is to be answered now."""
        system = dialogues.questions.given[row.index].system if dialogues.settings.regenerate else None
        messages = [] if system is None else [{"role": "system", "content": system}]
        for number, question in enumerate(row.start.asked[: len(row.answers) + 1]):
            messages.append({"role": "user", "content": self.template.text_of(dialogues.given_tokens(question))})
            if number < len(row.answers):
                messages.append({"role": "assistant", "content": self.template.text_of(row.answer(number))})
        return {"messages": messages} | self.variables()

    def variables(self) -> dict[str, Any]:
        """What a chat request says of the template's variables."""
        return {"chat_template_kwargs": self.template.variables} if self.template.variables else {}

    def answer_in(self, told: Any) -> Any:
        message = found(told, "choices", 0, "message")
        if found(message, "reasoning_content") or found(message, "reasoning"):
            raise EyasError(f"{self.api.url} takes thoughts out of its answers; start it without a parser of reasoning")
        return found(message, "content")

    def checked(self, ids: Any) -> list[int]:
        """Token ids that the server gave. Raises `EyasError` for one that is none of the target's."""
        known, ids = len(self.template.tokenizer), ids if isinstance(ids, list) else [ids]
        for token in ids:
            if not is_number(token, whole=True) or not 0 <= token < known:
                raise EyasError(f"{self.api.url} writes token {token}, and the target's tokenizer has {known}: it serves another model")
        return ids

    def end(self) -> int:
        """The token that stands for an end of which the server tells no token."""
        return (self.template.again or self.template.after or sorted(self.template.ends))[0]

    def optional(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers; None where it has nothing there."""
        try:
            return self.api.patiently(path, body)
        except Unanswered as error:
            if error.status in NOT_THERE or error.status in NOT_UNDERSTOOD:
                return None
            raise


def listed(api: Api) -> dict[str, dict[str, Any]]:
    """What a server says of its models, by their names. Raises `EyasError` where it is no such server."""
    try:
        told = found(api.patiently("/v1/models", absent=False), "data")
    except Unanswered as error:
        if error.status in (401, 403):
            raise EyasError(f"{error}; put the key that it wants into {KEY}") from None
        if error.status in NOT_THERE:
            raise EyasError(f"{error}; is this an OpenAI-compatible engine?") from None
        raise
    told = told if isinstance(told, list) else []
    return {entry["id"]: entry for entry in told if isinstance(entry, dict) and isinstance(entry.get("id"), str)}


def chosen(url: str, names: Sequence[str], wanted: str | None) -> str:
    """The model to ask for."""
    if not names:
        raise EyasError(f"{url}/v1/models lists no model; is this an OpenAI-compatible engine?")
    if wanted is not None and wanted not in names:
        raise EyasError(f"{url} serves no model {wanted}; it serves {', '.join(names)}")
    if wanted is None and len(names) > 1:
        raise EyasError(f"{url} serves {len(names)} models; say with --writer-model which is the target: {', '.join(names)}")
    return wanted or names[0]


def ids_in(told: Any) -> Any:
    """The token ids of a completion, as vLLM and SGLang tell them, or llama.cpp; None where there are none."""
    return found(told, "choices", 0, "token_ids") or found(told, "__verbose", "tokens")


def found(value: Any, *path: str | int) -> Any:
    """What lies at a path of names and numbers; None where nothing does: a server may answer anything."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def size(value: Any) -> int | None:
    """A number above 0; None for anything else."""
    return int(value) if is_number(value) and value > 0 else None
