"""Joins the parts of the server: routes, probes, metrics, console, middleware.

`create_app` is called by the composition root in the CLI and by tests. The app's lifespan starts and closes the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from seamount.core.database import Database
from seamount.core.errors import NotFoundError
from seamount.core.ports import Engine
from seamount.core.settings import ServerConfig
from seamount.security.authenticators import OpenOnLoopback
from seamount.version import __version__

from . import errors
from .admin_keys import add_admin_keys
from .admission.call import Gate
from .admission.watch import KeyWatch
from .batches.routes import add_batches
from .chat.routes import chat
from .completions.routes import complete
from .door.access import Access, check_rules, may_use_model, permit_model
from .door.body import StrictRoute
from .door.middleware import BodyLimit, Door, Edge, Guard, Head
from .embeddings import add_embeddings
from .encoder import Encoder
from .errors import error_body
from .files.upload import FORM_BYTES
from .messages.routes import add_messages
from .metering import MeteredEngine
from .pages import PAGE_HEADERS, PageFiles
from .reference import DescribedApp, add_reference
from .responses.routes import add_responses, clean_at_start
from .responses.store import ResponseStore
from .service import Service
from .telemetry.metrics import CONTENT_TYPE, Metrics
from .tokens import add_tokens
from .wire.chat import ChatChunk, ChatRequest, ChatResponse
from .wire.common import ErrorBody
from .wire.completions import CompletionRequest, CompletionResponse
from .wire.models import ModelCard, ModelList

if TYPE_CHECKING:
    from .telemetry.tracing import Spans

CONSOLE_FOLDER = Path(__file__).with_name("console")
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
        401: "No API key, or one that is wrong, expired or revoked.",
        403: "The key may not use this route or model; or sent by a web page of another origin.",
        404: "No such model.",
        413: "The body is too large.",
        429: "A limit of the key is used up for now: see retry-after, and the x-ratelimit headers.",
        500: "The engine failed.",
        503: "Not now: see retry-after.",
    }.items()
}
# A default keeps FastAPI from documenting its own 422, which never leaves this server.
_ERRORS["default"] = {"model": ErrorBody, "description": "Any other error."}
_PROBE_ERRORS: dict[int | str, dict[str, Any]] = {503: _ERRORS[503], "default": _ERRORS["default"]}


def create_app(
    engine: Engine,
    encoder: Encoder,
    config: ServerConfig,
    access: Access | None = None,
    state: Database | None = None,
) -> FastAPI:
    """Return the ASGI application for one engine. `app.state.service` is its `Service`.

    Args:
        access: who may come in; None: everyone on this machine, and nobody else.
        state: where stored responses, files and batches are kept; None: nothing can be stored.

    Raises:
        ConfigError: a route has no rule that says who may use it.
    """
    access = access or Access(OpenOnLoopback())
    service = Service(MeteredEngine(engine, access.ledger) if access.ledger else engine, encoder, config)

    kept = None
    if state is not None:
        kept = ResponseStore(state, config.response_retention_days, config.max_tenant_response_bytes)
    spans = _spans(config, service.metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # To the end: closing the engine ends requests, whose tokens count, and whose spans are sent.
        async with _sending(spans), access.running(), KeyWatch(service.calls, access).running():
            await clean_at_start(kept)
            service.start()
            if batches is not None:
                batches.start()
            try:
                yield
            finally:
                if batches is not None:
                    await batches.close()
                await service.close()

    app = DescribedApp(
        title="Seamount",
        summary="OpenAI's API for DeepSeek models, on your own machine.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere; `reference` has one that does not
        redoc_url=None,
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = service
    app.state.access = access
    app.state.on_end = spans.end if spans else None
    app.state.grpc_address = None  # known once it is bound; see `serve`
    app.router.route_class = StrictRoute
    errors.install(app)
    _add_completions(app, service)
    add_messages(app, service)
    add_responses(app, service, kept if config.response_retention_days else None, _ERRORS)
    add_tokens(app, service, _ERRORS)
    add_embeddings(app, service, _ERRORS)
    _add_models(app, service)
    _add_probes(app, service)
    _add_console(app)
    add_reference(app)
    add_admin_keys(app, state, _ERRORS)
    batches = add_batches(app, service, state, _ERRORS)
    check_rules(app.routes)
    # The last one added is the outermost.
    app.add_middleware(Head)
    larger = {"/v1/files": config.max_file_bytes + FORM_BYTES}
    app.add_middleware(
        BodyLimit,
        is_draining=lambda: service.state() == "draining",
        max_body_bytes=config.max_body_bytes,
        larger=larger,
    )
    app.add_middleware(Gate, calls=service.calls)
    app.add_middleware(Door, access=access, routes=app.routes)
    app.add_middleware(Guard, bound_host=config.host)
    app.add_middleware(Edge, service=service, on_end=app.state.on_end)
    return app


def _spans(config: ServerConfig, metrics: Metrics) -> Spans | None:
    """Return what sends spans, where the settings ask for it; only then are its packages imported."""
    if config.otlp_endpoint is None:
        return None
    from .telemetry.tracing import Spans

    outcomes = metrics.spans.labels
    return Spans(config.otlp_endpoint, on_sent=outcomes("sent").inc, on_dropped=outcomes("dropped").inc)


@asynccontextmanager
async def _sending(spans: Spans | None) -> AsyncIterator[None]:
    """Send spans while inside, and what is left at the end."""
    if spans is None:
        yield
        return
    spans.start()
    try:
        yield
    finally:
        await asyncio.to_thread(spans.close)


def _add_completions(app: FastAPI, service: Service) -> None:
    def responses(model: type, event: type) -> dict[int | str, dict[str, Any]]:
        text = f"`data:` events, each a {event.__name__} in JSON, then `data: [DONE]`."
        stream = {"text/event-stream": {"schema": {"type": "string", "description": text}}}
        return {**_ERRORS, 200: {"model": model, "content": stream}}

    chats, texts = responses(ChatResponse, ChatChunk), responses(CompletionResponse, CompletionResponse)

    @app.post("/v1/chat/completions", tags=["openai"], responses=chats, response_model=None)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a chat. With `stream`, the answer comes as server-sent events."""
        return await chat(service, body, request)

    @app.post("/v1/completions", tags=["openai"], responses=texts, response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue text or token ids as they stand. With `stream`, the answer comes as server-sent events."""
        return await complete(service, body, request)


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> ModelCard:
        facts = service.facts()
        return ModelCard(
            id=service.model_name(),
            created=service.created_s,
            root=facts.name,
            max_model_len=facts.max_model_len,
            display_name=service.model_name(),
            created_at=datetime.fromtimestamp(service.created_s, UTC).isoformat().replace("+00:00", "Z"),
        )

    @app.get("/v1/models", tags=["openai"], responses=_PROBE_ERRORS)
    async def list_models() -> ModelList:
        """List the models that requests may name."""
        found = card()
        known = [found] if may_use_model(found.id) else []
        first_id = found.id if known else None
        return ModelList(data=known, first_id=first_id, last_id=first_id)

    # A name may hold slashes, as those of Hugging Face repositories do.
    @app.get("/v1/models/{model:path}", tags=["openai"], responses={404: _ERRORS[404], **_PROBE_ERRORS})
    async def get_model(model: str) -> ModelCard:
        """Describe one model."""
        permit_model(model)
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

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and histograms in the Prometheus text format."""
        return Response(await service.render_metrics(), media_type=CONTENT_TYPE)


def _add_console(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        page = CONSOLE_FOLDER / "index.html"
        if not page.is_file():
            raise NotFoundError("This installation has no console.")
        return FileResponse(page, headers=PAGE_HEADERS)

    app.mount("/console", PageFiles(directory=CONSOLE_FOLDER, check_dir=False))
