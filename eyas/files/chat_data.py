"""Conversations as people write them, in one form: OpenAI's messages, whatever spelling, form or fields they came in.

Knows rows (the objects of a data file) and messages; knows no files, no tokenizers and no templates. What is read, and what becomes of it,
are the lists below; docs/data.md shows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from eyas.config import EyasError, short

# {"role", "content"} and, where there are such, "name", "tool_calls", "tool_call_id", "reasoning_content". `content` is text; None only
# beside tool calls.
Message = dict[str, Any]

ROLES = {
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the turn's text is the call, as JSON
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "trainable", "training", "train", "loss", "loss_mask")
MESSAGE_FIELDS = {
    "role, from": "who speaks, in any letter case",
    "content, value": "the text; text parts of a list are joined by a line break, parts of another type are refused",
    ", ".join(REASONING): "what was thought before the answer; so is a part of type reasoning or thinking",
    "tool_calls, function_call": "the calls, or their JSON text, with arguments as JSON text or as an object",
    "tool_call_id": "handed to the template",
    "name": "who speaks, for the template; a tool's need not be shown, since its call has it",
    ", ".join(MARKS): "0 or false: the turn is read and not learned; 1 or true: it is, if it is an answer",
}
MESSAGE_KEYS = {key for keys in MESSAGE_FIELDS for key in keys.split(", ")}
IGNORED_MESSAGE_KEYS = ("id", "index", "timestamp", "model", "finish_reason", "annotations")  # known to change nothing


class Conversation(list[Message]):
    """The messages of a conversation, and what is said beside them.

    `text` is set, and there are no messages, where the row is text in the target's own form already.
    """

    def __init__(self, messages: Iterable[Message] = (), tools: list[dict[str, Any]] | None = None, text: str | None = None) -> None:
        super().__init__(messages)
        self.tools, self.text = tools, text
        self.variables: dict[str, Any] = {}  # of the chat template, such as enable_thinking
        self.kept = False  # whether its text is kept: a template then writes the same date on every day
        self.not_learned: set[int] = set()  # indices of messages that are marked as not to be learned
        self.unread: set[str] = set()  # fields whose meaning is not known
        self.place = ""  # in its file: "line 3"

    def with_messages(self, messages: Iterable[Message]) -> Conversation:
        """Other messages under the same tools and variables."""
        other = Conversation(messages, self.tools)
        other.variables, other.kept = self.variables, self.kept
        return other

    def with_tools(self, tools: list[dict[str, Any]] | None) -> Conversation:
        other = self.with_messages(self)
        other.tools = tools
        return other


# ---- one message ----


def message(turn: Any, number: int) -> Message:
    """A message in OpenAI's form from any that is known; `number` counts from 1 and is for the error.

    Raises EyasError for an unknown role, content that is no text, and tool calls that name no function.
    """
    where = f"message {number}"
    if not isinstance(turn, Mapping):
        raise EyasError(f"{where} is not a JSON object")
    role = role_of(turn, where)
    content, thought = text_and_thought(one_of(turn, ("content", "value"), where), where)
    calls = calls_of(turn, where)
    if role in CALL_ROLES and content and (said := calls_in(content)):
        calls, content = [*calls, *said], None
    thought = next((turn[key] for key in REASONING if turn.get(key)), thought)
    if content is None and not calls and not (thought and ROLES[role] == "assistant"):
        raise EyasError(f"{where} has no content")
    found: Message = {"role": ROLES[role], "content": content if content is not None or calls else ""}
    if thought:
        found["reasoning_content"] = text_of(thought, f"{where}'s reasoning")
    if calls:
        found["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            found[key] = text_of(turn[key], f'{where}\'s "{key}"')
    return found


def role_of(turn: Mapping[str, Any], where: str) -> str:
    """A message's role in its own spelling, in lower case."""
    spelled = [turn[key] for key in ("role", "from") if turn.get(key) is not None]
    if not spelled:
        raise EyasError(f"{where} does not say who speaks: it has no role or from, but {', '.join(map(short, turn)) or 'nothing'}")
    roles = [said.lower() if isinstance(said, str) else None for said in spelled]
    for role, said in zip(roles, spelled, strict=True):
        if role not in ROLES:
            raise EyasError(f"{where} has the unknown role {short(said)}; known are {', '.join(ROLES)}")
    if len({ROLES[str(role)] for role in roles}) > 1:
        raise EyasError(f"{where} has two roles, {' and '.join(map(short, spelled))}; keep one")
    return str(roles[0])


