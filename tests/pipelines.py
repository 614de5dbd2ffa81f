"""Tiny pipelines of every family, with its real shapes; and the same pictures by them and by us."""
from conftest import *

SIZES = (32, 48), (64, 32)
LARGER = (64, 80), (96, 64)                                # Omni's pipeline edits none smaller
WORDS = ['cat', 'a red ball on two green cubes', 'snow at night']
LENGTH = 64                                                # text tokens: Qwen's template is longer


def length(name):
    return 256 if name in QWENS else LENGTH


# -------------------- tiny pipelines: 8 pixels are one of the VAE's latents, as in the real ones
def tokenizer(length, wrap='$A', **more):
    """One token a byte. `wrap` is where the begin and the end of a text are marked."""
    import tokenizers as tk
    names = ['<pad>', '<bos>', '<eos>', '<|im_start|>', '<|im_end|>', '<|vision_start|>',
             '<|vision_end|>', '<|image_pad|>']
    vocab = {t: i for i, t in enumerate(names + sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    t = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[]))
    t.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.add_special_tokens(names)
    marks = [('<bos>', 1), ('<eos>', 2)]
    t.post_processor = tk.processors.TemplateProcessing(single=wrap, special_tokens=marks)
    out = hf.PreTrainedTokenizerFast(
        tokenizer_object=t, model_max_length=length, pad_token='<pad>', bos_token='<bos>',
        eos_token='<eos>', model_input_names=['input_ids', 'attention_mask'], **more)
    out.chat_template = ('{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}'
                         '<|im_end|>\n{% endfor %}<|im_start|>assistant\n')
    return out


def clip(n, projected):
    c = hf.CLIPTextConfig(vocab_size=300, hidden_size=16, intermediate_size=16, projection_dim=16,
                          num_attention_heads=2, num_hidden_layers=2, pad_token_id=0,
                          bos_token_id=1, eos_token_id=2)
    kind = hf.CLIPTextModelWithProjection if projected else hf.CLIPTextModel
    return {f'text_encoder{n}': kind(c), f'tokenizer{n}': tokenizer(77, '<bos> $A <eos>')}


def t5(n, width):
    c = hf.T5Config(vocab_size=300, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                    pad_token_id=0, eos_token_id=2, is_encoder_decoder=False, use_cache=False)
    return {f'text_encoder{n}': hf.T5EncoderModel(c), f'tokenizer{n}': tokenizer(256, '$A <eos>')}


def vae(channels, scale, shift):
    return diffusers.AutoencoderKL(
        latent_channels=channels, scaling_factor=scale, shift_factor=shift, norm_num_groups=4,
        block_out_channels=(8,) * 4, down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4, sample_size=64, use_quant_conv=shift is None,
        use_post_quant_conv=shift is None)


flow = diffusers.FlowMatchEulerDiscreteScheduler


def sd3(channels=16, **schedule):
    net = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=channels, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32,
        pooled_projection_dim=32, pos_embed_max_size=16, qk_norm='rms_norm',
        dual_attention_layers=(0,))
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, vae=vae(16, 1.5305, 0.0609), scheduler=flow(**schedule or dict(shift=3.0)),
        **clip('', True), **clip('_2', True), **t5('_3', 32))


def qwen3(kind, layers, width=16):
    return kind(hf.Qwen3Config(
        vocab_size=300, hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        head_dim=8, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2))


def zimage(omni=False):
    net = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1,
        cap_feat_dim=16, siglip_feat_dim=16 if omni else None, axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32])
    for k, p in net.named_parameters():
        if k.endswith('pad_token'):                            # the library leaves them as they lie
            torch.nn.init.normal_(p)
    parts = dict(transformer=net, vae=vae(16, 0.3611, 0.1159), scheduler=flow(shift=3.0),
                 text_encoder=qwen3(hf.Qwen3Model, 2), tokenizer=tokenizer(512))
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
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=embeds, axes_dims_rope=(4, 6, 6))
    return kind(transformer=net, vae=vae(16, 0.3611, 0.1159), **clip('', False), **t5('_2', 16),
                scheduler=flow(**schedule or dict(shift=3.0, use_dynamic_shifting=True)))


def mistral():
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(
        text_config=dict(model_type='mistral', vocab_size=300, hidden_size=8, intermediate_size=8,
                         num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1,
                         head_dim=4, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        vision_config=dict(model_type='pixtral', hidden_size=8, num_hidden_layers=1, patch_size=6,
                           num_attention_heads=2, intermediate_size=8, image_size=30),
        vision_feature_layer=-1, image_token_index=7))


def flux2(klein=True):
    eye = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
        sample_size=64, use_quant_conv=False, use_post_quant_conv=False)
    eye.bn.running_mean.normal_(0, 0.2), eye.bn.running_var.uniform_(0.5, 1.5)
    net = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=1, joint_attention_dim=24, axes_dims_rope=(4,) * 4,
        guidance_embeds=not klein)
    parts = dict(transformer=net, vae=eye, scheduler=flow(shift=3.0, use_dynamic_shifting=True))
    if klein:                                                  # which reads layers 9, 18, 27
        return diffusers.Flux2KleinPipeline(
            **parts, text_encoder=qwen3(hf.Qwen3ForCausalLM, 27, 8), tokenizer=tokenizer(512))
    # the end of a text counts: it begins with a long message of the system's
    words = tokenizer(512, padding_side='left', truncation_side='left')
    return diffusers.Flux2Pipeline(**parts, text_encoder=mistral(), tokenizer=words)


