"""The options of each command, and their help. Knows what a command is given, not what it does.

What an option needs to know of the library is imported when its command is chosen: the help of the
program and of most commands loads not even NumPy.
"""

from .parser import (
    Names,
    dtype_name,
    number_from_zero,
    number_or_mpi,
    positive_number,
    real_number,
    share_above_zero,
    share_below_one,
    whole_number,
)

# Options that several commands have.


def _add_base(parser):
    parser.add_argument(
        "--base",
        required=True,
        metavar="BASE",
        help="a model's folder (config.json, model.safetensors, tokenizer.json; a GPT-2 or one of "
        "Llama's family), a .gguf file, or smollm2",
    )


def _add_seed(parser):
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        help="of every random number (default %(default)s)",
    )


def _add_quantize(
    parser, what="pack the base's linear weights in few bits once it is loaded; nf4 is QLoRA's"
):
    parser.add_argument("--quantize", choices=["nf4", "q8_0", "q4_0", "q4_1"], help=what)


def _add_other_precision(parser):
    parser.add_argument(
        "--other-precision",
        action="store_true",
        help="use an adapter also on its base in another precision than it was trained on: packed "
        "by --quantize, or not packed any more",
    )


def _add_adapters(parser, help_text, required=False):
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=None if required else [],
        required=required,
        metavar="DIR",
        help=help_text,
    )


def _add_weights(parser):
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        type=real_number,
        metavar="W",
        help="one for each adapter, in their order, also negative ones: the updates are added with "
        "these weights",
    )


def _add_adapter_out(parser):
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for the adapter, in PEFT's format"
    )


def _add_sampling(parser, max_new_tokens, least=0):
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
    _add_seed(parser)


def _add_backend(parser):
    parser.add_argument(
        "--backend",
        choices=["numpy", "cupy"],
        default="numpy",
        help="cupy runs on an NVIDIA GPU",
    )


def _add_dtype(parser, help_text):
    from ..disk.tensor_file import DTYPES

    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        default="float32",
        help=f"{help_text} (default %(default)s); bf16, fp16, fp32 and fp64 are understood",
    )


def _add_too_long(parser):
    parser.add_argument(
        "--too-long",
        choices=["cut", "drop"],
        help="what to do with rows of a .jsonl longer than the model's context (default: refuse)",
    )