def one_of(turn: Mapping[str, Any], keys: Sequence[str], where: str) -> Any:
    """What a message says under one of two names; None: nothing. Raises EyasError where it says two different things."""
    said = {key: turn[key] for key in keys if turn.get(key) is not None}
    first, *others = said.values() or [None]
    if any(other != first for other in others):
        raise EyasError(f"{where} says two different things as {' and '.join(said)}; keep one")
    return first


def text_and_thought(content: Any, where: str) -> tuple[str | None, str | None]:
    """The text of a message's content, and the thoughts among its parts; None for each that there is not."""
    if content is None or isinstance(content, str):
        return content if content is None else encodable(content, where), None
    if not isinstance(content, list):
        raise EyasError(f"{where} has content that is not a string")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("reasoning", "thinking"):
            thoughts.append(text_of(part.get("thinking", part.get("reasoning", part.get("text"))), f"{where}'s part of type {kind}"))
        elif kind in (None, "text", "input_text", "output_text") and isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            told = "that is no text" if kind is None else f"of type {short(kind)}"
            raise EyasError(f"{where} has a part {told}; only text is read")
    return encodable("\n".join(texts), where) if texts or not thoughts else None, "\n".join(thoughts) or None


def calls_of(turn: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The tool calls of a message, each as {"type": "function", "function": {"name", "arguments"}} with its "id" where it has one."""
    found = parsed(turn.get("tool_calls")) or []
    if not isinstance(found, list):
        raise EyasError(f"{where} has tool_calls that are not a list")
    calls = [call_of(call, where) for call in [*found, *([turn["function_call"]] if turn.get("function_call") else [])]]
    encodable(json.dumps(calls, ensure_ascii=False), f"{where}'s tool call")
    return calls


def call_of(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments", function.get("parameters")) if isinstance(function, Mapping) else None
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, str | dict):
        raise EyasError(f'{where} has a tool call that is not {{"function": {{"name": .., "arguments": ..}}}}')
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls_in(text: str) -> list[dict[str, Any]]:
    """The calls that a text consists of; none where it is other text than JSON of calls."""
    try:
        found = json.loads(text)
        return [call_of(call, "the turn") for call in (found if isinstance(found, list) else [found])]
    except (ValueError, RecursionError):  # EyasError is a ValueError
        return []


def parsed(value: Any) -> Any:
    """What JSON text holds, as parquet files often have it; anything else is left as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EyasError(f"{where} is not a string")
    return encodable(value, where)


def encodable(text: str, where: str) -> str:
    """The text itself, unless it holds half of a surrogate pair: JSON and a terminal can spell them, no tokenizer can encode them."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise EyasError(f"{where} holds half of a surrogate pair, which is no text; take it out")
    return text


# ---- what stands beside the messages ----


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Tools on offer in OpenAI's form: a list of functions, bare or wrapped; it and each of them may be JSON text. None where none is
    offered."""
    value = parsed(value)
    if isinstance(value, str) and value.strip():
        raise EyasError('"tools" is text that is not JSON')
    if not value or isinstance(value, str):
        return None
    value = [parsed(tool) for tool in value] if isinstance(value, list) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) and (tool.get("function") or tool.get("name")) for tool in value):
        raise EyasError('"tools" is not a list of functions with names')
    encodable(json.dumps(value, ensure_ascii=False), '"tools"')
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in value]


