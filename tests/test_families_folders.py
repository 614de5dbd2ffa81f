"""A family from a saved folder: it opens, its sizes, and a run learns and resumes."""
from conftest import *
from pipelines import *


@torch.no_grad()
@pytest.mark.parametrize('name', list(BUILD))
def test_a_saved_folder_opens_as_its_family(name, tmp_path):
    field, folder = shared(name), tmp_path / 'model'
    field.pipe.save_pretrained(folder)
    opened = T.open_field(str(folder), max_sequence_length=length(name))
    assert type(opened) is type(field) and type(opened.pipe) is type(field.pipe)
    can = name.startswith('sd3') or name in ('omni', 'kontext', *FLUX2S)
    assert opened.can_edit == field.can_edit == can
    assert not any(p.requires_grad for m in (opened.net, opened.vae) for p in m.parameters())
    z, s = noise(field, 2, SIZES[0]), torch.tensor([0.8, 0.3])
    mine, theirs = [f.velocity(z, s, conditions(f, WORDS[:2])[0]) for f in (opened, field)]
    assert off(mine, theirs) < 1e-5
    low = T.open_field(str(folder), 'bfloat16')
    assert low.net.dtype == torch.bfloat16 and (low.vae.dtype == torch.bfloat16) == (name == 'omni')
    both = zip(low.vae.parameters(), opened.vae.parameters())  # never rounded on the way
    assert name == 'omni' or all(torch.equal(a, b) for a, b in both)

    index = json.loads((folder / 'model_index.json').read_text())
    other = 'StableDiffusionInpaintPipeline' if name in UNETS else 'MochiPipeline'
    (folder / 'model_index.json').write_text(json.dumps(index | {'_class_name': other}))
    with pytest.raises(BadInput, match=f'{other} is not a family') as e:
        T.open_field(str(folder))
    assert all(k in str(e.value) for k in T.FAMILIES)
    assert type(T.open_field(str(folder), family=index['_class_name'])) is type(field)


def told(name, height, width, editing=False):
    """What is said of a size before weights are loaded; None if it is fine."""
    field = shared(name)
    configs = dict(vae=dict(field.vae.config), transformer=dict(field.net.config))
    configs['vae'].pop('block_out_channels' if name in QWENS else '', None)    # its file has none
    try:
        pipe = type(field.pipe).__name__
        M.check_size(type(field), pipe, configs, height, width, editing)
    except BadInput as e:
        return str(e)


@pytest.mark.parametrize('name', [*BUILD, *SHOWN])
def test_sizes_that_a_family_does_not_take(name):
    unit = 8 if name in UNETS else 16
    assert told(name, 3 * unit, 5 * unit) is None
    assert f'of {unit} pixels, not {unit + 1}; the nearest is {unit}' in told(name, unit + 1, 64)
    assert f'a width in multiples of {unit} pixels, not 0' in told(name, unit, 0)
    can = shared(name).can_edit
    assert (told(name, 64, 64, True) is None) == can
    assert can or all(k in told(name, 64, 64, True) for k in ('cannot edit', 'a model that can'))


@torch.no_grad()
def test_sd3_ends_where_its_table_of_positions_does():
    for name, editing, most in (('sd3', False, 256), ('sd3', True, 128), ('sd3-wide', True, 256)):
        assert told(name, 256, most, editing) is None          # a table of 16 x 16 tokens
        assert f'table of positions, 256 x {most}' in told(name, 256, most + 16, editing)
        assert 'table of positions' in told(name, 272, 64, editing)
        field = shared(name)
        z = torch.randn(1, *field.shape(32, most + 16))
        cond = conditions(field, WORDS[:1], [dict(source=z[0])] if editing else [])[0]
        with pytest.raises(ValueError, match='pos_embed_max_size'):    # and the model says so too
            field.velocity(z, torch.ones(1), cond)
        cond = conditions(field, WORDS[:1], [dict(source=z[0, ..., :-2])] if editing else [])[0]
        field.velocity(z[..., :-2], torch.ones(1), cond)


