"""Metrics: what is counted, by value, as Prometheus reads it; and several gateways on one page."""

import pytest
from api_server import gateway
from finished_requests import answer, bypassed, finished, inputs, policy, routed
from prometheus_client.parser import text_string_to_metric_families

from coe.orchestrator import Reply
from coe.serve.http.finished import Finished, first_token_parts
from coe.serve.http.metrics import Metrics, join
from coe.types import Timing

Values = dict[tuple[str, ...], float]


def values(page: bytes) -> Values:
    """(sample's name, values of its labels by the labels' names) -> value. Duplicate series fail."""
    read: Values = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "gateway"]
            key = (sample.name, *labels, sample.labels.get("gateway", ""))
            assert key not in read, key
            read[key] = sample.value
    return read


def observed(*requests: Finished) -> Values:
    metrics = Metrics("g")
    for request in requests:
        metrics.observe(request)
    return values(metrics.page())


def test_an_answered_request_is_counted_everywhere() -> None:
    read = observed(finished(), finished())
    chat = "/v1/chat/completions"
    assert read["coe_requests_total", chat, "good", "default", "200", "g"] == 2
    assert read["coe_prompt_tokens_total", "good", "g"] == 14
    assert read["coe_completion_tokens_total", "good", "g"] == 6
    assert read["coe_cost_usd_total", "good", "g"] == 0.5
    for name, label, total in (
        ("coe_request_seconds", chat, 10.25),
        ("coe_gateway_seconds", chat, 0.25),
        ("coe_route_seconds", "default", 0.008),
        ("coe_first_token_seconds", "good", 4.2),
        ("coe_queue_seconds", "good", 1.0),
        ("coe_load_seconds", "good", 3.0),
        ("coe_engine_seconds", "good", 6.0),
    ):
        assert read[f"{name}_count", label, "g"] == 2
        assert read[f"{name}_sum", label, "g"] == pytest.approx(total)
    assert read["coe_request_seconds_bucket", chat, "5.0", "g"] == 0
    assert read["coe_request_seconds_bucket", chat, "10.0", "g"] == 2
    assert read["coe_route_seconds_bucket", "0.0025", "default", "g"] == 0
    assert read["coe_route_seconds_bucket", "0.005", "default", "g"] == 2
    assert ("coe_abstained_total", "default", "g") not in read and ("coe_fallbacks_total", "default", "g") not in read


def test_a_refused_request_counts_for_no_expert() -> None:
    refused = finished(
        routed=None,
        expert=None,
        answer=None,
        model="gtp-5",
        status=404,
        error="model_not_found",
        route_s=None,
        first_s=None,
    )
    read = observed(refused)
    assert read["coe_requests_total", "/v1/chat/completions", "", "", "404", "g"] == 1
    assert not any("gtp-5" in part for key in read for part in key), "what a client wrote is never a label"
    counted = {name.removesuffix("_count") for name, *_ in read if name.endswith("_count")}
    assert counted == {"coe_request_seconds"}


def test_paths_that_a_client_invents_share_a_label() -> None:
    read = observed(*(finished(endpoint=f"/v1/{i}") for i in range(20)))
    assert [key for key in read if key[0] == "coe_requests_total"] == [
        ("coe_requests_total", "other", "good", "default", "200", "g")
    ]


def test_a_named_expert_has_no_policy_and_no_fallback() -> None:
    read = observed(finished(routed=bypassed("good")))
    assert read["coe_requests_total", "/v1/chat/completions", "good", "", "200", "g"] == 1
    assert not any(key[0] == "coe_fallbacks_total" for key in read)


def test_abstentions_and_fallbacks_are_counted_by_policy() -> None:
    unsure = inputs()
    by = policy(name="careful")
    decided = routed(made_from=unsure, by=by)
    abstained = finished(
        routed=type(decided)(
            decided.query,
            type(decided.decision)(("good",), (1.0,), (0.1,), 0.1, abstained=True),
            by,
            unsure,
            by.composition,
        )
    )
    stepped_in = finished(
        routed=decided, expert="general", answer=answer("general"), done={"fallback": answer("general")}
    )
    nobody = finished(routed=decided, expert=None, answer=None, status=503, error="engine_error")
    read = observed(abstained, stepped_in, nobody)
    assert read["coe_abstained_total", "careful", "g"] == 1
    assert read["coe_fallbacks_total", "careful", "g"] == 1
    assert read["coe_prompt_tokens_total", "general", "g"] == 7


def test_answers_without_price_or_timing_leave_those_out() -> None:
    read = observed(finished(answer=answer(cost_usd=None, timing=None)))
    names = {key[0] for key in read}
    assert "coe_prompt_tokens_total" in names
    assert not names & {"coe_cost_usd_total", "coe_engine_seconds_count", "coe_gateway_seconds_count"}
    assert observed(finished(answer=answer(timing=Timing(0, 0, 0))))["coe_load_seconds_count", "good", "g"] == 1


