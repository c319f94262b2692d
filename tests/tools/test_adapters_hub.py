"""Flows saved to, and loaded from, a folder by the Hugging Face Hub's own methods."""

import pytest
import torch
from registry import close, over

import counterflow as cf

hub = pytest.importorskip("huggingface_hub")

FLOWS = {
    "MAF": lambda: cf.MAF(3, layers=2, hidden=(8,)),
    "IAF context": lambda: cf.IAF(3, 2, layers=2, hidden=(8,)),
    "NSF": lambda: cf.NSF(3, layers=1, hidden=(8,)).double(),
}


@over(FLOWS)
def test_save_and_load_a_folder(name, tmp_path):
    from counterflow.interop.hub import HubFlow

    flow = FLOWS[name]()
    folder = tmp_path / "my-flow"
    HubFlow(flow).save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "README.md"}
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "counterflow" and "my-flow" in card.text and "Autoregressive(" in card.text
    again = HubFlow.from_pretrained(folder).flow
    dtype = next(flow.parameters()).dtype
    c = torch.randn(5, 2, dtype=dtype) if flow.context else None
    x = torch.randn(5, 3, dtype=dtype)
    close(again(c).log_prob(x), flow(c).log_prob(x))
    assert isinstance(cf.load(folder / "model.safetensors"), cf.Flow)


def test_something_else_is_refused():
    from counterflow.interop.hub import HubFlow

    with pytest.raises(TypeError, match=r"expected a Flow, such as cf.MAF\(features=3\), got Linear"):
        HubFlow(torch.nn.Linear(2, 2))
