"""METHODS: that each learns, what it costs, what it reads, whom it asks, what its loss is."""
from functools import partial

from conftest import *

MORE = dict(
    danceopd=dict(queries=2),
    diffusionopd=dict(),
    flowopd=dict(reward='code', eta=0.7, group_size=2, updates=2, clip_range=1e-2, anchor='base',
                 anchor_beta=1e-3))


@pytest.mark.parametrize('method', T.METHODS)
def test_each_method_closes_the_gap(method, world, tmp_path):
    near = [dict(name='near', lora=random_lora(tmp_path / 'near', 3, layers=['proj_out']))]
    out = world.distil(tmp_path / 'run', method=method, max_steps=8, teachers=near,
                       lora_targets=['proj_out'], ema_decay=0.8, **MORE[method],
                       routes=[dict(teacher='near', data=k) for k in ('words', 'edits')])
    for route in result(out).values():
        assert route['gap_after'] < 0.9 * route['gap_before']


class Kept:
    """What autograd saved; it counts itself while it lives."""
    live = most = 0

    def __init__(self, x):
        self.x, self.size = x, x.numel() * x.element_size()
        Kept.live += self.size
        Kept.most = max(Kept.most, Kept.live)

    def __del__(self):
        Kept.live -= self.size


@pytest.mark.parametrize('method', T.METHODS)
def test_memory_for_gradients_does_not_grow_with_the_steps(method, world, tmp_path):
    """Bytes that autograd keeps alive at once, counted as they are saved and let go."""
    def peak(steps):
        Kept.live = Kept.most = 0
        more = MORE[method] | dict(steps=steps, max_steps=1, eval_samples=1)
        more['queries'] = steps if method == 'danceopd' else 1
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            world.distil(tmp_path / str(steps), method=method, **more)
        return Kept.most
    few, many = peak(2), peak(6)
    assert few > 10 ** 5 and many < 1.05 * few


# -------------------- what it costs
TEACHER = [dict(teacher='one', data='words')]
WAYS = dict(
    danceopd=dict(queries=2, query='low_noise', steps=8),
    noised_data=dict(states='data', query='low_noise', routes=[dict(teacher='one', data='edits')]),
    teacher_states=dict(states='teacher', routes_per_step='sample'),
    soft=dict(mixing='soft', routes=TEACHER),
    guided=dict(method='diffusionopd', student_guidance=2.0, rollout_guidance=1.5, anchor='two',
                anchor_beta=0.1, teachers=[dict(name='one', lora='ONE', guidance=3.0),
                                           dict(name='two', lora='TWO')]),
    sde=dict(method='diffusionopd', eta=0.7, sde='dance', kl_var='code', drop_last=1),
    k1=dict(method='flowopd', eta=0.7, updates=2, reward='k1', student_guidance=2.0,
            rollout_guidance=2.0, anchor='base', anchor_beta=0.1),
    full_teacher=dict(teachers=[dict(name='one', checkpoint='FULL')], routes=TEACHER,
                      teacher_offload=True))


def counting(monkeypatch, method):
    """A list that gets each forward of a method's updates: with gradient it counts three."""
    spent, learning, velocity, own = [], [], T.Field.velocity, T.METHODS[method]

    def watched(generator):
        while True:
            learning.append(True)
            try:
                found = next(generator)
            except StopIteration:
                return
            finally:
                learning.pop()
            yield found

    def updates(samples, models, c):
        for terms in watched(own.updates(samples, models, c)):
            yield watched(terms)

    def counted(self, z, sigma, cond):
        if learning:
            spent.append(len(z) * (3 if torch.is_grad_enabled() else 1))
        return velocity(self, z, sigma, cond)
    monkeypatch.setattr(T.Field, 'velocity', counted)
    monkeypatch.setitem(T.METHODS, method, own._replace(updates=updates))
    return spent


@pytest.mark.parametrize('name', WAYS)
def test_forwards_are_as_many_as_the_table_says_and_the_log_counts(name, world, tmp_path, capsys,
                                                                   monkeypatch):
    """Each way to train is run, and its forwards are counted in the network itself."""
    if name == 'full_teacher':
        merge_lora.main([f'--adapters={world.one}', f'--into_base={SHAPES}/base',
                         f'--out={tmp_path}/full/'])
    way = eval(repr(WAYS[name]).replace('ONE', world.one).replace('TWO', world.two)
               .replace('FULL', f'{tmp_path}/full'))
    spent = counting(monkeypatch, way.get('method', 'danceopd'))
    out = world.distil(tmp_path / 'run', max_steps=3, micro_batch=6, **way)
    said = float(re.search(r'forwards a step +([0-9]+)', capsys.readouterr().out)[1])
    assert sum(log(out, 'cost')) == sum(spent) > 0
    assert said == round(sum(spent) / 3)
    assert log(out, 'skipped') == [0] * 3 == log(out, 'idle')


