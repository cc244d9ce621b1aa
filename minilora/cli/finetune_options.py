"""The options of `minilora finetune`, and their help. Knows what a run is given, no run."""

from .parser import Names, positive_number, share_below_one, whole_number
from .shared_options import (
    add_backend,
    add_base,
    add_parts,
    add_quantize,
    add_seed,
    add_too_long,
)


def finetune_options(parser):
    """Add the options of `minilora finetune`."""
    from ..training.finetune_config import FineTuneConfig

    add = parser.add_argument
    add_base(parser)
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
    add_quantize(parser)
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
    add_too_long(parser)
    add(
        "--dropout",
        type=share_below_one,
        help=f"on the adapter's input (default {FineTuneConfig.dropout})",
    )
    add_seed(parser)
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
    add_backend(parser)
    add_parts(parser, in_a_step=True, by_processes=True)
