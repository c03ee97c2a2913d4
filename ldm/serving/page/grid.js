// A table of pictures over one or two settings, drawn cell by cell.

import { Refused, attempt, element, message } from "./api.js";
import { info } from "./form.js";
import { submit, whenOver } from "./jobs.js";

const MOST = 100;
const NUMBERS = ["steps", "guidance", "seed", "guidance_rescale", "variation_strength", "width", "height"];
const panel = document.getElementById("grid-panel");
const result = document.getElementById("grid-result");

/** Builds the two axes. */
export function start() {
  const names = ["", ...NUMBERS, "sampler", "model", "words of the prompt", "weight of a LoRA"];
  for (const [axis, title] of [["across", "Across"], ["down", "Down"]]) {
    const select = element("select", { id: `axis-${axis}` });
    select.append(...names.map((name) => element("option", { value: name, textContent: name || "nothing" })));
    const values = element("input", { id: `values-${axis}`, placeholder: "4, 8, 16" });
    select.addEventListener("change", () => (values.placeholder = example(select.value)));
    panel.append(element("div", { className: "fields" },
      element("label", {}, title, select),
      element("label", { className: "wide" }, `Values ${axis}, between commas`, values)));
  }
  panel.append(element("p", { className: "note",
    textContent: "words of the prompt: the first is in the prompt, the others take its place." }));
}

function example(name) {
  const [one, two] = info.samplers;
  return { sampler: `${one}, ${two}`, "words of the prompt": "red, green, blue",
    "weight of a LoRA": "0, 0.5, 1", model: info.models.join(", "), guidance: "1, 3, 7" }[name] ?? "4, 8, 16";
}

/** The axis as its name and settings that each value means. */
function axis(which, draw) {
  const name = document.getElementById(`axis-${which}`).value;
  if (!name) return { name: "", values: [""], of: () => ({}) };
  const values = document.getElementById(`values-${which}`).value.split(",").map((v) => v.trim()).filter(Boolean);
  if (!values.length) throw new Refused(`${name}: write its values, with commas between them`);
  if (name === "words of the prompt") {
    if (!draw.prompt.includes(values[0])) throw new Refused(`"${values[0]}" is not in the prompt`);
    return { name, values, of: (value, so) => ({ prompt: so.prompt.replaceAll(values[0], value) }) };
  }
  if (name === "weight of a LoRA" && !draw.loras.length) throw new Refused("choose a LoRA under More settings first");
  const numbers = NUMBERS.includes(name) || name === "weight of a LoRA";
  const wrong = values.find((value) => numbers && !Number.isFinite(Number(value)));
  if (wrong !== undefined) throw new Refused(`${name}: ${wrong} is no number`);
  if (name === "weight of a LoRA") {
    return { name, values, of: (value, so) => ({ loras: [{ ...so.loras[0], weight: Number(value) }, ...so.loras.slice(1)] }) };
  }
  return { name, values, of: (value) => ({ [name]: numbers ? Number(value) : value }) };
}

/** Draws all cells, all of one seed unless an axis says other ones. */
export async function draw(asked) {
  const across = axis("across", asked);
  const down = axis("down", asked);
  if (!across.name && !down.name) throw new Refused("choose what changes across or down the grid");
  const cells = across.values.length * down.values.length;
  if (cells > MOST) throw new Refused(`${cells} pictures are more than the ${MOST} of a grid`);
  const seed = asked.seed ?? Math.floor(Math.random() * 2 ** 32);
  const base = { ...asked, count: 1, seed };
  const head = element("tr", {}, element("td"), ...across.values.map((v) => element("th", { scope: "col", textContent: v })));
  const table = element("table", {}, element("caption", { textContent: `${down.name || "\u00a0"} \u00d7 ${across.name}` }), head);
  const save = element("button", { type: "button", textContent: "Save as one picture", disabled: true });
  result.replaceChildren(element("h2", { textContent: "Grid" }), element("div", { className: "scroll", tabIndex: 0 }, table), save);
  const images = [];
  let left = cells;
  for (const row of down.values) {
    const line = element("tr", {}, element("th", { scope: "row", textContent: row }));
    table.append(line);
    images.push([]);
    for (const column of across.values) {
      const cell = element("td", {}, element("div", { className: "coming" }));
      line.append(cell);
      const one = { ...base, ...down.of(row, base) };
      const job = await submit({ ...one, ...across.of(column, one) });
      const at = images.at(-1).push(null) - 1;
      const of = images.at(-1);
      whenOver(job, (data) => {
        const [picture] = data.pictures;
        left -= 1;
        if (picture.url) {
          of[at] = element("img", { src: picture.url.replace(/^\//, ""), alt: `${row} ${column}` });
          cell.replaceChildren(of[at]);
        } else cell.replaceChildren(data.error ?? data.state);
        save.disabled = left > 0;
      });
    }
  }
  save.addEventListener("click", () => attempt(() => asOne(images, across, down)));
}

/** The table as one PNG with its labels. */
async function asOne(images, across, down) {
  const drawn = images.flat().filter(Boolean);
  if (!drawn.length) return message("No cell was drawn.");
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
