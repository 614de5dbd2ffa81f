"""Adapters on a model: fitted, merged, reduced, written, added to the base; and the script."""
from lora import *
from support.renames import pipeline_of

A, B = torch.randn(2, 6), torch.randn(5, 2)


# -------------------- written
def test_write_scales(tmp_path):
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    for m, alpha, scale in [((A, B), None, 1), ((A, B), 8, 2), ((A, B, 0.3), None, 0.3),
                            ((A, B, 0.3), 8, 0.3)]:
        merge_lora.write_adapter(tmp_path, {'a.b': m}, alpha)
        assert same(merge_lora.read_adapter(tmp_path), {'a.b': (A, B, scale)})
    tensors = load_file(tmp_path / merge_lora.FILES[0])
    assert torch.equal(tensors['transformer.a.b.lora_A.weight'], A)
    merge_lora.write_adapter(tmp_path, {'a': (A, B), 'b': (A[:2], B[:, :2])}, 8)
    assert same(merge_lora.read_adapter(tmp_path), {'a': (A, B, 2), 'b': (A[:2], B[:, :2], 4)})
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['target_modules'] == ['a', 'b']


@pytest.mark.parametrize('calls', [1, 2])
def test_a_write_that_fails_leaves_what_was_there(calls, tmp_path, monkeypatch):
    merge_lora.write_adapter(tmp_path / 'a', {'x': (A, B)})
    before, written = {f.name: f.read_bytes() for f in (tmp_path / 'a').iterdir()}, []

    def full(tensors, path, meta=None):
        written.append(path)
        Path(path).write_bytes(b'half of it')
        if len(written) == calls:
            raise safetensors.SafetensorError('No space left on device')
    monkeypatch.setattr(merge_lora, 'save_file', full)
    with pytest.raises(BadInput, match='could not be written.*No space left'):
        merge_lora.write_adapter(tmp_path / 'a', {'y': (A, B)})
    assert before == {f.name: f.read_bytes() for f in (tmp_path / 'a').iterdir()}
    monkeypatch.undo()
    (tmp_path / 'file').touch()
    for folder in tmp_path / 'file', tmp_path / 'file/below', tmp_path / ('x' * 300):
        with pytest.raises(BadInput, match='could not be written'):
            merge_lora.write_adapter(folder, {'y': (A, B)})


# -------------------- fitted
def test_kohya_1x1_convolution_written_flat():
    got = merge_lora.fit({'lora_unet_mid_proj_in': (A, B, 1.0)}, {'mid.proj_in': (5, 6, 1, 1)})
    assert [x.shape for x in got['mid.proj_in'][:2]] == [(2, 6, 1, 1), (5, 2, 1, 1)]
    got = merge_lora.fit({'a': (A[..., None, None], B[..., None, None], 1.0)}, {'a': (5, 6)})
    assert got['a'][0].shape == (2, 6)


def test_fit_refuses():
    ok = {'a': (A, B, 1.0)}
    for shapes in {'b': (5, 6)}, {'a': (5, 7)}, {'a': (4, 6)}, {'a': (5,)}, {'a': (5, 6, 3, 3)}:
        with pytest.raises(BadInput, match='me belongs to another model.*1 of 1.* a '):
            merge_lora.fit(ok, shapes, 'me')
    with pytest.raises(BadInput, match='a second time'):
        merge_lora.fit({'a.b': ok['a'], 'lora_unet_a_b': ok['a']}, {'a.b': (5, 6)})
    with pytest.raises(BadInput, match='7 of 7.*m4.*7 in all') as e:
        merge_lora.fit({f'm{i}': ok['a'] for i in range(7)}, {'a': (5, 6)})
    assert 'm5' not in str(e.value) and 'load and save' not in str(e.value)
    with pytest.raises(BadInput, match='different models.*a'):
        merge_lora.merge([ok, {'a': (A[:, :3], B, 1.0)}], [1, 1])


