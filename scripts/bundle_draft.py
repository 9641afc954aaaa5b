"""Put a trained draft into the package: weights in files under 15 MB, config and training.json beside them, no checkpoint.

Run: python scripts/bundle_draft.py DRAFT_DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from eyas.engine import BUNDLED
from eyas.files.disk import atomic_directory
from eyas.files.tensors import read_tensors, save_tensors

LARGEST_FILE = 15_000_000  # bytes; history keeps every copy, and some hosts refuse more


def main() -> None:
    draft = Path(sys.argv[1])
    with atomic_directory(BUNDLED) as work:
        save_tensors(work, read_tensors(draft), LARGEST_FILE)
        for name in ("config.json", "training.json"):
            shutil.copy(draft / name, work / name)
    print("\n".join(f"{file.stat().st_size:>10} {file.name}" for file in sorted(BUNDLED.iterdir())))


if __name__ == "__main__":
    main()
