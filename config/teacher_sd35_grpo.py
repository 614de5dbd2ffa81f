# Flow-GRPO (2505.05470) with PickScore: its published settings for SD3.5-medium.
# Memory: about 30 GB (estimated: base in bf16 5 GB, adapter 1 GB, PickScore 4 GB, activations of 24 samples
# with guidance). Published on 32 GPUs: on few, take less batch_size, a multiple of 24 x updates x GPUs.
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 512
method = 'grpo'
data = ['data/examples/aesthetic.txt']            # 24 prompts, to try it; a run wants thousands
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]
watch_reward = 'clip'                             # ours: falls when the picture forgets the prompt

rank, alpha = 32, 64.0
steps = 10
sde, eta = 'flow', 0.7
guidance = 4.5
group_size = 24
same_noise = False
drop_last = 1                                     # 9 of 10 steps are trained: all but the last
timestep_fraction = 1.0
clip_range = 1e-4
adv_clip = 5.0
global_std = True
kl_beta = 0.01                                    # for PickScore; 0.04 for OCR and GenEval
kl_var = 'code'                                   # which is what these numbers were found with
batch_size = 1152                                 # 48 prompts of 24
updates = 2
micro_batch = 24
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 3e-4
weight_decay = 1e-4
lr_schedule = 'constant'
ema_decay = 0.9
ema_every = 8
grad_checkpointing = True
max_steps = 1000                                  # ours, as save_every: steps are long
save_every = 10
sample_steps = 40                                 # published, for evaluation
out_dir = 'out/teacher_pickscore'
score = ''
