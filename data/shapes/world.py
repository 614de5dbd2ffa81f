"""
A world of coloured shapes: it draws scenes, names them in plain English, and reads them back from
pixels.

A picture is 24 x 24 pixels, two by two cells; a cell is empty or holds a circle, a square or a
triangle in one of six colours, on one of three backgrounds. Small enough for a laptop, rich enough
for five skills:

    t2i          "a red circle top left and a blue square bottom right on white"   all is named
    open         "a circle on white", "two shapes"                      something is left open
    count        "three green triangles on black"                       more than the base ever saw
    local_edit   "make the circle blue", "remove the square"            one object changes
    global_edit  "make the background black", "invert the picture"      everything but the layout

    score(images, rows)   a picture's {'right': 0 or 1} and, for edits, 'kept': the error of what
                          had to stay
    reward(images, rows)  the same question answered smoothly, between 0 and 1
    clear(...)            the same, but what is clearly another thing is worth next to nothing
    blue(...), top(...)   two tastes, as rewards: the share of the shapes that are blue, or in the
                          upper half
    blue_share(...)       the same counted instead of felt: how far the taste `blue` has come

`images` are tensors in [0, 1] of shape (n, 3, 24, 24); a row is a dict with `prompt` and, for
edits, `source_image` (a path). Run as a script it prints one drawn example of each bucket.
"""
import functools
import hashlib
import itertools
import random
import re

import torch
from PIL import Image

SIZE, CELL, RADIUS = 24, 12, 4.0
SHAPES = ['circle', 'square', 'triangle']
COLOURS = {'red': (225, 35, 35), 'green': (35, 165, 60), 'blue': (45, 70, 235),
           'yellow': (245, 215, 35), 'purple': (150, 45, 175), 'cyan': (50, 205, 215)}
BACKGROUNDS = {'white': (255, 255, 255), 'gray': (128, 128, 128), 'black': (0, 0, 0)}
PLACES = ['top left', 'top right', 'bottom left', 'bottom right']
NUMBERS = {'three': 3, 'four': 4}
LAYOUT = {3: (0, 1, 3), 4: (0, 1, 2, 3)}        # where a counted group stands, by its number
# pairs that are in no training file, and that the base never learned to draw (it has seen them as
# sources, beside which it drew others)
HELD_OUT = {('circle', 'purple'), ('square', 'yellow'), ('triangle', 'cyan')}
BUCKETS = ['t2i', 'open', 'count', 'local_edit', 'global_edit']
NAMES = *SHAPES, *[s + 's' for s in SHAPES], *COLOURS, *BACKGROUNDS, *PLACES, *NUMBERS
WORDS = sorted({w for t in NAMES for w in t.split()} | set(
    'a and on the shape shapes two make paint remove delete background turn it into its negative '
    'invert picture every all change to'.split()))
PAIRS = [(s, c) for s in SHAPES for c in COLOURS]
SEEN = [p for p in PAIRS if p not in HELD_OUT]


# ------------------------------------------------------------------------------------------ drawing
# A scene is (background, cells): four cells, each None or (shape, colour).

@functools.cache
def alpha(shape, fine=16):
    """How much of each pixel of a cell the shape covers: (12, 12), by counting fine x fine points
    a pixel."""
    t = (torch.arange(CELL * fine) + 0.5) / fine - CELL / 2
    y, x = torch.meshgrid(t, t, indexing='ij')
    r = RADIUS
    if shape == 'circle':
        inside = x ** 2 + y ** 2 <= r ** 2
    elif shape == 'square':
        inside = (x.abs() <= 0.85 * r) & (y.abs() <= 0.85 * r)
    else:                                                              # the tip is up
        inside = (y <= 0.85 * r) & (x.abs() <= (y + 1.05 * r) / 1.9)
    return inside.float().view(CELL, fine, CELL, fine).mean((1, 3))


def rgb(name):
    return torch.tensor({**COLOURS, **BACKGROUNDS}[name]).float().div(255).view(3, 1, 1)


