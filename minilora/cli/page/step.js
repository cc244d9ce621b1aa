// The memory and the work of a training step, as `minilora count` counts them. Knows shapes, and no
// page.
//
// A tensor is followed through a block. A layer whose weight gets a gradient keeps its input for
// backward, once for all layers that read it; one that is frozen keeps nothing for its weight, and
// computes no gradient of it. A value is {width, needsGradient, kept}.

// Where numbers have 16 bits, Adam's moments, and a copy of what is trained, are in float32.
const FLOAT32 = 4;
// Bytes of a token id or a position.
const ID_BYTES = 8;

// {full, LoRA, QLoRA}, each {weights, gradients, moments, master, activations} in bytes.
function memoryOf(model, settings, counted) {
  const size = bytesOfNumber(settings.dtype);
  const { batch, length, r, targets } = settings;
  const kept = (rankOf) => stepOf(model, rankOf, batch, length, size).kept;
  const ofAdapter = kept(ranksOf(r, targets));
  const frozen = model.total * size;
  const packed = model.packed_bytes + (model.total - model.packed_numbers) * size;
  return {
    full: trainingBytes(model.total, 0, size, kept(null)),
    LoRA: trainingBytes(counted.trainable, frozen, size, ofAdapter),
    QLoRA: trainingBytes(counted.trainable, packed, size, ofAdapter),
  };
}

// {full, LoRA}: the FLOPs of a step, forward and backward together.
function workOf(model, { batch, length, r, targets }) {
  const work = (rankOf) => stepOf(model, rankOf, batch, length, FLOAT32).flops;
  return { full: work(null), LoRA: work(ranksOf(r, targets)) };
}

function ranksOf(r, targets) {
  return (name) => (targets.includes(name) ? r : 0);
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

// {kept, flops} of a step: bytes kept between forward and backward, and what is multiplied and
// added in products of matrices. rankOf(name) is the rank of the adapter on a linear, 0 for none;
// null instead of it: all of the model is trained.
function stepOf(model, rankOf, batch, length, size) {
  const all = rankOf === null;
  const first = costOfBlock(model, rankOf, all, length);
  // All further blocks are alike.
  const later = costOfBlock(model, rankOf, first.needsGradient, length);
  const head = costOfHead(model, all, later.needsGradient);
  const rows = batch * length;
  const scores = 2 * batch * pairs(length);
  let numbers = 0;
  let flops = 0;
  for (const [cost, times] of [
    [first, 1],
    [later, model.layers - 1],
    [head, 1],
  ]) {
    numbers += times * (rows * cost.byRow + length * cost.byPosition + cost.fixed);
    flops += times * (rows * cost.flopsByRow + scores * cost.flopsByScore);
  }
  // A table that is trained keeps the ids of its rows.
  const ids = all ? rows + (model.rotary ? 0 : length) : 0;
  return { kept: numbers * size + ids * ID_BYTES, flops };
}

// How many scores a head computes: each block of queries meets the keys that its last one sees.
function pairs(length) {
  let sum = 0;
  for (let start = 0; start < length; start += DATA.query_block) {
    const stop = Math.min(start + DATA.query_block, length);
    sum += (stop - start) * stop;
  }
  return sum;
}

// Numbers kept for each row of the batch, for each position, and besides; FLOPs for each row, and
// for each score.
function noCost() {
  return { byRow: 0, byPosition: 0, fixed: 0, flopsByRow: 0, flopsByScore: 0 };
}

// The array of a value is kept, if it is not yet.
function keep(sums, value) {
  if (!value.kept) {
    value.kept = true;
    sums.byRow += value.width;
  }
}

// x + attention(norm(x)), then x + mlp(norm(x)).
function costOfBlock(model, rankOf, needsGradient, length) {
  const sums = noCost();
  const all = rankOf === null;
  const linear = (x, name) => addLinear(sums, x, model.shapes[name], all ? null : rankOf(name));
  let x = { width: model.width, needsGradient };

  let y = addNorm(sums, model, x, all);
  const q = linear(y, "q_proj");
  const k = linear(y, "k_proj");
  const v = linear(y, "v_proj");
  for (const turned of [q, k]) {
    if (model.rotary && turned.needsGradient) {
      // Their cos and sin.
      sums.byPosition += 2 * (q.width / model.heads);
    }
  }
  // The scores, and the sums of values; backward four gradients.
  sums.flopsByScore += 2 * q.width;
  const mixed = { width: q.width, needsGradient: [q, k, v].some((value) => value.needsGradient) };
  if (mixed.needsGradient) {
    // Copies in the order of heads, and of each row of scores the largest and the sum.
    sums.byRow += q.width + k.width + v.width + 2 * model.heads;
    sums.flopsByScore += 4 * q.width;
    if (length <= DATA.query_block) {
      // Of so few positions the scores themselves are kept.
      sums.byRow += model.heads * length;
    } else {
      // The scores once more.
      sums.flopsByScore += q.width;
    }
    keep(sums, mixed);
  }
  y = linear(mixed, "o_proj");
  x = { width: model.width, needsGradient: x.needsGradient || y.needsGradient };

  y = addNorm(sums, model, x, all);
  const inner = ["gate_proj", "up_proj"]
    .filter((name) => name in model.shapes)
    .map((name) => linear(y, name));
  for (const value of inner) {
    // The derivative of what is between the linears.
    sums.byRow += value.needsGradient ? value.width : 0;
  }
  const bent = { width: inner[0].width, needsGradient: inner.some((value) => value.needsGradient) };
  y = linear(bent, "down_proj");
  return { ...sums, needsGradient: x.needsGradient || y.needsGradient };
}

function addNorm(sums, model, x, trained) {
  const y = { width: x.width, needsGradient: x.needsGradient || trained };
  if (!y.needsGradient) {
    return y;
  }
  if (model.norm === "LayerNorm") {
    // x without its mean, over its deviation.
    sums.byRow += x.width;
  } else {
    keep(sums, y);
    // x / rms, unless it can be told from y: then the weight may not change.
    sums.byRow += trained ? x.width : 0;
  }
  sums.byRow += x.needsGradient ? 1 : 0;
  return y;
}

// A linear, and the adapter beside it. rank: that of the adapter, 0 for none; null: the weight itself
// is trained.
function addLinear(sums, x, shape, rank) {
  const y = addProduct(sums, x, shape.in, shape.out, rank === null);
  if (rank > 0) {
    const thin = addProduct(sums, x, shape.in, rank, true);
    addProduct(sums, thin, rank, shape.out, true);
    y.needsGradient = true;
  }
  return y;
}

// y = x Wᵀ. The gradient of x needs W alone; that of W needs x, which is kept.
function addProduct(sums, x, widthIn, widthOut, trained) {
  const gradients = (x.needsGradient ? 1 : 0) + (trained ? 1 : 0);
  sums.flopsByRow += (1 + gradients) * 2 * widthIn * widthOut;
  if (trained) {
    keep(sums, x);
  }
  return { width: widthOut, needsGradient: x.needsGradient || trained };
}

// The last norm, the head, and the loss, whose gradients are kept: of the states, and of the table.
function costOfHead(model, trained, needsGradient) {
  const sums = noCost();
  const states = addNorm(sums, model, { width: model.width, needsGradient }, trained);
  const table = model.vocabulary * model.width;
  const gradients = (states.needsGradient ? 1 : 0) + (trained ? 1 : 0);
  sums.flopsByRow += (1 + gradients) * 2 * table;
  sums.byRow += states.needsGradient ? model.width : 0;
  sums.fixed += trained ? table : 0;
  return sums;
}
