"""
What comes from files: rows of data, pictures, models' configs, functions. No weights here, nothing
is random. Only functions are trusted: they are code, and run.

Data is CSV or JSONL with `prompt`, `task`, `source_image`, `target_image`, or a text file with a
prompt a line. Pictures' paths are relative to the file, and may point anywhere that the user can
read.
"""
import array, csv, difflib, functools, importlib.util, inspect, itertools, json, math, os, sys
import traceback, warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from configurator import BadInput, need
from support.disk import flaw, replace
from support.processes import gather, rng

FIELDS = 'prompt', 'task', 'source_image', 'target_image'
ENDINGS = '.csv', '.jsonl', '.txt'
FORMATS = 'PNG', 'JPEG', 'WEBP', 'BMP', 'GIF'      # none that starts another program, as EPS does
MOST_PIXELS = 100_000_000
REMAKE = '; make it with: python data/shapes/prepare.py'
UNUSED = 'safety_checker', 'feature_extractor', 'image_encoder'     # of pipelines: never loaded
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # `opened` refuses them


def one_line(text, most=300):
    text = ' '.join(str(text)[:4 * most].split())
    return text if len(text) <= most else text[:most - 1] + '…'


# --------------------------------------------------------------------------------------------------
# Data

class Bucket(Sequence):
    """Rows of one task. Memory holds only their places in the files; a row is read when needed."""

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
        need(file_stamp(path) == stamp, f'{path} was changed while this run reads from it; a run '
             'that has checkpoints goes on with --init_from=resume')
        offset = self.place[i] & (1 << 48) - 1
        with open(path, 'rb') as f:
            f.seek(offset)
            lines = (x.decode('utf-8' if offset else 'utf-8-sig') for x in f)
            return parse_row(path, columns, lines)


def file_stamp(path):
    """Size and time of the last change, None if it is gone: rows are found by their places."""
    try:
        s = os.stat(path)
        return s.st_size, s.st_mtime_ns
    except FileNotFoundError:
        return None


def ending(path):
    return Path(path).suffix.lower()


def check_names(names):
    """No name twice, and none that is nearly a field's: its column would be passed over."""
    names = list(names)
    for k in names:
        if names.count(k) > 1:
            raise ValueError(f'two columns are called {k!r}')
        if (near := str(k).strip().lower()) in FIELDS and k not in FIELDS:
            raise ValueError(f'the column {k!r} should be called {near!r}')


def json_object(pairs):
    check_names(k for k, _ in pairs)
    return dict(pairs)


def parse_row(path, columns, lines):
    """The next row: dict of prompt, task, source_image, target_image; pictures as full paths, ''
    for none. A row without any text is an empty dict."""
    if columns:
        row = next(csv.DictReader(lines, columns, strict=True))
    else:
        line = next(lines)
        if '\r' in line.rstrip('\r\n'):
            raise ValueError('a line that goes on after a carriage return')
        row = {'prompt': line.strip()}
        if ending(path) == '.jsonl' and line.strip():
            row = json.loads(line, object_pairs_hook=json_object)
        elif not line.strip():
            return {}
    if not isinstance(row, dict):
        raise ValueError('not a row with names')
    if None in row:
        raise ValueError(f'{len(row[None])} fields more than columns: a text with a comma in it '
                         'needs quotes')
    row = {k: v for k, v in row.items() if v is not None}
    for k in FIELDS:
        if not isinstance(text := row.get(k, ''), str):
            raise ValueError(f'{k} should be text, not {text!r}')
        if '\0' in text:
            raise ValueError(f'{k} has a NUL byte in it')
        text.encode()                              # half a character, as JSON can write it, is none
    if not row.get('prompt', '').strip():
        raise ValueError('a row without a prompt')
    for k in ('source_image', 'target_image'):
        row[k] = str(Path(path).parent / row[k]) if row.get(k) else ''
    return row


