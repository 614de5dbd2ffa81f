"""
The tests: real classes, tiny weights, no downloads.   python -m pytest -q test_smoke.py
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
sys.path[:0] = [str(ROOT), str(ROOT / 'data' / 'shapes')]

import base64, copy, csv, functools, http.server, io, json, math, random, re, shutil
import signal, socket, subprocess, tempfile, textwrap, threading, time, types, urllib.error, urllib.request
import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from types import SimpleNamespace
import files
import merge_lora
import rewards
import sample
import train_opd
import train_opd as T
import train_teacher
import world as shapes
from configurator import BadInput, collect, configure
from files import read_data
from rewards import RewardError, checked, from_file, load, remote

torch.set_num_threads(1)


def rows_of(path):
    return [b[i] for b in read_data([path])[0].values() for i in range(len(b))]


# ------------------------------------------------------------------------------------------------------------
# The world of shapes: its scorer, its rewards, its words

@functools.cache
def drawn(bucket, n=200):
    """n examples of a bucket: (rows with their source pictures, right pictures)."""
    folder, r, rows, pictures = Path(tempfile.mkdtemp()), random.Random(bucket), [], []
    for i in range(n):
        prompt, scene, picture = shapes.make_row(bucket, r, hold=bool(i % 2))
        rows.append(dict(prompt=prompt, source_image=''))
        if scene:
            rows[-1]['source_image'] = str(folder / f'{i}.png')
            shapes.to_pil(shapes.draw(scene)).save(folder / f'{i}.png')
        pictures.append(picture)
    return rows, torch.stack(pictures)


def right(images, rows):
    return sum(s['right'] for s in shapes.score(images, rows)) / len(rows)


def test_score_accepts_drawn_truth_also_under_noise():
    g = torch.Generator().manual_seed(0)
    clean, noisy = [], []
    for b in shapes.BUCKETS:                                            # a thousand scenes in all
        rows, x = drawn(b)
        clean.append(right(x, rows))
        noisy.append(right(x + torch.randn(x.shape, generator=g) * 12 / 255, rows))
    assert sum(clean) / 5 >= 0.995 and sum(noisy) / 5 >= 0.995, (clean, noisy)


def spoiled(scene, r):
    """A scene with one thing wrong: colour, shape, place, one more, one less, or the background."""
    background, cells = scene[0], list(scene[1])
    full, free = [i for i, c in enumerate(cells) if c], [i for i, c in enumerate(cells) if not c]
    what = r.choice(['colour', 'shape', 'background'] + ['place', 'more'] * bool(free) + ['less'])
    i = r.choice(full)
    shape, colour = cells[i]
    if what == 'colour':
        cells[i] = shape, r.choice([c for c in shapes.COLOURS if c != colour])
    elif what == 'shape':
        cells[i] = r.choice([s for s in shapes.SHAPES if s != shape]), colour
    elif what == 'place':
        cells[r.choice(free)], cells[i] = cells[i], None
    elif what == 'more':
        cells[r.choice(free)] = r.choice(shapes.PAIRS)
    elif what == 'less':
        cells[i] = None
    else:
        background = r.choice([b for b in shapes.BACKGROUNDS if b != background])
    return (background, tuple(cells)), what


def test_score_refuses_wrong_pictures():
    r, g, wrong, total = random.Random(1), torch.Generator().manual_seed(1), 0, 0
    for bucket in ('t2i', 'count', 'local_edit', 'global_edit'):
        rows, x = drawn(bucket)
        for row, picture in zip(rows, x):
            negative = 'negative' in row['prompt'] or 'invert' in row['prompt']
            scene = shapes.read((1 - picture if negative else picture)[None])[0]
            if not any(scene[1]):
                continue  # everything was removed: nothing to spoil
            bad, what = spoiled(scene, r)
            if bucket == 'count' and what == 'place':
                continue                                               # a count does not say where
            bad = shapes.draw(bad)
            bad = 1 - bad if negative else bad
            bad = bad + torch.randn(bad.shape, generator=g) * 12 / 255 * (total % 2)
            wrong, total = wrong + 1 - right(bad[None], [row]), total + 1
            if row['source_image']:                                    # the edit not made
                wrong, total = wrong + 1 - right(shapes.load(row['source_image'])[None], [row]), total + 1
    assert total >= 1000 and wrong / total >= 0.99, (wrong, total)


def test_score_sees_the_wrong_object_edited_and_what_changed_besides(tmp_path):
    scene = 'white', (('circle', 'red'), ('square', 'green'), None, None)
    shapes.to_pil(shapes.draw(scene)).save(tmp_path / 'a.png')
    row = dict(prompt='make the circle blue', source_image=str(tmp_path / 'a.png'))
    judge = lambda *cells: shapes.score(shapes.draw(('white', cells))[None], [row])[0]
    assert judge(('circle', 'blue'), ('square', 'green'), None, None) == dict(right=1.0, kept=0.0)
    assert judge(('circle', 'red'), ('square', 'blue'), None, None)['right'] == 0
    assert judge(('circle', 'blue'), ('square', 'green'), None, ('triangle', 'red'))['right'] == 0
    half = shapes.draw(('white', (('circle', 'blue'), ('square', 'green'), None, None))).clone()
    half[:, 12:] -= 0.1
    assert abs(shapes.score(half[None], [row])[0]['kept'] - 0.1 * 288 / (576 - 49)) < 0.01


def test_reward_is_smooth_and_orders_pictures():
    rows, x = drawn('t2i')
    g = torch.Generator().manual_seed(2)
    noise = torch.rand(x.shape, generator=g)
    levels = [sum(shapes.reward((1 - a) * x + a * noise, rows)) / len(rows) for a in (0.0, 0.2, 0.4, 0.8)]
    assert levels[0] > 0.999 and all(a > b for a, b in zip(levels, levels[1:])) and levels[-1] < 0.2, levels
    circle, square = (shapes.draw(('white', ((k, 'red'), None, None, None))) for k in ('circle', 'square'))
    d = (circle - square).square()[:, :12, :12].mean().item()  # what one is off where the other is due
    asked = torch.stack([circle, square]), [dict(prompt='a red circle top left on white')] * 2
    other = math.exp(-d / 0.004)                                       # the triangle and others hardly count
    for rewards, by_hand in ((shapes.reward(*asked), (1, (3 + math.exp(-d / 0.03)) / 4)),
                             (shapes.clear(*asked), ((3 + 1 / (1 + other)) / 4,
                                                     (3 + math.exp(-d / 0.03) * other / (1 + other)) / 4))):
        assert max(abs(a - b) for a, b in zip(rewards, by_hand)) < 1e-3, (rewards, by_hand)
    blue = shapes.blue(
        torch.stack([shapes.draw(('white', (('circle', c), None, None, None))) for c in ('blue', 'red')]),
        [dict(prompt='a circle on white')] * 2,
    )
    assert blue[0] > 0.95 and blue[1] < 0.05
    asked = shapes.blue(torch.stack([shapes.draw(('white', (('circle', c), None, None, None)))
                                     for c in ('blue', 'red')]), [dict(prompt='a red circle on white')] * 2)
    assert asked[1] > 0.95 > 0.8 > asked[0]                            # a taste does not overrule the prompt


def test_held_out_scenes_and_pairs_never_occur_in_training():
    train = {
        r['prompt'] + r['source_image'] for b in ('t2i', 'count') for r in rows_of(f'data/shapes/{b}.csv')
    }
    for b in ('t2i', 'count'):
        scenes = lambda name: {
            tuple(sorted(map(repr, shapes.understand(r['prompt'])[2])))
            + (shapes.understand(r['prompt'])[1],)
            + (r['prompt'].split()[0] if b == 'count' else '',)
            for r in rows_of(name)
        }
        assert not scenes(f'data/shapes/{b}.csv') & scenes(f'data/shapes/{b}_val.csv')
    for p in train:
        assert not any(f'{c} {s}' in p for s, c in shapes.HELD_OUT), p
    assert all(
        any(f'{c} {s}' in r['prompt'] for s, c in shapes.HELD_OUT)
        for r in rows_of('data/shapes/t2i_pairs.csv')
    )


def test_the_shipped_models_do_what_they_are_for():
    field, pictures = T.open_field('data/shapes/base'), from_file('data/shapes/prepare.py:pictures')
    names = ['count', 'local_edit', 'global_edit']
    models = T.Models(field, [dict(name=n, lora=f'data/shapes/teachers/{n}') for n in names])
    prompts, right = T.Prompts(field), {}
    for bucket in ('t2i', *names):
        rows = rows_of(f'data/shapes/{bucket}_val.csv')[:24]
        for who in {'base', names[0], bucket} - {'t2i'}:
            scores = shapes.score(pictures(models, prompts, who, rows, 0, steps=8), rows)
            right[bucket, who] = sum(s['right'] for s in scores) / 24
    assert right['t2i', 'base'] > 0.9 and all(right[n, n] > 0.8 for n in names), right
    # a real conflict: nobody can do it all
    assert all(right[n, 'base'] < 0.2 for n in names) and right['t2i', 'count'] < 0.5, right


def test_the_world_is_made_in_small(tmp_path):
    words = ['--quick=True', '--base_stop=2', '--teachers=[]', '--threads=1', f'--out={tmp_path}']
    from_file('data/shapes/prepare.py:main')(words)
    assert len(rows_of(tmp_path / 'local_edit.csv')) == 24 and (tmp_path / 'contact_sheet.png').exists()
    assert set(json.loads((tmp_path / 'quality.json').read_text())['base']) > {'t2i', 'open', 't2i_pairs'}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / 'base')
    assert pipe.transformer.config.num_layers == 4


@pytest.mark.parametrize(
    'prompt', ['a purple elephant', 'five circles', 'make it nice', '', 'a red circle on pink']
)
def test_prompts_outside_the_grammar(prompt):
    with pytest.raises(ValueError, match='does not understand'):
        shapes.understand(prompt)


def test_pictures_of_another_size(tmp_path):
    Image.new('RGB', (32, 24)).save(tmp_path / 'x.png')
    with pytest.raises(ValueError, match='prepare.py'):
        shapes.load(tmp_path / 'x.png')
    with pytest.raises(ValueError, match='resolution 24'):
        shapes.score(torch.zeros(1, 3, 32, 32), [dict(prompt='a circle')])


# ------------------------------------------------------------------------------------------------------------
# The families as velocity fields, against diffusers' own pipelines with tiny random weights

SIZES = (32, 48), (64, 32)
LARGER = (64, 80), (96, 64)                                # Omni's pipeline edits none smaller
WORDS = ['cat', 'a red ball on two green cubes', 'snow at night']
LENGTH = 64                                                # text tokens


# -------------------- tiny pipelines with each family's real shapes: 8 pixels are one latent pixel
def tokenizer(length, wrap='$A'):
    """One token a byte. `wrap` is where the begin and the end of a text are marked."""
    import tokenizers as tk
    names = ['<pad>', '<bos>', '<eos>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>']
    vocab = {t: i for i, t in enumerate(names + sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    t = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens(names)
    marks = [('<bos>', 1), ('<eos>', 2)]
    t.post_processor = tk.processors.TemplateProcessing(single=wrap, special_tokens=marks)
    out = hf.PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=length, pad_token='<pad>',
                                     bos_token='<bos>', eos_token='<eos>')
    out.chat_template = ('{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
                         '{% endfor %}<|im_start|>assistant\n')
    return out


def clip(n, projected):
    c = hf.CLIPTextConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                          num_hidden_layers=2, projection_dim=16, pad_token_id=0, bos_token_id=1,
                          eos_token_id=2)
    kind = hf.CLIPTextModelWithProjection if projected else hf.CLIPTextModel
    return {f'text_encoder{n}': kind(c), f'tokenizer{n}': tokenizer(77, '<bos> $A <eos>')}


def t5(n, width):
    c = hf.T5Config(vocab_size=300, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
                    eos_token_id=2, is_encoder_decoder=False, use_cache=False)
    return {f'text_encoder{n}': hf.T5EncoderModel(c), f'tokenizer{n}': tokenizer(256, '$A <eos>')}


def vae(channels, scale, shift):
    return diffusers.AutoencoderKL(
        latent_channels=channels, scaling_factor=scale, shift_factor=shift, block_out_channels=(8,) * 4,
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
        sample_size=64, norm_num_groups=4, use_quant_conv=shift is None, use_post_quant_conv=shift is None)


flow = diffusers.FlowMatchEulerDiscreteScheduler


def sd3(channels=16, **schedule):
    net = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=channels, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=16, qk_norm='rms_norm', dual_attention_layers=(0,))
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, vae=vae(16, 1.5305, 0.0609), scheduler=flow(**schedule or dict(shift=3.0)),
        **clip('', True), **clip('_2', True), **t5('_3', 32))


def zimage(omni=False):
    net = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=16,
        siglip_feat_dim=16 if omni else None, axes_dims=[8, 4, 4], axes_lens=[512, 32, 32])
    for k, p in net.named_parameters():
        if k.endswith('pad_token'):                                    # the library leaves them uninitialised
            torch.nn.init.normal_(p)
    lm = hf.Qwen3Config(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2)
    parts = dict(transformer=net, vae=vae(16, 0.3611, 0.1159), scheduler=flow(shift=3.0),
                 text_encoder=hf.Qwen3Model(lm), tokenizer=tokenizer(512))
    if not omni:
        return diffusers.ZImagePipeline(**parts)
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    eye = hf.Siglip2VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, num_patches=16, patch_size=16)
    parts['vae'].to(torch.bfloat16)                            # the pipeline insists
    parts['siglip_processor'] = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    return diffusers.ZImageOmniPipeline(**parts, siglip=hf.Siglip2VisionModel(eye))


def flux(kind=diffusers.FluxPipeline, embeds=True, **schedule):
    net = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=embeds, axes_dims_rope=(4, 6, 6))
    return kind(transformer=net, vae=vae(16, 0.3611, 0.1159), **clip('', False), **t5('_2', 16),
                scheduler=flow(**schedule or dict(shift=3.0, use_dynamic_shifting=True)))


def unet(kind=diffusers.DDIMScheduler, xl=False, **schedule):
    more = dict(addition_embed_type='text_time', addition_time_embed_dim=8, use_linear_projection=True,
                projection_class_embeddings_input_dim=6 * 8 + 16) if xl else {}
    net = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=32 if xl else 16, **more)
    steps = kind(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1,
                 **(dict(clip_sample=False) if kind is diffusers.DDIMScheduler else {}), **schedule)
    parts = dict(unet=net, vae=vae(4, 0.13025 if xl else 0.18215, None), scheduler=steps, **clip('', False))
    if xl:
        return diffusers.StableDiffusionXLPipeline(**parts, **clip('_2', True), add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)


euler = diffusers.EulerDiscreteScheduler
BUILD = {
    'sd3': sd3, 'sd3-turbo': lambda: sd3(shift=5.0), 'sd3-wide': lambda: sd3(32),
    'sd3-dynamic': lambda: sd3(use_dynamic_shifting=True),
    'zimage': zimage, 'omni': lambda: zimage(True),
    'flux': flux, 'schnell': lambda: flux(embeds=False, shift=1.0),
    'kontext': lambda: flux(diffusers.FluxKontextPipeline),
    'sd15': lambda: unet(set_alpha_to_one=False), 'sd15-v': lambda: unet(prediction_type='v_prediction'),
    'sd-turbo': lambda: unet(euler, timestep_spacing='trailing'),
    'sdxl': lambda: unet(euler, xl=True, timestep_spacing='leading')}
UNETS = 'sd15', 'sd15-v', 'sd-turbo', 'sdxl'
NATIVE = [k for k in BUILD if k != 'sd3-wide']             # those whose pipeline can sample from text
EACH = ['sd3', 'sd3-wide', 'zimage', 'omni', 'flux', 'kontext', 'sd15', 'sdxl']


def build(name):
    """A new field of that family, the same weights every time, and larger than the library's: text, time and
    pictures shall count in the output."""
    torch.manual_seed(0)
    pipe = BUILD[name]()
    pipe.set_progress_bar_config(disable=True)
    for p in (pipe.unet if name in UNETS else pipe.transformer).parameters():
        p.data += torch.randn_like(p) * 0.1
    return T.FAMILIES[type(pipe).__name__](pipe, 'cpu', LENGTH)


shared = functools.cache(build)                                        # for those who only look


@functools.cache
def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def sources(field, size, folder, n):
    """n random pictures as the field takes them."""
    for i in range(n):
        picture(i, size).save(folder / f'{i}.png')
    with torch.no_grad():
        return [field.encode_source(str(folder / f'{i}.png'), *size) for i in range(n)]


def conditions(field, prompts, given=()):
    """(cond, empty) for guidance."""
    with torch.no_grad():
        return tuple([{**c, **s} for c, s in zip(field.encode(p, bool(given)), given or [{}] * len(p))]
                     for p in (prompts, [''] * len(prompts)))


def noise(field, n, size, seed=0):
    return torch.randn(n, *field.shape(*size), generator=torch.Generator().manual_seed(seed))


def off(a, b):
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


def pipeline(name, prompts, eps, n, w, image=None, output='latent'):
    """What diffusers makes of the same noise; w is our guidance."""
    pipe, (h, wide) = shared(name).pipe, [8 * x for x in eps.shape[-2:]]
    k = dict(prompt=list(prompts), num_inference_steps=n, output_type=output, height=h, width=wide)
    k |= dict(image=image) if image else {}
    k |= {} if name in UNETS else dict(max_sequence_length=LENGTH)
    if name in ('flux', 'schnell', 'kontext'):
        k |= dict(latents=pipe._pack_latents(eps, *eps.shape), guidance_scale=shared(name).distilled_guidance,
                  true_cfg_scale=w, negative_prompt=[''] * len(prompts))
        k |= dict(max_area=h * wide, _auto_resize=False) if name == 'kontext' else {}
    else:
        k |= dict(latents=eps.clone(), guidance_scale=w - 1 if name in ('zimage', 'omni') else w)
    out = pipe(**k).images
    if output == 'latent' and 'true_cfg_scale' in k:
        out = pipe._unpack_latents(out, h, wide, pipe.vae_scale_factor)
    return out


def ours(name, cond, empty, eps, n, w, sigmas=None, warp=lambda v, z, s, a: v(z, s, a)):
    """Our rollout, on the pipeline's scale. `warp` may spoil the velocity, `sigmas` the schedule."""
    field, size = shared(name), [8 * x for x in eps.shape[-2:]]
    S, scale = field.sigmas(n, *size) if sigmas is None else sigmas, 1.0
    if name == 'sd15':                                         # this DDIM stops at the table's first entry
        f = field.pipe.scheduler.alphas_cumprod[0]
        a, b = f.sqrt(), (1 - f).sqrt()
        S, scale = torch.cat([S[:-1], (b / (a + b))[None]]), a + b

    def velocity(z, s, alive):
        return T.guided(field, z, s, [cond[j] for j in alive], [empty[j] for j in alive], w)
    z = field.start(eps, n, *size)
    return T.sample(lambda *k: warp(velocity, *k), z, S) * scale


def bar(name):
    return 5e-4 if name in UNETS else 1e-4                     # UNets' latents are up to 100 here


# -------------------- 1. the same pictures as the pipeline
@pytest.mark.parametrize('name', NATIVE)
def test_sampling_is_the_pipelines(name):
    field = shared(name)
    for n, size, batch, w in ((1, 0, 3, 3.0), (4, 0, 1, 1.0), (7, 0, 3, 3.0), (1, 1, 1, 1.0), (4, 1, 3, 3.0),
                              (7, 1, 3, 1.0)):
        eps = noise(field, batch, SIZES[size])
        cond, empty = conditions(field, WORDS[:batch])
        theirs = pipeline(name, WORDS[:batch], eps, n, w)
        assert off(ours(name, cond, empty, eps, n, w), theirs) < bar(name), (n, size, batch, w)
        other = ours(name, cond, empty, eps, n, 4.0 - w)
        assert off(other, theirs) > 3 * bar(name)              # guidance is not a trifle here


@torch.no_grad()
@pytest.mark.parametrize('name', ['kontext', 'omni'])
def test_editing_is_the_pipelines(name, tmp_path):
    field = shared(name)                                       # our batch of three, their edits one by one
    for n, size, w in ((1, 0, 3.0), (4, 1, 1.0), (7, 0, 3.0), (4, 0, 1.0)):
        size = LARGER[size]
        eps = noise(field, 3, size)
        given = sources(field, size, tmp_path, 3)
        if name == 'omni':                                     # its pipeline rounds sources to bfloat16
            for i, g in enumerate(given):
                x = field.pipe.image_processor.preprocess(picture(i, size), *size)
                theirs = field.pipe.prepare_image_latents([x], 1, 'cpu', torch.float32)[0][0][:, 0]
                assert off(g['source'], theirs) < 2e-2
                g['source'] = theirs
        z = ours(name, *conditions(field, WORDS, given), eps, n, w)
        for i in range(3):
            theirs = pipeline(name, WORDS[i:i + 1], eps[i:i + 1], n, w, picture(i, size))
            assert off(z[i:i + 1], theirs) < bar(name), (n, size, w, i)
        swapped = ours(name, *conditions(field, WORDS, given[1:] + given[:1]), eps, n, w)
        assert off(swapped, z) > 10 * bar(name)


@pytest.mark.parametrize('name', NATIVE)
def test_a_wrong_sign_time_or_schedule_is_noticed(name):
    field, n, size = shared(name), 4, SIZES[0]
    eps = noise(field, 1, size)
    cond, empty = conditions(field, WORDS[:1])
    theirs, S = pipeline(name, WORDS[:1], eps, n, 1.0), field.sigmas(n, *size)
    for wrong in (dict(warp=lambda v, z, s, a: -v(z, s, a)), dict(sigmas=S ** 1.5),
                  dict(warp=lambda v, z, s, a: v(z, S[0] - s + 0.01, a))):
        assert off(ours(name, cond, empty, eps, n, 1.0, **wrong), theirs) > 3 * bar(name)


