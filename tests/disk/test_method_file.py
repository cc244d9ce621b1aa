"""(IA)³ and prompts in PEFT's layout: there and back to the bit, and refused where they mean something else."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import bits, close, small_llama, tiny_gpt

from minilora import (
    LoRAConfig,
    attach,
    init_adapter,
    init_bias_only,
    init_bottleneck,
    init_ia3,
    init_prefix,
    init_prompt,
    load_adapter,
    load_method,
    save_method,
)
from minilora.disk.tensor_file import DIGESTS
from minilora.graph import no_grad
from minilora.ia3 import Factors
from minilora.method import Method
from minilora.tensor import Tensor

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = np.array([[1, 2, 3, 4]])
P = "base_model.model."
BASES = {"rotary gpt": lambda: tiny_gpt("rope", dtype="float32"), "gpt-2": lambda: tiny_gpt(dtype="float32"),
         "llama": small_llama}  # fmt: skip
METHODS = {"ia3": init_ia3, "prompt": lambda base, rng: init_prompt(base, 3, rng)}
every_base = pytest.mark.parametrize("base", BASES)
every_method = pytest.mark.parametrize("method", METHODS)


def rng():
    return np.random.default_rng(4)


def learned(method):
    drawn = rng()
    for p in method.parameters():
        p.data *= drawn.uniform(0.6, 1.6, p.shape).astype(p.dtype)
    return method


def saved(method, base, folder):
    base = BASES[base]()
    made = learned(METHODS[method](base, rng()))
    save_method(made, folder)
    return base, made


def quietly(folder, base):
    return load_method(folder, base, say=lambda receipt: None)


def outputs(model):
    with no_grad():
        return model(IDS).data


def fields(folder, **changes):
    """The fields of the folder's configuration; `changes` are written, None takes a field out."""
    read = json.loads((folder / CONFIG).read_text())
    if changes:
        # As another program writes: without our metadata.
        save_file(load_file(folder / TENSORS), folder / TENSORS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in (read | changes).items() if v is not None}))
    return read


def change(folder, edit):
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


@every_base
@every_method
def test_it_comes_back_to_the_bit_and_computes_the_same_bits(method, base, tmp_path):
    base, made = saved(method, base, tmp_path)
    again = quietly(tmp_path, base)
    assert bits(again) == bits(made) and again.base_fingerprint == made.base_fingerprint
    assert np.array_equal(outputs(attach(base, again)), outputs(attach(base, made)))
    assert not np.array_equal(outputs(attach(base, made)), outputs(base))


@every_base
@every_method
def test_also_after_another_program_has_dropped_our_metadata(method, base, tmp_path):
    base, made = saved(method, base, tmp_path)
    change(tmp_path, lambda tensors: None)
    said = []
    again = load_method(tmp_path, base, say=said.append)
    assert "UNVERIFIED" in said[0] and "all used" in said[0]
    assert close(outputs(attach(base, again)), outputs(attach(base, made)), 1e-6)


