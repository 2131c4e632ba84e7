"use strict";
// The page of serving/app.py: it uses the same interface as every other client.

const $ = (id) => document.getElementById(id);
const SHOWN = 6; // labels of each text
const EXPLAINED = 32; // texts; the server explains no more at a time
const MOST_CHIPS = 24; // models that are listed; others are found by name
let models = [];
let chosen = new Set();
let running = null;

/** Make an element. Text is never read as HTML. */
function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

/** Call the server. Throws an Error with a message to show. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  $("key-form").hidden = answer.status !== 401;
  if (answer.status === 401) $("key").focus();
  const found = await answer.json().catch(() => null);
  throw new Error(found?.error?.message ?? `The server answered with status ${answer.status}.`);
}

function show(id, message) {
  $(id).textContent = message;
  $(id).hidden = !message;
}

/** Count the seconds of a long wait; returns a function that stops. */
function counting(output, what) {
  const began = performance.now();
  const tick = () => {
    output.textContent = `${what} … ${((performance.now() - began) / 1000).toFixed(0)} s`;
  };
  tick();
  const timer = setInterval(tick, 1000);
  return () => {
    clearInterval(timer);
    return performance.now() - began;
  };
}

function listModels() {
  const wanted = $("filter").value.toLowerCase();
  const found = models.filter((one) => one.id.toLowerCase().includes(wanted));
  const first = found.filter((one) => chosen.has(one.id));
  const rest = found.filter((one) => !chosen.has(one.id));
  $("models").replaceChildren(
    ...[...first, ...rest].slice(0, MOST_CHIPS).map((one) => {
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.value = one.id;
      box.checked = chosen.has(one.id);
      box.addEventListener("change", () => chosen[box.checked ? "add" : "delete"](one.id));
      label.append(box, ` ${one.id}`);
      const unseen = one.scores.test_accuracy_unseen ?? one.scores.test_accuracy;
      label.title = one.method + (unseen ? `, ${(100 * unseen).toFixed(1)} % right in its test` : "");
      return label;
    }),
  );
}

async function loadModels() {
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    $("about").textContent = error.message;
    return;
  }
  $("key-form").hidden = true;
  const count = models.length === 1 ? "1 model" : `${models.length} models`;
  $("about").textContent = `${count}. Choose some, and compare what they say.`;
  chosen = new Set(models.slice(0, 3).map((one) => one.id));
  $("filter-label").hidden = models.length <= MOST_CHIPS;
  listModels();
  $("csv-model").replaceChildren(...models.map((one) => new Option(one.id)));
  showColumns();
}

/** Suggest the columns that the chosen model was trained on. */
function showColumns() {
  const model = models.find((one) => one.id === $("csv-model").value);
  if (model) $("columns").value = model.text_column_names.join(",");
}

function bars(one, labels) {
  const list = make("dl", "", "bars");
  const predicted = one.label.split("|");
  const order = [...one.probs.keys()].sort((a, b) => one.probs[b] - one.probs[a]);
  for (const place of order.slice(0, SHOWN)) {
    const percent = `${(100 * one.probs[place]).toFixed(1)} %`;
    const name = make("dt", labels[place]);
    name.title = labels[place];
    const track = make("dd", "", "track");
    const bar = make("div", "", predicted.includes(labels[place]) ? "bar predicted" : "bar");
    bar.style.width = percent.replace(" ", "");
    track.append(bar);
    list.append(name, track, make("dd", percent, "share"));
  }
  return list;
}

/** Shade each word by how far the confidence falls without it (blue) or rises (orange). */
function shaded(words) {
  const line = make("p", "", "words");
  const most = Math.max(0.05, ...words.map(([, fall]) => Math.abs(fall)));
  for (const [word, fall] of words) {
    const span = make("span", word);
    const strength = ((0.6 * Math.abs(fall)) / most).toFixed(2);
    span.style.background = `rgb(var(--${fall > 0 ? "for" : "against"}) / ${strength})`;
    const points = `${(100 * Math.abs(fall)).toFixed(1)} points`;
    span.title = `without it the confidence ${fall > 0 ? "falls" : "rises"} by ${points}`;
    line.append(span, " ");
  }
  return line;
}

function showResults(texts, answers) {
  const explained = answers.some(({ data }) => data.some((one) => one.words?.length));
  const legend = "Shaded words: without one of them the confidence falls (blue) or rises (orange).";
  $("results").replaceChildren(
    make("p", explained ? legend : "", "hint"),
    ...texts.map((text, number) => {
      const card = make("article");
      const row = make("div", "", "models");
      card.append(make("h2", text), row);
      for (const { model, data } of answers) {
        const one = data[number];
        const block = make("div");
        const name = one.label || "no label";
        block.append(
          make("h3", model.id),
          make("p", `${name}, ${(100 * one.confidence).toFixed(0)} %`, "prediction"),
          bars(one, model.labels),
        );
        if (one.words?.length) block.append(shaded(one.words));
        row.append(block);
      }
      return card;
    }),
  );
}

$("classify").addEventListener("submit", async (event) => {
  event.preventDefault();
  running?.abort();
  const abort = (running = new AbortController());
  const texts = $("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const wanted = models.filter((one) => chosen.has(one.id));
  show("error", "");
  if (!texts.length || !wanted.length) {
    show("error", texts.length ? "Choose a model." : "Type a text.");
    return;
  }
  const stop = counting($("state"), "waiting");
  try {
    const answers = await Promise.all(
      wanted.map(async (model) => {
        const body = { model: model.id, input: texts, explain: texts.length <= EXPLAINED };
        const answer = await call("v1/classify", {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify(body),
          signal: abort.signal,
        });
        return { model, data: (await answer.json()).data };
      }),
    );
    showResults(texts, answers);
    $("state").textContent = `${(stop() / 1000).toFixed(2)} s`;
  } catch (error) {
    stop();
    if (abort.signal.aborted) return; // a later click took over
    $("state").textContent = "";
    show("error", error.message);
  }
});

$("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("classify").requestSubmit();
  }
});

$("csv").addEventListener("submit", async (event) => {
  event.preventDefault();
  show("csv-error", "");
  const [file] = $("file").files;
  const query = new URLSearchParams({
    model: $("csv-model").value,
    text_column_names: $("columns").value,
  });
  const stop = counting($("csv-state"), "waiting");
  try {
    const answer = await call(`v1/predict_csv?${query}`, {
      method: "POST",
      headers: { "content-type": "text/csv" },
      body: file,
    });
    const link = make("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = file.name.replace(/(\.csv)?$/i, "-predictions.csv");
    link.textContent = link.download;
    $("csv-state").replaceChildren(`${(stop() / 1000).toFixed(1)} s: `, link);
    link.click();
  } catch (error) {
    stop();
    $("csv-state").textContent = "";
    show("csv-error", error.message);
  }
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  loadModels();
});
$("csv-model").addEventListener("change", showColumns);
$("filter").addEventListener("input", listModels);
loadModels();
