"""Rewards and scores: by name, by a function, by a server; none is trusted."""
import base64
import http.server
import io
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from configurator import BadInput
from support import files, rewards
from support.rewards import RewardError, checked, from_file, load, remote

PROMPTS = ['a red circle', 'two shapes', 'a blue square']


def rows(n=3):
    return [{'prompt': PROMPTS[i % 3]} for i in range(n)]


# --------------------------------------------------------------------------------------------------
# Without weights

def test_jpeg_likes_flat_pictures():
    x = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)])
    flat, noise = load('jpeg')(x, rows(2))
    assert noise < flat < 0
    buffer = io.BytesIO()
    rewards.pictures(x)[1].save(buffer, 'JPEG', quality=95)
    assert noise == -len(buffer.getvalue()) / 1000
    assert load('incompressible')(x, rows(2)) == [-flat, -noise]


def test_shapes_rewards():
    world = from_file(f'{ROOT}/data/shapes/world.py:draw').__globals__
    scene = ('white', (('circle', 'red'), None, None, None))
    x = torch.stack([world['draw'](scene), torch.zeros(3, 24, 24)])
    r = [{'prompt': 'a red circle top left on white'}] * 2
    assert load('shapes')(x, r) == [1.0, 0.0]
    smooth = load('shapes_smooth')(x, r)
    assert smooth[0] > 0.99 and smooth[1] < 0.9
    score = from_file(f'{ROOT}/data/shapes/world.py:score')
    assert checked('shapes', score, x, r, '/nowhere') == [1.0, 0.0]


def test_names(tmp_path):
    (tmp_path / 'neighbour.py').write_text('GAIN = 2\n')
    file = tmp_path / 'mine.py'
    file.write_text('from dataclasses import dataclass\nfrom neighbour import GAIN\n'
                    '@dataclass\nclass A:\n    x: int = 1\n'
                    'count = []\n'
                    'def brightness(images, rows):\n'
                    '    return [GAIN * x.mean().item() for x in images]\n')
    mine = load(f'{file}:brightness')
    assert mine(torch.ones(2, 3, 4, 4), rows(2)) == [2.0, 2.0]
    assert load(f'{file}:brightness') is mine and str(tmp_path) not in sys.path
    for name, words in {'jpg': 'jpeg', 'clop': 'clip',
                        f'{file}:brightnes': 'did you mean brightness',
                        f'{file}': 'file.py:function', f'{file}:count': 'brightness',
                        f'{tmp_path}/no.py:f': 'no such file', 'jpeg@/x': 'no @',
                        'clip@a@b@c': 'two @', 'aesthetic': 'weights_only=True',
                        f'aesthetic@{tmp_path}/a.pth': 'weights_only=True',
                        f'aesthetic@{tmp_path}/a.safetensors': 'a.safetensors',
                        f'clip@{tmp_path}/none': 'none',
                        f'pickscore@{tmp_path}/none': 'none'}.items():
        with pytest.raises(BadInput, match=re.escape(words)):
            load(name)
    with pytest.raises(BadInput, match='timeout'):
        load('jpeg', timeout=3)


# --------------------------------------------------------------------------------------------------
# Models

@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp('clip')
    letters = sorted(set('abcdefghijklmnopqrstuvwxyz'))
    vocab = [*letters, *[c + '</w>' for c in letters], '<|startoftext|>', '<|endoftext|>']
    end, vocab = len(vocab) - 1, {w: i for i, w in enumerate(vocab)}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    crop = {'height': 32, 'width': 32}
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=crop).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        text_config={**small, 'vocab_size': len(vocab), 'max_position_embeddings': 20,
                     'bos_token_id': end - 1, 'eos_token_id': end, 'pad_token_id': end},
        vision_config={**small, 'image_size': 32, 'patch_size': 8},
        projection_dim=768)).save_pretrained(folder)
    return folder


