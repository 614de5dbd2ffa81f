"""sample.py."""
import itertools

from conftest import *

BASE = 'data/shapes/base'
SENTENCES = 'a red circle top left on white|a blue square bottom right on gray'


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def shoot(tmp_path, *words, out='pictures'):
    """sample.main into a fresh folder: {name: array in [0, 1]}."""
    folder = tmp_path / out
    sample.main([*words, f'--out_dir={folder}', '--device=cpu'])
    return {p.name: np.asarray(Image.open(p)) / 255 for p in sorted(folder.glob('*.png'))}


def some_adapter(seed, size=0.2):
    """Random factors on a few layers of the shapes model, large enough to be seen."""
    draw, shapes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(BASE)
    names = [k for k in shapes if k.endswith(('attn.to_q', 'attn.to_v', 'attn.to_out.0'))]
    return {
        k: (
            size * torch.randn(4, shapes[k][1], generator=draw),
            size * torch.randn(shapes[k][0], 4, generator=draw),
        )
        for k in names
    }


def factors(seed, alpha=4.0):
    return {k: (A, B, alpha / 4) for k, (A, B) in some_adapter(seed).items()}


def some_run(folder, **settings):
    """A run's folder as the trainers leave it: the average, the student's own weights, and the
    start, all different."""
    settings = dict(model=BASE, family='', resolution=24, max_sequence_length=256, sample_steps=3,
                    distilled_guidance=3.5, rollout_guidance=1.0, routes=[],
                    eval_data=['data/examples/t2i.txt']) | settings

    def write(to, prefix):
        merge_lora.write_adapter(to, some_adapter(2), 8.0, prefix)
        state = dict(optimizer=dict(state={}), alpha=8.0, student={
            f'{k}.lora_{ab}.student.weight': x for k, m in some_adapter(1).items()
            for ab, x in zip('AB', m)})
        counts = dict(updates=7, skipped=0, idle=0, recent=[])
        state |= dict(averaged=True, counts=counts)
        torch.save(state, to / 'train_state.pt')
    merge_lora.write_adapter(folder / 'start', some_adapter(3), 4.0)
    R.save_checkpoint(folder, 7, write, 'transformer', dict(settings=settings, teachers={}), 2)
    return folder


def pipeline_pictures(adapter=None, guidance=1.0, steps=4, seed=0, num=2):
    """The same prompts and noise through the diffusers pipeline."""
    import diffusers
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_lora_weights(str(adapter), weight_name='pytorch_lora_weights.safetensors')
    todo = [(i, p, k) for i, p in enumerate(SENTENCES.split('|')) for k in range(num)]
    side = 24 // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    shape = pipe.vae.config.latent_channels, side, side
    noise = torch.stack([torch.randn(shape, generator=train_opd.torch_rng(seed, i, k))
                         for i, _, k in todo])
    x = pipe(
        [p for _, p, _ in todo],
        latents=noise,
        height=24,
        width=24,
        num_inference_steps=steps,
        output_type='np',
        guidance_scale=guidance,
        max_sequence_length=pipe.tokenizer_3.model_max_length,
    ).images
    return {f'{i:04d}_{k}.png': a for (i, _, k), a in zip(todo, x)}


@pytest.mark.parametrize('guidance', [1.0, 3.0])
@pytest.mark.parametrize('adapted', [False, True])
def test_sampler_equals_the_pipeline(tmp_path, guidance, adapted):
    ckpt = tmp_path / 'adapter' if adapted else ''
    if adapted:
        merge_lora.write_adapter(ckpt, some_adapter(1), 8.0)
    ours = shoot(tmp_path, f'--ckpt={ckpt}', f'--model={BASE}', f'--prompt={SENTENCES}',
                 '--steps=4', f'--guidance={guidance}')
    theirs = pipeline_pictures(ckpt, guidance)
    for k, x in theirs.items():
        assert np.abs(ours[k] - x).max() < 0.51 / 255, k                # a PNG rounds to 1 / 255
    assert np.abs(theirs['0000_0.png'] - theirs['0001_0.png']).max() > 0.1


