"""What commands share: options into an engine and a request."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyas.commands.output import progress
from eyas.config import EyasError, Request, TreeShape, check_variables, short
from eyas.decode.grow import growth_named
from eyas.decode.plan.planner import MAX_TREE
from eyas.decode.prompt import prompt_message
from eyas.decode.rules import BLOCK
from eyas.decode.verifiers import check_shape, draws
from eyas.engine import BUNDLED, Engine, load, make_request, without_draft
from eyas.files.chat_data import VARIABLES, Conversation, tools_of, unread_keys
from eyas.files.embedded import LAYERS, VOCABULARY
from eyas.files.generation_config import FILE
from eyas.files.target import from_hub, load_target, target_directory
from eyas.methods import METHODS, copies, parted
from eyas.parallel.target import ShardedTarget

if TYPE_CHECKING:
    from torch import Tensor

    from eyas.formats.portable import TargetFiles
    from eyas.measure.agreement import Evidence


DRAFT_MODEL = "draft-model"
GIVEN = (  # options that are settings of the same name, where they were given
    "seed",
    "max_new_tokens",
    "min_new_tokens",
    "ignore_eos",
    "logprobs",
    "raw",
    "chat_template_kwargs",
    "verifier",
    "tree",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def settings_from(options: argparse.Namespace, method: str | None = None) -> dict[str, Any]:
    """The settings that options give, checked before anything heavy is loaded."""
    named = method_from(options)
    chosen = method or named
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise EyasError(f"max-new-tokens must be at least 1, not {options.max_new_tokens}")
    settings = {name: getattr(options, name, None) for name in GIVEN}
    settings |= {
        "method": chosen,
        "stop": options.stop,
        "stop_token_ids": options.stop_token_ids,
        "logit_bias": bias_from(options.logit_bias),
        "tools": tools_from(getattr(options, "tools", None)),
    }
    settings = {name: value for name, value in settings.items() if value is not None and value is not False and value != []}
    settings |= {} if options.copy is None else {"copy": options.copy}
    request = make_request(**settings)
    if not hasattr(options, "methods"):  # of several methods each has a tree and a verifier of its own
        check_request(request)
    return settings


def tools_from(path: str | None) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    found = json_of("--tools", Path(path))
    try:
        return tools_of(found)
    except EyasError as error:
        raise EyasError(f"--tools {path}: {error}") from None


def json_of(option: str, path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_bytes())
    except OSError as error:
        raise EyasError(f"{option} {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise EyasError(f"{option} {path} is not valid JSON ({error})") from None


def conversation_from(options: argparse.Namespace) -> Conversation:
    """The conversation of --messages with what stands beside it there, after the message of --system."""
    path = Path(options.messages)
    found = json_of("--messages", path)
    row = {"messages": found} if isinstance(found, list) else found
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise EyasError(f'{path} must hold a list of messages like [{{"role": "user", "content": "..."}}], or an object with "messages"')
    begun = [{"role": "system", "content": options.system}] if options.system else []
    try:
        turns = [prompt_message(turn, number) for number, turn in enumerate(row["messages"], start=1)]
        conversation = Conversation([*begun, *turns], tools_of(row.get("tools")))
        if (variables := row.get(VARIABLES)) is not None:
            check_variables(variables)
            conversation.variables = dict(variables)
    except EyasError as error:
        raise EyasError(f"{path}: {error}") from None
    if unread := unread_keys(row, {"messages", "tools", VARIABLES}):
        print(f"eyas: {path}: not read, give options instead: {', '.join(sorted(unread))}", file=sys.stderr)
    return conversation


def method_from(options: argparse.Namespace) -> str | None:
    """The method that options name, if any; where it contradicts others, `EyasError`."""
    named, plain = getattr(options, "method", None), getattr(options, "plain", False)
    if named is not None:
        parted(named)
    if plain and named not in (None, "plain"):
        raise EyasError(f"--plain is the same as --method plain, and --method {named} was given too; drop one of the two")
    method = "plain" if plain else named
    methods = {part.split("@")[0].split("+")[0].strip() for part in getattr(options, "methods", "").split(",")} | {method}
    if getattr(options, "draft_model", None) and DRAFT_MODEL not in methods:
        raise EyasError(f"--draft-model is what method {DRAFT_MODEL} guesses with; ask for that method, or drop --draft-model")
    return method


def check_request(request: Request) -> None:
    """Raise `EyasError` for what no round could do, as far as that is known before a draft is loaded."""
    if request.method is not None:
        copies(request.method, request.copy, draws(request.verifier, request.sampling))
    if request.method == "plain":
        return
    if request.tree == "auto":
        if request.verifier == "block":
            raise EyasError(BLOCK)
        if request.method is not None and not METHODS[parted(request.method)[0]].static:
            check_shape(request.verifier, MAX_TREE, request.sampling)
        return
    shape = request.tree.checked() if isinstance(request.tree, TreeShape) else TreeShape.parse(request.tree)
    if shape.growth:
        growth_named(shape.growth)
    check_shape(request.verifier, shape, request.sampling)


def bias_from(given: Sequence[str]) -> list[tuple[int, float]]:
    try:
        return [(int(token), float(value)) for token, value in (each.split("=") for each in given)]
    except ValueError:
        raise EyasError(f"--logit-bias takes ID=BIAS, a token id and a number, like 42=-100; not {' '.join(given)}") from None


def request_from(options: argparse.Namespace, method: str | None = None) -> Request:
    """The request that options give, without a model's own defaults."""
    return make_request(**settings_from(options, method))


