// Buttons with icons, and other small controls.

import { el, svg } from "../shared/dom.js";

const ICONS = {
  close: "M4 4l8 8M12 4l-8 8",
  braces: "M6 3c-1.6 0-1.8.8-1.8 2v1.4c0 1-.6 1.6-1.4 1.6.8 0 1.4.6 1.4 1.6V11c0 1.2.2 2 1.8 2M10 3c1.6 0 1.8.8 1.8 2v1.4c0 1 .6 1.6 1.4 1.6-.8 0-1.4.6-1.4 1.6V11c0 1.2-.2 2-1.8 2",
  copy: "M6 6h7v7H6zM3 10V3h7",
  down: "M8 3v8M4.5 8L8 11.5 11.5 8M3 13.5h10",
  edit: "M3 13l.6-2.8 7-7 2.2 2.2-7 7zM9.4 4.4l2.2 2.2",
  left: "M10 3.5L5.5 8l4.5 4.5",
  list: "M2.5 4h11M2.5 8h11M2.5 12h11",
  plus: "M8 3v10M3 8h10",
  redo: "M13 8a5 5 0 1 1-1.6-3.7M13 2.5v3h-3",
  resume: "M3 8h9M8.5 4.5L12 8l-3.5 3.5",
  right: "M6 3.5L10.5 8 6 12.5",
  send: "M8 13V3.5M4 7.5L8 3.5l4 4",
  settings: "M2.5 5h5M11 5h2.5M2.5 11H5M8.5 11h5M9.2 3.4a1.7 1.7 0 1 1 0 3.3 1.7 1.7 0 0 1 0-3.3M6.8 9.3a1.7 1.7 0 1 1 0 3.4 1.7 1.7 0 0 1 0-3.4",
  stop: "M4.5 4.5h7v7h-7z",
  trash: "M3 4.5h10M6 4.5V3h4v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  tree: "M3 8h3M6 8c2 0 1.5-4 4-4h2.5M6 8c2 0 1.5 4 4 4h2.5M6 8h6.5",
};

export const icon = (name) => svg("svg", { class: "icon", viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true", "data-icon": name }, svg("path", { d: ICONS[name] }));

/** Return a button that shows an icon only; `label` is its name. */
export function iconButton(name, label, onClick, attributes = {}) {
  return onPress(el("button", { type: "button", class: "tool", "aria-label": label, title: label, ...attributes }, icon(name)), onClick);
}

/** Return a button that shows text. */
export const textButton = (label, onClick, attributes = {}) => onPress(el("button", { type: "button", ...attributes }, label), onClick);

function onPress(button, onClick) {
  button.addEventListener("click", onClick);
  return button;
}

/** Change the icon and the name of a button. */
export function setIcon(button, name, label) {
  if (button.firstElementChild?.dataset.icon === name) return;
  button.setAttribute("aria-label", label);
  button.title = label;
  button.replaceChildren(icon(name));
}

/** Make a text area as high as its text, up to `most` pixels. */
export function fitHeight(area, most = Infinity) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, most)}px`;
}
