// A picture with a brush: what is painted is drawn anew, the rest stays as it is.

import { Refused, attempt, base64, element, message, relative } from "./api.js";
import { info } from "./form.js";
import { submit, whenOver } from "./jobs.js";

const SIDES = ["left", "top", "right", "bottom"];
const STEP = 4; // pixels of the picture that an arrow key moves the brush

const panel = document.getElementById("edit-panel");
const image = element("img", { alt: "the picture that is edited" });
const after = element("img", { alt: "what became of it", hidden: true });
const canvas = element("canvas", { tabIndex: 0 });
const stage = element("div", { id: "stage", hidden: true }, image, after, canvas);
const tools = element("div", { hidden: true });
const size = number("Brush", { type: "range", min: 2, max: 100, value: 24 });
const strength = number("Strength", { type: "number", min: 0, max: 1, step: "any", value: 1 });
const feather = number("Feather", { type: "number", min: 0, max: 100, value: 4 });
const around = number("Close-up", { type: "number", min: 0, max: 4096, placeholder: "no", title: "What is painted is drawn alone, as large as the model draws, with so many pixels around it" });
const compare = number("Before and after", { type: "range", min: 0, max: 100, value: 0, disabled: true });
const beyond = Object.fromEntries(SIDES.map((side) => [side, number(side[0].toUpperCase() + side.slice(1), { type: "number", min: 0, value: 0 })]));

let source = null; // { name, data in base64 }
let strokes = []; // { erase, size, points: [[x, y], ...] } in pixels of the picture
let stroke = null;
let erase = false;
let cursor = null; // of the keyboard

function number(words, properties) {
  const input = element("input", properties);
  input.label = element("label", {}, `${words} `, input);
  return input;
}

/** Builds the panel. */
export function start() {
  const file = element("input", { type: "file", accept: "image/png,image/jpeg,image/webp" });
  file.addEventListener("change", () => file.files[0] && attempt(() => openFile(file.files[0])));
  const eraser = button("Erase", () => {
    erase = !erase;
    eraser.setAttribute("aria-pressed", erase);
  });
  eraser.setAttribute("aria-pressed", false);
  canvas.setAttribute("aria-label", "Brush: drag to paint, or move it by arrow keys and hold Space");
  canvas.setAttribute("role", "application");
  compare.label.className = "wide";
  panel.append(
    element("label", { className: "file" }, "Choose a picture, or drop one here", file),
    stage, tools,
    element("p", { className: "note", textContent: "What you paint is drawn anew. Paint nothing, and all of it is, as far as the strength says." }));
  tools.append(
    element("div", { className: "fields" }, size.label, compare.label),
    element("div", { className: "fields" }, eraser, button("Undo", undo), button("Clear", clear)),
    element("div", { className: "fields" }, strength.label, feather.label, around.label),
    element("details", {}, element("summary", { textContent: "Draw beyond its borders" }),
      element("div", { className: "fields" }, ...SIDES.map((side) => beyond[side].label))));
  for (const side of SIDES) {
    stage.append(handle(side));
    beyond[side].addEventListener("input", lay);
  }
  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", move);
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (stroke = null));
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("keyup", (event) => event.key === " " && (stroke = null));
  canvas.addEventListener("focus", paint);
  canvas.addEventListener("blur", () => {
    stroke = null;
    paint();
  });
  compare.addEventListener("input", () => (after.style.clipPath = `inset(0 ${100 - compare.value}% 0 0)`));
}

/** Opens a file of this device. */
export async function openFile(file) {
  await opened(file.name, await base64(file), file.type);
}

/** Opens a picture of this server. */
export async function open(url, name) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Refused(`${name} is not there any more`);
  const blob = await answer.blob();
  await opened(name, await base64(blob), blob.type);
  panel.scrollIntoView({ block: "nearest" });
}

