"""Claims about the target: it is transformers' model, and how rows are grouped into passes never changes what they say."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from eyas.config import EyasError, check_taps
from eyas.files.target import target_config
from eyas.files.tensors import load_strictly, read_tensors
from eyas.kernels.attention import attention_with_lse, grouped_attention
from eyas.model.mask import ancestor_mask, behind_prefix, causal_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.target import Target
from eyas.model.transformer import rotary_frequencies
from tests.tiny import randomize, tiny_config, tiny_target

TAPS = (1, 2, 4)
EXACT = {"rtol": 0, "atol": 1e-10}


def text(length, seed=0, vocab=53):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows_of(cache, *parts):
    """A pass from parts (slot, tokens) that continue their slot as a chain, or (slot, tokens, parents) that continue it as a tree."""
    tokens, positions, segments = [], [], []
    for slot, new, *tree in parts:
        parents = tree[0] if tree else list(range(-1, len(new) - 1))
        depths = []
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        tokens += new
        positions += [cache.lengths[slot] + depth for depth in depths]
        segments.append(Segment(slot, len(new), ancestor_mask(parents) if tree else None))
    return Rows(torch.tensor(tokens), torch.tensor(positions), segments)


def alone(target, tokens, taps=TAPS):
    """What one pass over a text by itself says of each of its rows."""
    return target(chain_rows(0, tokens, 0), target.new_cache(1, len(tokens)), taps)


def prefilled(target, texts, capacity=64, slots=None):
    cache = target.new_cache(slots or len(texts), capacity)
    for slot, tokens in enumerate(texts):
        if tokens:
            target(chain_rows(slot, tokens, 0), cache)
            cache.keep(slot, range(len(tokens)))
    return cache


def assert_same(output, rows, wanted, tail, **tolerance):
    """The rows `rows` of a pass say what the rows `tail` of another say: logits, features and last hidden state."""
    for found, other in zip(output, wanted):
        assert_close(found[rows], other[tail], **(tolerance or EXACT))


# ---- transformers ----

SCALINGS = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}
MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    **{f"llama {kind}": ("llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **SCALINGS[kind]}}) for kind in SCALINGS},
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "mistral": ("mistral", {}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True, "sliding_window": 128}),
}


def hugging_face(kind, **changes):
    """A tiny random model of transformers' own."""
    sizes = {name: value for name, value in vars(tiny_config()).items() if name.startswith(("num", "vocab", "hidden", "inter", "max"))}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes), dtype=torch.float32)
    randomize(model)
    return model.eval().requires_grad_(False)


def loaded(directory, dtype=torch.float32):
    target = Target(target_config(directory)).to(dtype)
    load_strictly(target, read_tensors(directory), str(directory))
    return target.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_taps_are_transformers_own(name, tmp_path):
    kind, changes = MODELS[name]
    model = hugging_face(kind, **changes)
    model.save_pretrained(tmp_path)
    target = loaded(tmp_path)
    assert target.config.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    tokens = text(48)
    theirs = model(torch.tensor([tokens]), output_hidden_states=True)
    for ours in (alone(target, tokens), alone(target.prepare(), tokens)):
        assert_close(ours.logits, theirs.logits[0], rtol=1e-4, atol=1e-4)
        assert_close(ours.features, torch.cat([theirs.hidden_states[tap][0] for tap in TAPS], -1), rtol=1e-4, atol=1e-4)
        assert_close(ours.hidden, theirs.hidden_states[-1][0], rtol=1e-4, atol=1e-4)


def test_the_first_tap_is_the_embedding_and_taps_come_in_layer_order():
    target, tokens = tiny_target(), text(6)
    features = alone(target, tokens, (0, 3)).features
    assert_close(features[:, :32], target.model.embed_tokens.weight[tokens], **EXACT)
    assert_close(features[:, 32:], alone(target, tokens, (3,)).features, **EXACT)
    assert alone(target, tokens, ()).features is None


