"""Runs of train_opd.py and train_teacher.py on the shapes world."""
from common import *
from pipelines import *




# ----------------------------------------------------------------------------------------------------
# What the tests are made of

LAYERS = [f'transformer_blocks.3.attn.{k}' for k in ('to_q', 'to_v', 'to_out.0')] + ['proj_out']


def random_lora(folder, seed, size=0.3, rank=2, layers=LAYERS):
    """A teacher: random factors on layers of the shapes world's transformer."""
    g, shapes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(SHAPES / 'base')
    draw = lambda n, m: torch.randn(n, m, generator=g) / m ** 0.5
    factors = {k: (draw(rank, shapes[k][1]), size * draw(shapes[k][0], rank), 1.0) for k in layers}
    merge_lora.write_adapter(folder, factors)
    return str(folder)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Two teachers, a file of prompts and one of edits, and the arguments of small runs on them."""
    at = tmp_path_factory.mktemp('world')
    prompts = [f'a {c} {s} on {b}' for c in ('red', 'green') for s in ('circle', 'square')
               for b in ('white', 'black')]
    (at / 'words.csv').write_text('prompt\n' + '\n'.join(prompts) + '\n')
    edits = files.read_data([SHAPES / 'local_edit.csv'])[0]['local_edit']
    heads = ['prompt', 'source_image', 'target_image']
    lines = [heads] + [[edits[i][k] for k in heads] for i in range(8)]
    (at / 'edits.csv').write_text('\n'.join(map(','.join, lines)))
    (at / 'judges.py').write_text(textwrap.dedent('''
        def constant(images, rows):
            return [0.5] * len(rows)

        def short(images, rows):
            return [0.5] * (len(rows) - 1)

        def nan(images, rows):
            return [float('nan')] * len(rows)

        def bright(images, rows):
            return images.mean((1, 2, 3)).tolist()

        def very_bright(images, rows):
            return (1e5 * images.mean((1, 2, 3))).tolist()

        asked = []

        def tired(images, rows):                               # of the third question on
            asked.append(rows)
            return [float(k) for k in range(len(rows) - (len(asked) > 2))]
    '''))
    one, two = random_lora(at / 'one', 1), random_lora(at / 'two', 2)
    common = dict(model=str(SHAPES / 'base'), device='cpu', eval_data=[], rank=4, alpha=8.0,
                  lora_targets=LAYERS, lr=2e-2, lr_schedule='constant', warmup=1, batch_size=8,
                  micro_batch=8, steps=3, max_steps=4, score='', eval_samples=3, show=1, sample_steps=1,
                  ema_decay=0.9, log_every=1, save_every=1000, eval_every=1000)
    opd = dict(common, teachers=[dict(name='base'), dict(name='one', lora=one), dict(name='two', lora=two)],
               routes=[dict(teacher='one', data='words'), dict(teacher='two', data='edits')],
               init_from='base', data=[str(at / 'words.csv'), str(at / 'edits.csv')])
    teacher = dict(common, data=[str(at / 'words.csv')], reward=[dict(reward=f'{SHAPES}/world.py:reward')])

    def words(settings):
        def argv(out, **more):
            plain = {k: v for k, v in settings.items()         # imitation has no rollouts
                     if more.get('method') != 'sft' or k not in train_teacher.ROLLOUT.split()}
            return [f'--{k}={v!r}' for k, v in (plain | dict(more, out_dir=str(out))).items()]
        return argv
    return SimpleNamespace(
        at=at, one=one, two=two, opd=words(opd), teacher=words(teacher),
        distil=lambda *a, **more: run(train_opd.main, words(opd)(*a, **more)),
        teach=lambda *a, **more: run(train_teacher.main, words(teacher)(*a, **more)))


def run(main, argv):
    """main in this process. Returns the run folder; the test process keeps its own answer to SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Path(next(a for a in argv if a.startswith('--out_dir='))[11:-1])


def python(*words):
    """A process of its own, in the repository."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)


def state(out, step):
    return torch.load(out / f'step_{step:06d}' / 'train_state.pt', weights_only=True)


def first_gradient(out):
    """Of a run's first step, as its optimizer remembers it: times a constant."""
    return torch.cat([x['exp_avg'].flatten() for x in state(out, 1)['optimizer']['state'].values()])


def log(out, key):
    rows = map(json.loads, (out / 'log.jsonl').read_text().splitlines())
    return [r[key] for r in rows if key in r]


def same_state(a, b):
    """Weights, average and optimizer, bit for bit."""
    for part in ('student', 'ema'):
        assert list(a[part]) == list(b[part]) and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    x, y = a['optimizer']['state'], b['optimizer']['state']
    assert list(x) == list(y) and all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])


def resumes_exactly(main, argv, out, half, full):
    """The run that is in `out` is the same as its first half, stopped, resumed from a copy, and finished."""
    copy = out.with_name(out.name + '_copy')
    shutil.copytree(out, copy, symlinks=True)
    shutil.rmtree(copy / f'step_{full:06d}')
    assert not all(torch.equal(a, b) for a, b in zip(state(out, half)['student'].values(),
                                                     state(out, full)['student'].values()))
    argv = [a for a in argv if not a.startswith('--out_dir')]
    run(main, [*argv, f'--out_dir={str(copy)!r}', '--init_from=resume'])
    same_state(state(out, full), state(copy, full))
    assert log(out, 'loss') == log(copy, 'loss') and len(log(out, 'loss')) == full


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def sigma4(x):
    return torch.as_tensor(x).view(1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------
# train_opd.py: the flow and the losses

# Computed with four published implementations; cps is Flow-CPS, ode takes no noise whatever eta says.
GOLDEN = [
    ('flow', 0.7, 1.0, 0.667,
     [0.322071, -0.101568, 0.205993], [-0.764473, 0.240841, 0.166426],
     [0.497733, -0.156884, 0.100105], 0.7),
    ('flow', 0.3, 0.445, 0.334,
     [0.191841, -0.196512, 0.529535], [-1.217061, 0.64761, -0.841097],
     [0.331288, -0.269863, 0.622332], 0.089499),
    ('dance', 0.3, 0.889, 0.778,
     [0.271979, -0.347106, 0.804537], [0.239213, -1.841209, -1.694891],
     [0.243749, -0.139633, 0.989207], 0.09995),
    ('dance', 0.7, 1.0, 0.667,
     [0.322071, -0.101568, 0.205993], [-0.764473, 0.240841, 0.166426],
     [0.550365, -0.173481, 0.133767], 0.403943),
    ('cps', 0.7, 0.6021506, 0.0089286,
     [-0.774869, 0.18975, -0.627521], [1.367259, 2.201291, 0.140835],
     [-1.584831, -1.121299, -0.708281], 0.007955),
    ('ode', 0.7, 0.7072785, 0.6021506,
     [2.887452, -0.592193, 0.7641], [1.563096, 0.133333, 0.253118],
     [2.723127, -0.60621, 0.73749], 0.0)]


@pytest.mark.parametrize('kind, eta, sigma, sigma_next, z, v, mean, std', GOLDEN)
def test_transition_is_that_of_the_published_code(kind, eta, sigma, sigma_next, z, v, mean, std):
    x = torch.tensor(z).view(1, -1, 1, 1)
    eta = 0.0 if kind == 'ode' else eta
    m, s = train_opd.transition(x, torch.tensor(v).view_as(x), sigma4(sigma), sigma4(sigma_next), eta, kind)
    assert m.flatten().tolist() == pytest.approx(mean, abs=1e-5) and s.item() == pytest.approx(std, abs=1e-5)


def test_log_prob_is_the_mean_over_dimensions():
    x, mean, std = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3, 1, 1, 1) + 0.1
    want = Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(train_opd.log_prob(x, mean, std), want)


