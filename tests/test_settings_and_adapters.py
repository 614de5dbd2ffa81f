"""configurator.py and merge_lora.py."""
from common import *
from pipelines import *

# -------------------- configurator
def settings():
    m = types.ModuleType('script')
    exec(
        'import os\nfrom pathlib import Path\n_hidden = 1\nlr = 1e-4\nsteps = 10\ncompile = False\n'
        'name = "x"\n'
        'seed: int | None = None\nwhich: str | int = "a"\nroutes = [1, 2]\npair = (1, 2)\ndef f(): pass\n',
        vars(m),
    )
    return collect(m)


def conf(tmp_path, text, name='c.py'):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_collect_takes_settings_only():
    defaults, kinds = settings()
    assert set(defaults) == {'lr', 'steps', 'compile', 'name', 'seed', 'which', 'routes', 'pair'}
    assert kinds['lr'] is float and isinstance(3, kinds['seed']) and isinstance(None, kinds['seed'])


@pytest.mark.parametrize(
    'argv, key, value',
    [
        (['--lr=1'], 'lr', 1.0),
        (['--lr', '1e-3'], 'lr', 1e-3),
        (['--lr', '-1.0'], 'lr', -1.0),
        (['--lr=1', '--lr=2'], 'lr', 2.0),
        (['--compile'], 'compile', True),
        (['--compile', '--steps=3'], 'compile', True),
        (['--compile', '--steps=3'], 'steps', 3),
        (['--compile', 'False'], 'compile', False),
        (['--compile=True'], 'compile', True),
        (['--name=a=b=c'], 'name', 'a=b=c'),
        (['--name=3'], 'name', '3'),
        (['--name='], 'name', ''),
        (['--name', 'a b'], 'name', 'a b'),
        (['--seed=None'], 'seed', None),
        (['--seed=3'], 'seed', 3),
        (['--which=3'], 'which', 3),
        (['--which=b'], 'which', 'b'),
        (['--which=True'], 'which', 'True'),
        (['--routes=(3,4)'], 'routes', [3, 4]),
        (['--routes=[]'], 'routes', []),
        (["--routes=[dict(data='t2i', weight=.5), {'a': dict(b=-1)}]"], 'routes',
         [{'data': 't2i', 'weight': 0.5}, {'a': {'b': -1}}]),
        (["--name=dict(**{'a': 1})"], 'name', "dict(**{'a': 1})"),
        (['--pair=[3,4]'], 'pair', (3, 4)),
        ([], 'seed', None),
    ],
)
def test_values(argv, key, value):
    got = getattr(configure(settings(), argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--stps=3'], ['stps', 'steps']),
        (['--f=3'], ['unknown setting f']),
        (['--_hidden=3'], ['unknown setting']),
        (['--steps=1.5'], ['steps', 'int', 'float', '1.5']),
        (['--steps=True'], ['int', 'bool']),
        (['--lr=True'], ['float', 'bool']),
        (['--compile=1'], ['bool', 'int']),
        (['--steps=None'], ['steps', 'None, which it does not accept']),
        (['--steps=ten'], ['int', "'ten'"]),
        (['--steps'], ['needs a value']),
        (['--lr', '--steps=3'], ['needs a value']),
        (['--seed=x'], ['int or None']),
        (['--routes=[open(1)]'], ['list', '[open(1)]']),
        (['missing.py'], ['no such config file', 'missing.py']),
        (['lr=3'], ['no such config file', '--lr=3']),
        (['-lr=3'], ['--lr=3']),
        (['steps', '3'], ['--steps']),
        (['.'], ['no such config']),
    ],
)
def test_refusals(argv, words):
    with pytest.raises(BadInput) as e:
        configure(settings(), argv)
    assert all(w in str(e.value) for w in words), e.value


