"""Counters and times in Prometheus's form, under the names that vLLM's dashboards and load tools know.

Knows jobs and rounds; knows nothing of HTTP. Needs prometheus_client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from eyas.decode.sequence import RoundRecord, Sequence
    from eyas.serve.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
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
        self.first_token = self.histogram("time_to_first_token_seconds", "from the request to its first token")
        self.whole = self.histogram("e2e_request_latency_seconds", "from the request to its end")
        self.queued = self.histogram("request_queue_time_seconds", "until the prompt is read")
        self.each_token = self.histogram("request_time_per_output_token_seconds", "of an answer, behind its first token")

    # ---- kinds ----

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """A counter of the model's, or where there are more labels one for each of their values."""
        made = Counter(f"{self.prefix}:{name}", what, ("model_name", *labels), registry=self.registry)
        return made if labels else made.labels(self.model)

    def gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"{self.prefix}:{name}", what, ("model_name",), registry=self.registry).labels(self.model)

    def histogram(self, name: str, what: str) -> Histogram:
        made = Histogram(f"{self.prefix}:{name}", what, ("model_name",), registry=self.registry, buckets=SECONDS)
        return made.labels(self.model)

    # ---- what happens ----

    def round(self, record: RoundRecord) -> None:
        """A round of one sequence; called on the scheduler's thread."""
        guesses, right = len(record.tree) - 1, len(record.committed) - 1
        self.rounds.inc()
        self.committed.inc(len(record.committed))
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
        if written > 1:
            self.each_token.observe((sequence.seconds - sequence.prefill_seconds) / (written - 1))

    def text(self, scheduler: Scheduler) -> bytes:
        """The page that is asked for now."""
        decoder = scheduler.decoder
        running = len(decoder.reading) + len(decoder.decoding)
        self.running.set(running)
        self.free.set(len(decoder.free))
        self.waiting.set(max(scheduler.in_hand - running, 0))
        turns, own = scheduler.seconds, max(scheduler.seconds - scheduler.decoder_seconds, 0.0)
        for counter, before, now in ((self.turns, self.told[0], turns), (self.own, self.told[1], own)):
            counter.inc(max(now - before, 0.0))
        self.told = turns, own
        return generate_latest(self.registry)
