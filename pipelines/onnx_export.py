"""A run's model as ONNX: normalised pixels in, class logits out, kept only when ONNX Runtime agrees with torch.

FOLDER/model.onnx   the graph and its weights (above 2 GB, which the format cannot hold, the weights in model.onnx.data)
      /model.json   classes, window, mean and standard deviation, steps before and after, versions, digests
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from jaxtyping import Float
from onnxscript import ir
from torch import Tensor, nn

from pipelines import exported
from pipelines.inference import Trained
from surm_seg.errors import SurmError
from surm_seg.volume import file_digest

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the logits' range."""

NEAR_TIES = 1e-5
"""Share of pixels whose two best logits may be so close that rounding decides between them."""


@dataclass(frozen=True)
class Agreement:
    """ONNX Runtime against torch.

    Args:
        difference: largest, as a share of the logits' range.
        other_pixels: share whose most likely class is another.
        slices: how many were compared.
    """

    difference: float
    other_pixels: float
    slices: int


def write(run: Path, trained: Trained, folder: Path) -> str:
    """Fill a folder; returns a sentence about the comparison. Raises SurmError where ONNX Runtime computes another."""
    pixels = exported.slices(trained.input)
    model = graph(trained.model, pixels[:2])
    file = folder / "model.onnx"
    model.save(str(file))
    found = agreement(trained.model, file, pixels)
    if found.difference >= TOLERANCE or found.other_pixels > NEAR_TIES:
        raise SurmError(
            "export-differs",
            f"ONNX Runtime's logits differ by {found.difference:.1e} of their range, and its classes at "
            f"{found.other_pixels:.1e} of the pixels; nothing was written. Report the backbone.",
        )
    exported.write_json(folder / "model.json", _facts(trained, folder, model.model, found))
    return (
        f"ONNX Runtime agrees with torch on {found.slices} slices: largest difference {found.difference:.1e} of the "
        f"logits' range, another class at {100 * found.other_pixels:.2g} % of the pixels."
    )


def graph(model: nn.Module, pixels: Float[Tensor, "batch 3 size size"]) -> torch.onnx.ONNXProgram:
    """The model for batches of any size, without the source paths that the exporter notes at every node."""
    batch = torch.export.Dim("batch")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells that torchvision's operators are absent; no backbone uses them
    try:
        with warnings.catch_warnings(action="ignore"):
            found = torch.onnx.export(
                model,
                (pixels,),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
            )
    finally:
        logger.setLevel(level)
    assert found is not None
    if isinstance(_shape(found.model.graph.inputs[0])[0], int):
        raise SurmError("export-batch", "The exported graph takes one batch size only; report the backbone.")
    _forget_sources(found.model)
    return found


def agreement(model: nn.Module, file: Path, pixels: Float[Tensor, "batch 3 size size"]) -> Agreement:
    """Compare on all slices, the first alone and the rest as one batch."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    parts = pixels.split([1, len(pixels) - 1])
    with torch.inference_mode():
        ours = torch.cat([model(part) for part in parts])
    theirs = torch.cat([torch.from_numpy(session.run(None, {"pixels": part.numpy()})[0]) for part in parts])
    difference = (ours - theirs).abs().max() / (ours.max() - ours.min())
    other = (ours.argmax(1) != theirs.argmax(1)).double().mean()
    return Agreement(difference.item(), other.item(), len(pixels))


def _facts(trained: Trained, folder: Path, model: ir.Model, found: Agreement) -> dict[str, Any]:
    facts = exported.description(trained)
    facts["tensors"] = {
        value.name: {"dtype": "float32", "shape": _shape(value)}
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    facts["opset"] = model.opset_imports[""]
    facts["agreement"] = asdict(found)
    facts["sha256"] |= {file.name: file_digest(file) for file in sorted(folder.glob("model.onnx*"))}
    facts["versions"] |= {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    return facts


def _shape(value: ir.Value) -> list[int | str]:
    """Numbers, and the name of the dimension that is free."""
    assert value.shape is not None
    return [size if isinstance(size, int) else str(size) for size in value.shape]


def _forget_sources(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