def test_sd3_edits_beside_the_source_or_in_its_channels(tmp_path):
    for name in ('sd3', 'sd3-wide'):
        field, size = shared(name), SIZES[0]
        z, s = noise(field, 2, size), torch.tensor([0.3, 0.8])
        given = sources(field, size, tmp_path, 2)
        cond, _ = conditions(field, WORDS[:2], given)
        clean = torch.stack([g['source'] for g in given])
        text, _, pooled, _ = field.pipe.encode_prompt(
            WORDS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        call = functools.partial(field.net, timestep=1000 * s, encoder_hidden_states=text,
                                 pooled_projections=pooled)
        with torch.no_grad():
            v = field.velocity(z, s, cond)
            if name == 'sd3':
                by_hand = call(torch.cat([clean, z], 3)).sample[..., 6:]
            else:
                by_hand = call(torch.cat([z, clean], 1)).sample
            assert off(v, by_hand) < 1e-6
            assert off(field.velocity(z, s, conditions(field, WORDS[:2], given[::-1])[0]), v) > 1e-2
            bare = conditions(field, WORDS[:2])[0]
            by_hand = call(z if name == 'sd3' else torch.cat([z, 0 * z], 1)).sample
            assert off(field.velocity(z, s, bare), by_hand) < 1e-6


# -------------------- 2. the schedule
@pytest.mark.parametrize('name', NATIVE)
def test_sigmas_are_the_pipelines(name):
    field, pipe = shared(name), shared(name).pipe
    module = sys.modules[type(pipe).__module__]
    for n in range(1, 51):
        h, w = size = SIZES[n % 2]
        s, S = copy.deepcopy(pipe.scheduler), field.sigmas(n, h, w)
        k = {}
        if name not in UNETS:                                  # 16 x 16 pixels are a token
            c = s.config
            mu = module.calculate_shift(h * w // 256, c.base_image_seq_len, c.max_image_seq_len, c.base_shift,
                                        c.max_shift)
            if not name.startswith('sd3'):
                k = dict(sigmas=np.linspace(1, 1 / n, n), mu=mu)
            elif c.use_dynamic_shifting:
                k = dict(mu=mu)
        if n in (1, 3, 12):
            pipeline(name, WORDS[:1], noise(field, 1, size), n, 1.0)
            s = pipe.scheduler                                 # as a real run left it
        else:
            module.retrieve_timesteps(s, n, 'cpu', **k)
        if name in ('sd15', 'sd15-v'):
            a = s.alphas_cumprod[s.timesteps].sqrt()
            b = (1 - a ** 2).sqrt()
            expected = torch.cat([b / (a + b), torch.zeros(1)])
        else:
            expected = s.sigmas / (1 + s.sigmas) if name in UNETS else s.sigmas
        assert S.dtype == torch.float32 and off(S, expected) < 1e-6, n
        assert (S[1:] < S[:-1]).all() and S[-1] == 0


# -------------------- 3. pictures, prompts, batches
@torch.no_grad()
@pytest.mark.parametrize('name', NATIVE)
def test_pictures_are_coded_as_the_pipeline_does(name, tmp_path):
    field, size = shared(name), SIZES[1]
    eps, low = noise(field, 2, size), name == 'omni'           # whose VAE is in bfloat16
    z = pipeline(name, WORDS[:2], eps, 1, 1.0)
    shown = pipeline(name, WORDS[:2], eps, 1, 1.0, output='pt').float()
    assert off(field.decode(z), shown) < (5e-2 if low else 1e-5) and 0 <= shown.min() < shown.max() <= 1

    x, c = field.pipe.image_processor.preprocess(picture(0, size), *size), field.vae.config
    z = field.vae.encode(x.to(field.vae.dtype)).latent_dist.mode().float()
    picture(0, size).save(tmp_path / 'a.png')
    mine = field.encode_image(T.load_image(tmp_path / 'a.png', *size)[None])[0]
    assert off(mine[None], (z - (c.shift_factor or 0)) * c.scaling_factor) < (2e-2 if low else 1e-5)
    assert mine.shape == field.shape(*size) and mine.dtype == torch.float32 and mine.std() > 0.01


@pytest.mark.parametrize('name', list(BUILD))
def test_cached_prompts_and_batches_change_nothing(name, tmp_path):
    field, size = shared(name), SIZES[0]
    z, s = noise(field, 3, size), torch.tensor([0.9, 0.55, 0.2])
    for edit in (False, True)[:1 + bool(field.can_edit)]:
        given = sources(field, size, tmp_path, 3) if edit else []
        rows = [dict(prompt=p, source_image=str(tmp_path / f'{i}.png') * edit) for i, p in enumerate(WORDS)]
        prompts = T.Prompts(field)
        prompts.add([('another prompt', edit), ('', edit)] + [(p, edit) for p in WORDS[::-1]], keep=True)
        cached, cached_empty = prompts.conditions(rows, *size)
        with torch.no_grad():
            v = T.guided(field, z, s, cached, cached_empty, 2.0)
            for i in range(3):
                one = slice(i, i + 1)
                fresh = T.guided(field, z[one], s[one], *conditions(field, WORDS[one], given[one]), 2.0)
                assert off(fresh, v[one]) < 1e-5 * (1 + v.abs().max())
            mixed = T.guided(field, z, s, cached[1:] + cached[:1], cached_empty, 2.0)
        assert off(mixed, v) > 1e-2                            # the prompts do count


@pytest.mark.parametrize('name', ['sd3', 'omni', 'sdxl'])
def test_words_are_brought_to_the_device_once(name):
    field = copy.copy(shared(name))
    prompts = T.Prompts(field)
    prompts.add([(WORDS[0], False), ('', False)], keep=True)
    field.device = torch.device('meta')                        # anything that is not the CPU
    cond, empty = prompts.conditions([dict(prompt=WORDS[0])] * 3, *SIZES[0])
    for some in (cond, empty):
        found = [x for c in some for v in c.values() for x in (v if isinstance(v, list) else [v])]
        assert found and all(x.device.type == 'meta' for x in found)
        assert all(c['text'] is some[0]['text'] for c in some)


# -------------------- 4. adapters
def random_adapter(net, targets, seed, rank=4, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    found = {k: m.weight for k, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
             and any(k.endswith('.' + t) for t in targets)}
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.2
    return {k: (draw(rank, *w.shape[1:]), draw(len(w), rank, *[1] * (w.dim() - 2)), scale)
            for k, w in found.items()}


def probe(field, folder=None):
    """States and conditions to ask for velocities at."""
    given = sources(field, SIZES[0], folder, 2) if folder and field.can_edit else []
    return noise(field, 2, SIZES[0]), torch.tensor([0.8, 0.3]), conditions(field, WORDS[:2], given)[0]


def household(name, tmp_path):
    """A field with two teachers and a student on it: (field, models, student, probe, the base's velocity)."""
    field = build(name)
    at = probe(field, tmp_path)
    with torch.no_grad():
        bare = field.velocity(*at)
    for i in range(2):
        adapter = random_adapter(field.net, field.targets, i)
        merge_lora.write_adapter(tmp_path / f't{i}', adapter, prefix=field.prefix)
    models = T.Models(field, [dict(name=f't{i}', lora=str(tmp_path / f't{i}')) for i in range(2)])
    student = T.Student(field.net, 3, 6.0, field.targets)
    models.refresh(), models.switch('student')
    torch.manual_seed(5)
    for p in student.params.values():                          # as after some training
        p.data.normal_(0, 0.2)
    return field, models, student, at, bare


@pytest.mark.parametrize('name', EACH)
def test_student_and_teachers_share_a_base(name, tmp_path):
    field, models, student, at, bare = household(name, tmp_path)
    calls = []
    watched = field.net.get_submodule(student.names[0]).lora_A['student']
    watched.register_forward_hook(lambda *a: calls.append(1))

    def gradients(between):
        v = models.velocity('student', *at)
        with torch.no_grad():
            for who in between:
                models.velocity(who, *at)
        seen = len(calls)
        v.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in student.params.items() if p.grad is not None}
        for n, p in field.net.named_parameters():
            assert '.student.' in n or (p.grad is None and not p.requires_grad)
            p.grad = None
        return v.detach(), grads, len(calls) - seen

    v, alone, _ = gradients([])
    idle = {n for n in student.params if n not in alone or not alone[n].any()}
    assert all('.1.attn.add_q_proj.' in n for n in idle)       # SD3 drops the last block's text output
    _, among, again = gradients(['t0', 'base', 't1'])
    assert again == 0 and all(torch.equal(alone[n], among[n]) for n in alone)
    field.net.enable_gradient_checkpointing()
    _, recomputed, again = gradients(['t0', 't1', 'base'])
    assert again > 0, 'nothing was recomputed: checkpointing was off'
    assert all(torch.allclose(alone[n], recomputed[n], rtol=1e-5, atol=1e-6) for n in alone)

    with torch.no_grad():
        assert torch.equal(models.velocity('base', *at), bare)    # bit for bit
        teachers = [models.velocity(f't{i}', *at) for i in range(2)]
        assert torch.equal(models.velocity('student', *at), v)
    for i, t in enumerate(teachers):                           # what adding the deltas to the weights gives
        other = build(name)
        for k, (A, B, scale) in random_adapter(other.net, other.targets, i).items():
            other.net.get_submodule(k).weight.data += scale * (B.flatten(1) @ A.flatten(1))
        with torch.no_grad():
            assert off(other.velocity(*at), t) < 1e-4 * (1 + t.abs().max())
        assert off(t, bare) > 1e-2 and off(t, v) > 1e-2
    assert off(*teachers) > 1e-2 and off(v, bare) > 1e-2


def test_in_bfloat16_a_layer_of_the_student_reads_what_the_base_reads(tmp_path):
    """PEFT would make a float32 copy of each input, which autocast rounds back: the same numbers."""
    field, models, student, (z, s, cond), _ = household('sd3', tmp_path)
    field.net.to(torch.bfloat16), setattr(field, 'dtype', torch.bfloat16)
    for p in student.params.values():
        p.data = p.data.float()
    seen = []
    field.net.get_submodule(student.names[0]).lora_A['student'].register_forward_hook(
        lambda m, x, y: seen.append((x[0].dtype, y.dtype)))
    v = models.velocity('student', z, s, cond)
    for layer in models.layers:
        layer.cast_input_dtype_enabled = True
    assert torch.equal(models.velocity('student', z, s, cond), v)
    assert seen == [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize('name', EACH)
def test_a_saved_student_loads_in_diffusers_and_peft(name, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict
    field, models, student, at, bare = household(name, tmp_path)
    student.ema = {n: p.detach() * 0.5 for n, p in student.params.items()}
    student.save(tmp_path / 'saved', field.prefix)
    with torch.no_grad():
        now = models.velocity('student', *at)
        with student.wearing(student.ema):
            average = models.velocity('student', *at)
        assert torch.equal(models.velocity('student', *at), now) and off(now, average) > 1e-2
        for folder, v in ((tmp_path / 'saved', now), (tmp_path / 'saved' / 'ema', average)):
            for load in (lambda f: f.pipe.load_lora_weights(str(folder)),
                         lambda f: PeftModel.from_pretrained(f.net, str(folder)),
                         lambda f: T.Models(f, [dict(name='x', lora=str(folder))])):
                other = build(name)
                load(other)
                (there,) = {n.split('.')[-2] for n, _ in other.net.named_parameters() if '.lora_A.' in n}
                got = get_peft_model_state_dict(other.net, adapter_name=there)
                tensors = student.tensors() if folder.name == 'saved' else student.ema
                assert {n.replace('.student.', '.') for n in tensors} == set(got)
                assert all(torch.equal(got[n.replace('.student.', '.')], x) for n, x in tensors.items())
                assert off(other.velocity(*at), v) < 1e-5      # a sum's order depends on alignment


@pytest.mark.parametrize('name', EACH)
def test_adapters_of_every_packaging_load_exactly(name, tmp_path):
    field = build(name)
    at = probe(field)
    targets = field.targets + ['conv1', 'proj_in'] * (name in UNETS)    # convolutions as well
    adapter, rank, alpha = random_adapter(field.net, targets, 3), 4, 8.0
    whole = tmp_path / 'whole'
    merge_lora.write_adapter(whole, adapter, alpha, field.prefix)
    paths = [tmp_path / k for k in ('peft', 'diffusers.safetensors', 'a.safetensors', 'b.safetensors')]
    paths[0].mkdir()
    for f in ('adapter_model.safetensors', 'adapter_config.json'):
        shutil.copy(whole / f, paths[0])
    shutil.copy(whole / 'pytorch_lora_weights.safetensors', paths[1])
    for path, name_of, a, b in (
            (paths[2], lambda k: f'diffusion_model.{k}', 'lora_A', 'lora_B'),
            (paths[3], lambda k: 'lora_unet_' + k.replace('.', '_'), 'lora_down', 'lora_up')):
        parts = lambda A, B: ((f'{a}.weight', A), (f'{b}.weight', B), ('alpha', torch.tensor(alpha)))
        safetensors.torch.save_file({f'{name_of(k)}.{part}': x for k, (A, B, _) in adapter.items()
                                     for part, x in parts(A, B)}, path)
    models = T.Models(field, [dict(name=f't{i}', lora=str(p)) for i, p in enumerate(paths)])
    other = build(name)
    for k, (A, B, scale) in adapter.items():
        w = other.net.get_submodule(k).weight
        w.data += scale * (B.flatten(1) @ A.flatten(1)).view_as(w)
    with torch.no_grad():
        vs, merged = [models.velocity(f't{i}', *at) for i in range(4)], other.velocity(*at)
        bare = models.velocity('base', *at)
    assert all(off(v, vs[0]) < 1e-5 for v in vs)               # a sum's order depends on alignment
    for k, (A, B, scale) in adapter.items():
        layer = field.net.get_submodule(k)
        for t in (f't{i}' for i in range(4)):
            assert torch.equal(layer.lora_A[t].weight, A) and torch.equal(layer.lora_B[t].weight, B)
            assert layer.scaling[t] == scale
    assert off(vs[0], merged) < 1e-4 * (1 + merged.abs().max()) and off(vs[0], bare) > 1e-2

    key = sorted(adapter)[0]
    A, B, scale = adapter[key]
    misfit = torch.ones(rank, A.shape[1] + 1), B.flatten(1), scale
    wrong = {**adapter, 'no.such_layer': adapter[key], key: misfit}
    merge_lora.write_adapter(tmp_path / 'wrong', wrong, alpha)
    with pytest.raises(T.BadInput, match='2 of .* do not fit') as e:
        T.Models(build(name), [dict(name='stranger', lora=str(tmp_path / 'wrong'))])
    assert 'stranger' in str(e.value) and 'no.such_layer' in str(e.value) and key in str(e.value)


# -------------------- 5. folders
@pytest.mark.parametrize('name', list(BUILD))
def test_a_saved_folder_opens_as_its_family(name, tmp_path):
    field, folder = shared(name), tmp_path / 'model'
    field.pipe.save_pretrained(folder)
    opened = T.open_field(str(folder), max_sequence_length=LENGTH)
    assert type(opened) is type(field) and type(opened.pipe) is type(field.pipe)
    assert opened.can_edit == field.can_edit == (name.startswith('sd3') or name in ('omni', 'kontext'))
    assert not any(p.requires_grad for m in (opened.net, opened.vae) for p in m.parameters())
    z, s, cond = probe(field)
    with torch.no_grad():
        assert off(opened.velocity(z, s, conditions(opened, WORDS[:2])[0]), field.velocity(z, s, cond)) < 1e-5
    low = T.open_field(str(folder), torch.bfloat16)
    assert low.net.dtype == torch.bfloat16 and (low.vae.dtype == torch.bfloat16) == (name == 'omni')
    both = zip(low.vae.parameters(), opened.vae.parameters())  # never rounded on the way
    assert name == 'omni' or all(torch.equal(a, b) for a, b in both)

    index = json.loads((folder / 'model_index.json').read_text())
    (folder / 'model_index.json').write_text(json.dumps(index | {'_class_name': 'MochiPipeline'}))
    with pytest.raises(T.BadInput, match='MochiPipeline is not a family') as e:
        T.open_field(str(folder))
    assert all(k in str(e.value) for k in T.FAMILIES)
    assert type(T.open_field(str(folder), family=index['_class_name'])) is type(field)
    for f in folder.glob(f'{field.prefix}/*.safetensors'):
        f.unlink()
    with pytest.raises(T.BadInput, match='missing or damaged'):
        T.open_field(str(folder), family=index['_class_name'])
    with pytest.raises(T.BadInput, match='no model_index.json'):
        T.open_field(str(tmp_path))


def test_sizes_that_a_family_does_not_take():
    def told(name, height, width, editing=False):
        field = shared(name)
        configs = dict(vae=dict(field.vae.config), transformer=dict(field.net.config))
        try:
            T.check_size(type(field.pipe).__name__, configs, height, width, editing)
        except T.BadInput as e:
            return str(e)
    for name in BUILD:
        unit = 8 if name in UNETS else 16
        assert told(name, 3 * unit, 5 * unit) is None
        assert f'of {unit} pixels, not {unit + 1}; the nearest is {unit}' in told(name, unit + 1, 64)
        assert f'a width in multiples of {unit} pixels, not 0; the nearest is {unit}' in told(name, unit, 0)
        can = shared(name).can_edit
        assert (told(name, 64, 64, True) is None) == can
        assert can or all(k in told(name, 64, 64, True) for k in ('cannot edit', 'Omni', 'FluxKontext'))
    for name, editing, most in (('sd3', False, 256), ('sd3', True, 128), ('sd3-wide', True, 256)):
        assert told(name, 256, most, editing) is None          # a table of 16 x 16 tokens
        assert 'position table, 256 pixels' in told(name, 256, most + 16, editing)
        assert 'position table' in told(name, 272, 64, editing)
        field = shared(name)
        z = torch.randn(1, *field.shape(32, most + 16))
        cond = conditions(field, WORDS[:1], [dict(source=z[0])] if editing else [])[0]
        with pytest.raises(ValueError, match='pos_embed_max_size'):   # and the model says so too
            field.velocity(z, torch.ones(1), cond)
        cond = conditions(field, WORDS[:1], [dict(source=z[0, ..., :-2])] if editing else [])[0]
        field.velocity(z[..., :-2], torch.ones(1), cond)


LEARN = dict(zimage='danceopd', omni='diffusionopd', flux='flowopd', kontext='danceopd', sd15='diffusionopd',
             sdxl='flowopd', **{'sd3-wide': 'danceopd', 'sd-turbo': 'diffusionopd'})


def learns(name, method, folder):
    """A short run of a method on a family's saved pipeline: its result, and the state after a resume."""
    field, edit = build(name), name in ('omni', 'kontext', 'sd3-wide')
    height, width = LARGER[0] if name == 'omni' else SIZES[0]
    field.pipe.save_pretrained(folder / 'model')
    linear = {k: m.weight.shape for k, m in field.net.named_modules()
              if isinstance(m, torch.nn.Linear) and any(k.endswith('.' + t) for t in field.targets)}
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g) / s[1] ** 0.5
    merge_lora.write_adapter(
        folder / 'teacher',
        {k: (draw(2, s[1]), 2 * draw(s[0], 2), 1.0) for k, s in linear.items()},
        prefix=field.prefix,
    )
    picture(0, (height, width)).save(folder / 'source.png')
    rows = [f'{w},things,{"source.png" if edit else ""}' for w in WORDS]
    (folder / 'things.csv').write_text('\n'.join(['prompt,task,source_image', *rows]))
    args = [
        f'--model={folder}/model',
        f'--resolution=[{height}, {width}]',
        '--init_from=base',
        '--device=cpu',
        f"--teachers=[{{'name': 'one', 'lora': '{folder}/teacher'}}]",
        '--lr_schedule=constant',
        '--warmup=1',
        "--routes=[{'teacher': 'one', 'data': 'things'}]",
        f"--data=['{folder}/things.csv']",
        '--rank=4',
        '--alpha=4',
        '--lr=1e-2',
        '--steps=3',
        '--max_steps=8',
        '--save_every=4',
        '--eval_every=100',
        '--show=1',
        '--sample_steps=2',
        '--eval_samples=3',
        f'--max_sequence_length={LENGTH}',
        f'--method={method}',
        '--batch_size=6',
        '--micro_batch=6',
        '--ema_decay=0',
        '--ckpt_keep=9',
    ]
    if method == 'flowopd':
        args += ['--eta=0.7', '--group_size=3', '--reward=code', '--drop_last=1']
    train_opd.main(args + [f'--out_dir={folder}/run'])
    shutil.copytree(folder / 'run', folder / 'half', symlinks=True)
    shutil.rmtree(folder / 'half' / 'step_000008')
    train_opd.main(
        [a for a in args if 'init_from' not in a] + [f'--out_dir={folder}/half', '--init_from=resume']
    )
    ends = [
        torch.load(folder / r / 'step_000008' / 'train_state.pt', weights_only=True)['student']
        for r in ('run', 'half')
    ]
    return json.loads((folder / 'run' / 'result.json').read_text())['things'], ends


@pytest.mark.parametrize('name', LEARN)
def test_every_family_learns_and_resumes(name, tmp_path):
    result, (whole, resumed) = learns(name, LEARN[name], tmp_path)
    assert result['gap_after'] < 0.97 * result['gap_before'], result
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_other_schedulers_of_unets_become_ddim():
    """SD1.5's own repository ships PNDM, whose list of times repeats one: no Euler steps."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.PNDMScheduler.from_config(
        field.pipe.scheduler.config, skip_prk_steps=True
    )
    again = T.UNet(field.pipe, 'cpu', LENGTH)
    for n in (1, 4, 20):
        s = again.sigmas(n, 64, 64)
        assert len(s) == n + 1 and (s[1:] < s[:-1]).all() and s[-1] == 0 and s[0] < 1, s
    assert again.sigmas(1000, 64, 64).isfinite().all()  # SD1.5's list of times is one beyond its table then


def test_schedulers_with_sigmas_that_are_no_euler_become_ddim_too():
    """Their states are scaled otherwise: a rollout would start almost without noise."""
    field = build('sd15')
    field.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(field.pipe.scheduler.config)
    again = T.UNet(field.pipe, 'cpu', LENGTH)
    eps = torch.ones(1, 4, 8, 8)
    assert type(again.pipe.scheduler) is diffusers.DDIMScheduler
    assert (again.start(eps, 20, 64, 64) > 0.9).all() and again.sigmas(20, 64, 64)[0] > 0.9


# ------------------------------------------------------------------------------------------------------------
# Settings, and adapter files

# -------------------- configurator
def settings():
    m = types.ModuleType('script')
    exec(
        'import os\nfrom pathlib import Path\n_hidden = 1\nlr = 1e-4\nsteps = 10\ncompile = False\n'
        'name = "x"\n'
        'seed: int | None = None\nwhich: str | int = "a"\nroutes = [1, 2]\npair = (1, 2)\ndef f(): pass\n',
        vars(m),
    )
    return collect(m)


def conf(tmp_path, text, name='c.py'):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_collect_takes_settings_only():
    defaults, kinds = settings()
    assert set(defaults) == {'lr', 'steps', 'compile', 'name', 'seed', 'which', 'routes', 'pair'}
    assert kinds['lr'] is float and isinstance(3, kinds['seed']) and isinstance(None, kinds['seed'])


@pytest.mark.parametrize(
    'argv, key, value',
    [
        (['--lr=1'], 'lr', 1.0),
        (['--lr', '1e-3'], 'lr', 1e-3),
        (['--lr', '-1.0'], 'lr', -1.0),
        (['--lr=1', '--lr=2'], 'lr', 2.0),
        (['--compile'], 'compile', True),
        (['--compile', '--steps=3'], 'compile', True),
        (['--compile', '--steps=3'], 'steps', 3),
        (['--compile', 'False'], 'compile', False),
        (['--compile=True'], 'compile', True),
        (['--name=a=b=c'], 'name', 'a=b=c'),
        (['--name=3'], 'name', '3'),
        (['--name='], 'name', ''),
        (['--name', 'a b'], 'name', 'a b'),
        (['--seed=None'], 'seed', None),
        (['--seed=3'], 'seed', 3),
        (['--which=3'], 'which', 3),
        (['--which=b'], 'which', 'b'),
        (['--which=True'], 'which', 'True'),
        (['--routes=(3,4)'], 'routes', [3, 4]),
        (['--routes=[]'], 'routes', []),
        (["--routes=[dict(data='t2i', weight=.5), {'a': dict(b=-1)}]"], 'routes',
         [{'data': 't2i', 'weight': 0.5}, {'a': {'b': -1}}]),
        (["--name=dict(**{'a': 1})"], 'name', "dict(**{'a': 1})"),
        (['--pair=[3,4]'], 'pair', (3, 4)),
        ([], 'seed', None),
    ],
)
def test_values(argv, key, value):
    got = getattr(configure(settings(), argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    'argv, words',
    [
        (['--stps=3'], ['stps', 'steps']),
        (['--f=3'], ['unknown setting f']),
        (['--_hidden=3'], ['unknown setting']),
        (['--steps=1.5'], ['steps', 'int', 'float', '1.5']),
        (['--steps=True'], ['int', 'bool']),
        (['--lr=True'], ['float', 'bool']),
        (['--compile=1'], ['bool', 'int']),
        (['--steps=None'], ['steps', 'None, which it does not accept']),
        (['--steps=ten'], ['int', "'ten'"]),
        (['--steps'], ['needs a value']),
        (['--lr', '--steps=3'], ['needs a value']),
        (['--seed=x'], ['int or None']),
        (['--routes=[open(1)]'], ['list', '[open(1)]']),
        (['missing.py'], ['no such config file', 'missing.py']),
        (['lr=3'], ['no such config file', '--lr=3']),
        (['-lr=3'], ['--lr=3']),
        (['steps', '3'], ['--steps']),
        (['.'], ['no such config']),
    ],
)
def test_refusals(argv, words):
    with pytest.raises(BadInput) as e:
        configure(settings(), argv)
    assert all(w in str(e.value) for w in words), e.value


def test_config_files_in_order(tmp_path):
    a = conf(tmp_path, 'import math\n_x = 3\nsteps = steps * 2\nlr = 1\nroutes.append(_x)\n', 'a.py')
    b = conf(tmp_path, 'steps += 1\nname = f"run{steps}"\n', 'b.py')
    s = settings()
    c = configure(s, [a, b, '--lr=3'])
    assert (c.steps, c.name, c.lr, c.routes) == (21, 'run21', 3.0, [1, 2, 3]) and type(c.lr) is float
    assert configure(s, ['--steps=1', a]).steps == 2 and configure(s, ['--compile', a]).compile is True
    assert s == settings()  # nothing leaked into the defaults
    configure(s, []).routes.append(9)
    assert s == settings()


@pytest.mark.parametrize(
    'text, words',
    [
        ('stesp = 3', ['stesp', 'steps']),
        ('def g(): pass', ['unknown setting g']),
        ('class G: pass', ['unknown setting G']),
        ('\nsteps = 1/0', ['line 2', 'ZeroDivisionError', 'division']),
        ('steps = 1\nlr = (', ['line 2', 'SyntaxError']),
        ('steps = "3"', ['steps', 'int', "'3'"]),
        ('steps = nope', ['line 1', 'nope']),
        ('lr = None', ['None, which']),
        ('steps = 2\n\nraise SystemExit(0)', ['line 3']),
    ],
)
def test_config_file_refusals(tmp_path, text, words):
    path = conf(tmp_path, text)
    with pytest.raises(BadInput) as e:
        configure(settings(), [path])
    assert all(w in str(e.value) for w in [path, *words]), e.value


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        configure(settings(), ['--steps=3', '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(f'--{k}={v!r}' in text for k, v in settings()[0].items())


def test_run_exit_codes(tmp_path):
    code = (
        'import sys; sys.argv[0] = "x/job.py"\nfrom configurator import *\n'
        'def main(argv): raise {}\nrun(main)'
    )
    for raised, rc, err in [
        ('BadInput("mend me")', 2, 'job.py: mend me\n'),
        ('KeyboardInterrupt', 130, 'job.py: interrupted\n'),
    ]:
        p = subprocess.run(
            [sys.executable, '-c', code.format(raised)], cwd=ROOT, capture_output=True, text=True
        )
        assert (p.returncode, p.stderr) == (rc, err)


@pytest.mark.parametrize('raised, code, err', [('BadInput("mend me")', 2, 'mend me'),
                                               ('ValueError("odd")', 1, 'ValueError: odd'),
                                               ('SystemExit(0)', 0, '')])
def test_of_several_processes_one_that_fails_ends_at_once(raised, code, err):
    """What runs at an exit may wait for processes that wait for this one; after a good end it may."""
    text = (f'import atexit, sys, time; atexit.register(time.sleep, {60 * (code > 0)})\n'
            f'from configurator import *\ndef main(argv): raise {raised}\nrun(main)')
    p = subprocess.run([sys.executable, '-c', text], cwd=ROOT, env=ONE_THREAD | dict(WORLD_SIZE='2'),
                       capture_output=True, text=True, timeout=30)
    assert p.returncode == code and err in p.stderr


# -------------------- LoRA files
TARGETS = {
    'sd3': 'to_q to_out.0 add_k_proj ff.net.2',
    'zimage': 'to_q to_out.0 w2',
    'flux': 'to_k to_out.0 proj_mlp proj_out',
    'sd15': 'to_q to_out.0 conv1 proj_in',
    'sdxl': 'to_v to_out.0 conv_shortcut',
}
WITH_UNET = ('sd15', 'sdxl')
prefix = lambda family: 'unet' if family in WITH_UNET else 'transformer'
net_of = lambda pipe: getattr(pipe, 'transformer', None) or pipe.unet


def shapes_of(net):
    return {
        k: tuple(m.weight.shape)
        for k, m in net.named_modules()
        if hasattr(m, 'weight') and m.weight is not None
    }


def make(net, family, seed=0, r=4, scale=0.5, keep=lambda i: True):
    g, ends = torch.Generator().manual_seed(seed), tuple('.' + t for t in TARGETS[family].split())
    names = [k for k in shapes_of(net) if ('.' + k).endswith(ends)]
    assert len(names) > 3
    rand = lambda *s: torch.randn(*s, generator=g) * 0.2
    return {k: (rand(r, *s[1:]), rand(s[0], r, *[1] * (len(s) - 2)), scale)
            for i, k in enumerate(names) for s in [shapes_of(net)[k]] if keep(i)}


def output(net, family):
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g)
    with torch.no_grad():
        if family == 'sd3':
            return net(
                rand(2, 16, 8, 8), rand(2, 7, 32), rand(2, 32), torch.tensor([500.0, 20.0]), return_dict=False
            )[0]
        if family == 'zimage':
            return torch.stack(
                net([rand(16, 1, 8, 8)], torch.tensor([0.5]), [rand(7, 16)], return_dict=False)[0]
            )
        if family == 'flux':
            return net(
                rand(2, 16, 64),
                rand(2, 7, 16),
                rand(2, 16),
                torch.tensor([0.5, 0.1]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(7, 3),
                guidance=torch.ones(2),
                return_dict=False,
            )[0]
        more = (
            dict(added_cond_kwargs=dict(text_embeds=rand(2, 16), time_ids=rand(2, 6)))
            if family == 'sdxl'
            else {}
        )
        return net(rand(2, 4, 8, 8), 500, rand(2, 7, 32 if more else 16), **more, return_dict=False)[0]


def added(net, adapter):
    """A copy of net with scale * B A added to its weights by hand: what every other road is compared with."""
    import copy
    net = copy.deepcopy(net)
    with torch.no_grad():
        for k, (A, B, s) in adapter.items():
            w = net.get_submodule(k).weight
            w += (s * B.flatten(1) @ A.flatten(1)).reshape(w.shape)
    return net


def deltas(adapter):
    return {k: s * B.flatten(1) @ A.flatten(1) for k, (A, B, s) in adapter.items()}


def same(a, b, tol=1e-6):
    a, b = deltas(a), deltas(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tol for k in a)


def pack(adapter, how, folder, family, alpha=None):
    """The adapter as the public tools write it."""
    folder.mkdir()
    r = next(iter(adapter.values()))[0].shape[0]
    alpha = next(iter(adapter.values()))[2] * r
    ab = lambda start, a='lora_A', b='lora_B', name=str: {
        f'{start}{name(k)}.{s}.weight': t.contiguous()
        for k, (A, B, _) in adapter.items()
        for s, t in ((a, A), (b, B))
    }
    alphas = lambda start, name=str: {f'{start}{name(k)}.alpha': torch.tensor(alpha) for k in adapter}
    flat, p = lambda k: k.replace('.', '_'), prefix(family)
    config = dict(peft_type='LORA', r=r, lora_alpha=alpha, target_modules=sorted(adapter))
    file = folder / 'any.safetensors'
    if how == 'peft':
        (folder / 'adapter_config.json').write_text(json.dumps(config))
        save_file(ab('base_model.model.'), folder / 'adapter_model.safetensors')
    elif how == 'diffusers':
        save_file(
            ab(f'{p}.'),
            folder / 'pytorch_lora_weights.safetensors',
            {'format': 'pt', 'lora_adapter_metadata': json.dumps({f'{p}.{k}': v for k, v in config.items()})},
        )
    elif how == 'diffusers-alpha':
        save_file(ab(f'{p}.', 'lora.down', 'lora.up') | alphas(f'{p}.'), file)
    elif how == 'diffusion_model':
        save_file(ab('diffusion_model.') | alphas('diffusion_model.'), file)
    elif how == 'diffusion_model-down':
        save_file(ab('diffusion_model.', 'lora_down', 'lora_up') | alphas('diffusion_model.'), file)
    elif how.startswith('lora_'):
        save_file(ab(how, 'lora_down', 'lora_up', flat) | alphas(how, flat), file)
    elif how == 'bare':
        save_file(ab('') | alphas(''), file)
    return folder


PACKAGINGS = [
    'peft',
    'diffusers',
    'diffusers-alpha',
    'diffusion_model',
    'diffusion_model-down',
    'lora_unet_',
    'lora_transformer_',
    'bare',
]


@pytest.mark.parametrize('family', TARGETS)
def test_packagings_and_both_loaders(family, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe)
    adapter, shapes, base = make(net, family), shapes_of(net), output(net, family)
    want = output(added(net, adapter), family)
    assert (want - base).abs().max() > 1e-3
    for how in PACKAGINGS:
        got = merge_lora.fit(merge_lora.read_adapter(pack(adapter, how, tmp_path / how, family)), shapes, how)
        assert same(got, adapter, 0) and all(
            t.dtype == torch.float32 for m in got.values() for t in m[:2]
        ), how
    for kw in {}, {'alpha': 3.0}:
        out = tmp_path / f'out{len(kw)}'
        merge_lora.write_adapter(out, got, prefix=prefix(family), **kw)
        assert {f.name for f in out.iterdir()} == {*merge_lora.FILES, 'adapter_config.json'}
        assert same(merge_lora.read_adapter(out), adapter, 1e-7) and same(
            merge_lora.read_adapter(out / merge_lora.FILES[1]), adapter, 1e-7
        )
        pipe.load_lora_weights(out)
        assert (output(net, family) - want).abs().max() < 2e-5
        pipe.unload_lora_weights()
        assert torch.equal(output(net, family), base)
        import peft, warnings
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # PEFT only warns of keys that are missing
            wrapped = peft.PeftModel.from_pretrained(net, out)
        assert (output(wrapped, family) - want).abs().max() < 2e-5
        net = wrapped.unload()


@pytest.mark.parametrize('family', ['sd3', 'sd15'])
def test_peft_patterns_and_rslora(family, tmp_path):
    """A file written by PEFT itself with every rank and alpha of its own."""
    import peft
    net = net_of(build(family).pipe)
    base = output(net, family)
    for i, kw in enumerate(
        [dict(rank_pattern={'to_q': 3, 'to_out.0': 5}, alpha_pattern={'to_q': 7}), dict(use_rslora=True)]
    ):
        config = peft.LoraConfig(
            r=4, lora_alpha=2, target_modules=['to_q', 'to_out.0', 'conv1'], init_lora_weights=False, **kw
        )
        wrapped = peft.get_peft_model(net, config)
        want = output(wrapped, family)
        wrapped.save_pretrained(tmp_path / str(i))
        net = wrapped.unload()
        adapter = merge_lora.fit(merge_lora.read_adapter(tmp_path / str(i)), shapes_of(net))
        assert (want - base).abs().max() > 1e-3 and (
            output(added(net, adapter), family) - want
        ).abs().max() < 2e-5
        merge_lora.write_adapter(
            tmp_path / f'w{i}', adapter, prefix=prefix(family)
        )  # different ranks: padded to one
        wrapped = peft.PeftModel.from_pretrained(net, tmp_path / f'w{i}')
        assert (output(wrapped, family) - want).abs().max() < 2e-5
        net = wrapped.unload()


def test_write_scales(tmp_path):
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    for m, alpha, scale in [
        ((A, B), None, 1),
        ((A, B), 8, 2),
        ((A, B, 0.3), None, 0.3),
        ((A, B, 0.3), 8, 0.3),
    ]:
        merge_lora.write_adapter(tmp_path, {'a.b': m}, alpha)
        assert same(merge_lora.read_adapter(tmp_path), {'a.b': (A, B, scale)})
    assert torch.equal(load_file(tmp_path / merge_lora.FILES[0])['transformer.a.b.lora_A.weight'], A)
    merge_lora.write_adapter(tmp_path, {'a': (A, B), 'b': (A[:2], B[:, :2])}, 8)
    assert same(merge_lora.read_adapter(tmp_path), {'a': (A, B, 2), 'b': (A[:2], B[:, :2], 4)})
    assert json.loads((tmp_path / 'adapter_config.json').read_text())['target_modules'] == ['a', 'b']


def test_kohya_1x1_convolution_written_flat():
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    got = merge_lora.fit({'lora_unet_mid_proj_in': (A, B, 1.0)}, {'mid.proj_in': (5, 6, 1, 1)})
    assert got['mid.proj_in'][0].shape == (2, 6, 1, 1) and got['mid.proj_in'][1].shape == (5, 2, 1, 1)
    got = merge_lora.fit({'a': (A[..., None, None], B[..., None, None], 1.0)}, {'a': (5, 6)})
    assert got['a'][0].shape == (2, 6)


# -------------------- merge
@pytest.mark.parametrize('family', ['sd3', 'sd15'])
def test_merge_is_the_sum_of_deltas(family):
    net = net_of(build(family).pipe)
    a, b = make(net, family, 1, 4, 0.5), make(net, family, 2, 3, 2.0, lambda i: i % 2)
    assert set(b) < set(a)
    merged = merge_lora.merge([a, b], [0.7, -0.4])
    by_hand = added(
        added(net, {k: (A, B, 0.7 * s) for k, (A, B, s) in a.items()}),
        {k: (A, B, -0.4 * s) for k, (A, B, s) in b.items()},
    )
    assert (output(added(net, merged), family) - output(by_hand, family)).abs().max() < 1e-5
    assert {merged[k][0].shape[0] for k in b} == {7} and {merged[k][0].shape[0] for k in set(a) - set(b)} == {
        4
    }
    assert all(m[2] == 1.0 for m in merged.values())
    full = merge_lora.merge([a, b], [0.7, -0.4], rank=9)  # more than the true rank: still exact, surplus zero
    assert same(full, merged, 1e-5)
    assert all(
        A.shape[0] == B.shape[1] == 9 and not A[7:].any() and not B[:, 7:].any() for A, B, _ in full.values()
    )
    norm = sum(d.square().sum() for d in deltas(merged).values()).sqrt()
    assert abs(merge_lora.size(merged) - norm) < 1e-4 * norm


@pytest.mark.parametrize('shape', [(24, 17), (12, 6, 3, 3)])
def test_svd_is_the_optimum(shape):
    torch.manual_seed(0)
    A, B = torch.randn(8, *shape[1:]), torch.randn(shape[0], 8, *[1] * (len(shape) - 2))
    full = (0.3 * B.flatten(1) @ A.flatten(1)).double()
    U, S, Vh = torch.linalg.svd(full, full_matrices=False)
    a, b = merge_lora.to_rank((A, B, 0.3), 3)
    assert a.shape == (3, *shape[1:]) and b.shape == (shape[0], 3, *[1] * (len(shape) - 2))
    got = b.flatten(1).double() @ a.flatten(1).double()
    assert torch.allclose(got, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5)
    assert abs((full - got).norm() - S[3:].norm()) < 1e-5 * S[3:].norm()
    assert torch.allclose(a.flatten(1) @ a.flatten(1).T, torch.diag(S[:3]).float(), atol=1e-4)  # balanced
    assert torch.allclose(b.flatten(1).T @ b.flatten(1), torch.diag(S[:3]).float(), atol=1e-4)


def test_svd_of_zero_and_tall():
    a, b = merge_lora.to_rank((torch.randn(4, 6), torch.zeros(5, 4), 1.0), 2)
    assert not a.any() and not b.any()
    A, B = torch.randn(10, 6), torch.randn(5, 10)  # more rank than the matrix has
    a, b = merge_lora.to_rank((A, B, 1.0), 8)
    assert a.shape == (8, 6) and torch.allclose(b @ a, B @ A, atol=1e-4)


def save_model(pipe, folder, **kw):
    net = net_of(pipe)
    net.save_pretrained(folder / ('unet' if hasattr(pipe, 'unet') else 'transformer'), **kw)
    return folder


@pytest.mark.parametrize(
    'family, shard, dtype',
    [('sd3', '40KB', torch.float32), ('sd15', '10GB', torch.float32), ('zimage', '10GB', torch.bfloat16)],
)
def test_into_base(family, shard, dtype, tmp_path):
    pipe = build(family).pipe
    net = net_of(pipe).to(dtype)
    folder = save_model(pipe, tmp_path / 'model', max_shard_size=shard)
    assert {k: s for k, s in merge_lora.model_shapes(folder).items() if k in shapes_of(net)} == shapes_of(net)
    adapter, out = make(net, family), tmp_path / 'new'
    assert len(merge_lora._shards(folder)) > 1 or shard != '40KB'
    merge_lora.add_to_base(folder, adapter, out)
    loaded = type(net).from_pretrained(out, torch_dtype=dtype).eval()
    assert not [p for p in tmp_path.iterdir() if 'partial' in p.name]
    for k, p in loaded.named_parameters():
        old, m = net.get_parameter(k), adapter.get(k.removesuffix('.weight'))
        want = old if m is None else (old.float() + deltas({'m': m})['m'].reshape(old.shape)).to(dtype)
        assert p.dtype == dtype and torch.equal(p, want), k
    if dtype == torch.float32:
        assert (output(loaded, family) - output(added(net, adapter), family)).abs().max() < 1e-5
    for bad in out, tmp_path:
        with pytest.raises(BadInput, match='not an empty folder'):
            merge_lora.add_to_base(folder, adapter, bad)
    with pytest.raises(BadInput, match='another model'):
        merge_lora.add_to_base(folder, {'nope': next(iter(adapter.values()))}, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


# -------------------- refusals
A, B = torch.randn(2, 6), torch.randn(5, 2)
GOOD = {'transformer.x.y.lora_A.weight': A, 'transformer.x.y.lora_B.weight': B}


@pytest.mark.parametrize(
    'more, words',
    [
        ({'text_encoder.q.lora_A.weight': A}, ['text-encoder', 'text_encoder.q']),
        ({'lora_te1_q.lora_down.weight': A}, ['text-encoder', 'lora_te1_q']),
        ({'transformer.x.y.lora_magnitude_vector': B}, ['DoRA']),
        ({'lora_unet_x.dora_scale': B}, ['DoRA', 'lora_unet_x']),
        ({'lora_unet_x.hada_w1_a': B}, ['LoHa']),
        ({'lora_unet_x.lokr_w1': B}, ['LoKr', 'lora_unet_x.lokr_w1']),
        ({'transformer.x.y.lora_B.bias': B}, ['biases']),
        ({'diffusion_model.x.diff_b': B}, ['biases']),
        ({'transformer.z.lora_A.weight': A}, ['partner', 'z (no B)']),
        ({'transformer.z.lora_B.weight': B}, ['partner', 'z (no A)']),
        ({'transformer.z.alpha': torch.tensor(1.0)}, ['partner', 'z (no A)']),
        ({'transformer.x.y.lora_B.weight': B[:, :1]}, ['ranks', 'x.y']),
        ({'transformer.x.y.lora_A.weight': A * float('nan')}, ['finite', 'x.y']),
        ({'transformer.x.y.alpha': torch.tensor(float('inf'))}, ['finite']),
        ({'transformer.x.y.alpha': torch.tensor(0.0)}, ['alpha is zero']),
        ({'transformer.proj_out.weight': A}, ['no LoRA factors', 'proj_out']),
        ({'x.y.lora_A.weight': A}, ['twice']),
    ],
)
def test_read_refuses(more, words, tmp_path):
    save_file({k: t.clone().contiguous() for k, t in {**GOOD, **more}.items()}, tmp_path / 'a.safetensors')
    with pytest.raises(BadInput) as e:
        merge_lora.read_adapter(tmp_path / 'a.safetensors')
    assert all(w in str(e.value) for w in [str(tmp_path), *words]), e.value


def test_read_refuses_files(tmp_path):
    file = tmp_path / 'a.safetensors'

    def refused(path, *words):
        with pytest.raises(BadInput) as e:
            merge_lora.read_adapter(path)
        assert all(w in str(e.value) for w in words), e.value
    save_file({}, file), refused(file, 'no tensors')
    save_file(GOOD, file)
    assert set(merge_lora.read_adapter(tmp_path)) == {'x.y'}
    data = file.read_bytes()
    for broken in (data[:-8], data[:20], b'', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'):
        file.write_bytes(broken), refused(file, 'damaged', str(file))
    save_file(GOOD, file, {'lora_adapter_metadata': '{"transformer.r": 2'}), refused(file, 'damaged')
    save_file(GOOD, file, {'lora_adapter_metadata': '{}'}), refused(file, 'r or lora_alpha')
    save_file(
        GOOD, file, {'lora_adapter_metadata': '{"transformer.r": 3, "transformer.lora_alpha": 3}'}
    ), refused(file, 'rank 2', 'says 3')
    file.rename(tmp_path / 'adapter_model.safetensors'), refused(tmp_path, 'adapter_config.json')
    (tmp_path / 'adapter_model.safetensors').unlink()
    save_file({k.replace('transformer', 'base_model.model'): t for k, t in GOOD.items()}, file), refused(
        file, 'adapter_config.json'
    )
    for extra in dict(peft_type='LOHA'), dict(use_dora=True), dict(init_lora_weights='pissa_niter_4'):
        (tmp_path / 'adapter_config.json').write_text(json.dumps(dict(r=2, lora_alpha=2) | extra)), refused(
            file, str(file)
        )
    torch.save(GOOD, tmp_path / 'p.bin'), refused(tmp_path / 'p.bin', 'only .safetensors')


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in '', './none', '/none/x', '~/none-such/x', 'word', 'here/none/sub':
        (tmp_path / 'here').mkdir(exist_ok=True)
        monkeypatch.setattr(merge_lora, '_fetch', lambda *a: pytest.fail(f'asked the hub for {a}'))
        with pytest.raises(BadInput, match='adapter'):
            merge_lora.find(path)
    monkeypatch.undo(), monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.find('here')
    (tmp_path / 'here/w.bin').touch()
    with pytest.raises(BadInput, match='w.bin'):
        merge_lora.find('here')
    order = ['z.safetensors', 'adapter_model.safetensors', 'pytorch_lora_weights.safetensors']
    for name in order:
        (tmp_path / 'here' / name).touch()
        assert merge_lora.find('here').name == name
    for name in order[1:]:
        (tmp_path / 'here' / name).unlink()
    (tmp_path / 'here/y.safetensors').touch()
    with pytest.raises(BadInput, match='y.safetensors, z.safetensors'):
        merge_lora.find('here')


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub as hub
    asked = []

    def snapshot(repo, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns, ignore_patterns))
        return str(tmp_path)

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)
    monkeypatch.setattr(hub, 'snapshot_download', snapshot), monkeypatch.setattr(
        hub, 'hf_hub_download', download
    )
    save_dir = tmp_path / 'Teacher/lora'
    merge_lora.write_adapter(save_dir, {'x': (A, B)})
    assert merge_lora.find('owner-x/repo/Teacher/lora') == save_dir / merge_lora.FILES[0]
    assert asked == [
        (
            'owner-x/repo',
            ['Teacher/lora/*.safetensors', 'Teacher/lora/adapter_config.json'],
            ['Teacher/lora/*/*'],
        )
    ]
    from fnmatch import fnmatch  # what the hub's filter does: nothing below the folder asked for
    assert fnmatch('Teacher/lora/sub/m.safetensors', asked[0][2][0]) and not fnmatch(
        'Teacher/lora/m.safetensors', asked[0][2][0]
    )
    asked.clear()
    assert (
        merge_lora.find(f'owner-x/repo/Teacher/lora/{merge_lora.FILES[1]}') == save_dir / merge_lora.FILES[1]
    )
    assert asked == [
        ('owner-x/repo', 'Teacher/lora/adapter_config.json'),
        ('owner-x/repo', f'Teacher/lora/{merge_lora.FILES[1]}'),
    ]
    with pytest.raises(BadInput, match='owner-x/repo/none.*by hand'):
        merge_lora.find('owner-x/repo/none')

    def fails(*a, **k):
        raise hub.errors.LocalEntryNotFoundError('no network\nsecond line')
    monkeypatch.setattr(hub, 'snapshot_download', fails)
    with pytest.raises(BadInput, match='owner-x/repo .*no network.*by hand.*hf auth login'):
        merge_lora.find('owner-x/repo')


def test_fit_refuses():
    ok = {'a': (A, B, 1.0)}
    for shapes in {'b': (5, 6)}, {'a': (5, 7)}, {'a': (4, 6)}, {'a': (5,)}, {'a': (5, 6, 3, 3)}:
        with pytest.raises(BadInput, match='me belongs to another model.*1 of 1.* a '):
            merge_lora.fit(ok, shapes, 'me')
    with pytest.raises(BadInput, match='a second time'):
        merge_lora.fit({'a.b': ok['a'], 'lora_unet_a_b': ok['a']}, {'a.b': (5, 6)})
    with pytest.raises(BadInput, match='7 of 7.*m4.*7 in all') as e:
        merge_lora.fit({f'm{i}': ok['a'] for i in range(7)}, {'a': (5, 6)})
    assert 'm5' not in str(e.value)
    with pytest.raises(BadInput, match='different models.*a'):
        merge_lora.merge([ok, {'a': (A[:, :3], B, 1.0)}], [1, 1])


def test_model_folder_refusals(tmp_path):
    with pytest.raises(BadInput, match='no model folder'):
        merge_lora.model_shapes(tmp_path)
    (tmp_path / 'unet').mkdir()
    with pytest.raises(BadInput, match='nothing'):
        merge_lora.model_shapes(tmp_path)
    name = tmp_path / 'unet/diffusion_pytorch_model.safetensors.index.json'
    name.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(BadInput, match='gone.safetensors'):
        merge_lora.model_shapes(tmp_path)


# -------------------- the script
def script(*argv):
    p = subprocess.run(
        [sys.executable, str(ROOT / 'merge_lora.py'), *map(str, argv)], capture_output=True, text=True
    )
    return p.returncode, p.stdout + p.stderr


def test_script(tmp_path, capsys):
    pipe = build('sd15').pipe
    net = net_of(pipe)
    model = save_model(pipe, tmp_path / 'model')
    a, b = make(net, 'sd15', 1), make(net, 'sd15', 2, r=3)
    pa, pb = pack(a, 'peft', tmp_path / 'a', 'sd15'), pack(b, 'lora_unet_', tmp_path / 'b', 'sd15')
    rc, text = script(
        f'--adapters={pa},{pb}', '--weights', '0.7,0.3', f'--out={tmp_path}/m', f'--model={model}', '--rank=4'
    )
    assert rc == 0 and 'relative error' in text and '0.700' in text, text
    merge_lora.main(['--adapters', f'{pa},{pb}', f'--out={tmp_path}/e', f'--model={model}'])
    assert same(merge_lora.read_adapter(tmp_path / 'e'), merge_lora.merge([a, b], [0.5, 0.5]))
    assert same(merge_lora.read_adapter(tmp_path / 'm'), merge_lora.merge([a, b], [0.7, 0.3], 4), 1e-5)
    merge_lora.main([f'--adapters={pa},{pb}', f'--out={tmp_path}/t', f'--into_base={model}', '--weights=1,1'])
    loaded = type(net).from_pretrained(tmp_path / 't').eval()
    want = output(added(added(net, a), b), 'sd15')
    assert (output(loaded, 'sd15') - want).abs().max() < 1e-5
    merge_lora.main(
        [f'--adapters={pa}', f'--out={tmp_path}/u']
    )  # no model folder: the block names tell a UNet
    pipe.load_lora_weights(tmp_path / 'u')
    assert (output(net, 'sd15') - output(added(build('sd15').pipe.unet, a), 'sd15')).abs().max() < 2e-5
    capsys.readouterr()
    for argv, word in [
        ([], 'give --adapters'),
        ([f'--adapters={pa}'], 'give --adapters'),
        ([f'--adapters={pa}', '--weights=1,2', '--out=x'], '1 adapters'),
        ([f'--adapters={pa}', '--weights=nan', '--out=x'], 'finite'),
        ([f'--adapters={pa}', '--weights=a', '--out=x'], 'numbers'),
        ([f'--adapters={pa}', f'--out={tmp_path}/e'], 'not an empty folder'),
        ([f'--adapters={pa}', '--rank=-1', '--out=x'], 'negative'),
        ([f'--adapters={pb}', '--out=x'], '--model'),
        ([f'--adapter={pb}', '--out=x'], 'did you mean adapters'),
    ]:
        with pytest.raises(BadInput, match=word):
            merge_lora.main(argv)
    assert script()[0] == 2


# ------------------------------------------------------------------------------------------------------------
# The trainer and the teachers' trainer

SHAPES = ROOT / 'data' / 'shapes'
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


# ----------------------------------------------------------------------------------------------------
# What the tests are made of

LAYERS = [f'transformer_blocks.3.attn.{k}' for k in ('to_q', 'to_v', 'to_out.0')] + ['proj_out']


def random_lora(folder, seed, size=0.3, rank=2, layers=LAYERS):
    """A teacher: random factors on layers of the shapes world's transformer."""
    g, shapes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(SHAPES / 'base')
    draw = lambda n, m: torch.randn(n, m, generator=g) / m ** 0.5
    factors = {k: (draw(rank, shapes[k][1]), size * draw(shapes[k][0], rank), 1.0) for k in layers}
    merge_lora.write_adapter(folder, factors)
    return str(folder)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Two teachers, a file of prompts and one of edits, and the arguments of small runs on them."""
    at = tmp_path_factory.mktemp('world')
    prompts = [f'a {c} {s} on {b}' for c in ('red', 'green') for s in ('circle', 'square')
               for b in ('white', 'black')]
    (at / 'words.csv').write_text('prompt\n' + '\n'.join(prompts) + '\n')
    edits = files.read_data([SHAPES / 'local_edit.csv'])[0]['local_edit']
    heads = ['prompt', 'source_image', 'target_image']
    lines = [heads] + [[edits[i][k] for k in heads] for i in range(8)]
    (at / 'edits.csv').write_text('\n'.join(map(','.join, lines)))
    (at / 'judges.py').write_text(textwrap.dedent('''
        def constant(images, rows):
            return [0.5] * len(rows)

        def short(images, rows):
            return [0.5] * (len(rows) - 1)

        def nan(images, rows):
            return [float('nan')] * len(rows)

        def bright(images, rows):
            return images.mean((1, 2, 3)).tolist()

        def very_bright(images, rows):
            return (1e5 * images.mean((1, 2, 3))).tolist()

        asked = []

        def tired(images, rows):                               # of the third question on
            asked.append(rows)
            return [float(k) for k in range(len(rows) - (len(asked) > 2))]
    '''))
    one, two = random_lora(at / 'one', 1), random_lora(at / 'two', 2)
    common = dict(model=str(SHAPES / 'base'), device='cpu', eval_data=[], rank=4, alpha=8.0,
                  lora_targets=LAYERS, lr=2e-2, lr_schedule='constant', warmup=1, batch_size=8,
                  micro_batch=8, steps=3, max_steps=4, score='', eval_samples=3, show=1, sample_steps=1,
                  ema_decay=0.9, log_every=1, save_every=1000, eval_every=1000)
    opd = dict(common, teachers=[dict(name='base'), dict(name='one', lora=one), dict(name='two', lora=two)],
               routes=[dict(teacher='one', data='words'), dict(teacher='two', data='edits')],
               init_from='base', data=[str(at / 'words.csv'), str(at / 'edits.csv')])
    teacher = dict(common, data=[str(at / 'words.csv')], reward=[dict(reward=f'{SHAPES}/world.py:reward')])

    def words(settings):
        def argv(out, **more):
            plain = {k: v for k, v in settings.items()         # imitation has no rollouts
                     if more.get('method') != 'sft' or k not in train_teacher.ROLLOUT.split()}
            return [f'--{k}={v!r}' for k, v in (plain | dict(more, out_dir=str(out))).items()]
        return argv
    return SimpleNamespace(
        at=at, one=one, two=two, opd=words(opd), teacher=words(teacher),
        distil=lambda *a, **more: run(train_opd.main, words(opd)(*a, **more)),
        teach=lambda *a, **more: run(train_teacher.main, words(teacher)(*a, **more)))


def run(main, argv):
    """main in this process. Returns the run folder; the test process keeps its own answer to SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Path(next(a for a in argv if a.startswith('--out_dir='))[11:-1])


def python(*words):
    """A process of its own, in the repository."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)


def state(out, step):
    return torch.load(out / f'step_{step:06d}' / 'train_state.pt', weights_only=True)


def first_gradient(out):
    """Of a run's first step, as its optimizer remembers it: times a constant."""
    return torch.cat([x['exp_avg'].flatten() for x in state(out, 1)['optimizer']['state'].values()])


def log(out, key):
    rows = map(json.loads, (out / 'log.jsonl').read_text().splitlines())
    return [r[key] for r in rows if key in r]


def same_state(a, b):
    """Weights, average and optimizer, bit for bit."""
    for part in ('student', 'ema'):
        assert list(a[part]) == list(b[part]) and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    x, y = a['optimizer']['state'], b['optimizer']['state']
    assert list(x) == list(y) and all(torch.equal(x[i][k], y[i][k]) for i in x for k in x[i])


def resumes_exactly(main, argv, out, half, full):
    """The run that is in `out` is the same as its first half, stopped, resumed from a copy, and finished."""
    copy = out.with_name(out.name + '_copy')
    shutil.copytree(out, copy, symlinks=True)
    shutil.rmtree(copy / f'step_{full:06d}')
    assert not all(torch.equal(a, b) for a, b in zip(state(out, half)['student'].values(),
                                                     state(out, full)['student'].values()))
    argv = [a for a in argv if not a.startswith('--out_dir')]
    run(main, [*argv, f'--out_dir={str(copy)!r}', '--init_from=resume'])
    same_state(state(out, full), state(copy, full))
    assert log(out, 'loss') == log(copy, 'loss') and len(log(out, 'loss')) == full


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def sigma4(x):
    return torch.as_tensor(x).view(1, 1, 1, 1)


# ----------------------------------------------------------------------------------------------------
# train_opd.py: the flow and the losses

# Computed with four published implementations; cps is Flow-CPS, ode takes no noise whatever eta says.
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
    ('ode', 0.7, 0.7072785, 0.6021506,
     [2.887452, -0.592193, 0.7641], [1.563096, 0.133333, 0.253118],
     [2.723127, -0.60621, 0.73749], 0.0)]


@pytest.mark.parametrize('kind, eta, sigma, sigma_next, z, v, mean, std', GOLDEN)
def test_transition_is_that_of_the_published_code(kind, eta, sigma, sigma_next, z, v, mean, std):
    x = torch.tensor(z).view(1, -1, 1, 1)
    eta = 0.0 if kind == 'ode' else eta
    m, s = train_opd.transition(x, torch.tensor(v).view_as(x), sigma4(sigma), sigma4(sigma_next), eta, kind)
    assert m.flatten().tolist() == pytest.approx(mean, abs=1e-5) and s.item() == pytest.approx(std, abs=1e-5)


def test_log_prob_is_the_mean_over_dimensions():
    x, mean, std = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3, 1, 1, 1) + 0.1
    want = Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(train_opd.log_prob(x, mean, std), want)


