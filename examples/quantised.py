"""How few bits may a base have? From 8 to 2, its loss, and what LoRA on top of it reaches.

You learn how much each kind of storage moves the weights and the loss; how much of that LoRA, which
stays in float32, makes up for: at 4 bits little is missing after it, at 2 bits far more; and why an
adapter that was trained on a quantised base is refused by the base in floats, with the way to use
it there all the same. On a base whose file is quantised already, such as smollm2 in Q4_1, the
reference is that file widened to float32: every kind below is then a second quantisation.

    python examples/quantised.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute for each seed on two cores; ten to 25 on smollm2.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import tempfile

import numpy as np
from course import lab, texts

from minilora import LoRAConfig, Tensor, attach, init_adapter, load_adapter, quantize, save_adapter
from minilora.lora import linear_names
from minilora.quant import relative_error, widen

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(100 if is_tiny else 40)
lr = 1e-2 if is_tiny else 2e-3
code = texts.code_ids(base.encode)

# %% The kinds of storage. The simplest is for this lab only, and does not pack its bits: in each
# block of 64 weights the largest becomes the largest whole number of so many bits.
BLOCK = 64


def rounded(values, bits):
    """`values` (out, in) as they come back from whole numbers of so many bits, a scale a block."""
    flat = values.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    most = 2 ** (bits - 1) - 1
    scales = abs(blocks).max(axis=1, keepdims=True) / most
    # A block of zeros stays as it is.
    codes = np.rint(blocks / np.where(scales == 0, 1, scales))
    return (codes * scales).reshape(-1)[: len(flat)].reshape(values.shape).astype(values.dtype)


def simple(bits):
    """The base with its linear weights in so many bits, as `rounded` makes them."""
    modules = dict(base.model.named_modules())
    new = {}
    for name in linear_names(base.model):
        values = rounded(modules[name].weight.data, bits)
        new[f"{name}.weight"] = Tensor(values)
    return base.model.rebuild(lambda name, _: new.get(name))


# {name: (bits for each weight with its share of the scales, a function that makes the base so)}
kinds = {
    "float32": (32, lambda: base.model),
    "Q8_0": (8.5, lambda: quantize(base.model, "q8_0")),
    "NF4": (4.13, lambda: quantize(base.model, "nf4")),
    "Q4_1": (5, lambda: quantize(base.model, "q4_1")),
    "Q4_0": (4.5, lambda: quantize(base.model, "q4_0")),
    "simple, 4 bits": (4.25, lambda: simple(4)),
    "simple, 3 bits": (3.25, lambda: simple(3)),
    "simple, 2 bits": (2.25, lambda: simple(2)),
}

if not is_tiny:
    # A language model takes longer: one kind of each size.
    del kinds["Q4_0"]
    del kinds["simple, 4 bits"]


def weights_of(model):
    """All its linear weights as one array, widened."""
    modules = dict(widen(model).named_modules())
    return run.xp.concatenate(
        [modules[n].weight.data.reshape(-1) for n in linear_names(base.model)]
    )


# %% For each kind: how far the weights are off, the loss, and the loss after LoRA of r = 8.
config = LoRAConfig(r=8, alpha=16, target_modules="all-linear")
reference = weights_of(base.model)
rows = []
for name, (bits, make) in kinds.items():
    model = make()
    row = {"name": name, "bits": bits, "error": relative_error(weights_of(model), reference)}
    row |= {"loss_before": run.loss(base, model, code.test), "loss": [], "loss_on_reference": []}
    for seed in run.seeds:
        adapter = init_adapter(model, config, np.random.default_rng(seed))
        adapted = attach(model, adapter)
        batches = run.windows(base, code.train, seed)
        run.train(adapted, adapter.parameters(), batches, steps, lr, name)
        row["loss"].append(run.loss(base, adapted, code.test))
        moved = attach(base.model, adapter, check_base=False)
        row["loss_on_reference"].append(run.loss(base, moved, code.test))
        if name == "NF4":
            of_nf4 = adapter
    rows.append(row)

# %% An adapter is refused on its base in another precision: it learned to make up for rounding that
# is not there. It is accepted by the name of the change, which the refusal tells.
with tempfile.TemporaryDirectory() as folder:
    save_adapter(of_nf4, folder)
    try:
        load_adapter(folder, base.model, say=lambda text: None)
    except ValueError as error:
        refusal = str(error).replace(folder, "the adapter of NF4")
    print(f"{refusal}\n")
    changes = ["other-precision"]
    accepted = load_adapter(folder, base.model, accept_base=changes, say=lambda text: None)
assert accepted.fingerprint() == of_nf4.fingerprint()


# %%
def draw(figure):
    """Each kind's loss, before LoRA, after it, and with that LoRA on the weights in float32."""
    axes = figure.subplots()
    places = range(len(rows))
    for key, label in {
        "loss_before": "as quantised",
        "loss_on_reference": "its LoRA on float32",
        "loss": "with its LoRA",
    }.items():
        axes.plot([np.mean(row[key]) for row in rows], places, label=label, linestyle="")
    axes.set_yticks(places, [f"{row['name']}\n{row['bits']:g} bits" for row in rows])
    axes.yaxis.set_inverted(True)
    axes.set(xlabel="loss on unseen code, nats per token")
    axes.legend(loc="upper right")
    figure.set_size_inches(7, 6)


columns = {
    "name": ("weights stored as", ""),
    "bits": ("bits", "g"),
    "error": ("moved by", ".2%"),
    "loss_before": ("loss on unseen code", ".3f"),
    "loss": ("after LoRA", ".3f"),
    "loss_on_reference": ("its LoRA on float32", ".3f"),
}
setting = (
    f"{steps} steps of {base.batch} x {base.length} tokens of Python source, r=8, alpha=16, every "
    f"linear, lr {lr:g}, on the {base.name} base. Simple: the largest of 64 weights gives the scale"
    ", for this lab only."
)
if not is_tiny:
    setting += " float32 is what the base's file widens to: if that is quantised, all is twice."
run.finish(setting, columns, rows, draw, refusal=refusal)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Let `rounded` have one scale for each row of a weight, or one for all of it, in place of one
#    for each 64. Down to how many bits does the loss still hold?
# 2. In minilora/quant.py, `quantized_nf4` rounds to what its scales will be widened to,
#    nf4_scales(*scale_arrays). Let it round by the scales before they were quantised, the maxima of
#    the blocks: which test fails, and does this lab's table notice?
