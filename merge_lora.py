"""
LoRA adapters: fit to a model, merge, reduce in rank, write; support/adapters.py reads them. As a
script it is the baseline in weight space: one adapter whose delta is the weighted sum of the
teachers' deltas (the weights are not normalised), exactly by concatenating ranks or of a chosen
rank by SVD; or the base with the deltas added.

python merge_lora.py --adapters=out/ocr,out/geneval --out=out/merged
python merge_lora.py --adapters=a.safetensors,owner/repo --weights=0.7,0.3 --rank=64 --out=out/m
python merge_lora.py --adapters=a,b --into_base=models/base --out=out/transformer

An adapter is {module name: (A, B, scale)} and stands for adding scale * B A to the module's weight.
Every module of a file has to land on the model. Left out on purpose: LoRA on text encoders, DoRA,
LoHa, LoKr, biases, pickles.
"""
import json, math, os, pathlib, shutil, sys, tempfile
from contextlib import contextmanager

import safetensors
import torch
from safetensors.torch import load_file, save_file

from configurator import BadInput, collect, configure, need, run
from support.adapters import FILES, FIRST, KOHYA, find, read_adapter, refuse, some

adapters = ''   # comma list: folders, .safetensors files, hub ids owner/repo[/folder or /file]
weights = ''    # comma list, one an adapter; empty: equal shares that sum to 1
out = ''        # new folder to write
rank = 0        # rank of the merged adapter by SVD; 0: exact, the ranks add up
into_base = ''  # model folder: write its full transformer or UNet with the deltas added, no adapter
model = ''      # model folder: the adapters have to fit, and get its names if they have others
SETTINGS = collect(sys.modules[__name__])


# -------------------- to a model
def model_shapes(folder):
    """{module name: weight shape} of a model folder's transformer/ or unet/, from headers alone."""
    shapes = {}
    for file in _shards(folder):
        try:
            with safetensors.safe_open(file, 'pt') as f:
                shapes |= {k[:-7]: tuple(f.get_slice(k).get_shape()) for k in f.keys()
                           if k.endswith('.weight')}
        except (OSError, safetensors.SafetensorError) as e:
            raise BadInput(f'{file} cannot be read; is it damaged? ({e})') from e
    return shapes


