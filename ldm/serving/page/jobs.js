// The queue and the gallery: jobs of everybody who uses this server, the newest first.

import { ask, attempt, element, relative } from "./api.js";

const PAGE = 20; // jobs that are asked for at a time
const AGAIN = 3000; // milliseconds until the next try where the server has closed the connection

const list = document.getElementById("jobs");
const large = document.getElementById("large");
const said = document.getElementById("said");
const lost = document.getElementById("lost");
const cards = new Map();

/** What the buttons of a picture do, by its words: (job, picture) -> anything; see `start`. */
let uses = {};
let older; // the job before which older ones come; null: there are none
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
export function start(buttons) {
  uses = buttons;
  document.getElementById("older").addEventListener("click", () => attempt(() => more()));
  connect();
}

/** One connection for all jobs: a browser opens six to a server. */
function connect() {
  const source = new EventSource("api/events");
  const on = (kind, heard) => source.addEventListener(kind, (event) => heard(JSON.parse(event.data)));
  on("state", ({ jobs }) => {
    lost.textContent = "";
    attempt(() => reconnected(jobs));
  });
  on("taken", shown);
  for (const kind of ["place", "step", "preview", "picture", "done"]) {
    on(kind, (data) => heard(kind, data.id, data));
  }
  source.addEventListener("error", () => {
    lost.textContent = "Not connected";
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN);
  });
}

/** Asks for `draw`; the job, which from now on is in the list. */
export async function submit(draw) {
  const job = await ask("POST", "api/jobs", draw);
  return shown(job).job;
}

/** Calls `ended(job)` when a job is over. */
export function whenOver(job, ended) {
  const { job: now } = cards.get(job.id);
  if (over(now)) ended(now);
  else listeners.set(job.id, ended);
}

/** Catches up with what went on while nobody listened. */
async function reconnected(alive) {
  for (const job of alive) shown(job).heard("state", job);
  const ids = new Set(alive.map((job) => job.id));
  const missed = [...cards].filter(([id, { job }]) => !over(job) && !ids.has(id));
  await more(false);
  for (const [id] of missed) heard("done", id, await ask("GET", `api/jobs/${id}`));
}

function heard(kind, id, data) {
  const card = cards.get(id);
  if (!card) return;
  card.heard(kind, data);
  if (kind !== "done") return;
  said.textContent = `${card.job.settings.prompt || "A picture"}: ${card.job.state}`;
  listeners.get(id)?.(data);
  listeners.delete(id);
}

/** Asks for the jobs that follow those that are shown, or for the newest. */
async function more(further = true) {
  const { jobs, next } = await ask("GET", `api/jobs?limit=${PAGE}${further ? `&before=${older}` : ""}`);
  for (const job of jobs) shown(job);
  if (further || older === undefined) older = next;
  settle();
}

function settle() {
  document.getElementById("older").hidden = !older;
  document.getElementById("empty").hidden = cards.size > 0;
}

/** The card of a job, in its place: ids sort by time. */
function shown(job) {
  if (cards.has(job.id)) return cards.get(job.id);
  const card = new Card(job);
  cards.set(job.id, card);
  list.insertBefore(card.line, [...list.children].find((line) => line.id < card.line.id) ?? null);
  settle();
  return card;
}

const over = (job) => !["queued", "drawing"].includes(job.state);

/** What is shown of one job. */
class Card {
  constructor(job) {
    this.job = job;
    this.steps = {};
    this.began = null; // when, and at which share, steps were first heard of
    const { settings } = job;
    this.pictures = element("ul", { className: "pictures" });
    this.progress = element("progress", { max: 1, value: 0, ariaLabel: "How far it is" });
    this.state = element("p", { className: "note" });
    this.cancel = button("Cancel", () => ask("DELETE", `api/jobs/${job.id}`));
    const again = button("Settings", () => uses.settings(this.job));
    const prompt = settings.prompt || "(no prompt)";
    this.line = element("li", { className: "job", id: `job-${job.id}` },
      this.pictures,
      element("p", { className: "prompt", textContent: prompt, title: prompt }),
      this.progress,
      this.state,
      element("div", { className: "actions" }, this.cancel, again));
    this.line.classList.toggle("several", job.pictures.length > 1);
    this.cells = job.pictures.map(() => element("li", {}, element("div", { className: "coming" })));
    this.pictures.append(...this.cells);
    this.finished();
    this.heard("state", job);
  }

