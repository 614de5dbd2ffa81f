"""
Files other than adapters: rows of data in, pictures and checkpoints out. No models here, nothing is random.

Data is CSV or JSONL with `prompt`, `task`, `source_image`, `target_image` (paths relative to the file), or a
text file with a prompt a line. A run has log.jsonl, samples/, checkpoints step_*/ with a link `latest`.
"""
import array, csv, difflib, functools, importlib.util, itertools, json, math, os, random, sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from configurator import BadInput, need
from support.processes import gather

FIELDS = 'prompt', 'task', 'source_image', 'target_image'
REMAKE = '; make it with: python data/shapes/prepare.py'


class Bucket(Sequence):
    """Rows of one task. Only their places in the files are held in memory; a row is read when needed."""

    def __init__(self, name):
        self.name, self.files, self.place, self.sources = name, [], array.array('Q'), 0

    def add(self, path, columns, offset, stamp):
        if not self.files or self.files[-1][0] != path:
            self.files.append((path, columns, stamp))
        self.place.append((len(self.files) - 1) << 48 | offset)

    def __len__(self):
        return len(self.place)

    def __getitem__(self, i):
        path, columns, stamp = self.files[self.place[i] >> 48]
        need(file_stamp(path) == stamp, f'{path} was changed while this run reads from it; a run that has '
             'checkpoints goes on with --init_from=resume')
        offset = self.place[i] & (1 << 48) - 1
        with open(path, 'rb') as f:
            f.seek(offset)
            return parse_row(path, columns, (x.decode('utf-8' if offset else 'utf-8-sig') for x in f))


def file_stamp(path):
    """Size and time of the last change, None if it is gone: rows are found again by their places."""
    try:
        s = os.stat(path)
        return s.st_size, s.st_mtime_ns
    except FileNotFoundError:
        return None


def parse_row(path, columns, lines):
    """The next row: dict of prompt, task, source_image, target_image; pictures as full paths, '' for none."""
    if path.endswith('.jsonl'):
        row = json.loads(next(lines))
    elif columns:
        row = next(csv.DictReader(lines, columns, strict=True))
    else:
        row = {'prompt': next(lines).strip()}
    if not isinstance(row, dict):
        raise ValueError('not a row with names')
    if None in row:
        raise ValueError(f'{len(row[None])} fields more than columns: a text with a comma in it needs quotes')
    row = {k: v for k, v in row.items() if v is not None}
    if odd := [k for k in FIELDS if not isinstance(row.get(k, ''), str)]:
        raise ValueError(f'{odd[0]} should be text, not {row[odd[0]]!r}')
    for k in ('source_image', 'target_image'):
        row[k] = str(Path(path).parent / row[k]) if row.get(k) else ''
    return row


def read_data(paths):
    """Files -> {name: Bucket}. A row goes to the bucket its `task` names, else its file's. One pass."""
    buckets, errors = {}, []
    for path in map(str, paths):
        if not os.path.isfile(path):
            errors.append(f'{path}: no such data file')
            continue
        at, start, columns, stamp = 0, 0, [], file_stamp(path)

        def lines(f):
            nonlocal at
            for line in f:
                at += len(line)
                yield line.decode('utf-8-sig' if at == len(line) else 'utf-8')
        with open(path, 'rb') as f:
            feed = lines(f)
            if path.endswith('.csv'):
                columns = next(csv.reader(feed), [])
                if 'prompt' not in columns:
                    errors.append(f'{path}: no column "prompt"; it has: {", ".join(columns) or "nothing"}')
                    continue
            while True:
                start = at
                try:
                    row = parse_row(path, columns, feed)
                except (StopIteration, RuntimeError):
                    break
                except (ValueError, csv.Error) as e:
                    errors.append(f'{path}: cannot be read near byte {start} ({e})')
                    break
                if row.get('prompt'):
                    name = row.get('task') or Path(path).stem.removesuffix('_val')
                    buckets.setdefault(name, Bucket(name)).add(path, columns, start, stamp)
                    buckets[name].sources += bool(row['source_image'])
                elif row.get('source_image'):
                    errors.append(f'{path}: a row without a prompt near byte {start}')
    return buckets, errors


