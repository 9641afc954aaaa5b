"""What a draft accepts in a running engine beside what it accepts here: asks an OpenAI-compatible server questions and reads its counts.

Knows how vLLM, SGLang, llama.cpp and `eyas serve` tell their acceptance; knows nothing of how they run.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from eyas.checks import is_number
from eyas.config import GREEDY, PRECISIONS, EyasError, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import without_draft
from eyas.formats.portable import Draft, TargetFiles
from eyas.http_json import Api, checked_url
from eyas.measure.agreement import QUESTIONS

NEW_TOKENS = 100
FAR = 0.1  # relative difference of tau that is more than other kernels and another rounding explain
VLLM = re.compile(r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)(?:_total)?(?:\{[^}]*\})? ([0-9.e+]+)$", re.M)


class Counts(NamedTuple):
    drafts: float
    draft_tokens: float
    accepted: float

    def tau(self) -> float:
        return 1 + self.accepted / max(self.drafts, 1)

    def chain(self) -> int:
        """How many tokens the server drafts in a round."""
        return max(1, round(self.draft_tokens / max(self.drafts, 1)))


class Served(NamedTuple):
    """What the server did with the questions. `tau` and `shape` are None where it tells no counts."""

    tau: float | None
    shape: TreeShape | None  # what it drafts a round
    prompt_tokens: list[int]
    new_tokens: int


def held(value: Any) -> dict[str, Any]:
    """The value, where it is an object; else an empty one: a server may answer anything."""
    return value if isinstance(value, dict) else {}


def count(value: Any) -> int:
    return int(value) if is_number(value) and value > 0 else 0


def optional(api: Api, path: str) -> Any:
    """What the server answers, or None where it has no such page."""
    try:
        return api.call(path)
    except EyasError:
        return None


def vllm_counts(api: Api) -> Counts | None:
    page = optional(api, "/metrics")
    totals: dict[str, float] = {}
    for name, value in VLLM.findall(page if isinstance(page, str) else ""):
        totals[name] = totals.get(name, 0) + float(value)
    return Counts(*(totals.get(name, 0) for name in ("drafts", "draft_tokens", "accepted_tokens"))) if totals else None


def sglang_told(api: Api) -> tuple[float, TreeShape] | None:
    """Mean accepted length (over all that the server has answered since it began) and tree, as SGLang's server tells them."""
    told = optional(api, "/server_info") or optional(api, "/get_server_info")
    if not isinstance(told, dict) or not told.get("speculative_algorithm"):
        return None
    states = told.get("internal_states")
    length = held(states[0]).get("avg_spec_accept_length") if isinstance(states, list) and states else None
    steps = count(told.get("speculative_num_steps")) or 3
    top_k, nodes = count(told.get("speculative_eagle_topk")) or 1, count(told.get("speculative_num_draft_tokens")) or steps + 1
    return (float(length), TreeShape(nodes, steps - 1, top_k).checked()) if is_number(length) and length else None


def own_tree(api: Api) -> TreeShape | None:
    """The tree that a server of eyas's own grows, where it is one shape; None of a planned one, and of other servers."""
    told = held(held(optional(api, "/props")).get("eyas")).get("tree")
    try:
        return TreeShape.parse(told) if isinstance(told, str) else None
    except EyasError:
        return None


def ask(url: str) -> Served:
    """Ask the server the questions, greedily, one after the other."""
    api = Api(url := checked_url("--engine-url", url))
    entries = held(api.call("/v1/models")).get("data")
    name = held(entries[0]).get("id") if isinstance(entries, list) and entries else None
    if not isinstance(name, str):
        raise EyasError(f"{url}/v1/models lists no model; is this an OpenAI-compatible engine?")
    before = vllm_counts(api)
    drafted = accepted = written = 0
    prompts = []
    for question in QUESTIONS:
        body = {"model": name, "temperature": 0, "max_tokens": NEW_TOKENS, "messages": [{"role": "user", "content": question}]}
        answer = api.call("/v1/chat/completions", body)
        if not isinstance(answer, dict):
            raise EyasError(f"{url}/v1/chat/completions answered with something else than JSON; is this an OpenAI-compatible engine?")
        usage, timings = held(answer.get("usage")), held(answer.get("timings"))
        prompts.append(count(usage.get("prompt_tokens")))
        written += count(usage.get("completion_tokens"))
        drafted += count(timings.get("draft_n"))
        accepted += count(timings.get("draft_n_accepted"))
    if before is not None and (after := vllm_counts(api)) is not None:
        counts = Counts(*(now - then for now, then in zip(after, before, strict=True)))
        return Served(counts.tau(), TreeShape.chain(counts.chain()), prompts, written)
    if drafted:  # llama.cpp: each round writes one token more than it accepted, the first token comes from the prompt
        rounds = max(written - len(QUESTIONS) - accepted, 1)
        counts = Counts(rounds, drafted, accepted)
        return Served(counts.tau(), own_tree(api) or TreeShape.chain(counts.chain()), prompts, written)
    if told := sglang_told(api):
        return Served(*told, prompts, written)
    return Served(None, None, prompts, written)


def compare(url: str, draft: Draft, target: TargetFiles) -> dict[str, Any]:
    """The engine's figure, ours for the same questions and trees, and what differs, in lines."""
    served, engine = ask(url), without_draft(target.directory, PRECISIONS[0])
    prompts = [engine.encode(question) for question in QUESTIONS]
    own = [len(prompt) for prompt in prompts]
    lines, differs = [], False
    if any(served.prompt_tokens) and served.prompt_tokens != own:
        differs = True
        first = next(number for number, pair in enumerate(zip(served.prompt_tokens, own, strict=True)) if pair[0] != pair[1])
        lines.append(
            f"chat template: it reads {served.prompt_tokens[first]} tokens where the target's template makes {own[first]} "
            f"({QUESTIONS[first]!r}): another template, system prompt or a doubled first token; the draft was trained on the target's"
        )
    if served.shape is None or served.tau is None:
        lines.append("the engine tells no acceptance (vLLM: /metrics; llama.cpp: timings; SGLang: /server_info): nothing to compare")
        return {"lines": lines, "differs": True, "tau": None, "ours": None}
    shape, network = served.shape, draft.network(engine.target.embedding.detach(), engine.target.dtype)
    decoder = Decoder(engine.target, Eagle3Drafter(network.prepare(), draft.vocab))
    *_, texts = decoder.run(prompts, shape, GREEDY, [0] * len(prompts), NEW_TOKENS)
    rounds: Counter[int] = sum((text.accepted_lengths for text in texts), Counter())
    ours = sum(length * count for length, count in rounds.items()) / max(rounds.total(), 1)
    lines.append(f"served: tau {served.tau:.2f} there, {ours:.2f} here ({shape}, {len(QUESTIONS)} questions, {NEW_TOKENS} tokens, greedy)")
    if abs(served.tau - ours) > FAR * ours:
        differs = True
        lines.append(
            "that is more than rounding explains: it serves other files, reads its features elsewhere (layer ids) or another template; "
            "check the directory it was given with this command"
        )
    return {"lines": lines, "differs": differs, "tau": round(served.tau, 4), "ours": round(ours, 4)}
