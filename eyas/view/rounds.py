"""A round of one sequence as plain numbers and words, for whoever draws it: the page of `eyas serve`, and recordings.

Knows records of rounds and the decoder that made them; knows nothing of how they are sent or shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import Request
from eyas.decode.copying import CopyLaw
from eyas.decode.generate import Decoder
from eyas.decode.grammar import FORCED, Grammar
from eyas.decode.processors import Processor
from eyas.decode.prompt import Prompt
from eyas.decode.rules import path_to
from eyas.decode.sampling import allowed, draw
from eyas.decode.sequence import RoundRecord, Sequence
from eyas.decode.tree import Tree
from eyas.drafters.copying import LEAST, CopyingDrafter
from eyas.engine import Engine

Word = Callable[[int], str]  # a token's text
BEFORE = 5  # tokens in front of the root that are told with a round
MOST_CUT = 12  # guesses that are told of those that were grown and not kept
LIKELIEST = 5  # tokens that are told of a draw
DRAFT, COPY, FORM = "draft", "copy", "form"


def round_told(record: RoundRecord, decoder: Decoder, word: Word, everywhere: bool = False) -> dict[str, Any]:
    """What a round did, for JSON. Ask while `watch` is called: the drafter and the clock then still stand at this round.

    `nodes`: rows of the target's pass, root first, each [token, text, parent's row, depth, chance that its path is drawn as the drafter
    scored it, who guessed it]. A guess counts as copied where at least two tokens before it stood earlier in the text, followed by it; the
    answer's form guesses what it forces.
    `path`: the rows that the walk kept. `draws`: for each of these the target's draw there, and the tokens that came nearest to being
    drawn, each with its chance and its noise; `beside`: for each of these the guesses there, as [row, the target's chance, noise]. Both
    are empty where the verifier is not the walk. `drawn`: where asked for `everywhere`, the target's draw at each row, on the path or not.
    `ms`: of the whole round `draft` and `pass`, shared by its `sequences`, and `plain`, what a pass without guesses is known to take (null
    where no planner knows it); of this text `first`, until its first token, and `at`, until this round's last; `end`: when the round
    ended, by a clock of which differences alone mean something.
    `left_out`: how many guesses were grown and cut before the pass; `cut`: the likeliest of these, told as `nodes` are, where a parent that
    was cut too is numbered on behind the rows.
    """
    text, tree, accepted = record.text, record.tree, record.accepted
    assert text is not None, "the decoder's records have their sequence"
    root = root_of(record, text)
    clock, named = decoder.plan, [word(token) for token in tree.tokens]
    draws = draws_told(record, text, word) if decoder.verifier.shares_noise else []
    sequences = max(1, len(decoder.decoding))
    guessers = ["", *guessed_by(tree, range(1, len(tree)), decoder, text)]
    return {
        "n": text.rounds,
        "request": text.call,
        "choice": text.number,
        "before": [[token, word(token)] for token in text.tokens[max(0, root - BEFORE) : root]],
        "root": {"id": tree.tokens[0], "text": named[0], "pos": root},
        "nodes": [
            [token, named[row], tree.parents[row], tree.depths[row], chance_of(tree, row), guessers[row]]
            for row, token in enumerate(tree.tokens)
        ],
        "left_out": len(cut := tree.cut()),
        "cut": cut_told(tree, cut, decoder, text, word),
        "path": accepted.path,
        "bonus": [accepted.bonus, word(accepted.bonus)],
        "committed": [[token, word(token)] for token in record.committed],
        "draws": [lines for lines, _ in draws],
        "beside": [guesses for _, guesses in draws],
        "drawn": drawn_everywhere(record, text, word) if everywhere and draws else [],
        "temperature": text.sampling.temperature,
        "rows": len(tree),
        "sequences": sequences,
        "slot": text.slot,
        "ms": {
            "draft": milliseconds(clock.pass_began - clock.began),
            "pass": milliseconds(clock.pass_seconds),
            "plain": milliseconds(clock.planner.passes.of(sequences)) if clock.planner else None,
            "first": milliseconds(text.prefill_seconds),
            "at": milliseconds(text.seconds),
            "end": milliseconds(time.perf_counter()),
        },
        "end": text.finish_reason,
    }


class Run(NamedTuple):
    """An answer and its rounds."""

    draft: str  # the name of the draft's directory
    text: Sequence
    answer: str
    rounds: list[dict[str, Any]]  # as `round_told` tells them


def rounds_of(engine: Engine, prompt: Prompt, request: Request, most: int | None = None) -> Run:
    """Decode an answer and tell its rounds one by one; of `most` rounds at most."""
    decoder, told = engine.decoder(request), list[dict[str, Any]]()
    decoder.watch = lambda record: told.append(round_told(record, decoder, lambda token: engine.tokenizer.decode([token])))
    (text,) = everyone = engine.sequences(prompt, request)
    for _ in decoder.run_all(everyone):
        if most is not None and len(told) >= most:
            break
    answer = engine.tokenizer.decode(text.tokens[text.prompt_length :], skip_special_tokens=True)
    return Run(engine.draft.name if engine.draft else "", text, answer, told)


def root_of(record: RoundRecord, text: Sequence) -> int:
    """The absolute position of the round's root."""
    return len(text.tokens) - len(record.committed) - 1


def cut_told(tree: Tree, cut: Items[int], decoder: Decoder, text: Sequence, word: Word) -> list[list[Any]]:
    """The likeliest guesses that were grown and not kept. A parent is never less likely, so it is kept or among them."""
    grown = tree.grown
    if grown is None:
        return []
    rows = sorted(sorted(cut, key=lambda row: (-grown.scores[row], row))[:MOST_CUT])
    numbers = {row: len(tree) + place for place, row in enumerate(rows)}
    guessers = guessed_by(grown, rows, decoder, text)
    return [
        [grown.tokens[row], word(grown.tokens[row]), above(grown, row, tree, numbers), grown.depths[row], chance_of(grown, row), by]
        for row, by in zip(rows, guessers, strict=True)
    ]


def above(grown: Tree, row: int, tree: Tree, numbers: dict[int, int]) -> int:
    """The number of a cut guess's parent: its row in the tree, or behind these its own among the cut."""
    parent = grown.parents[row]
    if parent in numbers:
        return numbers[parent]
    place = 0
    for each in path_to(grown, parent)[1:]:
        place = tree.children[place][grown.tokens[each]]
    return place


def chance_of(tree: Tree, row: int) -> float:
    return four_digits(math.exp(tree.scores[row]))


def guessed_by(tree: Tree, rows: Iterable[int], decoder: Decoder, text: Sequence) -> list[str]:
    """Who guessed each of these nodes, which lie below the root."""
    drafter, found = decoder.drafter, list[str]()
    laws: dict[int, CopyLaw | None] = {}
    formed = any(isinstance(process, Grammar) for process in text.processors)
    for row in rows:
        parent = tree.parents[row]
        if formed and tree.scores[row] == tree.scores[parent] + FORCED:
            found.append(FORM)
            continue
        if not isinstance(drafter, CopyingDrafter):
            found.append(DRAFT)
            continue
        if parent not in laws:
            laws[parent] = drafter.law(text.slot, [tree.tokens[each] for each in path_to(tree, parent)[1:]])
        law = laws[parent]
        found.append(COPY if law and law.matched >= LEAST and tree.tokens[row] in law.following else DRAFT)
    return found


def logits_at(record: RoundRecord, text: Sequence, row: int) -> Tensor:
    """The logits [V] that the target's token at a row of a round's tree was drawn from, after the text's processors."""
    logits_V = record.logits[row]
    path = [record.tree.tokens[each] for each in path_to(record.tree, row)[1:]]
    for process in text.processors:
        logits_V = process(text.tokens[: root_of(record, text) + 1], path, logits_V)
    return logits_V


def draws_told(record: RoundRecord, text: Sequence, word: Word) -> list[tuple[list[list[Any]], list[list[Any]]]]:
    """For each row of the walk's path the drawn token and those that came nearest to being drawn, and the guesses there."""
    path = record.accepted.path
    drawn = [*(record.tree.tokens[row] for row in path[1:]), record.accepted.bonus]
    return [draw_told(record, text, row, token, word) for row, token in zip(path, drawn, strict=True)]


def draw_told(record: RoundRecord, text: Sequence, row: int, drawn: int, word: Word) -> tuple[list[list[Any]], list[list[Any]]]:
    """The tokens with the highest log chance + noise at a row, the drawn one first: [token, text, chance, noise]. And the guesses behind
    that row: [row of the guess, the target's chance of it, noise]. Greedy text has no noise; its chances are those at temperature 1."""
    log_chances_V, noise_V = drawn_from(record, text, row)
    values, best = (log_chances_V + noise_V).topk(min(LIKELIEST, log_chances_V.shape[0]))
    others = best[(best != drawn) & (values > float("-inf"))].tolist()
    told = [drawn, *others][:LIKELIEST]  # of equal ones the lowest id was drawn
    guessed = record.tree.children[row]
    tokens = [*told, *guessed]
    chances, noises = log_chances_V[tokens].exp().tolist(), noise_V[tokens].tolist()
    columns = [(token, four_digits(chance), round(more, 3)) for token, chance, more in zip(tokens, chances, noises, strict=True)]
    lines = [[token, word(token), chance, more] for token, chance, more in columns[: len(told)]]
    return lines, [[guessed[token], chance, more] for token, chance, more in columns[len(told) :]]


def drawn_from(record: RoundRecord, text: Sequence, row: int) -> tuple[Tensor, Tensor]:
    """What the target draws from at a row, after filters: log chances [V] and noise [V], float64 on the CPU; greedy: no noise."""
    sampling = text.sampling
    scores_V = logits_at(record, text, row).double().cpu() / (1.0 if sampling.greedy else sampling.temperature)
    ids = None if sampling.greedy else allowed(scores_V, sampling)
    if ids is not None:
        scores_V = torch.full_like(scores_V, float("-inf")).index_copy_(0, ids, scores_V[ids])
    noise_V = text.noise_at(root_of(record, text) + record.tree.depths[row] + 1)
    noise_V = torch.zeros_like(scores_V) if noise_V is None else noise_V.double().cpu()
    return scores_V - scores_V.logsumexp(0), noise_V


def drawn_everywhere(record: RoundRecord, text: Sequence, word: Word) -> list[list[Any]]:
    """The target's draw at each row of the tree: [token, text]."""
    root, path = root_of(record, text), record.accepted.path
    settled = dict(zip(path, [*(record.tree.tokens[row] for row in path[1:]), record.accepted.bonus], strict=True))
    drawn = [
        settled[row] if row in settled else draw(logits_aside(record, text, row), text.sampling, text.noise_at(root + depth + 1))
        for row, depth in enumerate(record.tree.depths)
    ]
    return [[token, word(token)] for token in drawn]


def logits_aside(record: RoundRecord, text: Sequence, row: int) -> Tensor:
    """`logits_at` a row that the walk did not come to, where a grammar may give up and the text goes on."""
    with ExitStack() as stack:
        for process in text.processors:
            if isinstance(process, Processor):
                stack.enter_context(process.aside())
        return logits_at(record, text, row)


def four_digits(chance: float) -> float:
    return float(f"{chance:.4g}")


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)
