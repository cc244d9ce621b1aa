"""The fuzzer: files and command lines that somebody spoilt, by the thousand, and what the program makes of them.

    python tests/fuzz.py [--cases 20000] [--seed 0] [--kind adapter ...] [--jobs 2] [--json FILE]
    python tests/fuzz.py --case adapter:17 [--keep FOLDER]

Each case spoils copies of the files in tiny_files.py in one to three places and runs a command on them, in a process
that lives for many cases. It must end with exit code 0, 1 or 2 within LIMIT seconds and say what is wrong in a few
lines that name a file or an argument; no traceback, no abort, no control character on the screen, no more memory than
MEMORY above idle, nothing new in the folder but what the command was to write. What breaks this is printed with its
seed, which repeats it alone.
"""

import argparse
import contextlib
import ctypes
import gc
import glob
import io
import json
import math
import os
import queue
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mutations import ESCAPES, pick, spoil, without_metadata
from tiny_files import KEPT, RUN, inside, older_version, write_all

# Seconds that a case may take, and bytes that it may take beyond what the process has before it.
LIMIT = 5
MEMORY = 200 << 20
# A process may ask the system for this much more, and write this much to one file: nobody else suffers.
ADDRESS_SPACE = 2 << 30
FILE_SIZE = 400 << 20
# Lines on stderr, and characters in one of them.
MOST_LINES = 6
LONGEST_LINE = 3000
# Written out here too: who is examined does not choose the questions.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
FINDINGS = ("traceback", "abort", "hang", "memory", "left behind", "escape", "code", "talk", "unnamed")
ROOT = Path(__file__).resolve().parent.parent


class Subject(NamedTuple):
    """Files to spoil, and commands that read them.

    `needs` are the names that a case has of tiny_files.py, `spoilt` the patterns of the files that are spoilt, and
    `commands` command lines.
    """

    needs: tuple
    spoilt: tuple
    commands: tuple


def of_adapter(base, adapter, other, *spoilt):
    """The commands that read an adapter. DoRA's are not added, and some bases know no text."""
    commands = [
        f"inspect {adapter}",
        f"inspect {adapter} --base {base}",
        f"merge --base {base} --adapter {adapter} --out out",
    ]
    if adapter != "dora":
        commands += [
            f"combine --base {base} --adapter {adapter} {other} --weights 0.5 -1 --out out",
            f"combine --base {base} --adapter {adapter} --r 1 --out out",
        ]
    if "/" not in base:
        prompt = "generate --base {} --adapter {} --prompt 'The list' --max-new-tokens 3"
        commands += [
            prompt.format(base, adapter),
            f"compare {base} {adapter} --data t.txt --batch 2 --length 16 --parts 1 --threads 1",
        ]
    if "/" not in base and base != "characters":
        commands.append(f"chat --base {base} --adapter {adapter} --say hello --max-new-tokens 2")
    return Subject((base, adapter, other, "t.txt"), spoilt or (f"{adapter}/*",), tuple(commands))


def of_base(base, other, *spoilt):
    """The commands that read a model, a folder or a file."""
    return Subject(
        (base, other, "t.txt", "q.jsonl", "lora", "dora"),
        spoilt or (f"{base}/*",),
        (
            f"inspect {base}",
            f"generate --base {base} --prompt 'The list' --max-new-tokens 3",
            f"generate --base {base} --prompt 'The list' --max-new-tokens 2 --temperature 1 --top-p 0.9 "
            "--num-samples 2",
            f"count --base {base} --r 1 2",
            f"extract --base {base} --tuned {other} --r 1 --out out",
            f"finetune --base {base} --data q.jsonl --out out --alpha 4 --r 2 --steps 1 --parts 1 --threads 1",
            f"finetune --base {base} --data t.txt --length 8 --out out --alpha 4 --r 2 --steps 2 --parts 1 --threads 1 "
            "--quantize nf4 --log log2.jsonl",
        )
        + ((f"chat --base {base} --say hello --max-new-tokens 2",) if "characters" not in base else ()),
    )


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "generation_config.json", "special_tokens_map.json")  # fmt: skip


