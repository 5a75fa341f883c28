"""Metrics for Prometheus. They have vLLM's names with the prefix `stagemesh_`, so that its dashboards fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
Ending = Literal["stop", "length", "abort", "error"]
"""Why a request ended: as its last choice did, cancelled by its client, or failed."""

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
RECOVERY_S = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass(frozen=True)
class Load:
    """The present load of the gateway."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    """Share of the KV pages in use, 0 to 1."""
    steps_in_flight: int = 0


class Metrics:
    """All metrics of one gateway, in a registry of their own. Use them from one thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._read: Callable[[], Load] = Load
        self._running = self._gauge("num_requests_running", "Requests that run.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for admission.")
        self._kv = self._gauge("kv_cache_usage_perc", "Share of the KV pages in use; 1 means all.")
        self._in_flight = self._gauge("steps_in_flight", "Steps between their plan and their result.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests that started.")
        self._generation = self._counter("generation_tokens", "Tokens generated.")
        self._preemptions = self._counter("num_preemptions", "Sequences that gave their pages back and began again.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Tokens of sequences that started or came back, looked up in the prefix cache."
        )
        self._prefix_hits = self._counter("prefix_cache_hits", "Those that were found there and not computed again.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rows of guessed tokens that were verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens guessed in them.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Those that were what was drawn.")
        self._losses = self._counter("pipeline_losses", "Pipelines that were lost while requests ran.")
        self._replayed = self._counter("replayed_tokens", "Positions computed again on stages that were replaced.")
        self._recovery_s = self._histogram("recovery_seconds", "Seconds from a loss to the next token.", RECOVERY_S)
        self._stale = self._counter("stale_results", "Results of steps of an epoch that has passed, dropped.")
        self._move_s = self._histogram("move_seconds", "Seconds without a new step when a pipeline moved.", ITL_S)
        self._success = Counter(
            "stagemesh_request_success",
            "Requests that ended, by why.",
            ["finished_reason"],
            registry=self.registry,
        )
        self._http = Counter(
            "stagemesh_http_requests",
            "HTTP requests answered, by route and status.",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self._queue_s = self._histogram("request_queue_time_seconds", "Seconds from arrival to admission.", E2E_S)
        self._ttft_s = self._histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT_S
        )
        self._itl_s = self._histogram("inter_token_latency_seconds", "Seconds between two tokens of a choice.", ITL_S)
        self._e2e_s = self._histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.", E2E_S)
        self._prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._output_len = self._histogram("request_generation_tokens", "Output tokens of a request.", TOKENS)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"stagemesh_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"stagemesh_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"stagemesh_{name}", text, buckets=buckets, registry=self.registry)

    def stale_result(self) -> None:
        """A stale result was dropped."""
        self._stale.inc()

    def watch(self, read: Callable[[], Load]) -> None:
        """Sets the function that is called at each scrape for the gauges' values."""
        self._read = read

    def register(self, collector: Collector) -> None:
        """Adds a collector of another part of the gateway."""
        self.registry.register(collector)

    def request_queued(self, prompt_tokens: int) -> None:
        """A request was accepted into the queue."""
        self._prompt_len.observe(prompt_tokens)

    def request_started(self, waited_s: float, prompt_tokens: int) -> None:
        """A request left the queue after `waited_s`."""
        self._queue_s.observe(waited_s)
        self._prompt.inc(prompt_tokens)

    def first_token(self, since_arrival_s: float) -> None:
        """A request got its first token."""
        self._ttft_s.observe(since_arrival_s)

    def tokens(self, count: int, intervals_s: tuple[float, ...] | list[float] = ()) -> None:
        """`count` tokens were generated. `intervals_s`: times since the previous token, if there was one."""
        self._generation.inc(count)
        for interval_s in intervals_s:
            self._itl_s.observe(interval_s)

    def finished(self, reason: Ending, e2e_s: float, output_tokens: int) -> None:
        """A request ended after `e2e_s`."""
        self._success.labels(reason).inc()
        self._e2e_s.observe(e2e_s)
        self._output_len.observe(output_tokens)

    def preempted(self) -> None:
        """A sequence was preempted."""
        self._preemptions.inc()

    def pipeline_lost(self) -> None:
        """A pipeline was lost."""
        self._losses.inc()

    def pipeline_recovered(self, lasted_s: float, replayed_tokens: int) -> None:
        """A pipeline recovered after `lasted_s`, and `replayed_tokens` positions were computed again."""
        self._recovery_s.observe(lasted_s)
        self._replayed.inc(replayed_tokens)

    def pipeline_moved(self, paused_s: float) -> None:
        """A pipeline moved to another epoch. No step was planned for `paused_s`."""
        self._move_s.observe(paused_s)

    def prefix_looked_up(self, queries: int, hits: int) -> None:
        """A sequence of `queries` tokens started with `hits` of them from the prefix cache."""
        self._prefix_queries.inc(queries)
        self._prefix_hits.inc(hits)

    def speculated(self, drafts: int, draft_tokens: int, accepted_tokens: int) -> None:
        """Results of `drafts` draft rows came; `accepted_tokens` of their `draft_tokens` were right."""
        self._drafts.inc(drafts)
        self._draft_tokens.inc(draft_tokens)
        self._accepted.inc(accepted_tokens)

    def http_answered(self, method: str, handler: str, status: int) -> None:
        """An HTTP request was answered. `handler` is the route, not the client's path."""
        self._http.labels(method, handler, str(status)).inc()

    def render(self) -> bytes:
        """The text of a scrape."""
        load = self._read()
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._kv.set(load.kv_cache_usage)
        self._in_flight.set(load.steps_in_flight)
        return generate_latest(self.registry)
