"""What the tests share: real classes, tiny weights, no downloads.

    python -m pytest -q test_smoke.py         in less than a minute: does it all still run?
    python -m pytest -q                       all rooms
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
sys.path[:0] = [str(ROOT), str(ROOT / 'data' / 'shapes'), str(ROOT / 'tests')]

import base64, copy, csv, errno, functools, http.server, io, itertools, json, math, random, re
import shutil, signal, socket, subprocess, tempfile, textwrap, threading, time, types
import urllib.error, urllib.request
import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from types import SimpleNamespace
import merge_lora
import sample
import train_opd
import train_opd as T
import train_teacher
import world as shapes
from configurator import BadInput, collect, configure
from support import checks, files, models as M, rehearsal, rewards, run as R
from support.files import read_data
from support.rewards import RewardError, checked, from_file, load, remote

torch.set_num_threads(1)

SHAPES = ROOT / 'data' / 'shapes'
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
LAYERS = [f'transformer_blocks.3.attn.{k}' for k in ('to_q', 'to_v', 'to_out.0')] + ['proj_out']
ALONE = SimpleNamespace(rank=0, size=1)                        # a world of one process


def rows_of(path):
    return [b[i] for b in read_data([path])[0].values() for i in range(len(b))]


# -------------------- a small world to train in
def random_lora(folder, seed, size=0.3, rank=2, layers=LAYERS):
    """A teacher: random factors on layers of the shapes world's transformer."""
    g, sizes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(SHAPES / 'base')

    def draw(n, m):
        return torch.randn(n, m, generator=g) / m ** 0.5
    factors = {k: (draw(rank, sizes[k][1]), size * draw(sizes[k][0], rank), 1.0) for k in layers}
    merge_lora.write_adapter(folder, factors)
    return str(folder)


JUDGES = '''
def constant(images, rows):
    return [0.5] * len(rows)

def short(images, rows):
    return [0.5] * (len(rows) - 1)

def nan(images, rows):
    return [float('nan')] * len(rows)

def bright(images, rows):
    return images.mean((1, 2, 3)).tolist()

def very_bright(images, rows):
    return (1e5 * images.mean((1, 2, 3))).tolist()

asked = []

def tired(images, rows):                               # of the third question on
    asked.append(rows)
    return [float(k) for k in range(len(rows) - (len(asked) > 2))]
'''


def write_data(at):
    """words.csv: prompts, edits.csv: pairs; and rewards."""
    words = [f'a {c} {s} on {b}' for c in ('red', 'green') for s in ('circle', 'square')
             for b in ('white', 'black')]
    (at / 'words.csv').write_text('prompt\n' + '\n'.join(words) + '\n')
    edits = read_data([SHAPES / 'local_edit.csv'])[0]['local_edit']
    heads = ['prompt', 'source_image', 'target_image']
    lines = [heads] + [[edits[i][k] for k in heads] for i in range(8)]
    (at / 'edits.csv').write_text('\n'.join(map(','.join, lines)))
    (at / 'judges.py').write_text(JUDGES)


def as_words(settings, out):
    return [f'--{k}={v!r}' for k, v in dict(settings, out_dir=str(out)).items()]


@pytest.fixture(scope='session', name='world')
def _world(tmp_path_factory):
    """Two teachers, a file of prompts and one of edits, and the words of small runs on them."""
    at = tmp_path_factory.mktemp('world')
    write_data(at)
    one, two = random_lora(at / 'one', 1), random_lora(at / 'two', 2)
    common = dict(
        model=str(SHAPES / 'base'), device='cpu', eval_data=[], rank=4, alpha=8.0, lr=2e-2,
        lora_targets=LAYERS, lr_schedule='constant', warmup=1, batch_size=8, micro_batch=8,
        steps=3, max_steps=4, score='', eval_samples=3, show=1, sample_steps=1, ema_decay=0.9,
        log_every=1, save_every=1000, eval_every=1000)
    settings = dict(
        common, init_from='base', drop_last=0, data=[str(at / 'words.csv'), str(at / 'edits.csv')],
        teachers=[dict(name='base'), dict(name='one', lora=one), dict(name='two', lora=two)],
        routes=[dict(teacher='one', data='words'), dict(teacher='two', data='edits')])
    reward = [dict(reward=f'{SHAPES}/world.py:reward')]
    teachers = dict(common, data=[str(at / 'words.csv')], reward=reward)

    def opd(out, **more):
        return as_words(settings | more, out)

    def teacher(out, **more):                                  # imitation has no rollouts
        method = train_teacher.METHODS[more.get('method', 'grpo')]
        unread = () if 'reward' in method.settings else train_teacher.ROLLOUT
        return as_words({k: v for k, v in teachers.items() if k not in unread} | more, out)
    return SimpleNamespace(
        at=at, one=one, two=two, opd=opd, teacher=teacher,
        distil=lambda out, **more: run(train_opd.main, opd(out, **more)),
        teach=lambda out, **more: run(train_teacher.main, teacher(out, **more)))