def check_rows(bucket, need_target=False):
    """Every picture that a bucket names exists and opens (a PNG is read whole), and pairs have one shape. A
    list of complaints."""
    errors = []
    for row in bucket:
        sizes = {}
        for k in ('source_image', 'target_image'):
            try:
                if row[k]:
                    with Image.open(row[k]) as im:
                        sizes[k] = im.size
                        im.verify()
            except (OSError, ValueError, SyntaxError) as e:            # the last is Pillow's for a broken PNG
                errors.append(f'{bucket.name}: {k} {row[k]} ' +
                              ('does not exist' if not os.path.exists(row[k]) else f'does not open ({e})'))
        if len(sizes) == 2:
            (a, b), (c, d) = sizes.values()
            if abs(math.log(a * d / (b * c))) > 0.05:
                errors.append(f'{bucket.name}: source {a} x {b} and target {c} x {d} differ in shape: '
                              f'{row["source_image"]}')
        if need_target and not row['target_image']:
            errors.append(f'{bucket.name}: "{row["prompt"][:60]}" has no target_image')
    return errors


class Data:
    """Of a run, by the names of buckets: those to learn from, and those held out."""

    def __init__(self, buckets, held):
        self.buckets, self.held = buckets, held

    def drawn(self, seed, most):
        """Rows to evaluate on: always the same."""
        return {k: random.Random(repr((seed, 'eval', k))).sample(b, min(len(b), most))
                for k, b in self.held.items()}


def open_buckets(paths, held_paths, labels=(), need_target=False):
    """Training and held-out buckets {label: Bucket}; all that is wrong with them at once. A bucket without
    held-out rows is its own."""
    (buckets, errors), (held, more) = read_data(paths), read_data(held_paths)
    labels = labels or list(buckets)
    errors += more + [f'bucket {k!r} has no rows; the data has: {", ".join(buckets) or "none"}'
                      for k in labels if not len(buckets.get(k, ()))]
    for k in labels if not errors else ():
        errors += check_rows(buckets[k], need_target) + (check_rows(held[k]) if k in held else [])
    need(not errors, 'the data has mistakes:\n  ' + '\n  '.join(errors[:20]) +
         (f'\n  and {len(errors) - 20} more' if len(errors) > 20 else ''))
    return Data({k: buckets[k] for k in labels}, {k: held.get(k) or buckets[k] for k in labels})


def load_image(path, height, width):
    """A picture as (3, height, width) in [-1, 1], cropped to shape from its middle and resized."""
    try:
        with Image.open(path) as im:
            im = im.convert('RGB')
    except (OSError, ValueError) as e:
        raise BadInput(f'picture {path} does not open: {e}')
    w, h = im.size
    if (w, h) != (width, height):
        s = min(w / width, h / height)
        box = ((w - s * width) / 2, (h - s * height) / 2, (w + s * width) / 2, (h + s * height) / 2)
        im = im.resize((width, height), Image.LANCZOS, box=box)
    x = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return x.permute(2, 0, 1) / 127.5 - 1


