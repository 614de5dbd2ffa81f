"""
The processes of a run: one a GPU under torchrun, or a single one; how they are asked to stop; and
random streams, which follow from keys alone, so that they are the same in any number of processes.
"""
import atexit, os, random, signal
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from configurator import BadInput


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
    return SimpleNamespace(rank=rank, size=size, device=torch.device(device), stop=Stop())


class Stop:
    """SIGTERM or Ctrl-C. While a step is learned it is only noted (`asked`), and the loop ends with a
    checkpoint; at any other time, or the second time, the run ends at once: nothing is lost."""

    def __init__(self):
        self.asked, self.busy = False, False
        self.before = {k: signal.signal(k, self.hear) for k in (signal.SIGTERM, signal.SIGINT)}

    def hear(self, number, frame):
        if self.asked or not self.busy:
            raise BadInput('asked to stop; what was saved stays, and --init_from=resume goes on from it')
        self.asked = True

    def over(self):
        for number, before in self.before.items():
            signal.signal(number, before)


def gather(world, x):
    """Lists of all processes, one after the other."""
    if world.size == 1:
        return x
    found = [None] * world.size
    dist.all_gather_object(found, x)
    return [y for some in found for y in some]


def rng(*key):
    return random.Random(repr(key))


def torch_rng(*key):
    return torch.Generator().manual_seed(rng(*key).getrandbits(62))
