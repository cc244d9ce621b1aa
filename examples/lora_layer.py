"""The LoRA layer in fifteen lines, and what it looks like before training.

You learn what the two matrices are, that attaching them changes nothing at first, which numbers are
trained and how many there are, and why the first step can only move B. The layer written here is
equal to the library's, to the bit.

    python examples/lora_layer.py [--quick] [--seed 0] [--seeds 3]

Takes about a second. The models have random weights: nothing depends on what they have learned.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import math

import numpy as np
from course import lab
from course.picture import COLOURS

from minilora import GPT, Adam, GPTConfig, LoRAConfig, Tensor, attach, init_adapter, no_grad
from minilora.functional import linear

run = lab.begin(__file__, __doc__, with_base=False, backends=["numpy"])


# %% The layer. The weight stays as it is; beside it, x goes down to r numbers through A and up
# again through B. It needs no gradient of its own: it is made of `linear`s, and they have theirs.
class LoRALayer:
    """y = x Wᵀ + b + (alpha / r) (x Aᵀ) Bᵀ

    W (out, in) and b (out,) are frozen, A (r, in) and B (out, r) are trained.
    """

    def __init__(self, weight, bias, r, alpha, rng):
        n_out, n_in = weight.shape
        # No requires_grad: no edge in the graph, no gradient.
        self.weight = Tensor(weight)
        self.bias = Tensor(bias)
        bound = 1 / math.sqrt(n_in)
        A = rng.uniform(-bound, bound, (r, n_in)).astype(weight.dtype)
        B = np.zeros((n_out, r), weight.dtype)
        self.lora_A = Tensor(A, requires_grad=True)
        self.lora_B = Tensor(B, requires_grad=True)
        self.scaling = alpha / r

    def __call__(self, x):
        thin = linear(x, self.lora_A)  # (..., in) -> (..., r)
        return linear(x, self.weight, self.bias) + linear(thin * self.scaling, self.lora_B)


# %% A model, and what is to be seen of it.
C = 16 if run.quick else 128
r = 2 if run.quick else 8
config = GPTConfig(n_layer=2 if run.quick else 4, n_head=2, n_embd=C, vocab_size=50, block_size=16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
found = {}


def note(name, value):
    """Keep what this seed gives."""
    found.setdefault(name, []).append(float(value))


def compare_layers(base, seed):
    """The library's layer in one place of the model and ours on the same weight, same A, same B."""
    rng = np.random.default_rng(seed)
    one_target = LoRAConfig(r=r, alpha=2 * r, target_modules=["h.0.attn.q_proj"])
    one_pair = init_adapter(base, one_target, np.random.default_rng(seed))
    library_layer = attach(base, one_pair).h[0].attn.q_proj
    q_proj = base.h[0].attn.q_proj
    layer = LoRALayer(q_proj.weight.data, q_proj.bias.data, r, 2 * r, np.random.default_rng(seed))
    assert np.array_equal(layer.lora_A.data, library_layer.pair.lora_A.data)
    # Not zero, so that there is an update to compare.
    B = rng.standard_normal((C, r))
    layer.lora_B.data[:] = B
    library_layer.pair.lora_B.data[:] = B
    x = Tensor(rng.standard_normal((3, 7, C)).astype(np.float32))
    return np.abs(layer(x).data - library_layer(x).data).max()


# %% For each seed: a fresh adapter on every attention projection, and its first steps.
steps = run.steps(20)
grew = {"A": [], "B": []}
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    base = GPT(config, rng)
    note("fifteen lines against the library, largest difference", compare_layers(base, seed))
    adapter = init_adapter(base, LoRAConfig(r=r, alpha=2 * r, target_modules=TARGETS), rng)
    pairs = list(adapter.pairs.values())
    model = attach(base, adapter)
    ids = rng.integers(0, config.vocab_size, (2, 12))
    # B is zero, so the logits do not change by a single bit.
    with no_grad():
        change = np.abs(model(ids).data - base(ids).data).max()
    note("logits after attaching, largest change", change)

    # Who is trainable? What was attached, and nothing else. How much? r numbers per row of in, and
    # r per row of out.
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)
    predicted = sum(r * (pair.in_features + pair.out_features) for pair in pairs)
    note("tensors trained, all of them lora_A or lora_B", len(trainable))
    note("numbers trained, predicted: sum of r * (in + out)", predicted)
    note("numbers trained, counted", sum(p.size for p in trainable.values()))
    note("numbers of the base", sum(p.size for p in base.parameters()))

    # A sits behind B = 0, so no gradient reaches it yet; B is what the first step moves.
    before = [pair.lora_A.data.copy() for pair in pairs]
    adam = Adam(adapter.parameters(), lr=1e-2)
    for step in range(steps):
        adam.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        if step == 0:
            dA = max(np.abs(pair.lora_A.grad).max() for pair in pairs)
            dB = max(np.abs(pair.lora_B.grad).max() for pair in pairs)
            note("largest |dL/dA| before the first step", dA)
            note("largest |dL/dB| before the first step", dB)
        adam.step()
        if seed == run.seeds[0]:
            moved = [np.linalg.norm(p.lora_A.data - A) for p, A in zip(pairs, before, strict=True)]
            grew["A"].append(float(np.mean(moved)))
            grew["B"].append(float(np.mean([np.linalg.norm(p.lora_B.data) for p in pairs])))
rows = [{"name": name, "value": values} for name, values in found.items()]


# %%
def draw(figure):
    """How far A and B move from where they start: A stands still at the first step."""
    axes = figure.subplots()
    for name, colour in [("A", COLOURS[0]), ("B", COLOURS[1])]:
        label = f"lora_{name}, from its start"
        axes.plot(range(steps + 1), [0, *grew[name]], color=colour, label=label)
    text = "after the first step\nA has not moved"
    axes.annotate(text, (1, 0), (0.25 * steps, 0.02), arrowprops={"arrowstyle": "->"})
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="steps of Adam", ylabel="how far it moved")
    axes.legend()


columns = {"name": ("", ""), "value": ("", ",.6g")}
setting = (
    f"A GPT of width {C} with random weights, r={r}, alpha={2 * r}, on the attention projections; "
    f"{steps} steps of Adam at lr 0.01."
)
run.finish(setting, columns, rows, draw, moved=grew)

# %% Exercises, each with its answer in README.md of this folder.
# 1. In minilora/lora.py, `init_adapter` makes lora_B of zeros. Make it of ones: which tests fail,
#    and what is the first line of this table that is no longer what it says?
# 2. In minilora/lora.py, `attach` adapts `base.frozen()`. Leave out the freezing: which tests fail,
#    and how many numbers would be trained?
