"""config/: each passes its checks, says how its teachers are made, and a chain of them runs."""
import ast
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
import sample
import train_opd
import train_teacher
from configurator import BadInput, configure
from support import checks, rewards
from support.files import load_function

CONFIGS = sorted((ROOT / 'config').glob('*.py'))
SMALL = ('--model=data/shapes/base --resolution=24 --rank=4 --max_steps=4 --batch_size=4 '
         '--micro_batch=4 --eval_samples=4 --sample_steps=2 --lr=3e-3 --ema_decay=0.5 '
         '--device=cpu').split()


def script(path):
    return train_teacher if path.name.startswith('teacher') else train_opd


def read(path):
    return configure(script(path).SETTINGS, [str(path)])


def commands(make):
    """The words of each command of a teacher's `make`."""
    return [shlex.split(x) for x in make.split(' && ')]


@pytest.fixture
def nothing_made(monkeypatch, tmp_path):
    """A place like a fresh clone's, with an out/ and a data/ of its own."""
    (tmp_path / 'data').mkdir()
    for p in [ROOT / 'config', *(ROOT / 'data').iterdir()]:
        if p.name != 'omniedit':
            (tmp_path / p.relative_to(ROOT)).symlink_to(p)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_fine_or_says_how_its_teacher_is_made(path, nothing_made, monkeypatch):
    monkeypatch.setattr(rewards, 'check', lambda name: None)   # a file of weights may be asked for
    makes = [t.get('make') for t in getattr(read(path), 'teachers', ())]
    if any(makes):
        first = next(filter(None, makes))
        with pytest.raises(BadInput, match=r'does not exist; make it with:\n +' + re.escape(first)):
            script(path).main([str(path), '--dry_run'])
        monkeypatch.setattr(checks, 'is_hub_id', lambda p: True)       # as if they were there
    script(path).main([str(path), '--dry_run'])


def test_no_teacher_is_a_placeholder(nothing_made):
    """What is named is on the hub, shipped, or made by a command, which names its folder."""
    public = {'quanhaol/DiffusionOPD', 'jieliu/SD3.5M-FlowGRPO-Text',
              'jieliu/SD3.5M-FlowGRPO-GenEval'}
    for path in CONFIGS:
        c = read(path)
        for t in getattr(c, 'teachers', ()):
            place = t.get('lora') or t.get('checkpoint') or 'data/shapes'
            assert place.startswith(('out/', 'data/shapes')) or \
                '/'.join(place.split('/')[:2]) in public, path
            assert ('make' in t) == place.startswith('out/'), (path, t)
        if c.init_from.startswith('out/'):
            assert c.init_from in [t.get('lora') for t in c.teachers], path


@pytest.mark.parametrize('path', [p for p in CONFIGS if not p.name.startswith('teacher')],
                         ids=lambda p: p.stem)
def test_what_a_command_makes_is_what_the_config_names(path, nothing_made, monkeypatch):
    """Each command passes its checks, and ends in the teacher's folder, of its model and rank."""
    monkeypatch.setattr(rewards, 'check', lambda name: None)
    c = read(path)
    for t in [t for t in c.teachers if 'make' in t]:
        (python, name, *words), *more = commands(t['make'])
        assert (python, name) == ('python', 'train_teacher.py')
        made = configure(train_teacher.SETTINGS, words)
        train_teacher.main([*words, '--dry_run'])
        assert made.model == c.model and c.family in ('', made.family)
        if more:                                               # a LoRA is added to its base
            (words,) = more
            assert words[:3] == ['python', 'merge_lora.py', f'--adapters={made.out_dir}']
            assert words[-1] == f'--out={t["checkpoint"]}'
        else:
            assert made.out_dir == t['lora'] and made.rank <= c.rank
            assert set(made.lora_targets or []) == set(c.lora_targets or [])


def test_configs_are_short():
    for path in CONFIGS:
        lines = path.read_text().splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 100, path
        assert ast.get_docstring(ast.parse(path.read_text())) is None and lines[0][:2] == '# ', path


def test_texts_name_no_placeholders():
    texts = [*CONFIGS, ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    assert not [p for p in texts if 'your-name' in p.read_text()]


# -------------------- the chain of sd35_edit.py, on the shapes' base
def png(path):
    file = io.BytesIO()
    Image.open(path).convert('RGB').save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def as_parquet(folder):
    """The shipped pairs with OmniEdit's columns."""
    import pyarrow.parquet
    folder.mkdir()
    rows, pictures = [], ROOT / 'data' / 'examples' / 'pictures'
    for bucket, task in ('local_edit', 'swap'), ('global_edit', 'style'):
        for i in range(8):
            rows.append(dict(
                omni_edit_id=f'{task}_{i}', task=task, o_score=9.0,
                edited_prompt_list=[f'{task} {i}'], src_img=png(pictures / f'{bucket}_{i}.png'),
                edited_img=png(pictures / f'{bucket}_{i}_right.png')))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / 'a.parquet')


@pytest.mark.parametrize('pairs', ['examples', 'omniedit'])
def test_from_pairs_over_two_teachers_to_a_student_that_edits(pairs, nothing_made, capsys):
    """The commands of config/sd35_edit.py's head; only model, sizes and numbers of steps differ."""
    edit = ['config/sd35_edit.py', *SMALL]
    if pairs == 'omniedit':
        as_parquet(nothing_made / 'parquet')
        load_function(f'{ROOT}/data/omniedit/prepare.py:main')(
            ['--source=parquet', '--resolution=24', '--held_out=0.3'])
    for kind in ('local_edit', 'global_edit'):
        with pytest.raises(BadInput, match=f'out/sd35_{kind} does not exist; make it') as e:
            train_opd.main(edit)
        (python, name, *words), = commands(str(e.value).splitlines()[1].strip())
        train_teacher.main([*words, *SMALL])
    train_opd.main(edit)
    settings = json.loads(Path('out/sd35_edit/latest/meta.json').read_text())['settings']
    assert settings['data'] == [f'data/{pairs}/local_edit.csv', f'data/{pairs}/global_edit.csv']
    assert bool(settings['eval_data']) == (pairs == 'omniedit')
    result = json.loads(Path('out/sd35_edit/result.json').read_text())
    # it starts as the local teacher, whose gap is none, and is as far from the global one as that
    assert result['local_edit']['gap_before'] < 1e-5 < 1e-3 < result['global_edit']['gap_before']
    capsys.readouterr()
    sample.main(['--ckpt=out/sd35_edit', '--num=1', '--out_dir=out/pictures'])
    assert len(list(Path('out/pictures').glob('*_0.png'))) >= 2


def test_links_and_configs_that_texts_name_are_there():
    for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        text = path.read_text()
        links = re.findall(r'\]\((?!https?:)([^)#]+)\)', text)
        assert not [x for x in links if not (path.parent / x).exists()], path
        named = re.findall(r'config/\w+\.py', text)
        assert not [x for x in named if not (ROOT / x).exists()], path
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 180
