"""What schedulers and predictions UNets come with."""
from conftest import *
from pipelines import *

OTHERS = dict(
    PNDM=dict(skip_prk_steps=True),                            # SD1.5's own: it has one time twice
    DPMSolverMultistep={})                                     # it has sigmas, of another scale


def reopened(name, scheduler, **config):
    """A family's field on a pipeline with another scheduler."""
    pipe = build(name).pipe
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    return T.find_family('StableDiffusionPipeline')(pipe, 'cpu', LENGTH)


@pytest.mark.parametrize('kind', OTHERS)
def test_schedulers_that_are_no_euler_become_ddim(kind):
    field = reopened('sd15', getattr(diffusers, kind + 'Scheduler'), **OTHERS[kind])
    assert type(field.pipe.scheduler) is diffusers.DDIMScheduler
    for n in (1, 4, 20):
        s = field.sigmas(n, 64, 64)
        assert len(s) == n + 1 and (s[1:] < s[:-1]).all() and s[-1] == 0 and s[0] < 1, s
    assert field.sigmas(1000, 64, 64).isfinite().all()         # SD1.5's times begin at t = 1000
    eps = torch.ones(1, 4, 8, 8)                               # a rollout starts with all its noise
    assert (field.first_state(eps, 20, 64, 64) > 0.9).all() and field.sigmas(20, 64, 64)[0] > 0.9


@torch.no_grad()
def test_without_a_signal_a_rollout_starts_from_noise_alone():
    field, eps = shared('sd15-zero'), noise(shared('sd15-zero'), 1, SIZES[0])
    assert field.sigmas(4, *SIZES[0])[0] == 1
    assert torch.equal(field.first_state(eps, 4, *SIZES[0]), eps)
    assert field.timestep(torch.tensor([1.0])) == 999
    cond, _ = conditions(field, WORDS[:1])
    m = field.net(eps, 999, encoder_hidden_states=field.stack(cond, 'text')).sample
    assert off(field.velocity(eps, torch.ones(1), cond), eps + m) < 1e-6     # x0 = -m


def test_times_are_found_again_by_their_sigmas():
    for name in UNETS:
        field, rows = shared(name), torch.tensor([0, 1, 250, 500, 998, 999])
        assert torch.equal(field.timestep(field.table[rows].float()), rows.float())
        between = field.timestep(field.table[[500, 501]].float().mean()[None])
        assert 500.4 < between < 500.6


@pytest.mark.parametrize('scheduler', [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_predictions_that_are_not_known_or_say_nothing_are_refused(scheduler):
    with pytest.raises(BadInput, match="'flow' is not known here; known are epsilon, v_pred"):
        reopened('sd15', scheduler, prediction_type='flow')
    with pytest.raises(BadInput, match='rescale_betas_zero_snr .* prediction_type epsilon'):
        reopened('sd15', scheduler, rescale_betas_zero_snr=True)
