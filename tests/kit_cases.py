"""
The table of tests/kit.py: settings, teachers and routes, data, pictures. kit_folders.py has models,
adapters and run folders, kit_scripts.py scores, rewards and the other scripts. A class of
mistakes is a function; a case that should be refused says what the sentence has to name.
"""
import csv, io, os, struct, zlib

import torch
from PIL import Image

import kit_folders
import kit_scripts
import merge_lora
import train_opd
from kit import Case, ROOT

BASE = str(ROOT / 'data' / 'shapes' / 'base')
LAYERS = [f'transformer_blocks.3.attn.{k}' for k in ('to_q', 'to_v', 'to_out.0')] + ['proj_out']
TINY = dict(
    model=BASE, device='cpu', family='', eval_data=[], rank=2, alpha=2.0, lora_targets=LAYERS,
    batch_size=2, micro_batch=2, steps=2, max_steps=2, score='', eval_samples=1, show=1,
    sample_steps=1, warmup=1, log_every=1, save_every=1, ckpt_keep=9, eval_every=1000, cache_gb=1.0,
    out_dir='{at}/out')


class World:
    """What all cases share: two adapters, words, edits, and a whole run."""

    def __init__(self, at, play):
        self.at = at
        (at / '.tmp').mkdir(parents=True)
        Image.new('RGB', (24, 24), 'red').save(at / 'red.png')
        Image.new('RGB', (24, 24), 'blue').save(at / 'blue.png')
        (at / 'words.csv').write_text('prompt\na red circle\na blue square\n')
        (at / 'edits.csv').write_text('prompt,source_image,target_image\n'
                                      'make it blue,red.png,blue.png\n')
        (at / 'judge.py').write_text('def fine(images, rows):\n    return [0.5] * len(rows)\n')
        for i, name in enumerate(('one', 'two')):
            self.lora(at / name, i)
        self.opd_settings = dict(
            TINY, init_from='base', data=[f'{at}/words.csv'],
            teachers=[dict(name='one', lora=f'{at}/one'), dict(name='two', lora=f'{at}/two')],
            routes=[dict(teacher='one', data='words')])
        self.teach_settings = {k: v for k, v in TINY.items()} | dict(
            init_from='base', data=[f'{at}/words.csv'], method='grpo', group_size=2, drop_last=0,
            timestep_fraction=1.0, reward=[dict(reward=f'{at}/judge.py:fine')])
        made = Case('world', '', self.opd(out_dir=str(at / 'run')))
        found, said = play(made, at / '.made')
        assert (at / 'run' / 'latest').exists(), (found, said)

    def lora(self, folder, seed, size=0.3, rank=2, layers=LAYERS):
        g, shapes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(BASE)
        factors = {k: (torch.randn(rank, shapes[k][1], generator=g) / shapes[k][1] ** 0.5,
                       size * torch.randn(shapes[k][0], rank, generator=g) / rank, 1.0)
                   for k in layers}
        merge_lora.write_adapter(folder, factors)
        return str(folder)

    def words(self, settings, more):
        settings = dict(settings, **more)
        return [f'--{k}={v if isinstance(v, Raw) else repr(v)}' for k, v in settings.items()
                if v is not None]

    def opd(self, **more):
        return self.words(self.opd_settings, more)

    def dry(self, **more):
        return [*self.opd(**more), '--dry_run']

    def teach(self, **more):
        return self.words(self.teach_settings, more)

    def sft(self, **more):
        rollout = 'group_size', 'drop_last', 'timestep_fraction', 'reward', 'steps'
        plain = {k: v for k, v in self.teach_settings.items() if k not in rollout}
        return self.words(plain, dict(dict(method='sft', data=[f'{self.at}/edits.csv']), **more))


class Raw(str):
    """A value as it stands on the command line."""


# --------------------------------------------------------------------------------------------------
# Settings

NUMBERS = 'x', 'None', '-1', 'nan', '1e999', '10**30', '1e30'