@pytest.mark.parametrize("kind", SCALINGS)
def test_old_and_new_spelling_of_rope_scaling_are_one_config(kind, tmp_path):
    sizes = {name: value for name, value in vars(tiny_config()).items() if value not in (None, ()) and name != "rope_theta"}
    found = []
    for spelling in (
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": kind, **SCALINGS[kind]}},
        {"rope_theta": 500.0, "rope_scaling": {"type": kind, **SCALINGS[kind]}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": kind, **SCALINGS[kind]}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **spelling}))
        config = target_config(tmp_path)
        found.append(rotary_frequencies(8, config.rope_theta, config.rope_scaling, config.max_position_embeddings))
    plain, _ = rotary_frequencies(8, 500.0, None, 256)
    for frequencies, scale in found:
        assert_close(frequencies, found[0][0], rtol=0, atol=0)
        assert scale == found[0][1]
        assert not torch.allclose(frequencies, plain)


# ---- rows ----


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [11, 1], [1, 3, 8]])
def test_chunked_prefill_is_one_pass(chunks):
    target, tokens = tiny_target(), text(12)
    whole, cache, start = alone(target, tokens), target.new_cache(1, 12), 0
    for count in chunks:
        rows = slice(start, start + count)
        assert_same(target(chain_rows(0, tokens[rows], start), cache, TAPS), slice(None), whole, rows)
        cache.keep(0, range(count))
        start += count


@pytest.mark.parametrize(
    "counts",
    [[3, 1, 4], [1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 5, 1, 1, 2, 1], [0, 1, 1, 1, 1, 0], [2, 1, 1, 1, 1, 0]],
    ids=lambda counts: "-".join(map(str, counts)),
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_ragged_pass_is_separate_passes(counts, turned):
    """Sequence i is 2i + 1 rows old, the last none; `turned`: in reverse order. Four or more single rows go as one product."""
    target = tiny_target()
    texts = [text(2 * slot + 1 + counts[slot], seed=slot) for slot in range(len(counts))]
    texts[-1] = text(counts[-1], seed=99)
    old = [tokens[: len(tokens) - count] for tokens, count in zip(texts, counts)]
    cache = prefilled(target, old)
    before = cache.keys.clone()
    order = [slot for slot in range(len(counts)) if counts[slot]][:: -1 if turned else 1]
    rows = rows_of(cache, *((slot, texts[slot][len(old[slot]) :]) for slot in order))
    output, start = target(rows, cache, TAPS), 0
    for slot in order:
        assert_same(output, slice(start, start + counts[slot]), alone(target, texts[slot]), slice(len(old[slot]), None))
        start += counts[slot]
    for slot, tokens in enumerate(old):  # committed rows are nobody's to change
        assert_close(cache.keys[:, slot, :, : len(tokens)], before[:, slot, :, : len(tokens)], rtol=0, atol=0)


def test_single_rows_go_on_as_they_began():
    """Five sequences decoded together for six passes, one of them joining late, are the same as five texts."""
    target = tiny_target()
    texts = [text(10 + slot, seed=slot) for slot in range(5)]
    cache = prefilled(target, [tokens[: 4 + slot] for slot, tokens in enumerate(texts)])
    whole = [alone(target, tokens) for tokens in texts]
    for step in range(6):
        active = [slot for slot in range(5) if slot != 2 or step >= 2]
        at = {slot: cache.lengths[slot] for slot in active}
        output = target(rows_of(cache, *((slot, [texts[slot][at[slot]]]) for slot in active)), cache, TAPS)
        for row, slot in enumerate(active):
            assert_same(output, row, whole[slot], at[slot])
            cache.keep(slot, [0])


def test_logits_of_scores_only_the_rows_asked_for():
    target, tokens = tiny_target(), text(7)
    whole = alone(target, tokens)
    for wanted in (torch.tensor([6, 0, 3]), slice(-1, None)):
        some = target(chain_rows(0, tokens, 0), target.new_cache(1, 7), TAPS, wanted)
        assert_close(some.logits, whole.logits[wanted], **EXACT)
        assert some.features.shape[0] == some.hidden.shape[0] == 7


# ---- trees ----

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 5, 5, -1, 9]


