"""Students: every family keeps the contract, and a model comes back from its folder as it was."""

import json
import subprocess
import sys
from contextlib import suppress

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from refilled.errors import ModelError
from refilled.models import (
    Backbone,
    create_model,
    describe,
    freeze,
    from_description,
    list_models,
    load_model,
    save_model,
)
from refilled.models.architectures import FAMILIES
from refilled.models.cifar_resnet import BasicBlock
from refilled.models.mixed_convolution import MixedConv2d, mix_convolutions

MEMBERS = [  # name, native size of the images
    ("wrn_10_1", 32),
    ("wrn_10_2", 16),
    ("resnet8", 32),
    ("mobilenet_0.25", 32),
    ("mobilenet_0.25", 64),
    ("convnet4", 32),
    ("convnet4_average", 20),
    ("resnet12", 16),
    ("timm/test_resnet", 32),
    ("timm/test_efficientnet", 48),
    ("timm/test_vit", 32),
]


@pytest.fixture(params=MEMBERS, ids=lambda member: f"{member[0]}-{member[1]}")
def member(request: pytest.FixtureRequest) -> tuple[Backbone, torch.Tensor]:
    name, size = request.param
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = create_model(name, 7, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), image_size=size)
    return model.eval(), torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_outputs_are_of_the_declared_shapes(member):
    model, images = member
    with torch.no_grad():
        seen = model(images, features=True)
    assert seen.logits.shape == (3, model.num_classes) == (3, 7)
    assert seen.embedding.shape == (3, model.embedding_dim)
    assert tuple(maps.shape[1] for maps in seen.features) == model.feature_channels
    assert all(maps.ndim == 4 and len(maps) == 3 for maps in seen.features)
    sides = [maps.shape[-1] for maps in seen.features]
    assert sides == sorted(sides, reverse=True), "shallow to deep"
    assert isinstance(model.classifier, nn.Linear)
    torch.testing.assert_close(seen.logits, model.classifier(seen.embedding))


def test_feature_maps_are_given_only_when_asked_for(member):
    model, images = member
    with torch.no_grad():
        assert model(images).features == ()


def test_uint8_and_float_images_are_the_same_images(member):
    model, images = member
    with torch.no_grad():
        as_bytes, as_floats = model(images), model(images / 255)
    # Where the model resizes, bytes are rounded once more.
    tolerance = 1e-5 if model.input_size is None else 0.05
    torch.testing.assert_close(as_bytes.embedding, as_floats.embedding, atol=tolerance, rtol=tolerance)


def test_the_images_are_not_changed(member):
    model, images = member
    floats = images / 255
    before, before_floats = images.clone(), floats.clone()
    with torch.no_grad():
        model(images), model(floats)
    assert torch.equal(images, before)
    assert torch.equal(floats, before_floats)


def test_the_order_of_the_batch_does_not_matter(member):
    model, images = member
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        straight, shuffled = model(images).logits, model(images[order]).logits
    torch.testing.assert_close(shuffled, straight[order], atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(member):
    model, images = member
    model.train()
    seen = model(images)
    (seen.logits.square().sum() + seen.embedding.square().sum()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_half_precision_stays_finite_and_near(member):
    model, images = member
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images)
    relative = (rough.embedding.float() - exact.embedding).norm() / exact.embedding.norm()
    assert relative < 0.05


def test_a_description_is_plain_data_and_rebuilds_the_model(member):
    model, images = member
    model.class_names = tuple("abcdefg")
    description = json.loads(json.dumps(describe(model)))
    twin = from_description(description).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(images).logits, model(images).logits)
    assert describe(twin) == describe(model)
    assert description["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.slow
def test_a_model_comes_back_from_its_folder_as_it_was(member, tmp_path):
    model, images = member
    model.class_names = tuple("abcdefg")
    save_model(model, tmp_path / "new" / "folder")
    twin = load_model(tmp_path / "new" / "folder")
    with torch.no_grad():
        assert torch.equal(twin(images).logits, model(images).logits)
    assert twin.class_names == model.class_names
    assert not twin.training


def test_a_model_laid_out_channels_last_is_saved_as_any(tmp_path):
    model = create_model("wrn_10_1", 2).to(memory_format=torch.channels_last)
    save_model(model, tmp_path)
    for name, value in load_model(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("wrn_40_2", 100, 2_255_156),  # as RepDistiller counts them
        ("wrn_16_2", 100, 703_284),
        ("wrn_16_1", 100, 180_916),
        ("resnet110", 100, 1_736_564),
        ("resnet20", 10, 272_474),
        ("mobilenet_1", 1000, 4_231_976),  # as Keras and timm count them
        ("timm/resnet18", 1000, 11_689_512),
        ("convnet4", 5, 113_088 + 65 * 5),  # 113,088 without the classifier, as MAML and ProtoNet have it
        ("resnet12", 64, 12_424_320 + 641 * 64),  # 12.4 million without the classifier
    ],
)
def test_models_have_as_many_parameters_as_in_the_literature(name, classes, expected):
    with torch.device("meta"):
        assert parameters(create_model(name, classes)) == expected


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (32, 2)])
def test_a_basic_block_is_that_of_torchvision(channels, stride):
    block = BasicBlock(16, channels, stride).eval()
    theirs = torchvision.models.resnet.BasicBlock(16, channels, stride, block.downsample).eval()
    theirs.load_state_dict(block.state_dict())
    maps = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(maps), theirs(maps))


