"""
The smoke test: does it all still run, in less than a minute? The rooms beside it say why and how well.
    python -m pytest -q test_smoke.py        python -m pytest -q tests
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / 'tests'))
from common import *

FEW = ['--max_steps=2', '--eval_samples=2', '--show=1', '--score_samples=0', '--log_every=1', '--device=cpu',
       '--sample_steps=2', '--micro_batch=8', '--batch_size=8', '--routes_per_step=sample',
       "--routes=[dict(teacher='count',data='count'),dict(teacher='local_edit',data='local_edit')]"]
HOW = dict(danceopd=['--queries=2'], diffusionopd=['--eta=0.7', '--sde=dance'],
           flowopd=['--eta=0.7', '--group_size=4', '--updates=2'])


def losses(out):
    lines = map(json.loads, (out / 'log.jsonl').read_text().splitlines())
    return [e['loss'] for e in lines if 'loss' in e]


@pytest.mark.parametrize('method', train_opd.METHODS)
def test_a_method_runs_resumes_and_is_sampled_from(method, tmp_path):
    argv = [*FEW, f'--method={method}', *HOW[method], '--save_every=1', '--ckpt_keep=9']
    train_opd.main([*argv, f'--out_dir={tmp_path}/run'])
    shutil.copytree(tmp_path / 'run', tmp_path / 'half', symlinks=True)
    shutil.rmtree(tmp_path / 'half' / 'step_000002')
    train_opd.main([*argv, f'--out_dir={tmp_path}/half', '--init_from=resume'])
    assert len(losses(tmp_path / 'run')) == 2 and losses(tmp_path / 'run') == losses(tmp_path / 'half')
    sample.main([f'--ckpt={tmp_path}/run', '--prompt=a red circle', '--num=1', '--steps=2',
                 f'--out_dir={tmp_path}/samples'])
    assert Image.open(tmp_path / 'samples' / '0000_0.png').size == (24, 24)


def test_a_new_method_is_one_function_and_one_entry(tmp_path, monkeypatch):
    def huber(samples, models, c):
        for terms in train_opd.danceopd(samples, models, c):
            yield (term._replace(loss=(1 + term.loss).sqrt() - 1) for term in terms)
    reads = train_opd.METHODS['danceopd'].settings
    monkeypatch.setitem(train_opd.METHODS, 'huber', train_opd.Method(huber, reads))
    train_opd.main([*FEW, '--method=huber', f'--out_dir={tmp_path}/run'])
    assert len(losses(tmp_path / 'run')) == 2


@pytest.mark.parametrize('method, more', [('sft', []), ('grpo', ['--group_size=4']), ('sdpo', ['--group_size=2'])])
def test_a_teacher_is_made(method, more, tmp_path):
    train_teacher.main(['--method=' + method, *more, *FEW[:3], *FEW[4:9], '--steps=3' if more else '--seed=1',
                        f'--out_dir={tmp_path}/run'])
    assert merge_lora.read_adapter(tmp_path / 'run')


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_passes_its_checks(path, monkeypatch, tmp_path):
    script = train_teacher if path.name.startswith('teacher') else train_opd
    monkeypatch.setattr(checks, 'is_hub_id', lambda p: True)           # teachers that are yet to be made
    monkeypatch.setattr(merge_lora, 'read_adapter', lambda p: {})
    monkeypatch.setattr(rewards, 'check', lambda name: None)
    script.main([str(path), '--dry_run'])


def test_a_new_query_rule_is_one_function_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(train_opd.QUERIES, 'ends', lambda r, place, places: round(r.random()))
    train_opd.main([*FEW, '--query=ends', f'--out_dir={tmp_path}/run'])
    assert len(losses(tmp_path / 'run')) == 2


def test_what_a_method_does_not_read_is_refused():
    with pytest.raises(BadInput, match='clip_range: method = .danceopd. does not read it'):
        train_opd.main(['--clip_range=0.1', '--dry_run'])
    with pytest.raises(BadInput, match="query: 'end' is not one of"):
        train_opd.main(['--query=end', '--dry_run'])


def test_a_typo_is_one_line(tmp_path):
    with pytest.raises(BadInput, match='unknown setting batch_sise, did you mean batch_size'):
        train_opd.main(['--batch_sise=4'])
