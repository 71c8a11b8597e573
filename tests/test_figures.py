"""common/figures.py: what stands at which pixel of the written files."""
import numpy as np
import pytest
import torch
from PIL import Image

from common.figures import (heat, heatmap, know_classes, overlay, palette, save_bars, save_curves, save_grid,
                            save_matrices, save_matrix, save_scatters)
from common.toy_scenes import CLASSES

LOW, HIGH = [0, 0, 4], [252, 255, 164]                                    # ends of the heat map
BLUE, WHITE, RED = [33, 102, 172], [255, 255, 255], [178, 24, 43]
FIRST, SECOND = [0, 114, 178], [230, 159, 0]                              # colours of two series


def random_image(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), np.uint8))


@pytest.fixture
def drawn(tmp_path):
    """drawn(save, ...) -> what the save_* function writes, int (H,W,3)."""
    def draw(save, *args, **options):
        save(tmp_path / "new" / "a.png", *args, **options)
        return np.array(Image.open(tmp_path / "new" / "a.png")).astype(int)
    return draw


def where(picture, colour):
    """(H,W) bool: the pixels of exactly that colour."""
    return (picture == colour).all(-1)


def extent(found):
    """First and last row, first and last column of the True pixels."""
    ys, xs = np.nonzero(found)
    return ys.min(), ys.max(), xs.min(), xs.max()


# ---- colours, overlay, heat map ----

def test_a_class_has_a_colour_of_its_own_which_an_overlay_mixes_with_the_image():
    names = ["sky", "pole", *(f"thing {k}" for k in range(252)), "car", "tree"]
    colours = palette(names)
    assert colours.dtype == torch.uint8 and len({tuple(colour) for colour in colours.tolist()}) == 256
    assert torch.equal(palette(["car", "sky"]), colours[[254, 0]])        # in all data sets alike
    toys = palette(CLASSES).int()
    apart = (toys[:, None] - toys).abs().amax(2) + 255 * torch.eye(len(CLASSES))
    assert apart.min() > 80 and (toys.amax(1) - toys.amin(1)).min() > 50  # strokes.py reads +-40; no grey
    know_classes(["thing", "thang"])
    image, labels = torch.full((3, 1, 2), 100, dtype=torch.uint8), torch.tensor([[1, 255]])
    assert overlay(image, labels, 0.6)[:, 0].T.tolist() == [[193, 116, 48], [100, 100, 100]]   # 255: ignored


def test_a_heat_map_runs_from_dark_to_bright_and_blends_with_the_image():
    image, values = torch.full((3, 2, 2), 200, dtype=torch.uint8), torch.tensor([[-3.0, 0.0], [1.0, 7.0]])
    found = heatmap(image, values, 1.0).permute(1, 2, 0).tolist()
    assert (found[0][0], found[1]) == (LOW, [[147, 38, 103], HIGH])       # (1 + 3) / 10: third of 6 colours
    limited = heatmap(image, values, 1.0, vmin=0.0, vmax=1.0).permute(1, 2, 0)
    assert limited.tolist() == [[LOW] * 2, [HIGH] * 2]
    for flat in (torch.ones(2, 2), torch.full((2, 2), float("nan"))):
        assert heatmap(image, flat, 1.0).permute(1, 2, 0).tolist() == [[LOW] * 2] * 2
    solid, half = (heatmap(image.repeat(1, 4, 4), values, opacity).float() for opacity in (1.0, 0.5))
    assert (half - (100 + solid / 2)).abs().max() <= 0.75                 # enlarged; both were rounded once


def test_heat_tints_a_grey_image_and_a_bar_below_the_grid_tells_how(drawn):
    """At 0 the image stays, 65 % grey and 35 % white; 9 tenths of the colour at either end."""
    image = torch.full((3, 4, 4), 160, dtype=torch.uint8)
    found = heat(image, torch.tensor([[0.0, 2.0], [-9.0, 0.0]]), 2.0).permute(1, 2, 0)[::3, ::3].tolist()
    assert found == [[[193] * 3, [154, 19, 55]], [[27, 63, 116], [193] * 3]]           # corners: the values
    picture = drawn(save_grid, [[(image, "")]], cell=600, bars={"": (0, 5), "it": (-5, "more")})
    for row, ends in ((-46, ([210] * 3, [156, 21, 57])), (-16, ([28, 64, 117], [156, 21, 57]))):
        assert all(where(picture[row:row + 1], end).any() for end in ends)


# ---- grid, matrix ----

def test_a_grid_puts_images_enlarged_by_whole_factors_where_they_belong(drawn):
    a, b, c = (random_image(16, 32, seed) for seed in range(3))
    picture = drawn(save_grid, [[(a, ""), None, (b, "")], [None, (c, "")], [None], []], cell=64)
    expected = np.full((picture.shape[0], 8 + 3 * (64 + 8), 3), 255)      # empty cells stay white
    for image, top, left in [(a, 8, 8), (b, 8, 152), (c, 50, 80)]:
        enlarged = image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        expected[top:top + 32, left:left + 64] = enlarged
    assert np.array_equal(picture, expected)
    for height, width, shown in [(90, 120, (8, 37, 8, 47)), (120, 20, (8, 67, 8, 17))]:     # 1.5 cells
        dark = torch.zeros(3, height, width, dtype=torch.uint8)
        assert extent(where(drawn(save_grid, [[(dark, "")]], cell=40), 0)) == shown
    row = [(torch.zeros(3, 40, side, dtype=torch.uint8), "") for side in (40, 80)]          # in the middle
    assert extent(where(drawn(save_grid, [row], cell=40), 0)[:, 50:]) == (18, 37, 6, 45)


