"""Metrics for Prometheus. They have vLLM's names with the prefix `stagemesh_`, so that its dashboards fit."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .bubbles import Bubbles

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
RECOVERY_S = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """All metrics of one gateway, in a registry of their own. Use them from one thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.bubbles = Bubbles()
        self.registry.register(self.bubbles)
        self.running = self._gauge("num_requests_running", "Requests that run.")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for admission.")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Share of the KV pages in use; 1 means all.")
        self.steps_in_flight = self._gauge("steps_in_flight", "Steps between their plan and their result.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that started.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.preemptions = self._counter("num_preemptions", "Sequences that gave up their pages, to be computed again.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Tokens of sequences that started or came back, looked up in the prefix cache."
        )
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of these that were found there.")
        self.drafts = self._counter("spec_decode_num_drafts", "Rows of guessed tokens that were verified.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens guessed in these rows.")
        self.accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self.losses = self._counter("pipeline_losses", "Pipelines that were lost while requests ran.")
        self.replayed_tokens = self._counter(
            "replayed_tokens", "Positions computed again on stages that were replaced."
        )
        self.recovery_s = self._histogram("recovery_seconds", "Seconds from a loss to the next token.", RECOVERY_S)
        self.stale_results = self._counter("stale_results", "Results of steps of an epoch that has passed, dropped.")
        self.move_s = self._histogram("move_seconds", "Seconds without a new step when a pipeline moved.", ITL_S)
        self.success = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.http = self._counter(
            "http_requests", "HTTP requests answered, by route and status.", "method", "handler", "status"
        )
        self.queue_s = self._histogram("request_queue_time_seconds", "Seconds from arrival to admission.", E2E_S)
        self.ttft_s = self._histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT_S)
        self.itl_s = self._histogram("inter_token_latency_seconds", "Seconds between two tokens of a choice.", ITL_S)
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.", E2E_S)
        self.prompt_len = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.output_len = self._histogram("request_generation_tokens", "Output tokens of a request.", TOKENS)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"stagemesh_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"stagemesh_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"stagemesh_{name}", text, buckets=buckets, registry=self.registry)