@pytest.mark.parametrize('kind, eta', [('flow', 0.7), ('dance', 0.3), ('cps', 0.7)])
@pytest.mark.parametrize('sigma, sigma_next', [(1.0, 0.9), (0.6, 0.2)])
def test_diffusionopd_is_the_kl_of_two_gaussians(kind, eta, sigma, sigma_next):
    z, v, v_t = torch.randn(3, 4, 2, 2, 2)
    s, t = torch.full((4,), sigma), torch.full((4,), sigma_next)
    step = lambda x: train_opd.transition(z, x, train_opd.col(s), train_opd.col(t), eta, kind)
    steps = [Normal(*torch.broadcast_tensors(*step(x))) for x in (v, v_t)]
    want = kl_divergence(*steps).flatten(1).mean(1)
    for var, factor in (('true', 1), ('code', s - t)):
        loss = train_opd.kl_weight(s, t, eta, kind, var) * train_opd.velocity_error(v, v_t)
        torch.testing.assert_close(loss, want * factor, rtol=1e-4, atol=1e-6)


def test_the_odes_weight_is_the_limit_of_the_kl_times_the_variance():
    s, t = torch.tensor([1.0, 0.7]), torch.tensor([0.8, 0.1])
    ode = train_opd.kl_weight(s, t)
    torch.testing.assert_close(ode, (s - t) ** 2 / 2)
    for kind in ('flow', 'dance'):
        _, std = train_opd.transition(s, s, s, t, 1e-3, kind)
        torch.testing.assert_close(train_opd.kl_weight(s, t, 1e-3, kind) * std ** 2, ode, rtol=1e-3, atol=0)


def policy_gradients(estimator, grouped, n=64000, group=16):
    """Gradients of Flow-OPD's loss by the velocity, one a draw, at three states; and the KL's own there."""
    torch.manual_seed(0)
    z0, v0, v_t = torch.randn(3, 3, 6, 1, 1)
    s, t, eta = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.7, 0.5, 0.1]), 0.7
    drawn, exact = [], []
    for k in range(3):
        sigma, sigma_next = s[k].expand(n), t[k].expand(n)
        at = lambda v: train_opd.transition(z0[k].expand_as(v), v, sigma4(s[k]), sigma4(t[k]), eta)
        v = v0[k].expand(n, -1, -1, -1).clone().requires_grad_()
        mean, std = at(v)
        action = (mean + std * torch.randn(n, 6, 1, 1)).detach()
        logp = train_opd.log_prob(action, mean, std)
        logp_t = train_opd.log_prob(action, *at(v_t[k].expand_as(v)))
        kl = train_opd.kl_weight(sigma, sigma_next, eta) * train_opd.velocity_error(v, v_t[k].expand_as(v))
        exact.append(torch.autograd.grad(kl.sum(), v, retain_graph=True)[0][0].flatten())
        reward = train_opd.flowopd_reward(estimator, logp_t, logp.detach(), kl.detach())
        advantage = train_opd.group_advantage(reward, group, 100.0) if grouped else reward
        advantage = (-kl).clamp(-100, 100) if estimator == 'code' else advantage
        loss, numbers = train_opd.ppo_loss(logp, logp.detach(), advantage, 1e-4)
        assert (numbers['ratio_off'] == 0).all()
        drawn.append(torch.autograd.grad(loss.sum(), v)[0].flatten(1))
    return drawn, exact


@pytest.mark.parametrize('estimator, grouped', [('k1', False), ('k1', True), ('code', False)])
def test_flowopds_mean_gradient_is_the_kls(estimator, grouped):
    for draws, exact in zip(*policy_gradients(estimator, grouped)):
        assert cosine(draws.mean(0), exact) > 0.99


def test_flowopd_as_the_paper_has_it_is_a_no_op():
    z_scores = {}
    for estimator in ('paper', 'k1'):
        draws = policy_gradients(estimator, False)[0]
        assert all(d.std(0).min() > 0 for d in draws)
        z_scores[estimator] = torch.stack([d.mean(0).abs() / (d.std(0) / len(d) ** 0.5) for d in draws])
    assert z_scores['paper'].max() < 4 and z_scores['k1'].amax(1).min() > 20
    assert all((d == 0).all() for d in policy_gradients('paper', True)[0])  # alike within a group


def test_group_advantage():
    r = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 0.0, 9.0])
    root = 3 ** 0.5
    for clip, most in ((5.0, 2 / root), (0.8, 0.8)):
        want = [-min(1, clip), 0, min(1, clip), 0, 0, 0, -1 / root, -1 / root, most]
        assert train_opd.group_advantage(r, 3, clip).tolist() == pytest.approx(want, abs=1e-5)
    want = (r.view(3, 3) - r.view(3, 3).mean(1, keepdim=True)).flatten() / r.std()
    torch.testing.assert_close(train_opd.group_advantage(r, 3, std=r.std()), want, rtol=1e-4, atol=1e-5)


def test_ppo_loss_is_clipped_both_ways():
    logp = torch.tensor([1.1, 1.1, 0.9, 0.9]).log().requires_grad_()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    loss, numbers = train_opd.ppo_loss(logp, torch.zeros(4), advantage, 0.05)
    off = numbers['ratio_off']
    assert off.tolist() == pytest.approx([0.1] * 4) and not off.requires_grad
    assert loss.tolist() == pytest.approx([-2.1, 2.2, -1.8, 1.9])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, 2.2, -1.8, 0])  # what is clipped has no gradient


