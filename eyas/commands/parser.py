"""Every command's own options, one function a command.

Knows options and their defaults (from config.py); imports nothing heavy, so `eyas --help` is quick.
"""

from __future__ import annotations

import argparse

from eyas.commands.options import (
    Parser,
    Version,
    add,
    apart,
    context_parallel,
    conversation,
    copy,
    disk,
    generation,
    known_methods,
    models,
    out_directory,
    plugin,
    seed_prompts,
    template_kwargs,
    writer,
)
from eyas.config import SELF_PLAY_TOKENS, TRAIN_MINUTES, TrainSettings
from eyas.methods import trained

LAYOUT_NAMES = "sglang, vllm, speculators, safeailab, safeailab-bin, llama_cpp or openvino"


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="eyas", description="EAGLE-3 speculative decoding: train, run, measure and understand a draft.")
    plugin(top, "first")
    top.add_argument("--version", action=Version, nargs=0, help="say which version is installed")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for options in (
        demo_options,
        generate_options,
        chat_options,
        new_draft_options,
        train_options,
        bench_options,
        compare_options,
        ablate_options,
        plan_options,
        trace_options,
        lesson_options,
        export_options,
        import_options,
        serve_options,
        serve_command_options,
        doctor_options,
        publish_options,
    ):
        options(commands)
    return top


def demo_options(commands: argparse._SubParsersAction) -> None:
    demo = add(commands, "demo", "one answer twice from the same weights, plain and with EAGLE-3")
    models(demo)
    copy(demo, "the draft alone")
    demo.add_argument("--prompt", default=None, help="ask this instead of the built-in question")
    template_kwargs(demo)
    demo.add_argument("--max-new-tokens", "--max-tokens", type=int, default=160, help="of the answer at most (default %(default)s)")
    demo.add_argument("--json", action="store_true", help="print one object: same_text, tau, ratio, tokens, copy")
    demo.add_argument("--svg", metavar="F.svg", help="save what was shown as a picture")


def generate_options(commands: argparse._SubParsersAction) -> None:
    generate = add(commands, "generate", "write one answer, streamed")
    generate.add_argument("prompt", nargs="?", help="a user's turn, or text to go on with under --raw")
    conversation(generate, "a conversation instead of PROMPT")
    generate.add_argument("--raw", action="store_true", help="continue plain text, no chat template")
    generate.add_argument("--prompt-ids", metavar="'ID ID ..'", help="the prompt as token ids instead of PROMPT")
    generation(generate, generation_config="auto")
    generate.add_argument("--n", type=int, metavar="N", help="write so many answers, each with a seed of its own")
    generate.add_argument("--logprobs", type=int, metavar="K", help="with --json: the log probability of each token and of the K likeliest")
    told = "text, tokens, tau, rounds, seconds, seed, finish_reason, method, copy, generation_config"
    generate.add_argument("--json", action="store_true", help=f"print one object (with --n one a line): {told}")


def chat_options(commands: argparse._SubParsersAction) -> None:
    chat = add(commands, "chat", "a conversation in the terminal")
    conversation(chat, "a conversation to go on with")
    generation(chat, generation_config="auto")


def new_draft_options(commands: argparse._SubParsersAction) -> None:
    new = add(
        commands, "new-draft", "a draft for a model in a given time: the model writes the data, what the draft accepts is measured and told"
    )
    new.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="directory, .gguf file or hub name (default: the embedded one)")
    new.add_argument("--target", dest="model", metavar="MODEL", help="the same, as other commands have it (default: the embedded target)")
    new.add_argument("--hours", type=float, required=True, help="for writing, training and measuring together")
    new.add_argument("--out", required=True, help="directory of the draft; the same command goes on there after a stop")
    seed_prompts(new)
    writer(new)
    apart(new)
    disk(new)
    template_kwargs(new)
    new.add_argument("--device", default="cpu", help="where the model writes and the draft trains: cpu (default) or cuda")
    new.add_argument("--dry-run", action="store_true", help="measure for a minute and say what the run would take and make")


