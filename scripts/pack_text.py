"""Pack the text of folders of self-written shards into one file of about two bytes a token, for `eyas train --text`.

    python scripts/pack_text.py FOLDER.. OUT

A folder holds the shards of one setting, as `eyas train` writes them under EYAS_CACHE/selfplay. Their states are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from eyas.config import EyasError
from eyas.train.texts import pack_text


def main(words: list[str]) -> int:
    if len(words) < 2 or words[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    *folders, out = map(Path, words)
    try:
        counts = pack_text(folders, out).counts
    except EyasError as error:
        print(f"pack_text: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {counts.answer_tokens} answer tokens, {counts.bytes / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
