"""What the tests of self-written data share: a template of bytes, two questions, settings under which a tiny target says enough."""

from __future__ import annotations

from functools import cache

from eyas.train.selfplay import Asked, SelfPlay
from eyas.train.template import Template
from tests.tiny import byte_tokenizer

TAPS = (1, 2, 4)
END = 257  # <|im_end|> of the byte tokenizer
SETTINGS = SelfPlay("tiny", "chat", TAPS, longest_question=16, longest_answer=36, turns=(1,))
QUESTIONS = [Asked(("How can a hawk see?",)), Asked(("Why do owls fly at night and not by day?",))]


@cache
def template() -> Template:
    return Template(byte_tokenizer(), (END,))
