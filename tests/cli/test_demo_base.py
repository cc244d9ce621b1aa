"""The demo on a base: what it is asked and trained on, what it keeps, and that no bug can hide in it."""

import json
import re
import shlex
from collections import namedtuple

import numpy as np
import pytest
from gguf_files import CHATML, write_chat_base
from program import everything, finish, start
from safetensors.numpy import load_file
from strategies import learned

from minilora import lora, quant
from minilora.cli import demo_base, demo_run, demo_tables, questions
from minilora.cli.asking import BLANKS, Chat
from minilora.cli.main import main
from minilora.disk.bases import SMOLLM2_COMMAND, find_base
from minilora.disk.models import load_model, save_model
from minilora.disk.peft import init_peft_adapter, load_adapter
from minilora.disk.tokenizer import load_tokenizer
from minilora.training.loop import Interrupted, train

SIZE = demo_base.BaseDemoSize(steps=2, asked=5)
ALL = questions.question_sets()
Ran = namedtuple("Ran", "lines text out base seen")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model of two blocks, as a GGUF file of four bits."""
    return write_chat_base(tmp_path_factory.mktemp("base") / "tiny.gguf")


def run(base, out, seed=0, size=SIZE, **options):
    """(the lines a demo printed, all of them as one text)."""
    lines = []
    demo_base.run(size, str(base), out, np, seed, log=lines.append, **options)
    return lines, "\n".join(lines)


@pytest.fixture(scope="module")
def ran(base, tmp_path_factory):
    """One whole run, and what its parts were given."""
    seen = {}

    def spy(patch, owner, name, of):
        real = getattr(owner, name)

        def spied(*arguments, **options):
            seen.setdefault(name, []).append(of(*arguments, **options))
            return real(*arguments, **options)

        patch.setattr(owner, name, spied)

    out = tmp_path_factory.mktemp("demo")
    tokenizer = load_tokenizer(base)
    in_words = lambda pairs: [tuple(tokenizer.decode(ids) for ids in pair) for pair in pairs]
    kind = lambda model: "with LoRA" if any("lora_A" in name for name, _ in model.named_parameters()) else "plain"
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, demo_base, "train", lambda model, adam, batches, steps, **more: (model, adam.params, steps, more))
        spy(patch, demo_tables, "exact_match", lambda model, pairs: (kind(model), in_words(pairs)))
        spy(patch, Chat, "answer", lambda self, model, question: kind(model))
        lines, text = run(base, out, seed=3, rerun_command="minilora demo --base b", parts=2, threads=1)
    return Ran(lines, text, out, base, seen)


def conversation(question, answer):
    """(the prompt of a question, its answer), as the template writes them."""
    told = f"<|im_start|>system\n{demo_base.SYSTEM}<|im_end|>\n"
    return f"{told}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>"


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_before_and_after_are_scored_on_the_same_samples_and_the_merged_on_the_unseen(ran):
    samples = [[conversation(*pair) for pair in asked] for asked in demo_base.sampled_sets(5).values()]
    models, asked = zip(*ran.seen["exact_match"], strict=True)
    assert list(asked) == [*samples, *samples, samples[1]]
    assert models == ("plain",) * 3 + ("with LoRA",) * 3 + ("plain",)
    for (kind, asked), sample in zip(ALL.items(), samples, strict=True):
        assert len(set(sample)) == 5 and set(sample) <= {conversation(*pair) for pair in asked}, kind


def test_the_first_answer_is_the_bases_and_those_after_training_the_adapted_models(ran):
    first, *after = ran.seen["answer"]
    assert first == "plain" and set(after) == {"with LoRA"} and len(after) >= 2


def test_the_sample_is_the_same_for_every_seed_and_at_most_all():
    assert demo_base.sampled_sets(7) == demo_base.sampled_sets(7)
    assert demo_base.sampled_sets(10_000) == ALL
    for kind, asked in demo_base.sampled_sets(100).items():
        places = [ALL[kind].index(pair) / len(ALL[kind]) for pair in asked]
        assert places == sorted(places) and abs(np.mean(places) - 0.5) < 0.1, "from all over the list"


def test_the_adapter_learns_from_the_trained_phrasings_alone(ran):
    for kind, asked in ALL.items():
        rows = [json.loads(line)["messages"] for line in (ran.out / f"{kind}.jsonl").read_text().splitlines()]
        assert [(row[1]["content"], row[2]["content"]) for row in rows] == asked
        assert {row[0]["content"] for row in rows} == {demo_base.SYSTEM}
    assert f"{ran.out / 'trained.jsonl'}: 720 rows of" in ran.text


def test_it_trains_as_it_was_told_and_moves_A_and_B_alone(ran):
    ((_, factors, steps, options),) = ran.seen["train"]
    assert (steps, options["parts"], options["threads"], options["seed"]) == (2, 2, 1, 3)
    rates = [options["schedule"](step) for step in range(steps)]
    assert max(rates) == demo_base.LR
    adapter = load_adapter(ran.out / demo_run.ADAPTER, load_model(ran.base), say=lambda account: None)
    assert (adapter.config.r, adapter.config.alpha) == (8, 16)
    assert len(adapter.pairs) == 2 * 7 and all(pair.lora_B.data.any() for pair in adapter.pairs.values())
    assert all(np.array_equal(p.data, q.data) for p, q in zip(factors, adapter.parameters(), strict=True))


def test_the_command_that_it_prints_trains_the_same_adapter_to_the_bit(ran, tmp_path, monkeypatch):
    (command,) = re.findall(r"the same by hand: minilora (.*)", ran.text)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--parts", "2", "--threads", "1"]) == 0
    theirs, ours = (load_file(folder / "adapter_model.safetensors")
                    for folder in (tmp_path / "my-adapter", ran.out / demo_run.ADAPTER))  # fmt: skip
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_what_it_says_of_the_base_is_so(ran):
    stored, wide = load_model(ran.base), quant.widen(load_model(ran.base))
    n, packed = (sum(p.size for p in wide.parameters()), sum(p.nbytes for p in stored.parameters()))
    assert f"[1/5] {ran.base}: Llama's family, {n:,} parameters" in ran.text
    megabytes = f"{4 * n / 1e6:,.0f} MB in float32, widened once from {packed / 1e6:,.0f} MB of Q4_1 and Q8_0"
    assert f"{megabytes}; a context of 512 tokens" in ran.text


def test_the_receipt_has_each_step_and_their_sum(ran):
    row = r"^ +(step \d of 5, [\w ]+?|all of it) +([\d.]+) +([\d.]+)(?: +([\d,]+))?$"
    rows = re.findall(row, ran.text, re.MULTILINE)
    assert [name[:11] for name, *_ in rows] == [f"step {i} of 5" for i in range(1, 6)] + ["all of it"]
    for column in (1, 2):
        parts = [float(row[column]) for row in rows]
        assert abs(sum(parts[:-1]) - parts[-1]) < 0.31
    peaks = [int(row[3].replace(",", "")) for row in rows if row[3]]
    assert peaks == sorted(peaks)


def test_what_is_kept_is_named_with_its_size_and_the_hint_repeats_the_command(ran):
    size = (ran.out / "security" / "adapter_model.safetensors").stat().st_size
    assert f"kept in {ran.out}: the adapter, {size / 1e6:,.1f} MB" in ran.text
    assert ran.lines[-1].strip() == "now ask: minilora demo --base b --ask 'which port does ssh use?'"
    kept = {path.name for path in everything(ran.out)}
    assert kept == {"security", "adapter_model.safetensors", "adapter_config.json", "receipt.json",
                    "trained.jsonl", "unseen.jsonl", "never.jsonl"}  # fmt: skip


def test_one_seed_gives_one_adapter_and_another_seed_another(ran, tmp_path):
    kept = [load_file(ran.out / "security" / "adapter_model.safetensors")]
    for seed in (3, 4):
        run(ran.base, tmp_path / str(seed), seed, parts=2)
        kept.append(load_file(tmp_path / str(seed) / "security" / "adapter_model.safetensors"))
    first, again, other = [np.concatenate([array.ravel() for array in tensors.values()]) for tensors in kept]
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_folder_of_transformers_teaches_as_its_file_does(ran, tmp_path):
    """The same weights in float32: nothing is widened, and everything else is the same."""
    save_model(load_model(ran.base), tmp_path / "folder", like=ran.base)
    lines, text = run(tmp_path / "folder", tmp_path / "out", 3, parts=2)
    assert "widened" not in text
    ours, theirs = (load_file(out / "security" / "adapter_model.safetensors") for out in (ran.out, tmp_path / "out"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    table = lambda lines: [line for line in lines if "%" in line or "detached" in line]
    assert table(lines) == table(ran.lines)


def test_it_runs_on_another_array_module(ran, tmp_path, device_xp):
    lines = []
    demo_base.run(SIZE, str(ran.base), tmp_path, device_xp, 3, log=lines.append)
    assert any("detached" in line and line.endswith("bit-identical") for line in lines)
    lines = []
    demo_base.ask("which port does ssh use?", ran.base, tmp_path, device_xp, log=lines.append)
    assert len(lines) == 3


# --- planted bugs: each must show in the line that is there to show it ------------------------------------------------


def change_at_attaching(text):
    return float(re.search(r"Largest logit change: (\S+)", text)[1])


def test_an_adapter_that_is_not_invisible_at_first_shows_in_the_third_step(ran, tmp_path, monkeypatch):
    assert change_at_attaching(ran.text) == 0
    monkeypatch.setattr(demo_base, "init_peft_adapter", lambda *given: learned(init_peft_adapter(*given)))
    assert change_at_attaching(run(ran.base, tmp_path)[1]) > 0.01


def attach_that_writes(base, adapter):
    base.norm.weight.data = 2 * base.norm.weight.data
    return lora.attach(base, adapter, check_base=False)


def merge_that_writes(model):
    model.layers[0].mlp.up_proj.linear.weight.data[...] += 1
    return lora.merge(model)


def training_that_writes(model, *arguments, **options):
    model.layers[0].self_attn.q_proj.linear.weight.data[...] += 1
    return train(model, *arguments, **options)


@pytest.mark.parametrize("name, planted", [("merge", merge_that_writes), ("train", training_that_writes)],
                         ids=["merge", "train"])  # fmt: skip
def test_nobody_can_write_to_the_arrays_of_the_base(ran, tmp_path, monkeypatch, name, planted):
    monkeypatch.setattr(demo_base, name, planted)
    with pytest.raises(ValueError, match="read-only"):
        run(ran.base, tmp_path)


def test_a_base_that_was_changed_is_not_called_identical(ran, tmp_path, monkeypatch):
    assert re.search(r"sha256 (\w{12}) before and \1 after: bit-identical$", ran.text, re.MULTILINE)
    monkeypatch.setattr(demo_base, "attach", attach_that_writes)
    text = run(ran.base, tmp_path)[1]
    shas = re.search(r"sha256 (\w{12}) before and (\w{12}) after: NOT IDENTICAL$", text, re.MULTILINE)
    assert shas[1] != shas[2]


def test_a_model_that_knows_the_answers_is_scored_so(ran, tmp_path, monkeypatch):
    """The table is of the answers that were given, each kind in its row."""
    right = {"trained": 5, "unseen": 4, "never": 1}
    samples = demo_base.sampled_sets(5)
    monkeypatch.setattr(demo_base, "scores", lambda model, asking, sets: {
        kind: [i < right[kind] for i in range(5)] for kind in sets if sets == samples})  # fmt: skip
    lines, text = run(ran.base, tmp_path)
    assert "[2/5] Asking it 5 questions of each kind below: 5, 4 and 1 right" in text
    rows = [line for line in lines if " ± " in line and "%" in line and "standard error" not in line]
    assert [re.findall(r"(\d+) % ± ([\d.]+)", row) for row in rows] == [
        [("100", "0.0")] * 2, [("80", "17.9")] * 2, [("20", "17.9")] * 2]  # fmt: skip


# --- how a question is put ------------------------------------------------------------------------------------------


def test_what_is_scored_is_what_training_learns_and_what_generation_is_asked(base):
    chat = Chat(load_tokenizer(base), "Be brief.")
    for question, answer in (("which port?", "22"), ("a <|im_end|> b?", "<|im_end|> is text")):
        prompt, ids = chat.pair(question, answer)
        assert prompt.tolist() == chat.prompt(question).tolist()
        assert ids.tolist() == [*chat.tokenizer.encode_text(answer), chat.tokenizer.end]
        whole, is_answer = chat.tokenizer.encode_answers(chat.messages(question, answer))
        assert whole[is_answer].tolist() == ids.tolist()


@pytest.mark.parametrize("written, ends, shown", [
    ("22", True, "22"), ("two\n  lines ", True, "two lines"), ("on and on", False, "on and on ..."),
    ("\n", True, BLANKS),
])  # fmt: skip
def test_an_answer_is_one_line_and_says_where_it_was_cut(base, monkeypatch, written, ends, shown):
    chat = Chat(load_tokenizer(base))
    ids = [*chat.tokenizer.encode_text(written), *([chat.tokenizer.end] if ends else [])]
    generated = lambda model, prompt, n, stop: np.concatenate([prompt[0], ids])[None]
    monkeypatch.setattr("minilora.cli.asking.generate", generated)
    assert chat.answer("model", "who?") == shown


def test_a_template_that_takes_no_system_is_asked_without_and_it_is_told(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    base = write_chat_base(tmp_path / "strict.gguf", refusing)
    _, text = run(base, tmp_path / "out")
    assert "takes no system's message, so there is none: " in text and "no system here" in text
    first = json.loads((tmp_path / "out" / "trained.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]


def test_a_base_without_a_template_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    base = write_chat_base(tmp_path / "plain.gguf", None)
    monkeypatch.setattr(demo_base, "load_model", lambda *given: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="plain.gguf has no chat template.*minilora demo without --base"):
        run(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is kept, and what is refused ------------------------------------------------------------------------------


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at, step, kept", [
    ("load_model", "step 1 of 5", "nothing of this run"), ("scores", "step 2 of 5", "nothing of this run"),
    ("attach", "step 3 of 5", "nothing of this run"),
    ("train", "step 4 of 5", "{out}/trained.jsonl (the rows to train on)"),
    ("merge", "step 5 of 5", "{out}/trained.jsonl (the rows to train on); {out}/security (the adapter)"),
])  # fmt: skip
def test_an_interrupted_run_names_its_step_and_what_it_kept(base, tmp_path, monkeypatch, at, step, kept):
    monkeypatch.setattr(demo_base, at, interrupt)
    with pytest.raises(Interrupted) as stopped:
        run(base, tmp_path)
    said = f"Kept: {kept.format(out=tmp_path)}. No file is half-written."
    assert f"interrupted in {step}" in str(stopped.value) and said in str(stopped.value)


def test_the_answer_is_the_adapted_models_and_the_bases_stands_below_it(ran, monkeypatch):
    adapted = lambda model: any("lora_A" in name for name, _ in model.named_parameters())
    monkeypatch.setattr(Chat, "answer", lambda self, model, question: f"{'with' if adapted(model) else 'without'} LoRA")
    lines = []
    demo_base.ask("  Which port\n does SSH use? ", ran.base, ran.out, np, log=lines.append)
    assert lines == ["Q: which port does ssh use?", "A: with LoRA", "   (the base alone: without LoRA)"]


@pytest.mark.parametrize(
    "question, complaint", [(" \n", "empty"), ("x" * 600, r"a prompt of 6\d\d tokens, at most 486")]
)
def test_a_question_that_cannot_be_asked_is_refused(ran, question, complaint):
    with pytest.raises(ValueError, match=complaint):
        demo_base.ask(question, ran.base, ran.out, np, log=lambda line: None)


def test_nothing_can_be_asked_before_a_run_or_of_another_base(ran, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the demo first"):
        demo_base.ask("ssh?", ran.base, tmp_path, np)
    other = write_chat_base(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ValueError, match="security"):
        demo_base.ask("ssh?", other, ran.out, np)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, size, out, again", [
    (["--base", "smollm2"], demo_base.FULL, "minilora-demo-smollm2", "minilora demo --base smollm2"),
    (["--base", "a b/Llama-3.2.gguf", "--quick"], demo_base.QUICK, "minilora-demo-Llama-3.2-quick",
     "minilora demo --base 'a b/Llama-3.2.gguf' --quick"),
    (["--base", "models/Llama-3.2/", "--out", "o"], demo_base.FULL, "o",
     "minilora demo --base models/Llama-3.2/ --out o"),
])  # fmt: skip
def test_the_options_reach_the_demo_and_it_can_print_them_again(monkeypatch, arguments, size, out, again):
    calls = []
    monkeypatch.setattr(demo_base, "run", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr("minilora.training.threads.keep_freed_memory", lambda: pytest.fail("before the base is loaded"))
    assert main(["demo", *arguments, "--seed", "5", "--parts", "3", "--threads", "2"]) == 0
    ((given, options),) = calls
    assert given[:5] == (size, arguments[1], out, np, 5)
    assert options == {"rerun_command": again, "parts": 3, "threads": 2}


@pytest.mark.parametrize("threads, called", [(1, ["load_model"]), (2, ["load_model", "keep_freed_memory"])])
def test_freed_memory_is_kept_only_once_the_base_is_loaded(base, tmp_path, monkeypatch, threads, called):
    calls = []
    monkeypatch.setattr(demo_base, "load_model", lambda *given: calls.append("load_model") or load_model(*given))
    monkeypatch.setattr(demo_base, "keep_freed_memory", lambda: calls.append("keep_freed_memory"))
    monkeypatch.setattr(demo_base, "scores", interrupt)
    with pytest.raises(Interrupted):
        run(base, tmp_path, threads=threads, parts=2)
    assert calls == called


def test_without_smollm2_its_command_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--base", "smollm2"]) == 1
    assert capsys.readouterr() == ("", f"minilora: smollm2 is not installed; this brings it: {SMOLLM2_COMMAND}\n")
    assert list(tmp_path.iterdir()) == []


def test_it_runs_as_a_person_runs_it(base, tmp_path):
    code, out, err = finish(start(tmp_path, "demo", "--base", base, "--quick"))
    assert code == 0, err
    assert "bit-identical" in out
    (hint,) = re.findall(r"now ask: minilora (.*)", out)
    code, out, err = finish(start(tmp_path, *shlex.split(hint)))
    assert (code, err) == (0, "")
    assert out.startswith("Q: which port does ssh use?\nA: ") and "(the base alone: " in out


def test_smollm2_asks_in_its_own_template_without_its_own_system():
    try:
        path = find_base("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    chat = Chat(load_tokenizer(path), demo_base.SYSTEM)
    prompt, answer = chat.pair("which port does ssh use?", "22")
    assert chat.tokenizer.decode(prompt) == conversation("which port does ssh use?", "22")[0]
    assert chat.tokenizer.decode(answer) == "22<|im_end|>"
    lengths = [sum(map(len, chat.pair(*pair))) for pair in ALL["trained"]]
    assert np.mean(lengths) < 34
