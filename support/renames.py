"""
Adapters that have the names of their model's first release: the authors' own code, kohya's trainer,
ComfyUI, XLabs. diffusers renames them as its loader would; what it leaves is split by a table here.
"""
import json, re
from pathlib import Path
from types import SimpleNamespace

import merge_lora
from configurator import BadInput, need
from support.adapters import KOHYA, parse, some

# Stable Diffusion 3, of block i: the model's names, or several whose rows were one matrix.
SD3 = {
    'x_block_attn_qkv': 'attn.to_q attn.to_k attn.to_v',
    'x_block_attn2_qkv': 'attn2.to_q attn2.to_k attn2.to_v',
    'context_block_attn_qkv': 'attn.add_q_proj attn.add_k_proj attn.add_v_proj',
    'x_block_attn_proj': 'attn.to_out.0', 'x_block_attn2_proj': 'attn2.to_out.0',
    'context_block_attn_proj': 'attn.to_add_out',
    'x_block_mlp_fc1': 'ff.net.0.proj', 'x_block_mlp_fc2': 'ff.net.2',
    'context_block_mlp_fc1': 'ff_context.net.0.proj', 'context_block_mlp_fc2': 'ff_context.net.2',
    'x_block_adaLN_modulation_1': 'norm1.linear',
    'context_block_adaLN_modulation_1': 'norm1_context.linear'}
SD3_ALONE = {
    'x_embedder_proj': 'pos_embed.proj', 'final_layer_linear': 'proj_out',
    'final_layer_adaLN_modulation_1': 'norm_out.linear',
    't_embedder_mlp_0': 'time_text_embed.timestep_embedder.linear_1',
    't_embedder_mlp_2': 'time_text_embed.timestep_embedder.linear_2',
    'y_embedder_mlp_0': 'time_text_embed.text_embedder.linear_1',
    'y_embedder_mlp_2': 'time_text_embed.text_embedder.linear_2'}


def pipeline_of(folder):
    """The class that a model folder's model_index.json names, or None."""
    import diffusers
    index = Path(folder, 'model_index.json')
    try:
        name = json.loads(index.read_text())['_class_name'] if index.exists() else ''
        return getattr(diffusers, name, None)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f'{index} names no pipeline ({e!r})') from e


def renamed(adapter, shapes, pipeline):
    """The adapter with the model's own names (`shapes` has them all) in place of those of its first
    release; a name that nobody knows is left, for merge_lora.fit to refuse. pipeline: its class."""
    known = merge_lora.own_names(adapter, shapes)
    rest = {k: module for k, module in adapter.items() if k not in known}
    if not rest:
        return adapter
    rename = by_table if any('joint_blocks' in k for k in rest) else by_diffusers
    found = {k: m for k, m in adapter.items() if k in known} | rename(rest, shapes, pipeline)
    before, after = measure(adapter), measure(found)
    need(before[0] == after[0] and abs(after[1] - before[1]) <= 1e-5 * before[1],
         'two names of the adapter mean one module, or some were left out when diffusers renamed '
         f'the others: {some(rest)}')
    return found


def measure(adapter):
    """(numbers in all deltas, their size): splitting and renaming change neither."""
    return sum(len(B) * A[0].numel() for A, B, _ in adapter.values()), merge_lora.size(adapter)


def by_table(adapter, shapes, pipeline):
    found = {}
    for name, (A, B, scale) in adapter.items():
        flat = KOHYA.sub('', name, 1).replace('.', '_')
        own, block = SD3_ALONE.get(flat, '').split(), re.fullmatch(r'joint_blocks_(\d+)_(.+)', flat)
        if block:
            own = [f'transformer_blocks.{block[1]}.{k}' for k in SD3.get(block[2], '').split()]
        rows = [shapes[k][0] for k in own if k in shapes]
        if sum(rows) != len(B):  # none, or another size: fit will say so
            found[name] = A, B, scale
            continue
        for k, part in zip(own, B.split(rows)):
            # The last norms have two parts, scale and shift, and had them the other way round.
            two = 'norm' in k and rows[0] == 2 * shapes[k][1]
            found[k] = A, part.roll(len(part) // 2, 0) if two else part, scale
    return found


def by_diffusers(adapter, shapes, pipeline):
    """As the pipeline's own loader renames what is spelled as by kohya or XLabs. Scales are folded
    into B first, because not all of its roads take them along."""
    if not hasattr(pipeline, 'lora_state_dict'):
        return adapter
    swapped = [k for k in adapter if re.search('final_layer.adaLN', k)]
    need(not swapped or not pipeline.__name__.startswith('Flux2'), 'adapters of FLUX.2 with a '
         f'delta of {some(swapped)} are not supported: diffusers exchanges its scale and shift')
    told = {}
    for name, (A, B, scale) in adapter.items():
        kohya = name if KOHYA.match(name) else 'lora_unet_' + name.replace('.', '_')
        down, up = (f'{name}.down', f'{name}.up') if '.processor.' in name else \
            (f'{kohya}.lora_down', f'{kohya}.lora_up')
        told |= {f'{down}.weight': A, f'{up}.weight': B * scale}
    # what kohya's names of UNets count: the layers of a block
    layers = len([k for k in shapes if re.fullmatch(r'down_blocks\.0\.resnets\.\d+\.conv1', k)])
    try:
        from diffusers.utils import convert_unet_state_dict_to_peft
        given = pipeline.lora_state_dict(told, unet_config=SimpleNamespace(layers_per_block=layers))
        given = convert_unet_state_dict_to_peft(given[0] if isinstance(given, tuple) else given)
    except Exception:  # whatever its tables do with names of another model
        return adapter
    if not given:                # it knew none of them
        return adapter
    return parse({k: x.clone() for k, x in given.items()}, 'the adapter as diffusers renames it')
