"""What each self-written conversation begins with: a user's question, or what leads the target to ask one of some kind.

Left to itself a model asks much the same way, hardly ever about a text that it is given. So half of its questions begin with given words,
a quarter ask something of the text that the conversation before ended with (summarise it, translate it, answer from it), and some have
another system message. Knows settings, the template and a conversation's number; knows nothing of the target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from eyas.config import EyasError
from eyas.decode.sampling import derived_seed, uniforms
from eyas.files.chat_template import TEMPLATE_ERRORS
from eyas.train.openings import OPEN_TASKS, OPENINGS, SYSTEMS, TASKS
from eyas.train.template import Template

T = TypeVar("T")
SHORTEST_TEXT = 24  # tokens of an answer that is text enough to ask something of


@dataclass(frozen=True)
class SelfPlay:
    """The settings that decide the text (the number format does too, see writers.py); a folder of shards carries them as its key."""

    target: str  # hash of the target's weights
    template: str  # the chat template around a question, as text
    taps: tuple[int, ...]
    seed: int = 0
    seed_prompts: str = ""  # name of a file of user turns and a hash of them, if any
    seeded_share: float = 0.2  # share of conversations that take their questions from that file
    regenerate: bool = False  # instead: conversation i asks all the questions of entry i of that file, and nothing else is asked
    # Left to itself a model asks much the same way; a given first word or two lead it to other kinds of task.
    openings: tuple[str, ...] = OPENINGS
    opening_share: float = 0.5  # share of the target's own questions that begin with an opening
    topic_share: float = 0.5  # share of openings that are followed by one of the tokenizer's own words
    # Text that comes with the prompt is where a draft must copy, and what a model does not ask about by itself.
    tasks: tuple[str, ...] = TASKS  # questions about a text, which stands at {}
    open_tasks: tuple[str, ...] = OPEN_TASKS  # such whose end the target writes
    task_share: float = 0.25  # share of conversations that ask something of the text that the one before wrote
    longest_text: int = 320  # tokens of it
    systems: tuple[str, ...] = SYSTEMS
    system_share: float = 0.1  # share of the other conversations that have one of these system messages
    question_top_p: float = 0.95
    # Drawn evenly. Most users decode near greedy; but greedy answers to alike questions are alike, and teach little after the first.
    answer_temperatures: tuple[float, ...] = (0.0, 0.7, 0.7, 1.0, 1.0)
    answer_top_p: float = 0.98
    turns: tuple[int, ...] = (1, 1, 1, 2, 3)  # numbers of questions of a conversation, drawn evenly
    longest_question: int = 160  # tokens
    longest_answer: int = 400  # tokens
    longest: int = 1024  # tokens of a conversation, its template's included
    loop_gram: int = 16  # an answer is cut where it repeats this many tokens in a row
    loop_share: float = 0.2  # share of conversations that may go round for a while: users of small models meet such text
    longest_loop: int = 100  # tokens of theirs that may repeat
    candidates: int = 64  # a token is drawn from this many likeliest ones
    per_shard: int = 8  # conversations in a file: a kill loses at most these and those in flight; under 16 MB for small targets
    version: int = 5
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template, if any; `template` shows what they do
    read: str = ""  # hash of the target's config and tokenizer

    def digest(self) -> str:
        """Ten hex digits of a hash of all settings."""
        told = {name: value for name, value in asdict(self).items() if name not in ("chat_template_kwargs", "read") or value}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]

    def root(self) -> int:
        """The seed of all conversations. Other settings write other ones, so their folders may train together; those of another tokenizer
        may not."""
        return int(replace(self, read="").digest(), 16)


class Asked(NamedTuple):
    """Questions that a user brings for one conversation. `system` None: the template's own system message."""

    turns: tuple[str, ...]
    system: str | None = None


