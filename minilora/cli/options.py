"""The options of each command, and their help. Knows what a command is given, not what it does.

What an option needs to know of the library is imported when its command is chosen: the help of the
program and of most commands loads not even NumPy.
"""

from .parser import Names, whole_number
from .shared_options import (
    add_accept_base,
    add_adapter_out,
    add_adapters,
    add_backend,
    add_base,
    add_dtype,
    add_parts,
    add_quantize,
    add_sampling,
    add_seed,
    add_too_long,
    add_weights,
)


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
    add_seed(parser)
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
    add_backend(parser)
    add_parts(parser)


def generate_options(parser):
    """Add the options of `minilora generate`."""
    add = parser.add_argument
    add_base(parser)
    add_adapters(
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
    add_sampling(parser, max_new_tokens=40)
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
    add_quantize(parser)
    add_accept_base(parser)
    add_backend(parser)


def chat_options(parser):
    """Add the options of `minilora chat`."""
    add = parser.add_argument
    add_base(parser)
    add_adapters(parser, "the first answers; /adapter NAME in the conversation switches to another")
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add("--say", metavar="TEXT", help="answer this, and end")
    add_sampling(parser, max_new_tokens=256, least=1)
    add_quantize(parser)
    add_accept_base(parser)
    add_backend(parser)


def merge_options(parser):
    """Add the options of `minilora merge`."""
    add = parser.add_argument
    add_base(parser)
    add_adapters(parser, "in PEFT's format; several are added, with --weights", required=True)
    add_weights(parser)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="a new folder for the merged model: its base's layout, transformers' for a .gguf file",
    )
    add_dtype(parser, "what weights are stored in")
    add(
        "--allow-rounding",
        action="store_true",
        help="store it though rounding costs over a tenth of an update",
    )
    add_quantize(parser, "quantise the merged weights again, and write the values they then have")
    add_accept_base(parser)


def combine_options(parser):
    """Add the options of `minilora combine`."""
    add_base(parser)
    add_adapters(parser, "the adapters to add, in PEFT's format, all of this base", required=True)
    add_weights(parser)
    parser.add_argument(
        "--r",
        type=whole_number(1),
        help="compress the sum to this rank, the best of its size (default: the sum of the ranks)",
    )
    add_adapter_out(parser)
    add_accept_base(parser)


def extract_options(parser):
    """Add the options of `minilora extract`."""
    add_base(parser)
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
    add_adapter_out(parser)


def inspect_options(parser):
    """Add the options of `minilora inspect`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="an adapter's folder, a model's, or a .gguf file")
    add("--base", metavar="BASE", help="the adapter's base, if it is not where the adapter says")
    add(
        "--verify",
        action="store_true",
        help="fail unless each tensor has a digest in its file; those that are there are always "
        "compared",
    )


def history_options(parser):
    """Add the options of `minilora history`."""
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="adapters are looked for in it, and below it"
    )


def rollback_options(parser):
    """Add the options of `minilora rollback`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="an adapter's folder, in which finetune --keep kept versions")
    add(
        "--to",
        metavar="VERSION",
        help="which one: its receipt, its folder, or the first digits of the digest that minilora "
        "history shows (default: the last before the one in use)",
    )


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
    add_dtype(parser, "of weights, gradients and activations")
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
    add_quantize(parser)
    add_accept_base(parser)
    add_too_long(parser)
    add_backend(parser)
    add_parts(parser)
