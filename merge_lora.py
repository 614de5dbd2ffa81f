"""
Everything about LoRA files: find, read, fit to a model, merge, reduce in rank, write. As a script it is the
baseline in weight space: one adapter whose delta is the weighted sum of the teachers' deltas (the weights are
not normalised), exactly by concatenating ranks or of a chosen rank by SVD; or the base with the deltas added.

python merge_lora.py --adapters=out/ocr,out/geneval --out=out/merged
python merge_lora.py --adapters=a.safetensors,owner/repo/folder --weights=0.7,0.3 --rank=64 --out=out/merged
python merge_lora.py --adapters=a,b --into_base=models/base --out=out/transformer

An adapter is {module name: (A, B, scale)} and stands for adding scale * B A to that module's weight. Loaders
that skip what they do not expect give a teacher that equals the base: here every key of a file has to be
understood, and every module has to land. Left out on purpose: LoRA on text encoders, DoRA, LoHa, LoKr,
biases, pickles, and files in a model's original naming (fused qkv).
"""
import json, math, os, pathlib, re, shutil, sys
import torch
import safetensors
from safetensors.torch import load_file, save_file
from configurator import BadInput, collect, configure, need, run

adapters = ''   # comma list: folders, .safetensors files, hub ids owner/repo[/folder or /file.safetensors]
weights = ''    # comma list, one an adapter; empty: equal shares that sum to 1
out = ''        # new folder to write
rank = 0        # rank of the merged adapter by SVD; 0: exact, the ranks add up
into_base = ''  # model folder: write its full transformer (or UNet) weights with the deltas added, no adapter
model = ''      # model folder: checks that the adapters fit, and gives kohya's underscored names their dots
SETTINGS = collect(sys.modules[__name__])

FILES = 'pytorch_lora_weights.safetensors', 'adapter_model.safetensors'  # the first wins
KOHYA = ('lora_unet_', 'lora_transformer_')
PART = re.compile(r'(.+)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.default)?\.weight')
REFUSED = {  # what a file may hold that a sum of deltas cannot express
    'text-encoder parts': r'(base_model\.model\.)?(text_encoder|text_model|lora_te\d?_|te\d?\.)',
    'DoRA magnitude vectors': r'.*(lora_magnitude_vector|dora_scale)',
    'LoHa or LoKr factors': r'.*\b(hada|lokr)_',
    'biases': r'.*(\.bias|\.diff_b)$'}


def some(names):
    names = sorted(names)
    return ', '.join(names[:5]) + (f', ... {len(names)} in all' if len(names) > 5 else '')


def refuse(message, names):
    need(not names, f'{message}: {some(names)}')


# -------------------- find and read
def find(path):
    """A local file or folder, else a hub id -> the path of one .safetensors file."""
    text = os.path.expanduser(str(path))
    local, parts = pathlib.Path(text), text.rstrip('/').split('/')
    need(text.strip(), 'an adapter is named by the empty string')
    if not local.exists():
        need(text[0] not in './~' and len(parts) > 1 and '' not in parts and not os.path.exists(parts[0]),
             f'no such adapter: {path} (a local path, or a hub id owner/repo[/sub/folder])')
        local = _fetch('/'.join(parts[:2]), '/'.join(parts[2:]))
    if (local / 'latest').exists():  # a run's folder: its newest checkpoint, averaged weights if it has them
        local = local / 'latest'
        local = local / 'ema' if (local / 'ema').is_dir() else local
    if local.is_file():
        return local
    here = sorted(f.name for f in local.glob('*.safetensors'))
    name = next((f for f in FILES if f in here), here[0] if len(here) == 1 else None)
    seen = some(here or [f.name for f in local.iterdir()]) or 'nothing'
    need(name, f'{local} holds {seen}; {"name one file" if here else "no .safetensors file"}')
    return local / name


