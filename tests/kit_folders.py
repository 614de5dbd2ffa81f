"""
The table of tests/kit.py, second half: models, adapters, run folders, out_dir, scores and rewards,
signals, a full disk, and the scripts beside train_opd.py.
"""
import fcntl, json, os, shutil, signal, socket, threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kit import Case, ROOT

BASE = ROOT / 'data' / 'shapes' / 'base'
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


def edit_json(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {'format': 'pt'})


def copied(folder, to, file=''):
    """A copy: links to the files, but for the one that is to be spoilt."""
    shutil.copytree(folder, to, symlinks=True, copy_function=os.link)
    if file:
        whole = to / file
        text = whole.read_bytes()
        whole.unlink()
        whole.write_bytes(text)
        return whole


# --------------------------------------------------------------------------------------------------
# Models

def models(w):
    files = sorted(str(f.relative_to(BASE)) for f in BASE.rglob('*') if f.is_file())
    for file in files:
        part = file.split('/')[0].removesuffix('.json')
        for kind, spoil in spoilt(file, ('gone', 'empty', 'cut', 'names', 'a list', 'git-lfs')):
            # what a file of settings lacks may be its default, and a tokenizer has files to spare
            spare = part.startswith(('tokenizer', 'scheduler')) or kind == 'names'
            yield Case(f'model: {file} {kind}', None if spare else f'{part}|does not load', w.opd(model='{at}/base',
                       max_steps=1), make=lambda at, f=file, s=spoil: s(copied(BASE, at / 'base', f)),
                       late=file.endswith('.safetensors') or part.startswith(('tok', 'sch', 'text')))
    for part in sorted({f.split('/')[0] for f in files if '/' in f}):
        def gone(at, part=part):
            shutil.rmtree(copied(BASE, at / 'base', 'model_index.json').parent / part)
        yield Case(f'model: {part} gone', part, w.opd(model='{at}/base'), make=gone)
    weights = 'transformer', 'vae', 'text_encoder', 'text_encoder_2', 'text_encoder_3'
    changes = dict(
        nan=lambda t: t.update({k: x.float().fill_(float('nan')) for k, x in [*t.items()][:1]}),
        inf=lambda t: t.update({k: x.float().fill_(float('inf')) for k, x in [*t.items()][:1]}),
        lacking=lambda t: t.pop(sorted(k for k in t if t[k].dim() > 1)[0]),
        reshaped=lambda t: t.update({k: torch.zeros(3, 3) for k in sorted(
            k for k in t if t[k].dim() > 1)[:1]}))
    for part in weights:
        file = next(f for f in files if f.startswith(part + '/') and f.endswith('.safetensors'))
        for name, change in changes.items():
            yield Case(f'model: {part} {name}', part if name != 'reshaped' else 'does not load|shape',
                       w.opd(model='{at}/base', max_steps=1), late=1, make=lambda at, f=file, c=change:
                       edit_tensors(copied(BASE, at / 'base', f), c))
    index = [dict(_class_name='NopePipeline'), dict(_class_name=None), dict(_class_name=['x']),
             dict(transformer=None), dict(transformer=5), dict(transformer=['diffusers']),
             dict(transformer=['diffusers', 'Nope']), dict(vae=['nope', 'AutoencoderKL']),
             dict(text_encoder=['transformers', 'Nope']), dict(text_encoder=['os', 'system']),
             dict(scheduler=None), dict(more=['diffusers', 'AutoencoderKL'])]
    for more in index:
        yield Case(f'model: index {more}', 'index|Nope|gone|names|nope|text_encoder|transformer|load',
                   w.opd(model='{at}/base'), make=lambda at, m=more: edit_json(
                       copied(BASE, at / 'base', 'model_index.json'), **m), late=1)
    configs = [('transformer', dict(patch_size=0)), ('transformer', dict(patch_size='x')),
               ('transformer', dict(num_layers=10 ** 4)), ('transformer', dict(in_channels=5)),
               ('transformer', dict(sample_size='x')), ('vae', dict(block_out_channels=[])),
               ('vae', dict(block_out_channels=5)), 
               ('vae', dict(latent_channels='x')), ('transformer', dict(pos_embed_max_size='x')),
               ('scheduler', dict(shift='x')), ('scheduler', dict(_class_name='Nope'))]
    for part, more in configs:
        name = next(f for f in files if f.startswith(part + '/') and f.endswith('config.json'))
        yield Case(f'model: {part} config {more}', None if part == 'scheduler' else f'{part}|does not load', w.opd(
            model='{at}/base', max_steps=1), late=1, make=lambda at, n=name, m=more: edit_json(
                copied(BASE, at / 'base', n), **m))
    yield Case('model: a file', 'words.csv', w.opd(model=f'{w.at}/words.csv'))
    yield Case('model: an adapter', 'model_index', w.opd(model=f'{w.at}/one'))
    yield Case('model: an empty folder', 'model_index', w.opd(model='{at}'))
    yield Case('checkpoint: the base itself', 'base', w.opd(
        teachers=[dict(name='one', checkpoint=str(BASE))]), late=1)


