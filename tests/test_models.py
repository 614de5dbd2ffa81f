"""What is loaded, and how it is kept: whole components, a base in 8 bits, prompts in their turn."""
from pipelines import *
from support.processes import device_of

FEW = ['--max_steps=2', '--eval_samples=2', '--show=1', '--score=', '--log_every=1', '--device=cpu',
       '--sample_steps=2', '--micro_batch=6', '--batch_size=6', '--save_every=1', '--ckpt_keep=9',
       "--routes=[dict(teacher='count',data='count'),dict(teacher='local_edit',data='local_edit')]",
       '--routes_per_step=sample', '--init_from=merge']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A real pipeline's folder with tiny weights."""
    path = tmp_path_factory.mktemp('model') / 'sd3'
    build('sd3').pipe.save_pretrained(path)
    return path


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / 'model'))


# -------------------- whole
def test_a_whole_folder_opens(folder):
    assert type(T.open_field(str(folder))) is T.SD3


def test_a_hub_id_may_be_of_a_network_alone():
    class Net:
        @staticmethod
        def from_pretrained(path, subfolder=None, **options):
            if (path, subfolder) not in (('a/net', None), ('a/pipe', 'transformer')):
                raise OSError(f'{path} has no {subfolder}')
            return path
    of = SimpleNamespace(dtype=torch.float32, prefix='transformer')
    assert [M.load_net(Net, k, of) for k in ('a/net', 'a/pipe')] == ['a/net', 'a/pipe']
    with pytest.raises(OSError, match='a/other has no transformer'):
        M.load_net(Net, 'a/other', of)


def test_too_little_memory_is_no_broken_model(folder, monkeypatch):
    import diffusers
    def fails(*a, **k):
        raise MemoryError('can not allocate')
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, 'from_pretrained', fails)
    with pytest.raises(MemoryError):
        T.open_field(str(folder))


@pytest.mark.parametrize('part', ['text_encoder', 'text_encoder_3'])
def test_a_text_encoder_that_lacks_a_tensor_is_refused(part, folder, tmp_path):
    model = copied(folder, tmp_path)
    file = model / part / 'model.safetensors'
    tensors = load_file(file)
    tensors.pop(next(k for k in tensors if k.endswith(('q_proj.weight', 'q.weight'))))
    save_file(tensors, file, {'format': 'pt'})
    with pytest.raises(BadInput, match=f'weights of its {part} lack 1 of the tensors'):
        T.open_field(str(model))


def test_a_text_encoder_of_another_shape_is_refused(folder, tmp_path):
    model = copied(folder, tmp_path)
    file = model / 'text_encoder' / 'model.safetensors'
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith('q_proj.weight'))
    tensors[key] = torch.zeros(3, 3)
    save_file(tensors, file, {'format': 'pt'})
    with pytest.raises(BadInput, match='weights of its text_encoder have other shapes for 1'):
        T.open_field(str(model))


@pytest.mark.parametrize('part', ['tokenizer', 'tokenizer_3'])
def test_a_tokenizer_without_its_files_is_refused(part, folder, tmp_path):
    model = copied(folder, tmp_path)
    for f in (model / part).iterdir():
        if f.name != 'tokenizer_config.json':
            f.unlink()
    with pytest.raises(BadInput, match=f'{part} knows no words|does not load'):
        T.open_field(str(model))


@pytest.mark.parametrize('part', ['transformer', 'vae'])
def test_weights_that_are_no_numbers_are_refused(part, folder, tmp_path):
    model = copied(folder, tmp_path)
    file = model / part / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] = math.nan
    save_file(tensors, file, {'format': 'pt'})
    with pytest.raises(BadInput, match='1 of its tensors are not finite'):
        T.open_field(str(model))


def test_a_part_that_is_missing_is_named(folder, tmp_path):
    model = copied(folder, tmp_path)
    shutil.rmtree(model / 'vae')
    with pytest.raises(BadInput, match='names a vae, but has no such folder'):
        T.open_field(str(model))


