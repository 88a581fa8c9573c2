"""The questions that the embedded backbone was trained on."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from pipelines import pretrain
from surm_seg.backbones.sam import TINY_WEIGHTS
from surm_seg.engine import EngineConfig, fit


def test_the_prompts_of_a_question_point_at_its_mask() -> None:
    label = torch.zeros(40, 40, dtype=torch.long)
    label[5:15, 20:32] = 3
    label[30:33, 2:5] = 7  # 9 pixels: too small to be asked for
    for seed in range(20):
        batch = pretrain.question(torch.zeros(3, 40, 40), label, np.random.default_rng(seed))
        assert torch.equal(batch["mask"], (label == 3).float())
        (x, y), (other_x, other_y) = (batch["points"] - 0.5).long().tolist()
        assert label[y, x] == 3 and label[other_y, other_x] != 3
        assert batch["positive"].tolist() in ([1, 0], [1, -1])
        assert (batch["box"] - torch.tensor([20.0, 5, 32, 15])).abs().max() <= 2


def test_an_empty_slice_asks_for_nothing() -> None:
    batch = pretrain.question(torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.long), np.random.default_rng(0))
    assert not batch["mask"].any() and batch["positive"][0] == 0


def test_it_trains_encoder_decoder_and_prompt_embeddings(tmp_path: Path) -> None:
    patients = [pretrain.generated(pretrain.FIRST_SEED + i) for i in range(2)]
    task = pretrain.Pretraining(patients[1:], patients[:1])
    before = {name: p.detach().clone() for name, p in task.model.named_parameters() if p.requires_grad}
    config = EngineConfig(steps=2, batch_size=2, warmup=1, workers=0, precision="float32", validate_every=0)
    result = fit(task, config, tmp_path, seed=0, device="cpu")
    moved = {name for name, p in task.model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert {name.split(".")[1] for name in moved} >= {"image_encoder", "mask_decoder", "prompt_encoder"}
    assert result.best_score is not None and 0 <= result.best_score <= 2


def test_the_shipped_weights_name_how_they_were_made() -> None:
    with safe_open(TINY_WEIGHTS, "pt") as file:
        facts = file.metadata()
    assert int(facts["first_seed"]) == pretrain.FIRST_SEED and int(facts["steps"]) > 0
