"""Writes the pictures of docs/how-it-works.md, and what the page quotes, from a recording of a real run (docs/how-it-works.json).

Run: python scripts/how_it_works.py             (tests/view/test_how_it_works.py fails where page and pictures are not what this writes)
     python scripts/how_it_works.py record      the run itself: the embedded target with its draft
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from page_tables import filled, table
from svg import Box, Drawing

from eyas.reference import ancestor_mask, comb_parents

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RECORDING = DOCS / "how-it-works.md", DOCS / "how-it-works.json"
PROMPT, ROUNDS, TREE = "How can", 2, "8x3x2"  # the notes' example; a tree that fits on a page
TEMPERATURE, SEED = 1.0, 11  # with this seed the target goes on as in the notes: I do
ANCHORS, STEPS = 4, 3  # of the comb that is drawn

Recording = dict[str, Any]


# ---- the run ----


def recorded() -> Recording:
    """The notes' example, and what `eyas trace` tells of it."""
    from rich.console import Console

    import eyas
    from eyas.config import Request, Sampling, TreeShape
    from eyas.view.rounds import rounds_of
    from eyas.view.trace import Story

    engine = eyas.load()
    sampling = Sampling(TEMPERATURE)
    request = Request(method="eagle3", copy=False, tree=TREE, sampling=sampling, raw=True, max_new_tokens=24, seed=SEED)
    _, text, _, rounds = rounds_of(engine, PROMPT, request, ROUNDS)
    told = io.StringIO()
    Story(engine, Console(file=told, width=10_000, highlight=False)).tell(PROMPT, request, ROUNDS)
    draft, target = engine.network.config, engine.target.config
    words = [engine.tokenizer.decode([token]) for token in text.tokens]
    for each in rounds:
        del each["ms"]  # of that machine, on that day
    return {
        "prompt": words[: text.prompt_length],
        "text": words[text.prompt_length :],
        "shapes": {
            "layers": target.num_hidden_layers,
            "taps": list(draft.taps),
            "target": target.hidden_size,
            "draft": draft.hidden_size,
            "heads": draft.num_attention_heads,
            "mlp": draft.intermediate_size,
            "vocabulary": target.vocab_size,
            "draft_vocabulary": draft.draft_vocab_size,
        },
        "rounds": rounds,
        "told": told.getvalue().strip("\n").split("\n"),
        "tree": str(TreeShape.parse(TREE)),
    }


# ---- words ----


def quoted(token: str) -> str:
    return f"“{token.replace(chr(10), '⏎')}”"


def bare(token: str) -> str:
    """As it stands below a letter: g_can."""
    return token.strip() or quoted(token)


def behind(told: Recording, row: int, number: int = 0) -> list[list[Any]]:
    """The guesses that a round's tree has behind a row, the likeliest first."""
    nodes = told["rounds"][number]["nodes"]
    return sorted((node for node in nodes if node[2] == row), key=lambda node: -node[4])


# ---- pictures ----


def pipeline(told: Recording) -> str:
    """l, m, h -> 3H -> fc -> g; g and the drawn token -> a -> guesses; a in the place of g."""
    shape, (first, *_) = told["shapes"], told["rounds"]
    H, last, root = shape["target"], bare(told["prompt"][-1]), bare(first["root"]["text"])
    guess = behind(told, 0)[0]
    names = (
        f"l, m and h of {last} become g; g and the drawn token {root} become a, whose head guesses {bare(guess[1])}; then a stands in for g"
    )
    drawing = Drawing(900, 430, names)
    target = drawing.box(20, 56, 130, 250, f"the target\n{shape['layers']} layers, reads\n{''.join(told['prompt'])}")
    logits = drawing.box(20, 346, 130, 44, f"draws {quoted(first['root']['text'])}\nof {shape['vocabulary']:,} tokens", "right")
    drawing.arrow(target.bottom, logits.top)
    boxes = []
    for letter, word, layer, y in zip("lmh", ("low", "middle", "high"), shape["taps"], (246, 166, 86), strict=True):
        box = drawing.box(196, y, 96, 44, f"{letter}, {word}\n[{H}]")
        drawing.words(184, y + 58, f"enters layer {layer}", soft=True)
        drawing.arrow((150, y + 22), box.left)
        boxes.append(box)
    joined = drawing.box(334, 120, 74, 136, f"[l; m; h]\n[{3 * H}]")
    for box in boxes:
        drawing.arrow(box.right, joined.left, bend=True)
    fc = drawing.box(436, 160, 84, 56, f"fc\n[{shape['draft']} x {3 * H}]")
    drawing.arrow(joined.right, fc.left)
    g = drawing.box(548, 160, 84, 56, f"g_{last}\n[{shape['draft']}]", "g")
    drawing.arrow(fc.right, g.left)
    e = drawing.box(334, 346, 186, 44, f"e_{root}: its embedding\n[{shape['draft']}]")
    drawing.arrow(logits.right, e.left)
    layer = drawing.box(
        652,
        118,
        126,
        140,
        f"the draft:\none layer\nreads [e; g] [{2 * shape['draft']}]\n{shape['heads']} heads\nadds to g",
    )
    drawing.arrow(g.right, layer.left)
    drawing.arrow(e.right, (652, 236), bend=True)
    a = drawing.box(802, 160, 80, 56, f"a_{root}\n[{shape['draft']}]", "a")
    drawing.arrow(layer.right, a.left)
    guesses = "\n".join(f"{quoted(node[1])} {node[4]:.2f}" for node in behind(told, 0))
    drawing.box(752, 326, 130, 92, f"norm, head\n[{shape['draft_vocabulary']} x {shape['draft']}]\ngiven the noise:\n{guesses}")
    drawing.arrow((842, 216), (842, 326))
    drawing.arrow((842, 160), (842, 34), "a", head=False)
    drawing.arrow((842, 34), (590, 34), "a", head=False)
    drawing.arrow((590, 34), (590, 160), "a dashed")
    drawing.words(
        836, 26, f"step 2: there is no g_{root}, for the target has not read it: a_{root} stands in, with e_{bare(guess[1])}", "end"
    )
    return drawing.text()