def test_pickles_are_not_read(folder, tmp_path):
    model = copied(folder, tmp_path)
    file = model / 'transformer' / 'diffusion_pytorch_model.safetensors'
    torch.save(load_file(file), file.with_suffix('.bin'))
    file.unlink()
    with pytest.raises(BadInput, match='does not load'):
        T.open_field(str(model))


# -------------------- a base in 8 bits
def small(**k):
    return T.open_field('data/shapes/base', 'bfloat16', max_sequence_length=77, **k)


def test_a_base_in_8_bits_rounds_its_weights_and_nothing_else():
    fields = [small(), small(base_storage='float8')]
    kept = [p for n, p in fields[1].net.named_parameters() if p.dtype == torch.float8_e4m3fn]
    whole = sum(p.numel() for p in fields[1].net.parameters())     # norms and their linears stay
    assert sum(p.numel() for p in kept) > 0.6 * whole
    assert fields[1].dtype == torch.bfloat16
    z, sigma = torch.randn(2, *fields[0].shape(24, 24)), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        cond = [fields[0].encode(p) for p in ('a red circle on white', 'two shapes on gray')]
        plain, coarse = (f.velocity(z, sigma, cond) for f in fields)
        for f in fields[:1]:                                   # the same rounding, made by hand
            for n, p in f.net.named_parameters():
                if dict(fields[1].net.named_parameters())[n].dtype == torch.float8_e4m3fn:
                    p.data = p.data.to(torch.float8_e4m3fn).to(p.dtype)
        by_hand = fields[0].velocity(z, sigma, cond)
    assert torch.equal(by_hand, coarse)
    off = (coarse - plain).norm() / plain.norm()
    assert 1e-3 < off < 0.1


@pytest.mark.parametrize('name', ['sd15', 'sd3', 'klein'])
def test_through_a_base_in_8_bits_goes_the_gradient_of_its_rounded_weights(name):
    """A convolution's backward reads the weight itself, which is in 8 bits again by then."""
    found = []
    for small_ in (True, False):
        field = build(name)
        if small_:
            M.store_small(field.net)
            low = {n for n, p in field.net.named_parameters() if p.dtype == torch.float8_e4m3fn}
        for n, p in field.net.named_parameters():
            if not small_ and n in low:
                p.data = p.data.to(torch.float8_e4m3fn).to(p.dtype)
        z = noise(field, 2, SIZES[0]).requires_grad_()
        v = field.velocity(z, torch.tensor([0.8, 0.3]), conditions(field, WORDS[:2])[0])
        v.square().sum().backward()
        found += [v.detach(), z.grad]
    assert low and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_adapters_on_a_base_in_8_bits_are_exact():
    field = small(base_storage='float8')
    teachers = [dict(name=k, lora=f'data/shapes/teachers/{k}') for k in ('count', 'local_edit')]
    models = T.Models(field, teachers)
    for t in teachers:
        for key, (A, B, scale) in merge_lora.read_adapter(t['lora']).items():
            layer = field.net.get_submodule(key)
            assert torch.equal(layer.lora_A[t['name']].weight, A.bfloat16())
            assert torch.equal(layer.lora_B[t['name']].weight, B.bfloat16())
    c = SimpleNamespace(rank=4, alpha=4.0, seed=0, betas=(0.9, 0.99), weight_decay=0.0,
                        ema_decay=0.0, ema_every=1)
    student = M.Student(field.net, c, field.targets)
    models.refresh()
    A = torch.cat([p.flatten() for n, p in student.params.items() if '.lora_A.' in n])
    assert A.dtype == torch.float32 and len(A.unique()) > 0.9 * len(A)      # not in steps of 8 bits
    assert A.std().item() == pytest.approx(1 / 4, rel=0.05)    # as PEFT draws it, 1 / rank
    z, sigma = torch.randn(2, *field.shape(24, 24)), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        batch = [SimpleNamespace(cond=field.encode('a red circle on white'))] * 2
        v = {k: models.velocity(k, batch, z, sigma) for k in ('base', 'student', 'count')}
    assert torch.equal(v['base'], v['student']) and not torch.equal(v['base'], v['count'])


