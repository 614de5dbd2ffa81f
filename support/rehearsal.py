"""
The table before step 0: what follows from the settings, with what a step costs, and, once they are
there, from the weights. For the cost the method is rehearsed, on a family that answers zeros: so
half a method is found before weights are loaded.
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
        prompts=SimpleNamespace(condition=lambda batch: [setattr(s, 'cond', ()) for s in batch],
                                release=lambda batch: None))
    seen, learned = Seen(c), 0
    for step in range(steps):
        samples, updates = plan(step, world=SimpleNamespace(rank=0, size=1)), 0
        for terms in method.updates(samples, models, seen):
            updates += 1
            need(not hasattr(terms, 'loss'), f'method {c.method!r} yields a Term where a generator '
                 'of the terms of an update belongs')
            for term in terms:
                check_term(term, c.method)
                learned += len(term.batch)
        need('updates' not in method.settings or updates == c.updates, f'updates = {c.updates}, '
             f'but method {c.method!r} makes {updates} a step')
    need(learned, f'method {c.method!r} yields no Term: nothing would be learned')
    check_read(seen.asked, c, method)
    return models.spent / steps


def check_read(asked, c, method):
    """What an entry declares is read: a promise. And what all methods read, if it is set; the plan
    reads sizes of groups."""
    unread = sorted({*method.settings} - asked - {'group_size', 'updates'})
    need(not unread, f'METHODS: the entry of {c.method!r} declares {unread and unread[0]}, and '
         'does not read it')
    for k, none in (('anchor', ''), ('student_guidance', 1.0), ('eta', 0.0)):
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
    asked = {r['teacher'] for r in c.routes} | {c.anchor, 'base'}
    if unasked := [t['name'] for t in c.teachers if t['name'] not in asked and c.mixing == 'hard']:
        rows.append(('not used', f'teachers that no route has: {", ".join(unasked)}'))
    for name, text in rows:
        print(f'{name:22s} {text}')


def derived(models):
    """Lines of the table before the first step: what is known only with the weights loaded."""
    student, rank, lost = models.student, models.student.rank, models.student.lost
    numbers = sum(p.numel() for p in student.params.values())
    yield 'student', f'rank {rank} on {len(student.names)} layers: {numbers:,} numbers'
    yield 'a checkpoint', (f'{5 * 4 * numbers / 1e9:.3f} GB: adapter files, and what a resume '
                           'needs')
    base = sum(p.nbytes for n, p in models.field.net.named_parameters() if '.lora_' not in n)
    yield 'base', f'{base / 1e9:.4f} GB'
    if models.small and not getattr(models.field.net, 'is_gradient_checkpointing', False):
        yield 'WARNING', ('without grad_checkpointing a forward with gradient keeps its layers '
                          'in 16 bits as well')
    for name in models.full if models.small else ():
        yield 'WARNING', (f'teacher {name}: full weights are rounded to 8 bits for themselves; '
                          'what little makes them differ may drown in that (docs/memory.md)')
    if (words := models.prompts).lacks:
        held = sum(p.nbytes for m in models.encoders() for p in m.parameters()) / 1e9
        yield 'words', (f'up to {words.lacks / 1e9:.1f} GB of embeddings do not fit in cache_gb = '
                        f'{words.most / 1e9:g} of each process: its encoders, {held:.1f} GB, stay '
                        "in the computer's memory, and visit the device now and then")
    for name, gb in models.gigabytes.items():
        yield f'teacher {name}', f'{gb:.4f} GB'
    for name in sorted(models.adapters - {'student'}):
        own = ['student' in m.lora_A for m in models.layers if name in m.lora_A]
        if not all(own):
            yield f'teacher {name}', (f'{own.count(False)} of its {len(own)} layers are not '
                                      "the student's: set lora_targets for those as well")
    if lost:
        yield 'start', f'cut to rank {rank}, it differs from the exact one by {lost:.1%}'
    if lost > 0.05:
        yield 'WARNING', (f'that is more than 5 %: rank {student.whole_rank} would hold the '
                          'start whole')