def tree(told: Recording, number: int = 0) -> str:
    """A round's tree with the walk and the bonus, and beside it which row of the pass sees which."""
    this = told["rounds"][number]
    nodes, path = this["nodes"], this["path"]
    end, W, GAP, ROW, TOP, size = path[-1], 118, 30, 46, 62, 20
    bonus = [*this["bonus"], end, nodes[end][3] + 1, 1.0, ""]
    order = placed([*nodes, bonus], [*path, len(nodes)])
    levels = 1 + max(node[3] for node in [*nodes, bonus])
    left = 30 + levels * (W + GAP)
    height = max(TOP + (max(order) + 1) * ROW + 8, TOP + len(nodes) * size + 56)
    kept = " ".join(bare(nodes[row][1]) for row in path[1:]) or "no guess"
    width = left + 110 + len(nodes) * size + 60
    drawing = Drawing(width, height, f"A tree of {len(nodes) - 1} guesses and its mask; the walk keeps {kept}")
    for level in range(levels):
        head = "the last token" if level == 0 else f"level {level}, from {'g' if level == 1 else 'a'}"
        drawing.words(20 + level * (W + GAP), 26, head, soft=True)
    drawing.words(20, 44, "with each guess: the chance that the text goes down to it, given the noise", soft=True)
    boxes: list[Box] = []
    for row, (_, text, parent, level, chance, _) in enumerate([*nodes, bonus]):
        x, y, last = 20 + level * (W + GAP), TOP + order[row] * ROW, row == len(nodes)
        kind = "bonus" if last else "right" if row in path else "card"
        label = f"{quoted(text)} bonus" if last else f"{quoted(text)} {chance:.2f}" if parent >= 0 else quoted(text)
        boxes.append(drawing.box(x, y, W, 24, label, kind))
        if parent >= 0:
            drawing.arrow(boxes[parent].right, boxes[row].left, "bonus dashed" if last else kind, bend=True, head=False)
    for row, (drawn, *_) in zip(path, this["draws"], strict=True):
        drawing.words(boxes[row].x, boxes[row].y + 37, f"target draws {quoted(drawn[1])}", soft=True)
    drawing.words(left + 110, 26, f"the mask of the pass: [{len(nodes)}, text + {len(nodes)}]", "start", soft=True)
    for row, line in enumerate(ancestor_mask([node[2] for node in nodes]).tolist()):
        drawing.words(left + 102, TOP + row * size + 15, quoted(nodes[row][1]), "end")
        for column, sees in enumerate(line):
            drawing.cell(left + 110 + column * size, TOP + row * size, size, "seen" if sees else "faint")
    for number, line in enumerate(("filled: the row sees that row;", "every row sees all of the text")):
        drawing.words(left + 110, TOP + len(nodes) * size + 18 + 15 * number, line, soft=True)
    return drawing.text()


def placed(nodes: list[list[Any]], path: list[int]) -> list[int]:
    """The line on which each node is drawn; the walk runs straight along the top."""
    lines, free = [0] * len(nodes), 0

    def place(row: int) -> None:
        nonlocal free
        below = sorted((each for each, node in enumerate(nodes) if node[2] == row), key=lambda each: each not in path)
        if not below:
            lines[row], free = free, free + 1
            return
        for each in below:
            place(each)
        lines[row] = lines[below[0]]

    place(0)
    return lines


