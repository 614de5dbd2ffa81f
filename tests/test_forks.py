"""Forks half done: refused before weights are loaded, never trained as something else."""
from conftest import *

FEW = ['--dry_run', '--batch_size=4', '--micro_batch=1', '--routes_per_step=sample',
       "--routes=[dict(teacher='count',data='count')]"]
READS = T.METHODS['danceopd'].settings


def dance(loss=None, wrap=None, anchored=True, forget=None):
    """danceopd with something changed."""
    def updates(samples, models, c):
        known = ('seed', 'queries', 'query', 'query_in', 'steps', 'drop_last', 'states', 'eta',
                 'sde', 'micro_batch', 'rollout_guidance', 'student_guidance')
        own = {k: T.SETTINGS[0][k] if k == forget else getattr(c, k) for k in known}
        free = SimpleNamespace(anchor='' if forget is None else c.anchor, **own)
        for terms in T.danceopd(samples, models, c if anchored and not forget else free):
            changed = (t._replace(loss=loss(t.loss)) if loss else t for t in terms)
            yield from changed if wrap == 'from' else [list(map(tuple, changed))] if wrap else [
                changed]
    return T.Method(updates, READS)


def nothing(samples, models, c):
    yield []


def one_update(samples, models, c):
    c.updates, c.clip_range
    yield from T.danceopd(samples, models, c)


@pytest.mark.parametrize('entry, more, message', [
    (dance(lambda x: x.mean()), [], r'a loss of shape \(\) for 1 samples'),
    (dance(lambda x: x.view(1, 1)), [], r'a loss of shape \(1, 1\) for 1 samples'),
    (dance(wrap='from'), [], 'yields a Term where a generator'),
    (dance(wrap='tuples'), [], 'yields a tuple where a Term belongs'),
    (dance(anchored=False), ['--anchor=base', '--anchor_beta=0.1'], 'does not read it'),
    (T.danceopd, [], "the entry of 'own' is no Method"),
    (dance(forget='states'), [], "declares states, and does not read it"),
    (dance(forget='student_guidance'), ['--student_guidance=2.0'], 'student_guidance is set, but'),
    (dance(forget='eta'), ['--eta=0.7'], 'eta is set, but'),
    (T.Method(nothing, ()), [], 'yields no Term'),
    (T.Method(one_update, (*READS, 'updates')), ['--updates=2'], 'makes 1 a step'),
    (T.Method(T.danceopd, (*READS, 'hubre')), [], 'declares settings that there are not: .*hubre'),
    (T.Method(T.danceopd, 'query'), [], "declares settings that there are not: .*'u'"),
], ids=('scalar, unreduced, flat, tuples, no anchor, unread, unguided, noiseless, none, updates, '
        'bare, misspelled, no comma').split(', '))
def test_half_a_method_is_refused(entry, more, message, monkeypatch, capsys):
    T.main(FEW)                                                # as it is, it is fine
    monkeypatch.setitem(T.METHODS, 'own', entry)
    with pytest.raises(BadInput, match=message):
        T.main([*FEW, '--method=own', *more])


@pytest.mark.parametrize('of_action, group', [(T.log_ratio, False), (T.minus_kl, True)])
def test_an_attached_reward_is_minus_kl_or_refused(of_action, group, monkeypatch):
    monkeypatch.setitem(T.REWARDS, 'own', T.Reward(of_action, group, True))
    with pytest.raises(BadInput, match="REWARDS: 'own' is attached"):
        T.main([*FEW, '--method=flowopd', '--eta=0.7', '--group_size=2', '--reward=own'])


@pytest.mark.parametrize('rule, message', [
    (lambda r, even: -1.0, "query = 'own' has no 1 distinct steps"),
    (lambda r, even: -0.05, "query = 'own' has no 1 distinct steps"),
    (lambda r, even: 3, "query = 'own' has no 1 distinct steps"),
    (lambda r, even: 0.0, "query = 'own' has no 2 distinct steps")
], ids=['below', 'below 0', 'beyond', 'one only'])
def test_a_query_rule_that_cannot_be_is_refused(rule, message, monkeypatch):
    monkeypatch.setitem(T.QUERIES, 'own', rule)
    queries = int(re.search(r'\d', message)[0])
    with pytest.raises(BadInput, match=message):
        T.main([*FEW, '--query=own', f'--queries={queries}'])


