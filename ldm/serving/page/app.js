// The page: which part is shown, and what its buttons do.

import { Refused, ask, attempt, base64, message, relative } from "./api.js";
import * as form from "./form.js";
import * as jobs from "./jobs.js";

const PREVIEWS = 4;
const OWN = { edit: "./edit.js", grid: "./grid.js", training: "./training.js", data: "./data.js" };
const FORMS = ["draw", "edit", "grid"];
const loaded = new Map();

const part = (id) => document.getElementById(id);

/** The module of a page, loaded and started once, when it is first looked at. */
function module(name) {
  if (!loaded.has(name)) {
    loaded.set(name, import(OWN[name]).then(async (made) => (await made.start?.(), made)));
  }
  return loaded.get(name);
}

function current() {
  const name = location.hash.slice(1).split("/")[0];
  return name in OWN ? name : "draw";
}

async function show() {
  if (location.hash === "#main") return;
  const name = current();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = name === "draw" ? "ldm" : `ldm: ${name}`;
  part("drawing").hidden = !FORMS.includes(name);
  part("edit-panel").hidden = name !== "edit";
  part("grid-panel").hidden = part("grid-result").hidden = name !== "grid";
  for (const page of FORMS) {
    for (const one of document.querySelectorAll(`.not-${page}`)) one.hidden = name === page;
  }
  for (const other of ["training", "data"]) part(`${other}-page`).hidden = name !== other;
  if (name in OWN) (await module(name)).show?.();
}

/** Puts settings into the form, and shows it. */
async function take(told) {
  await form.fill(told);
  if (!FORMS.includes(current())) location.hash = "#draw";
  part("settings").scrollIntoView({ block: "nearest" });
}

/** Draws what the form says, as the page that is looked at means it. */
async function submit(draw) {
  const asked = { ...draw, previews: PREVIEWS };
  const name = current();
  if (name === "grid") return (await module("grid")).draw(asked);
  if (name === "edit") return (await module("edit")).draw(asked);
  return jobs.submit(asked);
}

async function settings(file) {
  const told = await ask("POST", "api/settings", { image: await base64(file) });
  if (current() === "edit") location.hash = "#draw";
  await take({ ...told.settings, model: told.model });
  const missing = (told.settings.loras ?? []).filter(({ name }) => !form.info.loras.includes(name));
  if (told.model && !form.info.models.includes(told.model)) {
    message(`It was drawn by the model ${told.model}, which is not here.`);
  } else if (missing.length) {
    message(`It was drawn with the LoRA ${missing[0].name}, which is not here.`);
  } else if (told.edited) {
    message("Its settings are in the form; the picture that it was made of is not in it.", "told");
  } else message("The settings of the picture are in the form.", "told");
}

const ofPicture = {
  Edit: async (job, picture) => {
    location.hash = "#edit";
    await (await module("edit")).open(relative(picture.url), picture.file);
  },
  Vary: (job, picture) => {
    const draw = { ...job.settings, seed: picture.seed, count: 4, previews: PREVIEWS };
    if (job.edited.image) throw new Refused("Open it in Edit to vary a picture that was edited.");
    return jobs.submit({ ...draw, variation_seed: Math.floor(Math.random() * 2 ** 31), variation_strength: 0.15 });
  },
  Seed: (job, picture) => {
    const { seed, variation_seed } = picture;
    return take({ ...job.settings, seed, variation_seed, count: 1 });
  },
};

function drops() {
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (!file) return;
    if (current() === "edit") attempt(async () => (await module("edit")).openFile(file));
    else attempt(() => settings(file));
  });
  part("picture-file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = "";
    if (file) attempt(() => settings(file));
  });
}

async function start() {
  addEventListener("hashchange", () => attempt(show));
  await attempt(show);
  await form.start((draw) => attempt(() => submit(draw)), jobs.last);
  jobs.start({ ofPicture, settings: (job) => take(job.settings) });
  drops();
  for (const name of ["training", "data"]) {
    document.querySelector(`nav a[href="#${name}"]`).hidden = !form.info.pages?.includes(name);
  }
}

attempt(start);
