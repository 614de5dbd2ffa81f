"""
One frozen base with adapters on it by name: the teachers, and the student that learns; teachers of
full weights; prompts' embeddings. How these are loaded and kept; train_opd.py says who is asked.
"""
import copy, itertools, math, os, sys, warnings
from collections import deque
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import merge_lora
from configurator import BadInput, need
from support.ending import no_memory
from support.files import UNUSED, load_function, model_configs, one_line
from support.renames import renamed


# -------------------- families
def find_family(families, pipeline, family=''):
    """The class for a pipeline's name; or `family`, that of another name or a file.py:Class."""
    if family.rpartition(':')[0].endswith('.py'):
        return load_function(family)
    name = family or pipeline
    need(name in families, f'{name} is not a family known here; known are: {", ".join(families)}, '
         'and one of your own as --family=file.py:Class')
    found, root = families[name], Path(__file__).parent.parent
    return load_function(str(root / found)) if isinstance(found, str) else found


def check_size(family, pipeline, configs, height, width, editing=False):
    """Can the family take this size, and edit?"""
    unit, most = 1, (math.inf, math.inf)               # of a hub id nothing is known
    try:
        if family:
            unit, most = family.unit(configs), family.largest(configs, editing)
        if not min(unit, *most) > 0:
            raise ValueError(f'patches of {unit} pixels')
        scale = configs.get('vae', {}).get('scaling_factor')
        if scale is not None and not 0 < abs(scale) < math.inf:
            raise ValueError(f'a scaling_factor of {scale}')
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise BadInput(f'{pipeline}: the config.json of its {family.prefix} or vae is damaged '
                       f'({one_line(repr(e))}); fetch the model again') from e
    name = pipeline or 'this model'
    for what, x in (('height', height), ('width', width)):
        need(x >= unit and x % unit == 0, f'resolution: {name} takes a {what} in multiples of '
             f'{unit} pixels, not {x}; the nearest is {max(unit, round(x / unit) * unit)}')
    need(not editing or not pipeline or pipeline in family.editors, f'{pipeline} cannot edit a '
         'source image. Take source_image out of the data, or take a model that can')
    need(height <= most[0] and width <= most[1], f"resolution: {height} x {width} is larger than "
         f"{name}'s table of positions, {most[0]} x {most[1]} pixels{' with a source' * editing}")


def check_sizes(family, pipeline, configs, routes, data):
    """The same of each route, which edits if its bucket has sources, or its held-out one."""
    for r in routes:
        own, held = data.buckets[r['data']], data.held[r['data']]
        check_size(family, pipeline, configs, *r['size'], own.sources + held.sources > 0)
        bare = [b.name for b in (own, held) if b.sources < len(b)]
        need(not bare or not family or not family.sees_source, f'{pipeline} reads no words without '
             f'a source picture: bucket {bare and bare[0]!r} has rows that have no source_image')


def check_samples(family, pipeline, configs, samples):
    """And of samples, each of which edits if it has a source."""
    for size, edits in dict.fromkeys((s.size, bool(s.row['source_image'])) for s in samples):
        check_size(family, pipeline, configs, *size, edits)


def open_field(families, path, dtype='float32', device='cpu', family='', max_sequence_length=0,
               distilled_guidance=3.5, base_storage=''):
    """A diffusers folder or hub id -> its field, whose network is still on the CPU."""
    import diffusers
    model_configs(path)                                        # of a folder: is it one, and whole?
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
    except (OSError, ValueError) as e:
        why = one_line(e).rstrip('.')
        raise BadInput(f'model {path} is not here and cannot be fetched: {why}. A gated one needs '
                       'its licence accepted and `hf auth login`') from e
    kind = find_family(families, index.get('_class_name', ''), family)     # before any weights
    check_processor(index)
    pipe = open_pipeline(path, index, family if family in families else '', dtype, device)
    net = getattr(pipe, kind.prefix)
    for name, m in (kind.prefix, net), ('vae', pipe.vae):
        check_whole(m, f'model {path}', f' of its {name}')
    if base_storage:
        store_small(net)
    field = kind(pipe, device, max_sequence_length, distilled_guidance)
    for name, m in pipe.components.items():                    # network, encoders: in their turn
        if isinstance(m, torch.nn.Module) and m is not net and not name.startswith('text_encoder'):
            m.to(device)
    return field


