"""The official client against the server: what people's tools do."""

import asyncio
import dataclasses
import json
from concurrent import futures
from typing import Literal

import openai
import pydantic
import pytest

from tests.orthrus_jax.server.test_failures import PLAIN, slow
from tests.support.engine import hashing
from tests.support.server import greedy_answer, running

MESSAGES = [{"role": "user", "content": "6 green trees"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "bc"]}, "count": {"enum": [1, 23]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


class Thing(pydantic.BaseModel):
    name: Literal["a", "bc"]
    count: Literal[1, 23]


def client_of(server, key: str = "none", kind=openai.OpenAI, retries: int = 0):
    return kind(base_url=f"{server.url}/v1", api_key=key, max_retries=retries, timeout=120)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return client_of(server)


def expected(budget: int = 20) -> str:
    return greedy_answer(MESSAGES[0]["content"], budget)


def chat(client, **options):
    defaults = {"model": "hash", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    return client.chat.completions.create(**defaults | options)


def test_client_chats(client) -> None:
    answer = chat(client)
    assert answer.choices[0].message.content == expected()
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.model_extra["orthrus"]["cycles"] > 0
    assert [model.id for model in client.models.list()] == ["hash", "hash:ar"]


def test_client_streams(client) -> None:
    stream = chat(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == expected()
    assert chunks[-1].usage.completion_tokens == 20


def test_client_samples_with_n_and_seed(client) -> None:
    options = {"temperature": 1.0, "n": 3, "seed": 11, "top_p": 0.9}
    first, again = (
        [choice.message.content for choice in chat(client, **options).choices] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_client_gets_logprobs(client) -> None:
    answer = chat(client, logprobs=True)
    content = answer.choices[0].logprobs.content
    assert len(content) == 20
    assert "".join(token.token for token in content) == expected()
    completion = client.completions.create(
        model="hash", prompt="trees", temperature=0, max_tokens=8, logprobs=0
    )
    assert len(completion.choices[0].logprobs.token_logprobs) == 8


def test_client_stops(client) -> None:
    text = expected(40)
    answer = chat(client, max_tokens=40, stop=text[8:11])
    assert answer.choices[0].message.content == text[: text.find(text[8:11])]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("model", ["hash", "hash:ar"])
def test_client_gets_json_of_its_schema(client, model, temperature) -> None:
    answer = chat(
        client,
        model=model,
        temperature=temperature,
        max_tokens=150,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert value["name"] in ("a", "bc")
    assert value["count"] in (1, 23)


def test_client_parses_an_answer_into_its_class(client) -> None:
    answer = client.chat.completions.parse(
        model="hash", messages=MESSAGES, temperature=0, max_tokens=150, response_format=Thing
    )
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_client_streams_several_completions_at_once(client) -> None:
    options = {"model": "hash", "prompt": ["trees", "6"], "temperature": 0.9, "seed": 4, "n": 2}
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**options, max_tokens=12, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    whole = client.completions.create(**options, max_tokens=12)
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_client_sends_tools_which_the_template_reads(client) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    plain, with_tools = chat(client), chat(client, tools=[tool])
    assert with_tools.choices[0].message.tool_calls is None
    assert with_tools.usage.prompt_tokens >= plain.usage.prompt_tokens


def test_client_that_leaves_a_stream_frees_its_row(client, server) -> None:
    stream = chat(client, stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    server.wait_until_idle()
    assert chat(client).choices[0].message.content == expected()


def test_client_that_gives_up_a_whole_answer_frees_its_row(client, server, monkeypatch) -> None:
    slow(monkeypatch)
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.5), max_tokens=200)

    async def cancelled() -> None:
        async with client_of(server, kind=openai.AsyncOpenAI) as other:
            task = asyncio.create_task(chat(other, max_tokens=200))
            await asyncio.sleep(0.5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()

    asyncio.run(cancelled())
    server.wait_until_idle()
    monkeypatch.undo()
    assert chat(client).choices[0].message.content == expected()


def test_client_is_told_of_a_full_queue_and_comes_back(monkeypatch) -> None:
    slow(monkeypatch)
    settings = dataclasses.replace(PLAIN, max_batch=1, max_queue=0)
    with running(hashing(), settings) as server, futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.chat, max_tokens=60)
        while server.service.open_answers != 1:
            assert not first.done()
        with pytest.raises(openai.RateLimitError) as error:
            chat(client_of(server))
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1
        patient = chat(client_of(server, retries=9))
        assert patient.choices[0].message.content == expected()
        assert first.result().status_code == 200


def test_client_needs_the_key() -> None:
    with running(hashing(), dataclasses.replace(PLAIN, api_key="secret")) as server:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            chat(client_of(server))
        assert chat(client_of(server, "secret")).choices[0].message.content == expected()


def test_client_reads_errors(client) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, messages=[{"role": "user", "content": "long " * 300}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has hash, hash:ar"):
        chat(client, model="other")
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, frequency_penalty=0.3)
    assert error.value.param == "frequency_penalty"
    assert error.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        chat(
            client,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )
