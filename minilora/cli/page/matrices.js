// Small matrices: random numbers from a seed, products, and the singular value decomposition.
// A matrix is an array of rows of numbers. Knows nothing of LoRA, and nothing of the page.

// Numbers in [0, 1) that a seed repeats on every machine (mulberry32, public domain).
function uniformNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Numbers of mean 0 and variance 1, made of pairs of uniform ones (Box and Muller).
function normalNumbers(uniform) {
  return () => {
    // 1 - u is never 0, whose logarithm is no number.
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  };
}

function matrixOf(rows, columns, value) {
  const row = (i) => Array.from({ length: columns }, (_, j) => value(i, j));
  return Array.from({ length: rows }, (_, i) => row(i));
}

function transposed(M) {
  return matrixOf(M[0].length, M.length, (i, j) => M[j][i]);
}

function product(M, N) {
  const columns = transposed(N);
  return matrixOf(M.length, columns.length, (i, j) => dot(M[i], columns[j]));
}

function dot(x, y) {
  let sum = 0;
  for (let i = 0; i < x.length; i += 1) {
    sum += x[i] * y[i];
  }
  return sum;
}

// M + factor · N
function plus(M, N, factor = 1) {
  return matrixOf(M.length, M[0].length, (i, j) => M[i][j] + factor * N[i][j]);
}

// The sum of the squares of all entries: the square of the Frobenius norm.
function squares(M) {
  return M.reduce((sum, row) => sum + dot(row, row), 0);
}

// M = U · diag(sigma) · Vᵀ, by one-sided Jacobi (Hestenes 1958): pairs of columns of M are turned
// until all are orthogonal. Their lengths are then the singular values, their directions the
// columns of U, and what turned them is V.
//
// Returns {left, sigma, right}, largest first: left[i] and right[i] are the directions that belong
// to sigma[i]. Where sigma[i] is 0, left[i] has no direction, and is 0 as well.
function svd(M) {
  const columns = transposed(M);
  const turned = matrixOf(columns.length, columns.length, (i, j) => (i === j ? 1 : 0));
  let resting = false;
  // Convergence is quadratic: small matrices need fewer than ten sweeps.
  for (let sweep = 0; !resting && sweep < 60; sweep += 1) {
    resting = true;
    for (let p = 0; p < columns.length; p += 1) {
      for (let q = p + 1; q < columns.length; q += 1) {
        if (makeOrthogonal(columns, turned, p, q)) {
          resting = false;
        }
      }
    }
  }
  const lengths = columns.map((column) => Math.sqrt(dot(column, column)));
  const order = [...lengths.keys()].sort((i, j) => lengths[j] - lengths[i]);
  return {
    left: order.map((i) => columns[i].map((value) => (lengths[i] > 0 ? value / lengths[i] : 0))),
    sigma: order.map((i) => lengths[i]),
    right: order.map((i) => turned[i]),
  };
}

// Turn columns p and q until they are orthogonal, and the two rows of `turned` with them. Returns
// false if they were orthogonal already, to the precision of the numbers.
function makeOrthogonal(columns, turned, p, q) {
  const pp = dot(columns[p], columns[p]);
  const qq = dot(columns[q], columns[q]);
  const pq = dot(columns[p], columns[q]);
  if (Math.abs(pq) <= 1e-15 * Math.sqrt(pp * qq)) {
    return false;
  }
  // The tangent of the smaller of the two angles that do it.
  const zeta = (qq - pp) / (2 * pq);
  const tangent = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta));
  const cosine = 1 / Math.sqrt(1 + tangent * tangent);
  const sine = cosine * tangent;
  for (const vectors of [columns, turned]) {
    const [x, y] = [vectors[p], vectors[q]];
    vectors[p] = x.map((value, i) => cosine * value - sine * y[i]);
    vectors[q] = x.map((value, i) => sine * value + cosine * y[i]);
  }
  return true;
}

// The best matrix of rank r (Eckart and Young 1936): the first r directions, and no others.
function truncated({ left, sigma, right }, r) {
  const entry = (i, j) => {
    let sum = 0;
    for (let k = 0; k < r; k += 1) {
      sum += sigma[k] * left[k][i] * right[k][j];
    }
    return sum;
  };
  return matrixOf(left[0].length, right[0].length, entry);
}

// What no matrix of rank r can reach: the share of the squares in the directions left out.
function floorOf(sigma, r) {
  const all = dot(sigma, sigma);
  const rest = sigma.slice(r);
  return all > 0 ? dot(rest, rest) / all : 0;
}