def settled(engine: Engine, options: argparse.Namespace, method: str | None = None, quiet: bool = False) -> Request:
    """The request that options give, with the defaults of the target's generation_config.json where that is wanted; unless `quiet`, these
    are told in one line."""
    request = engine.request(**settings_from(options, method), generation_config=options.generation_config)
    if options.generation_config == "auto" and not quiet:
        used = ", ".join(f"{name} {value:g}" for name, value in request.defaulted)
        passed_over = ", ".join(f"{name} {short(value)}" for name, value in engine.generation_config.not_done.items())
        told = [used] * bool(used) + [f"not done here: {passed_over}"] * bool(passed_over)
        if told:
            print(f"[{FILE}: {'; '.join(told)}; --generation-config none passes over it]", file=sys.stderr)
    return request


def engine_from(options: argparse.Namespace) -> Engine:
    names = ("context_parallel", "shards", "peer_timeout")
    shared = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    if more := [f"--{name.replace('_', '-')}" for name in shared if name != names[0] and not shared[names[0]]]:
        raise EyasError(f"{' and '.join(more)} {'go' if len(more) > 1 else 'goes'} with --context-parallel; add it, or leave this out")
    engine = load(options.target, options.draft, options.device, options.precision, **shared)
    if getattr(options, "draft_model", None):
        engine.use_draft_model(load_target(target_directory(options.draft_model), options.precision, options.device or "cpu"))
    return engine


def sharing(engine: Engine) -> dict[str, Any]:
    """What a result says of keys that were shared out, under `context_parallel`; nothing without that option."""
    return {"context_parallel": engine.target.facts()} if isinstance(engine.target, ShardedTarget) else {}


def without_a_draft(engine: Engine, options: argparse.Namespace) -> str | None:
    """What to say where nobody asked for plain decoding and there is no draft for anything else."""
    if engine.default_method != "plain" or options.plain or options.method is not None:
        return None
    return "plain decoding: no draft for this target; give --draft, or train one with `eyas train`"


def target_for(source: str | None, draft: Path) -> TargetFiles:
    """The target named, else the embedded one where the draft was trained for it."""
    from eyas.files.untrusted import Fields
    from eyas.formats.portable import TargetFiles

    if source is None:
        fields = Fields.of(draft)
        if (fields.object("eyas").size("target_layers"), fields.size("vocab_size")) != (LAYERS, VOCABULARY):
            raise EyasError(f"{draft} was not trained for the embedded target; name its own with --target")
    return TargetFiles.of(source)


def evidence_of(target: TargetFiles, new_tokens: int, variables: Mapping[str, Any] | None = None) -> tuple[Evidence, Tensor]:
    """Texts that the target writes to some questions, with its states; and its embedding [V, H] in float32. `variables`: of the chat
    template."""
    from eyas.measure.agreement import QUESTIONS, gather

    engine = without_draft(target.directory, "fp32")
    raw = not getattr(engine.tokenizer, "chat_template", None)
    asked = [engine.encode(question, raw, None, variables) for question in QUESTIONS]
    with progress() as bar:
        task = bar.add_task("the target answers", total=len(asked) * new_tokens, unit="tokens at most")
        evidence = gather(engine.target, asked, new_tokens, lambda count: bar.update(task, completed=count))
    return evidence, engine.target.embedding.detach()


def draft_path(source: str) -> Path:
    """Where a draft of any layout lies: `bundled` (the one that comes with eyas), a directory, a .gguf file or a hub name."""
    path = BUNDLED if source == "bundled" else Path(source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or source.count("/") != 1 or source.startswith((".", "~")):
        raise EyasError(f"{path} does not exist; give a directory, a .gguf file or a hub name like owner/draft")
    return from_hub(source, ["*.json", "*.safetensors", "*.bin", "*.gguf"])
