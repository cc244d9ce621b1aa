"""What other programs ask of an adapter folder: every rule by what it accepts and what it refuses, PEFT's asked live.

vLLM is not here to be asked. Its rules are compared with a table that was read from its source, nothing more.
"""

import contextlib
import json
import logging
import os
import warnings

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from strategies import learned

from minilora.disk.gpt2 import GPT2
from minilora.disk.llama import LLAMA
from minilora.disk.loaders import VLLM_RANKS, note_on_base, peft_objections, vllm_objections, vllm_rank
from minilora.disk.own import OWN
from minilora.disk.peft import CONFIG, TENSORS, save_adapter
from minilora.gpt import GPT, GPTConfig
from minilora.lora import init_adapter
from minilora.lora_config import LoRAConfig

OURS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "somewhere", "r": 2, "lora_alpha": 5,
    "target_modules": ["c_attn"], "bias": "none", "fan_in_fan_out": True, "use_rslora": False, "rank_pattern": {},
    "alpha_pattern": {}, "lora_dropout": 0.0, "modules_to_save": None, "init_lora_weights": True,
    "inference_mode": True,
}  # fmt: skip
PREFIX = "base_model.model."
WIDTHS = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}  # (in, out)
LN, ATTN = f"{PREFIX}transformer.ln_f", f"{PREFIX}transformer.h.1.attn.c_attn"


