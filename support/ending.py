"""
How a script ends when something goes wrong: in a sentence where a person can mend it, once.
"""
import atexit, os, pathlib, sys, traceback

from configurator import BadInput


def end(e):
    """Says what happened, and leaves. Of several processes one that fails ends at once: others may
    wait for it, it must not wait for them."""
    alone = os.environ.get('WORLD_SIZE', '1') == '1'
    code, said = mend(e)
    if alone and not said:
        raise e
    said = said or ''.join(traceback.format_exception(e))
    if alone or first():
        print(f'{pathlib.Path(sys.argv[0]).name}: {said}', file=sys.stderr, flush=True)
    if alone and not isinstance(e, KeyboardInterrupt):
        sys.exit(code)
    if alone:  # at an interrupt, threads that wait for a reward are not waited for
        atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def mend(e):
    """(exit code, a sentence) of an error; '' of a mistake in the code: that needs a traceback."""
    if isinstance(e, KeyboardInterrupt):
        return 130, str(e) or 'interrupted'
    if isinstance(e, BadInput):
        return 2, str(e)
    if isinstance(e, OSError) and e.strerror:          # a disk, a right, a file that went away
        return 2, f'{e.filename}: {e.strerror}' if e.filename else e.strerror
    if no_memory(e):
        why = (str(e).strip() or 'no memory is left').splitlines()[0]
        return 2, f'out of memory: {why[:300]}; lower micro_batch (sample.py: ' \
                  'batch_size) or the size of pictures (docs/memory.md)'
    return 1, ''


def no_memory(e):
    return isinstance(e, MemoryError) or type(e).__name__ == 'OutOfMemoryError' \
        or "can't allocate memory" in str(e)


def first():
    """Under torchrun: is this the first process that fails? What others say is its echo."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return True
    from datetime import timedelta
    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']),
                         is_master=False, timeout=timedelta(seconds=5))
        again = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        return store.add(f'train_opd/failed/{again}', 1) == 1
    except Exception:  # the launcher is gone: nobody else will say it
        return True
