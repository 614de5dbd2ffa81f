"""Adapter files: every packaging of docs/adapters.md, read exactly or refused by a sentence."""
from lora import *
from peft import LoraConfig, PeftModel, get_peft_model
from diffusers.loaders import single_file_utils as first_release
from support import adapters, renames

A, B = torch.randn(2, 6), torch.randn(5, 2)
GOOD = {'transformer.x.y.lora_A.weight': A, 'transformer.x.y.lora_B.weight': B}


def refused(path, *words):
    with pytest.raises(BadInput) as e:
        merge_lora.read_adapter(path)
    assert all(w in str(e.value) for w in words), e.value
    return str(e.value)


# -------------------- packagings
@pytest.mark.parametrize('family', TARGETS)
def test_packagings_and_both_loaders(family, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe)
    adapter, shapes, base = make(net, family), shapes_of(net), output(net, family)
    want = output(added(net, adapter), family)
    assert (want - base).abs().max() > 1e-3
    for how in ('peft', 'diffusers', 'diffusers-config', *PACKAGINGS):
        read = merge_lora.read_adapter(pack(adapter, how, tmp_path / how, family))
        got = merge_lora.fit(read, shapes, how)
        assert same(got, adapter, 0), how
        assert all(t.dtype == torch.float32 for m in got.values() for t in m[:2]), how
    for kw in {}, {'alpha': 3.0}:
        out = tmp_path / f'out{len(kw)}'
        merge_lora.write_adapter(out, got, prefix=prefix(family), **kw)
        assert {f.name for f in out.iterdir()} == {*merge_lora.FILES, 'adapter_config.json'}
        for path in out, out / merge_lora.FILES[1]:
            assert same(merge_lora.read_adapter(path), adapter, 1e-7)
        pipe.load_lora_weights(out)
        assert (output(net, family) - want).abs().max() < 2e-5
        pipe.unload_lora_weights()
        assert torch.equal(output(net, family), base)
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter('error')                     # PEFT only warns of missing keys
            wrapped = PeftModel.from_pretrained(net, out)
        assert (output(wrapped, family) - want).abs().max() < 2e-5
        net = wrapped.unload()


@pytest.mark.parametrize('family, kw', [
    ('sd3', dict(rank_pattern={'to_q': 3, 'to_out.0': 5}, alpha_pattern={'to_q': 7})),
    ('sd15', dict(rank_pattern={r'.*attn\d\.to_q': 3},
                  alpha_pattern={'^up_blocks.*to_q': 7, 'conv1': 3})),
    ('sd3', dict(use_rslora=True)), ('sd15', dict(use_rslora=True))])
def test_peft_patterns_and_rslora(family, kw, tmp_path):
    """A file written by PEFT itself, with every rank and alpha of its own."""
    net = net_of(build(family).pipe)
    base = output(net, family)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=['to_q', 'to_out.0', 'conv1'],
                        init_lora_weights=False, **kw)
    wrapped = get_peft_model(net, config)
    want = output(wrapped, family)
    wrapped.save_pretrained(tmp_path / 'a')
    net = wrapped.unload()
    adapter = merge_lora.fit(merge_lora.read_adapter(tmp_path / 'a'), shapes_of(net))
    assert (want - base).abs().max() > 1e-3
    assert (output(added(net, adapter), family) - want).abs().max() < 2e-5
    merge_lora.write_adapter(tmp_path / 'b', adapter, prefix=prefix(family))  # ranks padded to one
    wrapped = PeftModel.from_pretrained(net, tmp_path / 'b')
    assert (output(wrapped, family) - want).abs().max() < 2e-5


@pytest.mark.parametrize('init', [True, 'gaussian', 'eva', 'orthogonal', 'mica', 'pissa', 'olora'])
def test_initialisations_keep_the_base_or_are_refused(init, tmp_path):
    """Trained a step, saved by PEFT, and put on a base as it was: is it the model that PEFT has?"""
    net = net_of(build('sd3').pipe)
    fresh = copy.deepcopy(net)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=['to_q', 'ff.net.2'],
                        init_lora_weights=init)
    wrapped = get_peft_model(net, config)
    for name, p in wrapped.named_parameters():
        if 'lora_' in name:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    want = output(wrapped, 'sd3')
    wrapped.save_pretrained(tmp_path)
    if init in ('pissa', 'olora'):
        assert f"init_lora_weights='{init}'" in refused(tmp_path, 'plain LoRA')
        (tmp_path / 'adapter_config.json').write_text(json.dumps(dict(r=4, lora_alpha=6)))
    adapter = merge_lora.fit(merge_lora.read_adapter(tmp_path), shapes_of(fresh))
    error = (output(added(fresh, adapter), 'sd3') - want).abs().max()
    assert error > 1e-3 if init in ('pissa', 'olora') else error < 2e-5


