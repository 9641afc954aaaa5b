"""EAGLE-3 in one slow, exact file, to be read beside the paper (arXiv 2503.01840), in its order and with its letters.

    l, m, h  low, middle and high features: the target's residual stream at three depths
    g        the three fused into one vector, which a draft step reads
    e        the embedding of the token just drawn
    a        what the draft layer makes of g and e; it stands in for the g that the target has not computed yet

In order: fuse · one draft step · the tree and its one rule · growth · verification · the training-time test. Everything is
computed from scratch at every call, in float64 on the CPU; the fast paths are tested against this file.

It does not know the target (its features, logits and draws come in as arguments), nor caches, batches, where noise comes
from, how the weights lie in files, or which tokens are an answer. "SafeAILab" is the paper's published code: where the
paper leaves a choice, what is trained and served everywhere is that code's choice, and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import DraftConfig, TreeShape

# Axes: N rows (M of them hold the target's features), n tokens of a document, S = n - 1 anchors, I steps of the unroll,
#       H draft width, 3H three features side by side, V target vocabulary, D draft vocabulary, A heads, K key-value heads, C head width
Weights = Mapping[str, Tensor]  # float64, under the published names, with `embed_tokens.weight` [V, H], the target's or the draft's own


# ---- Fuse: l, m, h -> g -----------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis, then scale (Llama's norm)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def fuse(weights: Weights, config: DraftConfig, features_N3H: Tensor) -> Tensor:
    """g_NH: one linear map of [l ; m ; h] (paper, inference pipeline), or of as many features as there are taps. EAGLE-3.1 norms each
    of them first (`fc_norm`); some published heads norm all of them at once (`norm_before_fc`)."""
    if config.norm_before_fc:
        features_N3H = rms_norm(features_N3H, weights["input_norm.weight"], config.rms_norm_eps)
    parts = list(features_N3H.chunk(len(config.taps), dim=-1))
    if config.fc_norm:
        parts = [rms_norm(part, weights[f"fc_norm.{k}.weight"], config.rms_norm_eps) for k, part in enumerate(parts)]
    return torch.cat(parts, dim=-1) @ weights["fc.weight"].T


# ---- One draft step: (e, g) -> a -> logits ----------------------------------------------------------------------------


def rope(x: Tensor, positions: Tensor, config: DraftConfig) -> Tensor:
    """Rotate x [N, heads, C] by its positions [N]: entry c pairs with c + C/2, as Hugging Face's Llama has it. Of some published heads only
    the first entries of C rotate."""
    assert config.rope_scaling is None, "the reference knows plain rotary embeddings only"
    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = positions[:, None, None] * frequencies  # [N, 1, C/2], the same for every head
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(), rest], dim=-1)


def attention(weights: Weights, config: DraftConfig, layer: str, x: Tensor, positions_N: Tensor, mask_NN: Tensor) -> Tensor:
    """Grouped-query attention; row i attends to row j where mask[i, j]. Reads 2H (a layer behind the first: H), returns H. Some published
    heads norm each query and key head (`qk_norm`)."""

    def heads(name: str, count: int) -> Tensor:
        y = dense(weights, f"{layer}.self_attn.{name}_proj", x).view(-1, count, config.head_dim)
        return rms_norm(y, weights[f"{layer}.self_attn.{name}_norm.weight"], config.rms_norm_eps) if config.qk_norm and name != "v" else y

    A, K = config.num_attention_heads, config.num_key_value_heads
    q_NAC = rope(heads("q", A), positions_N, config)
    k_NAC = rope(heads("k", K), positions_N, config).repeat_interleave(A // K, dim=1)
    v_NAC = heads("v", K).repeat_interleave(A // K, dim=1)
    scores_ANN = torch.einsum("iac,jac->aij", q_NAC, k_NAC) / config.head_dim**0.5
    if config.sliding_window is not None:  # some published heads: a row sees the last positions alone
        mask_NN = mask_NN & (positions_N > positions_N[:, None] - config.sliding_window)
    shares_ANN = scores_ANN.masked_fill(~mask_NN, -torch.inf).softmax(-1)
    return dense(weights, f"{layer}.self_attn.o_proj", torch.einsum("aij,jac->iac", shares_ANN, v_NAC).flatten(1))


def dense(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One linear map; some published heads have biases."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def decoder_layer(
    weights: Weights, config: DraftConfig, layer: str, x: Tensor, residual_NH: Tensor, positions_N: Tensor, mask_NN: Tensor
) -> Tensor:
    """Llama's: attention that reads x is added to the residual stream, then the gated MLP of its norm."""
    x_NH = residual_NH + attention(weights, config, layer, x, positions_N, mask_NN)
    y = rms_norm(x_NH, weights[f"{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = dense(weights, f"{layer}.mlp.gate_proj", y), dense(weights, f"{layer}.mlp.up_proj", y)
    return x_NH + dense(weights, f"{layer}.mlp.down_proj", torch.nn.functional.silu(gate) * up)


def draft_block(
    weights: Weights, config: DraftConfig, embeddings_NH: Tensor, features_NH: Tensor, positions_N: Tensor, mask_NN: Tensor
) -> Tensor:
    """a_NH, the un-normed output of the draft's one decoder layer (paper, inference pipeline).

    The paper reduces [g ; e] to width H before the layer. SafeAILab folds that into attention, whose q, k and v read 2H:
    the normed embedding FIRST, the normed feature second. The residual stream is the feature as it came, un-normed
    (some published heads: normed, `norm_before_residual`). A draft of more layers has ordinary ones behind it.
    """
    eps = config.rms_norm_eps
    e = rms_norm(embeddings_NH, weights["midlayer.input_layernorm.weight"], eps)
    g = rms_norm(features_NH, weights["midlayer.hidden_norm.weight"], eps)
    residual = g if config.norm_before_residual else features_NH
    a = decoder_layer(weights, config, "midlayer", torch.cat([e, g], dim=-1), residual, positions_N, mask_NN)
    for layer in (f"layers.{number}" for number in range(1, config.draft_layers)):
        x = rms_norm(a, weights[f"{layer}.input_layernorm.weight"], eps)
        a = decoder_layer(weights, config, layer, x, a, positions_N, mask_NN)
    return a


def draft_logits(weights: Weights, config: DraftConfig, a_NH: Tensor) -> Tensor:
    """[N, D]: final norm, then the draft's own head over its own vocabulary."""
    return rms_norm(a_NH, weights["norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def fed_back(weights: Weights, config: DraftConfig, a: Tensor) -> Tensor:
    """What the next step reads in place of g: a before the final norm (SafeAILab), or after it (EAGLE-3.1's `norm_output`)."""
    return rms_norm(a, weights["norm.weight"], config.rms_norm_eps) if config.norm_output else a


# ---- The tree and its one rule ----------------------------------------------------------------------------------------


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """bool [N, N]: row i sees row j iff j is i or an ancestor of i. A root's parent is -1; parents come before children.

    This one rule makes every mask of EAGLE-3. A text is a tree without branches, so its mask is causal; the draft tree
    hangs from the text's last row; the training-time test is a comb (see `comb_parents`).
    """
    mask_NN = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        assert -1 <= parent < row, f"row {row} has parent {parent}: parents come before children"
        if parent >= 0:
            mask_NN[row] |= mask_NN[parent]
    return mask_NN


# The alignment. The target has read t_0 .. t_{P-1} and drawn t_P; anchor j pairs what it knew after t_j with what came next:
#
#   row        anchor 0  anchor 1  anchor 2  ..  anchor P-1  |  depth 1   depth 2
#   hidden      g_0     g_1     g_2    ..  g_{P-1}   |     a         a      its parent's; depth 1 hangs from anchor P-1,
#   token       t_1     t_2     t_3    ..  t_P       |     x         y      whose token t_P is the tree's root
#   position     0       1       2     ..  P-1       |     P        P+1     = the row's number of ancestors
#   predicts    t_2     t_3     t_4    ..  t_{P+1}   |  t_{P+2}   t_{P+3}


def draft_rows(weights: Weights, config: DraftConfig, tokens_N: Tensor, parents: Sequence[int], g_MH: Tensor) -> Tensor:
    """a_NH for any tree of rows: the first M hold the target's fused features, every later one its parent's output.

    A parent must be run before its child can be, so all rows are run again and again: each pass makes one more generation
    right. A row that is not right yet holds a wrong feature, but only its descendants see it, and they are later still.
    """
    M = len(g_MH)
    mask_NN = ancestor_mask(parents)
    positions_N = mask_NN.sum(-1) - 1
    embeddings_NH = weights["embed_tokens.weight"][tokens_N]
    generations = int(mask_NN[:, M:].sum(-1).max())  # the longest line of rows without a feature of the target's
    hidden_NH = torch.cat([g_MH, g_MH.new_zeros(len(parents) - M, config.hidden_size)])
    for _ in range(generations):
        a_NH = draft_block(weights, config, embeddings_NH, hidden_NH, positions_N, mask_NN)
        hidden_NH = torch.cat([g_MH, fed_back(weights, config, a_NH[list(parents[M:])])])
    return draft_block(weights, config, embeddings_NH, hidden_NH, positions_N, mask_NN)


# ---- Growth (EAGLE-2's dynamic tree, arXiv 2406.16858, which EAGLE-3 keeps) --------------------------------------------


class Tree(NamedTuple):
    """Guesses about what follows t_P. Row 0 is the root; parents come before children; siblings carry distinct tokens."""

    tokens: list[int]  # target ids, t_P first
    parents: list[int]  # -1 for the root
    depths: list[int]  # 0 for the root
    scores: list[float]  # log of the chance that the path down to this node is drawn; 0.0 for the root


def tree_outputs(weights: Weights, config: DraftConfig, tokens: Sequence[int], features_P3H: Tensor, tree: Tree) -> Tensor:
    """a for every row of a tree under the committed tokens t_0 .. t_P: the table above, in one call. The root's row is anchor P-1."""
    P = len(features_P3H)
    assert len(tokens) == P + 1 and tree.tokens[0] == tokens[P], "features end one token before the tokens do; the root is the last token"
    rows = torch.tensor([*tokens[1:], *tree.tokens[1:]])
    parents = [*range(-1, P - 1), *(P - 1 + parent for parent in tree.parents[1:])]
    return draft_rows(weights, config, rows, parents, fuse(weights, config, features_P3H))[P - 1 :]


def grow(
    weights: Weights,
    config: DraftConfig,
    tokens: Sequence[int],
    features_P3H: Tensor,
    vocab_ids: Tensor,  # [D]: the target id of each draft id
    shape: TreeShape,
    score: Callable[[Tensor, int], Tensor] | None = None,
) -> Tree:
    """Expand the best of each new level, then keep the best of all (EAGLE-2, expansion and reranking; SafeAILab's counts).

    The root gets its top_k children; then, `shape.depth` times, the top_k best nodes of the newest level get top_k each.
    Scores add up log-probabilities over the draft vocabulary; `score(log_probs_D, depth of the children)` may put others
    in their place (never above 0), such as log_softmax(log q + g) under noise g that is shared with the target.
    Of all nodes ever made the `shape.nodes - 1` best stay. Ties go to the earlier made (among siblings: the lower draft id).
    A child never beats its parent and is made after it, so the parent of a node that stays also stays.
    """
    made = Tree([int(tokens[-1])], [-1], [0], [0.0])
    for depth in range(1, shape.depth + 2):
        a_NH = tree_outputs(weights, config, tokens, features_P3H, made)
        newest = [node for node, at in enumerate(made.depths) if at == depth - 1]
        for node in sorted(newest, key=lambda node: -made.scores[node])[: shape.top_k]:  # a stable sort: ties to the earlier made
            log_probs_D = draft_logits(weights, config, a_NH[node]).log_softmax(-1)
            log_scores_D = score(log_probs_D, depth) if score else log_probs_D
            for draft_id in log_scores_D.argsort(descending=True, stable=True)[: shape.top_k].tolist():
                made.tokens.append(int(vocab_ids[draft_id]))
                made.parents.append(node)
                made.depths.append(depth)
                made.scores.append(made.scores[node] + float(log_scores_D[draft_id]))
    best = sorted(range(1, len(made.tokens)), key=lambda node: -made.scores[node])[: shape.nodes - 1]
    return keep(made, [0, *sorted(best)])


def keep(tree: Tree, kept: Sequence[int]) -> Tree:
    """The kept rows of a tree, renumbered in the order they were made."""
    row = {-1: -1} | {node: k for k, node in enumerate(kept)}
    return Tree(
        [tree.tokens[node] for node in kept],
        [row[tree.parents[node]] for node in kept],
        [tree.depths[node] for node in kept],
        [tree.scores[node] for node in kept],
    )


# ---- Verification -----------------------------------------------------------------------------------------------------


class Accepted(NamedTuple):
    path: list[int]  # tree rows to keep, root first
    bonus: int  # the target's own token after them


def children(parents: Sequence[int], node: int) -> list[int]:
    return [child for child, parent in enumerate(parents) if parent == node]


def walk(tokens: Sequence[int], parents: Sequence[int], draws: Sequence[int]) -> Accepted:
    """Follow the target's own draws, one for each node, from the root; where no child carries the draw, it is the bonus.

    The draft cannot influence a draw, so what is committed is what the target alone would have written. On a tree of fixed
    candidates this has exactly the distribution of `accept_reject`; greedy decoding is the case where each draw is an argmax.
    """
    path = [0]
    while True:
        follow = [child for child in children(parents, path[-1]) if tokens[child] == draws[path[-1]]]
        if not follow:
            return Accepted(path, draws[path[-1]])
        path += follow[:1]


def accept_reject(tokens: Sequence[int], parents: Sequence[int], target_probs_NV: Tensor, uniforms: Iterator[float]) -> Accepted:
    """EAGLE's recursive rejection (arXiv 2401.15077, multi-round speculative sampling), with SafeAILab's draft probability of 1.

    At a node, for its children in order: accept x with the chance p(x), else strike x out of p and renormalise. When no
    child is accepted, the bonus is drawn from what is left of p (inverse cdf). `uniforms` yields numbers in [0, 1).
    """
    path = [0]
    while True:
        left_V = target_probs_NV[path[-1]].clone()  # not renormalised: a uniform is stretched to the mass left instead
        for child in children(parents, path[-1]):
            if next(uniforms) * left_V.sum() < left_V[tokens[child]]:
                path.append(child)
                break
            left_V[tokens[child]] = 0
        else:
            cdf_V = left_V.cumsum(0)
            return Accepted(path, int(torch.searchsorted(cdf_V, next(uniforms) * cdf_V[-1], right=True)))


# ---- The training-time test (paper, draft model training) --------------------------------------------------------------
# Step 0 is the table above over a whole document. Step i >= 1 runs the draft on its own output, as decoding will, while the
# tokens stay those of the document. At step i, anchor j:
#
#   hidden     g_j for i = 0, then a of step i-1 at the same anchor (never shifted)
#   token      t_{j+1+i}
#   position   j + i
#   teacher    p_{j+1+i}, the target's distribution after t_{j+1+i}; so the step predicts t_{j+2+i}


def comb_parents(anchors: int, steps: int) -> list[int]:
    """The unroll as a tree, row = step * anchors + anchor: a spine of step-0 rows, from each of which one chain of later steps hangs.

    (0, j) has parent (0, j-1), and (i, j) has parent (i-1, j). The ancestors of (i, j) are thus its own anchor's earlier steps
    and the step-0 rows 0 .. j, never a later step-0 row, whose feature the target would not have computed yet. Decoding has
    the same rows above it under the prefix t_0 .. t_{j+1}; and j + i, the position, is their number.
    """
    return [*range(-1, anchors - 1), *range((steps - 1) * anchors)]


def unroll(weights: Weights, config: DraftConfig, tokens_n: Tensor, features_n3H: Tensor, steps: int) -> Tensor:
    """a_ISH for every step and anchor of a document. Gradients flow through all steps.

    Rows past the end of the document read token 0. No loss counts them, and only rows further past the end see them.
    """
    anchors = len(tokens_n) - 1  # the last token has a feature but no next token to pair it with
    padded = torch.cat([tokens_n, tokens_n.new_zeros(steps)])
    rows = torch.cat([padded[1 + step : 1 + step + anchors] for step in range(steps)])
    a_NH = draft_rows(weights, config, rows, comb_parents(anchors, steps), fuse(weights, config, features_n3H[:anchors]))
    return a_NH.view(steps, anchors, config.hidden_size)


def loss_anchors(answer_n: Tensor, step: int) -> Tensor:
    """bool [n]: anchor j counts at step i iff t_{j+1} and t_{j+2+i} lie in the same answer.

    `answer_n` holds the answer's number at each of its tokens, end-of-turn included, and -1 elsewhere. So the token drawn
    before drafting and the token predicted are both the target's own. (eyas's rule; SafeAILab counts by t_{j+i} alone.)
    """
    counted_n = torch.zeros(len(answer_n), dtype=torch.bool)
    predicted = answer_n[2 + step :]
    drawn = answer_n[1 : 1 + len(predicted)]
    counted_n[: len(predicted)] = (drawn == predicted) & (predicted >= 0)
    return counted_n


def unrolled_loss(
    weights: Weights,
    config: DraftConfig,
    tokens_n: Tensor,
    features_n3H: Tensor,
    target_logits_nV: Tensor,
    answer_n: Tensor,
    vocab_ids: Tensor,
    steps: int,
    decay: float,
) -> tuple[Tensor, list[Tensor]]:
    """Sum of decay**i times the cross-entropy of step i, and the steps' losses (paper, draft model training; SafeAILab's weights).

    The teacher is the target's distribution within the draft vocabulary (softmax over its columns alone). An anchor where the
    target's likeliest token lies outside adds nothing to the sum, but stays in the number that the sum is divided by.
    """
    a_ISH = unroll(weights, config, tokens_n, features_n3H, steps)
    losses = []
    for step in range(steps):
        anchors = loss_anchors(answer_n, step).nonzero().squeeze(-1)
        teacher_logits = target_logits_nV[anchors + 1 + step]
        teacher = teacher_logits[:, vocab_ids].softmax(-1)
        cross_entropy = -(teacher * draft_logits(weights, config, a_ISH[step, anchors]).log_softmax(-1)).sum(-1)
        within = torch.isin(teacher_logits.argmax(-1), vocab_ids)
        losses.append((cross_entropy * within).sum() / max(len(anchors), 1))
    return sum((decay**step * loss for step, loss in enumerate(losses)), torch.zeros(())), losses


def draft_accepts(
    weights: Weights,
    config: DraftConfig,
    tokens_n: Tensor,
    features_n3H: Tensor,
    target_logits_nV: Tensor,
    answer_n: Tensor,
    vocab_ids: Tensor,
    steps: int,
) -> Tensor:
    """bool [I, n]: the draft's argmax, as a target id, is the target's over its full vocabulary; False where the loss does not count."""
    a_ISH = unroll(weights, config, tokens_n, features_n3H, steps)
    accepted = torch.zeros(steps, len(tokens_n), dtype=torch.bool)
    for step in range(steps):
        anchors = loss_anchors(answer_n, step).nonzero().squeeze(-1)
        guesses = vocab_ids[draft_logits(weights, config, a_ISH[step, anchors]).argmax(-1)]
        accepted[step, anchors] = guesses == target_logits_nV[anchors + 1 + step].argmax(-1)
    return accepted


def simulated_tau(accepted_In: Tensor, answer_n: Tensor) -> float:
    """Acceptance length of a chain of I tokens on a greedy answer of the target: 1 + the mean number of *leading* steps right.

    The mean is over the anchors that count at step 0; a chain that would run past its answer's end is cut there.
    """
    leading_n = accepted_In.long().cumprod(0).sum(0)
    return 1 + leading_n[loss_anchors(answer_n, 0)].double().mean().item()
