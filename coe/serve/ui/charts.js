// Small charts as inline SVG. Each has a title and a description; its data also stands in a table beside it.

import { el, svg } from "./dom.js";

const MARGIN = { left: 44, right: 12, top: 10, bottom: 26 };
let number = 0;

/** The width in pixels that a chart in a panel gets. */
export const widthIn = (panel) => Math.max(280, Math.min(1280, panel.clientWidth || 640));

function frame(width, height, title, description) {
  const id = `chart-${(number += 1)}`;
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-labelledby": `${id}-t ${id}-d` },
    svg("title", { id: `${id}-t` }, title), svg("desc", { id: `${id}-d` }, description));
}

/** About n round numbers from low to high. */
export function ticks(low, high, n) {
  if (!(high > low)) return [low];
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-6; x += step) found.push(Math.abs(x) < step * 1e-6 ? 0 : x);
  return found;
}

function yAxis(chart, width, y, at, format) {
  for (const value of at) {
    chart.append(
      svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
}

function xLabels(chart, height, labels) {
  for (const [x, text, anchor = "middle"] of labels) {
    chart.append(svg("text", { class: "tick", x, y: height - 8, "text-anchor": anchor }, text));
  }
}

/** Stacked bars. bins: `{ label, values }`, one value for each series. */
export function bars({ title, description, bins, ends, width, height = 150 }) {
  const chart = frame(width, height, title, description);
  const most = Math.max(1, ...bins.map((bin) => bin.values.reduce((a, b) => a + b, 0)));
  const y = (value) => height - MARGIN.bottom - (value / most) * (height - MARGIN.top - MARGIN.bottom);
  const step = (width - MARGIN.left - MARGIN.right) / bins.length;
  yAxis(chart, width, y, ticks(0, most, 3).filter(Number.isInteger), String);
  bins.forEach((bin, i) => {
    let below = 0;
    bin.values.forEach((value, j) => {
      if (!value) return;
      chart.append(svg("rect", {
        class: `s${j}`, x: MARGIN.left + i * step + 1, width: Math.max(1, step - 2), y: y(below + value), height: y(below) - y(below + value),
      }, svg("title", {}, `${bin.label}: ${value}`)));
      below += value;
    });
  });
  xLabels(chart, height, [[MARGIN.left, ends[0], "start"], [width - MARGIN.right, ends[1], "end"]]);
  return chart;
}

/** Dots between 0 and 1. points: `{ x, y, kind, title }`, x in [0, 1]. */
export function dots({ title, description, points, ends, width, height = 130 }) {
  const chart = frame(width, height, title, description);
  const y = (value) => height - MARGIN.bottom - value * (height - MARGIN.top - MARGIN.bottom);
  yAxis(chart, width, y, [0, 0.5, 1], (value) => value.toFixed(1));
  for (const point of points) {
    const x = MARGIN.left + 3 + point.x * (width - MARGIN.left - MARGIN.right - 6);
    chart.append(svg("circle", { class: point.kind, cx: x, cy: y(point.y), r: 3 }, svg("title", {}, point.title)));
  }
  xLabels(chart, height, [[MARGIN.left, ends[0], "start"], [width - MARGIN.right, ends[1], "end"]]);
  return chart;
}

/** A line without axes. values: the newest last. */
export function sparkline({ title, values, width = 240, height = 32 }) {
  const most = Math.max(1, ...values);
  const chart = frame(width, height, title, `From ${values[0] ?? 0} to ${values.at(-1) ?? 0}, at most ${Math.max(0, ...values)}.`);
  const x = (i) => (values.length < 2 ? width : (i / (values.length - 1)) * width);
  const y = (value) => height - 2 - (value / most) * (height - 4);
  chart.append(svg("polyline", { class: "line", points: values.map((value, i) => `${x(i)},${y(value)}`).join(" ") }));
  return chart;
}

/** Shares of a whole as one bar. parts: `{ name, value, kind }`. */
export function share({ title, description, parts, whole }) {
  const chart = frame(100, 4, title, description);
  chart.setAttribute("class", "share");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.append(svg("rect", { class: "rest", x: 0, y: 0, width: 100, height: 4 }));
  let from = 0;
  for (const part of parts) {
    const size = whole > 0 ? (100 * part.value) / whole : 0;
    chart.append(svg("rect", { class: part.kind, x: from, y: 0, width: Math.max(0, size - 0.25), height: 4 }, svg("title", {}, part.name)));
    from += size;
  }
  return chart;
}

/** Cost against quality. points: `{ x, y, low, high }` by x; singles: `{ x, y, name }`; at: the working point. */
export function costQuality({ title, description, points, singles, at, width, format, height = Math.min(420, Math.max(260, width * 0.5)) }) {
  const chart = frame(width, height, title, description);
  const [left, right] = [Math.min(...points.map((p) => p.x), ...singles.map((p) => p.x)), Math.max(...points.map((p) => p.x), ...singles.map((p) => p.x))];
  const heights = [...points.flatMap((p) => [p.low, p.high]), ...singles.map((p) => p.y)];
  const [bottom, top] = [Math.max(0, Math.min(...heights) - 0.03), Math.min(1, Math.max(...heights) + 0.03)];
  const pad = right > left ? 0.04 * (right - left) : 1;
  const span = width - MARGIN.left - MARGIN.right;
  const x = (value) => MARGIN.left + ((value - left + pad) / (right - left + 2 * pad)) * span;
  const y = (value) => height - MARGIN.bottom - 16 - ((value - bottom) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom - 16);
  yAxis(chart, width, y, ticks(bottom, top, 5), (value) => `${Math.round(100 * value)} %`);
  for (const value of ticks(left, right, Math.max(2, Math.floor(width / 120)))) {
    chart.append(svg("text", { class: "tick", x: x(value), y: height - 26, "text-anchor": "middle" }, format(value)));
  }
  xLabels(chart, height, [[MARGIN.left + span / 2, "USD per 1,000 queries"]]);
  const band = [...points.map((p) => `${x(p.x)},${y(p.high)}`), ...points.toReversed().map((p) => `${x(p.x)},${y(p.low)}`)];
  chart.append(svg("polygon", { class: "band", points: band.join(" ") }));
  chart.append(svg("polyline", { class: "line", points: points.map((p) => `${x(p.x)},${y(p.y)}`).join(" ") }));
  for (const single of singles) {
    chart.append(svg("path", { class: "cross", d: `M${x(single.x) - 3},${y(single.y) - 3}l6,6m0,-6l-6,6` }, svg("title", {}, single.name)));
  }
  const taken = [];
  for (const single of singles) label(chart, x(single.x), y(single.y), single.name, width, taken);
  if (at) {
    chart.append(svg("circle", { class: "at", cx: x(at.x), cy: y(at.y), r: 6 }, svg("title", {}, at.name)));
    label(chart, x(at.x), y(at.y) - 18, at.name, width, taken, "strong");
  }
  return chart;
}

/** A text beside a point, unless another one is there. */
function label(chart, x, y, text, width, taken, kind = "name") {
  const shown = kind === "name" && text.length > 24 ? `${text.slice(0, 23)}…` : text;
  const size = 6.6 * shown.length;
  const toLeft = x + size + 10 > width;
  const box = { from: toLeft ? x - size - 8 : x + 8, to: toLeft ? x - 8 : x + 8 + size, y };
  if (kind === "name" && taken.some((other) => Math.abs(other.y - y) < 13 && other.from < box.to && box.from < other.to)) return;
  taken.push(box);
  chart.append(svg("text", { class: kind, x: toLeft ? x - 8 : x + 8, y: y + 4, "text-anchor": toLeft ? "end" : "start" }, shown));
}

/** The names of the series with their colours. */
export function legend(names) {
  return el("ul", { class: "legend" }, names.map((name, i) => el("li", {},
    svg("svg", { viewBox: "0 0 10 10", width: 10, height: 10, "aria-hidden": "true" }, svg("rect", { class: `s${i}`, width: 10, height: 10 })), ` ${name}`)));
}