# ----------------------------------------------------------------------------------------------------
# train_opd.py: plan and rollout

ROUTES = [dict(teacher='a', data='x', weight=1.0), dict(teacher='b', data='y', weight=3.0)]


def as_dicts(samples):
    return [{k: v for k, v in vars(s).items() if k not in ('noise', 'draws')} for s in samples]


def planned(step, seed, routes, sizes, batch, per_step='all', group=1, rank=0, size=1, updates=1):
    """A plan of rows that are their own numbers."""
    c = SimpleNamespace(seed=seed, routes=routes, batch_size=batch, routes_per_step=per_step, group_size=group)
    buckets = {r['data']: range(n) for r, n in zip(routes, sizes)}
    return train_opd.plan(step, c, buckets, SimpleNamespace(rank=rank, size=size), updates)


@pytest.mark.parametrize('per_step', [1, 'all', 'sample'])
def test_a_plan_depends_on_seed_and_step_alone(per_step):
    one = lambda step, seed: as_dicts(planned(step, seed, ROUTES, [50, 70], 16, per_step, 2))
    first = one(3, 0)
    random.seed(7), torch.manual_seed(7)
    assert one(3, 0) == first and one(4, 0) != first and one(3, 1) != first
    assert all(0 <= s['row'] < dict(x=50, y=70)[s['label']] for s in first)
    for a, b in zip(first[0::2], first[1::2]):
        assert (a['group'], a['row'], a['label']) == (b['group'], b['row'], b['label'])
    assert len({s['row'] for s in first}) > 1 and [s['number'] for s in first] == list(range(16))


def test_any_number_of_processes_takes_the_same_samples():
    def taken(size):
        got = []
        for rank in range(size):
            mine = planned(2, 5, ROUTES, [40, 40], 24, 'sample', 2, rank, size)
            assert all(a.group == b.group for a, b in zip(mine[0::2], mine[1::2])) and len(mine) == 24 // size
            got += [(s.number, s.label, s.row, s.share, torch.randn(2, generator=s.noise).tolist(),
                     torch.randn(2, generator=s.draws).tolist()) for s in mine]
        return sorted(got)
    assert taken(1) == taken(2) == taken(3) == taken(12)
    assert len({str(s[4]) for s in taken(1)} | {str(s[5]) for s in taken(1)}) == 48  # all streams differ


def test_routes_of_a_step():
    steps = lambda **k: [planned(i, 0, ROUTES, [50, 70], 16, **k) for i in range(400)]
    one, every, free = steps(per_step=1), steps(per_step='all'), steps(per_step='sample')
    assert all(len({'xy'.index(s.label) for s in p}) == 1 for p in one)
    assert sum('xy'.index(p[0].label) for p in one) / 400 == pytest.approx(0.75, abs=0.07)
    assert sum('xy'.index(s.label) for p in free for s in p) / 6400 == pytest.approx(0.75, abs=0.02)
    assert all(['xy'.index(s.label) for s in p] == [0] * 8 + [1] * 8 for p in every)
    for p in one[:20] + free[:20]:
        assert all(s.share == 1 / 16 for s in p)
    for p in every[:20]:  # a route counts by weight, not by its samples
        assert [sum(s.share for s in p if 'xy'.index(s.label) == r) for r in (0, 1)] == pytest.approx([0.25, 0.75])
    parts = [dict(ROUTES[0], samples=4), dict(ROUTES[1], samples=12)]
    p = planned(0, 0, parts, [50, 70], 16, 'all', 2)
    assert ['xy'.index(s.label) for s in p] == [0] * 4 + [1] * 12
    assert [sum(s.share for s in p if 'xy'.index(s.label) == r) for r in (0, 1)] == pytest.approx([0.25, 0.75])
    assert [s.slot for s in p] == [*range(4), *range(12)] and [s.of for s in p] == [4] * 4 + [12] * 12


def test_draw_queries():
    draw = lambda k=1, n=3000, **more: [train_opd.draw_queries(train_opd.rng(i), k, 16, **more) for i in range(n)]
    mean = lambda bias: sum(i for x in draw(bias=bias) for i in x) / 3000
    assert mean('low') == pytest.approx(10.93, abs=0.2) and mean('mid') == pytest.approx(7.5, abs=0.2)
    assert mean('high') == pytest.approx(4.07, abs=0.2) and mean('uniform') == pytest.approx(7.5, abs=0.35)
    for bias in ('low', 'mid', 'high', 'uniform', 'stratified'):
        for k in (2, 8, 16):
            for x in draw(k, 40, bias=bias):
                assert x == sorted(set(x)) and len(x) == k and 0 <= x[0] and x[-1] < 16
    spread = lambda k, of: sorted(i for slot in range(of) for i in train_opd.draw_queries(
        train_opd.rng(slot), k, 16, 'stratified', slot, of))
    assert spread(1, 16) == spread(2, 8) == [*range(16)] and spread(1, 32) == sorted([*range(16)] * 2)


def test_a_stochastic_rollout_has_the_transitions_mean_and_deviation():
    n, sigmas = 4000, torch.tensor([0.9, 0.6, 0.0])
    z, v = torch.full((n, 2, 1, 1), 0.3), lambda batch, z, s: torch.full_like(z, 0.5)
    for kind, eta in (('flow', 0.7), ('dance', 0.3), ('cps', 0.5)):
        batch = [SimpleNamespace(draws=torch.Generator().manual_seed(i)) for i in range(n)]
        _, (_, _, x), _ = train_opd.rollout(v, batch, z, sigmas, [2] * n, eta, kind)
        mean, std = train_opd.transition(sigma4(0.3), sigma4(0.5), sigmas[0], sigmas[1], eta, kind)
        assert x.mean().item() == pytest.approx(mean.item(), abs=4 * std.item() / (2 * n) ** 0.5)
        assert x.std().item() == pytest.approx(std.item(), rel=0.04)
        apart = torch.corrcoef(torch.cat([x[:-1, :, 0, 0], x[1:, :, 0, 0]], 1).T) - torch.eye(4)
        assert apart.abs().max() < 0.08  # dimensions and samples are independent


