# SDPO (2411.11727) on a CPU: a few-step model learns to draw what it is asked for in four steps.
# The shipped base can do that; one that was stopped early cannot: --model=out/half/base, which
# docs/shapes.md makes.
model = 'data/shapes/base'
family = 'StableDiffusion3Pipeline'
resolution = 24
method = 'sdpo'
data = ['data/shapes/t2i.csv']
eval_data = ['data/shapes/t2i_val.csv']
reward = [dict(reward='data/shapes/world.py:clear', weight=1.0)]
watch_reward = 'shapes'

rank = 8
alpha = 16.0
lora_targets = ['to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj',
                'to_add_out', 'net.0.proj', 'net.2', 'norm1.linear', 'norm1_context.linear']
steps = 6                                   # of which four are drawn with noise and trained
sample_steps = 4                            # as the model is to be used
sde = 'cps'                                 # its last pictures have no noise left in them
eta = 0.8
drop_last = 2
group_size = 2                              # its pairs, which start from one noise
kl_beta = 0.3                               # the loss is a square: this weighs more here
batch_size = 64
micro_batch = 64
lr = 7e-4                                   # more lets the one-step pictures fade
lr_schedule = 'cosine'
warmup = 10
ema_decay = 0.95
max_steps = 320
eval_every = 80
eval_samples = 256
score = 'data/shapes/world.py:score'
out_dir = 'out/teacher_sdpo'
