"""The options of `minilora finetune`, and their help. Knows what a run is given, and no run.

What was not given is None here: a file of settings may say it, or the checkpoint of a run that goes
on, and last FineTuneConfig.
"""

from .parser import (
    Assignments,
    Names,
    assignment,
    expression,
    number_from_zero,
    positive_number,
    share_below_one,
    whole_number,
)
from .shared_options import (
    add_accept_base,
    add_backend,
    add_base,
    add_parts,
    add_quantize,
    add_seed,
    add_too_long,
)

USAGE = """minilora finetune --base BASE --data FILE --out DIR --alpha ALPHA [more]
       minilora finetune --base BASE --data FILE --out DIR --from-adapter DIR [more]
       minilora finetune --base BASE --data FILE --out DIR --full [more]
       minilora finetune --config FILE --out DIR [more]
       minilora finetune --resume --out DIR [more]"""

# A setting whose flag is called otherwise than it.
_FLAGS = {"log_file": "--log"}


def flag_of(setting):
    """What a setting of FineTuneConfig is called on the command line."""
    return _FLAGS.get(setting, f"--{setting.replace('_', '-')}")


def finetune_options(parser):
    """Add the options of `minilora finetune`."""
    parser.usage = USAGE
    _run_options(parser)
    _adapter_options(parser.group("the adapter", "What is trained, and with what strength."))
    _step_options(parser.group("the steps", "How many, and how long each is."))
    _measuring_options(parser.group("what is measured and kept", "On the way, and at the end."))
    add_parts(parser, in_a_step=True, by_processes=True)
    parser.set_defaults(seed=None, backend=None, accept_base=None)


def _run_options(parser):
    add = parser.add_argument
    add_base(parser, required=False)
    add(
        "--data",
        metavar="FILE",
        help='a .txt, or a .jsonl with {"prompt": "...", "answer": "..."} on each line, of which '
        "the answers are learned; or with prompt and completion, instruction, input and output, "
        "messages, or text. An answer to a prompt usually starts with a space or a newline",
    )
    add(
        "--out",
        metavar="DIR",
        help="the adapter's folder, in PEFT's format; with --full a model's",
    )
    add(
        "--keep",
        type=whole_number(1),
        metavar="N",
        help="--out may hold an adapter: it becomes a version, of which the last N are kept there; "
        "minilora history lists them, minilora rollback puts one back",
    )
    add(
        "--config",
        metavar="FILE",
        help="a .json or a .toml with these options by their names; what is given beside it counts "
        "more. Each run leaves such a file that repeats it, run.json, in the adapter's folder",
    )
    add(
        "--resume",
        action="store_const",
        const=True,
        help="go on with the run in --out that was interrupted or killed, with all of its settings",
    )
    add(
        "--no-log",
        action="store_const",
        const=True,
        help="with --resume: write no further line of its log, which may be lost",
    )
    add_quantize(parser)
    add_accept_base(parser)
    add_too_long(parser)
    add(
        "--length",
        type=whole_number(1),
        help="tokens in a row of text (default 256, or the model's context if shorter)",
    )
    add_seed(parser)
    add(
        "--quiet",
        action="store_const",
        const=True,
        help="no progress, and of the report what was learned",
    )
    add_backend(parser)


def _adapter_options(add):
    from ..training.finetune_config import FineTuneConfig

    add(
        "--alpha",
        type=positive_number,
        help="strength: the update is scaled by alpha / r; often 2 r; required but with --full and "
        "--from-adapter",
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
        "--target-regex",
        type=expression,
        metavar="EXPR",
        help="in the place of --target: a regular expression for whole names, as PEFT has it",
    )
    add(
        "--rank-pattern",
        nargs="+",
        action=Assignments,
        type=assignment(whole_number(1)),
        metavar="NAME=R",
        help="another rank for the modules whose name, or the end of it, NAME matches",
    )
    add(
        "--alpha-pattern",
        nargs="+",
        action=Assignments,
        type=assignment(positive_number),
        metavar="NAME=A",
        help="another alpha for such modules",
    )
    add(
        "--rslora",
        action="store_const",
        const=True,
        help="rsLoRA: scale by alpha / sqrt(r), so that the update does not shrink as r grows",
    )
    add(
        "--dora",
        action="store_const",
        const=True,
        help="DoRA: beside LoRA's update also a length for each row of the weight",
    )
    add(
        "--dropout",
        type=share_below_one,
        help=f"on the adapter's input (default {FineTuneConfig.dropout})",
    )
    add(
        "--from-adapter",
        metavar="DIR",
        help="go on from this adapter of the base, on these data and with a new optimizer; its "
        "alpha, rank and modules are its own",
    )
    add(
        "--full",
        action="store_const",
        const=True,
        help="no adapter: train every weight of a copy of the base, and write a model; takes four "
        "times the base's memory",
    )


def _step_options(add):
    from ..optim import SCHEDULES
    from ..training.finetune_config import LONGEST_WARMUP, FineTuneConfig

    add(
        "--lr",
        type=positive_number,
        help=f"peak of the learning rate (default {FineTuneConfig.lr}; with --full rather a tenth "
        "of it)",
    )
    add(
        "--schedule",
        choices=list(SCHEDULES),
        help=f"how it falls after its peak, to a tenth or not (default {FineTuneConfig.schedule})",
    )
    add(
        "--warmup",
        type=whole_number(0),
        metavar="STEPS",
        help="steps in which it rises to its peak (default a tenth of the steps, at most "
        f"{LONGEST_WARMUP})",
    )
    add(
        "--weight-decay",
        type=number_from_zero,
        metavar="DECAY",
        help=f"each step takes lr * DECAY of every trained number (default "
        f"{FineTuneConfig.weight_decay})",
    )
    add(
        "--clip",
        type=positive_number,
        metavar="NORM",
        help=f"gradients are shortened to this joint norm (default {FineTuneConfig.clip})",
    )
    add("--steps", type=whole_number(1), help=f"how many (default {FineTuneConfig.steps})")
    add(
        "--batch",
        type=whole_number(1),
        help=f"rows in a batch (default {FineTuneConfig.batch})",
    )


def _measuring_options(add):
    from ..training.finetune_config import FineTuneConfig

    add(
        "--eval-split",
        type=share_below_one,
        metavar="SHARE",
        help="share of the data held out, to measure the loss on before and after (default "
        f"{FineTuneConfig.eval_split})",
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
        dest="log_file",
        metavar="FILE",
        help="a new .jsonl for a line on each step and each measurement; minilora plot draws it",
    )
    add(
        "--save-every",
        type=whole_number(1),
        metavar="STEPS",
        help=f"steps between two checkpoints (default {FineTuneConfig.save_every})",
    )