@pytest.mark.parametrize('kind, eta', [('flow', 0.7), ('dance', 0.3), ('cps', 0.7)])
@pytest.mark.parametrize('sigma, sigma_next', [(1.0, 0.9), (0.6, 0.2)])
def test_diffusionopd_is_the_kl_of_two_gaussians(kind, eta, sigma, sigma_next):
    z, v, v_t = torch.randn(3, 4, 2, 2, 2)
    s, t = torch.full((4,), sigma), torch.full((4,), sigma_next)
    step = lambda x: train_opd.transition(z, x, train_opd.col(s), train_opd.col(t), eta, kind)
    steps = [Normal(*torch.broadcast_tensors(*step(x))) for x in (v, v_t)]
    want = kl_divergence(*steps).flatten(1).mean(1)
    for var, factor in (('true', 1), ('code', s - t)):
        loss = train_opd.diffusionopd_loss(v, v_t, s, t, eta, kind, var)
        torch.testing.assert_close(loss, want * factor, rtol=1e-4, atol=1e-6)


def test_the_odes_weight_is_the_limit_of_the_kl_times_the_variance():
    s, t = torch.tensor([1.0, 0.7]), torch.tensor([0.8, 0.1])
    ode = train_opd.kl_weight(s, t)
    torch.testing.assert_close(ode, (s - t) ** 2 / 2)
    for kind in ('flow', 'dance'):
        _, std = train_opd.transition(s, s, s, t, 1e-3, kind)
        torch.testing.assert_close(train_opd.kl_weight(s, t, 1e-3, kind) * std ** 2, ode, rtol=1e-3, atol=0)


