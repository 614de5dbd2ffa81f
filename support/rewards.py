"""
What a picture is worth. A reward is a function (images, rows) -> one number an image, more is
better. `images` is (n, 3, h, w) in [0, 1]; a row is a dict with `prompt` and, for edits,
`source_image`. By name:

    shapes, shapes_smooth    is it what the row asks for: 0 or 1, or between (data/shapes/world.py)
    jpeg, incompressible     minus, or plus, the kilobytes of a JPEG of quality 95; no weights
    clip                     cosine of prompt and picture, from -1 to 1, not times 100
    pickscore                PickScore divided by 26, as Flow-GRPO scales it: mostly 0.7 to 0.9
    aesthetic@weights        LAION's improved aesthetic predictor, about 1 to 10, from safetensors
    http://..., https://...  a server of your own: docs/rewards.md, docs/reward_server.py
    path/file.py:function    a function of your own

A model may go on with @ and a local folder or hub id in place of the usual one, then @ and its
processor (for aesthetic: CLIP), as in clip@/disk/clip or pickscore@/disk/pickscore@/disk/clip-h.
CLIP reads 77 tokens. Left out: rewards that need an environment of their own (OCR, GenEval,
vision-language judges): serve them.

python -c "from support import rewards; import torch; \
    print(rewards.load('jpeg')(torch.rand(2, 3, 64, 64), [{}, {}]))"
"""
import base64, difflib, functools, http.client, io, json, os, socket, threading, time
import urllib.parse, urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import BadInput, need
from support.disk import write_text
from support.files import (RewardError, ask, load_function as from_file, number, one_line, save_png,
                           to_picture)

BATCH = 16
MOST_BYTES = 1 << 20                # of a server's answer
WORLD = Path(__file__).parent.parent / 'data' / 'shapes' / 'world.py'
CLIP_L = 'openai/clip-vit-large-patch14'
PICKSCORE, CLIP_H = 'yuvalkirstain/PickScore_v1', 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'
CONVERT = """The aesthetic reward needs safetensors: aesthetic@/disk/aesthetic.safetensors, or a
file on the hub, aesthetic@owner/repo/file.safetensors. To convert the published .pth, running no
code in it:
python -c "import torch as t, safetensors.torch as s; s.save_file(
t.load('sac+logos+ava1-l14-linearMSE.pth', 'cpu', weights_only=True), 'aesthetic.safetensors')\""""


def pictures(images):
    """(n, 3, h, w) in [0, 1] -> n PIL images."""
    return [to_picture(x) for x in images]


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def incompressible(images, rows):
    return [len(encoded(p, 'JPEG', quality=95)) / 1000 for p in pictures(images)]


def jpeg(images, rows):
    return [-kilobytes for kilobytes in incompressible(images, rows)]


# --------------------------------------------------------------------------------------------------
# Models

@functools.cache  # rewards with the same CLIP share it
def clip_model(name, processor, device):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    try:  # safetensors only: a pickle may run code
        model, info = CLIPModel.from_pretrained(name, use_safetensors=True,
                                                output_loading_info=True)
        text = AutoTokenizer.from_pretrained(processor)
        pixels = CLIPImageProcessor.from_pretrained(processor)
    except (OSError, ValueError) as e:
        raise BadInput(f'the CLIP model {name}, or its processor {processor}, does not load. Fetch '
                       'both with `hf download`, or name local folders: '
                       f'clip@/disk/model@/disk/processor. {e}') from e
    need(not info['missing_keys'],  # transformers would fill these with random numbers
         f'{name} is not a whole CLIP model; it lacks {sorted(info["missing_keys"])[:3]}')
    return model.float().to(device).eval().requires_grad_(False), text, pixels


def see(clip, images):
    model, _, pixels = clip
    x = pixels(images=pictures(images), return_tensors='pt')['pixel_values'].to(model.device)
    x = model.vision_model(pixel_values=x).pooler_output
    return F.normalize(model.visual_projection(x), dim=-1)


def read(clip, prompts):
    model, text, _ = clip
    most = model.config.text_config.max_position_embeddings
    t = text(prompts, padding=True, truncation=True, max_length=most, return_tensors='pt')
    t = t.to(model.device)
    t = model.text_model(input_ids=t['input_ids'], attention_mask=t['attention_mask']).pooler_output
    return F.normalize(model.text_projection(t), dim=-1)


