const at = (id) => document.getElementById(id);
const KEPT_TURNS = 500;
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const SETTINGS = ["system", "tokens", ...NUMBERS];
// model: the name that requests give. cards: the server's models. turns: the conversation, {role, content} and for an
// answer also {thought, note, stats}; a thought, with which some models begin, is shown and not sent back. used: tokens of the context that the last answer and its prompt took. running: the
// AbortController of the answer that is being written. edited: the place of the question that is being edited.
let model = "", cards = [], turns = [], used = 0, running = null, edited = null, language = "en";

// ---- words ----

function say(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

const count = (n) => n.toLocaleString(language);

function speak(next) {
  language = next;
  document.documentElement.lang = next === "zh" ? "zh-CN" : "en";
  at("language").value = next;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  for (const element of document.querySelectorAll("[data-placeholder]"))
    element.placeholder = say(element.dataset.placeholder);
  for (const element of document.querySelectorAll("[data-label]"))
    element.setAttribute("aria-label", say(element.dataset.label));
  showModel();
  showLeft();
  showSettings();
  if (!running) render();
}

// ---- storage: the conversation, the settings and the language outlive a reload; the API key does not ----

function recall(key) {
  try { return JSON.parse(localStorage.getItem("tele." + key)); } catch { return null; }
}

function keep(key, value) {
  try { localStorage.setItem("tele." + key, JSON.stringify(value)); return true; } catch { return false; }
}

function keepTalk() {
  if (!keep("talk", {turns: turns.slice(-KEPT_TURNS), used, model})) show("note", say("unkept"));
}

function restore() {
  const found = recall("talk");
  const known = (turn) => turn && ["user", "assistant"].includes(turn.role) && typeof turn.content === "string";
  if (found && Array.isArray(found.turns)) turns = found.turns.filter(known);
  used = found && Number.isFinite(found.used) ? found.used : 0;
  model = found && typeof found.model === "string" ? found.model : "";
  const set = recall("settings") || {};
  for (const name of SETTINGS) if (typeof set[name] === "string") at(name).value = set[name];
}

function keepSettings() {
  keep("settings", Object.fromEntries(SETTINGS.map((name) => [name, at(name).value])));
  showSettings();
}

// ---- what is shown ----

function nearEnd() { return at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 80; }
function follow() { at("talk").scrollTop = at("talk").scrollHeight; }

function append(element) {
  const hint = document.querySelector(".hint");
  if (hint) hint.remove();
  const down = nearEnd();
  at("talk").append(element);
  if (down) follow();
}

function show(kind, text) {
  const box = document.createElement("div");
  box.className = kind === "note" ? kind : "turn " + kind;
  if (kind === "error") box.setAttribute("role", "alert");
  box.textContent = text;
  append(box);
  return box;
}

function button(word, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = say(word);
  made.className = word;
  made.addEventListener("click", () => act(made));
  return made;
}

// A turn with its buttons; an answer that is not complete has none.
function message(turn, place, complete = true) {
  const whole = document.createElement("div"), box = document.createElement("div");
  const mine = turn.role === "user";
  whole.className = mine ? "message mine" : "message";
  whole.setAttribute("role", "group");
  whole.setAttribute("aria-label", say(mine ? "you" : "assistant"));
  box.className = "turn " + turn.role;
  box.textContent = turn.content;
  if (turn.thought) whole.append(thoughtBox(turn.thought, !turn.content));
  whole.append(box);
  if (complete) whole.append(actions(turn, place));
  append(whole);
  if (turn.note) show("note", say(turn.note));
  return whole;
}

// What the model reasoned before it answered, folded away once the answer begins.
function thoughtBox(text, open) {
  const whole = document.createElement("details"), head = document.createElement("summary");
  const box = document.createElement("div");
  whole.className = "thought";
  whole.open = open;
  head.textContent = say("thought");
  box.textContent = text;
  whole.append(head, box);
  return whole;
}

function actions(turn, place) {
  const row = document.createElement("div");
  row.className = "actions";
  if (turn.stats) {
    const stats = document.createElement("span");
    stats.className = "stats";
    stats.textContent = say("speed", {n: count(turn.stats.tokens), r: count(turn.stats.rate)});
    row.append(stats);
  }
  row.append(button("copy", (it) => copy(turn.content, it)));
  if (turn.role === "user") row.append(button("edit", () => edit(place)));
  else if (place === turns.length - 1) row.append(button("regenerate", regenerate));
  return row;
}

function render() {
  at("talk").replaceChildren();
  turns.forEach((turn, place) => message(turn, place));
  if (!turns.length) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = say("hint");
    at("talk").append(hint);
  }
  follow();
}