def policy_gradients(estimator, grouped, n=64000, group=16):
    """Gradients of Flow-OPD's loss by the velocity, one a draw, at three states; and the KL's own there."""
    torch.manual_seed(0)
    z0, v0, v_t = torch.randn(3, 3, 6, 1, 1)
    s, t, eta = torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.7, 0.5, 0.1]), 0.7
    drawn, exact = [], []
    for k in range(3):
        sigma, sigma_next = s[k].expand(n), t[k].expand(n)
        at = lambda v: train_opd.transition(z0[k].expand_as(v), v, sigma4(s[k]), sigma4(t[k]), eta)
        v = v0[k].expand(n, -1, -1, -1).clone().requires_grad_()
        mean, std = at(v)
        action = (mean + std * torch.randn(n, 6, 1, 1)).detach()
        logp = train_opd.log_prob(action, mean, std)
        logp_t = train_opd.log_prob(action, *at(v_t[k].expand_as(v)))
        kl = train_opd.diffusionopd_loss(v, v_t[k].expand_as(v), sigma, sigma_next, eta)
        exact.append(torch.autograd.grad(kl.sum(), v, retain_graph=True)[0][0].flatten())
        reward = train_opd.flowopd_reward(estimator, logp_t, logp.detach(), kl.detach())
        advantage = train_opd.group_advantage(reward, group, 100.0) if grouped else reward
        loss, ratio = train_opd.flowopd_loss(logp, logp.detach(), kl, advantage, estimator, 1e-4, 100.0)
        assert (ratio == 1).all()
        drawn.append(torch.autograd.grad(loss.sum(), v)[0].flatten(1))
    return drawn, exact


@pytest.mark.parametrize('estimator, grouped', [('k1', False), ('k1', True), ('code', False)])
def test_flowopds_mean_gradient_is_the_kls(estimator, grouped):
    for draws, exact in zip(*policy_gradients(estimator, grouped)):
        assert cosine(draws.mean(0), exact) > 0.99


def test_flowopd_as_the_paper_has_it_is_a_no_op():
    z_scores = {}
    for estimator in ('paper', 'k1'):
        draws = policy_gradients(estimator, False)[0]
        assert all(d.std(0).min() > 0 for d in draws)
        z_scores[estimator] = torch.stack([d.mean(0).abs() / (d.std(0) / len(d) ** 0.5) for d in draws])
    assert z_scores['paper'].max() < 4 and z_scores['k1'].amax(1).min() > 20
    assert all((d == 0).all() for d in policy_gradients('paper', True)[0])  # alike within a group


def test_group_advantage():
    r = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 0.0, 9.0])
    root = 3 ** 0.5
    for clip, most in ((5.0, 2 / root), (0.8, 0.8)):
        want = [-min(1, clip), 0, min(1, clip), 0, 0, 0, -1 / root, -1 / root, most]
        assert train_opd.group_advantage(r, 3, clip).tolist() == pytest.approx(want, abs=1e-5)
    want = (r.view(3, 3) - r.view(3, 3).mean(1, keepdim=True)).flatten() / r.std()
    torch.testing.assert_close(train_opd.group_advantage(r, 3, std=r.std()), want, rtol=1e-4, atol=1e-5)


