// What the tests do on the page: it lies in a frame as narrow as a phone, and its scripts are asked one by one here.
// JOB comes from the tests; what is found goes back as JSON in the element `found`.

const NAMES = "svd, truncated, floorOf, makeRun, trainStep, lossAndGradients, countLora, memoryOf, workOf, breakEven, bytesText, percent";

// The functions of the scripts `source`, with what they compute from the given numbers.
function computed(source) {
  const data = { dtypes: JOB.dtypes, query_block: JOB.query_block };
  const f = new Function("DATA", `"use strict"; ${source}\nreturn { ${NAMES} };`)(data);
  const decomposed = JOB.matrices.map((M) => f.svd(M));
  const run = (settings, steps) => {
    const started = f.makeRun(settings);
    const begun = JSON.parse(JSON.stringify({ task: started.task, pair: started.pair }));
    for (let i = 0; i < steps; i += 1) {
      f.trainStep(started);
    }
    return { ...begun, losses: started.losses, diverged: started.diverged };
  };
  return {
    decomposed,
    truncated: decomposed.map((parts) => f.truncated(parts, 2)),
    floors: decomposed.map((parts) => f.floorOf(parts.sigma, 2)),
    gradients: f.lossAndGradients(JOB.task, JOB.pair),
    runs: JOB.runs.map((settings) => run(settings, JOB.steps)),
    counts: JOB.counts.map((settings) => {
      const model = JOB.models.find(({ name }) => name === settings.model);
      const counted = f.countLora(model, settings.r, settings.targets);
      const memory = f.memoryOf(model, settings, counted);
      const even = counted.kinds.map((kind) => kind.breakEven);
      return { trainable: counted.trainable, total: counted.all, memory, even, work: f.workOf(model, settings) };
    }),
    bytes: JOB.bytes.map((n) => f.bytesText(n)),
    percents: JOB.shares.map((share) => f.percent(share)),
  };
}

// What a person does, and then reads.
async function usePage(window) {
  const { document } = window;
  const byId = (id) => document.getElementById(id);
  const numbers = (id) => JSON.parse(byId(id).dataset.numbers);
  const set = (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new window.Event("input", { bubbles: true }));
  };
  const wide = [document.documentElement, ...document.querySelectorAll("section > .table, #measured > .table, pre")];
  const overflow = () => Math.max(...wide.map((one) => one.scrollWidth - one.clientWidth));
  const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);

  const counts = JOB.counts.map((settings) => {
    set("model", settings.model);
    for (const id of ["r", "dtype", "batch", "length"]) {
      byId(id).value = settings[id];
    }
    for (const box of document.querySelectorAll("#targets input")) {
      box.checked = settings.targets.includes(box.value);
    }
    set("alpha", 16);
    const cells = [...byId("memory").rows].map((row) => [...row.cells].map((cell) => cell.textContent));
    const work = byId("work-text").textContent;
    return { ...numbers("cost"), shown: byId("trainable").textContent, cells, said: work, overflow: overflow() };
  });
  await new Promise((done) => window.setTimeout(done, 400));
  const address = window.location.hash;

  const before = byId("trainable").textContent;
  const place = byId("settings").nextElementSibling;
  const wrong = ["0", "257", "1.5", ""].map((r) => {
    set("r", r);
    return [place.hidden, place.textContent, byId("trainable").textContent === before, byId("r").getAttribute("aria-invalid")];
  });
  set("r-slider", 7);
  const slid = [byId("r").value, place.hidden, byId("r-slider").getAttribute("aria-valuetext")];
  set("model", "minilora-demo");
  set("r", 64);
  const quality = [byId("quality-here").textContent];
  byId("targets-all").click();
  set("alpha", 128);
  quality.push(byId("quality-here").textContent, byId("alpha-text").textContent);
  byId("targets-qv").click();
  quality.push(byId("quality-here").textContent);
  for (const box of document.querySelectorAll("#targets input:checked")) {
    box.click();
  }
  const nothing = [byId("answer-text").textContent, byId("curve-words").textContent];
  byId("targets-qv").click();

  const low = ["0", "4", "16"].flatMap((keep) => ["picture", "rank4", "noise"].map((matrix) => {
    set("matrix", matrix);
    set("keep", keep);
    return { matrix, keep: Number(keep), ...numbers("low-rank"), text: byId("low-rank-text").textContent };
  }));

  const questions = [...document.querySelectorAll("#questions fieldset")].map((group) => {
    const feedback = group.querySelector(".feedback");
    const said = [...group.querySelectorAll("input")].map((radio) => {
      radio.click();
      return feedback.textContent;
    });
    return { text: group.querySelector("legend").textContent, said, live: feedback.getAttribute("aria-live") };
  });

  const controls = [...document.querySelectorAll("input, select, button")];
  const references = [...document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for], output[for]")];
  const named = (one) => one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim();
  return {
    counts, address, wrong, slid, quality, nothing, low, questions,
    check: document.documentElement.dataset.check,
    checked: byId("self-check").textContent,
    headings: [...document.querySelectorAll("h1, h2, h3")].map((one) => Number(one.tagName[1])),
    nameless: controls.filter((one) => !named(one)).map((one) => one.outerHTML),
    unreachable: controls.filter((one) => one.tabIndex < 0).map((one) => one.outerHTML),
    dangling: references.flatMap((one) => ["aria-labelledby", "aria-describedby", "for"].map((name) => one.getAttribute(name)))
      .filter((id) => id && !byId(id)),
    pictures: [...document.querySelectorAll("svg[role=img]")].filter((svg) =>
      !svg.getAttribute("aria-label") && !byId(svg.getAttribute("aria-labelledby"))?.textContent.trim()).length,
    doubled: [...document.querySelectorAll("[id]")].map(({ id }) => id).filter((id, i, all) => all.indexOf(id) !== i),
    small: [...document.querySelectorAll("button, select, input")].filter((one) => one.getBoundingClientRect().height < 20).map(({ id }) => id),
    loaded: window.performance.getEntriesByType("resource").map(({ name }) => name),
    measured: texts("#measured td, #measured th[scope=row]"),
    notes: texts("#measured .note"),
    width: document.documentElement.clientWidth,
    injected: document.title,
  };
}

