// The frame of the page: tabs, theme, key, and which view refreshes.

import { get, key, setKey } from "./api.js";
import { $, el } from "./dom.js";
import { decisionsView } from "./decisions.js";
import { liveView } from "./live.js";
import { announce, errorNote } from "./notes.js";
import { playground } from "./playground.js";
import { routerView } from "./router.js";

const TITLES = { playground: "Playground", live: "Live", decisions: "Decisions", router: "Router" };
const THEMES = ["system", "light", "dark"];

/** A view that calls `read` every so many seconds while it is shown, and shows what `draw` makes of it. */
class Refreshed {
  constructor(panel, { read, draw, every_s }) {
    Object.assign(this, { panel, read, draw, every_s, timer: null, abort: null });
  }

  get shown() {
    return !this.panel.hidden && document.visibilityState === "visible";
  }

  start() {
    if (this.shown && this.abort === null && this.timer === null) this.turn();
  }

  stop() {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.timer = this.abort = null;
  }

  async turn() {
    const abort = (this.abort = new AbortController());
    this.timer = null;
    let denied = false; // without another key, the answer stays the same
    try {
      const found = await this.read(abort.signal);
      if (!abort.signal.aborted) this.draw(found);
    } catch (error) {
      denied = error.status === 401 || error.status === 403;
      if (error.name !== "AbortError") this.panel.replaceChildren(heading(this.panel), errorNote(error));
    }
    if (this.abort !== abort) return; // stopped meanwhile
    this.abort = null;
    if (this.shown && !denied) this.timer = setTimeout(() => this.turn(), 1000 * this.every_s);
  }
}

const heading = (panel) => el("h1", {}, TITLES[panel.id]);

const views = {
  live: new Refreshed($("live"), liveView($("live"))),
  decisions: new Refreshed($("decisions"), decisionsView($("decisions"))),
  router: new Refreshed($("router"), routerView($("router"))),
};
const ask = playground();

function show(name, { focus = false } = {}) {
  for (const id of Object.keys(TITLES)) {
    const tab = $(`tab-${id}`);
    const on = id === name;
    $(id).hidden = !on;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
    if (on && focus) tab.focus();
  }
  document.title = `${TITLES[name]} · coe`;
  refresh();
}

function refresh() {
  for (const view of Object.values(views)) view.shown ? view.start() : view.stop();
}

function named(hash) {
  const name = hash.slice(1);
  return name in TITLES ? name : null;
}

function choose(name) {
  history.replaceState(null, "", `#${name}`);
  show(name, { focus: true });
}

function onTabKey(event) {
  const names = Object.keys(TITLES);
  const at = names.findIndex((name) => $(`tab-${name}`) === document.activeElement);
  const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 };
  if (at < 0 || !(event.key in steps)) return;
  event.preventDefault();
  choose(names[(steps[event.key] + names.length) % names.length]);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("coe.theme", theme);
}

function showKeyForm(open, { focus = false } = {}) {
  $("key-form").hidden = !open;
  $("key-toggle").setAttribute("aria-expanded", String(open));
  $("key-toggle").textContent = key() ? "Key: set" : "Key";
  if (open && focus) $("key").focus();
}

function useKey(text) {
  setKey(text);
  $("key").value = "";
  showKeyForm(false);
  announce(text ? "The key is used from now on." : "The key is forgotten.");
  ask.reload();
  for (const view of Object.values(views)) view.stop();
  refresh();
}

for (const name of Object.keys(TITLES)) $(`tab-${name}`).addEventListener("click", () => choose(name));
document.querySelector("[role=tablist]").addEventListener("keydown", onTabKey);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});
document.addEventListener("visibilitychange", refresh);
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => { // charts are as wide as the page
    for (const view of Object.values(views)) view.stop();
    refresh();
  }, 200);
});
addEventListener("hashchange", () => named(location.hash) && show(named(location.hash)));
$("theme").addEventListener("click", () =>
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
$("key-toggle").addEventListener("click", () => showKeyForm($("key-form").hidden, { focus: true }));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
});
$("key-forget").addEventListener("click", () => useKey(""));
document.addEventListener("coe:key", () => $("key-form").hidden && showKeyForm(true, { focus: true }));

const stored = localStorage.getItem("coe.theme");
setTheme(THEMES.includes(stored) ? stored : "system");
showKeyForm(false);
show(named(location.hash) ?? "playground");
ask.reload();
get("health").then(
  (health) => ($("service").textContent = health.experts ? `${health.experts} experts` : health.status),
  () => {}, // the views show why
);
