"""The terminal chat's other source of answers: a running server, any that speaks the OpenAI API.

Made by `cli.wire`, used by `cli.chat` through `cli.backends.ChatBackend`. Imports no engine and no torch.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from seamount.core.errors import BackendError, ConfigError, RequestError, SeamountError
from seamount.core.settings import ClientConfig

from .backends import Piece, with_switch

_CONNECT_TIMEOUT_S = 10.0
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL: the authority is trusted.
_OTHER_NAME = (62, 64)
_BASE_HINT = "Give the API's base, for instance http://127.0.0.1:8000/v1."


class ServerBackend:
    """A server that speaks the OpenAI API.

    Args:
        url: the API's base, such as http://127.0.0.1:8000/v1; without a path, /v1 is added.
        model: the model to ask for; None takes the first that the server lists.
        config: the key to send, and the authority to trust.

    Raises:
        ConfigError: the address or the authority's file cannot be used.
        BackendError: the server cannot be reached, or does not speak this API.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        config: ClientConfig | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        config = config or ClientConfig()
        base = _base_url(url)
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        # trust_env=False: what is typed here goes to the named server, never through a proxy from the environment.
        self._client = httpx.Client(
            base_url=base,
            headers={"authorization": f"Bearer {config.api_key}"} if config.api_key else {},
            verify=_trust(config.tls_ca),
            timeout=timeout,
            trust_env=False,
            transport=transport,
        )
        self._url = base
        try:
            self.name = model or self._first_model()
        except SeamountError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stream(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], think: bool | None
    ) -> Generator[Piece, None, None]:
        """See `ChatBackend.stream`."""
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }

        def ask(template_kwargs: Mapping[str, bool]) -> Iterator[Piece]:
            return self._post(body | ({"chat_template_kwargs": dict(template_kwargs)} if template_kwargs else {}))

        yield from with_switch(ask, think)

    def _post(self, body: Mapping[str, Any]) -> Iterator[Piece]:
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response)
                with closing(_events(response.iter_lines())) as events:
                    yield from (_piece(event) for event in events)
        except httpx.HTTPError as cause:
            raise self._unreachable(cause) from cause

    def _first_model(self) -> str:
        try:
            response = self._client.get("models")
        except httpx.HTTPError as cause:
            raise self._unreachable(cause) from cause
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as cause:
            raise BackendError(f"{self._url} lists no model.", hint=_BASE_HINT) from cause

    def _unreachable(self, cause: httpx.HTTPError) -> BackendError:
        refused = _certificate_refused(cause)
        if refused is not None:
            hint = (
                "Set SEAMOUNT_CLIENT__TLS_CA to the file of the authority that signed it (ca.pem of `seamount cert`)."
            )
            if refused.verify_code in _OTHER_NAME:
                hint = "Give --url a name or an address that the certificate is for."
            return BackendError(
                f"The certificate of {self._url} is not trusted: {refused.verify_message.rstrip('.')}.", hint=hint
            )
        reason = str(cause) or type(cause).__name__
        hint = "Is it running? `seamount serve` starts one."
        return BackendError(f"{self._url} does not answer: {reason}.", hint=hint)


def _base_url(url: str) -> httpx.URL:
    try:
        base = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as cause:
        raise ConfigError(f"{url} is no address: {cause}.", hint=_BASE_HINT) from cause
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError(f"{url} is no http address.", hint=_BASE_HINT)
    return base.copy_with(path="/v1/" if base.path in ("", "/") else base.path.rstrip("/") + "/")


def _trust(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as cause:  # an SSLError is one
        raise ConfigError(f"The authority {authority} cannot be read: {cause.strerror}.") from cause


def _certificate_refused(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """Return what the TLS library said, which httpx and its parts raise their own errors from."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ssl.SSLCertVerificationError):
        found = found.__cause__ or found.__context__
    return found


def _events(lines: Iterator[str]) -> Generator[dict[str, Any], None, None]:
    """Yield the JSON objects of a server-sent stream, until its end mark."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as cause:
            raise BackendError("The server sent a broken event.") from cause
        if not isinstance(event, dict):
            raise BackendError("The server sent a broken event.")
        if event.get("error"):
            raise _reported(event, BackendError) or BackendError("The server reported an error of an unknown form.")
        yield event
    raise BackendError("The server broke the answer off.", hint="/retry asks again.")


def _piece(event: Mapping[str, Any]) -> Piece:
    try:
        usage = event.get("usage")
        num_tokens = int(usage["completion_tokens"]) if usage else 0
        if not event["choices"]:
            return Piece(num_tokens=num_tokens)
        choice = event["choices"][0]
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        return Piece(
            reasoning=reasoning,
            content=delta.get("content") or "",
            num_tokens=num_tokens,
            finish_reason=choice.get("finish_reason"),
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as cause:
        raise BackendError("The server sent an event of an unknown form.") from cause


def _refusal(response: httpx.Response) -> SeamountError:
    kind: type[SeamountError] = RequestError if response.status_code < 500 else BackendError
    try:
        reported = _reported(response.json(), kind)
    except ValueError:
        reported = None
    if reported is not None:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            reported.hint = "Set SEAMOUNT_CLIENT__API_KEY to your key."
        return reported
    hint = _BASE_HINT if response.status_code == httpx.codes.NOT_FOUND else None
    return kind(f"{response.url} answered with status {response.status_code}.", hint=hint)


def _reported(body: Any, kind: type[SeamountError]) -> SeamountError | None:
    """Return the error that an OpenAI error body tells of; None when it is no such body."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not error.get("message"):
        return None
    return kind(f"The server says: {error['message']}", param=error.get("param"))
