"""/v1/files over HTTP: files that batches read, and those that they make. Called by `app`.

Whatever is kept belongs to a tenant: another one's is answered as what does not exist. The bytes are the affair of
`upload` and `store`.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, cast

from fastapi import FastAPI, Query, Request, Response
from starlette.types import Receive, Scope, Send

from seamount.core.errors import NotFoundError
from seamount.core.settings import ServerConfig
from seamount.server.admission.call import current_call
from seamount.server.errors import ClientGoneError
from seamount.server.streaming import while_connected
from seamount.server.wire.files import FileDeleted, FileList, FileObject, Purpose

from .store import FileStore, StoredFile
from .upload import receive_file

MAX_ID = 128
_MAX_PAGE = 10_000
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 7_776_000},
                    },
                }
            }
        },
    }
}
_CONTENT: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_Errors = dict[int | str, dict[str, Any]]


def add_files(app: FastAPI, config: ServerConfig, store: FileStore | None, errors: _Errors) -> None:
    """Give the app these routes.

    Args:
        store: where files are kept; None: none are.
        errors: what the document says of errors.
    """

    @app.post("/v1/files", tags=["openai"], responses=errors, openapi_extra=_FORM)
    async def create_file(request: Request) -> FileObject:
        """Send a file, as multipart/form-data. It is there once it has arrived whole."""
        return _object(await receive_file(request, kept(store), _tenant(), config))

    @app.get("/v1/files", tags=["openai"], responses=errors)
    async def list_files(
        after: Annotated[str | None, Query(max_length=MAX_ID)] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64, pattern="^[a-z_-]+$")] = None,
    ) -> FileList:
        """List files, by the time of their making."""
        files = kept(store)
        page = partial(
            files.page, _tenant(), purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
        )
        found = await files.database.call(page)
        data = [_object(file) for file in found[:limit]]
        return FileList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(found) > limit,
        )

    @app.get("/v1/files/{file_id}", tags=["openai"], responses=errors)
    async def get_file(file_id: str) -> FileObject:
        """Describe a file."""
        return _object(await _find(kept(store), file_id))

    @app.get(
        "/v1/files/{file_id}/content",
        tags=["openai"],
        responses={**errors, 200: {"content": _CONTENT}},
        response_class=Response,
    )
    async def get_file_content(file_id: str) -> Response:
        """Return what a file holds."""
        files = kept(store)
        return _Content(files, await _find(files, file_id))

    @app.delete("/v1/files/{file_id}", tags=["openai"], responses=errors)
    async def delete_file(file_id: str) -> FileDeleted:
        """Delete a file; not while a batch reads it."""
        files = kept(store)
        await files.database.call(partial(files.delete, _tenant(), file_id))
        return FileDeleted(id=file_id)


def kept(store: FileStore | None) -> FileStore:
    """Return the store.

    Raises:
        NotFoundError: this server has none.
    """
    if store is None:
        raise NotFoundError("This server keeps no files: it has no state database.", code="nothing_kept")
    return store


def _tenant() -> str:
    return current_call().caller.tenant


async def _find(files: FileStore, file_id: str) -> StoredFile:
    return await files.database.call(partial(files.get, _tenant(), file_id))


class _Content(Response):
    """Sends a file a part at a time, and stops when the client goes away."""

    def __init__(self, store: FileStore, file: StoredFile) -> None:
        super().__init__(
            media_type="application/octet-stream",
            # Never shown as a page: what it holds was made up by somebody.
            headers={"content-length": str(file.num_bytes), "content-disposition": "attachment"},
        )
        self._store = store
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send(send))
        except (ClientGoneError, OSError):
            return

    async def _send(self, send: Send) -> None:
        place = 0
        while part := await self._store.database.call(partial(self._store.content, self._file, place)):
            text, place = part
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _object(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_s,
        expires_at=file.expires_s,
        filename=file.filename,
        purpose=cast(Purpose, file.purpose),
    )