def train_options(commands: argparse._SubParsersAction) -> None:
    train = add(commands, "train", "train a draft for a target, on text the target writes itself or on your conversations")
    train.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded target)")
    train.add_argument("--out", required=True, help="directory of the draft; checkpoints go there too")
    text_options(train)
    template_kwargs(train)
    train.add_argument("--tokens", type=int, help="stop after training on so many answer tokens")
    train.add_argument("--steps", type=int, help="stop after so many steps")
    train.add_argument(
        "--minutes", type=float, help=f"stop after so many minutes of training (default {TRAIN_MINUTES:g} if nothing else is given)"
    )
    train.add_argument("--method", default="eagle3", help=f"whose draft is trained: {', '.join(trained())} (default %(default)s)")
    train.add_argument(
        "--from", dest="start", metavar="DRAFT", help="begin with the weights and vocabulary of this draft, on the data named here"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument(
        "--taps",
        metavar="L,M,H",
        help="target layers whose inputs are the features, as many as you like (default 2, n//2, n-3; --from: its own)",
    )
    train.add_argument(
        "--draft-vocab",
        type=int,
        default=None,
        help=f"tokens the draft can say (default {TrainSettings.draft_vocab_size}; --from: its own)",
    )
    train.add_argument(
        "--unroll",
        type=int,
        help="steps of the training-time test (default 7; eagle1 trains one), heads of medusa (5) or modules of mtp (4)",
    )
    train.add_argument("--learning-rate", type=float, default=TrainSettings.learning_rate, help="(default %(default)s)")
    train.add_argument(
        "--seed", type=int, default=TrainSettings.seed, help="of the split, the order and what is drawn (default %(default)s)"
    )
    train.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of TrainSettings in config.py")
    train.add_argument("--device", default="cpu", help="where the draft trains: cpu (default) or cuda; under torchrun one process a device")
    train.add_argument(
        "--split-target",
        action="store_true",
        help="under torchrun: each process holds a share of the target's layers, for one too large for a device; it writes no text",
    )
    train.add_argument("--workers", type=int, default=None, help="single-thread workers (default: one a core; of a training on CUDA, one)")


def text_options(train: argparse.ArgumentParser) -> None:
    """What a draft is trained on."""
    train.add_argument("--data", metavar="F", help="train on these conversations (JSON Lines, JSON, gzip or parquet; docs/data.md)")
    train.add_argument(
        "--self-play",
        type=int,
        metavar="TOKENS",
        default=None,
        help=f"answer tokens for the target to write itself (default {SELF_PLAY_TOKENS})",
    )
    seed_prompts(train)
    train.add_argument("--regenerate", action="store_true", help="keep only --data's user turns: the target answers them anew")
    writer(train)
    apart(train)
    disk(train)
    train.add_argument(
        "--shards",
        metavar="DIR",
        nargs="+",
        action="extend",
        default=[],
        help="train on these folders of self-written shards too (or alone)",
    )
    train.add_argument(
        "--text",
        metavar="F",
        nargs="+",
        action="extend",
        default=[],
        help="train on these files of self-written text, made of shards by scripts/pack_text.py; the target reads them once more",
    )


def bench_options(commands: argparse._SubParsersAction) -> None:
    bench = add(commands, "bench", "compare methods on prompts, interleaved, with intervals")
    bench.add_argument("--prompts", required=True, metavar="F.jsonl", help="lines with turns, prompt, question or messages")
    bench.add_argument("--limit", type=int, help="only the first so many prompts")
    bench.add_argument(
        "--methods",
        default="plain,eagle3,eagle3+copy,lookup",
        metavar="METHOD[+copy][@TREE][+VERIFIER],..",
        help=f"{known_methods()}, each with copying, a tree or a verifier of its own if wanted: "
        "plain,eagle3@chain:3,eagle3+copy,eagle3@60x7x10+accept-reject (default %(default)s)",
    )
    bench.add_argument(
        "--peers",
        action="store_true",
        help="instead: ours beside transformers, vLLM, OpenVINO and llama.cpp on the same weights, each in an environment that is made on "
        "first use (minutes, gigabytes)",
    )
    bench.add_argument("--out", metavar="r.json", help="write the result there; with --peers and matplotlib also a picture")
    generation(bench, method=False, copies="where a method says +copy", new_tokens=200)


def compare_options(commands: argparse._SubParsersAction) -> None:
    compare = add(commands, "compare", "train every method of the line that leads to EAGLE-3 on the same text, and compare them")
    compare.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded SmolLM2-135M-Instruct)")
    compare.add_argument("--quick", action="store_true", help="twenty minutes: little text, short training, the methods alone")
    compare.add_argument(
        "--rows",
        metavar="NAME,..",
        help="only these, and plain: medusa, 'eagle3 without fusion', .. (default: all)",
    )
    copy(compare, "in row eagle3+copy alone")
    compare.add_argument("--prompts", metavar="F.jsonl", help="what to measure with (default: held-out questions of the target's own)")
    template_kwargs(compare)
    compare.add_argument("--out", metavar="r.json", help="write the result there, and with matplotlib a picture beside it")
    disk(compare)


