"""The flow: one step of a sampler as a Gaussian, and the KL of two such steps."""
from conftest import *

# Computed with four published implementations; cps is Flow-CPS, ode takes no noise.
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
    ('ode', 0.0, 0.7072785, 0.6021506,
     [2.887452, -0.592193, 0.7641], [1.563096, 0.133333, 0.253118],
     [2.723127, -0.60621, 0.73749], 0.0)]


@pytest.mark.parametrize('kind, eta, sigma, sigma_next, z, v, mean, std', GOLDEN)
def test_transition_is_that_of_the_published_code(kind, eta, sigma, sigma_next, z, v, mean, std):
    z, v = (torch.tensor(x).view(1, -1, 1, 1) for x in (z, v))
    m, s = T.transition(z, v, number4(sigma), number4(sigma_next), eta, kind)
    assert m.flatten().tolist() == pytest.approx(mean, abs=1e-5)
    assert s.item() == pytest.approx(std, abs=1e-5)


def test_an_sde_that_nobody_knows_is_no_other():
    x = number4(0.5)
    with pytest.raises(KeyError):
        T.transition(x, x, x, 0.5 * x, 0.7, 'folw')


def test_log_prob_is_the_mean_over_dimensions():
    x, mean, std = *torch.randn(2, 3, 2, 4, 4), torch.rand(3, 1, 1, 1) + 0.1
    want = Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(T.log_prob(x, mean, std), want)


@pytest.mark.parametrize('kind, eta', [('flow', 0.7), ('dance', 0.3), ('cps', 0.7)])
@pytest.mark.parametrize('sigma, sigma_next', [(1.0, 0.9), (0.6, 0.2)])
def test_the_weighted_error_is_the_kl_of_two_gaussians(kind, eta, sigma, sigma_next):
    z, v, v_t = torch.randn(3, 4, 2, 2, 2)
    s, t = torch.full((4,), sigma), torch.full((4,), sigma_next)

    def step(x):
        mean, std = T.transition(z, x, T.col(s, z), T.col(t, z), eta, kind)
        return Normal(*torch.broadcast_tensors(mean, std))
    want = kl_divergence(step(v), step(v_t)).flatten(1).mean(1)
    for var, factor in (('true', 1), ('code', s - t)):
        loss = T.kl_weight(s, t, eta, kind, var) * T.velocity_error(v, v_t)
        torch.testing.assert_close(loss, want * factor, rtol=1e-4, atol=1e-6)


def test_the_odes_weight_is_the_limit_of_the_kl_times_the_variance():
    s, t = torch.tensor([1.0, 0.7]), torch.tensor([0.8, 0.1])
    ode = T.kl_weight(s, t)
    torch.testing.assert_close(ode, (s - t) ** 2 / 2)
    for kind in ('flow', 'dance'):
        _, std = T.transition(s, s, s, t, 1e-3, kind)
        kl = T.kl_weight(s, t, 1e-3, kind)
        torch.testing.assert_close(kl * std ** 2, ode, rtol=1e-3, atol=0)


def test_the_gap_is_relative_and_the_error_a_mean():
    v, v_t = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 2.0)
    v_t[1] = 0.0
    assert T.velocity_error(v, v_t).tolist() == [1.0, 9.0]
    gap = T.relative_gap(v, v_t)
    assert gap[0].item() == 0.5 and gap[1] > 1e9 and gap.isfinite().all()