class VLProcessor:
    """Qwen2VLProcessor without its video part, which needs torchvision."""

    def __init__(self):
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil
        self.eye = pil.Qwen2VLImageProcessorPil(
            patch_size=14, size=dict(shortest_edge=28 ** 2, longest_edge=4 * 28 ** 2))
        self.tokenizer = tokenizer(4096)

    def __call__(self, text, images, padding, return_tensors):
        seen = self.eye(images=images, return_tensors=return_tensors)
        n = int(seen['image_grid_thw'].prod()) // self.eye.merge_size ** 2
        text = [t.replace('<|image_pad|>', '<|image_pad|>' * n) for t in text]
        words = self.tokenizer(text, padding=padding, return_tensors=return_tensors)
        return hf.BatchFeature({**words, **seen})


def qwen(kind=diffusers.QwenImagePipeline, **more):
    eye = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1,
        latents_std=[1 + i / 9 for i in range(16)])
    net = diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4), **more)
    lm = hf.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, rope_parameters=dict(rope_type='default', rope_theta=1e6,
                                                 mrope_section=[1, 1, 2])),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           out_hidden_size=16, patch_size=14, fullatt_block_indexes=[0]),
        image_token_id=7, video_token_id=1, vision_start_token_id=5, vision_end_token_id=6)
    steps = flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192,
                 shift_terminal=0.02)
    text = hf.Qwen2_5_VLForConditionalGeneration(lm)
    parts = dict(transformer=net, vae=eye, scheduler=steps, text_encoder=text,
                 tokenizer=tokenizer(2048))
    edit = kind is not diffusers.QwenImagePipeline
    return kind(**parts, **(dict(processor=VLProcessor()) if edit else {}))


def unet(kind=diffusers.DDIMScheduler, xl=False, **schedule):
    more = dict(addition_embed_type='text_time', addition_time_embed_dim=8,
                use_linear_projection=True,
                projection_class_embeddings_input_dim=6 * 8 + 16) if xl else {}
    net = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=2, down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=32 if xl else 16,
        **more)
    steps = kind(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1,
                 **(dict(clip_sample=False) if kind is diffusers.DDIMScheduler else {}), **schedule)
    parts = dict(unet=net, vae=vae(4, 0.13025 if xl else 0.18215, None), scheduler=steps,
                 **clip('', False))
    if xl:
        return diffusers.StableDiffusionXLPipeline(**parts, **clip('_2', True),
                                                   add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)


euler, plus = diffusers.EulerDiscreteScheduler, diffusers.QwenImageEditPlusPipeline
ZERO = dict(timestep_spacing='trailing', rescale_betas_zero_snr=True,
            prediction_type='v_prediction')
BUILD = {
    'sd3': sd3, 'sd3-turbo': lambda: sd3(shift=5.0), 'sd3-wide': lambda: sd3(32),
    'sd3-dynamic': lambda: sd3(use_dynamic_shifting=True),
    'zimage': zimage, 'omni': lambda: zimage(True),
    'flux': flux, 'schnell': lambda: flux(embeds=False, shift=1.0),
    'kontext': lambda: flux(diffusers.FluxKontextPipeline),
    'klein': flux2, 'flux2': lambda: flux2(False), 'qwen': qwen,
    'sd15': lambda: unet(set_alpha_to_one=False),
    'sd15-v': lambda: unet(prediction_type='v_prediction'),
    'sd15-sample': lambda: unet(prediction_type='sample'),
    'sd15-zero': lambda: unet(**ZERO), 'sd-turbo-zero': lambda: unet(euler, **ZERO),
    'sd-turbo': lambda: unet(euler, timestep_spacing='trailing'),
    'sdxl': lambda: unet(euler, xl=True, timestep_spacing='leading')}
SHOWN = {                                                  # whose words see a source; never saved
    'qwen-edit': lambda: qwen(diffusers.QwenImageEditPipeline),
    'qwen-plus': lambda: qwen(plus), 'qwen-2511': lambda: qwen(plus, zero_cond_t=True)}
UNETS = [k for k in BUILD if k.startswith('sd') and not k.startswith('sd3')]
FLUX2S, QWENS = ('klein', 'flux2'), ('qwen', *SHOWN)
PACKED = 'flux', 'schnell', 'kontext', *QWENS              # whose pipelines take latents as tokens
NATIVE = [k for k in BUILD if k != 'sd3-wide']             # whose pipelines sample from text
EACH = ['sd3', 'sd3-wide', 'zimage', 'omni', 'flux', 'kontext', 'klein', 'qwen', 'sd15', 'sdxl']


