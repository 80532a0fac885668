// The page's few helpers: elements, sizes, the clipboard.

export const $ = id => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < 3) { count /= 1024; unit++; }
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${["B", "KiB", "MiB", "GiB"][unit]}`;
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure context: another host over plain HTTP
    const field = make("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}