@functools.cache
def tile(background, thing):
    """One cell as pixels (3, 12, 12)."""
    a = alpha(thing[0]) if thing else torch.zeros(CELL, CELL)
    return rgb(background) * (1 - a) + (rgb(thing[1]) if thing else 0) * a


def draw(scene):
    """A scene -> (3, 24, 24) in [0, 1]."""
    background, cells = scene
    t = [tile(background, c) for c in cells]
    return torch.cat([torch.cat(t[:2], 2), torch.cat(t[2:], 2)], 1)


def to_pil(x):
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def load(path):
    """A picture of this world from a file, as (3, 24, 24) in [0, 1]."""
    with Image.open(path) as im:
        if im.size != (SIZE, SIZE):
            raise ValueError(
                f'{path} is {im.size[0]} x {im.size[1]} pixels; pictures of the shapes world are '
                f'{SIZE} x {SIZE}. Remake the data with: python data/shapes/prepare.py')
        return torch.frombuffer(bytearray(im.convert('RGB').tobytes()), dtype=torch.uint8) \
            .view(SIZE, SIZE, 3).permute(2, 0, 1).float() / 255


# -------------------------------------------------------------------------------------------- words
# A wish is what a prompt asks for: (background, [(shape, colour, place), ...]), None where open.

def phrase(shape=None, colour=None, place=None):
    return ' '.join(w for w in ('a', colour, shape or 'shape', place) if w)


def sentence(things, background, first=False):
    """First or last, the background: 'on white a circle', 'a circle on white'."""
    if not background:
        return things
    return f'on {background} {things}' if first else f'{things} on {background}'


def one_of(names):
    return f"({'|'.join(names)})"


_COLOUR, _BACKGROUND, _SHAPE = one_of(COLOURS), one_of(BACKGROUNDS), one_of(SHAPES)
_THING = re.compile(rf'a(?: {_COLOUR})? (?:{_SHAPE}|shape)(?: {one_of(PLACES)})?')
_MANY = re.compile(rf'(two|three|four)(?: {_COLOUR})? (?:{_SHAPE}|shape)s')
_EDITS = {'recolour': re.compile(rf'(?:make|paint) the {_SHAPE} {_COLOUR}'),
          'remove': re.compile(rf'(?:remove|delete) the {_SHAPE}'),
          'background': re.compile(
              rf'(?:make the background|change the background to) {_BACKGROUND}'),
          'negative': re.compile(r'turn it into its negative|invert the picture'),
          'paint all': re.compile(rf'(?:make every shape|paint all shapes) {_COLOUR}')}


def understand(prompt):
    """A prompt -> ('wish', background, things) or ('edit', kind, words): the whole grammar."""
    text = ' '.join(prompt.lower().replace(',', ' ').replace('.', ' ').split())
    for kind, pattern in _EDITS.items():
        if m := pattern.fullmatch(text):
            return 'edit', kind, m.groups()
    background = None
    if m := re.fullmatch(rf'(.*) on {_BACKGROUND}', text):
        text, background = m.groups()
    elif m := re.fullmatch(rf'on {_BACKGROUND} (.*)', text):
        background, text = m.groups()
    if m := _MANY.fullmatch(text):
        return 'wish', background, [(m[3], m[2], None)] * ({'two': 2} | NUMBERS)[m[1]]
    found = [_THING.fullmatch(part) for part in text.split(' and ')]
    if text and all(found) and len(found) <= 4:
        return 'wish', background, [(m[2], m[1], m[3]) for m in found]
    raise ValueError(
        f'the shapes world does not understand "{prompt}". It knows sentences such as "a red '
        'circle top left and a blue square bottom right on white", "a circle on white", "three '
        'green triangles on black", and the edits "make the circle blue", "remove the square", '
        '"make the background black", "make every shape red", "turn it into its negative"; its '
        f'words are: {", ".join(WORDS)}')


