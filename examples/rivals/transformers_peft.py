"""transformers and PEFT, eager, opening the folders as their users do. Knows the benchmark's tasks."""

import peft
import torch
import torch.nn.functional as F
import transformers

from .workloads import LR, NEW, adapter_of, trains


def prepare(task, variant, unit):
    """A function that does one unit of `task`. There is one variant, "": attention is transformers' default, sdpa."""
    torch.set_num_threads(unit.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(unit.folder / "base")
    if adapter_of(task):
        folder = unit.folder / adapter_of(task)
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=trains(task))
    model.eval()  # no dropout, as in the other libraries; gradients are made all the same
    inputs, targets, prompt = map(torch.from_numpy, (unit.inputs, unit.targets, unit.prompt))

    def loss_of():  # not labels=...: it would shift them by one more
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    if task == "generate":
        how = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        return lambda: model.generate(input_ids=prompt, attention_mask=mask, **how)[0].tolist()
    if not trains(task):
        return torch.inference_mode()(lambda: loss_of().item())
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0, fused=True)

    def step():
        loss = loss_of()
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step
