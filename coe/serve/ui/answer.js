// One answer of the playground: its text while it streams, who answered, and why.

import { count, decimal, el, seconds, significant, table, usd } from "./dom.js";
import { errorNote } from "./notes.js";

export class Answer {
  /** @param model the value of `model` that was asked. */
  constructor(model) {
    this.model = model;
    this.text = "";
    this.calls = []; // { id, name, arguments }
    this.reasoning = "";
    this.ok = false;
    this.head = el("p", { class: "who" }, el("strong", {}, model), el("span", { class: "quiet" }, " is asked"));
    this.body = el("div", { class: "text" });
    this.foot = el("div", { class: "foot" });
    this.node = el("article", { class: "answer", "aria-label": `Answer of ${model}`, "aria-busy": "true" }, this.head, this.body, this.foot);
    this.painting = false;
  }

  /** The response has begun: its headers name the expert. */
  begin(headers) {
    this.expert = headers.get("x-coe-expert") ?? this.model;
    const router = headers.get("x-coe-router");
    this.router = router === null || router === "direct" ? null : decodeURIComponent(router);
    this.confidence = this.router === null ? null : Number(headers.get("x-coe-confidence"));
    this.truncated = headers.get("x-coe-truncated") === "true";
    this.warning = headers.get("x-coe-warning");
    this.id = headers.get("x-coe-decision-id");
    this.#showWho();
  }

  /** A chunk of the stream. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    this.text += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? "";
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.calls[piece.index] ??= { id: "", name: "", arguments: "" });
      call.id += piece.id ?? "";
      call.name += piece.function?.name ?? "";
      call.arguments += piece.function?.arguments ?? "";
    }
    this.finish = choice?.finish_reason ?? this.finish;
    this.usage = chunk.usage ?? this.usage;
    this.coe = chunk.coe ?? this.coe;
    if (chunk.model && chunk.model !== this.expert && choice) this.expert = chunk.model;
    if (!this.painting) {
      this.painting = true; // many chunks, one repaint
      requestAnimationFrame(() => this.painting && this.#paint());
    }
  }

  /** The stream is complete. */
  end() {
    this.ok = true;
    this.#paint(true);
    this.#showWho();
    this.#showWhy();
    this.node.setAttribute("aria-busy", "false");
  }

  /** The answer failed, or was stopped. */
  fail(error) {
    this.#paint(true);
    const stopped = error.name === "AbortError";
    if (stopped) this.head.append(el("span", { class: "quiet" }, " · stopped"));
    else this.foot.append(errorNote(error));
    if (!this.expert) this.head.replaceChildren(el("strong", {}, this.model), el("span", { class: "quiet" }, stopped ? " · stopped" : " · no answer"));
    this.node.setAttribute("aria-busy", "false");
  }

  /** The message for the history of the next turn. */
  message() {
    const calls = this.calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
    return { role: "assistant", content: this.text, ...(calls.length ? { tool_calls: calls } : {}) };
  }

  #paint(last = false) {
    this.painting = false;
    const parts = [];
    if (this.reasoning) {
      parts.push(el("details", { class: "reasoning" }, el("summary", {}, "Reasoning"), el("p", {}, this.reasoning)));
    }
    parts.push(...(last ? blocks(this.text) : [this.text]));
    parts.push(...this.calls.map((call) => el("div", { class: "call" },
      el("p", {}, "calls ", el("code", {}, call.name)), el("pre", { tabindex: "0" }, pretty(call.arguments)))));
    if (last && !this.text && !this.calls.length && this.ok) parts.push(el("span", { class: "quiet" }, "(no text)"));
    this.body.replaceChildren(...parts);
  }

  #showWho() {
    const facts = [];
    if (this.router !== null) facts.push(`policy ${this.router}`, `confidence ${decimal(this.confidence)}`);
    const asked = this.model === this.expert ? null : el("span", { class: "quiet" }, ` for ${this.model}`);
    const spent = this.coe?.timing;
    if (spent) facts.push(seconds(spent.total_s));
    if (this.usage) facts.push(`${count(this.usage.completion_tokens)} tokens`);
    if (this.coe && this.coe.cost_usd !== null) facts.push(usd(this.coe.cost_usd));
    if (this.finish === "length") facts.push("cut at max. tokens");
    this.head.replaceChildren(el("strong", {}, this.expert), asked ?? "",
      facts.length ? el("span", { class: "quiet" }, ` · ${facts.join(" · ")}`) : "");
  }

  #showWhy() {
    if (!this.coe) return;
    this.foot.append(el("details", { class: "why" }, el("summary", {}, `Why ${this.expert}`), ...why(this)));
  }
}

