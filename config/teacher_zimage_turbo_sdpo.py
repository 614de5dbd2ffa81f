# SDPO (2411.11727) on Z-Image-Turbo: a reward learned without losing the eight steps. On this model
# nobody has published it: what the paper says is marked, all else is ours.
# Memory, computed, not measured: 32 GB (base in bf16 12 GB, adapter of rank 32 and optimizer 1 GB,
# PickScore 4 GB, the rest activations of four samples and VAE).
model = 'Tongyi-MAI/Z-Image-Turbo'
family = 'ZImagePipeline'
resolution = 1024
method = 'sdpo'
data = ['data/examples/aesthetic.txt']      # 24 prompts, to try it; a run wants thousands
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]
watch_reward = 'clip'

rank = 32                                   # half of the student's, so that two fit in it
alpha = 32.0
steps = sample_steps = 8                    # the model card's
sde = 'cps'                                 # few steps: its last pictures have no noise in them
eta = 0.8
drop_last = 1
guidance = 1.0                              # none, as the model is used
group_size, same_noise = 2, True            # published, as the next four
gamma = 0.99
buffer = 32
clip_range = 1e-4
adv_clip = 5.0
batch_size, micro_batch = 64, 4
betas = [0.9, 0.999]
lr = 6e-5                                   # the release's for PickScore
weight_decay = 1e-4                         # the release's
lr_schedule = 'constant'
max_steps = 1000
save_every = 10                             # steps are long
grad_checkpointing = True
eval_samples, score = 8, ''
out_dir = 'out/zimage_turbo_pickscore'
