"""One small input of every kind that the program reads, of most kinds two: what fuzz.py spoils and kills.py works on.

Models have two blocks of 8 channels and about 280 tokens, a GGUF's 32 channels. Whoever calls `write_all` twice gets
the same bytes twice.
"""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
from gguf_files import sentencepiece_settings, settings_of, write_gguf

from minilora import GPT, Adam, GPTConfig, LoRAConfig, init_adapter, init_dora, save_adapter, save_model
from minilora.cli.main import main
from minilora.llama import Llama, LlamaConfig

GOLDEN = Path(__file__).resolve().parent / "golden"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog.\n\nThe list of dogs: 1 + 1 = 2, fox\n" * 8
ROWS = [("Q: one?\nA:", " first"), ("Q: two?\nA:", " second"), ("Q: three?\nA:", " third"), ("Q: four?\nA:", " last")]
# The pieces of a SentencePiece: each longer one is made of two shorter ones.
PIECES = ["▁", "t", "h", "e", "o", "n", "▁t", "he", "on", "▁the", "▁on"]
MERGES = [("▁", "t"), ("h", "e"), ("o", "n"), ("▁t", "he"), ("▁", "on")]
GPT_SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 128}
LLAMA_SHAPE = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 2, "max_position_embeddings": 128}  # fmt: skip
SETTINGS = """base = "gpt2"
data = "q.jsonl"
alpha = 4
r = 2
steps = 2
lr = 1e-3
target = ["q_proj", "up_proj"]
schedule = "linear"

[rank-pattern]
"h.1.mlp.up_proj" = 1
"""
# The words of a run with checkpoints, evaluations and a log.
RUN = ("finetune", "--base", "gpt2", "--data", "q.jsonl", "--out", "run", "--alpha", "4", "--r", "2", "--steps", "5",
       "--batch", "2", "--save-every", "2", "--eval-split", "0.25", "--eval-every", "2", "--log", "log.jsonl",
       "--dropout", "0.1", "--parts", "2", "--threads", "1")  # fmt: skip
# And those of a short one, into a folder that keeps what was there before.
KEPT = ("finetune", "--base", "gpt2", "--data", "q.jsonl", "--out", "kept", "--alpha", "4", "--r", "1", "--steps", "2",
        "--keep", "2", "--parts", "1", "--threads", "1")  # fmt: skip


def write_all(folder):
    """Write everything into `folder`, a Path to a new or empty one."""
    folder.mkdir(exist_ok=True)
    _write_data(folder)
    _write_bases(folder)
    for name in ("c_attn", "old_style", "regex", "patterns", "sharded", "llama/qwen3", "llama/llama_llama3"):
        leave = shutil.ignore_patterns("*.npz")
        shutil.copytree(GOLDEN / name, folder / name.rpartition("/")[2], ignore=leave)
    with inside(folder), _no_place_of_its_own():
        run(RUN, stop=3)
        shutil.move("run", "stopped")
        shutil.move("log.jsonl", "stopped.jsonl")
        run(RUN)
        for seed in range(2):
            run([*KEPT, "--seed", str(seed)])
        shutil.move("run", "done")
        shutil.move("log.jsonl", "done.jsonl")
        shutil.move("stopped", "run")
        shutil.move("stopped.jsonl", "log.jsonl")


@contextlib.contextmanager
def _no_place_of_its_own():
    """What a run notes of the folder that it was started in is true wherever its files are copied."""
    true_getcwd = os.getcwd
    os.getcwd = lambda: "."
    try:
        yield
    finally:
        os.getcwd = true_getcwd


