"""
Kills, for tests/kit.py --kills=N: runs are killed at random moments and at single file operations,
alone and under torchrun (its ranks, its launcher), started anew until they end, and then compared
with a run that nobody disturbed: its log, its weights and its result, number by number. And two
starts at the same moment.
"""
import builtins, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import torch

import kit
import kit_cases
from support import run as R
from support.log import read_log

STEPS = 8
OPERATIONS = [(os, k) for k in 'rename replace fsync unlink mkdir symlink rmdir'.split()]
OPERATIONS += [(builtins, 'open'), (torch, 'save'), (shutil, 'rmtree')]


def settings(world, out):
    return world.opd(max_steps=STEPS, save_every=1, ckpt_keep=2, eval_every=4, out_dir=str(out),
                     ema_decay=0.5)


def words(world, out):
    """The command line of a start: a resume, if there is something to resume."""
    again = ['--init_from=resume'] if R.newest(out) else []
    return settings(world, out) + again


def count_operations(at, kill=0):
    """Counts this process's file operations from here on; the one of number `kill` is its last."""
    done = [0]

    def counted(function):
        def operation(*a, **k):
            done[0] += 1
            if done[0] == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*a, **k)
        return operation
    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    return done


def start(argv, at, kill=0, barrier=None):
    """A process of train_opd.py, forked from this warm one -> its id."""
    at.mkdir(exist_ok=True)
    for name in ('stdout', 'stderr'):
        (at / f'.{name}').write_text('')
    pid = os.fork()
    if pid:
        return pid
    if barrier is not None:
        os.read(barrier, 1)                            # both go on when it is closed
    counted = count_operations(at, kill)
    case = kit.Case('kill', '', argv)
    exit_now = os._exit

    def leave(code):
        with open(at / '.operations', 'w') as f:
            f.write(str(counted[0]))
        exit_now(code)
    os._exit = leave
    kit.child(case, at)


def comparable(out):
    """What has to be the same: the log without times, the last weights, the result."""
    log = [json.loads(x) for x in (out / 'log.jsonl').read_text().splitlines()]
    log = [{k: v for k, v in e.items() if k not in ('seconds', 'memory_gb')} for e in log]
    state = torch.load(out / 'latest' / 'train_state.pt', weights_only=True)
    return repr(log), {k: x.tolist() for k, x in state['student'].items()}, \
        json.loads((out / 'result.json').read_text())


def whole(out):
    """After a kill: `latest`, where it is, is a whole checkpoint."""
    latest = out / 'latest'
    assert not latest.is_symlink() or R.read_meta(latest.resolve() / 'meta.json'), out
    for step in R.checkpoints(out):
        torch.load(step / 'train_state.pt', weights_only=True)
        R.read_meta(step / 'meta.json')
    read_log(out / 'log.jsonl')


def ended(argv, at):
    """Runs to the end -> (exit code, what it said)."""
    pid = start(argv, at)
    code = kit.waited(pid, 120)
    return code, (at / '.stderr').read_text()


def same(out, reference, what):
    for a, b, part in zip(comparable(out), reference, ('log', 'weights', 'result')):
        if a != b:
            raise SystemExit(f'LOST or WRONG: {part} differs after {what}; see {out}')


def killed_once(world, at, random_, seconds, operations, log):
    """One start that is killed, at a moment or at a file operation."""
    if random_.random() < 0.5:
        kill, moment = 0, random_.uniform(0, seconds)
    else:
        kill, moment = random_.randrange(1, operations), 120
    pid = start(words(world, at / 'run'), at, kill)
    code = kit.waited(pid, moment)
    log.append(f'operation {kill}' if kill else f'{moment:.2f} s')
    whole(at / 'run')
    return code == 0                                   # it came to its end before


def chains(world, work, n, random_, say):
    """n kills, a few in a row on the same run; then it is let to its end and compared."""
    t0 = time.time()
    code, said = ended(settings(world, work / 'plain' / 'run'), work / 'plain')
    assert code == 0, said
    seconds = time.time() - t0
    operations = int((work / 'plain' / '.operations').read_text())
    reference, done, chain = comparable(work / 'plain' / 'run'), 0, 0
    while done < n:
        at, log, over = work / f'chain_{chain}', [], False
        for _ in range(random_.randrange(1, 6)):
            if not over and done < n:
                over = killed_once(world, at, random_, seconds, operations, log)
                done += not over
        if not over:
            code, said = ended(words(world, at / 'run'), at)
            if code:
                raise SystemExit(f'LOST: exit {code} after {log}: {said}')
        same(at / 'run', reference, log)
        say(f'ok  {done:3d} kills  {", ".join(log)}', flush=True)
        shutil.rmtree(at)
        chain += 1
    return reference


