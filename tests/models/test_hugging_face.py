"""Networks of transformers, saved with random weights in the layout of their own: what is read, and how."""

import json

import huggingface_hub
import pytest
import torch

from refilled.errors import ModelError
from refilled.models import load_teacher

transformers = pytest.importorskip("transformers")

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

MODELS = {
    "vit": ("ViTModel", {**VIT, "image_size": 64}),
    "dinov2": ("Dinov2Model", {**VIT, "image_size": 112, "patch_size": 14}),
    "dinov3": ("DINOv3ViTModel", {**VIT, "image_size": 64, "num_register_tokens": 4}),
    "dinov3 convnext": ("DINOv3ConvNextModel", CONV),
    "siglip": ("SiglipVisionModel", {**VIT, "image_size": 64}),
    "clip": ("CLIPVisionModel", {**VIT, "image_size": 64}),
    "beit": ("BeitModel", {**VIT, "image_size": 64}),
    "convnext": ("ConvNextModel", CONV),
    "resnet": ("ResNetModel", {**CONV, "embedding_size": 8}),
    "swin": ("SwinModel", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 64, "window_size": 4}),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def saved(folder, kind, settings, processor=True, **more):
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**settings, **more)).eval()
    model.save_pretrained(folder)
    if processor:
        write_processor(folder)
    return model


def write_processor(folder, **changed):
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "rescale_factor": 1 / 255,
        "size": {"height": 64, "width": 64},
        **changed,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def normalized(images, side=64):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    if images.shape[-1] != side:
        images = torch.nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return (images / 255 - mean) / std


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_the_pooled_output_is_the_embedding_at_the_processors_size(tmp_path, kind, settings):
    model = saved(tmp_path, kind, settings)
    teacher = load_teacher(f"hf:{tmp_path}")
    assert teacher.input_size == 64
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(MEAN))
    with torch.no_grad():
        expected = model(pixel_values=normalized(IMAGES)).pooler_output.flatten(1)
        found = teacher(IMAGES)
    torch.testing.assert_close(found.embedding, expected)
    assert found.logits.shape == (2, 0)
    assert not teacher.training


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "Dinov2ForImageClassification", "BeitForImageClassification"]
)
def test_the_embedding_is_what_the_classifier_reads(tmp_path, kind):
    names = {0: "cat", 1: "dog", 2: "newt"}
    model = saved(tmp_path, kind, {**VIT, "image_size": 64}, id2label=names, label2id={v: k for k, v in names.items()})
    teacher = load_teacher(f"hf:{tmp_path}")
    with torch.no_grad():
        seen, expected = teacher(IMAGES), model(pixel_values=normalized(IMAGES)).logits
    assert teacher.class_names == ("cat", "dog", "newt")
    torch.testing.assert_close(seen.logits, expected)
    assert seen.embedding.shape == (2, 64 if kind.startswith("Dinov2") else 32)  # DINOv2's reads token and mean


