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
steps = sample_steps = 4                          # SDPO: two to four
group_size = 2                                    # its pairs, which start from one noise
eta = 0.3
batch_size = 64
micro_batch = 64
lr = 1e-3
max_steps = 100
eval_every = 50
score = ''
out_dir = 'out/teacher_sdpo'
