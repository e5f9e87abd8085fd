"""Requests of the protocol, strictly: a field is obeyed, or refused by name, never ignored.

Decides which values a client may send. Knows no tokenizer and no engine: whether a prompt fits is
known later.
"""

import dataclasses
import json
from typing import Any

from orthrus_jax.server.fields import (
    any_object,
    boolean,
    list_of,
    number,
    object_of,
    one_of,
    only,
    text,
    whole,
    wrong,
)
from orthrus_jax.server.problems import invalid

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_CHOICES = 128
MAX_GRAMMAR = 1 << 16  # characters
LEAST_TEMPERATURE = 1e-3  # below, logits over temperature leave float32
LEAST_TOP_P = 1e-6


@dataclasses.dataclass(frozen=True)
class GrammarSpec:
    """What an answer must follow: kind "json_schema" (a JSON text) or "regex", and its field."""

    kind: str
    source: str
    param: str


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that both endpoints share; see the protocol, and `SamplingParams`.

    Attributes:
      seed: None is a random one.
      max_tokens: None is all that the context leaves.
      include_usage: a stream ends with a chunk of usage.
      include_cycles: chunks say which text was drafted.
    """

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False
    include_cycles: bool = False
    grammar: GrammarSpec | None = None


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A dialogue to continue: messages and tools as the chat template takes them."""

    options: Options
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """Plain prompts to continue, texts or ids."""

    options: Options
    prompts: list[str | list[int]]


def parse_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ApiError: if it is none, or uses what JSON does not have (NaN, endless nesting).
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise invalid(f"the body is not JSON: {cause}") from None


def chat_request(body: Any) -> ChatRequest:
    """Check the body of /v1/chat/completions.

    Raises:
      ApiError: naming the field.
    """
    fields = _CHAT(body, "")
    kwargs = fields.get("chat_template_kwargs", {})
    return ChatRequest(
        _options(fields),
        [_message(m, f"messages[{i}]") for i, m in enumerate(fields["messages"])],
        fields.get("tools", []),
        kwargs.get("enable_thinking", False),
    )


def completion_request(body: Any) -> CompletionRequest:
    """Check the body of /v1/completions.

    Raises:
      ApiError: naming the field.
    """
    fields = _COMPLETION(body, "")
    options = _options(fields | {"logprobs": "logprobs" in fields})
    return CompletionRequest(options, fields["prompt"])


def _options(fields: dict[str, Any]) -> Options:
    most, other = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if most is not None and other is not None and most != other:
        raise invalid(
            f"max_tokens={most} and max_completion_tokens={other} differ", "max_completion_tokens"
        )
    stream = fields.get("stream_options", {})
    if stream and not fields.get("stream"):
        raise invalid("stream_options needs stream=true", "stream_options")
    names = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stream")
    given = {name: fields[name] for name in (*names, "logprobs") if name in fields}
    return Options(
        **given, **stream, max_tokens=other if most is None else most, grammar=_grammar(fields)
    )


def _grammar(fields: dict[str, Any]) -> GrammarSpec | None:
    wanted = fields.get("response_format", {"type": "text"})
    pattern = fields.get("guided_regex")
    if wanted["type"] == "text":
        return pattern and GrammarSpec("regex", pattern, "guided_regex")
    if pattern is not None:
        raise invalid("guided_regex beside response_format: give one of them", "guided_regex")
    if wanted["type"] == "json_object":
        return GrammarSpec("json_schema", '{"type": "object"}', "response_format")
    if "json_schema" not in wanted:
        raise invalid("response_format.json_schema is missing", "response_format.json_schema")
    source = json.dumps(wanted["json_schema"].get("schema", {}))
    if len(source) > MAX_GRAMMAR:
        raise invalid(f"the schema has over {MAX_GRAMMAR} characters", "response_format")
    return GrammarSpec("json_schema", source, "response_format")


# Messages


def _content(value: Any, path: str) -> str:
    if isinstance(value, list):
        return "".join(part["text"] for part in list_of(_PART)(value, path))
    return text()(value, path)


def _arguments(value: Any, path: str) -> Any:
    """A call's arguments as an object, which is how chat templates take them."""
    if isinstance(value, dict):
        return value
    try:
        return any_object(json.loads(text()(value, path)), path)
    except (ValueError, RecursionError):
        raise wrong(value, path, "a JSON object, as text") from None


