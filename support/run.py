"""
A run's folder: log.jsonl, samples/, result.json, and checkpoints step_*/ with a link `latest`. A
checkpoint is renamed into place when it is whole: a run can be killed at any moment.
"""
import fcntl, hashlib, json, math, os, re, resource, shutil, socket, sys, time
from pathlib import Path

import torch
from tqdm import tqdm

import merge_lora
from configurator import BadInput, need
from support.disk import place, write_text, writing
from support.files import RewardError, draw_pairs, grid, judged, one_line
from support.plot import curve
from support.processes import gather

SUMS = 'groups', 'skipped_groups', 'cost'              # in the log; other numbers are means
BAD = 5                                                # so many skipped of the last 20 end a run


class Folder:
    """Where a run keeps its log, pictures and checkpoints; one process writes. `resumed` is the
    checkpoint that is resumed, or None, `first` its step, `state` what a method keeps besides
    weights, `stills` pictures that do not change."""

    def __init__(self, c, world, teachers=()):
        self.c, self.world, self.out, self.state, self.stills = c, world, Path(c.out_dir), [], {}
        self.first, self.notes, self.history, self.t0 = 0, [], [], time.time()
        self.log, self.begun, self.trackers = self.out / 'log.jsonl', False, []
        self.at, self.bad_at = '', ''                          # where the last loss was, a bad one
        paths = {t['name']: t.get('lora') or t.get('checkpoint') or c.model for t in teachers}
        found = {t['name']: merge_lora.find(t['lora']) for t in teachers if t.get('lora')}
        self.meta = dict(
            settings={k: v for k, v in vars(c).items() if k not in ('dry_run', 'device')},
            teachers={k: dict(path=p, sha256=sha256(found.get(k, p))) for k, p in paths.items()})
        resume = c.init_from == 'resume'
        if world.rank == 0:                                    # one process looks after the folder
            self.lock = locked(self.out)
            claim(self.out, resume, self.meta)
        gather(world, [])
        self.resumed = newest(self.out) if resume else None
        need(len(set(gather(world, [self.resumed and self.resumed.name]))) == 1,
             f'{self.out} has to be one folder for all machines, but they see different ones')
        if self.resumed:
            self.read()

    def read(self):
        """What a resume goes on with."""
        old = read_meta(self.resumed / 'meta.json')
        self.meta['settings']['init_from'] = old['settings']['init_from']
        self.first, self.state = old['step'], old['state']
        if self.world.rank == 0:                               # the others' are in it
            self.notes = old['notes']
        self.history = [e for e in read_log(self.log) if e['step'] <= self.first]
        if self.first and not self.history:
            self.say(f'{self.log} has no entries: the log begins anew at step {self.first}')

    def begin(self, models, data, held, render=None):
        """Before the first step: what it starts from, and edit pairs to be looked at, as files; and
        the score is asked once, so that it does not fail at the end."""
        self.student, self.prefix, c = models.student, models.field.prefix, self.c
        for name, text in models.derived():
            self.say(f'{name:22s} {text}')
        if render and c.score and c.score_samples:
            rows = held[c.routes[0]['data']][:1]
            judged(c.score, render('student', c.routes[0], rows), rows, 1, self.world)
        if self.resumed:
            return self.say(f'resumed {self.resumed}')
        if self.world.rank == 0:
            start = self.student.modules(self.student.start)
            with writing(self.out / 'start'):
                merge_lora.write_adapter(self.out / 'start', start, self.student.alpha, self.prefix)
            draw_pairs(data.buckets, self.out / 'samples')
        self.save(0, models)

    def save(self, step, models):
        notes = gather(self.world, self.notes)
        if self.world.rank == 0:
            meta = {**self.meta, 'state': self.state, 'notes': notes, 'step': step}
            save_checkpoint(self.out, step, self.student.save, self.prefix, meta, self.c.ckpt_keep)
        gather(self.world, [])
        self.world.stop.busy = False                           # until the next step nothing is lost

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
            write_text(self.log, ''.join(json.dumps(e) + '\n' for e in self.history))
            self.trackers = trackers(self)
            self.begun = True
        else:
            with writing(self.log), open(self.log, 'a') as f:
                f.write(json.dumps(entry) + '\n')
        for tell in self.trackers:
            tell(entry)

    def bar(self):
        steps, quiet = self.c.max_steps, None if self.world.rank == 0 else True
        return tqdm(range(self.first, steps), initial=self.first, total=steps,
                    disable=quiet)                             # None: where nobody looks

    def evaluated(self):
        """Is the step that this run begins with not one to evaluate, or is that in the log?"""
        due = self.first % self.c.eval_every == 0 or self.first == self.c.max_steps
        return not due or any(e['step'] == self.first and 'lr' not in e for e in self.history)

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
        """A skipped update is counted and named; too many end the run."""
        bad_at, self.bad_at = self.bad_at, ''
        if math.isfinite(norm):
            return
        where = [x for x in gather(self.world, [bad_at]) if x]
        where = where[0] if where else f'{self.at}, whose loss was finite'
        many = sum(student.recent)
        self.say(f'step {step + 1}: update skipped, its gradient was not finite ({where})')
        need(many < BAD, f'{many} of the last {len(student.recent)} updates had no finite '
             f'gradient, lastly at {where}. Lower lr, or use dtype=float32; the last checkpoint in '
             f'{self.out} is from before')

    def glance(self, samples):
        """For the bar: the last sample's numbers, and the step's routes."""
        note = next((n for n in reversed(self.notes) if 'loss' in n), {})
        shown = {k: f'{note[k]:.3g}' for k in ('loss', 'gap', 'reward') if k in note}
        return shown | dict(route='+'.join(dict.fromkeys(s.label for s in samples)))

    def report(self, step, **entry):
        """An entry of the log, and a line for people: means of what was noted; some are sums."""
        notes, self.notes = gather(self.world, self.notes), []
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
        entry = dict(step=step, **entry, skipped=self.student.skipped, idle=self.student.idle,
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

    def draw(self, step, lines, heads):
        """Lines of (caption, picture, picture, ...) as a picture of the step."""
        if self.world.rank == 0:
            captions, *columns = zip(*lines)
            grid([*zip(*columns)], self.out / 'samples' / f'step_{step:06d}.png', captions, heads)
            self.curves()

    def curves(self):
        gaps = sorted({k for e in self.history for k in e if k.startswith('gap/')})
        curve(self.history, self.out / 'loss.png', ['loss', 'reward', *gaps])

    def conclude(self, held, models, render):
        """result.json: by route, the gap before and after, and what the score says of everyone. A
        score that fails loses nothing else."""
        result, c, failed = {}, self.c, ''
        for route in c.routes:
            name = f'gap/{route["data"]}'
            gaps = {e['step']: e[name] for e in self.history if name in e}
            before = dict(gap_before=gaps[0]) if 0 in gaps else {}     # a log may be gone
            result[route['data']] = dict(before, gap_after=gaps[max(gaps)])
        try:
            for route in c.routes if c.score and c.score_samples else ():
                result[route['data']] |= self.scores(route, held, models.student, render)
        except RewardError as e:                               # in all processes alike
            failed = str(e)
        self.end(result)
        if failed:
            raise RewardError(f'{failed}. The gaps are in {self.out}/result.json; score later '
                              f'with: python sample.py --ckpt {self.out} --score={c.score}')

    def scores(self, route, held, student, render):
        rows, found = held[route['data']][:self.c.score_samples], {}
        everyone = dict(base=('base', None), teacher=(route['teacher'], None),
                        start=('student', student.start), student=('student', student.ema))
        for name, (who, weights) in everyone.items():
            with student.wearing(weights):
                pictures = render(who, route, rows, own=name == 'teacher')
            found[name] = judged(self.c.score, pictures, rows, self.c.micro_batch, self.world)
        return found

    def end(self, result, name='route'):
        """The result, as a file and for people, and the log's curves."""
        self.world.stop.over()
        if self.world.rank == 0:
            write_text(self.out / 'result.json', json.dumps(result, indent=1))
            self.curves()
            table(result, name)
            if self.student.skipped:
                print(f'{self.student.skipped} updates were skipped: their gradients were not '
                      'finite')
            print(f'{time.time() - self.t0:.0f} s; {self.out}/latest holds the adapter, '
                  f'{self.out}/samples the pictures, {self.out}/loss.png the curves. '
                  f'Try: python sample.py --ckpt {self.out}')


def trackers(folder):
    """Functions that are told of each entry of the log: wandb, tensorboard, if asked for."""
    c, found = folder.c, []
    if c.wandb_log:
        import wandb
        mark = folder.out / 'wandb_id'                         # a resume continues its own line
        if not folder.resumed or not mark.exists():
            write_text(mark, f'{folder.out.name}-{time.time_ns():x}')
        wandb = wandb.init(project=c.wandb_project, name=folder.out.name, id=mark.read_text(),
                           resume='allow', config=folder.meta['settings'])
        found.append(lambda entry: wandb.log(entry, step=entry['step']))
    if c.tensorboard_log:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder.out / 'tensorboard', purge_step=folder.first + 1)
        found.append(lambda entry: [board.add_scalar(k, v, entry['step'])
                                    for k, v in entry.items()])
    return found