@torch.no_grad()
def test_qwen_ends_where_its_words_have_no_positions_left():
    field, most = shared('qwen'), 16 * 6144
    assert told('qwen', most, most) is None and told('qwen-plus', most - 48000, 64, True) is None
    for h, w in ((most + 16, 64), (64, most + 16)):
        assert f'table of positions, {most} x {most}' in told('qwen', h, w)
    less = most - 48000
    assert f'{less} x {less} pixels with a source' in told('qwen-plus', most, 64, True)
    words = [dict(text=torch.randn(1024, 16))]                 # the most that the pipeline takes
    z = noise(field, 1, (16, most + 32))                       # a picture's middle is at 0
    assert field.velocity(z[..., :-4], torch.ones(1), words).isfinite().all()
    with pytest.raises(RuntimeError, match='must match the size'):
        field.velocity(z, torch.ones(1), words)


EDITS = 'omni', 'kontext', 'klein', 'sd3-wide'
LEARN = dict(zimage='danceopd', omni='diffusionopd', flux='flowopd', kontext='danceopd',
             klein='diffusionopd', qwen='danceopd', sd15='diffusionopd', sdxl='flowopd',
             **{'sd3-wide': 'danceopd', 'sd-turbo': 'diffusionopd'})
SHORT = ['--init_from=base', '--device=cpu', '--lr_schedule=constant', '--warmup=1', '--rank=4',
         '--alpha=4', '--lr=1e-2', '--steps=3', '--max_steps=8', '--save_every=4', '--show=1',
         '--eval_every=100', '--sample_steps=2', '--eval_samples=3', '--batch_size=6',
         '--micro_batch=6', '--ema_decay=0', '--ckpt_keep=9',
         "--routes=[dict(teacher='one', data='things')]"]


def a_teacher(field):
    g = torch.Generator().manual_seed(1)

    def draw(*s):
        return torch.randn(*s, generator=g) / s[1] ** 0.5
    return {k: (draw(2, m.in_features), 2 * draw(m.out_features, 2), 1.0)
            for k, m in field.net.named_modules()
            if isinstance(m, torch.nn.Linear) and any(k.endswith('.' + t) for t in field.targets)}


def learns(name, method, folder):
    """A short run on a family's saved pipeline: its result, and its end without and with a stop."""
    field, edit = build(name), name in EDITS
    size = LARGER[0] if name == 'omni' else SIZES[0]
    field.pipe.save_pretrained(folder / 'model')
    merge_lora.write_adapter(folder / 'teacher', a_teacher(field), prefix=field.prefix)
    picture(0, size).save(folder / 'source.png')
    rows = [f'{w},things,{"source.png" * edit}' for w in WORDS]
    (folder / 'things.csv').write_text('\n'.join(['prompt,task,source_image', *rows]))
    args = [*SHORT, f'--model={folder}/model', f'--resolution={list(size)}', f'--method={method}',
            f"--teachers=[dict(name='one', lora='{folder}/teacher')]",
            f"--data=['{folder}/things.csv']", f'--max_sequence_length={length(name)}']
    if method == 'flowopd':
        args += ['--eta=0.7', '--group_size=3', '--reward=code', '--drop_last=1']
    train_opd.main(args + [f'--out_dir={folder}/run'])
    shutil.copytree(folder / 'run', folder / 'half', symlinks=True)
    shutil.rmtree(folder / 'half' / 'step_000008')
    train_opd.main([*args[1:], f'--out_dir={folder}/half', '--init_from=resume'])
    ends = [torch.load(folder / r / 'step_000008' / 'train_state.pt', weights_only=True)['student']
            for r in ('run', 'half')]
    return json.loads((folder / 'run' / 'result.json').read_text())['things'], ends


@pytest.mark.parametrize('name', LEARN)
def test_every_family_learns_and_resumes(name, tmp_path):
    result, (whole, resumed) = learns(name, LEARN[name], tmp_path)
    assert result['gap_after'] < 0.97 * result['gap_before'], result
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