async function opened(name, data, type) {
  image.src = `data:${type || "image/png"};base64,${data}`;
  try {
    await image.decode();
  } catch {
    throw new Refused(`${name} is no picture that can be opened`);
  }
  source = { name, data };
  strokes = [];
  after.hidden = compare.disabled = true;
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  stage.hidden = tools.hidden = false;
  const { multiple } = info.model;
  for (const side of SIDES) Object.assign(beyond[side], { value: 0, step: multiple });
  const long = Math.max(canvas.width, canvas.height);
  Object.assign(size, { max: Math.max(8, Math.round(long / 2)), value: Math.max(4, Math.round(long / 6)) });
  cursor = [canvas.width / 2, canvas.height / 2];
  lay();
  paint();
}

/** Pixels that are added left, top, right and below. */
const added = () => SIDES.map((side) => Number(beyond[side].value));

/** Lays the picture out within what is drawn around it. */
function lay() {
  const [left, top, right, bottom] = added();
  const width = left + canvas.width + right;
  const height = top + canvas.height + bottom;
  stage.style.aspectRatio = `${width} / ${height}`;
  const place = { left: `${(100 * left) / width}%`, top: `${(100 * top) / height}%`,
    width: `${(100 * canvas.width) / width}%`, height: `${(100 * canvas.height) / height}%` };
  for (const one of [image, after, canvas]) Object.assign(one.style, place);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.x) * canvas.width) / box.width, ((event.clientY - box.y) * canvas.height) / box.height];
}

function down(event) {
  canvas.setPointerCapture(event.pointerId);
  begin(place(event));
}

function begin(point) {
  stroke = { erase, size: Number(size.value), points: [point] };
  strokes.push(stroke);
  paint();
}

function move(event) {
  if (!stroke) return;
  for (const one of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(place(one));
  paint();
}

function key(event) {
  const way = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key];
  if (event.key === " " && !stroke) begin([...cursor]);
  else if (way) {
    cursor = [clamp(cursor[0] + way[0], canvas.width), clamp(cursor[1] + way[1], canvas.height)];
    stroke?.points.push([...cursor]);
    paint();
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (event.key !== " ") return;
  event.preventDefault();
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));

function undo() {
  strokes.pop();
  paint();
}

function clear() {
  strokes = [];
  paint();
}

/** Draws the strokes over the picture, and the brush where the keyboard moves it. */
function paint() {
  const brush = canvas.getContext("2d");
  brush.globalCompositeOperation = "source-over";
  brush.clearRect(0, 0, canvas.width, canvas.height);
  lines(brush, hatch(brush));
  canvas.style.opacity = 0.7;
  if (!canvas.matches(":focus-visible")) return;
  brush.globalCompositeOperation = "source-over";
  for (const [colour, width] of [["white", 3], ["black", 1]]) {
    brush.strokeStyle = colour;
    brush.lineWidth = (width * canvas.width) / canvas.clientWidth;
    brush.beginPath();
    brush.arc(...cursor, Number(size.value) / 2, 0, 2 * Math.PI);
    brush.stroke();
  }
}

/** Two colours in turn: one alone may be that of the picture. */
function hatch(brush) {
  const cell = Math.max(1, Math.round(canvas.width / 64));
  const tile = element("canvas", { width: 2 * cell, height: 2 * cell });
  const paint = tile.getContext("2d");
  for (const [colour, x, y] of [["white", 0, 0], ["#3451d1", 1, 0], ["#3451d1", 0, 1], ["white", 1, 1]]) {
    paint.fillStyle = colour;
    paint.fillRect(x * cell, y * cell, cell, cell);
  }
  return brush.createPattern(tile, "repeat");
}

/** Draws the strokes in `colour`, the later over the earlier. */
function lines(brush, colour) {
  brush.lineCap = brush.lineJoin = "round";
  for (const one of strokes) {
    brush.globalCompositeOperation = one.erase ? "destination-out" : "source-over";
    brush.strokeStyle = brush.fillStyle = colour;
    brush.lineWidth = one.size;
    brush.beginPath();
    brush.moveTo(...one.points[0]);
    for (const point of one.points) brush.lineTo(...point);
    if (one.points.length === 1) brush.lineTo(one.points[0][0] + 0.01, one.points[0][1]);
    brush.stroke();
  }
}

