// The metrics page of Prometheus as numbers: only what the view Live needs of the format.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/** Name -> samples `{ labels, value }`. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\[\\"n]/g, (x) => ESCAPES[x]);
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: numberOf(match[3]) });
  }
  return found;
}

const numberOf = (text) => ({ "+Inf": Infinity, "-Inf": -Infinity })[text] ?? Number(text);

/** The sum of the samples of a name; of those with these labels. */
export function sum(samples, labels = {}) {
  const wanted = Object.entries(labels);
  return (samples ?? []).filter((s) => wanted.every(([k, v]) => s.labels[k] === v)).reduce((all, s) => all + s.value, 0);
}

/** The values of a label. */
export const values = (samples, label) => [...new Set((samples ?? []).map((s) => s.labels[label]))];

/** A quantile of a histogram, over all series with these labels, as Prometheus interpolates it; null without samples. */
export function quantile(metrics, name, q, labels = {}, before = new Map()) {
  const buckets = values(metrics.get(`${name}_bucket`), "le")
    .map((le) => ({ le: numberOf(le), count: sum(metrics.get(`${name}_bucket`), { ...labels, le }) - sum(before.get(`${name}_bucket`), { ...labels, le }) }))
    .sort((a, b) => a.le - b.le);
  const all = buckets.at(-1)?.count ?? 0;
  if (!(all > 0)) return null;
  const at = buckets.findIndex((bucket) => bucket.count >= q * all);
  const [low, below] = at ? [buckets[at - 1].le, buckets[at - 1].count] : [0, 0];
  if (buckets[at].le === Infinity) return low;
  return low + (buckets[at].le - low) * ((q * all - below) / Math.max(buckets[at].count - below, 1e-12));
}