def of_tokenizer(base):
    """The commands that read what stands beside a model."""
    subject = of_base(base, base, *(f"{base}/{name}" for name in TOKENIZER_FILES))
    chats = f"finetune --base {base} --data chats.jsonl --out out --alpha 4 --r 2 --steps 1 --parts 1 --threads 1"
    commands = [command for command in subject.commands if not command.startswith(("count", "inspect", "extract"))]
    adapter = {"llama": "dora", "gpt2two": "loratwo"}.get(base, "lora")
    merged = f"merge --base {base} --adapter {adapter} --out out"
    talk = f"chat --base {base} --system 'Be kind' --say '<|im_end|> two' --max-new-tokens 2"
    return Subject((*subject.needs, adapter, "chats.jsonl"), subject.spoilt, (*commands, chats, merged, talk))


RUN_FILES = ("gpt2", "q.jsonl", "run", "log.jsonl")
# {kind of case: its Subjects}
KINDS = {
    "adapter": (
        of_adapter("gpt2", "lora", "lora2"),
        of_adapter("gpt2", "lora2", "lora"),
        of_adapter("llama", "dora", "dora"),
        of_adapter("characters", "letters", "letters"),
        *(of_adapter(f"{name}/base", f"{name}/adapter", f"{name}/adapter")
          for name in ("c_attn", "old_style", "regex", "patterns", "qwen3")),
    ),
    "model": (
        *(of_base(base, f"{base}two", f"{base}/*.safetensors", f"{base}/config.json")
          for base in ("gpt2", "llama", "characters")),
        Subject(("sharded",), ("sharded/base/*",), ("inspect sharded/base", "count --base sharded/base --r 2")),
        *(Subject((name,), (f"{name}/base/*",), (f"inspect {name}/base", f"count --base {name}/base --r 2 --length 8"))
          for name in ("qwen3", "llama_llama3")),
    ),
    "gguf": (
        of_base("a.gguf", "b.gguf", "a.gguf"),
        Subject(("pieces.gguf", "t.txt"), ("pieces.gguf",), (
            "inspect pieces.gguf",
            "generate --base pieces.gguf --prompt 'the one' --max-new-tokens 3",
            "finetune --base pieces.gguf --data t.txt --length 8 --out out --alpha 4 --r 2 --steps 1 --parts 1 "
            "--threads 1",
        )),
    ),
    "tokenizer": (of_tokenizer("gpt2"), of_tokenizer("gpt2two"), of_tokenizer("llama")),
    "checkpoint": (
        Subject(RUN_FILES, ("run/checkpoint/*", "log.jsonl"), (
            shlex.join([*RUN, "--resume"]),
            "finetune --resume --out run",
            "finetune --resume --out run --threads 1",
        )),
    ),
    "versions": (
        Subject(("gpt2", "q.jsonl", "kept"), ("kept/*", "kept/versions/*/*", "kept/*.json"), (
            "history kept",
            "history . kept",
            "rollback kept",
            "rollback kept --to VERSION",
            "inspect kept --base gpt2",
            shlex.join(KEPT),
            "finetune --base gpt2 --data q.jsonl --from-adapter kept --out out --steps 1 --parts 1 --threads 1",
        )),
    ),
    "configuration": (
        of_adapter("gpt2", "lora", "lora2", "lora/*.json", "gpt2/config.json"),
        of_adapter("patterns/base", "patterns/adapter", "patterns/adapter", "patterns/*/*.json"),
        of_base("gpt2", "gpt2two", "gpt2/config.json", "gpt2/generation_config.json"),
        of_base("llama", "llamatwo", "llama/config.json"),
        of_base("characters", "characterstwo", "characters/config.json"),
        Subject(("gpt2",), ("gpt2/config.json",), ("count --base gpt2/config.json --r 2 --length 16",)),
        Subject(("gpt2", "q.jsonl", "done", "settings.toml"), ("done/*.json", "settings.toml"), (
            "finetune --config done/run.json --out out --threads 1",
            "finetune --config settings.toml --out out --threads 1",
            "inspect done --base gpt2",
            "finetune --base gpt2 --data q.jsonl --from-adapter done --out out --steps 1 --parts 1 --threads 1",
        )),
    ),
    "data": (
        Subject(("gpt2", "lora", "q.jsonl", "chats.jsonl", "t.txt"), ("q.jsonl", "chats.jsonl", "t.txt"), (
            "finetune --base gpt2 --data q.jsonl --out out --alpha 4 --steps 2 --batch 2 --parts 1 --threads 1",
            "finetune --base gpt2 --data chats.jsonl --out out --alpha 4 --steps 1 --parts 1 --threads 1 "
            "--too-long cut --r 2",
            "finetune --base gpt2 --data t.txt --length 8 --out out --alpha 4 --steps 1 --parts 1 --threads 1 "
            "--eval-split 0.3",
            "compare gpt2 lora --data q.jsonl t.txt chats.jsonl --length 16 --parts 1 --threads 1",
        )),
    ),
    "results": (
        # The page takes seconds to make.
        *[Subject(("log.jsonl",), ("log.jsonl",), ("plot log.jsonl --out picture.png",))] * 5,
        Subject(("rank.json",), ("rank.json",), ("playground --html page.html --measured rank.json",)),
    ),
    "command": (),
}  # fmt: skip


