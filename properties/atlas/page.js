"use strict";
// Draw the pictures, in the colours of the page and in as many columns as fit; filter the tables; copy commands.
const atlas = JSON.parse(document.getElementById("pictures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

const SPACING = 14, NARROWEST = 8, WIDEST = 24;

// Return as many columns as fit, and the cells of small maps so large that they fill them; at least two columns.
function fit(picture, room) {
  if (!picture.column) return { columns: 0 };
  const most = picture.spec.columns;
  if (!picture.cells) return { columns: Math.max(1, Math.min(most, Math.floor(room / picture.column))) };
  const wide = room - picture.margin + SPACING;
  const columns = Math.max(2, Math.min(most, Math.floor(wide / picture.column)));
  const step = Math.floor((wide / columns - SPACING) / picture.cells);
  return { columns, step: Math.max(NARROWEST, Math.min(WIDEST, step)) };
}

// Rows are stored as one list of names and lists of values.
function restored(spec) {
  if (Array.isArray(spec)) return spec.map(restored);
  if (spec === null || typeof spec !== "object") return spec;
  if (spec.names && spec.rows) return spec.rows.map((row) => Object.fromEntries(row.map((x, i) => [spec.names[i], x])));
  return Object.fromEntries(Object.entries(spec).map(([name, x]) => [name, restored(x)]));
}

// Write the rows of the worst cases, which are stored together by law and implementation; a line ends with an empty
// problem.
function fill(store) {
  const body = document.querySelector(`#${store.dataset.rows} tbody`);
  for (const { law, implementation, line, cases } of JSON.parse(store.textContent)) {
    for (const [dtype, error, problem] of cases) {
      const row = body.insertRow();
      Object.assign(row.dataset, { implementation, dtype });
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = law;
      row.append(head);
      for (const [of, text, kind] of [["", implementation], ["", dtype], ["error (ulp)", error, "number"]]) {
        const cell = row.insertCell();
        cell.dataset.of = of;
        cell.textContent = text;
        if (kind) cell.className = kind;
      }
      const cell = row.insertCell();
      cell.dataset.of = "replay";
      cell.className = "problem";
      const code = document.createElement("code");
      code.textContent = `${line.slice(0, -2)}'${problem}'`;
      const button = document.createElement("button");
      button.type = "button";
      button.className = button.textContent = "copy";
      cell.append(code, " ", button);
    }
  }
}

async function draw(picture) {
  const place = document.getElementById(picture.name);
  const room = place.clientWidth;
  const { columns, step } = fit(picture, room);
  const key = `${columns} ${step} ${dark.matches} ${picture.column ? "" : room}`;
  if (drawn.get(picture.name) === key) return;
  drawn.set(picture.name, key);
  const spec = restored(picture.spec);
  if (columns) spec.columns = columns;
  if (step) {
    spec.params[0].value = spec.spec.width.step = spec.spec.height.step = step;
  }
  // A lonely small picture may not fit a narrow screen.
  if (spec.spec?.width > room - 90) spec.spec.width = Math.max(120, room - 90);
  // The labels of a matrix leave it some room.
  if (picture.wide && room < 640) spec.encoding.y.axis.labelLimit = 150;
  const config = atlas.themes[dark.matches ? "dark" : "light"];
  try {
    await vegaEmbed(place, spec, { mode: "vega-lite", actions: false, renderer: "svg", config, tooltip: { theme: dark.matches ? "dark" : "light" } });
    place.dataset.drawn = "yes";
  } catch (error) {
    place.textContent = `This picture could not be drawn: ${error.message}`;
    console.error(error);
  }
}

async function drawAll() {
  for (const picture of atlas.pictures) await draw(picture);
  document.documentElement.dataset.ready = "yes";
}

function filter(form) {
  const rows = [...document.querySelectorAll(`#${form.dataset.table} tbody tr`)];
  const said = form.querySelector("output");
  function apply() {
    const wanted = new FormData(form);
    const words = (wanted.get("text") || "").toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = ["implementation", "verdict", "dtype", "run"].every(
        (name) => !wanted.get(name) || row.dataset[name] === wanted.get(name));
      row.hidden = !(fits && words.every((word) => text.includes(word)));
      count += !row.hidden;
    }
    said.textContent = `${count} of ${rows.length} rows`;
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

async function copy(button) {
  const text = button.parentElement.querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A file has no clipboard in some browsers.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  document.getElementById("said").textContent = "copied";
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
}

document.querySelectorAll("script[data-rows]").forEach(fill);
document.querySelectorAll("form.filters").forEach(filter);
document.addEventListener("click", (event) => {
  if (event.target.matches("button.copy")) copy(event.target);
});
dark.addEventListener("change", drawAll);
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 200); });
drawAll();
