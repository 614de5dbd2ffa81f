"""
One frozen base with adapters on it by name: the teachers, and the student that learns; full models
as teachers; prompts' embeddings. How these are loaded and kept: who is asked when, train_opd.py says.
"""
import copy, math, os, warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import merge_lora
from configurator import BadInput, need


class Prompts:
    """Text embeddings by (prompt, is it an edit), on the CPU. The text encoders visit the device for
    what is missing, and leave it."""

    def __init__(self, field, cache_gb=4.0):
        self.field, self.known, self.most = field, {}, cache_gb * 1e9

    def add(self, rows):
        """Encodes what is missing; if the memory is full, what is not asked for goes first."""
        keys = {self.key(r): None for r in rows}
        tensors = (x for e in self.known.values() for v in e.values()
                   for x in (v if isinstance(v, list) else [v]))
        if sum(x.nbytes for x in tensors) > self.most:
            self.known = {k: self.known[k] for k in keys if k in self.known}
        self.encode(keys)

    def key(self, row):
        source = row['source_image']
        return row['prompt'], source if self.field.sees_source else bool(source)

    @torch.no_grad()
    def encode(self, keys):
        """One prompt at a time: its embedding depends on nothing else, so that a resume is exact."""
        new = [k for k in dict.fromkeys(keys) if k not in self.known]
        encoders = self.field.encoders().values() if new else ()
        for m in encoders:
            m.to(self.field.device)
        for prompt, source in new:
            found = self.field.encode(prompt, source)
            self.known[prompt, source] = {k: to_device(x, 'cpu') for k, x in found.items()}
        for m in encoders:
            m.to('cpu')

    @torch.no_grad()
    def condition(self, batch, height, width):
        """Gives samples what a field takes, `cond`, and the same without the words, `empty`, for
        guidance. It is on the device, brought there once for all the forwards to come."""
        keys = [(self.key(s.row), ('', self.key(s.row)[1])) for s in batch]
        self.encode(k for pair in keys for k in pair)
        here = {k: {name: to_device(x, self.field.device) for name, x in self.known[k].items()}
                for k in {k for pair in keys for k in pair}}
        for s, (key, nothing) in zip(batch, keys):
            path = s.row['source_image']
            source = self.field.encode_source(path, height, width) if path else {}
            s.cond, s.empty = {**here[key], **source}, {**here[nothing], **source}


def to_device(x, device):
    return [part.to(device) for part in x] if isinstance(x, list) else x.to(device)


def check_whole(net, what):
    """diffusers leaves what a file lacks without memory."""
    lost = [k for k, p in net.named_parameters() if p.is_meta]
    need(not lost, f'{what}: its weights lack {len(lost)} tensors, as {lost[:1]}; fetch it again')


def add_adapter(net, name, **config):
    from peft import LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                        # several on one model are the point
        net.add_adapter(LoraConfig(**config), adapter_name=name)


def attach(net, name, adapter, dtype=None):
    """Puts adapter tensors {module: (A, B, scale)} on the net under a name, as they are, frozen."""
    add_adapter(net, name, r=1, lora_alpha=1, target_modules=sorted(adapter))
    for key, (A, B, scale) in adapter.items():
        layer = net.get_submodule(key)
        for part, x in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
            x = x.to(layer.weight.device, dtype or x.dtype)
            part.weight = torch.nn.Parameter(x, requires_grad=False)
        layer.scaling[name], layer.r[name] = float(scale), A.shape[0]