@dataclass
class Beginning:
    """How a conversation begins. The target writes the question's end, where none is `asked` and what is given is not the `whole` of it."""

    seed: int
    before: list[int]  # the template's tokens before the first question
    own_system: bool  # whether these are not the usual ones, which every other conversation begins with
    temperature: float  # of its answers; questions have 1
    turns: int  # questions it may have
    spare: int  # tokens that may repeat before an answer is cut as a loop
    asked: tuple[str, ...] = ()  # the given questions
    text: list[int] = field(default_factory=list)  # where the first question is about a text, its tokens with that
    whole: bool = False  # whether that is all of the question
    words: list[int] = field(default_factory=list)  # its first tokens, where it is not


class Questions:
    """What the conversations of a run begin with. `given`: the questions that a user brings; `capacity`: tokens of a conversation."""

    def __init__(self, template: Template, settings: SelfPlay, given: Sequence[Asked], capacity: int) -> None:
        self.template, self.settings, self.given, self.capacity = template, settings, given, capacity
        self.root = settings.root()
        self.openings = [template.tokens(text) for text in settings.openings]
        self.topics = template.words()
        self.systems = [before for text in settings.systems if template.chat and (before := system_tokens(template, text))]

    def numbers(self, index: int) -> list[float]:
        """Uniform numbers of conversation `index`, one for each choice."""
        return uniforms(derived_seed(self.root, index), 2**32, 13).tolist()

    def follows(self, index: int) -> bool:
        """Whether conversation `index` asks something of the text that the one before it wrote, which stands in the same shard."""
        settings = self.settings
        if settings.regenerate or not self.template.chat or index % settings.per_shard == 0:
            return False
        return self.numbers(index)[6] < settings.task_share and not self.seeded(index)

    def seeded(self, index: int) -> bool:
        return bool(self.given) and self.numbers(index)[0] < self.settings.seeded_share

    def begin(self, index: int, text: Sequence[int]) -> Beginning:
        """How conversation `index` begins. `text`: the tokens of the answer that the conversation before ended with; unused where this one
        does not follow it, or where they are few."""
        settings, template, numbers = self.settings, self.template, self.numbers(index)
        _, u_question, u_temperature, u_turns, u_opening, u_which, _, u_task, u_topic, u_topics, u_system, u_systems, u_loop = numbers
        row = Beginning(
            seed=derived_seed(self.root, index),
            before=template.before,
            own_system=False,
            temperature=pick(settings.answer_temperatures, u_temperature),
            turns=pick(settings.turns, u_turns) if template.again else 1,
            spare=settings.longest_loop if u_loop < settings.loop_share else 0,
        )
        if settings.regenerate or self.seeded(index):
            asked = self.given[index] if settings.regenerate else pick(self.given, u_question)
            row.turns = len(asked.turns) if settings.regenerate else row.turns
            row.asked = asked.turns[: row.turns]
            if asked.system is not None and template.chat:
                row.before, row.own_system = template.before_with(asked.system), True
            return row
        if self.systems and u_system < settings.system_share:
            row.before, row.own_system = pick(self.systems, u_systems), True
        if self.follows(index) and self.ask_of_text(row, text, u_task):
            return row
        if u_opening < settings.opening_share:
            topic = [pick(self.topics, u_topics)] if self.topics and u_topic < settings.topic_share else []
            row.words = pick(self.openings, u_which) + topic
        return row

    def ask_of_text(self, row: Beginning, text: Sequence[int], u: float) -> bool:
        """Let a conversation's first question be one about a text, if there is enough text, and room for an answer."""
        if len(text) < SHORTEST_TEXT:
            return False
        task = pick((*self.settings.tasks, *self.settings.open_tasks), u)
        found = self.template.tokens(task.replace("{}", self.template.text_of(text[: self.settings.longest_text]).strip()))
        if len(row.before) + len(found) + self.settings.longest_question > self.capacity * 2 // 3:
            return False
        row.text, row.whole = found, task in self.settings.tasks
        return True


def system_tokens(template: Template, text: str) -> list[int]:
    """The tokens before the first question under a system message; none where the template refuses one."""
    try:
        return template.before_with(text)
    except (EyasError, *TEMPLATE_ERRORS):
        return []


def pick(items: Sequence[T], u: float) -> T:
    """One of the items, chosen by a uniform number `u` in (0, 1)."""
    return items[int(u * len(items))]
