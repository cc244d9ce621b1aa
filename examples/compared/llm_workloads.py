"""What is measured on a language model of Llama's family: its shape, the tasks, the arithmetic.

Knows no library and no clock.
"""

from typing import NamedTuple

from .workloads import linear_flops

# Generation: the tokens that are read at once, and those that are written one by one.
PROMPT = 32
NEW = 32
STEPS = {
    "all-linear": "a training step, LoRA on all seven linears of a block, loss on all positions",
    "answers": "the same, loss on the last quarter of each row only",
    "generate": f"{NEW} tokens after a prompt of {PROMPT}, one row, greedy, key/value cache",
}
TASKS = {
    **STEPS,
    "first-token": "a new process loads the base, whose file is in the cache, and writes a token",
    "shared": "memory of one and of two processes that have written a token with the same base",
}
TRAINING_TASKS = ("all-linear", "answers")
# In the first block nothing that is trained lies under these.
FIRST = ("q_proj", "k_proj", "v_proj")


def answered(T):
    """How many of T positions carry loss in the task "answers", the last ones."""
    return T // 4


def masked(targets):
    """`targets` (B, T) with all but the answered positions out of the loss."""
    T = targets.shape[1]
    targets = targets.copy()
    targets[:, : T - answered(T)] = -100
    return targets


class LlmWorkload(NamedTuple):
    """The shape of a Llama whose head is its embedding, of its adapter and of a batch."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    T: int
    batch: int
    r: int = 8
    alpha: float = 16
    # How many tokens are written.
    new: int = NEW

    def linears(self):
        """{name: (in, out)} of one block."""
        C = self.width
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (C, q),
            "k_proj": (C, kv),
            "v_proj": (C, kv),
            "o_proj": (q, C),
            "gate_proj": (C, self.inner),
            "up_proj": (C, self.inner),
            "down_proj": (self.inner, C),
        }

    def tokens(self, task):
        """How many tokens one unit trains on, or writes."""
        return self.batch * self.T if task in TRAINING_TASKS else self.new

    def flops(self, task):
        """Floating-point operations of the products that one unit cannot do without.

        Counted as in workloads.py. Writing has no adapter: merged, it costs nothing.
        """
        train = task in TRAINING_TASKS
        if train:
            n_read = self.batch * self.T
            n_logits = self.batch * (answered(self.T) if task == "answers" else self.T)
            n_pairs = self.batch * self.T * (self.T + 1) // 2
        else:
            # The last token is written and never read.
            n_read = PROMPT + self.new - 1
            n_logits = self.new
            n_pairs = n_read * (n_read + 1) // 2
        total = 0
        for layer in range(self.layers):
            for name, (n_in, n_out) in self.linears().items():
                through = train and (layer > 0 or name not in FIRST)
                total += linear_flops(n_read * n_in * n_out, through, False)
                if train:
                    total += linear_flops(n_read * n_in * self.r, through, True)
                    total += linear_flops(n_read * self.r * n_out, True, True)
            attention = 2 * linear_flops(n_pairs * self.heads * self.head_dim, False, False)
            total += 3 * attention if train else attention
        return total + linear_flops(n_logits * self.width * self.vocabulary, train, False)


# SmolLM2-135M's. And one of no size, to try the program with.
SMOLLM2 = LlmWorkload(
    layers=30, width=576, inner=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152,
    T=128, batch=4,
)  # fmt: skip
QUICK = LlmWorkload(
    layers=2, width=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocabulary=512, T=32, batch=4
)