def ablate_options(commands: argparse._SubParsersAction) -> None:
    ablate = add(commands, "ablate", "what a change of training brings: drafts trained alike on one text but for it, compared in minutes")
    ablate.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded SmolLM2-135M-Instruct)")
    ablate.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variant with one setting changed; repeatable")
    ablate.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME=VALUE ..'",
        help="a variant with several settings changed, divided by spaces: 'draft_layers=2 taps=1,5,9'; repeatable",
    )
    ablate.add_argument("--common", action="append", default=[], metavar="NAME=VALUE", help="a setting of every variant, the base included")
    ablate.add_argument("--method", default="eagle3", help=f"whose draft is trained: {', '.join(trained())} (default %(default)s)")
    ablate.add_argument("--taps", metavar="L,M,H", help="the base's (default 2, n//2, n-3)")
    ablate.add_argument("--minutes", type=float, help="of training for each draft (default 3 if nothing else is given)")
    ablate.add_argument("--steps", type=int, help="so many steps for each draft")
    ablate.add_argument("--tokens", type=int, help="so many answer tokens for each draft")
    ablate.add_argument("--seeds", type=int, default=1, help="drafts of each variant, with other seeds (default %(default)s)")
    ablate.add_argument("--data", metavar="F", help="train on these conversations (JSON Lines, JSON, gzip or parquet; docs/data.md)")
    ablate.add_argument(
        "--shards", metavar="DIR", nargs="+", action="extend", default=[], help="train on these folders of self-written shards"
    )
    ablate.add_argument("--self-play", type=int, metavar="TOKENS", help="answer tokens for the target to write itself (default 100000)")
    template_kwargs(ablate)
    ablate.add_argument("--device", default="cpu", help="where drafts train: cpu (default) or cuda")
    ablate.add_argument("--workers", type=int, default=None, help="single-thread workers (default: one a core)")
    ablate.add_argument("--out", metavar="r.json", help="write the result there, anew after each variant")
    ablate.set_defaults(regenerate=False, apart=[])
    disk(ablate)


def plan_options(commands: argparse._SubParsersAction) -> None:
    plan = add(commands, "plan", "what a pass costs here, and which trees pay for how many sequences")
    models(plan, tree=False)
    plan.add_argument("--method", default=None, help="any with planned trees (default: the draft's own)")
    copy(plan, "with every method that drafts")
    plan.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    template_kwargs(plan)
    plan.add_argument("--picture", metavar="F.png", help="draw prices and gains there (needs matplotlib)")


def trace_options(commands: argparse._SubParsersAction) -> None:
    trace = add(commands, "trace", "the rounds told step by step on what the model really writes")
    trace.add_argument("prompt", help="a user's turn, or text to go on with under --raw")
    trace.add_argument("--raw", action="store_true", help="continue plain text, no chat template")
    trace.add_argument("--rounds", type=int, help="how many rounds to tell (default 4; with --html all)")
    trace.add_argument("--html", metavar="F.html", help="write the rounds there instead, as a page to look at and go through")
    generation(trace, method=False, copies="the draft alone", new_tokens=48, two="; given twice: both on the same text, side by side")


