"""It did not learn: which mistake looks how? A healthy run, and nine with one thing wrong in each.

You learn to tell the causes apart by three numbers: the loss at the end of training, the questions
right among those it trained on, and those in phrasings it never saw. Six mistakes are made in
training; three are made afterwards with the healthy adapter, and leave its training loss as good
as ever. The wrong base is refused by its fingerprint, and the error is shown.

    python examples/troubleshooting.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute for each seed on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

from collections import Counter

import numpy as np
from course import lab
from course.picture import COLOURS, bars

from minilora import Adapter, LoRAConfig, attach, init_adapter
from minilora.cli.asking import Chat, pairs
from minilora.cli.questions import question_sets
from minilora.lora import LoRAPair
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base_for_questions()
is_tiny = base.name == lab.TINY
steps = run.steps(250)
batch = 16 if is_tiny else 8
lr = 1e-2 if is_tiny else 2e-3
n_asked = 8 if run.quick else 240 if is_tiny else 60

# %% The demo's security questions.
sets = question_sets()
taught = answer_rows(pairs(base.asking, sets["trained"]))
asked = {}
# To give it to every question is the least that can be learned.
[(commonest, _)] = Counter(answer for _, answer in sets["trained"]).most_common(1)
for kind in ("trained", "unseen"):
    chosen = np.random.default_rng(0).permutation(len(sets[kind]))[:n_asked]
    asked[kind] = [sets[kind][i] for i in chosen]


def trained(model, seed, r=8, targets="all-linear", lr=lr):
    """(adapter, loss at the end): LoRA for `model` with the settings that a mistake changes."""
    rng = np.random.default_rng(seed)
    adapter = init_adapter(model, LoRAConfig(r=r, alpha=2 * r, target_modules=targets), rng)
    batches = row_batches(taught, batch, rng)
    adapted = attach(model, adapter)
    losses = run.train(adapted, adapter.parameters(), batches, steps, lr, f"r={r}")
    return adapter, float(np.mean(losses[-10:]))


# %% A healthy run and six mistakes in training: {name: (how it is trained, on a random base?)}
healthy = "healthy"
mistakes = {
    healthy: ({}, False),
    "r = 1": ({"r": 1}, False),
    "q and v alone": ({"targets": ["q_proj", "v_proj"]}, False),
    "k alone": ({"targets": ["k_proj"]}, False),
    "learning rate / 30": ({"lr": lr / 30}, False),
    "learning rate x 30": ({"lr": lr * 30}, False),
    "random base": ({}, True),
}
results = {}


def measure(name, model, loss, to_pairs):
    """Keep the loss at the end of training, and how many answers are right, in %."""
    row = results.setdefault(name, {"end_loss": [], "trained": [], "unseen": []})
    row["end_loss"].append(loss)
    for kind, of_kind in asked.items():
        row[kind].append(lab.percent_right(model, to_pairs(of_kind)))


# %% Three mistakes afterwards.
def other_convention(adapter):
    """The same factors as one reads them who multiplies by alpha, where training had alpha / r."""
    pairs = {}
    for name, pair in adapter.pairs.items():
        pairs[name] = LoRAPair(pair.lora_A, pair.lora_B, adapter.config.alpha)
    return Adapter(adapter.config, pairs, adapter.base_fingerprint)


def other_form(questions):
    """The questions in another form than in training."""
    if isinstance(base.asking, Chat):
        return pairs(Chat(base.asking.tokenizer), questions)
    return [base.pair(f"{question}\n", f"{answer}\n") for question, answer in questions]


as_trained = lambda questions: pairs(base.asking, questions)
for seed in run.seeds:
    random = lab.random_twin(base.model, seed)
    for name, (settings, is_random) in mistakes.items():
        model = random if is_random else base.model
        adapter, loss = trained(model, seed, **settings)
        adapted = attach(model, adapter)
        measure(name, adapted, loss, as_trained)
        if name == healthy:
            good = (adapted, adapter, loss)
    adapted, adapter, loss = good
    measure("asked in another form", adapted, loss, other_form)
    measure("alpha for alpha / r", attach(base.model, other_convention(adapter)), loss, as_trained)
    try:
        attach(random, adapter)
    except ValueError as error:
        refusal = str(error)
    wrong = attach(random, adapter, check_base=False)
    measure("on another base", wrong, loss, as_trained)
rows = [{"name": name, **row} for name, row in results.items()]
share = 100 * np.mean([answer == commonest for _, answer in asked["trained"]])
print(f"The adapter on another base:\n{refusal}\n")


# %%
def draw(figure):
    """Bars: right answers among the phrasings that were trained on, and the unseen ones."""
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    names = [row["name"] for row in rows]
    bars(left, names, [row["trained"] for row in rows], color=COLOURS[0])
    bars(right, names, [row["unseen"] for row in rows], color=COLOURS[1])
    left.set(title="phrasings\nit trained on", xlabel="% right")
    right.set(title="phrasings\nnever seen", xlabel="% right")
    for axes in (left, right):
        axes.margins(x=0.2)


columns = {
    "name": ("", ""),
    "end_loss": ("training loss at the end", ".2f"),
    "trained": ("trained phrasings, %", ".0f"),
    "unseen": ("unseen phrasings, %", ".0f"),
}
setting = (
    f"{steps} steps of {batch} security questions on the {base.name} base; healthy is r=8, "
    f"alpha=16, every linear, lr {lr:g}, stopped early: the demo takes 650 steps. The commonest "
    f"answer, {commonest!r}, is right for {share:.0f} % of the questions."
)
run.finish(setting, columns, rows, draw, refusal=refusal)

# %% Exercises, each with its answer in README.md of this folder.
# 1. A tenth mistake: before training set every lora_A to zero, `pair.lora_A.data[:] = 0`, so that
#    both factors are. Which run does it look like, and how do you tell the two apart?
# 2. In minilora/fits.py, let `base_errors` return [] at once: which tests fail? What would a user
#    of the adapter have seen in place of the error that the lab prints?
