// Chats and settings in localStorage: they survive a reload. The oldest chats go where there is no room.

const NAME = "tpjax.page", MOST_CHATS = 30;
export const store = { settings: {}, chats: [], current: 0 };
let timer = null;

export function load() {
  try { Object.assign(store, JSON.parse(localStorage.getItem(NAME) ?? "{}")); } catch { /* not ours */ }
  if (!Array.isArray(store.chats) || !store.chats.length) store.chats = [empty()];
  if (!store.chats[store.current]) store.current = 0;
}

export function chat() { return store.chats[store.current]; }

export function title(one) {
  const first = one.messages[0]?.content.trim().split("\n")[0] ?? "New chat";
  return first.length > 60 ? `${first.slice(0, 59)}…` : first;
}

export function newChat() {
  const blank = store.chats.findIndex(one => !one.messages.length);
  if (blank < 0) store.chats.unshift(empty());
  store.current = Math.max(blank, 0);
  store.chats.length = Math.min(store.chats.length, MOST_CHATS);
  save();
}

export function deleteChat() {
  store.chats.splice(store.current, 1);
  store.current = 0;
  if (!store.chats.length) store.chats = [empty()];
  save();
}

// soon: a stream asks for it with every piece
export function saveSoon() { timer ??= setTimeout(save, 500); }

export function save() {
  clearTimeout(timer);
  timer = null;
  for (;;) {
    try { localStorage.setItem(NAME, JSON.stringify(store)); return; }
    catch { // no room, or no storage at all
      const oldest = store.chats.length - 1;
      if (oldest < 1 || oldest === store.current) return;
      store.chats.pop();
    }
  }
}

function empty() { return { messages: [], pending: false }; }
