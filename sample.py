"""
Pictures from a run, a checkpoint, any adapter, or the bare base.

    python sample.py --ckpt out/shapes                  a few rows of the run's own evaluation data
    python sample.py --ckpt out/shapes --prompt='a red circle top left on white|a green square'
    python sample.py --ckpt out/shapes --prompt='make the circle green' --source=picture.png
    python sample.py --ckpt out/shapes --prompts=my_prompts.txt --num=4 --seed=1
    python sample.py --ckpt=owner/repo/folder --model=owner/base --prompt=...
    python sample.py --ckpt out/shapes --score=data/shapes/world.py:score     the rows a run scores
    python sample.py --model=owner/base --verify        is our loop the same as diffusers' pipeline?

What a run knows (model, sizes, guidance, steps) is read from its checkpoint's meta.json, unless
given here. The noise of a picture follows from (seed, number of the prompt, number of the picture)
alone: two checkpoints, or student and base, can be compared picture by picture. Files never take
the place of earlier ones. Left out on purpose: stochastic samplers, negative prompts.
"""
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import configurator
from configurator import collect, configure, need
from support import files, rewards
from support.checks import CHOICES, UNGUIDED, check_choices, peek, pixels
from support.known import first_free, locate, read_buckets, read_weights
from support.models import attach, check_samples
from support.processes import launch, torch_rng
from support.run import locked
from support.verify import verify as verified
from train_opd import FAMILIES, Models, Sample, micro_batches, open_field, pictures

# --------------------------------------------------------------------------------------------------
# Settings. 0, None and '' take what the checkpoint's run had
ckpt = ''                           # run folder, checkpoint, adapter (or hub id); '' is the base
ema = True                          # the averaged weights, where the checkpoint has them
scale = 1.0                         # of the adapter; 0 is the base
model = ''                          # diffusers folder or hub id
family = ''                         # see train_opd.py
prompt = ''                         # several with | between
prompts = ''                        # or a .txt, .csv or .jsonl file, with source_image for edits
source = ''                         # picture to edit, for prompts that have none of their own
num = 2                             # pictures a prompt
seed = 0
steps = 0                           # Euler steps; without a run 28, with --verify 4
guidance: float | None = None       # classifier-free, 1.0 is none; without a run 1.0
distilled_guidance: float | None = None  # FLUX's embedded one; without a run 3.5
max_sequence_length = 0             # text tokens; without a run as many as its pipeline takes
height = 0                          # pixels; without a run what the model's configs say, else 1024
width = 0
batch_size = 8                      # pictures a forward
score = ''                          # a reward's name or file.py:function: its mean by bucket
verify = False                      # draw nothing, but compare with diffusers' own pipeline
out_dir = 'out/samples'
dtype = 'auto'                      # auto = bfloat16 on a GPU, float32 on a CPU
base_storage: str | None = None     # 'float8' keeps the base in 8 bits, '' does not
device = ''                         # '' takes a GPU if there is one
SETTINGS = collect(sys.modules[__name__])
SHEET = 32                          # prompts that grid.png shows


def native(family, configs):
    """The size in pixels for which a model was made."""
    net, vae = configs.get(family.prefix if family else '', {}), configs.get('vae', {})
    known = (net.get('sample_size') or 0) * 2 ** (len(vae.get('block_out_channels', [0] * 4)) - 1)
    return known or 1024


def fill(c, run):
    """What was not given: from the run, else from the model's configs, which are returned with
    the family and its pipeline's name."""
    nameless = f'{c.ckpt} has no meta.json that would name its model: give --model'
    need(c.model or run.get('model'), nameless if c.ckpt else 'give --ckpt, or --model for a base')
    same = c.model in ('', run.get('model'))
    c.model, c.family = c.model or run['model'], c.family or run.get('family', '') * same
    family, _, configs = found = peek(c.model, FAMILIES, c.family)
    c.resolution = pixels(run.get('resolution') or native(family, configs))
    c.guessed = not (run.get('resolution') or configs)         # a hub id's configs come with it
    c.steps = c.steps or (4 if c.verify else run.get('sample_steps', 28))
    c.max_sequence_length = c.max_sequence_length or run.get('max_sequence_length', 0)
    told = dict(guidance=run.get('rollout_guidance', 1.0),
                distilled_guidance=run.get('distilled_guidance', 3.5),
                base_storage=run.get('base_storage', '') * same)
    vars(c).update((k, x) for k, x in told.items() if getattr(c, k) is None)
    return found


