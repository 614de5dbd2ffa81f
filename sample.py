"""
Pictures from a run, a checkpoint, any adapter, or the bare base.

    python sample.py --ckpt out/shapes                     a few rows of the run's own evaluation data
    python sample.py --ckpt out/shapes --prompt='a red circle top left on white|a green square top right'
    python sample.py --ckpt out/shapes --prompt='make the circle green' --source=picture.png
    python sample.py --ckpt out/shapes --prompts=my_prompts.txt --num=4 --seed=1
    python sample.py --ckpt=owner/repo/folder --model=stabilityai/stable-diffusion-3.5-medium --prompt=...
    python sample.py --ckpt='' --model=data/shapes/base --prompt='a blue triangle bottom left on gray'
    python sample.py --ckpt out/shapes --prompts=data/shapes/t2i_val.csv --score=data/shapes/world.py:score

What a run knows (model, size, guidance, steps) is read from its checkpoint's meta.json, unless given here.
The noise of a picture follows from (seed, number of the prompt, number of the picture) alone, so that two
checkpoints, or student and base, can be compared picture by picture. Left out on purpose: stochastic
samplers, negative prompts.
"""
import itertools, json, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import configurator
import merge_lora
from configurator import BadInput, collect, configure, need
from support.checks import peek
from support.files import grid, load_function, load_image, read_data, score_mean, to_picture
from support.models import attach, check_size, last_weights
from support.processes import launch
from train_opd import FAMILIES, Models, Sample, denoise, first_states, micro_batches, open_field, torch_rng

# ----------------------------------------------------------------------------------------------------
# Settings. 0, None and '' take what the checkpoint's run had
ckpt = ''                           # run folder, checkpoint, adapter (folder, file or hub id); '' is the base
ema = True                          # the averaged weights, where the checkpoint has them
scale = 1.0                         # of the adapter; 0 is the base
model = ''                          # diffusers folder or hub id
family = ''                         # see train_opd.py
prompt = ''                         # several with | between
prompts = ''                        # or a .txt, .csv or .jsonl file of them, with source_image for edits
source = ''                         # picture to edit, for prompts that have none of their own
num = 2                             # pictures a prompt
seed = 0
steps = 0                           # Euler steps; without a run 28
guidance: float | None = None       # classifier-free, 1.0 is none; without a run 1.0
distilled_guidance: float | None = None  # FLUX's embedded one; without a run 3.5
max_sequence_length = 0             # text tokens; without a run 256
height = 0                          # pixels; without a run what the model's configs say, else 1024
width = 0
batch_size = 8                      # pictures a forward
score = ''                          # file.py:function(images, rows): its mean is printed for each bucket
out_dir = 'out/samples'
dtype = 'auto'                      # auto = bfloat16 on a GPU, float32 on a CPU
base_storage = ''                   # 'float8' keeps the base in 8 bits
device = ''                         # '' takes a GPU if there is one
SETTINGS = collect(sys.modules[__name__])
AHEAD = 128                         # prompts that are encoded in one visit of the text encoders
SHEET = 32                          # prompts that grid.png shows


def locate(c):
    """(path of the adapter or '', settings of the run that made it or {})."""
    if not c.ckpt:
        return '', {}
    folder = Path(c.ckpt).expanduser()
    folder = folder / 'latest' if (folder / 'latest').exists() else folder
    folder = folder / 'ema' if c.ema and (folder / 'ema').is_dir() else folder
    path = merge_lora.find(folder if folder.exists() else c.ckpt)
    run = path.parent.parent                                           # if it is that of a run's start
    for meta in (path.parent / 'meta.json', run / 'meta.json', run / 'latest' / 'meta.json'):
        if meta.is_file():
            try:
                return path, json.loads(meta.read_text())['settings']
            except (ValueError, KeyError, TypeError) as e:
                raise BadInput(f'{meta} is damaged ({e!r}); give another checkpoint of the run') from e
    return path, {}


def fill(c, run):
    """What was not given: from the run, else from the model's configs, which are returned with its name."""
    nameless = f'{c.ckpt} has no meta.json that would name its model: give --model'
    need(c.model or run.get('model'), nameless if c.ckpt else 'give --ckpt, or --model for a base')
    same = c.model in ('', run.get('model'))
    c.model, c.family = c.model or run['model'], c.family or (run.get('family', '') if same else '')
    found = peek(c.model, FAMILIES, c.family)
    configs = found[2]
    net, vae = configs.get('transformer') or configs.get('unet') or {}, configs.get('vae', {})
    latent = net.get('sample_size') or 0
    size = run.get('resolution') or latent * 2 ** (len(vae.get('block_out_channels', 'four')) - 1) or 1024
    h, w = (size, size) if isinstance(size, int) else size
    c.height, c.width = c.resolution = c.height or h, c.width or w
    c.steps = c.steps or run.get('sample_steps', 28)
    c.max_sequence_length = c.max_sequence_length or run.get('max_sequence_length', 256)
    if c.guidance is None:                                             # train_opd.py's, train_teacher.py's
        c.guidance = run.get('rollout_guidance', run.get('guidance', 1.0))
    if c.distilled_guidance is None:
        c.distilled_guidance = run.get('distilled_guidance', 3.5)
    return found


