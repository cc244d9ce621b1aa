"""Adapters added, compressed and extracted from the command line: what is written, and what is told of the losses."""

import json
import re

import numpy as np
import pytest
from program import everything
from strategies import bits, same_adapter, small_gpt, small_llama, trained_adapter

from minilora import attach, combine, compress, extract, load_adapter, load_model, merge, save_adapter, save_model
from minilora.lora import linear_names
from minilora.quant import quantize

BOTH = ["--base", "base", "--adapter", "one", "two", "--weights"]


def quiet(folder, base):
    return load_adapter(folder, base, say=lambda line: None)


@pytest.fixture
def sources(folder):
    base = load_model(folder / "base")
    return base, quiet(folder / "one", base), quiet(folder / "two", base)


def lines_after(out, start):
    """The lines that begin with `start`, and all behind it."""
    lines = out.splitlines()
    return lines[[line.startswith(start) for line in lines].index(True) :]


# merge


@pytest.mark.parametrize("weights", [["0.7", "-0.3"], ["-1", ".5"], ["-2e-1", "-.25"]], ids=str)
def test_merge_adds_several_adapters_with_their_weights(sources, run, tmp_path, weights):
    base, one, two = sources
    code, out, err = run("merge", *BOTH, *weights, "--out", tmp_path / "m")
    expected = merge(attach(base, combine([one, two], [float(w) for w in weights])))
    assert (code, err) == (0, "") and bits(load_model(tmp_path / "m")) == bits(expected)
    numbers = [float(w) for w in weights]
    sign = lambda w: "-" if w < 0 else "+"
    told = " ".join(f"{sign(w)} {abs(w):g} {name}" for w, name in zip(numbers, ("one", "two"), strict=True))
    assert f"added: {told.removeprefix('+ ')}\n" in out and out.count("recognised") == 2


def test_the_order_of_adapters_and_weights_is_one(sources, run, tmp_path):
    base, one, two = sources
    ask = ["merge", "--base", "base", "--weights", "2", "--adapter", "two", "--adapter", "one", "--weights", "-1"]
    assert run(*ask, "--out", tmp_path / "m")[0] == 0
    assert bits(load_model(tmp_path / "m")) == bits(merge(attach(base, combine([two, one], [2, -1]))))


def test_a_weight_for_one_adapter_scales_it(sources, run, tmp_path):
    base, one, _ = sources
    ask = ["merge", "--base", "base", "--adapter", "one", "--out"]
    assert run(*ask, tmp_path / "half", "--weights", "0.5")[0] == 0
    assert bits(load_model(tmp_path / "half")) == bits(merge(attach(base, combine([one], [0.5]))))


def test_what_a_merge_of_one_adapter_is_refused_for_a_sum_is_refused_for(folder, run, tmp_path):
    code, out, err = run("merge", *BOTH, "1e-5", "-1e-5", "--dtype", "bfloat16", "--out", tmp_path / "m")
    assert code == 1 and "of its update" in err and "allow the rounding" in err and not (tmp_path / "m").exists()


# combine


@pytest.mark.parametrize("more", [[], ["--r", 2]], ids=str)
def test_combine_writes_an_adapter_that_fits_the_base_and_tells_what_is_lost(folder, sources, run, tmp_path, more):
    before = everything(folder)
    base, one, two = sources
    code, out, err = run("combine", *BOTH, "0.7", "-0.3", *more, "--out", tmp_path / "c")
    expected = combine([one, two], [0.7, -0.3])
    assert (code, err) == (0, "") and "added: 0.7 one - 0.3 two: 44 modules of rank 1 to 3\n" in out
    if more:
        expected, errors, _ = compress(expected, 2)
        table = lines_after(out, "compressed: 44 modules of rank 1 to 2")
        assert table[1].split() == ["what", "is", "lost", "of", "an", "update", "n", "mean", "worst"]
        for kind in ("attn.q_proj", "mlp.up_proj", "attn.v_proj", "mlp.down_proj"):
            lost = [100 * error.relative for name, error in errors.items() if name.endswith(kind)]
            [line] = [line for line in table if f"h.*.{kind} " in line]
            assert line.split()[1:] == ["11", f"{np.mean(lost):.3g}", "%", f"{max(lost):.3g}", "%"]
    written = quiet(tmp_path / "c", base)
    assert bits(written) == bits(expected) and written.config == expected.config
    assert written.base_fingerprint == base.fingerprint()
    assert f"kept in {tmp_path / 'c'}: an adapter, " in out and everything(folder) == before
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def whole_changes(adapter):
    return {name: pair.delta() for name, pair in adapter.astype("float64").pairs.items()}