def _message(message: dict[str, Any], path: str) -> dict[str, Any]:
    """A message as the chat template takes it."""
    role = message["role"]
    if "content" not in message and not (role == "assistant" and message.get("tool_calls")):
        raise invalid(f"{path}.content is missing", f"{path}.content")
    if message.get("tool_calls") and role != "assistant":
        raise invalid(f"{path}.tool_calls: only the assistant calls tools", f"{path}.tool_calls")
    if "tool_call_id" in message and role != "tool":
        raise invalid(f"{path}.tool_call_id needs role 'tool'", f"{path}.tool_call_id")
    role = "system" if role == "developer" else role
    kept = {name: x for name, x in message.items() if name in ("tool_calls", "tool_call_id")}
    return {"role": role, "content": message.get("content", "")} | kept


_PART = object_of({"type": one_of("text"), "text": text()}, ("type", "text"))
_FUNCTION = object_of(
    {"name": text(1, 256), "description": text(), "parameters": any_object, "strict": boolean},
    ("name",),
)
_CALL = object_of(
    {
        "id": text(),
        "type": one_of("function"),
        "function": object_of({"name": text(1, 256), "arguments": _arguments}, ("name",)),
    },
    ("function",),
)
_MESSAGE = object_of(
    {
        "role": one_of("system", "developer", "user", "assistant", "tool"),
        "content": _content,
        "tool_calls": list_of(_CALL),
        "tool_call_id": text(),
        "refusal": only("", why="this server has no refusals"),
        "name": only("", why="chat templates know no names"),
    },
    ("role",),
)
_TOOL = object_of({"type": one_of("function"), "function": _FUNCTION}, ("type", "function"))


# Fields


def _stop(value: Any, path: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    return tuple(list_of(text(1, MAX_STOP_LENGTH), most=MAX_STOPS)(values, path))


def _prompts(value: Any, path: str) -> list[str | list[int]]:
    ids = list_of(whole(0, (1 << 31) - 1), 1)
    if isinstance(value, str):
        return [text(1)(value, path)]
    if isinstance(value, list) and value and isinstance(value[0], int):
        return [ids(value, path)]
    one = lambda x, path: ids(x, path) if isinstance(x, list) else text(1)(x, path)
    return list_of(one, 1, MAX_CHOICES)(value, path)


_NO_ALTERNATIVES = "the loops keep log p of the chosen token alone"
_PENALTY = only(0, 0.0, why="the loops apply no penalties")
_SHARED = {
    "model": text(1, 256),
    "temperature": number(
        lambda x: x == 0 or LEAST_TEMPERATURE <= x <= 2, f"0, or {LEAST_TEMPERATURE} to 2"
    ),
    "top_p": number(lambda x: LEAST_TOP_P <= x <= 1, f"from {LEAST_TOP_P} to 1"),
    "top_k": whole(0, (1 << 31) - 1),
    "min_p": number(lambda x: 0 <= x < 1, "from 0 to below 1"),
    "seed": whole(0, (1 << 32) - 1),
    "n": whole(1, MAX_CHOICES),
    "max_tokens": whole(1, 1 << 24),
    "stop": _stop,
    "stream": boolean,
    "stream_options": object_of({"include_usage": boolean, "include_cycles": boolean}),
    "guided_regex": text(1, MAX_GRAMMAR),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": only({}, why="the loops bias no tokens"),
    "user": text(),  # names the client's user; no answer depends on it
}
_CHAT = object_of(
    {
        **_SHARED,
        "messages": list_of(_MESSAGE, 1),
        "max_completion_tokens": whole(1, 1 << 24),
        "logprobs": boolean,
        "top_logprobs": only(0, why=_NO_ALTERNATIVES),
        "tools": list_of(_TOOL, most=128),
        "tool_choice": only("auto", why="calls come back as text, whenever the model writes one"),
        "parallel_tool_calls": only(True, why="calls come back as text"),
        "chat_template_kwargs": object_of({"enable_thinking": boolean}),
        "response_format": object_of(
            {
                "type": one_of("text", "json_object", "json_schema"),
                "json_schema": object_of(
                    {
                        "name": text(1, 256),
                        "description": text(),
                        "schema": any_object,
                        "strict": boolean,
                    },
                    ("name",),
                ),
            },
            ("type",),
        ),
        "modalities": only(["text"], why="answers are text"),
        "store": only(False, why="nothing is kept"),
        "service_tier": only("auto", "default", why="there is one tier"),
    },
    ("model", "messages"),
)
_COMPLETION = object_of(
    {
        **_SHARED,
        "prompt": _prompts,
        "logprobs": only(0, why=_NO_ALTERNATIVES),
        "echo": only(False, why="answers alone are returned"),
        "best_of": only(1, why="no answers are dropped"),
        "suffix": only("", why="the model writes from left to right"),
    },
    ("model", "prompt"),
)
