"""The API's description: what the OpenAPI document says beyond what the framework knows, and its page at /docs.

Called by `app`. The page is Swagger UI, whose files lie in `api_page` as they were released: nothing is loaded from
elsewhere, and it works under the console's headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.routing import BaseRoute

from seamount.core.errors import NotFoundError

from .door.access import RULES, Rule
from .pages import PAGE_HEADERS, PageFiles
from .wire.chat import ChatChunk
from .wire.common import ErrorBody

PAGE_FOLDER = Path(__file__).with_name("api_page")
_REF = "#/components/schemas/{model}"
# What no route may have named: errors are written here, and only streams carry chunks.
_UNNAMED: tuple[type[BaseModel], ...] = (ErrorBody, ChatChunk)
_TAGS = {
    "openai": "What clients of OpenAI's API use.",
    "anthropic": "What clients of Anthropic's API use.",
    "tokens": "Text to tokens and back.",
    "administration": "For administrators.",
    "operation": "For those who run the server.",
}
_KEYED = {
    "401": "No API key, or one that is wrong, expired or revoked.",
    "403": "The key may not use this route or model; or sent by a web page of another origin.",
    "429": "A limit of the key is used up for now: see retry-after, and the x-ratelimit headers.",
    "503": "Not now: see retry-after.",
}


class DescribedApp(FastAPI):
    """The framework's application, with a complete OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document."""
        if self.openapi_schema is None:
            _complete(super().openapi(), self.routes)
        return super().openapi()


def add_reference(app: FastAPI) -> None:
    """Add the page."""

    @app.get("/docs", include_in_schema=False)
    async def api_page() -> Response:
        page = PAGE_FOLDER / "index.html"
        if not page.is_file():
            raise NotFoundError("This installation has no page of the API; /openapi.json describes it.")
        return FileResponse(page, headers=PAGE_HEADERS)

    app.mount("/docs/static", PageFiles(directory=PAGE_FOLDER, check_dir=False))


def _complete(document: dict[str, Any], routes: Sequence[BaseRoute]) -> None:
    """Say which routes take a key, what errors look like everywhere, and what events hold."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in _UNNAMED]
    _, extra = models_json_schema(wanted, ref_template=_REF)
    for name, schema in extra["$defs"].items():
        schemas.setdefault(name, schema)
    document["components"]["securitySchemes"] = {
        "api_key": {
            "type": "http",
            "scheme": "bearer",
            "description": "A key that `seamount keys add` made. None is needed before there is an administrator.",
        }
    }
    for route in routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            for operation in document["paths"][route.path_format].values():
                _complete_operation(operation, is_public=RULES.get(route.path) is Rule.PUBLIC)
    # The framework's own error, which never leaves this server.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    used = {tag for operation in operations for tag in operation.get("tags", ())}
    document["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items() if name in used]


def _complete_operation(operation: dict[str, Any], *, is_public: bool) -> None:
    responses = operation["responses"]
    # A route whose errors have a shape of their own says so in its default.
    ours: dict[str, Any] = {
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}}
    }
    content = responses.get("default", ours)["content"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    errors = {"default": "Any other error."} if is_public else {**_KEYED, "default": "Any other error."}
    if not is_public:
        operation["security"] = [{"api_key": []}]
    for status, text in errors.items():
        responses.setdefault(status, {"description": text, "content": content})