def test_clip_and_pickscore(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    x, r = torch.rand(19, 3, 40, 48), rows(19)              # more than a batch, and not square
    r[4] = {'prompt': 'a very long prompt ' * 10}           # cut, no error
    got = load(f'clip@{clip_folder}')(x, r)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    text = AutoTokenizer.from_pretrained(clip_folder)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)
    for i in (0, 4, 18):                                # one at a time, by the model's own forward
        with torch.no_grad():
            o = model(**text([r[i]['prompt']], truncation=True, max_length=20, return_tensors='pt'),
                      **pixels(images=rewards.pictures(x[i:i + 1]), return_tensors='pt'))
        cosine = torch.cosine_similarity(o.text_embeds, o.image_embeds).item()
        assert abs(got[i] - cosine) < 1e-5 and abs(cosine) <= 1
    pick = load(f'pickscore@{clip_folder}@{clip_folder}')(x, r)
    assert pick == pytest.approx([v * model.logit_scale.exp().item() / 26 for v in got], abs=1e-5)
    assert len(set(got)) > 10 and not torch.tensor(got).requires_grad


def test_clip_is_loaded_once_and_whole(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    assert rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu') \
        is rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu')
    for f in clip_folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['visual_projection.weight']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(BadInput, match='visual_projection'):
        load(f'clip@{tmp_path}')
    weights = tmp_path / 'model.safetensors'
    weights.rename(tmp_path / 'pytorch_model.bin')          # a pickle is never opened
    rewards.clip_model.cache_clear()
    with pytest.raises(BadInput, match='does not load'):
        load(f'clip@{tmp_path}')


