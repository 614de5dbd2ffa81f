"""
Stable Diffusion's UNets as a flow.
"""
import copy

import torch

from train_opd import Field, col


class UNet(Field):
    """SD1.x, SD-Turbo, SDXL, SDXL-Turbo with epsilon or v prediction, as a flow: with
    a = sqrt(abar_t) and b = sqrt(1 - abar_t), sigma = b / (a + b) and z = x_t / (a + b). Euler in z
    is DDIM in x_t."""
    prefix, patch = 'unet', 1
    targets = 'to_q', 'to_k', 'to_v', 'to_out.0'
    blocks = 'BasicTransformerBlock',
    euler = 'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'DDIMScheduler'

    def __init__(self, pipe, *a, **k):
        super().__init__(pipe, *a, **k)
        if type(pipe.scheduler).__name__ not in self.euler:    # PNDM and others: no Euler steps
            from diffusers import DDIMScheduler
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        abar = pipe.scheduler.alphas_cumprod.double()
        self.noise = ((1 - abar) / abar).sqrt()                # b / a of every t: grows with t

    def schedule(self, n):
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(n)
        if hasattr(scheduler, 'sigmas'):                       # the Euler scheduler speaks b / a
            return scheduler.sigmas.double().cpu(), scheduler.init_noise_sigma
        t = scheduler.timesteps.long().cpu().clamp(max=len(self.noise) - 1)    # SD1.5's can lead beyond
        k = torch.cat([self.noise[t], self.noise.new_zeros(1)])
        return k, (k[0] ** 2 + 1).sqrt()                       # DDIM: x_T of unit variance

    def sigmas(self, n, height, width):
        k, _ = self.schedule(n)
        return (k / (1 + k)).float()                           # from the table's largest, not 1

    def first_state(self, eps, n, height, width):
        k, scale = self.schedule(n)
        return eps * float(scale / (1 + k[0]))

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
        k, last = sigma.cpu().double(), len(self.noise) - 1
        k = k / (1 - k)
        hi = torch.searchsorted(self.noise, k).clamp(1, last)
        below, above = self.noise[hi - 1], self.noise[hi]
        t = (hi - 1 + (k - below) / (above - below)).clamp(0, last)
        return torch.where((t - t.round()).abs() < 0.02, t.round(), t).float().to(self.device)

    def forward(self, z, sigma, cond):
        b, extra = col(sigma), {}
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
        if self.pipe.scheduler.config.prediction_type == 'v_prediction':
            return (a * m + b * x) - (a * x - b * m)           # eps - x0
        return m - (x - b * m) / a