def test_model_folder_refusals(tmp_path):
    with pytest.raises(BadInput, match='no model folder'):
        merge_lora.model_shapes(tmp_path)
    (tmp_path / 'unet').mkdir()
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.model_shapes(tmp_path)
    name = tmp_path / 'unet/diffusion_pytorch_model.safetensors.index.json'
    for text, words in (('{"weight_map": {"a": "gone.safetensors"}}', 'gone.safetensors'),
                        ('{"weight_map": [', 'no index of weights'),
                        ('[1]', 'no index of weights')):
        name.write_text(text)
        with pytest.raises(BadInput, match=words):
            merge_lora.model_shapes(tmp_path)
    name.unlink()
    (tmp_path / 'unet/diffusion_pytorch_model.safetensors').write_bytes(b'half')
    with pytest.raises(BadInput, match='cannot be read; is it damaged'):
        merge_lora.model_shapes(tmp_path)
    for text in '[1]', '{', '{"_class_name": 3}':
        (tmp_path / 'model_index.json').write_text(text)
        with pytest.raises(BadInput, match='names no pipeline'):
            pipeline_of(tmp_path)


# -------------------- merged
@pytest.mark.parametrize('family', ['sd3', 'sd15'])
def test_merge_is_the_sum_of_deltas(family):
    net = net_of(build(family).pipe)
    a, b = make(net, family, 1, 4, 0.5), make(net, family, 2, 3, 2.0, lambda i: i % 2)
    assert set(b) < set(a)
    merged = merge_lora.merge([a, b], [0.7, -0.4])
    by_hand = added(added(net, {k: (A, B, 0.7 * s) for k, (A, B, s) in a.items()}),
                    {k: (A, B, -0.4 * s) for k, (A, B, s) in b.items()})
    assert (output(added(net, merged), family) - output(by_hand, family)).abs().max() < 1e-5
    assert {len(merged[k][0]) for k in b} == {7}
    assert {len(merged[k][0]) for k in set(a) - set(b)} == {4}
    assert all(m[2] == 1.0 for m in merged.values())
    full = merge_lora.merge([a, b], [0.7, -0.4], rank=9)  # more than the true rank
    assert same(full, merged, 1e-5)
    assert all(A.shape[0] == B.shape[1] == 9 and not A[7:].any() and not B[:, 7:].any()
               for A, B, _ in full.values())
    norm = sum(d.square().sum() for d in deltas(merged).values()).sqrt()
    assert abs(merge_lora.size(merged) - norm) < 1e-4 * norm


@pytest.mark.parametrize('shape', [(24, 17), (12, 6, 3, 3)])
def test_svd_is_the_optimum(shape):
    torch.manual_seed(0)
    A, B = torch.randn(8, *shape[1:]), torch.randn(shape[0], 8, *[1] * (len(shape) - 2))
    full = (0.3 * B.flatten(1) @ A.flatten(1)).double()
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    a, b = merge_lora.to_rank((A, B, 0.3), 3)
    assert a.shape == (3, *shape[1:]) and b.shape == (shape[0], 3, *[1] * (len(shape) - 2))
    got = b.flatten(1).double() @ a.flatten(1).double()
    assert torch.allclose(got, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5)
    assert abs((full - got).norm() - S[3:].norm()) < 1e-5 * S[3:].norm()
    balanced = torch.diag(S[:3]).float()
    assert torch.allclose(a.flatten(1) @ a.flatten(1).T, balanced, atol=1e-4)
    assert torch.allclose(b.flatten(1).T @ b.flatten(1), balanced, atol=1e-4)
    error = merge_lora.lost({'x': (A, B, 0.3)}, {'x': (a, b, 1.0)})
    assert abs(error - S[3:].norm() / S.norm()) < 1e-6 * error


def test_svd_of_zero_and_tall():
    a, b = merge_lora.to_rank((torch.randn(4, 6), torch.zeros(5, 4), 1.0), 2)
    assert not a.any() and not b.any()
    A, B = torch.randn(10, 6), torch.randn(5, 10)              # more rank than the matrix has
    a, b = merge_lora.to_rank((A, B, 1.0), 8)
    assert a.shape == (8, 6) and torch.allclose(b @ a, B @ A, atol=1e-4)