def test_aesthetic_is_five_linear_maps(clip_folder, tmp_path):
    from safetensors.torch import save_file
    n, weights = [768, 1024, 128, 64, 16, 1], {}
    for place, a, b in zip((0, 2, 4, 6, 7), n, n[1:]):      # the names in the published file
        weights[f'layers.{place}.weight'] = torch.randn(b, a) / a ** 0.5
        weights[f'layers.{place}.bias'] = torch.randn(b)
    file = tmp_path / 'head.safetensors'
    save_file(weights, file)
    x = torch.rand(3, 3, 32, 32)
    got = load(f'aesthetic@{file}@{clip_folder}')(x, rows())
    with torch.no_grad():
        h = rewards.see(rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu'), x)
    assert h.norm(dim=-1) == pytest.approx([1, 1, 1], abs=1e-5)
    for place in (0, 2, 4, 6, 7):
        h = h @ weights[f'layers.{place}.weight'].T + weights[f'layers.{place}.bias']
    assert got == pytest.approx(h[:, 0].tolist(), abs=1e-4)
    del weights['layers.6.bias']
    save_file(weights, file)
    with pytest.raises(BadInput, match='6.bias'):
        load(f'aesthetic@{file}@{clip_folder}')


# --------------------------------------------------------------------------------------------------
# Servers

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


def wait_for(url):
    for _ in range(100):
        try:
            return rewards.check(url)
        except BadInput:
            time.sleep(0.05)
    raise AssertionError(f'{url} did not start')


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f'http://127.0.0.1:{server.server_port}'
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(*texts):
    """A server that gives one text after another; its `asked` holds what it was sent."""
    class Handler(http.server.BaseHTTPRequestHandler):
        left, asked = list(texts), []

        def do_POST(self):
            self.asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            text = self.left.pop(0) if len(self.left) > 1 else self.left[0]
            if text is None:
                return time.sleep(3)
            moved = text.startswith('/')
            self.send_response(503 if text == 'busy' else 302 if moved else 200)
            self.send_header('Location', text) if moved else None
            self.end_headers()
            try:
                for piece in text.split('|'):      # as if it came slowly
                    self.wfile.write(piece.encode())
                    time.sleep(0.1 * ('|' in text))
            except OSError:                        # nobody listens any more
                pass

        def log_message(self, *_):
            pass
    return Handler


def test_the_server_of_the_docs(tmp_path):
    """As its docstring says, in a process of its own; and then it is gone."""
    port = free_port()
    url = f'http://127.0.0.1:{port}'
    with pytest.raises(BadInput, match=f'{port}: no server answers there'):
        load(url)
    words = sys.executable, '-I', '-S', ROOT / 'docs' / 'reward_server.py', str(port)
    p = subprocess.Popen(words, stderr=subprocess.DEVNULL)  # -S: no packages are needed
    try:
        wait_for(url)
        x = torch.stack([torch.full((3, 8, 8), 0.5), torch.rand(3, 8, 8), torch.rand(3, 8, 8)])
        r = [{'prompt': 'a'}, {'prompt': 'é'}, {'prompt': 'plain', 'path': Path('/x'), 'z': x}]
        got = checked('mine', load(url), x, r, tmp_path)
        sizes = [len(rewards.encoded(p, 'PNG')) / 1000 for p in rewards.pictures(x)]
        assert got == [sizes[0], sizes[1], -sizes[2]] and not list(tmp_path.iterdir())
        body = json.dumps({'prompts': ['a'], 'images': ['bm8='], 'rows': []}).encode()
        with pytest.raises(urllib.error.HTTPError) as e:    # the words that `remote` passes on
            urllib.request.urlopen(url, body, timeout=5)
        assert e.value.code == 500 and 'ValueError' in e.value.read().decode()
    finally:
        p.kill()
        p.wait()


def test_what_is_sent(serve):
    handler, x = answers('{"rewards": [1, 2.5]}'), torch.rand(2, 3, 5, 7)
    r = [{'prompt': 'a', 'task': 't', 'n': 1, 'path': Path('/x')},
         {'prompt': 'é', 'source_image': '/y.png'}]
    assert remote(serve(handler))(x, r) == [1.0, 2.5]
    asked = handler.asked[0]
    assert asked['prompts'] == ['a', 'é']
    assert asked['rows'] == [{'prompt': 'a', 'task': 't', 'n': 1}, r[1]]
    sent = Image.open(io.BytesIO(base64.b64decode(asked['images'][1])))
    assert sent.format == 'PNG' and sent.tobytes() == rewards.pictures(x)[1].tobytes()


def test_a_server_is_tried_three_times(serve):
    handler = answers('busy', 'oops', '{"rewards": [1]}')
    assert remote(serve(handler), wait=0.01)(torch.rand(1, 3, 4, 4), rows(1)) == [1.0]
    assert len(handler.asked) == 3


@pytest.mark.parametrize('answer, words', [
    ('<html>', "answered '<html>'"), ('[1]', "answered '[1]'"), ('{"rewards": "a"}', 'answered'),
    ('{"rewards": [null]}', 'answered'), ('{"rewards": [1, 2]}', '2 rewards for 1'),
    ('busy', '503'),
    ('{"rewards": {"1": 1}}', 'answered'), ('{"rewards": [true]}', 'answered'),
    ('{"rewards": ["1"]}', 'answered'), ('{"rewards": [NaN]}', 'it gave nan'),
    ('{"rewards": [1e39]}', 'it gave 1e+39'), ('{"rewards": [1' + 400 * '0' + ']}', 'too large'),
    (9999 * '[', 'answered'), ('', "answered ''"), ('/elsewhere', '302'), ('/there', 'to /there'),
    ('{"rewards": [1' + 1100000 * ' ' + ']}', 'more than 1048576 bytes')])
def test_nonsense_from_a_server(serve, answer, words):
    handler = answers(answer)
    url = serve(handler)
    with pytest.raises(RewardError, match=re.escape(url)) as e:
        remote(url, wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))
    assert words in str(e.value) and len(handler.asked) == 3


def test_a_server_that_hangs_or_is_not_there(serve):
    start = time.time()
    silent = remote(serve(answers(None)), timeout=0.2, tries=2, wait=0.01)
    with pytest.raises(RewardError, match='2 times.*timed out.*0.2 s'):
        silent(torch.rand(1, 3, 4, 4), rows(1))
    assert time.time() - start < 2
    start, slow = time.time(), remote(serve(answers('|'.join(60 * ' '))), timeout=0.4, tries=1)
    with pytest.raises(RewardError, match='timed out'):     # no single read is longer than 0.1 s
        slow(torch.rand(1, 3, 4, 4), rows(1))
    assert time.time() - start < 2
    with pytest.raises(RewardError, match='refused'):
        remote('http://127.0.0.1:1', wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))


