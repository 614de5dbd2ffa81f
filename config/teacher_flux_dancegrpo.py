# DanceGRPO (2505.07818) on FLUX.1-dev, with the settings of its LoRA release (16 steps and lr 1e-5
# are those of its full fine-tuning). Its reward, HPSv2.1, wants an environment of its own: serve
# it and put the URL here (docs/rewards.md). Its schedule has a fixed shift of 3; here it is the
# pipeline's.
# Memory, computed, not measured: 60 GB (base in bf16 24 GB, adapter of rank 128 and optimizer 9
# GB, PickScore 4 GB, the rest activations of 12 samples: one group at a time).
model = 'black-forest-labs/FLUX.1-dev'      # gated, not commercial: accept, then hf auth login
family = 'FluxPipeline'
resolution = 720                            # published, down to weight_decay, but for what is ours
distilled_guidance = 3.5                    # the model card's
method = 'grpo'
data = ['data/examples/aesthetic.txt']      # ours: 24 prompts, to try it; thousands are wanted
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]  # ours: needs nothing but its weights
watch_reward = 'clip'                       # ours

rank = 128
alpha = 256.0
steps = 12
sde = 'dance'
eta = 0.3
guidance = 1.0
group_size = 12
same_noise = True
drop_last = 1
timestep_fraction = 0.6
clip_range = 1e-4
adv_clip = 5.0
max_steps = 300
batch_size, micro_batch = 96, 12            # ours: a prompt on each of 8 GPUs
betas = [0.9, 0.999]                        # ours: torch's
lr = 3e-4
lr_schedule = 'constant'
weight_decay = 1e-4
save_every = 10                             # ours, as all below: steps are long
ema_decay = 0.9
grad_checkpointing = True
eval_samples, score = 8, ''
out_dir = 'out/flux_pickscore'
