"""common/figures.py: what stands at which pixel of the written files."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import figures, run
from common.figures import (draw_box, heatmap, overlay, palette, save_bars, save_grid, save_histogram,
                            save_matrix)

LOW, HIGH = (0, 0, 4), (252, 255, 164)                                    # ends of the heat map
BLUE, WHITE, RED = (33, 102, 172), (255, 255, 255), (178, 24, 43)
FIRST_BARS, SECOND_BARS = (0, 114, 178), (230, 159, 0)


def random_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def read(path):
    """PNG -> (H,W,3) int array."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.asarray(picture).astype(int)


def where_colour(picture, colour):
    """(H,W) bool: the pixels of exactly that colour."""
    return (picture == np.array(colour)).all(-1)


def read_bars(path):
    """A bar chart without a title: the rows below its legend."""
    return read(path)[30:]


def bar_heights(picture, colour):
    """Heights in pixels of the bars of one colour, left to right."""
    columns = where_colour(picture, colour).sum(0)
    starts = [x for x in range(1, len(columns)) if columns[x] and not columns[x - 1]]
    return [int(columns[x + 2]) for x in starts]


# ---- colours, overlay, heat map ----

@pytest.mark.parametrize("num_classes", [1, 12, 150, 171, 256])
def test_palette_has_distinct_colours_that_do_not_depend_on_the_number(num_classes):
    colours = palette(num_classes)
    assert colours.shape == (num_classes, 3) and colours.dtype == torch.uint8
    assert len({tuple(colour) for colour in colours.tolist()}) == num_classes
    assert torch.equal(colours, palette(256)[:num_classes])
    assert colours[0].tolist() == [31, 119, 180]


def test_colours_of_few_classes_are_far_apart_and_a_caller_cannot_change_them():
    colours = palette(20).numpy().astype(int)
    distances = np.abs(colours[:, None] - colours[None]).max(-1) + 255 * np.eye(20, dtype=int)
    assert distances.min() >= 50
    palette(20).zero_()
    assert palette(20).sum() > 0


def test_overlay_blends_by_opacity_and_leaves_ignored_pixels():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    labels = torch.tensor([[0, 255], [1, 255]])
    drawn = overlay(image, labels, opacity=0.6)
    assert drawn.dtype == torch.uint8 and drawn.shape == (3, 2, 2)
    assert drawn[:, 0, 0].tolist() == [59, 111, 148]                      # 40 + 0.6 * (31, 119, 180), rounded
    assert drawn[:, 1, 0].tolist() == [193, 116, 48]                      # 40 + 0.6 * (255, 127, 14)
    assert (drawn[:, :, 1] == 100).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.6, 1.0])
def test_overlay_equals_numpy_on_a_random_map(dtype, opacity):
    image = random_image(9, 11)
    labels = torch.randint(0, 150, (9, 11), generator=torch.Generator().manual_seed(1))
    labels[2:4] = 255
    drawn = overlay(image, labels.to(dtype), opacity).numpy().astype(float)
    for y in range(9):
        for x in range(11):
            pixel = image[:, y, x].numpy().astype(float)
            if labels[y, x] != 255:
                pixel = (1 - opacity) * pixel + opacity * palette(150)[labels[y, x]].numpy()
            assert np.abs(drawn[:, y, x] - pixel).max() <= 0.5 + 1e-4


def test_heatmap_takes_the_end_colours_at_the_extremes():
    values = torch.tensor([[-3.0, 0.0], [1.0, 7.0]])
    drawn = heatmap(random_image(2, 2), values, opacity=1.0)
    assert tuple(drawn[:, 0, 0].tolist()) == LOW and tuple(drawn[:, 1, 1].tolist()) == HIGH
    assert drawn[:, 1, 0].tolist() == [147, 38, 103]                      # (1 + 3) / 10: third of six colours
    fixed = heatmap(random_image(2, 2), values, opacity=1.0, vmin=0.0, vmax=1.0)
    assert tuple(fixed[:, 0, 0].tolist()) == tuple(fixed[:, 0, 1].tolist()) == LOW           # -3 and 0
    assert tuple(fixed[:, 1, 0].tolist()) == tuple(fixed[:, 1, 1].tolist()) == HIGH          # 1 and 7


