"""A run as a MONAI bundle: weights in safetensors, the rest in MONAI's own configuration; it needs surm-seg to run.

FOLDER/configs/metadata.json, inference.json
      /models/model.safetensors
      /docs/README.md
      /LICENSE
"""

from __future__ import annotations

import inspect
from dataclasses import asdict
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedConfig

from pipelines import exported
from pipelines.bundle_parts import network
from pipelines.inference import Trained
from pipelines.recipes import Config
from surm_seg.errors import SurmError

VERSION = "1.0.0"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
REQUIRED = ("surm-seg", "segment-anything", "transformers", "peft", "safetensors", "nibabel")


def write(run: Path, trained: Trained, folder: Path) -> str:
    """Fill a folder; returns a sentence. Raises SurmError where the network it describes computes anything else."""
    config = Config.from_stored(yaml.safe_load((run / "config.yaml").read_text()))
    build = {
        "backbone": config.backbone,
        "options": options(trained.model, config),
        "classes": len(trained.labels),
        "image_size": config.image_size,
    }
    weights = folder / "models" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(save({name: value.contiguous() for name, value in trained.model.state_dict().items()}))
    pixels = exported.slices(trained.input)
    with torch.inference_mode():
        ours, theirs = trained.model(pixels), network(str(weights), **build)(pixels)
    if not torch.equal(ours, theirs):
        raise SurmError("export-differs", "The bundle's network differs from the run's; report the backbone.")
    exported.write_json(folder / "configs" / "inference.json", inference(trained, build))
    exported.write_json(folder / "configs" / "metadata.json", metadata(trained, ours.shape[-1]))
    (folder / "docs").mkdir()
    (folder / "docs" / "README.md").write_text(readme(trained))
    (folder / "LICENSE").write_text(distribution("surm-seg").read_text("licenses/LICENSE") or "")
    return f"Its network answers as the run's on {len(pixels)} slices, bit for bit; docs/README.md says how to run it."


def options(model: nn.Module, config: Config) -> dict[str, Any]:
    """The backbone's options that give a model of this shape without the file or folder its weights came from.

    A transformers encoder that was loaded from a folder knows its own configuration.
    """
    own = getattr(getattr(model, "encoder", None), "config", None)
    if own is None:
        return config.backbone_options
    of_all, of_this = (inspect.signature(kind).parameters for kind in (PreTrainedConfig, type(own)))
    names = [name for name in of_this if name not in of_all and not name.startswith("_")]
    return {"family": own.model_type, **{name: getattr(own, name) for name in names}}


def inference(trained: Trained, build: dict[str, Any]) -> dict[str, Any]:
    """configs/inference.json: a folder of volumes in, a label map on each volume's own grid out."""
    reader = {"_target_": "LoadImaged", "keys": "image", "reader": "pipelines.bundle_parts.VolumeReader"}
    return {
        "imports": ["$import torch", "$from pathlib import Path", "$from surm_seg.volume import volumes_in"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "pipelines.bundle_parts.network",
            "weights": "$@bundle_root + '/models/model.safetensors'",
            **build,
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {**reader, "ensure_channel_first": True},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS", "labels": None},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': str(path)} for path in volumes_in(Path(@dataset_dir)) if path.is_file()]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "pipelines.bundle_parts.VolumeInferer",
            "labels": list(trained.labels),
            "precision": trained.precision,
            "input": asdict(trained.input),
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "",
                    "output_dtype": "$torch.uint8",
                    "separate_folder": False,
                    "writer": "pipelines.bundle_parts.LabelWriter",
                    "print_log": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "pipelines.bundle_parts.Evaluator",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def metadata(trained: Trained, logits_side: int) -> dict[str, Any]:
    """configs/metadata.json: what the network takes and gives, and the versions it was made with."""
    names = ["background", *trained.labels]
    above = trained.input.channels == "neighbours"
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: "exported by surm-seg"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in REQUIRED},
        "supported_apps": {},
        "name": "CT organ segmentation",
        "task": "Segmentation of CT volumes, slice by slice",
        "description": f"Label maps of {', '.join(trained.labels)}.",
        "authors": "not stated",
        "copyright": "not stated",
        "data_type": "nibabel",
        "image_classes": "CT in HU",
        "pred_classes": ", ".join(f"{value} {name}" for value, name in enumerate(names)),
        "intended_use": "Research; not a medical device.",
        "surm_seg": exported.description(trained),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": 3,
                    "spatial_shape": [trained.input.image_size] * 2,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(c): f"slice z{c - 1:+d}" if above else "slice z" for c in range(3)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "logits",
                    "num_channels": len(names),
                    "spatial_shape": [logits_side] * 2,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(value): name for value, name in enumerate(names)},
                }
            },
        },
    }


def readme(trained: Trained) -> str:
    """docs/README.md."""
    classes = "\n".join(f"| {value} | {name} |" for value, name in enumerate(trained.labels, 1))
    numbered = "\n".join(f"{n}. {step}" for n, step in enumerate(exported.steps(trained.input), 1))
    return README.format(version=version("surm-seg"), monai=version("monai"), classes=classes, steps=numbered)


README = """# CT organ segmentation

A model that surm-seg {version} trained, as a MONAI bundle. For research; not a medical device.

The bundle needs the package surm-seg, which builds the network and brings MONAI (made with {monai}), and `fire` for
MONAI's command line: `pip install 'surm-seg[export]=={version}'`. Weights are safetensors; nothing in the bundle is a
pickle. MONAI evaluates what configs/inference.json says, so run only bundles that you trust.

```bash
python -m monai.bundle run --config_file BUNDLE/configs/inference.json --bundle_root BUNDLE \
    --dataset_dir VOLUMES --output_dir LABEL_MAPS
python -m monai.bundle verify_net_in_out network_def --meta_file BUNDLE/configs/metadata.json \
    --config_file BUNDLE/configs/inference.json --bundle_root BUNDLE --device cpu
```

VOLUMES is a folder of CT volumes in HU (NIfTI, NRRD or MetaImage); X.nii.gz gives LABEL_MAPS/X.nii.gz.

| label | organ |
|---|---|
{classes}

What happens to a volume:

{steps}

On one device the voxels equal those of `surm-seg predict` with the run; another device, or another version of torch,
may decide a tie otherwise. So do the files, byte for byte, but X.nii gives X.nii.gz here. Damaged volumes are refused,
and one stops the run. DICOM series, warnings about unusual volumes, volumes in mL and a manifest are in
`surm-seg predict` only.

configs/metadata.json was not checked against MONAI's schema, which only its web address holds. LICENSE is that of
surm-seg; whoever trained the model decides about its weights.
"""
