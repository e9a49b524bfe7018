// Draws Markdown as elements.  All text becomes text nodes, and each piece keeps the traversal that brought it.

import { el } from "../../shared/dom.js";
import { iconButton } from "../controls.js";
import { parseBlocks } from "./blocks.js";
import { parseInline } from "./inline.js";

// Number of colours in which traversals take turns, as in the terminal.
export const COLOURS = 6;
const COPIED_MS = 1500;

/** Which traversal brought which part of a text: pairs of the place where a part ends and the number of its traversal. */
export class Trips {
  constructor(pairs = []) {
    this.pairs = pairs;
  }

  /** Add a piece of text that ends at `end`. */
  add(end, traversal) {
    const last = this.pairs[this.pairs.length - 1];
    if (last && last[1] === traversal) last[0] = end;
    else this.pairs.push([end, traversal]);
  }

  /** Return the parts of the text from `from` to `to`, as `[from, to, traversal]`; the traversal may be null. */
  between(from, to) {
    const parts = [];
    let low = 0;
    for (let high = this.pairs.length; low < high; ) {
      const middle = (low + high) >> 1;
      if (this.pairs[middle][0] > from) high = middle;
      else low = middle + 1;
    }
    for (let at = from; at < to; low += 1) {
      const [end, traversal] = this.pairs[low] ?? [to, null];
      parts.push([at, Math.min(end, to), traversal]);
      at = end;
    }
    return parts;
  }
}

/** Append text that stands at `at` in the source, in one element per traversal. */
function drawText(parent, text, at, trips) {
  for (const [from, to, traversal] of trips.between(at, at + text.length)) {
    const piece = text.slice(from - at, to - at);
    parent.append(traversal === null ? piece : el("span", { class: "trip", "data-trip": traversal, "data-colour": traversal % COLOURS }, piece));
  }
}

/** Show `source` as Markdown in `home`.  Blocks that did not change keep their elements, and with them what is selected. */
export function drawMarkdown(home, source, trips) {
  const blocks = parseBlocks(source);
  blocks.forEach((block, i) => {
    const key = `${block.from} ${source.slice(block.from, block.to)}`;
    const before = home.children[i];
    if (before?.markdownKey === key) return;
    const element = drawBlock(block, trips);
    element.markdownKey = key;
    if (before) before.replaceWith(element);
    else home.append(element);
  });
  while (home.children.length > blocks.length) home.lastElementChild.remove();
}

/** Show text as it is, such as JSON, as a block of code in `home`. */
export function drawPlain(home, source, trips, info) {
  home.replaceChildren(drawCode({ info, lines: linesOf(source) }, trips));
}

/** Append text as it is, line by line. */
export function drawVerbatim(parent, source, trips) {
  appendLines(parent, linesOf(source), trips);
}

function linesOf(source) {
  let at = 0;
  return source.split("\n").map((text) => {
    at += text.length + 1;
    return { text, at: at - text.length - 1 };
  });
}

/** Append lines; their indentation has no colour. */
function appendLines(parent, lines, trips) {
  lines.forEach((line, i) => {
    const indent = line.text.length - line.text.trimStart().length;
    parent.append(line.text.slice(0, indent));
    drawText(parent, line.text.slice(indent), line.at + indent, trips);
    if (i < lines.length - 1) parent.append("\n");
  });
}

function drawBlock(block, trips) {
  switch (block.type) {
    case "heading":
      return drawLines(el(`h${Math.min(6, block.level + 2)}`, { class: `level-${block.level}` }), block.lines, trips);
    case "code":
      return drawCode(block, trips);
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, ...block.blocks.map((inner) => drawBlock(inner, trips)));
    case "list":
      return drawList(block, trips);
    case "table":
      return drawTable(block, trips);
    default:
      return drawLines(el("p"), block.lines, trips);
  }
}

function drawList(list, trips) {
  const element = el(list.ordered ? "ol" : "ul", { start: list.ordered && list.start !== 1 ? list.start : null, class: list.loose ? "loose" : null });
  for (const item of list.items) {
    const row = el("li");
    if (item.checked !== null) {
      row.className = "task";
      row.append(el("input", { type: "checkbox", disabled: "", checked: item.checked ? "" : null, "aria-label": item.checked ? "done" : "open" }));
    }
    for (const block of item.blocks) {
      // The text of a tight list has no paragraphs.
      if (block.type === "paragraph" && !list.loose) drawLines(row, block.lines, trips);
      else row.append(drawBlock(block, trips));
    }
    element.append(row);
  }
  return element;
}

function drawTable({ align, head, rows }, trips) {
  const cell = (tag, line, column) => drawLines(el(tag, { "data-align": align[column] || null, scope: tag === "th" ? "col" : null }), [line], trips);
  const table = el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((line, column) => cell("th", line, column)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((line, column) => cell("td", line, column))))));
  return el("div", { class: "scroll", role: "region", "aria-label": "Table", tabindex: "0" }, table);
}

function drawCode({ info, lines }, trips) {
  const code = el("code");
  appendLines(code, lines, trips);
  const language = info.split(/\s/)[0].slice(0, 24);
  const copy = iconButton("copy", "Copy code", () => copyText(code.textContent, copy));
  return el("figure", { class: "code" },
    el("figcaption", {}, el("span", {}, language || "text"), copy),
    el("pre", { tabindex: "0", "aria-label": language ? `Code, ${language}` : "Code" }, code));
}

/** Copy text, and say so on the button.  Without TLS browsers have no clipboard. */
export async function copyText(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copied = copyThroughField(text);
  }
  button.dataset.done = copied ? "Copied" : "Not allowed";
  setTimeout(() => delete button.dataset.done, COPIED_MS);
}

function copyThroughField(text) {
  const field = el("textarea", { class: "offscreen", "aria-hidden": "true" });
  field.value = text;
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

function drawLines(parent, lines, trips) {
  drawNodes(parent, parseInline(lines), trips);
  return parent;
}

function drawNodes(parent, nodes, trips) {
  for (const node of nodes) {
    if (node.type === "text") drawText(parent, node.text, node.at, trips);
    else if (node.type === "break") parent.append(el("br"));
    else if (node.type === "code") {
      const code = el("code");
      for (const { text, at } of node.pieces) drawText(code, text, at, trips);
      parent.append(code);
    } else {
      const element = node.type === "link" ? el("a", { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow" }) : el(node.type);
      drawNodes(element, node.children, trips);
      parent.append(element);
    }
  }
}
