"""
The tests: real classes, tiny weights, no downloads.   python -m pytest -q test_smoke.py
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error')
sys.path[:0] = [str(ROOT), str(ROOT / 'data' / 'shapes')]

import base64, copy, csv, functools, http.server, io, json, math, random, re, shutil
import signal, socket, subprocess, tempfile, textwrap, threading, time, types, urllib.error, urllib.request
import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from types import SimpleNamespace
import merge_lora
import sample
import train_opd
import train_opd as T
import train_teacher
import world as shapes
from configurator import BadInput, collect, configure
from support import checks, files, models as M, rewards, run as R
from support.files import read_data
from support.rewards import RewardError, checked, from_file, load, remote

torch.set_num_threads(1)


def rows_of(path):
    return [b[i] for b in read_data([path])[0].values() for i in range(len(b))]


SHAPES = ROOT / 'data' / 'shapes'
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
