"""
The papers in miniature: what they claim, asked again in the shapes world, with seeds, at equal
cost.

    python data/shapes/papers.py --list             what there is to run, and what each will cost
    python data/shapes/papers.py --jobs=2           what is missing, each a process of one thread
    python data/shapes/papers.py --only=start,k4    questions or arms of data/shapes/questions.py
    python data/shapes/papers.py --report           docs/papers.md and its plots of what is there

A run is an ordinary one of train_opd.py, in out/papers/<arm>/<seed>; five of its checkpoints, of a
pilot's the last, are scored afterwards. It can be killed at any moment, and the same command goes
on. Its numbers are data/shapes/papers/<arm>-<seed>.json: these are committed. The plots need
matplotlib.

Cost is what is equal: forwards, those with gradient three times, with guidance double, as the code
counts them. Of an arm with several rates all are run with the first seed, and scored at their ends
alone; the best is scored at its other points too, and run with the other seeds.
"""
import os, signal, subprocess, sys, time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
import configurator
import report as reports
from configurator import need
from questions import ARMS, MAKES, QUESTIONS, SEEDS
from runs import BUDGET, POINTS, Run, arm_of, folder_of, make, needs, parsed, result_of
from support.disk import write_text
from support.run import locked

jobs = 1                            # processes side by side
only = ''                           # questions or arms, with commas; '' is all
list = False                        # say what there is to run and what it costs
report = False                      # write the report
run = ''                            # one run, <arm>/<seed>: what the jobs are
out = 'out/papers'
results = 'data/shapes/papers'
docs = 'docs'
budget = BUDGET                     # forwards of a run: the demonstration's
rows = 256                          # pictures behind a score
SETTINGS = configurator.collect(sys.modules[__name__])
# seconds on one thread of an AMD EPYC: a forward that counts one, in training; a picture that
# is scored, its gap included; and of a run's beginning
UNIT, PICTURE, BEGIN = 0.0036, 0.030, 20


# --------------------------------------------------------------------------------------------------
# What there is to run

def done(r, c, found):
    if r.name in MAKES:
        return (folder_of(r, c) / 'done').exists()
    return (r.name, r.seed) in found and not reports.half_scored(r.name, r.seed, found)


def wanted(c, found):
    """All runs, the most important first; with a rate of '?' where it is not yet known."""
    chosen = {}
    asked = c.only.split(',') if c.only else QUESTIONS
    for key in asked:
        need(key in (*QUESTIONS, *ARMS), f'only: {key!r} is no question and no arm; questions are: '
             f'{", ".join(QUESTIONS)}')
    for key in asked:
        for seed in range(SEEDS):
            for name in QUESTIONS[key].arms if key in QUESTIONS else [key]:
                arm, best = ARMS[name], reports.best_rate(name, found)
                if arm.script == 'look' and seed:
                    continue
                tried = [Run(f'{name}@{x:g}', 0) for x in arm.rates] if not seed else []
                for r in tried or [Run(best or f'{name}@?', seed)]:
                    chosen |= dict.fromkeys([*before(r, c), r])
    return [*chosen]


def before(r, c):
    """What a run waits for, and what that waits for."""
    return [x for one in needs(r, c) for x in (*before(one, c), one)]


def missing(c, found):
    """Runs without a result; and those again whose weights are gone while others wait for them."""
    todo = [r for r in wanted(c, found) if not done(r, c, found)]
    gone = {x for r in todo for x in before(r, c) if not (folder_of(x, c) / 'done').exists()}
    return [r for r in wanted(c, found) if r in todo or r in gone]


def ready(r, c):
    return '?' not in r.name and all((folder_of(x, c) / 'done').exists() for x in needs(r, c))


# --------------------------------------------------------------------------------------------------
# All runs

def cost_of(r, c):
    """Forwards of a run, in training."""
    if r.name in ('make-own', 'make-half') or arm_of(r).script == 'look':
        return 0
    return round(c.budget * arm_of(r).cost)