def test_a_sample_leaves_the_rollout_at_its_last_index():
    asked, sigmas = [], torch.linspace(1, 0, 6)

    def velocity(alive, z, s):
        asked.append((alive, s.tolist()))
        return torch.ones_like(z)
    z = torch.arange(4.0).view(4, 1, 1, 1)
    walk = train_opd.rollout(velocity, [0, 1, 2, 3], z, sigmas, [2, 0, 4, 2])
    seen = [(i, alive, x.flatten().tolist()) for i, alive, x in walk]
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [alive for _, alive, _ in seen] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [2], [2]]
    assert [alive for alive, _ in asked] == [[0, 2, 3], [0, 2, 3], [2], [2]]
    for (i, alive, x), (_, s) in zip(seen, asked):
        assert x == pytest.approx([j - 0.2 * i for j in alive]) and s == [pytest.approx(1 - 0.2 * i)] * len(s)


def test_a_velocity_that_is_sent_back_is_used_instead_of_another_forward():
    def velocity(alive, z, s):
        raise AssertionError('computed twice')
    walk = train_opd.rollout(velocity, [0, 1], torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.5, 0.0]), [2, 1])
    _, alive, z = next(walk)
    _, alive, z = walk.send(torch.tensor([3.0, 5.0]).view(2, 1, 1, 1))
    assert alive == [0, 1] and z.flatten().tolist() == [-1.5, -2.5]
    _, alive, z = walk.send(torch.tensor([7.0, 9.0]).view(2, 1, 1, 1))
    assert alive == [0] and z.flatten().tolist() == [-5.0]


# ----------------------------------------------------------------------------------------------------
# train_opd.py: runs

def test_danceopd_costs_no_more_forwards_than_it_needs(world, tmp_path):
    count = 0

    def hook(module, args, output):
        nonlocal count
        count += len(output[0]) if type(module).__name__ == 'SD3Transformer2DModel' else 0
    handle, total = torch.nn.modules.module.register_module_forward_hook(hook), []
    try:
        for steps in (1, 5):  # the difference is what four steps cost
            count = 0
            world.distil(tmp_path / str(steps), max_steps=steps, steps=16, query='low', batch_size=32,
                         micro_batch=32, eval_samples=1, routes=[dict(teacher='one', data='words')])
            total.append(count)
    finally:
        handle.remove()
    assert 12 < (total[1] - total[0]) / (4 * 32) < 13.9  # 10.9 of the rollout, one each to learn


METHODS = dict(
    danceopd=dict(queries=2),
    diffusionopd=dict(),
    flowopd=dict(reward='code', eta=0.7, group_size=4, updates=2, clip_range=1e-2, anchor='base',
                 anchor_beta=1e-3))


@pytest.mark.parametrize('method', METHODS)
def test_each_method_closes_the_gap_and_resumes_bit_for_bit(method, world, tmp_path):
    teachers = [dict(name='near', lora=random_lora(tmp_path / 'near', 3, layers=['proj_out']))]
    argv = world.opd(tmp_path / 'run', method=method, max_steps=16, save_every=8, ckpt_keep=3,
                     teachers=teachers, lora_targets=['proj_out'], ema_decay=0.8,
                     routes=[dict(teacher='near', data='words'), dict(teacher='near', data='edits')],
                     **METHODS[method])
    out = run(train_opd.main, argv)
    for route in json.loads((out / 'result.json').read_text()).values():
        assert route['gap_after'] < 0.85 * route['gap_before']
    resumes_exactly(train_opd.main, argv, out, 8, 16)


def test_prompts_that_do_not_fit_the_cache_are_encoded_in_chunks_with_the_same_losses(world, tmp_path):
    want = world.distil(tmp_path / 'whole', max_steps=3, steps=2)
    got = world.distil(tmp_path / 'chunks', max_steps=3, steps=2, cache_gb=0.0, encode_every=2)
    assert log(got, 'loss') == pytest.approx(log(want, 'loss'), rel=1e-4)


def test_a_prompt_is_encoded_once_a_chunk():
    field = train_opd.open_field(str(SHAPES / 'base'))
    seen, encode = [], field.encode

    def counted(prompts, edit=False):
        seen.extend((p, edit) for p in prompts)
        return encode(prompts, edit)
    field.encode = counted
    row = lambda p, source='': dict(prompt=p, source_image=source)
    prompts, many = M.Prompts(field, cache_gb=0.0), [row(f'a {c} circle') for c in ('red', 'green', 'blue')]
    prompts.add(many + many + [row(''), row('', 'a.png')])
    assert seen == [*((r['prompt'], False) for r in many), ('', False), ('', True)]  # edits have their own
    prompts.add(many[1:] + [row('a red square')])              # the next chunk: one is new, one has gone
    assert seen[5:] == [('a red square', False)] and ('a red circle', False) not in prompts.known
    alone = encode(['a green circle'])[0]
    for k, x in prompts.known['a green circle', False].items():
        assert torch.equal(x, alone[k])


def test_two_hundred_thousand_rows_take_little_memory(tmp_path):
    for n in (2000, 200000):
        lines = (f'"a prompt of several words, as people write them: {i}",t\n' for i in range(n))
        (tmp_path / f'{n}.csv').write_text('prompt,task\n' + ''.join(lines))
    code = '''if True:
        import resource, sys, files
        for n in (2000, 200000):
            buckets, errors = files.read_data([f'{sys.argv[1]}/{n}.csv'])
            assert not errors and len(buckets['t']) == n
            assert buckets['t'][n - 1]['prompt'].endswith(f': {n - 1}')
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
    '''
    p = python('-c', code, tmp_path)
    assert p.returncode == 0, p.stderr
    few, many = map(int, p.stdout.split())
    assert many - few < 60


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    file = tmp_path / 'a.txt'
    file.write_text('a red square\na blue circle\n')
    bucket = read_data([file])[0]['a']
    assert [bucket[i]['prompt'] for i in range(2)] == ['a red square', 'a blue circle']
    file.write_text('a green square\na blue circle\n')                 # its second row begins elsewhere now
    with pytest.raises(BadInput, match='a.txt was changed'):
        bucket[1]


@pytest.mark.parametrize('name, text, says', [
    ('a.csv', 'prompt,task\na red circle, on white,t2i\n', '1 fields more than columns'),
    ('a.jsonl', '{"prompt": "a"}\n[1, 2]\n', 'not a row with names'),
    ('a.jsonl', '{"prompt": 5}\n', 'prompt should be text, not 5')])
def test_rows_that_would_be_changed_are_refused(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f'{name}: cannot be read near byte .*{says}'):
        files.open_buckets([tmp_path / name], [])


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    for name, text in (('a.txt', 'a red circle\n'), ('b.jsonl', '{"prompt": "a red circle"}\n'),
                       ('c.csv', 'prompt\na red circle\n')):
        (tmp_path / name).write_text(text, encoding='utf-8-sig')
        bucket, = read_data([tmp_path / name])[0].values()
        assert bucket[0]['prompt'] == 'a red circle'