  heard(kind, data) {
    const cell = this.cells[data.picture];
    if (kind === "state" || kind === "done") {
      this.job = data;
      this.steps = data.progress ?? {};
      this.finished();
      const open = this.cells.filter((one) => !one.dataset.url);
      if (data.preview && open.length === 1) preview(open[0], data.preview);
    } else if (kind === "place") {
      Object.assign(this.job, { place: data.place, seconds: data.seconds });
    } else if (kind === "step") {
      Object.assign(this.job, { state: "drawing" });
      this.steps[data.picture] = data;
    } else if (kind === "preview") {
      preview(cell, data.image);
    } else if (kind === "picture") {
      const { file, url } = data;
      this.picture(Object.assign(this.job.pictures[data.picture], { file, url }), cell);
    }
    this.say();
  }

  finished() {
    this.job.pictures.forEach((picture, n) => picture.url && this.picture(picture, this.cells[n]));
  }

  /** Puts a finished picture in its cell, once. */
  picture(picture, cell) {
    if (cell.dataset.url === picture.url) return;
    cell.dataset.url = picture.url;
    const { prompt } = this.job.settings;
    const url = relative(picture.url);
    const image = element("img", { src: url, alt: prompt || "a picture", loading: "lazy", decoding: "async" });
    const open = element("button", { type: "button", className: "open", ariaLabel: `Look at: ${prompt || "a picture"}` }, image);
    open.addEventListener("click", () => this.look(picture, url));
    const save = element("a", { href: url, download: picture.file, textContent: "Save" });
    const others = Object.entries(uses.ofPicture).map(([words, use]) => button(words, () => use(this.job, picture)));
    cell.replaceChildren(open, element("div", { className: "of-picture" }, save, ...others));
  }

  look(picture, url) {
    const { prompt, steps, guidance, sampler } = this.job.settings;
    Object.assign(large.querySelector("img"), { src: url, alt: prompt || "a picture" });
    large.querySelector("p").textContent =
      `${prompt || "(no prompt)"}: seed ${picture.seed}, ${steps} steps, guidance ${guidance}, ${sampler}`;
    large.showModal();
  }

  say() {
    const { job } = this;
    const drawn = job.pictures.filter((picture) => picture.url).length;
    const now = Object.entries(this.steps).filter(([n]) => !job.pictures[n].url).map(([, step]) => step);
    const share = now.reduce((sum, { step, steps }) => sum + step / steps, drawn) / job.pictures.length;
    if (now.length) this.began ??= { at: performance.now(), share };
    this.progress.hidden = this.cancel.hidden = over(job);
    this.line.classList.toggle("over", over(job));
    this.progress.value = share;
    const wait = job.seconds ? `, about ${duration(job.seconds)}` : "";
    const words = {
      queued: job.place ? `${job.place} before it${wait}` : `Next${wait}`,
      drawing: this.going(drawn, now, share),
      done: `${job.settings.steps} steps, guidance ${job.settings.guidance}, ${job.settings.sampler}`,
      failed: `It failed: ${job.error}`,
      cancelled: drawn ? `Cancelled; ${drawn} of ${job.pictures.length} were drawn` : "Cancelled",
      expired: "Its time was over before it was drawn",
    };
    this.state.textContent = words[job.state] ?? job.state;
    this.state.classList.toggle("bad", job.state === "failed");
  }

  /** How far a job is that is being drawn, and how long it takes at the pace so far. */
  going(drawn, now, share) {
    const many = this.job.pictures.length;
    const done = many > 1 ? `${drawn} of ${many} drawn` : now.length ? `Step ${now[0].step} of ${now[0].steps}` : "Drawing";
    const gone = share - (this.began?.share ?? share);
    if (gone <= 0) return done;
    return `${done}, about ${duration(((performance.now() - this.began.at) / 1000) * ((1 - share) / gone))}`;
  }
}

function preview(cell, src) {
  if (!cell.dataset.url) cell.replaceChildren(element("img", { className: "preview", src, alt: "a preview" }));
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
