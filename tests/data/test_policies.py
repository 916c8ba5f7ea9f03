"""Changes of single images against torchvision's own transforms, given the same draws."""

from itertools import chain

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from torchvision.transforms import v2

from refilled.data import Views, alter, policies
from refilled.data.keyed import keyed_bits, keyed_integers, keyed_uniform
from refilled.data.policies import LEVELS, OPERATIONS, draw_operations, draw_rectangles
from refilled.errors import TaskError

ALL = {"auto_augment": "trivial", "color_jitter": 0.4, "random_erasing": 0.5}
EACH = [{"auto_augment": "trivial"}, {"auto_augment": "rand"}, {"color_jitter": 0.4}, {"random_erasing": 0.5}, ALL]
PLACE = {"seed": 3, "view": 2}


def images(count: int, side: int) -> torch.Tensor:
    """Smooth images: neighbouring pixels differ little, so that operations show."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, side, mode="bicubic").mul(255).clamp(0, 255).to(torch.uint8)


def of_torchvision(transform, image, index, monkeypatch):
    """Let torchvision's policy draw what the keys say: operation, level (if it draws one), sign (if there is one)."""
    turns = []

    def randint(below, size):
        if below == len(OPERATIONS):
            turns.append(below)
        what = {len(OPERATIONS): "operation", LEVELS: "level"}[below]
        return torch.tensor(int(keyed_integers(below, 3, what, 2, index, len(turns) - 1)))

    def rand(size):
        return torch.tensor(0.25 if keyed_integers(2, 3, "sign", 2, index, len(turns) - 1) else 0.75)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", randint)
        patch.setattr(torch, "rand", rand)
        return transform(image)


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize(("policy", "transform"), [("trivial", v2.TrivialAugmentWide()), ("rand", v2.RandAugment())])
def test_a_policy_is_torchvisions_for_the_same_draws(policy, transform, side, monkeypatch):
    pixels, indices = images(500, side), torch.arange(500)
    drawn = draw_operations(policy, side, indices.numpy(), **PLACE)
    kinds = set(zip(drawn.kinds.flat, np.sign(drawn.magnitudes).flat, strict=True))
    assert len(kinds) > 22  # all operations, nearly all with both signs
    found = alter(pixels, indices, auto_augment=policy, **PLACE)
    for index in range(500):
        assert torch.equal(found[index], of_torchvision(transform, pixels[index], index, monkeypatch)), index
    assert (found != pixels).flatten(1).any(1).float().mean() > 0.75


