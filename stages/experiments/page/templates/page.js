// The page of comparison: what is chosen in it, and what follows from that. No library but Vega-Lite for the plots.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
for (const of of data.groups.flatMap((one) => one.metrics)) {
  of.points = of.points.rows.map((row) => Object.fromEntries(row.map((value, index) => [of.points.keys[index], value])));
}
const byId = (id) => document.getElementById(id);
const CHOSEN_AT_MOST = 6;
const QUANTITIES = {
  relative_error: "relative output error on calibration tokens",
  relative_error_held_out: "relative output error on windows held out",
  sparsity: "sparsity",
  damping: "damping",
};
const VERDICTS = { better: "better", worse: "worse", noisy: "noise", unknown: "unknown" };
const INDEPENDENT = { corpus: "document", task: "text", generation: "answer" };
const chosen = { group: 0, metric: "", baseline: "dense", sort: "", descending: false, experiments: new Set(), columns: new Set(), inspected: "" };

const group = () => data.groups[chosen.group];
const metric = () => group().metrics.find((one) => one.id === chosen.metric);
const model = (name) => (name === "dense" ? group().dense : group().experiments.find((one) => one.name === name));
const chosenModels = () => group().experiments.filter((one) => chosen.experiments.has(one.name));
const hasSeeds = () => new Set(group().experiments.map((one) => one.seed)).size > 1;
const seedWords = (one) => (hasSeeds() ? `, seed ${one.seed}` : "");
const titleOf = (one) => (one.name === "dense" ? "dense" : `${one.name}: ${one.method}, ${one.asked}${seedWords(one)}`);

// Elements and numbers.

