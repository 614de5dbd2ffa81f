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
import itertools, math, os, sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

import configurator
import rewards
import train_opd
from configurator import collect, need
from files import grid, load_function, load_image, score_mean
from train_opd import (Run, check_data, check_number, check_settings, diffusionopd_loss, gather,
                       group_advantage, pick, ppo_loss, rng, torch_rng, velocity_error)

# ------------------------------------------------------------------------------------------------------------
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
ROLLOUT = 'steps sde eta group_size same_noise drop_last clip_range adv_clip updates kl_beta kl_var reward'
OWN = collect(sys.modules[__name__])
SETTINGS = tuple({**{k: v for k, v in shared.items() if k not in train_opd.DISTILLATION}, **own}
                 for shared, own in zip(train_opd.SETTINGS, OWN))


# ------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions

def draw_sigma(schedule, r, kind):
    """A noise level from the family's own schedule (a fine one, falling): time uniform, or logit-normal
    around its middle. With a shift of 3 that is sigmoid(N(0, 1) + ln 3)."""
    u = r.random() if kind == 'uniform' else 1 / (1 + math.exp(-r.gauss(0, 1)))
    return schedule[min(int((1 - u) * (len(schedule) - 1)), len(schedule) - 2)]


def combined_advantage(values, weights, group, clip=5.0, stds=None):
    """Several rewards: each normalised within its group, then added by weight, so that no scale wins. Also
    which groups are alive: one whose rewards are all equal teaches nothing and is skipped."""
    parts = [group_advantage(v, group, clip, std) for v, std in zip(values, stds or [None] * len(values))]
    total = sum(w * a for w, a in zip(weights, parts)).clamp(-clip, clip)
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


def buffered(x, past, batch):
    """SDPO's advantage of a return: against those remembered of its prompt and step, or, while these are
    fewer than 16, against the whole batch's of its step."""
    known = torch.tensor(list(past) if len(past) >= 16 else batch)
    return (x - known.mean()) / (known.std() + 1e-6)


def sdpo_loss(logp, logp_old, advantage, weight, clip_range):
    """(w [(log p1 - log p1_old) - (log p2 - log p2_old)] - (A1 - A2))^2 for pairs in neighbouring places: the
    larger of this and the same with log-probabilities clipped to +-clip_range of the old. One a pair."""
    def square(change):
        return (weight[0::2] * (change[0::2] - change[1::2]) - (advantage[0::2] - advantage[1::2])) ** 2
    change = logp - logp_old
    return torch.maximum(square(change), square(change.clamp(-clip_range, clip_range)))


# ------------------------------------------------------------------------------------------------------------
# Training

def check(c):
    choices = dict(method=('sft', 'grpo', 'sdpo'), sigmas=('logit_normal', 'uniform'),
                   kl_var=('true', 'code'))
    owners = {'timestep_fraction best_of global_std': 'grpo', 'gamma buffer': 'sdpo',
              'sigmas prompt_dropout': 'sft', ROLLOUT: 'grpo or sdpo'}
    check_settings(c, SETTINGS[0], choices, owners, c.updates if c.method == 'grpo' else 1,
                   above='lr alpha clip_range adv_clip eta timestep_fraction')
    rl, G, left = c.method != 'sft', c.group_size, c.steps - c.drop_last
    need(c.method != 'grpo' or G > 1, 'group_size = 1: GRPO compares the samples of one prompt; at least 2 '
         '(DanceGRPO: 12)')
    need(c.method != 'sdpo' or G == 2, f'group_size = {G}: SDPO compares two trajectories of one start; set '
         'group_size = 2')
    need(c.method != 'sdpo' or c.same_noise, 'same_noise = False: SDPO\'s pairs start from one noise')
    need(c.method != 'sdpo' or c.micro_batch > 1, 'micro_batch = 1: the pairs of SDPO share a forward; at '
         'least 2')
    need(c.buffer >= 16, f'buffer = {c.buffer}: SDPO uses it from 16 returns on (published: 32)')
    for k in 'timestep_fraction prompt_dropout gamma'.split():
        need(getattr(c, k) <= 1, f'{k} = {getattr(c, k)}: at most 1')
    need(c.best_of == 0 or 2 <= c.best_of <= G, f'best_of = {c.best_of}: 0, or from 2 to group_size = {G}')
    need(c.method != 'sdpo' or c.updates <= left, f'updates = {c.updates}: at most one for each of the '
         f'{left} steps that are trained')
    need(c.sde != 'cps' or c.drop_last or not rl, "sde = 'cps' ends without noise: set drop_last = 1")
    need(c.sde != 'cps' or c.kl_var == 'true', "kl_var = 'code' is about 'flow' and 'dance'; with "
         "sde = 'cps' leave it at 'true'")
    need(c.init_from != 'merge', "init_from = 'merge' belongs to train_opd.py; here: base, resume or an "
         "adapter")
    need(not rl or c.reward, 'reward is empty: give at least one dict(reward=..., weight=...)')
    for r in c.reward if rl else ():
        need(isinstance(r, dict) and set(r) <= {'reward', 'weight'} and isinstance(r.get('reward'), str),
             f'reward {r!r}: a dict(reward=name, weight=number)')
        check_number(f'reward {r["reward"]!r}: weight', r.get('weight', 1))
    names = [r['reward'] for r in c.reward if rl]
    need(len(set(names)) == len(names), f'reward: one stands there twice: {", ".join(names)}')
    for name in names + [c.watch_reward] * bool(c.watch_reward):
        rewards.check(name)
    return check_data(c, [], need_target=not rl)


