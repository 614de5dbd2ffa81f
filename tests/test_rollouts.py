"""Rollouts: a model's own states, those of teachers and of data, and what is drawn for people."""
from conftest import *


@pytest.fixture(scope='module')
def models(world):
    return standing([dict(name='one', lora=world.one, guidance=2.0),
                     dict(name='two', lora=world.two)], moved=0.1)


ROW = dict(prompt='a red circle on white', source_image='', target_image='')


def sample_of(number=0, row=ROW, **more):
    g = T.torch_rng('noise', number)
    return T.Sample(row, (24, 24), g, T.torch_rng('draws', number), number=number, **more)


def settings(**more):
    return SimpleNamespace(**dict(steps=4, eta=0.0, sde='flow', rollout_guidance=1.0, drop_last=0,
                                  student_guidance=1.0, micro_batch=3, queries=1) | more)


# -------------------- one step
def test_a_stochastic_step_has_the_transitions_mean_and_deviation():
    n, sigma, sigma_next = 4000, torch.tensor(0.9), torch.tensor(0.6)
    z, v = torch.full((n, 2, 1, 1), 0.3), torch.full((n, 2, 1, 1), 0.5)
    for kind, eta in (('flow', 0.7), ('dance', 0.3), ('cps', 0.5)):
        batch = [SimpleNamespace(draws=torch.Generator().manual_seed(i)) for i in range(n)]
        x = T.advance(batch, z, v, sigma, sigma_next, eta, kind)
        mean, std = T.transition(number4(0.3), number4(0.5), sigma, sigma_next, eta, kind)
        off = 4 * std.item() / (2 * n) ** 0.5
        assert x.mean().item() == pytest.approx(mean.item(), abs=off)
        assert x.std().item() == pytest.approx(std.item(), rel=0.04)
        apart = torch.corrcoef(torch.cat([x[:-1, :, 0, 0], x[1:, :, 0, 0]], 1).T) - torch.eye(4)
        assert apart.abs().max() < 0.08                        # of dimensions, of samples


# -------------------- all of them
class Straight:
    """A family whose velocity is the number 1: states are known by hand."""
    asked = field = prompts = None

    def __init__(self):
        self.asked = []
        self.field = SimpleNamespace(device='cpu', shape=lambda h, w: (1, 1, 1),
                                     first_state=lambda eps, n, h, w: eps)
        self.prompts = SimpleNamespace(condition=lambda batch: None)

    def sigmas(self, batch, n):
        return torch.linspace(1, 0, n + 1)

    def velocity(self, who, batch, z, sigma, w=1.0):
        self.asked.append((who, [s.number for s in batch], sigma.tolist(), w))
        return torch.ones_like(z)


def test_a_sample_leaves_the_rollout_at_its_last_query():
    line, queries = Straight(), [[2], [0], [1, 4], [2]]
    batch = [sample_of(i, queries=q) for i, q in enumerate(queries)]
    eps = [torch.randn(1, generator=T.torch_rng('noise', i)).item() for i in range(4)]
    c = settings(steps=5, rollout_guidance=3.0)
    found = T.student_states(batch, line, c)
    assert [(s.number, round(5 - 5 * sigma.item())) for s, _, sigma in found] == [
        (1, 0), (2, 1), (0, 2), (3, 2), (2, 4)]
    for s, z, sigma in found:                                  # a straight line from the noise
        assert z.item() == pytest.approx(eps[s.number] - (1 - sigma.item()), abs=1e-6)
    assert [numbers for _, numbers, _, _ in line.asked] == [[0, 2, 3], [0, 2, 3], [2], [2]]
    for i, (who, numbers, sigma, w) in enumerate(line.asked):
        assert who == 'student' and w == 3.0
        assert sigma == pytest.approx([1 - 0.2 * i] * len(numbers))


def test_states_come_a_forward_at_a_time(models):
    batch = [sample_of(i, queries=[0, 1, 3]) for i in range(4)]
    sizes = []
    for some, z, sigma in T.visits(batch, models, settings()):
        assert len(some) == len(z) == len(sigma) <= 3
        sizes.append(len(some))
    assert sum(sizes) == 12


