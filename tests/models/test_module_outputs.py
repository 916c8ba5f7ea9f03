"""What people's networks return: each form is read as the same embedding, or refused with the reason."""

import warnings
from collections import OrderedDict, namedtuple
from textwrap import dedent

import pytest
import torch
from torch import nn

from refilled.errors import ModelError
from refilled.models import load_teacher
from refilled.models.module_outputs import read_embedding

ROWS = torch.rand(2, 6)
MAPS = torch.rand(2, 6, 4, 4)
PATCHES = MAPS.flatten(2).transpose(1, 2)
TOKEN = torch.rand(2, 6)
REGISTERS = torch.rand(2, 4, 6)
TOKENS = torch.cat([TOKEN[:, None], PATCHES], 1)
Named = namedtuple("Named", ["last_hidden_state", "pooler_output"])

POOLED = MAPS.mean((2, 3))
RETURNED = {
    "rows": (ROWS, ROWS),
    "maps": (MAPS, POOLED),
    "maps, channels last": (MAPS.movedim(1, 3), POOLED),
    "tokens without a class token": (PATCHES, POOLED),
    "tokens with a class token": (TOKENS, POOLED),
    "tokens with registers": (torch.cat([TOKEN[:, None], REGISTERS, PATCHES], 1), POOLED),
    "a tuple of one": ((ROWS,), ROWS),
    "a list": ([None, MAPS], POOLED),
    "rows beside tokens": ((TOKENS, ROWS), ROWS),
    "a named tuple": (Named(TOKENS, ROWS), ROWS),
    "a dict of one": ({"anything": ROWS}, ROWS),
    "pooler_output first": (OrderedDict(last_hidden_state=TOKENS, pooler_output=ROWS), ROWS),
    "pooled maps of 1 x 1": ({"pooler_output": ROWS[..., None, None], "last_hidden_state": MAPS}, ROWS),
    "no pooler output": ({"last_hidden_state": TOKENS, "attentions": None}, POOLED),
    "image_embeds": ({"logits": torch.rand(2, 3), "image_embeds": ROWS}, ROWS),
    "DINOv2's own code": ({"x_norm_clstoken": TOKEN, "x_norm_patchtokens": PATCHES, "x_prenorm": TOKENS}, TOKEN),
}


@pytest.mark.parametrize(("output", "embedding"), RETURNED.values(), ids=RETURNED)
def test_every_form_is_read(output, embedding):
    torch.testing.assert_close(read_embedding(output), embedding)


OF_TOKENS = {
    "a class token": TOKENS,
    "registers": torch.cat([TOKEN[:, None], REGISTERS, PATCHES], 1),
    "a dict": {"last_hidden_state": TOKENS, "pooler_output": ROWS},
    "a tuple": (TOKENS, ROWS),
    "DINOv2's own code": {"x_norm_clstoken": TOKEN, "x_norm_patchtokens": PATCHES},
}


@pytest.mark.parametrize("output", OF_TOKENS.values(), ids=OF_TOKENS)
def test_each_part_of_the_tokens_can_be_chosen(output):
    torch.testing.assert_close(read_embedding(output, "token"), TOKEN)
    torch.testing.assert_close(read_embedding(output, "mean"), POOLED)
    torch.testing.assert_close(read_embedding(output, "both"), torch.cat([TOKEN, POOLED], 1))


@pytest.mark.parametrize(
    ("output", "pooling", "reason"),
    [
        ((ROWS, TOKEN), "pooled", r"not clear .* tuple of shape \(2, 6\), shape \(2, 6\)"),
        ({"a": ROWS, "b": TOKEN}, "pooled", r"not clear .* dict of a: shape \(2, 6\), b"),
        ({}, "pooled", "not clear .* got dict"),
        (None, "pooled", "got NoneType"),
        (torch.rand(2), "pooled", r"got shape \(2,\)"),
        (ROWS, "token", "needs tokens .* none"),
        (PATCHES, "token", "no class token"),
    ],
)
def test_what_is_ambiguous_is_refused_with_the_choices(output, pooling, reason):
    with pytest.raises(ModelError, match=reason):
        read_embedding(output, pooling)


def test_pooling_is_exact_in_half_precision():
    maps = torch.full((1, 3, 32, 32), 1.0, dtype=torch.bfloat16)
    maps[..., 0, 0] = 1.25
    assert read_embedding(maps).dtype == torch.float32
    assert read_embedding(maps)[0, 0].item() == pytest.approx(1 + 0.25 / 1024, abs=1e-7)


