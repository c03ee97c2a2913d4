// Curves as SVG: bands from low to high, a line of means, a cursor for the pointer and the keys.

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [640, 250, 86, 10, 12, 32];

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const colour = (n) => `c${n % 8}${n % 16 < 8 ? "" : " dashed"}`;

/** A number in few characters. */
export function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
}

/** The mean of `y` up to each point, which halves the weight of what is `half` images older. */
export function smoothed(x, y, half) {
  if (!half) return y;
  let [mean, weight] = [0, 0];
  return y.map((value, n) => {
    const kept = n ? 2 ** (-(x[n] - x[n - 1]) / half) : 0;
    mean = mean * kept + value;
    weight = weight * kept + 1;
    return mean / weight;
  });
}

function ticks(low, high, log) {
  if (log && high / low >= 10) {
    const first = Math.ceil(Math.log10(low));
    const all = Array.from({ length: Math.floor(Math.log10(high)) - first + 1 }, (_, n) => 10 ** (first + n));
    if (all.length > 1) return all;
  }
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, n) => (first + n) * step);
}

/** A figure of `series` [{ name, x, y, low?, high?, smooth? }] over images; null where nothing can be drawn. */
export function chart(title, series, { log = false } = {}) {
  const seen = (value) => Number.isFinite(value) && (!log || value > 0);
  const lines = series.map((one) => ({ ...one, y: smoothed(one.x, one.y, one.smooth) })).filter(({ y }) => y.some(seen));
  if (!lines.length) return null;
  const all = lines.flatMap(({ y, low = [], high = [] }) => [...y, ...low, ...high]).filter(seen);
  const xs = lines.flatMap(({ x }) => x);
  const [least, most] = [Math.min, Math.max].map((pick) => (values) => values.reduce((a, b) => pick(a, b)));
  const [left, right] = [least(xs), most(xs)];
  let [low, high] = [least(all), most(all)];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const scale = log ? Math.log : (value) => value;
  const across = (x) => LEFT + (right > left ? (x - left) / (right - left) : 0.5) * (WIDTH - LEFT - RIGHT);
  const down = (y) => HEIGHT - BOTTOM - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - TOP - BOTTOM);
  const path = (x, y) => x.map((at, n) => (seen(y[n]) ? [across(at).toFixed(1), down(y[n]).toFixed(1)] : null)).filter(Boolean);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
  for (const tick of ticks(low, high, log)) {
    picture.append(
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: down(tick), y2: down(tick) }),
      svg("text", { x: LEFT - 6, y: down(tick) + 6, "text-anchor": "end" }, short(tick)));
  }
  for (const [at, anchor] of [[left, "start"], [right, "end"]].slice(left === right ? 1 : 0)) {
    picture.append(svg("text", { x: across(at), y: HEIGHT - 8, "text-anchor": anchor }, `${short(at)}${at === right ? " images" : ""}`));
  }
  lines.forEach(({ x, y, low: under, high: over }, n) => {
    if (under) picture.append(svg("polygon", { class: `band ${colour(n)}`, points: [...path(x, over), ...path(x, under).reverse()].join(" ") }));
    const points = path(x, y);
    picture.append(svg("polyline", { class: colour(n), points: points.join(" ") }));
    if (points.length < 20) picture.append(...points.map(([cx, cy]) => svg("circle", { class: colour(n), cx, cy, r: 2.5 })));
  });
  return framed(title, picture, lines, { left, right, across });
}

/** The picture with its title, legend, and a line that reads the numbers at the cursor. */
function framed(title, picture, lines, { left, right, across }) {
  const figure = document.createElement("figure");
  const [caption, legend, read] = ["figcaption", "ul", "output"].map((tag) => document.createElement(tag));
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const at = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b);
  const last = lines.map(({ name, y }) => `${name} ${short(y.at(-1))}`).join(", ");
  picture.setAttribute("aria-label", `${title} after ${short(right)} images: ${last}. Arrow keys read it.`);
  picture.append(cursor);
  caption.textContent = title;
  lines.forEach(({ name, y }, n) => {
    const item = document.createElement("li");
    item.className = colour(n);
    item.textContent = `${name} ${short(y.at(-1))}`;
    legend.append(item);
  });
  let place = at.length - 1;
  const look = (number) => {
    place = Math.max(0, Math.min(at.length - 1, number));
    const x = at[place];
    cursor.setAttribute("x1", across(x));
    cursor.setAttribute("x2", across(x));
    cursor.setAttribute("visibility", "visible");
    const told = lines.map((line) => [line.name, line.y[line.x.findLastIndex((point) => point <= x)]]);
    read.textContent = `${short(x)} images: ${told.map(([name, y]) => `${name} ${y === undefined ? "none yet" : short(y)}`).join(", ")}`;
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    const wanted = left + share * (right - left);
    const after = at.findIndex((x) => x >= wanted);
    look(after < 0 ? at.length - 1 : after > 0 && wanted - at[after - 1] < at[after] - wanted ? after - 1 : after);
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    look(place + step);
  });
  figure.className = "chart";
  figure.append(caption, picture, legend, read);
  return figure;
}
