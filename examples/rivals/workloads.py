"""What is measured: sizes, tasks, and the arithmetic that each task needs. Knows shapes, no library, no clock."""

from typing import NamedTuple

PROMPT, NEW = 16, 32  # generation: tokens read at once, tokens written one by one
LR = 1e-3
ADAPTERS = {"c_attn": ["c_attn"], "all-linear": ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}  # GPT-2's names
TASKS = {
    "lora": "a training step, LoRA on the attention inputs (c_attn: one A for q, k and v)",
    "all-linear": "a training step, LoRA on all four linears of a block",
    "full": "a training step on every weight",
    "forward": "the loss without a graph, LoRA on the attention inputs attached",
    "generate": f"{NEW} tokens after a prompt of {PROMPT}, one row, greedy, key/value cache; minilora merges first, "
                "inside the timing, the others keep the adapter beside the weights",
    "scaling": "lora again, over T, batch and rank; and several adapters in one batch, in minilora alone",
}  # fmt: skip


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

    def linears(self):
        """{name in GPT-2's file: (in, out)} of one block."""
        C = self.width
        return {"c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}


WORKLOADS = {
    "tiny": Workload(4, 128, 4, 64, 16, 512),
    "mid": Workload(6, 384, 6, 256, 8, 4096),
    "small": Workload(12, 768, 12, 128, 4, 50257),  # GPT-2 small
}
MIDDLE = Workload(4, 384, 6, 128, 4, 4096)  # of the scaling: each series leaves it in one direction
SCALING = {
    **{f"T={T}": MIDDLE._replace(T=T) for T in (64, 128, 256, 512, 1024)},
    **{f"B={B}": MIDDLE._replace(batch=B) for B in (1, 2, 4, 8, 16)},
    **{f"r={r}": MIDDLE._replace(r=r) for r in (1, 4, 8, 16, 64)},
}
ROWS = MIDDLE._replace(batch=16)  # several adapters in one batch of so many rows
DISTINCT = (1, 4, 16)


def trains(task):
    """Does one unit of this task end with the optimizer's step?"""
    return task in ("lora", "all-linear", "full")


def adapter_of(task):
    """The key of ADAPTERS that the task uses, or None."""
    return None if task == "full" else "all-linear" if task == "all-linear" else "c_attn"


def tokens(work, task):
    """Tokens that one unit trains on, reads, or writes."""
    return NEW if task == "generate" else work.batch * work.T


def flops(work, task):
    """Floating-point operations of the matrix products that one unit cannot do without, 2 M N K for each.

    A frozen weight has no dW. The dx of a product is needed only if something under it is trained: in the first block
    nothing is under c_attn unless the embedding is. Attention is counted over the half of each square that is seen,
    and nothing twice: a library that computes a part again in its backward pass does more than this.
    """
    if task == "generate":  # the last token is written and never read; only the last position needs the head
        positions, read, asked = PROMPT + NEW - 1, PROMPT + NEW - 1, NEW
        pairs = positions * (positions + 1) // 2
    else:
        read = asked = work.batch * work.T
        pairs = work.batch * work.T * (work.T + 1) // 2
    adapted, train, full = ADAPTERS.get(adapter_of(task), []), trains(task), task == "full"
    total = 0
    for layer in range(work.layers):
        for name, (n_in, n_out) in work.linears().items():
            W, A, B = (2 * read * size for size in (n_in * n_out, n_in * work.r, work.r * n_out))
            under = full or layer > 0 or name != "c_attn"  # is anything trained under this product?
            total += W + train * (W * under + W * full)  # y, dx, dW
            if name in adapted:
                total += A + B + train * (A * under + A + 2 * B)  # y; dx and dA; d(xAᵀ) and dB
        total += 2 * (2 * pairs * work.width) * (3 if train else 1)  # QKᵀ and PV; dP, dV, dQ and dK
    head = 2 * asked * work.width * work.vocabulary
    return total + head * (1 + train + full)  # y, dx, dW
