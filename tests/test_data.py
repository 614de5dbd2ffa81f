"""What comes from files: rows, pictures, models' configs; how files are written; loss curves."""
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import ROOT
from configurator import BadInput
from support import disk, files, plot
from support.files import load_function, read_data


# --------------------------------------------------------------------------------------------------
# Rows

def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def prompts(path):
    buckets, errors = read_data([path])
    assert not errors
    return [row['prompt'] for bucket in buckets.values() for row in bucket]


@pytest.mark.parametrize('name, data', [
    ('a.CSV', 'prompt\na\n"b, c"\n'), ('a.csv', 'prompt\r\na\r\n"b, c"\r\n'),
    ('a.Jsonl', '{"prompt": "a"}\n\n{"prompt": "b, c"}\n\n'), ('a.TXT', 'a\n \nb, c'),
    ('a.txt', '\ufeffa\r\nb, c\r\n'), ('a.csv', '\ufeffprompt\na\n\n"b, c"'),
    ('a.jsonl', '\ufeff{"prompt": "a", "more": {"deep": [1]}}\n{"prompt": "b, c"}')])
def test_the_same_rows_in_all_kinds_of_files(name, data, tmp_path):
    assert prompts(write(tmp_path / name, data)) == ['a', 'b, c']


@pytest.mark.parametrize('name, data, says', [
    ('a.tsv', 'prompt\ttask\na\tb\n', 'ends in .csv, .jsonl, .txt, not in .tsv'),
    ('a.json', '[{"prompt": "a"}]', 'not in .json'), ('a.parquet', b'PAR1\0', 'not in .parquet'),
    ('a', 'a red circle\n', 'not in nothing'),
    ('a.csv', 'prompt,task,prompt\na,b,c\n', "two columns are called 'prompt'"),
    ('a.csv', 'prompt,Source_Image\na,b\n', "'Source_Image' should be called 'source_image'"),
    ('a.jsonl', '{"prompt": "a", " task": "b"}\n', "' task' should be called 'task'"),
    ('a.jsonl', '{"prompt": "a", "prompt": "b"}\n', "two columns are called 'prompt'"),
    ('a.csv', 'prompt,task\na,t\n  ,t\n', 'near byte 16 .a row without a prompt'),
    ('a.jsonl', '{"prompt": " "}\n', 'near byte 0 .a row without a prompt'),
    ('a.jsonl', '{"task": "t"}\n', 'a row without a prompt'),
    ('a.csv', 'prompt,task\na red circle, on white,t2i\n', '1 fields more than columns'),
    ('a.jsonl', '{"prompt": "a"}\n[1, 2]\n', 'not a row with names'),
    ('a.jsonl', '{"prompt": 5}\n', 'prompt should be text, not 5'),
    ('a.jsonl', 99999 * '[', 'near byte 0'),
    ('a.jsonl', '{"prompt": "a\\u0000"}\n', 'prompt has a NUL byte'),
    ('a.jsonl', '{"prompt": "a\\ud800"}\n', 'surrogates'),
    ('a.csv', 'prompt\ra\rb\r', 'a carriage return alone'),
    ('a.txt', 'a\rb\r', 'a carriage return'),
    ('a.txt', 'a\nb\rc\n', 'near byte 2 .a line that goes on after a carriage return'),
    ('a.csv', 'prompt;task\na;b\n', 'no column "prompt"; it has: prompt;task'),
    ('a.csv', '', 'no column "prompt"; it has: none'),
    ('a.csv', 'prompt\n"a\n', 'near byte 7'),
    ('a.csv', 'prompt\na\n'.encode('utf-16'), 'UTF-8'),
    ('a.csv', 'prompt\na\n'.encode('utf-16-le'), 'UTF-8'), ('a.txt', b'a\0b\n', 'UTF-8'),
    ('a.csv', 'prompt\né\n'.encode('latin-1'), 'near byte 7 .this is no UTF-8'),
    ('a.csv', 'prompt,é\na,\n'.encode('latin-1'), 'this is no UTF-8 text; save it as UTF-8')])