def test_a_teachers_states_are_those_of_its_own_rollout(models):
    """With its own guidance; and a sample's are those of the teacher that answers for it."""
    batch = [sample_of(0, teacher='one', queries=[0, 2]), sample_of(1, teacher='two', queries=[3])]
    models.prompts.condition(batch)
    found = T.teacher_states(batch, models, settings())
    for s, k, w in ((0, 2, 2.0), (1, 3, 1.0)):
        alone = sample_of(s, queries=[k])
        models.prompts.condition([alone])
        z, sigmas = T.first_states([alone], models, 4), models.sigmas([alone], 4)
        with torch.no_grad():
            for i in range(k):
                v = models.velocity(batch[s].teacher, [alone], z, sigmas[i].expand(1), w)
                z = z + (sigmas[i + 1] - sigmas[i]) * v
        mine = next(x for t, x, sigma in found if t.number == s and sigma == sigmas[k])
        torch.testing.assert_close(mine, z[0], rtol=1e-4, atol=1e-4)
    alone = sample_of(0, queries=[0, 2])
    models.prompts.condition([alone])
    first, later = T.student_states([alone], models, settings())
    assert torch.equal(first[1], found[0][1])                  # both start from its noise
    assert found[1][0].number == 0 and (later[1] - found[1][1]).abs().max() > 0.1


def test_states_of_data_are_its_pictures_with_noise_added(models, world):
    row = rows_of(world.at / 'edits.csv')[0]
    batch = [sample_of(k, row, queries=[0, 2]) for k in range(400)]
    sigmas = models.sigmas(batch, 4)
    found = T.data_states(batch, models, settings())
    x0 = models.field.encode_image(files.load_image(row['target_image'], 24, 24)[None])[0]
    assert len(found) == 800 and {s.item() for _, _, s in found} == {1.0, sigmas[2].item()}
    z = torch.stack([z for _, z, s in found if s == sigmas[2]])
    mean, std = (1 - sigmas[2]) * x0, sigmas[2].item()
    assert (z.mean(0) - mean).abs().max() < 5 * std / 400 ** 0.5
    assert (z - mean).std().item() == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize('sde, eta', [('flow', 0.7), ('dance', 0.3), ('cps', 0.5)])
def test_a_trajectory_remembers_what_was_drawn(sde, eta, models):
    batch, c = [sample_of(i) for i in range(3)], settings(eta=eta, sde=sde, drop_last=1)
    models.prompts.condition(batch)
    t = T.trajectory(batch, models, c)
    assert t.z.shape[:2] == (4, 3) and t.v.shape[:2] == (3, 3)
    with torch.no_grad():
        for i in range(3):
            sigma, sigma_next = t.sigmas[i].expand(3), t.sigmas[i + 1].expand(3)
            v = models.velocity('student', batch, t.z[i], sigma)
            torch.testing.assert_close(v, t.v[i])
            mean, std = T.transition(t.z[i], v, T.col(sigma, v), T.col(sigma_next, v), eta,
                                     sde)
            want = Normal(mean, std).log_prob(t.z[i + 1]).flatten(1).mean(1)
            torch.testing.assert_close(t.logp[i], want)
            noise = (t.z[i + 1] - mean) / std                  # drawn, and as large as it says
            assert noise.std().item() == pytest.approx(1, abs=0.1)
    each = torch.tensor([2, 0, 1])                             # a step of each sample's own
    z, sigma, sigma_next, z_next = T.at_step(t, each)
    for j, i in enumerate(each):
        assert torch.equal(z[j], t.z[i, j]) and torch.equal(z_next[j], t.z[i + 1, j])
        assert sigma[j] == t.sigmas[i] and sigma_next[j] == t.sigmas[i + 1]