def _fetch(repo, sub):
    from huggingface_hub import hf_hub_download, snapshot_download  # the rest works without
    try:
        if sub.endswith('.safetensors'):
            if sub.endswith(FILES[1]):  # a PEFT file means nothing without its configuration
                hf_hub_download(repo, sub[:-len(FILES[1])] + 'adapter_config.json')
            return pathlib.Path(hf_hub_download(repo, sub))
        at = sub + '/' if sub else ''
        # A * also matches slashes: without the second list, whole models would come along.
        got = snapshot_download(repo, allow_patterns=[at + '*.safetensors', at + 'adapter_config.json'],
                                ignore_patterns=[at + '*/*'])
        local = pathlib.Path(got) / sub
        if not local.is_dir() or not any(local.iterdir()):
            raise FileNotFoundError(f'no folder {sub or "/"} with .safetensors files in it')
        return local
    except Exception as e:
        first = (str(e).strip() or '-').splitlines()[0]
        raise BadInput(f'{repo}{"/" + sub if sub else ""} is no local path and was not fetched from the hub '
                       f'({type(e).__name__}: {first}). Offline, download it by hand and give the folder; '
                       'a gated repository needs `hf auth login` and its licence accepted') from e


def read_adapter(path):
    """{module name: (A, B, scale)} in float32. Names of kohya files keep prefix and underscores until fit."""
    path = find(path)
    need(path.suffix == '.safetensors', f'{path}: only .safetensors files are read (a pickle may run code)')
    try:
        with safetensors.safe_open(path, 'pt') as f:
            meta, tensors = f.metadata() or {}, {k: f.get_tensor(k).float() for k in f.keys()}
        config = json.loads(meta.get('lora_adapter_metadata', 'null'))
        if path.name == FILES[1] or any(k.startswith('base_model.model.') for k in tensors):
            config = json.loads(path.with_name('adapter_config.json').read_text())
    except FileNotFoundError as e:
        raise BadInput(f'{path}: needs its adapter_config.json beside it, alpha is in there') from e
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise BadInput(f'{path}: damaged, or a git-lfs pointer; download it again ({e})') from e
    for what, pattern in REFUSED.items():
        refuse(f'{path}: {what} are not supported', [k for k in tensors if re.match(pattern, k)])
    refuse(f'{path}: values that are not finite in',
           [k for k, t in tensors.items() if not t.isfinite().all()])

    found, unknown = {}, []
    for key, tensor in tensors.items():
        m = PART.fullmatch(key)
        name, slot = (m[1], 'A' if m[2] else 'B') if m else (key.removesuffix('.alpha'), 'alpha')
        name = re.sub(r'^(base_model\.model|transformer|unet|diffusion_model)\.', '', name)
        known = m or (key.endswith('.alpha') and tensor.numel() == 1)
        if not known or slot in found.setdefault(name, {}):
            unknown.append(key)
        else:
            found[name][slot] = tensor
    refuse(f'{path}: keys that are no LoRA factors, or are there twice', unknown)
    need(found, f'{path}: holds no tensors')
    refuse(f'{path}: factors without their partner',  # other loaders take a delta of zero
           [f'{k} (no {s})' for k, f in found.items() for s in 'AB' if s not in f])
    refuse(f'{path}: ranks of A and B differ',
           [f'{k} (A {tuple(f["A"].shape)}, B {tuple(f["B"].shape)})' for k, f in found.items()
            if f['A'].dim() < 2 or f['B'].dim() < 2 or f['B'].shape[2:].numel() != 1
            or f['A'].shape[0] != f['B'].shape[1] or not f['A'].shape[0]])
    adapter = {}
    for name, f in found.items():
        r = f['A'].shape[0]
        alpha = r if config is None else _peft_alpha(config, name, r, path)
        adapter[name] = f['A'], f['B'], (f['alpha'].item() if 'alpha' in f else alpha) / r
    refuse(f'{path}: alpha is zero or not finite',
           [k for k, (_, _, s) in adapter.items() if not s or not math.isfinite(s)])
    return adapter


