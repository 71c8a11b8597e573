"""Pictures of a run: overlays, heat maps, grids, matrices, bar charts and histograms, drawn with Pillow.

An image is a uint8 tensor (3,H,W), RGB, 0..255. The save_* functions write PNG files, legible at 100 %.
"""
import functools
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import resize, to_pil_image

from common.run import replacing

INK, LINE, GREY = (30, 30, 30), (205, 205, 205), (225, 225, 225)         # text, tick lines, nan cells
HEAT = [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)]  # inferno
COLD_WARM = [(8, 48, 107), (33, 113, 181), (130, 190, 230), (255, 255, 255), (254, 200, 100), (240, 59, 32),
             (150, 0, 40)]
BLUE_WHITE_RED = [(33, 102, 172), (146, 197, 222), (255, 255, 255), (244, 165, 130), (178, 24, 43)]
SERIES = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0),
          (240, 228, 66), (110, 110, 110), (120, 70, 30), (0, 50, 60)]       # then again from the first
TWELVE = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
          (227, 119, 194), (188, 189, 34), (23, 190, 207), (255, 230, 100), (150, 220, 140), (0, 60, 140)]
NATURAL = {"background": (140, 86, 50), "sky": (135, 205, 250), "grass": (150, 220, 80),
           "road": (150, 115, 170), "water": (0, 110, 220), "tree": (0, 115, 60), "house": (255, 140, 0),
           "chapel": (150, 0, 255), "car": (225, 0, 45), "taxi": (255, 235, 40), "boat": (0, 215, 190),
           "person": (255, 175, 165), "bird": (55, 30, 125), "balloon": (255, 60, 210)}    # none is grey


# ---- colours ----

def far_apart_colours(count, first=()):
    """(count,3) uint8: `first`, those of TWELVE that are not near them, then always the colour farthest from
    all before it."""
    steps, weight = torch.arange(0, 256, 25), torch.tensor([3, 6, 1])     # how the eye weighs R, G, B
    grid = torch.cartesian_prod(steps, steps, steps)                      # (1331,3)
    light, contrast = grid @ weight, grid.amax(1) - grid.amin(1)
    grid = grid[(light > 450) & (light < 2250) & (contrast > 50)]         # nothing near black, white or grey
    chosen = [torch.tensor(colour) for colour in first]
    for colour in map(torch.tensor, TWELVE):
        if all(((colour - other) ** 2 * weight).sum() > 14_000 for other in chosen):
            chosen.append(colour)
    distance = torch.stack([((grid - colour) ** 2 * weight).sum(1) for colour in chosen]).amin(0)
    while len(chosen) < count:
        chosen.append(grid[distance.argmax()])
        distance = torch.minimum(distance, ((grid - chosen[-1]) ** 2 * weight).sum(1))
    return torch.stack(chosen[:count]).to(torch.uint8)


CLASS_COLOURS = far_apart_colours(256)                                    # of class ids, see know_classes


def palette(classes):
    """Names of at most 256 classes -> (N,3) uint8, all different: a name of NATURAL has that colour in every
    data set; the others, in their order, get colours that are far from these."""
    own = [NATURAL[name] for name in classes if name in NATURAL]
    others = iter(far_apart_colours(len(classes), own)[len(own):].tolist())
    return torch.tensor([NATURAL.get(name) or next(others) for name in classes], dtype=torch.uint8)


def interpolate(values, table):
    """values (...) float in [0,1] -> (...,3) float RGB, linear between evenly spaced colours."""
    table = torch.tensor(table, dtype=torch.float32, device=values.device)
    place = values.clamp(0, 1) * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], (place - below)[..., None])


def blend(image, colours, opacity):
    """image (3,H,W), colours (H,W,3) -> (3,H,W) uint8: round((1 - opacity) * image + opacity * colours)."""
    return ((1 - opacity) * image + opacity * colours.permute(2, 0, 1)).round().to(torch.uint8)


def overlay(image, labels, opacity=0.6):
    """image (3,H,W) uint8, labels (H,W) integer -> (3,H,W) uint8 in palette colours; 255 stays the image."""
    labels = labels.to(image.device)
    colours = CLASS_COLOURS.to(image.device)[labels.long()]               # (H,W,3)
    return torch.where(labels == 255, image, blend(image, colours, opacity))


