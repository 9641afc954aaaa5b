"""Counters and times in Prometheus's form, under the names that vLLM's dashboards and load tools know.

Knows jobs and rounds; knows nothing of HTTP. Needs prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from eyas.decode.sequence import RoundRecord, Sequence
    from eyas.serve.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
DEPTHS = 16  # positions of accepted tokens that are told apart


class Metrics:
    """What a server has done, told with a model's name on each line."""

    def __init__(self, model: str, prefix: str = "eyas") -> None:
        self.registry = CollectorRegistry()
        self.model, self.prefix = model, prefix
        self.told = 0.0, 0.0  # seconds of turns, and own ones, that were counted
        self.prompt_tokens = self.counter("prompt_tokens", "tokens of prompts that were read")
        self.generation_tokens = self.counter("generation_tokens", "tokens that were written")
        self.prefix_queries = self.counter("prefix_cache_queries", "tokens of prompts that were looked for")
        self.prefix_hits = self.counter("prefix_cache_hits", "tokens of prompts that need not be read")
        self.success = self.counter("request_success", "answers that ended by themselves", "finished_reason")
        self.failures = self.counter("request_failure", "requests that were refused or failed", "code")
        self.aborted = self.counter("requests_aborted", "answers that were cut by the client or the server", "when")
        self.rounds = self.counter("rounds", "rounds of all sequences")
        self.committed = self.counter("committed_tokens", "tokens that rounds committed")
        self.drafts = self.counter("spec_decode_num_drafts", "rounds with a guess")
        self.draft_tokens = self.counter("spec_decode_num_draft_tokens", "guesses that the target read")
        self.accepted = self.counter("spec_decode_num_accepted_tokens", "guesses that were right")
        self.accepted_at = self.counter("spec_decode_num_accepted_tokens_per_pos", "the same by depth", "position")
        self.turns = self.counter("turn_seconds", "seconds in which there was work")
        self.own = self.counter("turn_own_seconds", "the part of these that neither rounds nor prompts took")
        self.running = self.gauge("num_requests_running", "sequences that have a slot")
        self.waiting = self.gauge("num_requests_waiting", "sequences that wait for one")
        self.free = self.gauge("slots_free", "slots that nobody has")
        self.slots = self.gauge("slots", "answers that are written at a time")
        self.usage = self.gauge("kv_cache_usage_perc", "share of the slots' rows that texts under way have")
        self.watchers = self.gauge("watchers", "who watches rounds now")
        self.turn_age = self.gauge("engine_turn_age_seconds", "since the last turn, while there is work")
        self.first_token = self.histogram("time_to_first_token_seconds", "from the request to its first token")
        self.whole = self.histogram("e2e_request_latency_seconds", "from the request to its end")
        self.queued = self.histogram("request_queue_time_seconds", "until the prompt is read")
        self.each_token = self.histogram("request_time_per_output_token_seconds", "of an answer, behind its first token")
        self.reading = self.histogram("request_prefill_time_seconds", "from a slot to the first token")
        self.writing = self.histogram("request_decode_time_seconds", "from the first token to the last")
        self.prompts = self.histogram("request_prompt_tokens", "tokens of a prompt", TOKENS)
        self.written = self.histogram("request_generation_tokens", "tokens of an answer", TOKENS)
        self.by_round = self.histogram("committed_per_round", "tokens that a round committed", range(1, DEPTHS + 1))

    # ---- kinds ----

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """A counter of the model's, or where there are more labels one for each of their values."""
        made = Counter(f"{self.prefix}:{name}", what, ("model_name", *labels), registry=self.registry)
        return made if labels else made.labels(self.model)

    def gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"{self.prefix}:{name}", what, ("model_name",), registry=self.registry).labels(self.model)

    def histogram(self, name: str, what: str, buckets: Iterable[float] = SECONDS) -> Histogram:
        made = Histogram(f"{self.prefix}:{name}", what, ("model_name",), registry=self.registry, buckets=tuple(buckets))
        return made.labels(self.model)

    def about(self, **told: str) -> None:
        """What the server is, as labels."""
        made = Gauge(f"{self.prefix}:info", "what the server is", ("model_name", *told), registry=self.registry)
        made.labels(self.model, *told.values()).set(1)

    # ---- what happens ----

    def round(self, record: RoundRecord) -> None:
        """A round of one sequence; called on the scheduler's thread."""
        guesses, right = len(record.tree) - 1, len(record.committed) - 1
        self.rounds.inc()
        self.committed.inc(len(record.committed))
        self.by_round.observe(len(record.committed))
        if guesses:
            self.drafts.inc()
            self.draft_tokens.inc(guesses)
            self.accepted.inc(right)
            for depth in range(min(right, DEPTHS)):
                self.accepted_at.labels(self.model, str(depth)).inc()

    def ended(self, sequence: Sequence, asked: float) -> None:
        """A sequence has ended by itself; `asked`: when it was asked for, on the clock of time.perf_counter."""
        written = len(sequence.tokens) - sequence.prompt_length
        self.success.labels(self.model, sequence.finish_reason).inc()
        self.prompt_tokens.inc(sequence.prompt_length)
        self.generation_tokens.inc(written)
        self.prefix_queries.inc(sequence.prompt_length)
        self.prefix_hits.inc(sequence.reused)
        before = sequence.admitted - asked
        self.first_token.observe(before + sequence.prefill_seconds)
        self.queued.observe(max(sequence.seated - asked, 0.0))
        self.whole.observe(before + sequence.seconds)
        self.reading.observe(max(before + sequence.prefill_seconds - max(sequence.seated - asked, 0.0), 0.0))
        self.writing.observe(sequence.seconds - sequence.prefill_seconds)
        self.prompts.observe(sequence.prompt_length)
        self.written.observe(written)
        if written > 1:
            self.each_token.observe((sequence.seconds - sequence.prefill_seconds) / (written - 1))

    def text(self, scheduler: Scheduler, watchers: int = 0) -> bytes:
        """The page that is asked for now. `watchers`: how many watch rounds."""
        decoder = scheduler.decoder
        running = len(decoder.reading) + len(decoder.decoding)
        self.running.set(running)
        self.free.set(len(decoder.free))
        self.waiting.set(max(scheduler.in_hand - running, 0))
        self.slots.set(decoder.slots)
        rows = sum(each.read for each in list(decoder.reading)) + sum(len(each.tokens) for each in decoder.decoding)
        self.usage.set(rows / (decoder.slots * scheduler.settings.context))
        self.watchers.set(watchers)
        self.turn_age.set(scheduler.turn_age)
        turns, own = scheduler.seconds, max(scheduler.seconds - scheduler.decoder_seconds, 0.0)
        for counter, before, now in ((self.turns, self.told[0], turns), (self.own, self.told[1], own)):
            counter.inc(max(now - before, 0.0))
        self.told = turns, own
        return generate_latest(self.registry)