def branch(parents, row):
    return [*(branch(parents, parents[row]) if parents[row] >= 0 else []), row]


def test_ancestor_mask_is_the_branch_of_each_row():
    mask = ancestor_mask(PARENTS)
    assert [mask[row].nonzero().flatten().tolist() for row in range(len(PARENTS))] == [branch(PARENTS, row) for row in range(len(PARENTS))]
    assert torch.equal(ancestor_mask([-1, 0, 1, 2]), causal_mask(4))
    assert behind_prefix(mask, 3)[:, :3].all() and torch.equal(behind_prefix(mask, 3)[:, 3:], mask)


@pytest.mark.parametrize("age", [0, 6])
def test_a_row_of_a_tree_says_what_its_branch_alone_says(age):
    target, prompt, guesses = tiny_target(), text(age, seed=1), text(len(PARENTS), seed=2)
    cache = prefilled(target, [prompt])
    output = target(rows_of(cache, (0, guesses, PARENTS)), cache, TAPS)
    for row in range(len(PARENTS)):
        assert_same(output, row, alone(target, [*prompt, *(guesses[r] for r in branch(PARENTS, row))]), -1)


def test_trees_of_several_sequences_beside_chains_and_single_rows():
    target = tiny_target()
    olds = [text(3 + slot, seed=slot) for slot in range(7)]
    cache = prefilled(target, olds)
    news = {0: (text(11, seed=20), PARENTS), 1: (text(1, seed=21),), 2: (text(4, seed=22),), 3: (text(1, seed=23),), 4: (text(1, seed=24),)}
    news |= {5: (text(3, seed=25), [-1, 0, 0]), 6: (text(1, seed=26),)}
    output, start = target(rows_of(cache, *((slot, *part) for slot, part in news.items())), cache, TAPS), 0
    for slot, (tokens, *tree) in news.items():
        parents = tree[0] if tree else list(range(-1, len(tokens) - 1))
        for row in range(len(tokens)):
            wanted = alone(target, [*olds[slot], *(tokens[r] for r in branch(parents, row))])
            assert_same(output, start + row, wanted, -1)
        start += len(tokens)


@pytest.mark.parametrize("others", [0, 4])
def test_a_tree_read_level_by_level_is_the_tree(others):
    """Rows of earlier levels are committed, and the mask says who sees them; `others` single rows share each pass."""
    target, prompt, guesses, parents = tiny_target(), text(6, seed=1), text(8, seed=2), [-1, 0, 0, 1, 1, 2, 3, 5]
    cache = prefilled(target, [prompt, *(text(3 + slot, seed=30 + slot) for slot in range(others))])
    mask, start = ancestor_mask(parents), 0
    for depth, end in enumerate([1, 3, 6, 8]):
        rows = rows_of(cache, *((1 + slot, [depth]) for slot in range(others)))
        tokens = torch.cat([rows.tokens, torch.tensor(guesses[start:end])]).long()
        positions = torch.cat([rows.positions, torch.full((end - start,), len(prompt) + depth)]).long()
        segments = [*rows.segments, Segment(0, end - start, mask[start:end, :end])]
        output = target(Rows(tokens, positions, segments), cache, TAPS)
        for row in range(start, end):
            branch_text = [*prompt, *(guesses[r] for r in branch(parents, row))]
            assert_same(output, others + row - start, alone(target, branch_text), -1)
        for slot in range(others):
            grown = [*text(3 + slot, seed=30 + slot), *range(depth + 1)]
            assert_same(output, slot, alone(target, grown), -1)
            cache.keep(1 + slot, [0])
        cache.keep(0, range(end - start))
        start = end
    cache.cut(0, len(prompt))
    assert_same(target(chain_rows(0, guesses, 6), cache, TAPS), slice(None), alone(target, prompt + guesses), slice(6, None))


