"""
One run of data/shapes/papers.py: its settings, its training by train_opd.py or train_teacher.py,
and the scores of its checkpoints. `r` is a Run, `c` the settings of papers.py.
"""
import ast, csv, functools, json, math, os, platform, subprocess, sys, time
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
import configurator
import prepare
import report as reports
import train_opd
import train_teacher
from configurator import BadInput, need
from questions import ARMS, COMMON, MAKES, ROLLOUT, SCORED, SEEDS, SKILLS
from support import checks, rehearsal
from support.disk import write_text
from support.files import load_function, read_data
from support.log import read_log
from support.run import checkpoints, newest
from train_opd import FAMILIES, Models, plan

POINTS = 5                              # of a run: checkpoints that are scored
BUDGET = 46750                          # forwards of a run: the demonstration's
UPDATES = 250                           # that the common recipe makes of it
ALONE = SimpleNamespace(rank=0, size=1)
Run = namedtuple('Run', 'name seed')    # the name of an arm, with @rate if it has several


def parsed(text):
    name, _, seed = text.rpartition('/')
    need(arm_name(name) in ARMS | MAKES and seed.isdigit(), f'--run={text}: <arm>/<seed>; arms are '
         f'{", ".join(ARMS)}')
    return Run(name, int(seed))


def arm_name(name):
    return name.partition('@')[0]


def arm_of(r):
    return (ARMS | MAKES)[arm_name(r.name)]


def folder_of(r, c):
    return Path(c.out) / r.name / str(r.seed)


def result_of(r, c):
    return Path(c.results) / f'{r.name}-{r.seed}.json'


def needs(r, c):
    """Runs whose weights or pictures this one begins with."""
    if r.name == 'make-own' or r.name == 'make-half':
        return []
    return [parsed(filled(x, r, c)) for x in arm_of(r).needs]


# --------------------------------------------------------------------------------------------------
# Settings

def filled(x, r, c):
    """Settings with the study's folder and the run's seed in their places."""
    known = dict(out=c.out, seed=r.seed, other=(r.seed + 1) % SEEDS)
    text = repr(x)
    for k, v in known.items():
        text = text.replace(f'{{{k}}}', str(v))
    return ast.literal_eval(text)


def checked(r, c):
    """A run's script, words of its command line, settings and data, as the script's own checks
    leave them. How many steps it has is not among them."""
    arm, _, rate = arm_of(r), *r.name.partition('@')[1:]
    script = train_teacher if arm.script == 'train_teacher' else train_opd
    own = dict(filled(arm.settings, r, c), seed=r.seed, out_dir=str(folder_of(r, c)))
    words = [own.pop('config')] if 'config' in own else []
    own = own if script is train_teacher else COMMON | own
    own |= dict(lr=float(rate)) if rate not in ('', '?') else {}
    own |= dict(score='', eval_samples=4, show=1, ckpt_keep=100)
    words += [f'--{k}={v!r}' for k, v in own.items()]
    s = checks.own_settings(script.SETTINGS, words)
    data = script.check(s) if script is train_teacher else \
        checks.check(s, script.SETTINGS[0], FAMILIES, train_opd.CHOICES)
    return script, words, s, data


def steps_of(arm, script, s, data, c):
    """As many steps as the budget pays for."""
    if 'max_steps' in arm.settings:                            # GRPO's cost is known only after
        n = arm.settings['max_steps'] * c.budget / BUDGET
    else:
        n = (c.budget * arm.cost - spent(arm, c)) / rehearsed(script, s, data)
    return max(1, round(n))


def spent(arm, c):
    """Forwards that it begins with."""
    return round(arm.spent * c.budget / BUDGET)


def cost_until(step, r, c, log):
    """Forwards of a run up to a step, as its log has them."""
    return spent(arm_of(r), c) + sum(x.get('cost', 0) for x in log if x['step'] <= step)


def rehearsed(script, s, data, steps=10):
    """Forwards of a step."""
    if script is train_teacher:
        vars(s).update(routes_per_step='sample', teachers=[], mixing='hard', eta=0.0)
    dealt = partial(plan, c=s, buckets=data.buckets)
    return rehearsal.rehearsed(s, dealt, script.METHODS[s.method], Models, steps)


