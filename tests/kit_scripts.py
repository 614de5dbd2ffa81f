"""
The table of tests/kit.py, third part: scores, rewards and reward servers, and the scripts beside
train_opd.py.
"""
import os, shutil, signal, socket
from functools import partial

from kit import Case
from kit_folders import BASE, LORA, spoilt

BAD = {                                 # bodies of f(images, rows)
    'raises': 'raise ValueError("no good")', 'exits': 'import sys; sys.exit(3)',
    'exits well': 'exit(0)', 'returns none': 'return None', 'one number': 'return 0.5',
    'too few': 'return []', 'too many': 'return [1.0] * 99', 'text': 'return ["1"] * len(rows)',
    'nan': 'return [float("nan")] * len(rows)', 'inf': 'return [1e39] * len(rows)',
    'complex': 'return [1j] * len(rows)', 'a dict': 'return {"a": 1}',
    'empty dicts': 'return [{}] * len(rows)', 'yields': 'yield from [1 / 0]',
    'a column': 'return images.mean((1, 2, 3))[:, None].expand(-1, 2)',
    'recurses': 'return f(images, rows)', 'memory': 'raise MemoryError("no room")',
    'base exception': 'raise BaseException("odd")', 'long': 'raise ValueError("x" * 10**6)',
    'lines': 'raise ValueError("a\\n" * 99)', 'assertion': 'assert False',
    'bad str': 'class E(Exception):\n        def __str__(self): return 5\n    raise E()',
    'chdir': 'import os; os.chdir("/"); raise ValueError("moved")'}
GOOD = {
    'numbers': 'return [0.5] * len(rows)', 'a tensor': 'return images.mean((1, 2, 3))',
    'numpy': 'return images.mean((1, 2, 3)).numpy()', 'booleans': 'return [True] * len(rows)',
    'prints': 'print("hello"); return [1.0] * len(rows)',
    'dicts': 'return [dict(a=1.0, b=2)] * len(rows)',
    'changes its pictures': 'images.zero_(); rows.clear(); return [1.0] * len(images)'}
FILES = {
    'does not parse': 'def f(', 'raises when loaded': '1 / 0', 'exits when loaded': 'exit()',
    'has no f': 'g = 1', 'imports what is not there': 'import nothing_such',
    'f is no function': 'f = 5', 'takes nothing': 'def f(): pass'}
TIRED = '''n = []
def f(images, rows):
    n.append(1)
    assert len(n) < 3
    return [1.0] * len(rows)
'''
NAMES = ('nope', 'clip@a@b@c', 'jpeg@x', 'aesthetic', 'http://', 'http://127.0.0.1:1', 'file.py',
         'http://no.such.host.invalid', 'http://127.0.0.1:99999', 'htp://127.0.0.1', 'http://a b',
         'http://' + 'x' * 300, 'gone.py:f', '<name>')
LISTS = ('x', '[]', '[5]', '["jpeg"]', '[{}]', '[dict(reward=5)]', '[dict(reward="")]',
         '[dict(reward="jpeg", weight=0)]', '[dict(reward="jpeg", weight="x")]',
         '[dict(reward="jpeg"), dict(reward="jpeg")]', '[dict(reward="jpeg", what=1)]')
ANSWERS = {
    'nothing': b'', 'no JSON': b'hello', 'a list': b'[1]', 'text': b'{"rewards": ["1"]}',
    'too few': b'{"rewards": []}', 'nan': b'{"rewards": [NaN, NaN]}', 'endless': None,
    'an error': 500, 'elsewhere': 302}


def judge_file(at, text):
    (at / 'j.py').write_text(text)


def judges(w):
    who = (('score', 'train_opd', w.opd(score='{at}/j.py:f', score_samples=1, max_steps=1)),
           ('reward', 'train_teacher', w.teach(reward=[dict(reward='{at}/j.py:f')], max_steps=1)))
    for kind, script, words in who:
        for name, body in {**BAD, **GOOD}.items():
            yield Case(f'{kind}: {name}', '' if name in GOOD else r'j\.py', words, script, late=1,
                       make=partial(judge_file, text=f'def f(images, rows):\n    {body}\n'))
        for name, text in FILES.items():
            yield Case(f'{kind}: {name}', r'j\.py', words, script,
                       partial(judge_file, text=text), late=int(name == 'takes nothing'))
        interrupt = 'def f(images, rows):\n    raise KeyboardInterrupt\n'
        yield Case(f'{kind}: is interrupted', 'interrupted', words, script,
                   partial(judge_file, text=interrupt), late=1, codes=(130,))
        yield Case(f'{kind}: fails later', 'sample.py' if kind == 'score' else r'j\.py', words,
                   script, partial(judge_file, text=TIRED), late=2)
    for name in NAMES:
        yield Case(f'reward called {name[:30]!r}', name[:20], w.teach(reward=[dict(reward=name)]),
                   'train_teacher')
    for text in LISTS:
        yield Case(f'rewards {text}', 'reward', [*w.teach(), f'--reward={text}', '--dry_run'],
                   'train_teacher')
    for name, answer in ANSWERS.items():
        yield Case(f'reward server: {name}', 'http', [*w.teach(), '{at}/server.py'],
                   'train_teacher', partial(Server, answer=answer), late=1)


