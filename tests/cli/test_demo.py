"""The demo: what it trains on, what it compares with what, what it keeps, and that no bug can hide in it."""

import os
import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
from strategies import learned

from minilora import lora
from minilora.cli import demo, demo_tables, questions
from minilora.cli.asking import Lines
from minilora.disk import characters
from minilora.disk.folder import UNFINISHED
from minilora.disk.models import load_model
from minilora.disk.peft import load_adapter
from minilora.training.corpus import load_corpus
from minilora.training.loop import Interrupted, train

SIZE = demo.DemoSize(demo._gpt(1, 32), base_steps=3, lora_steps=2)
ALL = {"trained": questions.TRAINED, "unseen": questions.UNSEEN, "never": questions.NEVER_TOLD}
Ran = namedtuple("Ran", "lines text out seen")


def take_less(patch):
    """Fewer questions and a shorter text: everything is there, and a run takes a fraction of a second."""
    corpus = load_corpus()
    short = corpus._replace(train=corpus.train[:5000], heldout=corpus.heldout[:600])
    patch.setattr(demo, "load_corpus", lambda: short)
    for name, few in (("TRAINED", 48), ("UNSEEN", 8), ("NEVER_TOLD", 4)):
        patch.setattr(questions, name, getattr(questions, name)[:few])


@pytest.fixture
def small(monkeypatch):
    take_less(monkeypatch)


def run(out, seed=0, size=SIZE, **options):
    """(the lines a demo printed, all of them as one text)."""
    lines = []
    demo.run(size, out, np, seed, log=lines.append, **options)
    return lines, "\n".join(lines)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """(the folder, what was printed) of a run on these, with the seed 1: to be copied, and to be compared with."""
    with pytest.MonkeyPatch.context() as patch:
        take_less(patch)
        out = tmp_path_factory.mktemp("small")
        _, text = run(out, seed=1)
    return out, text


