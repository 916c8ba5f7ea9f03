"""Teachers: from folders, weight files, timm and a user's own file; frozen, and never half loaded."""

import pickle
from pathlib import Path
from textwrap import dedent

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from refilled.errors import ModelError
from refilled.models import create_model, load_teacher, save_model

HALF = (0.5, 0.5, 0.5)
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def is_frozen(teacher):
    return not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def write(path: Path, code: str) -> Path:
    path.write_text(dedent(code))
    return path


class TestStudentFolder:
    """A student folder is a teacher."""

    def test_becomes_a_frozen_teacher(self, tmp_path):
        student = create_model("wrn_10_1", 4, mean=(0.1, 0.2, 0.3)).eval()
        student.class_names = ("a", "b", "c", "d")
        save_model(student, tmp_path)
        teacher = load_teacher(str(tmp_path))
        assert is_frozen(teacher)
        assert teacher.class_names == student.class_names
        with torch.no_grad():
            assert torch.equal(teacher(IMAGES).logits, student(IMAGES).logits)

    def test_is_overridden_by_what_is_asked_for(self, tmp_path):
        save_model(create_model("wrn_10_1", 4, mean=(0.1, 0.2, 0.3)), tmp_path)
        teacher = load_teacher(str(tmp_path), mean=HALF, input_size=16)
        assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]
        assert teacher.input_size == 16

    def test_sees_images_at_the_size_of_its_training(self, tmp_path):
        student = create_model("wrn_10_1", 4, image_size=16).eval()
        save_model(student, tmp_path)
        large = torch.rand(2, 3, 40, 40)
        teacher = load_teacher(str(tmp_path), image_size=40)
        small = F.interpolate(large, size=(16, 16), mode="bilinear", align_corners=False, antialias=True)
        with torch.no_grad():
            torch.testing.assert_close(teacher(large).embedding, student(small).embedding)
        assert "sees 16 pixels, as in its training" in teacher.notes[0]
        assert load_teacher(str(tmp_path), image_size=16).input_size is None
        assert load_teacher(str(tmp_path), image_size=40, input_size=24).input_size == 24
        assert load_teacher("refilled/letters", image_size=16).input_size == 8

    def test_needs_its_description(self, tmp_path):
        with pytest.raises(ModelError, match=r"contains no model\.json"):
            load_teacher(str(tmp_path))


class TestWeightFile:
    """Weights for a named architecture."""

    @pytest.fixture
    def model(self):
        return create_model("wrn_10_1", 4).eval()

    @pytest.mark.parametrize(
        "nest",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model": state, "best_acc": 0.5},
            lambda state: {f"module.{name}": value for name, value in state.items()},
            lambda state: {"state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
            lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
            lambda state: {name.replace("classifier", "fc"): value for name, value in state.items()},
        ],
        ids=["plain", "state_dict", "model", "module", "both", "old", "fc"],
    )
    @pytest.mark.parametrize("suffix", ["pth", "th"])
    def test_is_found_inside_what_holds_it(self, tmp_path, model, nest, suffix):
        torch.save(nest(model.state_dict()), tmp_path / f"weights.{suffix}")
        teacher = load_teacher(f"wrn_10_1:{tmp_path}/weights.{suffix}", mean=HALF, std=HALF)
        assert is_frozen(teacher)
        assert teacher.num_classes == 4
        with torch.no_grad():
            assert torch.equal(teacher(IMAGES).logits, model(IMAGES).logits)

    def test_can_be_safetensors(self, tmp_path, model):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
        teacher = load_teacher(f"wrn_10_1:{tmp_path}/w.safetensors", mean=HALF, std=HALF)
        with torch.no_grad():
            assert torch.equal(teacher(IMAGES).embedding, model(IMAGES).embedding)

    def test_can_name_things_as_published_wide_resnets_do(self, tmp_path, model):
        names = {"classifier.": "fc.", ".shortcut.": ".convShortcut."}
        state = {}
        for name, value in model.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            if name.startswith("block"):
                name = name.replace(".", ".layer.", 1)
            state[name] = value
        assert "block2.layer.0.convShortcut.weight" in state
        torch.save({"model": state}, tmp_path / "w.pth")
        teacher = load_teacher(f"wrn_10_1:{tmp_path}/w.pth", mean=HALF, std=HALF)
        with torch.no_grad():
            assert torch.equal(teacher(IMAGES).embedding, model(IMAGES).embedding)

    def test_must_fit_in_every_name_and_shape(self, tmp_path, model):
        state = model.state_dict()
        state["more.weight"] = state.pop("conv1.weight")
        state["bn1.weight"] = torch.ones(3)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(
            ModelError, match=r"1 missing: conv1\.weight; 1 not known to it: more\.weight; 1 of another shape: bn1"
        ):
            load_teacher(f"wrn_10_1:{tmp_path}/w.pth", mean=HALF, std=HALF)

    def test_needs_mean_and_std(self, tmp_path, model):
        torch.save(model.state_dict(), tmp_path / "w.pth")
        with pytest.raises(ModelError, match="--teacher-mean and --teacher-std"):
            load_teacher(f"wrn_10_1:{tmp_path}/w.pth", mean=HALF)

    @pytest.mark.parametrize("content", [{}, [1], {"epoch": 3}, torch.zeros(2), {"state_dict": {"a": "b"}}])
    def test_must_hold_a_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ModelError, match=r"w\.pth holds no state dict"):
            load_teacher(f"wrn_10_1:{tmp_path}/w.pth", mean=HALF, std=HALF)

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04" + b"\x00" * 50, b"\x80\x02."])
    def test_must_be_readable(self, tmp_path, suffix, content):
        (tmp_path / f"w.{suffix}").write_bytes(content)
        with pytest.raises(ModelError, match=rf"w\.{suffix}"):
            load_teacher(f"wrn_10_1:{tmp_path}/w.{suffix}", mean=HALF, std=HALF)

    @pytest.mark.parametrize("save", [torch.save, lambda gadget, path: path.write_bytes(pickle.dumps(gadget, 2))])
    @pytest.mark.parametrize("nest", [lambda gadget: gadget, lambda gadget: {"state_dict": {"conv1.weight": gadget}}])
    def test_cannot_run_code(self, tmp_path, save, nest):
        canary = tmp_path / "canary"

        class Gadget:
            def __reduce__(self):
                return Path.touch, (canary,)

        save(nest(Gadget()), tmp_path / "w.pt")
        with pytest.raises(ModelError, match="refused"):
            load_teacher(f"wrn_10_1:{tmp_path}/w.pt", mean=HALF, std=HALF)
        assert not canary.exists()


