// Part 5: what the lab on the rank measured, as its files say it; nothing else is said of quality.

// measured: [{model, setting, seeds, cpu, rows: [{method, r, lr, loss, share_of_full}]}], the last
// two with a number for each seed; `model` is that of this page, or null.
function showMeasured(measured) {
  if (measured.length === 0) {
    const text = "Not measured: this page was made without the results of the lab on the rank. ";
    const line = element("p", {}, text, "To have them here, run ");
    line.append(element("code", {}, "python examples/rank.py"), " and make the page once more.");
    byId("measured").replaceChildren(line);
    return;
  }
  byId("measured").replaceChildren();
  measured.forEach((results, i) => showResults(results, `measured-${i + 1}`));
}

function showResults(results, id) {
  const { setting, seeds, cpu, rows } = results;
  const title =
    "LoRA by rank: the share of full fine-tuning's gain, " +
    `mean and range of ${seeds.length} seeds.`;
  const svg = element("svg", { class: "picture", role: "img", "aria-labelledby": id });
  const figure = element("figure", {}, svg, element("figcaption", { id }, title));
  const heads = ["", "rate", "loss", "of full's gain", "range"];
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const table = element("table", {}, element("thead", {}, head), element("tbody"));
  fillTable(table, rows.map(measuredRow));
  const region = {
    class: "table",
    role: "region",
    "aria-label": "What was measured",
    tabindex: "0",
  };
  const machine = cpu ? `, on ${cpu}` : "";
  const limit = "For another task or base it says nothing.";
  const note = `${setting} Seeds ${seeds.join(", ")}${machine}. ${limit}`;
  byId("measured").append(
    figure,
    element("div", region, table),
    element("p", { class: "note" }, note),
  );
  drawMeasured(svg, rows);
}

function measuredRow({ method, r, lr, loss, share_of_full: shares }) {
  const cells = [shortNumber(lr), mean(loss).toFixed(3), `${Math.round(mean(shares))}${SPACE}%`];
  // The gain of full fine-tuning is what the others are measured by: it has no range.
  return method === "full"
    ? ["full", ...cells, ""]
    : [`r${SPACE}=${SPACE}${r}`, ...cells, rangeOf(shares)];
}

function mean(numbers) {
  return total(numbers) / numbers.length;
}

function rangeOf(shares) {
  return `${Math.round(Math.min(...shares))} to ${Math.round(Math.max(...shares))}`;
}

// What is known of the quality of these settings: only what was measured with them.
function qualityText(measured, settings, model) {
  const all = model.linears.length === settings.targets.length;
  for (const { model: name, setting, seeds, rows } of measured) {
    const row = rows.find(({ method, r }) => method === "lora" && r === settings.r);
    if (row && name === model.name && all && settings.alpha === 2 * settings.r) {
      return (
        `Measured for these settings: ${rangeOf(row.share_of_full)} % of what full fine-tuning ` +
        `gains, over ${seeds.length} seeds. ${setting}`
      );
    }
  }
  return (
    `Not measured for ${model.name} with these settings, and no formula says it. Part 5 has what ` +
    "was measured, and on what."
  );
}

function drawMeasured(svg, rows) {
  const loras = rows.filter(({ method }) => method === "lora");
  const shares = loras.flatMap((row) => row.share_of_full);
  const last = Math.max(2, ...loras.map(({ r }) => r));
  const to = 20 * Math.ceil(Math.max(100, ...shares) / 20 + 0.2);
  const from = 20 * Math.floor(Math.min(0, ...shares) / 20);
  const levels = [];
  for (let level = from; level <= to; level += 20) {
    levels.push([level, `${level} %`]);
  }
  const x = {
    from: 0.9,
    to: last * 1.1,
    log: true,
    label: "rank r",
    ticks: doublingTicks(last, 7),
  };
  const y = { from, to, label: "share of full fine-tuning's gain", ticks: levels };
  const { at, add, path, box } = axes(svg, x, y);
  path(
    [
      [x.from, 100],
      [x.to, 100],
    ],
    "rule",
  );
  add(
    "text",
    { class: "rule-text", x: box.left + 6, y: at(x.from, 100)[1] - 7 },
    "full fine-tuning",
  );
  path(
    loras.map((row) => [row.r, mean(row.share_of_full)]),
    "line",
  );
  for (const { r, share_of_full: range } of loras) {
    const [cx, cy] = at(r, mean(range));
    for (const end of [Math.min(...range), Math.max(...range)]) {
      const [, level] = at(r, end);
      add("path", { class: "range", d: `M${cx} ${cy}V${level}M${cx - 6} ${level}h12` });
    }
    add("circle", { class: "dot", cx, cy, r: 4.5 });
  }
}