# -------------------- what it reads
def rehearse(method, models=T.Models, watch=lambda c: c, **more):
    """A method's updates on a family that answers zeros."""
    argv = [f'--{k}={v!r}' for k, v in dict(more, method=method).items()]
    c = configure(T.SETTINGS, [*argv, '--batch_size=16'])
    c.routes = [dict(r, size=(24, 24), samples=4) for r in c.routes]
    rows = {r['data']: [dict(prompt='x', source_image='', target_image='')] for r in c.routes}
    deal = partial(T.plan, c=c, buckets=rows)
    return rehearsal.rehearsed(watch(c), deal, T.METHODS[method], models)


def test_danceopd_costs_no_more_forwards_than_it_needs():
    each = rehearse('danceopd', steps=16, query='low_noise') / 16
    assert 13.8 < each < 16.2                # 10.9 rolling out, 1 of the teacher, 3 of the student


class Traced:
    """Settings that remember which of them were read."""

    def __init__(self, c, read):
        vars(self).update(vars(c))
        self.__dict__['_read'] = read

    def __getattribute__(self, key):
        if not key.startswith('_'):
            self._read.add(key)
        return object.__getattribute__(self, key)


def misfits(read, methods):
    """Settings that some methods read, and an entry does not name; or names in vain."""
    everywhere = set.intersection(*read.values())
    named = {m: set(methods[m].settings) for m in read}
    wrong = {m: (read[m] - everywhere - named[m], named[m] - read[m]) for m in read}
    return {m: pair for m, pair in wrong.items() if any(pair)}


def test_each_method_reads_the_settings_that_its_entry_names():
    read = {m: set() for m in T.METHODS}
    for method in read:
        flow = dict(group_size=2, reward='k1_group') if method == 'flowopd' else {}
        rehearse(method, watch=lambda c: Traced(c, read[method]), eta=0.7, **flow)
        read[method] -= {'teachers', 'seed'}                   # of the rehearsal, of the plan
    assert all(len(r) > 5 for r in read.values())
    assert misfits(read, T.METHODS) == {}
    less = dict(T.METHODS, danceopd=T.METHODS['danceopd']._replace(settings=('queries', 'lr')))
    assert misfits(read, less) == {'danceopd': ({'query', 'query_in', 'states'}, {'lr'})}


# -------------------- whom it asks
class Heard(T.Models):
    heard = set()

    def velocity(self, who, batch, z, sigma, w=1.0):
        self.heard.add((who, w))
        return super().velocity(who, batch, z, sigma, w)


@pytest.mark.parametrize('method', T.METHODS)
def test_everybody_is_asked_with_the_guidance_of_his_own(method):
    teachers = [dict(name='base'), dict(name='count', guidance=3.0),
                dict(name='local_edit', guidance=2.0), dict(name='global_edit')]
    for anchor, w in (('local_edit', 2.0), ('global_edit', 1.5), ('base', 1.5)):
        Heard.heard = set()
        rehearse(method, Heard, eta=0.7, teachers=teachers, student_guidance=1.5, anchor=anchor,
                 rollout_guidance=1.5, anchor_beta=0.1)
        others = {('base', 1.0), ('count', 3.0), ('local_edit', 2.0), ('global_edit', 1.0)}
        assert Heard.heard == {('student', 1.5), (anchor, w)} | others


# -------------------- what its loss is
@pytest.fixture(scope='module')
def models(world):
    return standing([dict(name='one', lora=world.one), dict(name='two', lora=world.two)])


def terms_of(method, models, **more):
    """(samples, terms) of one update on four samples."""
    own = dict(dict(steps=4, drop_last=0) | more, method=method)
    argv = [f'--{k}={v!r}' for k, v in own.items()]
    c = configure(T.SETTINGS, [*argv, '--batch_size=4', '--micro_batch=4'])
    c.routes = [dict(teacher='one', data='x', size=(24, 24))]
    rows = dict(x=[dict(prompt='a red circle on white', source_image='', target_image='')])
    samples = T.plan(0, c, rows, ALONE)
    return c, samples, [t for terms in T.METHODS[method].updates(samples, models, c) for t in terms]


def said(models, batch, z, sigma):
    with torch.no_grad():
        return [models.velocity(k, batch, z, sigma) for k in ('student', 'one', 'two')]


