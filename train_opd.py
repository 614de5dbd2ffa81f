"""
On-policy distillation (OPD) of flow-matching image generators, in one file.

A student samples with its own current weights. At states that it visited itself, a frozen teacher
chosen for that sample (a skill, an edit, a style, guidance itself) says which velocity it would
have had there; the student learns it. So specialists, adapters on one frozen base, become one.

    python train_opd.py                                   the demonstration: shapes, on a CPU
    python train_opd.py config/sd35_edit.py --lr=1e-4     a config file, then single settings
    torchrun --nproc_per_node=8 train_opd.py config/sd35_edit.py
    python train_opd.py config/sd35_edit.py --dry_run     checks settings and data, loads nothing
    python train_opd.py config/sd35_edit.py --init_from=resume

The rooms, in reading order: settings, the flow, fields (model families), who is asked, plan,
rollouts, METHODS, evaluation, and the loop, train.
One convention: z = (1 - sigma) x0 + sigma eps, v = eps - x0, sigma from 1 (noise) to 0 (picture).
Left out on purpose: full fine-tuning, float16, sharded models, samplers other than Euler's steps.
"""
import copy, math, sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

import configurator
from configurator import collect, need
from support import checks, rehearsal
from support.files import load_image, load_images, shown
from support.judges import group_advantage
from support.models import Network, find_family, open_field
from support.processes import gather, launch, rng, torch_rng
from support.run import Folder

sys.modules.setdefault('train_opd', sys.modules[__name__])      # else families import a second copy

# --------------------------------------------------------------------------------------------------
# Settings: the demonstration's. Config files and --key=value override them. In brackets: papers'.
# With another model what nobody set is eval_data = [], score = '', init_from = 'merge', lr = 2e-4
# model
model = 'data/shapes/base'          # diffusers folder or hub id
family = ''                         # '' as model_index.json says; one of FAMILIES, or file.py:Class
dtype = 'auto'                      # of the base: auto = bfloat16 on a GPU, float32 on a CPU
base_storage = ''                   # 'float8': the frozen base in 8 bits; it computes in dtype
device = ''                         # '': cuda if there is one, else cpu; or by name, as 'mps'
resolution: int | list = 24         # pixels, or [height, width]; a route may have its own
max_sequence_length = 0             # text tokens; 0: as many as the family's pipeline takes
distilled_guidance = 3.5            # FLUX's embedded guidance (dev 3.5, Kontext 2.5)
cache_gb = 4.0                      # of prompts' embeddings, in the memory of each process
# teachers: a lora, or a checkpoint of full weights, or neither: the base. guidance: 1.0 is none;
# make: a command, told if the weights are not there; weight: for mixing = 'soft'
teachers = [
    dict(name='base'),
    dict(name='count', lora='data/shapes/teachers/count'),
    dict(name='local_edit', lora='data/shapes/teachers/local_edit'),
    dict(name='global_edit', lora='data/shapes/teachers/global_edit')]
# routes: which teacher answers for which bucket of data. weight: the odds that it is drawn; where
# all are in every step, its share of the loss, and samples says how many of the batch are its
routes = [
    dict(teacher='base', data='t2i', weight=0.5, samples=2),
    dict(teacher='count', data='count', weight=1.5, samples=8),
    dict(teacher='local_edit', data='local_edit', weight=1.0, samples=6),
    dict(teacher='global_edit', data='global_edit', weight=2.0, samples=18)]
routes_per_step: int | str = 'all'  # 1 a step (DanceOPD), 'all' (DiffusionOPD), 'sample': each
mixing = 'hard'                     # 'soft', an ablation: all teachers' mean by their `weight`
teacher_offload = False             # teachers with full weights wait on the CPU for their turn
# data: CSV, JSONL or TXT; a row's bucket is its `task`, else its file's name, without _val
data: list = [f'data/shapes/{k}.csv' for k in ('t2i', 'count', 'local_edit', 'global_edit')]
eval_data: list = [path.replace('.csv', '_val.csv') for path in data]
# student
init_from = 'data/shapes/teachers/local_edit'  # or 'base', 'merge' (teachers' mean), 'resume'
rank = 32                           # of the LoRA (DanceOPD 128, DiffusionOPD 32)
alpha = 32.0                        # its scale is alpha / rank (DanceOPD 128, DiffusionOPD 64)
lora_targets: list | None = None    # None: the starting adapter's layers, else the family's
# rollout
steps = 5                           # Euler steps of the rollout (DanceOPD 16, DiffusionOPD 10)
eta = 0.0                           # 0: ODE; else the noise of the SDE (Flow-OPD 0.7)
sde = 'flow'                        # one of SDES below
rollout_guidance = 1.0              # while rolling out; 1.0 is none, in every family
student_guidance = 1.0              # and in the loss; each teacher has its own
states = 'student'                  # danceopd: whose rollout's; 'teacher', 'data' (noised targets)
# method
method = 'danceopd'                 # one of METHODS below
queries = 1                         # danceopd: states of a rollout that are learned from
query = 'stratified'                # danceopd: one of QUERIES below (DanceOPD 'low_noise')
query_in = 'steps'                  # where the rule's place is looked up: one of PLACES below
kl_var = 'true'                     # 'code': an SDE's std^2 without the step's length, as released
drop_last = 1                       # last steps not learned from (DiffusionOPD 1); 0 if not SD3
reward = 'k1'                       # flowopd: one of REWARDS below
group_size = 1                      # flowopd: samples of one prompt (16)
updates = 1                         # flowopd: optimizer steps a rollout (2)
clip_range = 1e-4                   # flowopd: PPO ratio
adv_clip = 1000.0                   # flowopd: advantages (5, for those that a group has normalised)
anchor = ''                         # 'base' or a teacher: held near it as well (Flow-OPD's MAR)
anchor_beta = 0.0                   # how strongly (Flow-OPD 0.04)
# optimiser
max_steps = 250
batch_size = 34                     # samples a step, all routes and processes together
micro_batch = 30                    # samples a forward; the rest is gradient accumulation
lr = 8e-3                           # (DanceOPD 2e-4, DiffusionOPD 3e-4)
lr_schedule = 'cosine'              # or 'constant'
warmup = 20                         # steps
weight_decay = 0.0                  # (DiffusionOPD 1e-4)
betas: list = [0.9, 0.99]
grad_clip = 1.0                     # 0: none
ema_decay = 0.98                    # 0: none (DiffusionOPD 0.9)
ema_every = 1                       # updates (DiffusionOPD 8)
grad_checkpointing = False
compile = False                     # torch.compile, block by block
tf32 = True
seed = 0
# output
out_dir = 'out/shapes'
eval_every = 125                    # steps between evaluations (gap by route, and the picture)
eval_samples = 32                   # samples a route in them
show = 4                            # of which so many are drawn in the picture
sample_steps = 8                    # Euler steps of those pictures and of the score
score = 'data/shapes/world.py:score'  # file.py:function, or a name of support/rewards.py
score_samples = 128                 # pictures a route that the score is asked about, at the end
save_every = 100
ckpt_keep = 2
log_every = 10
wandb_log = False
wandb_project = 'train_opd'
tensorboard_log = False
dry_run = False                     # check all that can be checked without weights, print, stop
SETTINGS = collect(sys.modules[__name__])