def renamed(weights, counters):
    """The weights under the names of another library."""
    kept = {name: v for name, v in weights.items() if counters or not name.endswith("num_batches_tracked")}
    return {f"part{number}.{name.rpartition('.')[2]}": v for number, (name, v) in enumerate(kept.items())}


class TestTimm:
    """timm models keep their own classifier."""

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
    def test_says_what_timm_says(self, tmp_path, name):
        body = timm.create_model(name, num_classes=5).eval()
        safetensors.torch.save_file(body.state_dict(), tmp_path / "w.safetensors")
        teacher = load_teacher(f"timm/{name}:{tmp_path}/w.safetensors", mean=HALF, std=HALF)
        assert is_frozen(teacher)
        assert teacher.num_classes == 5
        assert teacher.input_size == 160  # as its configuration says
        images = torch.rand(2, 3, 160, 160)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images).logits, body((images - 0.5) / 0.5))

    def test_knows_its_own_normalization(self, tmp_path):
        body = timm.create_model("test_resnet")
        safetensors.torch.save_file(body.state_dict(), tmp_path / "w.safetensors")
        teacher = load_teacher(f"timm/test_resnet:{tmp_path}/w.safetensors", input_size=32)
        torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(body.pretrained_cfg["mean"]))
        torch.testing.assert_close(teacher.std.flatten(), torch.tensor(body.pretrained_cfg["std"]))
        assert teacher.input_size == 32

    @pytest.mark.parametrize("counters", [True, False])
    def test_may_have_another_librarys_names_in_the_same_order(self, tmp_path, counters):
        body = timm.create_model("test_efficientnet", num_classes=5).eval()
        weights = renamed(body.state_dict(), counters)
        torch.save(weights, tmp_path / "w.pth")
        teacher = load_teacher(f"timm/test_efficientnet:{tmp_path}/w.pth", mean=HALF, std=HALF)
        images = torch.rand(2, 3, 160, 160)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images).logits, body((images - 0.5) / 0.5))

    def test_is_not_matched_by_order_if_a_mean_would_become_a_variance(self, tmp_path):
        weights = renamed(timm.create_model("test_efficientnet").state_dict(), counters=True)
        mean, variance = ".running_mean", ".running_var"
        swapped = {
            name.replace(mean, ".x").replace(variance, mean).replace(".x", variance): v for name, v in weights.items()
        }
        torch.save(swapped, tmp_path / "w.pth")
        with pytest.raises(ModelError, match="does not fit the architecture"):
            load_teacher(f"timm/test_efficientnet:{tmp_path}/w.pth")

    def test_can_lack_a_classifier(self, tmp_path):
        body = timm.create_model("test_vit", num_classes=0)
        safetensors.torch.save_file(body.state_dict(), tmp_path / "w.safetensors")
        teacher = load_teacher(f"timm/test_vit:{tmp_path}/w.safetensors")
        with torch.no_grad():
            seen = teacher(IMAGES)
        assert teacher.num_classes == 0
        assert seen.logits.shape == (2, 0)
        assert seen.embedding.shape == (2, teacher.embedding_dim)

    def test_says_what_to_do_without_a_network(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=r"timm/test_resnet:FILE\.safetensors"):
            load_teacher("timm/test_resnet")


