"""
On-policy distillation (OPD) of flow-matching image generators, in one file.

A student samples with its own current weights. At states z_sigma that it visited itself, a frozen teacher
chosen for that sample (a skill, an edit, a style, guidance itself) says which velocity it would have had; the
student learns it. Several specialists become one model, adapters on one frozen base like the student.

    python train_opd.py                                      the demonstration: shapes, on a CPU
    python train_opd.py config/sd35_edit.py --lr=1e-4        one GPU: a config file, then single settings
    torchrun --nproc_per_node=8 train_opd.py config/sd35_edit.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST train_opd.py config/sd35_edit.py
    python train_opd.py config/sd35_edit.py --dry_run        checks settings and data, loads nothing
    python train_opd.py config/sd35_edit.py --init_from=resume

Left out on purpose: full fine-tuning (a LoRA student shares its base with every teacher), FSDP (the base is
frozen), step distillation, adversarial losses; learning from rewards is train_teacher.py's.
One convention everywhere: z = (1 - sigma) x0 + sigma eps, v = eps - x0, sigma from 1 (noise) to 0 (picture).
"""
import atexit, contextlib, copy, functools, itertools, json, math, os, random
import resource, signal, sys, time, warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import configurator
import merge_lora
from configurator import BadInput, collect, configure, need
from files import (REMAKE, Log, claim, curve, grid, is_hub_id, load_function, load_image, model_configs,
                   newest, open_buckets, save_checkpoint, score_mean, sha256, table)

# ------------------------------------------------------------------------------------------------------------
# Settings: these are the demonstration's. A config file or --key=value overrides them; only the last rooms,
# the run and the training, read them. In brackets the papers' values.
# model
model = 'data/shapes/base'          # diffusers folder or hub id
family = ''                         # '' reads it from model_index.json; else one of FAMILIES below
dtype = 'auto'                      # of the frozen base: auto = bfloat16 on a GPU, float32 on a CPU
device = ''                         # '' takes a GPU if there is one
resolution: int | list = 24         # pixels: one number, or [height, width]
max_sequence_length = 256           # text tokens, at most what the tokenizer allows
distilled_guidance = 3.5            # FLUX's embedded guidance (dev 3.5, Kontext 2.5); others have none
# teachers: neither lora nor checkpoint is the frozen base; guidance 1.0 is none; weight: for mixing = 'soft'
teachers = [
    dict(name='base'),
    dict(name='count', lora='data/shapes/teachers/count'),
    dict(name='local_edit', lora='data/shapes/teachers/local_edit'),
    dict(name='global_edit', lora='data/shapes/teachers/global_edit')]
teacher_offload = False             # keep full-checkpoint teachers on the CPU between uses
# routes: which teacher answers for which bucket; weight, or samples where routes share a step unequally
routes = [
    dict(teacher='base', data='t2i', weight=0.5, samples=2),
    dict(teacher='count', data='count', weight=0.5, samples=2),
    dict(teacher='local_edit', data='local_edit', weight=2.0, samples=15),
    dict(teacher='global_edit', data='global_edit', weight=2.0, samples=15)]
routes_per_step: int | str = 'all'  # 1 a step (DanceOPD); 'all' (DiffusionOPD); 'sample': each its own
cycle: list = []                    # with 1: a fixed order of buckets, as ['ocr', 'geneval', 'geneval']
mixing = 'hard'                     # 'soft': each target is the weighted mean of all teachers' (ablation)
# data: CSV, JSONL or TXT; a row's bucket is its `task`, else its file's name. Held-out: same name, or + _val
data: list = ['data/shapes/t2i.csv', 'data/shapes/count.csv', 'data/shapes/local_edit.csv',
              'data/shapes/global_edit.csv']
eval_data: list = ['data/shapes/t2i_val.csv', 'data/shapes/count_val.csv', 'data/shapes/local_edit_val.csv',
                   'data/shapes/global_edit_val.csv']   # a bucket without is evaluated on its training rows
cache_gb = 4.0                      # embeddings kept in memory; if not all prompts fit, chunk by chunk
encode_every = 50                   # steps whose prompts are encoded in one visit of the text encoders
# student
init_from = 'merge'                 # 'base', 'merge' (mean of the teachers' deltas), 'resume', or an adapter
rank = 32                           # of the LoRA (DanceOPD 128, DiffusionOPD 32)
alpha = 32.0                        # its scale is alpha / rank (DanceOPD 128, DiffusionOPD 64)
lora_targets: list | None = None    # layers or endings; None: the starting adapter's, else the family's
# rollout
steps = 4                           # Euler steps of the student's rollout (DanceOPD 16, DiffusionOPD 10)
eta = 0.0                           # 0: ODE; else the noise of the SDE (Flow-OPD 0.7)
sde = 'flow'                        # 'flow', 'dance', 'cps'
rollout_guidance = 1.0              # classifier-free guidance while rolling out; 1.0 is none, in every family
student_guidance = 1.0              # and in the loss; each teacher has its own
states = 'student'                  # ablations, off-policy: 'data' (noised targets), 'teacher' (its rollouts)
# method
method = 'danceopd'                 # 'danceopd', 'diffusionopd', 'flowopd'
queries = 1                         # danceopd: K states of a rollout that are learned from
query = 'stratified'                # 'low' Beta(5, 2) (DanceOPD), 'mid' (5, 5), 'high' (2, 5), 'uniform'
query_space = 'index'               # or 'sigma': the same biases on the noise level, not the step's number
kl_var = 'true'                     # 'code' leaves out the step's length, as all released code does
drop_last: int | bool = 0           # leave out so many last steps (DiffusionOPD's release: 1)
reward = 'k1'                       # flowopd's: 'k1', 'code' (as released), 'paper' (a no-op, to study)
group_size = 1                      # flowopd: samples of one prompt (16)
updates = 1                         # flowopd: optimizer steps a rollout (2)
clip_range = 1e-4                   # flowopd: PPO ratio
adv_clip = 5.0                      # flowopd: advantages
anchor = ''                         # 'base' or a teacher: the student is also held near it (Flow-OPD's MAR)
anchor_beta = 0.0                   # how strongly (Flow-OPD 0.04)
# optimiser
max_steps = 500
batch_size = 34                     # samples a step, all routes and processes together
micro_batch = 30                    # samples a forward; the rest is gradient accumulation
lr = 8e-3                           # (DanceOPD 2e-4, DiffusionOPD 3e-4)
lr_schedule = 'cosine'              # or 'constant'
warmup = 20                         # steps
weight_decay = 0.0                  # (DiffusionOPD 1e-4)
betas: list = [0.9, 0.99]
grad_clip = 1.0                     # 0: none
ema_decay = 0.98                    # 0: none (DiffusionOPD 0.9)
ema_every = 1                       # steps (DiffusionOPD 8)
max_bad_steps = 5                   # updates in a row without a finite gradient before the run stops
grad_checkpointing = False
compile = False                     # torch.compile, block by block
tf32 = True
seed = 0
# output
out_dir = 'out/shapes'
eval_every = 250                    # steps between evaluations (gap by route, and the picture)
eval_samples = 32                   # samples a route in them
show = 4                            # of which so many are drawn in the picture
sample_steps = 8                    # Euler steps of those pictures and of the score
score = 'data/shapes/world.py:score'  # file.py:function(images, rows) -> a number or dict a picture; '': none
score_samples = 128                 # pictures a route that the score is asked about, at the end
save_every = 100
ckpt_keep = 2
log_every = 10
wandb_log = False
wandb_project = 'train_opd'
dry_run = False                     # check all that can be checked without weights, print the table, stop
SETTINGS = collect(sys.modules[__name__])
DISTILLATION = '''teachers teacher_offload routes routes_per_step cycle mixing rollout_guidance
student_guidance states queries query query_space kl_var anchor anchor_beta score_samples'''.split()  # OPD's


# ------------------------------------------------------------------------------------------------------------
# The flow: one step of a sampler as a Gaussian, and the weight that each method gives to a velocity error

def transition(z, v, sigma, sigma_next, eta=0.0, kind='flow'):
    """From sigma to sigma_next < sigma: (mean, std). eta = 0 is the ODE, std 0. Shapes broadcast."""
    d = sigma_next - sigma
    if eta == 0:
        return z + d * v, torch.zeros_like(d)
    x0, eps = z - sigma * v, z + (1 - sigma) * v
    if kind == 'cps':                                                  # Flow-CPS keeps the signal's scale
        std = sigma_next * math.sin(eta * math.pi / 2)
        return (1 - sigma_next) * x0 + (sigma_next ** 2 - std ** 2).clamp_min(0).sqrt() * eps, std
    if kind == 'flow':                                                 # g = eta sqrt(sigma / (1 - sigma))
        g = eta * (sigma / (1 - torch.where(sigma >= 1, sigma_next, sigma))).sqrt()
    else:                                                              # 'dance': g = eta
        g = eta * torch.ones_like(sigma)
    return z + d * (v + g ** 2 / (2 * sigma) * eps), g * (-d).sqrt()


