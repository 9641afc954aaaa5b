"""Ours against other engines on the same weights, prompts and threads, taking turns: `eyas bench --peers`.

Every contestant is a process in its own environment (environments.py) that loads once (peer_worker.py). All but the one whose turn it is
are stopped, so none takes another's cores. All get the same token ids; each prompt goes to all before the next one, in a rotating order.
Knows contestants, turns and tables; knows no engine's insides.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from eyas.bench import environments
from eyas.bench.prompts import PRACTICE, PromptItem
from eyas.config import EyasError
from eyas.decode.prompt import conversation_of
from eyas.files.chat_template import written
from eyas.files.target import target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.formats import openvino_target
from eyas.kernels.linear import capability
from eyas.view import pictures

WORKER = Path(__file__).with_name("peer_worker.py")
ROOM = 64  # positions behind the longest text
CHAINS = (2, 3)  # tokens that engines draft in a row, where they draft chains
OURS, PLAIN_BF16, PLAIN_INT8, PLAIN_Q4 = "eyas int8 eagle3+copy", "eyas bf16 plain", "eyas int8 plain", "eyas q4 plain"
LLAMA = "llama.cpp Q4_1 plain"
PAIRS = (  # ratios that the table ends with: (first over second)
    ("eyas bf16 eagle3+copy", PLAIN_BF16),
    (OURS, PLAIN_INT8),
    ("eyas q4 eagle3+copy", PLAIN_Q4),
    (OURS, LLAMA),
    (PLAIN_INT8, LLAMA),
    (PLAIN_Q4, LLAMA),
    (PLAIN_INT8, "OpenVINO int8 plain"),
    (PLAIN_BF16, "OpenVINO fp16 plain"),
    (PLAIN_BF16, "transformers bf16 plain"),
    (PLAIN_BF16, "vLLM bf16 plain"),
)


@dataclass
class Contestant:
    name: str
    engine: str
    python: Path
    weights: Sequence[Path | float]  # the target's files that hold its weights, or bits a weight
    job: dict[str, Any]
    environ: dict[str, str] = field(default_factory=dict)


# ---- who takes part ----


def ours(shared: dict[str, Any], draft: str, practice: list[list[int]]) -> list[Contestant]:
    bits = {"bf16": 16.0, "int8": 8.5, "q4": 5.0}  # layers' weights with their scales
    found = []
    for precision, size in bits.items():
        for method in ("plain", "eagle3+copy"):
            job = shared | {"draft": draft, "precision": precision, "method": method, "practice": practice}
            found.append(Contestant(f"eyas {precision} {method}", "eyas", Path(sys.executable), [size], job))
    return found


def transformers(shared: dict[str, Any]) -> list[Contestant]:
    files, python = sorted(Path(shared["target"]).glob("*.safetensors")), Path(sys.executable)
    job = shared | {"dtype": "bfloat16"}
    return [
        Contestant("transformers bf16 plain", "transformers", python, files, job),
        Contestant("transformers bf16 look-up", "transformers", python, files, job | {"more": {"prompt_lookup_num_tokens": 5}}),
    ]


def vllm(shared: dict[str, Any], draft: Path) -> list[Contestant]:
    python, files = environments.environment("vllm", environments.VLLM), sorted(Path(shared["target"]).glob("*.safetensors"))
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    job = shared | {"dtype": "bfloat16", "more": {"enforce_eager": True}}
    speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": CHAINS[0]}
    return [
        Contestant("vLLM bf16 plain", "vllm", python, files, job, environ),
        Contestant(f"vLLM bf16 eagle3 chain:{CHAINS[0]}", "vllm", python, files, job | {"speculative": speculative}, environ),
    ]


def openvino(shared: dict[str, Any], export: Callable[..., Path]) -> list[Contestant]:
    python, place = environments.environment("openvino", environments.OPENVINO), environments.workplace("openvino")
    found = []
    for precision in ("fp16", "int8"):
        command = [str(python), "-I", str(openvino_target.__file__), shared["target"], precision, str(place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise EyasError("OpenVINO's exporter failed; what it said stands above")
        target = Path(done.stdout.splitlines()[-1])
        job = shared | {"target": str(target)}
        weights = [target / "openvino_model.bin"]
        found.append(Contestant(f"OpenVINO {precision} plain", "openvino", python, weights, job))
        if precision == "int8":
            draft = export("openvino", "--python", str(python), "--weights", precision)
            more = {"draft": str(draft), "drafted": CHAINS[0]}
            found.append(Contestant(f"OpenVINO int8 eagle3 chain:{CHAINS[0]}", "openvino", python, weights, job | more))
            found.append(Contestant("OpenVINO int8 look-up", "openvino", python, weights, job | {"lookup": True, "drafted": 5}))
    return found


def llama_cpp(shared: dict[str, Any], export: Callable[..., Path], directory: Path, embedded: bool) -> list[Contestant]:
    server = environments.llama_cpp() / "build" / "bin" / "llama-server"
    draft = export("llama_cpp", "--weights", "bf16") / "draft.gguf"
    targets = {"Q8_0": environments.llama_cpp_target(directory, "q8_0")}
    if embedded:
        targets = {"Q4_1": environments.published_target(), **targets}
    found = []
    for name, target in targets.items():
        job = shared | {"server": str(server), "target": str(target)}
        chain = ["-md", str(draft), "-td", str(shared["threads"]), "--spec-type", "draft-eagle3", "--spec-draft-n-max"]
        ways = {"plain": []} | {f"eagle3 chain:{drafted}": [*chain, str(drafted)] for drafted in CHAINS}
        ways["look-up"] = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "8"]
        for way, more in ways.items() if name != "Q8_0" else [("plain", [])]:
            found.append(Contestant(f"llama.cpp {name} {way}", "llama_cpp", Path(sys.executable), [target], job | {"more": more}))
    return found


def contestants(target: str | None, draft: str | None, prompts: list[list[int]], tokens: int, threads: int) -> list[Contestant]:
    """Everything that can take part in the race. Environments are made on first use (llama.cpp's build and downloads take their time)."""
    directory = target_directory(target)
    tokenizer, config = load_tokenizer(directory), target_config(directory)
    practice = [token_ids(tokenizer, text) for text in PRACTICE]
    context = max(map(len, prompts)) + tokens + ROOM
    shared = {"target": str(directory), "end_ids": list(config.eos_token_ids), "threads": threads, "context": context}

    def export(layout: str, *more: str) -> Path:
        out = environments.workplace("peers") / f"draft-{layout}"
        command = [sys.executable, "-m", "eyas", "export", draft or "bundled", str(out), "--to", layout, "--force", *more]
        if subprocess.run([*command, *(["--target", target] if target else [])], stdout=sys.stderr).returncode:
            raise EyasError(f"the draft could not be exported to {layout}; what was said stands above")
        return out

    found = ours(shared, draft or "bundled", practice) + transformers(shared) + vllm(shared, export("vllm"))
    return found + openvino(shared, export) + llama_cpp(shared, export, directory, target is None)


def token_ids(tokenizer: Any, prompt: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = written(tokenizer, conversation_of(tokenizer, messages, None, variables), prompt=True).text
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- the race ----


class Runner:
    """A contestant's process, stopped while it is not asked."""

    def __init__(self, who: Contestant, threads: int, log: Path) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environ |= {"OMP_NUM_THREADS": str(threads), **who.environ}
        self.who, self.log = who, log
        with open(log, "w") as out:
            command = [str(who.python), "-I", str(WORKER), json.dumps({"engine": who.engine, **who.job})]
            self.process = subprocess.Popen(
                command, text=True, env=environ, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out
            )
        self.version = self.said()["version"]
        self.pause()

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EyasError(f"{self.who.name} ended; the end of {self.log}: {self.log.read_text(errors='replace')[-300:]!r}")
        return json.loads(line)

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps({"prompt": prompt, "max_tokens": tokens}), file=self.process.stdin, flush=True)
        try:
            return self.said()
        finally:
            self.pause()

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def race(
    all_of: Sequence[Contestant], prompts: Sequence[list[int]], tokens: int, threads: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """{"contestants": {name: {version, bits_a_weight, tokens, seconds}}, "left_out": {name: why}}; answers by prompt."""
    place, runners, left_out = environments.workplace("peers"), [], {}
    try:
        for who in all_of:
            report(f"loading {who.name}")
            try:
                runners.append(Runner(who, threads, place / f"{who.name.replace(' ', '-').replace(':', '-')}.log"))
                runners[-1].ask(prompts[0], 16)  # the first answer of a process is slow
            except EyasError as error:
                left_out[who.name] = str(error)
        found = {each.who.name: {"version": each.version, "bits_a_weight": None, "tokens": [], "seconds": []} for each in runners}
        for number, prompt in enumerate(prompts):
            first = number % len(runners)
            for runner in runners[first:] + runners[:first]:
                report(f"prompt {number + 1} of {len(prompts)}: {runner.who.name}")
                told = runner.ask(prompt, tokens)
                found[runner.who.name]["tokens"].append(told["tokens"])
                found[runner.who.name]["seconds"].append(told["seconds"])
        return {"contestants": found, "left_out": left_out}
    finally:
        for runner in runners:
            runner.end()


def bits_a_weight(who: Contestant, weights: int) -> float:
    known = [each for each in who.weights if isinstance(each, float)]
    return known[0] if known else round(8 * sum(file.stat().st_size for file in who.weights if isinstance(file, Path)) / weights, 1)


def run_peers(
    target: str | None,
    draft: str | None,
    source: str,
    items: Sequence[PromptItem],
    tokens: int,
    threads: int,
    report: Callable[[str], None],
    variables: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The race's result with its conditions, figures and ratios."""
    directory = target_directory(target)
    tokenizer = load_tokenizer(directory)
    prompts = [token_ids(tokenizer, item.prompt, variables) for item in items]
    report("making environments and converting")
    all_of = contestants(target, draft, prompts, tokens, threads)
    result = race(all_of, prompts, tokens, threads, report)
    config = target_config(directory)
    weights = count_weights(config)
    for who in all_of:
        if who.name in result["contestants"]:
            result["contestants"][who.name]["bits_a_weight"] = bits_a_weight(who, weights)
    conditions = {
        "target": directory.name,
        "draft": draft or "bundled",
        "prompts": len(prompts),
        "max_new_tokens": tokens,
        "temperature": 0,
        **({"chat_template_kwargs": dict(variables)} if variables else {}),
    }
    conditions |= {"threads": threads, "machine": f"{platform.machine()} {capability()}", "cores": os.cpu_count()}
    conditions |= {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    return {"conditions": conditions, **figures(result), "left_out": result["left_out"], "answers": result["contestants"]}


def count_weights(config: Any) -> int:
    """The number of weights in a target's matrices; an embedding that is the head too counts once."""
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens a second, texts that equal our bf16 greedy ones, and the ratios of PAIRS, with quartiles over prompts."""
    found: Mapping[str, Any] = result["contestants"]
    rates = {
        name: [len(text) / seconds for text, seconds in zip(each["tokens"], each["seconds"], strict=True)] for name, each in found.items()
    }
    reference = found[PLAIN_BF16]["tokens"]
    rows = {
        name: {
            "bits_a_weight": each["bits_a_weight"],
            "tokens_per_second": spread(rates[name]),
            "texts_equal_bf16": sum(a == b for a, b in zip(each["tokens"], reference, strict=True)),
            "version": each["version"],
        }
        for name, each in found.items()
    }
    ratios = {f"{a} / {b}": spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in PAIRS if a in rates and b in rates}
    return {"rows": rows, "ratios": ratios}


def spread(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [round(middle, 2), round(low, 2), round(high, 2)]


def table_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Print a line for each contestant, the fastest first."""
    count = result["conditions"]["prompts"]
    for name, row in sorted(result["rows"].items(), key=lambda item: -item[1]["tokens_per_second"][0]):
        middle, low, high = row["tokens_per_second"]
        yield [
            name,
            f"{row['bits_a_weight']:g}",
            f"{middle:.0f} [{low:.0f}, {high:.0f}]",
            f"{row['texts_equal_bf16']} of {count}",
            row["version"],
        ]


def save_picture(result: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens a second, ours in another colour. Needs matplotlib."""
    pyplot = pictures.pyplot()
    rows = sorted(result["rows"].items(), key=lambda item: item[1]["tokens_per_second"][0])
    names, values = [name for name, _ in rows], [row["tokens_per_second"] for _, row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1))
    middles = [value[0] for value in values]
    spans = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
    axes.barh(names, middles, xerr=spans, color=["#c8553d" if name.startswith("eyas") else "#8fa3ad" for name in names], ecolor="#555555")
    axes.set_xlabel("tokens a second, one request, greedy (median and quartiles over prompts)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
