"""Settings: what is one, which values they take, how bad ones are refused, and --help."""
from conftest import *

TEXT = '''"""A script.   name = 'x'  # not this"""
import os
from pathlib import Path
_hidden = 1
LIMIT = 3                           # a constant is no setting

# --------------------------------------------------
# Settings
# model, and what
# belongs to it
lr = 1e-4                           # of Adam,
                                    # warmed up
steps = 10  # how many
compile = False
name = "x"                          # a # is part of a comment

# words
seed: int | None = None
which: str | int = "a"              # annotated
routes = [1,
          2]                        # of two lines
pair = (1, 2)


def f():
    pair = 3                        # of a function
'''
SETTINGS = {'lr', 'steps', 'compile', 'name', 'seed', 'which', 'routes', 'pair'}


def settings(text=TEXT, file=None):
    m = types.ModuleType('script')
    exec(text, vars(m))
    if file:
        file.write_text(text)
        m.__file__ = str(file)
    return collect(m)


def conf(tmp_path, text, name='c.py'):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_collect_takes_settings_only():
    defaults, kinds, _ = settings()
    assert set(defaults) == SETTINGS
    assert kinds['lr'] is float and isinstance(3, kinds['seed']) and isinstance(None, kinds['seed'])


@pytest.mark.parametrize('argv, key, value', [
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
    (['--name=...'], 'name', '...'),
    (['--name=1e999'], 'name', '1e999'),
    (['--name='], 'name', ''),
    (['--name', 'a b'], 'name', 'a b'),
    (['--seed=None'], 'seed', None),
    (['--seed=3'], 'seed', 3),
    (['--which=3'], 'which', 3),
    (['--which=b'], 'which', 'b'),
    (['--which=True'], 'which', 'True'),
    (['--routes=(3,4)'], 'routes', [3, 4]),
    (['--routes=[]'], 'routes', []),
    (["--routes=[dict(data='t2i', weight=.5), {'a': dict(b=-1)}, dict()]"], 'routes',
     [{'data': 't2i', 'weight': 0.5}, {'a': {'b': -1}}, {}]),
    (["--name=dict(**{'a': 1})"], 'name', "dict(**{'a': 1})"),
    (['--pair=[3,4]'], 'pair', (3, 4)),
    ([], 'seed', None)])
