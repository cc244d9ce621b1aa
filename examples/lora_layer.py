"""The LoRA layer in fifteen lines, and what it looks like before training.

You learn what the two matrices are, that attaching them changes nothing at first, which numbers are
trained and how many there are, and why the first step can only move B. The layer written here is
equal to the library's, to the bit. Takes about a second.

    python examples/lora_layer.py [--quick] [--seed 0]
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import math

import numpy as np

from minilora import GPT, GPTConfig, LoRAConfig, Tensor, attach, init_adapter, no_grad
from minilora.functional import linear

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="a smaller model")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
rng = np.random.default_rng(args.seed)

# 1. The layer. The weight stays as it is; beside it, x goes down to r numbers through A and up
# again through B. It needs no gradient of its own: it is made of `linear`s, and they have theirs.


class LoRALayer:
    """y = x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ

    W (out, in) and b (out,) are frozen, A (r, in) and B (out, r) are trained.
    """

    def __init__(self, weight, bias, r, alpha, rng):
        n_out, n_in = weight.shape
        # No requires_grad: no edge in the graph, no gradient.
        self.weight = Tensor(weight)
        self.bias = Tensor(bias)
        bound = 1 / math.sqrt(n_in)
        A = rng.uniform(-bound, bound, (r, n_in)).astype(weight.dtype)
        B = np.zeros((n_out, r), weight.dtype)
        self.lora_A = Tensor(A, requires_grad=True)
        self.lora_B = Tensor(B, requires_grad=True)
        self.scaling = alpha / r

    def __call__(self, x):
        thin = linear(x, self.lora_A)  # (..., in) -> (..., r)
        return linear(x, self.weight, self.bias) + linear(thin * self.scaling, self.lora_B)


# 2. A model with random weights: nothing below depends on what it has learnt.
C = 16 if args.quick else 128
n_layer = 2 if args.quick else 4
r = 2 if args.quick else 8
config = GPTConfig(n_layer=n_layer, n_head=2, n_embd=C, vocab_size=50, block_size=16)
base = GPT(config, rng)

# The library's LoRA layer in one place of it, and ours on the same weight. From the same seed both
# draw the same A. Both get the same B, not zero, so that there is an update to compare.
one_target = LoRAConfig(r=r, alpha=2 * r, target_modules=["h.0.attn.q_proj"])
one_pair = init_adapter(base, one_target, np.random.default_rng(args.seed))
library_layer = attach(base, one_pair).h[0].attn.q_proj
q_proj = base.h[0].attn.q_proj
rng_for_A = np.random.default_rng(args.seed)
layer = LoRALayer(q_proj.weight.data, q_proj.bias.data, r, 2 * r, rng_for_A)
assert np.array_equal(layer.lora_A.data, library_layer.pair.lora_A.data)
B = rng.standard_normal((C, r))
layer.lora_B.data[:] = B
library_layer.pair.lora_B.data[:] = B
x = Tensor(rng.standard_normal((3, 7, C)).astype(np.float32))
layer_gap = np.abs(layer(x).data - library_layer(x).data).max()
assert layer_gap == 0

# 3. Attach a fresh adapter to every attention projection: B is zero, so the logits do not change by
# a single bit.
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
adapter = init_adapter(base, LoRAConfig(r=r, alpha=2 * r, target_modules=target_modules), rng)
model = attach(base, adapter)
ids = rng.integers(0, config.vocab_size, (2, 12))
with no_grad():
    change = np.abs(model(ids).data - base(ids).data).max()

# 4. Who is trainable? What was attached, and nothing else. How much? r numbers per row of in, and r
# per row of out.
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)
predicted = 0
for name, module in base.named_modules():
    if name.rpartition(".")[2] in target_modules:
        n_out, n_in = module.weight.shape
        predicted += r * (n_in + n_out)
counted = sum(p.size for p in trainable.values())
percent = 100 * counted / sum(p.size for p in base.parameters())

# 5. One backward pass. A sits behind B = 0, so nothing reaches it yet; B is what the first step
# moves.
model.loss(ids[:, :-1], ids[:, 1:]).backward()
dA = max(np.abs(pair.lora_A.grad).max() for pair in adapter.pairs.values())
dB = max(np.abs(pair.lora_B.grad).max() for pair in adapter.pairs.values())

row = "{:<56}{:>24}".format
n_tensors = f"{len(trainable)} of {len(model.parameters())}"
print(row("fifteen lines against the library, largest difference", layer_gap))
print(row("logits after attaching, largest change", change))
print(row("tensors trained, all of them lora_A or lora_B", n_tensors))
print(row("numbers trained, predicted: sum of r * (in + out)", f"{predicted:,}"))
print(row("numbers trained, counted from the arrays", f"{counted:,} ({percent:.2f} % of the base)"))
print(row("largest |dL/dA| before the first step", dA))
print(row("largest |dL/dB| before the first step", f"{dB:.2e}"))