def mse(a, b):
    return (a - b).square().flatten(1).mean(1)


HELD = dict(anchor='two', anchor_beta=0.5)


def test_danceopds_loss_is_the_velocity_error_at_its_queries(models):
    c, samples, terms = terms_of('danceopd', models, queries=2, **HELD)
    again = T.plan(0, c, dict(x=[samples[0].row]), ALONE)
    for a, b in zip(again, samples):
        a.queries = b.queries
    seen = [x for t in terms for x in zip(t.batch, t.loss)]
    for batch, z, sigma in T.visits(again, models, c):
        v, one, two = said(models, batch, z, sigma)
        for s, want in zip(batch, (mse(v, one) + 0.5 * mse(v, two)) / 2):
            own = [loss.item() for t, loss in seen if t.number == s.number]
            assert len(own) == 2 and min(abs(want.item() / x - 1) for x in own) < 1e-4


@pytest.mark.parametrize('more', [{}, dict(eta=0.7), dict(eta=0.7, kl_var='code', drop_last=1),
                                  dict(eta=0.3, sde='dance')])
def test_diffusionopds_loss_is_the_mean_kl_of_its_steps(more, models):
    c, samples, terms = terms_of('diffusionopd', models, **HELD, **more)
    n = 4 - more.get('drop_last', 0)
    z = T.first_states(T.plan(0, c, dict(x=[samples[0].row]), ALONE), models, 4)
    sigmas, streams = models.sigmas(samples, 4), T.plan(0, c, dict(x=[samples[0].row]), ALONE)
    assert len(terms) == n
    for i, term in enumerate(terms):
        s, t = sigmas[i], sigmas[i + 1]
        v, one, two = said(models, samples, z, s.expand(4))
        if 'eta' in more:
            means = [T.transition(z, x, s, t, c.eta, c.sde) for x in (v, one, two)]
            own, *others = [Normal(*torch.broadcast_tensors(*m)) for m in means]
            kl = [kl_divergence(own, x).flatten(1).mean(1) for x in others]
            kl = [k * (s - t) if 'kl_var' in more else k for k in kl]
        else:
            kl = [(t - s) ** 2 / 2 * mse(v, x) for x in (one, two)]
        torch.testing.assert_close(term.loss.detach(), (kl[0] + 0.5 * kl[1]) / n, rtol=1e-3,
                                   atol=1e-9)
        z = T.advance(streams, z, v, s, t, c.eta, c.sde)


def test_each_of_flowopds_updates_has_the_whole_loss_and_advantages_are_clipped(models):
    def losses(**more):
        _, _, terms = terms_of('flowopd', models, eta=0.7, **more)
        return torch.stack([x for _, x in sorted(
            (s.number, t.loss.detach()[j]) for t in terms for j, s in enumerate(t.batch))])
    one, two = losses(), losses(updates=2)
    assert len(one) == 16 and one.abs().max() > 1
    torch.testing.assert_close(two.view(4, 4).sum(1), 2 * one.view(4, 4).sum(1),
                               rtol=1e-3, atol=1e-3)
    assert losses(adv_clip=0.1).abs().max() <= 0.1 / 4


def test_a_rollout_has_its_own_guidance(models):
    asked, watched = [], copy.copy(models)
    watched.velocity = lambda who, *k: asked.append((who, *k[3:])) or models.velocity(who, *k)
    terms_of('diffusionopd', watched, rollout_guidance=2.5, student_guidance=1.5)
    assert asked.count(('student', 2.5)) == 3 and asked.count(('student', 1.5)) == 4


@pytest.mark.parametrize('states', ['student', 'teacher', 'data'])
def test_a_step_that_is_left_out_is_neither_learned_from_nor_measured(states, world, tmp_path,
                                                                       monkeypatch):
    """By what the teachers are asked about, in the whole of a run."""
    seen, own = set(), T.Models.target
    monkeypatch.setattr(T.Models, 'target', lambda self, batch, z, sigma: (
        seen.update(round(x, 5) for x in sigma.tolist()), own(self, batch, z, sigma))[1])
    of_edits = dict(routes=[dict(teacher='two', data='edits')], query='uniform', states=states)
    world.distil(tmp_path, steps=4, drop_last=1, max_steps=6, eval_samples=4, **of_edits)
    sigmas = T.open_field(str(SHAPES / 'base')).sigmas(4, 24, 24).tolist()
    sigmas = [round(x, 5) for x in sigmas[:4]]
    assert {*sigmas[:3]} <= seen and not {sigmas[3], 0.25} & seen         # .25: of the rehearsal
