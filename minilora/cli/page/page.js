// The page: its controls are joined to its parts, and it checks itself before it says anything.

const DATA = JSON.parse(byId("data").textContent);

for (const model of DATA.models) {
  model.shapes = Object.fromEntries(model.linears.map((linear) => [linear.name, linear]));
}

function modelNamed(name) {
  return DATA.models.find((model) => model.name === name);
}

function fillLists() {
  for (const model of DATA.models) {
    byId("model").append(
      element("option", { value: model.name }, `${model.name}: ${whole(model.total)}`),
    );
  }
  for (const dtype of DATA.dtypes) {
    byId("dtype").append(element("option", { value: dtype.name }, dtype.name));
  }
  for (const lr of [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3]) {
    byId("train-lr").append(element("option", { value: lr }, String(lr)));
  }
  for (const [id, value] of Object.entries(DATA.start)) {
    byId(id).value = value;
  }
}

// The questions, each a group of radio buttons with a place for the answer under it.
function showQuiz() {
  const count = (name, r, targets) => countLora(modelNamed(name), r, targets);
  const groups = questions(count).map(({ text, options }, i) => {
    const feedback = element("p", { class: "feedback", "aria-live": "polite" });
    const labels = options.map((option) => {
      const radio = element("input", { type: "radio", name: `question-${i + 1}` });
      radio.addEventListener("change", () => {
        feedback.className = option.right ? "feedback right" : "feedback wrong";
        feedback.replaceChildren(
          element("b", {}, option.right ? "✓ Right." : "✗ Not so."),
          " ",
          option.why,
        );
      });
      return element("label", {}, radio, element("span", {}, option.text));
    });
    const legend = element("legend", {}, `${i + 1}. ${text}`);
    return element("fieldset", { class: "question" }, legend, ...labels, feedback);
  });
  byId("questions").append(...groups);
}

// What this page computes against what minilora computed when it was made, and against itself.
function selfCheck() {
  const wrong = [];
  for (const { settings, expected } of DATA.checks) {
    const model = modelNamed(settings.model);
    const counted = countLora(model, settings.r, settings.targets);
    const memory = memoryOf(model, settings, counted);
    const ours = JSON.stringify([counted.trainable, counted.all, memory]);
    const theirs = JSON.stringify([expected.trainable, expected.total, expected.memory]);
    const work = workOf(model, settings);
    // So many FLOPs are beyond the whole numbers that JavaScript has.
    const isClose = (way) => Math.abs(work[way] / expected.work[way] - 1) < 1e-12;
    if (ours !== theirs || !isClose("full") || !isClose("LoRA")) {
      wrong.push(`of ${settings.model} it counts other numbers than minilora`);
    }
  }
  const M = exampleMatrix("noise");
  const back = Math.sqrt(squares(plus(M, truncated(svd(M), SIZE), -1)) / squares(M));
  if (!(back < 1e-13)) {
    wrong.push(`the decomposition misses its matrix by ${back}`);
  }
  const task = makeTask(SIZE, 4, 1);
  const pair = makePair(SIZE, 3, 6, 2);
  pair.B = matrixOf(SIZE, 3, normalNumbers(uniformNumbers(3)));
  const error = gradientError(task, pair);
  if (!(error < 1e-8)) {
    wrong.push(`the gradients differ from differences of the loss by ${error}`);
  }
  document.documentElement.dataset.check = wrong.length === 0 ? "passed" : "failed";
  if (wrong.length > 0) {
    document.querySelector("header").prepend(byId("self-check"));
  }
  byId("self-check").textContent =
    wrong.length > 0
      ? `Do not trust this page, it checked itself when it opened: ${wrong.join("; ")}.`
      : `When it opened, this page checked itself: ${DATA.checks.length} counts are minilora's, ` +
        `to the last byte; a decomposed matrix comes back to ${back.toExponential(0)}; the gradients ` +
        `agree with differences of the loss to ${error.toExponential(0)}, relative to the largest.`;
}

function start() {
  fillLists();
  const model = () => modelNamed(byId("model").value);
  // "#cost" is a place on the page, and says no settings.
  const hash = location.hash.includes("=") ? location.hash : "";
  const ignored = followAddress(hash, () => showModel(model()));
  if (ignored.length > 0) {
    byId("ignored").hidden = false;
    byId("ignored").textContent =
      `The address says ${ignored.join(", ")}, which this page does not know.`;
  }
  let settings = readSettings();

  let timer = null;

  // The address follows once all is still: browsers refuse to change it a hundred times in a row.
  function write() {
    clearTimeout(timer);
    timer = setTimeout(
      () => history.replaceState(null, "", addressOf(settings, live.steps())),
      300,
    );
  }

  const trainSettings = () => ({
    n: SIZE,
    r: settings["train-r"],
    k: settings["train-k"],
    alpha: settings["train-alpha"],
    method: settings["train-method"],
    lr: settings["train-lr"],
    seed: settings["train-seed"],
  });
  const live = makeLive(trainSettings, write);

  function showCounts() {
    const dtype = DATA.dtypes.find(({ name }) => name === settings.dtype);
    showSlider(settings.r);
    showCost(model(), settings, dtype);
    showCurve(model(), settings, dtype);
    byId("quality-here").textContent = qualityText(DATA.measured, settings, model());
  }

  // A control has changed: so does all that depends on it, unless its value is none.
  function follow(show) {
    const changed = readSettings();
    if (changed !== null) {
      settings = changed;
      show();
      write();
    }
  }

  // Before the form hears of it.
  byId("model").addEventListener("input", () => showModel(model()));
  byId("r-slider").addEventListener("input", ({ target }) => {
    byId("r").value = RANKS[target.value];
  });
  for (const [name, belongs] of [
    ["qv", (target) => ["q_proj", "v_proj"].includes(target)],
    ["attention", isAttention],
    ["mlp", (target) => !isAttention(target)],
    ["all", () => true],
  ]) {
    byId(`targets-${name}`).addEventListener("click", () => {
      chooseTargets(
        model()
          .linears.map(({ name }) => name)
          .filter(belongs),
      );
      follow(showCounts);
    });
  }
  byId("settings").addEventListener("input", () => follow(showCounts));
  byId("low-rank").addEventListener("input", () => follow(() => showLowRank(settings)));
  byId("train-settings").addEventListener("input", () => follow(live.reset));
  // Enter in a field is no reason to load the page anew.
  document.addEventListener("submit", (event) => event.preventDefault());

  showQuiz();
  showMeasured(DATA.measured);
  showCounts();
  showLowRank(settings);
  live.reset();
  const steps = Number(new URLSearchParams(hash.slice(1)).get("steps"));
  if (steps > 0) {
    live.train(steps);
    live.tell();
  }
  selfCheck();

  // Letters keep their size: the pictures are drawn anew where their place has another width.
  let width = document.body.clientWidth;
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== width) {
      width = document.body.clientWidth;
      showCounts();
      showLowRank(settings);
      showMeasured(DATA.measured);
      live.redraw();
    }
  });
}

// The slider stands at the rank that is nearest to r, and says r itself.
function showSlider(r) {
  const distance = (rank) => Math.abs(Math.log(rank / r));
  const nearest = RANKS.reduce((best, rank) => (distance(rank) < distance(best) ? rank : best));
  byId("r-slider").value = RANKS.indexOf(nearest);
  byId("r-slider").setAttribute("aria-valuetext", `rank ${r}`);
}

start();
