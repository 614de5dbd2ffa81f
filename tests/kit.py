"""
What a person can get wrong, and what a machine can do to a run. Each case of the table in
kit_cases.py is a process of its own, forked from a warm one, with a time limit; a line a case.

    python tests/kit.py                     all cases: minutes, and no part of the usual tests
    python tests/kit.py --only=picture      those with this in their name
    python tests/kit.py --every=9           a sample of them
    python tests/kit.py --kills=60          kills runs at random moments, resumes them, compares

Verdicts: ok; or traceback; silent (accepted, though wrong); refused (though right); late (refused
only when weights were loaded, though it could be known before); vague (a sentence that does not
name the thing); hung; changed (files of the user are not what they were).
"""
import argparse, contextlib, hashlib, json, os, re, resource, shutil, signal, sys, tempfile, time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', OMP_NUM_THREADS='1')
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
os.chdir(ROOT)
LIMIT = 60                              # seconds that a case may take


@dataclass
class Case:
    name: str
    want: str | None                    # '': it works; None: either; else a sentence matches this
    words: list = field(default_factory=list)      # of the command line; {at} is its own folder
    script: str = 'train_opd'
    make: object = None                 # make(at) prepares that folder
    late: int = 0                       # 1: only weights can tell; 2: only a run
    codes: tuple = (2,)                 # exits that are a refusal
    stop: tuple = ()                    # (hook, signal): sent to itself there
    most_bytes: int = 0                 # no file may become larger, as on a full disk


# --------------------------------------------------------------------------------------------------
# A case

def hooks():
    """Moments of a run: {name: (object, its function)}."""
    from support import models, run
    return dict(weights=(models, 'open_pipeline'), bar=(run.Folder, 'bar'),
                update=(models.Student, 'update'), draw=(run.Folder, 'draw'),
                save=(run, 'save_checkpoint'))


def listen(case, at):
    """Each moment leaves a file when a run comes by; there, a case may be sent a signal."""
    for name, (owner, function) in hooks().items():
        def heard(*a, _name=name, _before=getattr(owner, function), **k):
            first = not (at / f'.at_{_name}').exists()
            (at / f'.at_{_name}').touch()
            if first and case.stop and case.stop[0] == _name:
                os.kill(os.getpid(), case.stop[1])
            return _before(*a, **k)
        setattr(owner, function, heard)


def child(case, at):
    """The process of a case: never returns."""
    import configurator
    os.setsid()
    os.chdir(at)
    for number, name in (1, 'stdout'), (2, 'stderr'):
        os.dup2(os.open(at / f'.{name}', os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
    os.environ['TMPDIR'] = str(at / '.tmp')
    tempfile.tempdir = None
    code = 1
    try:
        listen(case, at)
        if case.most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.most_bytes, case.most_bytes))
        words = [w.replace('{at}', str(at)) for w in case.words]
        sys.argv = [f'{case.script}.py', *words]
        configurator.run(sys.modules[case.script].main)
        code = 0
    except SystemExit as e:
        code = e.code if type(e.code) is int else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def waited(pid, seconds):
    """Exit code of a process, None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def said_by(file, pipes):
    if not pipes:
        return file.read_text(errors='replace')
    os.write(pipes[1], b' ')            # so that there is something to read
    said = os.read(pipes[1], 1 << 20).decode(errors='replace')
    for pipe in pipes:
        os.close(pipe)
    return said


def files_of(folder):
    """{path: what it is} of all in a folder, but for what is the kit's: names with a dot first."""
    found = {}
    for p in sorted(folder.rglob('*')):
        name = str(p.relative_to(folder))
        if name[0] == '.' or p.name == '.lock':
            continue
        if p.is_symlink():
            found[name] = os.readlink(p)
        elif p.is_file():
            found[name] = hashlib.sha256(p.read_bytes()).hexdigest()
        else:
            found[name] = 'folder' if p.is_dir() else 'special'
    return found


