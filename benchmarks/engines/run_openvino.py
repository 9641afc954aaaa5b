"""A draft in OpenVINO GenAI's EAGLE-3 pipeline on CPU: each round beside ours.

    python benchmarks/engines/run_openvino.py --prompts F.jsonl [--precision fp32|fp16|int8] [--tree chain:K|NODESxDEPTHxTOPK]

The precision says how the weights of target and draft are stored. With fp32 the arithmetic is float32 too; with the others it is what
the engine takes by itself. Ours is always walked in float32, so with int8 it reads another target than the one that wrote the text.

Knows OpenVINO's environment and options; runs nothing of it itself (openvino_child.py does). Named run_openvino.py, since a file
openvino.py beside the child would be what the child imports as openvino.
"""

from __future__ import annotations

from dataclasses import replace

from harness import HERE, compare, exported, make_job, options, report, run_child

from eyas.bench.environments import OPENVINO, environment, workplace


def main() -> None:
    chosen = options(__doc__, ("fp32", "fp16", "int8")).parse_args()
    place, python = workplace("openvino"), environment("openvino", OPENVINO)
    draft = exported(chosen.draft, chosen.target, "openvino", place, "--python", str(python), "--weights", chosen.precision)
    job = make_job(chosen, draft)
    result = run_child(python, HERE / "openvino_child.py", job, place, timeout=7200)
    report("openvino", chosen, job, result, compare(replace(job, precision="fp32"), result, chosen.draft))


if __name__ == "__main__":
    main()
