"""Tiny pipelines of every family, with its real shapes: 8 pixels are one latent pixel."""
from common import *

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
    return T.find_family(type(pipe).__name__)(pipe, 'cpu', LENGTH)


shared = functools.cache(build)                                        # for those who only look
