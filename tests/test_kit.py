"""What a person can get wrong: a part of the table of tests/kit.py, each case a process of its own.
All of it, minutes:   python tests/kit.py"""
import json
import subprocess
import sys

from conftest import ONE_THREAD, ROOT

# of each class some, always the same
PARTS = ('setting', 'config', 'teacher', 'route', 'data', 'picture', 'run:', 'out_dir', 'disk full',
         'SIG', 'score', 'reward', 'model:', 'adapter:', 'merge')


def test_what_is_wrong_is_said():
    words = [sys.executable, 'tests/kit.py', '--json', '--every=7', f'--only={",".join(PARTS)}']
    done = subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.stdout, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [v for v in verdicts if v['verdict'] != 'ok']
    assert all(any(v['name'].startswith(part) for v in verdicts) for part in PARTS)
