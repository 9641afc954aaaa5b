"""The reference against the paper's rules, each checked by a second, independent computation.

Knows tiny random weights only: H=8, D=7, V=11, two query heads and one key-value head of width 4."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from eyas import reference as R
from eyas.config import DraftConfig, TreeShape
from tests.enumeration import (
    distance,
    distribution_of_accept_reject,
    distribution_of_walk,
    random_distribution,
    random_parents,
    random_tree,
    surprise,
)

H, D, V = 8, 7, 11
CONFIG = DraftConfig(V, D, H, 12, 2, 1, 4, H, (1, 2, 3), 64)
VOCAB_IDS = torch.tensor([0, 1, 3, 4, 6, 8, 10])
n = 9


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def random_weights(config: DraftConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make) * 0.5

    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    weights = {
        "embed_tokens.weight": matrix(config.vocab_size, H),
        "fc.weight": matrix(H, 3 * H),
        "midlayer.self_attn.q_proj.weight": matrix(width, 2 * H),
        "midlayer.self_attn.k_proj.weight": matrix(kv, 2 * H),
        "midlayer.self_attn.v_proj.weight": matrix(kv, 2 * H),
        "midlayer.self_attn.o_proj.weight": matrix(H, width),
        "midlayer.mlp.gate_proj.weight": matrix(config.intermediate_size, H),
        "midlayer.mlp.up_proj.weight": matrix(config.intermediate_size, H),
        "midlayer.mlp.down_proj.weight": matrix(H, config.intermediate_size),
        "lm_head.weight": matrix(config.draft_vocab_size, H),
    }
    norms = ["midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"]
    norms += [f"fc_norm.{k}" for k in range(3)] if config.fc_norm else []
    return weights | {f"{name}.weight": 1 + 0.3 * matrix(H) for name in norms}


def random_document(length: int = n, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, features and target logits."""
    make = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (length,), generator=make)
    return tokens, torch.randn(length, 3 * H, generator=make), 2 * torch.randn(length, V, generator=make)


def drafted_step_by_step(weights, config, prefix: torch.Tensor, features: torch.Tensor, follow: list[int]) -> torch.Tensor:
    """a after the prefix and after each further token, the slow way: one row more at a time, plainly causal, positions 0, 1, 2, ..."""
    hidden = R.fuse(weights, config, features)
    rows = prefix[1:].tolist()
    outputs = []
    for token in [*follow, None]:
        size = len(rows)
        embeddings = weights["embed_tokens.weight"][torch.tensor(rows)]
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        a = R.draft_block(weights, config, embeddings, hidden, torch.arange(size), causal)[-1]
        outputs.append(a)
        hidden = torch.cat([hidden, R.fed_back(weights, config, a)[None]])
        rows.append(token)
    return torch.stack(outputs)


# ---- the one rule ----


def test_ancestor_mask_is_being_an_ancestor():
    rng = random.Random(0)
    for _ in range(200):
        parents = random_parents(rng, rng.randint(1, 24))
        mask = R.ancestor_mask(parents)
        for row in range(len(parents)):
            line, at = set(), row
            while at >= 0:
                line.add(at)
                at = parents[at]
            assert set(mask[row].nonzero().flatten().tolist()) == line


def test_comb_mask_is_step_0_causal_plus_own_slot_diagonals():
    anchors, steps = 5, 4
    mask = R.ancestor_mask(R.comb_parents(anchors, steps)).view(steps, anchors, steps, anchors)
    for i, j, s, k in itertools.product(range(steps), range(anchors), range(steps), range(anchors)):
        allowed = k <= j if s == 0 else (k == j and s <= i)
        assert mask[i, j, s, k] == allowed, "trap 11: never a later step-0 key"


def test_comb_positions_are_slot_plus_step():
    anchors, steps = 5, 4
    positions = R.ancestor_mask(R.comb_parents(anchors, steps)).sum(-1) - 1
    assert positions.view(steps, anchors).tolist() == [[j + i for j in range(anchors)] for i in range(steps)]


# ---- verification ----


def test_walk_has_the_distribution_of_accept_reject():
    rng = random.Random(1)
    for _ in range(100):
        vocab = rng.randint(2, 4)
        tokens, parents = random_tree(rng, rng.randint(1, 5), vocab)
        distribution = random_distribution(rng, len(tokens), vocab)
        walked, rejected = distribution_of_walk(tokens, parents, distribution), distribution_of_accept_reject(tokens, parents, distribution)
        assert abs(sum(walked.values()) - 1) < 1e-12
        assert distance(walked, rejected) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_accept_reject_draws_from_its_distribution(seed: int):
    rng = random.Random(seed)
    tokens, parents = random_tree(rng, 6, 4)
    distribution = random_distribution(rng, 6, 4)
    exact = distribution_of_accept_reject(tokens, parents, distribution)
    uniforms, seen = iter(rng.random, None), Counter()
    for _ in range(6000):
        path, bonus = R.accept_reject(tokens, parents, torch.tensor(distribution), uniforms)
        seen[(*(tokens[node] for node in path[1:]), bonus)] += 1
    assert surprise(seen, exact) < 1


