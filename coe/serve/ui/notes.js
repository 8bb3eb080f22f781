// What is said to the reader besides data: errors in full, and texts for screen readers.

import { ApiError } from "./api.js";
import { $, el } from "./dom.js";

/** An error in full, with what to do. */
export function errorNote(error) {
  const about = error instanceof ApiError ? [error.status || null, error.code].filter(Boolean).join(" ") : error.name;
  return el("div", { class: "error", role: "alert" },
    el("p", {}, el("strong", {}, "Error"), about ? ` ${about}` : ""),
    el("p", { class: "message" }, error.message),
    error.advice ? el("p", { class: "advice" }, error.advice) : null);
}

/** An empty state: what is missing, and how to get it. */
export function empty(title, text) {
  return el("div", { class: "empty" }, el("p", {}, el("strong", {}, title)), el("p", {}, text));
}

/** Say something to screen readers. */
export function announce(text) {
  $("status").textContent = text;
}
