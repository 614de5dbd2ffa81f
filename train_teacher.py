"""
Makes a LoRA teacher, by imitation or by reward: the first half of the recipe (then train_opd.py).

    python train_teacher.py config/teacher_shapes_grpo.py      a taste, from a reward, on a CPU
    python train_teacher.py config/teacher_sd35_edit_sft.py    edit pairs
    torchrun --nproc_per_node=8 train_teacher.py config/teacher_sd35_grpo.py
    python train_teacher.py CONFIG --init_from=resume          continues the run

    method = 'sft'    flow matching on pictures or edit pairs (DanceOPD's edit teachers)
    method = 'grpo'   DanceGRPO (2505.07818), Flow-GRPO (2505.05470): config/teacher_*grpo.py
    method = 'sdpo'   Stepwise Diffusion Policy Optimization (2411.11727), for models of few steps

The run folder is a teacher for train_opd.py (teachers = [dict(name=..., lora='out/...')]) and a
checkpoint for sample.py. Fields, rollouts, transition and adapters are train_opd.py's.
Left out on purpose: value networks, reward models trained along the way, full fine-tuning.
"""
import math, sys
from functools import partial
from types import SimpleNamespace

import torch

import configurator
import train_opd
from configurator import collect
from support import checks, rewards
from support.files import judged, load_images, shown
from support.judges import Judges, flat, group_advantage
from support.processes import gather, launch, rng, torch_rng
from support.run import Folder
from train_opd import (FAMILIES, Method, Models, Sample, Term, action, at_step, col, gaussian,
                       kl_weight, log_prob, micro_batches, plan, ppo_loss, render, train,
                       trajectories, trajectory, velocity_error)

# --------------------------------------------------------------------------------------------------
# Settings. Those shared with train_opd.py come from there; some have other defaults here
method = 'sft'                      # one of METHODS below
data: list = ['data/shapes/count.csv']
eval_data: list = ['data/shapes/count_val.csv']
init_from = 'base'                  # or an adapter, or 'resume'
rank = 16
alpha = 32.0
lora_targets: list | None = None    # None: the family's
# imitation
sigmas = 'logit_normal'             # or 'uniform': where on the family's schedule sigmas are drawn
prompt_dropout = 0.0                # share of samples without their prompt: guidance needs some
# rollouts of grpo and sdpo
steps = 8                           # DanceGRPO 16, Flow-GRPO 10
sde = 'dance'                       # DanceGRPO 'dance' with eta 0.3, Flow-GRPO 'flow' with 0.7
eta = 0.3
guidance = 1.0                      # of the policy (Flow-GRPO 4.5)
group_size = 1                      # samples of one prompt (DanceGRPO 12, Flow-GRPO 24; SDPO 2)
same_noise = True                   # a group starts from one noise (DanceGRPO), or each its own
drop_last = 1                       # last steps made one, noiseless, untrained (SD3 with 'cps': 2)
timestep_fraction = 0.6             # grpo: share of the steps that are trained, drawn each time
clip_range = 1e-4                   # grpo: of the PPO ratio; sdpo: of the log-probability's change
adv_clip = 5.0                      # advantages, of each reward and of their sum
global_std = False                  # grpo: divide by the standard deviation of the whole batch
best_of = 0                         # grpo: of each group, train so many, best and worst (0: all)
updates = 1                         # optimizer steps a rollout; sdpo deals its steps among them
kl_beta = 0.0                       # KL to the base (Flow-GRPO 0.04); at 0 it is only logged
kl_var = 'true'                     # 'code': std^2 without the step's length (Flow-GRPO's release)
gamma = 0.99                        # sdpo: discount of later rewards, and weight of later steps
buffer = 32                         # sdpo: returns kept for a prompt and step; used from 16 on
# rewards: reward is a name of support/rewards.py, a URL or file.py:function; normalised, then added
reward: list = [dict(reward='shapes_smooth', weight=1.0)]
watch_reward = ''                   # one more, only logged: does it fall while the others rise?
# optimiser and output
max_steps = 300
batch_size = 32
micro_batch = 32
lr = 2e-3
lr_schedule = 'cosine'
warmup = 20
ema_decay = 0.98
out_dir = 'out/teacher'
sample_steps = 16
score = ''                          # as a reward; asked in evaluations, never trained on
eval_samples = 64
DISTILLATION = '''teachers routes routes_per_step mixing teacher_offload rollout_guidance
student_guidance states queries query query_in anchor anchor_beta score_samples'''.split()
OWN = collect(sys.modules[__name__])
SETTINGS = tuple({**{k: v for k, v in shared.items() if k not in DISTILLATION}, **own}
                 for shared, own in zip(train_opd.SETTINGS, OWN))