def lost_of_all(out):
    return float(re.search(r"in all, (\S+) % of what changed is lost", out)[1])


def test_the_share_that_is_lost_of_all_is_that_of_all_weights_together(sources, run, tmp_path):
    base, one, two = sources
    both = combine([one, two], [1, 1])
    out = run("combine", *BOTH, "1", "1", "--r", 1, "--out", tmp_path / "c")[1]
    full, small = whole_changes(both), whole_changes(compress(both, 1).adapter)
    lost = np.sqrt(sum(((full[name] - small[name]) ** 2).sum() for name in full))
    whole = np.sqrt(sum((full[name] ** 2).sum() for name in full))
    assert np.isclose(lost_of_all(out), 100 * lost / whole, rtol=5e-3)


def test_combine_with_one_adapter_compresses_it(sources, run, tmp_path):
    base, _, two = sources
    code, out, _ = run("combine", "--base", "base", "--adapter", "two", "--r", 1, "--out", tmp_path / "c")
    assert code == 0 and "added: 1 two: 22 modules of rank 1 to 3\n" in out
    written = quiet(tmp_path / "c", base)
    for name, delta in whole_changes(compress(two, 1).adapter).items():
        assert np.allclose(whole_changes(written)[name], delta, atol=1e-6)


def test_adapters_of_one_base_in_several_precisions_are_added_if_asked_for(folder, sources, run, tmp_path):
    base, one, _ = sources
    on_nf4 = trained_adapter(quantize(base, "nf4"), 4)
    save_adapter(on_nf4, tmp_path / "q")
    ask = ["combine", "--base", "base", "--adapter", "one", tmp_path / "q", "--weights", 1, 1, "--out", tmp_path / "c"]
    code, _, err = run(*ask)
    assert code == 1 and "in another precision" in err and not (tmp_path / "c").exists()
    assert run(*ask, "--accept-base", "other-precision")[0] == 0
    assert quiet(tmp_path / "c", base).base_fingerprint is None


# extract


def test_extract_writes_the_adapter_between_two_models(folder, sources, run, tmp_path):
    base, one, two = sources
    assert run("merge", *BOTH, "1", "-1", "--out", tmp_path / "m")[0] == 0
    before = everything(folder)
    ask = ["extract", "--base", "base", "--tuned", tmp_path / "m", "--r", 3, "--out"]
    code, out, err = run(*ask, tmp_path / "e")
    assert (code, err) == (0, "") and "extracted: 44 modules of rank 3, of 66 targeted\n" in out
    assert "left out" not in out and lost_of_all(out) < 1e-3 and everything(folder) == before
    written = quiet(tmp_path / "e", base)
    tuned = load_model(tmp_path / "m")
    assert bits(written) == bits(extract(base, tuned, 3).adapter)
    again = merge(attach(base, written))
    for (_, p), (_, q) in zip(again.named_parameters(), tuned.named_parameters(), strict=True):
        assert np.allclose(p.data, q.data, rtol=0, atol=1e-6)