def in_words(pairs):
    """[(question, answer)] of ids: the lines of a question, and an answer that ends with a newline."""
    texts = [(characters.decode(prompt), characters.decode(answer)) for prompt, answer in pairs]
    assert all(prompt[:3] == "Q: " and prompt[-4:] == "\nA: " and answer[-1] == "\n" for prompt, answer in texts)
    return [(prompt[3:-4], answer[:-1]) for prompt, answer in texts]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One whole run, on all questions and the whole text, and what its parts were given."""
    seen = {}

    def spy(patch, owner, name, of):
        real = getattr(owner, name)

        def spied(*arguments, **options):
            seen.setdefault(name, []).append(of(*arguments, **options))
            return real(*arguments, **options)

        patch.setattr(owner, name, spied)

    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, demo, "random_windows", lambda ids, *more: ids)
        spy(patch, demo, "answer_rows", in_words)
        spy(patch, demo, "consecutive_windows", lambda ids, *more: ids)
        spy(patch, demo, "train", lambda model, adam, batches, steps, **more: (model, adam.params, steps))
        spy(patch, demo_tables, "exact_match", lambda model, pairs: in_words(pairs))
        lines, text = run(out)
    return Ran(lines, text, out, seen)


# --- a whole run -------------------------------------------------------------------------------------------------


def test_the_base_learns_from_the_training_text_and_is_measured_on_the_heldout_text(ran):
    corpus = load_corpus()
    assert [characters.decode(ids) for ids in ran.seen["random_windows"]] == [corpus.train]
    assert [characters.decode(ids) for ids in ran.seen["consecutive_windows"]] == [corpus.heldout] * 2


def test_the_adapter_learns_from_the_trained_phrasings_alone(ran):
    assert ran.seen["answer_rows"] == [questions.TRAINED]


def test_before_and_after_are_scored_on_the_same_three_sets_and_the_merged_on_the_unseen(ran):
    assert ran.seen["exact_match"] == [*ALL.values(), *ALL.values(), questions.UNSEEN]


def test_both_trainings_take_the_steps_they_were_told_and_the_second_moves_A_and_B_alone(ran):
    (base, trained, first), (_, factors, second) = ran.seen["train"]
    assert (first, second) == (SIZE.base_steps, SIZE.lora_steps)
    assert trained == base.parameters()
    adapter = load_adapter(ran.out / demo.ADAPTER, load_model(ran.out / demo.BASE))
    assert len(factors) == len(adapter.parameters())
    assert all(pair.lora_B.data.any() for pair in adapter.pairs.values()), "they did learn"
    assert all(np.array_equal(p.data, q.data) for p, q in zip(factors, adapter.parameters(), strict=True))


def cost(text):
    """{row: (weights, gradients, Adam, activations, together)}, in kB, of the table in `text`."""
    rows = re.findall(r"^ +(full fine-tuning|LoRA on [\w, ]+?) {2,}([\d, ]+)$", text, re.MULTILINE)
    return {name: tuple(int(n.replace(",", "")) for n in numbers.split()) for name, numbers in rows}


def test_the_cost_of_three_ways_to_train_is_what_they_differ_in(ran):
    full, few, every = cost(ran.text).values()
    assert full[0] == full[1] and few[1] < every[1] < full[1]
    assert full[0] < few[0] < every[0]  # an adapter comes on top of the weights
    assert few[3] < every[3]
    for weights, gradients, adam, activations, together in (full, few, every):
        assert abs(adam - 2 * gradients) <= 2 and abs(together - weights - gradients - adam - activations) <= 2


def test_what_is_kept_is_named_with_its_size(ran):
    kilobytes = [f"{(ran.out / file).stat().st_size / 1e3:,.0f} kB" for file in
                 ("security/adapter_model.safetensors", "base/model.safetensors")]  # fmt: skip
    assert f"kept in {ran.out}: the adapter, {kilobytes[0]}, and its base, {kilobytes[1]};" in ran.text
    assert not list(ran.out.rglob(UNFINISHED))


def test_the_answer_is_the_adapted_models_and_the_bases_stands_below_it(ran, monkeypatch):
    adapted = lambda model: any("lora_A" in name for name, _ in model.named_parameters())
    monkeypatch.setattr(Lines, "answer", lambda self, model, prompt: f"{'with' if adapted(model) else 'without'} LoRA")
    lines = []
    demo.ask("  Which port\n does SSH use? ", ran.out, np, log=lines.append)
    assert lines == ["Q: which port does ssh use?", "A: with LoRA", "   (the base alone: without LoRA)"]


def test_the_hint_at_the_end_repeats_the_command(small, tmp_path):
    lines, _ = run(tmp_path, rerun_command="minilora demo --quick --out 'a b'")
    assert lines[-1].strip() == "now ask: minilora demo --quick --out 'a b' --ask 'which port does ssh use?'"


def test_one_seed_gives_one_base_and_one_adapter_and_another_seed_others(small, tmp_path):
    kept = []
    for i, seed in enumerate((3, 3, 4)):
        run(tmp_path / str(i), seed)
        base = load_model(tmp_path / str(i) / "base")
        kept.append((base.fingerprint(), load_adapter(tmp_path / str(i) / "security", base).fingerprint()))
    assert kept[0] == kept[1]
    assert kept[0][0] != kept[2][0] and kept[0][1] != kept[2][1]


# --- planted bugs: each must show in the line that is there to show it ---------------------------------------------


def change_at_attaching(text):
    return float(re.search(r"Largest logit change: (\S+)", text)[1])


def test_an_adapter_that_is_not_invisible_at_first_shows_in_the_third_step(small, small_run, tmp_path, monkeypatch):
    assert change_at_attaching(small_run[1]) == 0
    monkeypatch.setattr(demo, "init_adapter", lambda *arguments: learned(lora.init_adapter(*arguments)))
    assert change_at_attaching(run(tmp_path)[1]) > 0.01


def attach_that_writes(base, adapter):
    """Once: later calls find it written."""
    model = lora.attach(base, adapter)
    base.ln_f.bias.data[...] = np.maximum(base.ln_f.bias.data, 1)
    return model


def merge_that_writes(model):
    model.h[0].attn.q_proj.linear.weight.data[...] += 1
    return lora.merge(model)


def training_that_writes(model, *arguments, **options):
    model.ln_f.bias.data[...] += 1
    return train(model, *arguments, **options)


@pytest.mark.parametrize("where, name, planted", [
    (demo, "attach", attach_that_writes), (demo, "merge", merge_that_writes), (demo, "train", training_that_writes),
], ids=["attach", "merge", "train"])  # fmt: skip
def test_a_base_that_was_written_to_is_not_called_identical(
    small, small_run, tmp_path, monkeypatch, where, name, planted
):  # fmt: skip
    assert re.search(r"sha256 (\w{12}) before and \1 after: bit-identical$", small_run[1], re.MULTILINE)
    monkeypatch.setattr(where, name, planted)
    shas = re.search(r"sha256 (\w{12}) before and (\w{12}) after: NOT IDENTICAL$", run(tmp_path)[1], re.MULTILINE)
    assert shas[1] != shas[2]


# --- what is kept, and what is refused -----------------------------------------------------------------------------


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at, step, kept", [
    ("pretrain", "step 1 of 5", "nothing of this run"), ("save_model", "step 1 of 5", "nothing of this run"),
    ("scores", "step 2 of 5", "{out}/base (the pre-trained model)"),
    ("teach", "step 4 of 5", "{out}/base (the pre-trained model)"),
    ("save_adapter", "step 4 of 5", "{out}/base (the pre-trained model)"),
    ("after_table", "step 5 of 5", "{out}/base (the pre-trained model); {out}/security (the adapter)"),
])
def test_an_interrupted_run_names_what_it_kept_and_an_adapter_of_before_is_not_beside_another_base(
    small, small_run, tmp_path, monkeypatch, at, step, kept
):  # fmt: skip
    shutil.copytree(small_run[0], tmp_path, dirs_exist_ok=True)
    old = load_model(tmp_path / "base").fingerprint()
    monkeypatch.setattr(demo, at, interrupt)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, seed=2)
    assert f"interrupted in {step}" in str(stopped.value)
    assert f"Kept: {kept.format(out=tmp_path)}. No file is half-written." in str(stopped.value)
    base = load_model(tmp_path / "base")
    assert (base.fingerprint() == old) == (kept == "nothing of this run")
    if (tmp_path / "security").exists() and list((tmp_path / "security").iterdir()):
        load_adapter(tmp_path / "security", base)  # it belongs to the base beside it
    if at in ("scores", "teach", "save_adapter"):
        with pytest.raises(FileNotFoundError, match="run the demo first, to its end"):
            demo.ask("which port does ssh use?", tmp_path, np)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "pretrain", lambda *arguments: pytest.fail("it trained"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            run(out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who runs the tests may be allowed everything
    with pytest.raises(PermissionError, match="cannot write to .*another folder with --out"):
        run(tmp_path / "sealed")


@pytest.mark.parametrize(
    "question, complaint", [("", "empty"), (" \n ", "empty"), ("naïve?", "ï"), ("x" * 200, "at most")]
)
def test_a_question_that_cannot_be_asked_is_refused(ran, question, complaint):
    with pytest.raises(ValueError, match=complaint):
        demo.ask(question, ran.out, np, log=lambda line: None)