/** An element with attributes (a function is a listener) and children (nodes or text). */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const formats = [0, 1, 2, 3].map((decimals) => new Intl.NumberFormat("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
const number = (value, digits) => formats[Math.abs(value) < 1000 ? digits : 0].format(value);

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const plural = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
const counted = (row) =>
  `${row.count.toLocaleString("en-US")} ${row.counted}` +
  (!(row.kind in INDEPENDENT) || row.clusters === row.count ? "" : ` in ${plural(row.clusters, INDEPENDENT[row.kind])}`);

/** An interval in brackets, or why there is none. */
function range(low, high, write, kind, clusters) {
  if (low !== null) return ` [${write(low)}, ${write(high)}]`;
  if (kind === "mean") return " (no interval: a task has none)";
  return clusters < 2 && kind in INDEPENDENT ? ` (no interval: 1 ${INDEPENDENT[kind]})` : " (no interval)";
}

/** A measurement with its interval. */
function withInterval(row, digits) {
  const write = (value) => number(value, digits);
  return write(row.value) + range(row.low, row.high, write, row.kind, row.clusters);
}

/** The measurement of a model in a metric, or undefined. */
function measurement(one, of) {
  return one.measurements.find((row) => row.kind === of.kind && row.name === of.name && row.metric === of.metric);
}

/** How far a model lies from another: {words, verdict, sort, low, high}; null if they cannot be paired. */
function comparison(of, ours, theirs) {
  const estimate = ours.name === theirs.name ? null : pairedDifference(group(), of, ours, theirs, data.quantiles);
  if (estimate === null) return null;
  const ends = intervalOf(estimate, data.quantiles);
  const natural = of.ratio ? Math.exp : (value) => value;
  const value = natural(estimate.value);
  const write = of.ratio ? (end) => number(end, value < 10 ? 3 : 1) : signed;
  const [low, high] = ends ? ends.map(natural) : [null, null];
  const noisy = ends && ends[0] <= 0 && ends[1] >= 0;
  const verdict = !ends ? "unknown" : noisy ? "noisy" : estimate.value < 0 === (of.better === "lower") ? "better" : "worse";
  const words = (of.ratio ? "×" : "") + write(value) + range(low, high, write, of.kind, estimate.clusters);
  return { words, verdict, value, low, high };
}

function say(words) {
  byId("toast").textContent = words;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (byId("toast").textContent = ""), 5000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { "aria-hidden": "true" }, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`Copied: ${text.split("\n")[0]}`);
}

function options(select, entries, value) {
  select.replaceChildren(...entries.map(([key, words]) => element("option", { value: key, selected: key === value }, words)));
  select.value = value;
}

// Plots: drawn when they come near the screen, again when what they show changes.

const plots = new Map();
const dark = matchMedia("(prefers-color-scheme: dark)");
const nearby = new IntersectionObserver(
  (entries) =>
    entries.forEach((entry) => {
      const plot = plots.get(entry.target.id);
      plot.near = entry.isIntersecting;
      if (plot.near) drawn(plot);
    }),
  { rootMargin: "1000px" },
);

function show(id, spec, datasets, description, height = spec.height) {
  const figure = byId(id);
  if (!plots.has(id)) {
    plots.set(id, { figure, near: false });
    nearby.observe(figure);
  }
  const plot = plots.get(id);
  Object.assign(plot, { spec: { ...spec, height, datasets: { ...spec.datasets, ...datasets } }, description, stale: true });
  if (plot.near) drawn(plot);
}

function drawn(plot) {
  if (!plot.stale) return;
  plot.stale = false;
  const holder = element("div", { class: "plot", role: "img", "aria-label": plot.description });
  const save = (type) => element("button", { type: "button", click: () => saved(plot, type) }, `Save as ${type.toUpperCase()}`);
  plot.figure.replaceChildren(holder, element("div", { class: "saving" }, save("svg"), save("png")));
  const theme = structuredClone(data.themes[dark.matches ? "dark" : "light"]);
  const narrow = plot.figure.clientWidth < 560;
  theme.legend.labelLimit = plot.figure.clientWidth - (narrow ? 130 : 90);
  if (narrow) theme.axis.labelFontSize = theme.axis.titleFontSize = 11;
  const spec = structuredClone(plot.spec);
  if (narrow) JSON.stringify(spec, (key, value) => (key === "legend" && value && value.columns ? ((value.columns = 1), value) : value));
  const settings = { actions: false, renderer: "svg", config: { ...theme, aria: false }, tooltip: { disableDefaultStyle: false } };
  plot.ready = vegaEmbed(holder, spec, settings).then((result) => (plot.view = result.view));
}

async function saved(plot, type) {
  await plot.ready;
  const link = element("a", { href: await plot.view.toImageURL(type, 2), download: `${plot.figure.id}.${type}` });
  link.click();
}

// The table.

function columns() {
  const text = (key, label) => ({ key, label, sort: (one) => one[key] || "", cell: (one) => element("td", {}, one[key] || "") });
  return [
    { key: "name", label: "Experiment", sort: (one) => one.name, cell: nameCell },
    text("method", "Method"),
    text("pattern", "Pattern"),
    sparsityColumn(),
    ...(hasSeeds() ? [figure("seed", "Seed", String)] : []),
    ...[...group().metrics, ...group().columns.filter((of) => chosen.columns.has(of.id))].map((of) => ({
      key: of.id,
      label: of.label + (of.unit ? ` [${of.unit}]` : ""),
      basis: `on ${of.counted}`,
      number: true,
      best: of.better,
      sort: (one) => (measurement(one, of) || {}).value,
      cell: (one) => metricCell(one, of),
    })),
    figure("seconds", "Seconds", (value) => number(value, 0)),
    figure("peak_memory_gib", "Peak memory [GiB]", (value) => value.toFixed(2)),
    ...(metric().costs.kilojoules ? [figure("kilojoules", "Energy [kJ]", (value) => value.toFixed(1))] : []),
  ];
}

function figure(key, label, write) {
  const cell = (one) => element("td", { class: "number" }, typeof one[key] === "number" ? write(one[key]) : "");
  return { key, label, number: true, sort: (one) => one[key], cell };
}

/** The share of zeros, of a number of weights that stands in the head where all have the same. */
function sparsityColumn() {
  const weights = new Set(group().experiments.map((one) => one.weights));
  const of = (many) => `of ${many.toLocaleString("en-US")} weights`;
  const share = (one) => (one.weights ? `${(100 * one.sparsity).toFixed(2)}%${weights.size > 1 ? ` ${of(one.weights)}` : ""}` : "");
  return {
    key: "sparsity",
    label: "Sparsity",
    basis: weights.size === 1 ? of([...weights][0]) : null,
    number: true,
    sort: (one) => one.sparsity,
    cell: (one) => element("td", { class: "number" }, share(one)),
  };
}

function nameCell(one) {
  const pinned = chosen.baseline === one.name;
  const pin = { type: "button", class: "pin", "aria-pressed": String(pinned), "data-pin": one.name, click: () => setBaseline(one.name) };
  return element("th", { scope: "row" }, one.name, element("button", pin, pinned ? "Baseline" : "Make baseline"));
}

function metricCell(one, of) {
  const row = measurement(one, of);
  const againstItself = one.name === "dense" && of.itself !== null;
  if (!row) return element("td", { class: "number" }, againstItself ? `${of.itself}, by definition` : "not measured");
  const value = number(row.value, of.digits);
  const interval = element("span", { class: "interval" }, withInterval(row, of.digits).slice(value.length));
  return element("td", { class: "number" }, value, interval, deltaOf(one, of));
}

function deltaOf(one, of) {
  const apart = comparison(of, one, model(chosen.baseline));
  return apart && element("span", { class: `delta ${apart.verdict}` }, `${apart.words} ${VERDICTS[apart.verdict]}`);
}

/** A row of its own: the lines are long. */
function commandsRow(one, width) {
  const line = (words, command) =>
    element(
      "div",
      { class: "command" },
      element("button", { type: "button", "aria-label": `Copy the ${words} line of ${one.name}`, click: () => copy(command) }, "Copy"),
      element("code", {}, command),
    );
  const run = one.run ? line("run", one.run) : element("div", { class: "command" }, "conf/ composes it no more");
  const lines = element("div", { class: "commands" }, run, one.apply ? line("apply", one.apply) : null);
  return element("tr", { class: one.name === chosen.baseline ? "baseline" : null }, element("td"), element("td", { colspan: width }, lines));
}

function matching() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [method, pattern] = [byId("method").value, byId("pattern").value];
  return group().experiments.filter((one) => {
    const text = [one.name, one.method, one.asked, one.run, one.apply].join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!method || one.method === method) && (!pattern || one.pattern === pattern);
  });
}

