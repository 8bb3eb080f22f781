// The view Router: the cost-quality curve of a policy's router, and the point at which the policy works.

import { get } from "./api.js";
import { costQuality, widthIn } from "./charts.js";
import { count, el, figures, percent, repaint, significant, table, usd } from "./dom.js";
import { empty } from "./notes.js";

/** What the frame refreshes: `read` and `draw`. */
export function routerView(panel) {
  let shown = null; // name of the policy
  let latest = null;
  const read = (signal) => get("admin/routers", signal);

  function draw(found) {
    latest = found;
    const policies = found.policies;
    const policy = policies.find((each) => each.policy === shown) ?? policies.find((each) => each.policy === found.default_policy) ?? policies[0];
    if (!policy) {
      repaint(panel, el("h1", {}, "Router"), empty("No policies.", "The configuration has none: requests must name an expert."));
      return;
    }
    const select = el("select", { id: "policy", onchange: () => {
      shown = select.value;
      draw(latest);
    } }, policies.map((each) => el("option", { value: each.policy, selected: each === policy }, each.policy)));
    repaint(panel,
      el("h1", {}, "Router"),
      el("div", { class: "field inline" }, el("label", { for: "policy" }, "Policy"), select),
      facts(policy),
      el("section", {}, el("h2", {}, "Cost against quality"), policy.curve ? curve(policy, widthIn(panel)) : empty("No curve.", policy.curve_problem)),
      policy.router ? scores(policy) : null);
  }

  return { read, draw, every_s: 15 };
}

function facts(policy) {
  const router = policy.router;
  return figures([
    ["router", router ? router.kind : policy.expert ? "none" : "not saved", router ? `trained ${router.created.slice(0, 10)} on ${count(router.n_queries)} queries` : policy.expert ? `always ${policy.expert}` : null],
    ["cost weight", significant(policy.cost_weight), "quality given up per USD"],
    ["latency weight", significant(policy.latency_weight), "per second of loading"],
    ["selects", policy.select.kind, policy.select.k ? `at most ${policy.select.k}` : null],
    ["composition", policy.composition, policy.fallback ? `fallback ${policy.fallback}` : "no fallback"],
    ...(policy.best_single ? [["best single", policy.best_single, "on the training table"]] : []),
  ]);
}

/** The last point whose cost weight is not above that of the policy: decisions change only from point to point. */
function workingPoint(policy) {
  const below = policy.curve.points.filter((point) => point.cost_weight <= policy.cost_weight);
  return below.at(-1) ?? policy.curve.points[0];
}

function curve(policy, width) {
  const { points, experts, rows, table: name, measured, created } = policy.curve;
  const at = workingPoint(policy);
  const best = experts.find((each) => each.name === policy.best_single);
  const perMille = (x) => 1000 * x;
  const shownAt = { x: perMille(at.mean_cost), y: at.accuracy, name: `works here: ${percent(at.accuracy, 1)} at ${usd(perMille(at.mean_cost))}` };
  const line = points.map((p) => ({ x: perMille(p.mean_cost), y: p.accuracy, low: p.low, high: p.high })).sort((a, b) => a.x - b.x);
  const title = `Accuracy against cost of the router of ${policy.policy}`;
  const compared = best
    ? `The best single expert ${best.name} has ${percent(best.accuracy, 1)} at ${usd(perMille(best.mean_cost))}.` : "";
  const description = `At its cost weight ${significant(policy.cost_weight)} the policy has about ${percent(at.accuracy, 1)} at ${usd(perMille(at.mean_cost))} per 1,000 queries. ${compared}`;
  return [
    el("p", {}, description),
    costQuality({ title, description, points: line, singles: experts.map((e) => ({ x: perMille(e.mean_cost), y: e.accuracy, name: e.name })), at: shownAt, width, format: usd }),
    el("p", { class: "note" }, `Line: the router at every cost weight, with its 95 % interval; crosses: single experts. Measured ${measured} on ${count(rows)} queries (${name}), ${created.slice(0, 10)}. One expert answers each query; other costs of the policy (loading, switches, a composition) are not in it.`),
    el("details", { id: "points" }, el("summary", {}, "The curve as a table"), table("Points of the curve", [
      { head: "cost weight", number: true, text: (p) => significant(p.cost_weight) },
      { head: "USD per 1,000", number: true, text: (p) => usd(perMille(p.mean_cost)) },
      { head: "accuracy", number: true, text: (p) => percent(p.accuracy, 1) },
      { head: "95 % interval", number: true, text: (p) => `${percent(p.low, 1)} to ${percent(p.high, 1)}` },
      { head: "", text: (p) => (p === at ? "works here" : "") },
    ], points, { hideCaption: true, rowClass: (p) => (p === at ? "best" : null) })),
  ];
}

function scores(policy) {
  const single = new Map((policy.curve?.experts ?? []).map((each) => [each.name, each]));
  return el("section", {}, el("h2", {}, "Experts"), table("Experts of the router", [
    { head: "expert", text: (each) => each.name },
    { head: "training score", number: true, text: (each) => percent(each.mean_score, 1) },
    { head: "accuracy, curve's table", number: true, text: (each) => percent(single.get(each.name)?.accuracy, 1) },
    { head: "USD per 1,000", number: true, text: (each) => usd(single.has(each.name) ? 1000 * single.get(each.name).mean_cost : null) },
    { head: "", text: (each) => (each.name === policy.best_single ? "best single" : "") },
  ], policy.router.experts, { hideCaption: true, rowClass: (each) => (each.name === policy.best_single ? "best" : null) }));
}
