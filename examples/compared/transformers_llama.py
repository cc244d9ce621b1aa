"""The tasks on a language model in transformers and PEFT, eager, opened as their users do."""

import peft
import torch
import torch.nn.functional as F
import transformers

from .llm_workloads import PROMPT, TRAINING_TASKS, masked
from .torch_by_hand import peak_memory, training

__all__ = ["peak_memory", "prepare"]


def prepare(task, variant, job):
    """A function that does one unit of `task`.

    `variant` is "", or "merged" for writing with the adapter merged into the weights, or "tf32",
    which rounds the factors of a GPU's products. Attention is transformers' default, sdpa.
    """
    torch.backends.cuda.matmul.allow_tf32 = variant == "tf32"
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    prompt = torch.from_numpy(job.inputs[:1, :PROMPT]).to(job.device)
    if task in ("first-token", "shared"):
        return first_token(job, prompt)
    train = task in TRAINING_TASKS
    model = peft.PeftModel.from_pretrained(
        load_base(job), job.folder / "adapter", is_trainable=train
    )
    # No dropout, as in minilora. Gradients are computed all the same.
    model.eval().to(job.device)
    if not train:
        if variant == "merged":
            model = model.merge_and_unload()
        return lambda: write(model, prompt, job.new)

    inputs = torch.from_numpy(job.inputs).to(job.device)
    targets = job.targets
    if task == "answers":
        targets = masked(targets)
    targets = torch.from_numpy(targets).to(job.device)

    def loss_of():
        # Not labels=...: it would shift the targets by one more.
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    return training(model, loss_of)


def load_base(job):
    """The base in float32, as the folder has it. It writes on where a text ends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(job.folder / "base").eval()
    model.generation_config.eos_token_id = None
    return model


def first_token(job, prompt):
    """A function that loads the base, keeps it, and writes one token: the ids of the row."""
    kept = []

    def load_and_write():
        kept.append(load_base(job))
        return write(kept[-1], prompt, 1)

    return load_and_write


def write(model, prompt, n_tokens):
    """`n_tokens` more than `prompt`, greedily: all ids of the row."""
    with torch.inference_mode():
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    return ids[0].tolist()