def test_a_grid_leaves_out_columns_without_pictures(tmp_path):
    x = torch.rand(4, 3, 24, 24)
    files.grid([[None, x[0], None, x[1]], [None, x[2], None, x[3]]], tmp_path / 'a.png', ['one', 'two'],
               ['source', 'teacher', 'start', 'now'])
    files.grid([[x[0], x[1]], [x[2], x[3]]], tmp_path / 'b.png', ['one', 'two'], ['teacher', 'now'])
    files.grid([[x[0], x[1], None], [x[2], None, x[3]]], tmp_path / 'c.png', ['one', 'two'])
    a, b, c = (np.asarray(Image.open(tmp_path / f'{k}.png')) for k in 'abc')
    assert (a == b).all() and a.shape[1] == 420
    files.grid([[x[0], None, x[1]]], tmp_path / 'd.png', heads=['left', '', 'right'])
    assert Image.open(tmp_path / 'd.png').width == 3 * 124 + 4         # a gap that was asked for
    big = lambda k: (x[k].permute(1, 2, 0) * 255).round().byte().numpy().repeat(5, 0).repeat(5, 1)
    assert (b[20:140, 4:124] == big(0)).all() and (b[20:140, 128:248] == big(1)).all()
    assert (c[4:124, 128:248] == big(1)).all() and (c[146:266, 252:372] == big(3)).all()


def test_a_picture_that_is_cut_off_is_found_before_the_run(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), 'uint8')).save(tmp_path / 'a.png')
    (tmp_path / 'a.csv').write_text('prompt,source_image\nmake it red,a.png\n')
    files.open_buckets([tmp_path / 'a.csv'], [])
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-2000])
    with pytest.raises(BadInput, match='source_image .*a.png does not open'):
        files.open_buckets([tmp_path / 'a.csv'], [])


@pytest.mark.parametrize('method', METHODS)
def test_memory_for_gradients_does_not_grow_with_the_steps(method, world, tmp_path):
    """Bytes that autograd keeps alive at once, counted as they are saved and let go."""
    def peak(steps):
        live = most = 0

        class Kept:
            def __init__(self, x):
                nonlocal live, most
                self.x, self.size = x, x.numel() * x.element_size()
                live += self.size
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.size
        more = {**METHODS[method], 'steps': steps, 'max_steps': 1, 'eval_samples': 1}
        more['queries'] = steps if method == 'danceopd' else 1
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            world.distil(tmp_path / str(steps), method=method, **more)
        return most
    few, many = peak(2), peak(6)
    assert few > 10 ** 5 and many < 1.05 * few


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(world, tmp_path):
    huge = random_lora(tmp_path / 'huge', 3, size=1e30)
    more = dict(teachers=[dict(name='one', lora=world.one), dict(name='huge', lora=huge)],
                routes=[dict(teacher='one', data='words'), dict(teacher='huge', data='edits')], steps=2)
    with pytest.raises(BadInput, match='5 updates in a row .*lower lr'):
        world.distil(tmp_path / 'all', save_every=1, max_steps=9, **more)
    first, last = (state(tmp_path / 'all', k)['student'] for k in (3, 4))
    assert all(torch.equal(first[k], last[k]) and last[k].isfinite().all() for k in first)


# A run is started over and over and killed, at random and while it saves; then it is finished.
KILLED = '''if True:
    import os, random, signal, sys, time, torch, diffusers, transformers, run as R, train_opd
    from pathlib import Path
    random.seed(0)
    argv = sys.argv[1:]
    out = Path(next(a for a in argv if a.startswith('--out_dir='))[11:-1])

    def start(*more):
        if pid := os.fork():
            return pid
        sys.stdout = open(os.devnull, 'w')
        train_opd.main([*argv, *more, *['--init_from=resume'] * bool(R.newest(out))])
        os._exit(0)

    for k in range(6):
        before, pid, t0 = R.newest(out), start(), time.time()
        while R.newest(out) == before and time.time() - t0 < 200:  # it gets at least one step further
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        while k % 2:                                                   # stop, and look: is it saving?
            os.kill(pid, signal.SIGSTOP), os.waitpid(pid, os.WUNTRACED)
            if list(out.glob('.writing_step_*')):
                break
            os.kill(pid, signal.SIGCONT), time.sleep(random.uniform(0, 0.005))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, 'it ended before it was killed'
        for whole in (R.newest(out), (out / 'latest').resolve()):
            torch.load(whole / 'train_state.pt', weights_only=True), (whole / 'meta.json').read_text()
    last = int(R.newest(out).name[5:]) + 3
    assert os.waitpid(start(f'--max_steps={last}'), 0)[1] == 0
    print(last)
'''


def test_a_killed_run_is_resumable_and_loses_nothing(world, tmp_path):
    more = dict(max_steps=10 ** 6, save_every=1, steps=1, batch_size=4, eval_samples=1, ckpt_keep=2)
    argv = world.opd(tmp_path / 'killed', **more)
    p = python('-c', KILLED, *argv)
    assert p.returncode == 0, p.stderr[-2000:]
    last = int(p.stdout)
    whole = world.distil(tmp_path / 'whole', **more | dict(save_every=last, max_steps=last))
    same_state(state(tmp_path / 'killed', last), state(whole, last))
    assert log(tmp_path / 'killed', 'loss') == log(whole, 'loss')
    left = sorted(p.name for p in (tmp_path / 'killed').glob('*step_*'))
    assert left == [f'step_{last - 1:06d}', f'step_{last:06d}']
    assert not list((tmp_path / 'killed').glob('.writing*'))


def test_a_resume_continues_its_own_line_in_wandb_and_a_new_run_has_another(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda id, **k: ids.append(id)))
    for resumed in (None, 3, None):
        R.Folder.begin_wandb(SimpleNamespace(out=tmp_path, last=resumed, meta=dict(settings={}),
                                             c=SimpleNamespace(wandb_project='')))
    assert ids[0] == ids[1] != ids[2]


