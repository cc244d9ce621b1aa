"""Which layers to adapt? Attention, MLP, q and v, k alone, or every linear, at equal size.

You learn what "start with attention" is worth: each choice gets as many numbers, by its rank, and a
learning rate of its own. Beside what it gains on code stands what it loses on the documentation
that the tiny base was trained on.

    python examples/targets.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute and a half on two cores, and twenty seconds for each further seed.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import COLOURS, bars

from minilora import LoRAConfig, attach, init_adapter, parameter_report

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(100 if is_tiny else 40)
rates = run.few([3e-3, 1e-2, 3e-2] if is_tiny else [1e-3, 3e-3], 1)
code = texts.code_ids(base.encode)
docs_ids = base.encode(texts.docs().heldout)

# %% The choices, as PEFT would be told: "all-linear", endings of names, or an expression.
choices = {
    "every linear": "all-linear",
    "MLP alone": r".*\.mlp\..*",
    "attention alone": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "q and v": ["q_proj", "v_proj"],
    "k alone": ["k_proj"],
}


def new_adapter(targets, r, seed):
    """LoRA of rank r on `targets`, with alpha = 2r: the same scaling, 2, for all of them."""
    config = LoRAConfig(r=r, alpha=2 * r, target_modules=targets)
    return init_adapter(base.model, config, np.random.default_rng(seed))


def numbers(targets, r):
    """How many numbers that trains."""
    return parameter_report(new_adapter(targets, r, 0)).total


# %% Equal size: r = 4 on every linear, and for each other choice the r that comes closest to it.
size = numbers("all-linear", 2 if run.quick else 4)
ranks = {name: round(size / numbers(targets, 1)) for name, targets in choices.items()}


def tuned(name, lr, seed):
    """The base with an adapter on the layers of the choice `name`, trained on code."""
    adapter = new_adapter(choices[name], ranks[name], seed)
    model = attach(base.model, adapter)
    batches = run.windows(base, code.train, seed)
    run.train(model, adapter.parameters(), batches, steps, lr, name)
    return model


# %% For each choice the best rate, on a seed of its own; then every seed with that rate.
before = run.loss(base, base.model, code.test)
docs_before = run.loss(base, base.model, docs_ids)
rows = []
for name in choices:
    by_rate = {}
    for lr in rates:
        by_rate[lr] = run.loss(base, tuned(name, lr, lab.TUNING_SEED), code.validation)
    best_lr = min(by_rate, key=by_rate.get)
    row = {"name": name, "r": ranks[name], "numbers": numbers(choices[name], ranks[name])}
    row |= {"lr": best_lr, "loss": [], "docs_loss": []}
    for seed in run.seeds:
        model = tuned(name, best_lr, seed)
        row["loss"].append(run.loss(base, model, code.test))
        row["docs_loss"].append(run.loss(base, model, docs_ids))
    row["validation_by_rate"] = {f"{lr:g}": loss for lr, loss in by_rate.items()}
    rows.append(row)


# %%
def draw(figure):
    """Bars: what each choice took off the loss on code, and what it added to that on the docs."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    names = [f"{row['name']}, r={row['r']}" for row in rows]
    gains = [[before - loss for loss in row["loss"]] for row in rows]
    costs = [[loss - docs_before for loss in row["docs_loss"]] for row in rows]
    bars(top, names, gains, "{:.3f}", color=COLOURS[0])
    top.set(title=f"gained on code (loss before: {before:.3f})")
    bars(bottom, names, costs, "{:.3f}", color=COLOURS[1])
    bottom.set(title=f"lost on the documentation (before: {docs_before:.3f})")
    bottom.set(xlabel="nats per token")
    bottom.margins(x=0.1)


columns = {
    "name": ("adapted", ""),
    "r": ("r", "d"),
    "numbers": ("numbers trained", ",d"),
    "lr": ("lr", "g"),
    "loss": ("loss on unseen code", ".3f"),
    "docs_loss": ("loss on the docs", ".3f"),
}
setting = (
    f"{steps} steps of {base.batch} x {base.length} tokens of Python source on the {base.name} "
    f"base (loss before: code {before:.3f}, docs {docs_before:.3f}), alpha = 2r, the rate of each "
    "chosen on another seed and other code."
)
run.finish(setting, columns, rows, draw, before=before, docs_before=docs_before)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Give every choice one rate, 0.003 or 0.03: "validation_by_rate" in the JSON has the losses.
#    Which order of the choices would you have reported?
# 2. Add r"h\.0\..*" and r"h\.2\..*" to the choices, the first block and the last. Does it matter
#    more where the numbers are, or in which kind of layer?