def test_mobilenet_is_that_of_timm():
    model = create_model("mobilenet_1", 3, image_size=64).eval()
    theirs = timm.create_model("mobilenetv1_100", num_classes=3, act_layer=nn.ReLU).eval()
    ours = model.state_dict()
    # The same tensors in the same order, but for the classifier, which ours has first.
    values = [ours.pop("classifier.weight"), ours.pop("classifier.bias")]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), [*ours.values(), *values], strict=True)))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, theirs(model.normalize(images)))


@pytest.mark.parametrize(("size", "side"), [(16, 2), (32, 4), (63, 8), (64, 2), (84, 3), (224, 7)])
def test_the_strides_of_mobilenet_follow_the_images(size, side):
    model = create_model("mobilenet_0.25", 2, image_size=size).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, size, size), features=True).features[-1].shape[-1] == side


def test_normalization_is_that_of_the_definition():
    model = create_model("wrn_10_1", 2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = torch.stack(
        [(images[:, c] / 255 - m) / s for c, (m, s) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)])], 1
    )
    torch.testing.assert_close(model.normalize(images), expected)
    torch.testing.assert_close(model.normalize(images / 255), expected)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (2, 3, 6, 9), (1, 3, 1, 1), (0, 3, 4, 4)])
def test_the_memory_layout_of_images_does_not_matter(shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    model = create_model("wrn_10_1", 2, mean=[0.1, 0.5, 0.9], std=[0.2, 0.3, 0.4])
    normalized = model.normalize(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(normalized, model.normalize(images.contiguous()))
    assert normalized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 12, 20), torch.randint(0, 256, (2, 3, 12, 20), dtype=torch.uint8)])
def test_images_are_resized_to_the_input_size(images):
    model = create_model("wrn_10_1", 2, input_size=8)
    assert model.normalize(images).shape == (2, 3, 8, 8)


def test_bfloat16_embeddings_are_pooled_in_float32():
    model = create_model("wrn_10_1", 2).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(2, 3, 32, 32)).embedding.dtype == torch.float32


def test_the_two_convnets_differ_in_their_global_pool_alone():
    largest, average = create_model("convnet4", 2).eval(), create_model("convnet4_average", 2).eval()
    average.load_state_dict(largest.state_dict())
    images = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        highest, mean = largest(images, features=True), average(images, features=True)
    assert highest.features[-1].shape == (2, 64, 5, 5)
    torch.testing.assert_close(highest.embedding, highest.features[-1].flatten(2).max(2).values)
    torch.testing.assert_close(mean.embedding, highest.features[-1].flatten(2).mean(2))


@pytest.mark.parametrize("name", ["convnet4", "resnet12"])
def test_images_too_small_to_be_halved_four_times_are_refused(name):
    with pytest.raises(ModelError, match="16 pixels or more, not 15"):
        create_model(name, 2, image_size=15)