def test_heatmap_is_resized_brightens_with_the_value_and_blends():
    image = torch.full((3, 8, 64), 200, dtype=torch.uint8)
    ramp = torch.linspace(0, 1, 32)[None].expand(4, 32)
    solid = heatmap(image, ramp, opacity=1.0).double()
    light = (solid * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)              # (8,64)
    assert solid.shape == image.shape
    assert (light[:, 1:] >= light[:, :-1] - 1.5).all() and light[0, -1] - light[0, 0] > 200
    half = heatmap(image, ramp, opacity=0.5).double()
    assert (half - (100 + solid / 2)).abs().max() <= 0.75                 # both were rounded once


@pytest.mark.parametrize("values", [torch.ones(2, 2), torch.full((2, 2), float("nan"))])
def test_heatmap_of_a_constant_or_nan_is_dark(values):
    drawn = heatmap(random_image(4, 4), values, opacity=1.0)
    assert (drawn == torch.tensor(LOW, dtype=torch.uint8)[:, None, None]).all()


# ---- box ----

@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("box", [(2, 9, 3, 12), (0, 10, 0, 14), (4, 6, 5, 6), (9, 10, 13, 14), (3, 3, 2, 8)])
def test_the_frame_runs_along_the_inside_of_the_box(box, width):
    image = random_image(10, 14)
    before, (y0, y1, x0, x1) = image.clone(), box
    drawn = draw_box(image, box, colour=(1, 2, 3), width=width)
    assert drawn.dtype == torch.uint8 and torch.equal(image, before)      # a copy
    for y in range(10):
        for x in range(14):
            inside = y0 <= y < y1 and x0 <= x < x1
            framed = inside and min(y - y0, y1 - 1 - y, x - x0, x1 - 1 - x) < width
            assert drawn[:, y, x].tolist() == ([1, 2, 3] if framed else image[:, y, x].tolist())


def test_a_box_that_leaves_the_image_is_framed_along_the_border():
    image = random_image(10, 14)
    assert torch.equal(draw_box(image, (-4, 6, 8, 30)), draw_box(image, (0, 6, 8, 14)))
    assert torch.equal(draw_box(image, (-9, -2, -5, -1)), image)          # nothing of it is in the image
    assert draw_box(image, (-4, 6, 8, 30))[:, 0, 13].tolist() == [0, 255, 255]


# ---- grid ----

def test_grid_enlarges_by_whole_factors_and_puts_images_where_they_belong(tmp_path):
    first, second, third = (random_image(16, 32, seed) for seed in range(3))
    save_grid(tmp_path / "new" / "folder" / "grid.png", [[(first, ""), (second, "")], [(third, "")]], cell=64)
    picture = read(tmp_path / "new" / "folder" / "grid.png")
    assert picture.shape[1] == 8 + 64 + 8 + 64 + 8                        # two cells and three gaps
    below = 8 + 32 + 2 + 8                                                # the second row of images
    assert picture.shape[0] == below + 32 + 2 + 8
    for image, top, left in [(first, 8, 8), (second, 8, 80), (third, below, 8)]:
        enlarged = image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
        assert np.array_equal(picture[top:top + 32, left:left + 64], enlarged)
    assert (picture[below:, 72:] == 255).all()                            # the second row has one image


def test_grid_keeps_the_aspect_of_an_image_that_is_reduced(tmp_path):
    image = torch.full((3, 90, 120), 7, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", [[(image, "")]], cell=40)
    ys, xs = np.nonzero(where_colour(read(tmp_path / "grid.png"), (7, 7, 7)))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (8, 37, 8, 47)     # 30 x 40


def test_a_tall_image_is_at_most_one_and_a_half_cells_high(tmp_path):
    image = torch.full((3, 120, 20), 7, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", [[(image, "")]], cell=40)
    ys, xs = np.nonzero(where_colour(read(tmp_path / "grid.png"), (7, 7, 7)))
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (8, 67, 8, 17)     # 60 x 10


def test_an_empty_cell_stays_white_and_rows_may_differ_in_length(tmp_path):
    image = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    rows = [[(image, ""), None, (image, "")], [None, (image, "")], [(image, "")]]
    save_grid(tmp_path / "grid.png", rows, cell=32)
    picture = read(tmp_path / "grid.png")
    assert picture.shape[:2] == (8 + 3 * (32 + 2 + 8), 8 + 3 * (32 + 8))
    cells = where_colour(picture, (7, 7, 7))[8:8 + 3 * 42, 8:].reshape(3, 42, 3, 40).sum((1, 3))
    assert (cells == 32 * 32 * np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]])).all()
    assert where_colour(picture, WHITE).sum() == picture[..., 0].size - 4 * 32 * 32


