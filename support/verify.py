"""
Is a family what its pipeline is? The same noise, words and source picture go through our loop and
through diffusers' own pipeline, and the decoded pictures are compared, so that it does not matter
how a pipeline packs its latents. A pipeline draws its noise by `randn_tensor`, which
gives it ours; its scheduler gets no noise of its own and ends at sigma 0.
"""
import copy, inspect, math, sys, tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from support.files import load_image, one_line, open_image, save_png, to_picture
from support.processes import torch_rng

GUIDANCE = 3.0                      # ours: 1 is none
EXACT, ROUNDED = 2e-3, 0.25         # the largest difference, as a share of the pictures' range
LOW = """Where {} is used, the pipeline rounds latents and times at every step and ours does not, so
that only gross mistakes are found: a sharp answer has --dtype=float32, if need be --device=cpu."""


class Untold(Exception):
    """Why something cannot be compared."""


class Unlike(Exception):
    """Why something cannot be the same."""


def verify(pictures, models, who, sample, steps):
    """Prints the largest differences of train_opd.pictures and a verdict. -> are they the same?"""
    field, size = models.field, sample.size
    field.pipe.set_progress_bar_config(disable=True)
    print(f'{type(field).__name__} ({who}) against {type(field.pipe).__name__}: '
          f'{"%d x %d" % size} pixels, {steps} steps, {field.dtype}')
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'source.png')                # of the very size, for both
        given = sample.row['source_image']
        picture = load_image(given, *size) / 2 + 0.5 if given else scene(*size)
        save_png(to_picture(picture), path)
        tasks = {'encode and decode': partial(coded, field, path, size)}
        for kind, source in (('text', ''), ('edit', path))[:1 + field.can_edit]:
            asked = replace(sample, row={**sample.row, 'source_image': source})
            both = partial(drawn, pictures, models, who, asked, steps)
            tasks[kind] = partial(both, 1.0)
            tasks[f'{kind}, guidance {GUIDANCE:g}'] = partial(both, GUIDANCE)
        said = [told(what, compare) for what, compare in tasks.items()]
    if field.dtype != torch.float32:
        print(LOW.format(field.dtype))
    same = False not in said and True in said[1:]              # coding alone proves nothing
    print('The same.' if same else 'NOT the same.' if False in said else 'Nothing was compared.')
    return same


def told(what, compare):
    """Prints a line of the table. -> is it the same? None if that cannot be told."""
    try:
        ours, theirs, dtype = compare()
        if ours.shape != theirs.shape:
            raise Unlike(f'pictures of {[*ours.shape]}, the pipeline makes {[*theirs.shape]}')
    except Untold as e:
        return print(f'{what:18s} not verifiable: {e}')
    except Unlike as e:
        print(f'{what:18s} DIFFERENT: {e}')
        return False
    off = ((ours - theirs).abs().max() / (theirs.max() - theirs.min())).item()
    most = EXACT if dtype == torch.float32 else ROUNDED
    good = off <= most                                         # of a NaN, False
    print(f'{what:18s} {"same" if good else "DIFFERENT"}: at most {off:.1e} of the pictures\' '
          f'range ({most:g} is allowed)')
    return good


