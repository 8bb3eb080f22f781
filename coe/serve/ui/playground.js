// The view Playground: a conversation with one model, or with several side by side.

import { Answer } from "./answer.js";
import { events, get, request } from "./api.js";
import { $, el } from "./dom.js";
import { announce, empty, errorNote } from "./notes.js";

const MOST_COLUMNS = 6;

/** Set the view up; `reload()` reads the models again. */
export function playground() {
  const turns = []; // { text, answers }
  let models = [];
  let running = null; // the AbortController of the turn that streams

  async function reload() {
    try {
      models = (await get("v1/models")).data.filter((model) => model.coe?.kind !== "embedding");
    } catch (error) {
      if (!turns.length) $("log").replaceChildren(errorNote(error));
      return;
    }
    const before = $("model").value;
    const [policies, experts] = [models.filter((m) => m.coe.kind === "policy"), models.filter((m) => m.coe.kind !== "policy")];
    $("model").replaceChildren(group("Policies", policies), group("Experts", experts));
    if (models.some((model) => model.id === before)) $("model").value = before;
    const ticked = new Set(columns());
    $("choices").replaceChildren(...models.map((model, i) => el("label", { class: "check" },
      el("input", { type: "checkbox", value: model.id, checked: ticked.has(model.id) || (!ticked.size && i < 2) }), ` ${model.id}`)));
    if (!turns.length) {
      $("log").replaceChildren(models.length
        ? empty("Ask something.", "Under each answer stands which expert gave it, and why it was chosen.")
        : empty("No models.", "This key may use none, or no experts are registered."));
    }
  }

  const group = (label, each) => el("optgroup", { label }, each.map((m) => el("option", { value: m.id, title: m.coe.description ?? null }, m.id)));
  const columns = () => [...$("choices").querySelectorAll("input:checked")].map((box) => box.value);

  async function send() {
    if (running) return;
    const text = $("prompt").value;
    if (!text.trim()) return $("prompt").focus();
    const options = readOptions();
    if (options === null) return;
    const asked = $("compare").checked ? columns() : [$("model").value];
    const wrong = $("compare").checked && (asked.length < 2 || asked.length > MOST_COLUMNS);
    $("choices-problem").textContent = wrong ? `Choose 2 to ${MOST_COLUMNS} models, not ${asked.length}.` : "";
    if (wrong) return $("choices").querySelector("input")?.focus();
    const histories = asked.map((model) => [...history(model), { role: "user", content: text }]);
    const turn = { text, answers: asked.map((model) => new Answer(model)) };
    if (!turns.length) $("log").replaceChildren();
    turns.push(turn);
    $("log").append(el("section", { class: "turn" },
      el("p", { class: "question" }, el("span", { class: "hidden" }, "You: "), text),
      el("div", { class: "columns" }, turn.answers.map((answer) => answer.node))));
    $("log").lastChild.scrollIntoView({ block: "nearest" });
    $("prompt").value = "";
    running = new AbortController();
    setRunning(true);
    announce(asked.length > 1 ? `${asked.length} models answer.` : `${asked[0]} answers.`);
    await Promise.all(turn.answers.map((answer, i) => stream(answer, { ...options, messages: histories[i] }, running.signal)));
    running = null;
    setRunning(false);
    const done = turn.answers.filter((answer) => answer.ok);
    announce(done.length ? `Complete: ${done.map((answer) => answer.expert).join(", ")}.` : "No answer.");
    $("log").lastChild.scrollIntoView({ block: "nearest" });
  }

  /** What a model was asked and has answered before. Turns that it has no answer in are left out. */
  function history(model) {
    const messages = turns.flatMap((turn) => {
      const answer = turn.answers.find((each) => each.model === model && each.ok);
      return answer ? [{ role: "user", content: turn.text }, answer.message()] : [];
    });
    const system = $("system").value.trim();
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  async function stream(answer, options, signal) {
    try {
      const response = await request("v1/chat/completions", {
        method: "POST", headers: { "x-coe-debug": "true" }, signal,
        body: { model: answer.model, stream: true, stream_options: { include_usage: true }, ...options },
      });
      answer.begin(response.headers);
      for await (const event of events(response)) answer.add(event);
      answer.end();
    } catch (error) {
      answer.fail(error);
    }
  }

  function setRunning(on) {
    $("send").disabled = on;
    $("stop").disabled = !on;
    if (!on && [$("stop"), document.body].includes(document.activeElement)) $("prompt").focus();
  }

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    running?.abort();
    turns.length = 0;
    $("log").replaceChildren(empty("A new conversation.", "The models see none of the messages before."));
    $("prompt").focus();
  });
  $("compare").addEventListener("change", () => {
    $("several").hidden = !$("compare").checked;
    $("one-model").hidden = $("compare").checked;
  });
  $("ask").querySelector(".options").open = false;
  return { reload };
}

/** The options of the form as fields of a request; null if one is wrong, which is shown beside it. */
function readOptions() {
  const options = {};
  if ($("temperature").value !== "") options.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") options.max_tokens = Number($("max-tokens").value);
  const tools = readJson("tools", (value) => Array.isArray(value) || "give a JSON array of tools");
  const schema = readJson("schema", (value) => (value !== null && typeof value === "object" && !Array.isArray(value)) || "give a JSON object");
  if (tools === null || schema === null) {
    $("ask").querySelector(".options").open = true;
    $(tools === null ? "tools" : "schema").focus();
    return null;
  }
  if (tools !== undefined) options.tools = tools;
  if (schema !== undefined) options.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  return options;
}

/** The JSON of a field: undefined if it is empty, null if it is wrong. */
function readJson(id, check) {
  const text = $(id).value.trim();
  let problem = "";
  let value;
  if (text) {
    try {
      value = JSON.parse(text);
      const checked = check(value);
      if (checked !== true) problem = checked;
    } catch (error) {
      problem = error.message;
    }
  }
  $(id).setAttribute("aria-invalid", String(problem !== ""));
  $(`${id}-problem`).textContent = problem;
  return problem ? null : value;
}