@pytest.mark.parametrize('small', [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize('rows, columns', [(30, 9), (9, 30)])
def test_small_losses_are_measured_and_not_lost_in_noise(small, rows, columns):
    """Known losses: orthogonal directions of sizes 1 and `small`, of which the second is cut."""
    Q = torch.linalg.qr(torch.randn(rows, 2, dtype=torch.float64))[0]
    P = torch.linalg.qr(torch.randn(columns, 2, dtype=torch.float64))[0].T
    exact = {'x': (P, Q * torch.tensor([1.0, small]), 1.0), 'y': (P, 0 * Q, 2.0)}
    cut = {'x': (P[:1], Q[:, :1] * 0.5, 2.0), 'y': (P, Q, 0.0)}
    want = small / math.sqrt(1 + small ** 2)
    assert abs(merge_lora.lost(exact, cut) / want - 1) < 1e-7
    assert merge_lora.lost(exact, exact) < 1e-15
    a, b = merge_lora.to_rank(exact['x'], 1)
    assert abs(merge_lora.lost(exact, cut | {'x': (a, b, 1.0)}) - want) < 2e-7


def test_decompositions_leave_the_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge_lora.merge([{'x': (A, B, 1.0)}], [1.0], 1)
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError):
            merge_lora.lost({'x': (A, B, 1.0)}, {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_overflows_is_refused():
    with pytest.raises(BadInput, match='not finite.* x'):
        merge_lora.merge([{'x': (A, B, 1.0)}], [1e300])
    with pytest.raises(BadInput, match='not finite.* x'):
        merge_lora.merge([{'x': (A, B * 1e30, 1e5)}], [1e5], 1)


# -------------------- added to the base
def save_model(pipe, folder, **kw):
    net = net_of(pipe)
    net.save_pretrained(folder / ('unet' if hasattr(pipe, 'unet') else 'transformer'), **kw)
    (folder / 'model_index.json').write_text(json.dumps(dict(_class_name=type(pipe).__name__)))
    return folder


@pytest.mark.parametrize('family, shard, dtype', [
    ('sd3', '40KB', torch.float32), ('sd15', '10GB', torch.float32),
    ('zimage', '10GB', torch.bfloat16)])
def test_into_base(family, shard, dtype, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe).to(dtype)
    folder = save_model(pipe, tmp_path / 'model', max_shard_size=shard)
    shapes = merge_lora.model_shapes(folder)
    assert {k: s for k, s in shapes.items() if k in shapes_of(net)} == shapes_of(net)
    adapter, out = make(net, family), tmp_path / 'new'
    assert len(merge_lora._shards(folder)) > 1 or shard != '40KB'
    merge_lora.add_to_base(folder, adapter, out)
    loaded = type(net).from_pretrained(out, torch_dtype=dtype).eval()
    assert not [p for p in tmp_path.iterdir() if 'partial' in p.name]
    for k, p in loaded.named_parameters():
        old, m = net.get_parameter(k), adapter.get(k.removesuffix('.weight'))
        want = old
        if m:
            want = (old.float() + deltas({'m': m})['m'].reshape(old.shape)).to(dtype)
        assert p.dtype == dtype and torch.equal(p, want), k
    if dtype == torch.float32:
        assert (output(loaded, family) - output(added(net, adapter), family)).abs().max() < 1e-5
    for bad in out, tmp_path:
        with pytest.raises(BadInput, match='not an empty folder'):
            merge_lora.add_to_base(folder, adapter, bad)
    with pytest.raises(BadInput, match='another model'):
        merge_lora.add_to_base(folder, {'nope': next(iter(adapter.values()))}, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


def test_into_base_removes_no_folder_but_its_own(tmp_path):
    pipe = build('zimage').pipe
    folder, adapter = save_model(pipe, tmp_path / 'model'), make(net_of(pipe), 'zimage')
    theirs = tmp_path / 'new.partial'
    theirs.mkdir()
    (theirs / 'thesis.txt').write_text('years of work')
    with pytest.raises(BadInput, match='new.partial.*remove it'):
        merge_lora.add_to_base(folder, adapter, tmp_path / 'new')
    assert (theirs / 'thesis.txt').read_text() == 'years of work'
    big = {k: (A, B * 1e20, 1e20) for k, (A, B, _) in adapter.items()}
    with pytest.raises(BadInput, match='overflows'):
        merge_lora.add_to_base(folder, big, tmp_path / 'other')
    assert not (tmp_path / 'other').exists() and not (tmp_path / 'other.partial').exists()


# -------------------- the script
def test_script(tmp_path, capsys):
    pipe = build('sd15').pipe
    net = net_of(pipe)
    model = save_model(pipe, tmp_path / 'model')
    a, b = make(net, 'sd15', 1), make(net, 'sd15', 2, r=3)
    pa, pb = pack(a, 'peft', tmp_path / 'a', 'sd15'), pack(b, 'kohya-unet', tmp_path / 'b', 'sd15')
    p = subprocess.run([sys.executable, 'merge_lora.py', f'--adapters={pa},{pb}', '--weights',
                        '0.7,0.3', f'--out={tmp_path}/m', f'--model={model}', '--rank=4'],
                       cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert p.returncode == 0 and '0.700' in p.stdout, p.stderr
    exact, cut = merge_lora.merge([a, b], [0.7, 0.3]), merge_lora.merge([a, b], [0.7, 0.3], 4)
    assert same(merge_lora.read_adapter(tmp_path / 'm'), cut, 1e-5)
    by_hand = sum((d - deltas(cut)[k]).square().sum() for k, d in deltas(exact).items()).sqrt()
    told = float(re.search('relative error of (.*)', p.stdout)[1])
    assert abs(told - by_hand / merge_lora.size(exact)) < 6e-3 * told
    merge_lora.main(['--adapters', f'{pa},{pb}', f'--out={tmp_path}/e', f'--model={model}'])
    assert same(merge_lora.read_adapter(tmp_path / 'e'), merge_lora.merge([a, b], [0.5, 0.5]))
    merge_lora.main([f'--adapters={pa},{pb}', f'--out={tmp_path}/t', f'--into_base={model}',
                     '--weights=1,1'])
    loaded = type(net).from_pretrained(tmp_path / 't').eval()
    assert (output(loaded, 'sd15') - output(added(added(net, a), b), 'sd15')).abs().max() < 1e-5
    want = output(added(net, a), 'sd15')  # without a model folder, names tell a UNet
    merge_lora.main([f'--adapters={pa}', f'--out={tmp_path}/u'])
    pipe.load_lora_weights(tmp_path / 'u')
    assert (output(net, 'sd15') - want).abs().max() < 2e-5


def test_script_renames_with_a_model_and_refuses_without(tmp_path):
    pipe = build('sd3').pipe
    model = save_model(pipe, tmp_path / 'model')
    rows = torch.randn(48, 2)
    first = {'joint_blocks.0.x_block.attn.qkv': (torch.randn(2, 16), rows, 0.5)}
    for i, tensors in enumerate([factors(first, 'diffusion_model.'),
                                 factors(first, 'lora_unet_', 'lora_down', 'lora_up', flat)]):
        save_file(tensors, tmp_path / f'{i}.safetensors')
        with pytest.raises(BadInput, match='--model=folder of the base for.*safetensors'):
            merge_lora.main([f'--adapters={tmp_path}/{i}.safetensors', f'--out={tmp_path}/out{i}'])
        merge_lora.main([f'--adapters={tmp_path}/{i}.safetensors', f'--out={tmp_path}/out{i}',
                         f'--model={model}'])
        got = deltas(merge_lora.read_adapter(tmp_path / f'out{i}'))
        want = deltas(first)['joint_blocks.0.x_block.attn.qkv'].chunk(3)
        for k, x in zip('qkv', want):
            assert (got[f'transformer_blocks.0.attn.to_{k}'] - x).abs().max() < 1e-6


@pytest.mark.parametrize('argv, words', [
    ([], 'give --adapters'), (['--adapters={a}'], 'give --adapters'),
    (['--adapters={a}', '--weights=1,2', '--out=x'], '1 adapters'),
    (['--adapters={a}', '--weights=nan', '--out=x'], 'finite'),
    (['--adapters={a}', '--weights=0', '--out=x'], 'from 1e-6 to 1e6'),
    (['--adapters={a}', '--weights=1e300', '--out=x'], 'from 1e-6 to 1e6'),
    (['--adapters={a}', '--weights=b', '--out=x'], 'numbers'),
    (['--adapters={a},{a}', '--weights=1,-1', '--out=x'], 'or cancel'),
    (['--adapters={a}', '--out={a}'], 'not an empty folder'),
    (['--adapters={a}', '--out={a}/adapter_config.json/x'], 'could not be written'),
    (['--adapters={a}', '--rank=-1', '--out=x'], 'negative'),
    (['--adapters={a}', '--out=x', '--model=m', '--into_base=b'], 'not both'),
    (['--adapter={a}', '--out=x'], 'did you mean adapters')])
def test_script_refuses(argv, words, tmp_path):
    merge_lora.write_adapter(tmp_path / 'a', {'x': (A, B)})
    with pytest.raises(BadInput, match=words):
        merge_lora.main([word.format(a=tmp_path / 'a') for word in argv])
    assert not Path('x').exists()