def scene(height, width):
    """A picture with colours, edges and slopes."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing='ij')
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06).float()
    return torch.stack([x, y, 0.2 + 0.6 * disc])


def coded(field, path, size):
    """There and back by the family, and by the bare VAE: the scales of latents must cancel."""
    vae = field.vae
    ours = field.decode(field.encode_image(load_image(path, *size)[None])).float().cpu()
    x = field.pipe.image_processor.preprocess(open_image(path), *size).to(field.device, vae.dtype)
    film = next(vae.parameters()).dim() == 5                   # a VAE of videos
    z = vae.encode(x[:, :, None] if film else x)
    x = vae.decode(z.latent_dist.mode() if hasattr(z, 'latent_dist') else z.latent).sample
    x = (x[:, :, 0] if film else x).float().cpu()
    return ours, (x / 2 + 0.5).clamp(0, 1), vae.dtype


def drawn(pictures, models, who, sample, n, w):
    """A picture by us and by the pipeline, and the coarsest dtype that it met."""
    field, pipe, path = models.field, models.field.pipe, sample.row['source_image']
    takes, module = inspect.signature(pipe.__call__).parameters, sys.modules[type(pipe).__module__]
    if path and 'image' not in takes:
        raise Untold(f'no pipeline edits that way, {type(pipe).__name__} takes no picture')
    if not path and field.sees_source:
        raise Untold('its words need a source picture')
    if field.net.config.get('in_channels') == 2 * (field.net.config.get('out_channels') or 0):
        raise Untold('no pipeline gives its network a source in further channels')
    with ExitStack() as changed:
        if hasattr(module, 'calculate_dimensions'):            # else sources become a megapixel
            whole = (*sample.size[::-1], None)[:len(module.calculate_dimensions(2 ** 20, 1))]
            changed.enter_context(patch.object(module, 'calculate_dimensions', lambda *a: whole))
        words = call(models, sample, n, w, takes)
        sample = replace(sample, noise=torch_rng('verify'))
        models.prompts.condition([sample])
        ours = pictures(who, [sample], models, n, w).float().cpu()
        eps = torch.randn(field.shape(*sample.size), generator=torch_rng('verify'))
        own, low = field.vae.dtype, field.dtype                # it wants one dtype; Omni, bfloat16
        low = torch.bfloat16 if path and 'Omni' in type(pipe).__name__ else low
        low = own if low == torch.float32 else low
        theirs = by_pipeline(models, who, words, eps, low)
    return ours, theirs, next((x for x in (own, low, field.dtype) if x != torch.float32), own)


def call(models, sample, n, w, takes):
    """What the pipeline is called with. How many text tokens, and which words are none, is what
    the family says to encode_prompt."""
    field, pipe, (h, wide), seen = models.field, models.field.pipe, sample.size, []
    own, path = pipe.encode_prompt, sample.row['source_image']

    def watched(*a, **k):
        seen.append({'prompt': list(a[0]) if a else None, **k})
        return own(*a, **k)
    with patch.object(pipe, 'encode_prompt', watched), models.away():
        field.encode('', path)
    told, true = seen[0] if seen else {}, 'true_cfg_scale' in takes
    words = dict(prompt=[sample.row['prompt']], num_inference_steps=n, height=h, width=wide,
                 output_type='pt', max_sequence_length=told.get('max_sequence_length'),
                 max_area=h * wide, _auto_resize=False, use_resolution_binning=False,
                 image=open_image(path) if path else None, true_cfg_scale=w,
                 negative_prompt=told.get('prompt') if true else None)
    embedded = true or field.net.config.get('guidance_embeds')
    words['guidance_scale'] = field.distilled_guidance if embedded else 0.0
    if w != 1 and not true:
        if embedded or not guides(pipe, w):
            raise Untold('its pipeline has no guidance')
        words['guidance_scale'] = w - 1 if guides(pipe, 0.5) else w    # from 0 or from 1 on
    return {k: x for k, x in words.items() if k in takes and x is not None}


def guides(pipe, scale):
    with patch.object(pipe, '_guidance_scale', scale, create=True):
        return getattr(pipe, 'do_classifier_free_guidance', scale > 1)


def calm(scheduler):
    """The same without noise of its own, and down to sigma 0, as our loop goes."""
    if 'Ancestral' in type(scheduler).__name__:
        from diffusers import EulerDiscreteScheduler
        return EulerDiscreteScheduler.from_config(scheduler.config)
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, 'final_alpha_cumprod'):
        scheduler.final_alpha_cumprod = torch.ones(())
    return scheduler


def by_pipeline(models, who, words, eps, dtype):
    """The pipeline's picture from the noise eps, its VAE in a dtype."""
    field, pipe, shapes = models.field, models.field.pipe, []
    encode, kind, own = pipe.encode_prompt, type(pipe), field.vae.dtype

    def noise(shape, generator=None, device=None, dtype=None, layout=None):
        if math.prod(shape) != eps.numel():
            raise Unlike(f'latents of {[*eps.shape]}, the pipeline has {[*shape]}')
        shapes.append(shape)
        return eps.reshape(shape).to(device, dtype)

    def encode_prompt(*a, **k):
        with models.away():                                    # the encoders' turn on the device
            return encode(*a, **k)
    module = sys.modules[kind.prepare_latents.__module__]
    with ExitStack() as changed:
        for what, name, value in (
                (module, 'randn_tensor', noise), (pipe, 'encode_prompt', encode_prompt),
                (pipe, 'scheduler', calm(pipe.scheduler)), (pipe, 'watermark', None),
                (kind, '_execution_device', field.device)):
            changed.enter_context(patch.object(what, name, value, create=name == 'watermark'))
        for m in models.layers:                                # there is no autocast to do it
            changed.enter_context(patch.object(m, 'cast_input_dtype_enabled', True))
        models.switch(who)
        if own != dtype:
            field.vae.to(dtype)
        try:
            picture = pipe(**words).images.float().cpu()
        except Unlike:
            raise
        except Exception as e:                                 # whatever a pipeline does not take
            raise Untold(f'its pipeline failed, {type(e).__name__}: {one_line(e)}') from e
        finally:
            if own != dtype:
                field.vae.to(own)
            models.switch('student')
    if not shapes:
        raise Untold('its pipeline draws its noise in a way that is not known here')
    return picture
