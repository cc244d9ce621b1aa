"""Who calls which gradient right? The same functions through four gradient checkers.

You learn how often each checker accuses a right gradient and lets a wrong one pass, and how long it
takes. The functions, their gradients and the verdicts they are owed stand in
`compared/functions.py`; they are plain NumPy, and each checker gets them as its own kind of custom
function. torch, jax and autograd take part where they are installed, with their defaults (first
order, reverse mode). Takes some minutes, or ten seconds with minilora alone.

    python examples/checkers.py [--quick] [--seed 0] [--json checkers.json] [--names]
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse
import json
import time
import warnings
from collections import Counter
from statistics import median

import numpy as np
from compared import functions
from compared.functions import ACCEPT, CANNOT, REJECT
from compared.report import cpu_name, installed_version

from minilora import check_vjp
from minilora.gradcheck import GradientError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--quick", action="store_true", help="a quarter of the small functions, no large"
)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--json", help="file for the verdict on every function")
parser.add_argument("--names", action="store_true", help="name the functions judged wrongly")
args = parser.parse_args()


NOT_ASKED = "not asked"

# A checker is a function of a row's f, vjp and inputs that returns a verdict.


def ask_minilora(f, vjp, inputs):
    try:
        check_vjp(f, vjp, *inputs, rng=np.random.default_rng(args.seed))
    except GradientError:
        return REJECT
    except ValueError:
        return CANNOT
    return ACCEPT


def make_torch():
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f, vjp, *xs):
            ctx.vjp = vjp
            ctx.save_for_backward(*xs)
            return torch.as_tensor(np.asarray(f(*[x.detach().numpy() for x in xs])))

        @staticmethod
        def backward(ctx, dy):
            xs = [x.detach().numpy() for x in ctx.saved_tensors]
            gradients = ctx.vjp(dy.numpy(), *xs)
            return None, None, *[torch.as_tensor(np.ascontiguousarray(g)) for g in gradients]

    def ask(f, vjp, inputs):
        if sum(x.size for x in inputs) > 2000:
            # It makes the whole Jacobian; its fast mode does so too, as soon as it finds an error.
            return NOT_ASKED
        torch.manual_seed(args.seed)
        xs = [torch.tensor(x, requires_grad=True) for x in inputs]
        try:
            torch.autograd.gradcheck(lambda *x: Function.apply(f, vjp, *x), xs)
        except RuntimeError:
            return REJECT
        return ACCEPT

    return ask


def make_jax():
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    from jax.test_util import check_grads

    def ask(f, vjp, inputs):
        like = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.float64)
        on_arrays = lambda g: lambda *xs: np.asarray(g(*[np.array(x) for x in xs]), np.float64)
        on_lists = lambda *xs: tuple(np.asarray(g) for g in vjp(*[np.array(x) for x in xs]))
        y = f(*[x.copy() for x in inputs])

        @jax.custom_vjp
        def function(*xs):
            return jax.pure_callback(on_arrays(f), like(y), *xs)

        def backward(xs, dy):
            return jax.pure_callback(on_lists, tuple(like(x) for x in xs), dy, *xs)

        function.defvjp(lambda *xs: (function(*xs), xs), backward)
        try:
            check_grads(function, tuple(inputs), order=1, modes=["rev"])
        except (AssertionError, RuntimeError):
            return REJECT
        return ACCEPT

    return ask


def make_autograd():
    from autograd.extend import defvjp, primitive
    from autograd.test_util import check_grads

    def ask(f, vjp, inputs):
        function = primitive(lambda *xs: f(*xs))
        numbers = range(len(inputs))
        backward = lambda n: lambda ans, *xs: lambda dy: np.asarray(vjp(dy, *xs)[n])
        defvjp(function, *[backward(n) for n in numbers])
        try:
            check_grads(function, tuple(numbers), modes=["rev"], order=1)(*inputs)
        except (AssertionError, ValueError):
            return REJECT
        return ACCEPT

    return ask


checkers = {"minilora": ask_minilora}
versions = {"numpy": np.__version__}
for name, make in (("torch", make_torch), ("jax", make_jax), ("autograd", make_autograd)):
    try:
        checkers[name] = make()
        versions[name] = installed_version(name)
    except ImportError:
        print(f"{name} is not installed, and is left out (pip install {name})")

small = [
    *functions.SMALL,
    *functions.SCALED,
    *functions.UNDECIDED,
    *functions.WRONG,
]
if args.quick:
    small = small[::4]
large = [] if args.quick else functions.large()


def judge(ask, rows):
    """({row: verdict}, seconds)."""
    verdicts = {}
    seconds = 0.0
    for row in rows:
        f, vjp = row.make(1.0)
        inputs = [np.array(x, np.float64) for x in row.inputs]
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            verdicts[row.name] = ask(f, vjp, inputs)
            seconds += time.perf_counter() - start
    return verdicts, seconds


results = {}
times = {}
for name, ask in checkers.items():
    # The first few calls load what a checker needs.
    judge(ask, small[:3])
    verdicts, seconds = judge(ask, small)
    more, _ = judge(ask, large)
    results[name] = verdicts | more
    times[name] = {"all small": seconds}
for row in large:
    if row.name not in ("5M numbers squared", "relu of 5M numbers"):
        continue
    rounds = {name: [] for name in checkers}
    # Side by side, so that what disturbs one disturbs all.
    for _ in range(3):
        for name, ask in checkers.items():
            if results[name][row.name] != NOT_ASKED:
                rounds[name].append(judge(ask, [row])[1])
    for name in checkers:
        if rounds[name]:
            times[name][row.name] = median(rounds[name])

owed = {row.name: row.verdict for row in [*small, *large]}
names = list(results)
asked = {name: {row: v for row, v in results[name].items() if v != NOT_ASKED} for name in names}
counts = {name: Counter((owed[row], v) for row, v in asked[name].items()) for name in names}
totals = {name: Counter(owed[row] for row in asked[name]) for name in names}


def table_row(title, cell):
    print(f"{title:<42}" + "".join(f"{cell(name):>14}" for name in names))


def timed(name, row):
    if results[name][row] == NOT_ASKED:
        return NOT_ASKED
    return f"{times[name][row]:.2f}"


def of(owed_verdict, *verdicts):
    def cell(name):
        n = sum(counts[name][owed_verdict, verdict] for verdict in verdicts)
        return f"{n} of {totals[name][owed_verdict]}"

    return cell


print()
table_row("", lambda name: name)
table_row("right gradients that it does not accept", of(ACCEPT, REJECT, CANNOT))
table_row("wrong gradients that it does not reject", of(REJECT, ACCEPT, CANNOT))
table_row("undecidable ones that it accepts", of(CANNOT, ACCEPT))
table_row("undecidable ones that it rejects", of(CANNOT, REJECT))
table_row("seconds for all small functions", lambda name: f"{times[name]['all small']:.2f}")
for row in ("5M numbers squared", "relu of 5M numbers"):
    if large:
        table_row(f"seconds, {row}", lambda name, row=row: timed(name, row))
print(f"\n{cpu_name()}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
if args.names:
    for name, verdicts in results.items():
        for row, verdict in verdicts.items():
            if verdict == NOT_ASKED:
                continue
            if verdict != owed[row] and (owed[row] != CANNOT or verdict == REJECT):
                print(f"{name}: {row}: {verdict}, and {owed[row]} is owed")
if args.json:
    record = {"cpu": cpu_name(), "versions": versions, "seconds": times}
    record["verdicts"] = {
        row: {"owed": owed[row], **{name: results[name][row] for name in checkers}} for row in owed
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
