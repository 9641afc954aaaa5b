"""Tells rounds as the paper's inference figure does: g, the drawn token, a in place of g, the tree, the target's draws, the kept path.

Everything shown comes from a real run; knows records of rounds and a console.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree as Drawing

from eyas.config import VERIFIERS, Request
from eyas.decode.prompt import Prompt
from eyas.decode.sampling import draw
from eyas.decode.sequence import RoundRecord, Sequence
from eyas.decode.tree import Tree
from eyas.engine import Engine
from eyas.model.draft import DraftNetwork
from eyas.parallel.target import ShardedTarget
from eyas.view.heard import Heard, Listener, Path
from eyas.view.rounds import logits_at

WALK = VERIFIERS[0]


class Story:
    def __init__(self, engine: Engine, console: Console) -> None:
        self.engine, self.console = engine, console
        self.records: list[RoundRecord] = []
        self.listener = Listener(engine.drafter("eagle3"))
        engine.makers["eagle3"] = lambda: self.listener

    def tell(self, prompt: Prompt, request: Request, rounds: int) -> None:
        """Run `rounds` rounds and tell each."""
        for number, (text,) in enumerate(self.engine.rounds(prompt, request, self.records.append)):
            if number == 0:
                self.setup(text)
            else:
                self.round(number, text, request)
            if number == rounds or text.finish_reason:
                break
        written = self.engine.tokenizer.decode(text.tokens[text.prompt_length :])
        self.say(f"\nWritten in {text.rounds} rounds, seed {text.seed}: [bold]{escape(repr(written))}[/bold]")

    # ---- the parts of the story ----

    def setup(self, text: Sequence) -> None:
        prompt = text.tokens[: text.prompt_length]
        taps = self.engine.drafter("eagle3").wants
        self.say("[bold]The target reads the prompt.[/bold]")
        self.say(f"  {len(prompt)} tokens, ending in {self.words(prompt[-4:])}")
        letters, named = ("l, m and h", ": low l, middle m, high h") if len(taps) == 3 else ("those", "")
        self.say(f"  At every token its states before {layers_named(taps)} are kept{named}.")
        self.say(f"  The draft's fc ({self.sizes()}) fuses {letters} of each into one vector g: {self.vectors('g', prompt[-3:])}.")
        self.say(f"  From its logits the target draws {self.word(text.tokens[-1])}. Its g does not exist yet: the target has not read it.")

    def round(self, number: int, text: Sequence, request: Request) -> None:
        record = self.records[-1]
        end = len(text.tokens) - len(record.committed)
        self.say(f"\n[bold]Round {number}[/bold]")
        assert self.listener.heard is not None, "every round asks the drafter"
        self.draft_steps(record.tree, text.tokens[end - 2], self.listener.heard)
        rows = len(record.tree)
        chance = f"each path's chance{self.seen(request, self.listener.heard)}"
        self.say(f"  [bold]The tree[/bold] with {chance}; the target reads its {rows} rows in one pass:")
        self.console.print(self.drawing(record, text, end - 1, request))
        if isinstance(self.engine.target, ShardedTarget):
            self.say(f"  [bold]Tree Attention[/bold]: {self.shards(self.engine.target, record.tree, end - 1)}")
        kept = [record.tree.tokens[row] for row in record.accepted.path[1:]]
        path = f"keeps {self.words(kept)}" if kept else "keeps no guess"
        told = f"{len(record.committed)} token{'s' if len(record.committed) > 1 else ''} from one pass of the target."
        left = f"and the draw that left the tree, {self.word(record.accepted.bonus)}, is the bonus token"
        ended = len(record.committed) <= len(kept)
        self.say(f"  [bold]The walk[/bold] {path}, {'and the text ends on it' if ended else left}: {told}")
        made = self.vectors("g", [record.tree.tokens[0], *kept])
        self.say(f"  Cache rows of the path stay, the others go; the target's pass has made {made}.")

    def shards(self, target: ShardedTarget, tree: Tree, position: int) -> str:
        """Where a tree's rows have their keys, and whose states met."""
        rows: dict[tuple[int, int], list[int]] = {}
        for row, depth in enumerate(tree.depths):
            rows.setdefault(target.lies(position + depth), []).append(row)
        lie = "; ".join(f"rows {' '.join(map(str, mine))} in shard {shard} (process {rank})" for (shard, rank), mine in rows.items())
        count = target.shards_of(position + 1 + max(tree.depths))
        met = f"states of {count} shards met in pairs, in {count - 1} meetings" if count > 1 else "one shard holds all keys, so nothing met"
        return f"keys of {lie}. In each layer {met}."

    def draft_steps(self, tree: Tree, before: int, heard: Heard) -> None:
        """Tell the draft's steps: step 1 reads g and the drawn token; step 2 and on read a in place of the g that cannot exist yet. Of each
        level's nodes one step is told, behind the one told before where that was expanded, and the others are named."""
        root, told = tree.tokens[0], ()
        if not heard.levels:
            why = "copying is sure of what follows" if len(tree) > 1 else "there is room for one token alone"
            self.say(f"  The draft is not asked: {why}.")
        for number, level in enumerate(heard.levels, 1):
            told = next((path for path in level if path[:-1] == told), level[0])
            if number == 1:
                g, a = self.vectors("g", [before]), self.vectors("a", [root])
                self.say(f"  Step 1: the draft reads {g} with the embedding of {self.word(root)} and makes {a};")
            else:
                *_, last, token = (root, *told)
                g, a, made = self.vectors("g", [last]), self.vectors("a", [last]), self.vectors("a", [token])
                self.say(f"  Step {number}: {g} does not exist, {a} stands in; with {self.word(token)} it gives {made};")
            self.say(f"          {self.guesses(tree, told, heard)}")
            if others := [path for path in level if path != told]:
                behind = ", ".join(self.words(list(path)) for path in others)
                self.say(f"          {len(others)} more node{'s' * (len(others) > 1)} of this level expanded, at {behind}")

    def seen(self, request: Request, heard: Heard) -> str:
        noise = " given the target's noise" if heard.noisy else ""
        return noise + (", and what the target draws at each node" if request.verifier == WALK else "")

    def guesses(self, tree: Tree, path: Path, heard: Heard) -> str:
        """What the head says behind an expanded node, of the guesses that the tree kept; and what the target's noise makes of it."""
        row = row_at(tree, path)
        children = [] if row is None else sorted(tree.children[row].values(), key=lambda child: -tree.scores[child])
        if row is None or not children:
            return "its head guesses nothing that the tree keeps"
        own = ", ".join(f"{self.word(tree.tokens[child])} {heard.own(path, tree.tokens[child]):.2f}" for child in children)
        law = heard.laws[path]
        if law is not None:
            shares = ", ".join(f"{self.word(token)} {law.chance * share:.2f}" for token, share in law.following.items())
            own += f"; after the same {law.matched} token{'s' * (law.matched > 1)} before came {shares}"
        if not heard.noisy and law is None:
            return f"its head guesses {own}"
        scores = ", ".join(f"{self.word(tree.tokens[c])} {math.exp(tree.scores[c] - tree.scores[row]):.2f}" for c in children)
        return f"its head guesses {own}; {joined(heard.noisy, law is not None)}: {scores}"

    def drawing(self, record: RoundRecord, text: Sequence, position: int, request: Request) -> Drawing:
        """The tree with scores; the kept path in green, each node with the target's own draw."""

        def label(row: int) -> str:
            name = self.word(record.tree.tokens[row])
            name = f"[bold green]{name}[/bold green]" if row in record.accepted.path else name
            chance = f" {math.exp(record.tree.scores[row]):.2f}" if row else ""
            if request.verifier != WALK:  # accept or reject: nothing is drawn at a node
                return f"{name}{chance}"
            drawn = draw(logits_at(record, text, row), request.sampling, text.noise_at(position + record.tree.depths[row] + 1))
            return f"{name}{chance} [dim]target draws {self.word(drawn)}[/dim]"

        drawings = [Drawing(label(0))]
        for row in range(1, len(record.tree)):
            drawings.append(drawings[record.tree.parents[row]].add(label(row)))
        return drawings[0]

    # ---- words ----

    def sizes(self) -> str:
        """What fc reads and makes: `3 x 576 -> 576`."""
        config = self.engine.network.config if isinstance(self.engine.network, DraftNetwork) else None
        return f"{len(config.taps)} x {config.target_hidden_size} -> {config.hidden_size}" if config else "all taps -> one"

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def word(self, token: int) -> str:
        return escape(repr(self.engine.tokenizer.decode([token])))

    def words(self, tokens: list[int]) -> str:
        return " ".join(self.word(token) for token in tokens)

    def vectors(self, letter: str, tokens: list[int]) -> str:
        """`g_How g_can`: a vector and the token it belongs to."""
        return " ".join(f"{letter}_{escape(self.spelled(token))}" for token in tokens)

    def spelled(self, token: int) -> str:
        text = self.engine.tokenizer.decode([token])
        return text.strip() or repr(text)


def joined(noisy: bool, copied: bool) -> str:
    """What a node's score is made of beside the head's own guess."""
    parts = ["both together"] * copied + ["with the noise the target draws with"] * noisy
    return ", ".join(parts)


def row_at(tree: Tree, path: Path) -> int | None:
    """The row at the end of a path of tokens below the root; None where the tree was cut above it."""
    row: int | None = 0
    for token in path:
        row = None if row is None else tree.children[row].get(token)
    return row


def layers_named(taps: Items[int]) -> str:
    """`layer 3`, `layers 2, 5 and 9`."""
    *others, last = map(str, taps)
    return f"layers {', '.join(others)} and {last}" if others else f"layer {last}"
