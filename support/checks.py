"""
All that can be known before weights are loaded: settings, routes, teachers, data, sizes. A rule is
(does it hold, what to say if not); the first that does not is said. Nothing here is needed to
understand a method, and a method is not named here: it is known by the settings that its entry in
METHODS declares: one that reads clip_range, say, is a policy gradient.
"""
import math, os, re
from importlib.util import find_spec
from pathlib import Path

import torch

import merge_lora
from configurator import BadInput, configure, need
from support import rewards
from support.disk import place
from support.files import REMAKE, is_hub_id, model_configs, open_buckets
from support.models import check_sizes, find_family

CHOICES = dict(lr_schedule=('constant', 'cosine'), kl_var=('true', 'code'),
               base_storage=('', 'float8'),
               dtype=('auto', 'float32', 'bfloat16'))          # float16 has not the range
ABOVE_0 = 'lr', 'alpha', 'clip_range', 'adv_clip', 'rollout_guidance', 'student_guidance'
FROM_0 = 'drop_last', 'warmup', 'score_samples', 'best_of'     # integers; others are at least 1
UNGUIDED = '; without guidance it is 1.0'              # 0 would be without the words
MOST = dict(lr=1.0, weight_decay=1.0, rank=4096)       # beyond which nothing is learned but a typo
# what a run has that nobody set, where the demonstration's own would mean nothing: with another
# model. (DanceOPD's rate; the shapes' would tear a real model apart)
ELSEWHERE = dict(eval_data=[], score='', init_from='merge', lr=2e-4, drop_last=None)
STARTS = 'base', 'merge', 'resume'                     # of init_from, which else names an adapter
HUB_ID = re.compile(r'[\w.-]+(/[\w.-]+)+')             # owner/repo, or a folder in it
# names that a config waits to have filled in
PLACEHOLDER = re.compile(r'<[^>]*>|\byour[-_ ](name|lora|model|data|adapter)\b|^/?path/to/', re.I)


def require(rules):
    for holds, message in rules:
        need(holds, message)


def is_number(x):
    return type(x) in (int, float) and 0 < x < math.inf


def own_settings(settings, argv):
    """A run's settings."""
    given = set()
    c = configure(settings, argv, given)
    for k, x in vars(c).items():
        check_texts(k, x)
    teacher = settings[0]['init_from'] in STARTS               # from the base
    kept = {'init_from', 'drop_last'} if teacher else set()
    same = os.path.normpath(c.model) == os.path.normpath(settings[0]['model'])
    for k in () if same else set(ELSEWHERE) - given - kept:
        setattr(c, k, ELSEWHERE[k])
    for k in ('model', 'init_from', 'out_dir'):
        setattr(c, k, os.path.expanduser(getattr(c, k)))
    return c


def check_texts(k, x):
    """A setting's texts, however deep, are such as files can have for names."""
    if isinstance(x, (list, tuple, dict)):
        for y in (*x, *x.values()) if isinstance(x, dict) else x:
            check_texts(k, y)
    elif isinstance(x, str):
        need('\0' not in x and x == x.encode(errors='ignore').decode(),
             f'{k}: {x!r} has a character that is none, as a NUL')
        need(not PLACEHOLDER.search(x), f'{k}: {x} is a placeholder: put a name of your own there')


def check_choices(c, choices):
    for k, known in choices.items():
        told = ', '.join(map(repr, known))
        need(getattr(c, k) in known, f'{k}: {getattr(c, k)!r} is not one of {told}')


def check_entries(choices, defaults):
    """The tables of methods and rewards, a fork's own entries among them."""
    for name, m in choices['method'].items():
        need(hasattr(m, 'settings') and callable(m.updates), f'METHODS: the entry of {name!r} is '
             'no Method(function, (names of settings, ...))')
        odd = [k for k in m.settings if k not in defaults]
        need(type(m.settings) is tuple and not odd, f'METHODS: {name!r} declares settings that '
             f'there are not: {odd or m.settings!r}')
    for name, r in choices.get('reward', {}).items():
        need(not r.attached or r.of_action.__name__ == 'minus_kl' and not r.group,
             f'REWARDS: {name!r} is attached, which is minus the KL with its own gradient and no '
             'group: of_action is minus_kl, and group is False')