function card() { return cards.find((found) => found.id === model); }

function showModel() {
  const found = card();
  at("model").textContent = model || "tele serve";
  document.title = model || "tele serve";
  if (!found) return;
  const context = document.createElement("small");
  context.textContent = say("context", {n: count(found.max_model_len)});
  at("model").append(context);
  for (const name of NUMBERS.slice(0, 4)) at(name).placeholder = found.default_sampling[name];
}

function showLeft() {
  const found = card();
  const left = found ? Math.max(0, found.max_model_len - used) : 0;
  at("left").textContent = found && used ? say("left", {n: count(left), all: count(found.max_model_len)}) : "";
  // The next question needs room, and its answer too.
  at("full").hidden = !(found && used && left < Math.max(8, found.max_model_len / 64));
}

// Settings that outlived a reload shall not act unseen.
function showSettings() {
  const n = SETTINGS.filter((name) => at(name).value.trim()).length;
  at("set").textContent = n ? say("settingsSet", {n}) : say("settings");
}

function busy(now) {
  at("talk").setAttribute("aria-busy", now);
  at("send").hidden = now;
  at("stop").hidden = !now;
  at("send").disabled = now;
}

function fit() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + 2 + "px";
}

async function copy(text, it) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no clipboard without a secure context, or not permitted
    const box = document.createElement("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    it.focus();
  }
  it.textContent = at("news").textContent = say("copied");
  setTimeout(() => { it.textContent = say("copy"); }, 1500);
}

// ---- the server ----

function headers() {
  const key = at("key").value.trim();
  return {"Content-Type": "application/json", ...(key ? {"Authorization": "Bearer " + key} : {})};
}

// The error of a response: the server's own message if it has one.
async function refusal(response) {
  let text = say("status", {n: response.status}), code = null;
  try { ({message: text, code} = (await response.json()).error); } catch { /* it is not the server's */ }
  return Object.assign(new Error(text), {code});
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, {headers: headers(), ...options});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(say("unreachable"));
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function findModels() {
  cards = (await (await ask("v1/models")).json()).data;
  if (!card()) model = cards[0].id;
  at("which").replaceChildren(...cards.map((found) => new Option(found.id, found.id, false, found.id === model)));
  at("choice").hidden = cards.length < 2;
  showModel();
  showLeft();
}

function greet() { findModels().catch((error) => show("error", error.message)); }

function body() {
  const system = at("system").value;
  const said = turns.map(({role, content}) => ({role, content}));
  const messages = [...(system.trim() ? [{role: "system", content: system}] : []), ...said];
  const asked = {model, stream: true, stream_options: {include_usage: true}, messages};
  for (const name of NUMBERS) if (at(name).value !== "") asked[name] = Number(at(name).value);
  if (at("tokens").value !== "") asked.max_tokens = Number(at("tokens").value);
  return JSON.stringify(asked);
}

// The parsed data of a stream's events, in order.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error(say("broke"));
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Add to what stands above an answer's box.
function think(turn, box, text) {
  if (!turn.thought) box.before(thoughtBox("", true));
  turn.thought = (turn.thought || "") + text;
  box.previousSibling.lastChild.append(text);
}