# --------------------------------------------------------------------------------------------------
# Training, and scores

def make(r, c, found):
    """A run's result, or what others need."""
    torch.set_num_threads(1)
    folder = folder_of(r, c)
    if r.name == 'make-own':
        own_pictures(folder, c)
    elif r.name == 'make-half':
        half = configurator.configure(prepare.SETTINGS, [
            '--base_steps=7500', '--base_stop=450', '--base_dropout=0.1',
            f'--work={folder}/work'])
        if not (folder / 'base').exists():
            prepare.train_base(half, folder / '.base')
            os.rename(folder / '.base', folder / 'base')
    else:
        train_and_score(r, c, folder, reports.end_only(r.name, r.seed, found))
    write_text(folder / 'done', '')


def train_and_score(r, c, folder, end_only):
    script, words, s, data = checked(r, c)
    steps, failed = 0, ''
    try:
        if arm_of(r).script != 'look':
            steps = steps_of(arm_of(r), script, s, data, c)
            train(script, [*words, *paced(r, s, steps, c)], steps, folder)
    except BadInput as e:
        # that is a result; all else is not
        need('finite gradient' in str(e) and r.name not in MAKES, str(e))
        failed = str(e)
    if r.name in MAKES:
        return
    points = [] if failed else scores(r, c, s, folder, end_only)
    log = read_log(folder / 'log.jsonl')
    numbers = dict(arm=arm_name(r.name), seed=r.seed, lr=s.lr, steps=steps, rows=c.rows,
                   differs=arm_of(r).settings, cost=cost_until(math.inf, r, c, log),
                   failed=failed, points=points)
    if sigmas := [e['sigma'] for e in log if 'sigma' in e]:
        numbers['sigma'] = sum(sigmas) / len(sigmas)
    about = dict(commit=commit(), seconds=seconds(folder), torch=torch.__version__,
                 machine=processor())
    lines = [f' {json.dumps(k)}: {json.dumps(v)}' for k, v in dict(numbers, about=about).items()]
    write_text(result_of(r, c), '{\n' + ',\n'.join(lines) + '\n}\n')


def paced(r, s, steps, c):
    """The average, which counts updates, and the warm-up, which counts steps, have the same share
    of every run: at equal cost some have a fifth of the steps of others."""
    if r.name in MAKES:
        return []
    whole = UPDATES * arm_of(r).cost * c.budget / BUDGET
    ema, warmup = s.ema_decay ** (whole / steps / s.updates), round(s.warmup * steps / whole)
    return [f'--ema_decay={ema}', f'--warmup={max(1, warmup)}']


