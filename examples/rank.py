"""Which rank is enough? LoRA of rank 1 to 64 against full fine-tuning, a learning rate for each.

You learn how the loss falls with r and where it stops; why a sweep over r with one learning rate
misleads; how far the tutorials' procedure (start small, watch the validation loss, raise r while it
helps) gets; and that nobody can tell you r without data: this is one task on one base.

    python examples/rank.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes six minutes with three seeds on two cores, most of it to choose the rates.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts
from course.picture import COLOURS, with_range

from minilora import LoRAConfig, attach, init_adapter, parameter_report

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(100 if is_tiny else 30)
ranks = run.few([1, 2, 4, 8, 16, 32, 64] if is_tiny else [1, 8, 64])
# The rates to choose from: LoRA bears larger ones than full fine-tuning.
rates = run.few([3e-3, 1e-2, 3e-2] if is_tiny else [1e-3, 3e-3])
full_rates = run.few([1e-3, 3e-3, 1e-2] if is_tiny else [1e-4, 3e-4])

# %% The task: Python's source, of which the tiny base has read none.
code = texts.code_ids(base.encode)


def tuned(r, lr, seed, curve=None):
    """(model, what was trained): LoRA of rank r on every linear, or all weights if r is None.

    A list `curve` is given (step, validation loss), ten times.
    """
    if r is None:
        model = run.tuned_full(base, code.train, steps, lr, seed)
        return model, model
    config = LoRAConfig(r=r, alpha=2 * r, target_modules="all-linear")
    adapter = init_adapter(base.model, config, np.random.default_rng(seed), allow_large_r=True)
    model = attach(base.model, adapter)

    def watch(step, loss, norm):
        if curve is not None and step % max(1, steps // 10) == 0:
            curve.append((step, run.loss(base, model, code.validation, 32)))

    batches = run.windows(base, code.train, seed)
    run.train(model, adapter.parameters(), batches, steps, lr, f"r={r}, lr {lr:g}", watch)
    return model, adapter


# %% For each rank, the best rate; then every seed with that rate.
before = run.loss(base, base.model, code.test)
rows = []
for r in [None, *ranks]:
    by_rate = {}
    for lr in full_rates if r is None else rates:
        model, _ = tuned(r, lr, lab.TUNING_SEED)
        by_rate[lr] = run.loss(base, model, code.validation)
    best_lr = min(by_rate, key=by_rate.get)
    losses = []
    for seed in run.seeds:
        model, trained = tuned(r, best_lr, seed)
        losses.append(run.loss(base, model, code.test))
    # The share of full fine-tuning's gain, seed by seed: the first row is full's.
    full = rows[0]["loss"] if rows else losses
    gains = [before - loss for loss in losses]
    shares = None
    # A quick run may gain nothing.
    if max(full) < before:
        shares = [100 * gain / (before - f) for gain, f in zip(gains, full, strict=True)]
    rows.append(
        {
            "method": "full" if r is None else "lora",
            "name": "full fine-tuning" if r is None else f"r={r}",
            "r": r,
            "numbers": parameter_report(trained).trainable,
            "lr": best_lr,
            "loss": losses,
            "share_of_full": shares,
            "validation_by_rate": {f"{lr:g}": loss for lr, loss in by_rate.items()},
        }
    )

# %% The procedure of the tutorials: begin with r = 4 and watch the validation loss while it trains;
# double r as long as that ends lower by more than 0.01. The learning rate is that of r = 4.
procedure = []
for r in run.few([4, 8, 16, 32, 64] if is_tiny else []):
    curve = []
    rate_of = {row["r"]: row["lr"] for row in rows}
    tuned(r, rate_of.get(4, rates[0]), lab.TUNING_SEED, curve)
    procedure.append({"r": r, "validation": curve})
    trail = "  ".join(f"{loss:.3f}" for _, loss in curve)
    print(f"validation loss at r={r}, at each tenth of the steps: {trail}")
    if len(procedure) > 1 and procedure[-2]["validation"][-1][1] - curve[-1][1] < 0.01:
        break
if procedure:
    print(f"r={procedure[-1]['r']} ends lower by less than 0.01, or is the last: it stops there\n")


# %%
def draw(figure):
    """Loss against rank; below it what one learning rate for all ranks would have shown."""
    left, right = figure.subplots(2, 1, sharex=True)
    full, *loras = rows
    left.axhspan(min(full["loss"]), max(full["loss"]), color=COLOURS[1], alpha=0.25)
    left.axhline(np.mean(full["loss"]), color=COLOURS[1], label="full fine-tuning")
    with_range(left, ranks, [row["loss"] for row in loras], "LoRA, a rate for each rank")
    left.set(ylabel="loss on\nunseen code")
    left.legend()
    for lr in rates:
        losses = [row["validation_by_rate"][f"{lr:g}"] for row in loras]
        right.plot(ranks, losses, label=f"lr {lr:g} for all")
    right.set_xscale("log", base=2)
    right.set_xticks(ranks, ranks)
    right.set(xlabel="rank r", ylabel="validation\nloss, one seed")
    right.legend(ncols=3)


columns = {
    "name": ("", ""),
    "numbers": ("numbers trained", ",d"),
    "lr": ("lr", "g"),
    "loss": ("loss on unseen code", ".3f"),
    "share_of_full": ("% of full's gain", ".0f"),
}
setting = (
    f"{steps} steps of {base.batch} x {base.length} tokens of Python source on the {base.name} "
    f"base (loss before: {before:.3f}), every linear, alpha = 2r, the rate chosen on another seed."
)
run.finish(setting, columns, rows, draw, before=before, procedure=procedure)

# %% Exercises, each with its answer in README.md of this folder.
# 1. "validation_by_rate" in the JSON has every rate at every rank. Had you swept r with 0.03 alone,
#    which rank would you have called the best? And with 0.003?
# 2. Choose the rates on `code.test` instead of `code.validation`. What is wrong with that, even if
#    the numbers hardly change?
