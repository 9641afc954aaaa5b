"""Puts a target, its tokenizer and its drafters together: `eyas.load()` and the `Engine` it returns.

Knows where models lie and how a prompt becomes tokens; knows nothing of how a round works.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as AnySequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from eyas.checks import is_number, within_memory
from eyas.config import PLAIN, PRECISIONS, EyasError, Request, Sampling, Settings, TreeShape, cache_dir, short
from eyas.decode.drafter import Drafter
from eyas.decode.generate import Decoder
from eyas.decode.grow import growth_named
from eyas.decode.kept import Kept
from eyas.decode.logprobs import Piece
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.store import PlanStore
from eyas.decode.prompt import ANSWER, Prompt, Prompts, TooLong, WrittenPrompt, checked_ids, is_many, is_token_ids, render
from eyas.decode.sampling import derived_seed, new_seed
from eyas.decode.sequence import Result, RoundRecord, Sequence, new_sequence, result_of
from eyas.decode.verifiers import VERIFY, check_shape, draws
from eyas.drafters.copying import CopyingDrafter
from eyas.files.generation_config import GenerationConfig, generation_config
from eyas.files.target import check_device, load_target, prepared, target_config, target_directory
from eyas.files.tokenizer import check_known, load_tokenizer
from eyas.files.untrusted import Fields
from eyas.methods import COPY, METHODS, copies, parted, trained
from eyas.model.protocols import TargetModel
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers, check_timeout, place_of
from eyas.parallel.start import begin

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from eyas.model.protocols import StaticDraft

DEFAULT = "eagle3"  # the method a draft is taken for where its files name none
BUNDLED = Path(__file__).parent / "bundled"

SMALLER = "use a smaller batch, tree or context, or precision='int8' or 'q4'"  # where memory is wanting

Watch = Callable[[RoundRecord], None]


def draft_directory(source: str | Path | None, target: Path) -> Path | None:
    """The directory of the draft `source` names. None: the bundled draft for the embedded target, no draft for any other. Raises
    `EyasError` where it holds no config.json."""
    if not isinstance(source, str | Path | None):  # pyright: ignore[reportUnnecessaryIsInstance]  (a program may say anything)
        raise EyasError(f"a draft is a directory or `bundled`, not {short(source)}")
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
    """The name of the method whose draft a directory holds. Raises `EyasError` for a method that is not registered."""
    fields = Fields.of(directory)
    config, own = fields.raw, fields.raw.get("eyas")
    said = fields.object("eyas").raw.get("method") if isinstance(own, dict) else None
    if said is not None and said not in trained():
        raise EyasError(f"{directory} is a draft for method {said!r}, which is not known here; there are {', '.join(trained())}")
    for name in trained():
        if said == name or (said is None and METHODS[name].decoding().reads(dict(config), directory)):
            return name
    return DEFAULT  # its loader says what is missing


def load(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str | None = None,
    precision: str = PRECISIONS[0],
    *,
    context_parallel: bool = False,
    shards: int = Layout.shards,
    peer_timeout: float = 60.0,
) -> Engine:
    """Load a target and its draft, ready to generate.

    `target`: a Hugging Face directory (or a LoRA adapter's), a `.gguf` file or a hub name `owner/model`, which is fetched once; None or
    "embedded": the embedded target, fetched once. `draft`: the directory of a draft that eyas trained or imported, or "bundled"; None: the
    bundled draft for the embedded target, and for any other no draft, which leaves the methods that need none. `device`: "cpu" (None) or a
    CUDA device as PyTorch names it. `precision`: "bf16", "fp32", or "int8" and "q4": weights of 8 or 4 bits in groups of 32 over bfloat16,
    for Llama-shaped targets alone.

    `context_parallel`: keys lie in `shards` virtual shards, shared out over the processes that `torchrun` started, one without it; the text
    is the same whatever their number (docs/tree-attention.md). The first process goes on; the others hold their part until it ends, and
    then exit. A process that does not answer within `peer_timeout` seconds is an error.

    Raises `EyasError` with one line for a target, draft, device or precision that cannot be had, and for a draft that does not fit its
    target.
    """
    check_device(device or "cpu")
    check_timeout(peer_timeout)
    place, _ = place_of(device or "cpu") if context_parallel else (device or "cpu", "")
    layout, directory = Layout(shards), target_directory(target)
    drafted = draft_directory(draft, directory)
    if drafted:
        kind = METHODS[kind_of(drafted)].decoding()
        kind.check(drafted, target_config(directory))  # before the target's weights are read: a draft that does not fit is refused at once
    with within_memory("use a smaller model, or precision='int8' or 'q4'"):
        peers = Peers.join(device or "cpu", peer_timeout) if context_parallel else None
        model = load_target(directory, precision, place)
        if peers:
            model = begin(model, directory, precision, layout, peers)
        return Engine(model, load_tokenizer(directory), directory, drafted, precision)


def without_draft(directory: Path, precision: str) -> Engine:
    """An engine of the target alone, for callers that bring a draft of their own."""
    return Engine(load_target(directory, precision), load_tokenizer(directory), directory, None, precision)


class Engine:
    """A loaded target with its tokenizer and drafters, as `eyas.load` returns it.

    `generate` returns finished results and `stream` yields text as it comes. A server drives `decoder`, with sequences from `sequences`.
    """

    def __init__(self, target: TargetModel, tokenizer: Any, directory: Path, draft: Path | None, precision: str) -> None:
        # By method, how its drafter is made: every call gets a drafter of its own, so two streams of one engine do not mix.
        self.makers: dict[str, Callable[[], Drafter]] = {}
        self.network = None  # the draft's network, where there is a draft
        if draft:
            kind = kind_of(draft)
            self.network, vocab = METHODS[kind].decoding().load(draft, target)
            self.network.prepare(16 if precision == "fp32" else 8)  # with 4 bits it would guess worse
            for name, method in METHODS.items():
                if method.draft == kind:
                    self.makers[name] = partial(method.decoding().drafter, self.network, vocab)
        self.target = prepared(target, precision)
        for name, method in METHODS.items():
            if method.draft is None:
                self.makers[name] = partial(method.decoding().alone, self.target)
        self.tokenizer, self.directory, self.draft, self.precision = tokenizer, directory, draft, precision
        self.plans: PlanStore | None = None  # what planners learned; made when the first planner is wanted

    # ---- prompts ----

    def encode(
        self,
        prompt: Prompt,
        raw: bool = False,
        tools: AnySequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        ends: str = ANSWER,
    ) -> list[int]:
        """The token ids of a prompt. A string is one user turn, or with `raw` plain text to go on with; messages go through the chat
        template; token ids stay as they are. Raises `EyasError` for an empty prompt, one too long for the target, one the template
        refuses, or ids that the target does not have. `tools` and `chat_template_kwargs` are what `Request` says of them. `ends`: where
        messages end: where an answer begins ("answer"), behind the last turn ("turn"), or within it, to go on with it ("message")."""
        context = self.target.config.max_position_embeddings
        if (tools or chat_template_kwargs) and (raw or is_token_ids(prompt)):
            raise EyasError("tools and chat-template-kwargs are for a chat template, and this prompt goes through none; leave them out")
        if is_token_ids(prompt):
            ids = checked_ids(prompt, self.target.config.vocab_size, "a prompt's numbers")
        else:
            ids = render(self.tokenizer, cast("WrittenPrompt", prompt), raw, self.directory, tools, chat_template_kwargs, ends)
            check_known(self.tokenizer, ids, self.target.config.vocab_size, "the prompt")
        if len(ids) >= context:
            raise TooLong(len(ids), context)
        return ids

    # ---- methods and shapes ----

    def drafter(self, method: str, copy: bool = False) -> Drafter:
        """A new drafter of this method, which copying joins where `copy` is True or the method is written with `+copy`. Raises `EyasError`
        for an unknown method, or one whose draft was not loaded."""
        method, said = parted(method)
        wanted = METHODS[method].draft
        if method not in self.makers:
            how = "" if wanted == DEFAULT else f" --method {wanted}"
            other = f"{self.draft} is no {wanted} draft, which {method} needs"
            what = other if self.draft else f"no draft for {self.directory.name}"
            raise EyasError(f"{what}; name one with --draft, train one with `eyas train{how}`, or use --method plain")
        return CopyingDrafter(self.makers[method]()) if copy or said else self.makers[method]()

    def use_draft_model(self, model: TargetModel) -> None:
        """Let method draft-model guess with this smaller model, of the same vocabulary, instead of the target's first layers. It may be
        fresh from the disk, or an engine's own target (`eyas.load(..).target`), which keeps its precision. Raises `EyasError` for what is
        no loaded model, and for another vocabulary."""
        if not hasattr(model, "new_cache"):
            raise EyasError(f"a draft model is a loaded one, as eyas.load(..).target gives it, not {short(model)}")
        module = cast("Any", METHODS["draft-model"].decoding())
        module.check_vocabulary(model, self.target.config.vocab_size)
        self.makers["draft-model"] = partial(module.ModelDrafter, prepared(model, self.precision), self.target.config.vocab_size)

    @property
    def default_method(self) -> str:
        """The name of the first method that the loaded draft serves; "plain" without a draft."""
        return next((name for name in METHODS if METHODS[name].draft and name in self.makers), "plain")

    def method_of(self, request: Request) -> str:
        """The name of the method that a request asks for, or the default one. Raises `EyasError` for an unknown method."""
        return parted(request.method or self.default_method)[0]

    def copies(self, request: Request) -> bool:
        """Whether copying joins the trees of a request's method. Raises `EyasError` where it cannot, and is asked for."""
        return copies(request.method or self.default_method, request.copy, draws(request.verifier, request.sampling))

    def shape(self, tree: str | TreeShape, method: str) -> TreeShape:
        """The largest tree that a round may grow. With "auto" a planner sizes each tree within it; a method with a static tree has its
        draft's. Raises `EyasError` for text that is no tree shape."""
        method, _ = parted(method)
        if method == "plain":
            return PLAIN
        if isinstance(tree, TreeShape):
            return tree.checked()
        if tree == "auto":
            return cast("StaticDraft", self.network).static_tree() if METHODS[method].static and method in self.makers else MAX_TREE
        if not isinstance(tree, str):  # pyright: ignore[reportUnnecessaryIsInstance]  (a program may say anything)
            raise EyasError(f"a tree is a shape or its text, as '60x7x10', not {short(tree)}")
        return TreeShape.parse(tree)

    def planner(self, tree: str | TreeShape, method: str, sampling: Sampling, copy: bool = False) -> Planner | None:
        """The planner that sizes the trees of one call; None where a shape was named or is the draft's own. What it learned with copying
        (`copy`) and without is kept apart. The first call on a machine times passes."""
        method, said = parted(method)
        if tree != "auto" or method == "plain" or METHODS[method].static:
            return None
        if self.plans is None:
            self.plans = PlanStore(self.target, self.directory, self.draft, self.precision)
        return self.plans.planner(method + COPY * bool(copy or said), sampling)

    # ---- generation ----

    @overload
    def generate(
        self, prompt: Prompt, request: Request | None = None, *, watch: Watch | None = None, **settings: Unpack[Settings]
    ) -> Result: ...

    @overload
    def generate(
        self, prompt: Prompts, request: Request | None = None, *, watch: Watch | None = None, **settings: Unpack[Settings]
    ) -> list[Result]: ...

    @overload
    def generate(
        self, prompt: Prompt | Prompts, request: Request | None = None, *, n: int, watch: Watch | None = None, **settings: Unpack[Settings]
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        request: Request | None = None,
        *,
        n: int | None = None,
        watch: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> Result | list[Result]:
        """Write the answer to a prompt. A prompt is a string, a conversation's messages or token ids; a list of prompts is decoded
        together and gives a list of results in the same order. With `n` each prompt gets so many answers, and the result is a list, those
        of one prompt beside each other.

        Settings go by keyword: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, `stop`, `method`, `tree`,
        .. (`Request`'s fields and `Sampling`'s); what is left out is as the target's generation_config.json says, but with
        `generation_config="none"`. Or all of them in a finished `request`, but not both. One answer draws with the call's seed, answer i
        of a list with a seed derived from it and i. `watch` is called with the `RoundRecord` of every round of every sequence.

        Raises `EyasError` with one line for an unknown or unusable setting, for a prompt that is empty or too long, and for a method
        whose draft was not loaded.
        """
        sequences: list[Sequence] = []
        for sequences in self.rounds(prompt, self.request(request, **settings), watch, n):  # noqa: B007 (the last is wanted)
            pass
        results = [result_of(sequence) for sequence in sequences]
        return results if n is not None or is_many(prompt) else results[0]

    def stream(
        self,
        prompt: Prompt,
        request: Request | None = None,
        *,
        watch: Watch | None = None,
        kept: Kept | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[str | Result]:
        """Yield pieces of the answer's text as rounds commit them, then its `Result`. Together the pieces are the result's text. With
        `logprobs` each is a `Piece`, which has those of the tokens that came with it; such a piece may have no text.

        Takes what `generate` takes but `n`, for one prompt. Calls that share a `Kept()` are turns of one conversation, of the same settings
        but for the seed: what a prompt has in common with the turn before is not read again. Raises `EyasError` as
        `generate` does, once the first piece is asked for.
        """
        if is_many(prompt) or "n" in settings:
            raise EyasError("stream takes one prompt and writes one answer; use generate for several")
        request = self.request(request, **settings)
        sequence: Sequence | None = None
        told = 0
        for (sequence,) in self.rounds(prompt, request, watch, kept=kept):
            piece = sequence.stream.certain()
            if request.logprobs is not None:
                piece, told = Piece(piece, sequence.logprobs[told:]), len(sequence.logprobs)
            if piece or (isinstance(piece, Piece) and piece.logprobs):
                yield piece
        assert sequence is not None, "a prompt is one sequence"
        yield result_of(sequence)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """What the target's generation_config.json asks for."""
        return generation_config(self.directory)

    def request(self, request: Request | None = None, **settings: Unpack[Settings]) -> Request:
        """The request itself, or one made of loose settings; of those that are not said, generation_config.json's are taken
        (`Request.defaulted`). Raises `EyasError` as `make_request` does, and for such a file with values that cannot be."""
        source = settings.pop("generation_config", "auto")
        if source not in ("auto", "none"):
            raise EyasError(f"generation-config must be auto or none, not {source!r}")
        given = {"sampling": list(Sampling.__dataclass_fields__)}  # a finished sampling says all its fields
        said = {name for setting in settings for name in (setting, *given.get(setting, ()))}
        taken = {} if request is not None or source == "none" else self.generation_config.settings
        taken = {name: value for name, value in taken.items() if name not in said}
        if taken:
            settings = cast("Settings", {**taken, **settings, "defaulted": tuple(taken.items())})
        return make_request(request, **settings)

    def rounds(
        self,
        prompt: Prompt | Prompts,
        request: Request,
        watch: Watch | None = None,
        n: int | None = None,
        kept: Kept | None = None,
    ) -> Iterator[list[Sequence]]:
        """Decode a call's prompts, and yield all its sequences once prompts are read and after each round; `generate` and `stream` are made
        of it."""
        sequences = self.sequences(prompt, request, n)
        decoder = (kept and kept.decoder) or self.decoder(request)
        decoder.watch = watch
        try:
            with within_memory(SMALLER):
                yield from kept.run(decoder, sequences[0]) if kept else decoder.run_all(sequences, request.batch)
        finally:  # a stream may be closed early; what its rounds taught the planner is kept all the same
            if self.plans and decoder.plan.planner:
                self.plans.save()

    def decoder(self, request: Request, watch: Watch | None = None) -> Decoder:
        """A decoder for one call, or for a server's whole life; it takes sequences in and out between rounds (`admit`, `step`, `abort`).
        Raises `EyasError` for an unknown verifier, one that cannot read trees of this shape, and as `drafter` does."""
        method, copy = self.method_of(request), self.copies(request)
        drafter, shape = self.drafter(method, copy), self.shape(request.tree, method)
        if shape.growth:
            growth_named(shape.growth)
        if request.verifier in VERIFY:
            check_shape(request.verifier, shape, request.sampling)
        decoder = Decoder(self.target, drafter, request.verifier, self.planner(request.tree, method, request.sampling, copy))
        decoder.watch = watch
        return decoder

    def sequences(self, prompt: Prompt | Prompts, request: Request, n: int | None = None) -> list[Sequence]:
        """One sequence for each prompt, or `n` beside each other, with the request's settings, that a decoder can admit. Raises
        `EyasError` for prompts, ids and limits that cannot be used."""
        if request.max_new_tokens < 1:
            raise EyasError(f"max-new-tokens must be at least 1, not {request.max_new_tokens}")
        for name, count in (("batch", request.batch), ("n", n)):
            if count is not None and not is_number(count, whole=True):
                raise EyasError(f"{name} must be a whole number, not {short(count)}")
            if count is not None and count < 1:
                raise EyasError(f"{name} must be at least 1, not {count}")
        config = self.target.config
        checked_ids([token for token, _ in request.sampling.logit_bias], config.vocab_size, "tokens of logit-bias")
        checked_ids(request.stop_token_ids, config.vocab_size, "stop-token-ids")
        shape = self.shape(request.tree, self.method_of(request))
        many = is_many(prompt)
        templated = (request.raw, request.tools, request.chat_template_kwargs)
        texts = [self.encode(each, *templated) for each in (cast("list[Prompt]", prompt) if many else [cast("Prompt", prompt)])]
        seed = new_seed() if request.seed is None else request.seed
        return [
            new_sequence(
                tokens, request, shape, derived_seed(seed, number) if many or n is not None else seed, config, self.tokenizer, number
            )
            for number, tokens in enumerate(each for each in texts for _ in range(n or 1))
        ]


def several(name: str, given: Any) -> tuple[Any, ...]:
    """Several values of a setting that may be given as one value, as several or, as in JSON, as None: none."""
    if given is None:
        return ()
    if isinstance(given, str | int):
        return (given,)
    if isinstance(given, bytes | dict) or not isinstance(given, Iterable):
        raise EyasError(f"{name.replace('_', '-')} must be one value or a list of them, not {short(given)}")
    return tuple(cast("Iterable[Any]", given))


def make_request(request: Request | None = None, **settings: Any) -> Request:
    """The request itself, or a request made of loose settings, `Sampling`'s fields among them. Raises `EyasError` for both together, since
    one would have to win, and for unknown settings."""
    if request is not None:
        if settings:
            raise EyasError(f"give a finished request or loose settings ({', '.join(settings)}), not both")
        return request
    for name in ("stop", "stop_token_ids"):
        if name in settings:
            settings[name] = several(name, settings[name])
    known = [*Request.__dataclass_fields__, *Sampling.__dataclass_fields__]
    if unknown := [name for name in settings if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        raise EyasError(f"unknown setting {', '.join(unknown)}{meant}")
    sampling = {name: settings.pop(name) for name in list(settings) if name in Sampling.__dataclass_fields__}
    if sampling and "sampling" in settings:
        raise EyasError(f"give sampling= or {', '.join(sampling)}, not both")
    if sampling:
        settings["sampling"] = Sampling(**sampling)
    return Request(**settings)
