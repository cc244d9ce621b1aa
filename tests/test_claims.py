"""The claims of five tutorials: what is counted is counted again, every verdict follows from its numbers, the pages
are what the data give, and whatever a row names exists. Beside them, the properties that only this table needs."""

import ast
import copy
import json
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from course import claims, pages, quantities
from test_readme import joined

from minilora import GPT, Adam, GPTConfig, LoRAConfig, Tensor, attach, init_adapter
from minilora.cli import table as table_of_commands
from minilora.count import activation_bytes
from minilora.functional import attention, linear
from minilora.lora import LoRALinear, LoRAPair
from minilora.memory import training_bytes
from minilora.nn import Linear, Module

ROOT = Path(__file__).resolve().parent.parent

DATA = claims.load()
CLAIMS = {claim["id"]: claim for claim in DATA["claims"]}
KINDS = {
    kind: [name for name, claim in CLAIMS.items() if claim["kind"] == kind]
    for kind in ("arithmetic", "property", "empirical", "uncheckable")
}
OUTCOMES = {name: claims.outcome(claim) for name, claim in CLAIMS.items()}
SECTIONS = json.loads(pages.SECTIONS.read_text(encoding="utf-8"))


def changed(name, **fields):
    """A copy of a claim with other fields."""
    return {**copy.deepcopy(CLAIMS[name]), **fields}


# The verdicts.


@pytest.mark.parametrize("name", KINDS["arithmetic"])
def test_the_verdict_of_what_is_counted_follows_from_the_count(name):
    assert OUTCOMES[name].verdict == CLAIMS[name]["verdict"]


@pytest.mark.parametrize("name", KINDS["property"] + KINDS["uncheckable"])
def test_the_verdict_of_what_a_test_shows_follows_from_the_tests(name):
    assert OUTCOMES[name].verdict == CLAIMS[name]["verdict"]


def test_a_verdict_is_true_if_all_readings_hold_false_if_none_does_and_imprecise_otherwise():
    assert claims.verdict_of([True, True]) == "true"
    assert claims.verdict_of([False, False]) == "false"
    assert claims.verdict_of([True, False]) == claims.verdict_of([None]) == claims.verdict_of([None, True])
    assert claims.verdict_of([None]) == "imprecise"
    assert claims.verdict_of([]) == "not checkable"


def quoted_in(claim):
    """What the readings and values of a claim compare with: the texts in their expressions that begin a number."""
    expressions = [each for each in claim.get("readings", []) if isinstance(each, str)]
    expressions += claim.get("values", {}).values()
    for expression in expressions:
        for node in ast.walk(ast.parse(expression, mode="eval")):
            if isinstance(node, ast.Call) and node.func.id in ("quoted", "equals", "about", "within"):
                yield node.args[-1].value


@pytest.mark.parametrize("name", CLAIMS)
def test_a_number_that_a_reading_compares_with_stands_in_the_quote(name):
    assert [text for text in quoted_in(CLAIMS[name]) if text not in CLAIMS[name]["quote"]] == []


def test_planted_another_number_in_a_quote_or_in_a_reading_or_another_verdict_is_noticed():
    claim = CLAIMS["B6"]
    assert [text for text in quoted_in(claim) if text not in claim["quote"].replace("84", "112")] == ["84 GB"]
    right = json.loads(json.dumps(claim).replace("84 GB", "112 GB"))
    assert claims.outcome(right).verdict == "true" != claim["verdict"]
    assert claims.outcome(changed("A7", values={**CLAIMS["A7"]["values"], "lora": "65535"})).verdict == "imprecise"


# What has a number in its name, and is no number: models, kinds of numbers, other rows, publications.
NAMES = re.compile(
    r"Llama-[\d.]+-\d+B|GPT-\d( 175B)?|6\.7B model|SmolLM2|IA3|float(16|32)|\b(16|4) bits|in 4;|NF4|[A-E]\d+\b"
    r"|Li et al\. 2018|Aghajanyan et al\. 2020|section 7"
    r"|QLoRA's paper tuned 65 billion on one GPU of 48 GB|α = 2r|d/\(2r\)"
)