HALF = (0.5, 0.5, 0.5)
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
NET = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 9), nn.Linear(9, 4)
        def rows(self, x): return self.hidden(self.conv(x).relu().mean((2, 3))).relu()
        def forward(self, x): return self.head(self.rows(x))
    ABOUT = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "labels": ["a", "b", "c", "d"]}
    """


def load(tmp_path, code, **given):
    (tmp_path / "mine.py").write_text(dedent(NET) + dedent(code))
    return load_teacher(f"{tmp_path}/mine.py:make", **given)


ENDS_IN_A_CLASSIFIER = {
    "logits": "self.head(self.rows(x))",
    "softmax": "self.head(self.rows(x)).softmax(1)",
    "log_softmax": "self.head(self.rows(x)).log_softmax(1)",
    "logits and features": "(lambda rows: (self.head(rows), rows))(self.rows(x))",
    "logits and maps": "(self.head(self.rows(x)), self.conv(x))",
    "a dict of logits": "{'logits': self.head(self.rows(x)), 'loss': None}",
}


@pytest.mark.parametrize("returned", ENDS_IN_A_CLASSIFIER.values(), ids=ENDS_IN_A_CLASSIFIER)
def test_the_input_of_the_last_linear_layer_is_the_embedding_which_is_reported(tmp_path, returned):
    code = f"class Mine(Net):\n    def forward(self, x): return {returned}\ndef make(): return Mine(), ABOUT\n"
    teacher = load(tmp_path, code)
    assert "ends in a linear layer of 4 outputs" in teacher.notes[0]
    assert (teacher.embedding_dim, teacher.num_classes, teacher.class_names) == (9, 4, ("a", "b", "c", "d"))
    with torch.no_grad():
        seen, rows = teacher(IMAGES), teacher.module.rows(IMAGES / 127.5 - 1)
        torch.testing.assert_close(seen.embedding, rows)
        torch.testing.assert_close(seen.logits, teacher.module.head(rows))


def test_your_own_method_is_taken_at_its_word(tmp_path):
    code = (
        "class Mine(Net):\n    def embed(self, x): return self.head(self.rows(x))\ndef make(): return Mine(), ABOUT\n"
    )
    teacher = load(tmp_path, code)
    assert (teacher.embedding_dim, teacher.notes) == (4, ())


def test_a_dict_that_names_an_embedding_is_taken_at_its_word(tmp_path):
    returned = "{'pooler_output': self.head(self.rows(x))}"
    code = f"class Mine(Net):\n    def forward(self, x): return {returned}\ndef make(): return Mine(), ABOUT\n"
    assert load(tmp_path, code).embedding_dim == 4


def test_tokens_are_chosen_by_option(tmp_path):
    code = """
        class Tokens(nn.Module):
            def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 6, 8, 8)
            def forward(self, x):
                patches = self.conv(x).flatten(2).transpose(1, 2)
                return {"last_hidden_state": torch.cat([patches[:, :1] + 1, patches], 1)}
        def make(): return Tokens(), ABOUT
        """
    images = IMAGES / 127.5 - 1
    for pooling in ("token", "mean", "both"):
        teacher = load(tmp_path, code, pooling=pooling)
        with torch.no_grad():
            found = teacher(IMAGES).embedding
            expected = read_embedding(teacher.module(images), pooling)
        torch.testing.assert_close(found, expected)
        assert teacher.embedding_dim == expected.shape[1] == (12 if pooling == "both" else 6)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_other_precisions_run_in_float32_with_a_note(tmp_path, cast):
    teacher = load(tmp_path, f"def make(): return Net().{cast}(), ABOUT\n")
    assert any("runs in float32" in note for note in teacher.notes)
    with torch.no_grad():
        assert teacher(IMAGES).embedding.dtype == torch.float32


def test_an_exported_program_runs_and_stays_as_it_was_exported(tmp_path):
    code = """
        def make():
            batch = torch.export.Dim("batch", min=1, max=64)
            arguments = (torch.rand(2, 3, 32, 32),)
            return torch.export.export(Net().eval(), arguments, dynamic_shapes=({0: batch},)), ABOUT
        """
    teacher = load(tmp_path, code, input_size=32)
    with torch.no_grad():
        one, both = teacher(IMAGES[:1]), teacher.train()(IMAGES)
    torch.testing.assert_close(one.embedding, both.embedding[:1])
    assert "cannot be inspected" in teacher.notes[0]


@pytest.mark.filterwarnings("ignore")  # newer versions of torch discourage TorchScript
def test_a_torch_script_program_from_a_function_runs(tmp_path):
    code = """
        def make():
            net = Net().eval()
            net.forward = net.rows
            return torch.jit.trace(net, torch.rand(2, 3, 32, 32)), ABOUT
        """
    teacher = load(tmp_path, code)
    assert "cannot be inspected" in teacher.notes[0]
    with torch.no_grad():
        assert teacher(IMAGES).embedding.shape == (2, 9)


@pytest.mark.parametrize("program", ["script", "export"])
def test_a_program_file_is_refused_with_a_remedy(tmp_path, program):
    path = tmp_path / ("p.pt2" if program == "export" else "p.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if program == "export":
            torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)
        else:
            torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    with pytest.raises(ModelError, match=r"If you trust it, .* mine\.py:load"):
        load_teacher(str(path))
    with pytest.raises(ModelError, match=r"If you trust it, .* mine\.py:load"):
        load_teacher(f"wrn_10_1:{path}", mean=HALF, std=HALF)
