"""Fine-tuning methods that are more than one line of SurmConfig.

LoRA       SurmConfig(structure="low_rank", options={"rank": 4}, parts=["q", "v"])
Houlsby    SurmConfig(form="bottleneck", options={"width": 64}, parts=["out", "mlp_out"])
BitFit     bitfit(model)
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from surm_seg.errors import BadConfig
from surm_seg.tuner import SurmConfig


def bitfit(model: nn.Module, **rest: Any) -> SurmConfig:
    """Train the bias of every Linear, norm and convolution of the model and nothing else (arXiv 2106.10199).

    Biases under other names, such as those of torch's own attention and recurrent layers, stay frozen.

    Args:
        **rest: further fields of SurmConfig, such as modules_to_save for a new head.

    Raises:
        BadConfig: a model without any bias.
    """
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    # A bias of a module that holds others is another name for one of theirs, as in BERT's prediction head.
    biased = [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and next(module.children(), None) is None
        and not any(name.startswith(f"{outer}.") for outer in inside)
    ]
    if not biased:
        raise BadConfig("adapter-target", f"{type(model).__name__} has no bias to train; choose another method.")
    return SurmConfig(form="bias", target_modules="|".join(biased), **rest)
