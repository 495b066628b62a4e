"""Who a caller is, once authenticated, and what they may use; and which addresses are this machine's own.

Made by the implementations of `core.ports.Authenticator`; read by the server. Knows no key and no protocol.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one key may use; None is no limit.

    Attributes:
        requests_per_minute, tokens_per_minute: refilled evenly; tokens are those of prompts and of answers.
        max_concurrent: requests at once.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, kw_only=True)
class Principal:
    """A caller, and what they may use.

    Attributes:
        key_id: public id of the key that proved it; None where no key was asked for.
        tenant: on whose behalf they act.
        is_admin: may use every route and every model.
        models, routes: the only ones they may use; None for all that need no more than a key.
        limits: how much they may use.
        priority: -1 fills idle time, 0 is usual, 1 goes first.
    """

    key_id: str | None
    tenant: str
    is_admin: bool = False
    models: tuple[str, ...] | None = None
    routes: tuple[str, ...] | None = None
    limits: Limits = Limits()
    priority: int = 0


def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine only. A name other than localhost is not trusted to be."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