def batched(score):
    @torch.no_grad()
    def reward(images, rows):
        prompts, values = [row['prompt'] for row in rows], []
        for i in range(0, len(rows), BATCH):
            values += score(images[i:i + BATCH], prompts[i:i + BATCH]).tolist()
        return values
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
    n, gap = [768, 1024, 128, 64, 16, 1], torch.nn.Identity()  # its dropouts
    a, b, c, d, e = [torch.nn.Linear(*ends) for ends in zip(n, n[1:])]
    head = torch.nn.Sequential(a, gap, b, gap, c, gap, d, e)   # linear all through, as published
    try:
        if not Path(weights).exists() and weights.count('/') > 1 and weights[0] not in './':
            from huggingface_hub import hf_hub_download
            owner, repo, file = weights.split('/', 2)
            weights = hf_hub_download(f'{owner}/{repo}', file)
        head.load_state_dict({k.removeprefix('layers.'): v for k, v in load_file(weights).items()})
    except Exception as error:  # safetensors, the hub and torch each have their own
        raise BadInput(f'{weights} does not load as an aesthetic predictor: {error}\n'
                       + CONVERT) from error
    head, model = head.to(device).requires_grad_(False), clip_model(name, name, device)
    if model[0].config.projection_dim != n[0]:
        raise BadInput(f'{name} does not give the {n[0]} numbers that aesthetic reads: use '
                       + CLIP_L)
    return batched(lambda images, prompts: head(see(model, images)).squeeze(-1))


# --------------------------------------------------------------------------------------------------
# Your own

class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):                # pictures go to the address that was given only
        return None


DIRECT = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({}))


def within(seconds, function):
    """What function() returns or raises, in so many seconds in all: a time-out of a socket begins
    anew with every byte, and a search for a name has none."""
    told = []

    def run():
        try:
            told.append((function(), None))
        except Exception as e:
            told.append((None, e))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    value, error = told[0] if told else (None, TimeoutError('timed out'))
    if error:
        raise error
    return value


def post(url, body, timeout):
    """The text of an answer, or an exception; neither endless nor longer than MOST_BYTES."""
    end = time.monotonic() + timeout

    def answer():
        request = urllib.request.Request(url, body, {'Content-Type': 'application/json'})
        text = b''
        with DIRECT.open(request, timeout=timeout) as reply:
            while got := reply.read1(1 << 16):
                text += got
                if len(text) > MOST_BYTES:
                    raise ValueError(f'it answered more than {MOST_BYTES} bytes')
                if time.monotonic() > end:         # nobody waits for it any more
                    break
        return text.decode(errors='replace')
    return within(timeout, answer)


def numbers_of(text, n):
    """The numbers of a server's answer about n pictures."""
    try:
        values = json.loads(text)['rewards']
        good = type(values) is list and all(type(v) in (int, float) for v in values)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f'it should answer {{"rewards": [numbers]}} and answered {text[:200]!r}')
    if len(values) != n:
        raise ValueError(f'it sent {len(values)} rewards for {n} pictures')
    return [number(v) for v in values]


def remote(url, timeout=60, tries=3, wait=1.0):
    """A reward behind a POST. Sent: {"prompts": [...], "images": [base64 of a PNG, ...],
    "rows": [...]}, rows without what JSON cannot say. Expected: {"rewards": [one an image]}, whole
    within `timeout` seconds. Tries are 1, 2, 4... s apart."""
    def reward(images, rows):
        plain = [{k: v for k, v in row.items() if isinstance(v, str | int | float | None)}
                 for row in rows]
        pngs = [base64.b64encode(encoded(p, 'PNG')).decode() for p in pictures(images)]
        body = {'prompts': [row['prompt'] for row in rows], 'images': pngs, 'rows': plain}
        body = json.dumps(body).encode()
        for k in range(tries):
            time.sleep(wait * 2 ** (k - 1) if k else 0)
            try:
                return numbers_of(post(url, body, timeout), len(rows))
            except urllib.request.HTTPError as e:
                try:
                    said = within(timeout, lambda: e.read(200)).decode(errors='replace')
                except (OSError, http.client.HTTPException):
                    said = ''
                moved = f'; it sends you to {e.headers["Location"]}' if 300 <= e.code < 400 else ''
                why = f'it answered {e.code} {e.reason}: {said}{moved}'
            except (OSError, http.client.HTTPException) as e:
                why = f'{getattr(e, "reason", e) or type(e).__name__} (time-out {timeout} s)'
            except (ValueError, OverflowError) as e:
                why = str(e)
        raise RewardError(f'{url}: the server failed {tries} times, lastly so: {one_line(why)}')
    return reward