def test_run_folder_and_its_parts(tmp_path, capsys):
    run, one = some_run(tmp_path / 'run'), '--prompt=a red circle top left on white'
    merge_lora.write_adapter(tmp_path / 'own', some_adapter(1), 8.0)
    merge_lora.write_adapter(tmp_path / 'average', some_adapter(2), 8.0)
    places = dict(run=run, step=run / 'step_000007', start=run / 'start', own=tmp_path / 'own',
                  average=tmp_path / 'average')
    words = f'--model={BASE}', '--steps=3', one
    of = {k: shoot(tmp_path, f'--ckpt={path}', *words, out=k)['0000_0.png']
          for k, path in places.items()}
    live = shoot(tmp_path, f'--ckpt={run}', one, '--ema=False', out='live')['0000_0.png']
    assert '24 x 24 pixels, 3 steps, guidance 1.0' in capsys.readouterr().out
    base = shoot(tmp_path, '--ckpt', str(run), one, '--scale=0', out='base')['0000_0.png']
    bare = shoot(tmp_path, f'--model={BASE}', '--steps=3', one, out='bare')['0000_0.png']
    for a, b in ((of['run'], of['average']), (of['step'], of['average']), (live, of['own']),
                 (base, bare)):
        assert (a == b).all()
    for a, b in itertools.combinations((of['run'], live, base, of['start']), 2):
        assert np.abs(a - b).max() > 0.05


def test_the_students_own_weights_are_asked_for_in_vain(tmp_path):
    run = some_run(tmp_path / 'run')
    (run / 'latest' / 'train_state.pt').unlink()
    with pytest.raises(BadInput, match='holds only the average'):
        shoot(tmp_path, f'--ckpt={run}', '--prompt=x', '--ema=False')


def checked(*words):
    """Settings as they are before weights are loaded, and the samples' sizes by bucket."""
    c = sample.configure(sample.SETTINGS, list(words))
    return c, {s.label: s.size for s in sample.check(c)[2]}


def test_what_is_given_wins_over_the_run(tmp_path):
    run, one = some_run(tmp_path / 'run', resolution=[24, 48]), '--prompt=x'
    c, sizes = checked(f'--ckpt={run}', one)
    assert (c.model, c.steps, c.guidance, sizes) == (BASE, 3, 1.0, {'all': (24, 48)})
    c, sizes = checked(f'--ckpt={run}', one, '--height=48', '--width=24', '--steps=9',
                       '--guidance=2.5', '--max_sequence_length=8')
    assert (c.steps, c.guidance, c.max_sequence_length, sizes) == (9, 2.5, 8, {'all': (48, 24)})
    teacher = some_run(tmp_path / 'teacher', rollout_guidance=4.5, distilled_guidance=2.5)
    c, _ = checked(f'--ckpt={teacher}', one)
    assert (c.guidance, c.distilled_guidance) == (4.5, 2.5)
    c, sizes = checked(f'--model={BASE}', one)                 # size from the model's own configs
    assert (c.steps, c.guidance, sizes) == (28, 1.0, {'all': (24, 24)})
    assert checked('--model=owner/repo', '--family=FluxPipeline', one)[1] == {'all': (1024, 1024)}


def test_the_size_of_a_hub_id_is_known_when_its_configs_are(monkeypatch):
    opened = train_opd.open_field(BASE)
    monkeypatch.setattr(sample, 'open_field', lambda *a: opened)
    for word, size in ('--seed=0', (24, 24)), ('--width=48', (24, 48)):
        c = sample.configure(sample.SETTINGS, ['--model=owner/repo', '--prompt=x', word])
        rows = sample.check(c)[2]
        sample.open_models(c, {}, rows)
        assert [s.size for s in rows] == [size]


def test_a_routes_own_size(tmp_path):
    data, routes = [f'data/shapes/{k}_val.csv' for k in ('t2i', 'count', 'open')], [
        dict(data='count', size=[24, 48]), dict(data='t2i', size=[24, 24])]
    run = some_run(tmp_path / 'run', eval_data=data, routes=routes, resolution=48)
    sizes = dict(count=(24, 48), t2i=(24, 24), open=(48, 48))
    assert checked(f'--ckpt={run}')[1] == sizes
    assert checked(f'--ckpt={run}', '--width=24')[1] == {k: (h, 24) for k, (h, _) in sizes.items()}
    assert checked(f'--ckpt={run}', f'--prompts={data[1]}')[1] == dict(count=(24, 48))
    run = some_run(tmp_path / 'two', eval_data=data[:2], routes=routes)
    got = shoot(tmp_path, f'--ckpt={run}', '--num=1', '--steps=1')
    assert [got[f'{i:04d}_0.png'].shape[:2] for i in range(6)] == [(24, 24)] * 3 + [(24, 48)] * 3
    assert got['grid.png'].shape[0] > 6 * 120                  # a line each


