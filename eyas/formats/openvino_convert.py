"""Convert a draft to OpenVINO's form, by optimum-intel: a script for the Python of an environment that has it, which eyas's own has not.

    python openvino_convert.py DRAFT_DIR OUT_DIR --taps 1,14,26 [--weights fp32|fp16|int8] [--check OUTPUTS.npz]

DRAFT_DIR holds a draft in the plain layout (`fc`, `midlayer.*`, `norm`, `lm_head`, `d2t`, `t2d`, config.json) and the target's tokenizer
files. OUT_DIR, made or written over, becomes a directory that OpenVINO GenAI takes as draft_model: openvino_model.xml and .bin,
config.json, the tokenizer in both forms. TAPS are target layers whose *output* is read (one less than the layer whose input it is).
Imports nothing of eyas. Needs openvino, optimum-intel with its transformers, and nncf for int8.

The converted model
    inputs      input_ids [B, N] int64           tokens t_{j+1}
                hidden_states [B, N, 3H] float   the target's three features f_j side by side
                attention_mask [B, N so far] int64, position_ids [B, N] int64, beam_idx [B] int32
    outputs     logits [B, N, D]                 over the draft's vocabulary, in float
                d2t [D] int64                    a constant: target id less draft id
    state       one pair of key and value caches, empty after reset_state(); read and written by infer itself
    rt_info     eagle3_mode = True (the engine's sign that this is such a draft), hidden_layers_list = the taps. Without the second the
                engine takes outputs of layers 2, n // 2, n - 3: one layer later than the usual triple, silently.

What the engine then does to it, when it loads it (openvino.genai, speculative_decoding/eagle3_model_transforms.cpp): the embedding table
gives way to the target's, whatever it holds; `fc`, the MatMul that reads hidden_states, moves to the end of the target's pass; the sum
that ends `midlayer` becomes an output, and is what the next drafted token reads in place of a feature. So no norm can stand before fc, the
fed-back state is the one before the last norm, the residual is the bare feature, and nothing but three taps is possible.
"""

# What it imports is that environment's, and `openvino` not the module beside this one, as a checker here would think.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