function sorted(rows, all) {
  const column = all.find((one) => one.key === chosen.sort);
  const compare = (first, second) => {
    const [here, there] = [column.sort(first), column.sort(second)];
    const [lacks, other] = [here === undefined || here === null, there === undefined || there === null];
    if (lacks || other) return lacks - other;
    const order = typeof here === "string" ? here.localeCompare(there, "en", { numeric: true }) : here - there;
    return chosen.descending ? -order : order;
  };
  return column ? [...rows].sort(compare) : rows;
}

function sortBy(column) {
  const first = column.best === "higher";
  chosen.descending = chosen.sort === column.key ? !chosen.descending : first;
  chosen.sort = column.key;
  showTable();
  document.querySelector(`[data-sort="${CSS.escape(column.key)}"]`).focus();
}

function headCell(column) {
  const direction = chosen.sort !== column.key ? "none" : chosen.descending ? "descending" : "ascending";
  const button = { type: "button", "data-sort": column.key, click: () => sortBy(column) };
  return element(
    "th",
    { scope: "col", class: column.number ? "number" : null, "aria-sort": column.sort ? direction : null },
    column.sort ? element("button", button, column.label) : column.label,
    column.basis ? element("span", { class: "basis" }, column.basis) : null,
  );
}

function choiceCell(one) {
  if (one.name === "dense") return element("td", {});
  const box = { type: "checkbox", checked: chosen.experiments.has(one.name), "aria-label": `Show ${one.name} in detail`, "data-choose": one.name };
  return element("td", {}, element("input", { ...box, change: (event) => choose(one.name, event.target) }));
}