def check_file(path):
    """Is it data, and text? By its name and its beginning."""
    if ending(path) not in ENDINGS:
        raise ValueError(f'data is a file that ends in {", ".join(ENDINGS)}, not in '
                         f'{ending(path) or "nothing"}; save it as one of them')
    if why := flaw(path):
        raise ValueError('no such data file' if why == 'does not exist' else why)
    with open(path, 'rb') as f:
        head = f.read(1 << 16)
    if head.startswith((b'\xff\xfe', b'\xfe\xff')) or b'\0' in head:
        raise ValueError('this is no UTF-8 text (UTF-16?); save it as UTF-8')
    if b'\r' in head and b'\n' not in head:
        raise ValueError('its lines end in a carriage return alone; save it with line feeds')


def read_file(path, buckets):
    """The rows of one file into the buckets that they name, else into the file's. In one pass."""
    check_file(path)
    at, columns, stamp = 0, [], file_stamp(path)

    def decoded(f):
        nonlocal at
        for line in f:
            at += len(line)
            try:
                yield line.decode('utf-8-sig' if at == len(line) else 'utf-8')
            except UnicodeDecodeError as e:
                raise ValueError(f'this is no UTF-8 text; save it as UTF-8: {e}') from e
    with open(path, 'rb') as f:
        lines = decoded(f)
        if ending(path) == '.csv':
            columns = next(csv.reader(lines, strict=True), [])
            if 'prompt' not in columns:
                found = one_line(', '.join(columns)) or 'none'
                raise ValueError(f'no column "prompt"; it has: {found}')
            check_names(columns)
        while True:
            start = at
            try:
                row = parse_row(path, columns, lines)
            except StopIteration:
                return
            except (ValueError, csv.Error, RecursionError) as e:
                raise ValueError(f'cannot be read near byte {start} ({one_line(e)})') from e
            if row:
                name = row.get('task') or Path(path).stem.removesuffix('_val')
                buckets.setdefault(name, Bucket(name)).add(path, columns, start, stamp)
                buckets[name].sources += bool(row['source_image'])


def read_data(paths):
    """Files -> ({name: Bucket}, what is wrong with the files)."""
    buckets, errors = {}, []
    for path in map(str, paths):
        try:
            read_file(path, buckets)
        except (OSError, ValueError, csv.Error) as e:
            errors.append(f'{path}: {one_line(e)}')
    return buckets, errors


def check_row(name, row, need_target):
    """What is wrong with a row's pictures, each decoded: a header proves nothing of the rest."""
    errors, sizes = [], []
    for k in ('source_image', 'target_image'):
        try:
            if row[k]:
                sizes.append(picture_size(row[k]))
        except BadInput as e:
            errors.append(f'{name}: {k} {str(e).removeprefix("picture ")}')
    if len(sizes) == 2:
        (a, b), (c, d) = sizes
        if abs(math.log(a * d / (b * c))) > 0.05:
            errors.append(f'{name}: source {a} x {b} and target {c} x {d} differ in shape: '
                          f'{row["source_image"]}')
    if need_target and not row['target_image']:
        errors.append(f'{name}: "{one_line(row["prompt"], 60)}" has no target_image')
    return errors


def check_rows(bucket, need_target=False):
    """A list of complaints about the pictures of a bucket. The processes of a machine share the
    rows: each ends the run if it finds a mistake. Threads, because decoders let others run."""
    local, of = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    mine, errors = range(len(bucket))[local::of], []
    check = functools.partial(check_row, bucket.name, need_target=need_target)
    bar = tqdm(total=len(mine), desc=f'pictures of {bucket.name}', delay=3, leave=False,
               disable=os.environ.get('RANK', '0') != '0')
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() // of))) as pool, bar:
        for some in (mine[i:i + 256] for i in range(0, len(mine), 256)):
            errors += itertools.chain(*pool.map(check, [bucket[i] for i in some]))
            bar.update(len(some))
    return errors


class Data:
    """Of a run, by the names of buckets: those to learn from, and those held out; and the names of
    those that no route has."""

    def __init__(self, buckets, held, unused=()):
        self.buckets, self.held, self.unused = buckets, held, unused

    def told(self, label):
        """How many rows a bucket has, and whether it is evaluated on others."""
        own, held = self.buckets[label], self.held[label]
        return f'{len(own)} rows' + ', evaluated on the same' * (held is own)

    def drawn(self, seed, most):
        """Rows to evaluate on: always the same."""
        return {k: rng(seed, 'eval', k).sample(b, min(len(b), most))
                for k, b in self.held.items()}


