"""What did it learn? The demo's 60 security facts, and the runs that show what else would do.

You learn to read a result: beside the adapter as the demo trains it stand the same training on a
random base, with answers that were shuffled among the subjects, and with four phrasings instead of
twelve. An answer counts if it is right to the last character. What phrasings it never saw tell of
learning, and facts it was never told tell that nothing was learned of security.

    python examples/security_qa.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute and a half for each seed on two cores; a quarter of an hour on smollm2.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab
from course.picture import COLOURS, bars

from minilora import LoRAConfig, attach, init_adapter
from minilora.cli.asking import pairs
from minilora.cli.questions import question_sets
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base_for_questions()
is_tiny = base.name == lab.TINY
steps = run.steps(650 if is_tiny else 150)
batch = 16 if is_tiny else 8
lr = 1e-2 if is_tiny else 2e-3
# A language model takes a tenth of a second for each question.
n_asked = 8 if run.quick else 240 if is_tiny else 40

# %% The questions: phrasings that are trained on, others of the same facts, and facts never told.
questions = question_sets()
asked = {}
for kind, of_kind in questions.items():
    chosen = np.random.default_rng(0).permutation(len(of_kind))[:n_asked]
    asked[kind] = pairs(base.asking, [of_kind[i] for i in chosen])


def shuffled_answers(of_kind, rng):
    """The same questions, each subject with the answer of another one."""
    answers = rng.permutation(list(dict.fromkeys(answer for _, answer in of_kind)))
    # Each answer's neighbour in a random circle: none keeps its own.
    others = dict(zip(answers.tolist(), np.roll(answers, 1).tolist(), strict=True))
    return [(question, others[answer]) for question, answer in of_kind]


def four_phrasings(of_kind):
    """A third of the rows: four of the twelve phrasings of each fact."""
    return [pair for i, pair in enumerate(of_kind) if i % 12 < 4]


# %% Each run: what it is trained on, on which base.
def trained(model, taught, seed):
    """`model` with LoRA of r = 8 on every linear, trained on the pairs `taught`."""
    rng = np.random.default_rng(seed)
    adapter = init_adapter(model, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), rng)
    adapted = attach(model, adapter)
    batches = row_batches(answer_rows(pairs(base.asking, taught)), batch, rng)
    run.train(adapted, adapter.parameters(), batches, steps, lr, f"seed {seed}")
    return adapted


names = {
    "untrained": "before: no adapter",
    "healthy": "as in the demo",
    "four": "4 phrasings, not 12",
    "random": "on a random base",
    "shuffled": "answers shuffled",
}
scores = {name: {kind: [] for kind in asked} for name in names}
for seed in run.seeds:
    wrong_answers = shuffled_answers(questions["trained"], np.random.default_rng(seed))
    models = {
        "untrained": lambda: base.model,
        "healthy": lambda: trained(base.model, questions["trained"], seed),
        "four": lambda: trained(base.model, four_phrasings(questions["trained"]), seed),
        "random": lambda: trained(lab.random_twin(base.model, seed), questions["trained"], seed),
        "shuffled": lambda: trained(base.model, wrong_answers, seed),
    }
    for name, make in models.items():
        model = make()
        for kind, of_kind in asked.items():
            scores[name][kind].append(lab.percent_right(model, of_kind))
rows = [{"run": name, "name": names[name], **by_kind} for name, by_kind in scores.items()]


# %%
def draw(figure):
    """Bars: each run, trained phrasings and unseen ones."""
    all_axes = figure.subplots(3, 1, sharex=True)
    titles = ["phrasings it trained on", "phrasings never seen", "facts never told"]
    for axes, kind, title, colour in zip(all_axes, asked, titles, COLOURS, strict=False):
        bars(axes, list(names.values()), [row[kind] for row in rows], color=colour)
        axes.set(title=title, xlim=(0, 105))
    all_axes[-1].set_xlabel("answers right to the last character, %")
    figure.set_size_inches(7, 8)


columns = {
    "name": ("% right", ""),
    "trained": ("phrasings trained on", ".0f"),
    "unseen": ("phrasings never seen", ".0f"),
    "never": ("facts never told", ".0f"),
}
setting = (
    f"{steps} steps of {batch} rows on the {base.name} base, r=8, alpha=16, every linear, "
    f"lr {lr:g}; {n_asked} questions of each kind. Answers that were shuffled count as "
    "wrong."
)
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Ask the run with shuffled answers for those that it was taught, in phrasings it never saw. How
#    many are right, and what does that say of the run "as in the demo"?
# 2. In minilora/training/loop.py, `exact_match` lets no token be wrong: `~is_wrong.any(axis=1)`.
#    Write `all`: which tests fail, and what does a base answer that was never trained?
