"""Settings: the table before step 0, choices, what a method does not read."""
from conftest import *

CONFIGS = sorted((ROOT / 'config').glob('*.py'))


def script_of(path):
    return train_teacher if path.name.startswith('teacher_') else T


def settings_of(path):
    return configure(script_of(path).SETTINGS, [str(path)])


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_nothing_of_the_demonstration_is_in_another_models_config(path):
    c = settings_of(path)
    if 'shapes' not in c.model:
        smallest = min(c.resolution) if isinstance(c.resolution, (list, tuple)) else c.resolution
        assert not c.score and smallest >= 512
        assert not any('shapes' in str(v) for v in (c.data, c.eval_data, c.out_dir))
        given = set()
        configure(script_of(path).SETTINGS, [str(path)], given)
        assert 'lr' in given
        assert script_of(path) is train_teacher or {'init_from', 'steps', 'drop_last'} <= given


def test_the_demonstrations_config_is_what_the_script_does_without_one():
    assert vars(settings_of(ROOT / 'config' / 'shapes.py')) == vars(configure(T.SETTINGS, []))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    T.main(['--dry_run', f'--out_dir={tmp_path}/run'])
    assert not (tmp_path / 'run').exists()
    said = capsys.readouterr().out
    for words in ('model .*shapes/base .StableDiffusion3Pipeline.',
                  'danceopd, 5 steps, ODE, the last 1 not learned from, from data/shapes/',
                  'updates +250, from 8500 rollouts; rate 0.008, cosine',
                  'samples a step +34 in groups of 1; 34 on each of 1 process',
                  'route local_edit +teacher local_edit, .* rows, weight 1.0, 24 x 24 pixels'):
        assert re.search(words, said), said


def test_only_what_nobody_set_goes_with_another_model(tmp_path):
    """The demonstration's held-out files, score and start mean nothing elsewhere, unless asked
    for."""
    def own(*words):
        return checks.own_settings(T.SETTINGS, words)
    assert own().score and own().eval_data
    assert own('--model=./data/shapes/base/').init_from == own().init_from
    other = own('--model=elsewhere')
    assert other.score == '' and other.eval_data == [] and other.init_from == 'merge'
    assert other.lr == 2e-4 == checks.own_settings(train_teacher.SETTINGS, ['--model=x']).lr
    assert own('--model=elsewhere', '--lr=8e-3').lr == own().lr == 8e-3
    assert own('--model=elsewhere', f'--init_from={own().init_from}').init_from == own().init_from
    assert checks.own_settings(train_teacher.SETTINGS, ['--model=elsewhere']).init_from == 'base'
    assert own('--model=elsewhere', f'--score={own().score}').score == own().score
    assert checks.own_settings(train_teacher.SETTINGS, ['--model=x']).drop_last == 1
    (tmp_path / 'c.py').write_text(f'eval_data = {own().eval_data!r}')
    assert own('--model=elsewhere', f'{tmp_path}/c.py').eval_data == own().eval_data


@pytest.mark.parametrize('words, left', [
    (['--family=StableDiffusion3Pipeline'], 1), (['--family=FluxPipeline'], 0),
    (['--family=FluxPipeline', '--drop_last=1'], 1), (['--drop_last=2'], 2)])
def test_a_family_says_which_steps_teach_nothing(words, left):
    argv = ['--model=owner/repo', "--data=['data/examples/t2i.txt']", '--init_from=base',
            '--teachers=[dict(name="a")]', '--routes=[dict(teacher="a",data="t2i")]',
            '--resolution=64', *words]
    c = checks.own_settings(T.SETTINGS, argv)
    checks.check(c, T.SETTINGS[0], T.FAMILIES, T.CHOICES)
    assert c.drop_last == left
    with pytest.raises(BadInput, match='owner/repo is not here: .*set family, or drop_last'):
        c = checks.own_settings(T.SETTINGS, argv[:6])
        checks.check(c, T.SETTINGS[0], T.FAMILIES, T.CHOICES)


@pytest.mark.parametrize('script', [T, train_teacher], ids=['opd', 'teacher'])
def test_methods_name_settings_that_there_are(script):
    defaults = script.SETTINGS[0]
    assert script.METHODS
    for name, method in script.METHODS.items():
        assert set(method.settings) <= set(defaults), name
        assert len(set(method.settings)) == len(method.settings)


def others_value(x):
    """Another value of the same type that no other rule minds."""
    return not x if type(x) is bool else x / 2 + 0.01 if type(x) is float else 17


IN_VAIN = [(m, k) for m in T.METHODS for k in sorted({k for x in T.METHODS.values()
                                                     for k in x.settings})
           if k not in T.METHODS[m].settings]


@pytest.mark.parametrize('method, key', IN_VAIN)
def test_nothing_is_set_in_vain(method, key):
    default, choices = T.SETTINGS[0][key], T.CHOICES.get(key, ())
    value = next((x for x in choices if x != default), None) or others_value(default)
    with pytest.raises(BadInput, match=f"{key}: method = '{method}' does not read it; leave it at"):
        T.main(['--dry_run', '--eta=0.7', f'--method={method}', f'--{key}={value!r}'])


@pytest.mark.parametrize('key', [k for k in T.CHOICES if k != 'routes_per_step'])
def test_a_choice_is_one_of_its_table(key):
    with pytest.raises(BadInput, match=f"{key}: 'nonsense' is not one of "):
        T.main(['--dry_run', f'--{key}=nonsense'])


def test_the_choices_are_the_keys_of_the_tables():
    tables = dict(method=T.METHODS, query=T.QUERIES, states=T.STATES, sde=T.SDES, reward=T.REWARDS)
    assert all(T.CHOICES[k] is table for k, table in tables.items())
    assert all(T.SETTINGS[0][k] in known for k, known in T.CHOICES.items())


def test_a_route_may_have_its_own_size(tmp_path, capsys):
    routes = [dict(teacher='base', data='t2i', resolution=[24, 32], samples=17),
              dict(teacher='count', data='count', samples=17)]
    T.main(['--dry_run', f'--routes={routes!r}'])
    said = capsys.readouterr().out
    assert re.search('route t2i .*24 x 32 pixels', said)
    assert re.search('route count .*24 x 24 pixels', said)


@pytest.mark.parametrize('script', [T, train_teacher])
def test_what_is_compiled_cannot_read_a_base_in_8_bits_backwards(script):
    with pytest.raises(BadInput, match='compile does not go with base_storage'):
        script.main(['--dry_run', '--compile=True', '--base_storage=float8'])


def test_data_that_no_route_has_is_told(capsys):
    T.main(['--dry_run', "--routes=[dict(teacher='count',data='count',samples=34)]"])
    said = capsys.readouterr().out
    assert re.search('not used +buckets that no route has: global_edit, local_edit, t2i', said)
    assert re.search('not used +teachers that no route has: local_edit, global_edit', said)
    T.main(['--dry_run'])
    assert 'not used' not in capsys.readouterr().out


def test_own_data_goes_without_own_held_out_rows(tmp_path, capsys):
    """The demonstration's held-out files are not meant for it, and that is no mistake."""
    (tmp_path / 'mine.csv').write_text('prompt\na red circle on white\n')
    T.main(['--dry_run', f"--data=['{tmp_path}/mine.csv']",
            "--routes=[dict(teacher='count',data='mine',samples=34)]"])
    said = capsys.readouterr().out
    assert re.search('route mine .*evaluated on the same', said)
    assert re.search('not used +buckets that no route has: count, global_edit', said)