def test_one_row_that_may_not_see_the_row_before_it():
    target, tokens = tiny_target(), text(6)
    cache = prefilled(target, [tokens])
    mask = torch.tensor([[True, False, True]])  # sees rows 0 to 4 and itself, at position 5
    output = target(Rows(torch.tensor([7]), torch.tensor([5]), [Segment(0, 1, mask)]), cache, TAPS)
    assert_same(output, 0, alone(target, [*tokens[:5], 7]), -1)


@pytest.mark.parametrize("path", [[0], [0, 1, 3, 6], [0, 2, 5, 8], [9, 10], []])
def test_after_keep_the_next_pass_is_that_of_the_kept_text(path):
    target, prompt, guesses = tiny_target(), text(5, seed=1), text(len(PARENTS), seed=2)
    cache = prefilled(target, [text(3, seed=9), prompt])
    target(rows_of(cache, (1, guesses, PARENTS)), cache)
    cache.keep(1, path)
    kept = [*prompt, *(guesses[row] for row in path)]
    assert cache.lengths == [3, len(kept)]
    output = target(rows_of(cache, (1, text(4, seed=3), [-1, 0, 0, 2])), cache, TAPS)  # over the rows of the branches left out
    for row, tail in enumerate([[0], [0, 1], [0, 2], [0, 2, 3]]):
        assert_same(output, row, alone(target, kept + [text(4, seed=3)[r] for r in tail]), -1)
    cache.clear(1)
    assert_same(target(chain_rows(1, kept, 0), cache, TAPS), slice(None), alone(target, kept), slice(None))


def test_a_copied_prefix_is_read_as_ones_own():
    target, tokens = tiny_target(), text(12)
    cache = prefilled(target, [tokens[:9], text(4, seed=5)])
    cache.copy_prefix(cache, 0, 1, 6)
    assert cache.lengths == [9, 6]
    other = text(5, seed=7)
    assert_same(target(chain_rows(1, other, 6), cache, TAPS), slice(None), alone(target, tokens[:6] + other), slice(6, None))
    assert_same(target(chain_rows(0, tokens[9:], 9), cache, TAPS), slice(None), alone(target, tokens), slice(9, None))


def test_a_cache_that_is_full_says_so():
    target = tiny_target()
    cache = prefilled(target, [text(4)], capacity=5)
    target(chain_rows(0, [1], 4), cache)
    with pytest.raises(AssertionError, match="slot 0 holds 5 rows, 6 wanted"):
        target(chain_rows(0, [1, 2], 4), cache)


# ---- taps and layers ----


@pytest.mark.parametrize("taps", [(2, 1, 3), (1, 1, 3), (-1, 1, 3), (1, 2, 5), (5,), ()])
def test_taps_that_cannot_be_are_one_line(taps):
    with pytest.raises(EyasError, match="different layers in ascending order between 0 and 4") as caught:
        check_taps(taps, 5)
    assert "\n" not in str(caught.value)


def test_taps_that_can_be_are_returned():
    assert check_taps([0, 2, 4], 5) == (0, 2, 4)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shallow_is_a_model_of_so_many_layers(prepared, tied):
    whole, tokens = tiny_target(prepare=False, tie_word_embeddings=tied), text(8)
    small = Target(tiny_config(num_hidden_layers=2, tie_word_embeddings=tied)).double()
    names = dict(small.named_parameters())
    load_strictly(small, {name: value for name, value in whole.named_parameters() if name in names}, "a cut model")
    cut = (whole.prepare() if prepared else whole).shallow(2)
    assert cut.config == small.config and cut.new_cache(1, 8).keys.shape[0] == 2
    assert_same(alone(cut, tokens, (0, 1)), slice(None), alone(small, tokens, (0, 1)), slice(None))


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_shallow_needs_fewer_layers_than_there_are(layers):
    with pytest.raises(EyasError, match=f"1 to 4, not {layers}"):
        tiny_target().shallow(layers)


