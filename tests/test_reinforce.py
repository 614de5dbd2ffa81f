"""Teachers by reward: that the parts of GRPO and SDPO are put together rightly."""
from conftest import *

GRPO = dict(method='grpo', group_size=4, steps=3, max_steps=1, eval_samples=1)


def drawn(guidance=2.0, **more):
    """A student that has gone somewhere, settings, and a trajectory of two samples."""
    models, row = standing([], moved=0.1), dict(prompt='a red circle', source_image='')
    c = SimpleNamespace(**dict(
        seed=0, steps=4, drop_last=1, eta=0.3, sde='dance', guidance=guidance,
        rollout_guidance=guidance, kl_beta=0.5, kl_var='true', clip_range=1e-4) | more)
    batch = [T.Sample(row, (24, 24), T.torch_rng(i), T.torch_rng('draws', i)) for i in range(2)]
    models.prompts.condition(batch)
    return models, c, T.trajectory(batch, models, c)


@pytest.mark.parametrize('method', ['grpo', 'sdpo'])
def test_what_is_rewarded_more_becomes_likelier(method, world, tmp_path, monkeypatch):
    """Of each pair the second; another reward, of half the weight, is against it."""
    (tmp_path / 'own.py').write_text(''.join(
        f'def {k}(images, rows):\n    return [float(i % 2 == {odd}) for i in range(len(rows))]\n'
        for k, odd in (('second', 1), ('first', 0))))
    asked = []

    def policy(t, i, models, c):
        asked.append(t.logp[i, torch.arange(len(t.batch))].clone().requires_grad_())
        return torch.zeros_like(t.z[0]), asked[-1], torch.ones(len(t.batch))
    monkeypatch.setattr(train_teacher, 'policy', policy)
    reward = [dict(reward=f'{tmp_path}/own.py:{k}', weight=w)
              for k, w in (('second', 2.0), ('first', 1.0))]
    world.teach(tmp_path / 'run', reward=reward, **GRPO | dict(method=method, group_size=2))
    assert asked and all((x.grad[1::2] < x.grad[0::2]).all() for x in asked)


def test_rewards_see_the_clean_picture_ahead():
    models, c, t = drawn()
    with torch.no_grad():
        want = torch.stack([z - s * models.velocity('student', t.batch, z, s.expand(2), 2.0)
                            for z, s in zip(t.z[1:], t.sigmas[1:])])
    torch.testing.assert_close(train_teacher.last_clean(t, models, c), want[-1])
    torch.testing.assert_close(train_teacher.dual_states(t, models, c).clean, want)


def test_a_guided_policy_is_compared_with_itself_and_a_guided_base(world, tmp_path):
    out = world.teach(tmp_path / 'run', guidance=2.0, **GRPO)
    assert log(out, 'ratio_off') == [0] == log(out, 'kl')      # the student is the base yet


@pytest.mark.parametrize('best_of', [0, 2])
def test_the_kl_to_the_base_is_in_grpos_loss_with_its_gradient(best_of):
    """Of samples without an advantage it is all that there is; an update has the whole loss, and
    so have those that best_of leaves."""
    models, c, t = drawn(updates=3, group_size=4, best_of=best_of)
    none, scale = torch.zeros(2), 3 * (2 if best_of else 1)
    terms = train_teacher.grpo_terms([t], none, none == 0, [0, 1], models, c, [])
    for i, term in enumerate(terms):
        term.loss.sum().backward()
        want = scale / 2 * kl_of(t, i, models)
        torch.testing.assert_close(term.loss.detach(), want, rtol=1e-3, atol=1e-9)
    assert i == 1 and moved(models)


def test_the_kl_to_the_base_is_in_sdpos_loss_with_its_gradient():
    models, c, t = drawn(gamma=0.9)
    t.order, t.advantage = torch.tensor([[0, 0], [1, 1]]), torch.zeros(3, 2)
    for i, term in enumerate(train_teacher.sdpo_terms([t], [0, 1], models, c, [])):
        term.loss.sum().backward()
        want = kl_of(t, i, models) / 2                         # two places
        torch.testing.assert_close(term.loss.detach(), want, rtol=1e-3, atol=1e-9)
    assert i == 1 and moved(models)


