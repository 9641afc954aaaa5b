"""Answers in OpenAI's form, whole and in pieces, with what eyas knows beside.

Knows pieces, sequences and JSON's shapes; knows nothing of how they came about, or of HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eyas.decode.sampling import NOISE_VERSION
from eyas.decode.sequence import result_of, tau_of
from eyas.serve.calls import Call, Reader, Said, joined
from eyas.serve.fields import CHAT
from eyas.serve.words import Words

if TYPE_CHECKING:
    from eyas.decode.logprobs import TokenLogprobs
    from eyas.decode.sequence import Result, Sequence
    from eyas.serve.jobs import Ask
    from eyas.serve.scheduler import Piece
    from eyas.serve.watching import Recorder

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One request's answer while it comes."""

    ask: Ask
    model: str
    fingerprint: str
    words: Words
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    offsets: list[int] = field(default_factory=list)  # of each choice, characters whose tokens were told
    readers: list[Reader] = field(default_factory=list)  # of each choice, where tools may be called
    called: list[int] = field(default_factory=list)  # of each choice, calls that were told
    recorder: Recorder | None = None  # what keeps its rounds, where they are to be told; until they were

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.offsets = [len(text) for text in self.ask.echo]
        self.readers = [self.ask.reader() for _ in self.ask.sequences] if self.ask.reader else []
        self.called = [0] * len(self.ask.sequences)

    @property
    def chat(self) -> bool:
        return self.ask.kind == CHAT

    # ---- in one piece ----

    def whole(self) -> dict[str, Any]:
        """The answer once all its sequences have ended."""
        choices = []
        for number, (sequence, echo) in enumerate(zip(self.ask.sequences, self.ask.echo, strict=True)):
            result = result_of(sequence)
            prompt = sequence.prompt_logprobs if sequence.tells_prompt else None
            logprobs = self.logprobs(number, result.logprobs, prompt) if result.logprobs is not None else None
            choice = {"index": number, "logprobs": logprobs, "finish_reason": result.finish_reason}
            if self.chat:
                choice["message"] = self.message(number, result)
                choice["finish_reason"] = self.reason(number, result.finish_reason)
            else:
                choice["text"] = echo + result.text
            choices.append(choice)
        return self.head(choices, "chat.completion" if self.chat else "text_completion") | {
            "usage": self.usage(),
            **self.beside(),
        }

    def message(self, number: int, result: Result) -> dict[str, Any]:
        """What was said, with the calls in it."""
        said: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None, "annotations": []}
        if not self.readers:
            return said
        reader = self.readers[number]
        found, texts = joined([*reader.push(result.text, result.tokens), *reader.finish()]), dict[str, str]()
        for each in found:
            if isinstance(each, Said):
                texts[each.field] = texts.get(each.field, "") + each.text
        calls = [self.call(number, each) for each in found if isinstance(each, Call)]
        return {**said, "content": None if calls else "", **texts, **({"tool_calls": calls} if calls else {})}

    def call(self, number: int, call: Call) -> dict[str, Any]:
        self.called[number] += 1
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}

    def reason(self, number: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.called[number] else reason

    # ---- in pieces ----

    def first(self) -> list[bytes]:
        """What a stream begins with: who speaks, or the text that is repeated, unless that comes with its log probabilities."""
        if self.chat:
            begins = {"role": "assistant", "content": None}
            return [self.chunk([{"index": number, "delta": begins, "logprobs": None, "finish_reason": None}]) for number in self.numbers()]
        alone = [number for number in self.numbers() if self.ask.echo[number] and not self.ask.sequences[number].tells_prompt]
        return [self.chunk([self.text_choice(number, self.ask.echo[number], None, None)]) for number in alone]

    def pieces(self, found: Items[Piece]) -> list[bytes]:
        """What a turn brought, one chunk a choice; a chunk of nothing is not sent."""
        chunks = []
        for piece in found:
            told = piece.prompt_logprobs is not None
            logprobs = self.logprobs(piece.choice, piece.logprobs, piece.prompt_logprobs) if piece.logprobs or told else None
            if self.chat:
                for delta in self.deltas(piece, bool(logprobs)):
                    choice = {"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                    chunks.append(self.chunk([choice]))
                    logprobs = None
            elif piece.text or logprobs:
                text = self.ask.echo[piece.choice] + piece.text if told else piece.text
                chunks.append(self.chunk([self.text_choice(piece.choice, text, logprobs, None)]))
            if piece.finish_reason:
                if self.chat:
                    reason = self.reason(piece.choice, piece.finish_reason)
                    choice = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": reason}
                else:
                    choice = self.text_choice(piece.choice, "", None, piece.finish_reason)
                chunks.append(self.chunk([choice], last=True))
        return chunks

    def deltas(self, piece: Piece, some: bool) -> list[dict[str, Any]]:
        """What a piece adds to the message; `some`: one delta at least, which may be empty."""
        if not self.readers:
            return [{"content": piece.text}] if piece.text or some else []
        reader, found = self.readers[piece.choice], list[dict[str, Any]]()
        for each in joined([*reader.push(piece.text, piece.tokens), *(reader.finish() if piece.finish_reason else [])]):
            if isinstance(each, Said):
                found.append({each.field: each.text})
            else:
                place = self.called[piece.choice]
                found.append({"tool_calls": [{"index": place, **self.call(piece.choice, each)}]})
        return found or ([{}] if some else [])

    def end(self) -> list[bytes]:
        """What a stream ends with."""
        counts = [self.chunk([], usage=self.usage(), last=True)] if self.ask.usage else []
        return [*counts, DONE]

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, last: bool = False) -> bytes:
        told = self.head(choices, "chat.completion.chunk" if self.chat else "text_completion")
        if usage is not None:
            told["usage"] = usage
        elif self.ask.usage:
            told["usage"] = None
        if last:
            told |= self.beside()
        return sse(told)

    @staticmethod
    def text_choice(number: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    # ---- what both have ----

    def numbers(self) -> range:
        return range(len(self.ask.sequences))

    def head(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        told = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}
        return {**told, "choices": choices}

    def usage(self) -> dict[str, Any]:
        prompts = {tuple(sequence.tokens[: sequence.prompt_length]) for sequence in self.ask.sequences}
        prompt = sum(map(len, prompts))
        written = sum(len(sequence.tokens) - sequence.prompt_length for sequence in self.ask.sequences)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.reused for sequence in self.ask.sequences)},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def beside(self) -> dict[str, Any]:
        """What is told beside OpenAI's fields, once a choice has ended."""
        return {"timings": self.timings(), **self.metrics(), "eyas": self.told()}

    def metrics(self) -> dict[str, Any]:
        """As vLLM tells the guesses of one request; like there of a request for one choice alone. A step is a round."""
        if len(self.ask.sequences) > 1:
            return {}
        (sequence,) = self.ask.sequences
        by_length, right = sequence.accepted_lengths, right_guesses(sequence)
        told = {
            "mean_acceptance_length": 1 + right / max(sequence.rounds, 1),
            "draft_acceptance_rate": right / max(sequence.guesses, 1),
            "acceptance_histogram": [by_length.get(length, 0) for length in range(1, max(by_length, default=1) + 1)],
            "num_accepted_draft_tokens": right,
            "num_draft_tokens": sequence.guesses,
            "num_spec_steps": sequence.rounds,
        }
        return {"metrics": {"speculative_decoding": told}}

    def timings(self) -> dict[str, Any]:
        """As llama.cpp's server names them, of the first choice."""
        sequence = self.ask.sequences[0]
        written, reading = len(sequence.tokens) - sequence.prompt_length, sequence.prefill_seconds
        writing = sequence.seconds - reading
        return {
            "prompt_n": sequence.prompt_length - sequence.reused,
            "cache_n": sequence.reused,
            "prompt_ms": round(1e3 * reading, 3),
            "prompt_per_second": round((sequence.prompt_length - sequence.reused) / reading, 3) if reading > 0 else None,
            "predicted_n": written,
            "predicted_ms": round(1e3 * writing, 3),
            "predicted_per_second": round((written - 1) / writing, 3) if writing > 0 else None,
            "draft_n": sequence.guesses,
            "draft_n_rounds": sequence.rounds,
            "draft_n_accepted": right_guesses(sequence),
        }

    def told(self) -> dict[str, Any]:
        """What eyas knows beside: it must not end a text that is still being written."""
        sequences = self.ask.sequences
        told: dict[str, Any] = {
            "seed": self.ask.seed,
            "tau": [round(tau_of(sequence), 4) for sequence in sequences],
            "rounds": [sequence.rounds for sequence in sequences],
            "noise_version": NOISE_VERSION,
        }
        if self.recorder is not None and all(sequence.finish_reason for sequence in sequences):
            told["trace"], self.recorder = self.recorder.rounds, None
        if self.ask.unknown:
            told["warning"] = f"fields that are not known here were not read: {', '.join(sorted(self.ask.unknown))}"
        return told

    def logprobs(self, number: int, found: Items[TokenLogprobs], prompt: Items[TokenLogprobs] | None = None) -> dict[str, Any]:
        """Of tokens of an answer; `prompt`: and before them of the prompt's, the first of which comes after nothing."""
        if self.chat:
            return {"content": [self.chat_logprob(each) for each in found], "refusal": None}
        sequence = self.ask.sequences[number]
        before = [] if prompt is None else sequence.tokens[: sequence.prompt_length]
        tokens = [*before, *(each.token for each in found)]
        logprobs = [*([None] if before else []), *(prompt or []), *found]
        offsets = self.words.places(before, self.ask.echo[number])
        for each in found:
            offsets.append(self.offsets[number])
            self.offsets[number] += len(self.words.text_and_bytes(each.token)[0])
        return {
            "tokens": list(map(self.words.name, tokens)),
            "token_logprobs": [each and each.logprob for each in logprobs],
            "top_logprobs": [each and self.top(each) for each in logprobs],
            "text_offset": offsets,
        }

    def top(self, each: TokenLogprobs) -> dict[str, float]:
        likeliest_last = [(each.token, each.logprob), *reversed(each.top)]  # two tokens may have one name
        return {self.words.name(token): logprob for token, logprob in likeliest_last}

    def chat_logprob(self, each: TokenLogprobs) -> dict[str, Any]:
        return self.token(each.token, each.logprob) | {"top_logprobs": [self.token(token, logprob) for token, logprob in each.top]}

    def token(self, token: int, logprob: float) -> dict[str, Any]:
        word, found = self.words.text_and_bytes(token)
        return {"token": word, "logprob": logprob, "bytes": found}


def right_guesses(sequence: Sequence) -> int:
    """Guesses that a text kept."""
    return sum((length - 1) * count for length, count in sequence.accepted_lengths.items())


def sse(told: Any, event: str | None = None) -> bytes:
    """One event of a stream."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
