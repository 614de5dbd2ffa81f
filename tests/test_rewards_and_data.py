"""rewards.py and data/omniedit/prepare.py."""
from common import *

PROMPTS = ['a red circle', 'two shapes', 'a blue square']


def rows(n=3):
    return [{'prompt': PROMPTS[i % 3]} for i in range(n)]


# -------------------------------------------------------------------------------- without weights

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
    assert checked('shapes', from_file(f'{ROOT}/data/shapes/world.py:score'), x, r, '/nowhere') == [1.0, 0.0]


def test_names(tmp_path):
    (tmp_path / 'neighbour.py').write_text('GAIN = 2\n')
    file = tmp_path / 'mine.py'
    file.write_text('from dataclasses import dataclass\nfrom neighbour import GAIN\n'
                    '@dataclass\nclass A:\n    x: int = 1\n'
                    'count = []\n'
                    'def brightness(images, rows):\n    return [GAIN * x.mean().item() for x in images]\n')
    mine = load(f'{file}:brightness')
    assert mine(torch.ones(2, 3, 4, 4), rows(2)) == [2.0, 2.0]
    assert load(f'{file}:brightness') is mine and str(tmp_path) not in sys.path
    for name, words in {'jpg': 'jpeg', 'clop': 'clip', f'{file}:brightnes': 'did you mean brightness',
                        f'{file}': 'file.py:function', f'{file}:count': 'brightness',
                        f'{tmp_path}/no.py:f': 'no such file', 'jpeg@/x': 'no @', 'clip@a@b@c': 'two @',
                        'aesthetic': 'weights_only=True', f'aesthetic@{tmp_path}/a.pth': 'weights_only=True',
                        f'aesthetic@{tmp_path}/a.safetensors': 'a.safetensors',
                        f'clip@{tmp_path}/none': 'none', f'pickscore@{tmp_path}/none': 'none'}.items():
        with pytest.raises(BadInput, match=re.escape(words)):
            load(name)
    with pytest.raises(BadInput, match='timeout'):
        load('jpeg', timeout=3)


# -------------------------------------------------------------------------------- models

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
    small = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
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
    model, text = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)
    for i in (0, 4, 18):                                    # one at a time, by the model's own forward
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
    (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')   # a pickle is never opened
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


# -------------------------------------------------------------------------------- servers

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
            self.send_response(503 if text == 'busy' else 200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass
    return Handler


@pytest.fixture
def readme_server():
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(# reward_server.*?)```', text, re.S)[1]
    names = {'__name__': 'reward_server'}
    exec(code, names)
    names['Handler'].log_message = lambda *_: None
    return names['Handler']


def test_the_readme_server(serve, readme_server, tmp_path):
    x = torch.stack([torch.full((3, 8, 8), v) for v in (0.0, 1.0, 1.0)])
    r = [{'prompt': 'night'}, {'prompt': 'day'}, {'prompt': 'a dark day', 'source_image': Path('/x'), 'z': x}]
    assert checked('mine', load(serve(readme_server)), x, r, tmp_path) == [0.0, 1.0, 0.0]
    assert not list(tmp_path.iterdir())
    body = json.dumps({'prompts': ['a'], 'images': ['bm8='], 'rows': [{}]}).encode()
    with pytest.raises(urllib.error.HTTPError) as e:        # the words that `remote` passes on
        urllib.request.urlopen(serve(readme_server), body, timeout=5)
    assert e.value.code == 500 and 'UnidentifiedImageError' in e.value.read().decode()


def test_what_is_sent(serve):
    handler, x = answers('{"rewards": [1, 2.5]}'), torch.rand(2, 3, 5, 7)
    r = [{'prompt': 'a', 'task': 't', 'n': 1, 'path': Path('/x')}, {'prompt': 'é', 'source_image': '/y.png'}]
    assert remote(serve(handler))(x, r) == [1.0, 2.5]
    asked = handler.asked[0]
    assert asked['prompts'] == ['a', 'é'] and asked['rows'] == [{'prompt': 'a', 'task': 't', 'n': 1}, r[1]]
    sent = Image.open(io.BytesIO(base64.b64decode(asked['images'][1])))
    assert sent.format == 'PNG' and sent.tobytes() == rewards.pictures(x)[1].tobytes()


def test_a_server_is_tried_three_times(serve):
    handler = answers('busy', 'oops', '{"rewards": [1]}')
    assert remote(serve(handler), wait=0.01)(torch.rand(1, 3, 4, 4), rows(1)) == [1.0]
    assert len(handler.asked) == 3


@pytest.mark.parametrize('answer, words', [
    ('<html>', "answered '<html>'"), ('[1]', "answered '[1]'"), ('{"rewards": "a"}', 'answered'),
    ('{"rewards": [null]}', 'answered'), ('{"rewards": [1, 2]}', '2 rewards for 1'), ('busy', '503'),
    ('', "answered ''")])
def test_nonsense_from_a_server(serve, answer, words):
    handler = answers(answer)
    url = serve(handler)
    with pytest.raises(RewardError, match=re.escape(url)) as e:
        remote(url, wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))
    assert words in str(e.value) and len(handler.asked) == 3


def test_a_server_that_hangs_or_is_not_there(serve):
    start = time.time()
    with pytest.raises(RewardError, match='2 times.*timed out.*0.2 s'):
        remote(serve(answers(None)), timeout=0.2, tries=2, wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))
    assert time.time() - start < 2
    with pytest.raises(RewardError, match='refused'):
        remote('http://127.0.0.1:1', wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))