# One case.


class Case(NamedTuple):
    """The words of a command line, and what was done to its files, in words."""

    argv: list
    notes: list


def make_case(kind, seed, files, folder):
    """Lay the files of the case `kind`:`seed` into `folder`, which is the working directory, spoilt; a Case."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    if kind == "command":
        return _spoilt_command(rng, files, folder)
    subject = pick(rng, KINDS[kind])
    copy_needs(files, folder, subject.needs)
    notes = []
    if rng.random() < 0.5:
        # What others wrote: whatever we note beside tensors would refuse most of it at once.
        for path in map(Path, sorted(glob.glob("*/*.safetensors"))):
            without_metadata(path)
        notes.append("no metadata")
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        paths = [Path(path) for pattern in subject.spoilt for path in sorted(glob.glob(pattern)) if is_plain(path)]
        if not paths:
            break
        path = pick(rng, paths)
        others = [other for other in sorted(Path().glob("*/*")) if is_plain(other) and other != path]
        same_name = [other for other in others if other.name == path.name]
        notes.append(spoil(rng, path, same_name or others))
        if path.name in SAY_HOW_MUCH and is_plain(path) and path.stat().st_size < 1 << 20:
            path.write_bytes(MUCH.sub(rb"\g<1>7", path.read_bytes()))
    command = pick(rng, subject.commands).replace("VERSION", older_version(files))
    return Case(shlex.split(command), notes)


# Files that say how much is computed, and where one says that it is more than a hundred.
SAY_HOW_MUCH = ("run.json", "settings.toml", "checkpoint.json", "receipt.json")
MUCH = re.compile(rb'("?(?:steps|batch|accumulate|length|parts|workers)"?\s*[:=]\s*)"?[\d.e+]{3,}"?')


def is_plain(path):
    """Is it a file, and no link to one?"""
    return os.path.isfile(path) and not os.path.islink(path)


def copy_needs(files, folder, needs):
    """Copy those files of tiny_files.py into `folder`. A name `a/b` stands for `a`."""
    for name in dict.fromkeys(need.partition("/")[0] for need in needs):
        if name == "pipe":
            os.mkfifo(folder / name)
        elif (files / name).is_dir():
            shutil.copytree(files / name, folder / name)
        else:
            shutil.copyfile(files / name, folder / name)


# Flags whose number says how much is computed: a large one is no fault of the program.
WORK = ("--steps", "--max-new-tokens", "--num-samples", "--batch", "--length", "--accumulate", "--parts", "--threads")
ODD_WORDS = ("", " ", "-", "--", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400", "1e-400", "1e308", "1e-30",
             "9" * 400, "9" * 5000, "٣", "½", "0x10", "1_000", "1,2", "a=b", "a\nb", "\udce9", "no/such/place", ".",
             "/dev/null", "/dev/zero", "x" * 5000, "a\0b", "*", "~", "q_proj", "all-linear", "h.0", "mpi", "nf4",
             "cupy", "bf16", "pipe", "t.txt", "gpt2", "lora", "a.gguf", "gpt2/config.json", "run", "log.jsonl",
             "rank.json", "(.+)+x", "(?:(?:(?:a{999}){999}){999})", *ESCAPES)  # fmt: skip


def _spoilt_command(rng, files, folder):
    """A command line of some subject with words changed, on whole files."""
    subject = pick(rng, [subject for subjects in KINDS.values() for subject in subjects])
    copy_needs(files, folder, (*subject.needs, "pipe", "gpt2", "lora", "t.txt", "q.jsonl"))
    words = shlex.split(pick(rng, subject.commands))
    notes = []
    for _ in range(int(rng.integers(1, 4))):
        notes.append(_spoil_words(rng, words))
    return Case(_bounded(words), notes)


def _spoil_words(rng, words):
    """Change a list of words in one place; returns what was done."""
    place = int(rng.integers(1, len(words))) if len(words) > 1 else 0
    word = pick(rng, ODD_WORDS)
    kind = pick(rng, ["odd"] * 4 + ["out", "twice", "flag", "flag", "misspelt", "joined", "turned", "end"])
    if kind == "odd" and len(words) > 1:
        words[place] = word
    elif kind == "out" and len(words) > 1:
        del words[place]
    elif kind == "twice":
        words.insert(place, words[place])
    elif kind == "flag":
        words += [pick(rng, _all_flags()), word][: int(rng.integers(1, 3))]
    elif kind == "misspelt":
        words[place] = pick(rng, [words[place][::-1], *(words[place] + end for end in ("x", "s", "\x1b[2J", "="))])
    elif kind == "joined" and len(words) > 2:
        words[place - 1 : place + 1] = [f"{words[place - 1]}={words[place]}"]
    elif kind == "turned":
        other = int(rng.integers(len(words)))
        words[place], words[other] = words[other], words[place]
    else:
        words.append(word)
    return kind


def _all_flags():
    from minilora.cli.table import COMMANDS, parser_of

    return sorted({flag for name in COMMANDS for flag in parser_of(name).flags})


def _bounded(words):
    """The words without what would rightly take long, or start processes."""
    if words and words[0] == "demo":
        words[0] = "demos"
    bounded = []
    for word in words:
        flag, _, value = word.partition("=")
        previous = bounded[-1] if bounded else ""
        if (previous.startswith("--w") and "work" in previous) or (flag.startswith("--wo") and value):
            word = f"{flag}=0" if value else "0"
        elif any(name.startswith(previous) and len(previous) > 3 for name in WORK) and _is_large(word):
            word = "3"
        elif any(name.startswith(flag) and len(flag) > 3 for name in WORK) and _is_large(value):
            word = f"{flag}=3"
        bounded.append(word)
    return bounded


def _is_large(word):
    return word.isdecimal() and (len(word) > 400 or int(word) > 8) and len(word) <= 4000


# The process that runs cases.


def serve(files):
    """Read cases, a line each, run them, and answer with a line on each: on the descriptors that were 0 and 1."""
    with contextlib.suppress(OSError, AttributeError):
        # PR_SET_PDEATHSIG: where this is Linux, no case outlives whoever asked for it.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    questions = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Imported before the limit, and before memory is measured.
    import minilora.cli.main  # noqa: F401

    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    here = Path(tempfile.mkdtemp(prefix="case-"))
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in questions:
        question = json.loads(line)
        answer = run_case(question["kind"], question["seed"], Path(files), here, question.get("plant"))
        print(json.dumps(answer), file=answers, flush=True)
        if question.get("keep"):
            continue
    shutil.rmtree(here, ignore_errors=True)


def run_case(kind, seed, files, here, plant=None):
    """Run one case in the new folder `here`/case: what came of it, as a dict for JSON."""
    folder = here / "case"
    temporary = here / "temporary"
    for place in (folder, temporary):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    os.chdir(folder)
    tempfile.tempdir = str(temporary)
    case = make_case(kind, seed, files, folder)
    before = snapshot(folder)
    # What is alive between two cases stays: the collector need not go through it again.
    gc.collect()
    gc.freeze()
    idle = _restart_peak()
    limit = _bytes_of("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    start, cpu = time.perf_counter(), time.process_time()
    code, out, err, trace = captured(case.argv, here, plant)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = snapshot(folder)
    new = sorted(after.keys() - before.keys()) + [f"(temporary) {path.name}" for path in temporary.iterdir()]
    changed = sorted(path for path in before if after.get(path) != before[path])
    threads = threading.active_count()
    os.chdir(here)
    return {
        "kind": kind, "seed": seed, "argv": case.argv, "notes": case.notes, "code": code, "out": out[-4000:],
        "err": err[-4000:], "trace": trace, "seconds": round(seconds, 3), "cpu": round(cpu, 3),
        "memory": max(0, _bytes_of("VmHWM") - idle), "new": new, "changed": changed, "threads": threads,
        "controls": sorted({*CONTROLS.findall(out), *CONTROLS.findall(err)}),
    }  # fmt: skip


class Screen(io.TextIOWrapper):
    """A stdout that says it is a terminal: what is safe there is asked."""

    def isatty(self):
        return True


def captured(argv, here, plant):
    """(exit code, stdout, stderr, what escaped) of the program, what libraries write past Python included."""
    from minilora.cli.main import main

    paths = [here / "out", here / "err"]
    kept = [os.dup(1), os.dup(2)]
    for number, path in enumerate(paths, 1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    code, trace = None, None
    streams = sys.stdin, sys.stdout, sys.stderr
    how = {"encoding": "utf-8", "errors": "backslashreplace", "write_through": True, "newline": "\n"}
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8")
    sys.stdout = Screen(open(1, "wb", closefd=False), **how)
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), **how)
    try:
        with PLANTS[plant]() if plant else contextlib.nullcontext():
            code = main(list(argv))
    except BaseException as error:
        trace = {"error": f"{type(error).__name__}: {error}"[:300], "where": _where(error),
                 "text": "".join(traceback.format_exception(error))[-6000:]}  # fmt: skip
        # The frames hold what the case allocated.
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
    out, err = (path.read_bytes()[:2_000_000].decode("utf-8", errors="backslashreplace") for path in paths)
    return code, out, err, trace


def _where(error):
    """The innermost line of the library in a traceback, or the innermost at all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}minilora{os.sep}" in frame.filename]
    if not frames:
        return "nowhere"
    frame = (ours or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def snapshot(folder):
    """{path: what is there} of all that is in a folder; nothing but a plain file is opened."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = Path(root, name)
            status = path.lstat()
            content = None
            if is_plain(path) and status.st_size < 1 << 22:
                content = blake2b(path.read_bytes(), digest_size=8).hexdigest()
            elif path.is_symlink():
                content = os.readlink(path)
            what = [status.st_mode, content]
            # A folder grows with what is in it.
            found[path.relative_to(folder).as_posix()] = [*what, None if path.is_dir() else status.st_size]
    return found


def _bytes_of(field):
    """How much memory this process has, by a field of the system's: VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def _restart_peak():
    """What this process has in memory now, from where its peak is counted again."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _bytes_of("VmHWM")


# Bugs to plant, each as a context: the fuzzer must find them.


def _planted(name):
    """A function that does `name` where `inspect` reads an adapter."""
    kept = []

    def reads(folder):
        if name == "traceback":
            raise KeyError("r")
        if name == "hang":
            while True:
                time.sleep(60)
        if name == "abort":
            os.abort()
        if name == "memory":
            kept.append(bytes(MEMORY + (8 << 20)).replace(b"\0", b"\1"))
        if name == "left behind":
            Path(folder).with_name("leftover").mkdir(exist_ok=True)
        if name == "escape":
            print("\x1b[2J", end="")
        if name == "code":
            raise SystemExit(3)
        if name == "talk":
            print("one\n" * 50, file=sys.stderr)
        raise ValueError("no file is named here" if name == "unnamed" else f"{folder}: a planted bug")

    @contextlib.contextmanager
    def plant():
        from minilora.cli import inspect

        true_load = inspect.load_folder
        inspect.load_folder = lambda folder, *more: reads(folder)
        try:
            yield
        finally:
            inspect.load_folder = true_load
            kept.clear()

    return plant


PLANTS = {name: _planted(name) for name in FINDINGS}


# What was found.


def findings(answer):
    """[(finding, what it is called among its like)] of the answer on a case."""
    found = []
    if answer.get("died"):
        return [(answer["died"], answer["how"])]
    trace, err = answer["trace"], answer["err"]
    if trace:
        found.append(("traceback", f"{trace['error'].partition(':')[0]} at {trace['where']}"))
    elif "Traceback (most" in err or "panicked at" in err:
        found.append(("traceback", f"printed: {err.strip().splitlines()[0][:80]}"))
    elif answer["code"] not in (0, 1, 2):
        found.append(("code", f"exit code {answer['code']}"))
    if answer["cpu"] > LIMIT:
        found.append(("hang", f"{LIMIT} s of computing"))
    if answer["memory"] > MEMORY:
        found.append(("memory", f"over {MEMORY >> 20} MB in {answer['argv'][0]}"))
    if left := left_behind(answer):
        found.append(("left behind", f"{answer['argv'][0]}: {left}"))
    if answer["controls"] and not trace:
        found.append(("escape", f"{answer['controls'][0]!a} from {answer['argv'][0]}"))
    # Without what a progress bar draws over itself.
    lines = [line for line in re.sub("\r[^\n\r]*", "", err).split("\n") if line.strip()]
    if not trace and (len(lines) > MOST_LINES or any(len(line) > LONGEST_LINE for line in lines)):
        found.append(("talk", f"{len(lines)} lines from {answer['argv'][0]}"))
    if not trace and answer["code"] == 1 and not names_something(answer):
        found.append(("unnamed", re.sub(r"\d+", "N", lines[-1])[:90] if lines else "nothing said"))
    return found


def left_behind(answer):
    """What the case has left that its command was not to write, as a text; None if nothing."""
    argv = answer["argv"]
    may_write = []
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if len(flag) > 3 and any(name.startswith(flag) for name in ("--out", "--log", "--html")):
            may_write.append(os.path.normpath(value or "".join(argv[i + 1 : i + 2])))
    if argv[:1] == ["rollback"]:
        may_write += argv[1:]
    if argv[:1] == ["plot"]:
        may_write += [re.sub(r"\.[^.]*$", ".png", word) for word in argv[1:]]
    done = answer["code"] == 0
    if "--resume" in argv:
        # The log that the run began; and whatever ends it, its checkpoint says so.
        may_write += ["log.jsonl", "elsewhere"]
        done = done or any(f"{place}/checkpoint" in answer["err"] for place in may_write)
    wrong = []
    for path in (*answer["new"], *answer["changed"]):
        # The folder of the command, what is in it, and the folders that it is in.
        inside = any(
            path == place or path.startswith(f"{place}/") or place.startswith(f"{path}/") for place in may_write
        )
        if not (done and inside):
            wrong.append(path)
    return ", ".join(wrong[:3]) or None


def names_something(answer):
    """Does the last line name one of the files in the folder, or an argument?"""
    line = answer["err"].strip().splitlines()[-1] if answer["err"].strip() else ""
    if answer["kind"] == "command":
        return len(line) > 20
    words = {part for word in answer["argv"] for part in re.split(r"[/=]", word) if len(part) > 2}
    words |= {part.rpartition("/")[2] for note in answer["notes"] for part in [note.partition(":")[0].split(" is ")[0]]}
    # Or a path that the case has put into a file?
    words |= {note.rpartition(" = ")[2].strip("'\"")[-6:] for note in answer["notes"] if " = " in note}
    return any(word in line for word in words if word) or "--" in line


# The processes, and who gives them cases.


class Process:
    """A process that serves cases, and another in its place when it has died."""

    def __init__(self, files, scratch):
        self.files, self.scratch, self.process = files, scratch, None

    def ask(self, question, limit=LIMIT):
        """The answer on a case, or that the process died of it or took longer than `limit` seconds."""
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else None
        if line:
            return json.loads(line)
        died = "hang" if line is None else "abort"
        how = f"over {limit} s" if line is None else f"exit code {self.process.wait()}"
        self.stop()
        return {"kind": question["kind"], "seed": question["seed"], "died": died, "how": how}

    def _start(self):
        environment = {
            **os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "MPLCONFIGDIR": str(self.scratch),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TMPDIR": str(self.scratch),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.files)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        if not self.process.stdout.readline():
            raise RuntimeError("the process that runs cases does not start")

    def stop(self):
        """End the process, and those that it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None


def fuzz(questions, jobs, files, scratch, say):
    """Ask all questions, `jobs` at a time; `say(answer, findings)` is called with each answer."""
    waiting = queue.SimpleQueue()
    for question in questions:
        waiting.put(question)
    lock = threading.Lock()

    def work():
        process = Process(files, scratch)
        try:
            while True:
                try:
                    question = waiting.get_nowait()
                except queue.Empty:
                    return
                answer = process.ask(question)
                if answer.get("died") == "hang":
                    # A machine that others use as well is slow now and then.
                    answer = process.ask(question, 4 * LIMIT)
                with lock:
                    say(answer, findings(answer))
        finally:
            process.stop()

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work) for _ in range(jobs)]:
            done.result()