@pytest.mark.parametrize('url, words', [
    ('http://', 'no address'), ('http://127.0.0.1:99999', 'no address'),
    ('http://[::1', 'no address'), ('http://a b', 'no address'),
    ('http://127.0.0.1:1', 'no server answers'),
    ('http://there-is-no-such-host.invalid:80', 'there-is-no-such-host')])
def test_a_wrong_address_is_found_at_once(url, words):
    with pytest.raises(BadInput, match=words):
        rewards.check(url)


def test_what_does_not_come_back_is_not_waited_for():
    start = time.time()
    with pytest.raises(TimeoutError):
        rewards.within(0.1, partial(time.sleep, 2))
    assert time.time() - start < 1 and rewards.within(5, partial(int, '7')) == 7
    with pytest.raises(ZeroDivisionError):
        rewards.within(5, partial(divmod, 1, 0))


# --------------------------------------------------------------------------------------------------
# Trusting none

def saved(folder):
    with Image.open(folder / 'reward_failed.png') as im:
        grey = im.convert('RGB').getpixel((0, 0))[0]
    return grey, json.loads((folder / 'reward_failed.json').read_text())


@pytest.mark.parametrize('function, words, culprit', [
    (lambda images, rows: [1.0, 2.0, float('nan')], 'it gave nan', 2),
    (lambda images, rows: [1.0, math.inf, 0.0], 'it gave inf', 1),
    (lambda images, rows: [1.0], '1 values for 3 pictures', 0),
    (lambda images, rows: None, 'it gave None, not a list', 0),
    (lambda images, rows: '123', "it gave '123', not a list", 0),
    (lambda images, rows: {1: 1, 2: 2, 3: 3}, 'not a list', 0),
    (lambda images, rows: 3, 'it gave 3, not a list', 0),
    (lambda images, rows: [1.0, '2', 3.0], "it gave '2', which is no number", 1),
    (lambda images, rows: [1.0, 2.0, None], 'it gave None, which is no number', 2),
    (lambda images, rows: [1.0, {}, 2.0], 'which is no number', 1),
    (lambda images, rows: [1.0, 2j, 2.0], 'complex', 1),
    (lambda images, rows: [1, 10 ** 400, 2], 'too large', 1),
    (lambda images, rows: [1, 1e39, 2], 'it gave 1e+39', 1),
    (lambda images, rows: images.mean((2, 3)), 'only one element', 0),
    (lambda images, rows: sys.exit(3), 'SystemExit: 3', 0),
    (lambda images, rows: (1 / (row['prompt'] != 'two shapes') for row in rows),
     'ZeroDivisionError', 1)])
def test_a_bad_reward_stops_the_run(tmp_path, function, words, culprit):
    x = torch.stack([torch.full((3, 4, 4), v / 255) for v in (10, 20, 30)])
    r = [{**row, 'source_image': Path('/x')} for row in rows()]
    with pytest.raises(RewardError) as e:
        checked('mine.py:f', function, x, r, tmp_path / 'new')
    for word in ('mine.py:f', words, PROMPTS[culprit], str(tmp_path / 'new')):
        assert word in str(e.value)
    grey, note = saved(tmp_path / 'new')
    assert grey == 10 * culprit + 10 and note['prompt'] == PROMPTS[culprit] and words in note['why']


def test_a_broken_picture_is_no_reward(tmp_path):
    x = torch.rand(3, 3, 4, 4)
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(RewardError, match='not finite.*two shapes'):
        checked('jpeg', load('jpeg'), x, rows(), tmp_path)
    assert saved(tmp_path)[1]['prompt'] == 'two shapes'


def test_checked_takes_tensors_and_dicts(tmp_path):
    x = torch.rand(2, 3, 4, 4)
    for said in (torch.tensor([[1.], [2.]]), [{'right': 1, 'kept': 9}, {'right': 2}],
                 np.array([1, 2]), [torch.tensor(1), np.float16(2)], (True, 2)):
        assert checked('f', lambda images, rows: said, x, rows(2), tmp_path) == [1.0, 2.0]