def test_accept_reject_never_commits_what_the_target_cannot_draw():
    tokens, parents, distribution = [0, 2, 1], [-1, 0, 0], torch.tensor([[0.0, 1.0, 0.0]] * 3)
    for u in [0.0, 0.5, 1 - 2**-53]:
        assert R.accept_reject(tokens, parents, distribution, itertools.repeat(u)) == ([0, 2], 1)


def test_walk_of_a_lone_root_is_plain_decoding():
    assert R.walk([5], [-1], [3]) == ([0], 3)


def test_walk_follows_the_draws_and_stops_where_none_fits():
    tokens, parents = [9, 4, 7, 4, 5], [-1, 0, 0, 2, 3]
    assert R.walk(tokens, parents, [7, 0, 4, 6, 0]) == ([0, 2, 3], 6)


# ---- the training-time test ----


@pytest.mark.parametrize("norm_output", [False, True])
def test_unroll_equals_generation(norm_output: bool):
    config, steps = replace(CONFIG, norm_output=norm_output), 4
    weights, (tokens, features, _) = random_weights(), random_document()
    unrolled = R.unroll(weights, config, tokens, features, steps)
    for anchor in range(n - 1):
        inside = min(steps, n - 1 - anchor)  # steps whose input token exists
        follow = tokens[anchor + 2 : anchor + 1 + inside].tolist()
        chain = drafted_step_by_step(weights, config, tokens[: anchor + 2], features[: anchor + 1], follow)
        assert (unrolled[:inside, anchor] - chain).abs().max() < 1e-10


def test_slot_reads_the_next_token_and_not_the_one_after():
    weights, (tokens, features, _) = random_weights(), random_document()
    steps, anchor = 3, 4
    before = R.unroll(weights, CONFIG, tokens, features, steps)
    for position in range(n):
        changed = tokens.clone()
        changed[position] = (changed[position] + 1) % V
        moved = (R.unroll(weights, CONFIG, changed, features, steps)[:, anchor] - before[:, anchor]).abs().amax(-1) > 1e-9
        assert moved.tolist() == [1 <= position <= anchor + 1 + step for step in range(steps)]


def test_no_step_reads_a_later_feature():
    weights, (tokens, features, _) = random_weights(), random_document()
    before = R.unroll(weights, CONFIG, tokens, features, 4)
    for position in range(n):
        changed = features.clone()
        changed[position] += 1
        moved = (R.unroll(weights, CONFIG, tokens, changed, 4) - before).abs().amax(-1) > 1e-9
        assert all(moved[step, anchor] == (position <= anchor) for step in range(4) for anchor in range(n - 1))


def test_teacher_of_step_i_slot_j_is_the_targets_row_j_1_i():
    weights, (tokens, features, logits) = random_weights(), random_document()
    logits[:, VOCAB_IDS[0]] += 20  # every slot's likeliest lies in the draft vocabulary
    anchor = 3
    for step in range(3):
        answer = torch.full((n,), -1)
        answer[anchor + 1 : anchor + 3 + step] = 0  # at this step only this anchor counts
        assert R.loss_anchors(answer, step).nonzero().flatten().tolist() == [anchor]

        def loss(target_logits, answer=answer, step=step):
            return R.unrolled_loss(weights, CONFIG, tokens, features, target_logits, answer, VOCAB_IDS, step + 1, 0.8)[1][step]

        for row in range(n):
            peculiar = logits.clone()
            peculiar[row, VOCAB_IDS[1]] += 40
            assert (abs(loss(peculiar) - loss(logits)) > 1e-6) == (row == anchor + 1 + step)


def test_loss_slots_are_those_whose_drawn_and_predicted_token_share_an_answer():
    rng = random.Random(2)
    for _ in range(50):
        answer = sorted(rng.choice([0, 1, 2]) for _ in range(12))
        answer = [-1 if rng.random() < 0.2 else number for number in answer]
        for step in range(14):
            expected = [
                j + 2 + step < len(answer) and answer[j + 1] >= 0 and answer[j + 1] == answer[j + 2 + step] for j in range(len(answer))
            ]
            assert R.loss_anchors(torch.tensor(answer), step).tolist() == expected


