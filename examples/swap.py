"""One base, four adapters, one prompt: the attached adapter decides what the model does.

You learn that an adapter is a value: four models share one copy of the base, none disturbs another,
and one batch can carry a different adapter in each row. The task is checkable by hand: a Unix
permission string such as rwxr-x--- is turned into octal (750), into the umask that leaves it (027),
into bits (111101000) or into chmod's symbols (u=rwx,g=rx,o=). All 512 strings exist; 384 are
trained on, the other 128 were never seen.

    python examples/swap.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about half a minute on two cores, and as much for each further seed.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, permissions
from course.picture import GROUND, INK, middle

from minilora import LoRAConfig, attach, generate, init_adapter, parameter_report, stack
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(200 if is_tiny else 60)
batch = 32 if is_tiny else 8
lr = 1e-2 if is_tiny else 2e-3
n_asked = 16 if run.quick else 128
fingerprint = base.model.fingerprint()


# %% Four tasks over the same inputs. The prompt does not say which one is meant.
def questions(task, strings):
    """[(prompt ids, answer ids), ...]"""
    return [base.pair(*question) for question in permissions.questions(task, strings)]


def trained_adapter(model, task, strings, rng):
    """An adapter for `model` that was trained on a task. `model` is shared, and never written."""
    config = LoRAConfig(r=4, alpha=8, target_modules="all-linear")
    adapter = init_adapter(model, config, rng)
    batches = row_batches(answer_rows(questions(task, strings)), batch, rng)
    run.train(attach(model, adapter), adapter.parameters(), batches, steps, lr, task)
    return adapter


def percent_right(model, task, strings):
    """How many exact answers `model` gives to a task, in percent."""
    return lab.percent_right(model, questions(task, strings[:n_asked]))


# %% The matrix: each adapter (row) asked for each task (column), on strings never seen. To swap
# adapters is to look up another model.
rows = [{"name": "none"}, *({"name": task} for task in permissions.TASKS)]
random_base = []
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    trained_on, never_seen = permissions.split(rng)
    adapters = {}
    for task in permissions.TASKS:
        adapters[task] = trained_adapter(base.model, task, trained_on, rng)
    models = {"none": base.model}
    for name, adapter in adapters.items():
        models[name] = attach(base.model, adapter)
    for row in rows:
        for task in permissions.TASKS:
            right = percent_right(models[row["name"]], task, never_seen)
            row.setdefault(task, []).append(right)
    # Is a trained base needed at all? A rule as simple as this one is learned without one, too.
    random = lab.random_twin(base.model, seed)
    adapter = trained_adapter(random, "octal", trained_on, rng)
    random_base.append(percent_right(attach(random, adapter), "octal", never_seen))

# %% Of the last seed, the same prompt four times in one batch: every row goes through its own
# adapter.
example = never_seen[0]
together = attach(base.model, stack(list(adapters.values())))
asked = {task: base.pair(*permissions.questions(task, [example])[0]) for task in adapters}
ids = np.stack([prompt_ids for prompt_ids, _ in asked.values()])
# What ends every answer of the training.
stop = int(asked["octal"][1][-1])
one_batch = []
print(f"{'one batch, one prompt':<26}{'answer':<20}right answer")
for task, row in zip(adapters, generate(together, ids, 18, stop=stop), strict=True):
    answer = base.decode(row[ids.shape[1] :]).split("\n")[0]
    one_batch.append({"adapter": task, "answer": answer, "right": permissions.TASKS[task](example)})
    print(f"{'row with ' + task:<26}{answer:<20}{one_batch[-1]['right']}")
n_numbers = parameter_report(adapters["octal"]).total
changed = base.model.fingerprint() != fingerprint
print(f"each adapter: {n_numbers:,} numbers; base changed by all this: {changed}")
print(f"octal, learned on a random base: {lab.shown(random_base, '.0f')} % right\n")


# %%
def draw(figure):
    """The matrix, with its numbers: dark is right."""
    axes = figure.subplots()
    tasks = list(permissions.TASKS)
    cells = [[middle(row[task]) for task in tasks] for row in rows]
    axes.imshow(cells, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, line in enumerate(cells):
        for j, percent in enumerate(line):
            colour = GROUND if percent > 50 else INK
            axes.text(j, i, f"{percent:.0f}", ha="center", va="center", color=colour, fontsize=15)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.grid(visible=False)
    axes.set(xlabel="asked for", ylabel="adapter", title="exact answers, % of strings never seen")


columns = {"name": (f"adapter, % of {n_asked}", "")}
columns |= {task: (task, ".0f") for task in permissions.TASKS}
setting = (
    f"{steps} steps of {batch} rows for each task on the {base.name} base, r=4, alpha=8, every "
    f"linear, lr {lr:g}; exact answers to one prompt, in percent of {n_asked} strings never seen."
)
more = {"one_batch": one_batch, "numbers": n_numbers, "base_changed": changed}
run.finish(setting, columns, rows, draw, random_base=random_base, **more)

# %% Exercises, each with its answer in README.md of this folder.
# 1. In minilora/stack.py, `rows[i] = pair` gives row i its adapter. Write `rows[-1 - i] = pair`:
#    which tests fail, and what does this lab print for the batch?
# 2. Train "octal" on 64 strings, not 384: how many of the 128 others does it get right? Is what it
#    learned a table of answers, or a rule?