def test_a_pooler_without_trained_weights_is_not_used(tmp_path):
    """ViT's classifiers are saved without the pooler, which would then be random."""
    model = saved(tmp_path, "ViTForImageClassification", {**VIT, "image_size": 64})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    teacher = load_teacher(f"hf:{tmp_path}")
    assert teacher.pooling == "token"
    with torch.no_grad():
        expected = model.vit(pixel_values=normalized(IMAGES)).last_hidden_state[:, 0]
        torch.testing.assert_close(teacher(IMAGES).embedding, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prefix"), [("dinov2", 1), ("dinov3", 5), ("siglip", 0), ("clip", 1)])
@pytest.mark.parametrize("pooling", ["token", "mean", "both"])
def test_tokens_are_chosen_by_option(tmp_path, kind, prefix, pooling):
    name, settings = MODELS[kind]
    model = saved(tmp_path, name, settings)
    if prefix == 0 and pooling != "mean":
        with pytest.raises(ModelError, match="no class token"):
            load_teacher(f"hf:{tmp_path}", pooling=pooling)
        return
    side = 56 if kind == "dinov2" else 64  # whole patches
    teacher = load_teacher(f"hf:{tmp_path}", pooling=pooling, input_size=side)
    with torch.no_grad():
        tokens = model(pixel_values=normalized(IMAGES, side)).last_hidden_state
        parts = {"token": tokens[:, 0], "mean": tokens[:, prefix:].mean(1)}
        expected = torch.cat(list(parts.values()), 1) if pooling == "both" else parts[pooling]
        torch.testing.assert_close(teacher(IMAGES).embedding, expected, atol=1e-4, rtol=1e-4)
    assert teacher.embedding_dim == expected.shape[1]


def test_a_masked_autoencoder_hides_no_patch_and_gives_the_mean(tmp_path):
    saved(tmp_path, "ViTMAEModel", {**VIT, "image_size": 64})
    teacher = load_teacher(f"hf:{tmp_path}")
    assert teacher.pooling == "mean"
    with torch.no_grad():
        once, again = teacher(IMAGES).embedding, teacher(IMAGES).embedding
        tokens = teacher.module(pixel_values=normalized(IMAGES)).last_hidden_state
    assert torch.equal(once, again)
    assert tokens.shape[1] == 17
    torch.testing.assert_close(once, tokens[:, 1:].mean(1))


def test_the_image_tower_of_a_network_of_images_and_texts_is_taken(tmp_path):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = saved(tmp_path, "CLIPModel", {"text_config": text, "vision_config": {**VIT, "image_size": 64}})
    teacher = load_teacher(f"hf:{tmp_path}")
    with torch.no_grad():
        expected = model.vision_model(pixel_values=normalized(IMAGES)).pooler_output
        torch.testing.assert_close(teacher(IMAGES).embedding, expected)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3", "siglip", "clip", "beit"])
def test_another_size_resamples_the_positions(tmp_path, kind):
    name, settings = MODELS[kind]
    saved(tmp_path, name, settings)
    side = 2 * settings["patch_size"]
    teacher = load_teacher(f"hf:{tmp_path}", input_size=side)
    with torch.no_grad():
        assert teacher(IMAGES).embedding.shape == (2, 32)
    assert teacher.input_size == side


def test_a_large_one_sees_224_pixels_unless_told_otherwise(tmp_path):
    saved(tmp_path, "Dinov2Model", {**VIT, "image_size": 280, "patch_size": 14})
    write_processor(tmp_path, size={"shortest_edge": 300}, crop_size={"height": 280, "width": 280}, do_center_crop=True)
    teacher = load_teacher(f"hf:{tmp_path}", image_size=64)
    assert teacher.input_size == 224
    assert "224 pixels and was trained at 280" in teacher.notes[0]
    assert load_teacher(f"hf:{tmp_path}", input_size=280).input_size == 280
    assert load_teacher(f"hf:{tmp_path}", image_size=500).input_size == 280


def test_a_network_without_a_processor_needs_mean_and_std(tmp_path):
    saved(tmp_path, "ViTModel", {**VIT, "image_size": 64}, processor=False)
    with pytest.raises(ModelError, match="--teacher-mean and --teacher-std"):
        load_teacher(f"hf:{tmp_path}")
    assert load_teacher(f"hf:{tmp_path}", mean=HALF, std=HALF).input_size == 64


def test_a_processor_that_does_not_normalize_is_honoured(tmp_path):
    saved(tmp_path, "ViTModel", {**VIT, "image_size": 64})
    write_processor(tmp_path, do_normalize=False)
    teacher = load_teacher(f"hf:{tmp_path}")
    assert (teacher.mean.unique().tolist(), teacher.std.unique().tolist()) == ([0.0], [1.0])


def test_missing_weights_are_refused(tmp_path):
    saved(tmp_path, "ViTModel", {**VIT, "image_size": 64})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="lacks 16 tensors of its network"):
        load_teacher(f"hf:{tmp_path}")


def test_a_network_of_texts_is_refused(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    saved(tmp_path, "BertModel", settings)
    with pytest.raises(ModelError, match="is not an image network"):
        load_teacher(f"hf:{tmp_path}")


def test_code_in_a_repository_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    auto = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_teacher(f"hf:{tmp_path}")
    assert not canary.exists()


def test_without_a_network_a_remedy_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="give hf:FOLDER"):
        load_teacher("hf:facebook/dinov2-small")


def test_grayscale_networks_get_grayscale(tmp_path):
    saved(tmp_path, "ViTModel", {**VIT, "image_size": 64, "num_channels": 1})
    teacher = load_teacher(f"hf:{tmp_path}")
    with torch.no_grad():
        assert teacher(IMAGES).embedding.shape == (2, 32)
    assert teacher.channels == 1
