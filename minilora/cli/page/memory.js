// The memory of training, by part, as `minilora count` counts it. Knows
// shapes, and no page.
//
// What is kept for backward is found by following a tensor through a block: a layer whose weight
// gets a gradient keeps its input, once for all layers that read it; one that is frozen keeps
// nothing for its weight. A value is {width, needsGradient, kept}.

// Where numbers have 16 bits, Adam's moments, and a copy of what is trained, are in float32.
const FLOAT32 = 4;
// Bytes of a token id or a position.
const ID_BYTES = 8;

// {full, LoRA, QLoRA}, each {weights, gradients, moments, master, activations} in bytes.
function memoryOf(model, settings, counted) {
  const size = bytesOfNumber(settings.dtype);
  const { batch, length, r, targets } = settings;
  const kept = (rankOf) => activationBytes(model, rankOf, batch, length, size);
  const rankOf = (name) => (targets.includes(name) ? r : 0);
  const ofAdapter = kept(rankOf);
  const frozen = model.total * size;
  const packed = model.packed_bytes + (model.total - model.packed_numbers) * size;
  return {
    full: trainingBytes(model.total, 0, size, kept(null)),
    LoRA: trainingBytes(counted.trainable, frozen, size, ofAdapter),
    QLoRA: trainingBytes(counted.trainable, packed, size, ofAdapter),
  };
}

function bytesOfNumber(dtype) {
  return DATA.dtypes.find(({ name }) => name === dtype).bytes;
}

// Adam on `trained` numbers of `size` bytes, beside `frozen` bytes that stay as they are.
function trainingBytes(trained, frozen, size, activations) {
  const fullSize = Math.max(size, FLOAT32);
  return {
    weights: frozen + trained * size,
    gradients: trained * size,
    moments: 2 * trained * fullSize,
    master: size < fullSize ? trained * fullSize : 0,
    activations,
  };
}

// Bytes kept between forward and backward. rankOf(name) is the rank of the adapter on a linear, 0
// for none; null instead of it: all of the model is trained.
function activationBytes(model, rankOf, batch, length, size) {
  const all = rankOf === null;
  const first = keptByBlock(model, rankOf, all);
  // All further blocks are alike.
  const later = keptByBlock(model, rankOf, first.needsGradient);
  const blocks = model.layers - 1;
  const rows = batch * length;
  let numbers = 0;
  for (const [kept, times] of [[first, 1], [later, blocks]]) {
    numbers += times * (rows * kept.byRow + length * kept.byPosition + kept.fixed);
  }
  let ids = 0;
  const last = keeper();
  // The norm before the head, the states that the head reads, and the gradient of its table.
  norm(last, model, { width: model.width, needsGradient: later.needsGradient }, all);
  if (later.needsGradient) {
    last.byRow += model.width;
  }
  if (all) {
    last.fixed += model.vocabulary * model.width;
    ids = ID_BYTES * (rows + (model.rotary ? 0 : length));
  }
  numbers += rows * last.byRow + last.fixed;
  return numbers * size + ids;
}

// Numbers kept for each row of the batch, for each position, and besides.
function keeper() {
  return { byRow: 0, byPosition: 0, fixed: 0 };
}

// The array of a value is kept, if it is not yet.
function keep(sums, value) {
  if (!value.kept) {
    value.kept = true;
    sums.byRow += value.width;
  }
}

// x + attention(norm(x)), then x + mlp(norm(x)).
function keptByBlock(model, rankOf, needsGradient) {
  const sums = keeper();
  const all = rankOf === null;
  const linear = (x, name) => keptByLinear(sums, x, model.shapes[name], all ? null : rankOf(name));
  let x = { width: model.width, needsGradient };

  let y = norm(sums, model, x, all);
  const q = linear(y, "q_proj");
  const k = linear(y, "k_proj");
  const v = linear(y, "v_proj");
  for (const turned of [q, k]) {
    if (model.rotary && turned.needsGradient) {
      // Their cos and sin.
      sums.byPosition += 2 * (q.width / model.heads);
    }
  }
  const mixed = { width: q.width, needsGradient: [q, k, v].some((value) => value.needsGradient) };
  if (mixed.needsGradient) {
    // Copies in the order of heads, and of each row of scores the largest and the sum.
    sums.byRow += q.width + k.width + v.width + 2 * model.heads;
    keep(sums, mixed);
  }
  y = linear(mixed, "o_proj");
  x = { width: model.width, needsGradient: x.needsGradient || y.needsGradient };

  y = norm(sums, model, x, all);
  const inner = ["gate_proj", "up_proj"].filter((name) => name in model.shapes).map((name) => linear(y, name));
  for (const value of inner) {
    // The derivative of what is between the linears.
    sums.byRow += value.needsGradient ? value.width : 0;
  }
  const bent = { width: inner[0].width, needsGradient: inner.some((value) => value.needsGradient) };
  y = linear(bent, "down_proj");
  return { ...sums, needsGradient: x.needsGradient || y.needsGradient };
}

function norm(sums, model, x, trained) {
  const y = { width: x.width, needsGradient: x.needsGradient || trained };
  if (!y.needsGradient) {
    return y;
  }
  if (model.norm === "LayerNorm") {
    // x without its mean, over its deviation; and ones by which numbers are summed over channels.
    sums.byRow += x.width;
    sums.fixed += x.needsGradient ? x.width : 0;
  } else {
    keep(sums, y);
    // x / rms, unless it can be told from y: then the weight may not change.
    sums.byRow += trained ? x.width : 0;
  }
  sums.byRow += x.needsGradient ? 1 : 0;
  return y;
}

// rank: that of its adapter, 0 for none; null: the weight itself is trained.
function keptByLinear(sums, x, shape, rank) {
  const trained = rank === null;
  if (trained || rank > 0) {
    keep(sums, x);
  }
  if (rank > 0) {
    // What B reads.
    sums.byRow += rank;
  }
  return { width: shape.out, needsGradient: x.needsGradient || trained || rank > 0 };
}
