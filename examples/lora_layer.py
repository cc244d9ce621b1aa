"""The LoRA layer in fifteen lines, equal to the library's to the bit, and what it looks like before training.

You learn what the two matrices are, that attaching them changes nothing at first, which numbers are trained and how
many there are, and why the first step can only move B. Takes about a second.

    python examples/lora_layer.py [--quick] [--seed 0]
"""

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

# 1. The layer. The weight stays as it is; beside it, x goes down to r numbers through A and up again through B.
# It needs no gradient of its own: it is made of `linear`s, and they have theirs.


class LoRALayer:
    """y = x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ with W (out, in) frozen, A (r, in) and B (out, r) trained."""

    def __init__(self, weight, bias, r, alpha, rng):
        self.weight = Tensor(weight)  # no requires_grad: no edge, no gradient
        self.bias = Tensor(bias)
        bound = 1 / math.sqrt(weight.shape[1])
        A = rng.uniform(-bound, bound, (r, weight.shape[1])).astype(weight.dtype)
        self.lora_A = Tensor(A, requires_grad=True)
        self.lora_B = Tensor(np.zeros((weight.shape[0], r), weight.dtype), requires_grad=True)
        self.scaling = alpha / r

    def __call__(self, x):
        thin = linear(x, self.lora_A)  # (..., in) -> (..., r)
        return linear(x, self.weight, self.bias) + linear(thin * self.scaling, self.lora_B)


# 2. A model with random weights (nothing below depends on what it has learnt), and an adapter made by the library
# for one of its layers. From the same seed both draw the same A. B is filled so that there is something to compare.
C, n_layer, r = (16, 2, 2) if args.quick else (128, 4, 8)
gpt = GPTConfig(n_layer=n_layer, n_head=2, n_embd=C, vocab_size=50, block_size=16)
base = GPT(gpt, rng)
one = LoRAConfig(r=r, alpha=2 * r, target_modules=["h.0.attn.q_proj"])
adapter = init_adapter(base, one, np.random.default_rng(args.seed))
theirs = attach(base, adapter).h[0].attn.q_proj
mine = LoRALayer(theirs.linear.weight.data, theirs.linear.bias.data, r, 2 * r, np.random.default_rng(args.seed))
assert np.array_equal(mine.lora_A.data, theirs.pair.lora_A.data)
mine.lora_B.data[:] = theirs.pair.lora_B.data[:] = rng.standard_normal((C, r))
x = Tensor(rng.standard_normal((3, 7, C)).astype(np.float32))
layer_gap = np.abs(mine(x).data - theirs(x).data).max()
assert layer_gap == 0

# 3. Attach a fresh adapter to every attention projection: B is zero, so the logits do not change by a single bit.
config = LoRAConfig(r=r, alpha=2 * r, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
adapter = init_adapter(base, config, rng)
model = attach(base, adapter)
ids = rng.integers(0, gpt.vocab_size, (2, 12))
with no_grad():
    change = np.abs(model(ids).data - base(ids).data).max()

# 4. Who is trainable? What was attached, and nothing else. How much? r numbers per row of in, and r per row of out.
trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)
shapes = [module.weight.shape for name, module in base.named_modules() if name.endswith("_proj") and ".attn." in name]
predicted = sum(r * (n_in + n_out) for n_out, n_in in shapes)
counted = sum(p.size for p in trainable.values())
total = sum(p.size for p in base.parameters())

# 5. One backward pass. A sits behind B = 0, so nothing reaches it yet; B is what the first step moves.
model.loss(ids[:, :-1], ids[:, 1:]).backward()
dA = max(np.abs(pair.lora_A.grad).max() for pair in adapter.pairs.values())
dB = max(np.abs(pair.lora_B.grad).max() for pair in adapter.pairs.values())

row = "{:<56}{:>24}".format
print(row("fifteen lines against the library, largest difference", layer_gap))
print(row("logits after attaching, largest change", change))
print(row("tensors trained, all of them lora_A or lora_B", f"{len(trainable)} of {len(model.parameters())}"))
print(row("numbers trained, predicted: sum of r * (in + out)", f"{predicted:,}"))
print(row("numbers trained, counted from the arrays", f"{counted:,} ({100 * counted / total:.2f} % of the base)"))
print(row("largest |dL/dA| before the first step", dA))
print(row("largest |dL/dB| before the first step", f"{dB:.2e}"))