def test_a_rules_draws_do_not_follow_from_its_place():
    """What it draws and where it stands are two things, also with one sample a route."""
    c = SimpleNamespace(queries=1, query='own', query_in='steps', steps=4, drop_last=0, seed=0)
    samples = [T.Sample({}, (24, 24), None, number=i) for i in range(4000)]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(T.QUERIES, 'own', lambda r, even: even if r.random() < 0.5 else 0.0)
        drawn = [T.draw_queries(s, c, [1.0] * 5)[0] for s in samples]
    assert [abs(drawn.count(i) / 4000 - p) < 0.03
            for i, p in enumerate((0.625, 0.125, 0.125, 0.125))] == [True] * 4


def huber(v, v_target):
    return (1 + (v - v_target).square()).sqrt().sub(1).flatten(1).mean(1)


def test_the_anchor_has_the_same_error():
    """Held near a teacher by the error that the loss has, of one's own as well."""
    v, v_base = torch.randn(2, 3, 1, 4, 4)
    models = SimpleNamespace(teachers={}, velocity=lambda *a: v_base)
    c = SimpleNamespace(anchor='base', anchor_beta=0.25, student_guidance=1.0)
    term = T.distil([], models, c, None, None, v, v, 4, 2.0, huber)        # four states a sample
    assert torch.allclose(term.loss, 0.25 * 2.0 / 4 * huber(v, v_base)) and term.loss.min() > 0


def test_a_method_that_leaves_out_no_step_learns_from_all_of_them(monkeypatch, capsys):
    """And its gap is measured at all: half a declaration would measure another thing."""
    seen = []

    def own(samples, models, c):
        seen.append(c.drop_last)
        return T.danceopd(samples, models, c)
    reads = tuple(k for k in READS if k != 'drop_last')
    monkeypatch.setitem(T.METHODS, 'own', T.Method(own, reads))
    T.main([*FEW, '--method=own', '--steps=1'])                # a step of one: it is not left out
    assert set(seen) == {0} and 'not learned from' not in capsys.readouterr().out
    with pytest.raises(BadInput, match="drop_last: method = 'own' does not read it"):
        T.main([*FEW, '--method=own', '--drop_last=2'])


def test_an_error_of_ones_own_is_an_argument(tmp_path):
    def own(samples, models, c):
        return T.danceopd(samples, models, c, huber)
    losses = {}
    with pytest.MonkeyPatch.context() as m:
        m.setitem(T.METHODS, 'own', T.Method(own, READS))
        for method in ('danceopd', 'own'):
            T.main([*FEW[1:], f'--method={method}', '--max_steps=1', '--init_from=base',
                    '--eval_samples=1', '--show=1', '--score=', '--log_every=1',
                    f'--out_dir={tmp_path}/{method}'])
            lines = map(json.loads, (tmp_path / method / 'log.jsonl').open())
            losses[method] = [e['loss'] for e in lines if 'loss' in e]
    assert 0 < losses['own'][0] < losses['danceopd'][0] / 1.9  # near 0 it is half the square


def test_a_loss_may_look_at_pictures(monkeypatch):
    """What is rehearsed without weights decodes as well."""
    def own(samples, models, c):
        def seen(v, v_target):
            return models.field.decode(v - v_target).flatten(1).mean(1)
        return T.danceopd(samples, models, c, seen)
    monkeypatch.setitem(T.METHODS, 'own', T.Method(own, READS))
    T.main([*FEW, '--method=own'])


def test_a_fork_of_a_teachers_method_is_known_by_what_it_reads(world, tmp_path, monkeypatch):
    """By its name nothing is known: imitation needs pictures and no reward, groups are no pairs."""
    sft, grpo = train_teacher.METHODS['sft'], train_teacher.METHODS['grpo']

    def half(samples, models, c):
        for terms in sft.updates(samples, models, c):
            yield (t._replace(loss=t.loss.view(-1, 1)) for t in terms)
    for name, entry in dict(mine=sft, half=sft._replace(updates=half), group=grpo._replace(
            settings=(*grpo.settings, 'gamma'))).items():
        monkeypatch.setitem(train_teacher.METHODS, name, entry)
    few = dict(max_steps=1, eval_samples=1)
    out = world.teach(tmp_path / 'mine', method='mine', data=[str(world.at / 'edits.csv')], **few)
    assert log(out, 'eval/loss/edits') and R.read_meta(R.newest(out) / 'meta.json')[
        'settings']['reward'] == []
    for more, message in ((dict(method='half', data=[str(world.at / 'edits.csv')]), r'\(., 1\)'),
                          (dict(method='group', group_size=1), 'GRPO compares the samples'),
                          (dict(method='mine', data=[str(world.at / 'words.csv')]), 'no target')):
        with pytest.raises(BadInput, match=message):
            world.teach(tmp_path / 'not', **more, **few)
