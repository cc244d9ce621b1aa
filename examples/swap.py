"""One base, four adapters, the same prompt: which adapter is attached decides what the model does.

You learn that an adapter is a value: four models share one copy of the base, none disturbs another, and one batch
can carry a different adapter in each row. The task is checkable by hand: a Unix permission string such as rwxr-x---
is turned into octal (750), into the umask that leaves it (027), into bits (111101000) or into chmod's symbols
(u=rwx,g=rx,o=). All 512 strings exist; 384 are trained on, the other 128 were never seen.

Takes about a minute on two cores, of which most is the base; --base DIR takes one that the demo kept.
"""

from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import itertools

import numpy as np

from minilora import Adam, LoRAConfig, attach, generate, init_adapter, load_model, parameter_report, stack
from minilora.cli import demo
from minilora.disk import characters
from minilora.optim import warmup_cosine
from minilora.training import corpus
from minilora.training.batches import pair_batches
from minilora.training.loop import exact_match, train
from minilora.training.threads import keep_freed_memory, parts_and_threads

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="few steps, a tiny base: shows that it runs, learns little")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--base", help="folder of a pre-trained model, such as minilora-demo/base")
args = parser.parse_args()
rng, parts_threads = np.random.default_rng(args.seed), parts_and_threads(None, None, "numpy")
keep_freed_memory()

# 1. The base: English from nothing, as in the demo. It has never seen a permission string turned into anything.
size = demo.QUICK if args.quick else demo.FULL
base = load_model(args.base) if args.base else demo.pretrain(size, corpus.load_corpus(), np, rng, print, *parts_threads)

# 2. Four tasks over the same inputs. The prompt says nothing about which one is meant.
bits = list(itertools.product([0, 1], repeat=9))


def triples(b):
    return [b[0:3], b[3:6], b[6:9]]


def letters(triple, blank):
    return "".join(c if bit else blank for c, bit in zip("rwx", triple, strict=True))


def octal(b):
    return "".join(str(4 * r + 2 * w + x) for r, w, x in triples(b))


tasks = {
    "octal": octal,
    "umask": lambda b: octal([1 - bit for bit in b]),
    "binary": lambda b: "".join(map(str, b)),
    "symbolic": lambda b: ",".join(f"{who}={letters(t, '')}" for who, t in zip("ugo", triples(b), strict=True)),
}


def prompt(b):
    return "".join(letters(t, "-") for t in triples(b)) + " is "


order = rng.permutation(len(bits))
seen, unseen = [bits[i] for i in order[:384]], [bits[i] for i in order[384:]]

# 3. Train one adapter per task. The base is shared and never written: its fingerprint is compared at the end.
before = base.fingerprint()
steps = 10 if args.quick else 200
schedule = lambda step: warmup_cosine(step, steps, peak=1e-2, warmup=10)
adapters = {}
for name, task in tasks.items():
    adapters[name] = init_adapter(base, LoRAConfig(r=4, alpha=8, target_modules="all-linear"), rng)
    adam = Adam(adapters[name].parameters(), betas=(0.9, 0.95))
    pairs = characters.encode_pairs([(prompt(b), task(b) + "\n") for b in seen])
    batches = pair_batches(pairs, 32, rng)
    parts, threads = parts_threads
    train(attach(base, adapters[name]), adam, batches, steps, schedule=schedule, label=name, parts=parts,
          threads=threads)

# 4. The matrix: each adapter (row) asked for each task (column), on strings never seen. Swapping is a look-up.
models = {"none": base} | {name: attach(base, adapter) for name, adapter in adapters.items()}
n = 16 if args.quick else len(unseen)
print(f"{f'exact answers, % of {n}':<26}" + "".join(f"{name:>10}" for name in tasks))
for name, model in models.items():
    pairs = [[(prompt(b), task(b) + "\n") for b in unseen[:n]] for task in tasks.values()]
    row = [100 * np.mean(exact_match(model, characters.encode_pairs(column))) for column in pairs]
    print(f"{'adapter: ' + name:<26}" + "".join(f"{percent:>10.0f}" for percent in row))

# 5. The same prompt, four times in one batch: every row goes through its own adapter.
example = unseen[0]
together = attach(base, stack(list(adapters.values())))
ids = np.stack([characters.encode(prompt(example))] * len(adapters))
print("\none batch, one prompt     answer              right answer")
for (name, task), row in zip(tasks.items(), generate(together, ids, 18, stop=0), strict=True):
    answer = characters.decode(row[ids.shape[1] :]).split("\n")[0]
    print(f"{'row with ' + name:<26}{answer:<20}{task(example)}")
size = parameter_report(adapters["octal"]).total
print(f"\neach adapter: {size:,} numbers; base changed by all this: {base.fingerprint() != before}")