BAD = """
import json, sys

def divide(images, rows):
    print('noise')
    return helper(rows)

def helper(rows):
    return [1 / 0 for row in rows]

def leave(images, rows):
    sys.exit('enough')

def many_lines(images, rows):
    raise ValueError('one\\ntwo' + 9999 * 'x')

def far(images, rows):
    return [json.loads('{') for row in rows]
"""


@pytest.mark.parametrize('name, words', [
    ('divide', r'ZeroDivisionError: division by zero \({}, line 9\)'),
    ('leave', r'SystemExit: enough \({}, line 12\)'),
    ('many_lines', r'ValueError: one twox{{100,300}}… \({}, line 15\)'),
    ('far', r'JSONDecodeError: .*\({}, line 18\)')])
def test_what_their_code_raises_is_one_line_with_their_line(name, words, tmp_path):
    file = tmp_path / 'bad.py'
    file.write_text(BAD)
    x, words = torch.rand(2, 3, 4, 4), words.format(re.escape(str(file)))
    with pytest.raises(RewardError, match=words) as e:
        checked(f'{file}:{name}', load(f'{file}:{name}'), x, rows(2), tmp_path)
    assert '\n' not in str(e.value) and len(str(e.value)) < 900
    with pytest.raises(RewardError, match=f'^score {file}:{name}: {words}'):    # by the same check
        judge, spec = load(f'{file}:{name}'), f'score {file}:{name}'
        files.judged(judge, x, rows(2), 1, SimpleNamespace(rank=0, size=1), spec)
    assert isinstance(e.value, BadInput)              # which ends a script without a traceback


def test_a_file_that_cannot_be_loaded_is_named_with_its_line(tmp_path):
    for text, words in (('x = 1\nimport no_such_thing\n', 'ModuleNotFoundError.*line 2'),
                        ('def f(:\n', 'SyntaxError: .*bad.py, line 1'),
                        ('\n\nraise SystemExit(0)\n', 'SystemExit: 0.*line 3')):
        (tmp_path / 'bad.py').write_text(text)
        with pytest.raises(BadInput, match=f'bad.py cannot be loaded: {words}'):
            rewards.check(f'{tmp_path}/bad.py:f')
    (tmp_path / 'bad.py').write_text('def f(images, rows):\n    return [1.0 for row in rows]\n')
    assert load(f'{tmp_path}/bad.py:f')(None, rows(2)) == [1.0, 1.0]    # once it is mended


def test_a_reward_changes_nothing_of_ours(tmp_path):
    def greedy(images, rows):
        rows[0]['prompt'] = 'mine'
        return images.mul_(0).sum((1, 2, 3))
    x, r = torch.ones(2, 3, 4, 4), rows(2)
    assert checked('greedy', greedy, x, r, tmp_path) == [0.0, 0.0]
    assert x.sum() == 96 and r == rows(2)


def test_a_score_that_fails_in_one_process_ends_them_all(monkeypatch):
    """Two processes, one after the other: what the first gathers is what both said."""
    def judge(images, rows):
        return [1 / (row['prompt'] != 'two shapes') for row in rows]
    sent = []
    x, r = torch.rand(3, 3, 4, 4), rows()
    monkeypatch.setattr(files, 'gather', lambda world, x: sent.append(x[0]) or list(sent))
    assert files.judged(judge, x, r, 1, SimpleNamespace(rank=0, size=2)) == 1.0
    for rank in (1, 0):                                     # it fails in 1, and is known in 0
        with pytest.raises(RewardError, match='score: ZeroDivisionError'):
            files.judged(judge, x, r, 1, SimpleNamespace(rank=rank, size=2))


def test_a_reward_that_fails_on_a_full_disk_says_both(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(RewardError, match='it gave nan.*could not be saved.*cannot be written'):
        checked('f', lambda i, r: [math.nan], torch.rand(1, 3, 4, 4), rows(1), tmp_path / 'file')
