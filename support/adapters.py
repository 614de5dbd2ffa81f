"""
Adapter files: find and read them, whichever tool wrote them (docs/adapters.md). Every key of a file
has to be understood: loaders that skip what they do not expect give a teacher that equals the base.
"""
import contextlib, functools, json, os, pathlib, re, subprocess, sys

import safetensors

from configurator import BadInput, need
from support.disk import flaw

FILES = 'pytorch_lora_weights.safetensors', 'adapter_model.safetensors'  # the first wins
KOHYA = re.compile('lora_unet_|lora_transformer_|lycoris_')              # and names without dots
FIRST = re.compile(KOHYA.pattern + r'|(double|single|joint|input|output)_blocks?\.|middle_block\.|'
                   r'.*(\.processor\.|\.attention\.(qkv|out)$)')  # as a first release has them
PREFIX = re.compile(r'^(base_model\.model|(lora_)?(transformer|unet)|(model\.)?diffusion_model)\.')
PART = re.compile(r'(.+?)\.(?:(lora_A|lora_down|lora\.down|down)|lora_B|lora_up|lora\.up|up)'
                  r'(?:\.default)?\.weight')
REFUSED = {  # what a file may hold that a sum of deltas cannot express
    'text-encoder parts (train or export the adapter without them)':
        r'(base_model\.model\.)?(text_encoder|text_model|lora_te\d?[._]|te\d?\.)',
    'DoRA magnitude vectors': r'.*(lora_magnitude_vector|dora_scale)',
    'LoHa or LoKr factors': r'.*\b(hada|lokr)_',
    'biases': r'.*(\.bias|\.diff_b)$'}
# PEFT's settings that change nothing about scale * B A on an unchanged base; those that may have
# only some values. Others have to be empty: a list of what is plain, for PEFT learns new variants.
ANY = '''r lora_alpha rank_pattern alpha_pattern use_rslora target_modules exclude_modules
lora_dropout layers_to_transform layers_pattern task_type auto_mapping base_model_name_or_path
revision peft_version inference_mode megatron_core qalora_group_size eva_config loftq_config
runtime_config ensure_weight_tying'''.split()
SOME = dict(peft_type=['LORA'], bias=['none'],
            init_lora_weights=[True, 'gaussian', 'eva', 'orthogonal', 'mica'])
PATIENCE = 10  # seconds for an adapter's patterns
MATCH = '''import json, re, signal, sys
signal.alarm(60)                # if nobody is left to stop it
patterns, names = json.load(sys.stdin)
tests = [re.compile(rf"(.*\\.)?({p})$") for p in patterns]
found = [next((i for i, t in enumerate(tests) if t.match(n)), None) for n in names]
json.dump(found, sys.stdout)'''


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
    try:
        if not os.path.exists(text):
            need(text[0] not in './~' and len(parts) > 1 and '' not in parts
                 and not os.path.exists(parts[0]),
                 f'no such adapter: {path} (a local path, or a hub id owner/repo[/sub/folder])')
            local = _fetch('/'.join(parts[:2]), '/'.join(parts[2:]))
        if (local / 'latest').is_dir():                        # a run: its newest checkpoint
            local = local / 'latest'
        if local.is_file():
            return local
        every = sorted(f.name for f in local.iterdir())
    except OSError as e:
        raise BadInput(f'adapter {path} cannot be read: {e}') from e
    return local / chosen(every, local)


def chosen(names, where):
    """Which of a folder's files is the adapter."""
    here = [f for f in names if f.endswith('.safetensors')]
    name = next((f for f in FILES if f in here), here[0] if len(here) == 1 else None)
    need(name, f'{where} holds {some(here or names) or "nothing"}; '
         f'{"name one file" if here else "no .safetensors file"}')
    return name


@functools.cache                                               # a run asks more than once
def _fetch(repo, sub):
    import huggingface_hub as hub                              # the rest works without
    names, file = [], '*.safetensors'
    with contextlib.suppress(Exception):                       # what is wrong the fetch itself says
        names = [f for f in hub.list_repo_files(repo) if f.rpartition('/')[0] == sub]
    if names:                                                  # one, before many are fetched
        file = chosen([f.rpartition('/')[2] for f in names], f'{repo}/{sub}'.rstrip('/'))
    try:
        if sub.endswith('.safetensors'):
            if sub.endswith(FILES[1]):  # a PEFT file means nothing without its configuration
                hub.hf_hub_download(repo, sub[:-len(FILES[1])] + 'adapter_config.json')
            return pathlib.Path(hub.hf_hub_download(repo, sub))
        at = sub + '/' if sub else ''
        # A * also matches slashes: without the second list, whole models would come along.
        got = hub.snapshot_download(repo, ignore_patterns=[at + '*/*'],
                                    allow_patterns=[at + file, at + 'adapter_config.json'])
        local = pathlib.Path(got) / sub
        if not local.is_dir() or not any(local.iterdir()):
            raise FileNotFoundError(f'no folder {sub or "/"} with .safetensors files in it')
        return local
    except Exception as e:
        first = (str(e).strip() or '-').splitlines()[0]
        raise BadInput(f'{repo}{"/" + sub if sub else ""} is no local path and was not fetched '
                       f'from the hub ({type(e).__name__}: {first}). Offline, download it by hand '
                       'and give the folder; a gated repository needs `hf auth login` and its '
                       'licence accepted') from e


