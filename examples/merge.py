"""Merging an adapter into the weights: what is exact, what is only close, what it saves, and how to undo it.

You learn that merged and attached are one function up to rounding, with a bound you can compute; that merging buys
back the adapter's latency; and that un-merging by subtraction does not give the weights back. Takes two seconds.
Weights and adapters are random numbers: nothing here depends on what they have learnt.

    python examples/merge.py [--quick] [--seed 0]
"""

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
n, m, r, repeats = (48, 32, 4, 15) if args.quick else (256, 192, 8, 100)


def layer_of(W, A, B, s):
    return LoRALinear(Linear(Tensor(W)), LoRAPair(Tensor(A), Tensor(B), s))


# 1. On small whole numbers and a power-of-two scale float32 makes no rounding error at all (everything below 2^24 is
# exact), so merged and attached must agree to the bit. A transposed, dropped or doubly scaled update could not.
whole = lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)
W, A, B, x, s = whole(m, n), whole(r, n), whole(m, r), whole(20, n), 2.0
assert ((np.abs(W) + s * np.abs(B) @ np.abs(A)) @ np.abs(x.T)).max() <= 2**24
layer = layer_of(W, A, B, s)
lattice_gap = np.abs(layer(Tensor(x)).data - layer.merged()(Tensor(x)).data).max()
assert lattice_gap == 0

# 2. On real numbers both paths round, each by at most gamma(n+1) |W||x| + gamma(n+r+2) s |B||A||x| (Higham 2002,
# section 3.5; gamma(k) = k u / (1 - k u), u = 2^-24). So they differ by at most twice that, element by element.
real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
W, A, B, x, s = real(m, n), real(r, n), real(m, r), real(20, n), float(np.float32(0.7))
layer, u = layer_of(W, A, B, s), 2.0**-24
gap = np.abs(layer(Tensor(x)).data - layer.merged()(Tensor(x)).data).astype(np.float64)
gamma = lambda k: k * u / (1 - k * u)
aW, aA, aB, ax = (np.abs(a).astype(np.float64) for a in (W, A, B, x))
bound = 2 * (gamma(n + 1) * ax @ aW.T + gamma(n + r + 2) * s * (ax @ aA.T) @ aB.T)
assert (gap <= bound).all()

# 3. Latency. One token through a GPT, as it was, with an adapter on every linear layer, and merged; taken in turns,
# so that whatever else the machine is doing falls on all three alike.
C = 64 if args.quick else 256
gpt = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=C, vocab_size=256, block_size=32), rng)
adapter = init_adapter(gpt, LoRAConfig(r=r, alpha=r, target_modules="all-linear"), rng)
for pair in adapter.pairs.values():
    pair.lora_B.data[:] = 0.1 * real(*pair.lora_B.shape)
models, ids = {"base": gpt, "attached": attach(gpt, adapter)}, rng.integers(0, 256, (1, 1))
models["merged"] = merge(models["attached"])
seconds = {name: [] for name in models}
with no_grad():
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            seconds[name].append(time.perf_counter() - start)
times = {name: median(values) for name, values in seconds.items()}

# 4. Undoing it. Others add the update into W and later subtract it; each time some bits are lost. Here a merge makes a
# weight of its own and W is never written, so going back is going on with W. How many numbers are not the same after?
original, served, differ = W.copy(), W.copy(), lambda w: 100 * (w.view(np.uint32) != original.view(np.uint32)).mean()
subtracted, kept = {}, {}
for k in range(1, 101):
    A, B = real(r, n), real(m, r)  # another adapter each time
    update = np.float32(0.02) * (B @ A)
    served += update
    served -= update
    layer_of(W, A, B, 0.02).merged()
    subtracted[k], kept[k] = differ(served), differ(W)
size = np.linalg.norm(update) / np.linalg.norm(original)

row = "{:<46}{:>14}   {}".format
print(row("merged against attached, float32", "largest gap", "allowed"))
print(row(f"  whole numbers, {m} x {n}, r={r}", f"{lattice_gap:.0f}", "0: nothing is rounded"))
print(row(f"  real numbers, {m} x {n}, r={r}", f"{gap.max():.2e}", f"{bound.max():.2e}, and each number its own bound"))
print(row("one token through a GPT, median", "ms", "against base"))
for name, t in times.items():
    print(row(f"  {name}", f"{1e3 * t:.3f}", f"{t / times['base']:.2f} x"))
print(row(f"weights with other bits (update {100 * size:.0f} % of W)", "after 1 merge", "after 100 different adapters"))
print(row("  un-merged by subtraction", f"{subtracted[1]:.1f} %", f"{subtracted[100]:.1f} %"))
print(row("  W kept, the merge made beside it", f"{kept[1]:.0f} %", f"{kept[100]:.0f} %"))
