"""
FLUX.1 as a flow.
"""
import torch

from train_opd import SD3, Field


class Flux(Field):
    """FLUX.1 dev, schnell, and Kontext (editing: the source's tokens follow, with first id 1)."""
    editors = 'FluxKontextPipeline',
    blocks = 'FluxTransformerBlock', 'FluxSingleTransformerBlock'
    targets = SD3.targets + [f'{k}.net.{i}' for k in ('ff', 'ff_context') for i in ('0.proj', '2')]

    def encode(self, prompt, source=''):
        e, pooled, _ = self.pipe.encode_prompt([prompt], None, device=self.device,
                                               max_sequence_length=self.max_length)
        return dict(text=e[0], pooled=pooled[0])

    def tokens(self, z, first):
        """(B, C, H, W) -> (B, HW/4, 4C) by 2 x 2 patches, and their ids (first, row, column)."""
        x = torch.nn.functional.pixel_unshuffle(z, 2)          # (B, 4C, H/2, W/2)
        ids = torch.cartesian_prod(torch.tensor([first]), *map(torch.arange, x.shape[2:]))
        return x.flatten(2).mT, ids.to(z.device, self.dtype)

    def forward(self, z, sigma, cond):
        (h, w), (x, ids), text = z.shape[2:], self.tokens(z, 0), self.stack(cond, 'text')
        n, guidance = x.shape[1], None
        if 'source' in cond[0]:
            source, more = self.tokens(self.stack(cond, 'source').to(z.dtype), 1)
            x, ids = torch.cat([x, source], 1), torch.cat([ids, more])
        if self.net.config.guidance_embeds:
            guidance = torch.full_like(sigma, self.distilled_guidance)
        time = (1000 * sigma).to(self.dtype) / 1000            # rounded as by the pipeline
        out, = self.net(hidden_states=x.to(self.dtype), timestep=time,
                        guidance=guidance, encoder_hidden_states=text, img_ids=ids,
                        pooled_projections=self.stack(cond, 'pooled'),
                        txt_ids=ids.new_zeros(text.shape[1], 3), return_dict=False)
        return torch.nn.functional.pixel_shuffle(out[:, :n].mT.unflatten(2, (h // 2, w // 2)), 2)
