"""
The processes of a run: one a GPU under torchrun, or a single one; how they are asked to stop; and
random streams, which follow from keys alone, so that they are the same in any number of processes.
"""
import atexit, os, random, signal
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from configurator import BadInput, need


def device_of(device, local=0, several=False):
    """The device that a setting names, '' for a GPU if there is one; of several processes each has
    its own."""
    try:
        found = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as e:
        raise BadInput(f'device: {device!r} is not known; cpu, cuda or cuda:1') from e
    need(not several or found.index is None, f'device = {device!r}: each process takes one of its '
         'own; leave it at cuda')
    if found.type == 'cuda':
        found = torch.device('cuda', local if found.index is None else found.index)
        there = torch.cuda.device_count()
        need(found.index < there, f'device = {str(found)!r}: this machine has {there} GPU(s)')
    else:
        need(found.type in ('cpu', 'mps', 'xpu'), f'device: {device!r} is none that models run on; '
             'cpu, cuda or cuda:1')
        try:
            torch.zeros(1, device=found)
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            raise BadInput(f'device: this machine has no {device!r}') from e
    return found


def launch(device='', tf32=True):
    """This process among all: rank, size, device. Works with and without torchrun."""
    rank, size, local = (int(os.environ.get(k, d))
                         for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    device = device_of(device, local, int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > 1)
    gpu = device.type == 'cuda'
    if gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    stop = Stop()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if gpu else 'gloo', timeout=timedelta(hours=1))
        atexit.register(dist.destroy_process_group)
    return SimpleNamespace(rank=rank, size=size, device=device, stop=stop)


class Stop:
    """SIGTERM, Ctrl-C, or a terminal that closes (not by nohup). While a step is learned it is only
    noted (`asked`), and the loop ends with a checkpoint; at any other time, or at a second Ctrl-C,
    the run ends at once: nothing is lost. (SIGTERM comes twice where a cluster tells a process and
    torchrun too. No code that catches its own errors takes a KeyboardInterrupt for one of them.)"""

    def __init__(self):
        self.asked, self.busy, self.saved = False, False, ''
        hung_up = [signal.SIGHUP][signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:]
        heard = signal.SIGTERM, signal.SIGINT, *hung_up
        self.before = {k: signal.signal(k, self.hear) for k in heard}

    def hear(self, number, frame):
        if not self.busy or self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt(f'asked to stop; what was written stays{self.saved}')
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
