"""This library's own GPTs in files: under their own names, and refused where their configuration is another's."""

import json

import pytest
from safetensors.numpy import load_file, save_file
from strategies import bits, small_gpt

from minilora import load_model, save_model
from minilora.disk.models import families_of
from minilora.disk.own import OWN


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotary_model_comes_back_under_its_own_names(tied, tmp_path):
    model = small_gpt(positions="rope", rope_theta=500.0, n_inner=12, tie_word_embeddings=tied)
    save_model(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "minilora-gpt", **vars(model.config)}
    again = load_model(tmp_path)
    assert bits(again) == bits(model) and again.config == model.config


@pytest.mark.parametrize("change, shown", [
    (lambda c: c.pop("n_layer"), "n_layer"),
    (lambda c: c.pop("model_type"), "no n_positions: this does not describe a GPT-2"),
    (lambda c: c.update(model_type="gpt2"), "no n_positions"),
    (lambda c: c.update(model_type="opt"), "model_type='opt'"),
    (lambda c: c.update(scale_attn="yes"), "unexpected.*scale_attn"),
    (lambda c: c.update(n_head=3), "multiple of n_head 3, got 8"),
    (lambda c: c.update(n_layer=3), "absent: h.2"),
    (lambda c: c.update(n_layer=1), "superfluous: h.1"),
    (lambda c: c.update(positions="learned"), "absent: wpe.weight"),
    (lambda c: c.update(positions="alibi"), "positions.*alibi"),
    (lambda c: c.update(rope_theta="big"), "rope_theta.*big"),
    (lambda c: c.update(tie_word_embeddings=False), "absent: lm_head.weight"),
], ids=lambda value: None if callable(value) else value)  # fmt: skip
def test_a_rotary_model_whose_configuration_is_wrong_is_refused(change, shown, tmp_path):
    save_model(small_gpt(positions="rope"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s){shown}") as refusal:
        load_model(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_a_rotary_gpt_is_known_as_one_of_the_librarys_own():
    assert families_of(small_gpt(positions="rope"))[0] is OWN
    assert OWN.their_name("h.0.attn.q_proj") == "h.0.attn.q_proj" and OWN.their_name("wte") == "wte"
