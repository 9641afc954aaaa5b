"""An induction head for a new EAGLE-3 draft: before training, one key-value group of its first layer is set to copy what followed the drawn
token earlier in the text (induction heads: Olsson et al., arXiv 2209.11895).

    slot i reads the feature of t_i and the token t_{i+1}:    key = a code of t_i          value = t_{i+1}, towards its own logit
    slot j reads the token t_{j+1} that was just drawn:       query = the same code of t_{j+1}

fc reads the code from the low feature, which still knows its token, and puts it where g otherwise hardly varies. Shapes and every other
weight stay as they are, so whatever runs the draft runs this one. Knows the network, examples and the states of some of them; knows nothing
of steps or of settings.

Axes: N tokens of text, T the target's width, H the draft's, R entries of the code, D draft vocabulary, d head width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.model.draft import DraftNetwork
from eyas.model.vocab import DraftVocab
from eyas.train.features import Example, StateSource

ROWS = 20_000  # tokens of the text that the code is fitted on at most; a fifth of them checks it
TOGETHER = 4_096  # of which so many are read at once
MATCH = 8.0  # score of a key that holds exactly the drawn token's code; keys of other tokens score about 0
RAISE = 8.0  # by how much a sure copy raises its token's logit over the others'
BLUR = 0.1  # of the head's mean variance: the least that a direction is taken to have where a token is told from others
CLEAR = 6.0  # size of a code's entry in g, beside what else varies there
LEAST, MOST = 0.02, 0.5  # and beside g: an entry's size at least, the whole code's at most
READABLE = 0.3  # share of the code's variance that keys must hold, on tokens that the fit did not see
OUTLIER = 5.0  # states this many times as large as usual are left out: those at a text's begin hold no token
FEWEST = 10  # different tokens, in the text and in the draft vocabulary
RIDGE = 1e-6  # of the mean variance, for fits of few rows


class Text(NamedTuple):
    """What the code is fitted on."""

    tokens_N: Tensor
    low_NT: Tensor  # float64: the low feature, as fc reads it
    rest_NH: Tensor  # float64: what fc makes of all other features


@torch.no_grad()
def begin_with_induction(
    network: DraftNetwork, vocab: DraftVocab, examples: Sequence[Example], source: StateSource, seed: int = 0
) -> str | None:
    """Set the head in a network that has just been initialised. Returns None; or why no head can be set, and then no weight is changed."""
    if len(network.wants) < 2:
        return "the draft reads one feature alone, which is the high one"
    if network.midlayer.self_attn.qk_norm:
        return "the draft norms its queries and keys, so no match stands out"
    text = read(network, examples, source, seed)
    if min(len(text.tokens_N.unique()), len(vocab)) < FEWEST:
        return "there are too few different tokens to fit it on"
    code_RH, dims = token_code(network, text.tokens_N)
    fc_HT, key_RH, held = carried(network, text, code_RH)
    if not held >= READABLE:  # nor where it is no number
        return f"the low feature does not tell its token (keys would hold {max(held, 0):.0%} of the code's variance)"
    value_kH, out_Hk = copying(network, vocab.ids.to(network.device), text.rest_NH[:TOGETHER])
    network.fc.weight[:, : fc_HT.shape[1]] = fc_HT.to(network.dtype)
    set_group(network, dims, code_RH, key_RH, value_kH, out_Hk)
    return None


def read(network: DraftNetwork, examples: Sequence[Example], source: StateSource, seed: int) -> Text:
    """The states of a seeded choice of examples. A document's last token has none; outliers are left out."""
    width, device = network.config.target_hidden_size, network.device
    parts: list[Text] = []
    for chosen in portions(examples, seed):
        states = network.normed(source.states(chosen).features.to(device, network.dtype))
        tokens = torch.tensor([token for example in chosen for token in example.tokens], device=device)
        ends = torch.tensor([len(example.tokens) for example in chosen], device=device).cumsum(0) - 1
        kept = torch.ones(len(tokens), dtype=torch.bool, device=device).index_fill_(0, ends, False)
        rest = F.linear(states[kept, width:], network.fc.weight[:, width:])
        parts.append(Text(tokens[kept], states[kept, :width].double(), rest.double()))
    text = Text(*(torch.cat(column) for column in zip(*parts, strict=True)))
    sizes = [root_mean_square(states) for states in (text.low_NT, text.rest_NH)]
    usual = torch.stack([(size <= OUTLIER * size.median()) & (size > 0) for size in sizes]).all(0)
    return Text(*(column[usual] for column in text))