def test_what_would_be_read_as_something_else_is_refused(name, data, says, tmp_path):
    path = write(tmp_path / name, data)
    with pytest.raises(BadInput, match=f'{name}: .*{says}') as e:
        files.open_buckets([path], [])
    assert len(str(e.value).splitlines()) == 2              # a heading, and one mistake


def test_what_cannot_be_read_is_named_and_not_waited_for(tmp_path):
    (tmp_path / 'folder.csv').mkdir()
    os.mkfifo(tmp_path / 'pipe.csv')
    (tmp_path / 'loop.csv').symlink_to('loop.csv')
    write(tmp_path / 'pipe_row.csv', 'prompt,source_image\na,pipe.csv\nb,folder.csv\nc,gone.png\n')
    names = 'folder.csv', 'pipe.csv', 'loop.csv', 'gone.csv', 'n' * 300 + '.csv', '\0.csv'
    _, errors = read_data([tmp_path / n for n in names])
    says = 'is a folder', 'is a pipe or a device', 'cannot be read', 'no such data file', \
        'cannot be read', 'cannot be read'
    assert len(errors) == len(says) and all(s in e for s, e in zip(says, errors))
    bucket, = read_data([tmp_path / 'pipe_row.csv'])[0].values()
    a, b, c = files.check_rows(bucket)
    assert 'pipe.csv is a pipe' in a and 'folder.csv is a folder' in b and 'does not exist' in c


def test_a_file_that_may_not_be_read(tmp_path):
    path, me = write(tmp_path / 'a.csv', 'prompt\na\n'), os.geteuid()
    path.chmod(0)
    tmp_path.chmod(0)
    os.seteuid(me or 65534)                                 # root may read everything
    try:
        (why,) = read_data([path])[1]
    finally:
        os.seteuid(me)
        tmp_path.chmod(0o700)
    assert 'ermission denied' in why


def test_two_hundred_thousand_rows_take_little_memory(tmp_path):
    for n in (2000, 200000):
        lines = (f'"a prompt of several words, as people write them: {i}",t\n' for i in range(n))
        (tmp_path / f'{n}.csv').write_text('prompt,task\n' + ''.join(lines))
    code = '''if True:
        import resource, sys
        from support import files
        for n in (2000, 200000):
            buckets, errors = files.read_data([f'{sys.argv[1]}/{n}.csv'])
            assert not errors and len(buckets['t']) == n
            assert buckets['t'][n - 1]['prompt'].endswith(f': {n - 1}')
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
    '''
    p = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, capture_output=True,
                       text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert p.returncode == 0, p.stderr
    few, many = map(int, p.stdout.split())
    assert many - few < 60


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    file = write(tmp_path / 'a.txt', 'a red square\na blue circle\n')
    bucket = read_data([file])[0]['a']
    assert [row['prompt'] for row in bucket] == ['a red square', 'a blue circle']
    write(file, 'a green square\na blue circle\n')          # its second row begins elsewhere now
    with pytest.raises(BadInput, match='a.txt was changed'):
        bucket[1]


# --------------------------------------------------------------------------------------------------
# Pictures

def noise(size=(40, 24), mode='RGB', seed=0):
    w, h = size
    x = np.random.default_rng(seed).integers(0, 255, (h, w, len(mode)), 'uint8')
    return Image.fromarray(x.squeeze(-1) if len(mode) == 1 else x, mode)


def pixels(picture):
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.webp', 'a.bmp', 'a.gif'])
def test_pictures_open_and_cut_ones_are_found(name, tmp_path):
    file = tmp_path / name
    noise().save(file, **dict(lossless=True) if 'webp' in name else {})
    with Image.open(file) as im:
        assert (pixels(files.open_image(file)) == pixels(im.convert('RGB'))).all()
    assert files.picture_size(file) == (40, 24)
    assert files.load_image(file, 12, 20).shape == (3, 12, 20)
    whole = file.read_bytes()
    for keep in (0, 1, 10, len(whole) // 2, len(whole) * 9 // 10):
        file.write_bytes(whole[:keep])
        for read in (files.open_image, files.picture_size):
            with pytest.raises(BadInput, match=f'{name} does not open') as e:
                read(file)
            assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['EPS', 'TIFF', 'PPM', 'ICO', 'PDF', 'TGA'])
