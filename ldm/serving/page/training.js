// Runs as they train: the list, and of one its curves, samples, settings and log.

import { ask, attempt, element, message } from "./api.js";
import { chart, short } from "./chart.js";
import * as form from "./form.js";

const OFTEN = 1500; // milliseconds between two looks: a run is seen within two seconds
const POINTS = 400;
const page = document.getElementById("training-page");
const state = { manage: false, runs: [], open: null, curves: {}, end: "", told: null, log: false, smooth: 0, busy: false, again: false };
let parts = null;

const url = (name, rest = "") => `api/runs/${encodeURIComponent(name)}${rest}`;
// What is measured is shown as it was measured.
const noisy = (key) => !/^(held_out|lr)|\//.test(key);
const sorted = (keys) => keys.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
const chosen = () => decodeURIComponent(location.hash.split("/").slice(1).join("/")) || null;

/** Makes the page, once. */
export async function start() {
  document.head.append(element("link", { rel: "stylesheet", href: "watch.css" }));
  page.classList.add("watch");
  const list = element("ul", { className: "runs" });
  const none = element("p", { textContent: "No run lies in the folder that is watched.", hidden: true });
  parts = { list, none, one: element("section", { ariaLabel: "A run", className: "one" }) };
  page.append(element("section", { ariaLabel: "Runs" }, element("h2", { textContent: "Runs" }), none, list), parts.one);
  setInterval(() => {
    if (!page.hidden && !document.hidden) look();
  }, OFTEN);
}

/** Shows what the address says: the list, and the run it names. */
export function show() {
  state.again = state.busy; // it looks at another run: then at this one next
  return look();
}

async function look() {
  if (state.busy) return;
  state.busy = true;
  try {
    await listed();
    const name = chosen() ?? state.runs[0]?.name ?? null;
    if (name !== state.open) opened(name);
    if (name !== null) await refreshed(name);
    for (const quiet of page.querySelectorAll(".lost")) quiet.remove();
  } catch (error) {
    // One line, and not a message for every look.
    if (!page.querySelector(".lost")) page.prepend(element("p", { className: "lost bad", role: "alert", textContent: error.message }));
  } finally {
    state.busy = false;
  }
  if (!state.again) return;
  state.again = false;
  await look();
}

async function listed() {
  const { runs, manage } = await ask("GET", "api/runs");
  Object.assign(state, { runs, manage });
  parts.none.hidden = runs.length > 0;
  const had = document.activeElement?.closest?.(".runs a")?.hash;
  parts.list.replaceChildren(...runs.map((run) => {
    const link = element("a", { href: `#training/${encodeURIComponent(run.name)}` },
      element("strong", { textContent: run.name }), element("span", { className: `state ${run.state}`, textContent: run.state }),
      element("span", { className: "note", textContent: inShort(run) }));
    if (run.total) link.append(element("progress", { max: run.total, value: run.images, ariaLabel: `${run.name}: images seen` }));
    if (run.name === (chosen() ?? runs[0]?.name)) link.setAttribute("aria-current", "true");
    return element("li", {}, link);
  }));
  if (had) [...parts.list.querySelectorAll("a")].find((link) => link.hash === had)?.focus();
}

