"""Flow-OPD: what each reward estimates and at which scale; advantages in groups; PPO's clip."""
from conftest import *

STEPS, ETA = 10, 0.7


def settings(**more):
    return SimpleNamespace(**dict(
        eta=ETA, sde='flow', kl_var='true', reward='k1', group_size=1, updates=1, clip_range=1e-4,
        adv_clip=1000.0, anchor='', anchor_beta=0.0, student_guidance=1.0) | more)


class Line:
    """A student that has one number theta: its velocity is theta h(z) u, its teacher's h(z) u, its
    anchor's nothing. u has D numbers, mean square 1. `bent`: h depends on the state."""
    teachers = {}

    def __init__(self, D, theta, bent=0.0):
        g, t = torch.Generator().manual_seed(0), torch.linspace(1, 0, STEPS + 1).double()
        self.D, self.bent, self.sigmas = D, bent, 3 * t / (1 + 2 * t)  # shift 3
        u = torch.randn(1, 1, 1, D, generator=g, dtype=torch.float64)
        self.u = u / u.square().mean().sqrt()
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def velocity(self, who, batch, z, sigma, w=1.0):
        along = (z * self.u).sum(3, keepdim=True) / self.D ** 0.5
        c = dict(student=self.theta, teacher=1.0, near=0.0)[who]
        return c * (1 + self.bent * along.tanh()) * self.u + 0 * z

    def target(self, batch, z, sigma):
        return self.velocity('teacher', batch, z, sigma)

    def kl(self):
        """By hand, at every step: mean (d mean)^2 / (2 std^2)."""
        s, t = self.sigmas[:-1], self.sigmas[1:]
        g = ETA * (s / (1 - torch.where(s >= 1, t, s))).sqrt()
        slope = (s - t) * (1 + g ** 2 * (1 - s) / (2 * s))             # of the mean, by v
        return slope ** 2 / (2 * g ** 2 * (s - t)) * (self.theta.item() - 1) ** 2


def evenly(n, g):
    """n normal numbers at their quantiles, in any order: what their squares sum to is no chance."""
    x = Normal(0.0, 1.0).icdf((torch.arange(n).double() + 0.5) / n)
    return (x / x.square().mean().sqrt())[torch.randperm(n, generator=g)]


@torch.no_grad()
def draw(line, n, seed=0, even=False):
    """A trajectory of n samples, as train_opd draws it, but in float64."""
    g, c = torch.Generator().manual_seed(seed), settings()
    noise = torch.randn(STEPS + 1, n, 1, 1, line.D, generator=g, dtype=torch.float64)
    if even:                                                   # along u, where theta goes
        along = (noise * line.u).mean(4, keepdim=True)
        exact = torch.stack([evenly(n, g) for _ in noise]).view(along.shape) / line.D ** 0.5
        noise += (exact - along) * line.u
    t = SimpleNamespace(batch=range(n), sigmas=line.sigmas, v=[], z=[noise[0]])
    for i in range(STEPS):
        t.v.append(line.velocity('student', None, t.z[i], None))
        mean, std = T.transition(t.z[i], t.v[i], t.sigmas[i], t.sigmas[i + 1], ETA)
        t.z.append(mean + std * noise[i + 1])
    t.z, t.v = torch.stack(t.z), torch.stack(t.v)
    t.logp = torch.stack([T.log_prob(*T.action(t, i, c, v)) for i, v in enumerate(t.v)])
    return t


def gradients(line, t, c, monkeypatch):
    """d loss / d theta of each step (its mean over the samples), and the terms' numbers."""
    monkeypatch.setattr(T, 'trajectories', lambda samples, models, c: [[t]])
    terms = [term for terms in T.METHODS['flowopd'].updates([], line, c) for term in terms]
    found = [torch.autograd.grad(term.loss.mean() * STEPS, line.theta)[0] for term in terms]
    assert all(term.numbers['ratio_off'].max() < 1e-9 for term in terms)
    return torch.stack(found), [term.numbers for term in terms]


HELD = dict(anchor='near', anchor_beta=0.04)


