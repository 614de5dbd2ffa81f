"""
Makes a LoRA teacher: by imitation, or by reward. The first half of the recipe; train_opd.py is the second.

    python train_teacher.py config/teacher_shapes_grpo.py            a taste, learned from a reward, on a CPU
    python train_teacher.py config/teacher_sd35_edit_sft.py          edit pairs
    torchrun --nproc_per_node=8 train_teacher.py config/teacher_sd35_grpo.py
    python train_teacher.py CONFIG --init_from=resume                continues the run

    method = 'sft'    flow matching on pictures or edit pairs (how DanceOPD's edit teachers are made)
    method = 'grpo'   DanceGRPO (2505.07818) and, by two settings, Flow-GRPO (2505.05470)
    method = 'sdpo'   Stepwise Diffusion Policy Optimization (2411.11727), for models of few steps

The run folder is a teacher for train_opd.py (teachers = [dict(name=..., lora='out/...')]) and a checkpoint
for sample.py. Fields, rollouts, transition, adapters, checkpoints and the loop are train_opd.py's. Left out
on purpose: value networks, reward models trained along the way, full fine-tuning.
"""
import math, sys
from functools import partial
from types import SimpleNamespace

import torch

import configurator
import train_opd
from configurator import collect, need
from support import checks, rewards
from support.checks import is_number
from support.files import judged, load_images, shown
from support.judges import Judges, group_advantage
from support.models import learning_rate
from support.processes import gather, launch, rng, torch_rng
from support.run import Folder
from train_opd import (FAMILIES, Method, Models, Sample, Term, action, at_step, col, kl_weight, log_prob,
                       micro_batches, plan, ppo_loss, render, trajectories, trajectory, velocity_error)

# --------------------------------------------------------------------------------------------------
# Settings. Those shared with train_opd.py (model, LoRA, optimiser, output) come from there, overridden here.
method = 'sft'
data: list = ['data/shapes/count.csv']
eval_data: list = ['data/shapes/count_val.csv']
init_from = 'base'                  # or an adapter, or 'resume'
rank = 16
alpha = 32.0
lora_targets: list | None = None    # None: the family's
# imitation
sigmas = 'logit_normal'             # or 'uniform': where on the family's schedule noise levels are drawn
prompt_dropout = 0.0                # share of samples with an empty prompt, so that guidance works later
# rollouts of grpo and sdpo
steps = 8                           # DanceGRPO 16, Flow-GRPO 10
sde = 'dance'                       # DanceGRPO 'dance' with eta 0.3, Flow-GRPO 'flow' with 0.7
eta = 0.3
guidance = 1.0                      # of the policy (Flow-GRPO 4.5)
group_size = 1                      # samples of one prompt (DanceGRPO 12, Flow-GRPO 24); sdpo: 2, pairs
same_noise = True                   # a group starts from one noise (DanceGRPO) or from many (Flow-GRPO)
drop_last: int | bool = 1           # so many last steps become one without noise, which is not trained. SD3's
                                    # schedule ends in a tiny step, whose noise is next to none with 'cps': 2
timestep_fraction = 0.6             # share of the steps that are trained, drawn anew each time (grpo)
clip_range = 1e-4
adv_clip = 5.0
global_std = False                  # divide advantages by the standard deviation of the whole batch instead
best_of = 0                         # train only on the best and worst, so many of each group (0: all)
updates = 1                         # optimizer steps a rollout; sdpo deals its shuffled steps among them
kl_beta = 0.0                       # KL to the base (Flow-GRPO 0.04); at 0 it is only looked at, for the log
kl_var = 'true'                     # 'code' leaves out the step's length, as Flow-GRPO's release does
gamma = 0.99                        # sdpo: discount of later rewards, and weight of later steps
buffer = 32                         # sdpo: returns remembered a prompt and step; used from 16 on
# rewards: reward is a name of rewards.py, a URL, or file.py:function; each is normalised before adding
reward: list = [dict(reward='shapes_smooth', weight=1.0)]
watch_reward = ''                   # one more, only looked at: does it fall while the others rise?
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
score = ''                          # file.py:function; looked at in evaluations, never trained on
eval_samples = 64
DISTILLATION = '''teachers routes routes_per_step mixing teacher_offload rollout_guidance student_guidance
states queries query anchor anchor_beta score_samples'''.split()  # train_opd.py's own
OWN = collect(sys.modules[__name__])
SETTINGS = tuple({**{k: v for k, v in shared.items() if k not in DISTILLATION}, **own}
                 for shared, own in zip(train_opd.SETTINGS, OWN))