class TestUserFile:
    """A function in a user's own file."""

    NET = """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self, classes=4):
                super().__init__()
                self.conv, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, classes)
            def maps(self, x):
                return self.conv(x).relu()
            def forward(self, x):
                return self.head(self.maps(x).mean((2, 3)))
        INFO = {"mean": [0.1, 0.2, 0.3], "std": (0.4, 0.5, 0.6), "labels": ["a", "b", "c", "d"]}
        """

    def load(self, tmp_path, code, call="make", **flags):
        path = write(tmp_path / "mine.py", dedent(self.NET) + dedent(code))
        return load_teacher(f"{path}:{call}", **flags)

    @pytest.mark.parametrize(
        ("name", "output", "dim"),
        [
            ("forward_features", "self.maps(x)", 6),
            ("forward_features", "self.maps(x).mean((2, 3))", 6),
            ("forward_features", "self.maps(x).flatten(2).transpose(1, 2)", 6),
            ("embed", "self.maps(x)", 6),
        ],
        ids=["maps", "pooled", "tokens", "embed"],
    )
    def test_gives_the_embedding_and_its_classifier(self, tmp_path, name, output, dim):
        code = f"""
            class Mine(Net):
                def {name}(self, x):
                    return {output}
            def make():
                torch.manual_seed(0)
                return Mine(), INFO
            """
        teacher = self.load(tmp_path, code)
        assert is_frozen(teacher)
        assert (teacher.embedding_dim, teacher.num_classes, teacher.feature_channels) == (dim, 4, ())
        assert teacher.class_names == ("a", "b", "c", "d")
        normalized = (IMAGES / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(
            3, 1, 1
        )
        with torch.no_grad():
            seen = teacher(IMAGES)
            torch.testing.assert_close(seen.embedding, teacher.module.maps(normalized).mean((2, 3)))
            torch.testing.assert_close(seen.logits, teacher.module(normalized))

    def test_can_be_any_module(self, tmp_path):
        teacher = self.load(tmp_path, "def make(): return nn.Conv2d(3, 5, 3), INFO")
        with torch.no_grad():
            seen = teacher(IMAGES)
        assert seen.embedding.shape == (2, 5)
        assert seen.logits.shape == (2, 0)
        assert teacher.class_names is None

    def test_can_be_a_timm_model(self, tmp_path):
        code = """
            import timm
            def make(): return timm.create_model("test_resnet", num_classes=3)
            """
        teacher = self.load(tmp_path, code)
        assert teacher.feature_channels
        assert (teacher.num_classes, teacher.input_size) == (3, 160)

    def test_gets_its_argument_as_one_string(self, tmp_path):
        code = "def make(text): net = Net(); net.class_names = list(text[-4:]); return net, {**INFO, 'labels': None}"
        teacher = self.load(tmp_path, code, call="make:some:dir/x.wxyz")
        assert teacher.class_names == tuple("wxyz")
        code = "def make(text): return nn.Conv2d(3, len(text), 1), INFO"
        assert self.load(tmp_path, code, call="make:a:b c").embedding_dim == 5

    def test_can_import_its_neighbours_be_anywhere_and_use_data_classes(self, tmp_path):
        folder = tmp_path / "with space: and colon"
        folder.mkdir()
        write(folder / "its_neighbour.py", "CHANNELS = 9")
        code = """
            from __future__ import annotations
            from dataclasses import dataclass
            from its_neighbour import CHANNELS
            from torch import nn
            @dataclass
            class Config:
                channels: int = CHANNELS
            def make(): return nn.Conv2d(3, Config().channels, 1), {"mean": [0, 0, 0], "std": [1, 1, 1]}
            """
        path = write(folder / "mine.py", code)
        assert load_teacher(f"{path}:make").embedding_dim == 9

    def test_takes_normalization_from_flags_before_attributes_before_the_dict(self, tmp_path):
        code = """
            def make():
                net = nn.Conv2d(3, 5, 3)
                net.std, net.input_size = torch.tensor([0.7, 0.8, 0.9]), (3, 24, 24)
                return net, INFO
            """
        teacher = self.load(tmp_path, code, mean=HALF)
        torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(HALF))
        torch.testing.assert_close(teacher.std.flatten(), torch.tensor([0.7, 0.8, 0.9]))
        assert teacher.input_size == 24
        assert self.load(tmp_path, code, input_size=16).input_size == 16

    def test_needs_mean_and_std_from_somewhere(self, tmp_path):
        code = "def make(): return Net()"
        with pytest.raises(ModelError, match="--teacher-mean and --teacher-std"):
            self.load(tmp_path, code)
        assert self.load(tmp_path, code, mean=HALF, std=HALF).embedding_dim == 6

    def test_reports_the_line_for_a_relative_path_too(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "mine.py", "def make():\n    return 1 / 0\n")
        with pytest.raises(ModelError, match=r"mine\.py:2: ZeroDivisionError"):
            load_teacher("mine.py:make")

    @pytest.mark.parametrize(
        ("code", "hint"),
        [
            ("def make():\n    raise ValueError('boom')", r"mine\.py:14: ValueError: boom"),
            ("def make(:", r"mine\.py:13: SyntaxError"),
            ("import no_such_thing", r"mine\.py:13: ModuleNotFoundError"),
            ("raise SystemExit(3)", r"mine\.py:13: SystemExit"),
            ("def mike(): pass", "unknown function 'make'; did you mean 'mike'"),
            ("def make(path): pass", "TypeError: make\\(\\) missing 1 required"),
            ("def make(): return 3", "must return a torch.nn.Module"),
            ("def make(): return Net(), 3", "must return a torch.nn.Module"),
            ("def make(): return Net(), {**INFO, 'std': 'small'}", "std of the teacher must be numbers"),
            ("class M(Net): embed = Net.maps\ndef make(): return M(), {**INFO, 'labels': 7}", "TypeError"),
            ("def make(): return Net(), {**INFO, 'std': [0.5]}", "std must be three numbers"),
            ("def make(): return nn.Flatten(0), INFO", r"got shape \(24576,\)"),
            ("def make(): return nn.LSTM(64, 2), INFO", r"mine\.py: RuntimeError|mine\.py: ValueError"),
            (
                "class M(Net):\n    embed = lambda self, x: {}\ndef make(): return M(), INFO",
                "the embed of the teacher.*got dict",
            ),
            (
                "class M(Net):\n    def embed(self, x): return x + self.nothing\ndef make(): return M(), INFO",
                r"mine\.py:14: AttributeError",
            ),
            (
                "class M(Net):\n    def embed(self, x): return self.maps(x)\ndef make(): return M(3), INFO",
                "4 class names for the 3",
            ),
        ],
    )
    def test_reports_what_is_wrong_and_where(self, tmp_path, code, hint):
        with pytest.raises(ModelError, match=hint):
            self.load(tmp_path, code)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("wrn_40_2", "give wrn_40_2:WEIGHTS"),
        ("some/weights.safetensors", "give <architecture>:some/weights.safetensors"),
        ("mine.py", "mine.py:FUNCTION"),
        ("absent.py:make", "no file absent.py"),
        ("nothing/of/the/kind", "there is no such file or folder"),
        ("wrn_10_1:absent.pth", "no weight file absent.pth"),
        ("wrm_40_2:absent.pth", "did you mean 'wrn_40_2'"),
        ("timm/resnet180", "did you mean timm/resnet18"),
        ("timm/test_resnet:absent.pth", "no weight file absent.pth"),
    ],
)
def test_a_text_that_names_no_teacher_is_explained(text, hint):
    with pytest.raises(ModelError, match=hint):
        load_teacher(text, mean=HALF, std=HALF)


