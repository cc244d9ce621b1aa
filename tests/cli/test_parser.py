"""Arguments: the flag that was meant, and values that are none."""

import pytest

from minilora.cli.parser import FLAG_SYNONYMS, CommandParser, Names, nearest, whole_number
from minilora.cli.table import COMMANDS, parser_of


def refused(parser, *words):
    """What the parser says before it ends the program with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "command, flag, meant",
    [
        ("finetune", "--rank", "--r"),
        ("finetune", "--lora_r", "--r"),
        ("finetune", "-r", "--r"),
        ("finetune", "--lora-alpha", "--alpha"),
        ("finetune", "--lora_alpha", "--alpha"),
        ("finetune", "--learning-rate", "--lr"),
        ("finetune", "--learning_rate", "--lr"),
        ("finetune", "--epochs", "--steps"),
        ("finetune", "--num_train_epochs", "--steps"),
        ("finetune", "--max-steps", "--steps"),
        ("finetune", "--batch-size", "--batch"),
        ("finetune", "--per_device_train_batch_size", "--batch"),
        ("finetune", "--target-modules", "--target"),
        ("finetune", "--target_modules", "--target"),
        ("finetune", "--lora_dropout", "--dropout"),
        ("finetune", "--max-length", "--length"),
        ("finetune", "--max_seq_length", "--length"),
        ("finetune", "--model_name_or_path", "--base"),
        ("finetune", "--dataset", "--data"),
        ("finetune", "--output_dir", "--out"),
        ("finetune", "--val-split", "--eval-split"),
        ("finetune", "--save_steps", "--save-every"),
        ("finetune", "--eval_steps", "--eval-every"),
        ("finetune", "--early-stopping-patience", "--patience"),
        ("finetune", "--log-file", "--log"),
        ("finetune", "--device", "--backend"),
        ("finetune", "--num-threads", "--threads"),
        ("finetune", "--num-workers", "--workers"),
        ("finetune", "--gradient-accumulation-steps", "--accumulate"),
        ("finetune", "--alhpa", "--alpha"),
        ("finetune", "--max_grad_norm", "--clip"),
        ("finetune", "--config-file", "--config"),
        ("finetune", "--adapter_name_or_path", "--from-adapter"),
        ("finetune", "--silent", "--quiet"),
        ("finetune", "--use_rslora", "--rslora"),
        ("finetune", "--lr_scheduler_type", "--schedule"),
        ("finetune", "--warmup_steps", "--warmup"),
        ("finetune", "--weight_decay", "--weight-decay"),
        ("finetune", "--rank_pattern", "--rank-pattern"),
        ("finetune", "--target-regexp", "--target-regex"),
        ("finetune", "--Seed", "--seed"),
        ("generate", "--max-tokens", "--max-new-tokens"),
        ("generate", "--max_new_tokens", "--max-new-tokens"),
        ("generate", "--max-length", "--max-new-tokens"),
        ("generate", "--temprature", "--temperature"),
        ("generate", "--topk", "--top-k"),
        ("generate", "--text", "--prompt"),
        ("generate", "--lora", "--adapter"),
        ("generate", "--model", "--base"),
        ("merge", "--output", "--out"),
        ("merge", "--precision", "--dtype"),
        ("merge", "--coefficients", "--weights"),
        ("combine", "--rank", "--r"),
        ("extract", "--finetuned", "--tuned"),
        ("extract", "--target-modules", "--target"),
        ("compare", "--batch-size", "--batch"),
        ("demo", "--question", "--ask"),
        ("demo", "-q", "--quick"),
    ],
)
def test_an_unknown_flag_names_the_nearest_and_the_help_of_its_own_command(command, flag, meant, capsys):
    for words in ([flag, "8"], [f"{flag}=8"]):
        refused(parser_of(command), *words)
        line = f"minilora {command}: there is no {flag}: did you mean {meant}? See minilora {command} --help\n"
        assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("flag", ["--foo", "-x", "--dora"])
def test_a_flag_that_is_like_no_other_names_the_help_alone(flag, capsys):
    refused(parser_of("merge"), "--base", "b", flag)
    assert capsys.readouterr().err == f"minilora merge: there is no {flag}; see minilora merge --help\n"


def test_a_suggestion_is_a_flag_that_the_command_has():
    for command in COMMANDS:
        names = [flag.lstrip("-") for flag in parser_of(command).flags]
        for words in FLAG_SYNONYMS.values():
            for word in words:
                assert nearest(word, names, FLAG_SYNONYMS) in (None, *names)


def test_a_synonym_is_no_flag_of_ours_that_some_command_has_with_another_meaning():
    ours = {flag.lstrip("-") for command in COMMANDS for flag in parser_of(command).flags}
    assert set(FLAG_SYNONYMS) <= ours
    for name, words in FLAG_SYNONYMS.items():
        for word in words:
            assert word == word.lower() and "_" not in word
            # --length is ours for finetune, and what others call --max-new-tokens.
            assert word not in ours or (name, word) == ("max-new-tokens", "length")


@pytest.fixture
def parser():
    parser = CommandParser("finetune", "train an adapter", "example")
    parser.add_argument("--target", nargs="+", action=Names)
    parser.add_argument("--prompt")
    parser.add_argument("--r", type=whole_number(1), default=8)
    return parser


@pytest.mark.parametrize("words, prompt", [
    (["--prompt", "- a list"], "- a list"), (["--prompt", "-not a flag"], "-not a flag"), (["--prompt=--x"], "--x"),
    (["--prompt", "-1"], "-1"), (["--prompt", ""], ""), (["--pro", "x"], "x"),
])  # fmt: skip
def test_a_text_that_begins_with_a_dash_is_no_flag(parser, words, prompt):
    assert parser.parse_args(words).prompt == prompt


@pytest.mark.parametrize("words, weights", [
    (["0.7", "-0.3"], [0.7, -0.3]), (["-1", "-.5"], [-1, -0.5]), (["-1e-3", "2E+1"], [-0.001, 20]),
    (["-0", "+1"], [0, 1]),
], ids=str)  # fmt: skip
def test_a_negative_number_is_no_flag_however_it_is_written(words, weights):
    line = ["--base", "b", "--adapter", "x", "y", "--out", "o"]
    for order in ([*line, "--weights", *words], ["--weights", *words, *line]):
        assert parser_of("merge").parse_args(order).weights == weights
    assert parser_of("merge").parse_args([*line, f"--weights={words[1]}", "--dtype", "float32"]).weights == weights[1:]


def test_behind_two_dashes_there_are_no_flags():
    assert parser_of("inspect").parse_args(["--", "--rank"]).folder == "--rank"


def test_a_misspelt_flag_is_found_before_one_that_is_missing(capsys):
    refused(parser_of("finetune"), "--bse", "gpt2")
    assert "--bse: did you mean --base?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["a", "b"], ["a,b"], ["a,", "b"], ["a", ",b"], ["a, b"], ["a,,b,"]], ids=str)
def test_names_are_read_with_spaces_or_commas_between_them(parser, words):
    assert parser.parse_args(["--target", *words]).target == ["a", "b"]
    assert parser.parse_args(["--target", *words, "--r", "2", "--target", "c"]).target == ["a", "b", "c"]


def test_an_error_is_one_line_whatever_was_typed(parser, capsys):
    for value in ("x\ny", "x" * 5000, "é", ""):
        refused(parser, "--r", value)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and len(err) < 500 and err.startswith("minilora finetune: argument --r: must be")