def portions(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Examples in a seeded order, about TOGETHER tokens at a time, until they are ROWS."""
    held, tokens, total = [], 0, 0
    for example in random.Random(seed).sample(examples, len(examples)):
        held.append(example)
        tokens, total = tokens + len(example.tokens), total + len(example.tokens)
        if tokens >= TOGETHER or total >= ROWS:
            yield held
            held, tokens = [], 0
        if total >= ROWS:
            return
    if held:
        yield held


def token_code(network: DraftNetwork, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """The code as a product [R, H] on the layer's normed embedding, and the R entries of a head that hold it.

    It is the embedding along its R principal directions over this text's different tokens, each of variance 1. The mean has no part in it:
    a share that all queries have would prefer some keys to others whatever was drawn.
    """
    x_NH = without_mean(embedded(network, tokens_N.unique()))
    variances, directions = torch.linalg.eigh(x_NH.T @ x_NH / len(x_NH))
    dims = slow_entries(network)
    there = int((variances > RIDGE * variances[-1]).sum())
    size = max(min(len(dims), there, network.config.hidden_size // 4), 1)
    return (directions[:, -size:] / variances[-size:].sqrt()).T, dims[:size]


def slow_entries(network: DraftNetwork) -> Tensor:
    """The entries of a head that position turns least: those that are not rotated, and the slower half of the pairs that are."""
    turned, frequencies = network.config.rotary_dim, network.rotary.frequencies
    pairs = frequencies.argsort()[: max(len(frequencies) // 2, 1)]
    slow = torch.stack([pairs, pairs + turned // 2], 1).flatten()
    return torch.cat([torch.arange(turned, network.config.head_dim), slow.cpu()]).to(network.device)


def carried(network: DraftNetwork, text: Text, code_RH: Tensor) -> tuple[Tensor, Tensor, float]:
    """fc's columns for the low feature [H, T], which put each token's code into g; the product [R, H] that reads it from the normed g; and
    which share of its variance is read on tokens that the fit did not see."""
    code_NR, size = embedded(network, text.tokens_N) @ code_RH.T, len(code_RH)
    _, low_NT, rest_NH = text
    fitted = len(low_NT) - len(low_NT) // 5
    found_TR = least_squares(low_NT[:fitted], code_NR[:fitted])
    # about zero, not about the mean: a share that all keys have would say nothing but be turned by position
    alike = rest_NH / root_mean_square(rest_NH)[:, None]
    moments, directions = torch.linalg.eigh(alike.T @ alike / len(alike))
    quiet_HR, noise = directions[:, :size], float(moments[:size].clamp_min(0).mean().sqrt())
    most = MOST * (network.config.hidden_size / size) ** 0.5
    amplitude = min(max(CLEAR * noise, LEAST), most) * float(root_mean_square(rest_NH).median())
    fc_HT = amplitude * quiet_HR @ found_TR.T
    g_NH = rest_NH + low_NT @ fc_HT.T
    weight = network.midlayer.hidden_norm.weight.double()
    weight = torch.where(weight < 0, weight.clamp_max(-1e-3), weight.clamp_min(1e-3))
    key_RH = (quiet_HR / weight[:, None]).T * (float(root_mean_square(g_NH).median()) / amplitude)
    read_NR = network.midlayer.hidden_norm(g_NH.to(network.dtype)).double() @ key_RH.T
    missed = (read_NR - code_NR)[fitted:].square().sum() / code_NR[fitted:].square().sum()
    return fc_HT, key_RH, 1 - float(missed)


def copying(network: DraftNetwork, ids_D: Tensor, rest_NH: Tensor) -> tuple[Tensor, Tensor]:
    """The values [k, H] on the layer's normed embedding, and the output [H, k], such that a copied token's own logit rises by RAISE over
    the others', as far as k = d directions can tell them apart. `rest_NH`: some rows of g, for the size that the layer's output has."""
    x_DH = without_mean(embedded(network, ids_D))
    w_DH = network.lm_head.weight.double() * network.norm.weight.double()
    w_DH = w_DH - w_DH.mean(0)
    own_DH = torch.linalg.solve(gram(w_DH, BLUR), w_DH.T).T
    fit_HH = least_squares(x_DH, own_DH)
    told_DH = x_DH @ fit_HH
    directions_Hk = torch.linalg.eigh(told_DH.T @ told_DH)[1][:, -min(network.config.head_dim, told_DH.shape[1]) :]
    raised = float((told_DH @ directions_Hk @ directions_Hk.T * w_DH).sum(1).median())
    layer, rest = network.midlayer, rest_NH.to(network.dtype)
    usual = float(root_mean_square(rest + layer.mlp(layer.post_attention_layernorm(rest))).median())
    return (fit_HH @ directions_Hk).T, directions_Hk * (RAISE * usual / max(raised, 1e-30))


def set_group(network: DraftNetwork, dims: Tensor, code_RH: Tensor, key_RH: Tensor, value_kH: Tensor, out_Hk: Tensor) -> None:
    """Write the head into the key-value group that adds least now; all query heads of the group do the same, and share the output."""
    layer, width, dtype = network.midlayer.self_attn, network.config.hidden_size, network.dtype
    groups, d, heads = layer.kv_heads, layer.head_dim, layer.heads // layer.kv_heads
    q = layer.q_proj.weight.unflatten(0, (groups, heads, d))  # [groups, heads, d, 2H]
    k, v = (product.weight.unflatten(0, (groups, d)) for product in (layer.k_proj, layer.v_proj))  # [groups, d, 2H]
    o = layer.o_proj.weight.unflatten(1, (groups, heads, d))  # [H, groups, heads, d]
    group = int((v.square().sum((1, 2)) * o.square().sum((0, 2, 3))).argmin())
    # the product alone is given; shared out otherwise, steps of one size would undo the smaller factor
    share = (v[group].norm() * out_Hk.norm() / (o[:, group].norm() * value_kH.norm())).sqrt()
    for weight in (q[group], k[group], v[group], o[:, group]):
        weight.zero_()
    sharp = MATCH * d**0.5 / len(dims) / network.rotary.attention_scale**2  # without it a match scores about R / sqrt(d)
    q[group][:, dims, :width] = (sharp * code_RH).to(dtype)
    k[group][dims, width:] = key_RH.to(dtype)
    v[group][: len(value_kH), :width] = (share * value_kH).to(dtype)
    o[:, group, :, : len(value_kH)] = (out_Hk / share / heads).to(dtype)[:, None]


def embedded(network: DraftNetwork, tokens: Tensor) -> Tensor:
    """The embedding as the layer's attention reads it, float64 [.., H]."""
    return network.midlayer.input_layernorm(network.embed(tokens)).double()


def without_mean(x_NH: Tensor) -> Tensor:
    """Rows without their share along the mean."""
    along = F.normalize(x_NH.mean(0), dim=0)
    return x_NH - (x_NH @ along)[:, None] * along


def least_squares(x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """The product [I, O] on x that is nearest to y."""
    return torch.linalg.solve(gram(x_NI), x_NI.T @ y_NO)


def gram(x_NI: Tensor, ridge: float = RIDGE) -> Tensor:
    """x^T x [I, I], with this share of its mean on the diagonal."""
    products = x_NI.T @ x_NI
    products.diagonal().add_(ridge * products.diagonal().mean())
    return products


def root_mean_square(x_NH: Tensor) -> Tensor:
    return x_NH.square().mean(1).sqrt()
