"""Can two adapters be added? Sums, weighted sums and compressed sums of security and code.

You learn that a sum is exact in the weights, up to rounding, and that this says nothing of what the
model then does: neither adapter was trained beside the other, and in their sum both skills suffer.
Shown are both for the sum, for weights from 0 to 1, and after compressing to a lower rank, with the
error. A smaller error promises no better answers: compare the sum with the compressed sum.

    python examples/compose.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute for each seed on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import middle, with_range

from minilora import LoRAConfig, attach, combine, compress, init_adapter
from minilora.cli.asking import pairs
from minilora.cli.questions import question_sets
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base_for_questions()
is_tiny = base.name == lab.TINY
question_steps = run.steps(650 if is_tiny else 150)
code_steps = run.steps(100 if is_tiny else 40)
batch = 16 if is_tiny else 8
lr = 1e-2 if is_tiny else 2e-3
n_asked = 8 if run.quick else 240 if is_tiny else 60
weights = run.few([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])

# %% The two skills: answers to the security questions, and a low loss on Python source.
taught = question_sets()["trained"]
chosen = np.random.default_rng(0).permutation(len(taught))[:n_asked]
asked = pairs(base.asking, [taught[i] for i in chosen])
code = texts.code_ids(base.encode)


def trained(batches, steps, rng, label):
    """An adapter of r = 8 on every linear."""
    config = LoRAConfig(r=8, alpha=16, target_modules="all-linear")
    adapter = init_adapter(base.model, config, rng)
    run.train(attach(base.model, adapter), adapter.parameters(), batches, steps, lr, label)
    return adapter


def add_skills(row, adapter):
    """Add to the lists of a row what the base can do with this adapter, or None."""
    model = base.model if adapter is None else attach(base.model, adapter)
    row["right"].append(lab.percent_right(model, asked))
    row["loss"].append(run.loss(base, model, code.test))


def sum_error(total, parts):
    """The largest ‖ΔW - ΣΔW‖ / ‖ΣΔW‖ over the modules, `total` being the sum of the `parts`."""
    errors = []
    for name, pair in total.pairs.items():
        exact = sum(part.pairs[name].delta().astype(np.float64) for part in parts)
        errors.append(np.linalg.norm(pair.delta() - exact) / np.linalg.norm(exact))
    return float(max(errors))


def largest_error(compressed):
    """The largest relative error over the modules of what `compress` returned."""
    return max(error.relative for error in compressed.errors.values())


# %% For each seed: train both, add them, weight them, compress them.
results = {}
sweep = {}
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    rows_taught = answer_rows(pairs(base.asking, taught))
    question_batches = row_batches(rows_taught, batch, rng)
    security = trained(question_batches, question_steps, rng, "security")
    python = trained(run.windows(base, code.train, seed), code_steps, rng, "code")
    both = combine([security, python], [1, 1])
    smaller_sum = compress(both, 8)
    smaller = compress(security, 4)
    of_seed = {
        "the base": (None, None),
        "security": (security, None),
        "code": (python, None),
        "security + code": (both, sum_error(both, [security, python])),
        "(security + code) / 2": (combine([security, python], [0.5, 0.5]), None),
        "security + code, compressed": (smaller_sum.adapter, largest_error(smaller_sum)),
        "security, compressed": (smaller.adapter, largest_error(smaller)),
    }
    for name, (adapter, error) in of_seed.items():
        row = results.setdefault(name, {"right": [], "loss": [], "error": None})
        row["r"] = 0 if adapter is None else adapter.config.r
        add_skills(row, adapter)
        if error is not None:
            row["error"] = [*(row["error"] or []), error]
    for w in weights:
        for way, pair in {"one for the other": (w, 1 - w), "both": (w, w)}.items():
            point = sweep.setdefault((way, w), {"way": way, "w": w, "right": [], "loss": []})
            add_skills(point, combine([security, python], pair))
rows = [{"name": name, **row} for name, row in results.items()]
sweep = list(sweep.values())


# %%
def draw(figure):
    """Both skills against the weight."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    labels = {
        "one for the other": "w · security + (1 - w) · code",
        "both": "w · (security + code)",
    }
    for way, label in labels.items():
        points = [point for point in sweep if point["way"] == way]
        with_range(top, weights, [point["right"] for point in points], label)
        with_range(bottom, weights, [point["loss"] for point in points], None)
    bottom.axhline(middle(rows[0]["loss"]), color="black", linestyle=":", label="the base")
    bottom.legend()
    top.set(ylabel="questions\nright, %")
    bottom.set(ylabel="loss on\nunseen code", xlabel="weight w")
    top.legend()


columns = {
    "name": ("attached", ""),
    "r": ("r", "d"),
    "right": ("questions right, %", ".0f"),
    "loss": ("loss on unseen code", ".3f"),
    "error": ("error in the weights", ".2g"),
}
setting = (
    f"Two adapters of r=8, alpha=16, every linear, lr {lr:g} on the {base.name} base: "
    f"{question_steps} steps of {batch} security questions, {code_steps} steps of {base.batch} x "
    f"{base.length} tokens of Python source. {n_asked} of the questions that were trained on."
)
run.finish(setting, columns, rows, draw, sweep=sweep)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Subtract: combine([security, python], [1, -1]). What becomes of the two skills?
# 2. In minilora/compose.py, `_side_by_side` multiplies each lora_B by `weight * pair.scaling`.
#    Leave out the scaling: which tests fail, and what would this lab's table show?
