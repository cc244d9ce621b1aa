"""What does a training step cost? Bytes by phase, predicted and measured, FLOPs, and milliseconds.

You learn where the memory of training goes, and that all of it follows from shapes before a
number exists; that LoRA takes away the gradients and Adam's state of what is frozen, but of the
activations nothing where every linear is adapted, and a part where few are; and that its step is
not shorter by much: the work that is saved is the gradient of W, a third at most, and on a small
model other work hides even that. Times are of this machine, and of alternating rounds.

    python examples/cost.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes under a minute on two cores.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import time
import tracemalloc
from statistics import median

import numpy as np
from course import lab
from course.picture import COLOURS, bars

from minilora import GPT, Adam, GPTConfig, LoRAConfig, Tensor, attach, init_adapter
from minilora.memory import model_training_bytes
from minilora.step_cost import step_cost

run = lab.begin(__file__, __doc__)
base = run.base()
TARGETS = {"full": None, "LoRA on all": "all-linear", "LoRA on q, v": ["q_proj", "v_proj"]}
# The base of the labs, and beside it a wider one whose weights are random: they cost as much.
# In plain arrays, also where a file holds them: what is measured here is training.
models = {base.name: base.model.map_tensors(lambda t: Tensor(t.data.copy()))}
if base.name == lab.TINY and not run.quick:
    wide = GPTConfig(n_layer=4, n_head=8, n_embd=384, vocab_size=512, block_size=128)
    models["wider"] = GPT(wide, np.random.default_rng(0)).to_device(run.xp)
PHASES = ["weights", "moments", "activations", "gradients"]


def prepared(model, targets):
    """(model, what is trained of it): all of a copy, or LoRA of rank 8 on the targets."""
    if targets is None:
        trained = model.trainable_copy()
        return trained, trained.parameters()
    adapter = init_adapter(model, LoRAConfig(8, 16, targets), np.random.default_rng(0))
    return attach(model, adapter), adapter.parameters()


def batch(model, seed):
    """(ids, targets) of random tokens: what they say costs nothing."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, model.config.vocab_size, (base.batch, base.length + 1))
    return text[:, :-1], text[:, 1:]


# %% Bytes. What each phase of a step has added is measured, on arrays that are made here.
def in_use():
    """Bytes in use, on the device if that computes."""
    if run.xp is np:
        return tracemalloc.get_traced_memory()[0]
    return run.xp.get_default_memory_pool().used_bytes()


def measured_bytes(model, targets, ids, wanted):
    """({phase: bytes that it has added}, the most that was in use on the host)."""
    tracemalloc.start()
    start = in_use()
    own = model.map_tensors(lambda t: Tensor(t.data.copy()))
    trained, parameters = prepared(own, targets)
    # Full fine-tuning needs the base no longer; LoRA holds it.
    del own
    after = [start, in_use()]
    adam = Adam(parameters)
    after.append(in_use())
    loss = trained.loss(ids, wanted)
    after.append(in_use())
    loss.backward()
    del loss
    gradients = in_use() - after[2]
    adam.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return dict(zip(PHASES, [*np.diff(after).tolist(), gradients], strict=True)), peak


rows = []
for size, model in models.items():
    for name, targets in TARGETS.items():
        trained, _ = prepared(model, targets)
        predicted = model_training_bytes(trained, base.batch, base.length)
        ids, wanted = batch(model, 0)
        measured, peak = measured_bytes(model, targets, ids, wanted)
        row = {"name": f"{size}: {name}", "size": size, "ms": []}
        row["gflop"] = step_cost(trained, base.batch, base.length).flops / 1e9
        row |= {f"predicted_{phase}": getattr(predicted, phase) / 1e3 for phase in PHASES}
        row |= {f"measured_{phase}": measured[phase] / 1e3 for phase in PHASES}
        row |= {"predicted": predicted.together / 1e3, "measured": sum(measured.values()) / 1e3}
        row["peak"] = peak / 1e3 if run.xp is np else None
        rows.append(row)

# %% Milliseconds: the three ways in turns, so that whatever else the machine does falls on all.
for seed in run.seeds:
    for size, model in models.items():
        ids, wanted = batch(model, seed)
        ready = {}
        seconds = {}
        for name, targets in TARGETS.items():
            trained, parameters = prepared(model, targets)
            ready[name] = trained, Adam(parameters)
            seconds[name] = []
        for _ in range(run.steps(15)):
            for name, (trained, adam) in ready.items():
                start = time.perf_counter()
                adam.zero_grad()
                trained.loss(ids, wanted).backward()
                adam.step()
                seconds[name].append(time.perf_counter() - start)
        for name in TARGETS:
            row = next(row for row in rows if row["name"] == f"{size}: {name}")
            row["ms"].append(1e3 * median(seconds[name]))


# %%
def draw(figure):
    """Of each model: stacked bytes, predicted and measured; beside them milliseconds."""
    panels = figure.subplots(len(models), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), size in zip(panels, models, strict=True):
        chosen = [row for row in rows if row["size"] == size]
        start = np.zeros(2 * len(TARGETS))
        for phase in PHASES:
            pairs = [(row[f"predicted_{phase}"], row[f"measured_{phase}"]) for row in chosen]
            widths = np.ravel(pairs) / 1e3
            left.barh(range(len(widths)), widths, left=start, label=phase)
            start += widths
        names = [f"{name}, {kind}" for name in TARGETS for kind in ("predicted", "measured")]
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        left.set(title=f"{size}: MB of a step")
        bars(right, list(TARGETS), [row["ms"] for row in chosen], color=COLOURS[6])
        right.set(title="ms")
        right.margins(x=0.25)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


columns = {"name": ("kB", "")}
columns |= {f"predicted_{phase}": (phase, ",.0f") for phase in PHASES}
columns |= {
    "predicted": ("together", ",.0f"),
    "measured": ("measured", ",.0f"),
    "peak": ("peak", ",.0f"),
}
columns |= {"gflop": ("GFLOP", ".2f"), "ms": ("ms", ".1f")}
setting = (
    f"One step on {base.batch} x {base.length} random tokens in one part, float32, LoRA of rank 8; "
    "bytes as tracemalloc counts them, milliseconds as the median of alternating rounds, on one "
    "thread of BLAS."
)
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Train q_proj of the last block alone, "h.2.attn.q_proj", then that of the first, "h.0.". Which
#    of the two keeps hardly any activations, and why?
# 2. In minilora/functional.py, the VJP of `weight` in `linear` is `lambda dy: rows(dy).T @ X`. Give
#    the VJP of `x` that X too, as a default argument: which test fails? What does LoRA save then?