class Network:
    """A field's network with the teachers' adapters on it, the full models beside it, and prompts."""

    def __init__(self, field, teachers=(), cache_gb=4.0):
        self.field, self.prompts = field, Prompts(field, cache_gb)
        self.teachers = {t['name']: t for t in teachers}
        self.adapters, self.full = {'student'}, {}
        for name, t in self.teachers.items():
            if t.get('lora'):
                adapter = self.fit(merge_lora.read_adapter(t['lora']), f'teacher {name!r}')
                need(merge_lora.size(adapter) > 0, f'teacher {name!r} has the velocity of the base: its '
                     'weights do nothing')
                attach(field.net, name, adapter, field.dtype)
                self.adapters.add(name)
            elif t.get('checkpoint'):                          # full weights: a second denoiser
                self.full[name] = copy.copy(field)
                self.full[name].net = self.load_full(t['checkpoint'])
        self.refresh()

    def fit(self, adapter, what):
        """An adapter's tensors under this net's names; all must land."""
        shapes = {k.removesuffix('.base_layer'): tuple(m.weight.shape)
                  for k, m in self.field.net.named_modules()
                  if 'lora_' not in k and isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        return merge_lora.fit(adapter, shapes, what)

    def load_full(self, path):
        own, path = self.field.net, os.path.expanduser(path)
        alone = (Path(path) / 'config.json').exists()          # the network, or a whole pipeline
        try:
            net = type(own).from_pretrained(path, subfolder=None if alone else self.field.prefix,
                                            dtype=own.dtype)
        except Exception as e:
            raise BadInput(f'checkpoint {path} could not be loaded as a {type(own).__name__}: give a '
                           f'diffusers folder or hub id of the same family. It said: {str(e)[:300]}')
        check_whole(net, f'checkpoint {path}')
        for k in ('in_channels', 'out_channels'):
            need(net.config.get(k) == own.config.get(k), f'checkpoint {path} has another {k}')
        mine = {k.replace('.base_layer', ''): p for k, p in own.named_parameters()}
        need(any(k in mine and not torch.equal(p, mine[k].cpu()) for k, p in net.named_parameters()),
             f'checkpoint {path} has the weights of the base')
        return net.requires_grad_(False).eval().to(self.field.device)

    def refresh(self):
        """After an adapter was added."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        self.layers = [m for m in self.field.net.modules() if isinstance(m, BaseTunerLayer)]
        for m in self.layers:                  # autocast does it; PEFT would copy every input once more
            m.cast_input_dtype_enabled = False
        for n, p in self.field.net.named_parameters():         # attaching makes an adapter trainable
            p.requires_grad_('.student.' in n)


class Student:
    """The one adapter that learns, in float32, with its optimizer and its average."""

    def __init__(self, net, c, targets, start=None):
        torch.manual_seed(c.seed)
        linear = [k.removesuffix('.base_layer') for k, m in net.named_modules()
                  if 'lora_' not in k and isinstance(m, torch.nn.Linear)]
        hits = {t: [k for k in linear if k == t or k.endswith('.' + t)] for t in targets}
        need(all(hits.values()), 'lora_targets: no linear layer of the model is called '
             f'{", ".join(t for t in hits if not hits[t])}')
        self.names, self.alpha = sorted({k for found in hits.values() for k in found}), c.alpha
        surplus = sorted(set(start or ()) - set(self.names))
        need(not surplus, f'init_from: {len(surplus)} modules of the start, as {surplus[:1]}, are '
             'not in lora_targets; add them there, or leave lora_targets None')
        add_adapter(net, 'student', r=c.rank, lora_alpha=c.alpha, target_modules=self.names,
                    init_lora_weights='gaussian')
        self.params = {n: p for n, p in net.named_parameters() if '.student.' in n}
        for p in self.params.values():
            p.data = p.data.float()                            # PEFT made them in the base's dtype
        for key, module in (start or {}).items():
            layer, (A, B) = net.get_submodule(key), merge_lora.to_rank(module, c.rank)
            used = int(A.flatten(1).any(1).sum())              # surplus rows keep their random start
            layer.lora_A['student'].weight.data[:used] = A[:used]
            layer.lora_B['student'].weight.data.copy_(B / (c.alpha / c.rank))
        self.start, self.ema, self.bad = self.tensors(), self.tensors() if c.ema_decay else None, 0
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.0, betas=tuple(c.betas),
                                           weight_decay=c.weight_decay)

    def tensors(self):
        return {n: p.detach().clone() for n, p in self.params.items()}

    @contextmanager
    def wearing(self, tensors):
        """For a while, other weights: the average, or the start. None: its own."""
        own = self.tensors()
        try:
            for n, p in self.params.items():
                p.data.copy_((tensors or own)[n])
            yield
        finally:
            for n, p in self.params.items():
                p.data.copy_(own[n])

    def update(self, lr, c, world, average=True):
        """One optimizer step; the gradients are summed over the processes, once. One that is not finite
        is skipped, and five of these in a row end the run. -> the gradient's norm."""
        params = self.params.values()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        if world.size > 1:
            dist.all_reduce(flat)
        norm = flat.norm().item()
        self.bad = 0 if math.isfinite(norm) else self.bad + 1
        need(self.bad < 5, '5 updates in a row had no finite gradient; lower lr, or use dtype=float32. '
             'The last checkpoint is from before')
        if not self.bad:
            scale = min(1.0, c.grad_clip / (norm + 1e-6)) if c.grad_clip else 1.0
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad = g.view_as(p) * scale
            self.optimizer.param_groups[0]['lr'] = lr
            self.optimizer.step()
            for n, p in self.params.items() if self.ema and average else ():
                self.ema[n].lerp_(p.detach(), 1 - c.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder, prefix):
        merge_lora.write_adapter(folder, self.modules(self.tensors()), self.alpha, prefix)
        if self.ema:
            merge_lora.write_adapter(folder / 'ema', self.modules(self.ema), self.alpha, prefix)
        state = dict(student=self.tensors(), ema=self.ema, optimizer=self.optimizer.state_dict())
        torch.save(state, folder / 'train_state.pt')

    def modules(self, tensors):
        """{module: (A, B)} as adapter files have it."""
        return {k: tuple(tensors[f'{k}.lora_{ab}.student.weight'].cpu() for ab in 'AB')
                for k in self.names}

    def load(self, folder):
        try:
            state = torch.load(folder / 'train_state.pt', map_location='cpu', weights_only=True)
        except Exception as e:
            raise BadInput(f'{folder}/train_state.pt cannot be read ({e}); delete {folder} to resume '
                           'from the checkpoint before it')
        saved = {n: x.shape for n, x in state['student'].items()}
        need(saved == {n: p.shape for n, p in self.params.items()}, f'{folder} holds another adapter '
             'than these settings make: rank, lora_targets and model must be those of its meta.json')
        for n, p in self.params.items():
            p.data.copy_(state['student'][n])
            if self.ema:                                       # an average that is new starts from here
                self.ema[n].copy_((state['ema'] or state['student'])[n])
        own = self.optimizer.state_dict()                      # a resume follows the settings
        self.optimizer.load_state_dict({**own, 'state': state['optimizer']['state']})


def merged_start(models, c):
    """init_from = 'merge': the mean of the teachers' deltas by route weight (the base's is none)."""
    routes = [r for r in c.routes if models.teachers[r['teacher']].get('lora')]
    total = sum(r.get('weight', 1.0) for r in routes)
    read = {r['teacher']: merge_lora.read_adapter(models.teachers[r['teacher']]['lora'])
            for r in routes}
    return merge_lora.merge([models.fit(read[r['teacher']], r['teacher']) for r in routes],
                            [r.get('weight', 1.0) / total for r in routes])


def open_student(models, c, checkpoint=None):
    """The student at its start, or as a checkpoint has it."""
    if c.init_from in ('base', 'merge'):
        start = merged_start(models, c) if c.init_from == 'merge' else None
    else:
        path = checkpoint.parent / 'start' if checkpoint else c.init_from
        start = models.fit(merge_lora.read_adapter(path), 'init_from')
    field = models.field
    student = Student(field.net, c, c.lora_targets or sorted(start or ()) or field.targets, start)
    models.refresh()
    if checkpoint:
        student.load(checkpoint)
    if c.grad_checkpointing:
        field.net.enable_gradient_checkpointing()
    if c.compile:
        torch._dynamo.config.recompile_limit = 64              # a graph for each adapter
        blocks = [m for m in field.net.modules() if type(m).__name__ in field.blocks]
        for m in blocks or [field.net]:
            m.compile()
    return student


def open_pipeline(path, pipeline, dtype='float32', device='cpu'):
    """A diffusers folder or hub id -> its pipeline, by a name that is not '' if it is not its own."""
    import diffusers, transformers
    for x in (diffusers.utils.logging, transformers.utils.logging):
        x.set_verbosity_error()
        x.disable_progress_bar()
    index = diffusers.DiffusionPipeline.load_config(path)
    pipeline = pipeline or index['_class_name']
    unused = [k for k in ('safety_checker', 'feature_extractor', 'image_encoder') if k in index]
    low = 'bfloat16' if torch.device(device).type == 'cuda' else 'float32'
    dtype = getattr(torch, low if dtype == 'auto' else dtype)
    # float32 for the VAE; but Omni's pipeline encodes sources in its transformer's dtype
    kinds = dtype if 'Omni' in pipeline else {'default': dtype, 'vae': torch.float32}
    return getattr(diffusers, pipeline).from_pretrained(path, dtype=kinds, **dict.fromkeys(unused))
