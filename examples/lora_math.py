"""The mathematics of LoRA, in numbers: shapes, a forward pass, and what a rank r can reach at best.

You learn how many numbers A and B have, and from which r on they are more than W; the forward pass
number by number; that a student of rank r, trained by hand, ends exactly where Eckart and Young say
that it must, in theory no better and in practice no worse; that LoRA is equal to full fine-tuning
where the update has rank r; and why `BAx` with A (d, r) and B (r, d), which some tutorials print,
does not exist. What this does not tell is how large the rank of a real update is: see spectrum.py.

    python examples/lora_math.py [--quick] [--seed 0] [--seeds 3]

Takes a second or two, with --quick or without: what is trained here are small matrices.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab
from course.picture import COLOURS, with_range

from minilora import GPT, GPTConfig, Tensor, attach
from minilora.compose import extract
from minilora.lora import LoRALinear, LoRAPair, linear_names
from minilora.nn import Linear

run = lab.begin(__file__, __doc__, with_base=False, backends=["numpy"])

# %% How many numbers. W (out, in) has out·in, and A and B together r (in + out): fewer only below
# the rank at which both are equal. Of a square W with d rows, the saving is d / (2r).
shapes = [(128, 128, 8), (1024, 1024, 8), (4096, 4096, 8), (768, 768, 16), (1024, 4096, 8)]
for n_out, n_in, r in shapes:
    full = n_out * n_in
    lora = r * (n_in + n_out)
    break_even = full / (n_in + n_out)
    print(
        f"W {n_out} x {n_in}: {full:>10,}   A, B at r={r:<2}: {lora:>6,}, "
        f"{100 * lora / full:.2f} %, {full / lora:.0f} times fewer"
        f"   as many as W at r = {break_even:,.0f}"
    )

# %% The forward pass. Whole numbers, so that nothing is rounded and == may be asked for.
W = np.array([[1.0, 0, 2], [0, 1, -1]])
A = np.array([[1.0, -1, 1]])
B = np.array([[2.0], [1]])
x = np.array([3.0, 1, 2])
alpha = 2
r = len(A)
layer = LoRALinear(Linear(Tensor(W)), LoRAPair(Tensor(A), Tensor(B), alpha / r))
merged_W = W + alpha / r * B @ A
update = alpha / r * (B @ (A @ x))
print(f"\nx (3,) = {x}, W (2, 3), A (1, 3), B (2, 1), alpha / r = {alpha} / {r}")
print(f"W x = {W @ x}   A x = {A @ x}   B (A x) = {B @ (A @ x)}   times {alpha / r:g} = {update}")
print(f"y = W x + (alpha / r) B A x = {layer(Tensor(x)).data}   merged: {merged_W @ x}")
assert (layer(Tensor(x)).data == merged_W @ x).all()

# %% The other shapes, A (d, r) and B (r, d): B A is (r, r), and no x of d numbers fits behind it.
d = 6
A = np.ones((d, 2))
B = np.ones((2, d))
try:
    B @ A @ np.ones(d)
except ValueError as error:
    wrong_shapes = str(error)
print(
    f"\nA (6, 2), B (2, 6), x (6,), as printed elsewhere: B @ A @ x\n    ValueError: {wrong_shapes}"
)


# %% What is the best update of rank r? A teacher of rank 8 is imitated by students. The sum of the
# squared errors of a student is at least that of the singular values it has no room for (Eckart
# and Young 1936), and a student that is trained finds that floor: above it is no trap.
def teacher(rng):
    """ΔW (32, 24) with the singular values 8, 7, ..., 1."""
    U, _ = np.linalg.qr(rng.standard_normal((32, 8)))
    V, _ = np.linalg.qr(rng.standard_normal((24, 8)))
    return U * np.arange(8, 0, -1) @ V.T


def student(target, r, rng):
    """The squared error of B A after STEPS steps of gradient descent from LoRA's start."""
    n_out, n_in = target.shape
    A = rng.uniform(-1, 1, (r, n_in)) / n_in**0.5
    B = np.zeros((n_out, r))
    for _ in range(STEPS):
        error = B @ A - target
        # The derivatives of half the squared error by hand.
        dB = error @ A.T
        dA = B.T @ error
        A -= 0.05 * dA
        B -= 0.05 * dB
    return float(((B @ A - target) ** 2).sum())