def drawn(*modules, r=2, blocks=(0, 1)):
    """Tensors of LoRA on the given linears of a GPT-2 of two blocks and eight channels, as {name of PEFT's: array}."""
    rng, tensors = np.random.default_rng(3), {}
    for name in [f"{PREFIX}transformer.h.{i}.{module}" for i in blocks for module in modules or ["attn.c_attn"]]:
        n, m = WIDTHS[name.split(".", 5)[5]]
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((r, n)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((m, r)).astype(np.float32)
    return tensors


def renamed(old, new, tensors=None):
    return {name.replace(old, new): t for name, t in (tensors or drawn()).items()}


def without(key):
    return {k: v for k, v in OURS.items() if k != key}


def beside(*shape, **extra):
    """The usual tensors, and others named as in `extra`, __ for a dot: ones of the given shape."""
    return drawn() | {f"{PREFIX}transformer.{name.replace('__', '.')}": np.ones(shape, np.float32) for name in extra}


def only(text, tensors=None):
    return {name: t for name, t in (tensors or drawn()).items() if text in name}


BOTH = drawn("attn.c_attn", "attn.c_proj")
EMBEDDING = {f"{PREFIX}transformer.wte.lora_embedding_A": np.ones((2, 13), np.float32),
             f"{PREFIX}transformer.wte.lora_embedding_B": np.ones((8, 2), np.float32)}  # fmt: skip
MAGNITUDES = {f"{PREFIX}transformer.h.{i}.attn.c_attn.lora_magnitude_vector": np.ones(24, np.float32) for i in (0, 1)}

ACCEPTED = {  # name: (configuration, tensors)
    "as saved here": (OURS, drawn()),
    "half an alpha": (OURS | {"lora_alpha": 2.5}, drawn()),
    "an alpha of zero, which is what PEFT multiplies by": (OURS | {"lora_alpha": 0}, drawn()),
    "a negative alpha": (OURS | {"lora_alpha": -3}, drawn()),
    "no target_modules on a GPT-2 with c_attn": (without("target_modules"), drawn()),
    "a whole ending": (OURS | {"target_modules": ["attn.c_proj"]}, drawn("attn.c_proj")),
    "an expression": (OURS | {"target_modules": r".*\.c_attn"}, drawn()),
    "all-linear": (OURS | {"target_modules": "all-linear"}, drawn(*WIDTHS)),
    "the rank of a pattern": (OURS | {"r": 4, "rank_pattern": {"c_attn": 2}}, drawn()),
    "the first of two patterns": (OURS | {"rank_pattern": {"h.1.attn.c_attn": 2, "c_attn": 2}, "r": 7}, drawn()),
    "one block": (OURS | {"layers_to_transform": [0]}, drawn(blocks=[0])),
    "what is excluded has no tensors": (OURS | {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["c_proj"]},
                                        drawn()),
    "an embedding": (OURS | {"target_modules": ["wte"]}, EMBEDDING),
    "DoRA with its magnitudes": (OURS | {"use_dora": True}, drawn() | MAGNITUDES),
    "modules_to_save with its tensors": (OURS | {"modules_to_save": ["ln_f"]},
                                         beside(8, ln_f__weight=1, ln_f__bias=1)),
    "trained biases": (OURS | {"bias": "lora_only"},
                       beside(24, h__0__attn__c_attn__base_layer__bias=1, h__1__attn__c_attn__base_layer__bias=1)),
}  # fmt: skip

OBJECTED = {  # name: (configuration, tensors, words of the objection, what PEFT does)
    "no peft_type": (without("peft_type"), drawn(), "peft_type is None, not 'LORA'", "raises"),
    "another method": (OURS | {"peft_type": "IA3"}, drawn(), "peft_type is 'IA3', not 'LORA'", "warns"),
    "no r": (without("r"), drawn(), "no r: PEFT silently takes 8", "raises"),
    "no r where it is 8": (without("r"), drawn(r=8), "no r: PEFT silently takes 8", "takes 8 for r"),
    "r of null": (OURS | {"r": None}, drawn(), "r must be a whole number", "raises"),
    "r of zero": (OURS | {"r": 0}, drawn(), "r must be a whole number", "raises"),
    "no lora_alpha": (without("lora_alpha"), drawn(), "no lora_alpha: PEFT silently takes 8", "takes 8 for lora_alpha"),
    "lora_alpha of null": (OURS | {"lora_alpha": None}, drawn(), "alpha must be a finite positive", "raises"),
    "no name in target_modules": (OURS | {"target_modules": []}, drawn(), "must be at least one name", "raises"),
    "an empty expression": (OURS | {"target_modules": ""}, drawn(), "must be at least one name", "raises"),
    "a broken expression": (OURS | {"target_modules": "(("}, drawn(), "is not a regular expression", "raises"),
    "an expression for a part of a name": (OURS | {"target_modules": "c_attn"}, drawn(), "match no Linear", "raises"),
    "misspelt": (OURS | {"target_modules": ["zzz"]}, drawn(), "['zzz'] have no tensors", "raises"),
    "half misspelt": (OURS | {"target_modules": ["c_attn", "zzz"]}, drawn(), "['zzz'] have no tensors",
                      "adapts fewer than it says"),
    "a target without tensors": (OURS | {"target_modules": ["c_attn", "mlp.c_proj"]}, drawn(),
                                 "['mlp.c_proj'] have no tensors", "warns"),
    "no prefix": (OURS, renamed(PREFIX, ""), "4 tensors, transformer.h.0.attn.c_attn.lora_A.weight among them, are not "
                  "named", "warns"),
    "half a prefix": (OURS, renamed(PREFIX, "base_model."), "are not named", "warns"),
    "a double prefix": (OURS, renamed(PREFIX, 2 * PREFIX), "are not named", "warns"),
    "lower case": (OURS, renamed("lora_A", "lora_a"), "lora_a.weight among them, are not named", "warns"),
    "a name without its end": (OURS, renamed(".weight", ""), "are not named", "warns"),
    "the name of an adapter left in": (OURS, renamed(".weight", ".default.weight"), "an adapter called default",
                                       "knows it as default alone"),
    "a tensor of the base": (OURS, beside(8, ln_f__weight=1), f"{LN}.weight is not named", "overwrites the base"),
    "tensors outside target_modules": (OURS, BOTH, "2 modules, transformer.h.0.attn.c_proj among them, are not chosen",
                                       "skips tensors"),
    "tensors of an excluded module": (OURS | {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["c_proj"]},
                                      BOTH, "are not chosen", "skips tensors"),
    "tensors of another block": (OURS | {"layers_to_transform": [0]}, drawn(), "h.1.attn.c_attn is not chosen",
                                 "skips tensors"),
    "a block without tensors": (OURS | {"layers_to_transform": [0, 1]}, drawn(blocks=[0]), "there are [0]",
                                "warns"),
    "blocks of an expression": (OURS | {"layers_to_transform": [0], "target_modules": r".*\.c_attn"}, drawn(),
                                "needs target_modules to be a list", "raises"),
    "another rank": (OURS | {"r": 3}, drawn(), "of sizes (2, 8) and (24, 2), the configuration says r=3", "raises"),
    "another rank by a pattern": (OURS | {"rank_pattern": {"h.1.attn.c_attn": 3}}, drawn(),
                                  "transformer.h.1.attn.c_attn is of sizes (2, 8) and (24, 2), the configuration says "
                                  "r=3", "raises"),
    "a rank of zero in a pattern": (OURS | {"rank_pattern": {"c_attn": 0}}, drawn(), "rank_pattern must be", "raises"),
    "two ranks in one pair": (OURS, drawn() | only("lora_A", drawn(r=3)), "of sizes (3, 8) and (24, 2)", "raises"),
    "two ranks in one pair, the other way round": (OURS, drawn() | only("lora_B", drawn(r=3)),
                                                   "of sizes (2, 8) and (24, 3)", "raises"),
    "a factor under a wrong name beside modules_to_save": (
        OURS | {"modules_to_save": ["ln_f"]},
        renamed(PREFIX, 2 * PREFIX) | only("ln_f", beside(8, ln_f__weight=1, ln_f__bias=1)), "4 tensors", "warns"),
    "lora_bias without biases": (OURS | {"lora_bias": True}, drawn(), "without lora_B.bias", "warns"),
    "an embedding of another rank": (OURS | {"target_modules": ["wte"], "r": 3}, EMBEDDING,
                                     "of sizes (2, 13) and (8, 2)", "raises"),
    "one factor alone": (OURS, {k: v for k, v in drawn().items() if k != f"{ATTN}.lora_B.weight"},
                         "h.1.attn.c_attn is without lora_B", "warns"),
    "no lora_B at all": (OURS, only("lora_A"), "are without lora_B", "warns"),
    "DoRA without magnitudes": (OURS | {"use_dora": True}, drawn(), "without lora_magnitude_vector", "warns"),
    "a magnitude of another size": (OURS | {"use_dora": True},
                                    drawn() | {name: t[:8] for name, t in MAGNITUDES.items()},
                                    "h.0.attn.c_attn.lora_magnitude_vector is of size (8,)", "raises"),
    "magnitudes without DoRA": (OURS, drawn() | MAGNITUDES, "not asked for by lora_bias or use_dora", "skips tensors"),
    "a bias of lora_B without lora_bias": (OURS, beside(24, h__1__attn__c_attn__lora_B__bias=1),
                                           "c_attn.lora_B.bias is not asked for", "skips tensors"),
}  # fmt: skip


def shapes(tensors):
    return {name: t.shape for name, t in tensors.items()}


# PEFT's rules, by themselves.


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_folder_that_peft_takes_as_it_is_meets_no_objection(case):
    config, tensors = ACCEPTED[case]
    assert peft_objections(config, shapes(tensors)) == []


@pytest.mark.parametrize("case", OBJECTED)
def test_an_objection_names_what_is_wrong(case):
    config, tensors, words, _ = OBJECTED[case]
    assert words in "; ".join(peft_objections(config, shapes(tensors)))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["down_proj"], "all-linear"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_what_is_saved_here_meets_no_objection_of_either(tmp_path, targets, positions):
    rng = np.random.default_rng(0)
    base = GPT(GPTConfig(2, 2, 8, 13, 16, positions=positions), rng)
    config = LoRAConfig(2, 5, targets, rank_pattern={"h.1.*": 3}, alpha_pattern={"h.1.*": 6})
    save_adapter(learned(init_adapter(base, config, rng)), tmp_path)
    with safe_open(tmp_path / TENSORS, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert peft_objections(saved, found) == [] and vllm_objections(saved, found) == []


STRANGE = [None, 0, -1, 2.5, True, "x", "((", [], ["x"], [1], [[]], {}, {"x": 1}, {"((": 2}, float("nan")]


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "exclude_modules",
                                 "layers_to_transform", "layers_pattern", "bias", "modules_to_save", "use_dora",
                                 "lora_bias", "init_lora_weights"])  # fmt: skip