// Start, frames, pause; steps; begun again.
async function trainOnPage(window) {
  const byId = (id) => window.document.getElementById(id);
  const numbers = () => ({ ...JSON.parse(byId("training").dataset.numbers), run: byId("run").textContent,
    text: byId("train-text").textContent });
  const seen = [numbers()];
  byId("step").click();
  byId("step").click();
  seen.push(numbers());
  byId("run").click();
  const name = byId("run").textContent;
  while (JSON.parse(byId("training").dataset.numbers).steps < 8) {
    await new Promise((done) => window.setTimeout(done, 5));
  }
  byId("run").click();
  const paused = numbers();
  await new Promise((done) => window.setTimeout(done, 50));
  seen.push({ ...numbers(), name, rested: paused.steps });
  byId("reset").click();
  seen.push(numbers());
  byId("train-method").value = "descent";
  byId("train-lr").value = "3";
  byId("train-r").value = "16";
  byId("train-alpha").value = "256";
  byId("train-alpha").dispatchEvent(new window.Event("input", { bubbles: true }));
  seen.push(numbers());
  for (let i = 0; i < 40; i += 1) {
    byId("step").click();
  }
  seen.push(numbers());
  return seen;
}

window.addEventListener("load", async () => {
  const found = {};
  try {
    found.computed = Object.fromEntries(Object.entries(JOB.sources).map(([name, source]) => [name, computed(source)]));
    const frames = Object.fromEntries([...document.querySelectorAll("iframe")].map((frame) => [frame.id, frame.contentWindow]));
    found.checks = Object.fromEntries(Object.entries(frames).map(([name, { document: page }]) =>
      [name, [page.documentElement.dataset.check ?? null, page.getElementById("self-check").textContent,
        page.querySelector("header #self-check") !== null, page.title]]));
    found.training = await trainOnPage(frames.page);
    found.page = await usePage(frames.page);
  } catch (error) {
    found.error = `${error} ${error.stack}`;
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
