// Data as trainings read them: what a check finds, buckets, words, and captions to be changed.

import { ask, attempt, element, message } from "./api.js";

const ROWS = 25;
const SHOWN = 24; // pictures of a finding
const AGAIN = 1500; // milliseconds between two looks at a check
const page = document.getElementById("data-page");
const state = { manage: false, names: [], name: null, told: null, search: "", start: 0 };
let parts = null;

const url = (rest = "") => `api/data/${encodeURIComponent(state.name)}${rest}`;
const chosen = () => decodeURIComponent(location.hash.split("/").slice(1).join("/")) || state.names[0];
const small = (key, alt = key) => element("img", { src: url(`/thumbnail?key=${encodeURIComponent(key)}`), alt, loading: "lazy", decoding: "async" });
const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

function button(words, use) {
  const made = element("button", { type: "button", textContent: words });
  made.addEventListener("click", () => attempt(use));
  return made;
}

const section = (title, ...children) => element("section", {}, element("h3", { textContent: title }), ...children);

/** Makes the page, once. */
export async function start() {
  document.head.append(element("link", { rel: "stylesheet", href: "watch.css" }));
  page.classList.add("watch");
  const { data, manage } = await ask("GET", "api/data");
  Object.assign(state, { names: data, manage });
  const which = element("select", {}, ...data.map((name) => element("option", { value: name, textContent: name })));
  which.addEventListener("change", () => { location.hash = `#data/${encodeURIComponent(which.value)}`; });
  const size = element("input", { type: "number", min: 8, max: 4096, step: 8, value: localStorage.getItem("data-size") ?? 512, inputMode: "numeric" });
  size.addEventListener("change", () => {
    localStorage.setItem("data-size", size.value);
    attempt(checked);
  });
  parts = { which, size, summary: element("p", { role: "status" }), findings: element("div"), buckets: element("div"), words: element("div", { className: "words" }) };
  page.append(
    element("h2", { textContent: "Data" }),
    element("div", { className: "fields" }, element("label", { className: "wide" }, "Data ", which), element("label", {}, "Trained at, pixels ", size)),
    parts.summary, section("Findings", parts.findings), section("Buckets", parts.buckets), captions(), section("Words", parts.words));
}

/** Shows the data that the address names. */
export async function show() {
  const name = chosen();
  if (!state.names.includes(name)) return message(`There are no data called ${name} here.`);
  if (name === state.name) return attempt(checked);
  Object.assign(state, { name, search: "", start: 0 });
  parts.which.value = name;
  parts.search.value = "";
  await Promise.all([attempt(checked), attempt(listed), attempt(counted)]);
}

async function checked() {
  const { name } = state;
  const asked = parts.size.value;
  const told = await ask("GET", url(`?size=${encodeURIComponent(asked)}`));
  if (name !== state.name || asked !== parts.size.value) return;
  state.told = told;
  parts.undo.disabled = !told.undo;
  parts.busy.textContent = told.busy.length ? `The run ${told.busy[0]} reads these data: captions are not changed until it has ended.`
    : told.editable ? "" : "Captions of this layout are shown, and changed in its own files.";
  const { report } = told;
  if (told.checking) setTimeout(() => attempt(checked), AGAIN);
  if (!report) {
    parts.summary.textContent = "Every picture is being looked at ...";
    return;
  }
  if (report.error) {
    parts.summary.textContent = report.error;
    return;
  }
  const { usable, train, held_out: held } = report.pictures;
  parts.summary.textContent = `${many(usable, "picture")}: ${train} to train on, ${held} held out. ` +
    `${many(report.counts.error, "error")}, ${many(report.counts.warning, "warning")}, ${many(report.counts.note, "note")}.` +
    `${told.checking ? " Files have changed, and are looked at again ..." : ""}`;
  parts.findings.replaceChildren(...report.findings.map(finding), ...report.unchecked.map((what) => element("p", { className: "note", textContent: `Not looked at: ${what}.` })));
  if (!report.findings.length) parts.findings.prepend(element("p", { className: "good", textContent: "Nothing is wrong with them." }));
  buckets(report);
}

function finding({ severity, what, cure, count, keys, details, groups }) {
  const list = element("ul", { className: "found" });
  const made = element("details", { className: `finding ${severity}` },
    element("summary", {}, element("span", { className: "state", textContent: severity }), ` ${count.toLocaleString("en")} ${count === 1 ? what.replace(/^pictures\b/, "picture") : what}`),
    cure ? element("p", { textContent: `What to do: ${cure}.` }) : null, list);
  made.addEventListener("toggle", () => {
    if (!made.open || list.children.length) return;
    const cell = (key) => {
      const image = small(key, "");
      image.addEventListener("error", () => image.replaceWith(element("span", { className: "coming", ariaHidden: "true" })));
      return element("figure", {}, image, element("figcaption", { textContent: details[key] ? `${key}: ${details[key]}` : key }));
    };
    const shown = groups.length ? groups : keys.map((key) => [key]);
    list.append(...shown.slice(0, SHOWN).map((group) => element("li", {}, ...group.slice(0, 6).map(cell))));
    if (shown.length > SHOWN) list.after(element("p", { className: "note", textContent: `and ${shown.length - SHOWN} more: ldm data check --json names all` }));
  });
  return made;
}

