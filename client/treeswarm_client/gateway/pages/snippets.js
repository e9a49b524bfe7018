// Programs that ask this gateway, with its real base URL and model.

const quoteForShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return snippets, each with a `name` and its `code`; without a chat template, programs continue texts. */
export function makeSnippets({ base, model, chat, locked }) {
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