def test_extract_names_what_it_leaves_out(sources, run, tmp_path):
    base, one, _ = sources
    tuned = merge(attach(base, one)).trainable_copy()
    state = dict(tuned.named_parameters())
    for i in range(11):
        state[f"h.{i}.ln_1.weight"].data *= 1 + (i + 1) / 100
        state[f"h.{i}.attn.q_proj.bias"].data += 1
    state["ln_f.bias"].data += 1
    save_model(tuned, tmp_path / "m")
    code, out, err = run("extract", "--base", "base", "--tuned", tmp_path / "m", "--r", 2, "--target", "q_proj,o_proj",
                         "--out", tmp_path / "e")  # fmt: skip
    assert (code, err) == (0, "") and "extracted: 11 modules of rank 2, of 22 targeted\n" in out
    table = lines_after(out, "left out: 34 tensors changed that no pair holds")
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert rows["h.*.ln_1.weight"] == ["11", "6", "%", "11", "%"]
    assert rows["ln_f.bias"] == ["1", "from", "zero", "from", "zero"]
    assert "h.*.mlp.up_proj.weight" in rows and rows["h.*.attn.q_proj.bias"][0] == "11"
    moved = load_model(tmp_path / "m")
    adapter, errors, left_out = extract(base, moved, 2, ["q_proj", "o_proj"])
    lost = sum(x.absolute**2 for x in (*errors.values(), *left_out.values()))
    after = moved.state_dict()
    whole = sum(((after[name].astype(float) - p.data) ** 2).sum() for name, p in base.named_parameters())
    assert np.isclose(lost_of_all(out), 100 * np.sqrt(lost / whole), rtol=5e-3)
    assert same_adapter(quiet(tmp_path / "e", base), adapter)


@pytest.mark.parametrize("base, target, expected", [
    (small_gpt(), "c_attn", ["q_proj", "k_proj", "v_proj"]), (small_gpt(), "q_proj", ["q_proj"]),
    (small_gpt(), "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    (small_llama(), "gate_proj", ["gate_proj"]),
], ids=str)  # fmt: skip
def test_targets_go_by_the_names_of_files_and_by_ours(run, tmp_path, base, target, expected):
    tuned = base.trainable_copy()
    modules = dict(tuned.named_modules())
    for name in linear_names(tuned):
        modules[name].weight.data[0] += 1
    for name, model in (("b", base), ("m", tuned)):
        save_model(model, tmp_path / name)
    ask = ["extract", "--base", tmp_path / "b", "--tuned", tmp_path / "m", "--r", 1, "--target", target, "--out"]
    assert run(*ask, tmp_path / "e")[0] == 0
    written = quiet(tmp_path / "e", load_model(tmp_path / "b"))
    assert {name.rpartition(".")[2] for name in written.pairs} == set(expected)
    assert len(written.pairs) == 2 * len(expected)


def test_models_of_other_shapes_and_names_of_no_module_are_refused_and_leave_no_trace(run, tmp_path):
    save_model(small_gpt(), tmp_path / "b")
    for name, model, says in (("wide", small_gpt(n_embd=12), "wte.weight is ((11, 12), 'float32'), not ((11, 8)"),
                              ("llama", small_llama(), "not of the base's shape"),
                              ("heads", small_gpt(1, n_head=4), "n_head 2 and 4")):  # fmt: skip
        save_model(model, tmp_path / name)
        ask = ["extract", "--base", tmp_path / "b", "--tuned", tmp_path / name, "--r", 1, "--out", tmp_path / "e"]
        code, out, err = run(*ask)
        assert (code, out) == (1, "") and says in err and err.count("\n") == 1 and not (tmp_path / "e").exists()
    code, _, err = run("extract", "--base", tmp_path / "b", "--tuned", tmp_path / "b", "--r", 1, "--target", "nothing",
                       "--out", tmp_path / "e")  # fmt: skip
    assert code == 1 and "['nothing'] match no Linear layer" in err and "by minilora's names" in err


def test_the_layers_are_counted_on_a_bar(sources, run, tmp_path, monkeypatch):
    from minilora.cli import commands

    ticks = []

    class Bar:
        def __init__(self, **how):
            ticks.append((how["total"], how["leave"], how["delay"] >= 1))

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        update = lambda self: ticks.append("layer")

    base, one, _ = sources
    save_model(merge(attach(base, one)), tmp_path / "m")
    monkeypatch.setattr(commands, "tqdm", Bar)
    ask = ["extract", "--base", "base", "--tuned", tmp_path / "m", "--r", 1, "--target", "q_proj", "--out"]
    assert run(*ask, tmp_path / "e")[0] == 0
    assert ticks == [(11, False, True), *["layer"] * 11]
