"""
Stable Diffusion's UNets as a flow.
"""
import copy

import torch

from configurator import need
from train_opd import Field, col


# eps - x0 from what the network says, m, of x = a x0 + b eps
def from_epsilon(m, x, a, b):
    return m - (x - b * m) / a


def from_v(m, x, a, b):
    return (a * m + b * x) - (a * x - b * m)


def from_sample(m, x, a, b):
    return (x - a * m) / b - m


VELOCITY = dict(epsilon=from_epsilon, v_prediction=from_v, sample=from_sample)


class UNet(Field):
    """SD1.x, SD2.x, SD-Turbo, SDXL, SDXL-Turbo as a flow: with a = sqrt(abar_t) and
    b = sqrt(1 - abar_t), sigma = b / (a + b) and z = x_t / (a + b). Euler in z is DDIM in x_t."""
    prefix, patch = 'unet', 1
    targets = 'to_q', 'to_k', 'to_v', 'to_out.0'
    blocks = 'BasicTransformerBlock',
    euler = 'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'DDIMScheduler'

    def __init__(self, pipe, *a, **k):
        super().__init__(pipe, *a, **k)
        edm = 'EDM' in type(pipe.scheduler).__name__ or pipe.vae.config.get('latents_mean')
        need(not edm, 'UNets of EDM, whose latents and times are others, are not known here')
        if type(pipe.scheduler).__name__ not in self.euler:    # PNDM and others: no Euler steps
            from diffusers import DDIMScheduler
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        c = pipe.scheduler.config
        kind, a = c.prediction_type, pipe.scheduler.alphas_cumprod.double().sqrt()
        need(kind in VELOCITY, f'scheduler: prediction_type {kind!r} is not known here; known are '
             f'{", ".join(VELOCITY)}')
        need(kind != 'epsilon' or not c.rescale_betas_zero_snr, 'scheduler: rescale_betas_zero_snr '
             'starts from noise alone, where prediction_type epsilon says nothing of a picture; '
             'set in scheduler_config.json what the model was trained with')
        need(c.get('final_sigmas_type', 'zero') == 'zero', 'scheduler: final_sigmas_type '
             f'{c.get("final_sigmas_type")!r} ends before the picture; set "zero" in '
             'scheduler_config.json')
        b = (1 - a ** 2).sqrt()
        self.to_velocity, self.table = VELOCITY[kind], b / (a + b)     # sigma of every t: it grows

    def schedule(self, n):
        """n + 1 sigmas, and what makes a state at the first of them of unit noise."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(n)
        if hasattr(scheduler, 'sigmas'):                       # the Euler scheduler speaks b / a
            k = scheduler.sigmas.double().cpu()
            return k / (1 + k), scheduler.init_noise_sigma / (1 + k[0])
        t = scheduler.timesteps.long().cpu()
        t = t.clamp(max=len(self.table) - 1)                   # SD1.5's can lead beyond it
        s = torch.cat([self.table[t], self.table.new_zeros(1)])
        return s, (s[0] ** 2 + (1 - s[0]) ** 2).sqrt()         # DDIM: x_T of unit variance

    def sigmas(self, n, height, width):
        return self.schedule(n)[0].float()                     # from the table's largest

    def first_state(self, eps, n, height, width):
        return eps * float(self.schedule(n)[1])

    def encode(self, prompt, source=''):
        if 'text_encoder_2' not in self.pipe.components:
            return dict(text=self.pipe.encode_prompt([prompt], self.device, 1, False)[0][0])
        e, _, pooled, _ = self.pipe.encode_prompt([prompt], device=self.device,
                                                  do_classifier_free_guidance=False)
        zero = self.pipe.config.force_zeros_for_empty_prompt   # SDXL: no words, no numbers
        keep = not zero or bool(prompt)
        return dict(text=e[0] * keep, pooled=pooled[0] * keep)

    def timestep(self, sigma):
        """sigma -> t by the table, also between its rows. Not every device has float64."""
        s, last = sigma.cpu().double(), len(self.table) - 1
        hi = torch.searchsorted(self.table, s).clamp(1, last)
        below, above = self.table[hi - 1], self.table[hi]
        t = (hi - 1 + (s - below) / (above - below)).clamp(0, last)
        return torch.where((t - t.round()).abs() < 0.02, t.round(), t).float().to(self.device)

    def forward(self, z, sigma, cond):
        b, extra = col(sigma, z), {}
        norm = (b ** 2 + (1 - b) ** 2).sqrt()
        a, b = (1 - b) / norm, b / norm
        x = z * (a + b)
        if 'pooled' in cond[0]:
            h, w = z.shape[2] * self.factor, z.shape[3] * self.factor
            ids = torch.tensor([h, w, 0, 0, h, w], device=self.device, dtype=self.dtype)
            extra['added_cond_kwargs'] = dict(text_embeds=self.stack(cond, 'pooled'),
                                              time_ids=ids.expand(len(z), 6))
        m = self.net(x.to(self.dtype), self.timestep(sigma),
                     encoder_hidden_states=self.stack(cond, 'text'), **extra).sample.float()
        return self.to_velocity(m, x, a, b)
