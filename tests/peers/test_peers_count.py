"""The shapes of known models beside transformers and PEFT, which build them on torch's meta device."""

import warnings

import pytest

from minilora import LoRAConfig, attach
from minilora.architectures import PRESETS, blank
from minilora.count import n_parameters, parameter_report
from minilora.disk.models import families_of
from minilora.disk.peft import blank_peft_adapter

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")

# A GPT with rotary positions has no class in transformers.
THEIRS = [name for name in PRESETS if name != "minilora-demo"]


def on_meta(model):
    """transformers' model of the same shape, without numbers."""
    fields = families_of(model)[0].write_config(model, {}, "float32")
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_counts_as_many_numbers_in_each_known_model(name):
    model = blank(PRESETS[name])
    assert n_parameters(model) == on_meta(model).num_parameters()


@pytest.mark.parametrize("name, r, targets", [
    ("llama-3.1-8b", 16, ["q_proj", "k_proj", "v_proj", "o_proj"]), ("qwen2.5-0.5b", 4, "all-linear"),
    ("gpt2", 8, ["c_attn"]), ("gpt2", 8, ["c_attn", "c_proj", "c_fc"]),
])  # fmt: skip
def test_peft_counts_as_many_trainable_ones(name, r, targets):
    model = blank(PRESETS[name])
    adapter = blank_peft_adapter(model, LoRAConfig(r=r, alpha=r, target_modules=targets))
    theirs = on_meta(model)
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out, and says so.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    report = parameter_report(attach(model, adapter, check_base=False))
    assert (report.trainable, report.total) == adapted.get_nb_trainable_parameters()
