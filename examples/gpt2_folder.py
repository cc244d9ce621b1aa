"""A GPT-2 folder of your own: the format of transformers, made from nothing, to fine-tune with `minilora finetune`.

You learn that a checkpoint is tensors, a configuration and a tokenizer, and nothing else: a byte-level BPE is trained
on Python's documentation, then a GPT with learned positions on its tokens, and both are written as transformers would.
A second text, the source of some standard modules, is put beside it, for the commands that are printed at the end.
--small writes an untrained model of GPT-2's own size instead, 124 million parameters, to see what that takes.

Takes about two minutes on two cores.
"""

from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import importlib
import inspect
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minilora import GPT, Adam, GPTConfig, generate, no_grad, parameter_report, save_gpt2
from minilora.disk.tokenizer import END, load_tokenizer
from minilora.optim import warmup_cosine
from minilora.training import batches, corpus
from minilora.training.loop import heldout_loss, train
from minilora.training.threads import keep_freed_memory, parts_and_threads

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="few steps, a tiny model: shows that it runs, learns little")
parser.add_argument("--small", action="store_true", help="GPT-2's own size, with random weights")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="gpt2-demo", help="folder for the model and the text (default gpt2-demo)")
args = parser.parse_args()
rng, out = np.random.default_rng(args.seed), Path(args.out)
out.mkdir(parents=True, exist_ok=True)

# 1. The tokenizer: byte-level BPE as GPT-2's, learned from the text. GPT-2's own has 50,257 entries.
corpus = corpus.load_corpus()
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
size = 50257 if args.small else 320 if args.quick else 2048
bpe.train_from_iterator([corpus.train], trainers.BpeTrainer(
    vocab_size=size, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False))  # fmt: skip
bpe.save(str(out / "tokenizer.json"))

# 2. The model.
shape = (12, 12, 768, size, 1024) if args.small else (2, 2, 32, size, 64) if args.quick else (4, 4, 128, size, 128)
model = GPT(GPTConfig(*shape), rng)
print(f"{'tokens in the vocabulary':<28} {bpe.get_vocab_size():>13,}")
print(f"{'parameters':<28} {parameter_report(model).total:>13,}")
if args.small:
    for table in (model.wte, model.wpe):
        table.weight.data *= np.float32(0.02 * np.sqrt(768))  # GPT-2's own initial size
    save_gpt2(model, out)
else:
    save_gpt2(model, out)  # the tokenizer is read together with the configuration
    tokenizer = load_tokenizer(out)
    ids, heldout = tokenizer.encode(corpus.train), tokenizer.encode(corpus.heldout)
    length, steps = shape[-1], 30 if args.quick else 800
    measure = lambda: heldout_loss(model, batches.consecutive_windows(heldout, length, 32))
    adam, before, began = Adam(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1), measure(), time.perf_counter()
    parts, threads = parts_and_threads(None, None, "numpy")
    keep_freed_memory()
    train(model, adam, batches.random_windows(ids, 8, length, rng), steps, label="pre-training",
          schedule=lambda step: warmup_cosine(step, steps, peak=3e-3, warmup=20),
          parts=parts, threads=threads)  # fmt: skip
    print(f"{'pre-training, seconds':<28} {time.perf_counter() - began:>13.0f}")
    print(f"{'held-out loss per token':<28} {before:>6.2f}{measure():>7.2f}")
    with no_grad():
        said = generate(model, tokenizer.encode("The class")[None], 20)[0]
    print(f"{'it writes':<28} {tokenizer.decode(said)!r}")
    save_gpt2(model, out)

# 3. A text from another world, and what to do with both.
modules = ["argparse", "ast", "configparser", "csv", "dataclasses", "heapq", "inspect", "shutil", "statistics",
           "tempfile", "textwrap", "threading"]  # fmt: skip
code = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)
(out / "code.txt").write_text(code, encoding="utf-8")
print(f"{'characters of code.txt':<28} {len(code):>13,}")
print(f"""
now:
  minilora finetune --base {out} --data {out}/code.txt --out {out}/code --r 16 --alpha 32 --lr 5e-3 --eval-split 0.1
  minilora inspect {out}/code
  minilora generate --base {out} --adapter {out}/code --prompt 'def __init__(self'
  minilora merge --base {out} --adapter {out}/code --out {out}/merged""")
