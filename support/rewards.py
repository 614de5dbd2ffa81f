"""
What a picture is worth. A reward is a function (images, rows) -> one number an image, more is better.
`images` is (n, 3, h, w) in [0, 1]; a row is a dict with `prompt` and, for edits, `source_image`. By name:

    shapes, shapes_smooth    is it what the row asks for: 0 or 1, or between the two (data/shapes/world.py)
    jpeg, incompressible     minus, or plus, the kilobytes of a JPEG of quality 95; no weights needed
    clip                     cosine of prompt and picture, from -1 to 1, not times 100
    pickscore                PickScore divided by 26, as Flow-GRPO scales it: mostly 0.7 to 0.9
    aesthetic@weights        LAION's improved aesthetic predictor, about 1 to 10, from a safetensors file
    http://..., https://...  a server of your own: see `remote`, and the example in the README
    path/file.py:function    a function of your own

A model may go on with @ and a local folder or hub id in place of the usual one, then @ and its processor (for
aesthetic: CLIP), as in clip@/disk/clip or pickscore@/disk/pickscore@/disk/clip-h. CLIP reads 77 tokens.
Left out: rewards that need an environment of their own (OCR, GenEval, vision-language judges): serve them.

python -c "from support import rewards; import torch; print(rewards.load('jpeg')(torch.rand(2, 3, 64, 64), [{}, {}]))"
"""
import base64, difflib, functools, http.client, io, json, math, time, urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from configurator import BadInput, need
from support.files import load_function as from_file

BATCH = 16
WORLD = Path(__file__).parent.parent / 'data' / 'shapes' / 'world.py'
CLIP_L = 'openai/clip-vit-large-patch14'
PICKSCORE, CLIP_H = 'yuvalkirstain/PickScore_v1', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
CONVERT = """The aesthetic reward needs safetensors: aesthetic@/disk/aesthetic.safetensors, or a file
on the hub, aesthetic@owner/repo/file.safetensors. To convert the published .pth, running no code inside it:
python -c "import torch as t, safetensors.torch as s; s.save_file(t.load('sac+logos+ava1-l14-linearMSE.pth',
'cpu', weights_only=True), 'aesthetic.safetensors')\""""


class RewardError(Exception):
    """A reward failed on a sample: training stops rather than make a number up."""


def pictures(images):
    """(n, 3, h, w) in [0, 1] -> n PIL images."""
    x = (images.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(p) for p in x.permute(0, 2, 3, 1).cpu().numpy()]


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def incompressible(images, rows):
    return [len(encoded(p, 'JPEG', quality=95)) / 1000 for p in pictures(images)]


def jpeg(images, rows):
    return [-kilobytes for kilobytes in incompressible(images, rows)]


# ---------------------------------------------------------------------------------------------- models

@functools.cache  # rewards with the same CLIP share it
def clip_model(name, processor, device):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    try:  # safetensors only: a pickle may run code
        model, info = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        text, pixels = AutoTokenizer.from_pretrained(processor), CLIPImageProcessor.from_pretrained(processor)
    except (OSError, ValueError) as e:
        raise BadInput(f'the CLIP model {name}, or its processor {processor}, does not load. Fetch both with '
                       f'`hf download`, or name local folders: clip@/disk/model@/disk/processor. {e}') from e
    need(not info['missing_keys'],  # transformers would fill these with random numbers
         f'{name} is not a whole CLIP model; it lacks {sorted(info["missing_keys"])[:3]}')
    return model.float().to(device).eval().requires_grad_(False), text, pixels


def see(clip, images):
    model, _, pixels = clip
    x = pixels(images=pictures(images), return_tensors='pt')['pixel_values'].to(model.device)
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)


def read(clip, prompts):
    model, text, _ = clip
    most = model.config.text_config.max_position_embeddings
    t = text(prompts, padding=True, truncation=True, max_length=most, return_tensors='pt').to(model.device)
    t = model.text_model(input_ids=t['input_ids'], attention_mask=t['attention_mask']).pooler_output
    return F.normalize(model.text_projection(t), dim=-1)


def batched(score):
    @torch.no_grad()
    def reward(images, rows):
        starts, prompts = range(0, len(rows), BATCH), [row['prompt'] for row in rows]
        return [v for i in starts for v in score(images[i:i + BATCH], prompts[i:i + BATCH]).tolist()]
    return reward


def clip(device, name=CLIP_L, processor=None):
    c = clip_model(name, processor or name, device)
    return batched(lambda images, prompts: (see(c, images) * read(c, prompts)).sum(-1))


def pickscore(device, name=PICKSCORE, processor=CLIP_H):
    c = clip_model(name, processor, device)
    scale = c[0].logit_scale.exp() / 26
    return batched(lambda images, prompts: scale * (see(c, images) * read(c, prompts)).sum(-1))


def aesthetic(device, weights, name=CLIP_L):
    from safetensors.torch import load_file
    n, gap = [768, 1024, 128, 64, 16, 1], torch.nn.Identity()  # where the published model has a dropout
    a, b, c, d, e = [torch.nn.Linear(*ends) for ends in zip(n, n[1:])]
    head = torch.nn.Sequential(a, gap, b, gap, c, gap, d, e)   # and linear all through, as published
    try:
        if not Path(weights).exists() and weights.count('/') > 1 and weights[0] not in './':
            from huggingface_hub import hf_hub_download
            owner, repo, file = weights.split('/', 2)
            weights = hf_hub_download(f'{owner}/{repo}', file)
        head.load_state_dict({k.removeprefix('layers.'): v for k, v in load_file(weights).items()})
    except Exception as error:  # safetensors, the hub and torch each have their own
        raise BadInput(f'{weights} does not load as an aesthetic predictor: {error}\n{CONVERT}') from error
    head, model = head.to(device).requires_grad_(False), clip_model(name, name, device)
    if model[0].config.projection_dim != n[0]:
        raise BadInput(f'{name} does not give the {n[0]} numbers that aesthetic reads: use {CLIP_L}')
    return batched(lambda images, prompts: head(see(model, images)).squeeze(-1))


