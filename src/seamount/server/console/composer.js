// The box where messages are written. Keeps what is typed as a draft of its conversation.

import { $, composing, fitHeight } from "./dom.js";
import { drafts } from "./store.js";

export class Composer {
  #input = $("composer-input");
  #place = "new";
  #running = false;

  /** `send(text)` takes the text; `editLast()` is asked for by ArrowUp in an empty box. */
  constructor({ send, editLast }) {
    const submit = () => {
      const text = this.#input.value.trim();
      if (!text || this.#running) return;
      // Clear first: `send` may switch to a new conversation, whose draft is loaded then.
      this.setText("");
      send(text);
    };
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    this.#input.addEventListener("input", () => this.#changed());
    this.#input.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
        event.preventDefault();
        submit();
      } else if (event.key === "ArrowUp" && !this.#input.value && editLast()) {
        event.preventDefault();
      }
    });
  }

  /** Shows the draft of another conversation. */
  open(conversationId) {
    this.#place = conversationId ?? "new";
    this.#input.value = drafts.get(this.#place);
    this.#fit();
  }

  setText(text) {
    this.#input.value = text;
    this.#changed();
  }

  focus() {
    this.#input.focus();
  }

  setRunning(running) {
    this.#running = running;
    const held = [$("send"), $("stop")].includes(document.activeElement);
    $("stop").hidden = !running;
    $("send").hidden = running;
    if (held) this.focus();
  }

  #changed() {
    drafts.set(this.#place, this.#input.value);
    this.#fit();
  }

  #fit() {
    fitHeight(this.#input);
    $("send").disabled = !this.#input.value.trim();
  }
}