def _add_parts(parser, in_a_step=False, by_processes=False):
    """A group of its own in the help: what is computed apart, and by whom."""
    title = "the parts of a batch, and who computes them"
    add = parser.group(title, "How a step is cut decides every bit; who computes a part, none.")
    if in_a_step:
        add(
            "--accumulate",
            type=whole_number(1),
            default=1,
            metavar="N",
            help="batches in a step (default %(default)s): of a text, N batches of B rows in P "
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


# The commands, in the order of the help.


def demo_options(parser):
    """Add the options of `minilora demo`."""
    add = parser.add_argument
    add(
        "--base",
        metavar="BASE",
        help="teach a language model instead of one that is pre-trained here: smollm2, or a folder "
        "or a .gguf file of a model made for chat (some minutes)",
    )
    add(
        "--quick",
        action="store_true",
        help="a much smaller model, or a few steps of a base: does it run here?",
    )
    _add_seed(parser)
    add(
        "--out",
        metavar="DIR",
        help="folder to keep the models in (default minilora-demo, with the name of the base and "
        "-quick where they are given)",
    )
    add(
        "--ask",
        metavar="QUESTION",
        help="answer from what the last run kept, without training",
    )
    _add_backend(parser)
    _add_parts(parser)


def finetune_options(parser):
    """Add the options of `minilora finetune`."""
    from ..training.finetune_config import FineTuneConfig

    add = parser.add_argument
    _add_base(parser)
    add(
        "--data",
        required=True,
        metavar="FILE",
        help='a .txt, or a .jsonl with {"prompt": "...", "answer": "..."} on each line, of which '
        "the answers are learned; or with prompt and completion, instruction, input and output, "
        "messages, or text. An answer to a prompt usually starts with a space or a newline",
    )
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="the adapter's folder, in PEFT's format; with --full a model's",
    )
    _add_quantize(parser)
    # What is of adapters has no default here: with --full it is refused where it was given.
    add(
        "--alpha",
        type=positive_number,
        help="strength: the update is scaled by alpha / r; often 2 r; required but with --full",
    )
    add(
        "--r",
        type=whole_number(1),
        help=f"rank of the update (default {FineTuneConfig.r})",
    )
    add(
        "--target",
        nargs="+",
        action=Names,
        metavar="NAME",
        help="modules to adapt, apart by spaces or commas, by PEFT's names (c_attn, mlp.c_fc) or "
        "this library's (q_proj, v_proj, ...); default all-linear",
    )
    add(
        "--dora",
        action="store_true",
        default=None,
        help="DoRA: beside LoRA's update also a length for each row of the weight",
    )
    add(
        "--full",
        action="store_true",
        help="no adapter: train every weight of a copy of the base, and write a model; takes four "
        "times the base's memory",
    )
    add(
        "--lr",
        type=positive_number,
        default=FineTuneConfig.lr,
        help="peak of the learning rate (default %(default)s; with --full rather a tenth of it)",
    )
    add("--steps", type=whole_number(1), default=FineTuneConfig.steps, help="default %(default)s")
    add(
        "--batch",
        type=whole_number(1),
        default=FineTuneConfig.batch,
        help="rows in a batch (default %(default)s)",
    )
    add(
        "--length",
        type=whole_number(1),
        help="tokens in a row of text (default 256, or the model's context if shorter)",
    )
    _add_too_long(parser)
    add(
        "--dropout",
        type=share_below_one,
        help=f"on the adapter's input (default {FineTuneConfig.dropout})",
    )
    _add_seed(parser)
    add(
        "--eval-split",
        type=share_below_one,
        default=FineTuneConfig.eval_split,
        metavar="SHARE",
        help="share of the data held out, to measure the loss on before and after "
        "(default %(default)s)",
    )
    add(
        "--eval-every",
        type=whole_number(1),
        metavar="STEPS",
        help="measure that loss also on the way, and keep what was best, not what came last",
    )
    add(
        "--patience",
        type=whole_number(1),
        metavar="K",
        help="end after K such measurements in a row without improvement",
    )
    add(
        "--log",
        metavar="FILE",
        help="a new .jsonl for a line on each step and each measurement; minilora plot draws it",
    )
    add(
        "--save-every",
        type=whole_number(1),
        default=FineTuneConfig.save_every,
        metavar="STEPS",
        help="steps between two checkpoints (default %(default)s)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with a run that was interrupted or killed",
    )
    _add_backend(parser)
    _add_parts(parser, in_a_step=True, by_processes=True)


def generate_options(parser):
    """Add the options of `minilora generate`."""
    add = parser.add_argument
    _add_base(parser)
    _add_adapters(
        parser, "several: a text for each, under a line with its name, all made in one batch"
    )
    add(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="what the text begins with; - reads it from the standard input, without its last "
        "newline",
    )
    add(
        "--cut-prompt",
        action="store_true",
        help="of a prompt that is too long for the model keep the end",
    )
    _add_sampling(parser, max_new_tokens=40)
    add(
        "--num-samples",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="texts for each adapter, each under a line with its number, all made in one batch",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text before which the model's text ends; may be given several times",
    )
    _add_quantize(parser)
    _add_other_precision(parser)
    _add_backend(parser)


def chat_options(parser):
    """Add the options of `minilora chat`."""
    add = parser.add_argument
    _add_base(parser)
    _add_adapters(
        parser, "the first answers; /adapter NAME in the conversation switches to another"
    )
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add("--say", metavar="TEXT", help="answer this, and end")
    _add_sampling(parser, max_new_tokens=256, least=1)
    _add_quantize(parser)
    _add_other_precision(parser)
    _add_backend(parser)


