"""Strict schemas, in pure Python: what is taken, and that nothing else ends in a crash."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_jax.server.problems import ApiError
from orthrus_jax.server.schema import chat_request, completion_request, parse_json

CALL = {"function": {"name": "f"}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    *("model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop"),
    *("max_tokens", "stream", "stream_options", "logprobs", "response_format", "guided_regex"),
    *("tools", "tool_choice", "chat_template_kwargs", "user", "logit_bias", "best_of", "echo"),
]


def test_defaults_are_the_protocols() -> None:
    request = chat_request(CHAT)
    options = request.options
    assert (options.temperature, options.top_p, options.n) == (1.0, 1.0, 1)
    assert (options.max_tokens, options.seed, options.stop, options.stream) == (
        None,
        None,
        (),
        False,
    )
    assert not request.thinking


def test_neutral_values_of_what_is_not_supported_are_taken() -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "top_logprobs": 0,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "store": False,
        "user": "someone",
        "response_format": {"type": "text"},
        "functions_are_null": None,
    }
    assert chat_request(CHAT | neutral) == chat_request(CHAT | {"logprobs": None})


def test_messages_become_what_the_template_takes() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    taken = chat_request(CHAT | {"messages": messages}).messages
    assert [m["role"] for m in taken] == ["system", "user", "assistant", "tool"]
    assert taken[0]["content"] == "ab"
    assert taken[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1e-300}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Eve"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
         "messages[0].tool_calls"),
        ({"guided_regex": "x", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(change, param) -> None:
    with pytest.raises(ApiError) as error:
        chat_request(CHAT | change)
    assert error.value.param == param
    assert error.value.status == 400


def refusal(call) -> ApiError | None:
    """What a call refuses with; any other exception fails the test."""
    try:
        call()
    except ApiError as error:
        return error
    return None


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_value_of_any_field_is_taken_or_refused(changes, chat) -> None:
    parse = chat_request if chat else completion_request
    body = json.dumps((CHAT if chat else {"model": "m", "prompt": "x"}) | changes)
    error = refusal(lambda: parse(parse_json(body.encode())))
    assert error is None or 400 <= error.status < 500
    json.dumps(error and error.body())


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_json_or_refused(body) -> None:
    error = refusal(lambda: parse_json(body))
    assert error is None or error.status == 400