def check_server(url, timeout=5):
    """Does somebody answer at this address? Nothing is sent."""
    mend = 'start it, or mend the address (docs/reward_server.py is an example)'
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or dict(http=80, https=443)[parts.scheme]
    except ValueError as e:
        raise BadInput(f'reward {url}: this is no address ({e})') from e
    need(parts.hostname and url.isascii() and url.isprintable() and ' ' not in url,
         f'reward {url!r}: this is no address; one looks like http://127.0.0.1:8000')
    try:
        within(timeout, lambda: socket.create_connection((parts.hostname, port), timeout).close())
    except socket.gaierror as e:
        raise BadInput(f'reward {url}: no machine is called {parts.hostname!r} here '
                       f'({e.strerror}); {mend}') from e
    except (OSError, UnicodeError) as e:           # UnicodeError: a name of more than 63 letters
        raise BadInput(f'reward {url}: no server answers there ({e}); {mend}') from e


def shapes(images, rows):
    return [s['right'] for s in from_file(f'{WORLD}:score')(images, rows)]


BUILT_IN = {'shapes': lambda device: shapes, 'jpeg': lambda device: jpeg,
            'shapes_smooth': lambda device: from_file(f'{WORLD}:reward'),
            'incompressible': lambda device: incompressible}
MODELS = {'clip': clip, 'pickscore': pickscore, 'aesthetic': aesthetic}


def is_url(name):
    return name.startswith(('http://', 'https://'))


def check(name):
    """Is this the name of a reward? No weights are loaded, and a server is only knocked at."""
    if is_url(name):
        check_server(name)
    elif '.py' in name:
        from_file(name)
    else:
        kind, *where = name.split('@')
        near = difflib.get_close_matches(kind, BUILT_IN | MODELS, 1)
        need(kind in BUILT_IN | MODELS,
             f'no reward is called {kind!r}' + (f', did you mean {near[0]}?' if near else '') +
             f' There are: {", ".join(BUILT_IN | MODELS)}, http://..., file.py:function')
        need(len(where) <= 2 * (kind in MODELS),
             f'{name}: {kind} takes {"at most two @" if kind in MODELS else "no @"}')
        need(kind != 'aesthetic' or ''.join(where[:1]).endswith('.safetensors'), CONVERT)
        for place in where:
            need(not place.startswith(('/', '.', '~')) or Path(place).expanduser().exists(),
                 f'{name}: {place} does not exist')


def load(name, device='cpu', **options):
    """A name from the list on top -> the reward; `options` are those of `remote`."""
    check(name)
    if is_url(name):
        return remote(name, **options)
    need(not options, f'{name}: only a server takes {", ".join(options)}')
    if '.py' in name:
        return from_file(name)
    kind, *where = name.split('@')
    return (BUILT_IN | MODELS)[kind](str(device), *map(os.path.expanduser, where))


# --------------------------------------------------------------------------------------------------
# Trusting none

def culprit(function, images, rows):
    """Which sample makes it fail: the first that fails alone as well."""
    for i in range(len(rows)):
        try:
            ask('', function, images[i:i + 1], rows[i:i + 1])
        except RewardError:
            return i
    return 0


def keep(name, image, row, why, folder):
    """The sample that a reward failed on, as files; where they are, or why they are not."""
    picture = Path(folder) / 'reward_failed.png'
    note = {**{k: str(v) for k, v in row.items()}, 'reward': name, 'why': why}
    try:
        save_png(pictures(image[None])[0], picture)
        write_text(picture.with_suffix('.json'), json.dumps(note, indent=1))
    except BadInput as e:
        return f'could not be saved: {e}'
    return f'is saved as {picture} and .json'


def checked(name, function, images, rows, folder):
    """One finite number an image, or a RewardError with the sample's picture and prompt saved in
    `folder`. Of a scorer that gives a dict an image, the first value counts."""
    try:
        return ask(name, function, images, rows)
    except RewardError as e:
        i = e.sample
        if i is None:  # a server is not waited for once a sample
            i = 0 if is_url(name) else culprit(function, images, rows)
        prompt, saved = rows[i].get('prompt'), keep(name, images[i], rows[i], str(e), folder)
        said = f'reward {e}. The sample, "{one_line(prompt, 200)}", {saved}'
        raise RewardError(said, i) from e