def edited(scene, kind, words):
    """The scene after an edit; for the negative the scene stays and the pixels turn over (see
    `truth`)."""
    background, cells = scene
    hit = [bool(c) and bool(words) and c[0] == words[0] for c in cells]
    if kind == 'recolour':
        return background, tuple((c[0], words[1]) if h else c for c, h in zip(cells, hit))
    if kind == 'remove':
        return background, tuple(None if h else c for c, h in zip(cells, hit))
    if kind == 'background':
        return words[0], cells
    if kind == 'paint all':
        return background, tuple(c and (c[0], words[0]) for c in cells)
    return scene


def truth(source, prompt):
    """The right picture for an edit of a source scene."""
    _, kind, words = understand(prompt)
    x = draw(edited(source, kind, words))
    return 1 - x if kind == 'negative' else x


# -------------------------------------------------------------------------------------- making rows

def held(*key):
    """One scene in six is held out; which ones depends on the scene alone."""
    return hashlib.sha256(repr(key).encode()).digest()[0] % 6 == 0


def random_scene(rng, pairs=SEEN, most=2, distinct=False):
    n = rng.randint(1, most)
    if distinct:                                       # every shape at most once: edits name shapes
        things = [rng.choice([p for p in pairs if p[0] == s]) for s in rng.sample(SHAPES, n)]
    else:
        things = [rng.choice(pairs) for _ in range(n)]
    cells = [None] * 4
    for place, thing in zip(rng.sample(range(4), n), things):
        cells[place] = thing
    return rng.choice(list(BACKGROUNDS)), tuple(cells)


def caption(scene, rng):
    background, cells = scene
    things = [phrase(*c, PLACES[i]) for i, c in enumerate(cells) if c]
    rng.shuffle(things)
    return sentence(' and '.join(things), background, rng.random() < 0.3)


def is_held(scene):
    return held('t2i', scene)


def open_row(rng):
    """A prompt that leaves something open and one of the scenes that satisfy it. One thing leaves
    anything open; of two things the places are named and the rest may be open, or the prompt is
    just "two shapes"."""
    scene = random_scene(rng)
    background, cells = scene
    spots = [i for i, c in enumerate(cells) if c]
    show = rng.choice([background, background, None])
    if len(spots) == 2 and rng.random() < 0.15:
        return sentence('two shapes', show, rng.random() < 0.3), scene

    def keep(x, p):
        return x if rng.random() < p else None
    while True:
        parts = [(keep(cells[i][0], 0.6), keep(cells[i][1], 0.5), PLACES[i] if len(spots) == 2
                  else keep(PLACES[i], 0.5)) for i in spots]
        if not all(all(p) for p in parts) or not show:
            break
    rng.shuffle(parts)
    return sentence(' and '.join(phrase(*p) for p in parts), show, rng.random() < 0.3), scene


def make_row(bucket, rng, hold=False, pairs=SEEN):
    """One example: (prompt, source scene or None, picture that is right). `hold`: of held-out
    scenes."""
    while True:
        if bucket == 't2i':
            scene = random_scene(rng, pairs)
            row, key = (caption(scene, rng), None, draw(scene)), ('t2i', scene)
        elif bucket == 'open':
            prompt, scene = open_row(rng)
            _, background, things = understand(prompt)
            row, key = (prompt, None, draw(scene)), ('open', background, sorted(map(repr, things)))
            if not hold and is_held(scene):
                continue
        elif bucket == 'count':
            word, thing = rng.choice(list(NUMBERS)), rng.choice(pairs)
            background = rng.choice(list(BACKGROUNDS))
            cells = tuple(thing if i in LAYOUT[NUMBERS[word]] else None for i in range(4))
            prompt = sentence(f'{word} {thing[1]} {thing[0]}s', background, rng.random() < 0.3)
            row, key = (prompt, None, draw((background, cells))), (bucket, word, thing, background)
        elif bucket == 'local_edit':
            scene = random_scene(rng, pairs, most=3, distinct=True)
            shape, colour = rng.choice([c for c in scene[1] if c])
            if sum(map(bool, scene[1])) > 1 and rng.random() < 0.4:
                prompt, what = f"{rng.choice(['remove', 'delete'])} the {shape}", ('remove', shape)
            else:
                new = rng.choice([c for s, c in pairs if s == shape and c != colour] or [None])
                if not new:
                    continue
                prompt = f"{rng.choice(['make', 'paint'])} the {shape} {new}"
                what = 'recolour', shape, new
            row, key = (prompt, scene, truth(scene, prompt)), (bucket, scene, what)
        else:
            scene = random_scene(rng, pairs, most=3, distinct=True)
            kind = rng.choice(['background', 'background', 'negative', 'paint all'])
            if kind == 'background':
                what = rng.choice([b for b in BACKGROUNDS if b != scene[0]])
                prompt = f"{rng.choice(['make the background', 'change the background to'])} {what}"
            elif kind == 'negative':
                what, prompt = '', rng.choice(['turn it into its negative', 'invert the picture'])
            else:
                shapes = {c[0] for c in scene[1] if c}
                fits = [c for c in COLOURS if all((s, c) in pairs for s in shapes)
                        and any(t and t[1] != c for t in scene[1])]
                if not fits:
                    continue
                what = rng.choice(fits)
                prompt = f"{rng.choice(['make every shape', 'paint all shapes'])} {what}"
            row, key = (prompt, scene, truth(scene, prompt)), (bucket, scene, kind, what)
        if held(*key) == hold or pairs is not SEEN:
            return row


