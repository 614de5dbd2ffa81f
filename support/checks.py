"""
All that can be known before weights are loaded: settings, routes, teachers, data, sizes; and the table
that a run prints first. A rule is (does it hold, what to say if not); the first that does not is said.
Nothing here is needed to understand a method, and a method is not named here: its settings are known
by those that its entry in METHODS declares: one that reads clip_range, say, is a policy gradient.
"""
import math, os, random
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import merge_lora
from configurator import configure, need
from support.files import REMAKE, is_hub_id, load_function, model_configs, open_buckets

SHARED = dict(lr_schedule=('constant', 'cosine'), kl_var=('true', 'code'),
              dtype=('auto', 'float32', 'bfloat16'))           # float16 has not the range
CHOICES = dict(SHARED, reward=('k1', 'code', 'paper'), routes_per_step=(1, 'all', 'sample'))
ABOVE_0 = 'lr', 'alpha', 'clip_range', 'adv_clip'
FROM_0 = 'drop_last', 'warmup', 'score_samples', 'best_of'     # integers; all others are at least 1


def require(rules):
    for holds, message in rules:
        need(holds, message)


def is_number(x):
    return type(x) in (int, float) and 0 < x < math.inf


def own_settings(settings, argv):
    """A run's settings. With another model the demonstration's eval_data and score mean nothing."""
    given = set()
    c = configure(settings, argv, given)
    for k, none in (('eval_data', []), ('score', '')):
        if c.model != settings[0]['model'] and k not in given and getattr(c, k) == settings[0][k]:
            setattr(c, k, none)
    c.model = os.path.expanduser(c.model)
    return c


def check_settings(c, defaults, methods, choices, above=ABOVE_0):
    """What both trainers ask of settings, one by one and together; none is set in vain."""
    for k, known in choices.items():
        need(getattr(c, k) in known, f'{k}: {getattr(c, k)!r} is not one of {", ".join(map(repr, known))}')
    for k, x in vars(c).items():
        if k in above:
            need(is_number(x), f'{k} must be more than 0, not {x!r}')
        elif type(x) in (int, float) and k != 'seed':
            least = int(type(x) is int and k not in FROM_0)
            need(x >= least, f'{k} must be at least {least}, not {x}')
    for k in sorted({k for m in methods.values() for k in m.settings}):
        need(k in methods[c.method].settings or getattr(c, k) == defaults[k], f'{k}: method = '
             f'{c.method!r} does not read it; leave it at {defaults[k]!r}')
    world = int(os.environ.get('WORLD_SIZE', 1))
    unit = c.group_size * c.updates * world
    require([
        (not c.wandb_log or find_spec('wandb'), 'wandb_log needs a package more: pip install wandb'),
        (c.ema_decay < 1, f'ema_decay must be below 1, not {c.ema_decay}'),
        (len(c.betas) == 2 and all(type(x) in (int, float) and 0 <= x < 1 for x in c.betas),
         f'betas: two numbers from 0 to below 1, not {c.betas}'),
        (c.sde != 'cps' or c.eta <= 1, f"eta = {c.eta}: at most 1 with sde = 'cps', whose noise is "
         "sigma' sin(eta pi / 2)"),
        (c.drop_last < c.steps, f'drop_last = {c.drop_last} leaves nothing of a rollout of {c.steps} '
         'step(s)'),
        (c.batch_size % unit == 0, f'batch_size = {c.batch_size} does not divide into {world} processes '
         f'x {c.updates} updates x groups of {c.group_size}; the nearest that does is '
         f'{max(unit, round(c.batch_size / unit) * unit)}')])
    if c.score:
        load_function(c.score)
    if c.init_from not in ('base', 'merge', 'resume') and not is_hub_id(c.init_from):
        merge_lora.read_adapter(c.init_from)                   # there, whole and readable