def mark_of(holder: Mapping[str, Any], where: str) -> bool | None:
    """Whether a message or row is marked to be learned; None where it is not marked."""
    for key in MARKS:
        value = holder.get(key)
        if value is not None and not isinstance(value, list):
            if value not in (0, 1):
                raise EyasError(f'{where} has "{key}" {short(value)}; only 0 and 1 (false and true) can be honoured')
            return bool(value)
    return None


def marks_of(row: Mapping[str, Any], conversation: Sequence[Message]) -> list[bool | None]:
    """A row's marks for each of its messages, from a list with one for each message or each answer, or from one mark for all."""
    key = next((key for key in MARKS if isinstance(row.get(key), list)), None)
    if key is None:
        return [mark_of(row, "the row")] * len(conversation)
    marks = [mark_of({key: mark}, "the row") for mark in row[key]]
    answers = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    if len(marks) == len(conversation):
        return marks
    if len(marks) != len(answers):
        raise EyasError(f'"{key}" has {len(marks)} marks for {len(conversation)} messages and {len(answers)} answers')
    by_answer = dict(zip(answers, marks, strict=True))
    return [by_answer.get(index) for index in range(len(conversation))]


# ---- a row ----


class Form(NamedTuple):
    """One way in which a row holds a conversation."""

    name: str
    keys: str  # the fields by which it is told apart
    becomes: str
    read: Callable[[Mapping[str, Any]], tuple[list[Any], set[str]] | None]  # turns and the keys that were read; None: another form


CHAT_KEYS = ("messages", "conversations", "conversation")  # OpenAI's and ShareGPT's
QUESTIONS, ANSWERS = ("prompt", "question", "query", "input"), ("completion", "response", "answer", "output")
CONTEXTS = ("input", "context")  # of an instruction
TEXT_KEY = "text"
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
VARIABLES = "chat_template_kwargs"
ROW_FIELDS = {
    ", ".join(SYSTEMS): "the system message, before the turns",
    ", ".join(TOOLS): "the tools on offer: a list of functions, bare or wrapped; the list, or each of them, may be JSON text",
    ", ".join(MARKS): "as in a message, for all turns; or a list with one mark for each message or each answer",
    VARIABLES: "variables of the chat template for this row",
}
REFUSED_KEYS = {
    "chosen": "a pair of answers to prefer one of; keep the chosen one as messages",
    "rejected": "a pair of answers to prefer one of; keep the chosen one as messages",
    **dict.fromkeys(("images", "image", "videos", "audios", "audio"), "more than text; only text is read"),
}
IGNORED_KEYS = (  # known to change nothing of the text
    *("id", "idx", "index", "uuid", "conversation_id", "prompt_id", "question_id", "source", "dataset", "category", "domain", "task"),
    *("language", "lang", "model", "title", "created", "timestamp", "hash", "tags", "metadata", "meta", "num_turns"),
)


def first_of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if row.get(key) is not None), None)


def chat(row: Mapping[str, Any]) -> tuple[list[Any], set[str]] | None:
    key = next((key for key in CHAT_KEYS if row.get(key)), first_of(row, CHAT_KEYS))  # one that is empty stands for another
    return None if key is None else (turns_of(row[key], key), {key})


def turns_of(value: Any, key: str) -> list[Any]:
    value = parsed(value)
    if not isinstance(value, list):
        raise EyasError(f'"{key}" is not a list')
    if not value:
        raise EyasError(f'"{key}" is empty')
    return value


def instruction(row: Mapping[str, Any]) -> tuple[list[Any], set[str]] | None:
    answer, context = first_of(row, ANSWERS), first_of(row, CONTEXTS)
    if row.get("instruction") is None or answer is None:
        return None
    more = text_of(row[context], f'"{context}"') if context else ""
    asked = "\n".join(part for part in (text_of(row["instruction"], '"instruction"'), more) if part)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise EyasError('"history" is not a list of [question, answer]')
    pairs = [*history, [asked, text_of(row[answer], f'"{answer}"')]]
    turns = [turn for question, reply in pairs for turn in (said("user", question), said("assistant", reply))]
    return turns, {"instruction", answer, "history", *((context,) if context else ())}