function inShort({ images, total, loss, held_out_loss: held, images_per_second: speed, seconds_left: left }) {
  return [
    `${short(images)}${total ? ` of ${short(total)}` : ""} images`,
    loss === null ? null : `loss ${short(loss)}`,
    held === null ? null : `held out ${short(held)}`,
    speed === null ? null : `${short(speed)} images/s`,
    left === null ? null : `${duration(left)} left`,
  ].filter(Boolean).join(" · ");
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

/** Puts an empty run on the page. */
function opened(name) {
  Object.assign(state, { open: name, curves: {}, end: "", told: null, drawn: "" });
  parts.one.replaceChildren();
  if (name === null) return;
  parts.title = element("h2", { textContent: name });
  parts.state = element("p", { className: "note", role: "status" });
  parts.fault = element("details", { hidden: true, className: "fault" }, element("summary", { textContent: "What was no number" }), element("pre"));
  parts.charts = element("div", { className: "charts" });
  parts.reading = element("p", { className: "note", role: "status" });
  parts.log = element("pre", { tabIndex: 0, role: "log", ariaLabel: "The end of the log" });
  parts.logName = element("p", { className: "note" });
  parts.samples = samples(name);
  parts.one.append(parts.title, parts.state, actions(name), parts.fault,
    section("Curves", controls(), parts.reading, parts.charts), parts.samples.section,
    settings(name), section("Log", parts.logName, parts.log));
}

const section = (title, ...children) => element("section", {}, element("h3", { textContent: title }), ...children);

async function refreshed(name) {
  const [told, numbers] = await Promise.all([
    ask("GET", url(name)), ask("GET", url(name, `/curves?points=${POINTS}&after=${state.end}`)),
  ]);
  if (name !== state.open) return;
  state.told = told;
  parts.state.textContent = `${told.state}${told.why ? `: ${told.why}` : ""} · ${inShort(told)}`;
  parts.state.classList.toggle("bad", told.state === "broken");
  parts.fault.hidden = told.fault === null;
  parts.fault.querySelector("pre").textContent = told.fault && JSON.stringify(told.fault, null, 1);
  parts.stop.disabled = !told.stoppable;
  parts.now.disabled = told.state !== "alive";
  options(parts.which, told.drawable);
  parts.use.hidden = parts.which.hidden = !told.drawable.length;
  text(parts.logName, told.log.name || "The run's folder has no log: start a run with 2>&1 | tee RUN/run.log to see it here.");
  parts.log.hidden = !told.log.name;
  if (text(parts.log, told.log.text)) parts.log.scrollTop = parts.log.scrollHeight;
  parts.samples.update(told.sheets);
  merged(numbers);
}

function text(node, words) {
  if (node.textContent === words) return false;
  node.textContent = words;
  return true;
}

function options(select, values) {
  const now = [...select.options].map(({ value }) => value);
  if (now.join("\n") === values.join("\n")) return;
  const kept = now.length && select.selectedIndex < now.length - 1 ? select.value : null;
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: value })));
  select.value = values.includes(kept) ? kept : values.at(-1);
}

/** Takes in what has come; a curve that has grown too long is asked for anew. */
function merged({ end, whole, read, curves }) {
  state.end = end;
  if (whole) state.curves = curves;
  for (const [key, { x, y }] of whole ? [] : Object.entries(curves)) {
    const known = (state.curves[key] ??= { x: [], y: [] });
    known.x.push(...x);
    known.y.push(...y);
    if (known.low) [known.low, known.high] = [[...known.low, ...y], [...known.high, ...y]];
    if (known.x.length > 2 * POINTS) state.end = "";
  }
  parts.reading.textContent = read < 1 ? `${Math.floor(100 * read)} % of the numbers are read; the rest is told in samples` : "";
  if (whole || Object.keys(curves).length) draw();
}

function draw() {
  if (parts.charts.contains(document.activeElement)) return; // somebody reads it
  const { curves, log, smooth } = state;
  const drawn = new Set(["images", "step"]);
  const charts = [];
  const add = (title, keys, names = keys, how = { log }) => {
    const found = keys.map((key, n) => curves[key] && { name: names[n], ...curves[key], smooth: noisy(key) ? smooth : 0 }).filter(Boolean);
    keys.forEach((key) => drawn.add(key));
    if (found.length) charts.push(chart(title, found, how));
  };
  const keys = Object.keys(curves);
  add("Loss", ["loss", "held_out_loss"], ["training", "held out"]);
  const levels = sorted(keys.filter((key) => /^held_out_loss\/\d/.test(key)));
  add("Held-out loss by noise level", levels, levels.map((key) => key.slice(14)));
  const rest = sorted(keys.filter((key) => key.startsWith("held_out_loss/") && !drawn.has(key)));
  add("Held-out loss of averages", rest, rest.map((key) => key.slice(14)));
  for (const low of keys.filter((key) => key.endsWith("/low"))) {
    const key = low.slice(0, -4);
    const [own, under, over] = [key, low, `${key}/high`].map((name) => curves[name]);
    [key, low, `${key}/high`, `${key}/n`].forEach((name) => drawn.add(name));
    if (own && over) charts.push(chart(`${key}, with its 95 % interval`, [{ name: key.split("/").at(-1), x: own.x, y: own.y, low: under.y, high: over.y }], { log }));
  }
  add("Images per second", ["images_per_second"], undefined, {});
  for (const key of keys) if (!drawn.has(key)) add(key, [key]);
  parts.charts.replaceChildren(...charts.filter(Boolean));
  if (!charts.length) parts.charts.append(element("p", { textContent: "No number is written yet." }));
}

function controls() {
  const log = element("input", { type: "checkbox", checked: state.log });
  const smooth = element("input", { type: "number", min: 0, step: "any", value: state.smooth || "", placeholder: "not", inputMode: "decimal" });
  log.addEventListener("change", () => { state.log = log.checked; draw(); });
  smooth.addEventListener("input", () => { state.smooth = Math.max(0, Number(smooth.value) || 0); draw(); });
  return element("div", { className: "fields" },
    element("label", { className: "check" }, log, " Logarithmic"),
    element("label", {}, "Smooth, half-life in images ", smooth));
}