# --------------------------------------------------------------------------------------------------
# Adapters

def adapters(w):
    one = Path(w.at) / 'one'
    words = w.opd(teachers=[dict(name='one', lora='{at}/a')], max_steps=1)
    for file in ('pytorch_lora_weights.safetensors', 'adapter_config.json'):
        for kind, spoil in spoilt(file):
            want = None if kind == 'gone' or file[0] == 'a' else file
            yield Case(f'adapter: {file} {kind}', want, words, make=lambda at, f=file, s=spoil:
                       s(copied(one, at / 'a', f)))
    def first(t):
        return sorted(t)[0]
    changes = {
        'nan': lambda t: t.update({first(t): t[first(t)] * float('nan')}),
        'half a pair': lambda t: t.pop(first(t)),
        'another shape': lambda t: t.update({first(t): torch.zeros(2, 5)}),
        'a strange name': lambda t: t.update({'transformer.nope.lora_A.weight': torch.zeros(2, 5)}),
        'one that is no lora': lambda t: t.update({'x': torch.zeros(2)}), 'nothing': lambda t: t.clear(),
        'integers': lambda t: t.update({first(t): t[first(t)].int()}),
        'zeros': lambda t: t.update({k: x * 0 for k, x in t.items()}),
        'a text encoder': lambda t: t.update({'text_encoder.x.lora_A.weight': torch.zeros(2, 5)}),
        'a bias': lambda t: t.update({'transformer.proj_out.bias': torch.zeros(2)}),
        'dora': lambda t: t.update({'transformer.proj_out.lora_magnitude_vector': torch.ones(9)})}
    for name, change in changes.items():
        shape = name in ('another shape', 'a strange name', 'zeros')    # only a model can tell
        yield Case(f'adapter: with {name}', 'one|lora|adapter', words, late=shape, make=lambda at, c=change:
                   edit_tensors(copied(one, at / 'a', 'pytorch_lora_weights.safetensors'), c))
    configs = [dict(r=0), dict(r='x'), dict(lora_alpha=None), dict(lora_alpha=1e30), dict(peft_type='IA3'),
               dict(use_dora=True), dict(bias='all'), dict(rank_pattern={'(': 3}), dict(rank_pattern=5),
               dict(rank_pattern={'(([a-z_.0-9]*)*)*Q': 3}), dict(alpha_pattern=[1]), dict(r=7), dict(nope=True)]

    def peft(at, more):
        edit_json(copied(one, at / 'a', 'adapter_config.json'), **more)
        os.unlink(at / 'a' / 'pytorch_lora_weights.safetensors')
    for more in configs:
        yield Case(f'adapter: config {more}', 'adapter|config', words, make=lambda at, m=more: peft(at, m))
    yield Case('adapter: a pickle', 'safetensors', words, make=lambda at: (
        (at / 'a').mkdir(), torch.save({}, at / 'a' / 'pytorch_lora_weights.bin')))
    yield Case('adapter: a loop of links', 'a', words, make=lambda at: (at / 'a').symlink_to('a'))
    yield Case('adapter: a pipe', 'a', words, make=lambda at: (
        (at / 'a').mkdir(), os.mkfifo(at / 'a' / 'adapter_model.safetensors')))
    yield Case('adapter: as a start', '', w.opd(init_from=str(one), max_steps=1))
    yield Case('adapter: a start of more layers', 'lora_targets', w.opd(
        init_from=str(one), lora_targets=['transformer_blocks.3.attn.to_q']), late=1)


