"""The HTTP API's answers as gRPC's messages. Used by `methods`; knows no call and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from seamount.server.wire.chat import (
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    ContentLogprob,
)
from seamount.server.wire.common import Usage
from seamount.server.wire.completions import CompletionChoice, CompletionLogprobs, CompletionResponse
from seamount.server.wire.embeddings import EmbeddingItem, EmbeddingResponse
from seamount.server.wire.tokens import Detokenized, Tokenized
from seamount.server.wire.tools import ToolCall, ToolCallDelta

from . import seamount_pb2 as pb

_FINISH_REASONS: dict[str | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def chat_response(answer: ChatResponse) -> pb.ChatResponse:
    """Return a whole chat's message."""
    choices = [
        pb.ChatChoice(
            index=choice.index,
            message=_assistant(choice.message),
            logprobs=_chat_logprobs(choice.logprobs),
            finish_reason=_FINISH_REASONS[choice.finish_reason],
            **_stop(choice.stop_reason),
        )
        for choice in answer.choices
    ]
    return pb.ChatResponse(
        id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=_usage(answer.usage)
    )


def chat_chunk(chunk: ChatChunk) -> pb.ChatChunk:
    """Return the message of one chunk of a chat."""
    return pb.ChatChunk(
        id=chunk.id,
        created=chunk.created,
        model=chunk.model,
        choices=[_chunk_choice(choice) for choice in chunk.choices],
        usage=_usage(chunk.usage),
    )


def completion_response(answer: CompletionResponse) -> pb.CompletionResponse:
    """Return the message of a whole completion, or of one chunk."""
    return pb.CompletionResponse(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[_completion_choice(choice) for choice in answer.choices],
        usage=_usage(answer.usage),
    )


def embedding(item: EmbeddingItem) -> pb.Embedding:
    """Return the message of one input's embedding."""
    # Text of numbers is there only for who asks for base64, and here nobody can.
    return pb.Embedding(index=item.index, embedding=cast(list[float], item.embedding))


def embed_response(answer: EmbeddingResponse, data: Sequence[pb.Embedding]) -> pb.EmbedResponse:
    """Return the message of all embeddings, each of which is one already."""
    usage = pb.Usage(prompt_tokens=answer.usage.prompt_tokens)
    return pb.EmbedResponse(model=answer.model, data=data, usage=usage)


def tokenize_response(answer: Tokenized) -> pb.TokenizeResponse:
    """Return the message of a text's tokens."""
    return pb.TokenizeResponse(
        count=answer.count,
        max_model_len=answer.max_model_len,
        tokens=answer.tokens,
        token_strs=answer.token_strs or (),
    )


def detokenize_response(answer: Detokenized) -> pb.DetokenizeResponse:
    """Return the message of tokens' text."""
    return pb.DetokenizeResponse(prompt=answer.prompt)


def _assistant(message: ChatMessage) -> pb.AssistantMessage:
    return pb.AssistantMessage(
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=[_tool_call(call) for call in message.tool_calls or ()],
    )


def _tool_call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)


def _chunk_choice(choice: ChatChunkChoice) -> pb.ChatChunkChoice:
    delta = choice.delta
    return pb.ChatChunkChoice(
        index=choice.index,
        delta=pb.ChatDelta(
            content=delta.content,
            reasoning_content=delta.reasoning_content,
            tool_calls=[_tool_call_delta(call) for call in delta.tool_calls or ()],
        ),
        logprobs=_chat_logprobs(choice.logprobs),
        finish_reason=_FINISH_REASONS[choice.finish_reason],
        **_stop(choice.stop_reason),
    )


def _tool_call_delta(call: ToolCallDelta) -> pb.ToolCallDelta:
    return pb.ToolCallDelta(index=call.index, id=call.id, name=call.function.name, arguments=call.function.arguments)


def _completion_choice(choice: CompletionChoice) -> pb.CompletionChoice:
    return pb.CompletionChoice(
        index=choice.index,
        text=choice.text,
        logprobs=None if choice.logprobs is None else _columns(choice.logprobs),
        finish_reason=_FINISH_REASONS[choice.finish_reason],
        **_stop(choice.stop_reason),
    )


def _columns(logprobs: CompletionLogprobs) -> pb.CompletionLogprobs:
    return pb.CompletionLogprobs(
        tokens=logprobs.tokens,
        token_logprobs=logprobs.token_logprobs,
        top_logprobs=[pb.CompletionLogprobs.Top(logprobs=top) for top in logprobs.top_logprobs],
        text_offset=logprobs.text_offset,
    )


def _chat_logprobs(logprobs: ChatLogprobs | None) -> Sequence[pb.ContentLogprob]:
    return () if logprobs is None else [_content_logprob(entry) for entry in logprobs.content]


def _content_logprob(entry: ContentLogprob) -> pb.ContentLogprob:
    return pb.ContentLogprob(
        token=entry.token,
        logprob=entry.logprob,
        token_bytes=bytes(entry.bytes),
        top_logprobs=[
            pb.TopLogprob(token=top.token, logprob=top.logprob, token_bytes=bytes(top.bytes))
            for top in entry.top_logprobs
        ],
    )


def _stop(reason: str | int | None) -> dict[str, Any]:
    if reason is None:
        return {}
    return {"stop_string": reason} if isinstance(reason, str) else {"stop_token_id": reason}


def _usage(usage: Usage | None) -> pb.Usage | None:
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=prompt.cached_tokens if prompt else 0,
        reasoning_tokens=completion.reasoning_tokens if completion else None,
    )