def _peft_alpha(config, name, r, path):
    """alpha such that alpha / r is PEFT's scale of a module. diffusers prefixes the keys."""
    def pick(patterns, default):
        return next((v for p, v in (patterns or {}).items() if re.match(rf'(.*\.)?({p})$', name)), default)
    try:
        config = {re.sub(r'^(transformer|unet)\.', '', k): v for k, v in config.items()}
        told = pick(config.get('rank_pattern'), config['r'])
        alpha = float(pick(config.get('alpha_pattern'), config['lora_alpha']))
        alpha *= math.sqrt(r) if config.get('use_rslora') else 1
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f'{path}: its configuration lacks a usable r or lora_alpha ({e})') from e
    init = str(config.get('init_lora_weights'))
    need(told == r, f'{path}: {name} has rank {r}, its configuration says {told}')
    need(config.get('peft_type', 'LORA') == 'LORA' and not config.get('use_dora'),
         f'{path}: its configuration is not that of a plain LoRA')
    need(not re.match('pissa|olora|corda|loftq', init), f'{path}: {init} changed the base weights as well')
    return alpha


# -------------------- to a model
def model_shapes(folder):
    """{module name: weight shape} of a model folder's transformer/ or unet/, from the headers alone."""
    shapes = {}
    for file in _shards(folder):
        with safetensors.safe_open(file, 'pt') as f:
            shapes |= {k[:-7]: tuple(f.get_slice(k).get_shape()) for k in f.keys() if k.endswith('.weight')}
    return shapes


def _shards(folder):
    part = next((p for k in ('transformer', 'unet') if (p := pathlib.Path(folder, k)).is_dir()), None)
    need(part, f'{folder}: no model folder with transformer/ or unet/ (download hub models first)')
    name = 'diffusion_pytorch_model.safetensors'
    index, plain, files = part / f'{name}.index.json', part / name, sorted(part.glob('*.safetensors'))
    if index.exists():
        files = [part / f for f in sorted(set(json.loads(index.read_text())['weight_map'].values()))]
    elif plain.exists():  # fp16 variants may stand beside it
        files = [plain]
    need(index.exists() or len(files) == 1,
         f'{part}: no {name} nor its index, but {some(f.name for f in files) or "nothing"}')
    refuse(f'{part}: the index names files that are not there', [f.name for f in files if not f.exists()])
    return files


def fit(adapter, shapes, what=''):
    """The adapter under the model's own names and in its own dimensions; every entry has to land and fit."""
    dotted = {name.replace('.', '_'): name for name in shapes}
    fitted, bad = {}, []
    for name, (A, B, scale) in adapter.items():
        own = name if name in shapes else dotted.get(re.sub('^' + '|^'.join(KOHYA), '', name))
        shape = tuple(shapes.get(own, ()))
        if own is None or own in fitted:
            bad.append(f'{name} ({"no such module" if own is None else "a second time"})')
        elif (len(shape) < 2 or B.shape[0] != shape[0] or A.shape[1] != shape[1]
              or A[0].numel() != math.prod(shape[1:])
              or (A.dim() == len(shape) and A.shape[1:] != shape[1:])):
            bad.append(f'{name} ({(B.shape[0], *A.shape[1:])}, the model has {shape})')
        else:  # a 1x1 convolution and a linear layer are the same thing, and files mix them up
            fitted[own] = A.reshape(-1, *shape[1:]), B.reshape(*B.shape[:2], *[1] * (len(shape) - 2)), scale
    refuse(f'{what or "adapter"} belongs to another model, or has the names of its first release (load and '
           f'save it once with diffusers): {len(bad)} of {len(adapter)} modules do not fit', bad)
    return fitted


