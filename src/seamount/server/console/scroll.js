// Keeps the log at its end while an answer grows, but only for a reader who is there.

const NEAR_PX = 8;

export class StickyScroll {
  #log;
  #jump;
  #stuck = true;
  #idle = false;
  #lastTop = 0;

  /** `log` scrolls; `jump` is the button that is shown while the reader is elsewhere. */
  constructor(log, jump) {
    this.#log = log;
    this.#jump = jump;
    log.addEventListener("scroll", () => this.#moved(), { passive: true });
    // Content also grows without a message: a reasoning block is opened, the window turns, the composer grows.
    new ResizeObserver(() => this.follow()).observe(log);
  }

  /** Goes to the end if the reader was there. To be called after the content grew. */
  follow() {
    if (this.#idle) return;
    if (this.#stuck) this.toEnd();
    else this.#show();
  }

  /** For a page without messages: stays at the start until `toEnd` is called. */
  rest() {
    this.#idle = true;
    this.#log.scrollTop = 0;
    this.#jump.hidden = true;
  }

  toEnd() {
    this.#idle = false;
    this.#stuck = true;
    this.#log.scrollTop = this.#log.scrollHeight;
    this.#lastTop = this.#log.scrollTop;
    this.#show();
  }

  #moved() {
    if (this.#idle) return;
    const { scrollTop, scrollHeight, clientHeight } = this.#log;
    const fromEnd = scrollHeight - scrollTop - clientHeight;
    // Only moving up lets go: growth alone also increases the distance from the end.
    if (fromEnd <= NEAR_PX) this.#stuck = true;
    else if (scrollTop < this.#lastTop) this.#stuck = false;
    this.#lastTop = scrollTop;
    this.#show();
  }

  #show() {
    const { scrollTop, scrollHeight, clientHeight } = this.#log;
    this.#jump.hidden = this.#stuck || scrollHeight - scrollTop - clientHeight < 80;
  }
}
