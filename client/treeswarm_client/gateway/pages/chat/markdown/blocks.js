// Parses the blocks of Markdown: paragraphs, headings, code, quotes, lists, tables and rules.  Pure.
//
// Every line knows where it stands in the source, so that each piece of text can be traced to the tokens it came from.
// HTML is no block of its own: it stays text.

// Quotes and lists within each other; deeper ones stay text, so that no text can exhaust the stack.
const DEEPEST = 12;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const TASK = /^\[([ xX])\][ \t]+/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const TAB = 4;

/**
 * Return the blocks of a text, each with a `type` and the part of the source `from` … `to`.  Inline text is given as `lines`
 * or `cells` of lines, each with its `text` and the place `at` which it begins in the source.
 */
export function parseBlocks(source) {
  const lines = [];
  let at = 0;
  for (const text of source.split("\n")) {
    lines.push({ text: text.replace(/\r$/, ""), at });
    at += text.length + 1;
  }
  return parseLines(lines, 0);
}

const isBlank = (line) => !/[^ \t]/.test(line.text);

function indentOf(text) {
  let columns = 0;
  for (const character of text) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += TAB - (columns % TAB);
    else break;
  }
  return columns;
}

/** Return the line without its first characters. */
const cut = (line, length) => ({ text: line.text.slice(length), at: line.at + length });

/** Return the line without `columns` of its indentation, or without all of it if it has less. */
function outdent(line, columns) {
  let length = 0;
  for (let column = 0; column < columns && length < line.text.length; length += 1) {
    const character = line.text[length];
    if (character === " ") column += 1;
    else if (character === "\t") column += TAB - (column % TAB);
    else break;
  }
  return cut(line, length);
}

const trimStart = (line) => cut(line, line.text.length - line.text.trimStart().length);
const trim = (line) => ({ ...trimStart(line), text: line.text.trim() });
const endOf = (line) => line.at + line.text.length;

function parseLines(lines, depth) {
  const blocks = [];
  let next = 0;
  while (next < lines.length) {
    if (isBlank(lines[next])) {
      next += 1;
      continue;
    }
    const start = next;
    const block = parseOne(lines, start, depth);
    next = start + block.count;
    delete block.count;
    block.from = lines[start].at;
    block.to = endOf(lines[next - 1]);
    blocks.push(block);
  }
  return blocks;
}