# -------------------- merge
def merge(adapters, weights, rank=None):
    """{name: (A, B, 1.0)}, the sum of weight * scale * B A: exact by concatenation, or the best of `rank`."""
    parts = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, (A, B, scale) in adapter.items():
            parts.setdefault(name, []).append((A.float(), B.float() * (w * scale)))
    refuse('the adapters belong to different models, their shapes differ',
           [k for k, p in parts.items() if len({(len(B), A.shape[1:], B.shape[2:]) for A, B in p}) > 1])
    merged = {k: (torch.cat([A for A, _ in p]), torch.cat([B for _, B in p], 1), 1.0)
              for k, p in parts.items()}
    return {k: (*to_rank(m, rank), 1.0) for k, m in merged.items()} if rank else merged


def to_rank(module, rank):
    """(A, B) of rank `rank` nearest to scale * B A (Eckart-Young), without ever forming that matrix."""
    A, B, scale = module
    QB, RB = torch.linalg.qr(B.flatten(1).double() * scale)  # with A' = QA RA, B A = QB (RB RA') QA'
    QA, RA = torch.linalg.qr(A.flatten(1).double().T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    k = min(rank, int((S > S[0] * torch.finfo(torch.float32).eps).sum()))
    root = S[:k].sqrt()  # half of each singular value on either side
    a, b = A.new_zeros(rank, QA.shape[0]).float(), B.new_zeros(QB.shape[0], rank).float()
    a[:k], b[:, :k] = (root[:, None] * Vh[:k] @ QA.T).float(), (QB @ U[:, :k] * root).float()
    return a.reshape(rank, *A.shape[1:]), b.reshape(-1, rank, *B.shape[2:])


def size(adapter):
    """Frobenius norm of all deltas together, from the factors: |BA|^2 = sum of (B'B) * (AA')."""
    total = 0.0
    for A, B, scale in adapter.values():
        A, B = A.flatten(1).double(), B.flatten(1).double()
        total += scale ** 2 * ((B.T @ B) * (A @ A.T)).sum().item()
    return math.sqrt(max(total, 0.0))


# -------------------- write
def write_adapter(folder, modules, alpha=None, prefix='transformer'):
    """
    Three files, for diffusers' and for PEFT's loader. modules: {name: (A, B, scale)}, or {name: (A, B)} with
    scale alpha / r (1 without alpha). Without alpha, alpha = r is written and the scale is folded into B.
    """
    r = max(m[0].shape[0] for m in modules.values())
    out_scale = alpha / r if alpha else 1.0
    factors = {}
    for name, (A, B, *scale) in sorted(modules.items()):
        # One r in one configuration loads everywhere, patterns do not; zero rows and columns change no delta.
        more = r - A.shape[0]
        scale = scale[0] if scale else alpha / A.shape[0] if alpha else 1.0
        A, B = A.detach().cpu().float(), B.detach().cpu().float() * (scale / out_scale)
        A = torch.cat([A, A.new_zeros(more, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(len(B), more, *B.shape[2:])], 1)
        factors |= {f'{name}.lora_A.weight': A.contiguous(), f'{name}.lora_B.weight': B.contiguous()}
    config = dict(peft_type='LORA', task_type=None, base_model_name_or_path=None, inference_mode=True, r=r,
                  lora_alpha=alpha or r, lora_dropout=0.0, bias='none', use_rslora=False, use_dora=False,
                  init_lora_weights=True, rank_pattern={}, alpha_pattern={},
                  target_modules=sorted(modules))  # whole names: short ones would hit modules without factors
    told = json.dumps({f'{prefix}.{k}': v for k, v in config.items()})
    meta = {'format': 'pt', 'lora_adapter_metadata': told}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f'{prefix}.{k}': t for k, t in factors.items()}, folder / FILES[0], meta)
    save_file({f'base_model.model.{k}': t for k, t in factors.items()}, folder / FILES[1])
    (folder / 'adapter_config.json').write_text(json.dumps(config, indent=2))


