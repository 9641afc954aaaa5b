"""Trees of several sequences grown in shared passes are EAGLE-2's trees, each as if it were grown alone and each to its own shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.copying import CopyLaw
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import grow
from eyas.decode.tree import Tree
from eyas.model.vocab import DraftVocab

V = 11
Path = tuple[int, ...]


def logits_of(depth: int, path: Path, sequence: int) -> torch.Tensor:
    """What follows a path, by a made-up draft."""
    seed = hash((depth, path, sequence)) % 2**31  # of whole numbers: the same in every process
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Draft:
    """Its outputs are numbers of (sequence, path): a node's is found only through its parent's."""

    def __init__(self) -> None:
        self.known: list[tuple[int, Path]] = []
        self.passes: list[int] = []

    def number(self, sequence: int, path: Path) -> int:
        self.known.append((sequence, path))
        return len(self.known) - 1

    def begin(self, sequences: list[int]) -> torch.Tensor:
        return torch.tensor([[self.number(sequence, ())] for sequence in sequences])

    def read(self, levels) -> torch.Tensor:
        outputs = []
        for level in levels:
            for place, node in enumerate(level.nodes):
                sequence, above = self.known[int(level.parents[place, 0])]
                path = (*above, level.tokens[place])
                assert sequence == level.request.sequence and list(path) == level.growth.path(node) and level.depths[place] == len(path)
                outputs.append([self.number(sequence, path)])
        self.passes.append(len(outputs))
        return torch.tensor(outputs)

    def logits(self, depth: int, outputs: torch.Tensor) -> torch.Tensor:
        rows = [self.known[int(number)] for number in outputs[:, 0]]
        assert all(len(path) == depth for _, path in rows)
        return torch.stack([logits_of(depth, path, sequence) for sequence, path in rows])


def request(sequence: int, shape: str, **more) -> TreeRequest:
    shape = TreeShape.parse(shape) if shape else PLAIN
    return TreeRequest(sequence, 100 + sequence, 20, shape, Sampling(), None, **more)


def grown(requests: list[TreeRequest], vocab: DraftVocab | None = None) -> tuple[list[Tree], Draft]:
    draft = Draft()
    return grow(requests, draft.begin, draft.read, draft.logits, vocab), draft


def paths(tree: Tree) -> dict[Path, float]:
    lines: list[Path] = [()]
    for row in range(1, len(tree)):
        lines.append((*lines[tree.parents[row]], tree.tokens[row]))
    return dict(zip(lines, tree.scores))


def eagle2(sequence: int, shape: TreeShape) -> dict[Path, float]:
    """Expand the best of each newest level, keep the best of all: said once more, without passes."""
    every: dict[Path, float] = {(): 0.0}
    newest: list[Path] = [()]
    for depth in range(shape.depth + 1):
        frontier = sorted(newest, key=lambda path: -every[path])[: shape.top_k]
        newest = []
        for path in frontier:
            scores = logits_of(depth, path, sequence).log_softmax(-1)
            for token in scores.argsort(descending=True)[: shape.top_k].tolist():
                every[(*path, token)] = every[path] + float(scores[token])
                newest.append((*path, token))
    best = sorted(every, key=lambda path: -every[path])[: shape.nodes]
    return {path: every[path] for path in best}


SHAPES = ["30x4x3", "9x1x2", "chain:4", "", "20x0x5", "12x7x2"]


def test_trees_of_shared_passes_are_eagle2s_and_each_has_its_own_shape():
    requests = [request(sequence, shape) for sequence, shape in enumerate(SHAPES)]
    trees, draft = grown(requests)
    for each, tree in zip(requests, trees):
        assert tree.tokens[0] == each.root
        assert paths(tree) == pytest.approx(eagle2(each.sequence, each.shape))
        alone = grown([each])[0][0]
        assert paths(alone) == pytest.approx(paths(tree))
    assert draft.passes == [3 + 2 + 1 + 2, 3 + 1 + 2, 3 + 1 + 2, 3 + 2, 2, 2, 2], "none is read for a tree that is deep enough"


def test_a_static_tree_has_the_shape_that_was_fixed_whatever_the_scores():
    tree = grown([request(0, "static:3.1.0.2"), request(1, "9x2x3")])[0][0]
    assert tree.parents == [-1, 0, 0, 0, 1, 3, 3]
    assert tree.tokens[1:4] == logits_of(0, (), 0).argsort(descending=True)[:3].tolist()


def test_a_drafts_own_ids_become_the_targets():
    ids = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31]
    mine, theirs = (grown([request(0, "chain:1")], vocab)[0][0] for vocab in (None, DraftVocab(ids, 40)))
    assert theirs.tokens[1] == ids[mine.tokens[1]]


def test_where_no_tree_is_asked_for_the_draft_is_left_alone():
    trees, draft = grown([request(0, ""), request(1, "")])
    assert trees == [Tree.root(100), Tree.root(101)] and draft.known == []


class Plan:
    """A planner that lets some sequences draft, leaves out nodes, and hears what it should."""

    def __init__(self, levels: int) -> None:
        self.levels, self.asked, self.left, self.stepped_rows, self.heard = levels, [], 0, [], []

    def worth_drafting(self, covered):
        self.asked = list(covered)
        return [chance < 0.5 for chance in covered]

    def frontiers(self, growths, frontiers):
        self.levels -= 1
        return [nodes[:1] if self.levels >= 0 else [] for nodes in frontiers]

    def record_level(self, growth, frontier, before):
        assert [growth.parents[node] for node in range(before, len(growth.tokens))] == [node for node in frontier for _ in range(3)]
        self.heard.append(list(frontier))

    def record_step(self, rows, seconds):
        assert seconds > 0
        self.stepped_rows.append(rows)


def test_a_planner_is_asked_before_each_level_and_told_what_each_took():
    plan = Plan(2)
    requests = [replace(request(i, "40x5x3"), planner=plan, covered=covered) for i, covered in enumerate((0.1, 0.9, 0.2))]
    trees, draft = grown(requests)
    assert plan.asked == [0.1, 0.9, 0.2]
    assert [max(tree.depths) for tree in trees] == [3, 0, 3] and draft.passes == [2, 2]
    assert plan.stepped_rows == [2, 2, 2], "the roots are a level too"
    assert plan.heard[:2] == [[0], [0]] and len(plan.heard) == 6


def test_trees_come_back_in_the_order_they_were_asked_for():
    trees, _ = grown([request(5, "chain:2"), request(1, ""), request(3, "4x1x2")])
    assert [tree.tokens[0] for tree in trees] == [105, 101, 103]


# ---- where copying is sure ----


def copied(chance: float, shape: str = "8x2x2", sequences: int = 1, **more) -> tuple[Draft, list[Tree]]:
    """Trees where copying says 7 behind every node above depth 4 of the first sequence, but nothing behind the root."""
    law = lambda path: CopyLaw(chance, {7: 1.0}, 3) if 0 < len(path) < 4 else None  # noqa: E731
    draft = Draft()
    requests = [request(number, shape, copied=None if number else law, **more) for number in range(sequences)]
    return draft, grow(requests, draft.begin, draft.read, draft.logits)


@pytest.mark.parametrize(
    ("shape", "deepest", "depth"), [("8x2x2", None, 3), ("9x2x2", 9, 4), ("9x2x2", 2, 2), ("4x2x2", 9, 3), ("chain:3", 9, 3)]
)
def test_where_copying_is_sure_of_every_node_it_goes_on_without_the_draft(shape, deepest, depth):
    """As deep as the text has room and the tree has nodes; a fixed shape stays as it is."""
    draft, (tree,) = copied(0.9, shape, deepest=deepest)
    assert draft.passes == [] and max(tree.depths) == depth
    best = logits_of(0, (), 0).topk(2).indices.tolist()
    for token, above, parent, score in list(zip(tree.tokens, tree.depths, tree.parents, tree.scores, strict=True))[1:]:
        assert token == 7 if above > 1 else token in best
        assert above == 1 or score == pytest.approx(tree.scores[parent] + math.log(0.9))


def test_what_is_likely_is_not_sure():
    draft, _ = copied(0.7)
    assert draft.passes == [2, 2]


def test_a_level_is_read_whole_where_copying_is_not_sure_of_all_its_nodes():
    draft, (_, second) = copied(0.9, sequences=2)
    other = Draft()
    (alone,) = grow([request(1, "8x2x2")], other.begin, other.read, other.logits)
    assert draft.passes == [4, 4] and second == alone
