// Draws the gateway's OpenAPI schema: every route with its parameters, and a form to try it.

import { byId, el, setText } from "./shared/dom.js";
import { keyHeaders } from "./shared/key.js";
import { drawSnippets } from "./snippets.js";

const base = new URL(".", document.baseURI);

class Schema {
  constructor(document) {
    this.document = document;
  }

  resolve(schema) {
    return schema?.$ref ? schema.$ref.slice(2).split("/").reduce((part, name) => part[name], this.document) : (schema ?? {});
  }

  /** Return a type in words, such as "integer from 1" or "text or list of text". */
  typeOf(schema) {
    const { anyOf, items, type, minimum, maximum, title, properties, maxItems, maxLength } = this.resolve(schema);
    if (anyOf) return anyOf.filter((option) => option.type !== "null").map((option) => this.typeOf(option)).join(" or ");
    if (items) return `list of ${this.typeOf(items)}${maxItems === undefined ? "" : `, at most ${maxItems}`}`;
    if (properties) return title;
    const limits = [minimum === undefined ? "" : ` from ${minimum}`, maximum === undefined ? "" : ` to ${maximum}`, maxLength === undefined ? "" : ` of at most ${maxLength} characters`];
    return ({ string: "text", undefined: "any" }[type] ?? type) + limits.join("");
  }
}

function drawField(schema, name, field, required) {
  const { default: usual, description = "" } = schema.resolve(field);
  const type = [schema.typeOf(field), required ? "required" : "", usual === undefined || usual === null ? "" : `default ${JSON.stringify(usual)}`];
  const words = field.description ?? description;
  return el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", {}, type.filter(Boolean).join(", ")), el("td", {}, ...drawWords(words)));
}

/** Return text in which words between backticks are code. */
function drawWords(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function drawFields(schema, title, rows) {
  if (!rows.length) return [];
  return [el("h4", {}, title), el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, ...rows)))];
}

/** Draw the fields of an object, and those of the objects within it. */
function drawObject(schema, title, object, seen = new Set()) {
  const { properties = {}, required = [] } = object;
  const names = Object.entries(properties).sort(([a], [b]) => required.includes(b) - required.includes(a));
  const rows = names.map(([name, field]) => drawField(schema, name, field, required.includes(name)));
  const parts = drawFields(schema, title, rows);
  for (const field of Object.values(properties)) {
    for (const option of [field, field.items, ...(field.anyOf ?? [])].flatMap((one) => [one, one?.items])) {
      if (!option?.$ref || seen.has(option.$ref)) continue;
      seen.add(option.$ref);
      const inner = schema.resolve(option);
      parts.push(...drawObject(schema, inner.title, inner, seen));
    }
  }
  return parts;
}

function drawTry(method, path, parameters, example) {
  const inputs = parameters.filter((parameter) => parameter.in === "path").map((parameter) => ({ name: parameter.name, input: el("input", { type: "text", "aria-label": parameter.name, value: model ?? "" }) }));
  const body = example === undefined ? null : el("textarea", { rows: Math.min(12, example.split("\n").length + 1), spellcheck: "false", "aria-label": "Body of the request" });
  if (body) body.value = example;
  const answer = el("pre", { class: "answer", hidden: "" });
  const form = el("form", { class: "try" }, ...inputs.map(({ input }) => input), ...(body ? [body] : []), el("div", { class: "buttons" }, el("button", { type: "submit" }, "Send")), answer);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    answer.hidden = false;
    setText(answer, "…");
    const address = inputs.reduce((address, { name, input }) => address.replace(`{${name}}`, input.value.split("/").map(encodeURIComponent).join("/")), path);
    const key = byId("key").value.trim();
    const headers = { ...keyHeaders(), ...(key ? { Authorization: `Bearer ${key}` } : {}), ...(body ? { "Content-Type": "application/json" } : {}) };
    try {
      const response = await fetch(new URL(address.slice(1), base), { method, headers, cache: "no-store", body: body?.value });
      setText(answer, `${response.status}\n${pretty(await response.text())}`);
    } catch (error) {
      setText(answer, `no answer: ${error.message}`);
    }
  });
  return form;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function drawRoute(schema, path, method, route) {
  const content = Object.values(route.requestBody?.content ?? {})[0];
  const object = content && schema.resolve(content.schema);
  const example = object?.examples?.[0];
  const filled = example && JSON.stringify(model ? { ...example, model } : example, null, 2);
  const parameters = route.parameters ?? [];
  return el("details", { class: "route", id: route.operationId },
    el("summary", {}, el("span", { class: "method", "data-method": method }, method.toUpperCase()), el("code", {}, path), el("span", { class: "what" }, (route.description ?? route.summary).split("\n")[0])),
    ...drawFields(schema, "In the path", parameters.map((parameter) => drawField(schema, parameter.name, { ...parameter.schema, description: parameter.description }, parameter.required))),
    ...(object ? drawObject(schema, "Body", object) : []),
    el("h4", {}, "Try it"), drawTry(method.toUpperCase(), path, parameters, filled));
}

async function load(path) {
  const response = await fetch(path, { headers: keyHeaders(), cache: "no-store" });
  if (!response.ok) throw new Error(`${path}: status ${response.status}`);
  return response.json();
}

let model = null;

async function draw() {
  const document_ = await load("openapi.json");
  const locked = document_["x-needs-key"] === true;
  let about = {};
  if (!locked || Object.keys(keyHeaders()).length) about = await load("about").catch(() => ({}));
  model = about.model ?? null;
  drawSnippets({ base: new URL("v1", base).href, model: model ?? "MODEL", chat: about.chat ?? true, locked });
  const schema = new Schema(document_);
  setText(byId("version"), document_.info.version);
  setText(byId("about"), `${document_.info.description} Its base URL is ${new URL("v1", base).href}.`);
  byId("key").closest("p").hidden = !locked;
  const routes = Object.entries(document_.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, route]) => drawRoute(schema, path, method, route)));
  byId("routes").replaceChildren(...routes);
}

draw().catch((error) => {
  byId("trouble").hidden = false;
  setText(byId("trouble"), `The schema cannot be shown: ${error.message}`);
});
