"""What /openapi.json says: the paths, what they take, made of the table of fields, and what they answer.

Knows JSON schema's words; knows nothing of how a request is answered.
"""

from __future__ import annotations

from typing import Any

from eyas.serve.fields import CHAT, TEXT, Field, fields_of

STRING, INTEGER, BOOLEAN, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
SLOTS = {"type": "array", "items": {"type": "object", "required": ["id", "n_ctx", "is_processing"]}}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
REFUSALS = {
    400: "the request is refused",
    401: "no key, or a wrong one",
    403: "not from there",
    404: "no such model, or no such path",
    408: "the request did not come in time",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "the queue is full",
    500: "the server failed",
    503: "the server is loading or ending",
}


def openapi(version: str) -> dict[str, Any]:
    paths = {
        "/v1/chat/completions": {"post": generated(CHAT, "messages")},
        "/v1/completions": {"post": generated(TEXT, "prompt")},
        "/tokenize": {"post": post("tokenize", {"content": STRING}, ["content"], {"tokens": TOKENS, "count": INTEGER})},
        "/detokenize": {"post": post("detokenize", {"tokens": TOKENS}, ["tokens"], {"content": STRING})},
        "/apply-template": {"post": post("template", described(CHAT), ["messages"], {"prompt": STRING})},
        "/v1/models": {"get": get("models", {"object": STRING, "data": {"type": "array", "items": OBJECT}})},
        "/v1/models/{name}": {"get": {**get("model", {"id": STRING, "object": STRING}), "parameters": [named("name")]}},
        "/health": {"get": get("health", {"status": STRING})},
        "/livez": {"get": get("livez", {"status": STRING})},
        "/props": {"get": get("props", {"total_slots": INTEGER, "default_generation_settings": OBJECT, "eyas": OBJECT})},
        "/slots": {"get": {"operationId": "slots", "responses": {**refusals(), "200": content("the slots", "application/json", SLOTS)}}},
        "/v1/requests/{name}/cancel": {"post": {**get("cancel", {"id": STRING, "cancelled": INTEGER}), "parameters": [named("name")]}},
        "/metrics": {"get": {"operationId": "metrics", "responses": {**refusals(), "200": content("as it is", "text/plain", STRING)}}},
    }
    return {"openapi": "3.1.0", "info": {"title": "eyas serve", "version": version}, "paths": paths}


def generated(kind: str, required: str) -> dict[str, Any]:
    """Chat or completions."""
    choice = whole({"index": INTEGER, "finish_reason": {"type": ["string", "null"]}})
    counts = whole({name: INTEGER for name in ("prompt_tokens", "completion_tokens", "total_tokens")})
    told = {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING, "system_fingerprint": STRING}
    told |= {"choices": {"type": "array", "minItems": 1, "items": choice}, "usage": counts, "timings": OBJECT, "eyas": OBJECT}
    found = post(kind, described(kind), [required], told)
    found["responses"]["200"]["content"]["text/event-stream"] = {"schema": STRING}  # under `stream`
    return found


def described(kind: str) -> dict[str, Any]:
    return {name: field_schema(field) for name, field in fields_of(kind).items()}


def field_schema(field: Field) -> dict[str, Any]:
    told = {"description": field.meaning, **({} if field.default in (None, ()) else {"default": field.default})}
    return {**told, "anyOf": [field.schema, {"type": "null"}]} if field.schema else told  # a null is a field left out


def post(name: str, takes: dict[str, Any], required: list[str], answers: dict[str, Any]) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": {**OBJECT, "required": required, "properties": takes}}}}
    return {**get(name, answers), "requestBody": body}


def get(name: str, answers: dict[str, Any]) -> dict[str, Any]:
    return {"operationId": name, "responses": {**refusals(), "200": content("the answer", "application/json", whole(answers))}}


def refusals() -> dict[str, Any]:
    words = {"type": ["string", "null"]}
    error = whole({"error": whole({"message": STRING, "type": STRING, "param": words, "code": words})})
    return {str(status): content(what, "application/json", error) for status, what in REFUSALS.items()}


def content(what: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": {kind: {"schema": schema}}}


def whole(properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these."""
    return {**OBJECT, "required": list(properties), "properties": properties}


def named(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": STRING}
