"""How low is the rank of an update? The spectrum of full fine-tuning, truncated, and beside noise.

You learn what the singular values of a real update look like beside those of noise of the same
shape, whose logarithm falls as straight; what is left of the gain when the update is truncated to
rank k; and that LoRA trained at a small rank k does better than that. One task on one base: the
word "low" has a number here, and it is not a number for your task.

    python examples/spectrum.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute on two cores, and as much for each further seed.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import COLOURS, with_range

from minilora import Tensor
from minilora.backend import to_device, to_numpy
from minilora.lora import linear_names

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(100 if is_tiny else 40)
code = texts.code_ids(base.encode)
names = [f"{name}.weight" for name in linear_names(base.model)]
cuts = run.few([0, 1, 2, 4, 8, 16, 32, 64], 4)
ranks = run.few([2, 8, 32], 1)
full_lr = 3e-3 if is_tiny else 3e-4
lora_lr = 1e-2 if is_tiny else 3e-3


# %% The singular values of each weight's update, and of noise of the same shape.
def decomposed(tuned):
    """{name of a weight: (U, S, Vt) of what training has added to it}."""
    before = base.model.state_dict()
    after = tuned.state_dict()
    added = {name: to_numpy(after[name] - before[name]) for name in names}
    return {name: np.linalg.svd(update, full_matrices=False) for name, update in added.items()}


def spectrum(S):
    """The singular values of one weight as they are compared: the largest is 1."""
    return np.array((S / S[0]).tolist())


def energies(values):
    """The share that the first k directions have of the squares, in percent, mean over weights."""
    shares = {}
    for k in (1, 4, 8, 16, 64):
        parts = [(S[:k] ** 2).sum() / (S**2).sum() for S in values.values()]
        shares[f"energy_in_{k}"] = 100 * sum(map(float, parts)) / len(parts)
    return shares


def moved(values):
    """How far the weights moved, in percent of their own size."""
    before = base.model.state_dict()
    squares = sum(float((S**2).sum()) for S in values.values())
    return 100 * (squares / sum(float((before[name] ** 2).sum()) for name in values)) ** 0.5


def truncated(tuned, svds, k):
    """`tuned` with each linear weight's update of rank k; all else as it is tuned."""

    def replace(name, _):
        if name not in svds:
            return None
        U, S, Vt = svds[name]
        update = to_device((U[:, :k] * S[:k]) @ Vt[:k], run.xp)
        return Tensor(base.model.state_dict()[name] + update)

    return tuned.rebuild(replace)


# %% Everything is measured on the same text, as the share of full fine-tuning's gain. What training
# did to embeddings, norms and biases stays in every truncated model, also in that of rank 0.
before = run.loss(base, base.model, code.test)
row_of = {}


def add(name, model, **measured):
    """Put what one seed gives into the row of this name; there is a loss if there is a model."""
    row = row_of.setdefault(name, {"name": name})
    if model is not None:
        measured["loss"] = run.loss(base, model, code.test)
        # The first row is full fine-tuning's.
        of_full = row_of["full fine-tuning"].get("loss", [measured["loss"]])[-1]
        measured["share_of_full"] = 100 * (before - measured["loss"]) / (before - of_full)
    for key, value in measured.items():
        row.setdefault(key, []).append(float(value))


for seed in run.seeds:
    tuned = run.tuned_full(base, code.train, steps, full_lr, seed)
    svds = decomposed(tuned)
    rng = np.random.default_rng(seed)
    noise = {}
    for name, (U, _, Vt) in svds.items():
        gaussian = rng.standard_normal((len(U), Vt.shape[1]))
        noise[name] = np.linalg.svd(gaussian, compute_uv=False)
    update = {name: S for name, (_, S, _) in svds.items()}
    add("full fine-tuning", tuned, moved=moved(update), **energies(update))
    add("noise", None, **energies(noise))
    for k in cuts:
        add(f"truncated to {k}", truncated(tuned, svds, k))
    for r in ranks:
        add(f"LoRA trained at rank {r}", run.tuned_lora(base, code.train, r, steps, lora_lr, seed))
rows = list(row_of.values())


# %% How straight is the logarithm of the singular values, over the larger half of them?
def straightness(S):
    """R² of a straight line through log S."""
    half = len(S) // 2
    return float(np.corrcoef(np.arange(half), np.log(spectrum(S)[:half]))[0, 1] ** 2)


straight = {
    "update": [straightness(S) for S in update.values()],
    "noise": [straightness(S) for S in noise.values()],
}
for kind, values in straight.items():
    print(f"log of the singular values of {kind:<6}: a line with R² {min(values):.3f} or more")
print()


def mean_spectrum(kind, of):
    """The singular values of all layers of one kind, largest 1, as their mean."""
    return np.mean([spectrum(of[name]) for name in names if f".{kind}." in name], axis=0)


# %%
def draw(figure):
    """The spectra beside noise; the share of the gain at each rank, truncated and trained."""
    spectra, losses = figure.subplots(2, 1)
    for kind, colour in [("q_proj", COLOURS[0]), ("up_proj", COLOURS[1])]:
        style = {"color": colour, "marker": ""}
        spectra.semilogy(mean_spectrum(kind, update), label=f"update of {kind}", **style)
        style |= {"linestyle": ":", "label": "noise of its shape"}
        spectra.semilogy(mean_spectrum(kind, noise), **style)
    spectra.set(xlabel="direction", ylabel="singular value,\nlargest is 1", ylim=(0.01, 1.2))
    spectra.legend(ncols=2)

    kept = [k for k in cuts if k]
    cut_shares = [row_of[f"truncated to {k}"]["share_of_full"] for k in kept]
    with_range(losses, kept, cut_shares, "update, truncated")
    lora_shares = [row_of[f"LoRA trained at rank {r}"]["share_of_full"] for r in ranks]
    with_range(losses, ranks, lora_shares, "LoRA, trained")
    losses.set_xscale("log", base=2)
    losses.set_xticks(kept, kept)
    losses.set(xlabel="rank", ylabel="% of full's gain")
    losses.legend()


columns = {
    "name": ("", ""),
    "energy_in_8": ("% of squares in 8", ".0f"),
    "energy_in_64": ("in 64", ".0f"),
    "loss": ("loss on unseen code", ".3f"),
    "share_of_full": ("% of full's gain", ".0f"),
}
setting = (
    f"{steps} steps of {base.batch} x {base.length} tokens of Python source on the {base.name} "
    f"base (loss before: {before:.3f}); full at lr {full_lr:g}, LoRA on every linear with alpha = "
    f"2r at lr {lora_lr:g}."
)
run.finish(setting, columns, rows, draw, before=before, straightness=straight)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Truncate noise of the same size instead of the update: in `truncated`, take U and Vt from the
#    SVD of random numbers, and S as it is. Which share of the gain is left at rank 64?
# 2. Give LoRA the rate of full fine-tuning, 0.003 for 0.01. Does training at rank 8 still beat the
#    update truncated to 8? (So compare methods at the best rate of each.)
