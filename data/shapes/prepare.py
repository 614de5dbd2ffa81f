"""
Makes the shapes world: prompts, edit pairs, a tiny SD3.5 trained from nothing, and three LoRA
teachers on it.

    python data/shapes/prepare.py                   everything; under two hours on one core,
                                                    resumable
    python data/shapes/prepare.py --evaluate=True   only measures what is there, and draws the
                                                    contact sheet
    python data/shapes/prepare.py --quick=True --out=out/quick
                                                    two minutes: the pipeline, not the quality
    python data/shapes/prepare.py --out=out/half --base_steps=7500 --base_stop=300 --teachers=[]
                                                    half a base

The base is a complete StableDiffusion3Pipeline: hand-set identity VAE (pixels are latents), real
tokenizers over the world's few words, frozen text encoders of random words, and a trained
transformer of 2.3 million parameters. The teachers are made by train_teacher.py, as anybody's
would be.
"""
import csv, json, math, shutil, sys
from collections import Counter
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from tqdm import tqdm
from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config,
                          T5Tokenizer, T5EncoderModel)

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
import configurator
import merge_lora
import train_opd
import train_teacher
import world
from support.files import grid, read_data
from train_opd import Models, Sample, rng, torch_rng

out = 'data/shapes'                 # where everything is written
work = 'out/prepare'                # the teachers' training pairs and unfinished runs
seed = 0
base_steps = 9000
base_stop = 0                       # stop the base early, after so many steps (0: at the end)
base_dropout = 0.0                  # share of its pictures without their words: guidance needs some
teachers: list = ['count', 'global_edit', 'local_edit']
teacher_steps: dict = dict(count=400, global_edit=1100, local_edit=2700)
pairs = 8000                        # rows a teacher is made from (drawn into `work`, not kept)
train_rows = 600                    # rows a bucket of the files that are kept
val_rows = 256
seeds = 3                           # sampling seeds of a measurement
evaluate = False
quick = False
threads = 2
SETTINGS = configurator.collect(sys.modules[__name__])
# what a teacher's LoRA is put on: attention, feed-forward and modulation of both streams
LAYERS = [*train_opd.SD3.targets, 'norm1.linear', 'norm1_context.linear',
          *(f'{k}.net.{i}' for k in ('ff', 'ff_context') for i in ('0.proj', '2'))]


# ------------------------------------------------------------------------------ the base, untrained

def byte_pairs(words):
    """Byte-pair merges that make every word one token: the training procedure itself on the
    world's words."""
    parts, merges = [list(w[:-1]) + [w[-1] + '</w>'] for w in words], []
    while counts := Counter(pair for p in parts for pair in zip(p, p[1:])):
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for p in parts:
            for j in range(len(p) - 2, -1, -1):
                if tuple(p[j:j + 2]) == best:
                    p[j:j + 2] = [''.join(best)]
    return merges


def tokenizers():
    merges = byte_pairs(world.WORDS)
    letters = {x for w in world.WORDS for x in (*w, w[-1] + '</w>')}
    pieces = sorted(letters | {a + b for a, b in merges})
    vocab = {p: i for i, p in enumerate(['<|startoftext|>', '<|endoftext|>'] + pieces)}
    clip = [CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16) for _ in range(2)]
    words = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', -9.0)]
    words += [('▁' + w, -1.0) for w in world.WORDS]
    return *clip, T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)


def text_encoder(tokenizer):
    """Frozen, random words, but its first layer is set by hand so that each word also tells the
    four before it: real encoders know what belongs together, and "left" in "a red circle top left"
    has to."""
    m = CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_hidden_layers=2, projection_dim=64, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=1, pad_token_id=1))
    words, first = m.text_model.embeddings, m.text_model.encoder.layers[0]
    word, place = words.token_embedding.weight, words.position_embedding.weight
    look = first.self_attn
    with torch.no_grad():
        word.normal_()[:, :16] = 0                             # 16 numbers for the place, 48 words
        place.zero_()[:, :16] = 8 * torch.eye(16)
        for p in (look.q_proj.weight, look.k_proj.weight):
            p.zero_()
        for head in range(4):                                          # looks head + 1 words back
            rows = slice(16 * head, 16 * head + 16)
            look.q_proj.weight[rows, :16] = 2 * torch.diag(torch.ones(15 - head), head + 1)
            look.k_proj.weight[rows, :16] = 2 * torch.eye(16)
        look.v_proj.weight.normal_(0, 48 ** -0.5)[:, :16] = 0
        look.out_proj.weight.normal_(0, 0.25)
        first.mlp.fc2.weight.zero_()
    return m