def draw_sigma(schedule, r, kind):
    """A noise level from the family's own schedule (a fine one, falling): time uniform, or logit-normal
    around its middle. With a shift of 3 that is sigmoid(N(0, 1) + ln 3)."""
    u = r.random() if kind == 'uniform' else 1 / (1 + math.exp(-r.gauss(0, 1)))
    return schedule[min(int((1 - u) * (len(schedule) - 1)), len(schedule) - 2)]


def check(c):
    method, left, G = c.method, c.steps - c.drop_last, c.group_size
    choices = dict(checks.CHOICES, method=METHODS, sde=train_opd.SDES, sigmas=('logit_normal', 'uniform'))
    checks.check_settings(c, SETTINGS[0], choices, (*checks.ABOVE_0, 'eta', 'timestep_fraction'),
                          dealt='gamma' not in METHODS[method].settings)
    checks.require([(getattr(c, k) <= 1, f'{k} = {getattr(c, k)}: at most 1')
                    for k in ('timestep_fraction', 'prompt_dropout', 'gamma')])
    checks.require([
        (method != 'grpo' or G > 1, 'group_size = 1: GRPO compares the samples of one prompt; at '
         'least 2 (DanceGRPO: 12)'),
        (method != 'sdpo' or G == 2, f'group_size = {G}: SDPO compares two trajectories of one '
         'start; set group_size = 2'),
        (method != 'sdpo' or c.same_noise, "same_noise = False: SDPO's pairs start from one noise"),
        (method != 'sdpo' or c.micro_batch > 1, 'micro_batch = 1: the pairs of SDPO share a forward; '
         'at least 2'),
        (method != 'sdpo' or c.updates <= left, f'updates = {c.updates}: at most one for each of the '
         f'{left} steps that are trained'),
        (c.buffer >= 16, f'buffer = {c.buffer}: SDPO uses it from 16 returns on (published: 32)'),
        (c.best_of == 0 or 2 <= c.best_of <= G, f'best_of = {c.best_of}: 0, or from 2 to group_size '
         f'= {G}'),
        (c.sde != 'cps' or c.drop_last or method == 'sft', "sde = 'cps' ends without noise: set "
         'drop_last = 1'),
        (c.sde != 'cps' or c.kl_var == 'true', "kl_var = 'code' is about 'flow' and 'dance'; with "
         "sde = 'cps' leave it at 'true'"),
        (c.init_from != 'merge', "init_from = 'merge' belongs to train_opd.py; here: base, resume or "
         'an adapter')])
    check_rewards(c)
    c.routes = []                                              # one a bucket of the data
    return checks.check_data(c, FAMILIES, need_target=method == 'sft')


def check_rewards(c):
    asked = c.reward if c.method != 'sft' else ()
    need(c.method == 'sft' or asked, 'reward is empty: give at least one dict(reward=..., weight=...)')
    for r in asked:
        known = isinstance(r, dict) and set(r) <= {'reward', 'weight'} and isinstance(r.get('reward'), str)
        need(known, f'reward {r!r}: a dict(reward=name, weight=number)')
        need(is_number(r.get('weight', 1)), f'reward {r["reward"]!r}: weight must be more than 0, '
             f'not {r.get("weight")!r}')
    names = [r['reward'] for r in asked]
    need(len(set(names)) == len(names), f'reward: one stands there twice: {", ".join(names)}')
    for name in names + [c.watch_reward] * bool(c.watch_reward):
        rewards.check(name)


# --------------------------------------------------------------------------------------------------
# What an action was worth: rewards and advantages of a group of samples stand in a row