def check_processor(index):
    """Words that are read beside pictures need one; some need a package more."""
    name = next((str(index[k][1]) for k in ('processor', 'tokenizer') if index.get(k)), '')
    need(not name.endswith('Processor') or find_spec('torchvision'), f'{index["_class_name"]} '
         f'reads words by a {name}, which needs a package more: pip install torchvision')


def open_pipeline(path, index, pipeline, dtype='float32', device='cpu'):
    """A diffusers folder or hub id -> its pipeline; of the class `pipeline`, '' its own."""
    import diffusers, transformers
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    pipeline = pipeline or index['_class_name']
    unused = [k for k in UNUSED if k in index]
    low = 'bfloat16' if torch.device(device).type == 'cuda' else 'float32'
    dtype = getattr(torch, low if dtype == 'auto' else dtype)
    # float32 for the VAE; but Omni's pipeline encodes sources in its transformer's dtype
    kinds = dtype if 'Omni' in pipeline else {'default': dtype, 'vae': torch.float32}
    try:
        wanted = {k: v for k, v in index.items() if k.startswith('text_encoder')
                  and isinstance(v, list) and v[0] == 'transformers'}
        encoders = {k: open_encoder(getattr(transformers, v[1]), path, k, dtype)
                    for k, v in wanted.items()}
        pipe = getattr(diffusers, pipeline).from_pretrained(
            path, dtype=kinds, use_safetensors=True, **encoders, **dict.fromkeys(unused))
    except BadInput:
        raise
    except Exception as e:                                     # of a broken folder, whatever comes
        pass_on(e)
        raise BadInput(f'model {path} does not load as a {pipeline}: '
                       f'{one_line(e) or type(e).__name__}. Fetch it again with `hf download`; a '
                       'gated one needs its licence accepted and `hf auth login`') from e
    for name, component in pipe.components.items():
        if name.startswith('tokenizer') and component is not None:
            check_tokenizer(component, f'{path}/{name}')
    return pipe


def open_encoder(kind, path, name, dtype):
    """A text encoder. transformers would fill what its file lacks with random numbers."""
    try:
        net, info = kind.from_pretrained(
            path, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True)
    except Exception as e:                                     # of a broken file, whatever comes
        pass_on(e)
        raise ValueError(f'its {name}: {one_line(e) or type(e).__name__}') from e
    for what, found in (('lack', info['missing_keys']),
                        ('have other shapes for', info['mismatched_keys'])):
        need(not found, f'model {path}: the weights of its {name} {what} {len(found)} of the '
             f'tensors that its config asks for, as {sorted(map(str, found))[:1]}; fetch it again')
    check_whole(net, f'model {path}', f' of its {name}')
    return net


def check_tokenizer(tokenizer, what):
    """Without its files, a tokenizer has an empty vocabulary, and all words are the same."""
    tokenizer = getattr(tokenizer, 'tokenizer', tokenizer)         # of a processor
    words = set(tokenizer('a picture').input_ids) - set(tokenizer.all_special_ids)
    need(words, f'{what} knows no words: its vocabulary is missing; fetch it again')
    clip = 'CLIP' in type(tokenizer).__name__                      # it is cut where that says
    need(not clip or tokenizer.model_max_length < 10 ** 6, f'{what} does not know how long a text '
         'may be: its tokenizer_config.json is gone or damaged; fetch it again')


def check_whole(net, what, part=''):
    """diffusers leaves what a file lacks without memory; and a broken file may hold no numbers."""
    lost = [k for k, p in net.named_parameters() if p.is_meta]
    need(not lost, f'{what}: its weights lack {len(lost)} tensors{part}, as {lost[:1]}; fetch it '
         'again')
    bad = [k for k, p in net.named_parameters() if not p.isfinite().all()]
    need(not bad, f'{what}: {len(bad)} of its tensors are not finite, as {bad[:1]}{part}; fetch '
         'it again')


def store_small(net):
    """The frozen weights in 8 bits; each layer computes in the dtype that it was loaded in. Not of
    convolutions: their backward reads the weight, which by then is in 8 bits again."""
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=net.dtype,
                                 skip_modules_classes=(torch.nn.Conv2d,))


