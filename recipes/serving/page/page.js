"use strict";
// Titles, chains and messages are put on the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const history = []; // {id, title, codes}
let token = null;
let asked = 0; // the newest question; answers to older ones are not shown

function request(path, options = {}) {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  return fetch(path, { ...options, headers });
}

async function json(path, options) {
  const response = await request(path, options);
  if (response.status === 401) {
    $("login").hidden = false;
    $("token").focus();
    throw new Error("a token is needed");
  }
  const body = await response.json();
  if (!response.ok) throw new Error(problem(body));
  return body;
}

function problem(body) {
  return typeof body.detail === "string" ? body.detail : body.detail.map((each) => each.msg).join("; ");
}

function show(error) {
  $("problem").textContent = error ? error.message : "";
}

// What would hide or reorder text is written out; the joiners of emoji and of some scripts stay.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (each) =>
    /[\n\u200c\u200d]/.test(each) ? each : `\\u{${each.codePointAt(0).toString(16)}}`);
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = visible(text);
  if (name) made.className = name;
  return made;
}

// Codes that begin alike look alike: a code's colour is that of the whole prefix up to it.
function codes(row) {
  let hue = 0;
  return row.map((code, level) => {
    hue = (hue * 7 + code * 137.508 + level * 40) % 360;
    const chip = element("span", String(code), "code");
    chip.style.setProperty("--hue", String(Math.round(hue)));
    return chip;
  });
}

function item(found) {
  const row = element("li", "");
  row.append(element("div", found.title || found.id, "title"));
  const facts = element("div", "", "facts");
  facts.append(...codes(found.codes || []), element("span", `id ${found.id}`));
  if ("score" in found) facts.append(element("span", `log-prob ${found.score.toFixed(2)}`));
  row.append(facts);
  return row;
}

function question(mode) {
  const mask = $("mask").indeterminate ? null : $("mask").checked;
  return { history: history.map((each) => each.id), k: Number($("k").value), mode, mask };
}

async function recommend() {
  const mine = ++asked;
  show(null);
  for (const id of ["reason", "thought", "reason-time", "reason-note"]) $(id).replaceChildren();
  if (!history.length) {
    for (const id of ["direct", "direct-time", "direct-note"]) $(id).replaceChildren();
    return;
  }
  const began = performance.now();
  try {
    const body = await json("/v1/recommend", { method: "POST", body: JSON.stringify(question("direct")) });
    if (mine !== asked) return;
    $("direct").replaceChildren(...body.results[0].items.map(item));
    $("direct-time").textContent = `${Math.round(performance.now() - began)} ms`;
  } catch (error) {
    if (mine === asked) show(error);
  }
}

async function think() {
  if (!history.length) return;
  const mine = asked;
  const began = performance.now();
  const late = () => mine !== asked;
  show(null);
  $("reason").replaceChildren();
  $("think").disabled = true;
  try {
    const body = JSON.stringify({ ...question("reasoning"), explain: true, stream: true });
    const response = await request("/v1/recommend", { method: "POST", body });
    if (!response.ok) throw new Error(problem(await response.json()));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done || late()) { reader.cancel(); break; }
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const each of events) {
        const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(each);
        const read = JSON.parse(data);
        if (name === "thought") $("thought").textContent = visible(read.text);
        if (name === "error") throw new Error(read.detail);
        if (name === "result") {
          $("thought").textContent = visible((read.thoughts || []).join("\n\n"));
          $("reason-note").textContent = read.note;
          $("reason").replaceChildren(...read.items.map(item));
          $("reason-time").textContent = `${Math.round(performance.now() - began)} ms`;
        }
      }
    }
  } catch (error) {
    if (!late()) show(error);
  } finally {
    $("think").disabled = false;
  }
}

function redraw() {
  $("history").replaceChildren(...history.map((each, place) => {
    const row = element("li", "");
    const remove = element("button", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `remove ${each.title || each.id}`);
    remove.addEventListener("click", () => { history.splice(place, 1); redraw(); });
    row.append(element("span", each.title || each.id, "title"), remove);
    return row;
  }));
  $("empty").hidden = history.length > 0;
  recommend();
}

// -- search

let results = [];
let chosen = -1;

function choose(place) {
  if (!(place in results)) return;
  history.push(results[place]);
  $("query").value = "";
  list([]);
  redraw();
}

function list(found) {
  results = found;
  chosen = found.length ? 0 : -1;
  $("found").replaceChildren(...found.map((each, place) => {
    const row = element("li", each.title || each.id);
    row.id = `found-${place}`;
    row.setAttribute("role", "option");
    row.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(place); });
    return row;
  }));
  mark();
}

function mark() {
  const open = results.length > 0;
  $("found").hidden = !open;
  $("query").setAttribute("aria-expanded", String(open));
  [...$("found").children].forEach((row, place) => row.setAttribute("aria-selected", String(place === chosen)));
  if (open) {
    $("query").setAttribute("aria-activedescendant", `found-${chosen}`);
    $("found").children[chosen].scrollIntoView({ block: "nearest" });
  } else {
    $("query").removeAttribute("aria-activedescendant");
  }
}

let pause;
$("query").addEventListener("input", () => {
  clearTimeout(pause);
  pause = setTimeout(async () => {
    const words = $("query").value.trim();
    if (!words) return list([]);
    try {
      const body = await json(`/v1/items/search?limit=20&q=${encodeURIComponent(words)}`);
      if ($("query").value.trim() === words) list(body.items);
    } catch (error) {
      show(error);
    }
  }, 120);
});
$("query").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && results.length) {
    chosen = (chosen + step + results.length) % results.length;
    mark();
  } else if (event.key === "Enter") choose(chosen);
  else if (event.key === "Escape") list([]);
  else return;
  event.preventDefault();
});
$("query").addEventListener("blur", () => list([]));

// -- the rest

$("clear").addEventListener("click", () => { history.length = 0; redraw(); });
$("think").addEventListener("click", think);
$("mask").addEventListener("change", recommend);
$("k").addEventListener("change", () => { if ($("k").reportValidity()) recommend(); });
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("login").hidden = true;
  begin();
});

async function begin() {
  try {
    const [model] = (await json("/v1/models")).data;
    const experts = model.experts.length ? `, pooled with ${model.experts.join(", ")}` : "";
    $("about").textContent = `${model.id}: ${model.items.toLocaleString()} items${experts}`;
    $("mask").checked = model.mask_history;
    $("k").max = String(Math.min(100, model.items));
    if (Number($("k").value) > model.items) $("k").value = String(model.items);
    const thinks = model.modes.includes("reasoning");
    $("think").hidden = !thinks;
    $("offered").textContent = thinks ? "" : `Not offered: ${model.reasoning_note}.`;
    show(null);
    recommend();
  } catch (error) {
    $("about").textContent = "";
    show(error);
  }
}

begin();
