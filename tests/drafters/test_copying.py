"""Look-up's guesses join the draft's tree, and where they are sure the draft is left alone and catches up later."""

from __future__ import annotations

import pytest

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.copying import USUAL, CopiedText
from eyas.decode.drafter import TreeRequest
from eyas.decode.generate import Decoder
from eyas.decode.tree import Tree
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.methods import METHODS
from eyas.model.rows import chain_rows
from tests.tiny import tiny_draft, tiny_target
from tests.tiny_family import makers

SHAPE = TreeShape(8, 2, 2)
TEXT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]


class Noted:
    """Guesses 5 and 6 with a chance of a half each, and notes what it was asked."""

    wants = (1, 2, 3)

    def __init__(self) -> None:
        self.asked, self.seen = [], []

    def reserve(self, sequences, capacity):
        pass

    def observe(self, sequence, tokens, features):
        self.seen.append((sequence, list(tokens), features))

    def forget(self, sequence):
        self.seen.append((sequence, None, None))

    def propose(self, requests):
        self.asked += [request.shape for request in requests]
        guess = Tree([requests[0].root, 5, 6], [-1, 0, 0], [0, 1, 1], [0.0, -0.7, -0.7])
        return [Tree.root(request.root) if request.shape == PLAIN else guess for request in requests]


def asked(text: list[int], shape: TreeShape = SHAPE) -> tuple[Noted, Tree]:
    draft = Noted()
    merged = CopyingDrafter(draft)
    merged.reserve(1, 100)
    merged.observe(0, text, None)
    return draft, merged.propose([TreeRequest(0, text[-1], len(text) - 1, shape, Sampling(), None)])[0]


def test_both_trees_are_in_the_one_and_the_budget_goes_to_the_likeliest():
    draft, tree = asked([1, 2, 3, 4, 1, 2])  # two tokens matched: far from sure
    assert draft.asked == [SHAPE] and set(tree.children[0]) == {3, 5, 6}
    _, small = asked([1, 2, 3, 4, 1, 2], TreeShape(3, 2, 2))
    assert set(small.children[0]) == {5, 6}, "a half is more than what two matched tokens are worth"


def test_a_long_match_leaves_the_draft_alone():
    draft, tree = asked([*TEXT, 1, *TEXT[:9]])
    assert draft.asked == [PLAIN] and tree.tokens == [TEXT[8], *TEXT[9:12]]


def test_look_up_goes_as_deep_as_there_are_nodes_and_no_deeper_than_the_text():
    text = [*range(100, 140), 1, *range(100, 112)]
    for deepest, depth in ((None, SHAPE.levels), (50, SHAPE.nodes - 1), (4, 4), (1, 1)):
        merged = CopyingDrafter(Noted())
        merged.reserve(1, 100)
        merged.observe(0, text, None)
        shape = SHAPE if deepest is None else TreeShape(SHAPE.nodes, min(SHAPE.depth, deepest - 1), SHAPE.top_k)
        tree = merged.propose([TreeRequest(0, text[-1], len(text) - 1, shape, Sampling(), None, deepest)])[0]
        assert max(tree.depths) == depth


def test_nothing_found_is_the_drafts_own_tree():
    draft, tree = asked([1, 2, 3])
    assert draft.asked == [SHAPE] and tree.tokens == [3, 5, 6]


def test_the_draft_hears_all_that_is_committed():
    draft = Noted()
    merged = CopyingDrafter(draft)
    merged.reserve(2, 100)
    merged.observe(1, [1, 2], "features")
    merged.forget(1)
    assert merged.wants == (1, 2, 3) and draft.seen == [(1, [1, 2], "features"), (1, None, None)]


def test_a_draft_left_alone_for_some_rounds_grows_the_tree_it_would_have_grown():
    target = tiny_target()
    network, vocab = tiny_draft(target)
    text = [*TEXT, 1, *TEXT[:12], 2, 3, 4]
    features = target(chain_rows(0, text, 0), target.new_cache(1, 64), network.config.taps).features

    def grown(pauses: bool) -> Tree:
        merged = CopyingDrafter(Eagle3Drafter(network, vocab))
        merged.reserve(1, 100)
        for length in range(16, len(text) + 1) if pauses else [len(text)]:
            start = 0 if length == 16 or not pauses else length - 1
            rows = features[max(start - 1, 0) : length - 1]
            merged.observe(0, text[start:length], rows)
            tree = merged.propose([TreeRequest(0, text[length - 1], length - 1, SHAPE, Sampling(), None)])[0]
        return tree

    tree, whole = grown(True), grown(False)
    assert (tree.tokens, tree.parents) == (whole.tokens, whole.parents) and len(tree) == SHAPE.nodes


def test_what_a_match_is_worth_is_counted_in_the_text():
    right, wrong = CopiedText(unread=[1, 2, 3] * 20), CopiedText(unread=[token for other in range(10, 40) for token in (1, 2, other)])
    for text in (right, wrong):
        text.read()
    assert wrong.chance(2) < USUAL[2] / 2 and right.chance(40) > USUAL[12]


# ---- joined to every method ----

TARGET = tiny_target()
REPEATED = [[3, 14, 15, 9, 26, 5] * 4, [7, 7, 8, 7, 7, 8, 7, 7, 8], [40, 2, 40, 2, 40, 2]]
MAKERS = {name: make for name, make in makers().items() if METHODS[name].copy}
LAWS = [Sampling(), Sampling(1.0), Sampling(1.0, repetition_penalty=1.2, presence_penalty=0.8, logit_bias={11: 2.0})]


def decoded(drafter, tree: str, sampling: Sampling, batch: int | None = None):
    *_, texts = Decoder(TARGET, drafter).run(REPEATED, TreeShape.parse(tree), sampling, range(3), 20, batch=batch)
    return [(text.tokens, text.accepted_lengths) for text in texts]


@pytest.mark.parametrize("sampling", LAWS, ids=["greedy", "T=1", "T=1, penalties"])
@pytest.mark.parametrize("method", MAKERS)
def test_copying_joins_every_method_and_changes_no_text(method, sampling):
    """Trees grown by score and static ones, in one batch and in slots that texts take after one another."""
    plain = [tokens for tokens, _ in decoded(None, "chain:1", sampling)]
    for tree in ("9x3x3", "static:3.2.0.1.1.1"):
        alone = decoded(MAKERS[method](), tree, sampling)
        copied = decoded(CopyingDrafter(MAKERS[method]()), tree, sampling)
        assert [tokens for tokens, _ in copied] == [tokens for tokens, _ in alone] == plain
        assert [lengths for _, lengths in copied] != [lengths for _, lengths in alone], "copying had no part in it"
        assert decoded(CopyingDrafter(MAKERS[method]()), tree, sampling, batch=2) == copied


def test_guesses_that_a_verifier_needs_drawn_are_left_as_they_are():
    draft = Noted()
    joined = CopyingDrafter(draft)
    joined.reserve(1, 100)
    joined.observe(0, [*TEXT, 1, *TEXT[:9]], None)
    request = TreeRequest(0, TEXT[8], 23, SHAPE, Sampling(1.0), None, draws=lambda node, count: None)
    assert joined.propose([request])[0].tokens == [TEXT[8], 5, 6] and draft.asked == [SHAPE]
