// Creates elements.  Every string becomes a text node or an attribute, so that text from other nodes is never markup.

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

/** Set an element's text if it differs: nothing flickers, and screen readers announce changes only. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keep one child per item, in order: made when its key is new, and updated on every call. */
export function updateChildren(parent, items, keyOf, make, update) {
  const unused = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let previous = null;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = unused.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    unused.delete(key);
    const next = previous ? previous.nextElementSibling : parent.firstElementChild;
    if (next !== child) parent.insertBefore(child, next);
    update(child, item);
    previous = child;
  }
  for (const child of unused.values()) child.remove();
}

/** Return the first block of the span "0:3", and the block after its last: 0 and 3. */
export const ends = (span) => span.split(":").map(Number);

export const plural = (count, singular, many = `${singular}s`) => `${count} ${count === 1 ? singular : many}`;