// The answer to the last question. Its text so far is in turn.content, also when it fails.
async function stream(turn, box, signal) {
  let first = 0, pieces = 0, reason = null, usage = null;
  if (!card()) await findModels();
  for await (const event of events(await ask("v1/chat/completions", {method: "POST", body: body(), signal}))) {
    if (event.error) throw Object.assign(new Error(event.error.message), {code: event.error.code});
    usage = event.usage || usage;
    const choice = event.choices[0];
    if (!choice) continue;
    reason = choice.finish_reason || reason;
    const {content, reasoning_content: thought} = choice.delta;
    if (!content && !thought) continue;
    first = first || performance.now();
    pieces += 1;
    const down = nearEnd();
    if (thought) think(turn, box, thought);
    if (content && !turn.content && turn.thought) box.previousSibling.open = false;
    turn.content += content || "";
    if (content) box.append(content);
    if (down) follow();
  }
  if (usage) {
    used = usage.total_tokens;
    // The first token's time is the prompt's: the rate is that of the tokens after it.
    const tokens = usage.completion_tokens, rate = (tokens - 1) * 1000 / (performance.now() - first);
    if (pieces > 1) turn.stats = {tokens, rate: Number(rate.toPrecision(3))};
  }
  if (reason === "length") turn.note = "limit";
}

// Have the last turn, a question, answered; before: the conversation to return to if no answer begins.
async function answer(before) {
  const stopper = running = new AbortController();
  const turn = {role: "assistant", content: ""};
  render();
  const box = message(turn, turns.length, false).lastChild;
  box.classList.add("running");
  follow();
  busy(true);
  let failed = null;
  try {
    await stream(turn, box, stopper.signal);
  } catch (error) {
    if (running === stopper && !stopper.signal.aborted) failed = error;
  }
  if (running !== stopper) return;  // a new chat has begun
  running = null;
  if (stopper.signal.aborted) turn.note = "stopped";
  if (turn.content || turn.thought) {
    turns.push(turn);
  } else if (failed || stopper.signal.aborted) {
    // No answer has begun: the question does not join the conversation and can be sent again.
    const question = turns.pop().content;
    // A question that was to be answered anew stands in the conversation as before.
    const known = before.length > turns.length && before[turns.length].content === question;
    turns = before;
    if (!known && !at("question").value) at("question").value = question;
  } else {
    turns.pop();
  }
  keepTalk();
  render();
  if (failed) show("error", failed.message);
  else if (!turn.content && !turn.thought) show("note", say(turn.note || "empty"));
  else at("news").textContent = say("done");
  showLeft();
  if (failed && failed.code === "context_length_exceeded") at("full").hidden = false;
  busy(false);
  fit();
  at("question").focus();
}

// ---- what a user does ----

function send(question) {
  const before = turns;
  turns = [...(edited === null ? turns : turns.slice(0, edited)), {role: "user", content: question}];
  endEdit();
  answer(before);
}

function regenerate() {
  if (running) return;
  const before = turns;
  turns = turns.slice(0, -1);
  answer(before);
}

function edit(place) {
  if (running) return;
  edited = place;
  at("editing").hidden = false;
  at("question").value = turns[place].content;
  fit();
  at("question").focus();
}

function endEdit() {
  edited = null;
  at("editing").hidden = true;
}

function fresh() {
  const before = running;
  running = null;
  if (before) before.abort();
  turns = [];
  used = 0;
  endEdit();
  keepTalk();
  render();
  showLeft();
  busy(false);
  at("question").focus();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value;
  if (running || !question.trim()) return;
  at("question").value = "";
  fit();
  send(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) running.abort();
  else if (edited !== null) at("cancel").click();
});
at("question").addEventListener("input", fit);
at("settings").addEventListener("input", keepSettings);
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => { if (running) running.abort(); });
at("cancel").addEventListener("click", () => { endEdit(); at("question").value = ""; fit(); at("question").focus(); });
at("new").addEventListener("click", fresh);
at("fresh").addEventListener("click", fresh);
at("key").addEventListener("change", () => { if (!card()) greet(); });
at("which").addEventListener("change", () => { model = at("which").value; showModel(); showLeft(); keepTalk(); });
at("language").addEventListener("change", () => { speak(at("language").value); keep("language", language); });
restore();
const chosen = recall("language"), ofBrowser = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
speak(chosen === "en" || chosen === "zh" ? chosen : ofBrowser);
busy(false);
at("question").focus();
greet();