def test_sigterm_saves_and_ends_well(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=100000, steps=1, eval_samples=1)
    p = subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, env=ONE_THREAD, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for line in p.stdout:
            if line.startswith('step      2 '):
                p.send_signal(signal.SIGTERM)
                break
        said, errors = p.communicate(timeout=300)
    finally:
        p.kill()
    last = R.newest(tmp_path / 'run')
    assert p.returncode == 0, errors
    assert f'asked to stop: saved step {int(last.name[5:])}; continue with --init_from=resume' in said
    step = json.loads((last / 'meta.json').read_text())['step']
    assert last.name == f'step_{step:06d}' and 2 <= step < 100000


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_processes_are_one(world, tmp_path):
    """Gradients after one step, velocities after five; a launch for all that deals samples differently."""
    more = dict(max_steps=5, save_every=1, ckpt_keep=9, steps=2, eval_samples=2, lr=2e-3)
    jobs = [('opd', train_opd.main, world.opd, dict(more, batch_size=8)),
            ('grpo', train_teacher.main, world.teacher,
             dict(more, method='grpo', group_size=4, batch_size=16, global_std=True)),
            ('sdpo', train_teacher.main, world.teacher, dict(more, method='sdpo', group_size=2, steps=3))]
    code = '''if True:
        import json, sys, train_opd, train_teacher
        for name, argv in json.loads(sys.argv[1]):
            (train_opd if name == 'opd' else train_teacher).main(argv)
    '''
    (tmp_path / 'both.py').write_text(textwrap.dedent(code))
    argvs = json.dumps([(name, argv(tmp_path / f'{name}2', **m)) for name, _, argv, m in jobs])
    p = python('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
               f'--master_port={free_port()}', tmp_path / 'both.py', argvs)
    assert p.returncode == 0, p.stderr[-3000:]
    for name, main, argv, m in jobs:
        one, two = run(main, argv(tmp_path / name, **m)), tmp_path / f'{name}2'
        a, b = first_gradient(one), first_gradient(two)
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()
        teachers = [dict(name=f'at{k}', lora=str(o / 'step_000005')) for k, o in enumerate((one, two))]
        models = T.Models(train_opd.open_field(str(SHAPES / 'base')), teachers)
        cond = [models.field.encode('a red circle on white')] * 8
        z = torch.randn(8, *models.field.shape(24, 24))
        with torch.no_grad():
            batch = [SimpleNamespace(cond=x) for x in cond]
            base, a, b = (models.velocity(k, batch, z, torch.full((8,), 0.5)) for k in ('base', 'at0', 'at1'))
        assert (a - b).norm() < 1e-3 * (a - base).norm()  # of what was learned


def test_machines_that_do_not_share_the_run_folder_are_told(world, tmp_path):
    """Each would resume from what it finds: nothing, or other weights than the others."""
    run = world.distil(tmp_path / 'run', max_steps=1)
    env = ONE_THREAD | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    argvs = [world.opd(out, max_steps=2, init_from='resume') for out in (run, tmp_path / 'empty')]
    ps = [subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, env=env | dict(RANK=str(rank)),
                           text=True, stderr=subprocess.PIPE) for rank, argv in enumerate(argvs)]
    for p in ps:
        errors = p.communicate(timeout=300)[1]
        assert p.returncode == 2 and 'one folder for all machines' in errors


def test_scorers_are_asked_once_a_picture_and_each_process_sends_only_its_own(world, tmp_path, monkeypatch):
    sent, gather = [], train_opd.gather

    def spy(world, x):
        sent.extend(y for y in x if isinstance(y, tuple))
        return gather(world, x)
    monkeypatch.setattr(train_opd, 'gather', spy)
    world.distil(tmp_path / 'run', max_steps=1, show=3, eval_samples=3)
    assert sent and all(x.untyped_storage().nbytes() == x.nbytes for _, x in sent)

    monkeypatch.setattr(train_opd, 'gather', lambda world, x: x)       # each for itself
    images, rows, asked = torch.rand(11, 3, 4, 4), [{'prompt': str(i)} for i in range(11)], []

    def judge(images, rows):
        asked.append([int(r['prompt']) for r in rows])
        return images.mean((1, 2, 3)).tolist()
    monkeypatch.setattr(files, 'gather', lambda world, x: x)
    said = [files.judged(judge, images, rows, 3, SimpleNamespace(rank=rank, size=3)) for rank in range(3)]
    assert sorted(sum(asked, [])) == [*range(11)] and max(map(len, asked)) == 3
    own = images.mean((1, 2, 3))
    assert said == pytest.approx([own[r::3].mean().item() for r in range(3)])


@pytest.mark.parametrize('updates', [1, 2, 4])
def test_processes_share_each_update(updates):
    """Whatever their number, together they hold the same samples, and each has as much of every update."""
    def dealt(size):
        mine = [planned(5, 0, [dict(data='x')], [9], 32, 'sample', 2, rank, size, updates)
                for rank in range(size)]
        parts = [[[s for s in m if s.group % updates == u] for u in range(updates)] for m in mine]
        assert len({len(x) for p in parts for x in p}) == 1
        return [sorted((s.number, s.row) for p in parts for s in p[u]) for u in range(updates)]
    assert dealt(1) == dealt(2) == dealt(4) and len(dealt(1)[0]) == 32 // updates


