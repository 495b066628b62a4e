"""Joins the parts of the server: routes, probes, metrics, console, middleware.

`create_app` is called by the composition root in the CLI and by tests. The app's lifespan starts and closes the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from seamount.core.errors import NotFoundError
from seamount.core.ports import Engine
from seamount.core.settings import ServerConfig
from seamount.version import __version__

from . import errors
from .body import StrictRoute
from .chat import chat
from .completions import complete
from .encoder import Encoder
from .errors import error_body
from .metrics import CONTENT_TYPE
from .middleware import BodyLimit, Edge, Guard, Head
from .service import Service
from .wire.chat import ChatRequest, ChatResponse
from .wire.common import ErrorBody
from .wire.completions import CompletionRequest, CompletionResponse
from .wire.models import ModelCard, ModelList

CONSOLE_FOLDER = Path(__file__).with_name("console")
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# FastAPI can send traces to a collector when the environment says so; nothing leaves this machine by itself.
_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong: the error names the parameter.",
        403: "Sent by a web page of another origin.",
        404: "No such model.",
        413: "The body is too large.",
        500: "The engine failed.",
        503: "Not now: see retry-after.",
    }.items()
}
# A default keeps FastAPI from documenting its own 422, which never leaves this server.
_ERRORS["default"] = {"model": ErrorBody, "description": "Any other error."}
_PROBE_ERRORS: dict[int | str, dict[str, Any]] = {503: _ERRORS[503], "default": _ERRORS["default"]}
_STREAM_SCHEMA: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "string", "description": "`data: {chunk}` events, then `data: [DONE]`."}}
}


def create_app(engine: Engine, encoder: Encoder, config: ServerConfig) -> FastAPI:
    """Return the ASGI application for one engine. `app.state.service` is its `Service`."""
    service = Service(engine, encoder, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="Seamount",
        summary="OpenAI's API for DeepSeek models, on your own machine.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = service
    app.router.route_class = StrictRoute
    errors.install(app)
    _add_completions(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    _add_console(app)
    # The last one added is the outermost.
    app.add_middleware(Head)
    app.add_middleware(BodyLimit, max_body_bytes=config.max_body_bytes)
    app.add_middleware(Guard, bound_host=config.host)
    app.add_middleware(Edge, service=service)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    def responses(model: type) -> dict[int | str, dict[str, Any]]:
        return {**_ERRORS, 200: {"model": model, "content": _STREAM_SCHEMA}}

    @app.post("/v1/chat/completions", tags=["openai"], responses=responses(ChatResponse), response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a chat. With `stream`, the answer comes as server-sent events."""
        return await chat(service, body, request)

    @app.post("/v1/completions", tags=["openai"], responses=responses(CompletionResponse), response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue text or token ids as they stand. With `stream`, the answer comes as server-sent events."""
        return await complete(service, body, request)


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        facts = service.facts()
        return ModelCard(
            id=service.model_name(), created=service.created_s, root=facts.name, max_model_len=facts.max_model_len
        )

    @app.get("/v1/models", tags=["openai"], responses=_PROBE_ERRORS)
    async def list_models() -> ModelList:
        """List the models that requests may name."""
        return ModelList(data=[card()])

    # A name may hold slashes, as those of Hugging Face repositories do.
    @app.get("/v1/models/{model:path}", tags=["openai"], responses={404: _ERRORS[404], **_PROBE_ERRORS})
    async def get_model(model: str) -> ModelCard:
        """Describe one model."""
        found = card()
        service.check_model(model)
        return found


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operation"])
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operation"], responses=_PROBE_ERRORS, response_model=dict[str, str])
    async def readiness() -> Response:
        """Requests are taken: not while the model loads, a dead worker restarts, or the server stops."""
        reason = service.not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        body = {"status": service.state(), "reason": reason.message, "error": error_body(reason)}
        return JSONResponse(body, 503, {"cache-control": "no-store"})

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Counters and histograms in the Prometheus text format."""
        stats = await service.engine.stats()
        return Response(service.metrics.render(service.model_name(), stats), media_type=CONTENT_TYPE)


def _add_console(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        page = CONSOLE_FOLDER / "index.html"
        if not page.is_file():
            raise NotFoundError("This installation has no console.")
        return FileResponse(page, headers=_CONSOLE_HEADERS)

    app.mount("/console", _ConsoleFiles(directory=CONSOLE_FOLDER, check_dir=False))


# no-cache: the browser asks each time whether its copy is current, so an update shows at once.
_CONSOLE_HEADERS = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}


class _ConsoleFiles(StaticFiles):
    """Static files with the console's headers, on refusals too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _CONSOLE_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await super().__call__(scope, receive, send_on)