def check_method(c, reads):
    """What a method that reads these settings asks of them."""
    policy, kl = 'clip_range' in reads, 'kl_var' in reads
    require([
        (c.queries <= c.steps, f'queries = {c.queries} distinct states cannot be had from {c.steps} '
         'steps'),
        (not policy or c.group_size > 1, "group_size = 1: a prompt's samples are compared; at least 2 "
         '(Flow-OPD: 16)'),
        (not policy or c.eta > 0, 'eta = 0: a policy gradient needs a random policy; Flow-OPD has 0.7'),
        (not policy or c.rollout_guidance == c.student_guidance, 'a policy gradient improves the policy '
         'that drew the samples: rollout_guidance and student_guidance must be equal'),
        (c.kl_var == 'true' or c.eta, "kl_var = 'code' is about an SDE's variance: it needs eta above "
         '0'),
        (c.sde != 'cps' or not c.eta or not kl or (c.drop_last and c.kl_var == 'true'),
         "sde = 'cps' ends without noise, where the KL has no value: set drop_last = 1, kl_var = 'true'"),
        (not c.anchor_beta or c.anchor, "anchor_beta is set but there is no anchor: set anchor = 'base'"),
        (not c.anchor or c.anchor_beta, 'anchor is set but anchor_beta is 0: set both (Flow-OPD: 0.04)')])


def check_teachers(c):
    names = [t.get('name') for t in c.teachers if isinstance(t, dict)]
    taken = {None, 'student', 'default', 'half', 'float', 'double', 'type', 'to', 'train', 'eval'}
    for t in c.teachers:
        check_entry(t, 'teacher', 'name', 'name lora checkpoint guidance')
        name, path = t.get('name'), str(t.get('lora') or t.get('checkpoint') or '')
        require([
            (str(name).isidentifier() and name not in taken, f'teacher name {name!r}: a word of '
             'letters, digits and _, and none that torch uses as "half"'),
            (names.count(name) == 1, f'two teachers are called {name!r}; give each its own name'),
            (not (t.get('lora') and t.get('checkpoint')), f'teacher {name!r} has both lora and checkpoint'),
            (is_number(t.get('guidance', 1)), f'teacher {name!r}: guidance must be more than 0, not '
             f'{t.get("guidance")!r}'),
            (name != 'base' or not path, 'the name "base" is the frozen base\'s: give this another'),
            (is_hub_id(path) or Path(path).expanduser().exists(), f'teacher {name!r}: {path} does not '
             'exist' + REMAKE * path.startswith('data/shapes'))])
        if t.get('lora') and not is_hub_id(path):
            merge_lora.read_adapter(path)                      # whole and readable
    need(c.anchor in ('', 'base', *names), f'anchor: no teacher is called {c.anchor!r}; there are: '
         f'{", ".join(names)}')
    return names


def check_entry(x, what, key, known):
    need(isinstance(x, dict), f'{x!r}: teachers are dict(name=..., lora=...), routes '
         'dict(teacher=..., data=...)')
    odd = sorted(set(x) - set(known.split()))
    need(not odd, f'{what} {x}: unknown {odd}; known: {known}')
    need(is_number(x.get('weight', 1)), f'{what} {x.get(key)!r}: weight must be more than 0, not '
         f'{x.get("weight")!r}')


