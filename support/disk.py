"""
How files are written: whole, or not at all; and what can be read without waiting for ever.
"""
import os, stat
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from configurator import BadInput, need


def place(path):
    """A folder that a run may be written in: what is there of it can be written to, the rest can
    be made."""
    need(path.strip() and Path(path) != Path(), 'out_dir is empty: name a folder for the run')
    parts = Path(path), *Path(path).parents
    there = next(p for p in parts if os.path.lexists(p))
    need(os.path.isdir(there), f'out_dir: {path}: {there} is '
         + ('a link to nothing' if there.is_symlink() else 'no folder') + '; choose another')
    need(os.access(there, os.W_OK | os.X_OK), f'out_dir: {path}: {there} may not be written to')
    need(all(len(os.fsencode(x)) < 256 for x in Path(path).parts), f'out_dir: {path}: a name of '
         'more than 255 bytes; choose another')


@contextmanager
def writing(path):
    """What the disk refuses while `path` is written, as a sentence: it is full, it may not be."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as e:
        torch_save = 'inline_container' in str(e)  # it hides what the disk said
        if isinstance(e, RuntimeError) and not torch_save:
            raise
        why = 'is the disk full?' if torch_save else getattr(e, 'strerror', None) or e
        raise BadInput(f'{path} cannot be written: {why}') from e


def replace(path, write):
    """write(part) makes a file beside `path`, which then takes its name: whoever reads, or comes
    back after a kill, finds the old one or the new one. A link stays a link."""
    with writing(path):
        target = Path(os.path.realpath(path))
        part = target.with_name(f'.writing_{os.getpid()}_{target.name}'[:255])
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with open(part, 'rb') as f:
                os.fsync(f.fileno())       # on the disk, before it has the name
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def write_text(path, text):
    def write(part):
        part.write_text(text, encoding='utf-8')
    replace(path, write)


def flaw(path):
    """Why `path` is no file that can be read, or ''. A pipe or a device could keep one waiting."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:             # ValueError: a NUL in its name
        return 'does not exist' if isinstance(e, FileNotFoundError) else f'cannot be read ({e})'
    if stat.S_ISDIR(mode):
        return 'is a folder'
    if not stat.S_ISREG(mode):
        return 'is a pipe or a device, not a file'
    return '' if os.access(path, os.R_OK) else 'may not be read: permission denied'
