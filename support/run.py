"""
One run: its processes, and its folder with log.jsonl, samples/, and checkpoints step_*/ with a link
`latest`. A checkpoint is renamed into place when it is whole: a run can be killed at any moment.
"""
import atexit, hashlib, json, os, resource, shutil, sys, time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

import merge_lora
from configurator import need


def launch(device='', tf32=True):
    """This process among all: rank, size, device. Works with and without torchrun."""
    rank, size, local = (int(os.environ.get(k, d))
                         for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    gpu = torch.cuda.is_available() and not device.startswith('cpu')
    device = f'cuda:{local}' if gpu and device in ('', 'cuda') else device or 'cpu'
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if gpu else 'gloo', timeout=timedelta(hours=1))
        atexit.register(dist.destroy_process_group)
    return SimpleNamespace(rank=rank, size=size, device=torch.device(device))


def gather(world, x):
    """Lists of all processes, one after the other."""
    if world.size == 1:
        return x
    parts = [None] * world.size
    dist.all_gather_object(parts, x)
    return [y for p in parts for y in p]


class Folder:
    """Where a run keeps its log, pictures and checkpoints; one process writes. `resumed` is the checkpoint
    that is resumed, or None, `first` its step, and `state` what a method keeps besides weights."""

    def __init__(self, c, world, teachers=()):
        self.c, self.world, self.out, self.state = c, world, Path(c.out_dir), []
        self.first, self.notes, self.history, self.t0 = 0, [], [], time.time()
        self.log, self.begun, self.wandb = self.out / 'log.jsonl', False, None
        paths = {t['name']: t.get('lora') or t.get('checkpoint') or c.model for t in teachers}
        found = {t['name']: merge_lora.find(t['lora']) for t in teachers if t.get('lora')}
        self.meta = dict(
            settings={k: v for k, v in vars(c).items() if k not in ('dry_run', 'device')},
            teachers={k: dict(path=p, sha256=sha256(found.get(k, p))) for k, p in paths.items()})
        resume = c.init_from == 'resume'
        if world.rank == 0:
            claim(self.out, resume, self.meta)                 # one process looks after the folder
        gather(world, [])
        self.resumed = newest(self.out) if resume else None
        need(len(set(gather(world, [self.resumed and self.resumed.name]))) == 1,
             f'{self.out} has to be one folder for all machines, but they see different ones')
        if self.resumed:
            old = json.loads((self.resumed / 'meta.json').read_text())
            self.meta['settings']['init_from'] = old['settings']['init_from']
            self.first, self.state = old['step'], old['state']
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            whole = [json.loads(x) for x in lines if x.startswith('{') and x.endswith('}')]
            self.history = [e for e in whole if e['step'] <= self.first]   # a kill cuts a line

    def save(self, step, student, prefix):
        if self.world.rank == 0:
            if step == 0:                                      # what it began from is a file of the run
                start = student.modules(student.start)
                merge_lora.write_adapter(self.out / 'start', start, student.alpha, prefix)
            meta = {**self.meta, 'state': self.state}
            save_checkpoint(self.out, step, partial(student.save, prefix=prefix), meta, self.c.ckpt_keep)
        gather(self.world, [])

    def say(self, text):
        if self.world.rank == 0:
            tqdm.write(text)                                   # above the bar, if there is one
            sys.stdout.flush()

    def add(self, entry):
        """To the log. Before the first, what came after the checkpoint that is resumed goes."""
        self.history.append(entry)
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.log, 'a' if self.begun else 'w') as f:
                f.writelines(json.dumps(e) + '\n' for e in self.history[-1 if self.begun else 0:])
            if self.c.wandb_log and not self.begun:
                self.begin_wandb()
            self.begun = True
            if self.wandb:
                self.wandb.log(entry, step=entry['step'])

    def begin_wandb(self):
        import wandb
        mark = self.out / 'wandb_id'                           # a resume continues its own line
        if not self.resumed or not mark.exists():
            mark.write_text(f'{self.out.name}-{time.time_ns():x}')
        self.wandb = wandb.init(project=self.c.wandb_project, name=self.out.name, id=mark.read_text(),
                                resume='allow', config=self.meta['settings'])

    def note(self, batch, **numbers):
        """Numbers of each sample, for the next report; gap and reward also by route."""
        columns = {k: v.tolist() for k, v in numbers.items()}  # one wait for the device a number
        for j, s in enumerate(batch):
            note = {k: v[j] for k, v in columns.items()}
            self.notes.append(note | {f'train_{k}/{s.label}': note[k] for k in ('gap', 'reward') if k in note})

    def glance(self, samples):
        """For the bar: the last sample's numbers, and the step's routes."""
        note = self.notes[-1] if self.notes else {}
        shown = {k: f'{note[k]:.3g}' for k in ('loss', 'gap', 'reward') if k in note}
        return shown | dict(route='+'.join(dict.fromkeys(s.label for s in samples)))

    def report(self, step, **entry):
        """An entry of the log, and a line for people: means of what was noted; some are sums."""
        notes, self.notes = gather(self.world, self.notes), []
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else resource.getrusage(0).ru_maxrss / 1e6
        entry = dict(step=step, **entry, seconds=round(time.time() - self.t0, 1), memory_gb=round(peak, 2))
        for k in sorted({k for n in notes for k in n}):
            some = [n[k] for n in notes if k in n]
            total = k in ('groups', 'skipped_groups')
            entry[k] = max(some) if k == 'ratio_off' else sum(some) / (1 if total else len(some))
        self.add(entry)
        shown = [f'{k.removeprefix("train_")} {v:.4g}' for k, v in entry.items() if k.startswith('train_')
                 or k in ('loss', 'gap', 'reward', 'kl', 'sigma', 'ratio_off', 'grad_norm')]
        self.say('  '.join([f'step {step:6d}', *shown, f'{entry["seconds"]:.0f} s', f'{peak:.1f} GB']))

    def end(self, result, name='route'):
        """The result, as a file and for people."""
        if self.world.rank == 0:
            (self.out / 'result.json').write_text(json.dumps(result, indent=1))
            table(result, name)
            print(f'{time.time() - self.t0:.0f} s; {self.out}/latest holds the adapter, {self.out}/samples '
                  f'the pictures. Try: python sample.py --ckpt {self.out}')