TOGETHER = [
    ('betas=[1,0.9]', 'betas'), ('betas=[0.9]', 'betas'), ("betas=['a','b']", 'betas'),
    ('ema_decay=1.0', 'ema_decay'), ('batch_size=3', None), ('drop_last=5', 'drop_last'),
    ('queries=5', 'queries'), ('eta=0.5', None), ('sde=cps --eta=1.5', 'eta'),
    ('anchor=base', 'anchor'), ('anchor_beta=0.1', 'anchor'), ('anchor=who', 'anchor'),
    ('lora_targets=[1]', 'lora_targets'),
    ('lora_targets=to_q', 'lora_targets'), ('lora_targets=[""]', 'lora_targets'),
    ('resolution=25', '24'), ('resolution=[24]', 'resolution'), ('resolution=0', 'resolution'),
    ('resolution=[24,-24]', '-24'), ('resolution=1000000', '1000000'),
    ('resolution=[24.0,24]', 'resolution'), ('device=gpu', 'gpu'), ('device=cuda', 'cuda'),
    ('device=cuda:7', 'cuda'), ('device=meta', 'meta'), ('device=cpu:x', 'cpu:x'),
    ('device=vulkan', 'vulkan'), ('dtype=float16', 'dtype'), ('dtype=int', 'dtype'),
    ('base_storage=int8', 'base_storage'), ('tensorboard_log', 'tensorboard'),
    ('wandb_log', 'wandb'), ('mixing=none', 'mixing'), ('routes_per_step=3', 'routes_per_step'),
    ('routes_per_step=some', 'routes_per_step'), ('stepps=3', 'steps'), ('=3', 'setting'),
    ('lr', 'lr'), ('lr=', 'lr'), ('lr=1e-', 'lr'), ('updates=2', 'updates'),
    ('reward=paper', 'reward'), ('method=flowopd', 'eta|group'), ('kl_var=code', 'kl_var'),
    ('family=FluxPipeline', None), ('family=Nope', 'Nope'), ('family=nope.py:X', 'nope.py'),
    ('init_from=', 'init_from'), ('init_from=mrege', 'mrege'), ('init_from=./gone', './gone'),
    ('init_from={at}', '{at}'), ('init_from=your-name/your-lora', 'your-name'),
    ('model=<your model>', '<your model>'), ('model=path/to/model', 'path/to/model'),
    ('model=', 'model'), ('model=./gone', './gone'), ('max_steps=0', 'max_steps'),
    ('cache_gb=0', None), ('rank=100000', 'rank'), ('lr=1e10', 'lr'),
    ('weight_decay=1e10', 'weight_decay'), ('max_sequence_length=100000', None),
    ('distilled_guidance=-3', 'distilled_guidance'), ('rollout_guidance=0', 'rollout_guidance'),
    ('student_guidance=0', 'student_guidance'), ('query_in=noise', 'query_in')]
CONFIGS = [                             # texts of config files
    ('lr = 1\n', None), ('lr = "x"\n', 'lr'), ('learning = 1\n', 'learning'), ('\0', 'null'),
    ('1/0\n', 'ZeroDivision'), ('import sys\nsys.exit(3)\n', 'line 2'), ('lr = (\n', 'line'),
    ('import nothing_such\n', 'nothing_such'), ('lr = float("inf")\n', 'lr'),
    ('def lr(): pass\n', 'lr'), ('exit()\n', 'line 1'), ('raise KeyboardInterrupt\n', None),
    ('\xff'.encode('latin-1'), 'line')]


def settings(w):
    defaults, kinds, *_ = train_opd.SETTINGS
    for k, v in defaults.items():
        if type(v) in (int, float):
            for text in NUMBERS:
                want = None if (k, text) == ('seed', '-1') else k
                yield Case(f'setting {k}={text}', want, w.dry(**{k: Raw(text)}))
        elif type(v) is bool:
            for text in ('maybe',):
                yield Case(f'setting {k}={text}', k, w.dry(**{k: Raw(text)}))
        elif type(v) is list:
            for text in ('5', 'x', '[5]', '[None]', '[{}]'):
                yield Case(f'setting {k}={text}', k.rstrip('s'), w.dry(**{k: Raw(text)}))
        elif k not in ('wandb_project', 'dtype'):
            for text in ('nonsense here', '5', '"a\\0b"'):
                fine = k == 'out_dir' and '0' not in text
                yield Case(f'setting {k}={text}', None if fine else k, w.dry(**{k: Raw(text)}))
    for text, want in TOGETHER:
        words = [f'--{part}' for part in text.split(' --')]
        yield Case(f'setting {text}', want.replace('{at}', 'adapter|safetensors') if want else want,
                   [*w.dry(), *words])
    yield Case('setting - fine', '', w.dry())
    yield Case('setting - fine, a run', '', w.opd())
    for text, want in CONFIGS:
        yield Case(f'config {text!r}', want, [*w.dry(), '{at}/c.py'],
                   make=lambda at, t=text: put(at / 'c.py', t), codes=(2, 130))
    yield Case('config - a folder', 'file', [*w.dry(), '{at}'])
    yield Case('config - no such', 'gone.py', [*w.dry(), 'gone.py'])
    yield Case('config - one dash', 'lr', [*w.dry(), '-lr=1'])


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