function actions(name) {
  const button = (words, use) => {
    const made = element("button", { type: "button", textContent: words });
    made.addEventListener("click", () => attempt(use));
    return made;
  };
  parts.stop = button("Stop", async () => {
    if (!confirm(`Stop ${name}? It saves, and the same command goes on from there.`)) return;
    await ask("POST", url(name, "/stop"), {});
    message("The run saves and ends.", "told");
  });
  parts.now = button("Samples now", async () => {
    await ask("POST", url(name, "/sample"), {});
    message("The run draws samples after this step.", "told");
  });
  parts.which = element("select", { ariaLabel: "Weights" });
  parts.use = button("Draw with it", async () => {
    const { model } = await ask("POST", url(name, "/draw"), { result: parts.which.value });
    const models = document.getElementById("settings").elements.namedItem("model");
    if (![...models.options].some(({ value }) => value === model)) models.append(element("option", { value: model, textContent: model }));
    models.value = model;
    await form.load(model);
    location.hash = "#draw";
  });
  return element("div", { className: "actions", hidden: !state.manage }, parts.stop, parts.now, parts.which, parts.use);
}

/** Sheets by step: a slider, and a second one beside it to compare. */
function samples(name) {
  let sheets = [];
  const sides = ["A", "B"].map((letter) => {
    const slider = element("input", { type: "range", min: 0, max: 0, value: 0, step: 1 });
    const at = element("span"); // an output would take the label that is the slider's
    const image = element("img", { alt: "", loading: "lazy", decoding: "async" });
    const label = element("label", {}, `${letter}: after `, at, slider);
    const side = { slider, at, image, node: element("div", { className: "side" }, label, image), newest: true };
    side.show = () => {
      const after = sheets[slider.valueAsNumber];
      if (after === undefined) return;
      at.textContent = `${short(after)} images`;
      slider.setAttribute("aria-valuetext", at.textContent);
      const source = url(name, `/samples/${after}`);
      if (image.getAttribute("src") === source) return;
      image.src = source;
      image.alt = `Samples after ${short(after)} images`;
    };
    slider.addEventListener("input", () => {
      side.newest = slider.valueAsNumber === sheets.length - 1;
      side.show();
    });
    return side;
  });
  sides[1].newest = false;
  sides[1].node.hidden = true;
  const both = element("input", { type: "checkbox" });
  both.addEventListener("change", () => { sides[1].node.hidden = !both.checked; });
  const none = element("p", { textContent: "No samples are drawn yet." });
  const shown = element("div", { hidden: true },
    element("label", { className: "check" }, both, " Compare two"),
    element("div", { className: "sides" }, ...sides.map(({ node }) => node)));
  return {
    section: section("Samples", none, shown),
    update(found) {
      if (found.join() === sheets.join()) return;
      sheets = found;
      none.hidden = found.length > 0;
      shown.hidden = !none.hidden;
      for (const side of sides) {
        side.slider.max = Math.max(0, found.length - 1);
        if (side.newest) side.slider.value = found.length - 1;
        side.show();
      }
    },
  };
}

function settings(name) {
  const other = element("select", {}, element("option", { value: "", textContent: "no other run" }),
    ...state.runs.filter((run) => run.name !== name).map((run) => element("option", { value: run.name, textContent: run.name })));
  const table = element("table");
  const read = () => attempt(async () => {
    if (!other.value) {
      const { settings: all } = await ask("GET", url(name, "/config"));
      return rows(table, ["Setting", name], Object.entries(all));
    }
    const { differences } = await ask("GET", url(name, `/config?other=${encodeURIComponent(other.value)}`));
    return rows(table, ["Setting", name, other.value], differences.map(({ key, here, there }) => [key, here ?? "not there", there ?? "not there"]));
  });
  other.addEventListener("change", read);
  const details = element("details", {}, element("summary", { textContent: "Settings, and what differs from another run" }),
    element("label", {}, "Compare with ", other), element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Settings" }, table));
  details.addEventListener("toggle", () => { if (details.open) read(); });
  return details;
}

function rows(table, heads, lines) {
  const body = lines.map((cells) => element("tr", {}, ...cells.map((words, n) => (n ? element("td", { textContent: words }) : element("th", { textContent: words, scope: "row" })))));
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map((words) => element("th", { textContent: words, scope: "col" })))),
    element("tbody", {}, ...body));
  if (!lines.length) table.append(element("caption", { textContent: "All settings are the same." }));
}