def main(argv):
    c = train_opd.own_settings(SETTINGS, argv)
    d = check(c)
    if os.environ.get('RANK', '0') == '0':
        print(f'{c.method} on {c.model}, {"%d x %d" % d.size} pixels, '
              f'{c.batch_size} samples a step' + (f' in groups of {c.group_size}, {c.steps} steps of {c.sde} '
                                                  f'{c.eta}' if c.method != 'sft' else ''))
        for k, b in d.buckets.items():
            print(f'bucket {k:20s} {len(b)} rows, {len(d.held[k])} to evaluate on')
    if c.dry_run:
        return print('dry run: settings and data are fine')
    routes = [dict(data=k, weight=float(len(b))) for k, b in d.buckets.items()]
    plan_at = lambda run, step: run.mine(step, routes, same_noise=c.same_noise and c.method != 'sft',
                                       updates=c.updates if c.method == 'grpo' else 1)
    device = train_opd.launch(c.device, c.tf32).device                 # rewards first: their files may lack
    judges = [(r['reward'], rewards.load(r['reward'], device), r.get('weight', 1.0)) for r in c.reward
              if c.method != 'sft']
    watch = rewards.load(c.watch_reward, device) if c.watch_reward else None
    run = Run(c, d, plan_at, max(c.eval_samples, c.show))
    student, models = run.student, run.models
    names = [name for name, *_ in judges]
    memory = {(p, name, i): deque(v, c.buffer) for p, name, i, v in run.state if name in names}  # of sdpo
    looked, failed = set(), []
    path, fine = run.sigmas, run.field.sigmas(1000, *d.size) if c.method == 'sft' else None

    def ask_rewards(images, rows):
        """All rewards of some pictures, one list each. After a failure nobody is asked any more."""
        if not failed:
            try:
                return [torch.tensor(rewards.checked(k, f, images, rows, run.out)) for k, f, _ in judges]
            except rewards.RewardError as e:
                failed.append(e)
        raise failed[0]

    def reward_thread():                                       # by itself it would have the first GPU
        own = device if device.type == 'cuda' else None
        return ThreadPoolExecutor(1, initializer=lambda: own and torch.cuda.set_device(own))

    def note_rewards(todo, values):
        run.note(todo, reward=sum(w * v for (_, _, w), v in zip(judges, values)),
                 **{f'reward/{name}': v for (name, _, _), v in zip(judges, values)})

    def note_groups(todo, alive):
        dead = 1.0 - alive.float()
        run.note(todo[::c.group_size], groups=torch.ones_like(dead), skipped_groups=dead, skipped_share=dead)

    def flow_matching(todo, step, backward=True):
        """mean |v - (eps - x0)|^2 at random noise levels of the data's own pictures."""
        total = []
        for some in run.chunks(todo):
            cond, empty = run.prompts.conditions([s.data for s in some], *d.size)
            cond = [e if backward and rng(c.seed, step, s.number, 'drop').random() < c.prompt_dropout else x
                    for s, x, e in zip(some, cond, empty)]
            sigma = torch.stack([draw_sigma(fine, rng(c.seed, step, s.number, 'sigma'), c.sigmas)
                                 for s in some]).to(device)
            x0 = torch.stack([load_image(s.data['target_image'], *d.size) for s in some])
            x0 = run.field.encode_image(x0)
            eps, s = run.noise(some), train_opd.col(sigma)
            v = models.velocity('student', (1 - s) * x0 + s * eps, sigma, cond)
            loss = velocity_error(v, eps - x0)
            if backward:
                (loss * torch.tensor([x.share for x in some], device=device)).sum().backward()
                run.note(some, loss=loss.detach(), sigma=sigma)
            total += loss.tolist()
        return total

    def near_base(t, v, z, s, s_next):
        """KL(student step || base step), one number a sample, and the same for the log. With kl_beta = 0 it
        is only looked at, once in a step."""
        if not c.kl_beta and run.step in looked:
            return 0.0, {}
        looked.add(run.step)
        with torch.no_grad():
            v_base = run.velocity('base', t.todo, z, s, c.guidance)
        kl = diffusionopd_loss(v, v_base, s, s_next, c.eta, c.sde, c.kl_var)
        return kl if c.kl_beta else 0.0, dict(kl=kl.detach())

    def rolled(todo, n):
        """Trajectories and final latents. Rewards are asked in a thread, while the next chunk is sampled."""
        for some in run.chunks(todo):
            if failed:
                raise failed[0]
            t = run.trajectory(some, n, c.guidance)
            with torch.no_grad():
                z, s = t.z[-1], path[n].expand(len(some))
                x0 = z if n == c.steps else z - path[n] * run.velocity('student', some, z, s, c.guidance)
            yield t, x0

    def grpo(todo, step):
        """Advantage within the group, PPO ratio step by step, on a random part of the steps."""
        n = c.steps - c.drop_last
        with reward_thread() as pool, torch.no_grad():
            jobs = [[(t, pool.submit(ask_rewards, run.field.decode(x0), [s.data for s in t.todo]))
                     for t, x0 in rolled(p, n)] for p in run.parts(todo)]
            got = [[(t, job.result()) for t, job in part] for part in jobs]
        whole = None
        if c.global_std:                                       # of all chunks and processes
            rows = [r for part in got for _, values in part for r in torch.stack(values, 1).tolist()]
            whole = list(torch.tensor(gather(run.world, rows)).std(0))
        trained = sorted(rng(c.seed, step, 'steps').sample(range(n), max(1, round(n * c.timestep_fraction))))
        for part in got:
            for t, values in part:
                note_rewards(t.todo, values)
                advantage, alive = combined_advantage(values, [w for _, _, w in judges], c.group_size,
                                                      c.adv_clip, whole)
                note_groups(t.todo, alive)
                use = alive.repeat_interleave(c.group_size)
                use &= extremes(advantage, c.group_size, c.best_of) if c.best_of else True
                t.advantage = advantage[None].to(device)
                use = pick(t, use.nonzero().flatten().tolist())
                for t, i in ((t, i) for t in run.pieces(use) for i in trained):
                    share = torch.tensor([s.share for s in t.todo], device=device) * c.updates / len(trained)
                    share *= c.group_size / c.best_of if c.best_of else 1
                    v, logp, z, s, s_next = run.policy(t, i)
                    loss, ratio = ppo_loss(logp, t.logp[i], t.advantage[0], c.clip_range)
                    kl, seen = near_base(t, v, z, s, s_next)
                    (share * (loss + c.kl_beta * kl)).sum().backward()
                    off = (ratio - 1).abs()
                    run.note(t.todo, loss=loss.detach(), sigma=s, ratio_off=off,
                             clipped=(off > c.clip_range).float(), **seen)
            run.apply()

    def sdpo(todo, step):
        """Two trajectories from one noise, rewards along the way, the difference loss on shuffled steps."""
        n, ts, all_returns = c.steps - c.drop_last, [], []
        with reward_thread() as pool, torch.no_grad():
            for t, x0 in rolled(todo, n):
                # dual states: after each step the noisy latent, and the clean picture predicted from it. (The
                # prediction from the common first noise is the same for both and cannot tell them apart.)
                later = [t.z[i] - path[i] * t.v[i] for i in range(1, n)]
                t.clean = torch.stack([*later, x0])
                B, steps_ = len(t.todo), len(t.clean)
                middle = [rng(c.seed, step, s.group, 'anchor').randrange(1, steps_ - 1) if steps_ > 2 else 0
                          for s in t.todo]
                asked = [torch.zeros(B, dtype=torch.long), torch.tensor(middle), torch.full((B,), steps_ - 1)]
                asked = [q for k, q in enumerate(asked) if (k < 1 or steps_ > 1) and (k != 1 or steps_ > 2)]
                rows = [s.data for s in t.todo] * len(asked)
                pictures = run.field.decode(torch.cat([t.clean[q, torch.arange(B)] for q in asked]))
                ts.append((t, asked, pool.submit(ask_rewards, pictures, rows)))
            for t, asked, job in ts:
                values = [v.view(len(asked), -1).to(device) for v in job.result()]
                note_rewards(t.todo, [v[-1] for v in values])
                t.returns = torch.stack([returns(interpolate(t.clean, asked, v), c.gamma) for v in values])
                all_returns += [(s.number, s.data['prompt'], t.returns[:, :, j].tolist())
                                for j, s in enumerate(t.todo)]
        everyone = sorted(gather(run.world, all_returns))      # the buffers are the same on all processes
        each = list(itertools.product(range(len(judges)), range(n)))
        for (_, prompt, x), (r, i) in itertools.product(everyone, each):
            memory.setdefault((prompt, names[r], i), deque(maxlen=c.buffer)).append(x[r][i])
        run.state = [(*k, list(v)) for k, v in memory.items()]
        batch = {(r, i): [x[r][i] for _, _, x in everyone] for r, i in each}
        for t, *_ in ts:
            t.advantage = torch.zeros_like(t.returns[0])
            for (j, s), (r, i) in itertools.product(enumerate(t.todo), each):
                t.advantage[i, j] += judges[r][2] * buffered(t.returns[r, i, j].item(),
                                                             memory[s.data['prompt'], names[r], i],
                                                             batch[r, i])
            t.advantage.clamp_(-c.adv_clip, c.adv_clip)
            note_groups(t.todo, (t.returns[..., 0::2] != t.returns[..., 1::2]).any(0).any(0))
            t.order = torch.tensor([rng(c.seed, step, s.group, 'order').sample(range(n), n)
                                    for s in t.todo]).T
        for u in range(c.updates):
            for t, *_ in ts:
                for i in (i for k, i in enumerate(t.order) if k * c.updates // n == u):
                    v, logp, z, s, s_next = run.policy(t, i)
                    b = torch.arange(len(i))
                    loss = sdpo_loss(logp, t.logp[i, b], t.advantage[i, b], c.gamma ** i.to(device),
                                     c.clip_range)
                    kl, seen = near_base(t, v, z, s, s_next)
                    share = torch.tensor([x.share for x in t.todo], device=device) * c.updates / n
                    ((2 * share[0::2] * loss).sum() + c.kl_beta * (share * kl).sum()).backward()
                    off = (logp - t.logp[i, b]).detach().abs()
                    run.note(t.todo, loss=loss.detach().repeat_interleave(2), sigma=s, ratio_off=off,
                             clipped=(off > c.clip_range).float(), **seen)
            run.apply()

    still = {}

    def evaluate(step):
        """Fixed noise: rewards, the watched one, the score, by bucket; and the grid that shows hacking."""
        result, lines, names = {}, [], []
        for k in d.buckets:
            rows = run.eval_rows[k][:c.eval_samples]
            now = run.render('student', k, rows, c.sample_steps, c.guidance, student.ema)
            if k not in still:
                still[k] = run.render('base', k, rows[:c.show], c.sample_steps, c.guidance)
            if c.method == 'sft' and all(r['target_image'] for r in rows):
                todo = [SimpleNamespace(data=r, label=k, number=i, noise=torch_rng(c.seed, 'loss', k, i))
                        for i, r in enumerate(rows)]
                with torch.no_grad(), student.wearing(student.ema):
                    losses = gather(run.world,
                                    flow_matching(todo[run.world.rank::run.world.size], 'eval', False))
                result[f'loss/{k}'] = sum(losses) / len(losses)
            for name, f, _ in judges + ([('watched', watch, 0)] if watch else []):
                ask = lambda images, rows: rewards.checked(name, f, images, rows, run.out)
                result[f'{name}/{k}'] = score_mean(run.judged(ask, now, rows))
            if c.score:
                result[f'score/{k}'] = score_mean(run.judged(load_function(c.score), now, rows))
            for i, r in enumerate(rows[:c.show]):
                pair = [run.picture(r[p]) for p in ('source_image', 'target_image')]
                lines.append([*pair, still[k][i], now[i]])
                names.append(f'{k}: {r["prompt"]}')
        if run.world.rank == 0:
            grid(lines, run.out / 'samples' / f'step_{step:06d}.png', names,
                 ['source', 'target', 'base', 'now'])
            print(f'step {step:6d}  ' + '  '.join(f'{k} {v:.4g}' for k, v in result.items()))
            run.log.add(dict(step=step, **{f'eval/{k}': v for k, v in result.items()}))
        return result

    before = run.at_start('eval/', evaluate(run.first))
    for todo in run.steps(evaluate):
        if c.method == 'sft':
            flow_matching(todo, run.step)
            run.apply()
        else:
            (grpo if c.method == 'grpo' else sdpo)(todo, run.step)
    after = evaluate(c.max_steps)
    run.end({k: dict(before=before[k], after=after[k]) for k in after},
            ['loss', 'reward', 'kl', *(f'eval/{k}' for k in after)], 'evaluation')


if __name__ == '__main__':
    configurator.run(main)
