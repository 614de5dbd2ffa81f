"""The families as velocity fields, against diffusers' own pipelines with tiny random weights."""
from common import *
from pipelines import *

@functools.cache
def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def sources(field, size, folder, n):
    """n random pictures as the field takes them."""
    for i in range(n):
        picture(i, size).save(folder / f'{i}.png')
    with torch.no_grad():
        return [field.encode_source(str(folder / f'{i}.png'), *size) for i in range(n)]


def conditions(field, prompts, given=()):
    """(cond, empty) for guidance."""
    with torch.no_grad():
        return tuple([{**field.encode(p, bool(given)), **s} for p, s in zip(ps, given or [{}] * len(ps))]
                     for ps in (prompts, [''] * len(prompts)))


def noise(field, n, size, seed=0):
    return torch.randn(n, *field.shape(*size), generator=torch.Generator().manual_seed(seed))


def off(a, b):
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


def pipeline(name, prompts, eps, n, w, image=None, output='latent'):
    """What diffusers makes of the same noise; w is our guidance."""
    pipe, (h, wide) = shared(name).pipe, [8 * x for x in eps.shape[-2:]]
    k = dict(prompt=list(prompts), num_inference_steps=n, output_type=output, height=h, width=wide)
    k |= dict(image=image) if image else {}
    k |= {} if name in UNETS else dict(max_sequence_length=LENGTH)
    if name in ('flux', 'schnell', 'kontext'):
        k |= dict(latents=pipe._pack_latents(eps, *eps.shape), guidance_scale=shared(name).distilled_guidance,
                  true_cfg_scale=w, negative_prompt=[''] * len(prompts))
        k |= dict(max_area=h * wide, _auto_resize=False) if name == 'kontext' else {}
    else:
        k |= dict(latents=eps.clone(), guidance_scale=w - 1 if name in ('zimage', 'omni') else w)
    out = pipe(**k).images
    if output == 'latent' and 'true_cfg_scale' in k:
        out = pipe._unpack_latents(out, h, wide, pipe.vae_scale_factor)
    return out


def ours(name, cond, empty, eps, n, w, sigmas=None, warp=lambda v, z, s, a: v(z, s, a)):
    """Our rollout, on the pipeline's scale. `warp` may spoil the velocity, `sigmas` the schedule."""
    field, size = shared(name), [8 * x for x in eps.shape[-2:]]
    S, scale = field.sigmas(n, *size) if sigmas is None else sigmas, 1.0
    if name == 'sd15':                                         # this DDIM stops at the table's first entry
        f = field.pipe.scheduler.alphas_cumprod[0]
        a, b = f.sqrt(), (1 - f).sqrt()
        S, scale = torch.cat([S[:-1], (b / (a + b))[None]]), a + b

    def velocity(z, s, batch):
        return guided(field, z, s, [b.cond for b in batch], [b.empty for b in batch], w)
    batch = [SimpleNamespace(cond=c, empty=e) for c, e in zip(cond, empty)]
    z = field.first_state(eps, n, *size)
    return T.denoise(lambda batch, z, s: warp(velocity, z, s, batch), batch, z, S) * scale


def guided(field, z, s, cond, empty, w):
    """By a model that is nothing but this field."""
    batch = [SimpleNamespace(cond=c, empty=e) for c, e in zip(cond, empty or [None] * len(cond))]
    m = SimpleNamespace(full={}, field=field, switch=lambda who: None)
    return T.Models.velocity(m, 'base', batch, z, s, w)


def bar(name):
    return 5e-4 if name in UNETS else 1e-4                     # UNets' latents are up to 100 here


# -------------------- 1. the same pictures as the pipeline
@pytest.mark.parametrize('name', NATIVE)
def test_sampling_is_the_pipelines(name):
    field = shared(name)
    for n, size, batch, w in ((1, 0, 3, 3.0), (4, 0, 1, 1.0), (7, 0, 3, 3.0), (1, 1, 1, 1.0), (4, 1, 3, 3.0),
                              (7, 1, 3, 1.0)):
        eps = noise(field, batch, SIZES[size])
        cond, empty = conditions(field, WORDS[:batch])
        theirs = pipeline(name, WORDS[:batch], eps, n, w)
        assert off(ours(name, cond, empty, eps, n, w), theirs) < bar(name), (n, size, batch, w)
        other = ours(name, cond, empty, eps, n, 4.0 - w)
        assert off(other, theirs) > 3 * bar(name)              # guidance is not a trifle here