def test_whatever_a_field_holds_the_rules_answer_in_lines(key):
    for value in STRANGE:
        for objections in (peft_objections, vllm_objections):
            assert all(isinstance(line, str) for line in objections(OURS | {key: value}, shapes(drawn())))


@pytest.mark.parametrize("A", [(), (2,), (2, 8), (2, 8, 1)])
@pytest.mark.parametrize("B", [(), (2,), (24, 2), (1, 24, 2)])
def test_a_factor_that_is_no_matrix_is_objected_to(A, B):
    found = shapes(drawn()) | {f"{ATTN}.lora_A.weight": A, f"{ATTN}.lora_B.weight": B}
    says = "; ".join(peft_objections(OURS, found))
    assert (f"h.1.attn.c_attn is of sizes {A} and {B}" in says) != ((A, B) == ((2, 8), (24, 2)))
    assert isinstance(vllm_objections(OURS, found), list) and vllm_rank(found) in VLLM_RANKS


def test_a_folder_without_tensors_is_objected_to():
    assert peft_objections(OURS, {}) and vllm_rank({}) is None


def test_biases_of_lora_b_are_accepted_with_lora_bias():
    """PEFT 0.21 uses them too, but logs that their shape, (out,), is invalid: so this is not among ACCEPTED."""
    tensors = beside(24, h__0__attn__c_attn__lora_B__bias=1, h__1__attn__c_attn__lora_B__bias=1)
    assert peft_objections(OURS | {"lora_bias": True}, shapes(tensors)) == []


