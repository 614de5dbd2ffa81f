"""
The smoke test: does it all still run, in less than a minute? The rooms in tests/ say how well.
    python -m pytest -q test_smoke.py        python -m pytest -q
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / 'tests'))
from conftest import *
from conftest import _signals
from pipelines import WORDS, bar, conditions, noise, off, ours, pipeline, shared, steps

FEW = ['--max_steps=4', '--eval_samples=4', '--show=1', '--log_every=1', '--device=cpu',
       '--sample_steps=2', '--micro_batch=8', '--batch_size=8', '--warmup=1', '--eval_every=100',
       '--score=']
HOW = dict(danceopd=['--queries=2'], diffusionopd=['--drop_last=1'],
           flowopd=['--eta=0.7', '--updates=2', '--anchor=base', '--anchor_beta=0.01'])


@pytest.fixture
def opd(tmp_path):
    """Words of a short run: two of the demonstration's teachers, a few prompts and edits."""
    write_data(tmp_path)
    routes = [dict(teacher='count', data='words'), dict(teacher='local_edit', data='edits')]
    data = [f'{tmp_path}/{k}.csv' for k in ('words', 'edits')]
    return [*FEW, '--init_from=base', '--lr=1e-3', '--lr_schedule=constant', '--ema_decay=0.5',
            f'--routes={routes}', f'--data={data}', '--eval_data=[]']


# -------------------- the methods
@pytest.mark.parametrize('method', T.METHODS)
def test_a_method_learns_resumes_and_is_sampled_from(method, opd, tmp_path):
    argv = [*opd, f'--method={method}', *HOW[method], '--save_every=2', f'--out_dir={tmp_path}/run']
    out = run(T.main, argv)
    assert all(r['gap_after'] < r['gap_before'] for r in result(out).values())
    resumes_exactly(T.main, argv, out, 2, 4)
    sample.main([f'--ckpt={out}', '--prompt=a red circle', '--num=1', '--steps=2',
                 f'--out_dir={tmp_path}/samples', '--device=cpu'])
    assert Image.open(tmp_path / 'samples' / '0000_0.png').size == (24, 24)


@pytest.mark.parametrize('method, more', [
    ('sft', []), ('grpo', ['--group_size=4', '--steps=3']),
    ('sdpo', ['--group_size=2', '--steps=3'])])
def test_a_teacher_is_made(method, more, tmp_path):
    argv = [*FEW, f'--method={method}', *more, f'--out_dir={tmp_path}/run']
    out = run(train_teacher.main, argv)
    found = merge_lora.read_adapter(out)
    assert merge_lora.fit(found, merge_lora.model_shapes(SHAPES / 'base'))
    assert len(log(out, 'loss')) == 4 and merge_lora.size(found) > 0


# -------------------- the families
@pytest.mark.parametrize('name', ['sd3', 'zimage', 'flux', 'klein', 'qwen', 'sd15', 'sdxl'])
def test_a_family_is_its_pipeline(name):
    field, n = shared(name), steps(name, 3)
    eps = noise(field, 2, (32, 48))
    cond, empty = conditions(field, WORDS[:2])
    theirs = pipeline(name, WORDS[:2], eps, n, 3.0)
    assert off(ours(name, cond, empty, eps, n, 3.0), theirs) < bar(name)


def test_every_pipeline_that_is_known_has_a_family():
    for name in T.FAMILIES:
        family = T.find_family(name)
        assert issubclass(family, T.Field) and family.targets and hasattr(diffusers, name)


# -------------------- the settings
@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.stem)
def test_a_config_passes_its_checks(path, monkeypatch):
    script = train_teacher if path.name.startswith('teacher') else T
    monkeypatch.setattr(checks, 'is_hub_id', lambda p: True)   # teachers that are yet to be made
    monkeypatch.setattr(merge_lora, 'read_adapter', lambda p: {})
    monkeypatch.setattr(rewards, 'check', lambda name: None)
    script.main([str(path), '--dry_run'])


def test_a_typo_is_one_line():
    with pytest.raises(BadInput, match='unknown setting batch_sise, did you mean batch_size?'):
        T.main(['--batch_sise=4'])


# -------------------- forks
def huber(samples, models, c):
    for terms in T.danceopd(samples, models, c):
        yield (term._replace(loss=(1 + term.loss).sqrt() - 1) for term in terms)


def ends(r, even):
    return round(r.random())


def test_a_new_method_is_one_function_and_one_entry(opd, tmp_path, monkeypatch):
    method = T.Method(huber, T.METHODS['danceopd'].settings)
    monkeypatch.setitem(T.METHODS, 'huber', method)
    out = run(T.main, [*opd, '--method=huber', '--queries=2', f'--out_dir={tmp_path}/run'])
    plain = run(T.main, [*opd, '--queries=2', f'--out_dir={tmp_path}/plain'])
    assert log(out, 'loss')[0] == log(plain, 'loss')[0] and log(out, 'loss') != log(plain, 'loss')
    assert log(out, 'cost') == log(plain, 'cost')


def test_a_new_query_rule_is_one_function_and_one_entry(opd, tmp_path, monkeypatch):
    monkeypatch.setitem(T.QUERIES, 'ends', ends)
    out = run(T.main, [*opd, '--query=ends', '--batch_size=16', f'--out_dir={tmp_path}/run'])
    sigmas = T.open_field(str(SHAPES / 'base')).sigmas(5, 24, 24).tolist()
    share = [(x - sigmas[3]) / (1 - sigmas[3]) for x in log(out, 'sigma')]     # of first steps
    assert len(share) == 4 and all(x * 16 == pytest.approx(round(x * 16), abs=1e-4) for x in share)


def test_half_a_fork_is_refused(opd, tmp_path):
    """A name without an entry, an entry without a function, a function without a setting."""
    for words, says in ((['--method=hubert'], "method: 'hubert' is not one of 'danceopd'"),
                        (['--query=end'], "query: 'end' is not one of 'stratified'"),
                        (['--hubert_delta=1.0'], 'unknown setting hubert_delta')):
        with pytest.raises(BadInput, match=says):
            T.main([*opd, *words, f'--out_dir={tmp_path}/none'])
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('table, name, entry', [
    ('METHODS', 'huber', T.Method(None, ())), ('QUERIES', 'ends', None), ('SDES', 'own', None),
    ('STATES', 'own', None), ('PLACES', 'own', None)])
def test_an_entry_without_its_function_is_not_trained_as_another(table, name, entry, opd,
                                                                 tmp_path, monkeypatch):
    key = dict(METHODS='method', QUERIES='query', SDES='sde', STATES='states', PLACES='query_in')
    key = key[table]
    monkeypatch.setitem(getattr(T, table), name, entry)
    with pytest.raises((TypeError, BadInput)):
        T.main([*opd, f'--{key}={name}', '--eta=0.7', f'--out_dir={tmp_path}/none'])
    assert not (tmp_path / 'none').exists()
