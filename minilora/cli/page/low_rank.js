// Part 3: a matrix of 16 × 16 is decomposed, and put together again from its first directions.

const SIZE = 16;
// The letter R, drawn by hand.
const LETTER = [
  "................",
  "................",
  "...#######......",
  "...########.....",
  "...##.....##....",
  "...##.....##....",
  "...##.....##....",
  "...########.....",
  "...#######......",
  "...##..##.......",
  "...##...##......",
  "...##....##.....",
  "...##.....##....",
  "...##......##...",
  "................",
  "................",
];

// One of the four matrices of the list.
function exampleMatrix(name) {
  if (name === "picture") {
    return matrixOf(SIZE, SIZE, (i, j) => (LETTER[i][j] === "#" ? 1 : 0));
  }
  if (name === "rank4") {
    return makeTask(SIZE, 4, 5).update;
  }
  const normal = normalNumbers(uniformNumbers(7));
  const noise = matrixOf(SIZE, SIZE, normal);
  if (name === "noise") {
    return noise;
  }
  const wave = (i, j) => Math.sin(i / 2.5) * Math.cos(j / 3) + 0.5 * Math.sin((i + j) / 4);
  return matrixOf(SIZE, SIZE, (i, j) => wave(i, j) + 0.08 * noise[i][j]);
}

function showLowRank({ matrix, keep }) {
  const M = exampleMatrix(matrix);
  const parts = svd(M);
  const kept = truncated(parts, keep);
  const missing = plus(M, kept, -1);
  const largest = Math.max(...M.flat().map(Math.abs));
  drawMap(byId("map-matrix"), M, largest);
  drawMap(byId("map-kept"), kept, largest);
  drawMap(byId("map-error"), missing, largest);
  byId("keep-number").textContent = `r = ${keep}`;
  byId("keep").setAttribute("aria-valuetext", `rank ${keep}`);
  const error = squares(missing) / squares(M);
  byId("low-rank-text").textContent = lowRankText(keep, error);
  drawSigma(parts.sigma, keep);
  const rows = parts.sigma.map((value, i) => [
    String(i + 1),
    value < 1e-12 * parts.sigma[0] ? "0" : shortNumber(value),
    percent(1 - floorOf(parts.sigma, i + 1)),
  ]);
  fillTable(
    byId("sigma-table"),
    rows,
    rows.map((_, i) => (i + 1 === keep ? "here" : "")),
  );
  // The error, once from what is missing and once from the singular values left out.
  byId("low-rank").dataset.numbers = JSON.stringify({
    sigma: parts.sigma,
    error,
    floor: floorOf(parts.sigma, keep),
    numbers: 2 * SIZE * keep,
  });
}

function lowRankText(keep, error) {
  const numbers = 2 * SIZE * keep;
  const full = SIZE * SIZE;
  const beside = numbers < full ? `${percent(1 - numbers / full)} fewer` : "no saving";
  // Below this, it is rounding.
  const size =
    error < 1e-24 ? "nothing is missing" : `${percent(Math.sqrt(error))} of the matrix is missing`;
  const norm = error < 1e-24 ? "" : " (in Frobenius' norm)";
  return (
    `Rank ${keep} takes 2 · 16 · ${keep} = ${numbers} numbers instead of ${full}: ${beside}. ` +
    `With it ${size}${norm}. At r = 8 both have 256, which is where a square matrix breaks even.`
  );
}

function drawSigma(sigma, keep) {
  const svg = byId("sigma-picture");
  const all = dot(sigma, sigma);
  const shares = sigma.map((value) => (value * value) / all);
  const top = Math.ceil(shares[0] * 10 + 0.2) / 10;
  const ticks = [0, top / 2, top].map((share) => [share, percent(share)]);
  const every = sigma.map((_, i) => [i + 1, String(i + 1)]).filter((_, i) => i % 3 === 0);
  const x = { from: 0.4, to: SIZE + 0.6, label: "direction", ticks: every };
  const y = { from: 0, to: top, label: "share of the squares", ticks };
  const { at, add } = axes(svg, x, y);
  shares.forEach((share, i) => {
    const [left, upper] = at(i + 0.65, share);
    const [right, lower] = at(i + 1.35, 0);
    const name = i < keep ? "kept" : "dropped";
    add("rect", { class: name, x: left, y: upper, width: right - left, height: lower - upper });
  });
}