def test_config_files_in_order(tmp_path):
    a = conf(tmp_path, 'import math\n_x = 3\nsteps = steps * 2\nlr = 1\nroutes.append(_x)\n', 'a.py')
    b = conf(tmp_path, 'steps += 1\nname = f"run{steps}"\n', 'b.py')
    s = settings()
    c = configure(s, [a, b, '--lr=3'])
    assert (c.steps, c.name, c.lr, c.routes) == (21, 'run21', 3.0, [1, 2, 3]) and type(c.lr) is float
    assert configure(s, ['--steps=1', a]).steps == 2 and configure(s, ['--compile', a]).compile is True
    assert s == settings()  # nothing leaked into the defaults
    configure(s, []).routes.append(9)
    assert s == settings()


@pytest.mark.parametrize(
    'text, words',
    [
        ('stesp = 3', ['stesp', 'steps']),
        ('def g(): pass', ['unknown setting g']),
        ('class G: pass', ['unknown setting G']),
        ('\nsteps = 1/0', ['line 2', 'ZeroDivisionError', 'division']),
        ('steps = 1\nlr = (', ['line 2', 'SyntaxError']),
        ('steps = "3"', ['steps', 'int', "'3'"]),
        ('steps = nope', ['line 1', 'nope']),
        ('lr = None', ['None, which']),
        ('steps = 2\n\nraise SystemExit(0)', ['line 3']),
    ],
)
def test_config_file_refusals(tmp_path, text, words):
    path = conf(tmp_path, text)
    with pytest.raises(BadInput) as e:
        configure(settings(), [path])
    assert all(w in str(e.value) for w in [path, *words]), e.value


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        configure(settings(), ['--steps=3', '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(f'--{k}={v!r}' in text for k, v in settings()[0].items())


def test_run_exit_codes(tmp_path):
    code = (
        'import sys; sys.argv[0] = "x/job.py"\nfrom configurator import *\n'
        'def main(argv): raise {}\nrun(main)'
    )
    for raised, rc, err in [
        ('BadInput("mend me")', 2, 'job.py: mend me\n'),
        ('KeyboardInterrupt', 130, 'job.py: interrupted\n'),
    ]:
        p = subprocess.run(
            [sys.executable, '-c', code.format(raised)], cwd=ROOT, capture_output=True, text=True
        )
        assert (p.returncode, p.stderr) == (rc, err)


@pytest.mark.parametrize('raised, code, err', [('BadInput("mend me")', 2, 'mend me'),
                                               ('ValueError("odd")', 1, 'ValueError: odd'),
                                               ('SystemExit(0)', 0, '')])
def test_of_several_processes_one_that_fails_ends_at_once(raised, code, err):
    """What runs at an exit may wait for processes that wait for this one; after a good end it may."""
    text = (f'import atexit, sys, time; atexit.register(time.sleep, {60 * (code > 0)})\n'
            f'from configurator import *\ndef main(argv): raise {raised}\nrun(main)')
    p = subprocess.run([sys.executable, '-c', text], cwd=ROOT, env=ONE_THREAD | dict(WORLD_SIZE='2'),
                       capture_output=True, text=True, timeout=30)
    assert p.returncode == code and err in p.stderr


# -------------------- LoRA files
TARGETS = {
    'sd3': 'to_q to_out.0 add_k_proj ff.net.2',
    'zimage': 'to_q to_out.0 w2',
    'flux': 'to_k to_out.0 proj_mlp proj_out',
    'sd15': 'to_q to_out.0 conv1 proj_in',
    'sdxl': 'to_v to_out.0 conv_shortcut',
}
WITH_UNET = ('sd15', 'sdxl')
prefix = lambda family: 'unet' if family in WITH_UNET else 'transformer'
net_of = lambda pipe: getattr(pipe, 'transformer', None) or pipe.unet


def shapes_of(net):
    return {
        k: tuple(m.weight.shape)
        for k, m in net.named_modules()
        if hasattr(m, 'weight') and m.weight is not None
    }


def make(net, family, seed=0, r=4, scale=0.5, keep=lambda i: True):
    g, ends = torch.Generator().manual_seed(seed), tuple('.' + t for t in TARGETS[family].split())
    names = [k for k in shapes_of(net) if ('.' + k).endswith(ends)]
    assert len(names) > 3
    rand = lambda *s: torch.randn(*s, generator=g) * 0.2
    return {k: (rand(r, *s[1:]), rand(s[0], r, *[1] * (len(s) - 2)), scale)
            for i, k in enumerate(names) for s in [shapes_of(net)[k]] if keep(i)}


def output(net, family):
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g)
    with torch.no_grad():
        if family == 'sd3':
            return net(
                rand(2, 16, 8, 8), rand(2, 7, 32), rand(2, 32), torch.tensor([500.0, 20.0]), return_dict=False
            )[0]
        if family == 'zimage':
            return torch.stack(
                net([rand(16, 1, 8, 8)], torch.tensor([0.5]), [rand(7, 16)], return_dict=False)[0]
            )
        if family == 'flux':
            return net(
                rand(2, 16, 64),
                rand(2, 7, 16),
                rand(2, 16),
                torch.tensor([0.5, 0.1]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(7, 3),
                guidance=torch.ones(2),
                return_dict=False,
            )[0]
        more = (
            dict(added_cond_kwargs=dict(text_embeds=rand(2, 16), time_ids=rand(2, 6)))
            if family == 'sdxl'
            else {}
        )
        return net(rand(2, 4, 8, 8), 500, rand(2, 7, 32 if more else 16), **more, return_dict=False)[0]


def added(net, adapter):
    """A copy of net with scale * B A added to its weights by hand: what every other road is compared with."""
    import copy
    net = copy.deepcopy(net)
    with torch.no_grad():
        for k, (A, B, s) in adapter.items():
            w = net.get_submodule(k).weight
            w += (s * B.flatten(1) @ A.flatten(1)).reshape(w.shape)
    return net


def deltas(adapter):
    return {k: s * B.flatten(1) @ A.flatten(1) for k, (A, B, s) in adapter.items()}


def same(a, b, tol=1e-6):
    a, b = deltas(a), deltas(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tol for k in a)


def pack(adapter, how, folder, family, alpha=None):
    """The adapter as the public tools write it."""
    folder.mkdir()
    r = next(iter(adapter.values()))[0].shape[0]
    alpha = next(iter(adapter.values()))[2] * r
    ab = lambda start, a='lora_A', b='lora_B', name=str: {
        f'{start}{name(k)}.{s}.weight': t.contiguous()
        for k, (A, B, _) in adapter.items()
        for s, t in ((a, A), (b, B))
    }
    alphas = lambda start, name=str: {f'{start}{name(k)}.alpha': torch.tensor(alpha) for k in adapter}
    flat, p = lambda k: k.replace('.', '_'), prefix(family)
    config = dict(peft_type='LORA', r=r, lora_alpha=alpha, target_modules=sorted(adapter))
    file = folder / 'any.safetensors'
    if how == 'peft':
        (folder / 'adapter_config.json').write_text(json.dumps(config))
        save_file(ab('base_model.model.'), folder / 'adapter_model.safetensors')
    elif how == 'diffusers':
        save_file(
            ab(f'{p}.'),
            folder / 'pytorch_lora_weights.safetensors',
            {'format': 'pt', 'lora_adapter_metadata': json.dumps({f'{p}.{k}': v for k, v in config.items()})},
        )
    elif how == 'diffusers-alpha':
        save_file(ab(f'{p}.', 'lora.down', 'lora.up') | alphas(f'{p}.'), file)
    elif how == 'diffusion_model':
        save_file(ab('diffusion_model.') | alphas('diffusion_model.'), file)
    elif how == 'diffusion_model-down':
        save_file(ab('diffusion_model.', 'lora_down', 'lora_up') | alphas('diffusion_model.'), file)
    elif how.startswith('lora_'):
        save_file(ab(how, 'lora_down', 'lora_up', flat) | alphas(how, flat), file)
    elif how == 'bare':
        save_file(ab('') | alphas(''), file)
    return folder


PACKAGINGS = [
    'peft',
    'diffusers',
    'diffusers-alpha',
    'diffusion_model',
    'diffusion_model-down',
    'lora_unet_',
    'lora_transformer_',
    'bare',
]


@pytest.mark.parametrize('family', TARGETS)
def test_packagings_and_both_loaders(family, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe)
    adapter, shapes, base = make(net, family), shapes_of(net), output(net, family)
    want = output(added(net, adapter), family)
    assert (want - base).abs().max() > 1e-3
    for how in PACKAGINGS:
        got = merge_lora.fit(merge_lora.read_adapter(pack(adapter, how, tmp_path / how, family)), shapes, how)
        assert same(got, adapter, 0) and all(
            t.dtype == torch.float32 for m in got.values() for t in m[:2]
        ), how
    for kw in {}, {'alpha': 3.0}:
        out = tmp_path / f'out{len(kw)}'
        merge_lora.write_adapter(out, got, prefix=prefix(family), **kw)
        assert {f.name for f in out.iterdir()} == {*merge_lora.FILES, 'adapter_config.json'}
        assert same(merge_lora.read_adapter(out), adapter, 1e-7) and same(
            merge_lora.read_adapter(out / merge_lora.FILES[1]), adapter, 1e-7
        )
        pipe.load_lora_weights(out)
        assert (output(net, family) - want).abs().max() < 2e-5
        pipe.unload_lora_weights()
        assert torch.equal(output(net, family), base)
        import peft, warnings
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # PEFT only warns of keys that are missing
            wrapped = peft.PeftModel.from_pretrained(net, out)
        assert (output(wrapped, family) - want).abs().max() < 2e-5
        net = wrapped.unload()


@pytest.mark.parametrize('family', ['sd3', 'sd15'])
def test_peft_patterns_and_rslora(family, tmp_path):
    """A file written by PEFT itself with every rank and alpha of its own."""
    import peft
    net = net_of(build(family).pipe)
    base = output(net, family)
    for i, kw in enumerate(
        [dict(rank_pattern={'to_q': 3, 'to_out.0': 5}, alpha_pattern={'to_q': 7}), dict(use_rslora=True)]
    ):
        config = peft.LoraConfig(
            r=4, lora_alpha=2, target_modules=['to_q', 'to_out.0', 'conv1'], init_lora_weights=False, **kw
        )
        wrapped = peft.get_peft_model(net, config)
        want = output(wrapped, family)
        wrapped.save_pretrained(tmp_path / str(i))
        net = wrapped.unload()
        adapter = merge_lora.fit(merge_lora.read_adapter(tmp_path / str(i)), shapes_of(net))
        assert (want - base).abs().max() > 1e-3 and (
            output(added(net, adapter), family) - want
        ).abs().max() < 2e-5
        merge_lora.write_adapter(
            tmp_path / f'w{i}', adapter, prefix=prefix(family)
        )  # different ranks: padded to one
        wrapped = peft.PeftModel.from_pretrained(net, tmp_path / f'w{i}')
        assert (output(wrapped, family) - want).abs().max() < 2e-5
        net = wrapped.unload()


def test_write_scales(tmp_path):
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    for m, alpha, scale in [
        ((A, B), None, 1),
        ((A, B), 8, 2),
        ((A, B, 0.3), None, 0.3),
        ((A, B, 0.3), 8, 0.3),
    ]:
        merge_lora.write_adapter(tmp_path, {'a.b': m}, alpha)
        assert same(merge_lora.read_adapter(tmp_path), {'a.b': (A, B, scale)})
    assert torch.equal(load_file(tmp_path / merge_lora.FILES[0])['transformer.a.b.lora_A.weight'], A)
    merge_lora.write_adapter(tmp_path, {'a': (A, B), 'b': (A[:2], B[:, :2])}, 8)
    assert same(merge_lora.read_adapter(tmp_path), {'a': (A, B, 2), 'b': (A[:2], B[:, :2], 4)})
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules'] == ['a', 'b']


def test_kohya_1x1_convolution_written_flat():
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    got = merge_lora.fit({'lora_unet_mid_proj_in': (A, B, 1.0)}, {'mid.proj_in': (5, 6, 1, 1)})
    assert got['mid.proj_in'][0].shape == (2, 6, 1, 1) and got['mid.proj_in'][1].shape == (5, 2, 1, 1)
    got = merge_lora.fit({'a': (A[..., None, None], B[..., None, None], 1.0)}, {'a': (5, 6)})
    assert got['a'][0].shape == (2, 6)


# -------------------- merge
@pytest.mark.parametrize('family', ['sd3', 'sd15'])
def test_merge_is_the_sum_of_deltas(family):
    net = net_of(build(family).pipe)
    a, b = make(net, family, 1, 4, 0.5), make(net, family, 2, 3, 2.0, lambda i: i % 2)
    assert set(b) < set(a)
    merged = merge_lora.merge([a, b], [0.7, -0.4])
    by_hand = added(
        added(net, {k: (A, B, 0.7 * s) for k, (A, B, s) in a.items()}),
        {k: (A, B, -0.4 * s) for k, (A, B, s) in b.items()},
    )
    assert (output(added(net, merged), family) - output(by_hand, family)).abs().max() < 1e-5
    assert {merged[k][0].shape[0] for k in b} == {7} and {merged[k][0].shape[0] for k in set(a) - set(b)} == {
        4
    }
    assert all(m[2] == 1.0 for m in merged.values())
    full = merge_lora.merge([a, b], [0.7, -0.4], rank=9)  # more than the true rank: still exact, surplus zero
    assert same(full, merged, 1e-5)
    assert all(
        A.shape[0] == B.shape[1] == 9 and not A[7:].any() and not B[:, 7:].any() for A, B, _ in full.values()
    )
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
    assert torch.allclose(a.flatten(1) @ a.flatten(1).T, torch.diag(S[:3]).float(), atol=1e-4)  # balanced
    assert torch.allclose(b.flatten(1).T @ b.flatten(1), torch.diag(S[:3]).float(), atol=1e-4)


def test_svd_of_zero_and_tall():
    a, b = merge_lora.to_rank((torch.randn(4, 6), torch.zeros(5, 4), 1.0), 2)
    assert not a.any() and not b.any()
    A, B = torch.randn(10, 6), torch.randn(5, 10)  # more rank than the matrix has
    a, b = merge_lora.to_rank((A, B, 1.0), 8)
    assert a.shape == (8, 6) and torch.allclose(b @ a, B @ A, atol=1e-4)


def save_model(pipe, folder, **kw):
    net = net_of(pipe)
    net.save_pretrained(folder / ('unet' if hasattr(pipe, 'unet') else 'transformer'), **kw)
    return folder


@pytest.mark.parametrize(
    'family, shard, dtype',
    [('sd3', '40KB', torch.float32), ('sd15', '10GB', torch.float32), ('zimage', '10GB', torch.bfloat16)],
)
def test_into_base(family, shard, dtype, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe).to(dtype)
    folder = save_model(pipe, tmp_path / 'model', max_shard_size=shard)
    assert {k: s for k, s in merge_lora.model_shapes(folder).items() if k in shapes_of(net)} == shapes_of(net)
    adapter, out = make(net, family), tmp_path / 'new'
    assert len(merge_lora._shards(folder)) > 1 or shard != '40KB'
    merge_lora.add_to_base(folder, adapter, out)
    loaded = type(net).from_pretrained(out, torch_dtype=dtype).eval()
    assert not [p for p in tmp_path.iterdir() if 'partial' in p.name]
    for k, p in loaded.named_parameters():
        old, m = net.get_parameter(k), adapter.get(k.removesuffix('.weight'))
        want = old if m is None else (old.float() + deltas({'m': m})['m'].reshape(old.shape)).to(dtype)
        assert p.dtype == dtype and torch.equal(p, want), k
    if dtype == torch.float32:
        assert (output(loaded, family) - output(added(net, adapter), family)).abs().max() < 1e-5
    for bad in out, tmp_path:
        with pytest.raises(BadInput, match='not an empty folder'):
            merge_lora.add_to_base(folder, adapter, bad)
    with pytest.raises(BadInput, match='another model'):
        merge_lora.add_to_base(folder, {'nope': next(iter(adapter.values()))}, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


# -------------------- refusals
A, B = torch.randn(2, 6), torch.randn(5, 2)
GOOD = {'transformer.x.y.lora_A.weight': A, 'transformer.x.y.lora_B.weight': B}


@pytest.mark.parametrize(
    'more, words',
    [
        ({'text_encoder.q.lora_A.weight': A}, ['text-encoder', 'text_encoder.q']),
        ({'lora_te1_q.lora_down.weight': A}, ['text-encoder', 'lora_te1_q']),
        ({'transformer.x.y.lora_magnitude_vector': B}, ['DoRA']),
        ({'lora_unet_x.dora_scale': B}, ['DoRA', 'lora_unet_x']),
        ({'lora_unet_x.hada_w1_a': B}, ['LoHa']),
        ({'lora_unet_x.lokr_w1': B}, ['LoKr', 'lora_unet_x.lokr_w1']),
        ({'transformer.x.y.lora_B.bias': B}, ['biases']),
        ({'diffusion_model.x.diff_b': B}, ['biases']),
        ({'transformer.z.lora_A.weight': A}, ['partner', 'z (no B)']),
        ({'transformer.z.lora_B.weight': B}, ['partner', 'z (no A)']),
        ({'transformer.z.alpha': torch.tensor(1.0)}, ['partner', 'z (no A)']),
        ({'transformer.x.y.lora_B.weight': B[:, :1]}, ['ranks', 'x.y']),
        ({'transformer.x.y.lora_A.weight': A * float('nan')}, ['finite', 'x.y']),
        ({'transformer.x.y.alpha': torch.tensor(float('inf'))}, ['finite']),
        ({'transformer.x.y.alpha': torch.tensor(0.0)}, ['alpha is zero']),
        ({'transformer.proj_out.weight': A}, ['no LoRA factors', 'proj_out']),
        ({'x.y.lora_A.weight': A}, ['twice']),
    ],
)
def test_read_refuses(more, words, tmp_path):
    save_file({k: t.clone().contiguous() for k, t in {**GOOD, **more}.items()}, tmp_path / 'a.safetensors')
    with pytest.raises(BadInput) as e:
        merge_lora.read_adapter(tmp_path / 'a.safetensors')
    assert all(w in str(e.value) for w in [str(tmp_path), *words]), e.value


def test_read_refuses_files(tmp_path):
    file = tmp_path / 'a.safetensors'

    def refused(path, *words):
        with pytest.raises(BadInput) as e:
            merge_lora.read_adapter(path)
        assert all(w in str(e.value) for w in words), e.value
    save_file({}, file), refused(file, 'no tensors')
    save_file(GOOD, file)
    assert set(merge_lora.read_adapter(tmp_path)) == {'x.y'}
    data = file.read_bytes()
    for broken in (data[:-8], data[:20], b'', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'):
        file.write_bytes(broken), refused(file, 'damaged', str(file))
    save_file(GOOD, file, {'lora_adapter_metadata': '{"transformer.r": 2'}), refused(file, 'damaged')
    save_file(GOOD, file, {'lora_adapter_metadata': '{}'}), refused(file, 'r or lora_alpha')
    save_file(
        GOOD, file, {'lora_adapter_metadata': '{"transformer.r": 3, "transformer.lora_alpha": 3}'}
    ), refused(file, 'rank 2', 'says 3')
    file.rename(tmp_path / 'adapter_model.safetensors'), refused(tmp_path, 'adapter_config.json')
    (tmp_path / 'adapter_model.safetensors').unlink()
    save_file({k.replace('transformer', 'base_model.model'): t for k, t in GOOD.items()}, file), refused(
        file, 'adapter_config.json'
    )
    for extra in dict(peft_type='LOHA'), dict(use_dora=True), dict(init_lora_weights='pissa_niter_4'):
        (tmp_path / 'adapter_config.json').write_text(json.dumps(dict(r=2, lora_alpha=2) | extra)), refused(
            file, str(file)
        )
    torch.save(GOOD, tmp_path / 'p.bin'), refused(tmp_path / 'p.bin', 'only .safetensors')


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in '', './none', '/none/x', '~/none-such/x', 'word', 'here/none/sub':
        (tmp_path / 'here').mkdir(exist_ok=True)
        monkeypatch.setattr(merge_lora, '_fetch', lambda *a: pytest.fail(f'asked the hub for {a}'))
        with pytest.raises(BadInput, match='adapter'):
            merge_lora.find(path)
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.find('here')
    (tmp_path / 'here/w.bin').touch()
    with pytest.raises(BadInput, match='w.bin'):
        merge_lora.find('here')
    order = ['z.safetensors', 'adapter_model.safetensors', 'pytorch_lora_weights.safetensors']
    for name in order:
        (tmp_path / 'here' / name).touch()
        assert merge_lora.find('here').name == name
    for name in order[1:]:
        (tmp_path / 'here' / name).unlink()
    (tmp_path / 'here/y.safetensors').touch()
    with pytest.raises(BadInput, match='y.safetensors, z.safetensors'):
        merge_lora.find('here')


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub as hub
    asked = []

    def snapshot(repo, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns, ignore_patterns))
        return str(tmp_path)

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)
    monkeypatch.setattr(hub, 'snapshot_download', snapshot), monkeypatch.setattr(
        hub, 'hf_hub_download', download
    )
    save_dir = tmp_path / 'Teacher/lora'
    merge_lora.write_adapter(save_dir, {'x': (A, B)})
    assert merge_lora.find('owner-x/repo/Teacher/lora') == save_dir / merge_lora.FILES[0]
    assert asked == [
        (
            'owner-x/repo',
            ['Teacher/lora/*.safetensors', 'Teacher/lora/adapter_config.json'],
            ['Teacher/lora/*/*'],
        )
    ]
    from fnmatch import fnmatch  # what the hub's filter does: nothing below the folder asked for
    assert fnmatch('Teacher/lora/sub/m.safetensors', asked[0][2][0]) and not fnmatch(
        'Teacher/lora/m.safetensors', asked[0][2][0]
    )
    asked.clear()
    assert (
        merge_lora.find(f'owner-x/repo/Teacher/lora/{merge_lora.FILES[1]}') == save_dir / merge_lora.FILES[1]
    )
    assert asked == [
        ('owner-x/repo', 'Teacher/lora/adapter_config.json'),
        ('owner-x/repo', f'Teacher/lora/{merge_lora.FILES[1]}'),
    ]
    with pytest.raises(BadInput, match='owner-x/repo/none.*by hand'):
        merge_lora.find('owner-x/repo/none')

    def fails(*a, **k):
        raise hub.errors.LocalEntryNotFoundError('no network\nsecond line')
    monkeypatch.setattr(hub, 'snapshot_download', fails)
    with pytest.raises(BadInput, match='owner-x/repo .*no network.*by hand.*hf auth login'):
        merge_lora.find('owner-x/repo')


def test_fit_refuses():
    ok = {'a': (A, B, 1.0)}
    for shapes in {'b': (5, 6)}, {'a': (5, 7)}, {'a': (4, 6)}, {'a': (5,)}, {'a': (5, 6, 3, 3)}:
        with pytest.raises(BadInput, match='me belongs to another model.*1 of 1.* a '):
            merge_lora.fit(ok, shapes, 'me')
    with pytest.raises(BadInput, match='a second time'):
        merge_lora.fit({'a.b': ok['a'], 'lora_unet_a_b': ok['a']}, {'a.b': (5, 6)})
    with pytest.raises(BadInput, match='7 of 7.*m4.*7 in all') as e:
        merge_lora.fit({f'm{i}': ok['a'] for i in range(7)}, {'a': (5, 6)})
    assert 'm5' not in str(e.value)
    with pytest.raises(BadInput, match='different models.*a'):
        merge_lora.merge([ok, {'a': (A[:, :3], B, 1.0)}], [1, 1])


def test_model_folder_refusals(tmp_path):
    with pytest.raises(BadInput, match='no model folder'):
        merge_lora.model_shapes(tmp_path)
    (tmp_path / 'unet').mkdir()
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.model_shapes(tmp_path)
    name = tmp_path / 'unet/diffusion_pytorch_model.safetensors.index.json'
    name.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(BadInput, match='gone.safetensors'):
        merge_lora.model_shapes(tmp_path)


# -------------------- the script
def script(*argv):
    p = subprocess.run(
        [sys.executable, str(ROOT / 'merge_lora.py'), *map(str, argv)], capture_output=True, text=True
    )
    return p.returncode, p.stdout + p.stderr


def test_script(tmp_path, capsys):
    pipe = build('sd15').pipe
    net = net_of(pipe)
    model = save_model(pipe, tmp_path / 'model')
    a, b = make(net, 'sd15', 1), make(net, 'sd15', 2, r=3)
    pa, pb = pack(a, 'peft', tmp_path / 'a', 'sd15'), pack(b, 'lora_unet_', tmp_path / 'b', 'sd15')
    rc, text = script(
        f'--adapters={pa},{pb}', '--weights', '0.7,0.3', f'--out={tmp_path}/m', f'--model={model}', '--rank=4'
    )
    assert rc == 0 and 'relative error' in text and '0.700' in text, text
    merge_lora.main(['--adapters', f'{pa},{pb}', f'--out={tmp_path}/e', f'--model={model}'])
    assert same(merge_lora.read_adapter(tmp_path / 'e'), merge_lora.merge([a, b], [0.5, 0.5]))
    assert same(merge_lora.read_adapter(tmp_path / 'm'), merge_lora.merge([a, b], [0.7, 0.3], 4), 1e-5)
    merge_lora.main([f'--adapters={pa},{pb}', f'--out={tmp_path}/t', f'--into_base={model}', '--weights=1,1'])
    loaded = type(net).from_pretrained(tmp_path / 't').eval()
    want = output(added(added(net, a), b), 'sd15')
    assert (output(loaded, 'sd15') - want).abs().max() < 1e-5
    merge_lora.main(
        [f'--adapters={pa}', f'--out={tmp_path}/u']
    )  # no model folder: the block names tell a UNet
    pipe.load_lora_weights(tmp_path / 'u')
    assert (output(net, 'sd15') - output(added(build('sd15').pipe.unet, a), 'sd15')).abs().max() < 2e-5
    capsys.readouterr()
    for argv, word in [
        ([], 'give --adapters'),
        ([f'--adapters={pa}'], 'give --adapters'),
        ([f'--adapters={pa}', '--weights=1,2', '--out=x'], '1 adapters'),
        ([f'--adapters={pa}', '--weights=nan', '--out=x'], 'finite'),
        ([f'--adapters={pa}', '--weights=a', '--out=x'], 'numbers'),
        ([f'--adapters={pa}', f'--out={tmp_path}/e'], 'not an empty folder'),
        ([f'--adapters={pa}', '--rank=-1', '--out=x'], 'negative'),
        ([f'--adapters={pb}', '--out=x'], '--model'),
        ([f'--adapter={pb}', '--out=x'], 'did you mean adapters'),
    ]:
        with pytest.raises(BadInput, match=word):
            merge_lora.main(argv)
    assert script()[0] == 2
