"""The commands on folders: each number they print is computed here another way; what they refuse leaves no trace."""

import io
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from gguf_files import write_sentencepiece_base
from program import GOLDEN, PAIRS, TEXT, everything, finish, start
from safetensors.numpy import load_file, save_file
from strategies import bits, small_gpt, small_llama, trained_adapter

from minilora import (
    attach,
    generate,
    load_adapter,
    load_model,
    merge,
    parameter_report,
    save_adapter,
    save_model,
    stack,
)
from minilora.cli import comparison, generation
from minilora.disk.characters import decode, encode
from minilora.disk.tensor_file import rounded
from minilora.disk.tokenizer import load_tokenizer
from minilora.lora import LoRALinear
from minilora.quant import quantize, relative_error, stored_as, widen

RECEIPT = re.compile(r"(.*: \d+ tensors, all used\n(  \d+ x .*\n)+  base: .*\n)*")


def parts(folder, *adapters):
    """The base, and the base with each of the adapters."""
    base = load_model(folder / "base")
    return base, *(attach(base, load_adapter(folder / name, base, say=lambda _: None)) for name in adapters)


# generate


def continued(model, prompt, n, **how):
    return decode(generate(model, encode(prompt)[None], n, stop=0, **how)[0]).split("\n")[0] + "\n"


@pytest.mark.parametrize("flags", [["--adapter", "one", "two"], ["--adapter", "one", "--adapter", "two"]], ids=str)
def test_generate_says_what_the_library_generates(folder, run, flags):
    """Attached, merged and stacked differ by 3e-5 in a logit at most; no token is chosen by less than 0.01."""
    base, one, two = parts(folder, "one", "two")
    texts = [continued(model, "The ", 12) for model in (base, one, two)]
    assert len(set(texts)) == 3
    ask = ["generate", "--base", "base", "--prompt", "The ", "--max-new-tokens", 12]
    assert run(*ask) == (0, texts[0], "")
    for name, text in zip(("one", "two"), texts[1:], strict=True):
        code, out, err = run(*ask, "--adapter", name)
        assert (code, out) == (0, text) and err.startswith(f"{name}: ") and RECEIPT.fullmatch(err)
    code, out, err = run(*ask, *flags)
    assert (code, out) == (0, f"--- one\n{texts[1]}--- two\n{texts[2]}")
    assert RECEIPT.fullmatch(err) and err.count("recognised") == 2
    assert run(*ask, "--adapter", "two", "one")[1] == f"--- two\n{texts[2]}--- one\n{texts[1]}"


def test_generate_draws_from_the_seed(folder, run):
    base, = parts(folder)
    ask = ["generate", "--base", "base", "--prompt", "The ", "--temperature", 1.5, "--top-k", 9, "--max-new-tokens", 20]
    said = {seed: run(*ask, "--seed", seed)[1] for seed in (3, 4)}
    for seed, text in said.items():
        assert text == continued(base, "The ", 20, temperature=1.5, top_k=9, rng=np.random.default_rng(seed))
    assert said[3] != said[4]


@pytest.fixture
def says(monkeypatch):
    """Lets `generate` draw given columns of tokens: says([5, 6], [7, 0]) for two rows.

    It returns a list with the model that was asked, once for each column.
    """
    calls = []

    def says(*columns):
        def spoken(model, ids, n, **how):
            for column in columns:
                calls.append(model)
                yield np.array(column)

        monkeypatch.setattr(generation, "generate_tokens", spoken)
        return calls

    return says


HI = ["generate", "--base", "base", "--prompt", "Hi", "--max-new-tokens", 4]


def test_generate_ends_a_text_where_the_model_does_and_counts_on_a_bar(run, says, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **how):
            shown.append((how["total"], how["leave"], how["delay"] >= 1))  # what takes less than a second shows none

        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None
        update = lambda self: shown.append("token")

    says([5], [6], [0], [7])
    monkeypatch.setattr(generation, "tqdm", Bar)
    assert run(*HI) == (0, "Hi$%\n", "")
    assert shown == [(4, False, True), *["token"] * 3]


def test_generate_ends_a_text_before_a_stop_that_reaches_over_tokens(run, says):
    columns = [[character] for character in encode("one, two and")]
    asked = says(*columns)
    assert run(*HI, "--stop", "two") == (0, "Hione, \n", "")
    assert len(asked) == len("one, two"), "nothing is computed that nobody will see"
    assert run(*HI, "--stop", "no", "--stop", "ne, t") == (0, "Hio\n", "")
    assert run(*HI, "--stop", "two and more") == (0, "Hione, two and\n", "")


def test_generate_goes_on_until_every_text_has_ended(run, says):
    says(*encode("axb").reshape(3, 1).repeat(2, axis=1), [0, 5], [7, 6], [7, 0], [7, 7])
    out = run(*HI, "--temperature", 1, "--num-samples", 2)[1]
    assert out == "--- 1\nHiaxb\n--- 2\nHiaxb$%\n"


def test_samples_are_drawn_in_one_batch_and_come_under_headings(folder, run):
    base, one, two = parts(folder, "one", "two")
    ask = ["generate", "--base", "base", "--prompt", "The ", "--temperature", 1.5, "--max-new-tokens", 12,
           "--num-samples", 3, "--seed", 5]  # fmt: skip

    def expected(model, rows):
        rows = generate(model, np.tile(encode("The "), (rows, 1)), 12, stop=0, temperature=1.5,
                        rng=np.random.default_rng(5))  # fmt: skip
        return [decode(row).split("\n")[0] for row in rows]

    texts = expected(base, 3)
    assert len(set(texts)) == 3
    assert run(*ask) == (0, "".join(f"--- {i}\n{text}\n" for i, text in enumerate(texts, 1)), "")
    out = run(*ask, "--adapter", "one")[1]
    assert out == "".join(f"--- {i}\n{text}\n" for i, text in enumerate(expected(one, 3), 1))
    both = attach(base, stack([load_adapter(folder / name, base, say=lambda _: None) for name in
                               ("one", "one", "one", "two", "two", "two")]))  # fmt: skip
    headings = [f"--- {name}, {i}" for name in ("one", "two") for i in (1, 2, 3)]
    out = run(*ask, "--adapter", "one", "two")[1]
    assert out == "".join(f"{heading}\n{text}\n" for heading, text in zip(headings, expected(both, 6), strict=True))