def merge_options(parser):
    """Add the options of `minilora merge`."""
    add = parser.add_argument
    _add_base(parser)
    _add_adapters(parser, "in PEFT's format; several are added, with --weights", required=True)
    _add_weights(parser)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="a new folder for the merged model: its base's layout, transformers' for a .gguf file",
    )
    _add_dtype(parser, "what weights are stored in")
    add(
        "--allow-rounding",
        action="store_true",
        help="store it though rounding costs over a tenth of an update",
    )
    _add_quantize(parser, "quantise the merged weights again, and write the values they then have")
    _add_other_precision(parser)


def combine_options(parser):
    """Add the options of `minilora combine`."""
    _add_base(parser)
    _add_adapters(parser, "the adapters to add, in PEFT's format, all of this base", required=True)
    _add_weights(parser)
    parser.add_argument(
        "--r",
        type=whole_number(1),
        help="compress the sum to this rank, the best of its size (default: the sum of the ranks)",
    )
    _add_adapter_out(parser)
    _add_other_precision(parser)


def extract_options(parser):
    """Add the options of `minilora extract`."""
    _add_base(parser)
    parser.add_argument(
        "--tuned",
        required=True,
        metavar="MODEL",
        help="the model that full fine-tuning made of the base: what --base takes",
    )
    parser.add_argument(
        "--r", required=True, type=whole_number(1), help="rank of the adapter, at most"
    )
    parser.add_argument(
        "--target",
        nargs="+",
        action=Names,
        metavar="NAME",
        help="modules whose change is extracted, as for finetune; default all-linear",
    )
    _add_adapter_out(parser)


def inspect_options(parser):
    """Add the options of `minilora inspect`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="an adapter's folder, a model's, or a .gguf file")
    add("--base", metavar="BASE", help="the adapter's base, if it is not where the adapter says")


def count_options(parser):
    """Add the options of `minilora count`."""
    from ..training.finetune_config import FineTuneConfig

    add = parser.add_argument
    add(
        "--base",
        required=True,
        metavar="BASE",
        help="a known model (gpt2, llama-3.1-8b, qwen2.5-7b, ...; a wrong name lists them), a "
        "model's folder, a config.json, a .gguf file, or smollm2: its shape alone is read",
    )
    add(
        "--r",
        nargs="+",
        type=whole_number(1),
        default=[FineTuneConfig.r],
        help=f"rank of the update, or several to compare (default {FineTuneConfig.r})",
    )
    add("--target", nargs="+", action=Names, metavar="NAME", help="as for finetune")
    _add_dtype(parser, "of weights, gradients and activations")
    add(
        "--batch",
        type=whole_number(1),
        default=FineTuneConfig.batch,
        help="rows in a step (default %(default)s)",
    )
    add(
        "--length",
        type=whole_number(1),
        help="tokens in a row (default 256, or the model's context if shorter)",
    )


def playground_options(parser):
    """Add the options of `minilora playground`."""
    add = parser.add_argument
    add("--html", required=True, metavar="FILE", help="the page: one file, new or to be made anew")
    add(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="what examples/rank.py has measured, which the page shows (default: the results in "
        "the repository, if this is a clone of it)",
    )


def plot_options(parser):
    """Add the options of `minilora plot`."""
    add = parser.add_argument
    add("logs", metavar="LOG", nargs="+", help="a .jsonl of finetune --log, or several")
    add("--out", metavar="FILE", help="the picture (default: the first log's name, as a .png)")


def compare_options(parser):
    """Add the options of `minilora compare`."""
    add = parser.add_argument
    add("base", metavar="BASE", help="the model: a folder, a .gguf file, or smollm2")
    add("adapters", metavar="ADAPTER", nargs="+", help="the folders of one or several adapters")
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help=".txt or .jsonl, as for finetune; several come in a table, a column each. BASE and "
        "ADAPTER stand before it",
    )
    add("--batch", type=whole_number(1), default=4, help="rows at once (default %(default)s)")
    add("--length", type=whole_number(1), help="as for finetune")
    _add_quantize(parser)
    _add_other_precision(parser)
    _add_too_long(parser)
    _add_backend(parser)
    _add_parts(parser)
