"""Reads a request's JSON strictly: a name that stands twice in one object is refused, and so is a number without end.

Set as the route class by `app`. Python's parser keeps the last of two values, other parsers the first: whoever
checked a request before this server may have seen another one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from seamount.core.errors import InvalidRequestError


class StrictRoute(APIRoute):
    """A route whose body is read strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler, given the strict request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def strict_json(text: str | bytes) -> Any:
    """Return what JSON text says.

    Raises:
        InvalidRequestError: a name stands twice in one object, or a number is too long to be read.
        ValueError, RecursionError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as cause:  # https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
        raise InvalidRequestError(
            f"The body holds an integer of more than {sys.get_int_max_str_digits()} digits.", code="number_too_long"
        ) from cause


class _StrictRequest(Request):
    async def json(self) -> Any:
        return strict_json(await self.body())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict.

    Raises:
        InvalidRequestError: a name stands twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequestError(
                f"The body has {name[:200]!r} twice in one object.", param=name[:200], code="duplicate_parameter"
            )
        found[name] = value
    return found
