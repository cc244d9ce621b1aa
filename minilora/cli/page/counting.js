// From the shapes of a model to numbers and bytes, and numbers as text. Knows no page.
//
// A model is {name, total, linears}: `linears` has, for each kind of linear layer, its {name, in,
// out, layers}. Both come from the models themselves, counted when this page was made.

// How many numbers LoRA of rank r adds to one linear of each kind, to all, and beside how many.
function countLora(model, r, targets) {
  const chosen = model.linears.filter(({ name }) => targets.includes(name));
  const kinds = chosen.map((linear) => {
    const pair = r * (linear.in + linear.out);
    return { ...linear, pair, numbers: linear.layers * pair, breakEven: breakEven(linear) };
  });
  const trainable = total(kinds.map(({ numbers }) => numbers));
  const adapted = total(kinds.map((linear) => linear.layers * linear.in * linear.out));
  return { kinds, trainable, adapted, all: model.total + trainable };
}

// Below this rank, r · (in + out) < in · out: the pair is smaller than the matrix.
function breakEven(linear) {
  return (linear.in * linear.out) / (linear.in + linear.out);
}

function total(numbers) {
  return numbers.reduce((sum, number) => sum + number, 0);
}

// Numbers as text. A number and its unit stay on one line.

const SPACE = "\u00a0";

function whole(number) {
  return number.toLocaleString("en-US", { maximumFractionDigits: 0 });
}

// About three digits: 0.0853, 1.86, 95.8; and what is nearly all is not rounded to all.
function percent(share) {
  const value = 100 * share;
  if (value > 99 && value < 100) {
    const missing = 100 - value;
    const rounded = 100 - Number(missing.toPrecision(2));
    return `${rounded.toFixed(decimalsOf(missing))}${SPACE}%`;
  }
  return `${Number(value.toPrecision(3))}${SPACE}%`;
}

// How many decimals two digits of a small number take.
function decimalsOf(value) {
  return Math.max(0, 1 - Math.floor(Math.log10(value)));
}

function oneDecimal(number) {
  return number.toLocaleString("en-US", { maximumFractionDigits: 1 });
}

// As human_bytes of minilora/memory.py: three digits, and 1 kB is 1,000 bytes.
function bytesText(bytes) {
  return withPrefix(bytes, "B");
}

function flopsText(flops) {
  return withPrefix(flops, "FLOP");
}

function withPrefix(number, name) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"];
  let power = 0;
  let value = number;
  while (value >= 999.5 && power < prefixes.length - 1) {
    value /= 1000;
    power += 1;
  }
  let decimals = 2;
  if (power === 0 || value >= 99.95) {
    decimals = 0;
  } else if (value >= 9.995) {
    decimals = 1;
  }
  const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
  return `${value.toLocaleString("en-US", digits)}${SPACE}${prefixes[power]}${name}`;
}

// Three digits, without an exponent as long as it is shorter.
function shortNumber(value) {
  if (value === 0) {
    return "0";
  }
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
}
