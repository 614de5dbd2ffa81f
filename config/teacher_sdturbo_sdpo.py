# SDPO (2411.11727) on SD-Turbo: a reward learned without losing the few steps. Published with stochastic
# DDIM; here the noise is that of a flow's step. Rewards that stand in the paper and need their own
# environment can be served.
# Memory: about 12 GB (estimated: base in bf16 2 GB, adapter 0.2 GB, PickScore 4 GB, the rest activations).
model = 'stabilityai/sd-turbo'
family = 'StableDiffusionPipeline'
resolution = 512
method = 'sdpo'
data = ['data/examples/aesthetic.txt']            # 24 prompts, to try it; a run wants thousands
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]
watch_reward = 'clip'

rank = 32                                         # ours, down to eta
alpha = 32.0
steps = sample_steps = 4                          # as the model is used; the release samples with 50
drop_last = 1                                     # DDIM's last step has no noise either
sde = 'dance'
eta = 0.3
guidance = 1.0                                    # the model takes none
group_size = 2                                    # from here to adv_clip as published
same_noise = True
gamma = 0.99
buffer = 32
clip_range = 1e-4
adv_clip = 5.0
batch_size = 64
micro_batch = 16
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 6e-5                                         # the release's for PickScore; 1e-4 for the aesthetic
weight_decay = 1e-4                               # the release's
lr_schedule = 'constant'
max_steps = 2000
grad_checkpointing = True
eval_samples = 16
score = ''
out_dir = 'out/teacher_sdturbo_sdpo'