def log_prob(x, mean, std):
    """Gaussian log-density, mean over dimensions: one number a sample."""
    return (-(x - mean) ** 2 / (2 * std ** 2) - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def kl_weight(sigma, sigma_next, eta=0.0, kind='flow', var='true'):
    """w in KL(student || teacher) = w mean((v_s - v_t)^2): c^2 / (2 std^2) with c = d mean / d v; for the ODE
    the limit d^2 / 2. 'code' divides by 2 g^2 = 2 std^2 / -d, as DiffusionOPD and Flow-OPD released it."""
    c, std = transition(torch.zeros_like(sigma), torch.ones_like(sigma), sigma, sigma_next, eta, kind)
    if eta == 0:
        return c ** 2 / 2
    return c ** 2 / (2 * std ** 2) * (sigma - sigma_next if var == 'code' else 1)


def velocity_error(v, v_target):
    return (v - v_target).square().flatten(1).mean(1)                  # one number a sample


def relative_gap(v, v_target):
    return (v - v_target).flatten(1).norm(dim=1) / v_target.flatten(1).norm(dim=1).clamp_min(1e-12)


def col(sigma):
    return sigma.view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------------
# Fields: a model family as a velocity. `cond` is a list of dicts, one a sample: its text, an edit's 'source'.

class Field:
    """What the families share: a pipeline's denoiser, VAE and scheduler."""
    patch, prefix, listed = 2, 'transformer', True

    def __init__(self, pipe, device='cpu', max_sequence_length=256, distilled_guidance=3.5):
        self.pipe, self.device, self.net = pipe, torch.device(device), getattr(pipe, self.prefix)
        self.vae, self.max_length, self.distilled_guidance = pipe.vae, max_sequence_length, distilled_guidance
        self.factor, self.dtype = 2 ** (len(self.vae.config.block_out_channels) - 1), self.net.dtype
        self.can_edit = type(pipe).__name__ in EDITORS
        stay = [m for m in (self.net, self.vae, getattr(pipe, 'siglip', None)) if m]  # the last sees sources
        for m in (*stay, *self.encoders().values()):
            m.requires_grad_(False).eval()
        for m in stay:
            m.to(self.device)

    def encoders(self):
        return {k: m for k, m in self.pipe.components.items() if k.startswith('text_encoder') and m}

    def shape(self, height, width):
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    def sigmas(self, n, height, width):
        """The pipeline's own schedule: n + 1 numbers, from pure noise to 0."""
        s, k = copy.deepcopy(self.pipe.scheduler), dict(mu=1.0)
        if s.config.use_dynamic_shifting:                              # mu is linear in the number of tokens
            c, tokens = s.config, height * width // (self.factor * self.patch) ** 2
            slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
            k['mu'] = c.base_shift + slope * (tokens - c.base_image_seq_len)
        k |= dict(sigmas=torch.linspace(1, 1 / n, n).tolist()) if self.listed else dict(num_inference_steps=n)
        s.set_timesteps(**k)
        return s.sigmas.float().cpu()

    def start(self, eps, n, height, width):
        return eps                                                     # the state at sigmas[0] for unit noise

    def encode_image(self, x):
        """Pixels in [-1, 1] -> clean latents."""
        c = self.vae.config
        z = self.vae.encode(x.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (z - (c.shift_factor or 0)) * c.scaling_factor

    def encode_source(self, path, height, width):
        return {'source': self.encode_image(load_image(path, height, width)[None])[0]}

    def decode(self, z):
        """Latents -> pixels in [0, 1]."""
        c = self.vae.config
        z = (z / c.scaling_factor + (c.shift_factor or 0)).to(self.vae.dtype)
        some = max(1, 2 ** 18 // (z.shape[2] * z.shape[3] * self.factor ** 2))  # a quarter megapixel a time
        return torch.cat([(self.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1) for x in z.split(some)])

    def velocity(self, z, sigma, cond):
        """z (B, C, H, W), sigma (B,) float32 -> v float32. Autocast lives here and nowhere else."""
        low = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        with torch.autocast(self.device.type, low, enabled=self.dtype != torch.float32):
            return self.forward(z, sigma.float(), cond).float()

    def stack(self, cond, key):
        return torch.stack([c[key] for c in cond]).to(self.device, self.dtype)


class SD3(Field):
    """SD3, SD3.5. Editing: the clean source stands left of the noisy target in one wide picture (a diptych);
    a transformer with twice as many input as output channels gets it as channels instead."""
    listed = False                                                     # no list: sigma_min is shifted twice
    targets = [f'attn.{k}' for k in ('to_q', 'to_k', 'to_v', 'to_out.0',
                                     'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out')]

    @property
    def patch(self):
        return self.net.config.patch_size

    def encode(self, prompts, edit=False):
        t5 = self.pipe.tokenizer_3
        length = min(self.max_length, t5.model_max_length if t5 else 512)
        e, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, device=self.device,
                                                  do_classifier_free_guidance=False,
                                                  max_sequence_length=length)
        return [dict(text=a, pooled=b) for a, b in zip(e.cpu(), pooled.cpu())]

    def forward(self, z, sigma, cond):
        x, wide = z, self.net.config.in_channels == 2 * self.net.config.out_channels
        if 'source' in cond[0] or wide:
            source = self.stack(cond, 'source').to(z.dtype) if 'source' in cond[0] else torch.zeros_like(z)
            x = torch.cat([z, source], 1) if wide else torch.cat([source, z], 3)
        return self.net(hidden_states=x.to(self.dtype), timestep=1000 * sigma,
                        encoder_hidden_states=self.stack(cond, 'text'), return_dict=False,
                        pooled_projections=self.stack(cond, 'pooled'))[0][..., -z.shape[-1]:]


class ZImage(Field):
    """Z-Image, -Turbo and -Omni (editing). Time runs backwards, the output is negated, captions are ragged.
    The pipeline's guidance g is c + g (c - u); here as everywhere it is w = g + 1, and 1.0 means none."""
    targets = ['to_q', 'to_k', 'to_v', 'to_out.0']

    def encode(self, prompts, edit=False):
        k = dict(num_condition_images=int(edit)) if self.can_edit else {}
        es, _ = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False,
                                        max_sequence_length=self.max_length, **k)  # list(): it is overwritten
        return [dict(text=[p.cpu() for p in e] if self.can_edit else e.cpu()) for e in es]

    def encode_source(self, path, height, width):
        x = load_image(path, height, width)
        picture = Image.fromarray(((x / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())
        seen = self.pipe.prepare_siglip_embeds([picture], 1, self.device, torch.float32)[0][0]
        return {'source': self.encode_image(x[None])[0], 'seen': seen}

    def forward(self, z, sigma, cond):
        to = lambda x: x.to(self.device, self.dtype)
        t, x = (1000 - 1000 * sigma) / 1000, [to(a)[:, None] for a in z]
        if not self.can_edit:
            out = self.net(x, t=t, cap_feats=[to(c['text']) for c in cond], return_dict=False)[0]
        else:
            sources = [[to(c['source'])[:, None]] if 'source' in c else [] for c in cond]
            out = self.net(x=[s + [a] for s, a in zip(sources, x)], t=t,
                           cap_feats=[[to(p) for p in c['text']] for c in cond],
                           siglip_feats=[[to(c['seen']), None] if 'seen' in c else None for c in cond],
                           image_noise_mask=[[0] * len(s) + [1] for s in sources], return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)


class Flux(Field):
    """FLUX.1 dev, schnell, and Kontext (editing: the source's tokens follow the target's, first id 1)."""
    targets = SD3.targets + ['ff.net.0.proj', 'ff.net.2', 'ff_context.net.0.proj', 'ff_context.net.2']

    def encode(self, prompts, edit=False):
        e, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=self.device,
                                               max_sequence_length=self.max_length)
        return [dict(text=a, pooled=b) for a, b in zip(e.cpu(), pooled.cpu())]

    def tokens(self, z, first):
        """(B, C, H, W) -> (B, HW/4, 4C) by 2 x 2 patches, and their ids (first, row, column)."""
        x = torch.nn.functional.pixel_unshuffle(z, 2)                  # (B, 4C, H/2, W/2)
        ids = torch.cartesian_prod(torch.tensor([first]), *map(torch.arange, x.shape[2:]))
        return x.flatten(2).mT, ids.to(z.device, self.dtype)

    def forward(self, z, sigma, cond):
        (h, w), (x, ids), text = z.shape[2:], self.tokens(z, 0), self.stack(cond, 'text')
        n, embeds = x.shape[1], self.net.config.guidance_embeds
        if 'source' in cond[0]:
            source, more = self.tokens(self.stack(cond, 'source').to(z.dtype), 1)
            x, ids = torch.cat([x, source], 1), torch.cat([ids, more])
        out = self.net(hidden_states=x.to(self.dtype), timestep=1000 * sigma / 1000,
                       encoder_hidden_states=text, guidance=torch.full_like(sigma, self.distilled_guidance)
                       if embeds else None, pooled_projections=self.stack(cond, 'pooled'), img_ids=ids,
                       txt_ids=ids.new_zeros(text.shape[1], 3), return_dict=False)[0][:, :n]
        return torch.nn.functional.pixel_shuffle(out.mT.unflatten(2, (h // 2, w // 2)), 2)


class UNet(Field):
    """SD1.x, SD-Turbo, SDXL, SDXL-Turbo with epsilon or v prediction, as a flow: with a = sqrt(abar_t) and
    b = sqrt(1 - abar_t), sigma = b / (a + b) and z = x_t / (a + b). Euler in z is DDIM in x_t."""
    patch, prefix, targets = 1, 'unet', ['to_q', 'to_k', 'to_v', 'to_out.0']
    euler = 'EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'DDIMScheduler'

    def __init__(self, pipe, *a, **k):
        super().__init__(pipe, *a, **k)
        if type(pipe.scheduler).__name__ not in self.euler:
            from diffusers import DDIMScheduler                # PNDM, DPM-Solver and others: no Euler steps
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        abar = pipe.scheduler.alphas_cumprod.double()
        self.noise = ((1 - abar) / abar).sqrt()                        # b / a of every t: grows with t

    def schedule(self, n):
        s = copy.deepcopy(self.pipe.scheduler)
        s.set_timesteps(n)
        if hasattr(s, 'sigmas'):                               # the Euler scheduler speaks b / a itself
            return s.sigmas.double().cpu(), s.init_noise_sigma
        t = s.timesteps.long().cpu().clamp(max=len(self.noise) - 1)    # SD1.5's offset can lead beyond
        k = torch.cat([self.noise[t], self.noise.new_zeros(1)])
        return k, (k[0] ** 2 + 1).sqrt()                               # DDIM starts from x_T of unit variance

    def sigmas(self, n, height, width):
        k, _ = self.schedule(n)
        return (k / (1 + k)).float()                           # from the table's largest, never from 1

    def start(self, eps, n, height, width):
        k, scale = self.schedule(n)
        return eps * float(scale / (1 + k[0]))

    def encode(self, prompts, edit=False):
        if 'text_encoder_2' not in self.pipe.components:
            e = self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]
            return [dict(text=a) for a in e.cpu()]
        e, _, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.device,
                                                  do_classifier_free_guidance=False)
        zero = self.pipe.config.force_zeros_for_empty_prompt           # SDXL's empty prompt is nothing at all
        return [dict(text=a * (not zero or bool(p)), pooled=b * (not zero or bool(p)))
                for p, a, b in zip(prompts, e.cpu(), pooled.cpu())]

    def forward(self, z, sigma, cond):
        s, last = col(sigma), len(self.noise) - 1
        a, b = (1 - s) / (s ** 2 + (1 - s) ** 2).sqrt(), s / (s ** 2 + (1 - s) ** 2).sqrt()
        x, k = z * (a + b), sigma.cpu().double()                       # not every device has float64
        k = k / (1 - k)
        hi = torch.searchsorted(self.noise, k).clamp(1, last)  # sigma -> t by the table, also between rows
        t = (hi - 1 + (k - self.noise[hi - 1]) / (self.noise[hi] - self.noise[hi - 1])).clamp(0, last)
        t = torch.where((t - t.round()).abs() < 0.02, t.round(), t).float().to(self.device)
        extra = {}
        if 'pooled' in cond[0]:
            h, w = z.shape[2] * self.factor, z.shape[3] * self.factor
            ids = torch.tensor([h, w, 0, 0, h, w], device=self.device, dtype=self.dtype).expand(len(z), 6)
            extra = dict(added_cond_kwargs=dict(text_embeds=self.stack(cond, 'pooled'), time_ids=ids))
        m = self.net(x.to(self.dtype), t, encoder_hidden_states=self.stack(cond, 'text'),
                     **extra).sample.float()
        if self.pipe.scheduler.config.prediction_type == 'v_prediction':
            return (a * m + b * x) - (a * x - b * m)                   # eps - x0
        return m - (x - b * m) / a


FAMILIES = dict(StableDiffusion3Pipeline=SD3, ZImagePipeline=ZImage, ZImageOmniPipeline=ZImage,
                FluxPipeline=Flux, FluxKontextPipeline=Flux, StableDiffusionPipeline=UNet,
                StableDiffusionXLPipeline=UNet)
EDITORS = 'StableDiffusion3Pipeline', 'ZImageOmniPipeline', 'FluxKontextPipeline'


def peek(path, family=''):
    """What is known without weights: (pipeline's name, {component: config}); of a hub id the name given."""
    configs = model_configs(path)
    name = family or configs.get('index', {}).get('_class_name', '')
    need(not name or name in FAMILIES,
         f'{path}: {name} is not a family known here; known are: {", ".join(FAMILIES)}')
    return name, configs


def check_size(name, configs, height, width, editing):
    """Can the family take this size, and edit? `name` is '' for a hub id that nobody has seen yet."""
    vae, net, sd3 = configs.get('vae', {}), configs.get('transformer', {}), name == 'StableDiffusion3Pipeline'
    patch = net.get('patch_size', 2) if sd3 else FAMILIES[name].patch if name else 2
    unit = 2 ** (len(vae['block_out_channels']) - 1 if vae else 3) * patch
    for what, x in (('height', height), ('width', width)):
        need(x >= unit and x % unit == 0, f'resolution: {name or "this model"} takes a {what} in '
             f'multiples of {unit} pixels, not {x}; the nearest is {max(unit, round(x / unit) * unit)}')
    need(not editing or not name or name in EDITORS, f'{name} cannot edit a source image; these can: '
         f'{", ".join(EDITORS)}. Take source_image out of the data, or another model')
    wide = 2 if editing and net.get('in_channels') == net.get('out_channels') else 1
    most = net.get('pos_embed_max_size', 10 ** 6) if sd3 else 10 ** 6
    need(height // unit <= most and wide * width // unit <= most, f'resolution: {height} x {width}'
         f'{" as a diptych" * (wide - 1)} is larger than this model\'s position table, {most * unit} pixels')


def check_whole(net, what):
    """diffusers leaves what a file lacks without memory."""
    lost = [k for k, p in net.named_parameters() if p.is_meta]
    need(not lost, f'{what}: its weights lack {len(lost)} tensors, as {lost[:1]}; fetch or make it again')


def open_field(path, dtype=torch.float32, device='cpu', family='', max_sequence_length=256,
               distilled_guidance=3.5):
    """A diffusers folder or hub id -> its field, with the weights loaded."""
    name, _ = peek(path, family)
    import diffusers, transformers
    for x in (diffusers.utils.logging, transformers.utils.logging):
        x.set_verbosity_error(), x.disable_progress_bar()
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        name, _ = peek(path, name or index['_class_name'])     # of a hub id it is known only now
        skip = {k: None for k in ('safety_checker', 'feature_extractor', 'image_encoder') if k in index}
        # float32 for the VAE; but Omni's pipeline encodes sources in its transformer's dtype
        kinds = dtype if name == 'ZImageOmniPipeline' else {'default': dtype, 'vae': torch.float32}
        pipe = getattr(diffusers, name).from_pretrained(path, dtype=kinds, **skip)
    except BadInput:
        raise
    except Exception as e:                                             # whatever it was: to be fetched again
        local = 'a file of it is missing or damaged: fetch or make it again' if Path(path).exists() else \
            'download it, or give a local folder; gated models need: hf auth login'
        raise BadInput(f'model {path} could not be loaded: {local}{REMAKE * ("shapes" in path)}. It said: '
                       f'{str(e).strip()[:300]}')
    for part in (getattr(pipe, FAMILIES[name].prefix), pipe.vae):
        check_whole(part, f'model {path}')
    return FAMILIES[name](pipe, device, max_sequence_length, distilled_guidance)


def guided(field, z, sigma, cond, empty=None, w=1.0):
    """v_empty + w (v_cond - v_empty), both in one forward; no unconditional forward at w = 1."""
    if w == 1:
        return field.velocity(z, sigma, cond)
    v, v_empty = field.velocity(torch.cat([z, z]), torch.cat([sigma, sigma]), [*cond, *empty]).chunk(2)
    return v_empty + w * (v - v_empty)


# ------------------------------------------------------------------------------------------------------------
# One frozen base, adapters on it by name, full models beside it

def add_adapter(net, name, **config):
    from peft import LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                # several on one model are the point
        net.add_adapter(LoraConfig(**config), adapter_name=name)


def attach(net, name, adapter, dtype=None):
    """Puts adapter tensors {module: (A, B, scale)} on the net under a name, exactly as they are, frozen."""
    add_adapter(net, name, r=1, lora_alpha=1, target_modules=sorted(adapter))
    for key, (A, B, scale) in adapter.items():
        layer = net.get_submodule(key)
        for part, x in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
            x = x.to(layer.weight.device, dtype or x.dtype)
            part.weight = torch.nn.Parameter(x, requires_grad=False)
        layer.scaling[name], layer.r[name] = float(scale), A.shape[0]


class Models:
    """Who can be asked for a velocity: 'base', 'student', and every teacher by its name."""

    def __init__(self, field, teachers=(), offload=False):
        self.field, self.full, self.offload, self.cost = field, {}, offload, {'base': 0}
        self.layers, self.adapters = [], {'student'}
        for t in teachers:
            name, dtype = t['name'], field.dtype
            if t.get('lora'):
                adapter = self.fit(merge_lora.read_adapter(t['lora']), f'teacher {name!r}')
                attach(field.net, name, adapter, dtype)
                self.adapters.add(name)
                self.cost[name] = sum(a.numel() + b.numel() for a, b, _ in adapter.values()) * dtype.itemsize
            elif t.get('checkpoint'):
                net = self.load_full(t['checkpoint']).requires_grad_(False).eval()
                self.full[name] = copy.copy(field)
                self.full[name].net = net.to('cpu' if offload else field.device)
                self.cost[name] = sum(p.numel() * p.element_size() for p in net.parameters())
        self.refresh()

    def fit(self, adapter, what):
        """An adapter's tensors under this net's names; all must land."""
        shapes = {k.removesuffix('.base_layer'): tuple(m.weight.shape)
                  for k, m in self.field.net.named_modules()
                  if 'lora_' not in k and isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        return merge_lora.fit(adapter, shapes, what)

    def load_full(self, path):
        own, path, said, net = self.field.net, os.path.expanduser(path), '', None
        for sub in (None,) if (Path(path) / 'config.json').exists() else (self.field.prefix, None):
            try:                                               # of a whole pipeline, or the network alone
                net = net or type(own).from_pretrained(path, subfolder=sub, dtype=own.dtype)
            except Exception as e:
                said = said or str(e).strip()[:300]
        need(net, f'checkpoint {path} could not be loaded as a {type(own).__name__}: give a diffusers '
             f'folder or hub id of the same family. It said: {said}')
        check_whole(net, f'checkpoint {path}')
        for k in ('in_channels', 'out_channels'):
            need(net.config.get(k) == own.config.get(k),
                 f'checkpoint {path} has {k} {net.config.get(k)}, the base {own.config.get(k)}')
        return net

    def refresh(self):
        from peft.tuners.tuners_utils import BaseTunerLayer
        self.layers = [m for m in self.field.net.modules() if isinstance(m, BaseTunerLayer)]
        for m in self.layers:                  # autocast does it; PEFT would copy every input once more
            m.cast_input_dtype_enabled = False
        for n, p in self.field.net.named_parameters():         # attaching an adapter makes it trainable
            p.requires_grad_('.student.' in n)

    def switch(self, name):
        """Fast: PEFT's own calls would rewrite requires_grad. None is the bare base."""
        for m in self.layers:
            m._disable_adapters = name is None
            if name is not None:
                m._active_adapter = [name]

    def velocity(self, who, z, sigma, cond, empty=None, w=1.0):
        if who in self.full:
            f = self.full[who]
            f.net.to(f.device)
            v = guided(f, z, sigma, cond, empty, w)
            if self.offload:
                f.net.to('cpu')
            return v
        self.switch(who if who in self.adapters else None)
        try:
            return guided(self.field, z, sigma, cond, empty, w)
        finally:
            self.switch('student')                     # backward recomputes: it must find the student


class Student:
    """The one adapter that learns, in float32, with its optimizer and its average."""

    def __init__(self, net, rank, alpha, targets, seed=0, init=None, betas=(0.9, 0.99), weight_decay=0.0):
        torch.manual_seed(seed)
        linear = [k.removesuffix('.base_layer') for k, m in net.named_modules()
                  if 'lora_' not in k and isinstance(m, torch.nn.Linear)]
        hit = lambda k, t: k == t or k.endswith('.' + t)
        lost = [t for t in targets if not any(hit(k, t) for k in linear)]
        need(not lost, f'lora_targets: no linear layer of the model is called {", ".join(lost[:5])}')
        names = sorted(k for k in linear if any(hit(k, t) for t in targets))
        surplus = sorted(set(init or ()) - set(names))
        need(not surplus, f'init_from: {len(surplus)} modules of the start, as {surplus[:1]}, are not in '
             f'lora_targets; add them there, or leave lora_targets None')
        add_adapter(net, 'student', r=rank, lora_alpha=alpha, target_modules=names,
                    init_lora_weights='gaussian')
        self.params = {n: p for n, p in net.named_parameters() if '.student.' in n}
        for p in self.params.values():
            p.data = p.data.float()                            # PEFT made them in the base's dtype
        for key, module in (init or {}).items():
            layer, (A, B) = net.get_submodule(key), merge_lora.to_rank(module, rank)
            used = int(A.flatten(1).any(1).sum())                      # surplus rows keep their random start
            layer.lora_A['student'].weight.data[:used] = A[:used]
            layer.lora_B['student'].weight.data.copy_(B / (alpha / rank))
        self.names, self.alpha, self.ema = names, alpha, None
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.0, betas=tuple(betas),
                                           weight_decay=weight_decay)

    def tensors(self):
        return {n: p.detach().clone() for n, p in self.params.items()}

    @contextlib.contextmanager
    def wearing(self, tensors):
        """For a while, other weights: the average, or the start."""
        own = self.tensors()
        try:
            for n, p in self.params.items():
                p.data.copy_((tensors or own)[n])
            yield
        finally:
            for n, p in self.params.items():
                p.data.copy_(own[n])

    def modules(self, tensors):
        """{module: (A, B)} as adapter files have it."""
        part = lambda k, ab: tensors[f'{k}.lora_{ab}.student.weight'].cpu()
        return {k: (part(k, 'A'), part(k, 'B')) for k in self.names}

    def save(self, folder, prefix):
        merge_lora.write_adapter(folder, self.modules(self.tensors()), self.alpha, prefix)
        if self.ema:
            merge_lora.write_adapter(folder / 'ema', self.modules(self.ema), self.alpha, prefix)
        state = dict(student=self.tensors(), ema=self.ema, optimizer=self.optimizer.state_dict())
        torch.save(state, folder / 'train_state.pt')

    def load(self, folder):
        try:
            state = torch.load(folder / 'train_state.pt', map_location='cpu', weights_only=True)
        except Exception as e:
            raise BadInput(f'{folder}/train_state.pt cannot be read ({e}); delete {folder} to resume from '
                           f'the checkpoint before it')
        shapes = lambda tensors: {n: x.shape for n, x in tensors.items()}
        need(shapes(state['student']) == shapes(self.params), f'{folder} holds another adapter than these '
             'settings make: rank, lora_targets and model must be those of its meta.json')
        for n, p in self.params.items():
            p.data.copy_(state['student'][n])
        if self.ema:                                           # an average that is new starts from here
            ema = state['ema'] or self.tensors()
            self.ema = {n: x.to(self.params[n].device) for n, x in ema.items()}
        own = self.optimizer.state_dict()                              # a resume follows the settings
        self.optimizer.load_state_dict({**own, 'state': state['optimizer']['state']})


# ------------------------------------------------------------------------------------------------------------
# Plan: which samples a step has. Nothing random need be saved: every stream follows from (seed, step, sample)

def rng(*key):
    return random.Random(repr(key))


def torch_rng(*key):
    return torch.Generator().manual_seed(rng(*key).getrandbits(62))


def draw_indices(r, k, sigmas, bias='low', space='index', slot=0, of=1):
    """K distinct step numbers of a rollout. `slot` of `of` is this sample's place among those of its route,
    so that 'stratified' spreads a step's queries evenly over the rollout."""
    n, taken = len(sigmas) - 1, []
    ab = {'low': (5, 2), 'mid': (5, 5), 'high': (2, 5)}.get(bias)
    for j in range(k):
        u = (slot + j * of + r.random()) / (k * of) if bias == 'stratified' else \
            r.betavariate(*ab) if ab else r.random()
        i = min(int(u * n), n - 1)
        if space == 'sigma':
            i = min(range(n), key=lambda m: abs(float(sigmas[m]) - float(sigmas[0]) * (1 - u)))
        taken.append(min((m for m in range(n) if m not in taken), key=lambda m: abs(m - i)))  # nearest free
    return sorted(taken)


def portions(routes, batch):
    """How many of a step's samples each route has, where every route is in every step."""
    return [r.get('samples', batch // len(routes)) for r in routes]


def plan(step, seed, routes, sizes, batch, per_step='all', cycle=(), group=1):
    """The global batch of a step, a pure function: each sample's number, group, route, row, loss share
    and place in its route. So neither the number of processes nor a resume changes a sample."""
    n, weights = batch // group, [r.get('weight', 1.0) for r in routes]
    pick = lambda *key: rng(seed, step, *key).choices(range(len(routes)), weights)[0]
    if per_step == 'sample':
        who = [pick(g, 'route') for g in range(n)]
    elif per_step == 'all':
        who = [i for i, k in enumerate(portions(routes, batch)) for _ in range(k // group)]
    else:
        who = [[r['data'] for r in routes].index(cycle[step % len(cycle)]) if cycle else pick('route')] * n
    out = []
    for number in range(batch):
        g, i = number // group, who[number // group]
        of = who.count(i) * group
        out.append(SimpleNamespace(
            number=number, group=g, route=i, row=rng(seed, step, g, 'row').randrange(sizes[i]),
            share=weights[i] / sum(weights) / of if per_step == 'all' else 1 / batch,
            slot=sum(w == i for w in who[:g]) * group + number % group, of=of))
    return out


def text_key(row):
    return row['prompt'], bool(row['source_image'])


class Prompts:
    """Text embeddings by (prompt, is it an edit). The text encoders visit the device for what is missing, and
    leave it."""

    def __init__(self, field):
        self.field, self.kept, self.chunk, self.encoded = field, {}, {}, 0

    def __getitem__(self, key):
        return self.kept.get(key) or self.chunk[key]

    def add(self, keys, keep=False):
        """Encodes what is missing. What is not kept lives until the next chunk."""
        keys = list(dict.fromkeys(keys))
        self.chunk = self.chunk if keep else {k: self.chunk[k] for k in keys if k in self.chunk}
        into = self.kept if keep else self.chunk
        new = [k for k in keys if k not in self.kept and k not in self.chunk]
        encoders = self.field.encoders().values() if new else ()
        for m in encoders:
            m.to(self.field.device)
        for edit in (False, True):
            some = [p for p, e in new if e == edit]
            for i in range(0, len(some), 16):
                with torch.no_grad():
                    into.update(zip(((p, edit) for p in some[i:i + 16]),
                                    self.field.encode(some[i:i + 16], edit)))
        self.encoded += len(new)
        for m in encoders:
            m.to('cpu')

    def size(self, key):
        parts = (x for v in self[key].values() for x in (v if isinstance(v, list) else [v]))
        return sum(x.numel() * x.element_size() for x in parts)

    @torch.no_grad()
    def conditions(self, rows, height, width):
        """Rows -> (cond, empty): what a field takes, and the same without the words, for guidance. It is on
        the device, brought there once for all the forwards to come."""
        move = lambda x: [*map(move, x)] if isinstance(x, list) else x.to(self.field.device)
        here = functools.cache(lambda *key: {k: move(x) for k, x in self[key].items()})
        sources = [self.field.encode_source(r['source_image'], height, width) if r.get('source_image') else {}
                   for r in rows]
        return ([{**here(r['prompt'], bool(s)), **s} for r, s in zip(rows, sources)],
                [{**here('', bool(s)), **s} for s in sources])


# ------------------------------------------------------------------------------------------------------------
# Rollout: a model's own states, without gradient

@torch.no_grad()
def rollout(velocity, z, sigmas, last, eta=0.0, kind='flow', generators=None):
    """Yields (i, alive, states z[alive] at sigmas[i]) for i = 0, 1, ...; sample j leaves after index last[j].
    What is sent back, if anything, is taken as the velocity there, so that nobody computes it twice."""
    alive = [*range(len(z))]
    for i in range(len(sigmas)):
        v = yield i, alive, z
        on = [k for k, j in enumerate(alive) if last[j] > i]
        if not on:
            return
        z, alive = z[on], [alive[k] for k in on]
        s, s_next = sigmas[i].expand(len(z)), sigmas[i + 1].expand(len(z))
        v = velocity(z, s, alive) if v is None else v[on]
        z, std = transition(z, v, col(s), col(s_next), eta, kind)
        if eta:
            noise = [torch.randn(z.shape[1:], generator=generators[j]) for j in alive]
            z = z + std * torch.stack(noise).to(z.device)


def pick(t, k):
    """Some samples of a trajectory: entries k of its lists, columns k of its tensors (steps, B, ...)."""
    part = lambda x: x[:, k] if torch.is_tensor(x) else [x[j] for j in k] if isinstance(x, list) else x
    return SimpleNamespace(**{name: part(x) for name, x in vars(t).items()})


def sample(velocity, z, sigmas, eta=0.0, kind='flow', generators=None):
    """The whole way down: clean latents."""
    for _, _, x in rollout(velocity, z, sigmas, [len(sigmas) - 1] * len(z), eta, kind, generators):
        pass
    return x


# ------------------------------------------------------------------------------------------------------------
# Losses: one number a sample each. Every one is a weighted velocity error; the weight is the method: 1 for
# DanceOPD (2606.27377), which learns from K states of the student's own rollout

def diffusionopd_loss(v, v_target, sigma, sigma_next, eta=0.0, kind='flow', var='true'):
    """DiffusionOPD (2605.15055): KL(student's step || teacher's step), at every state."""
    return kl_weight(sigma, sigma_next, eta, kind, var) * velocity_error(v, v_target)


def group_advantage(rewards, group, clip=5.0, std=None, eps=1e-6):
    """(r - mean) / std within each group of `group` in a row, clipped; or with one std for all of a batch.
    Groups without spread get zeros."""
    r = rewards.view(-1, group)
    std = r.std(1, keepdim=True) if std is None else std
    flat = r.amax(1, keepdim=True) - r.amin(1, keepdim=True) <= eps
    a = (r - r.mean(1, keepdim=True)) / (std + eps)
    return a.masked_fill(flat, 0).clamp(-clip, clip).view(-1)


def ppo_loss(logp, logp_old, advantage, clip_range):
    """max(-A r, -A clip(r)), r = pi / pi_old; also the ratio, for the log."""
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio.detach()


def flowopd_reward(estimator, logp_teacher, logp_student, kl):
    """Flow-OPD (2605.08063), reward of one step. 'k1': log p_T(a|s) - log p_S(a|s) of the drawn action, whose
    policy gradient is that of -KL; its mean over actions, -KL(s), is taken off as a baseline, because in many
    dimensions it would drown what the action did. 'paper', 'code': -KL(s) itself, a function of the state
    alone: as E[A(s) grad log pi] = 0, 'paper' teaches nothing and is here to study; 'code' keeps the KL's
    own gradient in the loss below."""
    return logp_teacher - logp_student + kl if estimator == 'k1' else -kl


def flowopd_loss(logp, logp_old, kl, advantage, estimator, clip_range, adv_clip=5.0):
    """The policy gradient of one step. 'code', as released: -KL is the advantage and keeps its gradient, and
    is not centred within the group, which would cancel it."""
    if estimator == 'code':
        advantage = (-kl).clamp(-adv_clip, adv_clip)
    return ppo_loss(logp, logp_old, advantage, clip_range)


# ------------------------------------------------------------------------------------------------------------
# A run: what distillation and train_teacher.py share. From here on `c` is all settings

def launch(device='', tf32=True):
    """This process among all: rank, size, device. Works with and without torchrun."""
    rank, size, local = (int(os.environ.get(k, d))
                         for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    gpu = torch.cuda.is_available() and not device.startswith('cpu')
    device = f'cuda:{local}' if gpu and device in ('', 'cuda') else device or 'cpu'
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if gpu else 'gloo', timeout=timedelta(hours=1))  # one may be fetching
        atexit.register(dist.destroy_process_group)            # at a good end: see configurator.run
    return SimpleNamespace(rank=rank, size=size, device=torch.device(device))


def gather(world, x):
    """Lists of all processes, one after the other."""
    if world.size == 1:
        return x
    parts = [None] * world.size
    dist.all_gather_object(parts, x)
    return [y for p in parts for y in p]


def learning_rate(step, c):
    """Warm-up, then constant or cosine: from the settings at every step, so that a resume follows them."""
    decay = 0.5 * (1 + math.cos(math.pi * step / c.max_steps)) if c.lr_schedule == 'cosine' else 1.0
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * max(decay, 0.02)


def own_settings(settings, argv):
    """The settings of this run. With another model the demonstration's eval_data and score mean nothing."""
    given = set()
    c = configure(settings, argv, given)
    for k, none in (('eval_data', []), ('score', '')):
        if c.model != settings[0]['model'] and k not in given and getattr(c, k) == settings[0][k]:
            setattr(c, k, none)
    c.model = os.path.expanduser(c.model)
    return c


def check_number(what, x):
    need(type(x) in (int, float) and 0 < x < math.inf, f'{what} must be more than 0, not {x!r}')


def check_settings(c, defaults, choices, owners, updates, above='lr alpha clip_range adv_clip'):
    """What both trainers ask of settings. Some are one of a few `choices`; integers are at least 1, floats at
    least 0, but for those named here; what belongs to one method or two, `owners`, is left alone with the
    others, so that nothing is set in vain; processes and `updates` share a batch in whole groups."""
    choices = dict(choices, sde=('flow', 'dance', 'cps'), lr_schedule=('constant', 'cosine'),
                   dtype=('auto', 'float32', 'bfloat16'))              # float16 has not the range
    for k, known in choices.items():
        need(getattr(c, k) in known, f'{k}: {getattr(c, k)!r} is not one of {", ".join(map(repr, known))}')
    for k, x in vars(c).items():
        if k in above.split():
            check_number(k, x)
        elif type(x) in (int, float) and k != 'seed':
            least = int(type(x) is int and k not in ('drop_last', 'warmup', 'score_samples', 'best_of'))
            need(x >= least, f'{k} must be at least {least}, not {x}')
    for names, methods in owners.items():
        for k in names.split():
            need(c.method in methods or getattr(c, k) == defaults[k], f'{k} belongs to {methods}; leave it '
                 f'at {defaults[k]!r} with method = {c.method!r}')
    need(not c.wandb_log or find_spec('wandb'), 'wandb_log needs a package more: pip install wandb')
    need(c.ema_decay < 1, f'ema_decay must be below 1, not {c.ema_decay}')
    need(len(c.betas) == 2 and all(type(x) in (int, float) and 0 <= x < 1 for x in c.betas),
         f'betas: two numbers from 0 to below 1, not {c.betas}')
    need(c.sde != 'cps' or c.eta <= 1, f"eta = {c.eta}: at most 1 with sde = 'cps', whose noise is "
         "sigma' sin(eta pi / 2)")
    need(c.drop_last < c.steps, f'drop_last = {c.drop_last} leaves nothing of a rollout of {c.steps} step(s)')
    world = int(os.environ.get('WORLD_SIZE', 1))
    unit = c.group_size * updates * world
    need(c.batch_size % unit == 0, f'batch_size = {c.batch_size} does not divide into {world} processes x '
         f'{updates} updates x groups of {c.group_size}; the nearest that does is '
         f'{max(unit, round(c.batch_size / unit) * unit)}')
    if c.score:
        load_function(c.score)
    if c.init_from not in ('base', 'merge', 'resume') and not is_hub_id(c.init_from):
        merge_lora.read_adapter(c.init_from)                           # there, whole and readable


def check_data(c, labels, need_target=False):
    """Training and held-out buckets, every picture looked at; can the model take this size and sources?"""
    size = (c.resolution, c.resolution) if isinstance(c.resolution, int) else tuple(c.resolution)
    need([type(x) for x in size] == [int, int], 'resolution: a number, or [height, width]')
    buckets, held = open_buckets(c.data, c.eval_data, labels, need_target)
    editing, (family, configs) = any(b.sources for b in buckets.values()), peek(c.model, c.family)
    check_size(family, configs, *size, editing)
    return SimpleNamespace(size=size, family=family, buckets=buckets, held=held, editing=editing)


class Run:
    """Models, words, log, checkpoints and loop of one run folder."""

    def __init__(self, c, d, plan, eval_rows, teachers=(), merged=None):
        self.c, self.d, self.out, self.plan, self.notes = c, d, Path(c.out_dir), plan, []
        self.skipped, self.bad, self.stop, self.nan, self.at, self.route = 0, 0, 0, '', '?', ''
        self.t0 = time.time()
        self.first, self.step, self.state, self.world = 0, 0, [], launch(c.device, c.tf32)
        world, path = self.world, lambda t: t.get('lora') or t.get('checkpoint') or c.model
        self.say = print if world.rank == 0 else lambda *a: None
        settings = {k: v for k, v in vars(c).items() if k not in ('dry_run', 'device')}
        files = {t['name']: merge_lora.find(t['lora']) if t.get('lora') else path(t) for t in teachers}
        self.meta = dict(settings=settings, teachers={
            t['name']: dict(path=path(t), sha256=sha256(files[t['name']])) for t in teachers})
        last = claim(c.out_dir, c.init_from == 'resume', self.meta) if world.rank == 0 else None
        if world.size > 1:
            dist.barrier()                                             # one process looks after the folder
            last = newest(c.out_dir) if c.init_from == 'resume' else None
            seen = set(gather(world, [last and last.name]))
            need(len(seen) == 1, f'{c.out_dir} has to be one folder for all machines, but they see {seen}')

        if c.init_from not in ('base', 'merge', 'resume'):
            merge_lora.find(c.init_from)                               # fetched before the large model is
        low = 'bfloat16' if world.device.type == 'cuda' else 'float32'
        self.field = field = open_field(c.model, getattr(torch, low if c.dtype == 'auto' else c.dtype),
                                        world.device, c.family, c.max_sequence_length, c.distilled_guidance)
        configs = dict(vae=dict(field.vae.config), transformer=dict(field.net.config))
        check_size(type(field.pipe).__name__, configs, *d.size, d.editing)  # a hub id's are known only now
        self.sigmas = field.sigmas(c.steps, *d.size).to(world.device)
        self.models = Models(field, teachers, getattr(c, 'teacher_offload', False))
        if last:                                                       # where the run began is a file of it
            old = json.loads((last / 'meta.json').read_text())
            settings['init_from'] = old['settings']['init_from']
            self.first, self.state = old['step'], old['state']
            start = merge_lora.read_adapter(self.out / 'start')
        elif c.init_from in ('base', 'merge'):
            start = merged(self.models) if c.init_from == 'merge' else None
        else:
            start = self.models.fit(merge_lora.read_adapter(c.init_from), 'init_from')
        targets = c.lora_targets or (sorted(start) if start else field.targets)
        self.student = Student(field.net, c.rank, c.alpha, targets, c.seed, start, c.betas, c.weight_decay)
        self.models.refresh(), self.models.switch('student')
        self.start = self.student.tensors()
        self.student.ema = self.student.tensors() if c.ema_decay else None
        if last:
            self.student.load(last)
            self.say(f'resumed {last}')
        elif world.rank == 0:
            merge_lora.write_adapter(self.out / 'start', self.student.modules(self.start), c.alpha,
                                     field.prefix)
        if c.grad_checkpointing:
            field.net.enable_gradient_checkpointing()
        if c.compile:
            torch._dynamo.config.recompile_limit = 64          # a graph for each adapter and gradient mode
            field.net._repeated_blocks = field.net._repeated_blocks or ['JointTransformerBlock']  # SD3's
            field.net.compile_repeated_blocks(fullgraph=True)

        self.eval_rows = {k: rng(c.seed, 'eval', k).sample(b, min(len(b), eval_rows))
                          for k, b in d.held.items()}
        keys = [('', False), ('', True)][:1 + d.editing]
        self.prompts = Prompts(field)
        self.prompts.add(keys + [text_key(r) for rows in self.eval_rows.values() for r in rows], keep=True)
        mean = sum(map(self.prompts.size, self.prompts.kept)) / len(self.prompts.kept)
        size = sum(map(len, d.buckets.values())) * mean
        self.whole = size < c.cache_gb * 1e9           # all prompts now, or a chunk of steps at a time
        if self.whole:
            self.prompts.add((text_key(r) for b in d.buckets.values() for r in b), keep=True)
            for k in field.encoders():
                setattr(field.pipe, k, None)                           # nobody asks them any more
        if world.rank == 0:
            self.log = Log(self.out, self.first if last else None, **settings)
            for k, b in d.buckets.items():                     # edit pairs, to be looked at before step 0
                if b.sources and not last:
                    rows = [*itertools.islice(b, 8)]
                    grid([[self.picture(r['source_image']), self.picture(r['target_image'])] for r in rows],
                         self.out / 'samples' / f'data_{k}.png', [r['prompt'] for r in rows],
                         ['source', 'target'])
        if not last:
            self.save(0)
        signal.signal(signal.SIGTERM, lambda *a: setattr(self, 'stop', max(self.stop, 1)))

    def picture(self, path):
        return load_image(path, *self.d.size) / 2 + 0.5 if path else None

    def mine(self, step, routes, per_step='sample', cycle=(), same_noise=False, updates=1):
        """This process's samples of a step, whole groups, with their row and random streams: `noise` for the
        start, `draws` for what follows. Of several updates that `parts` makes, it has as much of each."""
        c, buckets = self.c, [self.d.buckets[r['data']] for r in routes]
        todo = plan(step, c.seed, routes, [*map(len, buckets)], c.batch_size, per_step, cycle, c.group_size)
        todo = [s for s in todo if s.group // updates % self.world.size == self.world.rank]
        for s in todo:
            s.data, s.label = buckets[s.route][s.row], routes[s.route]['data']
            s.noise = torch_rng(c.seed, step, s.group if same_noise else s.number, 'noise', same_noise)
            s.draws = torch_rng(c.seed, step, s.number, 'draws')
        return todo

    def chunks(self, todo, times=1):
        """Samples that can share a forward, with a source picture or without; groups stay whole."""
        size = max(1, times * self.c.micro_batch // self.c.group_size) * self.c.group_size
        for has_source in (False, True):
            some = [s for s in todo if bool(s.data['source_image']) == has_source]
            yield from (some[i:i + size] for i in range(0, len(some), size))

    def parts(self, todo):
        """A rollout's groups, dealt to the optimizer steps that it is used for."""
        return [[s for s in todo if s.group % self.c.updates == u] for u in range(self.c.updates)]

    def begin(self, todo, n, guidance=1.0, who='student'):
        """Gives samples their words and sources. Their states at sigmas[0], and a model to roll them out."""
        for s, cond, empty in zip(todo, *self.prompts.conditions([s.data for s in todo], *self.d.size)):
            s.cond, s.empty = cond, empty
        return (self.field.start(self.noise(todo), n, *self.d.size),
                lambda z, s, alive: self.velocity(who, [todo[j] for j in alive], z, s, guidance))

    def velocity(self, who, todo, z, sigma, guidance=1.0):
        return self.models.velocity(who, z, sigma, [s.cond for s in todo], [s.empty for s in todo], guidance)

    def noise(self, todo):
        shape = self.field.shape(*self.d.size)
        return torch.stack([torch.randn(shape, generator=s.noise) for s in todo]).to(self.world.device)

    def walk(self, todo, last, guidance, velocity=None):
        """The student's rollout of samples, each to its last step number; or that of another velocity."""
        z, own = self.begin(todo, self.c.steps, guidance)
        return rollout(velocity or own, z, self.sigmas, last, self.c.eta, self.c.sde, [s.draws for s in todo])

    @torch.no_grad()
    def trajectory(self, todo, n, guidance):
        """n steps of a stochastic rollout, kept for policy gradients: states, velocities, log p."""
        t, walk = SimpleNamespace(todo=todo, guidance=guidance), self.walk(todo, [n] * len(todo), guidance)
        states, velocities = [next(walk)[2]], []
        few = self.c.micro_batch                               # forwards like those with gradient: one policy
        for s in self.sigmas[:n]:
            parts = ((todo[i:i + few], states[-1][i:i + few]) for i in range(0, len(todo), few))
            velocities.append(torch.cat([self.velocity('student', some, z, s.expand(len(z)), guidance)
                                         for some, z in parts]))
            states.append(walk.send(velocities[-1])[2])
        t.z, t.v = torch.stack(states), torch.stack(velocities)
        t.logp = torch.stack([self.policy(t, i, t.v[i])[1] for i in range(n)])
        return t

    def pieces(self, t):
        """A trajectory's samples, as many at a time as a forward with gradient takes."""
        n = self.c.micro_batch
        return (pick(t, [*range(i, min(i + n, len(t.todo)))]) for i in range(0, len(t.todo), n))

    def policy(self, t, i, v=None):
        """The student's velocity at step i of a trajectory (one number, or one a sample), its log-probability
        of what was drawn there, and the state and sigmas it is about."""
        b = torch.arange(len(t.todo))
        i = torch.as_tensor(i).expand(len(b))
        z, s, s_next = t.z[i, b], self.sigmas[i], self.sigmas[i + 1]
        if v is None:
            v = self.velocity('student', t.todo, z, s, t.guidance)
        mean, std = transition(z, v, col(s), col(s_next), self.c.eta, self.c.sde)
        return v, log_prob(t.z[i + 1, b], mean, std), z, s, s_next

    def render(self, who, label, rows, n, guidance=1.0, tensors=None):
        """Pictures of rows from noise that is the same every time, each process a share of them."""
        sigmas, done = self.field.sigmas(n, *self.d.size).to(self.world.device), []
        todo = [SimpleNamespace(number=i, data=r, noise=torch_rng(self.c.seed, 'eval', label, i))
                for i, r in enumerate(rows)]
        for some in self.chunks(todo[self.world.rank::self.world.size], times=4):
            with torch.no_grad(), self.student.wearing(tensors):
                z, velocity = self.begin(some, n, guidance, who)
                pictures = self.field.decode(sample(velocity, z, sigmas)).cpu()
                done += [(s.number, x.clone()) for s, x in zip(some, pictures)]  # else each sends all of them
        return torch.stack([x for _, x in sorted(gather(self.world, done), key=lambda p: p[0])])

    def judged(self, judge, images, rows):
        """What a scorer says of pictures, each asked about by one process, few at a time as in training."""
        own, few, said = range(len(rows))[self.world.rank::self.world.size], self.c.micro_batch, []
        for some in (list(own[i:i + few]) for i in range(0, len(own), few)):
            said += [*judge(images[some], [rows[i] for i in some])]
        return gather(self.world, said)

    def note(self, todo, **numbers):
        """For the log: numbers of each sample; where one is not finite, route and sigma are remembered."""
        columns = {k: v.tolist() for k, v in numbers.items()}          # one wait for the device a number
        for j, s in enumerate(todo):
            one = {k: v[j] for k, v in columns.items()}
            by_route = {f'train_{k}/{s.label}': x for k, x in one.items() if k in ('gap', 'reward')}
            self.notes.append(one | by_route)
            self.route, here = s.label, f'route {s.label}, sigma {one.get("sigma", math.nan):.3f}'
            self.at = here if 'sigma' in one else self.at
            if not all(map(math.isfinite, one.values())):
                self.nan = here

    def apply(self):
        """One optimizer step, if all is finite: the gradients that have gathered are summed over the
        processes, once, and with them whether any was asked to stop."""
        c, s, params = self.c, self.student, self.student.params.values()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        asked = torch.tensor([float(self.stop > 0)], device=self.world.device)
        flat = torch.cat([*(g.flatten() for g in grads), asked])
        if self.world.size > 1:
            dist.all_reduce(flat)
        self.norm, self.stop = flat[:-1].norm().item(), 2 if flat[-1] else self.stop
        if math.isfinite(self.norm):
            scale = min(1.0, c.grad_clip / (self.norm + 1e-6)) if c.grad_clip else 1.0
            for p, g in zip(params, flat[:-1].split([p.numel() for p in params])):
                p.grad = g.view_as(p) * scale
            s.optimizer.param_groups[0]['lr'] = learning_rate(self.step, c)
            s.optimizer.step()
            if s.ema and (self.step + 1) % c.ema_every == 0:
                for n, p in s.params.items():
                    s.ema[n].lerp_(p.detach(), 1 - c.ema_decay)
            self.bad = 0
        else:
            self.skipped, self.bad = self.skipped + 1, self.bad + 1
        s.optimizer.zero_grad(set_to_none=True)
        if self.bad >= c.max_bad_steps:
            where = self.nan or f'{self.at}, whose loss was finite'
            raise RuntimeError(f'{self.bad} updates in a row had no finite gradient (last at {where}); lower '
                               f'lr, or use dtype=float32. The last checkpoint in {self.out} is from before')
        self.nan = ''

    def at_start(self, prefix, now):
        """An evaluation as it was when the run began: after a resume the log has it."""
        known = self.log.history if self.world.rank == 0 else ()
        old = next((e for e in known if all(prefix + k in e for k in now)), {})
        return {k: old.get(prefix + k, v) for k, v in now.items()}

    def save(self, step):
        if self.world.rank == 0:
            save_checkpoint(self.out, step, lambda folder: self.student.save(folder, self.field.prefix),
                            {**self.meta, 'state': self.state}, self.c.ckpt_keep)
        if self.world.size > 1:
            dist.barrier()

    def steps(self, evaluate):
        """The loop: yields a step's samples, this process's share; around it log, evaluation, checkpoint."""
        c, off, began = self.c, True if self.world.rank else None, time.time()  # None: no bar if none looks
        bar = tqdm(range(self.first, c.max_steps), initial=self.first, total=c.max_steps, disable=off)
        for self.step in bar:
            step, done = self.step, self.step + 1
            if not self.whole and (step == self.first or step % c.encode_every == 0):
                ahead = range(step, min(c.max_steps, step - step % c.encode_every + c.encode_every))
                self.prompts.add(text_key(s.data) for t in ahead for s in self.plan(self, t))
            yield self.plan(self, step)
            if done % c.log_every == 0 or done == c.max_steps:
                self.report(done, bar, (time.time() - began) / (done - self.first))
            if done % c.save_every == 0 or done == c.max_steps or self.stop == 2:
                self.save(done)
            if self.stop == 2:
                self.say(f'\nasked to stop: saved {newest(self.out)}; continue with --init_from=resume')
                raise SystemExit(0)
            if done % c.eval_every == 0 and done < c.max_steps:
                evaluate(done)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)                  # all is saved: it may end at once

    def report(self, done, bar, pace):
        """One line, and an entry of log.jsonl: means of what was noted since the last one, some are sums."""
        notes, self.notes = gather(self.world, self.notes), []
        gpu = self.world.device.type == 'cuda'
        memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else resource.getrusage(0).ru_maxrss / 1e6
        entry = dict(step=done, grad_norm=self.norm, lr=learning_rate(done - 1, self.c), skipped=self.skipped,
                     seconds=round(time.time() - self.t0, 1), memory_gb=round(memory, 2))
        for k in sorted({k for n in notes for k in n}):
            some = [n[k] for n in notes if k in n]
            total = k in ('groups', 'skipped_groups')
            entry[k] = max(some) if k == 'ratio_off' else sum(some) / (1 if total else len(some))
        if self.world.rank == 0:
            self.log.add(entry)
            shown = 'loss gap reward kl sigma ratio_off grad_norm'.split()
            line = [f'{k.removeprefix("train_")} {v:.4g}' for k, v in entry.items()
                    if k in shown or k.startswith('train_')]
            bar.set_postfix({k: f'{entry[k]:.4g}' for k in ('loss', 'gap', 'reward') if k in entry},
                            route=self.route, GB=f'{memory:.1f}')
            bar.write('  '.join([f'step {done:6d}', *line, f'{pace:.2f} s/step', f'{memory:.1f} GB']))

    def end(self, result, curves, name='route'):
        """The result, as a file and for people, and the curves of the log as a picture."""
        if self.world.rank == 0:
            (self.out / 'result.json').write_text(json.dumps(result, indent=1))
            curve(self.log.history, self.out / 'loss.png', curves)
            table(result, name)
            print(f'{time.time() - self.t0:.0f} s; {self.out}/latest holds the adapter, {self.out}/samples '
                  f'the pictures. Try: python sample.py --ckpt {self.out}')


# ------------------------------------------------------------------------------------------------------------
# Training

def check(c):
    """Everything that can be known before weights are loaded."""
    choices = dict(method=('danceopd', 'diffusionopd', 'flowopd'), query_space=('index', 'sigma'),
                   query=('low', 'mid', 'high', 'uniform', 'stratified'), kl_var=('true', 'code'),
                   mixing=('hard', 'soft'), reward=('k1', 'code', 'paper'),
                   states=('student', 'data', 'teacher'), routes_per_step=(1, 'all', 'sample'))
    owners = {'states queries': 'danceopd', 'drop_last': 'diffusionopd or flowopd', 'updates': 'flowopd'}
    check_settings(c, SETTINGS[0], choices, owners, c.updates)
    flow, dance, G, B = c.method == 'flowopd', c.method == 'danceopd', c.group_size, c.batch_size
    need(c.queries <= c.steps, f'queries = {c.queries} distinct states cannot be had from {c.steps} steps')
    need(not flow or G > 1, 'group_size = 1: Flow-OPD compares a prompt\'s samples; at least 2 (paper: 16)')
    need(not flow or c.eta > 0, 'eta = 0: a policy gradient needs a random policy; Flow-OPD has eta = 0.7')
    need(not flow or c.rollout_guidance == c.student_guidance, 'flowopd improves the policy that drew the '
         'samples: rollout_guidance and student_guidance must be equal')
    need(c.kl_var == 'true' or (c.eta and not dance), "kl_var = 'code' is about an SDE's variance: it needs "
         "eta above 0, and diffusionopd or flowopd")
    need(c.sde != 'cps' or not c.eta or dance or (c.drop_last and c.kl_var == 'true'), "sde = 'cps' ends "
         "without noise, where the KL has no value: set drop_last = 1 and kl_var = 'true'")
    need(not c.anchor_beta or c.anchor, "anchor_beta is set but there is no anchor: set anchor = 'base'")
    need(not c.anchor or c.anchor_beta, 'anchor is set but anchor_beta is 0: set both (Flow-OPD: 0.04)')
    for what, some, known in (('teacher', c.teachers, 'name lora checkpoint guidance weight'),
                              ('route', c.routes, 'teacher data weight samples')):
        for x in some:
            need(isinstance(x, dict), f'{x!r}: teachers are dict(name=..., lora=...), routes '
                 'dict(teacher=..., data=...)')
            odd = sorted(set(x) - set(known.split()))
            need(not odd, f'{what} {x}: unknown {odd}; known: {known}')
            check_number(f'{what} {x.get("name") or x.get("data")!r}: weight', x.get('weight', 1))
    taken = {None, 'student', 'default', *dir(torch.nn.ModuleDict())}
    names = [t.get('name') for t in c.teachers]
    for t in c.teachers:
        name, path = t.get('name'), str(t.get('lora') or t.get('checkpoint') or '')
        need(str(name).isidentifier() and name not in taken,
             f'teacher name {name!r}: a word of letters, digits and _, and none that torch uses as "half"')
        need(names.count(name) == 1, f'two teachers are called {name!r}; give each its own name')
        need(not (t.get('lora') and t.get('checkpoint')), f'teacher {name!r} has both lora and checkpoint')
        check_number(f'teacher {name!r}: guidance', t.get('guidance', 1))
        need(name != 'base' or not path, 'the name "base" is the frozen base\'s: give this teacher another')
        need(is_hub_id(path) or Path(path).expanduser().exists(),
             f'teacher {name!r}: {path} does not exist' + REMAKE * path.startswith('data/shapes'))
        if t.get('lora') and not is_hub_id(path):
            merge_lora.read_adapter(path)                              # whole and readable
    there = f'there are: {", ".join(names)}'
    need(c.anchor in ('', 'base', *names), f'anchor: no teacher is called {c.anchor!r}; {there}')
    need(c.routes, 'routes is empty: give at least one dict(teacher=..., data=...)')
    labels, every = [r.get('data') for r in c.routes], c.routes_per_step == 'all'
    for r in c.routes:
        need(r.get('teacher') in names, f'a route names the teacher {r.get("teacher")!r}; {there}')
        need('samples' not in r or every, "`samples` in a route needs routes_per_step = 'all'")
        need(type(r.get('samples', 1)) is int, f'{r}: samples must be a whole number')
    need(len(set(labels)) == len(labels), f'two routes have the same data; each needs its own: {labels}')
    need(not c.cycle or c.routes_per_step == 1, 'cycle needs routes_per_step = 1')
    need(set(c.cycle) <= set(labels), f'cycle: {sorted(set(c.cycle) - set(labels))} are no bucket of a route')
    if every:
        parts = portions(c.routes, B)
        need(sum(parts) == B, f'batch_size is {B}, but the routes\' samples sum to {sum(parts)}: set it so')
        need(all(p > 0 and p % G == 0 for p in parts), f'samples {parts} must be multiples of group_size {G}')
    d = check_data(c, labels, c.states == 'data')
    edits = {b.sources > 0 for b in d.buckets.values()}
    need(c.mixing == 'hard' or len(edits) == 1, "mixing = 'soft' needs routes that all edit, or none")
    loras = {t['name'] for t in c.teachers if t.get('lora')} & {r['teacher'] for r in c.routes}
    need(c.init_from != 'merge' or loras, "init_from = 'merge' needs a route to a teacher that is a LoRA")
    return d


def derived(c, d):
    """The table before step 0: what follows from the settings. Forwards count guidance twice."""
    two, world, size = lambda w: 1 if w == 1 else 2, int(os.environ.get('WORLD_SIZE', 1)), c.batch_size
    cost = {t['name']: two(t.get('guidance', 1.0)) for t in c.teachers}
    parts = portions(c.routes, size) if c.routes_per_step == 'all' else \
        [c.cycle.count(r['data']) if c.cycle else r.get('weight', 1.0) for r in c.routes]
    teacher = sum(cost[r['teacher']] * p for r, p in zip(c.routes, parts)) / sum(parts)
    teacher = sum(cost.values()) if c.mixing == 'soft' else teacher
    n, roll, learn = c.steps - c.drop_last, two(c.rollout_guidance), two(c.student_guidance)
    held = learn if c.anchor else 0
    if c.method == 'danceopd':
        line = torch.linspace(1, 0, c.steps + 1)               # the schedule's shape hardly matters here
        last = [draw_indices(rng('mean', i), c.queries, line, c.query, c.query_space, i, 512)[-1]
                for i in range(512)]
        each = dict(student=roll, teacher=teacher, data=0)[c.states]
        forwards = sum(last) / 512 * each + c.queries * (teacher + learn + held)
    else:
        shared = c.method == 'diffusionopd' and c.rollout_guidance == c.student_guidance
        forwards = n * (teacher + learn + held + (0 if shared else roll))
    yield 'model', f'{c.model} ({d.family or "family unknown until fetched"}), {"%d x %d" % d.size} pixels'
    sampler = f'SDE {c.sde} {c.eta}' if c.eta else 'ODE'
    yield 'method', f'{c.method}, {c.steps} steps, {sampler}, from {c.init_from}'
    yield 'samples a step', f'{size}' + f' in groups of {c.group_size}' * (c.group_size > 1) + \
        f'; {size // world} on each of {world} process(es), {c.micro_batch} a forward'
    yield 'forwards a step', f'{forwards * size:.0f}, {forwards:.1f} a sample, teachers included'
    yield 'updates', f'{c.max_steps * c.updates}, from {c.max_steps * size} rollouts'
    for r, p in zip(c.routes, parts):
        part = f'{p} a step' if c.routes_per_step == 'all' else f'weight {r.get("weight", 1)}'
        yield f'route {r["data"]}', f'teacher {r["teacher"]}, {len(d.buckets[r["data"]])} rows, {part}'


def main(argv):
    c = own_settings(SETTINGS, argv)
    d = check(c)
    for name, text in derived(c, d) if os.environ.get('RANK', '0') == '0' else ():
        print(f'{name:22s} {text}')
    if c.dry_run:
        return print('dry run: settings and data are fine')
    by_name, labels = {t['name']: t for t in c.teachers}, list(d.buckets)
    teacher_of = {r['data']: r['teacher'] for r in c.routes}

    def plan_at(run, step):
        """This process's samples of a step, with their teacher and query indices."""
        todo = run.mine(step, c.routes, c.routes_per_step, c.cycle, updates=c.updates)
        for s in todo:
            s.teacher, r = teacher_of[s.label], rng(c.seed, step, s.number, 'query')
            s.queries = draw_indices(r, c.queries, run.sigmas, c.query, c.query_space, s.slot, s.of)
        return todo

    def merged(models):
        """init_from = 'merge': the mean of the teachers' deltas by route weight (the base's is nothing)."""
        some = [r for r in c.routes if by_name[r['teacher']].get('lora')]
        weights = [r.get('weight', 1.0) for r in some]
        parts = [models.fit(merge_lora.read_adapter(by_name[r['teacher']]['lora']), r['teacher'])
                 for r in some]
        return merge_lora.merge(parts, [w / sum(weights) for w in weights])

    eval_rows = max(c.eval_samples, c.show, c.score_samples if c.score else 0)
    run = Run(c, d, plan_at, eval_rows, c.teachers, merged)
    student, sigmas = run.student, run.sigmas
    run.say(f'{"student":22s} rank {c.rank} on {len(student.names)} layers: '
            f'{sum(p.numel() for p in student.params.values()):,} numbers')
    for name, size in run.models.cost.items():
        run.say(f'{"teacher " + name:22s} {size / 1e9:.4f} GB')

    @torch.no_grad()
    def target(todo, z, s):
        """The velocity that each sample's teacher would have had there; if mixed softly, the mean of all."""
        v, soft = torch.zeros_like(z), c.mixing == 'soft'
        total = sum(t.get('weight', 1.0) for t in c.teachers)
        for t in c.teachers:
            k = [i for i, x in enumerate(todo) if soft or x.teacher == t['name']]
            if k:
                one = run.velocity(t['name'], [todo[i] for i in k], z[k], s[k], t.get('guidance', 1.0))
                v[k] += one * (t.get('weight', 1.0) / total if soft else 1)
        return v

    for t in c.teachers:                                       # a teacher that does nothing is a mistake
        if t.get('lora') or t.get('checkpoint'):
            label = next((k for k, n in teacher_of.items() if n == t['name']), labels[0])
            row = SimpleNamespace(data=run.eval_rows[label][0], noise=torch_rng(0))
            z, _ = run.begin([row], c.steps)
            with torch.no_grad():
                same = torch.equal(*(run.velocity(w, [row], z, sigmas[:1]) for w in (t['name'], 'base')))
            need(not same, f'teacher {t["name"]!r} has the velocity of the base: its weights do nothing')

    def backward(todo, loss, v, z, s, error, times=1.0):
        """The mean loss, and, held by an anchor (MAR), the same error to it."""
        if c.anchor:
            with torch.no_grad():
                v_anchor = run.velocity(c.anchor, todo, z, s, c.student_guidance)
            loss = loss + c.anchor_beta * error(v, v_anchor)
        share = torch.tensor([x.share for x in todo], device=z.device)
        (times * share * loss).sum().backward()

    def learn(todo, z, s, error):
        """Teacher and student at states z of noise s: `error(v, v_target)` and backward."""
        v_t, v = target(todo, z, s), run.velocity('student', todo, z, s, c.student_guidance)
        loss = error(v, v_t)
        backward(todo, loss, v, z, s, error)
        run.note(todo, loss=loss.detach(), sigma=s, gap=relative_gap(v.detach(), v_t))
        return v.detach()

    def visited(todo, velocity=None):
        """What a rollout comes by at its samples' `queries`: (sample, step number, state)."""
        walk = run.walk(todo, [s.queries[-1] for s in todo], c.rollout_guidance, velocity)
        return [(todo[j], i, x) for i, alive, z in walk for j, x in zip(alive, z) if i in todo[j].queries]

    def noised(todo):
        """The same for states = 'data': noise added to the data's own pictures."""
        run.begin(todo, c.steps)
        x0 = run.field.encode_image(torch.stack([load_image(s.data['target_image'], *d.size) for s in todo]))
        eps = lambda s: torch.randn(x0[0].shape, generator=s.draws).to(x0.device)
        return [(s, i, (1 - sigmas[i]) * x + sigmas[i] * eps(s)) for s, x in zip(todo, x0) for i in s.queries]

    def danceopd(todo):
        """K states of each rollout, of mixed sigma, learned together."""
        by_teacher = lambda z, s, alive: target([todo[j] for j in alive], z, s)
        found = noised(todo) if c.states == 'data' else \
            visited(todo, by_teacher if c.states == 'teacher' else None)
        for at in range(0, len(found), c.micro_batch):
            some, i, z = zip(*found[at:at + c.micro_batch])
            learn(some, torch.stack(z), sigmas[list(i)], lambda v, v_t: velocity_error(v, v_t) / c.queries)

    def diffusionopd(todo):
        """Every state, backward as it comes by: memory does not grow with the number of steps."""
        n, shared = c.steps - c.drop_last, c.rollout_guidance == c.student_guidance
        walk = run.walk(todo, [n] * len(todo), c.rollout_guidance)
        i, _, z = next(walk)
        while i < n:
            s, s_next = sigmas[i].expand(len(z)), sigmas[i + 1].expand(len(z))
            v = learn(todo, z, s, lambda v, v_t: diffusionopd_loss(v, v_t, s, s_next, c.eta, c.sde,
                                                                   c.kl_var) / n)
            i, _, z = walk.send(v if shared else None)

    def flowopd(todo):
        """Policy gradient of the same KL, step by step, on trajectories drawn with the weights of before."""
        n = c.steps - c.drop_last
        rolled = [[run.trajectory(x, n, c.rollout_guidance) for x in run.chunks(part)]
                  for part in run.parts(todo)]
        var = 'true' if c.reward == 'k1' else c.kl_var                 # a baseline has to be the very mean
        kl_of = lambda v, v_t, s, s_next, var: diffusionopd_loss(v, v_t, s, s_next, c.eta, c.sde, var)
        for t in itertools.chain(*rolled):
            t.v_t = torch.stack([target(t.todo, t.z[i], sigmas[i].expand(len(t.todo))) for i in range(n)])
            t.advantage = torch.empty_like(t.logp)
            for i in range(n):
                _, logp_t, _, s, s_next = run.policy(t, i, t.v_t[i])
                drawn = kl_of(t.v[i], t.v_t[i], s, s_next, var)
                reward = flowopd_reward(c.reward, logp_t, t.logp[i], drawn)
                t.advantage[i] = group_advantage(reward, c.group_size, c.adv_clip)
        for part in rolled:
            for t, i in ((p, i) for t in part for p in run.pieces(t) for i in range(n)):
                v, logp, z, s, s_next = run.policy(t, i)
                error = lambda v, v_t: kl_of(v, v_t, s, s_next, c.kl_var)
                kl = error(v, t.v_t[i])
                loss, ratio = flowopd_loss(logp, t.logp[i], kl, t.advantage[i], c.reward, c.clip_range,
                                           c.adv_clip)
                backward(t.todo, loss, v, z, s, error, c.updates / n)
                off = (ratio - 1).abs()
                run.note(t.todo, loss=kl.detach(), sigma=s, gap=relative_gap(v.detach(), t.v_t[i]),
                         ratio_off=off, clipped=(off > c.clip_range).float())
            run.apply()

    def gap_of(label, tensors):
        """Mean relative gap to the teacher on held-out rows, at states spread evenly over its rollouts."""
        rows, gaps = run.eval_rows[label][:c.eval_samples], []
        todo = [SimpleNamespace(data=r, teacher=teacher_of[label], queries=[i * c.steps // len(rows)],
                                noise=g, draws=g)
                for i, r in enumerate(rows) for g in [torch_rng(c.seed, 'gap', label, i)]]
        for chunk in run.chunks(todo[run.world.rank::run.world.size]):
            with torch.no_grad(), student.wearing(tensors):
                some, i, z = zip(*visited(chunk))
                z, s = torch.stack(z), sigmas[list(i)]
                v = run.velocity('student', some, z, s, c.student_guidance)
                gaps += relative_gap(v, target(some, z, s)).tolist()
        gaps = gather(run.world, gaps)
        return sum(gaps) / len(gaps)

    def pictures(who, label, n, tensors=None):
        w = by_name[who].get('guidance', 1.0) if who in by_name else c.rollout_guidance
        return run.render(who, label, run.eval_rows[label][:n], c.sample_steps, w, tensors)

    still = {k: ([run.picture(r['source_image']) for r in run.eval_rows[k][:c.show]],  # they do not change
                 pictures(teacher_of[k], k, c.show), pictures('student', k, c.show, run.start))
             for k in labels}

    def evaluate(step):
        """Gap by route, and the picture: source, teacher, the student at the start, the student now."""
        gaps, lines, names = {k: gap_of(k, student.ema) for k in labels}, [], []
        for k in labels:
            lines += zip(*still[k], pictures('student', k, c.show, student.ema))
            names += [f'{k}: {x["prompt"]}' for x in run.eval_rows[k][:c.show]]
        if run.world.rank == 0:
            grid(lines, run.out / 'samples' / f'step_{step:06d}.png', names,
                 ['source', 'teacher', 'student at start', 'student now'])
            run.log.add(dict(step=step, **{f'gap/{k}': g for k, g in gaps.items()}))
        return gaps

    before = run.at_start('gap/', evaluate(run.first))
    for todo in run.steps(evaluate):
        if c.method == 'flowopd':
            flowopd(todo)
        else:
            for some in run.chunks(todo):
                (danceopd if c.method == 'danceopd' else diffusionopd)(some)
            run.apply()
    after = evaluate(c.max_steps)

    result = {k: dict(gap_before=before[k], gap_after=after[k]) for k in labels}
    judge = load_function(c.score) if c.score and c.score_samples else None
    for k in labels if judge else ():
        rows = run.eval_rows[k][:c.score_samples]
        ask = lambda who, tensors=None: score_mean(
            run.judged(judge, pictures(who, k, len(rows), tensors), rows))
        base, teacher = ask('base'), teacher_of[k]
        result[k] |= dict(base=base, teacher=base if teacher == 'base' else ask(teacher),
                          start=ask('student', run.start), student=ask('student', student.ema))
    run.end(result, ['loss', 'gap', *(f'gap/{k}' for k in labels)])


if __name__ == '__main__':
    configurator.run(main)