def test_ppo_loss_is_clipped_both_ways():
    logp = torch.tensor([1.1, 1.1, 0.9, 0.9]).log().requires_grad_()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    loss, ratio = train_opd.ppo_loss(logp, torch.zeros(4), advantage, 0.05)
    assert ratio.tolist() == pytest.approx([1.1, 1.1, 0.9, 0.9]) and not ratio.requires_grad
    assert loss.tolist() == pytest.approx([-2.1, 2.2, -1.8, 1.9])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, 2.2, -1.8, 0])  # what is clipped has no gradient


# ----------------------------------------------------------------------------------------------------
# train_opd.py: plan and rollout

ROUTES = [dict(teacher='a', data='x', weight=1.0), dict(teacher='b', data='y', weight=3.0)]


def as_dicts(samples):
    return [vars(s) for s in samples]


@pytest.mark.parametrize('per_step', [1, 'all', 'sample'])
def test_a_plan_depends_on_seed_and_step_alone(per_step):
    one = lambda step, seed: as_dicts(train_opd.plan(step, seed, ROUTES, [50, 70], 16, per_step, group=2))
    first = one(3, 0)
    random.seed(7), torch.manual_seed(7)
    assert one(3, 0) == first and one(4, 0) != first and one(3, 1) != first
    assert all(0 <= s['row'] < [50, 70][s['route']] for s in first)
    for a, b in zip(first[0::2], first[1::2]):
        assert (a['group'], a['row'], a['route']) == (b['group'], b['row'], b['route'])
    assert len({s['row'] for s in first}) > 1 and [s['number'] for s in first] == list(range(16))


def test_any_number_of_processes_takes_the_same_samples():
    rows = [dict(prompt=str(i), source_image='') for i in range(40)]
    c, d = SimpleNamespace(seed=5, batch_size=24, group_size=2), SimpleNamespace(buckets=dict(x=rows, y=rows))

    def taken(size):
        got = []
        for rank in range(size):
            run = SimpleNamespace(c=c, d=d, world=SimpleNamespace(rank=rank, size=size))
            mine = train_opd.Run.mine(run, 2, ROUTES)
            assert all(a.group == b.group for a, b in zip(mine[0::2], mine[1::2])) and len(mine) == 24 // size
            got += [(s.number, s.route, s.data['prompt'], s.share, torch.randn(2, generator=s.noise).tolist(),
                     torch.randn(2, generator=s.draws).tolist()) for s in mine]
        return sorted(got)
    assert taken(1) == taken(2) == taken(3) == taken(12)
    assert len({str(s[4]) for s in taken(1)} | {str(s[5]) for s in taken(1)}) == 48  # all streams differ


def test_routes_of_a_step():
    steps = lambda **k: [train_opd.plan(i, 0, ROUTES, [50, 70], 16, **k) for i in range(400)]
    one, every, free = steps(per_step=1), steps(per_step='all'), steps(per_step='sample')
    assert all(len({s.route for s in p}) == 1 for p in one)
    assert sum(p[0].route for p in one) / 400 == pytest.approx(0.75, abs=0.07)
    assert sum(s.route for p in free for s in p) / 6400 == pytest.approx(0.75, abs=0.02)
    assert all([s.route for s in p] == [0] * 8 + [1] * 8 for p in every)
    cycle = [p[0].route for p in steps(per_step=1, cycle=['y', 'x', 'y'])]
    assert cycle[:6] == [1, 0, 1, 1, 0, 1] and all(len({s.route for s in p}) == 1 for p in one)
    for p in one[:20] + free[:20]:
        assert all(s.share == 1 / 16 for s in p)
    for p in every[:20]:  # a route counts by weight, not by its samples
        assert [sum(s.share for s in p if s.route == r) for r in (0, 1)] == pytest.approx([0.25, 0.75])
    parts = [dict(ROUTES[0], samples=4), dict(ROUTES[1], samples=12)]
    p = train_opd.plan(0, 0, parts, [50, 70], 16, 'all', group=2)
    assert [s.route for s in p] == [0] * 4 + [1] * 12
    assert [sum(s.share for s in p if s.route == r) for r in (0, 1)] == pytest.approx([0.25, 0.75])
    assert [s.slot for s in p] == [*range(4), *range(12)] and [s.of for s in p] == [4] * 4 + [12] * 12


def test_draw_indices():
    line = torch.linspace(1, 0, 17)
    shifted = 3 * line / (1 + 2 * line)
    draw = lambda k=1, n=3000, s=line, **more: [
        train_opd.draw_indices(train_opd.rng(i), k, s, **more) for i in range(n)]
    mean = lambda bias: sum(i for x in draw(bias=bias) for i in x) / 3000
    assert mean('low') == pytest.approx(10.93, abs=0.2) and mean('mid') == pytest.approx(7.5, abs=0.2)
    assert mean('high') == pytest.approx(4.07, abs=0.2) and mean('uniform') == pytest.approx(7.5, abs=0.35)
    for bias in ('low', 'mid', 'high', 'uniform', 'stratified'):
        for k in (2, 8, 16):
            for x in draw(k, 40, bias=bias):
                assert x == sorted(set(x)) and len(x) == k and 0 <= x[0] and x[-1] < 16
    sigma = lambda space: sum(float(shifted[i]) for i, in draw(s=shifted, bias='low', space=space)) / 3000
    assert sigma('sigma') == pytest.approx(2 / 7, abs=0.03) and sigma('index') > 0.5
    spread = lambda k, of: sorted(i for slot in range(of) for i in train_opd.draw_indices(
        train_opd.rng(slot), k, line, 'stratified', 'index', slot, of))
    assert spread(1, 16) == spread(2, 8) == [*range(16)] and spread(1, 32) == sorted([*range(16)] * 2)


def test_a_stochastic_rollout_has_the_transitions_mean_and_deviation():
    n, sigmas = 4000, torch.tensor([0.9, 0.6, 0.0])
    z, v = torch.full((n, 2, 1, 1), 0.3), lambda z, s, alive: torch.full_like(z, 0.5)
    for kind, eta in (('flow', 0.7), ('dance', 0.3), ('cps', 0.5)):
        streams = [torch.Generator().manual_seed(i) for i in range(n)]
        _, (_, _, x), _ = train_opd.rollout(v, z, sigmas, [2] * n, eta, kind, streams)
        mean, std = train_opd.transition(sigma4(0.3), sigma4(0.5), sigmas[0], sigmas[1], eta, kind)
        assert x.mean().item() == pytest.approx(mean.item(), abs=4 * std.item() / (2 * n) ** 0.5)
        assert x.std().item() == pytest.approx(std.item(), rel=0.04)
        apart = torch.corrcoef(torch.cat([x[:-1, :, 0, 0], x[1:, :, 0, 0]], 1).T) - torch.eye(4)
        assert apart.abs().max() < 0.08  # dimensions and samples are independent


def test_a_sample_leaves_the_rollout_at_its_last_index():
    asked, sigmas = [], torch.linspace(1, 0, 6)

    def velocity(z, s, alive):
        asked.append((alive, s.tolist()))
        return torch.ones_like(z)
    z = torch.arange(4.0).view(4, 1, 1, 1)
    walk = train_opd.rollout(velocity, z, sigmas, [2, 0, 4, 2])
    seen = [(i, alive, x.flatten().tolist()) for i, alive, x in walk]
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [alive for _, alive, _ in seen] == [[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [2], [2]]
    assert [alive for alive, _ in asked] == [[0, 2, 3], [0, 2, 3], [2], [2]]
    for (i, alive, x), (_, s) in zip(seen, asked):
        assert x == pytest.approx([j - 0.2 * i for j in alive]) and s == [pytest.approx(1 - 0.2 * i)] * len(s)


def test_a_velocity_that_is_sent_back_is_used_instead_of_another_forward():
    def velocity(z, s, alive):
        raise AssertionError('computed twice')
    walk = train_opd.rollout(velocity, torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.5, 0.0]), [2, 1])
    _, alive, z = next(walk)
    _, alive, z = walk.send(torch.tensor([3.0, 5.0]).view(2, 1, 1, 1))
    assert alive == [0, 1] and z.flatten().tolist() == [-1.5, -2.5]
    _, alive, z = walk.send(torch.tensor([7.0, 9.0]).view(2, 1, 1, 1))
    assert alive == [0] and z.flatten().tolist() == [-5.0]


# ----------------------------------------------------------------------------------------------------
# train_opd.py: runs

def test_danceopd_costs_no_more_forwards_than_it_needs(world, tmp_path):
    count = 0

    def hook(module, args, output):
        nonlocal count
        count += len(output[0]) if type(module).__name__ == 'SD3Transformer2DModel' else 0
    handle, total = torch.nn.modules.module.register_module_forward_hook(hook), []
    try:
        for steps in (1, 5):  # the difference is what four steps cost
            count = 0
            world.distil(tmp_path / str(steps), max_steps=steps, steps=16, query='low', batch_size=32,
                         micro_batch=32, eval_samples=1, routes=[dict(teacher='one', data='words')])
            total.append(count)
    finally:
        handle.remove()
    assert 12 < (total[1] - total[0]) / (4 * 32) < 13.9  # 10.9 of the rollout, one each to learn


METHODS = dict(
    danceopd=dict(queries=2),
    diffusionopd=dict(),
    flowopd=dict(reward='code', eta=0.7, group_size=4, updates=2, clip_range=1e-2, anchor='base',
                 anchor_beta=1e-3))


@pytest.mark.parametrize('method', METHODS)
def test_each_method_closes_the_gap_and_resumes_bit_for_bit(method, world, tmp_path):
    teachers = [dict(name='near', lora=random_lora(tmp_path / 'near', 3, layers=['proj_out']))]
    argv = world.opd(tmp_path / 'run', method=method, max_steps=16, save_every=8, ckpt_keep=3,
                     teachers=teachers, lora_targets=['proj_out'], ema_decay=0.8,
                     routes=[dict(teacher='near', data='words'), dict(teacher='near', data='edits')],
                     **METHODS[method])
    out = run(train_opd.main, argv)
    for route in json.loads((out / 'result.json').read_text()).values():
        assert route['gap_after'] < 0.85 * route['gap_before']
    resumes_exactly(train_opd.main, argv, out, 8, 16)


def test_prompts_that_do_not_fit_the_cache_are_encoded_in_chunks_with_the_same_losses(world, tmp_path):
    want = world.distil(tmp_path / 'whole', max_steps=3, steps=2)
    got = world.distil(tmp_path / 'chunks', max_steps=3, steps=2, cache_gb=0.0, encode_every=2)
    assert log(got, 'loss') == pytest.approx(log(want, 'loss'), rel=1e-4)


def test_a_prompt_is_encoded_once_a_chunk():
    field = train_opd.open_field(str(SHAPES / 'base'))
    seen, encode = [], field.encode

    def counted(prompts, edit=False):
        seen.extend((p, edit) for p in prompts)
        return encode(prompts, edit)
    field.encode = counted
    prompts, many = train_opd.Prompts(field), [(f'a {c} circle', False) for c in ('red', 'green', 'blue')]
    prompts.add([('', False), ('', True)], keep=True)
    prompts.add(many + many + [('', False)])
    assert seen == [('', False), ('', True), *many]  # edits have words of their own
    prompts.add(many[1:] + [('a red square', False), ('', True)])      # the next chunk: one is new
    assert seen[5:] == [('a red square', False)] and prompts.encoded == 6
    with pytest.raises(KeyError):                                      # and one has gone
        prompts[many[0]]
    field.encode = encode
    alone = encode(['a green circle'])[0]
    for k, x in prompts['a green circle', False].items():
        torch.testing.assert_close(x, alone[k], rtol=1e-4, atol=1e-5)


def test_two_hundred_thousand_rows_take_little_memory(tmp_path):
    for n in (2000, 200000):
        lines = (f'"a prompt of several words, as people write them: {i}",t\n' for i in range(n))
        (tmp_path / f'{n}.csv').write_text('prompt,task\n' + ''.join(lines))
    code = '''if True:
        import resource, sys, files
        for n in (2000, 200000):
            buckets, errors = files.read_data([f'{sys.argv[1]}/{n}.csv'])
            assert not errors and len(buckets['t']) == n
            assert buckets['t'][n - 1]['prompt'].endswith(f': {n - 1}')
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
    '''
    p = python('-c', code, tmp_path)
    assert p.returncode == 0, p.stderr
    few, many = map(int, p.stdout.split())
    assert many - few < 60


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    file = tmp_path / 'a.txt'
    file.write_text('a red square\na blue circle\n')
    bucket = read_data([file])[0]['a']
    assert [bucket[i]['prompt'] for i in range(2)] == ['a red square', 'a blue circle']
    file.write_text('a green square\na blue circle\n')                 # its second row begins elsewhere now
    with pytest.raises(BadInput, match='a.txt was changed'):
        bucket[1]


@pytest.mark.parametrize('name, text, says', [
    ('a.csv', 'prompt,task\na red circle, on white,t2i\n', '1 fields more than columns'),
    ('a.jsonl', '{"prompt": "a"}\n[1, 2]\n', 'not a row with names'),
    ('a.jsonl', '{"prompt": 5}\n', 'prompt should be text, not 5')])
def test_rows_that_would_be_changed_are_refused(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f'{name}: cannot be read near byte .*{says}'):
        files.open_buckets([tmp_path / name], [])


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    for name, text in (('a.txt', 'a red circle\n'), ('b.jsonl', '{"prompt": "a red circle"}\n'),
                       ('c.csv', 'prompt\na red circle\n')):
        (tmp_path / name).write_text(text, encoding='utf-8-sig')
        bucket, = read_data([tmp_path / name])[0].values()
        assert bucket[0]['prompt'] == 'a red circle'


def test_a_grid_leaves_out_columns_without_pictures(tmp_path):
    x = torch.rand(4, 3, 24, 24)
    files.grid([[None, x[0], None, x[1]], [None, x[2], None, x[3]]], tmp_path / 'a.png', ['one', 'two'],
               ['source', 'teacher', 'start', 'now'])
    files.grid([[x[0], x[1]], [x[2], x[3]]], tmp_path / 'b.png', ['one', 'two'], ['teacher', 'now'])
    files.grid([[x[0], x[1], None], [x[2], None, x[3]]], tmp_path / 'c.png', ['one', 'two'])
    a, b, c = (np.asarray(Image.open(tmp_path / f'{k}.png')) for k in 'abc')
    assert (a == b).all() and a.shape[1] == 420
    files.grid([[x[0], None, x[1]]], tmp_path / 'd.png', heads=['left', '', 'right'])
    assert Image.open(tmp_path / 'd.png').width == 3 * 124 + 4         # a gap that was asked for
    big = lambda k: (x[k].permute(1, 2, 0) * 255).round().byte().numpy().repeat(5, 0).repeat(5, 1)
    assert (b[20:140, 4:124] == big(0)).all() and (b[20:140, 128:248] == big(1)).all()
    assert (c[4:124, 128:248] == big(1)).all() and (c[146:266, 252:372] == big(3)).all()


def test_a_picture_that_is_cut_off_is_found_before_the_run(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), 'uint8')).save(tmp_path / 'a.png')
    (tmp_path / 'a.csv').write_text('prompt,source_image\nmake it red,a.png\n')
    files.open_buckets([tmp_path / 'a.csv'], [])
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-2000])
    with pytest.raises(BadInput, match='source_image .*a.png does not open'):
        files.open_buckets([tmp_path / 'a.csv'], [])


@pytest.mark.parametrize('method', METHODS)
def test_memory_for_gradients_does_not_grow_with_the_steps(method, world, tmp_path):
    """Bytes that autograd keeps alive at once, counted as they are saved and let go."""
    def peak(steps):
        live = most = 0

        class Kept:
            def __init__(self, x):
                nonlocal live, most
                self.x, self.size = x, x.numel() * x.element_size()
                live += self.size
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.size
        more = {**METHODS[method], 'steps': steps, 'max_steps': 1, 'eval_samples': 1}
        more['queries'] = steps if method == 'danceopd' else 1
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            world.distil(tmp_path / str(steps), method=method, **more)
        return most
    few, many = peak(2), peak(6)
    assert few > 10 ** 5 and many < 1.05 * few


def test_steps_without_a_finite_gradient_are_skipped_counted_and_end_the_run(world, tmp_path):
    huge = random_lora(tmp_path / 'huge', 3, size=1e30)
    more = dict(teachers=[dict(name='one', lora=world.one), dict(name='huge', lora=huge)],
                steps=2, max_bad_steps=2, routes_per_step=1,
                routes=[dict(teacher='one', data='words'), dict(teacher='huge', data='edits')])
    out = world.distil(tmp_path / 'some', cycle=['words', 'edits', 'words', 'edits'], **more)
    assert log(out, 'skipped') == [0, 1, 1, 2]
    assert all(x.isfinite().all() for x in state(out, 4)['student'].values())
    at = tmp_path / 'all'
    with pytest.raises(RuntimeError, match=r'2 updates in a row .* route edits, sigma [01]\.\d{3}.*lower lr'):
        world.distil(at, cycle=['words', 'edits', 'edits', 'edits'], save_every=1, **more)
    more |= dict(routes_per_step='all', routes=[dict(teacher='huge', data='words'),
                                                dict(teacher='one', data='edits')])  # learned from last
    with pytest.raises(RuntimeError, match='2 updates in a row .* route words, sigma'):
        world.distil(tmp_path / 'first', **more)
    assert files.newest(at).name == 'step_000002'  # saved before the run gave up
    assert all(x.isfinite().all() for x in state(at, 2)['student'].values())


# A run is started over and over and killed, at random and while it saves; then it is finished.
KILLED = '''if True:
    import os, random, signal, sys, time, torch, diffusers, transformers, files, train_opd
    from pathlib import Path
    random.seed(0)
    argv = sys.argv[1:]
    out = Path(next(a for a in argv if a.startswith('--out_dir='))[11:-1])

    def start(*more):
        if pid := os.fork():
            return pid
        sys.stdout = open(os.devnull, 'w')
        train_opd.main([*argv, *more, *['--init_from=resume'] * bool(files.newest(out))])
        os._exit(0)

    for k in range(6):
        before, pid, t0 = files.newest(out), start(), time.time()
        while files.newest(out) == before and time.time() - t0 < 200:  # it gets at least one step further
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        while k % 2:                                                   # stop, and look: is it saving?
            os.kill(pid, signal.SIGSTOP), os.waitpid(pid, os.WUNTRACED)
            if list(out.glob('.writing_step_*')):
                break
            os.kill(pid, signal.SIGCONT), time.sleep(random.uniform(0, 0.005))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, 'it ended before it was killed'
        for whole in (files.newest(out), (out / 'latest').resolve()):
            torch.load(whole / 'train_state.pt', weights_only=True), (whole / 'meta.json').read_text()
    last = int(files.newest(out).name[5:]) + 3
    assert os.waitpid(start(f'--max_steps={last}'), 0)[1] == 0
    print(last)
'''


def test_a_killed_run_is_resumable_and_loses_nothing(world, tmp_path):
    more = dict(max_steps=10 ** 6, save_every=1, steps=1, batch_size=4, eval_samples=1, ckpt_keep=2)
    argv = world.opd(tmp_path / 'killed', **more)
    p = python('-c', KILLED, *argv)
    assert p.returncode == 0, p.stderr[-2000:]
    last = int(p.stdout)
    whole = world.distil(tmp_path / 'whole', **more | dict(save_every=last, max_steps=last))
    same_state(state(tmp_path / 'killed', last), state(whole, last))
    assert log(tmp_path / 'killed', 'loss') == log(whole, 'loss')
    left = sorted(p.name for p in (tmp_path / 'killed').glob('*step_*'))
    assert left == [f'step_{last - 1:06d}', f'step_{last:06d}']
    assert not list((tmp_path / 'killed').glob('.writing*'))


def test_a_resume_continues_its_own_line_in_wandb_and_a_new_run_has_another(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda id, **k: ids.append(id)))
    for resumed in (None, 3, None):
        files.Log(tmp_path, resumed, wandb_log=True)
    assert ids[0] == ids[1] != ids[2]


def test_sigterm_saves_and_ends_well(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=100000, steps=1, eval_samples=1)
    p = subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, env=ONE_THREAD, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for line in p.stdout:
            if line.startswith('step      2 '):
                p.send_signal(signal.SIGTERM)
                break
        said, errors = p.communicate(timeout=300)
    finally:
        p.kill()
    last = files.newest(tmp_path / 'run')
    assert p.returncode == 0, errors
    assert f'asked to stop: saved {last}; continue with --init_from=resume' in said
    step = json.loads((last / 'meta.json').read_text())['step']
    assert last.name == f'step_{step:06d}' and 2 <= step < 100000


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_processes_are_one(world, tmp_path):
    """Gradients after one step, velocities after five; a launch for all that deals samples differently."""
    more = dict(max_steps=5, save_every=1, ckpt_keep=9, steps=2, eval_samples=2, lr=2e-3)
    jobs = [('opd', train_opd.main, world.opd, dict(more, batch_size=8)),
            ('grpo', train_teacher.main, world.teacher,
             dict(more, method='grpo', group_size=4, batch_size=16, global_std=True)),
            ('sdpo', train_teacher.main, world.teacher, dict(more, method='sdpo', group_size=2, steps=3))]
    code = '''if True:
        import json, sys, train_opd, train_teacher
        for name, argv in json.loads(sys.argv[1]):
            (train_opd if name == 'opd' else train_teacher).main(argv)
    '''
    (tmp_path / 'both.py').write_text(textwrap.dedent(code))
    argvs = json.dumps([(name, argv(tmp_path / f'{name}2', **m)) for name, _, argv, m in jobs])
    p = python('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
               f'--master_port={free_port()}', tmp_path / 'both.py', argvs)
    assert p.returncode == 0, p.stderr[-3000:]
    for name, main, argv, m in jobs:
        one, two = run(main, argv(tmp_path / name, **m)), tmp_path / f'{name}2'
        a, b = first_gradient(one), first_gradient(two)
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()
        teachers = [dict(name=f'at{k}', lora=str(o / 'step_000005')) for k, o in enumerate((one, two))]
        models = train_opd.Models(train_opd.open_field(str(SHAPES / 'base')), teachers)
        cond = models.field.encode(['a red circle on white'] * 8)
        z = torch.randn(8, *models.field.shape(24, 24))
        with torch.no_grad():
            base, a, b = (models.velocity(k, z, torch.full((8,), 0.5), cond) for k in ('base', 'at0', 'at1'))
        assert (a - b).norm() < 1e-3 * (a - base).norm()  # of what was learned


