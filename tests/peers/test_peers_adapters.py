"""What PEFT does with several adapters on one base, asked live: CLAIMS.md tells of it."""

import copy

import pytest

WHY = "not here, so nothing is compared live: pip install -e '.[peers]'"
torch = pytest.importorskip("torch", reason=f"torch is {WHY}")
peft = pytest.importorskip("peft", reason=f"peft is {WHY}")


class Model(torch.nn.Module):
    """One linear, as a module of a model."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.lin(x)


def saved(base, folder, factor):
    """A folder of PEFT's with an adapter of the base that is filled with a factor."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["lin"])
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    for name, p in adapted.named_parameters():
        if "lora" in name:
            p.data.fill_(factor)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_second_adapter_from_pretrained_changes_what_the_first_one_computes(tmp_path):
    torch.manual_seed(0)
    base = Model()
    folders = [saved(base, tmp_path / str(factor), factor) for factor in (1, 2)]
    x = torch.ones(1, 4, dtype=torch.float64)
    plain = base(x).detach()
    first = peft.PeftModel.from_pretrained(base, folders[0])
    alone = first(x).detach()
    # Not even the base is what it was: its layer was replaced in place.
    assert (base(x) == alone).all() and (alone != plain).any()
    second = peft.PeftModel.from_pretrained(base, folders[1])
    assert (first(x) != alone).any()
    assert (first(x) == second(x)).all()