def play(case, at):
    """Runs a case in its folder -> (verdict, what was said)."""
    (at / '.tmp').mkdir(parents=True)
    held = case.make(at) if case.make else None
    before = files_of(at)
    pipes = []
    for name in ('.stdout', '.stderr'):
        if case.most_bytes:             # a file would have that limit too; what is said is short
            os.mkfifo(at / name)
            pipes.append(os.open(at / name, os.O_RDWR))
        else:
            (at / name).touch()
    pid = os.fork()
    if not pid:
        child(case, at)
    code = waited(pid, LIMIT)
    del held
    said = said_by(at / '.stderr', pipes)
    sentence = re.sub(r'\A.*?(?=^\w+\.py: )', '', said, flags=re.S | re.M).strip()
    refused = code in case.codes
    after = files_of(at)
    if refused:                         # the folder that it was to write in may be there, empty
        after = {k: v for k, v in after.items() if k in before or v != 'folder'
                 or (at / '.at_weights').exists()}
    kept = refused and not (at / '.at_weights').exists()
    changed = [k for k in before if after.get(k) != before[k]] + kept * [
        k for k in after if k not in before]
    changed = [k for k in changed if kept or k.split('/')[0] != 'out']
    return verdict(case, code, said, sentence, at, changed), sentence or said.strip()


def verdict(case, code, said, sentence, at, changed):
    if code is None:
        return 'hung'
    if 'Traceback (most' in said or code not in (0, *case.codes):
        return 'traceback'
    if changed:
        return f'changed {changed[:2]}'
    if code == 0:
        return 'silent' if case.want else 'ok'
    if case.want == '':
        return 'refused'
    loaded = (at / '.at_weights').exists()
    if loaded + (at / '.at_update').exists() > case.late:
        return 'ok' if case.want is None else 'late'
    found = re.search(case.want or '', sentence, re.I)
    short = len(sentence) < 1500 and sentence.count('\n') < 12
    return 'ok' if found and short else 'vague'


# --------------------------------------------------------------------------------------------------
# All of them

def warm():
    """What all cases need, imported before the first is forked. No thread is started."""
    import diffusers, peft, torch, transformers                # noqa: F401
    import merge_lora, sample, train_opd, train_teacher        # noqa: F401
    import kit_cases
    for package, names in (diffusers, '''AutoencoderKL SD3Transformer2DModel
            StableDiffusion3Pipeline'''), (transformers, '''AutoTokenizer T5EncoderModel
            CLIPTextModelWithProjection'''):
        for name in names.split():
            getattr(package, name)                             # these load when they are asked for
    torch.set_num_threads(1)
    return kit_cases


def chosen(cases, args):
    seen = Counter(c.name for c in cases)
    assert max(seen.values()) == 1, seen.most_common(3)
    some = [[c for c in cases if n in c.name][::args.every] for n in args.only.split(',')]
    return list({c.name: c for found in some for c in found}.values())


def run_all(args):
    table, counts, bad, t0 = warm(), Counter(), [], time.time()
    work = Path(tempfile.mkdtemp(prefix='kit_'))
    try:
        cases = chosen(list(table.cases(work / 'world', play)), args)
        before = files_of(work / 'world')
        for i, case in enumerate(cases):
            start, at = time.time(), work / f'{i:04d}'
            found, said = play(case, at)
            counts[found.split()[0]] += 1
            line = f'{found:10s} {time.time() - start:5.1f} s  {case.name}'
            bad += [line] * (found != 'ok')
            part = said[-160:] if found == 'traceback' else said[:160]
            entry = dict(name=case.name, verdict=found, said=said[:600])
            print(json.dumps(entry) if args.json else f'{line}   | {part!r}', flush=True)
            shutil.rmtree(at, ignore_errors=True)
        if files_of(work / 'world') != before:
            bad.append('changed: the files that all cases share')
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not args.json:
        print(f'\n{sum(counts.values())} cases in {time.time() - t0:.0f} s: '
              + ', '.join(f'{n} {k}' for k, n in counts.most_common()))
        print('\n'.join(bad))
    return int(bool(bad))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', default='', help='part of names, several with commas')
    parser.add_argument('--every', type=int, default=1)
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--kills', type=int, default=0)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.kills:
        import kit_kills
        return kit_kills.main(args.kills, args.seed)
    return run_all(args)


if __name__ == '__main__':
    sys.exit(main())
