// The view Live: what is in memory, what waits, and how long it takes.

import { share, sparkline } from "./charts.js";
import { get, request } from "./api.js";
import { bytes, count, decimal, el, figures, repaint, seconds, table } from "./dom.js";
import { empty, errorNote } from "./notes.js";
import { parse, quantile, sum, values } from "./prometheus.js";

const KEPT = 60; // pages, one each 2 s
const WINDOW = 30; // pages that rates and latencies are of: a minute

/** What the frame refreshes: `read` and `draw`. */
export function liveView(panel) {
  const pages = []; // { at_s, metrics }

  async function read(signal) {
    const metrics = request("metrics", { signal }).then((response) => response.text());
    const found = await Promise.allSettled([get("admin/residency", signal), metrics]);
    if (found.every((each) => each.status === "rejected")) throw found[0].reason;
    return found;
  }

  function draw([residency, metrics]) {
    if (metrics.status === "fulfilled") {
      pages.push({ at_s: performance.now() / 1000, metrics: parse(metrics.value) });
      if (pages.length > KEPT) pages.shift();
    }
    repaint(panel,
      el("h1", {}, "Live"),
      metrics.status === "fulfilled" ? traffic(pages) : failed("Requests", metrics.reason),
      residency.status === "fulfilled" ? memory(residency.value.hosts) : failed("Memory", residency.reason),
      metrics.status === "fulfilled" ? latencies(pages) : null);
  }

  return { read, draw, every_s: 2 };
}

const failed = (title, error) => el("section", {}, el("h2", {}, title), errorNote(error));

function traffic(pages) {
  const [now, before] = [pages.at(-1), pages.at(-1 - WINDOW) ?? pages[0]];
  const grown = (labels) => sum(now.metrics.get("coe_requests_total"), labels) - sum(before.metrics.get("coe_requests_total"), labels);
  const elapsed_s = now.at_s - before.at_s;
  const failures = values(now.metrics.get("coe_requests_total"), "status").filter((s) => Number(s) >= 400).reduce((n, status) => n + grown({ status }), 0);
  const inFlight = pages.map((page) => sum(page.metrics.get("coe_in_flight")));
  return el("section", {},
    el("h2", {}, "Requests"),
    figures([
      ["in flight", count(inFlight.at(-1)), "in the gateways"],
      ["on the hosts", count(sum(now.metrics.get("coe_host_requests"))), "at work or waiting"],
      ["per second", elapsed_s > 1 ? decimal(grown({}) / elapsed_s, 1) : "–", `over ${Math.round(elapsed_s)} s`],
      ["refused or failed", count(failures), `over ${Math.round(elapsed_s)} s`],
      ["answered in all", count(sum(now.metrics.get("coe_requests_total"), { status: "200" })), `${count(sum(now.metrics.get("coe_gateways")))} gateway(s)`],
    ]),
    el("div", { class: "spark" }, sparkline({ title: "Requests in flight", values: inFlight }), el("span", { class: "note" }, "in flight, last two minutes")));
}

function memory(hosts) {
  return el("section", {}, el("h2", {}, "Memory"), hosts.length ? hosts.map(host) : empty("No expert host runs.", "`coe serve` starts them; see its output."));
}

function host(state) {
  const name = [state.pool, state.process ?? state.id].filter(Boolean).join(" · ");
  if (state.responds === false) {
    return el("article", { class: "host" }, el("h3", {}, name), el("p", { class: "problem" }, "does not respond"));
  }
  const there = state.weights.filter((each) => each.size_bytes > 0);
  const used = `${bytes(state.used_bytes)} of ${bytes(state.budget_bytes)}`;
  return el("article", { class: "host" },
    el("h3", {}, name, state.busy === undefined ? null : el("span", { class: "quiet" }, ` · ${count(state.busy)} requests at work or waiting`)),
    el("div", { class: "tier" }, el("span", {}, "device"),
      share({
        title: `Device memory of ${name}`, description: used, whole: state.budget_bytes,
        parts: there.map((each) => ({ name: `${each.name}: ${bytes(each.size_bytes)}`, value: each.size_bytes, kind: each.state === "resident" ? "s0" : "s1" })),
      }), el("span", { class: "number" }, used)),
    copies(state.copies, name),
    state.weights.length ? weights(state, name) : el("p", { class: "note" }, "Nothing is in memory: an expert loads at its first request."));
}

function copies(tier, name) {
  if (!tier) return null;
  const used = `${bytes(tier.used_bytes)} of ${bytes(tier.budget_bytes)}`;
  return [
    el("div", { class: "tier" }, el("span", {}, "host"),
      share({ title: `Copies in host memory of ${name}`, description: used, whole: tier.budget_bytes, parts: [{ name: tier.experts.join(", "), value: tier.used_bytes, kind: "s2" }] }),
      el("span", { class: "number" }, used)),
    tier.experts.length ? el("p", { class: "note" }, `copies: ${tier.experts.join(", ")}`) : null,
  ];
}

function weights(state, name) {
  const notes = (each) => [each.pinned ? "pinned" : null, each.priority ? `priority ${each.priority}` : null, each.reason, state.unhealthy?.[each.name]].filter(Boolean).join(", ");
  return table(`Weights on ${name}`, [
    { head: "expert", text: (each) => (each.version === null ? each.name : `${each.name}@${each.version}`) },
    { head: "state", text: (each) => each.state },
    { head: "size", number: true, text: (each) => bytes(each.size_bytes) },
    { head: "requests", number: true, text: (each) => count(each.requests) },
    { head: "idle", number: true, text: (each) => seconds(each.idle_s) },
    { head: "unloads in", number: true, text: (each) => (each.unload_in_s === null ? "never" : seconds(each.unload_in_s)) },
    { head: "", text: notes },
  ], state.weights, { hideCaption: true });
}

function latencies(pages) {
  const [now, first] = [pages.at(-1).metrics, pages.at(-1 - WINDOW) ?? pages[0]];
  const experts = values(now.get("coe_engine_seconds_count"), "expert").filter(Boolean).sort();
  const recent = first.metrics !== now ? first.metrics : undefined;
  const cell = (name, q) => (expert) => {
    const lately = recent && quantile(now, name, q, { expert }, recent);
    return seconds(lately ?? quantile(now, name, q, { expert }));
  };
  const fresh = (expert) => recent && quantile(now, "coe_engine_seconds", 0.5, { expert }, recent) !== null;
  return el("section", {}, el("h2", {}, "Latencies"),
    experts.length
      ? table("By expert: of the last minute, else since the start", [
        { head: "expert", text: (expert) => expert },
        { head: "answers", number: true, text: (expert) => count(sum(now.get("coe_engine_seconds_count"), { expert })) },
        { head: "first text, median", number: true, text: cell("coe_first_token_seconds", 0.5) },
        { head: "95 %", number: true, text: cell("coe_first_token_seconds", 0.95) },
        { head: "queue, 95 %", number: true, text: cell("coe_queue_seconds", 0.95) },
        { head: "load, 95 %", number: true, text: cell("coe_load_seconds", 0.95) },
        { head: "engine, median", number: true, text: cell("coe_engine_seconds", 0.5) },
        { head: "of", text: (expert) => (fresh(expert) ? "last minute" : "since start") },
      ], experts)
      : empty("No answers yet.", "Ask something in the Playground."));
}
