"""The official OpenAI client against `moesaic up`."""
import json
import pathlib
import typing

import openai
import pydantic
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "deploy/models/demo-moe/chat_golden.json").read_text())


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.http + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.mark.parametrize("messages,answer", [(c["messages"], c["greedy_text"]) for c in GOLDEN])
def test_chat_equals_the_reference(client, model, messages, answer):
    got = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=96)
    assert got.choices[0].message.content == answer
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_streaming_equals_not_streaming(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "What is the currency of Japan?"}], temperature=0, max_tokens=60)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_completion_with_logprobs_and_stop(client, model):
    got = client.completions.create(model=model, prompt="The currency of", max_tokens=12, temperature=0, logprobs=3)
    lp = got.choices[0].logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == got.usage.completion_tokens
    assert all(v <= 0 for v in lp.token_logprobs)
    assert all(max(top.values()) == pytest.approx(v, abs=1e-4) for top, v in zip(lp.top_logprobs, lp.token_logprobs))
    text = got.choices[0].text
    cut = client.completions.create(model=model, prompt="The currency of", max_tokens=12, temperature=0, stop=[text[3:6]])
    assert cut.choices[0].text == text[: text.index(text[3:6])]
    assert cut.choices[0].finish_reason == "stop"


def test_chat_logprobs(client, model):
    got = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=5, logprobs=True, top_logprobs=2)
    content = got.choices[0].logprobs.content
    assert len(content) >= 1 and all(len(c.top_logprobs) == 2 for c in content)
    assert content[0].token == content[0].top_logprobs[0].token
    assert bytes(content[0].bytes).decode() == content[0].token


def test_n_and_seed(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Tell me a story."}], temperature=1.0, max_tokens=24, seed=7, n=3)
    a, b = (client.chat.completions.create(**ask) for _ in range(2))
    assert [c.message.content for c in a.choices] == [c.message.content for c in b.choices]
    assert len({c.message.content for c in a.choices}) > 1


def test_json_schema(client, model):
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": False}
    for seed in range(3):
        got = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Who?"}], max_tokens=120, temperature=1.0, seed=seed,
                                             response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}})
        value = json.loads(got.choices[0].message.content)
        assert set(value) == {"name", "age"} and 0 <= value["age"] <= 99


def test_parse_with_a_strict_schema_needs_few_tokens(client, model):
    class Item(pydantic.BaseModel):
        kind: typing.Literal["book", "game"]
        count: int = pydantic.Field(ge=0, le=99)
        tags: list[typing.Literal["new", "old"]] = pydantic.Field(max_length=2)

    for seed in range(3):
        got = client.chat.completions.parse(model=model, messages=[{"role": "user", "content": "What?"}], temperature=1.0, seed=seed, max_tokens=300, response_format=Item)
        assert got.choices[0].finish_reason == "stop" and got.choices[0].message.parsed.count <= 99
        assert not any(c.isspace() for c in got.choices[0].message.content)


def test_json_ends_with_its_value(client, model):
    # no max_tokens: nothing but the end of the value ends it
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"], "additionalProperties": False}
    for strict in (True, False):
        got = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "One?"}], temperature=0,
                                             response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}})
        assert got.choices[0].finish_reason == "stop" and got.usage.completion_tokens < 60
        assert set(json.loads(got.choices[0].message.content)) == {"a"}


@pytest.mark.parametrize("extra", [
    {"guided_regex": "[^\\s\\S]"},
    {"guided_json": {"$ref": "#"}},
    {"guided_regex": "((a{1,200}){1,200}){1,200}b"},
])
def test_grammars_that_cannot_be_followed_are_the_clients_mistake(client, model, extra):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], extra_body=extra)
    assert e.value.body["param"] == next(iter(extra))


def test_tools_required(client, model):
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False}}}
    ask = dict(model=model, messages=[{"role": "user", "content": "Weather?"}], tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80, temperature=0)
    got = client.chat.completions.create(**ask)
    call = got.choices[0].message.tool_calls[0]
    assert got.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather" and json.loads(call.function.arguments)["unit"] in ("C", "F")
    chunks = list(client.chat.completions.create(**ask, stream=True))
    arguments = "".join(t.function.arguments or "" for c in chunks for t in (c.choices[0].delta.tool_calls or []))
    assert json.loads(arguments) == json.loads(call.function.arguments)


def test_several_tools_may_be_required(client, model):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}}
    got = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Go"}], tools=[tool], tool_choice="required", temperature=0)
    calls = got.choices[0].message.tool_calls
    assert got.choices[0].finish_reason == "tool_calls" and 1 <= len(calls) <= 16
    assert all(call.function.name == "f" and json.loads(call.function.arguments)["a"] in (1, 2) for call in calls)


def test_prefix_is_cached(client, model):
    text = "A long shared beginning about blocks of keys and values. " * 30
    ask = dict(model=model, prompt=text, max_tokens=4, temperature=0)
    cold, warm = client.completions.create(**ask), client.completions.create(**ask)
    assert cold.choices[0].text == warm.choices[0].text
    assert warm.usage.prompt_tokens_details.cached_tokens >= 64


@pytest.mark.parametrize("change,status,param", [
    (dict(model="no-such-model"), 404, "model"),
    (dict(temperature=-1), 400, "temperature"),
    (dict(n=0), 400, "n"),
    (dict(messages=[]), 400, "messages"),
    (dict(max_tokens=0), 400, "max_tokens"),
    (dict(stop=["x"] * 100), 400, "stop"),
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}), 400, "response_format"),
])
def test_errors_name_the_field(client, model, change, status, param):
    ask = dict(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4) | change
    with pytest.raises(openai.APIStatusError) as e:
        client.chat.completions.create(**ask)
    assert e.value.status_code == status
    assert e.value.body["param"].startswith(param) and e.value.body["message"]
    assert e.value.response.headers["x-request-id"]