def numbers_by_hand(claim):
    """The numbers of its sentence that are neither computed, nor in the quote, nor settings of what is computed."""
    settings = json.dumps([claim.get("values", {}), claim.get("readings", []), claim.get("quote", "")])
    allowed = {number.replace(",", "") for number in re.findall(r"\d[\d,]*", settings)}
    text = NAMES.sub("", re.sub(r"\{[^}]*\}", "", claim["text"]))
    return [number for number in re.findall(r"\d[\d.,]*\d|\d", text) if number.replace(",", "") not in allowed]


@pytest.mark.parametrize("claim", [*CLAIMS.values(), *DATA["quick_checks"]], ids=lambda claim: claim.get("id", "check"))
def test_no_number_of_a_sentence_is_written_by_hand(claim):
    assert numbers_by_hand(claim) == []


def test_planted_a_number_that_is_written_by_hand_is_noticed():
    assert numbers_by_hand(changed("B5", text="two moments: 56 GB")) == ["56"]


def test_the_kinds_are_what_they_say():
    assert sum(map(len, KINDS.values())) == len(CLAIMS) == len(DATA["claims"])
    for name, claim in CLAIMS.items():
        text = json.dumps(claim)
        readings = claim.get("readings", [])
        assert ("lab('" in text) == (claim["kind"] == "empirical"), name
        assert (not readings) == (claim["kind"] == "uncheckable"), name
        assert ("verdict" in claim) == (claim["kind"] != "empirical"), f"{name}: the numbers decide"
        if claim["kind"] == "property":
            assert all(isinstance(reading, dict) for reading in readings), name


def test_every_claim_of_every_tutorial_has_its_row():
    assert list(CLAIMS) == [f"{letter}{i}" for letter, n in zip("ABCDE", (24, 56, 27, 35, 17), strict=True)
                            for i in range(1, n + 1)]  # fmt: skip
    assert list(DATA["tutorials"]) == list("ABCDE")
    assert len(DATA["quick_checks"]) == 7


@pytest.mark.parametrize("name", CLAIMS)
def test_a_quote_is_short(name):
    assert len(CLAIMS[name]["quote"]) <= 100 and "\n" not in CLAIMS[name]["quote"]


# What a number in a quote means.


@pytest.mark.parametrize("value, text, same", [
    (84e9, "84 GB", True), (112e9, "84 GB", False), (84.4e9, "84 GB", True), (84.6e9, "84 GB", False),
    (8.03e9, "7 billion", False), (16777216, "16,777,216", True), (16777217, "16,777,216", False),
    (7077888, "7.1e+6", True), (7.2e6, "7.1e+6", False), (147456, "147.5K", True), (0.78125, "0.78", True),
    (3.125, "3.12", True), (3.126, "3.12", False), (1.5625, "1.56", True), (95.83, "95.8%", True), (24, "24x", True),
    (0.49e9, "0.0GB", False), (0.04e9, "0.0GB", True),
])  # fmt: skip
def test_a_number_equals_what_is_printed_if_it_rounds_to_it(value, text, same):
    assert claims.equals(value, text) == same


def test_a_range_has_the_unit_of_its_end_and_about_means_a_tenth():
    assert claims.within(16.3e9, "~16-20 GB") and not claims.within(15.9e9, "16-20 GB")
    assert claims.within(1, "1-10%") and not claims.within(0.4, "1-10%") and not claims.within(12, "1-10%")
    assert claims.about(16.78e6, "about 16 million") and not claims.about(32.8e6, "~280M")
    assert claims.quoted("$12,000+") == 12000
    with pytest.raises(ValueError, match="no number in 'weeks'"):
        claims.quoted("weeks")


def test_a_range_over_seeds_is_shown_as_one_and_a_single_number_alone():
    show = lambda value, spec: format(claims.Shown(value), spec)
    assert show(np.array([52.6, 71.9, 60.0]), ".0f %") == "53 to 72 %"
    assert show(np.array([52.6, 52.9]), ".0f %") == "53 %"
    assert show(112e9, ".0f GB") == "112 GB"
    assert show(13631488, ",.0f") == "13,631,488"