# --------------------------------------------------------------------------------------------------
# Run folders

def run_copy(w, at, change=None):
    shutil.copytree(w.at / 'run', at / 'out', symlinks=True)
    if change:
        change(at / 'out')


def runs(w):
    resume = w.opd(init_from='resume', max_steps=3)
    yield Case('run: resumed', '', resume, make=lambda at: run_copy(w, at))
    yield Case('run: started again', 'resume', w.opd(), make=lambda at: run_copy(w, at))
    yield Case('run: resumed where none is', 'resume', resume)
    yield Case('run: resumed, and already done', None, w.opd(init_from='resume', max_steps=1),
               make=lambda at: run_copy(w, at))
    step = 'step_000002'
    for file in ('meta.json', 'train_state.pt', 'adapter_config.json', 'adapter_model.safetensors',
                 'pytorch_lora_weights.safetensors'):
        for kind, spoil in spoilt(file):
            spare = kind == 'gone' and file[0] in 'mp' or file.startswith('adapter')
            want = None if spare else file if file != 'meta.json' or kind != 'a folder' else None
            yield Case(f'run: {file} {kind}', want, resume, late=file[0] != 'm', make=lambda at, f=file, s=spoil:
                       run_copy(w, at, lambda out: s(out / step / f)))
    meta = [dict(settings=[]), dict(settings={}), dict(step='2'), dict(step=7), dict(step=-1), dict(state=5),
            dict(state=[5]), dict(notes=5), dict(notes=[5]), dict(notes=[{'loss': 'x'}]),
            dict(teachers=[]), dict(teachers={}), dict(teachers={'one': 5}), dict(step=True)]
    for more in meta:
        yield Case(f'run: meta.json {more}', 'meta.json|teacher', resume, make=lambda at, m=more:
                   run_copy(w, at, lambda out: edit_json(out / step / 'meta.json', **m)))

    def state(out, change):
        found = torch.load(out / step / 'train_state.pt', weights_only=True)
        change(found)
        torch.save(found, out / step / 'train_state.pt')

    def replaced(part, value):
        return lambda s: s.update({part: value})
    states = {'of another kind': lambda s: s.clear(), 'student text': replaced('student', {'a': 'b'}),
              'student nan': lambda s: [x.fill_(float('nan')) for x in s['student'].values()],
              'no counts': lambda s: s.pop('counts'), 'counts of text': replaced('counts', {'a': 1}),
              'optimizer empty': replaced('optimizer', {}),
              'optimizer of another shape': lambda s: s['optimizer']['state'][0].update(
                  exp_avg=torch.zeros(3)),
              'optimizer nan': lambda s: s['optimizer']['state'][0]['exp_avg'].fill_(float('nan')),
              'optimizer lacking': lambda s: s['optimizer']['state'].pop(0)}
    for name, change in states.items():
        yield Case(f'run: train_state {name}', None if name == 'no counts' else 'train_state', resume, late=1,
                   make=lambda at, c=change: run_copy(w, at, lambda out: state(out, c)))
    logs = {'gone': lambda f: f.unlink(), 'empty': lambda f: f.write_text(''),
            'cut in its last line': lambda f: f.write_bytes(f.read_bytes()[:-9])}
    for name, change in logs.items():
        yield Case(f'run: log {name}', '', resume, make=lambda at, c=change:
                   run_copy(w, at, lambda out: c(out / 'log.jsonl')))
    lines = {'not UTF-8': b'\xff\xfe{}\n', 'no JSON': b'{nope}\n', 'a list': b'[1]\n', 'no step': b'{"a": 1}\n',
             'step text': b'{"step": "x"}\n', 'half a line': b'{"step": 1, "lo', 'deep': b'[' * 100000 + b'\n',
             'words': b'{"step": 1, "lr": "x", "loss": "y"}\n', 'NUL': b'\0' * 400 + b'\n'}
    for name, line in lines.items():
        yield Case(f'run: log with a line {name}', 'log.jsonl', resume, make=lambda at, x=line: run_copy(
            w, at, lambda out: (out / 'log.jsonl').write_bytes(x + b'\n' + (out / 'log.jsonl').read_bytes())))
    yield Case('run: log a folder', 'log.jsonl', resume, make=lambda at: run_copy(
        w, at, lambda out: SPOILT['a folder'](out / 'log.jsonl')))
    folders = {
        'latest gone': ('', lambda out: (out / 'latest').unlink()),
        'latest dangling': ('', lambda out: ((out / 'latest').unlink(), (out / 'latest').symlink_to('gone'))),
        'latest a folder': ('latest', lambda out: ((out / 'latest').unlink(), (out / 'latest').mkdir())),
        'latest a file': (None, lambda out: ((out / 'latest').unlink(), (out / 'latest').touch())),
        'start gone': ('start', lambda out: shutil.rmtree(out / 'start')),
        'start empty': ('start', lambda out: [f.unlink() for f in (out / 'start').iterdir()]),
        'start cut': ('start', lambda out: SPOILT['cut'](out / 'start' / 'pytorch_lora_weights.safetensors')),
        'samples a file': (None, lambda out: (shutil.rmtree(out / 'samples'), (out / 'samples').touch())),
        'step_best': ('', lambda out: shutil.copytree(out / step, out / 'step_best')),
        'step_notes': ('', lambda out: (out / 'step_notes.txt').touch()),
        'an empty step_000003': ('', lambda out: (out / 'step_000003').mkdir()),
        'step_000003 a file': ('', lambda out: (out / 'step_000003').touch()),
        'result.json a folder': ('result', lambda out: ((out / 'result.json').unlink(),
                                                      (out / 'result.json').mkdir())),
        'steps past a million': ('', lambda out: ((out / step).rename(out / 'step_1000002'), edit_json(
            out / 'step_1000002' / 'meta.json', step=1000002)))}
    for name, (want, change) in folders.items():
        more = dict(max_steps=1000003) if 'million' in name else {}
        yield Case(f'run: {name}', want, w.opd(**dict(dict(init_from='resume', max_steps=3), **more)),
                   late=name.startswith('start '), make=lambda at, c=change: run_copy(w, at, c))
    others = [('teacher', dict(teachers=[dict(name='one', lora=f'{w.at}/two')])), ('alpha', dict(alpha=3.0)),
              ('rank', dict(rank=3, alpha=2.0)), ('lora_targets', dict(lora_targets=['proj_out']))]
    for want, more in others:
        yield Case(f'run: resumed with another {want}', want, w.opd(init_from='resume', max_steps=3, **more),
                   late=want in ('rank', 'lora_targets'), make=lambda at: run_copy(w, at))
    for name in ('log.jsonl', 'result.json', 'latest/x', 'model_index.json', 'adapter_model.safetensors'):
        def own(at, name=name):
            (at / 'out' / name).parent.mkdir(parents=True)
            (at / 'out' / name).write_text('mine')
        yield Case(f'run: into a folder with a {name} of the user', name.split('/')[0], w.opd(max_steps=1), make=own)


