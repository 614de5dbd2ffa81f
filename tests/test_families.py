"""The families as velocity fields, against diffusers' own pipelines with tiny random weights."""
import inspect

from conftest import *
from pipelines import *


# -------------------- 1. the same pictures as the pipeline
@pytest.mark.parametrize('name', NATIVE)
def test_sampling_is_the_pipelines(name):
    field = shared(name)
    for n, size, batch, w in ((1, 0, 3, 3.0), (4, 0, 1, 1.0), (7, 0, 3, 3.0), (1, 1, 1, 1.0),
                              (4, 1, 3, 3.0), (7, 1, 3, 1.0)):
        n, w = steps(name, n), 1.0 if name == 'flux2' else w
        eps = noise(field, batch, SIZES[size])
        cond, empty = conditions(field, WORDS[:batch])
        theirs = pipeline(name, WORDS[:batch], eps, n, w)
        assert off(ours(name, cond, empty, eps, n, w), theirs) < bar(name), (n, size, batch, w)
        other = ours(name, cond, empty, eps, n, 4.0 - w)
        assert off(other, theirs) > 3 * bar(name)              # guidance is not a trifle here


@torch.no_grad()
@pytest.mark.parametrize('name', ['kontext', 'omni', *FLUX2S, *SHOWN])
def test_editing_is_the_pipelines(name, tmp_path, monkeypatch):
    field = shared(name)                                       # our three at once, theirs singly
    for n, size, w in ((1, 0, 3.0), (4, 1, 1.0), (7, 0, 3.0), (4, 0, 1.0)):
        n, size, w = steps(name, n), LARGER[size], 1.0 if name == 'flux2' else w
        if name in SHOWN:                                      # else sources are a megapixel
            whole = (*size[::-1], None)[:2 + (name == 'qwen-edit')]
            module = sys.modules[type(field.pipe).__module__]
            monkeypatch.setattr(module, 'calculate_dimensions', lambda *a, whole=whole: whole)
        eps = noise(field, 3, size)
        given = sources(field, size, tmp_path, 3)
        if name == 'omni':                                     # its pipeline rounds sources
            for i, g in enumerate(given):
                x = field.pipe.image_processor.preprocess(picture(i, size), *size)
                theirs, = field.pipe.prepare_image_latents([x], 1, 'cpu', torch.float32)[0]
                theirs = theirs[:, 0]
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


@pytest.mark.parametrize('name', EACH)
def test_without_a_setting_words_are_as_long_as_by_the_pipeline(name):
    call = inspect.signature(type(shared(name).pipe).__call__).parameters
    opened = type(shared(name))(shared(name).pipe)
    assert opened.max_length == (call['max_sequence_length'].default
                                 if 'max_sequence_length' in call else 512)


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
            swapped = conditions(field, WORDS[:2], given[::-1])[0]
            assert off(field.velocity(z, s, swapped), v) > 1e-2
            bare = conditions(field, WORDS[:2])[0]
            by_hand = call(z if name == 'sd3' else torch.cat([z, 0 * z], 1)).sample
            assert off(field.velocity(z, s, bare), by_hand) < 1e-6


# -------------------- 2. the schedule
@pytest.mark.parametrize('name', NATIVE)
def test_sigmas_are_the_pipelines(name):
    field, pipe = shared(name), shared(name).pipe
    module = sys.modules[type(pipe).__module__]
    for n in range(steps(name, 1), 51):
        h, w = size = SIZES[n % 2]
        s, S = copy.deepcopy(pipe.scheduler), field.sigmas(n, h, w)
        c, k, tokens = s.config, dict(sigmas=np.linspace(1, 1 / n, n)), h * w // 256
        if name in FLUX2S:
            k['mu'] = module.compute_empirical_mu(tokens, n)
        elif name not in UNETS:                                # 16 x 16 pixels are a token
            k['mu'] = module.calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len,
                                             c.base_shift, c.max_shift)
        if name in UNETS or name.startswith('sd3'):
            k = dict(mu=k['mu']) if c.get('use_dynamic_shifting') else {}
        if n in (2, 3, 12):
            pipeline(name, WORDS[:1], noise(field, 1, size), n, 1.0)
            s = pipe.scheduler                                 # as a real run left it
        else:
            module.retrieve_timesteps(s, n, 'cpu', **k)
        if name.startswith('sd15'):
            a = s.alphas_cumprod[s.timesteps].sqrt()
            b = (1 - a ** 2).sqrt()
            expected = torch.cat([b / (a + b), torch.zeros(1)])
        else:
            expected = s.sigmas / (1 + s.sigmas) if name in UNETS else s.sigmas
        assert S.dtype == torch.float32 and off(S, expected) < 1e-6, n
        assert (S[1:] < S[:-1]).all() and S[-1] == 0


@pytest.mark.parametrize('name', NATIVE)
def test_a_fine_schedule_as_imitation_draws_from_has_noise_in_it(name):
    for size in SIZES:
        S = shared(name).sigmas(1000, *size)
        assert len(S) == 1001 and (S[1:] <= S[:-1]).all() and 0.4 < S.median() < 0.99