def _check_new(out):
    need(not os.path.exists(out) or os.path.isdir(out) and not os.listdir(out),
         f'{out} exists and is not an empty folder: name another --out, or remove it')


def add_to_base(model_folder, adapter, out):
    """Writes `out`, a folder like the model's transformer/ or unet/ with the deltas added, by shards."""
    _check_new(out)
    out = pathlib.Path(out)                            # without a slash at the end
    adapter = fit(adapter, model_shapes(model_folder))
    files = _shards(model_folder)
    part, tmp = files[0].parent, pathlib.Path(f'{out}.partial')
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for file in files:
        tensors = load_file(file)
        for name in [k for k in adapter if f'{k}.weight' in tensors]:
            w, (A, B, scale) = tensors[f'{name}.weight'], adapter[name]
            need(w.dtype in (torch.float32, torch.bfloat16, torch.float16),
                 f'{file}: {name} is stored as {w.dtype}; a quantised base cannot take a delta')
            delta = scale * B.flatten(1).float() @ A.flatten(1).float()
            tensors[f'{name}.weight'] = (w.float() + delta.reshape(w.shape)).to(w.dtype)
        name = file.name if len(files) > 1 else 'diffusion_pytorch_model.safetensors'
        save_file(tensors, tmp / name, {'format': 'pt'})
    for file in part.glob('*.json'):
        shutil.copy(file, tmp)
    os.rename(tmp, out)  # a crash before this line leaves no half model under the name asked for


def main(argv):
    c = configure(SETTINGS, argv)
    paths = [p.strip() for p in c.adapters.split(',') if p.strip()]
    need(paths and c.out and c.rank >= 0,
         'give --adapters=a,b and --out=folder, and no negative rank (--help lists all)')
    try:
        shares = [float(w) for w in c.weights.split(',')] if c.weights else [1 / len(paths)] * len(paths)
    except ValueError as e:
        raise BadInput(f'--weights={c.weights}: should be numbers with commas between') from e
    need(len(shares) == len(paths) and all(map(math.isfinite, shares)),
         f'{len(paths)} adapters, so as many finite weights, not {c.weights}')
    _check_new(c.out)
    base = c.into_base or c.model
    shapes = model_shapes(base) if base else None
    read = [read_adapter(p) for p in paths]
    if base:
        read = [fit(a, shapes, p) for a, p in zip(read, paths)]
    refuse('kohya names have lost their dots, give --model=folder of the base for',
           [p for p, a in zip(paths, read) if any(k.startswith(KOHYA) for k in a)])

    exact = merge(read, shares)
    merged = merge(read, shares, c.rank) if c.rank else exact
    whole = size(exact)
    print(f'{"adapter":40s} {"modules":>7s} {"ranks":>9s} {"weight":>7s} {"size":>6s} (merged: 1)')
    for name, a, w in [*zip(paths, read, shares), ('merged', merged, 1.0)]:
        ranks = sorted({A.shape[0] for A, _, _ in a.values()})
        span = f'{ranks[0]}-{ranks[-1]}' if len(ranks) > 1 else str(ranks[0])
        print(f'{name[-40:]:40s} {len(a):7d} {span:>9s} {w:7.3f} {abs(w) * size(a) / (whole or 1):6.3f}')
    if c.rank:
        error = size(merge([exact, merged], [1.0, -1.0])) / (whole or 1)
        print(f'rank {c.rank} keeps the merged delta to a relative error of {error:.2e}')

    if c.into_base:
        add_to_base(c.into_base, merged, c.out)
    else:  # without a model folder, the names of its blocks tell a UNet
        unet = any(k.startswith(('down_blocks.', 'mid_block.', 'up_blocks.')) for k in merged)
        write_adapter(c.out, merged, prefix='unet' if unet else 'transformer')
    print(f'wrote {c.out}')


if __name__ == '__main__':
    run(main)
