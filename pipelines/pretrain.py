"""How the weights of `sam_tiny` were made: promptable and semantic segmentation of generated patients, in one training.

    python -m pipelines.pretrain --output DIR

Every patient is drawn from a wide world (contrast, noise, spacing, size and deformation well beyond the demo's), with
seeds from FIRST_SEED up, which no data set of this project uses. Each slice is asked twice: for one structure, by a box
or points, as SAM is trained; and for all structures at once, so that the encoder's features tell organs apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses.dice import DiceCELoss
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.phantom import UPPER_ABDOMEN, World, patient
from pipelines.transforms import WINDOW, Input, augmentation
from surm_seg import backbones
from surm_seg.backbones.sam import SIZES, MaskDecoder, Sam
from surm_seg.engine import EngineConfig, fit
from surm_seg.task import Batch, Record, Task
from surm_seg.volume import Grid

FIRST_SEED = 1_000_000
IMAGE_SIZE = 384
PATIENTS = 320
VALIDATION_SLICES = 64
STRUCTURES = 11
"""Raw label values of the phantom run up to this; each is a class of the semantic question."""
SMALLEST = 12
"""Pixels a structure needs in a slice to be asked for."""


def wide_world(rng: np.random.Generator) -> World:
    """One population drawn from far more variety than the demo's: tissue HU, phases, spacing, size, noise."""
    hu = {}
    for tissue, (low, high) in UPPER_ABDOMEN.hu.items():
        shift = rng.normal(0, 18)
        hu[tissue] = (low + shift - 6, high + shift + 6)
    return dataclasses.replace(
        UPPER_ABDOMEN,
        hu=hu,
        phases={name: (1 / 3, shift) for name, (_, shift) in UPPER_ABDOMEN.phases.items()},
        body_scale=(0.8, 1.15),
        fat_mm=(4, 35),
        shift_mm=6.0,
        relief_mm=2.5,
        deformation_mm=(2, 8),
        texture_hu=(1, 14),
        noise_hu=(3, 35),
        partial_volume=(0.6, 1.6),
        spacing_mm=(2.4, 3.6),
        slice_mm=(2.5, 7),
        slices=(24, 72),
    )


