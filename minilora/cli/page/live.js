// Part 4: a run that is started, paused, stepped and begun again by its buttons.

const STEPS_A_FRAME = 2;
// With less motion wished for, a press of the button is so many steps, and one picture.
const STEPS_AT_ONCE = 100;
const LAST_STEP = 5000;
// A screen reader is told so often, in steps.
const TELL_EVERY = 250;
// Where the axis of losses ends at the latest, as a share of the first loss.
const LOWEST = 1e-8;

// The run on the page, and what its buttons do. `settings()` is asked when it begins, `changed()`
// is called when it comes to rest. Returns {reset, redraw, train, tell, steps}.
function makeLive(settings, changed) {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  let run = null;
  let frame = null;

  function reset() {
    pause();
    run = makeRun(settings());
    show();
    tell();
  }

  function train(steps) {
    for (let i = 0; i < steps && !isOver(); i += 1) {
      trainStep(run);
    }
    show();
  }

  function isOver() {
    return run.diverged || run.losses.length > LAST_STEP;
  }

  function startOrPause() {
    if (frame !== null) {
      pause();
    } else if (still.matches) {
      train(STEPS_AT_ONCE);
    } else if (!isOver()) {
      frame = requestAnimationFrame(animate);
    }
    name();
    tell();
    changed();
  }

  function animate() {
    train(STEPS_A_FRAME);
    if (isOver()) {
      pause();
      tell();
      changed();
      return;
    }
    if (steps() % TELL_EVERY === 0) {
      tell();
    }
    frame = requestAnimationFrame(animate);
  }

  function pause() {
    if (frame !== null) {
      cancelAnimationFrame(frame);
    }
    frame = null;
    name();
  }

  function name() {
    const atRest = still.matches ? `Run ${STEPS_AT_ONCE} steps` : "Start";
    byId("run").textContent = frame === null ? atRest : "Pause";
  }

  function steps() {
    return run.losses.length - 1;
  }

  function tell() {
    byId("train-text").textContent = runText(run);
  }

  function show() {
    showRun(run);
  }

  byId("run").addEventListener("click", startOrPause);
  byId("step").addEventListener("click", () => {
    pause();
    train(1);
    tell();
    changed();
  });
  byId("reset").addEventListener("click", () => {
    reset();
    changed();
  });
  still.addEventListener("change", pause);
  return { reset, redraw: show, train, tell, steps };
}

// What the live region says of a run.
function runText(run) {
  const steps = run.losses.length - 1;
  const first = run.losses[0];
  const { loss, A, B } = lossAndGradients(run.task, run.pair);
  if (run.diverged) {
    const remedy = "A lower learning rate is needed; start again.";
    return `Step ${whole(steps)}: the loss has left all bounds. ${remedy}`;
  }
  const floor = floorOf(run.task.sigma, run.settings.r);
  const reach =
    floor > 0
      ? `An update of rank ${run.settings.r} can do no better than ${percent(floor)}.`
      : `An update of rank ${run.settings.r} can reach W′ exactly.`;
  return (
    `Step ${whole(steps)}: ${percent(loss / first)} of the first loss is left. ${reach} ` +
    `|dL/dA| is ${shortNumber(Math.sqrt(squares(A)))}, ` +
    `|dL/dB| ${shortNumber(Math.sqrt(squares(B)))}.`
  );
}

function showRun(run) {
  drawLoss(run);
  const { update } = run.task;
  const learned = updateOf(run.pair);
  const largest = Math.max(...update.flat().map(Math.abs));
  drawMap(byId("map-update"), update, largest);
  drawMap(byId("map-learned"), learned, largest);
  drawMap(byId("map-left"), plus(update, learned, -1), largest);
  byId("training").dataset.numbers = JSON.stringify({
    steps: run.losses.length - 1,
    loss: run.losses[run.losses.length - 1],
    first: run.losses[0],
    floor: floorOf(run.task.sigma, run.settings.r),
    diverged: run.diverged,
  });
}

function drawLoss(run) {
  const { losses, settings, task } = run;
  const shares = losses.map((loss) => loss / losses[0]);
  const finite = shares.filter((share) => Number.isFinite(share));
  const floor = floorOf(task.sigma, settings.r);
  const lowest = Math.max(LOWEST, Math.min(0.1, ...finite, floor || 1));
  const from = 10 ** Math.floor(Math.log10(lowest));
  const to = 10 ** Math.ceil(Math.log10(Math.min(DIVERGED, Math.max(1, ...finite))));
  const last = Math.max(200, 100 * Math.ceil((shares.length - 1) / 100));
  const quarters = [0, 1, 2, 3, 4].map((quarter) => (quarter * last) / 4);
  const x = {
    from: 0,
    to: last,
    label: "step",
    ticks: quarters.map((step) => [step, whole(step)]),
  };
  const label = "loss, as a share of the first";
  const y = { from, to, log: true, label, ticks: shareTicks(from, to) };
  const { at, add, path, box } = axes(byId("loss-picture"), x, y);
  if (floor > 0) {
    path(
      [
        [0, floor],
        [last, floor],
      ],
      "rule",
    );
    const place = {
      class: "rule-text",
      x: box.right,
      y: at(0, floor)[1] + 18,
      "text-anchor": "end",
    };
    add("text", place, `floor of rank ${settings.r}: ${percent(floor)}`);
  }
  // What lies outside of the picture is drawn on its edge.
  const inside = (share) => (Number.isFinite(share) ? Math.min(to, Math.max(from, share)) : to);
  path(
    shares.map((share, step) => [step, inside(share)]),
    "line",
  );
  const now = shares[shares.length - 1];
  const [cx, cy] = at(shares.length - 1, inside(now));
  add("circle", { class: "dot", cx, cy, r: 6 });
  const anchor = cx > (box.left + box.right) / 2 ? "end" : "start";
  const text = Number.isFinite(now) ? percent(now) : "no number";
  add(
    "text",
    { class: "strong", x: cx, y: Math.max(box.top + 20, cy - 12), "text-anchor": anchor },
    text,
  );
  byId("loss-words").textContent =
    floor > 0
      ? `The dashed line is what no update of rank ${settings.r} gets below (Eckart and Young).`
      : `There is no floor: rank ${settings.r} is enough for an update of rank ${settings.k}.`;
}