def test_a_gallery_of_60_rows_holds_every_image_and_rows_without_any_are_harmless(tmp_path):
    shade = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 8, 8)
    rows = [[(image, f"{i}"), *[None] * (i % 4)] for i, image in enumerate(shade)]
    save_grid(tmp_path / "grid.png", rows + [[None], []], cell=8)
    picture = read(tmp_path / "grid.png")
    found = [int(v) for v in picture[:, 11, 0] if v < 60]                 # down a column of the images
    assert [v for i, v in enumerate(found) if i == 0 or v != found[i - 1]] == list(range(60))


def test_captions_stay_in_their_cell_and_are_cut_after_two_lines(tmp_path):
    image = torch.full((3, 10, 100), 255, dtype=torch.uint8)
    row = [[(image, "an endless caption " * 20), (image, ""), (image, "Supercalifragilisticexpialidocious")]]
    save_grid(tmp_path / "grid.png", row, cell=100)
    ink = read(tmp_path / "grid.png").min(-1) < 128
    assert ink[:, 8:108].any() and ink[:, 224:324].any()
    assert not ink[:, 108:224].any() and not ink[:, :8].any() and not ink[:, 324:].any()
    lines = np.diff(ink.any(1).astype(int)) == 1
    assert lines.sum() == 2
    assert np.nonzero(ink.any(1))[0].min() >= 8 + 10                      # below the image
    for left in (8, 224):                                                 # both end with the dots of "..."
        last = np.nonzero(ink[:, left:left + 100].any(0))[0].max()
        assert ink[-26:, left + last - 7:left + last + 1].any(1).sum() <= 3


def test_legend_shows_the_palette_colours_of_the_named_classes_alone(tmp_path):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    save_grid(tmp_path / "with.png", [[(image, "")]], cell=128, legend={3: "road", 17: "a tree"})
    save_grid(tmp_path / "without.png", [[(image, "")]], cell=128)
    picture = read(tmp_path / "with.png")
    shown = [c for c, colour in enumerate(palette(150).tolist()) if where_colour(picture, colour).sum() > 100]
    assert shown == [3, 17]
    assert picture.shape[0] > read(tmp_path / "without.png").shape[0]


def test_a_title_adds_height_and_ink_above_the_images(tmp_path):
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", [[(image, "")]], cell=128, title="Label")
    ink = read(tmp_path / "grid.png").min(-1) < 128
    ys = np.nonzero(ink.any(1))[0]
    assert ys.max() - ys.min() >= 11 and ys.max() < 36                    # capital letter height of 18 pixels


# ---- matrix ----

def test_matrix_cells_have_the_colours_of_their_values(tmp_path):
    matrix = torch.tensor([[1.0, -1.0, 0.0], [float("nan"), 5.0, 0.5]])
    save_matrix(tmp_path / "m.png", matrix, ["", ""], ["", "", ""])
    picture = read(tmp_path / "m.png")
    corners = picture[20:20 + 2 * 52:52, 18:18 + 3 * 52:52].tolist()      # no number is written in a corner
    assert corners[0] == [list(RED), list(BLUE), list(WHITE)]
    assert corners[1][0] == [225, 225, 225]                               # nan
    assert corners[1][1] == list(RED)                                     # 5 is outside: the end colour
    assert corners[1][2] == [244, 165, 130]                               # half way from white to red
    assert tuple(picture[17, 18]) == WHITE and tuple(picture[18, 15]) == WHITE