def read_adapter(path):
    """{module name: (A, B, scale)} in float32, under the file's names without their prefix."""
    path = find(path)
    need(path.suffix == '.safetensors',
         f'{path}: only .safetensors files are read (a pickle may run code)')
    need(not flaw(path), f'adapter {path} {flaw(path)}')
    try:
        with open(path, 'rb') as f:
            need(f.read(19) != b'version https://git', f'{path} is a git-lfs pointer: fetch the '
                 'file itself, by `git lfs pull` or from its page')
        with safetensors.safe_open(path, 'pt') as f:
            meta, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
        where, text = path, meta.get('lora_adapter_metadata')
        beside, peft = path.with_name('adapter_config.json'), path.name == FILES[1]
        peft = peft or any(k.startswith('base_model.model.') for k in tensors)
        need(beside.is_file() or not peft,
             f'{path}: needs its adapter_config.json beside it, alpha is in there')
        alone = text or any(k.endswith('.alpha') for k in tensors)  # it says its alpha itself
        if peft or beside.is_file() and not alone:
            where, text = beside, beside.read_text()
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path} cannot be read; if it is damaged, download it again ({e})') from e
    try:
        config = None if text is None else {
            re.sub(r'^(transformer|unet)\.', '', k): v for k, v in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError) as e:
        raise BadInput(f'{where}: its configuration is no JSON object ({e})') from e
    return parse(tensors, path, config)


def parse(tensors, path, config=None):
    """The adapter that a file's tensors and PEFT's configuration stand for; nothing is left out."""
    for what, pattern in REFUSED.items():
        refuse(f'{path}: {what} are not supported', [k for k in tensors if re.match(pattern, k)])
    refuse(f'{path}: values that are not finite in',
           [k for k, t in tensors.items() if not t.float().isfinite().all()])
    refuse(f'{path}: values that are no floating-point numbers in',
           [k for k, t in tensors.items()
            if not t.is_floating_point() and not k.endswith('.alpha')])
    found, unknown = {}, []
    for key, tensor in tensors.items():
        m = PART.fullmatch(key)
        name, slot = (m[1], 'A' if m[2] else 'B') if m else (key.removesuffix('.alpha'), 'alpha')
        name = PREFIX.sub('', name)
        known = m or (key.endswith('.alpha') and tensor.numel() == 1)
        if not known or slot in found.setdefault(name, {}):
            unknown.append(key)
        else:
            found[name][slot] = tensor.float()
    refuse(f'{path}: keys that are no LoRA factors, or are there twice', unknown)
    need(found, f'{path}: holds no tensors')
    refuse(f'{path}: factors without their partner',  # other loaders take a delta of zero
           [f'{k} (no {s})' for k, f in found.items() for s in 'AB' if s not in f])
    refuse(f'{path}: ranks of A and B differ',
           [f'{k} (A {tuple(f["A"].shape)}, B {tuple(f["B"].shape)})' for k, f in found.items()
            if f['A'].dim() < 2 or f['B'].dim() < 2 or f['B'].shape[2:].numel() != 1
            or f['A'].shape[0] != f['B'].shape[1] or not f['A'].shape[0]])
    ranks = {k: len(f['A']) for k, f in found.items()}
    scales = {} if config is None else _peft_scales(config, ranks, path)
    adapter = {k: (f['A'], f['B'], f['alpha'].item() / len(f['A']) if 'alpha' in f else
                   scales.get(k, 1.0)) for k, f in found.items()}
    refuse(f'{path}: alpha is zero, not finite or absurd',
           [k for k, (_, _, s) in adapter.items() if not 1e-9 < abs(s) < 1e9])
    return adapter


def _peft_scales(config, ranks, path):
    """PEFT's scales of modules, by their ranks. diffusers prefixes the keys."""
    refuse(f'{path}: its configuration is not known to be that of a plain LoRA on a base as it was',
           [f'{k}={v!r:.40}' for k, v in config.items() if v and k not in ANY
            and v not in SOME.get(k, ()) and not k.startswith('text_encoder')])
    try:
        told = _by_pattern(config.get('rank_pattern'), ranks, config['r'], path)
        alpha = _by_pattern(config.get('alpha_pattern'), ranks, config['lora_alpha'], path)
        root = 0.5 if config.get('use_rslora') else 1
        scales = {k: float(alpha[k]) / r ** root for k, r in ranks.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as e:
        raise BadInput(f'{path}: its configuration lacks a usable r or lora_alpha ({e})') from e
    refuse(f'{path}: ranks are not those that its configuration says',
           [f'{k} has rank {r}, it says {told[k]}' for k, r in ranks.items() if told[k] != r])
    return scales


def _by_pattern(patterns, names, default, path):
    """{name: value of the first pattern that it matches}, as PEFT does it. In a process of its own:
    a regular expression may never end."""
    if not patterns:
        return dict.fromkeys(names, default)
    try:
        done = subprocess.run([sys.executable, '-ISc', MATCH], capture_output=True, text=True,
                              timeout=PATIENCE, input=json.dumps([list(patterns), list(names)]))
    except subprocess.TimeoutExpired as e:
        raise BadInput(f'{path}: a pattern of its configuration never ends, as a regular '
                       'expression; write whole names') from e
    need(not done.returncode, f'{path}: a pattern of its configuration is no regular expression: '
         f'{done.stderr.strip()[-200:].splitlines()[-1:]}')
    values = list(patterns.values())
    return {n: default if i is None else values[i] for n, i in zip(names, json.loads(done.stdout))}