def identity_vae():
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=3, block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=1, down_block_types=('DownEncoderBlock2D',),
        up_block_types=('UpDecoderBlock2D',), sample_size=world.SIZE, scaling_factor=1.0,
        shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False)
    big, bias = 1000.0, 24.0
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()
        for half in (vae.encoder, vae.decoder):
            # channels: x, -x, big, -big. Their mean is 0 and their deviation big / 2 whatever x is,
            # so that the group norm only rescales; SiLU is the identity far to the right of zero.
            for c in range(3):
                half.conv_in.weight[c, c, 1, 1] = 1
                half.conv_in.weight[c + 3, c, 1, 1] = -1
                half.conv_out.weight[c, c, 1, 1] = 1
            half.conv_in.bias[6], half.conv_in.bias[7] = big, -big
            half.conv_norm_out.weight.fill_(big / 2)
            half.conv_norm_out.bias.fill_(bias)
            half.conv_out.bias[:3] = -bias
        vae.encoder.conv_out.bias[3:] = -30                    # log-variance: none to speak of
    return vae


def contrasting_positions(n, dim):
    """A table like the stock one, (n * n, dim), but its wavelengths fit a grid of n: neighbours
    differ."""
    t = torch.arange(n)[:, None] * math.pi * torch.arange(1, dim // 4 + 1)[None] / (dim // 4)
    line = torch.cat([t.sin(), t.cos()], 1)                            # (n, dim / 2)
    both = torch.cat([line[:, None].expand(n, n, -1), line[None].expand(n, n, -1)], 2)
    return both.reshape(1, n * n, dim)


def build_base(seed=0):
    torch.manual_seed(seed)
    clip1, clip2, t5 = tokenizers()
    t5_model = T5EncoderModel(T5Config(
        vocab_size=len(t5), d_model=128, d_kv=32, d_ff=128, num_layers=1, num_heads=4,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False))
    with torch.no_grad():
        t5_model.encoder.block[0].layer[0].SelfAttention.o.weight.mul_(0.1)
    patch, side = 4, 2 * world.SIZE // 4                       # twice the picture: for a diptych
    net = SD3Transformer2DModel(
        sample_size=world.SIZE, patch_size=patch, in_channels=3, out_channels=3, num_layers=4,
        attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128,
        joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=side,
        qk_norm='rms_norm')
    net.pos_embed.pos_embed.copy_(contrasting_positions(side, 128))
    return StableDiffusion3Pipeline(
        transformer=net, vae=identity_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=clip1, tokenizer_2=clip2, tokenizer_3=t5, text_encoder=text_encoder(clip1),
        text_encoder_2=text_encoder(clip2), text_encoder_3=t5_model)


# -------------------------------------------------------------------------------- rows and pictures

def write_bucket(folder, name, bucket, n, hold, seed, pictures=False, only=None, pairs=world.SEEN):
    """A CSV of n rows; edits have their pictures, words alone only if asked. `only` picks
    (prompt, scene)."""
    folder, r, rows, before = Path(folder), rng(seed, name), [], {}
    (folder / 'pictures').mkdir(parents=True, exist_ok=True)
    while len(rows) < n:
        prompt, scene, picture = world.make_row(bucket, r, hold, pairs)
        if only and not only(prompt, scene or world.read(picture[None])[0]):
            continue
        row = dict(prompt=prompt, task=bucket, source_image='', target_image='')
        if scene:
            if scene not in before:                            # rows that begin alike share one
                before[scene] = f'pictures/{name}_{len(before):04d}.png'
                world.to_pil(world.draw(scene)).save(folder / before[scene])
            row['source_image'] = before[scene]
        if scene or pictures:
            row['target_image'] = f'pictures/{name}_{len(rows):04d}_right.png'
            world.to_pil(picture).save(folder / row['target_image'])
        rows.append(row)
    with open(folder / f'{name}.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, ['prompt', 'task', 'source_image', 'target_image'])
        w.writeheader()
        w.writerows(rows)


def has_held_pair(prompt, scene):
    return any(cell in world.HELD_OUT for cell in scene[1])


def names_no_colour(prompt, scene):
    return not any(c in prompt.split() for c in world.COLOURS)


def write_data(c):
    """The files to keep, for distillation and tests, and in c.work the pairs that teachers learn
    from."""
    for bucket in world.BUCKETS:
        write_bucket(c.out, bucket, bucket, c.train_rows, False, c.seed, pictures=bucket == 'count')
        write_bucket(c.out, f'{bucket}_val', bucket, c.val_rows, True, c.seed)
    write_bucket(c.out, 't2i_pairs', 't2i', c.val_rows, True, c.seed, only=has_held_pair,
                 pairs=world.PAIRS)
    write_bucket(c.out, 'taste_val', 'open', c.val_rows, True, c.seed, only=names_no_colour)
    for bucket in ('local_edit', 'global_edit'):       # never seen: edits of the held-out pairs
        write_bucket(c.work, f'{bucket}_pairs', bucket, c.val_rows, True, c.seed,
                     only=has_held_pair, pairs=world.PAIRS)
    for name in c.teachers:
        n = c.pairs if 'edit' in name else c.pairs // 20
        write_bucket(c.work, f'{name}_teacher', name, n, False, c.seed, True)


# -------------------------------------------------------------------------------- the base, trained

def near_row(r):
    """(prompt, source picture, picture): the source differs from the captioned picture in one
    attribute."""
    while world.is_held(scene := world.random_scene(r)):
        pass
    background, cells = scene[0], list(scene[1])
    i, j = r.choice([k for k, c in enumerate(cells) if c]), r.randrange(4)
    what, (shape, colour) = r.randrange(4), cells[i]
    if what == 0:
        cells[i] = shape, r.choice([k for k in world.COLOURS if k != colour])
    elif what == 1:
        cells[i] = r.choice([k for k in world.SHAPES if k != shape]), colour
    elif what == 2:
        background = r.choice([b for b in world.BACKGROUNDS if b != background])
    else:
        cells[i], cells[j] = cells[j], cells[i]
    return world.caption(scene, r), world.draw((background, tuple(cells))), world.draw(scene)


def base_rate(step, c):
    """Two cosines: words are bound to things in the first, what is left open is learned in the
    second."""
    first = 2 * c.base_steps // 3
    at, length, lr = step, first, 2e-3
    if step >= first:
        at, length, lr = step - first, c.base_steps - first, 6e-4
    return lr * min(1, (at + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * at / length)))


def base_batch(step, c):
    """Pictures with words alone, then diptychs, of which some copy their source: rows of (prompt,
    source or None, picture). First all is named, then much is left open, at last the place of
    single things."""
    r, stage = rng(c.seed, 'base', step), sum(step >= c.base_steps * k // 9 for k in (2, 6))
    mixes = (18, 2, 0, 12, 5), (8, 8, 4, 12, 5), (8, 4, 12, 10, 4)
    named, open_, anywhere, near, copies = mixes[stage]
    words = [world.make_row(b, r) for b, n in (('t2i', named), ('open', open_)) for _ in range(n)]
    while len(words) < named + open_ + anywhere:
        row = world.make_row('open', r)
        if ' and ' not in row[0] and not any(p in row[0] for p in world.PLACES):
            words.append(row)
    pairs = [near_row(r) for _ in range(near)]
    pairs = [(p, x if i < copies else source, x) for i, (p, source, x) in enumerate(pairs)]
    drop = rng(c.seed, 'base dropout', step)
    return [[('' if drop.random() < c.base_dropout else p, *rest) for p, *rest in rows]
            for rows in (words, pairs)]


def train_base(c, folder):
    """Flow matching from nothing, with an average of the weights; unfinished work is kept in
    c.work."""
    state, last = Path(c.work) / 'base.pt', c.base_stop or c.base_steps
    Path(c.work).mkdir(parents=True, exist_ok=True)
    field = train_opd.SD3(build_base(c.seed))
    net = field.net.requires_grad_(True)
    params = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    ema, first, words = {k: p.detach().clone() for k, p in params.items()}, 0, {}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved['of'] == (c.seed, c.base_steps, c.base_dropout) and saved['step'] <= last:
            net.load_state_dict(saved['net'])
            optimizer.load_state_dict(saved['optimizer'])
            ema, first = saved['ema'], saved['step']
            print(f'base: continues at step {first}')
    bar, running = tqdm(range(first, last), initial=first, total=last, desc='base'), None
    for step in bar:
        for group in optimizer.param_groups:
            group['lr'] = base_rate(step, c)
        g, total = torch_rng(c.seed, 'base noise', step), 0.0
        for rows in base_batch(step, c):
            new = [p for p in dict.fromkeys(r[0] for r in rows) if p not in words]
            with torch.no_grad():
                words.update((p, field.encode(p)) for p in new)
            # pixels are latents here, so that the VAE need not be asked
            cond = [{**words[p], **({} if s is None else {'source': s * 2 - 1})}
                    for p, s, _ in rows]
            x0 = torch.stack([x for _, _, x in rows]) * 2 - 1
            eps = torch.randn(x0.shape, generator=g)
            sigma = torch.sigmoid(torch.randn(len(x0), generator=g) + math.log(3))
            s = train_opd.col(sigma, x0)
            v = field.velocity((1 - s) * x0 + s * eps, sigma, cond)
            loss = train_opd.velocity_error(v, eps - x0).sum() / 32
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(params.values()),
                                 1 - min(0.998, (step + 1) / (step + 10)))
        if len(words) > 20000:
            words.clear()
        running = total if running is None else 0.98 * running + 0.02 * total
        bar.set_postfix(loss=f'{running:.4f}', refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == last:
            torch.save(dict(of=(c.seed, c.base_steps, c.base_dropout), step=step + 1, ema=ema,
                            net=net.state_dict(), optimizer=optimizer.state_dict()),
                       f'{state}.new')
            Path(f'{state}.new').replace(state)
    net.load_state_dict(ema, strict=False)
    field.pipe.save_pretrained(folder)


# ------------------------------------------------------------------------------------- the teachers

def make_teachers(c):
    """By train_teacher.py itself; a run that was interrupted is resumed."""
    for name in c.teachers:
        folder, run = Path(c.out) / 'teachers' / name, Path(c.work) / f'run_{name}'
        if (folder / 'adapter_config.json').exists():
            print(f'{folder} is there already')
            continue
        about = run / 'latest' / 'meta.json'
        settings = dict(
            method='sft', model=f'{c.out}/base', out_dir=str(run),
            data=[f'{c.work}/{name}_teacher.csv'], eval_data=[f'{c.out}/{name}_val.csv'],
            score=f'{Path(__file__).parent}/world.py:score',
            init_from='resume' if (run / 'latest').exists() else 'base',
            max_steps=c.teacher_steps[name], lora_targets=LAYERS, rank=16, alpha=32.0, lr=2e-3,
            batch_size=32, micro_batch=32, ema_decay=0.99, seed=c.seed, warmup=50,
            eval_every=500, save_every=500, log_every=100)
        then = json.loads(about.read_text())['settings'] if about.exists() else settings
        configurator.need(all(then[k] == settings[k] for k in ('model', 'seed', 'data')),
                          f'{run} is of another base or seed: remove it, or give another --work')
        train_teacher.main([f'--{k}={v!r}' for k, v in settings.items()])
        step = json.loads(about.read_text())['step']
        configurator.need(step == settings['max_steps'], f'{run} was stopped at step {step}: the '
                          'same command goes on from there')
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for f in merge_lora.find(run).parent.iterdir():
            if f.is_file():
                shutil.copy(f, folder)


# ---------------------------------------------------------------------------------------- measuring

def pictures(models, who, rows, seed, steps=16):
    """Pictures of rows by the base or a teacher: Euler steps, no guidance."""
    out, size = [], (world.SIZE, world.SIZE)
    for at in range(0, len(rows), 128):
        batch = [Sample(r, size, torch_rng('measure', seed, at + i))
                 for i, r in enumerate(rows[at:at + 128])]
        models.prompts.condition(batch)
        out.append(train_opd.pictures(who, batch, models, steps))
    return torch.cat(out)


def variety(models, n=96):
    """Entropy of what a prompt leaves open, over a uniform choice's: mean over prompts and open
    things."""
    def ratio(values, of):
        p = [k / len(values) for k in Counter(values).values()]
        return -sum(x * math.log(x) for x in p) / math.log(of)
    found = []
    for prompt in ('a circle on white', 'a red shape on gray', 'a square on black', 'a triangle',
                   'a shape top left on white', 'two shapes on gray'):
        rows = [dict(prompt=prompt, source_image='')] * n
        scenes = [s for s in world.read(pictures(models, 'base', rows, 'variety')) if s]
        things = [(i, *cell) for s in scenes for i, cell in enumerate(s[1]) if cell]
        _, background, (wanted, *_) = world.understand(prompt)
        found += [ratio([t[1 + k] for t in things], of)
                  for k, of in ((0, 3), (1, 6)) if wanted[k] is None]
        found += [ratio([t[0] for t in things], 4)] if wanted[2] is None else []
        found += [] if background else [ratio([s[0] for s in scenes], 3)]
    return sum(found) / len(found), min(found)


def measure(c):
    """The tables, and the contact sheet: what base and teachers can do, on scenes nobody trained
    on."""
    field = train_opd.open_field(f'{c.out}/base')
    names = [n for n in c.teachers if (Path(c.out) / 'teachers' / n).exists()]
    models = Models(field, [dict(name=n, lora=f'{c.out}/teachers/{n}') for n in names])
    buckets = {b: f'{c.out}/{b}_val.csv' for b in world.BUCKETS}
    buckets['t2i_pairs'] = f'{c.out}/t2i_pairs.csv'
    buckets |= {f'{b}_pairs': f'{c.work}/{b}_pairs.csv'
                for b in ('local_edit', 'global_edit') if b in names}
    rows, table = {}, {}
    for name, path in buckets.items():
        found, errors = read_data([path])
        configurator.need(not errors, '; '.join(errors))
        rows[name] = [r for b in found.values() for r in (b[i] for i in range(len(b)))]
    print(f'\nright, in % of {c.val_rows} held-out rows, 16 Euler steps, no guidance; own skills: '
          f'mean (spread) of {c.seeds} sampling seeds, the others: one')
    print(f'{"":12s}' + ''.join(f'{b:>17s}' for b in rows))
    for who in ['base', *names]:
        line = {}
        for b, some in rows.items():
            skill = b.removesuffix('_pairs') in (('t2i', 'open') if who == 'base' else (who,))
            seeds = range(c.seeds if skill else 1)     # what it should fail at needs no average
            got = [world.score(pictures(models, who, some, seed), some) for seed in seeds]
            right = [100 * sum(g['right'] for g in one) / len(one) for one in got]
            kept = [g['kept'] for one in got for g in one if 'kept' in g]
            line[b] = dict(right=sum(right) / len(right), spread=max(right) - min(right),
                           kept=sum(kept) / len(kept) if kept else None)
        table[who] = line
        shown = ''.join(f'{v["right"]:10.1f} ({v["spread"]:4.1f})' for v in line.values())
        print(f'{who:12s}{shown}', flush=True)
    for who in names:
        if 'edit' in who:
            print(f'{who}: mean error of what had to stay {table[who][who]["kept"]:.4f}')
    mean, least = variety(models, min(96, c.val_rows))
    table['variety'] = dict(mean=mean, least=least)
    print(f'open: entropy of what is left open, over that of a uniform choice: {mean:.2f}, the '
          f'least varied {least:.2f}')
    (Path(c.out) / 'quality.json').write_text(json.dumps(table, indent=1))
    contact_sheet(c, models, names, rows)


def contact_sheet(c, models, names, rows):
    lines, captions = [], []
    for b in world.BUCKETS:
        who = b if b in names else 'base'
        some = rows[b][:4]
        base, best = (pictures(models, w, some, 'sheet') for w in ('base', who))
        for i, r in enumerate(some):
            source, right = (world.load(r[k]) if r[k] else None
                             for k in ('source_image', 'target_image'))
            lines.append([source, base[i], best[i], right])
            captions.append(f'{b}: {r["prompt"]}')
    half = (len(lines) + 1) // 2                                       # two columns of rows
    lines = [a + [None] + b for a, b in zip(lines[:half], lines[half:])]
    captions = [f'{a}   |   {b}' for a, b in zip(captions[:half], captions[half:])]
    heads = ['source', 'base', 'teacher', 'right']
    grid(lines, Path(c.out) / 'contact_sheet.png', captions, [*heads, '', *heads], scale=4)


def main(argv):
    c = configurator.configure(SETTINGS, argv)
    if c.quick:
        c.base_steps, c.pairs, c.train_rows, c.val_rows, c.seeds = 60, 80, 24, 8, 1
        c.teacher_steps, c.work = dict.fromkeys(c.teacher_steps, 10), f'{c.out}/work'
    torch.set_num_threads(c.threads)
    if not c.evaluate:
        write_data(c)
        if not (Path(c.out) / 'base' / 'model_index.json').exists():
            train_base(c, f'{c.out}/base')
        make_teachers(c)
    measure(c)


if __name__ == '__main__':
    configurator.run(main)
