// The queue and the gallery: jobs of everybody who uses this server, the newest first.

import { ask, attempt, element } from "./api.js";

const list = document.getElementById("jobs");
const large = document.getElementById("large");
const cards = new Map();

/** What the buttons of a picture do, by its words: (job, picture) -> anything; see `start`. */
let uses = {};
let older = null;
const listeners = new Map(); // job -> who wants to know what becomes of it

/** The seed of the newest picture that is drawn. */
export function last() {
  for (const line of list.children) {
    const { pictures } = cards.get(line.id.slice(4)).job;
    const drawn = pictures.filter((picture) => picture.url);
    if (drawn.length) return drawn.at(-1).seed;
  }
  return null;
}

/** Makes the list live. */
export async function start(buttons) {
  uses = buttons;
  await attempt(more);
  document.getElementById("older").addEventListener("click", () => attempt(more));
  // One connection for all jobs: a browser opens six to a server.
  const source = new EventSource("api/events");
  const on = (kind, heard) => source.addEventListener(kind, (event) => heard(JSON.parse(event.data)));
  on("state", ({ jobs }) => attempt(() => reconnected(jobs)));
  on("taken", (job) => shown(job, true));
  for (const kind of ["place", "step", "preview", "picture", "done"]) {
    on(kind, (data) => heard(kind, data.id, data));
  }
}

/** Asks for `draw`; the job, which from now on is in the list. */
export async function submit(draw) {
  const job = await ask("POST", "api/jobs", draw);
  return shown(job, true).job;
}

/** Calls `ended(job)` when a job is over. */
export function whenOver(job, ended) {
  const { job: now } = cards.get(job.id);
  if (over(now)) ended(now);
  else listeners.set(job.id, ended);
}

async function reconnected(jobs) {
  const alive = new Set(jobs.map((job) => job.id));
  for (const job of jobs) shown(job, true).heard("state", job);
  for (const [id, card] of cards) {
    if (over(card.job) || alive.has(id)) continue;
    heard("done", id, await ask("GET", `api/jobs/${id}`));
  }
}

function heard(kind, id, data) {
  cards.get(id)?.heard(kind, data);
  if (kind !== "done") return;
  listeners.get(id)?.(data);
  listeners.delete(id);
}

async function more() {
  const { jobs, next } = await ask("GET", `api/jobs?limit=20${older ? `&before=${older}` : ""}`);
  for (const job of jobs) shown(job, false);
  older = next;
  settle();
}

function settle() {
  document.getElementById("older").hidden = older === null;
  document.getElementById("empty").hidden = cards.size > 0;
}

function shown(job, first) {
  if (cards.has(job.id)) return cards.get(job.id);
  const card = new Card(job);
  cards.set(job.id, card);
  if (first) list.prepend(card.line);
  else list.append(card.line);
  settle();
  return card;
}

const over = (job) => !["queued", "drawing"].includes(job.state);

/** What is shown of one job. */
class Card {
  constructor(job) {
    this.job = job;
    this.steps = {};
    const { settings } = job;
    this.pictures = element("ul", { className: "pictures" });
    this.progress = element("progress", { max: 1, value: 0, ariaLabel: "How far it is" });
    this.state = element("p", { className: "note", role: "status" });
    this.cancel = button("Cancel", () => ask("DELETE", `api/jobs/${job.id}`));
    const again = button("Take its settings", () => uses.settings(this.job, null));
    this.line = element("li", { className: "job", id: `job-${job.id}` },
      this.pictures,
      element("p", { className: "prompt", textContent: settings.prompt || "(no prompt)" }),
      this.progress,
      this.state,
      element("div", { className: "actions" }, this.cancel, again));
    this.cells = job.pictures.map(() => {
      const cell = element("li");
      cell.append(element("div", { className: "coming" }));
      this.pictures.append(cell);
      return cell;
    });
    job.pictures.forEach((picture, n) => picture.url && this.picture(picture, this.cells[n]));
    this.say();
  }

  heard(kind, data) {
    const cell = this.cells[data.picture];
    if (kind === "state" || kind === "done") {
      this.job = data;
      for (const [number, progress] of Object.entries(data.progress ?? {})) this.steps[number] = progress;
      data.pictures.forEach((picture, n) => picture.url && this.picture(picture, this.cells[n]));
    } else if (kind === "place") {
      Object.assign(this.job, data);
    } else if (kind === "step") {
      this.job.state = "drawing";
      this.steps[data.picture] = data;
    } else if (kind === "preview") {
      cell.firstChild.replaceWith(element("img", { className: "preview", src: data.image, alt: "a preview" }));
    } else if (kind === "picture") {
      const picture = this.job.pictures[data.picture];
      this.picture(Object.assign(picture, data, { number: data.picture }), cell);
    }
    this.say();
  }

  /** Puts a finished picture in its cell, once. */
  picture(picture, cell) {
    if (!cell || cell.dataset.url === picture.url) return;
    cell.dataset.url = picture.url;
    const { prompt } = this.job.settings;
    const url = picture.url.replace(/^\//, "");
    const image = element("img", { src: url, alt: prompt || "a picture", loading: "lazy", decoding: "async" });
    const open = element("button", { type: "button", className: "open", ariaLabel: `Look at: ${prompt}` }, image);
    open.addEventListener("click", () => this.look(picture, url));
    const save = element("a", { href: url, download: picture.file, textContent: "Save" });
    const others = Object.entries(uses.ofPicture).map(([words, use]) => button(words, () => use(this.job, picture)));
    cell.replaceChildren(open, element("div", { className: "of-picture" }, save, ...others));
  }

  look(picture, url) {
    const { prompt, steps, guidance, sampler } = this.job.settings;
    large.querySelector("img").src = url;
    large.querySelector("img").alt = prompt;
    large.querySelector("p").textContent =
      `${prompt}: seed ${picture.seed}, ${steps} steps, guidance ${guidance}, ${sampler}`;
    large.showModal();
  }

  say() {
    const { job } = this;
    const drawn = job.pictures.filter((picture) => picture.url).length;
    const parts = Object.entries(this.steps).filter(([n]) => !job.pictures[n].url);
    const share = parts.reduce((sum, [, { step, steps }]) => sum + step / steps, drawn);
    this.progress.hidden = this.cancel.hidden = over(job);
    this.progress.value = share / job.pictures.length;
    const wait = job.seconds ? `, about ${duration(job.seconds)}` : "";
    const words = {
      queued: job.place ? `${job.place} before it${wait}` : `next${wait}`,
      drawing: `${drawn} of ${job.pictures.length} drawn${wait}`,
      done: `${job.settings.steps} steps, guidance ${job.settings.guidance}, ${job.settings.sampler}`,
      failed: `It failed: ${job.error}`,
      cancelled: `Cancelled; ${drawn} of ${job.pictures.length} were drawn`,
      expired: "Its time was over before it was drawn",
    };
    this.state.textContent = words[job.state] ?? job.state;
    this.state.classList.toggle("bad", job.state === "failed");
  }
}

function button(words, use) {
  const made = element("button", { type: "button", textContent: words });
  made.addEventListener("click", () => attempt(use));
  return made;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return `${Math.round(seconds / 60)} min`;
}