class Tally:
    """Counts by kind, and the findings by what they are called."""

    def __init__(self):
        self.counts = {}
        self.found = {}
        self.most = Counter()

    def add(self, answer, found):
        """Count one answer."""
        counts = self.counts.setdefault(answer["kind"], Counter())
        counts["cases"] += 1
        if not answer.get("died"):
            if not answer["trace"]:
                counts["harmless" if answer["code"] == 0 else "refused"] += 1
            self.most["seconds"] = max(self.most["seconds"], answer["cpu"])
            self.most["memory"] = max(self.most["memory"], answer["memory"])
        for finding, name in found:
            counts[finding] += 1
            self.found.setdefault((finding, name), []).append(f"{answer['kind']}:{answer['seed']}")

    def table(self):
        """The counts as lines."""
        columns = ["cases", "refused", "harmless", *FINDINGS]
        rows = [["", *columns]]
        whole = Counter()
        for kind in [kind for kind in KINDS if kind in self.counts]:
            whole.update(self.counts[kind])
            rows.append([kind, *(f"{self.counts[kind][column]:,}" for column in columns)])
        rows.append(["all", *(f"{whole[column]:,}" for column in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

    def lines(self):
        """Each finding with how often it was seen, and seeds that repeat it."""
        order = sorted(self.found.items(), key=lambda item: (FINDINGS.index(item[0][0]), -len(item[1])))
        return [f"{finding:<11} {len(cases):>5} x  {name}   --case {' '.join(sorted(cases, key=len)[:3])}"
                for (finding, name), cases in order]  # fmt: skip

    def results(self, seed, seconds):
        """What is kept of it, for JSON."""
        kinds = {kind: {name: counts[name] for name in ("cases", "refused", "harmless", *FINDINGS)}
                 for kind, counts in self.counts.items()}  # fmt: skip
        return {
            "seed": seed,
            "seconds": round(seconds),
            "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds},
            "limits": {"seconds": LIMIT, "MB": MEMORY >> 20},
            "most": {"seconds": round(self.most["seconds"], 2), "MB": self.most["memory"] >> 20},
            "findings": {f"{finding}: {name}": cases[:5] for (finding, name), cases in self.found.items()},
        }


def kept_results(path):
    """What a JSON file of results holds, {} if there is none yet."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def keep_results(path, **sections):
    """Put sections into a JSON file of results, beside those that are there."""
    path = Path(path)
    results = kept_results(path)
    path.write_text(json.dumps(results | sections, indent=1, ensure_ascii=False) + "\n")


def show(answer, found):
    """Print all that is known of a case."""
    print(f"minilora {shlex.join(answer['argv'])}".encode("ascii", "backslashreplace").decode())
    for note in answer["notes"]:
        print(f"  {note}")
    if answer.get("died"):
        print(f"FOUND {answer['died']}: {answer['how']}")
        return
    print(f"exit code {answer['code']}, {answer['cpu']} s, {answer['memory'] >> 20} MB; new: {answer['new']}; "
          f"changed: {answer['changed']}")  # fmt: skip
    for name in ("out", "err"):
        text = CONTROLS.sub(lambda found: ascii(found[0])[1:-1], answer[name])
        print(f"--- {name}\n{text}")
    if answer["trace"]:
        print(answer["trace"]["text"])
    for finding, name in found:
        print(f"FOUND {finding}: {name}")


def questions_of(kinds, cases, seed, plant=None):
    """`cases` cases, of each kind in turn. A seed's first case is its million: seeds share no case."""
    questions = []
    for i in range(cases):
        kind = kinds[i % len(kinds)]
        questions.append({"kind": kind, "seed": seed * 10**6 + i // len(kinds), "plant": plant})
    return questions


def main():
    """Run the command at the top of this file; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", metavar="KIND:SEED", nargs="+", help="repeat these alone, and print all of it")
    parser.add_argument("--keep", metavar="FOLDER", help="lay the files of one --case there, and do not run it")
    parser.add_argument("--plant", choices=list(PLANTS), help="plant a bug where inspect reads an adapter")
    parser.add_argument("--json", metavar="FILE", help="keep the table in a file of results")
    parser.add_argument("--serve", metavar="FILES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        scratch = Path(scratch)
        files = scratch / "files"
        write_all(files)
        if args.case:
            return repeat(args.case, args.keep, args.plant, files, scratch)
        return count(args, files, scratch)


def repeat(cases, keep, plant, files, scratch):
    """Run single cases and print all of them; returns the exit code."""
    pairs = [(name.partition(":")[0], int(name.partition(":")[2])) for name in cases]
    if keep:
        folder = Path(keep).resolve()
        folder.mkdir()
        os.chdir(folder)
        case = make_case(*pairs[0], files, folder)
        print(f"cd {folder}; python -m minilora {shlex.join(case.argv)}")
        print("\n".join(case.notes))
        return 0
    process, n_found = Process(files, scratch), 0
    for kind, seed in pairs:
        answer = process.ask({"kind": kind, "seed": seed, "plant": plant}, 4 * LIMIT)
        if answer.get("died"):
            with tempfile.TemporaryDirectory(dir=scratch) as folder, inside(folder):
                answer |= make_case(kind, seed, files, Path(folder))._asdict()
        found = findings(answer)
        n_found += len(found)
        show(answer, found)
    process.stop()
    return 1 if n_found else 0


def count(args, files, scratch):
    """Run all cases and print the table; returns the exit code."""
    tally, start = Tally(), time.perf_counter()

    def say(answer, found):
        tally.add(answer, found)
        done = sum(counts["cases"] for counts in tally.counts.values())
        if done % 1000 == 0:
            rate = done / (time.perf_counter() - start)
            left = (args.cases - done) / rate
            print(f"{done:,} of {args.cases:,}, {rate:.0f} a second, {math.ceil(left / 60)} min left", file=sys.stderr)

    fuzz(questions_of(args.kind, args.cases, args.seed, args.plant), args.jobs, files, scratch, say)
    seconds = time.perf_counter() - start
    print("\n".join(tally.table()))
    print("\n".join(tally.lines()))
    most = tally.results(args.seed, seconds)["most"]
    print(f"{seconds:.0f} s; a case computed {most['seconds']} s and took {most['MB']} MB at most")
    if args.json:
        keep_results(args.json, fuzz=tally.results(args.seed, seconds))
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
