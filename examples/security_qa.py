"""What did it learn? The demo's 60 security facts, and the runs that show what else would do.

You learn to read a result: beside an adapter that was trained as the demo's is, on twelve phrasings
of each fact, stand one that was given four, one on a random base, and one whose answers were
shuffled among the subjects. An answer counts if it is right to the last character. What phrasings
it never saw tell of learning, and facts it was never told, that nothing was learned of security.

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


def some_of(of_kind):
    """At most `n_asked` of them, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(of_kind))[:n_asked]
    return pairs(base.asking, [of_kind[i] for i in chosen])


asked = {kind: some_of(questions[kind]) for kind in ("unseen", "never")}


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
def trained(model, taught, seed, label):
    """`model` with LoRA of r = 8 on every linear, trained on the pairs `taught`."""
    rng = np.random.default_rng(seed)
    adapter = init_adapter(model, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), rng)
    adapted = attach(model, adapter)
    batches = row_batches(answer_rows(pairs(base.asking, taught)), batch, rng)
    run.train(adapted, adapter.parameters(), batches, steps, lr, f"seed {seed}, {label}")
    return adapted


# Each is asked what it was taught itself, beside what is the same for all.
names = {
    "untrained": "before: no adapter",
    "healthy": "12 phrasings",
    "four": "4 phrasings",
    "random": "12, on a random base",
    "shuffled": "12, answers shuffled",
}
scores = {name: {"taught": [], "unseen": [], "never": []} for name in names}
for seed in run.seeds:
    right = questions["trained"]
    taught = dict.fromkeys(names, right)
    taught["four"] = four_phrasings(right)
    taught["shuffled"] = shuffled_answers(right, np.random.default_rng(seed))
    for name in names:
        model = lab.random_twin(base.model, seed) if name == "random" else base.model
        if name != "untrained":
            model = trained(model, taught[name], seed, names[name])
        for kind, of_kind in {"taught": some_of(taught[name]), **asked}.items():
            scores[name][kind].append(lab.percent_right(model, of_kind))
rows = [{"run": name, "name": names[name], **by_kind} for name, by_kind in scores.items()]


# %%
def draw(figure):
    """Bars: each run, what it was taught and unseen phrasings."""
    all_axes = figure.subplots(2, 1, sharex=True)
    titles = ["what it was taught", "the same facts in phrasings never seen"]
    kinds = ["taught", "unseen"]
    for axes, kind, title, colour in zip(all_axes, kinds, titles, COLOURS, strict=False):
        bars(axes, list(names.values()), [row[kind] for row in rows], color=colour)
        axes.set(title=title, xlim=(0, 110))
    all_axes[-1].set_xlabel("answers right to the last character, %")
    figure.set_size_inches(7, 6)


columns = {
    "name": ("% right", ""),
    "taught": ("what it was taught", ".0f"),
    "unseen": ("in phrasings never seen", ".0f"),
    "never": ("facts never told", ".0f"),
}
setting = (
    f"{steps} steps of {batch} rows on the {base.name} base, r=8, alpha=16, every linear, "
    f"lr {lr:g}; asked are {n_asked} questions it was taught, {len(asked['unseen'])} in phrasings "
    f"never seen, where the true answer counts, and {len(asked['never'])} that were never told."
)
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Ask the run with shuffled answers for those that it was taught, in phrasings it never saw. How
#    many are right, and what does that say of the run with twelve phrasings?
# 2. In minilora/training/loop.py, `exact_match` lets no token be wrong: `~is_wrong.any(axis=1)`.
#    Write `all`: which tests fail, and what does a base answer that was never trained?