# --------------------------------------------------------------------------------------------------
# Teachers and routes

def teachers(w):
    one, route = dict(name='one', lora=f'{w.at}/one'), dict(teacher='one', data='words')
    bad = [
        ([], 'teacher|one'), ([5], '5'), (['one'], 'one'), ([{}], 'name'), ([[]], r'\[\]'),
        ([dict(one, name='student')], 'student'), ([dict(one, name='a b')], 'a b'),
        ([dict(one, name=5)], '5'), ([dict(one, name='')], "''"), ([dict(one, name=['x'])], 'x'),
        ([one, one], 'one'), ([dict(one, lora=5)], '5'), ([dict(one, lora=['x'])], 'x'),
        ([dict(one, lora='./gone')], 'gone'),
        ([dict(one, lora='your-name/your-lora')], 'your-name'),
        ([dict(one, lora='<path>')], '<path>'), ([dict(one, lora='gone')], 'gone'),
        ([dict(one, lora=f'{w.at}/words.csv')], 'words.csv'), ([dict(one, lora='x' * 400)], 'xxx'),
        ([dict(one, checkpoint=BASE)], 'both'), ([dict(name='one', checkpoint='./gone')], 'gone'),
        ([dict(name='one', checkpoint=f'{w.at}/words.csv')], 'words.csv'),
        ([dict(name='one', checkpoint=f'{w.at}/one')], 'one'),
        ([dict(name='one', checkpoint=5)], '5'), ([dict(one, guidance=0)], 'guidance'),
        ([dict(one, guidance='x')], 'guidance'), ([dict(one, guidance=float('inf'))], 'teachers'),
        ([dict(one, weight=-1)], 'weight'), ([dict(one, weight='x')], 'weight'),
        ([dict(one, wieght=1)], 'wieght'), ([dict(one, lora='a\0b')], 'lora|teachers'),
        ([dict(one, lora='')], None), ([dict(name='base', lora=f'{w.at}/one')], 'base'),
        ([dict(one, lora='./gone', make='python make_it.py')], 'python make_it.py'),
        ([dict(one, make=5)], 'make')]
    for value, want in bad:
        yield Case(f'teachers={str(value)[:90]}', want, w.dry(teachers=value))
    for name in ('forward', 'weight', 'base_layer', 'lora_A', '__class__', 'None', 'items', 'keys'):
        more = dict(teachers=[dict(one, name=name)], routes=[dict(route, teacher=name)])
        yield Case(f'teacher called {name}', None, w.opd(max_steps=1, **more), late=True)
    bad = [
        ([], 'routes'), ([5], '5'), ([{}], 'route'), ([dict(route, teacher='who')], 'who'),
        ([dict(route, data='gone')], 'gone'), ([dict(route, data=5)], '5'),
        ([dict(teacher='one')], 'None|data'), ([dict(data='words')], 'None|teacher'),
        ([route, route], 'words'), ([dict(route, weight=0)], 'weight'),
        ([dict(route, weight=float('inf'))], 'routes|weight'),
        ([dict(route, samples=0)], 'samples'),
        ([dict(route, samples=-2)], 'samples'), ([dict(route, samples='x')], 'samples'),
        ([dict(route, samples=3)], 'batch_size'), ([dict(route, resolution=25)], '25'),
        ([dict(route, resolution='x')], 'resolution'), ([dict(route, resolution=[])], 'resolution'),
        ([dict(route, data=['words'])], 'words'), ([dict(route, teacher=['one'])], 'one'),
        ([dict(route, teacher={})], r'teacher'), ([dict(route, data={})], 'data'),
        ([dict(route, what=1)], 'what')]
    for value, want in bad:
        yield Case(f'routes={value}', want, w.dry(routes=value))
    yield Case('init_from=merge of no lora', 'merge', w.dry(
        init_from='merge', teachers=[dict(name='base')], routes=[dict(route, teacher='base')]))
    yield Case('hub ids in a dry run', '', w.dry(model='owner/base', lora_targets=None,
               teachers=[dict(name='one', lora='owner/lora')]))
    yield Case('hub model that is not here', 'owner/base', w.opd(model='owner/base'))
    yield Case('hub adapter that is not here', 'owner/lora', w.opd(
        teachers=[dict(one, lora='owner/lora')]))
    yield Case('reward of a hub model, dry', '', [
        *w.teach(reward=[dict(reward='clip')]), '--dry_run'], 'train_teacher')


