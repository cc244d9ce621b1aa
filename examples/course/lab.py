"""One run of a lab: its options, the base all labs share, training, a table, a file, a picture.

Knows no experiment. A lab begins with `begin(__file__, __doc__)` and ends with `finish`.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import threadpoolctl
from compared.report import cpu_name

from minilora import Adam, LoRAConfig, attach, init_adapter, load_model, quant, save_model
from minilora.backend import array_module, empty_kernel_cache
from minilora.cli import demo
from minilora.cli.asking import Chat, Lines
from minilora.cli.folders import find_sources
from minilora.disk import characters
from minilora.disk.tokenizer import load_tokenizer
from minilora.nn import Module
from minilora.optim import warmup_cosine
from minilora.training.batches import consecutive_windows, random_windows
from minilora.training.corpus import load_corpus
from minilora.training.loop import exact_match, heldout_loss, train
from minilora.training.threads import cores, keep_freed_memory, parts_and_threads

from . import picture

# The base that is trained here, once for all labs; with --base it is another model.
TINY = "tiny"
# Learning rates are chosen on a seed that no result comes from.
TUNING_SEED = 1000
# What a model made for chat is told before each question.
SYSTEM = "Answer in a few words."


class Base(NamedTuple):
    """A trained model, and how texts become its token ids.

    encode(text) -> ids (N,); decode(ids) -> text; pair(prompt, answer) -> the ids of both.
    `asking`, a Lines or Chat, puts questions to it, or is None if its tokenizer has no chat
    template. A window of its texts has `length` tokens, and a batch `batch` windows.
    """

    name: str
    model: Module
    encode: Callable
    decode: Callable
    pair: Callable
    asking: object
    length: int
    batch: int


def random_twin(model, seed):
    """A model of the shape of `model` that has learned nothing: its weights as a new one has."""
    twin = type(model)(model.config, np.random.default_rng((seed, 2)), model.parameters()[0].dtype)
    return twin.to_device(model.parameters()[0].xp).frozen()


def percent_right(model, asked):
    """How many answers of these (prompt ids, answer ids) are right to the last token, in %."""
    return 100 * float(np.mean(exact_match(model, asked)))


def begin(file, doc, *, base=TINY, with_base=True, backends=("numpy", "cupy")):
    """The Run of the lab whose source is `file` and whose docstring is `doc`.

    `base` is what the lab is about if --base names no other. A lab that asks for no base, or
    computes on the host alone, says so: it takes no other.
    """
    return Run(Path(file).stem, doc, _arguments(doc, base, with_base, backends), base)


def _arguments(doc, base, with_base, backends):
    """The options that every lab has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller base and a few steps: it learns little")
    add("--seed", type=int, default=0, help="the first seed (default 0)")
    add("--seeds", type=int, default=1, metavar="N", help="how many seeds (default 1)")
    add("--backend", choices=backends, default="numpy")
    bases = None if with_base else [TINY]
    what = "a model's folder, a .gguf file, or smollm2; default: "
    if base == TINY:
        what += "the GPT of the demo, trained once and kept in the folder of --out"
    else:
        what += base
    add("--base", default=base, choices=bases, help=what)
    add("--out", default="minilora-labs", metavar="DIR", help="default: minilora-labs")
    # In a notebook the command line is the notebook's own.
    args = parser.parse_args([] if "ipykernel" in sys.modules else None)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: at least 0")
    if args.base == TINY != base:
        parser.error(f"--base {TINY}: this lab needs a model made for chat, such as {base}")
    # What a lab has computed would be lost at its end.
    if Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out}: a file, where a folder is needed; choose another name")
    return args


