"""
loss.png: numbers of a log as curves. Pillow is enough.
"""
import itertools, math

from PIL import Image, ImageDraw, ImageFont

from support.files import one_line, save_png

COLOURS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b8860b', '#56b4e9', '#555555'


def ticks(low, high, log=False, least=0):
    """Round numbers from low to high, at most eight."""
    if log and high > 30 * low:
        least, most = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = [10.0 ** e for e in range(least, most + 1)]
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * p for p in powers for f in factors if low <= f * p <= high]
            if len(found) <= 8:
                return found
        return found[::math.ceil(len(found) / 8)]
    step = max(10 ** math.floor(math.log10((high - low) / 5)), least)
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def apart(places, distance, most):
    """The places of labels, moved as little as needed to stand so far apart, none beyond `most`."""
    order, found = sorted(range(len(places)), key=places.__getitem__), list(places)
    for a, b in zip(order, order[1:]):
        found[b] = max(found[b], found[a] + distance)
    if found and found[order[-1]] > most:
        found[order[-1]] = most
        for a, b in list(zip(order, order[1:]))[::-1]:
            found[a] = min(found[a], found[b] - distance)
    return found


def curve(history, path, keys, size=(900, 420)):
    """Each key's numbers in a log's entries over their steps, as a PNG; its name and last number
    stand at its line's end. A log scale where none is below 0 and all span more than a decade; of
    four decades, at whose bottom lies what is less."""
    lines = {k: [(e['step'], e[k]) for e in history
                 if type(e.get(k)) in (int, float) and abs(e[k]) < 1e30] for k in keys}
    lines = {k: line for k, line in lines.items() if line}
    if not lines:
        return
    xs, ys = map(sorted, zip(*itertools.chain(*lines.values())))
    floor = ys[-1] / 1e4                                       # a gap may begin with none
    log = ys[0] >= 0 and ys[-1] > 10 * max(ys[0], floor)
    scale = (lambda y: math.log10(max(y, floor))) if log else float
    first, last = xs[0], max(xs[-1], xs[0] + 1)
    margin = 0.04 * (scale(ys[-1]) - scale(ys[0])) or 0.1 * abs(ys[0]) or 1
    low, high = scale(ys[0]) - margin, scale(ys[-1]) + margin
    names = [f'{one_line(k, 30)}  {line[-1][1]:.3g}' for k, line in lines.items()]

    out = Image.new('RGB', [2 * n for n in size], 'white')     # twice as large: smooth
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(24)
    left, top, bottom = 120, 24, 2 * size[1] - 76
    right = 2 * size[0] - 60 - max(pen.textlength(n, font) for n in names)

    def place(x, y):
        return (left + (right - left) * (x - first) / (last - first),
                bottom - (bottom - top) * (scale(y) - low) / (high - low))
    ends = (10 ** low, 10 ** high) if log else (low, high)
    for y in ticks(*ends, log):
        at = place(first, y)[1]
        pen.line([left, at, right, at], '#e4e4e4', 2)
        pen.text((left - 14, at), f'{y:.6g}', '#444444', font, 'rm')
    for x in ticks(first, last, least=1):
        at = place(x, ys[0])[0]
        pen.line([at, bottom, at, bottom + 10], '#888888', 2)
        pen.text((at, bottom + 16), f'{x:.0f}', '#444444', font, 'ma')
    pen.text(((left + right) / 2, 2 * size[1] - 6), 'step', '#444444', font, 'mb')
    pen.line([left, top, left, bottom, right, bottom], '#888888', 2)
    labels = apart([place(*line[-1])[1] for line in lines.values()], 28, bottom - 10)
    for i, (line, name, label) in enumerate(zip(lines.values(), names, labels)):
        colour, points = COLOURS[i % len(COLOURS)], [place(*p) for p in line]
        pen.line(points, colour, 4, 'curve')
        x, y = points[-1]
        pen.ellipse([x - 6, y - 6, x + 6, y + 6], colour)
        pen.line([x, y, right + 30, label], colour, 1)
        pen.text((right + 36, label), name, colour, font, 'lm')
    save_png(out.reduce(2), path)