def test_a_run_on_a_base_in_8_bits_resumes_exactly_and_is_sampled_from(tmp_path, monkeypatch):
    argv, lows, own = [*FEW, '--base_storage=float8', '--dtype=bfloat16'], [], sample.open_field
    monkeypatch.setattr(sample, 'open_field', lambda *a: lows.append(a[-1]) or own(*a))
    T.main([*argv, f'--out_dir={tmp_path}/run'])
    shutil.copytree(tmp_path / 'run', tmp_path / 'half', symlinks=True)
    shutil.rmtree(tmp_path / 'half' / 'step_000002')
    T.main([*argv, f'--out_dir={tmp_path}/half', '--init_from=resume'])
    losses = [[json.loads(x).get('loss') for x in (tmp_path / k / 'log.jsonl').open()]
              for k in ('run', 'half')]
    assert losses[0] == losses[1] and len(list(filter(None, losses[0]))) == 2
    sample.main([f'--ckpt={tmp_path}/run', '--prompt=a red circle', '--num=1', '--steps=2',
                 '--dtype=bfloat16', f'--out_dir={tmp_path}/samples'])
    assert (tmp_path / 'samples' / '0000_0.png').exists() and lows == ['float8']
    sample.main([f'--ckpt={tmp_path}/run', '--prompt=a red circle', '--num=1', '--steps=2',
                 "--base_storage=''", f'--out_dir={tmp_path}/samples'])
    assert lows[1:] == ['']


# -------------------- sizes
def test_routes_of_different_sizes_learn_in_one_run(tmp_path):
    routes = [dict(teacher='base', data='t2i', resolution=[24, 32]),
              dict(teacher='count', data='count', resolution=16), dict(teacher='base', data='open')]
    data = [f'data/shapes/{k}.csv' for k in ('t2i', 'count', 'open')]
    argv = [*FEW[:-3], f'--routes={routes}', f'--data={data}', '--eval_data=[]',
            '--init_from=base', f'--out_dir={tmp_path}']
    seen, velocity = set(), T.Models.velocity

    def watched(self, who, batch, z, *a, **k):
        if z.shape[1] == 1:                                    # the table's rehearsal
            return velocity(self, who, batch, z, *a, **k)
        seen.update((who, s.label, tuple(z.shape[2:])) for s in batch if s.label)
        assert {s.size for s in batch} == {tuple(z.shape[2:])}         # here a pixel is a latent
        return velocity(self, who, batch, z, *a, **k)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(T.Models, 'velocity', watched)
        T.main([*argv, '--routes_per_step=all', '--batch_size=6'])
    sizes = {'t2i': (24, 32), 'count': (16, 16), 'open': (24, 24)}
    assert seen == {(who, k, size) for k, size in sizes.items()
                    for who in ('student', 'count' if k == 'count' else 'base')}
    with pytest.raises(BadInput, match='larger than .* table of positions'):
        T.main([*argv, '--dry_run', f'--routes={[dict(routes[0], resolution=[24, 4096])]}'])
    with pytest.raises(BadInput, match='resolution: a number, or .height, width., not .big.'):
        T.main([*argv, '--dry_run', f'--routes={[dict(routes[0], resolution="big")]}'])


def test_a_route_without_sources_may_be_larger_than_one_that_edits(tmp_path):
    """A diptych is twice as wide; words alone have all of the table of positions."""
    routes = [dict(teacher='base', data='t2i', resolution=48),
              dict(teacher='local_edit', data='local_edit', resolution=24)]
    data = [f'data/shapes/{k}.csv' for k in ('t2i', 'local_edit')]
    argv = [*FEW[:-3], f'--data={data}', '--eval_data=[]', '--init_from=base', '--max_steps=1',
            '--routes_per_step=all', '--batch_size=2', f'--out_dir={tmp_path}']
    T.main([*argv, f'--routes={routes}'])
    with pytest.raises(BadInput, match='48 x 24.0 pixels with a source'):
        T.main([*argv, f'--routes={[routes[0], dict(routes[1], resolution=48)]}'])


