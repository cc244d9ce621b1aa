"""A conversation: what is answered by whom, what is read again, what a command does, and how it ends."""

import io
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
from program import everything, finish, start
from strategies import small_gpt

from minilora import attach, generate, load_adapter, load_model, save_model
from minilora.cli import chat, generation, keyboard
from minilora.cli.chat import Conversation, converse, named
from minilora.cli.generation import Sampling
from minilora.disk.characters import ALPHABET, decode, encode
from minilora.disk.token_stream import TokenStream
from minilora.disk.tokenizer import load_tokenizer
from minilora.gpt import GPTConfig
from minilora.tensor import Tensor


class Talk:
    """A tokenizer of the 96 characters with a template: `u>hi` and a newline, then `a>` and the answer."""

    end = 0
    ends = (0,)
    vocab_size = len(ALPHABET)
    template = "u> a>"

    def __init__(self):
        self.ids = []

    def encode_chat(self, messages, add_generation_prompt):
        if any("refuse" in message["content"] for message in messages):
            raise ValueError("the template: no such message")
        text = "".join(f"{message['role'][0]}>{message['content']}\n" for message in messages)
        return encode(text + ("a>" if add_generation_prompt else ""))

    def stream(self, after=()):
        return TokenStream(decode, after)


@pytest.fixture
def talk(run, monkeypatch):
    """Runs `chat` on the folders of these tests, with lines typed in: talk(["hi"], "--base", "base")."""
    for module in (chat, generation):
        monkeypatch.setattr(module, "load_tokenizer", lambda base: Talk())

    def talk(lines, *arguments):
        typed = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        return run("chat", "--max-new-tokens", 4, *arguments)

    return talk


def answers(folder, adapter, *messages):
    """What a model answers, each time reading the whole conversation anew."""
    model = load_model(folder / "base")
    if adapter is not None:
        model = attach(model, load_adapter(folder / adapter, model, say=lambda _: None))
    text, said = "", []
    for message in messages:
        text += f"u>{message}\na>"
        ids = encode(text)
        said.append(decode(generate(model, ids[None], 4, stop=0)[0, len(ids) :]).split("\n")[0])
        text += f"{said[-1]}\n"
    return said


# In the program.


def test_one_message_is_answered_and_nothing_else_is_on_stdout(folder, talk):
    texts = {}
    for name in (None, "one", "two"):
        [texts[name]] = answers(folder, name, "who?")
        code, out, err = talk([], "--base", "base", *(["--adapter", name] if name else []), "--say", "who?")
        assert (code, out) == (0, f"{texts[name]}\n") and ("recognised" in err) == bool(name)
    assert len(set(texts.values())) == 3


def test_lines_are_answered_one_after_the_other_each_with_what_was_said_before(folder, talk):
    expected = answers(folder, None, "who?", "why", "so")
    code, out, err = talk(["who?", "", "why", "  ", "so"], "--base", "base")
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))
    assert "the base answers; /help" in err
    assert expected[1] != answers(folder, None, "why")[0], "what was said before makes no difference here"


def test_adapters_are_switched_and_the_conversation_goes_on_or_begins_anew(folder, talk):
    code, out, err = talk(["who?", "/reset", "/adapter two", "who?", "/reset", "/adapter none", "who?"],
                          "--base", "base", "--adapter", "one", "two")  # fmt: skip
    assert out.splitlines() == [answers(folder, name, "who?")[0] for name in ("one", "two", None)]
    assert code == 0 and "the adapter one answers; /help" in err
    assert "(the adapter two answers; the conversation goes on" in err and "(the base answers; the conv" in err
    # The second answer is the adapter's, of a conversation that the base began.
    out = talk(["who?", "/adapter two", "so"], "--base", "base", "--adapter", "two")[1].splitlines()
    out_2 = talk(["/adapter none", "who?", "/adapter two", "so"], "--base", "base", "--adapter", "two")[1].splitlines()
    assert out == answers(folder, "two", "who?", "so") and out_2[0] == answers(folder, None, "who?")[0]