@torch.no_grad()
@pytest.mark.parametrize('name', ['kontext', 'omni'])
def test_editing_is_the_pipelines(name, tmp_path):
    field = shared(name)                                       # our batch of three, their edits one by one
    for n, size, w in ((1, 0, 3.0), (4, 1, 1.0), (7, 0, 3.0), (4, 0, 1.0)):
        size = LARGER[size]
        eps = noise(field, 3, size)
        given = sources(field, size, tmp_path, 3)
        if name == 'omni':                                     # its pipeline rounds sources to bfloat16
            for i, g in enumerate(given):
                x = field.pipe.image_processor.preprocess(picture(i, size), *size)
                theirs = field.pipe.prepare_image_latents([x], 1, 'cpu', torch.float32)[0][0][:, 0]
                assert off(g['source'], theirs) < 2e-2
                g['source'] = theirs
        z = ours(name, *conditions(field, WORDS, given), eps, n, w)
        for i in range(3):
            theirs = pipeline(name, WORDS[i:i + 1], eps[i:i + 1], n, w, picture(i, size))
            assert off(z[i:i + 1], theirs) < bar(name), (n, size, w, i)
        swapped = ours(name, *conditions(field, WORDS, given[1:] + given[:1]), eps, n, w)
        assert off(swapped, z) > 10 * bar(name)


@pytest.mark.parametrize('name', NATIVE)
def test_a_wrong_sign_time_or_schedule_is_noticed(name):
    field, n, size = shared(name), 4, SIZES[0]
    eps = noise(field, 1, size)
    cond, empty = conditions(field, WORDS[:1])
    theirs, S = pipeline(name, WORDS[:1], eps, n, 1.0), field.sigmas(n, *size)
    for wrong in (dict(warp=lambda v, z, s, a: -v(z, s, a)), dict(sigmas=S ** 1.5),
                  dict(warp=lambda v, z, s, a: v(z, S[0] - s + 0.01, a))):
        assert off(ours(name, cond, empty, eps, n, 1.0, **wrong), theirs) > 3 * bar(name)


