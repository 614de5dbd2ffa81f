"""data/omniedit/prepare.py"""
import csv
import io
import re

import pytest
from PIL import Image

from conftest import ROOT
from configurator import BadInput
from support.files import load_function, read_data


def png(colour, size=(40, 24)):
    im = Image.new('RGB', size, (colour, 0, 0))
    im.putpixel((size[0] // 2, size[1] // 2), (0, 255, 0))
    file = io.BytesIO()
    im.save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def example(i, task, **other):
    return {'omni_edit_id': f'task_{task}_{i}', 'task': task, 'src_img': png(50),
            'edited_img': png(100 + i % 100), 'o_score': 8.0,
            'edited_prompt_list': [' ', f'{task}\n it {i}', 'another way to say it'], **other}


@pytest.fixture
def parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path / 'data'
    folder.mkdir()

    def write(examples, name='a'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), folder / f'{name}.parquet')
        return folder
    return write


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def prepare(tmp_path, *words):
    main = load_function(f'{ROOT}/data/omniedit/prepare.py:main')
    main([f'--out={tmp_path / "out"}', '--resolution=16', *words])
    return {p.stem: table(p) for p in (tmp_path / 'out').glob('*.csv')}


def test_omniedit(tmp_path, parquet, capsys):
    tasks = ['addition', 'removal', 'swap', 'attribute_modification', 'style', 'env']
    parquet([example(i, task) for task in tasks[:3] for i in range(30)], 'a')
    bad = [example(900, 'env', edited_img=png(9, (24, 40))),
           example(901, 'env', edited_img=png(50)),
           example(902, 'env', edited_prompt_list=['', ' ']), example(903, 'env', o_score=1.0),
           example(0, 'style'),
           example(904, 'env', src_img=png(1, (40, 15)), edited_img=png(2, (40, 15))),
           example(905, 'env', src_img={'bytes': b'not a picture', 'path': None})]
    source = parquet([example(i, task) for task in tasks[3:] for i in range(30)] + bad, 'b')
    words = f'--source={source}', '--held_out=0.25', '--min_score=2'
    got = prepare(tmp_path, *words)
    assert {k: len(v) + len(got[k + '_val']) for k, v in got.items() if '_val' not in k} == \
        {'local_edit': 120, 'global_edit': 60}
    assert 10 < len(got['local_edit_val']) < 50
    printed = capsys.readouterr().out
    for why in ('sizes differ', 'are the same', 'prompt empty', 'o_score too low', 'id seen before',
                'smaller than', 'unreadable'):
        assert re.search(rf'\b1 skipped: .*{why}', printed), why
    row = got['global_edit'][0]
    assert row['task'] == 'global_edit' and row['kind'] in ('style', 'env')
    buckets, errors = read_data([tmp_path / 'out' / f'{k}_edit.csv' for k in ('local', 'global')])
    assert not errors
    assert {k: len(b) for k, b in buckets.items()} == {k: len(got[k]) for k in buckets}
    assert list(buckets) == ['local_edit', 'global_edit']   # which configs name in their routes
    assert re.fullmatch(r'(style|env) it \d+', row['prompt'])
    pair = [Image.open(tmp_path / 'out' / row[k]) for k in ('source_image', 'target_image')]
    assert [p.size for p in pair] == [(16, 16)] * 2 and pair[0].getpixel((0, 0)) == (50, 0, 0)
    spot = [max((p.getpixel((x, y))[1], x, y) for x in range(16) for y in range(16)) for p in pair]
    assert spot[0][1:] == spot[1][1:]                       # the same crop for both
    # a second run: what is there is kept, what is missing comes back, the tables are the same
    kept, gone = (tmp_path / 'out' / row[k] for k in ('source_image', 'target_image'))
    other = tmp_path / 'out' / got['global_edit'][1]['source_image']
    gone.unlink()
    stamp = other.stat().st_mtime_ns
    assert prepare(tmp_path, *words) == got and gone.exists() and other.stat().st_mtime_ns == stamp


def test_omniedit_limit_is_shared_by_the_tasks(tmp_path, parquet):
    tasks = 'style', 'swap', 'env', 'removal'
    source = parquet([example(i, task) for task in tasks for i in range(9)])
    got = prepare(tmp_path, f'--source={source}', '--limit=8', '--held_out=0')

    def kinds(name):
        return sorted(r['kind'] for r in got[name])
    assert kinds('local_edit') == ['removal'] * 2 + ['swap'] * 2
    assert kinds('global_edit') == ['env'] * 4 + ['style'] * 4
    assert got['local_edit_val'] == []


def test_omniedit_reads_no_further_than_the_limit(tmp_path, parquet):
    """A share that nobody wants goes to the others, and is not waited for: the hub has 3 TB."""
    rows = [example(i, task) for i in range(9) for task in ('style', 'env', 'swap')]
    source = parquet(rows + [{**example(9, 'teleport')}])              # it would stop there
    tasks = '--skip_tasks=["style", "addition", "removal", "attribute_modification"]'
    got = prepare(tmp_path, f'--source={source}', '--limit=6', '--held_out=0', tasks)
    assert [len(got[k]) for k in ('local_edit', 'global_edit')] == [6, 6]
    assert {r['kind'] for r in got['global_edit']} == {'env'}
    with pytest.raises(BadInput, match='leaves no task'):
        prepare(tmp_path, f'--source={source}', tasks, '--local_tasks=[]',
                '--global_tasks=["style"]')


def test_omniedit_bad_input(tmp_path, parquet):
    source = parquet([example(0, 'swap'), example(1, 'teleport')])
    for words, match in {(f'--source={source}',): 'teleport.*skip_tasks.*Known: addition',
                         (f'--source={tmp_path}/none',): 'no such file',
                         (f'--source={source}', '--held_out=1.0'): 'held_out',
                         (f'--source={source}', '--min_score=9.0', '--skip_tasks=["teleport"]'):
                         'no pair.*o_score'}.items():
        with pytest.raises(BadInput, match=match):
            prepare(tmp_path, *words)
    got = prepare(tmp_path, f'--source={source}', '--held_out=0.0',
                  '--global_tasks=["style", "teleport"]')
    assert len(got['global_edit']) == 1
    parquet([{k: v for k, v in example(0, 'swap').items() if k != 'o_score'}], 'a')
    with pytest.raises(BadInput, match='o_score'):
        prepare(tmp_path, f'--source={source}')
    file = source / 'a.parquet'
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match='a.parquet cannot be read: fetch it again'):
        prepare(tmp_path, f'--source={source}')