def two_at_once(world, work, reference, n, say):
    """Two starts at the same moment: one runs, the other says so; nothing of the first is lost."""
    for i in range(n):
        at, gate = work / f'two_{i}', os.pipe()
        at.mkdir()
        argv = settings(world, at / 'run')
        pids = [start(argv, at / name, barrier=gate[0]) for name in 'ab']
        time.sleep(0.2)
        os.write(gate[1], b'xx')
        codes = [kit.waited(pid, 120) for pid in pids]
        said = ''.join((at / name / '.stderr').read_text() for name in 'ab')
        if sorted(codes) != [0, 2] or 'is being written by process' not in said:
            raise SystemExit(f'two at once: {codes}, {said}')
        same(at / 'run', reference, 'two starts')
        say('ok  two starts at the same moment: one ran, one was refused', flush=True)


# --------------------------------------------------------------------------------------------------
# torchrun

def torchrun(world, out):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               '--nproc_per_node=2', 'train_opd.py', *words(world, out)]
    return subprocess.Popen(command, cwd=kit.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True,
                            env={**os.environ, 'PYTHONPATH': str(kit.ROOT)})


def children(pid):
    found = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [int(x) for x in found]


def gone(pids, seconds):
    end = time.time() + seconds
    while time.time() < end:
        if not any(Path(f'/proc/{p}').exists() and 'State:\tZ' not in Path(
                f'/proc/{p}/status').read_text() for p in pids):
            return True
        time.sleep(0.05)
    return False


def steps_of(out):
    return [(e['step'], 'lr' in e) for e in read_log(out / 'log.jsonl')]


def under_torchrun(world, work, n, random_, say):
    work.mkdir()
    t0, plain = time.time(), torchrun(world, work / 'plain')
    said, _ = plain.communicate(timeout=120)
    assert plain.returncode == 0, said
    seconds, reference = time.time() - t0, comparable(work / 'plain')
    for i in range(n):
        out, code = work / f'run_{i}', 2
        launcher = torchrun(world, out)
        time.sleep(random_.uniform(0.5 * seconds, seconds))
        ranks, target = children(launcher.pid), ('rank 0', 'rank 1', 'launcher')[i % 3]
        if len(ranks) < 2 or launcher.poll() is not None:
            target = 'nobody, it was over or not begun'
        else:
            victim = launcher.pid if target == 'launcher' else ranks[int(target[-1])]
            os.kill(victim, signal.SIGKILL)
        if target == 'launcher':                       # its orphans go on: who starts now is told
            code, told = ended(settings(world, out) + ['--init_from=resume'], work / f'new_{i}')
            if code not in (0, 2):
                raise SystemExit(f'a new start beside orphans: {code} {told}')
        launcher.communicate(timeout=120)
        assert gone(ranks, 120), 'ranks that never end'
        whole(out)
        if code == 0:                                  # the orphans were done: the new one ended it
            if steps_of(out) != steps_of(work / 'plain'):
                raise SystemExit(f'orphans and a new start wrote both; see {out}')
            continue
        if not (out / 'result.json').exists():
            again = torchrun(world, out)
            said, _ = again.communicate(timeout=120)
            if again.returncode:
                raise SystemExit(f'LOST after {target} was killed: {said}')
        same(out, reference, target)
        say(f'ok  torchrun, killed: {target}', flush=True)


def main(n, seed, say=print):
    kit.warm()
    work, random_ = Path(tempfile.mkdtemp(prefix='kills_')), random.Random(seed)
    world = kit_cases.World(work / 'world', kit.play)
    reference = chains(world, work, n, random_, say)
    two_at_once(world, work, reference, max(1, n // 20), say)
    if n >= 10:
        under_torchrun(world, work / 'torchrun', n // 10, random_, say)
    shutil.rmtree(work)
    say(f'nothing lost, nothing wrong: {n} kills, {max(1, n // 20)} double starts, '
        f'{n // 10} kills under torchrun')
    return 0