def test_machines_that_do_not_share_the_run_folder_are_told(world, tmp_path):
    """Each would resume from what it finds: nothing, or other weights than the others."""
    run = world.distil(tmp_path / 'run', max_steps=1)
    env = ONE_THREAD | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    argvs = [world.opd(out, max_steps=2, init_from='resume') for out in (run, tmp_path / 'empty')]
    ps = [subprocess.Popen([sys.executable, 'train_opd.py', *argv], cwd=ROOT, env=env | dict(RANK=str(rank)),
                           text=True, stderr=subprocess.PIPE) for rank, argv in enumerate(argvs)]
    for p in ps:
        errors = p.communicate(timeout=300)[1]
        assert p.returncode == 2 and 'one folder for all machines' in errors


def test_scorers_are_asked_once_a_picture_and_each_process_sends_only_its_own(world, tmp_path, monkeypatch):
    sent, gather = [], train_opd.gather

    def spy(world, x):
        sent.extend(y for y in x if isinstance(y, tuple))
        return gather(world, x)
    monkeypatch.setattr(train_opd, 'gather', spy)
    world.distil(tmp_path / 'run', max_steps=1, show=3, eval_samples=3)
    assert sent and all(x.untyped_storage().nbytes() == x.nbytes for _, x in sent)

    monkeypatch.setattr(train_opd, 'gather', lambda world, x: x)       # each for itself
    images, rows, asked = torch.rand(11, 3, 4, 4), [{'prompt': str(i)} for i in range(11)], []

    def judge(images, rows):
        asked.append([int(r['prompt']) for r in rows])
        return images.mean((1, 2, 3)).tolist()
    said = [x for rank in range(3) for x in train_opd.Run.judged(
        SimpleNamespace(c=SimpleNamespace(micro_batch=3), world=SimpleNamespace(rank=rank, size=3)),
        judge, images, rows)]
    assert sorted(sum(asked, [])) == [*range(11)] and max(map(len, asked)) == 3
    assert sorted(said) == pytest.approx(sorted(images.mean((1, 2, 3)).tolist()))


@pytest.mark.parametrize('method, updates', [('flowopd', 2), ('grpo', 4), ('sdpo', 3)])
def test_processes_share_each_update(method, updates):
    """Whatever their number, together they hold the same samples, and each has as much of every update."""
    c = SimpleNamespace(method=method, updates=updates, seed=0, batch_size=32, group_size=2)
    d = SimpleNamespace(buckets=dict(words=[{'prompt': str(i)} for i in range(9)]))

    def dealt(size):
        runs = [SimpleNamespace(c=c, d=d, world=SimpleNamespace(rank=r, size=size)) for r in range(size)]
        deal = 1 if method == 'sdpo' else updates              # whose updates take all groups
        mine = [train_opd.Run.mine(r, 5, [dict(data='words')], updates=deal) for r in runs]
        parts = [[m] if method == 'sdpo' else train_opd.Run.parts(r, m) for r, m in zip(runs, mine)]
        assert len({len(x) for p in parts for x in p}) == 1
        return [sorted((s.number, s.row) for p in parts for s in p[u]) for u in range(len(parts[0]))]
    assert dealt(1) == dealt(2) == dealt(4) and len(dealt(1)[0]) == 32 // (1 if method == 'sdpo' else updates)


def test_a_batch_that_does_not_divide_says_what_would(world, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(BadInput, match='batch_size = 10 does not divide .* nearest that does is 8'):
        train_opd.main(world.opd(tmp_path / 'x', batch_size=10))
    with pytest.raises(BadInput, match='batch_size = 12 does not divide .* nearest that does is 16'):
        train_teacher.main(world.teacher(tmp_path / 'x', method='grpo', group_size=4, batch_size=12))


# ----------------------------------------------------------------------------------------------------
# train_opd.py: mistakes

def broken_adapter(folder, kind):
    """An adapter with one thing wrong, as single file."""
    path = Path(random_lora(folder, 5)) / merge_lora.FILES[0]
    tensors = {k: x for k, x in safetensors.torch.load_file(path).items()}
    for other in set(folder.iterdir()) - {path}:
        other.unlink()
    if kind == 'missing':
        tensors.pop('transformer.proj_out.lora_B.weight')
    if kind == 'surplus':
        tensors['transformer.proj_out.diff'] = torch.ones(2)
    if kind == 'other':
        tensors = {k.replace('blocks.3', 'blocks.77'): x for k, x in tensors.items()}
    if kind == 'wide':
        tensors['transformer.proj_out.lora_A.weight'] = torch.ones(2, 999)
    if kind == 'nan':
        tensors['transformer.proj_out.lora_A.weight'][0] = math.nan
    safetensors.torch.save_file(tensors, path)
    if kind == 'cut':
        path.write_bytes(path.read_bytes()[:-100])
    return str(folder)


MISTAKES = {  # what is said: the settings that are wrong, given the world
    'unknown setting batch_sise, did you mean batch_size': lambda w: dict(batch_sise=4),
    "rank should be int, not str 'many'": lambda w: dict(rank='many'),
    'nowhere.csv: no such data file': lambda w: dict(data=['nowhere.csv']),
    'other.csv: no column "prompt"; it has: text, task': lambda w: dict(
        data=[w.file('other.csv', 'text,task\nhello,words\n')]),
    'source_image .*gone.png does not exist': lambda w: dict(data=[
        str(w.at / 'words.csv'), w.file('gone/edits.csv', 'prompt,source_image\nmake it red,gone.png\n')]),
    "bucket 'edits' has no rows; the data has: words": lambda w: dict(data=[str(w.at / 'words.csv')]),
    "a route names the teacher 'three'; there are: base, one, two": lambda w: dict(
        routes=[dict(teacher='three', data='words')]),
    "teacher 'one': weight must be more than 0, not -1": lambda w: dict(
        teachers=[dict(name='one', lora=w.one, weight=-1)]),
    "route 'words': weight must be more than 0, not -2": lambda w: dict(
        routes=[dict(teacher='one', data='words', weight=-2)]),
    "two teachers are called 'one'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one), dict(name='one', lora=w.two)]),
    'takes a height in multiples of 4 pixels, not 26; the nearest is 2[48]': lambda w: dict(resolution=26),
    'larger than this model': lambda w: dict(resolution=4800),
    "teacher 'one' belongs to another model.*blocks.77.*no such module": lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'other', 'other'))],
        routes=[dict(teacher='one', data='words')]),
    r"teacher 'one' belongs to another model.*proj_out \(\(\d+, 999\)": lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'wide', 'wide'))],
        routes=[dict(teacher='one', data='words')]),
    r'factors without their partner: proj_out \(no B\)': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'missing', 'missing'))]),
    'keys that are no LoRA factors.*transformer.proj_out.diff': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'surplus', 'surplus'))]),
    'cut.*damaged': lambda w: dict(teachers=[dict(name='one', lora=broken_adapter(w.at / 'cut', 'cut'))]),
    'values that are not finite in: .*proj_out.lora_A': lambda w: dict(
        teachers=[dict(name='one', lora=broken_adapter(w.at / 'nan', 'nan'))]),
    'anchor_beta is set but there is no anchor': lambda w: dict(anchor_beta=0.04),
    "states belongs to danceopd; leave it at 'student'": lambda w: dict(method='diffusionopd', states='data'),
    'updates belongs to flowopd; leave it at 1 with': lambda w: dict(updates=2),
    'drop_last belongs to diffusionopd or flowopd': lambda w: dict(drop_last=1),
    "unknown .'guidence'.; known: name lora": lambda w: dict(teachers=[dict(name='one', guidence=2)]),
    "unknown .'wieght'.; known: teacher data": lambda w: dict(
        routes=[dict(teacher='one', data='t2i', wieght=2)]),
    "anchor: no teacher is called 'three'": lambda w: dict(anchor='three', anchor_beta=0.04),
    'group_size = 1: Flow-OPD compares': lambda w: dict(method='flowopd', eta=0.7),
    "kl_var = 'code' is about an SDE's variance": lambda w: dict(method='diffusionopd', kl_var='code'),
    "dtype: 'float16' is not one of": lambda w: dict(dtype='float16'),
    'queries = 5 distinct states cannot be had from 3 steps': lambda w: dict(queries=5),
    "'one': teachers are dict": lambda w: dict(teachers=['one']),
    "'words': teachers are dict.*routes dict": lambda w: dict(routes=['words']),
    "teacher 'one': weight must be more than 0, not '2'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one, weight='2')]),
    "teacher 'one': guidance must be more than 0, not '4.5'": lambda w: dict(
        teachers=[dict(name='one', lora=w.one, guidance='4.5')]),
    'samples must be a whole number': lambda w: dict(
        routes=[dict(teacher='one', data='words', samples='8')], routes_per_step='all'),
    "teacher name 'half': .* none that torch uses": lambda w: dict(teachers=[dict(name='half', lora=w.one)]),
    r'resolution: a number, or \[height, width\]': lambda w: dict(resolution=[24.0, 24]),
    'betas: two numbers from 0 to below 1': lambda w: dict(betas=[0.9])}


@pytest.mark.parametrize('says', MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(says, world, tmp_path):
    def file(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    here = SimpleNamespace(at=tmp_path, one=world.one, two=world.two, file=file)
    shutil.copy(world.at / 'words.csv', tmp_path)
    with pytest.raises(BadInput, match=says):
        train_opd.main(world.opd(tmp_path / 'out', **MISTAKES[says](here)))
    assert not (tmp_path / 'out').exists()


def test_a_mistake_is_one_line_and_exit_code_2(world, tmp_path):
    (tmp_path / 'bad.py').write_text('steps = 4\nbatch_sise = 4\n')
    for word, says in ((tmp_path / 'bad.py', 'bad.py: unknown setting batch_sise, did you mean batch_size?'),
                       ('config/nowhere.py', "no such config file: 'config/nowhere.py'")):
        p = python('train_opd.py', word, f'--out_dir={tmp_path}/out')
        assert p.returncode == 2 and says in p.stderr and p.stderr.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_another_run_is_not_written_over(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=1, steps=1, eval_samples=1)
    out = run(train_opd.main, argv)
    before = listing(out)
    with pytest.raises(BadInput, match=r'run holds another run \(at step_000001\); continue it with --init'):
        run(train_opd.main, argv)
    other = [dict(name='one', lora=world.two), dict(name='two', lora=world.two)]
    with pytest.raises(BadInput, match=f'had another teacher "one" .*{world.one}, now {world.two}'):
        run(train_opd.main, [*argv, f'--teachers={other!r}', '--init_from=resume'])
    with pytest.raises(BadInput, match='holds another adapter than these settings make: rank'):
        run(train_opd.main, [*argv, '--rank=7', '--init_from=resume'])
    with pytest.raises(BadInput, match='has alpha 8.0, not 16.0: resume with the same'):
        run(train_opd.main, [*argv, '--alpha=16.0', '--init_from=resume'])
    assert listing(out) == before
    with pytest.raises(BadInput, match='nothing has no whole checkpoint to resume from'):
        world.distil(tmp_path / 'nothing', init_from='resume')


def test_a_teacher_that_equals_the_base_is_refused(world, tmp_path):
    random_lora(tmp_path / 'null', 3, size=0.0)
    teachers = [dict(name='one', lora=world.one), dict(name='two', lora=str(tmp_path / 'null'))]
    with pytest.raises(BadInput, match="teacher 'two' has the velocity of the base: its weights do nothing"):
        world.distil(tmp_path / 'out', teachers=teachers, eval_samples=1)


def test_a_model_that_lacks_tensors_is_named(world, tmp_path):
    shutil.copytree(SHAPES / 'base', tmp_path / 'base')
    file = next((tmp_path / 'base' / 'transformer').glob('*.safetensors'))
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: x for k, x in tensors.items() if 'blocks.3.ff' not in k}, file)
    full = [dict(name='one', checkpoint=f'{tmp_path}/base')]
    for what, more in (('checkpoint', dict(teachers=full, routes=[dict(teacher='one', data='words')])),
                       ('model', dict(model=f'{tmp_path}/base'))):
        with pytest.raises(BadInput, match=f'{what} {tmp_path}/base: its weights lack .*blocks.3.ff.*again'):
            world.distil(tmp_path / what, **more)


def test_a_resume_follows_new_settings_of_the_optimizer(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=1, save_every=1, eval_samples=1)
    run(train_opd.main, argv)
    out = run(train_opd.main, [*argv, '--max_steps=2', '--weight_decay=0.5', '--betas=[0.1, 0.2]',
                               '--init_from=resume'])
    now = state(out, 2)['optimizer']['param_groups'][0]
    assert now['weight_decay'] == 0.5 and now['betas'] == (0.1, 0.2)


def test_only_what_nobody_set_goes_with_another_model(tmp_path):
    """The demonstration's held-out files and score mean nothing elsewhere, unless they are asked for."""
    own = lambda *words: train_opd.own_settings(train_opd.SETTINGS, words)
    assert own().score and own().eval_data
    other = own('--model=elsewhere')
    assert other.score == '' and other.eval_data == []
    assert own('--model=elsewhere', f'--score={own().score}').score == own().score
    (tmp_path / 'c.py').write_text(f'eval_data = {own().eval_data!r}')
    assert own('--model=elsewhere', f'{tmp_path}/c.py').eval_data == own().eval_data


def test_no_score_without_samples(world, tmp_path):
    out = world.distil(tmp_path / 'run', max_steps=1, score=f'{SHAPES}/world.py:score', score_samples=0)
    assert set(json.loads((out / 'result.json').read_text())['words']) == {'gap_before', 'gap_after'}


def test_a_gradient_that_is_not_finite_is_named_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_opd, 'velocity_error', lambda v, v_t: (v - v).abs().sqrt().flatten(1).sum(1))
    says = r'2 updates in a row .*route (words|edits), sigma [01]\.\d{3}, whose loss was finite'
    with pytest.raises(RuntimeError, match=says):
        world.distil(tmp_path / 'run', max_bad_steps=2)


FEATURES = dict(
    full_teacher=dict(teachers=[dict(name='one', checkpoint='FULL')], teacher_offload=True, anchor='base',
                      anchor_beta=0.1, routes=[dict(teacher='one', data='words')]),
    soft=dict(mixing='soft', routes=[dict(teacher='one', data='words')]),
    noised_data=dict(states='data', query_space='sigma', query='low', data=['COUNT'],
                     routes=[dict(teacher='one', data='count')]),
    teacher_states=dict(states='teacher', routes_per_step='sample'),
    guided=dict(method='diffusionopd', student_guidance=2.0, rollout_guidance=1.5, anchor='two',
                anchor_beta=0.1,
                teachers=[dict(name='one', lora='ONE', guidance=3.0), dict(name='two', lora='TWO')]),
    sde=dict(method='diffusionopd', eta=0.7, sde='dance', kl_var='code', drop_last=1),
    k1=dict(method='flowopd', eta=0.7, group_size=4, updates=2, reward='k1', student_guidance=2.0,
            rollout_guidance=2.0, anchor='base', anchor_beta=0.1))


@pytest.mark.parametrize('name', FEATURES)
def test_forwards_are_as_many_as_the_table_says(name, world, tmp_path, monkeypatch):
    """Each way to train is run, and what it costs is counted: samples in forwards of a step."""
    if name == 'full_teacher':
        merge_lora.main([f'--adapters={world.one}', f'--into_base={SHAPES}/base', f'--out={tmp_path}/full/'])
    put = dict(FULL=f'{tmp_path}/full', ONE=world.one, TWO=world.two, COUNT=f'{SHAPES}/count.csv')
    fill = lambda x: [*map(fill, x)] if isinstance(x, list) else {k: fill(v) for k, v in x.items()} \
        if isinstance(x, dict) else put.get(x, x) if isinstance(x, str) else x
    count, velocity = [0], train_opd.Field.velocity

    def counted(self, z, sigma, cond):
        count[0] += len(z)
        return velocity(self, z, sigma, cond)
    monkeypatch.setattr(train_opd.Field, 'velocity', counted)
    seen = []
    for n in (1, 3):                                           # what evaluation and checks cost is taken off
        count[0] = 0
        argv = world.opd(tmp_path / str(n), **fill(FEATURES[name]) | dict(max_steps=n))
        run(train_opd.main, argv)
        seen.append(count[0])
    c = train_opd.own_settings(train_opd.SETTINGS, argv)
    said = float(dict(train_opd.derived(c, train_opd.check(c)))['forwards a step'].split(',')[0])
    exact = c.method != 'danceopd'                             # its query indices are drawn
    assert (seen[1] - seen[0]) / 2 == pytest.approx(said, rel=1e-6 if exact else 0.25)
    assert log(tmp_path / '3', 'skipped') == [0, 0, 0]


def test_a_torn_line_in_the_log_does_not_stop_a_resume(world, tmp_path):
    argv = world.opd(tmp_path / 'run', max_steps=2, steps=1, eval_samples=1, save_every=1)
    out = run(train_opd.main, argv)
    whole = (out / 'log.jsonl').read_text()
    (out / 'log.jsonl').write_text(whole + '{"step": 3, "lo')
    first = json.loads((out / 'result.json').read_text())
    run(train_opd.main, [*argv, '--max_steps=3', '--init_from=resume'])
    assert len(log(out, 'loss')) == 3
    last = json.loads((out / 'result.json').read_text())  # where it all began is still known
    assert [r['gap_before'] for r in last.values()] == [r['gap_before'] for r in first.values()]


def test_a_base_in_bfloat16_learns_from_a_merged_start_and_resumes(world, tmp_path):
    """As on a GPU: the base and the teachers in bfloat16, the student in float32, its start exact."""
    argv = world.opd(tmp_path / 'run', max_steps=2, save_every=1, init_from='merge', dtype='bfloat16')
    out = run(train_opd.main, argv)
    start, want = merge_lora.read_adapter(out / 'start'), merge_lora.merge(
        [merge_lora.read_adapter(p) for p in (world.one, world.two)], [0.5, 0.5])
    for k, (A, B, scale) in want.items():
        a, b, s = start[k]
        torch.testing.assert_close(s * b @ a, scale * B @ A, rtol=1e-4, atol=1e-6)
    assert all(x.dtype == torch.float32 for x in state(out, 2)['student'].values())
    resumes_exactly(train_opd.main, argv, out, 1, 2)


# ----------------------------------------------------------------------------------------------------
# train_teacher.py

def test_combined_advantage():
    a, b = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), torch.tensor([300.0, 100.0, 200.0, 7.0, 7.0, 7.0])
    total, alive = train_teacher.combined_advantage([a, b], [1.0, 2.0], 3)
    assert total.tolist() == pytest.approx([1, -2, 1, 0, 0, 0], abs=1e-4) and alive.tolist() == [True, False]
    total, _ = train_teacher.combined_advantage([a, b], [1.0, 2.0], 3, clip=0.5)
    assert total.tolist() == pytest.approx([.5, -.5, .5, 0, 0, 0])  # each is clipped, then the sum
    _, alive = train_teacher.combined_advantage([torch.tensor([1.0, 1.0, 2.0, 1.0])], [1.0], 2)
    assert alive.tolist() == [False, True]


def test_extremes():
    advantage = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 7.0, 6.0, 5.0])
    keep = lambda n: train_teacher.extremes(advantage, 4, n).int().tolist()
    assert keep(2) == [1, 0, 0, 1, 1, 1, 0, 0] and keep(3) == [1, 0, 1, 1, 1, 1, 1, 0] and keep(4) == [1] * 8


def test_interpolate():
    """Two samples, four steps, pictures of two numbers; asked for at the first and the last step."""
    x0 = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]],
                       [[1.0, 1.0], [5.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    asked, values = [torch.tensor([0, 0]), torch.tensor([3, 3])], torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    r = train_teacher.interpolate(x0.view(4, 2, 2, 1, 1), asked, values)
    torch.testing.assert_close(r, torch.tensor([[1.0, 10.0], [1.0, 15.0], [1.5, 20.0], [2.0, 20.0]]))
    r = train_teacher.interpolate(x0.view(4, 2, 2, 1, 1), [asked[0], torch.tensor([2, 1]), asked[1]],
                                  torch.tensor([[1.0, 10.0], [8.0, 30.0], [2.0, 20.0]]))
    half = 0.5 ** 0.5  # sample 0's step 1 looks like 0, and half like 2
    assert r[:, 0].tolist() == pytest.approx([1, (1 + half * 8) / (1 + half), 8, 2])
    assert r[:, 1].tolist() == pytest.approx([10, 30, (half * 30 + 20) / (1 + half), 20])


def test_returns():
    r = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 8.0]])
    assert train_teacher.returns(r, 0.5).tolist() == [[3.0, 2.0], [4.0, 4.0], [4.0, 8.0]]