async def test_gauges_are_what_they_are_now_and_lost_decisions_are_asked_for() -> None:
    lost, running = [0], [7]
    metrics = Metrics("g", dropped=lambda: lost[0], in_flight=lambda: running[0])
    before = values(metrics.page())
    assert (before["coe_decisions_dropped_total", "g"], before["coe_in_flight", "g"]) == (0, 7)
    lost[0], running[0] = 12, 3
    page, content_type = await metrics.render()
    read = values(page)
    assert (read["coe_in_flight", "g"], read["coe_decisions_dropped_total", "g"]) == (3, 12)
    assert read["coe_gateways", ""] == 1
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_scrape_of_any_gateway_is_of_all_of_them() -> None:
    gateways: list[Metrics] = []

    async def pages() -> list[bytes]:
        return [gateway.page() for gateway in gateways]

    gateways += [Metrics(f"g{i}", pages=pages) for i in range(3)]
    gateways[0].observe(finished())
    gateways[2].observe(finished())
    gateways[2].observe(finished(expert="cheap", answer=answer("cheap")))
    (first, _), (second, _) = await gateways[0].render(), await gateways[1].render()
    assert first == second
    read = values(first)
    chat = "/v1/chat/completions"
    assert read["coe_requests_total", chat, "good", "default", "200", "g0"] == 1
    assert read["coe_requests_total", chat, "good", "default", "200", "g2"] == 1
    assert sum(value for key, value in read.items() if key[0] == "coe_requests_total") == 3
    assert read["coe_request_seconds_count", chat, "g2"] == 2
    assert read["coe_gateways", ""] == 3
    lines = first.decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(set(types)) == len(types) and "# TYPE coe_requests_total counter" in types
    assert "# TYPE coe_request_seconds histogram" in types and not any("_created" in line for line in lines)


def test_odd_names_survive_the_joining() -> None:
    odd = 'a"b\\c\nd\r# HELP e'
    metrics = Metrics(odd)
    metrics.observe(finished(routed=bypassed(odd), expert=odd, answer=answer(odd)))
    assert values(join([metrics.page(), Metrics("g").page()]))["coe_prompt_tokens_total", odd, odd] == 7


def test_processes_tell_themselves_apart() -> None:
    [gateway] = {key[-1] for key in values(Metrics().page())}
    assert gateway.rpartition("-")[2].isdigit()


def test_the_time_to_the_first_token_of_a_stream_is_split_by_where_it_was_spent() -> None:
    def reply(*, streamed: str | None, first_s: float | None, earlier_s: float = 0.0, calls: int = 1) -> Reply:
        timing = Timing(0.5, 1.5, 3.0, first_s)
        done = {str(i): answer(timing=timing) for i in range(calls)}
        made = Reply(routed(), streamed=streamed, earlier_s=earlier_s)
        made.done.update(done)
        return made

    single = first_token_parts(2.75, [reply(streamed="0", first_s=0.25)])
    assert single == {"gateway": 0.5, "queue": 0.5, "load": 1.5, "engine": 0.25}
    composed = first_token_parts(7.75, [reply(streamed="2", first_s=0.25, earlier_s=5.0, calls=3)])
    assert composed == {"gateway": 0.5, "calls": 5.0, "queue": 0.5, "load": 1.5, "engine": 0.25}
    whole = reply(streamed=None, first_s=0.25)
    silent = reply(streamed="0", first_s=None)
    for first_s, replies in ((None, [whole]), (4.0, [whole]), (4.0, [silent]), (4.0, [whole, whole])):
        assert first_token_parts(first_s, replies) == {}

    read = observed(finished(first_parts=single), finished(first_parts=single))
    for part, seconds in single.items():
        assert read["coe_first_token_part_seconds_count", "good", part, "g"] == 2
        assert read["coe_first_token_part_seconds_sum", "good", part, "g"] == pytest.approx(2 * seconds)


async def test_a_streamed_answer_states_its_parts_and_another_does_not() -> None:
    async with gateway(token_delay_s=0.002) as served:
        for stream in (True, False):
            sent = await served.client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": "a b c d"}], stream=stream
            )
            if stream:
                async for _ in sent:
                    pass
        streamed, whole = await served.log.ended(2)
    assert whole.first_parts == {} and streamed.first_parts.keys() == {"gateway", "queue", "load", "engine"}
    assert streamed.first_s is not None and streamed.answer and streamed.answer.timing
    assert sum(streamed.first_parts.values()) == pytest.approx(streamed.first_s)
    assert 0.002 <= streamed.first_parts["engine"] < streamed.answer.timing.engine_s