def test_a_batch_that_does_not_divide_says_what_would(world, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(BadInput, match='batch_size = 10 does not divide .* nearest that does is 8'):
        train_opd.main(world.opd(tmp_path / 'x', batch_size=10))
    with pytest.raises(BadInput, match='batch_size = 12 does not divide .* nearest that does is 16'):
        train_teacher.main(world.teacher(tmp_path / 'x', method='grpo', group_size=4, batch_size=12))


# ----------------------------------------------------------------------------------------------------
# train_opd.py: mistakes

def broken_adapter(folder, kind):
    """An adapter with one thing wrong, as single file."""
    path = Path(random_lora(folder, 5)) / merge_lora.FILES[0]
    tensors = {k: x for k, x in safetensors.torch.load_file(path).items()}
    for other in set(folder.iterdir()) - {path}:
        other.unlink()
    if kind == 'missing':
        tensors.pop('transformer.proj_out.lora_B.weight')
    if kind == 'surplus':
        tensors['transformer.proj_out.diff'] = torch.ones(2)
    if kind == 'other':
        tensors = {k.replace('blocks.3', 'blocks.77'): x for k, x in tensors.items()}
    if kind == 'wide':
        tensors['transformer.proj_out.lora_A.weight'] = torch.ones(2, 999)
    if kind == 'nan':
        tensors['transformer.proj_out.lora_A.weight'][0] = math.nan
    safetensors.torch.save_file(tensors, path)
    if kind == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    return str(folder)


MISTAKES = {  # what is said: the settings that are wrong, given the world
    'unknown setting batch_sise, did you mean batch_size': lambda w: dict(batch_sise=4),
    "rank should be int, not str 'many'": lambda w: dict(rank='many'),
    'nowhere.csv: no such data file': lambda w: dict(data=['nowhere.csv']),
    'other.csv: no column "prompt"; it has: text, task': lambda w: dict(
        data=[w.file('other.csv', 'text,task\nhello,words\n')]),
    'source_image .*gone.png does not exist': lambda w: dict(data=[
        str(w.at / 'words.csv'), w.file('gone/edits.csv', 'prompt,source_image\nmake it red,gone.png\n')]),
    "bucket 'edits' has no rows; the data has: words": lambda w: dict(data=[str(w.at / 'words.csv')]),
    "a route names the teacher 'three'; there are: base, one, two": lambda w: dict(
        routes=[dict(teacher='three', data='words')]),
    "route 'words': weight must be more than 0, not -2": lambda w: dict(
        routes=[dict(teacher='one', data='words', weight=-2)]),
    "two teachers are called 'one'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one), dict(name='one', lora=w.two)]),
    'takes a height in multiples of 4 pixels, not 26; the nearest is 2[48]': lambda w: dict(resolution=26),
    'larger than this model': lambda w: dict(resolution=4800),
    "teacher 'one' belongs to another model.*blocks.77.*no such module": lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'other', 'other'))],
        routes=[dict(teacher='one', data='words')]),
    r"teacher 'one' belongs to another model.*proj_out \(\(\d+, 999\)": lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'wide', 'wide'))],
        routes=[dict(teacher='one', data='words')]),
    r'factors without their partner: proj_out \(no B\)': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'missing', 'missing'))]),
    'keys that are no LoRA factors.*transformer.proj_out.diff': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'surplus', 'surplus'))]),
    'cut.*damaged': lambda w: dict(teachers=[dict(name='one', lora=broken_adapter(w.at / 'cut', 'cut'))]),
    'values that are not finite in: .*proj_out.lora_A': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'nan', 'nan'))]),
    'anchor_beta is set but there is no anchor': lambda w: dict(anchor_beta=0.04),
    "states is not of this method.*leave it at 'student'": lambda w: dict(method='diffusionopd', states='data'),
    'updates is not of this method.*leave it at 1 with': lambda w: dict(updates=2),
    'drop_last is not of this method': lambda w: dict(drop_last=1),
    "unknown .'guidence'.; known: name lora": lambda w: dict(teachers=[dict(name='one', guidence=2)]),
    "unknown .'wieght'.; known: teacher data": lambda w: dict(
        routes=[dict(teacher='one', data='t2i', wieght=2)]),
    "anchor: no teacher is called 'three'": lambda w: dict(anchor='three', anchor_beta=0.04),
    'group_size = 1: a prompt': lambda w: dict(method='flowopd', eta=0.7),
    "kl_var = 'code' is about an SDE's variance": lambda w: dict(method='diffusionopd', kl_var='code'),
    "dtype: 'float16' is not one of": lambda w: dict(dtype='float16'),
    'queries = 5 distinct states cannot be had from 3 steps': lambda w: dict(queries=5),
    "'one': teachers are dict": lambda w: dict(teachers=['one']),
    "'words': teachers are dict.*routes dict": lambda w: dict(routes=['words']),
    "teacher 'one': guidance must be more than 0, not '4.5'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one, guidance='4.5')]),
    'samples must be a whole number': lambda w: dict(
        routes=[dict(teacher='one', data='words', samples='8')], routes_per_step='all'),
    "teacher name 'half': .* none that torch uses": lambda w: dict(teachers=[dict(name='half', lora=w.one)]),
    r'resolution: a number, or \[height, width\]': lambda w: dict(resolution=[24.0, 24]),
    'betas: two numbers from 0 to below 1': lambda w: dict(betas=[0.9])}


@pytest.mark.parametrize('says', MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(says, world, tmp_path):
    def file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    here = SimpleNamespace(at=tmp_path, one=world.one, two=world.two, file=file)
    shutil.copy(world.at / 'words.csv', tmp_path)
    with pytest.raises(BadInput, match=says):
        train_opd.main(world.opd(tmp_path / 'out', **MISTAKES[says](here)))
    assert not (tmp_path / 'out').exists()


def test_a_mistake_is_one_line_and_exit_code_2(world, tmp_path):
    (tmp_path / 'bad.py').write_text('steps = 4\nbatch_sise = 4\n')
    for word, says in ((tmp_path / 'bad.py', 'bad.py: unknown setting batch_sise, did you mean batch_size?'),
                       ('config/nowhere.py', "no such config file: 'config/nowhere.py'")):
        p = python('train_opd.py', word, f'--out_dir={tmp_path}/out')
        assert p.returncode == 2 and says in p.stderr and p.stderr.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_another_run_is_not_written_over(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=1, steps=1, eval_samples=1)
    out = run(train_opd.main, argv)
    before = listing(out)
    with pytest.raises(BadInput, match=r'run holds another run \(at step_000001\); continue it with --init'):
        run(train_opd.main, argv)
    other = [dict(name='one', lora=world.two), dict(name='two', lora=world.two)]
    with pytest.raises(BadInput, match=f'had another teacher "one" .*{world.one}, now {world.two}'):
        run(train_opd.main, [*argv, f'--teachers={other!r}', '--init_from=resume'])
    with pytest.raises(BadInput, match='holds another adapter than these settings make: rank'):
        run(train_opd.main, [*argv, '--rank=7', '--init_from=resume'])
    with pytest.raises(BadInput, match='has alpha 8.0, not 16.0: resume with the same'):
        run(train_opd.main, [*argv, '--alpha=16.0', '--init_from=resume'])
    assert listing(out) == before
    with pytest.raises(BadInput, match='nothing has no whole checkpoint to resume from'):
        world.distil(tmp_path / 'nothing', init_from='resume')


def test_a_teacher_that_equals_the_base_is_refused(world, tmp_path):
    random_lora(tmp_path / 'null', 3, size=0.0)
    teachers = [dict(name='one', lora=world.one), dict(name='two', lora=str(tmp_path / 'null'))]
    with pytest.raises(BadInput, match="teacher 'two' has the velocity of the base: its weights do nothing"):
        world.distil(tmp_path / 'out', teachers=teachers, eval_samples=1)


def test_a_model_that_lacks_tensors_is_named(world, tmp_path):
    shutil.copytree(SHAPES / 'base', tmp_path / 'base')
    file = next((tmp_path / 'base' / 'transformer').glob('*.safetensors'))
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: x for k, x in tensors.items() if 'blocks.3.ff' not in k}, file)
    full = [dict(name='one', checkpoint=f'{tmp_path}/base')]
    for what, more in (('checkpoint', dict(teachers=full, routes=[dict(teacher='one', data='words')])),
                       ('model', dict(model=f'{tmp_path}/base'))):
        with pytest.raises(BadInput, match=f'{what} {tmp_path}/base: its weights lack .*blocks.3.ff.*again'):
            world.distil(tmp_path / what, **more)