def check_settings(c, defaults, choices, above=ABOVE_0, dealt=True):
    """What both trainers ask of settings, one by one and together; none is set in vain. `dealt`: a
    step's groups are dealt among its updates."""
    methods = choices['method']
    check_choices(c, choices)
    for k, x in vars(c).items():
        if k in above:
            need(is_number(x), f'{k} must be more than 0, not {x!r}'
                 + UNGUIDED * k.endswith('guidance'))
        elif type(x) in (int, float) and k != 'seed':
            own = defaults[k] if type(defaults[k]) in (int, float) else 1      # a default is legal
            least = min(int(type(x) is int and k not in FROM_0), own)
            need(x >= least, f'{k} must be at least {least}, not {x}')
        need(k not in MOST or x <= MOST[k], f'{k} must be at most {MOST.get(k)}, not {x}')
    check_entries(choices, defaults)
    reads = methods[c.method].settings
    for k in sorted({k for m in methods.values() for k in m.settings}):
        all_steps = k == 'drop_last' and c.drop_last == 0      # are what it learns from
        need(k in reads or getattr(c, k) == defaults[k] or all_steps, f'{k}: method = '
             f'{c.method!r} does not read it; leave it at {defaults[k]!r}')
    c.drop_last *= 'drop_last' in reads
    world = int(os.environ.get('WORLD_SIZE', 1))
    updates = c.updates if dealt else 1
    unit = c.group_size * updates * world
    layers = c.lora_targets
    require([
        (not c.wandb_log or find_spec('wandb'), 'wandb_log needs a package more: pip install '
         'wandb'),
        (not c.tensorboard_log or find_spec('tensorboard'), 'tensorboard_log needs a package '
         'more: pip install tensorboard'),
        (layers is None or layers and all(isinstance(x, str) and x for x in layers),
         f'lora_targets: names of layers, or None, not {layers}'),
        (not c.compile or not c.base_storage, 'compile does not go with base_storage: what it '
         'compiles reads the weights again in the backward, and by then they are in 8 bits'),
        (c.ema_decay < 1, f'ema_decay must be below 1, not {c.ema_decay}'),
        (len(c.betas) == 2 and all(type(x) in (int, float) and 0 <= x < 1 for x in c.betas),
         f'betas: two numbers from 0 to below 1, not {c.betas}'),
        (c.eta or c.sde == defaults['sde'], f'sde = {c.sde!r} is about noise: give it an eta above '
         'the 0 of the ODE'),
        (c.sde != 'cps' or c.eta <= 1, f"eta = {c.eta}: at most 1 with sde = 'cps', whose noise is "
         "sigma' sin(eta pi / 2)"),
        (c.drop_last < c.steps, f'drop_last = {c.drop_last} leaves nothing of a rollout of '
         f'{c.steps} step(s); set drop_last = 0, or more steps'),
        (c.batch_size % unit == 0, f'batch_size = {c.batch_size} does not divide into {world} '
         f'processes x {updates} updates x groups of {c.group_size}; the nearest that does is '
         f'{max(unit, round(c.batch_size / unit) * unit)}' + ", to which the routes' samples have "
         'to sum' * any('samples' in r for r in vars(c).get('routes', ()) if type(r) is dict))])
    place(c.out_dir)
    if c.score:
        check_score(c.score)
    if c.init_from not in STARTS:
        check_path('init_from', c.init_from, mend=f', nor one of {", ".join(STARTS)}')
    if c.init_from not in STARTS and not is_hub_id(c.init_from):
        merge_lora.read_adapter(c.init_from)                   # there, whole and readable


def check_score(score):
    try:
        rewards.check(score)
    except BadInput as e:
        raise BadInput(f'score: {e}') from e


def check_path(what, path, mend=''):
    """Something that is here, or that may be on the hub."""
    need(os.path.exists(os.path.expanduser(path)) or is_hub_id(path) and HUB_ID.fullmatch(path),
         f'{what}: {path} does not exist{mend}')


def check_method(c, reads, kinds):
    """What a method that reads these settings asks of them."""
    policy, kl = 'clip_range' in reads, 'kl_var' in reads
    require([
        (c.queries <= c.steps - c.drop_last, f'queries = {c.queries} distinct states cannot be had '
         f'from {c.steps} steps, of which drop_last = {c.drop_last} are left out'),
        (not policy or not kinds[c.reward].group or c.group_size > 1, f'group_size = 1: reward = '
         f'{c.reward!r} compares the samples of one prompt; at least 2 (Flow-OPD: 16)'),
        (not policy or c.eta > 0, 'eta = 0: a policy gradient needs a random policy; Flow-OPD has '
         '0.7'),
        (not policy or c.rollout_guidance == c.student_guidance, 'a policy gradient improves the '
         'policy that drew the samples: rollout_guidance and student_guidance must be equal'),
        (c.kl_var == 'true' or not policy or kinds[c.reward].attached, "kl_var = 'code' is about "
         f"a KL that keeps its gradient; reward = {c.reward!r} has none: leave it at 'true'"),
        (c.kl_var == 'true' or c.eta, "kl_var = 'code' is about an SDE's variance: it needs eta "
         'above 0'),
        (c.sde != 'cps' or not c.eta or not kl or (c.drop_last and c.kl_var == 'true'), "sde = "
         "'cps' ends without noise, where the KL has no value: set drop_last = 1, kl_var = 'true'"),
        (not c.anchor_beta or c.anchor, 'anchor_beta is set but there is no anchor: set anchor = '
         "'base'"),
        (not c.anchor or c.anchor_beta, 'anchor is set but anchor_beta is 0: set both (Flow-OPD: '
         '0.04)')])