def test_matrix_cells_have_the_colours_of_their_values(drawn):
    matrix = torch.tensor([[1.0, -1.0, 0.0], [float("nan"), 5.0, 0.5]])
    picture = drawn(save_matrix, matrix, ["", ""], ["", "", ""])
    corners = picture[20:20 + 2 * 52:52, 18:18 + 3 * 52:52].tolist()      # no number is written in a corner
    assert corners == [[RED, BLUE, WHITE], [[225, 225, 225], RED, [244, 165, 130]]]     # nan, too much, 1/2
    long, longer = (drawn(save_matrix, matrix, ["an endless name " * n] * 2, [""] * 3) for n in (3, 9))
    assert (long < 200).any() and np.array_equal(long, longer)            # both are cut at the same letter
    bar = drawn(save_matrix, torch.zeros(20, 20), [""] * 20)[18:418, 16 + 20 * 28 + 21]
    assert bar[[0, -1]].tolist() == [RED, BLUE] and (bar[199:201] > 250).all()


def test_matrices_stand_side_by_side_in_the_same_colours(drawn):
    both = drawn(save_matrices, {"a": torch.ones(2, 2), "b": -torch.ones(2, 2)}, ["", ""])
    left, right = extent(where(both[:170, :120], RED)), extent(where(both[:170, 160:330], BLUE))
    assert left[1] - left[0] == right[1] - right[0] == 103 and left[:2] == right[:2]


def test_dots_and_the_line_of_a_scatter_stand_where_their_numbers_say(drawn):
    """Both axes run from 0 to 1 in 340 pixels, though the second plot alone would end at 0.2."""
    plots = [("", ("", ""), {"": (colour, torch.tensor(points))}, 2.0)
             for colour, points in ((FIRST, [[1.0, 0.5], [0.0, 1.0]]), (SECOND, [[0.2, 0.2]]))]
    picture = drawn(save_scatters, [plots])[40:]                          # without the legends
    top, bottom, left, right = extent(where(picture, FIRST))
    assert (bottom - top, right - left) == (170 + 4, 340 + 4)             # from dot to dot, radius 2
    other = extent(where(picture, SECOND))                                # 460 pixels to the right
    assert (other[0] - top, other[2] - left) == pytest.approx((0.8 * 340, 460 + 0.2 * 340), abs=1)
    line = where(picture, [30, 30, 30])[top + 170, left + 2:left + 342]   # y = 0.5 at x = 0.25
    assert np.flatnonzero(line).mean() == pytest.approx(85, abs=1)


# ---- bars, histograms ----

def words_in(strip):
    """What is written in a row of words or numbers: the columns of ink of each; 8 white ones are a gap."""
    columns = np.flatnonzero((strip < 128).any((0, 2)))
    return np.split(columns, np.flatnonzero(np.diff(columns) > 8) + 1)


def bars_of(picture, colour):
    """(first column, top, bottom) of every bar of one colour, left to right, below a legend of 30 pixels."""
    found = where(picture[30:], colour)
    starts = np.flatnonzero(np.diff(found.any(0).astype(int)) == 1) + 1
    return [(x, *np.flatnonzero(found[:, x + 2])[[0, -1]]) for x in starts]


def test_bars_are_as_high_as_their_values_and_missing_ones_leave_a_gap(drawn):
    series = {"ours": [10, None, 40, -5], "theirs": [40, 20, float("nan"), 10]}
    picture = drawn(save_bars, series, ["0123456789" * 2] * 4)
    (a, c, d), (a2, b2, d2) = bars_of(picture, FIRST), bars_of(picture, SECOND)
    assert sorted([a, c, d, a2, b2, d2]) == [a, a2, b2, c, d, d2]         # side by side
    zero, unit = a[2] + 1, (c[2] - c[1] + 1) / 40
    for (_, top, bottom), value in zip((a, c, d, a2, b2, d2), (10, 40, -5, 40, 20, 10)):
        ends = sorted((zero, zero - value * unit))                        # a loss hangs below the zero line
        assert [top, bottom] == pytest.approx(ends, abs=1.5)
    assert len(words_in(picture[-30:])) == 4                              # names do not touch


def test_curves_go_through_their_points_and_deviations_reach_as_far(drawn):
    picture = drawn(save_curves, {"a": [10, 30, 20]}, [1, 2, 5], deviations={"a": [0, 8, 0]})
    ink = where(picture[60:-60], FIRST)                                   # without the legend
    left, right = np.flatnonzero(ink.any(0))[[0, -1]] + [4, -4]           # centres of two markers

    def middle(column):
        return np.flatnonzero(ink[:, column])[[0, -1]].mean()
    unit = (middle(left) - middle(right)) / 10
    bar = np.flatnonzero(ink[:, round(left + (right - left) / 4)])[[0, -1]]
    assert [(middle(left) - y) / unit for y in bar] == pytest.approx([28, 12], abs=1)
