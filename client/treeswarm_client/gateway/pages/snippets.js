// Programs to copy that ask this gateway, with its real base URL and model.

import { byId, el, setText } from "./shared/dom.js";

const COPIED_MS = 1500;

const quoteForShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return snippets, each with a `name` and its `code`; without a chat template, programs continue texts. */
function makeSnippets({ base, model, chat, locked }) {
  const text = "Why do trees branch?";
  const body = chat ? { model, messages: [{ role: "user", content: text }], max_tokens: 64 } : { model, prompt: text, max_tokens: 64 };
  const route = chat ? "chat/completions" : "completions";
  const key = locked ? "  -H 'Authorization: Bearer YOUR_KEY' \\\n" : "";
  const create = chat
    ? `api.chat.completions.create(\n    model=${JSON.stringify(model)},\n    messages=[{"role": "user", "content": ${JSON.stringify(text)}}],\n    max_tokens=64,\n    stream=True,\n)`
    : `api.completions.create(\n    model=${JSON.stringify(model)}, prompt=${JSON.stringify(text)}, max_tokens=64, stream=True\n)`;
  const piece = chat ? "chunk.choices[0].delta.content or \"\"" : "chunk.choices[0].text";
  return [
    { name: "curl", code: `curl ${quoteForShell(`${base}/${route}`)} \\\n  -H 'Content-Type: application/json' \\\n${key}  -d ${quoteForShell(JSON.stringify(body))}` },
    {
      name: "Python",
      code: `from openai import OpenAI  # pip install openai\n\napi = OpenAI(base_url=${JSON.stringify(base)}, api_key=${locked ? "\"YOUR_KEY\"" : "\"none\""})\nchunks = ${create}\nfor chunk in chunks:\n    print(${piece}, end="", flush=True)`,
    },
  ];
}

/** Show the programs, one at a time. */
export function drawSnippets(gateway) {
  const snippets = makeSnippets(gateway);
  const tabs = snippets.map((snippet) => el("button", { type: "button" }, snippet.name));
  const choose = (chosen) => {
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", i === chosen));
    setText(byId("snippet"), snippets[chosen].code);
  };
  tabs.forEach((tab, i) => tab.addEventListener("click", () => choose(i)));
  byId("snippet-tabs").replaceChildren(...tabs);
  choose(0);
}

byId("copy").addEventListener("click", async () => {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    setText(button, "Copied");
  } catch {
    getSelection().selectAllChildren(byId("snippet")); // without TLS, browsers have no clipboard
    setText(button, "Selected");
  }
  setTimeout(() => setText(button, "Copy"), COPIED_MS);
});
