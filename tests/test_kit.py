"""What a person can get wrong: a part of the table of tests/kit.py, each case a process of its own.
All of it, minutes:   python tests/kit.py"""
import json
import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT

# of each class some, always the same
PARTS = ('setting', 'config', 'teacher', 'route', 'data', 'picture', 'run:', 'out_dir', 'disk full',
         'SIG', 'score', 'reward', 'model:', 'adapter:', 'merge')


@pytest.fixture(scope='module')
def verdicts():
    words = [sys.executable, 'tests/kit.py', '--json', '--every=11', f'--only={",".join(PARTS)}']
    done = subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize('part', PARTS)
def test_what_is_wrong_is_said(part, verdicts):
    own = [v for v in verdicts if v['name'].startswith(part)]
    assert own and not [v for v in own if v['verdict'] != 'ok']
