// A LoRA that trains on one small matrix, with gradients written by hand. Knows matrices, not the
// page.
//
// W is frozen. The model to be reached is W' = W + an update of rank k. What is trained are A (r, n)
// and B (n, r), from
//
//     loss = ½ ‖W + s·B·A − W'‖²        s = alpha / r
//
// the squares of all entries summed: for inputs x whose coordinates are independent and of variance
// 1, that is the mean of ½ |(W + s·B·A)·x − W'·x|².

// Adam's, as in minilora/optim.py.
const BETAS = [0.9, 0.999];
const EPSILON = 1e-8;
// A loss this many times the first one will not come back.
const DIVERGED = 1e6;

// W, and an update of rank k whose singular values fall by a fifth from one to the next.
function makeTask(n, k, seed) {
  const normal = normalNumbers(uniformNumbers(seed));
  const random = () => matrixOf(n, n, normal);
  const W = random().map((row) => row.map((value) => value / Math.sqrt(n)));
  const sigma = Array.from({ length: n }, (_, i) => (i < k ? 0.8 ** i : 0));
  const directions = svd(random());
  const update = truncated({ left: directions.left, sigma, right: directions.right }, k);
  return { n, W, update, tuned: plus(W, update), sigma };
}

// What is trained: A uniform in ±1/√n, as everywhere in minilora, and B zero.
function makePair(n, r, alpha, seed) {
  const uniform = uniformNumbers(seed);
  const bound = 1 / Math.sqrt(n);
  return {
    A: matrixOf(r, n, () => (2 * uniform() - 1) * bound),
    B: matrixOf(n, r, () => 0),
    scaling: alpha / r,
  };
}

// The update that a pair stands for: s·B·A.
function updateOf({ A, B, scaling }) {
  return product(B, A).map((row) => row.map((value) => scaling * value));
}

// The loss, and its derivative by each entry of A and of B. With E = W + s·B·A − W',
//
//     dL/dB = s · E · Aᵀ        dL/dA = s · Bᵀ · E
//
// so that A, whose derivative is multiplied by B, does not move in the first step.
function lossAndGradients(task, pair) {
  const E = plus(plus(task.W, updateOf(pair)), task.tuned, -1);
  const scaled = E.map((row) => row.map((value) => pair.scaling * value));
  return {
    loss: squares(E) / 2,
    A: product(transposed(pair.B), scaled),
    B: product(scaled, transposed(pair.A)),
  };
}

// A run: the task, the pair, what the optimizer remembers, and the loss before each step.
// settings: {n, r, k, alpha, lr, method, seed}, method "adam" or "descent".
function makeRun(settings) {
  const task = makeTask(settings.n, settings.k, settings.seed);
  const pair = makePair(settings.n, settings.r, settings.alpha, settings.seed + 1);
  const zeros = (M) => matrixOf(M.length, M[0].length, () => 0);
  const moments = {
    A: { mean: zeros(pair.A), square: zeros(pair.A) },
    B: { mean: zeros(pair.B), square: zeros(pair.B) },
  };
  const { loss } = lossAndGradients(task, pair);
  return { settings, task, pair, moments, losses: [loss], diverged: false };
}

// One step of the run, which it changes. Nothing moves any more once the loss has diverged.
function trainStep(run) {
  if (run.diverged) {
    return;
  }
  const { settings, task, pair, moments } = run;
  const gradients = lossAndGradients(task, pair);
  const time = run.losses.length;
  for (const name of ["A", "B"]) {
    if (settings.method === "adam") {
      adamStep(pair[name], gradients[name], moments[name], settings.lr, time);
    } else {
      pair[name] = plus(pair[name], gradients[name], -settings.lr);
    }
  }
  const { loss } = lossAndGradients(task, pair);
  run.losses.push(loss);
  // No number, too, compares as false.
  run.diverged = !(loss <= DIVERGED * run.losses[0]);
}

// Adam (Kingma and Ba 2015), on one matrix, in place. time counts steps from 1.
function adamStep(M, gradient, { mean, square }, lr, time) {
  const [beta1, beta2] = BETAS;
  for (let i = 0; i < M.length; i += 1) {
    for (let j = 0; j < M[i].length; j += 1) {
      const g = gradient[i][j];
      mean[i][j] = beta1 * mean[i][j] + (1 - beta1) * g;
      square[i][j] = beta2 * square[i][j] + (1 - beta2) * g * g;
      const meanHat = mean[i][j] / (1 - beta1 ** time);
      const squareHat = square[i][j] / (1 - beta2 ** time);
      M[i][j] -= (lr * meanHat) / (Math.sqrt(squareHat) + EPSILON);
    }
  }
}

// The largest difference between the gradients above and central differences of the loss, relative
// to the largest derivative: what this page is checked with when it opens.
function gradientError(task, pair) {
  const gradients = lossAndGradients(task, pair);
  const step = 1e-5;
  let worst = 0;
  let largest = 0;
  for (const name of ["A", "B"]) {
    pair[name].forEach((row, i) =>
      row.forEach((value, j) => {
        const lossAt = (moved) => {
          row[j] = moved;
          const { loss } = lossAndGradients(task, pair);
          row[j] = value;
          return loss;
        };
        const difference = (lossAt(value + step) - lossAt(value - step)) / (2 * step);
        worst = Math.max(worst, Math.abs(difference - gradients[name][i][j]));
        largest = Math.max(largest, Math.abs(difference));
      }),
    );
  }
  return worst / largest;
}