def check(c):
    choices = dict(checks.CHOICES, method=METHODS, sde=train_opd.SDES,
                   sigmas=('logit_normal', 'uniform'))
    checks.check_choices(c, choices)
    above = *checks.ABOVE_0, 'eta', 'timestep_fraction', 'guidance'
    checks.check_settings(c, SETTINGS[0], choices, above, dealt=not in_pairs(c))
    trained, G, pairs = c.steps - c.drop_last, c.group_size, in_pairs(c)
    c.reward = [] if imitates(c) else c.reward                 # unread: no model is loaded for it
    checks.require([(getattr(c, k) <= 1, f'{k} = {getattr(c, k)}: at most 1')
                    for k in ('timestep_fraction', 'prompt_dropout', 'gamma')])
    checks.require([
        (c.reward or imitates(c), 'reward is empty: give at least one dict(reward=...)'),
        (G > 1 or pairs or imitates(c), 'group_size = 1: GRPO compares the samples of one prompt; '
         'at least 2 (DanceGRPO: 12)'),
        (not pairs or G == 2, f'group_size = {G}: SDPO compares two trajectories of one '
         'start; set group_size = 2'),
        (not pairs or c.same_noise, "same_noise = False: SDPO's pairs start from one noise"),
        (not pairs or c.micro_batch > 1, 'micro_batch = 1: the pairs of SDPO share a '
         'forward; at least 2'),
        (not pairs or c.updates <= trained, f'updates = {c.updates}: at most one for each of '
         f'the {trained} steps that are trained'),
        (c.buffer >= 16, f'buffer = {c.buffer}: SDPO uses it from 16 returns on (published: 32)'),
        (c.best_of == 0 or 2 <= c.best_of <= G, f'best_of = {c.best_of}: 0, or from 2 to '
         f'group_size = {G}'),
        (c.sde != 'cps' or c.drop_last or imitates(c), "sde = 'cps' ends without noise: set "
         'drop_last = 1'),
        (c.sde != 'cps' or c.kl_var == 'true', "kl_var = 'code' is about 'flow' and 'dance'; with "
         "sde = 'cps' leave it at 'true'"),
        (c.init_from != 'merge', "init_from = 'merge' belongs to train_opd.py; here: base, resume "
         'or an adapter')])
    checks.check_rewards(c)
    c.routes = []                                              # one a bucket of the data
    return checks.check_data(c, FAMILIES, need_target=imitates(c))


# --------------------------------------------------------------------------------------------------
# What an action was worth: rewards and advantages of a group of samples stand in a row

def combined_advantage(values, weights, stds, group, clip):
    """Of several rewards: (r - mean) / std of each within its group, then added by weight, so that
    no scale wins. And which groups are alive: one whose rewards are all equal teaches nothing."""
    each = [group_advantage(v, group, std).clamp(-clip, clip) for v, std in zip(values, stds)]
    total = sum(w * a for w, a in zip(weights, each)).clamp(-clip, clip)
    return total, torch.stack(each).view(len(each), -1, group).abs().amax((0, 2)) > 0