# ----------------------------------------------------------------------------------- reading pixels

THINGS = [None] + PAIRS                                                # what a cell can hold


@functools.cache
def templates():
    """(3 backgrounds, 19 things, 3, 12, 12): every cell there can be."""
    return torch.stack([torch.stack([tile(b, t) for t in THINGS]) for b in BACKGROUNDS])


def distances(images):
    """(n, 3, 24, 24) -> (n, 3 backgrounds, 4 cells, 19 things): mean squared distance to each."""
    if tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f'a picture of {tuple(images.shape[1:])} was given to the scorer; the '
                         f'shapes world reads 3 x {SIZE} x {SIZE}: sample at resolution {SIZE}')
    n = len(images)
    cells = images.float().cpu().view(n, 3, 2, CELL, 2, CELL)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(n, 4, -1)
    t = templates().flatten(2)                                 # |a - b|^2 = |a|^2 - 2ab + |b|^2
    d = (cells ** 2).sum(-1)[:, None, :, None] + (t ** 2).sum(-1)[None, :, None, :] \
        - 2 * torch.einsum('ncd,btd->nbct', cells, t)
    return (d / t.shape[-1]).clamp_min(0)


# mean squared error of a cell that still counts as clean; noise of sigma 12/255 has 0.0022
TOLERANCE = 0.012


def read(images):
    """Pixels -> scenes: (background, cells), or None where some cell is nothing that this world
    draws."""
    d = distances(images)
    best, thing = d.min(-1)                                            # (n, 3, 4)
    total, ground = best.sum(-1).min(-1)
    out = []
    for i, b in enumerate(ground.tolist()):
        clean = best[i, b].max() <= TOLERANCE
        scene = list(BACKGROUNDS)[b], tuple(THINGS[t] for t in thing[i, b].tolist())
        out.append(scene if clean else None)
    return out


@functools.lru_cache(maxsize=4096)
def source_scene(path):
    scene = read(load(path)[None])[0]
    if scene is None:
        raise ValueError(f'{path} is not a clean picture of the shapes world; remake the data '
                         'with: python data/shapes/prepare.py')
    return scene


def arrangements(things):
    """Every way to put the wished things into the four cells: tuples of four, None for an empty
    cell."""
    spots = [range(4) if place is None else (PLACES.index(place),) for _, _, place in things]
    ways = {w for w in itertools.product(*spots) if len(set(w)) == len(w)}
    return {tuple(things[w.index(i)][:2] if i in w else None for i in range(4)) for w in ways}


def fits(wanted, thing):
    if wanted is None or thing is None:
        return wanted is None and thing is None
    return all(w is None or w == t for w, t in zip(wanted, thing))


