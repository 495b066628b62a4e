// What a conversation is, as pure functions over plain objects. No page, no storage, no network.
//
// Messages form a tree, so that retry and edit never destroy anything: each message names its parent, and `leaf`
// names the end of the branch on show.
//   conversation: {id, title, renamed, created, updated, leaf, messages: {id: message}}
//   message: {id, parent, role, content, created} and, for answers, reasoning, model, state, finish, error, stats
//   state: streaming | done | stopped (by the user) | interrupted (page left) | error

/** Random id. crypto.randomUUID is missing on plain-http addresses, getRandomValues is not. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(nowMs) {
  return { id: newId(), title: "", renamed: false, created: nowMs, updated: nowMs, leaf: null, messages: {} };
}

/** Adds a message under `parent` and makes it the leaf. */
export function addMessage(conversation, parent, fields, nowMs) {
  const message = { id: newId(), parent, content: "", created: nowMs, ...fields };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.updated = nowMs;
  if (message.role === "user" && !conversation.title) conversation.title = titleFrom(message.content);
  return message;
}

/** Takes out a message that has no children; the leaf goes up to its parent. */
export function dropMessage(conversation, id) {
  conversation.leaf = conversation.messages[id].parent;
  delete conversation.messages[id];
}

export function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const letters = Array.from(line);
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : line;
}

/** Messages from the first to the leaf. */
export function path(conversation) {
  const messages = [];
  let id = conversation.leaf;
  while (id) {
    const message = conversation.messages[id];
    messages.push(message);
    id = message.parent;
  }
  return messages.reverse();
}

const childrenOf = (conversation, parent) =>
  Object.values(conversation.messages).filter((message) => message.parent === parent).sort((a, b) => a.created - b.created);

/** The versions of one message, itself included, oldest first. */
export const versions = (conversation, message) => childrenOf(conversation, message.parent);

/** Shows another version: the leaf becomes the newest message below it. */
export function showVersion(conversation, id) {
  let children = childrenOf(conversation, id);
  while (children.length) {
    id = children[children.length - 1].id;
    children = childrenOf(conversation, id);
  }
  conversation.leaf = id;
}

/**
 * The `messages` of a request that answers `last`: system prompt, then the branch, without reasoning.
 * Answers that failed before their first word are left out, and the user messages that then meet are joined,
 * since chat templates expect turns to alternate.
 */
export function history(conversation, last, systemPrompt) {
  const turns = systemPrompt.trim() ? [{ role: "system", content: systemPrompt }] : [];
  for (const { role, content } of path({ ...conversation, leaf: last.id })) {
    if (role === "assistant" && !content) continue;
    const before = turns[turns.length - 1];
    if (role === "user" && before?.role === "user") before.content += `\n\n${content}`;
    else turns.push({ role, content });
  }
  return turns;
}

/** Marks answers that a page left behind while they streamed. */
export function settleInterrupted(conversation) {
  for (const message of Object.values(conversation.messages)) {
    if (message.state === "streaming") message.state = "interrupted";
  }
  return conversation;
}

export function exportDocument(conversations, nowMs) {
  return { format: "seamount.conversations", version: 1, exported: new Date(nowMs).toISOString(), conversations };
}
