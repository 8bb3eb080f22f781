"""`/v1/embeddings` by a policy: one expert for all inputs, what `auto` is, keys, refusals, `/v1/route` and the log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from api_server import Gateway, Words, expert, gateway
from test_serve_embeddings import embedder, post

from coe.compose import Vote
from coe.config import DecisionLogConfig
from coe.engines.fake_answers import vectors_of
from coe.policy import Always, Policy
from coe.serve.decisions.entry import decode
from coe.serve.decisions.log import DecisionLog
from coe.serve.decisions.replay import ReplayReport
from coe.serve.http.keyring import Keyring, StoredKeys
from coe.serve.http.ledger import Ledger
from registry.keys import KeySpec, Limit
from registry.store import Registry
from routers.conversation.turns import MOST_INPUTS
from routers.selectors import TopK

EXPERTS = (expert("chat"), embedder("law"), embedder("cooking"), embedder("ghost", "fake://fail"))


def policies(**more: Policy) -> dict[str, Policy]:
    return {
        "default": Policy("default", Words(("chat",))),
        "vectors": Policy("vectors", Words(("law", "cooking")), router_digest="sha256:2"),
        **more,
    }


def routed(**options: Any) -> Any:
    more = options.pop("more", {})
    return gateway(experts=EXPERTS, policies=policies(**more), **options)


async def create(there: Gateway, given: Any, model: str = "auto", **fields: Any) -> Any:
    return await there.client.embeddings.create(model=model, input=given, encoding_format="float", **fields)


@pytest.mark.parametrize("model", ["auto", "coe/vectors"])
async def test_the_expert_of_the_text_embeds_it_and_the_answer_names_it(model: str) -> None:
    async with routed() as there:
        for text, wanted in (("a cooking recipe", "cooking"), ("a law case", "law"), ("anything", "law")):
            answer = await there.client.embeddings.with_raw_response.create(model=model, input=text, dimensions=16)
            assert answer.headers["x-coe-expert"] == answer.parse().model == wanted
            assert answer.headers["x-coe-router"] == "vectors"
            assert answer.headers["x-coe-confidence"] == ("0.5000" if text == "anything" else "0.9000")
            assert np.allclose(answer.parse().data[0].embedding, vectors_of([text])[0])


async def test_all_inputs_are_embedded_by_the_expert_of_the_highest_mean() -> None:
    async with routed() as there:
        texts = ["law", "cooking one", "cooking two"]
        answer = await create(there, texts)
        assert answer.model == "cooking" and [each.index for each in answer.data] == [0, 1, 2]
        assert np.allclose([each.embedding for each in answer.data], vectors_of(texts))
        assert there.engine.tally.generations == {"cooking": 1}
        assert (await create(there, [*texts, "law", "law"])).model == "law"


async def test_the_inputs_that_vote_are_few_and_spread_over_all() -> None:
    """The votes of 2,048 inputs would keep the thread of the router busy for seconds."""
    async with routed() as there:
        read: list[int] = []
        router: Any = there.service.orchestrator.policies["vectors"].router
        estimate = router.estimate
        router.estimate = lambda queries: read.append(len(queries)) or estimate(queries)
        answer = await create(there, ["law"] * 900 + ["cooking"] * 1100)
        assert answer.model == "cooking" and len(answer.data) == 2000
        assert read == [MOST_INPUTS]


async def test_token_ids_cannot_be_routed_unless_the_policy_names_the_expert() -> None:
    async with routed(more={"one": Policy("one", Always("cooking"))}) as there:
        error = (await post(there, 400, model="coe/vectors", input=[[5, 6], [7]]))["error"]
        assert error["param"] == "input"
        assert error["message"].startswith("input: token ids are of one expert's tokenizer, and a router cannot read")
        answer = await create(there, [[5, 6], [7]], "coe/one")
        assert answer.model == "cooking" and np.allclose(answer.data[0].embedding, vectors_of([(5, 6)])[0])


async def test_auto_needs_exactly_one_policy_of_embedding_models() -> None:
    async with routed(more={"other": Policy("other", Words(("cooking",)))}) as there:
        error = (await post(there, 400, model="auto", input="a"))["error"]
        assert "several policies choose among embedding models: name one of coe/vectors, coe/other" in error["message"]
    mixed = {"vectors": Policy("vectors", Words(("chat", "law")))}
    async with routed(more=mixed) as there:  # an embedding model beside others is no reason to embed by default
        error = (await post(there, 400, model="auto", input="a"))["error"]
        assert error["param"] == "model" and "no policy chooses only among embedding models" in error["message"]
        assert (await create(there, "chat", "coe/vectors")).model == "law"  # never the expert that cannot embed
        error = (await post(there, 400, model="coe/default", input="a"))["error"]
        assert "'coe/default' chooses among experts that return no embeddings: name one of coe/vec" in error["message"]
        assert (await post(there, 404, model="coe/vektors", input="a"))["error"]["code"] == "model_not_found"


async def test_chat_never_reaches_an_embedding_model() -> None:
    mixed = {"default": Policy("default", Words(("law", "chat")))}
    async with routed(more=mixed) as there:
        hi: Any = [{"role": "user", "content": "law"}]
        answer = await there.client.chat.completions.create(model="auto", messages=hi)
        assert answer.model == "chat"
        with pytest.raises(openai.APIStatusError, match="cannot chat"):
            await there.client.chat.completions.create(model="coe/vectors", messages=hi)


async def test_allowed_and_excluded_experts() -> None:
    async with routed() as there:
        for own in ({"experts": ["law"]}, {"exclude": ["cooking"]}):
            assert (await create(there, "cooking", extra_body={"coe": own})).model == "law"
        error = (await post(there, 400, model="auto", input="a", coe={"experts": ["chat"]}))["error"]
        assert "no expert can take this query" in error["message"] and "cannot return an embedding" in error["message"]
        error = (await post(there, 400, model="law", input="a", coe={"experts": ["cooking"]}))["error"]
        assert "not among the allowed experts" in error["message"]


async def test_if_the_expert_fails_the_answer_names_the_one_that_embedded() -> None:
    failing = Policy("vectors", Words(("ghost", "law")), select=TopK(2))
    async with routed(more={"vectors": failing}) as there:
        answer = await there.client.embeddings.with_raw_response.create(model="auto", input="a")
        assert answer.parse().model == answer.headers["x-coe-expert"] == "law"
        assert "ghost" in answer.headers["x-coe-notes"]
    fallback = Policy("vectors", Words(("ghost",)), fallback="cooking")
    async with routed(more={"vectors": fallback}) as there:
        assert (await create(there, "a")).model == "cooking"
        assert (await create(there, "a", extra_body={"coe": {"exclude": ["ghost"]}})).model == "cooking"
    async with routed(more={"vectors": Policy("vectors", Words(("ghost",)), fallback="chat")}) as there:
        assert "ghost" in (await post(there, 500, model="auto", input="a"))["error"]["message"]  # chat cannot embed


async def test_vectors_are_not_voted_on() -> None:
    """A policy that combines texts embeds with the best expert, and says so."""
    voting = Policy("vectors", Words(("law", "cooking")), composition=Vote(), select=TopK(2))
    async with routed(more={"vectors": voting}) as there:
        answer = await there.client.embeddings.with_raw_response.create(model="auto", input="cooking")
        assert answer.parse().model == "cooking" and there.engine.tally.generations == {"cooking": 1}
        assert (
            "one expert answers: the composition of the policy combines texts, not emb" in answer.headers["x-coe-notes"]
        )


async def test_a_key_is_routed_among_its_experts_and_learns_of_no_other(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"

    def key(name: str, **fields: Any) -> str:
        with Registry(url) as registry:
            return registry.create_api_key(KeySpec(name=name, **fields), time.time())[1]

    law, chats = key("law", experts=("law",)), key("chat", experts=("chat",))
    embeds = key("vectors", policies=("vectors",))
    async with routed(keyring=Keyring(StoredKeys(url))) as there:

        async def ask(text: str, **body: Any) -> Any:
            headers = {"authorization": f"Bearer {text}"}
            return await there.http.post(
                "/v1/embeddings", json={"model": "auto", "input": "cooking"} | body, headers=headers
            )

        assert (await ask(law)).json()["model"] == "law"
        assert (await ask(embeds)).json()["model"] == "cooking"  # though it may not use the default policy
        for body in ({}, {"model": "chat"}, {"model": "coe/vectors"}):
            refused = await ask(chats, **body)
            assert refused.status_code == 400, refused.text
            assert "law" not in refused.text and "cooking" not in refused.text
        assert (await ask(law, model="cooking")).status_code == 404


async def test_texts_to_embed_count_for_the_limits_of_a_key(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with Registry(url) as registry:
        limit = Limit(what="tokens", per="month", most=300)
        key, secret = registry.create_api_key(KeySpec(name="ada", limits=(limit,)), time.time())
    headers = {"authorization": f"Bearer {secret}"}
    async with routed(keyring=Keyring(StoredKeys(url)), ledger=Ledger(lambda: Registry(url))) as there:
        for words, status in ((100, 200), (200, 200), (1, 429)):
            body = {"model": "auto", "input": ["word " * 20] * (words // 20) or "word"}
            response = await there.http.post("/v1/embeddings", json=body, headers=headers)
            assert response.status_code == status, response.text
            assert status != 200 or response.json()["usage"]["prompt_tokens"] == words
        assert there.engine.tally.generations == {"law": 2}
    with Registry(url) as registry:
        assert [*registry.used(key, time.time())] == [300]


async def test_the_decision_is_shown_logged_and_replays(tmp_path: Path) -> None:
    log = DecisionLog(DecisionLogConfig(folder=tmp_path, texts=True))
    async with routed() as there:
        body = {"model": "auto", "input": ["cooking", "law", "cooking"]}
        shown = (await there.http.post("/v1/route", json=body)).json()
        assert shown["model"] == "coe/vectors" and shown["decision"]["experts"] == ["cooking"]
        assert [turn["message"] for turn in shown["conversation"]["turns"]] == [0, 1, 2]
        assert there.engine.tally.generations == {}
        for model, expert_of, policy in (
            ("coe/vectors", "law", "vectors"),
            ("law", "law", None),
            ("auto", "chat", "default"),
        ):
            body_of_one = {"model": model, "input": "a text"}  # for `auto`, a response's: its default policy chats
            found = (await there.http.post("/v1/route", json=body_of_one)).json()
            assert (found["decision"]["experts"], found["policy"]) == ([expert_of], policy)
        assert (await there.http.post("/v1/route", json={"model": "law", "input": ""})).status_code == 400
        assert (await create(there, body["input"])).model == "cooking"
        finished = (await there.log.ended(6))[-1]
        assert (finished.model, finished.expert, finished.endpoint) == ("coe/vectors", "cooking", "/v1/embeddings")
        log.write(finished)
    log.close()
    [file] = sorted(tmp_path.iterdir())  # noqa: ASYNC240
    entry = decode(file.read_bytes(), "1")
    assert entry.query is not None and entry.query.embeds
    assert [message.content for message in entry.query.messages] == body["input"]
    report = ReplayReport()
    report.add(entry)
    assert report.repeated == 1
