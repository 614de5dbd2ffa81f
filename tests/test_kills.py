"""Runs that are killed and go on as if nothing had been. More of them:
python tests/kit.py --kills=60"""
import subprocess
import sys

from conftest import ONE_THREAD, ROOT


def test_nothing_is_lost_and_nothing_differs():
    words = [sys.executable, 'tests/kit.py', '--kills=4', '--seed=1']
    done = subprocess.run(words, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'nothing lost, nothing wrong: 4 kills, 1 double starts' in done.stdout
