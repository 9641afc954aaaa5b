"""`eyas publish`: a folder ready for the hub; uploading it stays the user's own step."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from eyas.commands.common import target_for
from eyas.commands.next_steps import place, shell
from eyas.commands.output import terminal
from eyas.config import EyasError
from eyas.engine import draft_directory
from eyas.files.disk import atomic_directory
from eyas.files.eagle3_files import check_fits
from eyas.formats.export import make_way
from eyas.formats.model_card import bench_results, card, licence_of, training_told
from eyas.formats.portable import FILES, own_draft, write_own
from eyas.train.card import CARD, PICTURE

KEPT = ("training.json", PICTURE)


def run(options: argparse.Namespace) -> int:
    if options.out is None:
        raise EyasError("name a directory to write to")
    console, out = terminal(), Path(options.out).expanduser()
    source = draft_directory(options.draft, Path())
    assert source is not None  # the command line asks for one
    draft, target = own_draft(source), target_for(options.target, source)
    check_fits(draft.config, target.config)
    results = bench_results(options.bench)
    name = options.target_name or (options.target if options.target and not Path(options.target).expanduser().exists() else None)
    if name is None:
        raise EyasError("name the target as users will type it: --target-name owner/model")
    licence = licence_of(target, options.licence)
    if out.resolve() == source.resolve():
        raise EyasError(f"{out} is the draft itself; choose another place")
    if not options.dry_run:
        make_way(out, options.force, (*FILES, CARD, *KEPT), own=True)
    with tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        made = Path(folder)
        write_own(made, draft, draft.facts | {"target": name})
        for kept in KEPT:
            if (source / kept).exists():
                shutil.copy(source / kept, made / kept)
        (made / CARD).write_text(card(draft, training_told(source), results, name, licence), encoding="utf-8")
        if options.dry_run:
            for file in sorted(made.iterdir()):
                console.print(f"{file.stat().st_size:>12,} {file.name}", markup=False)
            console.print((made / CARD).read_text(encoding="utf-8"), markup=False)
            return 0
        with atomic_directory(out) as work:
            shutil.copytree(made, work, dirs_exist_ok=True)
    upload = shell("hf", "upload", "OWNER/NAME", place(out))
    console.print(
        f"{out}: ready for the hub; look it over, then `{upload}` (huggingface_hub's own command)",
        markup=False,
    )
    return 0