def build(name):
    """A new field of that family, the same weights every time, and larger than the library's: text,
    time and pictures shall count in the output."""
    torch.manual_seed(0)
    pipe = (BUILD | SHOWN)[name]()
    pipe.set_progress_bar_config(disable=True)
    for p in (pipe.unet if name in UNETS else pipe.transformer).parameters():
        p.data += torch.randn_like(p) * 0.1
    return T.find_family(type(pipe).__name__)(pipe, 'cpu', length(name))


shared = functools.cache(build)                            # for those who only look


# -------------------- the same pictures, by us and by the pipelines
@functools.cache
def picture(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def sources(field, size, folder, n):
    """n random pictures as the field takes them, and their paths."""
    paths = [str(folder / f'{i}.png') for i in range(n)]
    for i, path in enumerate(paths):
        picture(i, size).save(path)
    with torch.no_grad():
        return [dict(field.encode_source(path, *size), path=path) for path in paths]


def conditions(field, prompts, given=()):
    """(cond, empty) for guidance."""
    given = given or [{}] * len(prompts)
    with torch.no_grad():
        return tuple([{**field.encode(p, s.get('path', '')), **s} for p, s in zip(ps, given)]
                     for ps in (prompts, [''] * len(prompts)))


def noise(field, n, size, seed=0):
    return torch.randn(n, *field.shape(*size), generator=torch.Generator().manual_seed(seed))


def off(a, b):
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


def pixels(field, z):
    return [64 // field.shape(64, 64)[1] * x for x in z.shape[-2:]]


def pipeline(name, prompts, eps, n, w, image=None, output='latent'):
    """What diffusers makes of the same noise; w is our guidance."""
    field, pipe = shared(name), shared(name).pipe
    h, wide = pixels(field, eps)
    k = dict(prompt=list(prompts), num_inference_steps=n, output_type=output, height=h, width=wide,
             latents=pipe._pack_latents(eps, *eps.shape) if name in PACKED else eps.clone())
    k |= dict(image=image) if image else {}
    k |= {} if name in UNETS else dict(max_sequence_length=length(name))
    if name in PACKED:
        k |= dict(true_cfg_scale=w, negative_prompt=[' ' if name in QWENS else ''] * len(prompts))
        k |= {} if name in QWENS else dict(guidance_scale=field.distilled_guidance)
        k |= dict(max_area=h * wide, _auto_resize=False) if name == 'kontext' else {}
    elif name == 'flux2':                                      # it has no guidance but this
        k |= dict(guidance_scale=field.distilled_guidance)
    else:
        k |= dict(guidance_scale=w - 1 if name in ('zimage', 'omni') else w)
    out = pipe(**k).images
    if output != 'latent':
        return out
    if name in PACKED:
        out = pipe._unpack_latents(out, h, wide, pipe.vae_scale_factor)
    elif name == 'flux2':
        out = out.mT.unflatten(2, eps.shape[2:])
    elif name == 'klein':                                      # which undoes the normalisation
        bn, out = pipe.vae.bn, pipe._patchify_latents(out)
        std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        out = (out - bn.running_mean[:, None, None]) / std[:, None, None]
    return out.reshape(eps.shape)


def forward(velocity, z, s, batch):
    return velocity(z, s, batch)


def ours(name, cond, empty, eps, n, w, sigmas=None, warp=forward):
    """Our rollout, on the pipeline's scale. `warp` may spoil the velocity, `sigmas` the times."""
    field = shared(name)
    size = pixels(field, eps)
    S, scale = field.sigmas(n, *size) if sigmas is None else sigmas, 1.0
    if name == 'sd15':                                         # its DDIM stops at the table's first
        f = field.pipe.scheduler.alphas_cumprod[0]
        a, b = f.sqrt(), (1 - f).sqrt()
        S, scale = torch.cat([S[:-1], (b / (a + b))[None]]), a + b

    def velocity(z, s, batch):
        return guided(field, z, s, [b.cond for b in batch], [b.empty for b in batch], w)
    batch = [SimpleNamespace(cond=c, empty=e) for c, e in zip(cond, empty)]
    z = field.first_state(eps, n, *size)
    return T.denoise(lambda batch, z, s: warp(velocity, z, s, batch), batch, z, S) * scale


def guided(field, z, s, cond, empty, w):
    """By a model that is nothing but this field."""
    batch = [SimpleNamespace(cond=c, empty=e) for c, e in zip(cond, empty or [None] * len(cond))]
    return T.Models(field).velocity('base', batch, z, s, w)


def bar(name):
    """UNets' latents are up to 100 here; the Euler pipeline itself rounds at its sigma of 4096."""
    return 2e-3 if name == 'sd-turbo-zero' else 5e-4 if name in UNETS else 1e-4


def steps(name, n):
    """The nearest number of steps for which the pipeline is sane: Qwen's last sigma is set, and
    DDIM's trailing times are as far apart as its steps only where 1000 is a multiple of n."""
    return max(n, 2) if name in QWENS else 8 if (name, n) == ('sd15-zero', 7) else n