# --------------------------------------------------------------------------------------------------
# Data

HEAD = 'prompt,source_image,target_image\n'


def data(w):
    fine = 'prompt\na red circle\n'
    many = [
        ('d.csv', fine, ''), ('d.CSV', fine, ''), ('d.tsv', fine, 'tsv'), ('d.json', '[]', 'json'),
        ('d', fine, 'ends'), ('d.xlsx', fine, 'xlsx'), ('d.csv', '', 'prompt'),
        ('d.csv', 'prompt\n', 'd'), ('d.csv', 'a,b\n1,2\n', 'prompt'), ('d.txt', '', 'd'),
        ('d.txt', '\n\n \n', 'd'), ('d.txt', 'a red circle\n', ''), ('d.jsonl', '', 'd'),
        ('d.csv', 'Prompt\nx\n', 'prompt'), ('d.csv', 'prompt ,a\nx,y\n', 'prompt'),
        ('d.csv', 'prompt,prompt\nx,y\n', 'prompt'), ('d.csv', 'prompt\n" "\n', 'prompt'),
        ('d.csv', 'prompt,task\na, b,c\n', 'fields'), ('d.csv', 'prompt\n"never ends\n', 'd.csv'),
        ('d.csv', 'prompt\rred\rblue\r', 'carriage'), ('d.csv', fine.encode('utf-16'), 'UTF'),
        ('d.csv', b'\xef\xbb\xbf' + fine.encode(), ''), ('d.csv', b'prompt\n\xff\xfe\n', 'UTF'),
        ('d.csv', 'prompt\na\0b\n', 'd.csv'), ('d.csv', 'prompt\r\nred\r\n', ''),
        ('d.csv', 'prompt\n' + 'x' * 80000 + '\n', None), ('d.csv', 'prompt\n"a\nb"\n', ''),
        ('d.csv', 'prompt\n' + 'x' * 200000 + '\n', None),
        ('d.csv', 'prompt;task\nx;y\n', 'prompt'),
        ('d.csv', 'prompt,source_image\nx,\n', ''), ('d.csv', 'prompt,source_imag\nx,gone\n', None),
        ('d.csv', 'prompt,Source_Image\nx,gone.png\n', 'source_image'),
        ('d.jsonl', '{"prompt": "red"}\n', ''), ('d.jsonl', '["red"]\n', 'd.jsonl'),
        ('d.jsonl', '{"prompt": 5}\n', 'prompt'), ('d.jsonl', '{"prompt": null}\n', 'prompt'),
        ('d.jsonl', '{"prompt": "red"\n', 'd.jsonl'), ('d.jsonl', '[' * 100000 + '\n', 'd.jsonl'),
        ('d.jsonl', '{"prompt": "red", "prompt": "blue"}\n', 'prompt'),
        ('d.jsonl', '{"prompt": "\\ud800"}\n', 'd.jsonl'), ('d.jsonl', '"red"\n', 'd.jsonl'),
        ('d.jsonl', '{"prompt": "red", "source_image": 5}\n', 'source_image'),
        ('d.jsonl', '{"prompt": "red", "task": {}}\n', 'task')]
    for i, (name, text, want) in enumerate(many):
        yield Case(f'data {i} {name} {text[:40]!r}', want, w.dry(
            data=[f'{{at}}/{name}'], routes=[dict(teacher='one', data='d')]),
            make=lambda at, n=name, t=text: put(at / n, t))
    paths = [('gone.csv', 'gone.csv'), ('', 'data'), ('{at}', 'folder|ends'), ('/dev/zero', 'zero'),
             ('x' * 400 + '.csv', 'xxx'), ('<your>.csv', '<your>'), ('a\0b.csv', 'data'),
             ('path/to/data.csv', 'path/to'), ('{at}/pipe.csv', 'pipe'), ('{at}/loop.csv', 'loop')]
    for path, want in paths:
        yield Case(f'data at {path[:30]!r}', want, w.dry(data=[path]), make=odd_files)
    yield Case('data twice', None, w.dry(data=[f'{w.at}/words.csv'] * 2))
    yield Case('data none', 'data|words', w.dry(data=[]))
    yield Case('eval data gone', 'gone.csv', w.dry(eval_data=['gone.csv']))
    yield Case('eval data with another bucket', None, w.dry(eval_data=[f'{w.at}/edits.csv']))