# PEFT itself.

AMONG_THEM = "`is_gradient_checkpointing` is deprecated"  # of transformers to PEFT, about no folder: at every load
IDS = np.random.default_rng(1).integers(0, 13, (2, 9))


@pytest.fixture(scope="module")
def torch():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when their libraries are imported
    why = "PEFT's own verdicts need torch, transformers and peft: pip install -e '.[peers]'"
    module = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    pytest.importorskip("peft", reason=why)
    before = module.get_num_threads()
    module.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield module
    module.set_num_threads(before)


@pytest.fixture
def ask(torch, tmp_path):
    """ask(config, tensors) -> what PEFT says (warnings, logs), the state it ends in, and the logits; or it raises."""
    import peft
    import transformers

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 13, "n_positions": 16}
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=12, eos_token_id=12)).eval()
    state = {name: p.clone() for name, p in base.state_dict().items()}

    def ask(config, tensors, adapter_name="default"):
        (tmp_path / CONFIG).write_text(json.dumps(config))
        save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
        model = transformers.GPT2LMHeadModel(base.config).eval()
        model.load_state_dict(state)
        with everything_said() as said:
            model = peft.PeftModel.from_pretrained(model, tmp_path, adapter_name=adapter_name).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(IDS), use_cache=False).logits.numpy()
        arrays = {name.replace(f".{adapter_name}", ""): p.numpy() for name, p in model.state_dict().items()}
        names = {name: name.replace(".modules_to_save", "").replace("vector.weight", "vector") for name in arrays}
        return said, {names[name]: p for name, p in arrays.items()}, logits

    return ask