def extremes(advantage, group, keep):
    """Best-of-N: which samples are the best and the worst of each group, `keep` in all."""
    order = advantage.view(-1, group).argsort(1)
    chosen = torch.cat([order[:, :keep // 2], order[:, group - (keep - keep // 2):]], 1)
    return torch.zeros(len(order), group, dtype=torch.bool).scatter(1, chosen, True).view(-1)


def interpolate(x0, asked, values):
    """SDPO's rewards of all steps (n, B) from the `values` of the steps `asked` about (k, B): their
    mean, weighted by the cosine similarity of a step's predicted x0 (n, B, ...) to those asked."""
    f = torch.nn.functional.normalize(x0.flatten(2), dim=2)
    b = torch.arange(x0.shape[1])
    w = torch.stack([(f * f[i, b]).sum(2) for i in asked]).clamp_min(0)                # (k, n, B)
    r = (w * values[:, None]).sum(0) / w.sum(0).clamp_min(1e-8)
    for i, v in zip(asked, values):                            # what was asked about is known
        r[i, b] = v
    return r


def returns(r, gamma):
    """R_t = r_t + gamma R_{t+1}, over the first dimension."""
    R = r.clone()
    for t in reversed(range(len(r) - 1)):
        R[t] += gamma * R[t + 1]
    return R


def sdpo_loss(logp, logp_old, advantage, weight, clip_range):
    """(w [(log p1 - log p1_old) - (log p2 - log p2_old)] - (A1 - A2))^2 of pairs in neighbouring
    places; the larger of it and of the same with log p clipped to log p_old +- clip_range."""
    def square(change):
        return (weight[0::2] * (change[0::2] - change[1::2])
                - (advantage[0::2] - advantage[1::2])) ** 2
    change = logp - logp_old
    return torch.maximum(square(change), square(change.clamp(-clip_range, clip_range)))


# --------------------------------------------------------------------------------------------------
# Methods: generators of updates, which are generators of terms (see train_opd.py)

def sft(samples, models, c):
    yield flow_matching(samples, models, c, c.prompt_dropout)


def flow_matching(samples, models, c, dropout=0.0):
    """mean |v - (eps - x0)|^2 at random noise levels of the data's own pictures."""
    for batch in micro_batches(samples, models, c):
        schedule, sigma = models.sigmas(batch, 1000), []
        for s in batch:
            key = c.seed, s.step, s.number
            if rng(*key, 'drop').random() < dropout:
                s.cond = s.empty
            sigma.append(draw_sigma(schedule, rng(*key, 'sigma'), c.sigmas))
        with torch.no_grad():
            x0 = models.field.encode_image(load_images(batch, 'target_image'))
        sigma, eps = torch.stack(sigma), gaussian(batch, x0.shape[1:], 'noise', x0.device)
        z = (1 - col(sigma, x0)) * x0 + col(sigma, x0) * eps
        loss = velocity_error(models.velocity('student', batch, z, sigma), eps - x0)
        yield Term(batch, loss, dict(loss=loss.detach(), sigma=sigma))


def draw_sigma(schedule, r, kind):
    """A noise level from the family's own schedule (a fine one, falling): time uniform, or logit-
    normal around its middle. With a shift of 3 that is sigmoid(N(0, 1) + ln 3)."""
    time = r.random() if kind == 'uniform' else 1 / (1 + math.exp(-r.gauss(0, 1)))
    return schedule[min(int((1 - time) * (len(schedule) - 1)), len(schedule) - 2)]


def policy(t, i, models, c):
    """The student's velocity at step i of a trajectory (one number, or one a sample), and the
    log-probability of what was drawn there."""
    z, sigma, _, _ = at_step(t, i)
    v = models.velocity('student', t.batch, z, sigma, c.guidance)
    return v, log_prob(*action(t, i, c, v)), sigma


def kl_to_base(t, i, v, models, c, looked):
    """kl_beta KL(student's step || base's step), one number a sample, and what the log says of it.
    With kl_beta = 0 it is only logged, for the first term, while `looked` is empty."""
    if looked and not c.kl_beta:
        return 0.0, {}
    looked.append(True)
    z, sigma, sigma_next, _ = at_step(t, i)
    with torch.no_grad():
        v_base = models.velocity('base', t.batch, z, sigma, c.guidance)
    kl = kl_weight(sigma, sigma_next, c.eta, c.sde, c.kl_var) * velocity_error(v, v_base)
    return c.kl_beta * kl if c.kl_beta else 0.0, dict(kl=kl.detach())


@torch.no_grad()
def last_clean(t, models, c):
    """The clean latents that a trajectory ends in: the steps it lacks are one without noise."""
    n, z = len(t.z) - 1, t.z[-1]
    if n == c.steps:
        return z
    sigma = t.sigmas[n]
    return z - sigma * models.velocity('student', t.batch, z, sigma.expand(len(z)), c.guidance)


def pick(t, k):
    """Some samples of a trajectory: entries k of its batch, columns k of its tensors."""
    tensors = {name: x[:, k] for name, x in vars(t).items() if name not in ('batch', 'sigmas')}
    return SimpleNamespace(batch=[t.batch[j] for j in k], sigmas=t.sigmas, **tensors)


def grpo(samples, models, c):
    """Advantages within groups, the PPO ratio step by step, on a random share of the steps."""
    judges, looked, n, G = models.judges, [], c.steps - c.drop_last, c.group_size
    dealt = trajectories(samples, models, c)
    everyone = [t for update in dealt for t in update]
    jobs = [judges.submit(last_clean(t, models, c), [s.row for s in t.batch], models)
            for t in everyone]
    for t, job in zip(everyone, jobs):
        t.rewards = torch.stack(job.result())                  # (rewards, B)
        del t.v                                                # memory: logp has what it said
        judges.note(t.batch, t.rewards)
    stds = [None] * len(judges.weights)
    if c.global_std:                                           # of all updates and processes
        found = [r for t in everyone for r in t.rewards.T.tolist()]
        stds = torch.tensor(gather(judges.folder.world, found)).std(0)
    many = max(1, round(n * c.timestep_fraction))
    steps = sorted(rng(c.seed, samples[0].step, 'steps').sample(range(n), many))
    for update in dealt:
        values = torch.cat([t.rewards for t in update], 1)
        advantage, alive = combined_advantage(values, judges.weights.values(), stds, G, c.adv_clip)
        judges.note_groups([s for t in update for s in t.batch], alive, G)
        use = alive.repeat_interleave(G)
        if c.best_of:
            use &= extremes(advantage, G, c.best_of)
        yield grpo_terms(update, advantage, use, steps, models, c, looked)


def grpo_terms(update, advantage, use, steps, models, c, looked):
    """max(-A r, -A clip(r)) + kl_beta KL: the mean over the steps and over the samples that
    best_of leaves; samples of groups that are not alive count, and add nothing."""
    scale = c.updates / len(steps) * (c.group_size / c.best_of if c.best_of else 1)
    sizes = [len(t.batch) for t in update]
    for t, a, used in zip(update, advantage.split(sizes), use.split(sizes)):
        k = used.nonzero().flatten()
        t, a = pick(t, k.tolist()), a[k].to(models.field.device)
        for i in steps if t.batch else ():
            v, logp, sigma = policy(t, i, models, c)
            loss, numbers = ppo_loss(logp, t.logp[i], a, c.clip_range)
            kl, more = kl_to_base(t, i, v, models, c, looked)
            numbers |= dict(loss=loss.detach(), sigma=sigma, **more)
            yield Term(t.batch, scale * (loss + kl), numbers)


def sdpo(samples, models, c):
    """Two trajectories from one noise, rewards along the way, the difference loss on shuffled
    steps, which are dealt among the updates."""
    judges, looked, n, found = models.judges, [], c.steps - c.drop_last, []
    pairs = [dual_states(trajectory(batch, models, c), models, c)
             for batch in micro_batches(samples, models, c, whole=2)]
    jobs = []
    for t in pairs:
        latents = torch.cat([t.clean[i, torch.arange(len(t.batch))] for i in t.asked])
        jobs.append(judges.submit(latents, [s.row for s in t.batch] * len(t.asked), models))
    for t, job in zip(pairs, jobs):
        values = [v.view(len(t.asked), -1).to(t.z.device) for v in job.result()]
        judges.note(t.batch, [v[-1] for v in values])
        t.returns = torch.stack([returns(interpolate(t.clean, t.asked, v), c.gamma)
                                 for v in values])             # (rewards, steps, B)
        found += [(s.number, s.row['prompt'], t.returns[:, :, j].tolist())
                  for j, s in enumerate(t.batch)]
    advantages = judges.remember(gather(judges.folder.world, found))
    for t in pairs:
        a = torch.tensor([advantages[s.number] for s in t.batch], device=t.z.device).T
        t.advantage = a.clamp(-c.adv_clip, c.adv_clip)         # (steps, B)
        alive = ~flat(t.returns.unflatten(2, (-1, 2)), 3).all(0).all(0)        # of pairs
        judges.note_groups(t.batch, alive, 2)
        t.order = torch.tensor([rng(c.seed, s.step, s.group, 'order').sample(range(n), n)
                                for s in t.batch]).T
    for u in range(c.updates):
        places = [k for k in range(n) if k * c.updates // n == u]
        yield sdpo_terms(pairs, places, models, c, looked)


def dual_states(t, models, c):
    """Beside the noisy state after each step the clean latents predicted from it, t.clean, and
    t.asked: the steps whose rewards are asked for, the first, a drawn one and the last. (What is
    predicted from the noise that a pair begins with cannot tell the two apart.)"""
    later = [t.z[i] - t.sigmas[i] * t.v[i] for i in range(1, len(t.v))]
    t.clean = torch.stack([*later, last_clean(t, models, c)])
    del t.v                                                    # memory
    n, first = len(t.clean), torch.zeros(len(t.batch), dtype=torch.long)
    t.asked = [first, first + n - 1] if n > 1 else [first]
    if n > 2:
        drawn = [rng(c.seed, s.step, s.group, 'anchor').randrange(1, n - 1) for s in t.batch]
        t.asked.insert(1, torch.tensor(drawn))
    return t


def sdpo_terms(pairs, places, models, c, looked):
    """An update's places in the shuffled order of steps."""
    for t in pairs:
        b = torch.arange(len(t.batch))
        for i in t.order[places]:
            v, logp, sigma = policy(t, i, models, c)
            logp_old, weight = t.logp[i, b], c.gamma ** i.to(v.device)
            loss = sdpo_loss(logp, logp_old, t.advantage[i, b], weight, c.clip_range)
            loss = loss.repeat_interleave(2)                   # a pair's, for both
            kl, more = kl_to_base(t, i, v, models, c, looked)
            off = (logp - logp_old).detach().abs()
            numbers = dict(loss=loss.detach(), sigma=sigma, ratio_off=off,
                           clipped=(off > c.clip_range).float(), **more)
            yield Term(t.batch, (loss + kl) / len(places), numbers)


ROLLOUT = ('steps', 'sde', 'eta', 'group_size', 'same_noise', 'drop_last', 'clip_range', 'adv_clip',
           'updates', 'kl_beta', 'kl_var', 'reward')
METHODS = dict(
    sft=Method(sft, ('sigmas', 'prompt_dropout')),
    grpo=Method(grpo, (*ROLLOUT, 'timestep_fraction', 'best_of', 'global_std')),
    sdpo=Method(sdpo, (*ROLLOUT, 'gamma', 'buffer')))


# a method is known by what its entry declares
def imitates(c):
    """No reward: it learns from the data's own pictures."""
    return 'reward' not in METHODS[c.method].settings


def in_pairs(c):
    """As SDPO, whose updates share the steps of a rollout; those of others share groups."""
    return 'buffer' in METHODS[c.method].settings


# --------------------------------------------------------------------------------------------------
# Evaluation and training

def evaluate(step, held, models, c, folder):
    """Rewards, the watched one, the score, by bucket, and the grid that shows hacking."""
    student, world, judges, lines, found = models.student, folder.world, models.judges, [], {}
    for route in c.routes:
        label, rows = route['data'], held[route['data']][:c.eval_samples]
        few = rows[:c.show]
        if label not in folder.stills:                         # what does not change: once a run
            pairs = [shown(few, k, route['size']) for k in ('source_image', 'target_image')]
            folder.stills[label] = *pairs, render('base', route, few, models, c, world)
        with student.wearing(student.ema):
            now = render('student', route, rows, models, c, world)
            if imitates(c) and all(row['target_image'] for row in rows):
                found[f'loss/{label}'] = held_loss(route, rows, models, c, world)
        for name, f in {**judges.rewards, **judges.watched}.items():
            checked = partial(rewards.checked, name, f, folder=folder.out)
            found[f'{name}/{label}'] = judged(checked, now, rows, c.micro_batch, world)
        if judges.score:
            found[f'score/{label}'] = judges.score(now, rows, c.micro_batch)
        lines += zip((f'{label}: {row["prompt"]}' for row in few), *folder.stills[label], now)
    folder.log.say(f'step {step:6d}  ' + '  '.join(f'{k} {x:.4g}' for k, x in found.items()))
    folder.log.add(dict(step=step, **{f'eval/{k}': x for k, x in found.items()}))
    folder.draw(step, lines, ['source', 'target', 'base', 'now'])


@torch.no_grad()
def held_loss(route, rows, models, c, world):
    """Imitation's loss on held-out rows."""
    samples = [Sample(row, route['size'], torch_rng(c.seed, 'loss', route['data'], i), step='eval',
                      number=i) for i, row in enumerate(rows)]     # sigmas of no step of training
    terms = flow_matching(samples[world.rank::world.size], models, c)
    losses = gather(world, [x for term in terms for x in term.loss.tolist()])
    return sum(losses) / len(losses)


def main(argv):
    c = checks.own_settings(SETTINGS, argv)
    data = check(c)
    world = launch(c.device, c.tf32)
    if world.rank == 0:
        print(f'{c.method} on {c.model}, rate {c.lr:g}, {c.batch_size} samples a step in groups of '
              f'{c.group_size}')
        for k, b in data.buckets.items():
            print(f'bucket {k:20s} {data.told(k)}')
    if c.dry_run:
        return checks.tell_dry_run(c, world)
    vars(c).update(routes_per_step='sample', mixing='hard', teacher_offload=False,
                   rollout_guidance=c.guidance, student_guidance=c.guidance)
    samples_of = partial(plan, c=c, buckets=data.buckets, world=world,
                         same_noise=c.same_noise and not imitates(c),
                         updates=1 if in_pairs(c) else c.updates)

    folder = Folder(c, world)
    held = data.drawn(c.seed, max(c.eval_samples, c.show))
    models = Models.open(FAMILIES, c, world.device, data, held, checkpoint=folder.resumed)
    models.prompts.expect(s.row for step in range(folder.first, c.max_steps)
                          for s in samples_of(step))
    models.judges = Judges(c, folder)
    look = partial(evaluate, held=held, models=models, c=c, folder=folder)
    folder.begin(models, data, held)
    if train(samples_of, METHODS[c.method].updates, models, look, c, folder):
        log = folder.log                                       # without targets or a score, empty
        folder.end({k[5:]: log.ends(k) for k in log.history[-1] if k.startswith('eval/')},
                   'evaluation')


if __name__ == '__main__':
    configurator.run(main)
