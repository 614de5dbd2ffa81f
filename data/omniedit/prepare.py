"""
OmniEdit, or any parquet files with its columns, as pairs for two buckets: images and CSVs (prompt,
task, source_image, target_image; paths relative to the CSV; `task` is the bucket, OmniEdit's own
task is in `kind`), local_edit.csv and global_edit.csv for training, *_val.csv held out. Both
pictures of a pair get the same crop. A second run keeps the images that are there. The edit configs
find what is in data/omniedit. Local files need pyarrow, the hub needs datasets (which brings it).

python data/omniedit/prepare.py --limit=2000                              from the hub, streamed
python data/omniedit/prepare.py --split=dev --out=data/omniedit_dev       700 pairs, 1.5 GB
python data/omniedit/prepare.py --source=/disk/omniedit                   parquet, a file or folder
"""
import csv, hashlib, io, math, os, re, sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import BadInput, collect, configure, need, run

source = 'TIGER-Lab/OmniEdit-Filtered-1.2M'  # or a parquet file, or a folder of them
split = 'train'      # on the hub: train (1.2 million pairs, 3 TB, read up to the limit), or dev
out = 'data/omniedit'
limit = 10_000       # pairs a bucket, shared evenly by its tasks: the files may be sorted by task
min_score = 0.0      # a pair whose o_score is lower is skipped
resolution = 768     # pixels a side: a megapixel of 16:9 has that. A pair that has less is skipped;
                     # a run at 1024 pixels enlarges what it finds
held_out = 0.02      # share of the pairs, for *_val.csv; the id decides, so none changes sides
local_tasks = ['addition', 'removal', 'swap', 'attribute_modification']  # one thing changes
global_tasks = ['style', 'env']                                          # the whole picture does
skip_tasks: list = []  # known, not wanted
settings = collect(sys.modules[__name__])

COLUMNS = ['omni_edit_id', 'task', 'src_img', 'edited_img', 'edited_prompt_list', 'o_score']
PICTURES = ['src_img', 'edited_img']
FORMATS = 'PNG', 'JPEG', 'WEBP'                                # none that starts another program
FIELDS = ['prompt', 'task', 'source_image', 'target_image', 'kind']


def examples(source, split):
    """Rows as dicts; a picture is {'bytes': ...}, not decoded yet."""
    if not Path(source).exists():
        if not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source) or source.endswith('.parquet'):
            raise BadInput(f'source {source}: no such file or folder, and no name of a data set on '
                           'the hub')
        need(find_spec('datasets'), 'to read from the hub: pip install datasets')
        import datasets
        try:
            rows = datasets.load_dataset(source, split=split, streaming=True)
            rows = rows.select_columns(COLUMNS)
        except (OSError, ValueError) as e:
            raise BadInput(f'source {source}: not a folder here, and the hub does not give it: '
                           f'{e}') from e
        for column in PICTURES:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        yield from rows
        return
    need(find_spec('pyarrow'), 'to read parquet files: pip install pyarrow')
    from pyarrow.parquet import ParquetFile
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).rglob('*.parquet'))
    need(files, f'source {source}: no parquet file in this folder')
    for file in files:
        try:
            parquet = ParquetFile(file)
            if missing := set(COLUMNS) - set(parquet.schema_arrow.names):
                raise BadInput(f'{file} lacks the columns {sorted(missing)}; it has '
                               f'{parquet.schema_arrow.names}')
            # few at once: a picture has a megabyte or more
            for batch in parquet.iter_batches(batch_size=16, columns=COLUMNS):
                yield from batch.to_pylist()
        except (OSError, ValueError) as e:                     # pyarrow's own errors are of these
            raise BadInput(f'{file} cannot be read: fetch it again. {e}') from e