# ---------------------------------------------------------------------------------------------- your own

def remote(url, timeout=60, tries=3, wait=1.0):
    """A reward behind a POST. Sent: {"prompts": [...], "images": [base64 of a PNG, ...], "rows": [...]}, rows
    without what JSON cannot say. Expected: {"rewards": [one an image]}. Tries are 1, 2, 4... s apart."""
    def reward(images, rows):
        plain = [{k: v for k, v in row.items() if isinstance(v, str | int | float | None)} for row in rows]
        pngs = [base64.b64encode(encoded(p, 'PNG')).decode() for p in pictures(images)]
        body = json.dumps({'prompts': [r['prompt'] for r in rows], 'images': pngs, 'rows': plain}).encode()
        for k in range(tries):
            time.sleep(wait * 2 ** (k - 1) if k else 0)
            text = None
            try:
                request = urllib.request.Request(url, body, {'Content-Type': 'application/json'})
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    text = answer.read().decode(errors='replace')
                values = [float(v) for v in json.loads(text)['rewards']]
                if len(values) == len(rows):
                    return values
                why = f'it sent {len(values)} rewards for {len(rows)} pictures'
            except urllib.request.HTTPError as e:
                why = f'it answered {e.code} {e.reason}: {e.read(200).decode(errors="replace")}'
            except (OSError, http.client.HTTPException) as e:
                why = f'{getattr(e, "reason", e) or type(e).__name__} (time-out {timeout} s)'
            except (ValueError, KeyError, TypeError):
                why = f'it should answer {{"rewards": [numbers]}} and answered {text[:200]!r}'
        raise RewardError(f'the reward server {url} failed {tries} times, lastly so: {why}')
    return reward


def shapes(images, rows):
    return [s['right'] for s in from_file(f'{WORLD}:score')(images, rows)]


BUILT_IN = {'shapes': lambda device: shapes, 'shapes_smooth': lambda device: from_file(f'{WORLD}:reward'),
            'jpeg': lambda device: jpeg, 'incompressible': lambda device: incompressible}
MODELS = {'clip': clip, 'pickscore': pickscore, 'aesthetic': aesthetic}


def is_url(name):
    return name.startswith(('http://', 'https://'))


def check(name):
    """Is this the name of a reward? For a start: no weights are loaded."""
    if '.py' in name and not is_url(name):
        from_file(name)
    elif not is_url(name):
        kind, *where = name.split('@')
        near = difflib.get_close_matches(kind, BUILT_IN | MODELS, 1)
        need(kind in BUILT_IN | MODELS,
             f'no reward is called {kind!r}' + (f', did you mean {near[0]}?' if near else '') +
             f' There are: {", ".join(BUILT_IN | MODELS)}, http://..., file.py:function')
        need(len(where) <= 2 * (kind in MODELS),
             f'{name}: {kind} takes {"at most two @" if kind in MODELS else "no @"}')
        need(kind != 'aesthetic' or ''.join(where[:1]).endswith('.safetensors'), CONVERT)


def load(name, device='cpu', **options):
    """A name from the list on top -> the reward; `options` are those of `remote`."""
    check(name)
    if is_url(name):
        return remote(name, **options)
    need(not options, f'{name}: only a server takes {", ".join(options)}')
    if '.py' in name:
        return from_file(name)
    kind, *where = name.split('@')
    return (BUILT_IN | MODELS)[kind](str(device), *where)


# ---------------------------------------------------------------------------------------------- trusting none

def culprit(function, images, rows):
    """Which sample makes it fail: the first that fails alone as well."""
    for i in range(len(rows)):
        try:
            function(images[i:i + 1], rows[i:i + 1])
        except Exception:
            return i
    return 0


def checked(name, function, images, rows, folder):
    """One finite number an image, or a RewardError with the sample's picture and prompt saved in `folder`.
    Of a scorer that gives a dict an image, the first value counts."""
    i = None
    try:
        if broken := [k for k, x in enumerate(images) if not x.isfinite().all()]:
            i = broken[0]
            raise RewardError('the picture itself has values that are not finite')
        values = function(images, rows)
        values = [float(next(iter(v.values())) if isinstance(v, dict) else v) for v in values]
        if len(values) != len(rows):
            raise RewardError(f'it gave {len(values)} values for {len(rows)} pictures')
        if bad := [k for k, v in enumerate(values) if not math.isfinite(v)]:
            i = bad[0]
            raise RewardError(f'it gave {values[i]}')
        return values
    except Exception as e:
        if i is None:  # a RewardError here is a server's: do not wait for it once a sample
            i = 0 if isinstance(e, RewardError) else culprit(function, images, rows)
        why = str(e) if isinstance(e, RewardError) else f'{type(e).__name__}: {e}'
        where = Path(folder) / 'reward_failed.png'
        where.parent.mkdir(parents=True, exist_ok=True)
        pictures(images[i:i + 1])[0].save(where)
        row = {k: str(v) for k, v in rows[i].items()}
        where.with_suffix('.json').write_text(json.dumps({**row, 'reward': name, 'why': why}, indent=1))
        raise RewardError(f'reward {name}: {why}. The sample, "{rows[i].get("prompt")}", is saved as '
                          f'{where} and .json') from e
