"""What schedulers and predictions UNets come with."""
from common import *
from pipelines import *


def test_other_schedulers_of_unets_become_ddim():
    """SD1.5's own repository ships PNDM, whose list of times repeats one: no Euler steps."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.PNDMScheduler.from_config(
        field.pipe.scheduler.config, skip_prk_steps=True
    )
    again = T.find_family('StableDiffusionPipeline')(field.pipe, 'cpu', LENGTH)
    for n in (1, 4, 20):
        s = again.sigmas(n, 64, 64)
        assert len(s) == n + 1 and (s[1:] < s[:-1]).all() and s[-1] == 0 and s[0] < 1, s
    assert again.sigmas(1000, 64, 64).isfinite().all()  # SD1.5's list of times is one beyond its table then


def test_schedulers_with_sigmas_that_are_no_euler_become_ddim_too():
    """Their states are scaled otherwise: a rollout would start almost without noise."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(field.pipe.scheduler.config)
    again = T.find_family('StableDiffusionPipeline')(field.pipe, 'cpu', LENGTH)
    eps = torch.ones(1, 4, 8, 8)
    assert type(again.pipe.scheduler) is diffusers.DDIMScheduler
    assert (again.first_state(eps, 20, 64, 64) > 0.9).all() and again.sigmas(20, 64, 64)[0] > 0.9