def table(rows, name):
    """{row: {column: number}} for people."""
    heads = list(dict.fromkeys(h for row in rows.values() for h in row))
    print('\n' + f'{name:24s}' + ''.join(f'{h:>12s}' for h in heads))
    for k, row in rows.items():
        print(f'{k:24s}' + ''.join(f'{row[h]:12.3f}' if h in row else f'{"-":>12s}' for h in heads))


# --------------------------------------------------------------------------------------------------
# Files

def read_meta(path):
    """What a checkpoint says of itself, of the kinds that are worked with."""
    path, named = Path(path), {'state': [], 'teachers': {}, 'notes': []}
    try:
        found = {**named, **json.loads(path.read_text())}
        step, notes = found['step'], found['notes']
        name = re.fullmatch(r'step_(\d+)', path.parent.name)
        here = int(name[1]) if name else step
        for good, what in (
                (isinstance(found['settings'].get('init_from'), str), 'settings'),
                (type(step) is int and step == here >= 0, 'step'),
                (all(len(x) == 4 for x in found['state']), 'state'),
                (all(isinstance(t, dict) for t in found['teachers'].values()), 'teachers'),
                (all(type(x) in (int, float) for n in notes for x in n.values()), 'notes')):
            if not good:
                raise ValueError(f'its {what} is odd')
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f'{path} is damaged ({type(e).__name__}: {one_line(e)}); delete '
                       f'{path.parent} to go on from the checkpoint before it') from e
    return found


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


