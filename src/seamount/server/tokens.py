"""/v1/tokenize and /v1/detokenize: text to token ids and back, without the engine.

Called by `app` for HTTP and by `rpc` for gRPC; `messages` counts tokens with it. Work is done in the encoder's threads,
answers are written there too, for they can be long. It counts against a caller's requests as any other, and waits for
nobody's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest

from seamount.core.errors import ContextTooLongError, InvalidRequestError

from .answers import to_json
from .chat.answer import encode_chat
from .encoder import Encoder, Prompt
from .service import Service, T
from .streaming import while_connected
from .wire.chat import ChatRequest
from .wire.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

# What is counted at once, in the model's contexts: enough to see by how much a text is too long for one.
MAX_CONTEXTS = 8


def add_tokens(app: FastAPI, service: Service, errors: Mapping[int | str, dict[str, Any]]) -> None:
    """Give the app these routes; `errors` documents those that every route can answer with."""

    @app.post("/v1/tokenize", tags=["tokens"], responses={**errors, 200: {"model": Tokenized}}, response_model=None)
    async def tokenize_text(body: TokenizeRequest, request: HttpRequest) -> Response:
        """Return the tokens of a text, or of a chat as the model would read it."""
        return _json(await while_connected(request.receive, tokenize(service, body, to_json)))

    @app.post("/v1/detokenize", tags=["tokens"], responses={**errors, 200: {"model": Detokenized}}, response_model=None)
    async def detokenize_ids(body: DetokenizeRequest, request: HttpRequest) -> Response:
        """Return the text of tokens."""
        return _json(await while_connected(request.receive, detokenize(service, body, to_json)))


async def tokenize(service: Service, body: TokenizeRequest, write: Callable[[Tokenized], T]) -> T:
    """Return the answer, written.

    Args:
        write: called in one of the encoder's threads.

    Raises:
        SeamountError: the text has no such tokens, is too long, or may not be asked about.
    """
    body.check()
    model = _model(service, body.model)
    if body.messages is not None:
        ids = (await encode_without_engine(service, body.chat(model))).token_ids
    else:
        service.admit(model, needs_engine=False)
        ids = await _counted(
            service,
            partial(
                service.encoder.encode_text,
                body.prompt or "",
                add_special_tokens=body.add_special_tokens is not False,
                limit=_limit(service),
            ),
        )
    context = service.facts().max_model_len
    with_texts = body.return_token_strs is True
    return await service.encode(lambda: write(_tokenized(service.encoder, ids, context, with_texts=with_texts)))


async def detokenize(service: Service, body: DetokenizeRequest, write: Callable[[Detokenized], T]) -> T:
    """Return the answer, written; see `tokenize`.

    Raises:
        SeamountError: a token is none of the model's, or it may not be asked about.
    """
    service.admit(_model(service, body.model), needs_engine=False)
    size = service.facts().vocab_size
    if max(body.tokens, default=0) >= size:
        raise InvalidRequestError(
            f"A token id is {max(body.tokens)}; the model's vocabulary ends at {size - 1}.", param="tokens"
        )
    return await service.encode(lambda: write(_detokenized(service.encoder, body.tokens)))


async def encode_without_engine(service: Service, body: ChatRequest) -> Prompt:
    """Admit and encode a chat that is not to be answered: the prompt is the one that an answer would begin from.

    Raises:
        SeamountError: the model cannot be asked so, the prompt is too long to be counted, or it may not be asked.
    """
    service.admit(body.model, needs_engine=False)
    try:
        prompt, _ = await encode_chat(service, body, None, limit=_limit(service))
    except ContextTooLongError as error:
        raise _too_long(service) from error
    return prompt


async def _counted(service: Service, work: Callable[[], T]) -> T:
    try:
        return await service.encode(work)
    except ContextTooLongError as error:
        raise _too_long(service) from error


def _tokenized(encoder: Encoder, ids: tuple[int, ...], context: int, *, with_texts: bool) -> Tokenized:
    texts = [encoder.token_bytes(token_id).decode(errors="replace") for token_id in ids] if with_texts else None
    return Tokenized(count=len(ids), max_model_len=context, tokens=list(ids), token_strs=texts)


def _detokenized(encoder: Encoder, ids: list[int]) -> Detokenized:
    return Detokenized(prompt=encoder.decode(ids, skip_special_tokens=False))


def _model(service: Service, name: str | None) -> str:
    return service.model_name() if name is None else name


def _limit(service: Service) -> int:
    return MAX_CONTEXTS * service.facts().max_model_len


def _too_long(service: Service) -> ContextTooLongError:
    return ContextTooLongError(
        f"The text has more than {_limit(service)} tokens, which is {MAX_CONTEXTS} times the model's context.",
        hint="Count it in parts.",
    )


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
