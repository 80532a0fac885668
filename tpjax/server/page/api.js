// Requests to the server. The API key stays in this tab: sessionStorage.

const KEY = "tpjax.key";
let ask = () => {};

export class ServerError extends Error {
  // status 0: no answer at all
  constructor(message, status, code) { super(message); Object.assign(this, { status, code }); }
  // the request can be sent again later: the server is gone, loads, drains, or wants a key
  get later() { return this.status === 0 || this.status === 401 || (this.status === 503 && this.code !== "failed"); }
}

export function onKeyNeeded(callback) { ask = callback; }
export function setKey(key) { sessionStorage.setItem(KEY, key); }

export async function call(path, { body, signal } = {}) {
  const headers = {}, key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) ask(key ? "This API key is wrong" : "This server needs an API key");
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(error?.message ?? `status ${response.status}`, response.status, error?.code);
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts)
      for (const line of part.split("\n"))
        if (line.startsWith("data: ")) yield line.slice(6);
  }
}