def test_other_kinds_are_refused_by_what_they_are(kind, tmp_path):
    noise().save(tmp_path / 'a.png', kind)                  # whatever they are called
    for read in (files.open_image, files.picture_size):
        with pytest.raises(BadInput, match='a.png does not open: it is none of PNG, JPEG, WEBP'):
            read(tmp_path / 'a.png')


@pytest.mark.parametrize('size', [(48, 24), (24, 48)])
def test_of_another_shape_the_middle_is_taken(size, tmp_path):
    im, (w, h) = Image.new('RGB', size, 'red'), size
    im.paste('blue', (w // 2 - 12, h // 2 - 12, w // 2 + 12, h // 2 + 12))
    im.save(tmp_path / 'a.png')
    x = files.load_image(tmp_path / 'a.png', 24, 24)
    assert (x == torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1)).all()


def test_pairs_are_drawn_of_a_bucket_that_begins_with_words(world, tmp_path):
    rows = [dict(prompt='a red circle', source_image='', target_image=''),
            *read_data([world.at / 'edits.csv'])[0]['edits']]
    (tmp_path / 'x').mkdir()
    bucket = type('Mixed', (list,), dict(sources=len(rows) - 1))(rows)
    files.draw_pairs({'mixed': bucket}, tmp_path / 'x')
    with Image.open(tmp_path / 'x' / 'data_mixed.png') as im:
        assert im.height > 100
    noise((1500, 3000)).save(tmp_path / 'large.png')           # photographs are drawn smaller
    large = dict.fromkeys(('source_image', 'target_image'), str(tmp_path / 'large.png'))
    bucket = type('Mixed', (list,), dict(sources=1))([dict(prompt='x', **large)])
    files.draw_pairs({'large': bucket}, tmp_path / 'x')
    with Image.open(tmp_path / 'x' / 'data_large.png') as im:
        assert 512 < im.height < 700 and 512 < im.width < 700


def test_a_bomb_is_not_decoded(tmp_path):
    noise((10, 10), 'L').save(tmp_path / 'a.bmp')
    small = (tmp_path / 'a.bmp').read_bytes()
    for w, h in ((10001, 10000), (14000, 14000), (60000, 60000)):       # Pillow warns, or raises
        size = w.to_bytes(4, 'little') + h.to_bytes(4, 'little')
        write(tmp_path / 'a.bmp', small[:18] + size + small[26:])
        for read in (files.open_image, files.picture_size):
            with pytest.raises(BadInput, match='a.bmp is above 100 megapixels: make it smaller'):
                read(tmp_path / 'a.bmp')


@pytest.mark.parametrize('turn', range(1, 9))
def test_photographs_stand_upright(turn, tmp_path):
    exif, im = Image.Exif(), Image.new('RGB', (48, 32), 'black')
    exif[0x0112] = turn
    im.paste('red', (0, 0, 16, 16))
    im.paste('blue', (32, 16, 48, 32))
    for name in ('a.png', 'a.jpg', 'a.webp'):
        im.save(tmp_path / name, exif=exif, quality=95)
        got = files.open_image(tmp_path / name)
        right = pixels(ImageOps.exif_transpose(Image.open(tmp_path / name)).convert('RGB'))
        assert (pixels(got) == right).all() and got.size == files.picture_size(tmp_path / name)
        assert got.size == ((48, 32) if turn < 5 else (32, 48))
    x, y = [(0, 0), (-1, 0), (-1, -1), (0, -1)][(turn - 1) % 4]         # the first pixel's place
    red = got.getpixel((x % got.width, y % got.height))
    assert red[0] > 200 and red[2] < 60


def test_shapes_of_pairs_are_compared_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((40, 24)).save(tmp_path / 'lying.jpg', exif=exif)
    noise((24, 40)).save(tmp_path / 'standing.png')
    noise((40, 24)).save(tmp_path / 'wide.png')
    path = write(tmp_path / 'a.csv', 'prompt,source_image,target_image\n'
                 'a,lying.jpg,standing.png\nb,lying.jpg,wide.png\n')
    errors = files.check_rows(read_data([path])[0]['a'], need_target=True)
    assert len(errors) == 1 and 'source 24 x 40 and target 40 x 24 differ in shape' in errors[0]


def test_what_is_transparent_lies_on_white(tmp_path):
    def corner(picture, **options):
        picture.save(tmp_path / 'a.png', **options)
        return files.open_image(tmp_path / 'a.png').getpixel((0, 0))
    assert corner(Image.new('RGBA', (8, 8), (255, 0, 0, 0))) == (255, 255, 255)
    assert corner(Image.new('RGBA', (8, 8), (0, 0, 0, 51))) == (204, 204, 204)
    assert corner(Image.new('LA', (8, 8), (0, 0))) == (255, 255, 255)
    assert corner(Image.new('L', (8, 8), 7), transparency=7) == (255, 255, 255)
    assert corner(Image.new('RGB', (8, 8), (1, 2, 3)), transparency=(1, 2, 3)) == (255, 255, 255)
    palette = Image.new('P', (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert corner(palette) == (9, 9, 9)
    assert corner(palette, transparency=1) == (255, 255, 255)
    assert corner(Image.new('RGB', (8, 8), (1, 2, 3))) == (1, 2, 3)
    deep = Image.fromarray(np.full((8, 8), 0x4000, 'uint16'))
    assert corner(deep) == (64, 64, 64)                     # grey in 16 bits, not cut off at 255


def test_pictures_are_checked_as_fast_as_promised(tmp_path):
    """A fifth of what two free cores do: the machine may be busy."""
    for i in range(8):
        noise((64, 64), seed=i).resize((512, 512)).save(tmp_path / f'{i}.jpg', quality=92)
    lines = ''.join(f'a,{i % 8}.jpg\n' for i in range(200))
    bucket = read_data([write(tmp_path / 'a.csv', 'prompt,source_image\n' + lines)])[0]['a']
    start = time.time()
    assert files.check_rows(bucket) == [] and time.time() - start < 200 / 100


def test_processes_of_a_machine_share_the_check(tmp_path, monkeypatch):
    lines = ''.join(f'a,gone{i}.png\n' for i in range(7))
    bucket = read_data([write(tmp_path / 'a.csv', 'prompt,source_image\n' + lines)])[0]['a']
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    found = []
    for rank in '012':
        monkeypatch.setenv('LOCAL_RANK', rank)
        found.append([int(re.search(r'gone(\d)', e)[1]) for e in files.check_rows(bucket)])
    assert found == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_picture_that_is_cut_off_is_found_before_the_run(tmp_path):
    noise((40, 40)).save(tmp_path / 'a.png')
    path = write(tmp_path / 'a.csv', 'prompt,source_image\nmake it red,a.png\n')
    files.open_buckets([path], [])
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-2000])
    with pytest.raises(BadInput, match='a: source_image .*a.png does not open'):
        files.open_buckets([path], [])


def test_a_grid_leaves_out_columns_without_pictures(tmp_path):
    x = torch.rand(4, 3, 24, 24)
    files.grid([[None, x[0], None, x[1]], [None, x[2], None, x[3]]], tmp_path / 'a.png',
               ['one', 'two'], ['source', 'teacher', 'start', 'now'])
    files.grid([[x[0], x[1]], [x[2], x[3]]], tmp_path / 'b.png', ['one', 'two'], ['teacher', 'now'])
    files.grid([[x[0], x[1], None], [x[2], None, x[3]]], tmp_path / 'c.png', ['one', 'two'])
    a, b, c = (np.asarray(Image.open(tmp_path / f'{k}.png')) for k in 'abc')
    assert (a == b).all() and a.shape[1] == 420
    files.grid([[x[0], None, x[1]]], tmp_path / 'd.png', heads=['left', '', 'right'])
    assert Image.open(tmp_path / 'd.png').width == 3 * 124 + 4         # a gap that was asked for

    def big(k):
        return (x[k].permute(1, 2, 0) * 255).round().byte().numpy().repeat(5, 0).repeat(5, 1)
    assert (b[20:140, 4:124] == big(0)).all() and (b[20:140, 128:248] == big(1)).all()
    assert (c[4:124, 128:248] == big(1)).all() and (c[146:266, 252:372] == big(3)).all()


def test_captions_of_any_length_and_shape(tmp_path):
    x, start = torch.rand(3, 24, 24), time.time()
    texts = ('two\nlines\r\nand more', 'x' * 80000, 'ein Männchen, 一只猫\t\x07',
             'two lines and more')
    files.grid([[x]] * 4, tmp_path / 'a.png', texts)
    a = np.asarray(Image.open(tmp_path / 'a.png'))
    assert time.time() - start < 2 and a.shape == (4 * 142 + 4, 420, 3)
    words = [a[i * 142 + 126:i * 142 + 140] for i in range(4)]
    assert (words[0] == words[3]).all() and not (words[0] == words[1]).all()


# --------------------------------------------------------------------------------------------------
# Curves

def drawn(tmp_path, history, keys):
    plot.curve(history, tmp_path / 'loss.png', keys)
    return np.asarray(Image.open(tmp_path / 'loss.png')).astype(int)


def test_a_curve_goes_where_its_numbers_go(tmp_path):
    """On a log scale powers of ten lie on a straight line, from the upper left downwards."""
    history = [dict(step=i, a=10 ** (2 - i / 25)) for i in range(101)]
    blue = (drawn(tmp_path, history, ['a']) - np.array([0, 0x72, 0xb2])).__abs__().sum(-1) < 60
    ys, xs = np.nonzero(blue[:, 60:700])
    fit = np.polyfit(xs, ys, 1)
    assert fit[0] > 0.3 and np.abs(np.polyval(fit, xs) - ys).max() < 4
    straight = drawn(tmp_path, [dict(step=i, a=1 + i / 100) for i in range(101)], ['a'])
    assert straight.shape == (420, 900, 3)


def test_a_start_of_nothing_does_not_flatten_the_rest(tmp_path):
    """As a gap has it that begins as its teacher: no more than four decades are drawn."""
    none, little, much = ([dict(step=0, a=x), dict(step=1, a=0.5), dict(step=2, a=0.05)]
                          for x in (0.0, 2e-7, 2e-2))
    assert (drawn(tmp_path, none, ['a']) == drawn(tmp_path, little, ['a'])).all()
    assert not (drawn(tmp_path, none, ['a']) == drawn(tmp_path, much, ['a'])).all()


def test_the_numbers_at_the_axes_are_round():
    assert plot.ticks(0.003, 3.2, log=True) == pytest.approx([.003, .01, .03, .1, .3, 1, 3])
    assert plot.ticks(0.02, 0.9, log=True) == pytest.approx([.02, .05, .1, .2, .5])
    assert plot.ticks(17.1, 23.9) == pytest.approx([18, 20, 22])
    assert plot.ticks(0, 3, least=1) == [0, 1, 2, 3]
    for low, high in ((1e-9, 1e9), (1e-300, 1), (-3, 1e6), (0.5, 0.50001)):
        assert 2 <= len(plot.ticks(low, high, log=low > 0)) <= 8


def test_labels_do_not_lie_on_each_other():
    got = plot.apart([50, 51, 10, 99], 10, 100)
    assert got == [50, 60, 10, 99]
    got = plot.apart([99, 98, 97], 10, 100)
    assert got == [100, 90, 80]


def test_a_curve_of_odd_numbers(tmp_path):
    nothing = [dict(step=0), dict(step=1, a=None, b='x', c=float('nan'), d=True)]
    plot.curve(nothing, tmp_path / 'loss.png', 'abcd')
    plot.curve([], tmp_path / 'loss.png', 'a')
    assert not (tmp_path / 'loss.png').exists()
    for values in ([0.0], [5, 5], [0, -3], [1e-30, 1e29], [float('inf'), 1.0], [-1e29, 1e29]):
        drawn(tmp_path, [dict(step=i, a=v) for i, v in enumerate(values)], ['a', 'gone'])


# --------------------------------------------------------------------------------------------------
# The disk, models' configs

def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / 'new' / 'a.json'
    disk.write_text(file, 'öne')
    assert file.read_text(encoding='utf-8') == 'öne' and len(list(file.parent.iterdir())) == 1

    def half(part):
        part.write_text('ha')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        disk.replace(file, half)
    assert file.read_text(encoding='utf-8') == 'öne' and len(list(file.parent.iterdir())) == 1
    (tmp_path / 'link').symlink_to(file)
    disk.write_text(tmp_path / 'link', 'two')
    assert (tmp_path / 'link').is_symlink() and file.read_text() == 'two'


def test_a_disk_that_refuses_is_a_sentence(tmp_path):
    write(tmp_path / 'file', '')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file' / 'a', tmp_path / 'folder', tmp_path / ('n' * 300)):
        with pytest.raises(BadInput, match=re.escape(f'{path} cannot be written: ')):
            disk.write_text(path, 'text')
    with pytest.raises(BadInput, match='a cannot be written: No space left'):
        with disk.writing('a'), open('/dev/full', 'w') as f:
            f.write('text')
    # a limit on the size of files is as near to a full disk as a test comes
    code = f'''if True:
        import resource, torch
        from safetensors.torch import save_file
        from configurator import BadInput
        from support import disk, files
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        x = torch.zeros(9999)
        for write in (lambda p: p.write_text('x' * 9999), lambda p: save_file(dict(x=x), p),
                      lambda p: torch.save(x, p)):
            try:
                disk.replace({str(tmp_path / 'big')!r}, write)
            except BadInput as e:
                print(e)
    '''
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert p.stdout.count('big cannot be written: ') == 3, p.stderr
    assert p.stdout.count('too large') == 2 and 'is the disk full?' in p.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder']


@pytest.mark.parametrize('index, says', [
    ('[1]', 'it holds no names'), ('{"a": 1}', '_class_name should name'), ('{', 'is damaged'),
    ('{"_class_name": ["A", "B"]}', '_class_name'), ('{"_class_name": ""}', '_class_name'),
    (b'\xff\xfe{', 'is damaged'), (99999 * '[', 'is damaged'), (None, 'no diffusers folder')])
def test_a_model_index_of_odd_shapes(index, says, tmp_path):
    (tmp_path / 'vae').mkdir()
    write(tmp_path / 'vae' / 'config.json', '{"a": 1}')
    if index is not None:
        write(tmp_path / 'model_index.json', index)
    with pytest.raises(BadInput, match=says):
        files.model_configs(str(tmp_path))
    write(tmp_path / 'model_index.json', '{"_class_name": "P"}')
    assert files.model_configs(str(tmp_path)) == dict(vae={'a': 1}, index={'_class_name': 'P'})
    assert files.model_configs('owner/not-here') == {} and files.is_hub_id('x' * 5000)


def test_a_bucket_of_two_files_reads_each_row_from_its_own(tmp_path):
    a = write(tmp_path / 'a.csv', 'prompt,task\none,t\nother,u\ntwo,t\n')
    b = write(tmp_path / 'b.jsonl', '{"prompt": "three", "task": "t"}\n'
                                    '{"prompt": "four", "task": "t"}\n')
    buckets, errors = read_data([a, b])
    assert not errors and [x['prompt'] for x in buckets['u']] == ['other']
    assert [x['prompt'] for x in buckets['t']] == ['one', 'two', 'three', 'four']


def test_pictures_of_a_batch_have_its_height_and_width(tmp_path):
    noise((48, 24)).save(tmp_path / 'a.png')                   # 48 wide
    batch = [SimpleNamespace(row=dict(target_image=str(tmp_path / 'a.png')), size=(24, 48))]
    assert files.load_images(batch, 'target_image').shape == (1, 3, 24, 48)
