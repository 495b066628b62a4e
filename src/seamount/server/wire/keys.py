"""Schemas of /v1/admin/keys: the words of `seamount keys`, with what each key used in sum."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field

from seamount.core.identity import Limits, Principal
from seamount.security.keys import ApiKey
from seamount.security.usage import Tokens

from .common import Text, WireModel

Name = Annotated[Text, Field(min_length=1, max_length=200)]
# What `security.keys` takes; it checks again.
_MAX_LIMIT = 2**40
_MAX_LIFETIME_S = 100 * 366 * 86_400
_MAX_SCOPES = 100


class KeyOrder(WireModel):
    """A key to be made."""

    tenant: Text = Field("default", max_length=63, description="On whose behalf it acts; made if new.")
    label: Text = Field("", max_length=200, description="What to write beside it.")
    is_admin: bool = Field(False, description="May use everything.")
    models: list[Name] | None = Field(
        None, min_length=1, max_length=_MAX_SCOPES, description="The only models it may use; null for all."
    )
    routes: list[Name] | None = Field(
        None, min_length=1, max_length=_MAX_SCOPES, description="The only routes it may use; null for the usual ones."
    )
    expires_in_s: int | None = Field(None, ge=1, le=_MAX_LIFETIME_S, description="Seconds; null never.")
    requests_per_minute: int | None = Field(None, ge=1, le=_MAX_LIMIT, description="Requests to the model.")
    tokens_per_minute: int | None = Field(None, ge=1, le=_MAX_LIMIT, description="In and out together.")
    max_concurrent: int | None = Field(None, ge=1, le=_MAX_LIMIT, description="Requests at once.")
    priority: int = Field(0, ge=-1, le=1, description="-1 fills idle time, 0 is usual, 1 goes first.")

    def principal(self) -> Principal:
        """Return whom the key shall stand for."""
        return Principal(
            key_id=None,
            tenant=self.tenant,
            is_admin=self.is_admin,
            models=None if self.models is None else tuple(self.models),
            routes=None if self.routes is None else tuple(self.routes),
            limits=Limits(
                requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
                max_concurrent=self.max_concurrent,
            ),
            priority=self.priority,
        )


class KeyUsage(WireModel):
    """Tokens that a key used since it was made."""

    prompt_tokens: int
    generated_tokens: int


class KeyCard(WireModel):
    """What is known of a key; never its secret. Times are in UTC, as 2027-01-31T12:00:00Z."""

    object: Literal["seamount.key"] = "seamount.key"
    id: str
    tenant: str
    label: str
    state: Literal["active", "expired", "revoked"]
    is_admin: bool
    models: list[str] | None
    routes: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    priority: int
    created: str
    expires: str | None
    revoked: str | None
    usage: KeyUsage


class NewKey(KeyCard):
    """A key that was just made."""

    key: str = Field(description="The key itself: shown this once, only its hash is kept.")


class KeyList(WireModel):
    """Every key that was ever made, by the second of their making."""

    object: Literal["list"] = "list"
    data: list[KeyCard]


def key_card(key: ApiKey, used: Tokens, now_s: float) -> KeyCard:
    """Return the card of a key."""
    who = key.principal
    return KeyCard(
        id=key.id,
        tenant=who.tenant,
        label=key.label,
        state=key.state(now_s),
        is_admin=who.is_admin,
        models=None if who.models is None else list(who.models),
        routes=None if who.routes is None else list(who.routes),
        requests_per_minute=who.limits.requests_per_minute,
        tokens_per_minute=who.limits.tokens_per_minute,
        max_concurrent=who.limits.max_concurrent,
        priority=who.priority,
        created=_time(key.created_s),
        expires=None if key.expires_s is None else _time(key.expires_s),
        revoked=None if key.revoked_s is None else _time(key.revoked_s),
        usage=KeyUsage(prompt_tokens=used.num_prompt, generated_tokens=used.num_generated),
    )


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