# -------------------- 3. pictures, prompts, batches
@torch.no_grad()
@pytest.mark.parametrize('name', NATIVE)
def test_pictures_are_coded_as_the_pipeline_does(name, tmp_path):
    field, size = shared(name), SIZES[1]
    eps, low = noise(field, 2, size), name == 'omni'           # whose VAE is in bfloat16
    z = pipeline(name, WORDS[:2], eps, 2, 1.0)
    shown = pipeline(name, WORDS[:2], eps, 2, 1.0, output='pt').float()
    assert 0 <= shown.min() < shown.max() <= 1
    assert off(field.decode(z), shown) < (5e-2 if low else 1e-5)

    x = field.pipe.image_processor.preprocess(picture(0, size), *size)
    picture(0, size).save(tmp_path / 'a.png')
    mine = field.encode_image(files.load_image(tmp_path / 'a.png', *size)[None])[0]
    assert off(mine[None], coded(name, x)) < (2e-2 if low else 1e-5)
    assert mine.shape == field.shape(*size) and mine.dtype == torch.float32 and mine.std() > 0.01


def coded(name, x):
    """Pixels as the pipeline would encode a source."""
    pipe, vae = shared(name).pipe, shared(name).vae
    if name in FLUX2S:
        return pipe._encode_vae_image(x, None)
    if name in QWENS:
        edit = diffusers.QwenImageEditPipeline(**pipe.components, processor=None)
        return edit._encode_vae_image(x[:, :, None], None)[:, :, 0]
    z = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()
    return (z - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@torch.no_grad()
@pytest.mark.parametrize('name', FLUX2S)
def test_a_reference_beyond_a_megapixel_is_shrunk_as_the_pipeline_does(name, tmp_path, monkeypatch):
    field, size, seen = shared(name), (1040, 1024), []
    large, eps = picture(0, size), noise(field, 1, SIZES[0])
    monkeypatch.setattr(field.vae, 'encode', lambda x: seen.append(x) or 1 / 0)
    large.save(tmp_path / 'large.png')
    with pytest.raises(ZeroDivisionError):                     # what is encoded is all that counts
        pipeline(name, WORDS[:1], eps, 1, 1.0, large)
    with pytest.raises(ZeroDivisionError):
        field.encode_source(str(tmp_path / 'large.png'), *size)
    assert seen[0].shape == (1, 3, 1024, 1008) and torch.equal(*seen)


@pytest.mark.parametrize('name', [*BUILD, *SHOWN])
def test_cached_prompts_and_batches_change_nothing(name, tmp_path):
    field, size = shared(name), SIZES[0]
    z, s = noise(field, 3, size), torch.tensor([0.9, 0.55, 0.2])
    for edit in [e for e in (False, True) if (field.can_edit if e else not field.sees_source)]:
        given = sources(field, size, tmp_path, 3) if edit else []
        rows = [dict(prompt=p, source_image=str(tmp_path / f'{i}.png') * edit)
                for i, p in enumerate(WORDS)]
        prompts = T.Models(field).prompts
        others = [dict(r, prompt=p) for r, p in zip(rows * 2, ['another prompt', *WORDS[::-1]])]
        prompts.add(map(prompts.key, others))
        batch = [SimpleNamespace(row=r, size=size) for r in rows]
        prompts.condition(batch)
        cached, cached_empty = [s.cond for s in batch], [s.empty for s in batch]
        with torch.no_grad():
            v = guided(field, z, s, cached, cached_empty, 2.0)
            for i in range(3):
                one = slice(i, i + 1)
                fresh = conditions(field, WORDS[one], given[one])
                fresh = guided(field, z[one], s[one], *fresh, 2.0)
                assert off(fresh, v[one]) < 1e-5 * (1 + v.abs().max())
            mixed = guided(field, z, s, cached[1:] + cached[:1], cached_empty, 2.0)
        assert off(mixed, v) > 1e-2                            # the prompts do count


@torch.no_grad()
@pytest.mark.parametrize('name', SHOWN)
def test_words_that_see_the_source_are_cached_by_it(name, tmp_path):
    field, prompts = shared(name), T.Models(shared(name)).prompts
    paths = [s['path'] for s in sources(field, SIZES[0], tmp_path, 2)]
    batch = [SimpleNamespace(row=dict(prompt=WORDS[0], source_image=p), size=SIZES[0])
             for p in paths]
    prompts.condition(batch)
    assert set(prompts.known) == {(p, path) for p in (WORDS[0], '') for path in paths}
    for a, b in ((x.cond, x.empty) for x in batch):
        assert len(a['text']) - len(b['text']) == len(WORDS[0]) - 1     # one is ' '
    assert off(*[s.cond['text'] for s in batch]) > 1e-2
    assert off(*[s.empty['text'] for s in batch]) > 1e-2
    with pytest.raises(BadInput, match='give every row a source_image'):
        row = dict(prompt=WORDS[0], source_image='')
        prompts.condition([SimpleNamespace(row=row, size=SIZES[0])])


@pytest.mark.parametrize('name', ['sd3', 'omni', 'klein', 'qwen', 'sdxl'])
def test_words_are_brought_to_the_device_once(name):
    field = copy.copy(shared(name))
    prompts = T.Models(field).prompts
    row = dict(prompt=WORDS[0], source_image='')
    prompts.condition([SimpleNamespace(row=row, size=SIZES[0])])
    field.device = torch.device('meta')                        # anything that is not the CPU
    batch = [SimpleNamespace(row=row, size=SIZES[0]) for _ in range(3)]
    prompts.condition(batch)
    for some in ([s.cond for s in batch], [s.empty for s in batch]):
        found = [x for c in some for v in c.values() for x in (v if isinstance(v, list) else [v])]
        assert found and all(x.device.type == 'meta' for x in found)
        assert all(c['text'] is some[0]['text'] for c in some)


@pytest.mark.parametrize('name', SHOWN)
def test_words_see_the_source_at_the_pipelines_size(name, tmp_path, monkeypatch):
    """Elsewhere here both are told what its size is."""
    field, seen, wide = shared(name), [], picture(0, (40, 96))

    def told(prompt, image, *a, **k):
        return seen.extend(image if isinstance(image, list) else [image]) or 1 / 0
    monkeypatch.setattr(field.pipe, 'encode_prompt', told)
    wide.save(tmp_path / 'a.png')
    with pytest.raises(ZeroDivisionError):
        field.encode(WORDS[0], str(tmp_path / 'a.png'))
    with pytest.raises(ZeroDivisionError):
        field.pipe(image=wide, prompt=WORDS[0], num_inference_steps=2)
    assert seen[0].size == seen[1].size and seen[0].width > 2 * seen[0].height


@pytest.mark.parametrize('name', ['flux', 'flux2'])
def test_the_embedded_guidance_is_what_was_asked_for(name, tmp_path):
    build(name).pipe.save_pretrained(tmp_path)
    field = T.open_field(str(tmp_path), max_sequence_length=LENGTH, distilled_guidance=2.5)
    seen = []
    field.net.register_forward_pre_hook(lambda m, a, k: seen.append(k['guidance']),
                                        with_kwargs=True)
    with torch.no_grad():
        field.velocity(noise(field, 1, SIZES[0]), torch.ones(1), conditions(field, WORDS[:1])[0])
    assert seen[0].tolist() == [2.5]


@pytest.mark.parametrize('name', ['flux', 'klein', 'qwen', 'sd3-dynamic'])
def test_each_size_of_a_run_has_its_own_schedule(name):
    models, sizes = T.Models(shared(name)), [(32, 48), (1024, 768)]
    found = [models.sigmas([SimpleNamespace(size=s)], 4) for s in sizes]
    for size, s in zip(sizes, found):
        assert torch.equal(s, shared(name).sigmas(4, *size))
    assert off(*found) > 1e-3


@pytest.mark.parametrize('name', SHOWN)
def test_the_text_encoder_knows_which_tokens_are_the_pictures(name, tmp_path):
    """Their places are in a plane then, not in a line."""
    field, seen = shared(name), {}
    inner = field.pipe.text_encoder.model
    hooks = [field.pipe.text_encoder.register_forward_pre_hook(
                 lambda m, a, k: seen.update(k), with_kwargs=True),
             inner.language_model.register_forward_pre_hook(
                 lambda m, a, k: seen.update(places=k['position_ids']), with_kwargs=True)]
    try:
        field.encode(WORDS[0], sources(field, SIZES[0], tmp_path, 1)[0]['path'])
    finally:
        for hook in hooks:
            hook.remove()
    pictures = seen['mm_token_type_ids'] == 1
    assert (pictures == (seen['input_ids'] == 7)).all()
    assert pictures.sum() == seen['image_grid_thw'].prod() // 4
    rows, columns = seen['places'][-2:, pictures]
    assert rows.unique().numel() * columns.unique().numel() == pictures.sum()


# -------------------- 4. how guidance combines
def test_qwen_keeps_the_length_of_each_tokens_velocity():
    field = shared('qwen')
    c, u = torch.randn(2, 2, 16, 4, 6)
    out, tokens = field.guide(c, u, 3.0), torch.nn.functional.pixel_unshuffle
    assert torch.allclose(tokens(out, 2).norm(dim=1), tokens(c, 2).norm(dim=1), rtol=1e-5)
    plain = u + 3 * (c - u)
    cosine = torch.nn.functional.cosine_similarity(tokens(out, 2), tokens(plain, 2), dim=1)
    assert (cosine > 0.9999).all() and off(out, plain) > 1
    with pytest.raises(BadInput, match='1 step: .* at least 2 steps'):
        field.sigmas(1, 64, 64)