def heatmap(image, values, opacity=0.5, vmin=None, vmax=None):
    """image (3,H,W) uint8, values (h,w), resized bilinearly -> (3,H,W) uint8, dark = vmin, bright = vmax.
    vmin, vmax: the extremes of the values if not given; nan counts as vmin."""
    values = values.detach().float().to(image.device)
    known = values[values.isfinite()].tolist() or [0.0]
    vmin, vmax = min(known) if vmin is None else vmin, max(known) if vmax is None else vmax
    values = ((values - vmin) / (vmax - vmin)).nan_to_num(0.0).clamp(0, 1)    # 0 / 0 of a flat map: 0
    values = F.interpolate(values[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return blend(image, interpolate(values, HEAT), opacity)


def draw_box(image, box, colour=(0, 255, 255), width=2):
    """A copy of image (3,H,W) uint8 with a frame, `width` pixels wide, along the inside of the box y0, y1,
    x0, x1 (pixels, ends exclusive), of which only what lies in the image counts."""
    height, length = image.shape[1:]
    y0, y1 = (min(max(int(y), 0), height) for y in box[:2])
    x0, x1 = (min(max(int(x), 0), length) for x in box[2:])
    frame = torch.zeros(height, length, dtype=torch.bool, device=image.device)
    frame[y0:y1, x0:x1] = True
    frame[y0 + width:max(y1 - width, 0), x0 + width:max(x1 - width, 0)] = False
    return torch.where(frame, image.new_tensor(colour)[:, None, None], image)


# ---- parts of a photograph, as thumbnails ----

def thumbnail(image, width=400):
    """uint8 (3,H,W) -> the same, at most `width` wide; heat maps of large images are slow."""
    if image.shape[2] <= width:
        return image
    return resize(image, [round(width * image.shape[1] / image.shape[2]), width])


def in_colours(image, ids):
    """Class colours over the image, as a thumbnail. ids (H,W) integer."""
    return thumbnail(overlay(image, ids.to(torch.uint8).cpu()))


def tinted(grey, values):
    """grey (...) 0..255, values (...) in [-1,1] -> (...,3) float: as it is at 0, over yellow to dark red at
    1, over light to dark blue at -1."""
    opacity = 0.9 * values.abs()[..., None] ** 0.7
    return (1 - opacity) * grey[..., None] + opacity * interpolate((values + 1) / 2, COLD_WARM)


def heat(image, values, most):
    """Thumbnail in light grey, tinted by the values (h,w), resized bilinearly: dark red at `most` and above,
    dark blue at -most. save_grid's `bars` tell a reader."""
    image = thumbnail(image)
    values = (values.detach().float().to(image.device) / max(most, 1e-6)).nan_to_num(0.0).clamp(-1, 1)
    values = F.interpolate(values[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return tinted(0.65 * image.float().mean(0) + 0.35 * 255, values).permute(2, 0, 1).round().to(torch.uint8)


def legend_of(classes, *maps):
    """The legend of maps of class ids (H,W), 255 = none: {class id: name} of all that they show."""
    shown = set().union(*(ids.unique().tolist() for ids in maps))
    return {c: classes[c] for c in sorted(shown - {255})}


def cell_block(cell, grid, size):
    """y0, y1, x0, x1 in pixels of an image (H,W) of a cell (row, column) in a grid (h,w), ends exclusive."""
    return [edge for k in (0, 1)
            for edge in (cell[k] * size[k] // grid[k], math.ceil((cell[k] + 1) * size[k] / grid[k]))]


def framed(image, box):
    """Thumbnail with a frame around the box that is still seen: at least 3 % of the width on a side."""
    least = 3 * image.shape[2] // 100
    frame = []
    for low, high in (box[:2], box[2:]):
        middle, half = (low + high) / 2, max(high - low, least) / 2
        frame += [middle - half, middle + half]
    return thumbnail(draw_box(image, frame, width=max(2, image.shape[2] // 120)))


# ---- texts: the font of the figures has hardly more than ASCII ----

NAMES = []                                                                # of all classes, if it lacks one


@functools.lru_cache(maxsize=None)
def has_glyph(character):
    """Can the font draw it, or only a box?"""
    def drawn(text):
        mask = ImageFont.load_default(size=15).getmask(text)
        return mask.size, bytes(mask)
    return character.isascii() or drawn(character) != drawn("\U0010ffff")


def know_classes(classes):
    """The names of the classes of a run, which decide their colours. Where the font lacks one, figures show
    its id, and class_names.txt beside them tells all names."""
    NAMES[:] = [] if all(map(has_glyph, "".join(classes))) else classes
    CLASS_COLOURS[:len(classes)] = palette(classes[:256])


def drawable(text):
    """The text with ids for names of classes that the font lacks, and ? for all else that it lacks."""
    if all(map(has_glyph, text)):
        return text
    for name in sorted(NAMES, key=len, reverse=True):                     # "tall house" before "house"
        if not all(map(has_glyph, name)):
            text = text.replace(name, f"class {NAMES.index(name)}")
    return "".join(character if has_glyph(character) else "?" for character in text)


# ---- pieces: a figure is a stack of Pillow images ----

def clip(text, font, width):
    """The text as `drawable`, ended with "..." where it would be wider than `width` pixels."""
    text = drawable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def text_piece(text, width, size=15, max_lines=2):
    """Text wrapped to `width` pixels; what does not fit into max_lines is cut. Height 0 without text."""
    font, lines = ImageFont.load_default(size=size), []
    for word in drawable(text).split():
        if lines and (len(lines) == max_lines or font.getlength(f"{lines[-1]} {word}") <= width):
            lines[-1] += " " + word
        else:
            lines.append(word)
    piece = Image.new("RGB", (width, len(lines) * (size + 4)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(piece).text((0, i * (size + 4)), clip(line, font, width), INK, font=font)
    return piece


def legend_piece(entries, width):
    """entries: (colour, name) pairs -> swatches with names, in as many rows as `width` asks for."""
    font, x, y, places = ImageFont.load_default(size=15), 0, 0, []
    for colour, name in entries:
        name = clip(name, font, width - 22)
        needed = 22 + math.ceil(font.getlength(name))
        x, y = (0, y + 22) if x + needed > width else (x, y)
        places.append((x, y, tuple(colour), name))
        x += needed + 18
    piece = Image.new("RGB", (width, y + 22 if places else 0), "white")
    for x, y, colour, name in places:
        ImageDraw.Draw(piece).rectangle((x, y + 3, x + 15, y + 18), fill=colour, outline=INK)
        ImageDraw.Draw(piece).text((x + 22, y + 11), name, INK, font=font, anchor="lm")
    return piece


def bar_piece(text, low, high, width):
    """The colour bar of `heat` after what it is of: from low (0 or -high) to high, numbers or words."""
    low, high = (end if isinstance(end, str) else f"{end:.3g}" for end in (low, high))
    font, ramp = ImageFont.load_default(size=15), torch.linspace(-1 if low.startswith("-") else 0, 1, 160)
    before = clip(f"{text}:  {low}", font, width - 260)
    left = math.ceil(font.getlength(before)) + 8
    piece = Image.new("RGB", (width, 22), "white")
    colours = tinted(torch.full((160,), 210.0), ramp).round().to(torch.uint8)             # (160,3)
    piece.paste(Image.fromarray(colours[None].numpy()).resize((160, 16)), (left, 3))
    for x, part in ((0, before), (left + 168, high)):
        ImageDraw.Draw(piece).text((x, 11), part, INK, font=font, anchor="lm")
    return piece


def write_upwards(canvas, text, font, x, y, anchor):
    """Text turned by 90 degrees, centred on column x; it starts (anchor "start") or ends ("end") at y."""
    height = sum(font.getmetrics())
    ink = Image.new("L", (math.ceil(font.getlength(text)) + 1, height))
    ImageDraw.Draw(ink).text((0, height // 2), text, 255, font=font, anchor="lm")
    ink = ink.rotate(90, expand=True)
    canvas.paste(INK, (round(x - height / 2), y - ink.height if anchor == "start" else y), ink)


def histogram_piece(heading, bars, edges, ticks, colour):
    """bars: n heights; edges of the bins: n + 1 numbers; ticks: (height, text) pairs, the last on top."""
    font, top, height = ImageFont.load_default(size=15), 30, 150          # height of the plot
    texts = [f"{edge:.4g}" if abs(edge) < 1e4 else f"{edge:.0f}" for edge in edges]
    n, room = len(bars), math.ceil(max(font.getlength(text) for text in texts))
    left = max(room // 2 + 1, math.ceil(max(font.getlength(text) for _, text in ticks)) + 12)
    bar = max(4, 640 // n)                                                # width of a bin
    every = min(n, math.ceil((room + 14) / bar))                          # so far apart edges get a number
    every = next((k for k in range(every, 2 * every) if n % k == 0), every)       # rather evenly
    numbered = [*range(0, n - every + 1, every), n]
    piece = Image.new("RGB", (left + n * bar + room // 2 + 8, top + height + 32), "white")
    draw, axis, scale = ImageDraw.Draw(piece), top + height, height / ticks[-1][0]
    draw.text((0, 0), clip(heading, font, piece.width), INK, font=font)
    for value, text in ticks:
        y = round(axis - value * scale)
        draw.line((left, y, left + n * bar, y), fill=LINE)
        draw.text((left - 8, y), text, INK, font=font, anchor="rm")
    for i, value in enumerate(bars):
        if value > 0:                                                     # at least a line of one pixel
            y = min(axis - 1, round(axis - value * scale))
            draw.rectangle((left + i * bar + 1, y, left + (i + 1) * bar - 1, axis), fill=colour)
    draw.line((left, axis, left + n * bar, axis), fill=INK)
    for i, text in enumerate(texts):
        x = left + i * bar
        draw.line((x, axis, x, axis + (7 if i in numbered else 3)), fill=INK)
        if i in numbered:
            draw.text((x, axis + 11), text, INK, font=font, anchor="ma")
    return piece


def save_stack(path, pieces, gap=8):
    """Pieces below each other on white -> PNG, and class_names.txt where know_classes says so."""
    pieces = [piece for piece in pieces if piece.height > 0]
    size = max(piece.width for piece in pieces) + 2 * gap, sum(piece.height + gap for piece in pieces) + gap
    canvas, y = Image.new("RGB", size, "white"), gap                      # y: where the next piece starts
    for piece in pieces:
        canvas.paste(piece, (gap, y))
        y += piece.height + gap
    write_png(path, canvas)
    if NAMES:
        with replacing(Path(path).parent / "class_names.txt") as file:
            file.writelines(f"{c} {name}\n" for c, name in enumerate(NAMES))


def write_png(path, picture):
    """A Pillow image -> PNG, never half a file; makes its folder."""
    with replacing(path, "wb") as file:
        picture.save(file, format="PNG", compress_level=3)                # 1/4 of the time, 13 % larger


def index_picture(ids, colours):
    """Class ids uint8 (H,W), an array -> Pillow image whose pixel values they are; colours uint8 (256,3)."""
    picture = Image.fromarray(ids)
    picture.putpalette(colours.flatten().tolist())
    return picture


def save_prediction(folder, stem, image, ids):
    """STEM.png: class ids uint8 (H,W), see index_picture; STEM_overlay.png: their colours over the image."""
    write_png(folder / f"{stem}.png", index_picture(ids.numpy(), CLASS_COLOURS))
    write_png(folder / f"{stem}_overlay.png", to_pil_image(overlay(image, ids)))


# ---- figures ----

def save_grid(path, rows, cell=256, title="", legend=None, lines=2, bars=None):
    """Rows of captioned images, each scaled to `cell` pixels in width (tall ones to less), aspect kept.
    rows: lists of (image (3,H,W) uint8, caption of at most so many lines), of texts without an image, or
    None for a white cell; a row may also be one text, for the whole width. legend: {class id: name}. bars:
    {what a heat map shows: (low, high)}, see bar_piece."""
    gap, legend = 8, legend or {}
    width = max(len(row) for row in rows if not isinstance(row, str)) * (cell + gap) - gap
    pieces = [text_piece(title, width, size=18)]
    for row in rows:
        if isinstance(row, str):
            pieces.append(text_piece(row, width))
            continue
        entries = [(None, entry) if isinstance(entry, str) else entry or (None, "") for entry in row]
        pieces.append(row_piece([image if image is None else fit_cell(image, cell) for image, _ in entries],
                                [text_piece(text, cell, max_lines=lines) for _, text in entries],
                                cell + gap, width))
    pieces += [bar_piece(text, *ends, width) for text, ends in (bars or {}).items()]
    pieces.append(legend_piece([(CLASS_COLOURS[c].tolist(), name) for c, name in legend.items()], width))
    save_stack(path, pieces, gap)


def row_piece(pictures, captions, step, width):
    """Pillow images, or None, side by side, one every `step` pixels, lower ones centred; all captions begin
    at one height."""
    below = max([picture.height for picture in pictures if picture], default=-2) + 2
    height = below + max([text.height for text in captions], default=0)
    piece = Image.new("RGB", (width, height), "white")
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        if picture:
            piece.paste(picture, (i * step, (below - 2 - picture.height) // 2))
        piece.paste(caption, (i * step, below))
    return piece


def fit_cell(image, cell):
    """(3,H,W) uint8 -> Pillow image `cell` pixels wide, or of height 1.5 cell if it is taller than that."""
    picture = to_pil_image(image.cpu())
    factor = min(cell / picture.width, 1.5 * cell / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    whole = factor == int(factor)                                         # then pixels are repeated
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BILINEAR)


def save_matrix(path, matrix, row_names, column_names=None, title="", vmin=-1, vmax=1):
    """Matrix (n,m) as coloured cells with names, a colour bar and, where n, m <= 12, the numbers.

    column_names: default row_names. Blue, white, red if vmin < 0, else dark to bright; nan is grey. No names
    beyond 260 rows or columns. ValueError if the names do not fit the matrix.
    """
    piece = matrix_piece(matrix, row_names, column_names, vmin, vmax)
    save_stack(path, [text_piece(title, piece.width, size=18), piece])


def save_matrices(path, matrices, row_names, column_names=None, title="", vmin=-1, vmax=1):
    """{heading: matrix (n,m)} side by side, all with the same names and colours; see save_matrix."""
    most = 3200 // sum(torch.as_tensor(matrix).shape[1] for matrix in matrices.values())
    pieces = [matrix_piece(matrix, row_names, column_names, vmin, vmax, max(1, most))
              for matrix in matrices.values()]
    step = max(piece.width for piece in pieces) + 16
    heads = [text_piece(heading, step - 16) for heading in matrices]
    whole = Image.new("RGB", (step * len(pieces), 30 + max(piece.height for piece in pieces)), "white")
    for i, (head, piece) in enumerate(zip(heads, pieces)):
        whole.paste(head, (i * step, 0))
        whole.paste(piece, (i * step, 30))
    save_stack(path, [text_piece(title, whole.width, size=18), whole])


def matrix_piece(matrix, row_names, column_names, vmin, vmax, largest=52):
    """The picture of save_matrix. largest: cells are at most so many pixels wide, without names if tiny."""
    values = torch.as_tensor(matrix).detach().cpu().float()               # (n,m)
    column_names = row_names if column_names is None else column_names
    n, m, most = *values.shape, max(values.shape)
    if (n, m) != (len(row_names), len(column_names)):
        raise ValueError(f"save_matrix: {n} x {m} values but {len(row_names)} x {len(column_names)} names")
    sides = ((12, 52), (40, 28), (260, 17))                               # up to so many cells, their side
    cell = min(largest, next((side for limit, side in sides if most <= limit), max(1, 4000 // most)))
    named = most <= 260 and cell >= 13
    font = ImageFont.load_default(size=15 if cell > 17 else 13)
    rows = [clip(name, font, 200) for name in row_names] if named else [""]
    columns = [clip(name, font, 200) for name in column_names] if named else [""]
    left = math.ceil(max(font.getlength(name) for name in rows)) + 8
    top = math.ceil(max(font.getlength(name) for name in columns)) + 10
    bar = max(120, min(n * cell, 400))                                    # height of the colour bar
    canvas = Image.new("RGB", (left + m * cell + 90, top + max(n * cell, bar) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    table = BLUE_WHITE_RED if vmin < 0 else HEAT
    colours = interpolate(((values - vmin) / (vmax - vmin)).nan_to_num(0.0), table).round()      # (n,m,3)
    colours[values.isnan()] = torch.tensor(GREY).float()
    cells = Image.fromarray(colours.to(torch.uint8).numpy())
    canvas.paste(cells.resize((m * cell, n * cell), Image.Resampling.NEAREST), (left, top))
    for i, name in enumerate(rows):
        draw.text((left - 6, top + (i + 0.5) * cell), name, INK, font=font, anchor="rm")
    for j, name in enumerate(columns):
        write_upwards(canvas, name, font, left + (j + 0.5) * cell, top - 5, "start")
    decimals = 2 if vmax - vmin <= 10 else 1
    if (values == values.round()).all():                                  # counts need none
        decimals = 0
    for i, j in [(i, j) for i in range(n) for j in range(m) if most <= 12]:
        number = f"{values[i, j]:.{decimals}f}"
        draw.text((left + (j + 0.5) * cell, top + (i + 0.5) * cell), number.replace("-0.00", "0.00"),
                  "white" if colours[i, j].mean() < 130 else INK, font=font, anchor="mm")
    x = left + m * cell + 16                                              # the colour bar
    ramp = interpolate(torch.linspace(1, 0, bar)[:, None], table).round().to(torch.uint8)        # (bar,1,3)
    canvas.paste(Image.fromarray(ramp.numpy()).resize((18, bar)), (x, top))
    for k in range(5):
        y = top + (bar - 1) * k / 4
        draw.line((x + 18, y, x + 22, y), fill=INK)
        draw.text((x + 26, y), f"{vmax - (vmax - vmin) * k / 4:.3g}", INK, font=font, anchor="lm")
    return canvas


def round_ticks(low, high):
    """Evenly spaced round numbers (at most nine) that span low..high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(k * power for k in (1, 2, 5, 10) if 7 * k * power >= high - low)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def save_bars(path, series, names, title="", unit="%", deviations=None):
    """Bar chart. series: {name: values, None or nan = no bar}; names: one per value, else ValueError.
    deviations: {name of a series: how far up and down from its bars a line is drawn}."""
    series = {key: [math.nan if v is None else float(v) for v in values] for key, values in series.items()}
    if any(len(values) != len(names) for values in series.values()):
        raise ValueError(f"save_bars: every series needs {len(names)} values, one for each name")
    spread = {key: (deviations or {}).get(key, [0.0] * len(names)) for key in series}
    known = [v + d for key in series for v, d in zip(series[key], spread[key]) if math.isfinite(v)] + [0.0]
    whole = all(v == round(v) for v in known)                             # counts need no decimals
    ticks = round_ticks(min(known), max(known) if max(known) > min(known) else 1.0)
    font, left, top, height = ImageFont.load_default(size=15), 64, 26, 320      # height of the plot
    names = [clip(name, font, 200) for name in names]
    longest = math.ceil(max(font.getlength(name) for name in names))
    turned = (longest + 12) * len(names) > 900                            # too long to write side by side
    bar = max(6, min(48, 900 // (len(names) * (len(series) + 1))))        # width of a bar
    group = max(20 if turned else longest + 12, (len(series) + 1) * bar)  # width of a group
    size = left + max(len(names) * group, 300), top + height + (longest + 12 if turned else 28)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    scale = height / (ticks[-1] - ticks[0])                               # pixels per unit
    zero = round(top + ticks[-1] * scale)                                 # pixel row of the value 0
    for tick in ticks:
        y = round(zero - tick * scale)
        draw.line((left, y, canvas.width, y), fill=LINE)
        draw.text((left - 8, y), f"{tick:.6g}", INK, font=font, anchor="rm")
    draw.text((0, 0), unit, INK, font=font)
    for g, name in enumerate(names):
        middle = left + (g + 0.5) * group                                 # column of the group's centre
        for s, (key, values) in enumerate(series.items()):
            value, around = values[g], spread[key][g]
            if math.isfinite(value):
                x, end = int(middle + (s - len(series) / 2) * bar), round(zero - value * scale)
                top_row, bottom_row = sorted((end, zero))
                draw.rectangle((x, top_row, x + bar - 2, bottom_row), fill=SERIES[s % len(SERIES)])
                if around:
                    ends = round(zero - (value + around) * scale), round(zero - (value - around) * scale)
                    draw.line((x + bar // 2 - 1, ends[0], x + bar // 2 - 1, ends[1]), fill=INK, width=2)
                elif bar >= 34:                                             # room for the number
                    y, anchor = (end - 3, "mb") if end <= zero else (end + 3, "mt")
                    digits = ".2g" if abs(value) < 1 else ".1f"
                    number = f"{value:.0f}" if whole else f"{value:{digits}}"
                    draw.text((x + bar / 2, y), number, INK, font=font, anchor=anchor)
        if turned:
            write_upwards(canvas, name, font, middle, top + height + 6, "end")
        else:
            draw.text((middle, top + height + 6), name, INK, font=font, anchor="ma")
    draw.line((left, zero, canvas.width, zero), fill=INK)
    swatches = [(SERIES[s % len(SERIES)], name) for s, name in enumerate(series)]
    width = canvas.width
    save_stack(path, [text_piece(title, width, size=18), legend_piece(swatches, width), canvas])


def mean_and_deviation(values):
    """[[a value a seed]] -> means, sample deviations (0 of one seed): series and deviations of a figure."""
    return ([statistics.mean(of_seeds) for of_seeds in values],
            [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in values])


def save_curves(path, series, x, title="", below="", unit="%", deviations=None):
    """Curves over numbers x, rising. series: {name: a value for each x}; deviations: see save_bars; below:
    what x is."""
    save_panels(path, {title: series}, x, below=below, unit=unit, deviations=deviations)


def save_panels(path, panels, x, title="", below="", unit="%", deviations=None):
    """Curves as in save_curves, below each other: {heading: series}."""
    pieces = []
    for heading, series in panels.items():
        legend, canvas = curve_pieces(series, x, below, unit, deviations)
        pieces += [text_piece(heading, canvas.width, size=18), legend, canvas]
    save_stack(path, [text_piece(title, pieces[0].width, size=18), *pieces])


def curve_pieces(series, x, below, unit, deviations):
    """The legend and the picture of save_curves."""
    spread = {key: (deviations or {}).get(key, [0.0] * len(x)) for key in series}
    known = [v + sign * d for key in series for v, d in zip(series[key], spread[key]) for sign in (1, -1)]
    ticks = round_ticks(min(known), max(known) if max(known) > min(known) else min(known) + 1.0)
    font, left, top, width, height = ImageFont.load_default(size=15), 64, 26, 640, 320
    canvas = Image.new("RGB", (left + width + 40, top + height + 50), "white")
    draw, axis = ImageDraw.Draw(canvas), top + height

    def place(number, value):
        share = (number - x[0]) / max(x[-1] - x[0], 1e-9)
        return left + 20 + share * (width - 20), axis - (value - ticks[0]) / (ticks[-1] - ticks[0]) * height
    for tick in ticks:
        y = place(x[0], tick)[1]
        draw.line((left, y, left + width + 20, y), fill=LINE)
        draw.text((left - 8, y), f"{tick:.6g}", INK, font=font, anchor="rm")
    end = -math.inf                                                       # of the last number written
    for number in x:
        column, half = place(number, ticks[0])[0], font.getlength(f"{number:g}") / 2
        draw.line((column, axis, column, axis + 5), fill=INK)
        if column - half > end + 6:
            draw.text((column, axis + 8), f"{number:g}", INK, font=font, anchor="ma")
            end = column + half
    draw.text((0, 0), unit, INK, font=font)
    draw.text((left + width / 2, axis + 30), below, INK, font=font, anchor="ma")
    for s, (key, values) in enumerate(series.items()):
        points, colour = [place(*point) for point in zip(x, values)], SERIES[s % len(SERIES)]
        draw.line(points, fill=colour, width=3)
        for number, value, around, (column, y) in zip(x, values, spread[key], points):
            draw.line((column, place(number, value + around)[1], column, place(number, value - around)[1]),
                      fill=colour, width=2)
            draw.ellipse((column - 4, y - 4, column + 4, y + 4), fill=colour)
    draw.line((left, axis, left + width + 20, axis), fill=INK)
    swatches = [(SERIES[s % len(SERIES)], name) for s, name in enumerate(series)]
    return legend_piece(swatches, canvas.width), canvas


def save_histogram(path, series, bins=20, low=None, high=None, title="", log=False):
    """Histograms below each other, one a series, all with the same bins and the same axis.

    series: {name: values}, tensors or lists of any shape. low, high: outermost edges, else round numbers
    that span all values; the heading tells how many values lie outside, nan among them. A bar is the share
    of all values of its series in percent or, if log, their number on an axis 1, 10, 100.
    """
    series = {name: torch.as_tensor(values).detach().cpu().double().flatten()
              for name, values in series.items()}
    known = torch.cat(list(series.values()))
    known = known[known.isfinite()].tolist() or [0.0, 1.0]
    ticks = round_ticks(min(known), max(known) if max(known) > min(known) else min(known) + 1.0)
    low = min(ticks[0], min(known)) if low is None else low               # the tick itself may be rounded up
    high = max(ticks[-1], max(known)) if high is None else high
    high = high if high > low else low + 1.0                              # no value on that side of a limit
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    edges[edges.abs() < 1e-9 * (high - low)] = 0.0                        # not 1e-17
    inside = {name: values[(values >= low) & (values <= high)] for name, values in series.items()}
    counts = {name: torch.histogram(values, edges).hist for name, values in inside.items()}    # (bins) each
    if log:                                                               # the axis begins at 1/2, below 1
        highest = max(count.max().item() for count in counts.values())
        bars = {name: (2 * count).clamp(min=1).log10() for name, count in counts.items()}
        powers = range(1 + math.ceil(math.log10(max(highest, 2))))
        ticks = [(math.log10(2 * 10 ** k), str(10 ** k)) for k in powers]
    else:
        bars = {name: 100 * count / max(1, len(series[name])) for name, count in counts.items()}
        top = max(bar.max().item() for bar in bars.values()) or 1.0
        ticks = [(tick, f"{tick:.6g}") for tick in round_ticks(0, top)]
    pieces = []
    for s, (name, bar) in enumerate(bars.items()):
        outside = len(series[name]) - len(inside[name])
        heading = f"{name}: n = {len(series[name])}" + (f", {outside} of them outside" if outside else "")
        colour = SERIES[s % len(SERIES)]
        pieces.append(histogram_piece(heading, bar.tolist(), edges.tolist(), ticks, colour))
    axes = "vertical: number of values" if log else "vertical: share of the values in %"
    width = pieces[0].width
    save_stack(path, [text_piece(title, width, size=18), text_piece(axes, width), *pieces])


def save_scatters(path, rows, title=""):
    """Scatter plots in rows. A plot: (heading, names of x and y, {name: (colour, points (n,2))}, slope of the
    line drawn through (0, 0)). All axes of a row span the same numbers."""
    lines = []
    for plots in rows:
        known = torch.cat([points for plot in plots for _, points in plot[2].values()])            # (n,2)
        pieces = [scatter_piece(*plot, round_ticks(min(0.0, known.min().item()), known.max().item()))
                  for plot in plots]
        size = sum(piece.width for piece in pieces), max(piece.height for piece in pieces)
        line = Image.new("RGB", size, "white")
        for i, piece in enumerate(pieces):
            line.paste(piece, (i * piece.width, 0))
        lines.append(line)
    save_stack(path, [text_piece(title, max(line.width for line in lines), size=18, max_lines=4), *lines])


def scatter_piece(heading, axes, series, slope, ticks):
    """One plot of save_scatters. No series hides another: their points are drawn in turn."""
    font, left, side = ImageFont.load_default(size=15), 80, 340
    above = [text_piece(heading, side + 60), legend_piece([(colour, name) for name, (colour, _)
                                                           in series.items()], side + 60)]
    top = sum(piece.height + 6 for piece in above) + 6
    canvas = Image.new("RGB", (left + side + 40, top + side + 62), "white")
    canvas.paste(above[0], (left - 40, 0))
    canvas.paste(above[1], (left - 40, above[0].height + 6))
    draw, low, scale = ImageDraw.Draw(canvas), ticks[0], side / (ticks[-1] - ticks[0])

    def place(x, y):
        return left + (x - low) * scale, top + side - (y - low) * scale
    for tick in ticks:
        (column, row), text = place(tick, tick), f"{tick:.6g}"
        draw.line((left, row, left + side, row), fill=LINE)
        draw.line((column, top, column, top + side), fill=LINE)
        draw.text((left - 8, row), text, INK, font=font, anchor="rm")
        draw.text((column, top + side + 8), text, INK, font=font, anchor="ma")
    points = [(i / len(points), colour, *point) for colour, points in series.values()
              for i, point in enumerate(points.tolist())]
    for _, colour, x, y in sorted(points, key=lambda point: point[0]):
        column, row = place(x, y)
        draw.ellipse((column - 2, row - 2, column + 2, row + 2), fill=tuple(colour))
    ends = [max(low, low / slope), min(ticks[-1], ticks[-1] / slope)]     # of the line in the square
    draw.line([place(x, slope * x) for x in ends], fill=INK, width=2)
    draw.text((left + side / 2, top + side + 34), axes[0], INK, font=font, anchor="ma")
    write_upwards(canvas, axes[1], font, 20, top + side, "start")
    return canvas