def crops(row, side):
    """(source, target) as side x side pixels, or in words why the pair is of no use."""
    try:
        pair = [ImageOps.exif_transpose(Image.open(io.BytesIO(row[k]['bytes']), formats=FORMATS))
                .convert('RGB') for k in PICTURES]
    except Exception:                          # of a broken file, decoders raise whatever comes
        return 'picture missing or unreadable'
    if pair[0].size != pair[1].size:
        return 'sizes differ'
    if min(pair[0].size) < side:
        return 'smaller than the resolution'
    pair = [ImageOps.fit(p, (side, side), Image.Resampling.LANCZOS) for p in pair]
    return 'source and target are the same' if pair[0].tobytes() == pair[1].tobytes() else pair


def save(picture, path):
    part = path.with_suffix('.part')  # a file under its own name is whole: the next run trusts it
    picture.save(part, 'PNG')
    os.replace(part, path)


def saved(row, cfg, folder):
    """(prompt, [file of source, of target]) of a row, made if not there; or why it is of no use."""
    prompts = [' '.join(p.split()) for p in row['edited_prompt_list'] or [] if p]
    prompt = next(filter(None, prompts), '')
    stem = f'{folder}/{re.sub("[^A-Za-z0-9_.-]", "_", row["omni_edit_id"])}'
    files = [f'{stem}_source.png', f'{stem}_target.png']
    if not prompt:
        return 'prompt empty'
    if (row['o_score'] or 0) < cfg.min_score:
        return 'o_score too low'
    if not all((Path(cfg.out) / file).exists() for file in files):
        pair = crops(row, cfg.resolution)
        if isinstance(pair, str):
            return pair
        for picture, file in zip(pair, files):
            save(picture, Path(cfg.out) / file)
    return prompt, files


def held(name, share):
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16 ** 8 < share


def collected(cfg, bucket_of, quota, tables):
    """Fills the tables with rows; returns why others were skipped, and how many."""
    kept, skipped, seen, folder = Counter(), Counter(), set(), f'images_{cfg.resolution}'
    (Path(cfg.out) / folder).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(quota.values()), unit='pair', disable=None) as bar:
        for row in examples(cfg.source, cfg.split):
            task, name = row['task'], row['omni_edit_id']
            if task in cfg.skip_tasks or kept[task] == quota.get(task):
                continue
            need(task in quota, f'task {task!r} ({name}) is new here: put it into local_tasks, '
                 f'global_tasks or skip_tasks. Known: {", ".join(quota)}')
            found = 'id seen before' if name in seen else saved(row, cfg, folder)
            seen.add(name)
            if isinstance(found, str):
                skipped[found] += 1
                continue
            prompt, files = found
            bucket = bucket_of[task]
            table = tables[bucket + '_val' * held(name, cfg.held_out)]
            table.append([prompt, bucket, *files, task])
            kept[task] += 1
            bar.update()
            if kept == quota:
                break
    return skipped


def main(argv):
    cfg = configure(settings, argv)
    need(0 <= cfg.held_out < 1 and cfg.limit > 0 and cfg.resolution > 0,
         'held_out should be in [0, 1), limit and resolution above 0')
    buckets = {'local_edit': cfg.local_tasks, 'global_edit': cfg.global_tasks}
    buckets = {k: [t for t in tasks if t not in cfg.skip_tasks] for k, tasks in buckets.items()}
    bucket_of = {task: bucket for bucket, tasks in buckets.items() for task in tasks}
    quota = {task: math.ceil(cfg.limit / len(buckets[k])) for task, k in bucket_of.items()}
    need(quota, 'skip_tasks leaves no task')
    tables = {f'{bucket}{end}': [] for bucket in buckets for end in ('', '_val')}
    skipped = collected(cfg, bucket_of, quota, tables)
    need(any(tables.values()), f'no pair of {cfg.source} is of use; skipped: {dict(skipped)}')
    for name, table in tables.items():
        path = Path(cfg.out) / f'{name}.csv'
        with open(path, 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([FIELDS, *table])
        print(f'{path}: {len(table)} pairs', dict(Counter(kind for *_, kind in table)))
    for why, n in skipped.most_common():
        print(f'{n:8d} skipped: {why}')


if __name__ == '__main__':
    run(main)