class Server:
    """Answers everything with the same, in a process that ends with the case."""

    def __init__(self, at, answer):
        self.socket, self.answer = socket.create_server(('127.0.0.1', 0)), answer
        address = f'http://127.0.0.1:{self.socket.getsockname()[1]}'
        (at / 'server.py').write_text(f'reward = [dict(reward="{address}")]\n')
        self.pid = os.fork()
        while not self.pid:
            link, _ = self.socket.accept()
            with link:
                try:
                    self.serve(link)
                except OSError:
                    pass

    def serve(self, link):
        answer, head = self.answer, '200 OK'
        link.settimeout(1)
        try:
            while link.recv(1 << 16):
                pass
        except TimeoutError:                           # all was read
            pass
        if isinstance(answer, int):
            head, answer = f'{answer} Odd\r\nLocation: http://127.0.0.1:1/', b''
        link.sendall(f'HTTP/1.0 {head}\r\n\r\n'.encode() + (answer or b''))
        while answer is None:
            link.sendall(b' ' * 65536)

    def __del__(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


# --------------------------------------------------------------------------------------------------
# sample.py

SAMPLING = [
    ('num=0', 'num'), ('num=x', 'num'), ('batch_size=0', 'batch_size'), ('steps=-1', 'steps'),
    ('height=25', 'height'), ('height=-24', 'height'), ('width=100000', '100000'),
    ('guidance=inf', 'guidance'), ('guidance=x', 'guidance'), ('scale=inf', 'scale'),
    ('scale=nan', 'scale'), ('dtype=int', 'dtype'), ('device=gpu', 'device'), ('seed=1e9', 'seed'),
    ('ckpt=gone', 'gone'), ('ckpt=./gone', 'gone'), ('ckpt={at}', None), ('model=gone', 'gone'),
    ('model=./gone', 'gone'), ('prompts=gone.txt', 'gone.txt'), ('source=gone.png', 'gone.png'),
    ('score=gone.py:f', 'gone.py'), ('prompt=', None), ('prompt=|', None), ('out_dir=', 'out_dir'),
    ('prompts={at}/empty.txt', 'prompt'), ('out_dir={at}/empty.txt', 'empty.txt'),
    ('score={at}/j.py:f', 'j.py'), ('source={at}/pipe.png', 'pipe'), ('family=Nope', 'Nope'),
    ('ckpt=<run>', '<run>'), ('ckpt=your-name/your-lora', 'your-name'), ('ema=False', ''),
    ('max_sequence_length=-1', 'max_seq'), ('base_storage=int8', 'base_storage'),
    ('distilled_guidance=inf', 'distilled'), (f'ckpt={BASE}', None)]


def sample_files(at):
    (at / 'empty.txt').touch()
    os.mkfifo(at / 'pipe.png')
    judge_file(at, 'def f(images, rows):\n    raise ValueError("no")\n')


def spoilt_run(at, w, file, spoil):
    shutil.copytree(w.at / 'run', at / 'run', symlinks=True)
    spoil(at / 'run' / 'latest' / file)


def earlier(at):                        # pictures, which are not written over
    (at / 'mine').mkdir()
    for name in ('0000_0.png', 'grid.png'):
        (at / 'mine' / name).write_text('mine')


def samples(w):
    tail = ['--steps=1', '--num=1', '--out_dir={at}/out', '--device=cpu']
    fine = [f'--ckpt={w.at}/run', '--prompt=a red circle', *tail]
    yield Case('sample: a run', '', fine, 'sample')
    yield Case('sample: the base', '', ['--ckpt=', f'--model={BASE}', '--prompt=a', *tail],
               'sample')
    for text, want in SAMPLING:
        words = [fine[0], *tail] if 'prompts' in text else fine
        yield Case(f'sample: {text[:50]}', want, [*words, f'--{text}'], 'sample', sample_files,
                   late=int(text.startswith('score={at}')))
    for file in 'meta.json', LORA:
        for kind, spoil in spoilt(file):
            spare = kind in ('gone', 'a folder')
            yield Case(f'sample: a run whose {file} is {kind}', None if spare else file,
                       ['--ckpt={at}/run', *fine[1:]], 'sample',
                       partial(spoilt_run, w=w, file=file, spoil=spoil))
    yield Case('sample: earlier pictures', '', [*fine, '--out_dir={at}/mine'], 'sample', earlier)


# --------------------------------------------------------------------------------------------------
# merge_lora.py and train_teacher.py

def merge_files(at):
    (at / 'f').touch()
    (at / 'full').mkdir()
    (at / 'full' / 'mine').touch()
    (at / 'l').symlink_to('gone')


def own_partial(at):
    (at / 'out.partial').mkdir()
    (at / 'out.partial' / 'mine').touch()


def merging(w):
    one, two = f'{w.at}/one', f'{w.at}/two'
    fine = [f'--adapters={one},{two}', '--out={at}/out']
    into = [*fine, f'--into_base={BASE}']
    yield Case('merge', '', fine, 'merge_lora')
    yield Case('merge into a base', '', into, 'merge_lora')
    more = [
        ('adapters=', 'adapters'), ('adapters=,', 'adapters'), (f'adapters={one},./gone', 'gone'),
        ('adapters={at}', None), ('rank=-1', 'rank'), ('rank=x', 'rank'), ('rank=100000', None),
        ('weights=1', 'weights'), ('weights=1,x', 'weights'), ('weights=1,inf', 'weights'),
        ('weights=nan,1', 'weights'), ('weights=0,1', 'weights'), ('weights=1e300,1', 'weights'),
        ('weights=1,1e300', 'weights'), ('out=', 'out'), ('out={at}/f', 'f'), ('out={at}/f/g', 'f'),
        ('out={at}/full', 'full'), (f'out={one}', 'one'), ('out={at}/' + 'x' * 300, 'xxx'),
        ('into_base=./gone', 'gone'), (f'into_base={one}', 'one'), ('model=./gone', 'gone'),
        (f'model={w.at}/words.csv', 'words'), ('adapters={at}/f', 'f'), ('out={at}/l', None),
        ('adapters={at}/full', 'full'), (f'adapters={one} {two}', 'one'), ('out=/proc/x', 'proc'),
        ('adapters=your-name/lora', 'your-name')]
    for text, want in more:
        name = f'merge: {text[:50].replace(str(w.at), "")}'
        yield Case(name, want, [*fine, f'--{text}'], 'merge_lora', merge_files)
    yield Case('merge: a folder out.partial of the user', None, into, 'merge_lora', own_partial)
    yield Case('merge: disk full', 'written', fine, 'merge_lora', most_bytes=3000)
    yield Case('merge: disk full, into a base', 'written', into, 'merge_lora', most_bytes=3000)


TEACHING = [
    ('group_size=1', 'group_size'), ('method=nope', 'nope'), ('method=sdpo --group_size=3', None),
    ('eta=0', 'eta'), ('timestep_fraction=0', 'timestep_fraction'), ('best_of=5', 'best_of'),
    ('timestep_fraction=2', 'timestep_fraction'), ('best_of=1', 'best_of'), ('buffer=3', 'buffer'),
    ('gamma=2', 'gamma'), ('init_from=merge', 'merge'), ('kl_beta=-1', 'kl_beta'),
    ('watch_reward=nope', 'nope'), ('prompt_dropout=2', 'prompt_dropout'), ('routes=[]', 'routes'),
    ('adv_clip=0', 'adv_clip'), ('guidance=inf', 'guidance'), ('sigmas=even', 'sigmas'),
    ('drop_last=2', 'drop_last'), ('same_noise=x', 'same_noise'), ('batch_size=3', 'batch_size'),
    ('init_from=your-name/x', 'your-name'), ('clip_range=inf', 'clip_range')]


def teaching(w):
    yield Case('teacher: grpo', '', w.teach(max_steps=1), 'train_teacher')
    yield Case('teacher: sft', '', w.sft(max_steps=1), 'train_teacher')
    for text, want in TEACHING:
        words = [f'--{x}' for x in text.split(' --')]
        yield Case(f'teacher: {text}', want, [*w.teach(), *words, '--dry_run'], 'train_teacher')


CLASSES = judges, samples, merging, teaching