def test_sd3_edits_beside_the_source_or_in_its_channels(tmp_path):
    for name in ('sd3', 'sd3-wide'):
        field, size = shared(name), SIZES[0]
        z, s = noise(field, 2, size), torch.tensor([0.3, 0.8])
        given = sources(field, size, tmp_path, 2)
        cond, _ = conditions(field, WORDS[:2], given)
        clean = torch.stack([g['source'] for g in given])
        text, _, pooled, _ = field.pipe.encode_prompt(
            WORDS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        call = functools.partial(field.net, timestep=1000 * s, encoder_hidden_states=text,
                                 pooled_projections=pooled)
        with torch.no_grad():
            v = field.velocity(z, s, cond)
            if name == 'sd3':
                by_hand = call(torch.cat([clean, z], 3)).sample[..., 6:]
            else:
                by_hand = call(torch.cat([z, clean], 1)).sample
            assert off(v, by_hand) < 1e-6
            assert off(field.velocity(z, s, conditions(field, WORDS[:2], given[::-1])[0]), v) > 1e-2
            bare = conditions(field, WORDS[:2])[0]
            by_hand = call(z if name == 'sd3' else torch.cat([z, 0 * z], 1)).sample
            assert off(field.velocity(z, s, bare), by_hand) < 1e-6


# -------------------- 2. the schedule
@pytest.mark.parametrize('name', NATIVE)
def test_sigmas_are_the_pipelines(name):
    field, pipe = shared(name), shared(name).pipe
    module = sys.modules[type(pipe).__module__]
    for n in range(1, 51):
        h, w = size = SIZES[n % 2]
        s, S = copy.deepcopy(pipe.scheduler), field.sigmas(n, h, w)
        k = {}
        if name not in UNETS:                                  # 16 x 16 pixels are a token
            c = s.config
            mu = module.calculate_shift(h * w // 256, c.base_image_seq_len, c.max_image_seq_len, c.base_shift,
                                        c.max_shift)
            if not name.startswith('sd3'):
                k = dict(sigmas=np.linspace(1, 1 / n, n), mu=mu)
            elif c.use_dynamic_shifting:
                k = dict(mu=mu)
        if n in (1, 3, 12):
            pipeline(name, WORDS[:1], noise(field, 1, size), n, 1.0)
            s = pipe.scheduler                                 # as a real run left it
        else:
            module.retrieve_timesteps(s, n, 'cpu', **k)
        if name in ('sd15', 'sd15-v'):
            a = s.alphas_cumprod[s.timesteps].sqrt()
            b = (1 - a ** 2).sqrt()
            expected = torch.cat([b / (a + b), torch.zeros(1)])
        else:
            expected = s.sigmas / (1 + s.sigmas) if name in UNETS else s.sigmas
        assert S.dtype == torch.float32 and off(S, expected) < 1e-6, n
        assert (S[1:] < S[:-1]).all() and S[-1] == 0


# -------------------- 3. pictures, prompts, batches
@torch.no_grad()
@pytest.mark.parametrize('name', NATIVE)
def test_pictures_are_coded_as_the_pipeline_does(name, tmp_path):
    field, size = shared(name), SIZES[1]
    eps, low = noise(field, 2, size), name == 'omni'           # whose VAE is in bfloat16
    z = pipeline(name, WORDS[:2], eps, 1, 1.0)
    shown = pipeline(name, WORDS[:2], eps, 1, 1.0, output='pt').float()
    assert off(field.decode(z), shown) < (5e-2 if low else 1e-5) and 0 <= shown.min() < shown.max() <= 1

    x, c = field.pipe.image_processor.preprocess(picture(0, size), *size), field.vae.config
    z = field.vae.encode(x.to(field.vae.dtype)).latent_dist.mode().float()
    picture(0, size).save(tmp_path / 'a.png')
    mine = field.encode_image(files.load_image(tmp_path / 'a.png', *size)[None])[0]
    assert off(mine[None], (z - (c.shift_factor or 0)) * c.scaling_factor) < (2e-2 if low else 1e-5)
    assert mine.shape == field.shape(*size) and mine.dtype == torch.float32 and mine.std() > 0.01


@pytest.mark.parametrize('name', list(BUILD))
def test_cached_prompts_and_batches_change_nothing(name, tmp_path):
    field, size = shared(name), SIZES[0]
    z, s = noise(field, 3, size), torch.tensor([0.9, 0.55, 0.2])
    for edit in (False, True)[:1 + bool(field.can_edit)]:
        given = sources(field, size, tmp_path, 3) if edit else []
        rows = [dict(prompt=p, source_image=str(tmp_path / f'{i}.png') * edit) for i, p in enumerate(WORDS)]
        prompts = M.Prompts(field)
        prompts.add([dict(r, prompt=p) for r, p in zip(rows * 2, ['another prompt', *WORDS[::-1]])])
        batch = [SimpleNamespace(row=r) for r in rows]
        prompts.condition(batch, *size)
        cached, cached_empty = [s.cond for s in batch], [s.empty for s in batch]
        with torch.no_grad():
            v = guided(field, z, s, cached, cached_empty, 2.0)
            for i in range(3):
                one = slice(i, i + 1)
                fresh = guided(field, z[one], s[one], *conditions(field, WORDS[one], given[one]), 2.0)
                assert off(fresh, v[one]) < 1e-5 * (1 + v.abs().max())
            mixed = guided(field, z, s, cached[1:] + cached[:1], cached_empty, 2.0)
        assert off(mixed, v) > 1e-2                            # the prompts do count


@pytest.mark.parametrize('name', ['sd3', 'omni', 'sdxl'])
def test_words_are_brought_to_the_device_once(name):
    field = copy.copy(shared(name))
    prompts = M.Prompts(field)
    row = dict(prompt=WORDS[0], source_image='')
    prompts.condition([SimpleNamespace(row=row)], *SIZES[0])
    field.device = torch.device('meta')                        # anything that is not the CPU
    batch = [SimpleNamespace(row=row) for _ in range(3)]
    prompts.condition(batch, *SIZES[0])
    for some in ([s.cond for s in batch], [s.empty for s in batch]):
        found = [x for c in some for v in c.values() for x in (v if isinstance(v, list) else [v])]
        assert found and all(x.device.type == 'meta' for x in found)
        assert all(c['text'] is some[0]['text'] for c in some)


# -------------------- 4. adapters
def random_adapter(net, targets, seed, rank=4, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    found = {k: m.weight for k, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
             and any(k.endswith('.' + t) for t in targets)}
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.2
    return {k: (draw(rank, *w.shape[1:]), draw(len(w), rank, *[1] * (w.dim() - 2)), scale)
            for k, w in found.items()}


def probe(field, folder=None):
    """States and conditions to ask for velocities at."""
    given = sources(field, SIZES[0], folder, 2) if folder and field.can_edit else []
    return noise(field, 2, SIZES[0]), torch.tensor([0.8, 0.3]), conditions(field, WORDS[:2], given)[0]


LEARNER = SimpleNamespace(rank=3, alpha=6.0, seed=0, betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.0)


def ask(models, who, z, s, cond):
    return models.velocity(who, [SimpleNamespace(cond=c) for c in cond], z, s)


def household(name, tmp_path):
    """A field with two teachers and a student on it: (field, models, student, probe, the base's velocity)."""
    field = build(name)
    at = probe(field, tmp_path)
    with torch.no_grad():
        bare = field.velocity(*at)
    for i in range(2):
        adapter = random_adapter(field.net, field.targets, i)
        merge_lora.write_adapter(tmp_path / f't{i}', adapter, prefix=field.prefix)
    models = T.Models(field, [dict(name=f't{i}', lora=str(tmp_path / f't{i}')) for i in range(2)])
    student = M.Student(field.net, LEARNER, field.targets)
    models.refresh(), models.switch('student')
    torch.manual_seed(5)
    for p in student.params.values():                          # as after some training
        p.data.normal_(0, 0.2)
    return field, models, student, at, bare


@pytest.mark.parametrize('name', EACH)
def test_student_and_teachers_share_a_base(name, tmp_path):
    field, models, student, at, bare = household(name, tmp_path)
    calls = []
    watched = field.net.get_submodule(student.names[0]).lora_A['student']
    watched.register_forward_hook(lambda *a: calls.append(1))

    def gradients(between):
        v = ask(models, 'student', *at)
        with torch.no_grad():
            for who in between:
                ask(models, who, *at)
        seen = len(calls)
        v.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in student.params.items() if p.grad is not None}
        for n, p in field.net.named_parameters():
            assert '.student.' in n or (p.grad is None and not p.requires_grad)
            p.grad = None
        return v.detach(), grads, len(calls) - seen

    v, alone, _ = gradients([])
    idle = {n for n in student.params if n not in alone or not alone[n].any()}
    assert all('.1.attn.add_q_proj.' in n for n in idle)       # SD3 drops the last block's text output
    _, among, again = gradients(['t0', 'base', 't1'])
    assert again == 0 and all(torch.equal(alone[n], among[n]) for n in alone)
    field.net.enable_gradient_checkpointing()
    _, recomputed, again = gradients(['t0', 't1', 'base'])
    assert again > 0, 'nothing was recomputed: checkpointing was off'
    assert all(torch.allclose(alone[n], recomputed[n], rtol=1e-5, atol=1e-6) for n in alone)

    with torch.no_grad():
        assert torch.equal(ask(models, 'base', *at), bare)    # bit for bit
        teachers = [ask(models, f't{i}', *at) for i in range(2)]
        assert torch.equal(ask(models, 'student', *at), v)
    for i, t in enumerate(teachers):                           # what adding the deltas to the weights gives
        other = build(name)
        for k, (A, B, scale) in random_adapter(other.net, other.targets, i).items():
            other.net.get_submodule(k).weight.data += scale * (B.flatten(1) @ A.flatten(1))
        with torch.no_grad():
            assert off(other.velocity(*at), t) < 1e-4 * (1 + t.abs().max())
        assert off(t, bare) > 1e-2 and off(t, v) > 1e-2
    assert off(*teachers) > 1e-2 and off(v, bare) > 1e-2


def test_in_bfloat16_a_layer_of_the_student_reads_what_the_base_reads(tmp_path):
    """PEFT would make a float32 copy of each input, which autocast rounds back: the same numbers."""
    field, models, student, (z, s, cond), _ = household('sd3', tmp_path)
    field.net.to(torch.bfloat16), setattr(field, 'dtype', torch.bfloat16)
    for p in student.params.values():
        p.data = p.data.float()
    seen = []
    field.net.get_submodule(student.names[0]).lora_A['student'].register_forward_hook(
        lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    v = ask(models, 'student', z, s, cond)
    for layer in models.layers:
        layer.cast_input_dtype_enabled = True
    assert torch.equal(ask(models, 'student', z, s, cond), v)
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize('name', EACH)
def test_a_saved_student_loads_in_diffusers_and_peft(name, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict
    field, models, student, at, bare = household(name, tmp_path)
    student.ema = {n: p.detach() * 0.5 for n, p in student.params.items()}
    student.save(tmp_path / 'saved', field.prefix)
    with torch.no_grad():
        now = ask(models, 'student', *at)
        with student.wearing(student.ema):
            average = ask(models, 'student', *at)
        assert torch.equal(ask(models, 'student', *at), now) and off(now, average) > 1e-2
        for folder, v in ((tmp_path / 'saved', now), (tmp_path / 'saved' / 'ema', average)):
            for load in (lambda f: f.pipe.load_lora_weights(str(folder)),
                         lambda f: PeftModel.from_pretrained(f.net, str(folder)),
                         lambda f: T.Models(f, [dict(name='x', lora=str(folder))])):
                other = build(name)
                load(other)
                (there,) = {n.split('.')[-2] for n, _ in other.net.named_parameters() if '.lora_A.' in n}
                got = get_peft_model_state_dict(other.net, adapter_name=there)
                tensors = student.tensors() if folder.name == 'saved' else student.ema
                assert {n.replace('.student.', '.') for n in tensors} == set(got)
                assert all(torch.equal(got[n.replace('.student.', '.')], x) for n, x in tensors.items())
                assert off(other.velocity(*at), v) < 1e-5      # a sum's order depends on alignment


@pytest.mark.parametrize('name', EACH)
def test_adapters_of_every_packaging_load_exactly(name, tmp_path):
    field = build(name)
    at = probe(field)
    targets = [*field.targets, *['conv1', 'proj_in'] * (name in UNETS)]    # convolutions as well
    adapter, rank, alpha = random_adapter(field.net, targets, 3), 4, 8.0
    whole = tmp_path / 'whole'
    merge_lora.write_adapter(whole, adapter, alpha, field.prefix)
    paths = [tmp_path / k for k in ('peft', 'diffusers.safetensors', 'a.safetensors', 'b.safetensors')]
    paths[0].mkdir()
    for f in ('adapter_model.safetensors', 'adapter_config.json'):
        shutil.copy(whole / f, paths[0])
    shutil.copy(whole / 'pytorch_lora_weights.safetensors', paths[1])
    for path, name_of, a, b in (
            (paths[2], lambda k: f'diffusion_model.{k}', 'lora_A', 'lora_B'),
            (paths[3], lambda k: 'lora_unet_' + k.replace('.', '_'), 'lora_down', 'lora_up')):
        parts = lambda A, B: ((f'{a}.weight', A), (f'{b}.weight', B), ('alpha', torch.tensor(alpha)))
        safetensors.torch.save_file({f'{name_of(k)}.{part}': x for k, (A, B, _) in adapter.items()
                                     for part, x in parts(A, B)}, path)
    models = T.Models(field, [dict(name=f't{i}', lora=str(p)) for i, p in enumerate(paths)])
    other = build(name)
    for k, (A, B, scale) in adapter.items():
        w = other.net.get_submodule(k).weight
        w.data += scale * (B.flatten(1) @ A.flatten(1)).view_as(w)
    with torch.no_grad():
        vs, merged = [ask(models, f't{i}', *at) for i in range(4)], other.velocity(*at)
        bare = ask(models, 'base', *at)
    assert all(off(v, vs[0]) < 1e-5 for v in vs)               # a sum's order depends on alignment
    for k, (A, B, scale) in adapter.items():
        layer = field.net.get_submodule(k)
        for t in (f't{i}' for i in range(4)):
            assert torch.equal(layer.lora_A[t].weight, A) and torch.equal(layer.lora_B[t].weight, B)
            assert layer.scaling[t] == scale
    assert off(vs[0], merged) < 1e-4 * (1 + merged.abs().max()) and off(vs[0], bare) > 1e-2

    key = sorted(adapter)[0]
    A, B, scale = adapter[key]
    misfit = torch.ones(rank, A.shape[1] + 1), B.flatten(1), scale
    wrong = {**adapter, 'no.such_layer': adapter[key], key: misfit}
    merge_lora.write_adapter(tmp_path / 'wrong', wrong, alpha)
    with pytest.raises(BadInput, match='2 of .* do not fit') as e:
        T.Models(build(name), [dict(name='stranger', lora=str(tmp_path / 'wrong'))])
    assert 'stranger' in str(e.value) and 'no.such_layer' in str(e.value) and key in str(e.value)


# -------------------- 5. folders
@pytest.mark.parametrize('name', list(BUILD))
def test_a_saved_folder_opens_as_its_family(name, tmp_path):
    field, folder = shared(name), tmp_path / 'model'
    field.pipe.save_pretrained(folder)
    opened = T.open_field(str(folder), max_sequence_length=LENGTH)
    assert type(opened) is type(field) and type(opened.pipe) is type(field.pipe)
    assert opened.can_edit == field.can_edit == (name.startswith('sd3') or name in ('omni', 'kontext'))
    assert not any(p.requires_grad for m in (opened.net, opened.vae) for p in m.parameters())
    z, s, cond = probe(field)
    with torch.no_grad():
        assert off(opened.velocity(z, s, conditions(opened, WORDS[:2])[0]), field.velocity(z, s, cond)) < 1e-5
    low = T.open_field(str(folder), 'bfloat16')
    assert low.net.dtype == torch.bfloat16 and (low.vae.dtype == torch.bfloat16) == (name == 'omni')
    both = zip(low.vae.parameters(), opened.vae.parameters())  # never rounded on the way
    assert name == 'omni' or all(torch.equal(a, b) for a, b in both)

    index = json.loads((folder / 'model_index.json').read_text())
    (folder / 'model_index.json').write_text(json.dumps(index | {'_class_name': 'MochiPipeline'}))
    with pytest.raises(BadInput, match='MochiPipeline is not a family') as e:
        T.open_field(str(folder))
    assert all(k in str(e.value) for k in T.FAMILIES)
    assert type(T.open_field(str(folder), family=index['_class_name'])) is type(field)
    for f in folder.glob(f'{field.prefix}/*.safetensors'):
        f.unlink()


def test_sizes_that_a_family_does_not_take():
    def told(name, height, width, editing=False):
        field = shared(name)
        configs = dict(vae=dict(field.vae.config), transformer=dict(field.net.config))
        try:
            checks.check_size(type(field), type(field.pipe).__name__, configs, height, width, editing)
        except BadInput as e:
            return str(e)
    for name in BUILD:
        unit = 8 if name in UNETS else 16
        assert told(name, 3 * unit, 5 * unit) is None
        assert f'of {unit} pixels, not {unit + 1}; the nearest is {unit}' in told(name, unit + 1, 64)
        assert f'a width in multiples of {unit} pixels, not 0; the nearest is {unit}' in told(name, unit, 0)
        can = shared(name).can_edit
        assert (told(name, 64, 64, True) is None) == can
        assert can or all(k in told(name, 64, 64, True) for k in ('cannot edit', 'Omni', 'FluxKontext'))
    for name, editing, most in (('sd3', False, 256), ('sd3', True, 128), ('sd3-wide', True, 256)):
        assert told(name, 256, most, editing) is None          # a table of 16 x 16 tokens
        assert 'position table, 256 pixels' in told(name, 256, most + 16, editing)
        assert 'position table' in told(name, 272, 64, editing)
        field = shared(name)
        z = torch.randn(1, *field.shape(32, most + 16))
        cond = conditions(field, WORDS[:1], [dict(source=z[0])] if editing else [])[0]
        with pytest.raises(ValueError, match='pos_embed_max_size'):   # and the model says so too
            field.velocity(z, torch.ones(1), cond)
        cond = conditions(field, WORDS[:1], [dict(source=z[0, ..., :-2])] if editing else [])[0]
        field.velocity(z[..., :-2], torch.ones(1), cond)


LEARN = dict(zimage='danceopd', omni='diffusionopd', flux='flowopd', kontext='danceopd', sd15='diffusionopd',
             sdxl='flowopd', **{'sd3-wide': 'danceopd', 'sd-turbo': 'diffusionopd'})


def learns(name, method, folder):
    """A short run of a method on a family's saved pipeline: its result, and the state after a resume."""
    field, edit = build(name), name in ('omni', 'kontext', 'sd3-wide')
    height, width = LARGER[0] if name == 'omni' else SIZES[0]
    field.pipe.save_pretrained(folder / 'model')
    linear = {k: m.weight.shape for k, m in field.net.named_modules()
              if isinstance(m, torch.nn.Linear) and any(k.endswith('.' + t) for t in field.targets)}
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g) / s[1] ** 0.5
    merge_lora.write_adapter(
        folder / 'teacher',
        {k: (draw(2, s[1]), 2 * draw(s[0], 2), 1.0) for k, s in linear.items()},
        prefix=field.prefix,
    )
    picture(0, (height, width)).save(folder / 'source.png')
    rows = [f'{w},things,{"source.png" if edit else ""}' for w in WORDS]
    (folder / 'things.csv').write_text('\n'.join(['prompt,task,source_image', *rows]))
    args = [
        f'--model={folder}/model',
        f'--resolution=[{height}, {width}]',
        '--init_from=base',
        '--device=cpu',
        f"--teachers=[{{'name': 'one', 'lora': '{folder}/teacher'}}]",
        '--lr_schedule=constant',
        '--warmup=1',
        "--routes=[{'teacher': 'one', 'data': 'things'}]",
        f"--data=['{folder}/things.csv']",
        '--rank=4',
        '--alpha=4',
        '--lr=1e-2',
        '--steps=3',
        '--max_steps=8',
        '--save_every=4',
        '--eval_every=100',
        '--show=1',
        '--sample_steps=2',
        '--eval_samples=3',
        f'--max_sequence_length={LENGTH}',
        f'--method={method}',
        '--batch_size=6',
        '--micro_batch=6',
        '--ema_decay=0',
        '--ckpt_keep=9',
    ]
    if method == 'flowopd':
        args += ['--eta=0.7', '--group_size=3', '--reward=code', '--drop_last=1']
    train_opd.main(args + [f'--out_dir={folder}/run'])
    shutil.copytree(folder / 'run', folder / 'half', symlinks=True)
    shutil.rmtree(folder / 'half' / 'step_000008')
    train_opd.main(
        [a for a in args if 'init_from' not in a] + [f'--out_dir={folder}/half', '--init_from=resume']
    )
    ends = [
        torch.load(folder / r / 'step_000008' / 'train_state.pt', weights_only=True)['student']
        for r in ('run', 'half')
    ]
    return json.loads((folder / 'run' / 'result.json').read_text())['things'], ends


@pytest.mark.parametrize('name', LEARN)
def test_every_family_learns_and_resumes(name, tmp_path):
    result, (whole, resumed) = learns(name, LEARN[name], tmp_path)
    assert result['gap_after'] < 0.97 * result['gap_before'], result
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_other_schedulers_of_unets_become_ddim():
    """SD1.5's own repository ships PNDM, whose list of times repeats one: no Euler steps."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.PNDMScheduler.from_config(
        field.pipe.scheduler.config, skip_prk_steps=True
    )
    again = T.find_family('StableDiffusionPipeline')(field.pipe, 'cpu', LENGTH)
    for n in (1, 4, 20):
        s = again.sigmas(n, 64, 64)
        assert len(s) == n + 1 and (s[1:] < s[:-1]).all() and s[-1] == 0 and s[0] < 1, s
    assert again.sigmas(1000, 64, 64).isfinite().all()  # SD1.5's list of times is one beyond its table then


def test_schedulers_with_sigmas_that_are_no_euler_become_ddim_too():
    """Their states are scaled otherwise: a rollout would start almost without noise."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(field.pipe.scheduler.config)
    again = T.find_family('StableDiffusionPipeline')(field.pipe, 'cpu', LENGTH)
    eps = torch.ones(1, 4, 8, 8)
    assert type(again.pipe.scheduler) is diffusers.DDIMScheduler
    assert (again.first_state(eps, 20, 64, 64) > 0.9).all() and again.sigmas(20, 64, 64)[0] > 0.9