@pytest.mark.parametrize('more', [
    dict(peft_type='LOHA'), dict(use_dora=True), dict(init_lora_weights='pissa_niter_4'),
    dict(init_lora_weights='lora_ga'), dict(init_lora_weights='corda'),
    dict(init_lora_weights='loftq'), dict(use_bdlora={'nblocks': 2}), dict(bias='all'),
    dict(fan_in_fan_out=True), dict(lora_bias=True),
    dict(modules_to_save=['proj_out']), dict(layer_replication=[[0, 2]]), dict(use_qalora=True),
    dict(alora_invocation_tokens=[1]), dict(a_variant_of_tomorrow=True)])
def test_what_is_not_known_to_be_plain_is_refused_by_its_name(more, tmp_path):
    save_file(GOOD, tmp_path / merge_lora.FILES[0])
    plain = LoraConfig(r=2, lora_alpha=4).to_dict()
    (tmp_path / 'adapter_config.json').write_text(json.dumps(plain))
    assert merge_lora.read_adapter(tmp_path)['x.y'][2] == 2
    (tmp_path / 'adapter_config.json').write_text(json.dumps(plain | more))
    refused(tmp_path, 'not known to be that of a plain LoRA', f'{next(iter(more))}=')
    told = json.dumps({f'transformer.{k}': v for k, v in (plain | more).items()})
    save_file(GOOD, tmp_path / 'a.safetensors', {'lora_adapter_metadata': told})
    refused(tmp_path / 'a.safetensors', 'not known to be that of a plain LoRA')


def test_alpha_is_found_wherever_it_stands(tmp_path):
    file, config = tmp_path / merge_lora.FILES[0], tmp_path / 'adapter_config.json'

    def scale(tensors, meta=None):
        save_file(tensors, file, meta)
        return merge_lora.read_adapter(tmp_path)['x.y'][2]
    own = GOOD | {'transformer.x.y.alpha': torch.tensor(3.0)}
    told = {'lora_adapter_metadata': json.dumps({'transformer.r': 2, 'transformer.lora_alpha': 5})}
    assert scale(GOOD) == 1 and scale(own) == 1.5 and scale(GOOD, told) == 2.5
    config.write_text(json.dumps(dict(r=2, lora_alpha=4.5)))
    assert scale(GOOD) == 2.25 and scale(own) == 1.5 and scale(GOOD, told) == 2.5
    config.write_text(json.dumps(dict(r=8, lora_alpha=4.5)))
    assert scale(own) == 1.5 and scale(GOOD, told) == 2.5      # not asked
    save_file(GOOD, file)
    refused(tmp_path, 'x.y has rank 2, it says 8')


