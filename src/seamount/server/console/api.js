// Talks to the server: its OpenAI-compatible endpoints, and its keys. Knows nothing of conversations or of the page.

import { proof } from "./credential.js";

/** kind: "network" (no answer), "http" (a status and a body), "stream" (an error chunk), "cut" (ended too early). */
export class ApiError extends Error {
  constructor(kind, message, { status = null, code = null, retryAfterS = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/**
 * Splits buffered event-stream text into the data of its complete events and what is left over.
 * Pure. Comments and other fields are skipped; several data lines in one event are joined, as the standard says.
 */
export function parseEvents(buffer) {
  // A lone \r at the very end may be half of \r\n: leave it for the next call.
  const end = buffer.endsWith("\r") ? buffer.length - 1 : buffer.length;
  const parts = buffer.slice(0, end).replace(/\r\n?/g, "\n").split("\n\n");
  const rest = parts.pop() + buffer.slice(end);
  const events = [];
  for (const part of parts) {
    const lines = part.split("\n").filter((line) => line.startsWith("data:"));
    if (lines.length) events.push(lines.map((line) => line.slice(line[5] === " " ? 6 : 5)).join("\n"));
  }
  return { events, rest };
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...proof() } });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("network", cause.message);
  }
  if (!response.ok) throw await httpError(response);
  return response;
}

async function httpError(response) {
  const text = await response.text().catch(() => "");
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Not our server's body (a proxy's page, say): the status line must do.
  }
  const message = error?.message || `${response.status} ${response.statusText}`.trim();
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  return new ApiError("http", message, { status: response.status, code: error?.code ?? null, retryAfterS });
}

export async function listModels() {
  const response = await request("/v1/models", { cache: "no-store" });
  return (await response.json()).data;
}

export async function listKeys() {
  const response = await request("/v1/admin/keys", { cache: "no-store" });
  return (await response.json()).data;
}

/** Makes a key; what comes back holds it in `key`, this once. */
export async function makeKey(order) {
  const headers = { "content-type": "application/json" };
  const response = await request("/v1/admin/keys", { method: "POST", headers, body: JSON.stringify(order) });
  return response.json();
}

export async function revokeKey(id) {
  await request(`/v1/admin/keys/${encodeURIComponent(id)}/revoke`, { method: "POST" });
}

/** Yields the JSON chunks of a streamed chat completion until its end. Throws ApiError, or AbortError on `signal`. */
export async function* streamChat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let finished = false;
  try {
    while (true) {
      const { value, done } = await read(reader);
      const { events, rest } = parseEvents(buffer + decoder.decode(value, { stream: !done }));
      buffer = rest;
      for (const data of events) {
        if (data === "[DONE]") return;
        const chunk = parseChunk(data);
        if (chunk.error) throw new ApiError("stream", chunk.error.message, { code: chunk.error.code ?? null });
        finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
        yield chunk;
      }
      if (done && finished) return;
      if (done) throw new ApiError("cut", "the stream ended without [DONE]");
    }
  } finally {
    // Leaving early (stop, error) must close the connection, so that the server frees what the request holds.
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new ApiError("cut", cause.message);
  }
}

function parseChunk(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("stream", `unreadable event: ${data.slice(0, 120)}`);
  }
}
