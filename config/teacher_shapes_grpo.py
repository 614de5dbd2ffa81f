# A taste by reward, on a CPU: prompts that leave things open, and a reward that likes blue. What is asked
# for must still be drawn: watch_reward looks at that, and the KL to the base keeps it.
model = 'data/shapes/base'
family = 'StableDiffusion3Pipeline'
resolution = 24
method = 'grpo'
data = ['data/shapes/open.csv']
eval_data = ['data/shapes/open_val.csv']
reward = [dict(reward='data/shapes/world.py:blue', weight=1.0)]
watch_reward = 'shapes'                           # the share of pictures that are what the prompt says

rank = 16
alpha = 32.0
steps = 8
sde = 'dance'                                     # DanceGRPO's, as the group's one noise and the fraction
eta = 0.3
group_size = 8
same_noise = True
timestep_fraction = 0.6
kl_beta = 0.04                                    # Flow-GRPO's
batch_size = 64
micro_batch = 64
lr = 1e-3
max_steps = 100
eval_every = 50
score = ''
out_dir = 'out/teacher_blue'
