"""OpenAPI of a table of routes: the messages between machines, as msgspec describes them."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from farflung.net.server import Endpoint, Route
from farflung.protocol import wire

_PLACE = "#/components/schemas/{name}"
_REFUSED = {"description": "refused", "content": {"application/problem+json": {}}}


def openapi(routes: Sequence[Route], title: str, version: str) -> Endpoint:
    """The endpoint of `GET /openapi.json`; the document is made at the first request."""
    described = cache(lambda: schema_of(routes, title, version))

    async def endpoint(_: Request) -> Response:
        return JSONResponse(described())

    return endpoint


def schema_of(routes: Sequence[Route], title: str, version: str) -> dict[str, Any]:
    """The description of all routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    types = frozenset(kind for route in routes for kind in (route.takes, route.gives) if kind is not None)
    _, components = msgspec.json.schema_components(types, ref_template=_PLACE)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route) -> dict[str, Any]:
    name = route.handler.__name__
    described: dict[str, Any] = {
        "summary": name.replace("_", " ").title(),
        "description": route.handler.__doc__,
        "operationId": re.sub(r"\W", "_", f"{name}{route.path}_{route.method.lower()}"),
        "parameters": [_path_parameter(part) for part in re.findall(r"\{(\w+)\}", route.path)],
        "responses": {"200": {"description": "Successful Response"}, "4XX": _REFUSED},
    }
    if route.raw:
        described["requestBody"] = {"content": {"application/octet-stream": {}}}
    elif route.takes is not None:
        content = dict.fromkeys((wire.JSON, wire.MSGPACK), _of(route.takes))
        described["requestBody"] = {"required": True, "content": content}
    if route.gives is not None:
        described["responses"]["200"] = {"description": "done", "content": {wire.JSON: _of(route.gives)}}
    return described


def _of(kind: type) -> dict[str, Any]:
    return {"schema": {"$ref": _PLACE.format(name=kind.__name__)}}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