def test_loss_is_the_cross_entropy_written_out_slot_by_slot():
    weights, (tokens, features, logits) = random_weights(), random_document()
    answer = torch.tensor([-1, -1, 0, 0, 0, 0, 1, 1, 1])
    total, losses = R.unrolled_loss(weights, CONFIG, tokens, features, logits, answer, VOCAB_IDS, 4, 0.8)
    a = R.unroll(weights, CONFIG, tokens, features, 4)
    outside = 0
    for step in range(4):
        terms = []
        for anchor in R.loss_anchors(answer, step).nonzero().flatten().tolist():
            row = logits[anchor + 1 + step]
            q = R.draft_logits(weights, CONFIG, a[step, anchor]).log_softmax(-1)
            p = row[VOCAB_IDS].exp() / row[VOCAB_IDS].exp().sum()
            within = row.argmax().item() in VOCAB_IDS.tolist()
            outside += not within
            terms.append(-(p * q).sum().item() if within else 0.0)
        assert losses[step].item() == pytest.approx(sum(terms) / len(terms) if terms else 0.0, abs=1e-12)
    assert outside > 0, "the case must hold an anchor whose likeliest lies outside the draft vocabulary"
    assert losses[3] == 0, "no answer is long enough for step 3"
    assert total.item() == pytest.approx(sum(0.8**i * loss.item() for i, loss in enumerate(losses)), abs=1e-12)


@pytest.mark.parametrize("variant", [{}, {"fc_norm": True}, {"norm_output": True}])
def test_every_weight_learns_and_gradients_are_finite_differences(variant: dict):
    config = replace(CONFIG, **variant)
    weights, (tokens, features, logits) = random_weights(config), random_document()
    learned = {name: weight for name, weight in weights.items() if name != "embed_tokens.weight"}
    for weight in learned.values():
        weight.requires_grad_()

    def loss():
        return R.unrolled_loss(weights, config, tokens, features, logits, torch.zeros(n, dtype=torch.long), VOCAB_IDS, 3, 0.8)[0]

    for (name, weight), gradient in zip(learned.items(), torch.autograd.grad(loss(), learned.values())):
        assert gradient.abs().max() > 0, name
        index, step = tuple(gradient.abs().eq(gradient.abs().max()).nonzero()[0]), 1e-5
        with torch.no_grad():
            weight[index] += step
            above = loss()
            weight[index] -= 2 * step
            below = loss()
            weight[index] += step
        assert ((above - below) / (2 * step)).item() == pytest.approx(gradient[index].item(), rel=1e-5, abs=1e-9), name


def test_simulated_tau_counts_leading_steps_only():
    accepted = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    answer = torch.zeros(5, dtype=torch.long)  # anchors 0, 1, 2 count at step 0
    assert R.simulated_tau(accepted, answer) == pytest.approx(1 + (3 + 1 + 0) / 3)


def test_draft_accepts_compares_target_ids_over_the_full_vocabulary():
    weights, (tokens, features, logits) = random_weights(), random_document()
    answer, steps = torch.zeros(n, dtype=torch.long), 3
    guesses = VOCAB_IDS[R.draft_logits(weights, CONFIG, R.unroll(weights, CONFIG, tokens, features, steps)).argmax(-1)]
    agreeing = logits.clone()
    for anchor in range(n - 2):
        agreeing[anchor + 1, guesses[0, anchor]] = 100.0
    accepted = R.draft_accepts(weights, CONFIG, tokens, features, agreeing, answer, VOCAB_IDS, steps)
    assert accepted[0].tolist() == [True] * (n - 2) + [False] * 2
    agreeing[:, 2] = 200.0  # id 2 is not in the draft vocabulary: every anchor is a miss
    assert not R.draft_accepts(weights, CONFIG, tokens, features, agreeing, answer, VOCAB_IDS, steps).any()


# ---- growth ----


def test_tree_outputs_are_the_chains_down_to_each_node():
    rng, weights, (tokens, features, _) = random.Random(3), random_weights(), random_document()
    node_tokens, parents = random_tree(rng, 12, V)
    node_tokens[0] = int(tokens[-1])
    depths = (R.ancestor_mask(parents).sum(-1) - 1).tolist()
    tree = R.Tree(node_tokens, parents, depths, [0.0] * 12)
    outputs = R.tree_outputs(weights, CONFIG, tokens.tolist(), features[:-1], tree)
    for node in range(12):
        line = R.ancestor_mask(parents)[node].nonzero().flatten().tolist()[1:]
        chain = drafted_step_by_step(weights, CONFIG, tokens, features[:-1], [node_tokens[k] for k in line])
        assert (outputs[node] - chain[-1]).abs().max() < 1e-10


