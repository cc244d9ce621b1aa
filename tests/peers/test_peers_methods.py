"""(IA)³ and prompt tuning beside PEFT, asked live: pip install -e '.[peers]'. On a GPT-2 and on a Llama, in float64."""

import numpy as np
import pytest

from minilora import attach, init_ia3, init_prompt, load_method, load_model, merge, save_method
from minilora.disk import method_file
from minilora.quant import widen

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")
st = pytest.importorskip("safetensors.torch", reason=f"safetensors.torch is {WHY}")

from asking import adapted, different, files_of, loss_of, same_bits, same_dict, same_numbers, theirs  # noqa: E402
from asking import logits as all_logits  # noqa: E402
from test_peers_dora import make_base, ours  # noqa: E402
from wide import wide  # noqa: E402

QUIET = {"say": lambda line: None}
IA3 = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}
CASES = {f"{kind} {method}": (kind, method) for kind in IA3 for method in ("ia3", "prompt")}
every_case = pytest.mark.parametrize("kind, method", CASES.values(), ids=CASES)


@pytest.fixture
def rng():
    """Seeded: every test draws the same numbers each time."""
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def float64_throughout(one_thread):
    with wide():
        yield


def logits(model, ids):
    """Those of the real tokens: PEFT gives some for the prompt as well."""
    return all_logits(model, ids)[:, -ids.shape[1] :]


def make_peft(kind, method, base, folder, rng):
    """What PEFT writes for the model in `base`, with random numbers in it; returns the folder."""
    model = theirs(base, None)
    if method == "ia3":
        config = peft.IA3Config(task_type="CAUSAL_LM", **IA3[kind])
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(rng.uniform(0.4, 1.6, tuple(p.shape))))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def check_from_peft(tmp_path, rng, kind, method):
    folder, ids = make_base(kind, tmp_path / "base", rng), rng.integers(0, 13, (2, 7))
    make_peft(kind, method, folder, tmp_path / "first", rng)
    base = ours(folder)
    made = load_method(tmp_path / "first", base, **QUIET)
    model, there = attach(base, made), adapted(folder, tmp_path / "first", is_trainable=method == "ia3")
    same_numbers(logits(model, ids), logits(there, ids), 1e-10)
    different(logits(model, ids), logits(base, ids))
    save_method(load_method(tmp_path / "first", load_model(folder), **QUIET), tmp_path / "second")
    same_bits(files_of(tmp_path / "second"), files_of(tmp_path / "first"))
    return base, made, model, there, ids


@every_case
def test_what_peft_wrote_computes_the_same_and_comes_back_the_same(tmp_path, rng, kind, method):
    base, made, model, there, ids = check_from_peft(tmp_path, rng, kind, method)
    if method == "ia3":
        loss, their_loss = model.loss(ids[:, :-1], ids[:, 1:]), loss_of(there, ids)
        loss.backward()
        their_loss.backward()
        same_numbers(loss.data, their_loss.detach(), 1e-12, "loss")
        save_method(made.map_tensors(lambda t: type(t)(t.grad)), tmp_path / "gradients")
        wanted = {key.replace(".default", ""): p.grad for key, p in there.named_parameters() if p.requires_grad}
        same_dict(files_of(tmp_path / "gradients"), wanted, 1e-9)
        same_numbers(logits(merge(model), ids), logits(there.merge_and_unload(), ids), 1e-10)


@every_case
def test_what_is_made_here_is_the_same_in_peft(tmp_path, rng, kind, method):
    folder, ids = make_base(kind, tmp_path / "base", rng), rng.integers(0, 13, (2, 7))
    base = widen(load_model(folder)).astype("float64")
    made = init_ia3(base, rng) if method == "ia3" else init_prompt(base, 4, rng)
    for p in made.parameters():
        # PEFT keeps a prompt in float32.
        p.data[...] = (p.data * rng.uniform(0.5, 1.5, p.shape)).astype("float32")
    save_method(made, tmp_path / "made")
    there = adapted(folder, tmp_path / "made")
    same_numbers(logits(there, ids), logits(attach(base, made), ids), 1e-10)
    different(logits(attach(base, made), ids), logits(base, ids))


def test_parts_in_another_order_are_noticed(tmp_path, rng, monkeypatch):
    real = method_file._joined
    monkeypatch.setattr(method_file, "_joined", lambda modules, factors: real(modules[::-1], factors))
    with pytest.raises(AssertionError):
        test_what_is_made_here_is_the_same_in_peft(tmp_path, rng, "gpt2", "ia3")
