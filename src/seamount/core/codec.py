"""Frozen dataclasses to bytes and back, by msgpack and an explicit list of types. Never pickle.

A `Codec` is made with the message types that may cross one boundary. Decoding checks the tag, the field names and the
field types, so that bytes from a broken or hostile peer end in a `BackendError` and never in an odd object. The types
understood: None, bool, int, float, str, bytes, Literal, unions of these, `tuple[T, ...]`, `dict[K, V]`, and nested
dataclasses.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack

from .errors import BackendError

_Check = Callable[[Any], Any]


class Codec:
    """Encodes and decodes the given dataclass types.

    Args:
        message_types: the types that may be sent as a whole message; types nested in their fields need no mention.
    """

    def __init__(self, *message_types: type) -> None:
        self._tags = {cls.__name__: cls for cls in message_types}
        self._decoders: dict[type, _Check] = {}
        for cls in message_types:
            self._decoder(cls)

    def encode(self, message: Any) -> bytes:
        """Return the message as bytes.

        Raises:
            TypeError: its type was not given to the codec (a programmer's mistake).
        """
        tag = type(message).__name__
        if self._tags.get(tag) is not type(message):
            raise TypeError(f"{tag} is not a message type of this codec")
        return msgpack.packb([tag, _plain(message)], use_bin_type=True)

    def decode(self, data: bytes) -> Any:
        """Return the message that `data` holds.

        Raises:
            BackendError: the bytes are no valid message of this codec.
        """
        try:
            tag, fields = msgpack.unpackb(data, raw=False, strict_map_key=False)
            return self._decoder(self._tags[tag])(fields)
        except (ValueError, TypeError, KeyError, RecursionError, msgpack.exceptions.UnpackException) as cause:
            raise BackendError(f"A message between processes could not be read: {cause}.") from cause

    def _decoder(self, kind: type) -> _Check:
        if kind not in self._decoders:
            self._decoders[kind] = _dataclass_decoder(kind, self._decoder)
        return self._decoders[kind]


_SCALARS = (type(None), bool, int, float, str, bytes)


def _plain(value: Any) -> Any:
    kind: Any = type(value)
    if kind in _SCALARS:
        return value
    if kind is tuple or kind is list:
        return [item if type(item) in _SCALARS else _plain(item) for item in value]
    if kind is dict:
        return {key: _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, name)) for name in _names(kind)]
    return value


@cache
def _names(kind: type) -> tuple[str, ...]:
    """The fields of a dataclass; asked once per step and stream."""
    return tuple(field.name for field in dataclasses.fields(kind))


def _dataclass_decoder(cls: type, nested: Callable[[type], _Check]) -> _Check:
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    checks = [(name, _check_for(hints[name], nested)) for name in names]

    def decode(values: Any) -> Any:
        if not isinstance(values, list) or len(values) != len(checks):
            raise ValueError(f"{cls.__name__} needs a list of {len(checks)} fields")
        return cls(**{name: check(value) for (name, check), value in zip(checks, values, strict=True)})

    return decode


def _check_for(hint: Any, nested: Callable[[type], _Check]) -> _Check:
    origin = get_origin(hint)
    if hint is Any:
        return lambda value: value
    if origin in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        return _union(tuple(_check_for(arm, nested) for arm in arms), takes_none=len(arms) < len(get_args(hint)))
    if origin is Literal:
        return _literal(get_args(hint))
    if origin is tuple:
        item = get_args(hint)[0]
        return _scalars(item) if item in _SCALARS and item is not float else _tuple(_check_for(item, nested))
    if origin is dict:
        key, value = (_check_for(arm, nested) for arm in get_args(hint))
        return _dict(key, value)
    if dataclasses.is_dataclass(hint):
        return nested(typing.cast(type, hint))
    return _scalar(hint)


def _union(arms: tuple[_Check, ...], *, takes_none: bool) -> _Check:
    def check(value: Any) -> Any:
        if value is None and takes_none:
            return None
        for arm in arms:
            try:
                return arm(value)
            except (ValueError, TypeError):
                continue
        raise ValueError(f"no type of the union fits a {type(value).__name__}")

    return check


def _literal(allowed: tuple[Any, ...]) -> _Check:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"a value is not one of {allowed}")
        return value

    return check


def _tuple(item: _Check) -> _Check:
    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"a list is needed, not {type(value).__name__}")
        return tuple([item(x) for x in value])

    return check


def _scalars(kind: type) -> _Check:
    """As `_tuple` of `_scalar`, without a call per item: token ids come by the thousand."""

    def check(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"a list is needed, not {type(value).__name__}")
        for item in value:
            if type(item) is not kind:
                raise ValueError(f"{kind.__name__} is needed, not {type(item).__name__}")
        return tuple(value)

    return check


def _dict(key: _Check, item: _Check) -> _Check:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"a map is needed, not {type(value).__name__}")
        return {key(k): item(v) for k, v in value.items()}

    return check


def _scalar(kind: Any) -> _Check:
    if kind not in _SCALARS:
        raise TypeError(f"{kind} cannot cross a process boundary")

    def check(value: Any) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"{kind.__name__} is needed, not {type(value).__name__}")
        return value

    return check
