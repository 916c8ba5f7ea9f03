"""Augmentation against a loop over padded images, and the generator under it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refilled.data import Views, augment
from refilled.data.keyed import keyed_bits, keyed_integers, keyed_permutation, keyed_uniform
from refilled.errors import TaskError


def images(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
@pytest.mark.parametrize("side", [8, 33])
def test_every_view_is_a_crop_of_the_padded_image_and_mirrored_only_if_asked(kind, side):
    pixels = images(40, side)
    views = augment(pixels, torch.arange(40), seed=1, view=0, kind=kind).numpy()
    pad = side // 8
    mirrored = 0
    for image, view in zip(pixels.numpy(), views, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        crops = [
            padded[:, top : top + side, left : left + side] for top in range(2 * pad + 1) for left in range(2 * pad + 1)
        ]
        plain = any(np.array_equal(view, crop) for crop in crops)
        assert plain or any(np.array_equal(view, crop[:, :, ::-1]) for crop in crops)
        mirrored += not plain
    assert (mirrored > 0) == (kind == "crop-flip")


def test_a_resized_crop_is_a_part_of_the_image_enlarged_and_every_other_one_mirrored():
    # Red tells the row and green the column, so that each view tells which part it shows.
    side = 64
    ramp = torch.arange(side, dtype=torch.uint8).mul(3)
    pixels = torch.stack([ramp[:, None].expand(side, side), ramp.expand(side, side), torch.zeros(side, side)])
    views = augment(
        pixels.to(torch.uint8).expand(500, -1, -1, -1), torch.arange(500), seed=1, view=0, kind="resized-crop-flip"
    )
    rows, columns = views[:, 0, :, 0].double() / 3, views[:, 1, 0, :].double() / 3  # (N, S): the source of each
    assert torch.equal(views[:, 0], views[:, 0, :, :1].expand(-1, -1, side))  # cut along the axes
    assert torch.equal(views[:, 1], views[:, 1, :1, :].expand(-1, side, -1))
    height, width = rows[:, -1] - rows[:, 0], columns[:, -1] - columns[:, 0]
    assert 0.4 < (width < 0).double().mean() < 0.6
    area, aspect = height * width.abs() / (side - 1) ** 2, (width / height).abs()
    assert 0.33 < area.min() < 0.4
    assert area.max() > 0.95
    assert 0.72 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.39
    steps = rows.diff(dim=1)
    assert (steps >= 0).all()
    assert (steps - steps.mean(1, keepdim=True)).abs().max() < 0.75  # straight, up to rounding and the border


def test_a_resized_crop_is_torchs_own_bilinear_resize_of_that_part():
    pixels = images(1, 48)
    (area,), (skew,) = (keyed_uniform(3, what, 2, np.array([0])) for what in ("area", "skew"))
    (top,), (left,) = (keyed_uniform(3, what, 2, np.array([0])) for what in ("top", "left"))
    area, skew = 0.35 + 0.65 * area, (4 / 3) ** (skew - 0.5)
    height, width = min(1, area**0.5 / skew), min(1, area**0.5 * skew)
    theta = torch.tensor([[[width, 0, (2 * left - 1) * (1 - width)], [0, height, (2 * top - 1) * (1 - height)]]])
    grid = torch.nn.functional.affine_grid(theta.float(), [1, 3, 48, 48], align_corners=False)
    wanted = torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    if keyed_integers(2, 3, "mirror", 2, np.array([0])):
        wanted = wanted.flip(3)
    view = augment(pixels, torch.arange(1), seed=3, view=2, kind="resized-crop-flip")
    assert (view.float() - wanted).abs().max() <= 0.51


def test_no_augmentation_is_the_identity():
    pixels = images(3, 16)
    assert augment(pixels, torch.arange(3), seed=0, view=0, kind="none") is pixels


@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop-flip"])
def test_a_view_does_not_depend_on_the_batch(kind):
    pixels = images(20, 16)
    order = torch.tensor([7, 3, 19, 3])
    together = augment(pixels, torch.arange(20), seed=5, view=2, kind=kind)
    assert torch.equal(augment(pixels[order], order, seed=5, view=2, kind=kind), together[order])


def test_seed_and_view_change_the_view():
    pixels = images(20, 16)
    views = [
        augment(pixels, torch.arange(20), seed=seed, view=view, kind="crop-flip") for seed in (0, 1) for view in (0, 1)
    ]
    assert all(not torch.equal(views[i], views[j]) for i in range(4) for j in range(i))


def test_all_offsets_are_used():
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(1000, 3, 8, 8)
    corners = augment(ramp, torch.arange(1000), seed=0, view=0, kind="crop")[:, 0, 0, 0]
    assert set(corners.tolist()) == {9, 8, 1, 0}  # offsets -1 and 0 in both directions; +1 is the next
    assert set(augment(ramp, torch.arange(1000), seed=0, view=0, kind="crop")[:, 0, 4, 4].tolist()) == {
        8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)
    }


@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop-flip"])
def test_memory_layout_does_not_matter_and_the_result_is_channels_last(kind):
    pixels = images(4, 16)
    channels_last = pixels.contiguous(memory_format=torch.channels_last)
    views = [augment(p, torch.arange(4), seed=0, view=0, kind=kind) for p in (pixels, channels_last)]
    assert torch.equal(*views)
    assert views[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop-flip"])
def test_tiny_and_empty_batches_pass(kind):
    assert augment(images(2, 1), torch.arange(2), seed=0, view=0, kind=kind).shape == (2, 3, 1, 1)
    assert augment(images(0, 8), torch.arange(0), seed=0, view=0, kind=kind).shape == (0, 3, 8, 8)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(TaskError, match="did you mean 'crop-flip'"):
        augment(images(1, 8), torch.arange(1), seed=0, view=0, kind="crop-flop")


def splitmix64(state: int) -> int:
    """One output of splitmix64 in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_keyed_bits_are_splitmix64_key_after_key():
    assert splitmix64(1234567) == 6457827717110365317  # the generator's published test vector
    assert int(keyed_bits(1234567)) == 6457827717110365317
    assert int(keyed_bits(1234567, 8)) == splitmix64(6457827717110365317 + 8)


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_keyed_bits_of_an_array_are_those_of_its_elements(seed, keys):
    together = keyed_bits(seed, "purpose", np.array(keys))
    assert together.tolist() == [int(keyed_bits(seed, "purpose", key)) for key in keys]


