"""How the other methods' drafts learn: each loss equals its paper's formula computed plainly, and each learns, stops and goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from eyas.config import TrainSettings
from eyas.methods import METHODS, trained
from eyas.model.transformer import rotate
from eyas.train import eagle1
from eyas.train.batches import make_batch
from eyas.train.features import Example
from eyas.train.trainer import Budget
from eyas.train.unroll import Supervision
from tests.tiny import randomize
from tests.train.training import SETTINGS, assert_identical, examples, interrupt_at, make_trainer, silent, state_of

FAMILY = [name for name in trained() if name != "eagle3"]
OWN = replace(SETTINGS, tree_every=0, measure_steps=1000, sampled_columns=0, step_keep=1.0)
STEPS, DECAY = 3, 0.6


def plain_attention(attention, x, positions, rotary):
    """[M, H] of rows in the order of a text, each seeing those before it and itself."""
    M = len(x)
    q, k, v = (layer(x).view(M, -1, attention.head_dim) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    cos, sin = rotary(positions, x.dtype)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (each.repeat_interleave(attention.heads // attention.kv_heads, 1) for each in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * attention.head_dim**-0.5
    scores = scores.masked_fill(torch.ones(M, M).triu(1).bool(), float("-inf"))
    return attention.o_proj(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1))


def plain_mlp(block, x):
    y = block.post_attention_layernorm(x)
    return x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))


def document(method: str):
    """A network with random weights, and one text whose tokens all are an answer."""
    trainer = make_trainer(None, OWN, method=method)
    randomize(trainer.network, 3)
    tokens = examples()[0].tokens
    batch, states = make_batch([Example(tokens, [0] * len(tokens))], trainer.source, trainer.network)
    distribution = trainer.teacher.distribution(states.hidden)
    within = trainer.teacher.within(states.target_argmax)
    supervision = Supervision(distribution, torch.arange(len(tokens)), within, STEPS, DECAY)
    return trainer.network, torch.tensor(tokens), states.hidden, distribution, within, batch, supervision


def cross_entropy(logits, distribution, within):
    """Mean over anchors, those whose likeliest the draft cannot say counting nothing."""
    return float((-(distribution * logits.log_softmax(-1)).sum(-1) * within).mean())


@torch.no_grad()
def means_of(method: str) -> tuple[list[float], list[float], float]:
    """Each step's cross-entropy by the method's formula, and as its loss says; and the loss."""
    network, t, hidden, distribution, within, batch, supervision = document(method)
    total, means = METHODS[method].training().loss(network, batch, supervision)
    M, wanted = len(t), []
    embedding = network.embedding[0]
    if method == "medusa":
        for k in range(STEPS):
            x = hidden + F.silu(network[k][0].linear(hidden))
            logits = network[k][1](x)
            rows = torch.arange(M - 2 - k)
            wanted.append(cross_entropy(logits[rows], distribution[rows + 1 + k], within[rows + 1 + k]))
    if method == "mtp":
        h = hidden
        for k in range(STEPS):
            module, rows = network.layers[k], torch.arange(M - 1 - k)
            x = module.eh_proj(torch.cat([module.enorm(embedding[t[rows + 1 + k]]), module.hnorm(h[rows])], -1))
            x = x + plain_attention(module.self_attn, module.input_layernorm(x), rows, network.rotary)
            h = plain_mlp(module, x)
            logits = module.shared_head["norm"](h) @ network.frozen[0].weight.T
            rows = rows[:-1]
            wanted.append(cross_entropy(logits[rows], distribution[rows + 1 + k], within[rows + 1 + k]))
    return wanted, [float(mean) for mean in means], float(total)


@pytest.mark.parametrize("method", ["medusa", "mtp"])
def test_each_depths_loss_is_the_papers(method):
    wanted, found, total = means_of(method)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert total == pytest.approx(sum(DECAY**k * each for k, each in enumerate(wanted)), rel=1e-9)


@torch.no_grad()
def test_eagle1_learns_features_and_a_tenth_of_what_the_head_makes_of_them():
    """The features it is given are noisy, those it is to guess are not."""
    network, t, hidden, distribution, within, batch, supervision = document("eagle1")
    total, means = eagle1.loss(network, batch, supervision._replace(steps=1, seed=5))
    noise = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(5)).double() - 0.5
    given = hidden + noise * 2 * eagle1.NOISE * hidden.abs().mean()
    rows = torch.arange(len(t) - 1)
    x = network.fc(torch.cat([network.embedding[0][t[rows + 1]], given[rows]], -1))
    x = x + plain_attention(network.layers[0].self_attn, x, rows, network.rotary)
    guessed, rows = plain_mlp(network.layers[0], x)[:-1], rows[:-1]
    entropy = cross_entropy(guessed @ network.frozen[0].weight.T, distribution[rows + 1], within[rows + 1])
    distance = float(F.smooth_l1_loss(guessed, hidden[rows + 1]))
    assert float(means[0]) == pytest.approx(entropy, rel=1e-9)
    assert float(total) == pytest.approx(distance + 0.1 * entropy, rel=1e-9)


def test_noise_is_a_function_of_the_seed_alone():
    network, *_, batch, supervision = document("eagle1")
    losses = [float(eagle1.loss(network, batch, supervision._replace(steps=1, seed=seed))[0].detach()) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_draft_without_the_token_says_the_same_whatever_was_drawn():
    for left_out in (True, False):
        trainer = make_trainer(None, replace(OWN, token_left_out=left_out), method="eagle1")
        example = examples()[0]
        (one, _), (other, _) = (
            make_batch([Example(tokens, example.answers)], trainer.source, trainer.network) for tokens in (example.tokens, example.tokens)
        )
        other.tokens = other.tokens.flip(0)
        a, b = (next(iter(eagle1.unroll(trainer.network, batch, 1))).a for batch in (one, other))
        assert torch.equal(a, b) == left_out


@pytest.mark.parametrize("method", trained())
def test_each_method_learns_and_is_accepted(method, tmp_path):
    trainer = make_trainer(tmp_path / "draft", replace(OWN, measure_steps=10), method=method)
    losses = []
    trainer.run(Budget(steps=60), lambda progress, found, spent: losses.append(found[0]))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]) and trainer.progress.best() > 1.1
    assert trainer.progress.unrolled >= trainer.progress.slots > 0
    assert ("accuracies" in trainer.facts) == METHODS[method].static


@pytest.mark.parametrize("method", FAMILY)
def test_a_resumed_run_is_one_that_never_stopped(method, tmp_path):
    settings = replace(OWN, measure_steps=3)
    whole = make_trainer(tmp_path / "whole", settings, method=method)
    whole.run(Budget(steps=8), silent)
    stopped = make_trainer(tmp_path / "stopped", settings, method=method)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(Budget(steps=8), interrupt_at(5))
    resumed = make_trainer(tmp_path / "stopped", settings, method=method)
    resumed.resume()
    resumed.run(Budget(steps=8), silent)
    assert_identical(state_of(resumed), state_of(whole))


def test_the_default_settings_name_steps_for_every_method():
    steps = {name: METHODS[name].training().SETTINGS["unroll_steps"] for name in trained()}
    assert steps == {"eagle3": TrainSettings().unroll_steps, "eagle1": 1, "medusa": 5, "mtp": 4}
    assert TrainSettings(**METHODS["eagle3"].training().SETTINGS) == TrainSettings()
