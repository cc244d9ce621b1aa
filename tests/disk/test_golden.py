"""What transformers and PEFT wrote and computed, frozen in `tests/golden`: this library computes the same from it."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from strategies import bits, same_adapter

from minilora import Adam, attach, load_adapter, load_gpt2, load_model, lora_config, merge, save_adapter, save_gpt2
from minilora.disk import adapter_file, base_files, models, peft
from minilora.disk.gpt2 import GPT2
from minilora.dora import DoRAPair, row_norms
from minilora.graph import no_grad
from minilora.lora import LoRALinear
from minilora.lora_config import LoRAConfig
from minilora.tensor import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
ADAPTED = [case for case in CASES if (GOLDEN / case / "adapter").exists()]
LEARNED = [case for case in ADAPTED if any(key.startswith("grad:") for key in np.load(GOLDEN / case / "expected.npz"))]
PARTS = {"attn.c_attn": ["attn.q_proj", "attn.k_proj", "attn.v_proj"], "attn.c_proj": ["attn.o_proj"],
         "mlp.c_fc": ["mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}  # fmt: skip
# In float32 this is a margin, not a derived bound: two layers of rounding are not worth an analysis. The largest
# difference found is 4e-6, on logits of up to 4, and every bug planted below moves a logit by more than the margin.
FLOAT32_MARGIN = 2e-5


def frozen(case):
    """The numbers that transformers and PEFT computed, in float64."""
    return dict(np.load(GOLDEN / case / "expected.npz"))


def base_of(case, dtype="float64"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case == "untied_conflict" else "error")
        return load_gpt2(GOLDEN / case / "base").astype(dtype)


def logits(model, ids):
    with no_grad():
        return model(ids).data


def close(ours, theirs, tolerance):
    difference = np.abs(ours - theirs).max()
    assert ours.shape == theirs.shape and difference < tolerance, difference


def computes_the_same(case, dtype="float64", tolerance=1e-10):
    """Base, attached and merged logits are the frozen ones, for each adapter of the case."""
    expected, base = frozen(case), base_of(case, dtype)
    close(logits(base, expected["ids"]), expected["base_logits"], tolerance)
    for folder, keys in (("adapter", ["adapted_logits", "merged_logits"]), ("adapter_pattern", ["pattern_logits"] * 2)):
        if (GOLDEN / case / folder).exists():
            model = attach(base, load_adapter(GOLDEN / case / folder, base))
            close(logits(model, expected["ids"]), expected[keys[0]], tolerance)
            close(logits(merge(model), expected["ids"]), expected[keys[1]], tolerance)


def in_the_files_form(adapter, pick):
    """{key of the file: array} of what `pick` takes from each tensor: c_attn has one A, and B's rows are q, k, v."""
    found = {}
    for block in sorted({name.partition(".attn.")[0].partition(".mlp.")[0] for name in adapter.pairs}):
        for file, parts in PARTS.items():
            pairs = [adapter.pairs[f"{block}.{part}"] for part in parts if f"{block}.{part}" in adapter.pairs]
            if pairs:
                key = f"base_model.model.transformer.{block}.{file}"
                assert len({id(pair.lora_A) for pair in pairs}) == 1
                found[f"{key}.lora_A.weight"] = pick(pairs[0].lora_A)
                found[f"{key}.lora_B.weight"] = np.concatenate([pick(pair.lora_B) for pair in pairs])
                if isinstance(pairs[0], DoRAPair):
                    found[f"{key}.lora_magnitude_vector"] = np.concatenate([pick(pair.magnitude) for pair in pairs])
    return found


def numbers(case, prefix):
    return {key.removeprefix(prefix): value for key, value in frozen(case).items() if key.startswith(prefix)}


# What is computed.


@pytest.mark.parametrize("case", CASES)
def test_in_float64_base_attached_and_merged_compute_what_was_frozen(case):
    computes_the_same(case)


@pytest.mark.parametrize("case", CASES)
def test_in_float32_they_do_so_within_a_margin(case):
    computes_the_same(case, "float32", FLOAT32_MARGIN)


