"""
What an action was worth: advantages within groups, a run's rewards as train_teacher.py asks for
them, and the returns that SDPO remembers.
"""
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from support import rewards
from support.files import RewardError, judged, one_line
from support.processes import gather

FLAT = 1e-6                             # of the largest: what float32 does not tell from equal


def flat(x, dim):
    """Where are numbers equal along a dimension, by float32's measure?"""
    return x.amax(dim) - x.amin(dim) <= FLAT * x.abs().amax(dim)


def group_advantage(rewards, group, std=None):
    """(r - mean) / std within each group of `group` in a row, or with one std for all of a batch.
    Groups without spread, by float32's measure, get zeros."""
    r = rewards.view(-1, group)
    std = r.std(1, keepdim=True) if std is None else std
    return ((r - r.mean(1, keepdim=True)) / std).masked_fill(flat(r, 1)[:, None], 0).view(-1)


def buffered(x, past, batch):
    """SDPO's advantage of a return x, (x - mean) / std: of those remembered of its prompt and step,
    or, while these are fewer than 16, of the whole batch's of its step. Where these are all equal,
    by float32's measure, 0."""
    known = torch.tensor(list(past) if len(past) >= 16 else batch)
    return 0.0 if flat(known, 0) else ((x - known.mean()) / (known.std() + 1e-6)).item()


def scorer(score, world):
    """What a run's score says of pictures: a function (images, rows, few at once) -> its mean. If
    it cannot be had in one process, that is said in all."""
    judge, why, name = None, '', f'score {score}'
    try:
        judge = rewards.load(score, world.device)
    except Exception as e:                                     # a server that is gone, no room
        why = one_line(e) or type(e).__name__
    failed = [x for x in gather(world, [why]) if x]
    if failed:
        raise RewardError(f'{name}: {failed[0]}')
    return partial(judged, judge, world=world, name=name)


class Judges:
    """The rewards of a run. They are asked for in a thread, while the next pictures are made; after
    a failure nobody is asked any more. And the returns that SDPO remembers."""

    def __init__(self, c, folder):
        device, self.folder, self.failed = folder.world.device, folder, None
        self.weights = {x['reward']: x.get('weight', 1.0) for x in c.reward}
        self.rewards = {name: rewards.load(name, device) for name in self.weights}
        self.score = scorer(c.score, folder.world) if c.score else None
        self.watched = {'watched': rewards.load(c.watch_reward, device)} if c.watch_reward else {}
        set_gpu = partial(torch.cuda.set_device, device) if device.type == 'cuda' else None
        self.pool, self.buffer = ThreadPoolExecutor(1, initializer=set_gpu), c.buffer
        self.memory = {(prompt, name, step): deque(past, c.buffer)
                       for prompt, name, step, past in folder.state if name in self.weights}
        folder.kept = lambda: [(*k, list(past)) for k, past in self.memory.items()]

    def ask(self, images, rows):
        """A tensor a reward. `submit` does it later."""
        try:
            if self.failed:
                raise self.failed
            return [torch.tensor(rewards.checked(name, f, images, rows, self.folder.out))
                    for name, f in self.rewards.items()]
        except rewards.RewardError as e:
            self.failed = e
            raise

    def submit(self, latents, rows, models):
        return self.pool.submit(self.ask, models.field.decode(latents).cpu(), rows)

    def note(self, batch, values):
        total = sum(w * v for w, v in zip(self.weights.values(), values))
        each = {f'reward/{k}': v for k, v in zip(self.weights, values)}
        self.folder.log.note(batch, reward=total, **each)

    def note_groups(self, samples, alive, group):
        dead = 1.0 - alive.float()
        self.folder.log.note(samples[::group], groups=torch.ones_like(dead), skipped_groups=dead,
                         skipped_share=dead)

    def remember(self, found):
        """SDPO's advantages {number: [of each step]}, all rewards' added by weight, from the
        samples of all processes: [(number, prompt, returns by reward and step)]. All processes
        remember the same."""
        names, found = list(self.weights), sorted(found)
        steps = range(len(found[0][2][0]))
        each = list(itertools.product(range(len(names)), steps))
        for (_, prompt, R), (r, i) in itertools.product(found, each):
            past = self.memory.setdefault((prompt, names[r], i), deque(maxlen=self.buffer))
            past.append(R[r][i])
        batch = {(r, i): [R[r][i] for _, _, R in found] for r, i in each}
        advantages = {number: [0.0] * len(steps) for number, _, _ in found}
        for (number, prompt, R), (r, i) in itertools.product(found, each):
            a = buffered(R[r][i], self.memory[prompt, names[r], i], batch[r, i])
            advantages[number][i] += self.weights[names[r]] * a
        return advantages
