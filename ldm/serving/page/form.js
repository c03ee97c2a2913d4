// The settings of a drawing: one form, whatever page it is on.

import { ask, attempt, element } from "./api.js";

const KEPT = "settings";
const NUMBERS = ["steps", "guidance", "guidance_rescale", "width", "height", "seed", "count",
  "variation_seed", "variation_strength"];
const TEXTS = ["prompt", "negative", "sampler", "model"];
const USUAL = { variation_strength: 0.1, guidance_rescale: 0, count: 1 };

const form = document.getElementById("settings");
const field = (name) => form.elements.namedItem(name);
const loras = document.getElementById("chosen-loras");

/** What there is to draw with, as the server said last. */
export let info = null;

/** Asks the server what there is to draw with, of `model` or the first. */
export async function load(model) {
  const query = model ? `?model=${encodeURIComponent(model)}` : "";
  info = await ask("GET", `api/info${query}`);
  const { model: own, limits } = info;
  options(field("model"), info.models, own.name);
  options(field("sampler"), info.samplers, own.sampler ?? "model");
  options(document.getElementById("lora"), ["", ...info.loras], "");
  document.getElementById("loras").hidden = info.loras.length === 0;
  usual("steps", own.steps, limits.steps);
  usual("guidance", own.guidance);
  for (const side of ["width", "height"]) {
    usual(side, own[side], limits.side);
    Object.assign(field(side), { min: own.multiple, step: own.multiple });
  }
  for (const [name, value] of Object.entries(USUAL)) usual(name, value);
  field("count").max = limits.count;
  for (const name of ["prompt", "negative"]) field(name).maxLength = limits.text;
  classes(own.classes);
}

/** A model of classes is asked by their names; one that knows none draws as it likes. */
function classes(names) {
  const select = document.getElementById("class");
  const read = names === null;
  select.hidden = read || names.length === 0;
  for (const name of ["prompt", "negative"]) {
    for (const one of [field(name), ...field(name).labels]) one.hidden = !read;
  }
  if (!read) {
    options(select, names, names[0]);
    field("prompt").value = names[0] ?? "";
  }
}

function options(select, values, chosen) {
  const shown = select.value || chosen;
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: value || "none" })));
  select.value = values.includes(shown) ? shown : chosen;
}

/** The value that a field has unless somebody changes it. */
function usual(name, value, max) {
  const input = field(name);
  if (input.value === "" || input.value === input.dataset.usual) input.value = value;
  input.dataset.usual = value;
  if (max) input.max = max;
}

/** The settings as a job has them; without a seed where another is wanted each time. */
export function values() {
  const told = {};
  for (const name of TEXTS) told[name] = field(name).value;
  for (const name of NUMBERS) {
    const text = field(name).value;
    if (text !== "") told[name] = Number(text);
  }
  if (field("syntax").checked) told.syntax = "a1111";
  told.loras = [...loras.children].map((line) => ({
    name: line.dataset.name,
    weight: Number(line.querySelector("input").value),
  }));
  return told;
}

/** Puts settings into the form; what they do not say becomes what is usual. */
export async function fill(told) {
  if (told.model && info.models.includes(told.model) && told.model !== info.model.name) {
    field("model").value = told.model;
    await load(told.model);
  }
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (name === "model") continue;
    const missing = name === "seed" || name === "variation_seed" ? "" : field(name).dataset.usual;
    field(name).value = told[name] ?? (["prompt", "negative"].includes(name) ? "" : missing ?? "");
  }
  if (!field("sampler").value) field("sampler").value = info.model.sampler ?? "model";
  field("syntax").checked = told.syntax === "a1111";
  loras.replaceChildren();
  for (const { name, weight } of told.loras ?? []) chosen(name, weight);
  if (info.model.classes) document.getElementById("class").value = told.prompt;
  changed();
}

function chosen(name, weight = 1) {
  if ([...loras.children].some((line) => line.dataset.name === name)) return;
  const remove = element("button", { type: "button", textContent: "Remove", ariaLabel: `Remove ${name}` });
  const input = element("input", { type: "number", min: -10, max: 10, step: "any", value: weight, ariaLabel: `Weight of ${name}` });
  const line = element("li", {}, element("span", { textContent: name }), input, remove);
  line.dataset.name = name;
  remove.addEventListener("click", () => (line.remove(), changed()));
  loras.append(line);
}

let counting;

/** Keeps the form for the next visit, and counts tokens once the typing pauses. */
function changed() {
  localStorage.setItem(KEPT, JSON.stringify(values()));
  clearTimeout(counting);
  counting = setTimeout(count, 400);
}

async function count() {
  if (info.model.classes !== null) return;
  for (const name of ["prompt", "negative"]) {
    const text = field(name).value;
    const note = document.getElementById(`${name}-tokens`);
    if (text === "") {
      note.textContent = "";
      continue;
    }
    const body = { text, syntax: field("syntax").checked ? "a1111" : null, model: field("model").value };
    const told = await ask("POST", "api/tokens", body).catch(() => null);
    if (told === null || field(name).value !== text) continue;
    const worst = told.towers.reduce((a, b) => (b.tokens - b.length > a.tokens - a.length ? b : a));
    const over = worst.tokens > worst.length && worst.windows === 1;
    const windows = worst.windows > 1 ? `, ${worst.windows} windows` : "";
    note.textContent = `${worst.tokens} of ${worst.length} tokens${windows}${over ? ": the rest is not read" : ""}`;
    note.classList.toggle("bad", over);
  }
}

/** Makes the form live; `submit` is called with its values, `last` says the last picture's seed. */
export async function start(submit, last) {
  await load();
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? "null");
  if (kept) await fill(kept);
  form.addEventListener("input", changed);
  field("model").addEventListener("change", () => attempt(() => load(field("model").value)));
  document.getElementById("class").addEventListener("change", (event) => {
    field("prompt").value = event.target.value;
    changed();
  });
  document.getElementById("lora").addEventListener("change", (event) => {
    if (event.target.value) chosen(event.target.value);
    event.target.value = "";
    changed();
  });
  document.getElementById("dice").addEventListener("click", () => seed(""));
  document.getElementById("same").addEventListener("click", () => seed(last() ?? ""));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit(values());
  });
  // What is folded away must show where it is wrong.
  form.addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

/** The seed of the next pictures; "": another each time. */
export function seed(value) {
  field("seed").value = value;
  changed();
}