def check_teachers(c):
    names = [t.get('name') for t in c.teachers if isinstance(t, dict)]
    for t in c.teachers:
        check_entry(t, 'teacher', 'name', 'name lora checkpoint guidance weight make')
        name = t.get('name')
        require([
            (isinstance(name, str) and name.isidentifier() and name not in ('student', 'default')
             and not hasattr(torch.nn.ModuleDict(), name), f'teacher name {name!r}: a word of '
             'letters, digits and _, and none that torch uses as "half"'),
            (names.count(name) == 1, f'two teachers are called {name!r}; give each its own name'),
            (is_number(t.get('guidance', 1)), f'teacher {name!r}: guidance must be more than 0, '
             f'not {t.get("guidance")!r}{UNGUIDED}')])
        need('weight' not in t or c.mixing == 'soft', f'teacher {name!r}: its weight is for mixing '
             "= 'soft'; how often it is asked says the weight of its route")
        check_weights(t, name)
    need(c.anchor in ('', 'base', *names), f'anchor: no teacher is called {c.anchor!r}; there are: '
         f'{", ".join(names)}')
    return names


def check_weights(t, name):
    """Where a teacher's weights are; an adapter is whole and readable."""
    texts = {k: t.get(k) or '' for k in ('lora', 'checkpoint', 'make')}
    for k, x in texts.items():
        need(isinstance(x, str), f'teacher {name!r}: {k} should be text, not {x!r}')
    path = texts['lora'] or texts['checkpoint']
    need(not (texts['lora'] and texts['checkpoint']),
         f'teacher {name!r} has both lora and checkpoint')
    need(name != 'base' or not path, 'the name "base" is the frozen base\'s: give this another')
    mend = REMAKE * path.startswith('data/shapes')
    if texts['make']:
        mend = f'; make it with:\n    {texts["make"]}'
    if path:
        check_path(f'teacher {name!r}', path, mend)
    if texts['lora'] and not is_hub_id(path):
        merge_lora.read_adapter(path)
    folder = Path(path).expanduser()
    need(not texts['checkpoint'] or is_hub_id(path) or any(
        (folder / k).is_file() for k in ('config.json', 'model_index.json')),
         f'teacher {name!r}: {path} is no model: it has neither config.json nor model_index.json')


def check_entry(x, what, key, known):
    need(isinstance(x, dict), f'{x!r}: teachers are dict(name=..., lora=...), routes '
         'dict(teacher=..., data=...)')
    odd = sorted(map(str, set(x) - set(known.split())))
    need(not odd, f'{what} {x}: unknown {odd}; known: {known}')
    need(is_number(x.get('weight', 1)), f'{what} {x.get(key)!r}: weight must be more than 0, not '
         f'{x.get("weight")!r}')