def test_generate_draws_from_the_nucleus(folder, run):
    base, = parts(folder)
    ask = ["generate", "--base", "base", "--prompt", "The ", "--temperature", 1.5, "--max-new-tokens", 20]
    text = run(*ask, "--top-p", 0.3)[1]
    assert text == continued(base, "The ", 20, temperature=1.5, top_p=0.3, rng=np.random.default_rng(0))
    assert text != run(*ask)[1]


def test_a_prompt_is_read_from_the_standard_input(run, monkeypatch):
    ask = ["generate", "--base", "base", "--max-new-tokens", 3, "--prompt"]
    for typed, prompt in ((b"The cat\n", "The cat"), (b"a\nb\n\n", "a\nb\n"), (b"x", "x"), (b"the\r\n", "the")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        assert run(*ask, "-") == run(*ask, prompt)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert run(*ask, "-") == (1, "", "minilora: the standard input is not UTF-8: byte 3 is 0xff\n")


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_loaded(folder, run, monkeypatch):
    def load(*given):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(generation, "load_model", load)
    code, out, err = run("generate", "--base", "base", "--prompt", "x" * 50)
    assert (code, out) == (1, "") and "has 50 tokens: with 40 new ones they outgrow the model's context of 48" in err
    assert "--cut-prompt" in err
    code, out, err = run("generate", "--base", "base", "--prompt", "x", "--max-new-tokens", 48, "--cut-prompt")
    assert (code, out) == (1, "") and "48 new tokens leave no room for a prompt" in err


def test_of_a_prompt_that_is_too_long_the_end_may_be_kept(folder, run):
    base, = parts(folder)
    prompt = "The quick brown fox jumps over the lazy dog, and t"
    assert continued(base, prompt[:40], 8)[40:] != continued(base, prompt[10:], 8)[40:]
    ask = ["generate", "--base", "base", "--max-new-tokens", 8, "--cut-prompt", "--prompt"]
    code, out, err = run(*ask, prompt)
    assert code == 0 and out == prompt[:10] + continued(base, prompt[10:], 8)
    assert "of the 50 tokens of the prompt the model reads the last 40" in err and err.count("\n") == 1
    assert run(*ask, prompt[10:]) == (0, continued(base, prompt[10:], 8), "")


# In a terminal.


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stdout a terminal, and returns what is written to it from then on, piece by piece."""

    def terminal():
        pieces = []

        class Terminal(io.StringIO):
            isatty = lambda self: True

            def write(self, text):
                pieces.append(text)
                return len(text)

        monkeypatch.setattr("sys.stdout", Terminal())
        return pieces

    return terminal


def test_in_a_terminal_a_text_appears_token_by_token(run, says, terminal, monkeypatch):
    seen = []
    shown = terminal()

    def spoken(model, ids, n, **how):
        for token in encode("one.two\n"):
            seen.append("".join(shown))
            yield np.array([token])

    monkeypatch.setattr(generation, "generate_tokens", spoken)
    assert run(*HI)[0] == 0
    assert seen == ["Hi", "Hio", "Hion", "Hione", "Hione.", "Hione.t", "Hione.tw", "Hione.two"]
    assert "".join(shown) == "Hione.two\n"
    # "." may begin the stop, so that it is shown when it turns out not to.
    seen.clear(), shown.clear()
    assert run(*HI, "--stop", ".tv")[0] == 0
    assert seen == ["Hi", "Hio", "Hion", "Hione", "Hione", "Hione", "Hione.tw", "Hione.two"]
    seen.clear(), shown.clear()
    assert run(*HI, "--stop", ".tw")[0] == 0
    assert "".join(shown) == "Hione\n" and len(seen) == len("one.tw")


def test_in_a_terminal_several_texts_come_one_after_the_other_under_their_headings(run, says, terminal):
    says([5, 7], [6, 8], [0, 0])
    shown = terminal()
    assert run(*HI, "--temperature", 1, "--num-samples", 2)[0] == 0
    assert "".join(shown) == "--- 1\nHi$%\n--- 2\nHi&'\n"


def test_in_a_terminal_a_text_is_the_one_that_a_pipe_gets(folder, run, terminal):
    ask = ["generate", "--base", "base", "--adapter", "two", "--prompt", "The ", "--max-new-tokens", 12]
    shown = terminal()
    assert run(*ask)[0] == 0
    _, two = parts(folder, "two")
    assert "".join(shown) == continued(two, "The ", 12) and len(shown) > 10


def test_a_terminal_is_not_made_to_obey_a_prompt_or_a_model_and_a_pipe_gets_them_as_they_are(
    run, terminal, monkeypatch
):
    clear = replace(load_tokenizer("base"), encode=lambda text: encode("x"), decode=lambda ids: "\x1b[2J" * len(ids))
    monkeypatch.setattr(generation, "load_tokenizer", lambda base: clear)
    ask = ["generate", "--base", "base", "--prompt", "\x1b]0;x\x07", "--max-new-tokens", 1]
    assert run(*ask)[1] == "\x1b]0;x\x07\x1b[2J\n"
    shown = terminal()
    assert run(*ask)[0] == 0
    assert "".join(shown) == r"\x1b]0;x\x07\x1b[2J" + "\n"


@pytest.mark.skipif(os.name != "posix", reason="opens a pseudo-terminal")
def test_a_real_terminal_is_noticed(folder):
    import pty

    ours, theirs = pty.openpty()
    ask = ["generate", "--base", "base", "--prompt", "The ", "--max-new-tokens", "12"]
    code, _, err = finish(start(folder, *ask, stdout=theirs))
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    base, = parts(folder)
    assert (code, err) == (0, "") and shown.replace("\r\n", "\n") == continued(base, "The ", 12)


def test_generate_speaks_gpt2s_tokens(bpe_folder, run, tmp_path):
    base = small_gpt(vocab_size=300)
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    code, out, err = run("generate", "--base", tmp_path / "base", "--prompt", "😀 the dog", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("😀 the dog") and err == ""
    code, out, err = run("generate", "--base", tmp_path / "base", "--prompt", "\udcff", "--max-new-tokens", 3)
    assert (code, out) == (1, "") and err == "minilora: the prompt is not UTF-8: character 1 is '\\udcff'\n"


# A base whose tokenizer begins each text with a token, and puts a space before it.


@pytest.fixture
def pieces(tmp_path):
    return write_sentencepiece_base(tmp_path / "pieces.gguf")


@pytest.mark.parametrize("samples", [1, 2])
def test_generate_keeps_the_space_before_the_first_word_that_is_written(pieces, run, monkeypatch, samples):
    tokenizer = load_tokenizer(pieces)
    read = []

    def spoken(model, ids, n, **how):
        read.append(ids)
        for token in tokenizer.encode("of me"):
            yield np.full(samples, token)

    monkeypatch.setattr(generation, "generate_tokens", spoken)
    code, out, _ = run("generate", "--base", pieces, "--prompt", "cap", "--num-samples", samples, "--temperature", 1)
    assert code == 0 and out.count("cap of me\n") == samples and "capof" not in out
    [ids] = read
    assert ids.tolist() == [[1, *tokenizer.encode("cap")]] * samples


def test_of_a_prompt_that_is_cut_what_texts_begin_with_stays_in_front(pieces, run, monkeypatch):
    tokenizer = load_tokenizer(pieces)
    read = []

    def spoken(model, ids, n, **how):
        read.append(ids)
        yield tokenizer.encode("of")

    monkeypatch.setattr(generation, "generate_tokens", spoken)
    prompt = "cap" + " of" * 300
    ask = ["generate", "--base", pieces, "--max-new-tokens", 56, "--prompt"]
    code, _, err = run(*ask, prompt)
    assert code == 1 and "the prompt has 302 tokens: with 56 new ones they outgrow the model's context of 256" in err
    code, out, err = run(*ask, prompt, "--cut-prompt")
    assert (code, out) == (0, prompt + " of\n")
    assert "of the 302 tokens of the prompt the model reads the last 199" in err
    [[ids]] = read
    assert ids.tolist() == [1, *tokenizer.encode("of" + " of" * 198)]
    # One token more than fits.
    assert run(*ask, "of" + " of" * 198)[0] == 0
    code, _, err = run(*ask, "of" + " of" * 199)
    assert code == 1 and "has 201 tokens" in err


def test_an_empty_prompt_is_empty_whatever_texts_begin_with(pieces, run):
    code, _, err = run("generate", "--base", pieces, "--prompt", "")
    assert code == 1 and "the prompt is empty" in err


# A base in few bits.


def test_generate_packs_a_base_and_widens_it_once(folder, run):
    base = load_model(folder / "base")
    packed = quantize(base, "nf4")
    ask = ["generate", "--base", "base", "--prompt", "The ", "--max-new-tokens", 12, "--quantize", "nf4"]
    code, out, err = run(*ask)
    assert (code, out) == (0, continued(widen(packed), "The ", 12)) and out != run(*ask[:-2])[1]
    packing, widening = err.splitlines()
    sizes = [f"{parameter_report(model).total_bytes / 1e6:.2f} MB" for model in (base, packed)]
    errors = [relative_error(p.data, dict(base.named_parameters())[name].data)
              for name, p in packed.named_parameters() if name in stored_as(packed)]  # fmt: skip
    told = f"66 linears, float32 before, are packed as nf4: {sizes[0]} become {sizes[1]}, and a weight is "
    assert packing == f"the weights of {told}{np.mean(errors):.1%} off on average"
    assert sizes[0] != sizes[1] and widening.startswith("the base is stored as NF4: widened once to write with it, ")


@pytest.mark.parametrize("adapters", [["one"], ["one", "two"]], ids=str)
def test_an_adapter_is_used_on_its_base_in_few_bits_only_if_asked_for(folder, run, adapters):
    packed = quantize(load_model(folder / "base"), "nf4")
    quiet = lambda receipt: None
    loaded = [load_adapter(folder / name, packed, accept_base=["other-precision"], say=quiet) for name in adapters]
    texts = [continued(attach(widen(packed), a, check_base=False), "The ", 12) for a in loaded]
    ask = ["generate", "--base", "base", "--prompt", "The ", "--max-new-tokens", 12, "--quantize", "nf4", "--adapter"]
    code, out, err = run(*ask, *adapters)
    assert (code, out) == (1, "") and "in another precision" in err and "--accept-base other-precision" in err
    code, out, err = run(*ask, *adapters, "--accept-base", "other-precision")
    assert code == 0 and [line for line in out.splitlines(keepends=True) if not line.startswith("---")] == texts
    assert err.count("CHANGED: in another precision") == len(adapters) and err.count("widened once") == 1


def test_compare_and_merge_take_an_adapter_in_another_precision_if_asked_for(folder, run, tmp_path):
    ask = ["compare", "base", "one", "--data", "q.jsonl"]
    assert run(*ask, "--quantize", "nf4")[0] == 1
    code, out, err = run(*ask, "--quantize", "nf4", "--accept-base", "other-precision")
    assert code == 0 and "packed as nf4" in out and "CHANGED: in another precision" in out
    plain = run(*ask)[1]
    numbers = [re.search(r"without the adapter +(\S+)", text)[1] for text in (plain, out)]
    assert numbers[0] != numbers[1]
    base = load_model(folder / "base")
    on_nf4 = trained_adapter(quantize(base, "nf4"), 1, r=2, alpha=3)
    save_adapter(on_nf4, tmp_path / "a")
    merge_it = ["merge", "--base", "base", "--adapter", tmp_path / "a", "--out", tmp_path / "m"]
    code, _, err = run(*merge_it)
    assert code == 1 and "in another precision" in err and not (tmp_path / "m").exists()
    assert run(*merge_it, "--accept-base", "other-precision")[0] == 0
    assert bits(load_model(tmp_path / "m")) == bits(merge(attach(base, on_nf4, check_base=False)))


@pytest.fixture
def halves(bpe_folder, tmp_path):
    """The folder of a Llama in bfloat16, which stays as it is stored, with an adapter `a` beside it."""
    save_model(small_llama(vocab_size=300, max_position_embeddings=64), tmp_path / "halves", dtype="bfloat16")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "halves")
    base = load_model(tmp_path / "halves")
    assert set(stored_as(base).values()) == {"BF16"}
    save_adapter(trained_adapter(base, target_modules=["q_proj", "down_proj"]), tmp_path / "a")
    return tmp_path


@pytest.mark.parametrize("adapters", [[], ["a"], ["a", "a"]], ids=str)
def test_a_base_in_halves_is_widened_once_and_told(halves, run, adapters):
    base = load_model(halves / "halves")
    ask = ["generate", "--base", halves / "halves", "--prompt", "the fox", "--max-new-tokens", 5]
    code, out, err = run(*ask, *(["--adapter", *(halves / name for name in adapters)] if adapters else []))
    assert code == 0 and err.count("the base is stored as BF16: widened once") == 1
    model = widen(base)
    if adapters:
        model = attach(model, load_adapter(halves / "a", base, say=lambda _: None), check_base=False)
    tokenizer = load_tokenizer(halves / "halves")
    ids = tokenizer.encode("the fox")
    text = tokenizer.decode(generate(model, ids[None], 5, stop=tokenizer.ends)[0])
    assert out.count(text.removesuffix("<|endoftext|>")) == max(1, len(adapters))


def test_merged_weights_are_quantised_again_on_request(halves, run):
    kind = "nf4"
    code, _, err = run("merge", "--base", halves / "halves", "--adapter", halves / "a", "--out", halves / "q8",
                       "--quantize", "q8_0")  # fmt: skip
    assert code == 1 and "multiple of 32" in err and not (halves / "q8").exists()
    ask = ["merge", "--base", halves / "halves", "--adapter", halves / "a", "--out", halves / kind, "--quantize", kind]
    code, out, err = run(*ask, "--allow-rounding")
    assert (code, err) == (0, "") and f"the sums are quantised again, as {kind.upper()}\n" in out
    base = load_model(halves / "halves")
    adapter = load_adapter(halves / "a", base, say=lambda _: None)
    merged = merge(attach(base, adapter, check_base=False))
    again = dict(quantize(merged, kind).named_parameters())
    adapted = {f"{name}.weight" for name in adapter.pairs}
    expected = {name: again[name].data if name in adapted else p.data for name, p in merged.named_parameters()}
    for name, p in load_model(halves / kind).named_parameters():
        assert np.array_equal(p.data, expected[name])
    assert 0 < len(adapted) < len(expected)


@pytest.mark.parametrize("adapters", [[], ["a"], ["a", "a"]], ids=str)
def test_nothing_is_widened_again_for_each_token(halves, run, says, adapters):
    asked = says([1] * max(1, len(adapters)))
    ask = ["generate", "--base", halves / "halves", "--prompt", "the fox"]
    assert run(*ask, *(["--adapter", *(halves / name for name in adapters)] if adapters else []))[0] == 0
    assert [stored_as(model) for model in asked] == [{}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_into_a_base_in_halves_says_that_it_widens(halves, run, dtype):
    ask = ["merge", "--base", halves / "halves", "--adapter", halves / "a", "--out", halves / "m", "--dtype", dtype]
    code, out, err = run(*ask, "--allow-rounding")
    assert (code, err) == (0, "")
    assert "weights from BF16 before the updates are added\n" in out and f"to be stored as {dtype}:" in out
    base = load_model(halves / "halves")
    merged = merge(attach(base, load_adapter(halves / "a", base, say=lambda _: None), check_base=False))
    written = dict(load_model(halves / "m").named_parameters())
    for name, p in merged.named_parameters():
        assert np.array_equal(written[name].data, rounded(name, p.data, dtype).astype("float32"))


# merge


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_writes_what_merge_gives_to_the_bit_and_leaves_the_rest(folder, run, tmp_path, dtype):
    before = everything(folder)
    base, adapted = parts(folder, "one")
    code, out, err = run("merge", "--base", "base", "--adapter", "one", "--out", tmp_path / "m", "--dtype", dtype)
    expected = {name: p.data.astype(dtype).astype("float32") for name, p in merge(adapted).named_parameters()}
    written = {name: p.data for name, p in load_model(tmp_path / "m").named_parameters()}
    assert (code, err) == (0, "") and f"to be stored as {dtype}" in out
    assert f"kept in {tmp_path / 'm'}: a plain model" in out
    assert written.keys() == expected.keys() and all((written[n] == expected[n]).all() for n in expected)
    assert bits(load_model(tmp_path / "m")) != bits(base) and everything(folder) == before


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_merged_folder_has_the_tokenizer_of_its_base(bpe_folder, run, tmp_path, positions):
    base = small_gpt(vocab_size=300, positions=positions)
    save_model(base, tmp_path / "base")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "base")
    save_adapter(trained_adapter(base), tmp_path / "a")
    assert run("merge", "--base", tmp_path / "base", "--adapter", tmp_path / "a", "--out", tmp_path / "m")[0] == 0
    said = [run("generate", "--base", tmp_path / b, *more, "--prompt", "the fox", "--max-new-tokens", 5)[:2]
            for b, more in (("m", []), ("base", ["--adapter", tmp_path / "a"]))]  # fmt: skip
    assert said[0] == said[1] and said[0][0] == 0


def test_a_merged_gpt2_keeps_the_settings_of_its_base(run, tmp_path):
    where = GOLDEN / "c_attn"
    assert run("merge", "--base", where / "base", "--adapter", where / "adapter", "--out", tmp_path / "m")[0] == 0
    base = load_model(where / "base")
    adapted = attach(base, load_adapter(where / "adapter", base, say=lambda _: None))
    assert bits(load_model(tmp_path / "m")) == bits(merge(adapted)) != bits(base)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (where / "base", tmp_path / "m")]
    assert settings[0]["summary_type"] == settings[1]["summary_type"]


# compare


def loss(model, ids, targets):
    """Nats per token of one row, in float64, from the logits alone."""
    logits = model(ids[None]).data[0].astype(np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    return list(np.log(np.exp(logits).sum(-1)) - chosen)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_compare_ends_with_an_error_where_a_loss_is_no_number(folder, run, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "strong")
    path = tmp_path / "strong" / "adapter_model.safetensors"
    save_file({name: array * 1e38 for name, array in load_file(path).items()}, path)
    code, out, err = run("compare", "base", tmp_path / "strong", "--data", "t.txt")
    assert code == 1 and f"{tmp_path / 'strong'}: heldout_loss: the loss is nan" in err
    assert "nan" not in out


def test_compare_leaves_out_rows_that_are_too_long_if_asked_to(folder, run, tmp_path):
    rows = [{"prompt": "who?", "answer": " me"}, {"prompt": "who?" * 20, "answer": " me"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short.jsonl").write_text(json.dumps(rows[0]))
    code, out, err = run("compare", "base", "two", "--data", tmp_path / "long.jsonl")
    assert code == 1 and "choose --too-long cut or drop" in err
    code, out, err = run("compare", "base", "two", "--data", tmp_path / "long.jsonl", "--too-long", "drop")
    assert code == 0 and "1 of 2 rows are longer than 48 tokens: they are dropped" in out + err
    _, short, _ = run("compare", "base", "two", "--data", tmp_path / "short.jsonl")
    assert out.splitlines()[-4:] == short.splitlines()[-4:]


@pytest.mark.parametrize("file, more", [("t.txt", []), ("t.txt", ["--length", 7]), ("q.jsonl", ["--batch", 2])])
def test_compare_measures_the_loss_without_and_with(folder, run, file, more):
    means, ids, length = [], encode(TEXT), 7 if "--length" in more else 48
    for model in parts(folder, "two"):
        each = []
        if file == "t.txt":
            for i in range(0, (len(ids) - 1) // length * length, length):
                each += loss(model, ids[i : i + length], ids[i + 1 : i + length + 1])
        else:
            for prompt, answer in PAIRS:
                row = encode(prompt + answer + "\n")
                each += loss(model, row[:-1], row[1:])[len(prompt) - 1 :]
        means.append(np.mean(each))
    code, out, err = run("compare", "base", "two", "--data", file, *more)
    without, given = (re.search(rf"{name} +(\S+) +(\S+)\n", out).groups() for name in ("out the adapter", "with it"))
    change = float(re.search(r"difference +([+-]\S+)\n", out)[1])
    assert (code, err) == (0, "") and abs(means[1] - means[0]) > 0.01
    assert np.allclose([float(without[0]), float(given[0]), change], [*means, means[1] - means[0]], atol=2e-4)
    assert np.allclose([float(without[1]), float(given[1])], np.exp(means), rtol=1e-3)


def mean_loss(model, file):
    """Nats per token of a file of the fixture `folder`, in float64, from the logits alone."""
    each = []
    if file == "t.txt":
        ids = encode(TEXT)
        for i in range(0, (len(ids) - 1) // 48 * 48, 48):
            each += loss(model, ids[i : i + 48], ids[i + 1 : i + 49])
    else:
        for prompt, answer in PAIRS:
            row = encode(prompt + answer + "\n")
            each += loss(model, row[:-1], row[1:])[len(prompt) - 1 :]
    return np.mean(each)


def exact_by_rank(monkeypatch):
    """The base gives no answer, `one` (rank 2) two of them, `two` (rank 3) three."""

    def exact_rows(model, rows, batch, parts, threads):
        ranks = [layer.pair.r for _, layer in model.named_modules() if isinstance(layer, LoRALinear)]
        return [i < max(ranks, default=0) for i in range(len(rows))]

    monkeypatch.setattr(comparison, "exact_rows", exact_rows)


def test_compare_takes_many_adapters_and_many_files(folder, run, tmp_path, monkeypatch):
    exact_by_rank(monkeypatch)
    (tmp_path / "rows.jsonl").write_text('{"text": "no answer"}\n')
    files = ["t.txt", "q.jsonl", tmp_path / "rows.jsonl"]
    code, out, err = run("compare", "base", "one", "two", "--data", *files)
    assert (code, err) == (0, "")
    assert out.count("all used") == 2 and out.count("\ndata ") == 3
    head, *rows, exact_head, exact_base, exact_one, exact_two = out.splitlines()[-8:]
    assert head.split() == ["nats", "per", "token", "t.txt", "q.jsonl", "rows.jsonl"]
    assert len({len(line) for line in [head, *rows]}) == 1, "the columns stand one under the other"
    models = parts(folder, "one", "two")
    for name, line, model in zip(["the base", "one", "two"], rows, models, strict=True):
        assert line.startswith(name)
        cells = [float(cell) for cell in line.removeprefix(name).split()]
        assert np.allclose(cells[:2], [mean_loss(model, "t.txt"), mean_loss(model, "q.jsonl")], atol=2e-4)
    assert len({line.split()[-1] for line in rows}) == 3
    # Neither a text nor rows of text have answers.
    assert exact_head.split() == ["exact", "answers", "q.jsonl"]
    assert [line.split()[-3:] for line in (exact_base, exact_one, exact_two)] == [[n, "of", "3"] for n in "023"]


def test_compare_of_one_adapter_on_one_file_with_answers_counts_them(run, monkeypatch):
    exact_by_rank(monkeypatch)
    out = run("compare", "base", "one", "--data", "q.jsonl")[1]
    assert out.endswith("\nexact answers, of 3: 0 without the adapter, 2 with it\n")
    assert "exact" not in run("compare", "base", "one", "--data", "t.txt")[1]


def test_files_of_one_name_are_told_apart_and_each_option_is_for_the_files_that_it_is_of(run, tmp_path):
    (tmp_path / "t.txt").write_text("another text " * 9)
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "who?" * 20, "answer": " me"}) + "\n" + json.dumps(
        {"prompt": "who?", "answer": " me"}))  # fmt: skip
    code, out, _ = run("compare", "base", "one", "--data", "t.txt", "--data", tmp_path / "t.txt",
                       tmp_path / "long.jsonl", "--length", 7, "--too-long", "drop")  # fmt: skip
    head = out.splitlines()[-6]
    assert code == 0 and head.split() == ["nats", "per", "token", "t.txt", str(tmp_path / "t.txt"), "long.jsonl"]
    assert out.count("in windows of 7") == 2 and "1 of 2 rows are longer than 48 tokens: they are dropped" in out
    code, _, err = run("compare", "base", "one", "--data", "q.jsonl", "--length", 7)
    assert code == 1 and "length 7 is for .txt files" in err
    code, _, err = run("compare", "base", "one", "--data", "t.txt", "--too-long", "cut")
    assert code == 1 and "is for .jsonl files" in err


def test_compare_measures_nothing_before_all_of_it_fits(run, monkeypatch):
    monkeypatch.setattr(comparison, "heldout_loss", lambda *given: pytest.fail("something was measured"))
    for adapters, files, complaint in (
        (["one", "other"], ["t.txt"], "other holds a model, where an adapter is needed"),
        (["one"], ["t.txt", "missing.txt"], "missing.txt: No such file"),
        (["one"], ["q.jsonl", "base"], "base: data are a .txt file"),
    ):
        code, _, err = run("compare", "base", *adapters, "--data", *files)
        assert code == 1 and complaint in err and err.count("\n") == 1


# What is refused.


generating = "generate --base base --prompt hi "
tuning = "finetune --base base --data t.txt --out new --alpha 4 --length 8 "
going_on = "finetune --base base --data t.txt --out new --length 8 --from-adapter nowhere"
fully = "finetune --base base --data t.txt --out new --full --length 8 "
adding = "merge --base base --adapter one two --out new "
combining = "combine --base base --out new --adapter "
extracting = "extract --base base --tuned other --out new "
REFUSED = [
    ("generate --base nowhere --prompt hi", 1, "nowhere does not exist"),
    ("generate --base t.txt --prompt hi", 1, "t.txt is a file"),
    ("generate --base one --prompt hi", 1, "one holds an adapter, where a model is needed"),
    ("generate --base . --prompt hi", 1, "its sub-folders have: base, one, other, two"),
    (generating + "--adapter other", 1, "other holds a model, where an adapter is needed"),
    (generating + "--adapter one nowhere", 1, "nowhere does not exist"),
    (generating + "--adapter", 2, "--adapter: expected at least one"),
    ("generate --base other --prompt hi --adapter one", 1, "trained on: h.0.attn.k_proj.weight: made for"),
    ("generate --base base --prompt é", 1, "'é' is not one of the 96 known"),
    (generating + "--max-new-tokens 47", 1, "has 2 tokens: with 47 new ones they outgrow the model's context of 48"),
    (generating + "--max-new-tokens -1", 2, "--max-new-tokens: must be a whole number of at least 0, got '-1'"),
    (generating + "--temperature -1", 2, "--temperature: must be a finite number of at least 0, got '-1'"),
    (generating + "--temperature nan", 2, "--temperature: must be a finite"),
    (generating + "--temperature 1 --top-k 0", 2, "--top-k: must be a whole number of at least 1"),
    (generating + "--temperature 1 --top-k 97 --max-new-tokens 3", 1, "top-k is 97, but there are only 96 tokens"),
    (generating + "--top-k 3", 2, "--top-k: at temperature 0 nothing is drawn"),
    (generating + "--top-p 0.9", 2, "--top-p: at temperature 0 nothing is drawn"),
    (generating + "--temperature 1 --top-p 0", 2, "--top-p: must be in (0, 1], got '0'"),
    (generating + "--temperature 1 --top-p 1.1", 2, "--top-p: must be in (0, 1], got '1.1'"),
    (generating + "--num-samples 2", 2, "--num-samples: at temperature 0 every text is the same"),
    (generating + "--num-samples 0", 2, "--num-samples: must be a whole number of at least 1"),
    (generating + "--stop=", 2, "--stop: the text is empty"),
    (generating + "--quantize q4", 2, "--quantize: invalid choice: 'q4'"),
    (tuning + "--r 0", 2, "--r: must be a whole number of at least 1, got '0'"),
    (tuning + "--alpha nan", 2, "--alpha: must be a finite positive number, got 'nan'"),
    (tuning + "--lr inf", 2, "--lr: must be a finite positive number, got 'inf'"),
    (tuning + "--eval-split 1", 2, "--eval-split: must be in [0, 1), got '1'"),
    (tuning + "--batch 0", 2, "--batch: must be"),
    (tuning + "--save-every -1", 2, "--save-every: must be"),
    (tuning + "--dropout 1", 2, "--dropout: must be in [0, 1), got '1'"),
    (tuning + "--steps 1.5", 2, "--steps: must be a whole number of at least 1, got '1.5'"),
    (tuning + "--alpha much", 2, "--alpha: must be a finite positive number, got 'much'"),
    (tuning + "--target nothing", 1, "['nothing'] match no Linear layer"),
    (tuning + "--target ,", 2, "--target: there is no name in ','"),
    (tuning + "--length 49", 1, "does not fit in the model's context of 48"),
    (tuning + "--data missing.txt", 1, "missing.txt: No such file or directory"),
    (tuning + "--base one", 1, "one holds an adapter"),
    (tuning + "--out base", 1, "base is not empty: it holds config.json, model.safetensors"),
    (tuning + "--out t.txt", 1, "t.txt is a file"),
    (tuning + "--resume", 1, "nothing to resume"),
    (tuning + "--patience 2", 2, "--patience: it counts evaluations; give --eval-every as well"),
    (tuning + "--eval-every 2", 2, "--eval-every: nothing is held out to evaluate on; give --eval-split as well"),
    (tuning + "--eval-every 0 --eval-split 0.1", 2, "--eval-every: must be a whole number of at least 1"),
    (tuning + "--patience 0 --eval-every 1", 2, "--patience: must be a whole number of at least 1"),
    (tuning + "--full", 2, "--alpha: it is of adapters, and --full trains every weight"),
    (fully + "--r 8", 2, "--r: it is of adapters"),
    (fully + "--dora", 2, "--dora: it is of adapters"),
    (fully + "--dropout 0", 2, "--dropout: it is of adapters"),
    (fully + "--target all-linear", 2, "--target: it is of adapters"),
    (fully + "--quantize nf4", 2, "--quantize: it is of adapters"),
    (tuning + "--workers 2 --threads 2", 2, "--workers: processes compute the parts in the place of --threads; leave"),
    (tuning + "--workers 2 --backend cupy", 2, "--workers: they compute with NumPy; leave out --backend cupy"),
    (fully + "--workers 2", 2, "--workers: with --full each part would take all weights to a worker"),
    (tuning + "--workers 0", 2, "--workers: must be a whole number of at least 1, or mpi, got '0'"),
    (tuning + "--workers 3 --parts 2", 1, "3 workers for 2 parts: give as many parts"),
    (tuning + "--accumulate 0", 2, "--accumulate: must be a whole number of at least 1"),
    (tuning + "--schedule step", 2, "--schedule: invalid choice: 'step'"),
    (tuning + "--warmup -1", 2, "--warmup: must be a whole number of at least 0, got '-1'"),
    (tuning + "--warmup 9 --steps 8", 1, "--warmup must be at most 8, the number of steps; got 9"),
    (tuning + "--weight-decay -0.1", 2, "--weight-decay: must be a finite number of at least 0, got '-0.1'"),
    (tuning + "--clip 0", 2, "--clip: must be a finite positive number, got '0'"),
    (tuning + "--rank-pattern q_proj", 2, "--rank-pattern: must be NAME=VALUE, got 'q_proj'"),
    (tuning + "--rank-pattern q_proj=0", 2, "--rank-pattern: must be a whole number of at least 1, got '0'"),
    (tuning + "--rank-pattern q_proj=1 q_proj=2", 2, "--rank-pattern: 'q_proj' is given twice"),
    (tuning + "--rank-pattern none=1 --r 2", 1, "--rank-pattern ['none'] match none of the adapted modules"),
    (tuning + "--alpha-pattern (=1", 2, "--alpha-pattern: '(' is not a regular expression"),
    (tuning + "--target-regex (", 2, "--target-regex: '(' is not a regular expression"),
    (tuning + "--target-regex q_proj", 1, "['q_proj'] match no Linear layer (it is for whole names; --target takes"),
    (tuning + "--target-regex .* --target q_proj", 2, "--target-regex: it takes the place of --target"),
    (tuning + "--rslora=1", 2, "--rslora: ignored explicit argument '1'"),
    (tuning + "--quiet=1", 2, "--quiet: ignored explicit argument '1'"),
    (tuning + "--from-adapter one", 2, "--alpha: the adapter of --from-adapter has its own; leave out one"),
    (fully + "--from-adapter one", 2, "--from-adapter: it is of adapters, and --full trains every weight"),
    (tuning + "--accept-base other-precision", 2, "--accept-base: it is about the base of an adapter; give --from-"),
    (fully + "--rslora", 2, "--rslora: it is of adapters"),
    (going_on, 1, "nowhere does not exist"),
    (going_on + " --from-adapter base", 1, "base holds a model, where an adapter is needed"),
    (going_on + " --from-adapter one --r 2", 2, "--r: the adapter of --from-adapter has its own"),
    (going_on + " --from-adapter one --base other", 1, "this adapter does not fit this base"),
    (tuning + "--config nowhere.json", 1, "nowhere.json: No such file"),
    (tuning + "--config t.txt", 1, "t.txt: settings are a .json or a .toml file"),
    ("finetune --resume", 2, "required: --out;"),
    ("finetune --resume --out one", 1, "nothing to resume in one: no run was begun there"),
    (tuning + "--log q.jsonl", 1, "q.jsonl is not empty, and a log is never written over"),
    (tuning + "--log base", 1, "base is no file"),
    (tuning + "--log nowhere/a.jsonl", 1, "nowhere does not exist; make the folder"),
    ("finetune --base base --data t.txt --out new", 2, "required: --alpha"),
    ("merge --base base --adapter one --out base", 1, "base is not empty: it holds config.json, model.safetensors"),
    ("merge --base base --adapter one --out two", 1, "two is not empty: it holds adapter_config.json"),
    ("merge --base base --adapter one --out q.jsonl", 1, "q.jsonl is a file"),
    ("merge --base base --adapter base --out new", 1, "base holds a model, where an adapter"),
    ("merge --base base --adapter one --out new --dtype int8", 2, "--dtype: invalid choice: 'int8'"),
    ("merge --base base --out new", 2, "required: --adapter"),
    (adding + "", 2, "--weights: 2 adapters are added, so give a weight for each, say --weights 1 1;"),
    (adding + "--weights 1", 2, "--weights: 1 for 2 adapters; give one for each, in their order"),
    (adding + "--weights 1 2 3", 2, "--weights: 3 for 2 adapters"),
    (adding + "--weights 1 x", 2, "--weights: must be a finite number, got 'x'"),
    (adding + "--weights=nan 1", 2, "--weights: must be a finite number, got 'nan'"),
    (adding + "--weights", 2, "--weights: expected at least one"),
    (adding + "--weights 1 1e39", 1, "outgrows float32 with the weights 1e+39"),
    (adding + "--weights 1 1 --out base", 1, "base is not empty"),
    ("merge --base other --adapter one two --weights 1 1 --out new", 1, "made for"),
    (combining + "one two", 2, "--weights: 2 adapters are added, so give a weight for each, say --weights 1 1;"),
    (combining + "one two --weights -1", 2, "--weights: 1 for 2 adapters"),
    (combining + "one --weights -1 -2", 2, "--weights: 2 for 1 adapters"),
    (combining + "one --r 0", 2, "--r: must be a whole number of at least 1, got '0'"),
    (combining + "one --out base", 1, "base is not empty"),
    (combining + "base", 1, "base holds a model, where an adapter"),
    (combining + "one --weights 0", 1, "every lora_B is zero"),
    ("combine --base one --adapter one --out new", 1, "one holds an adapter, where a model"),
    ("combine --base other --adapter one --out new", 1, "made for"),
    (extracting + "--r 0", 2, "--r: must be a whole number of at least 1, got '0'"),
    (extracting, 2, "required: --r"),
    (extracting + "--r 1 --out one", 1, "one is not empty"),
    (extracting + "--r 1 --tuned one", 1, "one holds an adapter, where a model"),
    (extracting + "--r 1 --tuned nowhere", 1, "nowhere does not exist"),
    (extracting + "--r 1 --tuned base", 1, "none of the 66 targeted linears changed"),
    (extracting + "--r 1 --target ,", 2, "--target: there is no name in ','"),
    ("inspect nowhere", 1, "nowhere does not exist"),
    ("inspect base --base base", 1, "a model, which has no base"),
    ("compare one base --data t.txt", 1, "one holds an adapter, where a model"),
    ("compare --data t.txt base one", 2, "required: BASE, ADAPTER"),
    ("compare base --data t.txt", 2, "required: ADAPTER"),
    ("compare base one --data t.txt --batch 0", 2, "--batch: must be a whole number of at least 1"),
    ("bogus", 2, "there is no command 'bogus'"),
]


@pytest.mark.parametrize("line, code, told", REFUSED, ids=[line for line, *_ in REFUSED])
def test_what_is_refused_is_told_in_one_line_and_leaves_no_trace(folder, run, line, code, told):
    before = everything(folder)
    given, out, err = run(*line.split())
    assert (given, err.count("\n")) == (code, 1) and err.startswith("minilora") and told in err
    assert len(err) < 1000 and everything(folder) == before and (code == 1 or out == "")


def test_an_empty_prompt_is_refused(run):
    code, out, err = run("generate", "--base", "base", "--prompt", "")
    assert (code, out, err) == (1, "", "minilora: the prompt is empty; give at least one word to go on from\n")


@pytest.mark.parametrize("words", ["generate --base base --prompt x --adapter", "history", "inspect", "rollback"])
def test_a_run_that_was_killed_is_named_as_one(run, tmp_path, words):
    (tmp_path / "a b/checkpoint").mkdir(parents=True)
    (tmp_path / "a b/checkpoint/checkpoint.safetensors").write_bytes(b"")
    code, _, err = run(*words.split(), tmp_path / "a b")
    told = f"; minilora finetune --resume --out '{tmp_path}/a b' goes on with the run in it, which has not ended"
    assert code == 1 and told in err and err.count("\n") == 1


def test_a_folder_of_shards_is_not_merged_into(run, tmp_path):
    shutil.copytree(GOLDEN / "sharded/base", tmp_path / "m")
    before = everything(tmp_path)
    base, adapter = tmp_path / "m", GOLDEN / "c_attn/adapter"
    code, _, err = run("merge", "--base", base, "--adapter", adapter, "--out", base)
    assert code == 1 and "is not empty: it holds config.json, model-0" in err and everything(tmp_path) == before


def test_tokens_that_the_tokenizer_does_not_know_are_counted(run, bpe_folder, tmp_path):
    """A table of embeddings may be rounded up: what the model says there has no text, and that is told."""
    model = small_gpt(vocab_size=400)
    model.wte.weight.data[:300] = 0
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(bpe_folder / name, tmp_path / name)
    save_model(model, tmp_path)
    code, out, err = run("generate", "--base", tmp_path, "--prompt", "the", "--max-new-tokens", "3")
    assert (code, out) == (0, "the\n")
    assert err == "3 of 3 new tokens are left out: the tokenizer knows 300, the model 400\n"