def test_pictures_are_never_written_over(tmp_path, capsys):
    words = [f'--model={BASE}', '--prompt=a shape|two shapes', '--steps=2']
    first = shoot(tmp_path, *words, '--num=2')
    assert 'from before' not in capsys.readouterr().out
    again = shoot(tmp_path, *words, '--num=1')
    assert 'pictures from before: these are numbered from 0002' in capsys.readouterr().out
    new = {'0002_0.png', '0003_0.png', 'grid_0002.png'}
    assert set(again) - set(first) == new and all((again[k] == first[k]).all() for k in first)
    assert (again['0002_0.png'] == first['0000_0.png']).all()  # the noise is the prompt's
    out = tmp_path / 'pictures'
    for name in set(again) - {'grid.png', 'grid_0002.png'}:
        (out / name).unlink()
    assert 'grid_0003.png' in shoot(tmp_path, *words)
    with R.locked(out), pytest.raises(BadInput, match='is being written by process'):
        sample.main([*words, f'--out_dir={out}'])


def test_noise_follows_seed_prompt_and_picture(tmp_path):
    words = ['--ckpt=', f'--model={BASE}', '--prompt=a shape|two shapes', '--steps=2', '--num=3']
    a = shoot(tmp_path, *words, out='a')
    b = shoot(tmp_path, *words, '--batch_size=1', out='b')
    c = shoot(tmp_path, *words[:-1], '--num=1', '--seed=1', out='c')
    assert set(a) == {f'{i:04d}_{k}.png' for i in range(2) for k in range(3)} | {'grid.png'}
    assert all(np.abs(a[k] - b[k]).max() <= 1 / 255 for k in a if k != 'grid.png')
    assert (
        set(c) == {'0000_0.png', '0001_0.png', 'grid.png'}
        and np.abs(a['0000_0.png'] - c['0000_0.png']).max() > 0.1
    )
    assert np.abs(a['0000_0.png'] - a['0000_1.png']).max() > 0.1


def test_sources_and_a_prompts_file(tmp_path, capsys):
    Image.new('RGB', (48, 48), (200, 30, 30)).save(tmp_path / 'own.png')
    Image.new('RGB', (24, 24), (30, 30, 200)).save(tmp_path / 'shared.png')
    (tmp_path / 'rows.csv').write_text(
        'prompt,task,source_image\nremove the circle,a,own.png\na circle on white,b,\n'
    )
    words = [f'--model={BASE}', '--steps=2', '--num=1', f'--prompts={tmp_path / "rows.csv"}']
    mixed = shoot(tmp_path, *words, out='mixed')
    said = capsys.readouterr().out.split()
    assert {str(tmp_path / 'mixed' / k) for k in mixed} <= set(said)    # every file is printed
    both = shoot(tmp_path, *words, f'--source={tmp_path / "shared.png"}', out='both')
    assert (mixed['0000_0.png'] == both['0000_0.png']).all()  # a row's own comes first
    assert (mixed['0001_0.png'] != both['0001_0.png']).any()            # and the second now has one
    assert np.allclose(mixed['grid.png'][40, 40, :3], np.array([200, 30, 30]) / 255, atol=0.01)


def test_the_score_is_that_of_the_pictures_that_are_written(tmp_path, capsys):
    lines = Path('data/shapes/count_val.csv').read_text().splitlines()[:4]
    lines += Path('data/shapes/t2i_val.csv').read_text().splitlines()[1:9]
    (tmp_path / 'rows.csv').write_text('\n'.join(lines))
    got = shoot(tmp_path, f'--model={BASE}', '--steps=4', f'--prompts={tmp_path / "rows.csv"}',
                '--num=2', '--score=data/shapes/world.py:score')
    said = dict(re.findall(r'score of (\w+): ([0-9.]+)', capsys.readouterr().out))
    rows = rows_of(tmp_path / 'rows.csv')
    for bucket in ('count', 't2i'):
        mine = [i for i, r in enumerate(rows) for _ in range(2) if r['task'] == bucket]
        x = torch.stack([torch.tensor(got[f'{i:04d}_{k}.png'][..., :3]).permute(2, 0, 1)
                         for i, r in enumerate(rows) for k in range(2) if r['task'] == bucket])
        right = [s['right'] for s in shapes.score(x, [rows[i] for i in mine])]
        assert float(said[bucket]) == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert float(said['t2i']) > float(said['count'])