def test_the_bytes_of_training_are_those_that_the_command_counts():
    """Sixteen for each number, in float32 as in mixed precision."""
    n = 7_000_000_000
    for dtype in ("float32", "bfloat16"):
        assert quantities.state_bytes() * n == training_bytes(n, dtype=dtype).together
    assert quantities.adam_bytes() * n == training_bytes(n).moments


# The labs.


LAB = {"lab": "planted", "quick": False, "seeds": [0, 1, 2], "seconds": 3.2, "setting": "A setting.", "before": 2.5,
       "machine": {"cpu": "a processor"}, "columns": {"name": ["", ""]},
       "rows": [{"name": "r=8", "share": [80, 85, 90], "numbers": 7}]}  # fmt: skip


def keep(folder, **fields):
    (folder / "planted.json").write_text(json.dumps({**LAB, **fields}), encoding="utf-8")


def asked(folder, *readings):
    """The Outcome of a claim on the planted lab."""
    return claims.outcome({"values": {"share": "lab('planted', 'r=8', 'share')"}, "readings": list(readings),
                           "text": "{share:.0f %}"}, folder)  # fmt: skip


def test_a_reading_of_a_lab_holds_for_all_seeds_for_none_or_for_some(tmp_path):
    keep(tmp_path)
    assert asked(tmp_path, "share >= 80").verdict == "true"
    assert asked(tmp_path, "share > 90").verdict == "false"
    assert asked(tmp_path, "share > 84") == ("imprecise", "80 to 90 %", {"share": pytest.approx([80, 85, 90])}, [None],
                                             [])  # fmt: skip
    keep(tmp_path, rows=[{"name": "r=8", "share": [79, 85, 90]}])
    assert asked(tmp_path, "share >= 80").verdict == "imprecise"


def test_a_lab_that_has_not_run_is_waited_for(tmp_path):
    assert asked(tmp_path, "share > 90") == (claims.PENDING, claims.PENDING, {}, [], ["planted"])


@pytest.mark.parametrize("fields, complaint", [
    ({"quick": True}, "planted.json: a quick run shows that it runs, and measures nothing"),
    ({"seeds": [0, 1], "rows": [{"name": "r=8", "share": [1, 2]}]}, "has 2 numbers and the run 2 seeds"),
    ({"seeds": [0, 1, 2, 3]}, "has 3 numbers and the run 4 seeds"),
])  # fmt: skip
def test_a_range_of_too_few_seeds_is_refused(fields, complaint, tmp_path):
    keep(tmp_path, **fields)
    with pytest.raises(ValueError, match=complaint):
        asked(tmp_path, "share > 90")


def test_a_lab_gives_what_stands_beside_its_rows_and_refuses_other_names(tmp_path):
    keep(tmp_path)
    assert claims.lab(tmp_path, "planted", "before") == 2.5
    assert claims.lab(tmp_path, "planted", "r=8", "numbers") == 7
    with pytest.raises(KeyError, match="r=9"):
        claims.lab(tmp_path, "planted", "r=9", "share")


def test_what_waits_is_what_has_no_results_yet():
    waiting = {lab for outcome in OUTCOMES.values() for lab in outcome.waits}
    assert [lab for lab in waiting if (claims.RESULTS / f"{lab}.json").exists()] == []
    assert {name for name, outcome in OUTCOMES.items() if outcome.waits} <= set(KINDS["empirical"])


# Its learning rates are chosen once, on a seed that no result comes from, and it says so.
WITHOUT_SEEDS = {"D32"}


@pytest.mark.parametrize("name", KINDS["empirical"])
def test_what_a_lab_measured_is_quoted_as_a_range_over_three_seeds(name):
    outcome = OUTCOMES[name]
    if outcome.waits:
        pytest.skip(f"waits for {outcome.waits}")
    assert max(np.size(value) for value in outcome.values.values()) >= 3 or name in WITHOUT_SEEDS


# The pages are what the data give.


def test_the_page_is_what_the_data_give():
    assert pages.CLAIMS_PAGE.read_text(encoding="utf-8") == pages.claims_page(DATA, OUTCOMES), REWRITE


def test_the_map_is_what_the_data_give():
    page = pages.MAP_PAGE.read_text(encoding="utf-8")
    assert page == pages.with_map(page, pages.sections_map(SECTIONS)), REWRITE