def test_a_conversation_can_be_drawn_and_its_seed_repeats_it(talk):
    hot = ["--base", "base", "--temperature", 2.0, "--top-p", 0.9, "--top-k", 50]
    texts = [talk(["who?", "so"], *hot, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_system_is_told_first_and_again_after_a_reset(talk, monkeypatch):
    seen = []
    encode_chat = Talk.encode_chat

    def watched(self, messages, add_generation_prompt):
        seen.append([(message["role"], message["content"]) for message in messages])
        return encode_chat(self, messages, add_generation_prompt)

    monkeypatch.setattr(Talk, "encode_chat", watched)
    assert talk(["who?", "/reset", "so"], "--base", "base", "--system", "be brief")[0] == 0
    system = ("system", "be brief")
    assert seen[1:] == [[system, ("user", "who?")], [system, ("user", "so")]]


def test_a_base_without_a_template_is_refused_before_it_is_loaded(run, monkeypatch):
    monkeypatch.setattr(generation, "load_model", lambda *given: 1 / 0)
    code, out, err = run("chat", "--base", "base", "--say", "who?")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "base has no chat template" in err and "minilora generate" in err


@pytest.mark.parametrize("arguments, says", [
    (["--say", "x" * 50], "the conversation has 55 tokens, and the model's context is 48"),
    (["--say", "x" * 43], "the conversation has 48 tokens, and the model's context is 48"),
    (["--say", "refuse"], "the template: no such message"),
    (["--system", "refuse"], "the template: no such message"),
    (["--say", "\udcff"], "the message is not UTF-8"),
    (["--system", "a\udcff"], "the system's message is not UTF-8: character 2"),
    (["--temperature", 1, "--top-k", 97], "there are only 96 tokens"),
    (["--adapter", "nowhere"], "nowhere does not exist"),
    (["--adapter", "base"], "base holds a model, where an adapter is needed"),
    (["--adapter", "one", "one"], "--adapter one: another one has the name one"),
])  # fmt: skip
def test_what_cannot_be_said_is_refused_before_the_weights_are_read(folder, talk, monkeypatch, arguments, says):
    monkeypatch.setattr(generation, "load_model", lambda *given: 1 / 0)
    before = everything(folder)
    code, out, err = talk([], "--base", "base", *arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1 and says in err and everything(folder) == before


@pytest.mark.parametrize("arguments, says", [
    (["--top-k", 3], "--top-k: at temperature 0 nothing is drawn"), (["--top-p", 0.5], "--top-p: at temperature 0"),
    (["--max-new-tokens", 0], "--max-new-tokens: must be a whole number of at least 1"), (["--adapter"], "expected"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_exit_code_2(talk, arguments, says):
    code, out, err = talk([], "--base", "base", *arguments)
    assert (code, out) == (2, "") and says in err


def test_an_answer_that_was_cut_says_why(folder, talk):
    [text] = answers(folder, None, "who?")
    assert len(text) == 4
    code, out, err = talk([], "--base", "base", "--say", "who?")
    assert (code, out, err) == (0, f"{text}\n", "cut after 4 tokens; --max-new-tokens allows more\n")
    code, out, err = talk([], "--base", "base", "--say", "x" * 41, "--max-new-tokens", 9)
    assert code == 0 and len(out) <= 3 and "cut: the conversation fills the model's context of 48" in err


# The conversation itself.


class Echo:
    """A model that says the number of the message, doubled, and its own letter; notes what it has read."""

    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=96, block_size=40)

    def __init__(self, letter="m"):
        self.letter = letter
        self.read = []

    def new_cache(self, size):
        assert size <= 40
        return {"text": "", "size": size}

    def hidden(self, ids, cache):
        self.read.append(decode(ids[0]))
        cache["text"] += self.read[-1]
        assert len(cache["text"]) <= cache["size"]
        *_, last = cache["text"].split("a>")
        answer = f"{self.letter}{cache['text'].count('u>') * 11}\n"
        assert answer.startswith(last)
        return Tensor(np.eye(96)[encode(answer[len(last)])][None])

    def head(self, hidden):
        return hidden


def conversation(models=None, n=9, system=None):
    models = models or {"m": Echo("m"), "none": Echo("b")}
    return Conversation(models, next(iter(models)), Talk(), Sampling(n), system)


def held(conversation, *lines):
    """(what was written, the lines of what was told) in a conversation of these lines."""
    lines, written, told = list(lines), [], []
    converse(conversation, lambda: lines.pop(0) if lines else None, written.append, told.append)
    return "".join(written), told


def test_what_was_read_is_not_read_again():
    talk = conversation()
    assert held(talk, "x", "yy") == ("m11\nm22\n", [])
    # Of each answer the last token, its end, is read with the next message.
    assert talk.models["m"].read == ["u>x\na>", "m", "1", "1", "\nu>yy\na>", "m", "2", "2"]
    # There was room for twice as much as the first question and an answer. Now it is made anew.
    assert held(talk, "z") == ("m33\n", [])
    assert talk.models["m"].read[8:] == ["u>x\na>m11\nu>yy\na>m22\nu>z\na>", "m", "3", "3"]


def test_after_a_switch_or_a_reset_everything_is_read_by_who_answers():
    talk = conversation()
    assert held(talk, "x", "/adapter none", "y", "/adapter m", "z")[0] == "m11\nb22\nm33\n"
    assert talk.models["none"].read[0] == "u>x\na>m11\nu>y\na>"
    assert talk.models["m"].read[4] == "u>x\na>m11\nu>y\na>b22\nu>z\na>"
    assert held(talk, "/reset", "x")[0] == "m11\n" and talk.models["m"].read[-4] == "u>x\na>"


def test_a_conversation_that_was_written_out_otherwise_is_read_anew(monkeypatch):
    talk = conversation()
    held(talk, "x")
    # A template may change what came before, as those do that leave out earlier thoughts.
    talk.messages[1]["content"] = "11"
    assert held(talk, "y")[0] == "m22\n" and talk.models["m"].read[4] == "u>x\na>11\nu>y\na>"


class Interrupted(Echo):
    """Echo, and while it reads for the n-th time somebody presses Ctrl-C."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def hidden(self, ids, cache):
        out = super().hidden(ids, cache)
        if len(self.read) == self.n:
            raise KeyboardInterrupt
        return out


def test_ctrl_c_stops_an_answer_and_what_was_written_is_remembered():
    talk = conversation({"m": Interrupted(3)})
    written, told = held(talk, "x", "y")
    assert written == "m1\nm22\n" and told == ["(stopped; Ctrl-C once more ends the conversation)"]
    # Nobody knows how much of the third token is in the cache.
    assert talk.models["m"].read[3] == "u>x\na>m1\nu>y\na>"


def test_after_ctrl_c_nothing_of_the_cache_is_trusted_that_earlier_answers_left():
    talk = conversation({"m": Interrupted(6)})
    assert held(talk, "x", "y", "z")[0] == "m11\nm\nm33\n"
    assert talk.models["m"].read[6] == "u>x\na>m11\nu>y\na>m\nu>z\na>"


def test_a_question_whose_answer_was_stopped_before_it_began_is_forgotten():
    talk = conversation({"m": Interrupted(1)})
    assert held(talk, "x", "y")[0] == "\nm11\n"
    assert [message["content"] for message in talk.messages] == ["y", "m11"]


def test_ctrl_c_at_the_prompt_ends_the_program(folder, talk, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(keyboard, "_next_piped_line", interrupted)
    code, out, err = talk([], "--base", "base")
    assert (code, out) == (130, "") and err.endswith("minilora: interrupted\n")


def test_a_full_context_is_told_and_a_reset_helps():
    talk = conversation()
    written, told = held(talk, "x" * 20, "y" * 8, "ok", "/reset", "y" * 8)
    assert written == "m11\nm22\nm11\n" or "context" in told[0]
    assert [line for line in told if "is 40: say it in fewer words, or begin a new one with /reset" in line]
    assert [message["content"] for message in talk.messages] == ["y" * 8, "m11"]


def test_an_error_ends_neither_the_conversation_nor_what_was_said():
    talk = conversation()
    written, told = held(talk, "x", "refuse", "\udcff", "y")
    assert written == "m11\nm22\n"
    assert told == ["(the template: no such message)", "(the message is not UTF-8: character 1 is '\\udcff')"]


def test_an_empty_answer_is_an_answer():
    class Mute(Echo):
        def hidden(self, ids, cache):
            return Tensor(np.eye(96)[[0]][None])

    talk = conversation({"m": Mute()})
    assert held(talk, "x", "y") == ("\n\n", [])
    assert [message["content"] for message in talk.messages] == ["x", "", "y", ""]
    # A template that forgets may write out what was read already, and no more.
    talk = conversation({"m": Mute()})
    talk.tokenizer.encode_chat = lambda messages, add_generation_prompt: encode("u>x\na>")
    assert held(talk, "x", "x") == ("\n\n", [])


@pytest.mark.parametrize("line, told", [
    ("/adapter", ["* m", "  none"]),
    ("/adapter  ", ["* m", "  none"]),
    ("/adapter x", ["(there is no adapter x; there are m, none)"]),
    ("/adapters", ["(there is no /adapters: did you mean /adapter?)"]),
    ("/quit", ["(there is no /quit: did you mean /exit?)"]),
    ("/clear", ["(there is no /clear: did you mean /reset?)"]),
    ("/usr/bin", ["(there is no /usr/bin; see /help)"]),
    ("/", ["(there is no /; see /help)"]),
    ("/reset all", ["(/reset takes nothing after it; a message may begin with / after a space)"]),
    ("/reset", ["(a new conversation)"]),
])  # fmt: skip
def test_a_command_is_told_what_it_did_or_why_not(line, told):
    assert held(conversation(), line) == ("", told)


def test_help_names_every_command():
    _, told = held(conversation(), "/help")
    assert [line.split()[0] for line in told] == ["/adapter", "/reset", "/help", "/exit"]


def test_exit_ends_it_and_a_space_makes_a_message_of_a_command():
    talk = conversation()
    assert held(talk, "x", "/exit", "y")[0] == "m11\n"
    assert held(talk, " /exit", "y")[0] == "m22\nm33\n"


def test_an_adapter_is_called_by_the_name_of_its_folder_if_no_other_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named(["a/one", "b/two/", "."]) == {"one": "a/one", "two": "b/two/", tmp_path.name: "."}
    assert named(["a/one", "b/one", "two"]) == {"a/one": "a/one", "b/one": "b/one", "two": "two"}
    assert named(["a/none"]) == {"a/none": "a/none"}
    for folders in (["one", "one"], ["none"]):
        with pytest.raises(ValueError, match="rename a folder"):
            named(folders)


@pytest.fixture
def chatty(bpe_folder, tmp_path):
    """A base with a tokenizer of 300 tokens and a chat template, whose context is 256."""
    save_model(small_gpt(vocab_size=300, positions="rope", block_size=256), tmp_path / "chatty")
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "chatty")
    (tmp_path / "chatty/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tmp_path


def test_a_base_is_talked_to_through_the_template_of_its_folder(chatty, run):
    code, out, err = run("chat", "--base", chatty / "chatty", "--say", "The dog", "--max-new-tokens", 9)
    model, tokenizer = load_model(chatty / "chatty"), load_tokenizer(chatty / "chatty")
    ids = tokenizer.encode("user: The dog<|endoftext|>assistant: ")
    written = generate(model, ids[None], 9, stop=tokenizer.ends)[0, len(ids) :]
    assert (code, out) == (0, tokenizer.decode([i for i in written if i not in tokenizer.ends]) + "\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_utf_8_is_told_and_spoils_no_other(chatty, errors):
    process = start(chatty, "chat", "--base", "chatty", "--max-new-tokens", "2", stdin=subprocess.PIPE,
                    PYTHONIOENCODING=f"utf-8:{errors}")  # fmt: skip
    process.stdin.buffer.write(b"the dog\n\xff\r\nthe fox")
    code, out, err = finish(process)
    assert code == 0 and out.count("\n") >= 2 and "Traceback" not in err
    assert "(the message is not UTF-8: character 1 is '\\udcff')" in err


@pytest.mark.skipif(os.name != "posix", reason="opens a pseudo-terminal")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_conversation(chatty):
    import pty

    ours, theirs = pty.openpty()
    ask = ["chat", "--base", "chatty", "--max-new-tokens", "200", "--temperature", "2"]
    process = start(chatty, *ask, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""

    def until(mark, least=0):
        nonlocal shown
        shown = ""
        while mark not in shown or len(shown) < least:
            shown += os.read(ours, 1000).decode(errors="replace")

    until("> ")
    os.write(ours, b"the fox\n")
    until("the fox\r\n", least=60)
    process.send_signal(signal.SIGINT)
    until("> ")
    assert "(stopped; Ctrl-C once more ends" in shown
    os.write(ours, b"/adapter\n")
    until("> ")
    assert "* none" in shown
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_a_folder_that_would_make_a_terminal_obey_is_spelt_out(folder, talk, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "a\x1b[2J")
    _, _, err = talk(["/adapter"], "--base", "base", "--adapter", tmp_path / "a\x1b[2J")
    assert "\x1b" not in err and r"* a\x1b[2J" in err