def sha256(path):
    """Of a file, or of all the weight files of a folder; '' of nothing that is here."""
    path, h = Path(path), hashlib.sha256()
    # of a pipeline, the denoiser
    path = next((path / k for k in ('transformer', 'unet') if (path / k).is_dir()), path)
    for f in [path] if path.is_file() else sorted(path.rglob('*.safetensors')):
        with open(f, 'rb') as g:
            while some := g.read(1 << 22):
                h.update(some)
    return h.hexdigest() if path.exists() else ''


def checkpoints(out):
    """The whole checkpoints of a run folder, oldest first: step_<digits> with a meta.json."""
    found = [p for p in Path(out).glob('step_*') if re.fullmatch(r'step_\d+', p.name)]
    return sorted((p for p in found if (p / 'meta.json').is_file()), key=lambda p: int(p.name[5:]))


def newest(out):
    return next(reversed(checkpoints(out)), None)


def save_checkpoint(out, step, write, prefix, meta, keep):
    """write(folder, prefix) fills it; it is on disk before it has its name, and `latest` is always
    a whole one. What lies there under its name has no meta.json, or is of a run that came to here
    before."""
    out, name = Path(out), f'step_{step:06d}'
    with writing(out / name):
        for old in out.glob('.writing*'):                      # what a killed process left
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink()
        tmp, gone = out / f'.writing_{name}', out / f'.writing_old_{name}'
        tmp.mkdir(parents=True)
        write(tmp, prefix)
        (tmp / 'meta.json').write_text(json.dumps(meta, indent=1))
        for f in [*tmp.rglob('*'), tmp]:
            fd = os.open(f, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        if (out / name).exists():
            os.rename(out / name, gone)
        os.rename(tmp, out / name)
        shutil.rmtree(gone, ignore_errors=True)
        link = out / '.writing_latest'
        link.symlink_to(name)
        os.replace(link, out / 'latest')
        for old in checkpoints(out)[:-keep]:
            if old.name != name:
                shutil.rmtree(old)


def locked(out):
    """The folder, made and found to be writable, is this run's until its process ends."""
    place(str(out))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / '.lock', 'a+')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.seek(0)
            who = lock.read(200) or 'another process'
            raise BadInput(f'{out} is being written by {who}; stop that run, or choose another '
                           '--out_dir') from e
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        lock.flush()
    except OSError as e:
        raise BadInput(f'out_dir: {out} cannot be written to ({e.strerror or e}); choose '
                       'another') from e
    return lock