def test_every_folder_has_its_expectations_and_there_are_enough_of_them():
    assert len(CASES) == 16 and len(ADAPTED) == 11 and LEARNED == ["all_linear", "c_attn", "dora"]
    assert all(np.abs(frozen(case)["adapted_logits"] - frozen(case)["base_logits"]).max() > 0.01 for case in ADAPTED)


@pytest.mark.parametrize("case", LEARNED)
def test_the_loss_and_the_gradients_are_the_frozen_ones(case):
    """c_attn's A serves three projections: it is one Tensor, and its gradient is the sum of theirs."""
    expected, base = frozen(case), base_of(case)
    adapter = load_adapter(GOLDEN / case / "adapter", base)
    loss = attach(base, adapter).loss(expected["ids"][:, :-1], expected["ids"][:, 1:])
    loss.backward()
    close(loss.data, expected["loss"], 1e-10)
    ours, theirs = in_the_files_form(adapter, lambda t: t.grad), numbers(case, "grad:")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        close(ours[key], theirs[key], 1e-10)
        assert np.abs(theirs[key]).max() > 1e-4


@pytest.mark.parametrize("case, n_tensors", [("c_attn", 4), ("dora", 24)])
def test_twenty_steps_of_adam_follow_the_frozen_ones(case, n_tensors):
    expected, base = frozen(case), base_of(case)
    adapter = load_adapter(GOLDEN / case / "adapter", base)
    start = {key: value.copy() for key, value in in_the_files_form(adapter, lambda t: t.data).items()}
    model, adam = attach(base, adapter), Adam(adapter.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        adam.zero_grad()
        model.loss(expected["ids"][:, :-1], expected["ids"][:, 1:]).backward()
        adam.step()
    ours, theirs = in_the_files_form(adapter, lambda t: t.data), numbers(case, "adamw:")
    assert ours.keys() == theirs.keys() and len(theirs) == n_tensors
    for key in theirs:
        close(ours[key], theirs[key], 1e-9)
        assert np.abs(ours[key] - start[key]).max() > 0.05


# What is written back.


@pytest.mark.parametrize("case", [*ADAPTED, "layers/adapter_pattern"])
def test_an_adapter_is_written_back_to_the_bit_under_the_same_keys(case, tmp_path):
    case, _, name = case.partition("/")
    source, base = GOLDEN / case / (name or "adapter"), base_of(case, "float32")
    adapter = load_adapter(source, base)
    save_adapter(adapter, tmp_path)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, source))
    if case == "bare":  # PEFT on a model without a head; here the names are those of the model with one
        theirs = {key.replace("model.h.", "model.transformer.h."): value for key, value in theirs.items()}
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes(), key
    again = load_adapter(tmp_path, base)
    assert same_adapter(again, adapter)
    for pair in adapter.pairs:
        assert again.pairs[pair].scaling == adapter.pairs[pair].scaling


@pytest.mark.parametrize("case", CASES)
def test_a_base_is_written_back_to_the_bit(case, tmp_path):
    """The same tensors under the same names; what is left out is what says nothing: masks, a copy of the embedding."""
    source = GOLDEN / case / "base"
    half = {"bf16": "bfloat16", "f16": "float16"}.get(case)
    model = base_of(case, "float32")
    save_gpt2(model, tmp_path, like=source, dtype=half)
    raw = lambda files: {name: value for path in files for name, value in raw_tensors(path).items()}
    ours, theirs = raw([tmp_path / "model.safetensors"]), raw(source.glob("*.safetensors"))
    if case in ("old_style", "bare"):
        masks = re.compile(r"h\.\d\.attn\.(masked_)?bias")
        theirs = {f"transformer.{name}": value for name, value in theirs.items() if not masks.fullmatch(name)}
    if case == "equal_head":
        assert theirs.pop("lm_head.weight") == theirs["transformer.wte.weight"]
    assert ours == theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of `untied_conflict` too: what is written no longer contradicts itself
        again = load_model(tmp_path)
    assert bits(again) == bits(model) and again.fingerprint() == model.fingerprint()