# --------------------------------------------------------------------------------------------------
# The flow: one step of a sampler as a Gaussian, and the KL of two such steps

def transition(z, v, sigma, sigma_next, eta=0.0, sde='flow'):
    """From sigma to sigma_next < sigma: (mean, std). eta = 0 is the ODE, std 0; they broadcast."""
    if eta == 0:
        return z + (sigma_next - sigma) * v, torch.zeros_like(sigma)
    return SDES[sde](z, v, sigma, sigma_next, eta)


def drifted(z, v, sigma, sigma_next, g):
    """A step of the SDE whose noise is g."""
    d, eps = sigma_next - sigma, z + (1 - sigma) * v
    return z + d * (v + g ** 2 / (2 * sigma) * eps), g * (-d).sqrt()


def flow_sde(z, v, sigma, sigma_next, eta):
    """Flow-GRPO's: g = eta sqrt(sigma / (1 - sigma)); where that has a pole, 1 - sigma'."""
    g = eta * (sigma / (1 - torch.where(sigma >= 0.999, sigma_next, sigma))).sqrt()
    return drifted(z, v, sigma, sigma_next, g)


def dance_sde(z, v, sigma, sigma_next, eta):
    """DanceGRPO's: g = eta."""
    return drifted(z, v, sigma, sigma_next, eta * torch.ones_like(sigma))


def cps_sde(z, v, sigma, sigma_next, eta):
    """Flow-CPS keeps the signal's scale."""
    x0, eps, std = z - sigma * v, z + (1 - sigma) * v, sigma_next * math.sin(eta * math.pi / 2)
    return (1 - sigma_next) * x0 + (sigma_next ** 2 - std ** 2).clamp_min(0).sqrt() * eps, std


SDES = dict(flow=flow_sde, dance=dance_sde, cps=cps_sde)