def open_buckets(paths, held_paths, labels=(), need_target=False):
    """Training and held-out buckets {label: Bucket}; all that is wrong with them at once. A bucket
    without held-out rows is its own."""
    (buckets, errors), (held, more) = read_data(paths), read_data(held_paths)
    labels = labels or list(buckets)
    errors += more + [f'bucket {k!r} has no rows; the data has: {", ".join(buckets) or "none"}'
                      for k in labels if not len(buckets.get(k, ()))]
    for k in labels if not errors else ():
        errors += check_rows(buckets[k], need_target) + (check_rows(held[k]) if k in held else [])
    unused = sorted({*buckets, *held} - {*labels})
    for k in labels if not errors else ():
        if k not in held and (near := difflib.get_close_matches(k, {*held} - {*labels}, 1)):
            errors += [f'eval_data has no rows of bucket {k!r}, but of {near[0]!r}, which no route '
                       "has: a row's bucket is its task, else its file's name without _val"]
    need(not errors, 'the data has mistakes:\n  ' + '\n  '.join(errors[:20]) +
         (f'\n  and {len(errors) - 20} more' if len(errors) > 20 else ''))
    return Data({k: buckets[k] for k in labels}, {k: held.get(k) or buckets[k] for k in labels},
                unused)


# --------------------------------------------------------------------------------------------------
# Pictures

def opened(path, read):
    """What read(picture) makes of the file of a picture; any failure is a sentence."""
    if why := flaw(path):
        raise BadInput(f'picture {path} {why}')
    large = f'picture {path} is above {MOST_PIXELS // 10 ** 6} megapixels: make it smaller'
    try:
        with Image.open(path, formats=FORMATS) as im:
            need(im.width * im.height <= MOST_PIXELS, large)
            return read(im)
    except BadInput:
        raise
    except Image.DecompressionBombError as e:      # Pillow's own limit is at twice as much
        raise BadInput(large) from e
    except Image.UnidentifiedImageError as e:
        raise BadInput(f'picture {path} does not open: it is none of {", ".join(FORMATS)}') from e
    except Exception as e:                         # of a broken file, decoders raise whatever comes
        raise BadInput(f'picture {path} does not open: {one_line(e) or type(e).__name__}') from e


def open_image(path):
    """A picture in RGB, upright; what is transparent lies on white. Of an animation, the first."""
    def read(im):
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith('I'):                # grey in 16 bits: RGB would cut it off at 255
            im = im.point(lambda v: v / 256).convert('L')
        if im.has_transparency_data:
            im = im.convert('RGBA')
            im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im)
        return im.convert('RGB')
    return opened(path, read)


def picture_size(path):
    """Width and height of a picture as it stands upright, after all of it was decoded; of a PNG,
    after its check sums were found right, which is ten times as fast."""
    def read(im):
        size, png = im.size, im.format == 'PNG'
        exif = im.getexif() if not png or 'exif' in im.info else {}    # a PNG would be decoded
        if png:
            im.verify()
        else:
            im.draft('RGB', (1, 1))                # a JPEG: all is read, but little is computed
            im.load()
        return size[::-1] if exif.get(0x0112, 1) in (5, 6, 7, 8) else size
    return opened(path, read)


def load_image(path, height, width):
    """A picture as (3, height, width) in [-1, 1], cropped to shape from its middle and resized."""
    im = open_image(path)
    w, h = im.size
    if (w, h) != (width, height):
        s = min(w / width, h / height)
        box = ((w - s * width) / 2, (h - s * height) / 2, (w + s * width) / 2, (h + s * height) / 2)
        im = im.resize((width, height), Image.LANCZOS, box=box)
    x = torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return x.permute(2, 0, 1) / 127.5 - 1


