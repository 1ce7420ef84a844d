// The form: what is asked, of whom, and how; as text that is gone on with, or as a chat where the model has a template.

import { post } from "./api.js";
import { $, el } from "./dom.js";
import { colourOf } from "./models.js";
import { leavesThinkingOpen } from "./text.js";

const form = $("composer");
const SETTINGS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"];
const FIRST_MESSAGE = "Write a Python function that returns the lines of a file.";
// More are left out of the first choice, so that cards keep a width that can be read.
const MOST_CHOSEN = 4;

let names = [];
let templates = new Set(); // of the variants that have a chat template
let thread = []; // messages of a chat before the one in the form; answers say `by` which variant
let touched = false; // somebody has chosen between text and chat

// ---- variants ----

export function showVariants(models) {
  templates = new Set(models.filter((model) => model.lowkey.chat_template).map((model) => model.id));
  const now = models.map((model) => model.id);
  if (now.join("\n") !== names.join("\n")) {
    names = now;
    const boxes = names.map((name, i) => {
      const box = el("input", { type: "checkbox", name: "variant", value: name, checked: i < MOST_CHOSEN });
      return el("label", { class: `chip ${colourOf(name)}` }, box, el("span", {}, name));
    });
    $("variants").replaceChildren($("variants").firstElementChild, ...boxes);
    $("baseline").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  }
  offerChat();
}

// ---- chat ----

function offerChat() {
  const possible = templates.has($("baseline").value);
  $("mode").hidden = !possible;
  if (!touched || !possible) setChat(possible);
}

export function isChat() {
  return form.elements.mode.value === "chat";
}

function setChat(chat) {
  if (chat === isChat() && !$("prompt-label").hidden) return;
  form.elements.mode.value = chat ? "chat" : "text";
  showMode();
}

function showMode() {
  const chat = isChat();
  form.classList.toggle("chat", chat);
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  for (const node of form.querySelectorAll(".only-chat")) node.hidden = !chat;
  const [mine, other] = chat ? [FIRST_MESSAGE, $("prompt").defaultValue] : [$("prompt").defaultValue, FIRST_MESSAGE];
  if ($("prompt").value === other || !$("prompt").value) $("prompt").value = mine;
  showThread();
}

function showThread() {
  $("thread").hidden = !isChat() || !thread.length;
  const turns = thread.map(({ role, by, content }) => el("li", { class: role }, el("span", { class: "label" }, by ? `${role}: ${by}` : role), content));
  $("turns").replaceChildren(...turns);
}

// The next message goes on from this one and the baseline's answer to it.
export function reply(input, answer) {
  thread = [...input.thread, { role: "user", content: input.prompt }, { role: "assistant", by: input.variants[0], content: answer }];
  $("prompt").value = "";
  showThread();
  $("prompt").focus();
}

// ---- what is asked ----

// All that a run depends on, as it stands in the form. Raises Error in words.
export function readInput() {
  const data = new FormData(form);
  const chosen = data.getAll("variant");
  const baseline = data.get("baseline");
  if (chosen.length < 2) throw new Error("Choose at least two variants to compare.");
  if (!chosen.includes(baseline)) throw new Error(`The baseline, ${baseline}, is not among the chosen variants.`);
  const chat = isChat();
  return {
    chat,
    prompt: data.get("prompt"),
    system: chat ? data.get("system") : "",
    thinking: chat ? data.get("thinking") : "",
    thread: chat ? thread : [],
    variants: [baseline, ...chosen.filter((name) => name !== baseline)],
    ignore_eos: data.has("ignore_eos"),
    // One seed for all runs of an input, so that they give the same text.
    settings: { ...Object.fromEntries(SETTINGS.map((name) => [name, data.get(name)])), seed: data.get("seed") || newSeed() },
  };
}

function newSeed() {
  return String(Math.floor(Math.random() * 2 ** 32));
}

export function wantsTiming() {
  return form.elements.timed.checked;
}

// Puts an input back into the form.
export function putInput(input) {
  touched = true;
  thread = input.thread;
  form.elements.mode.value = input.chat && templates.size ? "chat" : "text";
  showMode();
  $("prompt").value = input.prompt;
  form.elements.system.value = input.system;
  form.elements.thinking.value = input.thinking;
  form.elements.ignore_eos.checked = input.ignore_eos;
  for (const name of SETTINGS) form.elements[name].value = input.settings[name] ?? "";
  const known = input.variants.filter((name) => names.includes(name));
  if (known.length > 1) {
    for (const box of form.querySelectorAll("[name=variant]")) box.checked = known.includes(box.value);
    $("baseline").value = known[0];
  }
  $("more").open ||= ["top_p", "top_k", "min_p", "seed"].some((name) => input.settings[name]) || input.ignore_eos;
}

// The request that an input makes, but for its mode, and whether its prompt ends within the model's thinking. Messages
// become tokens by the baseline's template, since a comparison takes a prompt.
export async function requestOf(input, signal) {
  const [baseline] = input.variants;
  const body = { variants: input.variants, baseline, ignore_eos: input.ignore_eos, prompt: input.prompt };
  for (const name of SETTINGS) if (input.settings[name]) body[name] = Number(input.settings[name]);
  if (!input.chat) return { body, thinks: false };
  const messages = [...input.thread.map(({ role, content }) => ({ role, content })), { role: "user", content: input.prompt }];
  if (input.system) messages.unshift({ role: "system", content: input.system });
  const variables = input.thinking ? { enable_thinking: input.thinking === "on" } : null;
  const asked = { model: baseline, messages, chat_template_kwargs: variables, return_token_strs: true };
  const { tokens, token_strs: texts } = await post("tokenize", asked, signal);
  return { body: { ...body, prompt: tokens }, thinks: leavesThinkingOpen(texts) };
}

// An input's settings in words.
export function settingsOf({ chat, settings, ignore_eos: goesOn }) {
  const words = [`${settings.max_tokens || "default"} tokens`, `temperature ${settings.temperature || "default"}`];
  for (const name of ["top_p", "top_k", "min_p"]) if (settings[name]) words.push(`${name} ${settings[name]}`);
  words.push(`seed ${settings.seed}`);
  if (goesOn) words.push("past the end of text");
  return `${chat ? "chat, " : ""}${words.join(", ")}`;
}

form.addEventListener("change", (event) => {
  if (event.target.name === "mode") {
    touched = true;
    showMode();
  }
  if (event.target.id === "baseline") offerChat();
});
$("new-chat").addEventListener("click", () => {
  thread = [];
  showThread();
  $("prompt").focus();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