def test_row_i_column_j_and_names_move_the_cells_not_their_order(tmp_path):
    matrix = torch.zeros(20, 30)
    matrix[4, 7] = 1.0
    rows, columns = [f"row {i}" for i in range(20)], [f"column {j}" for j in range(30)]
    save_matrix(tmp_path / "m.png", matrix, rows, columns, vmin=0, vmax=1)
    picture = read(tmp_path / "m.png")
    dark = where_colour(picture, LOW)[:, :-90]                            # without the colour bar
    bright = where_colour(picture, HIGH)[:, :-90]
    (top, left), cell = np.argwhere(dark).min(0), 28
    assert bright.sum() == cell * cell and dark.sum() == (20 * 30 - 1) * cell * cell
    assert tuple(np.argwhere(bright).min(0)) == (top + 4 * cell, left + 7 * cell)
    ink = where_colour(picture, (30, 30, 30))
    assert ink[top:top + 20 * cell, :left].any() and ink[:top, left:left + 30 * cell].any()


def test_numbers_are_written_in_small_matrices_only(tmp_path):
    for n, written in [(12, True), (13, False)]:
        save_matrix(tmp_path / "m.png", torch.zeros(n, n), [""] * n)
        picture = read(tmp_path / "m.png")[18:, 16:-98]
        assert (picture.min(-1) < 128).any() == written


def test_matrix_of_150_classes_is_square_and_names_have_room(tmp_path):
    names = [f"class {c}" for c in range(149)] + ["conveyer belt, conveyor belt, conveyer, conveyor"]
    save_matrix(tmp_path / "m.png", 2 * torch.eye(150) - 1, names)
    picture = read(tmp_path / "m.png")
    (top, left), cell = np.argwhere(where_colour(picture, BLUE)).min(0), 17
    for c in (1, 75, 148):
        block = picture[top + c * cell:top + (c + 1) * cell, left + c * cell:left + (c + 1) * cell]
        assert where_colour(block, RED).all()
    assert left <= 8 + 200 + 8 + cell                                     # a long name is cut


def test_colour_bar_runs_from_vmax_down_to_vmin(tmp_path):
    save_matrix(tmp_path / "m.png", torch.zeros(20, 20), [""] * 20)
    bar = read(tmp_path / "m.png")[18:18 + 400, 16 + 20 * 28 + 16 + 5]
    assert tuple(bar[0]) == RED and tuple(bar[-1]) == BLUE and (bar[199:201] > 250).all()


def test_matrix_and_names_must_fit(tmp_path):
    with pytest.raises(ValueError, match="2 x 3 values but 2 x 2 names"):
        save_matrix(tmp_path / "m.png", torch.zeros(2, 3), ["a", "b"])


# ---- bars ----

def test_bar_heights_are_proportional_to_the_values(tmp_path):
    save_bars(tmp_path / "b.png", {"ours": [10, 20, 40, 0.5]}, ["a", "b", "c", "d"])
    heights = bar_heights(read_bars(tmp_path / "b.png"), FIRST_BARS)
    assert len(heights) == 4 and 250 < heights[2] <= 321
    for height, value in zip(heights, (10, 20, 40, 0.5)):
        assert abs(height - heights[2] * value / 40) <= 1.5


def test_series_stand_side_by_side_and_missing_values_leave_a_gap(tmp_path):
    save_bars(tmp_path / "b.png", {"a": [30, None, 15], "b": [15, 30, float("nan")]}, ["x", "y", "z"])
    picture = read_bars(tmp_path / "b.png")
    first, second = bar_heights(picture, FIRST_BARS), bar_heights(picture, SECOND_BARS)
    assert len(first) == len(second) == 2
    assert abs(first[0] - second[1]) <= 1 and abs(first[1] - second[0]) <= 1
    columns = [np.nonzero(where_colour(picture, c).any(0))[0] for c in (FIRST_BARS, SECOND_BARS)]
    assert columns[0].min() < columns[1].min() and not set(columns[0]) & set(columns[1])


def test_negative_bars_hang_below_the_zero_line(tmp_path):
    save_bars(tmp_path / "b.png", {"gain": [1.0, -1.0]}, ["a", "b"])
    bars = where_colour(read_bars(tmp_path / "b.png"), FIRST_BARS)
    columns = np.nonzero(bars.any(0))[0]
    up, down = np.nonzero(bars[:, columns.min() + 2])[0], np.nonzero(bars[:, columns.max() - 2])[0]
    assert up.max() < down.min() and abs(len(up) - len(down)) <= 1