def to_picture(x):
    """(3, h, w) in [0, 1] -> PIL."""
    x = (x.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def load_images(batch, key):
    """A batch's pictures, in its size."""
    return torch.stack([load_image(s.row[key], *s.size) for s in batch])


def shown(rows, key, size):
    """Pictures of rows to be looked at, in [0, 1]; None for none."""
    return [load_image(r[key], *size) / 2 + 0.5 if r[key] else None for r in rows]


def save_png(picture, path):
    def write(part):
        picture.save(part, 'PNG')
    replace(path, write)


def fitted(pen, text, width):
    """The text in one line, cut to so many pixels."""
    text = short = one_line(text, 400)
    while len(short) > 8 and pen.textlength(short) > width:
        short = short[:-2]
    return short + '…' * (short != text)


def grid(rows, path, captions=None, heads=None, scale=None):
    """Rows of pictures (tensors in [0, 1] or None) as one PNG; captions below rows, heads above
    columns. A column without any picture is left out, but for one whose head is '': a gap."""
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
                fit = min(W / x.shape[-1], H / x.shape[-2])    # routes may have sizes of their own
                size = round(fit * x.shape[-1]), round(fit * x.shape[-2])
                out.paste(to_picture(x).resize(size, Image.NEAREST), (4 + j * (W + 4), y))
        if captions:
            pen.text((6, y + H + 2), fitted(pen, captions[i], wide - 12), fill=(60, 60, 60))
    save_png(out, path)


# --------------------------------------------------------------------------------------------------
# Models' configs

def is_hub_id(path):
    """Neither something that is here nor something that could only be here."""
    return not os.path.exists(os.path.expanduser(path)) and \
        not path.startswith(('.', '/', '~', 'data/', 'out/'))


def model_configs(path):
    """{component: config} of a diffusers folder and its 'index'; {} of a hub id not here."""
    configs = {}
    for f in sorted(Path(path).glob('*/config.json')) + sorted(Path(path).glob('model_index.json')):
        try:
            found = json.loads(f.read_text(encoding='utf-8'))
        except (OSError, ValueError, RecursionError) as e:
            raise BadInput(f'{f} is damaged ({one_line(e)}); fetch the model again') from e
        need(isinstance(found, dict), f'{f} is damaged (it holds no names); fetch the model again')
        configs[f.parent.name if f.name == 'config.json' else 'index'] = found
    need(is_hub_id(path) or 'index' in configs, f'{path} is no diffusers folder: it has no '
         'model_index.json' + REMAKE * ('shapes' in path))
    index = configs.get('index', {})
    parts = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] and
             k not in UNUSED]
    gone = [k for k in parts if not (Path(path) / k).is_dir()]
    need(not gone, f'{path}/model_index.json names a {" and a ".join(gone)}, but has no such '
         'folder; fetch the model again')
    gone = [k for k in parts if k not in configs and k.startswith(('transformer', 'unet', 'vae'))]
    need(not gone, f'{path}: its {" and its ".join(gone)} has no config.json; fetch the model '
         'again')
    name = index.get('_class_name', '')
    need('index' not in configs or name and isinstance(name, str), f'{path}/model_index.json is '
         'damaged: its _class_name should name a pipeline; fetch the model again')
    return configs


# --------------------------------------------------------------------------------------------------
# Functions of one's own: families, rewards, scores

class RewardError(BadInput):
    """A reward or a score failed: the run stops rather than make a number up. `sample` is the
    number of the picture at which it did, None where that is not known."""

    def __init__(self, message, sample=None):
        super().__init__(message)
        self.sample = sample


