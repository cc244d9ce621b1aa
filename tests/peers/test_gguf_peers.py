"""GGUF files as transformers imports them, asked live: the same tensors to the bit, the same ids, the same fields."""

import json

import numpy as np
import pytest
from gguf_files import (
    byte_level_settings,
    permuted,
    sentencepiece_settings,
    settings_of,
    write_gguf,
    write_sentencepiece_base,
)

from minilora.disk.gguf import gguf_fields, gguf_tokenizer, load_gguf
from minilora.disk.gguf_companions import gguf_companions
from minilora.disk.tokenizer import load_tokenizer

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=WHY, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=WHY, exc_type=ImportError)


# transformers' import reads no length of a head for a qwen3, and takes 128.
SETTINGS = {name: settings_of(name) for name in ("llama", "qwen2", "qwen3")}
SETTINGS["qwen3"] |= {f"qwen3.attention.{part}_length": 128 for part in ("key", "value")}


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    transformers.utils.logging.disable_progress_bar()


def imported(path):
    """What transformers makes of a GGUF file: a model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def differing(path):
    """The names of the tensors that are not transformers' to the bit."""
    theirs = {name: tensor.numpy() for name, tensor in imported(path).state_dict().items()}
    ours = {name: x if isinstance(x, np.ndarray) else x.data for name, x in load_gguf(path)[1].items()}
    # A tied head is listed there beside the embedding it is.
    if "lm_head.weight" not in ours:
        theirs.pop("lm_head.weight")
    unequal = [name for name in theirs if name in ours and not np.array_equal(ours[name], theirs[name])]
    return sorted({*(theirs.keys() ^ ours.keys()), *unequal})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:.*are widened to float32")
def test_every_tensor_is_the_one_that_transformers_imports(architecture, kind, tied, tmp_path):
    write_gguf(tmp_path / "model.gguf", SETTINGS[architecture], kind=kind, tied=tied)
    assert differing(tmp_path / "model.gguf") == []


def test_rows_in_another_order_would_be_noticed(tmp_path):
    """The planted bug: a file whose k was permuted as if it had as many heads as q."""
    values = write_gguf(tmp_path / "model.gguf")
    wrong = permuted(values["model.layers.0.self_attn.k_proj.weight"], 4)
    write_gguf(tmp_path / "other.gguf", extra={"blk.0.attn_k.weight": wrong})
    theirs = imported(tmp_path / "model.gguf").state_dict()["model.layers.0.self_attn.k_proj.weight"].numpy()
    ours = load_gguf(tmp_path / "other.gguf")[1]["model.layers.0.self_attn.k_proj.weight"]
    assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_fields_are_those_of_transformers(architecture, tmp_path):
    write_gguf(tmp_path / "model.gguf", SETTINGS[architecture])
    fields = load_gguf(tmp_path / "model.gguf")[0]
    config = imported(tmp_path / "model.gguf").config
    # They keep the float32 of the file, 9.999999747378752e-06, for 1e-5.
    assert np.float32(config.rms_norm_eps) == np.float32(fields.pop("rms_norm_eps"))
    assert config.rope_parameters == {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    assert fields.pop("rope_scaling") is None
    assert fields.pop("architectures")[0] == type(imported(tmp_path / "model.gguf")).__name__
    theirs = config.to_dict() | {"head_dim": fields["head_dim"] if architecture == "qwen2" else config.head_dim}
    assert {name: theirs.get(name) for name in fields} == fields


@pytest.mark.parametrize("text", ["hello world", "it's <|im_end|> x\n", "he</s>hello  there", "ünï 😀", ""])
@pytest.mark.parametrize("kind", ["qwen2", "gpt-2", "sentencepiece"])
def test_texts_become_the_ids_that_transformers_import_gives(kind, text, tmp_path):
    if kind == "sentencepiece" and "</s>" in text:
        pytest.skip("llama.cpp puts a space before the text behind a control token, transformers' import none")
    pieces = ["▁t", "he", "▁the", "re", "▁he", "ll", "▁hell", "▁hello", "▁▁", "▁", *"ethrlo<s/>"]
    architecture = "qwen2" if kind == "qwen2" else "llama"
    vocabulary = sentencepiece_settings(pieces) if kind == "sentencepiece" else byte_level_settings(kind)
    write_gguf(tmp_path / "model.gguf", settings_of(architecture, vocabulary))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = gguf_tokenizer(tmp_path / "model.gguf")[0]
    assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("beside", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_as_in_transformers(tmp_path, adds, beside):
    path = write_sentencepiece_base(tmp_path / "a.gguf", ggml__add_bos_token=adds)
    for name, content in gguf_companions(path).items():
        (tmp_path / name).write_bytes(content)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | beside))
    (tmp_path / "config.json").write_text(json.dumps(gguf_fields(path)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("cap of", " of", "ca p", "x\n y"):
        for ours in (load_tokenizer(path), load_tokenizer(tmp_path)):
            assert ours.begun(ours.encode(text)).tolist() == theirs(text)["input_ids"]