def claim(out, resume, meta):
    """Refuses to write over another run or what is none, or to resume one with other teachers."""
    last, latest = newest(out), out / 'latest'
    need(latest.is_symlink() or not latest.exists(), f'{latest} is no link, as a run keeps it: '
         'give it another name')
    for name in ('log.jsonl', 'result.json', 'loss.png'):
        need(not (out / name).is_dir(), f'{out / name} is a folder, where a run writes a file')
    if not resume:
        return vacant(out, last)
    need(last, f'{out} has no whole checkpoint to resume from; start the run without '
         'init_from=resume')
    need((out / 'start').is_dir(), f'{out}/start is gone, the adapter that the run began with; '
         'restore it')
    old = read_meta(last / 'meta.json')
    for name, t in meta['teachers'].items():
        before = old['teachers'].get(name, {})
        what = 'sha256' if t['sha256'] and before.get('sha256') else 'path'    # hub ids have no sum
        need(before.get(what) == t[what], f'the run in {out} had another teacher "{name}" '
             f'({before.get("path")}, now {t["path"]}); give the same one, or start a new run in '
             'another --out_dir')
    then, now = old['settings'].get('alpha'), meta['settings']['alpha']
    need(then == now, f'the run in {out} has alpha {then}, not {now}: resume with the same, for it '
         'scales what was learned, or start from it as an adapter')
    for k, v in json.loads(json.dumps(meta['settings'])).items():
        if k != 'init_from' and old['settings'].get(k) != v:
            print(f'resume: {k} was {old["settings"].get(k)!r}, is {v!r}')


def vacant(out, last):
    """A folder for a new run; one that has learned nothing yet may be in it."""
    if last:
        need(last.name == 'step_000000', f'{out} holds another run (at {last.name}); continue it '
             'with --init_from=resume, or choose another --out_dir')
        for name in ('log.jsonl', 'result.json'):              # first: a kill may come in between
            (out / name).unlink(missing_ok=True)
        return shutil.rmtree(last)
    others = 'log.jsonl', 'result.json', 'model_index.json', 'config.json', 'adapter_config.json'
    there = [k for k in others if (out / k).exists()] + [p.name for p in out.glob('*.safetensors')]
    need(not there, f'out_dir: {out} holds a {there and there[0]}, and no checkpoint of a run: '
         'choose another, or move that away')
