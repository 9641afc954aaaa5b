"""A folder ready for the hub: a draft in a layout that engines read, and a card with its figures, their conditions, and how to serve it.

Knows training.json, results of `eyas bench` and layouts; measures nothing and uploads nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eyas.config import EyasError, TreeShape
from eyas.files.disk import read_json
from eyas.formats.layouts import LAYOUTS
from eyas.formats.portable import Draft, TargetFiles
from eyas.train.card import CARD, best_point, shown

ENGINES = ("sglang", "vllm", "llama_cpp")
AS_IT_IS = ("sglang", "vllm")  # read eyas's own folder; SGLang one of one layer, since it names the norms of others differently


def bench_results(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Results that `eyas bench --out` wrote, checked for what the card needs."""
    results = []
    for path in paths:
        told = read_json(Path(path).expanduser())
        if not isinstance(told.get("conditions"), dict) or not isinstance(told.get("methods"), dict):
            raise EyasError(f"{path} is no result of `eyas bench --out` (it has no conditions and methods)")
        results.append(told)
    return results


def licence_of(target: TargetFiles, given: str | None) -> str:
    """The draft's licence: the given one, or else that of the target's own card. Raises `EyasError` where there is neither."""
    if given:
        return given
    card = target.directory / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if text.startswith("---\n"):
        for line in text.split("---\n")[1].splitlines():
            if line.startswith("license:") and line.split(":", 1)[1].strip():
                return line.split(":", 1)[1].strip()
    raise EyasError(f"the licence of {target.directory.name} is not in its files; look it up and give one with --licence (apache-2.0, say)")


def card(draft: Draft, told: dict[str, Any] | None, results: Sequence[dict[str, Any]], name: str, licence: str) -> str:
    """The card's text. `told`: training.json where there is one; `name`: the target's, as users type it."""
    front = ["---", f"license: {licence}", f"base_model: {name}", "tags:", "- eagle3", "- speculative-decoding", "---"]
    parts = ["\n".join(front), f"# An EAGLE-3 draft for {name}", introduction(draft, name)]
    parts += ["## Serve it", serving(draft, name)]
    if told:
        parts += ["## How it was trained", training(told)]
    if results:
        parts += ["## What it accepts", figures(results)]
    return "\n\n".join(parts) + "\n"


def introduction(draft: Draft, name: str) -> str:
    config = draft.config
    taps = ", ".join(map(str, config.taps))
    facts = [
        f"reads the inputs of layers {taps} of {draft.target_layers}",
        f"says {config.draft_vocab_size:,} of {config.vocab_size:,} tokens",
        f"rotary base {config.rope_theta:g}",
        f"{sum(tensor.numel() for tensor in draft.weights.values()):,} weights",
    ]
    layers = "One decoder layer" if config.draft_layers == 1 else f"{config.draft_layers} decoder layers"
    return (
        f"It drafts for {name} and for nothing else: text stays what {name} alone would write, faster where the draft is right.\n\n"
        f"{layers} that {'; '.join(facts)}. Measure it where it runs with `eyas doctor`."
    )


def serving(draft: Draft, name: str) -> str:
    """Command lines of the engines that can run it; `DRAFT` stands for this folder, which SGLang and vLLM read as it is."""
    blocks = []
    for engine in ENGINES:
        entry = LAYOUTS[engine]
        if entry.refusal(draft):
            continue
        first, place = "", Path("DRAFT")
        if engine not in AS_IT_IS or (engine == "sglang" and draft.config.draft_layers > 1):
            first, place = f"{shlex.join(['eyas', 'export', 'DRAFT', 'OUT', '--to', engine, '--target', name])}\n", Path("OUT")
        blocks.append(f"{entry.title}:\n\n```bash\n{first}{entry.serve(place, name, TreeShape.chain(3))}\n```")
    return "\n\n".join(blocks)


def training(told: dict[str, Any]) -> str:
    found = told.get("data")
    data: dict[str, Any] = found if isinstance(found, dict) else {}
    hours, slots = (told.get(name) if isinstance(told.get(name), (int, float)) else 0 for name in ("hours", "slots"))
    lines = [f"{hours:.2f} hours on {told.get('machine', 'an unnamed machine')}, {slots:,} answer tokens"]
    if isinstance(data.get("answer_tokens"), int) and isinstance(data.get("conversations", 0), int):
        kind, conversations = data.get("kind", "given"), data.get("conversations", 0)
        lines.append(f"on {data['answer_tokens']:,} answer tokens in {conversations:,} conversations ({kind})")
    if best := best_point(told):
        lines.append(f"held-out simulated tau of the weights kept: {best['tau']:.2f}")
    apart = data.get("kept_apart")
    if isinstance(apart, dict) and apart.get("from"):
        lines.append(f"conversations that share 13 tokens with {', '.join(apart['from'])} were left out")
    return "; ".join(lines) + ". Settings, versions, data and curve: `training.json`."


def figures(results: Sequence[dict[str, Any]]) -> str:
    """A table of every method of every result, each with its conditions."""
    rows = ["| prompts | method | tree | T | tau | speed over plain |", "|---|---|---|---|---|---|"]
    notes = []
    for result in results:
        conditions = result["conditions"]
        where = f"{conditions.get('prompt_file', 'prompts')}, {conditions.get('prompt_count', '?')} of them"
        for method, measured in result["methods"].items():
            if method == "plain":
                continue
            tau, speed = (shown(measured, key, conditions.get("prompt_count", 0)) for key in ("tau", "speedup"))
            tree = measured.get("tree", "")
            rows.append(f"| {where} | {method} | {tree} | {conditions.get('temperature', 0):g} | {tau} | {speed} |")
        machine = f"{conditions.get('threads')} threads, {conditions.get('device')} {conditions.get('cpu_capability', '')}"
        made = f"{conditions.get('precision')}, {machine}, eyas {conditions.get('eyas')}, {str(conditions.get('date'))[:10]}"
        notes.append(f"{where}: up to {conditions.get('max_new_tokens')} tokens, {made}")
    return "\n".join(rows) + "\n\n" + ". ".join(dict.fromkeys(notes)) + ". Intervals are 95%, by bootstrap over prompts."


def training_told(source: Path) -> dict[str, Any] | None:
    path = source / "training.json"
    return read_json(path) if path.exists() else None
