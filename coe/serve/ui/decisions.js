// The view Decisions: which experts were chosen, how surely, and at what cost.

import { get } from "./api.js";
import { bars, dots, legend, widthIn } from "./charts.js";
import { clock, count, decimal, el, figures, percent, repaint, seconds, table, usd } from "./dom.js";
import { empty } from "./notes.js";

const LAST = 500;
const BINS = 30;
const SERIES = 7; // experts with a colour of their own
const LISTED = 40;

/** What the frame refreshes: `read` and `draw`. */
export function decisionsView(panel) {
  const read = (signal) => get(`admin/decisions?last=${LAST}`, signal);

  function draw(found) {
    const all = found.decisions;
    const routed = all.filter((each) => each.policy !== null);
    if (!all.length) {
      repaint(panel, el("h1", {}, "Decisions"), empty("No decisions yet.", "Ask something in the Playground. The gateway keeps the last thousand in memory; the decision log has all of them."));
      return;
    }
    const gateways = found.gateways > 1 ? ` of ${found.gateways} gateways` : "";
    repaint(panel,
      el("h1", {}, "Decisions"),
      el("p", { class: "note" }, `The last ${count(all.length)} requests${gateways}, since ${clock(all.at(-1).time)}.`),
      summary(all, routed),
      cost(routed),
      overTime(all, widthIn(panel)),
      confidences(routed, widthIn(panel)),
      byExpert(all),
      latest(all));
  }

  return { read, draw, every_s: 5 };
}

const total = (rows, of) => rows.reduce((all, row) => all + (of(row) ?? 0), 0);
const mean = (rows, of) => {
  const known = rows.map(of).filter((x) => x !== null && x !== undefined);
  return known.length ? total(known, (x) => x) / known.length : null;
};

function summary(all, routed) {
  const abstained = routed.filter((each) => each.abstained).length;
  const fallbacks = all.filter((each) => each.fallback || (each.expert && each.chosen.length && !each.chosen.includes(each.expert))).length;
  return figures([
    ["routed", count(routed.length), `of ${count(all.length)}; the others name an expert`],
    ["confidence", decimal(mean(routed, (each) => each.confidence)), "mean of routed"],
    ["abstained", count(abstained), percent(routed.length ? abstained / routed.length : null)],
    ["by another", count(fallbacks), "fallback, or not the chosen one"],
    ["errors", count(all.filter((each) => each.error && each.error !== "cancelled").length), `${count(all.filter((each) => each.error === "cancelled").length)} cancelled`],
    ["cost", usd(total(all, (each) => each.cost_usd)), `${count(all.filter((each) => each.cost_usd !== null).length)} answers with a price`],
  ]);
}

/** Cost saved, by the estimates of the decisions, against two experts. */
function cost(routed) {
  const rows = [
    compared(routed, "most_expensive", "the most expensive allowed expert of each decision"),
    compared(routed, "best_single", "the best single expert: the best mean score on the training table of the policy's router"),
  ].filter(Boolean);
  return el("section", {}, el("h2", {}, "Cost saved"),
    rows.length
      ? [
        table("Against", [
          { head: "against", text: (row) => row.what },
          { head: "which is", text: (row) => row.who },
          { head: "decisions", number: true, text: (row) => count(row.n) },
          { head: "cost", number: true, text: (row) => usd(row.cost) },
          { head: "theirs", number: true, text: (row) => usd(row.theirs) },
          { head: "saved", number: true, text: (row) => `${usd(row.theirs - row.cost)} (${percent(row.theirs > 0 ? 1 - row.cost / row.theirs : null)})` },
        ], rows, { hideCaption: true }),
        el("p", { class: "note" }, "All by the router's estimate of each decision: of the experts that were called, and of the one they are compared with."),
      ]
      : empty("Not known.", "The routers of these decisions predict no costs: train them with prices of the experts (`--prices`)."));
}

