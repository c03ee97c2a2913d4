// A table of pictures over one or two settings, drawn cell by cell.

import { Refused, attempt, element, relative } from "./api.js";
import { info } from "./form.js";
import { submit, whenOver } from "./jobs.js";

const MOST = 100;
const WORDS = "prompt words";
const WEIGHT = "LoRA weight";
const NUMBERS = ["steps", "guidance", "seed", "guidance_rescale", "variation_strength", "width", "height"];
const panel = document.getElementById("grid-panel");
const result = document.getElementById("grid-result");

/** Builds the two axes. */
export function start() {
  const names = ["", ...NUMBERS, "sampler", "model", WORDS, WEIGHT];
  for (const [axis, title] of [["across", "Across"], ["down", "Down"]]) {
    const select = element("select", { id: `axis-${axis}` });
    select.append(...names.map((name) => element("option", { value: name, textContent: words(name) || "nothing" })));
    const values = element("input", { id: `values-${axis}`, placeholder: "4, 8, 16" });
    select.addEventListener("change", () => (values.placeholder = example(select.value)));
    panel.append(element("div", { className: "axis" },
      element("label", {}, title, select),
      element("label", {}, `Values ${axis}`, values)));
  }
  panel.append(element("p", { className: "note",
    textContent: "Values stand between commas. Of prompt words the first is in the prompt, and the others take its place." }));
}

const words = (name) => name.replaceAll("_", " ");

function example(name) {
  const [one, two] = info.samplers;
  return { sampler: `${one}, ${two}`, [WORDS]: "red, green, blue",
    [WEIGHT]: "0, 0.5, 1", model: info.models.join(", "), guidance: "1, 3, 7" }[name] ?? "4, 8, 16";
}

/** The axis as its name and settings that each value means. */
function axis(which, draw) {
  const name = document.getElementById(`axis-${which}`).value;
  if (!name) return { name: "", values: [""], of: () => ({}) };
  const values = document.getElementById(`values-${which}`).value.split(",").map((v) => v.trim()).filter(Boolean);
  if (!values.length) throw new Refused(`Write the values of ${words(name)}, with commas between them.`);
  if (name === WORDS) {
    if (!draw.prompt.includes(values[0])) throw new Refused(`"${values[0]}" is not in the prompt.`);
    return { name, values, of: (value, so) => ({ prompt: so.prompt.replaceAll(values[0], value) }) };
  }
  if (name === WEIGHT && !draw.loras.length) throw new Refused("Choose a LoRA under More settings first.");
  if (name === "variation_strength" && draw.variation_seed === undefined) {
    throw new Refused("Give a variation seed under More settings first.");
  }
  const numbers = NUMBERS.includes(name) || name === WEIGHT;
  const wrong = values.find((value) => numbers && !Number.isFinite(Number(value)));
  if (wrong !== undefined) throw new Refused(`${wrong} is no number, as ${words(name)} needs.`);
  if (name === WEIGHT) {
    return { name, values, of: (value, so) => ({ loras: [{ ...so.loras[0], weight: Number(value) }, ...so.loras.slice(1)] }) };
  }
  return { name, values, of: (value) => ({ [name]: numbers ? Number(value) : value }) };
}

/** Draws all cells, all of one seed unless an axis says other ones. */
export async function draw(asked) {
  const across = axis("across", asked);
  const down = axis("down", asked);
  if (!across.name && !down.name) throw new Refused("Choose what changes across or down the grid.");
  const cells = across.values.length * down.values.length;
  if (cells > MOST) throw new Refused(`${cells} pictures are more than the ${MOST} of a grid.`);
  const seed = asked.seed ?? Math.floor(Math.random() * 2 ** 32);
  const base = { ...asked, count: 1, seed };
  const head = element("tr", {}, element("td"), ...across.values.map((v) => element("th", { scope: "col", textContent: v })));
  const names = [down.name, across.name].filter(Boolean).map(words).join(" by ");
  const table = element("table", {}, element("caption", { textContent: `${names}, seed ${seed}` }), head);
  const images = down.values.map(() => across.values.map(() => null));
  const save = element("button", { type: "button", textContent: "Save as one picture", disabled: true });
  save.addEventListener("click", () => attempt(() => asOne(images, across, down)));
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: "Grid" }, table);
  result.replaceChildren(element("h2", { textContent: "Grid" }), scroll, element("div", { className: "actions" }, save));
  let left = cells;
  for (const [y, row] of down.values.entries()) {
    const line = element("tr", {}, element("th", { scope: "row", textContent: row }));
    table.append(line);
    for (const [x, column] of across.values.entries()) {
      const cell = element("td", {}, element("div", { className: "coming" }));
      line.append(cell);
      const ended = (words, picture) => {
        if (picture?.url) {
          images[y][x] = element("img", { src: relative(picture.url), alt: `${row} ${column}` });
          cell.replaceChildren(images[y][x]);
        } else cell.replaceChildren(words);
        left -= 1;
        save.disabled = left > 0 || !images.flat().some(Boolean);
      };
      const one = { ...base, ...down.of(row, base) };
      try {
        const job = await submit({ ...one, ...across.of(column, one) });
        whenOver(job, (data) => ended(data.error ?? data.state, data.pictures[0]));
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        ended(error.message); // of this cell: the others are drawn
      }
    }
  }
}

/** The table as one PNG with its labels. */
async function asOne(images, across, down) {
  const drawn = images.flat().filter(Boolean);
  await Promise.all(drawn.map((image) => image.decode()));
  const width = Math.max(...drawn.map((image) => image.naturalWidth));
  const height = Math.max(...drawn.map((image) => image.naturalHeight));
  const text = Math.max(12, Math.round(height / 16));
  const canvas = element("canvas");
  const paint = canvas.getContext("2d");
  paint.font = `${text}px sans-serif`;
  const left = 8 + Math.max(...down.values.map((value) => paint.measureText(value).width));
  canvas.width = left + width * across.values.length;
  canvas.height = 2 * text + height * down.values.length;
  paint.fillStyle = "white";
  paint.fillRect(0, 0, canvas.width, canvas.height);
  paint.font = `${text}px sans-serif`;
  paint.fillStyle = "black";
  paint.textBaseline = "middle";
  across.values.forEach((value, n) => paint.fillText(value, left + n * width + 4, text, width - 8));
  down.values.forEach((value, n) => paint.fillText(value, 4, 2 * text + (n + 0.5) * height));
  images.forEach((row, y) => row.forEach((image, x) => image && paint.drawImage(image, left + x * width, 2 * text + y * height)));
  const blob = await new Promise((resolve) => canvas.toBlob(resolve));
  const link = element("a", { href: URL.createObjectURL(blob), download: "grid.png" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