/** White where something was painted, black elsewhere, as a PNG in base64; null: nothing was. */
function mask() {
  if (!strokes.some((one) => !one.erase)) return null;
  const sheet = element("canvas", { width: canvas.width, height: canvas.height });
  const brush = sheet.getContext("2d");
  lines(brush, "white");
  const pixels = brush.getImageData(0, 0, sheet.width, sheet.height);
  let any = false;
  for (let at = 0; at < pixels.data.length; at += 4) {
    const on = pixels.data[at + 3] > 127; // the brush's edge is smooth, a mask's is the feather's
    any ||= on;
    pixels.data.fill(on ? 255 : 0, at, at + 3);
    pixels.data[at + 3] = 255;
  }
  brush.putImageData(pixels, 0, 0);
  return any ? sheet.toDataURL("image/png").split(",", 2)[1] : null;
}

/** A border that is pulled outwards. */
function handle(side) {
  const made = element("button", { type: "button", className: `border ${side}`, ariaLabel: `Draw beyond the ${side} border` });
  const along = side === "left" || side === "right";
  const sign = side === "left" || side === "top" ? -1 : 1;
  const add = (pixels) => {
    const { multiple } = info.model;
    beyond[side].value = Math.max(0, Math.round(pixels / multiple) * multiple);
    made.title = `${beyond[side].value} pixels`;
    lay();
  };
  made.addEventListener("pointerdown", (event) => {
    made.setPointerCapture(event.pointerId);
    const from = along ? event.clientX : event.clientY;
    const scale = canvas.width / canvas.getBoundingClientRect().width;
    const before = Number(beyond[side].value);
    const drag = (now) => add(before + sign * ((along ? now.clientX : now.clientY) - from) * scale);
    made.addEventListener("pointermove", drag);
    made.addEventListener("pointerup", () => made.removeEventListener("pointermove", drag), { once: true });
  });
  made.addEventListener("keydown", (event) => {
    const more = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (more === undefined) return;
    event.preventDefault();
    add(Number(beyond[side].value) + sign * more * info.model.multiple);
  });
  return made;
}

/** Draws the picture anew as the form says. */
export async function draw(asked) {
  if (source === null) throw new Refused("Choose the picture that is to be edited first.");
  const { width, height, ...rest } = asked;
  const sides = added();
  const told = { ...rest, image: source.data, strength: Number(strength.value) };
  const painted = mask();
  if (sides.some(Boolean)) {
    if (painted !== null) throw new Refused("Draw beyond the borders first, and paint in what comes of it.");
    Object.assign(told, { outpaint: sides, feather: Number(feather.value) });
  } else if (painted !== null) {
    Object.assign(told, { mask: painted, feather: Number(feather.value) });
  }
  const close = told.feather !== undefined && around.value !== "";
  if (close) told.mask_crop = Number(around.value);
  const { multiple } = info.model;
  const odd = !close && [canvas.width + sides[0] + sides[2], canvas.height + sides[1] + sides[3]].some((n) => n % multiple);
  if (odd) message(`Its sides are no multiples of ${multiple}: the server says what it makes of that.`, "told");
  const job = await submit(told);
  const of = source;
  whenOver(job, (data) => attempt(() => ended(data, of, sides)));
}

/** Shows what became of the picture over it, unless another one is edited by now. */
async function ended(job, of, sides) {
  const [picture] = job.pictures;
  if (!picture.url || of !== source || sides.some(Boolean)) return;
  after.src = relative(picture.url);
  await after.decode();
  after.hidden = compare.disabled = false;
  compare.value = 100;
  after.style.clipPath = "inset(0)";
  clear();
}

function button(words, use) {
  const made = element("button", { type: "button", textContent: words });
  made.addEventListener("click", use);
  return made;
}