def read_rows(c, run):
    """The prompts as rows of data, each with its source picture if there is one."""
    need(not (c.prompt and c.prompts), 'give --prompt or --prompts, not both')
    if c.prompt:
        rows = [dict(prompt=p.strip()) for p in c.prompt.split('|') if p.strip()]
    else:
        files = [c.prompts] if c.prompts else run.get('eval_data') or run.get('data') or []
        buckets, errors = read_data(files)
        need(not errors, '; '.join(errors[:5]))
        most = None if c.prompts else 3                                # a few of each bucket that the run had
        rows = [r for b in buckets.values() for r in itertools.islice(b, most)]
    need(rows, 'no prompt: give --prompt="one|another", or --prompts=file.txt')
    return [{**r, 'source_image': r.get('source_image') or c.source} for r in rows]


def small(x, most=384):
    """For the sheet: at most so many pixels a side."""
    k = max(x.shape[-2:]) / most
    size = [round(n / k) for n in x.shape[-2:]]
    return x if k <= 1 else torch.nn.functional.interpolate(x[None], size=size, mode='area')[0]


def check(c):
    """Everything that can be known before weights are loaded."""
    for k in ('num', 'batch_size', 'steps', 'height', 'width', 'max_sequence_length'):
        least = int(k in ('num', 'batch_size'))
        need(getattr(c, k) >= least, f'{k} must be at least {least}, not {getattr(c, k)}')
    kinds = 'auto', 'float32', 'bfloat16', 'float16'
    need(c.dtype in kinds, f'dtype: {c.dtype!r} is not one of {", ".join(kinds)}')
    if c.score:
        load_function(c.score)
    path, run = locate(c)
    found = fill(c, run)
    rows = read_rows(c, run)
    paths = {r['source_image'] for r in rows} - {''}
    sources = {p: small(load_image(p, *c.resolution) / 2 + 0.5) for p in paths}
    check_size(*found, *c.resolution, bool(sources))
    if path and not c.ema and (path.parent / 'train_state.pt').is_file():
        return path, last_weights(path.parent), rows, sources
    return path, merge_lora.read_adapter(path) if path else {}, rows, sources


@torch.no_grad()
def main(argv):
    c = configure(SETTINGS, argv)
    path, adapter, rows, sources = check(c)
    device = launch(c.device).device
    field = open_field(c.model, c.dtype, device, c.family, c.max_sequence_length, c.distilled_guidance,
                       c.base_storage)
    models, who = Models(field), 'student' if adapter else 'base'
    if adapter:
        adapter = models.fit(adapter, c.ckpt)
        attach(field.net, who, {k: (A, B, s * c.scale) for k, (A, B, s) in adapter.items()})
        models.refresh()
    print(f'{path or "the base"} on {c.model}: {c.resolution[0]} x {c.resolution[1]} pixels, {c.steps} steps, '
          f'guidance {c.guidance}')

    out, sheet, scores, judge = Path(c.out_dir), {}, {}, load_function(c.score) if c.score else None
    out.mkdir(parents=True, exist_ok=True)
    models.prompts.expect(rows)
    for at in range(0, len(rows), AHEAD):
        todo = [Sample(r, c.resolution, torch_rng(c.seed, i, k), number=k, group=i)
                for i, r in list(enumerate(rows))[at:at + AHEAD] for k in range(c.num)]
        for batch in micro_batches(todo, models, SimpleNamespace(micro_batch=c.batch_size)):
            velocity = partial(models.velocity, who, w=c.guidance)
            z = denoise(velocity, batch, first_states(batch, models, c.steps), models.sigmas(batch, c.steps))
            pictures = field.decode(z).cpu()
            said = judge(pictures, [s.row for s in batch]) if judge else ()
            for s, one in zip(batch, said):
                scores.setdefault(s.row.get('task') or 'all', []).append(one)
            for s, x in zip(batch, pictures):
                file = out / f'{s.group:04d}_{s.number}.png'
                to_picture(x).save(file)
                print(file)
                if s.group < SHEET:
                    sheet.setdefault(s.group, []).append(small(x))
    lines = [[sources.get(r['source_image']), *sheet[i]] for i, r in enumerate(rows[:SHEET])]
    grid(lines, out / 'grid.png', [r['prompt'] for r in rows[:SHEET]], ['source', *map(str, range(c.num))])
    print(out / 'grid.png')
    for bucket, found in scores.items():
        print(f'score of {bucket}: {score_mean(found):.4f}, the mean of {len(found)} pictures')


if __name__ == '__main__':
    configurator.run(main)
