"""Whether a training prompt shares a run of 13 tokens with an evaluation prompt.

    python benchmarks/contamination.py --shards DIR.. --eval F.jsonl.. [--gram 13]

Prompts are all user turns of the shards, those that came from seed prompts included, and every turn of the evaluation files; both in the
target's tokens. Prints how many 13-grams each side has, how many are shared, and some that are. `--apart F.jsonl` of `eyas train` and
`eyas new-draft` leaves such conversations out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eyas.files.target import target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.train.decontaminate import GRAM, grams, questions
from eyas.train.features import shard_examples
from eyas.train.shards import PATTERN
from eyas.train.template import Template


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=Path, nargs="+", required=True)
    parser.add_argument("--eval", type=Path, nargs="+", required=True)
    parser.add_argument("--gram", type=int, default=GRAM)
    parser.add_argument("--target")
    options = parser.parse_args()
    directory = target_directory(options.target)
    template = Template(load_tokenizer(directory), target_config(directory).eos_token_ids)
    evaluated: set[tuple[int, ...]] = set()
    for path in options.eval:
        for line in path.read_text().splitlines():
            for turn in json.loads(line)["turns"]:
                evaluated |= grams(template.tokens(turn), options.gram)
    trained: set[tuple[int, ...]] = set()
    turns = 0
    for example in shard_examples([path for folder in options.shards for path in sorted(folder.glob(PATTERN))], 1 << 20):
        for turn in questions(example, template):
            trained |= grams(turn, options.gram)
            turns += 1
    shared = trained & evaluated
    told = {"gram": options.gram, "training_turns": turns, "training_grams": len(trained), "evaluation_grams": len(evaluated)}
    print(json.dumps(told | {"shared": len(shared), "examples": [template.tokenizer.decode(list(gram)) for gram in list(shared)[:10]]}))


if __name__ == "__main__":
    main()
