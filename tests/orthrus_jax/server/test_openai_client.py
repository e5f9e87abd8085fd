"""The official client against the server: what people's tools do."""

import json

import openai
import pytest

from orthrus_jax.tokenizer import decode, encode
from tests.support.engine import table_of, tokenizer
from tests.support.fake_models.hashed import greedy_text

MESSAGES = [{"role": "user", "content": "6 green trees"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "bc"]}, "count": {"enum": [1, 23]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def expected(budget: int = 20) -> str:
    ids = encode(tokenizer(), MESSAGES[0]["content"], chat=True)
    return decode(tokenizer(), greedy_text(ids, table_of("plain"), budget))


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


def test_client_reads_errors(client) -> None:
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
