"""
What --help prints: each setting with its default and with what its script says about it, in the
script's own groups.
"""
import re
from pathlib import Path

SETTING = re.compile(r'((?:^#.*\n)*)^([a-z]\w*)(?:: .+?)? = (.*\n(?:[ \])}].*\n)*)', re.M)


def read(file):
    """{name: (comment, group)}: a comment stands beside a setting, or indented below it; full
    lines of comment above a setting begin a group."""
    found, group = {}, ''
    for head, name, body in SETTING.findall(Path(file).read_text() if file else ''):
        lines = [line for line in head.splitlines() if line.strip('#- ')]    # no rulers
        group = '\n'.join(lines) or group
        comment = ' '.join(re.findall('  # *(.*)', body))
        found[name] = comment or ('' if lines else None), group
    return found


def show(defaults, kinds, files):
    """A script's settings may be another's: what it does not explain, the other does."""
    texts = {file: read(file) for file in files.values()}
    groups = {k: texts[files[k]].get(k, ('', ''))[1] for k in defaults}
    for group in dict.fromkeys(groups.values()):
        print(f'\n{group}' if group else '')
        for k in [k for k in defaults if groups[k] == group]:
            said = [texts[f].get(k, (None,))[0] for f in (files[k], *texts)]
            comment = next((x for x in said if x is not None), '')
            wide = '' if isinstance(kinds[k], type) else f'({kinds[k]}) '
            print(f'--{k}={defaults[k]!r}'.ljust(36), wide + comment)