def test_the_files_are_as_peft_has_them(tmp_path):
    base, made = saved("ia3", "gpt-2", tmp_path / "ia3")
    tensors = load_file(tmp_path / "ia3" / TENSORS)
    shapes = {key: t.shape for key, t in tensors.items() if ".h.0." in key}
    assert shapes == {f"{P}transformer.h.0.attn.c_attn.ia3_l": (24, 1), f"{P}transformer.h.0.mlp.c_proj.ia3_l": (1, 32)}
    rows = tensors[f"{P}transformer.h.0.attn.c_attn.ia3_l"].reshape(3, 8)
    assert (rows[0] == 1).all() and np.array_equal(rows[1], made.parts["h.0.attn.k_proj"].ia3_l.data)
    written = fields(tmp_path / "ia3")
    assert written["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert written["feedforward_modules"] == ["mlp.c_proj"] and written["fan_in_fan_out"] is True
    saved("prompt", "llama", tmp_path / "prompt")
    assert {key: t.shape for key, t in load_file(tmp_path / "prompt" / TENSORS).items()} == {
        "prompt_embeddings": (3, small_llama().embed_tokens.weight.shape[1])}  # fmt: skip
    assert fields(tmp_path / "prompt")["num_virtual_tokens"] == 3


@pytest.mark.parametrize("method, base, edit, shown", [
    ("ia3", "llama", {"feedforward_modules": []}, r"down_proj\.ia3_l is \(1, \d+\), but the base and feedforward_mod"),
    ("ia3", "llama", {"target_modules": ["k_proj", "down_proj"]}, "superfluous: model.layers.0.self_attn.v_proj"),
    ("ia3", "llama", {"target_modules": None}, "no target_modules"),
    ("ia3", "llama", {"modules_to_save": ["norm"]}, "modules_to_save=.*not supported"),
    ("ia3", "llama", {"quantum": 3}, "quantum=3 changes what the method computes"),
    ("ia3", "gpt-2", {"feedforward_modules": ["c_attn", "mlp.c_proj"]}, "the inputs of .*c_attn are scaled"),
    ("ia3", "llama", {"peft_type": "VERA"}, "peft_type is 'VERA'; load_method reads 'IA3' and 'PROMPT_TUNING'"),
    ("prompt", "llama", {"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, \d+\), not \(4, \d+\)"),
    ("prompt", "llama", {"num_virtual_tokens": None}, "do not match"),
    ("prompt", "llama", {"token_dim": 7}, r"not \(3, 7\)"),
    ("prompt", "llama", {"num_transformer_submodules": 2}, "num_transformer_submodules=2 is not supported"),
])  # fmt: skip
def test_a_configuration_that_means_something_else_is_refused(method, base, edit, shown, tmp_path):
    base, _ = saved(method, base, tmp_path)
    fields(tmp_path, **edit)
    with pytest.raises(ValueError, match=f"(?s){shown}"):
        quietly(tmp_path, base)


KEY = f"{P}model.layers.0.self_attn.k_proj.ia3_l"


@pytest.mark.parametrize("method, edit, shown", [
    ("ia3", lambda t: t.update({KEY.replace("k_proj", "o_proj"): t[KEY]}), "superfluous: .*o_proj"),
    ("ia3", lambda t: t.update({KEY.replace("k_proj", "r_proj"): t[KEY]}), "superfluous: .*r_proj"),
    ("ia3", lambda t: t.pop(KEY), "absent: model.layers.0.self_attn.k_proj"),
    ("ia3", lambda t: t.update({KEY: t[KEY].T.copy()}), r"k_proj.ia3_l is \(1, 4\), but"),
    ("ia3", lambda t: t.update({KEY.removeprefix(P): t.pop(KEY)}), "is not base_model.model.<module>.ia3_l"),
    ("ia3", lambda t: t[KEY].fill(np.inf), "no inf or nan"),
    ("ia3", lambda t: t.clear(), "holds no tensor"),
    ("prompt", lambda t: t.update(more=np.ones(3, "f4")), "superfluous: more"),
    ("prompt", lambda t: t.update(prompt_embeddings=np.ones((3, 5), "f4")), "do not match"),
    ("prompt", lambda t: t.clear(), "absent: prompt_embeddings"),
    ("prompt", lambda t: t["prompt_embeddings"].fill(np.nan), "no inf or nan"),
])  # fmt: skip
def test_wrong_tensors_are_refused(method, edit, shown, tmp_path):
    base, _ = saved(method, "llama", tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=f"(?s){shown}"):
        quietly(tmp_path, base)


@every_method
def test_it_is_refused_on_another_base(method, tmp_path):
    saved(method, "gpt-2", tmp_path)
    with pytest.raises(ValueError, match="made for"):
        quietly(tmp_path, tiny_gpt(seed=5, dtype="float32"))


@pytest.mark.parametrize("make", [
    init_bias_only, lambda base: init_bottleneck(base, 2, rng()), lambda base: init_prefix(base, 2, rng()),
])  # fmt: skip
def test_a_method_without_a_layout_of_its_own_in_peft_is_refused(make, tmp_path):
    made = make(tiny_gpt())
    kind = type(next(iter(made.parts.values()))).__name__
    with pytest.raises(ValueError, match=f"PEFT has no layout for {kind} as computed here"):
        save_method(made, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_no_method_and_the_other_way_round(tmp_path):
    base, _ = saved("ia3", "gpt-2", tmp_path)
    with pytest.raises(TypeError, match="got Adapter; LoRA and DoRA are saved by save_adapter"):
        save_method(init_adapter(base, LoRAConfig(2, 4, "all-linear"), rng()), tmp_path / "new")
    for method in METHODS:
        saved(method, "gpt-2", tmp_path / method)
        with pytest.raises(ValueError, match="only 'LORA'; use load_method"):
            load_adapter(tmp_path / method, base)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    base = tiny_gpt()
    ones = lambda: Tensor(np.ones(8), requires_grad=True)
    with pytest.raises(ValueError, match=r"h\.0\.attn\.q_proj scale their inputs.*scale their outputs"):
        save_method(Method({"h.0.attn.q_proj": Factors(ones(), True)}, base.fingerprint()), tmp_path)
    made = init_ia3(base)
    made.parameters()[0].data[0] = np.nan
    with pytest.raises(ValueError, match=r"h\.0\.attn\.k_proj\.ia3_l holds inf or nan"):
        save_method(made, tmp_path)


@pytest.mark.parametrize("parts", [5, [], ["h.9.attn.k_proj"], "h.0.attn.k_proj", {"h.0.attn.k_proj": 1}, [5]])
def test_metadata_that_name_no_modules_of_the_file_are_refused(parts, tmp_path):
    base, _ = saved("ia3", "gpt-2", tmp_path)
    note = {"minilora.adapter": json.dumps({"parts": parts})}
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, note)
    with pytest.raises(ValueError, match=r"its minilora\.adapter: parts must be a list of some of h\.0.*save it again"):
        quietly(tmp_path, base)


def test_factors_for_a_part_that_was_not_learned_are_noticed(tmp_path):
    base, _ = saved("ia3", "gpt-2", tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / TENSORS, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / TENSORS)
    tensors[f"{P}transformer.h.0.attn.c_attn.ia3_l"][0] = 2
    del metadata[DIGESTS]
    save_file(tensors, tmp_path / TENSORS, metadata)
    with pytest.raises(ValueError, match=r"has factors for h\.0\.attn\.q_proj, which its metadata say was not learned"):
        quietly(tmp_path, base)