@pytest.mark.parametrize("kind", [nn.Conv2d, timm.layers.Conv2dSame])
@pytest.mark.parametrize(("groups", "stride", "side"), [(4, 2, 9), (4, 1, 9), (1, 2, 9), (1, 2, 1)])
def test_a_mixed_convolution_is_the_plain_one(kind, groups, stride, side):
    plain = kind(4, 4, 3, stride, 1, groups=groups)
    mixed = nn.Sequential(kind(4, 4, 3, stride, 1, groups=groups))
    mixed[0].load_state_dict(plain.state_dict())
    mix_convolutions(mixed)
    assert isinstance(mixed[0], MixedConv2d)
    assert isinstance(mixed[0], kind)
    x = torch.randn(2, 4, side, side)
    assert torch.equal(mixed(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixed(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), plain(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_trains_in_float32(stride):
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, stride, 1, groups=4))
    mix_convolutions(mixed)
    x = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        result = mixed(x)
    exact = nn.functional.conv2d(x, mixed[0].weight, mixed[0].bias, stride, 1, groups=4)
    assert torch.equal(result, exact.bfloat16())


def test_a_mixed_convolution_of_a_teacher_computes_in_bfloat16():
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4))
    mix_convolutions(mixed)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed(x), nn.functional.conv2d(x, mixed[0].weight, mixed[0].bias, 2, 1, groups=4))


@pytest.mark.parametrize(("stride", "side"), [(2, 1), (2, 2), (3, 2), (4, 3)])
def test_weights_that_see_only_padding_have_no_gradient(stride, side):
    mixed = nn.Sequential(nn.Conv2d(16, 32, 3, stride, 1, bias=False))
    mix_convolutions(mixed)
    ones, weight = torch.ones(1, 1, side, side), torch.zeros(1, 1, 3, 3)
    slopes = torch.autograd.functional.jacobian(lambda w: nn.functional.conv2d(ones, w, None, stride, 1), weight)
    touched = slopes.any(dim=(0, 1, 2, 3, 4, 5))  # (3, 3)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixed(torch.randn(8, 16, side, side)).float().square().sum()
        spoiled = [torch.full((size,), torch.nan) for size in (1024, 4608, 9216) for _ in range(8)]
        del spoiled  # so that memory which nobody writes holds what would be noticed
        mixed.zero_grad()
        loss.backward()
        assert not mixed[0].weight.grad[:, :, ~touched].any()
        assert mixed[0].weight.grad[:, :, touched].any()


def test_a_reset_classifier_depends_on_the_generator_alone():
    model, twin = create_model("wrn_10_1", 5), create_model("wrn_10_1", 5)
    model.reset_classifier(torch.Generator().manual_seed(1))
    twin.reset_classifier(torch.Generator().manual_seed(1))
    assert torch.equal(model.classifier.weight, twin.classifier.weight)
    assert torch.equal(model.classifier.bias, twin.classifier.bias)
    twin.reset_classifier(torch.Generator().manual_seed(2))
    assert not torch.equal(model.classifier.weight, twin.classifier.weight)
    assert twin.classifier.weight.abs().max() <= model.embedding_dim**-0.5


def test_a_frozen_model_is_in_evaluation_mode_without_gradients():
    model = freeze(create_model("wrn_10_1", 2))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_listed_family_builds_its_examples():
    assert [form for form, _ in list_models()] == [family.form for family in FAMILIES]
    for family in FAMILIES:
        for name in family.examples:
            with torch.device("meta"):
                assert create_model(name, 3).architecture == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("wrn_40-2", "did you mean 'wrn_40_2'"),
        ("wrn_18_2", "6n \\+ 4"),
        ("wrn_16_0", "width 1 or more"),
        ("resnet50", "timm/resnet50"),
        ("convnet5", "did you mean 'convnet4'"),
        ("mobilenet_0", "above 0"),
        ("mobilenet_9", "at most 4"),
        ("timm/resnet180", "did you mean timm/resnet18"),
        ("timm/hf-hub:user/model", "known: "),
        ("", "known: .*wrn_16_1"),
    ],
)
def test_a_name_that_does_not_exist_is_explained(name, hint):
    with pytest.raises(ModelError, match=hint):
        create_model(name, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_classes": 0},
        {"mean": (0.5, 0.5)},
        {"mean": (123.7, 116.3, 103.5)},
        {"std": (0.2, 0.0, 0.2)},
        {"std": (float("nan"), 0.2, 0.2)},
        {"input_size": 0},
        {"pretrained": True},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ModelError):
        create_model("wrn_10_1", **{"num_classes": 2, **wrong})


