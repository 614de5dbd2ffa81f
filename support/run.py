"""
A run's folder: log.jsonl (support/log.py), samples/, result.json, and checkpoints step_*/ with a
link `latest`. A checkpoint is renamed into place when it is whole, so that a run can be killed at
any moment.
"""
import errno, fcntl, hashlib, json, os, re, shutil, socket, time
from functools import cache
from pathlib import Path

from tqdm import tqdm

import merge_lora
from configurator import BadInput, need
from support import rewards
from support.checks import STARTS
from support.disk import place, write_text, writing
from support.files import RewardError, draw_pairs, grid, one_line
from support.judges import scorer
from support.log import Log
from support.plot import curve
from support.processes import gather
from support.rehearsal import derived


class Folder:
    """Where a run keeps its `log`, pictures and checkpoints; one process writes. `resumed` is the
    checkpoint that is resumed, or None, `first` its step, `state` what it kept besides weights,
    `kept` what is kept now, `stills` pictures that do not change."""

    def __init__(self, c, world, teachers=()):
        self.c, self.world, self.out, self.first = c, world, Path(c.out_dir), 0
        self.state, self.kept, self.stills = [], list, {}
        self.log = Log(self.out / 'log.jsonl', world)
        paths = {'base': c.model}
        paths |= {t['name']: t.get('lora') or t.get('checkpoint') or c.model for t in teachers}
        found = {t['name']: merge_lora.find(t['lora']) for t in teachers if t.get('lora')}
        if c.init_from not in STARTS:                          # is it there, on the hub as well?
            merge_lora.find(c.init_from)
        told = cache(sha256) if world.rank == 0 else str       # one process writes it
        self.meta = dict(
            settings={k: v for k, v in vars(c).items() if k not in ('dry_run', 'device')},
            teachers={k: dict(path=p, sha256=told(found.get(k, p))) for k, p in paths.items()})
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
        self.log.resume(self.first, old['notes'])

    def begin(self, models, data, held, render=None):
        """Before the first step: what it starts from, and edit pairs to be looked at, as files; and
        the score is asked once, so that it does not fail at the end."""
        self.student, self.prefix, c = models.student, models.field.prefix, self.c
        for name, text in derived(models):
            self.log.say(f'{name:22s} {text}')
        if render and c.score and c.score_samples:
            rows = held[c.routes[0]['data']][:1]
            scorer(c.score, self.world)(render('student', c.routes[0], rows), rows, 1)
            rewards.clip_model.cache_clear()                   # until the end it is not needed
        if self.world.rank == 0:
            self.log.told = trackers(self)
        if self.resumed:
            return self.log.say(f'resumed {self.resumed}')
        if self.world.rank == 0:
            start = self.student.modules(self.student.start)
            with writing(self.out / 'start'):
                merge_lora.write_adapter(self.out / 'start', start, self.student.alpha, self.prefix)
            draw_pairs(data.buckets, self.out / 'samples')
        self.save(0, models)

    def save(self, step, models):
        notes = gather(self.world, self.log.notes)
        if self.world.rank == 0:
            meta = {**self.meta, 'state': self.kept(), 'notes': notes, 'step': step}
            save_checkpoint(self.out, step, self.student.save, self.prefix, meta, self.c.ckpt_keep)
        gather(self.world, [])
        stop = self.world.stop                                 # until the next step nothing is lost
        stop.busy, stop.saved = False, f', and --init_from=resume goes on from step {step}'

    def bar(self):
        steps, quiet = self.c.max_steps, None if self.world.rank == 0 else True
        return tqdm(range(self.first, steps), initial=self.first, total=steps,
                    disable=quiet)                             # None: where nobody looks

    def owes_evaluation(self):
        """Is the step that this run begins with one to evaluate, which the log has not yet?"""
        due = self.first % self.c.eval_every == 0 or self.first == self.c.max_steps
        return due and not any(e['step'] == self.first and 'lr' not in e for e in self.log.history)

    def draw(self, step, lines, heads):
        """Lines of (caption, picture, picture, ...) as a picture of the step."""
        if self.world.rank == 0:
            captions, *columns = zip(*lines)
            grid([*zip(*columns)], self.out / 'samples' / f'step_{step:06d}.png', captions, heads)
            self.curves()

    def curves(self):
        gaps = sorted({k for e in self.log.history for k in e if k.startswith('gap/')})
        curve(self.log.history, self.out / 'loss.png', ['loss', 'reward', *gaps])

    def conclude(self, held, models, render):
        """result.json: by route, the gap before and after, and what the score says of everyone. A
        score that fails loses nothing else."""
        result, c, failed = {}, self.c, ''
        for route in c.routes:
            gaps = self.log.ends(f'gap/{route["data"]}')
            result[route['data']] = {f'gap_{k}': x for k, x in gaps.items()}
        try:
            score = scorer(c.score, self.world) if c.score and c.score_samples else None
            for route in c.routes if score else ():
                result[route['data']] |= self.scores(route, held, models.student, render, score)
        except RewardError as e:                               # in all processes alike
            failed = str(e)
        self.end(result)
        if failed:
            raise RewardError(f'{failed}. The gaps are in {self.out}/result.json; score later '
                              f'with: python sample.py --ckpt {self.out} --score={c.score}')

    def scores(self, route, held, student, render, score):
        rows, found = held[route['data']][:self.c.score_samples], {}
        everyone = dict(base=('base', None), teacher=(route['teacher'], None),
                        start=('student', student.start), student=('student', student.ema))
        for name, (who, weights) in everyone.items():
            with student.wearing(weights):
                pictures = render(who, route, rows, own=name == 'teacher')
            found[name] = score(pictures, rows, self.c.micro_batch)
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
            print(f'{time.time() - self.log.t0:.0f} s; {self.out}/latest holds the adapter, '
                  f'{self.out}/samples the pictures, {self.out}/loss.png the curves. '
                  f'Try: python sample.py --ckpt {self.out}')
            self.lock.close()                                  # who imported us may begin another


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


def sha256(path):
    """Of a file, or of all the weight files of a folder; '' of nothing that is here."""
    path, h = Path(path).expanduser(), hashlib.sha256()
    # of a pipeline, the denoiser
    path = next((path / k for k in ('transformer', 'unet') if (path / k).is_dir()), path)
    files = [path] if path.is_file() else sorted(path.rglob('*.safetensors'))
    if path.name == merge_lora.FILES[1]:                       # its scale stands beside it
        files.append(path.with_name('adapter_config.json'))
    for f in files:
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
            who, patience = '', time.time() + 2                # until who has just begun says so
            while not who and time.time() < patience:
                time.sleep(0.02)
                lock.seek(0)
                who = lock.read(200)
            who = who or 'another process'
            raise BadInput(f'{out} is being written by {who}; stop that run, or choose another '
                           '--out_dir') from e
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            print(f'{out}: its file system has no locks; see to it that one run alone writes there')
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
        now = t['path'] if before.get('path') != t['path'] else 'whose weights have changed since'
        need(before.get(what) == t[what], f'the run in {out} had another teacher "{name}" '
             f'({before.get("path")}, now {now}); give the same one (of a run that went on, the '
             'checkpoint itself), or start a new run in another --out_dir')
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
