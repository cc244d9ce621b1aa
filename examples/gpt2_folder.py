"""A GPT-2 folder of your own: the format of transformers, made from nothing, to fine-tune.

You learn that a checkpoint is tensors, a configuration and a tokenizer, and nothing else: a
byte-level BPE is trained on Python's documentation, then a GPT with learned positions on its
tokens, and both are written as transformers would. A second text, the source of some standard
modules, is put beside it, for the commands that are printed at the end. --small writes an untrained
model of GPT-2's own size instead, 124 million parameters, to see what that takes.

Takes about two minutes on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import importlib
import inspect
import math
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minilora import GPT, Adam, GPTConfig, generate, no_grad, parameter_report, save_gpt2
from minilora.disk.tokenizer import END, load_tokenizer
from minilora.optim import warmup_cosine
from minilora.training.batches import consecutive_windows, random_windows
from minilora.training.corpus import load_corpus
from minilora.training.loop import heldout_loss, train
from minilora.training.threads import keep_freed_memory, parts_and_threads

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="few steps, a tiny model: learns little")
parser.add_argument("--small", action="store_true", help="GPT-2's own size, with random weights")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="gpt2-demo", help="folder for all of it (default gpt2-demo)")
args = parser.parse_args()
rng = np.random.default_rng(args.seed)
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)


def show(name, value):
    print(f"{name:<28} {value:>13}")


# 1. The sizes. GPT-2's own vocabulary has 50,257 tokens.
config = GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=2048, block_size=128)
if args.quick:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=64)
if args.small:
    config = GPTConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024)

# 2. The tokenizer: byte-level BPE as GPT-2's, learned from the text.
corpus = load_corpus()
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=config.vocab_size,
    special_tokens=[END],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
)
bpe.train_from_iterator([corpus.train], trainer)
bpe.save(str(out / "tokenizer.json"))
show("tokens in the vocabulary", f"{bpe.get_vocab_size():,}")

# 3. The model. It is saved before it is trained too, because the tokenizer is read together with
# the configuration.
model = GPT(config, rng)
show("parameters", f"{parameter_report(model).total:,}")
if args.small:
    # GPT-2's own initial size.
    for table in (model.wte, model.wpe):
        table.weight.data *= np.float32(0.02 * math.sqrt(config.n_embd))
save_gpt2(model, out)

# 4. Its training.
if not args.small:
    tokenizer = load_tokenizer(out)
    ids = tokenizer.encode(corpus.train)
    heldout = tokenizer.encode(corpus.heldout)
    steps = 30 if args.quick else 800
    # As the commands train: each batch is computed in parts, at once where there are several cores,
    # and malloc keeps what a step frees for the next one. It saves time.
    parts, threads = parts_and_threads(None, None, "numpy")
    keep_freed_memory()
    windows = lambda: consecutive_windows(heldout, config.block_size, 32)
    measure = lambda: heldout_loss(model, windows(), parts=parts, threads=threads)
    before = measure()
    began = time.perf_counter()
    train(
        model,
        Adam(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        random_windows(ids, 8, config.block_size, rng),
        steps,
        schedule=lambda step: warmup_cosine(step, steps, peak=3e-3, warmup=20),
        label="pre-training",
        parts=parts,
        threads=threads,
    )
    show("pre-training, seconds", f"{time.perf_counter() - began:.0f}")
    show("held-out loss per token", f"{before:.2f}{measure():>7.2f}")
    with no_grad():
        sample = generate(model, tokenizer.encode("The class")[None], 20)[0]
    show("it writes", repr(tokenizer.decode(sample)))
    save_gpt2(model, out)

# 5. A text from another world, and what to do with both.
modules = [
    "argparse",
    "ast",
    "configparser",
    "csv",
    "dataclasses",
    "heapq",
    "inspect",
    "shutil",
    "statistics",
    "tempfile",
    "textwrap",
    "threading",
]
code = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)
(out / "code.txt").write_text(code, encoding="utf-8")
show("characters of code.txt", f"{len(code):,}")
print(f"""
now:
  minilora finetune --base {out} --data {out}/code.txt --out {out}/code \\
      --r 16 --alpha 32 --lr 5e-3 --eval-split 0.1
  minilora inspect {out}/code
  minilora generate --base {out} --adapter {out}/code --prompt 'def __init__(self'
  minilora merge --base {out} --adapter {out}/code --out {out}/merged""")