# -------------------- prompts
class Prompts:
    """Text embeddings, on the CPU, by what a text encoder sees of a row. The encoders visit the
    device for what is missing, while the network is away, and for what is expected next, if there
    is room."""

    def __init__(self, network, gb):
        self.network, self.field, self.most = network, network.field, gb * 1e9
        self.known, self.bytes, self.lacks, self.coming = {}, 0, 0, iter(())
        self.held, self.ahead = set(), set()                   # what stays; what is not used yet

    def key(self, row):
        source = row['source_image']
        return row['prompt'], source if self.field.sees_source else bool(source)

    def keys(self, row):
        """With and without the words."""
        key = self.key(row)
        return key, ('', key[1])

    def begin(self, rows, buckets):
        """The rows that a run evaluates on; and all of its data, if there is room: then no encoder
        is needed any more."""
        rows = list(rows) or [b[0] for b in buckets.values()]
        self.add(k for r in rows for k in self.keys(r))
        self.held = {*self.known} if self.bytes < self.most / 2 else set()
        keys, each = dict.fromkeys(self.known), self.bytes / len(self.known)
        for row in itertools.chain(*buckets.values()):
            keys |= dict.fromkeys(self.keys(row))
            if len(keys) * each > self.most:
                self.lacks = sum(map(len, buckets.values())) * each
                return
        self.add(keys)
        self.network.drop_encoders()

    def expect(self, rows):
        """Rows to come, in their order: a generator may go on for ever."""
        self.coming = (k for r in rows for k in self.keys(r))

    def add(self, keys, ahead=4096):
        """Encodes what is missing, one prompt at a time: its embedding depends on nothing else, so
        that a resume is exact. If there is no room, half goes: what was not used lately, and, only
        if that is too little, what was brought for later. What a run evaluates on stays, or every
        evaluation would drive out what comes next."""
        keys = dict.fromkeys(keys)
        missing = [k for k in keys if k not in self.known]
        if not missing:
            return
        spare = [k for k in self.known if k not in keys and k not in self.held]
        for k in sorted(spare, key=lambda k: k in self.ahead):
            if self.bytes > self.most / 2:
                self.bytes -= nbytes(self.known.pop(k))
                self.ahead.discard(k)
        with self.network.away():
            more = itertools.islice(self.coming, ahead)
            bar = tqdm(itertools.chain(missing, more), desc='encoding prompts', delay=3,
                       leave=False, disable=None)
            for n, key in enumerate(bar):
                if key not in self.known:
                    found = self.field.encode(*key)
                    self.known[key] = {k: to_device(x, 'cpu') for k, x in found.items()}
                    self.bytes += nbytes(self.known[key])
                    self.ahead |= {key} if n >= len(missing) else set()
                if n + 1 >= len(missing) and self.bytes > self.most:
                    break

    @torch.no_grad()
    def condition(self, batch):
        """Gives samples what a field takes, `cond`, and the same without the words, `empty`, for
        guidance. It is on the device, brought there once for all the forwards to come."""
        keys = [self.keys(s.row) for s in batch]
        distinct = dict.fromkeys(k for pair in keys for k in pair)
        self.add(distinct)
        self.known |= {k: self.known.pop(k) for k in distinct}         # lately used
        self.ahead.difference_update(distinct)
        here = {k: {name: to_device(x, self.field.device) for name, x in self.known[k].items()}
                for k in distinct}
        for s, (key, nothing) in zip(batch, keys):
            path = s.row['source_image']
            source = self.field.encode_source(path, *s.size) if path else {}
            s.cond, s.empty = {**here[key], **source}, {**here[nothing], **source}

    def release(self, batch):
        """Makes room on the device, where nobody is asked any more."""
        for s in batch:
            s.cond = s.empty = None


def nbytes(embedding):
    return sum(x.nbytes for v in embedding.values() for x in (v if isinstance(v, list) else [v]))


def to_device(x, device):
    return [one.to(device) for one in x] if isinstance(x, list) else x.to(device)


# -------------------- adapters
def layers_of(net):
    """{name: module} of all that an adapter can be put on, whether there is one already or not."""
    return {k.removesuffix('.base_layer'): m for k, m in net.named_modules()
            if 'lora_' not in k and isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}


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
        for linear, x in ((layer.lora_A[name], A), (layer.lora_B[name], B)):
            x = x.to(layer.weight.device, dtype or x.dtype)
            linear.weight = torch.nn.Parameter(x, requires_grad=False)
        layer.scaling[name], layer.r[name] = float(scale), A.shape[0]


