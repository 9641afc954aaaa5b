"""Puts a target, its tokenizer and the drafters together: `eyas.load()`.

Knows where models lie and how a prompt becomes tokens; knows nothing of how a round works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from eyas.config import PLAIN, PRECISIONS, EyasError, Request, Sampling, TreeShape, cache_dir
from eyas.decode.drafter import Drafter
from eyas.decode.generate import Decoder, Result, Text, result_of
from eyas.decode.plan.planner import MOST, Planner
from eyas.decode.plan.store import PlanStore
from eyas.decode.sampling import derived_seed, new_seed
from eyas.files.chat_data import encodable
from eyas.files.target import check_device, load_target, prepared, target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.files.untrusted import Fields
from eyas.methods import METHODS, method_named, trained
from eyas.model.adapter import AdaptedTarget
from eyas.model.target import Target

DEFAULT = "eagle3"  # the kind of draft that is meant where none is named
BUNDLED = Path(__file__).parent / "bundled"

Messages = Sequence[dict[str, str]]
Prompt = str | Messages


def draft_directory(source: str | Path | None, target: Path) -> Path | None:
    """A draft's directory; without a name, the bundled one for the embedded target and none for others."""
    if source is None:
        embedded = target.parent == cache_dir() / "targets" and target.name.startswith("SmolLM2")
        return BUNDLED if embedded and (BUNDLED / "config.json").exists() else None
    if str(source) == "bundled":
        if not (BUNDLED / "config.json").exists():
            raise EyasError("this installation carries no bundled draft; train one with `eyas train --out DIR`")
        return BUNDLED
    path = Path(source).expanduser()
    if not (path / "config.json").exists():
        raise EyasError(f"draft {source} is not a directory with a config.json; give one that `eyas train` wrote, or `bundled`")
    return path


def kind_of(directory: Path) -> str:
    """The method whose draft a directory holds."""
    config = Fields.of(directory).raw
    own = config.get("eyas")
    said = own.get("method") if isinstance(own, dict) else None
    if said is not None and said not in trained():
        raise EyasError(f"{directory} is a draft for method {said!r}, which is not known here; there are {', '.join(trained())}")
    for name in trained():
        if said == name or (said is None and METHODS[name].decoding().reads(config, directory)):
            return name
    return DEFAULT  # whose loader says what is missing


def load(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str | None = None,
    precision: str = PRECISIONS[0],
) -> Engine:
    """Load a target (default: the embedded one) and its draft; see `Engine.generate`."""
    check_device(device or "cpu")
    directory = target_directory(target)
    drafted = draft_directory(draft, directory)
    if drafted:
        kind = METHODS[kind_of(drafted)].decoding()
        kind.check(drafted, target_config(directory))  # before the target's weights: a misfit is said at once
    model = load_target(directory, precision, device or "cpu")
    return Engine(model, load_tokenizer(directory), directory, drafted, precision)


def without_draft(directory: Path, precision: str) -> Engine:
    """The target alone, for those who bring a draft of their own."""
    return Engine(load_target(directory, precision), load_tokenizer(directory), directory, None, precision)


