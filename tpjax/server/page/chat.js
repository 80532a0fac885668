// The conversation: sends, streams, edits, regenerates.

import { call, events } from "./api.js";
import { $, copy, make } from "./dom.js";
import { Markdown } from "./markdown.js";
import { chat, save, saveSoon } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
let running = null; // the AbortController of the answer that streams
let devices = "several";
let ready = false, why = "the server does not answer yet";

export const busy = () => running !== null;
export function stop() { running?.abort(); }

export function setDevices(count) {
  devices = String(count);
  document.querySelector("#hint-tp")?.replaceChildren(devices);
}

// told with every poll; sends what waits once the server can answer
export function setReady(now, reason) {
  [ready, why] = [now, reason];
  if (!chat().pending || running) return;
  if (ready) answer();
  else lastNote(waits());
}

// --- settings
export function readSettings(into) {
  for (const name of [...NUMBERS, "system"]) into[name] = $(name).value;
}

export function showSettings(from) {
  for (const name of [...NUMBERS, "system"]) if (name in from) $(name).value = from[name];
  summarise();
}

export function summarise() {
  const parts = NUMBERS.filter(name => $(name).value !== "" && $(name).value !== $(name).defaultValue);
  for (const name of ["temperature", "max_tokens"]) if (!parts.includes(name)) parts.push(name);
  const system = $("system").value.trim() ? ["system message"] : [];
  $("chosen").textContent = [...parts.map(name => `${name} ${$(name).value || "default"}`), ...system].join(", ");
}

function parameters() {
  const chosen = {};
  for (const name of NUMBERS) if ($(name).value !== "") chosen[name] = Number($(name).value);
  return chosen;
}

// --- turns
const follows = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };
// changes the log, and stays at its end if it is there
function following(change) {
  const atEnd = follows();
  change();
  if (atEnd) toEnd();
}
let atItsEnd = true; // also when the log becomes smaller: what is below it may grow
$("log").addEventListener("scroll", () => { atItsEnd = follows(); });
new ResizeObserver(() => { if (atItsEnd) toEnd(); }).observe($("log"));
const waits = () => `waits to be sent: ${why}`;

export function show() {
  $("log").replaceChildren();
  const { messages } = chat();
  if (!messages.length) {
    const hint = make("p", { className: "hint" }, make("b", { textContent: "Say something." }),
      "The response streams from a model sharded over ", make("span", { id: "hint-tp", textContent: devices }), " devices.");
    $("log").append(hint);
  }
  for (const message of messages) turn(message).finish();
  if (chat().pending) lastNote(waits());
  toEnd();
}

function turn(message) {
  document.querySelector(".hint")?.remove();
  const text = make("div", { className: "text" }), note = make("small", { textContent: message.note ?? "" });
  const actions = make("div", { className: "actions" });
  const node = make("div", { className: `turn ${message.role}` }, text, note, actions);
  node.classList.toggle("error", Boolean(message.error));
  const action = (name, run) => {
    const button = make("button", { type: "button", textContent: name });
    button.addEventListener("click", () => run(button));
    actions.append(button);
  };
  action("copy", button => copy(message.content, button));
  if (message.role === "user") action("edit", () => edit(message, node));
  else action("regenerate", () => { cutAt(message); answer(); });
  $("log").append(node);
  let markdown = null;
  if (message.role === "user") text.textContent = message.content;
  else {
    markdown = new Markdown(text, following);
    if (message.content) markdown.add(message.content);
  }
  return {
    node, note,
    add(piece) { markdown.add(piece); },
    reason(piece) {
      if (!node.reasoning) {
        node.reasoning = make("div", { className: "plain-text" });
        text.before(make("details", { className: "reasoning" }, make("summary", { textContent: "Reasoning" }), node.reasoning));
      }
      node.reasoning.append(piece);
    },
    async finish() { await markdown?.finish(); },
  };
}

function lastNote(text) {
  const note = $("log").lastElementChild?.querySelector("small");
  if (note && note.textContent !== text) {
    following(() => { note.textContent = text; });
  }
}

// removes a message and all after it
function cutAt(message) {
  const { messages } = chat(), at = messages.indexOf(message);
  messages.splice(at);
  chat().pending = false;
  while ($("log").childElementCount > at) $("log").lastElementChild.remove();
}

function edit(message, node) {
  const field = make("textarea", { value: message.content, ariaLabel: "edited message" });
  const again = make("button", { type: "button", textContent: "send again" });
  const cancel = make("button", { type: "button", textContent: "cancel" });
  const kept = [...node.children];
  again.addEventListener("click", () => {
    if (running || !field.value.trim()) return;
    cutAt(message);
    send(field.value.trim());
  });
  cancel.addEventListener("click", () => node.replaceChildren(...kept));
  node.replaceChildren(field, make("div", { className: "actions" }, again, cancel));
  field.focus();
}

// --- sending
export function send(text) {
  const message = { role: "user", content: text };
  chat().messages.push(message);
  turn(message);
  toEnd();
  answer();
}

async function answer() {
  const here = chat();
  here.pending = true;
  save();
  if (!ready) { lastNote(waits()); return; }
  here.pending = false;
  lastNote("");
  const system = $("system").value.trim();
  const said = here.messages.filter(one => one.content).map(({ role, content }) => ({ role, content }));
  const body = { messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true, stream_options: { include_usage: true }, ...parameters() };
  const message = { role: "assistant", content: "" };
  const view = turn(message);
  view.node.classList.add("busy");
  document.body.classList.add("busy");
  running = new AbortController();
  $("send").disabled = $("chats").disabled = $("new").disabled = $("delete").disabled = true;
  $("stop").disabled = false;
  toEnd();
  const start = performance.now();
  let first = null, usage = null, ended = false, later = false;
  try {
    const response = await call("v1/chat/completions", { body, signal: running.signal });
    for await (const data of events(response)) {
      if (data === "[DONE]") { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const delta = chunk.choices[0]?.delta;
      if (delta?.reasoning_content) { first ??= performance.now(); view.reason(delta.reasoning_content); }
      if (!delta?.content) continue;
      first ??= performance.now();
      if (!message.content) here.messages.push(message);
      message.content += delta.content;
      view.add(delta.content);
      saveSoon();
    }
    if (!ended) throw new Error("the response ended early");
    message.note = figures(usage, start, first);
  } catch (error) {
    later = Boolean(error.later) && !message.content;
    message.error = error.name !== "AbortError";
    message.note = message.error ? error.message : "stopped";
    if (message.error && message.content) message.note += ": this is what had come";
  }
  running = null;
  document.body.classList.remove("busy");
  $("send").disabled = $("chats").disabled = $("new").disabled = $("delete").disabled = false;
  $("stop").disabled = true;
  const atEnd = follows();
  view.node.classList.remove("busy");
  view.node.classList.toggle("error", Boolean(message.error));
  view.note.textContent = message.note;
  if (later) {
    view.node.remove();
    here.pending = true;
    why = message.note;
    lastNote(waits());
  } else if (!message.content) here.messages.push(message);  // regenerate finds its place by it
  if (atEnd) toEnd();
  save();
  await view.finish();
  if (atEnd) toEnd();
}

function figures(usage, start, first) {
  const seconds = (performance.now() - first) / 1000, count = usage.completion_tokens;
  return `${count} tokens, first after ${Math.round((first ?? performance.now()) - start)} ms` +
    (count > 1 && first ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "") +
    `, ${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens from the cache`;
}