class Network:
    """A field's network with the teachers' adapters on it, those of full weights beside it, and the
    prompts' embeddings."""

    def __init__(self, field, teachers=(), cache_gb=4.0, mixing='hard', offload=False, small=False):
        self.field, self.mixing, self.offload, self.small = field, mixing, offload, small
        self.teachers, self.schedules = {t['name']: t for t in teachers}, {}
        self.adapters, self.full, self.gigabytes = {'student'}, {}, {}
        for name, t in self.teachers.items():
            if t.get('lora'):
                self.add_lora(name, t['lora'])
            elif t.get('checkpoint'):                          # a second denoiser
                self.full[name] = copy.copy(field)
                net = self.full[name].net = open_full(t['checkpoint'], field, small)
                self.gigabytes[name] = sum(p.nbytes for p in net.parameters()) / 1e9
        self.prompts = Prompts(self, cache_gb)
        self.refresh()

    def add_lora(self, name, path):
        adapter = self.fit(merge_lora.read_adapter(path), f'teacher {name!r}')
        need(merge_lora.size(adapter) > 0, f'teacher {name!r} has the velocity of the base: its '
             'weights do nothing')
        attach(self.field.net, name, adapter, self.field.dtype)
        self.adapters.add(name)
        numbers = sum(A.numel() + B.numel() for A, B, _ in adapter.values())
        self.gigabytes[name] = numbers * self.field.dtype.itemsize / 1e9

    @classmethod
    def open(cls, families, c, device, data, held, teachers=(), checkpoint=None):
        """All of a run. Prompts known ahead are encoded before the network is on the device."""
        if os.environ.get('RANK', '0') == '0':                 # of a large model, minutes
            tqdm.write(f'loading {c.model}', file=sys.stderr)
        field = open_field(families, c.model, c.dtype, device, c.family, c.max_sequence_length,
                           c.distilled_guidance, c.base_storage)
        # of a hub id, known only now
        check_sizes(type(field), type(field.pipe).__name__, field.configs, c.routes, data)
        models = cls(field, teachers, c.cache_gb, c.mixing, c.teacher_offload,
                     bool(c.base_storage))
        models.prompts.begin([r for rows in held.values() for r in rows], data.buckets)
        models.student = open_student(models, c, checkpoint)
        return models

    def sigmas(self, batch, n):
        """A batch's schedule of n steps, the family's own for its size, on the device."""
        size = tuple(batch[0].size)
        if (n, size) not in self.schedules:
            self.schedules[n, size] = self.field.sigmas(n, *size).to(self.field.device)
        return self.schedules[n, size]

    def encoders(self):
        return [m for k, m in self.field.pipe.components.items()
                if k.startswith('text_encoder') and m is not None]

    def drop_encoders(self):
        for k in [k for k in self.field.pipe.components if k.startswith('text_encoder')]:
            setattr(self.field.pipe, k, None)

    def nets(self):
        return [self.field.net, *(f.net for f in self.full.values() if not self.offload)]

    @contextmanager
    def away(self):
        """The text encoders are on the device, and no network is; then the other way round."""
        device, encoders = self.field.device, self.encoders()
        for m in self.nets():
            m.to('cpu')
        for m in encoders:
            m.to(device)
        try:
            with torch.no_grad():
                yield
        finally:
            for m in encoders:
                m.to('cpu')
            for m in self.nets():
                m.to(device)

    @contextmanager
    def seated(self, who):
        """The field that answers for a name, its network on the device."""
        field = self.full.get(who, self.field)
        waits = self.offload and who in self.full
        if waits:
            own = [(p, p.data) for p in field.net.parameters()]
            field.net.to(field.device)
        try:
            yield field
        finally:
            if waits:
                for p, kept in own:                            # it is frozen: no way back is needed
                    p.data = kept
                field.net.to('cpu')                            # and its buffers

    def fit(self, adapter, what):
        """An adapter's tensors under this net's names; all must land."""
        shapes = {k: tuple(m.weight.shape) for k, m in layers_of(self.field.net).items()}
        try:
            adapter = renamed(adapter, shapes, type(self.field.pipe))
        except BadInput as e:
            raise BadInput(f'{what}: {e}') from e
        return merge_lora.fit(adapter, shapes, what)

    def refresh(self):
        """After an adapter was added."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        self.layers = [m for m in self.field.net.modules() if isinstance(m, BaseTunerLayer)]
        for m in self.layers:                                  # autocast does it: not twice
            m.cast_input_dtype_enabled = False
        for n, p in self.field.net.named_parameters():         # attaching makes adapters trainable
            p.requires_grad_('.student.' in n)


def load_net(kind, path, field):
    """A network, which may stand alone or in a whole pipeline."""
    options = dict(dtype=field.dtype, use_safetensors=True)
    at = {} if (Path(path) / 'config.json').exists() else dict(subfolder=field.prefix)
    try:
        return kind.from_pretrained(path, **at, **options)
    except OSError:
        if at and not os.path.isdir(path):
            with suppress(OSError):                            # of a hub id, at its root
                return kind.from_pretrained(path, **options)
        raise


def pass_on(e):
    """Too little memory is no broken file."""
    if no_memory(e):
        raise e


def open_full(path, field, small=False):
    """A teacher's network of full weights, on the CPU: the field's kind, and not the base."""
    own, path = field.net, os.path.expanduser(path)
    try:
        net = load_net(type(own), path, field)
    except Exception as e:
        pass_on(e)
        raise BadInput(f'checkpoint {path} could not be loaded as a {type(own).__name__}: give a '
                       'diffusers folder or hub id of the same family. It said: '
                       f'{str(e)[:300]}') from e
    check_whole(net, f'checkpoint {path}')
    for k in ('in_channels', 'out_channels'):
        need(net.config.get(k) == own.config.get(k), f'checkpoint {path} has another {k}')
    if small:
        store_small(net)
    base = {k.replace('.base_layer', ''): p for k, p in own.named_parameters()}
    need(any(k in base and not torch.equal(p, base[k].cpu()) for k, p in net.named_parameters()),
         f'checkpoint {path} has the weights of the base')
    return net.requires_grad_(False).eval()


# -------------------- the student
class Student:
    """The one adapter that learns, in float32, with its optimizer and its average."""

    def __init__(self, net, c, targets, start=None):
        torch.manual_seed(c.seed)
        layers = layers_of(net)
        linear = [k for k, m in layers.items() if isinstance(m, torch.nn.Linear)]
        hits = {t: [k for k in linear if k == t or k.endswith('.' + t)]
                or [t] * (t in layers and t in (start or ()))          # a start's convolutions
                for t in targets}
        need(all(hits.values()), 'lora_targets: no linear layer of the model is called '
             f'{", ".join(t for t in hits if not hits[t])}')
        self.names = sorted({k for found in hits.values() for k in found})
        self.alpha, self.rank = c.alpha, c.rank
        surplus = sorted(set(start or ()) - set(self.names))
        need(not surplus, f'init_from: {len(surplus)} modules of the start, as {surplus[:1]}, are '
             'not in lora_targets; add them there, or leave lora_targets None')
        add_adapter(net, 'student', r=c.rank, lora_alpha=c.alpha, target_modules=self.names,
                    init_lora_weights='gaussian')
        self.params = {n: p for n, p in net.named_parameters() if '.student.' in n}
        for n, p in self.params.items():                       # PEFT made them in the base's dtype
            coarse = p.dtype.itemsize == 1 and '.lora_A.' in n
            p.data = torch.randn(p.shape, device=p.device) / c.rank if coarse else p.data.float()
        self.begin(net, start or {}, c.rank)
        if dist.is_initialized():                              # an SVD's signs are a machine's own
            for p in self.params.values():
                dist.broadcast(p.data, 0)
        self.start, self.ema = self.tensors(), self.tensors() if c.ema_decay else None
        self.updates = self.skipped = self.idle = 0            # made; not finite; without gradient
        self.recent = deque(maxlen=20)                         # which of the last were not finite
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.0, betas=tuple(c.betas),
                                           weight_decay=c.weight_decay)

    def begin(self, net, start, rank):
        """The start's tensors, cut to the rank; surplus rows of A keep their random numbers."""
        cut = {k: (*merge_lora.to_rank(m, rank), 1.0) for k, m in start.items()}
        self.whole_rank = max((A.shape[0] for A, _, _ in start.values()), default=rank)
        self.lost = merge_lora.lost(start, cut) if self.whole_rank > rank else 0.0
        for key, (A, B, _) in cut.items():
            layer, used = net.get_submodule(key), int(A.flatten(1).any(1).sum())
            layer.lora_A['student'].weight.data[:used] = A[:used]
            layer.lora_B['student'].weight.data.copy_(B / (self.alpha / rank))

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

    def update(self, lr, c, world):
        """One optimizer step; the gradients are summed over the processes, once. Where there is
        none, or one that is not finite, nothing moves. -> the gradient's norm."""
        params = self.params.values()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in params])
        if world.size > 1:
            dist.all_reduce(flat)
        norm = flat.norm().item()
        self.recent.append(not math.isfinite(norm))
        self.skipped += self.recent[-1]
        self.idle += norm == 0
        if norm and not self.recent[-1]:
            scale = min(1.0, c.grad_clip / (norm + 1e-6)) if c.grad_clip else 1.0
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad = g.view_as(p) * scale
            self.optimizer.param_groups[0]['lr'] = lr
            self.optimizer.step()
            self.updates += 1
            for n, p in self.params.items() if self.ema and self.updates % c.ema_every == 0 else ():
                self.ema[n].lerp_(p.detach(), 1 - c.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder, prefix):
        """What people use, the average if there is one, as adapter files; what a resume needs."""
        used = self.modules(self.ema or self.tensors())
        merge_lora.write_adapter(folder, used, self.alpha, prefix)
        counts = dict(updates=self.updates, skipped=self.skipped, idle=self.idle,
                      recent=list(self.recent))
        torch.save(dict(student=self.tensors(), averaged=bool(self.ema), counts=counts,
                        alpha=self.alpha, optimizer=self.optimizer.state_dict()),
                   folder / 'train_state.pt')

    def modules(self, tensors):
        """{module: (A, B)} as adapter files have it."""
        return {k: tuple(tensors[f'{k}.lora_{ab}.student.weight'].cpu() for ab in 'AB')
                for k in self.names}

    def load(self, folder):
        state = train_state(folder)
        saved = {n: x.shape for n, x in state['student'].items()}
        need(saved == {n: p.shape for n, p in self.params.items()}, f'{folder} holds another '
             'adapter than these settings make: rank, lora_targets and model must be those of its '
             'meta.json')
        average = state['student']                             # else a new one begins here
        if state['averaged']:
            files = merge_lora.read_adapter(folder)
            average = {f'{k}.lora_{ab}.student.weight': x for k, m in files.items()
                       for ab, x in zip('AB', m)}
        for n, p in self.params.items():
            p.data.copy_(state['student'][n])
            if self.ema:
                self.ema[n].copy_(average[n])
        counts = state['counts']
        self.updates, self.skipped, self.idle = (counts[k] for k in ('updates', 'skipped', 'idle'))
        self.recent.extend(counts['recent'])
        own = self.optimizer.state_dict()                      # a resume follows the settings
        try:
            moments = state['optimizer']['state']
            shapes = [p.shape for p in self.params.values()]
            if moments and [moments[i]['exp_avg'].shape for i in range(len(shapes))] != shapes:
                raise ValueError('its moments have other shapes')
            self.optimizer.load_state_dict({**own, 'state': moments})
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f'{folder}/train_state.pt has another optimizer ({e}); delete {folder} '
                           'to resume from the checkpoint before it') from e


