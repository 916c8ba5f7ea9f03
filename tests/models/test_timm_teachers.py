"""Foundation models of timm: their sizes, which output is the embedding, and their authors' own files."""

import pytest
import timm
import torch

from refilled.errors import ModelError
from refilled.models import create_model, from_description, load_model, load_teacher, save_model
from refilled.models.architectures import describe
from refilled.models.timm_backbone import TimmBackbone
from refilled.training.teacher_cache import fingerprint

IMAGES = torch.randint(0, 256, (2, 3, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

SMALL = {  # one block of each family, so that they are quick
    "dinov2": ("vit_small_patch14_dinov2", "token", 14, 1),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", "token", 14, 5),
    "dinov3": ("vit_small_patch16_dinov3", "token", 16, 5),
    "siglip": ("vit_base_patch16_siglip_224", "pooled", 16, 0),
    "clip": ("vit_xsmall_patch16_clip_224", "pooled", 16, 1),
    "eva02": ("eva02_tiny_patch14_224", "mean", 14, 1),
    "mae": ("vit_base_patch16_224.mae", "mean", 16, 1),
    "beit": ("beit_base_patch16_224", "pooled", 16, 1),
}


def body(name):
    torch.manual_seed(0)
    return timm.create_model(name, depth=1).eval()


def saved(tmp_path, name, state):
    torch.save(state, tmp_path / "w.pth")
    return f"timm/{name}:{tmp_path}/w.pth"


@pytest.mark.parametrize(("name", "pooling", "patch", "prefix"), SMALL.values(), ids=SMALL)
def test_each_family_has_its_embedding_and_takes_whole_patches(name, pooling, patch, prefix):
    network = body(name)
    teacher = TimmBackbone(network).eval()
    assert teacher.default_pooling() == pooling
    teacher.set_preprocessing(input_size=3 * patch)
    teacher.set_pooling(pooling)
    with torch.no_grad():
        found = teacher(IMAGES).embedding
        tokens = network.forward_features(teacher.normalize(IMAGES))
    norm = getattr(network, "fc_norm", None) or torch.nn.Identity()
    pooled = network.forward_head(tokens, pre_logits=True)
    expected = {"token": norm(tokens[:, 0]), "mean": norm(tokens[:, prefix:].mean(1)), "pooled": pooled}[pooling]
    assert tokens.shape[1] == prefix + 9
    torch.testing.assert_close(found, expected)
    with pytest.raises(ModelError, match=f"multiple of {patch} pixels"):
        teacher.set_preprocessing(input_size=3 * patch + 1)


def test_both_is_the_token_and_the_mean_of_the_patches():
    network = body("vit_small_patch14_reg4_dinov2")
    teacher = TimmBackbone(network).eval()
    teacher.set_preprocessing(input_size=42)
    teacher.set_pooling("both")
    with torch.no_grad():
        tokens = network.forward_features(teacher.normalize(IMAGES))
        found = teacher(IMAGES).embedding
    torch.testing.assert_close(found, torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))
    assert teacher.embedding_dim == 768


@pytest.mark.parametrize(
    ("name", "pooling", "reason"),
    [
        ("test_resnet", "token", "no tokens"),
        ("convnext_atto", "mean", "no tokens"),
        ("vit_base_patch16_siglip_224", "token", "no class token"),
    ],
)
def test_what_a_network_does_not_have_is_refused(name, pooling, reason):
    network = timm.create_model(name, **({"depth": 1} if "vit" in name else {}))
    with pytest.raises(ModelError, match=reason):
        TimmBackbone(network).set_pooling(pooling)


@pytest.mark.slow
def test_the_size_is_the_larger_of_the_images_and_224_but_no_more_than_in_training(tmp_path):
    text = saved(
        tmp_path, "vit_tiny_patch16_384", timm.create_model("vit_tiny_patch16_384", num_classes=3).state_dict()
    )
    teacher = load_teacher(text, image_size=96)
    assert teacher.input_size == 224
    assert "sees 224 pixels and was trained at 384" in teacher.notes[0]
    assert load_teacher(text, image_size=300).input_size == 304
    assert load_teacher(text, image_size=500).input_size == 384
    assert load_teacher(text, input_size=112).input_size == 112
    with torch.no_grad():
        assert load_teacher(text, input_size=112)(IMAGES).logits.shape == (2, 3)


def test_positions_are_resampled_and_not_drawn_again(tmp_path):
    """A patch in the middle of constant images is embedded alike at any size."""
    text = saved(tmp_path, "test_vit", timm.create_model("test_vit", num_classes=0).state_dict())
    large, small = load_teacher(text, input_size=160), load_teacher(text, input_size=80)
    assert small.body.pos_embed.shape[1] == 26
    grids = [b.body.pos_embed[:, 1:].mean(1) for b in (large, small)]
    torch.testing.assert_close(*grids, atol=2e-3, rtol=0)
    torch.testing.assert_close(large.body.pos_embed[:, :1], small.body.pos_embed[:, :1])


def test_weights_of_another_size_than_timms_are_read(tmp_path):
    network = timm.create_model("test_vit", img_size=64, num_classes=3).eval()
    teacher = load_teacher(saved(tmp_path, "test_vit", network.state_dict()))
    assert teacher.input_size == 64
    with torch.no_grad():
        images = teacher.normalize(IMAGES)
        torch.testing.assert_close(teacher(IMAGES).logits, network(images))


def test_dinov2s_own_file_is_read(tmp_path):
    network = timm.create_model("test_vit", num_classes=0).eval()
    state = {**network.state_dict(), "mask_token": torch.zeros(1, 64)}
    teacher = load_teacher(saved(tmp_path, "test_vit", {"teacher": state}))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(teacher.body.state_dict()[name], value)


def test_clips_projection_is_no_classifier(tmp_path):
    network = timm.create_model("vit_xsmall_patch16_clip_224", num_classes=512)
    with torch.no_grad():
        network.head.bias.zero_()
    assert load_teacher(saved(tmp_path, "vit_xsmall_patch16_clip_224", network.state_dict())).num_classes == 0
    with torch.no_grad():
        network.head.bias.normal_()
    assert load_teacher(saved(tmp_path, "vit_xsmall_patch16_clip_224", network.state_dict())).num_classes == 512


def test_grayscale_weights_make_a_grayscale_teacher(tmp_path):
    network = timm.create_model("test_resnet", in_chans=1, num_classes=3).eval()
    teacher = load_teacher(saved(tmp_path, "test_resnet", network.state_dict()))
    assert teacher.channels == 1
    with torch.no_grad():
        torch.testing.assert_close(teacher(IMAGES).logits, network(teacher.normalize(IMAGES)))


def test_the_choice_is_part_of_the_fingerprint(tmp_path):
    text = saved(tmp_path, "test_vit", timm.create_model("test_vit", num_classes=0).state_dict())
    prints = {fingerprint(load_teacher(text, pooling=pooling)) for pooling in (None, "pooled", "mean", "both")}
    assert len(prints) == 3  # the first two are the same


def test_a_model_with_another_embedding_and_size_is_rebuilt_from_its_folder(tmp_path):
    torch.manual_seed(0)
    model = create_model("timm/test_vit", 3, input_size=64)
    model.set_pooling("both")
    model.classifier, model.num_classes = torch.nn.Linear(model.embedding_dim, 3), 3
    save_model(model.eval(), tmp_path)
    for rebuilt in (load_model(tmp_path), load_teacher(str(tmp_path))):
        with torch.no_grad():
            torch.testing.assert_close(rebuilt(IMAGES).logits, model(IMAGES).logits)
    with pytest.raises(ModelError, match="unusable 'pooling'"):
        from_description({**describe(model), "pooling": "odd"})


def test_a_grayscale_teacher_resizes_images_in_full_precision_under_autocast():
    teacher = TimmBackbone(timm.create_model("test_resnet", in_chans=1, num_classes=3).eval())
    teacher.set_preprocessing(input_size=48)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = teacher.normalize(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(teacher.normalize(images), expected, rtol=0, atol=0)