class Engine:
    """A loaded target with its drafters. `generate` returns finished results, `stream` yields text as it comes."""

    def __init__(self, target: Target | AdaptedTarget, tokenizer: Any, directory: Path, draft: Path | None, precision: str) -> None:
        # How each method's drafter is made: every call gets one of its own, so two streams of one engine do not mix.
        self.makers: dict[str, Callable[[], Drafter]] = {}
        self.network = None  # the draft's, where there is one
        if draft:
            kind = kind_of(draft)
            self.network, vocab = METHODS[kind].decoding().load(draft, target)
            self.network.prepare(16 if precision == "fp32" else 8)  # of 4 bits it would guess worse
            for name, method in METHODS.items():
                if method.draft == kind:
                    self.makers[name] = partial(method.decoding().drafter, self.network, vocab)
        self.target = prepared(target, precision)
        for name, method in METHODS.items():
            if method.draft is None:
                self.makers[name] = partial(method.decoding().alone, self.target)
        self.tokenizer, self.directory, self.draft, self.precision = tokenizer, directory, draft, precision
        self.watch: Callable[..., None] | None = None
        self.plans: PlanStore | None = None  # what planners learned, once one was wanted

    # ---- prompts ----

    def encode(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a string is one user turn (or plain text under `raw`), messages go through the chat template."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise EyasError("the prompt is empty; give some text")
            if raw:
                return self.checked(self.tokenizer(encodable(prompt, "the prompt"), verbose=False)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if raw:
            raise EyasError("raw mode continues plain text; give a string, not messages")
        if not prompt:
            raise EyasError("the prompt is empty; give at least one message")
        if not getattr(self.tokenizer, "chat_template", None):
            raise EyasError(f"{self.directory} has no chat template; use --raw to continue plain text")
        try:
            text = encodable(self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True), "the prompt")
        except TemplateError as error:  # a template may refuse a system turn, or roles that do not alternate
            raise EyasError(f"the chat template refuses this conversation ({error}); change its messages or use --raw") from None
        return self.checked(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # too long is said below, once

    def checked(self, ids: list[int]) -> list[int]:
        context = self.target.config.max_position_embeddings
        if len(ids) >= context:
            raise EyasError(f"the prompt has {len(ids)} tokens, the model reads at most {context}; shorten it")
        return ids

    # ---- methods and shapes ----

    def drafter(self, method: str) -> Drafter:
        """A new drafter of this method."""
        wanted = method_named(method).draft
        if method not in self.makers:
            how = "" if wanted == DEFAULT else f" --method {wanted}"
            other = f"{self.draft} is no {wanted} draft, which {method} needs"
            what = other if self.draft else f"no draft for {self.directory.name}"
            raise EyasError(f"{what}; name one with --draft, train one with `eyas train{how}`, or use --method plain")
        return self.makers[method]()

    def use_draft_model(self, model: Target | AdaptedTarget) -> None:
        """Let method draft-model use this smaller model (same vocabulary) instead of the target's first layers."""
        small = prepared(model, self.precision)
        self.makers["draft-model"] = lambda: METHODS["draft-model"].decoding().ModelDrafter(small, self.target.config.vocab_size)

    @property
    def default_method(self) -> str:
        """The first that the draft serves; plain where there is none."""
        return next((name for name in METHODS if METHODS[name].draft and name in self.makers), "plain")

    def shape(self, tree: str | TreeShape, method: str) -> TreeShape:
        """The largest tree a round may draw up; under `auto` a planner sizes each."""
        if method == "plain":
            return PLAIN
        if isinstance(tree, TreeShape):
            return tree
        if tree == "auto":
            return self.network.static_tree() if METHODS[method].static and self.network else MOST
        return TreeShape.parse(tree)

    def planner(self, tree: str | TreeShape, method: str, sampling: Sampling) -> Planner | None:
        """What sizes the trees of one call, where nobody named their shape. Prices are timed on first use."""
        if tree != "auto" or method == "plain" or METHODS[method].static:
            return None
        if self.plans is None:
            self.plans = PlanStore(self.target, self.directory, self.draft, self.precision)
        return self.plans.planner(method, sampling)

    # ---- generation ----

    def generate(self, prompt: Prompt | Sequence[Prompt], request: Request | None = None, **settings: Any) -> Result | list[Result]:
        """Generate for one prompt (a string or messages) or, for a list of prompts, for all together.

        Settings are `Request`'s fields and `Sampling`'s (temperature, top_k, top_p, min_p), or a finished `request`.
        """
        many = is_many(prompt)
        texts: list[Text] = []
        for texts in self.rounds(prompt, make_request(request, **settings)):  # noqa: B007 (the last is wanted)
            pass
        results = [result_of(text) for text in texts]
        return results if many else results[0]

    def stream(self, prompt: Prompt, request: Request | None = None, **settings: Any) -> Iterator[str | Result]:
        """Yield pieces of text as rounds commit them, then the `Result`."""
        request = make_request(request, **settings)
        if is_many(prompt):
            raise EyasError("stream takes one prompt; use generate for several")
        for texts in self.rounds(prompt, request):
            if piece := texts[0].stream.certain():
                yield piece
        yield result_of(texts[0])

    def rounds(self, prompt: Prompt | Sequence[Prompt], request: Request) -> Iterator[list[Text]]:
        """All texts after prefill and after each round.

        One prompt draws with the call's seed, prompt i of a list with a seed derived from it and i.
        """
        many = is_many(prompt)
        prompts: list[Prompt] = list(prompt) if many else [prompt]  # type: ignore[list-item]
        if request.max_new_tokens < 1:
            raise EyasError(f"max-new-tokens must be at least 1, not {request.max_new_tokens}")
        if request.batch is not None and request.batch < 1:
            raise EyasError(f"batch must be at least 1, not {request.batch}")
        method = request.method or self.default_method
        drafter = self.drafter(method)
        encoded = [self.encode(prompt, request.raw) for prompt in prompts]
        shape, planner = self.shape(request.tree, method), self.planner(request.tree, method, request.sampling)
        seed = new_seed() if request.seed is None else request.seed
        seeds = [derived_seed(seed, i) for i in range(len(prompts))] if many else [seed]
        decoder = Decoder(self.target, drafter, request.verifier, planner)
        decoder.watch = self.watch
        settings = (shape, request.sampling, seeds, request.max_new_tokens, self.tokenizer, request.stop, request.batch)
        yield from decoder.run(encoded, *settings)
        if planner:
            self.plans.save()


def is_many(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one string or one conversation."""
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], dict)


def make_request(request: Request | None = None, **settings: Any) -> Request:
    """The request itself, or one from loose settings, Sampling's fields among them; never both, since one would have to win."""
    if request is not None:
        if settings:
            raise EyasError(f"give a finished request or loose settings ({', '.join(settings)}), not both")
        return request
    if isinstance(settings.get("stop"), str):
        settings["stop"] = (settings["stop"],)
    own = {name: settings.pop(name) for name in list(settings) if name in Request.__dataclass_fields__}
    law = {name: settings.pop(name) for name in list(settings) if name in Sampling.__dataclass_fields__}
    if settings:
        raise EyasError(f"unknown setting {', '.join(settings)}; known are {', '.join(Request.__dataclass_fields__)} and Sampling's")
    if law and "sampling" in own:
        raise EyasError(f"give sampling= or {', '.join(law)}, not both")
    if law:
        own["sampling"] = Sampling(**law)
    return Request(**own)
