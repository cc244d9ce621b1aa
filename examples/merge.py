"""Merging an adapter into the weights: what is exact, what it saves, and how to undo it.

You learn that merged and attached are one function up to rounding, with a bound you can compute;
that merging buys back the adapter's latency; and that un-merging by subtraction does not give the
weights back. Weights and adapters are random numbers: nothing here depends on what they have
learnt. Takes two seconds.

    python examples/merge.py [--quick] [--seed 0]
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import time
from statistics import median

import numpy as np

from minilora import GPT, GPTConfig, LoRAConfig, Tensor, attach, init_adapter, merge, no_grad
from minilora.lora import LoRALinear, LoRAPair
from minilora.nn import Linear

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="smaller layers, fewer timings")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
rng = np.random.default_rng(args.seed)
n_in = 48 if args.quick else 256
n_out = 32 if args.quick else 192
r = 4 if args.quick else 8


def lora_layer(W, A, B, scaling):
    return LoRALinear(Linear(Tensor(W)), LoRAPair(Tensor(A), Tensor(B), scaling))


def largest_gaps(layer, x):
    """How far merged and attached are apart, number by number."""
    attached = layer(Tensor(x)).data
    merged = layer.merged()(Tensor(x)).data
    return np.abs(attached.astype(np.float64) - merged)


# 1. On small whole numbers and a power-of-two scale float32 makes no rounding error at all
# (everything below 2^24 is exact), so merged and attached must agree to the bit. A transposed,
# dropped or doubly scaled update could not.
whole = lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)
W = whole(n_out, n_in)
A = whole(r, n_in)
B = whole(n_out, r)
x = whole(20, n_in)
scaling = 2.0
assert ((np.abs(W) + scaling * np.abs(B) @ np.abs(A)) @ np.abs(x.T)).max() <= 2**24
whole_gap = largest_gaps(lora_layer(W, A, B, scaling), x).max()
assert whole_gap == 0

# 2. On real numbers both paths round, each by at most
#     gamma(n_in + 1) |W||x| + gamma(n_in + r + 2) scaling |B||A||x|
# (Higham 2002, section 3.5; gamma(k) = k u / (1 - k u), u = 2^-24). So they differ by at most twice
# that, number by number.
real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
W = real(n_out, n_in)
A = real(r, n_in)
B = real(n_out, r)
x = real(20, n_in)
scaling = float(np.float32(0.7))
gaps = largest_gaps(lora_layer(W, A, B, scaling), x)
u = 2.0**-24
gamma = lambda k: k * u / (1 - k * u)
size = lambda array: np.abs(array).astype(np.float64)
through_W = size(x) @ size(W).T
through_AB = scaling * (size(x) @ size(A).T) @ size(B).T
bound = 2 * (gamma(n_in + 1) * through_W + gamma(n_in + r + 2) * through_AB)
assert (gaps <= bound).all()

# 3. Latency. One token through a GPT, as it was, with an adapter on every linear layer, and merged;
# taken in turns, so that whatever else the machine is doing falls on all three alike.
C = 64 if args.quick else 256
base = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=C, vocab_size=256, block_size=32), rng)
adapter = init_adapter(base, LoRAConfig(r=r, alpha=r, target_modules="all-linear"), rng)
for pair in adapter.pairs.values():
    pair.lora_B.data[:] = 0.1 * real(*pair.lora_B.shape)
attached = attach(base, adapter)
models = {"base": base, "attached": attached, "merged": merge(attached)}
ids = rng.integers(0, 256, (1, 1))
seconds = {name: [] for name in models}
with no_grad():
    for _ in range(15 if args.quick else 100):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            seconds[name].append(time.perf_counter() - start)
latency = {name: median(values) for name, values in seconds.items()}

# 4. Undoing it. Others add the update into W and later subtract it; each time some bits are lost.
# Here a merge makes a weight of its own and W is never written, so going back is going on with W.
# How many numbers are not the same after?
original = W.copy()
percent_changed = lambda w: 100 * (w.view(np.uint32) != original.view(np.uint32)).mean()
served = W.copy()
# The percentage after each adapter.
subtracted = []
kept = []
for _ in range(100):
    # Another adapter each time.
    A = real(r, n_in)
    B = real(n_out, r)
    update = np.float32(0.02) * (B @ A)
    served += update
    served -= update
    subtracted.append(percent_changed(served))
    lora_layer(W, A, B, 0.02).merged()
    kept.append(percent_changed(W))
update_size = 100 * np.linalg.norm(update) / np.linalg.norm(original)

row = "{:<46}{:>14}   {}".format
print(row("merged against attached, float32", "largest gap", "allowed"))
print(row(f"  whole numbers, {n_out} x {n_in}, r={r}", f"{whole_gap:.0f}", "0: nothing is rounded"))
allowed = f"{bound.max():.2e}, and each number its own bound"
print(row(f"  real numbers, {n_out} x {n_in}, r={r}", f"{gaps.max():.2e}", allowed))
print(row("one token through a GPT, median", "ms", "against base"))
for name, t in latency.items():
    print(row(f"  {name}", f"{1e3 * t:.3f}", f"{t / latency['base']:.2f} x"))
title = f"weights with other bits (update {update_size:.0f} % of W)"
print(row(title, "after 1 merge", "after 100 different adapters"))
print(row("  un-merged by subtraction", f"{subtracted[0]:.1f} %", f"{subtracted[-1]:.1f} %"))
print(row("  W kept, the merge made beside it", f"{kept[0]:.0f} %", f"{kept[-1]:.0f} %"))
