"""Two ideas in one file, a loss and a way to grow trees: a plugin, and the first half of docs/add-a-method.md.

eyas ablate --plugin examples/ideas.py --set loss=reverse-kl
eyas bench --plugin examples/ideas.py --prompts F.jsonl --methods plain,eagle3@60x7x10,eagle3@60x7x10/tapered
"""

from __future__ import annotations

from torch import Tensor

from eyas.config import TreeShape
from eyas.decode import grow
from eyas.decode.tree import Growth
from eyas.train import losses


def reverse_kl(log_q: Tensor, p: Tensor) -> Tensor:
    """[n] from the draft's log distribution and the target's distribution [n, D]: it costs to say what the target would not."""
    return (log_q.exp() * (log_q - p.clamp_min(1e-9).log())).sum(-1)


losses.register("reverse-kl", reverse_kl)


class Tapered(Growth):
    """Half as many children a node with every level: deep guesses are seldom right, and their nodes are better spent near the root."""

    def __init__(self, root: int, shape: TreeShape) -> None:
        super().__init__(root, shape.top_k)

    def room(self, node: int) -> int:
        return max(1, self.width >> self.depths[node])


grow.register("tapered", Tapered)