/** Return the block that begins with line `i`, and the `count` of its lines. */
function parseOne(lines, i, depth) {
  const { text } = lines[i];
  if (indentOf(text) >= TAB) return parseIndented(lines, i);
  const fence = openFence(text);
  if (fence) return parseFence(lines, i, fence);
  const heading = HEADING.exec(text);
  if (heading) {
    const line = trim(cut(lines[i], heading[0].length));
    line.text = line.text.replace(/(?:^|[ \t]+)#+$/, "");
    return { type: "heading", level: heading[1].length, lines: [line], count: 1 };
  }
  if (RULE.test(text)) return { type: "rule", count: 1 };
  if (depth < DEEPEST && QUOTE.test(text)) return parseQuote(lines, i, depth);
  if (depth < DEEPEST && ITEM.test(text)) return parseList(lines, i, depth);
  return parseTable(lines, i) ?? parseParagraph(lines, i);
}

function openFence(text) {
  const match = FENCE.exec(text);
  // The word after backticks has no backticks: otherwise it is a code span.
  return match && !(match[1][0] === "`" && match[2].includes("`")) ? { mark: match[1], info: match[2].trim(), indent: indentOf(text) } : null;
}

function parseFence(lines, i, { mark, info, indent }) {
  const code = [];
  const closing = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  let end = i + 1;
  for (; end < lines.length; end += 1) {
    if (closing.test(lines[end].text)) return { type: "code", info, lines: code, closed: true, count: end + 1 - i };
    code.push(outdent(lines[end], indent));
  }
  return { type: "code", info, lines: code, closed: false, count: end - i };
}

function parseIndented(lines, i) {
  let end = i;
  for (let next = i; next < lines.length && (isBlank(lines[next]) || indentOf(lines[next].text) >= TAB); next += 1) {
    if (!isBlank(lines[next])) end = next + 1;
  }
  return { type: "code", info: "", lines: lines.slice(i, end).map((line) => outdent(line, TAB)), closed: true, count: end - i };
}

function parseQuote(lines, i, depth) {
  const inner = [];
  let end = i;
  for (; end < lines.length; end += 1) {
    const match = QUOTE.exec(lines[end].text);
    if (match) inner.push(cut(lines[end], match[0].length));
    else if (isBlank(lines[end]) || isBlank(inner[inner.length - 1]) || interrupts(lines[end].text)) break;
    else inner.push(lines[end]); // a paragraph goes on without its mark
  }
  return { type: "quote", blocks: parseLines(inner, depth + 1), count: end - i };
}

/** Return whether a line ends the paragraph before it. */
function interrupts(text) {
  if (indentOf(text) >= TAB) return false;
  const item = ITEM.exec(text);
  const isItem = item && item[3] !== "" && item[0].length < text.length && (!/^\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return Boolean(openFence(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || isItem);
}

function markOf(match) {
  return match[2].slice(-1);
}

function parseList(lines, i, depth) {
  const first = ITEM.exec(lines[i].text);
  const list = { type: "list", ordered: /\d/.test(first[2]), start: parseInt(first[2], 10), loose: false, items: [], count: 0 };
  let next = i;
  while (next < lines.length) {
    const match = ITEM.exec(lines[next].text);
    if (!match || markOf(match) !== markOf(first) || RULE.test(lines[next].text)) break;
    const item = readItem(lines, next, match);
    next += item.lines.length;
    const trailing = item.lines.length - item.filled;
    const goesOn = next < lines.length && ITEM.test(lines[next].text) && markOf(ITEM.exec(lines[next].text)) === markOf(first);
    if (!goesOn) next -= trailing;
    const filled = item.lines.slice(0, item.filled);
    const task = filled.length ? TASK.exec(filled[0].text) : null;
    if (task) filled[0] = cut(filled[0], task[0].length);
    const blocks = parseLines(filled, depth + 1);
    const parted = blocks.some((block, j) => j > 0 && filled.some((line) => isBlank(line) && line.at >= blocks[j - 1].to && line.at < block.from));
    list.loose ||= parted || (goesOn && trailing > 0);
    list.items.push({ blocks, checked: task ? task[1] !== " " : null });
  }
  list.count = next - i;
  return list;
}

/** Return the lines of the item that begins with line `i`, without its mark, and how many of them are not blank at the end. */
function readItem(lines, i, match) {
  const spaces = indentOf(match[3]);
  const marked = match[1].length + match[2].length;
  const width = marked + (spaces >= 1 && spaces <= TAB ? spaces : 1);
  const item = { lines: [cut(lines[i], Math.min(width, match[0].length))], filled: 1 };
  for (let next = i + 1; next < lines.length; next += 1) {
    const line = lines[next];
    if (isBlank(line)) {
      item.lines.push({ text: "", at: line.at });
      if (item.filled === 1 && isBlank(item.lines[0])) break; // an item without text has no more
      continue;
    }
    const indent = indentOf(line.text);
    // Models indent lists within lists by two columns, whatever the width of the mark.
    const isNested = indent >= 2 && indent < width && ITEM.test(line.text.trimStart());
    const isLazy = item.filled === item.lines.length && !ITEM.test(line.text) && !interrupts(line.text);
    if (indent < width && !isNested && !isLazy) break;
    item.lines.push(outdent(line, isNested ? indent : width));
    item.filled = item.lines.length;
  }
  return item;
}

function parseTable(lines, i) {
  const rule = lines[i + 1]?.text;
  if (rule === undefined || !lines[i].text.includes("|") || !rule.includes("-") || !TABLE_RULE.test(rule)) return null;
  const head = cells(lines[i]);
  const marks = cells(lines[i + 1]).map(({ text }) => text);
  if (head.length !== marks.length) return null;
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "end") : mark.startsWith(":") ? "start" : ""));
  const rows = [];
  let end = i + 2;
  for (; end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end].text); end += 1) {
    const row = cells(lines[end]);
    rows.push(head.map((_, column) => row[column] ?? { text: "", at: endOf(lines[end]) }));
  }
  return { type: "table", align, head, rows, count: end - i };
}

function cells(line) {
  const found = [];
  const { text } = line;
  let start = text.search(/[^ \t]/);
  if (text[start] === "|") start += 1;
  for (let i = start; i <= text.length; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (i >= text.length || text[i] === "|") {
      if (i < text.length || text.slice(start).trim()) found.push(trim({ text: text.slice(start, i), at: line.at + start }));
      start = i + 1;
    }
  }
  return found;
}

function parseParagraph(lines, i) {
  let end = i + 1;
  while (end < lines.length && !isBlank(lines[end])) {
    const underline = UNDERLINE.exec(lines[end].text);
    if (underline) return { type: "heading", level: underline[1][0] === "=" ? 1 : 2, lines: lines.slice(i, end).map(trim), count: end + 1 - i };
    if (interrupts(lines[end].text) || parseTable(lines, end)) break;
    end += 1;
  }
  const paragraph = lines.slice(i, end).map(trimStart);
  const last = paragraph[paragraph.length - 1];
  last.text = last.text.trimEnd();
  return { type: "paragraph", lines: paragraph, count: end - i };
}