/** Why an expert answered: the reason, the candidates, constraints, calls, notes and seconds. */
function why(answer) {
  const coe = answer.coe;
  const parts = [el("p", {}, coe.decision.reason)];
  if (coe.decision.abstained) parts.push(el("p", {}, "The router abstained."));
  parts.push(coe.estimate === null
    ? el("p", { class: "quiet" }, "The request names this expert, so nothing was estimated.")
    : candidates(coe, answer.expert));
  if (coe.utility) parts.push(el("p", { class: "note" }, formula(coe.utility)));
  const notes = [...(coe.notes ?? []), ...(answer.truncated ? ["The router read only the beginning of the message."] : []),
    ...(answer.warning ? [answer.warning] : [])];
  if (notes.length) parts.push(el("h3", {}, "Notes"), el("ul", {}, notes.map((note) => el("li", {}, note))));
  if ((coe.answers ?? []).length > 1) parts.push(calls(coe.answers));
  parts.push(times(coe.timing), el("p", { class: "note" }, "decision ", el("code", {}, answer.id ?? coe.id)));
  return parts;
}

/** The utility in words, without the terms that are off. */
function formula(weights) {
  const terms = { cost_weight: "USD", latency_weight: "seconds of loading", switch_weight: "seconds of reading the conversation again" };
  return ["utility = quality", ...Object.entries(terms).filter(([name]) => weights[name]).map(([name, what]) => `${significant(weights[name])} × ${what}`)].join(" − ");
}

function candidates(coe, expert) {
  const utilities = coe.utility?.experts ?? {};
  const names = Object.keys(coe.estimate).sort((a, b) => (utilities[b] ?? -Infinity) - (utilities[a] ?? -Infinity));
  const verdict = (name) => {
    if (coe.removed[name]) return `ruled out: ${coe.removed[name]}`;
    if (!coe.allowed.includes(name)) return "ruled out by the request";
    if (name === expert) return "answered";
    if (coe.decision.experts.includes(name)) return "chosen";
    return coe.doubtful[name] ? `may be ruled out: ${coe.doubtful[name]}` : "";
  };
  return table("Candidates", [
    { head: "expert", text: (name) => name },
    { head: "quality", number: true, text: (name) => decimal(coe.estimate[name].quality) },
    { head: "cost", number: true, text: (name) => usd(coe.estimate[name].cost_usd) },
    { head: "utility", number: true, text: (name) => decimal(utilities[name]) },
    { head: "", text: verdict },
  ], names, { rowClass: (name) => (name === expert ? "best" : coe.removed[name] ? "out" : null) });
}

function calls(answers) {
  return table("Calls", [
    { head: "call", text: (each) => each.call },
    { head: "expert", text: (each) => each.expert },
    { head: "tokens", number: true, text: (each) => count(each.usage?.completion_tokens) },
    { head: "cost", number: true, text: (each) => usd(each.cost_usd) },
    { head: "", text: (each) => each.error?.message ?? "" },
  ], answers);
}

function times(timing) {
  const names = { gateway_s: "gateway", queue_s: "queue", load_s: "loading", engine_s: "engine", first_s: "first text after" };
  const parts = Object.entries(names).filter(([name]) => timing[name] !== null).map(([name, word]) => `${word} ${seconds(timing[name])}`);
  return el("p", { class: "note" }, parts.join(" · "));
}

/** A text with its fenced blocks as `pre`. */
function blocks(text) {
  const parts = text.split(/^```[^\n`]*\n?/m);
  if (parts.length % 2 === 0) return [text]; // a fence that does not close
  return parts.map((part, i) => (i % 2 ? el("pre", { tabindex: "0" }, part.replace(/\n$/, "")) : part)).filter(Boolean);
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // cut, or still streaming
  }
}