def combined_advantage(values, weights, group, clip=5.0, stds=None):
    """Several rewards: each normalised within its group, then added by weight, so that no scale wins. Also
    which groups are alive: one whose rewards are all equal teaches nothing and is skipped."""
    each = [group_advantage(v, group, std).clamp(-clip, clip)
            for v, std in zip(values, stds or [None] * len(values))]
    total = sum(w * a for w, a in zip(weights, each)).clamp(-clip, clip)
    return total, total.view(-1, group).abs().amax(1) > 0


def extremes(advantage, group, keep):
    """Which samples a best-of-N selection keeps: the best and the worst of each group, `keep` in all."""
    order = advantage.view(-1, group).argsort(1)
    chosen = torch.cat([order[:, :keep // 2], order[:, group - (keep - keep // 2):]], 1)
    return torch.zeros(len(order), group, dtype=torch.bool).scatter(1, chosen, True).view(-1)


def interpolate(x0, queried, values):
    """SDPO's rewards of all steps (n, B) from those asked for at `queried` (k, B): the mean of these,
    weighted by the cosine similarity of each step's predicted picture x0 (n, B, ...) to the queried ones."""
    f = torch.nn.functional.normalize(x0.flatten(2), dim=2)
    b = torch.arange(x0.shape[1])
    w = torch.stack([(f * f[q, b]).sum(2) for q in queried]).clamp_min(0)              # (k, n, B)
    r = (w * values[:, None]).sum(0) / w.sum(0).clamp_min(1e-8)
    for q, v in zip(queried, values):                                  # what was asked for is known
        r[q, b] = v
    return r


def returns(r, gamma):
    """R_t = r_t + gamma R_{t+1}, over the first dimension."""
    out = r.clone()
    for i in range(len(r) - 2, -1, -1):
        out[i] += gamma * out[i + 1]
    return out


def sdpo_loss(logp, logp_old, advantage, weight, clip_range):
    """(w [(log p1 - log p1_old) - (log p2 - log p2_old)] - (A1 - A2))^2 for pairs in neighbouring places: the
    larger of this and the same with log-probabilities clipped to +-clip_range of the old. One a pair."""
    def square(change):
        return (weight[0::2] * (change[0::2] - change[1::2]) - (advantage[0::2] - advantage[1::2])) ** 2
    change = logp - logp_old
    return torch.maximum(square(change), square(change.clamp(-clip_range, clip_range)))


# --------------------------------------------------------------------------------------------------
# Methods: generators of updates, which are generators of terms (see train_opd.py)

def sft(samples, models, c):
    yield flow_matching(samples, models, c)


def flow_matching(samples, models, c):
    """mean |v - (eps - x0)|^2 at random noise levels of the data's own pictures."""
    for batch in micro_batches(samples, models, c):
        schedule = models.sigmas(batch, 1000)
        for s in batch:
            if rng(c.seed, s.step, s.number, 'drop').random() < c.prompt_dropout:
                s.cond = s.empty
        sigma = torch.stack([draw_sigma(schedule, rng(c.seed, s.step, s.number, 'sigma'), c.sigmas)
                             for s in batch])
        with torch.no_grad():
            x0 = models.field.encode_image(load_images(batch, 'target_image'))
        eps = [torch.randn(x.shape, generator=s.noise) for s, x in zip(batch, x0)]
        eps = torch.stack(eps).to(x0.device)
        z = (1 - col(sigma)) * x0 + col(sigma) * eps
        loss = velocity_error(models.velocity('student', batch, z, sigma), eps - x0)
        yield Term(batch, loss, dict(loss=loss.detach(), sigma=sigma))


def near_base(t, v, i, models, c, looked):
    """KL(student step || base step), one number a sample, and the same for the log. With kl_beta = 0
    it is only looked at, once in a step."""
    if looked and not c.kl_beta:
        return 0.0, {}
    looked.append(True)
    z, sigma, sigma_next, _ = at_step(t, i)
    with torch.no_grad():
        v_base = models.velocity('base', t.batch, z, sigma, c.guidance)
    kl = kl_weight(sigma, sigma_next, c.eta, c.sde, c.kl_var) * velocity_error(v, v_base)
    return c.kl_beta * kl if c.kl_beta else 0.0, dict(kl=kl.detach())


def policy(t, i, models, c):
    """The student's velocity at step i of a trajectory (one number, or one a sample), and the
    log-probability of what was drawn there."""
    z, sigma, _, _ = at_step(t, i)
    v = models.velocity('student', t.batch, z, sigma, c.student_guidance)
    return v, log_prob(*action(t, i, c, v)), sigma


@torch.no_grad()
def last_picture(t, models, c):
    """The clean latents that a trajectory ends in; what its last steps lack is one without noise."""
    n, z = len(t.z) - 1, t.z[-1]
    if n == c.steps:
        return z
    sigma = t.sigmas[n]
    return z - sigma * models.velocity('student', t.batch, z, sigma.expand(len(z)), c.guidance)


def pick(t, k):
    """Some samples of a trajectory: entries k of its batch, columns k of its tensors (steps, B, ..)."""
    own = {name: x[:, k] for name, x in vars(t).items() if name not in ('batch', 'sigmas')}
    return SimpleNamespace(batch=[t.batch[j] for j in k], sigmas=t.sigmas, **own)


def grpo(samples, models, c):
    """Advantage within the group, PPO ratio step by step, on a random share of the steps."""
    n, looked, judges = c.steps - c.drop_last, [], models.judges
    dealt = trajectories(samples, models, c)
    everyone = [t for some in dealt for t in some]
    jobs = [judges.submit(last_picture(t, models, c), [s.row for s in t.batch], models)
            for t in everyone]
    values = {id(t): job.result() for t, job in zip(everyone, jobs)}
    for t in everyone:
        judges.note(t.batch, values[id(t)])
    stds = None
    if c.global_std:                                           # of all updates and processes
        rows = [r for t in everyone for r in torch.stack(values[id(t)], 1).tolist()]
        stds = list(torch.tensor(gather(judges.folder.world, rows)).std(0))
    trained = rng(c.seed, samples[0].step, 'steps').sample(range(n), max(1, round(n * c.timestep_fraction)))
    for some in dealt:
        together = [torch.cat(v) for v in zip(*(values[id(t)] for t in some))]
        advantage, alive = combined_advantage(together, judges.weights.values(), c.group_size,
                                              c.adv_clip, stds)
        judges.note_groups([s for t in some for s in t.batch], alive, c.group_size)
        use = alive.repeat_interleave(c.group_size)
        if c.best_of:
            use &= extremes(advantage, c.group_size, c.best_of)
        yield grpo_terms(some, advantage, use, sorted(trained), models, c, looked)


def grpo_terms(some, advantage, use, trained, models, c, looked):
    scale, at = c.updates / len(trained) * (c.group_size / c.best_of if c.best_of else 1), 0
    for t in some:
        here = slice(at, at + len(t.batch))
        at += len(t.batch)
        t.advantage = advantage[None, here].to(models.field.device)
        t = pick(t, use[here].nonzero().flatten().tolist())
        for i in trained if t.batch else ():
            v, logp, sigma = policy(t, i, models, c)
            loss, numbers = ppo_loss(logp, t.logp[i], t.advantage[0], c.clip_range)
            kl, seen = near_base(t, v, i, models, c, looked)
            yield Term(t.batch, scale * (loss + kl), dict(loss=loss.detach(), sigma=sigma, **numbers, **seen))


def sdpo(samples, models, c):
    """Two trajectories from one noise, rewards along the way, the difference loss on shuffled steps,
    which are dealt among the updates."""
    judges, looked, n = models.judges, [], c.steps - c.drop_last
    pairs = [dual_states(trajectory(batch, models, c), models, c)
             for batch in micro_batches(samples, models, c, whole=2)]
    jobs = []
    for t in pairs:
        latents = torch.cat([t.clean[q, torch.arange(len(t.batch))] for q in t.asked])
        jobs.append(judges.submit(latents, [s.row for s in t.batch] * len(t.asked), models))
    found = []
    for t, job in zip(pairs, jobs):
        values = [v.view(len(t.asked), -1).to(t.z.device) for v in job.result()]
        judges.note(t.batch, [v[-1] for v in values])
        t.returns = torch.stack([returns(interpolate(t.clean, t.asked, v), c.gamma) for v in values])
        found += [(s.number, s.row['prompt'], t.returns[:, :, j].tolist())
                  for j, s in enumerate(t.batch)]
    advantages = judges.remember(gather(judges.folder.world, found))
    for t in pairs:
        t.advantage = torch.tensor([advantages[s.number] for s in t.batch], device=t.z.device).T
        t.advantage = t.advantage.clamp(-c.adv_clip, c.adv_clip)
        differ = (t.returns[..., 0::2] != t.returns[..., 1::2]).any(0).any(0)
        judges.note_groups(t.batch, differ, 2)
        t.order = torch.tensor([rng(c.seed, s.step, s.group, 'order').sample(range(n), n)
                                for s in t.batch]).T
    for u in range(c.updates):
        yield sdpo_terms(pairs, [k for k in range(n) if k * c.updates // n == u], models, c, looked)


def dual_states(t, models, c):
    """After each step the noisy latent, and the clean picture predicted from it: t.clean. (The
    prediction from the common first noise is the same for both and cannot tell them apart.) And of
    which steps rewards are asked: first, a drawn one, last."""
    later = [t.z[i] - t.sigmas[i] * t.v[i] for i in range(1, len(t.v))]
    t.clean = torch.stack([*later, last_picture(t, models, c)])
    n, zero = len(t.clean), torch.zeros(len(t.batch), dtype=torch.long)
    t.asked = [zero, zero + n - 1] if n > 1 else [zero]
    if n > 2:
        middle = [rng(c.seed, s.step, s.group, 'anchor').randrange(1, n - 1) for s in t.batch]
        t.asked.insert(1, torch.tensor(middle))
    return t


def sdpo_terms(pairs, places, models, c, looked):
    """An update's places in the shuffled order of steps."""
    for t in pairs:
        for i in t.order[places]:
            b = torch.arange(len(i))
            v, logp, sigma = policy(t, i, models, c)
            loss = sdpo_loss(logp, t.logp[i, b], t.advantage[i, b], c.gamma ** i.to(v.device),
                             c.clip_range).repeat_interleave(2)
            kl, seen = near_base(t, v, i, models, c, looked)
            off = (logp - t.logp[i, b]).detach().abs()
            numbers = dict(loss=loss.detach(), sigma=sigma, ratio_off=off,
                           clipped=(off > c.clip_range).float(), **seen)
            yield Term(t.batch, (loss + kl) / len(places), numbers)


ROLLOUT = ('steps', 'sde', 'eta', 'group_size', 'same_noise', 'drop_last', 'clip_range', 'adv_clip',
           'updates', 'kl_beta', 'kl_var', 'reward')
METHODS = dict(
    sft=Method(sft, ('sigmas', 'prompt_dropout')),
    grpo=Method(grpo, (*ROLLOUT, 'timestep_fraction', 'best_of', 'global_std')),
    sdpo=Method(sdpo, (*ROLLOUT, 'gamma', 'buffer')))


# --------------------------------------------------------------------------------------------------
# Evaluation and training

def evaluate(step, held, models, c, folder):
    """Fixed noise: rewards, the watched one, the score, by bucket; and the grid that shows hacking."""
    student, world, judges, lines, found = models.student, folder.world, models.judges, [], {}
    for route in c.routes:
        label, rows = route['data'], held[route['data']][:c.eval_samples]
        few = rows[:c.show]
        if label not in folder.stills:                         # what does not change: once a run
            pairs = [shown(few, k, route['size']) for k in ('source_image', 'target_image')]
            folder.stills[label] = *pairs, render('base', route, few, models, c, world)
        with student.wearing(student.ema):
            now = render('student', route, rows, models, c, world)
            if c.method == 'sft' and all(r['target_image'] for r in rows):
                found[f'loss/{label}'] = held_loss(route, rows, models, c, world)
        for name, f in {**judges.rewards, **judges.watched}.items():
            checked = partial(rewards.checked, name, f, folder=folder.out)
            found[f'{name}/{label}'] = judged(checked, now, rows, c.micro_batch, world)
        if c.score:
            found[f'score/{label}'] = judged(c.score, now, rows, c.micro_batch, world)
        lines += zip((f'{label}: {r["prompt"]}' for r in few), *folder.stills[label], now)
    folder.draw(step, lines, ['source', 'target', 'base', 'now'])
    folder.say(f'step {step:6d}  ' + '  '.join(f'{k} {v:.4g}' for k, v in found.items()))
    folder.add(dict(step=step, **{f'eval/{k}': v for k, v in found.items()}))


@torch.no_grad()
def held_loss(route, rows, models, c, world):
    """Imitation's loss on held-out rows."""
    samples = [Sample(r, route['size'], torch_rng(c.seed, 'loss', route['data'], i), step='eval', number=i)
               for i, r in enumerate(rows)]
    terms = flow_matching(samples[world.rank::world.size], models, c)
    losses = gather(world, [x for term in terms for x in term.loss.tolist()])
    return sum(losses) / len(losses)


def main(argv):
    c = checks.own_settings(SETTINGS, argv)
    data = check(c)
    world = launch(c.device, c.tf32)
    if world.rank == 0:
        print(f'{c.method} on {c.model}, {c.batch_size} samples a step in groups of {c.group_size}')
        for k, b in data.buckets.items():
            print(f'bucket {k:20s} {len(b)} rows, {len(data.held[k])} to evaluate on')
    if c.dry_run:
        return print('dry run: settings and data are fine')
    c.routes_per_step, c.rollout_guidance, c.student_guidance = 'sample', c.guidance, c.guidance
    dealt = c.updates if 'gamma' not in METHODS[c.method].settings else 1    # SDPO deals its steps
    alike = c.same_noise and c.method != 'sft'

    folder = Folder(c, world)
    held = data.drawn(c.seed, max(c.eval_samples, c.show))
    models = Models.open(FAMILIES, c, world.device, data, held, checkpoint=folder.resumed)
    models.prompts.expect(s.row for step in range(folder.first, c.max_steps)
                          for s in plan(step, c, data.buckets, world, alike, dealt))
    models.judges, student = Judges(c, folder), models.student
    folder.begin(models, data, held)
    if folder.first % c.eval_every == 0 and not folder.evaluated():
        evaluate(folder.first, held, models, c, folder)

    for step in (bar := folder.bar()):
        world.stop.busy, models.spent = True, 0
        samples = plan(step, c, data.buckets, world, alike, dealt)
        for terms in METHODS[c.method].updates(samples, models, c):
            for term in terms:
                share = torch.tensor([s.share for s in term.batch], device=world.device)
                (share * term.loss).sum().backward()
                folder.note(term.batch, **term.numbers)
            norm = student.update(learning_rate(step, c), c, world)
            folder.watch(step, norm, student)
        folder.tally(cost=models.spent)

        done, final = step + 1, step + 1 == c.max_steps
        bar.set_postfix(folder.glance(samples), refresh=False)
        if done % c.log_every == 0 or final:
            folder.report(done, grad_norm=norm, lr=learning_rate(step, c))
        ending = any(gather(world, [world.stop.asked]))
        if done % c.save_every == 0 or final or ending:
            folder.save(done, models)
        world.stop.busy = False
        if ending:
            return folder.say(f'asked to stop: saved step {done}; continue with --init_from=resume')
        if done % c.eval_every == 0 or final:
            evaluate(done, held, models, c, folder)
    found = [e for e in folder.history if 'lr' not in e]       # without targets or a score, empty
    folder.end({k[5:]: dict(before=found[0].get(k, x), after=x) for k, x in found[-1].items()
                if k != 'step'}, 'evaluation')


if __name__ == '__main__':
    configurator.run(main)