def table(rows, name):
    """{row: {column: number}} for people."""
    heads = list(next(iter(rows.values())))
    print('\n' + f'{name:24s}' + ''.join(f'{h:>12s}' for h in heads))
    for k, row in rows.items():
        print(f'{k:24s}' + ''.join(f'{row[h]:12.3f}' for h in heads))


def sha256(path):
    """Of a file, or of all the weight files of a folder; '' where there is nothing of that name here."""
    path, h = Path(path), hashlib.sha256()
    # of a pipeline, the denoiser
    path = next((path / k for k in ('transformer', 'unet') if (path / k).is_dir()), path)
    for f in [path] if path.is_file() else sorted(path.rglob('*.safetensors')):
        with open(f, 'rb') as g:
            while part := g.read(1 << 22):
                h.update(part)
    return h.hexdigest() if path.exists() else ''


def newest(out):
    """The newest whole checkpoint of a run folder, or None. It is renamed into place when whole."""
    found = sorted(p for p in Path(out).glob('step_*') if (p / 'meta.json').exists())
    return found[-1] if found else None


def save_checkpoint(out, step, write, meta, keep):
    """write(folder) fills it; it is on disk before it has its name, and `latest` is always a whole one."""
    out, name = Path(out), f'step_{step:06d}'
    for old in out.glob('.writing*'):                                  # what a killed process left
        shutil.rmtree(old, ignore_errors=True)
    if not (out / name).exists():
        tmp = out / f'.writing_{name}'
        tmp.mkdir(parents=True)
        write(tmp)
        (tmp / 'meta.json').write_text(json.dumps({**meta, 'step': step}, indent=1))
        for f in [*tmp.rglob('*'), tmp]:
            fd = os.open(f, os.O_RDONLY)
            os.fsync(fd), os.close(fd)
        os.rename(tmp, out / name)
    link = out / '.writing_latest'
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, out / 'latest')
    for old in sorted(out.glob('step_*'))[:-keep]:
        shutil.rmtree(old)


def claim(out, resume, meta):
    """Refuses to write over another run, or to resume one with other teachers."""
    last = newest(out)
    if not resume:
        if last:
            need(last.name == 'step_000000', f'{out} holds another run (at {last.name}); continue it with '
                 '--init_from=resume, or choose another --out_dir')
            shutil.rmtree(last)                                # nothing was learned yet: nothing is lost
        return
    need(last, f'{out} has no whole checkpoint to resume from; start the run without init_from=resume')
    old = json.loads((last / 'meta.json').read_text())
    for name, t in meta['teachers'].items():
        before = old['teachers'].get(name, {})
        what = 'sha256' if t['sha256'] and before.get('sha256') else 'path'    # a hub id has no sum
        need(before.get(what) == t[what], f'the run in {out} had another teacher "{name}" '
             f'({before.get("path")}, now {t["path"]}); give the same one, or start a new run in another '
             '--out_dir')
    then, now = old['settings']['alpha'], meta['settings']['alpha']    # it would scale what was learned
    need(then == now, f'the run in {out} has alpha {then}, not {now}: resume with the same, or start from it '
         'as an adapter')
    for k, v in meta['settings'].items():
        if k != 'init_from' and old['settings'].get(k) != v:
            print(f'resume: {k} was {old["settings"].get(k)!r}, is {v!r}')
