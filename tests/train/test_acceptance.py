"""Claims about held-out acceptance: the reference's figures, real rounds with trees, and what training does with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eyas import reference
from eyas.config import Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.tensors import read_tensors
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.vocab import DraftVocab
from eyas.train import trainer as training
from eyas.train.acceptance import TreeTau, simulate
from eyas.train.features import TargetStates
from eyas.train.initialise import initialise
from eyas.train.trainer import Budget
from tests.tiny import reference_weights, tiny_target
from tests.train.training import (
    SETTINGS,
    TAPS,
    assert_identical,
    examples,
    make_trainer,
    silent,
    simulation,
    target,
)


@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "fc_norm": True}])
def test_held_out_tau_is_the_references(settings):
    """1 + the mean number of leading steps right, over all anchors of all documents; and P(step k right | the steps before right)."""
    loose = tiny_target(prepare=False)
    vocab = DraftVocab([token for token in range(53) if token % 4], 53)
    network = DraftNetwork(draft_config(loose.config, len(vocab), TAPS, **settings), loose.model.embed_tokens.weight.detach()).double()
    initialise(network, loose, vocab, 0)
    source, steps, documents = TargetStates(target(), TAPS), 5, examples()[:11]  # more than one batch of eight
    found = simulate(network, vocab, documents, source, steps)
    weights_ = reference_weights(network)
    leading, anchors = 0.0, 0
    alive, right, forced, reached = ([0] * steps for _ in range(4))
    for example in documents:
        tokens, answers = torch.tensor(example.tokens), torch.tensor(example.answers)
        states = source.states([example])
        logits = states.hidden @ loose.lm_head.weight.T
        accepted = reference.draft_accepts(weights_, network.config, tokens, states.features, logits, answers, vocab.ids, steps)
        count = int(reference.loss_anchors(answers, 0).sum())
        leading += (reference.simulated_tau(accepted, answers) - 1) * count
        anchors += count
        good = torch.ones(len(tokens), dtype=torch.bool)
        for step in range(steps):
            forced[step] += int((accepted[step] & reference.loss_anchors(answers, step)).sum())
            reached[step] += int(reference.loss_anchors(answers, step).sum())
            counted = reference.loss_anchors(answers, step) & good
            alive[step] += int(counted.sum())
            right[step] += int((accepted[step] & counted).sum())
            good = accepted[step] & counted
    assert found.tau() == pytest.approx(1 + leading / anchors, abs=1e-12) and found.tau() > 1
    assert found.acceptance() == pytest.approx([hits / max(count, 1) for hits, count in zip(right, alive)])
    assert found.accuracy() == pytest.approx([hits / count for hits, count in zip(forced, reached)])
    low, high = found.interval()
    assert low < found.tau() < high
    alone = simulate(network, vocab, documents, source, steps, together=1)
    assert all(torch.equal(one, other) for one, other in zip(found, alone))


def test_the_weights_that_accepted_most_are_the_draft(tmp_path, monkeypatch):
    """Held-out tau rises, then falls: what is saved is the peak, what is resumed is the end."""
    trainer = make_trainer(tmp_path / "draft", replace(SETTINGS, measure_steps=2))
    taus, seen = iter([1.1, 1.5, 1.3]), {}

    def told(network, *_, **__):
        tau = next(taus)
        seen[tau] = {name: value.clone() for name, value in network.state_dict().items()}
        return simulation(tau)

    monkeypatch.setattr(training, "simulate", told)
    trainer.run(Budget(steps=6), silent)
    assert [(point["step"], point["tau"]) for point in trainer.progress.curve] == [(2, 1.1), (4, 1.5), (6, 1.3)]
    saved = read_tensors(trainer.out)
    assert torch.equal(saved["fc.weight"], seen[1.5]["fc.weight"].bfloat16())
    assert not torch.equal(saved["fc.weight"], seen[1.3]["fc.weight"].bfloat16())
    again = make_trainer(tmp_path / "draft", replace(SETTINGS, measure_steps=2))
    again.resume()
    assert_identical(dict(again.network.state_dict()), seen[1.3])
    assert_identical(again.best, seen[1.5])


def test_tau_with_trees_is_that_of_real_rounds_and_leaves_the_draft_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, dtype=torch.float64)
    prompts = [list(example.tokens[:5]) for example in examples()[:3]]
    shape, before = TreeShape.parse("8x2x3"), {name: value.clone() for name, value in trainer.network.state_dict().items()}
    found = TreeTau(target(), trainer.vocab, prompts, shape, 20)(trainer.network)
    own = DraftNetwork(trainer.network.config, target().embedding.detach()).double()
    own.load_state_dict(before)
    own.prepare()
    committed = rounds = 0
    for prompt in prompts:
        *_, (text,) = Decoder(target(), Eagle3Drafter(own, trainer.vocab)).run([prompt], shape, Sampling(), [0], 20)
        committed, rounds = committed + len(text.tokens) - text.prompt_length - 1, rounds + text.rounds
    assert found == pytest.approx(committed / rounds) and found > 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_tau_with_trees_is_measured_now_and_then(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, measure_steps=2, tree_every=2), tree_tau=lambda network: 1.5)
    trainer.run(Budget(steps=8), silent)
    assert [point.get("tree_tau") for point in trainer.progress.curve] == [None, 1.5, None, 1.5]


def test_training_ends_where_acceptance_has_fallen_for_good(tmp_path, monkeypatch):
    """Three measurements in a row clearly under the best end it; near the best, or with patience 0, they do not."""
    taus = iter([1.2, 1.6, 1.58, 1.5, 1.4, 1.3, 1.2])
    monkeypatch.setattr(training, "simulate", lambda *_, **__: simulation(next(taus)))
    trainer = make_trainer(tmp_path, replace(SETTINGS, measure_steps=1, patience=3))
    trainer.run(Budget(steps=50), silent)
    assert [point["tau"] for point in trainer.progress.curve] == [1.2, 1.6, 1.58, 1.5, 1.4, 1.3]
    assert trainer.progress.overfits(3) and not trainer.progress.overfits(0) and not trainer.progress.overfits(4)
