"""/v1/batches over HTTP: batches are made, read, listed, cancelled. Called by `app`.

Whatever is kept belongs to a tenant: another one's is answered as what does not exist. `runner` does the work.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query

from seamount.core.database import Database
from seamount.core.errors import ForbiddenError, NotFoundError
from seamount.security.keys import ApiKeys
from seamount.server.admission.call import current_call
from seamount.server.door.access import RULES, current_principal, permit_model, permitted
from seamount.server.files.routes import MAX_ID, add_files
from seamount.server.files.store import FileStore
from seamount.server.service import Service
from seamount.server.wire.batches import BatchError, BatchErrors, BatchList, BatchObject, BatchRequest, RequestCounts
from seamount.server.wire.files import DEFAULT_LIFETIME_S
from seamount.server.wire.responses import InputTokensDetails, OutputTokensDetails, ResponseUsage

from .runner import BatchRunner
from .store import Batch, BatchStore

_MAX_PAGE = 100
_Errors = dict[int | str, dict[str, Any]]


def add_batches(app: FastAPI, service: Service, state: Database | None, errors: _Errors) -> BatchRunner | None:
    """Give the app these routes, and those of files; return what works on batches, to be started and closed.

    Args:
        state: where they are kept; None: none are, and nothing works on them.
        errors: what the document says of errors.
    """
    files = None if state is None else FileStore(state, service.config.max_tenant_file_bytes)
    batches = None if files is None else BatchStore(files.database, files)
    runner = None if batches is None else BatchRunner(service, batches, ApiKeys(batches.database))
    add_files(app, service.config, files, errors)
    _add_routes(app, service, batches, runner, errors)
    return runner


def _add_routes(
    app: FastAPI, service: Service, store: BatchStore | None, runner: BatchRunner | None, errors: _Errors
) -> None:
    @app.post("/v1/batches", tags=["openai"], responses=errors)
    async def create_batch(body: BatchRequest) -> BatchObject:
        """Answer every line of a file within a day, when nobody waits for anything else."""
        batches = _kept(store)
        service.facts()  # else the model's name is not known
        permit_model(service.model_name())
        _permit_endpoint(body.endpoint)
        caller = current_call().caller
        expires = body.output_expires_after
        add = partial(
            batches.add,
            tenant=caller.tenant,
            key_id=caller.key_id,
            endpoint=body.endpoint,
            model=service.model_name(),
            input_file_id=body.input_file_id,
            metadata=body.metadata,
            output_lifetime_s=expires.seconds if expires else DEFAULT_LIFETIME_S,
        )
        made = await batches.database.call(add)
        if runner is not None:
            runner.wake()
        return _object(made)

    @app.get("/v1/batches", tags=["openai"], responses=errors)
    async def list_batches(
        after: Annotated[str | None, Query(max_length=MAX_ID)] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
    ) -> BatchList:
        """List batches, the newest first."""
        batches = _kept(store)
        page = partial(batches.page, current_call().caller.tenant, after=after, limit=limit + 1)
        found = await batches.database.call(page)
        data = [_object(batch) for batch in found[:limit]]
        return BatchList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(found) > limit,
        )

    @app.get("/v1/batches/{batch_id}", tags=["openai"], responses=errors)
    async def get_batch(batch_id: str) -> BatchObject:
        """Say how far a batch is."""
        batches = _kept(store)
        return _object(await batches.database.call(partial(batches.get, current_call().caller.tenant, batch_id)))

    @app.post("/v1/batches/{batch_id}/cancel", tags=["openai"], responses=errors)
    async def cancel_batch(batch_id: str) -> BatchObject:
        """Begin no more lines, and give up those that run; the answers that there are become the output."""
        batches = _kept(store)
        ask = partial(batches.ask_to_cancel, current_call().caller.tenant, batch_id)
        found = await batches.database.call(ask)
        if runner is not None:
            runner.cancel(batch_id)
        return _object(found)


def _kept(store: BatchStore | None) -> BatchStore:
    if store is None:
        raise NotFoundError("This server keeps no batches: it has no state database.", code="nothing_kept")
    return store


def _permit_endpoint(endpoint: str) -> None:
    """Check that the caller may use the endpoint itself: a batch is no way round its key's routes.

    Raises:
        ForbiddenError: they may not.
    """
    who = current_principal()
    if who is not None and not permitted(RULES.get(endpoint), endpoint, who):
        raise ForbiddenError(
            "This API key may not use the batch's endpoint.",
            hint="Ask an administrator for a key that may.",
            code="route_not_permitted",
            param="endpoint",
        )


def _object(batch: Batch) -> BatchObject:
    errors = [BatchError(code=e.code, message=e.message, line=e.line, param=e.param) for e in batch.errors]
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_s,
        in_progress_at=batch.in_progress_s,
        expires_at=batch.expires_s,
        finalizing_at=batch.finalizing_s,
        completed_at=batch.completed_s,
        failed_at=batch.failed_s,
        expired_at=batch.expired_s,
        cancelling_at=batch.cancelling_s,
        cancelled_at=batch.cancelled_s,
        request_counts=RequestCounts(total=batch.num_total, completed=batch.num_completed, failed=batch.num_failed),
        usage=_usage(batch),
        metadata=batch.metadata,
    )


def _usage(batch: Batch) -> ResponseUsage | None:
    counts = (batch.input_tokens, batch.cached_tokens, batch.output_tokens, batch.reasoning_tokens)
    if None in counts:
        return None
    num_input, num_cached, num_output, num_reasoning = (count or 0 for count in counts)
    return ResponseUsage(
        input_tokens=num_input,
        input_tokens_details=InputTokensDetails(cached_tokens=num_cached),
        output_tokens=num_output,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=num_reasoning),
        total_tokens=num_input + num_output,
    )