def test_sdpo_loss():
    logp_old, change = torch.tensor([0.3, -0.2, 0.0, 0.0]), torch.tensor([0.5, 0.1, 0.0, 0.3])
    logp, advantage = (logp_old + change).requires_grad_(), torch.tensor([1.0, 0.0, 0.0, 2.0])
    loss = train_teacher.sdpo_loss(logp, logp_old, advantage, torch.tensor([0.5, 0.5, 1.0, 1.0]), 0.2)
    # (0.5 x 0.4 - 1)^2 = 0.64, clipped (0.5 x 0.1 - 1)^2 = 0.9025
    # (-0.3 + 2)^2 = 2.89, clipped (-0.2 + 2)^2 = 3.24
    assert loss.tolist() == pytest.approx([0.9025, 3.24])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, 0.95, 3.6, 0], abs=1e-5)
    one = torch.tensor([1.0, 0.0])
    back = train_teacher.sdpo_loss(-0.5 * one, 0 * one, one, torch.ones(2), 0.2)
    assert back.tolist() == pytest.approx([2.25])  # on the wrong side, nothing is clipped away


def test_draw_sigma_is_logit_normal_around_the_schedules_middle():
    fine = train_opd.open_field(str(SHAPES / 'base')).sigmas(1000, 24, 24)
    n, r = 20000, random.Random(0)
    wanted = dict(uniform=lambda q: 3 * q / (1 + 2 * q),
                  logit_normal=lambda q: float(Normal(math.log(3), 1.0).icdf(torch.tensor(q)).sigmoid()))
    for kind, want in wanted.items():
        drawn = torch.tensor([float(train_teacher.draw_sigma(fine, r, kind)) for _ in range(n)])
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert drawn.quantile(q).item() == pytest.approx(want(q), abs=0.015)


@pytest.mark.parametrize('method', ['grpo', 'sdpo'])
def test_the_mean_gradient_is_that_of_the_expected_reward(method):
    """A bandit: an action drawn from N(mu, 0.3), the reward minus its squared distance to a goal."""
    torch.manual_seed(0)
    mu, goal, n, std = torch.randn(8), torch.randn(8), 64000, torch.tensor(0.3)
    mean = mu.expand(n, 8).clone().requires_grad_()
    action = (mean + std * torch.randn(n, 8)).detach()
    logp, reward = train_opd.log_prob(action, mean, std), -(action - goal).square().sum(1)
    if method == 'grpo':
        advantage, alive = train_teacher.combined_advantage([reward], [1.0], 16)
        loss = train_opd.ppo_loss(logp, logp.detach(), advantage, 1e-4)[0]
        assert alive.all()
    else:
        advantage = ((reward - reward.mean()) / reward.std()).clamp(-5, 5)
        loss = train_teacher.sdpo_loss(logp, logp.detach(), advantage, torch.ones(n), 1e-4)
    loss.sum().backward()
    assert cosine(-mean.grad.mean(0), goal - mu) > 0.95  # a descent on the loss climbs the reward


TEACHERS = dict(sft=dict(method='sft', micro_batch=4),
                grpo=dict(method='grpo', group_size=2, updates=2, steps=4, kl_beta=0.01),
                sdpo=dict(method='sdpo', group_size=2, updates=2, steps=3, same_noise=True, buffer=20))


@pytest.mark.parametrize('method', TEACHERS)
def test_a_teacher_resumes_bit_for_bit(method, world, tmp_path):
    (tmp_path / 'few.csv').write_text('prompt\na red circle on white\na green square on black\n')
    data = [str(world.at / 'edits.csv') if method == 'sft' else str(tmp_path / 'few.csv')]
    argv = world.teacher(tmp_path / 'run', data=data, max_steps=8, save_every=4, ckpt_keep=3,
                         **TEACHERS[method])
    out = run(train_teacher.main, argv)
    resumes_exactly(train_teacher.main, argv, out, 4, 8)
    if method == 'sdpo':  # its buffers are part of the state, and were used
        meta = json.loads((out / 'step_000008' / 'meta.json').read_text())
        memory = {(p, i): v for p, reward, i, v in meta['state']}
        assert len(memory) == 2 * 2 and max(map(len, memory.values())) == 20
    if method != 'sft':
        assert log(out, 'groups') == log(out.with_name('run_copy'), 'groups') == [4] * 8
    found = merge_lora.fit(merge_lora.read_adapter(out), merge_lora.model_shapes(SHAPES / 'base'))
    assert sorted(found) == sorted(LAYERS)  # the run folder is a teacher


def test_imitation_lowers_its_loss(world, tmp_path):
    data = [str(world.at / 'edits.csv')]
    out = world.teach(tmp_path / 'run', method='sft', data=data, max_steps=15, eval_samples=8)
    result = json.loads((out / 'result.json').read_text())['loss/edits']
    assert result['after'] < 0.97 * result['before']


@pytest.mark.parametrize('method', ['grpo', 'sdpo'])
def test_groups_without_a_difference_are_skipped_and_counted(method, world, tmp_path):
    reward = [dict(reward=f'{world.at}/judges.py:constant')]
    out = world.teach(tmp_path / 'run', reward=reward, max_steps=2, **TEACHERS[method])
    groups = 8 // TEACHERS[method]['group_size']
    assert log(out, 'groups') == log(out, 'skipped_groups') == [groups, groups]
    assert log(out, 'skipped_share') == [1, 1]
    assert log(out, 'kl') == ([] if method == 'grpo' else [0, 0])      # nothing was learned, or looked at
    if method == 'grpo':
        first, last = state(out, 0)['student'], state(out, 2)['student']
        assert all(torch.equal(first[k], last[k]) for k in first)


TEACHER_MISTAKES = {
    'group_size = 1: GRPO compares the samples of one prompt': lambda w: dict(method='grpo'),
    'group_size = 4: SDPO compares two trajectories': lambda w: dict(method='sdpo', group_size=4),
    'words: "a red circle on white" has no target_image': lambda w: dict(method='sft'),
    r"no reward is called 'shape', did you mean shapes\?": lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward='shape')]),
    'nowhere.py:score: no such file': lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward='nowhere.py:score')]),
    r'judges.py:nun: .* has no such function, did you mean nan\?': lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward=f'{w.at}/judges.py:nun')]),
    'best_of belongs to grpo; leave it at 0': lambda w: dict(method='sdpo', group_size=2, best_of=2),
    'updates belongs to grpo or sdpo; leave it at 1': lambda w: dict(method='sft', updates=2),
    'reward belongs to grpo or sdpo': lambda w: dict(method='sft', reward=[dict(reward='jpeg')]),
    'updates = 3: at most one for each of the 2': lambda w: dict(method='sdpo', group_size=2, updates=3),
    'leaves nothing of a rollout of 3': lambda w: dict(method='sdpo', group_size=2, drop_last=7),
    'buffer = 8: SDPO uses it from 16': lambda w: dict(method='sdpo', group_size=2, buffer=8),
    'gamma = 5.0: at most 1': lambda w: dict(method='sdpo', group_size=2, gamma=5.0),
    'micro_batch = 1: the pairs of SDPO': lambda w: dict(method='sdpo', group_size=2, micro_batch=1),
    "eta = 2.0: at most 1 with sde = 'cps'": lambda w: dict(method='grpo', group_size=4, sde='cps', eta=2.0),
    "kl_var = 'code' is about": lambda w: dict(method='grpo', group_size=4, sde='cps', kl_var='code'),
    'aesthetic reward needs safetensors': lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward='aesthetic')]),
    "reward {'reward': 5}: a dict": lambda w: dict(method='grpo', group_size=4, reward=[dict(reward=5)]),
    "weight must be more than 0, not '1'": lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward='jpeg', weight='1')]),
    'reward is empty': lambda w: dict(method='grpo', group_size=4, reward=[]),
    "reward 'jpeg': weight must be more than 0": lambda w: dict(
        method='grpo', group_size=4, reward=[dict(reward='jpeg', weight=0)])}


@pytest.mark.parametrize('says', TEACHER_MISTAKES)
def test_a_mistake_in_a_teachers_run_is_named(says, world, tmp_path):
    with pytest.raises(BadInput, match=says):
        world.teach(tmp_path / 'out', **TEACHER_MISTAKES[says](world))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('judge, says', [('short', 'gave 2 values for 3 pictures'), ('nan', 'it gave nan')])
def test_a_reward_that_fails_stops_the_run_and_saves_the_sample(judge, says, world, tmp_path):
    reward = [dict(reward=f'{world.at}/judges.py:{judge}')]
    with pytest.raises(RewardError, match=f'{says}.*reward_failed.png'):
        world.teach(tmp_path / 'out', method='grpo', group_size=4, reward=reward)
    assert 'prompt' in json.loads((tmp_path / 'out' / 'reward_failed.json').read_text())
    assert files.load_image(tmp_path / 'out' / 'reward_failed.png', 24, 24).shape == (3, 24, 24)


def test_after_a_failed_reward_nobody_is_asked_again(world, tmp_path):
    """In training: evaluation is the first question, then a chunk is one. What is saved is what is named."""
    reward = [dict(reward=f'{world.at}/judges.py:tired')]
    with pytest.raises(RewardError, match='gave 1 values for 2 pictures') as e:
        world.teach(tmp_path / 'out', method='grpo', group_size=2, reward=reward, micro_batch=2,
                    eval_samples=2)
    note = json.loads((tmp_path / 'out' / 'reward_failed.json').read_text())
    assert f'"{note["prompt"]}"' in str(e.value)
    assert len(files.load_function(f'{world.at}/judges.py:tired').__globals__['asked']) == 3


def test_the_kl_to_the_base_is_seen_without_being_asked_for(world, tmp_path):
    more = dict(method='grpo', group_size=4, max_steps=3)
    free, held = (world.teach(tmp_path / str(b), kl_beta=b, **more) for b in (0.0, 1e-9))
    assert log(free, 'kl')[0] == 0 and min(log(free, 'kl')[1:]) > 1e-9
    same = lambda out: state(out, 3)['student'].values()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(same(free), same(held)))


def test_no_reward_of_sdpo_wins_by_its_scale(world, tmp_path):
    bright = lambda name: [dict(reward=f'{SHAPES}/world.py:reward', weight=2.0),
                           dict(reward=f'{world.at}/judges.py:{name}', weight=1.0)]
    ends = [state(world.teach(tmp_path / k, reward=bright(k), **TEACHERS['sdpo']), 4)['student']
            for k in ('bright', 'very_bright')]
    start = state(tmp_path / 'bright', 0)['student']
    moved = max((ends[0][k] - start[k]).abs().max() for k in start)
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=0.02 * moved) for k in start)


def test_buffered():
    batch, past = [1.0, 2.0, 3.0], [0.0] * 8 + [4.0] * 8
    assert train_teacher.buffered(4.0, past[:15], batch) == pytest.approx(2.0, abs=1e-5)
    assert train_teacher.buffered(4.0, past, batch) == pytest.approx(2 / (64 / 15) ** 0.5, abs=1e-5)


@pytest.mark.parametrize('main, more', [
    (train_teacher.main, dict(method='grpo', kl_beta=0.1)),
    (train_teacher.main, dict(method='grpo', kl_beta=0.1, dtype='bfloat16')),
    (train_opd.main, dict(method='flowopd', eta=0.7, init_from='merge'))])
def test_a_group_larger_than_a_forward(main, more, world, tmp_path, monkeypatch):
    """A group is compared as a whole, and learned from in forwards of micro_batch."""
    seen, velocity = [], train_opd.Field.velocity
    monkeypatch.setattr(train_opd.Field, 'velocity', lambda self, z, s, cond: (
        seen.append(len(z)) if torch.is_grad_enabled() else None, velocity(self, z, s, cond))[1])
    words = world.teacher if main is train_teacher.main else world.opd
    flat = []
    for size in (8, 1):
        seen.clear()
        argv = words(tmp_path / str(size), group_size=4, micro_batch=size, max_steps=1, **more)
        out = run(main, argv)
        assert max(seen) == (1 if size == 1 else 4 if main is train_opd.main else 8)
        assert log(out, 'ratio_off') == [0]                    # it is the policy that drew the samples
        flat.append(first_gradient(out))
    off = 0.2 if 'dtype' in more else 1e-4
    assert flat[0].norm() > 0 and (flat[0] - flat[1]).norm() < off * flat[0].norm()


def test_sdpo_on_a_unet(tmp_path):
    build('sd-turbo').pipe.save_pretrained(tmp_path / 'model')
    (tmp_path / 'things.txt').write_text('\n'.join(WORDS))
    settings = dict(model=f'{tmp_path}/model', data=[f'{tmp_path}/things.txt'], reward=[dict(reward='jpeg')],
                    method='sdpo', device='cpu', resolution=list(SIZES[0]), steps=4, sample_steps=4,
                    group_size=2, batch_size=4, micro_batch=4, max_steps=3, log_every=1, rank=2, lr=1e-2,
                    eval_samples=2, show=1, max_sequence_length=LENGTH, out_dir=f'{tmp_path}/run')
    out = run(train_teacher.main, [f'--{k}={v!r}' for k, v in settings.items()])
    assert log(out, 'skipped') == [0, 0, 0] and all(x > 0 for x in log(out, 'grad_norm'))
    assert log(out, 'kl')[-1] > 0


# ------------------------------------------------------------------------------------------------------------
# Sampling, and every config's dry run

BASE = 'data/shapes/base'
SENTENCES = 'a red circle top left on white|a blue square bottom right on gray'


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def shoot(tmp_path, *words, out='pictures'):
    """sample.main into a fresh folder: {name: array in [0, 1]}."""
    folder = tmp_path / out
    sample.main([*words, f'--out_dir={folder}', '--device=cpu'])
    return {p.name: np.asarray(Image.open(p)) / 255 for p in sorted(folder.glob('*.png'))}


def some_adapter(seed, size=0.2):
    """Random factors on a few layers of the shapes model, large enough to be seen."""
    draw, shapes = torch.Generator().manual_seed(seed), merge_lora.model_shapes(BASE)
    names = [k for k in shapes if k.endswith(('attn.to_q', 'attn.to_v', 'attn.to_out.0'))]
    return {
        k: (
            size * torch.randn(4, shapes[k][1], generator=draw),
            size * torch.randn(shapes[k][0], 4, generator=draw),
        )
        for k in names
    }


def some_run(folder, **settings):
    """A run folder as the trainers leave it: live weights, their average, and the start, all different."""
    settings = dict(model=BASE, family='', resolution=24, max_sequence_length=256, distilled_guidance=3.5,
                    rollout_guidance=1.0, sample_steps=3, eval_data=['data/examples/t2i.txt']) | settings

    def write(to):
        merge_lora.write_adapter(to, some_adapter(1), 4.0)
        merge_lora.write_adapter(to / 'ema', some_adapter(2), 4.0)
    merge_lora.write_adapter(folder / 'start', some_adapter(3), 4.0)
    files.save_checkpoint(folder, 7, write, dict(settings=settings, teachers={}), 2)
    return folder


def pipeline_pictures(adapter=None, guidance=1.0, steps=4, seed=0, num=2):
    """The same prompts and noise through the diffusers pipeline."""
    import diffusers
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_lora_weights(str(adapter), weight_name='pytorch_lora_weights.safetensors')
    todo = [(i, p, k) for i, p in enumerate(SENTENCES.split('|')) for k in range(num)]
    shape = pipe.vae.config.latent_channels, *[24 // 2 ** (len(pipe.vae.config.block_out_channels) - 1)] * 2
    noise = torch.stack([torch.randn(shape, generator=train_opd.torch_rng(seed, i, k)) for i, _, k in todo])
    x = pipe(
        [p for _, p, _ in todo],
        latents=noise,
        height=24,
        width=24,
        num_inference_steps=steps,
        output_type='np',
        guidance_scale=guidance,
        max_sequence_length=pipe.tokenizer_3.model_max_length,
    ).images
    return {f'{i:04d}_{k}.png': a for (i, _, k), a in zip(todo, x)}


@pytest.mark.parametrize('guidance, adapted', [(1.0, False), (3.0, False), (1.0, True), (3.0, True)])
def test_sampler_equals_the_pipeline(tmp_path, guidance, adapted):
    ckpt = tmp_path / 'adapter' if adapted else ''
    if adapted:
        merge_lora.write_adapter(ckpt, some_adapter(1), 4.0)
    ours = shoot(tmp_path, f'--ckpt={ckpt}', f'--model={BASE}', f'--prompt={SENTENCES}', '--steps=4',
                 f'--guidance={guidance}')
    theirs = pipeline_pictures(ckpt, guidance)
    for k, x in theirs.items():
        assert np.abs(ours[k] - x).max() < 0.51 / 255, k                # a PNG rounds to 1 / 255
    assert np.abs(theirs['0000_0.png'] - theirs['0001_0.png']).max() > 0.1


def test_run_folder_and_its_parts(tmp_path, capsys):
    run, one = some_run(tmp_path / 'run'), '--prompt=a red circle top left on white'
    of = {k: shoot(tmp_path, f'--ckpt={run / k}', one, out=f'p_{k}'.replace('/', '_'))['0000_0.png']
          for k in ('.', 'step_000007', 'latest/ema', 'start')}
    assert '24 x 24 pixels, 3 steps, guidance 1.0' in capsys.readouterr().out
    live = shoot(tmp_path, f'--ckpt={run}', one, '--ema=False', out='live')['0000_0.png']
    base = shoot(tmp_path, '--ckpt', str(run), one, '--scale=0', out='base')['0000_0.png']
    bare = shoot(tmp_path, '--ckpt=', f'--model={BASE}', '--steps=3', one, out='bare')['0000_0.png']
    assert (
        (of['.'] == of['step_000007']).all() and (of['.'] == of['latest/ema']).all() and (base == bare).all()
    )
    for a, b in ((of['.'], live), (of['.'], base), (live, base), (of['start'], live), (of['start'], of['.'])):
        assert np.abs(a - b).max() > 0.05


def test_what_is_given_wins_over_the_run(tmp_path):
    run = sample.locate(
        sample.configure(sample.SETTINGS, [f'--ckpt={some_run(tmp_path / "run", resolution=[24, 48])}'])
    )[1]

    def filled(**given):
        words = ['--ckpt=x', *(f'--{k}={v}' for k, v in given.items())]
        c = sample.configure(sample.SETTINGS, words)
        sample.fill(c, given.get('run', run))
        return c
    c = filled()
    assert (c.model, c.height, c.width, c.steps, c.guidance) == (BASE, 24, 48, 3, 1.0)
    c = filled(height=48, width=24, steps=9, guidance=2.5, max_sequence_length=8)
    assert (c.height, c.width, c.steps, c.guidance, c.max_sequence_length) == (48, 24, 9, 2.5, 8)
    run = dict(model=BASE, resolution=24, guidance=4.5)                 # a teacher's
    assert filled().guidance == 4.5
    run = {}
    c = filled(model=BASE)                                              # size from the model's own configs
    assert (c.height, c.width, c.steps, c.guidance) == (24, 24, 28, 1.0)
    c = filled(model='owner/repo', family='FluxPipeline')
    assert (c.height, c.width) == (1024, 1024)


def test_noise_follows_seed_prompt_and_picture(tmp_path):
    words = ['--ckpt=', f'--model={BASE}', '--prompt=a shape|two shapes', '--steps=2', '--num=3']
    a = shoot(tmp_path, *words, out='a')
    b = shoot(tmp_path, *words, '--batch_size=1', out='b')
    c = shoot(tmp_path, *words[:-1], '--num=1', '--seed=1', out='c')
    assert set(a) == {f'{i:04d}_{k}.png' for i in range(2) for k in range(3)} | {'grid.png'}
    assert all(np.abs(a[k] - b[k]).max() <= 1 / 255 for k in a if k != 'grid.png')
    assert (
        set(c) == {'0000_0.png', '0001_0.png', 'grid.png'}
        and np.abs(a['0000_0.png'] - c['0000_0.png']).max() > 0.1
    )
    assert np.abs(a['0000_0.png'] - a['0000_1.png']).max() > 0.1


def test_sources_and_a_prompts_file(tmp_path, capsys):
    Image.new('RGB', (48, 48), (200, 30, 30)).save(tmp_path / 'own.png')
    Image.new('RGB', (24, 24), (30, 30, 200)).save(tmp_path / 'shared.png')
    (tmp_path / 'rows.csv').write_text(
        'prompt,task,source_image\nremove the circle,a,own.png\na circle on white,b,\n'
    )
    words = ['--ckpt=', f'--model={BASE}', '--steps=2', '--num=1', f'--prompts={tmp_path / "rows.csv"}']
    mixed = shoot(tmp_path, *words, out='mixed')
    said = capsys.readouterr().out.split()
    assert {str(tmp_path / 'mixed' / k) for k in mixed} <= set(said)    # every file is printed
    both = shoot(tmp_path, *words, f'--source={tmp_path / "shared.png"}', out='both')
    assert (mixed['0000_0.png'] == both['0000_0.png']).all()            # a row's own source comes first
    assert (mixed['0001_0.png'] != both['0001_0.png']).any()            # and the second now has one
    assert np.allclose(mixed['grid.png'][40, 40, :3], np.array([200, 30, 30]) / 255, atol=0.01)


def test_the_score_is_that_of_the_pictures_that_are_written(tmp_path, capsys):
    lines = Path('data/shapes/count_val.csv').read_text().splitlines()[:4]
    lines += Path('data/shapes/t2i_val.csv').read_text().splitlines()[1:9]
    (tmp_path / 'rows.csv').write_text('\n'.join(lines))
    got = shoot(tmp_path, f'--model={BASE}', '--steps=4', '--num=2', f'--prompts={tmp_path / "rows.csv"}',
                '--score=data/shapes/world.py:score')
    said = dict(re.findall(r'score of (\w+): ([0-9.]+)', capsys.readouterr().out))
    rows = rows_of(tmp_path / 'rows.csv')
    for bucket in ('count', 't2i'):
        mine = [i for i, r in enumerate(rows) for _ in range(2) if r['task'] == bucket]
        x = torch.stack([torch.tensor(got[f'{i:04d}_{k}.png'][..., :3]).permute(2, 0, 1)
                         for i, r in enumerate(rows) for k in range(2) if r['task'] == bucket])
        right = [s['right'] for s in shapes.score(x, [rows[i] for i in mine])]
        assert float(said[bucket]) == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert float(said['t2i']) > float(said['count'])


def test_without_a_prompt_the_runs_own_rows(tmp_path):
    run = some_run(tmp_path / 'run', eval_data=['data/examples/local_edit.csv', 'data/examples/t2i.txt'])
    got = shoot(tmp_path, f'--ckpt={run}', '--num=1')
    assert len(got) == 3 + 3 + 1                                        # three of each bucket, and the sheet


@pytest.mark.parametrize(
    'words, says',
    [
        (['--ckpt=out/no_such_run'], 'no_such_run'),
        (['--ckpt=', '--prompt=x'], '--model'),
        (['--ckpt={adapter}', '--prompt=x'], 'give --model'),
        (['--ckpt={damaged}', '--prompt=x'], 'damaged'),
        (['--ckpt={run}', '--prompt=x', '--prompts=y.txt'], 'not both'),
        (['--ckpt={run}', '--prompt=|'], 'no prompt'),
        (['--ckpt={run}', '--prompts=no_such.txt'], 'no_such.txt'),
        (['--ckpt={run}', '--prompt=x', '--source=no_such.png'], 'no_such.png'),
        (['--ckpt={run}', '--prompt=x', '--height=25'], '25'),
        (['--ckpt={run}', '--prompt=x', '--width=960'], 'larger'),
        (['--ckpt={run}', '--prompt=x', '--num=0'], 'num'),
        (['--ckpt={run}', '--prompt=x', '--steps=-1'], 'steps'),
        (['--ckpt={run}', '--prompt=x', '--dtype=int8'], 'int8'),
        (['--ckpt={run}', '--prompt=x', '--model=data/nowhere'], 'data/nowhere'),
        (
            [
                '--model=owner/repo',
                '--family=FluxPipeline',
                '--prompt=x',
                '--source=data/examples/pictures/local_edit_0.png',
            ],
            'cannot edit',
        ),
    ],
)
def test_bad_input_before_weights_are_loaded(tmp_path, monkeypatch, words, says):
    run, bad = some_run(tmp_path / 'run'), some_run(tmp_path / 'damaged')
    (bad / 'latest' / 'meta.json').write_text('{"settings"')
    merge_lora.write_adapter(tmp_path / 'adapter', some_adapter(1), 4.0)
    monkeypatch.setattr(sample, 'open_field', lambda *a, **k: pytest.fail('weights were loaded'))
    words = [w.format(run=run, adapter=tmp_path / 'adapter', damaged=bad) for w in words]
    with pytest.raises(BadInput, match=says):
        sample.main([*words, f'--out_dir={tmp_path / "out"}'])
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_dry_run_of_every_config(path, capsys, monkeypatch, tmp_path):
    for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(k, raising=False)
    script = train_teacher if path.startswith('teacher_') else train_opd
    monkeypatch.setattr(train_opd, 'open_field', lambda *a, **k: pytest.fail('weights were loaded'))
    made = []
    if path == 'shapes_taste.py':  # two of its teachers have to be made first
        own = train_opd.configure(script.SETTINGS, [f'config/{path}']).teachers
        merge_lora.write_adapter(tmp_path, some_adapter(1), 4.0)
        own = [t | dict(lora=str(tmp_path)) if 'out/' in t.get('lora', '') else t for t in own]
        made = [f'--teachers={own}']
    script.main([f'config/{path}', '--dry_run=True', *made])
    assert 'settings and data are fine' in capsys.readouterr().out
    c = train_opd.configure(script.SETTINGS, [f'config/{path}'])
    assert c.out_dir == f'out/{Path(path).stem}' or path.startswith('teacher_')
    if 'shapes' not in path:  # nothing of the demonstration leaks into it
        assert c.family in train_opd.FAMILIES and not c.score and c.resolution >= 512
        assert not any('shapes' in str(v) for v in (c.model, c.data, c.eval_data, c.out_dir))


# ------------------------------------------------------------------------------------------------------------
# Rewards, and edit data

PROMPTS = ['a red circle', 'two shapes', 'a blue square']


def rows(n=3):
    return [{'prompt': PROMPTS[i % 3]} for i in range(n)]


# -------------------------------------------------------------------------------- without weights

def test_jpeg_likes_flat_pictures():
    x = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)])
    flat, noise = load('jpeg')(x, rows(2))
    assert noise < flat < 0
    buffer = io.BytesIO()
    rewards.pictures(x)[1].save(buffer, 'JPEG', quality=95)
    assert noise == -len(buffer.getvalue()) / 1000
    assert load('incompressible')(x, rows(2)) == [-flat, -noise]