def test_purposes_are_independent_and_uniform():
    keys = np.arange(20_000)
    first, second = keyed_uniform(0, "top", keys), keyed_uniform(0, "left", keys)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert 0 <= first.min() < 0.001
    assert 0.999 < first.max() < 1
    counts = np.bincount(keyed_integers(9, 0, "top", keys))
    assert np.all(abs(counts - 20_000 / 9) < 5 * (20_000 / 9) ** 0.5)


def test_a_permutation_holds_every_number_once():
    assert sorted(keyed_permutation(1000, 3, "any").tolist()) == list(range(1000))


def test_mixup_blends_each_image_with_its_partner():
    pixels, partners = images(5, 8), images(10, 8)[5:]
    mix = Views("none", mixup=0.4).mixing(8, seed=1, view=2)
    assert 0 <= mix.share <= 1
    blend = mix(pixels, partners)
    expected = (mix.share * pixels.double() + (1 - mix.share) * partners.double()) / 255
    torch.testing.assert_close(blend, expected.float())
    torch.testing.assert_close(mix(pixels / 255, partners / 255), blend)


def test_cutmix_puts_a_square_of_the_partner_into_each_image():
    pixels = images(5, 12).contiguous(memory_format=torch.channels_last)
    before, partners = pixels.clone(), images(10, 12)[5:]
    for view in range(20):
        mix = Views("none", cutmix=1.0).mixing(12, seed=1, view=view)
        mixed = mix(pixels, partners)
        assert mixed.dtype == torch.uint8
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        rows, columns = (torch.isin(torch.arange(12), torch.arange(12)[part]) for part in mix.patch)
        inside = rows[:, None] & columns
        assert rows.sum() == columns.sum()
        assert mix.share == pytest.approx(1 - inside.sum() / 144)
        assert torch.equal(mixed, torch.where(inside, partners, pixels))
    assert torch.equal(pixels, before)


def test_mixing_is_a_pure_function_and_shares_follow_the_beta_distribution():
    def draw(**alpha: float) -> list[float]:
        views = Views("none", **alpha)
        return [views.mixing(1000, seed=0, view=view).share for view in range(1000)]

    assert draw(mixup=0.4) == draw(mixup=0.4)
    for kind in ("mixup", "cutmix"):
        for alpha in (0.2, 1.0, 8.0):
            shares = np.array(draw(**{kind: alpha}))
            assert shares.mean() == pytest.approx(0.5, abs=0.05)
            assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)  # of Beta(alpha, alpha)


def test_with_both_kinds_of_mixing_half_of_the_views_get_each():
    views = Views("none", mixup=1.0, cutmix=1.0)
    kinds = [views.mixing(8, seed=0, view=view).patch is None for view in range(400)]
    assert 160 < sum(kinds) < 240


def test_mixing_neither_way_is_refused():
    with pytest.raises(TaskError, match="mixup or cutmix"):
        Views("none").mixing(8, seed=0, view=0)


ALTERED = {"auto_augment": "trivial", "color_jitter": 0.4, "random_erasing": 0.5}


@pytest.mark.parametrize("changes", [{}, {"mixup": 0.4}, {"cutmix": 1.0}, ALTERED, {"cutmix": 1.0, **ALTERED}], ids=str)
def test_what_a_view_shows_of_an_image_does_not_depend_on_the_batch(changes):
    pixels, views = images(30, 16), Views("crop-flip", **changes)
    whole = views.load(pixels, torch.arange(30), seed=5, view=2)
    some = torch.tensor([7, 3, 29, 3])
    assert torch.equal(views.load(pixels, some, seed=5, view=2), whole[some])
    assert not torch.equal(views.load(pixels, torch.arange(30), seed=5, view=3), whole)


def test_a_mixed_view_is_made_of_the_same_view_of_both_images():
    pixels, plain, mixed = images(30, 16), Views("crop-flip", **ALTERED), Views("crop-flip", mixup=1.0, **ALTERED)
    order = {"seed": 5, "view": 2}
    partner = mixed.partners(torch.arange(30), 30, **order)
    assert len(set(partner.tolist())) > 15
    own = plain.load(pixels, torch.arange(30), **order)
    expected = mixed.mixing(16, **order)(own, own[partner])
    assert torch.equal(mixed.load(pixels, torch.arange(30), **order), expected)
