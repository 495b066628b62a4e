"""The one place that says who may come in: identifies, permits by a rule per route, and tells the auditor.

Called by `middleware.Door` for HTTP, and by whatever else takes requests (gRPC calls `Access.admit` with its method's
name as the route). What may be used is decided by `permitted`, a pure function; who somebody is, by the
`Authenticator`. Nothing here reads a body: the model that one names is checked with `permit_model`, for all surfaces
by `Service.admit`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from seamount.core.errors import ConfigError, ForbiddenError, InvalidRequestError, SeamountError, UnauthenticatedError
from seamount.core.identity import Principal
from seamount.core.ports import Authenticator
from seamount.security.usage import UsageLedger

_log = logging.getLogger("seamount.server.access")


class Rule(Enum):
    """Who may use a route.

    PUBLIC: everybody, unasked. KEY: every key, unless it is for other routes. NAMED: keys that name the route, and
    administrators. ADMIN: administrators alone.
    """

    PUBLIC = "public"
    KEY = "key"
    NAMED = "named"
    ADMIN = "admin"


# Every route of the server, in the router's spelling. One that stands not here keeps the server from starting.
RULES: dict[str, Rule] = {
    # Probes come from load balancers, which hold no keys, and say no more than that.
    "/healthz": Rule.PUBLIC,
    "/readyz": Rule.PUBLIC,
    # The page and the API's description are the same for all who have this program; what they lead to asks for a key.
    "/": Rule.PUBLIC,
    "/console": Rule.PUBLIC,
    "/openapi.json": Rule.PUBLIC,
    "/docs": Rule.PUBLIC,
    "/docs/static": Rule.PUBLIC,
    # How much is asked here, and when, is the operator's to know: a scraper gets a key that names the route.
    "/metrics": Rule.NAMED,
    "/v1/models": Rule.KEY,
    "/v1/models/{model:path}": Rule.KEY,
    "/v1/chat/completions": Rule.KEY,
    "/v1/completions": Rule.KEY,
    "/v1/embeddings": Rule.KEY,
    "/v1/responses": Rule.KEY,
    "/v1/responses/{response_id}": Rule.KEY,
    "/v1/responses/{response_id}/input_items": Rule.KEY,
    "/v1/responses/{response_id}/cancel": Rule.KEY,
    "/v1/messages": Rule.KEY,
    "/v1/messages/count_tokens": Rule.KEY,
    "/v1/files": Rule.KEY,
    "/v1/files/{file_id}": Rule.KEY,
    "/v1/files/{file_id}/content": Rule.KEY,
    "/v1/batches": Rule.KEY,
    "/v1/batches/{batch_id}": Rule.KEY,
    "/v1/batches/{batch_id}/cancel": Rule.KEY,
    "/v1/tokenize": Rule.KEY,
    "/v1/detokenize": Rule.KEY,
    # Who makes keys can make one for everything, so no key but an administrator's may.
    "/v1/admin/keys": Rule.ADMIN,
    "/v1/admin/keys/{key_id}/revoke": Rule.ADMIN,
    # Methods of gRPC. Health is a probe, and reflection tells what everybody finds in the .proto.
    "/seamount.v1.Seamount/Chat": Rule.KEY,
    "/seamount.v1.Seamount/StreamChat": Rule.KEY,
    "/seamount.v1.Seamount/Complete": Rule.KEY,
    "/seamount.v1.Seamount/StreamComplete": Rule.KEY,
    "/seamount.v1.Seamount/Embed": Rule.KEY,
    "/seamount.v1.Seamount/Tokenize": Rule.KEY,
    "/seamount.v1.Seamount/Detokenize": Rule.KEY,
    "/seamount.v1.Seamount/ListModels": Rule.KEY,
    "/seamount.v1.Seamount/GetModel": Rule.KEY,
    "/grpc.health.v1.Health/Check": Rule.PUBLIC,
    "/grpc.health.v1.Health/Watch": Rule.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Rule.PUBLIC,
}


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One request, as far as the door sees it.

    Attributes:
        route: the router's spelling of where it goes; None where it goes nowhere.
        method: GET, POST ...
        credential: what was sent as proof; None when nothing.
        peer: address of the other end; None where there is none.
        request_id: as in the answer's x-request-id.
    """

    route: str | None
    method: str
    credential: str | None = field(repr=False)
    peer: str | None
    request_id: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of a visit: `code` is "ok", else the error's; `principal` is None for those who are not known."""

    visit: Visit
    principal: Principal | None
    code: str