@pytest.fixture(autouse=True)
def _signals():
    """A run that does not end well leaves its own answers to signals; the tests' are put back."""
    before = {k: signal.getsignal(k) for k in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for k, answer in before.items():
        signal.signal(k, answer)


def standing(teachers, moved=0.0, rank=4, **more):
    """The shapes base with teachers and a student on it, that has gone somewhere or nowhere yet."""
    models = T.Models(T.open_field(str(SHAPES / 'base')), teachers, **more)
    c = SimpleNamespace(rank=rank, alpha=float(rank), seed=0, betas=(0.9, 0.99), weight_decay=0.0,
                        ema_decay=0.0, ema_every=1)
    models.student = M.Student(models.field.net, c, models.field.targets)
    for n, p in models.student.params.items():
        if moved:
            p.data.normal_(0, moved, generator=torch.Generator().manual_seed(len(n)))
    models.refresh()
    return models


# -------------------- runs, and what they leave
def run(main, argv):
    """main in this process -> the run's folder."""
    main(argv)
    return Path(next(a for a in argv if a.startswith('--out_dir='))[10:].strip("'"))


def python(*words, **more):
    """A process of its own, in the repository."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, **more)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def state(out, step):
    return torch.load(out / f'step_{step:06d}' / 'train_state.pt', weights_only=True)


def weights(out, step):
    return torch.cat([x.flatten() for x in state(out, step)['student'].values()])


def average(out, step):
    """The adapter files' A and B: the average, if there is one."""
    found = merge_lora.read_adapter(out / f'step_{step:06d}')
    return {k: (A, B) for k, (A, B, _) in found.items()}


def first_gradient(out):
    """Of a run's first step, as its optimizer remembers it: times a constant."""
    moments = state(out, 1)['optimizer']['state'].values()
    return torch.cat([x['exp_avg'].flatten() for x in moments])


def entries(out):
    return [json.loads(x) for x in (out / 'log.jsonl').read_text().splitlines()]


def log(out, key):
    return [e[key] for e in entries(out) if key in e]


def timeless(out):
    """The log without what no two runs share."""
    return [{k: v for k, v in e.items() if k not in ('seconds', 'memory_gb')} for e in entries(out)]


def result(out):
    return json.loads((out / 'result.json').read_text())


def same_state(one, two, step):
    """Weights, average, optimizer and counts, bit for bit."""
    a, b = state(one, step), state(two, step)
    assert list(a['student']) == list(b['student']) and a['counts'] == b['counts']
    assert all(torch.equal(a['student'][k], b['student'][k]) for k in a['student'])
    x, y = a['optimizer']['state'], b['optimizer']['state']
    assert list(x) == list(y) and all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])
    files = [average(out, step) for out in (one, two)]
    assert all(torch.equal(p, q) for k in files[0] for p, q in zip(files[0][k], files[1][k]))


def resumes_exactly(main, argv, out, half, full):
    """The run in `out` is the same as its first half, stopped, resumed from a copy, and ended."""
    half_run = out.with_name(out.name + '_copy')
    shutil.copytree(out, half_run, symlinks=True)
    shutil.rmtree(half_run / f'step_{full:06d}')
    assert not torch.equal(weights(out, half), weights(out, full))
    argv = [a for a in argv if not a.startswith('--out_dir')]
    run(main, [*argv, f'--out_dir={half_run}', '--init_from=resume'])
    same_state(out, half_run, full)
    assert timeless(out) == timeless(half_run) and len(log(out, 'loss')) == full


# -------------------- mathematics
def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def number4(x):
    """A number as pictures broadcast with it."""
    return torch.as_tensor(x).view(1, 1, 1, 1)