def test_shapes_rewards():
    world = from_file(f'{ROOT}/data/shapes/world.py:draw').__globals__
    scene = ('white', (('circle', 'red'), None, None, None))
    x = torch.stack([world['draw'](scene), torch.zeros(3, 24, 24)])
    r = [{'prompt': 'a red circle top left on white'}] * 2
    assert load('shapes')(x, r) == [1.0, 0.0]
    smooth = load('shapes_smooth')(x, r)
    assert smooth[0] > 0.99 and smooth[1] < 0.9
    assert checked('shapes', from_file(f'{ROOT}/data/shapes/world.py:score'), x, r, '/nowhere') == [1.0, 0.0]


def test_names(tmp_path):
    (tmp_path / 'neighbour.py').write_text('GAIN = 2\n')
    file = tmp_path / 'mine.py'
    file.write_text('from dataclasses import dataclass\nfrom neighbour import GAIN\n'
                    '@dataclass\nclass A:\n    x: int = 1\n'
                    'count = []\n'
                    'def brightness(images, rows):\n    return [GAIN * x.mean().item() for x in images]\n')
    mine = load(f'{file}:brightness')
    assert mine(torch.ones(2, 3, 4, 4), rows(2)) == [2.0, 2.0]
    assert load(f'{file}:brightness') is mine and str(tmp_path) not in sys.path
    for name, words in {'jpg': 'jpeg', 'clop': 'clip', f'{file}:brightnes': 'did you mean brightness',
                        f'{file}': 'file.py:function', f'{file}:count': 'brightness',
                        f'{tmp_path}/no.py:f': 'no such file', 'jpeg@/x': 'no @', 'clip@a@b@c': 'two @',
                        'aesthetic': 'weights_only=True', f'aesthetic@{tmp_path}/a.pth': 'weights_only=True',
                        f'aesthetic@{tmp_path}/a.safetensors': 'a.safetensors',
                        f'clip@{tmp_path}/none': 'none', f'pickscore@{tmp_path}/none': 'none'}.items():
        with pytest.raises(BadInput, match=re.escape(words)):
            load(name)
    with pytest.raises(BadInput, match='timeout'):
        load('jpeg', timeout=3)


# -------------------------------------------------------------------------------- models

@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp('clip')
    letters = sorted(set('abcdefghijklmnopqrstuvwxyz'))
    vocab = [*letters, *[c + '</w>' for c in letters], '<|startoftext|>', '<|endoftext|>']
    end, vocab = len(vocab) - 1, {w: i for i, w in enumerate(vocab)}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    crop = {'height': 32, 'width': 32}
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=crop).save_pretrained(folder)
    small = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        text_config={**small, 'vocab_size': len(vocab), 'max_position_embeddings': 20,
                     'bos_token_id': end - 1, 'eos_token_id': end, 'pad_token_id': end},
        vision_config={**small, 'image_size': 32, 'patch_size': 8},
        projection_dim=768)).save_pretrained(folder)
    return folder


def test_clip_and_pickscore(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    x, r = torch.rand(19, 3, 40, 48), rows(19)              # more than a batch, and not square
    r[4] = {'prompt': 'a very long prompt ' * 10}           # cut, no error
    got = load(f'clip@{clip_folder}')(x, r)
    model, text = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)
    for i in (0, 4, 18):                                    # one at a time, by the model's own forward
        with torch.no_grad():
            o = model(**text([r[i]['prompt']], truncation=True, max_length=20, return_tensors='pt'),
                      **pixels(images=rewards.pictures(x[i:i + 1]), return_tensors='pt'))
        cosine = torch.cosine_similarity(o.text_embeds, o.image_embeds).item()
        assert abs(got[i] - cosine) < 1e-5 and abs(cosine) <= 1
    pick = load(f'pickscore@{clip_folder}@{clip_folder}')(x, r)
    assert pick == pytest.approx([v * model.logit_scale.exp().item() / 26 for v in got], abs=1e-5)
    assert len(set(got)) > 10 and not torch.tensor(got).requires_grad


def test_clip_is_loaded_once_and_whole(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    assert rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu') \
        is rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu')
    for f in clip_folder.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['visual_projection.weight']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(BadInput, match='visual_projection'):
        load(f'clip@{tmp_path}')
    (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')   # a pickle is never opened
    rewards.clip_model.cache_clear()
    with pytest.raises(BadInput, match='does not load'):
        load(f'clip@{tmp_path}')


def test_aesthetic_is_five_linear_maps(clip_folder, tmp_path):
    from safetensors.torch import save_file
    n, weights = [768, 1024, 128, 64, 16, 1], {}
    for place, a, b in zip((0, 2, 4, 6, 7), n, n[1:]):      # the names in the published file
        weights[f'layers.{place}.weight'] = torch.randn(b, a) / a ** 0.5
        weights[f'layers.{place}.bias'] = torch.randn(b)
    file = tmp_path / 'head.safetensors'
    save_file(weights, file)
    x = torch.rand(3, 3, 32, 32)
    got = load(f'aesthetic@{file}@{clip_folder}')(x, rows())
    with torch.no_grad():
        h = rewards.see(rewards.clip_model(str(clip_folder), str(clip_folder), 'cpu'), x)
    assert h.norm(dim=-1) == pytest.approx([1, 1, 1], abs=1e-5)
    for place in (0, 2, 4, 6, 7):
        h = h @ weights[f'layers.{place}.weight'].T + weights[f'layers.{place}.bias']
    assert got == pytest.approx(h[:, 0].tolist(), abs=1e-4)
    del weights['layers.6.bias']
    save_file(weights, file)
    with pytest.raises(BadInput, match='6.bias'):
        load(f'aesthetic@{file}@{clip_folder}')


# -------------------------------------------------------------------------------- servers

@pytest.fixture
def serve():
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f'http://127.0.0.1:{server.server_port}'
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(*texts):
    """A server that gives one text after another; its `asked` holds what it was sent."""
    class Handler(http.server.BaseHTTPRequestHandler):
        left, asked = list(texts), []

        def do_POST(self):
            self.asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            text = self.left.pop(0) if len(self.left) > 1 else self.left[0]
            if text is None:
                return time.sleep(3)
            self.send_response(503 if text == 'busy' else 200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass
    return Handler


@pytest.fixture
def readme_server():
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(# reward_server.*?)```', text, re.S)[1]
    names = {'__name__': 'reward_server'}
    exec(code, names)
    names['Handler'].log_message = lambda *_: None
    return names['Handler']


def test_the_readme_server(serve, readme_server, tmp_path):
    x = torch.stack([torch.full((3, 8, 8), v) for v in (0.0, 1.0, 1.0)])
    r = [{'prompt': 'night'}, {'prompt': 'day'}, {'prompt': 'a dark day', 'source_image': Path('/x'), 'z': x}]
    assert checked('mine', load(serve(readme_server)), x, r, tmp_path) == [0.0, 1.0, 0.0]
    assert not list(tmp_path.iterdir())
    body = json.dumps({'prompts': ['a'], 'images': ['bm8='], 'rows': [{}]}).encode()
    with pytest.raises(urllib.error.HTTPError) as e:        # the words that `remote` passes on
        urllib.request.urlopen(serve(readme_server), body, timeout=5)
    assert e.value.code == 500 and 'UnidentifiedImageError' in e.value.read().decode()


def test_what_is_sent(serve):
    handler, x = answers('{"rewards": [1, 2.5]}'), torch.rand(2, 3, 5, 7)
    r = [{'prompt': 'a', 'task': 't', 'n': 1, 'path': Path('/x')}, {'prompt': 'é', 'source_image': '/y.png'}]
    assert remote(serve(handler))(x, r) == [1.0, 2.5]
    asked = handler.asked[0]
    assert asked['prompts'] == ['a', 'é'] and asked['rows'] == [{'prompt': 'a', 'task': 't', 'n': 1}, r[1]]
    sent = Image.open(io.BytesIO(base64.b64decode(asked['images'][1])))
    assert sent.format == 'PNG' and sent.tobytes() == rewards.pictures(x)[1].tobytes()


def test_a_server_is_tried_three_times(serve):
    handler = answers('busy', 'oops', '{"rewards": [1]}')
    assert remote(serve(handler), wait=0.01)(torch.rand(1, 3, 4, 4), rows(1)) == [1.0]
    assert len(handler.asked) == 3


@pytest.mark.parametrize('answer, words', [
    ('<html>', "answered '<html>'"), ('[1]', "answered '[1]'"), ('{"rewards": "a"}', 'answered'),
    ('{"rewards": [null]}', 'answered'), ('{"rewards": [1, 2]}', '2 rewards for 1'), ('busy', '503'),
    ('', "answered ''")])
def test_nonsense_from_a_server(serve, answer, words):
    handler = answers(answer)
    url = serve(handler)
    with pytest.raises(RewardError, match=re.escape(url)) as e:
        remote(url, wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))
    assert words in str(e.value) and len(handler.asked) == 3


def test_a_server_that_hangs_or_is_not_there(serve):
    start = time.time()
    with pytest.raises(RewardError, match='2 times.*timed out.*0.2 s'):
        remote(serve(answers(None)), timeout=0.2, tries=2, wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))
    assert time.time() - start < 2
    with pytest.raises(RewardError, match='refused'):
        remote('http://127.0.0.1:1', wait=0.01)(torch.rand(1, 3, 4, 4), rows(1))


# -------------------------------------------------------------------------------- trusting none

def saved(folder):
    with Image.open(folder / 'reward_failed.png') as im:
        return im.convert('RGB').getpixel((0, 0))[0], json.loads((folder / 'reward_failed.json').read_text())


@pytest.mark.parametrize('function, words, culprit', [
    (lambda images, rows: [1.0, 2.0, float('nan')], 'it gave nan', 2),
    (lambda images, rows: [1.0, math.inf, 0.0], 'it gave inf', 1),
    (lambda images, rows: [1.0], '1 values for 3 pictures', 0),
    (lambda images, rows: None, 'TypeError', 0),
    (lambda images, rows: [1 / (row['prompt'] != 'two shapes') for row in rows], 'ZeroDivisionError', 1)])
def test_a_bad_reward_stops_the_run(tmp_path, function, words, culprit):
    x = torch.stack([torch.full((3, 4, 4), v / 255) for v in (10, 20, 30)])
    r = [{**row, 'source_image': Path('/x')} for row in rows()]
    with pytest.raises(RewardError) as e:
        checked('mine.py:f', function, x, r, tmp_path / 'new')
    for word in ('mine.py:f', words, PROMPTS[culprit], str(tmp_path / 'new')):
        assert word in str(e.value)
    grey, note = saved(tmp_path / 'new')
    assert grey == 10 * culprit + 10 and note['prompt'] == PROMPTS[culprit] and words in note['why']


def test_a_broken_picture_is_no_reward(tmp_path):
    x = torch.rand(3, 3, 4, 4)
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(RewardError, match='not finite.*two shapes'):
        checked('jpeg', load('jpeg'), x, rows(), tmp_path)
    assert saved(tmp_path)[1]['prompt'] == 'two shapes'


def test_checked_takes_tensors_and_dicts(tmp_path):
    x = torch.rand(2, 3, 4, 4)
    assert checked('t', lambda i, r: torch.tensor([[1.], [2.]]), x, rows(2), tmp_path) == [1.0, 2.0]
    assert checked('d', lambda i, r: [{'right': 1, 'kept': 9}] * 2, x, rows(2), tmp_path) == [1.0, 1.0]


# -------------------------------------------------------------------------------- OmniEdit

def png(colour, size=(40, 24)):
    im = Image.new('RGB', size, (colour, 0, 0))
    im.putpixel((size[0] // 2, size[1] // 2), (0, 255, 0))
    file = io.BytesIO()
    im.save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def example(i, task, **other):
    return {'omni_edit_id': f'task_{task}_{i}', 'task': task, 'src_img': png(50),
            'edited_img': png(100 + i % 100), 'o_score': 8.0,
            'edited_prompt_list': [' ', f'{task}\n it {i}', 'another way to say it'], **other}


@pytest.fixture
def parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path / 'data'
    folder.mkdir()

    def write(examples, name='a'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(examples), folder / f'{name}.parquet')
        return folder
    return write


def table(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def prepare(tmp_path, *words):
    main = from_file(f'{ROOT}/data/omniedit/prepare.py:main')
    main([f'--out={tmp_path / "out"}', '--resolution=16', *words])
    return {p.stem: table(p) for p in (tmp_path / 'out').glob('*.csv')}


def test_omniedit(tmp_path, parquet, capsys):
    tasks = ['addition', 'removal', 'swap', 'attribute_modification', 'style', 'env']
    parquet([example(i, task) for task in tasks[:3] for i in range(30)], 'a')
    bad = [example(900, 'env', edited_img=png(9, (24, 40))), example(901, 'env', edited_img=png(50)),
           example(902, 'env', edited_prompt_list=['', ' ']), example(903, 'env', o_score=1.0),
           example(0, 'style'),
           example(904, 'env', src_img=png(1, (40, 15)), edited_img=png(2, (40, 15))),
           example(905, 'env', src_img={'bytes': b'not a picture', 'path': None})]
    source = parquet([example(i, task) for task in tasks[3:] for i in range(30)] + bad, 'b')
    words = f'--source={source}', '--held_out=0.25', '--min_score=2'
    got = prepare(tmp_path, *words)
    assert {k: len(v) + len(got[k + '_val']) for k, v in got.items() if '_val' not in k} == \
        {'local_edit': 120, 'global_edit': 60}
    assert 10 < len(got['local_edit_val']) < 50
    printed = capsys.readouterr().out
    for why in ('sizes differ', 'are the same', 'prompt empty', 'o_score too low', 'id seen before',
                'smaller than', 'unreadable'):
        assert re.search(rf'\b1 skipped: .*{why}', printed), why
    row = got['global_edit'][0]
    assert row['task'] == 'global_edit' and row['kind'] in ('style', 'env')
    buckets, errors = read_data([tmp_path / 'out' / f'{k}_edit.csv' for k in ('local', 'global')])
    assert not errors and {k: len(b) for k, b in buckets.items()} == {k: len(got[k]) for k in buckets}
    assert list(buckets) == ['local_edit', 'global_edit']   # which configs name in their routes
    assert re.fullmatch(r'(style|env) it \d+', row['prompt'])
    pair = [Image.open(tmp_path / 'out' / row[k]) for k in ('source_image', 'target_image')]
    assert [p.size for p in pair] == [(16, 16)] * 2 and pair[0].getpixel((0, 0)) == (50, 0, 0)
    spot = [max((p.getpixel((x, y))[1], x, y) for x in range(16) for y in range(16)) for p in pair]
    assert spot[0][1:] == spot[1][1:]                       # the same crop for both
    # a second run: what is there is kept, what is missing comes back, the tables are the same
    kept, gone = (tmp_path / 'out' / row[k] for k in ('source_image', 'target_image'))
    other = tmp_path / 'out' / got['global_edit'][1]['source_image']
    gone.unlink()
    stamp = other.stat().st_mtime_ns
    assert prepare(tmp_path, *words) == got and gone.exists() and other.stat().st_mtime_ns == stamp


def test_omniedit_limit_is_shared_by_the_tasks(tmp_path, parquet):
    source = parquet([example(i, task) for task in ('style', 'swap', 'env', 'removal') for i in range(9)])
    got = prepare(tmp_path, f'--source={source}', '--limit=8', '--held_out=0')
    kinds = lambda name: sorted(r['kind'] for r in got[name])
    assert kinds('local_edit') == ['removal'] * 2 + ['swap'] * 2
    assert kinds('global_edit') == ['env'] * 4 + ['style'] * 4
    assert got['local_edit_val'] == []


def test_omniedit_reads_no_further_than_the_limit(tmp_path, parquet):
    """A share that nobody wants goes to the others, and is not waited for: the hub's stream is 3 TB long."""
    rows = [example(i, task) for i in range(9) for task in ('style', 'env', 'swap')]
    source = parquet(rows + [{**example(9, 'teleport')}])              # it would stop there
    tasks = '--skip_tasks=["style", "addition", "removal", "attribute_modification"]'
    got = prepare(tmp_path, f'--source={source}', '--limit=6', '--held_out=0', tasks)
    assert [len(got[k]) for k in ('local_edit', 'global_edit')] == [6, 6]
    assert {r['kind'] for r in got['global_edit']} == {'env'}
    with pytest.raises(BadInput, match='leaves no task'):
        prepare(tmp_path, f'--source={source}', tasks, '--local_tasks=[]', '--global_tasks=["style"]')


def test_omniedit_bad_input(tmp_path, parquet):
    source = parquet([example(0, 'swap'), example(1, 'teleport')])
    for words, match in {(f'--source={source}',): 'teleport.*skip_tasks.*Known: addition',
                         (f'--source={tmp_path}/none',): 'no such file',
                         (f'--source={source}', '--held_out=1.0'): 'held_out',
                         (f'--source={source}', '--min_score=9.0', '--skip_tasks=["teleport"]'):
                         'no pair.*o_score'}.items():
        with pytest.raises(BadInput, match=match):
            prepare(tmp_path, *words)
    got = prepare(tmp_path, f'--source={source}', '--held_out=0.0', '--global_tasks=["style", "teleport"]')
    assert len(got['global_edit']) == 1
    parquet([{k: v for k, v in example(0, 'swap').items() if k != 'o_score'}], 'a')
    with pytest.raises(BadInput, match='o_score'):
        prepare(tmp_path, f'--source={source}')
    file = source / 'a.parquet'
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match='a.parquet cannot be read: fetch it again'):
        prepare(tmp_path, f'--source={source}')
