"""How few numbers move a whole model? Fine-tuning along random directions: its intrinsic dimension.

You learn how much of full fine-tuning's gain is reached by d numbers that move all weights at once,
along d directions drawn at random before anything is known of the task; that "a few hundred are
plenty", which a tutorial says, is not so here; and that random directions are, number for number,
about as good as LoRA's. What LoRA has before them is memory: the gradient of θ is made of the
gradients of all weights, while that of A and B never needs those of W.

    python examples/intrinsic.py [--quick] [--seed 0] [--seeds 3]

Takes about two minutes on two cores, and half a minute for each further seed. A large --base takes
much memory: beside each weight stand a direction and a sign.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import COLOURS, with_range

from minilora import Tensor, parameter_report
from minilora.nn import Module

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(100 if is_tiny else 40)
code = texts.code_ids(base.encode)
dimensions = run.few([30, 300, 3000, 30000])
ranks = run.few([1, 8], 1)
full_lr = 3e-3 if is_tiny else 3e-4
lora_lr = 1e-2 if is_tiny else 3e-3
subspace_rates = run.few([3e-3, 1e-2], 1)


# %% All weights are W + P θ, where P is chosen at random and stays: each weight moves with one of
# the d numbers of θ, up or down. So θ, of which W is at zero, is all that is trained.
class Subspace(Module):
    """A model moved along d random directions, by θ (d,)."""

    def __init__(self, model, d, rng):
        self.model = model.frozen()
        self.theta = Tensor(run.xp.zeros(d, "float32"), requires_grad=True)
        self.directions = {}
        for name, p in model.named_parameters():
            signs = rng.choice([-1, 1], p.shape).astype("float32")
            which = run.xp.asarray(rng.integers(0, d, p.shape))
            self.directions[name] = which, Tensor(run.xp.asarray(signs))

    def moved(self):
        """The model at θ."""
        tensors = {}
        for name, p in self.model.named_parameters():
            which, signs = self.directions[name]
            tensors[name] = p + self.theta[which] * signs
        return self.model.rebuild(lambda name, _: tensors.get(name))

    def loss(self, ids, targets, rng=None):
        return self.moved().loss(ids, targets, rng=rng)


def tuned_subspace(d, lr, seed):
    """The base, tuned along d directions."""
    subspace = Subspace(base.model, d, np.random.default_rng((seed, d)))
    run.train(subspace, [subspace.theta], run.windows(base, code.train, seed), steps, lr, f"d={d}")
    return subspace.moved().frozen()


# %% First full fine-tuning, whose gain is 100 %; then the others with as few numbers as they have.
before = run.loss(base, base.model, code.test)


def row(name, kind, numbers, models):
    """What the models, one for each seed, give on text that was not trained on."""
    losses = [run.loss(base, model, code.test) for model in models]
    full = rows[0]["loss"] if rows else losses
    gains = zip([before - loss for loss in losses], [before - loss for loss in full], strict=True)
    share = [100 * gain / of_full for gain, of_full in gains]
    return {"name": name, "kind": kind, "numbers": numbers, "loss": losses, "share_of_full": share}


rows = []
n_all = parameter_report(base.model).total
models = [run.tuned_full(base, code.train, steps, full_lr, seed) for seed in run.seeds]
rows.append(row("full fine-tuning", "full", n_all, models))
for d in dimensions:
    # The rate is chosen on another seed and other text.
    by_rate = {}
    for lr in subspace_rates:
        model = tuned_subspace(d, lr, lab.TUNING_SEED)
        by_rate[lr] = run.loss(base, model, code.validation)
    best_lr = min(by_rate, key=by_rate.get)
    models = [tuned_subspace(d, best_lr, seed) for seed in run.seeds]
    rows.append(row(f"{d:,} random directions", "random", d, models))
for r in ranks:
    models = [run.tuned_lora(base, code.train, r, steps, lora_lr, seed) for seed in run.seeds]
    n = parameter_report(models[0]).trainable
    rows.append(row(f"LoRA, r={r}", "lora", n, models))


# %%
def draw(figure):
    """The share of full's gain against how many numbers are trained."""
    axes = figure.subplots()
    for kind, label in [("random", "random directions"), ("lora", "LoRA, r = 1 and 8")]:
        chosen = [each for each in rows if each["kind"] == kind]
        shares = [each["share_of_full"] for each in chosen]
        with_range(axes, [each["numbers"] for each in chosen], shares, label)
    axes.axhline(100, color=COLOURS[6], marker="", label=f"full: all {n_all:,} numbers")
    axes.set(xscale="log", xlabel="numbers trained", ylabel="% of full fine-tuning's gain")
    axes.legend()


columns = {
    "name": ("", ""),
    "numbers": ("numbers trained", ",d"),
    "loss": ("loss on unseen code", ".3f"),
    "share_of_full": ("% of full's gain", ".0f"),
}
setting = (
    f"{steps} steps of {base.batch} x {base.length} tokens of Python source on the {base.name} "
    f"base (loss before: {before:.3f}); full at lr {full_lr:g}, LoRA on every linear with alpha = "
    f"2r at lr {lora_lr:g}, random directions at the best of {len(subspace_rates)} rates."
)
run.finish(setting, columns, rows, draw, before=before)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Remove `* signs`: every number of θ then moves its weights one way. What does d = 3,000 reach?
# 2. Give Subspace as many directions as the base has numbers. Why is that not full fine-tuning?
