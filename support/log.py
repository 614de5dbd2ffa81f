"""
What a run tells: numbers of samples and steps, as lines for people and as entries of log.jsonl.
"""
import json, math, resource, sys, time

import torch
from tqdm import tqdm

from configurator import BadInput, need
from support.disk import write_text, writing
from support.files import one_line
from support.processes import gather

SUMS = 'groups', 'skipped_groups', 'cost'              # in the log; other numbers are means
BAD = 5                                                # so many skipped of the last 20 end a run


class Log:
    """log.jsonl, which one process writes. `history` are its entries, `notes` what has been noted
    since the last, `told` functions that are told of each entry as well."""

    def __init__(self, path, world):
        self.path, self.world, self.begun, self.told = path, world, False, []
        self.history, self.notes, self.updates = [], [], {}
        self.at, self.bad_at = '', ''                          # where the last loss was, a bad one
        self.t0 = time.time()

    def resume(self, step, notes):
        """Goes on from a step, with what had been noted there by all processes."""
        self.notes = [] if self.world.rank else notes
        self.history = [e for e in read_log(self.path) if e['step'] <= step]
        if step and not self.history:
            self.say(f'{self.path} has no entries: the log begins anew at step {step}')

    def say(self, text):
        if self.world.rank == 0:
            tqdm.write(text)                                   # above the bar, if there is one
            sys.stdout.flush()

    def add(self, entry):
        """To the log. Before the first, what came after the checkpoint that is resumed goes."""
        self.history.append(entry)
        if self.world.rank:
            return
        if not self.begun:
            write_text(self.path, ''.join(json.dumps(e) + '\n' for e in self.history))
            self.begun = True
        else:
            with writing(self.path), open(self.path, 'a') as f:
                f.write(json.dumps(entry) + '\n')
        for tell in self.told:
            tell(entry)

    def note(self, batch, **numbers):
        """Numbers of each sample, for the next report; gap and reward also by route."""
        columns = {k: v.tolist() for k, v in numbers.items()}  # one wait for the device a number
        for j, s in enumerate(batch):
            note = {k: v[j] for k, v in columns.items()}
            self.at = f'route {s.label}, sigma {note.get("sigma", math.nan):.3f}'
            if not all(map(math.isfinite, note.values())):
                self.bad_at = self.at
            self.notes.append(note | {f'train_{k}/{s.label}': note[k]
                                      for k in ('gap', 'reward') if k in note})

    def tally(self, **numbers):
        """Numbers of a whole step."""
        self.notes.append(numbers)

    def watch(self, step, norm, student):
        """After each update. A skipped one is counted and named; too many end the run."""
        self.updates = dict(skipped=student.skipped, idle=student.idle)
        bad_at, self.bad_at = self.bad_at, ''
        if math.isfinite(norm):
            return self.tally(grad_norm=norm)
        where = [x for x in gather(self.world, [bad_at]) if x]
        where = where[0] if where else f'{self.at}, whose loss was finite'
        many = sum(student.recent)
        self.say(f'step {step + 1}: update skipped, its gradient was not finite ({where})')
        need(many < BAD, f'{many} of the last {len(student.recent)} updates had no finite '
             f'gradient, lastly at {where}. Lower lr, or use dtype=float32; the last checkpoint in '
             f'{self.path.parent} is from before')

    def glance(self, samples):
        """For the bar: the last sample's numbers, and the step's routes."""
        note = next((n for n in reversed(self.notes) if 'loss' in n), {})
        shown = {k: f'{note[k]:.3g}' for k in ('loss', 'gap', 'reward') if k in note}
        return shown | dict(route='+'.join(dict.fromkeys(s.label for s in samples)))

    def report(self, step, **entry):
        """An entry of the log, and a line for people: means of what was noted; some are sums."""
        notes, self.notes = gather(self.world, self.notes), []
        peak = peak_memory() / 1e9
        entry = dict(step=step, **entry, **self.updates,
                     seconds=round(time.time() - self.t0, 1), memory_gb=round(peak, 2))
        for k in sorted({k for n in notes for k in n}):
            some = [n[k] for n in notes if k in n]             # fsum: in any order the same
            total = math.fsum(some) / (1 if k in SUMS else len(some))
            entry[k] = max(some) if k == 'ratio_off' else total
        self.add(entry)
        told = 'loss', 'gap', 'reward', 'kl', 'sigma', 'ratio_off', 'grad_norm'
        shown = [f'{k.removeprefix("train_")} {v:.4g}' for k, v in entry.items()
                 if k in told or k.startswith('train_')]
        spent = f'{entry["seconds"]:.0f} s', f'{peak:.1f} GB'
        self.say('  '.join([f'step {step:6d}', *shown, *spent]))

    def ends(self, name):
        """The first and the last value of an evaluated number; a log may have lost the first."""
        found = {e['step']: e[name] for e in self.history if name in e}
        return (dict(before=found[0]) if 0 in found else {}) | dict(after=found[max(found)])


def peak_memory():
    """Bytes: the GPU's, or the process's, which Linux counts in thousands."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == 'darwin' else 1024)


def read_log(path):
    """The entries of a log. A kill cuts its last line; in any other there is something."""
    try:
        *lines, cut = path.read_bytes().split(b'\n') if path.exists() else [b'']
    except OSError as e:
        raise BadInput(f'{path} cannot be read: {e.strerror}') from e
    entries = []
    for n, line in enumerate(lines, 1):
        try:
            entry = json.loads(line.decode())
            if type(entry['step']) is not int or not all(
                    type(x) in (int, float) for x in entry.values()):
                raise ValueError('a value that is no number')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise BadInput(f'{path}, line {n} is damaged ({one_line(repr(e))}); mend it, or take '
                           'it out') from e
        entries.append(entry)
    return entries
