"""From a request's fields to sequences: the prompt through the template, the settings of the draws, what fits.

Knows the engine and the table's values; knows nothing of HTTP, of threads or of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from eyas.config import VERIFIERS, EyasError, Request, Sampling, TreeShape, short
from eyas.decode.grammar import Grammar
from eyas.decode.plan.planner import MAX_TREE
from eyas.decode.prompt import ANSWER, MESSAGE, TURN, TooLong
from eyas.decode.sampling import derived_seed, new_seed
from eyas.decode.sequence import Sequence as Written
from eyas.decode.sequence import new_sequence
from eyas.engine import Engine
from eyas.files.chat_template import NotShown
from eyas.methods import parted
from eyas.serve.calls import Reader, reader_of
from eyas.serve.fields import CHAT, TEXT, is_whole
from eyas.serve.forms import Forms, form_of, must_call, offered
from eyas.serve.refusals import Refused

TEXT_TOKENS = 16  # tokens of a completion where nothing is said, as OpenAI has it
SEEDS = 1 << 64
MOST_CHILDREN = 16  # of a node, in a tree that a request asks for
OWN = ("tree", "method", "verifier", "trace")  # what the field `eyas` takes
WALK = VERIFIERS[0]
WORDS = {"max-new-tokens": "max_tokens", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p", "logit-bias": "logit_bias"}


@dataclass(frozen=True)
class Ask:
    """What a request asks for, ready to be decoded."""

    kind: str  # CHAT or TEXT
    sequences: list[Written]
    seed: int
    stream: bool
    usage: bool  # whether a stream tells counts at its end
    echo: list[str]  # for each choice what comes before its text
    unknown: list[str]  # fields that are not known
    reader: Callable[[], Reader] | None = None  # makes what looks for calls in an answer; None: no tool may be called
    grammars: list[Grammar] = field(default_factory=lambda: list[Grammar]())  # one for each sequence, where there is a form
    traced: bool = False  # whether its rounds are told with the answer


@dataclass(frozen=True)
class Usual:
    """What a server decodes with, where a request says nothing else."""

    method: str
    context: int  # tokens of a prompt and its answer
    tree: str = "auto"


def ask(engine: Engine, forms: Forms, kind: str, values: Mapping[str, Any], unknown: list[str], usual: Usual, owner: str = "") -> Ask:
    """What these values ask for. `forms`: compiles them; `owner`: who asks. Raises `Refused`."""
    usage = stream_options(values)
    check_served(kind, values, unknown)
    form = form_of(kind, values)
    matcher = forms.matcher(form) if form else None
    seed = new_seed() if values["seed"] is None else values["seed"] % SEEDS
    request = request_of(kind, values, usual)
    prompts = prompts_of(engine, kind, values, request)
    shape = shape_of(engine, request, usual)
    sequences, echo, grammars = list[Written](), list[str](), list[Grammar]()
    many = len(prompts) * values["n"] > 1
    tells_prompt = kind == TEXT and values["echo"] and values["logprobs"] is not None
    for prompt, told in prompts:
        settings = replace(request, max_new_tokens=limit(values, kind, len(prompt), usual.context))
        for _ in range(values["n"]):
            number = len(sequences)
            drawn = derived_seed(seed, number) if many and number else seed
            sequence = new_sequence(prompt, settings, shape, drawn, engine.target.config, engine.tokenizer, number)
            sequence.tells_prompt, sequence.owner = tells_prompt, owner
            sequence.reuses = values["cache_prompt"] and not tells_prompt  # rows that are not read tell nothing
            if matcher is not None:
                grammars.append(Grammar(matcher.deep_copy(), len(prompt), forms.ends))
                sequence.processors += (grammars[-1],)
            sequences.append(sequence)
            echo.append(told)
    reader = None
    if kind == CHAT and offered(values):
        written = engine.tokenizer.decode(prompts[0][0])
        reader = partial(reader_of, engine.tokenizer, offered(values), must_call(values), written)
    traced = (values["eyas"] or {}).get("trace", False)
    return Ask(kind, sequences, seed, values["stream"], usage, echo, unknown, reader, grammars, traced)


def shape_of(engine: Engine, request: Request, usual: Usual) -> TreeShape:
    """The largest tree of a round. Raises `Refused` for one that is none, or larger than the server has room for."""
    try:
        shape = engine.shape(request.tree, request.method or usual.method)
    except EyasError as error:
        raise Refused(str(error), "eyas") from None
    if request.tree == usual.tree:
        return shape
    if shape.nodes > MAX_TREE.nodes or shape.depth > MAX_TREE.depth or shape.top_k > MOST_CHILDREN:
        most = f"{MAX_TREE.nodes} nodes, {MAX_TREE.depth} levels and {MOST_CHILDREN} children"
        raise Refused(f"tree {request.tree} has {shape.nodes} nodes, {shape.depth} levels; this server has room for {most}", "eyas")
    return shape


def stream_options(values: Mapping[str, Any]) -> bool:
    given = values["stream_options"]
    if given is None:
        return False
    if not values["stream"]:
        raise Refused("stream_options are for a stream; set stream, or leave them out", "stream_options")
    usage = given.get("include_usage", False)
    if not isinstance(usage, bool):
        raise Refused("stream_options.include_usage must be true or false", "stream_options")
    return usage


def check_served(kind: str, values: Mapping[str, Any], unknown: Sequence[str] = ()) -> None:
    """Raise `Refused` for known fields whose values ask for something that is not served, or that do not go together."""
    if kind == CHAT:
        check_choice(values)
        if values["messages"] is None:
            instead = "; prompt is for /v1/completions" if "prompt" in unknown else ""
            raise Refused(f"messages is missing: the conversation so far{instead}", "messages")
        if values["top_logprobs"] and not values["logprobs"]:
            raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    else:
        if values["prompt"] is None:
            instead = "; messages are for /v1/chat/completions" if "messages" in unknown else ""
            raise Refused(f"prompt is missing: the text to go on with{instead}", "prompt")
        if values["best_of"] not in (None, values["n"]):
            raise Refused("best_of is not served but as n", "best_of")


def check_choice(values: Mapping[str, Any]) -> None:
    """Raise `Refused` for a choice among tools that there are not."""
    choice, names = values["tool_choice"], [tool["function"]["name"] for tool in values["tools"] or []]
    if choice == "required" and not names:
        raise Refused("tool_choice required needs tools", "tool_choice")
    if isinstance(choice, dict) and (missing := [name for name in choice["names"] if name not in names]):
        raise Refused(f"tool_choice names {short(missing[0])}, and there is no such tool", "tool_choice")


def check_own(own: Mapping[str, Any], method: str) -> None:
    """Raise `Refused` for what a request may not ask of eyas itself."""
    if unknown := [name for name in own if name not in OWN]:
        raise Refused(f"eyas has no {unknown[0]}; it takes {', '.join(OWN)}", "eyas")
    if own.get("method") not in (None, "plain", method, parted(method)[0]):
        raise Refused(f"this server decodes with {method}; eyas.method may be that or plain", "eyas")
    if own.get("verifier") not in (None, WALK):
        raise Refused(f"guesses are verified by the {WALK} here, under which none can change the text; leave eyas.verifier out", "eyas")
    if not isinstance(own.get("trace", False), bool):
        raise Refused("eyas.trace must be true or false", "eyas")


def request_of(kind: str, values: Mapping[str, Any], usual: Usual) -> Request:
    own, method = values["eyas"] or {}, usual.method
    check_own(own, method)
    logprobs = (values["top_logprobs"] if values["logprobs"] else None) if kind == CHAT else values["logprobs"]
    try:
        return Request(
            method=own.get("method") or method,
            tree=own.get("tree", usual.tree),
            sampling=Sampling(
                temperature=values["temperature"],
                top_k=max(values["top_k"], 0),
                top_p=values["top_p"],
                min_p=values["min_p"],
                repetition_penalty=values["repetition_penalty"],
                presence_penalty=values["presence_penalty"],
                frequency_penalty=values["frequency_penalty"],
                logit_bias=tuple((values["logit_bias"] or {}).items()),
            ),
            min_new_tokens=values["min_tokens"],
            stop=values["stop"],
            stop_token_ids=values["stop_token_ids"],
            ignore_eos=values["ignore_eos"],
            logprobs=logprobs,
            raw=kind != CHAT,
            tools=(offered(values) or None) if kind == CHAT else None,
            chat_template_kwargs=values.get("chat_template_kwargs"),
        )
    except EyasError as error:
        raise Refused(str(error), next((field for word, field in WORDS.items() if word in str(error)), None)) from None


def prompts_of(engine: Engine, kind: str, values: Mapping[str, Any], request: Request) -> list[tuple[list[int], str]]:
    """For each prompt its tokens, and the text of it that the answer repeats."""
    config = engine.target.config
    for name, tokens in (("stop_token_ids", request.stop_token_ids), ("logit_bias", [token for token, _ in request.sampling.logit_bias])):
        if outside := [token for token in tokens if token >= config.vocab_size]:
            raise Refused(f"{name}: {outside[0]} is no token of this model, which has {config.vocab_size}", name)
    given: Sequence[Any] = [values["messages"]] if kind == CHAT else values["prompt"]
    found = []
    for each in given:
        try:
            tokens = encoded(engine, each, request, kind == CHAT and must_call(values), ends_of(values) if kind == CHAT else ANSWER)
        except TooLong as error:
            raise too_long(error.tokens, error.context) from None
        except Refused:
            raise
        except EyasError as error:
            raise Refused(str(error), "messages" if kind == CHAT else "prompt") from None
        written = isinstance(each, list) and all(map(is_whole, each))
        text = (engine.tokenizer.decode(each) if written else each) if kind != CHAT and values["echo"] else ""
        found.append((tokens, text))
    return found


def ends_of(values: Mapping[str, Any]) -> str:
    """Where a conversation is cut off. Raises `Refused` for two places at once."""
    begins, goes_on = values["add_generation_prompt"], values["continue_final_message"]
    if begins and goes_on:
        words = "continue_final_message goes on with the last message, add_generation_prompt begins another; leave one out"
        raise Refused(words, "continue_final_message")
    return MESSAGE if goes_on else ANSWER if begins is not False else TURN


def encoded(engine: Engine, prompt: Any, request: Request, must: bool, ends: str) -> list[int]:
    """A prompt's tokens. A template that shows no tools is none for them, but where a call is forced (`must`)."""
    try:
        return engine.encode(prompt, request.raw, request.tools, request.chat_template_kwargs, ends)
    except NotShown as error:
        if not request.tools or not str(error).endswith("show tools"):
            raise
    if not must:
        raise Refused("this model's chat template knows no tools; set tool_choice to required, or leave them out", "tools")
    return engine.encode(prompt, request.raw, None, request.chat_template_kwargs, ends)


def limit(values: Mapping[str, Any], kind: str, prompt: int, context: int) -> int:
    """Tokens of the answer: what is asked for, or what fits."""
    fits = context - prompt
    name = "max_completion_tokens" if values.get("max_completion_tokens") is not None else "max_tokens"
    wanted = values.get(name)
    if wanted is None:
        wanted = -1 if kind == CHAT else TEXT_TOKENS
    if wanted == 0 and not (kind == TEXT and values["echo"]):
        raise Refused(f"{name} must be at least 1, or -1 for what fits; 0 is for /v1/completions with echo", name)
    if fits < (wanted != 0):
        raise too_long(prompt, context)
    if values["min_tokens"] > wanted >= 0:
        raise Refused(f"min_tokens {values['min_tokens']} is more than {name} {wanted}", "min_tokens")
    return fits if wanted < 0 else min(wanted, fits)


def too_long(tokens: int, context: int) -> Refused:
    words = f"the prompt has {tokens} tokens, and this server takes {context} with the answer; shorten it"
    told = {"n_prompt_tokens": tokens, "n_ctx": context}
    return Refused(words, "messages", kind="exceed_context_size_error", code="context_length_exceeded", more=told)