def log_prob(x, mean, std):
    """Gaussian log-density, mean over dimensions: one number a sample."""
    log_p = -(x - mean) ** 2 / (2 * std ** 2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_p.flatten(1).mean(1)


def kl_weight(sigma, sigma_next, eta=0.0, sde='flow', var='true'):
    """w in KL(student || teacher) = w mean((v_s - v_t)^2): c^2 / (2 std^2) with c = d mean / d v
    (a mean is linear: c is that of z = 0, v = 1); for the ODE the limit d^2 / 2. 'code', as
    released, has std^2 without the step's length."""
    c, std = transition(0 * sigma, torch.ones_like(sigma), sigma, sigma_next, eta, sde)
    if eta == 0:
        return c ** 2 / 2
    return c ** 2 / (2 * std ** 2) * dict(true=1, code=sigma - sigma_next)[var]


def velocity_error(v, v_target):
    return (v - v_target).square().flatten(1).mean(1)                  # one number a sample


def relative_gap(v, v_target):
    return (v - v_target).flatten(1).norm(dim=1) / v_target.flatten(1).norm(dim=1).clamp_min(1e-12)


def col(sigma, z):
    return sigma.view(-1, *[1] * (z.dim() - 1))                        # one number a sample


# --------------------------------------------------------------------------------------------------
# Fields: a model family as a velocity. `cond` is a list of dicts, one a sample: its text, and an
# edit's 'source'.

class Field:
    """A pipeline's denoiser, VAE and scheduler: what the families share. A family adds encode and
    forward, and says of itself, before weights are loaded as well:"""
    prefix = 'transformer'              # the pipeline's name of its denoiser
    patch = 2                           # latents, each way, of a token; 0: as the config says
    targets = ()                        # layers that a LoRA is put on
    blocks = ()                         # classes of modules that are compiled one by one
    editors = ()                        # pipelines of it that edit a source picture
    takes_sigmas, words = True, 512     # set_timesteps takes them, else a number; text tokens
    drop_last, sees_source = 0, False   # where nobody set it; its words are read beside a source

    @classmethod
    def unit(cls, configs):
        """Pixels of which height and width are multiples."""
        vae, net = configs.get('vae', {}), configs.get(cls.prefix, {})
        factor = 2 ** (len(vae['block_out_channels']) - 1 if vae else 3)
        return factor * (cls.patch or net.get('patch_size', 2))

    @classmethod
    def largest(cls, configs, editing):
        """(height, width) in pixels beyond which it has no positions."""
        return math.inf, math.inf

    def __init__(self, pipe, device='cpu', max_sequence_length=0, distilled_guidance=3.5):
        self.pipe, self.device, self.net = pipe, torch.device(device), getattr(pipe, self.prefix)
        self.max_length = max_sequence_length or self.words
        self.vae, self.dtype, self.distilled_guidance = pipe.vae, self.net.dtype, distilled_guidance
        self.configs = {'vae': self.vae.config, self.prefix: self.net.config}
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.can_edit = type(pipe).__name__ in self.editors
        for m in pipe.components.values():
            if isinstance(m, torch.nn.Module):
                m.requires_grad_(False).eval()

    def shape(self, height, width):
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    def sigmas(self, n, height, width):
        """The pipeline's own schedule: n + 1 numbers, from pure noise to 0."""
        scheduler, options = copy.deepcopy(self.pipe.scheduler), dict(mu=1.0)
        if scheduler.config.use_dynamic_shifting:              # mu is linear in the tokens
            k, tokens = scheduler.config, height * width // self.unit(self.configs) ** 2
            slope = (k.max_shift - k.base_shift) / (k.max_image_seq_len - k.base_image_seq_len)
            options['mu'] = k.base_shift + slope * (tokens - k.base_image_seq_len)
        if self.takes_sigmas:
            options['sigmas'] = torch.linspace(1, 1 / n, n).tolist()
        else:
            options['num_inference_steps'] = n
        scheduler.set_timesteps(**options)
        return scheduler.sigmas.float().cpu()

    def first_state(self, eps, n, height, width):
        return eps                                             # at sigmas[0], from the noise eps

    def encode_image(self, x):
        """Pixels in [-1, 1] -> clean latents."""
        k = self.vae.config
        z = self.vae.encode(x.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (z - (k.shift_factor or 0)) * k.scaling_factor

    def encode_source(self, path, height, width):
        return {'source': self.encode_image(load_image(path, height, width)[None])[0]}

    def unscaled(self, z):
        """Latents as the VAE decodes them."""
        k = self.vae.config
        return z / k.scaling_factor + (k.shift_factor or 0)

    def decode(self, z):
        """Latents -> pixels in [0, 1], a quarter megapixel at a time; of a video its one frame."""
        z = self.unscaled(z).to(self.vae.dtype)
        few = z.split(max(1, 2 ** 18 // (z.shape[-1] * z.shape[-2] * self.factor ** 2)))
        x = torch.cat([self.vae.decode(x).sample.float().flatten(1, -3) for x in few])
        return (x / 2 + 0.5).clamp(0, 1)

    def velocity(self, z, sigma, cond):
        """z (B, C, H, W), sigma (B,) float32 -> v float32. Autocast lives here and nowhere else."""
        low = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        with torch.autocast(self.device.type, low, enabled=self.dtype != torch.float32):
            return self.forward(z, sigma.float(), cond).float()

    def guide(self, v, v_empty, w):
        """Classifier-free guidance, from the velocities with and without the words."""
        return v_empty + w * (v - v_empty)

    def stack(self, cond, key):
        return torch.stack([c[key] for c in cond]).to(self.device, self.dtype)


class SD3(Field):
    """SD3, SD3.5. Editing: the clean source stands left of the noisy target in one wide picture (a
    diptych); a transformer with twice as many inputs as outputs gets it as channels instead."""
    takes_sigmas, patch, words, drop_last = False, 0, 256, 1  # shifted twice, sigma ends at .009
    editors = ('StableDiffusion3Pipeline',)
    blocks = ('JointTransformerBlock',)
    targets = [f'attn.{k}' for k in ('to_q', 'to_k', 'to_v', 'to_out.0',
                                     'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out')]

    @classmethod
    def largest(cls, configs, editing):
        net = configs.get('transformer', {})
        diptych = editing and net.get('in_channels') == net.get('out_channels')
        most = net.get('pos_embed_max_size', math.inf) * cls.unit(configs)
        return most, most / 2 if diptych else most

    def encode(self, prompt, source=''):
        length = min(self.max_length, getattr(self.pipe.tokenizer_3, 'model_max_length', 512))
        e, _, pooled, _ = self.pipe.encode_prompt(
            [prompt], None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=length)
        return dict(text=e[0], pooled=pooled[0])

    def forward(self, z, sigma, cond):
        x, wide = z, self.net.config.in_channels == 2 * self.net.config.out_channels
        source = self.stack(cond, 'source').to(z.dtype) if 'source' in cond[0] else None
        if wide:
            x = torch.cat([z, torch.zeros_like(z) if source is None else source], 1)
        elif source is not None:
            x = torch.cat([source, z], 3)
        v, = self.net(hidden_states=x.to(self.dtype), timestep=1000 * sigma, return_dict=False,
                      encoder_hidden_states=self.stack(cond, 'text'),
                      pooled_projections=self.stack(cond, 'pooled'))
        return v[..., -z.shape[-1]:]


FAMILIES = dict(
    StableDiffusion3Pipeline=SD3, ZImagePipeline='families/zimage.py:ZImage',
    ZImageOmniPipeline='families/zimage.py:ZImage',
    FluxPipeline='families/flux.py:Flux', FluxKontextPipeline='families/flux.py:Flux',
    Flux2KleinPipeline='families/flux2.py:Flux2', Flux2Pipeline='families/flux2.py:Flux2',
    QwenImagePipeline='families/qwen.py:Qwen', StableDiffusionPipeline='families/unet.py:UNet',
    QwenImageEditPipeline='families/qwen_edit.py:QwenEdit',
    QwenImageEditPlusPipeline='families/qwen_edit.py:QwenEdit',
    StableDiffusionXLPipeline='families/unet.py:UNet')
find_family, open_field = partial(find_family, FAMILIES), partial(open_field, FAMILIES)


# --------------------------------------------------------------------------------------------------
# Who is asked: base, teachers and student are one network with another adapter switched on. Only a
# teacher of full weights is a network of its own.

class Models(Network):
    """Who can be asked for a velocity: 'base', 'student', and every teacher by its name. How they
    were loaded (adapters, their layers, the student, prompts) says support/models.py."""
    spent = 0                           # forwards so far: with gradient three, with guidance double

    def switch(self, name):
        """By hand, for PEFT's own calls rewrite requires_grad. A name that is no adapter's, as
        'base', switches all off."""
        for m in self.layers:
            m._disable_adapters = name not in self.adapters
            if name in self.adapters:
                m._active_adapter = [name]

    def velocity(self, who, batch, z, sigma, w=1.0):
        """Of samples at states z of noise sigma. With guidance w the velocities with and without
        the words come from one forward; w = 1 needs no unconditional one."""
        known = 'base', 'student', *self.adapters, *self.teachers
        need(who in known, f'{who!r} is none of {", ".join(known)}')
        cond = [s.cond for s in batch]
        if w != 1:
            z, sigma = torch.cat([z, z]), torch.cat([sigma, sigma])
            cond += [s.empty for s in batch]
        self.spent += len(z) * (3 if torch.is_grad_enabled() else 1)
        self.switch(who)
        try:
            with self.seated(who) as field:
                v = field.velocity(z, sigma, cond)
        finally:
            self.switch('student')             # backward recomputes: it must find the student
        return v if w == 1 else field.guide(*v.chunk(2), w)

    @torch.no_grad()
    def target(self, batch, z, sigma):
        """The velocity that each sample's own teacher would have had there; if mixed softly, the
        mean of all teachers."""
        soft = dict(hard=False, soft=True)[self.mixing]
        v = torch.full_like(z, 0.0 if soft else math.nan)      # nobody's answer is none
        total = sum(t.get('weight', 1.0) for t in self.teachers.values())
        for name, t in self.teachers.items():
            own = [j for j, s in enumerate(batch) if soft or s.teacher == name]
            if own:
                asked = [batch[j] for j in own]
                said = self.velocity(name, asked, z[own], sigma[own], t.get('guidance', 1.0))
                v[own] = v[own] + said * t.get('weight', 1.0) / total if soft else said
        return v


# --------------------------------------------------------------------------------------------------
# Plan: which samples a step has. Nothing random need be saved: every stream follows from
# (seed, step, sample), so neither the number of processes nor a resume changes a sample.

@dataclass(eq=False)
class Sample:
    """One picture of a step. A batch is a list of samples that share a forward."""
    row: dict                           # of the data: prompt, source_image, target_image
    size: tuple                         # (height, width) in pixels
    noise: torch.Generator              # of its first state: drawn from once
    draws: torch.Generator = None       # of an SDE's steps, or of noise on data
    step: int = 0
    number: int = 0                     # its place in the step's global batch
    group: int = 0                      # samples of one prompt
    update: int = 0                     # in which of the step's updates it is learned from
    label: str = ''                     # its bucket
    teacher: str = ''                   # who answers for it
    share: float = 1.0                  # of the loss
    slot: int = 0                       # its place among the `of` samples of its route
    of: int = 1
    queries: list = None                # numbers of the steps whose states are learned from
    cond: dict = None                   # its words and source, on the device
    empty: dict = None                  # the same without the words


def routes_of(step, c):
    """The router: which route each group of a step belongs to."""
    groups, routes = range(c.batch_size // c.group_size), range(len(c.routes))
    weights = [r.get('weight', 1.0) for r in c.routes]
    if c.routes_per_step == 'all':
        counts = [r.get('samples', c.batch_size // len(c.routes)) for r in c.routes]
        return [i for i, k in enumerate(counts) for _ in range(k // c.group_size)]
    keys = {'sample': [(g,) for g in groups], 1: [()] * len(groups)}[c.routes_per_step]
    return [rng(c.seed, step, *k, 'route').choices(routes, weights)[0] for k in keys]


def plan(step, c, buckets, world, same_noise=False, updates=None):
    """This process's samples of a step. Groups are dealt to updates, then to processes."""
    chosen, all_routes = routes_of(step, c), c.routes_per_step == 'all'
    nth = [chosen[:g].count(route) for g, route in enumerate(chosen)]  # of its route, from 0
    dealt = [(nth[g] if all_routes else g) % (updates or c.updates) for g in range(len(chosen))]
    samples, total = [], sum(r.get('weight', 1.0) for r in c.routes)
    for number in range(c.batch_size):
        group = number // c.group_size
        if dealt[:group].count(dealt[group]) % world.size != world.rank:
            continue                               # dealt to the processes in turn
        route, of = c.routes[chosen[group]], chosen.count(chosen[group]) * c.group_size
        bucket = buckets[route['data']]
        share = route.get('weight', 1.0) / total / of if all_routes else 1 / c.batch_size
        samples.append(Sample(
            row=bucket[rng(c.seed, step, group, 'row').randrange(len(bucket))],
            size=route['size'],
            noise=torch_rng(c.seed, step, group if same_noise else number, 'noise', same_noise),
            draws=torch_rng(c.seed, step, number, 'draws'),
            step=step, number=number, group=group, update=dealt[group], label=route['data'],
            teacher=route.get('teacher', ''), share=share, of=of,
            slot=nth[group] * c.group_size + number % c.group_size))
    return samples


def draw_queries(s, c, sigmas):
    """K distinct step numbers of a sample's rollout, by QUERIES; what is taken is drawn again."""
    n, rule, place, taken = c.steps - c.drop_last, QUERIES[c.query], PLACES[c.query_in], []
    if c.queries == n:                                         # the only choice
        return list(range(n))
    key = c.seed, s.step, s.number, 'query'        # two streams: the rule's, the place in a stratum
    r, inside = rng(*key, 'rule'), rng(*key).random()
    for k in range(c.queries):
        even = (k + (s.slot + inside) / s.of) / c.queries
        for _ in range(10 ** 6):                               # Beta's tails are thin
            u = rule(r, even)
            i = place(u, sigmas[:n], taken)
            if i not in taken:
                break
        need(0 <= u <= 1 and i not in taken, f'query = {c.query!r} has no {c.queries} distinct '
             'steps')
        taken.append(i)
    return sorted(taken)


# Where in a rollout a state is learned from: u = 0 is its first step, all noise, 1 after its last.
# `even` spreads evenly the queries of a route's samples, and of a sample. PLACES: which step is u?
QUERIES = dict(
    stratified=lambda r, even: even, uniform=lambda r, even: r.random(),
    low_noise=lambda r, even: r.betavariate(5, 2), mid_noise=lambda r, even: r.betavariate(5, 5),
    high_noise=lambda r, even: r.betavariate(2, 5))
PLACES = dict(steps=lambda u, sigmas, taken: min(int(u * len(sigmas)), len(sigmas) - 1),
              sigma=lambda u, sigmas, taken: min({*range(len(sigmas))} - {*taken},     # nearest
                                                 key=lambda i: abs(sigmas[i] - (1 - u))))


def micro_batches(samples, models, c, whole=1):
    """Batches: samples that can share a forward, of one size, with a source picture or without, in
    multiples of `whole`; their words and sources are on the device."""
    def kind(s):
        return s.size, bool(s.row['source_image'])
    most = max(1, c.micro_batch // whole) * whole
    for wanted in sorted({kind(s) for s in samples}):
        alike = [s for s in samples if kind(s) == wanted]
        for batch in (alike[i:i + most] for i in range(0, len(alike), most)):
            models.prompts.condition(batch)
            yield batch


# --------------------------------------------------------------------------------------------------
# Rollouts: a model's own states, without gradient

def gaussian(batch, shape, stream, device):
    """Noise from each sample's own stream, 'noise' or 'draws'."""
    return torch.stack([torch.randn(shape, generator=getattr(s, stream)) for s in batch]).to(device)


@torch.no_grad()
def advance(batch, z, v, sigma, sigma_next, eta=0.0, sde='flow'):
    """One step of a rollout: from states at sigma with the velocity v to states at sigma_next."""
    z, std = transition(z, v, sigma, sigma_next, eta, sde)
    return z if eta == 0 else z + std * gaussian(batch, z.shape[1:], 'draws', z.device)


def first_states(batch, models, n):
    """Where rollouts of n steps begin: their states at the first sigma."""
    field, size = models.field, batch[0].size
    return field.first_state(gaussian(batch, field.shape(*size), 'noise', field.device), n, *size)


@torch.no_grad()
def denoise(velocity, batch, z, sigmas):
    """The ODE all the way down, for pictures: clean latents."""
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        z = advance(batch, z, velocity(batch, z, sigma.expand(len(z))), sigma, sigma_next)
    return z


def pictures(who, batch, models, n, w=1.0):
    """Drawn in n Euler steps with guidance w: pixels in [0, 1]."""
    velocity = partial(models.velocity, who, w=w)
    z = denoise(velocity, batch, first_states(batch, models, n), models.sigmas(batch, n))
    return models.field.decode(z)


@torch.no_grad()
def rollout_states(batch, models, c, velocity):
    """What rollouts come by at their samples' queries: [(sample, state, sigma)]. A sample leaves
    at the last of its queries."""
    z, sigmas, found = first_states(batch, models, c.steps), models.sigmas(batch, c.steps), []
    for i in range(c.steps):
        found += [(s, x, sigmas[i]) for s, x in zip(batch, z) if i in s.queries]
        if not (stay := [j for j, s in enumerate(batch) if s.queries[-1] > i]):
            break
        batch, z = [batch[j] for j in stay], z[stay]
        v = velocity(batch, z, sigmas[i].expand(len(z)))
        z = advance(batch, z, v, sigmas[i], sigmas[i + 1], c.eta, c.sde)
    return found


def student_states(batch, models, c):
    """On-policy: of the student's own rollout."""
    velocity = partial(models.velocity, 'student', w=c.rollout_guidance)
    return rollout_states(batch, models, c, velocity)


def teacher_states(batch, models, c):
    """Off-policy: of each teacher's own rollout."""
    return rollout_states(batch, models, c, models.target)


@torch.no_grad()
def data_states(batch, models, c):
    """Off-policy: the data's own pictures, with noise added."""
    sigmas = models.sigmas(batch, c.steps)
    x0 = models.field.encode_image(load_images(batch, 'target_image'))
    found = [(s, x, sigmas[i]) for s, x in zip(batch, x0) for i in s.queries]
    noise = gaussian([s for s, _, _ in found], x0.shape[1:], 'draws', x0.device)
    return [(s, (1 - sigma) * x + sigma * eps, sigma) for (s, x, sigma), eps in zip(found, noise)]


STATES = dict(student=student_states, teacher=teacher_states, data=data_states)


def visits(samples, models, c, states='student'):
    """The states at the samples' queries, a forward at a time: (batch, z, sigma)."""
    for batch in micro_batches(samples, models, c):
        found = STATES[states](batch, models, c)
        for k in range(0, len(found), c.micro_batch):
            some, z, sigma = zip(*found[k:k + c.micro_batch])
            yield some, torch.stack(z), torch.stack(sigma)
        models.prompts.release(batch)


@torch.no_grad()
def trajectory(batch, models, c):
    """The trained steps of a stochastic rollout, kept for policy gradients: states z (n + 1, B, ..)
    and velocities v (n, B, ..), with the log-probability of what was drawn. Methods add to it what
    they find: flowopd v_target and advantage, one a step and sample."""
    sigmas = models.sigmas(batch, c.steps)
    t = SimpleNamespace(batch=batch, sigmas=sigmas, v=[], z=[first_states(batch, models, c.steps)])
    for sigma, sigma_next in zip(sigmas, sigmas[1:c.steps - c.drop_last + 1]):
        z = t.z[-1]
        t.v.append(models.velocity('student', batch, z, sigma.expand(len(z)), c.rollout_guidance))
        t.z.append(advance(batch, z, t.v[-1], sigma, sigma_next, c.eta, c.sde))
    t.z, t.v = torch.stack(t.z), torch.stack(t.v)
    t.logp = torch.stack([log_prob(*action(t, i, c, v)) for i, v in enumerate(t.v)])
    return t


def trajectories(samples, models, c):
    """[[trajectory of a micro-batch, ...] of each update]; all drawn before the first update."""
    return [[trajectory(batch, models, c) for batch in micro_batches(
        [s for s in samples if s.update == u], models, c)] for u in range(c.updates)]


def at_step(t, i):
    """Step i of a trajectory, one number or one a sample: its z, sigma (B,), and the next ones."""
    b = torch.arange(len(t.batch))
    i = torch.as_tensor(i).expand(len(b))
    return t.z[i, b], t.sigmas[i], t.sigmas[i + 1], t.z[i + 1, b]


def action(t, i, c, v):
    """What was drawn at step i of a trajectory, and the mean and std of it by the velocity v."""
    z, sigma, sigma_next, z_next = at_step(t, i)
    return z_next, *transition(z, v, col(sigma, z), col(sigma_next, z), c.eta, c.sde)


# --------------------------------------------------------------------------------------------------
# Methods. A method is a generator of a step's updates, and each of these a generator of terms, one
# a forward with gradient. The loop calls backward before it asks for the next term, so that one
# graph is alive at a time, and updates the student before it asks for the next update.

# samples; a loss of each, divided by how many states a sample has; numbers of each, for the log
Term = namedtuple('Term', 'batch loss numbers')
Method = namedtuple('Method', 'updates settings')  # and those settings that not all methods read


def distil(batch, models, c, z, sigma, v, v_target, n, weight=1.0, error=velocity_error):
    """The weighted error of the student's velocity v at states z, n of each sample, as a term."""
    loss = weight * error(v, v_target)
    numbers = dict(loss=loss.detach(), sigma=sigma, gap=relative_gap(v.detach(), v_target))
    return Term(batch, (loss + anchored(batch, models, c, z, sigma, v, weight, error)) / n, numbers)


def anchored(batch, models, c, z, sigma, v, weight, error=velocity_error):
    """Flow-OPD's MAR, for all methods: the same error to the base or to another teacher, with its
    own guidance if it has one, else (unlike as a target) with the student's."""
    if not c.anchor:
        return 0.0
    w = models.teachers.get(c.anchor, {}).get('guidance', c.student_guidance)
    with torch.no_grad():
        v_anchor = models.velocity(c.anchor, batch, z, sigma, w)
    return c.anchor_beta * weight * error(v, v_anchor)


def danceopd(samples, models, c, error=velocity_error):
    """DanceOPD (2606.27377): the plain velocity error, at K states of the student's own rollout."""
    for s in samples:
        s.queries = draw_queries(s, c, models.sigmas([s], c.steps))

    def terms():
        for batch, z, sigma in visits(samples, models, c, c.states):
            v_target = models.target(batch, z, sigma)
            v = models.velocity('student', batch, z, sigma, c.student_guidance)
            yield distil(batch, models, c, z, sigma, v, v_target, c.queries, error=error)
    yield terms()


def diffusionopd(samples, models, c):
    """DiffusionOPD (2605.15055): KL(student's step || teacher's step), at every state. What the
    student said there also takes the rollout on, if the guidance is the same."""
    def terms():
        n = c.steps - c.drop_last
        for batch in micro_batches(samples, models, c):
            z, sigmas = first_states(batch, models, c.steps), models.sigmas(batch, c.steps)
            for i in range(n):
                sigma, sigma_next = sigmas[i].expand(len(z)), sigmas[i + 1]
                v_target = models.target(batch, z, sigma)
                v = models.velocity('student', batch, z, sigma, c.student_guidance)
                weight = kl_weight(sigma, sigma_next, c.eta, c.sde, c.kl_var)
                yield distil(batch, models, c, z, sigma, v, v_target, n, weight)
                if i < n - 1:
                    if c.rollout_guidance != c.student_guidance:
                        with torch.no_grad():
                            v = models.velocity('student', batch, z, sigma, c.rollout_guidance)
                    z = advance(batch, z, v.detach(), sigmas[i], sigma_next, c.eta, c.sde)
    yield terms()


def ppo_loss(logp, logp_old, advantage, clip_range):
    """max(-A r, -A clip(r)), r = pi / pi_old; and what the log says of r."""
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    off = (ratio.detach() - 1).abs()
    return torch.maximum(-advantage * ratio, -advantage * clipped), dict(
        ratio_off=off, clipped=(off > clip_range).float())


# Flow-OPD's rewards of an action, given the step's means by teacher and student, and KL(s)
def log_ratio(drawn, mean_teacher, mean, std, kl):
    """log p_T(a|s) - log p_S(a|s) + KL(s), its own baseline, summed over a latent's numbers. As
    log_prob is a mean over these, its policy gradient is KL(s)'s own, and no group is needed."""
    return ((mean_teacher - mean) * (drawn - mean) / std ** 2).flatten(1).sum(1)


def minus_kl(drawn, mean_teacher, mean, std, kl):
    """Of the state alone: as E[A(s) grad log pi] = 0, only its own gradient would teach."""
    return -kl


# group: normalised in groups of a prompt; attached: the KL keeps its own gradient (`code`)
Reward = namedtuple('Reward', 'of_action group attached')
REWARDS = dict(
    k1=Reward(log_ratio, False, False),         # correct, at the KL's own scale
    k1_group=Reward(log_ratio, True, False),    # as published for rewards: a scale for each step
    paper=Reward(minus_kl, True, False),        # as written: nothing but noise, here to study
    code=Reward(minus_kl, False, True))         # as released: the KL's own gradient, and noise


@torch.no_grad()
def flowopd_advantages(some, models, c):
    """Gives the trajectories of an update their teachers' velocities, and advantages."""
    rewards, kind = [], REWARDS[c.reward]
    for t in some:
        t.v_target, reward = torch.zeros_like(t.v), []
        for i, v in enumerate(t.v):
            z, sigma, sigma_next, _ = at_step(t, i)
            t.v_target[i] = models.target(t.batch, z, sigma)
            drawn, mean, std = action(t, i, c, v)
            _, mean_teacher, _ = action(t, i, c, t.v_target[i])
            kl = kl_weight(sigma, sigma_next, c.eta, c.sde, c.kl_var)
            kl = kl * velocity_error(v, t.v_target[i])
            reward.append(kind.of_action(drawn, mean_teacher, mean, std, kl))
        rewards.append(torch.stack(reward))
    rewards = torch.cat(rewards, 1)                            # (steps, samples of the update)
    if kind.group:
        rewards = torch.stack([group_advantage(r, c.group_size) for r in rewards])
    advantages = rewards.clamp(-c.adv_clip, c.adv_clip)
    for t, a in zip(some, advantages.split([len(t.batch) for t in some], 1)):
        t.advantage = a


def flowopd(samples, models, c):
    """Flow-OPD (2605.08063): DiffusionOPD's KL by policy gradient, on trajectories drawn before."""
    def terms(some):
        for t in some:
            for i, v_target in enumerate(t.v_target):
                z, sigma, sigma_next, _ = at_step(t, i)
                v = models.velocity('student', t.batch, z, sigma, c.student_guidance)
                weight = kl_weight(sigma, sigma_next, c.eta, c.sde, c.kl_var)
                kl, a = weight * velocity_error(v, v_target), t.advantage[i]
                if REWARDS[c.reward].attached:                 # KL(s) keeps its own gradient
                    a = (-kl).clamp(-c.adv_clip, c.adv_clip)
                logp = log_prob(*action(t, i, c, v))
                loss, numbers = ppo_loss(logp, t.logp[i], a, c.clip_range)
                loss = loss + anchored(t.batch, models, c, z, sigma, v, weight)
                numbers |= dict(loss=kl.detach(), gap=relative_gap(v.detach(), v_target),
                                sigma=sigma, flat=(t.advantage[i] == 0).float())
                # the shares of an update's samples sum to 1 / updates
                yield Term(t.batch, c.updates / len(t.v) * loss, numbers)

    for some in trajectories(samples, models, c):
        flowopd_advantages(some, models, c)
        yield terms(some)


METHODS = dict(
    danceopd=Method(danceopd, ('queries', 'query', 'query_in', 'states', 'drop_last')),
    diffusionopd=Method(diffusionopd, ('drop_last', 'kl_var')),
    flowopd=Method(flowopd, ('drop_last', 'kl_var', 'reward', 'group_size', 'updates', 'clip_range',
                             'adv_clip')))


# --------------------------------------------------------------------------------------------------
# Evaluation, on held-out rows and always the same noise; each process has a share of the rows

@torch.no_grad()
def mean_gap(route, rows, models, c, world):
    """Mean relative gap to the target, at states of the student's own rollouts, whatever `states`
    says, spread evenly over the steps that are learned from."""
    samples, found, n = [], [], c.steps - c.drop_last
    for i, row in enumerate(rows):
        g, query = torch_rng(c.seed, 'gap', route['data'], i), i * n // len(rows)
        samples.append(Sample(row, route['size'], g, g, teacher=route['teacher'], queries=[query]))
    for batch, z, sigma in visits(samples[world.rank::world.size], models, c):
        v = models.velocity('student', batch, z, sigma, c.student_guidance)
        found += relative_gap(v, models.target(batch, z, sigma)).tolist()
    found = gather(world, found)
    return sum(found) / len(found)


@torch.no_grad()
def render(who, route, rows, models, c, world, own=False):
    """Pictures of rows: with rollout_guidance, or a teacher's own."""
    w = models.teachers[who].get('guidance', 1.0) if own else c.rollout_guidance
    samples = [Sample(row, route['size'], torch_rng(c.seed, 'eval', route['data'], i), number=i)
               for i, row in enumerate(rows)]
    done = []
    for batch in micro_batches(samples[world.rank::world.size], models, c):
        drawn = pictures(who, batch, models, c.sample_steps, w).cpu()
        done += [(s.number, x.clone()) for s, x in zip(batch, drawn)]      # of its own storage
        models.prompts.release(batch)
    return torch.stack([x for _, x in sorted(gather(world, done), key=lambda pair: pair[0])])


def evaluate(step, held, draw, models, c, folder):
    """The gap by route, and the picture: source, teacher, the student at its start, and now."""
    student, lines, entry = models.student, [], dict(step=step)
    for route in c.routes:
        label, rows = route['data'], held[route['data']][:c.show]
        if label not in folder.stills:                         # what does not change: once a run
            with student.wearing(student.start):
                folder.stills[label] = (
                    shown(rows, 'source_image', route['size']),
                    draw(route['teacher'], route, rows, own=True), draw('student', route, rows))
        with student.wearing(student.ema):
            now = draw('student', route, rows)
            more = held[label][:c.eval_samples]
            entry[f'gap/{label}'] = mean_gap(route, more, models, c, folder.world)
        lines += zip((f'{label}: {r["prompt"]}' for r in rows), *folder.stills[label], now)
    folder.log.add(entry)
    folder.draw(step, lines, ['source', 'teacher', 'student at start', 'student now'])


# --------------------------------------------------------------------------------------------------
# Training. All processes hold all models; each has a share of a step's samples.

CHOICES = dict(method=METHODS, query=QUERIES, query_in=PLACES, states=STATES, sde=SDES,
               reward=REWARDS, mixing=('hard', 'soft'), routes_per_step=(1, 'all', 'sample'),
               **checks.CHOICES)


def learning_rate(step, c):
    """Warm-up, then constant or cosine. From the settings alone: a resume follows new ones."""
    decay = dict(constant=1.0, cosine=0.5 * (1 + math.cos(math.pi * step / c.max_steps)))
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup)) * max(decay[c.lr_schedule], 0.02)


def train(samples_of, method, models, look, c, folder):
    """The loop, of train_teacher.py as well. -> whether it came to its end."""
    student, world, log = models.student, folder.world, folder.log
    if folder.owes_evaluation():
        look(folder.first)
    for step in (bar := folder.bar()):
        # plan: who answers for which rows
        samples, models.spent = samples_of(step), 0
        world.stop.busy = True                                 # now a stop waits, until we save

        # roll out and learn: backward after every term, before the next is made
        for terms in method(samples, models, c):
            for term in terms:
                rehearsal.check_term(term, c.method)
                share = torch.tensor([s.share for s in term.batch], device=world.device)
                (share * term.loss).sum().backward()
                log.note(term.batch, **term.numbers)
            norm = student.update(learning_rate(step, c), c, world)    # sum, clip, AdamW, average
            log.watch(step, norm, student)
        log.tally(cost=models.spent)

        # log, save, evaluate
        done, final = step + 1, step + 1 == c.max_steps
        bar.set_postfix(log.glance(samples), refresh=False)
        if done % c.log_every == 0 or final:
            log.report(done, lr=learning_rate(step, c))
        ending = any(gather(world, [world.stop.asked]))
        if done % c.save_every == 0 or final or ending:
            folder.save(done, models)
        if ending:
            log.say(f'asked to stop: saved step {done}; continue with --init_from=resume')
            return False
        if done % c.eval_every == 0 or final:
            look(done)
    return True


def main(argv):
    c = checks.own_settings(SETTINGS, argv)
    data = checks.check(c, SETTINGS[0], FAMILIES, CHOICES)
    world, plan_of = launch(c.device, c.tf32), partial(plan, c=c, buckets=data.buckets)
    rehearsal.print_plan(c, data, world, plan_of, METHODS, Models)
    if c.dry_run:
        return checks.tell_dry_run(c, world)

    folder, samples_of = Folder(c, world, c.teachers), partial(plan_of, world=world)
    held = data.drawn(c.seed, max(c.eval_samples, c.show, c.score_samples if c.score else 0))
    models = Models.open(FAMILIES, c, world.device, data, held, c.teachers, folder.resumed)
    models.prompts.expect(s.row for step in range(folder.first, c.max_steps)
                          for s in samples_of(step))
    draw = partial(render, models=models, c=c, world=world)
    look = partial(evaluate, held=held, draw=draw, models=models, c=c, folder=folder)
    folder.begin(models, data, held, draw)
    if train(samples_of, METHODS[c.method].updates, models, look, c, folder):
        folder.conclude(held, models, draw)


if __name__ == '__main__':
    configurator.run(main)
