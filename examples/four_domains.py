"""Four domains, one base: an adapter for each, every adapter on every domain, one merged for all.

You learn what a specialist costs and what it forgets: clinical notes, code, customer support and
legal clauses have an adapter each; the matrix shows each of them on each domain's unseen sentences;
and beside them stand one adapter trained on all four, and average and sum of the four, merged into
one model. All texts are fictional, written for this project; they are no medical and no legal
advice.

    python examples/four_domains.py [--quick] [--seed 0] [--seeds 3] [--base smollm2]

Takes about a minute for each seed on two cores; eight minutes on smollm2.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab, texts

from minilora import LoRAConfig, attach, init_adapter, merge
from minilora.compose import combine
from minilora.training.batches import answer_rows, row_batches

run = lab.begin(__file__, __doc__)
base = run.base()
is_tiny = base.name == lab.TINY
steps = run.steps(150 if is_tiny else 40)
batch = 16 if is_tiny else 8
lr = 1e-2 if is_tiny else 2e-3

# %% The data: twelve facts for each domain, in eight sentences to train on and three to ask with.
# An answer ends with a line break, which is one token for the tiny base and a few others elsewhere.
domains = {name: texts.domain(name) for name in ("clinical", "code", "support", "legal")}


def as_ids(asked):
    """[(prompt ids, answer ids), ...] of texts."""
    return [(base.encode(prompt), base.encode(f" {answer}\n")) for prompt, answer in asked]


trained_on = {name: as_ids(domain.train) for name, domain in domains.items()}
unseen = {name: run.few(as_ids(domain.heldout), 6) for name, domain in domains.items()}


# %% One adapter for each domain, and one for all of them together.
def specialist(taught, seed, label, n_steps=steps):
    """An adapter of r = 8 on every linear, trained on the pairs `taught`."""
    rng = np.random.default_rng(seed)
    config = LoRAConfig(r=8, alpha=16, target_modules="all-linear")
    adapter = init_adapter(base.model, config, rng)
    batches = row_batches(answer_rows(taught), batch, rng)
    run.train(attach(base.model, adapter), adapter.parameters(), batches, n_steps, lr, label)
    return adapter


def right(model):
    """{domain: % of its unseen sentences that are answered right to the last token}."""
    return {name: lab.percent_right(model, ids) for name, ids in unseen.items()}


names = ["no adapter", *domains, "one adapter for all", "the four averaged", "the four summed"]
scores = {name: {domain: [] for domain in domains} for name in names}
for seed in run.seeds:
    everything = [pair for taught in trained_on.values() for pair in taught]
    adapters = {name: specialist(taught, seed, name) for name, taught in trained_on.items()}
    # As many steps as the four had together.
    together = specialist(everything, seed, "all four", 4 * steps)
    models = {"no adapter": base.model}
    for name, adapter in adapters.items():
        models[name] = attach(base.model, adapter)
    models["one adapter for all"] = attach(base.model, together)
    for name, weight in {"the four averaged": 0.25, "the four summed": 1.0}.items():
        combined = combine(list(adapters.values()), [weight] * 4)
        models[name] = merge(attach(base.model, combined))
    for name, model in models.items():
        for domain, percent in right(model).items():
            scores[name][domain].append(percent)
rows = [{"adapter": name, **by_domain} for name, by_domain in scores.items()]


# %%
def draw(figure):
    """The matrix as a heat map."""
    axes = figure.subplots()
    means = np.array([[np.mean(row[domain]) for domain in domains] for row in rows])
    axes.imshow(means, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(means):
        ink = "white" if value > 55 else "black"
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(rows)), [row["adapter"] for row in rows])
    axes.set_title("answers right on unseen sentences, %")
    axes.grid(visible=False)


columns = {"adapter": ("% right: adapter on", "")}
columns |= {domain: (domain, ".0f") for domain in domains}
setting = (
    f"{steps} steps of {batch} rows for each domain on the {base.name} base, r=8, alpha=16, every "
    f"linear, lr {lr:g}; 12 facts for each, asked in 3 sentences that were not trained on."
)
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Weigh the four by a half each, in place of a quarter: does any domain come back?
# 2. Train on the three sentences of each fact, and ask in the eight: `heldout` for `train` in
#    `trained_on`, and `train` for `heldout` in `unseen`. What do fewer sentences cost?