def test_a_resume_follows_new_settings_of_the_optimizer(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=1, save_every=1, eval_samples=1)
    run(train_opd.main, argv)
    out = run(train_opd.main, [*argv, '--max_steps=2', '--weight_decay=0.5', '--betas=[0.1, 0.2]',
                               '--init_from=resume'])
    now = state(out, 2)['optimizer']['param_groups'][0]
    assert now['weight_decay'] == 0.5 and now['betas'] == (0.1, 0.2)


def test_only_what_nobody_set_goes_with_another_model(tmp_path):
    """The demonstration's held-out files and score mean nothing elsewhere, unless they are asked for."""
    own = lambda *words: checks.own_settings(train_opd.SETTINGS, words)
    assert own().score and own().eval_data
    other = own('--model=elsewhere')
    assert other.score == '' and other.eval_data == []
    assert own('--model=elsewhere', f'--score={own().score}').score == own().score
    (tmp_path / 'c.py').write_text(f'eval_data = {own().eval_data!r}')
    assert own('--model=elsewhere', f'{tmp_path}/c.py').eval_data == own().eval_data


def test_no_score_without_samples(world, tmp_path):
    out = world.distil(tmp_path / 'run', max_steps=1, score=f'{SHAPES}/world.py:score', score_samples=0)
    assert set(json.loads((out / 'result.json').read_text())['words']) == {'gap_before', 'gap_after'}


def test_a_gradient_that_is_not_finite_is_named_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_opd, 'velocity_error', lambda v, v_t: (v - v).abs().sqrt().flatten(1).sum(1))
    with pytest.raises(BadInput, match='5 updates in a row'):
        world.distil(tmp_path / 'run', max_steps=9)


FEATURES = dict(
    full_teacher=dict(teachers=[dict(name='one', checkpoint='FULL')], anchor='base',
                      anchor_beta=0.1, routes=[dict(teacher='one', data='words')]),
    noised_data=dict(states='data', query='low', data=['COUNT'],
                     routes=[dict(teacher='one', data='count')]),
    teacher_states=dict(states='teacher', routes_per_step='sample'),
    guided=dict(method='diffusionopd', student_guidance=2.0, rollout_guidance=1.5, anchor='two',
                anchor_beta=0.1,
                teachers=[dict(name='one', lora='ONE', guidance=3.0), dict(name='two', lora='TWO')]),
    sde=dict(method='diffusionopd', eta=0.7, sde='dance', kl_var='code', drop_last=1),
    k1=dict(method='flowopd', eta=0.7, group_size=4, updates=2, reward='k1', student_guidance=2.0,
            rollout_guidance=2.0, anchor='base', anchor_beta=0.1))


@pytest.mark.parametrize('name', FEATURES)
def test_forwards_are_as_many_as_the_table_says(name, world, tmp_path, monkeypatch):
    """Each way to train is run, and what it costs is counted: samples in forwards of a step."""
    if name == 'full_teacher':
        merge_lora.main([f'--adapters={world.one}', f'--into_base={SHAPES}/base', f'--out={tmp_path}/full/'])
    put = dict(FULL=f'{tmp_path}/full', ONE=world.one, TWO=world.two, COUNT=f'{SHAPES}/count.csv')
    fill = lambda x: [*map(fill, x)] if isinstance(x, list) else {k: fill(v) for k, v in x.items()} \
        if isinstance(x, dict) else put.get(x, x) if isinstance(x, str) else x
    count, velocity = [0], train_opd.Field.velocity

    def counted(self, z, sigma, cond):
        count[0] += len(z)
        return velocity(self, z, sigma, cond)
    monkeypatch.setattr(train_opd.Field, 'velocity', counted)
    seen = []
    for n in (1, 3):                                           # what evaluation and checks cost is taken off
        count[0] = 0
        argv = world.opd(tmp_path / str(n), **fill(FEATURES[name]) | dict(max_steps=n))
        run(train_opd.main, argv)
        seen.append(count[0])
    c = checks.own_settings(train_opd.SETTINGS, argv)
    table = checks.derived(c, checks.check(c, train_opd.SETTINGS[0], train_opd.METHODS, train_opd.FAMILIES),
                           train_opd.METHODS[c.method][0].__name__)
    said = float(dict(table)['forwards a step'].split(',')[0])
    exact = c.method != 'danceopd'                             # its query indices are drawn
    assert (seen[1] - seen[0]) / 2 == pytest.approx(said, rel=1e-6 if exact else 0.25)


def test_a_torn_line_in_the_log_does_not_stop_a_resume(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=2, steps=1, eval_samples=1, save_every=1)
    out = run(train_opd.main, argv)
    whole = (out / 'log.jsonl').read_text()
    (out / 'log.jsonl').write_text(whole + '{"step": 3, "lo')
    first = json.loads((out / 'result.json').read_text())
    run(train_opd.main, [*argv, '--max_steps=3', '--init_from=resume'])
    assert len(log(out, 'loss')) == 3
    last = json.loads((out / 'result.json').read_text())  # where it all began is still known
    assert [r['gap_before'] for r in last.values()] == [r['gap_before'] for r in first.values()]


def test_a_base_in_bfloat16_learns_from_a_merged_start_and_resumes(world, tmp_path):
    """As on a GPU: the base and the teachers in bfloat16, the student in float32, its start exact."""
    argv = world.opd(tmp_path / 'run', max_steps=2, save_every=1, init_from='merge', dtype='bfloat16')
    out = run(train_opd.main, argv)
    start, want = merge_lora.read_adapter(out / 'start'), merge_lora.merge(
        [merge_lora.read_adapter(p) for p in (world.one, world.two)], [0.5, 0.5])
    for k, (A, B, scale) in want.items():
        a, b, s = start[k]
        torch.testing.assert_close(s * b @ a, scale * B @ A, rtol=1e-4, atol=1e-6)
    assert all(x.dtype == torch.float32 for x in state(out, 2)['student'].values())
    resumes_exactly(train_opd.main, argv, out, 1, 2)


# ----------------------------------------------------------------------------------------------------