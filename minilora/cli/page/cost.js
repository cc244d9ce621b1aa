// Parts 1 and 2: what an adapter costs, and rank against compression. Knows counting and drawing.

// The choices that a model has. Targets that were chosen before stay so, if there are any.
function showModel(model) {
  const length = byId("length");
  length.max = model.context;
  length.value = Math.min(length.value, model.context);
  byId("context").textContent =
    `${model.name} takes rows of at most ${whole(model.context)} tokens.`;
  const before = [...document.querySelectorAll("#targets input:checked")].map(({ value }) => value);
  const names = model.linears.map(({ name }) => name);
  const kept = names.filter((name) => before.includes(name));
  const chosen = kept.length > 0 ? kept : ["q_proj", "v_proj"];
  const choices = names.map((name) => {
    const box = element("input", { type: "checkbox", value: name });
    box.checked = chosen.includes(name);
    return element("label", {}, box, name);
  });
  byId("targets").replaceChildren(...choices);
}

// The parts of memory, as the table calls them.
const PARTS = {
  weights: "weights",
  gradients: "gradients",
  moments: "Adam's moments",
  master: "master copy",
  activations: "activations",
};

function isAttention(name) {
  return ["q_proj", "k_proj", "v_proj", "o_proj"].includes(name);
}

function showCost(model, settings, dtype) {
  const { r, alpha, targets } = settings;
  const counted = countLora(model, r, targets);
  const file = counted.trainable * dtype.bytes;
  byId("trainable").textContent = whole(counted.trainable);
  byId("answer-text").textContent = costText(model, r, counted, file, dtype);
  const rows = counted.kinds.map((kind) => [
    named(kind),
    whole(kind.numbers),
    oneDecimal(kind.breakEven),
  ]);
  rows.push(["together", whole(counted.trainable), ""]);
  fillTable(
    byId("by-target"),
    rows,
    rows.map((_, i) => (i === rows.length - 1 ? "total" : "")),
  );
  showMemory(model, settings, counted);
  byId("alpha-text").textContent = alphaText(r, alpha);
  const work = workOf(model, settings);
  byId("work-text").textContent = workText(work, counted, model.total);
  // What is shown, to the last digit, for who reads this page by a program.
  byId("cost").dataset.numbers = JSON.stringify({
    trainable: counted.trainable,
    total: counted.all,
    adapted: counted.adapted,
    file,
    memory: memoryOf(model, settings, counted),
    work,
  });
}

// Fewer numbers, and hardly less work.
function workText({ full, LoRA }, counted, modelTotal) {
  if (counted.trainable === 0) {
    return "Nothing is trained: choose a target.";
  }
  const fewer = oneDecimal(modelTotal / counted.trainable);
  return (
    `Full fine-tuning takes ${flopsText(full)} a step, LoRA ${flopsText(LoRA)}: ` +
    `${percent(LoRA / full)} of it, with ${fewer} times fewer numbers trained. Forward goes ` +
    "through all of W as before, and backward as far as the lowest adapter; what is saved are " +
    "the gradients of frozen weights. A ratio of numbers is no speed-up."
  );
}

// The name of a kind of linear, and under it how many there are, of what shape.
function named(kind) {
  const shape = `${kind.layers} of ${whole(kind.out)} × ${whole(kind.in)}`;
  return element("span", {}, kind.name, element("span", { class: "shape" }, shape));
}

function costText(model, r, counted, file, dtype) {
  if (counted.trainable === 0) {
    return "Nothing is adapted: choose a target.";
  }
  const words = [
    `of ${whole(counted.all)}: ${percent(counted.trainable / counted.all)}. ` +
      `The ${whole(model.total)} of ${model.name} stay as they are.`,
    `Of the matrices that are adapted it is ${percent(counted.trainable / counted.adapted)}, ` +
      `a reduction by ${percent(Math.max(0, 1 - counted.trainable / counted.adapted))}.`,
    `The adapter's numbers take ${bytesText(file)} as ${dtype.name}.`,
  ];
  const useless = counted.kinds.filter((kind) => r > Math.min(kind.in, kind.out));
  const dear = counted.kinds.filter((kind) => r >= kind.breakEven && !useless.includes(kind));
  if (dear.length > 0) {
    words.push(
      `On ${listed(dear)} that is no saving: the pair is as large as the matrix, or larger.`,
    );
  }
  if (useless.length > 0) {
    words.push(`${listed(useless)} cannot have an update of rank ${r}; minilora refuses that.`);
  }
  return words.join(" ");
}