def odd_files(at):
    os.mkfifo(at / 'pipe.csv')
    os.mkfifo(at / 'pipe.png')
    (at / 'loop.csv').symlink_to('loop.csv')
    (at / 'loop.png').symlink_to('loop.png')
    (at / 'folder.png').mkdir()


# --------------------------------------------------------------------------------------------------
# Pictures

def encoded(kind, size=(24, 24), mode='RGB', **more):
    f = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(f, kind, **more)
    return f.getvalue()


def bomb(side):
    """A PNG of a few kilobytes that says it is side x side."""
    def chunk(name, data):
        total = struct.pack('>I', zlib.crc32(name + data))
        return struct.pack('>I', len(data)) + name + data + total
    head = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + \
        chunk(b'IDAT', zlib.compress(bytes(1 << 16))) + chunk(b'IEND', b'')


def pictures(w):
    png, jpg = encoded('PNG', (64, 64)), encoded('JPEG', (64, 64))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    many = [
        ('p.png', png, ''), ('p.jpg', jpg, ''), ('p.webp', encoded('WEBP'), ''),
        ('p.gif', encoded('GIF'), ''), ('p.bmp', encoded('BMP'), ''), ('p.jpg', png, ''),
        ('p.tif', encoded('TIFF'), 'p.tif'), ('p.eps', encoded('EPS'), 'p.eps'),
        ('p.png', png[:len(png) // 2], 'p.png'), ('p.jpg', jpg[:len(jpg) // 2], 'p.jpg'),
        ('p.png', png[:20], 'p.png'), ('p.png', b'', 'p.png'), ('p.png', b'no picture', 'p.png'),
        ('p.png', bytes(flipped), 'p.png'), ('p.gif', encoded('GIF', (64, 64))[:900], 'p.gif'),
        ('p.bmp', encoded('BMP', (64, 64))[:900], 'p.bmp'), ('p.png', bomb(15000), 'p.png'),
        ('p.png', bomb(60000), 'p.png'),
        ('p.webp', encoded('WEBP', (64, 64))[:400], 'p.webp'),
        ('p.png', encoded('PNG', mode='RGBA'), ''), ('p.png', encoded('PNG', mode='1'), ''),
        ('p.png', encoded('PNG', mode='LA'), ''), ('p.png', encoded('PNG', mode='I;16'), ''),
        ('p.jpg', encoded('JPEG', mode='CMYK'), ''), ('p.png', encoded('PNG', (1, 1)), ''),
        ('p.png', encoded('PNG', (24, 48)), 'shape'), ('p.svg', '<svg/>', 'p.svg'),
        ('p.png', '<html>not found</html>', 'p.png')]
    for i, (name, data, want) in enumerate(many):
        yield Case(f'picture {i} {name}', want, edit_words(w, name),
                   make=lambda at, n=name, d=data: edit_files(at, n, d))
    for name in ('gone.png', 'pipe.png', 'loop.png', 'folder.png', '/dev/zero', 'x' * 300 + '.png',
                 'a\0b.png', '/dev/stdin', '~/p.png', 'https://host/p.png', '../../../etc/passwd'):
        want = re_name(name)
        yield Case(f'picture at {name[:30]!r}', want, edit_words(w, name),
                   make=lambda at, n=name: (odd_files(at), edit_files(at, n)))
    # a target is looked at as well, and one is needed where targets are learned from
    yield Case('picture, target gone', 'gone.png', edit_words(w, 'p.png', 'gone.png'),
               make=lambda at: edit_files(at, 'p.png', png, 'gone.png'))
    yield Case('picture, no target for sft', 'target_image', [
        *w.sft(data=[f'{w.at}/words.csv']), '--dry_run'], 'train_teacher')
    yield Case("picture, no target for states='data'", 'target_image', w.dry(states='data'))


def re_name(name):
    return 'UTF|NUL' if '\0' in name else name.split('/')[-1][:20].replace('.', r'\.')


def edit_files(at, name, picture=None, target='q.png'):
    if picture is not None:
        put(at / name, picture)
    put(at / 'q.png', encoded('PNG', (64, 64)))
    rows = [['prompt', 'source_image', 'target_image'], ['make it so', name, target]]
    with open(at / 'd.csv', 'w', newline='') as f:
        csv.writer(f).writerows(rows)


def edit_words(w, *_):
    return w.dry(data=['{at}/d.csv'], routes=[dict(teacher='one', data='d')])


# --------------------------------------------------------------------------------------------------

def cases(at, play):
    w = World(at, play)
    for some in (settings, teachers, data, pictures, *kit_folders.CLASSES, *kit_scripts.CLASSES):
        yield from some(w)