# --------------------------------------------------------------------------------------------------
# out_dir, two at once, signals, a full disk

def places(w):
    kinds = {
        'a file': ('{at}/f', lambda at: (at / 'f').touch()), 'below a file': ('{at}/f/g', lambda at: (at / 'f').touch()),
        'a dangling link': ('{at}/l', lambda at: (at / 'l').symlink_to('gone')),
        'a loop': ('{at}/l', lambda at: (at / 'l').symlink_to('l')), 'empty': ('', None), 'a space': (' ', None),
        'a dot': ('.', None), 'too long': ('{at}/' + 'x' * 300, None), 'in proc': ('/proc/nope', None),
        'a device': ('/dev/null', None), 'with NUL': ('a\0b', None), 'the model': ('{at}/base', lambda at: copied(BASE, at / 'base')),
        'a teacher': ('{at}/one', lambda at: copied(w.at / 'one', at / 'one')), 'its pipe': ('{at}/p', lambda at: os.mkfifo(at / 'p')),
        'a placeholder': ('<out>', None)}
    for name, (path, make) in kinds.items():
        yield Case(f'out_dir: {name}', 'out_dir|proc|null|base|one', w.opd(out_dir=path), make=make)
        yield Case(f'out_dir: {name}, for a teacher', 'out_dir|proc|null|base|one', w.teach(out_dir=path),
                   'train_teacher', make)
    yield Case('out_dir: a link to a folder', '', w.opd(out_dir='{at}/l', max_steps=1), make=lambda at: (
        (at / 'out').mkdir(), (at / 'l').symlink_to('out')))

    def held(at):
        (at / 'out').mkdir()
        lock = open(at / 'out' / '.lock', 'w')
        lock.write('process 1 on elsewhere')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock
    yield Case('out_dir: another run writes there', 'process 1', w.opd(), make=held)
    yield Case('out_dir: another run writes there, a resume', 'process 1', w.opd(init_from='resume'), make=held)
    yield Case('out_dir: .lock is a folder', 'out_dir', w.opd(), make=lambda at: (at / 'out' / '.lock').mkdir(parents=True))
    for most in (1, 500, 2000, 20000):
        yield Case(f'disk full at {most} bytes', 'written|full|large|disk', w.opd(), late=2, most_bytes=most)
        yield Case(f'disk full at {most} bytes, resumed', 'written|full|large|disk', w.opd(
            init_from='resume', max_steps=4), late=2, most_bytes=most, make=lambda at: run_copy(w, at))
    for hook in ('weights', 'bar', 'update', 'save', 'draw'):
        for number in signal.SIGTERM, signal.SIGINT:
            yield Case(f'{number.name} at {hook}', 'asked to stop' if hook != 'update' else '',
                       w.opd(), late=2, codes=(130,), stop=(hook, number))