WEIGHTS = ("fp32", "fp16", "int8")
UNREAD = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual", "attention_bias")  # true: the engine would draft wrongly
SEED, ROWS, FIRST_PASS = 7, 24, 16  # of the check: tokens in all, and in the first of two passes


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("draft", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--taps", required=True, help="three target layers whose output is read, as 1,14,26")
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32")
    parser.add_argument("--check", type=Path, metavar="OUTPUTS.npz", help="run what was written on seeded input and keep both")
    chosen = parser.parse_args()
    convert(chosen.draft, chosen.out, [int(tap) for tap in chosen.taps.split(",")], chosen.weights)
    if chosen.check:
        check(chosen.out, chosen.check)


# ---- converting ----


def convert(draft: Path, out: Path, taps: list[int], weights: str = "fp32") -> None:
    """Write `out` from the plain layout in `draft`."""
    from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
    from optimum.intel import OVConfig
    from transformers import AutoTokenizer

    if len(set(taps)) != 3 or sorted(taps) != taps or taps[0] < 0:
        raise SystemExit(f"OpenVINO reads outputs of three different layers in ascending order, not {taps} (-1 would be the embedding)")
    tokenizer = AutoTokenizer.from_pretrained(draft)
    # not main_export: it loads this class as remote code, which asks for packages that the class does not use
    export_from_model(network(draft), out, "text-generation-with-past", OVConfig(dtype="fp32"), preprocessors=[tokenizer])
    export_tokenizer(tokenizer, out, task="text-generation-with-past")
    finish(out, taps, weights)


def network(draft: Path) -> Any:
    """optimum's torch model of a draft, in float32, with every weight of the files in it."""
    import torch
    from optimum.exporters.openvino.model_patcher import LlamaEagle3ForCausalLM
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    class Draft(LlamaEagle3ForCausalLM):
        """A class defined in this module: optimum takes the library's name from a class's module, and does not know its own."""

    config = LlamaConfig.from_pretrained(draft, architectures=["LlamaForCausalLMEagle3"], dtype=torch.float32)
    wrong = [key for key in UNREAD if getattr(config, key, False)]
    if getattr(config, "target_hidden_size", config.hidden_size) != config.hidden_size:
        wrong.append(f"target_hidden_size {config.target_hidden_size} beside hidden_size {config.hidden_size}")
    if wrong:
        raise SystemExit(
            f"OpenVINO cannot run this draft: its config.json says {', '.join(wrong)}, and the engine or its exporter has nothing like it"
        )
    model = Draft(config).eval()
    tensors = {}
    for file in sorted(draft.glob("*.safetensors")):
        tensors |= {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    own = model.state_dict()
    spare = {"model.embed_tokens.weight"}  # the engine puts the target's in its place
    if config.draft_vocab_size == config.vocab_size:
        spare |= {"model.d2t", "model.t2d"}
    odd = [f"missing {name}" for name in own.keys() - tensors.keys() - spare] + [f"unknown {name}" for name in tensors.keys() - own.keys()]
    if odd:
        raise SystemExit(f"draft {draft} is not in the plain layout: {', '.join(sorted(odd))}")
    torch.manual_seed(SEED)
    stand_in = {"model.embed_tokens.weight": torch.randn_like(own["model.embed_tokens.weight"])}  # so that the check sees its path too
    model.load_state_dict(own | stand_in | tensors)
    return model.float()


def finish(out: Path, taps: list[int], weights: str) -> None:
    """Say the taps in the model's own runtime information, and store the weights as asked."""
    import openvino

    model = openvino.Core().read_model(out / "openvino_model.xml")
    model.set_rt_info(taps, ["hidden_layers_list"])
    parts(model)
    if weights == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, out / "new.xml", compress_to_fp16=weights == "fp16")
    del model  # it has openvino_model.bin mapped
    for ending in ("bin", "xml"):
        os.replace(out / f"new.{ending}", out / f"openvino_model.{ending}")


# ---- checking ----


def parts(model: Any) -> tuple[Any, Any]:
    """The nodes that the engine will look for, found as it finds them: the embedding's Gather and the sum that ends the layer."""
    nodes = model.get_ordered_ops()
    gathers = [node for node in nodes if node.get_type_name() == "Gather" and "embed_tokens" in node.get_friendly_name()]
    sums = [node for node in nodes if node.get_type_name() == "Add" and "midlayer" in node.get_friendly_name() and ends_layer(node)]
    readers = [port.get_node() for port in model.input("hidden_states").get_node().output(0).get_target_inputs()]
    if not gathers or not sums or "MatMul" not in [node.get_type_name() for node in readers]:
        raise SystemExit(
            "the converted draft lacks what OpenVINO GenAI looks for; this optimum-intel is another than the one tried (2.2.0)"
        )
    return gathers[0], sums[0]


def ends_layer(node: Any) -> bool:
    """Whether this Add takes the MLP's output: a MatMul of a product."""
    second = node.input_value(1).get_node()
    return second.get_type_name() == "MatMul" and second.input_value(0).get_node().get_type_name() == "Multiply"


def check(out: Path, file: Path) -> None:
    """Run the draft in two passes, the second over the first one's cache, and write what went in and what came out, N rows in order:
    input_ids [N], position_ids [N], features [N, 3H], embeddings [N, H] (the rows that it looked up: the engine will look up the
    target's), and out of it hidden [N, H] (what is fed back), logits [N, D], d2t [D], hidden_layers_list [3]."""
    import numpy
    import openvino

    model = openvino.Core().read_model(out / "openvino_model.xml")
    gather, last = parts(model)
    names = ("embeddings", "hidden", "logits", "d2t")
    for node, name in ((gather, "embeddings"), (last, "hidden")):
        model.add_outputs(node.output(0)).pop().get_tensor().set_names({name})
    config = json.loads((out / "config.json").read_text())
    random = numpy.random.default_rng(SEED)
    width = model.input("hidden_states").get_partial_shape()[2]
    width = width.get_length() if width.is_static else 3 * config.get("target_hidden_size", config["hidden_size"])
    told: dict[str, Any] = {
        "input_ids": random.integers(0, config["vocab_size"], ROWS),
        "position_ids": numpy.arange(ROWS),
        "features": random.standard_normal((ROWS, width), numpy.float32),
    }
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    request = openvino.Core().compile_model(model, "CPU", exact).create_infer_request()
    passes = []
    for rows in (slice(0, FIRST_PASS), slice(FIRST_PASS, ROWS)):
        fed = {"input_ids": told["input_ids"][None, rows], "position_ids": told["position_ids"][None, rows]}
        fed |= {"hidden_states": told["features"][None, rows], "attention_mask": numpy.ones((1, rows.stop), numpy.int64)}
        results = request.infer(fed | {"beam_idx": numpy.zeros(1, numpy.int32)})
        passes.append({name: results[name].copy() for name in names})
    told |= {name: numpy.concatenate([one[name][0] for one in passes]) for name in names[:-1]}
    told["d2t"] = passes[0]["d2t"]
    told["hidden_layers_list"] = numpy.array([int(tap) for tap in model.get_rt_info(["hidden_layers_list"]).astype(str).split()])
    numpy.savez(file, **told)


if __name__ == "__main__":
    own = Path(__file__).resolve().parent  # a module openvino.py beside this one must not hide the package
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != own]
    main()