def pair(row: Mapping[str, Any]) -> tuple[list[Any], set[str]] | None:
    question, answer = first_of(row, QUESTIONS), first_of(row, ANSWERS)
    if question is None or answer is None:
        return None
    asked, replied = row[question], row[answer]
    turns = turns_of(asked, question) if isinstance(asked, list) else [said("user", asked)]
    return turns + (turns_of(replied, answer) if isinstance(replied, list) else [said("assistant", replied)]), {question, answer}


def said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


FORMS = (
    Form("chat", f"{' or '.join(CHAT_KEYS)}: a list, or its JSON text", "its turns, in OpenAI's form or ShareGPT's", chat),
    Form(
        "instruction (Alpaca, Dolly)",
        f"instruction and {' or '.join(ANSWERS)}; {' or '.join(CONTEXTS)} and history where there are such",
        "earlier pairs of history, then a question (instruction, line break, input) and its answer",
        instruction,
    ),
    Form(
        "question and answer",
        f"{' or '.join(QUESTIONS)}, and {' or '.join(ANSWERS)}: each text, or a list of turns",
        "a user's turn and its answer, or those turns joined",
        pair,
    ),
)
TEXT_FORM = (
    "preformatted text",
    TEXT_KEY,
    "nothing is rendered: answers are found by what this target's template writes around them. Where the target has no template, all of it "
    "is learned as plain text",
)


def messages_of(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation in a row, in whatever form; None where it holds none. Raises EyasError for one that cannot be used as it is."""
    for key, reason in REFUSED_KEYS.items():
        if row.get(key):
            raise EyasError(f'"{key}" is {reason}')
    for form in FORMS:
        found = form.read(row)
        if found is not None:
            return conversation_in(row, *found)
    if row.get(TEXT_KEY) is None:
        return None
    conversation = Conversation(text=text_of(row[TEXT_KEY], f'"{TEXT_KEY}"'))
    conversation.unread = unread_keys(row, {TEXT_KEY})
    return conversation


def conversation_in(row: Mapping[str, Any], turns: list[Any], read: set[str]) -> Conversation:
    """Turns as they stand in a row, and all that the row says beside them."""
    messages = [message(turn, number) for number, turn in enumerate(turns, start=1)]
    system = first_of(row, SYSTEMS)
    told = text_of(row[system], f'"{system}"') if system else ""
    own = [mark_of(turn, f"message {number}") for number, turn in enumerate(turns, start=1)]
    marks = [mark if mark is not None else other for mark, other in zip(own, marks_of(row, messages), strict=True)]
    if told and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] != told:
            raise EyasError(f'it begins with a system message and has another as "{system}"; keep one')
    elif told:
        messages, marks = [said("system", told), *messages], [None, *marks]
    offered = first_of(row, TOOLS)
    conversation = Conversation(messages, tools_of(row[offered]) if offered else None)
    conversation.not_learned = {index for index, mark in enumerate(marks) if mark is False}
    variables = row.get(VARIABLES) or {}
    if not isinstance(variables, dict):
        raise EyasError(f'"{VARIABLES}" is not an object')
    conversation.variables = variables
    conversation.unread = unread_keys(row, read | {*SYSTEMS, *TOOLS, *MARKS, VARIABLES})
    for turn in turns:
        unknown = {key for key, value in turn.items() if value not in (None, "", [], {})} - MESSAGE_KEYS - {*IGNORED_MESSAGE_KEYS}
        conversation.unread |= {f'"{key}" of a message' for key in map(str, unknown)}
    return conversation


def unread_keys(row: Mapping[str, Any], read: set[str]) -> set[str]:
    return {f'"{key}"' for key, value in row.items() if value not in (None, "", [], {}) and key not in read and key not in IGNORED_KEYS}