@pytest.mark.parametrize('anchor', [{}, HELD], ids=['free', 'held'])
@pytest.mark.parametrize('D', [64, 1024, 16384])
def test_k1s_mean_gradient_is_the_kls_at_every_step(D, anchor, monkeypatch):
    line = Line(D, theta=0.9)
    found, numbers = gradients(line, draw(line, 64, even=True), settings(**anchor), monkeypatch)
    pull = (0.9 - 1) + (0.04 * 0.9 if anchor else 0)           # w (theta - 1)^2 + beta w theta^2
    want = 2 * line.kl() / (0.9 - 1) ** 2 * pull
    assert (found / want - 1).abs().max() < 0.03, found / want
    for n, kl in zip(numbers, line.kl()):
        assert n['loss'].tolist() == pytest.approx([kl.item()] * 64)
        assert n['flat'].sum() == 0                            # the clip does not bind either


def test_k1_by_chance_alone(monkeypatch):
    line = Line(16, theta=0.5)
    found, _ = gradients(line, draw(line, 40000), settings(), monkeypatch)
    want = -2 * line.kl() / 0.5                                # chance: sqrt(2 / 40000) = .7 %
    assert (found / want - 1).abs().max() < 0.03, found / want


@pytest.mark.parametrize('reward, ends', [('k1', True), ('code', True), ('k1_group', False)])
def test_with_an_anchor_it_ends_where_the_closed_form_does(reward, ends, monkeypatch):
    line, c = Line(4096, theta=0.0), settings(**HELD, reward=reward, group_size=16)
    rate = 0.3 / (2 * line.kl().mean().item())                 # theta starts with a KL of w
    for step in range(20):
        found, _ = gradients(line, draw(line, 16, seed=step), c, monkeypatch)
        line.theta.data -= rate * found.mean()
    assert (abs(line.theta.item() * 1.04 - 1) < 0.03) == ends, line.theta


def test_k1_groups_scale_is_that_of_its_spread(monkeypatch):
    """1 / sqrt(2 D KL): another at each step and each size."""
    for D in (64, 1024):
        line = Line(D, theta=0.9)
        c = settings(reward='k1_group', group_size=256)
        found, _ = gradients(line, draw(line, 256, even=True), c, monkeypatch)
        want = 2 * line.kl() / (0.9 - 1) / (2 * D * line.kl()).sqrt()
        assert (found / want - 1).abs().max() < 0.03, found / want


def each_gradient(line, reward, group, monkeypatch, n=8000):
    """(steps, samples) of d loss / d theta."""
    t, c = draw(line, n), settings(reward=reward, group_size=group)
    theta, line.theta = line.theta, line.theta.detach().expand(n, 1, 1, 1).clone().requires_grad_()
    monkeypatch.setattr(T, 'trajectories', lambda samples, models, c: [[t]])
    found = [torch.autograd.grad(term.loss.sum() * STEPS, line.theta)[0].flatten()
             for terms in T.METHODS['flowopd'].updates([], line, c) for term in terms]
    line.theta = theta
    return torch.stack(found)


def z_scores(x):
    return x.mean(1).abs() / (x.std(1) / x.shape[1] ** 0.5)


def test_as_the_paper_writes_it_its_gradient_has_mean_zero(monkeypatch):
    """The KL's differs from state to state here, so its advantages are not zero."""
    line = Line(16, theta=0.5, bent=0.5)
    paper = each_gradient(line, 'paper', 16, monkeypatch)
    assert paper.std(1).min() > 0 and z_scores(paper).max() < 4
    assert z_scores(each_gradient(line, 'k1', 1, monkeypatch)).min() > 20
    straight = each_gradient(Line(16, theta=0.5), 'paper', 16, monkeypatch)
    assert (straight == 0).all()                               # alike within a group


