"""SAM from the package's modules: equal to the package at its own size, right at others, picky about checkpoints."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from pipelines import recipes
from surm_seg import backbones
from surm_seg.backbones import sam
from surm_seg.errors import BadConfig, BadInput
from surm_seg.layers import SurmLayer


def meta_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Random ViT-B weights under Meta's names and shapes (1024 pixels), with relative positions that are not zero."""
    torch.manual_seed(0)
    stock = sam.Sam(sam.SIZES["sam_vit_b"], 1024, masks=4)
    for name, value in stock.state_dict().items():
        if "rel_pos" in name or "pos_embed" in name:
            value.normal_(std=0.02)
    state = stock.state_dict()
    torch.save(state, path)
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam_vit_b_random.pth"
    meta_checkpoint(path)
    return path


@pytest.fixture(autouse=True)
def private_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SURM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_encoder_at_1024_equals_the_packages_own(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    stock = sam.modeling.ImageEncoderViT(
        depth=12,
        embed_dim=768,
        img_size=1024,
        num_heads=12,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=(2, 5, 8, 11),
        window_size=14,
    )
    prefix = "image_encoder."
    stock.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    ours = backbones.make("sam_vit_b").build(8, 1024, checkpoint)
    pixels = torch.randn(1, 3, 1024, 1024)
    with torch.inference_mode():
        assert (ours.image_encoder(pixels) - stock(pixels)).abs().max() < 1e-5


def test_at_512_one_step_moves_deltas_and_decoder_saves_and_reloads_in_a_fresh_process(
    checkpoint: Path, tmp_path: Path
) -> None:
    backbone = backbones.make("sam_vit_b")
    torch.manual_seed(1)
    base = backbone.build(8, 512, checkpoint)
    assert base.image_encoder.blocks[2].attn.rel_pos_h.shape == (63, 64)
    config = backbone.surm_config(base, structure="circulant", options={}, roles=("q", "v"), decoder="full")
    model = peft.get_peft_model(base, config)  # pyright: ignore
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if "surm_" in n) == 18_432
    pixels = torch.randn(1, 3, 512, 512)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(pixels).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    unmoved = [n for n, p in model.named_parameters() if n in trained and torch.equal(p, trained[n])]
    assert unmoved == []
    model.eval()
    qkv = model.base_model.model.image_encoder.blocks[5].attn.qkv
    tokens = torch.randn(4, 768)
    assert torch.equal(qkv(tokens)[:, 768:1536], qkv.base_layer(tokens)[:, 768:1536])
    with torch.inference_mode():
        torch.save({"pixels": pixels, "logits": model(pixels)}, tmp_path / "expected.pt")
    model.save_pretrained(str(tmp_path / "adapter"))
    code = f"""
import torch, peft, surm_seg
from surm_seg import backbones
torch.manual_seed(1)
base = backbones.make("sam_vit_b").build(8, 512, {str(checkpoint)!r})
model = peft.PeftModel.from_pretrained(base, "adapter").eval()
kept = torch.load("expected.pt")
with torch.inference_mode():
    assert torch.equal(model(kept["pixels"]), kept["logits"])
    merged = model.merge_and_unload()
    assert (merged(kept["pixels"]) - kept["logits"]).abs().max() < 1e-4 * kept["logits"].abs().max()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("decoder", ["full", "structured", "frozen"])
def test_every_trained_parameter_gets_a_gradient(decoder: backbones.Decoder) -> None:
    """Otherwise distributed training stops on unused parameters."""
    backbone = backbones.make("sam_tiny")
    base = backbone.build(3, 64, "random")
    config = backbone.surm_config(base, structure="low_rank", options={}, roles=("q", "v", "mlp_in"), decoder=decoder)
    model = peft.get_peft_model(base, config)  # pyright: ignore
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    in_decoder = {n for n, p in model.named_parameters() if p.requires_grad and "mask_decoder.transformer" in n}
    assert bool(in_decoder) == (decoder != "frozen")
    assert all("surm_" in n for n in in_decoder) or decoder == "full"


def test_overrides_choose_structures_by_role_and_by_layer() -> None:
    config = recipes.Config(
        weights="random",
        image_size=64,
        roles=("q", "mlp_in"),
        overrides={"mlp_in": {"structure": "low_rank", "options": {"rank": 2}}, r"blocks\.5\..*": {"scale": 0.5}},
    )
    backbone = backbones.make(config.backbone)
    model = recipes.adapted(recipes.base_model(config, backbone, 3, seed=0), backbone, config)
    sites = {
        f"{layer.module_name.removeprefix('image_encoder.blocks.')}.{site.part}": (site.structure, site.scale)
        for layer in model.modules()
        if isinstance(layer, SurmLayer)
        for site, _, _ in layer.placed()
    }
    assert len(sites) == 12
    assert sites["0.attn.qkv.q"] == ("circulant", 1.0) and sites["5.attn.qkv.q"] == ("circulant", 0.5)
    assert sites["0.mlp.lin1.mlp_in"] == sites["5.mlp.lin1.mlp_in"] == ("low_rank", 1.0)  # the first match counts
    with pytest.raises(BadConfig, match="override 'v' matches no adapted module or part"):
        recipes.adapted(
            recipes.base_model(config, backbone, 3, seed=0),
            backbone,
            dataclasses.replace(config, overrides={"v": {"scale": 2.0}}),
        )


def test_logits_have_one_channel_per_class_at_a_quarter_of_the_size() -> None:
    model = backbones.make("sam_tiny").build(5, 96, "random")
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 6, 24, 24)


def test_the_batch_is_independent_and_prompts_are_answered() -> None:
    model = backbones.make("sam_tiny").build(3, 64, "random").eval()
    pixels = torch.randn(2, 3, 64, 64)
    together = model(pixels)
    torch.testing.assert_close(together[1:], model(pixels[1:]), rtol=1e-4, atol=1e-4)
    embeddings = model.image_encoder(pixels)
    boxes = torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 60]])
    by_box = model.decode(embeddings, boxes=boxes)
    assert by_box.shape == together.shape and not torch.allclose(by_box, together)


def test_the_shipped_weights_load_and_are_small() -> None:
    assert sam.TINY_WEIGHTS.stat().st_size < 15e6
    model = backbones.make("sam_tiny").build(8, 128, "auto")
    random = backbones.make("sam_tiny").build(8, 128, "random")
    weight = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[weight], random.state_dict()[weight])


@pytest.mark.parametrize("size", [0, 8, 100, 520])
def test_sizes_that_are_no_multiple_of_16_are_refused(size: int) -> None:
    with pytest.raises(BadConfig, match="not a multiple of 16"):
        backbones.make("sam_tiny").build(3, size, "random")


def test_mobilesam_is_recognised_and_refused(shared_data: Path) -> None:
    shapes = json.loads((shared_data / "mobilesam-keys" / "state_dict_shapes.json").read_text())
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    model = backbones.make("sam_vit_b").build(3, 64, "random")
    with pytest.raises(BadInput, match="MobileSAM, whose TinyViT image encoder is not supported"):
        sam.load_weights(model, state, "sam_vit_b", "mobile_sam.pt")


def test_checkpoints_of_another_backbone_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a checkpoint of sam_vit_b, not of sam_tiny"):
        backbones.make("sam_tiny").build(3, 64, checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    state.pop("image_encoder.neck.0.weight")
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(BadInput, match=r"1 names are missing \['image_encoder.neck.0.weight'\]"):
        backbones.make("sam_vit_b").build(3, 64, tmp_path / "cut.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="holds no complete weights"):
        backbones.make("sam_vit_b").build(3, 64, path)


def test_missing_weights_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURM_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with pytest.raises(BadInput, match=r"put it at .*sam_vit_b_01ec64\.pth"):
        backbones.make("sam_vit_b").build(3, 64, "auto")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="no weights file"):
        backbones.make("sam_vit_b").build(3, 64, tmp_path / "absent.pth")


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


def test_torchvision_and_the_packages_own_init_are_not_needed() -> None:
    code = """
import sys
sys.modules["torchvision"] = None
from surm_seg import backbones
backbones.make("sam_tiny").build(2, 64, "random")
assert "segment_anything" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
