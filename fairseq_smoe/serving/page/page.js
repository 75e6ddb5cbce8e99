"use strict";

const $ = (id) => document.getElementById(id);
const STEPS = 4; // shades
const ALL = "all"; // layers
let languages = [];
let answer = null; // the last one, with passes

async function ask(path, options) {
  const response = await fetch(path, options);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error || `status ${response.status}`);
  return body;
}

function fill(select, entries, wanted) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === wanted)) select.value = wanted;
}

function fillTargets(wanted) {
  const names = new Map(languages.map(({ code, name }) => [code, name]));
  const { targets } = languages.find(({ code }) => code === $("source").value);
  fill($("target"), targets.map((code) => [code, names.get(code) || code]), wanted);
}

async function start() {
  try {
    languages = await ask("languages");
  } catch (error) {
    return say(`The languages could not be loaded: ${error.message}`, true);
  }
  fill($("source"), languages.map(({ code, name }) => [code, name]));
  fillTargets();
  $("source").addEventListener("change", () => fillTargets($("target").value));
  $("swap").addEventListener("click", swap);
  $("form").addEventListener("submit", translate);
  $("layer").addEventListener("change", shade);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
}

function swap() {
  const [from, to] = [$("source").value, $("target").value];
  if (!languages.some(({ code }) => code === to)) return say("Not trained in that direction.", true);
  $("source").value = to;
  fillTargets(from);
  if (answer) $("text").value = answer.translatedText;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function translate(event) {
  event.preventDefault();
  const q = $("text").value;
  if (!q.trim()) return say("Type a text to translate.");
  const [source, target] = [$("source").value, $("target").value];
  say("Translating …");
  $("translate").disabled = true;
  try {
    answer = await ask("translate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ q, source, target, capacity: true }),
    });
    say("");
    $("translation").textContent = answer.translatedText;
    $("translation").lang = target;
    $("result").hidden = false;
    showCapacity(source, target);
  } catch (error) {
    say(`Not translated: ${error.message}`, true);
  } finally {
    $("translate").disabled = false;
  }
}

function showCapacity(source, target) {
  const sentences = answer.capacity || [];
  $("capacity").hidden = sentences.length === 0;
  if (!sentences.length) return;
  const layers = ["encoder", "decoder"].flatMap((side) =>
    sentences[0][side].layers.map((name, i) => [`${side} ${i}`, `${side}, ${name}`]));
  fill($("layer"), [[ALL, "mean of all"], ...layers], $("layer").value);
  $("sentences").replaceChildren(...sentences.flatMap((sentence) => [
    row("Source", "encoder", sentence.encoder, source),
    row("Translation", "decoder", sentence.decoder, target),
  ]));
  for (const side of ["encoder", "decoder"]) {
    const tokens = sentences.flatMap((sentence) => sentence[side].tokens);
    $(`mean-${side}`).textContent = mean(tokens.map((token) => mean(token.passes))).toFixed(2);
    $(`direction-${side}`).textContent = answer.directionCapacity[side].toFixed(2);
  }
  const { sentences: number } = answer.directionCapacity;
  $("direction-name").textContent = `${source}-${target}, ${number} sentence${number === 1 ? "" : "s"} so far`;
  shade();
}

function row(title, side, { tokens }, language) {
  const line = document.createElement("div");
  line.className = "tokens";
  const heading = document.createElement("h3");
  heading.textContent = title;
  line.append(heading, ...tokens.map((token) => button(side, token, language)));
  return line;
}

function button(side, token, language) {
  const element = document.createElement("span");
  const special = token.piece.startsWith("__") || token.piece === "</s>";
  element.className = special ? "token special" : "token";
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  element.lang = special ? "" : language;
  element.textContent = special ? nameOf(token.piece) : token.piece.replaceAll("▁", " ").trim() || "␣";
  element.side = side;
  element.token = token;
  for (const kind of ["mouseenter", "focus", "click"]) element.addEventListener(kind, () => explain(element));
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); explain(element); }
  });
  return element;
}

function nameOf(piece) {
  return piece === "</s>" ? "end" : piece.replaceAll("__", "");
}

function mean(numbers) {
  return numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
}

function passesShown(element) {
  const [side, index] = $("layer").value.split(" ");
  if (side === ALL) return mean(element.token.passes);
  return side === element.side ? element.token.passes[index] : null;
}

function most() {
  return Math.max(2, ...answer.capacity.flatMap((sentence) =>
    ["encoder", "decoder"].flatMap((side) => sentence[side].tokens.flatMap((token) => token.passes))));
}

function shade() {
  const highest = most();
  const step = (passes) => Math.round((passes - 1) / (highest - 1) * (STEPS - 1));
  for (const element of document.querySelectorAll(".token")) {
    const passes = passesShown(element);
    for (let i = 0; i < STEPS; i++) element.classList.toggle(`step${i}`, passes !== null && step(passes) === i);
    const told = passes === null ? "not in this layer" : `${Number(passes.toFixed(2))} passes`;
    element.setAttribute("aria-label", `${element.textContent}: ${told}`);
    element.style.opacity = passes === null ? 0.5 : 1;
  }
  $("legend").replaceChildren(...Array.from({ length: STEPS }, (_, i) => {
    const sample = document.createElement("span");
    sample.className = `sample step${i}`;
    const passes = 1 + i * (highest - 1) / (STEPS - 1);
    sample.textContent = `${Number(passes.toFixed(1))} pass${passes === 1 ? "" : "es"}`;
    return sample;
  }));
}

function explain(element) {
  for (const other of document.querySelectorAll(".token.chosen")) other.classList.remove("chosen");
  element.classList.add("chosen");
  const layers = answer.capacity[0][element.side].layers;
  const lines = element.token.experts.map((passes, i) => {
    const visited = passes.map((experts) => experts.map((expert) => expert + 1).join(" and ")).join(", then ");
    return `${element.side}, ${layers[i]}: expert ${visited}`;
  });
  $("details").replaceChildren(...lines.map((text) => {
    const line = document.createElement("div");
    line.textContent = text;
    return line;
  }));
}

start();