def _write_data(folder):
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "t.txt").write_text(TEXT, encoding="utf-8")
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in ROWS]
    chats = [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
             for prompt, answer in ROWS]  # fmt: skip
    for name, lines in (("q.jsonl", rows), ("chats.jsonl", chats)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = Path(__file__).resolve().parent.parent / "examples" / "results" / "rank.json"
    shutil.copy(results, folder / "rank.json")
    os.mkfifo(folder / "pipe")


def _write_bases(folder):
    byte_level, pieces = byte_level_tokenizer(), sentencepiece_tokenizer()
    size = byte_level.get_vocab_size()
    bases = {
        "gpt2": gpt(0, vocab_size=size),
        "gpt2two": gpt(1, vocab_size=size),
        "llama": llama(2, vocab_size=pieces.get_vocab_size()),
        "llamatwo": llama(5, vocab_size=pieces.get_vocab_size()),
        "characters": gpt(3, vocab_size=96, positions="rope"),
        "characterstwo": gpt(6, vocab_size=96, positions="rope"),
    }
    for name, base in bases.items():
        save_model(base, folder / name)
    for name in ("gpt2", "gpt2two"):
        write_tokenizer(folder / name, byte_level, SPECIALS[0])
    # The older way: without the one file.
    (folder / "gpt2two" / "tokenizer.json").unlink()
    byte_level.model.save(str(folder / "gpt2two"))
    for name in ("llama", "llamatwo"):
        write_tokenizer(folder / name, pieces, "</s>")
    save(random_adapter(bases["gpt2"], 1, r=2), folder / "lora", "gpt2")
    pattern = {"rank_pattern": {r"h\.1\..*": 1}, "alpha_pattern": {"v_proj": 7.0}, "use_rslora": True}
    two = random_adapter(bases["gpt2"], 2, r=3, target_modules=["v_proj", "up_proj"], **pattern)
    save(two, folder / "lora2", "gpt2")
    save(random_adapter(bases["gpt2two"], 5, r=1), folder / "loratwo", "gpt2two")
    config = LoRAConfig(2, 4, ["q_proj", "v_proj"])
    save(filled(init_dora(bases["llama"], config, np.random.default_rng(3)), 3), folder / "dora", "llama")
    save(random_adapter(bases["characters"], 4, r=2), folder / "letters", "characters")
    for seed, name in enumerate(("a.gguf", "b.gguf")):
        write_small_gguf(folder / name, settings_of(), seed)
    # The vocabulary of a Llama 2.
    write_small_gguf(folder / "pieces.gguf", settings_of(vocabulary=sentencepiece_settings(PIECES)), 2)


def write_small_gguf(path, settings, seed):
    """A llama of 32 channels with packed matrices and a template of chats."""
    settings |= {"llama.embedding_length": 32, "llama.feed_forward_length": 32, "llama.context_length": 128}
    settings["tokenizer.chat_template"] = TEMPLATE
    write_gguf(path, settings, kind="Q4_1", kinds={"embed": "Q8_0"}, seed=seed)


def byte_level_tokenizer():
    """A byte-level BPE as GPT-2 has one, with three control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, special_tokens=list(SPECIALS),
                                                        initial_alphabet=letters, show_progress=False))  # fmt: skip
    return bpe


def sentencepiece_tokenizer():
    """A SentencePiece with bytes to fall back on, as tokenizer.json has Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocabulary = {text: number for number, text in enumerate(texts)}
    bpe = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return bpe


def write_tokenizer(folder, bpe, end):
    """Write a tokenizer and the settings that stand beside one."""
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": end, "add_bos_token": False, "model_max_length": 128}
    number = bpe.token_to_id(end)
    settings["added_tokens_decoder"] = {
        str(number): {"content": end, "lstrip": False, "normalized": False, "rstrip": False, "special": True}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [number], "do_sample": False}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": end, "lstrip": False}}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def gpt(seed, **shape):
    """A GPT of two blocks in which every number is random."""
    return _jittered(GPT(GPTConfig(**GPT_SHAPE, **shape), np.random.default_rng(seed)), seed)


def llama(seed, **shape):
    """A Llama of two blocks in which every number is random."""
    return _jittered(Llama(LlamaConfig(**LLAMA_SHAPE, **shape), np.random.default_rng(seed)), seed)


def _jittered(model, seed):
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def random_adapter(base, seed, r, target_modules=("q_proj", "k_proj", "v_proj", "up_proj"), **more):
    """A LoRA of `base` that changes what it computes."""
    config = LoRAConfig(r, 4, list(target_modules), **more)
    return filled(init_adapter(base, config, np.random.default_rng(seed)), seed)


def filled(adapter, seed):
    """`adapter`, with random numbers in every lora_B."""
    rng = np.random.default_rng(seed)
    for pair in adapter.pairs.values():
        pair.lora_B.data += rng.standard_normal(pair.lora_B.shape).astype(pair.lora_B.dtype)
    return adapter


def older_version(folder):
    """What `rollback --to` is given for the version that is kept in `kept`: digits of its digest."""
    (receipt,) = folder.glob("kept/versions/*/receipt.json")
    return json.loads(receipt.read_bytes())["tensors"]["sha256"][:12]


def save(adapter, folder, base):
    """Write an adapter that names its base as it lies beside it."""
    save_adapter(adapter, folder, base_model=base)


@contextlib.contextmanager
def inside(folder):
    """The block runs in `folder`."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def run(words, stop=None):
    """The command of these words, in the working directory; Ctrl-C ends it in its step `stop`."""
    true_step = Adam.step
    n_steps = []

    def step(self, lr):
        true_step(self, lr)
        n_steps.append(1)
        if len(n_steps) == stop:
            raise KeyboardInterrupt

    Adam.step = step
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(list(words))
    finally:
        Adam.step = true_step
    assert code == (0 if stop is None else 130), said.getvalue()