def train(script, words, last, folder):
    at = newest(folder)
    if at and int(at.name[5:]) == last:
        return
    begun, t0 = int(at.name[5:]) if at else 0, time.process_time()
    part = -(-last // POINTS)                                  # the last point is the last step
    more = dict(max_steps=last, save_every=part, log_every=part, eval_every=last)
    more |= dict(init_from='resume') if at and (folder / 'start').is_dir() else {}
    script.main(words + [f'--{k}={v}' for k, v in more.items()])
    if int(newest(folder).name[5:]) < last:                    # it was asked to stop
        sys.exit(143)
    if not begun:                                              # of a resumed one it is not known
        write_text(folder / 'seconds', str(time.process_time() - t0))


def scores(r, c, s, folder, end_only):
    """Gap and score of a run's checkpoints, of its last if that is enough, or of a start:
    [dict(step, cost, right, gap)]."""
    arm, copied = arm_of(r), 'model dtype base_storage rank alpha lora_targets ema_decay'
    kept = ROLLOUT | {k: getattr(s, k) for k in copied.split()} | dict(
        routes=[dict(teacher='base', data='local_edit')], routes_per_step='sample',
        data=[f'data/shapes/{k}_val.csv' for k in SKILLS],     # words that are asked for anyway
        init_from=s.init_from if arm.script == 'look' else str(folder / 'start'))
    if 'rollout_guidance' in vars(s):
        kept |= dict(rollout_guidance=s.rollout_guidance, student_guidance=s.student_guidance)
    if s.model != train_opd.SETTINGS[0]['model']:
        kept |= dict(teachers=[dict(name='base')])
    if kept['init_from'] == 'merge':
        kept['routes'] = [{k: v for k, v in x.items() if k != 'size'} for x in s.routes]
    e = checks.own_settings(train_opd.SETTINGS, [f'--{k}={v!r}' for k, v in kept.items()])
    data = checks.check(e, train_opd.SETTINGS[0], FAMILIES, train_opd.CHOICES)
    held = {k: rows_of(SCORED[k][0])[:c.rows] for k in arm.scored}
    log = read_log(folder / 'log.jsonl')
    at = {x['step'] for x in log if 'cost' in x}               # what a stop has saved is no point
    saved = [p for p in checkpoints(folder) if int(p.name[5:]) in at][-1 if end_only else 0:]
    models = Models.open(FAMILIES, e, torch.device('cpu'), data, held, e.teachers,
                         saved[-1] if saved else None)
    found = [scored(p, models, e, held, folder) for p in saved or [None]]
    return [dict(p, cost=cost_until(p['step'], r, c, log)) for p in found]


def scored(checkpoint, models, e, held, folder):
    """Of one checkpoint; kept in the run's folder, so that a kill costs one at most."""
    step = int(checkpoint.name[5:]) if checkpoint else 0
    file, student = folder / f'score_{step:06d}.json', models.student
    if file.exists():
        return json.loads(file.read_text())
    if checkpoint:
        student.load(checkpoint)
    found = dict(step=step, right={}, gap={})
    with student.wearing(student.ema):
        for label, some in held.items():
            _, teacher, judge = SCORED[label]
            route = dict(data=label, teacher=teacher, size=tuple(e.resolution))
            pictures = train_opd.render('student', route, some, models, e, ALONE)
            said = load_function(f'data/shapes/world.py:{judge}')(pictures, some)
            said = [x['right'] if isinstance(x, dict) else x for x in said]
            found['right'][label] = sum(said) / len(said)
            if teacher and teacher in models.teachers and len(models.teachers) > 1:
                found['gap'][label] = train_opd.mean_gap(route, some, models, e, ALONE)
    write_text(file, json.dumps(found))
    return found


def own_pictures(folder, c):
    """The teachers' own pictures of the demonstration's rows, as data to imitate."""
    e = checks.own_settings(train_opd.SETTINGS, [])
    data = checks.check(e, train_opd.SETTINGS[0], FAMILIES, train_opd.CHOICES)
    models = Models.open(FAMILIES, e, torch.device('cpu'), data, data.drawn(0, 1), e.teachers)
    folder.mkdir(parents=True, exist_ok=True)
    for route in e.routes:
        bucket = data.buckets[route['data']]
        some = [bucket[i] for i in range(min(len(bucket), 4 * c.rows))]
        pictures = train_opd.render(route['teacher'], route, some, models, e, ALONE, own=True)
        for i, (row, x) in enumerate(zip(some, pictures)):
            row['target_image'] = f'{route["data"]}_{i:04d}.png'
            row['source_image'] = row['source_image'] and os.path.abspath(row['source_image'])
            prepare.world.to_pil(x).save(folder / row['target_image'])
        with open(folder / f'{route["data"]}.csv', 'w', newline='') as f:
            table = csv.DictWriter(f, ['prompt', 'task', 'source_image', 'target_image'],
                                   extrasaction='ignore')
            table.writeheader()
            table.writerows(dict(row, task=route['data']) for row in some)


@functools.cache
def rows_of(name):
    found, errors = read_data([f'data/shapes/{name}.csv'])
    need(not errors, '; '.join(errors))
    return [b[i] for b in found.values() for i in range(len(b))]


def seconds(folder):
    """Of training, its processor's own: others may work beside it. None where it is not known."""
    spent = folder / 'seconds'
    return round(float(spent.read_text()), 1) if spent.exists() else None


def commit():
    said = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True)
    return said.stdout.strip()


def processor():
    info = Path('/proc/cpuinfo')
    names = [x.partition(':')[2].strip() for x in info.read_text().splitlines()
             if x.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor()