# --------------------------------------------------------------------------------------------------
# Scores and rewards

BAD = {
    'raises': 'raise ValueError("no good")', 'exits': 'import sys; sys.exit(3)', 'exits well': 'exit(0)',
    'returns none': 'return None', 'one number': 'return 0.5', 'too few': 'return []', 'text': 'return ["1"] * len(rows)',
    'too many': 'return [1.0] * 99', 'nan': 'return [float("nan")] * len(rows)', 'inf': 'return [1e39] * len(rows)',
    'complex': 'return [1j] * len(rows)', 'a dict': 'return {"a": 1}', 'empty dicts': 'return [{}] * len(rows)',
    'a column': 'return images.mean((1, 2, 3))[:, None].expand(-1, 2)', 'yields': 'yield from [1 / 0]',
    'recurses': 'return f(images, rows)', 'memory': 'raise MemoryError("no room")', 'interrupt': 'raise KeyboardInterrupt',
    'base exception': 'raise BaseException("odd")', 'long': 'raise ValueError("x" * 10**6)', 'lines': 'raise ValueError("a\\n" * 99)',
    'assertion': 'assert False', 'bad str': 'class E(Exception):\n        def __str__(self): return 5\n    raise E()',
    'chdir': 'import os; os.chdir("/"); raise ValueError("moved")'}
