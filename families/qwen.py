"""
Qwen-Image. Its edit models are in qwen_edit.py.
"""
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.nn.utils.rnn import pad_sequence

from configurator import need
from train_opd import Field


class Qwen(Field):
    """Qwen-Image. Guidance is w = true_cfg_scale, rescaled to the length of each token's velocity
    with the words. The VAE is one of videos: a picture is one frame."""
    blocks = 'QwenImageTransformerBlock',
    targets = 'to_q', 'to_k', 'to_v', 'to_out.0'               # of the picture: all of it is used

    def __init__(self, pipe, *a, **k):                         # this VAE's word for its levels
        pipe.vae.register_to_config(block_out_channels=pipe.vae.config.dim_mult)
        super().__init__(pipe, *a, **k)

    @classmethod
    def unit(cls, configs):
        vae = configs.get('vae', {})
        return 2 ** (len(vae['dim_mult']) - 1 if vae else 3) * cls.patch

    @classmethod
    def largest(cls, configs, editing):
        """Half of a side and then the words, 1024 and a source's 1500, have 4096 positions."""
        most = 2 * (4096 - 1024 - 1500 * editing) * cls.unit(configs)
        return most, most

    def sigmas(self, n, height, width):
        s = super().sigmas(n, height, width)
        need(s.isfinite().all(), f'{n} step: a schedule with shift_terminal has at least 2 steps')
        return s

    def shape(self, height, width):
        return self.vae.config.z_dim, height // self.factor, width // self.factor

    def encode(self, prompt, source=''):
        e, _ = self.pipe.encode_prompt([prompt or ' '], device=self.device,
                                       max_sequence_length=min(self.max_length, 1024))
        return dict(text=e[0])                                 # (T, D): each prompt has its own T

    def norm(self):
        c = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std])
        return c[:, :, None, None].to(self.device)

    def encode_image(self, x):
        mean, std = self.norm()
        z = self.vae.encode(x[:, :, None].to(self.device, self.vae.dtype)).latent_dist.mode()
        return (z[:, :, 0].float() - mean) / std

    def unscaled(self, z):
        mean, std = self.norm()
        return (z * std + mean)[:, :, None]

    def forward(self, z, sigma, cond):
        x, text = pixel_unshuffle(z, 2), [c['text'].to(self.device, self.dtype) for c in cond]
        h, w = x.shape[2:]
        x, shapes, mask = x.flatten(2).mT, [(1, h, w)], None
        if 'source' in cond[0]:
            source = pixel_unshuffle(self.stack(cond, 'source').to(z.dtype), 2).flatten(2).mT
            x, shapes = torch.cat([x, source], 1), shapes * 2
        if len({len(t) for t in text}) > 1:
            mask = pad_sequence([torch.ones_like(t[:, 0]).long() for t in text], True)
        time = (1000 * sigma).to(self.dtype) / 1000            # rounded as by the pipeline
        out, = self.net(hidden_states=x.to(self.dtype), timestep=time,
                        encoder_hidden_states=pad_sequence(text, True), return_dict=False,
                        encoder_hidden_states_mask=mask, img_shapes=[shapes] * len(z))
        return pixel_shuffle(out[:, :h * w].mT.unflatten(2, (h, w)), 2)

    def guide(self, v, v_empty, w):
        both = pixel_unshuffle(super().guide(v, v_empty, w), 2)
        length = pixel_unshuffle(v, 2).norm(dim=1, keepdim=True)
        return pixel_shuffle(both * (length / both.norm(dim=1, keepdim=True)), 2)
