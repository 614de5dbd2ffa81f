"""
The table of tests/kit.py, second part: models, adapters, run folders, out_dir, a full disk,
signals.
"""
import fcntl, json, os, shutil, signal
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kit import Case, ROOT

BASE = ROOT / 'data' / 'shapes' / 'base'
LORA, PEFT, SETTINGS = ('pytorch_lora_weights.safetensors', 'adapter_model.safetensors',
                        'adapter_config.json')
SPOILT = {                              # what may have happened to a file
    'gone': lambda f: f.unlink(), 'empty': lambda f: f.write_bytes(b''),
    'cut': lambda f: f.write_bytes(f.read_bytes()[:f.stat().st_size // 2]),
    'garbage': lambda f: f.write_bytes(bytes(range(256)) * 4),
    'a folder': lambda f: (f.unlink(), f.mkdir()),
    'git-lfs': lambda f: f.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
    'null': lambda f: f.write_text('null'), 'a list': lambda f: f.write_text('[1]'),
    'names': lambda f: f.write_text('{"settings": 5, "step": "x", "_class_name": 5}'),
    'deep': lambda f: f.write_text('[' * 100000)}


def spoilt(file, kinds=None):
    """(what happened, function of a file) of all that may happen to it."""
    text = file.endswith(('.json', '.jsonl'))
    for kind, spoil in SPOILT.items():
        if kind in (kinds or SPOILT) and (text or kind not in ('null', 'a list', 'names', 'deep')):
            yield kind, spoil


def edit_json(file, more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {'format': 'pt'})


def copied(folder, to, file=''):
    """A copy: links to the files, but for the one that is to be spoilt."""
    shutil.copytree(folder, to, copy_function=os.symlink)
    if file:
        whole = to / file
        text = whole.read_bytes()
        whole.unlink()
        whole.write_bytes(text)
        return whole


def in_copy(at, folder, name, file, change, *more):
    """Prepares a case: a copy at/name of a folder, one file of which is changed."""
    change(copied(folder, at / name, file), *more)


# --------------------------------------------------------------------------------------------------
# Models

def first_matrix(tensors):
    return sorted(k for k, x in tensors.items() if x.dim() > 1)[0]


def fill_first(value, tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].float().fill_(value)


def reshape_first(tensors):
    tensors[first_matrix(tensors)] = torch.zeros(3, 3)


WEIGHTS = {'nan': partial(fill_first, float('nan')), 'inf': partial(fill_first, float('inf')),
           'lacking': lambda t: t.pop(first_matrix(t)), 'reshaped': reshape_first}
INDEX = [dict(_class_name='NopePipeline'), dict(_class_name=None), dict(_class_name=['x']),
         dict(transformer=None), dict(transformer=5), dict(transformer=['diffusers']),
         dict(transformer=['diffusers', 'Nope']), dict(vae=['nope', 'AutoencoderKL']),
         dict(text_encoder=['transformers', 'Nope']), dict(text_encoder=['os', 'system']),
         dict(scheduler=None), dict(more=['diffusers', 'AutoencoderKL'])]
CONFIGS = [
    ('transformer', dict(patch_size=0)), ('transformer', dict(patch_size='x')),
    ('transformer', dict(num_layers=50)), ('transformer', dict(in_channels=5)),
    ('transformer', dict(sample_size='x')), ('transformer', dict(pos_embed_max_size='x')),
    ('vae', dict(block_out_channels=[])), ('vae', dict(block_out_channels=5)),
    ('vae', dict(latent_channels='x')), ('vae', dict(scaling_factor=0)),
    ('vae', dict(scaling_factor='x')), ('scheduler', dict(shift='x')),
    ('scheduler', dict(_class_name='Nope'))]


def models(w):
    files = sorted(str(f.relative_to(BASE)) for f in BASE.rglob('*') if f.is_file())
    words = w.opd(model='{at}/base', max_steps=1)

    def changed(file, change, *more):
        return partial(in_copy, folder=BASE, name='base', file=file, change=change) if not more \
            else lambda at: in_copy(at, BASE, 'base', file, change, *more)
    for file in files:
        part = file.split('/')[0].removesuffix('.json')
        for kind, spoil in spoilt(file, ('gone', 'empty', 'cut', 'names', 'a list', 'git-lfs')):
            # what a file of settings lacks may be its default; a tokenizer has files to spare
            spare = part.startswith(('tokenizer', 'scheduler')) or kind == 'names'
            late = file.endswith('.safetensors') or part.startswith(('tok', 'sch', 'text'))
            yield Case(f'model: {file} {kind}', None if spare else f'{part}|does not load', words,
                       make=changed(file, spoil), late=int(late))
    for part in sorted({f.split('/')[0] for f in files if '/' in f}):
        def gone(at, part=part):
            copied(BASE, at / 'base')
            shutil.rmtree(at / 'base' / part)
        yield Case(f'model: {part} gone', part, words, make=gone)
    for part in 'transformer', 'vae', 'text_encoder', 'text_encoder_2', 'text_encoder_3':
        file = next(f for f in files if f.startswith(part + '/') and f.endswith('.safetensors'))
        for name, change in WEIGHTS.items():
            yield Case(f'model: {part} {name}', f'{part}|shape', words, late=1,
                       make=changed(file, edit_tensors, change))
    for more in INDEX:
        yield Case(f'model: index {more}', 'index|Nope|gone|nope|text_encoder|transformer|load',
                   words, make=changed('model_index.json', edit_json, more), late=1)
    for part, more in CONFIGS:
        file = next(f for f in files if f.startswith(part + '/') and f.endswith('config.json'))
        yield Case(f'model: {part} config {more}',
                   None if part == 'scheduler' else f'{part}|does not load', words, late=1,
                   make=changed(file, edit_json, more))
    yield Case('model: a file', 'words.csv', w.opd(model=f'{w.at}/words.csv'))
    yield Case('model: an adapter', 'model_index', w.opd(model=f'{w.at}/one'))
    yield Case('model: an empty folder', 'model_index', w.opd(model='{at}'))
    yield Case('model: as a teacher, the base itself', 'base', w.opd(
        teachers=[dict(name='one', checkpoint=str(BASE))]), late=1)


# --------------------------------------------------------------------------------------------------
# Adapters

def change_first(function, tensors):
    name = sorted(tensors)[0]
    tensors[name] = function(tensors[name])


def put_in(name, value, tensors):
    tensors[name] = value


FACTORS = {
    'nan': partial(change_first, lambda x: x * float('nan')),
    'half a pair': lambda t: t.pop(sorted(t)[0]), 'nothing': lambda t: t.clear(),
    'another shape': partial(change_first, lambda x: torch.zeros(2, 5)),
    'a strange name': partial(put_in, 'transformer.nope.lora_A.weight', torch.zeros(2, 5)),
    'one that is no lora': partial(put_in, 'x', torch.zeros(2)),
    'integers': partial(change_first, lambda x: x.int()),
    'zeros': lambda t: t.update({k: x * 0 for k, x in t.items()}),
    'a text encoder': partial(put_in, 'text_encoder.x.lora_A.weight', torch.zeros(2, 5)),
    'a bias': partial(put_in, 'transformer.proj_out.bias', torch.zeros(2)),
    'dora': partial(put_in, 'transformer.proj_out.lora_magnitude_vector', torch.ones(9))}
PEFTS = [dict(r=0), dict(r='x'), dict(lora_alpha=None), dict(lora_alpha=1e30), dict(r=7),
         dict(peft_type='IA3'), dict(use_dora=True), dict(bias='all'), dict(rank_pattern={'(': 3}),
         dict(rank_pattern=5), dict(rank_pattern={'(([a-z_.0-9]*)*)*Q': 3}),
         dict(alpha_pattern=[1]), dict(nope=True)]


def peft_only(at, one, more):
    edit_json(copied(one, at / 'a', SETTINGS), more)
    os.unlink(at / 'a' / LORA)


def adapters(w):
    one = Path(w.at) / 'one'
    words = w.opd(teachers=[dict(name='one', lora='{at}/a')], max_steps=1)
    for file in LORA, SETTINGS:
        for kind, spoil in spoilt(file):
            spare = kind == 'gone' or file == SETTINGS
            yield Case(f'adapter: {file} {kind}', None if spare else file, words,
                       make=partial(in_copy, folder=one, name='a', file=file, change=spoil))
    for name, change in FACTORS.items():
        late = name in ('another shape', 'a strange name', 'zeros')    # only a model can tell
        yield Case(f'adapter: with {name}', 'one|lora|adapter', words, late=int(late),
                   make=lambda at, c=change: in_copy(at, one, 'a', LORA, edit_tensors, c))
    for more in PEFTS:
        yield Case(f'adapter: config {more}', 'adapter|config', words,
                   make=partial(peft_only, one=one, more=more))
    yield Case('adapter: a pickle', 'safetensors', words, make=lambda at: (
        (at / 'a').mkdir(), torch.save({}, at / 'a' / 'pytorch_lora_weights.bin')))
    yield Case('adapter: a loop of links', 'a', words, make=lambda at: (at / 'a').symlink_to('a'))
    yield Case('adapter: a pipe', 'pipe', words, make=lambda at: (
        (at / 'a').mkdir(), os.mkfifo(at / 'a' / PEFT)))
    yield Case('adapter: as a start', '', w.opd(init_from=str(one), max_steps=1))
    yield Case('adapter: a start of more layers', 'lora_targets', w.opd(
        init_from=str(one), lora_targets=['transformer_blocks.3.attn.to_q']), late=1)


# --------------------------------------------------------------------------------------------------
# Run folders

STEP = 'step_000002'
META = [dict(settings=[]), dict(settings={}), dict(step='2'), dict(step=7), dict(step=-1),
        dict(state=5), dict(state=[5]), dict(notes=5), dict(notes=[5]), dict(notes=[{'loss': 'x'}]),
        dict(teachers=[]), dict(teachers={}), dict(teachers={'one': 5}), dict(step=True)]
STATES = {
    'of another kind': lambda s: s.clear(), 'student text': lambda s: s.update(student={'a': 'b'}),
    'student nan': lambda s: [x.fill_(float('nan')) for x in s['student'].values()],
    'no counts': lambda s: s.pop('counts'), 'counts of text': lambda s: s.update(counts={'a': 1}),
    'optimizer empty': lambda s: s.update(optimizer={}),
    'optimizer of another shape': lambda s: s['optimizer']['state'][0].update(
        exp_avg=torch.zeros(3)),
    'optimizer nan': lambda s: s['optimizer']['state'][0]['exp_avg'].fill_(float('nan')),
    'optimizer lacking': lambda s: s['optimizer']['state'].pop(0)}
LOGS = {'gone': lambda f: f.unlink(), 'empty': lambda f: f.write_text(''),
        'cut in its last line': lambda f: f.write_bytes(f.read_bytes()[:-9])}
LINES = {'not UTF-8': b'\xff\xfe{}', 'no JSON': b'{nope}', 'a list': b'[1]', 'no step': b'{"a": 1}',
         'step text': b'{"step": "x"}', 'half': b'{"step": 1, "lo', 'deep': b'[' * 100000,
         'words': b'{"step": 1, "lr": "x", "loss": "y"}', 'NUL': b'\0' * 400}


def relinked(out, to):
    (out / 'latest').unlink()
    if to:
        (out / 'latest').symlink_to(to)


def a_million(out):
    (out / STEP).rename(out / 'step_1000002')
    edit_json(out / 'step_1000002' / 'meta.json', dict(step=1000002))


FOLDERS = {                             # (what is said, '' if it goes on; what was done)
    'latest gone': ('', lambda out: relinked(out, '')),
    'latest dangling': ('', lambda out: relinked(out, 'gone')),
    'latest a folder': ('latest', lambda out: (relinked(out, ''), (out / 'latest').mkdir())),
    'latest a file': ('latest', lambda out: (relinked(out, ''), (out / 'latest').touch())),
    'start gone': ('start', lambda out: shutil.rmtree(out / 'start')),
    'start empty': ('start', lambda out: [f.unlink() for f in (out / 'start').iterdir()]),
    'start cut': ('start', lambda out: SPOILT['cut'](out / 'start' / LORA)),
    'samples a file': (None, lambda out: (shutil.rmtree(out / 'samples'),
                                          (out / 'samples').touch())),
    'step_best': ('', lambda out: shutil.copytree(out / STEP, out / 'step_best')),
    'step_notes': ('', lambda out: (out / 'step_notes.txt').touch()),
    'an empty step_000003': ('', lambda out: (out / 'step_000003').mkdir()),
    'step_000003 a file': ('', lambda out: (out / 'step_000003').touch()),
    'a link that a kill left': ('', lambda out: (out / '.writing_latest').symlink_to(STEP)),
    'log a folder': ('log.jsonl', lambda out: SPOILT['a folder'](out / 'log.jsonl')),
    'result.json a folder': ('result', lambda out: SPOILT['a folder'](out / 'result.json'))}


def run_copy(at, w, change=None, *more):
    shutil.copytree(w.at / 'run', at / 'out', symlinks=True)
    if change:
        change(at / 'out', *more)


def edit_state(out, change):
    found = torch.load(out / STEP / 'train_state.pt', weights_only=True)
    change(found)
    torch.save(found, out / STEP / 'train_state.pt')


def first_line(out, line):
    log = out / 'log.jsonl'
    log.write_bytes(line + b'\n' + log.read_bytes())


def runs(w):
    resume = w.opd(init_from='resume', max_steps=3)

    def changed(change=None, *more):
        return lambda at: run_copy(at, w, change, *more)
    yield Case('run: resumed', '', resume, make=changed())
    yield Case('run: started again', 'resume', w.opd(), make=changed())
    yield Case('run: resumed where none is', 'resume', resume)
    yield Case('run: resumed, and already done', None, w.opd(init_from='resume', max_steps=1),
               make=changed())
    for file in 'meta.json', 'train_state.pt', SETTINGS, PEFT, LORA:
        for kind, spoil in spoilt(file):
            # without a meta.json it counts for none; of the adapter's files one is enough
            spare = kind in ('gone', 'a folder') and file == 'meta.json' or file[0] == 'a' or \
                kind == 'gone' and file == LORA
            yield Case(f'run: {file} {kind}', None if spare else file, resume,
                       late=int(file != 'meta.json'),
                       make=changed(lambda out, f=file, s=spoil: s(out / STEP / f)))
    for more in META:
        yield Case(f'run: meta.json {more}', 'meta.json|teacher', resume, make=changed(
            lambda out, m=more: edit_json(out / STEP / 'meta.json', m)))
    for name, change in STATES.items():
        yield Case(f'run: train_state {name}', 'train_state', resume, late=1,
                   make=changed(edit_state, change))
    for name, change in LOGS.items():
        yield Case(f'run: log {name}', '', resume, make=changed(
            lambda out, c=change: c(out / 'log.jsonl')))
    for name, line in LINES.items():
        yield Case(f'run: log with a line {name}', 'log.jsonl', resume,
                   make=changed(first_line, line))
    for name, (want, change) in FOLDERS.items():
        yield Case(f'run: {name}', want, resume, late=int(name.startswith('start ')),
                   make=changed(change))
    yield Case('run: steps past a million', '', w.opd(init_from='resume', max_steps=1000003),
               make=changed(a_million))
    others = [('teacher', dict(teachers=[dict(name='one', lora=f'{w.at}/two')])),
              ('alpha', dict(alpha=3.0)), ('rank', dict(rank=3, alpha=2.0)),
              ('lora_targets', dict(lora_targets=['proj_out']))]
    for want, more in others:
        yield Case(f'run: resumed with another {want}', want, w.opd(
            init_from='resume', max_steps=3, **more), make=changed(),
            late=int(want in ('rank', 'lora_targets')))
    for name in ('log.jsonl', 'result.json', 'latest/x', 'model_index.json', PEFT):
        def own(at, name=name):
            (at / 'out' / name).parent.mkdir(parents=True)
            (at / 'out' / name).write_text('mine')
        yield Case(f'run: into a folder with a {name} of the user', name.split('/')[0],
                   w.opd(max_steps=1), make=own)


# --------------------------------------------------------------------------------------------------
# out_dir, two at once, a full disk, signals

def held(at):
    """Somebody has the lock, until what is returned is gone."""
    (at / 'out').mkdir()
    lock = open(at / 'out' / '.lock', 'w')
    lock.write('process 1 on elsewhere')
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def a_file(at):
    (at / 'f').touch()


def places(w):
    kinds = {
        'a file': ('{at}/f', a_file), 'below a file': ('{at}/f/g', a_file),
        'a dangling link': ('{at}/l', lambda at: (at / 'l').symlink_to('gone')),
        'a loop': ('{at}/l', lambda at: (at / 'l').symlink_to('l')), 'empty': ('', None),
        'a space': (' ', None), 'a dot': ('.', None), 'too long': ('{at}/' + 'x' * 300, None),
        'in proc': ('/proc/nope', None), 'a device': ('/dev/null', None), 'NUL': ('a\0b', None),
        'the model': ('{at}/base', lambda at: copied(BASE, at / 'base')),
        'a teacher': ('{at}/one', lambda at: copied(w.at / 'one', at / 'one')),
        'a pipe': ('{at}/p', lambda at: os.mkfifo(at / 'p')), 'a placeholder': ('<out>', None)}
    for name, (path, make) in kinds.items():
        yield Case(f'out_dir: {name}', 'out_dir', w.opd(out_dir=path), make=make)
        yield Case(f'out_dir: {name}, of a teacher', 'out_dir', w.teach(out_dir=path),
                   'train_teacher', make)
    yield Case('out_dir: a link to a folder', '', w.opd(out_dir='{at}/l', max_steps=1), make=lambda
               at: ((at / 'out').mkdir(), (at / 'l').symlink_to('out')))
    yield Case('out_dir: another run writes there', 'process 1', w.opd(), make=held)
    yield Case('out_dir: another run writes there, a resume', 'process 1',
               w.opd(init_from='resume'), make=held)
    yield Case('out_dir: .lock is a folder', 'out_dir', w.opd(), make=lambda at:
               (at / 'out' / '.lock').mkdir(parents=True))
    said = 'written|full|large'
    for most in (1, 500, 2000, 20000):
        yield Case(f'disk full at {most} bytes', said, w.opd(), late=2, most_bytes=most)
        yield Case(f'disk full at {most} bytes, resumed', said, w.opd(
            init_from='resume', max_steps=4), late=2, most_bytes=most,
            make=lambda at: run_copy(at, w))
    for hook in ('weights', 'bar', 'update', 'save', 'draw'):
        for number in signal.SIGTERM, signal.SIGINT:       # in a step: saved, and a good end
            yield Case(f'{number.name} at {hook}', 'asked to stop' if hook != 'update' else '',
                       w.opd(), late=2, codes=(130,), stop=(hook, number))


CLASSES = models, adapters, runs, places
