"""Whether an engine that runs elsewhere is the target: its tokenizer, its chat template, and what it writes where nothing is drawn.

Knows what servers tell of themselves; knows nothing of what they are asked to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from eyas.checks import is_number
from eyas.config import EyasError
from eyas.files.chat_data import Conversation
from eyas.files.chat_template import TEMPLATE_ERRORS, apply
from eyas.train.features import Example, StateSource
from eyas.train.remote import Server, found, size

QUESTION = "Which of 3 hawks sees\nfarther: d'où vient-elle, (x == 'ß') or 你好?"  # where tokenizers differ
TURNS = [{"role": "user", "content": QUESTION}]
GREEDY = 16  # conversations without chance by which a server's model is told from another
OWN = 0.5  # share of their tokens that is the target's likeliest at least; other kernels and rounding leave more than nine tenths


def check_server(server: Server) -> None:
    """Raise `EyasError` where the server tokenizes or renders a question otherwise than the target does, with the first difference. What
    it does not tell is not known."""
    template = server.template
    text = template.rendered(QUESTION) if template.chat else QUESTION
    compare(server, tokenized(server, text), [template.tokens(text)], "tokenizer", "serve the target there")
    if not template.chat:
        return
    ours = [template.tokens(text), *today(server)]
    theirs = prompt(server, text)
    compare(server, theirs, ours, "chat template", "start it with the target's own")
    if theirs is None and (count := prompt_tokens(server)) is not None and count not in map(len, ours):
        told = f"{server.api.url} reads {count} tokens where the target's chat template makes {len(ours[0])}"
        raise EyasError(f"{told}: it has another template or tokenizer; start it with the target's own")


def compare(server: Server, theirs: Any, ours: Sequence[list[int]], what: str, way: str) -> None:
    """Raise `EyasError` where a server's tokens, if it tells any, are none of those that may be."""
    if not isinstance(theirs, list) or theirs in ours:
        return
    place, pair = next((place, pair) for place, pair in enumerate(zip_longest(theirs, ours[0])) if pair[0] != pair[1])
    there, here = (named(server, token) for token in pair)
    told = f"{server.api.url} has another {what} than the target: token {place} of a question is {there} there and {here} here"
    raise EyasError(f"{told}; {way}")


def named(server: Server, token: Any) -> str:
    known = is_number(token, whole=True) and 0 <= token < len(server.template.tokenizer)
    return f"{token} ({server.template.tokenizer.decode([token])!r})" if known else "none" if token is None else str(token)


def tokenized(server: Server, text: str) -> Any:
    """The server's tokens for a text; None where it does not tell."""
    plain = {"add_special_tokens": False, "add_special": False, "parse_special": True}
    return found(server.optional("/tokenize", {"model": server.model, "prompt": text, "content": text, **plain}), "tokens")


def prompt(server: Server, ours: str) -> Any:
    """The server's tokens for a question that the target's template makes `ours` of; None where it does not tell."""
    body = {"model": server.model, "messages": TURNS, "add_generation_prompt": True, **server.variables()}
    if not server.llama_cpp:
        return found(server.optional("/tokenize", body), "tokens")
    text, first = found(server.optional("/apply-template", body), "prompt"), server.template.tokenizer.bos_token or ""
    if not isinstance(text, str):
        return None
    left_out = first and ours.startswith(first) and not text.startswith(first)  # its tokenizer puts it there
    return server.template.tokens(first + text if left_out else text)


def prompt_tokens(server: Server) -> int | None:
    """How many tokens the server reads for the question; None where it does not tell."""
    told = server.optional("/v1/chat/completions", {"model": server.model, "messages": TURNS, "max_tokens": 1, **server.variables()})
    return size(found(told, "usage", "prompt_tokens"))


def today(server: Server) -> list[list[int]]:
    """What the template makes of the question where it writes the date of today, as a server's does."""
    turns = Conversation(TURNS)
    turns.variables = server.template.variables
    try:
        return [server.template.tokens(apply(server.template.tokenizer, turns, prompt=True))]
    except TEMPLATE_ERRORS:
        return []


def own_share(source: StateSource, examples: Sequence[Example]) -> float | None:
    """Of answers that were written without chance, the share of tokens that the target, as it reads them here, finds likeliest; None where
    there are no such answers. Raises `EyasError` where these are not the target's own words."""
    greedy = [example for example in examples if example.greedy][:GREEDY]
    if not greedy:
        return None
    likeliest = source.states(greedy).target_argmax.tolist()
    tokens = [token for example in greedy for token in [*example.tokens[1:], -1]]
    answers = [number for example in greedy for number in [*example.answers[1:], -1]]
    same = [token == there for token, there, number in zip(tokens, likeliest, answers, strict=True) if number >= 0]
    share = sum(same) / len(same)
    if share < OWN:
        raise EyasError(
            f"of what the server wrote at temperature 0, the target finds only {share:.0%} likeliest itself: another model is served "
            "there; serve the target"
        )
    return share