def log_decision(decision: Decision) -> None:
    """Log a refusal; the audit for as long as there is no other. Holds no credential."""
    if decision.code != "ok":
        visit, who = decision.visit, decision.principal
        _log.info(
            "refused %s: %s %s from %s, key %s, %s",
            decision.code,
            visit.method,
            visit.route or "(no route)",
            visit.peer or "-",
            (who and who.key_id) or "-",
            visit.request_id,
        )


class Access:
    """Admits or refuses.

    Args:
        authenticator: says who somebody is.
        ledger: where usage is counted; None counts none.
        audit: told of every decision, before the request goes on. What it raises refuses the request.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        ledger: UsageLedger | None = None,
        audit: Callable[[Decision], None] = log_decision,
    ) -> None:
        self._authenticator = authenticator
        self.ledger = ledger
        self._audit = audit

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep usage written while inside."""
        if self.ledger is None:
            yield
        else:
            async with self.ledger.running():
                yield

    async def admit(self, visit: Visit) -> Principal | None:
        """Return the caller; None on a public route, where nobody is asked.

        Raises:
            UnauthenticatedError: not known.
            ForbiddenError: known, and may not.
            StateUnavailableError: cannot be known now.
        """
        principal: Principal | None = None
        try:
            rule = RULES.get(visit.route) if visit.route is not None else Rule.KEY
            if rule is not Rule.PUBLIC:
                principal = await self._authenticator.authenticate(visit.credential, visit.peer)
                if not permitted(rule, visit.route, principal):
                    raise ForbiddenError(
                        "This API key may not use this route.",
                        hint="Ask an administrator for a key that may.",
                        code="route_not_permitted",
                    )
        except SeamountError as error:
            self._audit(Decision(visit=visit, principal=principal, code=error.code))
            raise
        self._audit(Decision(visit=visit, principal=principal, code="ok"))
        return principal

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        """Return what is told to the bearers of those keys that open nothing any more, by the key's id.

        Raises:
            StateUnavailableError: it cannot be known now.
        """
        return await self._authenticator.ended(key_ids)


def permitted(rule: Rule | None, route: str | None, principal: Principal) -> bool:
    """Say whether a caller may use a route with this rule; without one nobody may.

    A request that goes nowhere (route None) is permitted to all who are known: they are told that it goes nowhere.
    """
    if rule is None:
        return False
    if principal.is_admin or route is None:
        return True
    if rule is Rule.ADMIN:
        return False
    if rule is Rule.NAMED:
        return route in (principal.routes or ())
    return principal.routes is None or route in principal.routes


def check_named(routes: Sequence[str]) -> None:
    """Check routes that a key shall be good for.

    Raises:
        InvalidRequestError: there is no such route, or naming it opens nothing.
    """
    known = [route for route, rule in RULES.items() if rule in (Rule.KEY, Rule.NAMED)]
    for route in routes:
        if route not in known:
            raise InvalidRequestError(
                f"No route that asks for a key is called {route[:80]!r}.",
                hint=f"There are: {', '.join(known)}.",
                param="routes",
            )


def check_rules(routes: Sequence[BaseRoute]) -> None:
    """Check that every route has a rule.

    Raises:
        ConfigError: one has none; a programmer's mistake that must not reach anybody's network.
    """
    without = [_spelling(route) or repr(route) for route in routes if _spelling(route) not in RULES]
    if without:
        raise ConfigError(
            f"These routes have no rule: {', '.join(without)}.", hint="Add them to server.door.access.RULES."
        )


def route_of(scope: Scope, routes: Sequence[BaseRoute]) -> str | None:
    """Return where a request goes, found as the router finds it: the first that fits with its method, else without."""
    nearly: BaseRoute | None = None
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return _spelling(route)
        if match is Match.PARTIAL and nearly is None:
            nearly = route
    return None if nearly is None else _spelling(nearly)


def _spelling(route: BaseRoute) -> str:
    return getattr(route, "path", "")


_principal: ContextVar[Principal | None] = ContextVar("principal", default=None)


@contextmanager
def acting_as(principal: Principal | None) -> Iterator[None]:
    """Let everything inside, and tasks begun inside, be done for this caller."""
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def current_principal() -> Principal | None:
    """Return the caller for whom this is done; None where nobody was asked."""
    return _principal.get()


def may_use_model(model: str) -> bool:
    """Say whether the current caller may use a model, whether or not there is one of that name."""
    who = current_principal()
    return who is None or who.models is None or model in who.models


def permit_model(model: str) -> None:
    """Check that the current caller may use a model.

    Raises:
        ForbiddenError: they may not. A model that does not exist is refused in the same words.
    """
    if not may_use_model(model):
        raise ForbiddenError(
            "This API key may not use that model.",
            hint="/v1/models lists those that it may.",
            code="model_not_permitted",
            param="model",
        )
