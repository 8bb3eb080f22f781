"""LangChain: `ChatOpenAI` with `bind_tools` and `with_structured_output`, and an agent that calls a tool."""

from __future__ import annotations

from feature import CAPITAL, LONG, OBJECT, PERSON, PIXEL, REPORT, TWO_CITIES, WEATHER, Endpoint, feature, main, raises
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: {REPORT}"


def _chat(at: Endpoint, **settings: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=at.url, api_key="none", model=at.expert, max_retries=0, timeout=120, **settings)


@feature("chat")
def chat(at: Endpoint) -> None:
    answer = _chat(at, max_tokens=20, temperature=0).invoke([SystemMessage("Be brief."), HumanMessage(CAPITAL)])
    assert answer.content == "The capital of France is Paris." and answer.usage_metadata["output_tokens"] > 0


@feature("stream")
def stream(at: Endpoint) -> None:
    pieces = list(_chat(at, max_tokens=20, stream_usage=True).stream(CAPITAL))
    assert "".join(piece.text for piece in pieces) == "The capital of France is Paris." and len(pieces) > 2
    assert any(piece.usage_metadata for piece in pieces)


@feature("history")
def history(at: Endpoint) -> None:
    model = _chat(at, max_tokens=20)
    first = model.invoke(CAPITAL)
    assert "Paris" in model.invoke([HumanMessage(CAPITAL), first, HumanMessage(CAPITAL)]).text


@feature("tools")
def tools(at: Endpoint) -> None:
    answer = _chat(at, max_tokens=60).bind_tools([get_weather], tool_choice="any").invoke(WEATHER)
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"] and not answer.invalid_tool_calls
    assert set(answer.tool_calls[0]["args"]) == {"city"}
    assert not at.scripted or answer.tool_calls[0]["args"] == {"city": "Paris"}


@feature("tools, named")
def tools_named(at: Endpoint) -> None:
    answer = _chat(at, max_tokens=60).bind_tools([get_weather], tool_choice="get_weather", strict=True).invoke(CAPITAL)
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]


@feature("tools, parallel", scripted=True)
def tools_parallel(at: Endpoint) -> None:
    several = _chat(at).bind_tools([get_weather]).invoke(TWO_CITIES)
    one = _chat(at).bind_tools([get_weather], parallel_tool_calls=False).invoke(TWO_CITIES)
    assert [call["args"]["city"] for call in several.tool_calls] == ["Paris", "Rome"] and len(one.tool_calls) == 1


@feature("tools, streamed", scripted=True)
def tools_streamed(at: Endpoint) -> None:
    pieces = list(_chat(at).bind_tools([get_weather]).stream(WEATHER))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Paris"})]
    assert sum(bool(piece.tool_call_chunks) for piece in pieces) > 1


@feature("tools, results", scripted=True)
def tools_results(at: Endpoint) -> None:
    model = _chat(at).bind_tools([get_weather])
    called: AIMessage = model.invoke(WEATHER)
    results = [ToolMessage(REPORT, tool_call_id=call["id"]) for call in called.tool_calls]
    assert results and REPORT in model.invoke([HumanMessage(WEATHER), called, *results]).text


@feature("agent", scripted=True)
def agent(at: Endpoint) -> None:
    runs = create_agent(_chat(at), [get_weather], system_prompt="Use tools.")
    messages = runs.invoke({"messages": [HumanMessage(WEATHER)]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert f"Paris: {REPORT}" in messages[-1].text


@feature("agent, streamed", scripted=True)
def agent_streamed(at: Endpoint) -> None:
    runs = create_agent(_chat(at, streaming=True), [get_weather])
    pieces = [piece for piece, _ in runs.stream({"messages": [HumanMessage(WEATHER)]}, stream_mode="messages")]
    texts = [piece.text for piece in pieces if piece.type == "AIMessageChunk" and piece.text]
    assert f"Paris: {REPORT}" in "".join(texts) and len(texts) > 1


@feature("agent, typed answer", scripted=True)
def agent_typed(at: Endpoint) -> None:
    runs = create_agent(_chat(at), [get_weather], response_format=Person)
    assert isinstance(runs.invoke({"messages": [HumanMessage(WEATHER)]})["structured_response"], Person)


@feature("JSON schema")
def json_schema(at: Endpoint) -> None:
    person = _chat(at, max_tokens=60).with_structured_output(Person).invoke(PERSON)
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("JSON schema, streamed")
def json_schema_streamed(at: Endpoint) -> None:
    *_, person = _chat(at, max_tokens=60).with_structured_output(Person).stream(PERSON)
    assert isinstance(person, Person)


@feature("schema as tool")
def schema_as_tool(at: Endpoint) -> None:
    person = _chat(at, max_tokens=60).with_structured_output(Person, method="function_calling").invoke(PERSON)
    assert isinstance(person, Person) and (not at.scripted or person == Person(name="Ada Lovelace", age=36))


@feature("JSON object")
def json_object(at: Endpoint) -> None:
    answer = _chat(at, max_tokens=80).with_structured_output(method="json_mode").invoke(OBJECT)
    assert isinstance(answer, dict)


@feature("logprobs")
def logprobs(at: Endpoint) -> None:
    answer = _chat(at, max_tokens=20, logprobs=True, top_logprobs=2).invoke(CAPITAL)
    scores = answer.response_metadata["logprobs"]["content"]
    assert "".join(score["token"] for score in scores).startswith(answer.text)
    assert all(score["logprob"] <= 0 and len(score["top_logprobs"]) == 2 for score in scores)


@feature("n > 1")
def several(at: Endpoint) -> None:
    result = _chat(at, max_tokens=20, n=3, temperature=0.7, seed=1).generate([[HumanMessage(CAPITAL)]])
    assert len(result.generations[0]) == 3


@feature("images")
def images(at: Endpoint) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    assert _chat(at, max_tokens=20).invoke([HumanMessage(parts)]).text == "The number of images is 1."


@feature("reasoning")
def reasoning(at: Endpoint) -> None:
    assert "Paris" in _chat(at, max_tokens=20, reasoning_effort="low").invoke(CAPITAL).text


@feature("completions")
def completions(at: Endpoint) -> None:
    model = OpenAI(base_url=at.url, api_key="none", model=at.expert, max_retries=0, max_tokens=8, temperature=0)
    assert "Paris" in model.invoke("The capital of France is")
    assert "Paris" in "".join(model.stream("The capital of France is"))


@feature("several prompts")
def several_prompts(at: Endpoint) -> None:
    model = OpenAI(base_url=at.url, api_key="none", model=at.expert, max_retries=0, max_tokens=8, temperature=0)
    answers = model.generate(["The capital of France is", "I count to four: one, two,"]).generations
    assert len(answers) == 2 and "Paris" in answers[0][0].text


@feature("error: context")
def context_error(at: Endpoint) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with raises(ContextOverflowError):
        _chat(at, max_tokens=5).invoke(LONG)


@feature("error: model")
def model_error(at: Endpoint) -> None:
    import openai

    with raises(openai.NotFoundError):
        ChatOpenAI(base_url=at.url, api_key="none", model="nothing-like-it", max_retries=0).invoke(CAPITAL)


if __name__ == "__main__":
    main("langchain-openai")
