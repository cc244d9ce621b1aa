"""The tasks of the benchmark in transformers and PEFT, eager, opened as their users do."""

import peft
import torch
import torch.nn.functional as F
import transformers

from .torch_by_hand import training
from .workloads import NEW, adapter_of, trains


def prepare(task, variant, job):
    """A function that does one unit of `task`.

    There is one variant, "": attention is transformers' default, sdpa.
    """
    torch.set_num_threads(job.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(job.folder / "base")
    adapter = adapter_of(task)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(
            model, job.folder / adapter, is_trainable=trains(task)
        )
    # No dropout, as in the other libraries. Gradients are computed all the same.
    model.eval()
    if task == "generate":
        return generation(model, torch.from_numpy(job.prompt))

    inputs = torch.from_numpy(job.inputs)
    targets = torch.from_numpy(job.targets)

    def loss_of():
        # Not labels=...: it would shift the targets by one more.
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    if trains(task):
        return training(model, loss_of)
    return torch.inference_mode()(lambda: loss_of().item())


def generation(model, prompt):
    """A function that writes NEW tokens after `prompt`, greedily."""
    mask = torch.ones_like(prompt)

    def write():
        ids = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return ids[0].tolist()

    return write