def explained(error, path):
    """What other people's code raised, in one line, with the line of their file `path` where it
    passed through that."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename == path] or frames[-1:]
    where = frames[-1].filename, frames[-1].lineno
    if isinstance(error, SyntaxError):             # it carries its own
        where, error = (error.filename, error.lineno), type(error)(error.msg)
    try:
        said = str(error)
    except Exception:                              # their own class may have no words either
        said = 'it cannot say why'
    return one_line(f'{type(error).__name__}: {said}') + f' ({where[0]}, line {where[1]})'


@functools.cache
def _module(path):
    spec = importlib.util.spec_from_file_location(f'{path.stem}_{abs(hash(path))}', path)
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)    # for dataclasses
    sys.path.insert(0, str(path.parent))           # for imports of its neighbours
    try:
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as e:
        raise BadInput(f'{path} cannot be loaded: {explained(e, str(path))}') from e
    finally:
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    return loaded


def load_function(spec):
    """'path/file.py:function' -> the function."""
    path, _, name = spec.rpartition(':')
    path = os.path.expanduser(path)
    need(path.endswith('.py') and os.path.isfile(path),
         f'{spec}: no such file {path!r}; a function is named as path/file.py:function')
    there = {k: v for k, v in vars(_module(Path(path).resolve())).items() if callable(v)}
    if name not in there:
        near = difflib.get_close_matches(name, there, 1)
        mend = f'did you mean {near[0]}?' if near else f'but {", ".join(sorted(there)[:9])}'
        raise BadInput(f'{spec}: {path} has no such function, {mend}')
    return there[name]


def number(value):
    """An answer about a picture as a number; of a dict, the first value counts."""
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    if value is None or isinstance(value, str | bytes):        # float('1') would take a text
        raise TypeError(f'it gave {one_line(repr(value), 60)}, which is no number')
    value = float(value)
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f'it gave {value}, no finite number in float32')
    return value


def ask(name, function, images, rows):
    """One finite number an image from a reward or a score, or a RewardError. It gets copies: what
    it changes is its own."""
    for i, x in enumerate(images):
        if not x.isfinite().all():
            raise RewardError(f'{name}: the picture itself has values that are not finite', i)
    try:
        said = function(images.clone(), [dict(row) for row in rows])
        if hasattr(said, '__iter__') and not isinstance(said, str | bytes | dict):
            said = list(said)                      # a generator runs only now
    except (RewardError, KeyboardInterrupt):
        raise
    except BaseException as e:                     # SystemExit, and whatever else it may raise
        code = getattr(inspect.unwrap(function), '__code__', None)
        raise RewardError(f'{name}: {explained(e, code and code.co_filename)}') from e
    if not isinstance(said, list):
        raise RewardError(f'{name}: it gave {one_line(repr(said), 60)}, not a list of numbers', 0)
    if len(said) != len(rows):
        raise RewardError(f'{name}: it gave {len(said)} values for {len(rows)} pictures', 0)
    values = []
    for i, value in enumerate(said):
        try:
            values.append(number(value))
        except Exception as e:                     # whatever float() says of whatever it is given
            raise RewardError(f'{name}: {one_line(e)} (picture {i + 1} of {len(rows)})', i) from e
    return values


def score_mean(scores):
    """What a scorer said of pictures, numbers or dicts whose first value counts, as one number."""
    return sum(map(number, scores)) / max(1, len(scores))


def judged(judge, images, rows, few, world, name='score'):
    """The mean of what a scorer says of pictures; each is asked about by one process, a few at
    once. If it fails in one process, the error is raised in all."""
    own, said, error = range(len(rows))[world.rank::world.size], [], None
    try:
        for some in (list(own[i:i + few]) for i in range(0, len(own), few)):
            said += ask(name, judge, images[some], [rows[i] for i in some])
    except RewardError as e:
        error = e
    answers = gather(world, [(said, error and str(error))])
    if failed := [why for _, why in answers if why]:
        raise RewardError(failed[0]) from error
    return score_mean([v for some, _ in answers for v in some])


def draw_pairs(buckets, folder):
    """data_<bucket>.png: a few edit pairs, to be looked at before the first step."""
    for name, bucket in buckets.items():
        if bucket.sources:
            rows = [*itertools.islice((r for r in bucket if r['source_image']), 8)]
            width, height = picture_size(rows[0]['source_image'])
            shrink = min(1, 512 / max(height, width))          # photographs are large
            size = round(height * shrink), round(width * shrink)
            pairs = [shown(rows, k, size) for k in ('source_image', 'target_image')]
            grid([*zip(*pairs)], folder / f'data_{name}.png', [r['prompt'] for r in rows],
                 ['source', 'target'])