def assert_is_a_tree(tree: R.Tree, shape: TreeShape) -> None:
    for node in range(1, len(tree.tokens)):
        parent = tree.parents[node]
        assert 0 <= parent < node, "parents come before children"
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.scores[node] <= tree.scores[parent]
    for node in range(len(tree.tokens)):
        tokens = [tree.tokens[child] for child in R.children(tree.parents, node)]
        assert len(tokens) == len(set(tokens)) <= shape.top_k
    assert max(tree.depths) <= shape.levels


def test_60x7x10_drafts_59_tokens_on_at_most_8_levels_with_at_most_10_children():
    config, shape = replace(CONFIG, vocab_size=50, draft_vocab_size=40), TreeShape.parse("60x7x10")
    tokens, features, _ = random_document(5)
    tree = R.grow(random_weights(config), config, tokens.tolist(), features[:-1], torch.arange(5, 45), shape)
    assert (tree.tokens[0], tree.parents[0], tree.depths[0], tree.scores[0]) == (int(tokens[-1]), -1, 0, 0.0)
    assert len(tree.tokens) == 60
    assert_is_a_tree(tree, shape)


def test_growth_expands_the_best_of_each_level_and_keeps_the_best_of_all():
    weights, (tokens, features, _) = random_weights(), random_document()
    shape = TreeShape(10**6, 3, 3)
    made = R.grow(weights, CONFIG, tokens.tolist(), features[:-1], VOCAB_IDS, shape)
    assert [made.depths.count(depth) for depth in range(5)] == [1, 3, 9, 9, 9]
    for node in range(len(made.tokens)):
        level = [k for k in range(len(made.tokens)) if made.depths[k] == made.depths[node]]
        expanded = sorted(level, key=lambda k: (-made.scores[k], k))[:3] if made.depths[node] < 4 else []
        born = R.children(made.parents, node)
        assert len(born) == (3 if node in expanded else 0)
        line = R.ancestor_mask(made.parents)[node].nonzero().flatten().tolist()[1:]
        a = drafted_step_by_step(weights, CONFIG, tokens, features[:-1], [made.tokens[k] for k in line])[-1]
        best = R.draft_logits(weights, CONFIG, a).log_softmax(-1).topk(3)
        for child, log_prob, draft_id in zip(born, best.values.tolist(), best.indices.tolist()):
            assert made.tokens[child] == VOCAB_IDS[draft_id]
            assert made.scores[child] == pytest.approx(made.scores[node] + log_prob, abs=1e-10)
    for nodes in [1, 2, 5, 12, 31]:
        kept = R.grow(weights, CONFIG, tokens.tolist(), features[:-1], VOCAB_IDS, replace(shape, nodes=nodes))
        assert sorted(kept.scores) == sorted(made.scores)[-nodes:]
        assert_is_a_tree(kept, replace(shape, nodes=nodes))


def test_a_draft_vocabulary_smaller_than_top_k_gives_all_its_tokens():
    tokens, features, _ = random_document()
    tree = R.grow(random_weights(), CONFIG, tokens.tolist(), features[:-1], VOCAB_IDS, TreeShape(500, 1, 10))
    assert [tree.depths.count(depth) for depth in range(3)] == [1, D, D * D]
    assert_is_a_tree(tree, TreeShape(500, 1, 10))


def test_chain_3_is_the_greedy_chain():
    weights, (tokens, features, _) = random_weights(), random_document()
    tree = R.grow(weights, CONFIG, tokens.tolist(), features[:-1], VOCAB_IDS, TreeShape.parse("chain:3"))
    follow: list[int] = []
    for _ in range(3):
        a = drafted_step_by_step(weights, CONFIG, tokens, features[:-1], follow)[-1]
        follow.append(int(VOCAB_IDS[R.draft_logits(weights, CONFIG, a).argmax()]))
    assert tree.tokens == [int(tokens[-1]), *follow]
    assert tree.parents == [-1, 0, 1, 2]


def test_ties_go_to_the_lower_draft_id_and_the_earlier_made():
    weights, (tokens, features, _) = random_weights(), random_document()
    tree = R.grow(
        weights, CONFIG, tokens.tolist(), features[:-1], VOCAB_IDS, TreeShape(6, 1, 2), lambda log_probs, depth: torch.zeros_like(log_probs)
    )
    assert tree == R.Tree([int(tokens[-1]), 0, 1, 0, 1, 0], [-1, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2], [0.0] * 6)


