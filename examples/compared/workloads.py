"""What is measured: sizes, tasks, and the arithmetic of each. Knows no library and no clock."""

from typing import NamedTuple

# Generation: the tokens that are read at once, and those that are written one by one.
PROMPT = 16
NEW = 32
LR = 1e-3
# The folder of each adapter, and what it adapts, in the names of GPT-2's files.
ADAPTERS = {
    "c_attn": ["c_attn"],
    "all-linear": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
TASKS = {
    "lora": "a training step, LoRA on the attention inputs (c_attn: one A for q, k and v)",
    "all-linear": "a training step, LoRA on all four linears of a block",
    "full": "a training step on every weight",
    "forward": "the loss without a graph, LoRA on the attention inputs attached",
    "generate": f"{NEW} tokens after a prompt of {PROMPT}, one row, greedy, key/value cache; "
    "minilora merges first, inside the timing, the others keep the adapter beside the weights",
    "scaling": "lora again, over T, batch and rank; and several adapters in one batch, in minilora",
}
TRAINING_TASKS = ("lora", "all-linear", "full")


class Workload(NamedTuple):
    """The shape of a GPT-2, of its adapter and of a batch."""

    layers: int
    width: int
    heads: int
    T: int
    batch: int
    vocabulary: int
    r: int = 8
    alpha: float = 16
    # How many tokens are written.
    new: int = NEW

    def linears(self):
        """{name in GPT-2's file: (in, out)} of one block."""
        C = self.width
        return {
            "c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }

    def tokens(self, task):
        """As the function `tokens`."""
        return tokens(self, task)

    def flops(self, task):
        """As the function `flops`."""
        return flops(self, task)


WORKLOADS = {
    "tiny": Workload(4, 128, 4, 64, 16, 512),
    "mid": Workload(6, 384, 6, 256, 8, 4096),
    # GPT-2 small.
    "small": Workload(12, 768, 12, 128, 4, 50257),
}
# The scaling starts from this one, and changes one number at a time.
MIDDLE = Workload(4, 384, 6, 128, 4, 4096)
SCALING = {
    **{f"T={T}": MIDDLE._replace(T=T) for T in (64, 128, 256, 512, 1024)},
    **{f"B={B}": MIDDLE._replace(batch=B) for B in (1, 2, 4, 8, 16)},
    **{f"r={r}": MIDDLE._replace(r=r) for r in (1, 4, 8, 16, 64)},
}
# Several adapters in one batch: so many rows, which share out so many adapters.
ROWS = MIDDLE._replace(batch=16)
DISTINCT = (1, 4, 16)


def trains(task):
    """Does one unit of this task end with the optimizer's step?"""
    return task in TRAINING_TASKS


def adapter_of(task):
    """The key of ADAPTERS that the task uses, or None."""
    if task == "full":
        return None
    return "all-linear" if task == "all-linear" else "c_attn"


def tokens(work, task):
    """How many tokens one unit trains on, reads, or writes."""
    return work.new if task == "generate" else work.batch * work.T


def flops(work, task):
    """Floating-point operations of the matrix products that one unit cannot do without.

    A product of (M, K) and (K, N) counts 2 M N K. A frozen weight W has no dW. The dx of a product
    is needed only if something under it is trained: in the first block nothing is under c_attn,
    unless the embedding is trained. Attention is counted over the half of each square that is seen.
    Nothing is counted twice: a library that computes a part again in its backward pass does more.
    """
    if task == "generate":
        # The last token is written and never read. Only the last position needs the head.
        n_read = PROMPT + work.new - 1
        n_logits = work.new
        n_pairs = n_read * (n_read + 1) // 2
    else:
        n_read = work.batch * work.T
        n_logits = n_read
        n_pairs = work.batch * work.T * (work.T + 1) // 2
    train = trains(task)
    full = task == "full"

    total = 0
    for layer in range(work.layers):
        for name, (n_in, n_out) in work.linears().items():
            trained_below = full or layer > 0 or name != "c_attn"
            total += linear_flops(n_read * n_in * n_out, train and trained_below, full)
            if name in ADAPTERS.get(adapter_of(task), []):
                # A reads what W reads, so its dx is needed where that of W is. Under B there is A.
                total += linear_flops(n_read * n_in * work.r, train and trained_below, train)
                total += linear_flops(n_read * work.r * n_out, train, train)
        # QKᵀ and PV; when training dP, dV, dQ and dK as well.
        attention = 2 * linear_flops(n_pairs * work.width, False, False)
        total += 3 * attention if train else attention
    return total + linear_flops(n_logits * work.width * work.vocabulary, train, full)


def linear_flops(MNK, needs_dx, needs_dW):
    """Operations of y = x Wᵀ and of its backward pass, which has products of the same size."""
    return 2 * MNK * (1 + needs_dx + needs_dW)
