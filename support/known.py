"""
What lies on the disk for sample.py: a checkpoint and the run that made it, that run's rows, and
pictures from before.
"""
import itertools, json, re

import merge_lora
from configurator import BadInput, need
from support.files import Data, read_data, one_line
from support.models import last_weights


def locate(c):
    """(path of the adapter or '', settings of the run that made it or {})."""
    if not c.ckpt:
        return '', {}
    path = merge_lora.find(c.ckpt)
    run = path.parent.parent                                   # if it is that of a run's start
    for meta in (path.parent / 'meta.json', run / 'meta.json', run / 'latest' / 'meta.json'):
        if meta.is_file():
            try:
                return path, dict(json.loads(meta.read_text())['settings'])
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise BadInput(f'{meta} is damaged ({one_line(repr(e))}); give another checkpoint '
                               'of it') from e
    return path, {}


def read_weights(c, path):
    """A checkpoint's adapter is the average; the student itself is in its train state."""
    here = path.parent
    if c.ema or not (here / 'meta.json').is_file():
        return merge_lora.read_adapter(path)
    need((here / 'train_state.pt').is_file(), f'{here} holds only the average: leave out ema=False')
    return last_weights(here)


def read_buckets(c, run):
    """{bucket: rows of data}; of a run's own a few, or, for a score, those that the run scores."""
    need(not (c.prompt and c.prompts), 'give --prompt or --prompts, not both')
    if c.prompt or c.verify:
        words = (c.prompt or 'a red circle on two green squares').split('|')
        return {'all': [dict(prompt=p.strip()) for p in words if p.strip()]}
    own = run.get('eval_data') or run.get('data') or []
    buckets, errors = read_data([c.prompts] if c.prompts else own)
    need(not errors, '; '.join(errors[:5]))
    if c.prompts:
        return buckets
    if c.score:
        most = [run.get(k, 3) for k in ('score_samples', 'eval_samples', 'show')]
        scored = run.get('score_samples', most[1])             # a teacher's run has the second
        drawn = Data({}, buckets).drawn(run.get('seed', 0), max(most))
        return {k: rows[:max(1, scored)] for k, rows in drawn.items()}
    return {k: [*itertools.islice(b, 3)] for k, b in buckets.items()}


def first_free(out):
    """The number of the first prompt's pictures: none that is there is written over."""
    names = [re.fullmatch(r'(\d{4,})_\d+\.png|grid_(\d{4,})\.png', p.name) for p in out.iterdir()]
    first = max((int(m[1] or m[2]) + 1 for m in names if m), default=0)
    if first:
        print(f'{out} holds pictures from before: these are numbered from {first:04d}')
    return first