function choose(name, box) {
  if (box.checked && chosen.experiments.size >= CHOSEN_AT_MOST) {
    box.checked = false;
    say(`At most ${CHOSEN_AT_MOST} experiments are shown in detail; uncheck one first.`);
    return;
  }
  chosen.experiments[box.checked ? "add" : "delete"](name);
  showChosen();
}

/** Measurements without plots, as columns that can be shown. */
function showColumnChoice() {
  byId("columns").hidden = !group().columns.length;
  const box = (of) =>
    element("input", { type: "checkbox", "data-column": of.id, change: (event) => (chosen.columns[event.target.checked ? "add" : "delete"](of.id), showTable()) });
  byId("columns").replaceChildren(
    element("summary", {}, "More columns"),
    ...group().columns.map((of) => element("label", { class: "switch" }, box(of), of.label + (of.unit ? ` [${of.unit}]` : ""))),
  );
}

function showTable() {
  const all = columns();
  const rows = sorted(matching(), all);
  const detail = element("th", { scope: "col" }, "Detail");
  byId("table").tHead.replaceChildren(element("tr", {}, detail, ...all.map(headCell)));
  byId("table").tBodies[0].replaceChildren(
    ...[group().dense, ...rows].flatMap((one) => {
      const names = `${one.name === chosen.baseline ? "baseline" : ""} ${one.name === "dense" ? "" : "measured"}`;
      const row = element("tr", { class: names }, choiceCell(one), ...all.map((column) => column.cell(one)));
      return one.name === "dense" ? [row] : [row, commandsRow(one, all.length)];
    }),
  );
  byId("shown").textContent = `${rows.length} of ${group().experiments.length} experiments shown`;
}

function showVerdict() {
  const names = { better: [], worse: [], noisy: [], unknown: [] };
  group().experiments.forEach((one) => {
    const apart = comparison(metric(), one, model(chosen.baseline));
    if (apart) names[apart.verdict].push(one.name);
  });
  const listed = (of) => `${of.length}${of.length && of.length <= 8 ? ` (${of.join(", ")})` : ""}`;
  byId("verdict").textContent =
    `Against ${chosen.baseline}, in ${metric().label}, on ${metric().counted}: ${listed(names.better)} better, ` +
    `${listed(names.worse)} worse, ${listed(names.noisy)} within noise` +
    (names.unknown.length ? `, ${listed(names.unknown)} unknown without an interval.` : ".");
}

function setBaseline(name) {
  chosen.baseline = name;
  byId("baseline").value = name;
  showTable();
  showVerdict();
  showTasks();
  const pin = document.querySelector(`[data-pin="${CSS.escape(name)}"]`);
  if (pin && document.activeElement === document.body) pin.focus();
}

// What is drawn.

function showFrontier() {
  const left = new Set(matching().map((one) => one.name));
  const points = metric().points.map((row) => ({ ...row, shown: left.has(row.experiment) }));
  const words = `${metric().label} against sparsity for ${points.length} experiments, with 95% intervals; the table has every number`;
  show("frontier", metric().frontier, { points, references: metric().references }, words);
  const lines = metric().references.map((line) => `${line.label}${line.size ? ` (${line.size})` : ""} ${line.text}`);
  byId("references").textContent = lines.length ? `Lines, on ${metric().counted}: ${lines.join("; ")}.` : "";
}

function showCost() {
  const cell = byId("cell").value;
  const points = metric().points.filter((row) => !cell || row.asked === cell).map((row) => (cell ? { ...row, asked_short: "" } : row));
  const devices = [...new Set(points.map((row) => row.device).filter(Boolean))];
  byId("devices").textContent =
    `${points.length} experiments, one run each, on ${devices.join(" and ") || "unknown devices"}.` +
    (devices.length > 1 ? " Seconds on different devices are not comparable." : "") +
    (metric().costs.kilojoules ? "" : " Energy was not measured.");
  for (const [measure, label] of [["seconds", "seconds"], ["peak_memory_gib", "peak memory"], ["kilojoules", "energy"]]) {
    byId(measure).hidden = !metric().costs[measure];
    if (metric().costs[measure]) show(measure, metric().costs[measure], { points }, `${metric().label} against ${label} of pruning; the table has every number`);
  }
}