# -------------------------------------------------------------------------------- trusting none

def saved(folder):
    with Image.open(folder / 'reward_failed.png') as im:
        return im.convert('RGB').getpixel((0, 0))[0], json.loads((folder / 'reward_failed.json').read_text())


@pytest.mark.parametrize('function, words, culprit', [
    (lambda images, rows: [1.0, 2.0, float('nan')], 'it gave nan', 2),
    (lambda images, rows: [1.0, math.inf, 0.0], 'it gave inf', 1),
    (lambda images, rows: [1.0], '1 values for 3 pictures', 0),
    (lambda images, rows: None, 'TypeError', 0),
    (lambda images, rows: [1 / (row['prompt'] != 'two shapes') for row in rows], 'ZeroDivisionError', 1)])
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
    assert checked('t', lambda i, r: torch.tensor([[1.], [2.]]), x, rows(2), tmp_path) == [1.0, 2.0]
    assert checked('d', lambda i, r: [{'right': 1, 'kept': 9}] * 2, x, rows(2), tmp_path) == [1.0, 1.0]


# -------------------------------------------------------------------------------- OmniEdit

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
    main = from_file(f'{ROOT}/data/omniedit/prepare.py:main')
    main([f'--out={tmp_path / "out"}', '--resolution=16', *words])
    return {p.stem: table(p) for p in (tmp_path / 'out').glob('*.csv')}


def test_omniedit(tmp_path, parquet, capsys):
    tasks = ['addition', 'removal', 'swap', 'attribute_modification', 'style', 'env']
    parquet([example(i, task) for task in tasks[:3] for i in range(30)], 'a')
    bad = [example(900, 'env', edited_img=png(9, (24, 40))), example(901, 'env', edited_img=png(50)),
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
    assert not errors and {k: len(b) for k, b in buckets.items()} == {k: len(got[k]) for k in buckets}
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
    source = parquet([example(i, task) for task in ('style', 'swap', 'env', 'removal') for i in range(9)])
    got = prepare(tmp_path, f'--source={source}', '--limit=8', '--held_out=0')
    kinds = lambda name: sorted(r['kind'] for r in got[name])
    assert kinds('local_edit') == ['removal'] * 2 + ['swap'] * 2
    assert kinds('global_edit') == ['env'] * 4 + ['style'] * 4
    assert got['local_edit_val'] == []


def test_omniedit_reads_no_further_than_the_limit(tmp_path, parquet):
    """A share that nobody wants goes to the others, and is not waited for: the hub's stream is 3 TB long."""
    rows = [example(i, task) for i in range(9) for task in ('style', 'env', 'swap')]
    source = parquet(rows + [{**example(9, 'teleport')}])              # it would stop there
    tasks = '--skip_tasks=["style", "addition", "removal", "attribute_modification"]'
    got = prepare(tmp_path, f'--source={source}', '--limit=6', '--held_out=0', tasks)
    assert [len(got[k]) for k in ('local_edit', 'global_edit')] == [6, 6]
    assert {r['kind'] for r in got['global_edit']} == {'env'}
    with pytest.raises(BadInput, match='leaves no task'):
        prepare(tmp_path, f'--source={source}', tasks, '--local_tasks=[]', '--global_tasks=["style"]')


def test_omniedit_bad_input(tmp_path, parquet):
    source = parquet([example(0, 'swap'), example(1, 'teleport')])
    for words, match in {(f'--source={source}',): 'teleport.*skip_tasks.*Known: addition',
                         (f'--source={tmp_path}/none',): 'no such file',
                         (f'--source={source}', '--held_out=1.0'): 'held_out',
                         (f'--source={source}', '--min_score=9.0', '--skip_tasks=["teleport"]'):
                         'no pair.*o_score'}.items():
        with pytest.raises(BadInput, match=match):
            prepare(tmp_path, *words)
    got = prepare(tmp_path, f'--source={source}', '--held_out=0.0', '--global_tasks=["style", "teleport"]')
    assert len(got['global_edit']) == 1
    parquet([{k: v for k, v in example(0, 'swap').items() if k != 'o_score'}], 'a')
    with pytest.raises(BadInput, match='o_score'):
        prepare(tmp_path, f'--source={source}')
    file = source / 'a.parquet'
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match='a.parquet cannot be read: fetch it again'):
        prepare(tmp_path, f'--source={source}')