def train_state(folder):
    try:
        state = torch.load(Path(folder) / 'train_state.pt', map_location='cpu', weights_only=True)
        moments = state['optimizer'].get('state', {}).values()
        numbers = *state['student'].values(), *(x for m in moments for x in m.values())
        if not all(torch.as_tensor(x).isfinite().all() for x in numbers):
            raise ValueError('values that are not finite')
        if sorted(state['counts']) != ['idle', 'recent', 'skipped', 'updates']:
            raise ValueError('its counts are odd')
        if type(state['averaged']) is not bool:
            raise ValueError('it does not say whether there is an average')
        return state
    except Exception as e:
        said = str(e).strip().partition('\n')[0] or type(e).__name__
        if 'weights_only' in str(e):
            said = 'it holds more than tensors'
        raise BadInput(f'{folder}/train_state.pt cannot be read ({said}); delete {folder} to '
                       'resume from the checkpoint before it') from e


def last_weights(folder):
    """The student itself, not its average, of a checkpoint: {module: (A, B, scale)}."""
    state = train_state(folder)
    names = {n.split('.lora_')[0] for n in state['student']}
    found = {k: [state['student'][f'{k}.lora_{ab}.student.weight'] for ab in 'AB'] for k in names}
    return {k: (A, B, state['alpha'] / A.shape[0]) for k, (A, B) in found.items()}


def merged_start(models, c):
    """init_from = 'merge': the mean of the LoRA teachers' deltas, by their routes' weights."""
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
