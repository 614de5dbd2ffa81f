"""A family from a saved folder: it opens, its sizes, and a run learns and resumes."""
from common import *
from pipelines import *


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