def test_as_released_the_kl_keeps_its_gradient(monkeypatch):
    """grad KL(s) + KL(s) grad log p: the second has mean zero."""
    line = Line(16, theta=0.5)
    found = each_gradient(line, 'code', 1, monkeypatch)
    want = -2 * line.kl() / 0.5
    assert ((found.mean(1) - want).abs() < 4 * found.std(1) / 8000 ** 0.5).all()
    t = draw(line, 8000)
    for i in range(STEPS):
        mean, std = T.transition(t.z[i], t.v[i], t.sigmas[i], t.sigmas[i + 1], ETA)
        slope, _ = T.transition(0 * number4(0.0), number4(1.0), t.sigmas[i], t.sigmas[i + 1], ETA)
        score = ((t.z[i + 1] - mean) / std ** 2 * slope * line.u).flatten(1).mean(1)
        torch.testing.assert_close(found[i], want[i] + line.kl()[i] * score, rtol=1e-5, atol=1e-7)


def test_log_ratio_is_what_its_name_says():
    torch.manual_seed(0)
    drawn, mean_teacher, mean = torch.randn(3, 5, 4, 6, 6, dtype=torch.float64)
    std = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    kl = kl_divergence(Normal(mean, std), Normal(mean_teacher, std)).flatten(1).mean(1)
    ratio = T.log_prob(drawn, mean_teacher, std) - T.log_prob(drawn, mean, std)
    found = T.log_ratio(drawn, mean_teacher, mean, std, kl)
    torch.testing.assert_close(found, 4 * 6 * 6 * (ratio + kl), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('rms', [0.003, 0.3])
def test_the_default_clip_of_advantages_does_not_bind_at_512_pixels(rms, monkeypatch):
    """16 x 64 x 64 numbers; the advantages' spread is that of a normal, sqrt(2 D KL)."""
    clip = T.SETTINGS[0]['adv_clip']
    line = Line(16 * 64 * 64, theta=1 - rms)
    assert 4 * (2 * line.D * line.kl()).sqrt().max() < clip


# -------------------- advantages
def test_group_advantage():
    r = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 0.0, 9.0])
    root = 3 ** 0.5
    want = [-1, 0, 1, 0, 0, 0, -1 / root, -1 / root, 2 / root]
    assert T.group_advantage(r, 3).tolist() == pytest.approx(want, abs=1e-5)
    want = (r.view(3, 3) - r.view(3, 3).mean(1, keepdim=True)).flatten() / r.std()
    torch.testing.assert_close(T.group_advantage(r, 3, std=r.std()), want)


@pytest.mark.parametrize('scale', [1e-30, 1e-8, 1.0, 1e8])
def test_advantages_know_no_scale(scale):
    torch.manual_seed(0)
    a = T.group_advantage(scale * torch.randn(8, 16).flatten(), 16).view(8, 16)
    assert a.std(1).tolist() == pytest.approx([1] * 8, rel=1e-4)
    assert a.mean(1).tolist() == pytest.approx([0] * 8, abs=1e-5)
    equal = torch.full((16,), 0.1 * scale)
    assert (T.group_advantage(equal, 16) == 0).all()
    equal[3] *= 1 + 2e-7                                       # one rounding of float32
    assert (T.group_advantage(equal, 16) == 0).all() and not equal.unique().numel() == 1


def test_groups_without_a_difference_are_logged_as_flat(world, tmp_path):
    """The base as a teacher is where the student starts: nothing to compare, in any group."""
    words = dict(method='flowopd', eta=0.7, group_size=4, reward='k1_group', max_steps=1)
    for name, flat in (('base', 1), ('one', 0)):
        out = world.distil(tmp_path / name, **words, routes=[dict(teacher=name, data='words')])
        assert log(out, 'flat') == [flat] and log(out, 'idle') == [flat]


def test_ppo_loss_is_clipped_both_ways():
    logp = torch.tensor([1.1, 1.1, 0.9, 0.9]).log().requires_grad_()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    loss, numbers = T.ppo_loss(logp, torch.zeros(4), advantage, 0.05)
    off = numbers['ratio_off']
    assert off.tolist() == pytest.approx([0.1] * 4) and not off.requires_grad
    assert numbers['clipped'].tolist() == [1.0] * 4
    assert loss.tolist() == pytest.approx([-2.1, 2.2, -1.8, 1.9])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, 2.2, -1.8, 0])      # what is clipped has none
