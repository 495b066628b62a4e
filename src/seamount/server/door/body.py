"""Reads a request's body: strictly, within bounds that hold before the work is done, and a large one in a thread.

`StrictRoute` is set as the route class by `app`. `strict_json` and `validated` are for whoever else reads requests: a
batch's lines, gRPC's messages. Strictly: a name that stands twice in one object is refused, and so is a number without
end. Python's parser keeps the last of two values, other parsers the first: whoever checked a request before this server
may have seen another one.

Bounds before the work: what JSON holds is counted before it is read (`wire.bounds`), and lists are looked through up to
their first error (`wire.common`), for a wrong value becomes an error that is a hundred times as large.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from seamount.core.errors import InvalidRequestError, NotFoundError
from seamount.server.admission.call import current_call
from seamount.server.errors import validation_error
from seamount.server.wire.bounds import MAX_NAMES, TOO_COMPLEX, is_too_complex

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

# Longer ones are counted first, and read in a thread, where others' turns come in between.
LARGE_BYTES = 2**16
# One: two would hold twice the memory, and wait for each other all the same.
_reader = ThreadPoolExecutor(1, thread_name_prefix="body")


class StrictRoute(APIRoute):
    """A route whose body is read strictly. One that is refused counts as a request of its key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler, given the strict request."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        schema = self.body_field.field_info.annotation

        async def handle_strictly(request: Request) -> Response:
            try:
                return await handle(_StrictRequest(request, schema))
            except (RequestValidationError, HTTPException, InvalidRequestError, NotFoundError):
                current_call().begin()
                raise

        return handle_strictly


def strict_json(text: str | bytes) -> Any:
    """Return what JSON text says.

    Raises:
        InvalidRequestError: a name stands twice in one object, a number is too long to be read, or there is too much of
            something.
        ValueError, RecursionError: it is no JSON, or nested too deep.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if is_too_complex(text):
        raise InvalidRequestError(f"The body has {TOO_COMPLEX}.", code="body_too_complex")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except ValueError as cause:  # https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
        raise InvalidRequestError(
            f"The body holds an integer of more than {sys.get_int_max_str_digits()} digits.", code="number_too_long"
        ) from cause


def validated(schema: type[M], fields: Any) -> M:
    """Return a body that was checked as that of a request is, whatever carries it.

    Raises:
        InvalidRequestError: it is wrong.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise validation_error([{**problem, "loc": ("body", *problem["loc"])} for problem in problems]) from None


async def read_aside(work: Callable[[], T]) -> T:
    """Return what `work`, which reads something large, returns; it runs in the one thread that is kept for that."""
    return await asyncio.get_running_loop().run_in_executor(_reader, work)


class _StrictRequest(Request):
    def __init__(self, request: Request, schema: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._schema: type[BaseModel] = schema

    async def json(self) -> Any:
        """Return the body as its model, which the framework then takes as it is."""
        body = await self.body()
        if len(body) <= LARGE_BYTES:
            return self._read(body)
        current_call().begin()  # who may ask no more shall not cost this work
        return await read_aside(lambda: self._read(body))

    def _read(self, body: bytes) -> BaseModel:
        return validated(self._schema, strict_json(body))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict.

    Raises:
        InvalidRequestError: a name stands twice, or there are too many.
    """
    if len(pairs) > MAX_NAMES:
        raise InvalidRequestError(f"An object of the body has more than {MAX_NAMES} names.", code="body_too_complex")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequestError(
                f"The body has {name[:200]!r} twice in one object.", param=name[:200], code="duplicate_parameter"
            )
        found[name] = value
    return found
