"""
The table before step 0: what follows from the settings, with what a step costs. For that the method
is rehearsed, on a family that answers zeros: so half a method is found before weights are loaded.
"""
from types import SimpleNamespace

import torch

from configurator import need


class Blank:
    """A family that answers zeros: a method is rehearsed on it, and its forwards counted."""
    device = torch.device('cpu')

    def shape(self, height, width):
        return 1, 2, 2

    def sigmas(self, n, height, width):
        return torch.linspace(1, 0, n + 1)

    def first_state(self, eps, n, height, width):
        return eps

    def encode_image(self, x):
        return x.new_zeros(len(x), 1, 2, 2)

    def decode(self, z):
        return z.new_zeros(len(z), 3, 64, 64)

    def velocity(self, z, sigma, cond):
        return torch.zeros_like(z)

    def guide(self, v, v_empty, w):
        return v


def rehearsed(c, plan, method, Models, steps=3):
    """Forwards of a step, the mean of the first ones as they are planned: with gradient they count
    three, with guidance double."""
    models = Models.__new__(Models)
    vars(models).update(
        field=Blank(), full={}, adapters=(), layers=(), schedules={}, mixing=c.mixing,
        offload=False, teachers={t['name']: t for t in c.teachers},
        prompts=SimpleNamespace(condition=lambda batch: [setattr(s, 'cond', ()) for s in batch]))
    seen = Seen(c)
    for step in range(steps):
        samples = plan(step, world=SimpleNamespace(rank=0, size=1))
        for terms in method.updates(samples, models, seen):
            need(not hasattr(terms, 'loss'), f'method {c.method!r} yields a Term where a generator '
                 'of the terms of an update belongs')
            for term in terms:
                check_term(term, c.method)
    check_read(seen.asked, c, method)
    return models.spent / steps


def check_read(asked, c, method):
    """What an entry declares is read: a promise. And what all methods read, if it is set; the plan
    reads sizes of groups."""
    unread = sorted({*method.settings} - asked - {'group_size', 'updates'})
    need(not unread, f'METHODS: the entry of {c.method!r} declares {unread and unread[0]}, and '
         'does not read it')
    for k, none in (('anchor', ''), ('student_guidance', 1.0)):
        need(k in asked or getattr(c, k, none) == none, f'{k} is set, but method {c.method!r} does '
             'not read it' + ': its loss has no `anchored` in it' * (k == 'anchor'))


class Seen:
    """Settings that remember which of them were asked for."""

    def __init__(self, c):
        self.c, self.asked = c, set()

    def __getattr__(self, name):
        self.asked.add(name)
        return getattr(self.c, name)


def check_term(term, method):
    need(hasattr(term, 'loss') and hasattr(term, 'numbers'), f'method {method!r} yields a '
         f'{type(term).__name__} where a Term belongs')
    shape = tuple(getattr(term.loss, 'shape', ()))
    need(shape == (len(term.batch),), f'method {method!r} gives a loss of shape {shape} for '
         f'{len(term.batch)} samples: it should be one number a sample')


def print_plan(c, data, world, plan, methods, Models):
    """What follows from the settings; one process says it."""
    if world.rank:
        return
    size, forwards = c.batch_size, rehearsed(c, plan, methods[c.method], Models)
    sampler = f'SDE {c.sde} {c.eta}' if c.eta else 'ODE'
    sampler += f', the last {c.drop_last} not learned from' if c.drop_last else ''
    rows = [('model', f'{c.model} ({data.pipeline or "family unknown until fetched"})'),
            ('method', f'{c.method}, {c.steps} steps, {sampler}, from {c.init_from}'),
            ('samples a step', f'{size} in groups of {c.group_size}; {size // world.size} on each '
             f'of {world.size} process(es), {c.micro_batch} a forward'),
            ('forwards a step', f'{forwards:.0f}, {forwards / size:.1f} a sample, teachers '
             'included; with gradient they count three, with guidance double'),
            ('updates', f'{c.max_steps * c.updates}, from {c.max_steps * size} rollouts; rate '
             f'{c.lr:g}, {c.lr_schedule}')]
    rows += [(f'route {r["data"]}', f'teacher {r["teacher"]}, {data.told(r["data"])}, '
              f'weight {r.get("weight", 1)}, {"%d x %d" % r["size"]} pixels') for r in c.routes]
    if data.unused:
        rows.append(('not used', f'buckets that no route has: {", ".join(data.unused)}'))
    for name, text in rows:
        print(f'{name:22s} {text}')