@contextlib.contextmanager
def everything_said():
    """A list that fills with what any library warns of or logs at level WARNING or above."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    known = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    closed = [logging.root, *(logger for logger in known if not logger.propagate)]  # the root does not hear those
    for logger in closed:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
    finally:
        for logger in closed:
            logger.removeHandler(handler)
        said += [str(w.message) for w in warned if not str(w.message).startswith(AMONG_THEM)]


def used(tensors, state):
    """The names of those tensors of a file that are in the model, under their names and to the bit."""
    return {name for name, t in tensors.items() if name in state and np.array_equal(state[name], t)}


@pytest.mark.parametrize("case", ACCEPTED)
def test_peft_takes_what_is_accepted_without_a_word_and_uses_every_tensor(ask, case):
    config, tensors = ACCEPTED[case]
    said, state, _ = ask(config, tensors)
    assert said == []
    assert used(tensors, state) == tensors.keys()


def same(a, b):
    return np.array_equal(a[2], b[2])


@pytest.mark.parametrize("case", OBJECTED)
def test_peft_refuses_warns_or_computes_something_else_where_there_is_an_objection(ask, case):
    config, tensors, _, does = OBJECTED[case]
    if does == "raises":
        with pytest.raises(Exception) as caught:  # its errors are of every kind
            ask(config, tensors)
        assert not isinstance(caught.value, AssertionError)
        return
    said, state, logits = answer = ask(config, tensors)
    assert bool(said) == (does == "warns"), said
    if does.startswith("takes 8 for "):
        key = does.rpartition(" ")[2]
        assert same(answer, ask(config | {key: 8}, tensors))
        assert not same(answer, ask(config | {key: 8, "lora_alpha": 16}, tensors))  # so that equal means something
    elif does == "adapts fewer than it says":
        assert same(answer, ask(OURS, tensors)) and "zzz" in config["target_modules"]
    elif does == "knows it as default alone":
        other = ask(config, tensors, adapter_name="other")
        assert any("missing adapter keys" in line for line in other[0])
        assert same(answer, ask(OURS, drawn())) and not same(answer, other)
    elif does == "overwrites the base":
        tensors = tensors | {f"{LN}.weight": np.full(8, 3, np.float32)}
        changed = ask(config, tensors)
        assert np.array_equal(changed[1][f"{LN}.weight"], tensors[f"{LN}.weight"])
        assert changed[0] == [] and not same(changed, ask(OURS, drawn()))
    elif does == "skips tensors":
        kept = used(tensors, state)
        assert kept < tensors.keys()
        assert same(answer, ask(config, {name: t for name, t in tensors.items() if name in kept}))
    else:
        assert does == "warns" and any("missing adapter keys" in line for line in said)


# VLLM's rules, against the table that was read.


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_vllm_needs_three_fields(key):
    assert vllm_objections(without(key), shapes(drawn())) == [f"no {key}"]


@pytest.mark.parametrize("key", ["peft_type", "task_type", "base_model_name_or_path", "bias", "init_lora_weights"])
def test_vllm_needs_no_other(key):
    assert vllm_objections(without(key), shapes(drawn())) == []


@pytest.mark.parametrize("key, value", [
    ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("modules_to_save", ["lm_head"]), ("use_dora", True),
    ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]), ("use_bdlora", {"x": 1}), ("use_qalora", True),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
])  # fmt: skip
def test_vllm_takes_no_other_kind_of_lora_and_is_told_the_field(key, value):
    (line,) = vllm_objections(OURS | {key: value}, shapes(drawn()))
    assert line.startswith(f"{key} is {value!r}")


@pytest.mark.parametrize("key, value", [
    ("bias", "none"), ("lora_bias", False), ("modules_to_save", None), ("modules_to_save", []), ("use_dora", False),
    ("layer_replication", None), ("alora_invocation_tokens", None), ("use_bdlora", None), ("use_qalora", False),
    ("init_lora_weights", True), ("init_lora_weights", False), ("init_lora_weights", "gaussian"),
    ("use_rslora", True), ("rank_pattern", {"c_attn": 2}), ("alpha_pattern", {"c_attn": 3}),
])  # fmt: skip
def test_vllm_takes_what_is_neutral_and_the_patterns(key, value):
    assert vllm_objections(OURS | {key: value}, shapes(drawn())) == []


def test_vllm_has_a_largest_rank_by_field_and_by_tensor():
    name = f"{ATTN}.lora_A.weight"
    assert vllm_objections(OURS | {"r": 512}, {name: (512, 8)}) == []
    for r, shape in ((513, (2, 8)), (2, (513, 8)), (513, (513, 8))):
        assert vllm_objections(OURS | {"r": r}, {name: shape}) == ["rank 513 is above its largest, 512"]


@pytest.mark.parametrize("r, needed", [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (321, 512), (512, 512),
                                       (513, None)])  # fmt: skip
def test_the_rank_that_vllm_must_be_started_with_is_the_next_it_knows(r, needed):
    assert vllm_rank({f"{ATTN}.lora_A.weight": (r, 8), f"{ATTN}.lora_B.weight": (9999, r)}) == needed


def test_the_note_is_that_of_the_family_of_the_base():
    assert note_on_base(shapes(drawn())) == GPT2.note
    assert note_on_base(shapes(renamed("transformer.", "", drawn()))) == GPT2.note
    rotary = {f"{PREFIX}h.0.attn.q_proj.lora_A.weight": (2, 8)}
    assert note_on_base(rotary, ["wte.weight"]) == OWN.note
    llama = note_on_base({f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8)})
    assert llama == LLAMA.note and "vLLM serves" in llama
    assert note_on_base({f"{PREFIX}decoder.layers.0.self_attn.q_proj.lora_A.weight": (2, 8)}) == ""