def check_routes(c, names):
    need(c.routes, 'routes is empty: give at least one dict(teacher=..., data=...)')
    for r in c.routes:
        check_entry(r, 'route', 'data', 'teacher data weight samples resolution')
        require([
            (isinstance(r.get('data'), str), f'route {r}: data names a bucket, as data="edits"'),
            (r.get('teacher') in names, f'a route names the teacher {r.get("teacher")!r}; there '
             f'are: {", ".join(names)}'),
            ('samples' not in r or c.routes_per_step == 'all',
             "`samples` in a route needs routes_per_step = 'all'"),
            (type(r.get('samples', 1)) is int, f'{r}: samples must be a whole number')])
    labels, G = [r.get('data') for r in c.routes], c.group_size
    need(len(set(labels)) == len(labels), 'two routes have the same data; each needs its own: '
         f'{labels}')
    if c.routes_per_step == 'all':
        parts = [r.get('samples', c.batch_size // len(labels)) for r in c.routes]
        need(sum(parts) == c.batch_size, f"batch_size is {c.batch_size}, but the routes' samples "
             f'sum to {sum(parts)}: set it so')
        each = G * c.updates
        need(all(p > 0 and p % each == 0 for p in parts), f'samples {parts} must be multiples of '
             f'group_size x updates = {each}, so that every update has its share of every route; '
             f'the nearest: {[max(1, round(p / each)) * each for p in parts]}')
    loras = {t['name'] for t in c.teachers if t.get('lora')} & {r['teacher'] for r in c.routes}
    need(c.init_from != 'merge' or loras, "init_from = 'merge' needs a route to a LoRA teacher; "
         "or begin with init_from = 'base'")
    return labels


def check_rewards(c):
    """A teacher's."""
    for x in c.reward:
        known = isinstance(x, dict) and set(x) <= {'reward', 'weight'}
        need(known and isinstance(x.get('reward'), str), f'reward {x!r}: a dict(reward=name, '
             'weight=number)')
        need(is_number(x.get('weight', 1)), f'reward {x["reward"]!r}: weight must be more than 0, '
             f'not {x.get("weight")!r}')
    names = [x['reward'] for x in c.reward]
    need(len(set(names)) == len(names), f'reward: one stands there twice: {", ".join(names)}')
    for name in names + [c.watch_reward] * bool(c.watch_reward):
        rewards.check(name)


def pixels(x):
    """A resolution as (height, width)."""
    size = (x, x) if type(x) is int else tuple(x) if isinstance(x, (list, tuple)) else ()
    need([type(n) for n in size] == [int, int],
         f'resolution: a number, or [height, width], not {x!r}')
    return size


def check_data(c, families, labels=(), need_target=False):
    """Training and held-out buckets, every picture looked at; can the model take these sizes?"""
    c.resolution = list(pixels(c.resolution))
    for k in ('data', 'eval_data'):
        odd = [x for x in getattr(c, k) if not isinstance(x, str)]
        need(not odd, f'{k}: paths of files, not {odd[:1]}')
    check_path('model', c.model, REMAKE * ('shapes' in c.model))
    data = open_buckets(c.data, c.eval_data, labels, need_target)
    c.routes = [dict(r, size=pixels(r.get('resolution', c.resolution))) for r in c.routes or
                [dict(data=k, weight=float(len(b))) for k, b in data.buckets.items()]]
    family, data.pipeline, configs = peek(c.model, families, c.family)
    check_sizes(family, data.pipeline, configs, c.routes, data)
    return data


def peek(path, families, family=''):
    """What is known without weights: (family's class, pipeline's name, {component: config}); of a
    hub id no more than what is given, None and ''."""
    configs = model_configs(path)
    pipeline = configs.get('index', {}).get('_class_name', '')
    known = find_family(families, pipeline, family) if family or pipeline else None
    return known, pipeline if not family or ':' in family else family, configs


def check(c, defaults, families, choices):
    """train_opd.py's."""
    names = check_teachers(c)                                  # first: a start may be one of them
    if c.drop_last is None:
        check_path('model', c.model)
        family, _, _ = peek(c.model, families, c.family)
        need(family, f'{c.model} is not here: how many last steps are not learned from goes by its '
             'family; set family, or drop_last')
        c.drop_last = family.drop_last
    check_settings(c, defaults, choices)
    check_method(c, choices['method'][c.method].settings, choices['reward'])
    labels = check_routes(c, names)
    data = check_data(c, families, labels, c.states == 'data')
    edits = {b.sources > 0 for b in data.buckets.values()}
    need(c.mixing == 'hard' or len(edits) == 1,
         "mixing = 'soft' needs routes that all edit, or none")
    return data


def tell_dry_run(c, world):
    """The end of a dry run: what it could not look at, if there is something."""
    starts = [('init_from', c.init_from)] * (c.init_from not in STARTS)
    named = [('model', c.model), *starts, *(
        (f'teacher {t["name"]}', t.get('lora') or t.get('checkpoint'))
        for t in getattr(c, 'teachers', ()))]
    unseen = [f'{what} {path}' for what, path in named if path and is_hub_id(path)]
    asked = [r['reward'] for r in c.reward] if isinstance(c.reward, list) else []
    asked += [c.watch_reward] if getattr(c, 'watch_reward', '') else []
    asked += [c.score] if c.score else []
    unseen += [f'reward {name}' for name in asked if name.partition('@')[0] in rewards.MODELS]
    if world.rank == 0:
        print('dry run: settings and data are fine' + bool(unseen) *
              f'; not looked at, for they come from elsewhere: {", ".join(unseen)}')