STEPS = 2000
ranks = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16]
rows = []
for r in ranks:
    row = {"name": f"r={r}", "r": r, "numbers": r * (24 + 32), "floor": [], "trained": []}
    for seed in run.seeds:
        rng = np.random.default_rng((seed, r))
        target = teacher(np.random.default_rng(seed))
        singular_values = np.linalg.svd(target, compute_uv=False)
        row["floor"].append(float((singular_values[r:] ** 2).sum()))
        row["trained"].append(student(target, r, rng))
    gaps = [ended - floor for ended, floor in zip(row["trained"], row["floor"], strict=True)]
    # Neither below the floor nor above it, by more than rounding.
    assert max(map(abs, gaps)) < 1e-9
    row["gap"] = gaps
    rows.append(row)


# %% Where the update has rank r, LoRA is full fine-tuning. One step of SGD on four tokens adds to
# each weight a sum of four outer products: rank 4, in every linear of a whole GPT.
rng = np.random.default_rng(run.seeds[0])
config = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=20, block_size=8)
base = GPT(config, rng, "float64")
ids = rng.integers(0, 20, (1, 5))
tuned = base.trainable_copy()
tuned.loss(ids[:, :-1], ids[:, 1:]).backward()
for name in linear_names(tuned):
    weight = tuned.state_dict()[f"{name}.weight"]
    weight -= dict(tuned.named_parameters())[f"{name}.weight"].grad

new_ids = rng.integers(0, 20, (3, 8))
extracted = []
for r in (1, 2, 3, 4):
    adapter, errors, _ = extract(base, tuned, r)
    gap = attach(base, adapter)(new_ids).data - tuned(new_ids).data
    error = max(lost.relative for lost in errors.values())
    extracted.append({"r": r, "lost": error, "logit_gap": float(np.abs(gap).max())})
    print(
        f"LoRA of rank {r} taken out of a fully tuned GPT: it lacks at most {100 * error:.2g} % "
        f"of an update; logits differ by {extracted[-1]['logit_gap']:.1e}"
    )
assert extracted[-1]["logit_gap"] < 1e-12 < 1e-3 < extracted[0]["logit_gap"]
print()


# %%
def draw(figure):
    """The squared error that is left against r: the floor as a line, the students as dots."""
    axes = figure.subplots()
    axes.plot(ranks, [np.mean(row["floor"]) for row in rows], marker="", label="floor, by theory")
    style = {"linestyle": "", "color": COLOURS[1], "markersize": 9}
    with_range(axes, ranks, [row["trained"] for row in rows], "students, trained", **style)
    axes.axvline(8, color=COLOURS[6], linestyle=":", marker="", label="the teacher's rank")
    axes.set_xticks(ranks, ranks)
    axes.set(xlabel="rank r of the student", ylabel="squared error that is left")
    axes.legend()


columns = {
    "name": ("student", ""),
    "numbers": ("numbers", ",d"),
    "floor": ("floor", ".1f"),
    "trained": ("trained", ".1f"),
    "gap": ("above the floor", ".0e"),
}
setting = (
    f"A teacher ΔW (32, 24) of rank 8 with the singular values 8 to 1; students B A of rank r, "
    f"{STEPS} steps of gradient descent from a random A and B = 0, in float64."
)
run.finish(setting, columns, rows, draw, wrong_shapes=wrong_shapes, extracted=extracted)

# %% Exercises, each with its answer in README.md of this folder.
# 1. In `student`, start with A = 0 too. Where does it end, and which line of the gradient says why?
# 2. In minilora/lora.py, `delta` returns `self.scaling * (B @ A)`. Remove the scaling: which tests
#    fail? And why does attaching a fresh adapter still change nothing?
