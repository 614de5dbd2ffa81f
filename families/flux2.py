"""
FLUX.2, klein and dev.
"""
import copy

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from support.files import load_image
from train_opd import Field


class Flux2(Field):
    """klein: a plain flow, guidance w = g. dev: guidance is embedded (distilled_guidance). Latents
    are 2 x 2 patches of the VAE's, normalised by its batch norm; editing: a reference's tokens
    follow, with first id 10. klein-kv, which shows references another time, is no Flux2."""
    editors = 'Flux2KleinPipeline', 'Flux2Pipeline'
    blocks = 'Flux2TransformerBlock', 'Flux2SingleTransformerBlock'
    # the last is a single block's: only there it is a layer, and not a list of them
    targets = 'to_q', 'to_k', 'to_v', 'to_out.0', 'to_qkv_mlp_proj', 'attn.to_out'

    def shape(self, height, width):
        unit = self.unit(self.configs)
        return self.net.config.in_channels, height // unit, width // unit

    def sigmas(self, n, height, width):
        scheduler = copy.deepcopy(self.pipe.scheduler)
        tokens = height * width // self.unit(self.configs) ** 2
        mu = compute_empirical_mu(tokens, min(n, 200))         # beyond, its line falls below 0
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist(), mu=mu)
        return scheduler.sigmas.float().cpu()

    def encode(self, prompt, source=''):
        e, _ = self.pipe.encode_prompt([prompt], self.device, max_sequence_length=self.max_length)
        return dict(text=e[0])                                 # padded, and the padding is seen

    def norm(self):
        mean, var = self.vae.bn.running_mean.float(), self.vae.bn.running_var.float()
        return mean[:, None, None], (var + self.vae.config.batch_norm_eps).sqrt()[:, None, None]

    def encode_image(self, x):
        z = self.vae.encode(x.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        mean, std = self.norm()
        return (pixel_unshuffle(z, 2) - mean) / std

    def encode_source(self, path, height, width):
        """At most a megapixel of it, as the pipeline does."""
        x = ((load_image(path, height, width) / 2 + 0.5) * 255).round().byte()
        p, unit = self.pipe.image_processor, self.unit(self.configs)
        picture = p._resize_if_exceeds_area(Image.fromarray(x.permute(1, 2, 0).numpy()))
        w, h = (k // unit * unit for k in picture.size)
        return {'source': self.encode_image(p.preprocess(picture, h, w, resize_mode='crop'))[0]}

    def unscaled(self, z):
        mean, std = self.norm()
        return pixel_shuffle(z * std + mean, 2)

    def tokens(self, z, first):
        """(B, C, H, W) -> (B, HW, C), and their ids (first, row, column, 0)."""
        ids = torch.cartesian_prod(torch.tensor([first]), *map(torch.arange, z.shape[2:]),
                                   torch.tensor([0]))
        return z.flatten(2).mT, ids.to(self.device)

    def forward(self, z, sigma, cond):
        (x, ids), text, guidance = self.tokens(z, 0), self.stack(cond, 'text'), None
        n, words = x.shape[1], torch.arange(text.shape[1], device=self.device)[:, None]
        if 'source' in cond[0]:
            source, more = self.tokens(self.stack(cond, 'source').to(z.dtype), 10)
            x, ids = torch.cat([x, source], 1), torch.cat([ids, more])
        if self.net.config.guidance_embeds:
            guidance = torch.full_like(sigma, self.distilled_guidance)
        time = (1000 * sigma).to(self.dtype) / 1000            # rounded as by the pipeline
        out, = self.net(hidden_states=x.to(self.dtype), timestep=time,
                        guidance=guidance, encoder_hidden_states=text, img_ids=ids,
                        txt_ids=torch.nn.functional.pad(words, (3, 0)), return_dict=False)
        return out[:, :n].mT.unflatten(2, z.shape[2:])