def check_routes(c, names):
    need(c.routes, 'routes is empty: give at least one dict(teacher=..., data=...)')
    for r in c.routes:
        check_entry(r, 'route', 'data', 'teacher data weight samples')
        require([
            (r.get('teacher') in names, f'a route names the teacher {r.get("teacher")!r}; there are: '
             f'{", ".join(names)}'),
            ('samples' not in r or c.routes_per_step == 'all',
             "`samples` in a route needs routes_per_step = 'all'"),
            (type(r.get('samples', 1)) is int, f'{r}: samples must be a whole number')])
    labels, G = [r.get('data') for r in c.routes], c.group_size
    need(len(set(labels)) == len(labels), f'two routes have the same data; each needs its own: {labels}')
    if c.routes_per_step == 'all':
        parts = [r.get('samples', c.batch_size // len(labels)) for r in c.routes]
        need(sum(parts) == c.batch_size, f"batch_size is {c.batch_size}, but the routes' samples sum to "
             f'{sum(parts)}: set it so')
        need(all(p > 0 and p % G == 0 for p in parts), f'samples {parts} must be multiples of '
             f'group_size {G}')
    loras = {t['name'] for t in c.teachers if t.get('lora')} & {r['teacher'] for r in c.routes}
    need(c.init_from != 'merge' or loras, "init_from = 'merge' needs a route to a LoRA teacher")
    return labels


def check_data(c, find_family, labels=(), need_target=False):
    """Training and held-out buckets, every picture looked at; can the model take this size?"""
    if isinstance(c.resolution, int):
        c.resolution = [c.resolution, c.resolution]
    need([type(x) for x in c.resolution] == [int, int], 'resolution: a number, or [height, width]')
    buckets, held = open_buckets(c.data, c.eval_data, labels, need_target)
    found = peek(c.model, find_family, c.family)
    check_size(*found, *c.resolution, any(b.sources for b in buckets.values()))
    return SimpleNamespace(buckets=buckets, held=held, pipeline=found[1])


def peek(path, find_family, family=''):
    """What is known without weights: (family's class, pipeline's name, {component: config}); of a
    hub id no more than what is given, None and ''."""
    configs = model_configs(path)
    pipeline = configs.get('index', {}).get('_class_name', '')
    known = find_family(pipeline, family) if family or pipeline else None
    return known, pipeline if not family or family.endswith('.py') or ':' in family else family, configs


def check_size(family, pipeline, configs, height, width, editing=False):
    """Can the family take this size, and edit?"""
    unit = family.unit(configs) if family else 16
    most = family.largest(configs, editing) if family else (math.inf, math.inf)
    name = pipeline or 'this model'
    require([(x >= unit and x % unit == 0, f'resolution: {name} takes a {what} in multiples of {unit} '
              f'pixels, not {x}; the nearest is {max(unit, round(x / unit) * unit)}')
             for what, x in (('height', height), ('width', width))] + [
        (not editing or not pipeline or pipeline in family.editors, f'{pipeline} cannot edit a source '
         'image. Take source_image out of the data, or take a model that can'),
        (height <= most[0] and width <= most[1], f'resolution: {height} x {width} is larger than '
         f'{name}\'s table of positions, {most[0]} x {most[1]} pixels{" with a source" * editing}')])


def check(c, defaults, methods, find_family, choices):
    """train_opd.py's."""
    check_settings(c, defaults, methods, choices)
    check_method(c, methods[c.method].settings)
    labels = check_routes(c, check_teachers(c))
    return check_data(c, find_family, labels, c.states == 'data')


def derived(c, data, methods, draw_queries):
    """The table before step 0: what follows from the settings. Forwards count guidance twice."""
    def two(w):
        return 1 if w == 1 else 2
    world, size = int(os.environ.get('WORLD_SIZE', 1)), c.batch_size
    parts = [r.get('samples', r.get('weight', 1.0)) for r in c.routes]
    cost = {t['name']: two(t.get('guidance', 1.0)) for t in c.teachers}
    teacher = sum(cost[r['teacher']] * p for r, p in zip(c.routes, parts)) / sum(parts)
    roll, learn = two(c.rollout_guidance), two(c.student_guidance)
    held, n = learn if c.anchor else 0, c.steps - c.drop_last
    if 'queries' in methods[c.method].settings:
        places = [SimpleNamespace(slot=i, of=256) for i in range(256)]
        last = [draw_queries(random.Random(i), s, c)[-1] for i, s in enumerate(places)]
        asked = dict(student=roll, teacher=teacher).get(c.states, 0)
        forwards = asked * sum(last) / len(last) + c.queries * (teacher + learn + held)
    else:
        policy = 'clip_range' in methods[c.method].settings    # it rolls out before it learns
        alike = not policy and c.rollout_guidance == c.student_guidance
        forwards = n * (teacher + learn + held + (0 if alike else roll))
    h, w = c.resolution
    rows = [('model', f'{c.model} ({data.pipeline or "family unknown until fetched"}), {h} x {w} pixels'),
            ('method', f'{c.method}, {c.steps} steps, {f"SDE {c.sde} {c.eta}" if c.eta else "ODE"}, '
             f'from {c.init_from}'),
            ('samples a step', f'{size} in groups of {c.group_size}; {size // world} on each of {world} '
             f'process(es), {c.micro_batch} a forward'),
            ('forwards a step', f'{forwards * size:.0f}, {forwards:.1f} a sample, teachers included'),
            ('updates', f'{c.max_steps * c.updates}, from {c.max_steps * size} rollouts')]
    rows += [(f'route {r["data"]}', f'teacher {r["teacher"]}, {len(data.buckets[r["data"]])} rows, '
              f'weight {r.get("weight", 1)}') for r in c.routes]
    return rows
