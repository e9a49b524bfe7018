// Conversations: their messages are a tree, because a question that is edited and an answer that is asked for again begin
// another branch.  Pure, except that new ids and times are taken.

const LONGEST_TITLE = 60;
const UNTITLED = "New conversation";

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

export function makeConversation(settings) {
  const now = Date.now();
  return { version: 1, id: newId(), title: "", created: now, updated: now, settings: { ...settings }, messages: [], chosen: {} };
}

const isObject = (value) => typeof value === "object" && value !== null;

/** Return whether a value that was read from the browser's storage is a conversation that this page can show. */
export function isConversation(value) {
  return value?.version === 1 && typeof value.id === "string" && typeof value.title === "string" && Array.isArray(value.messages) && value.messages.every((message) => typeof message?.id === "string" && typeof message.content === "string") && isObject(value.settings) && isObject(value.chosen);
}

/** Add a message below `parent`, the id of another one or null, and make it part of the branch that is shown. */
export function addMessage(conversation, parent, fields) {
  const message = { id: newId(), parent, created: Date.now(), content: "", ...fields };
  conversation.messages.push(message);
  choose(conversation, message);
  return message;
}

/** Remove a message that has nothing below it. */
export function removeMessage(conversation, message) {
  conversation.messages = conversation.messages.filter((other) => other !== message);
  delete conversation.chosen[message.parent ?? ""];
}

/** Show the branch of this message. */
export function choose(conversation, message) {
  conversation.chosen[message.parent ?? ""] = message.id;
}

/** Return the messages beside this one: other questions in its place, or other answers. */
export const siblingsOf = (conversation, message) => conversation.messages.filter((other) => other.parent === message.parent);

/** Return the messages that are shown, from the first one to the last, or up to `end` without it. */
export function branchOf(conversation, end = null) {
  const children = groupByParent(conversation.messages);
  const branch = [];
  let parent = null;
  for (let below = children.get(null); below; below = children.get(parent)) {
    const message = below.find((one) => one.id === conversation.chosen[parent ?? ""]) ?? below[below.length - 1];
    if (message === end) break;
    branch.push(message);
    parent = message.id;
  }
  return branch;
}

function groupByParent(messages) {
  const groups = new Map();
  for (const message of messages) {
    if (!groups.has(message.parent)) groups.set(message.parent, []);
    groups.get(message.parent).push(message);
  }
  return groups;
}

export const titleOf = (conversation) => conversation.title || firstWords(conversation.messages.find((message) => message.role === "user")?.content ?? "") || UNTITLED;

function firstWords(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1).trimEnd()}…` : line;
}

// ---------------------------------------------------------------- requests

/** Return the messages of a branch as OpenAI's API takes them. */
export function asMessages(branch, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const message of branch) {
    const last = messages.at(-1);
    // A question without an answer goes on in the next one: many templates want the roles in turns.
    if (message.role === "user" && last?.role === "user") last.content += `\n\n${message.content}`;
    else if (message.role === "user") messages.push({ role: "user", content: message.content });
    else if (message.calls?.length) {
      messages.push({ role: "assistant", content: message.content, tool_calls: message.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } })) });
      for (const call of message.calls) messages.push({ role: "tool", tool_call_id: call.id, content: call.result ?? "" });
    } else if (message.content) messages.push({ role: "assistant", content: message.content });
  }
  return messages;
}

// ---------------------------------------------------------------- files

/** Return the branch that is shown as Markdown. */
export function asMarkdown(conversation) {
  const { system } = conversation.settings;
  const parts = [`# ${titleOf(conversation)}`];
  if (system?.trim()) parts.push(`**System prompt**\n\n${system.trim()}`);
  for (const message of branchOf(conversation)) {
    parts.push(message.role === "user" ? "## Question" : "## Answer");
    if (message.content) parts.push(message.content.trim());
    for (const call of message.calls ?? []) {
      parts.push(`Calls \`${call.name}\`:\n\n\`\`\`json\n${call.arguments}\n\`\`\``);
      if (call.result !== undefined) parts.push(`Result:\n\n\`\`\`\n${call.result}\n\`\`\``);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

/** Return the whole conversation, with all its branches, as JSON. */
export const asJson = (conversation) => `${JSON.stringify(conversation, null, 2)}\n`;

/** Return a name for the file of a conversation. */
export const fileName = (conversation, ending) => `${titleOf(conversation).normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation"}.${ending}`;
