"""What is alpha for? A first step of LoRA at rank 1 to 64, scaled in four ways, by SGD or Adam.

You learn that with alpha / r a first step by Adam lowers the loss about equally at every rank, and
with alpha / √r one by SGD, though the update itself is of another size; that "alpha = 2r" is no
scaling at all, written in a longer way; and what happens to a layer whose A is drawn for the wrong
axis. What this does not tell is which alpha is best: alpha and the learning rate do one job, and
the lab on the rank tunes the rate.

    python examples/alpha.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes under a minute, and as much for each further seed.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import with_range

from minilora import Adam, LoRAConfig, Tensor, attach, init_adapter, no_grad
from minilora.functional import linear

run = lab.begin(__file__, __doc__)
base = run.base()
# In float64, so that a small difference of two losses is not rounding.
model = base.model.astype("float64")
ranks = [1, 8, 64] if run.quick else [1, 2, 4, 8, 16, 32, 64]
# The other ranks are told relative to this one.
REFERENCE = 8

# %% Four ways to scale. Whoever writes alpha = 2r asks for 2 at every rank, whoever scales nothing
# for 1. The first two are chosen so that at r = 8 they are 2 as well.
RULES = {
    "alpha / r": lambda r: LoRAConfig(r, 16, "all-linear"),
    "alpha / √r": lambda r: LoRAConfig(r, 2 * 8**0.5, "all-linear", use_rslora=True),
    "alpha = 2r": lambda r: LoRAConfig(r, 2 * r, "all-linear"),
    "not scaled": lambda r: LoRAConfig(r, r, "all-linear"),
}
# So small that the loss falls as the gradient says, and nothing else plays a part.
RATES = {"SGD": 1e-3, "Adam": 1e-5}


# %% One step from the start, where B is zero: so it moves B alone.
def first_step(config, optimizer, ids, targets, seed):
    """[how far the loss fell, norm of all ΔW together] after one step from a fresh adapter."""
    rng = np.random.default_rng(seed)
    adapter = init_adapter(model, config, rng, allow_large_r=True)
    adapted = attach(model, adapter)
    loss = adapted.loss(ids, targets)
    loss.backward()
    if optimizer == "Adam":
        # Its first step is the sign of the gradient, whatever the gradient's size.
        Adam(adapter.parameters(), lr=RATES["Adam"], eps=1e-30).step()
    else:
        for p in adapter.parameters():
            p.data -= RATES["SGD"] * p.grad
    squares = sum(float((pair.delta() ** 2).sum()) for pair in adapter.pairs.values())
    with no_grad():
        return [loss.item() - adapted.loss(ids, targets).item(), squares**0.5]


train_ids = base.encode(texts.code().train)
# At r = 1 much depends on the one row of A that was drawn: the mean of two draws says more.
n_draws = 1 if run.quick else 2
rows = []
for optimizer in RATES:
    for name, config_of in RULES.items():
        row = {"name": f"{optimizer}, {name}", "optimizer": optimizer, "rule": name}
        for seed in run.seeds:
            ids, targets = next(run.windows(base, train_ids, seed))
            steps = {}
            for r in ranks:
                draws = [(seed, i) for i in range(n_draws)]
                taken = [first_step(config_of(r), optimizer, ids, targets, draw) for draw in draws]
                steps[r] = np.mean(taken, axis=0).tolist()
            for r, (drop, norm) in steps.items():
                row.setdefault(f"drop_{r}", []).append(drop / steps[REFERENCE][0])
                row.setdefault(f"norm_{r}", []).append(norm / steps[REFERENCE][1])
        rows.append(row)

# %% The axis of the initial width. A (r, in) reads `in` numbers, so its own are drawn from ±1/√in,
# and x Aᵀ is as large in a wide layer as in a narrow one. Drawn from ±1/√r, which takes the other
# axis of A for its fan-in, x Aᵀ grows with the width.
widths = [64, 256, 1024, 4096]
trap = {}
for axis in ("in", "r"):
    trap[axis] = []
    for width in widths:
        rng = np.random.default_rng(run.seeds[0])
        bound = {"in": width, "r": 8}[axis] ** -0.5
        A = Tensor(rng.uniform(-bound, bound, (8, width)))
        thin = linear(Tensor(rng.standard_normal((100, width))), A).data
        trap[axis].append(float(thin.std()))
    sizes = "  ".join(f"{size:8.2f}" for size in trap[axis])
    print(f"size of x Aᵀ, A drawn from ±1/√{axis:<3} width {widths[0]} to {widths[-1]}: {sizes}")
print()


# %%
def draw(figure):
    """Of each optimizer, how far the loss falls and how large ΔW is, against r."""
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for i, what in enumerate(["drop", "norm"]):
        for axes, optimizer in zip(panels[i], RATES, strict=True):
            # Two of the four lie on one another, so one is drawn thick, under the other.
            for row in rows:
                if row["optimizer"] == optimizer:
                    width = 6 if row["rule"] == "alpha = 2r" else 2
                    lists = [row[f"{what}_{r}"] for r in ranks]
                    with_range(axes, ranks, lists, row["rule"], linewidth=width)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
    panels[0][0].set(title="first step by SGD", ylabel="fall of the loss,\nr = 8 is 1")
    panels[0][1].set(title="first step by Adam")
    panels[1][0].set(xlabel="rank r", ylabel="size of ΔW,\nr = 8 is 1")
    panels[1][1].set(xlabel="rank r")
    panels[1][1].set_xticks(ranks, ranks)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


columns = {"name": ("first step", "")}
for what, title in [("drop", "loss falls, "), ("norm", "|ΔW|, ")]:
    columns |= {f"{what}_{r}": (f"{title}r={r}", ".2f") for r in ranks if r in (1, 16, 64)}
setting = (
    f"One step on {base.batch} x {base.length} tokens of Python source, the {base.name} base in "
    f"float64, every linear; mean of {n_draws} draws of A, relative to r = 8."
)
run.finish(setting, columns, rows, draw, widths=widths, size_by_axis=trap)

# %% Exercises, each with its answer in README.md of this folder.
# 1. In minilora/lora.py, `init_adapter` says `bound = 1 / math.sqrt(layer.in_features)`. Write
#    out_features in its place: which tests fail, and which of this base's layers are hurt most?
# 2. In minilora/lora_config.py, `scaling_of` divides by `math.sqrt(r)` with use_rslora. Let it
#    divide by r there too: which tests fail, and which lines of the picture lie on one another?
