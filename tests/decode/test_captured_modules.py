"""Multi-token prediction's modules are a part of a round's graph: what the modules made of a text's end is read anew, and nothing else is
told apart from the plain rounds. (Their trees and paths: test_captured_static.py.)"""

from __future__ import annotations

import pytest
import torch

from eyas.config import Sampling, TreeShape
from eyas.decode import captured_round
from eyas.decode.captured_modules import Modules, Stack
from eyas.decode.fixed import Drawn
from eyas.decode.fixed_round import Round
from eyas.decode.generate import Decoder
from eyas.decode.plan.planner import Plan
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.mtp import MtpDrafter
from eyas.kernels.captured import Seats
from eyas.model.cache import Pool, Slabs
from tests.decode.test_captured_batches import TREE, beside_a_prompt, joined, kept, served, told
from tests.decode.test_captured_round import V, rounds, short_windows
from tests.tiny import tiny_target
from tests.tiny_family import STEPS, tiny_network

_ = rounds, short_windows  # fixtures


def pair(pooled, modules=STEPS):
    target = tiny_target(prepare=False, vocab_size=V)
    network, vocab = tiny_network("mtp", target, size=V - 1, unroll_steps=modules)
    network.prepare()
    target.prepare()
    target.pool, network.pool = (Pool(), Pool()) if pooled else (None, None)
    return target, MtpDrafter(network, vocab)


def texts(decoder, prompts, shape=TREE, plans=()):
    """What it says at a temperature, with plans that take turns."""
    everyone = []
    for turn, everyone in enumerate(decoder.run(prompts, shape, Sampling(0.8), range(len(prompts)), 20)):  # noqa: B007 (the last)
        if plans:
            decoder.plan = plans[turn % len(plans)]
    return told(everyone)


@pytest.mark.parametrize("modules", [1, 2, 5])
def test_any_number_of_modules_and_any_length_of_a_prompt(modules, rounds):
    """Shorter than there are modules, and longer than a round's rows."""
    prompts = [[3], [1, 2], [number * number % V for number in range(40)]]
    for shape in ("12x3x3", "static:2.2.1.1"):
        wanted = texts(Decoder(*pair(False, modules)), prompts, shape=TreeShape.parse(shape))
        assert texts(Decoder(*pair(True, modules)), prompts, shape=TreeShape.parse(shape)) == wanted
    assert served(rounds) >= {3}


class Watching(Plan):
    """Not a fixed plan: it sees trees, so that its rounds are no graphs."""


@pytest.mark.parametrize("turns", [(0, 1), (1, 0, 0), (1, 1, 0)], ids=str)
def test_rounds_of_both_kinds_may_take_turns(turns, rounds):
    wanted, decoder = texts(Decoder(*pair(False)), [[1, 2, 3], [4]]), Decoder(*pair(True))
    plans = [decoder.plan, Watching()]
    assert texts(decoder, [[1, 2, 3], [4]], plans=[plans[turn] for turn in turns]) == wanted
    assert served(rounds) >= {2}


def test_where_nothing_can_be_captured_rounds_go_on_plain(rounds, monkeypatch):
    wanted, refused = texts(Decoder(*pair(False)), [[1, 2, 3]]), iter([True, False, True, True, False, True] + 30 * [False])
    inner = captured_round.fixed_call
    monkeypatch.setattr(captured_round, "fixed_call", lambda *given: None if next(refused) else inner(*given))
    assert texts(Decoder(*pair(True)), [[1, 2, 3]]) == wanted
    assert rounds.count(None) >= 4 and any(rounds)


def test_texts_join_and_leave_in_any_slots(rounds):
    lengths = (4, 30, 9, 25, 12, 20)
    assert joined(Decoder(*pair(True)), 4, lengths) == joined(Decoder(*pair(False)), 4, lengths)
    assert served(rounds) >= {2, 3, 4}


def test_a_slot_that_reads_a_prompt_meanwhile_keeps_its_rows(rounds):
    def look(decoder):
        decoder.drafter.catch_up([0])
        return [kept(decoder.drafter.cache, 0, min(decoder.drafter.caches[-1].lengths[0], 40))]

    wanted, found = (beside_a_prompt(Decoder(*pair(pooled)), 3, 20, look) for pooled in (False, True))
    assert found == wanted and served(rounds) >= {2, 3}


def test_copied_guesses_go_beside_those_of_modules(rounds):
    prompts = [[1, 2, 3, 4, 5] * 3, [7, 6]]
    found = [Decoder(target, CopyingDrafter(draft)) for target, draft in (pair(False), pair(True))]
    wanted, graphs = ([text for text, _, _ in texts(decoder, prompts)] for decoder in found)
    assert graphs == wanted and served(rounds) >= {2}


def test_one_call_after_the_other_runs_the_same_graphs(rounds):
    target, drafter = pair(True)
    first = texts(Decoder(target, drafter), [[1, 2, 3]])
    held = list(drafter.cache.slabs.graphs)
    assert any(key[0] == "round" for key in held)
    assert texts(Decoder(target, MtpDrafter(drafter.network, drafter.vocab)), [[1, 2, 3]]) == first
    drafter.cache.release()
    assert texts(Decoder(target, drafter), [[1, 2, 3]]) == first and list(drafter.cache.slabs.graphs) == held


@pytest.mark.parametrize("seats", [Seats(1, False), Seats(4, True)], ids=str)
def test_a_round_asks_the_host_for_no_number(seats):
    """On the device "meta" there are no numbers: to ask for one is an error."""
    target = tiny_target(prepare=False)
    network, _ = tiny_network("mtp", target)
    target.to("meta")
    network.to("meta").embedding = [target.embedding]
    network.frozen[0].to("meta")
    slots, count, config = 1 if seats.count == 1 else 6, seats.count, target.config

    def slabs(layers):
        return Slabs((layers, slots, config.num_key_value_heads, 64, config.head_dim), torch.float64, torch.device("meta"))

    drawn = Drawn(True, True)
    form = Round(Modules(TreeShape(20, 3, 4), 64, drawn), 0, 5, drawn, 64, network.wants, seats)
    width, group = config.hidden_size, config.num_attention_heads // config.num_key_value_heads
    numbers, laws, tokens, features = (torch.zeros(count, *each) for each in ((5,), (4,), (8,), (8, width)))
    given = [numbers.long(), laws.double(), tokens.long(), features.double(), torch.zeros(count, 4, 0).long(), torch.arange(29)]
    part = Stack(network, slabs(STEPS), group, seats)
    told, features, logits, nodes = form.run(target, slabs(5), part, *(each.to("meta") for each in given))
    assert told.shape == (count, 3, 5) and features.shape == (count, 5, width)
    assert logits.shape == (count, 20, 53) and nodes.shape == (count, 4, 19)