function buckets({ buckets: found }) {
  const most = Math.max(...found.map(({ pictures }) => pictures), 1);
  const line = ({ width, height, pictures }) => element("tr", {},
    element("th", { scope: "row", textContent: width ? `${width} × ${height}` : "none fits" }),
    element("td", { textContent: pictures.toLocaleString("en") }),
    element("td", {}, element("meter", { max: most, value: pictures, ariaLabel: `${pictures} pictures` })));
  const heads = ["Width × height", "Pictures", "Share"].map((words) => element("th", { scope: "col", textContent: words }));
  parts.buckets.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...found.map(line))));
}

async function counted() {
  const { captions: all, distinct, words, common } = await ask("GET", url("/counts"));
  const told = `${many(all, "caption")}, ${distinct} of them different, of ${words.least} to ${words.most} words (median ${words.median}).`;
  const find = (word) => {
    parts.search.value = word;
    return searched();
  };
  parts.words.replaceChildren(element("p", { textContent: told }), ...common.map(({ word, captions: count }) => button(`${word} ${count}`, () => find(word))));
}

// -- captions --

function captions() {
  parts.search = element("input", { type: "search", placeholder: "part of a caption or a name" });
  let wait = 0;
  parts.search.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(() => attempt(searched), 250);
  });
  parts.found = element("p", { className: "note", role: "status" });
  parts.busy = element("p", { className: "note" });
  parts.rows = element("ol", { className: "captions" });
  parts.earlier = button("Earlier", () => { state.start = Math.max(0, state.start - ROWS); return listed(); });
  parts.later = button("Later", () => { state.start += ROWS; return listed(); });
  parts.undo = button("Undo the last change", async () => {
    const { keys } = await ask("POST", url("/undo"), {});
    message(`${keys.length === 1 ? keys[0] : `${keys.length} captions`}: as before.`, "told");
    await changed();
  });
  const from = element("input", { required: true });
  const to = element("input");
  const replace = element("form", { className: "fields", hidden: !state.manage },
    element("label", {}, "Replace in all captions ", from), element("label", {}, "by ", to), element("button", { textContent: "Replace" }));
  replace.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async () => {
      const { changed: count } = await ask("POST", url("/replace"), { search: from.value, put: to.value });
      message(`${many(count, "picture")} changed.`, "told");
      await changed();
    });
  });
  parts.undo.hidden = !state.manage;
  return section("Captions", element("label", {}, "Search ", parts.search), replace, parts.busy, parts.found, parts.rows,
    element("div", { className: "actions" }, parts.earlier, parts.later, parts.undo));
}

const changed = () => Promise.all([attempt(listed), attempt(checked), attempt(counted)]);

function searched() {
  Object.assign(state, { search: parts.search.value, start: 0 });
  return listed();
}

async function listed() {
  const { name, search, start } = state;
  const { found, rows } = await ask("GET", url(`/rows?search=${encodeURIComponent(search)}&start=${start}&count=${ROWS}`));
  if (name !== state.name || search !== state.search || start !== state.start) return;
  parts.found.textContent = found ? `${start + 1} to ${start + rows.length} of ${many(found, "picture")}` : "No picture has that.";
  parts.earlier.disabled = start === 0;
  parts.later.disabled = start + rows.length >= found;
  parts.rows.replaceChildren(...rows.map(row));
}

function row({ key, captions: texts, width, height, held_out: held }) {
  const areas = texts.map((text, n) => element("textarea", {
    value: text, rows: 2, readOnly: !state.manage, ariaLabel: `Caption ${texts.length > 1 ? `${n + 1} ` : ""}of ${key}`, maxLength: 10000,
  }));
  const save = button("Save", async () => {
    const put = areas.map(({ value }) => value.split(/\s+/).filter(Boolean).join(" "));
    await ask("POST", url("/captions"), { key, captions: put, was: texts });
    message(`${key}: saved.`, "told");
    const next = row({ key, captions: put, width, height, held_out: held });
    line.replaceWith(next); // and no other: somebody may be writing there
    next.querySelector("textarea").focus();
    await Promise.all([attempt(checked), attempt(counted)]);
  });
  save.hidden = true;
  for (const area of areas) {
    area.addEventListener("input", () => { save.hidden = areas.every(({ value }, n) => value === texts[n]); });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !save.hidden) save.click();
    });
  }
  const told = element("p", { className: "note", textContent: `${key} · ${width} × ${height}${held ? " · held out" : ""}` });
  const line = element("li", {}, small(key, ""), element("div", {}, told, ...areas, save));
  return line;
}