def generated(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU and raw labels of one patient, both (z, y, x)."""
    made = patient(seed, wide_world(np.random.default_rng([seed, 1])))
    grid = Grid.from_affine(made.image.shape, made.affine)
    return np.ascontiguousarray(grid.lps(made.image)), np.ascontiguousarray(grid.lps(made.label))


Prompt = dict[str, Any]
"""Either {"points": (coordinates, labels)} or {"boxes": corners}, as `Sam.decode` takes them."""


class Questioned(nn.Module):
    """SAM with its own four mask tokens, and a second set of tokens, one per structure, on the same decoder."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        decoder = sam.mask_decoder
        self.semantic = MaskDecoder(
            transformer_dim=decoder.transformer_dim,
            transformer=decoder.transformer,
            num_multimask_outputs=STRUCTURES,
            iou_head_hidden_dim=8,
        )
        self.semantic.output_upscaling = decoder.output_upscaling
        self.semantic.iou_token = decoder.iou_token
        for unused in (
            self.semantic.iou_prediction_head,
            decoder.iou_prediction_head,
            sam.prompt_encoder.mask_downscaling,
        ):
            unused.requires_grad_(False)

    def forward(self, pixels: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Mask logits (batch, 4, h, w) of the prompted structure, and logits of every structure at once."""
        embeddings = self.sam.image_encoder(pixels)
        prompts = self.sam.prompt_encoder
        dense = prompts.no_mask_embed.weight[:, :, None, None]
        none = embeddings.new_zeros(len(embeddings), 0, embeddings.shape[1])
        return self.sam.decode(embeddings, **prompt), self.semantic(embeddings, prompts.get_dense_pe(), none, dense)


class Pretraining(Task):
    """Slices of generated patients with a question each."""

    def __init__(
        self, patients: list[tuple[np.ndarray, np.ndarray]], held_out: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        backbone = backbones.make("sam_tiny")
        self.input = Input(IMAGE_SIZE, WINDOW, "neighbours", backbone.pixel_mean, backbone.pixel_std)
        self.patients = patients
        self.held_out = held_out
        self.index = _slices_with_structures(patients)
        self.augment = augmentation("default")
        self.sam = Sam(SIZES["sam_tiny"], IMAGE_SIZE, masks=4)
        self.model = Questioned(self.sam)
        self.semantic_loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, batch=True)

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        patient, z = self.index[index]
        image, label = self.patients[patient]
        self.augment.set_random_state(seed=int(rng.integers(2**31)))
        data: Any = self.augment({"image": self.input.slices(image, z), "label": self.input.labels(label[z])})
        return question(torch.as_tensor(data["image"]), torch.as_tensor(data["label"])[0].long(), rng)

    def loss(self, batch: Batch) -> Tensor:
        by_box = bool(torch.rand(()) < 0.5)
        masks, structures = self._answers(batch, by_box)
        size = structures.shape[-2:]
        wanted = nn.functional.interpolate(batch["mask"][:, None], size, mode="nearest-exact")
        labels = nn.functional.interpolate(batch["label"][:, None].float(), size, mode="nearest-exact")
        losses = torch.stack([mask_loss(masks[:, i : i + 1], wanted) for i in range(4)])
        # Token 0 must be right; of the three others, which SAM keeps for ambiguous points, the best one counts.
        prompted = losses[0] + losses[1:].amin(0)
        return self.semantic_loss(structures.float(), labels) + prompted.mean() / 2

    def validate(self) -> Record:
        """Mean Dice of structures and of box prompts on slices of patients that were never trained on."""
        rng = np.random.default_rng(FIRST_SEED)
        places = _slices_with_structures(self.held_out)
        dice: dict[str, list[float]] = {"structures": [], "box": [], "point": []}
        for held, z in [places[i] for i in rng.permutation(len(places))[:VALIDATION_SLICES]]:
            image, label = self.held_out[held]
            square = torch.from_numpy(self.input.slices(image, z))
            batch = question(square, torch.from_numpy(self.input.labels(label[z]))[0].long(), rng)
            single = {name: value[None] for name, value in batch.items()}
            truth, wanted = batch["label"].numpy(), batch["mask"].numpy() > 0
            for prompt in ("point", "box"):
                masks, structures = self._answers(single, prompt == "box")
                dice[prompt].append(_dice(_enlarged(masks, square)[0].numpy() > 0, wanted))
            found = _enlarged(structures, square).argmax(0).numpy()
            dice["structures"] += [_dice(found == k, truth == k) for k in np.unique(truth) if k]
        record = {name: float(np.mean(values)) for name, values in dice.items()}
        return {**record, "score": record["structures"] + record["box"]}

    def _answers(self, batch: Batch, by_box: bool) -> tuple[Tensor, Tensor]:
        scale = IMAGE_SIZE / batch["image"].shape[-1]
        points = (batch["points"] * scale, batch["positive"])
        return self.model(
            self.input.pixels(batch["image"]), {"boxes": batch["box"] * scale} if by_box else {"points": points}
        )


def question(image: Tensor, label: Tensor, rng: np.random.Generator) -> Batch:
    """Pick one structure of a slice and mark it by a jittered box and by one point inside and one outside.

    The outside point is dropped (label -1, which SAM reads as padding) half of the time. Coordinates are (x, y) pixels.
    """
    counts = torch.bincount(label.flatten(), minlength=STRUCTURES + 1)[1:]
    present = torch.nonzero(counts >= SMALLEST)[:, 0] + 1
    wanted = int(present[rng.integers(len(present))]) if len(present) else 0
    mask = label == wanted if wanted else torch.zeros_like(label, dtype=torch.bool)
    inside, outside = torch.nonzero(mask), torch.nonzero(~mask)
    spot = inside[rng.integers(len(inside))] if wanted else outside[rng.integers(len(outside))]
    elsewhere = outside[rng.integers(len(outside))]
    low, high = (inside.amin(0), inside.amax(0)) if wanted else (spot, spot)
    jitter = torch.from_numpy(rng.uniform(-2, 2, 4).astype(np.float32))
    return {
        "image": image.as_subclass(Tensor).float(),
        "label": label.as_subclass(Tensor),
        "mask": mask.as_subclass(Tensor).float(),
        "points": torch.stack([spot.flip(0), elsewhere.flip(0)]).as_subclass(Tensor).float() + 0.5,
        "positive": torch.tensor([1 if wanted else 0, 0 if rng.random() < 0.5 else -1]),
        "box": torch.cat([low.flip(0), high.flip(0) + 1]).as_subclass(Tensor).float() + jitter,
    }


def mask_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy plus Dice loss of each mask of a batch (batch, 1, h, w) -> (batch,)."""
    logits = logits.float()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((1, 2, 3))
    chance = logits.sigmoid()
    overlap = 2 * (chance * wanted).sum((1, 2, 3)) + 1
    return entropy + 1 - overlap / ((chance + wanted).sum((1, 2, 3)) + 1)


def _enlarged(logits: Tensor, square: Tensor) -> Tensor:
    """(1, c, h, w) -> (c, side, side)."""
    return nn.functional.interpolate(logits.float(), square.shape[-2:], mode="bilinear")[0]


def _slices_with_structures(patients: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    return [
        (i, z)
        for i, (_, label) in enumerate(patients)
        for z in np.flatnonzero((label > 0).sum((1, 2)) >= SMALLEST).tolist()
    ]


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    total = int(found.sum() + truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the log and sam_tiny.safetensors")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--patients", type=int, default=PATIENTS)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(FIRST_SEED)
    seeds = range(FIRST_SEED, FIRST_SEED + options.patients)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        patients = list(pool.map(generated, seeds, chunksize=8))
    held_out = max(1, options.patients // 20)
    task = Pretraining(patients[held_out:], patients[:held_out])
    print(f"{len(task)} slices of {len(patients) - held_out} patients", flush=True)
    config = EngineConfig(
        steps=options.steps,
        batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup=150,
        validate_every=500,
        checkpoint_every=500,
    )
    fit(task, config, options.output, seed=FIRST_SEED, device="cpu", resume=options.resume, report=_print)
    weights = {name: value.half().contiguous() for name, value in task.sam.state_dict().items()}
    facts = {"first_seed": FIRST_SEED, "patients": options.patients, "steps": options.steps, "image_size": IMAGE_SIZE}
    save_file(weights, options.output / "sam_tiny.safetensors", {name: str(value) for name, value in facts.items()})


def _print(record: Record) -> None:
    if record["step"] % 50 == 0 or "score" in record:
        print(" ".join(f"{name}={value:.4g}" for name, value in record.items()), flush=True)


if __name__ == "__main__":
    main()
