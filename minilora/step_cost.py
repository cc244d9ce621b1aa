"""What a training step computes, and what it keeps for backward: told from shapes, before it runs.

The walk follows a tensor through a model as `model.loss` does, and asks of each layer two things.
Which products does it take, forward and backward? And which arrays do the VJPs close over? Both
depend on where gradients must go: a frozen weight has no gradient to compute, and then its input is
not kept. So the saving of LoRA is no formula here either. It knows the layers of GPT and Llama, and
plain LoRA.

Shapes: B batch, T time (positions), N = B · T rows, C channels, H heads, D = C / H, V vocabulary.
"""

from collections import namedtuple

from .decoder import FeedForward, SelfAttention
from .gpt import GPT
from .lean import QUERY_BLOCK, no_number_is_tiny
from .llama import Llama
from .lora import LoRALinear, LoRAPair
from .nn import LayerNorm, Linear, RMSNorm
from .packed import StoredTensor

# {dtype: bytes of a number}
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Bytes of a token id or a position.
ID_BYTES = 8


class StepCost(namedtuple("StepCost", "forward backward activations")):
    """FLOPs forward, FLOPs backward, and the bytes that are kept in between.

    A FLOP is one multiplication or one addition. Those of matrix products are counted, which is
    where nearly all are. The products of attention whose result is computed again for the gradient
    count as backward, and so do those of the loss that make a gradient.
    """

    flops = property(lambda self: self.forward + self.backward)


def step_cost(model, batch, length, dtype="float32"):
    """The StepCost of one training step on `batch` rows of `length` tokens, all with a loss.

    `model` is a GPT or a Llama, plain or from `attach`; one without numbers will do (`blank`). No
    layer drops out. `dtype` is what activations are kept in. `activation_bytes` counts the same
    bytes, to the last, in the graph of a step that has run.
    Raises: ValueError for a batch of nothing, a row longer than the context or another dtype;
    TypeError for a model or a layer that is not known here.
    """
    if not isinstance(model, (GPT, Llama)):
        raise TypeError(f"step_cost: expected a GPT or a Llama, got {type(model).__name__}")
    if batch < 1 or length < 1:
        raise ValueError(f"step_cost: {batch} rows of {length} tokens: at least one of each")
    if length > model.config.block_size:
        raise ValueError(
            f"step_cost: rows of {length:,} tokens do not fit in the model's context of "
            f"{model.config.block_size:,}; take a smaller length"
        )
    walk = _Walk(batch, length, itemsize_of(dtype))
    is_gpt = isinstance(model, GPT)
    has_rope = not is_gpt or model.config.positions == "rope"
    x = walk.embeddings(model)
    for block in model.blocks():
        if is_gpt:
            x = walk.block(x, block.ln_1, block.attn, block.ln_2, block.mlp, has_rope)
        else:
            norms = (block.input_layernorm, block.post_attention_layernorm)
            x = walk.block(x, norms[0], block.self_attn, norms[1], block.mlp, has_rope)
    states = walk.norm(x, model.ln_f if is_gpt else model.norm)
    walk.loss(states, model.head_layer().weight)
    kept = sum(n * size for n, size in walk.kept.values())
    return StepCost(walk.forward, walk.backward, kept)


def step_flops(model, batch, length):
    """The FLOPs of one training step, forward and backward. Arguments, errors: as `step_cost`."""
    return step_cost(model, batch, length).flops


def rule_of_thumb_flops(n_parameters, n_tokens):
    """6 N D: two FLOPs for each number and token forward, four backward.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1.
    """
    return 6 * n_parameters * n_tokens


def itemsize_of(dtype):
    """Bytes of a number. Raises: ValueError for a dtype that is none of ITEMSIZES."""
    if dtype not in ITEMSIZES:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZES)}, got {dtype!r}")
    return ITEMSIZES[dtype]


class _Value:
    """A tensor on its way, (N, width): does a gradient have to come back to it?"""

    def __init__(self, width, needs_gradient):
        self.width = width
        self.needs_gradient = needs_gradient