def test_a_model_of_one_size_resizes_to_it_and_refuses_another():
    assert create_model("timm/mixer_s32_224", 2).input_size == 224
    assert create_model("timm/test_resnet", 2).input_size is None
    with pytest.raises(ModelError, match="224 pixels only"):
        create_model("timm/mixer_s32_224", 2, input_size=32)


def test_a_vision_transformer_can_be_brought_to_whole_patches():
    assert create_model("timm/test_vit", 2).input_size == 160
    model = create_model("timm/test_vit", 2, input_size=32).eval()
    assert model.input_size == 32
    assert model.body.pos_embed.shape[1] == 1 + 2 * 2
    with torch.no_grad():
        assert model(torch.rand(2, 3, 50, 50)).logits.shape == (2, 2)
    with pytest.raises(ModelError, match="multiple of 16 pixels, such as 32 or 48; got 40"):
        create_model("timm/test_vit", 2, input_size=40)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"(wrn_|resnet|mobilenet_|timm/).{0,8}", fullmatch=True))
def test_any_text_gives_a_model_or_a_model_error(name):
    with suppress(ModelError), torch.device("meta"):
        create_model(name, 2)


plain_data = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.floats(), max_size=4)
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(sorted(describe(create_model("wrn_10_1", 2)))), value=plain_data, keep=st.booleans())
def test_any_description_gives_a_model_or_a_model_error(key, value, keep):
    description = describe(create_model("wrn_10_1", 2))
    del description[key]
    if keep:
        description[key] = value
    with suppress(ModelError):
        from_description(description)


class TestFolder:
    """What can lie in a folder instead of a model."""

    @pytest.fixture
    def folder(self, tmp_path):
        save_model(create_model("wrn_10_1", 2), tmp_path)
        return tmp_path

    def test_holds_two_files_and_nothing_else(self, folder):
        assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
        assert set(load_file(folder / "model.safetensors")) == set(create_model("wrn_10_1", 2).state_dict())

    def test_can_be_written_again(self, folder):
        save_model(create_model("resnet8", 3), folder)
        assert load_model(folder).architecture == "resnet8"

    @pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
    def test_names_a_file_that_is_missing(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(ModelError, match=name):
            load_model(folder)

    @pytest.mark.parametrize("position", [0, 7, 100, -1])
    def test_detects_a_flipped_bit_in_the_weights(self, folder, position):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[position] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            load_model(folder)

    @pytest.mark.parametrize("kept", [0, 1, 50, 200])
    @pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
    def test_detects_a_truncated_file(self, folder, name, kept):
        path = folder / name
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ModelError, match=name):
            load_model(folder)

    def test_detects_weights_of_another_model(self, folder, tmp_path):
        save_model(create_model("wrn_10_1", 2), tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
        with pytest.raises(ModelError, match="belongs to another"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("architecture", "os.system"),
            ("architecture", "wrn_16_1"),
            ("architecture", "timm/local-dir:x"),
            ("num_classes", 3),
            ("num_classes", "2"),
            ("classes", ["a", "b", "c"]),
            ("mean", ["a", "b", "c"]),
            ("schema", 99),
        ],
    )
    def test_names_the_folder_of_a_description_that_does_not_fit(self, folder, key, value):
        path = folder / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        with pytest.raises(ModelError, match=str(folder)):
            load_model(folder)

    @pytest.mark.parametrize("content", [b"[1, 2]", b"null", b"\xff\xfe", b"[" * 100_000])
    def test_refuses_what_is_not_a_description(self, folder, content):
        (folder / "model.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.json"):
            load_model(folder)

    def test_says_that_it_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelError, match="cannot be written"):
            save_model(create_model("wrn_10_1", 2), tmp_path / "file" / "folder")

    def test_takes_only_models_built_by_name(self, tmp_path):
        with pytest.raises(ModelError, match="built by name"):
            save_model(Backbone(4, (), 2), tmp_path)


@pytest.mark.slow
def test_the_models_are_imported_without_timm():
    code = "import sys, refilled.models; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
