"""The README.md beside an adapter: what it is, how it was made, how well it did, how to load it."""

from __future__ import annotations

from typing import Any

CARD = """---
library_name: peft
tags: [surm-seg, segmentation, computed-tomography]
---

# {structure} adapter for {backbone}

Research use only; not a medical device.

| | parameters |
|---|---|
| encoder adapter | {encoder_adapter:,} |
| decoder | {decoder:,} |
| whole model | {model:,} |

Segments {organs} on axial CT slices of {image_size} x {image_size} pixels, window {window} HU. Trained on
{train_cases} cases ({data_format} layout, data set {data_sha256}), checkpoint chosen on {validation_cases} validation
cases.
Mean Dice over the {scored} cases: {dice}.

## Load

```python
import surm_seg  # registers the adapter type with PEFT; without it loading fails with a KeyError
from pipelines.inference import load_run

segment = load_run(run_folder, device="cpu")  # backbone, adapter merged; call it with a volume (z, y, x) in HU
```

`peft.PeftModel.from_pretrained(backbone_model, adapter_folder)` works as well, after `import surm_seg`.
"""


def model_card(facts: dict[str, Any], config: dict[str, Any], dice: float | None) -> str:
    """Markdown for these facts (run.json), options (config.yaml) and mean Dice of the scored cases."""
    parameters = facts["parameters"]
    return CARD.format(
        structure=config["structure"],
        backbone=config["backbone"],
        organs=", ".join(facts["labels"]),
        image_size=config["image_size"],
        window=list(config["window"]),
        train_cases=len(facts["train_cases"]),
        validation_cases=len(facts["validation_cases"]),
        data_format=facts["data_format"],
        data_sha256=facts["data_sha256"][:12],
        scored="held-out test" if config["score_on"] == "test" else "training",
        dice="undefined" if dice is None else f"{dice:.4f}",
        **parameters,
    )