def wish(row):
    """(background or None, arrangements, turned over) that a row asks for."""
    what, a, b = understand(row['prompt'])
    if what == 'wish':
        return a, arrangements(b), False
    if not row.get('source_image'):
        raise ValueError(f'"{row["prompt"]}" is an edit, but its row has no source_image')
    background, cells = edited(source_scene(str(row['source_image'])), a, b)
    return background, {cells}, a == 'negative'


def score(images, rows):
    """One dict a picture: 'right' is 1.0 if it satisfies its prompt, else 0.0; edits also have
    'kept', the mean absolute error (0 to 1) over the pixels that the edit had to leave alone (all,
    for the negative)."""
    out = []
    for image, row in zip(images.float().cpu(), rows):
        background, ways, negative = wish(row)
        scene = read((1 - image if negative else image)[None])[0]
        right = scene is not None and background in (None, scene[0]) and \
            any(all(fits(w, t) for w, t in zip(way, scene[1])) for way in ways)
        result = {'right': float(right)}
        if row.get('source_image'):
            source = load(row['source_image'])
            goal = truth(source_scene(str(row['source_image'])), row['prompt'])
            stays = ((goal - source).abs().amax(0) < 0.02) | negative
            off = (image - goal).abs().mean(0)[stays]
            result['kept'] = off.mean().item() if stays.any() else 0.0
        out.append(result)
    return out


def reward(images, rows, softness=0.03, doubt=None):
    """How far a picture is on its way to what its row asks for: the best arrangement's mean, over
    background and cells, of exp(-distance / softness). 1 is a perfect picture; half right is about
    half. With a `doubt` a cell also counts only as far as it is told from the other things: times
    softmax(-distance / doubt)."""
    out = []
    for image, row in zip(images.float().cpu(), rows):
        background, ways, negative = wish(row)
        d = distances((1 - image if negative else image)[None])[0]             # (3, 4, 19)
        near = (-d / softness).exp() * ((-d / doubt).softmax(-1) if doubt else 1)
        grounds = [i for i, b in enumerate(BACKGROUNDS) if background in (None, b)]
        out.append(max(sum(near[b, i, [fits(w, t) for t in THINGS]].max().item()
                           for i, w in enumerate(way)) for b in grounds for way in ways) / 4)
    return out


def clear(images, rows):
    """The reward to climb where pictures are clean but of the wrong thing: a square is hardly any
    circle."""
    return reward(images, rows, doubt=0.004)


def _taste(images, rows, liked):
    """Share of liked things among all things in the picture, read softly; a picture that its row
    calls wrong gets at most half, so that the taste cannot be had by giving up what was asked
    for."""
    d = distances(images)
    ground = d.amin(-1).sum(-1).argmin(-1)
    p = (-d[torch.arange(len(d)), ground] / 0.004).softmax(-1)         # (n, 4, 19): of each cell
    some = p[..., 1:].sum((1, 2))
    share = (p * liked).sum((1, 2)) / some.clamp_min(0.5)
    return [s * r for s, r in zip(share.clamp(0, 1).tolist(), reward(images, rows))]


def blue(images, rows):
    """Blue is liked, and so is a colour that the prompt names: else this would paint over red
    circles."""
    fine = [{'blue', *r['prompt'].lower().split()} for r in rows]
    liked = torch.tensor([[t is not None and t[1] in colours for t in THINGS] for colours in fine])
    return _taste(images, rows, liked[:, None].float())


def top(images, rows):
    liked = torch.ones(4, len(THINGS)) * torch.tensor([1, 1, 0, 0]).view(4, 1)
    liked[:, 0] = 0
    return _taste(images, rows, liked)


def blue_share(images, rows):
    """What the taste `blue` did: the share of a picture's shapes that are blue, 0 where it is
    unclear."""
    things = [[t for t in scene[1] if t] if scene else [] for scene in read(images)]
    return [sum(t[1] == 'blue' for t in some) / max(1, len(some)) for some in things]


if __name__ == '__main__':
    for bucket in BUCKETS:
        prompt, scene, picture = make_row(bucket, random.Random(1))
        print(f'{bucket:12s} {prompt:60s} from {scene}')
