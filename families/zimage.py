"""
Z-Image as a flow.
"""
import math

import torch

from support.files import load_image, to_picture
from train_opd import Field


class ZImage(Field):
    """Z-Image, -Turbo and -Omni (editing). Time runs backwards, the output is negated, captions are
    ragged. The pipeline's guidance g is c + g (c - u); here as everywhere it is w = g + 1."""
    editors, blocks = ('ZImageOmniPipeline',), ('ZImageTransformerBlock',)
    targets = ['to_q', 'to_k', 'to_v', 'to_out.0']

    @classmethod
    def largest(cls, configs, editing):
        _, h, w = configs.get('transformer', {}).get('axes_lens', [math.inf] * 3)
        return h * cls.unit(configs), w * cls.unit(configs)

    def encode(self, prompt, source=''):
        k = dict(num_condition_images=int(bool(source))) if self.can_edit else {}
        es, _ = self.pipe.encode_prompt(
            [prompt], device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_length, **k)
        return dict(text=es[0])

    def encode_source(self, path, height, width):
        x = load_image(path, height, width)
        picture = to_picture(x / 2 + 0.5)
        seen = self.pipe.prepare_siglip_embeds([picture], 1, self.device, torch.float32)
        return {'source': self.encode_image(x[None])[0], 'seen': seen[0][0]}

    def forward(self, z, sigma, cond):
        def to(x):
            return x.to(self.device, self.dtype)
        t, x = (1000 - 1000 * sigma) / 1000, [to(a)[:, None] for a in z]
        if not self.can_edit:
            out, = self.net(x, t=t, cap_feats=[to(c['text']) for c in cond], return_dict=False)
        else:
            sources = [[to(c['source'])[:, None]] if 'source' in c else [] for c in cond]
            out, = self.net(
                x=[s + [a] for s, a in zip(sources, x)], t=t, return_dict=False,
                cap_feats=[[to(p) for p in c['text']] for c in cond],
                siglip_feats=[[to(c['seen']), None] if 'seen' in c else None for c in cond],
                image_noise_mask=[[0] * len(s) + [1] for s in sources])
        return -torch.stack(list(out)).squeeze(2)