def test_the_axis_ends_at_round_numbers_around_the_values():
    assert figures.round_ticks(0, 69.7) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert figures.round_ticks(0, 0.8) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert figures.round_ticks(-0.7, 1.2) == pytest.approx([-1, -0.5, 0, 0.5, 1, 1.5])
    for low, high in [(0, 1e-3), (-80, 0), (0, 101), (-2.5, 99), (0, 1234567)]:
        ticks = figures.round_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 4 <= len(ticks) <= 9
        assert ticks[1] > low and ticks[-2] < high                        # and no tick is wasted


def ink_below_axis(path, groups, name):
    """Draw `groups` equal bars: (H,W) bool ink of the names below them, width of the picture."""
    save_bars(path, {"a": [5.0] * groups, "b": [None] * groups}, [name] * groups)
    picture = read_bars(path)
    bars = bar_heights(picture, FIRST_BARS)
    assert len(bars) == groups and len(set(bars)) == 1
    axis = np.nonzero(where_colour(picture, FIRST_BARS).any(1))[0].max() + 2
    ink = picture[axis:, 72:].min(-1) < 128                               # right of the numbers of the axis
    (top, left), (bottom, right) = np.argwhere(ink).min(0), np.argwhere(ink).max(0)
    return ink[top:bottom + 1, left:right + 1], picture.shape[1]


def test_names_that_do_not_fit_side_by_side_are_turned_and_whole(tmp_path):
    flat, _ = ink_below_axis(tmp_path / "b.png", 1, "a rather long class name")
    for groups, widest in [(15, 1000), (150, 3200)]:
        turned, width = ink_below_axis(tmp_path / "b.png", groups, "a rather long class name")
        assert width < widest
        assert abs(turned.shape[0] - flat.shape[1]) <= 1                  # as high as the flat name is wide
        first = np.rot90(turned[:, :flat.shape[0]], -1)                   # the first name, turned back
        length = min(first.shape[1], flat.shape[1])
        assert (first[:, :length] == flat[:, :length]).mean() > 0.9


def test_all_zero_or_missing_values_still_make_a_chart(tmp_path):
    save_bars(tmp_path / "b.png", {"a": [0, None]}, ["x", "y"])
    assert read(tmp_path / "b.png").shape[0] > 300


def test_series_and_names_must_fit(tmp_path):
    with pytest.raises(ValueError, match="needs 2 values"):
        save_bars(tmp_path / "b.png", {"a": [1.0]}, ["x", "y"])


# ---- histograms ----

