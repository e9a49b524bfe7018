// Parses the text within a block of Markdown: code, emphasis, links, breaks.  Pure.  HTML stays text.

// With more marks than this the text of a block is shown as it is: matching them could take too long.
const MOST_MARKS = 4000;
const SCHEMES = ["http:", "https:", "mailto:"];
const ESCAPED = /^[!-/:-@[-`{-~]$/;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-z]{2,6}));/y;
const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const TARGET = /\([ \t\n]*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*))(?:[ \t\n]+(?:"[^"]*"|'[^']*'))?[ \t\n]*\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BARE = /https?:\/\/[^\s<>"`]+/y;
const SPACE = /[\s\u00a0]/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
// Whatever can be the beginning of something else than text.
const SPECIAL = /[\\`*_~[\]!<&\n]|https?:\/\//g;

/**
 * Return the nodes of a text: `text` with its `text` and the place `at` which it has in the source, `code` with `pieces` of such,
 * `break`, and `strong`, `em`, `del` and `link` (with its `href`) with `children`.
 */
export function parseInline(lines) {
  const scanner = new Scanner(lines);
  return scanner.scan();
}

/** Return an address that may be a link, or null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative addresses would lead to pages of this gateway
  }
}

class Scanner {
  constructor(lines) {
    this.text = lines.map((line) => line.text).join("\n");
    this.starts = [];
    let start = 0;
    for (const line of lines) {
      this.starts.push({ start, at: line.at });
      start += line.text.length + 1;
    }
    this.line = 0;
    this.parts = [];
    this.brackets = [];
    this.marks = 0;
    this.ticks = null;
  }

  /** Return the place of a position in the source.  Positions are asked for in rising order, or shortly before. */
  at(position) {
    while (this.line + 1 < this.starts.length && this.starts[this.line + 1].start <= position) this.line += 1;
    while (this.starts[this.line].start > position) this.line -= 1;
    return this.starts[this.line].at + position - this.starts[this.line].start;
  }

  add(start, end, text = this.text.slice(start, end)) {
    if (text) this.parts.push({ type: "text", text, at: this.at(start) });
  }

  scan() {
    const { text } = this;
    let position = 0;
    while (position < text.length) {
      SPECIAL.lastIndex = position;
      const special = SPECIAL.exec(text)?.index ?? text.length;
      this.add(position, special);
      if (special >= text.length) break;
      position = this.special(special);
      if (this.marks > MOST_MARKS) return this.plain();
    }
    return emphasize(this.parts);
  }

  plain() {
    return this.starts.flatMap(({ start, at }, i) => {
      const end = this.starts[i + 1]?.start ?? this.text.length;
      return start < end ? [{ type: "text", text: this.text.slice(start, end), at }] : [];
    });
  }

  /** Handle the character at `i`, and return the position after what was read. */
  special(i) {
    const character = this.text[i];
    switch (character) {
      case "\\":
        return this.escape(i);
      case "`":
        return this.code(i);
      case "\n":
        return this.newline(i);
      case "[":
        return this.openBracket(i, i + 1);
      case "!":
        if (this.text[i + 1] === "[") return this.openBracket(i, i + 2);
        break;
      case "]":
        return this.closeBracket(i);
      case "<":
      case "h": {
        const link = character === "<" ? this.angled(i) : this.bare(i);
        if (link) return link;
        break;
      }
      case "&":
        return this.entity(i);
      case "*":
      case "_":
      case "~":
        return this.delimiter(i);
    }
    this.add(i, i + 1);
    return i + 1;
  }

  escape(i) {
    const next = this.text[i + 1];
    if (next === "\n") {
      this.parts.push({ type: "break" });
      return i + 2;
    }
    if (next !== undefined && ESCAPED.test(next)) {
      this.add(i + 1, i + 2);
      return i + 2;
    }
    this.add(i, i + 1);
    return i + 1;
  }

  newline(i) {
    const last = this.parts[this.parts.length - 1];
    if (last?.type === "text" && last.text.endsWith("  ")) {
      last.text = last.text.trimEnd();
      this.parts.push({ type: "break" });
    } else {
      this.add(i, i + 1);
    }
    return i + 1;
  }

  code(i) {
    let length = 1;
    while (this.text[i + length] === "`") length += 1;
    this.ticks ??= runsOfTicks(this.text);
    const close = (this.ticks.get(length) ?? []).find((start) => start >= i + length);
    if (close === undefined) {
      this.add(i, i + length);
      return i + length;
    }
    let [start, end] = [i + length, close];
    // One space at each end only separates the code from backticks within it.
    if (this.text[start] === " " && this.text[end - 1] === " " && this.text.slice(start, end).trim()) [start, end] = [start + 1, end - 1];
    const pieces = [];
    const first = start;
    for (const line of this.text.slice(start, end).split("\n")) {
      if (start > first) pieces.push({ text: " ", at: this.at(start - 1) }); // a line's end is a space there
      if (line) pieces.push({ text: line, at: this.at(start) });
      start += line.length + 1;
    }
    this.parts.push({ type: "code", pieces });
    return close + length;
  }

  angled(i) {
    ANGLED.lastIndex = i;
    const match = ANGLED.exec(this.text);
    const href = match && safeAddress(match[1]);
    if (!href) return null;
    this.parts.push({ type: "link", href, children: [{ type: "text", text: match[1], at: this.at(i + 1) }] });
    return i + match[0].length;
  }

  bare(i) {
    if (i && /[\w/]/.test(this.text[i - 1])) return null;
    BARE.lastIndex = i;
    let address = BARE.exec(this.text)?.[0].replace(/[?!.,:;*_~'")\]}]+$/, (end) => (end.startsWith(")") ? ")" : "")) ?? "";
    while (address.endsWith(")") && address.split("(").length < address.split(")").length) address = address.slice(0, -1);
    const href = safeAddress(address);
    if (!href) return null;
    this.parts.push({ type: "link", href, children: [{ type: "text", text: address, at: this.at(i) }] });
    return i + address.length;
  }

  entity(i) {
    ENTITY.lastIndex = i;
    const match = ENTITY.exec(this.text);
    const code = match && (match[1] ? parseInt(match[1], 10) : match[2] ? parseInt(match[2], 16) : null);
    const character = match && (code === null ? NAMED[match[3]] : code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code < 0xe000) ? String.fromCodePoint(code) : undefined);
    if (!character) {
      this.add(i, i + 1);
      return i + 1;
    }
    this.add(i, i + match[0].length, character);
    return i + match[0].length;
  }

  openBracket(i, end) {
    this.brackets.push({ part: this.parts.length, image: end - i === 2 });
    this.add(i, end);
    this.marks += 1;
    return end;
  }

  closeBracket(i) {
    const open = this.brackets.pop();
    TARGET.lastIndex = i + 1;
    const match = open && !open.dead && this.text[i + 1] === "(" ? TARGET.exec(this.text) : null;
    const href = match && safeAddress((match[1] ?? match[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
    if (!href) {
      this.add(i, i + 1);
      return i + 1;
    }
    const children = emphasize(this.parts.splice(open.part).slice(1));
    // An image would be loaded from elsewhere: its description leads there.
    if (open.image && !children.length) children.push({ type: "text", text: href, at: this.at(i) });
    this.parts.push({ type: "link", href, children });
    if (!open.image) for (const outer of this.brackets) outer.dead = true; // no link within a link
    return i + 1 + match[0].length;
  }

  delimiter(i) {
    const character = this.text[i];
    let end = i + 1;
    while (this.text[end] === character) end += 1;
    const count = end - i;
    if (character === "~" && count !== 2) {
      this.add(i, end);
      return end;
    }
    const before = this.text[i - 1] ?? " ";
    const after = this.text[end] ?? " ";
    const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const inWord = character === "_";
    const opens = left && (!inWord || !right || PUNCTUATION.test(before));
    const closes = right && (!inWord || !left || PUNCTUATION.test(after));
    this.parts.push({ type: "mark", character, count, length: count, opens, closes, at: this.at(i) });
    this.marks += 1;
    return end;
  }
}

/** Return the positions of all runs of backticks, by their length. */
function runsOfTicks(text) {
  const runs = new Map();
  for (const match of text.matchAll(/`+/g)) {
    const length = match[0].length;
    if (!runs.has(length)) runs.set(length, []);
    runs.get(length).push(match.index);
  }
  return runs;
}

/** Return nodes in which pairs of marks have become emphasis, and the other marks text. */
function emphasize(parts) {
  const done = [];
  const bottoms = new Map();
  for (const part of parts) {
    if (part.type === "mark" && part.closes) close(done, part, bottoms);
    if (part.type !== "mark" || part.count) done.push(part);
  }
  return done.map(asText);
}

/** Pair a closing mark with those before it, as long as it has characters left. */
function close(done, closing, bottoms) {
  while (closing.count) {
    const kind = `${closing.character}${closing.opens}${closing.length % 3}`;
    const bottom = bottoms.get(kind) ?? 0;
    let i = done.length - 1;
    while (i >= bottom && !pairs(done[i], closing)) i -= 1;
    if (i < bottom) {
      bottoms.set(kind, done.length);
      return;
    }
    const opening = done[i];
    const used = closing.character === "~" || (opening.count > 1 && closing.count > 1) ? 2 : 1;
    const children = done.splice(i + 1).map(asText);
    opening.count -= used;
    closing.count -= used;
    closing.at += used;
    if (!opening.count) done.pop();
    done.push({ type: closing.character === "~" ? "del" : used === 2 ? "strong" : "em", children });
    for (const [other, end] of bottoms) bottoms.set(other, Math.min(end, done.length));
  }
}

function pairs(opening, closing) {
  if (opening.type !== "mark" || opening.character !== closing.character || !opening.opens) return false;
  // "**foo*" is no strong text that begins with an asterisk: lengths must fit where a mark could do both.
  const both = opening.closes || closing.opens;
  return !(both && (opening.length + closing.length) % 3 === 0 && (opening.length % 3 || closing.length % 3));
}

const asText = (part) => (part.type === "mark" ? { type: "text", text: part.character.repeat(part.count), at: part.at } : part);