GOOD = {'numbers': 'return [0.5] * len(rows)', 'a tensor': 'return images.mean((1, 2, 3))', 'prints': 'print("hello"); return [1.0] * len(rows)',
        'numpy': 'return images.mean((1, 2, 3)).numpy()', 'dicts': 'return [dict(a=1.0, b=2)] * len(rows)',
        'changes its pictures': 'images.zero_(); rows.clear(); return [1.0] * len(images)', 'booleans': 'return [True] * len(rows)'}
FILES = {'does not parse': 'def f(', 'raises when loaded': '1 / 0', 'exits when loaded': 'exit()', 'has no f': 'g = 1',
         'imports what is not there': 'import nothing_such', 'f is no function': 'f = 5', 'takes nothing': 'def f(): pass'}


def judges(w):
    def function(at, body):
        (at / 'j.py').write_text(f'def f(images, rows):\n    {body}\n')
    for name, body in {**BAD, **GOOD}.items():
        want = '' if name in GOOD else r'j\.py'
        make = lambda at, b=body: function(at, b)
        codes = (2, 130) if name == 'interrupt' else (2,)
        yield Case(f'score: {name}', None if len(codes) > 1 else want, w.opd(
            score='{at}/j.py:f', score_samples=1, max_steps=1), make=make, late=1, codes=codes)
        yield Case(f'reward: {name}', None if len(codes) > 1 else want, w.teach(
            reward=[dict(reward='{at}/j.py:f')], max_steps=1), 'train_teacher', make, late=1, codes=codes)
    for name, text in FILES.items():
        for who, script, words in (('score', 'train_opd', w.opd(score='{at}/j.py:f', score_samples=1)), (
                'reward', 'train_teacher', w.teach(reward=[dict(reward='{at}/j.py:f')]))):
            yield Case(f'{who}: {name}', r'j\.py', words, script, make=lambda at, t=text:
                       (at / 'j.py').write_text(t), late=name == 'takes nothing')
    later = 'n = []\ndef f(images, rows):\n    n.append(1)\n    assert len(n) < 3\n    return [1.0] * len(rows)\n'
    yield Case('score: fails at the end', 'sample.py', w.opd(score='{at}/j.py:f', score_samples=2, max_steps=1),
               make=lambda at: (at / 'j.py').write_text(later), late=2)
    yield Case('reward: fails later', r'j\.py', w.teach(reward=[dict(reward='{at}/j.py:f')]), 'train_teacher',
               make=lambda at: (at / 'j.py').write_text(later), late=2)
    names = ['nope', '', 'clip@a@b@c', 'jpeg@x', 'aesthetic', 'http://', 'http://127.0.0.1:1', 'http://no.such.host.invalid',
             'http://127.0.0.1:99999', 'htp://127.0.0.1', 'http://a b', 'http://' + 'x' * 300, 'gone.py:f', '{at}', 'file.py', '<name>']
    for name in names:
        yield Case(f'reward called {name[:30]!r}', name[:20].replace('{at}', 'reward') or 'reward', w.teach(
            reward=[dict(reward=name)]), 'train_teacher')
    lists = ['x', '[]', '[5]', '["jpeg"]', '[{}]', '[dict(reward=5)]', '[dict(reward="jpeg", weight=0)]',
             '[dict(reward="jpeg", weight="x")]', '[dict(reward="jpeg"), dict(reward="jpeg")]', '[dict(reward="jpeg", what=1)]']
    for text in lists:
        yield Case(f'rewards {text}', 'reward', [*w.teach(), f'--reward={text}', '--dry_run'], 'train_teacher')
    answers = {'nothing': b'', 'no JSON': b'hello', 'a list': b'[1]', 'text': b'{"rewards": ["1"]}', 'too few': b'{"rewards": []}',
               'nan': b'{"rewards": [NaN, NaN]}', 'endless': None, 'an error': 500, 'elsewhere': 302}
    for name, answer in answers.items():
        yield Case(f'reward server: {name}', 'http', [*w.teach(), '{at}/server.py'], 'train_teacher',
                   lambda at, a=answer: Server(at, a), late=1)


