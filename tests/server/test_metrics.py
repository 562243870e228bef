"""/metrics: vLLM's names, and numbers that follow the requests. The log line of a request."""

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fxlm.runtime.messages import Stats
from fxlm.server.metrics import EngineCollector, token_buckets
from tests.server.conftest import Running, Starter
from tests.server.fake import REPLY
from tests.server.test_errors import CHAT, TEXT, post

# What vLLM's Grafana dashboards query, where it means the same here.
NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:admission_rejections",
    "vllm:iteration_tokens_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
    "vllm:request_num_preemptions",
}


def read(server: Running) -> tuple[set[str], dict[str, float]]:
    """Names of the families, and samples by name and the labels that tell them apart."""
    reply = server.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.text))
    samples = {}
    for family in families:
        for sample in family.samples:
            labels = [sample.labels.get(key, "") for key in ("finished_reason", "le")]
            samples[" ".join([sample.name, *labels]).strip()] = sample.value
            if sample.name.startswith("vllm:"):
                assert sample.labels["model_name"] == "fake"
                assert sample.labels["engine"] == "0"
    return {family.name for family in families}, samples


def test_speculation_is_told_where_something_is_drafted() -> None:
    stats = Stats()
    labels = {"model_name": "m", "engine": "0"}
    collector = EngineCollector(lambda: stats, labels)

    def samples() -> dict[str, float]:
        return {
            " ".join([s.name, s.labels.get("position", "")]).strip(): s.value
            for family in collector.collect()
            for s in family.samples
            if "spec_decode" in s.name
        }

    assert samples() == {}
    stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens = 3, 8, 5
    stats.accepted_per_position = [3, 2, 0]
    assert samples() == {
        "vllm:spec_decode_num_drafts_total": 3,
        "vllm:spec_decode_num_draft_tokens_total": 8,
        "vllm:spec_decode_num_accepted_tokens_total": 5,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total 0": 3,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total 1": 2,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total 2": 0,
    }


def test_the_start_and_the_tier_are_told() -> None:
    stats = Stats(tier="interpreted", startup={"load weights": 0.25}, artifact="changed",
                  weights="whole", passes={"fuse_qkv": (5, 0.5)})  # fmt: skip
    collector = EngineCollector(lambda: stats, {})
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.name.startswith("fxlm:")
    }
    assert found["fxlm:tier", "interpreted"] == 1.0
    assert found["fxlm:tier", "compiled"] == 0.0
    assert found["fxlm:startup_seconds", "load weights"] == 0.25
    assert found[("fxlm:artifact_cache_hits_total",)] == 0.0
    assert found["fxlm:artifact_cache_misses_total", "changed"] == 1.0
    assert found["fxlm:artifact_cache_misses_total", "damaged"] == 0.0
    assert found["fxlm:prepared_weights", "whole"] == 1.0
    assert found["fxlm:prepared_weights", "damaged"] == 0.0
    assert found["fxlm:pass_rewrites", "fuse_qkv"] == 5
    assert found["fxlm:pass_seconds", "fuse_qkv"] == 0.5


def test_the_phases_of_a_start_add_up_to_the_time_until_the_server_listens() -> None:
    collector = EngineCollector(lambda: Stats(startup={"import": 0.5, "load weights": 0.25}), {})
    collector.ready_s = 1.0
    phases = {
        sample.labels["phase"]: sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.name == "fxlm:startup_seconds"
    }
    assert phases == {"import": 0.5, "load weights": 0.25, "server": 0.25}


def test_names(running: Running) -> None:
    assert read(running)[0] >= NAMES


def test_numbers(start: Starter) -> None:
    server = start()
    post(server, "/v1/chat/completions", CHAT | {"n": 2})
    post(server, "/v1/completions", TEXT | {"max_tokens": 3})
    post(server, "/v1/completions", b"not counted")
    _, samples = read(server)
    whole, prompt = len(REPLY.encode()) + 1, len("user: hi\nassistant:")
    assert samples["vllm:generation_tokens_total"] == 2 * whole + 3
    assert samples["vllm:prompt_tokens_total"] == prompt + 2
    assert samples["vllm:prompt_tokens_cached_total"] == 3
    assert samples["vllm:request_success_total stop"] == 2
    assert samples["vllm:request_success_total length"] == 1
    assert samples["vllm:request_success_total abort"] == 0
    assert samples["vllm:time_to_first_token_seconds_count"] == 2
    assert samples["vllm:inter_token_latency_seconds_count"] == 2 * (whole - 1) + 2
    assert samples["vllm:e2e_request_latency_seconds_count"] == 2
    assert samples["vllm:request_queue_time_seconds_count"] == 2
    assert samples["vllm:request_params_n_sum"] == 3
    assert samples["vllm:request_generation_tokens_sum"] == 2 * whole + 3
    # The engine's own, as the fake one tells them.
    assert samples["vllm:num_requests_running"] == 3
    assert samples["vllm:num_requests_waiting"] == 2
    assert samples["vllm:kv_cache_usage_perc"] == 0.25
    assert samples["vllm:num_preemptions_total"] == 4
    assert samples["vllm:prefix_cache_queries_total"] == 100
    assert samples["vllm:prefix_cache_hits_total"] == 60
    assert samples["vllm:iteration_tokens_total_bucket  1.0"] == 1
    assert samples["vllm:iteration_tokens_total_bucket  8.0"] == 3
    assert samples["vllm:iteration_tokens_total_count"] == 3
    assert samples["vllm:iteration_tokens_total_sum"] == 17


def test_token_buckets() -> None:
    assert token_buckets(60) == (1, 2, 5, 10, 20, 50)
    assert token_buckets(1) == (1,)


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fxlm.access"]


def test_one_line_a_request(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Counts and times, never what was said."""
    caplog.set_level(logging.INFO, "fxlm.access")
    post(running, "/v1/completions", TEXT | {"n": 2}, **{"X-Request-Id": "mine"})
    running.http.get("/health")
    running.http.get("/v1/nothing%0ainjected")
    running.wait(lambda: len(access_lines(caplog)) == 2)
    done, unknown = access_lines(caplog)
    tokens = 2 * (len(REPLY.encode()) + 1)
    start = f"POST /v1/completions 200 id=mine prompt=2 cached=1 generated={tokens} ttft="
    assert done.startswith(start)
    assert done.endswith("finish=stop,stop")
    assert "Hello" not in done
    assert unknown.startswith("GET '/v1/nothing\\ninjected' 404 id=")