def test_shared_noise_steers_growth_by_depth():
    weights, (tokens, features, _) = random_weights(), random_document()
    noise = torch.zeros(4, D)
    noise[1, 5], noise[2, 2], noise[3, 6] = 50.0, 50.0, 50.0
    tree = R.grow(
        weights,
        CONFIG,
        tokens.tolist(),
        features[:-1],
        VOCAB_IDS,
        TreeShape.parse("chain:3"),
        lambda log_probs, depth: (log_probs + noise[depth]).log_softmax(-1),
    )
    assert tree.tokens[1:] == VOCAB_IDS[torch.tensor([5, 2, 6])].tolist()


# ---- the settings are really read ----


def test_each_fact_of_the_config_changes_the_result():
    fc_normed = replace(CONFIG, fc_norm=True)
    weights, (tokens, features, _) = random_weights(fc_normed), random_document()
    plain = R.unroll(weights, CONFIG, tokens, features, 2)
    for changed in [fc_normed, replace(CONFIG, rope_theta=500.0), replace(CONFIG, rms_norm_eps=0.1)]:
        assert (R.unroll(weights, changed, tokens, features, 2)[0] - plain[0]).abs().max() > 1e-6
    normed = R.unroll(weights, replace(CONFIG, norm_output=True), tokens, features, 2)
    assert torch.equal(normed[0], plain[0]), "step 0 feeds nothing back"
    assert (normed[1, :-1] - plain[1, :-1]).abs().max() > 1e-6


def test_fc_norm_makes_fuse_blind_to_the_scale_of_each_feature():
    config = replace(CONFIG, fc_norm=True, rms_norm_eps=0.0)
    weights, (_, features, _) = random_weights(config), random_document()
    scaled = features * torch.tensor([2.0, 30.0, 0.1]).repeat_interleave(H)
    assert (R.fuse(weights, config, scaled) - R.fuse(weights, config, features)).abs().max() < 1e-12
    assert (R.fuse(weights, replace(config, fc_norm=False), scaled) - R.fuse(weights, config, features)).abs().max() > 0.1


def test_rope_depends_on_distance_only_and_keeps_length():
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1))

    def at(vector, position):
        return R.rope(vector, torch.tensor([position]), CONFIG)

    assert torch.allclose(at(x, 0), x)
    assert torch.allclose(at(x, 9).norm(dim=-1), x.norm(dim=-1))
    assert torch.allclose((at(x, 9) * at(y, 4)).sum(-1), (at(x, 25) * at(y, 20)).sum(-1))


def test_logits_read_the_normed_state_and_the_next_step_the_raw_one():
    config, weights, a = replace(CONFIG, rms_norm_eps=0.0), random_weights(), torch.randn(3, H, generator=torch.Generator().manual_seed(0))
    normed = a / a.square().mean(-1, keepdim=True).sqrt() * weights["norm.weight"]
    assert torch.allclose(R.draft_logits(weights, config, a), normed @ weights["lm_head.weight"].T)
    assert torch.equal(R.fed_back(weights, config, a), a)
    assert torch.allclose(R.fed_back(weights, replace(config, norm_output=True), a), normed)


def test_one_layer_is_hugging_faces_llama_layer_when_it_is_blind_to_the_embedding():
    """With the embedding's columns of q, k and v at zero, the block is a Llama layer whose input norm is `hidden_norm`."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = replace(CONFIG, num_attention_heads=4, num_key_value_heads=2)
    shape = LlamaConfig(
        hidden_size=H,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        attn_implementation="eager",
    )
    weights, state, size = random_weights(config), {}, 6
    layer = llama.LlamaDecoderLayer(shape, 0).double()
    for name in layer.state_dict():
        ours = "midlayer." + name.replace("input_layernorm", "hidden_norm")
        if any(part in name for part in ["q_proj", "k_proj", "v_proj"]):
            weights[ours] = weights[ours] * (torch.arange(2 * H) >= H)
        state[name] = weights[ours][..., -layer.state_dict()[name].shape[-1] :]
    layer.load_state_dict(state)
    x, positions = torch.randn(size, H, generator=torch.Generator().manual_seed(5)), torch.arange(3, 3 + size)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    with torch.no_grad():
        theirs = layer(
            x[None],
            attention_mask=torch.zeros(size, size).masked_fill(~causal, -torch.inf)[None, None],
            position_embeddings=llama.LlamaRotaryEmbedding(shape)(x[None], positions[None]),
        )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs  # older versions return a tuple
    ours = R.draft_block(weights, config, torch.randn(size, H), x, positions, causal)
    assert (ours - theirs.view(size, H)).abs().max() < 1e-5  # their norms and angles are float32 inside