def lesson_options(commands: argparse._SubParsersAction) -> None:
    lesson = add(
        commands, "lesson", "ttt: two drafts trained on one small text, with one unroll step and with seven; which guesses are right"
    )
    lesson.add_argument("lesson", choices=("ttt",), help="training-time test")
    lesson.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded SmolLM2-135M-Instruct)")
    lesson.add_argument(
        "--self-play",
        type=int,
        metavar="TOKENS",
        help="let the target write so many answer tokens (default: a text that is here, or 20000)",
    )
    lesson.add_argument("--tokens", type=int, help="answer tokens for each draft (default 60000 if nothing else is given)")
    lesson.add_argument("--minutes", type=float, help="of training for each draft: seven steps then read less text than one")
    lesson.add_argument("--steps", type=int, help="so many optimiser steps for each draft")
    lesson.add_argument("--taps", metavar="L,M,H", help="layers whose inputs the drafts read (default 2, n//2, n-3)")
    lesson.add_argument("--workers", type=int, default=None, help="single-thread workers (default: one a core)")
    lesson.add_argument("--plot", metavar="F.svg", help="draw it there (.png, .svg or .pdf)")
    disk(lesson)
    # what `ablate` lets a user choose, and a lesson does not
    lesson.set_defaults(method="eagle3", device="cpu", common=[], data=None, shards=[], regenerate=False, apart=[])


def export_options(commands: argparse._SubParsersAction) -> None:
    export = add(commands, "export", "write a draft in an engine's layout, read it back and compare")
    export.add_argument("draft", help="a draft of eyas's making, or `bundled`")
    out_directory(export)
    export.add_argument("--to", "--engine", required=True, metavar="LAYOUT", help=LAYOUT_NAMES)
    export.add_argument(
        "--target", help="its target: directory, .gguf file or hub name (default: the embedded one, where it is the target)"
    )
    export.add_argument(
        "--weights", "--precision", help="number format: bf16, fp16, fp32; for llama_cpp q8_0 and q4_1 too; for openvino int8 too"
    )
    export.add_argument("--force", action="store_true", help="replace what is there, when the new one is whole")
    export.add_argument("--chain", type=int, default=3, help="tokens drafted a round in the command printed (default %(default)s)")
    export.add_argument("--target-gguf", metavar="T.gguf", help="llama_cpp: take the tokenizer from the target's GGUF")
    export.add_argument("--python", help="openvino: the Python of an environment with optimum-intel (docs/engines.md)")


def import_options(commands: argparse._SubParsersAction) -> None:
    importing = add(commands, "import", "read a draft in any engine's layout, say what it is, and write it as eyas's own")
    importing.add_argument("source", help="directory, .gguf file or hub name")
    out_directory(importing)
    importing.add_argument("--target", help="its target; what its files leave open is then measured on text that the target writes")
    importing.add_argument("--target-layers", type=int, metavar="N", help="how many layers its target has, where that is not at hand")
    template_kwargs(importing)
    importing.add_argument("--unmeasured", action="store_true", help="believe the files")
    importing.add_argument("--dry-run", action="store_true", help="only say what it is")
    importing.add_argument("--force", action="store_true", help="replace what is there, when the new one is whole")


