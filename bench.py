"""
How fast are a run's steps here? Settings are train_opd.py's, and those below. See docs/speed.md

    python bench.py --device=cpu --sizes=12,24 --batches=4,16               the shapes
    python bench.py config/sd35_opd.py --sizes=512,1024 --batches=1,2,4,8 --switches=plain,compile
"""
import copy, itertools, multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

import configurator
import train_opd as T
from configurator import collect, need
from support import checks
from support.files import one_line
from support.log import peak_memory
from support.processes import launch

sizes: int | list = [12, 24]        # pixels
batches: int | list = [4, 16]       # samples a forward
switches = 'plain,checkpointing,float8'    # or compile; with + several at once
first_steps = 2                     # not counted: words are encoded, graphs compiled
timed_steps = 5
SETTINGS = tuple({**a, **b} for a, b in zip(T.SETTINGS, collect(sys.modules[__name__])))
SWITCHES = dict(plain=dict(grad_checkpointing=False, compile=False, base_storage=''),
                checkpointing=dict(grad_checkpointing=True), compile=dict(compile=True),
                float8=dict(base_storage='float8'))


def measure(c):
    """Samples a second, forwards a sample, the network's share of the time, GB."""
    data = checks.check(c, SETTINGS[0], T.FAMILIES, T.CHOICES)
    for bucket in data.buckets.values():
        del bucket.place[64:]                                  # few words need be encoded
    world, inside = launch(c.device, c.tf32), []
    models = T.Models.open(T.FAMILIES, c, world.device, data, data.drawn(c.seed, 1), c.teachers)
    gpu = world.device.type == 'cuda'

    def now():                                                 # a CPU's own seconds, of all threads
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if gpu else time.process_time()

    def timed(function, *a):
        began, out = now(), function(*a)
        inside.append(now() - began)
        return out
    for field in (models.field, *models.full.values()):
        field.velocity = partial(timed, field.velocity)
    for step in range(c.first_steps + c.timed_steps):
        if step == c.first_steps:
            gpu and torch.cuda.reset_peak_memory_stats()       # words were encoded before
            start, inside[:], models.spent = now(), [], 0
        for terms in T.METHODS[c.method].updates(T.plan(step, c, data.buckets, world), models, c):
            for term in terms:
                timed(sum(s.share * x for s, x in zip(term.batch, term.loss)).backward)
            models.student.update(T.learning_rate(step, c), c, world)
    seconds, n = now() - start, c.timed_steps * c.batch_size
    return n / seconds, models.spent / n, sum(inside) / seconds, peak_memory() / 1e9


def main(argv):
    c = checks.own_settings(SETTINGS, argv)
    for k in c.switches.replace('+', ',').split(','):
        need(k in SWITCHES, f'switches: {k!r} is not one of {", ".join(SWITCHES)}')
    print(f'{c.model}, {c.method}, {len(c.routes)} routes, {c.steps} steps\n\n'
          '| pixels | batch | switches | samples/s | s/sample | forwards/sample | network | GB |\n'
          f'{"|---" * 8}|')
    for size, batch, names in itertools.product(
            *([x] if type(x) is int else x for x in (c.sizes, c.batches)), c.switches.split(',')):
        own, row = copy.deepcopy(c), f'| {size} | {batch} | {names} |'
        vars(own).update(
            batch_size=batch * len(c.routes), micro_batch=batch, routes_per_step='all',
            routes=[{**r, 'samples': batch, 'resolution': size} for r in c.routes])
        for name in ('plain', *names.split('+')):
            vars(own).update(SWITCHES[name])
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            try:
                x = pool.submit(measure, own).result()
                row += f' {x[0]:.2f} | {1 / x[0]:.3g} | {x[1]:.1f} | {x[2]:.0%} | {x[3]:.2f} |'
            except (RuntimeError, MemoryError) as e:           # no room, or it was killed for that
                row += f' {one_line(e, 70)} |'
        print(row, flush=True)


if __name__ == '__main__':
    configurator.run(main)
