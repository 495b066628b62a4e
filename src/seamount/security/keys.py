"""API keys: how they are made, kept and looked up.

Called by the authenticator for every request, and by the commands that manage keys. Synchronous: the server calls it
in the database's threads. Knows no protocol.

A key is `sm-ID-SECRET`. The id is public: it finds the row, and is what lists and logs show. The secret holds 256
random bits, of which only a SHA-256 is kept. One plain hash is enough and right: nobody can try 2^256 secrets, so a
slow or salted one would protect nothing, and would let anyone load the server by sending wrong keys. (It is passwords,
which people choose, that need one.)
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from seamount.core.database import Database, Row, Run
from seamount.core.errors import ConfigError, InvalidRequestError, NotFoundError
from seamount.core.identity import Limits, Principal

KeyState = Literal["active", "expired", "revoked"]

_LETTERS = string.ascii_letters + string.digits
_ID_LETTERS = 10
_SECRET_LETTERS = 43  # 43 of 62 letters: 256 bits
_KEY = re.compile(rf"sm-([A-Za-z0-9]{{{_ID_LETTERS}}})-[A-Za-z0-9]{{{_SECRET_LETTERS}}}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAX_TEXT = 200
_MAX_SCOPES = 100
_MAX_LIFETIME_S = 100 * 366 * 86_400
_SELECT = """SELECT id, tenant, label, is_admin, models, routes, requests_per_minute, tokens_per_minute,
    max_concurrent, priority, created_s, expires_s, revoked_s, digest FROM api_keys"""
# SQLite of older builds takes 999 values in a statement.
_MAX_VALUES = 500
_INSERT = """INSERT INTO api_keys (id, tenant, label, is_admin, models, routes, requests_per_minute, tokens_per_minute,
    max_concurrent, priority, created_s, expires_s, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of a key; never its secret. Times are Unix seconds.

    Attributes:
        id: its public part.
        principal: whom it stands for, and what they may use.
        label: what its maker wrote beside it.
    """

    id: str
    principal: Principal
    label: str
    created_s: int
    expires_s: int | None
    revoked_s: int | None

    def state(self, now_s: float) -> KeyState:
        """Return whether it opens anything at this time."""
        if self.revoked_s is not None:
            return "revoked"
        return "expired" if self.expires_s is not None and now_s >= self.expires_s else "active"


class ApiKeys:
    """The keys of one database."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._clock = clock

    def add(self, principal: Principal, *, label: str = "", lifetime_s: int | None = None) -> tuple[str, ApiKey]:
        """Make a key and return it with what is known of it. This is the only time that anybody sees the key.

        A tenant that is new comes into being.

        Args:
            principal: whom the key stands for; its `key_id` is ignored.
            lifetime_s: seconds until it expires; None never.

        Raises:
            InvalidRequestError: a value cannot be used; the message names it.
            ConfigError: there is no administrator yet, and this is none: no server would ask for such a key.
        """
        _check(principal, label, lifetime_s)

        def work(run: Run) -> tuple[str, ApiKey]:
            if not principal.is_admin and not _has_administrator(run):
                raise ConfigError(
                    "There is no administrator yet, so servers ask for no key.", hint="Run `seamount init` first."
                )
            return self._insert(run, principal, label, lifetime_s)

        return self.database.write(work)

    def add_first_administrator(self, *, tenant: str, label: str) -> tuple[str, ApiKey]:
        """Make the key that closes the door to all who have none; see `add`.

        Raises:
            InvalidRequestError: a value cannot be used.
            ConfigError: there has been an administrator before.
        """
        principal = Principal(key_id=None, tenant=tenant, is_admin=True)
        _check(principal, label, None)

        def work(run: Run) -> tuple[str, ApiKey]:
            if _has_administrator(run):
                raise ConfigError(
                    f"The state database {self.database.name} has an administrator already.",
                    hint="`seamount keys add --admin` makes another key, `seamount keys list` shows those there are.",
                )
            return self._insert(run, principal, label, None)

        return self.database.write(work)

    def has_administrator(self) -> bool:
        """Say whether there has ever been one: a revoked or expired one counts, so that no door opens again."""
        return self.database.read(_has_administrator)

    def find(self, key_id: str) -> tuple[ApiKey, str] | None:
        """Return the key of this id, and the digest of the whole key."""
        rows = self.database.read(lambda run: run(f"{_SELECT} WHERE id = ?", key_id))
        return (_key(rows[0]), rows[0][-1]) if rows else None

    def find_several(self, key_ids: Collection[str]) -> list[ApiKey]:
        """Return the keys of these ids, those that there are."""
        ids = tuple(key_ids)

        def work(run: Run) -> list[Row]:
            rows: list[Row] = []
            for begin in range(0, len(ids), _MAX_VALUES):
                some = ids[begin : begin + _MAX_VALUES]
                rows += run(f"{_SELECT} WHERE id IN ({', '.join('?' * len(some))})", *some)
            return rows

        return [_key(row) for row in self.database.read(work)]

    def all(self) -> list[ApiKey]:
        """Return every key that was ever made, by the second of their making."""
        return [_key(row) for row in self.database.read(lambda run: run(f"{_SELECT} ORDER BY created_s, id"))]

    def revoke(self, key_id: str) -> ApiKey:
        """Make a key worthless, and return it. Revoked already, it stays as it is.

        Requests are refused from the next one on; servers end those that run within seconds.

        Raises:
            NotFoundError: there is no such key.
        """
        now_s = int(self._clock())

        def work(run: Run) -> None:
            run("UPDATE api_keys SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL", now_s, key_id)

        self.database.write(work)
        found = self.find(key_id)
        if found is None:
            raise NotFoundError("There is no key of that id.", hint="`seamount keys list` shows them.")
        return found[0]

    def _insert(self, run: Run, principal: Principal, label: str, lifetime_s: int | None) -> tuple[str, ApiKey]:
        key_id, secret = _letters(_ID_LETTERS), _letters(_SECRET_LETTERS)
        credential = f"sm-{key_id}-{secret}"
        now_s = int(self._clock())
        expires_s = None if lifetime_s is None else now_s + lifetime_s
        run(
            "INSERT INTO tenants (name, created_s) VALUES (?, ?) ON CONFLICT (name) DO NOTHING", principal.tenant, now_s
        )
        run(
            _INSERT,
            key_id,
            principal.tenant,
            label,
            int(principal.is_admin),
            _json(principal.models),
            _json(principal.routes),
            principal.limits.requests_per_minute,
            principal.limits.tokens_per_minute,
            principal.limits.max_concurrent,
            principal.priority,
            now_s,
            expires_s,
            digest_of(credential),
        )
        return credential, ApiKey(
            id=key_id,
            principal=replace(principal, key_id=key_id),
            label=label,
            created_s=now_s,
            expires_s=expires_s,
            revoked_s=None,
        )


def id_of(credential: str) -> str | None:
    """Return the public id of a text that has the form of a key; None for any other text."""
    match = _KEY.fullmatch(credential)
    return match[1] if match else None


def digest_of(credential: str) -> str:
    """Return the SHA-256 of a credential, in hexadecimal: what is kept instead of a key."""
    return hashlib.sha256(credential.encode(errors="surrogatepass")).hexdigest()


def _letters(count: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(count))


def _has_administrator(run: Run) -> bool:
    return bool(run("SELECT id FROM api_keys WHERE is_admin = 1 LIMIT 1"))


def _key(row: Row) -> ApiKey:
    """Return the key of one row of `_SELECT`."""
    key_id, tenant, label, is_admin, models, routes, requests, tokens, concurrent, priority, *times, _digest = row
    created_s, expires_s, revoked_s = times
    principal = Principal(
        key_id=key_id,
        tenant=tenant,
        is_admin=bool(is_admin),
        models=None if models is None else tuple(json.loads(models)),
        routes=None if routes is None else tuple(json.loads(routes)),
        limits=Limits(requests_per_minute=requests, tokens_per_minute=tokens, max_concurrent=concurrent),
        priority=priority,
    )
    return ApiKey(
        id=key_id, principal=principal, label=label, created_s=created_s, expires_s=expires_s, revoked_s=revoked_s
    )


def _json(names: tuple[str, ...] | None) -> str | None:
    return None if names is None else json.dumps(names, ensure_ascii=False)


def _check(who: Principal, label: str, lifetime_s: int | None) -> None:
    if not _TENANT.fullmatch(who.tenant):
        raise InvalidRequestError(
            f"A tenant cannot be called {who.tenant[:80]!r}.",
            hint="Up to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit.",
            param="tenant",
        )
    if not _is_text(label) and label:
        raise InvalidRequestError(f"A label is one line of up to {_MAX_TEXT} characters.", param="label")
    if who.is_admin and (who.models is not None or who.routes is not None):
        raise InvalidRequestError(
            "An administrator may use everything, so models and routes cannot be given.", param="is_admin"
        )
    for param, names in (("models", who.models), ("routes", who.routes)):
        if names is not None and not 1 <= len(names) <= _MAX_SCOPES:
            raise InvalidRequestError(f"{param} names 1 to {_MAX_SCOPES}.", param=param)
        if wrong := [name for name in names or () if not _is_text(name)]:
            raise InvalidRequestError(f"{param} cannot hold {wrong[0][:80]!r}.", param=param)
    limits = who.limits
    for param, limit in (
        ("requests_per_minute", limits.requests_per_minute),
        ("tokens_per_minute", limits.tokens_per_minute),
        ("max_concurrent", limits.max_concurrent),
    ):
        if limit is not None and not 1 <= limit <= 2**40:
            raise InvalidRequestError(f"{param} is {limit}; it must be from 1 to 2^40.", param=param)
    if who.priority not in (-1, 0, 1):
        raise InvalidRequestError(f"The priority is {who.priority}; it must be -1, 0 or 1.", param="priority")
    if lifetime_s is not None and not 1 <= lifetime_s <= _MAX_LIFETIME_S:
        raise InvalidRequestError("A key lives at least a second and at most 100 years.", param="lifetime_s")


def _is_text(text: str) -> bool:
    return 0 < len(text) <= _MAX_TEXT and text.isprintable()