def _shards(folder):
    parts = [p for k in ('transformer', 'unet') if (p := pathlib.Path(folder, k)).is_dir()]
    need(parts, f'{folder}: no model folder with transformer/ or unet/ (download hub models first)')
    name = 'diffusion_pytorch_model.safetensors'
    part, files = parts[0], sorted(parts[0].glob('*.safetensors'))
    index, plain = part / f'{name}.index.json', part / name
    if index.exists():
        try:
            named = json.loads(index.read_text())['weight_map'].values()
            files = [part / f for f in sorted(set(named))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise BadInput(f'{index} is no index of weights ({e!r})') from e
    elif plain.exists():  # fp16 variants may stand beside it
        files = [plain]
    need(index.exists() or len(files) == 1,
         f'{part}: no {name} nor its index, but {some(f.name for f in files) or "nothing"}')
    refuse(f'{part}: the index names files that are not there',
           [f.name for f in files if not f.exists()])
    return files


def own_names(adapter, shapes):
    """{name in the adapter: the model's}, of those that are the model's, with or without dots."""
    flat = {k.replace('.', '_'): k for k in shapes}
    pairs = {k: k if k in shapes else flat.get(KOHYA.sub('', k, 1)) for k in adapter}
    return {k: own for k, own in pairs.items() if own}


def fit(adapter, shapes, what=''):
    """The adapter under the model's names and in its dimensions; every entry has to land."""
    names, fitted, bad = own_names(adapter, shapes), {}, []
    for name, (A, B, scale) in adapter.items():
        own = names.get(name)
        shape = tuple(shapes.get(own, ()))
        if own is None or own in fitted:
            bad.append(f'{name} ({"no such module" if own is None else "a second time"})')
        elif (len(shape) < 2 or B.shape[0] != shape[0] or A.shape[1] != shape[1]
              or A[0].numel() != math.prod(shape[1:])
              or (A.dim() == len(shape) and A.shape[1:] != shape[1:])):
            bad.append(f'{name} ({(B.shape[0], *A.shape[1:])}, the model has {shape})')
        else:  # a 1x1 convolution and a linear layer are the same thing, and files mix them up
            B = B.reshape(*B.shape[:2], *[1] * (len(shape) - 2))
            fitted[own] = A.reshape(-1, *shape[1:]), B, scale
    refuse(f'{what or "adapter"} belongs to another model, or has names that are not known '
           f'(docs/adapters.md): {len(bad)} of {len(adapter)} modules do not fit', bad)
    return fitted


# -------------------- merge
@contextmanager
def one_thread():
    """Small decompositions: threads would wait for each other, longer than the work takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge(adapters, weights, rank=None):
    """{name: (A, B, 1.0)}, the sum of weight * scale * B A: exact (ranks add up), or of `rank`."""
    parts = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, (A, B, scale) in adapter.items():
            parts.setdefault(name, []).append((A.float(), B.float() * (w * scale)))
    refuse('the adapters belong to different models, their shapes differ',
           [k for k, p in parts.items()
            if len({(len(B), A.shape[1:], B.shape[2:]) for A, B in p}) > 1])
    merged = {k: (torch.cat([A for A, _ in p]), torch.cat([B for _, B in p], 1), 1.0)
              for k, p in parts.items()}
    refuse('merged values are not finite, the weights are too large',
           [k for k, (_, B, _) in merged.items() if not B.isfinite().all()])
    return {k: (*to_rank(m, rank), 1.0) for k, m in merged.items()} if rank else merged


def _flat(A, B, scale):
    return A.flatten(1).double().T, B.flatten(1).double() * scale


def to_rank(module, rank):
    """(A, B) of rank `rank` nearest to scale * B A (Eckart-Young), never forming that matrix."""
    A, B, _ = module
    with one_thread():
        At, Bs = _flat(*module)
        RA, RB = torch.linalg.qr(At, 'r')[1], torch.linalg.qr(Bs, 'r')[1]
        U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)  # the singular values of B A
        k = min(rank, int((S > S[0] * torch.finfo(torch.float32).eps).sum()))
        root = S[:k].sqrt()  # half of each on either side: B A v = u s, with v = QA Vh', u = QB U
        a, b = A.new_zeros(rank, len(At)).float(), B.new_zeros(len(Bs), rank).float()
        a[:k] = (At @ (RB.T @ U[:, :k] / root)).T.float()
        b[:, :k] = (Bs @ (RA.T @ Vh[:k].T / root)).float()
    return a.reshape(rank, *A.shape[1:]), b.reshape(-1, rank, *B.shape[2:])


def size(adapter):
    """Frobenius norm of all deltas together, from the factors: |BA|^2 = sum of (B'B) * (AA')."""
    total = 0.0
    with one_thread():
        for module in adapter.values():
            At, Bs = _flat(*module)
            total += ((Bs.T @ Bs) * (At.T @ At)).sum().item()
    return math.sqrt(max(total, 0.0))


def lost(exact, cut):
    """Relative error of a reduced adapter. With A' = Q R, a delta B A is as long as B R', so that
    deltas themselves are subtracted; their squares, nearly equal, would leave noise."""
    total = 0.0
    with one_thread():
        for name, module in exact.items():
            (At, Bs), (at, bs) = _flat(*module), _flat(*cut[name])
            A, B = torch.cat([At, at], 1), torch.cat([Bs, -bs], 1)
            A, B = (A, B) if len(A) < len(B) else (B, A)
            total += (B @ torch.linalg.qr(A, 'r')[1].T).square().sum().item()
    return math.sqrt(total) / (size(exact) or 1)


# -------------------- write
def write_adapter(folder, modules, alpha=None, prefix='transformer'):
    """Three files, for diffusers' and for PEFT's loader. modules: {name: (A, B, scale)}, or
    {name: (A, B)} with scale alpha / r (1 without alpha). Without alpha, alpha = r is written and
    the scale is folded into B."""
    r = max(m[0].shape[0] for m in modules.values())
    out_scale = alpha / r if alpha else 1.0
    factors = {}
    for name, (A, B, *scale) in sorted(modules.items()):
        # One r in one configuration loads everywhere, patterns do not; zeros change no delta.
        more = r - A.shape[0]
        scale = scale[0] if scale else alpha / A.shape[0] if alpha else 1.0
        A, B = A.detach().cpu().float(), B.detach().cpu().float() * (scale / out_scale)
        A = torch.cat([A, A.new_zeros(more, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(len(B), more, *B.shape[2:])], 1)
        factors |= {f'{name}.lora_A.weight': A.contiguous(),
                    f'{name}.lora_B.weight': B.contiguous()}
    config = dict(peft_type='LORA', task_type=None, base_model_name_or_path=None, r=r,
                  inference_mode=True, lora_alpha=alpha or r, lora_dropout=0.0, bias='none',
                  use_rslora=False, use_dora=False, init_lora_weights=True, rank_pattern={},
                  alpha_pattern={}, target_modules=sorted(modules))  # whole: short ones hit more
    told = json.dumps({f'{prefix}.{k}': v for k, v in config.items()})
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.writing-', dir=folder) as tmp:  # then, at once
            save_file({f'{prefix}.{k}': t for k, t in factors.items()}, f'{tmp}/{FILES[0]}',
                      {'format': 'pt', 'lora_adapter_metadata': told})
            save_file({f'base_model.model.{k}': t for k, t in factors.items()}, f'{tmp}/{FILES[1]}')
            pathlib.Path(tmp, 'adapter_config.json').write_text(json.dumps(config, indent=2))
            for name in ('adapter_config.json', *FILES):
                os.replace(f'{tmp}/{name}', f'{folder}/{name}')
    except (OSError, safetensors.SafetensorError) as e:
        raise BadInput(f'{folder} could not be written: {e}') from e


def _check_new(out):
    need(not os.path.lexists(out) or os.path.isdir(out) and not os.listdir(out),
         f'{out} exists and is not an empty folder: name another --out, or remove it')


def add_to_base(model_folder, adapter, out):
    """Writes `out`, a folder like the model's transformer/ or unet/ with the deltas added."""
    _check_new(out)
    out = pathlib.Path(out)                            # without a slash at the end
    adapter = fit(adapter, model_shapes(model_folder))
    files, tmp = _shards(model_folder), pathlib.Path(f'{out}.partial')
    try:
        tmp.mkdir(parents=True)
    except OSError as e:
        raise BadInput(f'{tmp}, where {out} is written, cannot be made; if a run that ended early '
                       f'left it, remove it ({e})') from e
    try:
        for file in files:
            name = file.name if len(files) > 1 else 'diffusion_pytorch_model.safetensors'
            save_file(_added(file, adapter), tmp / name, {'format': 'pt'})
        for file in files[0].parent.glob('*.json'):
            if len(files) > 1 or not file.name.endswith('.index.json'):    # of one file it is wrong
                shutil.copy(file, tmp)
        os.rename(tmp, out)  # before this line there is no half model under the name asked for
    except (OSError, safetensors.SafetensorError) as e:
        raise BadInput(f'{out} could not be written: {e}') from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _added(file, adapter):
    tensors = load_file(file)
    for name in [k for k in adapter if f'{k}.weight' in tensors]:
        w, (A, B, scale) = tensors[f'{name}.weight'], adapter[name]
        need(w.dtype in (torch.float32, torch.bfloat16, torch.float16),
             f'{file}: {name} is stored as {w.dtype}; a quantised base cannot take a delta')
        delta = scale * B.flatten(1).float() @ A.flatten(1).float()
        tensors[f'{name}.weight'] = (w.float() + delta.reshape(w.shape)).to(w.dtype)
        need(tensors[f'{name}.weight'].isfinite().all(), f'{file}: {name} overflows {w.dtype}')
    return tensors


def main(argv):
    c = configure(SETTINGS, argv)
    paths = [p.strip() for p in c.adapters.split(',') if p.strip()]
    need(paths and c.out and c.rank >= 0,
         'give --adapters=a,b and --out=folder, and no negative rank (--help lists all)')
    try:
        shares = [float(w) for w in c.weights.split(',') if c.weights]
    except ValueError as e:
        raise BadInput(f'--weights={c.weights}: should be numbers with commas between') from e
    shares = shares or [1 / len(paths)] * len(paths)
    need(len(shares) == len(paths) and all(1e-6 <= abs(w) <= 1e6 for w in shares), f'{len(paths)} '
         f'adapters, so as many finite weights of a size from 1e-6 to 1e6, not {c.weights}')
    need(not c.model or not c.into_base, 'give --model or --into_base, not both')
    _check_new(c.out)
    base = c.into_base or c.model
    read = [read_adapter(p) for p in paths]
    if base:
        from support.renames import pipeline_of, renamed  # this script is the only one that knows
        shapes, pipeline = model_shapes(base), pipeline_of(base)  # models; reading files needs none
        read = [fit(renamed(a, shapes, pipeline), shapes, p) for a, p in zip(read, paths)]
    refuse("names are not diffusers' own, give --model=folder of the base for",
           [p for p, a in zip(paths, read) if any(FIRST.match(k) for k in a)])
    exact = merge(read, shares)
    merged = merge(read, shares, c.rank) if c.rank else exact
    whole = size(exact)
    each = [abs(w) * size(a) for a, w in zip(read, shares)]
    need(whole > 1e-6 * max(each), 'nothing is left of the sum: the adapters are zero, or cancel')
    print(f'{"adapter":40s} {"modules":>7s} {"ranks":>9s} {"weight":>7s} {"size":>6s} (merged: 1)')
    rows = [*zip(paths, read, shares, each), ('merged', merged, 1.0, size(merged))]
    for name, a, w, length in rows:
        ranks = sorted({A.shape[0] for A, _, _ in a.values()})
        span = f'{ranks[0]}-{ranks[-1]}' if len(ranks) > 1 else str(ranks[0])
        print(f'{name[-40:]:40s} {len(a):7d} {span:>9s} {w:7.3f} {length / whole:6.3f}')
    if c.rank:
        print(f'rank {c.rank} keeps the merged delta to a relative error of '
              f'{lost(exact, merged):.2e}')

    if c.into_base:
        add_to_base(c.into_base, merged, c.out)
    else:  # without a model folder, the names of its blocks tell a UNet
        unet = any(k.startswith(('down_blocks.', 'mid_block.', 'up_blocks.')) for k in merged)
        write_adapter(c.out, merged, prefix='unet' if unet else 'transformer')
    print(f'wrote {c.out}')


if __name__ == '__main__':
    run(main)