def to_picture(x):
    """(3, h, w) in [0, 1] -> PIL."""
    return Image.fromarray((x.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def load_images(batch, key):
    """A batch's pictures, in its size."""
    return torch.stack([load_image(s.row[key], *s.size) for s in batch])


def shown(rows, key, size):
    """Pictures of rows to be looked at, in [0, 1]; None for none."""
    return [load_image(r[key], *size) / 2 + 0.5 if r[key] else None for r in rows]


def grid(rows, path, captions=None, heads=None, scale=None):
    """Rows of pictures (tensors in [0, 1] or None) as one PNG; captions below rows, heads above columns. A
    column without any picture is left out, but for one whose head is '': a gap."""
    columns = itertools.zip_longest(heads or (), *rows)
    heads, *rows = zip(*(x for x in columns if x[0] == '' or any(p is not None for p in x[1:])))
    h, w = next(x for r in rows for x in r if x is not None).shape[-2:]
    k = scale or max(1, 120 // h)
    H, W, top, foot = h * k, w * k, 16 if any(heads) else 0, 16 if captions else 0
    wide = max(len(heads) * (W + 4) + 4, 420 if captions else 0)       # room for the words
    out = Image.new('RGB', (wide, top + len(rows) * (H + foot + 6) + 4), (245, 245, 245))
    pen = ImageDraw.Draw(out)
    for j, head in enumerate(heads):
        pen.text((6 + j * (W + 4), 3), head or '', fill=(0, 0, 0))
    for i, r in enumerate(rows):
        y = top + i * (H + foot + 6) + 4
        for j, x in enumerate(r):
            if x is not None:
                out.paste(to_picture(x).resize((W, H), Image.NEAREST), (4 + j * (W + 4), y))
        if captions:
            text = captions[i]
            while len(text) > 8 and pen.textlength(text) > wide - 12:
                text = text[:-2]
            pen.text((6, y + H + 2), text + ('' if text == captions[i] else '…'), fill=(60, 60, 60))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


def is_hub_id(path):
    """Neither something that is here nor something that could only be here."""
    return not Path(path).expanduser().exists() and not path.startswith(('.', '/', '~', 'data/', 'out/'))


def model_configs(path):
    """{component: config} of a diffusers folder and its 'index'; nothing of a hub id that is not here."""
    configs = {}
    for f in sorted(Path(path).glob('*/config.json')) + sorted(Path(path).glob('model_index.json')):
        try:
            configs[f.parent.name if f.name == 'config.json' else 'index'] = json.loads(f.read_text())
        except ValueError as e:
            raise BadInput(f'{f} is damaged ({e}); fetch the model again')
    need(is_hub_id(path) or 'index' in configs, f'{path} is no diffusers folder: it has no model_index.json' +
         REMAKE * ('shapes' in path))
    return configs


@functools.cache
def _module(path):
    spec = importlib.util.spec_from_file_location(f'{path.stem}_{abs(hash(path))}', path)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    sys.path.insert(0, str(path.parent))                               # for imports of its neighbours
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(path.parent))
    return loaded


def load_function(spec):
    """'path/file.py:function' -> the function."""
    path, _, name = spec.rpartition(':')
    need(path.endswith('.py') and Path(path).is_file(),
         f'{spec}: no such file {path!r}; a function is named as path/file.py:function')
    there = {k: v for k, v in vars(_module(Path(path).resolve())).items() if callable(v)}
    if name not in there:
        near = difflib.get_close_matches(name, there, 1)
        raise BadInput(f'{spec}: {path} has no such function' +
                       (f', did you mean {near[0]}?' if near else f', but {", ".join(sorted(there)[:9])}'))
    return there[name]


def score_mean(scores):
    """What a scorer said of some pictures, numbers or dicts whose first value counts, as one number."""
    numbers = (next(iter(s.values())) if isinstance(s, dict) else s for s in scores)
    return sum(map(float, numbers)) / max(1, len(scores))


def judged(score, images, rows, few, world):
    """The mean of what a scorer says of pictures; each is asked about by one process, a few at once."""
    judge = load_function(score) if isinstance(score, str) else score
    own, said = range(len(rows))[world.rank::world.size], []
    for some in (list(own[i:i + few]) for i in range(0, len(own), few)):
        said += judge(images[some], [rows[i] for i in some])
    return score_mean(gather(world, said))


def draw_pairs(buckets, folder):
    """data_<bucket>.png: a few edit pairs, to be looked at before the first step."""
    for name, bucket in buckets.items():
        if bucket.sources:
            rows = [*itertools.islice(bucket, 8)]
            size = Image.open(rows[0]['source_image']).size[::-1]
            pairs = [shown(rows, k, size) for k in ('source_image', 'target_image')]
            grid([*zip(*pairs)], folder / f'data_{name}.png', [r['prompt'] for r in rows], ['source', 'target'])


def curve(history, path, keys):
    pass