class Server:
    """Answers everything with the same, from a thread's socket, until the case is over."""

    def __init__(self, at, answer):
        self.socket = socket.create_server(('127.0.0.1', 0))
        port = self.socket.getsockname()[1]
        (at / 'server.py').write_text(f'reward = [dict(reward="http://127.0.0.1:{port}")]\n')
        self.pid = os.fork()
        if not self.pid:
            while True:
                self.serve(answer)

    def serve(self, answer):
        link, _ = self.socket.accept()
        with link:
            try:
                link.settimeout(1)
                try:
                    while link.recv(1 << 16):
                        pass
                except TimeoutError:
                    pass
                body = answer if isinstance(answer, bytes) else b''
                line = f'{answer} Odd\r\nLocation: http://127.0.0.1:1/' if isinstance(answer, int) else '200 OK'
                link.sendall(f'HTTP/1.0 {line}\r\n\r\n'.encode() + body)
                while answer is None:
                    link.sendall(b' ' * 65536)
            except OSError:
                pass

    def __del__(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


# --------------------------------------------------------------------------------------------------
# The other scripts

def samples(w):
    tail = ['--steps=1', '--num=1', '--out_dir={at}/out', '--device=cpu']
    fine = [f'--ckpt={w.at}/run', '--prompt=a red circle', *tail]
    yield Case('sample: a run', '', fine, 'sample')
    yield Case('sample: the base', '', ['--ckpt=', f'--model={BASE}', '--prompt=a', *tail], 'sample')
    more = [
        ('num=0', 'num'), ('num=x', 'num'), ('batch_size=0', 'batch_size'), ('steps=-1', 'steps'), ('height=25', 'height'),
        ('height=-24', 'height'), ('width=100000', '100000'), ('guidance=inf', 'guidance'), ('guidance=x', 'guidance'),
        ('scale=inf', 'scale'), ('scale=nan', 'scale'), ('dtype=int', 'dtype'), ('device=gpu', 'device|gpu'), ('seed=1e9', 'seed'),
        ('ckpt=gone', 'gone'), ('ckpt=./gone', 'gone'), ('ckpt={at}', None), ('model=gone', 'gone'), ('model=./gone', 'gone'),
        ('prompts=gone.txt', 'gone.txt'), ('source=gone.png', 'gone.png'), ('score=gone.py:f', 'gone.py'), ('prompt=', None),
        ('prompt=|', None), ('prompts={at}/empty.txt', 'prompt'), ('out_dir={at}/empty.txt', 'empty.txt'), ('out_dir=', 'out_dir'),
        ('score={at}/j.py:f', 'j.py'), ('source={at}/pipe.png', 'pipe'), ('family=Nope', 'Nope'), ('ckpt=<run>', '<run>'),
        ('ckpt=your-name/your-lora', 'your-name'), ('max_sequence_length=-1', 'max_seq'), ('base_storage=int8', 'base_storage'),
        ('distilled_guidance=inf', 'distilled'), ('ckpt=' + str(BASE), None), ('ema=False', '')]
    for text, want in more:
        yield Case(f'sample: {text[:50]}', want, [*fine, f'--{text}'] if 'prompts' not in text else [
            fine[0], *tail, f'--{text}'], 'sample', make=lambda at: (
                (at / 'empty.txt').touch(), os.mkfifo(at / 'pipe.png'),
                (at / 'j.py').write_text('def f(images, rows):\n    raise ValueError("no")\n')),
            late=text.startswith('score={at}'))
    for file in ('meta.json', 'pytorch_lora_weights.safetensors'):
        for kind, spoil in spoilt(file):
            yield Case(f'sample: a run whose {file} is {kind}', None if kind in ('gone', 'a folder') else file, ['--ckpt={at}/run', *fine[1:]],
                       'sample', make=lambda at, f=file, s=spoil: (shutil.copytree(w.at / 'run', at / 'run', symlinks=True),
                                                              s(at / 'run' / 'latest' / f)))
    yield Case('sample: earlier pictures', 'out', fine, 'sample', make=lambda at: (
        (at / 'out').mkdir(), (at / 'out' / '0000_0.png').write_text('mine')))


def merging(w):
    one, two = f'{w.at}/one', f'{w.at}/two'
    fine = [f'--adapters={one},{two}', '--out={at}/out']
    yield Case('merge', '', fine, 'merge_lora')
    yield Case('merge into a base', '', [*fine, f'--into_base={BASE}'], 'merge_lora')
    more = [
        ('adapters=', 'adapters'), ('adapters=,', 'adapters'), (f'adapters={one},./gone', 'gone'), ('adapters={at}', None), ('rank=-1', 'rank'),
        ('rank=x', 'rank'), ('rank=100000', None), ('weights=1', 'weights'), ('weights=1,x', 'weights'), ('weights=1,inf', 'weights'),
        ('weights=nan,1', 'weights'), ('weights=0,1', 'weights'), ('weights=1e300,1', 'weights'), ('weights=1,1e300', 'weights'), ('out=', 'out'),
        ('out={at}/f', 'f'), ('out={at}/full', 'full'), ('out={at}/f/g', 'f'), (f'out={one}', 'one'), ('out={at}/' + 'x' * 300, 'xxx'),
        ('into_base=./gone', 'gone'), (f'into_base={one}', 'one'), ('model=./gone', 'gone'), (f'model={w.at}/words.csv', 'words'),
        ('adapters={at}/f', 'f'), ('adapters={at}/full', 'full'), (f'adapters={one} {two}', 'one'), ('out={at}/l', None),
        ('adapters=your-name/lora', 'your-name'), ('out=/proc/x', 'proc')]
    for text, want in more:
        yield Case(f'merge: {text[:50].replace(str(w.at), "")}', want, [*fine, f'--{text}'], 'merge_lora', make=lambda at: (
            (at / 'f').touch(), (at / 'full').mkdir(), (at / 'full' / 'mine').touch(), (at / 'l').symlink_to('gone')))
    yield Case('merge: a folder out.partial of the user', None, [*fine, f'--into_base={BASE}'], 'merge_lora', make=lambda at: (
        (at / 'out.partial').mkdir(), (at / 'out.partial' / 'mine').touch()))
    yield Case('merge: disk full', 'written', fine, 'merge_lora', most_bytes=3000)
    yield Case('merge: disk full, into a base', 'written', [*fine, f'--into_base={BASE}'], 'merge_lora', most_bytes=3000)


def teaching(w):
    yield Case('teacher: grpo', '', w.teach(max_steps=1), 'train_teacher')
    yield Case('teacher: sft', '', w.sft(max_steps=1), 'train_teacher')
    more = [('group_size=1', 'group_size'), ('method=nope', 'nope'), ('method=sdpo --group_size=3', None), ('eta=0', 'eta'),
            ('timestep_fraction=0', 'timestep_fraction'), ('timestep_fraction=2', 'timestep_fraction'), ('best_of=5', 'best_of'),
            ('best_of=1', 'best_of'), ('buffer=3', 'buffer'), ('gamma=2', 'gamma'), ('init_from=merge', 'merge'), ('kl_beta=-1', 'kl_beta'),
            ('watch_reward=nope', 'nope'), ('prompt_dropout=2', 'prompt_dropout'), ('routes=[]', 'routes'), ('adv_clip=0', 'adv_clip'),
            ('guidance=inf', 'guidance'), ('sigmas=even', 'sigmas'), ('drop_last=2', 'drop_last'), ('same_noise=x', 'same_noise'),
            ('init_from=your-name/x', 'your-name'), ('batch_size=3', 'batch_size'), ('clip_range=inf', 'clip_range')]
    for text, want in more:
        yield Case(f'teacher: {text}', want, [*w.teach(), *(f'--{x}' for x in text.split(' --')), '--dry_run'], 'train_teacher')


CLASSES = models, adapters, runs, places, judges, samples, merging, teaching
