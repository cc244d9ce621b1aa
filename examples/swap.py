"""One base, four adapters, one prompt: the attached adapter decides what the model does.

You learn that an adapter is a value: four models share one copy of the base, none disturbs another,
and one batch can carry a different adapter in each row. The task is checkable by hand: a Unix
permission string such as rwxr-x--- is turned into octal (750), into the umask that leaves it (027),
into bits (111101000) or into chmod's symbols (u=rwx,g=rx,o=). All 512 strings exist; 384 are
trained on, the other 128 were never seen.

Takes about a minute on two cores, most of it for the base; --base DIR takes one that the demo kept.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse

import numpy as np
from course import permissions

from minilora import (
    Adam,
    LoRAConfig,
    attach,
    generate,
    init_adapter,
    load_model,
    parameter_report,
    stack,
)
from minilora.cli import demo
from minilora.disk import characters
from minilora.optim import warmup_cosine
from minilora.training.batches import answer_rows, row_batches
from minilora.training.corpus import load_corpus
from minilora.training.loop import exact_match, train
from minilora.training.threads import cores, keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="few steps, a tiny base: learns little")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--base", help="folder of a pre-trained model, such as minilora-demo/base")
args = parser.parse_args()
rng = np.random.default_rng(args.seed)

# Training as the commands do it: each batch is computed in two parts, at once where there are two
# cores, and malloc keeps what a step frees for the next one. It saves time.
parts = 2
threads = min(parts, cores())
keep_freed_memory()

# 1. The base: English from nothing, as in the demo. It has never seen a permission string turned
# into anything.
if args.base:
    base = load_model(args.base)
else:
    size = demo.QUICK if args.quick else demo.FULL
    base = demo.pretrain(size, load_corpus(), np, rng, print, parts=parts, threads=threads)

# 2. Four tasks over the same inputs. The prompt does not say which one is meant.
trained_on, never_seen = permissions.split(rng)


def questions(task, which):
    """(prompt, answer) of each of these permissions, as token ids."""
    return characters.encode_pairs(permissions.questions(task, which))


# 3. Train one adapter per task. The base is shared and never written: its fingerprint is compared
# at the end.
before = base.fingerprint()
steps = 10 if args.quick else 200
adapters = {}
for name in permissions.TASKS:
    config = LoRAConfig(r=4, alpha=8, target_modules="all-linear")
    adapters[name] = init_adapter(base, config, rng)
    train(
        attach(base, adapters[name]),
        Adam(adapters[name].parameters(), betas=(0.9, 0.95)),
        row_batches(answer_rows(questions(name, trained_on)), 32, rng),
        steps,
        schedule=lambda step: warmup_cosine(step, steps, peak=1e-2, warmup=10),
        label=name,
        parts=parts,
        threads=threads,
    )

# 4. The matrix: each adapter (row) asked for each task (column), on strings never seen. Swapping is
# a look-up.
models = {"none": base}
for name, adapter in adapters.items():
    models[name] = attach(base, adapter)
n = 16 if args.quick else len(never_seen)
print(f"{f'exact answers, % of {n}':<26}" + "".join(f"{name:>10}" for name in permissions.TASKS))
for name, model in models.items():
    cells = []
    for task in permissions.TASKS:
        percent = 100 * np.mean(exact_match(model, questions(task, never_seen[:n])))
        cells.append(f"{percent:>10.0f}")
    print(f"{'adapter: ' + name:<26}" + "".join(cells))

# 5. The same prompt, four times in one batch: every row goes through its own adapter.
example = never_seen[0]
together = attach(base, stack(list(adapters.values())))
ids = np.stack([characters.encode(permissions.prompt(example))] * len(adapters))
# Token 0 is the line break, which ends an answer.
rows = generate(together, ids, 18, stop=0)
print("\none batch, one prompt     answer              right answer")
for (name, task), row in zip(permissions.TASKS.items(), rows, strict=True):
    answer = characters.decode(row[ids.shape[1] :]).split("\n")[0]
    print(f"{'row with ' + name:<26}{answer:<20}{task(example)}")
n_numbers = parameter_report(adapters["octal"]).total
changed = base.fingerprint() != before
print(f"\neach adapter: {n_numbers:,} numbers; base changed by all this: {changed}")