class _Walk:
    """Sums over the layers that a tensor has passed.

    `kept` is {what: (how many numbers, bytes of one)}. A _Value is kept once, however many layers
    read it.
    """

    def __init__(self, batch, length, itemsize):
        self.batch = batch
        self.length = length
        self.n_rows = batch * length
        self.itemsize = itemsize
        self.kept = {}
        self.forward = 0
        self.backward = 0

    def keep(self, value):
        """The array of a _Value is kept."""
        self.kept[value] = (self.n_rows * value.width, self.itemsize)

    def keep_numbers(self, n, itemsize=None):
        """An array of `n` numbers is kept that nothing else reads."""
        self.kept[object()] = (n, itemsize or self.itemsize)

    def embeddings(self, model):
        """Token ids to vectors. A table that is trained keeps the ids of its rows."""
        if isinstance(model, Llama):
            tables = [(model.embed_tokens, self.n_rows)]
        elif model.config.positions == "rope":
            tables = [(model.wte, self.n_rows)]
        else:
            tables = [(model.wte, self.n_rows), (model.wpe, self.length)]
        needs_gradient = False
        for table, n_ids in tables:
            if table.weight.requires_grad:
                self.keep_numbers(n_ids, ID_BYTES)
                needs_gradient = True
        return _Value(tables[0][0].weight.shape[1], needs_gradient)

    def block(self, x, norm_1, attention, norm_2, mlp, has_rope):
        """x + attention(norm(x)), then x + mlp(norm(x)). A sum keeps nothing."""
        y = self.attention(self.norm(x, norm_1), attention, has_rope)
        x = _Value(x.width, x.needs_gradient or y.needs_gradient)
        y = self.mlp(self.norm(x, norm_2), mlp)
        return _Value(x.width, x.needs_gradient or y.needs_gradient)

    def norm(self, x, layer, n_heads=1):
        """LayerNorm or RMSNorm; of each head for itself, where there are several."""
        _check_known(layer, LayerNorm, RMSNorm)
        is_trained = any(p.requires_grad for p in layer.parameters())
        y = _Value(x.width, x.needs_gradient or is_trained)
        if not (x.needs_gradient or layer.weight.requires_grad):
            return y
        n = self.n_rows * x.width
        if isinstance(layer, LayerNorm):
            # x without its mean, over its deviation.
            self.keep_numbers(n)
        else:
            # y, and x / rms beside it unless the one can be told from the other.
            self.keep(y)
            if not _can_divide(layer.weight):
                self.keep_numbers(n)
        if x.needs_gradient:
            self.keep_numbers(self.n_rows * n_heads)
        return y

    def attention(self, x, layer, has_rope):
        """(N, C) -> (N, C), with the projections."""
        _check_known(layer, SelfAttention)
        n_head = layer.n_head
        q = self.linear(x, layer.q_proj)
        k = self.linear(x, layer.k_proj)
        D = q.width // n_head
        if getattr(layer, "q_norm", None) is not None:
            q = self.norm(q, layer.q_norm, n_head)
            k = self.norm(k, layer.k_norm, k.width // D)
        v = self.linear(x, layer.v_proj)
        if has_rope:
            for turned in (q, k):
                if turned.needs_gradient:
                    # Their cos and sin.
                    self.keep_numbers(2 * self.length * D)
        y = _Value(q.width, q.needs_gradient or k.needs_gradient or v.needs_gradient)
        product = 2 * q.width * self.batch * _pairs(self.length)
        # Scores, and the sums of values.
        self.forward += 2 * product
        if y.needs_gradient:
            # The gradients of probabilities, queries, keys and values.
            self.backward += 4 * product
            # Copies in the order of heads, and of each row of scores the largest and the sum.
            for width in (q.width, k.width, v.width, n_head, n_head):
                self.keep_numbers(self.n_rows * width)
            if self.length <= QUERY_BLOCK:
                # Of so few positions the scores themselves are kept.
                self.keep_numbers(self.n_rows * n_head * self.length)
            else:
                # The scores once more.
                self.backward += product
            self.keep(y)
        return self.linear(y, layer.o_proj)

    def mlp(self, x, layer):
        """(N, C) -> (N, C). What is kept of gelu and swiglu are derivatives."""
        _check_known(layer, FeedForward)
        if not hasattr(layer, "gate_proj"):
            up = self.linear(x, layer.up_proj)
            inner = [up]
        else:
            inner = [self.linear(x, layer.gate_proj), self.linear(x, layer.up_proj)]
        for value in inner:
            if value.needs_gradient:
                self.keep_numbers(self.n_rows * value.width)
        y = _Value(inner[0].width, any(value.needs_gradient for value in inner))
        return self.linear(y, layer.down_proj)

    def linear(self, x, layer):
        """A Linear, or one with a plain LoRA pair beside it."""
        if type(layer) is LoRALinear and type(layer.pair) is LoRAPair:
            # What lora_B reads, and keeps, is the thin array once it is scaled.
            thin = self.product(x, layer.pair.lora_A)
            update = self.product(thin, layer.pair.lora_B)
            y = self.linear(x, layer.linear)
            return _Value(y.width, y.needs_gradient or update.needs_gradient)
        _check_known(layer, Linear)
        return self.product(x, layer.weight, layer.bias)

    def product(self, x, weight, bias=None):
        """y = x Wᵀ + b. The gradient of x needs W alone; that of W needs x, which is kept."""
        n_out, n_in = weight.shape
        flops = 2 * self.n_rows * n_in * n_out
        self.forward += flops
        if x.needs_gradient:
            self.backward += flops
        if weight.requires_grad:
            self.backward += flops
            self.keep(x)
        has_trained_bias = bias is not None and bias.requires_grad
        return _Value(n_out, x.needs_gradient or weight.requires_grad or has_trained_bias)

    def loss(self, states, weight):
        """The head and its loss, whose gradients are made while there are logits, and kept."""
        V, C = weight.shape
        flops = 2 * self.n_rows * V * C
        self.forward += flops
        if states.needs_gradient:
            self.backward += flops
            self.keep_numbers(self.n_rows * C)
        if weight.requires_grad:
            self.backward += flops
            self.keep_numbers(V * C)


def _check_known(layer, *kinds):
    """Raise TypeError unless a layer is of one of these kinds, as it is in a plain model."""
    if not isinstance(layer, kinds):
        raise TypeError(
            f"step_cost: what a {type(layer).__name__} costs is not known here; only the layers of "
            "GPT and Llama and plain LoRA are"
        )


def _can_divide(weight):
    """Does `rms_norm` get x / rms back from its result? It asks the same of what a file holds."""
    return isinstance(weight, StoredTensor) and weight.once(no_number_is_tiny)


def _pairs(length):
    """How many scores a head computes: each block of queries meets the keys its last one sees."""
    stops = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
    starts = [0, *stops[:-1]]
    return sum((stop - start) * stop for start, stop in zip(starts, stops, strict=True))