def raw_tensors(path):
    """{name: (type, shape, bytes)} of a safetensors file, whatever its types."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8:start])
    entries.pop("__metadata__", None)
    cut = lambda entry: blob[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
    return {name: (entry["dtype"], tuple(entry["shape"]), cut(entry)) for name, entry in entries.items()}


def test_a_head_that_contradicts_the_configuration_is_kept_with_a_warning():
    with pytest.warns(UserWarning, match="lm_head.weight differs.*kept as a head of its own") as seen:
        model = load_gpt2(GOLDEN / "untied_conflict" / "base")
    assert len(seen) == 1
    assert not model.config.tie_word_embeddings
    assert bits(model) == bits(base_of("untied", "float32"))


@pytest.mark.parametrize("load", [load_gpt2, load_model])
def test_the_warning_points_at_who_called(load):
    with pytest.warns(UserWarning) as seen:
        load(GOLDEN / "untied_conflict" / "base")
    assert Path(seen[0].filename).name == Path(__file__).name


@pytest.mark.parametrize("case, shown", [
    ("c_attn", ["4 tensors, all used", "2 x attn.c_attn -> q_proj, k_proj, v_proj: r=2, scaling 2.5", "UNVERIFIED"]),
    ("bare", ["8 tensors", "2 x attn.c_attn -> q_proj, k_proj, v_proj: r=2, scaling 2", "2 x mlp.c_fc -> up_proj"]),
    ("patterns", ["16 tensors", "attn.c_attn -> q_proj, k_proj, v_proj: r=1, scaling 4",
                  "attn.c_attn -> q_proj, k_proj, v_proj: r=5, scaling 3.1305", "attn.c_proj -> o_proj: r=3"]),
    ("layers", ["2 x mlp.c_proj -> down_proj: r=2, scaling 2"]),
])  # fmt: skip
def test_the_receipt_tells_what_went_where(case, shown):
    said = []
    load_adapter(GOLDEN / case / "adapter", base_of(case), say=said.append)
    assert len(said) == 1 and all(text in said[0] for text in shown), said


# The comparison can fail: each planted bug is one that a reader of these files could have, and is seen.


def parts_in_order(*order):
    """Let c_attn be read as if its three parts came in another order."""

    def plant(monkeypatch):
        real = models._layout
        mixed = lambda parts: [parts[i] for i in order] if len(parts) == 3 else parts
        monkeypatch.setattr(models, "_layout", lambda family, model: {
            name: (mixed(parts), turned) for name, (parts, turned) in real(family, model).items()
        })  # fmt: skip

    return plant


def square_not_transposed(monkeypatch):
    real = models._layout
    monkeypatch.setattr(models, "_layout", lambda family, model: {
        name: (parts, turned and "attn.c_proj" not in name) for name, (parts, turned) in real(family, model).items()
    })  # fmt: skip


def reading(monkeypatch, change):
    """Let the reader of bases see what `change(config, tensors)` makes of a file."""
    real = base_files.load_folder

    def load(*arguments, **options):
        config, tensors, metadata = real(*arguments, **options)
        change(config, tensors)
        return config, tensors, metadata

    monkeypatch.setattr(base_files, "load_folder", load)


def unused_tensors(pattern):
    """Let GPT-2's record name other tensors as unused."""

    def plant(monkeypatch):
        changed = replace(GPT2, unused=pattern)
        monkeypatch.setattr(models, "GPT2", changed)
        monkeypatch.setattr(models, "FAMILIES", (changed, *models.FAMILIES[1:]))

    return plant


def last_match_wins(monkeypatch):
    real = lora_config._first_match
    reverse = lambda patterns: dict(reversed(patterns.items()))
    monkeypatch.setattr(lora_config, "_first_match",
                        lambda matcher, patterns, *rest: real(matcher, reverse(patterns), *rest))  # fmt: skip


def alpha_reversed(monkeypatch):
    real = LoRAConfig.alpha_of
    turned = lambda config: replace(config, alpha_pattern=dict(reversed(config.alpha_pattern.items())))
    monkeypatch.setattr(LoRAConfig, "alpha_of", lambda self, name: real(turned(self), name))