# ---- attention in parts ----


@pytest.mark.parametrize("cuts", [[4], [1, 2, 9], [6, 8]])
@pytest.mark.parametrize("age", [0, 6])
def test_parts_of_the_keys_merge_into_attention_over_all(cuts, age):
    """Four rows behind `age` rows; a part may hold no key that a row sees."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, 8, generator=draw, dtype=torch.float64) for shape in ((4, 4), (2, 10), (2, 10)))
    seen = behind_prefix(causal_mask(10 - age), age)[-4:]
    whole = grouped_attention(q, k, v, torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf")).repeat(2, 1))
    edges = [0, *cuts, 10]
    parts = [attention_with_lse(q, k[:, a:b], v[:, a:b], seen[:, a:b]) for a, b in itertools.pairwise(edges)]
    lses = torch.stack([lse for _, lse in parts])
    shares = lses.softmax(0).repeat_interleave(8, -1)
    assert_close((shares * torch.stack([out for out, _ in parts])).sum(0), whole, **EXACT)
    assert_close(attention_with_lse(q, k, v)[0], grouped_attention(q, k, v, None), **EXACT)


# ---- packed weights, number formats ----


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "attention_out_bias": True, "qk_norm": True}]
)
def test_packed_weights_say_the_same(changes):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        loose, packed = tiny_target(dtype=dtype, prepare=False, **changes), tiny_target(dtype=dtype, **changes)
        for length in (1, 8, 21):
            assert_same(alone(packed, text(length)), slice(None), alone(loose, text(length)), slice(None), rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_packed_bfloat16_rounds_no_worse_than_plain_bfloat16(changes):
    tokens = text(40)
    loose, packed = tiny_target(dtype=torch.bfloat16, prepare=False, **changes), tiny_target(dtype=torch.bfloat16, **changes)
    exact = Target(loose.config).double()
    load_strictly(exact, dict(loose.named_parameters()), "the rounded weights in float64")
    wanted = alone(exact, tokens).logits
    errors = [(alone(model, tokens).logits - wanted).std().item() for model in (packed, loose)]
    assert errors[0] < min(0.1, 1.2 * errors[1])


def test_logits_are_float32_in_a_bfloat16_model_and_float64_in_a_float64_one():
    for prepare in (False, True):
        output = alone(tiny_target(dtype=torch.bfloat16, prepare=prepare), text(5))
        assert (output.logits.dtype, output.features.dtype, output.hidden.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        assert alone(tiny_target(prepare=prepare), text(5)).logits.dtype == torch.float64
    packed = alone(tiny_target(dtype=torch.bfloat16), text(40)).logits
    assert (packed != packed.bfloat16().float()).any()  # not merely bfloat16 widened: near ties stay apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [False, True])
def test_equal_head_rows_tie_exactly_and_greedy_takes_the_lowest_id(dtype, prepare):
    target = tiny_target(dtype=dtype, prepare=False)
    best = alone(target, text(8)).logits.mean(0).argmax()
    twins = torch.tensor([1, 17, 33])  # none of the last eight: there MKL's float64 product rounds otherwise
    with torch.no_grad():
        target.lm_head.weight[twins] = 3 * target.lm_head.weight[best]
    logits = alone(target.prepare() if prepare else target, text(8)).logits
    assert torch.equal(logits[:, twins], logits[:, twins[:1]].expand(-1, 3))
    won = torch.isin(logits.argmax(-1), twins)
    assert won.any() and (logits.argmax(-1)[won] == 1).all()


def test_a_row_says_the_same_in_a_pass_of_any_other_rows_up_to_rounding():
    """float32: verification passes of other sizes may round otherwise, but by no more than rounding."""
    target, tokens = tiny_target(dtype=torch.float32), text(16)
    whole = alone(target, tokens).logits
    for length in (1, 2, 7, 8, 9):
        assert_close(alone(target, tokens[:length]).logits, whole[:length], rtol=0, atol=1e-4)
