"""Prometheus metrics under vLLM's names, so that its dashboards work unchanged.

Here: what is measured where requests enter and leave (times, tokens, reasons), and the engine's
own counters, read from its latest `Stats` when somebody asks. Not here: the engine's counting.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fxlm.runtime.messages import ITERATION_BUCKETS, Stats
from fxlm.runtime.sampling_params import SamplingParams

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
               10.0, 20.0, 40.0, 80.0)  # fmt: skip
REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
             120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
COUNTS = (1, 2, 5, 10, 20)


def token_buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `limit`, as vLLM's."""
    found: list[int] = []
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > limit:
                return tuple(found)
            found.append(step * scale)
        scale *= 10


@dataclass(kw_only=True, slots=True)
class Timing:
    """Times of one engine request, in seconds of the monotonic clock, and its tokens."""

    arrival: float = field(default_factory=time.monotonic)
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: dict[int, float] = field(default_factory=dict)  # by completion
    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    num_preemptions: int = 0


class EngineCollector(Collector):
    """The engine's latest numbers, turned into metrics at the moment of scraping.

    Attributes:
        ready_s: seconds from the start of this process, the user's command, until it listened;
            0.0: it does not yet, or is not known.
    """

    def __init__(self, read: Callable[[], Stats], labels: Mapping[str, str]) -> None:
        self.read = read
        self.ready_s = 0.0
        self.names = list(labels)
        self.values = list(labels.values())

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client for every scrape."""
        stats = self.read()
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Sequences in the running batch.", stats.num_running),
            "num_requests_waiting": ("Requests waiting to be run.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of KV blocks in use, 1 = all.", stats.kv_cache_usage),
        }
        counters: dict[str, tuple[str, float]] = {
            "num_preemptions": ("Preemptions of the engine.", stats.num_preemptions),
            "prefix_cache_queries": ("Tokens looked up in the cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Tokens found in the cache.", stats.prefix_hits),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=self.names)
            gauge.add_metric(self.values, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=self.names)
            counter.add_metric(self.values, value)
            yield counter
        if stats.accepted_per_position:
            yield from self.speculation(stats)
        yield self.iterations(stats)
        yield from self.start(stats)
        yield from self.passes(stats)

    def speculation(self, stats: Stats) -> Iterator[Metric]:
        """Drafted and accepted tokens, where something is drafted."""
        for name, text, value in (
            ("num_drafts", "Drafts verified.", stats.num_drafts),
            ("num_draft_tokens", "Tokens drafted.", stats.num_draft_tokens),
            ("num_accepted_tokens", "Drafted tokens accepted.", stats.num_accepted_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:spec_decode_{name}", text, labels=self.names)
            counter.add_metric(self.values, value)
            yield counter
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their place in the draft.",
            labels=[*self.names, "position"],
        )
        for position, value in enumerate(stats.accepted_per_position):
            places.add_metric([*self.values, str(position)], value)
        yield places

    def start(self, stats: Stats) -> Iterable[Metric]:
        """How the engine started, and what runs its steps."""
        tier = GaugeMetricFamily(
            "fxlm:tier", "1 for what runs the steps.", labels=[*self.names, "tier"]
        )
        for name in ("interpreted", "compiled"):
            tier.add_metric([*self.values, name], float(stats.tier == name))
        seconds = GaugeMetricFamily(
            "fxlm:startup_seconds",
            "Seconds from the start of the command until the server listens, by phase; server: "
            "what its own process took before, beside and after the engine's.",
            labels=[*self.names, "phase"],
        )
        own = {"server": self.ready_s - sum(stats.startup.values())}
        for phase, value in (stats.startup | (own if self.ready_s else {})).items():
            seconds.add_metric([*self.values, phase], value)
        hits = CounterMetricFamily(
            "fxlm:artifact_cache_hits", "Artifacts found in the cache.", labels=self.names
        )
        hits.add_metric(self.values, float(stats.artifact == "hit"))
        misses = CounterMetricFamily(
            "fxlm:artifact_cache_misses",
            "Artifacts not found in the cache, by reason.",
            labels=[*self.names, "reason"],
        )
        for reason in ("absent", "damaged", "changed"):
            misses.add_metric([*self.values, reason], float(stats.artifact == reason))
        weights = GaugeMetricFamily(
            "fxlm:prepared_weights",
            "1 for what is known of the prepared weights that are mapped from a file.",
            labels=[*self.names, "state"],
        )
        for state in ("unchecked", "whole", "damaged"):
            weights.add_metric([*self.values, state], float(stats.weights == state))
        return tier, seconds, hits, misses, weights

    def passes(self, stats: Stats) -> Iterable[Metric]:
        """What each pass of the compiler did when the artifact was made."""
        labels = [*self.names, "pass"]
        rewrites = GaugeMetricFamily(
            "fxlm:pass_rewrites", "Places that the pass rewrote.", labels=labels
        )
        seconds = GaugeMetricFamily("fxlm:pass_seconds", "Seconds of the pass.", labels=labels)
        for name, (count, took) in stats.passes.items():
            rewrites.add_metric([*self.values, name], float(count))
            seconds.add_metric([*self.values, name], took)
        return rewrites, seconds

    def iterations(self, stats: Stats) -> Metric:
        """Tokens a step, as a histogram."""
        counts = [*stats.iteration_tokens, *([0] * (len(ITERATION_BUCKETS) + 1))]
        buckets: list[tuple[str, float]] = []
        total = 0
        bounds = [*(f"{bound:.1f}" for bound in ITERATION_BUCKETS), "+Inf"]
        for bound, count in zip(bounds, counts, strict=False):
            total += count
            buckets.append((bound, float(total)))
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens of an engine step.", labels=self.names
        )
        family.add_metric(self.values, buckets, float(stats.iteration_tokens_sum))
        return family


class Metrics:
    """Every metric of one server.

    Args:
        model_name: the ``model_name`` label.
        max_model_len: upper end of the token histograms.
        read_stats: gives the engine's latest numbers.
    """

    def __init__(
        self, model_name: str, max_model_len: int, read_stats: Callable[[], Stats]
    ) -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "engine": "0"}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.engine = EngineCollector(read_stats, self.labels)
        self.registry.register(self.engine)
        self.add_counters()
        self.add_time_histograms()
        self.add_token_histograms(max_model_len)

    def counter(self, name: str, text: str) -> Counter:
        """A counter with the common labels."""
        made = Counter(f"vllm:{name}", text, LABELS, registry=self.registry)
        return made.labels(**self.labels)

    def histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        """A histogram with the common labels."""
        bounds = tuple(buckets)
        made = Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=bounds)
        return made.labels(**self.labels)

    def add_counters(self) -> None:
        """What only grows."""
        self.prompt_tokens = self.counter("prompt_tokens", "Prompt tokens processed.")
        self.prompt_cached = self.counter("prompt_tokens_cached", "Prompt tokens from the cache.")
        self.generation_tokens = self.counter("generation_tokens", "Tokens generated.")
        self.rejections = self.counter("admission_rejections", "Requests refused: queue full.")
        self.success = Counter(
            "vllm:request_success",
            "Completions ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(**self.labels, finished_reason=reason)

    def add_time_histograms(self) -> None:
        """Seconds."""
        make = self.histogram
        self.ttft = make("time_to_first_token_seconds", "Time to first token.", FIRST_TOKEN_S)
        self.itl = make("inter_token_latency_seconds", "Time between tokens.", PER_TOKEN_S)
        self.tpot = make("request_time_per_output_token_seconds", "Mean time a token.", PER_TOKEN_S)
        self.e2e = make("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_S)
        self.queue = make("request_queue_time_seconds", "Arrival to first schedule.", REQUEST_S)
        self.inference = make("request_inference_time_seconds", "Schedule to end.", REQUEST_S)
        self.prefill = make("request_prefill_time_seconds", "Schedule to first token.", REQUEST_S)
        self.decode = make("request_decode_time_seconds", "First to last token.", REQUEST_S)

    def add_token_histograms(self, max_model_len: int) -> None:
        """Counts a request."""
        make, tokens = self.histogram, token_buckets(max_model_len)
        self.per_prompt = make("request_prompt_tokens", "Prompt tokens.", tokens)
        self.per_output = make("request_generation_tokens", "Tokens generated.", tokens)
        self.max_tokens = make("request_params_max_tokens", "The max_tokens asked.", tokens)
        self.n = make("request_params_n", "The n asked.", COUNTS)
        self.preemptions = make("request_num_preemptions", "Preemptions.", COUNTS)

    def on_submit(self, params: SamplingParams) -> None:
        """A request was handed to the engine."""
        self.n.observe(params.n)
        if params.max_tokens is not None:
            self.max_tokens.observe(params.max_tokens)

    def on_tokens(self, timing: Timing, index: int, count: int, now: float) -> None:
        """`count` tokens of completion `index` arrived at `now`; keeps `timing` up to date."""
        if count == 0:
            return
        if timing.num_generated == 0:
            timing.first_token = now
            self.ttft.observe(now - timing.arrival)
            self.prompt_tokens.inc(timing.num_prompt)
            self.prompt_cached.inc(timing.num_cached)
        if index in timing.last_token:
            self.itl.observe((now - timing.last_token[index]) / count)
        timing.last_token[index] = now
        timing.num_generated += count
        self.generation_tokens.inc(count)

    def on_finish(self, timing: Timing, reasons: Iterable[str], now: float) -> None:
        """A request left the engine, one reason for each of its completions."""
        for reason in reasons:
            self.success.labels(**self.labels, finished_reason=reason).inc()
        self.e2e.observe(now - timing.arrival)
        self.per_prompt.observe(timing.num_prompt)
        self.per_output.observe(timing.num_generated)
        self.preemptions.observe(timing.num_preemptions)
        for histogram, seconds in self.phases(timing, now):
            histogram.observe(max(0.0, seconds))

    def phases(self, timing: Timing, now: float) -> Iterator[tuple[Histogram, float]]:
        """The parts of a request's life that are known."""
        if timing.scheduled:
            yield self.queue, timing.scheduled - timing.arrival
            yield self.inference, now - timing.scheduled
        if timing.scheduled and timing.first_token:
            yield self.prefill, timing.first_token - timing.scheduled
        if timing.first_token:
            span = max(timing.last_token.values()) - timing.first_token
            yield self.decode, span
            later = timing.num_generated - len(timing.last_token)
            if later > 0:
                yield self.tpot, span * len(timing.last_token) / later

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
