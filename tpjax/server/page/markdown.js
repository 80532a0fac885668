// Markdown while it streams. The server renders it in parts, and never all of it again: while more text comes
// only the last block can change, so the others are kept. At most one part is under way, and the pause
// before the next grows with the time that one took. What has come since shows as plain text.

import { call } from "./api.js";
import { copy, make } from "./dom.js";

const LIMIT = 16000; // characters of one part: the server takes 16,384
const PAUSE_MS = 250, PAUSE_FACTOR = 4, SHOW_MS = 50;

export class Markdown {
  #text = ""; #kept = 0; #rendered = 0; #fence = ""; #timer = null; #running = null; #pause = PAUSE_MS; #showing = null; #change;
  #fixed = make("div"); #last = make("div"); #new = document.createTextNode("");

  // change: calls what it is given, which changes the document
  constructor(node, change = update => update()) {
    this.#change = change;
    const rest = make("span", { className: "plain-text" });
    rest.append(this.#new);
    node.replaceChildren(this.#fixed, this.#last, rest);
  }

  add(piece) {
    this.#text += piece.replace(/\r\n?/g, "\n");
    this.#showing ??= setTimeout(() => this.#show(), SHOW_MS); // not with every token
    if (this.#timer === null && this.#running === null) this.#timer = setTimeout(() => this.#start(), this.#pause);
  }

  // renders what is left; then the text is complete
  async finish() {
    await this.#running;
    while (this.#kept < this.#text.length && await this.#start(true));
  }

  #show() {
    clearTimeout(this.#showing);
    this.#showing = null;
    this.#change(() => { this.#new.data = this.#text.slice(this.#rendered); });
  }

  #start(final = false) {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#running = this.#part(final).finally(() => { this.#running = null; });
    return this.#running;
  }

  // renders one part; returns whether more may be rendered
  async #part(final) {
    const from = this.#kept, fence = this.#fence, upTo = this.#text.length;
    let part = this.#text.slice(from, from + LIMIT - fence.length);
    const whole = from + part.length === upTo;
    if (!whole) part = part.slice(0, part.lastIndexOf("\n") + 1 || part.length);
    const begun = performance.now();
    let blocks;
    try {
      ({ blocks } = await (await call("render", { body: { text: fence + part } })).json());
    } catch {
      if (!final) this.#pause = Math.min(this.#pause * 2, 10000);
      return false; // it stays plain text
    }
    this.#pause = Math.max(PAUSE_MS, PAUSE_FACTOR * (performance.now() - begun));
    const nodes = blocks.map(block => element(block.html));
    let end = from; // of the blocks that do not change any more
    if (whole && final) end = upTo;
    else if (blocks.length > 1) end = from + offset(fence + part, blocks.at(-1).line) - fence.length;
    else if (!whole) { // one block, longer than a part: it goes on in the next
      end = from + part.length;
      if (!fence) this.#fence = /^ {0,3}(`{3,}|~{3,})[^\n]*\n/.exec(part)?.[0] ?? "";
    }
    const complete = end === from + part.length;
    if (blocks.length > 1 || (whole && final)) this.#fence = "";
    this.#kept = end;
    this.#rendered = from + part.length;
    this.#change(() => {
      this.#fixed.append(...nodes.slice(0, complete ? undefined : -1));
      this.#last.replaceChildren(...(complete ? [] : nodes.slice(-1)));
      this.#show();
    });
    if (!final && this.#rendered < this.#text.length) this.#timer = setTimeout(() => this.#start(), this.#pause);
    return !(whole && final);
  }
}

function offset(text, line) {
  let at = 0;
  while (line-- > 0) at = text.indexOf("\n", at) + 1;
  return at;
}

// what the server has sanitised, with a button on code
function element(html) {
  const block = make("div");
  block.innerHTML = html;
  for (const pre of block.querySelectorAll("pre")) {
    const button = make("button", { type: "button", textContent: "copy" });
    button.addEventListener("click", () => copy(pre.textContent, button));
    const box = make("div", { className: "code" });
    pre.replaceWith(box);
    box.append(button, pre);
  }
  return block;
}
