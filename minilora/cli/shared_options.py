"""The options that several commands have, and their help. Knows no command."""

from .parser import (
    dtype_name,
    number_from_zero,
    number_or_mpi,
    real_number,
    share_above_zero,
    whole_number,
)


def add_base(parser, required=True):
    """--base, which has to be given unless a file may say it."""
    parser.add_argument(
        "--base",
        required=required,
        metavar="BASE",
        help="a model's folder (config.json, model.safetensors, tokenizer.json; a GPT-2 or one of "
        "Llama's family), a .gguf file, or smollm2",
    )


def add_seed(parser):
    """--seed, by default 0."""
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        help="of every random number (default 0)",
    )


def add_quantize(
    parser, what="pack the base's linear weights in few bits once it is loaded; nf4 is QLoRA's"
):
    """--quantize, explained by `what`."""
    parser.add_argument("--quantize", choices=["nf4", "q8_0", "q4_0", "q4_1"], help=what)


def add_accept_base(parser):
    """--accept-base, with the names of what may differ."""
    from ..fits import ACCEPTABLE

    parser.add_argument(
        "--accept-base",
        nargs="+",
        action="extend",
        choices=ACCEPTABLE,
        default=[],
        metavar="CHANGE",
        help="use an adapter also on its base as it was changed on purpose, and in nothing else: "
        "other-precision (packed by --quantize, or not packed any more), grown-vocabulary (more "
        "tokens after those it had)",
    )


def add_adapters(parser, help_text, required=False):
    """--adapter, with one folder or several."""
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=None if required else [],
        required=required,
        metavar="DIR",
        help=help_text,
    )


def add_weights(parser):
    """--weights, one for each adapter."""
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        type=real_number,
        metavar="W",
        help="one for each adapter, in their order, also negative ones: the updates are added with "
        "these weights",
    )


def add_adapter_out(parser):
    """--out, for an adapter."""
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for the adapter, in PEFT's format"
    )


def add_sampling(parser, max_new_tokens, least=0):
    """How many tokens are written, at least `least`, and how each is chosen."""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=whole_number(least),
        default=max_new_tokens,
        metavar="N",
        help="default %(default)s",
    )
    add(
        "--temperature",
        type=number_from_zero,
        default=0.0,
        help="0, the default, takes the likeliest token",
    )
    add(
        "--top-k",
        type=whole_number(1),
        metavar="K",
        help="draw from the K likeliest tokens; needs a --temperature",
    )
    add(
        "--top-p",
        type=share_above_zero,
        metavar="P",
        help="draw from the fewest likeliest tokens that have the probability P together; needs a "
        "--temperature",
    )
    add_seed(parser)


def add_backend(parser):
    """--backend, by default NumPy."""
    parser.add_argument(
        "--backend",
        choices=["numpy", "cupy"],
        default="numpy",
        help="cupy runs on an NVIDIA GPU",
    )


def add_dtype(parser, help_text):
    """--dtype, explained by `help_text`."""
    from ..disk.tensor_file import DTYPES

    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        default="float32",
        help=f"{help_text} (default %(default)s); bf16, fp16, fp32 and fp64 are understood",
    )


def add_too_long(parser):
    """--too-long."""
    parser.add_argument(
        "--too-long",
        choices=["cut", "drop"],
        help="what to do with rows of a .jsonl longer than the model's context (default: refuse)",
    )


def add_parts(parser, in_a_step=False, by_processes=False):
    """A group of its own in the help: what is computed apart, and by whom."""
    title = "the parts of a batch, and who computes them"
    add = parser.group(title, "How a step is cut decides every bit; who computes a part, none.")
    if in_a_step:
        add(
            "--accumulate",
            type=whole_number(1),
            metavar="N",
            help="batches in a step (default 1): of a text, N batches of B rows in P "
            "parts each give the bits of one batch of N*B rows in N*P parts, in less memory; of a "
            ".jsonl, other rows share a batch, as their lengths decide",
        )
    add(
        "--parts",
        type=whole_number(1),
        metavar="N",
        help="parts that a batch is cut into, each computed with one thread of BLAS (default: as "
        "many as there are cores, at least 2)",
    )
    add(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="parts computed at once, in this process (default: as many as there are parts and "
        "cores)",
    )
    if by_processes:
        add(
            "--workers",
            type=number_or_mpi,
            metavar="N",
            help="parts computed at once, each in a process of its own, in the place of threads; "
            "mpi: in those of mpiexec -n N python -m mpi4py.futures -m minilora finetune ...",
        )
