"""`eyas import`: a draft of anybody's, in any known layout, written as eyas's own; what was found and decided is told."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eyas.commands.common import draft_path, evidence_of
from eyas.commands.output import progress, terminal
from eyas.config import EyasError
from eyas.files.disk import atomic_directory, directory_hash
from eyas.files.tokenizer import chat_template_hash
from eyas.formats.export import make_way
from eyas.formats.importing import completed, resolve
from eyas.formats.layouts import find
from eyas.formats.portable import FILES, Draft, Found, TargetFiles, write_own

SETTINGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual", "qk_norm", "attention_bias", "mlp_bias")
MEASURED_TOKENS = 64  # of each of the questions a decision is measured on


def run(options: argparse.Namespace) -> int:
    console = terminal()
    out = Path(options.out).expanduser() if options.out else None
    if not options.dry_run:
        if out is None:
            raise EyasError("name a directory to write to, or ask for --dry-run")
        make_way(out, options.force, FILES, own=True)
    source = draft_path(options.source)
    found = find(source)
    console.print(f"{source}: {found.layout}, {described(found)}", markup=False)
    target = TargetFiles.of(options.target) if options.target else None
    layers = target.config.num_hidden_layers if target else options.target_layers or found.target_layers
    if wanting := what_is_wanting(found, layers, target):
        for line in [*found.wrong, *found.told]:
            console.print(f"  {line}", markup=False)
        if options.dry_run:
            return 0
        raise EyasError(wanting)
    evidence = embedding = None
    if target:
        found = completed(found, target)
    elif found.shape.get("own_embedding"):
        console.print("  it brings an embedding and keeps it; --target T tells whether it is the target's own")
    if target and not options.unmeasured:
        evidence, embedding = evidence_of(target, MEASURED_TOKENS, options.chat_template_kwargs)
    with progress() as bar:
        task = bar.add_task("the draft's readings are measured", total=None, unit="readings")
        update = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        draft, decided = resolve(found, layers, evidence, embedding, update)
    for line in [*found.wrong, *found.told, *decided]:
        console.print(f"  {line}", markup=False)
    if (kind := draft.weights["fc.weight"].dtype) != torch.bfloat16:
        console.print(f"  weights are rounded from {str(kind).removeprefix('torch.')} to bfloat16, as eyas keeps drafts")
    if not options.dry_run:
        assert out is not None
        save(out, draft, target)
        console.print(f"{out}: written as eyas's own; taps (inputs of layers) {', '.join(map(str, draft.config.taps))}", markup=False)
    return 0


def what_is_wanting(found: Found, layers: int, target: TargetFiles | None) -> str | None:
    """What the files leave to the target that is not known; None where all is."""
    if not layers:
        return "which layers it reads depends on its target: give --target T (best: open questions are measured) or --target-layers N"
    if found.head != "own" and target is None:
        return "it has no head of its own, so its target's counts: give --target T"
    return None


def described(found: Found) -> str:
    shape = found.shape
    settings = [name for name in SETTINGS if shape.get(name)]
    width = f"width {shape['hidden_size']}"
    width += f" for a target of {shape['target_hidden_size']}" if shape["target_hidden_size"] != shape["hidden_size"] else ""
    settings += ["an embedding"] if shape.get("own_embedding") else []
    settings += [f"{layers} layers"] if (layers := shape.get("draft_layers", 1)) > 1 else []
    settings += [f"a window of {window}"] if (window := shape.get("sliding_window")) is not None else []
    settings += [f"{share:g} of a head rotated"] if (share := shape.get("partial_rotary_factor", 1)) != 1 else []
    parts = [width, f"{shape['draft_vocab_size']} draft tokens of {shape['vocab_size']}", *settings]
    ids = f"layer ids {list(found.layer_ids)} (named by {found.counts})" if found.layer_ids else "no layer ids: the default triple"
    return ", ".join([*parts, f"rope theta {shape['rope_theta']:g}", ids])


def save(out: Path, draft: Draft, target: TargetFiles | None) -> None:
    facts = draft.facts
    if target:
        facts = {
            "target": target.directory.name,
            "target_sha256": directory_hash(target.directory),
            "chat_template_sha256": chat_template_hash(target.directory),
        }
    with atomic_directory(out) as work:
        write_own(work, draft, facts)
