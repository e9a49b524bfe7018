// Making elements.  Every string becomes a text node or an attribute: what strangers say is never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Set only what differs: nothing flickers, and screen readers are told of changes alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** One child for every item, in order, made once a key and updated ever after. */
export function keyed(parent, items, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let at = null;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = known.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    known.delete(key);
    const next = at ? at.nextElementSibling : parent.firstElementChild;
    if (next !== child) parent.insertBefore(child, next);
    update(child, item);
    at = child;
  }
  for (const gone of known.values()) gone.remove();
}

/** "0:3" as people say it: "0..2". */
export function blocks(span) {
  const [start, end] = ends(span);
  return end - start === 1 ? `${start}` : `${start}..${end - 1}`;
}

export const ends = (span) => span.split(":").map(Number);

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
