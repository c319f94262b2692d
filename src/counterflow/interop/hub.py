"""Flows on the Hugging Face Hub: safetensors weights, configuration and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.flows.flow import Flow
from counterflow.io.serialization import load, save

require("huggingface_hub", "hub", "models on the Hugging Face Hub")
from huggingface_hub import ModelHubMixin, hf_hub_download  # noqa: E402

FILE = "model.safetensors"
_CARD = """---
library_name: counterflow
tags:
- normalizing-flow
- counterflow
---

# {title}

A normalizing flow of {features} features{context}, {parameters:,} parameters, saved by Counterflow {version}.

    from counterflow.interop.hub import HubFlow

    flow = HubFlow.from_pretrained("{name}").flow
    q = flow({c})                  # a torch.distributions.Distribution: q.sample((100,)), q.log_prob(x)

## Architecture

```
{flow!r}
```
"""


class HubFlow(ModelHubMixin):  # type: ignore[misc]  # huggingface_hub is not imported by the type checker
    """Flow with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The file is that of `cf.save`: weights and architecture, no pickle. The model card tells the sizes, the architecture
    and how to load it.

    Args:
        flow: the flow.

    Example:
        >>> import tempfile, torch, counterflow as cf
        >>> from counterflow.interop.hub import HubFlow
        >>> folder, flow = tempfile.mkdtemp(), cf.MAF(3, layers=2, hidden=(16,))
        >>> _ = HubFlow(flow).save_pretrained(folder)
        >>> again, x = HubFlow.from_pretrained(folder).flow, torch.randn(5, 3)
        >>> torch.equal(again().log_prob(x), flow().log_prob(x))
        True
    """

    def __init__(self, flow: Flow) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"expected a Flow, such as cf.MAF(features=3), got {type(flow).__name__}")
        self.flow = flow

    def _save_pretrained(self, save_directory: Path) -> None:
        from counterflow import __version__

        save(self.flow, save_directory / FILE)
        name = save_directory.resolve().name
        context = f" given a context of {self.flow.context}" if self.flow.context else ""
        card = _CARD.format(
            title=name,
            name=name,
            features=self.flow.features,
            context=context,
            parameters=sum(p.numel() for p in self.flow.parameters()),
            version=__version__,
            c="c" if self.flow.context else "",
            flow=self.flow,
        )
        (save_directory / "README.md").write_text(card, "utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubFlow:
        path = Path(model_id) / FILE
        if not path.parent.is_dir():
            known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            path = Path(hf_hub_download(model_id, FILE, **{key: options[key] for key in known if key in options}))
        return cls(load(path))
