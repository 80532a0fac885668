// Starts the page: wires the controls, and asks the server every second how it is.

import { call, onKeyNeeded, setKey } from "./api.js";
import * as conversation from "./chat.js";
import { $, make } from "./dom.js";
import * as live from "./live.js";
import * as shards from "./shards.js";
import { chat, deleteChat, load, newChat, save, store, title } from "./store.js";

const WAITING = { loading: "the model loads", draining: "the server stops", failed: "the engine has failed" };
let shown = false, wake = () => {};

// --- chats and settings
function listChats() {
  $("chats").replaceChildren(...store.chats.map((one, i) => make("option", { value: i, textContent: title(one) })));
  $("chats").value = store.current;
}

function showChat() {
  listChats();
  conversation.show();
}

load();
conversation.showSettings(store.settings);
$("text").value = store.draft ?? "";
showChat();
$("sampling").addEventListener("input", () => { conversation.readSettings(store.settings); conversation.summarise(); save(); });
$("chats").addEventListener("change", () => { store.current = Number($("chats").value); save(); conversation.show(); });
$("new").addEventListener("click", () => { newChat(); showChat(); $("text").focus(); });
$("delete").addEventListener("click", () => { deleteChat(); showChat(); });

$("form").addEventListener("submit", event => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || conversation.busy() || chat().pending) return;
  $("text").value = store.draft = "";
  conversation.send(text);
  listChats();
});
$("text").addEventListener("input", () => { store.draft = $("text").value; save(); });
$("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", conversation.stop);
addEventListener("pagehide", save);

// --- the key
onKeyNeeded(words => {
  $("key").firstElementChild.textContent = words;
  $("key").hidden = false;
});
$("key").addEventListener("submit", event => {
  event.preventDefault();
  setKey($("secret").value);
  $("secret").value = "";
  $("key").hidden = true;
  wake();
});

// --- the server's state
function showState(name, words) {
  $("state").textContent = words;
  $("state").className = name;
  document.body.classList.toggle("gone", name === "gone");
}

async function poll() {
  try {
    const now = await (await call("stats")).json();
    showState(now.state, now.state);
    $("model").textContent = now.model;
    live.show(now);
    conversation.setReady(now.state === "ready", WAITING[now.state] ?? now.state);
    if (!shown && now.state === "ready") {
      const model = await (await call("shards")).json();
      if (model.tensors) {
        shards.show(model);
        conversation.setDevices(model.tp);
        shown = true;
      }
    }
  } catch (error) {
    if (error.status === 401) showState("locked", "API key needed");
    else if (error.status === 0) showState("gone", "gone: the server does not answer");
    else showState("failed", error.message);
    if (error.status === 0) shown = false; // another may come, with another model
    conversation.setReady(false, error.status === 401 ? "the API key is needed" : error.message);
  }
}

for (;;) {
  await poll();
  await new Promise(resolve => { wake = resolve; setTimeout(resolve, 1000); });
}