/** A task's own metric. */
function taskMetric(task) {
  return { kind: "task", name: task, ...group().task_metrics[task], ratio: false, digits: 3 };
}

function taskRow(task, one, baseline) {
  const of = taskMetric(task);
  const apart = comparison(of, one, baseline);
  const [ours, theirs] = [one, baseline].map((other) => unpacked(other.rows[task][of.metric]));
  const [accuracy, reference] = [one, baseline].map((other) => withInterval(measurement(other, of), of.digits));
  const row = { experiment: titleOf(one), task, rows: of.counted, accuracy, baseline: reference };
  const [worse, better] = [1, -1].map((sign) => theirs.filter((value, index) => sign * (value - ours[index]) > 0).length);
  [row.lost, row.gained] = of.better === "lower" ? [better, worse] : [worse, better];
  row.p_value = Number(mcnemar(row.lost, row.gained).toPrecision(2));
  if (!apart) return row;
  return { ...row, value: apart.value, low: apart.low, high: apart.high, difference: apart.words, verdict: VERDICTS[apart.verdict] };
}

function showTasks() {
  byId("by-task").hidden = !Object.keys(group().task_metrics).length;
  const baseline = model(chosen.baseline);
  const compared = chosenModels().filter((one) => one.name !== chosen.baseline);
  const rows = Object.keys(group().task_metrics).flatMap((task) => compared.map((one) => taskRow(task, one, baseline)));
  const words = `Difference of accuracy to ${chosen.baseline} in each task for ${compared.length} experiments`;
  const height = Object.keys(group().task_metrics).length * (15 * Math.max(compared.length, 1) + 24);
  show("tasks", data.charts.tasks, { tasks: rows }, `${words}; the table below has every number`, height);
  const keys = ["task", "rows", "experiment", "baseline", "accuracy", "difference", "lost", "gained", "p_value", "verdict"];
  const caption =
    `Accuracy by task against ${chosen.baseline}, with 95% intervals; difference paired by row; lost and gained: rows that only the ` +
    "baseline, and only the experiment, answers rightly; p_value: of McNemar’s exact test of these, which takes rows as independent";
  plainTable("task-table", caption, keys, rows);
}

