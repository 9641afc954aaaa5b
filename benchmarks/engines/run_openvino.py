"""A draft in OpenVINO GenAI's EAGLE-3 pipeline on CPU: each round beside ours.

    python benchmarks/engines/run_openvino.py --prompts F.jsonl [--precision fp32|fp16|int8] [--tree chain:K|NODESxDEPTHxTOPK]

The precision says how the weights of target and draft are stored. With fp32 the arithmetic is float32 too; with the others it is what
the engine takes by itself. Ours is always walked in float32, so with int8 it reads another target than the one that wrote the text.

Knows OpenVINO's environment and options; runs nothing of it itself (openvino_child.py does). Named run_openvino.py, since a file
openvino.py beside the child would be what the child imports as openvino.
"""

from __future__ import annotations

from dataclasses import replace

from common import HERE, compare, environment, exported, make_job, options, report, run_child, workplace

PINS = ("openvino-genai==2026.4.1.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0", "optimum==2.3.0")
TORCH = ("transformers==5.5.4", "torch==2.13.0", "tokenizers==0.22.2", "huggingface-hub==1.21.0", "nncf==3.4.0", "numpy==2.4.6")
INSTALLS = (
    ("install", "--extra-index-url", "https://download.pytorch.org/whl/cpu", *PINS, *TORCH),
    ("uninstall", "-y", "torchvision"),  # a build that does not fit this torch breaks the import, and text needs none
)


def main() -> None:
    chosen = options(__doc__, ("fp32", "fp16", "int8")).parse_args()
    place, python = workplace("openvino"), environment("openvino", INSTALLS)
    draft = exported(chosen.draft, chosen.target, "openvino", place, "--python", str(python), "--weights", chosen.precision)
    job = make_job(chosen, draft)
    result = run_child(python, HERE / "openvino_child.py", job, place, timeout=7200)
    report("openvino", chosen, job, result, compare(replace(job, precision="fp32"), result, chosen.draft))


if __name__ == "__main__":
    main()