def left_of(r, c):
    """Of these, forwards that are still to come: some runs have only to be scored."""
    return 0 if (folder_of(r, c) / 'done').exists() else cost_of(r, c)


def minutes_of(r, c, found):
    """What a run will take on one thread, by what was measured."""
    if r.name in ('make-own', 'make-half'):
        return 5.0
    one = arm_of(r).script == 'look' or reports.end_only(r.name, r.seed, found)
    points = 0 if r.name in MAKES else 1 if one else POINTS
    pictures = points * c.rows * len(arm_of(r).scored)
    return (BEGIN + left_of(r, c) * UNIT + pictures * PICTURE) / 60


def say_all(c, found):
    """--list."""
    todo, total = missing(c, found), 0.0
    print(f'{"":26s} {"cost":>10s} {"minutes":>8s}')
    for r in wanted(c, found):
        minutes = minutes_of(r, c, found)
        total += minutes if r in todo else 0.0
        print(f'{r.name + "/" + str(r.seed):26s} {cost_of(r, c):10d} {minutes:8.1f}'
              f'{"" if r in todo else "  is there"}')
    print(f'{len(todo)} runs to do: {sum(left_of(r, c) for r in todo) / 1e6:.1f} million forwards '
          f'and the scores, {total / 60:.1f} h on one thread, {total / 60 / c.jobs:.1f} h with '
          f'--jobs={c.jobs}')


def begin(r, c):
    """A process of one thread; what it says goes to out/papers/<arm>/<seed>.txt."""
    log = folder_of(r, c).with_suffix('.txt')
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [f'--{k}={getattr(c, k)!r}' for k in ('out', 'results', 'budget', 'rows')]
    with open(log, 'a') as f:
        return subprocess.Popen([sys.executable, __file__, f'--run={r.name}/{r.seed}', *words],
                                env=dict(os.environ, OMP_NUM_THREADS='1'), stdout=f, stderr=f)


def run_all(c):
    """The order is that of the questions; a run that waits for another is passed by."""
    Path(c.out).mkdir(parents=True, exist_ok=True)
    lock = locked(Path(c.out))                                 # one study at a time
    running, broken, t0 = {}, set(), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            found = reports.load(c.results)
            todo = [r for r in missing(c, found) if r not in broken]
            free = [r for r in todo if r not in running and ready(r, c)]
            running |= {r: begin(r, c) for r in free[:c.jobs - len(running)]}
            if not running:
                break
            while all(p.poll() is None for p in running.values()):
                time.sleep(0.2)
            for r in [r for r, p in running.items() if p.poll() is not None]:
                code, todo = running.pop(r).returncode, [x for x in todo if x != r]
                broken |= {r} if code else set()
                hours = sum(minutes_of(x, c, found) for x in todo) / 60 / c.jobs
                print(f'{(time.time() - t0) / 60:6.1f} min  {r.name}/{r.seed} '
                      f'{f"ended with {code}" if code else "done"}; {len(todo)} runs to do, about '
                      f'{hours:.1f} h', flush=True)
    finally:
        for p in running.values():
            p.terminate()
        lock.close()
    need(not broken, f'without a result, see {c.out}/<arm>/<seed>.txt: '
         + ', '.join(f'{r.name}/{r.seed}' for r in sorted(broken)))


def report_of(c, found):
    c.only = ''
    return reports.text(found, sum(r.name not in MAKES for r in wanted(c, found)))


def main(argv):
    c = configurator.configure(SETTINGS, argv)
    found = reports.load(c.results)
    if c.run:
        return make(parsed(c.run), c, found)
    if c.list:
        return say_all(c, found)
    if c.report:
        write_text(Path(c.docs) / 'papers.md', report_of(c, found))
        return reports.draw_all(found, Path(c.docs) / 'papers')
    run_all(c)


if __name__ == '__main__':
    configurator.run(main)