def test_the_default_dtype_does_not_matter():
    drawn = draw_operations("trivial", 27, np.arange(500), **PLACE)
    torch.set_default_dtype(torch.float64)
    try:
        policies._table.cache_clear()
        again = draw_operations("trivial", 27, np.arange(500), **PLACE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(again.magnitudes, drawn.magnitudes)


def test_translations_end_at_the_side_of_small_images():
    drawn = draw_operations("trivial", 16, np.arange(5000), **PLACE)
    shifts = np.abs(drawn.magnitudes[np.isin(drawn.kinds, [3, 4])])
    assert shifts.max() == 16
    assert np.allclose(np.unique(shifts), np.linspace(0, 16, LEVELS))


def test_colour_jitter_is_torchvisions_for_the_same_factors_and_order():
    pixels = images(100, 20)
    found = alter(pixels, torch.arange(100), color_jitter=0.7, **PLACE)
    orders = set()
    for index, image in enumerate(pixels):
        brightness, contrast, saturation = 0.3 + 1.4 * keyed_uniform(3, "jitter", 2, index, np.arange(3))
        order = np.argsort(keyed_bits(3, "jitter order", 2, index, np.arange(3))).tolist()
        orders.add(tuple(order))
        factors = {"brightness_factor": brightness, "contrast_factor": contrast, "saturation_factor": saturation}
        expected = v2.ColorJitter(0.7, 0.7, 0.7).transform(image, {"fn_idx": order, "hue_factor": None, **factors})
        assert torch.equal(found[index], expected)
    assert len(orders) == 6


def test_an_erased_rectangle_is_noise_and_the_rest_is_the_image():
    pixels = images(400, 24)
    found = alter(pixels, torch.arange(400), random_erasing=0.3, **PLACE)
    drawn = draw_rectangles(0.3, 24, np.arange(400), **PLACE)
    noise, erased = [], 0
    for image, other, top, left, height, width in zip(pixels, found, *drawn, strict=True):
        inside = other[:, top : top + height, left : left + width]
        noise.append(inside.flatten().tolist())
        erased += height > 0
        box = {"i": top, "j": left, "h": height, "w": width, "v": inside}
        assert torch.equal(v2.RandomErasing().transform(image, box), other)
    assert 90 < erased < 150
    assert chisquare(np.bincount(list(chain(*noise)), minlength=256)).pvalue > 0.001
    assert len(set(map(tuple, noise))) == erased + 1  # no two alike


def test_rectangles_are_distributed_as_torchvisions():
    side, count = 84, 3000
    ours = draw_rectangles(1.0, side, np.arange(count), seed=0, view=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [v2.RandomErasing().make_params([torch.zeros(3, side, side)]) for _ in range(count)]
    top, left, height, width = (np.array([drawn[name] for drawn in theirs]) for name in "ijhw")
    pairs = [(ours.top, top), (ours.left, left), (ours.height, height), (ours.height * ours.width, height * width)]
    for found, expected in pairs:
        assert ks_2samp(found, expected).pvalue > 0.001
    assert (ours.top + ours.height).max() == (ours.left + ours.width).max() == side


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_operations_are_drawn_equally_often_and_independently(policy):
    keys = np.arange(20_000)
    kinds = [draw_operations(policy, 32, keys, seed=seed, view=view).kinds for seed, view in ((0, 0), (0, 1), (1, 0))]
    for drawn in kinds:
        for turn in drawn.T:
            assert chisquare(np.bincount(turn, minlength=len(OPERATIONS))).pvalue > 0.001
    pairs = [(kinds[0][:, 0], kinds[1][:, 0]), (kinds[0][:, 0], kinds[2][:, 0]), (kinds[0][:-1, 0], kinds[0][1:, -1])]
    pairs += [(kinds[0][:, 0], kinds[0][:, 1])] if policy == "rand" else []
    for first, second in pairs:
        counts = np.bincount(first * len(OPERATIONS) + second, minlength=len(OPERATIONS) ** 2)
        assert chi2_contingency(counts.reshape(len(OPERATIONS), -1)).pvalue > 0.001


def test_levels_and_signs_are_drawn_equally_often():
    drawn = draw_operations("trivial", 32, np.arange(40_000), seed=0, view=0)
    rotations = drawn.magnitudes[drawn.kinds == OPERATIONS.index("rotate")]
    counts = np.bincount(np.rint(rotations / 135 * (LEVELS - 1)).astype(int) + LEVELS - 1)
    counts[LEVELS - 1] /= 2  # 0 has no sign
    assert len(counts) == 2 * LEVELS - 1
    assert chisquare(counts, np.full(len(counts), counts.mean())).pvalue > 0.001


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_neither_the_batch_nor_the_memory_layout_matters(changes):
    pixels = images(30, 20)
    before = pixels.clone()
    together = alter(pixels, torch.arange(30), **changes, **PLACE)
    assert together.dtype == torch.uint8
    assert together.is_contiguous(memory_format=torch.channels_last)
    order = torch.tensor([7, 3, 29, 3])
    some = pixels[order].contiguous(memory_format=torch.channels_last)
    assert torch.equal(alter(some, order, **changes, **PLACE), together[order])
    assert torch.equal(pixels, before)
    for place in ({"seed": 4, "view": 2}, {"seed": 3, "view": 1}):
        assert not torch.equal(alter(pixels, torch.arange(30), **changes, **place), together)


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_grey_images_stay_grey_and_keep_their_saturation(changes):
    grey = images(300, 16)[:, :1].expand(-1, 3, -1, -1)
    found = alter(grey, torch.arange(300), **changes, **PLACE)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert not torch.equal(found, grey)
    if changes == {"auto_augment": "trivial"}:
        drawn = draw_operations("trivial", 16, np.arange(300), **PLACE)
        coloured = torch.from_numpy(drawn.kinds[:, 0] == OPERATIONS.index("color"))
        assert coloured.sum() > 5
        assert torch.equal(found[coloured], grey[coloured])


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_tiny_and_empty_batches_pass(changes):
    assert alter(images(3, 8)[..., :1, :1], torch.arange(3), **changes, **PLACE).shape == (3, 3, 1, 1)
    assert alter(images(1, 8)[:0], torch.arange(0), **changes, **PLACE).shape == (0, 3, 8, 8)


def test_off_returns_the_images_themselves():
    pixels = images(3, 8)
    assert alter(pixels, torch.arange(3), **PLACE) is pixels


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(TaskError, match="did you mean 'trivial'"):
        Views("none", auto_augment="trival").load(images(1, 8), torch.arange(1), **PLACE)
