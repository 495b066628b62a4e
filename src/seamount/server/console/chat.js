// The conversations of this page and the answers on their way: what the buttons do, without the page.
// Called by app.js, which passes `changed(kind, conversation, message)` and shows what it tells:
//   "list" (titles, order), "branch" (which messages are shown), "message" (one grew), "run" (began or ended)

import { applyChunk, measure, newTiming } from "./answer.js";
import { ApiError, streamChat } from "./api.js";
import * as trees from "./conversation.js";

const SAVE_EVERY_MS = 500;

export class Chat {
  #store;
  #settings;
  #findModels;
  #changed;
  #onSaveError;
  #runs = new Map();
  #leaving = false;

  conversations = new Map();

  constructor({ store, settings, findModels, changed, onSaveError }) {
    this.#store = store;
    this.#settings = settings;
    this.#findModels = findModels;
    this.#changed = changed;
    this.#onSaveError = onSaveError;
    store.onOtherTab((id) => this.#readAgain(id));
  }

  async load() {
    for (const each of await this.#store.all()) this.conversations.set(each.id, trees.settleInterrupted(each));
  }

  running(id) {
    return this.#runs.has(id);
  }

  /** Sends `text` in the conversation `id`, or in a new one where it is null. Returns the conversation. */
  send(id, text) {
    let conversation = this.conversations.get(id);
    if (!conversation) {
      conversation = trees.newConversation(Date.now());
      this.conversations.set(conversation.id, conversation);
    }
    const question = trees.addMessage(conversation, conversation.leaf, { role: "user", content: text }, Date.now());
    this.#answer(conversation, question);
    return conversation;
  }

  /** Puts a new version of a sent message beside the old one and goes on from there. */
  edit(conversation, message, text) {
    const edited = trees.addMessage(conversation, message.parent, { role: "user", content: text }, Date.now());
    this.#answer(conversation, edited);
  }

  /** Another answer to the same message; one that failed before its first word is replaced. */
  retry(conversation, answer) {
    const question = conversation.messages[answer.parent];
    if (!answer.content && !answer.reasoning && conversation.leaf === answer.id) trees.dropMessage(conversation, answer.id);
    this.#answer(conversation, question);
  }

  stop(id) {
    this.#runs.get(id)?.controller.abort();
  }

  showVersion(conversation, id) {
    trees.showVersion(conversation, id);
    this.#save(conversation);
    this.#changed("branch", conversation);
  }

  rename(conversation, title) {
    conversation.title = title;
    conversation.renamed = true;
    this.#save(conversation);
    this.#changed("list", conversation);
  }

  /** Deletes conversations; the function it returns brings them back. */
  remove(ids) {
    const removed = ids.map((id) => this.conversations.get(id));
    for (const { id } of removed) {
      this.stop(id);
      this.conversations.delete(id);
      this.#store.remove(id).catch(this.#onSaveError);
      this.#changed("list", { id });
    }
    return () => {
      for (const conversation of removed) {
        this.conversations.set(conversation.id, conversation);
        this.#save(conversation);
        this.#changed("list", conversation);
      }
    };
  }

  /** Called as the page goes away: what has streamed so far is kept. */
  leave() {
    this.#leaving = true;
    if (this.#runs.size) this.#store.rescue([...this.#runs.keys()].map((id) => this.conversations.get(id)));
  }

  /** Called when the browser brings the page back from its cache. */
  comeBack() {
    this.#leaving = false;
  }

  async #answer(conversation, question) {
    const fields = { role: "assistant", reasoning: "", model: this.#settings.model, state: "streaming" };
    const answer = trees.addMessage(conversation, question.id, fields, Date.now());
    const run = { controller: new AbortController(), answer };
    this.#runs.set(conversation.id, run);
    this.#save(conversation);
    this.#changed("list", conversation);
    this.#changed("branch", conversation);
    this.#changed("run", conversation, answer);
    const saving = setInterval(() => this.#save(conversation), SAVE_EVERY_MS);
    try {
      await this.#stream(conversation, question, run);
      answer.state = "done";
    } catch (error) {
      if (this.#leaving) return;
      if (error.name === "AbortError") answer.state = "stopped";
      else fail(answer, error);
    } finally {
      clearInterval(saving);
      this.#runs.delete(conversation.id);
    }
    conversation.updated = Date.now();
    // A conversation that was deleted while it streamed stays deleted.
    if (this.conversations.has(conversation.id)) this.#save(conversation);
    this.#changed("message", conversation, answer);
    this.#changed("run", conversation, answer);
  }

  async #stream(conversation, question, { controller, answer }) {
    // Someone typed before the list of models was there.
    if (!answer.model) await this.#findModels();
    answer.model = this.#settings.model;
    const timing = newTiming(performance.now());
    const body = {
      model: answer.model,
      messages: trees.history(conversation, question, this.#settings.system),
      ...this.#settings.requestFields(),
    };
    for await (const chunk of streamChat(body, controller.signal)) {
      applyChunk(answer, timing, chunk, performance.now());
      conversation.updated = Date.now();
      this.#changed("message", conversation, answer);
    }
    answer.stats = measure(answer, timing);
  }

  #save(conversation) {
    this.#store.put(conversation).catch(this.#onSaveError);
  }

  async #readAgain(id) {
    if (this.#runs.has(id)) return;
    const conversation = await this.#store.get(id);
    if (conversation) this.conversations.set(id, conversation);
    else this.conversations.delete(id);
    this.#changed("list", { id });
    this.#changed("branch", { id });
  }
}

function fail(answer, error) {
  // Anything else is a fault of this page: it must be seen in the console of the browser too.
  if (!(error instanceof ApiError)) console.error(error);
  answer.state = "error";
  answer.error = {
    kind: error.kind ?? "stream",
    message: error.message,
    status: error.status ?? null,
    retryAfterS: error.retryAfterS ?? null,
  };
}