# The files leave closing what they open to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
class TestRealTeachers:
    """Files as users have them."""

    def test_birds_by_a_mobilenet(self, real_data):
        teacher = load_teacher(f"{real_data}/teachers/tf_mobilenet.py:load_mobilenet:mobilenetv2_100_inat_bird")
        with torch.no_grad():
            seen = teacher(IMAGES)
        assert is_frozen(teacher)
        assert seen.embedding.shape == (2, 1280)
        assert seen.logits.shape == (2, 965)
        assert teacher.class_names[0].startswith("Haemorhous cassinii")
        assert teacher.input_size is None
        assert teacher.mean.flatten().tolist() == list(HALF)

    def test_cifar10_by_a_resnet(self, real_data):
        text = f"{real_data}/teachers/cifar_resnet.py:load_cifar10_resnet:resnet56"
        with pytest.raises(ModelError, match="--teacher-mean"):
            load_teacher(text)
        teacher = load_teacher(text, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        with torch.no_grad():
            assert teacher(IMAGES).embedding.shape == (2, 64)
        assert teacher.num_classes == 10

    def test_mini_imagenet_by_a_convnet(self, real_data):
        teacher = load_teacher(f"{real_data}/teachers/conv4.py:load_conv4:dn4_conv64_mini_5shot_2023")
        with torch.no_grad():
            assert teacher(IMAGES).embedding.shape == (2, 64)
        assert teacher.num_classes == 0
