# SDPO (2411.11727) on a CPU: a few-step model learns to draw what it is asked for in four steps.
model = 'data/shapes/base'
family = 'StableDiffusion3Pipeline'
resolution = 24
method = 'sdpo'
data = ['data/shapes/t2i.csv']
eval_data = ['data/shapes/t2i_val.csv']
reward = [dict(reward='shapes_smooth', weight=1.0)]
watch_reward = 'shapes'

rank = 16
alpha = 32.0
steps = 6                                         # of which four are drawn with noise and trained
sample_steps = 4                                  # SDPO is for two to four
sde = 'cps'                                       # its last pictures have no noise left in them
eta = 0.6
drop_last = 2
group_size = 2                                    # its pairs, which start from one noise
batch_size = 128
micro_batch = 128
lr = 5e-4
lr_schedule = 'constant'
warmup = 10
ema_decay = 0.95
max_steps = 60
eval_every = 20
score = 'data/shapes/world.py:score'
out_dir = 'out/teacher_sdpo'