def test_values(argv, key, value):
    got = getattr(configure(settings(), argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('argv, words', [
    (['--stps=3'], ['stps', 'steps']),
    (['--f=3'], ['unknown setting f']),
    (['--_hidden=3'], ['unknown setting']),
    (['--LIMIT=3'], ['unknown setting LIMIT']),
    (['--steps=1.5'], ['steps', 'int', 'float', '1.5']),
    (['--steps=True'], ['int', 'bool']),
    (['--lr=True'], ['float', 'bool']),
    (['--compile=1'], ['bool', 'int']),
    (['--steps=None'], ['steps should be int', 'None']),
    (['--steps=ten'], ['int', "'ten'"]),
    (['--steps'], ['needs a value']),
    (['--lr', '--steps=3'], ['needs a value']),
    (['--seed=x'], ['int | None']),
    (['--routes=[open(1)]'], ['list', '[open(1)]']),
    (['missing.py'], ['no such config file', 'missing.py']),
    (['lr=3'], ['no such config file', '--lr=3']),
    (['-lr=3'], ['--lr=3']),
    (['steps', '3'], ['--steps']),
    (['.'], ['no such config'])])
def test_refusals(argv, words):
    with pytest.raises(BadInput) as e:
        configure(settings(), argv)
    assert all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize('key, text', [
    ('lr', '1e999'), ('lr', '-1e999'), ('lr', '1e30'), ('lr', '1' + '0' * 400),
    ('seed', '1' + '0' * 30),
    ('steps', '-' + '9' * 25), ('routes', '[1, 1e999]'), ('routes', "[{'a': [{'b': -1e999}]}]"),
    ('routes', '[{1, 2}]'), ('routes', "[b'x']"), ('routes', '[2j]'), ('routes', '[...]'),
    ('routes', '[{1e999: 2}]'), ('pair', '(1, 1e999)')])
def test_numbers_and_things_that_nobody_can_work_with(key, text, tmp_path):
    for argv in [f'--{key}={text}'], [conf(tmp_path, f'{key} = {text}\n')]:
        with pytest.raises(BadInput, match=f'{key} cannot hold the '):
            configure(settings(), argv)


def test_things_of_a_config_file(tmp_path):
    for text in ('import pathlib\nroutes = [pathlib.Path("x")]', 'routes = [len]',
                 'lr = float("nan")', 'import numpy\nroutes = [numpy.float64(1)]'):
        with pytest.raises(BadInput, match='cannot hold the '):
            configure(settings(), [conf(tmp_path, text)])


def test_config_files_in_order(tmp_path):
    a = conf(tmp_path, 'import math\n_x = 3\nsteps = steps * 2\nlr = 1\nroutes.append(_x)\n',
             'a.py')
    b = conf(tmp_path, 'steps += 1\nname = f"run{steps}"\n', 'b.py')
    s, given = settings(), set()
    c = configure(s, [a, b, '--lr=3'], given)
    assert (c.steps, c.name, c.lr, c.routes) == (21, 'run21', 3.0, [1, 2, 3])
    assert type(c.lr) is float
    assert {'steps', 'lr', 'name'} <= given and not given & {'seed', 'which', 'pair', 'compile'}
    assert configure(s, ['--steps=1', a]).steps == 2
    assert configure(s, ['--compile', a]).compile is True
    assert s == settings()                                     # nothing leaked into the defaults
    configure(s, []).routes.append(9)
    assert s == settings()


@pytest.mark.parametrize('text, words', [
    ('stesp = 3', ['stesp', 'steps']),
    ('def g(): pass', ['unknown setting g']),
    ('class G: pass', ['unknown setting G']),
    ('\nsteps = 1/0', ['line 2', 'ZeroDivisionError', 'division']),
    ('steps = 1\nlr = (', ['line 2', 'SyntaxError']),
    ('steps = "3"', ['steps', 'int', "'3'"]),
    ('steps = nope', ['line 1', 'nope']),
    ('lr = None', ['lr should be float']),
    ('steps = 2\n\nraise SystemExit(0)', ['line 3'])])
def test_config_file_refusals(tmp_path, text, words):
    path = conf(tmp_path, text)
    with pytest.raises(BadInput) as e:
        configure(settings(), [path])
    assert all(w in str(e.value) for w in [path, *words]), e.value


# -------------------- --help
def told(s, capsys):
    with pytest.raises(SystemExit) as e:
        configure(s, ['--steps=3', '--help'])
    assert not e.value.code
    return capsys.readouterr().out


def test_help_tells_defaults_and_comments_in_their_groups(capsys, tmp_path):
    lines = told(settings(TEXT, tmp_path / 'script.py'), capsys).strip().splitlines()
    assert [' '.join(line.split()) for line in lines] == [
        '# Settings', '# model, and what', '# belongs to it', '--lr=0.0001 of Adam, warmed up',
        '--steps=10 how many', '--compile=False', "--name='x' a # is part of a comment", '',
        '# words', '--seed=None (int | None)', "--which='a' (str | int) annotated",
        '--routes=[1, 2] of two lines', '--pair=(1, 2)']
    assert all(f'--{k}={v!r}' in told(settings(), capsys) for k, v in settings()[0].items())


def test_help_of_a_script_that_takes_settings_over(capsys, tmp_path):
    """Explained here, else there, but not if a group of its own explains it here."""
    other = '# mine\nsteps = 3\nlr = 2.0  # another\n# its kind\nname = "y"\nnew = 1  # new\n'
    pairs = zip(settings(TEXT, tmp_path / 'a.py'), settings(other, tmp_path / 'b.py'))
    text = told(tuple({**shared, **own} for shared, own in pairs), capsys)
    lines = [' '.join(line.split()) for line in text.splitlines()]
    at = lines.index
    assert at('# mine') < at('--lr=2.0 another') < at('# its kind') < at("--name='y'")
    assert lines[at('--steps=3') - 1] == '--lr=2.0 another'
    assert lines[at("--name='y'") + 1] == '--new=1 new'
    assert at("--which='a' (str | int) annotated") > at('# words')


@pytest.mark.parametrize('script, key, words', [
    ('train_opd', 'eta', 'ODE'), ('train_teacher', 'gamma', 'sdpo'),
    ('sample', 'ckpt', 'run folder'),
    ('train_teacher', 'rank', 'LoRA'), ('merge_lora', 'into_base', 'model folder')])
def test_help_of_the_scripts(script, key, words):
    p = subprocess.run([sys.executable, f'{script}.py', '--help'], cwd=ROOT, env=ONE_THREAD,
                       capture_output=True, text=True)
    lines = [line for line in p.stdout.splitlines() if line.startswith('--')]
    keys = [line[2:].split('=')[0] for line in lines]
    assert p.returncode == 0 and not p.stderr and keys.count(key) == 1
    assert words in lines[keys.index(key)]
    assert all(k == k.lower() for k in keys) and len(keys) == len(set(keys))
    module = dict(merge_lora=merge_lora, sample=sample).get(script, globals().get(script))
    assert set(keys) == set(module.SETTINGS[0])


# -------------------- how a script ends
def test_run_exit_codes(tmp_path):
    code = ('import sys; sys.argv[0] = "x/job.py"\nfrom configurator import *\n'
            'def main(argv): raise {}\nrun(main)')
    for raised, rc, err in [('BadInput("mend me")', 2, 'job.py: mend me\n'),
                            ('KeyboardInterrupt', 130, 'job.py: interrupted\n')]:
        p = subprocess.run([sys.executable, '-c', code.format(raised)], cwd=ROOT,
                           capture_output=True, text=True)
        assert (p.returncode, p.stderr) == (rc, err)


@pytest.mark.parametrize('raised, code, err', [('BadInput("mend me")', 2, 'mend me'),
                                               ('ValueError("odd")', 1, 'ValueError: odd'),
                                               ('SystemExit(0)', 0, '')])
def test_of_several_processes_one_that_fails_ends_at_once(raised, code, err):
    """What runs at an exit may wait for processes that wait for this one."""
    text = (f'import atexit, sys, time; atexit.register(time.sleep, {60 * (code > 0)})\n'
            f'from configurator import *\ndef main(argv): raise {raised}\nrun(main)')
    p = subprocess.run([sys.executable, '-c', text], cwd=ROOT, timeout=30,
                       env=ONE_THREAD | dict(WORLD_SIZE='2'), capture_output=True, text=True)
    assert p.returncode == code and err in p.stderr