function listed(kinds) {
  return kinds.map(({ name }) => name).join(", ");
}

function alphaText(r, alpha) {
  const scale = shortNumber(alpha / r);
  const rooted = shortNumber(alpha / Math.sqrt(r));
  return (
    `B A is multiplied by alpha / r = ${shortNumber(alpha)} / ${r} = ${scale}; with rsLoRA by ` +
    `alpha / √r = ${rooted}. The rule "alpha = 2 r" gives 2 at every rank: r cancels, and the ` +
    "division by r with it."
  );
}

function showMemory(model, settings, counted) {
  const memory = memoryOf(model, settings, counted);
  const ways = Object.keys(memory);
  const bars = ways.map((way) => ({
    title: way === "full" ? "Full fine-tuning" : way,
    text: bytesText(total(Object.values(memory[way]))),
    parts: Object.values(memory[way]),
  }));
  drawBars(byId("memory-bars"), bars);
  const parts = Object.keys(memory.full);
  const rows = parts.map((part) => [
    PARTS[part],
    ...ways.map((way) => bytesText(memory[way][part])),
  ]);
  rows.push(["together", ...bars.map(({ text }) => text)]);
  fillTable(
    byId("memory"),
    rows,
    rows.map((_, i) => (i === parts.length ? "total" : "")),
  );
  parts.forEach((_, i) => {
    const key = element("svg", { class: "key", viewBox: "0 0 1 1", "aria-hidden": "true" });
    key.append(element("rect", { class: `part-${i + 1}`, width: 1, height: 1 }));
    byId("memory").tBodies[0].rows[i].cells[0].prepend(key);
  });
}

// Part 2.

function showCurve(model, settings, dtype) {
  const { r, targets } = settings;
  const svg = byId("curve-picture");
  const words = byId("curve-words");
  const shareAt = (rank) => {
    const { trainable, adapted } = countLora(model, rank, targets);
    return trainable / adapted;
  };
  if (targets.length === 0) {
    svg.replaceChildren();
    words.textContent = "Nothing is adapted: choose a target in part 1.";
    fillTable(byId("curve-table"), []);
    return;
  }
  // The count is proportional to r: all matrices together break even at 1 / the share of r = 1.
  const even = 1 / shareAt(1);
  const last = 2 ** Math.ceil(Math.log2(Math.max(256, even)));
  const from = 10 ** Math.floor(Math.log10(shareAt(1)));
  const x = { from: 1, to: last, log: true, label: "rank r", ticks: doublingTicks(last, 7) };
  const label = "LoRA's numbers, as a share of the matrices'";
  const y = { from, to: 3, log: true, label, ticks: shareTicks(from, 1) };
  const { at, add, path, box } = axes(svg, x, y);
  path(
    [
      [1, 1],
      [last, 1],
    ],
    "rule",
  );
  path(
    [
      [1, shareAt(1)],
      [last, shareAt(last)],
    ],
    "line",
  );
  const above = { class: "rule-text", x: box.left + 6, y: at(1, 1)[1] - 7 };
  add("text", above, `break-even: r = ${oneDecimal(even)}`);
  const [cx, cy] = at(r, shareAt(r));
  add("circle", { class: "dot", cx, cy, r: 7 });
  const left = cx > (box.left + box.right) / 2;
  const beside = {
    class: "strong",
    x: cx + (left ? -14 : 14),
    y: cy + 16,
    "text-anchor": left ? "end" : "start",
  };
  add("text", { ...beside, y: left ? cy - 8 : cy + 18 }, `r = ${r}: ${percent(shareAt(r))}`);
  words.textContent =
    `At r = ${r} the adapter has ${percent(shareAt(r))} of the numbers of the matrices it ` +
    `adapts. Each doubling of r doubles that, until r = ${oneDecimal(even)}, where nothing is saved.`;
  const ranks = [...new Set([...doublingTicks(256, 9).map(([rank]) => rank), r])].sort(
    (a, b) => a - b,
  );
  const rows = ranks.map((rank) => {
    const counted = countLora(model, rank, targets);
    return [
      String(rank),
      whole(counted.trainable),
      percent(counted.trainable / counted.adapted),
      percent(counted.trainable / counted.all),
      bytesText(counted.trainable * dtype.bytes),
    ];
  });
  fillTable(
    byId("curve-table"),
    rows,
    ranks.map((rank) => (rank === r ? "here" : "")),
  );
}
