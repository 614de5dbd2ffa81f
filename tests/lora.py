"""Adapters for the tests: made at random, packed as tools pack them, added to a network by hand."""
from conftest import *
from pipelines import *

TARGETS = {'sd3': 'to_q to_out.0 add_k_proj ff.net.2', 'zimage': 'to_q to_out.0 w2',
           'flux': 'to_k to_out.0 proj_mlp proj_out', 'sd15': 'to_q to_out.0 conv1 proj_in',
           'sdxl': 'to_v to_out.0 conv_shortcut'}


def prefix(family):
    return 'unet' if family in UNETS else 'transformer'


def net_of(pipe):
    return getattr(pipe, 'transformer', None) or pipe.unet


def shapes_of(net):
    return {k: tuple(m.weight.shape) for k, m in net.named_modules()
            if getattr(m, 'weight', None) is not None}


def random_for(shapes, seed=0, r=4, scale=0.5):
    """{module: (A, B, scale)} for weights of these shapes."""
    g = torch.Generator().manual_seed(seed)
    return {k: (0.2 * torch.randn(r, *s[1:], generator=g),
                0.2 * torch.randn(s[0], r, *[1] * (len(s) - 2), generator=g), scale)
            for k, s in shapes.items()}


def make(net, family, seed=0, r=4, scale=0.5, keep=lambda i: True):
    ends = tuple('.' + t for t in TARGETS[family].split())
    hit = {k: s for k, s in shapes_of(net).items() if ('.' + k).endswith(ends)}
    assert len(hit) > 3
    return random_for({k: s for i, (k, s) in enumerate(hit.items()) if keep(i)}, seed, r, scale)


@torch.no_grad()
def output(net, family):
    g = torch.Generator().manual_seed(1)

    def rand(*s):
        return torch.randn(*s, generator=g)
    if family == 'sd3':
        times = torch.tensor([500.0, 20.0])
        return net(rand(2, 16, 8, 8), rand(2, 7, 32), rand(2, 32), times, return_dict=False)[0]
    if family == 'zimage':
        x, words = [rand(16, 1, 8, 8)], [rand(7, 16)]
        return torch.stack(net(x, torch.tensor([0.5]), words, return_dict=False)[0])
    if family == 'flux':
        return net(rand(2, 16, 64), rand(2, 7, 16), rand(2, 16), torch.tensor([0.5, 0.1]),
                   img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3), guidance=torch.ones(2),
                   return_dict=False)[0]
    more = {}
    if family == 'sdxl':
        more = dict(added_cond_kwargs=dict(text_embeds=rand(2, 16), time_ids=rand(2, 6)))
    return net(rand(2, 4, 8, 8), 500, rand(2, 7, 32 if more else 16), **more, return_dict=False)[0]


@torch.no_grad()
def added(net, adapter):
    """A copy of net with scale * B A added to its weights by hand."""
    net = copy.deepcopy(net)
    for k, (A, B, s) in adapter.items():
        w = net.get_submodule(k).weight
        w += (s * B.flatten(1) @ A.flatten(1)).reshape(w.shape)
    return net


def deltas(adapter):
    return {k: s * B.flatten(1) @ A.flatten(1) for k, (A, B, s) in adapter.items()}


def same(a, b, tol=1e-6):
    a, b = deltas(a), deltas(b)
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tol for k in a)


def factors(adapter, start='', a='lora_A', b='lora_B', name=str, alpha=True):
    """A file's tensors: names as `name` makes them, behind `start`; with an alpha each, or not."""
    found = {}
    for k, (A, B, scale) in adapter.items():
        found |= {f'{start}{name(k)}.{a}.weight': A.contiguous(),
                  f'{start}{name(k)}.{b}.weight': B.contiguous()}
        found |= {f'{start}{name(k)}.alpha': torch.tensor(scale * len(A))} if alpha else {}
    return found


def flat(name):
    return name.replace('.', '_')


PACKAGINGS = {                          # as `factors` makes them
    'diffusers-alpha': lambda a, p: factors(a, f'{p}.', 'lora.down', 'lora.up'),
    'diffusion_model': lambda a, p: factors(a, 'diffusion_model.'),
    'diffusion_model-down': lambda a, p: factors(a, 'diffusion_model.', 'lora_down', 'lora_up'),
    'kohya-unet': lambda a, p: factors(a, 'lora_unet_', 'lora_down', 'lora_up', flat),
    'kohya-transformer': lambda a, p: factors(a, 'lora_transformer_', 'lora_down', 'lora_up', flat),
    'simpletuner': lambda a, p: factors(a, 'lycoris_', 'lora_down', 'lora_up', flat),
    'onetrainer': lambda a, p: factors(a, f'lora_{p}.', 'lora_down', 'lora_up'),
    'bare': lambda a, p: factors(a)}


def pack(adapter, how, folder, family):
    """The adapter as public tools write it."""
    folder.mkdir()
    p, (A, _, scale) = prefix(family), next(iter(adapter.values()))
    config = dict(peft_type='LORA', r=len(A), lora_alpha=scale * len(A),
                  target_modules=sorted(adapter))
    told = json.dumps({f'{p}.{k}': v for k, v in config.items()})
    if how in ('peft', 'diffusers-config'):
        (folder / 'adapter_config.json').write_text(json.dumps(config))
    if how == 'peft':
        tensors = factors(adapter, 'base_model.model.', alpha=False)
        save_file(tensors, folder / 'adapter_model.safetensors')
    elif how in ('diffusers', 'diffusers-config'):
        meta = {'lora_adapter_metadata': told} if how == 'diffusers' else {}
        tensors = factors(adapter, f'{p}.', alpha=False)
        save_file(tensors, folder / 'pytorch_lora_weights.safetensors', {'format': 'pt', **meta})
    else:
        save_file(PACKAGINGS[how](adapter, p), folder / 'any.safetensors')
    return folder