# -------------------- who is asked
def test_guidance_is_the_line_through_both_velocities(models):
    batch = [sample_of(i) for i in range(2)]
    models.prompts.condition(batch)
    z, sigma = torch.randn(2, *models.field.shape(24, 24)), torch.tensor([0.8, 0.3])
    nothing = [SimpleNamespace(cond=s.empty) for s in batch]
    with torch.no_grad():
        models.spent = 0
        v, empty = (models.velocity('one', b, z, sigma) for b in (batch, nothing))
        assert models.spent == 4
        guided = models.velocity('one', batch, z, sigma, 2.5)
        assert models.spent == 8                               # twice the forwards, counted
    torch.testing.assert_close(guided, empty + 2.5 * (v - empty), rtol=1e-4, atol=1e-4)
    models.spent = 0
    models.velocity('student', batch, z, sigma)
    assert models.spent == 2 * 3                               # with gradient three


def test_soft_targets_are_the_teachers_mean_by_their_weights(models):
    batch = [sample_of(0, teacher='one'), sample_of(1, teacher='two')]
    models.prompts.condition(batch)
    z, sigma = torch.randn(2, *models.field.shape(24, 24)), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        one = models.velocity('one', batch, z, sigma, 2.0)
        two = models.velocity('two', batch, z, sigma)
    hard = models.target(batch, z, sigma)
    torch.testing.assert_close(hard, torch.stack([one[0], two[1]]), rtol=1e-4, atol=1e-4)
    soft = copy.copy(models)
    soft.mixing = 'soft'
    soft.teachers = {k: dict(t, weight=w) for (k, t), w in zip(models.teachers.items(), (3.0, 1.0))}
    target = soft.target(batch, z, sigma)
    torch.testing.assert_close(target, 0.75 * one + 0.25 * two, rtol=1e-4, atol=1e-4)


def test_the_base_is_drawn_with_the_students_guidance_and_a_teacher_with_its_own(models):
    asked, velocity = [], models.velocity
    watched = copy.copy(models)
    watched.teachers = dict(models.teachers, base=dict(name='base', guidance=4.0))
    watched.velocity = lambda who, *a, w=1.0: asked.append((who, w)) or velocity(who, *a, w=w)
    c, route = settings(seed=0, sample_steps=1, rollout_guidance=1.5), dict(size=(24, 24), data='x')
    for who, own in (('base', False), ('base', True), ('one', True), ('two', True),
                     ('one', False), ('student', False)):
        T.render(who, route, [ROW] * 2, watched, c, ALONE, own=own)
    assert asked == [('base', 1.5), ('base', 4.0), ('one', 2.0), ('two', 1.0), ('one', 1.5),
                     ('student', 1.5)]


def test_pictures_are_the_same_in_any_number_of_processes(models, monkeypatch):
    rows = [dict(ROW, prompt=f'a {c} circle on white') for c in ('red', 'green', 'blue', 'red')]
    rows[3] = dict(ROW, source_image=rows_of(SHAPES / 'local_edit.csv')[0]['source_image'])
    c, route = settings(seed=0, sample_steps=2), dict(size=(24, 24), data='x')
    whole = T.render('one', route, rows, models, c, ALONE)
    sent = []
    monkeypatch.setattr(T, 'gather', lambda world, x: sent.append(x) or x)
    for rank in range(2):
        T.render('one', route, rows, models, c, SimpleNamespace(rank=rank, size=2))
    assert [[i for i, _ in x] for x in sent] == [[0, 2], [1, 3]]
    for i, x in sum(sent, []):
        torch.testing.assert_close(x, whole[i], rtol=0, atol=1e-4)
        assert x.untyped_storage().nbytes() == x.nbytes        # nothing else is sent with it


def test_the_gap_is_spread_over_the_steps_that_are_learned_from(models):
    asked, watched = [], copy.copy(models)
    watched.target = lambda b, z, s: asked.extend(s.tolist()) or models.target(b, z, s)
    route = dict(data='x', size=(24, 24), teacher='one')
    T.mean_gap(route, [ROW] * 8, watched, settings(seed=0, steps=5, drop_last=1), ALONE)
    assert sorted(asked) == sorted(2 * models.sigmas([sample_of()], 5)[:4].tolist())
