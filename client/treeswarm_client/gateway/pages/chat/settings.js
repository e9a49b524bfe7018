// The settings of a conversation: what the model is told first, how it samples, and which form its answers take.

import { el, setText } from "../shared/dom.js";
import { fitHeight, textButton } from "./controls.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, hint: "0 always takes the likeliest token" },
  { name: "max_tokens", label: "Longest answer", min: 1, whole: true, hint: "in tokens" },
  { name: "top_p", label: "Top p", min: 0, max: 1 },
  { name: "top_k", label: "Top k", min: 0, whole: true },
  { name: "min_p", label: "Min p", min: 0, max: 1 },
  { name: "seed", label: "Seed", whole: true, hint: "the same answer each time" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 5 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2 },
];
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { title: { type: "string" }, year: { type: "integer" }, tags: { type: "array", items: { type: "string" } } },
  required: ["title", "year", "tags"],
  additionalProperties: false,
};
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: { name: "weather", description: "Return the weather of a city.", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } },
  },
];
const TALLEST_PX = 320;

/** A setting that cannot be sent: `field` names it. */
export class WrongSetting extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Return the parameters that stand for the settings.  Throws WrongSetting. */
export function asParameters(settings, accepted) {
  const body = {};
  for (const field of NUMBERS) {
    const text = (settings[field.name] ?? "").trim();
    if (text && accepted.has(field.name)) body[field.name] = readNumber(field, text);
  }
  if (settings.reasoning_effort && accepted.has("reasoning_effort")) body.reasoning_effort = settings.reasoning_effort;
  const stops = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (accepted.has("response_format") && settings.form === "json_object") body.response_format = { type: "json_object" };
  if (accepted.has("response_format") && settings.form === "json_schema") {
    const schema = readJson("schema", settings.schema, "The JSON schema", (value) => typeof value === "object" && value !== null && !Array.isArray(value), "an object");
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  if (accepted.has("tools") && settings.tools?.trim()) {
    const tools = readJson("tools", settings.tools, "The list of tools", Array.isArray, "a list");
    if (tools.length) body.tools = tools;
    if (tools.length && settings.tool_choice && accepted.has("tool_choice")) body.tool_choice = settings.tool_choice;
  }
  return body;
}

function readNumber({ name, label, min = -Infinity, max = Infinity, whole }, text) {
  const value = Number(text);
  if (!Number.isFinite(value) || (whole && !Number.isSafeInteger(value))) throw new WrongSetting(name, `${label} is “${text}”: give ${whole ? "a whole number" : "a number"}.`);
  if (value < min || value > max) throw new WrongSetting(name, `${label} is ${text}: give a number ${min === -Infinity ? `up to ${max}` : max === Infinity ? `from ${min}` : `from ${min} to ${max}`}.`);
  return value;
}

function readJson(field, text, what, fits, kind) {
  let value;
  try {
    value = JSON.parse(text ?? "");
  } catch (error) {
    throw new WrongSetting(field, `${what} is not JSON: ${error.message}.`);
  }
  if (!fits(value)) throw new WrongSetting(field, `${what} is no JSON ${kind.replace(/^an? /, "")}: give ${kind}.`);
  return value;
}

/** Return how many settings differ from the gateway's own. */
export const countChanged = (settings) => Object.entries(settings).filter(([name, value]) => value && !["schema", "format"].includes(name) && !(name === "form" && value === "text")).length;

/** The form of the settings. */
export class SettingsForm {
  /** `onChange` is called with the settings whenever one of them changes. */
  constructor(home, onChange) {
    this.home = home;
    this.onChange = onChange;
    this.settings = {};
    this.fields = new Map();
    this.accepted = null;
  }

  /** Draw the fields of what the gateway accepts. */
  draw(about) {
    const accepted = new Set(about.parameters);
    const key = `${[...accepted].sort()} ${about.chat}`;
    if (this.accepted === key) return;
    this.accepted = key;
    this.fields.clear();
    const numbers = NUMBERS.filter(({ name }) => accepted.has(name)).map((field) => this.number(field));
    const parts = [
      this.area("system", "System prompt", { rows: 3, placeholder: "You are a helpful assistant." }),
      about.chat ? this.select("format", "Kind of request", [["chat", "Conversation"], ["text", "Continue my text"]]) : null,
      el("fieldset", {}, el("legend", {}, "Sampling"), el("div", { class: "numbers" }, ...numbers)),
      this.area("stop", "Stop texts", { rows: 1, hint: "one per line; the answer ends before them" }),
      accepted.has("response_format") ? this.select("form", "Form of the answer", [["text", "Text"], ["json_object", "JSON"], ["json_schema", "JSON of a schema"]]) : null,
      accepted.has("response_format") ? this.area("schema", "JSON schema", { rows: 6, code: true, example: EXAMPLE_SCHEMA }) : null,
      accepted.has("reasoning_effort") ? this.select("reasoning_effort", "Effort of thinking", [["", "The model’s own"], ["low", "Low"], ["medium", "Medium"], ["high", "High"]]) : null,
      accepted.has("tools") ? this.area("tools", "Tools", { rows: 2, code: true, example: EXAMPLE_TOOLS, hint: "a JSON list; you write their results" }) : null,
      accepted.has("tools") && accepted.has("tool_choice") ? this.select("tool_choice", "Calls of tools", [["", "As the model likes"], ["required", "At least one"], ["none", "None"]]) : null,
    ];
    this.home.replaceChildren(...parts.filter(Boolean), textButton("Use the gateway’s defaults", () => this.reset(), { class: "quiet" }));
    this.show(this.settings);
  }

  number({ name, label, whole, hint }) {
    const input = el("input", { id: `set-${name}`, type: "text", inputmode: whole ? "numeric" : "decimal", placeholder: "default", autocomplete: "off" });
    return this.field(name, input, label, hint);
  }

  area(name, label, { code = false, example = null, hint = "", ...attributes }) {
    const area = el("textarea", { id: `set-${name}`, spellcheck: code ? "false" : null, class: code ? "mono" : null, ...attributes });
    const field = this.field(name, area, label, hint);
    if (example) {
      field.querySelector(".field-head").append(textButton("Example", () => {
        area.value = JSON.stringify(example, null, 2);
        this.changed(name, area);
      }, { class: "link" }));
    }
    return field;
  }

  select(name, label, options) {
    return this.field(name, el("select", { id: `set-${name}` }, ...options.map(([value, text]) => el("option", { value }, text))), label, "");
  }

  field(name, input, label, hint) {
    const problem = el("p", { class: "wrong", id: `wrong-${name}`, hidden: "" });
    const about = hint ? el("p", { class: "hint-line", id: `hint-${name}` }, hint) : null;
    input.setAttribute("aria-describedby", [about?.id, problem.id].filter(Boolean).join(" "));
    input.addEventListener("input", () => this.changed(name, input));
    this.fields.set(name, { input, problem });
    return el("div", { class: "field", "data-field": name }, el("div", { class: "field-head" }, el("label", { for: input.id }, label)), input, ...(about ? [about] : []), problem);
  }

  changed(name, input) {
    this.settings = { ...this.settings, [name]: input.value };
    if (!input.value) delete this.settings[name];
    this.clear(name);
    this.arrange();
    this.onChange(this.settings);
  }

  reset() {
    this.settings = {};
    this.show(this.settings);
    this.onChange(this.settings);
  }

  show(settings) {
    this.settings = { ...settings };
    for (const [name, { input }] of this.fields) {
      const value = settings[name] ?? (input.tagName === "SELECT" ? input.options[0].value : "");
      if (input.value !== value) input.value = value;
      this.clear(name);
    }
    this.arrange();
  }

  /** Show the fields that matter, as high as their text. */
  arrange() {
    const schema = this.fields.get("schema");
    if (schema) schema.input.closest(".field").hidden = this.settings.form !== "json_schema";
    const choice = this.fields.get("tool_choice");
    if (choice) choice.input.closest(".field").hidden = !this.settings.tools;
    for (const { input } of this.fields.values()) if (input.tagName === "TEXTAREA" && input.offsetParent) fitHeight(input, TALLEST_PX);
  }

  clear(name) {
    const { input, problem } = this.fields.get(name);
    problem.hidden = true;
    input.removeAttribute("aria-invalid");
  }

  /** Show what is wrong with a setting, and go there. */
  point({ field, message }) {
    const { input, problem } = this.fields.get(field);
    problem.hidden = false;
    setText(problem, message);
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}
