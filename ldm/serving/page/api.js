// The server's API: JSON in, JSON out; whatever goes wrong is a message for a person.

const CLIENT = "client";

/** What the server, or the way to it, did not do. */
export class Refused extends Error {}

/** Who asks: a browser, not a tab, so that the queue is fair to browsers behind one address. */
function client() {
  let name = localStorage.getItem(CLIENT);
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
    localStorage.setItem(CLIENT, name);
  }
  return name;
}

/** The answer of a route, as JSON; `Refused` with one line where there is none. */
export async function ask(method, path, body) {
  let answer;
  const headers = { "X-Client": client() };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused("The server does not answer. Is it still running?");
  }
  const json = answer.headers.get("content-type")?.includes("json");
  const told = json ? await answer.json().catch(() => null) : null;
  if (!answer.ok) {
    const detail = typeof told?.detail === "string" ? told.detail : `it answered ${answer.status}`;
    throw new Refused(`The server did not do it: ${detail}`);
  }
  return told;
}

/** Shows a message until it is closed; `told` is for what went well. */
export function message(text, kind = "") {
  const line = document.createElement("p");
  const close = document.createElement("button");
  line.className = kind;
  line.append(text);
  close.type = "button";
  close.textContent = "Close";
  close.addEventListener("click", () => line.remove());
  line.append(close);
  const all = document.getElementById("messages");
  while (all.children.length >= 3) all.firstChild.remove();
  all.append(line);
  if (kind) setTimeout(() => line.remove(), 5000);
}

/** `action`, whose errors become messages; null where it failed. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof Refused)) console.error(error);
    message(error.message);
    return null;
  }
}

/** An element: its tag, its properties, what it holds. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A file's bytes in base64. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result.split(",", 2)[1] ?? ""));
    reader.addEventListener("error", () => reject(new Refused(`${file.name} cannot be read`)));
    reader.readAsDataURL(file);
  });
}

/** A path of the server as the page asks for it, which may stand behind a prefix. */
export function relative(path) {
  return path.replace(/^\//, "");
}
