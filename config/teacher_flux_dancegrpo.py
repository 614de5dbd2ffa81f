# DanceGRPO (2505.07818) on FLUX.1-dev as a LoRA. Its reward, HPSv2.1, wants an environment of its own:
# serve it and put the URL here (rewards.py). The published schedule has a fixed shift of 3; here it is the
# pipeline's own.
# Memory: about 60 GB (estimated: base in bf16 24 GB, adapter of rank 128 and optimizer 9 GB, PickScore 4
# GB, the rest activations of 12 samples; micro_batch = 12 is one group at a time).
model = 'black-forest-labs/FLUX.1-dev'            # gated: accept its licence, then hf auth login
family = 'FluxPipeline'
resolution = 720                                  # from here to clip_range as published, where not said
max_sequence_length = 512                         # the pipeline's
distilled_guidance = 3.5                          # the model card's
method = 'grpo'
data = ['data/examples/aesthetic.txt']            # 24 prompts, to try it; a run wants thousands
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]   # ours: needs nothing but its weights
watch_reward = 'clip'                             # ours

rank = 128
alpha = 128.0
steps = 16
sde = 'dance'
eta = 0.3
guidance = 1.0
group_size = 12
same_noise = True
drop_last = 1
timestep_fraction = 0.6
clip_range = 1e-4
batch_size = 96                                   # ours: a prompt on each of 8 GPUs
micro_batch = 12
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 3e-4                                         # published for LoRA; 1e-5 for all weights
lr_schedule = 'constant'
weight_decay = 1e-4
max_steps = 300
save_every = 10                                   # steps are long
ema_decay = 0.9                                   # ours
grad_checkpointing = True
eval_samples = 8
score = ''
out_dir = 'out/teacher_flux_dancegrpo'