def test_patterns_that_are_broken_or_never_end(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, 'PATIENCE', 2)
    save_file({k.replace('x.y', 'a' * 40): t for k, t in GOOD.items()}, tmp_path / 'a.safetensors')
    for pattern, words in (('(a+)+b', 'never ends'), ('(a', 'no regular expression')):
        for key in 'rank_pattern', 'alpha_pattern':
            config = dict(r=2, lora_alpha=2) | {key: {pattern: 2}}
            (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
            refused(tmp_path, words, 'pattern')
    for odd in ['x'], 'x', 3:
        config = dict(r=2, lora_alpha=2, alpha_pattern=odd)
        (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
        refused(tmp_path, 'usable r or lora_alpha')


# -------------------- names of a model's first release
def trained_and_converted(weights, convert, seed=3):
    """(an adapter on a checkpoint as first released, what it adds to the weights that diffusers'
    converter of whole checkpoints makes of that checkpoint, the shapes of these)."""
    g = torch.Generator().manual_seed(seed)
    checkpoint = {k: torch.randn(s, generator=g) for k, s in weights.items()}
    modules = {k[:-7]: s for k, s in weights.items() if k.endswith('.weight') and len(s) > 1}
    adapter = random_for(modules, seed)
    changed = dict(checkpoint)
    for k, x in deltas(adapter).items():
        changed[f'{k}.weight'] = changed[f'{k}.weight'] + x.reshape(modules[k])
    before, after = convert(dict(checkpoint)), convert(dict(changed))
    want = {k[:-7]: (after[k] - before[k]).flatten(1) for k in before
            if k.endswith('.weight') and before[k].dim() > 1}
    shapes = {k[:-7]: tuple(x.shape) for k, x in before.items() if k.endswith('.weight')}
    return adapter, want, shapes


def spelled(adapter, tmp_path):
    """Read from files as kohya's trainer, ComfyUI and others spell these names."""
    for i, tensors in enumerate([
            factors(adapter, 'lora_unet_', 'lora_down', 'lora_up', flat),
            factors(adapter, 'diffusion_model.'), factors(adapter),
            factors(adapter, 'diffusion_model.', 'lora_down', 'lora_up')]):
        save_file(tensors, tmp_path / f'{i}.safetensors')
        yield merge_lora.read_adapter(tmp_path / f'{i}.safetensors')


def close(adapter, want):
    got = deltas(adapter)
    return got.keys() == want.keys() and \
        all((got[k] - x).abs().max() < 2e-6 for k, x in want.items())


def sd3_weights(d=16):
    """Names and shapes of Stable Diffusion 3.5 medium as released, with two blocks."""
    w = {'x_embedder.proj': (d, 16, 2, 2), 'context_embedder': (d, 32),
         't_embedder.mlp.0': (d, 256), 't_embedder.mlp.2': (d, d),
         'y_embedder.mlp.0': (d, 32), 'y_embedder.mlp.2': (d, d),
         'final_layer.linear': (64, d), 'final_layer.adaLN_modulation.1': (2 * d, d)}
    norms = []
    for i, parts in ((0, 9), (1, 6)):                          # of the last one, words only enter
        for side, n in (('x_block', parts), ('context_block', 6 if i == 0 else 2)):
            at = f'joint_blocks.{i}.{side}'
            w |= {f'{at}.adaLN_modulation.1': (n * d, d), f'{at}.attn.qkv': (3 * d, d)}
            if n > 2:
                w |= {f'{at}.attn.proj': (d, d), f'{at}.mlp.fc1': (4 * d, d),
                      f'{at}.mlp.fc2': (d, 4 * d)}
            w |= {f'{at}.attn2.qkv': (3 * d, d), f'{at}.attn2.proj': (d, d)} if n == 9 else {}
            norms += [f'{at}.attn.'] + [f'{at}.attn2.'] * (n == 9)
    full = {f'{k}.weight': s for k, s in w.items()} | {f'{k}.bias': s[:1] for k, s in w.items()}
    full |= {f'{k}ln_{x}.weight': (8,) for k in norms for x in 'qk'}
    return full | {'pos_embed': (1, 64, d)}


def flux_weights(wide=3):
    """FLUX's, with a block of each kind; the rows are real, only so many of the columns."""
    d, w = 3072, {}
    for k, rows in {'img_in': d, 'txt_in': d, 'final_layer.linear': 64,
                    'final_layer.adaLN_modulation.1': 2 * d,
                    'single_blocks.0.modulation.lin': 3 * d, 'single_blocks.0.linear1': 7 * d,
                    'single_blocks.0.linear2': d}.items():
        w[k] = rows
    w |= {f'{k}_in.{x}_layer': d for k in ('time', 'vector', 'guidance') for x in ('in', 'out')}
    for side in 'img', 'txt':
        for k, n in {'mod.lin': 6, 'attn.qkv': 3, 'attn.proj': 1, 'mlp.0': 4, 'mlp.2': 1}.items():
            w[f'double_blocks.0.{side}_{k}'] = n * d
    full = {f'{k}.weight': (n, wide) for k, n in w.items()}
    full |= {f'{k}.bias': (n,) for k, n in w.items()}
    norms = ['single_blocks.0'] + [f'double_blocks.0.{side}_attn' for side in ('img', 'txt')]
    return full | {f'{k}.norm.{x}_norm.scale': (128,) for k in norms for x in ('query', 'key')}


FIRST = {'sd3': (sd3_weights, first_release.convert_sd3_transformer_checkpoint_to_diffusers,
                 diffusers.StableDiffusion3Pipeline),
         'flux': (flux_weights, first_release.convert_flux_transformer_checkpoint_to_diffusers,
                  diffusers.FluxKontextPipeline),
         'zimage': (lambda: {'layers.0.attention.qkv.weight': (48, 16),
                             'cap_embedder.1.weight': (16, 9),
                             'noise_refiner.1.attention.out.weight': (16, 16),
                             'context_refiner.0.feed_forward.w2.weight': (16, 40)},
                    first_release.convert_z_image_transformer_checkpoint_to_diffusers,
                    diffusers.ZImagePipeline)}


@pytest.mark.parametrize('family', FIRST)
def test_first_names_mean_what_the_converter_of_checkpoints_says(family, tmp_path):
    weights, convert, pipeline = FIRST[family]
    adapter, want, shapes = trained_and_converted(weights(), convert)
    for read in spelled(adapter, tmp_path):
        assert close(merge_lora.fit(renames.renamed(read, shapes, pipeline), shapes), want)
    with pytest.raises(BadInput, match='names that are not known'):
        merge_lora.fit(adapter, shapes)
    more = {**adapter, '00.odd': next(iter(adapter.values()))}
    with pytest.raises(BadInput, match='00.odd .no such module'):  # nothing is dropped on the way
        merge_lora.fit(renames.renamed(more, shapes, pipeline), shapes)


def test_xlabs(tmp_path):
    """The same fused layers as FLUX's own, and no alpha."""
    adapter, want, shapes = trained_and_converted(flux_weights(), FIRST['flux'][1])
    names = {f'double_blocks.0.{side}_attn.{k}': f'double_blocks.0.processor.{k}_lora{i}'
             for i, side in ((1, 'img'), (2, 'txt')) for k in ('qkv', 'proj')}
    names['single_blocks.0.linear2'] = 'single_blocks.0.processor.proj_lora'
    some = {k: adapter[k] for k in names}
    save_file(factors({k: (A, B * s, 1.0) for k, (A, B, s) in some.items()}, '', 'down', 'up',
                      names.get, alpha=False), tmp_path / 'x.safetensors')
    read = merge_lora.read_adapter(tmp_path / 'x.safetensors')
    got = merge_lora.fit(renames.renamed(read, shapes, diffusers.FluxPipeline), shapes)
    hit = re.compile(r'transformer_blocks\.0\.attn\.|single_transformer_blocks\.0\.proj_out')
    assert close(got, {k: x for k, x in want.items() if hit.match(k)}) and len(got) == 9


def sgm(name):
    """SDXL's first name of a module in a UNet whose blocks have one layer."""
    for own, theirs in (('.time_emb_proj', '.emb_layers.1'), ('.conv_shortcut', '.skip_connection'),
                        ('.conv1', '.in_layers.2'), ('.conv2', '.out_layers.3'),
                        ('conv_in', 'input_blocks.0.0'), ('conv_out', 'out.2'),
                        ('time_embedding.linear_1', 'time_embed.0'),
                        ('add_embedding.linear_1', 'label_emb.0.0'),
                        ('add_embedding.linear_2', 'label_emb.0.2')):
        name = name.replace(own, theirs)
    kinds = {'resnets': 0, 'attentions': 1, 'downsamplers': 0, 'upsamplers': 2}
    if m := re.match(r'mid_block\.(\w+)\.(\d)\.(.*)', name):
        return f'middle_block.{1 if m[1] == "attentions" else 2 * int(m[2])}.{m[3]}'
    if m := re.match(r'(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)', name):
        side, block, kind, layer, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
        if side == 'down':
            at = 1 + 2 * block + (1 if kind == 'downsamplers' else layer)
            rest = 'op' if kind == 'downsamplers' else rest
            return f'input_blocks.{at}.{kinds[kind]}.{rest}'
        at = 2 * block + (1 if kind == 'upsamplers' else layer)
        return f'output_blocks.{at}.{kinds[kind]}.{rest}'
    return name


def test_first_names_of_sdxl(tmp_path):
    pipe = build('sdxl').pipe
    net, shapes = pipe.unet, shapes_of(pipe.unet)
    trained = ('to_q to_k to_v to_out.0 ff.net.2 net.0.proj proj_in proj_out conv1 conv2 conv_in '
               'conv_out conv_shortcut time_emb_proj samplers.0.conv embedding.linear_1 '
               'add_embedding.linear_2').split()
    adapter = random_for({k: s for k, s in shapes.items() if k.endswith(tuple(trained))})
    assert len(adapter) > 60
    file = tmp_path / 'sdxl.safetensors'
    save_file(factors(adapter, 'lora_unet_', 'lora_down', 'lora_up', lambda k: flat(sgm(k))), file)
    read = merge_lora.read_adapter(file)
    got = merge_lora.fit(renames.renamed(read, shapes, type(pipe)), shapes)
    assert same(got, adapter, 1e-6)
    want = output(added(net, adapter), 'sdxl')
    pipe.load_lora_weights(file)
    assert (output(net, 'sdxl') - want).abs().max() < 2e-5


def test_names_of_old_diffusers_files(tmp_path):
    pipe = build('sd15').pipe
    adapter = {k: m for k, m in make(pipe.unet, 'sd15', scale=1.0).items() if '.attn' in k}

    def old(k):
        return re.sub(r'\.(to_\w+?)(\.0)?$', r'.processor.\1_lora', k)
    save_file(factors(adapter, 'unet.', 'down', 'up', old, alpha=False), tmp_path / 'a.safetensors')
    shapes = shapes_of(pipe.unet)
    read = merge_lora.read_adapter(tmp_path / 'a.safetensors')
    assert same(merge_lora.fit(renames.renamed(read, shapes, type(pipe)), shapes), adapter)


def test_flux2():
    """Its first names by diffusers' road; but for that of the last norm, which that gets wrong."""
    A, B, d = torch.randn(2, 5), torch.randn(9 * 4, 2), 4
    shapes = {f'transformer_blocks.0.attn.{k}': (d, 5) for k in ('to_q', 'to_k', 'to_v')}
    shapes |= {'single_transformer_blocks.1.attn.to_qkv_mlp_proj': (9 * d, 5)}
    adapter = {'double_blocks.0.img_attn.qkv': (A, B[:3 * d], 0.5),
               'single_blocks.1.linear1': (A, B, 2.0)}
    want = dict(zip(shapes, [0.5 * x @ A for x in B[:3 * d].split(d)] + [2.0 * B @ A]))
    for pipeline in diffusers.Flux2Pipeline, diffusers.Flux2KleinPipeline:
        assert close(merge_lora.fit(renames.renamed(adapter, shapes, pipeline), shapes), want)
        last = {**adapter, 'final_layer.adaLN_modulation.1': (A, B[:8], 1.0)}
        with pytest.raises(BadInput, match='final_layer.adaLN_modulation.1 are not supported'):
            renames.renamed(last, shapes, pipeline)
        lossy = {**adapter, 'lora_unet_guidance_in_odd': (A, 1e-9 * B[:8], 1.0)}
        with pytest.raises(BadInput, match='left out.*guidance_in_odd'):
            renames.renamed(lossy, shapes, pipeline)


def test_adapters_that_need_no_other_names_are_left_alone():
    shapes = {'a.b': (5, 6)}
    for name in 'a.b', 'lora_unet_a_b', 'lycoris_a_b':
        adapter = {name: (A, B, 1.0)}
        assert renames.renamed(adapter, shapes, None) is adapter
    assert renames.renamed({'x': (A, B, 1.0)}, shapes, None).keys() == {'x'}


def test_two_names_of_one_module_are_refused():
    """Fused and split, or spelled in two ways: neither may replace the other."""
    shapes = {f'transformer_blocks.0.attn.to_{k}': (4, 6) for k in 'qkv'}
    fused, A = torch.randn(12, 2), torch.randn(2, 6)
    name = 'joint_blocks.0.x_block.attn.qkv'
    for other in 'transformer_blocks.0.attn.to_k', 'lora_unet_' + flat(name):
        twice = {name: (A, fused, 1.0), other: (A, fused[:4] if 'to_k' in other else fused, 1.0)}
        with pytest.raises(BadInput, match='mean one module.*joint_blocks'):
            renames.renamed(twice, shapes, diffusers.StableDiffusion3Pipeline)


# -------------------- refusals
@pytest.mark.parametrize('more, words', [
    ({'text_encoder.q.lora_A.weight': A}, ['text-encoder', 'text_encoder.q']),
    ({'lora_te1_q.lora_down.weight': A}, ['text-encoder', 'lora_te1_q', 'without them']),
    ({'lora_te.q.lora_down.weight': A}, ['text-encoder', 'lora_te.q']),
    ({'transformer.x.y.lora_magnitude_vector': B}, ['DoRA']),
    ({'lora_unet_x.dora_scale': B}, ['DoRA', 'lora_unet_x']),
    ({'lora_unet_x.hada_w1_a': B}, ['LoHa']),
    ({'lycoris_x.lokr_w1': B}, ['LoKr', 'lycoris_x.lokr_w1']),
    ({'transformer.x.y.lora_B.bias': B}, ['biases']),
    ({'diffusion_model.x.diff_b': B}, ['biases']),
    ({'transformer.z.lora_A.weight': A}, ['partner', 'z (no B)']),
    ({'transformer.z.lora_B.weight': B}, ['partner', 'z (no A)']),
    ({'transformer.z.alpha': torch.tensor(1.0)}, ['partner', 'z (no A)']),
    ({'transformer.x.y.lora_B.weight': B[:, :1]}, ['ranks', 'x.y']),
    ({'transformer.x.y.lora_A.weight': A * float('nan')}, ['finite', 'x.y']),
    ({'transformer.x.y.lora_A.weight': A.to(torch.int8)}, ['floating-point', 'x.y']),
    ({'transformer.x.y.alpha': torch.tensor(float('inf'))}, ['finite']),
    ({'transformer.x.y.alpha': torch.tensor(0.0)}, ['alpha is zero']),
    ({'transformer.x.y.alpha': torch.tensor(1e30)}, ['absurd']),
    ({'transformer.proj_out.weight': A}, ['no LoRA factors', 'proj_out']),
    ({'transformer.x.y.lora_mid.weight': A}, ['no LoRA factors', 'lora_mid']),
    ({'x.y.lora_A.weight': A}, ['twice'])])
def test_read_refuses(more, words, tmp_path):
    tensors = {k: t.clone().contiguous() for k, t in {**GOOD, **more}.items()}
    save_file(tensors, tmp_path / 'a.safetensors')
    refused(tmp_path / 'a.safetensors', str(tmp_path), *words)


def test_read_refuses_files(tmp_path):
    file, config = tmp_path / 'a.safetensors', tmp_path / 'adapter_config.json'
    save_file({}, file)
    refused(file, 'no tensors')
    save_file(GOOD, file)
    assert set(merge_lora.read_adapter(tmp_path)) == {'x.y'}
    data = file.read_bytes()
    for broken in data[:-8], data[:20], b'':
        file.write_bytes(broken)
        assert 'git' not in refused(file, 'cannot be read; if it is damaged', str(file))
    file.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
    refused(file, 'is a git-lfs pointer', 'git lfs pull')
    for told, words in (('{"transformer.r": 2', 'no JSON object'), ('[1]', 'no JSON object'),
                        ('{}', 'usable r or lora_alpha'), ('3', 'no JSON object'),
                        ('{"transformer.r": 2, "transformer.lora_alpha": NaN}', 'not finite'),
                        ('{"transformer.r": 3, "transformer.lora_alpha": 3}', 'it says 3')):
        save_file(GOOD, file, {'lora_adapter_metadata': told})
        refused(file, words)
    file.rename(tmp_path / merge_lora.FILES[1])
    refused(tmp_path, 'needs its adapter_config.json beside it')
    for broken in b'{"r": 2', b'\xff\xfe', b'[]', b'':
        config.write_bytes(broken)
        text = refused(tmp_path, 'cannot be read' if broken[:1] == b'\xff' else 'no JSON object')
        assert 'git' not in text and 'needs its' not in text
    config.unlink()
    (tmp_path / merge_lora.FILES[1]).unlink()
    save_file({k.replace('transformer', 'base_model.model'): t for k, t in GOOD.items()}, file)
    refused(file, 'needs its adapter_config.json beside it')
    torch.save(GOOD, tmp_path / 'p.bin')
    refused(tmp_path / 'p.bin', 'only .safetensors')
    refused(str(tmp_path / ('x' * 300)), 'no such adapter')
    os.mkfifo(tmp_path / 'fifo.safetensors')
    refused(tmp_path / 'fifo.safetensors', 'cannot be read')


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    with monkeypatch.context() as m:
        m.setattr(adapters, '_fetch', lambda *a: pytest.fail(f'asked the hub for {a}'))
        for path in '', './none', '/none/x', '~/none-such/x', 'word', 'here/none/sub':
            with pytest.raises(BadInput, match='adapter'):
                merge_lora.find(path)
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.find('here')
    (tmp_path / 'here/w.bin').touch()
    with pytest.raises(BadInput, match='w.bin'):
        merge_lora.find('here')
    order = ['z.safetensors', 'adapter_model.safetensors', 'pytorch_lora_weights.safetensors']
    for name in order:
        (tmp_path / 'here' / name).touch()
        assert merge_lora.find('here').name == name
    (tmp_path / 'here/latest').write_text('global_step200')    # DeepSpeed's, and no run's
    assert merge_lora.find('here').name == order[-1]
    for name in order[1:]:
        (tmp_path / 'here' / name).unlink()
    (tmp_path / 'here/y.safetensors').touch()
    with pytest.raises(BadInput, match='y.safetensors, z.safetensors'):
        merge_lora.find('here')


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub as hub
    from fnmatch import fnmatch
    asked = []

    def snapshot(repo, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns, ignore_patterns))
        return str(tmp_path)

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)

    def fails(*a, **k):
        raise hub.errors.LocalEntryNotFoundError('no network\nsecond line')
    monkeypatch.setattr(hub, 'list_repo_files', fails)         # offline, what is here is found
    monkeypatch.setattr(hub, 'snapshot_download', snapshot)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    at, file = 'Teacher/lora', f'Teacher/lora/{merge_lora.FILES[1]}'
    merge_lora.write_adapter(tmp_path / at, {'x': (A, B)})
    assert merge_lora.find(f'owner-x/repo/{at}') == tmp_path / at / merge_lora.FILES[0]
    files = [f'{at}/*.safetensors', f'{at}/adapter_config.json']
    assert asked == [('owner-x/repo', files, [f'{at}/*/*'])]
    ignored = asked.pop()[2][0]                # nothing below the folder asked for
    assert fnmatch(f'{at}/sub/m.safetensors', ignored)
    assert not fnmatch(f'{at}/m.safetensors', ignored)
    assert merge_lora.find(f'owner-x/repo/{file}') == tmp_path / file
    assert asked == [('owner-x/repo', f'{at}/adapter_config.json'), ('owner-x/repo', file)]
    more = 'adapter_config.json', merge_lora.FILES[0], 'optimizer.safetensors'
    many = ['a.safetensors', 'b.safetensors', 'README.md', *(f'{at}/{k}' for k in more)]
    monkeypatch.setattr(hub, 'list_repo_files', lambda repo: many)
    asked.clear()
    with pytest.raises(BadInput, match='owner-y/repo holds a.safetensors, b.safetensors; name one'):
        merge_lora.find('owner-y/repo')
    assert not asked                           # nothing was fetched
    assert merge_lora.find(f'owner-y/repo/{at}') == tmp_path / at / merge_lora.FILES[0]
    assert asked[0][1] == [f'{at}/{merge_lora.FILES[0]}', f'{at}/adapter_config.json']
    asked.clear()
    assert merge_lora.find(f'owner-y/repo/{at}') and not asked  # a run asks the hub once
    with pytest.raises(BadInput, match='owner-y/repo/none.*by hand'):
        merge_lora.find('owner-y/repo/none')
    monkeypatch.setattr(hub, 'list_repo_files', fails)
    monkeypatch.setattr(hub, 'snapshot_download', fails)
    with pytest.raises(BadInput, match='owner-y/repo .*no network.*by hand.*hf auth login'):
        merge_lora.find('owner-y/repo')