REWRITE = "python examples/claims.py --write"


def test_another_number_in_a_lab_is_another_page(tmp_path):
    measured = [name for name in KINDS["empirical"] if not OUTCOMES[name].waits]
    if not measured:
        pytest.skip("no lab has been measured yet")
    claim = CLAIMS[measured[0]]
    name, row, key = re.search(r"lab\('(\w+)', '([^']+)', '([^']+)'\)", json.dumps(claim, ensure_ascii=False)).groups()
    shutil.copy(claims.RESULTS / f"{name}.json", tmp_path)
    kept = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    (of_row,) = [each for each in kept["rows"] if row in each.values()]
    of_row[key][0] -= 50
    (tmp_path / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
    assert claims.outcome(claim, tmp_path).text != OUTCOMES[measured[0]].text


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="needs the lines"):
        pages.with_map("no marks", "a table")
    marked = f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n"
    assert pages.with_map(marked, "new\n") == f"before\n{pages.BEGIN}\n\nnew\n\n{pages.END}\nafter\n"


# What a row names exists.


@cache
def functions_of(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


SHOWN = sorted({shown for claim in DATA["claims"] for shown in pages.shown_by(claim)})


@pytest.mark.parametrize("name", [shown for shown in SHOWN if "::" in shown])
def test_a_test_that_a_row_names_exists(name):
    file, _, function = name.partition("::")
    assert function in functions_of(file)


def exists(answer):
    """Is there such a lab, page or command? A command's options are understood."""
    # What no lab answers, in words.
    if answer.startswith("("):
        return answer.endswith(")")
    if answer.startswith("minilora "):
        _, name, *arguments = answer.split()
        table_of_commands.parser_of(name).parse_args(arguments)
        return True
    return (ROOT / "examples" / (answer if answer.endswith(".md") else f"{answer}.py")).exists()


ANSWERS = sorted({answer for section in SECTIONS for answer in section["answer"]})


@pytest.mark.parametrize("name", sorted({shown for shown in SHOWN if "::" not in shown} | set(ANSWERS)))
def test_a_lab_or_command_that_a_row_names_exists(name):
    assert exists(name)


def test_the_claims_are_counted_where_the_page_is_named():
    assert f"| {len(CLAIMS)} claims of five tutorials:" in pages.MAP_PAGE.read_text(encoding="utf-8")
    assert set(DATA["begin_with"]) <= set(CLAIMS)


def test_every_claim_that_can_be_checked_is_shown_by_something():
    assert [name for name, claim in CLAIMS.items() if claim.get("readings") and not pages.shown_by(claim)] == []


def test_the_seconds_of_a_lab_are_those_it_measured_or_the_words_of_its_docstring():
    assert pages.seconds("gradients") == "about a second" or pages.seconds("gradients").isdigit()
    assert pages.seconds("minilora demo") == ""


# The properties that only these rows need.


def test_the_product_BAx_of_the_shapes_that_are_printed_does_not_exist():
    d, r = 6, 2
    A = np.ones((d, r))
    B = np.ones((r, d))
    x = np.ones(d)
    assert (B @ A).shape == (r, r)
    with pytest.raises(ValueError, match="mismatch"):
        B @ A @ x
    assert (x @ A @ B).shape == (d,)
    rows = Tensor(x[None])
    assert LoRAPair(Tensor(np.ones((r, d))), Tensor(np.ones((d, r))), 1.0)(rows).shape == (1, d)
    with pytest.raises(ValueError, match="linear"):
        LoRAPair(Tensor(A), Tensor(B), 1.0)(rows)


def small_gpt():
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=8), np.random.default_rng(0))


def test_weights_gradients_and_moments_do_not_grow_with_the_batch_and_activations_do():
    model = small_gpt()
    adam = Adam(model.parameters())
    held = []
    for n_rows in (1, 8):
        adam.zero_grad()
        ids = np.ones((n_rows, 8), int)
        loss = model.loss(ids, ids)
        activations = activation_bytes(loss, model)
        loss.backward()
        adam.step()
        gradients = sum(p.grad.nbytes for p in model.parameters())
        moments = sum(m.nbytes for m in [*adam.m, *adam.v])
        held.append((gradients, moments, activations))
    (gradients, moments, few), (same_gradients, same_moments, many) = held
    assert (gradients, moments) == (same_gradients, same_moments)
    assert many > 4 * few


