// Grows one answer out of the chunks of a stream, and measures it. Pure but for the message it is given.

/** Stats of an answer that has not begun; times in milliseconds on the caller's clock. */
export const newTiming = (sentMs) => ({ sentMs, firstMs: null, contentMs: null, lastMs: null, numTextChunks: 0 });

/** Adds one chunk to `message` and notes when it came. */
export function applyChunk(message, timing, chunk, nowMs) {
  if (chunk.usage) message.usage = pickUsage(chunk.usage);
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  const content = delta.content ?? "";
  if (reasoning || content) {
    timing.firstMs ??= nowMs;
    timing.lastMs = nowMs;
    timing.numTextChunks += 1;
  }
  if (content) timing.contentMs ??= nowMs;
  message.reasoning += reasoning;
  message.content += content;
  if (choice.finish_reason) message.finish = choice.finish_reason;
  message.stats = measure(message, timing);
}

function pickUsage(usage) {
  return { numPromptTokens: usage.prompt_tokens, numAnswerTokens: usage.completion_tokens };
}

/**
 * What the line under an answer shows. The server's usage gives the exact token count; an answer that was stopped has
 * none, and the number of chunks stands in for it (`exact` false). The rate leaves out the wait for the first token.
 */
export function measure(message, timing) {
  const { sentMs, firstMs, contentMs, lastMs } = timing;
  if (firstMs === null) return null;
  const numAnswerTokens = message.usage?.numAnswerTokens ?? timing.numTextChunks;
  const streamedS = (lastMs - firstMs) / 1000;
  return {
    firstTokenS: (firstMs - sentMs) / 1000,
    thoughtS: message.reasoning ? ((contentMs ?? lastMs) - firstMs) / 1000 : null,
    tokensPerS: numAnswerTokens > 1 && streamedS > 0 ? (numAnswerTokens - 1) / streamedS : null,
    numAnswerTokens,
    numPromptTokens: message.usage?.numPromptTokens ?? null,
    exact: message.usage !== undefined,
  };
}
