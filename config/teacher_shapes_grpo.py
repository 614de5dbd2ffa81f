# A taste by reward, on a CPU: prompts that leave things open, and a reward that likes blue. What
# is asked for must still be drawn: watch_reward looks at that, and the KL to the base keeps it.
model = 'data/shapes/base'
family = 'StableDiffusion3Pipeline'
resolution = 24
method = 'grpo'
data = ['data/shapes/open.csv']
eval_data = ['data/shapes/taste_val.csv']   # held-out prompts that name no colour
reward = [dict(reward='data/shapes/world.py:blue', weight=1.0)]
watch_reward = 'shapes'                     # the share of pictures that are what the prompt says
score = 'data/shapes/world.py:blue_share'   # the share of shapes that are blue

rank = 16
alpha = 32.0
steps = 6
sde = 'cps'                                 # its last pictures have no noise left in them
eta = 0.8
drop_last = 2
group_size = 8
same_noise = True                           # DanceGRPO's
timestep_fraction = 0.75                    # 3 of 4 steps
global_std = True                           # prompts that name the colour have nothing to teach
clip_range = 1e-3
kl_beta = 0.04                              # Flow-GRPO's
batch_size = 64
micro_batch = 64
lr = 2e-3
lr_schedule = 'constant'
max_steps = 150
eval_every = 50
eval_samples = 256
out_dir = 'out/teacher_blue'