def weight_gradient(n_tokens):
    """The gradient of a weight (6, 8) from tokens of small whole numbers, in float64: exact."""
    rng = np.random.default_rng(0)
    weight = Tensor(rng.integers(-3, 4, (6, 8)).astype(float), requires_grad=True)
    x = Tensor(rng.integers(-3, 4, (n_tokens, 8)).astype(float))
    y = linear(x, weight)
    y.backward(rng.integers(-3, 4, y.shape).astype(float))
    return weight.grad


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_the_gradient_of_a_weight_has_at_most_as_many_directions_as_the_batch_has_tokens(n_tokens):
    assert np.linalg.matrix_rank(weight_gradient(n_tokens)) <= n_tokens


def test_with_enough_tokens_the_gradient_of_a_weight_has_full_rank():
    assert np.linalg.matrix_rank(weight_gradient(30)) == 6


def test_what_a_prefix_adds_is_no_matrix_times_the_input():
    """Twice the input would then give twice what is added."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 4))
    front = rng.standard_normal((1, 2, 4))

    def added(x):
        attend = lambda keys, values: attention(Tensor(x), Tensor(keys), Tensor(values), 1).data
        longer = np.concatenate([front, x], axis=1)
        return attend(longer, longer) - attend(x, x)

    assert np.abs(added(2 * x) - 2 * added(x)).max() > 0.1


class Wrapped(Module):
    """The tutorial's layer: it freezes the one linear that it wraps."""

    def __init__(self, layer):
        self.linear = layer.frozen()
        rng = np.random.default_rng(0)
        self.lora_A = Tensor(rng.standard_normal((2, layer.in_features)), requires_grad=True)
        self.lora_B = Tensor(np.zeros((layer.out_features, 2)), requires_grad=True)


def apply_lora(model):
    """The tutorial's loop: each Linear that is a child of some module is replaced."""
    for module in [module for _, module in model.named_modules()]:
        for name, child in list(vars(module).items()):
            if isinstance(child, Linear):
                setattr(module, name, Wrapped(child))
    return model


def test_what_a_loop_over_linears_freezes_is_not_all_that_training_moves():
    trainable = [name for name, p in apply_lora(small_gpt()).named_parameters() if p.requires_grad]
    left = {name.split(".")[0] if "ln" not in name else "layer norm" for name in trainable if "lora" not in name}
    assert left == {"wte", "wpe", "layer norm"}
    adapted = attach(small_gpt(), init_adapter(small_gpt(), LoRAConfig(2, 2, "all-linear"), np.random.default_rng(0)))
    assert all("lora" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_a_loop_over_children_finds_the_linears_below_and_not_the_model_itself():
    wraps = lambda model: sum(isinstance(module, Wrapped) for _, module in model.named_modules())
    assert wraps(apply_lora(small_gpt())) == 6
    assert wraps(apply_lora(apply_lora(small_gpt()))) == 12
    assert wraps(apply_lora(Linear.init(3, 3, np.random.default_rng(0)))) == 0


def test_a_layer_that_makes_its_own_linear_does_not_hold_the_weights_it_was_made_for():
    pretrained = Linear.init(4, 3, np.random.default_rng(0))
    made_anew = Linear.init(4, 3, np.random.default_rng(1))
    pair = LoRAPair(Tensor(np.zeros((2, 4), "float32")), Tensor(np.zeros((3, 2), "float32")), 1.0)
    x = Tensor(np.ones((1, 4), "float32"))
    assert (LoRALinear(pretrained, pair)(x).data == pretrained(x).data).all()
    assert (made_anew(x).data != pretrained(x).data).any()


def test_the_page_says_how_a_verdict_is_made():
    page = joined(pages.CLAIMS_PAGE.read_text(encoding="utf-8"))
    assert f"{len(CLAIMS)} claims" in page and "Nobody writes a verdict by hand" in page