function plainTable(id, caption, keys, rows) {
  const head = element("tr", {}, ...keys.map((key) => element("th", { scope: "col" }, key)));
  const body = rows.map((row) =>
    element("tr", {}, ...keys.map((key) => element("td", { class: typeof row[key] === "number" ? "number" : null }, String(row[key] ?? "")))),
  );
  byId(id).replaceChildren(element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
}

function showMatrices() {
  const one = model(chosen.inspected);
  const { kinds, cells } = group().layouts[one.matrices.layout];
  const count = cells.reduce((total, cell) => total + cell[2], 0);
  const constant = Object.keys(QUANTITIES).filter((quantity) => !Array.isArray(one.matrices[quantity]));
  const same = constant.map((quantity) =>
    one.matrices[quantity] === null ? `No matrix has a ${QUANTITIES[quantity]}.` : `The ${QUANTITIES[quantity]} is ${one.matrices[quantity]} in each.`,
  );
  const tokens = [...new Set(one.matrices.tokens)].map((many) => many.toLocaleString("en-US")).join(" to ");
  const sampled = one.matrices.error_tokens;
  const held = one.matrices.relative_error_held_out !== null ? ", and on as many of the windows held out" : "";
  const measuredOn = sampled ? `Errors are measured on about ${Math.min(sampled, one.matrices.tokens[1]).toLocaleString("en-US")} of these${held}. ` : "";
  byId("matrices-about").textContent =
    `${titleOf(one)}: ${one.weights.toLocaleString("en-US")} weights in ${count} matrices, each calibrated on ${tokens} tokens. ` +
    measuredOn +
    same.join(" ");
  const valueOf = (quantity, index) => (Array.isArray(one.matrices[quantity]) ? one.matrices[quantity][index] : one.matrices[quantity]);
  for (const quantity of Object.keys(QUANTITIES)) {
    byId(quantity).hidden = constant.includes(quantity);
    if (constant.includes(quantity)) continue;
    const matrices = cells.map(([block, kind, many], index) => ({ block, matrix: kinds[kind], count: many, quantity, value: valueOf(quantity, index) }));
    const words = `${QUANTITIES[quantity]} of ${one.name} by block and matrix; the table below has every number`;
    show(quantity, data.charts.matrices[quantity], { matrices }, words, 22 * kinds.length);
  }
  const keys = ["block", "matrix", "matrices", ...Object.keys(QUANTITIES)];
  const rows = cells.map(([block, kind, matrices], index) => ({
    block,
    matrix: kinds[kind],
    matrices,
    ...Object.fromEntries(Object.keys(QUANTITIES).map((quantity) => [quantity, valueOf(quantity, index)])),
  }));
  plainTable("matrix-table", `${titleOf(one)}, by block and matrix`, keys, rows);
}

// Texts and parameters.

function showGenerations() {
  const forms = { raw: "raw", chat: "through the chat template" };
  const said = (row, suffix) =>
    Object.entries(forms).map(([form, words]) =>
      row && row[form + suffix] !== undefined
        ? element("p", {}, element("span", { class: "form" }, `${words}: `), row[form + suffix].trim() || "(nothing)")
        : null,
    );
  byId("generations").replaceChildren(
    ...group().prompts.flatMap((prompt, index) => {
      const texts = chosenModels().map((one) => {
        const row = one.generations[index];
        const refused = row && row.chat_refused ? element("p", { class: "form" }, `not through the chat template: ${row.chat_refused}`) : null;
        return element("article", {}, element("h4", {}, titleOf(one)), ...said(row, "_sparse"), refused);
      });
      const dense = element("article", {}, element("h4", {}, "dense"), ...said(group().dense.generations[index], "_dense"));
      return [element("h3", {}, `“${prompt}”`), element("div", { class: "texts" }, dense, ...texts)];
    }),
  );
  if (!group().prompts.length) byId("generations").textContent = "Nothing was generated under this protocol.";
  showDegeneration(forms);
}

function showDegeneration(forms) {
  const apart = ([value, low, high], row) => signed(value) + range(low, high, signed, row.kind, row.clusters);
  const rows = chosenModels().flatMap((one) =>
    one.measurements
      .filter((row) => row.kind === "generation")
      .map((row) => ({
        prompts: forms[row.name],
        measure: row.label,
        experiment: titleOf(one),
        answers: row.count,
        dense: row.dense === null ? "" : number(row.dense, 3),
        value: withInterval(row, 3),
        difference: row.difference ? apart(row.difference, row) : "not paired",
      })),
  );
  byId("degeneration").hidden = !rows.length;
  const keys = ["prompts", "measure", "experiment", "answers", "dense", "value", "difference"];
  const order = (row) => `${row.prompts} ${row.measure}`;
  rows.sort((first, second) => order(first).localeCompare(order(second)));
  plainTable("degeneration-table", "Measures of degeneration, with 95% intervals; difference to the dense model, paired by prompt", keys, rows);
}

function showStyles() {
  const rows = chosenModels().flatMap((one) =>
    one.sensitivity.map((row) => {
      const verdict = row.low === null ? "unknown" : row.low <= 0 && row.high >= 0 ? "noise" : row.drift < 0 === (row.better === "lower") ? "better" : "worse";
      return {
        style: row.style,
        task: row.task === null ? "mean, every task alike" : row.task,
        experiment: titleOf(one),
        of: plural(row.count, row.counted.slice(0, -1)),
        raw: signed(row.raw),
        "in the style": signed(row.styled),
        drift: signed(row.drift) + range(row.low, row.high, signed),
        verdict,
      };
    }),
  );
  byId("styles").hidden = !rows.length;
  const caption = "Difference of accuracy to the dense model, raw and in each other style, and its drift with a 95% interval";
  plainTable("styles-table", caption, ["style", "task", "experiment", "of", "raw", "in the style", "drift", "verdict"], rows);
}

const SIZES = { dense_bytes: "dense", mask_bytes: "masks", delta_bytes: "delta", packed_bytes: "packed" };

function showSizes() {
  const rows = chosenModels().map((one) => {
    const sizes = one.measurements.filter((row) => row.kind === "size");
    const dense = sizes.find((row) => row.metric === "dense_bytes");
    const megabytes = (row) => `${number(row.value / 1e6, 1)} MB${row === dense ? "" : ` (${number((100 * row.value) / dense.value, 1)}%)`}`;
    const bytes = Object.entries(SIZES).map(([metric, name]) => [name, sizes.find((row) => row.metric === metric)]);
    const memory = (speed) => (speed.peak_memory_gib === undefined ? "" : `, at most ${number(speed.peak_memory_gib, 2)} GiB`);
    const facts = (speed) => `${plural(speed.tokens, "token")}, ${plural(group().prompts.length, "prompt")}, ${speed.device}${memory(speed)}`;
    const pace = (speed) => (speed ? `${number(speed.tokens_per_second, 2)} (${facts(speed)})` : "not measured");
    return {
      experiment: titleOf(one),
      matrices: dense ? dense.count : "",
      ...Object.fromEntries(bytes.map(([name, row]) => [name, row ? megabytes(row) : "not measured"])),
      "tokens a second": pace(one.speed.sparse),
      "dense model's": pace(one.speed.dense),
    };
  });
  byId("size").hidden = !rows.length;
  const caption = "Bytes in millions, with the share of the dense matrices; tokens a second of one run";
  plainTable("size-table", caption, ["experiment", "matrices", ...Object.values(SIZES), "tokens a second", "dense model's"], rows);
}

const paramsOf = (one) => ({ ...group().params.common, ...group().params.own[group().experiments.indexOf(one)] });
const written = (value) => (value === undefined ? "absent" : typeof value === "string" ? value : JSON.stringify(value));

function showConfiguration() {
  const models = chosenModels();
  const params = models.map(paramsOf);
  const keys = [...new Set(params.flatMap(Object.keys))].sort();
  const differ = (key) => new Set(params.map((of) => written(of[key]))).size > 1;
  const shown = byId("differing").checked ? keys.filter(differ) : keys;
  const part = (words) => element("tr", { class: "part" }, element("th", { scope: "colgroup", colspan: models.length + 1 }, words));
  const metrics = group().metrics.map((of) =>
    element("tr", {}, element("th", { scope: "row" }, of.label), ...models.map((one) => element("td", {}, valueWords(one, of)))),
  );
  const rows = shown.map((key) =>
    element("tr", {}, element("th", { scope: "row" }, key), ...params.map((of) => element("td", {}, written(of[key])))),
  );
  const head = element("tr", {}, element("th", { scope: "col" }, "parameter"), ...models.map((one) => element("th", { scope: "col" }, one.name)));
  byId("configuration").replaceChildren(
    element("caption", {}, `The experiments chosen in the table; ${shown.length} of ${keys.length} parameters`),
    element("thead", {}, head),
    element("tbody", {}, part("Metrics, with 95% interval and count"), ...metrics, part("Parameters"), ...rows),
  );
}

function valueWords(one, of) {
  const row = measurement(one, of);
  return row ? `${withInterval(row, of.digits)}, ${counted(row)}` : "not measured";
}

function showRecipes() {
  const [from, to] = ["recipe-from", "recipe-to"].map((id) => paramsOf(model(byId(id).value)));
  const keys = [...new Set([...Object.keys(from), ...Object.keys(to)])].sort();
  const differing = keys.filter((key) => written(from[key]) !== written(to[key]));
  const lines = differing.flatMap((key) => [
    ...(key in from ? [[`- ${key}: ${written(from[key])}`, "worse"]] : []),
    ...(key in to ? [[`+ ${key}: ${written(to[key])}`, "better"]] : []),
  ]);
  byId("recipe-about").textContent = `${differing.length} of ${keys.length} parameters ${differing.length === 1 ? "differs" : "differ"}.`;
  const nodes = lines.map(([line, kind]) => element("span", { class: kind }, `${line}\n`));
  byId("recipe").replaceChildren(...(nodes.length ? nodes : ["The recipes are equal.\n"]));
}

// What follows from a choice.

function showChosen() {
  showTasks();
  showStyles();
  showGenerations();
  showSizes();
  showConfiguration();
}

function showMetric() {
  document.querySelectorAll("[data-group]").forEach((part) => {
    const other = "metric" in part.dataset && part.dataset.metric !== chosen.metric;
    part.hidden = Number(part.dataset.group) !== chosen.group || other;
  });
  byId("best-metric").textContent = metric().label;
  showFrontier();
  showCost();
  showVerdict();
}

function bestOf(names) {
  const rows = metric().points.filter((row) => names.includes(row.experiment)).sort((first, second) => first.value - second.value);
  const best = metric().better === "lower" ? rows[0] : rows[rows.length - 1];
  return best ? best.experiment : names[0];
}

function showGroup() {
  const all = group().experiments.map((one) => [one.name, titleOf(one)]);
  chosen.metric = group().metrics[0].id;
  chosen.baseline = "dense";
  chosen.sort = chosen.metric;
  chosen.descending = group().metrics[0].better === "higher";
  const leaders = Object.values(group().cells).map(bestOf);
  chosen.experiments = new Set(leaders.slice(0, CHOSEN_AT_MOST));
  chosen.inspected = leaders[0];
  options(byId("metric"), group().metrics.map((one) => [one.id, one.label]), chosen.metric);
  options(byId("baseline"), [["dense", "dense"], ...all], "dense");
  options(byId("method"), [["", "all"], ...group().methods.map((name) => [name, name])], "");
  options(byId("pattern"), [["", "all"], ...[...new Set(group().experiments.map((one) => one.pattern))].map((name) => [name, name])], "");
  const cells = Object.entries(group().cells).sort((first, second) => second[1].length - first[1].length);
  options(byId("cell"), [["", "all"], ...Object.keys(group().cells).map((name) => [name, name])], cells[0][0]);
  options(byId("inspected"), all, chosen.inspected);
  options(byId("recipe-from"), all, all[0][0]);
  options(byId("recipe-to"), all, (all[1] || all[0])[0]);
  byId("search").value = "";
  chosen.columns = new Set();
  showColumnChoice();
  showMetric();
  showTable();
  showChosen();
  showMatrices();
  showRecipes();
}

function filtered() {
  showTable();
  showFrontier();
}

const listeners = {
  group: () => ((chosen.group = Number(byId("group").value)), showGroup()),
  metric: () => ((chosen.metric = byId("metric").value), showMetric()),
  baseline: () => setBaseline(byId("baseline").value),
  method: filtered,
  pattern: filtered,
  cell: showCost,
  inspected: () => ((chosen.inspected = byId("inspected").value), showMatrices()),
  differing: showConfiguration,
  "recipe-from": showRecipes,
  "recipe-to": showRecipes,
};
Object.entries(listeners).forEach(([id, listener]) => byId(id).addEventListener("change", listener));
byId("search").addEventListener("input", filtered);
byId("recipe-copy").addEventListener("click", () => copy(byId("recipe").textContent));
dark.addEventListener("change", () => plots.forEach((plot) => ((plot.stale = true), plot.near && drawn(plot))));

let width = innerWidth;
addEventListener("resize", () => {
  if ((width < 700) === (innerWidth < 700)) return;
  width = innerWidth;
  plots.forEach((plot) => ((plot.stale = true), plot.near && drawn(plot)));
});

showGroup();