def kl_of(t, i, models):
    """Half of KL(student's step || base's), by torch's Gaussians."""
    z, s, n = t.z[i], t.sigmas[i], t.sigmas[i + 1]
    with torch.no_grad():
        both = [T.transition(z, models.velocity(k, t.batch, z, s.expand(2), 2.0), s, n, 0.3,
                             'dance') for k in ('student', 'base')]
    own, base = (Normal(*torch.broadcast_tensors(*x)) for x in both)
    return 0.5 * kl_divergence(own, base).flatten(1).mean(1)


def moved(models):
    return any(p.grad is not None and p.grad.any() for p in models.student.params.values())


@pytest.mark.parametrize('same', [True, False])
def test_a_group_starts_from_one_noise_where_asked(same, world, tmp_path, monkeypatch):
    first, own = [], T.first_states
    monkeypatch.setattr(T, 'first_states', lambda *a: first.append(own(*a)) or first[-1])
    world.teach(tmp_path / 'run', same_noise=same, **GRPO | dict(group_size=2))
    z, = [x for x in first if len(x) == 8]                     # others are of evaluations
    assert torch.equal(z[0::2], z[1::2]) == same


def test_which_steps_grpo_trains_is_drawn_anew(world, tmp_path, monkeypatch):
    seen, terms = [], train_teacher.grpo_terms
    monkeypatch.setattr(train_teacher, 'grpo_terms', lambda *a: seen.append(a[3]) or terms(*a))
    world.teach(tmp_path / 'run', timestep_fraction=0.4, **GRPO | dict(steps=6, max_steps=3))
    assert [len(s) for s in seen] == [2] * 3 and len({*map(tuple, seen)}) > 1


def test_each_step_of_imitation_has_draws_of_its_own():
    models, row = standing([]), read_data([SHAPES / 'local_edit.csv'])[0]['local_edit'][0]
    c = SimpleNamespace(seed=0, prompt_dropout=0.5, sigmas='uniform', micro_batch=16)
    samples = [T.Sample(row, (24, 24), T.torch_rng(i), step=i) for i in range(16)]
    with torch.no_grad():
        (term,), = [[*terms] for terms in train_teacher.sft(samples, models, c)]
    assert len(term.numbers['sigma'].unique()) > 8
    assert 0 < sum(s.cond is s.empty for s in term.batch) < 16


def test_imitation_draws_buckets_by_their_rows(world, tmp_path):
    """Of two files, one of eight prompts and one of two pictures."""
    lines = (world.at / 'edits.csv').read_text().splitlines()
    for name, some in (('many', lines), ('few', lines[:3])):
        (tmp_path / f'{name}.csv').write_text('\n'.join(some))
    data = [f'{tmp_path}/{k}.csv' for k in ('many', 'few')]
    argv = world.teacher(tmp_path, method='sft', data=data)
    argv = [x for x in argv if not x.startswith('--reward=')]
    c = checks.own_settings(train_teacher.SETTINGS, argv)
    train_teacher.check(c)
    assert [(r['data'], r['weight']) for r in c.routes] == [('many', 8.0), ('few', 2.0)]


def test_the_reward_in_the_log_is_the_weighted_sum(world, tmp_path):
    (tmp_path / 'own.py').write_text('def half(images, rows):\n    return [0.5] * len(rows)')
    reward = [dict(reward=f'{world.at}/judges.py:bright', weight=3.0),
              dict(reward=f'{tmp_path}/own.py:half', weight=0.5)]
    out = world.teach(tmp_path / 'run', reward=reward, **GRPO)
    step = next(e for e in entries(out) if 'reward' in e)
    bright, = [x for k, x in step.items() if k.startswith('reward/') and k.endswith('bright')]
    assert step['reward'] == pytest.approx(3 * bright + 0.25, rel=1e-5)