def panels(path, colours=(FIRST_BARS, SECOND_BARS), bins=10):
    """Heights in pixels of the bars (at the middle of their bins) in every histogram, bottom row left out.

    Finds the axis by its ink line: the longest dark run of each panel.
    """
    picture = read(path)
    ink = where_colour(picture, (30, 30, 30))
    axes = [y for y in range(len(ink)) if ink[y].sum() > 600]
    left = np.nonzero(ink[axes[0]])[0].min()
    middles = left + (np.arange(bins) + 0.5) * (640 // bins)
    found = []
    for axis, colour in zip(axes, colours, strict=True):
        found.append([int(where_colour(picture[axis - 150:axis, int(x)], colour).sum()) for x in middles])
    return found


def test_histogram_bars_are_shares_of_each_series_on_one_axis(tmp_path):
    generator = np.random.default_rng(0)
    ours, theirs = generator.random(1000) ** 2, list(generator.random(50))
    series = {"ours": torch.tensor(ours).reshape(10, 100), "theirs": theirs}
    save_histogram(tmp_path / "h.png", series, bins=10, low=0, high=1)
    expected = [np.histogram(v, np.linspace(0, 1, 11))[0] / len(v) for v in (ours, theirs)]
    scale = 150 / 0.30                                                    # the axis ends at 30 %
    assert 0.25 < max(map(max, expected)) < 0.3
    for heights, shares in zip(panels(tmp_path / "h.png"), expected):
        assert np.abs(np.array(heights) - shares * scale).max() <= 1


def test_a_histogram_can_count_on_a_logarithmic_axis(tmp_path):
    values = [0.5] * 1000 + [1.5] * 100 + [2.5] * 10 + [3.5]
    save_histogram(tmp_path / "h.png", {"a": values, "b": [9.5] * 2}, bins=10, low=0, high=10, log=True)
    first, second = panels(tmp_path / "h.png")
    unit = 150 / np.log10(2000)                                           # from 1/2 to 1000
    assert np.abs(np.array(first[:4]) - unit * np.log10([2000, 200, 20, 2])).max() <= 1
    assert first[4:] == [0] * 6 and second[:9] == [0] * 9
    assert abs(second[9] - unit * np.log10(4)) <= 1


def test_edges_belong_to_the_bin_on_their_right_and_the_last_to_the_last(tmp_path):
    save_histogram(tmp_path / "h.png", {"a": [0.0, 5.0, 10.0, 10.0]}, bins=10, low=0, high=10)
    heights, = panels(tmp_path / "h.png", (FIRST_BARS,))
    assert [i for i, height in enumerate(heights) if height] == [0, 5, 9]
    assert heights[9] == pytest.approx(2 * heights[0], abs=1) and heights[9] == 150            # 50 %


def test_values_outside_are_told_not_drawn_but_count_in_the_share(tmp_path):
    spread = [0.5, 0.5, -3.0, float("nan"), 99.0]
    for name, values in (("all", [0.5, 0.5]), ("few", spread)):
        save_histogram(tmp_path / f"{name}.png", {"a": values}, bins=10, low=0, high=1)
    heights, = panels(tmp_path / "few.png", (FIRST_BARS,))
    assert [i for i, height in enumerate(heights) if height] == [5]
    assert heights[5] == pytest.approx(150, abs=1)                        # 40 %, the top of its axis
    ink = [where_colour(read(tmp_path / f"{name}.png")[35:53], (30, 30, 30)).sum() for name in ("all", "few")]
    assert ink[1] > ink[0] + 100                                          # ", 3 of them outside"


def test_limits_are_round_numbers_around_the_values_of_all_series(tmp_path, monkeypatch):
    asked = []
    piece = figures.histogram_piece
    monkeypatch.setattr(figures, "histogram_piece", lambda *args: asked.append(args) or piece(*args))
    for values, low, high in [(([0.31, 0.4], [3.9]), 0, 4), (([-0.3], [0.9]), -0.4, 1), (([7.0], []), 7, 8),
                              (([], []), 0, 1), (([float("nan")], [float("inf"), 2.0, 4.0]), 2, 4)]:
        asked.clear()
        save_histogram(tmp_path / "h.png", dict(zip("ab", values)), bins=4)
        assert len(asked) == 2 and asked[0][2] == asked[1][2] == pytest.approx(np.linspace(low, high, 5))
    asked.clear()
    save_histogram(tmp_path / "h.png", {"a": [0.3, 0.3, 0.7]}, bins=4)    # on a tick, up to rounding
    assert "outside" not in asked[0][0] and sum(asked[0][1]) == pytest.approx(100)
    save_histogram(tmp_path / "h.png", {"a": [1.0]}, low=5, bins=4)       # nothing there: still a picture
    assert "1 of them outside" in asked[1][0] and sum(asked[1][1]) == 0


@pytest.mark.parametrize("bins", [1, 7, 20, 100])
def test_numbers_of_edges_do_not_touch(tmp_path, bins):
    save_histogram(tmp_path / "h.png", {"a": [0.123, 0.987]}, bins=bins, low=-0.123456, high=0.98765)
    picture = read(tmp_path / "h.png")
    ink = where_colour(picture, (30, 30, 30))
    axis = max(y for y in range(len(ink)) if ink[y].sum() > 500)
    columns = np.nonzero((picture[axis + 10:].min(-1) < 160).any(0))[0]   # the row of numbers
    gaps = np.diff(columns)
    assert 1 <= (gaps > 9).sum() <= 12 and 8 < columns.min() and columns.max() < picture.shape[1] - 8


# ---- files ----

def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(path, [[(random_image(8, 8), "")]], cell=8)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    before = path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_grid(path, [[(random_image(8, 8, seed=1), "")]], cell=8)
    assert path.read_bytes() == before