def fields_ignored(*fields):
    def plant(monkeypatch):
        real = adapter_file.load_folder

        def load(*arguments):
            config, tensors, metadata = real(*arguments)
            return {key: value for key, value in config.items() if key not in fields}, tensors, metadata

        monkeypatch.setattr(adapter_file, "load_folder", load)

    return plant


def update_in_another_order(monkeypatch):
    real = peft.take_apart
    monkeypatch.setattr(peft, "take_apart", lambda file, A, B, names, columns: dict(
        zip(names, [real(file, A, B, names, columns)[name] for name in reversed(names)], strict=True)
    ))  # fmt: skip


def square_update_transposed(monkeypatch):
    real = peft.take_apart

    def turned(file, A, B, names, columns):
        pieces = real(file, A, B, names, columns)
        return {n: (s, A.T.copy()) if len(B) == A.shape[1] and "attn" in n else (s, b) for n, (s, b) in pieces.items()}

    monkeypatch.setattr(peft, "take_apart", turned)


BUGS = {  # what is wrong: (a case that must notice, how to plant it)
    "attn.c_proj, which is square, not transposed": ("c_attn", square_not_transposed),
    "q, k and v in another order": ("c_attn", parts_in_order(2, 0, 1)),
    "k and v swapped": ("untied", parts_in_order(0, 2, 1)),
    "the update's rows in another order": ("c_attn", update_in_another_order),
    "the update of attn.c_proj transposed": ("exclude", square_update_transposed),
    "the last match of a pattern wins": ("patterns", last_match_wins),
    "alpha_pattern read in reverse": ("patterns", alpha_reversed),
    "alpha_pattern ignored": ("patterns", fields_ignored("alpha_pattern")),
    "rank_pattern ignored": ("patterns", fields_ignored("rank_pattern")),
    "use_rslora ignored": ("patterns", fields_ignored("use_rslora")),
    "layers_to_transform ignored": ("layers", fields_ignored("layers_to_transform")),
    "exclude_modules ignored": ("exclude", fields_ignored("exclude_modules")),
    "alpha instead of alpha / r": ("c_attn", lambda m: m.setattr(LoRAConfig, "scaling_of", LoRAConfig.alpha_of)),
    "a tied head forced": ("untied", lambda m: reading(m, lambda config, tensors: (
        config.update(tie_word_embeddings=True), tensors.pop("lm_head.weight")))),
    "a tied head forced where the two files disagree": ("untied_conflict", lambda m: reading(
        m, lambda config, tensors: tensors.pop("lm_head.weight"))),
    "masks recognised by their last name": ("old_style", unused_tensors(r".*bias")),
    "masks taken for tensors": ("old_style", unused_tensors(r"none")),
    "layer_norm_epsilon ignored": ("inner", lambda m: reading(m, lambda config, _: config.pop("layer_norm_epsilon"))),
    "n_head guessed": ("inner", lambda m: reading(m, lambda config, _: config.update(n_head=2))),
    "n_inner ignored": ("inner", lambda m: reading(m, lambda config, _: config.pop("n_inner"))),
    "a DoRA taken for LoRA": ("dora", lambda m: m.setattr(
        DoRAPair, "beside", lambda pair, linear, dropout: LoRALinear(linear, pair, dropout))),
    "a magnitude that counts for nothing": ("dora", lambda m: m.setattr(
        DoRAPair, "row_norms", lambda pair, weight: pair.magnitude.data)),
    "the norms of W alone": ("dora", lambda m: m.setattr(
        DoRAPair, "row_norms", lambda pair, weight: row_norms(weight))),
    "the lengths of the rows in another order": ("dora", lambda m: m.setattr(
        peft, "DoRAPair", lambda A, B, scaling, m: DoRAPair(A, B, scaling, Tensor(m.data[::-1].copy())))),
    "biases left out": ("c_attn", lambda m: reading(m, lambda config, tensors: tensors.update(
        {n: 0 * t for n, t in tensors.items() if n.endswith("c_attn.bias")}))),
}  # fmt: skip


@pytest.mark.parametrize("case, plant", BUGS.values(), ids=BUGS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", FLOAT32_MARGIN)])
def test_each_planted_bug_is_seen(case, plant, dtype, tolerance, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        computes_the_same(case, dtype, tolerance)