function compared(routed, baseline, what) {
  const rows = routed.filter((each) => each.estimated && each.estimated.cost_usd !== null && each.estimated[baseline]);
  if (!rows.length) return null;
  const names = tally(rows.map((row) => row.estimated[baseline].expert)).map(([name, n]) => (n === rows.length ? name : `${name} (${percent(n / rows.length)})`));
  return {
    what, who: names.slice(0, 3).join(", ") + (names.length > 3 ? ", …" : ""), n: rows.length,
    cost: total(rows, (row) => row.estimated.cost_usd), theirs: total(rows, (row) => row.estimated[baseline].cost_usd),
  };
}

/** `[name, how often]`, the most frequent first. */
function tally(names) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

const answered = (each) => each.expert ?? "no answer";

function overTime(all, width) {
  const [first, last] = [all.at(-1).time, all[0].time];
  const step = Math.max((last - first) / BINS, 1e-3);
  const ranked = tally(all.map(answered)).map(([name]) => name);
  const names = ranked.length > SERIES + 1 ? [...ranked.slice(0, SERIES), "others"] : ranked;
  const bins = Array.from({ length: BINS }, (_, i) => ({ label: clock(first + i * step), values: names.map(() => 0) }));
  for (const each of all) {
    const at = names.indexOf(answered(each));
    bins[Math.min(BINS - 1, Math.floor((each.time - first) / step))].values[at < 0 ? names.length - 1 : at] += 1;
  }
  return el("section", {}, el("h2", {}, "Over time"), legend(names),
    bars({ title: "Answers over time by expert", description: `From ${clock(first)} to ${clock(last)}. The table By expert has the numbers.`, bins, ends: [clock(first), clock(last)], width }));
}

function confidences(routed, width) {
  const rows = routed.filter((each) => each.confidence !== null);
  if (!rows.length) return null;
  const [first, last] = [rows.at(-1).time, rows[0].time];
  const points = rows.map((each) => ({
    x: last > first ? (each.time - first) / (last - first) : 0.5, y: each.confidence, kind: each.abstained ? "hollow" : "dot",
    title: `${clock(each.time)} ${answered(each)}: ${decimal(each.confidence)}${each.abstained ? ", abstained" : ""}`,
  }));
  return el("section", {}, el("h2", {}, "Confidence"),
    el("p", { class: "note" }, "Each dot is a decision; a ring is one in which the router abstained."),
    dots({ title: "Confidence of each decision", description: `Mean ${decimal(mean(rows, (each) => each.confidence))}. The table Latest has the numbers.`, points, ends: [clock(first), clock(last)], width }));
}

function byExpert(all) {
  const rows = tally(all.map(answered)).map(([name, n]) => ({ name, n, of: all.filter((each) => answered(each) === name) }));
  return el("section", {}, el("h2", {}, "By expert"), table("By expert", [
    { head: "expert", text: (row) => row.name },
    { head: "requests", number: true, text: (row) => count(row.n) },
    { head: "share", number: true, text: (row) => percent(row.n / all.length) },
    { head: "confidence", number: true, text: (row) => decimal(mean(row.of.filter((each) => each.policy !== null), (each) => each.confidence)) },
    { head: "abstained", number: true, text: (row) => count(row.of.filter((each) => each.abstained).length) },
    { head: "cost", number: true, text: (row) => usd(row.of.some((each) => each.cost_usd !== null) ? total(row.of, (each) => each.cost_usd) : null) },
    { head: "mean time", number: true, text: (row) => seconds(mean(row.of, (each) => each.total_s)) },
  ], rows, { hideCaption: true }));
}

function latest(all) {
  return el("section", {}, el("h2", {}, "Latest"), table("Latest", [
    { head: "time", text: (each) => clock(each.time) },
    { head: "policy", text: (each) => each.policy ?? "named" },
    { head: "expert", text: answered },
    { head: "label", text: (each) => each.label ?? "" },
    { head: "confidence", number: true, text: (each) => decimal(each.policy === null ? null : each.confidence) },
    { head: "cost", number: true, text: (each) => usd(each.cost_usd) },
    { head: "time", number: true, text: (each) => seconds(each.total_s) },
    { head: "", text: (each) => [each.error, each.abstained ? "abstained" : null, each.calls > 1 ? `${each.calls} calls` : null].filter(Boolean).join(", ") },
  ], all.slice(0, LISTED), { hideCaption: true, rowClass: (each) => (each.error ? "bad" : null) }));
}
