"""
OmniEdit, or any parquet files with its columns, as pairs for two buckets: images and CSVs (prompt, task,
source_image, target_image; paths relative to the CSV; `task` is the bucket, OmniEdit's own task is in
`kind`), local_edit.csv and global_edit.csv for training, *_val.csv held out. Both pictures of a pair get the
same crop. A second run keeps the images that are there. Local files need pyarrow, the hub needs datasets
(which brings pyarrow).

python data/omniedit/prepare.py --source=/disk/omniedit --limit=5000      a parquet file, or a folder of them
python data/omniedit/prepare.py --split=dev --out=data/omniedit_dev       from the hub: 700 pairs, 1.5 GB
"""
import csv, hashlib, io, math, os, re, sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import BadInput, collect, configure, run

source = 'TIGER-Lab/OmniEdit-Filtered-1.2M'  # a parquet file, a folder of them, or a data set on the hub
split = 'train'      # on the hub: train (1.2 million pairs, 3 TB, streamed until the limit is reached) or dev
out = 'data/omniedit'
limit = 10_000       # pairs a bucket, shared evenly by its tasks: the files may be sorted by task
min_score = 0.0      # a pair whose o_score is lower is skipped
resolution = 512     # pixels a side; a pair that would have to be enlarged is skipped
held_out = 0.02      # share of the pairs that goes to *_val.csv; the id decides, so none changes sides
local_tasks = ['addition', 'removal', 'swap', 'attribute_modification']  # one thing changes, the rest stays
global_tasks = ['style', 'env']                                          # the whole picture changes
skip_tasks: list = []  # known, not wanted
settings = collect(sys.modules[__name__])

COLUMNS = ['omni_edit_id', 'task', 'src_img', 'edited_img', 'edited_prompt_list', 'o_score']
PICTURES = ['src_img', 'edited_img']
FIELDS = ['prompt', 'task', 'source_image', 'target_image', 'kind']


def examples(source, split):
    """Rows as dicts; a picture is {'bytes': ...}, not decoded yet."""
    if not Path(source).exists():
        if not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source) or source.endswith('.parquet'):
            raise BadInput(f'source {source}: no such file or folder, and no name of a data set on the hub')
        try:
            import datasets
        except ImportError:
            raise BadInput('to read from the hub: pip install datasets')
        try:
            rows = datasets.load_dataset(source, split=split, streaming=True).select_columns(COLUMNS)
        except (OSError, ValueError) as e:
            raise BadInput(f'source {source}: not a folder here, and the hub does not give it: {e}') from e
        for column in PICTURES:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        yield from rows
        return
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput('to read parquet files: pip install pyarrow')
    files = [Path(source)] if Path(source).is_file() else sorted(Path(source).rglob('*.parquet'))
    if not files:
        raise BadInput(f'source {source}: no parquet file in this folder')
    for file in files:
        try:
            parquet = ParquetFile(file)
            if missing := set(COLUMNS) - set(parquet.schema_arrow.names):
                raise BadInput(f'{file} lacks the columns {sorted(missing)}; it has '
                               f'{parquet.schema_arrow.names}')
            for batch in parquet.iter_batches(batch_size=16, columns=COLUMNS):  # a picture is 1 MB or more
                yield from batch.to_pylist()
        except (OSError, ValueError) as e:                     # pyarrow's own errors are of these
            raise BadInput(f'{file} cannot be read: fetch it again. {e}') from e


def crops(row, side):
    """(source, target) as side x side pixels, or in words why the pair is of no use."""
    try:
        pair = [Image.open(io.BytesIO(row[k]['bytes'])).convert('RGB') for k in PICTURES]
    except (OSError, TypeError):
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


def main(argv):
    cfg = configure(settings, argv)
    if not (0 <= cfg.held_out < 1 and cfg.limit > 0 and cfg.resolution > 0):
        raise BadInput('held_out should be in [0, 1), limit and resolution above 0')
    buckets = {'local_edit': cfg.local_tasks, 'global_edit': cfg.global_tasks}
    buckets = {bucket: [t for t in tasks if t not in cfg.skip_tasks] for bucket, tasks in buckets.items()}
    bucket_of = {task: bucket for bucket, tasks in buckets.items() for task in tasks}
    quota = {task: math.ceil(cfg.limit / len(buckets[bucket])) for task, bucket in bucket_of.items()}
    if not quota:
        raise BadInput('skip_tasks leaves no task')
    images = Path(cfg.out) / f'images_{cfg.resolution}'
    images.mkdir(parents=True, exist_ok=True)
    tables = {f'{bucket}{end}': [] for bucket in buckets for end in ('', '_val')}
    kept, skipped, seen = Counter(), Counter(), set()

    def use(row):
        """Saves a row's pair and notes it in its table; returns why not, if not."""
        task, name = row['task'], row['omni_edit_id']
        prompt = next((' '.join(p.split()) for p in row['edited_prompt_list'] or [] if p and p.strip()), '')
        stem = f'{images.name}/{re.sub("[^A-Za-z0-9_.-]", "_", name)}'
        files = [f'{stem}_source.png', f'{stem}_target.png']
        if name in seen:
            return 'id seen before'
        seen.add(name)
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
        val = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16 ** 8 < cfg.held_out
        tables[bucket_of[task] + '_val' * val].append([prompt, bucket_of[task], *files, task])

    with tqdm(total=sum(quota.values()), unit='pair') as bar:
        for row in examples(cfg.source, cfg.split):
            task = row['task']
            if task in cfg.skip_tasks or kept[task] == quota.get(task):
                continue
            if task not in quota:
                raise BadInput(f'task {task!r} ({row["omni_edit_id"]}) is new here: put it into local_tasks, '
                               f'global_tasks or skip_tasks. Known: {", ".join(quota)}')
            if why := use(row):
                skipped[why] += 1
                continue
            kept[task] += 1
            bar.update()
            if kept == quota:
                break
    if not kept.total():
        raise BadInput(f'no pair of {cfg.source} is of use; skipped: {dict(skipped)}')
    for name, table in tables.items():
        with open(Path(cfg.out) / f'{name}.csv', 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([FIELDS, *table])
        print(f'{Path(cfg.out) / name}.csv: {len(table)} pairs', dict(Counter(kind for *_, kind in table)))
    for why, n in skipped.most_common():
        print(f'{n:8d} skipped: {why}')


if __name__ == '__main__':
    run(main)