def test_a_picture_of_another_size_keeps_its_shape_in_a_grid(tmp_path):
    rows = [[torch.zeros(3, 24, 24)], [torch.zeros(3, 24, 48)]]
    files.grid(rows, tmp_path / 'grid.png', scale=1)
    black = np.asarray(Image.open(tmp_path / 'grid.png').convert('L')) == 0
    assert black.sum() == 24 * 24 + 12 * 24


def test_where_words_see_the_source_a_row_without_one_is_refused_before_weights():
    """By its name, of the training rows and of the held-out ones."""
    family = M.find_family(T.FAMILIES, 'QwenImageEditPipeline')
    routes = [dict(data='edits', size=(32, 32))]

    def bucket(name, *sources):
        rows = files.Bucket(name)
        for x in sources:
            rows.sources += bool(x)
            rows.place.append(0)
        return rows
    whole, bare = bucket('edits', 'a.png', 'b.png'), bucket('edits_val', 'a.png', '')
    for own, held, fine in ((whole, whole, True), (bare, whole, False), (whole, bare, False)):
        data = files.Data(dict(edits=own), dict(edits=held))
        if fine:
            M.check_sizes(family, 'QwenImageEditPipeline', {}, routes, data)
        else:
            with pytest.raises(BadInput, match="bucket 'edits_val' has rows that have no source"):
                M.check_sizes(family, 'QwenImageEditPipeline', {}, routes, data)


def test_of_several_processes_none_is_given_anothers_gpu():
    with pytest.raises(BadInput, match="device = 'cuda:0': each process takes one of its own"):
        device_of('cuda:0', 1, several=True)


def test_a_processor_that_needs_a_package_is_named_before_weights(monkeypatch):
    index = dict(_class_name='QwenImageEditPipeline', tokenizer=['transformers', 'Qwen2Tokenizer'])
    reads = ['transformers', 'Qwen2VLProcessor']
    monkeypatch.setattr(M, 'find_spec', lambda name: None)
    M.check_processor(index)
    for key in ('processor', 'tokenizer'):
        with pytest.raises(BadInput, match='QwenImageEditPipeline .*pip install torchvision'):
            M.check_processor(index | {key: reads})
    monkeypatch.setattr(M, 'find_spec', lambda name: 'here')
    M.check_processor(index | dict(processor=reads))


@pytest.mark.parametrize('own, held', [(0, 2), (2, 0), (0, 0)])
def test_held_out_sources_need_a_model_that_edits_as_well(own, held):
    data = files.Data(dict(x=files.Bucket('x')), dict(x=files.Bucket('x_val')))
    data.buckets['x'].sources, data.held['x'].sources = own, held
    look = functools.partial(M.check_sizes, type(shared('flux')), 'FluxPipeline', {},
                             [dict(data='x', size=(64, 64))], data)
    if not own + held:
        return look()
    with pytest.raises(BadInput, match='FluxPipeline cannot edit'):
        look()


def test_a_run_and_what_is_drawn_from_it_open_the_model_alike(world, tmp_path, monkeypatch):
    told, ours, theirs = [], M.open_field, sample.open_field
    monkeypatch.setattr(M, 'open_field', lambda *a: told.append(a[2:]) or ours(*a))
    monkeypatch.setattr(sample, 'open_field', lambda *a: told.append(a[1:]) or theirs(*a))
    out = world.distil(tmp_path / 'run', max_steps=1, steps=1, eval_samples=1,
                       max_sequence_length=9, distilled_guidance=2.5)
    sample.main([f'--ckpt={out}', '--prompt=a', '--num=1', '--steps=1', '--device=cpu',
                 f'--out_dir={tmp_path}/pictures'])
    assert told == 2 * [('auto', torch.device('cpu'), '', 9, 2.5, '')]