def serve_options(commands: argparse._SubParsersAction) -> None:
    serve = add(commands, "serve", "answer OpenAI's clients: chat and completions, many at a time (pip install 'eyas[serve]')")
    models(serve)
    context_parallel(serve)
    serve.add_argument("--method", default=None, help=f"{known_methods()} (default: the first of these that the draft serves)")
    serve.add_argument("--plain", action="store_true", help="the same as --method plain")
    copy(serve, "with every method that drafts")
    serve.add_argument("--draft-model", help="a smaller model for method draft-model (default: the target's first third)")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default %(default)s: this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="(default %(default)s; 0: any that is free)")
    serve.add_argument("--slots", type=int, default=8, help="answers that are written at a time (default %(default)s)")
    serve.add_argument("--queue", type=int, default=32, help="answers that may wait for a slot (default %(default)s); more are refused")
    serve.add_argument("--context", type=int, help="tokens of a prompt and its answer (default: the model's, at most 4096)")
    serve.add_argument(
        "--stall", type=float, default=0.1, metavar="S", help="seconds for which a long prompt may hold up others (default %(default)s)"
    )
    serve.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        help="keep what prompts left for others that begin alike (default: where that changes no bit)",
    )
    serve.add_argument("--share-prefixes", action="store_true", help="between API keys too")
    serve.add_argument("--api-key", action="append", default=[], metavar="KEY", help="what clients must send (also EYAS_API_KEYS=A,B)")
    serve.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help="what the model is called here")
    serve.add_argument("--any-model", action="store_true", help="answer whatever model a request names")
    serve.add_argument("--strict-fields", action="store_true", help="refuse requests with fields that are not known")
    cors = "an origin whose pages may use this server; localhost: pages of this machine"
    serve.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    serve.add_argument("--metrics-prefix", default="eyas", help="of the names at /metrics (default %(default)s; vllm for its dashboards)")
    traces = "a span for each request by OpenTelemetry, sent where OTEL_EXPORTER_OTLP_ENDPOINT says (needs eyas[otel])"
    serve.add_argument("--traces", action="store_true", help=traces)
    serve.add_argument("--drain", type=float, default=30, metavar="S", help="seconds that answers may take after SIGTERM (default 30)")
    serve.add_argument(
        "--hang-seconds", type=float, default=30, metavar="S", help="seconds without a round after which /health says so (default 30)"
    )


def serve_command_options(commands: argparse._SubParsersAction) -> None:
    serve = add(commands, "serve-command", "the command line that serves a draft in an engine, with the best number of draft tokens")
    serve.add_argument("draft", help="what `eyas export` wrote, or a draft of eyas's making")
    serve.add_argument("--engine", "--to", required=True, metavar="LAYOUT", help=LAYOUT_NAMES)
    serve.add_argument("--target", help="its target (default: the embedded one)")
    template_kwargs(serve)
    serve.add_argument("--cost", type=float, default=None, metavar="C", help="a draft step's time over a target pass's (default: 0.1)")


def doctor_options(commands: argparse._SubParsersAction) -> None:
    doctor = add(commands, "doctor", "why a draft accepts little: checks its files, measures it under each usual mistake")
    doctor.add_argument("draft", help="directory, .gguf file or hub name, in any layout; or `bundled`")
    doctor.add_argument("--target", help="its target (default: the embedded one)")
    doctor.add_argument("--engine-url", metavar="URL", help="a running OpenAI-compatible engine that serves this draft: compare acceptance")
    template_kwargs(doctor)
    doctor.add_argument(
        "--tokens",
        "--max-new-tokens",
        "--max-tokens",
        type=int,
        default=96,
        help="of each answer that is measured on (default %(default)s)",
    )
    doctor.add_argument("--json", action="store_true", help="print one object")


def publish_options(commands: argparse._SubParsersAction) -> None:
    publish = add(commands, "publish", "a folder ready for the hub: the draft as engines read it, its model card, its provenance")
    publish.add_argument("draft", help="a draft of eyas's making, or `bundled`")
    out_directory(publish)
    publish.add_argument("--target", help="its target (default: the embedded one)")
    publish.add_argument("--target-name", help="the target's name on the hub, as users will type it")
    publish.add_argument("--licence", help="licence of the draft, which must allow for the target's (default: what the target's card says)")
    publish.add_argument("--bench", metavar="r.json", action="append", default=[], help="results of `eyas bench` to put into the card")
    publish.add_argument("--dry-run", action="store_true", help="say what the folder would hold")
    publish.add_argument("--force", action="store_true", help="replace what is there, when the new one is whole")
