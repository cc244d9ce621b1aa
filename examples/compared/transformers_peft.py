"""The tasks of the benchmark in transformers and PEFT, eager, opened as their users do."""

import peft
import torch
import torch.nn.functional as F
import transformers

from .torch_by_hand import peak_memory, training
from .workloads import adapter_of, trains

__all__ = ["peak_memory", "prepare"]


def prepare(task, variant, job):
    """A function that does one unit of `task`.

    `variant` is "", or "merged" for writing with the adapter merged into the weights, or "tf32",
    which rounds the factors of a GPU's products. Attention is transformers' default, sdpa.
    """
    torch.backends.cuda.matmul.allow_tf32 = variant == "tf32"
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(job.folder / "base")
    adapter = adapter_of(task)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(
            model, job.folder / adapter, is_trainable=trains(task)
        )
    # No dropout, as in the other libraries. Gradients are computed all the same.
    model.eval().to(job.device)
    if task == "generate":
        if variant == "merged":
            model = model.merge_and_unload()
        return generation(model, torch.from_numpy(job.prompt).to(job.device), job.new)

    inputs = torch.from_numpy(job.inputs).to(job.device)
    targets = torch.from_numpy(job.targets).to(job.device)

    def loss_of():
        # Not labels=...: it would shift the targets by one more.
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    if trains(task):
        return training(model, loss_of)
    return torch.inference_mode()(lambda: loss_of().item())


def generation(model, prompt, n_tokens):
    """A function that writes `n_tokens` after `prompt`, greedily."""
    mask = torch.ones_like(prompt)

    def write():
        ids = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=n_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return ids[0].tolist()

    return write
