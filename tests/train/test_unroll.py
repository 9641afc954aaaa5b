"""The training-time test: the fast unroll is the slow reference, anchor by anchor, loss and gradients."""

from __future__ import annotations

import pytest
import torch

from eyas import reference
from eyas.train import unroll as unrolling
from eyas.train.comb import Comb, PaddedComb
from eyas.train.unroll import Batch, Supervision, loss_anchors, unroll, unrolled_loss
from tests.tiny import reference_weights, tiny_draft, tiny_target

STEPS, DECAY = 5, 0.8


def documents(vocab_size: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and answer numbers of documents: one answer, two answers, a short answer, an answer that ends the document."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [
        [(-1, 4), (0, 9)],
        [(-1, 3), (0, 5), (-1, 4), (1, 7), (-1, 2)],
        [(-1, 5), (0, 2), (-1, 1)],
        [(-1, 2), (0, 1), (-1, 2), (1, 6)],
    ]
    found = []
    for shape in shapes:
        answers = torch.tensor([number for number, count in shape for _ in range(count)])
        found.append((torch.randint(0, vocab_size, (len(answers),), generator=draw), answers))
    return found


def random_features(docs, taps: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randn(len(tokens), taps * 32, generator=draw, dtype=torch.float64) for tokens, _ in docs]


def packed(docs, features) -> Batch:
    answers, used = [], 0
    for _, numbers in docs:
        answers.append(torch.where(numbers >= 0, numbers + used, -1))
        used += int(numbers.max()) + 1
    return Batch(torch.cat([t for t, _ in docs]), torch.cat(features), torch.cat(answers), [len(t) for t, _ in docs])


SETTINGS = [{}, {"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}]
FIVE, ONE = {"taps": (0, 1, 2, 3, 4)}, {"taps": (3,)}
TWO, THREE = {"draft_layers": 2}, {"draft_layers": 3, "norm_output": True, **FIVE}
OTHERS = {"qk_norm": True, "attention_bias": True, "mlp_bias": True, "own_embedding": True, "draft_layers": 2}  # heads made by others
WINDOW, NARROW = {"sliding_window": 6, "draft_layers": 2, "partial_rotary_factor": 0.5}, {"sliding_window": 2}


@pytest.mark.parametrize("form", [Comb, PaddedComb])
@pytest.mark.parametrize("settings", [*SETTINGS, FIVE, ONE, {**FIVE, "fc_norm": True}, TWO, THREE, OTHERS, WINDOW, NARROW])
def test_unrolled_loss_and_gradients_equal_the_reference(settings, form, monkeypatch):
    monkeypatch.setattr(unrolling, "comb_over", form)
    target = tiny_target()
    network, vocab = tiny_draft(target, **settings)
    docs = documents(target.config.vocab_size)
    draw = torch.Generator().manual_seed(3)
    features = random_features(docs, len(network.config.taps))
    logits = [3 * torch.randn(len(t), target.config.vocab_size, generator=draw, dtype=torch.float64) for t, _ in docs]
    weights = reference_weights(network)
    anchors = [[int(reference.loss_anchors(answers, step).sum()) for step in range(STEPS)] for _, answers in docs]
    expected = torch.zeros((), dtype=torch.float64)
    for (tokens, answers), feature, logit, counts in zip(docs, features, logits, anchors):
        _, losses = reference.unrolled_loss(weights, network.config, tokens, feature, logit, answers, vocab.ids, STEPS, DECAY)
        for step, loss in enumerate(losses):  # the batch's mean is over all documents' anchors, the reference's over one document's
            expected = expected + DECAY**step * loss * counts[step] / sum(count[step] for count in anchors)
    teacher = torch.cat(logits)[:, vocab.ids].softmax(-1)
    within = vocab.member()[torch.cat(logits).argmax(-1)]
    batch = packed(docs, features)
    taught, place = batch.taught()
    assert len(taught) == sum(int((answers >= 0).sum()) for _, answers in docs)
    loss, losses = unrolled_loss(network, batch, Supervision(teacher[taught], place, within, STEPS, DECAY))
    torch.testing.assert_close(sum(DECAY**step * mean for step, mean in enumerate(losses)), loss.detach())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]  # an embedding of its own is not trained
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_every_slot_of_every_step_equals_the_reference():
    target = tiny_target()
    network, _ = tiny_draft(target)
    docs = documents(target.config.vocab_size)
    features = random_features(docs)
    expected = [reference.unroll(reference_weights(network), network.config, t, f, STEPS) for (t, _), f in zip(docs, features)]
    starts = torch.tensor([0, *(len(t) for t, _ in docs)]).cumsum(0)
    for i, step in enumerate(unroll(network, packed(docs, features), STEPS)):
        wanted = [start + reference.loss_anchors(answers, i).nonzero()[:, 0] for (_, answers), start in zip(docs, starts)]
        assert torch.equal(step.anchors, torch.cat(wanted))
        assert torch.equal(step.teacher_rows, step.anchors + 1 + i)
        document = torch.searchsorted(starts, step.anchors, right=True) - 1
        for d, anchor, a in zip(document.tolist(), step.anchors.tolist(), step.a):
            torch.testing.assert_close(a, expected[d][i, anchor - starts[d]], rtol=1e-10, atol=1e-10)


def test_a_step_that_no_answer_reaches_has_a_mean_of_nothing():
    target = tiny_target()
    network, vocab = tiny_draft(target)
    docs = documents(target.config.vocab_size)[2:3]  # an answer of two tokens: one anchor, for one step
    batch = packed(docs, random_features(documents(target.config.vocab_size))[2:3])
    taught, place = batch.taught()
    even = torch.full((len(taught), len(vocab)), 1 / len(vocab)).double()
    loss, means = unrolled_loss(network, batch, Supervision(even, place, torch.ones(len(batch.tokens)) > 0, STEPS, DECAY))
    assert len(means) == STEPS and loss.item() > 0 and means[0].item() == pytest.approx(loss.item())
    assert [mean.item() for mean in means[1:]] == [0.0] * (STEPS - 1)


def test_a_documents_last_row_never_counts_even_where_the_next_begins_with_an_answer():
    lengths = [3, 4, 1, 3]
    answers = torch.tensor([-1, 0, 0, 1, 1, 1, -1, 2, 3, 3, 3])
    anchors, counted = loss_anchors(answers, lengths)
    for step in range(3):
        alone = torch.cat([reference.loss_anchors(part, step) for part in answers.split(lengths)])
        assert anchors[counted > step].tolist() == alone.nonzero()[:, 0].tolist()
    assert anchors.tolist() == [0, 3, 8]


def test_slots_that_drop_out_leave_the_others_as_they_were():
    target = tiny_target()
    network, _ = tiny_draft(target)
    docs = documents(target.config.vocab_size)
    features = random_features(docs)
    batch = packed(docs, features)
    anchors, counted = batch.anchors()
    depths = torch.randint(1, STEPS + 1, (len(anchors),), generator=torch.Generator().manual_seed(5))
    whole = list(unroll(network, batch, STEPS))
    for i, step in enumerate(unroll(network, batch, STEPS, depths)):
        assert step.anchors.tolist() == anchors[torch.minimum(counted, depths) > i].tolist()
        place = torch.searchsorted(whole[i].anchors, step.anchors)
        torch.testing.assert_close(step.a, whole[i].a[place], rtol=1e-12, atol=1e-12)