def test_a_score_later_is_asked_of_the_rows_that_the_run_scores(tmp_path, capsys):
    (tmp_path / 'few.py').write_text(
        'def f(images, rows):\n    return [len(r["prompt"]) for r in rows]')
    run = some_run(tmp_path / 'run', eval_data=['data/shapes/t2i_val.csv'], seed=5, eval_samples=9,
                   show=2, score_samples=6)
    shoot(tmp_path, f'--ckpt={run}', f'--score={tmp_path}/few.py:f', '--num=1', '--steps=1')
    buckets = read_data(['data/shapes/t2i_val.csv'])[0]
    rows = files.Data({}, buckets).drawn(5, 9)['t2i'][:6]
    mean = sum(len(r['prompt']) for r in rows) / 6
    assert f'score of t2i: {mean:.4f}, of 6 pictures' in capsys.readouterr().out


def test_a_teachers_score_later_is_of_the_rows_that_it_evaluates(world, tmp_path, capsys):
    (tmp_path / 'one.py').write_text('def f(images, rows):\n    return [1.0 for r in rows]')
    run = world.teach(tmp_path / 'run', method='sft', data=[str(world.at / 'edits.csv')],
                      max_steps=1, eval_samples=5, show=2)
    shoot(tmp_path, f'--ckpt={run}', f'--score={tmp_path}/one.py:f', '--num=1', '--steps=1')
    assert 'score of edits: 1.0000, of 5 pictures' in capsys.readouterr().out


@pytest.mark.parametrize('body, says', [
    ('1 / 0', 'ZeroDivisionError'), ('[1.0]', 'gave 1 values for 2 pictures'),
    ('[float("nan")] * 2', 'no finite number')])
def test_a_score_that_fails_loses_no_picture(tmp_path, body, says):
    (tmp_path / 'own.py').write_text(f'def f(images, rows):\n    return {body}')
    with pytest.raises(files.RewardError, match=says) as e:
        shoot(tmp_path, f'--model={BASE}', '--prompt=a|b|c', '--num=2', '--steps=1',
              '--batch_size=2', f'--score={tmp_path}/own.py:f')
    assert 'All pictures are in' in str(e.value)
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 6 + 1


def test_without_a_prompt_the_runs_own_rows(tmp_path):
    data = [f'data/examples/{k}' for k in ('local_edit.csv', 't2i.txt')]
    run = some_run(tmp_path / 'run', eval_data=data)
    got = shoot(tmp_path, f'--ckpt={run}', '--num=1')
    assert len(got) == 3 + 3 + 1  # three of each bucket, and the sheet


@pytest.mark.parametrize(
    'words, says',
    [
        (['--ckpt=out/no_such_run'], 'no_such_run'),
        (['--ckpt=', '--prompt=x'], '--model'),
        (['--ckpt={adapter}', '--prompt=x'], 'give --model'),
        (['--ckpt={damaged}', '--prompt=x'], 'damaged'),
        (['--ckpt={run}', '--prompt=x', '--prompts=y.txt'], 'not both'),
        (['--ckpt={run}', '--prompt=|'], 'no prompt'),
        (['--ckpt={run}', '--prompts=no_such.txt'], 'no_such.txt'),
        (['--ckpt={run}', '--prompt=x', '--source=no_such.png'], 'no_such.png'),
        (['--ckpt={run}', '--prompt=x', '--height=25'], '25'),
        (['--ckpt={run}', '--prompt=x', '--width=960'], 'larger'),
        (['--ckpt={run}', '--prompt=x', '--num=0'], 'num'),
        (['--ckpt={run}', '--prompt=x', '--steps=-1'], 'steps'),
        (['--ckpt={run}', '--prompt=x', '--dtype=int8'], 'int8'),
        (['--ckpt={run}', '--prompt=x', '--model=data/nowhere'], 'data/nowhere'),
        (
            [
                '--model=owner/repo',
                '--family=FluxPipeline',
                '--prompt=x',
                '--source=data/examples/pictures/local_edit_0.png',
            ],
            'cannot edit',
        ),
    ],
)
def test_bad_input_before_weights_are_loaded(tmp_path, monkeypatch, words, says):
    run, bad = some_run(tmp_path / 'run'), some_run(tmp_path / 'damaged')
    (bad / 'latest' / 'meta.json').write_text('{"settings"')
    merge_lora.write_adapter(tmp_path / 'adapter', some_adapter(1), 4.0)
    monkeypatch.setattr(sample, 'open_field', lambda *a, **k: pytest.fail('weights were loaded'))
    words = [w.format(run=run, adapter=tmp_path / 'adapter', damaged=bad) for w in words]
    with pytest.raises(BadInput, match=says):
        sample.main([*words, f'--out_dir={tmp_path / "out"}'])