class Run:
    """A lab that runs: what it was asked for, and where its results go.

    `seeds` is the list of seeds, `quick` whether to be short, `xp` the array module.
    """

    def __init__(self, name, doc, args, default_base):
        self.name = name
        self.has_default_base = args.base == default_base
        self.title = doc.splitlines()[0]
        self.quick = args.quick
        self.base_name = args.base
        self.out = Path(args.out)
        self.seeds = list(range(args.seed, args.seed + args.seeds))
        self.xp = array_module(args.backend)
        if empty_kernel_cache(self.xp):
            print(f"{args.backend} compiles its kernels in this first run, for minutes", flush=True)
        # As the commands do it: each batch in as many parts as there are cores, at once.
        self.parts, self.threads = parts_and_threads(None, None, args.backend)
        self.began = time.perf_counter()
        # A line is in a pipe or a file as soon as it is printed. A notebook does so by itself.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(line_buffering=True)
        if self.threads > 1:
            keep_freed_memory()

    def steps(self, n):
        """`n` steps, or a few in a quick run."""
        return 3 if self.quick else n

    def few(self, items, n=2):
        """`items`, or the first `n` of them in a quick run."""
        return list(items)[:n] if self.quick else list(items)

    def base(self, system=SYSTEM):
        """The Base. The tiny one is trained if the folder of --out does not have it yet.

        `system` is what a model made for chat is told before each question. If there is no such
        model, or it cannot be read, the program ends with a line that says so.
        """
        if self.base_name == TINY:
            # Its matrices are so small that a second thread of BLAS costs more than it brings.
            threadpoolctl.threadpool_limits(1, "blas")
            model = self._tiny_base()
            encode = characters.encode
            pair = lambda prompt, answer: (encode(prompt), encode(answer))
            return Base(TINY, model, encode, characters.decode, pair, Lines(), 128, 8)
        try:
            path = find_sources(self.base_name)
            tokenizer = load_tokenizer(path)
            # Widened once: a packed base would be widened again for every part of a batch.
            model = quant.widen(load_model(path, self.xp))
        except (OSError, ValueError) as error:
            sys.exit(f"{self.name}.py: {error}")
        asking = None if tokenizer.template is None else Chat(tokenizer, system)
        length = min(128, model.config.block_size)
        codec = (tokenizer.encode_text, tokenizer.decode, tokenizer.encode_pair)
        return Base(self.base_name, model, *codec, asking, length, 2)

    def base_for_questions(self, system=SYSTEM):
        """The base, if questions can be put to it; or else the program ends with a line."""
        base = self.base(system)
        if base.asking is None:
            sys.exit(
                f"{self.name}.py: {base.name} has no chat template, in which this lab asks its "
                "questions; take a model made for chat"
            )
        return base

    def _tiny_base(self):
        corpus = load_corpus()
        size = demo.QUICK if self.quick else demo.FULL
        kind = "base-quick" if self.quick else "base"
        # Another Python has other documentation, and so another base.
        folder = self.out / f"{kind}-{corpus.sha256[:12]}"
        if not folder.exists():
            rng = np.random.default_rng(0)
            log = lambda line: print(line.replace("[1/5] ", ""), flush=True)
            base = demo.pretrain(size, corpus, self.xp, rng, log, self.parts, self.threads)
            self.out.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=self.out))
            save_model(base, unfinished / "base")
            try:
                os.rename(unfinished / "base", folder)
            except OSError:
                # Another lab that ran at the same time was faster, with the same model.
                pass
            shutil.rmtree(unfinished)
            # The clock of the lab begins after the base, which is there for all labs.
            now = time.perf_counter()
            print(f"the base took {now - self.began:.0f} s; {folder} keeps it for all labs\n")
            self.began = now
        return load_model(folder, self.xp)

    def train(self, model, parameters, batches, steps, lr, label="", on_step=None):
        """`steps` steps of Adam on `parameters`, through `model`; the list of the losses.

        `on_step` is that of `minilora.training.loop.train`.
        """
        return train(
            model,
            Adam(parameters, betas=(0.9, 0.95)),
            batches,
            steps,
            schedule=lambda step: warmup_cosine(step, steps, peak=lr, warmup=min(10, steps - 1)),
            label=label,
            parts=self.parts,
            threads=self.threads,
            on_step=on_step,
        )

    def tuned_full(self, base, ids, steps, lr, seed):
        """The base with all of its weights trained on windows of the text `ids`."""
        model = base.model.trainable_copy()
        batches = self.windows(base, ids, seed)
        self.train(model, model.parameters(), batches, steps, lr, f"full, lr {lr:g}")
        return model

    def tuned_lora(self, base, ids, r, steps, lr, seed):
        """The base with LoRA of rank r on every linear, alpha = 2r, trained on windows of `ids`."""
        config = LoRAConfig(r=r, alpha=2 * r, target_modules="all-linear")
        adapter = init_adapter(base.model, config, np.random.default_rng(seed))
        model = attach(base.model, adapter)
        batches = self.windows(base, ids, seed)
        self.train(model, adapter.parameters(), batches, steps, lr, f"r={r}, lr {lr:g}")
        return model

    def windows(self, base, ids, seed):
        """Endless batches of windows of the text `ids`, (base.batch, base.length)."""
        return random_windows(ids, base.batch, base.length, np.random.default_rng((seed, 1)))

    def loss(self, base, model, ids, most=64):
        """Mean loss of `model` on at most `most` windows of the text `ids`, in nats per token."""
        windows = consecutive_windows(ids, base.length, 16)
        n_batches = 1 if self.quick else -(-most // 16)
        batches = list(itertools.islice(windows, n_batches))
        return heldout_loss(model, batches, parts=self.parts, threads=self.threads)

    def finish(self, setting, columns, rows, draw, **more):
        """Print the table, keep everything as JSON, and draw the picture.

        `setting` says in a sentence under what conditions this was measured. `columns` is {key of a
        row: (title, format)}; a value is a number, a text, or a list with a number for each seed,
        of which the table shows the mean and the range. `draw(figure)` draws the rows into a
        matplotlib figure. `more` is kept beside the rows.
        """
        seconds = time.perf_counter() - self.began
        print_table(columns, rows)
        if len(self.seeds) > 1:
            print(f"(mean over seeds {self.seeds[0]} to {self.seeds[-1]}, and the range)")
        name = self.name
        if not self.has_default_base:
            name += f"_{Path(self.base_name).stem}"
        # What was measured in full is not overwritten by a look.
        if self.quick:
            name += "_quick"
        kept = {
            "lab": self.name,
            "title": self.title,
            "base": self.base_name,
            "quick": self.quick,
            "setting": setting,
            "seeds": self.seeds,
            "seconds": round(seconds, 1),
            "machine": machine(),
            "columns": columns,
            "rows": rows,
            **more,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{name}.json"
        text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")
        print(f"\n{setting}\n{seconds:.0f} s; kept in {file}")
        drawn = picture.save(self.out / f"{name}.png", draw, text)
        print(f"drawn in {drawn}" if drawn else f"no picture: {picture.MISSING}")


def machine():
    """The processor, and the versions of Python and NumPy, for a result that is kept."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def shown(value, form):
    """A value of a table as text: of a list, one number for each seed, the mean and the range."""
    if value is None:
        return "-"
    if not isinstance(value, list):
        return format(value, form)
    mean = format(float(np.mean(value)), form)
    low = format(min(value), form)
    high = format(max(value), form)
    return mean if low == high else f"{mean} ({low} .. {high})"


def print_table(columns, rows):
    """The rows, {key: value}, as a table with `columns`, {key: (title, format)}."""
    titles = [title for title, _ in columns.values()]
    cells = [[shown(row.get(key), form) for key, (_, form) in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]
    for line in [titles, *cells]:
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([first, *rest]).rstrip())