def check(c):
    """All that can be known before weights are loaded: path, adapter, a Sample of each prompt."""
    for k in ('num', 'batch_size', 'steps', 'height', 'width', 'max_sequence_length'):
        least = int(k in ('num', 'batch_size'))
        need(getattr(c, k) >= least, f'{k} must be at least {least}, not {getattr(c, k)}')
    check_choices(c, dict(base_storage=(None, '', 'float8'), dtype=(*CHOICES['dtype'], 'float16')))
    if c.score:
        rewards.check(c.score)
    path, run = locate(c)
    found, rows = fill(c, run), []
    need(c.guidance > 0, f'guidance must be more than 0, not {c.guidance}{UNGUIDED}')
    sizes = {r['data']: pixels(r['size']) for r in run.get('routes', ()) if 'size' in r}
    for bucket, some in read_buckets(c, run).items():
        h, w = sizes.get(bucket, c.resolution)
        for row in some:
            row = {**row, 'source_image': row.get('source_image') or c.source}
            rows.append(Sample(row, (c.height or h, c.width or w), None, label=bucket))
    need(rows, 'no prompt: give --prompt="one|another", or --prompts=file.txt')
    check_samples(*found, rows)
    for size, path_of in {(s.size, s.row['source_image']) for s in rows}:
        files.shown([dict(source_image=path_of)], 'source_image', size)        # does it open?
    return path, read_weights(c, path) if path else {}, rows


def small(x, most=384):
    """For the sheet: at most so many pixels a side."""
    size = [max(1, round(n * min(1, most / max(x.shape)))) for n in x.shape[1:]]
    return torch.nn.functional.interpolate(x[None], size=size, mode='area')[0]


def open_models(c, adapter, rows):
    """(models, the name by which the adapter, or the bare base, is asked)."""
    field = open_field(c.model, c.dtype, launch(c.device, not c.verify).device, c.family,
                       c.max_sequence_length, c.distilled_guidance, c.base_storage)
    if c.guessed:
        h, w = pixels(native(type(field), field.configs))
        for s in rows:
            s.size = c.height or h, c.width or w
    check_samples(type(field), type(field.pipe).__name__, field.configs, rows)
    models = Models(field)
    if not adapter:
        return models, 'base'
    adapter = {k: (A, B, s * c.scale) for k, (A, B, s) in models.fit(adapter, c.ckpt).items()}
    attach(models.field.net, 'student', adapter)
    models.refresh()
    return models, 'student'


def draw(c, models, who, rows):
    """(sample, picture, what the score says of it or None) of all. A score that fails is not asked
    again, and ends the run when all is drawn."""
    judge, failed = rewards.load(c.score, models.field.device) if c.score else None, None
    models.prompts.expect(s.row for s in rows)
    samples = [replace(s, noise=torch_rng(c.seed, i, k), number=k, group=i)
               for i, s in enumerate(rows) for k in range(c.num)]
    for batch in micro_batches(samples, models, SimpleNamespace(micro_batch=c.batch_size)):
        drawn = pictures(who, batch, models, c.steps, c.guidance).cpu()
        said = [None] * len(batch)
        try:
            if judge and not failed:
                said = files.ask(f'score {c.score}', judge, drawn, [s.row for s in batch])
        except files.RewardError as e:
            failed = e
        models.prompts.release(batch)
        yield from zip(batch, drawn, said)
    if failed:
        raise files.RewardError(f'{failed}. All pictures are in {c.out_dir}') from failed


def write_sheet(c, path, rows, sheet):
    """The first prompts' pictures in one, with what they edit."""
    lines = []
    for s, drawn in zip(rows, sheet):
        before, = files.shown([s.row], 'source_image', s.size)
        lines.append([before if before is None else small(before), *map(drawn.get, range(c.num))])
    files.grid(lines, path, [s.row['prompt'] for s in rows], ['source', *map(str, range(c.num))])
    print(path)


@torch.no_grad()
def main(argv):
    c = configure(SETTINGS, argv)
    path, adapter, rows = check(c)
    if c.verify:
        sys.exit(not verified(pictures, *open_models(c, adapter, rows), rows[0], c.steps))
    out, sheet, scores = Path(c.out_dir), [{} for _ in rows[:SHEET]], {}
    lock, first = locked(out), first_free(out)                 # locked until the process ends
    models, who = open_models(c, adapter, rows)
    sizes = ', '.join(dict.fromkeys('%d x %d' % s.size for s in rows))
    print(f'{path or "base"} on {c.model}: {sizes} pixels, {c.steps} steps, guidance {c.guidance}')
    try:
        for s, x, said in draw(c, models, who, rows):
            file = out / f'{first + s.group:04d}_{s.number}.png'
            files.save_png(files.to_picture(x), file)
            print(file)
            scores.setdefault(s.label, []).append(said)
            if s.group < SHEET:
                sheet[s.group][s.number] = small(x)
    finally:
        if any(sheet):
            name = f'grid_{first:04d}.png' if (out / 'grid.png').exists() else 'grid.png'
            write_sheet(c, out / name, rows[:SHEET], sheet)
    for bucket, found in scores.items() if c.score else ():
        print(f'score of {bucket}: {files.score_mean(found):.4f}, of {len(found)} pictures')


if __name__ == '__main__':
    configurator.run(main)
