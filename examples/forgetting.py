"""What does fine-tuning forget? One task after another, with all weights and with adapters.

You learn that an attached adapter forgets, too, though it is often said not to: with all weights or
with an adapter, the second task wipes out the first, and the base's own language is gone. But an
adapter can be taken off. What is then left is the base, to the bit, and each task is still there,
in its own adapter. The tasks are two of examples/swap.py: rwxr-x--- in octal, and its umask.

    python examples/forgetting.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about half a minute for each seed on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, permissions, texts
from course.picture import COLOURS, bars

from minilora import LoRAConfig, attach, init_adapter, no_grad
from minilora.backend import to_numpy
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(200 if is_tiny else 60)
batch = 32 if is_tiny else 8
full_lr = 3e-3 if is_tiny else 1e-4
lora_lr = 1e-2 if is_tiny else 2e-3
n_asked = 16 if run.quick else 128
docs_ids = base.encode(texts.docs().heldout)


# %% What is measured after each stage: both tasks, on strings never seen, and the language.
def ids_of(task, strings):
    """[(prompt ids, answer ids), ...]"""
    return [base.pair(*question) for question in permissions.questions(task, strings)]


def logits(model):
    """What `model` says of the beginning of the documentation."""
    with no_grad():
        return to_numpy(model(docs_ids[None, : base.length]).data)


reference = logits(base.model)
fingerprint = base.model.fingerprint()
stages = {}


def measure(stage, model, never_seen):
    """Keep what `model` can do after this stage."""
    row = stages.setdefault(stage, {"octal": [], "umask": [], "docs_loss": [], "change": []})
    for task in ("octal", "umask"):
        row[task].append(lab.percent_right(model, ids_of(task, never_seen[:n_asked])))
    row["docs_loss"].append(run.loss(base, model, docs_ids))
    row["change"].append(float(np.abs(logits(model) - reference).max()))


# %% The stages, for each seed.
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    trained_on, never_seen = permissions.split(rng)

    def teach(task, model, parameters, lr):
        batches = row_batches(answer_rows(ids_of(task, trained_on)), batch, rng)
        run.train(model, parameters, batches, steps, lr, task)

    def new_adapter():
        config = LoRAConfig(r=4, alpha=8, target_modules="all-linear")
        return init_adapter(base.model, config, rng)

    measure("the base", base.model, never_seen)
    full = base.model.trainable_copy()
    teach("octal", full, full.parameters(), full_lr)
    measure("full: octal", full, never_seen)
    teach("umask", full, full.parameters(), full_lr)
    measure("full: octal, then umask", full, never_seen)

    one = new_adapter()
    with_one = attach(base.model, one)
    teach("octal", with_one, one.parameters(), lora_lr)
    measure("one adapter: octal", with_one, never_seen)
    two = new_adapter()
    with_two = attach(base.model, two)
    teach("umask", with_two, two.parameters(), lora_lr)
    measure("another adapter: umask", with_two, never_seen)
    teach("umask", with_one, one.parameters(), lora_lr)
    measure("one adapter: octal, then umask", with_one, never_seen)
    # Without an adapter: nothing was written to the base.
    measure("the base, after all this", base.model, never_seen)

rows = [{"name": name, **row} for name, row in stages.items()]
assert base.model.fingerprint() == fingerprint
assert not any(stages["the base, after all this"]["change"])


# %%
def draw(figure):
    """Bars: what each stage can do of both tasks, and its loss on the documentation."""
    short = [row["name"].replace(": ", ":\n").replace(", a", ",\na") for row in rows]
    all_axes = figure.subplots(1, 3, sharey=True)
    kinds = {
        "octal": "octal,\n% right",
        "umask": "umask,\n% right",
        "docs_loss": "loss on\nthe docs",
    }
    for axes, (key, title), colour in zip(all_axes, kinds.items(), COLOURS, strict=False):
        form = "{:.1f}" if key == "docs_loss" else "{:.0f}"
        bars(axes, short, [row[key] for row in rows], form, color=colour)
        axes.set(title=title)
        axes.margins(x=0.4)
    figure.set_size_inches(7, 7)


columns = {
    "name": ("", ""),
    "octal": ("octal, % right", ".0f"),
    "umask": ("umask, % right", ".0f"),
    "docs_loss": ("loss on the docs", ".3f"),
    "change": ("largest change of a logit", ".3g"),
}
setting = (
    f"{steps} steps of {batch} rows for each task on the {base.name} base, full at lr {full_lr:g}, "
    f"LoRA r=4, alpha=8, every linear at lr {lora_lr:g}; asked for {n_asked} strings never seen."
)
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. In minilora/lora.py, `attach` adapts `base.frozen()`. Adapt `base` in its place: which tests
#    fail, and why does this lab pass?
# 2. Let `teach` learn both tasks at once, with the rows of both in one list. Is what you see
#    forgetting? Read what `permissions.prompt` asks.
