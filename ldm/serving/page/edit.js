// A picture with a brush: what is painted is drawn anew, the rest stays as it is.

import { Refused, attempt, base64, element, message } from "./api.js";
import { info } from "./form.js";
import { submit, whenOver } from "./jobs.js";

const COLOUR = "rgb(220 38 38)";
const SIDES = ["left", "top", "right", "bottom"];
const STEP = 4; // pixels of the picture that an arrow key moves the brush

const panel = document.getElementById("edit-panel");
const image = element("img", { alt: "the picture that is edited" });
const after = element("img", { alt: "what became of it", hidden: true });
const canvas = element("canvas", { tabIndex: 0 });
const stage = element("div", { id: "stage", hidden: true }, image, after, canvas);
const size = number("Brush", { type: "range", min: 2, max: 100, value: 24 });
const strength = number("Strength", { type: "number", min: 0, max: 1, step: "any", value: 1 });
const feather = number("Feather, pixels", { type: "number", min: 0, max: 100, value: 4 });
const compare = number("Before and after", { type: "range", min: 0, max: 100, value: 0, disabled: true });
const beyond = Object.fromEntries(SIDES.map((side) => [side, number(`Add ${side}`, { type: "number", min: 0, value: 0 })]));

let source = null; // { name, data in base64 }
let strokes = []; // { erase, size, points: [[x, y], ...] } in pixels of the picture
let stroke = null;
let erase = false;
let cursor = null;

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
  panel.append(
    element("div", { className: "actions" }, element("label", { className: "file" }, "Choose a picture ", file)),
    element("p", { className: "note", textContent: "Or drop one here. What you paint is drawn anew; paint nothing, and all of it is, as far as the strength says." }),
    stage,
    element("div", { className: "fields" }, size.label, eraser, button("Undo", undo), button("Clear", clear)),
    element("div", { className: "fields" }, strength.label, feather.label, compare.label),
    element("details", {}, element("summary", { textContent: "Draw beyond its borders" }),
      element("div", { className: "fields" }, ...SIDES.map((side) => beyond[side].label))));
  for (const side of SIDES) stage.append(handle(side));
  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", move);
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (stroke = null));
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("keyup", (event) => event.key === " " && (stroke = null));
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
  stage.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
  stage.hidden = false;
  const { multiple } = info.model;
  for (const side of SIDES) Object.assign(beyond[side], { value: 0, step: multiple });
  size.max = Math.max(8, Math.round(Math.max(canvas.width, canvas.height) / 3));
  cursor = [canvas.width / 2, canvas.height / 2];
  paint();
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
    paint(true);
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

/** Draws the strokes on `canvas`: over the picture while one paints, or as a mask. */
function paint(withCursor = false) {
  const brush = canvas.getContext("2d");
  brush.globalCompositeOperation = "source-over";
  brush.clearRect(0, 0, canvas.width, canvas.height);
  lines(brush, COLOUR);
  canvas.style.opacity = 0.6;
  if (!withCursor) return;
  brush.globalCompositeOperation = "source-over";
  brush.strokeStyle = "white";
  brush.beginPath();
  brush.arc(...cursor, Number(size.value) / 2, 0, 2 * Math.PI);
  brush.stroke();
}

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
  const { style } = made;
  if (along) Object.assign(style, { top: 0, bottom: 0, [side]: 0 });
  else Object.assign(style, { left: 0, right: 0, [side]: 0 });
  const add = (pixels) => {
    const { multiple } = info.model;
    beyond[side].value = Math.max(0, Math.round(pixels / multiple) * multiple);
    made.title = `${beyond[side].value} pixels`;
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
  if (source === null) throw new Refused("choose the picture that is to be edited first");
  const { width, height, ...rest } = asked;
  const sides = SIDES.map((side) => Number(beyond[side].value));
  const told = { ...rest, image: source.data, strength: Number(strength.value) };
  if (sides.some(Boolean)) {
    if (mask() !== null) throw new Refused("draw beyond the borders first, and paint in what comes of it");
    Object.assign(told, { outpaint: sides, feather: Number(feather.value) });
  } else if (mask() !== null) {
    Object.assign(told, { mask: mask(), feather: Number(feather.value) });
  }
  const { multiple } = info.model;
  const odd = [canvas.width + sides[0] + sides[2], canvas.height + sides[1] + sides[3]].some((n) => n % multiple);
  if (odd) message(`Its sides are no multiples of ${multiple}: the server says what it makes of that.`, "told");
  const job = await submit(told);
  whenOver(job, (data) => attempt(() => ended(data, sides)));
}

async function ended(job, sides) {
  const [picture] = job.pictures;
  if (!picture.url || sides.some(Boolean)) return;
  after.src = picture.url.replace(/^\//, "");
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
