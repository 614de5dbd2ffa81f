"""The papers in miniature: arms, cost, statistics, the report."""
import ast, contextlib

from conftest import *

import papers
import questions
import report
import runs


@functools.cache
def opened(*key):
    return files.open_buckets(*map(ast.literal_eval, key))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Settings of a study, and what its runs need before they begin; a list of files is looked at
    once."""
    monkeypatch.setattr(checks, 'open_buckets', lambda *x: opened(*map(repr, x)))
    c = configure(papers.SETTINGS, [f'--out={tmp_path}/out', f'--results={tmp_path}/results',
                                    f'--docs={tmp_path}/docs', '--budget=400', '--rows=3'])
    there = dict.fromkeys(['make-clear/0', 'make-blue/0', 'ours/0/start', 'ours/1/latest'],
                          SHAPES / 'teachers' / 'count')
    for name, target in {**there, 'make-half/0/base': SHAPES / 'base'}.items():
        link = tmp_path / 'out' / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    own = tmp_path / 'out' / 'make-own' / '0'
    own.mkdir(parents=True)
    for k in questions.SKILLS:                                 # as papers.py draws them, but two
        some = [{**r, 'task': k, 'target_image': f'{SHAPES}/pictures/count_0000_right.png',
                 'source_image': r['source_image'] and os.path.abspath(r['source_image'])}
                for r in rows_of(f'data/shapes/{k}.csv')[:2]]
        with open(own / f'{k}.csv', 'w', newline='') as f:
            table = csv.DictWriter(f, [*some[0]])
            table.writeheader()
            table.writerows(some)
    return c


def test_every_arm_passes_its_scripts_own_checks(study):
    asked = {a for q in questions.QUESTIONS.values() for a in q.arms}
    assert not asked & set(questions.QUESTIONS)                # --only takes both
    assert asked | set(questions.CEILINGS.values()) == set(questions.ARMS)
    for name, a in {**questions.ARMS, **questions.MAKES}.items():
        for rate in a.rates[-1:] or [None] if a else ():
            r = runs.Run(f'{name}@{rate:g}' if rate else name, 0)
            script, words, s, data = runs.checked(r, study)
            assert s.lr == (rate or s.lr) and s.out_dir == f'{study.out}/{r.name}/0'
    for q in questions.QUESTIONS.values():
        for x in q.contrasts:
            assert {x.better, x.worse} <= set(q.arms)
            assert all(set(x.over) <= set(questions.ARMS[k].scored) for k in (x.better, x.worse))
    with pytest.raises(BadInput, match='rank'):                # an arm with a mistake does not
        questions.ARMS['ours'].settings['rank'] = 0
        try:
            runs.checked(runs.Run('ours', 0), study)
        finally:
            del questions.ARMS['ours'].settings['rank']


def test_the_demonstration_is_the_arm_of_its_name(study):
    script, words, s, data = runs.checked(runs.Run('demonstration', 0), study)
    own = checks.own_settings(train_opd.SETTINGS, [])
    train_opd.checks.check(own, train_opd.SETTINGS[0], train_opd.FAMILIES, train_opd.CHOICES)
    told = 'out_dir', 'score', 'eval_samples', 'show', 'ckpt_keep'         # not what a run learns
    assert {k: v for k, v in vars(s).items() if k not in told} == {
        k: v for k, v in vars(own).items() if k not in told}


def test_arms_of_a_question_have_steps_of_equal_cost(study):
    study.budget = runs.BUDGET
    for name in ('ours', 'ode', 'low', 'flow-group', 'mar-04', 'imitation', 'imitation-paid'):
        script, words, s, data = runs.checked(runs.Run(name, 0), study)
        n = runs.steps_of(questions.ARMS[name], script, s, data, study)
        trained = n * runs.rehearsed(script, s, data, 20)
        assert abs((trained + questions.ARMS[name].spent) / runs.BUDGET - 1) < 0.03, name


def test_a_run_costs_what_the_table_says_and_goes_on_after_a_kill(study):
    study.out += '_new'
    r = runs.Run('edits-hard', 1)
    script, words, s, data = runs.checked(r, study)
    runs.make(r, study, {})
    told = json.loads(runs.result_of(r, study).read_text())
    n = told['steps']
    assert n == 2 and told['cost'] == n * runs.rehearsed(script, s, data, n)
    assert [p['step'] for p in told['points']] == [1, 2]
    assert told['points'][0]['cost'] < told['points'][1]['cost'] == told['cost']
    assert set(told['points'][0]['right']) == set(questions.ARMS[r.name].scored)
    assert papers.done(r, study, report.load(study.results))
    assert told['differs']['routes_per_step'] == 'sample'
    folder = runs.folder_of(r, study)
    assert runs.scores(r, study, s, folder, end_only=True) == told['points'][-1:]
    for gone in (runs.result_of(r, study), folder / 'score_000002.json', folder / 'done'):
        gone.unlink()
    shutil.rmtree(folder / 'step_000002')                      # killed in its second step
    (folder / 'latest').unlink()
    (folder / 'latest').symlink_to('step_000001')
    runs.make(r, study, {})
    again = json.loads(runs.result_of(r, study).read_text())
    assert {**again, 'about': 0} == {**told, 'about': 0}

    runs.result_of(r, study).unlink()                          # a save that the log does not know,
    log = runs.read_log(folder / 'log.jsonl')                 # as a stop leaves it, is no point
    (folder / 'log.jsonl').write_text(''.join(
        json.dumps(e) + '\n' for e in log if e['step'] != 1))
    runs.make(r, study, {})
    again = json.loads(runs.result_of(r, study).read_text())
    assert [p['step'] for p in again['points']] == [2]


def test_averages_and_warm_ups_have_the_same_share_of_all_runs(study):
    study.budget, left = runs.BUDGET, {}
    for name in ('ours', 'ode', 'flow', 'batch8', 'imitation', 'imitation-paid', 'no-ema',
                 'ours-twice', 'only-count'):
        r = runs.Run(name, 0)
        script, words, s, data = runs.checked(r, study)
        n = runs.steps_of(questions.ARMS[name], script, s, data, study)
        pace = [x.partition('=') for x in runs.paced(r, s, n, study)]
        decay, warmup = (float(x) for _, _, x in pace)
        left[name] = decay ** (n * s.updates)
        assert abs(warmup / n - 20 / 250 / questions.ARMS[name].cost) < 0.005, name
    assert left['ours'] == pytest.approx(0.98 ** 250, rel=1e-6) and left.pop('no-ema') == 0
    assert left.pop('ours-twice') == pytest.approx(0.98 ** 500) == left.pop('flow')
    assert all(x == pytest.approx(left['ours']) for x in left.values())


def made_up(end, seed=0, cost=1000.0, lr=0.008, **more):
    """A run whose share of right pictures grows evenly to `end`."""
    points = [dict(step=i, cost=cost * i / 5, gap=dict.fromkeys(questions.SKILLS, 0.1),
                   right=dict.fromkeys(questions.SCORED, end * i / 5)) for i in range(1, 6)]
    about = dict(machine='a machine', torch='2', seconds=60.0, commit='')
    return dict(seed=seed, cost=cost, lr=lr, rows=256, steps=5, points=points, about=about, **more)


def test_verdicts():
    assert report.verdict([80, 82, 81], [70, 71, 69]) == 'yes'
    assert report.verdict([70, 71, 69], [80, 82, 81]) == 'no'
    assert report.verdict([80, 82, 81], [79, 81, 80]) == 'undecided'       # within the range
    assert report.verdict([90, 90, 80], [71, 71, 81]) == 'undecided'       # a seed disagrees
    assert report.verdict([80, 82], [70, 71, 69]) == 'not run yet'
    assert 'failed' in report.verdict([80, 82, None], [70, 71, 69])
    assert report.error(50, 256) == 3.125
    even = report.mean_error(made_up(0.5), questions.SKILLS)
    assert abs(even - 3.125 / 2) < 1e-12                       # of four routes: a half


def test_cost_at_which_teachers_are_held():
    points, teachers = made_up(1.0)['points'], dict.fromkeys(questions.SKILLS, 0.8)
    assert abs(report.held_at(points, teachers) - 720) < 1e-9              # .9 x .8 = .72
    assert report.held_at(points, {**teachers, 'count': 1.0}) == pytest.approx(900)
    assert report.held_at(made_up(0.5)['points'], teachers) == math.inf
    assert report.held_at(points[-1:], teachers) == 1000       # not known better than that


def test_order_and_rates(study):
    study.only, found = 'loss', {}
    names = [f'{r.name}/{r.seed}' for r in papers.wanted(study, found)]
    assert names[3:7] == ['k2/0', 'k4/0', 'plain@0.001/0', 'plain@0.003/0']
    assert 'plain@?/2' in names
    assert len(names) == len(set(names))
    for rate, end in ((0.001, 0.4), (0.003, 0.5), (0.008, 0.7), (0.016, 0.6)):
        found[f'plain@{rate:g}', 0] = made_up(end, lr=rate)
    assert report.best_rate('plain', found) == 'plain@0.008'
    left = papers.wanted(study, found)
    assert len(left) == len(names) and runs.Run('plain@0.008', 2) in left
    one = runs.Run('plain@0.008', 0)                           # of a trial the end is enough
    assert papers.done(one, study, found)
    found['plain@0.008', 0]['points'][:4] = []
    found['plain@0.003', 0]['points'][:4] = []
    assert one in papers.missing(study, found) and not papers.done(one, study, found)
    assert papers.done(runs.Run('plain@0.003', 0), study, found)
    found['plain@0.008', 0]['steps'] = 1                       # of a run of one step that is all
    assert papers.done(one, study, found)
    assert papers.minutes_of(one, study, {}) < papers.minutes_of(one, study, found)
    found['plain@0.008', 0] = dict(made_up(0.7), points=[], failed='no finite gradient')
    assert report.best_rate('plain', found) == 'plain@0.016'
    study.only = 'start'
    order = papers.wanted(study, {})
    assert order.index(runs.Run('ours', 1)) < order.index(runs.Run('from-student', 0))
    assert not papers.ready(runs.Run('from-student', 0), study)
    study.only = 'start,plain'
    assert {r.name for r in papers.wanted(study, {}) if r not in order} == {
        'plain@0.001', 'plain@0.003', 'plain@0.008', 'plain@0.016', 'plain@?'}
    study.only = 'strat'
    with pytest.raises(BadInput, match='strat'):
        papers.wanted(study, {})


def test_the_committed_report_is_what_the_committed_numbers_give():
    c = configure(papers.SETTINGS, [])
    assert papers.report_of(c, report.load(c.results)) == Path('docs/papers.md').read_text()


def test_the_report_says_what_is_there_and_what_is_not(study):
    empty = papers.report_of(study, {})
    assert empty.count('## ') == len(questions.QUESTIONS)
    assert 'ODE above SDE: **not run yet**' in empty
    found = {('ours', s): made_up(0.8 + s / 100, s) for s in range(3)}
    found |= {('skip-last', s): made_up(0.8 + s / 100, s) for s in range(3)}
    found |= {(f'plain@{x:g}', 0): made_up(0.5, lr=x) for x in questions.LOSSES}
    found |= {('plain@0.001', s): made_up(0.5 + s / 100, s, lr=0.001) for s in (1, 2)}
    found['k2', 0] = dict(made_up(0.7), points=[], failed='no finite gradient')
    said = papers.report_of(study, found)
    assert 'one state of five steps above nine of ten: **yes** (+30.0, +30.0, +30.0)' in said
    assert '81.0 (80.0, 81.0, 82.0)' in said and '| k2 |  | failed' in said
    assert '- plain: 0.001: 50.0, 0.003: 50.0, 0.008: 50.0, 0.016: 50.0 (the best is at' in said
    assert '(papers/loss.png)' in said and '(papers/mar.png)' not in said     # of one arm alone
    assert '(papers/reinforce.png)' not in said


def test_each_point_is_scored_by_its_own_average(tmp_path, monkeypatch):
    worn, row = [], dict(prompt='a circle', source_image='')
    student = SimpleNamespace(ema='', load=lambda p: setattr(student, 'ema', p.name),
                              wearing=lambda x: worn.append(x) or contextlib.nullcontext())
    monkeypatch.setattr(T, 'render', lambda *a: torch.zeros(1, 3, 24, 24))
    models, e = SimpleNamespace(student=student, teachers={}), SimpleNamespace(resolution=[24, 24])
    for k in (1, 2):
        runs.scored(tmp_path / f'step_{k:06d}', models, e, dict(t2i=[row]), tmp_path)
    assert worn == ['step_000001', 'step_000002']
