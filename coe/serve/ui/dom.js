// Elements and texts. Whatever comes from the service becomes a text node or an attribute, never HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes: `on...` are listeners, true and false set or leave out, `null` leaves out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** The element with an id. */
export const $ = (id) => document.getElementById(id);

/** A table with a caption. Columns: `{ head, text, number }`; `text(row)` is a text or a node. */
export function table(caption, columns, rows, { hideCaption = false, rowClass = () => null } = {}) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {},
      el("caption", { class: hideCaption ? "hidden" : null }, caption),
      el("thead", {}, el("tr", {}, columns.map((c) => el("th", { scope: "col", class: c.number ? "number" : null }, c.head)))),
      el("tbody", {}, rows.map((row) => el("tr", { class: rowClass(row) }, columns.map((c, i) =>
        el(i ? "td" : "th", { scope: i ? null : "row", class: c.number ? "number" : null }, c.text(row) ?? "–")))))));
}

/** Figures with their names: `[[name, value, note], ...]`. */
export function figures(entries) {
  return el("dl", { class: "figures" }, entries.map(([name, value, note]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null))));
}

const known = (x) => typeof x === "number" && Number.isFinite(x);

/** A number with so many digits after the point; an en dash if it is not known. */
export const decimal = (x, digits = 2) => (known(x) ? x.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "–");
export const percent = (x, digits = 0) => (known(x) ? `${(100 * x).toFixed(digits)} %` : "–");
export const count = (x) => (known(x) ? x.toLocaleString("en-US", { maximumFractionDigits: 0 }) : "–");

/** USD with two significant digits for small amounts. */
export function usd(x) {
  if (!known(x)) return "–";
  if (x === 0) return "$0";
  const size = Math.abs(x);
  const digits = size >= 1 ? 2 : Math.min(9, 1 - Math.floor(Math.log10(size)));
  return `${x < 0 ? "−" : ""}$${size.toFixed(digits)}`;
}

/** Three significant digits, without an exponent. */
export const significant = (x) => (known(x) ? String(Number(x.toPrecision(3))) : "–");

export function seconds(x) {
  if (!known(x)) return "–";
  if (x < 0.9995) return `${(1000 * x).toFixed(x < 0.00995 ? 1 : 0)} ms`;
  return x < 119.5 ? `${x.toFixed(x < 10 ? 2 : 0)} s` : `${(x / 60).toFixed(0)} min`;
}

export function bytes(x) {
  if (!known(x)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (x >= 1024 && i < units.length - 1) [x, i] = [x / 1024, i + 1];
  return `${x.toFixed(i && x < 100 ? 1 : 0)} ${units[i]}`;
}

export const clock = (epoch_s) =>
  new Date(1000 * epoch_s).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** Replace the children of a view; the focus and sideways scrolling stay where they were. */
export function repaint(panel, ...children) {
  const named = (node) => node?.id ? `#${CSS.escape(node.id)}` : `[aria-label="${CSS.escape(node?.getAttribute("aria-label") ?? "")}"]`;
  const focused = panel.contains(document.activeElement) ? named(document.activeElement) : null;
  const scrolled = [...panel.querySelectorAll(".scroll")].filter((node) => node.scrollLeft).map((node) => [named(node), node.scrollLeft]);
  const open = [...panel.querySelectorAll("details[open][id]")].map((node) => node.id);
  panel.replaceChildren(...children.flat(Infinity).filter(Boolean));
  for (const id of open) if ($(id)) $(id).open = true;
  for (const [place, left] of scrolled) if (panel.querySelector(place)) panel.querySelector(place).scrollLeft = left;
  if (focused) panel.querySelector(focused)?.focus({ preventScroll: true });
}