def comb(told: Recording) -> str:
    """Training-time test as a mask: which step of which anchor sees which."""
    words = [*told["prompt"], *told["text"]]
    size, top, left = 20, 66, 312
    rows = ANCHORS * STEPS
    drawing = Drawing(left + rows * size + 190, top + rows * size + 40, f"The comb of {ANCHORS} anchors and {STEPS} unroll steps")
    drawing.words(20, 26, f"{ANCHORS} anchors of a text, {STEPS} unroll steps: what each row reads, what it is taught", soft=True)
    drawing.words(20, 50, "hidden", soft=True)
    drawing.words(92, 50, "token drawn", soft=True)
    drawing.words(186, 50, "taught", soft=True)
    for step in range(STEPS):
        drawing.words(left + step * ANCHORS * size, 50, f"step {step}", soft=True)
    for row, line in enumerate(ancestor_mask(comb_parents(ANCHORS, STEPS)).tolist()):
        step, anchor = divmod(row, ANCHORS)
        y = top + row * size
        hidden = f"g_{anchor}" if step == 0 else f"a{'¹²³'[step - 1]}_{anchor}"
        drawing.box(20, y, 62, size - 2, hidden, "g" if step == 0 else "a")
        drawing.words(92, y + 14, quoted(words[anchor + 1 + step]))
        drawing.words(186, y + 14, f"p after {quoted(words[anchor + 1 + step])}", soft=True)
        for column, sees in enumerate(line):
            kind = ("g" if column < ANCHORS else "a") if sees else "faint"
            drawing.cell(left + column * size, y, size, kind)
    drawing.words(left + rows * size + 14, top + 16, "step 0: causal,", soft=True)
    drawing.words(left + rows * size + 14, top + 32, "as in any text", soft=True)
    for step in range(1, STEPS):
        y = top + step * ANCHORS * size + 16
        drawing.words(left + rows * size + 14, y, f"step {step}: g of the text up to", soft=True)
        drawing.words(left + rows * size + 14, y + 16, "its anchor, and its own", soft=True)
        drawing.words(left + rows * size + 14, y + 32, "anchor's stand-ins", soft=True)
    drawing.words(20, top + rows * size + 24, "aⁱ_j: the output of step i-1 at anchor j, which step i reads in the place of g", soft=True)
    return drawing.text()


PICTURES = {"how-it-works-pipeline.svg": pipeline, "how-it-works-tree.svg": tree, "how-it-works-comb.svg": comb}


# ---- what the page quotes ----


def steps(told: Recording) -> str:
    """The notes' steps beside what happened."""
    first = told["rounds"][0]
    root, texts = bare(first["root"]["text"]), [bare(word) for word in told["prompt"]]
    guess = behind(told, 0)[0]
    said = re.findall(r"its head guesses (.*); with the noise the target draws with: (.*)", "\n".join(told["told"]))
    guesses, then = (f"{own}; given the noise {noisy}" for own, noisy in said[:2])
    named = " ".join(f"g_{text}" for text in texts)
    rows = [
        ("the target", f"reads {quoted(''.join(told['prompt']))}, keeps l, m, h at each token", f"draws {quoted(first['root']['text'])}"),
        ("step 1", f"{named} (all rows of the text), the last with e_{root}", f"a_{root}; its head: {guesses}"),
        ("step 2", f"no g_{root}: a_{root} stands in, with e_{bare(guess[1])}", f"a_{bare(guess[1])}; its head: {then}"),
        ("step 3", f"no g_{bare(guess[1])}: a_{bare(guess[1])} stands in, with the next guess", "and so on, down to the last level"),
    ]
    return table(("step", "reads", "makes"), rows)


def walked(told: Recording) -> str:
    """One line for what each round brought."""
    rows = []
    for number, this in enumerate(told["rounds"], start=1):
        kept = " ".join(quoted(this["nodes"][row][1]) for row in this["path"][1:]) or "none"
        rows.append((str(number), str(this["rows"]), kept, quoted(this["bonus"][1]), str(len(this["committed"]))))
    return table(("round", "rows of the pass", "guesses kept", "bonus", "tokens"), rows)


def tables(told: Recording) -> dict[str, str]:
    return {"steps": steps(told), "walked": walked(told), "trace": "```\n" + "\n".join(told["told"]) + "\n```\n"}


def read() -> Recording:
    return json.loads(RECORDING.read_text(encoding="utf-8"))


def written(page: str) -> str:
    return filled(page, tables(read()))


def pictures() -> dict[str, str]:
    return {name: draw(read()) for name, draw in PICTURES.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        RECORDING.write_text(json.dumps(recorded(), ensure_ascii=False, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    for name, text in pictures().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    if PAGE.exists():
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
